"""What is no Linux and is started as one: memtest86+ directly, iPXE through SeaBIOS, to their screens."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from pc.conftest import BOOT_SECONDS
from pc.kernels import IPXE, MEMTEST, needs_kernels

pytestmark = needs_kernels
SEABIOS = Path("/usr/share/seabios/bios.bin")
TEXT, COLUMNS, LINES = 0xB8000, 80, 25


def screen(pc) -> list[str]:
    """The lines of the text screen, as they are in memory: a character and its attributes each."""
    fd = os.open(pc.path / "mem", os.O_RDONLY)
    try:
        cells = os.pread(fd, COLUMNS * LINES * 2, TEXT)
    finally:
        os.close(fd)
    text = cells[::2].decode("cp437")
    return [text[at : at + COLUMNS].rstrip() for at in range(0, len(text), COLUMNS)]


def wait_for(pc, text: str) -> list[str]:
    """Until the screen has `text`; there is no event to wait for."""
    deadline = time.monotonic() + BOOT_SECONDS
    while text not in "\n".join(lines := screen(pc)):
        assert time.monotonic() < deadline, "\n".join(lines)
        time.sleep(0.2)
    return lines


def test_memtest(make_pc):
    pc = make_pc()
    pc.write("mem_size", "64M")
    pc.load("kernel", MEMTEST)
    pc.start()
    lines = wait_for(pc, "Testing: ")
    assert lines[0].split()[:2] == ["Memtest86+", "v6.10"]
    assert any(re.search(r"^Memory +: +64MB", line) for line in lines)
    assert any("Errors: 0" in line for line in lines)


def test_a_kernel_that_needs_a_bios_says_so(make_pc):
    pc = make_pc()
    pc.load("kernel", IPXE)
    with pytest.raises(OSError) as caught:
        pc.read("vm_run")
    assert caught.value.errno == 22
    assert "needs a BIOS" in pc.read("error") and pc.read("state") == "paused\n"


@pytest.mark.skipif(not SEABIOS.exists(), reason=f"{SEABIOS} is not there: Debian's package seabios")
def test_ipxe(make_pc):
    """Its command line is a script; the initrd of iPXE is a script, too, and would be run after it."""
    pc = make_pc()
    pc.load("kernel", IPXE)
    pc.load("bios", SEABIOS)
    pc.write("cmdline", "echo hello from ${builtin/platform} && shell")
    pc.start()
    lines = wait_for(pc, "iPXE>")
    assert "hello from pcbios" in lines
    assert any(line.startswith("iPXE 1.") for line in lines)
    assert lines[0].startswith("SeaBIOS")
