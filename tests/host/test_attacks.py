"""What one user of a mount does to another's machines, and to the host: nothing.

The server is root's, with --allow-other. A and B are ordinary users; B attacks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host.conftest import shared
from host.guests import SEABIOS, boot_disk, writes_sector
from host.users import A, B, Child, children, may_signal, pid_of, status, threads, word_of
from mounting import SOON, Machine, Server, failing, for_plain_processes, serving, wait_until

from vmfs.host.credentials import limit_capabilities

PROMPT = 5.0  # seconds that a call of A's may take on a busy host, whatever B's do


def regs(vm: Machine) -> int:
    """What A reads all the time: the length of `regs`."""
    return len((vm / "regs").read_bytes())


def works(vm: Machine) -> None:
    """A's machine answers, promptly."""
    began = time.monotonic()
    assert A.does(regs, vm, seconds=PROMPT) == 144
    assert time.monotonic() - began < PROMPT


@pytest.fixture
def machines(server) -> Iterator[tuple[Machine, Machine]]:
    """A's, and B's."""
    mine, theirs = A.makes(server.path / "mine"), B.makes(server.path / "theirs")
    works(mine)
    yield mine, theirs
    for vm in (mine, theirs):
        with contextlib.suppress(FileNotFoundError):
            vm.path.rmdir()


# ---- processes


def test_what_b_may_signal_is_of_its_machine(server, machines, folder):
    mine, theirs = machines
    B.does(theirs.write, "machine", "pc")
    os.chown(folder, B.uid, B.uid)
    B.does(theirs.write, "dev/add", f"share {folder} tag")
    tree = [server.server.pid, *children(server.server.pid)]
    for pid in tree:
        real, effective, *_ = status(pid)["Uid"].split()
        assert real == effective, "a process bears another's real uid: who may signal it, and what it may differ"
    everything = [thread for pid in tree for thread in threads(pid)]
    its = B.does(may_signal, everything)
    assert pid_of(theirs) in its
    assert not set(its) & set(threads(server.server.pid)) and not set(its) & set(threads(pid_of(mine)))
    for pid in set(its):
        assert status(pid)["Uid"].split()[0] == str(B.uid)


STOPS: dict[str, Callable[[int], object]] = {
    "stop": lambda pid: os.kill(pid, signal.SIGSTOP),
    "prlimit": lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0)),
    "kill": lambda pid: os.kill(pid, signal.SIGKILL),
}


@pytest.mark.parametrize("how", STOPS)
def test_what_b_does_to_its_processes_is_not_as_bad(server, machines, folder, how):
    mine, theirs = machines
    B.does(theirs.write, "machine", "pc")
    os.chown(folder, B.uid, B.uid)
    B.does(theirs.write, "dev/add", f"share {folder} tag")
    tree = [server.server.pid, *children(server.server.pid)]

    def attack() -> int:
        mine = [pid for pid in may_signal(tree) if pid != os.getpid()]
        for pid in mine:
            with contextlib.suppress(PermissionError, ProcessLookupError):
                STOPS[how](pid)
        return len(mine)

    assert B.does(attack) >= 2  # the machine, and the share
    works(mine)
    if how == "stop":
        reader = B.begins(regs, theirs)
        time.sleep(0.2)
        works(mine)
        reader.kill()  # within the time that the machine has to answer an interrupt
    elif how == "kill":
        wait_until(lambda: B.does(theirs.read, "state") == "failed\n", "its machine has failed")
    again = A.makes(server.path / "again")
    works(again)
    again.path.rmdir()
    began = time.monotonic()
    B.does(theirs.path.rmdir)
    assert time.monotonic() - began < PROMPT
    works(mine)


# ---- files that hang

