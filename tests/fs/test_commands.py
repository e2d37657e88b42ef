"""COMMANDS: what parses, what does not, and that nothing but a VmfsError ever comes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.debug.points import Points
from vmfs.fs.tree import check_name
from vmfs.machine.files.commands import COMMANDS, parse_command, parse_commands
from vmfs.machine.files.contents import dirty_ranges
from vmfs.machine.files.lines import decoded
from vmfs.machine.runloop import UNBOUND, Bound
from vmfs.words.errors import Invalid, VmfsError
from vmfs.words.stops import Breakpoint

NUMBERS = st.integers(0, (1 << 64) - 1)
WORDS = sorted({command.name for row in COMMANDS.values() for command in row if command.name})


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("run", UNBOUND),
        (" run\n", UNBOUND),
        ("step", Bound(steps=1)),
        ("step 0x10", Bound(steps=16)),
        ("until 0xffffffff80000000", Bound(until=0xFFFFFFFF80000000)),
        ("insns 1000000", Bound(instructions=1000000)),
        ("for 100ms", Bound(seconds=0.1)),
        ("for 1.5s", Bound(seconds=1.5)),
    ],
)
def test_bounds(text, bound):
    assert parse_command("vm_run", text)(UNBOUND) == bound


@given(st.lists(NUMBERS, min_size=1, max_size=20, unique=True), st.booleans())
def test_breakpoints_round_trip(addresses, stepping):
    text = "".join(f"break {address:#x}\n" for address in addresses) + f"{int(stepping)}\n"
    points = parse_commands("debug", text)(Points())
    asked = points.request()
    assert [point.address for point in asked.of(Breakpoint)] == addresses and points.stepping == stepping
    assert len(parse_commands("debug", "delete all")(points.copy())) == 0
    for point in asked.of(Breakpoint):
        points = parse_commands("debug", f"delete {point.id}")(points)
    assert len(points) == 0


@given(NUMBERS)
def test_numbers_are_taken_in_decimal_and_hexadecimal(number):
    for text in (str(number), f"{number:#x}"):
        assert parse_command("vm_run", f"until {text}")(UNBOUND) == Bound(until=number)


@given(
    st.sampled_from(sorted(COMMANDS)),
    st.one_of(
        st.text(max_size=80),
        st.lists(st.sampled_from(WORDS) | st.text(max_size=9) | NUMBERS.map(str), max_size=6).map(" ".join),
    ),
)
def test_hostile_input_is_refused_or_parsed(file, text):
    for parse in (parse_command, parse_commands):
        try:
            assert callable(parse(file, text))
        except VmfsError as error:
            assert isinstance(error, Invalid)
            assert 0 < len(str(error)) < 1000 and "\n" not in str(error)


@given(st.binary(max_size=200))
def test_what_is_no_text_is_refused(data):
    try:
        text = decoded(data)
    except Invalid:
        return
    assert text.encode() == data and "\0" not in text


def test_a_command_that_is_none_names_those_there_are():
    with pytest.raises(Invalid, match="there is no 'tbreak': `1`, `0`, `break ADDR .*`, .*`delete ID|all`"):
        parse_command("debug", "tbreak 1")
    with pytest.raises(Invalid, match="line 1: a number other than 1 and 0 is no command: `1`, `0`"):
        parse_commands("debug", "2")
    with pytest.raises(Invalid, match=r"it is `step \[N\]`"):
        parse_command("vm_run", "step 1 2")
    with pytest.raises(Invalid, match="line 2: ADDR: 'x' is neither a number nor a symbol"):
        parse_commands("debug", "1\nbreak x")
    with pytest.raises(Invalid, match="line 3: delete: there is no point 7"):
        parse_commands("debug", "1\n\ndelete 7")(Points())


@given(st.text(max_size=70))
def test_names(name):
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    good = 0 < len(name) <= 64 and set(name) <= allowed and not name.startswith(".")
    try:
        check_name(name)
        assert good
    except Invalid:
        assert not good


@given(st.sets(st.integers(0, 300)))
def test_dirty_ranges(pages):
    log = bytearray(40)
    for page in pages:
        log[page // 8] |= 1 << page % 8
    ranges = list(dirty_ranges(bytes(log)))
    assert {page for at, length in ranges for page in range(at // 4096, (at + length) // 4096)} == pages
    assert all(at + length < after for (at, length), (after, _) in zip(ranges, ranges[1:], strict=False))
