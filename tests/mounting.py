"""What tests on a real mount share: a served mount, a machine as a shell sees it, and callers that block."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import pwd
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmfs.commands import doctor
from vmfs.engine import Row
from vmfs.host import mounts
from vmfs.words.errors import VmfsError

SOON = 60.0
"""Seconds after which something has not happened: far more than it takes on a busy machine."""

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
for_plain_processes = pytest.mark.skipif(SANITIZED, reason="`make asan`: what a process takes is the sanitizers'")
"""Tests of limits of a machine's process, and of what it costs: shadow memory alone is 15 TiB."""

SERVER = """
import ctypes, json, logging, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a test run that dies leaves no mount
from vmfs.fs import serve
from vmfs.engine import ENGINES, Row
from vmfs.host.settings import MountSettings
logging.basicConfig(filename=sys.argv[3], level=logging.INFO)
asked = json.loads(sys.argv[2])
fake = asked.pop("fake", False)
rows = (Row("fake", "fs.fake_engine", "FakeEngine"),) if fake else ENGINES
if fake:
    import vmfs.engine
    vmfs.engine.measure_speed = lambda engine: 1.0
asked["fuse_options"] = tuple(asked.get("fuse_options", ()))
serve(sys.argv[1], MountSettings(**asked), lambda: os.write(1, b"ready"), rows)
"""


def reason_against_mounts() -> str | None:
    """Why nothing can be mounted here, or None."""
    checks = (*doctor.dev_fuse(), *doctor.fusermount())
    missing = [f"{each.name} {each.meaning}" for each in checks if each.status == doctor.MISSING]
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        missing.append(f"the user {os.getuid()} has no name, which fusermount3 asks for")
    return "; ".join(missing) or None


def reason_against(engine: Row) -> str | None:
    """Why there can be no mount with that engine here, or None."""
    reason = reason_against_mounts()
    if reason:
        return reason
    try:
        availability = engine.load().probe()
    except VmfsError as error:
        return str(error)
    return None if availability.available else f"{engine.name}: {availability.reason}"


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Return when it holds; fails when it does not hold soon."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, f"never happened: {what or condition}"
        time.sleep(0.005)


def spares(server: int) -> list[int]:
    """The processes of that server that are nobody's yet: their sandbox is complete but for the last filter."""
    found = []
    for zygote in Path(f"/proc/{server}/task/{server}/children").read_text().split():
        for pid in Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                if "Name:\tvmfs-machine" in lines and "Seccomp_filters:\t1" in lines:
                    found.append(int(pid))
    return found


class Machine:
    """A machine's directory, as a shell sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def read(self, name: str) -> str:
        return (self.path / name).read_text()

    def write(self, name: str, text: str | bytes) -> None:
        """One write(2)."""
        fd = os.open(self.path / name, os.O_WRONLY)
        try:
            data = text.encode() if isinstance(text, str) else text
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)

    def load(self, code: str, at: int = 0x1000) -> Machine:
        """16-bit `code` (hexadecimal), to be run from `at` on, with all bases 0."""
        fd = os.open(self.path / "mem", os.O_RDWR)
        os.pwrite(fd, bytes.fromhex(code), at)
        os.close(fd)
        self.write("registers", f"rip {at:#x}\ncs 0\ncs.base 0\n")
        return self

    def run(self) -> str:
        return self.read("vm_run")

    def is_running(self) -> bool:
        return self.read("state") == "running\n"


def has_news(*fds: int, seconds: float) -> list[int]:
    """Those of them that can be read, or have ended, within that time. By poll: a process may have many descriptors."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(seconds * 1000)]


class Server:
    """A mount and its server."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.path = directory
        self.log = directory.with_suffix(".log")
        self._names = (f"vm{number}" for number in itertools.count())
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]  # `make asan` sets it
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
        environment.update(settings.pop("environment", {}))  # type: ignore[call-overload]
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, directory, json.dumps(settings), self.log],
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.server.stdout
        told = self.server.stdout.fileno()
        ready = has_news(told, seconds=SOON) and os.read(told, 5)
        assert ready == b"ready", f"the mount failed: {self.log.read_text()}"

    def make(self) -> Machine:
        path = self.path / next(self._names)
        path.mkdir()
        return Machine(path)

    def abort(self) -> None:
        """Have the kernel give the mount up. (/sys/fs/fuse/connections is not mounted everywhere.)"""
        subprocess.run(["umount", "-f", self.path], stderr=subprocess.DEVNULL, check=False)

    def is_mounted(self) -> bool:
        return mounts.at(self.path) is not None

    def end(self) -> str:
        """Unmount; the log."""
        try:
            if self.server.poll() is None:
                self.server.send_signal(signal.SIGTERM)
                try:
                    self.server.wait(SOON)
                except subprocess.TimeoutExpired:
                    self.abort()
                    self.server.kill()
                    self.server.wait()
                    raise
        finally:
            if self.is_mounted():
                subprocess.run(["fusermount3", "-uz", self.path], check=True)
        return self.log.read_text()


@contextlib.contextmanager
def serving(factory: pytest.TempPathFactory, **settings: object) -> Iterator[Server]:
    """A mount of its own. The settings are those of MountSettings, and `fake`: on tests/fs/fake_engine.py."""
    directory = factory.mktemp("mount") / "m"
    directory.mkdir()
    server = Server(directory, **settings)
    try:
        yield server
    finally:
        log = server.end()
    assert "Traceback" not in log, log


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.pread.restype = LIBC.pwrite.restype = ctypes.c_ssize_t


def failing(call: Callable[..., object], *arguments: object) -> int:
    """The errno of a call, which must fail."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno is not None
    return caught.value.errno


class Blocked:
    """A system call in a thread of its own. Not by Python's os, which calls again after EINTR."""

    def __init__(self, call: Callable[[], tuple[int, bytes]]) -> None:
        self.result: tuple[int, int, bytes] | None = None  # what it returned, errno, the bytes
        self._call = call
        self.thread = threading.Thread(target=self._go, daemon=True)
        self.thread.start()

    def _go(self) -> None:
        ctypes.set_errno(0)
        returned, data = self._call()
        self.result = returned, ctypes.get_errno(), data

    def signal(self) -> None:
        signal.pthread_kill(self.thread.ident, signal.SIGUSR1)

    def end(self) -> tuple[int, int, bytes]:
        self.thread.join(SOON)
        assert self.result is not None, "it blocks still"
        return self.result


def blocked_read(fd: int) -> Blocked:
    def call() -> tuple[int, bytes]:
        buffer = ctypes.create_string_buffer(1000)
        size = LIBC.pread(fd, buffer, 1000, ctypes.c_long(0))
        return size, buffer.raw[: max(size, 0)]

    return Blocked(call)


def blocked_write(fd: int, data: bytes) -> Blocked:
    return Blocked(lambda: (LIBC.pwrite(fd, data, len(data), ctypes.c_long(0)), b""))


def running(vm: Machine) -> None:
    wait_until(vm.is_running, "it runs")


def number(vm: Machine, at: int = 0x5000) -> int:
    """4 bytes of RAM."""
    with open(vm / "mem", "rb") as ram:
        ram.seek(at)
        return int.from_bytes(ram.read(4), "little")


def put(vm: Machine, at: int, data: bytes) -> None:
    """Store in RAM."""
    fd = os.open(vm / "mem", os.O_WRONLY)
    assert os.pwrite(fd, data, at) == len(data)
    os.close(fd)


def stat(vm: Machine) -> dict[str, str]:
    """The file `stat`, by name."""
    return dict(line.split(maxsplit=1) for line in vm.read("stat").splitlines())
