"""What a Q35 has in place of an i440FX and a PIIX: the MCH, and of the ICH9 the LPC bridge and the SMBus function.

Left out: SMM, so SMRAM is locked and closed from the beginning, and SMI_EN says that SMIs were set up already; shadow
RAM is always RAM, whatever the PAM registers say; the TCO timer, which GCS says is not to reboot; GPIO; the ICH9's own
routes of interrupts (D25IR to D31IR), which can only be read.

Source: Intel 3 Series Express Chipset (MCH) data sheet, 5.1 (host bridge); Intel ICH9 data sheet, 10.1 (chipset
configuration), 13.1 (LPC), 13.8 (power management) and 19 (SMBus); PCI Express 3.0, 7.2.2 (ECAM).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmfs.devices.chipset import Q35
from vmfs.devices.device import Port, Window
from vmfs.devices.isa import Router
from vmfs.devices.pci import Bar, HostBridge, PlainPciDevice
from vmfs.devices.power import BASE
from vmfs.devices.smbus import Smbus

# MCH
_PCIEXBAR, _ENABLED = 0x60, 1
_ECAM_SIZES = (1 << 28, 1 << 27, 1 << 26)  # by PCIEXBAR's length, of which 3 is reserved
_ADDRESS_MOST = 1 << 36
_PAM, _PAMS, _SMRAM, _ESMRAMC = 0x90, 7, 0x9D, 0x9E
_LOCKED = 0x12  # D_LCK, and the segment A0000h

# LPC
_PMBASE, _ACPI_CNTL, _ACPI_EN, _RCBA = 0x40, 0x44, 0x80, 0xF0
_GEN_PMCON_1, _GEN_PMCON_3 = 0xA0, 0xA4
_SMI, _SMI_EN, _APMC_EN, _CHIPSET = 1, 0x30, 0x20, 2  # a region and its port, and the region of RCBA
_CHIPSET_SIZE = 0x4000
_CHIPSET_REGISTERS = {
    0x3100: 0x0000_1100,  # D31IP: SMBus and SATA have INTA
    **dict.fromkeys((0x3140, 0x3144, 0x3148, 0x3150), 0x3210),  # DnnIR: INTA to INTD are PIRQA to PIRQD
    **dict.fromkeys((0x3142, 0x3146, 0x314C), 0x3210),
    0x31FF: 0x01,  # OIC: there is the I/O APIC
    0x3404: 0x80,  # HPTC: the HPET is at FED00000h
    0x3410: 0x20,  # GCS: no reboot
}

_HOSTC, _HST_EN = 0x40, 1
_SMBUS_BAR = 4


class Mch(PlainPciDevice):
    """Slot 0, with the register that says where the configuration spaces are in memory."""

    TYPE = "pci-host-bridge"
    VENDOR, DEVICE, CLASS, REVISION = 0x8086, 0x29C0, 0x060000, 2
    SUBSYSTEM = 0x1AF4, 0x1100  # as the i440FX's
    INTERRUPT = False

    def __init__(self, board: Port, name: str, slot: int, host: HostBridge) -> None:
        self._host = host
        super().__init__(board, name, slot)

    def _identity(self) -> bytearray:
        config = super()._identity()
        struct.pack_into("<Q", config, _PCIEXBAR, Q35.ecam | _ENABLED)
        self._mask[_PCIEXBAR : _PCIEXBAR + 8] = struct.pack("<Q", (_ADDRESS_MOST - _ECAM_SIZES[-1]) | 7)
        self._mask[_PAM : _PAM + _PAMS] = bytes((0x30, *(0x33,) * (_PAMS - 1)))
        config[_SMRAM], config[_ESMRAMC] = _LOCKED, 0x38
        self.writes_have_effects(_PCIEXBAR, 8)
        return config

    def leave_to_firmware(self, *, wakes: bool) -> None:
        """SeaBIOS that wakes a system uses the memory before it says where that is."""
        if not wakes:
            struct.pack_into("<Q", self.config, _PCIEXBAR, 0)
            self.takes_effect()

    def takes_effect(self) -> None:
        (value,) = struct.unpack_from("<Q", self.config, _PCIEXBAR)
        length = value >> 1 & 3
        if not value & _ENABLED or length == len(_ECAM_SIZES):
            self._host.place_ecam(None, 0)
        else:
            size = _ECAM_SIZES[length]
            self._host.place_ecam(value & -size, size)


class Lpc(Router):
    """The LPC bridge: the router, and where ACPI's hardware and the chipset's own registers are."""

    TYPE = "pci-isa-bridge"
    VENDOR, DEVICE = Q35.isa_id
    CLASS, REVISION = 0x060100, 2

    def __init__(self, board: Port, name: str, slot: int, moved: Callable[[int | None], None]) -> None:
        self._power_moved = moved
        super().__init__(board, name, slot)

    def _identity(self) -> bytearray:
        config = super()._identity()
        struct.pack_into("<I", config, _PMBASE, BASE | 1)
        self._mask[_PMBASE : _PMBASE + 2] = struct.pack("<H", -Q35.power_length & 0xFFFF)
        config[_ACPI_CNTL] = self._mask[_ACPI_CNTL] = _ACPI_EN
        self._mask[_RCBA : _RCBA + 4] = struct.pack("<I", -_CHIPSET_SIZE & 0xFFFF_FFFF | _ENABLED)
        self._mask[_GEN_PMCON_1] = 0x03  # how often there would be periodic SMIs
        self._mask[_GEN_PMCON_3] = 0x01  # whether it stays off after a power failure
        for at, length in ((_PMBASE, 2), (_ACPI_CNTL, 1), (_RCBA, 4)):
            self.writes_have_effects(at, length)
        return config

    def leave_to_firmware(self, *, wakes: bool) -> None:
        struct.pack_into("<I", self.config, _PMBASE, 1)
        self.config[_ACPI_CNTL] = 0
        self._place()

    def windows(self) -> tuple[Window, ...]:
        found = []
        base = self._power_base
        if base is not None:
            found.append(Window("port", base + _SMI_EN, 8, _SMI))
        (rcba,) = struct.unpack_from("<I", self.config, _RCBA)
        if rcba & _ENABLED and rcba >= _CHIPSET_SIZE:
            found.append(Window("memory", rcba & -_CHIPSET_SIZE, _CHIPSET_SIZE, _CHIPSET))
        return tuple(found)

    @property
    def _power_base(self) -> int | None:
        (base,) = struct.unpack_from("<H", self.config, _PMBASE)
        base &= -Q35.power_length
        return base if base and self.config[_ACPI_CNTL] & _ACPI_EN else None

    def read(self, region: int, offset: int, size: int) -> int:
        registers = {0: _APMC_EN} if region == _SMI else _CHIPSET_REGISTERS
        value = 0
        for at in range(offset, offset + size):
            first = next((one for one in (at, at - 1, at - 2, at - 3) if one in registers), None)
            if first is not None:
                value |= (registers[first] >> 8 * (at - first) & 0xFF) << 8 * (at - offset)
        return value

    def takes_effect(self) -> None:
        super().takes_effect()
        self._place()

    def _place(self) -> None:
        self._config_changed()
        self._power_moved(self._power_base)


class SmbusFunction(PlainPciDevice):
    """Where the SMBus has its ports, and its interrupt."""

    TYPE = "pci-smbus"
    VENDOR, DEVICE, CLASS, REVISION = 0x8086, 0x2930, 0x0C0500, 2
    BARS = {_SMBUS_BAR: Bar("port", 32)}
    function_number = 3

    def __init__(self, board: Port, name: str, slot: int, smbus: Smbus) -> None:
        self._smbus = smbus
        super().__init__(board, name, slot)
        smbus.be_of_an_ich9(self.set_irq)

    def _identity(self) -> bytearray:
        config = super()._identity()
        config[_HOSTC] = self._mask[_HOSTC] = _HST_EN
        self.writes_have_effects(_HOSTC, 1)
        return config

    def leave_to_firmware(self, *, wakes: bool) -> None:
        self.config[_HOSTC] = 0
        self.takes_effect()

    def windows(self) -> tuple[Window, ...]:
        return ()  # the ports are the SMBus's

    def takes_effect(self) -> None:
        base = next((window.start for window in super().windows()), None)
        self._smbus.place(base if self.config[_HOSTC] & _HST_EN else None, True)
