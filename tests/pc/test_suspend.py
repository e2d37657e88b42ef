"""Linux suspends to RAM, and the next run wakes it: a system that was started without firmware, and by SeaBIOS."""

from __future__ import annotations

import pytest
from pc.initramfs import build
from pc.kernels import CLOUD, needs_kernels
from pc.media import ISOLINUX, SEABIOS, isolinux_iso, needs

pytestmark = needs_kernels
INIT = r"""
dd if=/dev/vda bs=512 count=1 2>/dev/null | head -c 5; echo
echo slept=$(cat /sys/power/suspend_stats/success)
before=$(cat /sys/class/rtc/rtc0/since_epoch)
echo +600 > /sys/class/rtc/rtc0/wakealarm
echo mem > /sys/power/state
passed=$(($(cat /sys/class/rtc/rtc0/since_epoch) - before)) left=$(cat /sys/class/rtc/rtc0/wakealarm)
[ $passed -ge 600 -a $passed -lt 660 -a -z "$left" ] && echo woken by the alarm || echo passed=$passed left=$left
dd if=/dev/vda of=/tmp/again iflag=direct bs=512 count=1 2>/dev/null; head -c 5 /tmp/again; echo
nproc
echo slept=$(cat /sys/power/suspend_stats/success)
poweroff -f
"""


@pytest.mark.parametrize("how", ["kernel", pytest.param("bios", marks=[needs("xorriso", ISOLINUX, SEABIOS)])])
def test_linux_sleeps_and_is_woken(make_pc, tmp_path, how):
    """By the clock's alarm, for which nobody waits. A second CPU and a disk come back, too."""
    (tmp_path / "disk").write_bytes(b"sound".ljust(1 << 20, b"\0"))
    initrd = build(INIT, modules=("virtio_pci", "virtio_blk"))
    pc = make_pc()
    pc.write("mem_size", "256M")
    pc.write("cpus", "2")
    pc.write("dev/add", f"blk {tmp_path / 'disk'} ro\n")
    if how == "kernel":
        pc.load("kernel", CLOUD.image)
        pc.load("initrd", initrd)
        pc.write("cmdline", "console=ttyS0 quiet")
    else:
        config = "default l\nlabel l\nkernel /vmlinuz\ninitrd /initrd\nappend console=ttyS0 quiet\n"
        image = isolinux_iso(tmp_path / "linux.iso", config, {"vmlinuz": CLOUD.image, "initrd": initrd})
        pc.write("dev/add", f"cdrom {image}\n")
        pc.load("bios", SEABIOS)
    pc.start()
    pc.expect("sound\r\nslept=0\r\n")
    assert pc.ended().startswith("shutdown cause=suspend rip=")
    assert pc.read("state") == "paused\n"
    pc.start()
    pc.expect("woken by the alarm\r\nsound\r\n2\r\nslept=1\r\n")
    assert pc.ended().startswith("shutdown cause=poweroff ")
