"""Points: ids, what is refused, and what the engine is asked for."""

import pytest

from vmfs.debug import points as module
from vmfs.debug.points import Points
from vmfs.engine.base import Breakpoint
from vmfs.errors import Invalid, LimitReached


class Nothing:
    """A CPU that no condition may look at."""

    def register(self, name: str) -> int:
        raise AssertionError(name)

    def read(self, linear: int, size: int) -> bytes:
        raise AssertionError(linear)


NOTHING = Nothing()


def test_ids_are_never_used_twice():
    points = Points().add_break(0x1000).add_break(0x2000).delete(2).add_break(0x3000)
    assert points.text() == "0\n1 break 0x1000 hits=0\n3 break 0x3000 hits=0\n"
    assert points.delete_all().add_break(0x1000).text() == "0\n4 break 0x1000 hits=0\n"


def test_text_and_request_say_the_same():
    points = Points().add_break(0x1000).add_break(0x2000).set_stepping(True)
    assert [points.reached([id_], NOTHING) for id_ in (2, 2, 7)] == [2, 2, None]
    assert points.text() == "1\n1 break 0x1000 hits=0\n2 break 0x2000 hits=2\n"
    request = points.request()
    assert request.step
    assert request.breakpoints == (Breakpoint(1, 0x1000), Breakpoint(2, 0x2000))


def test_a_request_is_made_anew_after_each_change():
    points = Points().add_break(0x1000)
    first = points.request()
    assert points.request() is first
    changes = (
        lambda: points.add_break(0x2000),
        lambda: points.set_stepping(True),
        lambda: points.delete(1),
        lambda: points.delete_all(),
    )
    for change in changes:
        change()
        assert points.request() != first
        first = points.request()


def test_a_copy_is_apart():
    points = Points().add_break(0x1000)
    other = points.copy().add_break(0x2000).set_stepping(True)
    assert other.reached([1], NOTHING) == 1
    assert points.text() == "0\n1 break 0x1000 hits=0\n"
    assert other.text() == "1\n1 break 0x1000 hits=1\n2 break 0x2000 hits=0\n"
    assert (len(points), len(other)) == (1, 2)


def test_what_cannot_be():
    points = Points().add_break(0x1000)
    with pytest.raises(Invalid):
        points.add_break(0x1000)
    with pytest.raises(Invalid):
        points.delete(2)
    assert points.text() == "0\n1 break 0x1000 hits=0\n"


def test_there_is_a_limit(monkeypatch):
    monkeypatch.setattr(module, "MOST", 3)
    points = Points().add_break(0).add_break(1).add_break(2)
    with pytest.raises(LimitReached):
        points.add_break(3)
    assert points.delete(1).add_break(3).last_id == 4
