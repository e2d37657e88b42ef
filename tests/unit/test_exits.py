"""The exits' lines and structs: one vocabulary, checked as a whole."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.words import exits
from vmfs.words.errors import Invalid

LINES = [
    (
        exits.Io(direction="out", port=0x3F8, size=1, count=1, data=b"A", rip=0x1003),
        "io direction=out port=0x3f8 size=1 count=1 data=0x41 rip=0x1003",
    ),
    (
        exits.Io(direction="out", port=0x80, size=2, count=2, data=b"\x01\x02\x03\x04", rip=0),
        "io direction=out port=0x80 size=2 count=2 data=0x201,0x403 rip=0x0",
    ),
    (
        exits.Io(direction="in", port=0x60, size=4, rip=0x7C00),
        "io direction=in port=0x60 size=4 count=1 rip=0x7c00",
    ),
    (
        exits.Mmio(direction="write", addr=0xFEE000B0, size=4, data=b"\0\0\0\x80", rip=9),
        "mmio direction=write addr=0xfee000b0 size=4 data=0x80000000 rip=0x9",
    ),
    (
        exits.Mmio(direction="read", addr=0xA0000, size=8, rip=9),
        "mmio direction=read addr=0xa0000 size=8 rip=0x9",
    ),
    (exits.Hlt(rip=0x1001), "hlt rip=0x1001"),
    (exits.Hlt(rip=0x1001, cpu=3), "hlt rip=0x1001 cpu=3"),
    (exits.Debug(cause="step", rip=2), "debug cause=step rip=0x2"),
    (exits.Debug(cause="breakpoint", id=7, rip=2), "debug cause=breakpoint id=7 rip=0x2"),
    (
        exits.Debug(cause="watchpoint", id=1, addr=0x2000, rip=2),
        "debug cause=watchpoint id=1 addr=0x2000 rip=0x2",
    ),
    (exits.Shutdown(rip=2), "shutdown cause=triple-fault rip=0x2"),
    (exits.Shutdown(cause="debug-exit", code=33, rip=2), "shutdown cause=debug-exit code=33 rip=0x2"),
    (exits.Interrupted(rip=2), "interrupted rip=0x2"),
    (exits.Limit(rip=2), "limit rip=0x2"),
    (exits.Error(reason='a "b"\nc', rip=2), 'error reason="a \\"b\\" c" rip=0x2'),
]


@pytest.mark.parametrize(("exit_", "line"), LINES, ids=[line for _, line in LINES])
def test_line(exit_, line):
    assert exit_.line() == line


def test_every_exit_has_a_line_here():
    assert {type(exit_) for exit_, _ in LINES} == set(exits.EXITS)


def test_reasons_and_codes_are_unique():
    assert len({exit_.CODE for exit_ in exits.EXITS}) == len(exits.EXITS)
    assert len({exit_.REASON for exit_ in exits.EXITS}) == len(exits.EXITS)


@pytest.mark.parametrize("exit_", [exit_ for exit_, _ in LINES])
def test_struct_is_64_bytes_and_starts_alike(exit_):
    packed = exit_.pack()
    assert len(packed) == exits.EXIT_STRUCT_SIZE
    assert struct.unpack_from("<IIQ", packed) == (exit_.CODE, exit_.cpu, exit_.rip)


def test_struct_keeps_the_first_bytes_of_a_long_string_output():
    exit_ = exits.Io(direction="out", port=1, size=1, count=100, data=bytes(range(100)), rip=0)
    assert exit_.pack()[16 + 8 :] == bytes(range(40))


def test_struct_ends_a_long_reason_with_nul():
    assert exits.Error(reason="x" * 500, rip=0).pack()[16:] == b"x" * 47 + b"\0"


@pytest.mark.parametrize(("exit_", "line"), LINES, ids=[line for _, line in LINES])
def test_a_line_is_read_back(exit_, line):
    parsed = exits.parse_exit(line + "\n")
    assert type(parsed) is type(exit_)
    assert parsed.line() == exit_.line()


NUMBERS = st.integers(0, 2**64 - 1)
EXITS = st.one_of(
    st.builds(
        lambda size, data, **rest: exits.Io(
            direction="out", size=size, count=len(data) // size, data=data[: len(data) // size * size], **rest
        ),
        size=st.sampled_from((1, 2, 4)),
        data=st.binary(min_size=4, max_size=300),
        port=st.integers(0, 0xFFFF),
        rip=NUMBERS,
    ),
    st.builds(
        lambda data, **rest: exits.Mmio(direction="write", size=len(data), data=data, **rest),
        data=st.binary(min_size=1, max_size=8),
        addr=NUMBERS,
        rip=NUMBERS,
    ),
    st.builds(
        exits.Debug,
        cause=st.sampled_from(exits.DEBUG_CAUSES),
        id=st.none() | st.integers(0, 2**32 - 1),
        addr=st.none() | NUMBERS,
        vector=st.none() | st.integers(0, 255),
        rip=NUMBERS,
        cpu=st.integers(0, 255),
    ),
    st.builds(
        exits.Error, reason=st.text(st.characters(blacklist_characters="\n"), max_size=200), rip=NUMBERS
    ),
)


@given(EXITS)
def test_any_exit_is_read_back_whole(exit_):
    assert exits.parse_exit(exit_.line()) == exit_


@given(st.text(max_size=120) | st.sampled_from([f"{line[:-3]}=x" for _, line in LINES]))
def test_what_no_exit_writes_is_refused(text):
    try:
        parsed = exits.parse_exit(text)
    except Invalid:
        return
    assert parsed.line() == text.removesuffix("\n")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "hlt",
        "hlt rip=1",
        "hlt  rip=0x1",
        "hlt rip=0x1 extra=1",
        "io direction=up port=0x1 size=1 count=1 rip=0x1",
        "io direction=in port=0x10000 size=1 count=1 rip=0x1",
        "mmio direction=out addr=0x1 size=1 data=0x1 rip=0x1",
        "debug cause=whim rip=0x1",
        "halt rip=0x1",
        'error reason="a" b" rip=0x1',
        "hlt rip=0x10000000000000000",
    ],
)
def test_a_line_that_is_nearly_right_is_refused(line):
    with pytest.raises(Invalid):
        exits.parse_exit(line)


@pytest.mark.parametrize("cpu", [0, 3])
def test_a_line_of_a_machine_with_several_cpus_is_read_back(cpu):
    line = exits.Limit(rip=5, cpu=cpu, of_several=True).line()
    assert line.endswith(f" cpu={cpu}") and exits.parse_exit(line).line() == line
