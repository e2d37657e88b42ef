"""Disks, and the block device, by a driver in Python."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pc.virtio_driver import Bench, Driver

from vmfs.devices import _chips
from vmfs.devices.virtio import disk as disks
from vmfs.devices.virtio.block import (
    DISCARD,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_GEOMETRY,
    F_RO,
    F_WRITE_ZEROES,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    WRITE_ZEROES,
    Block,
)
from vmfs.devices.virtio.disk import Disk, Overlay, RawDisk, open_disk
from vmfs.words.errors import Busy, Invalid

SECTORS = 4096  # 2 MiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(struct.pack("<Q", at) * 64 for at in range(SECTORS)))
    return path


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def opened(path: Path, mode: str = "rw") -> Disk:
    return open_disk(os.open(path, os.O_RDWR if mode == "rw" else os.O_RDONLY), mode)


def attach(bench: Bench, disk: Disk, features: int | None = None) -> Driver:
    return bench.plug(Block(bench.board, "blk0", 4, disk, serial="SERIAL-1")).start(features)


def ask(driver: Driver, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
    """A request's status, and what was read."""
    driver.next = max(driver.next, 0x8000) if driver.next < 0x30_0000 else 0x8000
    header = struct.pack("<IIQ", kind, 0, sector)
    readable = [header, data] if data else [header]
    out, _ = driver.request(readable, [room, 1] if room else [1])
    return out[-1][0], out[0] if room else b""


def test_sectors_are_read_and_written(bench: Bench, image: Path) -> None:
    driver = attach(bench, opened(image))
    assert driver.read(4, 0, 4) == SECTORS and driver.read(4, 20, 4) == 512
    assert ask(driver, IN, 5, room=1024) == (OK, struct.pack("<Q", 5) * 64 + struct.pack("<Q", 6) * 64)
    assert ask(driver, OUT, SECTORS - 1, data=b"z" * 512) == (OK, b"")
    assert image.read_bytes()[-1024:] == struct.pack("<Q", SECTORS - 2) * 64 + b"z" * 512
    assert ask(driver, GET_ID, room=20) == (OK, b"SERIAL-1".ljust(20, b"\0"))
    assert driver.device.counters["read_bytes"] == 1024 and driver.device.counters["write_requests"] == 1


def test_no_framing_is_assumed(bench: Bench, image: Path) -> None:
    """The header, the data and the status may be parted anywhere (2.7.4)."""
    driver = attach(bench, opened(image))
    header = struct.pack("<IIQ", OUT, 0, 1)
    out, _ = driver.request([header[:3], header[3:] + b"a" * 100, b"b" * 400, b"c" * 12], [1])
    assert out == [b"\0"]
    assert image.read_bytes()[512:1024] == b"a" * 100 + b"b" * 400 + b"c" * 12
    header = struct.pack("<IIQ", IN, 0, 1)
    out, length = driver.request([header[:15], header[15:]], [1, 500, 12])  # the last byte is the status
    assert b"".join(out) == b"a" * 100 + b"b" * 400 + b"c" * 12 + b"\0" and length == 513


@pytest.mark.parametrize(
    ("kind", "sector", "length"),
    [(IN, SECTORS, 512), (IN, SECTORS - 1, 1024), (OUT, SECTORS, 512), (OUT, 2**55, 512), (IN, 2**64 - 1, 512),
     (IN, 0, 511), (OUT, 0, 513)],
)  # fmt: skip
def test_past_the_end_and_parts_of_sectors_are_errors(
    bench: Bench, image: Path, kind: int, sector: int, length: int
) -> None:
    before = image.read_bytes()
    driver = attach(bench, opened(image))
    data = {"data": b"x" * length} if kind == OUT else {"room": length}
    assert ask(driver, kind, sector, **data)[0] == IOERR  # type: ignore[arg-type]
    assert image.read_bytes() == before and not driver.needs_reset


