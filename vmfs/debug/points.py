"""The points of a machine, which stop it: ids, conditions, counts, and what the engine is asked for.

A point is a stop (`vmfs.words.stops`) with options. The engine stops for each that is enabled; whether the stop is
anybody's to see, `reached` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from vmfs.debug.conditions import (
    Condition,
    Looker,
    Resolve,
    Unreadable,
    no_symbols,
    parse_address,
    parse_condition,
)
from vmfs.engine.base import DebugRequest
from vmfs.words.errors import Invalid, LimitReached
from vmfs.words.numbers import parse_number
from vmfs.words.stops import (
    EXCEPTIONS,
    Breakpoint,
    ChangeStop,
    Cr3Stop,
    ModeStop,
    PortStop,
    Stop,
    UnclaimedStop,
    UnwrittenStop,
    VectorStop,
    Watchpoint,
)

MOST = 1 << 16  # of a machine: they live in the server's memory, and every change is told to the engine whole
LONGEST_WATCH = 4096
UNTIL = 0  # the id of the temporary breakpoint of a run; points have others


# ---- options


@dataclass(frozen=True, slots=True)
class Options:
    """When a stop counts, and what becomes of it. `ignore`: so many times it does not stop."""

    condition: Condition | None = None
    ignore: int = 0
    once: bool = False
    enabled: bool = True
    hits: int = 0
    cpu: int | None = None  # the only one that stops for it


PLAIN = Options()
OPTIONS_USAGE = "[if COND] [ignore N] [once] [disabled] [cpu=K]"
_INFORMATION = re.compile(r"(by|unreadable|owner|at)=\S*")  # of a line that was read: the machine's to say
_COUNT_MOST = (1 << 63) - 1


def parse_options(text: str, resolve: Resolve = no_symbols) -> Options:
    """`if COND`, `ignore N`, `once`, `disabled`, `cpu=K` in any order, each at most once; `hits=N` as lines show it."""
    options, rest, seen = PLAIN, text.strip(), set[str]()
    while rest:
        word, _, rest = rest.partition(" ")
        rest = rest.strip()
        key = word.partition("=")[0]
        if key in seen:
            raise Invalid(f"{key[:40]!r} is there twice")
        seen.add(key)
        if word == "if":
            condition, rest = parse_condition(rest, resolve)
            options = replace(options, condition=condition)
        elif word == "ignore":
            count, _, rest = rest.partition(" ")
            options = replace(options, ignore=_count(count, "ignore"))
        elif word == "once":
            options = replace(options, once=True)
        elif word == "disabled":
            options = replace(options, enabled=False)
        elif key == "hits" and "=" in word:
            options = replace(options, hits=_count(word.partition("=")[2], "hits"))
        elif key == "cpu" and "=" in word:
            options = replace(options, cpu=_count(word.partition("=")[2], "cpu"))
        elif not _INFORMATION.fullmatch(word):
            raise Invalid(f"there is no {word[:40]!r} here: {OPTIONS_USAGE}")
    return options


def _count(text: str, what: str) -> int:
    number = parse_number(text, what=what)
    if number > _COUNT_MOST:
        raise Invalid(f"{what}: {text[:40]} is too many")
    return number


# ---- arguments of the verbs


def parse_watched(text: str, resolve: Resolve = no_symbols) -> tuple[int, bool]:
    """`ADDR` or `phys:ADDR`: the address, and whether it is guest-physical."""
    physical = text.startswith("phys:")
    return parse_address(text.removeprefix("phys:"), resolve), physical


def parse_access(text: str) -> tuple[bool, bool]:
    """`r`, `w` or `rw`: on reads, on writes."""
    if text not in ("r", "w", "rw"):
        raise Invalid(f"watch: {text[:40]!r} is not r, w or rw")
    return "r" in text, "w" in text


def parse_ports(text: str) -> tuple[int, int]:
    """`PORT` or `PORT-PORT`: the first and the last."""
    first, dash, last = text.partition("-")
    if not first or (dash and not last):
        raise Invalid(f"PORT: {text[:40]} is neither a port nor a range of ports")
    numbers = [parse_number(part, what="PORT") for part in ((first, last) if dash else (first,))]
    if max(numbers) > 0xFFFF:
        raise Invalid(f"PORT: {text[:40]} is no port: 0 to 0xffff")
    if numbers[0] > numbers[-1]:
        raise Invalid(f"PORT: {text[:40]} ends before it begins")
    return numbers[0], numbers[-1]


def parse_vectors(text: str) -> tuple[int, ...]:
    """`14`, `#PF`, `pf`, or several of them and of ranges (`0-31`), with commas between them."""
    vectors: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low = _vector(first)
        high = _vector(last) if dash else low
        if low > high:
            raise Invalid(f"VECTOR: {part[:40]!r} ends before it begins")
        vectors.update(range(low, high + 1))
    return tuple(sorted(vectors))


def _vector(text: str) -> int:
    name = text.upper()
    for known in (name, f"#{name}"):
        if known in EXCEPTIONS:
            return EXCEPTIONS[known]
    try:
        vector = parse_number(text, what="VECTOR")
    except Invalid:
        raise Invalid(f"VECTOR: {text[:40]!r} is neither a number nor an exception as #PF") from None
    if vector > 255:
        raise Invalid(f"VECTOR: {text[:40]} is more than 255")
    return vector


# ---- points

# `on WHAT`
ON: Mapping[str, type[ChangeStop]] = {kind.CAUSE: kind for kind in (ModeStop, Cr3Stop, UnwrittenStop, UnclaimedStop)}


@dataclass(frozen=True, slots=True)
class Point:
    """A stop with its options. `owner`: what made it, a gdb connection; empty: the `debug` file."""

    stop: Stop
    options: Options
    owner: str = ""

    @property
    def id(self) -> int:
        return self.stop.id


WayOf = Callable[[int, int | None], str]  # of a point's id, and the only CPU that stops for it


@dataclass(slots=True)
class _Counts:
    hits: int
    ignored: int = 0  # of Options.ignore
    unreadable: int = 0  # how often the condition could not be evaluated


class Points:
    """What a machine stops for. `stepping`: every run executes one instruction (`1` in the debug file).

    Changes are made to a `copy`, which takes the place of the original when all of them worked: so the lines
    of one write take effect together or not at all. Methods that change return the object, so that they can
    be chained; `last_id` is then the id of the point added last. Ids are never used twice.
    """

    def __init__(self) -> None:
        self.stepping = False
        self._by_id: dict[int, Point] = {}
        self._counts: dict[int, _Counts] = {}
        self._known: dict[tuple[str, str, str, int | None], int] = {}  # owner, stop, condition, CPU: its id
        self._next_id = UNTIL + 1
        self._requests: dict[int, DebugRequest] = {}  # of the points as they are, once they were asked for

    def copy(self) -> Points:
        other = Points()
        other.stepping = self.stepping
        other._by_id = dict(self._by_id)
        other._counts = {id_: replace(counts) for id_, counts in self._counts.items()}
        other._known = dict(self._known)
        other._next_id = self._next_id
        return other

    def skip_ids(self, last: int) -> Points:
        """Points to come get ids after `last`."""
        self._next_id = max(self._next_id, last + 1)
        return self

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def last_id(self) -> int:
        return self._next_id - 1

    # ---- changing

    def set_stepping(self, on: bool) -> Points:
        self.stepping, self._requests = on, {}
        return self

    def add_break(self, address: int, options: Options = PLAIN, *, owner: str = "") -> Points:
        """Before the instruction at a linear address."""
        return self._add(lambda id_: Breakpoint(id_, address), options, owner)

    def add_watch(
        self,
        address: int,
        length: int,
        on_read: bool,
        on_write: bool,
        options: Options = PLAIN,
        *,
        physical: bool = False,
        owner: str = "",
    ) -> Points:
        """After an instruction that accesses one of `length` (1 to 4096) bytes."""
        if not 1 <= length <= LONGEST_WATCH:
            raise Invalid(f"watch: {length} is no length: 1 to {LONGEST_WATCH} bytes")
        if address + length > 1 << 64:
            raise Invalid(f"watch: {length} bytes at {address:#x} go beyond the address space")
        return self._add(lambda id_: Watchpoint(id_, address, length, on_read, on_write, physical), options, owner)

    def add_iobreak(self, first: int, last: int, options: Options = PLAIN, *, owner: str = "") -> Points:
        """After an access to one of the ports from `first` to `last`."""
        return self._add(lambda id_: PortStop(id_, first, last), options, owner)

    def add_catch(self, vectors: tuple[int, ...], options: Options = PLAIN, *, owner: str = "") -> Points:
        """Before one of these exceptions is delivered."""
        return self._add(lambda id_: VectorStop(id_, vectors), options, owner)

    def add_on(self, what: str, options: Options = PLAIN, *, owner: str = "") -> Points:
        """After an instruction that changes the `mode` of the CPU, or its `cr3`, or reads what is `unwritten`, or
        accesses what is `unclaimed`."""
        if what not in ON:
            raise Invalid(f"on: {what[:40]!r} is not {' or '.join(ON)}")
        return self._add(ON[what], options, owner)

    def _add(self, make: Callable[[int], Stop], options: Options, owner: str) -> Points:
        point = Point(make(self._next_id), options, owner)
        key = self._key(point)
        if key in self._known:
            raise Invalid(f"there is such a point already, {self._known[key]}: {point.stop.text()}")
        if len(self) >= MOST:
            raise LimitReached(f"a machine has at most {MOST} points")
        self._by_id[point.id] = point
        self._counts[point.id] = _Counts(options.hits)
        self._known[key] = point.id
        self._next_id += 1
        self._requests = {}
        return self

    @staticmethod
    def _key(point: Point) -> tuple[str, str, str, int | None]:
        condition = point.options.condition
        return point.owner, point.stop.text(), condition.text if condition else "", point.options.cpu

    def delete(self, id_: int) -> Points:
        point = self._find(id_, "delete")
        del self._by_id[id_], self._counts[id_], self._known[self._key(point)]
        self._requests = {}
        return self

    def delete_all(self) -> Points:
        self._by_id, self._counts, self._known, self._requests = {}, {}, {}, {}
        return self

    def delete_of(self, owner: str) -> Points:
        """All points of an owner, if there are any."""
        for point in self.of(owner):
            self.delete(point.id)
        return self

    def enable(self, id_: int, on: bool = True) -> Points:
        point = self._find(id_, "enable" if on else "disable")
        self._by_id[id_] = replace(point, options=replace(point.options, enabled=on))
        self._requests = {}
        return self

    def enable_all(self, on: bool = True) -> Points:
        for id_ in self._by_id:
            self.enable(id_, on)
        return self

    def ignore(self, id_: int, count: int) -> Points:
        """Do not stop the next `count` times."""
        point = self._find(id_, "ignore")
        self._by_id[id_] = replace(point, options=replace(point.options, ignore=count))
        self._counts[id_].ignored = 0
        return self

    def _find(self, id_: int, verb: str) -> Point:
        point = self._by_id.get(id_)
        if point is None:
            raise Invalid(f"{verb}: there is no point {id_}")
        return point

    # ---- what there is

    def of(self, owner: str) -> tuple[Point, ...]:
        return tuple(point for point in self._by_id.values() if point.owner == owner)

    def hits(self, id_: int) -> int:
        """How often it was reached while its condition held. Invalid where there is no such point."""
        self._find(id_, "hits")
        return self._counts[id_].hits

    def request(self, cpu: int = 0) -> DebugRequest:
        """What the engine shall stop that CPU for: the same object until something changes."""
        if cpu not in self._requests:
            stops = (
                point.stop
                for point in self._by_id.values()
                if point.options.enabled and point.options.cpu in (None, cpu)
            )
            self._requests[cpu] = DebugRequest(self.stepping, tuple(stops))
        return self._requests[cpu]

    def check_cpus(self, count: int) -> None:
        """Invalid where one is of a CPU that there is not."""
        for point in self._by_id.values():
            if point.options.cpu is not None and point.options.cpu >= count:
                raise Invalid(f"cpu={point.options.cpu}: there are {count}, from 0 on")

    def reached(self, ids: Iterable[int], looker: Looker) -> list[int]:
        """Count that the CPU came to stops with these ids, at once; those that it is to stop for, in their order.

        The condition comes first, then `ignore`. What the condition cannot read makes it false, and is
        counted. Points that were deleted meanwhile are none.
        """
        wanted = []
        for id_ in ids:
            point = self._by_id.get(id_)
            if point is None or not point.options.enabled:
                continue
            counts = self._counts[id_]
            try:
                if point.options.condition and not point.options.condition.holds(looker):
                    continue
            except Unreadable:
                counts.unreadable += 1
                continue
            counts.hits += 1
            if counts.ignored < point.options.ignore:
                counts.ignored += 1
            else:
                wanted.append(id_)
        return wanted

    def is_once(self, id_: int) -> bool:
        point = self._by_id.get(id_)
        return point is not None and point.options.once

    # ---- text

    def text(self, way_of: WayOf | None = None, label: Callable[[int], str] | None = None) -> str:
        """The `debug` file: whether it steps, then a line a point. `way_of`: how the engine watches for it;
        `label`: the symbol at a linear address, or nothing."""
        lines = (str(int(self.stepping)), *(self._line(one, way_of, label) for one in self._by_id.values()))
        return "".join(f"{line}\n" for line in lines)

    def _line(self, point: Point, way_of: WayOf | None, label: Callable[[int], str] | None) -> str:
        options, counts = point.options, self._counts[point.id]
        words = [str(point.id), point.stop.text()]
        if options.condition:
            words += ["if", options.condition.text]
        if options.ignore > counts.ignored:
            words += ["ignore", str(options.ignore - counts.ignored)]
        if options.once:
            words.append("once")
        if not options.enabled:
            words.append("disabled")
        if options.cpu is not None:
            words.append(f"cpu={options.cpu}")
        place = point.stop
        is_linear = isinstance(place, Breakpoint) or isinstance(place, Watchpoint) and not place.physical
        if label and is_linear and (name := label(place.address)):
            words.append(f"at={name}")
        words.append(f"hits={counts.hits}")
        if counts.unreadable:
            words.append(f"unreadable={counts.unreadable}")
        if point.owner:
            words.append(f"owner={point.owner}")
        if way_of and options.enabled:
            words.append(f"by={way_of(point.id, options.cpu)}")
        return " ".join(words)


# The field of DebugRequest that each kind of stop stands in.
