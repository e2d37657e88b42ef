"""The chips of a q35, without a guest."""

from __future__ import annotations

import random
import struct

import pytest
from devices.fakes import FakeMachine, Guest, load, plain, refuses, saved

from vmfs.devices.chipset import ECAM_SIZE, Q35
from vmfs.devices.machine import Pc, Q35Pc, machine_type
from vmfs.devices.pci import PlainPciDevice
from vmfs.devices.power import BASE, rebased
from vmfs.devices.virtio.rng import Rng
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid, Unsupported

PCIEXBAR, LPC = 0x60, Q35.isa_slot


class Plain(PlainPciDevice):
    TYPE = "plain"
    VENDOR, DEVICE, CLASS = 0x1234, 0x5678, 0xFF0000


@pytest.fixture
def q35(memory):
    made = Q35Pc(FakeMachine(), memory)
    made.pci.plug(Rng(made, "rng0", 2))
    made.pci.plug(Plain(made, "plain", 3))
    yield made
    made.close()


def at(slot, offset, function=0, base=Q35.ecam):
    return base + (slot << 15) + (function << 12) + offset


def test_the_memory_has_what_the_ports_have(q35):
    guest = Guest(q35)
    for place in q35.pci.functions:
        slot, function = place >> 3, place & 7
        for offset in range(0, 256, 4):
            assert guest.load(at(slot, offset, function)) == guest.config(slot, offset, function=function)
    assert guest.load(at(2, 0), 2) == 0x1AF4 and guest.load(at(2, 2), 2) == 0x1044 and guest.load(at(2, 3), 1) == 0x10
    # Across dwords, and a quadword
    assert guest.load(at(2, 1), 4) == guest.load(at(2, 0), 8) >> 8 & 0xFFFF_FFFF
    guest.store(at(2, 0x3C), 0x55, 1)
    assert guest.config(2, 0x3C, size=1) == 0x55
    guest.store(at(2, 0x3A), 0x66 << 16, 4)  # 3Ch of it is the guest's
    assert guest.config(2, 0x3C, size=1) == 0x66
    guest.store(at(2, 4), 0, 2)
    assert q35.devices["rng0"].bar(0) is None  # its BARs are not decoded
    assert guest.load(at(9, 0)) == guest.load(Q35.ecam + (1 << 20)) == 0xFFFF_FFFF  # no device, and bus 1


def test_the_extended_space_is_that_of_express(q35):
    guest = Guest(q35)
    pointer, kinds = guest.config(2, 0x34, size=1), []
    while pointer:
        kinds.append(guest.config(2, pointer, size=1))
        pointer = guest.config(2, pointer + 1, size=1)
    assert kinds[0] == 0x10 and 0x11 in kinds
    assert guest.config(2, 0x42, size=2) == 0x92  # version 2, an integrated endpoint
    assert guest.load(at(2, 0x100)) == 0x0001_0003
    assert guest.load(at(2, 0x104), 8) == int.from_bytes(q35.own_bytes("serial number of rng0", 8), "little")
    guest.store(at(2, 0x104), 0)
    assert guest.load(at(2, 0x104)) and guest.load(at(2, 0x10C)) == guest.load(at(2, 0xFFC)) == 0
    assert guest.load(at(3, 0x100)) == guest.load(at(0, 0x100)) == 0xFFFF_FFFF


@pytest.mark.parametrize(("value", "start", "size"), [
    (0xE000_0001, 0xE000_0000, 1 << 28), (0x1_4000_0003, 0x1_4000_0000, 1 << 27), (0xC400_0005, 0xC400_0000, 1 << 26),
    (0xD400_0001, 0xD000_0000, 1 << 28), (Q35.ecam, None, 0), (Q35.ecam | 7, None, 0),
])  # fmt: skip
def test_it_is_where_pciexbar_says(q35, value, start, size):
    guest = Guest(q35)
    guest.config(0, PCIEXBAR, 0)
    guest.config(0, PCIEXBAR + 4, value >> 32)
    guest.config(0, PCIEXBAR, value & 0xFFFF_FFFF)
    windows = [(one.start, one.length) for one in q35.pci.windows() if one.space == "memory"]
    assert windows == ([] if start is None else [(start, size)])
    assert guest.load(at(2, 0), 2) == 0xFFFF
    if start == 0x1_4000_0000:
        assert guest.load(at(2, 0, base=start), 2) == 0x1AF4
    other = Q35Pc(FakeMachine(), q35.memory)
    other.pci.plug(Rng(other, "rng0", 2))
    other.pci.plug(Plain(other, "plain", 3))
    load(other, saved(q35))
    assert [(one.start, one.length) for one in other.pci.windows() if one.space == "memory"] == windows
    assert saved(other) == saved(q35)
    other.close()


