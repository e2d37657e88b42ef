"""A mount on the emulator, and machines that boot on it. What a test types and expects goes through `console`."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import Server, has_news, reason_against_mounts
from pc.initramfs import SHELL, build
from pc.kernels import CLOUD

BOOT_SECONDS = 200  # a boot takes some 5 seconds; a machine that does other things, too, must not fail


class Pc:
    """A machine with a user at its console. `said` is all that the guest has sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():  # else it is a copy of another one
            path.mkdir()
            self.write("machine", "pc")
        self.console = os.open(path / "console", os.O_RDWR | os.O_NONBLOCK)
        self.said = ""
        self.seen = 0
        self._runner: subprocess.Popen[str] | None = None

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def read(self, name: str) -> str:
        return (self.path / name).read_text()

    def load(self, name: str, data: bytes | Path) -> None:
        (self.path / name).write_bytes(data.read_bytes() if isinstance(data, Path) else data)

    def start(self) -> None:
        """`cat vm_run &`"""
        assert self._runner is None
        self._runner = subprocess.Popen(["cat", self.path / "vm_run"], stdout=subprocess.PIPE, text=True)

    def ended(self) -> str:
        """The line of the run, when it has ended."""
        assert self._runner is not None
        line, _ = self._runner.communicate(timeout=BOOT_SECONDS)
        self._runner = None
        return line.strip()

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait until the guest sends what matches, after what was expected before."""
        deadline = time.monotonic() + BOOT_SECONDS
        while (match := re.compile(pattern).search(self.said, self.seen)) is None:
            ready = has_news(self.console, seconds=max(deadline - time.monotonic(), 0))
            assert ready, f"{pattern!r} did not come:\n{self.said[-2000:]}"
            data = os.read(self.console, 65536)
            assert data, f"it was shut down before {pattern!r}:\n{self.said[-2000:]}"
            self.said += data.decode(errors="replace")
        self.seen = match.end()
        return match

    def type(self, text: str) -> None:
        os.set_blocking(self.console, True)
        try:
            assert os.write(self.console, text.encode()) == len(text.encode())
        finally:
            os.set_blocking(self.console, False)

    def shell(self, command: str) -> str:
        """What a command in the guest's shell prints. The prompt has to be there, and is there afterwards."""
        self.type(f"{command}; echo status=$?\n")
        self.expect(r"echo status=\$\?\r\n")
        begin = self.seen
        match = self.expect(r"status=(\d+)\r\n")
        output = self.said[begin : match.start()].replace("\r\n", "\n")
        assert match[1] == "0", f"{command}: status {match[1]}\n{output}"
        self.expect("guest# ")
        return output

    def stat(self) -> dict[str, str]:
        return dict(line.split(" ", 1) for line in self.read("stat").splitlines())

    def rest(self) -> None:
        """Read to the end of the file, which has to come: `said` has all then."""
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            ready = has_news(self.console, seconds=max(deadline - time.monotonic(), 0))
            assert ready, f"the console has no end:\n{self.said[-2000:]}"
            data = os.read(self.console, 65536)
            if not data:
                return
            self.said += data.decode(errors="replace")

    def die(self, server: Server) -> None:
        """Its server is killed; `said` has all that came before."""
        assert self._runner is not None
        server.server.kill()
        server.server.wait()
        with pytest.raises(OSError) as gone:
            self.rest()
        assert gone.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        os.close(self.console)
        self._runner.communicate()

    def remove(self) -> None:
        os.close(self.console)
        if self._runner is not None:
            self.write("state", "pause")
            self.ended()
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()


@pytest.fixture(scope="session")
def pc_mount(tmp_path_factory) -> Iterator[Path]:
    """A mount whose machines run on the emulator; after all tests its log shows no traceback."""
    reason = reason_against_mounts()
    if reason:
        pytest.skip(reason)
    server = Server(tmp_path_factory.mktemp("mount"), engine="emulator")
    try:
        yield server.path
    finally:
        log = server.end()
    assert "Traceback" not in log, log


@pytest.fixture
def other_mount(pc_mount, tmp_path_factory) -> Iterator[Server]:
    """A mount of its own, whose server may be killed."""
    server = Server(tmp_path_factory.mktemp("mount"), engine="emulator")
    yield server
    server.end()


@pytest.fixture
def make_pc(pc_mount) -> Iterator[Callable[[], Pc]]:
    """Machines that end with the test."""
    made: list[Pc] = []

    def make() -> Pc:
        made.append(Pc(pc_mount / f"pc{len(made)}-{os.getpid()}"))
        return made[-1]

    yield make
    for one in made:
        one.remove()


def boot_linux(pc: Pc, script: str = SHELL, *, cmdline: str = "", mem: str = "256M", **options) -> Pc:
    """Start Debian's cloud kernel with a busybox; options as those of initramfs.build."""
    pc.write("mem_size", mem)
    pc.load("kernel", options.get("kernel", CLOUD).image)
    pc.load("initrd", build(script, **options))
    pc.write("cmdline", f"console=ttyS0 quiet {cmdline}")
    pc.start()
    return pc


@pytest.fixture
def linux(make_pc) -> Callable[..., Pc]:
    """Boots one more machine to a shell's prompt."""

    def boot(**options) -> Pc:
        pc = boot_linux(make_pc(), **options)
        pc.expect("guest# ")
        return pc

    return boot
