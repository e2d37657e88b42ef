"""ACPI's hardware: the PM timer, PM1 event and control blocks, general-purpose events.

A guest that sleeps in S5 has powered off, one in S3 is suspended to RAM.

S5 is sleep type 0, as on a PIIX4 (and QEMU's and Bochs' PCs): SeaBIOS and small kernels write 2000h to port 604h
without a look at the tables.

Source: ACPI Specification 6.4, chapters 4.8.3 (PM1 event, control), 4.8.3.3 (timer) and 4.8.4.1 (GPE0).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

from vmfs.devices import _chips, smbus
from vmfs.devices.chipset import I440FX, Chipset
from vmfs.devices.device import U16, DeviceState, Port, QuietDevice, Window
from vmfs.devices.pci import PlainPciDevice

PM1_EVENT, PM1_CONTROL, PM_TIMER, SCI = 0x600, 0x604, 0x608, 9
BASE, LENGTH = PM1_EVENT, I440FX.power_length  # where they are unless firmware moves them
S3, S5 = 1, 0  # SLP_TYP in the tables' \_S3 and \_S5
_WOKEN, _RTC = 0x8000, 0x0400  # WAK_STS; RTC_STS, RTC_EN

# Of the FADT: where a port is, in how many bytes, and which one, or None for GPE0 (ACPI 6.4, 5.2.9).
_FADT_PORTS = (
    (56, 4, PM1_EVENT), (64, 4, PM1_CONTROL), (76, 4, PM_TIMER), (80, 4, None),
    (152, 8, PM1_EVENT), (176, 8, PM1_CONTROL), (212, 8, PM_TIMER), (224, 8, None),
)  # fmt: skip

_SCI_EN, _SLP_TYP, _SLP_EN = 1, 10, 0x2000
_PMBA, _PMREGMISC, _DECODED = 0x40, 0x80, 1  # of the PCI function
_COMMAND, _SMBBA, _SMBHSTCFG, _BY_IRQ = 0x04, 0x90, 0xD2, 8


class PowerState(DeviceState):
    status: U16
    enable: U16
    control: U16
    gpe_status: U16 = 0
    gpe_enable: U16 = 0


class Power(QuietDevice[PowerState]):
    """Region 0: PM1a event; 1: PM1a control; 2: the timer, of 24 bits; 3: GPE0. The registers are in C
    (chips/power.c)."""

    TYPE = "acpi-pm"
    INPUTS = ("press",)
    STATE = PowerState
    irq = SCI

    def __init__(self, board: Port, name: str) -> None:
        super().__init__(board, name)
        self.chip = _chips.Power(board.bus, self.number, SCI)
        self.chip.set_gpe(board.chipset.gpe0_half)
        self.base: int | None = BASE
        self.reset()

    def windows(self) -> tuple[Window, ...]:
        if self.base is None:
            return ()
        gpe0 = gpe0_port(self.board.chipset), 2 * self.board.chipset.gpe0_half
        registers = (PM1_EVENT, 4), (PM1_CONTROL, 2), (PM_TIMER, 4), gpe0
        return tuple(
            Window("port", self.base + port - BASE, length, region) for region, (port, length) in enumerate(registers)
        )

    def move(self, base: int | None) -> None:
        """Have its ports there; None: nowhere."""
        if base != self.base:
            self.base = base
            self.board.rewire(self)

    def reset(self) -> None:
        self.load(PowerState(status=0, enable=0, control=_SCI_EN))

    def press_button(self) -> None:
        """The power button, by which a guest is asked to shut down."""
        self.board.inputs.enter(self, "press", b"")

    def input(self, kind: str, data: bytes) -> None:
        self.chip.press()

    def raise_event(self, number: int) -> None:
        """A general-purpose event, of which the guest is told by the tables' \\_GPE._E00 and so on."""
        self.chip.raise_event(number)

    def time_shifted(self, by: int) -> None:
        self.chip.seen(self.board.now())

    def read(self, region: int, offset: int, size: int) -> int:
        value = self.chip.read(region, offset, size)
        self.board.chip_used()
        return value

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if not self.chip.write(region, offset, size, value):
            self._sleep(offset, size, value)
        self.board.chip_used()

    def _sleep(self, offset: int, size: int, value: int) -> None:
        """PM1 control with SLP_EN, which is not kept."""
        state = self.save()
        mask = ((1 << 8 * size) - 1) << 8 * offset
        control = (state.control & ~mask | value << 8 * offset & mask) & 0xFFFF & ~_SLP_EN
        self.load(msgspec.structs.replace(state, control=control))
        kind = control >> _SLP_TYP & 7
        if kind in (S3, S5):
            self.board.stop("suspend" if kind == S3 else "poweroff")

    @property
    def wakes_by_clock(self) -> bool:
        """The system has enabled RTC_STS, which wakes it."""
        return bool(self.save().enable & _RTC)

    def woken(self) -> None:
        """It was reset, and wakes."""
        self.load(PowerState(status=_WOKEN, enable=0, control=_SCI_EN))

    def save(self) -> PowerState:
        return PowerState(**self.chip.state(self.board.now()))

    def load(self, state: PowerState) -> None:
        self.chip.load(now=self.board.now(), **msgspec.structs.asdict(state))
        self.board.chip_used()


