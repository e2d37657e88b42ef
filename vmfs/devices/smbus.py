"""The SMBus host of a PIIX4 or an ICH9, and the EEPROMs of memory modules (SPD) on it.

A transaction takes no time: it is over when START has been written. There is no other master on the bus, so the
slave's registers are kept and nothing comes by them.

The modules are such of DDR3 as make up the machine's RAM, where that can be: one to four of 64 MiB to 32 GiB, each a
power of two. Each has a 24C02 at 50h and so on, which a guest may write; what it wrote is there as long as the machine.

Source: Intel 82371AB (PIIX4) data sheet, 7.3 (SMBus); Intel ICH9 data sheet, 19.2; System
Management Bus 1.1; JEDEC 21-C, 4.1.2.11 (SPD of DDR3); Microchip 24C02C data sheet.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Annotated

import msgspec

from vmfs.devices.device import U8, DeviceState, Port, QuietDevice, Window

BASE, LENGTH, IRQ = 0x700, 16, 9
FIRST_MODULE, MODULES_MOST = 0x50, 4
_STATUS, _SLAVE_STATUS, _CONTROL, _COMMAND, _ADDRESS, _DATA0, _DATA1, _BLOCK, _SLAVE = range(9)
_AUXILIARY = 0x0D  # of an ICH9
_DONE, _NO_ANSWER, _BUS_ERROR, _KILLED = 0x02, 0x04, 0x08, 0x10
_INTERRUPTS, _KILL, _PROTOCOL, _START = 0x01, 0x02, 0x1C, 0x40
_QUICK, _BYTE, _BYTE_DATA, _WORD_DATA, _BLOCK_DATA = 0, 1, 2, 3, 5
_BLOCK_MOST = 32
_PAGE, _EEPROM = 8, 256

Contents = Annotated[bytes, msgspec.Meta(min_length=_EEPROM, max_length=_EEPROM)]


class SmbusState(DeviceState):
    """`block`: what goes by the block data register, of which `index` is next; `modules`: contents and the next address
    of each EEPROM."""

    status: U8
    control: U8
    command: U8
    address: U8
    data: tuple[U8, U8]
    block: Annotated[bytes, msgspec.Meta(min_length=_BLOCK_MOST, max_length=_BLOCK_MOST)]
    index: Annotated[int, msgspec.Meta(ge=0, lt=_BLOCK_MOST)]
    slave: Annotated[bytes, msgspec.Meta(min_length=LENGTH - _SLAVE, max_length=LENGTH - _SLAVE)]
    modules: Annotated[tuple[tuple[Contents, U8], ...], msgspec.Meta(max_length=MODULES_MOST)]


class _Refused(Exception):
    """Nobody acknowledges."""


class Eeprom:
    """A 24C02, whose pages have 8 bytes."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data = bytearray(data)
        self.at = at

    def write(self, data: bytes) -> None:
        """The first byte is an address."""
        if data:
            self.at = data[0]
        for byte in data[1:]:
            self.data[self.at] = byte
            self.at = self.at & -_PAGE | (self.at + 1) % _PAGE

    def read(self, count: int) -> bytes:
        found = bytes(self.data[(self.at + n) % _EEPROM] for n in range(count))
        self.at = (self.at + count) % _EEPROM
        return found


