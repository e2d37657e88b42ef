"""The floppy controller and the 8237, as a driver sees them."""

from __future__ import annotations

import os
import random

import pytest
from devices.fakes import FakeMachine, Guest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.devices.floppy import COMMANDS, FORMATS, FloppyDrive
from vmfs.devices.machine import Pc
from vmfs.devices.virtio.disk import open_disk
from vmfs.memory.ram import Memory
from vmfs.words.errors import Busy, Invalid

RAM = 2 << 20
BUFFER = 0x2_0000
PAGE_OF = {0: 0x87, 1: 0x83, 2: 0x81, 3: 0x82}
TO_MEMORY, FROM_MEMORY, VERIFY = 0x44, 0x48, 0x40


class Driver(Guest):
    @property
    def interrupt(self):
        return self.board.machine.lines.get(6, False)

    def status(self):
        return self.inp(0x3F4)

    def reset(self, motor=0x1C):
        self.out(0x3F2, 0)
        self.out(0x3F2, motor)
        assert self.interrupt
        for unit in range(4):
            assert self.command(8) == (0xC0 | unit, 0)
        assert not self.interrupt and self.command(8) == (0x80,)
        assert self.command(3, 0xDF, 2) == ()
        self.out(0x3F7, 0)

    def command(self, *values):
        for value in values:
            assert self.status() & 0xC0 == 0x80, hex(self.status())
            self.out(0x3F5, value)
        return self.results()

    def results(self):
        got = []
        while self.status() & 0xD0 == 0xD0:
            got.append(self.inp(0x3F5))
        return tuple(got)

    def dma(self, mode, length, address=BUFFER, channel=2):
        self.out(0x0A, 4 | channel)
        self.out(0x0C, 0)
        self.out(0x0B, mode | channel)
        for value in (address & 0xFF, address >> 8 & 0xFF):
            self.out(2 * channel, value)
        self.out(PAGE_OF[channel], address >> 16)
        for value in (length - 1 & 0xFF, length - 1 >> 8):
            self.out(2 * channel + 1, value)
        self.out(0x0A, channel)

    def transfer(self, code, cylinder, head, sector, *, last=18, unit=0):
        return self.command(code, head << 2 | unit, cylinder, head, sector, 2, last, 0x1B, 0xFF)

    def seek(self, cylinder, head=0):
        assert self.command(0x0F, head << 2, cylinder) == ()
        assert self.interrupt and self.command(8) == (0x20 | head << 2, cylinder)


@pytest.fixture
def pc():
    memory = Memory(RAM)
    board = Pc(FakeMachine(), memory)
    yield board
    board.close()
    memory.close()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "floppy.img"
    path.write_bytes(random.Random(3).randbytes(1440 << 10))
    return path


def floppy(path, mode="rw"):
    return open_disk(os.open(path, os.O_RDWR if mode == "rw" else os.O_RDONLY), mode)


@pytest.fixture
def drive(pc, image):
    drive = FloppyDrive(pc, "fd0", floppy(image), path=str(image))
    pc.plug(drive)
    return drive


@pytest.fixture
def fd(pc, drive):
    driver = Driver(pc)
    driver.reset()
    return driver


def sectors(path, cylinder, head, sector, count=1, shape=(2, 18)):
    at = ((cylinder * shape[0] + head) * shape[1] + sector - 1) * 512
    return path.read_bytes()[at : at + count * 512]


def test_reset_and_versions(pc, fd):
    assert fd.command(0x10) == (0x90,)
    assert fd.command(0x18) == (0x80,)  # PARTID: an 82077AA has none
    assert fd.command(0x94) == (0x10,) and fd.command(0x14) == (0,)
    assert fd.command(0x13, 0, 0x57, 0) == ()
    assert fd.command(0x0E) == (0, 0, 0, 0, 0xDF, 2, 0, 0, 0x57, 0)
    fd.out(0x3F4, 0x80)  # the data rate's register resets, too
    assert fd.interrupt and fd.command(8) == (0xC0, 0)
    assert fd.command(0x0E)[8] == 0x20  # the FIFO is off again
    fd.command(0x94), fd.command(0x13, 0, 0x57, 3)
    fd.out(0x3F4, 0x80)
    assert fd.command(0x0E)[7:] == (0x80, 0x07, 3)
    fd.out(0x3F2, 0)
    assert fd.status() == 0
    assert fd.inp(0x3F0) == 0xFF
    cmos = Guest(pc)
    for index, value in ((0x10, 0x40), (0x14, 0x07)):
        cmos.out(0x70, index)
        assert cmos.inp(0x71) == value


