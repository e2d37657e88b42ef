"""The zygote: a process of one thread from which a machine's process, or an opener, is forked in a millisecond or two.

It has imported all that they need, and does nothing but fork, report which processes have ended, and kill. The server
forks it before it has threads or a mount, and holds the other end of its socket. When that ends, so do all of its
children, and it.

`Zygote` is the server's side, on the trio loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import logging
import os
import select
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NoReturn

import msgspec
import trio

from vmfs import engine as engines
from vmfs.host import opener, spare
from vmfs.host.credentials import Credentials
from vmfs.host.sandbox import Sandbox
from vmfs.host.spare import Kind
from vmfs.words.errors import EngineFailed, ProcessFailed

log = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None)
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
# mallopt(3). A table that is as big as that has pages of its own, which are zeros and cost nothing until they are
# touched. Without this glibc, once one was freed, has them among what is used again, and clears them.
_BIG = 32 << 10
_MACHINE = "vmfs-machine"  # the name of a machine's process
_PACKET = 1 << 16
_FDS_MOST = 1
CLOSE_SECONDS = 2.0  # that the end of all may take
IDLE_SECONDS = 0.005  # without an order, until it prepares for those to come
TAKEN_SECONDS = 0.02  # until it hears that spares are machines' now: until then those machines are to have the CPU
SPARES = 3  # kept ready: a machine that is made right after another one is born as quickly
ENDED_MOST = 16
SPARE_SECONDS_MOST = 30.0  # until there is another spare, where they end before anybody has one


class SpawnMachine(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A machine's process, for which there was no spare; its end of the channel goes along. `multiplies`: a
    template."""

    job: int
    engine: str
    memory_size: int
    multiplies: bool = False


