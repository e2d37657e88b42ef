"""A virtio driver in Python: it drives a device on a board whose machine is a model, through the registers and the RAM
that a guest's driver would use."""

from __future__ import annotations

import struct
from typing import Any

from vmfs.devices.board import Board
from vmfs.devices.pci import HostBridge
from vmfs.devices.virtio.pci import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    EVENT_IDX,
    FEATURES_OK,
    INDIRECT_DESC,
    NEEDS_RESET,
    VERSION_1,
    VirtioDevice,
)
from vmfs.devices.virtio.queue import INDIRECT, NEXT, WRITE
from vmfs.memory.ram import Memory

SIZE = 4 << 20
Buffer = tuple[int, int, bool]  # address, length, whether the device writes it


class FakeMachine:
    """The interrupt lines of a machine, whose time stands still, and nothing else."""

    def __init__(self) -> None:
        self.lines: dict[int, bool] = {}
        self.messages: list[tuple[int, int]] = []

    def get_state(self, name: str) -> bytes:
        assert name == "clock"
        return bytes(48)

    def set_deadline(self, when: int | None) -> None:
        """It never comes."""

    def memory_written(self, address: int, size: int) -> None:
        pass

    def set_fast_bus(self, bus: object) -> bool:
        return False

    def irq_line(self, gsi: int, level: bool) -> None:
        self.lines[gsi] = level

    def signal_msi(self, address: int, data: int) -> None:
        self.messages.append((address, data))


class Bench:
    """A board with a PCI bus on RAM of `SIZE` bytes. Devices are plugged in by `plug`."""

    def __init__(self, machine: FakeMachine | None = None) -> None:
        self.machine = machine or FakeMachine()
        self.memory = Memory(SIZE)
        self.board = Board(self.machine, self.memory)  # type: ignore[arg-type]
        self.pci = HostBridge(self.board)
        self.board.add(self.pci)

    def plug(self, device: VirtioDevice) -> Driver:
        self.pci.plug(device)
        return Driver(self, device)

    def close(self) -> None:
        self.board.close()
        self.memory.close()