def test_read_by_dma(pc, fd, image):
    fd.dma(TO_MEMORY, 3 * 512)
    assert fd.transfer(0xE6, 0, 1, 17) == (0x40 | 4, 0x80, 0, 1, 0, 1, 2)  # two sectors, then the cylinder ends
    assert pc.ram[BUFFER : BUFFER + 1024] == sectors(image, 0, 1, 17, 2)
    fd.seek(5)
    fd.dma(TO_MEMORY, 4 * 512)
    assert fd.transfer(0xE6, 5, 0, 17) == (0, 0, 0, 5, 1, 3, 2)  # over both heads
    assert pc.ram[BUFFER : BUFFER + 2048] == sectors(image, 5, 0, 17, 4)
    assert fd.inp(8) & 4 and not fd.inp(8) & 4  # the terminal count, told once
    assert pc.take_dirty() >> (BUFFER >> 12) & 1


def test_interrupt_goes_with_the_first_result(fd):
    fd.dma(TO_MEMORY, 512)
    for value in (0xE6, 0, 0, 0, 1, 2, 18, 0x1B, 0xFF):
        fd.out(0x3F5, value)
    assert fd.interrupt
    fd.inp(0x3F5)
    assert not fd.interrupt and len(fd.results()) == 6


def test_write(pc, fd, image):
    fd.seek(79)
    pc.ram[BUFFER : BUFFER + 1024] = bytes(range(256)) * 4
    fd.dma(FROM_MEMORY, 700)  # the rest of a sector is zeros
    assert fd.transfer(0xC5, 79, 0, 3) == (0, 0, 0, 79, 0, 5, 2)
    want = (bytes(range(256)) * 3)[:700].ljust(1024, b"\0")
    assert sectors(image, 79, 0, 3, 2) == want
    assert fd.command(4, 0) == (0x28,)


def test_format(pc, fd, image):
    fd.seek(2, 1)
    ids = b"".join(bytes((2, 1, number, 2)) for number in range(1, 19))
    pc.ram[BUFFER : BUFFER + len(ids)] = ids
    fd.dma(FROM_MEMORY, len(ids))
    assert fd.command(0x4D, 4, 2, 18, 0x6C, 0xF6)[:3] == (4, 0, 0)
    assert sectors(image, 2, 1, 1, 18) == b"\xf6" * (18 * 512)
    pc.ram[BUFFER] = 3  # an ID of another track
    fd.dma(FROM_MEMORY, len(ids))
    assert fd.command(0x4D, 4, 2, 18, 0x6C, 0)[:3] == (0x44, 1, 0)
    assert sectors(image, 2, 1, 1, 18) == b"\xf6" * (18 * 512)


def test_by_hand(fd, image):
    fd.command(3, 0xDF, 3)
    for value in (0x46, 0, 0, 0, 17, 2, 18, 0x1B, 0xFF):
        fd.out(0x3F5, value)
    got = bytearray()
    while fd.status() == 0xF0:
        got.append(fd.inp(0x3F5))
    assert got == sectors(image, 0, 0, 17, 2)
    assert fd.interrupt and fd.results()[:2] == (0x40, 0x80)
    for value in (0x45, 0, 0, 0, 18, 2, 18, 0x1B, 0xFF):
        fd.out(0x3F5, value)
    for value in b"hand" * 128:
        assert fd.status() == 0xB0
        fd.out(0x3F5, value)
    assert fd.results()[:2] == (0x40, 0x80) and sectors(image, 0, 0, 18) == b"hand" * 128


def test_seek_recalibrate_and_the_change_line(pc, drive, fd):
    assert fd.inp(0x3F7) == 0x80
    fd.command(7, 0)
    assert fd.command(8) == (0x20, 0) and fd.inp(0x3F7) == 0x80  # no step was made
    fd.seek(1)
    assert fd.inp(0x3F7) == 0
    fd.out(0x3F2, 0x0C)
    assert fd.inp(0x3F7) == 0  # of no drive: the motor is off
    fd.out(0x3F2, 0x1C)
    drive.eject()
    assert fd.inp(0x3F7) == 0x80
    fd.seek(4)
    assert fd.inp(0x3F7) == 0x80  # it stays without a disk
    fd.command(7, 1)
    assert fd.command(8) == (0x71, 0)  # there is no second drive
    fd.command(7, 0)
    assert fd.command(8) == (0x20, 0) and fd.command(4, 0) == (0x38,)
    fd.command(0xCF, 0, 7)  # relative, inwards
    assert fd.command(8) == (0x20, 7)


