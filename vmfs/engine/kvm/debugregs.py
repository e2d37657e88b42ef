"""What a run shall stop for: in the four debug registers of the CPU (Intel SDM 3B 18.2), or by steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmfs.engine.base import NO_DEBUG, DebugRequest
from vmfs.engine.kvm import abi
from vmfs.words.errors import Invalid, Unsupported
from vmfs.words.stops import Breakpoint, Cr3Stop, ModeStop, PortStop, VectorStop, Watchpoint

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

    def hit(self, dr6: int) -> tuple[Slot, ...]:
        """The slots that DR6 names. B0 to B3 of registers that are not in use mean nothing."""
        return tuple(slot for number, slot in enumerate(self.slots) if dr6 & 1 << number)

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


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is watched for: by debug registers first, in its order, then by stepping.

    `breakpoints` are all of them, by linear address; the others are those that only a look at the CPU between
    two instructions finds. `ways`: see `Vcpu.way_of`.
    """

    hardware: HardwarePoints
    steps: bool
    breakpoints: Mapping[int, tuple[int, ...]]
    watches: tuple[Watchpoint, ...]
    modes: tuple[int, ...]
    cr3s: tuple[int, ...]
    ports: tuple[PortStop, ...]
    ways: Mapping[int, str]


def plan(request: DebugRequest, *, has_watchpoints: bool) -> Plan:
    """`Unsupported` says what no way is found for. `has_watchpoints`: whether the registers can watch data."""
    if request.of(VectorStop):
        raise Unsupported(
            "catch: KVM delivers exceptions and interrupts by itself; break at the handler's address instead"
        )
    slots: list[Slot] = []
    ways: dict[int, str] = {}
    breakpoints: dict[int, tuple[int, ...]] = {}
    in_hardware: set[int] = set()
    for stop in sorted((*request.of(Breakpoint), *request.of(Watchpoint)), key=lambda stop: stop.id):
        _check_address(stop.address)
        if isinstance(stop, Watchpoint):
            if stop.length < 1:
                raise Invalid("a watchpoint watches at least one byte")
            _check_address(stop.address + stop.length - 1)
        if isinstance(stop, Breakpoint):
            if stop.address not in breakpoints and len(slots) < REGISTERS:
                slots.append(Slot(stop, stop.address, _RW_EXECUTE))
                in_hardware.add(stop.address)
            breakpoints[stop.address] = (*breakpoints.get(stop.address, ()), stop.id)
            ways[stop.id] = "hardware" if stop.address in in_hardware else "stepping"
        else:
            pieces = _watch_slots(stop) if has_watchpoints else None
            if pieces is not None and len(slots) + len(pieces) <= REGISTERS:
                slots += pieces
                ways[stop.id] = "hardware"
            else:
                ways[stop.id] = "stepping"
    watches = tuple(watch for watch in request.of(Watchpoint) if ways[watch.id] == "stepping")
    for watch in watches:
        if watch.on_read:
            raise Unsupported(
                f"watch: single steps show writes only, and {_why_not(watch, has_watchpoints=has_watchpoints)}"
            )
    modes, cr3s = (tuple(stop.id for stop in request.of(kind)) for kind in (ModeStop, Cr3Stop))
    ways |= dict.fromkeys(modes + cr3s, "stepping") | {stop.id: "exits" for stop in request.of(PortStop)}
    if others := [stop.text() for stop in request.stops if stop.id not in ways]:
        raise Unsupported(f"{others[0]}: KVM has no way to watch for it")
    return Plan(
        hardware=HardwarePoints(request.step, tuple(slots), alone=request.step),
        steps="stepping" in ways.values(),
        breakpoints=breakpoints,
        watches=watches,
        modes=modes,
        cr3s=cr3s,
        ports=request.of(PortStop),
        ways=ways,
    )


def _why_not(watch: Watchpoint, *, has_watchpoints: bool) -> str:
    """Why no debug register watches."""
    if not has_watchpoints:
        return "the host's KVM is PVM, without hardware: watch w"
    if watch.physical:
        return "a debug register watches a linear address, not a guest-physical one"
    if not watch.on_write:
        return "a debug register cannot watch reads alone: watch rw"
    return f"{watch.length} bytes at {watch.address:#x} need more debug registers than are left of {REGISTERS}"


def _watch_slots(watch: Watchpoint) -> list[Slot] | None:
    """A range in naturally aligned pieces of 8, 4, 2 and 1 bytes, a register each; None where it does not fit."""
    if watch.physical or not watch.on_write:  # they watch linear addresses, and no reads alone
        return None
    kind = _RW_ACCESS if watch.on_read else _RW_WRITE
    slots = []
    address, left = watch.address, watch.length
    while left and len(slots) < REGISTERS:
        size = next(size for size in (8, 4, 2, 1) if size <= left and address % size == 0)
        slots.append(Slot(watch, address, kind, _LEN[size]))
        address, left = address + size, left - size
    return None if left else slots


NO_PLAN = plan(NO_DEBUG, has_watchpoints=False)
NOTHING = NO_PLAN.hardware


def _check_address(address: int) -> None:
    if not 0 <= address < 1 << 64:
        raise Invalid(f"{address:#x} is not a 64-bit linear address")
