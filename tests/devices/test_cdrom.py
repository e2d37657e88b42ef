"""The ATAPI CD-ROM drive, as a driver sees it: packets by PIO and DMA, the disc's tables, its change."""

from __future__ import annotations

import os
import random
import struct

import pytest
from devices.fakes import FakeMachine, Guest
from devices.test_ide import BUFFER, DRDY, DRQ, DSC, ERR, Driver, pc  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.devices.ide.atapi import PACKETS, CdDrive
from vmfs.devices.ide.sectors import raw_sector
from vmfs.devices.machine import Pc
from vmfs.devices.virtio.disk import open_disk
from vmfs.memory.ram import Memory
from vmfs.words.errors import Busy, Invalid

BLOCKS = 100


class CdDriver(Driver):
    def packet(self, *words, limit=0xFFFE, dma=False, check=True):
        """The data that a packet gives; its sense where it has none."""
        data = bytes(words).ljust(12, b"\0")
        self.begin(data, limit, dma)
        if dma:
            self.start(to_ram=True)
            assert self.interrupt
        got = b""
        while self.inp(self.control) & DRQ:
            assert self.interrupt and self.inp(self.base + 2) == 2
            self.status()
            length = self.inp(self.base + 4) | self.inp(self.base + 5) << 8
            assert 0 < length <= limit
            got += self.take(length + length % 2)[:length]
        assert self.interrupt and self.inp(self.base + 2) == 3
        status = self.status()
        if status & ERR:
            key = self.error() >> 4
            assert not check, f"sense {self.sense()}"
            sense = self.sense()
            assert sense[0] == key
            return sense
        assert status == DRDY | DSC
        return got

    def begin(self, data, limit, dma):
        for number, value in enumerate((1 if dma else 0, 0, 0, limit & 0xFF, limit >> 8, 0xA0), 1):
            self.out(self.base + number, value)
        self.out(self.base + 7, 0xA0)
        assert self.inp(self.base + 2) == 1 and self.status() == DRDY | DSC | DRQ
        self.give(data)

    def sense(self):
        data = self.packet(3, 0, 0, 0, 18)
        return data[2], data[12], data[13]

    def fails(self, *words, **options):
        return self.packet(*words, check=False, **options)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disc.iso"
    path.write_bytes(random.Random(5).randbytes(BLOCKS * 2048))
    return path


def disc(path):
    return open_disk(os.open(path, os.O_RDONLY), "ro")


@pytest.fixture
def drive(pc, image):  # noqa: F811
    drive = CdDrive(pc, "hdc", disc(image), path=str(image))
    pc.plug(drive)
    Guest(pc).config(pc.ide.slot, 4, 7, size=2, function=1)
    return drive


@pytest.fixture
def cd(pc, drive):  # noqa: F811
    return CdDriver(pc, 1)


def read_10(lba, count):
    return (0x28, 0, *lba.to_bytes(4, "big"), 0, *count.to_bytes(2, "big"))


def test_it_shows_that_it_takes_packets(cd):
    assert cd.status() == 0 and cd.registers()[:4] == (1, 1, 0x14, 0xEB)
    cd.command(0xEC, device=0xA0)
    assert cd.status() & ERR and cd.error() == 4 and cd.registers()[2:4] == (0x14, 0xEB)
    cd.command(0xA1, device=0xA0)
    words = struct.unpack("<256H", cd.take())
    assert words[0] == 0x85C0 and words[49] & 0x300 == 0x300
    assert cd.status() == DRDY | DSC
    cd.command(0x08, device=0xA0)
    assert cd.status() == 0 and cd.registers()[:4] == (1, 1, 0x14, 0xEB) and not cd.interrupt


def test_inquiry_and_sense(cd):
    data = cd.packet(0x12, 0, 0, 0, 96)
    assert data[0] == 5 and data[1] == 0x80 and data[8:16] == b"vmfs    " and len(data) == data[4] + 5
    assert cd.packet(0x12, 0, 0, 0, 5) == data[:5]  # an odd length
    assert cd.fails(0x12, 1) == (5, 0x24, 0)
    assert cd.fails(0xFF) == (5, 0x20, 0)
    assert cd.sense() == (0, 0, 0)  # told once
    assert cd.packet(0x00) == b""


