"""Both ends of the channel, against an enemy at the other: only that machine ends."""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import itertools
import logging
import mmap
import os
import socket
import threading
import typing
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from fs.fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mounting import has_news

from vmfs.fs import lane
from vmfs.fs.ring import COUNTED, Ring
from vmfs.host.credentials import Credentials
from vmfs.host.machines import Host
from vmfs.host.process import Asker, MachineProcess
from vmfs.host.settings import MountSettings
from vmfs.host.zygote import Job
from vmfs.machine import worker
from vmfs.words import commands
from vmfs.words.errors import LimitReached, ProcessFailed, VmfsError

B = Credentials(54322, 54322)
ENCODE = msgspec.msgpack.Encoder().encode
BECOME = commands.Become(B.uid, B.gid, [], B.file_size, 0)


# ---- messages

# Numbers that mean something to somebody, and those that mean too much.
NUMBERS = st.one_of(st.integers(-1, 8), st.sampled_from([-(1 << 63), 1 << 31, (1 << 63) - 1, (1 << 64) - 1]))
NAMES = st.one_of(
    st.sampled_from(["regs", "mem", "vm_run", "console", "dev/add", "reg/rax", "framebuffer", "dev", "reg", "", "/",
                     "../x", "\0", "x" * 5000, "dev/blk0", "cpu0/regs", "symbols", "kernel", "trace.bin"]),
    st.text(max_size=20),
)  # fmt: skip
BYTES = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([b"", b"run", b"pc", b"off"]),
    st.just(commands.DATA_MOST).map(bytes),
)


def values(kind: Any) -> st.SearchStrategy[Any]:
    if kind is int:
        return NUMBERS
    if kind is str:
        return NAMES
    if kind is bytes:
        return BYTES
    if kind is bool:
        return st.booleans()
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        few = st.lists(values(arguments[0]), max_size=5)
        return st.one_of(few, few.map(lambda one: one * 2000))
    assert origin is tuple, kind
    return st.tuples(*map(values, arguments))


def messages(union: Any) -> st.SearchStrategy[commands.Message]:
    kinds = [kind for kind in typing.get_args(union)]
    return st.one_of(
        [st.builds(kind, **{one.name: values(one.type) for one in msgspec.structs.fields(kind)}) for kind in kinds]
    )


def packets(union: Any) -> st.SearchStrategy[bytes]:
    """Mostly messages; some that were changed, and some that are nothing."""
    whole = messages(union).map(ENCODE).filter(lambda packet: len(packet) <= commands.PACKET_MOST)
    cut = st.tuples(whole, st.integers(0, 40)).map(lambda one: one[0][: one[1]])
    flipped = st.tuples(whole, st.integers(0, 1 << 20), st.integers(1, 255)).map(_flip)
    return st.one_of(whole, whole, whole, cut, flipped, st.binary(min_size=1, max_size=100)).filter(bool)


def _flip(one: tuple[bytes, int, int]) -> bytes:
    packet, at, bits = one
    changed = bytearray(packet)
    changed[at % len(changed)] ^= bits
    return bytes(changed)


FDS = ("nothing", "nothing", "fifo", "socket", "file", "memfd", "four")


def descriptors(name: str, folder: str) -> list[int]:
    """What an enemy sends along."""
    if name == "fifo":
        path = f"{folder}/fifo"
        if not os.path.exists(path):
            os.mkfifo(path)
        return [os.open(path, os.O_RDWR)]
    if name == "socket":
        return [socket.socket(socket.AF_UNIX).detach()]
    if name == "file":
        return [os.open("/dev/null", os.O_RDONLY)]
    if name == "memfd":
        return [os.memfd_create("enemy")]
    return [os.open("/dev/zero", os.O_RDONLY) for _ in range(4)] if name == "four" else []


