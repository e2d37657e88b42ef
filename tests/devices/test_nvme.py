"""The NVMe controller, as a driver sees it: queues, PRPs, admin commands, reads and writes; and hostile drivers."""

from __future__ import annotations

import os
import random
import struct
import threading

import pytest
from devices.fakes import FakeMachine, Guest, plain, refuses

from vmfs.devices.machine import Pc
from vmfs.devices.nvme.controller import Nvme
from vmfs.devices.virtio.disk import open_disk
from vmfs.memory.ram import Memory

RAM = 8 << 20
BLOCKS = 8192
PAGE = 4096
ADMIN_SQ, ADMIN_CQ, IO_SQ, IO_CQ, LISTS, BUFFER = 0x1_0000, 0x1_1000, 0x1_2000, 0x1_4000, 0x2_0000, 0x10_0000
SIZE = 16
CC, CSTS, AQA, ASQ, ACQ = 0x14, 0x1C, 0x24, 0x28, 0x30
READ, WRITE, FLUSH, ZEROES, MANAGE = 2, 1, 0, 8, 9


class Driver(Guest):
    def __init__(self, pc, name="nvme0", **options):
        super().__init__(pc)
        self.device = pc.devices[name]
        self.config(self.device.slot, 4, 6, size=2)
        self.base = self.device.bar(0)
        self.queues = {}
        self.enable(**options)

    def put(self, register, value, size=4):
        self.store(self.base + register, value, size)

    def get(self, register, size=4):
        return self.load(self.base + register, size)

    def enable(self, sq=ADMIN_SQ, cq=ADMIN_CQ, sizes=(SIZE, SIZE), cc=0x46_0001):
        self.put(CC, 0)
        self.put(AQA, sizes[1] - 1 << 16 | sizes[0] - 1)
        self.put(ASQ, sq, 8)
        self.put(ACQ, cq, 8)
        self.board.ram[ADMIN_CQ : ADMIN_CQ + 16 * SIZE] = bytes(16 * SIZE)
        self.queues = {0: [ADMIN_SQ, ADMIN_CQ, 0, 0, 1]}
        self.put(CC, cc)

    def queue(self, number=1, vector=0, sq=IO_SQ, cq=IO_CQ, size=SIZE):
        assert not self.command(0, 5, prp1=cq, dwords=(size - 1 << 16 | number, vector << 16 | 3))[0]
        assert not self.command(0, 1, prp1=sq, dwords=(size - 1 << 16 | number, number << 16 | 1))[0]
        self.queues[number] = [sq, cq, 0, 0, 1]

    def submit(self, queue, opcode, *, namespace=1, prp1=BUFFER, prp2=0, dwords=(), flags=0, id_=7, rings=True):
        it = self.queues[queue]
        words = (*dwords, *(0,) * 6)[:6]
        entry = struct.pack("<BBHIQQQQ6I", opcode, flags, id_, namespace, 0, 0, prp1, prp2, *words)
        self.board.ram[it[0] + 64 * it[2] : it[0] + 64 * it[2] + 64] = entry
        it[2] = (it[2] + 1) % SIZE
        if rings:
            self.put(0x1000 + 8 * queue, it[2])

    def taken(self, queue):
        """The next answer: (status, result, id), or None."""
        it = self.queues[queue]
        result, _, _, _, id_, status = struct.unpack_from("<IIHHHH", self.board.ram, it[1] + 16 * it[3])
        if status & 1 != it[4]:
            return None
        it[3] += 1
        if it[3] == SIZE:
            it[3], it[4] = 0, 1 - it[4]
        self.put(0x1004 + 8 * queue, it[3])
        return status >> 1 & 0x7FF, result, id_

    def command(self, queue, opcode, **options):
        self.submit(queue, opcode, **options)
        return self.taken(queue)

    def blocks(self, opcode, lba, count, **options):
        return self.command(1, opcode, dwords=(lba & 0xFFFFFFFF, lba >> 32, count - 1), **options)[0]

    @property
    def interrupt(self):
        return self.board.machine.lines.get(16 + self.device.slot % 8, False)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(BLOCKS * 512))
    return path


