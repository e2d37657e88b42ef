"""The emulator's 8259s, 8254, I/O APIC and local APICs: the manuals' tables, hostile input, and KVM as a twin.

The C is built here and driven alone (irqchip_lib.py).  Manuals: Intel 8259A, 8254 and 82093AA data sheets; Intel
SDM volume 3A, chapter "Advanced Programmable Interrupt Controller".
"""
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, os.path.dirname(__file__))
import irqchip_lib as chips  # noqa: E402
from irqchip_lib import (IDLE, IOAPIC, LAPIC, NEVER, Chip, Kvm, lapic_blob, lapic_registers, pic_state,  # noqa: E402
                         ioapic_state, pit_blob, pit_state, vectors)

GIVEN_LIBRARY = "VMFS_TEST_IRQCHIP_LIBRARY"
NO_GCC = None if shutil.which("gcc") else "gcc is not installed"
NO_KVM = chips.why_no_kvm()
pytestmark = pytest.mark.skipif(NO_GCC is not None, reason=str(NO_GCC))
needs_kvm = pytest.mark.skipif(NO_KVM is not None, reason=str(NO_KVM))

TICKS = 1193182
INIT_PICS = [("outb", 0x20, 0x11), ("outb", 0x21, 0x20), ("outb", 0x21, 4), ("outb", 0x21, 1),
             ("outb", 0xA0, 0x11), ("outb", 0xA1, 0x28), ("outb", 0xA1, 2), ("outb", 0xA1, 1)]
MASK_PICS = [("outb", 0x21, 0xFF), ("outb", 0xA1, 0xFF)]
ENABLE_LAPIC = [("store", LAPIC + 0xF0, 0x1FF)]


@pytest.fixture(scope="session")
def lib(tmp_path_factory):
    given_path = os.environ.get(GIVEN_LIBRARY)
    return chips.load(given_path or chips.build(tmp_path_factory.mktemp("irqchip")))


@pytest.fixture
def chip(lib):
    with Chip(lib, 2) as one:
        yield one


@pytest.fixture(scope="session")
def guest(tmp_path_factory):
    return chips.build_guest(tmp_path_factory.mktemp("guest"))


