"""HPET: a counter of 64 bits at 100 MHz, and three comparators that interrupt, once or periodically.

Interrupts go to a line, or are messages. In legacy replacement those of comparators 0 and 1 go where the 8254's and the
clock's are, which then have none (`replaced`).

Nothing counts: the counter is the guest's time. What the comparators have met is worked out when a register is used,
and the board calls for the next one that interrupts. Reads of the counter are answered in C (chips/hpet.c): one in
Python takes some 20 us, and Linux makes 200,000 while it boots.

Source: Intel, IA-PC HPET Specification 1.0a, chapter 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U64, DeviceState, Port, QuietDevice, Window
from vmfs.devices.timers import Timer
from vmfs.words.errors import Invalid

ADDRESS, LENGTH = 0xFED0_0000, 0x400
TICK = 10  # nanoseconds
COMPARATORS = 3
REVISION, VENDOR = 1, 0x8086
_FEMTOSECONDS = 1_000_000
_WIDE_COUNTER, _CAN_REPLACE = 1 << 13, 1 << 15
CAPABILITIES = VENDOR << 16 | _CAN_REPLACE | _WIDE_COUNTER | COMPARATORS - 1 << 8 | REVISION

_CAPABILITIES, _CONFIGURATION, _STATUS, _COUNTER, _FIRST, _STEP = 0x000, 0x010, 0x020, 0x0F0, 0x100, 0x20
_ENABLED, _REPLACES = 1, 2  # of the general configuration
# Of a comparator's.
_LEVEL, _INTERRUPTS, _PERIODIC, _SETS_VALUE, _NARROW, _ROUTE, _MESSAGES = 2, 4, 8, 0x40, 0x100, 0x3E00, 0x4000
_WRITABLE = _LEVEL | _INTERRUPTS | _PERIODIC | _SETS_VALUE | _NARROW | _ROUTE | _MESSAGES
_CAN_BE_PERIODIC, _IS_WIDE, _CAN_MESSAGE = 0x10, 0x20, 0x8000
_LINES = 0x00F0_0000  # that a comparator's can be: the IOAPIC's inputs 20 to 23
_FIXED = _LINES << 32 | _CAN_BE_PERIODIC | _IS_WIDE | _CAN_MESSAGE
_LEGACY_LINES = 0, 8  # of comparators 0 and 1

_WIDE, _HALF = 1 << 64, 1 << 32
_NEVER = 1 << 80  # ticks
SHORTEST = 1000  # ticks between two interrupts of a periodic comparator: a guest cannot ask for more than it can take
_U64 = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]  # little-endian: msgpack's are signed here


class ComparatorState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    configuration: Annotated[int, msgspec.Meta(ge=0, le=_WRITABLE)]
    value: _U64
    period: _U64
    message: _U64


class HpetState(DeviceState):
    """`counter` as it was `behind` nanoseconds ago; what has happened since then is still to be worked out."""

    configuration: Annotated[int, msgspec.Meta(ge=0, le=3)]
    status: Annotated[int, msgspec.Meta(ge=0, lt=1 << COMPARATORS)]
    counter: _U64
    behind: U64
    comparators: Annotated[tuple[ComparatorState, ...], msgspec.Meta(min_length=COMPARATORS, max_length=COMPARATORS)]


@dataclass(slots=True)
class Comparator:
    number: int
    configuration: int = 0
    value: int = _WIDE - 1
    period: int = 0
    message: int = 0  # data below, address above

    @property
    def modulus(self) -> int:
        return _HALF if self.configuration & _NARROW else _WIDE

    def until(self, counter: int) -> int:
        """Ticks from there until it meets its value; where it has it now, that is once around."""
        return (self.value - counter) % self.modulus or self.modulus

    def meets(self, counter: int, ticks: int) -> bool:
        """Whether it has met its value in so many ticks from there. Of a periodic one that is the next value then."""
        left = self.until(counter)
        if left > ticks:
            return False
        if self.configuration & _PERIODIC and self.period:
            self.value = (self.value + self.period * (1 + (ticks - left) // self.period)) % self.modulus
        return True


class Hpet(QuietDevice[HpetState]):
    """`replaced` is called with whether it replaces the legacy interrupts."""

    TYPE = "hpet"
    STATE = HpetState
    IS_LATE = True

    def __init__(self, board: Port, name: str, replaced: Callable[[bool], None]) -> None:
        super().__init__(board, name)
        self._replaced = replaced
        self._timer: Timer | None = None
        self._has_replaced = False
        self._held: set[int] = set()  # lines
        self.chip = _chips.Counter(board.bus, self.number)
        self._clear()
        self._show()

    def _clear(self) -> None:
        self.configuration = self.status = 0
        self.counter = 0  # at `seen`
        self.seen = 0  # the guest's time, of a tick where it counts
        self.comparators = [Comparator(number) for number in range(COMPARATORS)]

    def windows(self) -> tuple[Window, ...]:
        return (Window("memory", ADDRESS, LENGTH),)

    # ---- time

    @property
    def _counts(self) -> bool:
        return bool(self.configuration & _ENABLED)

    def _catch_up(self) -> None:
        """Work out what has happened since the last look."""
        if not self._counts:
            return
        ticks = (self.board.now() - self.seen) // TICK
        if ticks <= 0:
            return
        was = self.counter
        self.counter = (was + ticks) % _WIDE
        self.seen += ticks * TICK
        for one in self.comparators:
            if one.meets(was, ticks):
                self._met(one)

    def _met(self, one: Comparator) -> None:
        self.counters["met"] += 1
        if one.configuration & _LEVEL:
            self.status |= 1 << one.number
        elif one.configuration & _INTERRUPTS:
            line = self._line(one)
            if line is None:
                self.board.signal_msi(one.message >> 32, one.message & 0xFFFF_FFFF)
            elif line not in self._held:
                self.board.set_irq(self, line, True)
                self.board.set_irq(self, line, False)

    def _line(self, one: Comparator) -> int | None:
        """None: it sends a message. A line that it cannot have is none."""
        if self._replaces and one.number < len(_LEGACY_LINES):
            return _LEGACY_LINES[one.number]
        if one.configuration & _MESSAGES:
            return None
        return (one.configuration & _ROUTE) >> 9

    def _show(self) -> None:
        """What reads of the counter give, which change nothing."""
        self.chip.show(self.counter, self.seen, TICK if self._counts else 0)

    def _drive(self) -> None:
        """The counter, the level-triggered lines; and be called for what interrupts next."""
        self._show()
        held = {
            line
            for one in self.comparators
            if self._counts and self._holds(one) and (line := self._line(one)) is not None
        }
        for line in held ^ self._held:
            self.board.set_irq(self, line, line in held)
        self._held = held
        self._schedule()

    def _holds(self, one: Comparator) -> bool:
        wanted = _LEVEL | _INTERRUPTS
        return bool(self.status >> one.number & 1) and one.configuration & wanted == wanted

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left = min((self._ticks_until(one) for one in self.comparators if self._is_armed(one)), default=_NEVER)
        when = self.seen + left * TICK
        if self._counts and when < _WIDE:
            self._timer = self.board.schedule(when, self._called)

    def _is_armed(self, one: Comparator) -> bool:
        """Whether there is an interrupt when it meets its value; one that holds its line has it already."""
        return bool(one.configuration & _INTERRUPTS) and not self._holds(one)

    def _ticks_until(self, one: Comparator) -> int:
        left = one.until(self.counter)
        is_dense = one.configuration & _PERIODIC and 0 < one.period < SHORTEST
        return max(left, SHORTEST) if is_dense else left

    def _called(self) -> None:
        self._catch_up()
        self._drive()

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        if offset & ~7 in (_STATUS, _COUNTER) or offset >= _FIRST:
            self._catch_up()
            if offset & ~7 == _STATUS:
                self._drive()
        return self._register(offset & ~7) >> 8 * (offset & 7)

    def _register(self, at: int) -> int:
        if at >= _FIRST:
            return self._comparator_register(at)
        return {
            _CAPABILITIES: CAPABILITIES | (TICK * _FEMTOSECONDS) << 32,
            _CONFIGURATION: self.configuration,
            _STATUS: self.status,
            _COUNTER: self.counter,
        }.get(at, 0)

    def _comparator_register(self, at: int) -> int:
        number, at = divmod(at - _FIRST, _STEP)
        if number >= COMPARATORS or at > 0x10:
            return 0
        one = self.comparators[number]
        return (one.configuration & ~_SETS_VALUE | _FIXED, one.value, one.message)[at // 8]

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        at, shift = offset & ~7, 8 * (offset & 7)
        if shift + 8 * size > 64 or size < 4 or offset % size:
            return  # 2.3.1: accesses are of 32 and 64 bits
        mask = (1 << 8 * size) - 1 << shift
        self._catch_up()
        self._store(at, value << shift & mask, mask)
        self._drive()

    def _store(self, at: int, value: int, mask: int) -> None:
        if at == _CONFIGURATION:
            self._configure((self.configuration & ~mask | value) & (_ENABLED | _REPLACES))
        elif at == _STATUS:
            self.status &= ~value
        elif at == _COUNTER:
            if not self._counts:  # "software must only write it while it is halted"
                self.counter = self.counter & ~mask | value
        elif at >= _FIRST:
            number, at = divmod(at - _FIRST, _STEP)
            if number < COMPARATORS:
                self._store_comparator(self.comparators[number], at, value, mask)

    def _configure(self, value: int) -> None:
        if value & ~self.configuration & _ENABLED:
            self.seen = self.board.now()
        self.configuration = value
        self._replace()

    @property
    def _replaces(self) -> bool:
        """2.3.5: it has to be enabled, too."""
        return self.configuration == _ENABLED | _REPLACES

    def _replace(self) -> None:
        if self._replaces != self._has_replaced:
            self._has_replaced = self._replaces
            self._replaced(self._replaces)

    def _store_comparator(self, one: Comparator, at: int, value: int, mask: int) -> None:
        if at == 0:
            one.configuration = (one.configuration & ~mask | value) & _WRITABLE
            if not _LINES >> ((one.configuration & _ROUTE) >> 9) & 1:
                one.configuration &= ~_ROUTE  # 2.3.8: what it cannot have reads as another
            if one.configuration & _NARROW:
                one.value, one.period = one.value % _HALF, one.period % _HALF
            if not one.configuration & _LEVEL:
                self.status &= ~(1 << one.number)
        elif at == 8:
            is_periodic = one.configuration & _PERIODIC
            if not is_periodic or one.configuration & _SETS_VALUE:
                one.value = (one.value & ~mask | value) % one.modulus
            if is_periodic:
                one.period = (one.period & ~mask | value) % one.modulus
            one.configuration &= ~_SETS_VALUE
        elif at == 16:
            one.message = one.message & ~mask | value

    # ---- life

    def reset(self) -> None:
        self._clear()
        self._replace()
        self._drive()

    def time_shifted(self, by: int) -> None:
        self.seen += by
        self._show()

    def save(self) -> HpetState:
        return HpetState(
            configuration=self.configuration,
            status=self.status,
            counter=self.counter.to_bytes(8, "little"),
            behind=max(self.board.now() - self.seen, 0) if self._counts else 0,
            comparators=tuple(
                ComparatorState(
                    one.configuration, *(each.to_bytes(8, "little") for each in (one.value, one.period, one.message))
                )
                for one in self.comparators
            ),
        )

    def check(self, state: HpetState) -> None:
        for one in state.comparators:
            route = (one.configuration & _ROUTE) >> 9
            is_wide = any(one.value[4:]) or any(one.period[4:])
            if one.configuration & ~_WRITABLE or (route and not _LINES >> route & 1):
                raise Invalid(f"{self.name}: a comparator cannot be configured so")
            if one.configuration & _NARROW and is_wide:
                raise Invalid(f"{self.name}: a comparator of 32 bits has more")

    def load(self, state: HpetState) -> None:
        self.configuration, self.status = state.configuration, state.status
        self.counter = _number(state.counter)
        self.seen = self.board.now() - state.behind
        self.comparators = [
            Comparator(number, one.configuration, *map(_number, (one.value, one.period, one.message)))
            for number, one in enumerate(state.comparators)
        ]
        self._has_replaced = self._replaces
        self._replaced(self._replaces)
        self._held = {*_LEGACY_LINES, *range(20, 24)}  # as it may have been before, of which nothing is to stay
        self._drive()

    def describe(self) -> dict[str, str]:
        return {"counts": "yes" if self._counts else "no", "replaces": "yes" if self._has_replaced else "no"}


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
