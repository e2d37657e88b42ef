"""A q35: firmware and Debian's kernels on it. Its chips without a guest are in tests/devices/test_q35.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pc.conftest import Pc, boot_linux
from pc.initramfs import build
from pc.kernels import CLOUD, GENERIC, needs_kernels
from pc.media import GRUB, ON_SERIAL, SEABIOS, esp, grub_iso, needs

from vmfs.devices.chipset import Q35

CODE, VARS = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
SLEEPS = r"""
dmesg | grep -o -e 'MMCONFIG at .*'
echo +600 > /sys/class/rtc/rtc0/wakealarm
echo mem > /sys/power/state
echo slept=$(cat /sys/power/suspend_stats/success)
poweroff -f
"""


@pytest.fixture
def make_q35(pc_mount: Path) -> Iterator[Callable[[], Pc]]:
    made: list[Pc] = []

    def make() -> Pc:
        path = pc_mount / f"q35-{len(made)}-{os.getpid()}"
        path.mkdir()
        (path / "machine").write_text("q35")
        made.append(Pc(path))
        return made[-1]

    yield make
    for one in made:
        one.remove()


@needs_kernels
@needs("grub-mkrescue", "xorriso", "mformat", GRUB, SEABIOS)
def test_grub_on_a_cd_and_linux_that_sleeps(make_q35, tmp_path) -> None:
    """SeaBIOS boots from a drive of the ICH9, and wakes what it has started; that powers off."""
    config = f"{ON_SERIAL}linux /vmlinuz console=ttyS0 quiet\ninitrd /initrd\nboot\n"
    image = grub_iso(tmp_path / "linux.iso", config, {"vmlinuz": CLOUD.image, "initrd": build(SLEEPS)})
    pc = make_q35()
    pc.write("mem_size", "256M")
    pc.write("dev/add", f"ahci-cdrom {image}\n")
    pc.load("bios", SEABIOS)
    pc.start()
    pc.expect(r"MMCONFIG at \[mem 0xb0000000-0xbfffffff\] reserved in E820")
    assert pc.ended().startswith("shutdown cause=suspend")
    pc.start()
    pc.expect("slept=1")
    assert pc.ended().startswith("shutdown cause=poweroff")


@needs(CODE, VARS, "mformat")
def test_ovmfs_shell(make_q35, tmp_path) -> None:
    """It runs a script from a disk of the ICH9."""
    script = "@echo -off\necho SCRIPT-RUNS\npci\nreset -s\n"
    pc = make_q35()
    pc.write("mem_size", "256M")
    for line in (
        f"pflash {CODE} ro",
        f"pflash {VARS} cow",
        f"ahci {esp(tmp_path / 'disk', {'startup.nsh': script.encode()})} ro",
    ):
        pc.write("dev/add", f"{line}\n")
    pc.start()
    pc.expect("SCRIPT-RUNS")
    pc.expect("(?s)Vendor 8086 Device 29C0.*Vendor 8086 Device 2918.*Vendor 8086 Device 2922")
    assert pc.ended().startswith("shutdown cause=poweroff")


LOOK = """#!/bin/sh
head -n 1 /dev/sda
dmesg | grep -o 'MMCONFIG at .*'
for d in /sys/bus/pci/devices/*; do
    echo $(cat $d/vendor $d/device) $(wc -c < $d/config) $(od -A n -t x4 -j 256 -N 4 $d/config)
done
cd /sys/bus/i2c/devices
for bus in i2c-*; do grep -q SMBus $bus/name && break; done
[ -e $bus/${bus#i2c-}-0050 ] || echo spd 0x50 > $bus/new_device
grep -e ahci -e i801 /proc/interrupts
"""


@needs_kernels
def test_linux_without_firmware(make_q35, tmp_path) -> None:
    """A disk whose interrupt is a message, the SMBus whose interrupt is GSI 16; and the kernel finds what is in the
    extended configuration space."""
    pc = make_q35()
    (tmp_path / "disk").write_bytes(b"it is a disk\n".ljust(1 << 20, b"\0"))
    pc.write("dev/add", f"ahci {tmp_path / 'disk'} ro\n")
    pc.write("dev/add", "rng\n")
    modules = ("ahci", "sd_mod", "i2c_i801", "at24")
    boot_linux(pc, modules=modules, kernel=GENERIC, files={"bin/look": LOOK.encode()})
    pc.expect("guest# ")
    said = pc.shell("look")
    assert said.startswith("it is a disk\nMMCONFIG at [mem 0xb0000000-0xbfffffff] reserved in E820\n"), said
    found = re.findall(r"(?m)^0x(\w+) 0x(\w+) (\d+)(?: (\w+))?$", said)
    assert found == [
        ("8086", "29c0", "256", ""),
        ("1234", "1111", "256", ""),
        ("1af4", "1044", "4096", "00010003"),
        ("8086", "2918", "256", ""),
        ("8086", "2922", "256", ""),
        ("8086", "2930", "256", ""),
    ], said
    rows = [line.split() for line in said.splitlines() if "ahci" in line or "i801" in line]
    (disk,) = (row for row in rows if "ahci" in row[-1])
    (smbus,) = (row for row in rows if "i801" in row[-1])
    assert disk[2] == "PCI-MSI" and int(disk[1]) > 0, said
    assert smbus[0] == "16:" and smbus[2] == "IO-APIC" and int(smbus[1]) > 0, said


def test_what_a_q35_has_not(make_q35, tmp_path) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    pc = make_q35()
    for name, text, words in (
        ("dev/add", f"ide {tmp_path / 'disk'} ro\n", "a q35 has no IDE"),
        ("mem_size", f"{(Q35.memory_most >> 20) + 1}M", "up to 2816M"),
    ):
        with pytest.raises(OSError):
            pc.write(name, text)
        assert words in pc.read("error")