@pytest.mark.parametrize("case", ["motor", "empty", "other"])
def test_a_disk_that_does_not_turn_has_no_end(pc, drive, fd, case):
    if case == "motor":
        fd.out(0x3F2, 0x0C)
    elif case == "empty":
        drive.eject()
    else:
        fd.out(0x3F2, 0x1D)
    fd.dma(TO_MEMORY, 512)
    assert fd.transfer(0xE6, 0, 0, 1) == () and fd.status() == 0x10 and not fd.interrupt
    fd.out(0x3F5, 8)  # it takes nothing
    assert fd.status() == 0x10
    fd.reset()
    assert fd.status() == 0x80


def test_what_is_not_found(pc, fd, image, tmp_path):
    fd.dma(TO_MEMORY, 512)
    assert fd.transfer(0xE6, 0, 0, 19)[:3] == (0x40, 4, 0)
    assert fd.transfer(0xE6, 3, 0, 1)[:3] == (0x40, 4, 0x10)  # the head is elsewhere
    assert fd.transfer(0xA6, 0, 0, 1)[:3] == (0x40, 1, 0)  # FM
    fd.out(0x3F7, 2)  # the rate of double density
    assert fd.transfer(0xE6, 0, 0, 1)[:3] == (0x40, 1, 0) and fd.command(0x4A, 0)[:2] == (0x40, 1)
    fd.out(0x3F7, 0)
    assert fd.command(0x4A, 4) == (4, 0, 0, 0, 1, 1, 2)
    fd.out(0x0A, 6)  # the channel is masked
    assert fd.transfer(0xE6, 0, 0, 1)[:3] == (0x40, 0x10, 0)
    fd.dma(FROM_MEMORY, 512)  # the wrong way
    assert fd.transfer(0xE6, 0, 0, 1)[:3] == (0x40, 0x10, 0)
    fd.dma(VERIFY, 512)
    before = bytes(pc.ram)
    assert fd.transfer(0xE6, 0, 0, 1)[:3] == (0, 0, 0) and bytes(pc.ram) == before


def test_a_disk_that_is_not_written(pc, image):
    pc.plug(FloppyDrive(pc, "fd0", floppy(image, "ro")))
    fd = Driver(pc)
    fd.reset()
    before = image.read_bytes()
    fd.dma(FROM_MEMORY, 512)
    assert fd.transfer(0xC5, 0, 0, 1)[:3] == (0x40, 2, 0)
    assert fd.command(0x4D, 0, 2, 18, 0x6C, 0)[:3] == (0x40, 2, 0)
    assert fd.command(4, 0) == (0x78,) and image.read_bytes() == before


def test_another_disk_and_a_second_drive(pc, drive, fd, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"o" * (720 << 10))
    drive.insert(floppy(other, "cow"), str(other))
    fd.out(0x3F7, 2)
    fd.seek(1)
    fd.dma(TO_MEMORY, 512)
    assert fd.transfer(0xE6, 1, 0, 9, last=9)[:3] == (0, 0, 0) and pc.ram[BUFFER] == ord("o")
    (tmp_path / "odd").write_bytes(bytes(1000 << 10))
    disk = floppy(tmp_path / "odd")
    with pytest.raises(Invalid, match="1024000 bytes are no floppy"):
        drive.insert(disk, "odd")
    disk.close()
    pc.plug(FloppyDrive(pc, "fd1"))
    assert pc.fdc.types == (4, 4)
    with pytest.raises(Busy):
        pc.unplug(pc.fdc)
    pc.unplug(pc.devices["fd1"])
    pc.unplug(drive)
    assert pc.fdc is None