HANGING = """
import errno, os, stat, sys
import pyfuse3, trio

class Hanging(pyfuse3.Operations):
    '''One file, which is never closed to its end.'''
    def entry(self, inode):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_nlink, entry.st_size = inode, 1, 1 << 20
        entry.st_mode = stat.S_IFDIR | 0o777 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o666
        entry.attr_timeout = entry.entry_timeout = 300
        return entry
    async def getattr(self, inode, ctx=None):
        return self.entry(inode)
    async def lookup(self, parent, name, ctx=None):
        if name != b"disk":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.entry(2)
    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode)
    async def read(self, fh, offset, size):
        if "reads" in sys.argv:
            print("hangs", flush=True)
            await trio.sleep_forever()
        return bytes(size)
    async def flush(self, fh):
        print("hangs", flush=True)
        await trio.sleep_forever()
    async def release(self, fh):
        await trio.sleep_forever()

options = {*pyfuse3.default_options, "allow_other", "fsname=hanging"}
pyfuse3.init(Hanging(), sys.argv[1], options)
print("ready", flush=True)
trio.run(pyfuse3.main)
"""


@pytest.fixture
def hanging(folder, request) -> Iterator[tuple[Path, Callable[[], str]]]:
    """A file whose last close never returns, nor, with parameter `reads`, a read; and what waits until one hangs."""
    where = folder / "hanging"
    where.mkdir()
    command = [sys.executable, "-c", HANGING, where, getattr(request, "param", "closes")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield where / "disk", process.stdout.readline
        subprocess.run(["umount", "-f", where], stderr=subprocess.DEVNULL, check=False)  # wakes what hangs
        process.kill()
    subprocess.run(["fusermount3", "-uz", where], stderr=subprocess.DEVNULL, check=False)


def attach_hanging(theirs: Machine, disk: Path) -> None:
    B.does(theirs.write, "machine", "pc")
    B.does(theirs.write, "dev/add", f"blk {disk} ro")


WAYS: dict[str, Callable[[Machine], object]] = {
    "detached": lambda vm: (vm / "dev" / "blk0").rmdir(),
    "machine": lambda vm: vm.write("machine", "bare"),
    "removed": lambda vm: vm.path.rmdir(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_close_that_hangs_delays_its_machine_only(server, machines, hanging, way):
    mine, theirs = machines
    disk, hangs = hanging
    attach_hanging(theirs, disk)
    attacker = B.begins(WAYS[way], theirs)
    assert hangs() == "hangs\n"
    for _ in range(3):
        works(mine)
    attacker.kill()
    if theirs.path.exists():
        B.does(theirs.path.rmdir, seconds=PROMPT)
    works(mine)


@pytest.mark.skipif(not SEABIOS.exists(), reason=f"{SEABIOS} is not there: Debian's package seabios")
@pytest.mark.parametrize("hanging", ["reads"], indirect=True)
def test_a_read_that_hangs_delays_its_machine_only(server, machines, hanging):
    """SeaBIOS asks for the first sector of a disk that never gives it. The machine's maker waits no longer than for any
    other that does not end, and nobody else waits."""
    mine, theirs = machines
    disk, hangs = hanging
    B.does(theirs.write, "machine", "pc")
    B.does(theirs.write, "mem_size", "16M")
    B.does((theirs / "bios").write_bytes, SEABIOS.read_bytes())
    B.does(theirs.write, "dev/add", f"blk {disk} ro format=raw")
    run = B.begins(theirs.read, "vm_run")
    assert hangs() == "hangs\n"
    works(mine)
    assert B.does(theirs.read, "state") == "running\n"  # only the disk waits
    B.does(theirs.path.rmdir, seconds=2 * PROMPT)
    works(mine)
    run.kill()


@pytest.mark.parametrize("hanging", ["reads"], indirect=True)
def test_a_file_that_does_not_say_what_it_is_delays_its_machine_only(server, machines, hanging):
    """`dev/add` reads the first bytes of an image, to tell its format, and they never come."""
    mine, theirs = machines
    disk, hangs = hanging
    B.does(theirs.write, "machine", "pc")
    attacker = B.begins(theirs.write, "dev/add", f"blk {disk} ro")
    assert hangs() == "hangs\n"
    for _ in range(3):
        works(mine)
    attacker.kill()
    B.does(theirs.path.rmdir, seconds=2 * PROMPT)
    works(mine)


def test_a_close_that_hangs_does_not_keep_the_server(own_server, hanging):
    server = own_server()
    disk, hangs = hanging
    theirs = B.makes(server.path / "theirs")
    attach_hanging(theirs, disk)
    attacker = B.begins(WAYS["detached"], theirs)
    assert hangs() == "hangs\n"
    began = time.monotonic()
    server.server.terminate()
    server.server.wait(SOON)
    assert time.monotonic() - began < 3 * PROMPT
    attacker.kill()
    assert not server.is_mounted()


# ---- passt


@pytest.fixture
def fifo(folder) -> Path:
    """Nobody reads it, so an opener that wants to write waits."""
    path = folder / "fifo"
    os.mkfifo(path)
    os.chown(path, B.uid, B.uid)
    path.chmod(0o666)
    return path


CROWD = 12


@pytest.mark.skipif(not any(os.access(f"{path}/passt", os.X_OK) for path in ("/usr/bin", "/usr/local/bin")),
                    reason="passt is not installed")
def test_machines_whose_passt_hangs_hold_up_nobody(server, machines, fifo, folder):
    mine, _ = machines
    A.does(mine.write, "machine", "pc")
    crowd = [Machine(server.path / f"crowd{number}") for number in range(CROWD)]

    def make() -> None:
        for vm in crowd:
            vm.path.mkdir()
            vm.write("machine", "pc")

    B.does(make)
    writers = [B.begins(vm.write, "dev/add", f"net user --pcap {fifo}") for vm in crowd]
    wait_until(lambda: sum(word_of(pid, "Name").startswith("passt")
                           for pid in children(server.server.pid)) >= CROWD, "they hang")

    def use() -> None:
        regs(mine)
        mine.read("screen.txt")
        mine.read("disasm")
        mine.write("dev/add", "rng")
        mine.write("gdb", "127.0.0.1:0")
        mine.write("gdb", "off")

    began = time.monotonic()
    A.does(use)
    assert time.monotonic() - began < 2 * PROMPT
    began = time.monotonic()
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
    for writer in writers:
        writer.kill()
    assert time.monotonic() - began < 2 * PROMPT
    B.does(lambda: [vm.path.rmdir() for vm in crowd])
    wait_until(lambda: not any(word_of(pid, "Name").startswith("passt")
                               for pid in children(server.server.pid)), "their passts are gone")


# ---- calls that wait

MOST = 30


def test_b_cannot_use_up_the_calls_that_may_wait(own_server):
    server = own_server(max_waiting_user=MOST)
    mine, theirs = A.makes(server.path / "mine"), B.makes(server.path / "theirs")
    B.does(theirs.write, "machine", "pc")

    def attack() -> list[int]:
        """errno of each read, 0 while it waits."""
        fd = os.open(theirs / "console", os.O_RDONLY)
        answers = [0] * (MOST + 20)

        def read(at: int) -> None:
            try:
                os.pread(fd, 1, 0)
            except OSError as error:
                answers[at] = error.errno

        for at in range(len(answers)):
            threading.Thread(target=read, args=(at,), daemon=True).start()
        end = time.monotonic() + PROMPT
        while sum(map(bool, answers)) < 20 and time.monotonic() < end:
            time.sleep(0.01)
        print(answers)
        return answers

    def attack_and_wait(tell: int) -> None:
        os.write(tell, bytes(attack()))
        time.sleep(SOON)

    told, tell = os.pipe()
    attacker = B.begins(attack_and_wait, tell)
    answers = list(os.read(told, 1000))
    assert answers.count(0) == MOST and set(answers) == {0, errno.EAGAIN}
    works(mine)
    spin = A.begins(lambda: mine.load("40 ebfd").run())
    wait_until(lambda: A.does(mine.read, "state") == "running\n", "it runs")
    began = time.monotonic()
    spin.kill()  # whose interrupt is read
    attacker.kill()
    assert time.monotonic() - began < PROMPT
    wait_until(lambda: A.does(mine.read, "state") == "paused\n", "it was stopped")
    B.does(regs, theirs)
    os.close(told)
    os.close(tell)


def test_stats_that_wait_count_and_hold_up_nobody_else(own_server):
    """Each looks at a machine that its user has stopped: it is told the size that there was, in a second."""
    server = own_server(max_waiting_user=MOST)
    mine = A.makes(server.path / "mine")
    stopped, other = (B.makes(server.path / name) for name in ("stopped", "other"))

    def error(vm: Machine) -> int:
        """errno of what B reads of it."""
        try:
            fd = os.open(vm / "registers", os.O_RDONLY)
            os.read(fd, 10)
        except OSError as error:
            return error.errno
        return 0

    assert B.does(error, stopped) == B.does(error, other) == 0
    size = B.does(os.stat, stopped / "registers").st_size
    pid = B.does(pid_of, stopped)
    B.does(os.kill, pid, signal.SIGSTOP)

    def attack(tell: int) -> None:
        def look() -> None:
            while os.stat(stopped / "registers").st_size == size:
                pass
            os.write(tell, b"another size")

        for _ in range(MOST + 20):
            threading.Thread(target=look, daemon=True).start()
        time.sleep(SOON)

    told, tell = os.pipe()
    attacker = B.begins(attack, tell)

    wait_until(lambda: B.does(error, other) == errno.EAGAIN, "as many wait as may")
    works(mine)
    assert A.does(os.stat, mine / "registers").st_size > 0
    began = time.monotonic()
    attacker.kill()
    assert time.monotonic() - began < PROMPT
    wait_until(lambda: B.does(error, other) == 0, "none waits")
    os.kill(pid, signal.SIGCONT)
    assert B.does(error, stopped) == 0
    os.close(tell)
    assert os.read(told, 100) == b""
    os.close(told)


# ---- guests that never stop


def test_busy_machines_hold_up_no_idle_one(server, machines):
    """What is read of an idle machine wakes nothing but the server, and that has little to do."""
    mine, _ = machines
    crowd = [Machine(server.path / f"busy{number}") for number in range(8)]

    def make() -> None:
        for vm in crowd:
            vm.path.mkdir()
            vm.load("ebfe")
            vm.write("state", "run")

    def look() -> list[float]:
        seconds = []
        for _ in range(50):
            began = time.monotonic()
            assert regs(mine) == 144
            seconds.append(time.monotonic() - began)
        return sorted(seconds)

    B.does(make, seconds=2 * SOON)
    seconds = A.does(look)
    assert seconds[25] < 0.1 and seconds[-1] < 1, seconds
    assert B.does(crowd[-1].read, "state") == "running\n"
    B.does(lambda: [vm.path.rmdir() for vm in crowd])


# ---- rights


def drop_capabilities() -> None:
    limit_capabilities(0)


@pytest.mark.parametrize("where", ["here", "chroot"])
def test_root_without_its_capabilities_opens_no_more_than_it_could(server, folder, where):
    secret = folder / "secret"
    secret.write_bytes(bytes(4096))
    os.chown(secret, A.uid, A.uid)
    secret.chmod(0o600)
    vm = server.make()
    vm.write("machine", "pc")
    root = vm.path.parent.parent

    def prepare() -> None:
        if where == "chroot":
            os.chroot(root)
        drop_capabilities()

    add = vm / "dev" / "add"
    path = f"/{add.relative_to(root)}" if where == "chroot" else str(add)

    def attack() -> None:
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, f"blk {secret} ro".encode())

    with pytest.raises(PermissionError):
        Child(0, attack, prepare).result()
    assert "Permission denied" in vm.read("error") or "another root directory" in vm.read("error")
    assert os.listdir(vm / "dev").count("blk0") == 0
    vm.path.rmdir()


@pytest.mark.skipif(not SEABIOS.exists(), reason=f"{SEABIOS} is not there: Debian's package seabios")
def test_a_disk_that_is_written_loses_set_user_id(server, machines, folder):
    """As with write(2) by B: what runs with root's rights has no content of B's."""
    _, theirs = machines
    disk = folder / "disk"
    disk.write_bytes(writes_sector(b"B's").ljust(4096, b"\0"))
    os.chown(disk, 0, B.uid)
    disk.chmod(0o4775)
    assert B.does(boot_disk, theirs, disk).startswith("shutdown cause=debug-exit")
    assert disk.read_bytes()[512:515] == b"B's"
    assert stat.S_IMODE(disk.stat().st_mode) == 0o775


# ---- what is seen


def test_a_machines_inside_is_its_makers(server, machines):
    mine, _ = machines

    def look() -> list[str]:
        seen = []
        for folder, _, names in os.walk(mine.path):
            for name in names:
                for flags in (os.O_RDONLY, os.O_WRONLY):
                    with contextlib.suppress(PermissionError):
                        os.close(os.open(f"{folder}/{name}", flags | os.O_NONBLOCK))
                        seen.append(name)
        return seen

    assert B.does(look) == []
    A.does((mine / "regs").chmod, 0o644)
    assert B.does(look) == ["regs"] * 2  # in its directory and in cpu0/
    assert failing(B.does, mine.write, "vm_run", "2") == errno.EACCES


# ---- what is kept for a machine counts

MIB = 1 << 20


def keep_image(name: str) -> Callable[[Machine, int], object]:
    return lambda vm, size: write_at(vm / name, size)


def write_at(path: Path, size: int) -> None:
    """A file of that size, a MiB at a time."""
    fd = os.open(path, os.O_WRONLY)
    try:
        for at in range(0, size, MIB):
            os.pwrite(fd, bytes(MIB), at)
    finally:
        with contextlib.suppress(OSError):  # it is no System.map
            os.close(fd)


def cut(vm: Machine, size: int) -> None:
    os.truncate(vm / "initrd", size)


def trace(vm: Machine, size: int) -> None:
    vm.write("trace", f"buffer {size}\ninsn on\n")


KEPT: dict[str, Callable[[Machine, int], object]] = {
    "kernel": keep_image("kernel"),
    "initrd": keep_image("initrd"),
    "bios": keep_image("bios"),
    "truncate": cut,
    "symbols": keep_image("symbols"),
    "trace": trace,
    "mem_size": lambda vm, size: vm.write("mem_size", f"{128 * MIB + size}"),
}


@pytest.fixture(scope="module")
def limited(tmp_path_factory, for_everybody) -> Iterator[Server]:
    with serving(tmp_path_factory, **for_everybody, max_memory_user=150 * MIB) as one:
        yield shared(one)


@for_plain_processes
@pytest.mark.parametrize("name", KEPT)
def test_what_a_machine_keeps_counts(limited, name):
    vm = B.makes(limited.path / "one")
    B.does(KEPT[name], vm, 4 * MIB)
    before = held(limited, vm)
    assert failing(B.does, KEPT[name], vm, 100 * MIB) == errno.ENOSPC
    assert held(limited, vm) - before < 40 * MIB
    assert "--max-mem-user" in vm.read("error")
    assert len((vm / "regs").read_bytes()) == 144
    B.does(vm.path.rmdir)
    other = B.makes(limited.path / "another")  # all of it is free again
    assert B.does(regs, other) == 144
    B.does(other.path.rmdir)


def held(server: Server, vm: Machine) -> int:
    """Bytes of memory that the server and the machine have: their own, and files without a name. (What the host has,
    other tests change, too.)"""
    own, files = 0, {}
    for pid in (server.server.pid, pid_of(vm)):
        own += int((word_of(pid, "RssAnon") or "0 kB").split()[0]) << 10
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(path := f"/proc/{pid}/fd/{name}").startswith("/memfd:"):
                        facts = os.stat(path)
                        files[facts.st_ino] = facts.st_blocks * 512
    return own + sum(files.values())


@for_plain_processes
def test_what_is_given_back_counts_no_more(own_server):
    server = own_server(max_memory=150 * MIB)
    vm = B.makes(server.path / "one")
    for _ in range(3):
        B.does(write_at, vm / "kernel", 15 * MIB)
        assert failing(B.does, write_at, vm / "initrd", 15 * MIB) == errno.ENOSPC
        for name in ("kernel", "initrd"):
            B.does(os.truncate, vm / name, 0)
        B.does(write_at, vm / "initrd", 15 * MIB)
        B.does(os.truncate, vm / "initrd", 0)


@for_plain_processes
def test_a_users_limits_are_a_users(own_server):
    server = own_server(max_vms_user=2, max_memory_user=300 * MIB)
    for number in range(2):
        B.makes(server.path / f"b{number}")
    assert failing(B.makes, server.path / "b2") == errno.ENOSPC
    A.makes(server.path / "a0")
    assert failing(B.does, Machine(server.path / "b0").write, "mem_size", "256M") == errno.ENOSPC
    A.does(Machine(server.path / "a0").write, "mem_size", "256M")
    B.does((server.path / "b1").rmdir)
    B.makes(server.path / "b2")


# ---- page tables that name themselves

def test_page_tables_that_name_themselves_are_bounded(server, machines):
    mine, theirs = machines
    B.does(endless_tables, theirs)
    reader = B.begins(theirs.read, "pagetable")
    for _ in range(3):
        works(mine)
    text = reader.result()
    assert len(text.splitlines()) < 200_000
    assert text.splitlines()[-1].startswith("#") and "more than" in text.splitlines()[-1]


def endless_tables(vm: Machine) -> None:
    """Long mode, with tables that name themselves."""
    table = 0x10000
    vm.write("mode", "long")
    with open(vm / "mem", "r+b", buffering=0) as file:
        file.seek(table)
        file.write(b"".join((table | 3).to_bytes(8, "little") for _ in range(512)))
    vm.write("registers", f"cr3 {table:#x}\n")


def read_all(vm: Machine) -> None:
    fd = os.open(vm / "pagetable", os.O_RDONLY)
    os.read(fd, 1 << 20)


@for_plain_processes
@pytest.mark.parametrize("what", ["read", "stat"])
def test_work_ends_with_who_wanted_it(server, machines, what):
    """The machine's process does not go on for a caller that was killed."""
    _, theirs = machines
    B.does(endless_tables, theirs)
    pid = pid_of(theirs)
    before = cpu_time(pid)
    B.does(os.stat, theirs.path / "pagetable")  # a read's open measures, and goes on for a second at most
    whole = cpu_time(pid) - before
    if whole < 20:
        pytest.skip(f"the host is too fast: {whole} ticks of work cannot be ended in the middle")
    before = cpu_time(pid)
    killed = B.begins(read_all if what == "read" else stat_again, theirs)
    wait_until(lambda: cpu_time(pid) - before >= 3, "it is at work")
    before = cpu_time(pid)
    killed.kill()
    wait_until(lambda: rests(pid), "it has ended")
    assert cpu_time(pid) - before < whole // 2, f"{whole} ticks are what it takes to its end"


def stat_again(machine: Machine) -> None:
    while True:
        machine.write("registers", "rax 1\n")  # what was measured before does not count
        os.stat(machine.path / "pagetable")


def rests(pid: int) -> bool:
    before = cpu_time(pid)
    time.sleep(0.3)
    return cpu_time(pid) - before <= 1


def cpu_time(pid: int) -> int:
    """In ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
