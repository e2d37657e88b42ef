"""Where a kernel that does not use the IOAPIC finds a PCI device's interrupt: by ACPI, or in the device.

With the IOAPIC every other test of a PCI device does.
"""

from __future__ import annotations

import pytest
from pc.conftest import boot_linux
from pc.kernels import needs_kernels

from vmfs.devices.pci import pic_irq

pytestmark = needs_kernels


@pytest.mark.parametrize("cmdline", ["noapic pci=nomsi", "acpi=off pci=nomsi"])
def test_a_disks_interrupt(make_pc, tmp_path, cmdline):
    disk = tmp_path / "disk"
    disk.write_bytes(b"the first sector".ljust(1 << 20, b"\0"))
    pc = make_pc()
    pc.write("dev/add", f"blk {disk} ro\n")
    boot_linux(pc, modules=("virtio_pci", "virtio_blk"), cmdline=cmdline)
    pc.expect("guest# ")
    assert pc.shell("head -c 16 /dev/vda") == "the first sector"
    name = pc.shell("ls /sys/bus/pci/drivers/virtio-pci | grep 0000").strip()
    slot = int(name.split(":")[2].split(".")[0], 16)
    row = pc.shell("grep virtio /proc/interrupts").split()
    assert row[0] == f"{pic_irq(slot)}:" and int(row[1]) > 0
    assert row[2] == "XT-PIC"