def ns(ticks):
    """The first ns at which `ticks` of the 8254 have passed."""
    return -(-ticks * 10**9 // TICKS)


def at_tick(chip, start, ticks):
    """Move to the tick-th tick after `start`."""
    chip.advance(start + ns(ticks) - chip.now)


def write_entry(chip, pin, low, destination=0):
    """A redirection entry, high half first."""
    for index, value in ((0x11 + 2 * pin, destination << 24), (0x10 + 2 * pin, low)):
        chip.store(IOAPIC, index)
        chip.store(IOAPIC + 0x10, value)


def read_entry(chip, pin):
    chip.store(IOAPIC, 0x10 + 2 * pin)
    low = chip.load(IOAPIC + 0x10)
    chip.store(IOAPIC, 0x11 + 2 * pin)
    return low | chip.load(IOAPIC + 0x10) << 32


# --- 8259 -------------------------------------------------------------------------------------------------

# (what is done after initialisation, the vectors then taken, ISR of the master, of the slave)
PIC_ROWS = {
    "fixed priority": ([("line", 5, 1), ("line", 3, 1)], [0x23], 0x08, 0),
    "nested": ([("line", 5, 1), ("window",), ("line", 3, 1)], [0x23], 0x28, 0),
    "lower waits": ([("line", 3, 1), ("window",), ("line", 5, 1)], [], 0x08, 0),
    "slave through cascade": ([("line", 12, 1)], [0x2C], 0x04, 0x10),
    "slave before IRQ 3": ([("line", 3, 1), ("line", 8, 1)], [0x28], 0x04, 0x01),
    "masked": ([("outb", 0x21, 0x08), ("line", 3, 1)], [], 0, 0),
    "slave masked at master": ([("outb", 0x21, 0x04), ("line", 9, 1)], [], 0, 0),
    "unmasked later": ([("outb", 0x21, 0x08), ("line", 3, 1), ("outb", 0x21, 0)], [0x23], 0x08, 0),
    "edge latched after the line fell": ([("line", 4, 1), ("line", 4, 0)], [0x24], 0x10, 0),
    "one edge, one interrupt": ([("line", 4, 1), ("window",), ("outb", 0x20, 0x20)], [], 0, 0),
    "level again after EOI": ([("outb", 0x4D0, 0x20), ("line", 5, 1), ("window",), ("outb", 0x20, 0x20)],
                              [0x25], 0x20, 0),
    "level gone": ([("outb", 0x4D0, 0x20), ("line", 5, 1), ("line", 5, 0)], [], 0, 0),
    "non-specific EOI ends the best": ([("line", 5, 1), ("window",), ("line", 3, 1), ("window",),
                                        ("outb", 0x20, 0x20)], [], 0x20, 0),
    "specific EOI": ([("line", 5, 1), ("window",), ("line", 3, 1), ("window",), ("outb", 0x20, 0x65)], [], 0x08, 0),
    "set priority: IRQ 4 is best": ([("outb", 0x20, 0xC3), ("line", 3, 1), ("line", 4, 1)], [0x24], 0x10, 0),
    "rotate on EOI": ([("line", 3, 1), ("window",), ("outb", 0x20, 0xA0), ("line", 3, 0), ("line", 3, 1),
                       ("line", 4, 1)], [0x24], 0x10, 0),
    "rotate on specific EOI": ([("line", 3, 1), ("window",), ("outb", 0x20, 0xE3), ("line", 3, 0), ("line", 3, 1),
                                ("line", 7, 1)], [0x27], 0x80, 0),
    "special mask lets lower ones in": ([("line", 3, 1), ("window",), ("outb", 0x21, 0x08), ("outb", 0x20, 0x68),
                                         ("line", 6, 1)], [0x26], 0x48, 0),
    "special mask reset": ([("line", 3, 1), ("window",), ("outb", 0x21, 0x08), ("outb", 0x20, 0x68),
                            ("outb", 0x20, 0x48), ("line", 6, 1)], [], 0x08, 0),
}


@pytest.mark.parametrize("row", PIC_ROWS)
def test_pic_priorities(chip, row):
    script, taken, master, slave = PIC_ROWS[row]
    chip.run(INIT_PICS)
    for op, *arguments in script:
        getattr(chip, op)(*arguments)
    assert chip.window() == taken
    assert (pic_state(chip.get_chip(0))["isr"], pic_state(chip.get_chip(1))["isr"]) == (master, slave)


def test_pic_modes(chip):
    chip.run(INIT_PICS)
    # Auto EOI, with rotation: the served input becomes the last.
    chip.run([("outb", 0x20, 0x11), ("outb", 0x21, 0x40), ("outb", 0x21, 4), ("outb", 0x21, 0x03), ("outb", 0x20, 0x80)])
    chip.line(1, 1)
    assert chip.window() == [0x41]
    state = pic_state(chip.get_chip(0))
    assert (state["isr"], state["priority_add"], state["rotate_on_auto_eoi"]) == (0, 2, 1)
    # Special fully nested: the slave interrupts itself through the master.
    chip.line(1, 0)
    chip.run(INIT_PICS[:3] + [("outb", 0x21, 0x11)])
    chip.line(14, 1)
    assert chip.window() == [0x2E]
    chip.line(9, 1)
    assert chip.window() == [0x29]


def test_pic_without_special_nesting_holds_the_slave(chip):
    chip.run(INIT_PICS)
    chip.line(14, 1)
    assert chip.window() == [0x2E]
    chip.line(9, 1)
    assert chip.pending() == -1
    chip.outb(0x20, 0x20)
    chip.outb(0xA0, 0x20)
    assert chip.window() == [0x29]


def test_pic_registers_and_poll(chip):
    chip.run(INIT_PICS)
    chip.outb(0x21, 0xA5)
    assert (chip.inb(0x21), chip.inb(0xA1)) == (0xA5, 0)
    chip.line(6, 1)
    chip.line(4, 1)
    assert chip.inb(0x20) == 0x50
    chip.window()
    chip.outb(0x20, 0x0B)
    assert chip.inb(0x20) == 0x10
    chip.outb(0x20, 0x0A)
    assert chip.inb(0x20) == 0x40
    # Poll: bit 7, the level, and it is an acknowledge; then the register read of before.
    chip.outb(0x20, 0x20)
    chip.outb(0x20, 0x0C)
    assert chip.inb(0x20) == 0x86
    assert pic_state(chip.get_chip(0))["isr"] == 0x40
    chip.outb(0x20, 0x0C)
    assert chip.inb(0x21) & 0x80 == 0
    assert chip.inb(0x21) == 0xA5
    chip.outb(0x4D0, 0xFF)
    chip.outb(0x4D1, 0xFF)
    assert (chip.inb(0x4D0), chip.inb(0x4D1)) == (0xF8, 0xDE)


def test_pic_spurious_slave_vector(chip):
    """A level request of the slave that is gone at the INTA: vector 15 of the pair, in service at the master only."""
    chip.run(INIT_PICS)
    chip.outb(0x4D1, 0x02)
    chip.line(9, 1)
    assert chip.pending() == 0x29
    chip.line(9, 0)
    assert chip.pending() == 0x2F
    assert chip.acknowledge() == 0x2F
    assert (pic_state(chip.get_chip(0))["isr"], pic_state(chip.get_chip(1))["isr"]) == (4, 0)


def test_pic_withdrawn_request_interrupts_nobody(chip):
    chip.run(INIT_PICS)
    chip.outb(0x4D0, 0x20)
    chip.line(5, 1)
    chip.line(5, 0)
    assert chip.pending() == -1 and chip.acknowledge() == -1


# --- 8254 -------------------------------------------------------------------------------------------------

def program(chip, channel, mode, count, bcd=0):
    """Control word and 16-bit count; the time of it."""
    chip.outb(0x43, channel << 6 | 0x30 | mode << 1 | bcd)
    chip.outb(0x40 + channel, count & 0xFF)
    chip.outb(0x40 + channel, count >> 8)
    return chip.now


def latch(chip, channel):
    chip.outb(0x43, channel << 6)
    low = chip.inb(0x40 + channel)
    return low | chip.inb(0x40 + channel) << 8


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
    (0, 100, [100], 1000), (2, 100, [100, 200, 300], 399), (3, 100, [100, 200], 299), (3, 7, [7, 14, 21], 27),
    (4, 100, [101], 1000), (1, 100, [], 1000), (5, 100, [], 1000), (2, 1, [], 1000), (3, 1, [], 1000),
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
    """After a year of 65536-tick periods the deadline is the exact one, and missed ticks are one interrupt."""
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
    0: (0, {0: 0, 3: 0, 4: 1, 100: 1}), 1: (1, {0: 0, 3: 0, 4: 1, 100: 1}),
    2: (1, {0: 1, 2: 1, 3: 0, 4: 1, 7: 0}), 3: (1, {0: 1, 1: 1, 2: 0, 3: 0, 4: 1, 6: 0}),
    4: (1, {0: 1, 3: 1, 4: 0, 5: 1}), 5: (1, {0: 1, 3: 1, 4: 0, 5: 1}),
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


def test_pit_mode_0_stops_at_the_first_byte(chip):
    chip.run(INIT_PICS)
    start = program(chip, 0, 0, 100)
    at_tick(chip, start, 50)
    chip.outb(0x40, 10)
    assert chip.deadline == NEVER
    at_tick(chip, start, 500)
    chip.outb(0x40, 0)
    assert chip.deadline == chip.now + ns(10)


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
@given(mode=st.integers(0, 5), count=st.integers(2, 0x300), run=st.integers(0, 3000), more=st.integers(0, 3000),
       gate=st.booleans())
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
        assert (one.deadline, latch(one, 0), latch(one, 2), one.inb(0x61)) == \
            (two.deadline, latch(two, 0), latch(two, 2), two.inb(0x61))


# --- I/O APIC ---------------------------------------------------------------------------------------------

def test_ioapic_registers(chip):
    chip.store(IOAPIC, 1)
    assert chip.load(IOAPIC + 0x10) == 0x00170011
    chip.store(IOAPIC, 0)
    chip.store(IOAPIC + 0x10, 0xFFFFFFFF)
    assert chip.load(IOAPIC + 0x10) == 0x0F000000
    chip.store(IOAPIC, 2)
    assert chip.load(IOAPIC + 0x10) == 0x0F000000
    chip.store(IOAPIC, 0x112)
    assert chip.load(IOAPIC) == 0x12
    chip.store(IOAPIC, 0x40)
    assert chip.load(IOAPIC + 0x10) == 0xFFFFFFFF
    chip.store(IOAPIC, 0x12)
    chip.store(IOAPIC + 0x10, 0x0001F0FF)
    assert chip.load(IOAPIC + 0x10) == 0x0001A0FF  # delivery status and remote IRR are read only
    assert chip.load(IOAPIC + 0x20) == 0


def test_ioapic_level(chip):
    chip.run(MASK_PICS + ENABLE_LAPIC)
    write_entry(chip, 10, 0x8050)
    chip.line(10, 1)
    assert read_entry(chip, 10) == 0xC050 and chip.window() == [0x50]
    registers = lapic_registers(chip.get_lapic())
    assert vectors(registers, 0x100) == vectors(registers, 0x180) == [0x50]
    chip.store(LAPIC + 0xB0, 0)  # still asserted: again
    assert chip.pending() == 0x50 and read_entry(chip, 10) == 0xC050
    chip.window()
    chip.line(10, 0)
    chip.store(LAPIC + 0xB0, 0)
    assert chip.pending() == -1 and read_entry(chip, 10) == 0x8050
    chip.line(10, 1)
    chip.store(IOAPIC, 0x24)
    chip.store(IOAPIC + 0x10, 0x10050)  # edge: remote IRR goes
    assert read_entry(chip, 10) == 0x10050


def test_ioapic_edge_and_mask(chip):
    chip.run(MASK_PICS + ENABLE_LAPIC)
    write_entry(chip, 4, 0x10041)
    chip.line(4, 1)
    write_entry(chip, 4, 0x41)
    assert chip.pending() == -1  # an edge while masked is lost
    chip.line(4, 1)
    assert chip.pending() == -1
    chip.line(4, 0)
    chip.line(4, 1)
    assert chip.window() == [0x41]
    write_entry(chip, 11, 0x18042)
    chip.line(11, 1)
    write_entry(chip, 11, 0x8042)
    chip.store(LAPIC + 0xB0, 0)
    assert chip.window() == [0x42]  # a level waits


# delivery mode: (bits, event) of one message to CPU 1
@pytest.mark.parametrize("mode,event", [(2, 0), (3, 0), (4, 1), (5, 2), (6, 4), (7, 0)])
def test_ioapic_delivery_modes(chip, mode, event):
    chip.run(MASK_PICS)
    write_entry(chip, 4, 0x9A | mode << 8, destination=1)
    chip.line(4, 1)
    assert chip.events(1) == event and chip.events(0) == 0
    if mode == 6:
        assert chip.lib.shim_sipi_vector(chip.ptr, 1) == 0x9A
    assert chip.lib.irqchip_take_events(chip.ptr, 1, 7) == event and chip.events(1) == 0


def test_routes(chip):
    route = chip.lib.irqchip_set_route
    assert route(chip.ptr, 0, 0, 2) == -chips.EINVAL  # GSI 2 has pin 2
    assert route(chip.ptr, 2, 0xFF, 0xFF) == 0 and route(chip.ptr, 0, 0, 2) == 0
    assert route(chip.ptr, 24, 0, 0) == route(chip.ptr, 1, 16, 1) == route(chip.ptr, 1, 1, 24) == -chips.EINVAL
    chip.line(0, 1)
    assert ioapic_state(chip.get_chip(2))["irr"] == 4 and pic_state(chip.get_chip(0))["irr"] == 1
    assert chip.line(24, 1) == -chips.EINVAL


# --- Local APIC -------------------------------------------------------------------------------------------

# offset: (written, then read), from reset and software enabled
LAPIC_WRITES = {
    0x20: (0xFFFFFFFF, 0xFF000000), 0x30: (0, 0x50014), 0x80: (0xFFFFFF5A, 0x5A), 0xA0: (0xFF, 0),
    0xD0: (0xFFFFFFFF, 0xFF000000), 0xE0: (0, 0x0FFFFFFF), 0xF0: (0xFFFFFFFF, 0x3FF), 0x300: (0x000C5030, 0x000C4030),
    0x310: (0xFFFFFFFF, 0xFF000000), 0x320: (0xFFFFFFFF, 0x700FF), 0x330: (0xFFFFFFFF, 0x107FF),
    0x340: (0xFFFFFFFF, 0x107FF), 0x350: (0xFFFFFFFF, 0x1A7FF), 0x360: (0xFFFFFFFF, 0x1A7FF),
    0x370: (0xFFFFFFFF, 0x100FF), 0x3E0: (0xFFFFFFFF, 0xB), 0x100: (0xFF, 0), 0x200: (0xFF, 0), 0x2F0: (0xFF, 0),
}


@pytest.mark.parametrize("offset", LAPIC_WRITES)
def test_lapic_register_bits(chip, offset):
    written, expected = LAPIC_WRITES[offset]
    chip.run(ENABLE_LAPIC)
    chip.store(LAPIC + offset, written)
    assert chip.load(LAPIC + offset) == expected


def test_lapic_access_sizes(chip):
    assert chip.load(LAPIC + 0x30, size=1) == 0x14 and chip.load(LAPIC + 0x32, size=2) == 5
    assert chip.load(LAPIC + 0x34) == 0 and chip.load(LAPIC + 0x31) == 0
    chip.lib.irqchip_lapic_write(chip.ptr, 0, 0x80, 1, 0x55, 0)
    chip.lib.irqchip_lapic_write(chip.ptr, 0, 0x84, 4, 0x55, 0)
    assert chip.load(LAPIC + 0x80) == 0


# TPR, vectors in service, vectors requested: PPR, what is pending (SDM 11.8.3.1)
PRIORITIES = [
    (0x00, [], [0x31], 0x00, 0x31), (0x2F, [], [0x31], 0x2F, 0x31), (0x30, [], [0x3F], 0x30, -1),
    (0x00, [0x45], [0x4F], 0x40, -1), (0x00, [0x45], [0x50], 0x40, 0x50), (0x4A, [0x45], [0x50], 0x4A, 0x50),
    (0x45, [0x51, 0x30], [0x5F, 0x31], 0x50, -1), (0xFF, [], [0xFF], 0xFF, -1), (0, [], [0x20, 0xE0, 0x90], 0, 0xE0),
]


@pytest.mark.parametrize("tpr,serving,requested,ppr,pending", PRIORITIES)
def test_lapic_priorities(chip, tpr, serving, requested, ppr, pending):
    registers = lapic_registers(chip.get_lapic())
    registers.update({0xF0: 0x1FF, 0x80: tpr})
    for base, numbers in ((0x100, serving), (0x200, requested)):
        for vector in numbers:
            offset = base + vector // 32 * 16
            registers[offset] = registers.get(offset, 0) | 1 << vector % 32
    assert chip.set_lapic(lapic_blob(registers)) == 0
    assert (chip.load(LAPIC + 0xA0), chip.pending()) == (ppr, pending)
    assert chip.lib.irqchip_get_cr8(chip.ptr, 0) == tpr >> 4
    assert chip.acknowledge() == pending
    if pending >= 0:
        after = lapic_registers(chip.get_lapic())
        assert pending in vectors(after, 0x100) and pending not in vectors(after, 0x200)
        chip.store(LAPIC + 0xB0, 0)
        assert vectors(lapic_registers(chip.get_lapic()), 0x100) == sorted(serving)


def test_cr8_is_tpr(chip):
    chip.lib.irqchip_set_cr8(chip.ptr, 0, 0xFFFFFFF7)
    assert chip.load(LAPIC + 0x80) == 0x70


# command low, destination: CPUs of 4 (flat logical IDs 1, 2, 4, 8) that get vector 0x61 from CPU 0
IPIS = [
    (0x04061, 2, [2]), (0x04061, 0xFF, [0, 1, 2, 3]), (0x04061, 9, []), (0x44061, 2, [0]), (0x84061, 2, [0, 1, 2, 3]),
    (0xC4061, 2, [1, 2, 3]), (0x04861, 0x5, [0, 2]), (0x04861, 0xF0, []), (0x04961, 0xE, [2]), (0x0C061, 1, [1]),
    (0x08061, 1, []),
]


@pytest.mark.parametrize("command,destination,takers", IPIS)
def test_ipis(lib, command, destination, takers):
    with Chip(lib, 4) as chip:
        for cpu in range(4):
            chip.store(LAPIC + 0xF0, 0x1FF, cpu)
            chip.store(LAPIC + 0xD0, 1 << 24 + cpu, cpu)
        chip.outb(0x21, 0xFF)
        chip.store(LAPIC + 0x310, destination << 24)
        chip.store(LAPIC + 0x300, command)
        assert [cpu for cpu in range(4) if chip.pending(cpu) == 0x61] == takers
        assert chip.load(LAPIC + 0x300) & 0x1000 == 0


# DFR, LDRs of 2 CPUs, destination: takers (SDM 11.6.2.2)
LOGICAL = [
    (0xFFFFFFFF, (0x03, 0x02), 0x01, [0]), (0xFFFFFFFF, (0x03, 0x02), 0x02, [0, 1]), (0x0FFFFFFF, (0x11, 0x21), 0x11, [0]),
    (0x0FFFFFFF, (0x11, 0x12), 0x13, [0, 1]), (0x0FFFFFFF, (0x11, 0x21), 0xFF, [0, 1]), (0x0FFFFFFF, (0x11, 0x21), 0x31, []),
]


@pytest.mark.parametrize("dfr,ldrs,destination,takers", LOGICAL)
def test_logical_destinations(chip, dfr, ldrs, destination, takers):
    for cpu, ldr in enumerate(ldrs):
        chip.store(LAPIC + 0xF0, 0x1FF, cpu)
        chip.store(LAPIC + 0xE0, dfr, cpu)
        chip.store(LAPIC + 0xD0, ldr << 24, cpu)
    assert chip.msi(0xFEE00004 | destination << 12, 0x61) == len(takers)
    assert [cpu for cpu in range(2) if chip.pending(cpu) == 0x61] == takers


def test_init_and_startup(chip):
    chip.store(LAPIC + 0x310, 1 << 24)
    chip.store(LAPIC + 0x300, 0x0C500)
    assert chip.events(1) == 2
    chip.store(LAPIC + 0x300, 0x08500)  # level de-assert: nothing
    chip.store(LAPIC + 0x300, 0x04612)
    assert chip.events(1) == 6 and chip.lib.shim_sipi_vector(chip.ptr, 1) == 0x12
    chip.store(LAPIC + 0x300, 0x0C500)  # a new INIT forgets the SIPI
    assert chip.events(1) == 2
    chip.store(LAPIC + 0xF0, 0x1FF, 1)
    chip.store(LAPIC + 0x20, 5 << 24, 1)
    chip.lib.irqchip_init_cpu(chip.ptr, 1)
    assert lapic_registers(chip.get_lapic(1)) == {
        0x20: 5 << 24, 0x30: 0x50014, 0xE0: 0xFFFFFFFF, 0xF0: 0xFF, **{0x320 + 16 * i: 0x10000 for i in range(6)}}


def test_software_disable(chip):
    chip.run(ENABLE_LAPIC + [("store", LAPIC + 0x370, 0x31), ("store", LAPIC + 0x350, 0x31)])
    assert chip.msi(0xFEE00000, 0x77) == 1
    chip.store(LAPIC + 0xF0, 0xFF)
    assert chip.load(LAPIC + 0x370) == 0x10031
    chip.store(LAPIC + 0x370, 0x32)
    assert chip.load(LAPIC + 0x370) == 0x10032  # stays masked
    assert chip.msi(0xFEE00000, 0x78) == 0 and chip.pending() == 0x77  # pending ones are kept


def test_error_status(chip):
    chip.run(ENABLE_LAPIC + [("store", LAPIC + 0x370, 0xF1), ("outb", 0x21, 0xFF)])
    chip.store(LAPIC + 0x310, 1 << 24)
    chip.store(LAPIC + 0x300, 0x4005)
    assert chip.window() == [0xF1] and chip.load(LAPIC + 0x280) == 0
    chip.store(LAPIC + 0x280, 0)
    assert chip.load(LAPIC + 0x280) == 0x20
    assert chip.msi(0xFEE00000, 0x0F) == 0
    chip.load(LAPIC + 0x40)
    chip.store(LAPIC + 0x280, 0)
    assert chip.load(LAPIC + 0x280) == 0xC0
    chip.store(LAPIC + 0x280, 0)
    assert chip.load(LAPIC + 0x280) == 0


def test_local_interrupts(chip):
    chip.run(ENABLE_LAPIC + INIT_PICS)
    local = chip.lib.irqchip_local
    assert not local(chip.ptr, 0, 3)
    chip.store(LAPIC + 0x360, 0x400)
    assert local(chip.ptr, 0, 3) and chip.events() == 1
    chip.store(LAPIC + 0x340, 0x91)
    assert local(chip.ptr, 0, 1) and chip.window() == [0x91]
    assert chip.load(LAPIC + 0x340) == 0x10091 and not local(chip.ptr, 0, 1)
    # LINT0 as an NMI: the 8259's output does not interrupt but pulls it.
    chip.store(LAPIC + 0x350, 0x400)
    chip.lib.irqchip_take_events(chip.ptr, 0, 7)
    chip.line(3, 1)
    assert chip.pending() == -1 and chip.events() == 1


def test_virtual_wire_and_disabled_apic(chip):
    chip.run(INIT_PICS)
    chip.line(3, 1)
    assert (chip.pending(0), chip.pending(1)) == (0x23, -1)
    chip.store(LAPIC + 0xF0, 0x1FF)
    chip.store(LAPIC + 0x350, 0x10700)
    assert chip.pending(0) == -1
    chip.wrmsr(0x1B, 0xFEE00100)
    assert chip.pending(0) == 0x23


# --- The APIC timer ---------------------------------------------------------------------------------------

DIVIDERS = {0: 2, 1: 4, 2: 8, 3: 16, 8: 32, 9: 64, 10: 128, 11: 1}


@pytest.mark.parametrize("code", DIVIDERS)
def test_timer_one_shot(chip, code):
    chip.run(MASK_PICS + ENABLE_LAPIC + [("store", LAPIC + 0x320, 0xA1), ("store", LAPIC + 0x3E0, code)])
    chip.advance(77)
    chip.store(LAPIC + 0x380, 10)
    tick = DIVIDERS[code]
    assert chip.deadline == 77 + 10 * tick and chip.load(LAPIC + 0x390) == 10
    chip.advance(tick - 1)
    assert chip.load(LAPIC + 0x390) == 10
    chip.advance(1)
    assert chip.load(LAPIC + 0x390) == 9
    chip.advance(9 * tick - 1)
    assert chip.pending() == -1
    chip.advance(1)
    assert chip.window() == [0xA1] and chip.load(LAPIC + 0x390) == 0 and chip.deadline == NEVER


def test_timer_periodic_does_not_drift(chip):
    chip.run(MASK_PICS + ENABLE_LAPIC + [("store", LAPIC + 0x320, 0x200A1), ("store", LAPIC + 0x3E0, 0)])
    chip.store(LAPIC + 0x380, 1000003)
    period = 2 * 1000003
    chip.advance(period * 10**9 + 5)
    assert chip.deadline == period * (10**9 + 1) and chip.window() == [0xA1]
    assert chip.load(LAPIC + 0x390) == 1000003 - 2
    chip.store(LAPIC + 0xB0, 0)
    chip.store(LAPIC + 0x3E0, 11)  # the count goes on, at the new rate
    assert chip.load(LAPIC + 0x390) in (1000003 - 2, 1000003 - 3)
    chip.store(LAPIC + 0x380, 0)
    assert chip.deadline == NEVER


def test_timer_deadline(chip):
    hz = 2_899_999_999
    chip.advance(5000)
    chip.lib.irqchip_set_tsc(chip.ptr, 0, hz, 2**64 - 12345)  # as after a WRMSR to the TSC
    assert chip.lib.irqchip_tsc(chip.ptr, 0, chip.now) == 5000 * hz // 10**9 - 12345
    chip.run(MASK_PICS + ENABLE_LAPIC)
    chip.wrmsr(0x6E0, 10**9)
    assert chip.rdmsr(0x6E0) == 0  # not in this mode
    chip.store(LAPIC + 0x320, 0x400A2)
    chip.store(LAPIC + 0x380, 5)
    assert chip.load(LAPIC + 0x380) == 0
    chip.wrmsr(0x6E0, 10**9)
    due = chip.deadline
    assert chip.lib.irqchip_tsc(chip.ptr, 0, due) >= 10**9 > chip.lib.irqchip_tsc(chip.ptr, 0, due - 1)
    chip.advance(due - 1 - chip.now)
    assert chip.rdmsr(0x6E0) == 10**9 and chip.pending() == -1 and chip.load(LAPIC + 0x390) == 0
    chip.advance(1)
    assert chip.window() == [0xA2] and chip.rdmsr(0x6E0) == 0
    chip.store(LAPIC + 0xB0, 0)
    chip.wrmsr(0x6E0, 5)  # behind already
    assert chip.window() == [0xA2]
    chip.wrmsr(0x6E0, 10**12)
    chip.store(LAPIC + 0x320, 0xA2)
    assert chip.deadline == NEVER


def test_timer_state_goes_on(lib):
    with Chip(lib) as one, Chip(lib) as two:
        one.run(MASK_PICS + ENABLE_LAPIC + [("store", LAPIC + 0x320, 0x200A1), ("store", LAPIC + 0x3E0, 11)])
        one.store(LAPIC + 0x380, 1000)
        one.advance(2300)
        two.advance(2300)
        assert lapic_registers(one.get_lapic())[0x390] == 700
        assert two.set_lapic(one.get_lapic()) == 0 and two.deadline == one.deadline == 3000
        two.advance(700)
        assert two.deadline == 4000


# --- MSRs -------------------------------------------------------------------------------------------------

BASE = 0xFEE00000
ENABLED, X2APIC = BASE | 0x800, BASE | 0xC00
# from, to: allowed (SDM figure "Local x2APIC State Transitions")
TRANSITIONS = [
    (ENABLED, X2APIC, True), (ENABLED, BASE, True), (X2APIC, BASE, True), (X2APIC, ENABLED, False), (BASE, ENABLED, True),
    (BASE, X2APIC, False), (ENABLED, BASE | 0x400, False), (X2APIC, X2APIC, True), (ENABLED, ENABLED | 1, False),
    (ENABLED, ENABLED | 1 << 46, False), (ENABLED, ENABLED | 0x100, True), (ENABLED, 0x12345800, True),
]


@pytest.mark.parametrize("before,after,allowed", TRANSITIONS)
def test_apic_base(chip, before, after, allowed):
    assert chip.lib.irqchip_set_apic_base(chip.ptr, 0, before, 0) == 0
    if allowed:
        chip.wrmsr(0x1B, after)
    else:
        with pytest.raises(chips.GeneralProtection):
            chip.wrmsr(0x1B, after)
    assert chip.rdmsr(0x1B) == (after if allowed else before)


def test_disabling_resets(chip):
    chip.run(ENABLE_LAPIC)
    chip.wrmsr(0x1B, BASE)
    chip.wrmsr(0x1B, ENABLED)
    assert chip.load(LAPIC + 0xF0) == 0xFF


def x2apic(chip):
    for cpu in range(chip.cpus):
        chip.wrmsr(0x1B, X2APIC, cpu)
        chip.wrmsr(0x80F, 0x1FF, cpu)


# MSR: readable, a value that may be written (None: read only), a value that may not
X2APIC_MSRS = {
    0x802: (True, None, 0), 0x803: (True, None, 0), 0x808: (True, 0xFF, 0x100), 0x809: (False, None, 0),
    0x80A: (True, None, 0), 0x80B: (False, 0, 1), 0x80C: (False, None, 0), 0x80D: (True, None, 0), 0x80E: (False, None, 0),
    0x80F: (True, 0x1FF, 0x10000), 0x810: (True, None, 0), 0x818: (True, None, 0), 0x827: (True, None, 0),
    0x828: (True, 0, 1), 0x82F: (False, None, 0), 0x830: (True, 0x1_00004041, 0x2000), 0x831: (False, None, 0),
    0x832: (True, 0x400FF, 0x80000), 0x833: (True, 0x107FF, 0x800), 0x835: (True, 0x1A7FF, 0x20000),
    0x837: (True, 0x100FF, 0x100), 0x838: (True, 0xFFFFFFFF, 1 << 32), 0x839: (True, None, 0), 0x83E: (True, 0xB, 4),
    0x83F: (False, 0x41, 0x100), 0x840: (False, None, 0), 0x8FF: (False, None, 0),
}


@pytest.mark.parametrize("msr", X2APIC_MSRS)
def test_x2apic_msrs(chip, msr):
    readable, good, bad = X2APIC_MSRS[msr]
    with pytest.raises(chips.GeneralProtection):
        chip.rdmsr(msr)  # still in xAPIC mode
    x2apic(chip)
    with pytest.raises(chips.GeneralProtection):
        chip.wrmsr(msr, bad)
    if good is not None:
        chip.wrmsr(msr, good)
    if readable:
        chip.rdmsr(msr)
    else:
        with pytest.raises(chips.GeneralProtection):
            chip.rdmsr(msr)


def test_x2apic_ids_and_ipis(lib):
    with Chip(lib, 40) as chip:
        x2apic(chip)
        assert chip.rdmsr(0x802, 37) == 37 and chip.rdmsr(0x80D, 37) == 2 << 16 | 1 << 5
        chip.wrmsr(0x830, 37 << 32 | 0x4061)
        assert chip.rdmsr(0x830) == 37 << 32 | 0x4061
        chip.wrmsr(0x830, (2 << 16 | 0x14) << 32 | 0x4862)
        chip.wrmsr(0x83F, 0x63)
        assert {cpu: chip.pending(cpu) for cpu in range(40) if chip.pending(cpu) >= 0} == \
            {0: 0x63, 34: 0x62, 36: 0x62, 37: 0x61}
        chip.wrmsr(0x830, 0xFFFFFFFF << 32 | 0x4064)
        assert all(chip.pending(cpu) == 0x64 for cpu in range(40))
        state = chip.get_lapic(37)
        assert lapic_registers(state)[0x20] == 37 << 24
        assert chip.set_lapic(state, 37) == 0 and chip.set_lapic(state, 36) == -chips.EINVAL


def test_features_gate_the_msrs(chip):
    chip.lib.shim_set_features(chip.ptr, False, False, 40)
    for value in (X2APIC, ENABLED | 1 << 40):
        with pytest.raises(chips.GeneralProtection):
            chip.wrmsr(0x1B, value)
    with pytest.raises(chips.GeneralProtection):
        chip.rdmsr(0x6E0)
    chip.store(LAPIC + 0x320, 0x40031)
    assert chip.load(LAPIC + 0x320) == 0x10031


# --- Hostile input ----------------------------------------------------------------------------------------

PORTS = [0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61]
byte, word = st.integers(0, 255), st.integers(0, 2**32 - 1)
hostile_op = st.one_of(
    st.tuples(st.just("outb"), st.sampled_from(PORTS), byte),
    st.tuples(st.just("inb"), st.sampled_from(PORTS)),
    st.tuples(st.just("store"), st.integers(0, 0x40).map(lambda n: LAPIC + 16 * n), word, st.integers(0, 2)),
    st.tuples(st.just("load"), st.integers(0, 0xFFF).map(lambda n: LAPIC + n), st.integers(0, 2),
              st.sampled_from([1, 2, 4])),
    st.tuples(st.just("store"), st.just(IOAPIC), st.integers(0, 0x42)),
    st.tuples(st.just("store"), st.just(IOAPIC + 0x10), word),
    st.tuples(st.just("wrmsr"), st.sampled_from([0x1B, 0x6E0, *range(0x800, 0x841)]),
              st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([ENABLED, X2APIC, BASE])), st.integers(0, 2)),
    st.tuples(st.just("line"), st.integers(0, 23), st.integers(0, 1)),
    st.tuples(st.just("msi"), st.integers(0, 2**32 - 1), word),
    st.tuples(st.just("acknowledge"), st.integers(0, 2)),
    st.tuples(st.just("advance"), st.one_of(st.integers(0, 10**6), st.integers(0, 10**14))),
)