def test_unknown_requests_are_unsupported(bench: Bench, image: Path) -> None:
    driver = attach(bench, opened(image))
    for kind in (2, 10, 14, 16, 0xFFFF_FFFF):
        assert ask(driver, kind)[0] == UNSUPP


def test_requests_without_header_or_status_are_the_drivers_error(bench: Bench, image: Path) -> None:
    for readable, writable in (([b"short"], [1]), ([bytes(16)], [])):
        other = Bench()
        driver = attach(other, opened(image))
        ring = driver.queues[0]
        ring.add([(driver.put(one), len(one), False) for one in readable] + [(0x3000, 1, True)] * len(writable))
        ring.notify()
        assert driver.needs_reset
        other.close()


def test_read_only(bench: Bench, image: Path) -> None:
    before = image.read_bytes()
    driver = attach(bench, opened(image, "ro"))
    assert driver.offered() & (F_RO | F_FLUSH | F_DISCARD | F_WRITE_ZEROES) == F_RO
    assert ask(driver, OUT, 0, data=b"x" * 512)[0] == IOERR
    assert ask(driver, DISCARD, data=struct.pack("<QII", 0, 8, 0))[0] == IOERR
    assert ask(driver, IN, 1, room=512)[0] == OK
    assert image.read_bytes() == before


def test_copy_on_write_leaves_the_file_alone(bench: Bench, image: Path) -> None:
    before = image.read_bytes()
    driver = attach(bench, opened(image, "cow"))
    assert not driver.offered() & F_RO
    assert ask(driver, OUT, 9, data=b"new!" * 128)[0] == OK
    assert ask(driver, FLUSH)[0] == OK
    wanted = before[8 * 512 : 9 * 512] + b"new!" * 128 + before[10 * 512 : 11 * 512]
    assert ask(driver, IN, 8, room=1536) == (OK, wanted)
    assert image.read_bytes() == before


def test_discard_and_write_zeroes_free_the_file(bench: Bench, image: Path) -> None:
    disk = opened(image)
    if not disk.can_discard:
        pytest.skip("this file system punches no holes")
    driver = attach(bench, disk)
    before, blocks = image.read_bytes(), image.stat().st_blocks
    ranges = struct.pack("<QIIQII", 8, 1024, 0, 2048, 8, 0)
    assert ask(driver, DISCARD, data=ranges)[0] == OK
    assert image.stat().st_blocks <= blocks - 1024
    wanted = bytearray(before)
    wanted[8 * 512 : 1032 * 512] = bytes(1024 * 512)
    wanted[2048 * 512 : 2056 * 512] = bytes(8 * 512)
    assert image.read_bytes() == wanted
    for unmap in (0, 1):
        assert ask(driver, WRITE_ZEROES, data=struct.pack("<QII", 3000 + unmap * 8, 3, unmap))[0] == OK
        wanted[(3000 + unmap * 8) * 512 : (3003 + unmap * 8) * 512] = bytes(1536)
    assert image.read_bytes() == wanted and len(wanted) == SECTORS * 512


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        (DISCARD, struct.pack("<QII", SECTORS, 1, 0), IOERR),
        (DISCARD, struct.pack("<QII", 2**64 - 1, 1, 0), IOERR),
        (DISCARD, struct.pack("<QII", 0, 0xFFFF_FFFF, 0), IOERR),
        (DISCARD, struct.pack("<QII", 0, 1, 1), UNSUPP),  # unmap is not for it
        (WRITE_ZEROES, struct.pack("<QII", 0, 1, 2), UNSUPP),
        (WRITE_ZEROES, struct.pack("<QII", 0, 1, 0)[:-1], IOERR),
        (WRITE_ZEROES, struct.pack("<QII", 0, 1, 0) * 17, IOERR),
        (WRITE_ZEROES, b"", IOERR),
    ],
)
def test_ranges_that_cannot_be(bench: Bench, image: Path, kind: int, data: bytes, status: int) -> None:
    before = image.read_bytes()
    assert ask(attach(bench, opened(image)), kind, data=data)[0] == status
    assert image.read_bytes() == before