@pytest.mark.parametrize("slot", [2, 3, 4, 5, 24, 25, 31])
def test_a_slot_has_its_input_and_its_gsi(q35, slot):
    """Of the eight of the router, each with a register of its own."""
    input_ = 4 + slot % 4 if slot < 25 else 0
    assert (Q35.wired(slot), Q35.gsi(slot)) == (input_, 16 + input_)
    register = (0x60, 0x61, 0x62, 0x63, 0x68, 0x69, 0x6A, 0x6B)[input_]
    device = q35.pci.functions.get(slot << 3)
    if device is None:
        device = q35.pci.plug(Plain(q35, "another", slot))
    if slot == LPC:
        device = q35.devices["smbus-pci"]
    guest = Guest(q35)
    for other in (*range(0x60, 0x64), *range(0x68, 0x6C)):
        guest.config(LPC, other, 0x80, size=1)
    guest.config(LPC, register, 5, size=1)
    device.set_irq(True)
    lines = q35.machine.lines
    assert {line for line, level in lines.items() if level} == {5, 16 + input_}
    guest.config(LPC, register, 0x80, size=1)
    assert not lines[5] and lines[16 + input_]


def test_acpis_hardware_is_where_the_lpc_bridge_says(q35):
    guest = Guest(q35)
    assert guest.inp(BASE + 0x20, 4) == 0 and guest.inp(BASE + 0x30, 4) & 0x20  # GPE0; SMIs were set up
    guest.config(LPC, 0x40, 0x1000)
    assert q35.devices["power"].base == 0x1000 and guest.inp(BASE + 0x30, 4) == 0xFFFF_FFFF
    guest.config(LPC, 0x44, 0, size=1)
    assert q35.devices["power"].base is None and guest.inp(0x1030, 4) == 0xFFFF_FFFF
    guest.config(LPC, 0x44, 0x80, size=1)
    q35.devices["power"].raise_event(0)
    assert guest.inp(0x1020, 4) == 1 and guest.inp(0x1024, 4) == 0
    assert not q35.machine.lines.get(9)
    guest.out(0x1028, 0x0101, 2)
    assert guest.inp(0x1028, 4) == 0x0101 and q35.machine.lines[9]
    guest.out(0x102C, 0xFFFF_FFFF, 4)  # of other events
    guest.out(0x1022, 0xFFFF, 2)
    assert guest.inp(0x1028, 4) == 0x0101 and guest.inp(0x102C, 4) == 0 and q35.machine.lines[9]
    guest.out(0x1020, 1, 1)
    assert guest.inp(0x1020, 1) == 0 and not q35.machine.lines[9]
    guest.out(0x1004, 0x2000, 2)
    assert guest.ended.cause == "poweroff"


def test_the_fadt_follows_it():
    table = b"FACP".ljust(244, b"\0")
    moved = rebased(table, 0x1000, Q35)
    assert struct.unpack_from("<I", moved, 80) == (0x1020,) and struct.unpack_from("<I", moved, 56) == (0x1000,)


def test_the_chipsets_own_registers(q35):
    guest = Guest(q35)
    base = 0xFED1_C000
    assert guest.load(base + 0x3410) == 0xFFFF_FFFF
    guest.config(LPC, 0xF0, base | 1)
    assert guest.load(base + 0x3410) == 0x20 and guest.load(base + 0x3404, 1) == 0x80
    assert guest.load(base + 0x3140, 2) == 0x3210 and guest.load(base + 0x31FF, 1) == 1 and guest.load(base) == 0
    guest.store(base + 0x3410, 0)
    assert guest.load(base + 0x3410) == 0x20
    assert guest.config(0, 0x9D, size=1) == 0x12  # SMRAM is locked
    guest.config(0, 0x9D, 0x48, size=1)
    assert guest.config(0, 0x9D, size=1) == 0x12


def test_the_smbus_has_its_bar_and_its_pin(q35):
    guest = Guest(q35)
    guest.config(LPC, 0x20, 0x700, function=3)
    q35.devices["smbus"].describe_memory(64 << 20)
    guest.out(0x704, 0x50 << 1 | 1)
    guest.out(0x703, 2)
    guest.out(0x702, 0x49)  # byte data, with an interrupt
    assert guest.inp(0x705) == 0x0B and q35.machine.lines[16] and not q35.machine.lines.get(9)
    assert guest.inp(0x710) == 0  # no other master has called
    guest.out(0x700, 2)
    assert not q35.machine.lines[16]
    for offset, kept in ((0x0C, 0), (0x0D, 3)):
        guest.out(0x700 + offset, 3)
        assert guest.inp(0x700 + offset) == kept
    guest.config(LPC, 0x40, 0, size=1, function=3)
    assert guest.inp(0x705) == 0xFF


