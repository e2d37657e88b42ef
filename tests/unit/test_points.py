"""Points: ids, what is refused, and what the engine is asked for."""

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.debug import points as module
from vmfs.debug.points import Points
from vmfs.machine.files.commands import parse_commands
from vmfs.words.errors import Invalid, LimitReached
from vmfs.words.stops import Breakpoint


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
    assert [points.reached([id_], NOTHING) for id_ in (2, 2, 7)] == [[2], [2], []]
    assert points.text() == "1\n1 break 0x1000 hits=0\n2 break 0x2000 hits=2\n"
    request = points.request()
    assert request.step
    assert request.of(Breakpoint) == (Breakpoint(1, 0x1000), Breakpoint(2, 0x2000))


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
    assert other.reached([1], NOTHING) == [1]
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


@pytest.mark.parametrize("text", ["", "-", "-1", "5-", "5-3", "1-2-3", "0x10000", "x"])
def test_what_is_no_port(text):
    with pytest.raises(Invalid, match="^PORT: "):
        module.parse_ports(text)
    assert module.parse_ports("0x60-100") == (0x60, 100) and module.parse_ports("0xffff") == (0xFFFF, 0xFFFF)


def test_there_is_a_limit(monkeypatch):
    monkeypatch.setattr(module, "MOST", 3)
    points = Points().add_break(0).add_break(1).add_break(2)
    with pytest.raises(LimitReached):
        points.add_break(3)
    assert points.delete(1).add_break(3).last_id == 4


# ---- the text


NUMBERS = st.integers(0, (1 << 64) - 1)
CONDITIONS = st.sampled_from(["", "if rax==5", "if u8(rdi)!=0x2f&&cs==0x10", "if !(al&1)||[rsp+8]>>3"])
OPTIONS = st.tuples(
    CONDITIONS, st.sampled_from(["", "ignore 3", "ignore 0x10"]), st.sampled_from(["", "once"]), st.booleans()
).map(lambda parts: " ".join((*parts[:3], "" if parts[3] else "disabled")))
PLACES = st.one_of(
    NUMBERS.map(lambda address: f"break {address:#x}"),
    st.tuples(st.sampled_from(["", "phys:"]), st.integers(0, (1 << 64) - 4096), st.integers(1, 4096)).map(
        lambda parts: f"watch {parts[0]}{parts[1]} {parts[2]} rw"
    ),
    st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)).map(
        lambda pair: f"iobreak {min(pair):#x}-{max(pair):#x}"
    ),
    st.lists(st.integers(0, 255), min_size=1, max_size=9).map(lambda vectors: "catch " + ",".join(map(str, vectors))),
    st.sampled_from(["catch #PF", "catch pf,nmi,0x20-0x2f", "on mode", "on cr3"]),
)


def in_engine_terms(points: Points) -> set[tuple[object, ...]]:
    """What the engine is asked for, but for the ids."""
    return {(type(stop), *astuple(stop)[1:]) for stop in points.request().stops}


@given(st.lists(st.tuples(PLACES, OPTIONS).map(" ".join), max_size=12, unique=True), st.booleans())
def test_what_is_read_can_be_written(written, stepping):
    points = Points().set_stepping(stepping)
    for line in written:
        try:
            points = parse_commands("debug", line)(points)
        except Invalid as error:
            assert "there is such a point already" in str(error)
    text = points.text(lambda _id, _cpu: "engine", lambda address: "name+0x1" if address & 1 else "")
    again = parse_commands("debug", text)(Points())
    assert [line.partition(" ")[2] for line in again.text().splitlines()] == [
        line.partition(" ")[2] for line in points.text().splitlines()
    ]
    assert in_engine_terms(again) == in_engine_terms(points) and again.stepping == points.stepping


@given(st.lists(st.sampled_from(["1", "0", "on mode", "delete 1", "delete 9", "break x", "enable all", "watch 1 1"])))
def test_lines_take_effect_together_or_not_at_all(lines):
    points = Points().add_break(0x1000)
    before, copy = points.text(), points.copy()
    try:
        parse_commands("debug", "\n".join(lines))(copy)
    except Invalid as error:
        assert str(error)
    assert points.text() == before and len(points) == 1
