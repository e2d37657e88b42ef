"""The IDE controller and its disks, as a driver sees them: registers, PIO, DMA, errors."""

from __future__ import annotations

import os
import random
import struct
import threading
import time

import pytest
from devices.fakes import IMAGE_SECTORS, FakeMachine, Guest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.devices.ide.ata import AtaDisk
from vmfs.devices.machine import Pc
from vmfs.devices.virtio.disk import open_disk
from vmfs.memory.ram import Memory
from vmfs.words.errors import Busy, Invalid

RAM = 8 << 20
SECTORS = IMAGE_SECTORS
BSY, DRDY, DSC, DRQ, ERR = 0x80, 0x40, 0x10, 8, 1
ABRT, IDNF, UNC = 4, 0x10, 0x40
TABLE, BUFFER = 0x1_0000, 0x10_0000


class Driver(Guest):
    """Of one channel."""

    def __init__(self, board, channel=0):
        super().__init__(board)
        self.base, self.control = ((0x1F0, 0x3F6), (0x170, 0x376))[channel]
        self.gsi = 14 + channel
        self.bus = board.ide.given[4] + 8 * channel

    @property
    def interrupt(self):
        return self.board.machine.lines.get(self.gsi, False)

    def status(self):
        return self.inp(self.base + 7)

    def error(self):
        return self.inp(self.base + 1)

    def registers(self):
        return tuple(self.inp(self.base + n) for n in range(2, 7))

    def select(self, unit=0):
        self.out(self.base + 6, 0xA0 | unit << 4)

    def command(self, command, *, features=0, count=0, lba=0, device=0xE0):
        """Of 28 bits."""
        values = features, count, lba & 0xFF, lba >> 8 & 0xFF, lba >> 16 & 0xFF, device | lba >> 24
        for number, value in enumerate(values, 1):
            self.out(self.base + number, value)
        self.out(self.base + 7, command)

    def extended(self, command, *, count, lba, device=0xE0):
        self.out(self.base + 6, device)
        for shift in (8, 0):
            self.out(self.base + 2, count >> shift & 0xFF)
            for number in range(3):
                self.out(self.base + 3 + number, lba >> 8 * number + 3 * shift & 0xFF)
        self.out(self.base + 7, command)

    def take(self, length=512):
        return b"".join(self.inp(self.base, 2).to_bytes(2, "little") for _ in range(length // 2))

    def give(self, data):
        for at in range(0, len(data), 2):
            self.out(self.base, int.from_bytes(data[at : at + 2], "little"), 2)

    def table(self, *rows, end=True):
        for number, (address, size) in enumerate(rows):
            flags = 0x8000 if end and number == len(rows) - 1 else 0
            row = struct.pack("<IHH", address, size & 0xFFFF, flags)
            self.board.ram[TABLE + 8 * number : TABLE + 8 * number + 8] = row
        self.out(self.bus + 4, TABLE, 4)

    def start(self, to_ram):
        self.out(self.bus + 2, 6)
        self.out(self.bus, 8 if to_ram else 0)
        self.out(self.bus, 9 if to_ram else 1)

    def stop(self):
        self.out(self.bus, 0)

    def bus_status(self):
        return self.inp(self.bus + 2)


@pytest.fixture
def pc():
    memory = Memory(RAM)
    board = Pc(FakeMachine(), memory)
    yield board
    board.close()
    memory.close()


def plug(pc, image, mode="rw", name="hda"):
    flags = os.O_RDWR if mode == "rw" else os.O_RDONLY
    drive = AtaDisk(pc, name, open_disk(os.open(image, flags), mode), path=str(image))
    pc.plug(drive)
    ide = pc.ide
    Guest(pc).config(ide.slot, 4, 7, size=2, function=1)
    return drive


@pytest.fixture
def disk(pc, image):
    plug(pc, image)
    return Driver(pc)


def sectors(image, lba, count=1):
    return image.read_bytes()[lba * 512 : (lba + count) * 512]


def test_identity(pc, disk):
    disk.command(0xEC)
    assert disk.interrupt and disk.inp(0x3F6) == DRDY | DSC | DRQ
    assert disk.interrupt  # the alternate status leaves it
    assert disk.status() == DRDY | DSC | DRQ and not disk.interrupt
    words = struct.unpack("<256H", disk.take())
    assert disk.status() == DRDY | DSC and not disk.interrupt
    assert words[0] == 0x40 and words[1:7:2] != (0, 0, 0)
    assert words[60] | words[61] << 16 == SECTORS == words[100]
    assert words[1] * words[3] * words[6] <= SECTORS
    assert words[83] & 0x0400 and words[49] & 0x0300 == 0x0300
    assert sum(struct.pack("<256H", *words)) & 0xFF == 0
    assert struct.pack(">20H", *words[27:47]).decode().rstrip() == "vmfs disk"
    assert Guest(pc).config(pc.ide.slot, 0, function=1) == 0x7010_8086
    assert Guest(pc).config(pc.ide.slot, 8, function=1) >> 8 == 0x010180


def test_signature_of_each_reset(disk):
    assert disk.registers()[:4] == (1, 1, 0, 0)
    disk.command(0x91, count=17)  # changes the registers
    assert disk.registers()[0] == 17
    disk.out(disk.control, 4)
    assert disk.status() == BSY and disk.inp(disk.control) == BSY
    disk.out(disk.control, 0)
    assert disk.status() == DRDY | DSC and disk.error() == 1 and disk.registers() == (1, 1, 0, 0, 0xA0)
    disk.command(0x90)
    assert disk.interrupt and disk.status() == DRDY | DSC and disk.error() == 1


def test_no_drive(pc, image, disk):
    disk.select(1)
    assert disk.status() == 0
    disk.command(0xEC, device=0xB0)
    assert disk.status() == 0 and not disk.interrupt
    other = Driver(pc, 1)
    other.command(0xEC)
    assert other.status() == 0 and other.registers() == (0,) * 5


@pytest.mark.parametrize("size", (1, 2, 4))
def test_pio_of_several_sectors(disk, image, size):
    disk.command(0x20, count=3, lba=10)
    got = b""
    for _ in range(3):
        assert disk.interrupt and disk.status() & DRQ
        got += b"".join(disk.inp(disk.base, size).to_bytes(size, "little") for _ in range(512 // size))
    assert got == sectors(image, 10, 3)
    assert disk.status() == DRDY | DSC and not disk.interrupt
    assert disk.registers() == (0, 13, 0, 0, 0xE0)


def test_pio_write(disk, image):
    data = random.Random(2).randbytes(1024)
    disk.command(0x30, count=2, lba=7)
    assert disk.status() == DRDY | DSC | DRQ and not disk.interrupt
    disk.give(data[:512])
    assert disk.interrupt and disk.status() & DRQ
    disk.give(data[512:])
    assert disk.interrupt and disk.status() == DRDY | DSC
    assert sectors(image, 7, 2) == data
    disk.command(0xE7)
    assert disk.interrupt and disk.status() == DRDY | DSC


def test_multiple(disk, image):
    disk.command(0xC4, count=1)
    assert disk.status() & ERR and disk.error() == ABRT  # before SET MULTIPLE MODE
    for bad in (3, 32):
        disk.command(0xC6, count=bad)
        assert disk.error() == ABRT
    disk.command(0xC6, count=8)
    assert disk.status() == DRDY | DSC
    disk.command(0xC4, count=11, lba=100)
    got = b""
    for block in (8, 3):
        assert disk.interrupt and disk.status() & DRQ
        got += disk.take(block * 512)
    assert got == sectors(image, 100, 11) and disk.status() == DRDY | DSC
    data = random.Random(3).randbytes(9 * 512)
    disk.extended(0x39, count=9, lba=200)
    disk.give(data[:4096])
    assert disk.interrupt and disk.status() & DRQ
    disk.give(data[4096:])
    assert disk.status() == DRDY | DSC and sectors(image, 200, 9) == data


def test_chs(disk, image):
    disk.command(0x91, count=17, device=0xA0 | 3)  # four heads of 17 sectors
    assert disk.status() == DRDY | DSC
    cylinder, head, sector = 5, 2, 9
    lba = (cylinder * 4 + head) * 17 + sector - 1
    disk.command(0x20, count=1, lba=cylinder << 8 | sector, device=0xA0 | head)
    assert disk.take() == sectors(image, lba)
    assert disk.registers() == (0, 10, 5, 0, 0xA2)
    for bad in (0, 18):
        disk.command(0x20, count=1, lba=bad, device=0xA0)
        assert disk.status() & ERR and disk.error() == IDNF
    disk.command(0x20, count=1, lba=1, device=0xA4)
    assert disk.error() == IDNF


def test_the_end_of_the_disk(disk, image):
    disk.command(0x20, count=1, lba=SECTORS - 1)
    assert disk.take() == sectors(image, SECTORS - 1)
    for command in (0x20, 0x30, 0xC8, 0x40):
        disk.command(command, count=2, lba=SECTORS - 1)
        assert disk.status() == DRDY | DSC | ERR and disk.error() == IDNF
    disk.extended(0x24, count=1, lba=1 << 40)
    assert disk.error() == IDNF
    disk.extended(0x42, count=0, lba=0)  # 65536 sectors
    assert disk.error() == IDNF


def test_48_bit_registers(disk):
    disk.extended(0x42, count=0x102, lba=0x123)
    assert disk.status() == DRDY | DSC
    disk.out(disk.base + 2, 0x12), disk.out(disk.base + 2, 0x34)
    assert disk.inp(disk.base + 2) == 0x34
    disk.out(disk.control, 0x80)
    assert disk.inp(disk.base + 2) == 0x12
    disk.out(disk.base + 2, 0x56)  # any write of the command block ends HOB
    assert disk.inp(disk.base + 2) == 0x56


def test_dma(disk, image):
    disk.table((BUFFER, 512), (BUFFER + 0x800, 1024), (BUFFER + 0x1001, 512))
    disk.command(0xC8, count=4, lba=20)
    assert disk.status() & DRQ and not disk.interrupt
    disk.start(to_ram=True)
    assert disk.interrupt and disk.bus_status() & 7 == 4  # done: neither active nor wrong
    want, ram = sectors(image, 20, 4), disk.board.ram
    assert ram[BUFFER : BUFFER + 512] == want[:512]
    assert ram[BUFFER + 0x800 : BUFFER + 0xC00] == want[512:1536]
    assert ram[BUFFER + 0x1000 : BUFFER + 0x1200] == want[1536:]  # bit 0 is none of an address
    assert disk.status() == DRDY | DSC and not disk.interrupt
    disk.stop()
    disk.board.ram[BUFFER : BUFFER + 1024] = b"w" * 1024
    disk.table((BUFFER, 1024))
    disk.start(to_ram=False)  # the bus master first
    disk.extended(0x35, count=2, lba=30)
    assert disk.interrupt and sectors(image, 30, 2) == b"w" * 1024 and disk.bus_status() & 7 == 4
    assert disk.board.take_dirty() >> (BUFFER >> 12) & 3 == 3


def test_tables_that_are_longer_and_shorter(disk, image):
    disk.table((BUFFER, 2048))
    disk.command(0xC8, count=1, lba=1)
    disk.start(to_ram=True)
    assert disk.bus_status() & 7 == 5 and disk.status() == DRDY | DSC  # there is more in the table
    disk.stop()
    assert disk.bus_status() & 1 == 0
    disk.table((BUFFER, 512))
    disk.command(0xC8, count=2, lba=40)
    disk.start(to_ram=True)
    assert not disk.interrupt and disk.bus_status() & 7 == 0 and disk.status() & DRQ
    disk.start(to_ram=True)  # the rest
    assert disk.interrupt and disk.board.ram[BUFFER : BUFFER + 512] == sectors(image, 41)


def test_what_no_bus_master_can_do(pc, disk, image):
    before = image.read_bytes()
    for rows, to_ram in (
        (((RAM - 256, 512),), True),
        (((0xFEE0_0000, 512),), True),
        (((BUFFER, 512),), False),
    ):
        disk.table(*rows)
        disk.command(0xC8, count=1)
        disk.start(to_ram)
        assert disk.bus_status() & 3 == 2 and disk.status() & ERR and disk.error() == ABRT
        disk.stop()
    disk.out(disk.bus + 4, RAM, 4)  # a table that is nowhere
    disk.command(0xCA, count=1)
    disk.start(to_ram=False)
    assert disk.bus_status() & 3 == 2 and disk.status() & ERR
    disk.stop()
    for at in range(0, 0x1_0000, 8):  # a table without an end
        pc.ram[TABLE + at : TABLE + at + 8] = struct.pack("<IHH", BUFFER, 2, 0)
    disk.table((BUFFER, 2), end=False)
    disk.extended(0x35, count=0x1000 - 1, lba=0)
    disk.start(to_ram=False)
    assert disk.bus_status() & 3 == 2 and disk.status() & ERR
    disk.stop()
    Guest(pc).config(pc.ide.slot, 4, 1, size=2, function=1)
    disk.table((BUFFER, 512))
    disk.command(0xC8, count=1)
    disk.start(to_ram=True)
    assert disk.bus_status() & 3 == 2 and disk.status() & ERR
    assert image.read_bytes() == before


def test_interrupts_are_held_back_by_nien(disk):
    disk.out(disk.control, 2)
    disk.command(0xE5)
    assert not disk.interrupt and disk.bus_status() & 4 == 0
    disk.out(disk.control, 0)
    assert disk.interrupt
    assert disk.status() == DRDY | DSC and disk.registers()[0] == 0xFF
    disk.command(0xE0)
    disk.command(0xE5)
    assert disk.registers()[0] == 0


def test_an_interrupt_finds_its_status(pc, disk, monkeypatch):
    """The status that a CPU polls without Python is not the one before the interrupt; to read it takes that back."""
    found, lines = [], pc.machine.irq_line

    def irq_line(line, level):
        lines(line, level)
        if level:
            found.append((line, pc.ide.chip.read(1, 0, 1)))

    monkeypatch.setattr(pc.machine, "irq_line", irq_line)
    disk.command(0xE5)
    assert found == [(14, DRDY | DSC)] and disk.interrupt
    assert pc.ide.chip.read(0, 7, 1) == DRDY | DSC and not disk.interrupt
    assert disk.status() == DRDY | DSC and not disk.interrupt


def test_registers_that_wait_in_the_chip(pc, disk, image):
    """What the chip has taken note of is there for a command, a read, a state, and gone with another state."""
    chip = pc.ide.chip
    before = {name: pc.devices[name].pack() for name in ("ide", "hda")}
    for offset, value in ((2, 0), (2, 3), (3, 0), (3, 9)):
        assert chip.write(0, offset, 1, value)
    assert disk.inp(disk.base + 3) == 9 and pc.devices["hda"].low == 9
    assert all(chip.write(0, 3, 1, value) for value in (7, 8))
    with pc.asleep():
        state = pc.devices["hda"].save()
    assert (state.low, state.sector_count) == (0x0708, 3)
    assert all(chip.write(0, 3, 1, value) for value in (1, 2))
    with pc.asleep():
        for name, data in before.items():
            pc.devices[name].load(pc.devices[name].unpack(pc.devices[name].STATE.VERSION, data))
    assert pc.devices["hda"].low == 1 and disk.inp(disk.base + 3) == 1
    disk.command(0x20, count=1, lba=1)
    assert not chip.write(0, 3, 1, 5)  # it waits for its data to be taken
    full = [chip.write(0, 1, 1, number) for number in range(40)]
    assert not any(full)
    disk.take()
    full = [chip.write(0, 1, 1, number) for number in range(40)]
    assert full == [True] * 32 + [False] * 8
    assert not chip.write(0, 6, 1, 0xF0)  # another drive is selected
    disk.out(disk.base + 1, 0x55)
    assert pc.devices["hda"].features == 0x1F55


def test_two_drives_on_a_channel(pc, image, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"o" * 2048)
    plug(pc, image)
    plug(pc, other, "cow", "hdb")
    driver = Driver(pc)
    driver.command(0x20, count=1, lba=1, device=0xF0)
    assert driver.interrupt
    driver.select(0)  # not while there is a block to take
    assert driver.take() == b"o" * 512
    driver.command(0xE5, device=0xB0)
    assert driver.interrupt
    driver.select(0)
    assert not driver.interrupt  # the other drive's, which is not selected
    driver.select(1)
    assert driver.interrupt and driver.status() == DRDY | DSC
    with pytest.raises(Invalid):
        plug(pc, other, "cow", "hdb")
    with pytest.raises(Busy):
        pc.unplug(pc.ide)
    for name in ("hda", "hdb"):
        pc.unplug(pc.devices[name])
    assert pc.ide is None
    plug(pc, image)
    driver.command(0x20, count=1)
    assert driver.take() == sectors(image, 0)


def test_a_disk_that_is_not_written(pc, image):
    before = image.read_bytes()
    plug(pc, image, "ro")
    driver = Driver(pc)
    for command in (0x30, 0xCA, 0x35):
        driver.command(command, count=1)
        assert driver.status() & ERR and driver.error() == ABRT
    plug(pc, image, "cow", "hdc")
    driver = Driver(pc, 1)
    driver.command(0x30, count=1, lba=3)
    driver.give(b"c" * 512)
    driver.command(0x20, count=1, lba=3)
    assert driver.take() == b"c" * 512 and image.read_bytes() == before


def test_features(disk):
    for feature, count, good in ((2, 0, 1), (0x82, 0, 1), (3, 0x45, 1), (3, 0x46, 0), (3, 0x22, 1), (0x99, 0, 0)):
        disk.command(0xEF, features=feature, count=count)
        assert disk.status() == DRDY | DSC | (0 if good else ERR), (feature, count)
    disk.command(0xEC)
    words = struct.unpack("<256H", disk.take())
    assert words[85] & 0x20 == 0 and words[63] == 0x0407 and words[88] == 0x3F
    for command in (0x00, 0xA1, 0xA0, 0xB0, 0xF8, 0xFF):
        disk.command(command)
        assert disk.status() == DRDY | DSC | ERR and disk.error() == ABRT


def test_a_host_that_fails(pc, image):
    drive = plug(pc, image)
    driver = Driver(pc)
    os.truncate(image, 512)
    driver.command(0x20, count=1, lba=5)
    assert driver.status() & ERR and driver.error() == UNC and driver.interrupt is False
    driver.table((BUFFER, 512))
    driver.command(0xC8, count=1, lba=6)
    driver.start(to_ram=True)
    assert driver.status() & ERR and driver.error() == UNC and driver.registers()[1] == 6
    assert drive.counters["host_errors.EIO"] == 2


def test_reset_in_the_middle(disk, image):
    disk.command(0x30, count=1, lba=2)
    disk.give(b"x" * 100)
    before = image.read_bytes()
    disk.out(disk.control, 4), disk.out(disk.control, 0)
    disk.give(b"y" * 512)  # goes nowhere
    assert disk.status() == DRDY | DSC and image.read_bytes() == before
    disk.command(0x20, count=1, lba=2)
    assert disk.take() == before[1024:1536]


def test_decode_enable(pc, disk):
    guest = Guest(pc)
    guest.config(pc.ide.slot, 0x40, 0, size=2, function=1)
    assert disk.inp(0x1F7) == 0xFF
    guest.config(pc.ide.slot, 0x40, 0x8000, size=2, function=1)
    assert disk.inp(0x1F7) == DRDY | DSC


def test_a_worker_moves_the_data_while_the_guest_goes_on(pc, image, monkeypatch):
    """With the host's time: the guest sees BSY until the host is done; whoever takes the state waits for that."""
    drive = plug(pc, image)
    monkeypatch.setattr(type(pc), "has_workers", True)
    driver, may_go, read = Driver(pc), threading.Event(), drive.disk.read
    drive.disk.read_at_once = lambda *arguments: False

    def slow(*arguments):
        assert may_go.wait(30)
        read(*arguments)

    monkeypatch.setattr(drive.disk, "read", slow)
    driver.table((BUFFER, 1024))
    driver.command(0xC8, count=2, lba=9)
    driver.start(to_ram=True)
    assert driver.status() == BSY and not driver.interrupt
    driver.command(0x20, count=1)  # it takes none now
    assert driver.status() == BSY
    threading.Timer(0.05, may_go.set).start()
    with pc.asleep():
        states = pc.pack_devices()
    assert driver.interrupt and driver.status() == DRDY | DSC
    assert pc.ram[BUFFER : BUFFER + 1024] == sectors(image, 9, 2)
    assert states["hda"]
    may_go.clear()
    driver.command(0xC8, count=2, lba=3)
    driver.start(to_ram=True)
    threading.Timer(0.05, may_go.set).start()
    deadline = time.monotonic() + 30
    while driver.inp(0x3F6) & BSY:
        assert time.monotonic() < deadline
    assert driver.interrupt and pc.ram[BUFFER : BUFFER + 1024] == sectors(image, 3, 2)


def test_a_machine_that_ends_while_the_host_is_slow(image):
    memory = Memory(RAM)
    pc = Pc(FakeMachine(), memory)
    drive = plug(pc, image)
    type(pc).has_workers, before = True, type(pc).__mro__[1].has_workers
    may_go, driver = threading.Event(), Driver(pc)
    drive.disk.read_at_once = lambda *arguments: False
    read = drive.disk.read
    drive.disk.read = lambda *arguments: (may_go.wait(30), read(*arguments))
    try:
        driver.table((BUFFER, 1024))
        driver.command(0xC8, count=2, lba=9)
        driver.start(to_ram=True)
        deadline = time.monotonic() + 30
        while not pc.ide.channels[0].worker._is_working:
            assert time.monotonic() < deadline
        pc.close()
        assert drive.disk.fd >= 0  # a read is under way
        may_go.set()
        while drive.disk.fd >= 0:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        del type(pc).has_workers
        assert type(pc).has_workers is before
    driver.board = pc = None


@given(seed=st.integers(0, 1 << 32), data=st.data())
@settings(max_examples=150, deadline=None)
def test_random_accesses(tmp_path_factory, seed, data):
    """Any values at any of its ports give no exception, write no RAM but by a table, and leave the disk's size."""
    dice = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "random"
    if not path.exists():
        path.write_bytes(bytes(64 * 512))
    memory = Memory(1 << 20)
    pc = Pc(FakeMachine(), memory)
    try:
        plug(pc, path, dice.choice(("rw", "ro", "cow")))
        driver = Driver(pc)
        commands = (0x20, 0x30, 0xC4, 0xC5, 0xC6, 0xC8, 0xCA, 0x24, 0x25, 0x35, 0xEC, 0x91, 0xEF, 0x90, 0x08, 0xE7)
        pc.ram[:4096] = dice.randbytes(4096)
        for _ in range(150):
            port = dice.choice((*range(0x1F0, 0x1F8), 0x1F7, 0x3F6, *range(driver.bus, driver.bus + 8)))
            size = dice.choice((1, 1, 2, 4))
            value = dice.choice((0, 1, 8, 9, 0x40, dice.getrandbits(8 * size)))
            if port == 0x1F7:
                value = dice.choice(commands)
            if port == driver.bus + 4:
                size, value = 4, dice.choice((0, 8, 0x0FFF_FFF8, dice.getrandbits(12)))
            if dice.random() < 0.3:
                driver.inp(port, size)
            else:
                driver.out(port, value & (1 << 8 * size) - 1, size)
    finally:
        pc.close()
        memory.close()
    assert path.stat().st_size == 64 * 512


@pytest.mark.parametrize("names", [("hda", "hdb"), ("sata0", "sata1")])
def test_a_drive_that_is_taken_out_leaves_a_worker_behind(tmp_path, names):
    """For the other drive of its channel, and for the next one at its port."""
    path, pc = tmp_path / "image", Pc(FakeMachine(), Memory(1 << 20))
    path.write_bytes(bytes(1 << 20))

    def plug(name):
        pc.plug(AtaDisk(pc, name, open_disk(os.open(path, os.O_RDONLY), "cow")))

    try:
        for name in names:
            plug(name)
        for name in names:
            pc.unplug(pc.devices[name])
            plug(name)
            done = threading.Event()
            worker = pc.ide.channels[0].worker if pc.ide else pc.ahci.ports[names.index(name)].worker
            with pc.lock:
                worker.submit(lambda: None, lambda _, done=done: done.set())
            assert done.wait(20), name
    finally:
        pc.close()
        pc.memory.close()
