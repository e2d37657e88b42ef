"""The AHCI controller, as a driver sees it: lists, tables, FISes, interrupts, errors; and drivers that mean harm."""

from __future__ import annotations

import os
import random
import struct
import threading

import pytest
from devices.fakes import IMAGE_SECTORS, FakeMachine, Guest, plain, refuses

from vmfs.devices.ide.ata import COMMANDS, AtaDisk
from vmfs.devices.ide.atapi import PACKETS, CdDrive
from vmfs.devices.machine import AHCI_SLOT, Pc
from vmfs.devices.virtio.disk import open_disk
from vmfs.memory.ram import Memory
from vmfs.words.errors import Busy

RAM = 8 << 20
SECTORS = IMAGE_SECTORS
LIST, FIS, TABLE, BUFFER = 0x1_0000, 0x1_1000, 0x1_2000, 0x10_0000
CLB, FB, IS, IE, CMD, TFD, SIG, SSTS, SCTL, SERR = 0, 8, 0x10, 0x14, 0x18, 0x20, 0x24, 0x28, 0x2C, 0x30
SACT, CI = 0x34, 0x38
DHRS, PSS, SDBS, DPS, PCS, OFS, HBFS, TFES = 1, 2, 8, 1 << 5, 1 << 6, 1 << 24, 1 << 29, 1 << 30
READ, WRITE, IDENTIFY, PACKET = 0x25, 0x35, 0xEC, 0xA0
READ_QUEUED, WRITE_QUEUED, READ_LOG = 0x60, 0x61, 0x2F


class Driver(Guest):
    """Of one port."""

    def __init__(self, pc, number=0):
        super().__init__(pc)
        self.config(AHCI_SLOT, 4, 6, size=2)
        self.abar = pc.ahci.bar(5)
        self.port = self.abar + 0x100 + 0x80 * number
        self.store(self.abar + 4, 2)
        for register, value in ((CLB, LIST), (CLB + 4, 0), (FB, FIS), (FB + 4, 0), (IE, 0xFFFFFFFF), (CMD, 0x10)):
            self.put(register, value)
        self.put(CMD, 0x11)

    def put(self, register, value):
        self.store(self.port + register, value)

    def get(self, register):
        return self.load(self.port + register)

    @property
    def interrupt(self):
        return self.board.machine.lines.get(16 + AHCI_SLOT % 8, False)

    def rows(self, *rows, end=0):
        for number, (address, size) in enumerate(rows):
            at = TABLE + 0x80 + 16 * number
            self.board.ram[at : at + 16] = struct.pack("<QII", address, 0, size - 1 | end)

    def issue(self, command, *, lba=0, count=1, features=0, rows=((BUFFER, 512),), flags=5, slot=0, packet=b"", c=0x80,
              control=0, end=0, device=0xE0):  # fmt: skip
        ram = self.board.ram
        self.rows(*rows, end=end)
        head = struct.pack("<HHIQ", flags, len(rows), 0xFFFFFFFF, TABLE)
        ram[LIST + 32 * slot : LIST + 32 * slot + 16] = head
        low = lba.to_bytes(6, "little")
        first = 0x27, c, command, features & 255, *low[:3], device
        fis = bytes((*first, *low[3:], features >> 8, count & 255, count >> 8, 0, control))
        ram[TABLE : TABLE + 16] = fis
        ram[TABLE + 0x40 : TABLE + 0x50] = packet.ljust(16, b"\0")
        self.put(CI, 1 << slot)

    def queue(self, command, tag, *, lba=0, count=1, **more):
        """A queued command in the slot of its tag."""
        self.put(SACT, 1 << tag)
        self.issue(command, lba=lba, count=tag << 3, features=count, slot=tag, **more)

    def log(self, log):
        """A page, by READ LOG EXT."""
        self.issue(READ_LOG, lba=log)
        assert self.get(CI) == 0 and self.get(TFD) == 0x50
        page = bytes(self.board.ram[BUFFER : BUFFER + 512])
        assert log == 0 or sum(page) & 0xFF == 0
        return page

    def moved(self, slot=0):
        return struct.unpack_from("<I", self.board.ram, LIST + 32 * slot + 4)[0]

    def restart(self):
        self.put(CMD, 0x10)
        self.put(IS, 0xFFFFFFFF)
        self.store(self.abar + 8, 0xFFFFFFFF)
        self.put(CMD, 0x11)


