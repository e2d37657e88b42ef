"""The PCI router of the ISA bridge: which line of the 8259s each slot's INTA drives."""

from __future__ import annotations

import random

import msgspec
import pytest
from devices.fakes import FakeMachine, Guest, load, plain, refuses, saved

from vmfs.devices.chipset import I440FX
from vmfs.devices.isa import IRQS
from vmfs.devices.machine import Pc
from vmfs.devices.pci import PlainPciDevice
from vmfs.memory.ram import Memory

SLOTS = 2, 3, 4, 5, 6, 7


class Card(PlainPciDevice):
    TYPE = "card"
    VENDOR, DEVICE, CLASS = 0x1234, 0x0002, 0xFF0000


def a_pc():
    memory = Memory(1 << 20)
    pc = Pc(FakeMachine(), memory)
    for slot in SLOTS:
        pc.pci.plug(Card(pc, f"card{slot}", slot))
    return pc


@pytest.fixture
def pc():
    made = a_pc()
    yield made
    made.close()
    made.memory.close()


def high(pc):
    """The lines of the 8259s that are high."""
    return {line for line, level in pc.machine.lines.items() if level and line < 16}


def route(pc, number, value):
    Guest(pc).config(I440FX.isa_slot, I440FX.routes[0] + number, value, size=1)


def test_from_the_beginning_it_routes_as_firmware_does(pc):
    guest = Guest(pc)
    assert [guest.config(I440FX.isa_slot, I440FX.routes[0] + number, size=1) for number in range(4)] == [10, 10, 11, 11]
    for slot in SLOTS:
        card = pc.devices[f"card{slot}"]
        card.set_irq(True)
        # SeaBIOS: pci_irqs[(pin - 1 + slot - 1) & 3] of 10, 10, 11, 11, with pin 1 for INTA
        assert high(pc) == {(10, 10, 11, 11)[(slot - 1) & 3]} == {I440FX.pic_irq(slot)}
        assert guest.config(slot, 0x3C, size=2) == 0x0100 | I440FX.pic_irq(slot)
        assert pc.machine.lines[I440FX.gsi(slot)]
        card.set_irq(False)
        assert high(pc) == set() and not pc.machine.lines[I440FX.gsi(slot)]


def test_a_line_of_two_inputs_is_high_while_either_is(pc):
    assert I440FX.wired(2) != I440FX.wired(5) and I440FX.wired(2) == I440FX.wired(6)
    for number in range(4):
        route(pc, number, 5)
    order = [pc.devices[f"card{slot}"] for slot in (2, 5, 6)]
    for count, card in enumerate(order):
        card.set_irq(True)
        assert high(pc) == {5}, count
    for card in order[:-1]:
        card.set_irq(False)
        assert high(pc) == {5}
    order[-1].set_irq(False)
    assert high(pc) == set()


@pytest.mark.parametrize("value", range(256))
def test_every_value_of_a_register(pc, value):
    card = pc.devices["card2"]
    card.set_irq(True)
    route(pc, I440FX.wired(2), value)
    assert Guest(pc).config(I440FX.isa_slot, I440FX.routes[0] + I440FX.wired(2), size=1) == value & 0x8F
    assert high(pc) == ({value & 15} if not value & 0x80 and value & 15 in IRQS else set())
    assert pc.machine.lines[I440FX.gsi(2)], "the IOAPIC's line does not pass the router"
    card.set_irq(False)
    assert high(pc) == set()


def test_the_line_goes_along_while_it_is_high(pc):
    pc.devices["card2"].set_irq(True)
    pc.devices["card3"].set_irq(True)
    assert high(pc) == {10, 11}
    Guest(pc).config(I440FX.isa_slot, I440FX.routes[0], 0x80_0C_09_80, size=4)  # A off, B 9, C 12, D off
    assert high(pc) == {9, 12}
    Guest(pc).config(2, 5, 4, size=1)  # the command register holds it back
    assert high(pc) == {12}
    pc.reset()
    assert high(pc) == set()
    pc.devices["card2"].set_irq(True)
    assert high(pc) == {10}


def test_a_device_that_is_gone_holds_nothing(pc):
    card = pc.devices["card2"]
    card.set_irq(True)
    pc.pci.unplug(card)
    assert high(pc) == set()
    route(pc, I440FX.wired(2), 5)
    assert high(pc) == set()


def copy_of(pc, whole):
    """As the rows of STATE are set: the engine's lines, the board, and the devices, or those of which the state
    differs."""
    other = a_pc()
    dice = random.Random(3)
    for slot in SLOTS:  # what it was before does not matter
        other.devices[f"card{slot}"].set_irq(dice.random() < 0.5)
        route(other, slot & 3, dice.choice(IRQS))
    other.machine.lines = dict(pc.machine.lines)
    with pc.asleep():
        board = msgspec.msgpack.encode(pc.save())
    calls = []
    other.machine.irq_line = lambda gsi, level: calls.append((gsi, level))
    with other.asleep():
        other.load(msgspec.msgpack.decode(board, type=type(pc.save())))
    present = saved(other)
    load(other, {name: state for name, state in saved(pc).items() if whole or state != present[name]})
    assert calls == [], "no line moves: the engine's chips have them as they were"
    del other.machine.irq_line
    return other


@pytest.mark.parametrize("whole", [True, False])
def test_it_is_state_with_lines_that_are_high(pc, whole):
    route(pc, 1, 5)
    route(pc, 2, 0x80)
    for slot in (2, 3, 5):
        pc.devices[f"card{slot}"].set_irq(True)
    other = copy_of(pc, whole)
    try:
        assert high(other) == high(pc) == {5, 10} and saved(other) == saved(pc)
        for machine in (pc, other):
            route(machine, 2, 7)
            machine.devices["card2"].set_irq(False)
        assert high(other) == high(pc) == {7, 10}
    finally:
        other.close()
        other.memory.close()


def test_a_state_that_no_router_has(pc):
    state = plain(pc.devices["isa-bridge"])
    assert not refuses(pc.devices["isa-bridge"], state)
    config = bytearray(state["config"])
    config[I440FX.routes[0]] = 0x1A
    assert refuses(pc.devices["isa-bridge"], {**state, "config": bytes(config)})
