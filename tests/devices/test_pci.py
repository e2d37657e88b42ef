"""The PCI bus: registers of every kind of BAR, expansion ROMs, slots of several functions."""

import random

import pytest
from devices.fakes import FakeMachine, Guest, load, plain, refuses, saved

from vmfs.devices.chipset import MEMORY_END
from vmfs.devices.machine import Pc
from vmfs.devices.pci import MEMORY_START, ROM_REGION, Bar, PlainPciDevice
from vmfs.memory.ram import Memory
from vmfs.words.errors import Busy, Invalid

SLOT = 9
ROM = b"\x55\xaa" + bytes(range(2, 200)) * 12  # 2,378 bytes: 4 KiB


class Thing(PlainPciDevice):
    """Registers that say where they were accessed."""

    TYPE = "thing"
    VENDOR, DEVICE, CLASS = 0x1234, 0x0001, 0xFF0000
    INTERRUPT = False
    BARS = {
        0: Bar("memory", 1 << 24, prefetchable=True, wide=True),
        2: Bar("memory", 0x1000),
        3: Bar("port", 0x40),
        4: Bar("memory", 0x2000, wide=True),
    }

    def __init__(self, board, name="thing", slot=SLOT, function=0, rom=b""):
        self.function_number, self.rom = function, rom
        super().__init__(board, name, slot)

    def read(self, region, offset, size):
        return super().read(region, offset, size) if region == ROM_REGION else region << 4 | offset & 15


@pytest.fixture
def pc():
    memory = Memory(1 << 20)
    made = Pc(FakeMachine(), memory)
    yield made
    made.close()
    memory.close()


class Config:
    def __init__(self, pc, slot=SLOT, function=0):
        self.guest, self.place = Guest(pc), slot << 3 | function

    def __call__(self, offset, value=None, size=4):
        self.guest.out(0xCF8, 1 << 31 | self.place << 8 | offset & 0xFC, 4)
        if value is None:
            return self.guest.inp(0xCFC + (offset & 3), size)
        return self.guest.out(0xCFC + (offset & 3), value, size)


def test_a_guest_finds_sizes_and_kinds(pc):
    """As PCI 3.0, 6.2.5.1, has it: ones are written, with decoding off, and what stays zero is the size."""
    pc.pci.plug(Thing(pc, rom=ROM))
    config = Config(pc)
    config(4, 0)
    was = [config(0x10 + 4 * index) for index in range(6)] + [config(0x30)]
    for at in (*range(0x10, 0x28, 4), 0x30):
        config(at, 0xFFFF_FFFF)
    found = [config(0x10 + 4 * index) for index in range(6)] + [config(0x30)]
    assert found == [0xFF00_000C, 0xFFFF_FFFF, 0xFFFF_F000, 0xFFFF_FFC1, 0xFFFF_E004, 0xFFFF_FFFF, 0xFFFF_F001]
    assert [value & 15 for value in was] == [0xC, 0, 0, 1, 4, 0, 0]
    assert was[1] == was[5] == 0 and all(MEMORY_START <= was[at] < MEMORY_END for at in (0, 2, 4, 6))


def test_registers_answer_where_they_are(pc):
    thing = pc.pci.plug(Thing(pc))
    guest, config = Guest(pc), Config(pc)
    for index, bar in thing.BARS.items():
        start = thing.bar(index)
        read = guest.inp if bar.space == "port" else guest.load
        assert read(start + 5, 1) == index << 4 | 5
        assert start % bar.size == 0
    config(4, 0)
    assert not any(window.region in thing.BARS for window in thing.windows())


@pytest.mark.parametrize("address", [1 << 32, 1 << 39, (1 << 52) - (1 << 24)])
def test_a_wide_register_goes_above_4_gib(pc, address):
    thing = pc.pci.plug(Thing(pc))
    guest, config = Guest(pc), Config(pc)
    config(0x14, address >> 32)
    config(0x10, address & 0xFFFF_FFFF)
    assert thing.bar(0) == address
    assert guest.load(address + (1 << 24) - 4, 1) == 0x0C
    with pc.asleep():
        state = plain(thing)
    assert not refuses(thing, state)
    other = Pc(FakeMachine(), pc.memory)
    copy = other.pci.plug(Thing(other))
    load(other, saved(pc))
    assert copy.bar(0) == address
    other.close()