@pytest.fixture
def pc(image):
    memory = Memory(RAM)
    board = Pc(FakeMachine(), memory)
    board.plug(AtaDisk(board, "sata0", open_disk(os.open(image, os.O_RDWR), "rw")))
    board.plug(CdDrive(board, "sata1", None))
    yield board
    board.close()
    memory.close()


@pytest.fixture
def disk(pc):
    return Driver(pc)


@pytest.fixture
def cd(tmp_path):
    memory = Memory(RAM)
    board = Pc(FakeMachine(), memory)
    path = tmp_path / "disc"
    path.write_bytes(random.Random(2).randbytes(64 * 2048))
    board.plug(CdDrive(board, "sata0", open_disk(os.open(path, os.O_RDONLY), "ro")))
    yield Driver(board), path.read_bytes()
    board.close()
    memory.close()


def test_identity(pc, disk):
    assert Guest(pc).config(AHCI_SLOT, 0) == 0x2922_8086 and Guest(pc).config(AHCI_SLOT, 8) >> 8 == 0x010601
    assert disk.load(disk.abar) == 0xC134_1F05 and disk.load(disk.abar + 0xC) == 0x3F
    assert disk.load(disk.abar + 0x10) == 0x0001_0301 and disk.load(disk.abar + 4) == 0x8000_0002
    assert (disk.get(SSTS), disk.get(SIG), disk.get(TFD)) == (0x133, 0x101, 0x150)
    assert bytes(pc.ram[FIS + 0x40 : FIS + 0x48]) == bytes((0x34, 0, 0x50, 1, 1, 0, 0, 0))
    cd, none = Driver(pc, 1), Driver(pc, 5)
    assert (cd.get(SSTS), cd.get(SIG)) == (0x133, 0xEB14_0101)
    assert (none.get(SSTS), none.get(SIG), none.get(TFD)) == (0, 0xFFFFFFFF, 0x7F)
    disk.issue(IDENTIFY)
    words = struct.unpack_from("<256H", pc.ram, BUFFER)
    assert words[100] == SECTORS and words[75:77] == (31, 0x10E) and words[84] & words[87] & 0x20 and words[93] == 0
    assert sum(struct.pack("<256H", *words)) & 0xFF == 0
    assert disk.get(CI) == 0 and disk.get(IS) == PSS and disk.interrupt  # PIO to the host ends with its own FIS
    assert pc.ram[FIS + 0x20] == 0x5F and pc.ram[FIS + 0x20 + 15] == 0x50 and disk.get(TFD) == 0x50


def test_dma_both_ways(pc, disk, image):
    before = image.read_bytes()
    disk.issue(READ, lba=9, count=4, rows=((BUFFER, 1000), (BUFFER + 0x1000, 48), (BUFFER + 0x2000, 4096)), slot=7)
    places = (BUFFER, 1000), (BUFFER + 0x1000, 48), (BUFFER + 0x2000, 1000)
    got = b"".join(bytes(pc.ram[at : at + length]) for at, length in places)
    assert got == before[9 * 512 : 13 * 512] and disk.moved(7) == 2048
    assert disk.get(CI) == 0 and disk.get(IS) == DHRS and disk.get(TFD) == 0x50 and disk.interrupt
    assert disk.get(CMD) >> 8 & 31 == 7
    disk.put(IS, DHRS)
    disk.store(disk.abar + 8, 1)
    assert not disk.interrupt
    data = random.Random(3).randbytes(1024)
    pc.ram[BUFFER : BUFFER + 1024] = data
    disk.issue(WRITE, lba=SECTORS - 2, count=2, rows=((BUFFER, 1024),), flags=0x45, end=1 << 31)
    assert image.read_bytes() == before[:-1024] + data and disk.get(IS) == DHRS | DPS
    disk.issue(0xEA, rows=())
    assert disk.get(CI) == 0 and disk.get(TFD) == 0x50 and pc.devices["sata0"].counters["flushes"] == 1


