"""What only a look at the CPU between two instructions finds: KVM has no exit for it, and the CPU no register.

A watchpoint that is watched so is one for changes: a write of the value that is there already is not seen, and
what else writes to RAM in that moment is taken for the guest's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmfs.engine.kvm.debugregs import Plan
from vmfs.words import exits, layouts
from vmfs.words.layouts import quad
from vmfs.words.modes import CR0_PE, EFER_LMA, CodeMode
from vmfs.words.stops import Watchpoint

_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Look:
    """A CPU between two instructions. `cpl` is SS.DPL (Intel SDM 3A 5.5), `mode` real, protected or long."""

    rip: int
    linear: int  # of the instruction
    cpl: int
    mode: int
    cr3: int
    watched: tuple[bytes, ...] = ()


def look(regs: bytes, sregs: bytes, watched: tuple[bytes, ...] = ()) -> Look:
    code = CodeMode.of(regs, sregs)
    mode = 2 if quad(sregs, layouts.EFER) & EFER_LMA else quad(sregs, layouts.CR0) & CR0_PE
    cpl = sregs[layouts.SS_DPL]
    return Look(code.ip, code.address, cpl, mode, quad(sregs, layouts.CR3), watched)


def watched_bytes(
    watch: Watchpoint, translate: Callable[[int], int | None], read: Callable[[int, int], bytes]
) -> bytes:
    """What is in the watched range now; what is not mapped, or no RAM, is left out."""
    data, at, end = b"", watch.address, watch.address + watch.length
    while at < end:
        size = min(end - at, _PAGE - at % _PAGE)
        physical = at if watch.physical else translate(at)
        if physical is not None:
            data += read(physical, size)
        at += size
    return data


def _piece(watch: Watchpoint, byte: int) -> int:
    """The start of the naturally aligned piece of 8, 4, 2 or 1 bytes that a debug register would tell."""
    at, end = watch.address, watch.address + watch.length
    while True:
        size = next(size for size in (8, 4, 2, 1) if at % size == 0 and size <= end - at)
        if byte < at + size:
            return at
        at += size


def changes(plan: Plan, before: Look, after: Look) -> Iterator[exits.Debug]:
    """The stops that the instruction between two looks came to."""
    for watch, old, new in zip(plan.watches, before.watched, after.watched, strict=True):
        if old != new:
            changed = (n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
            addr = _piece(watch, watch.address + next(changed, 0))
            yield exits.Debug(cause="watchpoint", id=watch.id, addr=addr, rip=after.rip)
    if before.mode != after.mode:
        for id_ in plan.modes:
            yield exits.Debug(cause="mode", id=id_, rip=after.rip)
    if before.cr3 != after.cr3:
        for id_ in plan.cr3s:
            yield exits.Debug(cause="cr3", id=id_, rip=after.rip)


def joined(stops: list[exits.Debug], cpu: int) -> exits.Debug:
    """Stops that were reached at once, as one exit: that of the lowest id, and the others with it."""
    first, *others = sorted(stops, key=lambda stop: stop.id or 0)
    for stop in stops:
        stop.cpu = cpu
    first.also = tuple(others)
    return first
