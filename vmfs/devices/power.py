"""ACPI's fixed hardware: the PM timer, PM1 event and control blocks. A guest that sleeps in S5 has powered off.

S5 is sleep type 0, as on a PIIX4 (and QEMU's and Bochs' PCs): SeaBIOS and small kernels write 2000h to port 604h
without a look at the tables.

Source: ACPI Specification 6.4, chapters 4.8.3 (PM1 event, control) and 4.8.3.3 (timer).
"""

from __future__ import annotations

import struct

from vmfs.devices.device import U16, DeviceState, Port, QuietDevice, Window
from vmfs.devices.pci import PlainPciDevice
from vmfs.devices.timers import Timer

PM1_EVENT, PM1_CONTROL, PM_TIMER, SCI = 0x600, 0x604, 0x608, 9
FREQUENCY = 3_579_545  # Hz
_HALF = 23  # the bit of the PM timer of which a change is an event
S5 = 0  # SLP_TYP in the tables' \_S5

_POWER_BUTTON, _TIMER = 0x100, 1
_SCI_EN, _SLP_TYP, _SLP_EN = 1, 10, 0x2000


class PowerState(DeviceState):
    status: U16
    enable: U16
    control: U16


class Power(QuietDevice[PowerState]):
    """Region 0: PM1a event; 1: PM1a control; 2: the timer, of 24 bits."""

    TYPE = "acpi-pm"
    STATE = PowerState
    irq = SCI

    def __init__(self, board: Port, name: str) -> None:
        super().__init__(board, name)
        self._timer: Timer | None = None
        self._halves = 0  # of the PM timer's rounds, that TMR_STS was set for
        self.reset()

    def windows(self) -> tuple[Window, ...]:
        return (
            Window("port", PM1_EVENT, 4, 0),
            Window("port", PM1_CONTROL, 2, 1),
            Window("port", PM_TIMER, 4, 2),
        )

    def reset(self) -> None:
        self.status = self.enable = 0
        self.control = _SCI_EN
        self._halves = self._ticks() >> _HALF
        self._update()

    def press_button(self) -> None:
        """The power button, by which a guest is asked to shut down."""
        with self.board.lock:
            self.status |= _POWER_BUTTON
            self._update()

    def _ticks(self) -> int:
        return self.board.now() * FREQUENCY // 1_000_000_000

    def _update(self) -> None:
        """TMR_STS is set when bit 23 of the PM timer changes (4.8.3.3); be called for that where it is an interrupt."""
        halves = self._ticks() >> _HALF
        if halves != self._halves:
            self._halves = halves
            self.status |= _TIMER
        self.set_irq(bool(self.status & self.enable & (_POWER_BUTTON | _TIMER)))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.enable & _TIMER and not self.status & _TIMER:
            when = -(-(halves + 1 << _HALF) * 1_000_000_000 // FREQUENCY)
            self._timer = self.board.schedule(when, self._update)

    def time_shifted(self, by: int) -> None:
        self._halves = self._ticks() >> _HALF

    def read(self, region: int, offset: int, size: int) -> int:
        if region == 0:
            self._update()
            value = self.status | self.enable << 16
        elif region == 1:
            value = self.control
        else:
            value = self._ticks() & 0xFF_FFFF
        return value >> 8 * offset

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        value <<= 8 * offset
        mask = ((1 << 8 * size) - 1) << 8 * offset
        if region == 0:
            self._update()
            self.status &= ~(value & mask) & 0xFFFF
            if mask >> 16:
                self.enable = (self.enable & ~(mask >> 16) | value >> 16) & 0xFFFF
            self._update()
        elif region == 1:
            new = (self.control & ~mask | value & mask) & 0xFFFF
            self.control = new & ~_SLP_EN
            if new & _SLP_EN and new >> _SLP_TYP & 7 == S5:
                self.board.stop("poweroff")

    def save(self) -> PowerState:
        self._update()
        return PowerState(status=self.status, enable=self.enable, control=self.control)

    def load(self, state: PowerState) -> None:
        self.status, self.enable, self.control = state.status, state.enable, state.control
        self._halves = self._ticks() >> _HALF
        self._update()


class PowerFunction(PlainPciDevice):
    """The PCI function of a PIIX4 that says where these ports are: SeaBIOS looks there for where its APM powers off.

    Source: Intel 82371AB (PIIX4) data sheet, chapter 7.1. The base is fixed, and there is neither an SMBus nor SMM.
    """

    TYPE = "pci-acpi-pm"
    VENDOR, DEVICE, CLASS, REVISION = 0x8086, 0x7113, 0x068000, 3
    INTERRUPT = False

    def _identity(self) -> bytearray:
        config = super()._identity()
        struct.pack_into("<I", config, 0x40, PM1_EVENT | 1)  # PMBA: I/O space
        config[0x80] = 1  # PMREGMISC: decoded
        config[0x5B] = 2  # DEVACTB, APMC_EN: SMM was set up already, so that firmware does not wait for it
        return config
