"""The emulator's 8254 and port 0x61: the data sheet's counts, outputs, gates, access forms, to the tick."""

import os
import shutil
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, os.path.dirname(__file__))
import irqchip_lib as chips  # noqa: E402
from irqchip_lib import INIT_PICS, NEVER, TICKS, Chip, latch, pic_state, pit_state, program  # noqa: E402

NO_GCC = None if shutil.which("gcc") else "gcc is not installed"
pytestmark = pytest.mark.skipif(NO_GCC is not None, reason=str(NO_GCC))


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return chips.given_or_built(tmp_path_factory)


@pytest.fixture
def chip(lib):
    with Chip(lib, 2) as one:
        yield one


def ns(ticks):
    """The first ns at which `ticks` of the 8254 have passed."""
    return -(-ticks * 10**9 // TICKS)


def at_tick(chip, start, ticks):
    """Move to the tick-th tick after `start`."""
    chip.advance(start + ns(ticks) - chip.now)


def status(chip, channel):
    chip.outb(0x43, 0xE0 | 2 << channel)
    return chip.inb(0x40 + channel)


# mode, count, bcd: the count after each number of ticks
COUNTS = [
    (0, 5, 0, {0: 5, 1: 4, 5: 0, 6: 0xFFFF, 7: 0xFFFE, 65541: 0}),
    (0, 0, 0, {0: 0, 1: 0xFFFF, 65535: 1, 65536: 0}),
    (2, 5, 0, {0: 5, 4: 1, 5: 5, 9: 1, 5 * 10**9: 5, 5 * 10**9 + 3: 2}),
    (3, 6, 0, {0: 6, 1: 4, 2: 2, 3: 6, 5: 2, 6: 6}),
    (3, 5, 0, {0: 4, 1: 2, 2: 0, 3: 4, 4: 2, 5: 4}),
    (4, 3, 0, {0: 3, 3: 0, 4: 0xFFFF}),
    (0, 0x1000, 1, {0: 0x1000, 1: 0x999, 1000: 0, 1001: 0x9999}),
    (2, 0, 1, {0: 0, 1: 0x9999, 9999: 1, 10000: 0}),
    (3, 0x10, 1, {0: 0x10, 1: 8, 5: 0x10}),
]


@pytest.mark.parametrize("mode,count,bcd,counts", COUNTS)
def test_pit_counts(chip, mode, count, bcd, counts):
    chip.advance(123)
    start = program(chip, 0, mode, count, bcd)
    for ticks, value in counts.items():
        at_tick(chip, start, ticks)
        assert latch(chip, 0) == value, ticks
        if ticks:
            with_one_less = start + ns(ticks) - 1
            assert (with_one_less - start) * TICKS // 10**9 == ticks - 1


# mode, count: ticks at which channel 0 interrupts, up to `until`
EDGES = [
    (0, 100, [100], 1000),
    (2, 100, [100, 200, 300], 399),
    (3, 100, [100, 200], 299),
    (3, 7, [7, 14, 21], 27),
    (4, 100, [101], 1000),
    (1, 100, [], 1000),
    (5, 100, [], 1000),
    (2, 1, [], 1000),
    (3, 1, [], 1000),
]


@pytest.mark.parametrize("mode,count,edges,until", EDGES)
def test_pit_interrupts(chip, mode, count, edges, until):
    chip.run(INIT_PICS)
    start = program(chip, 0, mode, count)
    seen = []
    while chip.deadline <= start + ns(until):
        due = chip.deadline
        chip.advance(due - 1 - chip.now)
        assert chip.pending() == -1
        chip.advance(1)
        assert chip.window() == [0x20]
        chip.outb(0x20, 0x20)
        seen.append(due)
    assert seen == [start + ns(edge) for edge in edges]


def test_pit_periods_do_not_drift(chip):
    """After a year of 65536-tick periods the deadline is exact, and missed ticks are one interrupt."""
    chip.run(INIT_PICS)
    start = program(chip, 0, 2, 0)
    periods = 365 * 86400 * TICKS // 65536
    at_tick(chip, start, periods * 65536)
    assert chip.deadline == start + ns((periods + 1) * 65536)
    assert chip.window() == [0x20]
    chip.outb(0x20, 0x20)
    assert chip.pending() == -1


# mode: (OUT after the control word, {ticks since the count was loaded, or triggered: OUT}) of a count of 4
OUTS = {
    0: (0, {0: 0, 3: 0, 4: 1, 100: 1}),
    1: (1, {0: 0, 3: 0, 4: 1, 100: 1}),
    2: (1, {0: 1, 2: 1, 3: 0, 4: 1, 7: 0}),
    3: (1, {0: 1, 1: 1, 2: 0, 3: 0, 4: 1, 6: 0}),
    4: (1, {0: 1, 3: 1, 4: 0, 5: 1}),
    5: (1, {0: 1, 3: 1, 4: 0, 5: 1}),
}


@pytest.mark.parametrize("mode", OUTS)
def test_pit_out_and_gate(chip, mode):
    initial, levels = OUTS[mode]
    triggered = mode in (1, 5)
    chip.outb(0x61, 0 if triggered else 1)
    chip.outb(0x43, 0xB0 | mode << 1)
    assert chip.inb(0x61) >> 5 & 1 == initial
    assert status(chip, 2) == initial << 7 | 0x40 | 0x30 | mode << 1  # null count
    chip.outb(0x42, 4)
    chip.outb(0x42, 0)
    if triggered:
        chip.advance(10**6)
        assert chip.inb(0x61) >> 5 & 1 == 1 and status(chip, 2) & 0x40
        chip.outb(0x61, 1)
    start = chip.now
    for ticks, level in levels.items():
        at_tick(chip, start, ticks)
        assert chip.inb(0x61) >> 5 & 1 == level, ticks
        assert status(chip, 2) == level << 7 | 0x30 | mode << 1


def test_pit_gate_holds_and_restarts(chip):
    chip.outb(0x61, 1)
    start = program(chip, 2, 0, 1000)
    at_tick(chip, start, 10)
    chip.outb(0x61, 0)
    chip.advance(10**6)
    assert latch(chip, 2) == 990
    chip.outb(0x61, 1)
    at_tick(chip, chip.now, 5)
    assert latch(chip, 2) == 985
    start = program(chip, 2, 2, 1000)
    at_tick(chip, start, 10)
    chip.outb(0x61, 0)
    assert chip.inb(0x61) >> 5 & 1 == 1
    chip.outb(0x61, 1)
    assert latch(chip, 2) == 1000
    start = program(chip, 2, 1, 1000)
    chip.outb(0x61, 0)
    chip.outb(0x61, 1)
    start = chip.now
    at_tick(chip, start, 10)
    chip.outb(0x61, 0)  # a falling gate does not matter, a rising one triggers again
    assert latch(chip, 2) == 990
    chip.outb(0x61, 1)
    assert latch(chip, 2) == 1000


def test_pit_new_count_waits_for_its_moment(chip):
    chip.run(INIT_PICS)
    start = program(chip, 0, 2, 100)
    at_tick(chip, start, 30)
    chip.outb(0x40, 50)
    chip.outb(0x40, 0)
    assert status(chip, 0) & 0x40 and latch(chip, 0) == 70
    assert chip.deadline == start + ns(100)
    at_tick(chip, start, 100)
    assert chip.window() == [0x20] and latch(chip, 0) == 50 and not status(chip, 0) & 0x40
    assert chip.deadline == start + ns(100) + ns(50)
    # Mode 3, in the high half: the low half is the new count's already.
    chip.outb(0x61, 1)
    start = program(chip, 2, 3, 100)
    at_tick(chip, start, 30)
    chip.outb(0x42, 20)
    chip.outb(0x42, 0)
    for tick, level in ((49, 1), (50, 0), (59, 0), (61, 1), (69, 1), (72, 0)):
        at_tick(chip, start, tick)
        assert chip.inb(0x61) >> 5 & 1 == level, tick


def test_pit_access_forms_and_latches(chip):
    start = program(chip, 0, 2, 0x1234)
    at_tick(chip, start, 4)
    assert (chip.inb(0x40), chip.inb(0x40)) == (0x30, 0x12)
    chip.outb(0x43, 0x00)
    at_tick(chip, start, 8)
    chip.outb(0x43, 0x00)  # a second latch does not disturb the first
    assert (chip.inb(0x40), chip.inb(0x40), chip.inb(0x40), chip.inb(0x40)) == (0x30, 0x12, 0x2C, 0x12)
    chip.outb(0x43, 0xC2)  # read-back of count and status: status comes first
    at_tick(chip, start, 12)
    assert (chip.inb(0x40), chip.inb(0x40), chip.inb(0x40), chip.inb(0x40)) == (0xB4, 0x2C, 0x12, 0x28)
    chip.inb(0x40)
    chip.outb(0x43, 0x14)  # LSB only
    chip.outb(0x40, 0x77)
    assert (latch_bytes(chip, 1), pit_state(chip.get_pit())[0][0]["count"]) == ([0x77], 0x77)
    chip.outb(0x43, 0x24)  # MSB only
    chip.outb(0x40, 0x77)
    assert (latch_bytes(chip, 1), pit_state(chip.get_pit())[0][0]["count"]) == ([0x77], 0x7700)
    assert status(chip, 0) == 0xA4
    assert chip.inb(0x43) == 0


def latch_bytes(chip, number):
    chip.outb(0x43, 0)
    return [chip.inb(0x40) for _ in range(number)]


@pytest.mark.parametrize("mode", [6, 7])
def test_pit_mode_bits_read_back_as_written(chip, mode):
    """Bit 2 is a "don't care" of modes 2 and 3; the status byte has it, and so has one whose state was moved."""
    chip.outb(0x61, 1)
    chip.outb(0x43, 0xB0 | mode << 1)
    assert status(chip, 2) == 0xF0 | mode << 1  # OUT is high, the count is not there yet
    assert chip.set_pit(chip.get_pit()) == 0
    assert status(chip, 2) == 0xF0 | mode << 1
    start = program(chip, 2, mode, 6)
    at_tick(chip, start, 4)
    assert status(chip, 2) == (mode == 6) << 7 | 0x30 | mode << 1  # mode 3 is low in the second half
    chip.outb(0x43, 0xB0 | mode - 4 << 1)
    assert status(chip, 2) == 0xF0 | mode - 4 << 1


def test_pit_mode_0_stops_at_the_first_byte(chip):
    chip.run(INIT_PICS)
    start = program(chip, 0, 0, 100)
    at_tick(chip, start, 50)
    chip.outb(0x40, 10)
    assert chip.deadline == NEVER
    at_tick(chip, start, 500)
    chip.outb(0x40, 0)
    assert chip.deadline == chip.now + ns(10)


def test_pit_pulse_leaves_another_driver_of_the_line(chip):
    """GSI 0 is the OR of the 8254 and of whatever else holds it."""
    chip.run(INIT_PICS)
    chip.line(0, 1)
    assert chip.window() == [0x20]
    start = program(chip, 0, 2, 100)
    at_tick(chip, start, 100)
    assert pic_state(chip.get_chip(0))["last_irr"] == 1
    chip.line(0, 0)
    assert pic_state(chip.get_chip(0))["last_irr"] == 0


def test_port_61(chip):
    chip.outb(0x61, 0xFF)
    assert chip.inb(0x61) & 0xCF == 0x03
    assert pit_state(chip.get_pit())[1] == 2  # KVM_PIT_FLAGS_SPEAKER_DATA_ON
    toggles = []
    for tick in range(0, 180, 18):
        at_tick(chip, 0, tick)
        toggles.append(chip.inb(0x61) >> 4 & 1)
    assert toggles == [0, 1] * 5
    chip.lib.irqchip_create_pit(chip.ptr, 0, chip.now)
    assert not chip.lib.irqchip_owns_port(chip.ptr, 0x61) and chip.lib.irqchip_owns_port(chip.ptr, 0x40)
    chip.lib.irqchip_remove_pit(chip.ptr)
    assert not chip.lib.irqchip_owns_port(chip.ptr, 0x40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.integers(0, 5),
    count=st.integers(2, 0x300),
    run=st.integers(0, 3000),
    more=st.integers(0, 3000),
    gate=st.booleans(),
)
def test_pit_state_goes_on_where_it_was(lib, mode, count, run, more, gate):
    """Out and in again at the same time: OUT and counts go on to the tick."""
    with Chip(lib) as one, Chip(lib) as two:
        for chip in (one, two):
            chip.outb(0x61, 0 if mode in (1, 5) else 1)
            program(chip, 2, mode, count)
            chip.outb(0x61, 1)
            program(chip, 0, 0 if mode in (1, 5) else mode, count)
            chip.advance(ns(run))
            chip.outb(0x61, gate)
        assert two.set_pit(one.get_pit()) == 0
        for chip in (one, two):
            chip.advance(ns(more))
        assert (one.deadline, latch(one, 0), latch(one, 2), one.inb(0x61)) == (
            two.deadline,
            latch(two, 0),
            latch(two, 2),
            two.inb(0x61),
        )
