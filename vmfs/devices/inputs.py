"""INPUTS: the one way in for what a machine gets from outside: keys, bytes on a port, frames, a button, answers.

A device, or another Taker, takes it; the code that has it calls `board.inputs.enter`, from any thread. Mostly that is
at once, with the board's lock. While inputs are recorded, or recorded ones are fed again, an input comes at a time of
the guest's, between two instructions, as a timer does, before all timers of that time: so the same input at the same
time finds the same machine. It takes a machine that computes its time itself (`time` = `instructions`).

What a device asks the host for, and waits for, is an answer: it comes in the order of the questions.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Annotated, Any, NamedTuple, Protocol

import msgspec

from vmfs.devices.timers import Timer
from vmfs.words.errors import Busy, Invalid, Unsupported

_LONGEST = 1 << 20  # bytes of one input
PASSING = "time"  # the name of the Taker of time that passes


class Taker(Protocol):
    """What inputs come to, by its name: a device; pins of the machine."""

    name: str

    def check_input(self, kind: str, data: bytes) -> None:
        """Invalid for what `input` cannot take."""

    def input(self, kind: str, data: bytes) -> None:
        """With the board's lock held."""

    def input_all(self, kind: str, some: Sequence[bytes]) -> None:
        """All of these, which come at one time."""
        for data in some:
            self.input(kind, data)


class Keeper(Protocol):
    """What this needs of a board."""

    time_source: str

    @property
    def lock(self) -> AbstractContextManager[Any]: ...
    @property
    def devices(self) -> Mapping[str, Any]: ...
    def now(self) -> int: ...
    def schedule_input(self, when: int, callback: Callable[[], None]) -> Timer: ...
    def look_soon(self) -> None: ...


class Input(msgspec.Struct, frozen=True, array_like=True):
    """`data` of a `kind` came to the taker of that name, `at` that time of the guest's, in nanoseconds."""

    at: Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
    taker: str
    kind: str
    data: Annotated[bytes, msgspec.Meta(max_length=_LONGEST)]


class Mark(NamedTuple):
    """A place in what is recorded: how many inputs, and how many answers, had come."""

    inputs: int = 0
    answers: int = 0


_COST = 120  # bytes that an input or an answer takes beside its data, about


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[Input, ...])


def pack_inputs(inputs: Iterable[Input]) -> bytes:
    return _encoder.encode(tuple(inputs))