def send(sock: socket.socket, packet: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except OSError as error:
        if error.errno == errno.EPERM and fds:  # this kernel spares the server from them (SO_PASSRIGHTS)
            send(sock, packet, [])
    finally:
        for fd in fds:
            os.close(fd)


# ---- the server's end


class Enemies:
    """In the place of the zygote: the other ends of the channels are the test's."""

    layers: dict[str, str] = {}

    def __init__(self) -> None:
        self.lines: list[socket.socket] = []
        self.jobs: list[Job] = []
        self.opened: list[Any] = []

    def machine(self, engine: str, memory_size: int, *, fresh: bool = False) -> tuple[Job, socket.socket]:
        job = Job(len(self.jobs) + 1)
        job.pid = os.getpid()
        job.forked.set()
        ours, line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line.setblocking(False)
        self.lines.append(line)
        self.jobs.append(job)
        return job, ours

    def opener(self, who: Credentials, work: Any, answer: socket.socket) -> Job:
        job = Job(1000 + len(self.opened))
        self.opened.append((who, work))
        job.code = 0
        job.forked.set()
        job.ended.set()
        return job

    def kill(self, job: Job) -> None:
        if job.code is None:
            job.code = -9
            job.ended.set()
            self.lines[job.number - 1].close()


class Errors(logging.Handler):
    """Tracebacks in the log."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0]:
            self.found.append(logging.Formatter().format(record))


@pytest.fixture
def log() -> Any:
    handler = Errors()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


Act = Callable[[MachineProcess, socket.socket, Enemies], Awaitable[None]]


def against_a_machine(act: Act) -> None:
    """`act` gets a machine that was born, and the enemy's end. Whatever it does, it leaves no descriptor."""

    async def main() -> None:
        enemies = Enemies()
        host = Host(enemies, "fake", MountSettings())  # type: ignore[arg-type]
        machine = host.create(B)
        memory = os.memfd_create("ram")
        os.ftruncate(memory, 1 << 20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.start)
            await trio.testing.wait_all_tasks_blocked()
            assert enemies.lines[0].recv(4096) == ENCODE(BECOME)
            send(enemies.lines[0], ENCODE(commands.Born(commands.VERSION, "fake", memory)), [])
        try:
            await act(machine, enemies.lines[0], enemies)
        finally:
            enemies.lines[0].close()
            enemies.kill(enemies.jobs[0])
            await machine.remove()
            await trio.testing.wait_all_tasks_blocked()
            os.close(memory)

    trio.run(main)




def descriptors_there() -> dict[str, str]:
    """Each, and what it is of."""
    there = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of this listing
            there[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return there


def left_since(before: dict[str, str]) -> dict[str, str]:
    """Descriptors that have come. Some of an earlier test may have gone: the garbage collector comes when it likes. A
    layer of a snapshot is closed with its object, which the traceback of a snapshot that failed may have."""
    gc.collect()
    return {fd: what for fd, what in descriptors_there().items() if before.get(fd) != what}


QUICK = settings(max_examples=60, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])


class Shared:
    """In the place of a machine's process: it gets the memory, and says there what it likes."""

    FIRST, PUT, TAKEN, BYTES = 0, 8, 64, 4096  # struct ring_page

    def __init__(self, limit: int = 1 << 30) -> None:
        self.host = Host(None, "fake", MountSettings(max_memory=limit))  # type: ignore[arg-type]
        self.owner, self.shared = B, 0
        self.page: Any = None

    def hand(self, message: commands.Message, fds: tuple[int, ...]) -> bool:
        assert message == commands.Share(7)
        with pytest.raises(PermissionError):  # what a server maps of it stays there
            os.ftruncate(fds[0], 4096)
        self.page = mmap.mmap(fds[0], 0)
        return True

    def say(self, first: int, put: int, taken: int) -> None:
        for at, number in ((self.FIRST, first), (self.PUT, put), (self.TAKEN, taken)):
            self.page[at : at + 8] = (number % (1 << 64)).to_bytes(8, "little")

    def taken(self) -> int:
        return int.from_bytes(self.page[self.TAKEN : self.TAKEN + 8], "little")


def test_what_a_machine_hands_on_is_read_once_and_again():
    machine = Shared()
    ring = Ring(machine)  # type: ignore[arg-type]
    assert machine.shared == COUNTED and ring.share(7)
    assert ring.read(0, 10) == b""  # it has not begun
    room, again = 2 << 20, 256 << 10
    ahead = room - again
    whole = bytes(range(256)) * (room // 256)
    machine.page[machine.BYTES :] = whole
    at = 5 * room + 100
    machine.say(at - 64, at + ahead, at)
    ring.begin()
    assert ring.read(at - 65, 8) == b"" == ring.read(at + 1, 8)
    assert ring.read(at - 64, 8) == bytes(range(36, 44)) and machine.taken() == at
    assert ring.read(at, 8) == bytes(range(100, 108)) and machine.taken() == at + 8
    assert ring.read(at, 1 << 30) == (whole + whole)[100 : 100 + ahead]  # over the end of the room
    end = at + ahead
    assert machine.taken() == end and ring.read(end, 8) == b""
    assert len(ring.read(end - again, 1 << 30)) == again and ring.read(end - again - 1, 8) == b""
    ring.close()
    assert machine.shared == 0


def test_a_machine_that_lies_about_what_it_hands_on():
    machine = Shared()
    ring = Ring(machine)  # type: ignore[arg-type]
    assert ring.share(7)
    room, again = 2 << 20, 256 << 10
    for first, taken in ((1, 0), (0, again + 1), (1 << 63, 1 << 63), (-1, 0), (-1, -1)):
        machine.say(first, taken, taken)
        with pytest.raises(ProcessFailed):
            ring.begin()
        assert ring.read(taken, 10) == b""
    machine.say(0, 0, 0)
    ring.begin()
    for put in (room - again + 1, room, 1 << 62, -1):
        machine.say(0, put, 0)
        assert ring.read(0, 10) == b""
    machine.say(0, 100, 0)
    assert len(ring.read(0, 10)) == 10
    for put in (9, 0):  # it takes back what was read
        machine.say(0, put, 0)
        assert ring.read(10, 10) == b"" == ring.read(5, 10)
    machine.say(50, 100, 50)  # the server's numbers are its own
    assert len(ring.read(5, 10)) == 10 and ring.read(16, 10) == b"" and machine.taken() == 15
    ring.close()


def test_a_ring_counts_against_the_limits():
    machine = Shared(limit=COUNTED - 1)
    with pytest.raises(LimitReached):
        Ring(machine)  # type: ignore[arg-type]
    assert machine.shared == 0


@QUICK
@given(st.lists(st.tuples(packets(commands.ToServer), st.sampled_from(FDS)), max_size=12))
def test_a_server_against_a_hostile_machine(tmp_path_factory, packed):
    handler = Errors()
    logging.getLogger().addHandler(handler)
    folder = str(tmp_path_factory.getbasetemp())
    before = descriptors_there()

    async def act(machine: MachineProcess, line: socket.socket, enemies: Enemies) -> None:
        async with trio.open_nursery() as nursery:
            for make in (
                lambda at: commands.Open(at, "regs", False, False, False, False, 0),
                lambda at: commands.Read(at, 1, 0, 100, 0),
                lambda at: commands.Read(at, 1, 0, 1 << 17, 0),
                lambda at: commands.Write(at, 1, 0, b"blk /x", 0),
                lambda at: commands.List(at, "dev"),
                lambda at: commands.Poll(at, 1, True),
            ):
                nursery.start_soon(ask, machine, make)
            nursery.start_soon(measure, machine)
            await trio.testing.wait_all_tasks_blocked()
            for packet, what in packed:
                send(line, packet, descriptors(what, folder))
                await trio.testing.wait_all_tasks_blocked()
            enemies.kill(enemies.jobs[0])

    try:
        against_a_machine(act)
    finally:
        logging.getLogger().removeHandler(handler)
    assert not handler.found, handler.found[0]
    assert not left_since(before)


async def ask(machine: MachineProcess, make: Callable[[int], commands.Message]) -> None:
    try:
        answer = await machine.call(make, asker=Asker(B))
    except VmfsError as error:
        assert 0 < error.errno < 512
        return
    expected = commands.ANSWERS.get(type(make(0)), commands.Done)
    assert isinstance(answer, expected)


async def measure(machine: MachineProcess) -> None:
    try:
        sizes, modified = await machine.measure(["regs", "mem"])
    except VmfsError:
        return
    assert modified >= 0
    assert all(0 <= number < 1 << 63 for size in sizes.values() for number in size)


def ended_by(*packed: bytes) -> str:
    """How the machine failed that said this."""
    failure = ""

    async def act(machine: MachineProcess, line: socket.socket, enemies: Enemies) -> None:
        nonlocal failure
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, machine, lambda at: commands.Open(at, "regs", False, False, False, False, 0))
            await trio.testing.wait_all_tasks_blocked()
            for packet in packed:
                send(line, packet, [])
                await trio.testing.wait_all_tasks_blocked()
            if b"" in packed:  # as if it had gone: it has a moment to end
                with trio.fail_after(60):
                    while not machine.failure:
                        await trio.sleep(0.01)
            failure = machine.failure
            enemies.kill(enemies.jobs[0])

    against_a_machine(act)
    return failure


CALL = 1  # the number of the first call


@pytest.mark.parametrize(
    "packed, why",
    [
        ([b"\xff\xff"], "what came is no message"),
        ([b""], "was killed by SIGKILL"),
        ([ENCODE(commands.Born(commands.VERSION, "fake", 0))], "it was born twice"),
        ([ENCODE(commands.Done(CALL))], "it answered Open by Done"),
        ([ENCODE(commands.Open(1, "regs", False, False, False, False, 0))], "what came is no message"),
        ([bytes(commands.PACKET_MOST + 1)], "a packet that is too long"),
        ([ENCODE(commands.Opened(CALL, 1, False)), ENCODE(commands.Opened(CALL, 1, False))], ""),  # answered twice
        ([ENCODE(commands.Done(999))], ""),
    ],
)
def test_what_ends_a_machine_and_what_does_not(packed, why, log):
    found = ended_by(*packed)
    assert why in found if why else not found
    assert not log.found


def test_a_machine_that_does_not_answer_about_its_page_has_none(monkeypatch):
    """Who opens a hot file does not wait for that."""
    monkeypatch.setattr(lane._fuse, "lane_serves", lambda: True)
    monkeypatch.setattr(lane, "ANSWER_SECONDS", 0.2)

    async def act(machine: MachineProcess, line: socket.socket, enemies: Enemies) -> None:
        its = lane.MachineLane(machine)
        for _ in range(3):
            its.prepare()
        with trio.fail_after(10):
            while its.is_ready:
                await trio.sleep(0.01)
        assert its.still() is None

    against_a_machine(act)


def test_a_machine_that_floods_leaves_others_their_turn():
    turns = 0

    async def act(machine: MachineProcess, line: socket.socket, enemies: Enemies) -> None:
        nonlocal turns
        packet, done = ENCODE(commands.Woken(1)), False
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

        def flood() -> None:
            while not done:
                send(line, packet, [])

        thread = threading.Thread(target=flood)
        thread.start()
        with trio.move_on_after(0.5):
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1
        done = True
        await trio.to_thread.run_sync(thread.join)

    against_a_machine(act)
    assert turns > 100


def test_a_machine_that_asks_and_does_not_listen_ends(log):
    """Nothing is kept for it: its questions are bounded, and an answer is given before the next one is taken."""
    failure = ""

    async def act(machine: MachineProcess, line: socket.socket, enemies: Enemies) -> None:
        nonlocal failure
        for number in itertools.count():
            send(line, ENCODE(commands.Reserve(number, "x", 1)), [])
            if number % 8 == 0:
                await trio.testing.wait_all_tasks_blocked()
            if machine.failure:
                break
            assert trio.lowlevel.current_statistics().tasks_living < 60
            assert number < 200_000
        failure = machine.failure

    against_a_machine(act)
    assert "it asks too much at a time" in failure
    assert not log.found


# What a machine may ask for, on the call of another user, or of its own.
WHO_ELSE = Credentials(0, 0)
ASKED = [
    (b"blk /srv/a ro", commands.OpenPath(1, CALL, "/srv/a", os.O_RDONLY), True),
    (b"blk /srv/a ro", commands.OpenPath(1, CALL, "/srv/a", os.O_RDWR), False),
    (b"blk /srv/a cow", commands.OpenPath(1, CALL, "/srv/a", os.O_RDWR), False),
    (b"blk /srv/a", commands.OpenPath(1, CALL, "/srv/a", os.O_RDWR), True),
    (b"blk /srv/b ro\nblk /srv/a rw", commands.OpenPath(1, CALL, "/srv/a", os.O_RDWR), True),
    (b"blk /srv/b ro\nblk /srv/a rw", commands.OpenPath(1, CALL, "/srv/b", os.O_RDWR), False),
    (b"blk '/srv/a b'", commands.OpenPath(1, CALL, "/srv/a b", os.O_RDWR), True),
    (b"blk /srv/a", commands.OpenPath(1, CALL, "/etc/shadow", os.O_RDONLY), False),
    (b"blk /srv/a", commands.OpenPath(1, CALL, "/srv", os.O_RDONLY), False),
    (b"blk /srv/a", commands.OpenPath(1, CALL, "/srv/a", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), False),
    (b"blk /srv/a", commands.OpenPath(1, CALL, "/srv/a", os.O_RDONLY | os.O_DIRECTORY), False),
    (b"/srv/a", commands.OpenPath(1, CALL, "/srv/a", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), False),
    (b"net user pcap=/a", commands.OpenPath(1, CALL, "/a", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), True),
    (b"net user pcap=/a", commands.OpenPath(1, CALL, "/b", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), False),
    (b"blk /srv/a", commands.OpenPath(1, 77, "/srv/a", os.O_RDWR), False),
    (b"share /srv t ro", commands.StartShare(1, CALL, "/srv", False), False),
    (b"share /srv t ro", commands.StartShare(1, CALL, "/srv", True), True),
    (b"share /srv t", commands.StartShare(1, CALL, "/", False), False),
    (b"net user", commands.StartPasst(1, CALL, ["--pcap", "/etc/x"]), False),
    (b"net user", commands.StartPasst(1, CALL, []), True),
    (b"net tap a0", commands.OpenTap(1, CALL, "a1"), False),
    (b"/srv/s", commands.Listen(1, CALL, "/srv/other", "", 0), False),
    (b"/srv/s", commands.Listen(1, CALL, "/srv/s", "", 0), True),
    (b":1234", commands.Listen(1, CALL, "", "127.0.0.1", 1234), True),
    (b":1234", commands.Listen(1, CALL, "", "0.0.0.0", 1234), False),
    (b":1234", commands.Listen(1, CALL, "", "127.0.0.1", 22), False),
    (b"", commands.Listen(1, CALL, "\0org.freedesktop.x", "", 0), False),
]


@pytest.mark.parametrize("line, question, granted", ASKED)
def test_a_machine_gets_of_another_user_what_that_ones_line_names(line, question, granted):
    """A machine's process is its owner's: what it asks for with another's rights is looked at."""
    opened: list[Any] = []

    async def act(machine: MachineProcess, enemy: socket.socket, enemies: Enemies) -> None:
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                asker = Asker(WHO_ELSE)
                asker.says(line)
                with pytest.raises(VmfsError):
                    await machine.call(lambda at: commands.Write(at, 1, 0, line, 0), asker=asker)

            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            send(enemy, ENCODE(question), [])
            await trio.testing.wait_all_tasks_blocked()
            opened.extend(enemies.opened)
            enemies.kill(enemies.jobs[0])

    against_a_machine(act)
    assert bool(opened) == granted
    assert all(who == WHO_ELSE for who, _ in opened)


# ---- memory


def test_memory_is_opened_only_where_it_is_memory(tmp_path):
    from vmfs.host.theirs import open_memory

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    tmpfs = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600) if os.path.isdir("/dev/shm") else -1
    memory = os.memfd_create("memory")
    others = [
        os.open(fifo, os.O_RDWR),
        os.open("/dev/zero", os.O_RDWR),
        os.open(tmp_path, os.O_RDONLY),
        socket.socket(socket.AF_UNIX).detach(),
        *([tmpfs] if tmpfs >= 0 else []),
    ]
    before = descriptors_there()
    try:
        for fd in (*others, -1, 1 << 40):
            with pytest.raises(VmfsError):
                open_memory(os.getpid(), fd)
        again = open_memory(os.getpid(), memory)
        os.write(memory, b"the same")
        assert os.pread(again, 8, 0) == b"the same"
        os.close(again)
        assert not left_since(before)
    finally:
        for fd in (*others, memory):
            os.close(fd)


