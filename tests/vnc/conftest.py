"""A mount whose machines run on the emulator, and a guest that shows, types and points."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine import asm
from mounting import SOON, Machine, Server, reason_against_mounts, wait_until
from PIL import Image

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")

# Types what is typed; Escape sets 640x480x32, F1 text again; what the mouse sends goes out of the serial port.
SECTOR = f"""
    .set LOADED, {0x7C00 - asm.ORIGIN}
    cld
    xor ax, ax
    mov ds, ax
    mov al, 0xa8            # the mouse is on, and says what it does
    out 0x64, al
    call room
    mov al, 0xd4
    out 0x64, al
    call room
    mov al, 0xf4
    out 0x60, al
    mov si, offset hello + LOADED
next: lodsb
    test al, al
    jz keys
    call show
    jmp next
keys: in al, 0x64
    and al, 0x21
    cmp al, 0x21
    jne typed
    in al, 0x60
    mov dx, 0x3f8
    out dx, al
    jmp keys
typed: mov ah, 1
    int 0x16
    jz keys
    xor ah, ah
    int 0x16
    cmp al, 27
    je picture
    cmp ah, 0x3b
    je text
    call show
    jmp keys
text: mov ax, 3
    int 0x10
    jmp keys
picture: mov ax, 0x4f02
    mov bx, 0x4142
    int 0x10
    jmp keys
show: mov ah, 0x0e
    xor bx, bx
    int 0x10
    ret
room: in al, 0x64
    test al, 2
    jnz room
    ret
hello: .asciz "a guest: "
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    if reason := reason_against_mounts():
        pytest.skip(reason)
    one = Server(tmp_path_factory.mktemp("mount"), engine="emulator")
    try:
        yield one
    finally:
        log = one.end()
    assert "Traceback" not in log, log


class Guest(Machine):
    """A PC that runs the sector."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._runner: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._runner = subprocess.Popen(["cat", self.path / "vm_run"], stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._runner is not None:
            self.write("state", "pause\n")
            self._runner.wait()
            self._runner = None

    def shows(self, text: str) -> None:
        wait_until(lambda: text in self.read("screen.txt"), f"{text!r} is on the screen")

    def picture(self) -> Image.Image:
        return Image.open(io.BytesIO((self / "screen.png").read_bytes())).convert("RGB")

    def clients(self) -> int:
        return int(self.read("vnc").rpartition("clients=")[2])


@pytest.fixture
def pc(server) -> Iterator[Machine]:
    """A PC that has not run."""
    one = server.make()
    one.write("machine", "pc\n")
    yield one
    with contextlib.suppress(FileNotFoundError):
        one.path.rmdir()


@pytest.fixture(scope="session")
def booted(server, tmp_path_factory) -> Machine:
    """What the guests are forks of: the sector has said who it is."""
    if not SEABIOS.exists():
        pytest.skip(f"{SEABIOS} is missing: apt-get install seabios")
    if missing := asm.missing_tools():
        pytest.skip(f"no {' and '.join(missing)}: install binutils")
    disk = tmp_path_factory.mktemp("disk") / "disk.img"
    code = asm.assemble(SECTOR, "real").code
    assert len(code) <= 510
    disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 16))
    one = server.make()
    one.write("machine", "pc\n")
    one.write("mem_size", "16M\n")
    one.write("dev/add", f"blk {disk} ro\n")
    (one / "bios").write_bytes(SEABIOS.read_bytes())
    deadline = time.monotonic() + SOON
    while "a guest:" not in one.read("screen.txt"):
        one.write("vm_run", "for 200ms\n")
        assert time.monotonic() < deadline, one.read("screen.txt")
    return one


@pytest.fixture
def make_guest(server, booted) -> Iterator[Callable[[], Guest]]:
    made: list[Guest] = []

    def make() -> Guest:
        name = f"guest{len(made)}-{os.urandom(3).hex()}"
        booted.write("fork", f"{name}\n")
        made.append(Guest(server.path / name))
        return made[-1]

    yield make
    for one in made:
        one.stop()
        with contextlib.suppress(FileNotFoundError):
            one.path.rmdir()


@pytest.fixture
def guest(make_guest) -> Guest:
    """One that runs."""
    one = make_guest()
    one.start()
    return one
