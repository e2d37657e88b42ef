"""SeaBIOS boots CD-ROMs of the IDE controller: GRUB, ISOLINUX, memtest86+; and hybrid images as disks."""

from __future__ import annotations

from pathlib import Path

import pytest
from pc.kernels import CLOUD, MEMTEST_ISO, needs_kernels
from pc.media import GRUB, ISOLINUX, SEABIOS, grub_iso, isolinux_iso, needs
from pc.test_firmware import wait_for

pytestmark = needs(SEABIOS)
needs_grub = needs("grub-mkrescue", "xorriso", "mformat", GRUB)
needs_isolinux = needs("xorriso", ISOLINUX)
GREETING = "serial 0 115200\ndefault a\nprompt 0\nlabel a\n"


def boot(make_pc, line: str, mem: str = "64M"):
    pc = make_pc()
    pc.write("mem_size", mem)
    pc.load("bios", SEABIOS)
    pc.write("dev/add", line)
    pc.start()
    return pc


@needs_grub
@pytest.mark.parametrize("line", ["cdrom {}", "ide {} ro", "ahci-cdrom {}"])
def test_a_rescue_iso_of_grub(make_pc, tmp_path: Path, line: str) -> None:
    """To its prompt, where it reads the CD; as a hard disk, too."""
    image = grub_iso(tmp_path / "grub.iso", files={"word": b"the word of the CD"})
    pc = boot(make_pc, line.format(image))
    pc.expect("grub> ")
    pc.type("cat /word\r")
    pc.expect("the word of the CD")
    pc.type("reboot\r")
    assert pc.ended().startswith("shutdown cause=reset")


@needs_isolinux
@needs_kernels
@pytest.mark.parametrize("hybrid", [False, True])
def test_isolinux_and_linux(make_pc, tmp_path: Path, hybrid: bool) -> None:
    """It loads a kernel; a hybrid image as a disk, too."""
    config = f"{GREETING}kernel /vmlinuz\nappend console=ttyS0 panic=-1\n"
    image = isolinux_iso(tmp_path / "linux.iso", config, {"vmlinuz": CLOUD.image}, hybrid=hybrid)
    pc = boot(make_pc, f"ide {image} ro" if hybrid else f"cdrom {image}", "256M")
    pc.expect("ISOLINUX 6")
    pc.expect("Linux version")
    assert pc.ended().startswith("shutdown cause=reset")  # it finds no root, and panics


@needs_kernels
def test_memtest_iso(make_pc) -> None:
    pc = boot(make_pc, f"cdrom {MEMTEST_ISO}")
    lines = wait_for(pc, "Testing: ")
    assert lines[0].split()[:2] == ["Memtest86+", "v6.10"]
