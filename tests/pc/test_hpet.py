"""Linux and the HPET: its clock, and its ticks where the LAPIC has none."""

from __future__ import annotations

import re

from pc.initramfs import build
from pc.kernels import CLOUD, needs_kernels

pytestmark = needs_kernels
INIT = r"""
sci() { echo sci=$(awk "{print \$1}" /sys/firmware/acpi/interrupts/ff_rt_clk); }
echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
grep timer /proc/interrupts; sci
echo +1 > /sys/class/rtc/rtc0/wakealarm
sleep 2
grep timer /proc/interrupts; sci
poweroff -f
"""


def test_linux_reads_its_time_and_ticks_by_it(make_pc):
    pc = make_pc()
    pc.write("mem_size", "256M")
    pc.load("kernel", CLOUD.image)
    pc.load("initrd", build(INIT))
    pc.write("cmdline", "console=ttyS0 quiet clocksource=hpet nolapic_timer")
    pc.start()
    pc.expect("clock=hpet")
    assert "counts yes\nreplaces yes\n" in pc.read("dev/hpet/info")
    assert pc.ended().startswith("shutdown cause=poweroff")
    pc.rest()
    ticks = [int(count) for count in re.findall(r"\n +0: +(\d+) +IO-APIC +2-edge +timer", pc.said)]
    assert len(ticks) == 2 and ticks[1] > ticks[0] + 4, pc.said
    alarms = [int(count) for count in re.findall(r"sci=(\d+)", pc.said)]
    assert alarms == [0, 1], "the clock's alarm comes by ACPI, for its line is the HPET's"
