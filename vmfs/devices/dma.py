"""Two 8237A DMA controllers, cascaded as in a PC/AT, and their page registers. Channels 0 to 3 move bytes, 5 to 7
words.

A device that has data for a channel, or wants some, calls `to_memory` or `from_memory`; all of it is moved at once.
Left out: memory to memory, and what is of timing (compressed, extended write, priority). Pages are of 64 KiB (128 KiB
for words), in which an address wraps. What is not RAM reads as ones and is not written.

Source: Intel 8237A data sheet; IBM PC AT Technical Reference (ports, page registers).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vmfs.devices.device import U8, U16, DeviceState, Port, QuietDevice, Window
from vmfs.words.errors import Invalid

_PAGES = {0x87: 0, 0x83: 1, 0x81: 2, 0x82: 3, 0x8B: 5, 0x89: 6, 0x8A: 7, 0x8F: 4}  # port: channel; 4 is the refresh
_FIRST_PAGE, _PAGE_COUNT = 0x81, 15  # port 80h is not claimed: it is where codes of progress go
_COMMAND, _REQUEST, _MASK, _MODE, _FLIP, _CLEAR, _MASK_CLEAR, _MASK_ALL = range(8, 16)
_DISABLED = 4
_VERIFY, _TO_MEMORY, _FROM_MEMORY = 0, 1, 2
_AUTOMATIC, _DOWN, _CASCADE = 0x10, 0x20, 0xC0


class ChannelState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    base_address: U16
    base_count: U16
    address: U16
    count: U16
    mode: U8


class ControllerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`upper`: the flip-flop, whether a register's upper byte comes next; `done`: the bits of terminal counts."""

    channels: tuple[ChannelState, ChannelState, ChannelState, ChannelState]
    command: U8
    mask: Annotated[int, msgspec.Meta(ge=0, le=15)]
    request: Annotated[int, msgspec.Meta(ge=0, le=15)]
    done: Annotated[int, msgspec.Meta(ge=0, le=15)]
    upper: bool


class DmaState(DeviceState):
    controllers: tuple[ControllerState, ControllerState]
    pages: Annotated[bytes, msgspec.Meta(min_length=_PAGE_COUNT, max_length=_PAGE_COUNT)]


class _Channel:
    def __init__(self) -> None:
        self.base_address = self.base_count = self.address = self.count = self.mode = 0


class _Controller:
    def __init__(self) -> None:
        self.channels = [_Channel() for _ in range(4)]
        self.clear()

    def clear(self) -> None:
        """Master clear, as a reset."""
        self.command = self.request = self.done = 0
        self.mask = 0xF
        self.upper = False

    def read(self, register: int) -> int:
        if register < 8:
            channel = self.channels[register >> 1]
            value = channel.count if register & 1 else channel.address
            value = value >> 8 if self.upper else value & 0xFF
            self.upper = not self.upper
            return value
        if register == _COMMAND:
            status, self.done = self.done | self.request << 4, 0
            return status
        if register == _MASK_ALL:
            return self.mask | 0xF0
        return 0  # the temporary register, and what cannot be read

    def write(self, register: int, value: int) -> None:
        bit = 1 << (value & 3)
        if register < 8:
            self._set(self.channels[register >> 1], register & 1, value)
        elif register == _COMMAND:
            self.command = value
        elif register == _REQUEST:
            self.request = self.request & ~bit | (bit if value & 4 else 0)
        elif register == _MASK:
            self.mask = self.mask & ~bit | (bit if value & 4 else 0)
        elif register == _MODE:
            self.channels[value & 3].mode = value
        elif register == _FLIP:
            self.upper = False
        elif register == _CLEAR:
            self.clear()
        elif register == _MASK_CLEAR:
            self.mask = 0
        else:
            self.mask = value & 0xF

    def _set(self, channel: _Channel, is_count: int, value: int) -> None:
        base = channel.base_count if is_count else channel.base_address
        base = value << 8 | base & 0xFF if self.upper else base & 0xFF00 | value
        self.upper = not self.upper
        if is_count:
            channel.base_count = channel.count = base
        else:
            channel.base_address = channel.address = base


