"""The states of VCPU_REST and MACHINE_REST as Python has them: the layouts of the emulator's core.h, for other engines.

`unpack` raises Invalid for what is none; it checks lengths and kinds. Whether an engine can be so, it checks itself.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field, replace

from vmfs.engine.base import INTERRUPT_QUEUE, UNCLAIMED_MSRS, Machine
from vmfs.words import exits
from vmfs.words.errors import Invalid

VERSION = 1  # of each of the three
NEVER = (1 << 64) - 1

_PROGRESS = struct.Struct("<II 3Q Q II Q II 4I II 4Q Q Q 2Q 4Q Q I 4B HH I")
_READ = struct.Struct("<QQII")
_WAITING = struct.Struct("<4B II II I QQ")
_MSR = struct.Struct("<I4xQQQ")
_TIME = struct.Struct("<IIIIQQQQ")
TURNS = struct.Struct("<4I")  # struct core_turns
TURN = 1 << 14  # CORE_TURN
_CHIPS = struct.Struct("<IIII 24s II")
_CHANNEL = struct.Struct("<IIqqqQQ")


class Flag(enum.IntFlag):
    """enum core_progress_flag."""

    EXACT = 1
    RESTART = 2
    FED = 4
    PASS = 8
    RESUME = 16
    REPEATING = 32
    CAUGHT = 64
    ASLEEP = 128
    INJECTED = 256


class Reading(enum.IntEnum):
    """enum core_read_kind."""

    NONE = 0
    PORT = 1
    MEMORY = 2


# enum exit_reason and enum debug_cause of core.h, which have the words of exits.py in its order
Reason = enum.IntEnum("Reason", [kind.REASON.upper() for kind in exits.EXITS])
CAUSES = exits.DEBUG_CAUSES


@dataclass(frozen=True, slots=True)
class Read:
    """A memory-mapped read that the instruction at rip has done."""

    address: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Waiting:
    """An exit of an instruction that is done, which a next run returns. `data`: what was written, or an error's
    sentence. `also`: the stop was reached together with the one before."""

    reason: int
    rip: int
    address: int = 0
    size: int = 0
    count: int = 0
    data: bytes = b""
    cause: int = 0
    id: int = 0
    vector: int = 0
    write: bool = False
    also: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """`struct core_progress`. What is of the emulator alone is in `exact`, as bytes."""

    flags: Flag = Flag(0)
    instructions: int = 0
    interrupts: int = 0
    exceptions: int = 0
    reading: Reading = Reading.NONE
    address: int = 0
    element: int = 0  # bytes of the read that waits
    data: bytes = b""  # as they are to be read
    reads: tuple[Read, ...] = ()
    exits: tuple[Waiting, ...] = ()
    vectors: tuple[int, ...] = ()
    msrs: tuple[tuple[int, int, int, int], ...] = ()
    caught: tuple[int, int, int, int] = (0, 0, 0, 0)
    slept: int = 0
    exact: tuple[int, ...] = field(default=(0,) * 15)

    def pack(self) -> bytes:
        body = b"".join(_READ.pack(r.address, int.from_bytes(r.data, "little"), len(r.data), 0) for r in self.reads)
        body += b"".join(map(_pack_waiting, self.exits))
        body += b"".join(_MSR.pack(*row) for row in self.msrs)
        body += bytes(self.vectors) + self.data
        return _PROGRESS.pack(
            VERSION, _PROGRESS.size + len(body), self.instructions, self.interrupts, self.exceptions, 0,
            self.flags, self.reading, self.address, self.element, len(self.data) // (self.element or 1),
            len(self.reads), len(self.exits), len(self.msrs), len(self.vectors), len(self.data), 0,
            *self.caught, self.slept, *self.exact, 0,
        ) + body  # fmt: skip

    @staticmethod
    def unpack(data: bytes) -> Progress:
        head = _head("progress", data, _PROGRESS)
        (instructions, interrupts, exceptions, zero, flags, kind, address, element, count, reads, exits, msrs, vectors,
         size, reserved, *rest) = head[2:]  # fmt: skip
        caught, slept, exact, last = rest[:4], rest[4], rest[5:-1], rest[-1]
        if zero or reserved or last or flags >= 2 * Flag.INJECTED or kind > Reading.MEMORY or element > 8:
            raise Invalid("progress: a flag or a kind is unknown")
        if msrs > UNCLAIMED_MSRS or vectors > INTERRUPT_QUEUE or size != element * count or bool(kind) != bool(size):
            raise Invalid("progress: there are too many of something")
        cursor = _Cursor("progress", data, _PROGRESS.size)
        done = []
        for _ in range(reads):
            at, value, length, zero = cursor.take(_READ)
            if zero or not 0 < length <= 8 or value >> 8 * length:
                raise Invalid("progress: a read that was done has 1 to 8 bytes")
            done.append(Read(at, value.to_bytes(length, "little")))
        waiting = tuple(_take_waiting(cursor) for _ in range(exits))
        unclaimed = tuple(cursor.take(_MSR) for _ in range(msrs))
        queue = tuple(cursor.bytes(vectors))
        access = cursor.bytes(size)
        cursor.end()
        return Progress(
            flags=Flag(flags), instructions=instructions, interrupts=interrupts, exceptions=exceptions,
            reading=Reading(kind), address=address, element=element, data=access, reads=tuple(done), exits=waiting,
            vectors=queue, msrs=unclaimed, caught=tuple(caught), slept=slept, exact=tuple(exact),
        )  # fmt: skip


NOTHING = Progress()


_BEGUN = struct.Struct("<40x2IQ4I4x2I")  # of struct core_progress: all that `given_up` sets to zero


def given_up(progress: bytes) -> bytes:
    """The state of a CPU that is in the middle of nothing any more, and has done as much."""
    flags, *begun = _BEGUN.unpack_from(progress)
    if not flags & ~Flag.EXACT.value and not any(begun):
        return progress
    now = Progress.unpack(progress)
    kept = replace(
        now, flags=now.flags & Flag.EXACT, reading=Reading.NONE, address=0, element=0, data=b"", reads=(), exits=(),
        vectors=(),
    )  # fmt: skip
    return kept.pack()


def passed_no_stop(progress: bytes) -> bytes:
    """The same, of a CPU that stops at a breakpoint where it stands."""
    now = Progress.unpack(progress)
    return replace(now, flags=now.flags & ~(Flag.PASS | Flag.RESUME)).pack()


def as_new(progress: bytes, new: bytes) -> bytes:
    """That of a CPU that was reset: in the middle of nothing, as the new one, and has done as much."""
    now = Progress.unpack(progress)
    return replace(
        Progress.unpack(new), instructions=now.instructions, interrupts=now.interrupts, exceptions=now.exceptions,
        msrs=now.msrs,
    ).pack()  # fmt: skip


@dataclass(frozen=True, slots=True)
class Time:
    """`struct core_time_state`: nanoseconds."""

    now: int
    clock: int
    follows_host: bool = True
    lag: int = 0
    deadline: int = NEVER

    def pack(self) -> bytes:
        return _TIME.pack(VERSION, _TIME.size, self.follows_host, 0, self.now, self.clock, self.lag, self.deadline)

    @staticmethod
    def unpack(data: bytes) -> Time:
        _, size, flags, reserved, now, clock, lag, deadline = _head("time", data, _TIME)
        if size != _TIME.size or flags > 1 or reserved or max(now, clock, lag) > 1 << 62:
            raise Invalid("time: a flag is unknown, or a time is none")
        return Time(now, clock, bool(flags), lag, deadline)


@dataclass(frozen=True, slots=True)
class Channel:
    """`struct irqchip_pit_rest`: a counter of the 8254. `since` is how many nanoseconds it has counted, or -1."""

    count: int = 0x10000
    next_count: int = 0
    since: int = -1
    next_load: int = 0
    switch_time: int = 0
    held: int = 0
    seen: int = 0


@dataclass(frozen=True, slots=True)
class Chips:
    """What KVM's structs lack of the interrupt controllers: a byte a line, whose bit 0 is set while it is high."""

    lines: bytes = bytes(24)
    delivered: int = 0
    channels: tuple[Channel, ...] = (Channel(count=0),) * 3
    a20_off: bool = False

    def pack(self) -> bytes:
        channels = b"".join(
            _CHANNEL.pack(c.count, c.next_count, c.since if c.count else 0, c.next_load, c.switch_time, c.held, c.seen)
            for c in self.channels
        )
        size = _CHIPS.size + len(channels)
        return _CHIPS.pack(VERSION, size, self.a20_off, 0, self.lines, self.delivered, 0) + channels

    @staticmethod
    def unpack(data: bytes) -> Chips:
        _, _, flags, reserved, lines, delivered, zero = _head("chips", data, _CHIPS)
        cursor = _Cursor("chips", data, _CHIPS.size)
        channels = tuple(Channel(*cursor.take(_CHANNEL)) for _ in range(3))
        cursor.end()
        if flags > 1 or reserved or zero or max(lines) > 3 or delivered >> 24:
            raise Invalid("chips: a flag or a line is unknown")
        return Chips(lines, delivered, channels, bool(flags))


