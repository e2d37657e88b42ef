"""To find the first point that is bad, with several looked at in each round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vmfs.fleet.results import Result
from vmfs.words.errors import Invalid


def bisect(
    ask: Callable[[list[Any]], dict[int, Result]], good: int | Sequence[Any], bad: int | None, width: int
) -> Any:
    """`ask(points)` has a Result each, by the point's place. See `Fleet.bisect`."""
    if isinstance(good, int):
        if bad is None or bad <= good:
            raise Invalid("what is bad has to come after what is good")
        return _narrow(ask, lambda at: at, good, bad, width)
    points = list(good)
    if not points or bad is not None:
        raise Invalid("it is two numbers, or a list that has something")
    return points[_narrow(ask, points.__getitem__, -1, len(points) - 1, width)]


def _narrow(
    ask: Callable[[list[Any]], dict[int, Result]], point: Callable[[int], Any], low: int, high: int, width: int
) -> int:
    """The first bad place; `low` is good and `high` is bad."""
    while high - low > 1:
        count = min(width, high - low - 1)
        places = [low + (high - low) * (number + 1) // (count + 1) for number in range(count)]
        results = ask([point(place) for place in places])
        for number in range(count):
            if (result := results[number]).kind:
                raise Invalid(f"at {point(places[number])!r} the predicate failed ({result.kind}): {result.error}")
        is_bad = [bool(results[number].value) for number in range(count)]
        if is_bad != sorted(is_bad):
            there = dict(zip([point(place) for place in places], is_bad, strict=True))
            raise Invalid(f"what is good does not come before what is bad: {there!r}")
        first = is_bad.index(True) if True in is_bad else count
        low, high = (places[first - 1] if first else low), (places[first] if first < count else high)
    return high
