"""The AHCI controller, an ICH9's by its identity, of six ports.

Source: Serial ATA AHCI 1.3.1, chapters 2 (configuration) and 3.1 (generic host control); Intel ICH9 data sheet, 15.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U32, DeviceState
from vmfs.devices.device import Port as BoardPort
from vmfs.devices.ide.drive import Drive
from vmfs.devices.pci import Bar, PciDevice, PciState
from vmfs.devices.sata.port import ABAR, FIRST, REGISTERS, SLOTS, AhciPort, PortState
from vmfs.devices.worker import Worker, Working
from vmfs.words.errors import Invalid

PORTS = 6
NAMES = tuple(f"sata{number}" for number in range(PORTS))
_SIZE = 0x1000
_CAP, _GHC, _IS, _PI, _VS, _CAP2 = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x24
# 64-bit addresses, queued commands, command list override, AHCI only, 6 Gb/s, slots, ports
_CAPABILITIES = 1 << 31 | 1 << 30 | 1 << 24 | 3 << 20 | 1 << 18 | SLOTS - 1 << 8 | PORTS - 1
_VERSION = 0x0001_0301
_HR, _IE, _AE = 1, 2, 1 << 31


class AhciState(DeviceState):
    """`interrupts`: IS; `enabled`: GHC.IE."""

    VERSION: ClassVar[int] = 2

    pci: PciState
    interrupts: U32
    enabled: bool
    ports: Annotated[tuple[PortState, ...], msgspec.Meta(min_length=PORTS, max_length=PORTS)]


class Ahci(Working, PciDevice[AhciState]):
    TYPE = "ahci"
    STATE = AhciState
    VENDOR, DEVICE, CLASS, REVISION = 0x8086, 0x2922, 0x010601, 2
    BARS = {ABAR: Bar("memory", _SIZE)}

    def __init__(self, board: BoardPort, name: str, slot: int, function: int = 0) -> None:
        self.function_number = function
        self.ports: tuple[AhciPort, ...] = ()
        super().__init__(board, name, slot)
        self.add_msi(1)
        self.chip = _chips.Ahci(board.bus, self.number, self.function)
        self.ports = tuple(AhciPort(self, number) for number in range(PORTS))

    # ---- drives

    def connect(self, drive: Drive[Any]) -> None:
        """Put it at the port that its name says. Invalid where another drive is."""
        port = self.ports[NAMES.index(drive.name)]
        if port.drive is not None:
            raise Invalid(f"there is a drive {drive.name} already")
        drive.is_serial = True
        drive.cable = port
        place = f"{self.slot:x},{self.function_number:x}" if self.function_number else f"{self.slot:x}"
        drive.boot_path = f"/pci@i0cf8/pci8086,2922@{place}/drive@{port.number:x}/disk@0"
        port.drive = drive
        port.clear()

    def disconnect(self, drive: Drive[Any]) -> None:
        port = self.ports[NAMES.index(drive.name)]
        port.drive = None
        port.renew_worker()  # the drive has ended it
        port.clear()

    @property
    def drives(self) -> list[Drive[Any]]:
        return [port.drive for port in self.ports if port.drive is not None]

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        value = self.chip.read(region, offset, size)
        if value is not None:
            return int(value)
        word = self._read(offset & ~3)
        if size == 8 and not offset & 4:
            word |= self._read(offset + 4) << 32
        return word >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def _read(self, offset: int) -> int:
        if offset >= FIRST:
            number, register = divmod(offset - FIRST, REGISTERS)
            return self.ports[number].read(register) if number < PORTS else 0
        interrupts, enabled = self.chip.all()
        if offset == _GHC:
            return _AE | (_IE if enabled else 0)
        return {_CAP: _CAPABILITIES, _IS: interrupts, _PI: (1 << PORTS) - 1, _VS: _VERSION}.get(offset, 0)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """Registers are written in words of 32 bits (3); 64 bits are two of them."""
        if size == 8:
            self.write(region, offset, 4, value & 0xFFFF_FFFF)
            self.write(region, offset + 4, 4, value >> 32)
            return
        if size != 4 or offset & 3 or self.chip.write(region, offset, size, value):
            return
        if offset >= FIRST:
            number, register = divmod(offset - FIRST, REGISTERS)
            if number < PORTS:
                self.ports[number].write(register, value)
        elif offset == _GHC:
            if value & _HR:
                self._reset_all()
            self.tell(self.chip.enable_all(bool(value & _IE) and not value & _HR))
        elif offset == _IS:
            self.tell(self.chip.clear(value))

    def tell(self, is_new: bool) -> None:
        """What the chip has said of an interrupt."""
        if is_new:
            self.counters["interrupts"] += 1

    def _reset_all(self) -> None:
        self.chip.set_all(0, False)
        for port in self.ports:
            port.settle()
            if port.drive is not None:
                port.drive.sign(0)
            port.clear()

    # ---- who works

    def all_workers(self) -> list[Worker]:
        return [port.worker for port in self.ports]

    def go_on(self) -> None:
        for port in self.ports:
            port.advance()

    # ---- life

    def reset(self) -> None:
        super().reset()
        self.settle_all()
        for port in self.ports:
            port.clear()
        self.chip.set_all(0, False)
        self.chip.enable_all(False)

    def save(self) -> AhciState:
        interrupts, enabled = self.chip.all()
        return AhciState(
            pci=self.save_pci(),
            interrupts=interrupts,
            enabled=enabled,
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
        self.chip.set_all(state.interrupts, state.enabled)
        self.set_irq(state.pci.pending)

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "drives": " ".join(drive.name for drive in self.drives) or "none"}

    def close(self) -> bool:
        return all([port.worker.close() for port in self.ports])