def unpack_inputs(data: bytes) -> tuple[Input, ...]:
    """Invalid for what is none."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Invalid(f"inputs: {error}") from None


def _time(one: Input) -> int:
    return one.at


def _whose(one: Input) -> tuple[str, str]:
    return one.taker, one.kind


class Inputs:
    """A board's. Its lock is the board's."""

    def __init__(self, board: Keeper) -> None:
        self._board = board
        self._log: list[Input] | None = None  # what has come, while it is recorded
        self._fed = 0  # that are still to come
        self._new: list[tuple[str, str, bytes]] = []  # that came from outside, and have no time yet
        self._holds_new = False
        self._others: dict[str, Taker] = {}  # that are no devices
        self._done = 0  # of what is recorded, that have come
        self._places: list[int | None] = []  # where each was when it came; None: it came elsewhere
        self._answers: list[bytes] = []  # that were recorded
        self._answered = 0  # of them, that have come
        self.size = 0  # bytes of what is recorded, about
        self._coming: Timer | None = None  # the first of the others
        self.before_new: Callable[[], None] = lambda: None  # called in `settle`, before anything new gets a time
        self.place: Callable[[], int] = lambda: 0  # where the machine is, for a caller that asks when something came

    @property
    def have_times(self) -> bool:
        """They are recorded, or recorded ones are still to come."""
        return self._log is not None or self._fed > 0

    @property
    def are_new(self) -> bool:
        """Some wait for a time: the board is to call `settle` at the next nanosecond."""
        return bool(self._new) and not self._holds_new

    def hold_new(self, holds: bool) -> None:
        """Have those that come from outside wait. With the board's lock."""
        if holds and self.are_new:
            self.settle(1)
        self._holds_new = holds
        if self.are_new:
            self._board.look_soon()

    def add(self, taker: Taker) -> None:
        """One that is no device."""
        self._others[taker.name] = taker

    def _taker(self, name: str) -> Taker | None:
        return self._board.devices.get(name) or self._others.get(name)

    def enter(self, taker: Taker, kind: str, data: bytes) -> None:
        """`data` comes for `taker`. From any thread. Invalid for what it cannot take."""
        self.enter_all(taker, kind, (data,))

    def enter_all(self, taker: Taker, kind: str, some: Sequence[bytes]) -> None:
        """All of these, one after the other."""
        with self._board.lock:
            if not self.have_times:
                taker.input_all(kind, some)
                return
            for data in some:
                taker.check_input(kind, data)
            was_asked, name = self.are_new, taker.name
            for data in some:
                for at in range(0, len(data) or 1, _LONGEST):
                    self._new.append((name, kind, data[at : at + _LONGEST]))
            if not was_asked:
                self._board.look_soon()

    @property
    def new(self) -> int:
        """How many wait for a time. With the board's lock."""
        return len(self._new)

    def ask(self, work: Callable[[], bytes]) -> bytes:
        """What `work` gives; of what is recorded, what it gave then. In the CPU's thread, with the board's lock."""
        if self._log is None:
            return work()
        if self._answered == len(self._answers):
            self._answers.append(answer := work())
            self.size += len(answer) + _COST
        self._answered += 1
        return self._answers[self._answered - 1]

    def settle(self, later: int = 0) -> None:
        """Give those that wait their time: so many nanoseconds from now, where 0 is for a moment before which nothing
        has happened at this time. In the CPU's thread, with the lock."""
        self.before_new()
        new, self._new = self._new, []
        at = self._board.now() + later
        some = [Input(at, *one) for one in new]
        if self._log is None:
            self._schedule(some)
        elif later or self._done < len(self._log):
            self._note(some)
        else:
            self._keep(some, self._done)
            self._come()

    def _note(self, some: list[Input]) -> None:
        """Have these come, all at one time, and keep them: those of the record that are still to come are in their
        order of time."""
        assert self._log is not None
        self._keep(some, bisect.bisect_right(self._log, some[0].at, lo=self._done, key=_time))
        self._expect()

    def _keep(self, some: list[Input], at: int) -> None:
        assert self._log is not None
        self.size += sum(len(one.data) + _COST for one in some)
        self._log[at:at] = some

    def _expect(self) -> None:
        """Have the first that is still to come of the record come when it came, and the others after it."""
        assert self._log is not None
        if self._coming is not None:
            self._coming.cancel()
            self._coming = None
        if self._done < len(self._log):
            self._coming = self._board.schedule_input(self._log[self._done].at, self._come)

    def _come(self) -> None:
        """Those of the record come that are of the same time as the next one, and the one after them is expected."""
        assert self._log is not None
        self._coming = None
        first, at, place = self._done, self._log[self._done].at, self.place()
        while self._done < len(self._log) and self._log[self._done].at == at:
            if self._done == len(self._places):
                self._places.append(place)
            elif self._places[self._done] is None:
                self._places[self._done] = place
            self._done += 1
        self._give(self._log[first : self._done])
        self._expect()

    def check_recorded(self, inputs: Iterable[Input]) -> None:
        """Invalid where one is not of this machine."""
        for one in inputs:
            taker = self._taker(one.taker)
            if taker is None:
                raise Invalid(f"inputs: there is no {one.taker[:40]!r}")
            taker.check_input(one.kind, one.data)

    def record(self, before: tuple[Input, ...] = ()) -> None:
        """Keep what comes from now on; `before` are those that came before. Unsupported where the guest's time is the
        host's, Busy where it is done already. While the machine stands."""
        self._check()
        with self._board.lock:
            if self._log is not None:
                raise Busy("inputs are recorded already")
            self._log, self._done, self._coming = list(before), len(before), None
            self._places = [None] * len(before)
            self._answers, self._answered = [], 0
            self.size = sum(len(one.data) + _COST for one in before)
            try:
                self._tell(True)
            except BaseException:
                self.stop()
                raise

    def _tell(self, they_have: bool) -> None:
        for device in list(self._board.devices.values()):
            device.inputs_have_times(they_have)

    @property
    def mark(self) -> Mark:
        """How much of what is recorded has come. With the board's lock, or in the CPU's thread."""
        return Mark(self._done, self._answered)

    def near(self, before: int, after: int) -> list[tuple[int | None, Input]]:
        """Up to so many of the record that have come last, and that come next, but for time that passes; with their
        places. With the board's lock, or in the CPU's thread."""
        assert self._log is not None
        there = [number for number, one in enumerate(self._log) if one.taker != PASSING and number < len(self._places)]
        now = bisect.bisect_left(there, self._done)
        return [(self._places[number], self._log[number]) for number in there[max(now - before, 0) : now + after]]

    def since(self, mark: Mark) -> tuple[Input, ...] | None:
        """The inputs that have come since then; None where there were answers, too. With the board's lock, or in the
        CPU's thread."""
        assert self._log is not None
        return tuple(self._log[mark.inputs : self._done]) if self._answered == mark.answers else None

    def rewind(self, mark: Mark) -> None:
        """The machine is as it was when so much had come: the rest comes again. With the board's lock."""
        self._done, self._answered = mark
        self._expect()

    def forget_coming(self) -> None:
        """What is still to come of the record does not. With the board's lock."""
        assert self._log is not None
        self._forget(self._log[self._done :], self._answers[self._answered :])
        del self._log[self._done :]
        del self._places[self._done :]
        del self._answers[self._answered :]
        self._expect()

    def forget_first(self, mark: Mark) -> None:
        """The first of the record, which has come, is not in it any more. With the board's lock."""
        assert self._log is not None
        self._forget(self._log[: mark.inputs], self._answers[: mark.answers])
        del self._log[: mark.inputs]
        del self._places[: mark.inputs]
        del self._answers[: mark.answers]
        self._done -= mark.inputs
        self._answered -= mark.answers

    def _forget(self, inputs: list[Input], answers: list[bytes]) -> None:
        self.size -= sum(len(one.data) + _COST for one in inputs) + sum(len(one) + _COST for one in answers)

    def note_passing(self, nanoseconds: int) -> None:
        """So much of the guest's time passes at its next nanosecond, in which nothing is executed. In the CPU's thread,
        with the lock, while inputs are recorded."""
        self._note([Input(self._board.now() + 1, PASSING, "time", nanoseconds.to_bytes(8, "little"))])

    def recorded(self) -> tuple[Input, ...]:
        """What has come since `record`. What has not been given its time yet is not in it."""
        with self._board.lock:
            return tuple(self._log or ())

    def stop(self) -> tuple[Input, ...]:
        """Record no more; as `recorded`."""
        with self._board.lock:
            log, self._log = tuple(self._log or ()), None
            self._answers, self._answered = [], 0
            if not self._fed:
                self._tell(False)
            if self._coming is not None:
                self._coming.cancel()
                self._coming = None
            return log

    def feed(self, inputs: Iterable[Input]) -> None:
        """Have these come when they came. While the machine stands, at a time before the first one, else Invalid, and
        nothing has changed."""
        self._check()
        for name, device in self._board.devices.items():
            if device.ASKS:
                raise Unsupported(f"inputs: what {name} was answered is not among them")
        with self._board.lock:
            now, inputs = self._board.now(), tuple(inputs)
            self.check_recorded(inputs)
            for one in inputs:
                if one.at <= now:
                    raise Invalid(f"inputs: one is of {one.at} ns, and it is {now} ns already")
            self._tell(True)
            for _, some in groupby(sorted(inputs, key=_time), _time):  # those of one time in their order
                self._fed += 1
                self._schedule(list(some), self._was_fed)

    def _was_fed(self) -> None:
        self._fed -= 1
        if not self.have_times:
            self._tell(False)

    def _schedule(self, some: list[Input], then: Callable[[], None] = lambda: None) -> None:
        """Those of one time."""

        def come() -> None:
            self._give(some)
            then()

        self._board.schedule_input(some[0].at, come)

    def _give(self, some: list[Input]) -> None:
        """Those of one time come."""
        for (name, kind), group in groupby(some, _whose):
            taker = self._taker(name)
            if taker is not None:  # else it was taken out since
                taker.input_all(kind, [one.data for one in group])

    def _check(self) -> None:
        if self._board.time_source != "instructions":
            raise Unsupported("inputs: they have a time only where `time` is instructions")
