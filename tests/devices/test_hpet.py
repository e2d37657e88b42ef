"""HPET: its counter and comparators, and where their interrupts go."""

from __future__ import annotations

import pytest
from devices.fakes import pass_time, plain, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.devices.hpet import ADDRESS as A
from vmfs.devices.hpet import Comparator

CONFIG, STATUS, COUNTER = A + 0x10, A + 0x20, A + 0xF0
NARROW, PERIODIC, SETS, ENABLED, LEVEL, MESSAGES = 0x100, 8, 0x40, 4, 2, 0x4000


@pytest.fixture
def hpet(pc):
    return pc.devices["hpet"]


@pytest.fixture
def edges(pc):
    """The line of each edge, and when it came."""
    seen, was = [], pc.machine.irq_line

    def line(gsi, level):
        if level and not pc.machine.lines.get(gsi):
            seen.append((gsi, pc.machine.time))
        was(gsi, level)

    pc.machine.irq_line = line
    return seen


def comparator(guest, number, configuration, *values):
    guest.store(A + 0x100 + 0x20 * number, configuration, 4)
    for value in values:
        guest.store(A + 0x108 + 0x20 * number, value, 8)


def test_what_it_says_of_itself(guest, hpet):
    assert guest.load(A) == 0x8086_A201 and guest.load(A + 4) == 10_000_000
    assert guest.load(A, 8) == 10_000_000 << 32 | 0x8086_A201
    assert guest.load(A + 0x100, 8) == 0x00F0_0000 << 32 | 0x8030
    assert guest.load(A + 0x108, 8) == (1 << 64) - 1 and guest.load(A + 0x160) == 0
    guest.store(A, 0, 8)
    assert guest.load(A) == 0x8086_A201


def test_the_counter_counts_while_it_is_enabled(pc, guest, hpet):
    pass_time(pc, 12_345)
    assert guest.load(COUNTER, 8) == 0
    guest.store(COUNTER, 0xFFFF_FFFF_0000_0005, 8)
    guest.store(CONFIG, 1)
    pass_time(pc, 12_345 + 1_009)
    assert guest.load(COUNTER, 8) == 0xFFFF_FFFF_0000_0005 + 100
    assert guest.load(COUNTER) == 105 and guest.load(COUNTER + 4) == 0xFFFF_FFFF
    guest.store(COUNTER, 7, 8)
    assert guest.load(COUNTER) == 105, "it is written while it is halted"
    guest.store(CONFIG, 0)
    pass_time(pc, 1_000_000)
    assert guest.load(COUNTER) == 105
    guest.store(CONFIG, 1)
    assert guest.load(COUNTER) == 105


def test_once_and_periodically_on_a_line(pc, guest, hpet, edges):
    comparator(guest, 2, 20 << 9 | ENABLED, 10_000)
    comparator(guest, 1, 21 << 9 | ENABLED | PERIODIC | SETS, 5_000, 3_000)
    guest.store(CONFIG, 1)
    pass_time(pc, 150_000)
    assert edges == [(21, 50_000), (21, 80_000), (20, 100_000), (21, 110_000), (21, 140_000)]
    assert guest.load(A + 0x128, 8) == 17_000 and guest.load(STATUS) == 0
    guest.store(A + 0x120, 0)
    pass_time(pc, 900_000)
    assert len(edges) == 5
    guest.store(A + 0x140, 5 << 9 | ENABLED)
    assert guest.load(A + 0x140) >> 9 & 31 == 0, "a line that it cannot have"


def test_what_passed_while_nobody_looked_is_one_interrupt(pc, guest, hpet, edges):
    comparator(guest, 0, 20 << 9 | ENABLED | PERIODIC | SETS, 10, 10)
    guest.store(CONFIG, 1)
    pc.machine.time = 1_005
    assert guest.load(A + 0x108, 8) == 110 and edges == [(20, 1005)]


