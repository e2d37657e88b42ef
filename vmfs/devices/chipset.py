"""Chipset: in what the kinds of PC differ that firmware and drivers know: where things are, and how they are wired.

Source: Intel 82371AB (PIIX4) data sheet, 7.1; Intel ICH9 data sheet, 10.1 (RCBA: D25IR to D31IR), 13.1 and 13.8; and
which slot is wired to which input of the router, as firmware that knows an i440FX or a Q35 of a virtual machine has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FIRST_GSI = 16
PIRQ_LINES = 10, 10, 11, 11  # of the 8259s, from the beginning, as SeaBIOS and OVMF route them
MEMORY_END = 0xFEC0_0000  # of memory BARs
ECAM_SIZE = 1 << 28  # bytes of 256 buses


@dataclass(frozen=True, slots=True)
class Chipset:
    """`routes`: the registers of the ISA bridge that route each input of the PCI router; `wired`: which input INTA of a
    slot is wired to; `gsi`: its line at the I/O APIC. `gpe0`: where the general-purpose events are after the first port
    of ACPI's hardware, `gpe0_half` of their bytes are status and as many enable, `power_length`: all of its ports.
    `memory_start`: from there on firmware may place memory BARs; `ecam`: where the configuration spaces are in memory,
    0: nowhere; `memory_most`: bytes of RAM that fit below, 0: any number."""

    isa_slot: int
    isa_id: tuple[int, int]
    routes: tuple[int, ...]
    wired: Callable[[int], int]
    gsi: Callable[[int], int]
    gpe0: int
    gpe0_half: int
    power_length: int
    memory_start: int
    ecam: int = 0
    memory_most: int = 0

    def pic_irq(self, slot: int) -> int:
        """The IRQ of the 8259s where INTA of a slot is routed to from the beginning."""
        return PIRQ_LINES[self.wired(slot) % len(PIRQ_LINES)]


def _wired_to_ich9(slot: int) -> int:
    """The ICH9's own slots to PIRQA, as D25IR to D31IR say; the others in turn to PIRQE to PIRQH."""
    return 0 if slot >= 25 else 4 + slot % 4


I440FX = Chipset(
    isa_slot=1,
    isa_id=(0x8086, 0x7000),
    routes=tuple(range(0x60, 0x64)),
    wired=lambda slot: (slot - 1) % 4,
    gsi=lambda slot: FIRST_GSI + slot % 8,
    gpe0=0x0C,
    gpe0_half=2,
    power_length=64,
    memory_start=0xE000_0000,
)
Q35 = Chipset(
    isa_slot=31,
    isa_id=(0x8086, 0x2918),
    routes=(*range(0x60, 0x64), *range(0x68, 0x6C)),
    wired=_wired_to_ich9,
    gsi=lambda slot: FIRST_GSI + _wired_to_ich9(slot),
    gpe0=0x20,
    gpe0_half=8,
    power_length=128,
    memory_start=0xC000_0000,
    ecam=0xB000_0000,
    memory_most=0xB000_0000,
)