class Watched(RawDisk):
    """A disk that says what it was asked, and can fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDWR), "rw", path.stat().st_size)
        self.writes_plainly = False  # else C writes, which no call says
        self.calls: list[str] = []
        self.fails: dict[str, int] = {}

    def _do(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise OSError(self.fails[name], "as asked")

    def write(self, offset: int, buffers: disks.Buffers, *, through: bool = False) -> None:
        self._do("write-through" if through else "write")
        super().write(offset, buffers, through=through)

    def flush(self) -> None:
        self._do("flush")
        super().flush()


def test_what_a_driver_is_told_is_flushed_is(bench: Bench, image: Path) -> None:
    disk = Watched(image)
    driver = attach(bench, disk)
    ask(driver, OUT, 0, data=b"1" * 512)
    ask(driver, FLUSH)
    driver.write(4, 32, 1, 0)  # write-through, by the driver's wish
    ask(driver, OUT, 0, data=b"2" * 512)
    driver.write(4, 32, 1, 1)
    ask(driver, OUT, 0, data=b"3" * 512)
    assert disk.calls == ["write", "flush", "write-through", "write"]
    disk.calls.clear()
    driver.write(1, 20, 1, 0)
    driver.start(driver.offered() & ~(F_FLUSH | F_CONFIG_WCE))  # a driver that cannot flush
    ask(driver, OUT, 0, data=b"4" * 512)
    assert disk.calls == ["write-through"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_hosts_error_is_an_io_error_and_is_counted(bench: Bench, image: Path, number: int) -> None:
    disk = Watched(image)
    driver = attach(bench, disk)
    disk.fails = {"write": number}
    assert ask(driver, OUT, 0, data=b"x" * 512)[0] == IOERR
    assert driver.device.counters[f"host_errors.{errno.errorcode[number]}"] == 1
    assert bench.board.counters["host_errors"] == 1  # which is in `stat`
    disk.fails = {}
    assert ask(driver, OUT, 0, data=b"x" * 512)[0] == OK
    assert not driver.needs_reset


def test_after_a_flush_that_failed_every_flush_fails(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = opened(image)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fdatasync", fail)
    for _ in range(2):
        with pytest.raises(OSError):
            disk.flush()
        monkeypatch.undo()
    disk.close()


def test_a_full_device_is_an_error_and_a_real_one(bench: Bench) -> None:
    """/dev/full gives ENOSPC as a full file system does."""
    disk = RawDisk.__new__(RawDisk)
    fd = os.open("/dev/full", os.O_RDWR)
    disk.__dict__.update(fd=fd, mode="rw", size=1 << 20, can_discard=False, _can_zero=False, _failure=0,
                         files=_chips.Files(fd, 1 << 20), writes_plainly=True, at_close=lambda: None)  # fmt: skip
    driver = attach(bench, disk)
    assert ask(driver, OUT, 0, data=b"x" * 512)[0] == IOERR
    assert driver.device.counters["host_errors.ENOSPC"] == 1
    assert ask(driver, WRITE_ZEROES, data=struct.pack("<QII", 0, 8, 0))[0] == IOERR


def test_a_file_that_was_cut_is_an_io_error(bench: Bench, image: Path) -> None:
    driver = attach(bench, opened(image, "ro"))
    os.truncate(image, 1024)
    assert ask(driver, IN, 1, room=1024)[0] == IOERR
    assert ask(driver, IN, 1, room=512)[0] == OK
    assert driver.device.counters["host_errors.EIO"] == 1


@pytest.mark.parametrize("mode", ["ro", "cow"])
@pytest.mark.parametrize("length", [1, 511, 513, 4096 + 100])
def test_a_last_sector_that_is_cut_has_zeros_at_its_end(bench: Bench, tmp_path: Path, mode: str, length: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * length)
    sectors = -(-length // 512)
    driver = attach(bench, opened(path, mode))
    wanted = (b"x" * length).ljust(sectors * 512, b"\0")
    assert driver.read(4, 0, 4) == sectors
    assert ask(driver, IN, 0, room=sectors * 512) == (OK, wanted)
    assert ask(driver, IN, sectors - 1, room=512) == (OK, wanted[-512:])
    assert ask(driver, IN, sectors, room=512)[0] == IOERR
    if mode == "cow":
        assert ask(driver, OUT, 0, data=b"new!" * 128) == (OK, b"")
        assert ask(driver, IN, 0, room=sectors * 512) == (OK, b"new!" * 128 + wanted[512:])
    os.truncate(path, 0)
    if mode == "ro":  # what was there and no longer is, is no padding
        assert ask(driver, IN, 0, room=512)[0] == IOERR


@pytest.mark.parametrize(
    "sectors, geometry", [(1, (1, 1, 1)), (26, (1, 1, 26)), (64, (2, 1, 32)), (1007, (16, 1, 62)), (1008, None)]
)
def test_a_small_disk_has_a_geometry(bench: Bench, tmp_path: Path, sectors: int, geometry) -> None:
    """A BIOS would take 16 heads of 63 sectors, and find less than a cylinder of it."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(sectors * 512))
    driver = attach(bench, opened(path))
    assert bool(driver.device.features() & F_GEOMETRY) == (geometry is not None)
    assert (driver.read(4, 16, 2), driver.read(4, 18, 1), driver.read(4, 19, 1)) == (geometry or (0, 0, 0))