def begin_time(machine: Machine) -> None:
    """Have a machine's time begin at 0, and the counters of its 8254 with it."""
    time = Time.unpack(machine.get_state("time"))
    chips = Chips.unpack(machine.get_state("chips"))
    machine.set_state("time", replace(time, now=0, clock=0, lag=0).pack())
    channels = tuple(replace(channel, since=min(channel.since, 0)) for channel in chips.channels)
    machine.set_state("chips", replace(chips, channels=channels).pack())


def _pack_waiting(w: Waiting) -> bytes:
    data = w.data.ljust(-(-len(w.data) // 8) * 8, b"\0")
    head = _WAITING.pack(
        w.reason, w.write, w.cause, w.also, w.size, w.count, w.id, w.vector, len(w.data), w.rip, w.address
    )
    return head + data


def _take_waiting(cursor: _Cursor) -> Waiting:
    reason, write, cause, also, size, count, id_, vector, length, rip, address = cursor.take(_WAITING)
    data = cursor.bytes(-(-length // 8) * 8)[:length]
    is_write = reason in (Reason.IO, Reason.MMIO)
    if reason not in iter(Reason) or write > 1 or also > 1 or (is_write and not (write and length == size * count)):
        raise Invalid("progress: an exit that waits cannot be")
    if reason == Reason.ERROR and not (data.isascii() and data.decode().isprintable()):
        raise Invalid("progress: an error that waits is no text")
    if (reason == Reason.DEBUG and cause >= len(CAUSES)) or (length and not is_write and reason != Reason.ERROR):
        raise Invalid("progress: an exit that waits cannot be")
    return Waiting(reason, rip, address, size, count, data, cause, id_, vector, bool(write), bool(also))


def _head(name: str, data: bytes, layout: struct.Struct) -> tuple[int, ...]:
    if len(data) < layout.size:
        raise Invalid(f"{name}: {len(data)} bytes are none")
    fields = layout.unpack_from(data)
    if fields[0] != VERSION or fields[1] != len(data):
        raise Invalid(f"{name}: it is of version {fields[0]} with {fields[1]} bytes, not of {VERSION} with {len(data)}")
    return fields


class _Cursor:
    def __init__(self, name: str, data: bytes, at: int) -> None:
        self._name, self._data, self._at = name, data, at

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.bytes(layout.size))

    def bytes(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._data):
            raise Invalid(f"{self._name}: it ends too early")
        return self._data[self._at - count : self._at]

    def end(self) -> None:
        if self._at != len(self._data):
            raise Invalid(f"{self._name}: {len(self._data) - self._at} bytes are too many")
