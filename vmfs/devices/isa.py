"""The ISA bridge of a PIIX3: the router, by which INTx of the PCI bus come to the 8259s.

Four inputs, PIRQA to PIRQD, or an ICH9's eight, of which each slot's INTA is wired to one (`Chipset.wired`), and a
register of each that says which IRQ it drives. A system that uses the IOAPIC has the lines of the slots there, which
do not pass here. Edge or level are the ELCR's, with the 8259s in the engine.

Source: Intel 82371FB/82371SB (PIIX, PIIX3) data sheet, 2.2.9 (PIRQRC). Left out: all that is of ISA's own timing.
"""

from __future__ import annotations

from vmfs.devices.chipset import I440FX, PIRQ_LINES
from vmfs.devices.pci import PlainPciDevice

_OFF, _NUMBER = 0x80, 0x0F
IRQS = (3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15)  # others are reserved, and route to none


class Router(PlainPciDevice):
    """A bridge with the router, whose registers the board's chipset names."""

    INTERRUPT = False

    def _identity(self) -> bytearray:
        config = super()._identity()
        for pirq, at in enumerate(self.board.chipset.routes):
            config[at] = PIRQ_LINES[pirq % len(PIRQ_LINES)]
            self._mask[at] = _OFF | _NUMBER
            self.writes_have_effects(at, 1)
        return config

    def takes_effect(self) -> None:
        for pirq, at in enumerate(self.board.chipset.routes):
            route = self.config[at]
            line = route & _NUMBER
            self.board.bus.route_pirq(pirq, 0 if route & _OFF or line not in IRQS else line)


class IsaBridge(Router):
    """Function 0 of the slot where an i440FX has it."""

    TYPE = "pci-isa-bridge"
    VENDOR, DEVICE = I440FX.isa_id
    CLASS = 0x060100