class Dma(QuietDevice[DmaState]):
    """Regions 0 and 1: the controllers, 2: the page registers."""

    TYPE = "dma"
    STATE = DmaState

    def __init__(self, board: Port, name: str) -> None:
        super().__init__(board, name)
        self.controllers = _Controller(), _Controller()
        self.pages = bytearray(_PAGE_COUNT)
        self.reset()

    def windows(self) -> tuple[Window, ...]:
        return Window("port", 0, 16, 0), Window("port", 0xC0, 32, 1), Window("port", _FIRST_PAGE, _PAGE_COUNT, 2)

    def read(self, region: int, offset: int, size: int) -> int:
        if region == 2:
            return self.pages[offset]
        return self.controllers[region].read(offset >> region)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if region == 2:
            self.pages[offset] = value
        else:
            self.controllers[region].write(offset >> region, value)

    # ---- for devices

    def _of(self, number: int) -> tuple[_Controller, _Channel, int]:
        controller = self.controllers[number >> 2]
        return controller, controller.channels[number & 3], number & 3

    def _is_off(self, number: int) -> bool:
        controller, _, bit = self._of(number)
        cascade = self.controllers[1]
        off = controller.command & _DISABLED or controller.mask >> bit & 1
        return bool(off or (number < 4 and (cascade.command & _DISABLED or cascade.mask & 1)))

    def to_memory(self, number: int, data: bytes) -> tuple[int, bool]:
        """How many of these bytes a channel has taken, and whether its count has ended with them."""
        return self._move(number, _TO_MEMORY, len(data), data)[:2]

    def from_memory(self, number: int, length: int) -> tuple[bytes, bool]:
        """Up to `length` bytes, and whether its count has ended with them."""
        _, ended, data = self._move(number, _FROM_MEMORY, length, b"")
        return data, ended

    def _move(self, number: int, way: int, length: int, data: bytes) -> tuple[int, bool, bytes]:
        controller, channel, bit = self._of(number)
        width = 2 if number >= 4 else 1
        kind = channel.mode >> 2 & 3
        if self._is_off(number) or kind not in (way, _VERIFY):
            return 0, False, b""
        units = min(length // width, channel.count + 1)
        got = bytearray()
        page = self.pages[next(port for port, own in _PAGES.items() if own == number) - _FIRST_PAGE]
        done = 0
        while done < units:
            # As far as the address goes without wrapping.
            down = bool(channel.mode & _DOWN)
            run = 1 if down else min(units - done, 0x1_0000 - channel.address)
            start = page << 16 | channel.address if width == 1 else (page & 0xFE) << 16 | channel.address << 1
            self._move_run(kind, start, run * width, data[done * width : (done + run) * width], got)
            channel.address = (channel.address + (-run if down else run)) & 0xFFFF
            done += run
        ended = done == channel.count + 1
        channel.count = (channel.count - done) & 0xFFFF
        if ended:
            controller.done |= 1 << bit
            if channel.mode & _AUTOMATIC:
                channel.address, channel.count = channel.base_address, channel.base_count
            else:
                controller.mask |= 1 << bit
        return done * width, ended, bytes(got)

    def _move_run(self, kind: int, start: int, length: int, data: bytes, got: bytearray) -> None:
        try:
            if kind == _TO_MEMORY:
                self.board.dma_write(start, data)
            elif kind == _FROM_MEMORY:
                got += self.board.dma_read(start, length)
            elif not data:
                got += bytes(length)
        except Invalid:
            self.counters["not_ram"] += 1
            if kind == _FROM_MEMORY:
                got += b"\xff" * length

    # ---- life

    def reset(self) -> None:
        """All is masked but the cascade, which firmware would have opened: a kernel without one finds it so."""
        for controller in self.controllers:
            controller.clear()
            controller.channels[:] = [_Channel() for _ in range(4)]
        cascade = self.controllers[1]
        cascade.channels[0].mode, cascade.mask = _CASCADE, 0xE
        self.pages[:] = bytes(_PAGE_COUNT)

    def save(self) -> DmaState:
        def of(one: _Controller) -> ControllerState:
            names = ChannelState.__struct_fields__
            channels = [ChannelState(*(getattr(channel, name) for name in names)) for channel in one.channels]
            first, second, third, fourth = channels
            return ControllerState(
                (first, second, third, fourth), one.command, one.mask, one.request, one.done, one.upper
            )

        return DmaState(controllers=(of(self.controllers[0]), of(self.controllers[1])), pages=bytes(self.pages))

    def load(self, state: DmaState) -> None:
        for one, its in zip(self.controllers, state.controllers, strict=True):
            for channel, value in zip(one.channels, its.channels, strict=True):
                for name in ChannelState.__struct_fields__:
                    setattr(channel, name, getattr(value, name))
            one.command, one.mask, one.request = its.command, its.mask, its.request
            one.done, one.upper = its.done, its.upper
        self.pages[:] = state.pages
