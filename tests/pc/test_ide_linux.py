"""Debian's ata_piix on the IDE controller: disks by DMA, with a file system that the host then checks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pc.kernels import needs_kernels
from pc.test_virtio_linux import MIB, _e2, booted, counters, ext4, info  # noqa: F401

pytestmark = needs_kernels
MODULES = ("ata_piix", "sd_mod", "ext4")


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
            "fill": "mount /dev/sda /mnt\ndd if=/dev/sdb of=/mnt/copy bs=64k 2>/dev/null\nsync\nmd5sum </mnt/copy",
            "scribble": "dd if=/dev/zero of=/dev/sdb bs=4k seek=3 count=5 conv=notrunc 2>/dev/null\nsync",
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
    pc.shell("echo 3 >/proc/sys/vm/drop_caches")
    scribbled = content[: 3 * 4096] + bytes(5 * 4096) + content[8 * 4096 :]
    assert pc.shell("md5sum </dev/sdb").split()[0] == hashlib.md5(scribbled).hexdigest()
    assert raw.read_bytes() == content
    pc.shell("umount /mnt")
    assert counters(pc, "hda")["write_bytes"] >= 2 * MIB and counters(pc, "hda")["flushes"] > 0
    assert info(pc, "hdd")["mode"] == "cow" and info(pc, "ide")["drives"] == "hda hdd"
    assert _e2("e2fsck", "-fn", ext4) == 0
    assert "exception" not in pc.shell("dmesg | grep -e ata -e sda")
