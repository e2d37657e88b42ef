"""A root file system from Debian's packages on a virtio disk: it boots, reboots, and survives the server's death."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from pc.conftest import Pc, boot_linux
from pc.kernels import BUSYBOX, needs_kernels
from pc.test_virtio_linux import MIB, _e2, other_mount

pytestmark = needs_kernels
__all__ = ["other_mount"]  # a fixture

# The initramfs gives the machine to the root on the disk.
HANDOVER = """\
mount -t ext4 -o rw /dev/vda /mnt || echo "no root"
mount --move /dev /mnt/dev
umount /sys
/bin/busybox umount /proc
exec /bin/busybox switch_root /mnt /sbin/init
"""
# busybox' init reads the root's own inittab.
INITTAB = """\
::sysinit:/bin/mount -t proc proc /proc
::sysinit:/etc/rc
ttyS0::respawn:/bin/sh -l
::ctrlaltdel:/sbin/reboot
::restart:/sbin/init
::shutdown:/bin/umount -a -r
"""
RC = """\
#!/bin/sh
echo "boots $(($(cat /boots) + 1))"
echo $(($(cat /boots) + 1)) > /boots
sync
"""
PROFILE = "PS1='root# '\n"
LOSS = """\
#!/bin/sh
i=0
while i=$((i + 1)); do
    echo "$i" > /count.new && sync && mv /count.new /count && sync && echo "counted $i."
done
"""


@pytest.fixture
def root(tmp_path) -> Path:
    tree = tmp_path / "root"
    for folder in ("bin", "sbin", "etc", "proc", "sys", "dev", "tmp"):
        (tree / folder).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(BUSYBOX.read_bytes())
    for name in ("sh", "mount", "umount", "cat", "sync", "mv", "poweroff", "reboot"):
        os.symlink("busybox", tree / "bin" / name)
    os.symlink("../bin/busybox", tree / "sbin/init")
    os.symlink("../bin/busybox", tree / "sbin/reboot")
    for name, text in (("etc/inittab", INITTAB), ("etc/rc", RC), ("etc/profile", PROFILE), ("bin/loss", LOSS)):
        (tree / name).write_text(text)
    for name in ("bin/busybox", "etc/rc", "bin/loss"):
        (tree / name).chmod(0o755)
    (tree / "boots").write_text("0\n")
    image = tmp_path / "root.img"
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
    _e2("mkfs.ext4", "-q", "-F", "-d", tree, image)
    return image


def boot(pc: Pc, root: Path) -> Pc:
    pc.write("dev/add", f"blk {root} rw\n")
    return boot_linux(pc, HANDOVER, modules=("virtio_pci", "virtio_blk", "ext4"))


def test_a_root_on_a_disk_reboots_and_survives_a_kill(make_pc, other_mount, root: Path) -> None:
    pc = boot(make_pc(), root)
    pc.expect(r"boots 1\r\n")
    pc.expect("root# ")
    pc.type("reboot -f\n")
    assert pc.ended().startswith("shutdown cause=reset")
    pc.start()  # the same machine, again from its disk
    pc.expect(r"boots 2\r\n")
    pc.expect("root# ")
    pc.type("poweroff -f\n")
    assert pc.ended().startswith("shutdown cause=poweroff")
    pc.path.rmdir()  # which gives the disk back

    directory, server = other_mount
    victim = boot(Pc(directory / "victim"), root)
    victim.expect(r"boots 3\r\n")
    victim.expect("root# ")
    victim.type("loss\n")
    for number in range(1, 6):
        victim.expect(rf"counted {number}\.\r\n")
    server.send_signal(signal.SIGKILL)
    server.wait()
    with contextlib.suppress(AssertionError, OSError):
        victim.expect("nothing more")
    os.close(victim.console)
    assert victim._runner is not None
    victim._runner.communicate()
    told = int(victim.said.rpartition("counted ")[2].partition(".")[0])
    _e2("e2fsck", "-fp", root)  # replays the journal; anything that needs a decision fails
    assert _e2("e2fsck", "-fn", root) == 0

    again = boot(make_pc(), root)
    again.expect(r"boots 4\r\n")
    again.expect("root# ")
    again.type("echo count $(cat /count).\n")
    assert int(again.expect(r"count (\d+)\.\r\n")[1]) >= told
