"""Where a kernel finds a PCI device's interrupt: by ACPI's links or lines, or by $PIR and the router. Each is the line
that the device drives, which it shares with others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pc.conftest import boot_linux
from pc.kernels import needs_kernels

from vmfs.devices.chipset import I440FX, PIRQ_LINES
from vmfs.devices.virtio.block import Block
from vmfs.devices.virtio.disk import open_disk
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound

SEABIOS = Path("/usr/share/seabios/bios.bin")
DISKS = "vda", "vdb", "vdc", "vdd", "vde"
INSTRUCTIONS = 5_000_000  # SeaBIOS takes about 9 million to its boot devices
SECONDS = 60


@needs_kernels
@pytest.mark.parametrize(
    "cmdline, chip",
    [
        ("", "IO-APIC"),  # ACPI: _PRT by GSI
        ("noapic", "XT-PIC"),  # ACPI: _PRT by links
        ("pci=noacpi", "XT-PIC"),  # $PIR and the router; Debian's kernels do not know the multiprocessor tables
        ("acpi=off", "XT-PIC"),
    ],
)
def test_a_disks_interrupt(make_pc, tmp_path, cmdline, chip):
    pc = make_pc()
    for name in DISKS:
        (tmp_path / name).write_bytes(f"it is {name}\n".encode().ljust(1 << 20, b"\0"))
        pc.write("dev/add", f"blk {tmp_path / name} ro\n")
    boot_linux(pc, modules=("virtio_pci", "virtio_blk"), cmdline=f"{cmdline} pci=nomsi")
    pc.expect("guest# ")
    pc.shell(f"for d in {' '.join(DISKS)}; do dd if=/dev/$d of=/tmp/$d bs=4k iflag=direct 2>/dev/null & done; wait")
    assert pc.shell(f"cd /tmp; head -n 1 -q {' '.join(DISKS)}").splitlines() == [f"it is {name}" for name in DISKS]
    used = set()
    for disk in DISKS:
        name = pc.shell(f"readlink -f /sys/block/{disk}/device/..").strip().rpartition("/")[2]
        slot = int(name.split(":")[2].split(".")[0], 16)
        wanted = I440FX.gsi(slot) if chip == "IO-APIC" else I440FX.pic_irq(slot)
        assert pc.shell(f"cat /sys/bus/pci/devices/{name}/irq").strip() == str(wanted), name
        row = pc.shell(f"grep ' {wanted}:' /proc/interrupts").split()
        assert row[0] == f"{wanted}:" and int(row[1]) > 0 and row[2] == chip
        used.add(wanted)
    assert len(used) == (5 if chip == "IO-APIC" else 2)


@pytest.mark.skipif(not SEABIOS.exists(), reason=f"{SEABIOS} is not there: Debian's package seabios")
def test_seabios_writes_the_lines_that_are(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    vm = Vm(EmulatorEngine(), memory_size=32 << 20)
    try:
        vm.set_machine("pc")
        vm.set_time_source("instructions")
        for number in range(8):
            disk = open_disk(os.open(tmp_path / "disk", os.O_RDONLY), "ro")
            vm.attach(lambda board, disk=disk, name=f"blk{number}": Block(board, name, board.pci.free_slot(), disk))
        vm.images["bios"].write(0, SEABIOS.read_bytes())
        functions = [one for one in vm.board.pci.functions.values() if one.INTERRUPT]
        assert len(functions) == 8
        vm.start(Bound(instructions=1)).result(SECONDS)  # the reset is done
        for function in functions:
            function.write_config(0x3C, 1, 0xEE)
        router = vm.board.pci.functions[I440FX.isa_slot << 3]
        router.write_config(I440FX.routes[0], 4, 0x80808080)
        while any(one.config[0x3C] == 0xEE for one in functions):
            assert vm.counters()["instructions"] < INSTRUCTIONS
            vm.start(Bound(instructions=500_000)).result(SECONDS)
        assert bytes(router.config[I440FX.routes[0] : I440FX.routes[0] + 4]) == bytes(PIRQ_LINES)
        wanted = {one.slot: I440FX.pic_irq(one.slot) for one in functions}
        assert {one.slot: one.config[0x3C] for one in functions} == wanted
        assert vm.get_machine_state("irqchip").result(SECONDS)[520 + 8 + 14] == 0x0C  # ELCR: 10 and 11 by their level
    finally:
        vm.close()
