"""What a run shall stop for, as the four debug registers of the CPU (Intel SDM 3B 18.2)."""

from __future__ import annotations

from dataclasses import dataclass

from vmfs.engine.base import NO_DEBUG, Breakpoint, DebugRequest, Watchpoint
from vmfs.engine.kvm import abi
from vmfs.errors import Invalid, Unsupported

REGISTERS = 4
DR6_SINGLE_STEP = 1 << 14
_DR7_FIXED = 1 << 10  # reads as one
_RW_EXECUTE, _RW_WRITE, _RW_ACCESS = 0b00, 0b01, 0b11
_LEN = {1: 0b00, 2: 0b01, 4: 0b11, 8: 0b10}  # LENn of a data breakpoint of so many bytes


@dataclass(frozen=True, slots=True)
class Slot:
    """A debug register: the point it serves, the linear address it holds, and its R/W and LEN bits."""

    point: Breakpoint | Watchpoint
    address: int
    kind: int
    length: int = 0


@dataclass(frozen=True, slots=True)
class HardwarePoints:
    """A `DebugRequest` as debug registers. While one instruction runs `alone`, interrupts wait."""

    step: bool
    slots: tuple[Slot, ...]
    alone: bool

    def without(self, linear: int) -> HardwarePoints:
        """The same, less the breakpoints at one address, and with a single step."""
        others = (slot for slot in self.slots if not (slot.kind == _RW_EXECUTE and slot.address == linear))
        return HardwarePoints(True, tuple(others), alone=True)

    def breaks_at(self, linear: int) -> bool:
        return any(slot.kind == _RW_EXECUTE and slot.address == linear for slot in self.slots)

    def hit(self, dr6: int) -> Slot | None:
        """The slot that DR6 names. B0 to B3 of registers that are not in use mean nothing."""
        for number, slot in enumerate(self.slots):
            if dr6 & 1 << number:
                return slot
        return None

    def pack(self, extra: int = 0) -> bytes:
        """`struct kvm_guest_debug`; all zeros when there is nothing to stop for."""
        control, dr7 = extra, 0
        addresses = [0] * REGISTERS
        if self.step:
            control |= abi.KVM_GUESTDBG_SINGLESTEP
        if self.slots:
            control |= abi.KVM_GUESTDBG_USE_HW_BP
            dr7 = _DR7_FIXED
        for number, slot in enumerate(self.slots):
            addresses[number] = slot.address
            dr7 |= 0b10 << number * 2  # Gn
            dr7 |= (slot.kind | slot.length << 2) << 16 + number * 4  # R/Wn and LENn
        if control:
            control |= abi.KVM_GUESTDBG_ENABLE
        return abi.GUEST_DEBUG.pack(control, 0, *addresses, 0, 0, 0, dr7)


def allocate(request: DebugRequest) -> HardwarePoints:
    """The request in debug registers; `Unsupported` says what does not fit."""
    slots: list[Slot] = []
    for breakpoint_ in request.breakpoints:
        _check_address(breakpoint_.address)
        slots.append(Slot(breakpoint_, breakpoint_.address, _RW_EXECUTE))
    for watch in request.watchpoints:
        slots.extend(_watch_slots(watch))
    if len(slots) > REGISTERS:
        raise Unsupported(
            f"the break- and watchpoints need {len(slots)} debug registers, and the CPU has {REGISTERS}"
        )
    return HardwarePoints(request.step, tuple(slots), alone=request.step)


NOTHING = allocate(NO_DEBUG)


def _watch_slots(watch: Watchpoint) -> list[Slot]:
    """A range in naturally aligned pieces of 8, 4, 2 and 1 bytes, a register each."""
    if watch.physical:
        raise Unsupported("a debug register watches a linear address, not a guest-physical one")
    if not watch.on_write:
        raise Unsupported("a debug register cannot watch reads alone; watch rw")
    if watch.length < 1:
        raise Invalid("a watchpoint watches at least one byte")
    _check_address(watch.address + watch.length - 1)
    kind = _RW_ACCESS if watch.on_read else _RW_WRITE
    slots = []
    address, left = watch.address, watch.length
    while left and len(slots) <= REGISTERS:
        size = next(size for size in (8, 4, 2, 1) if size <= left and address % size == 0)
        slots.append(Slot(watch, address, kind, _LEN[size]))
        address, left = address + size, left - size
    if left:
        raise Unsupported(f"a watchpoint of {watch.length} bytes needs more than {REGISTERS} debug registers")
    return slots


def _check_address(address: int) -> None:
    if not 0 <= address < 1 << 64:
        raise Invalid(f"{address:#x} is not a 64-bit linear address")