def test_pio_and_no_data(pc, disk, image):
    before = image.read_bytes()
    disk.issue(0x24, lba=3, count=3, rows=((BUFFER, 1536),))
    assert bytes(pc.ram[BUFFER : BUFFER + 1536]) == before[3 * 512 : 6 * 512] and disk.get(IS) == PSS
    pc.ram[BUFFER : BUFFER + 1024] = b"w" * 1024
    disk.issue(0x34, lba=5, count=2, rows=((BUFFER, 1024),), flags=0x45)
    assert image.read_bytes() == before[: 5 * 512] + b"w" * 1024 + before[7 * 512 :] and disk.get(IS) & DHRS
    disk.issue(0xEF, features=2, rows=())  # the write cache
    assert disk.get(CI) == 0 and disk.get(TFD) == 0x50


@pytest.mark.parametrize(
    ("command", "options", "error"),
    [(0xB0, {}, 4), (READ, {"lba": SECTORS}, 0x10), (0x4F, {}, 4), (PACKET, {}, 4)],
)
def test_a_command_that_fails(disk, command, options, error):
    disk.issue(command, **options)
    assert disk.get(IS) & TFES and disk.get(TFD) == error << 8 | 0x51
    assert disk.get(CI) == 1 and disk.interrupt  # it stays until the port is stopped (6.2.2.1)
    disk.issue(READ, slot=1)
    assert disk.get(CI) == 3
    disk.restart()
    assert disk.get(CI) == 0 and not disk.interrupt
    disk.issue(READ, slot=1)
    assert disk.get(CI) == 0 and disk.get(TFD) == 0x50


@pytest.mark.parametrize("what", ["list", "table", "row", "fis", "master", "end of RAM"])
def test_memory_that_is_none(pc, disk, image, what):
    before, nowhere = image.read_bytes(), 1 << 40
    pc.ram[BUFFER : BUFFER + 512] = b"x" * 512
    rows = {"row": ((nowhere, 512),), "end of RAM": ((RAM - 256, 512),)}.get(what, ((BUFFER, 512),))
    if what == "list":
        disk.put(CLB + 4, 1)
    elif what == "fis":
        disk.put(FB + 4, 1)
    elif what == "master":
        disk.config(AHCI_SLOT, 4, 2, size=2)
    if what == "table":
        disk.board.ram[LIST : LIST + 16] = struct.pack("<HHIQ", 0x45, 1, 0, nowhere)
        disk.put(CI, 1)
    else:
        disk.issue(0xEC if what == "fis" else WRITE, rows=rows, flags=0x45)
    assert disk.get(IS) & HBFS and disk.interrupt and pc.devices["ahci"].counters["bad_dma"] == 1
    assert image.read_bytes() == before
    disk.config(AHCI_SLOT, 4, 6, size=2)
    disk.put(CLB + 4, 0)
    disk.put(FB + 4, 0)
    disk.restart()
    disk.issue(READ)
    assert disk.get(CI) == 0 and disk.get(TFD) == 0x50


def test_queued_commands(pc, disk, image):
    """A command's bit leaves PxCI when the drive has it, and PxSACT when a FIS says that it is done."""
    before = image.read_bytes()
    disk.queue(READ_QUEUED, 5, lba=7, count=2, rows=((BUFFER, 1024),))
    assert bytes(pc.ram[BUFFER : BUFFER + 1024]) == before[7 * 512 : 9 * 512] and disk.moved(5) == 1024
    assert (disk.get(CI), disk.get(SACT), disk.get(IS), disk.get(TFD)) == (0, 0, SDBS, 0x50) and disk.interrupt
    assert bytes(pc.ram[FIS + 0x58 : FIS + 0x60]) == bytes((0xA1, 0x40, 0x50, 0)) + (1 << 5).to_bytes(4, "little")
    disk.put(IS, SDBS)
    disk.store(disk.abar + 8, 1)
    assert not disk.interrupt
    pc.ram[BUFFER : BUFFER + 512] = b"q" * 512
    flushed = []
    drive, write = pc.devices["sata0"], pc.devices["sata0"].disk.write
    drive.disk.write = lambda at, views, through=False: (flushed.append(through), write(at, views, through=through))
    disk.queue(WRITE_QUEUED, 31, lba=SECTORS - 1, flags=0x45, device=0x40)
    assert image.read_bytes() == before[:-512] + b"q" * 512 and disk.get(SACT) == 0 and flushed == [False]
    disk.queue(WRITE_QUEUED, 0, lba=0, flags=0x45, device=0xE0)
    assert flushed == [False, True]  # FUA


