"""Debian's ata_piix on the IDE controller: disks by DMA, with a file system that the host then checks."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from pc.conftest import BOOT_SECONDS
from pc.kernels import needs_kernels
from pc.test_virtio_linux import MIB, _e2, booted, counters, ext4, info  # noqa: F401

pytestmark = needs_kernels
MODULES = ("ata_piix", "sd_mod", "ext4")
# Linux looks at both channels at the same time, and either's disk may be sda
NAMES = "a=/dev/$(ls /sys/bus/scsi/devices/0:0:0:0/block)\nb=/dev/$(ls /sys/bus/scsi/devices/1:0:1:0/block)\n"


def test_disks(make_pc, ext4: Path, tmp_path: Path) -> None:  # noqa: F811
    content = os.urandom(2 * MIB)
    raw = tmp_path / "raw.img"
    raw.write_bytes(content)
    pc = make_pc()
    pc.write("dev/add", f"ide {ext4} rw\n")
    pc.write("dev/add", f"ide {raw} cow as=hdd\n")
    booted(
        pc,
        {
            "fill": f"{NAMES}mount $a /mnt\ndd if=$b of=/mnt/copy bs=64k 2>/dev/null\nsync\nmd5sum </mnt/copy",
            "scribble": f"{NAMES}dd if=/dev/zero of=$b bs=4k seek=3 count=5 conv=notrunc 2>/dev/null\nsync",
            "look": f"{NAMES}echo 3 >/proc/sys/vm/drop_caches\nmd5sum <$b",
        },
        modules=MODULES,
    )
    said = pc.shell("dmesg | grep -e ata -e sda")
    assert "scsi host0: ata_piix" in said and "ATA-6: vmfs disk" in said
    for device in ("dev1.0", "dev2.1"):
        assert pc.shell(f"cat /sys/class/ata_device/{device}/xfer_mode") == "XFER_MW_DMA_2\n"
    assert "exception" not in said and "failed" not in said
    assert pc.shell("fill").split()[0] == hashlib.md5(content).hexdigest()
    pc.shell("scribble")
    scribbled = content[: 3 * 4096] + bytes(5 * 4096) + content[8 * 4096 :]
    assert pc.shell("look").split()[0] == hashlib.md5(scribbled).hexdigest()
    assert raw.read_bytes() == content
    pc.shell("umount /mnt")
    assert counters(pc, "hda")["write_bytes"] >= 2 * MIB and counters(pc, "hda")["flushes"] > 0
    assert info(pc, "hdd")["mode"] == "cow" and info(pc, "ide")["drives"] == "hda hdd"
    assert _e2("e2fsck", "-fn", ext4) == 0
    assert "exception" not in pc.shell("dmesg | grep -e ata -e sda")


needs_xorriso = pytest.mark.skipif(shutil.which("xorriso") is None, reason="xorriso is not there: package xorriso")


def make_iso(path: Path, files: dict[str, bytes]) -> Path:
    tree = path.with_suffix(".d")
    tree.mkdir()
    for name, data in files.items():
        (tree / name).write_bytes(data)
    subprocess.run(
        ["xorriso", "-as", "mkisofs", "-quiet", "-R", "-V", path.stem.upper(), "-o", path, tree],
        check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return path


@needs_xorriso
def test_a_cd_and_another(make_pc, tmp_path: Path) -> None:
    """sr_mod mounts it; it is changed from outside while it is not mounted, and the guest ejects it."""
    content = os.urandom(3 * MIB + 5)
    first = make_iso(tmp_path / "first.iso", {"data": content})
    second = make_iso(tmp_path / "second.iso", {"data": b"second"})
    pc = make_pc()
    pc.write("dev/add", f"cdrom {first}\n")
    booted(
        pc,
        {"look": "mount -t iso9660 -o ro /dev/sr0 /mnt\nmd5sum </mnt/data\n[ $# = 0 ] || exit 0\numount /mnt"},
        modules=("ata_piix", "sr_mod", "isofs"),
    )
    said = pc.shell("dmesg | grep -e ata2 -e sr0 -e 'CD-ROM'")
    assert "vmfs CD-ROM" in said and "Attached scsi CD-ROM sr0" in said or "sr 1:0:0:0" in said
    assert pc.shell("look").split()[0] == hashlib.md5(content).hexdigest()
    pc.write("dev/hdc/media", str(second))
    assert pc.shell("look stays").split()[0] == hashlib.md5(b"second").hexdigest()
    with pytest.raises(OSError):  # a mounted disc is locked
        pc.write("dev/hdc/media", "eject")
    assert "the guest holds its medium" in pc.read("error")
    pc.shell("echo 1 >/proc/sys/dev/cdrom/autoeject; umount /mnt; echo 0 >/proc/sys/dev/cdrom/autoeject")
    deadline = time.monotonic() + BOOT_SECONDS
    while info(pc, "hdc")["tray"] != "open":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pc.write("dev/hdc/media", str(first))
    assert pc.shell("look").split()[0] == hashlib.md5(content).hexdigest()
    assert counters(pc, "hdc")["read_bytes"] > 2 * 3 * MIB
