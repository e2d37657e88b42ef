"""Floppies: SeaBIOS boots SYSLINUX and GRUB of them; Debian's driver reads and writes them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from pc.kernels import GENERIC, IPXE, needs_kernels
from pc.media import GRUB, MODULES, SEABIOS, grub_floppy, needs, syslinux_floppy
from pc.test_boot_cd import boot
from pc.test_firmware import wait_for
from pc.test_virtio_linux import booted, info


@needs(SEABIOS, "grub-mkimage", GRUB)
def test_grub_of_a_floppy(make_pc, tmp_path: Path) -> None:
    """To its prompt; then it reads the disk again, which was changed for another meanwhile."""
    image = grub_floppy(tmp_path / "grub.img")
    other = tmp_path / "other.img"
    other.write_bytes(b"the other disk.." * (1440 << 6))
    pc = boot(make_pc, f"floppy {image} ro")
    pc.expect("grub> ")
    pc.write("dev/fd0/media", f"{other} ro")
    pc.type("hexdump (fd0)+1 -n 16\r")
    pc.expect(r"\|the other disk\.\.\|")
    pc.type("halt\r")
    assert pc.ended().startswith("shutdown cause=poweroff")


@needs(SEABIOS, "syslinux", "mformat", MODULES)
@needs_kernels
def test_syslinux_of_a_floppy(make_pc, tmp_path: Path) -> None:
    """It loads iPXE from a FAT file system."""
    config = "serial 0 115200\ndefault a\nlabel a\nkernel ipxe.lkr\n"
    image = syslinux_floppy(tmp_path / "syslinux.img", config, {"ipxe.lkr": IPXE})
    pc = boot(make_pc, f"floppy {image} cow")
    pc.expect("SYSLINUX 6")
    assert any(line.startswith("iPXE 1.") for line in wait_for(pc, "iPXE 1."))


@needs_kernels
@pytest.mark.parametrize("size", [1440, 2880])
def test_linux_reads_and_writes(make_pc, tmp_path: Path, size: int) -> None:
    content = os.urandom(size << 10)
    image = tmp_path / "data.img"
    image.write_bytes(content)
    pc = make_pc()
    pc.write("dev/add", f"floppy {image}")
    booted(
        pc,
        {"scribble": "head -c 9216 /dev/zero | tr '\\0' 'w' | dd of=/dev/fd0 bs=9216 seek=7 conv=notrunc 2>/dev/null"},
        modules=("floppy",),
        kernel=GENERIC,
    )
    said = pc.shell("dmesg | grep -i -e floppy -e FDC")
    assert "FDC 0 is a post-1991 82077" in said and ("2.88M AMI BIOS" if size == 2880 else "1.44M") in said, said
    assert pc.shell("md5sum </dev/fd0").split()[0] == hashlib.md5(content).hexdigest()
    pc.shell("scribble; sync")
    assert image.read_bytes() == content[: 7 * 9216] + b"w" * 9216 + content[8 * 9216 :]
    assert info(pc, "fd0")["mode"] == "rw"
    assert "error" not in pc.shell("dmesg | grep -i -e floppy -e fd0")