def test_firmware_finds_it_as_after_a_reset(q35):
    guest = Guest(q35)
    q35.set_firmware_files({"file": b"x"})
    assert guest.load(at(2, 0)) == 0xFFFF_FFFF and guest.inp(BASE + 0x30, 4) == 0xFFFF_FFFF
    q35.fall_asleep()
    q35.wakes_by_firmware()
    assert guest.load(at(2, 0), 2) == 0x1AF4 and guest.inp(BASE + 0x30, 4) == 0xFFFF_FFFF
    q35.reset()
    assert guest.inp(BASE + 0x30, 4) & 0x20


def test_a_state_that_cannot_be_is_refused(q35):
    for name, place, value in (("bridge", 0x9D, 0x48), ("isa-bridge", 0x44, 1), ("smbus-pci", 0x40, 2)):
        state = plain(q35.devices[name])
        config = bytearray(state["config"])
        config[place] ^= value
        assert refuses(q35.devices[name], {**state, "config": bytes(config)}), name
    with q35.asleep():
        state = q35.save()
    assert len(state.pirqs) == 8
    pc = Pc(FakeMachine(), q35.memory)
    with pytest.raises(Invalid, match="4 inputs, not 8"):
        pc.check(state)
    pc.close()


def test_what_it_has_not():
    assert machine_type("q35") is Q35Pc
    memory = Memory(Q35.memory_most + 4096)
    with pytest.raises(Invalid, match="up to 2816M"):
        Q35Pc(FakeMachine(), memory)
    memory.close()
    memory = Memory(1 << 20)
    q35 = Q35Pc(FakeMachine(), memory)
    with pytest.raises(Unsupported, match="ahci PATH"):
        q35._make_ide()
    q35.close()
    memory.close()
    assert Q35.ecam + ECAM_SIZE == Q35.memory_start


def accesses(dice, guest, count):
    """Any of its configuration spaces, by ports and in memory, and of the registers that they place; what was read."""
    seen = []
    places = [*guest.board.pci.functions, 0x55, 0xFF]
    for _ in range(count):
        size, value = dice.choice((1, 2, 4)), dice.choice((0, 1, 0xFED1_C001, 0xFFFF_FFFF, dice.getrandbits(32)))
        place, offset = dice.choice(places), dice.randrange(256 // size) * size
        window = next((one for one in guest.board.pci.windows() if one.space == "memory"), None)
        base = Q35.ecam if window is None else window.start
        kind = dice.randrange(6)
        if kind == 0:
            guest.config(place >> 3, offset, value & (1 << 8 * size) - 1, size, place & 7)
        elif kind == 1:
            seen.append(guest.config(place >> 3, offset, None, size, place & 7))
        elif kind == 2:
            size = dice.choice((1, 2, 4, 8))
            guest.store(base + (place << 12) + dice.randrange(0xFF8), value & (1 << 8 * size) - 1, size)
        elif kind == 3:
            size = dice.choice((1, 2, 4, 8))
            inside = dice.choice((place << 12, dice.randrange(1 << 26))) + dice.randrange(64)
            seen.append(guest.load(base + inside, size))
        elif kind == 4:
            power = guest.board.devices["power"].base or BASE
            guest.out(power + dice.randrange(128 // size) * size, value & ~0x2000 & (1 << 8 * size) - 1, size)
        else:
            seen.append(guest.load(0xFED1_C000 + dice.randrange(0x4000), dice.choice((1, 2, 4, 8))))
    return seen


@pytest.mark.parametrize("seed", range(12))
def test_no_access_gets_an_exception_out_and_a_state_goes_on_alike(q35, seed):
    guest = Guest(q35)
    accesses(random.Random(seed), guest, 1500)
    other = Q35Pc(FakeMachine(), q35.memory)
    other.pci.plug(Rng(other, "rng0", 2))
    other.pci.plug(Plain(other, "plain", 3))
    with q35.asleep():
        board = q35.save()
    other.check(board)
    with other.asleep():
        other.load(board)
    load(other, saved(q35))
    assert saved(other) == saved(q35)
    more = [accesses(random.Random(seed + 100), Guest(one), 300) for one in (q35, other)]
    assert more[0] == more[1] and saved(other) == saved(q35)
    other.close()
