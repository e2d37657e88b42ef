"""MSI, the plain capability: what a driver reads and writes of it, messages, masks, pending bits, states."""

from __future__ import annotations

import random

import pytest
from devices.fakes import FakeMachine, Guest, load, plain, refuses, saved

from vmfs.devices.chipset import I440FX
from vmfs.devices.machine import Pc
from vmfs.devices.pci import PlainPciDevice
from vmfs.memory.ram import Memory

SLOT, AT = 5, 0x40
CONTROL, LOW, HIGH, DATA, MASK, PENDING = AT + 2, AT + 4, AT + 8, AT + 12, AT + 16, AT + 20
ENABLED, FOUR, EIGHT = 1, 2 << 4, 3 << 4
ADDRESS, DATUM = 0x12_FEE0_1000, 0x4145


class Card(PlainPciDevice):
    TYPE = "card"
    VENDOR, DEVICE, CLASS = 0x1234, 0x0003, 0xFF0000
    MESSAGES = 8

    def __init__(self, board, name="card", slot=SLOT):
        super().__init__(board, name, slot)
        self.add_msi(self.MESSAGES)


class Bench:
    def __init__(self):
        self.memory = Memory(1 << 20)
        self.pc = Pc(FakeMachine(), self.memory)
        self.card = self.pc.pci.plug(Card(self.pc))
        self.guest = Guest(self.pc)

    def config(self, offset, value=None, size=4):
        return self.guest.config(SLOT, offset, value, size)

    def enable(self, control=ENABLED):
        self.config(LOW, ADDRESS & 0xFFFF_FFFF)
        self.config(HIGH, ADDRESS >> 32)
        self.config(DATA, DATUM, 2)
        self.config(4, 0x7, 2)  # bus master
        self.config(CONTROL, control, 2)

    def taken(self):
        taken, self.pc.machine.messages = self.pc.machine.messages, []
        assert {address for address, _ in taken} <= {ADDRESS}
        return [data for _, data in taken]

    def close(self):
        self.pc.close()
        self.memory.close()


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.close()


def test_registers(bench):
    """PCI 3.0, 6.8.1: eight messages, 64 bits, a mask of each."""
    assert bench.config(6, size=2) & 0x10 and bench.config(0x34, size=1) == AT
    assert bench.config(AT) == 0x0186_0005
    for offset in range(AT, AT + 24, 4):
        bench.config(offset, 0xFFFF_FFFF)
    found = [bench.config(offset) for offset in range(AT, AT + 24, 4)]
    assert found == [0x01F7_0005, 0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF, 0xFF, 0]


@pytest.mark.parametrize("allowed, bits", [(0, 0), (2, 3), (3, 7), (5, 7), (7, 7)])
def test_a_message_is_the_drivers_data_with_its_number(bench, allowed, bits):
    """One is allowed, four, eight, and more than there are."""
    bench.enable(ENABLED | allowed << 4)
    for number in range(9):
        assert bench.card.signal(number)
    assert bench.taken() == [DATUM & ~bits | number & bits for number in range(9)]


def test_without_it_inta_is_the_interrupt(bench):
    assert not bench.card.signal(0)
    bench.card.set_irq(True)
    assert bench.pc.machine.lines[I440FX.gsi(SLOT)] and bench.taken() == []
    bench.enable()
    assert not bench.pc.machine.lines[I440FX.gsi(SLOT)] and bench.config(6, size=2) & 8
    bench.config(CONTROL, 0, 2)
    assert bench.pc.machine.lines[I440FX.gsi(SLOT)]


def test_masks_and_pending_bits(bench):
    bench.enable(ENABLED | EIGHT)
    bench.config(MASK, 0b1010)
    for number in (1, 3, 1, 0):
        bench.card.signal(number)
    assert bench.taken() == [0x4140] and bench.config(PENDING) == 0b1010
    bench.config(PENDING, 0)
    assert bench.config(PENDING) == 0b1010, "read-only"
    bench.config(MASK, 0b1000)
    assert bench.taken() == [0x4141] and bench.config(PENDING) == 0b1000
    bench.config(MASK, 0, 1)
    assert bench.taken() == [0x4143] and bench.config(PENDING) == 0


def test_without_the_bus_it_waits(bench):
    bench.enable(ENABLED | FOUR)
    bench.config(4, 3, 2)
    bench.card.signal(2)
    assert bench.taken() == []
    bench.config(4, 7, 2)
    assert bench.taken() == [0x4146]
    bench.pc.reset()
    assert bench.config(AT) == 0x0186_0005 and not bench.card.signal(0)


def test_the_state_has_masks_and_pending_bits(bench):
    bench.enable(ENABLED | EIGHT)
    bench.config(MASK, 0xF0)
    bench.card.signal(5)
    other = Bench()
    try:
        load(other.pc, saved(bench.pc))
        assert saved(other.pc) == saved(bench.pc) and other.taken() == []
        other.config(MASK, 0)
        assert other.taken() == [0x4145]
    finally:
        other.close()
    state = plain(bench.card)
    config = bytearray(state["config"])
    assert not refuses(bench.card, state)
    for offset, value in ((PENDING + 1, 1), (MASK + 1, 1), (CONTROL, 0x88), (AT, 6)):
        wrong = bytes(config[:offset] + bytes([value]) + config[offset + 1 :])
        assert refuses(bench.card, {**state, "config": wrong})


def test_random_accesses(bench):
    """A message is never lost and never sent twice: each signal is a message, or its bit is pending once."""
    dice = random.Random(8)
    bench.enable(ENABLED | EIGHT)
    pending = set()
    for _ in range(3000):
        what = dice.randrange(3)
        if what == 0:
            bench.config(MASK, dice.getrandbits(8), dice.choice((1, 2, 4)))
        elif what == 1:
            bench.config(4, dice.choice((3, 7)), 2)
        else:
            number = dice.randrange(8)
            bench.card.signal(number)
            pending.add(number)
        mask = bench.config(MASK)
        sent = {number for number in pending if not mask >> number & 1} if bench.config(4) & 4 else set()
        assert bench.taken() == [0x4140 | number for number in sorted(sent)]
        pending -= sent
        assert bench.config(PENDING) == sum(1 << number for number in pending)