def test_32_bits_go_around(pc, guest, hpet, edges):
    guest.store(COUNTER, (7 << 32) + 0xFFFF_FFF0, 8)
    comparator(guest, 0, 20 << 9 | ENABLED | NARROW, 5)
    guest.store(CONFIG, 1)
    pass_time(pc, 1_000)
    assert edges == [(20, 210)]
    pass_time(pc, 210 + (10 << 32))
    assert edges == [(20, 210), (20, 210 + (10 << 32))]


def test_a_level_is_held_until_it_is_cleared(pc, guest, hpet):
    comparator(guest, 2, 22 << 9 | ENABLED | LEVEL, 10)
    guest.store(CONFIG, 1)
    pass_time(pc, 200)
    assert pc.machine.lines[22] and guest.load(STATUS) == 4
    guest.store(STATUS, 3)
    assert pc.machine.lines[22]
    guest.store(STATUS, 4)
    assert not pc.machine.lines[22] and guest.load(STATUS) == 0


def test_messages(pc, guest, hpet):
    guest.store(A + 0x110, 0xFEE0_1000 << 32 | 0x41, 8)
    comparator(guest, 0, MESSAGES | ENABLED, 10)
    guest.store(CONFIG, 1)
    pass_time(pc, 200)
    assert pc.machine.messages == [(0xFEE0_1000, 0x41)]


def test_legacy_replacement(pc, guest, hpet, edges):
    comparator(guest, 0, 20 << 9 | ENABLED, 10)
    comparator(guest, 1, ENABLED, 20)
    guest.store(CONFIG, 3)
    assert not pc.machine.timer_output
    for value, index in ((0x26, 10), (0x42, 11)):  # the clock's periodic interrupt
        guest.out(0x70, index)
        guest.out(0x71, value)
    pass_time(pc, 5_000_000)
    assert edges == [(0, 100), (8, 200)]
    guest.store(CONFIG, 1)
    assert pc.machine.timer_output and pc.machine.lines[8], "the clock has its line again"
    guest.store(CONFIG, 3)
    pc.reset()
    assert pc.machine.timer_output and guest.load(CONFIG) == 0


def test_reads_of_the_counter_in_c_are_those_of_python(pc, guest, hpet):
    """Whatever was done to it, they say the same, and a read changes nothing."""
    pass_time(pc, 10_000_000)

    def both():
        for offset, size in ((0xF0, 8), (0xF0, 4), (0xF4, 4), (0xF2, 2)):
            was = hpet.save()
            found = hpet.chip.read(0, offset, size)
            assert hpet.save() == was
            assert found == hpet.read(0, offset, size) & (1 << 8 * size) - 1, (offset, size)
        assert hpet.chip.read(0, 0xF4, 8) is None and hpet.chip.read(0, 0xE8, 8) is None
        assert not hpet.chip.write(0, 0xF0, 8, 1)

    both()
    for action in (
        lambda: guest.store(COUNTER, 0xFFFF_FFFF_FFFF_FF00, 8),
        lambda: guest.store(CONFIG, 1),
        lambda: guest.store(CONFIG, 0),
        lambda: guest.store(COUNTER, 3),
        lambda: guest.store(CONFIG, 1),
        lambda: hpet.load(hpet.save()),
        lambda: hpet.time_shifted(1_000_000),
        lambda: hpet.time_shifted(-3_000_000),
        hpet.reset,
    ):
        pass_time(pc, pc.machine.time + 12_345)
        both()
        action()
        both()


def test_legacy_replacement_needs_a_counter_that_counts(pc, guest, hpet):
    guest.store(CONFIG, 2)
    assert pc.machine.timer_output
    guest.store(CONFIG, 3)
    assert not pc.machine.timer_output
    guest.store(CONFIG, 2)
    assert pc.machine.timer_output


