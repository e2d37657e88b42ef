"""Fuzzing on a fleet: each worker changes inputs for a while on its own, and the corpus that it sends back is shared.

As AFL has it: an input is of interest where it comes to a jump that none before it has taken, or takes it another
number of times (in the classes 1, 2, 3, 4-7, 8-15, 16-31, 32-127, 128 and more).
"""

from __future__ import annotations

import random
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

MAP = 1 << 14
_CLASSES = bytes(
    0
    if n == 0
    else 1
    if n == 1
    else 2
    if n == 2
    else 4
    if n == 3
    else 8
    if n < 8
    else 16
    if n < 16
    else 32
    if n < 32
    else 64
    if n < 128
    else 128
    for n in range(256)
)
_FAILURES_MOST = 100
_SAMPLE = 64  # inputs of the corpus that a slice gets
_GOOD_EXITS = ("hlt", "limit", "debug cause=breakpoint")


def is_bug(exit_: str) -> bool:
    """What is taken for a bug where nothing else is said: an exit that is no hlt, bound or breakpoint."""
    return bool(exit_) and not exit_.startswith(_GOOD_EXITS)


@dataclass
class Bug:
    input: bytes
    exit: str
    """The machine's last exit, or the sentence of what the function raised."""
    why: str = ""


@dataclass
class Campaign:
    """What a campaign has come to."""

    bugs: list[Bug] = field(default_factory=list)
    """One for each exit."""
    corpus: list[bytes] = field(default_factory=list)
    cases: int = 0
    edges: int = 0
    seconds: float = 0
    failures: list[str] = field(default_factory=list)
    """Of slices that came to nothing, as where an input took the process with it."""


@dataclass
class Slice:
    """What a worker gets: plain data."""

    seed: int
    seconds: float
    corpus: Sequence[bytes]
    seen: bytes
    words: Sequence[bytes]
    size_most: int
    first: Sequence[bytes]
    """Inputs that are run as they are."""


class Found(msgspec.Struct):
    """What comes back of a slice, from a process that may say anything."""

    found: list[tuple[bytes, bytes]]
    """Inputs that came to something new, and their maps, packed."""
    bugs: list[tuple[str, bytes]]
    cases: Annotated[int, msgspec.Meta(ge=0)]


def classify(coverage: bytes | bytearray) -> int:
    """A map of counts as a number: a bit for each jump and class."""
    return int.from_bytes(coverage.translate(_CLASSES), "little")