# ---- the machine's end


@QUICK
@given(st.lists(st.tuples(packets(commands.ToMachine), st.sampled_from(FDS)), max_size=10))
def test_a_machine_against_a_hostile_server(tmp_path_factory, packed):
    """It ends by the channel's end, and by nothing else."""
    before = descriptors_there()
    folder = str(tmp_path_factory.getbasetemp())
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    failures: list[BaseException] = []

    def live() -> None:
        try:
            trio.run(worker.serve, its, FakeEngine(), lambda name: FakeEngine(), 1 << 20)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=live)
    thread.start()
    with ours:
        ours.settimeout(30)
        ours.send(ENCODE(BECOME))
        assert ours.recv(1 << 16)  # it is born
        ours.setblocking(False)
        for packet, what in packed:
            send(ours, packet, descriptors(what, folder))
            try:
                while ours.recv(1 << 20):
                    pass
            except OSError:
                pass
    thread.join(60)
    assert not thread.is_alive() and not failures, failures
    assert not left_since(before)


@contextlib.contextmanager
def unborn(engine: FakeEngine) -> Iterator[tuple[socket.socket, list[commands.Become]]]:
    """The server's end of a machine's process that is nobody's yet, in a thread, which has to end by itself; and what
    it became."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    became: list[commands.Become] = []

    async def live() -> None:
        await worker.Unborn(its, engine, lambda name: FakeEngine(), 1 << 20).serve(became.append)

    thread = threading.Thread(target=lambda: trio.run(live))
    thread.start()
    with ours:
        ours.settimeout(30)
        yield ours, became
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("makes", [True, False], ids=["made", "failed"])
@pytest.mark.parametrize(
    "first",
    [
        commands.Open(1, "regs", False, False, False, False, 0),
        commands.Interrupt(1),
        commands.Clients(False, True),
        commands.Lane(1),
        None,
    ],
    ids=lambda first: type(first).__name__,
)
def test_a_process_does_nothing_before_it_is_somebodys(first, makes):
    """Its sandbox is not whole until then. What comes first must say whose it is; the channel ends else."""

    class Engine(FakeEngine):
        def create_machine(self) -> Any:
            if not makes:
                raise OSError(errno.EMFILE, "no more")
            return super().create_machine()

    before = descriptors_there()
    with unborn(Engine()) as (ours, became):
        if first is not None:
            send(ours, ENCODE(first), [os.memfd_create("page")])
            assert ours.recv(1 << 16) == b""
    assert not became
    assert not left_since(before)


def test_a_machine_is_somebodys_once():
    with unborn(FakeEngine()) as (ours, became):
        for _ in range(2):
            ours.send(ENCODE(BECOME))
        assert ours.recv(1 << 16)  # it is born
        assert ours.recv(1 << 16) == b""
    assert became == [BECOME]


def test_every_call_has_one_answer():
    """However they are numbered."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(
        target=lambda: trio.run(worker.serve, its, FakeEngine(), lambda name: FakeEngine(), 1 << 20)
    )
    thread.start()
    decode = msgspec.msgpack.Decoder(commands.ToServer).decode
    with ours:
        ours.settimeout(30)
        ours.send(ENCODE(BECOME))
        ours.recv(1 << 16)
        for number in (5, 5, 7, -1):
            ours.send(ENCODE(commands.Open(number, "regs", False, False, False, False, 0)))
            assert decode(ours.recv(1 << 20)).call == number
        ours.send(ENCODE(commands.Read(8, 999, 0, 10, 0)))
        failed = decode(ours.recv(1 << 20))
        assert (failed.call, failed.errno) == (8, errno.ENODEV)
    thread.join(60)
    assert not thread.is_alive()