def check_invariants(chip):
    assert chip.deadline > chip.lib.shim_now(chip.ptr) or chip.deadline == NEVER
    for cpu in range(chip.cpus):
        pending = chip.pending(cpu)
        assert -1 <= pending <= 255
        assert (chip.acknowledge(cpu) == -1) == (pending == -1)
        registers = lapic_registers(chip.get_lapic(cpu))
        # A vector in service has a class of its own and lower ones below it.
        classes = [v >> 4 for v in vectors(registers, 0x100)]
        assert registers.get(0xA0, 0) >> 4 >= max(classes, default=0)
        again = chip.get_lapic(cpu)
        assert chip.set_lapic(again, cpu) == 0 and lapic_registers(chip.get_lapic(cpu)) == lapic_registers(again)
    for which in range(3):
        state = chip.get_chip(which)
        assert chip.set_chip(which, state) == 0
        if which < 2:
            assert chip.get_chip(which) == state
    assert chip.set_pit(chip.get_pit()) == 0


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(hostile_op, max_size=60))
def test_any_sequence_keeps_the_invariants(lib, script):
    with Chip(lib, 3) as chip:
        chip.run(script)
        check_invariants(chip)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_state_loads_or_is_refused(lib, data):
    with Chip(lib, 2) as chip:
        kind = data.draw(st.sampled_from(["lapic", "pic", "ioapic", "pit"]))
        size = {"lapic": 1024, "pic": 16, "ioapic": 216, "pit": 112}[kind]
        noise = random.Random(data.draw(st.integers(0, 2**32))).randbytes(size)
        keep = data.draw(st.sets(st.integers(0, size - 1), max_size=size))
        current = {"lapic": chip.get_lapic, "pic": lambda: chip.get_chip(0)[:16],
                   "ioapic": lambda: chip.get_chip(2)[:216], "pit": chip.get_pit}[kind]()
        blob = bytes(noise[i] if i in keep else current[i] for i in range(size))
        setter = {"lapic": chip.set_lapic, "pic": lambda b: chip.set_chip(data.draw(st.integers(0, 1)), b),
                  "ioapic": lambda b: chip.set_chip(2, b),
                  "pit": lambda b: chip.set_pit(b, data.draw(st.booleans()))}[kind]
        answer = setter(blob)
        assert answer in (0, -chips.EINVAL)
        for channel in range(3):
            latch(chip, channel)
        for ns_ahead in (1, 10**5, 10**9):
            chip.advance(ns_ahead)
            chip.run([("window",)])


