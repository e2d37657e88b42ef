"""What a KVM CPU is in the middle of, as the state `progress` has it, and the rest of a KVM machine: `time`, `chips`.

KVM keeps the half of a read in the kernel, where nobody can take it from or put it in. So a read that came with a state
is taken up by executing its instruction once more, alone, up to the exit that it had (`Again`): the bytes of what it
has read already are given anew. What KVM cannot have: the phase of the 8254's counters, which begin afresh, and an A20
gate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from vmfs.engine.rest import CAUSES, Channel, Chips, Flag, Progress, Reading, Reason, Waiting
from vmfs.words import exits, layouts
from vmfs.words.errors import Invalid
from vmfs.words.layouts import quad, with_quad

_PIT_HZ = 1193182
_MODE_UNSET = 0xFF
_ERROR_MOST = 127


@dataclass(slots=True)
class Again:
    """A read that is to be taken up: what it has read before, and its bytes."""

    progress: Progress
    data: bytes

    @property
    def is_asking(self) -> bool:
        """Whether the bytes are still to be chosen."""
        return not self.progress.flags & Flag.FED

    def known(self, address: int, size: int) -> bytes | None:
        """What an earlier part of the instruction has read there."""
        found = (read.data for read in self.progress.reads if read.address == address and len(read.data) == size)
        return next(found, None)

    def is_asked(self, address: int, size: int) -> bool:
        """Whether that memory-mapped read is the one that waited."""
        now = self.progress
        return now.reading is Reading.MEMORY and (now.address, now.element) == (address, size)

    def take(self, port: int, element: int, count: int) -> bytes:
        """The next bytes for an IN, as many elements as there are."""
        now = self.progress
        if now.reading is not Reading.PORT or (now.address, now.element) != (port, element):
            return b""
        taken, self.data = self.data[: element * count], self.data[element * count :]
        return taken


_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_INS = (0x6C, 0x6D)


@dataclass(frozen=True, slots=True)
class StringCount:
    """How many iterations a REP INS has before it; `mask` says which bits of RCX that is."""

    count: int
    mask: int

    def left_in(self, regs: bytes) -> int:
        return quad(regs, layouts.RCX) & self.mask

    def with_count(self, regs: bytes, count: int) -> bytes:
        return with_quad(regs, layouts.RCX, quad(regs, layouts.RCX) & ~self.mask | count)


def string_count(code: bytes, bits: int, regs: bytes) -> StringCount | None:
    """Where `code` begins with a REP INS. Prefix 67 changes the size of addresses, and of rCX (Intel SDM 2A 2.1.1)."""
    prefixes = set()
    for byte in code:
        if byte in _PREFIXES or (bits == 64 and byte & 0xF0 == 0x40):
            prefixes.add(byte)
            continue
        if byte not in _INS or not prefixes & {0xF2, 0xF3}:
            return None
        size = {16: 32, 32: 16, 64: 32}[bits] if 0x67 in prefixes else bits
        mask = (1 << size) - 1
        return StringCount(quad(regs, layouts.RCX) & mask, mask)
    return None


def waiting(exit_: exits.Exit) -> tuple[Waiting, ...]:
    """An exit as records: a stop that was reached with others is several."""
    if isinstance(exit_, exits.Io):
        return (Waiting(Reason.IO, exit_.rip, exit_.port, exit_.size, exit_.count, exit_.data, write=True),)
    if isinstance(exit_, exits.Mmio):
        return (Waiting(Reason.MMIO, exit_.rip, exit_.addr, exit_.size, 1, exit_.data, write=True),)
    if isinstance(exit_, exits.Error):
        return (Waiting(Reason.ERROR, exit_.rip, data=exit_.reason.encode()[:_ERROR_MOST]),)
    if not isinstance(exit_, exits.Debug):
        return (Waiting(Reason[exit_.REASON.upper()], exit_.rip),)
    return tuple(
        Waiting(
            Reason.DEBUG, stop.rip, stop.addr or 0, cause=CAUSES.index(stop.cause), id=stop.id or 0,
            vector=stop.vector or 0, also=stop is not exit_,
        )
        for stop in (exit_, *exit_.also)
    )  # fmt: skip


def exits_of(records: tuple[Waiting, ...], cpu: int) -> list[exits.Exit]:
    """The exits that records are. Invalid for what no engine makes."""
    found: list[exits.Exit] = []
    for w in records:
        exit_ = _exit(w, cpu)
        if not w.also:
            found.append(exit_)
        elif found and isinstance(last := found[-1], exits.Debug) and isinstance(exit_, exits.Debug):
            last.also = (*last.also, exit_)
        else:
            raise Invalid("progress: a stop was reached together with none")
    return found


def _exit(w: Waiting, cpu: int) -> exits.Exit:
    match w.reason:
        case Reason.IO:
            if w.size not in (1, 2, 4) or not 0 < w.count <= 4096 or w.address > 0xFFFF:
                raise Invalid("progress: an access to a port that waits cannot be")
            return exits.Io(
                direction="out", port=w.address, size=w.size, count=w.count, data=w.data, rip=w.rip, cpu=cpu
            )
        case Reason.MMIO:
            if not 0 < w.size <= 8 or w.count != 1:
                raise Invalid("progress: a store that waits has 1 to 8 bytes")
            return exits.Mmio(direction="write", addr=w.address, size=w.size, data=w.data, rip=w.rip, cpu=cpu)
        case Reason.ERROR:
            return exits.Error(reason=w.data.decode(errors="replace"), rip=w.rip, cpu=cpu)
        case Reason.SHUTDOWN:
            return exits.Shutdown(cause="triple-fault", rip=w.rip, cpu=cpu)
        case Reason.DEBUG:
            cause = CAUSES[w.cause]
            has_address = cause in ("watchpoint", "io") or (cause == "exception" and w.vector == 14)
            return exits.Debug(
                cause=cause,
                id=None if cause == "step" else w.id,
                addr=w.address if has_address else None,
                vector=w.vector if cause in ("exception", "interrupt") else None,
                rip=w.rip,
                cpu=cpu,
            )
    return exits.EXITS[w.reason - 1](rip=w.rip, cpu=cpu)


def chips(lines: bytes, pit: bytes | None) -> Chips:
    """The rest of a machine's chips, of its lines' levels and `struct kvm_pit_state2` (None: it has no chips)."""
    if pit is None:
        return Chips()
    now = time.monotonic_ns()  # which KVM's count_load_time is of
    channels = []
    for at in range(3):
        count, *fields, load = layouts.PIT_CHANNEL.unpack_from(pit, at * layouts.PIT_CHANNEL.size)
        counts = fields[8] != _MODE_UNSET and 0 <= load <= now
        since = now - load if counts else -1
        ticks = since * _PIT_HZ // 1_000_000_000 if counts else 0
        channels.append(Channel(count=count or 0x10000, since=since, held=ticks, seen=ticks))
    return Chips(lines, 0, tuple(channels))