class Taken(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The spare `pid`, or the fork of a template, is a machine's now."""

    job: int
    pid: int


class Expect(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Such machines will be made: have a spare for one."""

    engine: str
    memory_size: int


class SpawnOpener(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An opener; the socket for its answer goes along."""

    job: int
    who: Credentials
    work: opener.Work


class Kill(msgspec.Struct, frozen=True, array_like=True, tag=True):
    job: int


class Forked(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`pid` 0: it could not be, with `errno`."""

    job: int
    pid: int
    errno: int


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`code` as os.waitstatus_to_exitcode gives it: below zero a signal."""

    job: int
    code: int


class Layers(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """First: what of the sandbox holds here (Sandbox.layers)."""

    layers: dict[str, str]


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """There is another spare; the server's end of its channel goes along."""

    pid: int
    engine: str
    memory_size: int


ToZygote = SpawnMachine | Taken | Expect | SpawnOpener | Kill
ToServer = Forked | Ended | Layers | Ready

_encode = msgspec.msgpack.Encoder().encode
_decode_orders = msgspec.msgpack.Decoder(ToZygote).decode
_decode_news = msgspec.msgpack.Decoder(ToServer).decode


# ---- the server's side


class Job:
    """A child of the zygote. `ended` is set when it has; `code` is how."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0
        self.errno = 0
        self.code: int | None = None
        self.was_spare = False
        self.forked = trio.Event()
        self.ended = trio.Event()


class Zygote:
    """The server's end. `start` before there are threads; `serve` as a task, from then on the rest."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._socket = sock
        self.pid = pid
        self.layers: dict[str, str] = {}
        self._jobs: dict[int, Job] = {}
        self._next = 1
        self._gone = False
        self._spares: deque[tuple[Ready, socket.socket]] = deque()
        self._taken: list[Taken] = []  # not told yet
        self._tell_at = 0.0

    @classmethod
    def start(cls, rows: tuple[engines.Row, ...]) -> Zygote:
        """Fork it, with the engines that machines may have."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            try:
                _Children(its, rows).serve()
            except BaseException:
                log.exception("the zygote failed")
            finally:
                os._exit(1)
        its.close()
        ours.setblocking(False)
        return cls(ours, pid)

    @property
    def is_gone(self) -> bool:
        return self._gone

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hear what it says. Returns when it is gone: then every job has ended, and none begins."""
        task_status.started()
        try:
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                if not self._take_news():
                    log.error("the process that makes machines is gone")
                    return
        finally:
            self._gone = True
            self._close_spares()
            for job in list(self._jobs.values()):
                self._end(job, -signal.SIGKILL)

    def _take_news(self) -> bool:
        """Hear what it has said, if it has; whether it is there."""
        try:
            packet, fds, _, _ = socket.recv_fds(self._socket, _PACKET, _FDS_MOST, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if packet:
            self._hear(_decode_news(packet), fds)
        return bool(packet)

    def _hear(self, news: ToServer, fds: list[int]) -> None:
        if isinstance(news, Layers):
            self.layers = news.layers
            return
        if isinstance(news, Ready):
            if fds:  # else this process has no room for it; the spare ends
                self._spares.append((news, socket.socket(fileno=fds[0])))
            return
        job = self._jobs.get(news.job)
        if job is None:
            return
        if isinstance(news, Forked):
            job.pid, job.errno = news.pid, news.errno
            job.forked.set()
            if not news.pid:
                self._end(job, 1)
        else:
            self._end(job, news.code)

    def _end(self, job: Job, code: int) -> None:
        self._jobs.pop(job.number, None)
        job.code = code
        job.forked.set()
        job.ended.set()

    def _new_job(self) -> Job:
        if self._gone:
            raise ProcessFailed("the process that makes machines is gone: unmount, and mount anew")
        job = self._jobs[self._next] = Job(self._next)
        self._next += 1
        return job

    def _begin(self, make: Callable[[int], ToZygote], fd: int) -> Job:
        job = self._new_job()
        try:
            self._send(make(job.number), fd)
        except BaseException:
            del self._jobs[job.number]
            raise
        return job

    def _send(self, order: ToZygote, fd: int | None = None) -> None:
        self.tell_taken()
        packet = _encode(order)
        if len(packet) > _PACKET:
            raise EngineFailed(f"an order of {len(packet)} bytes")
        # It reads at once, so that its queue is full for a fork's time only; or it has much to say itself, as where
        # many machines end: then it waits until that is heard.
        while True:
            try:
                if fd is None:
                    self._socket.send(packet, socket.MSG_NOSIGNAL)
                else:
                    socket.send_fds(self._socket, [packet], [fd], socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                waiting = select.poll()  # not select(2), which has room for 1024 descriptors
                waiting.register(self._socket, select.POLLIN | select.POLLOUT)
                waiting.poll(1000)
                self._take_news()
            except OSError as error:
                raise ProcessFailed(f"the process that makes machines does not answer: {error.strerror}") from error

    def machine(self, engine: str, memory_size: int, *, fresh: bool = False) -> tuple[Job, socket.socket]:
        """A process for a machine, and our end of its channel. `fresh`: not a spare. OSError where there is no
        descriptor for it."""
        while self._spares and not fresh:
            ready, channel = self._spares.popleft()
            if (ready.engine, ready.memory_size) == (engine, memory_size):
                return self._take(ready), channel
            channel.close()  # it ends
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            try:
                return self._begin(lambda job: SpawnMachine(job, engine, memory_size), its.fileno()), ours
            except BaseException:
                ours.close()
                raise

    def template(self, engine: str, memory_size: int) -> tuple[Job, socket.socket]:
        """A process for a template, as `machine`."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            try:
                order = lambda job: SpawnMachine(job, engine, memory_size, True)  # noqa: E731
                return self._begin(order, its.fileno()), ours
            except BaseException:
                ours.close()
                raise

    def _take(self, ready: Ready) -> Job:
        job = self.adopt(ready.pid)
        job.was_spare = True
        return job

    def adopt(self, pid: int) -> Job:
        """That process is a machine's now."""
        job = self._new_job()
        job.pid = pid
        job.forked.set()
        self._tell_at = trio.current_time() + TAKEN_SECONDS
        if not self._taken:
            trio.lowlevel.spawn_system_task(self._tell_taken_later)
        self._taken.append(Taken(job.number, pid))
        return job

    async def _tell_taken_later(self) -> None:
        while self._taken and trio.current_time() < self._tell_at:
            await trio.sleep_until(self._tell_at)
        self.tell_taken()

    def tell_taken(self) -> None:
        """At the latest before anything else is said."""
        taken, self._taken = self._taken, []
        with contextlib.suppress(ProcessFailed):  # its listener says so
            for one in taken:
                self._send(one)

    def _close_spares(self) -> None:
        while self._spares:
            self._spares.pop()[1].close()

    def expect(self, engine: str, memory_size: int) -> None:
        """Be ready for such a machine."""
        self._send(Expect(engine, memory_size))

    def opener(self, who: Credentials, work: opener.Work, answer: socket.socket) -> Job:
        return self._begin(lambda job: SpawnOpener(job, who, work), answer.fileno())

    def kill(self, job: Job) -> None:
        """SIGKILL, unless it has ended."""
        if job.code is None and not self._gone:
            with contextlib.suppress(EngineFailed):
                self._send(Kill(job.number))

    def close(self) -> None:
        """End it and all of its children; blocks for that moment."""
        self._gone = True
        self._close_spares()
        self._socket.close()
        end = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(ChildProcessError):
            while not os.waitpid(self.pid, os.WNOHANG)[0] and time.monotonic() < end:
                time.sleep(0.002)


# ---- the zygote's


class _Children:
    """The zygote itself."""

    def __init__(self, sock: socket.socket, rows: tuple[engines.Row, ...]) -> None:
        self._socket = sock
        self._rows = rows
        self._engines: dict[str, engines.Engine] = {}
        self._jobs: dict[int, int] = {}  # pid -> job
        self._pids: dict[int, int] = {}
        self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._listening: dict[str, Credentials] = {}  # paths at which somebody's gdb may listen
        self._expected: Kind | None = None
        self._spares: set[int] = set()  # their processes
        self._ended: dict[int, int] = {}  # how the last ones have of which nobody knew whose they are
        self._spares_failed = 0  # since one was taken
        self._not_before = 0.0  # there is another one
        self._chores = self._warm_up()
        self._is_warm = False

    def serve(self) -> NoReturn:
        _set_name("vmfs-zygote")
        spare.give_own_pages(_BIG)
        os.setsid()  # a ^C at the server's terminal is the server's to hear
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup[1])
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what an opener leaves comes here, and is ended
        _import_all()
        for row in self._rows:
            with contextlib.suppress(Exception):  # `engines` says what is wrong with it
                engine = self._engines[row.name] = row.load()
                engine.prepare()
        self._sandbox = Sandbox()
        gc.collect()
        gc.freeze()  # so that a collection in a child copies no page
        self._tell(Layers(self._sandbox.layers))
        news = select.poll()
        for fd in (self._socket.fileno(), self._wakeup[0]):
            news.register(fd, select.POLLIN)
        while True:
            idle = self._idle_seconds()
            ready = {fd for fd, _ in news.poll(None if idle is None else idle * 1000)}
            if not ready:
                self._prepare()
            if self._wakeup[0] in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakeup[0], 4096)
                self._reap()
            if self._socket.fileno() in ready:
                self._hear()

    def _hear(self) -> None:
        packet, fds = b"", []
        with contextlib.suppress(ConnectionResetError):  # the server has gone, with news unheard
            packet, fds, _, _ = socket.recv_fds(self._socket, _PACKET, _FDS_MOST)
        if not packet:
            self._end_all()
        try:
            self._obey(_decode_orders(packet), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _idle_seconds(self) -> float | None:
        """How long an idle zygote waits before it prepares for the next machine; None: it is prepared."""
        if self._expected is None or len(self._spares) >= SPARES:
            return None
        return max(IDLE_SECONDS, self._not_before - time.monotonic())

    def _prepare(self) -> None:
        """Nothing is to be done now: make the next machine quicker."""
        assert self._expected is not None
        if not self._is_warm:
            self._is_warm = next(self._chores, None) is None
            return
        try:
            self._make_spare(self._expected)
        except OSError:
            self._spare_failed()

    def _make_spare(self, kind: Kind) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, its:
            pid = self._child(self._sandbox.fork, lambda: self._be_machine(its, ours, kind, ahead=True))
            self._spares.add(pid)
            self._tell(Ready(pid, kind.engine, kind.memory_size), ours.fileno())

    def _spare_ended(self, pid: int, code: int) -> None:
        """It had failed, or was a machine already."""
        self._spares.discard(pid)
        self._note_end(pid, code)
        self._spare_failed()

    def _note_end(self, pid: int, code: int) -> None:
        """Of what is a machine already, perhaps: then the server says so soon."""
        self._ended[pid] = code
        if len(self._ended) > ENDED_MOST:
            del self._ended[next(iter(self._ended))]

    def _spare_failed(self) -> None:
        """Wait longer each time: one that always fails is not to keep a CPU busy."""
        self._spares_failed += 1
        wait = min(TAKEN_SECONDS * 2 ** min(self._spares_failed, 20), SPARE_SECONDS_MOST)
        self._not_before = time.monotonic() + wait

    def _warm_up(self) -> Iterator[str]:
        """In steps that delay no order for long."""
        from vmfs.machine import gather, warmup  # here: the server loads this module, too, and needs none of that

        def live() -> None:
            assert self._expected is not None
            warmup.live(self._engine(self._expected.engine), self._engine)

        for chore in ("live", "lay together", *["live"] * warmup.LIVES):
            signal.set_wakeup_fd(-1)  # trio has its own meanwhile
            try:
                if chore == "live":
                    live()
                else:
                    gather.lay_together(gather.executed(live))
                    warmup.wait_for_threads(1)
            except Exception:
                log.debug("%s: it came to nothing", chore, exc_info=True)
                return
            finally:
                signal.set_wakeup_fd(self._wakeup[1])
                self._reap()
            yield chore
        gc.collect()
        gather.fill_holes()
        gc.freeze()
        _LIBC.malloc_trim(0)

    def _tell(self, news: ToServer, *fds: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the next receive sees it
            socket.send_fds(self._socket, [_encode(news)], fds, socket.MSG_NOSIGNAL)

    def _obey(self, order: ToZygote, fds: list[int]) -> None:
        if isinstance(order, Kill):
            if pid := self._pids.get(order.job):
                os.kill(pid, signal.SIGKILL)
            return
        if isinstance(order, Expect):
            self._expected = Kind(order.engine, order.memory_size)
            return
        if isinstance(order, Taken):
            self._taken(order)
            return
        try:
            if isinstance(order, SpawnMachine) and order.multiplies:
                kind = Kind(order.engine, order.memory_size)
                with socket.socket(fileno=fds.pop()) as channel:
                    pid = self._child(
                        self._sandbox.fork_template,
                        lambda: self._be_machine(channel, None, kind, ahead=True, multiplies=True),
                    )
            elif isinstance(order, SpawnMachine):
                kind = Kind(order.engine, order.memory_size)
                if kind != self._expected:
                    self._spares.clear()  # the server has let them go
                    self._expected = kind
                self._not_before = max(self._not_before, time.monotonic() + TAKEN_SECONDS)
                with socket.socket(fileno=fds.pop()) as channel:
                    pid = self._child(self._sandbox.fork, lambda: self._be_machine(channel, None, kind, ahead=False))
            else:
                pid = self._child(os.fork, lambda: self._be_opener(order, fds[0]))
        except OSError as error:
            self._tell(Forked(order.job, 0, error.errno or errno.EAGAIN))
            return
        self._jobs[pid], self._pids[order.job] = order.job, pid
        self._tell(Forked(order.job, pid, 0))
        work = order.work if isinstance(order, SpawnOpener) else None
        if isinstance(work, opener.Listen) and work.path and not work.path.startswith("\0"):
            self._listening[work.path] = order.who
        elif isinstance(work, opener.Unlink):
            self._listening.pop(work.path, None)

    def _taken(self, order: Taken) -> None:
        self._spares_failed, self._not_before = 0, 0.0
        if order.pid in self._spares or order.pid in _children():
            self._spares.discard(order.pid)
            self._jobs[order.pid], self._pids[order.job] = order.job, order.pid
        else:  # it has ended meanwhile
            self._tell(Ended(order.job, self._ended.pop(order.pid, -signal.SIGKILL)))

    def _child(self, fork: Callable[[], int], be: Callable[[], None]) -> int:
        """One that has nothing of the zygote's own."""
        pid = fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                self._socket.close()
                for one in self._wakeup:
                    os.close(one)
                be()
            except BaseException:
                log.exception("a process of a machine did not begin")
            finally:
                os._exit(1)
        return pid

    def _be_machine(
        self,
        channel: socket.socket,
        servers: socket.socket | None,
        kind: Kind,
        *,
        ahead: bool,
        multiplies: bool = False,
    ) -> None:
        _set_name(_MACHINE)
        if servers is not None:
            servers.close()  # the holder of that end says whose it is
        engine = self._engine(kind.engine)
        spare.main(channel, self._sandbox, kind, engine, self._engine, ahead=ahead, multiplies=multiplies)

    def _be_opener(self, order: SpawnOpener, fd: int) -> None:
        _set_name("vmfs-opener")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        opener.run(order.work, order.who, socket.socket(fileno=fd), self._sandbox)

    def _engine(self, name: str) -> engines.Engine:
        """As it was prepared; Invalid names those there are."""
        return self._engines.get(name) or engines.by_name(name, self._rows)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                break
            code = os.waitstatus_to_exitcode(status)
            if pid in self._spares:
                self._spare_ended(pid, code)
            elif pid not in self._jobs:
                self._note_end(pid, code)  # of a template's fork, perhaps
            job = self._jobs.pop(pid, None)
            if job is not None:
                del self._pids[job]
                self._tell(Ended(job, code))
        for pid in _children() - self._jobs.keys() - self._spares - {self._sandbox.keeper}:
            if _name_of(pid) == _MACHINE:
                continue  # a template's fork
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _end_all(self) -> NoReturn:
        """One that the kernel keeps, for a file of its user's that hangs, is left to the kernel."""
        end = time.monotonic() + CLOSE_SECONDS / 2
        while (children := _children()) and time.monotonic() < end:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.002)
        for path, who in self._listening.items():
            with contextlib.suppress(OSError):
                self._child(os.fork, lambda path=path, who=who: opener.unlink_dead(path, who))  # type: ignore[misc]
        while _children() and time.monotonic() < end + CLOSE_SECONDS / 2:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0.002)
        os._exit(0)


def _set_name(name: str) -> None:
    """As ps and top show it."""
    _LIBC.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _name_of(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
        return file.read().strip()
    return ""


def _children() -> set[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(map(int, file.read().split()))


def _import_all() -> None:
    """What machines use, and import when they do: a process in its sandbox opens no file."""
    import capstone
    import PIL.Image
    import PIL.PngImagePlugin
    import zstandard  # noqa: F401

    import vmfs.boot
    import vmfs.devices.virtio.ninep
    import vmfs.host.share_server
    import vmfs.machine.booting
    import vmfs.machine.files.monitor
    import vmfs.machine.gdb.server
    import vmfs.machine.warmup
    import vmfs.machine.worker  # noqa: F401
    from vmfs.devices import screen
    from vmfs.devices.network import roms
    from vmfs.machine.vnc import des

    capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)  # loads its library
    PIL.Image.init()
    tempfile.gettempdir()  # where the overlays of disks are, found out once
    screen.vga_bios()
    roms.warm_up()
    des.is_there()
