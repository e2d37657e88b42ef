"""Parallel flash: its commands as a driver gives them, what lands on its disk, and what a guest must not do."""

from __future__ import annotations

import os
import random
import struct

import pytest
from devices.fakes import Guest, plain, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.devices.pflash import BLOCK, BUFFER_MOST, Pflash
from vmfs.devices.virtio.disk import open_disk
from vmfs.words.errors import Busy, Invalid

SIZE = 16 * BLOCK
START = (1 << 32) - SIZE
READY = 0x80


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "flash"
    path.write_bytes(random.Random(5).randbytes(SIZE))
    return path


def add(pc, path, mode, *, end=1 << 32, name="pflash0"):
    flags = os.O_RDWR if mode == "rw" else os.O_RDONLY
    device = Pflash(pc, name, open_disk(os.open(path, flags), mode), end, path=str(path))
    pc.plug(device)
    return device


@pytest.fixture
def flash(pc, image):
    return add(pc, image, "rw")


def command(guest, at, *values):
    for value in values:
        guest.store(START + at, value, 1)


def contents(pc, device):
    """As the guest has them, who finds memory there."""
    _, fd, offset, size, read_only = pc.machine.slots[device._slot]
    assert read_only
    return os.pread(fd, size, offset)


def test_an_array_is_memory_and_everything_else_is_not(pc, flash, guest, image):
    assert pc.machine.slots[flash._slot][0] == START and contents(pc, flash) == image.read_bytes()
    command(guest, 0, 0x70)
    assert flash._slot not in pc.machine.slots
    assert guest.load(START + 9, 1) == READY and guest.load(START, 4) == 0x80808080
    command(guest, 5, 0xFF)
    assert pc.machine.slots[flash._slot][0] == START


def test_programming_clears_bits_and_erasing_sets_them(pc, flash, guest, image):
    before = bytearray(image.read_bytes())
    command(guest, 5000, 0x40, 0x5A, 0x70)
    assert guest.load(START, 1) == READY
    assert image.read_bytes() == before, "before it is an array again the disk has nothing"
    command(guest, 0, 0xFF)
    before[5000] &= 0x5A
    assert contents(pc, flash) == image.read_bytes() == before
    command(guest, BLOCK + 9, 0x20, 0xD0, 0xFF)
    before[BLOCK : 2 * BLOCK] = b"\xff" * BLOCK
    assert contents(pc, flash) == image.read_bytes() == before
    command(guest, BLOCK, 0x10, 0x12)
    assert guest.load(START, 1) == READY
    command(guest, BLOCK, 0xFF)
    assert image.read_bytes()[BLOCK] == 0x12 and dict(flash.counters) == {"programmed": 2, "erased": 1}


def test_the_buffer_is_programmed_as_a_whole(pc, flash, guest, image):
    command(guest, 0, 0x20, 0xD0, 0xE8)
    assert guest.load(START, 1) == READY
    command(guest, 0, 3)
    for at, value in enumerate(b"abcd"):
        command(guest, 8 + at, value)
    command(guest, 8, 0xD0, 0xFF)
    assert image.read_bytes()[7:13] == b"\xffabcd\xff"
    command(guest, BLOCK - 1, 0xE8, 1, 1)
    command(guest, BLOCK, 1, 0xD0)
    assert guest.load(START, 1) == READY | 0x30, "a buffer is of one block"
    command(guest, 0, 0x50, 0xE8, BUFFER_MOST)
    assert guest.load(START, 1) == READY | 0x30, "and of 32 bytes"
    command(guest, 0, 0x50, 0xE8, 0, 1, 0xFF)
    assert guest.load(START, 1) == READY | 0x30, "and is confirmed"
    command(guest, 0, 0x50)
    assert guest.load(START, 1) == 0, "by which OVMF knows that it is flash"


def test_a_locked_block_stays(pc, flash, guest, image):
    before = image.read_bytes()
    command(guest, 3 * BLOCK, 0x60, 0x01, 0x90)
    assert guest.load(START + 3 * BLOCK + 2, 1) == 1 and guest.load(START + 2, 1) == 0
    command(guest, 3 * BLOCK, 0x20, 0xD0)
    assert guest.load(START, 1) == READY | 0x22
    command(guest, 3 * BLOCK, 0x50, 0x40, 0)
    assert guest.load(START, 1) == READY | 0x12
    pc.reset()
    assert image.read_bytes() == contents(pc, flash) == before
    command(guest, 3 * BLOCK, 0x20, 0xD0)
    assert guest.load(START, 1) == READY | 0x22, "a reset keeps locks"
    command(guest, 0, 0x50, 0x60, 0xD0)
    command(guest, 3 * BLOCK, 0x20, 0xD0, 0xFF)
    assert image.read_bytes()[3 * BLOCK : 4 * BLOCK] == b"\xff" * BLOCK
    command(guest, 0, 0x60, 0x33)
    assert guest.load(START, 1) == READY | 0x30


