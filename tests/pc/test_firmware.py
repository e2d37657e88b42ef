"""What is no Linux and is started as one: memtest86+ directly, iPXE through SeaBIOS, to their screens."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from pc.conftest import BOOT_SECONDS
from pc.kernels import IPXE, MEMTEST, needs_kernels

pytestmark = needs_kernels
SEABIOS = Path("/usr/share/seabios/bios.bin")


def wait_for(pc, text: str) -> list[str]:
    """Until the screen has `text`; there is no event to wait for."""
    deadline = time.monotonic() + BOOT_SECONDS
    while text not in (shown := pc.read("screen.txt")):
        assert time.monotonic() < deadline, shown
        time.sleep(0.2)
    return shown.splitlines()


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
    """With a script in the place of the initrd, which is what it looks for there."""
    pc = make_pc()
    pc.load("kernel", IPXE)
    pc.load("bios", SEABIOS)
    pc.load("initrd", b"#!ipxe\necho from the initrd, on ${builtin/platform}\nshell\n")
    pc.start()
    lines = wait_for(pc, "iPXE>")
    assert any("from the initrd, on pcbios" in line for line in lines), lines
    assert any(line.startswith("iPXE 1.") for line in lines)
    assert lines[0].startswith("SeaBIOS")


@pytest.mark.skipif(not SEABIOS.exists(), reason=f"{SEABIOS} is not there: Debian's package seabios")
def test_apm_powers_off(make_pc, tmp_path):
    """APM 1.2, by int 15h from a boot sector: connect (5301h), Set Power State (5307h) of all devices to off. SeaBIOS
    writes sleep type 0 to the port that the PCI function of power management names."""
    code = bytes.fromhex(
        "b80153 31db cd15"  # mov ax, 5301h; xor bx, bx; int 15h
        "b80753 bb0100 b90300 cd15"  # mov ax, 5307h; mov bx, 1; mov cx, 3; int 15h
        "b0ee e6f4 ebfe"  # it came back: debug-exit
    )
    image = tmp_path / "disk.img"
    image.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(2 << 20))
    pc = make_pc()
    pc.load("bios", SEABIOS)
    pc.write("dev/add", f"blk {image} ro\n")
    pc.start()
    assert pc.ended().startswith("shutdown cause=poweroff rip=0x")
