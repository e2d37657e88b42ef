"""The ISA bridge of a PIIX3: the router, by which INTx of the PCI bus come to the 8259s.

Four inputs, PIRQA to PIRQD, of which each slot's INTA is wired to one (`vmfs.devices.pci.pirq`), and a register of each
that says which IRQ it drives. A system that uses the IOAPIC has the lines of the slots there, which do not pass here.
Edge or level are the ELCR's, with the 8259s in the engine.

Source: Intel 82371FB/82371SB (PIIX, PIIX3) data sheet, 2.2.9 (PIRQRC). Left out: all that is of ISA's own timing.
"""

from __future__ import annotations

from vmfs.devices.pci import PIRQ_LINES, PIRQS, PciState, PlainPciDevice

ISA_SLOT = 1  # of the PCI bus, with the functions that firmware knows there
PIRQ_ROUTES = 0x60  # a byte each
_OFF, _NUMBER = 0x80, 0x0F
IRQS = (3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15)  # others are reserved, and route to none


class IsaBridge(PlainPciDevice):
    """Function 0 of the slot where an i440FX has it."""

    TYPE = "pci-isa-bridge"
    VENDOR, DEVICE, CLASS = 0x8086, 0x7000, 0x060100
    INTERRUPT = False

    def _identity(self) -> bytearray:
        config = super()._identity()
        config[PIRQ_ROUTES : PIRQ_ROUTES + PIRQS] = bytes(PIRQ_LINES)
        self._mask[PIRQ_ROUTES : PIRQ_ROUTES + PIRQS] = bytes((_OFF | _NUMBER,)) * PIRQS
        self.writes_have_effects(PIRQ_ROUTES, PIRQS)
        return config

    def write_config(self, offset: int, size: int, value: int) -> None:
        super().write_config(offset, size, value)
        self._route()

    def reset(self) -> None:
        super().reset()
        self._route()

    def load(self, state: PciState) -> None:
        super().load(state)
        self._route()

    def _route(self) -> None:
        for pirq, route in enumerate(self.config[PIRQ_ROUTES : PIRQ_ROUTES + PIRQS]):
            line = route & _NUMBER
            self.board.bus.route_pirq(pirq, 0 if route & _OFF or line not in IRQS else line)
