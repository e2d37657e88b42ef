"""$PIR, the PCI interrupt routing table: where INTx of each slot goes, for kernels without ACPI and IOAPIC.

Source: the PCI IRQ routing table's specification 1.0 (Microsoft); its links are what the router's driver takes: of a
PIIX3 the registers' offsets.
"""

from __future__ import annotations

import struct

from vmfs.boot.acpi import checksum
from vmfs.devices import isa, pci
from vmfs.devices.chipset import Chipset

_PINS = 4
_VERSION = 0x0100
_CHECKSUM_AT = 31


def table(chipset: Chipset) -> bytes:
    """For an address in F0000-FFFFF that is a multiple of 16."""
    irqs = sum(1 << irq for irq in isa.IRQS)
    rows = []
    for slot in range(1, pci.SLOTS):
        first, number = divmod(chipset.wired(slot), _PINS)
        links = (chipset.routes[first * _PINS + (number + pin) % _PINS] for pin in range(_PINS))
        on_board = 0  # no number of a slot that one could see
        pins = b"".join(struct.pack("<BH", link, irqs) for link in links)
        rows.append(struct.pack("<BB12sBx", 0, slot << 3, pins, on_board))
    body = b"".join(rows)
    data = bytearray(struct.pack("<4sHHBBHHHI11xx", b"$PIR", _VERSION, 32 + len(body), 0, chipset.isa_slot << 3, 0,
                                 *chipset.isa_id, 0) + body)  # fmt: skip
    data[_CHECKSUM_AT] = checksum(data)
    return bytes(data)
