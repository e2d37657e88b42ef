"""The exits' lines and structs: one vocabulary, checked as a whole."""

import struct

import pytest

from vmfs import exits

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
    (exits.Mmio(direction="read", addr=0xA0000, size=8, rip=9), "mmio direction=read addr=0xa0000 size=8 rip=0x9"),
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
