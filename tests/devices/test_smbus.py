"""The SMBus host, and what it finds on its bus."""

from __future__ import annotations

import random

import pytest
from devices.fakes import FakeMachine, Guest, plain, refuses

from vmfs.devices.machine import Pc
from vmfs.devices.smbus import module_sizes, spd
from vmfs.memory.ram import Memory

BASE, IRQ = 0x700, 9
STATUS, CONTROL, COMMAND, ADDRESS, DATA0, DATA1, BLOCK = 0, 2, 3, 4, 5, 6, 7
QUICK, BYTE, BYTE_DATA, WORD_DATA, BLOCK_DATA = 0, 1, 2, 3, 5
DONE, NO_ANSWER, BUS_ERROR, KILLED = 2, 4, 8, 16
MIB = 1 << 20


class Host(Guest):
    def put(self, register, value, base=BASE):
        self.out(base + register, value)

    def get(self, register):
        return self.inp(BASE + register)

    def transact(self, protocol, address=0x50, *, reads=False, command=0, flags=0):
        """The status, which is cleared."""
        self.put(STATUS, 0xFF)
        self.put(ADDRESS, address << 1 | reads)
        self.put(COMMAND, command)
        self.put(CONTROL, protocol << 2 | 0x40 | flags)
        return self.get(STATUS)


@pytest.fixture
def host(pc):
    pc.devices["smbus"].describe_memory(192 * MIB)
    return Host(pc)


def test_bytes_and_words(host):
    first, second = spd(128 * MIB, 0), spd(64 * MIB, 1)
    assert host.transact(QUICK) == host.transact(QUICK, 0x51) == DONE and host.transact(QUICK, 0x52) == NO_ANSWER
    assert host.transact(BYTE_DATA, reads=True, command=2) == DONE and host.get(DATA0) == first[2] == 0x0B
    assert host.transact(WORD_DATA, 0x51, reads=True, command=126) == DONE
    assert bytes((host.get(DATA0), host.get(DATA1))) == second[126:128]
    assert host.transact(BYTE, command=4) == DONE
    for at in (4, 5, 6):
        assert host.transact(BYTE, reads=True) == DONE and host.get(DATA0) == first[at]
    host.put(DATA0, 0x12)
    host.put(DATA1, 0x34)
    assert host.transact(WORD_DATA, command=0xF7) == DONE  # a page ends there
    assert host.transact(BYTE_DATA, reads=True, command=0xF7) == DONE and host.get(DATA0) == 0x12
    assert host.transact(BYTE_DATA, reads=True, command=0xF0) == DONE and host.get(DATA0) == 0x34
    assert host.get(CONTROL) == BYTE_DATA << 2  # START is not kept
    assert host.transact(4) == BUS_ERROR
    host.put(CONTROL, 2)
    assert host.get(STATUS) == BUS_ERROR | KILLED


def test_blocks(host):
    host.get(CONTROL)
    host.put(DATA0, 7)
    for value in b"of data":
        host.put(BLOCK, value)
    assert host.transact(BLOCK_DATA, command=0xF0) == DONE
    host.put(DATA0, 0)
    assert host.transact(BLOCK_DATA, reads=True, command=0xF0) == DONE and host.get(DATA0) == 7
    host.get(CONTROL)
    assert bytes(host.get(BLOCK) for _ in range(7)) == b"of data"
    for count in (0, 33):
        host.put(DATA0, count)
        assert host.transact(BLOCK_DATA, command=0xF0) == BUS_ERROR
    assert host.transact(BLOCK_DATA, reads=True, command=0x92) == BUS_ERROR  # no block begins there


def test_the_interrupt(pc, host):
    lines = pc.machine.lines
    assert host.transact(QUICK) == DONE and not lines.get(IRQ)
    assert host.transact(QUICK, 0x60, flags=1) == NO_ANSWER and lines[IRQ]
    host.put(STATUS, NO_ANSWER)
    assert not lines[IRQ]
    host.config(1, 0xD2, 1, size=1, function=3)  # SMI
    assert host.transact(QUICK, flags=1) == DONE and not lines[IRQ]
    host.config(1, 0xD2, 9, size=1, function=3)
    assert lines[IRQ]
    pc.devices["smbus"].reset()
    assert not lines[IRQ] and host.get(STATUS) == 0


def test_where_it_is(pc, host):
    """As firmware says, and while the function's ports and the host are enabled."""
    config = {"function": 3}
    assert host.config(1, 0x90, **config) == 0x701
    host.config(1, 0x90, 0xFFFF_FFFF, **config)
    assert host.config(1, 0x90, **config) == 0xFFF1
    host.config(1, 0x90, 0xB101, **config)
    assert host.get(ADDRESS) == 0xFF
    host.put(ADDRESS, 0x77, 0xB100)
    assert host.inp(0xB100 + ADDRESS) == 0x77
    for offset, off, on in ((0xD2, 8, 9), (4, 2, 3)):
        host.config(1, offset, off, size=1, **config)
        assert host.inp(0xB100 + ADDRESS) == 0xFF
        host.config(1, offset, on, size=1, **config)
        assert host.inp(0xB100 + ADDRESS) == 0x77


@pytest.mark.parametrize(
    ("size", "modules"),
    [
        (64, (64,)), (256, (256,)), (448, (256, 128, 64)), (1024, (1024,)), (96 << 10, (32 << 10,) * 3),
        (16, ()), (100, ()), (960, (512, 256, 128, 64)), (1984, ()), (256 << 10, ()),
    ],
)  # fmt: skip
def test_modules_are_the_memory(size, modules):
    assert module_sizes(size * MIB) == [one * MIB for one in modules]
    for number, one in enumerate(modules):
        data = spd(one * MIB, number)
        chips, width, ranks = 256 << data[4], 4 << (data[7] & 7), (data[7] >> 3) + 1  # Mbit, bits
        assert chips // 8 * 64 // width * ranks == one and data[8] == 3


def test_states(pc, host):
    smbus = pc.devices["smbus"]
    host.transact(BYTE, command=9)
    state = plain(smbus)
    assert not refuses(smbus, state)
    for changed in ({"index": 32}, {"block": b"1"}, {"modules": [[b"1", 0]]}, {"data": [1]}, {"slave": b""},
                    {"modules": state["modules"] * 3}):  # fmt: skip
        assert refuses(smbus, state | changed)


@pytest.mark.parametrize("seed", range(10))
def test_any_driver(seed):
    dice, memory = random.Random(seed), Memory(1 << 20)
    pc = Pc(FakeMachine(), memory)
    try:
        pc.devices["smbus"].describe_memory(64 * MIB)
        host = Host(pc)
        for _ in range(400):
            at, size, value = dice.randrange(16), dice.choice((1, 1, 2, 4)), dice.getrandbits(32)
            if at + size > 16:
                continue
            if dice.random() < 0.3:
                host.inp(BASE + at, size)
            elif dice.random() < 0.4:
                address = dice.choice((0x50, value >> 8 & 0x7F))
                host.transact(value & 7, address, reads=bool(value & 8), command=value >> 16 & 255)
            else:
                host.out(BASE + at, value & (1 << 8 * size) - 1, size)
        smbus = pc.devices["smbus"]
        before = smbus.pack()
        smbus.load(smbus.unpack(1, before))
        assert smbus.pack() == before
    finally:
        pc.close()
        memory.close()