@pytest.mark.parametrize("limit", (0xFFFE, 0xFFFF, 2048, 4096, 512, 100, 3001))
def test_read_by_pio(cd, image, limit):
    want = image.read_bytes()[7 * 2048 : 40 * 2048]
    assert cd.packet(*read_10(7, 33), limit=limit) == want
    assert cd.packet(0xA8, 0, 0, 0, 0, 99, 0, 0, 0, 1, limit=limit) == image.read_bytes()[-2048:]


def test_read_by_dma(pc, cd, image):  # noqa: F811
    cd.table((BUFFER, 3000), (BUFFER + 4000, 11336 - 2000))
    assert cd.packet(*read_10(9, 6), dma=True) == b""
    want = image.read_bytes()[9 * 2048 : 15 * 2048]
    assert pc.ram[BUFFER : BUFFER + 3000] == want[:3000]
    assert pc.ram[BUFFER + 4000 : BUFFER + 4000 + 9288] == want[3000:]
    assert cd.bus_status() & 7 in (4, 5)
    cd.stop()
    cd.table((BUFFER, 8))
    assert cd.packet(0x25, dma=True) == b""
    assert struct.unpack(">II", pc.ram[BUFFER : BUFFER + 8]) == (BLOCKS - 1, 2048)


def test_what_cannot_be_read(cd):
    assert cd.fails(*read_10(BLOCKS - 1, 2)) == (5, 0x21, 0)
    assert cd.fails(0xA8, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF) == (5, 0x21, 0)
    assert cd.packet(*read_10(BLOCKS, 0)) == b""
    cd.begin(bytes(read_10(0, 1)).ljust(12, b"\0"), 0, False)  # pieces of nothing
    assert cd.status() & ERR and cd.error() == 4


def test_an_image_that_is_cut(pc, tmp_path):  # noqa: F811
    path = tmp_path / "odd.iso"
    path.write_bytes(b"o" * 5000)
    drive = CdDrive(pc, "hda", disc(path))
    pc.plug(drive)
    cd = CdDriver(pc)
    assert struct.unpack(">II", cd.packet(0x25)) == (2, 2048)
    assert cd.packet(*read_10(2, 1)) == b"o" * 904 + bytes(1144)


def test_capacity_and_tables(cd):
    assert struct.unpack(">II", cd.packet(0x25)) == (BLOCKS - 1, 2048)
    toc = cd.packet(0x43, 0, 0, 0, 0, 0, 0, 0, 100)
    assert struct.unpack(">HBB", toc[:4]) == (18, 1, 1)
    assert toc[4:12] == bytes((0, 0x14, 1, 0, 0, 0, 0, 0)) and toc[12:] == bytes((0, 0x14, 0xAA, 0, 0, 0, 0, BLOCKS))
    assert cd.packet(0x43, 2, 0, 0, 0, 0, 0xAA, 0, 100)[4:] == bytes((0, 0x14, 0xAA, 0, 0, 0, 3, 25))
    assert cd.packet(0x43, 0, 0, 0, 0, 0, 0, 0, 4, 0x40)[:4] == bytes((0, 10, 1, 1))  # format 1, as SFF-8020i has it
    assert cd.packet(0x43, 0, 1, 0, 0, 0, 0, 0, 12)[:4] == bytes((0, 10, 1, 1))
    full = cd.packet(0x43, 2, 2, 0, 0, 0, 0, 0, 200)
    assert [full[4 + 11 * n + 3] for n in range(4)] == [0xA0, 0xA1, 0xA2, 1] and len(full) == 48
    assert cd.fails(0x43, 0, 0, 0, 0, 0, 2, 0, 100) == (5, 0x24, 0)
    assert cd.fails(0x43, 0, 5, 0, 0, 0, 0, 0, 100) == (5, 0x24, 0)


