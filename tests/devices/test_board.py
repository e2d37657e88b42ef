"""Buses, lines, DMA, and the PCI bus."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from devices.fakes import FakeMachine, Guest, load, saved
from hypothesis import given
from hypothesis import strategies as st

from vmfs.devices.bus import Bus
from vmfs.devices.device import StatelessDevice, Window
from vmfs.devices.machine import Pc
from vmfs.devices.pci import Bar, PlainPciDevice
from vmfs.memory.ram import Memory
from vmfs.words import exits
from vmfs.words.errors import Invalid, LimitReached


class Echo(StatelessDevice):
    """Remembers what was written, and reads back where."""

    TYPE = "echo"

    def __init__(self, board, name, *windows, irq=None):
        super().__init__(board, name)
        self.where = windows
        self.irq = irq
        self.seen = []

    def windows(self):
        return self.where

    def read(self, region, offset, size):
        return region << 8 | offset

    def write(self, region, offset, size, value):
        self.seen.append((region, offset, size, value))


NO_BOARD = SimpleNamespace(take_number=lambda device: 0)


class Card(PlainPciDevice):
    TYPE = "card"
    VENDOR, DEVICE, CLASS = 0x1AF4, 0x10FF, 0xFF0000
    BARS = {0: Bar("memory", 4096), 1: Bar("port", 32), 4: Bar("memory", 1 << 20, prefetchable=True)}

    def read(self, region, offset, size):
        return region << 16 | offset


def test_windows_do_not_overlap(board):
    board.add(Echo(board, "a", Window("port", 0x10, 4)))
    for start, length in ((0x13, 1), (0xF, 2), (0, 0x100), (0xFFFF, 2)):
        window = Window("port", start, length)
        with pytest.raises(Invalid):
            board.add(Echo(board, "b", window))
    board.add(Echo(board, "b", Window("port", 0x14, 1), Window("memory", 0x10, 4)))
    with pytest.raises(Invalid, match="already"):
        board.add(Echo(board, "b", Window("port", 0x100, 1)))
    assert set(board.devices) == {"a", "b"}


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=12), st.integers(0, 400))
def test_a_bus_finds_the_one_that_is_there(ranges, address):
    bus, kept = Bus("port"), []
    for number, (start, length) in enumerate(ranges):
        free = all(start >= s + n or s >= start + length for s, n, _ in kept)
        try:
            bus.add(Window("port", start, length, number), Echo(NO_BOARD, str(number)))
            assert free
            kept.append((start, length, number))
        except Invalid:
            assert not free
    expected = [number for start, length, number in kept if start <= address < start + length]
    found = bus.find(address)
    assert [found[0].region] == expected if found else not expected


def test_accesses_reach_their_device_with_an_offset(board):
    device = board.add(Echo(board, "a", Window("port", 0x10, 4, 1), Window("memory", 0xF000_0000, 16, 2)))
    guest = Guest(board)
    assert guest.inp(0x12, 2) == 0x102
    assert guest.load(0xF000_0008, 4) == 0x208
    guest.out(0x11, 0x1234, 2)
    guest.store(0xF000_0004, 0x55, 1)
    assert device.seen == [(1, 1, 2, 0x1234), (2, 4, 1, 0x55)]
    assert guest.inp(0x14) == 0xFF and guest.load(0xF000_0010, 8) == (1 << 64) - 1
    assert board.counters["unclaimed"] == 2
    assert board.unclaimed() == ["port=0x14 reads=1 writes=0 rip=0x1", "memory=0xf0000010 reads=1 writes=0 rip=0x1"]
    board.remove(device)
    assert guest.inp(0x12, 2) == 0xFFFF


def test_what_nothing_claims_is_listed_by_its_last_use(board):
    guest = Guest(board)
    guest.inp(0x80)
    guest.out(0x81, 5)
    guest.out(0x80, 6, 2)
    assert board.unclaimed() == ["port=0x81 reads=0 writes=1 rip=0x1", "port=0x80 reads=1 writes=1 rip=0x1"]
    for address in range(300):
        guest.store(0xE000_0000 + address, 0, 1)
    lines = board.unclaimed()
    assert len(lines) == 1 + 256 and lines[0] == "forgotten=46"
    assert lines[-1] == f"memory={0xE000_0000 + 299:#x} reads=0 writes=1 rip=0x1"
    board.add(Echo(board, "a", Window("port", 0x80, 1)))
    guest.inp(0x80)
    assert board.unclaimed() == lines


def test_a_string_of_elements(board):
    device = board.add(Echo(board, "a", Window("port", 0x10, 4)))
    cpu = type("Cpu", (), {})()
    board.access(exits.Io(direction="out", port=0x10, size=2, count=3, data=bytes(range(6)), rip=0), cpu)
    assert [value for *_, value in device.seen] == [0x0100, 0x0302, 0x0504]
    board.access(exits.Io(direction="in", port=0x13, size=2, count=3, rip=0), cpu)
    assert cpu.access_data == b"\x03\0" * 3


def test_a_line_is_high_while_any_device_holds_it(board, machine):
    a, b = (board.add(Echo(board, name, irq=5)) for name in "ab")
    a.set_irq(True)
    b.set_irq(True)
    a.set_irq(False)
    assert machine.lines[5]
    b.set_irq(False)
    assert not machine.lines[5]
    a.set_irq(True)
    board.remove(a)
    assert not machine.lines[5]


def test_dma_is_bounded_and_is_in_the_dirty_log(board, memory):
    board.dma_write(0xFFF, b"ab")
    assert memory.read(0xFFF, 2) == b"ab" == board.dma_read(0xFFF, 2)
    assert board.take_dirty() == 3 and board.take_dirty() == 0
    for address, length in ((memory.size - 1, 2), (-1, 1), (1 << 64, 1), (0, memory.size + 1)):
        with pytest.raises(Invalid):
            board.dma_read(address, length)
    with pytest.raises(Invalid):
        board.dma_write(memory.size - 1, b"ab")
    assert board.take_dirty() == 0


def test_pci_configuration_space(pc, guest):
    card = pc.pci.plug(Card(pc, "card", pc.pci.free_slot()))
    slot = card.slot
    assert guest.config(0, 0) == 0x1237_8086
    assert guest.config(slot, 0) == 0x10FF_1AF4
    assert guest.config(slot, 2, size=2) == 0x10FF
    assert guest.config(slot, 0xB, size=1) == 0xFF
    assert guest.config(29, 0) == 0xFFFF_FFFF
    guest.out(0xCF8, 0x8000_0004, 4)
    assert guest.inp(0xCF8, 4) == 0x8000_0004
    assert (guest.inp(0xCF8, 1), guest.inp(0xCF8, 2)) == (0xFF, 0xFFFF)  # the address is 32 bits or nothing
    guest.out(0xCF8, 0x8001_0000, 4)  # another bus
    assert guest.inp(0xCFC, 4) == 0xFFFF_FFFF
    guest.config(slot, 0, 0)  # the identity is read-only
    assert guest.config(slot, 0) == 0x10FF_1AF4


def test_the_functions_of_the_isa_bridges_slot_are_where_an_i440fx_has_them(guest):
    def function(number, offset, slot=1):
        guest.out(0xCF8, 0x8000_0000 | slot << 11 | number << 8 | offset, 4)
        return guest.inp(0xCFC, 4)

    assert function(0, 0) == 0x7000_8086 and function(0, 8) >> 8 == 0x060100
    assert function(0, 0xC) >> 16 & 0x80, "several functions"
    assert function(3, 0) == 0x7113_8086
    assert function(3, 0x40) == 0x601 and function(3, 0x80) & 1, "the base of the timer's ports, and that it is decoded"
    assert {function(number, 0) for number in (2, 4, 7)} | {function(3, 0, slot=2)} == {0xFFFF_FFFF}


def test_bars_tell_their_size_and_move(pc, guest):
    card = pc.pci.plug(Card(pc, "card", pc.pci.free_slot()))
    slot = card.slot
    memory, ports = guest.config(slot, 0x10), guest.config(slot, 0x14)
    assert memory & 15 == 0 and memory >= 0xE000_0000 and ports & 3 == 1
    assert guest.config(slot, 0x20) & 15 == 8
    assert guest.load(memory + 8) == 8 and guest.inp(ports - 1 + 4, 4) == 1 << 16 | 4
    for offset, size, kind in ((0x10, 4096, 0), (0x20, 1 << 20, 8)):
        old = guest.config(slot, offset)
        guest.config(slot, offset, 0xFFFF_FFFF)
        assert guest.config(slot, offset) == -size & 0xFFFF_FFFF | kind
        guest.config(slot, offset, old)
    guest.config(slot, 0x10, 0xE800_0000)
    assert guest.load(memory + 8) == 0xFFFF_FFFF and guest.load(0xE800_0008) == 8
    guest.config(slot, 4, 0, size=2)  # nothing is decoded
    assert guest.load(0xE800_0008) == 0xFFFF_FFFF and guest.inp(ports - 1, 4) == 0xFFFF_FFFF
    pc.reset()
    assert guest.load(memory + 8) == 8


def test_intx_is_held_back_and_told_in_the_status(pc, guest, machine):
    card = pc.pci.plug(Card(pc, "card", 5))
    assert card.irq == 21
    card.set_irq(True)
    assert machine.lines[21] and guest.config(5, 6, size=2) & 8
    guest.config(5, 4, 0x400, size=2)
    assert not machine.lines[21] and guest.config(5, 6, size=2) & 8
    guest.config(5, 4, 0, size=2)
    assert machine.lines[21]
    pc.reset()
    assert not machine.lines[21]


def test_the_bus_is_full_at_some_time(pc):
    for _ in range(32 - len({place >> 3 for place in pc.pci.functions})):
        pc.pci.plug(Card(pc, f"card{pc.pci.free_slot()}", pc.pci.free_slot()))
    places = [(w.space, w.start, w.end) for d in pc.pci.functions.values() for w in d.windows()]
    for space in ("port", "memory"):
        ranges = sorted((start, end) for kind, start, end in places if kind == space)
        assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    with pytest.raises(LimitReached):
        pc.pci.free_slot()


def test_reset_control(guest):
    guest.out(0xCF9, 0xFA)
    assert guest.ended is None and guest.inp(0xCF9) == 2  # SYS_RST is kept
    guest.out(0xCF9, 6)
    assert guest.ended.cause == "reset"


STATELESS = {"debugcon", "debugcon2", "speaker", "debug-exit"}


def test_the_state_of_every_device_goes_to_another_board(pc, guest, memory):
    with pytest.raises(Invalid, match="other devices"):
        pc.check_names(set())
    other = Pc(FakeMachine(), memory)
    try:
        fresh = saved(other)
        assert saved(pc).keys() == fresh.keys()
        dice = random.Random(21)
        ports = [port for device in pc.devices.values() for window in device.windows() if window.space == "port"
                 for port in range(window.start, window.end)]  # fmt: skip
        for _ in range(4000):
            guest.out(dice.choice(ports), dice.getrandbits(8))
        guest.out(0x510, 0x19, 2)  # fw_cfg: its directory
        guest.store(0xFED0_0108, 77, 8)  # the HPET's first comparator
        for place in pc.pci.functions:
            guest.out(0xCF8, 0x8000_0000 | place << 8 | 0x3C, 4)
            guest.out(0xCFC, dice.getrandbits(8))  # the interrupt line, which is a scratch register
        state = saved(pc)
        assert {name for name in state if state[name] == fresh[name]} == STATELESS
        load(other, state)
        assert saved(other) == state
    finally:
        other.close()


_ACCESS = st.tuples(st.integers(0, 0xFFFF), st.sampled_from((1, 2, 4)), st.integers(0, 2**32 - 1), st.booleans())


@given(st.lists(_ACCESS))
def test_no_access_to_any_port_gets_an_exception_out(accesses):
    memory = Memory(1 << 20)
    pc = Pc(FakeMachine(), memory)
    try:
        pc.pci.plug(Card(pc, "card", 3))
        guest = Guest(pc)
        for port, size, value, out in accesses:
            for one in (port, 0xCFC + port % 4, 0xCF8, 0x3F8 + port % 8, 0x70 + port % 2, 0x600 + port % 16):
                if out:
                    guest.out(one, value & (1 << 8 * size) - 1, size)
                else:
                    guest.inp(one, size)
    finally:
        pc.close()
        memory.close()