def test_what_is_no_disk_is_refused(tmp_path: Path, image: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(b"x" * 513)
    empty = tmp_path / "empty"
    empty.touch()
    before = os.listdir("/proc/self/fd")
    for path, mode in ((odd, "rw"), (empty, "ro"), (tmp_path, "ro"), (Path("/dev/null"), "ro"), (image, "sideways")):
        with pytest.raises(Invalid):
            opened(path, mode)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_disk_that_is_written_is_for_one_machine(image: Path) -> None:
    one = opened(image)
    for mode in ("ro", "rw", "cow"):
        with pytest.raises(Busy):
            opened(image, mode)
    one.close()
    readers = [opened(image, "ro"), opened(image, "cow")]
    with pytest.raises(Busy):
        opened(image)
    for reader in readers:
        reader.close()
    opened(image).close()


def test_bad_parameters(bench: Bench, image: Path) -> None:
    disk = opened(image)
    for wrong in ({"serial": "x" * 21}, {"serial": "ü"}, {"block_size": 513}, {"block_size": 8192}):
        with pytest.raises(Invalid):
            Block(bench.board, "blk", 3, disk, **wrong)  # type: ignore[arg-type]
    disk.close()


# ---- any sequence of requests, against a bytearray

OPERATION = st.tuples(
    st.sampled_from(["read", "write", "discard", "zero", "unmap"]),
    st.integers(0, 100),
    st.integers(1, 40),
    st.integers(1, 255),
)


@settings(max_examples=60, deadline=None)
@given(operations=st.lists(OPERATION, max_size=20), mode=st.sampled_from(["rw", "cow"]))
def test_any_sequence_leaves_what_a_model_has(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int, int, int]], mode: str
) -> None:
    path = tmp_path_factory.mktemp("disk") / "image"
    content = bytes(range(1, 252)) * 300
    content = content[: 140 * 512]
    path.write_bytes(content)
    model = bytearray(content)
    disk = opened(path, mode)
    for what, sector, count, value in operations:
        start, length = sector * 512, count * 512
        if what == "read":
            cut = min(length - 1, value * 7)
            parts = [bytearray(cut), bytearray(length - cut)]
            disk.read(start, [memoryview(part) for part in parts])
            assert b"".join(parts) == model[start : start + length]
        elif what == "write":
            data = bytes((value,)) * length
            disk.write(start, [memoryview(data)[:77], memoryview(data)[77:]], through=bool(value & 1))
            model[start : start + length] = data
        elif what == "discard":
            disk.discard(start, length)
            model[start : start + length] = bytes(length)
        else:
            disk.write_zeroes(start, length, unmap=what == "unmap")
            model[start : start + length] = bytes(length)
    whole = bytearray(len(model))
    disk.read(0, [memoryview(whole)])
    assert whole == model
    disk.close()
    assert path.read_bytes() == (model if mode == "rw" else content)