def test_features_and_modes(cd):
    data = cd.packet(0x46, 0, 0, 0, 0, 0, 0, 1, 0)
    length, _, profile = struct.unpack(">IHH", data[:8])
    assert length == len(data) - 4 and profile == 8
    codes, at = [], 8
    while at < len(data):
        codes.append(data[at] << 8 | data[at + 1])
        at += 4 + data[at + 3]
    assert codes == [0, 1, 2, 3, 0x10, 0x1E, 0x100, 0x105]
    assert cd.packet(0x46, 2, 0, 3, 0, 0, 0, 1, 0)[8:12] == bytes((0, 3, 3, 4))
    for packet, header in (((0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 0xFF), 8), ((0x1A, 0, 0x2A, 0, 0xFF), 4)):
        data = cd.packet(*packet)
        assert data[header] == 0x2A and data[header + 1] == len(data) - header - 2 == 20
    assert cd.fails(0x5A, 0, 0x3E, 0, 0, 0, 0, 0, 0xFF) == (5, 0x24, 0)
    assert cd.fails(0x5A, 0, 0xC0 | 0x2A, 0, 0, 0, 0, 0, 0xFF) == (5, 0x39, 0)
    assert set(cd.packet(0x5A, 0, 0x40 | 0x2A, 0, 0, 0, 0, 0, 0xFF)[10:]) == {0}  # nothing can be changed
    assert cd.packet(0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8) == bytes((0, 0, 0, 0, 0, 1, 0, 0))
    assert cd.packet(0x51, 0, 0, 0, 0, 0, 0, 0, 34)[2] == 0x0E
    for operation in (0x2B, 0xBB):
        assert cd.packet(operation) == b""


def test_read_cd(cd, image):
    data = image.read_bytes()
    assert cd.packet(0xBE, 0, 0, 0, 0, 3, 0, 0, 2, 0x10) == data[3 * 2048 : 5 * 2048]
    raw = cd.packet(0xBE, 0, 0, 0, 0, 3, 0, 0, 1, 0xF8)
    assert raw == raw_sector(3, data[3 * 2048 : 4 * 2048])
    assert raw[:16] == b"\0" + b"\xff" * 10 + b"\0" + bytes((0x00, 0x02, 0x03, 1))
    assert cd.packet(0xBE, 8, 0, 0, 0, 3, 0, 0, 1, 0x20) == raw[12:16]
    assert cd.packet(0xB9, 0, 0, 0, 2, 3, 0, 2, 4, 0x10) == data[3 * 2048 : 4 * 2048]
    assert cd.packet(0xBE, 0, 0, 0, 0, 3, 0, 0, 1, 0) == b""
    assert cd.fails(0xBE, 4, 0, 0, 0, 3, 0, 0, 1, 0x10) == (5, 0x64, 0)  # audio
    assert cd.fails(0xBE, 0, 0, 0, 0, 3, 0, 0, 1, 0x12) == (5, 0x24, 0)
    assert cd.fails(0xB9, 0, 0, 0, 0, 0, 0, 2, 0, 0x10) == (5, 0x21, 0)  # in the lead-in


def test_parity_of_a_raw_sector():
    """Each column and each diagonal has the sum 0, plain and weighted: that is what the codes are."""

    def times(value, by):
        product = 0
        while by:
            product ^= value if by & 1 else 0
            value = value << 1 ^ (0x11D if value & 0x80 else 0)
            by >>= 1
        return product

    def power(exponent):
        value = 1
        for _ in range(exponent):
            value = times(value, 2)
        return value

    sector = raw_sector(1234, random.Random(7).randbytes(2048))
    even = bytes(sector[12 + 2 * n] for n in range(1170))
    odd = bytes(sector[13 + 2 * n] for n in range(1170))
    for half in (even, odd):
        for column in range(43):
            code = [half[column + 43 * row] for row in range(26)]
            assert not any(_sums(code, times, power))
        for diagonal in range(26):
            code = [half[(44 * n + 43 * diagonal) % 1118] for n in range(43)]
            code += [half[1118 + diagonal], half[1118 + 26 + diagonal]]
            assert not any(_sums(code, times, power))
    value = 0
    for byte in sector[:2068]:  # EDC: the remainder of all of it is 0
        for bit in range(8):
            value = value >> 1 ^ (0xD8018001 if (value ^ byte >> bit) & 1 else 0)
    assert value == 0


def _sums(code, times, power):
    plain = weighted = 0
    for place, byte in enumerate(code):
        plain ^= byte
        weighted ^= times(byte, power(len(code) - 1 - place))
    return plain, weighted