def test_a_period_in_two_halves(pc, guest, hpet, edges):
    """The value of a comparator that has met it is no part of what is written, half by half, to its period."""
    guest.store(COUNTER, 5 << 32, 8)
    comparator(guest, 0, 20 << 9 | ENABLED | PERIODIC | SETS)
    guest.store(A + 0x108, (5 << 32) + 100, 8)
    guest.store(A + 0x108, 2000)
    guest.store(A + 0x10C, 0)
    guest.store(CONFIG, 1)
    pass_time(pc, 45_000)
    assert edges == [(20, 1_000), (20, 21_000), (20, 41_000)]


def test_a_period_that_nobody_could_take(pc, guest, hpet, edges):
    comparator(guest, 0, 20 << 9 | ENABLED | PERIODIC | SETS, 1, 1)
    guest.store(CONFIG, 1)
    pass_time(pc, 100_000)
    assert edges == [(20, time) for time in range(10_000, 100_001, 10_000)]


def test_to_save_it_is_no_interrupt(pc, guest, hpet, edges):
    """What has come due and was not looked at yet interrupts the copy as it does the machine."""
    comparator(guest, 0, 20 << 9 | ENABLED, 100)
    guest.store(CONFIG, 1)
    pc.machine.time = 1_234
    state = plain(hpet)
    assert edges == [] and plain(hpet) == state and state["behind"] == 1_234
    hpet.load(hpet.unpack(1, hpet.pack()))
    assert edges == []
    pass_time(pc, 1_235)
    assert edges == [(20, 1_234)] or edges == [(20, 1_235)]
    assert guest.load(COUNTER) == 123


def test_states_that_cannot_be(hpet):
    state = plain(hpet)
    for change in ({"configuration": 4}, {"status": 8}, {"counter": b"\0"}, {"behind": -1}, {"comparators": []}):
        assert refuses(hpet, {**state, **change}), change
    wide = [0x100, bytes(4) + b"\1\0\0\0", bytes(8), bytes(8)]
    for one in ([5 << 9, *[bytes(8)] * 3], [0x80, *[bytes(8)] * 3], wide):
        assert refuses(hpet, {**state, "comparators": [one, *state["comparators"][1:]]}), one
    assert not refuses(hpet, state)


@given(value=st.integers(0, (1 << 32) - 1), period=st.integers(1, 1 << 20), counter=st.integers(0, (1 << 34)),
       ticks=st.integers(1, 1 << 22), narrow=st.booleans())  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_a_periodic_one_meets_all_its_values(value, period, counter, ticks, narrow):
    """In one look as in many."""
    at_once, often = (Comparator(0, PERIODIC | (NARROW if narrow else 0), value, period) for _ in range(2))
    met, passed = at_once.meets(counter, ticks), 0
    found = False
    while passed < ticks:
        step = min(max(ticks // 7, 1), ticks - passed)
        found |= often.meets(counter + passed, step)
        passed += step
    assert (met, at_once.value) == (found, often.value)


def test_acpi_is_told_of_the_clocks_interrupt(pc, guest, hpet):
    """Wherever its line goes: RTC_STS, and an interrupt by RTC_EN."""
    guest.store(CONFIG, 3)
    for value, index in ((0x26, 10), (0x12, 11)):  # once a second
        guest.out(0x70, index)
        guest.out(0x71, value)
    guest.out(0x602, 0x400, 2)
    pass_time(pc, 1_100_000_000)
    assert guest.inp(0x600, 2) & 0x400 and pc.machine.lines[9] and not pc.machine.lines.get(8)
    guest.out(0x600, 0x400, 2)
    pass_time(pc, 2_200_000_000)
    assert not guest.inp(0x600, 2) & 0x400 and not pc.machine.lines[9], "it is still up"
    guest.out(0x70, 12)
    guest.inp(0x71)
    pass_time(pc, 3_300_000_000)
    assert guest.inp(0x600, 2) & 0x400 and pc.machine.lines[9]