@pytest.mark.skipif(GIVEN_LIBRARY in os.environ, reason="this is the sanitizer run")
def test_under_sanitizers(tmp_path):
    """All of the above again on a build with ASan and UBSan, any report of which ends the run."""
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("gcc has no libasan.so")
    library = chips.build(tmp_path, sanitize=True)
    environment = {**os.environ, GIVEN_LIBRARY: str(library), "LD_PRELOAD": runtime,
                   "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not kvm",
                          __file__], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "passed" in run.stdout and "runtime error" not in run.stderr


# --- KVM --------------------------------------------------------------------------------------------------

EDGE_VECTORS = [0x30, 0x52, 0x74, 0x96, 0xB8, 0xDA, 0xFE]
MSI_LEVEL_VECTORS = [0x42, 0x64, 0xCA]
LEVEL_PINS = 0xAA5533


def pic_steps(rng):
    """A random step of 8259 work, where KVM and the data sheet agree: no poll or special mask, ICWs in a row."""
    kind = rng.random()
    base = rng.choice([0x20, 0xA0])
    if kind < 0.4:
        return [("line", rng.choice([g for g in range(16) if g != 2]), rng.randrange(2))]
    if kind < 0.58:
        eoi = [0x20, 0x20, 0xA0, 0x80, 0x00, 0x0A, 0x0B, *(c + rng.randrange(8) for c in (0x60, 0xC0, 0xE0, 0x40))]
        return [("outb", base, rng.choice(eoi))]
    if kind < 0.62:
        icw4 = rng.randrange(2)
        return [("outb", base, 0x10 | icw4), ("outb", base + 1, rng.choice([0x20, 0x28, 0x70, 0xF8])),
                ("outb", base + 1, 4), *[("outb", base + 1, rng.choice([1, 3, 0x11, 0x13]))] * icw4,
                ("outb", base + 1, rng.randrange(256))]
    if kind < 0.72:
        return [("outb", base + 1, rng.randrange(256) & rng.randrange(256))]
    if kind < 0.76:
        return [("outb", rng.choice([0x4D0, 0x4D1]), rng.randrange(256))]
    if kind < 0.86:
        return [("inb", rng.choice([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]))]
    return [("window",)]