class PowerFunction(PlainPciDevice):
    """The PCI function of a PIIX4 that says where these ports are: SeaBIOS looks there for where its APM powers off.

    It says where the SMBus is, too. A kernel that is started without firmware finds them at BASE; firmware puts them
    where it likes.

    Source: Intel 82371AB (PIIX4) data sheet, chapter 7.1. There is no SMM.
    """

    TYPE = "pci-acpi-pm"
    VENDOR, DEVICE, CLASS, REVISION = 0x8086, 0x7113, 0x068000, 3
    INTERRUPT = False
    function_number = 3  # where OVMF reads the timer's port

    def __init__(
        self, board: Port, name: str, slot: int, moved: Callable[[int | None], None],
        smbus_moved: Callable[[int | None, bool], None],
    ) -> None:  # fmt: skip
        """`smbus_moved` gets where its ports are, and whether it has IRQ 9."""
        self._power_moved, self._smbus_moved = moved, smbus_moved
        super().__init__(board, name, slot)
        self._own_bits[_SMBBA] = 1  # machines were saved before it was there

    def _identity(self) -> bytearray:
        config = super()._identity()
        struct.pack_into("<I", config, _PMBA, BASE | 1)
        config[_PMREGMISC] = _DECODED
        self._mask[_PMBA : _PMBA + 2] = struct.pack("<H", -LENGTH & 0xFFFF)
        self._mask[_PMREGMISC] = _DECODED
        struct.pack_into("<I", config, _SMBBA, smbus.BASE | 1)
        config[_SMBHSTCFG] = _DECODED | _BY_IRQ
        self._mask[_SMBBA : _SMBBA + 2] = struct.pack("<H", -smbus.LENGTH & 0xFFFF)
        self._mask[_SMBHSTCFG : _SMBHSTCFG + 4] = b"\x0f\xff\xff\xff"  # and of the slave: control, two addresses
        self.writes_have_effects(_PMBA, 2)
        self.writes_have_effects(_SMBBA, 2)
        self.writes_have_effects(_SMBHSTCFG, 1)
        self.writes_have_effects(_PMREGMISC, 1)
        config[0x5B] = 2  # DEVACTB, APMC_EN: SMM was set up already, so that firmware does not wait for it
        return config

    def leave_to_firmware(self, *, wakes: bool) -> None:
        """As the chip is after a reset: the ports are nowhere."""
        for register in _PMBA, _SMBBA:
            struct.pack_into("<I", self.config, register, 1)
        self.config[_PMREGMISC] = self.config[_SMBHSTCFG] = 0
        self.takes_effect()

    def takes_effect(self) -> None:
        (base,) = struct.unpack_from("<H", self.config, _PMBA)
        self._power_moved(base & -LENGTH if self.config[_PMREGMISC] & _DECODED else None)
        (base,) = struct.unpack_from("<H", self.config, _SMBBA)
        has_ports = self.config[_SMBHSTCFG] & _DECODED and self.config[_COMMAND] & 1
        self._smbus_moved(base & -smbus.LENGTH if has_ports else None, self.config[_SMBHSTCFG] & 0xE == _BY_IRQ)


def gpe0_port(chipset: Chipset) -> int:
    return BASE + chipset.gpe0


def rebased(tables: bytes, base: int, chipset: Chipset) -> bytes:
    """ACPI's tables, where the FADT has the ports from `base` on. The firmware that loads them makes the checksum."""
    data, at = bytearray(tables), tables.find(b"FACP")
    for offset, size, port in _FADT_PORTS if at >= 0 else ():
        place = base + (gpe0_port(chipset) if port is None else port) - BASE
        data[at + offset : at + offset + size] = place.to_bytes(size, "little")
    return bytes(data)