def test_an_overlay_of_a_large_disk_is_small(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(8 << 40)
    disk = opened(path, "cow")
    assert isinstance(disk, Overlay)
    end = (8 << 40) - 512
    disk.write(end, [memoryview(b"e" * 512)])
    disk.discard(1 << 40, 2 << 30)
    data = bytearray(1024)
    disk.read(end - 512, [memoryview(data)])
    assert data == bytes(512) + b"e" * 512
    assert os.fstat(disk.fd).st_blocks < 64
    disk.close()


def test_transfers_are_done_in_parts(image: Path) -> None:
    """However the kernel parts them: more vectors than it takes, and short transfers."""
    sizes = [1, 3, 512, 0, 7] * 500
    buffers = [memoryview(bytearray(size)) for size in sizes]

    def short(call: Callable[..., int]) -> Callable[..., int]:
        return lambda fd, views, offset: call(fd, _first_bytes(views, 1000), offset)

    fd = os.open(image, os.O_RDONLY)
    disks._transfer(short(os.preadv), fd, buffers, 100)
    os.close(fd)
    assert b"".join(buffers) == image.read_bytes()[100 : 100 + sum(sizes)]


def _first_bytes(views: list[memoryview], count: int) -> list[memoryview]:
    taken = []
    for view in views:
        taken.append(view[:count])
        count -= len(taken[-1])
        if not count:
            break
    return taken


@settings(max_examples=120, deadline=None)
@given(
    kind=st.one_of(st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES]), st.integers(0, 2**32 - 1)),
    sector=st.one_of(st.integers(0, 140), st.integers(0, 2**64 - 1)),
    data=st.one_of(
        st.binary(max_size=64),
        st.tuples(st.integers(0, 150), st.integers(0, 150), st.integers(0, 3)).map(lambda t: struct.pack("<QII", *t)),
        st.integers(1, 4).map(lambda count: b"d" * 512 * count),
    ),
    cut=st.integers(0, 80),
    rooms=st.lists(st.integers(1, 1500), max_size=3),
    mode=st.sampled_from(["ro", "rw", "cow"]),
)
def test_hostile_requests(
    tmp_path_factory: pytest.TempPathFactory,
    kind: int, sector: int, data: bytes, cut: int, rooms: list[int], mode: str,
) -> None:  # fmt: skip
    """Whatever is asked for: an answer or the device's error, and the disk keeps its size and its bounds."""
    path = tmp_path_factory.mktemp("disk") / "image"
    path.write_bytes(b"o" * 140 * 512)
    bench = Bench()
    driver = attach(bench, opened(path, mode))
    request = struct.pack("<IIQ", kind, 0, sector) + data
    parts = [part for part in (request[:cut], request[cut:]) if part]
    ring = driver.queues[0]
    outputs = [(driver.take(room), room, True) for room in rooms]
    ring.add([*((driver.put(part), len(part), False) for part in parts), *outputs])
    ring.notify()
    if driver.needs_reset:
        assert not rooms
    else:
        ((_, length),) = ring.used()
        assert length <= sum(rooms)
        status = driver.get(outputs[-1][0] + rooms[-1] - 1, 1)[0]
        assert status in (OK, IOERR, UNSUPP)
        if mode == "ro" and kind in (OUT, DISCARD, WRITE_ZEROES):
            assert status != OK
    bench.close()
    assert path.stat().st_size == 140 * 512
    if mode != "rw":
        assert path.read_bytes() == b"o" * 140 * 512