def change(data: bytes, corpus: Sequence[bytes], words: Sequence[bytes], rng: random.Random, most: int) -> bytes:
    """`data`, otherwise: bits, bytes, numbers, words, pieces of it or of another input."""
    found = bytearray(data)
    for _ in range(1 << rng.randrange(5)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(9):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                found[at : at + 1] = bytes((rng.randrange(256),))
            case 2:
                del found[at : at + rng.randrange(1, 1 + max(1, len(found) // 4))]
            case 3:
                found[at:at] = found[at : at + rng.randrange(1, 33)]
            case 4 if words:
                found[at:at] = rng.choice(words)
            case 5 if words:
                word = rng.choice(words)
                found[at : at + len(word)] = word
            case 6 if corpus:
                other = rng.choice(corpus)
                begin = rng.randrange(len(other) + 1)
                found[at:at] = other[begin : begin + rng.randrange(1, 65)]
            case 7 if found:
                at %= len(found)
                found[at] = (found[at] + rng.randrange(-35, 36)) & 0xFF
            case _:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice(
                    (0, 1, -1, 1 << 8 * size - 1, (1 << 8 * size - 1) - 1, rng.randrange(256), 16, 64, 100)
                )
                found[at : at + size] = (number & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("little", "big")))
    return bytes(found[:most])


def fuzz_slice(function: Callable[[Any, bytes], Any], bug: Callable[[str], bool], machine: Any, work: Any) -> dict:
    """What a worker does with a Slice: the inputs that came to something new, the exits that are bugs."""
    task = Slice(**work)
    rng, seen = random.Random(task.seed), int.from_bytes(zlib.decompress(task.seen), "little")
    corpus, found, bugs, cases = list(task.corpus), [], {}, 0
    start = machine.snapshot()
    coverage = machine.coverage(MAP)
    zeros = bytes(MAP)
    first = list(task.first)
    end = time.monotonic() + task.seconds
    while first or time.monotonic() < end:
        data = (
            first.pop()
            if first
            else change(rng.choice(corpus) if corpus else b"", corpus, task.words, rng, task.size_most)
        )
        coverage[:] = zeros
        machine.exit = None
        try:
            function(machine, data)
            exit_ = machine.exit.line() if machine.exit else ""
        except Exception as failure:
            exit_ = f"raised {type(failure).__name__}: {failure}"
        cases += 1
        if bug(exit_):
            if bugs.setdefault(exit_, data) == data or len(data) < len(bugs[exit_]):
                bugs[exit_] = data
        else:
            covered = classify(coverage)
            if covered | seen != seen:
                seen |= covered
                corpus.append(data)
                found.append((data, zlib.compress(covered.to_bytes(MAP, "little"), 1)))
        machine.unhook()
        machine.restore(start)
    return {"found": found, "bugs": list(bugs.items()), "cases": cases}


@dataclass
class Fuzzing:
    """The options of `Fleet.fuzz`, whose function(machine, data) puts an input into the machine and runs it.

    `template`: of a `vmfs.Machine`. The campaign ends after `seconds`, after `cases`, or with the first bug where
    `stop` is set. `bug(exit)`: whether a line of `exit` is one. `words`: what is put into inputs. `slice_seconds`: for
    so long a worker goes on without the others. `report(campaign)` is called after each slice.
    """

    template: Any
    seconds: float = 60.0
    cases: int | None = None
    stop: bool = False
    bug: Callable[[str], bool] = is_bug
    words: Sequence[bytes] = ()
    size_most: int = 4096
    slice_seconds: float = 2.0
    seed: int | None = None
    memory: int = 0
    report: Callable[[Campaign], None] = lambda campaign: None

    def run(self, fleet: Any, function: Callable[[Any, bytes], Any], seeds: Iterable[bytes]) -> Campaign:
        campaign, self._seen, self._rng = Campaign(), 0, random.Random(self.seed)
        self._first = [bytes(seed) for seed in seeds]
        self._ends = False
        began, known, bug = time.monotonic(), set(), self.bug

        def one(machine: Any, work: Any) -> dict:
            return fuzz_slice(function, bug, machine, work)

        results = fleet.map(
            one,
            self._slices(campaign, began),
            template=self.template,
            timeout=self.slice_seconds + 60,
            memory=self.memory,
            batch=1,
        )
        for result in results:
            try:
                sent, maps = _taken(result)
            except ValueError as failure:
                campaign.failures.append(str(failure))
                self._ends = self._ends or len(campaign.failures) > _FAILURES_MOST
                continue
            campaign.cases += sent.cases
            for data, covered in maps:
                if covered | self._seen != self._seen:
                    self._seen |= covered
                    campaign.corpus.append(data)
            for exit_, data in sent.bugs:
                if exit_ not in known:
                    known.add(exit_)
                    campaign.bugs.append(Bug(data, exit_))
            seen = self._seen.to_bytes(MAP, "little")
            campaign.edges, campaign.seconds = MAP - seen.count(0), time.monotonic() - began
            self._ends = self._ends or self.stop and bool(campaign.bugs)
            self._ends = self._ends or self.cases is not None and campaign.cases >= self.cases
            self.report(campaign)
        return campaign

    def _slices(self, campaign: Campaign, began: float) -> Iterator[dict[str, Any]]:
        """For as long as the campaign goes on; each has what is known when it is given out."""
        while not self._ends and (left := self.seconds - (time.monotonic() - began)) > 0:
            first, self._first = self._first, []
            corpus = campaign.corpus or first
            yield {
                "seed": self._rng.getrandbits(63) if self.seed is not None else secrets.randbits(63),
                "seconds": min(self.slice_seconds, left),
                "corpus": self._rng.sample(corpus, min(_SAMPLE, len(corpus))),
                "seen": zlib.compress(self._seen.to_bytes(MAP, "little"), 1),
                "words": list(self.words),
                "size_most": self.size_most,
                "first": first,
            }


def _taken(result: Any) -> tuple[Found, list[tuple[bytes, int]]]:
    """What a slice has found, and its inputs with what each covers. ValueError for what is no such thing."""
    if result.kind:
        raise ValueError(f"{result.kind}: {result.error}")
    try:
        sent = msgspec.convert(result.value, Found)
        return sent, [(data, int.from_bytes(_unpacked(packed), "little")) for data, packed in sent.found]
    except (ValueError, zlib.error) as failure:
        raise ValueError(f"value: a slice has no such result: {failure}") from None


def _unpacked(packed: bytes) -> bytes:
    """A map of a worker's, which may be anything."""
    data = zlib.decompressobj().decompress(packed, MAP + 1)
    if len(data) > MAP:
        raise ValueError("a worker has sent a map that is too long")
    return data