def apic_steps(rng):
    """A random step of APIC work; INITs only to the CPUs that do not run the script."""
    kind = rng.random()
    if kind < 0.2:
        return [("line", rng.randrange(24), rng.randrange(2))]
    if kind < 0.32:
        data = rng.choice([rng.choice(EDGE_VECTORS), rng.choice(MSI_LEVEL_VECTORS) | 0x8000])
        destination = rng.choice([0, 1, 2, 3, 7, 9, 0xFF, 0x11, 0x12, 0xF])
        return [("msi", BASE | destination << 12 | rng.choice([0, 4]), data)]
    if kind < 0.35:
        return [("msi", BASE | rng.choice([1, 2, 3]) << 12, 0x500)]
    if kind < 0.55:
        pin = rng.randrange(24)
        level = LEVEL_PINS >> pin & 1
        vector = 0x31 + 8 * pin if level else rng.choice(EDGE_VECTORS)
        low = vector | rng.randrange(2) << 11 | rng.randrange(2) << 13 | level << 15 | rng.choice([0, 0, 1]) << 16
        return [("store", IOAPIC, 0x10 + 2 * pin), ("store", IOAPIC + 0x10, low), ("store", IOAPIC, 0x11 + 2 * pin),
                ("store", IOAPIC + 0x10, rng.choice([0, 1, 2, 3, 7, 9, 0xFF, 0x11, 0x12]) << 24)]
    if kind < 0.85:
        entry = rng.choice(EDGE_VECTORS) | rng.choice([0, 0x10000, 0x700])
        return [("store", LAPIC + offset, value) for offset, value in [rng.choice(
            [(0xB0, 0)] * 5 + [(0x80, rng.choice([0, 0, 0x30, 0x70, 0xFF]))] * 2 +
            [(0xF0, rng.choice([0x1FF, 0x1FF, 0xFF, 0x3FF])), (0xD0, rng.choice([0, 1]) << 24),
             (rng.choice([0x320, 0x330, 0x340, 0x350, 0x360, 0x370]), entry)])]]
    if kind < 0.95:
        command = rng.choice(EDGE_VECTORS) | rng.randrange(2) << 11 | 1 << 14 | rng.choice([0, 0, 0, 1, 2, 3]) << 18
        return [("store", LAPIC + 0x310, rng.choice([0, 1, 2, 3, 9, 0xFF]) << 24), ("store", LAPIC + 0x300, command)]
    return [("accept",)]


