"""Virtqueue: the device's side of a split virtqueue in the guest's RAM.

Source: VIRTIO 1.2, section 2.7 (split virtqueues), with indirect descriptors (2.7.5.3) and event indices
(2.7.7, 2.7.10).

The driver is hostile: nothing that it writes is believed. Each field is read once, checked, and used as it was read,
since another CPU may change it. What no driver may do is a `DriverError`, which the device answers with
DEVICE_NEEDS_RESET; no other exception comes out of here, and no address outside RAM is touched.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

from vmfs.devices import _chips
from vmfs.devices.device import U16, U64, DeviceState, Port
from vmfs.words.errors import Invalid

NEXT, WRITE, INDIRECT = 1, 2, 4  # flags of a descriptor
NO_INTERRUPT = 1  # flag of the driver area
MAX_INDIRECT = 1024  # descriptors in a table of their own
MAX_BYTES = 1 << 32  # of all buffers of a chain (2.7.5)

_DESCRIPTOR = struct.Struct("<QIHH")
_U16 = struct.Struct("<H")
_USED = struct.Struct("<II")

Span = tuple[int, int]  # guest-physical address and length, all of it in RAM, never empty


class DriverError(Exception):
    """The driver has done what no driver may; the sentence says what."""


@dataclass(slots=True)
class Chain:
    """A request: what the device may read, and after it what it may write. `head` gives it back."""

    board: Port
    head: int
    readable: list[Span]
    writable: list[Span]

    @property
    def readable_length(self) -> int:
        return sum(length for _, length in self.readable)

    @property
    def writable_length(self) -> int:
        return sum(length for _, length in self.writable)

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Up to `length` of the readable bytes from `offset` on."""
        ram = self.board.ram
        if offset == 0 and length is not None and self.readable and self.readable[0][1] >= length:  # as mostly
            at = self.readable[0][0]
            return bytes(ram[at : at + length])
        return b"".join(ram[at : at + size] for at, size in part(self.readable, offset, length))

    def write(self, data: bytes | memoryview, offset: int = 0) -> int:
        """Write into the writable bytes from `offset` on. Returns how many there was room for."""
        done = 0
        for at, size in part(self.writable, offset, len(data)):
            self.board.dma_write(at, data[done : done + size])
            done += size
        return done


def part(spans: list[Span], offset: int, length: int | None = None) -> list[Span]:
    """The spans of `length` bytes (or all) from `offset` on, as far as there are so many."""
    if offset == 0 and length is not None and spans and sum(size for _, size in spans) - spans[-1][1] == length:
        return spans[:-1]  # all but the last, as of most requests
    taken: list[Span] = []
    left = MAX_BYTES if length is None else length
    for at, size in spans:
        if offset >= size:
            offset -= size
            continue
        size = min(size - offset, left)
        if size == 0:
            break
        taken.append((at + offset, size))
        left -= size
        offset = 0
    return taken


class QueueState(DeviceState):
    """The attributes of Virtqueue by their names."""

    size: U16
    descriptors: U64
    driver: U64
    device: U64
    enabled: bool
    event_index: bool
    indirect: bool
    taken: U16
    used: U16
    told: U16


