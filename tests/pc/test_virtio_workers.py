"""Disks whose requests are done by workers, while the guest goes on: order, ends, states and what goes wrong."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pc.virtio_driver import SIZE, Bench, Driver, FakeMachine

from vmfs.devices import _chips
from vmfs.devices.virtio.block import F_MQ, FLUSH, IN, IOERR, OK, OUT, Block
from vmfs.devices.virtio.disk import RawDisk, open_disk
from vmfs.devices.virtio.queue import NEXT, WRITE

SECTORS = 8192  # 4 MiB
SOON = 20  # seconds
BIG = 128 << 10  # more than is done at a notification


class FastMachine(FakeMachine):
    """One that asks the bus by itself, as far as a board can tell."""

    sees_due = True

    def set_fast_bus(self, bus: object) -> bool:
        return True


class Gate(RawDisk):
    """A disk whose flushes wait for `open`: of a host that hangs."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDWR), "rw", path.stat().st_size)
        self.entered, self.open = threading.Semaphore(0), threading.Event()

    def flush(self) -> None:
        self.entered.release()
        assert self.open.wait(SOON)
        super().flush()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(number.to_bytes(4, "little") * 128 for number in range(SECTORS)))
    return path


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(FastMachine())
    yield made
    made.close()


def attach(bench: Bench, disk: RawDisk) -> Driver:
    driver = bench.plug(Block(bench.board, "blk0", 4, disk)).start()
    assert disk.size == SECTORS * 512
    bench.board.begin()
    return driver


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + SOON
    while not what():
        assert time.monotonic() < end
        time.sleep(0.002)


def begin(
    driver: Driver, kind: int, sector: int, length: int, data: bytes = b"", queue: int = 0
) -> tuple[int, int, int]:
    """A request that is made available: its head, and where its data and its status are."""
    header = driver.put(struct.pack("<IIQ", kind, 0, sector))
    at = driver.put(data) if data else driver.take(length or 16)
    status = driver.put(b"\xff")
    middle = [(at, len(data) or length, not data)] if data or length else []
    return driver.queues[queue].add([(header, 16, False), *middle, (status, 1, True)]), at, status


def ask(driver: Driver, kind: int, sector: int = 0, length: int = 0, data: bytes = b"") -> tuple[int, bytes]:
    head, at, status = begin(driver, kind, sector, length, data)
    driver.queues[0].notify()
    done: list[tuple[int, int]] = []
    until(lambda: done.extend(driver.queues[0].used()) or done)
    assert [one for one, _ in done] == [head]
    return driver.get(status, 1)[0], driver.get(at, length)


