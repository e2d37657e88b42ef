"""Devices without a guest: a board over a machine that only notes what is asked of it."""

from __future__ import annotations

import struct

import msgspec

from vmfs.words import exits
from vmfs.words.errors import Invalid

IMAGE_SECTORS = 4096  # of the fixture `image`


class FakeMachine:
    """What a board asks of an engine's machine: lines, slots, the time, which stands still,
    and the deadline."""

    def __init__(self):
        self.lines = {}
        self.messages = []
        self.slots = {}
        self.time = 0
        self.a20 = True
        self.timer_output = True
        self.deadline = None
        self.soon = None
        self.came = False

    def end_soon(self):
        self.soon = self.time + 1

    def ended_soon(self):
        came, self.came = self.came, False
        return came

    def memory_written(self, address, size):
        pass

    def set_fast_bus(self, bus):
        return False

    def set_deadline(self, when):
        self.deadline = when

    def irq_line(self, gsi, level):
        self.lines[gsi] = level

    def signal_msi(self, address, data):
        self.messages.append((address, data))

    def set_a20(self, enabled):
        self.a20 = enabled

    def set_timer_output(self, connected):
        self.timer_output = connected

    def get_state(self, name):
        assert name == "clock"
        return struct.pack("<Q", self.time).ljust(48, b"\0")

    def map_memory(self, slot, address, fd, offset, size, *, read_only=False):
        if size:
            self.slots[slot] = address, fd, offset, size, read_only
        else:
            self.slots.pop(slot, None)

    def dirty_log(self, slot):
        return bytes(2)


def saved(board):
    """The state of every device, as bytes."""
    with board.asleep():
        return board.pack_devices()


def plain(device):
    """The state of a device as dicts and lists, to be changed, and given to `refuses`."""
    return msgspec.to_builtins(device.save(), builtin_types=(bytes,))


def refuses(device, state):
    """Whether it does not take such a state."""
    try:
        device.unpack(device.STATE.VERSION, msgspec.msgpack.encode(state))
    except Invalid:
        return True
    return False


def load(board, states):
    with board.asleep():
        board.load_devices(board.unpack_devices(states))


def pass_time(board, until):
    """The guest's time goes on, and the board is called at each deadline, as by an engine."""
    machine = board.machine
    while machine.deadline is not None and machine.deadline <= until:
        machine.time, machine.deadline = max(machine.time, machine.deadline), None
        board.call_due()
    machine.time = until


def settle(board):
    """New inputs come, at the next nanosecond."""
    machine = board.machine
    if machine.soon is not None:
        machine.time, machine.soon, machine.came = machine.soon, None, True
        board.call_due()


class FakeCpu:
    access_data = b""


class Guest:
    """Makes the accesses that a guest would."""

    def __init__(self, board):
        self.board = board
        self.ended = None

    def out(self, port, value, size=1):
        data = value.to_bytes(size, "little")
        self.ended = self.board.access(exits.Io(direction="out", port=port, size=size, data=data, rip=1), FakeCpu())

    def inp(self, port, size=1):
        cpu = FakeCpu()
        self.ended = self.board.access(exits.Io(direction="in", port=port, size=size, rip=1), cpu)
        return int.from_bytes(cpu.access_data, "little")

    def store(self, address, value, size=4):
        data = value.to_bytes(size, "little")
        self.board.access(exits.Mmio(direction="write", addr=address, size=size, data=data, rip=1), FakeCpu())

    def load(self, address, size=4):
        cpu = FakeCpu()
        self.board.access(exits.Mmio(direction="read", addr=address, size=size, rip=1), cpu)
        return int.from_bytes(cpu.access_data, "little")

    def config(self, slot, offset, value=None, size=4, function=0):
        self.out(0xCF8, 0x8000_0000 | slot << 11 | function << 8 | offset & 0xFC, 4)
        if value is None:
            return self.inp(0xCFC + (offset & 3), size)
        self.out(0xCFC + (offset & 3), value, size)
        return None