class Virtqueue(_chips.Queue):  # type: ignore[misc, name-defined]
    """Queue `index` of a device, of up to `maximum` descriptors (a power of two). What it is, C has."""

    def __init__(self, board: Port, index: int, maximum: int) -> None:
        super().__init__()
        self.board = board
        self.index = index
        self.maximum = maximum
        # The processor's full barrier between telling the driver (used index) and reading what it wants to be told
        # (2.7.7.2, 2.7.10): to take a lock is one, and Python has no other.
        self._barrier = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.size = self.maximum
        self.descriptors = self.driver = self.device = 0  # the three areas' addresses
        self.enabled = False
        self.event_index = False
        self.indirect = False
        self.taken = self.used = self.told = 0

    def enable(self, *, event_index: bool, indirect: bool) -> None:
        """The driver has set addresses and size. DriverError where they cannot be."""
        self._check_areas(self.size, self.descriptors, self.driver, self.device)
        self.event_index, self.indirect = event_index, indirect
        self.enabled = True  # last: C may look at it

    def _check_areas(self, size: int, descriptors: int, driver: int, device: int) -> None:
        if not 0 < size <= self.maximum or size & (size - 1):
            raise DriverError(f"queue {self.index}: its size of {size} is no power of two up to {self.maximum}")
        for name, address, alignment, length in (
            ("descriptors", descriptors, 16, 16 * size),
            ("driver area", driver, 2, 6 + 2 * size),
            ("device area", device, 4, 6 + 8 * size),
        ):
            if address % alignment or not self._is_ram(address, length):
                raise DriverError(f"queue {self.index}: its {name}, {length} bytes at {address:#x}, cannot be there")

    def _is_ram(self, address: int, length: int) -> bool:
        return self.board.is_ram(address, length)

    # ---- what the driver has made available

    def pending(self) -> int:
        """How many requests wait."""
        return self._pending(self.board.ram)

    def _pending(self, ram: memoryview) -> int:
        (available,) = _U16.unpack_from(ram, self.driver + 2)
        count = (available - self.taken) & 0xFFFF
        if count > self.size:
            raise DriverError(f"queue {self.index}: {count} requests wait in a queue of {self.size}")
        return int(count)

    def pop(self) -> Chain | None:
        """Take the next request, if there is one."""
        chain = self.peek()
        if chain is not None:
            self.taken = (self.taken + 1) & 0xFFFF
        return chain

    def peek(self) -> Chain | None:
        """The next request, which stays that. DriverError where it is none that a driver may make."""
        ram = self.board.ram
        if not self._pending(ram):
            return None
        (head,) = _U16.unpack_from(ram, self.driver + 4 + 2 * (self.taken % self.size))
        return self._chain(ram, head)

    def unpop(self) -> None:
        """The request taken last was not done: it is the next one again."""
        self.taken = (self.taken - 1) & 0xFFFF

    def _chain(self, ram: memoryview, head: int) -> Chain:
        """C reads what a driver may make. What it does not take is read again here, which says what is wrong."""
        spans = _chips.chain(self.board.ram_chip, self.descriptors, self.size, head, self.indirect)
        return Chain(self.board, head, *spans) if spans is not None else self._read_chain(ram, head)

    def _read_chain(self, ram: memoryview, head: int) -> Chain:
        chain = Chain(self.board, head, [], [])
        is_ram = self.board.is_ram
        table, count, index = self.descriptors, self.size, head
        is_indirect = False
        left = count  # a chain that is longer than its table has a loop
        total = 0
        while True:
            if index >= count:
                raise DriverError(f"queue {self.index}: descriptor {index} of {count}")
            if left == 0:
                raise DriverError(f"queue {self.index}: a chain with a loop")
            left -= 1
            address, length, flags, following = _DESCRIPTOR.unpack_from(ram, table + 16 * index)
            if flags & INDIRECT:
                if not self.indirect or is_indirect or flags & NEXT:
                    raise DriverError(f"queue {self.index}: an indirect table that cannot be there")
                if length % 16 or not 0 < length <= 16 * MAX_INDIRECT or not self._is_ram(address, length):
                    raise DriverError(f"queue {self.index}: an indirect table of {length} bytes at {address:#x}")
                table, count, index, is_indirect = address, length // 16, 0, True
                left = count
                continue
            if length and not is_ram(address, length):
                raise DriverError(f"queue {self.index}: {length} bytes at {address:#x} are not RAM")
            total += length
            if flags & WRITE:
                if length:
                    chain.writable.append((address, length))
            elif chain.writable:
                raise DriverError(f"queue {self.index}: a readable buffer after a writable one")
            elif length:
                chain.readable.append((address, length))
            if not flags & NEXT:
                break
            index = following
        if total > MAX_BYTES:
            raise DriverError(f"queue {self.index}: a request of {total} bytes")
        return chain

    # ---- what the device gives back

    def push(self, chain: Chain, written: int) -> None:
        """The request is done; `written` bytes of what is writable, from the first on, are."""
        at = self.device + 4 + 8 * (self.used % self.size)
        ram = self.board.ram
        _USED.pack_into(ram, at, chain.head, written)
        self.board.wrote(at, 8)
        self.used = (self.used + 1) & 0xFFFF
        # x86 keeps the order of stores, and so does CPython: the entry is there before the index says so.
        _U16.pack_into(ram, self.device + 2, self.used)
        self.board.wrote(self.device + 2, 2)

    def want_notifications(self) -> None:
        """Ask the driver to notify for the next request beyond those that wait now. Look at `pending` once more
        afterwards, whether there are more."""
        if self.event_index:
            at = self.device + 4 + 8 * self.size
            _U16.pack_into(self.board.ram, at, (self.taken + self.pending()) & 0xFFFF)
            self.board.wrote(at, 2)
            with self._barrier:
                pass

    def wants_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since this was last asked."""
        told, self.told = self.told, self.used
        if told == self.used:
            return False
        with self._barrier:
            pass
        ram = self.board.ram
        if self.event_index:
            (event,) = _U16.unpack_from(ram, self.driver + 4 + 2 * self.size)
            return (self.used - event - 1) & 0xFFFF < (self.used - told) & 0xFFFF
        (flags,) = _U16.unpack_from(ram, self.driver)
        return not flags & NO_INTERRUPT

    # ---- state

    def save(self) -> QueueState:
        return QueueState(**{name: getattr(self, name) for name in QueueState.__struct_fields__})

    def check(self, state: QueueState) -> None:
        """Invalid where an enabled queue cannot be there."""
        try:
            if state.enabled:
                self._check_areas(state.size, state.descriptors, state.driver, state.device)
        except DriverError as error:
            raise Invalid(str(error)) from None

    def load(self, state: QueueState) -> None:
        for name in QueueState.__struct_fields__:
            setattr(self, name, getattr(state, name))
