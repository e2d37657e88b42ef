"""Call stacks out of a trace of instructions.

A trace has addresses and lengths. Where an instruction is not followed by the next one in memory, control has gone
elsewhere: by a call, a return, a jump or an event. Which of them, the instruction's bytes say where they can be read.
Else a return is what leads to where an open call would return, a call is what leads to the begin of a symbol, and a
jump what stays in the function. A jump into another function (a tail call) takes the place of the caller's frame. A
return that no call was seen of, as after a switch to another task, begins the stack anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmfs.traces.place import CALL, JUMP, RETURN, Place
from vmfs.words.tracing import TraceRecord, instructions_of

DEEPEST = 512  # frames; a stack that gets deeper begins anew
_LONGEST = 15  # bytes of an instruction


class Frame(NamedTuple):
    """`back` to `back_to`: where a return from it leads; a range where the length of the call is not known."""

    name: str
    back: int
    back_to: int


class Calls:
    """The stack of one CPU. `entered(name)` and `left()` are called as it grows and shrinks; `frames` is what it is."""

    def __init__(self, place: Place, entered: Callable[[str], None], left: Callable[[], None]) -> None:
        self.frames: list[Frame] = []
        self._place = place
        self._entered, self._left = entered, left
        self._last: tuple[int, int] | None = None  # the last instruction: address, length (0: not known)
        self._event: int | None = None  # where one was delivered, whose handler comes next

    def instructions(self, record: TraceRecord) -> None:
        """What a record `insn` says, before its instructions are counted."""
        first = record.words[1]
        if self._event is not None:
            self._push(self._place.function(first), self._event, self._event + _LONGEST)
        elif self._last is None:
            self._begin(first)
        elif not self._goes_on(first):
            self._transfer(*self._last, first)
        self._event = None
        for self._last in instructions_of(record):
            pass

    def event(self, record: TraceRecord) -> None:
        """An exception or an interrupt is delivered."""
        if self._event is None:  # of a double fault, the first one's place counts
            self._event = record.words[1]

    def gap(self) -> None:
        """Records are missing."""
        self._clear()
        self._last = self._event = None

    def _goes_on(self, address: int) -> bool:
        assert self._last
        at, length = self._last
        return address == at + length if length else at < address <= at + _LONGEST

    def _transfer(self, at: int, length: int, to: int) -> None:
        way = self._place.way_of(at)
        depth = self._returns(to) if way in (RETURN, "") else 0
        if depth:
            for _ in range(depth):
                self._pop()
        elif way == CALL or (not way and self._place.begins(to)):
            self._push(self._place.function(to), at + (length or 1), at + (length or _LONGEST))
        elif way == JUMP or (not way and self._place.function(to) == self.frames[-1].name):
            self._jump(to)
        else:
            self._begin(to)

    def _returns(self, to: int) -> int:
        """How many frames a return to there leaves; 0: no open call returns there."""
        for depth, frame in enumerate(reversed(self.frames), 1):
            if frame.back <= to <= frame.back_to:
                return depth
        return 0

    def _jump(self, to: int) -> None:
        found = self._place.name_of(to)
        top = self.frames[-1]
        if found and found[0] != top.name:
            self._pop()
            self._push(found[0], top.back, top.back_to)

    def _begin(self, at: int) -> None:
        self._clear()
        self._push(self._place.function(at), -1, -1)

    def _push(self, name: str, back: int, back_to: int) -> None:
        if len(self.frames) == DEEPEST:
            self._clear()
        self.frames.append(Frame(name, back, back_to))
        self._entered(name)

    def _pop(self) -> None:
        self.frames.pop()
        self._left()

    def _clear(self) -> None:
        while self.frames:
            self._pop()
