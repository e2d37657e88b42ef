"""Real mounts for tests that are clients of one: `mount` is a directory, `server` and `vm` know more."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmfs.engine import ENGINES, Row
from vmfs.errors import VmfsError

SOON = 60.0
"""Seconds after which something has not happened: far more than it takes on a busy machine."""

SERVER = """
import json, logging, os, sys
from vmfs.fs import serve
from vmfs.engine import ENGINES, Row
from vmfs.settings import MountSettings
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


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Return when it holds; fails when it does not hold soon."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, f"never happened: {what or condition}"
        time.sleep(0.005)


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


class Server:
    """A mount and its server."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.path = directory
        self.log = directory.with_suffix(".log")
        self._names = (f"vm{number}" for number in itertools.count())
        environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
        environment.update(settings.pop("environment", {}))  # type: ignore[call-overload]
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, directory, json.dumps(settings), self.log],
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.server.stdout
        told = self.server.stdout.fileno()
        ready = select.select([told], [], [], SOON)[0] and os.read(told, 5)
        assert ready == b"ready", f"the mount failed: {self.log.read_text()}"
        self.device = os.stat(directory).st_dev

    def make(self) -> Machine:
        path = self.path / next(self._names)
        path.mkdir()
        return Machine(path)

    def abort(self) -> None:
        connection = Path(f"/sys/fs/fuse/connections/{os.minor(self.device)}/abort")
        if connection.exists():
            connection.write_text("1")

    def is_mounted(self) -> bool:
        return f" {self.path} " in Path("/proc/self/mounts").read_text()

    def end(self) -> str:
        """Unmount; the log."""
        try:
            if self.server.poll() is None:
                self.server.send_signal(signal.SIGTERM)
                try:
                    self.server.wait(SOON)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(OSError):
                        self.abort()
                    self.server.kill()
                    self.server.wait()
                    raise
        finally:
            if self.is_mounted():
                subprocess.run(["fusermount3", "-uz", self.path], check=True)
        return self.log.read_text()


def reason_against(engine: Row) -> str | None:
    """Why there can be no mount with that engine here, or None."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is not accessible"
    if not shutil.which("fusermount3"):
        return "fusermount3 is not installed"
    try:
        availability = engine.load().probe()
    except VmfsError as error:
        return str(error)
    return None if availability.available else f"{engine.name}: {availability.reason}"


@pytest.fixture(scope="session", params=ENGINES, ids=lambda engine: engine.name)
def mount(request, tmp_path_factory):
    """The directory of a mount, one for each engine; behind all tests, its log shows no traceback."""
    reason = reason_against(request.param)
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("mount")
    log = tmp_path_factory.mktemp("log") / "log"
    vmfs = [sys.executable, "-m", "vmfs.cli"]
    subprocess.run([*vmfs, "mount", "--engine", request.param.name, "--log", log, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run([*vmfs, "umount", directory], check=True)
    assert "Traceback" not in log.read_text()


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


@pytest.fixture(scope="session", params=ENGINES, ids=lambda engine: engine.name)
def server(request, tmp_path_factory) -> Iterator[Server]:
    """A mount that tests share, one for each engine: they make machines of their own."""
    reason = reason_against(request.param)
    if reason:
        pytest.skip(reason)
    with serving(tmp_path_factory, engine=request.param.name) as one:
        yield one


@pytest.fixture(scope="session")
def any_engine() -> None:
    reasons = [reason_against(engine) for engine in ENGINES]
    if all(reasons):
        pytest.skip("; ".join(map(str, reasons)))


@pytest.fixture(scope="session", params=["passthrough", "page-cache"])
def either_server(request, tmp_path_factory, any_engine) -> Iterator[Server]:
    """A mount for each way to serve `mem`."""
    environment = {} if request.param == "passthrough" else {"VMFS_NO_PASSTHROUGH": "1"}
    with serving(tmp_path_factory, environment=environment) as one:
        probe = one.make()
        way = dict(line.split() for line in probe.read("stat").splitlines())["memory_served_by"]
        probe.path.rmdir()
        if way != request.param:
            pytest.skip(f"this kernel, or this user's rights, give {way}")
        yield one


@pytest.fixture
def own_server(tmp_path_factory, any_engine) -> Iterator[Callable[..., Server]]:
    """A function that mounts with some settings, for tests that end the server or need limits."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(tmp_path_factory, **settings))


def _machine(server: Server) -> Iterator[Machine]:
    one = server.make()
    yield one
    with contextlib.suppress(FileNotFoundError):
        one.path.rmdir()


@pytest.fixture
def vm(server) -> Iterator[Machine]:
    yield from _machine(server)


@pytest.fixture
def either_vm(either_server) -> Iterator[Machine]:
    yield from _machine(either_server)