class Smbus(QuietDevice[SmbusState]):
    TYPE = "smbus"
    STATE = SmbusState
    IS_LATE = True
    irq = IRQ

    def __init__(self, board: Port, name: str) -> None:
        super().__init__(board, name)
        self.base: int | None = BASE
        self._by_irq = True
        self.drive_line = self.set_irq
        self.length, self._kept = LENGTH, range(_SLAVE, LENGTH)
        self.modules: list[Eeprom] = []
        self._clear()

    def _clear(self) -> None:
        self.status = self.control = self.command = self.address = self.index = 0
        self.data = [0, 0]
        self.block = bytearray(_BLOCK_MOST)
        self.slave = bytearray(LENGTH - _SLAVE)

    def describe_memory(self, size: int) -> None:
        self.modules = [Eeprom(spd(one, number)) for number, one in enumerate(module_sizes(size))]

    def be_of_an_ich9(self, drive_line: Callable[[bool], None]) -> None:
        """Its line is INTA of its function. It has more registers, of which a packet error code, an address of its own
        and the way of block transfers (which are all by the buffer) are kept."""
        self.drive_line = drive_line
        self.length, self._kept = 2 * LENGTH, (_SLAVE, _SLAVE + 1, _AUXILIARY)

    def windows(self) -> tuple[Window, ...]:
        return () if self.base is None else (Window("port", self.base, self.length),)

    def place(self, base: int | None, by_irq: bool) -> None:
        """Have its ports there, or nowhere; `by_irq`: it has IRQ 9, and not the SMI that there is none of."""
        self._by_irq = by_irq
        if base != self.base:
            self.base = base
            self.board.rewire(self)
        self._drive()

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        return int.from_bytes(bytes(self._read(offset + n) for n in range(size)), "little")

    def _read(self, offset: int) -> int:
        if offset == _CONTROL:
            self.index = 0
            return self.control
        if offset == _BLOCK:
            value = self.block[self.index]
            self.index = (self.index + 1) % _BLOCK_MOST
            return value
        if offset >= _SLAVE:
            return self.slave[offset - _SLAVE] if offset in self._kept else 0
        return {
            _STATUS: self.status, _COMMAND: self.command, _ADDRESS: self.address,
            _DATA0: self.data[0], _DATA1: self.data[1],
        }.get(offset, 0)  # fmt: skip

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            self._write(at, byte)

    def _write(self, offset: int, value: int) -> None:
        if offset == _STATUS:
            self.status &= ~value
            self._drive()
        elif offset == _CONTROL:
            self.control = value & (_INTERRUPTS | _PROTOCOL)
            if value & _KILL:
                self.status |= _KILLED
            elif value & _START:
                self._transact()
            self._drive()
        elif offset == _COMMAND:
            self.command = value
        elif offset == _ADDRESS:
            self.address = value
        elif offset in (_DATA0, _DATA1):
            self.data[offset - _DATA0] = value
        elif offset == _BLOCK:
            self.block[self.index] = value
            self.index = (self.index + 1) % _BLOCK_MOST
        elif offset in self._kept:
            self.slave[offset - _SLAVE] = value

    def _drive(self) -> None:
        self.drive_line(self._by_irq and bool(self.control & _INTERRUPTS and self.status))

    # ---- the bus

    def _target(self) -> Eeprom:
        number = (self.address >> 1) - FIRST_MODULE
        if not 0 <= number < len(self.modules):
            raise _Refused
        return self.modules[number]

    def _transact(self) -> None:
        self.counters["transactions"] += 1
        self.index = 0
        try:
            self.status |= self._move(self._target())
        except _Refused:
            self.counters["unanswered"] += 1
            self.status |= _NO_ANSWER

    def _move(self, target: Eeprom) -> int:
        """The status."""
        protocol, reads = (self.control & _PROTOCOL) >> 2, self.address & 1
        if protocol == _QUICK:
            return _DONE
        if protocol == _BYTE:
            if reads:
                self.data[0] = target.read(1)[0]
            else:
                target.write(bytes((self.command,)))
        elif protocol in (_BYTE_DATA, _WORD_DATA):
            count = 1 if protocol == _BYTE_DATA else 2
            target.write(bytes((self.command, *(() if reads else self.data[:count]))))
            if reads:
                self.data[:count] = target.read(count)
        elif protocol == _BLOCK_DATA:
            target.write(bytes((self.command,)))
            if reads:
                self.data[0] = target.read(1)[0]
            count = self.data[0]
            if not 1 <= count <= _BLOCK_MOST:
                return _BUS_ERROR
            if reads:
                self.block[:count] = target.read(count)
            else:
                target.write(bytes((self.command, count, *self.block[:count])))
        else:  # reserved
            return _BUS_ERROR
        return _DONE

    # ---- life

    def reset(self) -> None:
        """What is in the EEPROMs stays."""
        self._clear()
        self._drive()

    def save(self) -> SmbusState:
        return SmbusState(
            status=self.status,
            control=self.control,
            command=self.command,
            address=self.address,
            data=(self.data[0], self.data[1]),
            block=bytes(self.block),
            index=self.index,
            slave=bytes(self.slave),
            modules=tuple((bytes(one.data), one.at) for one in self.modules),
        )

    def load(self, state: SmbusState) -> None:
        self.status, self.control, self.command = state.status, state.control, state.command
        self.address, self.data, self.index = state.address, list(state.data), state.index
        self.block, self.slave = bytearray(state.block), bytearray(state.slave)
        self.modules = [Eeprom(data, at) for data, at in state.modules]
        self._drive()

    def describe(self) -> dict[str, str]:
        addresses = " ".join(f"{FIRST_MODULE + number:#x}" for number in range(len(self.modules)))
        return {**super().describe(), "eeproms": addresses or "none"}


# ---- memory modules

_LEAST, _LARGEST = 64 << 20, 32 << 30
_KIND, _REVISION, _CRC_OF = 0x0B, 0x10, 117  # DDR3; bytes that the checksum is of
_DENSEST = 6  # 16 Gbit


def module_sizes(size: int) -> list[int]:
    """Of modules that are so much RAM together, the largest first; none where that cannot be."""
    found: list[int] = []
    while size and len(found) < MODULES_MOST:
        one = min(1 << size.bit_length() - 1, _LARGEST)
        found.append(one)
        size -= one
    return [] if size or any(one < _LEAST for one in found) else found


def spd(size: int, number: int) -> bytes:
    """What the EEPROM of a module says: DDR3-1600 of one or two ranks, chips of 32, 16 or 8 bits."""
    data = bytearray(_EEPROM)
    # Eight chips of 8 bits have 256 MiB << density; four of 16 bits half of it, two of 32 bits a quarter.
    power = (size // _LEAST).bit_length() - 1
    width, density, ranks = max(3 - power, 1), max(power - 2, 0), 1
    if density > _DENSEST:
        density, ranks = _DENSEST, 2
    data[:20] = bytes((
        0x92, _REVISION, _KIND, 2, density, 0x11, 0, ranks - 1 << 3 | width, 3, 0x11, 1, 8, 10, 0, 0xFC, 0, 105, 120,
        105, 48,
    ))  # fmt: skip
    data[117:128] = struct.pack("<HBHIH", 0x0080, number, 0, number + 1, 0)
    data[128:146] = b"vmfs memory".ljust(18)
    crc = 0
    for byte in data[:_CRC_OF]:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ (0x1021 if crc & 0x8000 else 0)) & 0xFFFF
    data[126:128] = struct.pack("<H", crc)
    return bytes(data)
