"""The AHCI controller, an ICH9's by its identity, of six ports.

Source: Serial ATA AHCI 1.3.1, chapters 2 (configuration) and 3.1 (generic host control); Intel ICH9 data sheet, 15.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from vmfs.devices.device import U32, DeviceState
from vmfs.devices.device import Port as BoardPort
from vmfs.devices.ide.drive import Drive
from vmfs.devices.pci import Bar, PciDevice, PciState
from vmfs.devices.sata.port import REGISTERS, SLOTS, AhciPort, PortState
from vmfs.words.errors import Invalid

PORTS = 6
NAMES = tuple(f"sata{number}" for number in range(PORTS))
ABAR = 5
_SIZE = 0x1000
_CAP, _GHC, _IS, _PI, _VS, _CAP2 = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x24
# 64-bit addresses, command list override, AHCI only, 6 Gb/s, slots, ports
_CAPABILITIES = 1 << 31 | 1 << 24 | 3 << 20 | 1 << 18 | SLOTS - 1 << 8 | PORTS - 1
_VERSION = 0x0001_0301
_HR, _IE, _AE = 1, 2, 1 << 31
_FIRST_PORT = 0x100


class AhciState(DeviceState):
    """`interrupts`: IS; `enabled`: GHC.IE."""

    pci: PciState
    interrupts: U32
    enabled: bool
    ports: Annotated[tuple[PortState, ...], msgspec.Meta(min_length=PORTS, max_length=PORTS)]


class Ahci(PciDevice[AhciState]):
    TYPE = "ahci"
    STATE = AhciState
    VENDOR, DEVICE, CLASS, REVISION = 0x8086, 0x2922, 0x010601, 2
    BARS = {ABAR: Bar("memory", _SIZE)}
    works = True

    def __init__(self, board: BoardPort, name: str, slot: int) -> None:
        self.ports: tuple[AhciPort, ...] = ()
        self.interrupts = 0
        self.enabled = False
        self._is_asleep = False
        self._is_running = True
        super().__init__(board, name, slot)
        self.add_msi(1)
        self.ports = tuple(AhciPort(self, number) for number in range(PORTS))

    # ---- drives

    def connect(self, drive: Drive[Any]) -> None:
        """Put it at the port that its name says. Invalid where another drive is."""
        port = self.ports[NAMES.index(drive.name)]
        if port.drive is not None:
            raise Invalid(f"there is a drive {drive.name} already")
        drive.is_serial = True
        drive.cable = port
        drive.boot_path = f"/pci@i0cf8/pci8086,2922@{self.slot:x}/drive@{port.number:x}/disk@0"
        port.drive = drive
        port.clear()

    def disconnect(self, drive: Drive[Any]) -> None:
        port = self.ports[NAMES.index(drive.name)]
        port.drive = None
        port.clear()

    @property
    def drives(self) -> list[Drive[Any]]:
        return [port.drive for port in self.ports if port.drive is not None]

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        word = self._read(offset & ~3)
        if size == 8 and not offset & 4:
            word |= self._read(offset + 4) << 32
        return word >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def _read(self, offset: int) -> int:
        if offset >= _FIRST_PORT:
            number, register = divmod(offset - _FIRST_PORT, REGISTERS)
            return self.ports[number].read(register) if number < PORTS else 0
        if offset == _GHC:
            return _AE | (_IE if self.enabled else 0)
        return {_CAP: _CAPABILITIES, _IS: self.interrupts, _PI: (1 << PORTS) - 1, _VS: _VERSION}.get(offset, 0)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """Registers are written in words of 32 bits (3); 64 bits are two of them."""
        if size == 8:
            self.write(region, offset, 4, value & 0xFFFF_FFFF)
            self.write(region, offset + 4, 4, value >> 32)
            return
        if size != 4 or offset & 3:
            return
        if offset >= _FIRST_PORT:
            number, register = divmod(offset - _FIRST_PORT, REGISTERS)
            if number < PORTS:
                self.ports[number].write(register, value)
        elif offset == _GHC:
            self.enabled = bool(value & _IE)
            if value & _HR:
                self._reset_all()
            self.drive_line()
        elif offset == _IS:
            self.interrupts &= ~value
            self.drive_line()

    def drive_line(self) -> None:
        raised = 0
        for port in self.ports:
            if port.read(_PORT_IS) & port.enable:
                raised |= 1 << port.number
        is_new = bool(raised & ~self.interrupts)
        self.interrupts |= raised
        level = self.enabled and bool(self.interrupts)
        if level and is_new:
            self.counters["interrupts"] += 1
            self.signal(0)
        self.set_irq(level)

    def _reset_all(self) -> None:
        self.interrupts, self.enabled = 0, False
        for port in self.ports:
            port.settle()
            if port.drive is not None:
                port.drive.sign(0)
            port.clear()

    # ---- who works

    @property
    def is_held(self) -> bool:
        return self._is_asleep or not self._is_running

    def run_begins(self) -> None:
        self._is_running = True
        self._go_on()

    def run_ends(self) -> None:
        self._is_running = False
        self._hold()

    def sleep(self) -> None:
        self._is_asleep = True
        self._hold()

    def wake(self) -> None:
        self._is_asleep = False
        self._go_on()

    def _hold(self) -> None:
        for port in self.ports:
            port.worker.hold()

    def _go_on(self) -> None:
        for port in self.ports:
            port.advance()

    # ---- life

    def reset(self) -> None:
        super().reset()
        for port in self.ports:
            port.worker.hold()
            port.clear()
        self.interrupts, self.enabled = 0, False
        self.drive_line()

    def save(self) -> AhciState:
        return AhciState(
            pci=self.save_pci(),
            interrupts=self.interrupts,
            enabled=self.enabled,
            ports=tuple(port.save() for port in self.ports),
        )

    def check(self, state: AhciState) -> None:
        self.check_pci(state.pci)
        if state.interrupts >> PORTS:
            raise Invalid(f"{self.name}: it has {PORTS} ports")
        for port, its in zip(self.ports, state.ports, strict=True):
            if not port.may_be(its):
                raise Invalid(f"{self.name}: port {port.number} cannot be so")

    def load(self, state: AhciState) -> None:
        self.load_pci(state.pci)
        for port, its in zip(self.ports, state.ports, strict=True):
            port.load(its)
        self.interrupts, self.enabled = state.interrupts, state.enabled
        self.set_irq(state.pci.pending)

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "drives": " ".join(drive.name for drive in self.drives) or "none"}

    def close(self) -> bool:
        return all([port.worker.close() for port in self.ports])


_PORT_IS = 0x10
