"""Debian's ahci driver: a disk and a CD at ports of the AHCI controller."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pc.kernels import GENERIC, needs_kernels
from pc.test_ide_linux import make_iso, needs_xorriso
from pc.test_virtio_linux import MIB, _e2, booted, counters, ext4, info  # noqa: F401

pytestmark = [needs_kernels, needs_xorriso]


def test_a_disk_and_a_cd(make_pc, ext4: Path, tmp_path: Path) -> None:  # noqa: F811
    content = os.urandom(2 * MIB + 5)
    iso = make_iso(tmp_path / "first.iso", {"data": content})
    other = make_iso(tmp_path / "second.iso", {"data": b"second"})
    pc = make_pc()
    pc.write("dev/add", f"ahci {ext4} rw\n")
    pc.write("dev/add", f"ahci-cdrom {iso}\n")
    spoiled = tmp_path / "spoiled"
    spoiled.write_bytes(content[: MIB * 2])
    pc.write("dev/add", f"ahci {spoiled} ro\n")
    booted(
        pc,
        {
            "fill": "a=/dev/$(ls /sys/bus/scsi/devices/0:0:0:0/block)\n"
            "mount -t iso9660 -o ro /dev/sr0 /cd\nmount $a /mnt\ncp /cd/data /mnt/copy\numount /cd\n"
            "sync\necho 3 >/proc/sys/vm/drop_caches\nmd5sum </mnt/copy\numount /mnt",
            "reads": "b=/dev/$(ls /sys/bus/scsi/devices/2:0:0:0/block)\n"
            "dd if=$b bs=64k count=1 iflag=direct 2>/dev/null | md5sum\ndd if=$b bs=64k skip=24 count=1 iflag=direct",
            "look": "mount -t iso9660 -o ro /dev/sr0 /cd\nmd5sum </cd/data\numount /cd",
        },
        modules=("ahci", "sd_mod", "sr_mod", "crc32c_generic", "ext4", "isofs"),
        kernel=GENERIC,
    )
    said = pc.shell("mkdir -p /cd; dmesg | grep -e ata -e ahci -e sda -e sr0")
    assert "AHCI 0001.0301 32 slots 6 ports 6 Gbps 0x3f impl SATA mode" in said, said
    assert "ata1.00: ATA-6: vmfs disk" in said and "ata2.00: ATAPI: vmfs CD-ROM" in said, said
    assert "exception" not in said and "failed" not in said
    assert pc.shell("grep -c -e 'MSI.*ahci' /proc/interrupts") == "1\n"
    assert pc.shell("fill").split()[0] == hashlib.md5(content).hexdigest()
    pc.write("dev/sata1/media", str(other))
    assert pc.shell("look").split()[0] == hashlib.md5(b"second").hexdigest()
    assert counters(pc, "sata0")["write_bytes"] >= 2 * MIB and counters(pc, "sata0")["flushes"] > 0
    assert info(pc, "ahci")["drives"] == "sata0 sata1 sata2"
    assert _e2("e2fsck", "-fn", ext4) == 0
    assert "exception" not in pc.shell("dmesg | grep -e ata -e sda; true")
    # Queued commands: what fails is found in the drive's log, and all else goes on
    assert said.count("NCQ (depth 32)") == 2
    assert pc.shell("cat /sys/bus/scsi/devices/0:0:0:0/queue_depth") == "32\n"
    os.truncate(spoiled, MIB)
    said = pc.shell("reads; dmesg | grep -e ata3")
    assert said.split()[0] == hashlib.md5(content[: 64 << 10]).hexdigest() and "Input/output error" in said
    assert "READ FPDMA QUEUED" in said and "{ UNC }" in said and "media error" in said, said
