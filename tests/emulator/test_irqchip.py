"""The emulator's 8259s, I/O APIC and local APICs: the manuals' tables, and hostile input.

The C is built here and driven alone (irqchip_lib.py).  Manuals: Intel 8259A and 82093AA data sheets; Intel
SDM volume 3A, chapter "Advanced Programmable Interrupt Controller".  The 8254 is in test_irqchip_pit.py; KVM
stands beside it all in test_irqchip_kvm.py.
"""

import os
import random
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, os.path.dirname(__file__))
import irqchip_lib as chips  # noqa: E402
from irqchip_lib import (  # noqa: E402
    BASE,
    ENABLE_LAPIC,
    ENABLED,
    INIT_PICS,
    IOAPIC,
    LAPIC,
    MASK_PICS,
    NEVER,
    X2APIC,
    Chip,
    ioapic_state,
    lapic_blob,
    lapic_registers,
    latch,
    pic_state,
    vectors,
)

NO_GCC = None if shutil.which("gcc") else "gcc is not installed"
pytestmark = pytest.mark.skipif(NO_GCC is not None, reason=str(NO_GCC))


@pytest.fixture(scope="session")
def lib(tmp_path_factory):
    return chips.given_or_built(tmp_path_factory)


@pytest.fixture
def chip(lib):
    with Chip(lib, 2) as one:
        yield one


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
    "level again after EOI": (
        [("outb", 0x4D0, 0x20), ("line", 5, 1), ("window",), ("outb", 0x20, 0x20)],
        [0x25],
        0x20,
        0,
    ),
    "level gone": ([("outb", 0x4D0, 0x20), ("line", 5, 1), ("line", 5, 0)], [], 0, 0),
    "non-specific EOI ends the best": (
        [("line", 5, 1), ("window",), ("line", 3, 1), ("window",), ("outb", 0x20, 0x20)],
        [],
        0x20,
        0,
    ),
    "specific EOI": (
        [("line", 5, 1), ("window",), ("line", 3, 1), ("window",), ("outb", 0x20, 0x65)],
        [],
        0x08,
        0,
    ),
    "set priority: IRQ 4 is best": ([("outb", 0x20, 0xC3), ("line", 3, 1), ("line", 4, 1)], [0x24], 0x10, 0),
    "rotate on EOI": (
        [("line", 3, 1), ("window",), ("outb", 0x20, 0xA0), ("line", 3, 0), ("line", 3, 1), ("line", 4, 1)],
        [0x24],
        0x10,
        0,
    ),
    "rotate on specific EOI": (
        [("line", 3, 1), ("window",), ("outb", 0x20, 0xE3), ("line", 3, 0), ("line", 3, 1), ("line", 7, 1)],
        [0x27],
        0x80,
        0,
    ),
    "special mask lets lower ones in": (
        [("line", 3, 1), ("window",), ("outb", 0x21, 0x08), ("outb", 0x20, 0x68), ("line", 6, 1)],
        [0x26],
        0x48,
        0,
    ),
    "special mask reset": (
        [
            ("line", 3, 1),
            ("window",),
            ("outb", 0x21, 0x08),
            ("outb", 0x20, 0x68),
            ("outb", 0x20, 0x48),
            ("line", 6, 1),
        ],
        [],
        0x08,
        0,
    ),
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
    chip.run(
        [
            ("outb", 0x20, 0x11),
            ("outb", 0x21, 0x40),
            ("outb", 0x21, 4),
            ("outb", 0x21, 0x03),
            ("outb", 0x20, 0x80),
        ]
    )
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
    """A level request of the slave, gone at the INTA: IRQ 15's vector, in service at the master only."""
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
    assert (
        route(chip.ptr, 24, 0, 0) == route(chip.ptr, 1, 16, 1) == route(chip.ptr, 1, 1, 24) == -chips.EINVAL
    )
    chip.line(0, 1)
    assert ioapic_state(chip.get_chip(2))["irr"] == 4 and pic_state(chip.get_chip(0))["irr"] == 1
    assert chip.line(24, 1) == -chips.EINVAL


# --- Local APIC -------------------------------------------------------------------------------------------

# offset: (written, then read), from reset and software enabled
LAPIC_WRITES = {
    0x20: (0xFFFFFFFF, 0xFF000000),
    0x30: (0, 0x50014),
    0x80: (0xFFFFFF5A, 0x5A),
    0xA0: (0xFF, 0),
    0xD0: (0xFFFFFFFF, 0xFF000000),
    0xE0: (0, 0x0FFFFFFF),
    0xF0: (0xFFFFFFFF, 0x3FF),
    0x300: (0x000C5030, 0x000C4030),
    0x310: (0xFFFFFFFF, 0xFF000000),
    0x320: (0xFFFFFFFF, 0x700FF),
    0x330: (0xFFFFFFFF, 0x107FF),
    0x340: (0xFFFFFFFF, 0x107FF),
    0x350: (0xFFFFFFFF, 0x1A7FF),
    0x360: (0xFFFFFFFF, 0x1A7FF),
    0x370: (0xFFFFFFFF, 0x100FF),
    0x3E0: (0xFFFFFFFF, 0xB),
    0x100: (0xFF, 0),
    0x200: (0xFF, 0),
    0x2F0: (0xFF, 0),
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
    (0x00, [], [0x31], 0x00, 0x31),
    (0x2F, [], [0x31], 0x2F, 0x31),
    (0x30, [], [0x3F], 0x30, -1),
    (0x00, [0x45], [0x4F], 0x40, -1),
    (0x00, [0x45], [0x50], 0x40, 0x50),
    (0x4A, [0x45], [0x50], 0x4A, 0x50),
    (0x45, [0x51, 0x30], [0x5F, 0x31], 0x50, -1),
    (0xFF, [], [0xFF], 0xFF, -1),
    (0, [], [0x20, 0xE0, 0x90], 0, 0xE0),
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
    (0x04061, 2, [2]),
    (0x04061, 0xFF, [0, 1, 2, 3]),
    (0x04061, 9, []),
    (0x44061, 2, [0]),
    (0x84061, 2, [0, 1, 2, 3]),
    (0xC4061, 2, [1, 2, 3]),
    (0x04861, 0x5, [0, 2]),
    (0x04861, 0xF0, []),
    (0x04961, 0xE, [2]),
    (0x0C061, 1, [1]),
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
    (0xFFFFFFFF, (0x03, 0x02), 0x01, [0]),
    (0xFFFFFFFF, (0x03, 0x02), 0x02, [0, 1]),
    (0x0FFFFFFF, (0x11, 0x21), 0x11, [0]),
    (0x0FFFFFFF, (0x11, 0x12), 0x13, [0, 1]),
    (0x0FFFFFFF, (0x11, 0x21), 0xFF, [0, 1]),
    (0x0FFFFFFF, (0x11, 0x21), 0x31, []),
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
        0x20: 5 << 24,
        0x30: 0x50014,
        0xE0: 0xFFFFFFFF,
        0xF0: 0xFF,
        **{0x320 + 16 * i: 0x10000 for i in range(6)},
    }


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
    chip.wrmsr(0x6E0, 5)  # it has passed already
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

