"""Mounts for tests: served by a child, and gone at the end whatever happens."""

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


class Mount:
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
        ready = select.select([self.server.stdout], [], [], SOON)[0] and os.read(self.server.stdout.fileno(), 5)
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


@pytest.fixture(scope="session")
def have_fuse() -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse is not accessible")
    if not shutil.which("fusermount3"):
        pytest.skip("fusermount3 is not installed")


@pytest.fixture(scope="session")
def have_engine() -> None:
    from vmfs.engine import describe

    infos = describe()
    if not any(info.available for info in infos):
        pytest.skip("; ".join(f"{info.name}: {info.reason}" for info in infos))


@contextlib.contextmanager
def mounted(factory: pytest.TempPathFactory, **settings: object) -> Iterator[Mount]:
    directory = factory.mktemp("mount") / "m"
    directory.mkdir()
    mount = Mount(directory, **settings)
    try:
        yield mount
    finally:
        log = mount.end()
    assert "Traceback" not in log, log


@pytest.fixture(scope="session", params=["passthrough", "page-cache"])
def any_mount(request, tmp_path_factory, have_fuse, have_engine) -> Iterator[Mount]:
    """Both ways to serve `mem`; for tests that `mem` matters to."""
    environment = {} if request.param == "passthrough" else {"VMFS_NO_PASSTHROUGH": "1"}
    with mounted(tmp_path_factory, environment=environment) as one:
        probe = one.make()
        way = dict(line.split() for line in probe.read("stat").splitlines())["memory_served_by"]
        probe.path.rmdir()
        if way != request.param:
            pytest.skip(f"this kernel, or this user's rights, give {way}")
        yield one


@pytest.fixture(scope="session")
def mount(tmp_path_factory, have_fuse, have_engine) -> Iterator[Mount]:
    """A mount that tests share: they make machines of their own."""
    with mounted(tmp_path_factory) as one:
        yield one


@pytest.fixture
def own_mount(tmp_path_factory, have_fuse, have_engine) -> Iterator[Callable[..., Mount]]:
    """A function that mounts with some settings, for tests that end the server or need limits."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(mounted(tmp_path_factory, **settings))


@pytest.fixture
def vm(mount) -> Iterator[Machine]:
    one = mount.make()
    yield one
    with contextlib.suppress(FileNotFoundError):
        one.path.rmdir()


@pytest.fixture
def any_vm(any_mount) -> Iterator[Machine]:
    one = any_mount.make()
    yield one
    with contextlib.suppress(FileNotFoundError):
        one.path.rmdir()
