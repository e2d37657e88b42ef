"""virtio-blk: a disk.

Source: VIRTIO 1.2, section 5.2.

Reads and writes are C's (chips/disk.c), and so is who does them: where the machine's time is the host's, small reads of
what the host has in memory are done when the driver notifies, and all else by WORKERS threads, while the guest goes on.
Where time follows the instructions, a request is done when its notification is: a disk takes no time, answers in order,
and a run is the same however fast the host is. What is seldom comes to `_one`, in either thread.

No worker takes the board's lock while a request is under way, since a thread that holds it may wait for that to end.

The guest may ask for a write cache (5.2.5.2): without FLUSH, or with writeback off, each write is on stable storage
before it is answered.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from typing import Annotated, Any

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U32, U64, Port, error_name
from vmfs.devices.virtio.disk import SECTOR, Disk
from vmfs.devices.virtio.pci import FIRST_DEVICE, VirtioDevice, VirtioState
from vmfs.devices.virtio.queue import Chain, DriverError, Span, Virtqueue, part
from vmfs.words.errors import Invalid

QUEUE_SIZE = 256
MOST_QUEUES = 8  # of F_MQ: one a CPU
WORKERS = 4  # threads of a disk, that is requests which wait for the host at the same time
SEG_MAX = QUEUE_SIZE - 2  # a descriptor for the header, one for the status
SIZE_MAX = 1 << 20
MAX_DATA = SEG_MAX * SIZE_MAX  # so the most bytes that a request can ask for

F_SIZE_MAX, F_SEG_MAX, F_GEOMETRY, F_RO, F_BLK_SIZE = 1 << 1, 1 << 2, 1 << 4, 1 << 5, 1 << 6
F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = (1 << bit for bit in (9, 10, 11, 12, 13, 14))

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2

_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_SEGMENT = struct.Struct("<QII")  # sector, sectors, flags
_UNMAP = 1
_MAX_SEGMENTS = 16
_MAX_RANGE = 1 << 22  # sectors of a discard: 2 GiB
_MAX_ZEROES = 1 << 17  # sectors of a write-zeroes, which may have to be written: 64 MiB
_ID_LENGTH = 20
# A BIOS makes up a geometry of 16 heads and 63 sectors a track; a disk without a cylinder of that has no sector for it.
_SMALLEST_CYLINDER = 16 * 63
_TRACK = 63  # sectors, the most that int 13h knows
_WRITEBACK = 32  # offset of the field in the configuration
_COUNTS = "read_requests", "read_bytes", "write_requests", "write_bytes", "interrupts"  # as take_counts has them


class BlockState(VirtioState):
    """`size`: of the disk, whose contents are the host's. `overlay`: which clusters of a cow disk have been written, a
    bit each, by their 512; their contents are in the overlay's file. `kicked`: the queues, a bit each, of which the
    driver has notified and not all requests are done."""

    kicked: U64
    writeback: bool
    size: int
    overlay: dict[U32, Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]]


class Block(VirtioDevice[BlockState]):
    """A disk of `disk.size` bytes. `path` is what `info` shows; `serial`: up to 20 bytes of ASCII; `block_size`: of a
    logical block."""

    TYPE = "virtio-blk"
    STATE = BlockState
    DEVICE = FIRST_DEVICE + 2
    CLASS = 0x010000
    QUEUES = (QUEUE_SIZE,) * MOST_QUEUES
    works = True
    HAS_DISK = True

    def __init__(
        self,
        board: Port,
        name: str,
        slot: int,
        disk: Disk,
        *,
        path: str = "",
        serial: str = "",
        block_size: int = SECTOR,
    ) -> None:
        if not serial.isascii() or len(serial) > _ID_LENGTH:
            raise Invalid(f"a disk's serial has up to {_ID_LENGTH} letters, not {serial[:40]!r}")
        if block_size not in (512, 1024, 2048, 4096) or disk.size % block_size:
            raise Invalid(f"a disk of {disk.size} bytes has no blocks of {block_size}")
        self.disk = disk
        self.path = path
        self.serial = serial or name
        self.block_size = block_size
        self.writeback = True
        self._is_held = True  # no run has begun
        self._is_closing = False
        self._alive = 0  # threads
        super().__init__(board, name, slot)
        self.requests = _chips.Disk(self.chip, board.ram_chip, tuple(self.queues), disk.files, disk.size, MAX_DATA)

    @property
    def boot_path(self) -> str:  # type: ignore[override]
        return f"/pci@i0cf8/scsi@{self.slot:x}/disk@0,0"

    @property
    def geometry(self) -> tuple[int, int, int]:
        """Cylinders, heads, sectors a track, for a disk that is smaller than a BIOS expects; else zeros. The last
        sectors, fewer than a track, may have no such address."""
        sectors = self.disk.size // SECTOR
        if sectors >= _SMALLEST_CYLINDER:
            return 0, 0, 0
        cylinders = -(-sectors // _TRACK)
        return cylinders, 1, sectors // cylinders

    def features(self) -> int:
        features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY
        if any(self.geometry):
            features |= F_GEOMETRY
        if self.board.cpu_count > 1:
            features |= F_MQ
        if not self.disk.writable:
            return features | F_RO
        features |= F_FLUSH | F_CONFIG_WCE | F_WRITE_ZEROES
        return features | F_DISCARD if self.disk.can_discard else features

    def device_config(self) -> bytes:
        return struct.pack(
            "<QIIHBBIBBHIBBHIIIIIB3x",
            self.disk.size // SECTOR,
            SIZE_MAX,
            SEG_MAX,
            *self.geometry,
            self.block_size,
            (4096 // self.block_size).bit_length() - 1, 0, 4096 // self.block_size, 0,  # topology: blocks of 4 KiB
            int(self.writeback),
            0,
            min(self.board.cpu_count, MOST_QUEUES),
            _MAX_RANGE, _MAX_SEGMENTS, 4096 // SECTOR,
            _MAX_ZEROES, _MAX_SEGMENTS, 1,
        )  # fmt: skip

    def write_device_config(self, offset: int, data: bytes) -> None:
        if offset == _WRITEBACK and len(data) == 1 and self.has(F_CONFIG_WCE):
            self.writeback = bool(data[0])
            self._choose()

    # ---- who does requests

    def _choose(self) -> None:
        self.requests.writes = self.disk.writes_plainly and not self._is_through()

    def live_changed(self) -> None:
        is_live = self.is_live
        self._choose()
        has_workers = self.board.has_workers
        if is_live and has_workers and not self._alive:
            self._start()
        self.requests.set_live(is_live, has_workers, not is_live)

    def machine_changed(self) -> None:
        self.live_changed()

    def stopped(self) -> None:
        self.writeback = True

    def run_begins(self) -> None:
        assert self.board.ram is not None  # it is mapped
        if not self.board.has_workers:
            for queue in self.queues:  # of a state of a machine that had workers
                if self.requests.kicked >> queue.index & 1:
                    with self.guarded():
                        self.notified(queue)
        elif self._is_held:
            self._is_held = False
            self.requests.release()

    def run_ends(self) -> None:
        if not self._is_held:
            self.requests.hold()
            self._is_held = True

    def _start(self) -> None:
        self._alive = WORKERS
        for number in range(WORKERS):
            threading.Thread(target=self._work, name=f"vmfs-{self.name}-{number}", daemon=True).start()

    def _work(self) -> None:
        try:
            while (job := self.requests.work()) is not None:
                try:
                    self._one(job, tells=True)
                except DriverError as error:
                    with self.board.lock:
                        self._fail(error)
                except Exception:
                    if not self._is_closing:  # else the host has let it wait until there is no RAM any more
                        raise
        finally:
            with self.board.lock:
                self._alive -= 1
                if self._is_closing and not self._alive:
                    self.disk.close()

    def notified(self, queue: Virtqueue) -> None:
        assert self.board.ram is not None  # it is mapped
        if self.board.has_workers:
            self.requests.kick(queue.index)
            return
        while (job := self.requests.serve(queue.index)) is not None:
            self._one(job, tells=False)

    # ---- requests that C does not do

    def _one(self, job: tuple[int, int | None, Any], *, tells: bool) -> None:
        index, head, spans = job
        if head is None:
            self.queues[index].peek()  # which says what is wrong
            self.requests.kick(index)  # or nothing is, any more
            return
        counts: Counter[str] = Counter()
        try:
            written = self._do(Chain(self.board, head, *spans), counts)
        except BaseException:
            self.requests.drop()
            raise
        self.requests.finish(index, head, written, tells)
        with self.board.lock:
            self.counters.update(counts)
            self.board.counters["host_errors"] += sum(n for name, n in counts.items() if name.startswith("host_errors"))

    def count(self) -> None:
        for name, number in zip(_COUNTS, self.requests.take_counts(), strict=True):
            if number:
                self._counters[name] += number
        if notifications := self.chip.take():
            self._counters["notifications"] += notifications

    def _do(self, chain: Chain, counts: Counter[str]) -> int:
        header = chain.read(0, _HEADER.size)
        room = chain.writable_length
        if len(header) < _HEADER.size or not room:
            raise DriverError("a request without a header or without room for its status")
        kind, _, sector = _HEADER.unpack(header)
        try:
            status, written = self._request(kind, sector, chain, room - 1, counts)
        except OSError as error:
            status, written = IOERR, 0
            counts[f"host_errors.{error_name(error)}"] += 1
        if status == IOERR:
            counts["errors.io"] += 1
        chain.write(bytes((status,)), room - 1)
        # 2.7.8.2: only what was written from the first byte on counts; the status is the last.
        return room if written == room - 1 else written

    def _request(
        self, kind: int, sector: int, chain: Chain, room: int, counts: Counter[str]
    ) -> tuple[int, int]:
        """Status, and how many bytes were written from the first on. `room` is without the status."""
        if kind == IN:
            if not self._is_inside(sector, room):
                return IOERR, 0
            spans = part(chain.writable, 0, room)
            try:
                self.disk.read(sector * SECTOR, self._views(spans))
            finally:  # a read that fails may have written some of it
                self.board.wrote_all(spans)
            _count(counts, "read", room)
            return OK, room
        if kind == OUT:
            length = chain.readable_length - _HEADER.size
            if not self.disk.writable or not self._is_inside(sector, length):
                return IOERR, 0
            views = self._views(part(chain.readable, _HEADER.size, length))
            self.disk.write(sector * SECTOR, views, through=self._is_through())
            _count(counts, "write", length)
            return OK, 0
        if kind == FLUSH:
            self.disk.flush()
            counts["flushes"] += 1
            return OK, 0
        if kind == GET_ID:
            return OK, chain.write(self.serial.encode().ljust(_ID_LENGTH, b"\0")[:room])
        if kind in (DISCARD, WRITE_ZEROES):
            return self._ranges(kind, chain.read(_HEADER.size, _SEGMENT.size * _MAX_SEGMENTS + 1), counts), 0
        return UNSUPP, 0

    def _ranges(self, kind: int, data: bytes, counts: Counter[str]) -> int:
        if not self.disk.writable:
            return IOERR
        if not self.has(F_DISCARD if kind == DISCARD else F_WRITE_ZEROES):
            return UNSUPP
        if len(data) % _SEGMENT.size or not 0 < len(data) <= _SEGMENT.size * _MAX_SEGMENTS:
            return IOERR
        ranges = list(_SEGMENT.iter_unpack(data))
        allowed_flags = 0 if kind == DISCARD else _UNMAP
        longest = _MAX_RANGE if kind == DISCARD else _MAX_ZEROES
        if any(flags & ~allowed_flags for _, _, flags in ranges):
            return UNSUPP  # 5.2.6.2
        if any(count > longest or (sector + count) * SECTOR > self.disk.size for sector, count, _ in ranges):
            return IOERR
        for sector, count, flags in ranges:
            if not count:
                continue
            if kind == DISCARD:
                self.disk.discard(sector * SECTOR, count * SECTOR)
                _count(counts, "discard", count * SECTOR)
            else:
                self.disk.write_zeroes(sector * SECTOR, count * SECTOR, unmap=bool(flags & _UNMAP))
                _count(counts, "zero", count * SECTOR)
        if self._is_through():
            self.disk.flush()
        return OK

    def _is_inside(self, sector: int, length: int) -> bool:
        return length % SECTOR == 0 and length <= MAX_DATA and sector * SECTOR + length <= self.disk.size

    def _is_through(self) -> bool:
        return not self.has(F_FLUSH) or not self.writeback

    def _views(self, spans: list[Span]) -> list[memoryview]:
        ram = self.board.ram
        return [ram[address : address + length] for address, length in spans]

    # ---- life

    def save_own(self) -> dict[str, Any]:
        return {
            "writeback": self.writeback,
            "size": self.disk.size,
            "overlay": self.disk.save_map(),
            "kicked": self.requests.kicked,
        }

    def check_own(self, state: BlockState) -> None:
        if state.size != self.disk.size:
            raise Invalid(f"{self.name}: the disk has {self.disk.size} bytes, and had {state.size}")
        self.disk.check_map(state.overlay)
        if state.kicked >> len(self.queues):
            raise Invalid(f"{self.name}: it has {len(self.queues)} queues")

    def load_own(self, state: BlockState) -> None:
        self.writeback = state.writeback
        self.disk.load_map(state.overlay)

    def load(self, state: BlockState) -> None:
        super().load(state)
        self.requests.kicked = state.kicked

    def sleep(self) -> None:
        self.requests.hold()

    def wake(self) -> None:
        self.requests.release()

    def describe(self) -> dict[str, str]:
        return {
            **super().describe(),
            "path": self.path,
            "mode": self.disk.mode,
            "size": str(self.disk.size),
            "block_size": str(self.block_size),
            "serial": self.serial,
            "discard": "yes" if self.disk.can_discard else "no",
        }

    def close(self) -> bool:
        """Whether nothing is under way any more. Else a worker waits for the host, and the last one closes the disk."""
        is_idle: bool = self.requests.close()
        self._is_closing = True
        if is_idle:
            self.disk.close()
        return is_idle


def _count(counts: Counter[str], what: str, length: int) -> None:
    counts[f"{what}_requests"] += 1
    counts[f"{what}_bytes"] += length