def test_queued_commands_fail(pc, disk, image):
    """One that fails stops all, and the drive says in its log which; until that is read it does nothing else."""
    before = image.read_bytes()
    directory = disk.log(0)
    assert struct.unpack_from("<H", directory, 0) == (1,) and struct.unpack_from("<H", directory, 0x20) == (1,)
    assert disk.log(0x10)[0] == 0x80  # nothing has
    drive = pc.devices["sata0"]
    read = drive.disk.read_at_once, drive.disk.read
    drive.disk.read_at_once = lambda *rest: False

    def bad(*rest):
        raise OSError(5, "bad sector")

    drive.disk.read = bad
    disk.put(IS, 0xFFFFFFFF)
    disk.put(SACT, 1 << 4)
    disk.queue(READ_QUEUED, 3, lba=0x123, count=8, rows=((BUFFER, 4096),))
    assert disk.get(IS) & (SDBS | TFES) == SDBS | TFES and disk.get(TFD) == 0x4051 and disk.interrupt
    assert disk.get(SACT) == 0x18 and disk.get(CI) == 0
    assert bytes(pc.ram[FIS + 0x58 : FIS + 0x60]) == bytes((0xA1, 0x40, 0x51, 0x40, 0, 0, 0, 0))
    disk.put(CI, 1 << 4)
    assert disk.get(CI) == 1 << 4  # it stays, as all of the port does
    drive.disk.read_at_once, drive.disk.read = read
    disk.restart()
    assert disk.get(SACT) == disk.get(CI) == 0
    state = plain(drive)
    assert state["queue_error"] and refuses(drive, state | {"queue_error": b"x"})
    disk.issue(WRITE, flags=0x45)
    assert disk.get(TFD) == 0x451 and image.read_bytes() == before
    disk.restart()
    page = disk.log(0x10)
    assert page[:14] == bytes((3, 0, 0x51, 0x40, 0x23, 1, 0, 0xE0, 0, 0, 0, 0, 3 << 3, 0))
    disk.queue(READ_QUEUED, 3, lba=1)
    assert disk.get(SACT) == 0 and bytes(pc.ram[BUFFER : BUFFER + 512]) == before[512:1024]
    disk.queue(READ_QUEUED, 9, lba=SECTORS)  # no such sector: it is not taken
    assert disk.get(TFD) == 0x1051 and disk.get(CI) == disk.get(SACT) == 1 << 9
    disk.restart()
    assert disk.log(0x10)[:4] == bytes((9, 0, 0x51, 0x10))
    for log, count in ((0x11, 1), (0x10, 2), (0x110, 1)):
        disk.issue(READ_LOG, lba=log, count=count)
        assert disk.get(TFD) == 0x451
        disk.restart()


def test_a_command_among_queued_ones(disk):
    """Queued and other commands do not mix (ATA8-ACS, 4.15.2): all are aborted."""
    disk.put(SACT, 2)
    disk.issue(READ)
    assert disk.get(TFD) == 0x451 and disk.get(SACT) == 2 and disk.get(CI) == 1
    disk.restart()
    assert disk.log(0x10)[0] == 0x80


def test_a_table_without_room(disk):
    for command in (READ, 0x24):
        disk.issue(command, count=4, rows=((BUFFER, 1024),))
        assert disk.get(IS) & (OFS | TFES) == OFS | TFES and disk.get(TFD) & 1
        disk.restart()