# ---- death at each message


class Between:
    """Real machines, in threads, and in between somebody who ends one after so many messages of the two."""

    layers: dict[str, str] = {}

    def __init__(self, messages: int) -> None:
        self.left = messages
        self.said = 0
        self.born = False  # it has said so
        self.jobs: list[Job] = []
        self._threads: list[threading.Thread] = []

    def machine(self, engine: str, memory_size: int, *, fresh: bool = False) -> tuple[Job, socket.socket]:
        job = Job(len(self.jobs) + 1)
        job.pid = os.getpid()
        job.forked.set()
        self.jobs.append(job)
        ours, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        far, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        token = trio.lowlevel.current_trio_token()

        def live() -> None:
            trio.run(worker.serve, its, FakeEngine(), lambda name: FakeEngine(), 1 << 20)

        def carry() -> None:
            with near, far:
                while self.left:
                    ready = has_news(near.fileno(), far.fileno(), seconds=3600)
                    source, to = (near, far) if near.fileno() in ready else (far, near)
                    packet, fds, _, _ = socket.recv_fds(source, 1 << 20, 4)
                    if not packet:
                        break
                    self.left -= 1
                    self.said += 1
                    self.born |= source is far
                    socket.send_fds(to, [packet], fds)
                    commands.close_all(fds)
            token.run_sync_soon(self.kill, job)

        for act in (live, carry):
            thread = threading.Thread(target=act)
            thread.start()
            self._threads.append(thread)
        return job, ours

    def kill(self, job: Job) -> None:
        if job.code is None:
            job.code = -9
            job.ended.set()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def conversation(messages: int) -> tuple[Between, list[int | None], str]:
    """What the calls of a small life failed with, where the process is killed after so many messages, and how."""
    between = Between(messages)
    outcome: list[int | None] = []
    state = ""

    async def main() -> None:
        nonlocal state
        machine = Host(between, "fake", MountSettings()).create(B)  # type: ignore[arg-type]
        handle = 1

        async def ask(make: Callable[[int], commands.Message]) -> Any:
            try:
                answer = await machine.call(make)
            except VmfsError as error:
                outcome.append(error.errno)
                return None
            outcome.append(None)
            return answer

        with trio.fail_after(60):
            opened = await ask(lambda at: commands.Open(at, "mode", True, False, False, False, 0))
            handle = opened.handle if opened else handle
            await ask(lambda at: commands.Write(at, handle, 0, b"real\n", 0))
            await ask(lambda at: commands.Flush(at, handle))
            await ask(lambda at: commands.Poll(at, handle, True))
            machine.tell(commands.Close(handle))
            await ask(lambda at: commands.Measure(at, ["mode", "regs"]))
            await ask(lambda at: commands.List(at, "reg"))
            await ask(lambda at: commands.Find(at, "reg/rax"))
            await ask(lambda at: commands.Truncate(at, "initrd", 4096, False))
            async with trio.open_nursery() as nursery:  # three that wait at once
                for _ in range(3):
                    nursery.start_soon(ask, lambda at: commands.Measure(at, ["registers"]))
            state = machine.failure
            await machine.remove()
            assert machine.memory_fd == -1
            assert machine.reserved == 0 or machine.removed
        await trio.to_thread.run_sync(between.join)

    trio.run(main)
    return between, outcome, state


def test_a_process_that_dies_at_any_message_fails_its_calls_and_nothing_else(log):
    whole, outcome, failure = conversation(10_000)
    assert outcome == [None] * 11 and not failure and whole.said > 20
    before = descriptors_there()
    for messages in range(whole.said):
        between, outcome, failure = conversation(messages)
        assert set(outcome) <= {None, errno.EIO}, (messages, outcome)
        first = outcome.index(errno.EIO) if errno.EIO in outcome else len(outcome)
        assert None not in outcome[first : first + 8 - min(first, 8)], (messages, outcome)
        assert between.born == (messages >= 3) or messages == 2  # its first word and our first call cross
        # Else it stays as it was made, and each call tries again.
        has_failed = between.born and first < len(outcome)
        assert ("the last command was" in failure) == has_failed, (messages, failure)
        assert not left_since(before), messages
    assert not log.found, log.found
