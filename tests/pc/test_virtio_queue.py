"""The transport and the queues, by a driver in Python: a good one, and hostile ones."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from devices.fakes import plain, refuses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pc.virtio_driver import ALL_RING_FEATURES, SIZE, Bench, Driver

from vmfs.devices import _chips
from vmfs.devices.board import Board
from vmfs.devices.virtio.console import Console
from vmfs.devices.virtio.pci import EVENT_IDX, INDIRECT_DESC, VERSION_1, VirtioDevice, VirtioState
from vmfs.devices.virtio.queue import INDIRECT, NEXT, WRITE, Chain, DriverError, Virtqueue, part
from vmfs.devices.virtio.rng import Rng
from vmfs.memory.ram import PAGE


class Echo(VirtioDevice[VirtioState]):
    STATE = VirtioState
    """Answers each request with what it was sent, in capitals."""

    TYPE = "echo"
    DEVICE = 0x107F
    CLASS = 0xFF0000
    QUEUES = (8, 16)

    def __init__(self, board: Board, name: str, slot: int) -> None:
        self.setting = 7
        super().__init__(board, name, slot)

    def features(self) -> int:
        return 1 << 3

    def device_config(self) -> bytes:
        return struct.pack("<IH", 0x1234_5678, self.setting)

    def write_device_config(self, offset: int, data: bytes) -> None:
        if offset == 4:
            self.setting = int.from_bytes(data, "little")

    def notified(self, queue: Virtqueue) -> None:
        self.serve(queue, lambda chain: chain.write(chain.read().upper()))


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def echo(bench: Bench, features: int | None = None, size: int = 0) -> Driver:
    return bench.plug(Echo(bench.board, "echo", 3)).start(features, size)


def test_identity_and_capabilities(bench: Bench) -> None:
    driver = bench.plug(Echo(bench.board, "echo", 3))
    assert driver.config(0, 2) == 0x1AF4 and driver.config(2, 2) == 0x107F and driver.config(8, 1) == 1
    assert set(driver.caps) == {1, 2, 3, 4, 5}
    assert all(bar == 0 and at + length <= 0x4000 for bar, at, length, _ in driver.caps.values())
    assert driver.read(1, 18, 2) == 2
    assert driver.read(1, 16, 2) == 0xFFFF
    driver.write(1, 22, 2, 1)
    assert driver.read(1, 24, 2) == 16 and driver.read(1, 30, 2) == 1
    driver.write(1, 22, 2, 2)
    assert driver.read(1, 24, 2) == 0  # there is no such queue


def test_features_must_be_offered_and_have_version_1(bench: Bench) -> None:
    driver = bench.plug(Echo(bench.board, "echo", 3))
    offered = driver.offered()
    assert offered == 1 << 3 | INDIRECT_DESC | EVENT_IDX | VERSION_1
    assert driver.accept(offered)
    assert not driver.accept(offered & ~VERSION_1)
    assert not driver.accept(offered | 1 << 40)
    assert not driver.accept(offered | 1 << 5)


@pytest.mark.parametrize(
    ("features", "indirect"),
    [(0, False), (EVENT_IDX, False), (INDIRECT_DESC, True), (INDIRECT_DESC | EVENT_IDX, True), (INDIRECT_DESC, False)],
)
def test_requests_in_every_form(bench: Bench, features: int, indirect: bool) -> None:
    driver = echo(bench, features)
    for turn in range(40):  # more than both queues are long
        text = b"turn %d" % turn
        out, length = driver.request([text[:3], text[3:]], [4, 40], turn % 2, indirect=indirect)
        assert b"".join(out)[: len(text)] == text.upper()
        assert length == len(text)


def test_the_interrupt_is_level_triggered_and_reading_isr_takes_it_back(bench: Bench) -> None:
    driver = echo(bench)
    driver.request([b"a"], [1])
    assert bench.machine.lines == {19: True}
    assert driver.isr() == 1
    assert bench.machine.lines == {19: False}
    assert driver.isr() == 0


def test_intx_disable_holds_the_line_back(bench: Bench) -> None:
    driver = echo(bench)
    driver.config(4, 2, 0x406)
    driver.request([b"a"], [1])
    assert not any(bench.machine.lines.values())
    assert driver.config(6, 2) & 8  # the status register shows it
    driver.config(4, 2, 6)
    assert bench.machine.lines[19]


def test_no_interrupt_where_the_driver_wants_none(bench: Bench) -> None:
    driver = echo(bench, 0)
    driver.queues[0].poke(driver.queues[0].avail, "<H", 1)
    driver.request([b"a"], [1])
    assert driver.isr() == 0
    driver.queues[0].poke(driver.queues[0].avail, "<H", 0)
    driver.request([b"a"], [1])
    assert driver.isr() == 1


def test_event_index_says_when_to_interrupt(bench: Bench) -> None:
    driver = echo(bench, EVENT_IDX)
    ring = driver.queues[0]
    ring.event = 2  # when the third is done
    ring.used()
    told = []
    for _ in range(5):
        driver.request([b"a"], [1])
        told.append(driver.isr())
    assert told == [0, 0, 1, 0, 0]
    assert ring.peek(ring.used_area + 4 + 8 * ring.size, "<H") == (5,)  # and when the device wants to hear


def test_configuration_through_pci_configuration_space(bench: Bench) -> None:
    driver = echo(bench)
    _, _, _, cap = driver.caps[5]

    def window(offset: int, size: int, value: int | None = None) -> int:
        driver.config(cap + 4, 1, 0)
        driver.config(cap + 8, 4, offset)
        driver.config(cap + 12, 4, size)
        return driver.config(cap + 16, size, value)

    at = driver.caps[4][1]
    assert window(at, 4) == 0x1234_5678
    window(at + 4, 2, 99)
    assert window(at + 4, 2) == 99
    driver.queues[0].add([(driver.put(b"x"), 1, False), (driver.take(1), 1, True)])
    window(driver.caps[2][1], 2, 0)  # a notification
    assert len(driver.queues[0].used()) == 1
    for offset, size in ((0x4000, 4), (0x3FFF, 2), (0, 3), (0xFFFF_FFFC, 4)):
        window(offset, size)  # nowhere: nothing happens
    assert not driver.needs_reset


def test_odd_accesses(bench: Bench) -> None:
    driver = echo(bench)
    assert driver.read(1, 20, 4) == driver.status | 1 << 16  # with the generation and the selected queue beside it
    driver.write(1, 20, 2, 0)  # not the field's size: nothing happens
    assert driver.status
    assert bench.board.devices["echo"].counters["bad_accesses"] == 1
    for region in range(0, 0x4000, 0x800):
        for size in (1, 2, 4, 8):
            assert 0 <= driver.device.read(0, region, size) < 1 << 8 * size


def test_nothing_happens_before_driver_ok_or_without_bus_master(bench: Bench) -> None:
    driver = bench.plug(Echo(bench.board, "echo", 3))
    driver.start()
    ring = driver.queues[0]
    driver.config(4, 2, 2)
    ring.add([(driver.put(b"x"), 1, False), (driver.take(1), 1, True)])
    ring.notify()
    assert ring.used() == []
    driver.config(4, 2, 6)
    ring.notify()
    assert len(ring.used()) == 1
    assert driver.accept(driver.offered())
    ring.notify()
    assert ring.used() == []


def test_reset_forgets_everything(bench: Bench) -> None:
    driver = echo(bench)
    driver.request([b"a"], [1])
    driver.write(1, 20, 1, 0)
    assert driver.status == 0 and driver.isr() == 0 and not any(bench.machine.lines.values())
    assert driver.read(1, 32, 4) == 0 and driver.read(1, 28, 2) == 0
    driver.start()
    assert driver.request([b"again"], [5])[0] == [b"AGAIN"]


def test_saved_state_goes_on_in_another_machine(bench: Bench) -> None:
    driver = echo(bench, size=4)
    for _ in range(3):
        driver.request([b"a"], [1])
    ring = driver.queues[0]
    other = Bench()
    try:
        twin = Echo(other.board, "echo", 3)
        other.pci.plug(twin)
        other.memory.write(0, bench.memory.read(0, SIZE))
        with bench.board.lock:
            twin.load(bench.board.devices["echo"].save())
        assert twin.save() == bench.board.devices["echo"].save()
        assert other.machine.lines[19] and twin.windows() == driver.device.windows()
        driver.bench, driver.board, driver.device = other, other.board, twin
        driver.isr()
        assert driver.request([b"there"], [5])[0] == [b"THERE"]
        assert ring.seen == 4
    finally:
        other.close()


def test_states_that_cannot_be_are_refused(bench: Bench) -> None:
    driver = echo(bench)
    good = plain(driver.device)
    assert not refuses(driver.device, good)
    for change in ({"status": 256}, {"accepted": -1}, {"queues": []}, {"accepted": 1 << 50}):
        assert refuses(driver.device, {**good, **change})
    queue = {**good["queues"][0], "descriptors": SIZE}
    assert refuses(driver.device, {**good, "queues": [queue, good["queues"][1]]})
    config = bytearray(good["pci"]["config"])
    config[0] ^= 1  # the vendor's number
    assert refuses(driver.device, {**good, "pci": {**good["pci"], "config": bytes(config)}})


def test_what_the_device_writes_is_in_the_dirty_log(bench: Bench) -> None:
    driver = echo(bench)
    driver.next = 0x10_0000
    at = driver.take(3 * PAGE, PAGE)
    bench.board.take_dirty()
    ring = driver.queues[0]
    ring.add([(driver.put(b"x" * PAGE * 2), PAGE * 2, False), (at + 100, PAGE * 2, True)])
    ring.notify()
    dirty = bench.board.take_dirty()
    pages = {page for page in range(SIZE // PAGE) if dirty >> page & 1}
    assert pages == {at // PAGE, at // PAGE + 1, at // PAGE + 2, ring.used_area // PAGE}


# ---- hostile drivers


def expect_error(driver: Driver, sentence: str) -> None:
    assert driver.needs_reset and sentence in driver.device.failure
    assert driver.isr() & 2  # a configuration change interrupt says so
    before = driver.queues[0].used()
    driver.queues[0].notify()
    assert driver.queues[0].used() == [] and before == []
    driver.device.reset()
    driver.config(4, 2, 6)
    driver.next = 0x10_0000
    driver.start()  # and a reset makes it whole
    assert driver.request([b"fine"], [4])[0] == [b"FINE"]


def test_a_loop(bench: Bench) -> None:
    driver = echo(bench)
    ring = driver.queues[0]
    ring.descriptor(0, driver.put(b"x"), 1, NEXT, 1)
    ring.descriptor(1, driver.put(b"x"), 1, NEXT, 0)
    ring.offer(0)
    ring.notify()
    expect_error(driver, "loop")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ((SIZE, 1, 0, 0), "not RAM"),
        ((SIZE - 4, 5, WRITE, 0), "not RAM"),
        ((0xFFFF_FFFF_FFFF_FFFF, 2, WRITE, 0), "not RAM"),
        ((0x3000, 0xFFFF_FFFF, WRITE, 0), "not RAM"),
        ((0x3000, 1, NEXT, 8), "descriptor 8 of 8"),
        ((0x3000, 1, WRITE | NEXT, 1), "readable buffer after"),
        ((0x3000, 16, INDIRECT | NEXT, 1), "indirect"),
        ((0x3000, 15, INDIRECT, 0), "indirect"),
        ((0x3000, 0, INDIRECT, 0), "indirect"),
        ((0x3000, 16 * 1025, INDIRECT, 0), "indirect"),
        ((SIZE - 8, 16, INDIRECT, 0), "indirect"),
    ],
)
def test_descriptors_that_cannot_be(bench: Bench, row: tuple[int, int, int, int], sentence: str) -> None:
    driver = echo(bench)
    ring = driver.queues[0]
    ring.descriptor(0, *row)
    ring.descriptor(1, 0x3000, 1, 0)
    ring.offer(0)
    ring.notify()
    expect_error(driver, sentence)


def test_an_indirect_table_in_an_indirect_table(bench: Bench) -> None:
    driver = echo(bench)
    inner = driver.put(struct.pack("<QIHH", 0x3000, 1, 0, 0))
    outer = driver.put(struct.pack("<QIHH", inner, 16, INDIRECT, 0))
    ring = driver.queues[0]
    ring.descriptor(0, outer, 16, INDIRECT)
    ring.offer(0)
    ring.notify()
    expect_error(driver, "indirect")


def test_a_head_that_is_none(bench: Bench) -> None:
    driver = echo(bench)
    driver.queues[0].offer(8)
    driver.queues[0].notify()
    expect_error(driver, "descriptor 8 of 8")


def test_more_requests_than_there_is_room_for(bench: Bench) -> None:
    driver = echo(bench)
    ring = driver.queues[0]
    ring.poke(ring.avail + 2, "<H", 9)
    ring.notify()
    expect_error(driver, "9 requests wait")


@pytest.mark.parametrize(
    ("offset", "value"), [(24, 3), (24, 0), (24, 16), (32, 8), (32, SIZE - 16), (36, 1), (40, 1), (48, 2), (52, 5)]
)
def test_queues_that_cannot_be(bench: Bench, offset: int, value: int) -> None:
    driver = bench.plug(Echo(bench.board, "echo", 3))
    assert driver.accept(ALL_RING_FEATURES)
    driver.write(1, 22, 2, 0)
    for where in (32, 40, 48):
        driver.write(1, where, 4, 0x1000)
    driver.write(1, offset, 2 if offset == 24 else 4, value)
    driver.write(1, 28, 2, 1)
    assert driver.needs_reset and driver.read(1, 28, 2) == 0


def test_a_request_of_more_than_4_gib(bench: Bench) -> None:
    driver = echo(bench)
    row = struct.pack("<QIHH", 0, SIZE, NEXT, 0)
    table = b"".join(row[:-2] + struct.pack("<H", at + 1) for at in range(1024))
    # 1024 times 4 MiB are 4 GiB, which is allowed; a descriptor before it is too much.
    at = driver.put(table[:-4] + struct.pack("<HH", 0, 0))
    ring = driver.queues[0]
    ring.descriptor(0, 0, 16, NEXT, 1)
    ring.descriptor(1, at, len(table), INDIRECT)
    ring.offer(0)
    ring.notify()
    expect_error(driver, "a request of")


hostile_descriptor = st.tuples(
    st.one_of(st.integers(0, SIZE + 64), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 64), st.integers(0, 2**32 - 1)),
    st.integers(0, 7),
    st.one_of(st.integers(0, 9), st.integers(0, 2**16 - 1)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(hostile_descriptor, min_size=1, max_size=24),
    heads=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    jump=st.integers(0, 3),
    device=st.sampled_from([Echo, Rng, Console]),
    registers=st.lists(
        st.tuples(st.integers(0, 0x3FFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)), max_size=12
    ),
)
def test_hostile_drivers_get_an_error_and_nothing_else(
    rows: list[tuple[int, int, int, int]],
    heads: list[int],
    jump: int,
    device: type[VirtioDevice],
    registers: list[tuple[int, int, int]],
) -> None:
    bench = Bench()
    try:
        driver = bench.plug(device(bench.board, "dev", 5)).start(size=8)
        tables = driver.put(b"".join(struct.pack("<QIHH", *row) for row in rows))
        for ring in driver.queues.values():
            for at, (address, length, flags, following) in enumerate(rows[:8]):
                if flags & INDIRECT and length <= 64:  # some tables are real ones
                    address, length = tables, 16 * len(rows)
                ring.descriptor(at, address, length, flags, following)
            for head in heads:
                ring.offer(head)
            ring.poke(ring.avail + 2, "<H", ring.made + jump)
            ring.notify()
        for offset, size, value in registers:
            bench.board.devices["dev"].write(0, offset, size, value & (1 << 8 * size) - 1)
            assert 0 <= bench.board.devices["dev"].read(0, offset, size) < 1 << 8 * size
        state = driver.device.save()
        assert state.status < 256
        driver.device.reset()
        driver.config(4, 2, 6)
        driver.next = SIZE // 2
        driver.start()  # whatever was done, a reset gives a device that works
        assert not driver.needs_reset
    finally:
        bench.close()


@given(
    spans=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)), max_size=6),
    offset=st.integers(0, 300),
    length=st.one_of(st.none(), st.integers(0, 300)),
)
def test_parts_of_spans(spans: list[tuple[int, int]], offset: int, length: int | None) -> None:
    every = [at + i for at, size in spans for i in range(size)]
    wanted = every[offset:] if length is None else every[offset : offset + length]
    found = part(spans, offset, length)
    assert [at + i for at, size in found for i in range(size)] == wanted
    assert all(size > 0 for _, size in found)


# ---- entropy and console


def test_random_bytes_repeat_where_time_does(bench: Bench) -> None:
    board = bench.board
    assert board.random(16) != board.random(16)
    with board.asleep():
        board.time_source, state = "instructions", board.save()
        drawn = [board.random(16) for _ in range(3)]
        assert len(set(drawn)) == 3
        assert board.save() != state
        board.load(state)
        assert [board.random(16) for _ in range(3)] == drawn


def test_rng_fills_buffers(bench: Bench) -> None:
    driver = bench.plug(Rng(bench.board, "rng0", 4)).start()
    (first,), length = driver.request([], [64])
    (second,), _ = driver.request([], [64])
    assert length == 64 and first != second and first != bytes(64)
    assert driver.request([], [1 << 17])[1] == 1 << 16  # some of it


def test_console_carries_bytes_both_ways(bench: Bench) -> None:
    sent = bytearray()
    console = Console(bench.board, "console0", 4, sent.extend)
    driver = bench.plug(console)
    console.receive(b"early ")
    driver.start()
    driver.write(4, 8, 4, ord("!"))
    driver.request([b"hello ", b"host"], [], queue=1)
    assert sent == b"!hello host"
    ring = driver.queues[0]
    at = driver.take(8)
    ring.add([(at, 8, True)])
    ring.notify()
    assert ring.used() == [(0, 6)] and driver.get(at, 6) == b"early "
    for head in (1, 2):
        ring.add([(at + 4 * head, 4, True)])
        assert ring.next == head + 1
    ring.notify()
    assert ring.used() == []
    console.receive(b"123456")
    assert ring.used() == [(1, 4), (2, 2)] and driver.get(at + 4, 6) == b"123456"


def test_chains_know_their_board(bench: Bench) -> None:
    chain = Chain(bench.board, 0, [(0, 4)], [(16, 2), (32, 2)])
    assert chain.write(b"abcdef") == 4
    assert bench.memory.read(16, 2) + bench.memory.read(32, 2) == b"abcd"
    assert chain.write(b"Z", 3) == 1 and bench.memory.read(33, 1) == b"Z"


_ADDRESS = st.one_of(
    st.sampled_from((0x2000, SIZE - 16, SIZE - 1, SIZE, 1 << 63, 2**64 - 1)),
    st.integers(0, SIZE // 16).map(lambda at: at * 16),
)
_ROW = st.tuples(
    _ADDRESS,
    st.one_of(st.sampled_from((0, 1, 16, 48, 17, 16 * 1024, 16 * 1025, 2**32 - 1)), st.integers(0, 4096)),
    st.sampled_from(
        (0, NEXT, NEXT, NEXT, WRITE, NEXT | WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 0xFFF8 | WRITE)
    ),
    st.integers(0, 9),
)


@given(
    table=st.lists(_ROW, min_size=8, max_size=8),
    inner=st.lists(_ROW, min_size=3, max_size=3),
    head=st.integers(0, 9),
    indirect=st.booleans(),
    alike=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=600)
def test_c_and_python_read_the_same_chains(
    bench: Bench, table: list, inner: list, head: int, indirect: bool, alike: bool
) -> None:
    """Python says what a chain is, or that it is none; C takes the same ones, and gives the same."""
    queue = Virtqueue(bench.board, 0, 8)
    queue.descriptors, queue.indirect = 0x1000, indirect
    if alike:  # readable ones first, each to the next: mostly a chain
        table = [(at % (SIZE - 4096), length % 4096, NEXT | (flags & INDIRECT if n == 7 else 0), n + 1)
                 for n, (at, length, flags, _) in enumerate(table)]  # fmt: skip
        table[7] = (0x2000, 48, INDIRECT, 0) if indirect else (*table[7][:2], WRITE, 0)
        inner = [
            (at % SIZE, length % 64, WRITE | (NEXT if n < 2 else 0), n + 1) for n, (at, length, *_) in enumerate(inner)
        ]
    bench.memory.write(0x1000, b"".join(struct.pack("<QIHH", *row) for row in table))
    bench.memory.write(0x2000, b"".join(struct.pack("<QIHH", *row) for row in inner))
    ram = bench.board.ram
    spans = _chips.chain(bench.board.ram_chip, queue.descriptors, queue.size, head, indirect)
    try:
        said = queue._read_chain(ram, head)
    except DriverError:
        assert spans is None
    else:
        assert spans == (said.readable, said.writable)


def test_c_takes_a_chain_that_is_right(bench: Bench) -> None:
    """Else each would be read twice, and nobody would see it."""
    assert bench.board.ram  # it is mapped
    rows = ((0x3000, 16, NEXT, 2), (0, 0, 0, 0), (0x4000, 4096, NEXT | WRITE, 3), (SIZE - 1, 1, WRITE, 0))
    bench.memory.write(0x1000, b"".join(struct.pack("<QIHH", *row) for row in rows))
    spans = _chips.chain(bench.board.ram_chip, 0x1000, 8, 0, False)
    assert spans == ([(0x3000, 16)], [(0x4000, 4096), (SIZE - 1, 1)])


def test_what_devices_write_is_told_once_where_it_is_one_piece(bench: Bench) -> None:
    bench.board.take_dirty()
    before = bench.board.writes
    bench.board.wrote_all([(0x1000, 0x1000), (0x2000, 0x800), (0, 0), (0x2800, 1), (0x5FFF, 2), (0x2000, 16)])
    assert bench.board.writes - before == 3  # 0x1000 to 0x2801, two bytes at 0x5FFF, 16 at 0x2000
    assert bench.board.take_dirty() == 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6