def test_resets(pc, disk):
    disk.issue(0, c=0, control=4, flags=0x505, rows=())
    assert disk.get(CI) == 0 and not disk.get(IS)
    disk.issue(READ)
    assert disk.get(CI) == 0 and disk.moved() == 0  # a drive in reset takes none
    disk.issue(0, c=0, control=0, rows=())
    assert (disk.get(TFD), disk.get(SIG)) == (0x150, 0x101)
    disk.put(CMD, 0x10)
    disk.put(SCTL, 1)
    assert (disk.get(SSTS), disk.get(TFD)) == (0, 0x7F)
    disk.put(SCTL, 0)
    assert (disk.get(SSTS), disk.get(TFD), disk.get(SIG)) == (0x133, 0x150, 0x101)
    assert disk.get(SERR) == 1 << 26 and disk.get(IS) & PCS and disk.interrupt
    disk.put(IS, 0xFFFFFFFF)
    assert disk.get(IS) & PCS
    disk.put(SERR, 0xFFFFFFFF)
    assert not disk.get(IS)
    disk.put(SCTL, 4)
    assert disk.get(SSTS) == 4
    disk.store(disk.abar + 4, 3)
    assert disk.load(disk.abar + 4) == 1 << 31 and disk.get(CLB) == 0 and disk.get(SSTS) == 0x133 and not disk.interrupt


def test_msi(pc, disk):
    at = next(at for at in (0x40, 0x50, 0x60) if disk.config(AHCI_SLOT, at, size=1) == 5)
    disk.config(AHCI_SLOT, at + 4, 0xFEE0_0000)
    disk.config(AHCI_SLOT, at + 12, 0x41, size=2)
    disk.config(AHCI_SLOT, at + 2, 1, size=2)
    for count in (1, 1):
        disk.issue(READ)
        assert len(pc.machine.messages) == count  # no other one until IS is cleared
    assert not disk.interrupt
    disk.store(disk.abar + 8, 1)  # while the port's is not
    assert len(pc.machine.messages) == 2
    disk.put(IS, 0xFFFFFFFF)
    disk.store(disk.abar + 8, 1)
    disk.issue(READ)
    assert len(pc.machine.messages) == 3 and pc.machine.messages[0] == (0xFEE0_0000, 0x41)


@pytest.mark.parametrize("dma", [1, 0])
def test_a_cd(cd, dma):
    driver, content = cd
    ram = driver.board.ram
    packet = bytes((0x28, 0, 0, 0, 0, 5, 0, 0, 3, 0, 0, 0))
    driver.issue(PACKET, features=dma, lba=2048 << 8, packet=packet, flags=0x25, rows=((BUFFER, 6144),))
    assert bytes(ram[BUFFER : BUFFER + 6144]) == content[5 * 2048 : 8 * 2048]
    assert driver.get(CI) == 0 and driver.get(IS) & DHRS and driver.get(TFD) == 0x50 and driver.moved() == 6144
    driver.issue(PACKET, features=dma, lba=2048 << 8, packet=bytes((0x28, 0, 9)), flags=0x25, rows=((BUFFER, 2048),))
    driver.issue(PACKET, packet=bytes((0x28, 0, 0, 0, 0, 64, 0, 0, 1)), features=dma, lba=2048 << 8, flags=0x25)
    assert driver.get(TFD) == 0x5451 and driver.get(IS) & TFES
    driver.restart()
    driver.issue(PACKET, packet=bytes((3, 0, 0, 0, 18)), lba=18 << 8, flags=0x25, rows=((BUFFER, 18),))
    assert ram[BUFFER + 2] == 5 and ram[BUFFER + 12] == 0x21
    driver.issue(0xA1)
    assert struct.unpack_from("<H", ram, BUFFER)[0] == 0x85C0


def test_where_drives_go(pc, tmp_path):
    ahci = pc.devices["ahci"]
    assert ahci.describe()["drives"] == "sata0 sata1" and pc.devices["sata1"].boot_path.endswith("@1e/drive@1/disk@0")
    with pytest.raises(Busy):
        pc.unplug(ahci)
    pc.unplug(pc.devices["sata0"])
    pc.unplug(pc.devices["sata1"])
    assert "ahci" not in pc.devices and pc.free_drives(("sata0",)) == ["sata0"]