# from, to: allowed (SDM figure "Local x2APIC State Transitions")
TRANSITIONS = [
    (ENABLED, X2APIC, True),
    (ENABLED, BASE, True),
    (X2APIC, BASE, True),
    (X2APIC, ENABLED, False),
    (BASE, ENABLED, True),
    (BASE, X2APIC, False),
    (ENABLED, BASE | 0x400, False),
    (X2APIC, X2APIC, True),
    (ENABLED, ENABLED | 1, False),
    (ENABLED, ENABLED | 1 << 46, False),
    (ENABLED, ENABLED | 0x100, True),
    (ENABLED, 0x12345800, True),
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
    0x802: (True, None, 0),
    0x803: (True, None, 0),
    0x808: (True, 0xFF, 0x100),
    0x809: (False, None, 0),
    0x80A: (True, None, 0),
    0x80B: (False, 0, 1),
    0x80C: (False, None, 0),
    0x80D: (True, None, 0),
    0x80E: (False, None, 0),
    0x80F: (True, 0x1FF, 0x10000),
    0x810: (True, None, 0),
    0x818: (True, None, 0),
    0x827: (True, None, 0),
    0x828: (True, 0, 1),
    0x82F: (False, None, 0),
    0x830: (True, 0x1_00004041, 0x2000),
    0x831: (False, None, 0),
    0x832: (True, 0x400FF, 0x80000),
    0x833: (True, 0x107FF, 0x800),
    0x835: (True, 0x1A7FF, 0x20000),
    0x837: (True, 0x100FF, 0x100),
    0x838: (True, 0xFFFFFFFF, 1 << 32),
    0x839: (True, None, 0),
    0x83E: (True, 0xB, 4),
    0x83F: (False, 0x41, 0x100),
    0x840: (False, None, 0),
    0x8FF: (False, None, 0),
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
        assert {cpu: chip.pending(cpu) for cpu in range(40) if chip.pending(cpu) >= 0} == {
            0: 0x63,
            34: 0x62,
            36: 0x62,
            37: 0x61,
        }
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
    st.tuples(
        st.just("load"),
        st.integers(0, 0xFFF).map(lambda n: LAPIC + n),
        st.integers(0, 2),
        st.sampled_from([1, 2, 4]),
    ),
    st.tuples(st.just("store"), st.just(IOAPIC), st.integers(0, 0x42)),
    st.tuples(st.just("store"), st.just(IOAPIC + 0x10), word),
    st.tuples(
        st.just("wrmsr"),
        st.sampled_from([0x1B, 0x6E0, *range(0x800, 0x841)]),
        st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([ENABLED, X2APIC, BASE])),
        st.integers(0, 2),
    ),
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
        assert chip.set_lapic(again, cpu) == 0 and lapic_registers(chip.get_lapic(cpu)) == lapic_registers(
            again
        )
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
        current = {
            "lapic": chip.get_lapic,
            "pic": lambda: chip.get_chip(0)[:16],
            "ioapic": lambda: chip.get_chip(2)[:216],
            "pit": chip.get_pit,
        }[kind]()
        blob = bytes(noise[i] if i in keep else current[i] for i in range(size))
        setter = {
            "lapic": chip.set_lapic,
            "pic": lambda b: chip.set_chip(data.draw(st.integers(0, 1)), b),
            "ioapic": lambda b: chip.set_chip(2, b),
            "pit": lambda b: chip.set_pit(b, data.draw(st.booleans())),
        }[kind]
        answer = setter(blob)
        assert answer in (0, -chips.EINVAL)
        for channel in range(3):
            latch(chip, channel)
        for ns_ahead in (1, 10**5, 10**9):
            chip.advance(ns_ahead)
            chip.run([("window",)])


@pytest.mark.skipif(chips.GIVEN_LIBRARY in os.environ, reason="this is the sanitizer run")
def test_under_sanitizers(tmp_path):
    """All of the above again on a build with ASan and UBSan, any report of which ends the run."""
    runtime = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("gcc has no libasan.so")
    library = chips.build(tmp_path, sanitize=True)
    environment = {
        **os.environ,
        chips.GIVEN_LIBRARY: str(library),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "passed" in run.stdout and "runtime error" not in run.stderr