class Driver:
    """Drives one device. Addresses of RAM come from `take`, upwards, and are never given back."""

    def __init__(self, bench: Bench, device: VirtioDevice) -> None:
        self.bench = bench
        self.board = bench.board
        self.device = device
        self.next = 0x1000
        self.caps = self._find_capabilities()
        self.queues: dict[int, Ring] = {}
        self.config(4, 2, self.config(4, 2) | 6)  # memory, bus master

    # ---- registers

    def config(self, offset: int, size: int, value: int | None = None) -> int:
        """Configuration space, through ports CF8 and CFC."""
        self.bench.pci.write(0, 0, 4, 1 << 31 | self.device.slot << 11 | offset & 0xFC)
        if value is not None:
            self.bench.pci.write(1, offset & 3, size, value)
            return value
        return self.bench.pci.read(1, offset & 3, size)

    def _find_capabilities(self) -> dict[int, tuple[int, int, int, int]]:
        """Type -> BAR, offset, length, and where the capability is."""
        found = {}
        at = self.config(0x34, 1)
        while at:
            if self.config(at, 1) == 9:
                found[self.config(at + 3, 1)] = (
                    self.config(at + 4, 1), self.config(at + 8, 4), self.config(at + 12, 4), at,
                )  # fmt: skip
            at = self.config(at + 1, 1)
        return found

    def read(self, kind: int, offset: int, size: int) -> int:
        with self.board.lock:
            return self.device.read(0, self.caps[kind][1] + offset, size)

    def write(self, kind: int, offset: int, size: int, value: int) -> None:
        with self.board.lock:
            self.device.write(0, self.caps[kind][1] + offset, size, value)

    @property
    def status(self) -> int:
        return self.read(1, 20, 1)

    @property
    def needs_reset(self) -> bool:
        return bool(self.status & NEEDS_RESET)

    def offered(self) -> int:
        features = 0
        for half in (0, 1):
            self.write(1, 0, 4, half)
            features |= self.read(1, 4, 4) << 32 * half
        return features

    def isr(self) -> int:
        return self.read(3, 0, 1)

    # ---- starting

    def accept(self, features: int) -> bool:
        """Reset, and agree on features. False when the device does not."""
        self.write(1, 20, 1, 0)
        self.write(1, 20, 1, ACKNOWLEDGE | DRIVER)
        for half in (0, 1):
            self.write(1, 8, 4, half)
            self.write(1, 12, 4, features >> 32 * half & 0xFFFF_FFFF)
        self.write(1, 20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.status & FEATURES_OK)

    def start(self, features: int | None = None, size: int = 0) -> Driver:
        """Agree on all features (or some), set up every queue, and be ready."""
        assert self.accept(self.offered() if features is None else features | VERSION_1)
        for index in range(self.read(1, 18, 2)):
            self.queues[index] = Ring(self, index, size)
        self.write(1, 20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return self

    def take(self, length: int, alignment: int = 16) -> int:
        at = -(-self.next // alignment) * alignment
        self.next = at + length
        assert self.next <= SIZE
        return at

    def put(self, data: bytes) -> int:
        """Bytes in RAM; where."""
        at = self.take(len(data))
        self.bench.memory.write(at, data)
        return at

    def get(self, address: int, length: int) -> bytes:
        return self.bench.memory.read(address, length)

    def request(
        self, readable: list[bytes], writable: list[int], queue: int = 0, **how: Any
    ) -> tuple[list[bytes], int]:
        """One request, to its end: what the writable buffers have then, and the used length."""
        buffers: list[Buffer] = [(self.put(data), len(data), False) for data in readable]
        outputs = [(self.take(length), length) for length in writable]
        buffers += [(at, length, True) for at, length in outputs]
        ring = self.queues[queue]
        head = ring.add(buffers, **how)
        ring.notify()
        done = ring.used()
        assert [one for one, _ in done] == [head], f"the device has not answered: {self.device.failure}"
        return [self.get(at, length) for at, length in outputs], done[0][1]


class Ring:
    """A virtqueue as the driver sees it. Descriptors are taken in turn: never more than `size` at a time."""

    def __init__(self, driver: Driver, index: int, size: int = 0) -> None:
        self.driver = driver
        self.index = index
        driver.write(1, 22, 2, index)
        self.size = size or driver.read(1, 24, 2)
        driver.write(1, 24, 2, self.size)
        self.descriptors = driver.take(16 * self.size)
        self.avail = driver.take(6 + 2 * self.size, 2)
        self.used_area = driver.take(6 + 8 * self.size, 4)
        for offset, address in ((32, self.descriptors), (40, self.avail), (48, self.used_area)):
            driver.write(1, offset, 4, address & 0xFFFF_FFFF)
            driver.write(1, offset + 4, 4, address >> 32)
        driver.write(1, 28, 2, 1)
        self.next = 0
        self.made = 0
        self.told = 0  # what was made when the device was last notified, or needed not be
        self.seen = 0
        self.event: int | None = None  # the used index to be interrupted at (of EVENT_IDX), or None: the next one

    def poke(self, address: int, code: str, *values: int) -> None:
        self.driver.bench.memory.write(address, struct.pack(code, *values))

    def peek(self, address: int, code: str) -> tuple[int, ...]:
        return struct.unpack(code, self.driver.get(address, struct.calcsize(code)))

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.poke(self.descriptors + 16 * index, "<QIHH", address, length, flags, following)

    def add(self, buffers: list[Buffer], indirect: bool = False) -> int:
        """Make a request available; its head."""
        rows = []
        for at, (address, length, writable) in enumerate(buffers):
            flags = (WRITE if writable else 0) | (NEXT if at + 1 < len(buffers) else 0)
            rows.append((address, length, flags))
        if indirect:
            table = b"".join(struct.pack("<QIHH", *row, at + 1) for at, row in enumerate(rows))
            rows = [(self.driver.put(table), len(table), INDIRECT)]
        slots = [(self.next + at) % self.size for at in range(len(rows))]
        self.next = (self.next + len(rows)) % self.size
        for at, row in enumerate(rows):
            self.descriptor(slots[at], *row, slots[(at + 1) % len(slots)])
        self.offer(slots[0])
        return slots[0]

    def offer(self, head: int) -> None:
        self.poke(self.avail + 4 + 2 * (self.made % self.size), "<H", head)
        self.made = (self.made + 1) & 0xFFFF
        self.poke(self.avail + 2, "<H", self.made)

    def notify(self) -> None:
        self.told = self.made
        self.driver.write(2, 4 * self.index, 2, self.index)

    def notify_if_wanted(self) -> bool:
        """As a driver with EVENT_IDX does: when avail_event is among what was added since the last time."""
        (event,) = self.peek(self.used_area + 4 + 8 * self.size, "<H")
        wanted = (self.made - event - 1) & 0xFFFF < (self.made - self.told) & 0xFFFF
        self.told = self.made
        if wanted:
            self.notify()
        return wanted

    def used(self) -> list[tuple[int, int]]:
        """(head, length) of what was given back since the last call."""
        (index,) = self.peek(self.used_area + 2, "<H")
        found = []
        while self.seen != index:
            found.append(self.peek(self.used_area + 4 + 8 * (self.seen % self.size), "<II"))
            self.seen = (self.seen + 1) & 0xFFFF
        self.poke(self.avail + 4 + 2 * self.size, "<H", self.seen if self.event is None else self.event)
        return found  # type: ignore[return-value]


ALL_RING_FEATURES = INDIRECT_DESC | EVENT_IDX | VERSION_1