def test_a_worker_moves_the_data_and_waits_for_no_one(pc, disk, image):
    """The command ends beside the CPU; one that waits while the machine sleeps begins when it wakes."""
    pc._is_fast = True
    pc._time_source = "host"
    assert pc.has_workers
    gate, drive = threading.Event(), pc.devices["sata0"]
    with pc.lock:
        disk.issue(READ, lba=7)  # little, and in memory: at once
    assert disk.get(CI) == 0 and bytes(pc.ram[BUFFER : BUFFER + 512]) == image.read_bytes()[7 * 512 : 8 * 512]
    drive.dma_at_once = lambda *rest: False
    move = drive.dma_move
    drive.dma_move = lambda *rest: (gate.wait(10), move(*rest))
    with pc.lock:
        disk.issue(READ, lba=1)
        assert disk.get(CI) == 1 and disk.get(TFD) & 0x80
        disk.put(CI, 2)
        gate.set()
        with pc.asleep():
            assert disk.get(CI) & 2 and not pc.devices["ahci"].ports[0].is_busy
            state = pc.devices["ahci"].save()
        assert state.ports[0].issued == 2
    for _ in range(1000):
        if disk.get(CI) == 0:
            break
        threading.Event().wait(0.01)
    assert disk.get(CI) == 0 and bytes(pc.ram[BUFFER : BUFFER + 512]) == image.read_bytes()[512:1024]


def test_states_that_no_controller_has(pc, disk):
    ahci = pc.devices["ahci"]
    for field, value in (("list_at", 8), ("fis_at", 1), ("status", 1 << 20), ("command", 0x80), ("control", 1 << 12),
                         ("errors", 1), ("issued", 1), ("slot", 32), ("task", 1 << 16)):  # fmt: skip
        state = plain(ahci)
        state["ports"] = [dict(port) for port in state["ports"]]
        state["ports"][1] |= {field: value, **({"command": 0} if field == "issued" else {})}
        assert refuses(ahci, state), field
    assert refuses(ahci, plain(ahci) | {"interrupts": 64}) and refuses(ahci, plain(ahci) | {"ports": []})
    assert not refuses(ahci, plain(ahci))


@pytest.mark.parametrize("seed", range(60))
def test_any_driver(tmp_path, seed):
    """Lists, tables and registers of any bytes: nothing but an answer, and the drive's file as long as it was."""
    dice, path, disc = random.Random(seed), tmp_path / "image", tmp_path / "disc"
    path.write_bytes(bytes(64 * 2048))
    disc.write_bytes(bytes(64 * 2048))
    memory = Memory(1 << 20)
    pc = Pc(FakeMachine(), memory)
    try:
        pc.plug(AtaDisk(pc, "sata0", open_disk(os.open(path, os.O_RDWR), "rw")))
        pc.plug(CdDrive(pc, "sata1", open_disk(os.open(disc, os.O_RDONLY), "ro")))
        drivers = Driver(pc, 0), Driver(pc, 1)
        pc.ram[LIST:0x1_4000] = dice.randbytes(0x4000)
        for _ in range(60):
            driver, value = dice.choice(drivers), dice.getrandbits(32)
            what = dice.random()
            if what < 0.2:
                driver.put(dice.randrange(0, 0x48, 4), dice.choice((value, 1 << value % 32)))
            elif what < 0.3:
                size = dice.choice((1, 2, 4, 8))
                driver.store(driver.abar + dice.randrange(0x1000), value & (1 << 8 * size) - 1, size)
            elif what < 0.5:
                driver.load(driver.abar + dice.randrange(0x1000), dice.choice((1, 2, 4, 8)))
                driver.restart()
            else:
                command = dice.choice((*COMMANDS, PACKET, 0xA1, 0x90, value & 255))
                rows = (BUFFER >> 3, value & 0x3FFFF or 1), (dice.choice((value << 3, BUFFER >> 2)), 512)
                driver.issue(
                    command, lba=value & 0x7F, count=value & 0xFF, rows=rows, features=value & 1,
                    flags=dice.choice((5, 5, 0x45, value & 0xFFFF)), slot=value & 31, end=value & 1 << 31,
                    packet=bytes((dice.choice(tuple(PACKETS)), *dice.choice((bytes(11), dice.randbytes(11))))),
                )  # fmt: skip
            pc.shutdown = None
    finally:
        pc.close()
        memory.close()
    assert path.stat().st_size == 64 * 2048