def all_states(engine):
    """Everything but the running counters."""
    lapics = [{k: v for k, v in lapic_registers(engine.get_lapic(i)).items() if k != 0x390} for i in range(engine.cpus)]
    return (pic_state(engine.get_chip(0)), pic_state(engine.get_chip(1)), ioapic_state(engine.get_chip(2)), lapics)


def kvm_accept(kvm):
    """What an INTA does to CPU 0's local APIC, by its state: this host's KVM does not keep ISR of vectors that it
    delivers to CPL 0.  The write of TPR makes it compute PPR."""
    registers = lapic_registers(kvm.get_lapic())
    vector = vectors(registers, 0x200)[-1]
    offset, bit = vector // 32 * 16, 1 << vector % 32
    registers[0x200 + offset] &= ~bit
    registers[0x100 + offset] = registers.get(0x100 + offset, 0) | bit
    assert kvm.set_lapic(lapic_blob(registers)) == 0
    kvm.run([("store", LAPIC + 0x80, registers.get(0x80, 0))])
    return vector


def step(engine, op, arguments):
    if op in ("line", "msi"):
        answer = getattr(engine, op)(*arguments)
        return answer if op == "msi" else None
    if op == "accept":
        return engine.acknowledge() if isinstance(engine, Chip) else kvm_accept(engine)
    return engine.run([(op, *arguments)])


