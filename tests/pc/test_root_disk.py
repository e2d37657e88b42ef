"""A Debian on a virtio disk, from Debian's packages: its init checks the root and mounts it, it reboots, powers off,
and survives the server's death."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pc.conftest import Pc, boot_linux
from pc.kernels import DEBIAN, needs_debian, needs_kernels
from pc.test_virtio_linux import MIB, _e2

pytestmark = [needs_kernels, needs_debian]

# The initramfs has the modules for the disk; it gives the machine to the Debian there, and leaves the root read-only.
HANDOVER = """\
mount -t ext4 -o ro /dev/vda /mnt || echo "no root"
mount --move /dev /mnt/dev
mount --move /proc /mnt/proc
/bin/busybox mount --move /sys /mnt/sys
exec /bin/busybox switch_root /mnt /sbin/init
"""
# The scripts of /etc/init.d would do the same at ten times the length, which takes a CPU that is emulated 20 seconds.
INITTAB = """\
id:2:initdefault:
si::sysinit:/etc/start
s0:2:respawn:/sbin/agetty --noclear --skip-login --login-program /bin/bash --login-options "-l" ttyS0
l0:0:wait:/etc/stop poweroff
l6:6:wait:/etc/stop reboot
"""
START = """\
#!/bin/sh
export PATH=/sbin:/bin
fsck -a /dev/vda
mount -o remount,rw /
echo $(($(cat /boots) + 1)) > /boots
echo "boots $(cat /boots)"
"""
STOP = """\
#!/bin/sh
/sbin/killall5 -15
/bin/mount -o remount,ro /
/sbin/$1 -d -f
"""
PROFILE = "PS1='root# '\nPATH=/sbin:/bin\n"
LOSS = """\
#!/bin/sh
i=0
while i=$((i + 1)); do
    echo "$i" > /count.new && sync && mv /count.new /count && sync && echo "counted $i."
done
"""
V3 = {"avx", "avx2", "f16c", "fma"}  # what x86-64-v3 takes from the host
FILES = {
    "etc/inittab": INITTAB,
    "etc/start": START,
    "etc/stop": STOP,
    "etc/profile": PROFILE,
    "etc/fstab": "/dev/vda / ext4 errors=remount-ro 0 1\n",
    "etc/hostname": "disk\n",
    "etc/passwd": "root:x:0:0:root:/:/bin/bash\n",
    "etc/group": "root:x:0:\n",
    "bin/loss": LOSS,
    "boots": "0\n",
}


@pytest.fixture
def root(tmp_path) -> Path:
    tree = tmp_path / "root"
    shutil.copytree(DEBIAN, tree, symlinks=True)
    for name, text in FILES.items():
        (tree / name).write_text(text)
        (tree / name).chmod(0o755)
    image = tmp_path / "root.img"
    with open(image, "wb") as file:
        file.truncate(96 * MIB)
    _e2("mkfs.ext4", "-q", "-F", "-d", tree, image)
    return image


def boot(pc: Pc, root: Path) -> Pc:
    pc.write("dev/add", f"blk {root} rw\n")
    return boot_linux(pc, HANDOVER, modules=("virtio_pci", "virtio_blk", "ext4"))


def test_a_debian_on_a_disk_reboots_and_survives_a_kill(make_pc, other_mount, root: Path) -> None:
    victim = boot(Pc(other_mount.path / "victim"), root)
    victim.expect(r"boots 1\r\n")
    victim.expect("root# ")
    victim.type("reboot\n")
    assert victim.ended().startswith("shutdown cause=reset")
    assert _e2("e2fsck", "-n", root) == 0  # marked clean: it was unmounted
    victim.start()  # the same machine, again from its disk
    victim.expect(r"/dev/vda: clean")
    victim.expect(r"boots 2\r\n")
    victim.expect("root# ")
    victim.type("loss\n")
    for number in range(1, 6):
        victim.expect(rf"counted {number}\.\r\n")
    victim.die(other_mount)
    told = int(victim.said.rpartition("counted ")[2].partition(".")[0])

    crashed = root.with_suffix(".crashed")
    shutil.copy(root, crashed)
    _e2("e2fsck", "-fp", crashed)  # replays the journal; anything that needs a decision fails
    assert _e2("e2fsck", "-fn", crashed) == 0

    again = boot(make_pc(), root)  # as it was left: the guest recovers it
    again.expect(r"/dev/vda: (clean|recovering journal)")
    again.expect(r"boots 3\r\n")
    again.expect("root# ")
    again.type("echo count $(cat /count).\n")
    assert int(again.expect(r"count (\d+)\.\r\n")[1]) >= told
    if V3 <= set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()):
        again.type("/lib64/ld-linux-x86-64.so.2 --help | grep v3\n")  # the C library takes its functions for that
        again.expect(r"x86-64-v3 \(supported, searched\)\r\n")
    again.type("poweroff\n")
    assert again.ended().startswith("shutdown cause=poweroff")
    assert _e2("e2fsck", "-fn", root) == 0
