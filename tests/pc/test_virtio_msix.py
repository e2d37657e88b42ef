"""MSI-X of virtio devices, by a driver in Python: the table, masks, pending bits, vectors, states."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import msgspec
import pytest
from pc.virtio_driver import Bench, Driver

from vmfs.devices import _chips
from vmfs.devices.virtio.pci import NEEDS_RESET
from vmfs.devices.virtio.rng import Rng
from vmfs.words.errors import Invalid

NO_VECTOR = 0xFFFF
ADDRESS = 0xFEE0_1000
MASKED, ALL_MASKED, ENABLED = 1, 0x4000, 0x8000
LINE = 20  # of slot 4


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def driver(bench: Bench) -> Driver:
    return bench.plug(Rng(bench.board, "rng0", 4)).start()


def capability(driver: Driver) -> int:
    at = driver.config(0x34, 1)
    while driver.config(at, 1) != 0x11:
        at = driver.config(at + 1, 1)
    return at


def control(driver: Driver, value: int | None = None) -> int:
    return driver.config(capability(driver) + 2, 2, value)


def table(driver: Driver, vector: int, address: int = ADDRESS, data: int = 0, mask: int = 0) -> None:
    with driver.board.lock:
        for offset, value in ((0, address & 0xFFFF_FFFF), (4, address >> 32), (8, data), (12, mask)):
            driver.device.write(1, 16 * vector + offset, 4, value)


def pending(driver: Driver) -> int:
    return driver.device.read(1, _chips.MSIX_PENDING, 8)


def vectors(driver: Driver, config: int, queue: int) -> tuple[int, int]:
    driver.write(1, 16, 2, config)
    driver.write(1, 22, 2, 0)
    driver.write(1, 26, 2, queue)
    return driver.read(1, 16, 2), driver.read(1, 26, 2)


def take(bench: Bench) -> list[tuple[int, int]]:
    taken, bench.machine.messages = bench.machine.messages, []
    return taken


def test_the_capability_says_where_the_table_is(driver: Driver) -> None:
    at = capability(driver)
    size, where, pending_at = driver.config(at + 2, 2), driver.config(at + 4, 4), driver.config(at + 8, 4)
    assert (size, where, pending_at) == (1, 1, _chips.MSIX_PENDING | 1)  # two vectors, in BAR 1
    for offset in (0, 4, 8):
        driver.config(at + offset, 4, 0xFFFF_FFFF)
    assert (driver.config(at, 1), driver.config(at + 2, 2)) == (0x11, ENABLED | ALL_MASKED | 1)
    assert (driver.config(at + 4, 4), driver.config(at + 8, 4)) == (where, pending_at)


def test_a_queue_and_the_configuration_have_vectors(bench: Bench, driver: Driver) -> None:
    table(driver, 0, data=0x40)
    table(driver, 1, ADDRESS | 1 << 40, data=0x41)
    control(driver, ENABLED)
    assert vectors(driver, 0, 1) == (0, 1)
    driver.request([], [16])
    assert take(bench) == [(ADDRESS | 1 << 40, 0x41)]
    driver.device.config_changed()
    assert take(bench) == [(ADDRESS, 0x40)]
    assert driver.isr() == 0 and not bench.machine.lines.get(LINE)
    assert vectors(driver, NO_VECTOR, NO_VECTOR) == (NO_VECTOR, NO_VECTOR)
    driver.request([], [16])
    driver.device.config_changed()
    assert take(bench) == [] and pending(driver) == 0
    control(driver, 0)  # the line again
    driver.request([], [16])
    assert take(bench) == [] and bench.machine.lines[LINE] and driver.isr() == 1


@pytest.mark.parametrize("vector", [2, 3, 64, 0xFFFE])
def test_a_vector_that_is_not_there_reads_back_as_none(driver: Driver, vector: int) -> None:
    assert vectors(driver, vector, vector) == (NO_VECTOR, NO_VECTOR)


def test_what_is_masked_waits(bench: Bench, driver: Driver) -> None:
    """By the vector, by the function, and without the bus master bit; once, however often."""
    vectors(driver, 0, 1)
    table(driver, 1, data=0x41, mask=MASKED)
    control(driver, ENABLED)
    for mask, free in (
        (lambda: table(driver, 1, data=0x41, mask=MASKED), lambda: table(driver, 1, data=0x42)),
        (lambda: control(driver, ENABLED | ALL_MASKED), lambda: control(driver, ENABLED)),
    ):
        mask()
        driver.request([], [16])
        driver.request([], [16])
        assert take(bench) == [] and pending(driver) == 2
        free()
        assert take(bench) == [(ADDRESS, 0x42)] and pending(driver) == 0
    control(driver, ENABLED | ALL_MASKED)
    driver.request([], [16])
    driver.config(4, 2, 2)
    control(driver, ENABLED)
    assert take(bench) == []
    driver.config(4, 2, 6)
    assert take(bench) == [(ADDRESS, 0x42)]


def test_a_reset_takes_vectors_and_not_the_table(bench: Bench, driver: Driver) -> None:
    vectors(driver, 0, 1)
    table(driver, 1, data=0x41)
    control(driver, ENABLED)
    driver.write(1, 20, 1, 0)
    assert driver.read(1, 16, 2) == NO_VECTOR
    assert driver.device.read(1, 24, 4) == 0x41
    driver.device.reset()
    assert driver.device.read(1, 24, 4) == 0 and driver.device.read(1, 28, 4) == MASKED
    assert not control(driver) & ENABLED


def test_needs_reset_is_told_by_the_configurations_vector(bench: Bench, driver: Driver) -> None:
    vectors(driver, 1, 0)
    table(driver, 1, data=0x55)
    control(driver, ENABLED)
    driver.queues[0].offer(999)
    driver.queues[0].notify()
    assert driver.status & NEEDS_RESET and take(bench) == [(ADDRESS, 0x55)]


def test_the_table_is_written_by_4_and_8_bytes(driver: Driver) -> None:
    device, dice = driver.device, random.Random(3)
    for _ in range(3000):
        offset, size = dice.randrange(0x1000), dice.choice((1, 2, 4, 8))
        device.write(1, offset, size, dice.getrandbits(8 * size))
        assert 0 <= device.read(1, dice.randrange(0x1000), 8) < 1 << 64
    device.write(1, 0, 8, 1 << 63 | 0x1237)
    assert device.read(1, 0, 8) == 1 << 63 | 0x1234 and device.read(1, 5, 2) == 0
    for offset, size in ((0, 2), (4, 8), (2, 4), (0, 1)):
        device.write(1, offset, size, (1 << 8 * size) - 1)
        assert device.read(1, 0, 8) == 1 << 63 | 0x1234
    device.write(1, 12, 4, 0xFFFF_FFFE)
    assert device.read(1, 12, 4) == 0
    assert device.read(1, 32, 8) == 0  # beyond the table
    device.write(1, _chips.MSIX_PENDING, 8, 3)
    assert pending(driver) == 0


def test_it_goes_on_in_another_machine(bench: Bench, driver: Driver) -> None:
    vectors(driver, 0, 1)
    table(driver, 1, data=0x41, mask=MASKED)
    control(driver, ENABLED)
    driver.request([], [16])
    state = driver.device.save()
    other = Bench()
    device = Rng(other.board, "rng0", 4)
    other.pci.plug(device)
    device.check(state)
    device.load(state)
    assert device.save() == state and other.machine.messages == []
    device.write(1, 28, 4, 0)
    assert other.machine.messages == [(ADDRESS, 0x41)]
    other.close()


@pytest.mark.parametrize(
    "bad",
    [
        {"vectors": [0]},
        {"vectors": [0, 2]},
        {"vectors": [0x1_0000, 0]},
        {"table": bytes(16)},
        {"table": struct.pack("<QII", 1, 0, 0) * 2},
        {"table": struct.pack("<QII", 0, 0, 2) * 2},
        {"waiting": 4},
        {"waiting": -1},
    ],
)
def test_a_state_that_cannot_be_is_refused(driver: Driver, bad: dict[str, object]) -> None:
    device = driver.device
    state = msgspec.to_builtins(device.save(), builtin_types=(bytes,))
    for name, value in bad.items():
        (state["pci"] if name in state["pci"] else state)[name] = value
    with pytest.raises(Invalid):
        device.unpack(device.STATE.VERSION, msgspec.msgpack.encode(state))
