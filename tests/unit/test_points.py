"""Points is a value: changes are made together or not at all."""

import pytest

from vmfs.debug.points import MOST, Points
from vmfs.engine.base import Breakpoint
from vmfs.errors import Invalid, LimitReached


def test_ids_are_never_used_twice():
    points = Points().with_break(0x1000).with_break(0x2000).without(2).with_break(0x3000)
    assert [point.id for point in points.points] == [1, 3]
    assert points.without_all().with_break(0x1000).points[0].id == 4


def test_text_and_request_say_the_same():
    points = Points().with_break(0x1000).with_break(0x2000).with_stepping(True).with_hit(2).with_hit(2)
    assert points.text() == "1\n1 break 0x1000 hits=0\n2 break 0x2000 hits=2\n"
    request = points.request()
    assert request.step
    assert request.breakpoints == (Breakpoint(1, 0x1000), Breakpoint(2, 0x2000))


def test_what_cannot_be():
    points = Points().with_break(0x1000)
    with pytest.raises(Invalid):
        points.with_break(0x1000)
    with pytest.raises(Invalid):
        points.without(2)


def test_there_is_a_limit():
    points = Points()
    for address in range(MOST):
        points = points.with_break(address)
    with pytest.raises(LimitReached):
        points.with_break(MOST)
    assert points.without(1).with_break(MOST).points[-1].id == MOST + 1