def a_pc(image, mode="rw"):
    pc = Pc(FakeMachine(), Memory(RAM))
    flags = os.O_RDWR if mode == "rw" else os.O_RDONLY
    pc.plug(Nvme(pc, "nvme0", pc.pci.free_slot(), open_disk(os.open(image, flags), mode), path=str(image)))
    return pc


@pytest.fixture
def pc(image):
    pc = a_pc(image)
    yield pc
    pc.close()
    pc.memory.close()


@pytest.fixture
def driver(pc):
    driver = Driver(pc)
    driver.queue()
    return driver


def test_registers_and_identities(pc, driver):
    assert Guest(pc).config(driver.device.slot, 8) >> 8 == 0x010802
    assert driver.get(0, 8) == 0x20_1E01_03FF and driver.get(8) == 0x10400 and driver.get(CSTS) == 1
    assert driver.get(4) == 0x20 and driver.get(ASQ, 8) == ADMIN_SQ
    for what, namespace in ((1, 0), (0, 1), (2, 0), (3, 1)):
        assert driver.command(0, 6, namespace=namespace, dwords=(what,)) == (0, 0, 7)
        data = bytes(pc.ram[BUFFER : BUFFER + PAGE])
        if what == 1:
            assert data[4:24] == b"nvme0".ljust(20) and data[24:33] == b"vmfs disk" and data[77] == 9
            assert data[512:514] == b"\x66\x44" and data[768:].startswith(b"nqn.2014-08.org.nvmexpress:uuid:")
            assert struct.unpack_from("<IH", data, 516) == (1, 0xC) and data[525] == 1
        elif what == 0:
            assert struct.unpack_from("<QQQ", data) == (BLOCKS,) * 3 and data[128:132] == b"\0\0\x09\0" and not data[99]
        elif what == 2:
            assert data[:8] == b"\1" + bytes(7)
        else:
            assert data[:4] == b"\3\x10\0\0" and data[20] == 0
    for what, namespace, status in ((0x11, 1, 2), (0, 2, 0xB), (0, 0xFFFFFFFF, 0xB), (2, 0xFFFFFFFE, 0xB)):
        assert driver.command(0, 6, namespace=namespace, dwords=(what,))[0] == status
    for page, length in ((1, 64), (2, 512), (3, 512)):
        assert driver.command(0, 2, dwords=(length // 4 - 1 << 16 | page,))[0] == 0
    assert driver.command(0, 2, dwords=(0x7F,))[0] == 0x109
    assert driver.command(0, 0x77)[0] == 1


def test_features(driver):
    assert driver.command(0, 9, dwords=(7, 0x3F_003F))[0] == 0xC  # there are queues already
    driver.enable()
    assert driver.command(0, 9, dwords=(7, 0x3F_003F))[:2] == (0, 0x7_0007)
    assert driver.command(0, 10, dwords=(6,))[:2] == (0, 1)
    assert driver.command(0, 9, dwords=(6, 0))[0] == 0 and driver.command(0, 10, dwords=(6,))[1] == 0
    assert driver.command(0, 10, dwords=(6 | 1 << 8,))[1] == 1  # the default
    assert driver.command(0, 9, dwords=(0x55,))[0] == 2 and driver.command(0, 9, dwords=(6 | 1 << 31,))[0] == 0x10D
    for _ in range(4):
        assert driver.command(0, 0xC) is None
    assert driver.command(0, 0xC)[0] == 0x105
    assert driver.command(0, 8)[:2] == (0, 1)


def prp_list(ram, pages, at=LISTS):
    """PRP2 for these: a page, or lists, of which the first has room for three."""
    if len(pages) == 1:
        return pages[0]
    start = at = at + PAGE - 32
    while pages:
        room = (PAGE - at % PAGE) // 8
        if len(pages) > room:
            following = at // PAGE * PAGE + PAGE
            entries, pages = [*pages[: room - 1], following], pages[room - 1 :]
        else:
            entries, pages, following = pages, [], 0
        struct.pack_into(f"<{len(entries)}Q", ram, at, *entries)
        at = following
    return start


@pytest.mark.parametrize(("count", "offset"), [(1, 0), (8, 0), (8, 512), (9, 0), (16, 0), (40, 4), (4096, 0)])
def test_reads_and_writes(pc, driver, image, count, offset):
    """By one pointer, two, a list, lists; pages in any order."""
    before, length = image.read_bytes(), 512 * count
    pages = [BUFFER + PAGE * n for n in range(1 + -(-(offset + length) // PAGE))]
    dice = random.Random(count)
    dice.shuffle(pages)
    prp1, rest = pages[0] + offset, pages[1 : -(-(offset + length) // PAGE)]
    prp2 = prp_list(pc.ram, rest) if rest else 0
    assert driver.blocks(READ, 3, count, prp1=prp1, prp2=prp2) == 0

    def whole():
        found = bytes(pc.ram[prp1 : pages[0] + PAGE]) + b"".join(bytes(pc.ram[page : page + PAGE]) for page in rest)
        return found[:length]

    assert whole() == before[3 * 512 : 3 * 512 + length]
    for page in pages:
        pc.ram[page : page + PAGE] = dice.randbytes(PAGE)
    wanted = whole()
    assert driver.blocks(WRITE, 1000, count, prp1=prp1, prp2=prp2) == 0
    assert image.read_bytes() == before[: 1000 * 512] + wanted + before[1000 * 512 + length :]
    counters = pc.devices["nvme0"].counters
    assert (counters["read_bytes"], counters["write_bytes"]) == (length, length)


def test_flush_zeroes_and_discard(pc, driver, image):
    before = image.read_bytes()
    assert driver.command(1, FLUSH)[0] == 0 and driver.command(1, FLUSH, namespace=0xFFFFFFFF)[0] == 0
    assert driver.command(1, ZEROES, dwords=(8, 0, 7 | 1 << 25))[0] == 0
    struct.pack_into("<IIQIIQ", pc.ram, BUFFER, 0, 16, 64, 0, 0, 0)
    assert driver.command(1, MANAGE, dwords=(1, 4))[0] == 0
    assert image.read_bytes() == before[:4096] + bytes(4096) + before[8192:32768] + bytes(8192) + before[40960:]
    struct.pack_into("<IIQ", pc.ram, BUFFER, 0, 2, BLOCKS - 1)
    assert driver.command(1, MANAGE, dwords=(0, 4))[0] == 0x80
    assert pc.devices["nvme0"].counters["flushes"] == 2


@pytest.mark.parametrize(
    ("opcode", "options", "status"),
    [
        (0x7F, {}, 1),
        (READ, {"namespace": 2}, 0xB),
        (READ, {"flags": 0x40}, 2),
        (READ, {"dwords": (BLOCKS, 0, 0)}, 0x80),
        (READ, {"dwords": (0, 1, 0)}, 0x80),
        (ZEROES, {"dwords": (BLOCKS - 1, 0, 1)}, 0x80),
        (READ, {"dwords": (0, 0, 4096)}, 2),
        (READ, {"prp1": BUFFER + 2}, 0x13),
        (READ, {"prp1": 1 << 40}, 4),
        (WRITE, {"prp1": RAM}, 4),
        (READ, {"dwords": (0, 0, 15), "prp2": BUFFER + 4}, 0x13),
        (READ, {"dwords": (0, 0, 23), "prp2": LISTS + 4}, 0x13),
        (READ, {"dwords": (0, 0, 23), "prp2": 1 << 40}, 4),
        (READ, {"dwords": (0, 0, 23), "prp2": LISTS}, 4),  # a list of addresses that are no RAM
    ],
)
def test_what_cannot_be(pc, driver, image, opcode, options, status):
    before = image.read_bytes()
    struct.pack_into("<2Q", pc.ram, LISTS, 1 << 41, BUFFER)
    assert driver.command(1, opcode, **options)[0] == status
    assert image.read_bytes() == before and driver.get(CSTS) == 1
    assert driver.blocks(READ, 0, 1) == 0


def test_queues_that_cannot_be(pc, driver):
    def made(opcode, number=2, size=SIZE, more=3, prp1=0x3_0000):
        return driver.command(0, opcode, prp1=prp1, dwords=(size - 1 << 16 | number, more))[0]

    assert [made(5, 0), made(5, 9), made(5, 1), made(5, 2, 1), made(5, 2, 1025)] == [0x101, 0x101, 0x101, 0x102, 0x102]
    assert [made(5, more=2), made(5, prp1=0x3_0001), made(5, prp1=1 << 40)] == [2, 2, 2]
    assert made(5, more=9 << 16 | 3) == 0x108
    assert made(1, more=5 << 16 | 1) == 0x100 and made(1, more=1) == 0x100
    assert driver.command(0, 4, dwords=(1,))[0] == 0x10C  # it has a submission queue
    assert driver.command(0, 0, dwords=(0,))[0] == 0x101 and driver.command(0, 4, dwords=(3,))[0] == 0x101
    assert driver.command(0, 0, dwords=(1,))[0] == 0 and driver.command(0, 4, dwords=(1,))[0] == 0
    driver.queue()
    assert driver.blocks(READ, 0, 1) == 0


def test_a_completion_queue_that_is_full(driver):
    for _ in range(SIZE - 1):
        driver.submit(1, FLUSH)
    it = driver.queues[1]
    it[2] = 0  # around
    driver.submit(1, READ, id_=0x99, rings=False)
    driver.put(0x1008, 0)
    for _ in range(SIZE - 1):
        assert driver.taken(1) == (0, 0, 7)
    driver.put(0x1008, 1)
    assert driver.taken(1) is not None


def test_a_queue_that_is_deleted_while_its_commands_wait(driver):
    """Admin commands that waited, too, come first, and take away the queue of its answers with it."""
    driver.device.run_ends()
    driver.submit(1, FLUSH)
    for opcode in (0x00, 0x04):
        driver.submit(0, opcode, dwords=(1,))
    driver.device.run_begins()
    assert [driver.taken(0)[0] for _ in range(2)] == [0, 0]
    assert driver.device.submissions.keys() == driver.device.completions.keys() == {0}


def test_interrupts(pc, driver):
    assert not driver.interrupt
    driver.submit(1, FLUSH)
    assert driver.interrupt
    driver.put(0xC, 1)
    assert not driver.interrupt and driver.get(0xC) == 1
    driver.put(0x10, 1)
    assert driver.interrupt
    assert driver.taken(1) and not driver.interrupt
    table = driver.device.bar(1)
    at = next(at for at in range(0x40, 0x80, 4) if driver.config(driver.device.slot, at, size=1) == 0x11)
    for vector in range(3):
        for word, value in ((0, 0xFEE0_0000), (8, 0x40 + vector), (12, 0)):
            driver.store(table + 16 * vector + word, value)
    driver.config(driver.device.slot, at + 2, 0x8008, size=2)
    driver.queue(2, vector=2, sq=0x5_0000, cq=0x5_4000)
    pc.machine.messages.clear()
    driver.submit(2, FLUSH, rings=False)
    driver.submit(2, FLUSH)
    assert pc.machine.messages == [(0xFEE0_0000, 0x42)] and not driver.interrupt  # one for both
    assert driver.taken(2) and driver.taken(2)


def test_a_controller_that_cannot_begin(pc, driver):
    for options in ({"sq": 1 << 40}, {"cq": RAM}, {"sizes": (1, SIZE)}, {"sizes": (SIZE, 4096)}, {"cc": 0x46_0081},
                    {"cc": 0x46_0011}):  # fmt: skip
        driver.enable(**options)
        assert driver.get(CSTS) == 2
        driver.put(0x1000, 1)
        assert pc.devices["nvme0"].counters["bad_doorbells"] > 0
    driver.enable()
    assert driver.get(CSTS) == 1
    driver.config(driver.device.slot, 4, 2, size=2)
    driver.put(0x1000, 1)
    assert driver.get(CSTS) == 3
    driver.config(driver.device.slot, 4, 6, size=2)
    driver.enable()
    driver.put(CC, 0x46_4001)  # a shutdown
    assert driver.get(CSTS) == 9
    driver.put(CC, 0)
    assert driver.get(CSTS) == 0 and driver.get(AQA) == SIZE - 1 << 16 | SIZE - 1
    driver.put(0x1000, 0, 2)
    driver.put(0x1FFC, 5)


def test_a_disk_that_is_ro(image):
    pc = a_pc(image, "ro")
    try:
        driver = Driver(pc)
        driver.queue()
        assert driver.command(0, 6, dwords=(0,))[0] == 0 and pc.ram[BUFFER + 99] == 1
        assert [driver.command(1, opcode)[0] for opcode in (WRITE, ZEROES, MANAGE)] == [0x20] * 3
        assert driver.blocks(READ, 0, 1) == 0 and driver.command(0, 10, dwords=(6,))[0] == 2
    finally:
        pc.close()
        pc.memory.close()


def test_an_error_of_the_host(pc, driver, image):
    os.truncate(image, 512)
    assert driver.blocks(READ, 5, 1) == 0x281
    assert pc.devices["nvme0"].counters["host_errors.EIO"] == 1 and pc.counters["host_errors"] == 1
    assert driver.blocks(READ, 0, 1) == 0


def test_workers_answer_while_the_guest_goes_on(pc, driver, image):
    """One that waits for the host holds up no other; what is not begun when the machine sleeps begins afterwards."""
    pc._is_fast = True
    pc._time_source = "host"
    gate, disk = threading.Event(), pc.devices["nvme0"].disk
    with pc.lock:
        assert driver.blocks(READ, 7, 1) == 0  # little, and in memory: at once
    assert bytes(pc.ram[BUFFER : BUFFER + 512]) == image.read_bytes()[7 * 512 : 8 * 512]
    disk.read_at_once = lambda *rest: False
    read = disk.read
    disk.read = lambda at, views: (gate.wait(10) if at == 512 else None, read(at, views))

    def answer():
        for _ in range(1000):
            with pc.lock:
                found = driver.taken(1)
            if found:
                return found
            threading.Event().wait(0.01)
        raise AssertionError("no answer")

    with pc.lock:
        driver.submit(1, READ, id_=1, dwords=(1,))
        driver.submit(1, READ, id_=2, dwords=(2,), prp1=BUFFER + PAGE)
        assert driver.taken(1) is None
    assert answer() == (0, 0, 2) and bytes(pc.ram[BUFFER + PAGE :][:512]) == image.read_bytes()[1024:1536]
    with pc.lock:
        gate.set()
        with pc.asleep():
            assert driver.taken(1) == (0, 0, 1)
            driver.submit(1, READ, id_=3, dwords=(3,))
            assert driver.taken(1) is None and pc.devices["nvme0"].save().submissions[1].head == 3
    assert answer() == (0, 0, 3) and bytes(pc.ram[BUFFER : BUFFER + 512]) == image.read_bytes()[1536:2048]


def test_a_doorbell_reads_no_more_at_once_than_a_thread_takes_to_wake(pc, driver, image):
    """Of sixteen reads of 256 KiB the CPU's thread does four; all are answered."""
    pc._is_fast = True
    pc._time_source = "host"
    nvme, count = pc.devices["nvme0"], 512
    with pc.lock:
        struct.pack_into("<63Q", pc.ram, LISTS, *range(BUFFER + PAGE, BUFFER + 64 * PAGE, PAGE))
        for id_ in range(SIZE - 1):
            driver.submit(1, READ, id_=id_, dwords=(512 * id_, 0, count - 1), prp2=LISTS, rings=id_ == SIZE - 2)
        answered = [driver.taken(1) for _ in range(4)]
        assert [id_ for _, _, id_ in answered] == [0, 1, 2, 3] and nvme._at_once == 0
        assert driver.taken(1) is None  # threads cannot answer yet
    left = set(range(4, SIZE - 1))
    with pc.lock, pc.asleep():
        while found := driver.taken(1):
            left.remove(found[2])
    assert not left


def test_states_that_no_controller_has(pc, driver):
    nvme = pc.devices["nvme0"]
    state = plain(nvme)
    assert not refuses(nvme, state)
    one = {**state["submissions"][1]}
    for changed in (
        {"status": 0}, {"status": 16}, {"size": 512}, {"admin_sizes": 1 << 31}, {"features": {}},
        {"admin_submission": 4},
        {"submissions": {}}, {"completions": {0: state["completions"][0]}},
        *({"submissions": {**state["submissions"], 1: one | bad}} for bad in (
            {"head": SIZE}, {"tail": SIZE}, {"size": 1}, {"base": 1 << 40}, {"base": 1}, {"completion": 7},
            {"completion": 0},
        )),
        {"completions": {**state["completions"], 1: state["completions"][1] | {"vector": 9}}},
        {"submissions": {**state["submissions"], 9: one}}, {"events": [1] * 5},
    ):  # fmt: skip
        assert refuses(nvme, state | changed), changed


@pytest.mark.parametrize("seed", range(60))
def test_any_driver(tmp_path, seed):
    """Registers, queues and commands of any bytes: nothing but an answer, and a file as long as it was."""
    dice, path = random.Random(seed), tmp_path / "image"
    path.write_bytes(bytes(64 << 10))
    pc = a_pc(path)
    try:
        driver = Driver(pc)
        driver.queue(vector=dice.randrange(9))
        for _ in range(120):
            value = dice.getrandbits(32)
            where = dice.choice((0xC, 0x10, 0x14, 0x24, 0x28, 0x2C, 0x30, 0x34, 0x1000 + 4 * (value % 24)))
            what = dice.random()
            if what < 0.1:
                driver.put(where, dice.choice((value, value & 15, 0x46_0001)))
            elif what < 0.2:
                size = dice.choice((1, 2, 4, 8))
                driver.store(driver.base + dice.randrange(0x4000 - 8), value & (1 << 8 * size) - 1, size)
                driver.load(driver.base + dice.randrange(0x4000 - 8), size)
            elif what < 0.3:
                driver.enable()
                if driver.get(CSTS) == 1:
                    driver.queue(dice.randrange(1, 9))
            elif driver.queues:
                queue = dice.choice(tuple(driver.queues))
                opcode = dice.choice((0, 1, 2, 4, 5, 6, 8, 9, 10, 12)) if dice.random() < 0.9 else value & 255
                pages = [dice.choice((BUFFER, LISTS, value << 12, value)) for _ in range(2)]
                pc.ram[LISTS : LISTS + PAGE] = dice.randbytes(64) * 64
                dwords = [dice.choice((0, 1, 2, 3, value & 127, value)) for _ in range(6)]
                driver.submit(queue, opcode, namespace=dice.choice((1, 1, 0, value)), prp1=pages[0], prp2=pages[1],
                              dwords=dwords, flags=dice.choice((0, 0, 0, value & 255)))  # fmt: skip
                driver.taken(queue)
            pc.shutdown = None
    finally:
        pc.close()
        pc.memory.close()
    assert path.stat().st_size == 64 << 10
