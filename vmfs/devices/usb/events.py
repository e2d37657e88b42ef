"""An interrupter of xHCI and its event ring.

Source: eXtensible Host Controller Interface 1.1, chapters 4.9.4, 4.17 and 5.5.2.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Annotated

import msgspec

from vmfs.devices.device import U16, U32, U64, Port
from vmfs.devices.usb.rings import TRB, BadRing

SEGMENTS_MOST = 4  # as its exponent: 16
PENDING, ENABLED, BUSY = 1, 2, 8  # IMAN.IP, IMAN.IE, ERDP.EHB
WAITING_MOST = 1 << 10
_ROW = struct.Struct("<QHHI")
_IMAN, _IMOD, _ERSTSZ, _ERSTBA, _ERDP = 0x00, 0x04, 0x08, 0x10, 0x18
_LOW, _HIGH = 0xFFFF_FFFF, 0xFFFF_FFFF_0000_0000


class InterrupterState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Its registers; then where it writes next: `at`, with `left` entries of a segment before `segment`, or 0 and 0
    where the table was not looked at yet. `waiting`: events for which there is no room."""

    management: Annotated[int, msgspec.Meta(ge=0, le=PENDING | ENABLED)]
    moderation: U32
    segments: U16
    table: U64
    dequeue: U64
    at: U64
    left: U32
    segment: U16
    cycle: bool
    waiting: Annotated[tuple[Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)], ...],
                       msgspec.Meta(max_length=WAITING_MOST)]  # fmt: skip


class Interrupter:
    def __init__(self, board: Port) -> None:
        self._board = board
        self.clear()

    def clear(self) -> None:
        self.management = 0
        self.moderation = 4000
        self.segments = self.table = self.dequeue = 0
        self.waiting: deque[bytes] = deque()
        self._begin()

    def _begin(self) -> None:
        """The ring is a new one."""
        self.at = self.left = self.segment = 0
        self.cycle = True

    # ---- registers

    def read(self, offset: int) -> int:
        return {
            _IMAN: self.management, _IMOD: self.moderation, _ERSTSZ: self.segments,
            _ERSTBA: self.table & _LOW, _ERSTBA + 4: self.table >> 32,
            _ERDP: self.dequeue & _LOW, _ERDP + 4: self.dequeue >> 32,
        }.get(offset, 0)  # fmt: skip

    def write(self, offset: int, value: int) -> None:
        """Of the dequeue pointer the controller tells `acknowledged`."""
        if offset == _IMAN:
            self.management = self.management & PENDING & ~value | value & ENABLED
        elif offset == _IMOD:
            self.moderation = value
        elif offset == _ERSTSZ:
            self.segments = min(value & 0xFFFF, 1 << SEGMENTS_MOST)
        elif offset == _ERSTBA:
            self.table = self.table & _HIGH | value & ~0x3F
            self._begin()
        elif offset == _ERSTBA + 4:
            self.table = self.table & _LOW | value << 32
            self._begin()
        elif offset == _ERDP:
            busy = self.dequeue & BUSY & ~value
            self.dequeue = self.dequeue & _HIGH | value & ~BUSY | busy
        elif offset == _ERDP + 4:
            self.dequeue = self.dequeue & _LOW | value << 32

    def acknowledges(self, offset: int) -> bool:
        return offset in (_ERDP, _ERDP + 4)

    # ---- the ring

    @property
    def _end(self) -> int:
        """What the driver reads next."""
        return self.dequeue & ~0xF

    @property
    def has_unread(self) -> bool:
        return bool(self.left) and self.at != self._end

    def _enter(self, segment: int) -> None:
        """Go to the beginning of a segment. BadRing."""
        row = self.table + _ROW.size * segment
        if not self._board.is_ram(row, _ROW.size):
            raise BadRing
        base, size, _, _ = _ROW.unpack(self._board.dma_read(row, _ROW.size))
        if base & 0xF or not 16 <= size <= 4096 or not self._board.is_ram(base, TRB.size * size):
            raise BadRing
        self.at, self.left, self.segment = base, size, segment

    def post(self, event: bytes) -> bool:
        """Whether anything new is in the ring. BadRing. What there is no room for waits."""
        if not self.segments:
            return False
        if len(self.waiting) < WAITING_MOST:
            self.waiting.append(event)
        return self.go_on()

    def go_on(self) -> bool:
        """As `post`, of what waits."""
        is_new = False
        while self.waiting and self.segments:
            if not self.left:
                self._enter(0)
            before = self.at, self.left, self.segment, self.cycle
            at, cycle = self.at, self.cycle
            self.at += TRB.size
            self.left -= 1
            if not self.left:
                following = self.segment + 1
                self.cycle ^= following >= self.segments
                self._enter(following if following < self.segments else 0)
            if self.at == self._end:  # it would be empty again
                self.at, self.left, self.segment, self.cycle = before
                break
            parameter, status, control = TRB.unpack(self.waiting.popleft())
            self._board.dma_write(at, TRB.pack(parameter, status, control & ~1 | cycle))
            is_new = True
        return is_new

    # ---- life

    def save(self) -> InterrupterState:
        values = {name: getattr(self, name) for name in InterrupterState.__struct_fields__}
        return InterrupterState(**values | {"waiting": tuple(self.waiting)})

    def may_be(self, state: InterrupterState) -> bool:
        return not (
            state.segments > 1 << SEGMENTS_MOST or state.table & 0x3F or state.at & 0xF
            or (state.left and not self._board.is_ram(state.at, TRB.size * state.left))
        )  # fmt: skip

    def load(self, state: InterrupterState) -> None:
        for name in InterrupterState.__struct_fields__:
            setattr(self, name, getattr(state, name))
        self.waiting = deque(state.waiting)