@pytest.mark.parametrize("address", [0, MEMORY_END, 0xFEE0_0000, 0xFF00_0000, 1 << 52, (1 << 64) - (1 << 24)])
def test_it_answers_nowhere_where_none_may_be(pc, address):
    thing = pc.pci.plug(Thing(pc))
    config = Config(pc)
    config(0x14, address >> 32)
    config(0x10, address & 0xFFFF_FFFF)
    assert thing.bar(0) is None


def test_a_rom_is_read_once_it_is_enabled(pc):
    thing = pc.pci.plug(Thing(pc, rom=ROM))
    guest, config = Guest(pc), Config(pc)
    at = config(0x30)
    assert not at & 1 and thing.bar(ROM_REGION) is None
    assert guest.load(at, 2) == 0xFFFF
    config(0x30, at | 1)
    whole = b"".join(guest.load(at + offset, 4).to_bytes(4, "little") for offset in range(0, 0x1000, 4))
    assert whole == ROM.ljust(0x1000, b"\xff")
    guest.store(at, 0)
    assert guest.load(at, 2) == 0xAA55
    config(4, 1)  # no memory
    assert thing.bar(ROM_REGION) is None
    thing.reset()
    assert config(0x30) == at


def test_a_slot_has_several_functions(pc):
    first = pc.pci.plug(Thing(pc, "first"))
    assert Config(pc)(0x0E, size=1) == 0
    second = pc.pci.plug(Thing(pc, "second", function=5))
    assert Config(pc)(0x0E, size=1) == 0x80 and Config(pc, function=5)(0x0E, size=1) == 0
    assert Config(pc, function=5)(0) == 0x0001_1234 and Config(pc, function=1)(0) == 0xFFFF_FFFF
    assert second.describe()["pci"] == "00:09.5 1234:0001"
    starts = [window.start for thing in (first, second) for window in thing.windows()]
    assert len(set(starts)) == len(starts) == 8
    Config(pc, function=5)(4, 0)
    assert second.windows() == () and first.bar(0) is not None
    first.reset()
    assert Config(pc)(0x0E, size=1) == 0x80
    with pytest.raises(Busy):
        pc.pci.unplug(first)
    pc.pci.unplug(second)
    assert Config(pc)(0x0E, size=1) == 0
    pc.pci.unplug(first)
    assert Config(pc)(0) == 0xFFFF_FFFF


def test_places_that_cannot_be(pc):
    free = pc.pci.free_slot()
    for slot, function in ((SLOT, 1), (0, 0), (SLOT, 8), (SLOT, -1)):
        with pytest.raises(Invalid):
            pc.pci.plug(Thing(pc, slot=slot, function=function))
    assert pc.pci.free_slot() == free and "thing" not in pc.devices


def test_random_accesses_end_well(pc):
    """Of configuration and of what it moves; the state of any moment is taken by a fresh one."""
    thing = pc.pci.plug(Thing(pc, rom=ROM))
    guest, config, dice = Guest(pc), Config(pc), random.Random(11)
    for turn in range(4000):
        at, size = dice.choice((4, 5, 0x0C, 0x0E, 0x3C, *range(0x10, 0x34))), dice.choice((1, 2, 4))
        at -= at % size
        config(at, dice.choice((0, (1 << 8 * size) - 1, dice.getrandbits(8 * size))), size)
        for window in thing.windows():
            offset = dice.randrange(window.length - 8)
            if window.space == "port":
                guest.out(window.start + offset, 1)
            else:
                guest.store(window.start + offset, 1)
                guest.load(window.start + offset)
        if turn % 500 == 0:
            assert not refuses(thing, plain(thing))
    thing.reset()
    assert {window.region for window in thing.windows()} == set(thing.BARS)
