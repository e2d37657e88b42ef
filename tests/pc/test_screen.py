"""What firmware, memory testers, boot loaders and Linux show, by `screen.txt`; what is typed reaches them."""

from __future__ import annotations

import io
import mmap
import os
import re
import time
from pathlib import Path

import pytest
from engine import asm
from pc.conftest import BOOT_SECONDS, boot_linux
from pc.kernels import IPXE, MEMTEST, needs_kernels
from PIL import Image

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
needs_seabios = pytest.mark.skipif(not SEABIOS.exists(), reason=f"{SEABIOS} is missing: apt-get install seabios")

# Says who it is; types back what it reads; with Escape sets a mode of 640x480x32 and ends the run.
SECTOR = f"""
    .set LOADED, {0x7C00 - asm.ORIGIN}
    cld
    xor ax, ax
    mov ds, ax
    mov si, offset hello + LOADED
next: lodsb
    test al, al
    jz keys
    mov ah, 0x0e
    xor bx, bx
    int 0x10
    jmp next
keys: xor ah, ah
    int 0x16
    cmp al, 27
    je picture
    mov ah, 0x0e
    xor bx, bx
    int 0x10
    jmp keys
picture: mov ax, 0x4f02
    mov bx, 0x4142
    int 0x10
    mov dx, 0xf4
    out dx, al
stop: jmp stop
hello: .asciz "a sector of the disk: "
"""


def run_until(pc, pattern):
    """Run it in slices until the screen matches; returns the screen."""
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        pc.write("vm_run", "for 100ms")
        text = pc.read("screen.txt")
        if re.search(pattern, text):
            return text
        line = pc.read("exit")
        assert line.startswith("limit"), f"{line}\n{text}"
        assert time.monotonic() < deadline, f"{pattern!r} did not come:\n{text}"


def picture(pc):
    image = Image.open(io.BytesIO((pc.path / "screen.png").read_bytes()))
    image.load()
    return image.convert("RGB")


@needs_seabios
def test_seabios_and_a_sector_of_a_virtio_disk(make_pc, tmp_path):
    if missing := asm.missing_tools():
        pytest.skip(f"no {' and '.join(missing)}: install binutils")
    code = asm.assemble(SECTOR, "real").code
    assert len(code) <= 510
    disk = tmp_path / "disk.img"
    disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    pc = make_pc()
    pc.write("dev/add", f"blk {disk} ro")
    pc.load("bios", SEABIOS)
    text = run_until(pc, "a sector of the disk:")
    assert text.startswith("SeaBIOS (version ") and "Booting from Hard Disk..." in text
    image = picture(pc)
    assert image.size == (720, 400)
    assert image.getcolors() is not None and {colour for _, colour in image.getcolors()} == {(0, 0, 0), (170, 170, 170)}

    typed = "It reads, more than 15 keys: {~}"
    pc.write("keyboard", f'"{typed}"')
    run_until(pc, re.escape(f"a sector of the disk: {typed}"))

    assert (pc.path / "dev/display/info").read_text().splitlines()[-1] == "mode text 80x25"
    pc.write("keyboard", "esc")
    pc.write("vm_run", "run")
    assert pc.read("exit").startswith("shutdown cause=debug-exit")
    assert pc.read("screen.txt") == "graphics 640x480x32\n"
    assert "framebuffer start=0 pitch=2560 bits=32\n" in (pc.path / "dev/display/info").read_text()
    with open(pc.path / "framebuffer", "r+b") as file:
        assert os.fstat(file.fileno()).st_size == 64 << 20
        os.pwrite(file.fileno(), b"\x03\x02\x01\xff", 2560 * 3 + 4 * 5)
        if pc.stat()["memory_served_by"] == "passthrough":
            with mmap.mmap(file.fileno(), 1 << 20) as memory:
                assert memory[2560 * 3 + 20 : 2560 * 3 + 24] == b"\x03\x02\x01\xff"
                memory[0:4] = b"\xff\xff\xff\xff"
        else:
            os.pwrite(file.fileno(), b"\xff\xff\xff\xff", 0)
        with pytest.raises(OSError, match="File too large"):
            os.pwrite(file.fileno(), b"x", 64 << 20)
    image = picture(pc)
    assert image.size == (640, 480)
    assert [image.getpixel(at) for at in ((5, 3), (0, 0), (6, 3))] == [(1, 2, 3), (255, 255, 255), (0, 0, 0)]


@needs_seabios
@needs_kernels
def test_ipxe_takes_commands(make_pc):
    pc = make_pc()
    pc.load("bios", SEABIOS)
    pc.load("kernel", IPXE)
    pc.write("cmdline", "shell")
    text = run_until(pc, r"\niPXE> ?\n")
    assert "Open Source Network Boot Firmware" in text
    pc.write("keyboard", '"echo Hello, {{{}}}!\\n"')
    run_until(pc, r"\nHello, \{\{\{\}\}\}!\n")


@needs_kernels
def test_memtest_begins(make_pc):
    pc = make_pc()
    pc.write("mem_size", "32M")
    pc.load("kernel", MEMTEST)
    text = run_until(pc, r"Test #\d +\[.+\]")
    assert re.match(r" +Memtest86\+ v\d", text) and "│ Testing: " in text
    pc.write("keyboard", "f1")
    run_until(pc, "Settings:")


@needs_kernels
def test_linux_has_its_console_there(make_pc):
    """The kernel's own text console, its keyboard driver, and ctrl-alt-del."""
    script = 'cat /proc/bus/input/devices > /dev/ttyS0; while read line; do echo "got <$line>"; done\n'
    pc = boot_linux(make_pc(), script, cmdline="console=tty0")
    pc.expect(r'Name="AT Translated Set 2 keyboard"')
    run = pc._runner
    deadline = time.monotonic() + BOOT_SECONDS
    pc.write("keyboard", '"Hello, World! | ~\\n"')
    while "got <Hello, World! | ~>" not in (text := pc.read("screen.txt")):
        assert run.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.05)  # nobody tells when a screen changes
    pc.write("keyboard", "ctrl-alt-del")
    assert pc.ended().startswith("shutdown cause=reset")
