"""Microwire: the serial EEPROM of 64 words that network cards have beside them, a 93C46.

Source: Microchip 93C46B data sheet, table 3-2 and chapter 3.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

WORDS = 64
_ADDRESS_BITS = 6
_COMMAND_BITS = 3 + _ADDRESS_BITS  # a start bit, an opcode and an address
_EXTENDED, _WRITE, _READ, _ERASE = range(4)


class EepromState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`data`: what it holds. `shifted`: bits that came since CS rose, `count` of them, from the start bit on; `out`: of
    a READ, how many bits have gone, of which the first is a zero, or -1; `pins`: CS, SK and DI as they were."""

    data: Annotated[bytes, msgspec.Meta(min_length=2 * WORDS, max_length=2 * WORDS)]
    shifted: Annotated[int, msgspec.Meta(ge=0, lt=1 << 25)] = 0
    count: Annotated[int, msgspec.Meta(ge=0, le=25)] = 0
    out: Annotated[int, msgspec.Meta(ge=-1, le=16 * WORDS)] = -1
    may_write: bool = False
    pins: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0


class Eeprom:
    """`do` is its data output. A write is done when CS falls, and takes no time."""

    def __init__(self, data: bytes) -> None:
        self.load(EepromState(data=data))

    def load(self, state: EepromState) -> None:
        self.data = bytearray(state.data)
        self._shifted, self._count, self._out = state.shifted, state.count, state.out
        self._may_write = state.may_write
        self._cs, self._sk, self._di = (bool(state.pins & bit) for bit in (4, 2, 1))

    def save(self) -> EepromState:
        return EepromState(
            data=bytes(self.data),
            shifted=self._shifted,
            count=self._count,
            out=self._out,
            may_write=self._may_write,
            pins=self._cs << 2 | self._sk << 1 | self._di,
        )

    def word(self, index: int) -> int:
        return int.from_bytes(self.data[2 * index : 2 * index + 2], "little")

    @property
    def do(self) -> bool:
        if self._out < 0:
            return True  # ready
        if not self._out:
            return False  # the dummy bit
        bit = 16 * (self._shifted & WORDS - 1) + self._out - 1
        return bool(self.word(bit >> 4 & WORDS - 1) >> 15 - (bit & 15) & 1)

    def drive(self, cs: bool, sk: bool, di: bool) -> None:
        """Its inputs are so now."""
        if not cs and self._cs:
            self._end()
        if not cs:
            self._shifted = self._count = 0
            self._out = -1
        elif sk and not self._sk:
            self._clock(di)
        self._cs, self._sk, self._di = cs, sk, di

    def _clock(self, di: bool) -> None:
        if self._out >= 0:
            self._out = self._out % (16 * WORDS) + 1  # on and on, word after word
            return
        if not self._count and not di:
            return  # no start bit yet
        if self._count < _COMMAND_BITS + 16:
            self._shifted, self._count = self._shifted << 1 | di, self._count + 1
        if self._count == _COMMAND_BITS and self._opcode() == _READ:
            self._out = 0

    def _opcode(self) -> int:
        return self._shifted >> self._count - 3 & 3

    def _end(self) -> None:
        """CS falls: what was asked for is done, where all of it has come."""
        if self._count < _COMMAND_BITS:
            return
        opcode = self._opcode()
        address = self._shifted >> self._count - _COMMAND_BITS & WORDS - 1
        whole, value = self._count == _COMMAND_BITS + 16, (self._shifted & 0xFFFF).to_bytes(2, "little")
        if opcode == _EXTENDED:
            which = address >> 4
            if which == 3:
                self._may_write = True
            elif which == 0:
                self._may_write = False
            elif self._may_write and (which == 2 or whole):  # erase all, write all
                self.data[:] = (b"\xff\xff" if which == 2 else value) * WORDS
        elif self._may_write and opcode == _ERASE:
            self.data[2 * address : 2 * address + 2] = b"\xff\xff"
        elif self._may_write and opcode == _WRITE and whole:
            self.data[2 * address : 2 * address + 2] = value
