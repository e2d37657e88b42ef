"""Open files that take lines: what one of them is told is one change, in however many writes it comes.

bash's own printf and echo write a line at a time, Rust's writeln! a piece at a time (`rax `, `5`, a newline). So a
piece that parses takes effect at once; one that does not yet waits for the next; and when a line fails, what the
descriptor has changed before is taken back, as long as nothing else has happened to the machine since.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmfs.machine.files.handles import File, Handle
from vmfs.machine.files.waiting import value_of
from vmfs.words.errors import Interrupted, Invalid, VmfsError, WouldBlock

TEXT_LIMIT = 64 << 10  # bytes of one write, and of what waits for the rest of its line; `registers` whole is 9 KiB
# bash writes the lines that follow one that failed all the same, and they belong to the change that failed.
FAILED_SECONDS = 1.0
MOST_IN_FORCE = 64  # texts of a line; a program that never ends one writes no pieces


class Undo:
    """What takes a change back: `put_back(old)`, which may return a Future or a coroutine.

    `watch()`, called when it was made, returns what says whether nothing else has happened since, so that it can be
    taken back. `join` makes one of the `old` of two changes that followed each other.
    """

    def __init__(
        self,
        old: Any,
        put_back: Callable[[Any], Any],
        watch: Callable[[], Callable[[], bool]],
        join: Callable[[Any, Any], Any] = lambda first, second: first,
    ) -> None:
        self._old = old
        self._put_back = put_back
        self._watch = watch
        self._join = join
        self.stands = watch()

    def take_back(self) -> Any:
        return self._put_back(self._old)

    def after(self, first: Undo | None) -> Undo:
        """That of both changes."""
        if first is None:
            return self
        return Undo(self._join(first._old, self._old), self._put_back, self._watch, self._join)

    def renewed(self) -> Undo:
        """After a part of it was taken back."""
        return Undo(self._old, self._put_back, self._watch, self._join)


def same(*looks: Callable[[], object]) -> Callable[[], bool]:
    """What says whether all of it is what it is now."""
    now = [look() for look in looks]
    return lambda: all(look() is one for look, one in zip(looks, now, strict=True))


Do = Callable[[], Any]
"""Does what a text says. It returns an Undo or None, or a Future or a coroutine of one."""


def decoded(data: bytes, decode: Callable[[bytes], str] = bytes.decode) -> str:
    """What was written to a text file."""
    check_text(data)
    try:
        return decode(data)
    except UnicodeDecodeError as error:
        raise Invalid(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


def check_text(data: bytes) -> None:
    if len(data) > TEXT_LIMIT:
        raise Invalid(f"{len(data)} bytes are more than the {TEXT_LIMIT} that one write may have")
    if b"\0" in data:
        raise Invalid("there is a NUL in the text")


@dataclass(frozen=True, slots=True)
class _Text:
    """A part of an unfinished line that is in force, with the lines that were changed together with it."""

    text: str
    undo: Undo | None


class LineHandle(Handle):
    """A subclass says by `parse` what a text is.

    `whole`: `parse` takes several lines, as one change; else each is parsed, and then one is done after the other.
    `acts`: what a text does has happened, as a run or an interrupt has. So a write is one of them, whole, and cannot be
    said again at more length.
    `continues`: any text parses, so pieces without a newline between them are one.
    """

    whole = False
    acts = False
    continues = False

    def __init__(self, node: File, nonblocking: bool, writing: bool) -> None:
        super().__init__(node, nonblocking)
        self.tells_closing = writing
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._waiting = ""  # what does not parse yet
        self._before = 0  # how many lines came before the one that is not finished
        self._first = 0  # and before the text that is looked at
        # Of that line, what parsed and so took effect: often one text, but it can be several.
        self._in_force: list[_Text] = []
        self._undo: Undo | None = None  # of all that the descriptor has changed
        self._failure: Exception | None = None
        self._failed_at = 0.0

    def parse(self, text: str) -> Do:
        """Invalid for what does not parse (yet); changes nothing."""
        raise NotImplementedError

    async def prepare(self, text: str) -> None:
        """What would take `parse` long. Not to be relied on: a text may be parsed in pieces, too."""

    @property
    def unsaved(self) -> bool:  # type: ignore[override]
        return bool(self._waiting.strip())

    @property
    def waits(self) -> bool:  # type: ignore[override]
        return bool(self._waiting)

    async def write(self, offset: int, data: bytes) -> int:
        self._go_on_after_failure()
        waited = self._waiting
        try:
            await self._take(decoded(data, self._decoder.decode))
        except (WouldBlock, Interrupted):
            self._waiting = waited  # the caller writes it again
            raise
        except Exception as error:
            await self._fail(error)
            raise
        return len(data)

    async def flush(self) -> None:
        """What waits has no next write to wait for. A descriptor may go on after that: a duplicate was closed."""
        failed, self._failure = self._failure, None
        if failed is not None or not self.unsaved:
            self._waiting = ""
            return
        try:
            if self.acts:
                self.parse(self._waiting)
                # Nobody could interrupt a run here.
                raise Invalid(f"{self._waiting[:40]!r} ends with a blank: more was to come, or a newline")
            await self._take("", closing=True)
        except Exception as error:
            await self._fail(error)
            self._failure = None
            raise

    def _go_on_after_failure(self) -> None:
        if self._failure is None:
            return
        if time.monotonic() - self._failed_at < FAILED_SECONDS:
            raise self._failure
        self._failure = None

    async def _take(self, text: str, closing: bool = False) -> None:
        if len(self._in_force) == 1 and not self._waiting and text[:1] == "\n":  # the end of what has taken effect
            self._finish_line()
            text = text[1:]
        self._waiting += text
        if not self._waiting:
            return
        lines = self._waiting.count("\n")
        if not self._waiting.strip() and not self._in_force and (lines == 0 or self._before):  # nothing, between lines
            self._before += lines
            self._waiting = self._waiting.rpartition("\n")[2]
            return
        await self.prepare(self._said(len(self._in_force)) + self._waiting)
        failure = None
        for again, text in self._readings():
            self._first = self._before + self._lines_in_force(len(self._in_force) - again)
            try:
                steps, rest = self._steps(text, closing)
            except Invalid as error:
                failure = failure or error
                continue
            await self._do(steps, text, rest, again)
            return
        if self._waiting == "\n" and self._in_force:  # all in force are texts for themselves
            self._finish_line()
            self._waiting = ""
            return
        assert failure is not None
        if lines or closing:
            raise failure
        check_text(self._waiting.encode())

    def _finish_line(self) -> None:
        self._before += self._lines_in_force(len(self._in_force)) + 1
        self._in_force = []

    def _lines_in_force(self, count: int) -> int:
        return sum(one.text.count("\n") for one in self._in_force[:count])

    def _readings(self) -> list[tuple[int, str]]:
        """What was written can be a new text, or the rest of the last one that is in force, or of the whole line:
        how many of those in force are said again, and the text.

        A program that ends its lines writes one in pieces, one that does not ends none.
        """
        most = 0
        if not self.acts and all(one.undo is None or self._stands() for one in self._in_force):
            most = len(self._in_force)
        counts = sorted({0, min(most, 1), most}, reverse=self.continues or "\n" in self._waiting)
        return [(again, self._said(again) + self._waiting) for again in counts]

    def _said(self, again: int) -> str:
        return "".join(one.text for one in self._in_force[len(self._in_force) - again :])

    def _stands(self) -> bool:
        return self._undo is not None and self._undo.stands()

    def _steps(self, text: str, closing: bool) -> tuple[list[tuple[int, Do]], str]:
        """What to do, with the number of its line, and what waits for more."""
        head, newline, piece = text.rpartition("\n")
        # `step ` may become `step 5`: a blank says that more comes.
        if not piece or closing or piece == piece.rstrip():
            try:
                return self._parsed(text), ""
            except Invalid:
                if not (piece.strip() and newline) or closing or self.acts:
                    raise
        elif not newline or self.acts:
            raise Invalid("there is a blank at its end")
        return self._parsed(head + newline), piece

    def _parsed(self, text: str) -> list[tuple[int, Do]]:
        if self.whole or self.acts:
            return [(0, self._at_line(0, lambda: self.parse(text)))]
        lines = text.removesuffix("\n").split("\n")
        numbered = [(number, line) for number, line in enumerate(lines) if line.strip() or len(lines) == 1]
        return [(number, self._at_line(number, lambda line=line: self.parse(line))) for number, line in numbered]

    def _at_line(self, number: int, call: Callable[[], Any]) -> Any:
        """`call()`, and the failure says the line of the descriptor, which is `number` lines after the first here."""
        try:
            return call()
        except VmfsError as error:
            error.line = self._numbered(error, number)
            raise

    def _numbered(self, error: VmfsError, number: int) -> int | None:
        before = self._first + number
        if error.line is not None:
            return error.line + before
        return before + 1 if before else None

    async def _do(self, steps: list[tuple[int, Do]], text: str, rest: str, again: int) -> None:
        if not self._stands():
            self._undo = None  # something else has happened: what was before is none of this change
        kept = len(self._in_force) - again
        for one in reversed(self._in_force[kept:]):
            if one.undo is not None:
                await value_of(one.undo.take_back(), self)
        if again and self._undo is not None:
            self._undo = self._undo.renewed()
        del self._in_force[kept:]
        undo = None
        for number, do in steps:
            try:
                undo = await value_of(do(), self)
            except VmfsError as error:
                error.line = self._numbered(error, number)
                raise
            if undo is not None:
                self._undo = undo.after(self._undo)
        self._waiting = rest
        if "\n" in text and kept:
            self._finish_line()
            self._before -= 1
        if rest or text[-1:] == "\n":
            self._before += text.count("\n")
            return
        if not self.whole:  # each line is a change for itself
            head, newline, text = text.rpartition("\n")
            self._before += (head + newline).count("\n")
        self._in_force.append(_Text(text, undo))
        del self._in_force[:-MOST_IN_FORCE]

    async def _fail(self, error: Exception) -> None:
        undo, self._undo = self._undo, None
        self._waiting, self._in_force = "", []
        self._decoder.reset()
        if not self.acts:
            self._failure, self._failed_at = error, time.monotonic()
        if undo is not None and undo.stands():
            await value_of(undo.take_back(), self)