def test_one_that_is_ro_is_protected(pc, guest, image):
    flash = add(pc, image, "ro")
    before = image.read_bytes()
    command(guest, 0, 0x40, 0)
    assert guest.load(START, 1) == READY | 0x12
    command(guest, 0, 0x90)
    assert [guest.load(START + at, 1) for at in range(4)] == [0x89, 0x18, 1, 0]
    command(guest, 0, 0xFF)
    assert contents(pc, flash) == before


def test_what_it_says_of_itself(flash, guest):
    command(guest, 0x55, 0x98)
    table = bytes(guest.load(START + at, 1) for at in range(0x40))
    assert table[0x10:0x15] == b"QRY\1\0" and table[0x27] == 16
    regions, blocks, size = struct.unpack_from("<BHH", table, 0x2C)
    assert (regions, (blocks + 1) * size * 256, size * 256) == (1, SIZE, BLOCK)
    at = struct.unpack_from("<H", table, 0x15)[0]
    assert table[at : at + 3] == b"PRI"


def test_an_overlay_has_what_is_programmed(pc, guest, image):
    before = image.read_bytes()
    flash = add(pc, image, "cow")
    command(guest, 0, 0x20, 0xD0, 0xFF)
    got = bytearray(SIZE)
    flash.disk.read(0, [memoryview(got)])
    assert got == b"\xff" * BLOCK + before[BLOCK:] and image.read_bytes() == before
    state = flash.save()
    command(guest, BLOCK, 0x20, 0xD0, 0xFF)
    assert flash.save().contents != state.contents
    flash.disk.write(BLOCK, [memoryview(before)[BLOCK : 2 * BLOCK]])  # as its keeper puts the overlay back
    flash.load(state)
    assert contents(pc, flash) == got


def test_places(pc, flash, guest, image, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(BLOCK))
    below = add(pc, other, "cow", end=pc.flash_end, name="pflash1")
    assert below.start == START - BLOCK and pc.flash == [flash, below]
    with pytest.raises(Busy, match="goes first"):
        pc.unplug(flash)
    pc.unplug(below)
    pc.unplug(flash)
    assert pc.flash == [] and not pc.machine.slots.keys() & {flash._slot, below._slot}
    other.write_bytes(bytes(BLOCK + 512))
    with pytest.raises(Invalid, match="multiple of 4 KiB"):
        add(pc, other, "cow")
    os.truncate(other, 17 << 20)
    with pytest.raises(Invalid, match="16 MiB"):
        add(pc, other, "cow")


def test_states_that_cannot_be(flash):
    state = plain(flash)
    for change in (
        {"mode": "buffer"},
        {"mode": "confirm"},
        {"left": 3},
        {"buffer": [[0, 1]]},
        {"mode": "buffer", "left": 31, "buffer": [[0, 0]] * 2},
        {"locked": [SIZE // BLOCK]},
        {"mode": "confirm", "buffer": [[SIZE, 0]]},
        {"contents": b""},
        {"overlay": {0: b"\1" * 64}},
    ):
        assert refuses(flash, {**state, **change}), change
    assert not refuses(flash, {**state, "mode": "confirm", "buffer": [[0, 1]], "locked": [3]})


COMMANDS = st.sampled_from((0xFF, 0x70, 0x50, 0x90, 0x98, 0x40, 0x20, 0xD0, 0xE8, 0x60, 1))
VALUES = st.one_of(st.none(), COMMANDS, st.integers(0, (1 << 64) - 1))
ACCESSES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.sampled_from((1, 2, 4, 8)), VALUES), max_size=40)


@given(ACCESSES)
@settings(max_examples=150, deadline=None)
def test_any_accesses(any_flash, accesses):
    """No exception; bits are only cleared, but in blocks that were erased; and the disk has it all in the end."""
    pc, flash = any_flash
    guest, before, erased = Guest(pc), flash.read_at(0, SIZE), flash.counters["erased"]
    for at, size, value in accesses:
        if value is None:
            guest.load(START + at, size)
        else:
            guest.store(START + at, value & (1 << 8 * size) - 1, size)
    after = flash.read_at(0, SIZE)
    if flash.counters["erased"] == erased:
        assert all(not new & ~old for new, old in zip(after, before, strict=True))
    with pc.asleep():
        got = bytearray(SIZE)
        flash.disk.read(0, [memoryview(got)])
    assert got == after
    pc.reset()
    assert contents(pc, flash) == after


@pytest.fixture(scope="module")
def any_flash(tmp_path_factory):
    from devices.fakes import FakeMachine

    from vmfs.devices.machine import Pc
    from vmfs.memory.ram import Memory

    path = tmp_path_factory.mktemp("flash") / "image"
    path.write_bytes(random.Random(6).randbytes(SIZE))
    memory = Memory(1 << 20)
    pc = Pc(FakeMachine(), memory)
    yield pc, add(pc, path, "cow")
    pc.close()
    memory.close()
