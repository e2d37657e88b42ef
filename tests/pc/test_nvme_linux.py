"""Debian's nvme driver: a disk that is written, and one that keeps its file as it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pc.kernels import needs_kernels
from pc.test_virtio_linux import MIB, _e2, booted, counters, ext4, info  # noqa: F401

pytestmark = needs_kernels


def test_disks(make_pc, ext4: Path, tmp_path: Path) -> None:  # noqa: F811
    content = os.urandom(4 * MIB)
    raw = tmp_path / "raw.img"
    raw.write_bytes(content)
    pc = make_pc()
    pc.write("cpus", "2")
    pc.write("dev/add", f"nvme {ext4} rw\n")
    pc.write("dev/add", f"nvme {raw} cow\n")
    booted(
        pc,
        {
            "fill": "mount -o discard /dev/nvme0n1 /mnt\ndd if=/dev/nvme1n1 of=/mnt/copy bs=1M 2>/dev/null\nsync\n"
            "echo 3 >/proc/sys/vm/drop_caches\nmd5sum </mnt/copy",
            "scribble": "dd if=/dev/zero of=/dev/nvme1n1 bs=4k seek=3 count=5 conv=notrunc 2>/dev/null\nsync\n"
            "echo 3 >/proc/sys/vm/drop_caches\nmd5sum </dev/nvme1n1",
        },
        modules=("nvme", "ext4"),
    )
    said = pc.shell("dmesg | grep nvme; cat /sys/class/nvme/nvme0/model /sys/block/nvme0n1/queue/write_cache")
    assert "nvme nvme0: 2/0/0 default/read/poll queues" in said and "vmfs disk" in said and "write back" in said, said
    assert "failed" not in said and "missing or invalid" not in said and "timeout" not in said, said
    assert pc.shell("fill").split()[0] == hashlib.md5(content).hexdigest()
    scribbled = content[: 3 * 4096] + bytes(5 * 4096) + content[8 * 4096 :]
    assert pc.shell("scribble").split()[0] == hashlib.md5(scribbled).hexdigest()
    assert raw.read_bytes() == content
    pc.shell("rm /mnt/copy; sync; umount /mnt")
    counted = counters(pc, "nvme0")
    assert counted["write_bytes"] >= 4 * MIB and counted["flushes"] > 0 and counted["discard_requests"] > 0
    assert "bad_doorbells" not in counted and info(pc, "nvme0")["queues"] == "2" and info(pc, "nvme1")["mode"] == "cow"
    assert _e2("e2fsck", "-fn", ext4) == 0
