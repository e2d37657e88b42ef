"""The multiprocessor tables: processors and interrupts for kernels that know no ACPI.

Source: Intel MultiProcessor Specification 1.4, chapter 4. Left out: extended entries.
"""

from __future__ import annotations

import struct

from vmfs.boot.acpi import IOAPIC, LAPIC, LEVEL_HIGH, PIT_GSI, checksum
from vmfs.boot.platform import Platform
from vmfs.devices import pci, power

_POINTER_SIZE = 16
_OEM, _PRODUCT = b"VMFS    ", b"PC          "
_ISA, _PCI = 1, 0  # numbers of buses: that of PCI is what PCI calls it
_IOAPIC_ID = 0  # what its register says
_APIC_VERSION, _IOAPIC_VERSION = 0x14, 0x11
_VECTORED, _NMI, _EXTERNAL = 0, 1, 3  # types of interrupts
_ALL = 0xFF
_PROCESSOR_SIGNATURE, _HAS_FPU_AND_APIC = 0x600, 0x201


def table(platform: Platform, address: int) -> bytes:
    """The floating pointer, and after it the configuration table, for `address` (a multiple of 16)."""
    entries = _entries(platform)
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), 4, 0, _OEM, _PRODUCT, 0, 0, len(entries), LAPIC, 0, 0, 0
    )
    config = bytearray(header + body)
    config[7] = checksum(config)
    pointer = bytearray(struct.pack("<4sIBBB5s", b"_MP_", address + _POINTER_SIZE, 1, 4, 0, bytes(5)))
    pointer[10] = checksum(pointer)
    return bytes(pointer + config)


def _entries(platform: Platform) -> list[bytes]:
    usable, first = 1, 2
    rows = [
        struct.pack(
            "<BBBBII8x", 0, number, _APIC_VERSION, usable | (0 if number else first),
            _PROCESSOR_SIGNATURE, _HAS_FPU_AND_APIC,
        )
        for number in range(platform.cpus)
    ]  # fmt: skip
    rows.append(struct.pack("<BB6s", 1, _PCI, b"PCI   "))
    rows.append(struct.pack("<BB6s", 1, _ISA, b"ISA   "))
    rows.append(struct.pack("<BBBBI", 2, _IOAPIC_ID, _IOAPIC_VERSION, usable, IOAPIC))
    for slot in range(1, pci.SLOTS):
        rows.append(_interrupt(3, _VECTORED, _PCI, slot << 2, _IOAPIC_ID, platform.chipset.gsi(slot)))
    for line in range(16):
        if line == 2:  # the cascade
            continue
        to = PIT_GSI if line == 0 else line
        rows.append(_interrupt(3, _VECTORED, _ISA, line, _IOAPIC_ID, to, LEVEL_HIGH if line == power.SCI else 0))
    rows.append(_interrupt(4, _EXTERNAL, _ISA, 0, _ALL, 0))  # the 8259 on LINT0, NMI on LINT1
    rows.append(_interrupt(4, _NMI, _ISA, 0, _ALL, 1))
    return rows


def _interrupt(entry: int, kind: int, bus: int, line: int, apic: int, to: int, flags: int = 0) -> bytes:
    """A source on a bus, and the input of an (I/O) APIC where it arrives; flags 0: as the bus has it."""
    return struct.pack("<BBHBBBB", entry, kind, flags, bus, line, apic, to)
