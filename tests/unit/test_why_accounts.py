"""What `why` makes of what a CPU has noted."""

from __future__ import annotations

import pytest

from vmfs.debug.why import _on_the_way
from vmfs.engine.base import Fault


def raised(*counts: int) -> list[Fault]:
    fields = dict.fromkeys(Fault.__dataclass_fields__, 0)
    return [Fault(**fields | {"instructions": count}) for count in counts]


@pytest.mark.parametrize(
    "noted, last",
    [((), 0), ((5,), 1), ((5, 6, 6, 9), 4), ((90, 91, 5, 7, 7), 3), ((90, 4, 80, 5), 1), ((50, 60, 70, 65, 66), 2)],
)
def test_exceptions_of_another_way_are_left_out(noted, last):
    """A machine that has been sent through its past, or was put back, has taken some that did not lead here."""
    faults = raised(*noted)
    assert _on_the_way(faults) == faults[len(faults) - last :]


def test_an_engine_that_tells_of_none():
    assert _on_the_way(None) is None