def content(sector: int, length: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") * 128 for number in range(sector, sector + length // 512))


@pytest.mark.parametrize("mode", ["ro", "rw", "cow"])
def test_it_is_read_and_written(bench: Bench, image: Path, mode: str) -> None:
    driver = attach(bench, open_disk(os.open(image, os.O_RDWR if mode == "rw" else os.O_RDONLY), mode))
    for sector, length in ((0, 512), (1234, 4096), (100, BIG), (SECTORS - 1, 512)):
        assert ask(driver, IN, sector, length) == (OK, content(sector, length))
    written = os.urandom(BIG)
    status, _ = ask(driver, OUT, 777, data=written)
    assert status == (IOERR if mode == "ro" else OK)
    before = content(770, 7 * 512)
    after = content(777, BIG) if mode == "ro" else written
    assert ask(driver, IN, 770, 7 * 512 + BIG) == (OK, before + after)
    assert (image.read_bytes()[777 * 512 : 777 * 512 + BIG] == written) == (mode == "rw")
    assert ask(driver, IN, SECTORS, 512)[0] == IOERR
    counters = driver.device.counters
    assert counters["read_requests"] == 5 and counters["notifications"] == 7
    assert counters["errors.io"] == 1 + (mode == "ro")
    assert counters["interrupts"] and not driver.needs_reset
    assert driver.isr() == 1


@pytest.mark.parametrize("mode", ["ro", "cow"])
def test_the_last_sector_of_an_odd_image_is_read_with_zeros(bench: Bench, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * (SECTORS * 512 - 500))
    driver = attach(bench, open_disk(os.open(path, 0), mode))
    assert ask(driver, IN, SECTORS - 2, 1024) == (OK, b"x" * 524 + bytes(500))


def test_requests_pass_one_that_hangs(bench: Bench, image: Path) -> None:
    disk = Gate(image)
    driver = attach(bench, disk)
    hung, _, status = begin(driver, FLUSH, 0, 0)
    driver.queues[0].notify()
    assert disk.entered.acquire(timeout=SOON)
    for sector in range(20):
        assert ask(driver, IN, sector, BIG) == (OK, content(sector, BIG))
    assert driver.get(status, 1) == b"\xff"
    disk.open.set()
    done: list[tuple[int, int]] = []
    until(lambda: done.extend(driver.queues[0].used()) or done)
    assert done == [(hung, 1)] and driver.get(status, 1)[0] == OK


WAYS = "a run's end", "sleep", "reset of the driver", "reset of the machine", "no bus master"


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_under_way_after(bench: Bench, image: Path, way: str) -> None:
    disk = Gate(image)
    driver = attach(bench, disk)
    board, device = bench.board, driver.device
    begin(driver, FLUSH, 0, 0)
    driver.queues[0].notify()
    assert disk.entered.acquire(timeout=SOON)
    has_ended = threading.Event()

    def end() -> None:
        with board.lock:
            if way == "a run's end":
                board.end()
            elif way == "sleep":
                device.sleep()
            elif way == "reset of the driver":
                driver.write(1, 20, 1, 0)
            elif way == "reset of the machine":
                device.reset()
            else:
                driver.config(4, 2, 2)
        has_ended.set()

    thread = threading.Thread(target=end)
    thread.start()
    assert not has_ended.wait(0.1)
    disk.open.set()
    assert has_ended.wait(SOON)
    thread.join()
    begin(driver, FLUSH, 0, 0)
    before = driver.get(0, SIZE)
    driver.queues[0].notify()
    assert not disk.entered.acquire(timeout=0.05)
    assert driver.get(0, SIZE) == before
    if way in ("a run's end", "sleep"):
        assert len(driver.queues[0].used()) == 1
        assert device.requests.kicked == 1
        (board.begin if way == "a run's end" else device.wake)()
        until(driver.queues[0].used)
    elif way == "no bus master":
        assert not device.is_live


def test_what_was_notified_of_is_done_where_the_state_goes(bench: Bench, image: Path) -> None:
    """In a machine with workers and in one without."""
    driver = attach(bench, open_disk(os.open(image, os.O_RDONLY), "ro"))
    assert ask(driver, IN, 1, 512)[0] == OK
    with bench.board.asleep():
        _, at, status = begin(driver, IN, 5, 512)
        driver.queues[0].notify()
        state, ram = driver.device.save(), bytes(bench.board.ram)
    assert state.kicked == 1
    for machine in (FastMachine(), FakeMachine()):
        other = Bench(machine)
        device = Block(other.board, "blk0", 4, open_disk(os.open(image, os.O_RDONLY), "ro"))
        other.pci.plug(device)
        other.board.ram[:] = ram
        with other.board.asleep():
            device.check(state)
            device.load(state)
            assert device.save() == state
        other.board.begin()
        until(lambda other=other: other.memory.read(status, 1) == bytes((OK,)))
        assert other.memory.read(at, 512) == content(5, 512)
        until(lambda device=device: not device.requests.kicked)
        other.close()


def hostile(driver: Driver, way: str) -> None:
    ring = driver.queues[0]
    header = driver.put(struct.pack("<IIQ", IN, 0, 0))
    if way == "a loop":
        ring.descriptor(0, header, 16, NEXT, 0)
    elif way == "out of RAM":
        ring.descriptor(0, header, 16, NEXT, 1)
        ring.descriptor(1, SIZE - 100, BIG, WRITE)
    elif way == "no descriptor":
        return ring.offer(ring.size)
    elif way == "too many":
        ring.made += 1000
        return ring.offer(0)
    elif way == "no header":
        ring.descriptor(0, header, 8, NEXT, 1)
        ring.descriptor(1, driver.take(512), 512, WRITE)
    elif way == "no status":
        ring.descriptor(0, header, 16, 0)
    return ring.offer(0)


@pytest.mark.parametrize("way", ["a loop", "out of RAM", "no descriptor", "too many", "no header", "no status"])
def test_a_wrong_request_ends_in_needs_reset(bench: Bench, image: Path, way: str) -> None:
    driver = attach(bench, open_disk(os.open(image, os.O_RDONLY), "ro"))
    hostile(driver, way)
    driver.queues[0].notify()
    until(lambda: driver.needs_reset)
    assert driver.device.failure and driver.device.counters["errors"] == 1
    assert bench.board.end() is None  # nothing is under way
    bench.board.begin()
    driver.start()
    assert ask(driver, IN, 3, BIG) == (OK, content(3, BIG))


def test_a_disk_that_hangs_is_closed_by_its_last_worker(image: Path) -> None:
    bench = Bench(FastMachine())
    disk = Gate(image)
    driver = attach(bench, disk)
    begin(driver, FLUSH, 0, 0)
    driver.queues[0].notify()
    assert disk.entered.acquire(timeout=SOON)
    bench.close()
    assert disk.fd >= 0
    disk.open.set()
    until(lambda: disk.fd < 0)


def test_many_at_a_time(bench: Bench, image: Path) -> None:
    """What the workers give back is each request once, and its own data."""
    driver = attach(bench, open_disk(os.open(image, os.O_RDONLY), "cow"))
    ring = driver.queues[0]
    for turn in range(10):
        asked = {}
        driver.next = 0x8000
        for number in range(24):
            sector = (turn * 997 + number * 131) % (SECTORS - 64)
            head, at, status = begin(driver, IN, sector, 512 * (1 + number))
            asked[head] = sector, 512 * (1 + number), at, status
        ring.notify()
        done: list[tuple[int, int]] = []
        until(lambda done=done: done.extend(ring.used()) or len(done) >= 24)
        assert sorted(head for head, _ in done) == sorted(asked)
        for head, written in done:
            sector, length, at, status = asked[head]
            assert (written, driver.get(status, 1)[0]) == (length + 1, OK)
            assert driver.get(at, length) == content(sector, length)


@pytest.mark.parametrize("machine", [FastMachine, FakeMachine])
def test_every_queue_is_served(machine: type[FakeMachine], image: Path) -> None:
    """F_MQ, with as many queues as CPUs; requests of one queue are given back in it."""
    bench = Bench(machine())
    bench.board.cpu_count = 5
    driver = attach(bench, open_disk(os.open(image, os.O_RDONLY), "ro"))
    assert driver.device.has(F_MQ) and driver.read(4, 34, 2) == 5
    for turn in range(3):
        asked = {}
        for queue in range(5):
            head, at, status = begin(driver, IN, 100 * queue + turn, BIG // 4, queue=queue)
            asked[queue] = head, at, status
        for queue in reversed(range(5)):
            driver.queues[queue].notify()
        for queue, (head, at, status) in asked.items():
            done: list[tuple[int, int]] = []
            until(lambda done=done, queue=queue: done.extend(driver.queues[queue].used()) or done)
            assert done == [(head, BIG // 4 + 1)] and driver.get(status, 1)[0] == OK
            assert driver.get(at, BIG // 4) == content(100 * queue + turn, BIG // 4)
    bench.close()


def test_clusters_are_those_of_a_set() -> None:
    """C's map of an overlay, against a set of numbers."""
    import random

    dice, count = random.Random(7), 100_000
    clusters, model = _chips.Clusters(count), set()
    for _ in range(200):
        first = dice.randrange(count)
        end = min(count, first + dice.choice((1, 3, 64, 500, 40_000)))
        if dice.random() < 0.2 or end - first < 1000:
            clusters.mark(first, end)
            model.update(range(first, end))
        at = dice.randrange(count)
        stop = min(count, at + dice.choice((1, 70, 5000)))
        has, run = clusters.run(at, stop)
        alike = next((n for n in range(at, stop) if (n in model) != (at in model)), stop)
        assert (has, run) == (at in model, alike - at)
    other = _chips.Clusters(count)
    other.mark(0, count)
    other.load(clusters.save())
    assert other.save() == clusters.save()
    assert sum(int.from_bytes(bits, "little").bit_count() for bits in clusters.save().values()) == len(model)
    for bad in ((0, count + 1), (5, 5), (7, 3)):
        with pytest.raises(ValueError):
            clusters.run(*bad)