@pytest.mark.parametrize("size", FORMATS)
def test_formats(pc, tmp_path, size):
    shape = FORMATS[size]
    path = tmp_path / "disk"
    path.write_bytes(random.Random(size).randbytes(size))
    drive = FloppyDrive(pc, "fd0", floppy(path))
    pc.plug(drive)
    fd = Driver(pc)
    fd.reset()
    fd.out(0x3F7, shape.rates[0])
    cylinder, head = shape.cylinders - 1, shape.heads - 1
    fd.seek(cylinder, head)
    fd.dma(TO_MEMORY, 512)
    assert fd.transfer(0x46, cylinder, head, shape.sectors, last=shape.sectors)[0] == head << 2
    assert pc.ram[BUFFER : BUFFER + 512] == path.read_bytes()[-512:]


def test_the_8237(pc):
    guest = Guest(pc)
    guest.out(0x0D, 0)
    assert guest.inp(0x0F) == 0xFF
    for value in (0x34, 0x12):
        guest.out(4, value)
    guest.out(0x0C, 0)
    assert (guest.inp(4), guest.inp(4)) == (0x34, 0x12)
    for port in (0x81, 0x82, 0x83, 0x87, 0x89, 0x8F):
        guest.out(port, port)
        assert guest.inp(port) == port
    dma = pc.devices["dma"]
    driver = Driver(pc)
    driver.dma(TO_MEMORY | 0x10, 4, 0x2_FFFE)  # automatic; the address wraps in its page
    assert dma.to_memory(2, b"abcdef") == (4, True)
    assert pc.ram[0x2_FFFE:0x3_0000] == b"ab" and pc.ram[0x2_0000:0x2_0002] == b"cd"
    assert dma.to_memory(2, b"wx") == (2, False) and pc.ram[0x2_FFFE:0x3_0000] == b"wx"
    driver.dma(TO_MEMORY | 0x20, 3, 0x2_0010)  # downwards
    assert dma.to_memory(2, b"123") == (3, True) and pc.ram[0x2_000E:0x2_0011] == b"321"
    assert dma.to_memory(2, b"4") == (0, False)  # masked by its end
    for port, value in ((0xD4, 5), (0xD6, 0x45), (0xC4, 0), (0xC4, 0x80), (0x8B, 3), (0xC6, 1), (0xC6, 0), (0xD4, 1)):
        guest.out(port, value)
    assert dma.to_memory(5, b"words!") == (4, True) and pc.ram[0x3_0000:0x3_0004] == b"word"
    driver.dma(FROM_MEMORY, 4, 0xF0_0000)  # no RAM
    assert dma.from_memory(2, 4) == (b"\xff" * 4, True)
    guest.out(0xD0, 4)  # the cascade is off
    driver.dma(FROM_MEMORY, 4)
    assert dma.from_memory(2, 4) == (b"", False)


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_random_accesses(tmp_path_factory, seed):
    dice = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "random.img"
    if not path.exists():
        path.write_bytes(bytes(360 << 10))
    memory = Memory(1 << 20)
    board = Pc(FakeMachine(), memory)
    try:
        board.plug(FloppyDrive(board, "fd0", floppy(path, dice.choice(("rw", "ro", "cow")))))
        if dice.random() < 0.5:
            board.plug(FloppyDrive(board, "fd1"))
        guest = Guest(board)
        for port, value in ((0x3F2, 0x1C), (0x3F7, 2), (0xD4, 0), (0x0B, dice.choice((0x46, 0x4A))), (0x0A, 2)):
            guest.out(port, value)
        for _ in range(120):
            if dice.random() < 0.6:
                row = dice.choice(COMMANDS)
                code = row.code | dice.getrandbits(8) & ~row.mask & 0xFF | (0x40 if dice.random() < 0.7 else 0)
                guest.out(0x3F5, code & 0xFF)
                for _ in range(row.length - 1):
                    guest.out(0x3F5, dice.choice((0, 0, 1, 2, 9, 0xFF)))
                for _ in range(dice.choice((0, 7, 10))):
                    guest.inp(0x3F5)
            else:
                port = dice.choice((*range(0x3F0, 0x3F6), 0x3F7, *range(16), *range(0xC0, 0xE0), 0x81, 0x8F))
                if dice.random() < 0.3:
                    guest.inp(port)
                else:
                    guest.out(port, dice.choice((0, 4, 0x1C, 0x14, dice.getrandbits(8))))
    finally:
        board.close()
        memory.close()
    assert path.stat().st_size == 360 << 10