def run_twins(chip, kvm, steps, rng, length):
    """The same steps on both; after each, the same answers and the same state."""
    trace = []
    for _ in range(length):
        for op, *arguments in steps(rng):
            if op == "accept" and chip.pending() < 0:
                continue
            trace.append((op, *map(hex, arguments)))
            assert step(chip, op, arguments) == step(kvm, op, arguments), trace[-20:]
            assert all_states(chip) == all_states(kvm), trace[-20:]


@needs_kvm
@pytest.mark.parametrize("cpus", [1, 3])
def test_kvm_reset_state(lib, guest, cpus):
    with Chip(lib, cpus) as chip, Kvm(guest, cpus) as kvm:
        for which in range(3):
            assert chip.get_chip(which) == kvm.get_chip(which)
        for cpu in range(cpus):
            assert chip.get_lapic(cpu) == kvm.get_lapic(cpu)
        ours, theirs = pit_state(chip.get_pit()), pit_state(kvm.get_pit())
        for channel in (*ours[0], *theirs[0]):
            channel.pop("count_load_time")
        assert ours == theirs


@needs_kvm
@pytest.mark.parametrize("seed", range(12))
def test_kvm_pic(lib, guest, seed):
    with Chip(lib) as chip, Kvm(guest) as kvm:
        chip.run(INIT_PICS)
        kvm.run(INIT_PICS)
        run_twins(chip, kvm, pic_steps, random.Random(seed), 150)


@needs_kvm
@pytest.mark.parametrize("seed", range(12))
def test_kvm_apics(lib, guest, seed):
    """Four CPUs, flat or cluster logical IDs: lines, messages, IPIs, EOIs, masks, redirection entries."""
    with Chip(lib, 4) as chip, Kvm(guest, 4) as kvm:
        for engine in (chip, kvm):
            engine.run(INIT_PICS + MASK_PICS)
            for cpu in range(4):
                registers = lapic_registers(engine.get_lapic(cpu))
                registers.update({0xF0: 0x1FF, 0xD0: ([1, 2, 4, 8], [1, 2, 0x11, 0x12])[seed % 2][cpu] << 24,
                                  0xE0: (0xFFFFFFFF, 0x0FFFFFFF)[seed % 2]})
                assert engine.set_lapic(lapic_blob(registers), cpu) == 0
        run_twins(chip, kvm, apic_steps, random.Random(seed), 100)


LAPIC_SAFE_WRITES = [(0x20, 0x05000000), (0x80, 0xFFFFFF5A), (0xD0, 0xFFFFFFFF), (0xE0, 0), (0xE0, 0xFFFFFFFF),
                     (0xF0, 0xFFFFFFFF), (0x310, 0xFFFFFFFF), (0x330, 0xFFFFAFFF), (0x350, 0xFFFFAFFF),
                     (0x360, 0xFFFFAFFF), (0x370, 0xFFFFAFFF), (0x320, 0xFFFFAFFF), (0x3E0, 0xFFFFFFFF), (0x30, 0),
                     (0x100, 5), (0x200, 5), (0xA0, 5), (0xF0, 0xFF), (0x330, 0x31)]