def test_the_guest_opens_and_locks_the_tray(cd, drive):
    cd.packet(0x1E, 0, 0, 0, 1)
    assert cd.fails(0x1B, 0, 0, 0, 2) == (5, 0x53, 2)
    with pytest.raises(Busy, match="eject force"):
        drive.eject()
    assert cd.packet(0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)[4:6] == bytes((1, 2))  # somebody has pressed the button
    assert cd.packet(0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)[4:6] == bytes((0, 2))
    cd.packet(0x1E, 0, 0, 0, 0)
    cd.packet(0x1B, 0, 0, 0, 2)
    for packet in ((0x00,), read_10(0, 1), (0x25,)):
        assert cd.fails(*packet) == (2, 0x3A, 0)
    assert cd.packet(0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)[4:6] == bytes((3, 1))
    cd.packet(0x1B, 0, 0, 0, 3)
    assert cd.fails(0x00) == (6, 0x28, 0)
    assert cd.packet(*read_10(0, 1)) and drive.describe()["tray"] == "closed"
    assert cd.fails(0x4A, 0, 0, 0, 0x10, 0, 0, 0, 8) == (5, 0x24, 0)
    assert cd.packet(0x4A, 1, 0, 0, 0x02, 0, 0, 0, 8) == bytes((0, 2, 0x80, 0x10))


def test_another_disc(cd, drive, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"2" * 4096)
    drive.insert(disc(other), str(other))
    assert drive.medium == str(other)
    assert cd.fails(*read_10(0, 1)) == (6, 0x28, 0)
    assert cd.packet(*read_10(1, 1)) == b"2" * 2048
    assert cd.packet(0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)[4:6] == bytes((2, 2))
    drive.eject()
    assert cd.packet(0x12, 0, 0, 0, 36) and cd.fails(0x00) == (6, 0x28, 0) and cd.fails(0x00) == (2, 0x3A, 0)
    with pytest.raises(Invalid):
        drive.eject()
    cd.packet(0x1E, 0, 0, 0, 1)
    drive.insert(disc(other), str(other))
    drive.eject(force=True)
    assert drive.medium == "none"


def test_a_disc_that_goes_in_the_middle_of_a_read(cd, drive):
    cd.begin(bytes(read_10(0, 40)).ljust(12, b"\0"), 2048, False)
    cd.take(1000)
    drive.eject()
    while cd.inp(cd.control) & DRQ:
        cd.take(2)
    assert cd.status() & ERR and cd.error() >> 4 == 2


def test_two_drives(pc, drive, image):  # noqa: F811
    pc.plug(CdDrive(pc, "hdd"))
    other = CdDriver(pc, 1)
    other.select(1)
    assert other.registers()[2:4] == (0x14, 0xEB)
    state = drive.save()
    with pytest.raises(Invalid):
        pc.devices["hdd"].check(state)


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=50, deadline=None)
def test_random_packets(tmp_path_factory, seed):
    """Any packet of any drive gives data, a sense or an error; the drive then takes the next."""
    dice = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "random.iso"
    if not path.exists():
        path.write_bytes(bytes(20 * 2048))
    memory = Memory(1 << 20)
    board = Pc(FakeMachine(), memory)
    try:
        drive = CdDrive(board, "hda", disc(path) if dice.random() < 0.8 else None)
        board.plug(drive)
        Guest(board).config(board.ide.slot, 4, 7, size=2, function=1)
        cd = CdDriver(board)
        for _ in range(40):
            operation = dice.choice((*PACKETS, *PACKETS, dice.randrange(256)))
            rest = (dice.choice((0, 1, 2, 0x10, 0xF8, 0xFF, dice.randrange(256))) for _ in range(11))
            cd.out(cd.base + 7, 0xA0) if dice.random() < 0.05 else None
            features, limit = dice.choice((0, 0, 1)), dice.choice((0, 1, 2, 511, 2048, 0xFFFF))
            for number, value in enumerate((features, 0, 0, limit & 0xFF, limit >> 8, 0xA0), 1):
                cd.out(cd.base + number, value)
            cd.out(cd.base + 7, 0xA0)
            cd.give(bytes((operation, *rest)))
            if features:
                cd.table((dice.choice((BUFFER, 0x8000)), dice.choice((8, 2048, 0))))
                cd.start(to_ram=True)
                cd.stop()
            for _ in range(dice.choice((0, 10, 200))):
                cd.inp(cd.base, 2)
            if cd.inp(cd.control) & (DRQ | 0x80):
                cd.command(0x08, device=0xA0)
            assert not cd.inp(cd.control) & (DRQ | 0x80)
    finally:
        board.close()
        memory.close()