@needs_kvm
def test_kvm_lapic_register_bits(lib, guest):
    reads = [("load", LAPIC + offset) for offset in (0x20, 0x30, 0x80, 0xA0, 0xD0, 0xE0, 0xF0, 0x100, 0x180, 0x200,
                                                      0x300, 0x310, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380, 0x3E0)]
    with Chip(lib) as chip, Kvm(guest) as kvm:
        for offset, value in LAPIC_SAFE_WRITES:
            script = [("store", LAPIC + offset, value), *reads]
            assert chip.run(script) == kvm.run(script), hex(offset)


@needs_kvm
def test_kvm_ioapic_registers(lib, guest):
    script = [("store", IOAPIC, 0), ("store", IOAPIC + 16, 0xFFFFFFFF)]
    for index in (*range(0x45), 0xFF):
        script += [("store", IOAPIC, index), ("load", IOAPIC), ("load", IOAPIC + 16), ("load", IOAPIC + 32)]
    with Chip(lib) as chip, Kvm(guest) as kvm:
        assert chip.run(script) == kvm.run(script)
        assert chip.get_chip(2) == kvm.get_chip(2)


@needs_kvm
def test_kvm_x2apic_msrs(lib, guest):
    """Which MSRs fault, in both modes and at the transitions between them."""
    numbers = [n for n in range(0x800, 0x840) if n != 0x839]
    script = [("rdmsr", 0x1B), *(("rdmsr", n) for n in numbers), ("wrmsr", 0x1B, BASE | 0x500), ("wrmsr", 0x1B, X2APIC | 0x100),
              ("rdmsr", 0x1B), *(("rdmsr", n) for n in numbers), ("wrmsr", 0x80F, 0x1FF), ("wrmsr", 0x80F, 1 << 32),
              ("wrmsr", 0x83F, 0x41), ("wrmsr", 0x83F, 0x141), ("wrmsr", 0x802, 0), ("wrmsr", 0x828, 1), ("wrmsr", 0x828, 0),
              ("wrmsr", 0x830, 5 << 32 | 0x4055), ("rdmsr", 0x830), ("rdmsr", 0x822), ("wrmsr", 0x1B, ENABLED | 0x100),
              ("wrmsr", 0x1B, BASE | 0x100), ("wrmsr", 0x1B, X2APIC | 0x100), ("rdmsr", 0x1B)]
    with Chip(lib) as chip, Kvm(guest) as kvm:
        ours, theirs = chip.run(script), kvm.run(script)
        for row, mine, other in zip(script, ours, theirs):
            assert mine == other, (row, mine, other)


PIT_SCRIPTS = {
    "words": [("outb", 0x43, 0x34), ("outb", 0x40, 0x34), ("outb", 0x40, 0x12)],
    "half a word": [("outb", 0x43, 0x74), ("outb", 0x41, 0x34)],
    "low byte": [("outb", 0x43, 0x14), ("outb", 0x40, 0)],
    "high byte": [("outb", 0x43, 0xA6), ("outb", 0x42, 0x12)],
    "mode 6 is 2, 7 is 3": [("outb", 0x43, 0x3C), ("outb", 0x43, 0x7E)],
    "gate, speaker": [("outb", 0x61, 3)],
    "bcd": [("outb", 0x43, 0x31), ("outb", 0x40, 0x99), ("outb", 0x40, 0x99)],
    "half a read": [("outb", 0x43, 0x34), ("outb", 0x40, 0x34), ("outb", 0x40, 0x12), ("inb", 0x40)],
    "half of a latch": [("outb", 0x43, 0xB0), ("outb", 0x42, 1), ("outb", 0x42, 0), ("outb", 0x43, 0x80), ("inb", 0x42)],
}


@needs_kvm
@pytest.mark.parametrize("name", PIT_SCRIPTS)
def test_kvm_pit_state(lib, guest, name):
    with Chip(lib) as chip, Kvm(guest) as kvm:
        chip.run(PIT_SCRIPTS[name])
        kvm.run(PIT_SCRIPTS[name])
        ours, theirs = pit_state(chip.get_pit()), pit_state(kvm.get_pit())
        for channel in (*ours[0], *theirs[0]):
            channel.pop("count_load_time")
            channel.pop("latched_count")
        assert ours == theirs


@needs_kvm
@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_kvm_pit_counts(lib, guest, mode):
    """Channel 2 counts on KVM as here: KVM's load time is CLOCK_MONOTONIC, as are the two times around the latch."""
    with Kvm(guest) as kvm:
        kvm.run([("outb", 0x61, 1), ("outb", 0x43, 0xB0 | mode << 1), ("outb", 0x42, 0), ("outb", 0x42, 0)])
        before = clock()
        kvm.run([("outb", 0x43, 0x80)])
        after = clock()
        channel = pit_state(kvm.get_pit())[0][2]
    with Chip(lib) as chip:
        chip.run([("outb", 0x61, 1)])
        program(chip, 2, mode, 0)
        chip.advance(before - channel["count_load_time"])
        first = latch(chip, 2)
    # KVM's count is at most as many steps on as ticks passed in between, give or take the one under way.
    per_tick = 2 if mode == 3 else 1
    steps = ((after - before) * TICKS // 10**9 + 1) * per_tick
    assert (first - channel["latched_count"]) % 65536 <= steps


def clock():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


@needs_kvm
@pytest.mark.parametrize("seed", range(4))
def test_kvm_state_moves_both_ways(lib, guest, seed):
    """A worked-on state of each loads in the other and reads back as it was."""
    with Chip(lib, 4) as chip, Kvm(guest, 4) as kvm, Chip(lib, 4) as other, Kvm(guest, 4) as target:
        rng = random.Random(seed)
        for engine in (chip, kvm):
            engine.run(INIT_PICS + ENABLE_LAPIC)
        for _ in range(60):
            for op, *arguments in apic_steps(rng):
                if op != "accept":
                    step(chip, op, arguments)
                    step(kvm, op, arguments)
        for source, destination in ((kvm, other), (chip, target)):
            for cpu in range(4):
                assert destination.set_lapic(source.get_lapic(cpu), cpu) == 0
            for which in (0, 1):
                assert destination.set_chip(which, source.get_chip(which)) == 0
            assert destination.set_pit(source.get_pit(), restart=True) == 0
            pits = [pit_state(engine.get_pit())[0] for engine in (source, destination)]
            for channel in (*pits[0], *pits[1]):
                channel.pop("count_load_time")
            assert pits[0] == pits[1]
            assert all_states(source)[:2] == all_states(destination)[:2]
            for mine, moved in zip(all_states(source)[3], all_states(destination)[3]):
                assert {k: v for k, v in mine.items() if k != 0xA0} == {k: v for k, v in moved.items() if k != 0xA0}
            assert destination.set_chip(2, source.get_chip(2)) == 0
            assert all_states(source)[2] == all_states(destination)[2]
