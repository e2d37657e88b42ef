"""Disks: what a block device reads and writes. A raw file, or a copy-on-write overlay over one.

Offsets and lengths are bytes, multiples of SECTOR, inside the disk: the caller has checked that. The memory that is
read into and written from is given as memoryviews (of the guest's RAM: nothing is copied). A host's failure is an
OSError. Several threads may call at once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from errno import EIO
from typing import Any, Protocol

from vmfs.devices import _chips
from vmfs.memory.hostfile import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, can_punch, fallocate
from vmfs.memory.layers import extents, joined
from vmfs.words.errors import Busy, HostError, Invalid, VmfsError

log = logging.getLogger(__name__)

SECTOR = 512
CLUSTER = 4096  # the granularity of an overlay: of most guests' file systems, so that little is copied
ROOM_STEP = 4 << 20  # bytes that an overlay asks for at a time
_CHUNK = 512  # clusters in a part of an overlay's saved map: 2 MiB
AT_ONCE = 1 << 20  # bytes that are read at once where the host has them in memory: sooner than a thread wakes up
_MAX_VECTORS = 1024  # IOV_MAX
_ZEROS = bytes(1 << 20)

Buffers = Sequence[memoryview]


class Disk(Protocol):
    """What a block device needs of a disk. `files`: what C reads of it. `writes_plainly`: to write is pwritev(2) into
    the file of its `files`, which is the only one."""

    mode: str  # "ro", "rw" or "cow"
    size: int
    writes_plainly: bool
    files: Any


    @property
    def writable(self) -> bool: ...

    @property
    def can_discard(self) -> bool: ...

    def read(self, offset: int, buffers: Buffers) -> None: ...

    def read_at_once(self, offset: int, buffers: Buffers) -> bool:
        """Read what is little and in the host's memory. False where it would take longer: `read` does that."""
        ...

    def write(self, offset: int, buffers: Buffers, *, through: bool = False) -> None:
        """`through`: it is on stable storage when this returns."""
        ...

    def flush(self) -> None:
        """What was written is on stable storage when this returns."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """The contents are of no use any more; they read as zeros."""
        ...

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None: ...

    def extents(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of what may be other than zeros."""
        ...

    def save_map(self) -> dict[int, bytes]:
        """Of an overlay: which clusters it has, a bit each, by their chunk of 512; else nothing."""
        ...

    def check_map(self, chunks: Mapping[int, bytes]) -> None:
        """Invalid for what `load_map` cannot take."""
        ...

    def load_map(self, chunks: Mapping[int, bytes]) -> None:
        """Have the overlay's file be one with these clusters, which the caller has put into it."""
        ...

    def close(self) -> None: ...


class Room(Protocol):
    """Where an overlay asks for what it takes of the host."""

    def reserve(self, size: int) -> None:
        """VmfsError where there is no more."""
        ...

    def release(self, size: int) -> None: ...


class _NoLimit:
    def reserve(self, size: int) -> None:
        pass

    def release(self, size: int) -> None:
        pass


def open_disk(
    fd: int, mode: str, unnamed_file: Callable[[], int] | None = None, room: Room | None = None
) -> Disk:
    """The disk of an open file or block device, which is closed with it, or now if this fails.

    `mode`: "ro" and "cow" need a descriptor that can be read, "rw" one that can be written, too. Invalid for what is
    no disk; Busy while another machine writes to it (or, for "rw", uses it at all). `unnamed_file` opens the file of an
    overlay, where it is not this process that does, and what that takes is asked of `room`.
    """
    try:
        size = _size_of(fd, mode)
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if mode == "rw" else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("another machine, or somebody else, has the disk open (flock)") from None
        if mode == "cow":
            return Overlay(RawDisk(fd, "ro", size), unnamed_file or _unnamed_file, room or _NoLimit())
        if mode not in ("ro", "rw"):
            raise Invalid(f"a disk is ro, rw or cow, not {mode[:20]!r}")
        return RawDisk(fd, mode, size)
    except OSError as failure:  # of the file system that it is on
        os.close(fd)
        raise HostError(failure.errno or EIO, f"the disk's file: {failure.strerror}") from None
    except BaseException:
        os.close(fd)
        raise


def _unnamed_file() -> int:
    return os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _size_of(fd: int, mode: str) -> int:
    kind = os.fstat(fd).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
        raise Invalid("a disk is a regular file or a block device")
    size = os.lseek(fd, 0, os.SEEK_END)
    if not size:
        raise Invalid("the disk's file is empty")
    if mode == "rw" and size % SECTOR:
        raise Invalid(
            f"a disk that is written to has a multiple of 512 bytes, not {size}: "
            "`truncate -s %512 FILE` makes it one, or attach it with ro or cow"
        )
    return size


class RawDisk:
    """A file or block device of `length` bytes as it is; its last sector, where that is cut, is read with zeros."""

    def __init__(self, fd: int, mode: str, length: int) -> None:
        self.fd = fd
        self.mode = mode
        self.size = -(-length // SECTOR) * SECTOR
        self.length = length
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self.can_discard = mode == "rw" and is_file and can_punch(fd)
        self._can_zero = is_file
        self._failure = 0  # the errno of a flush that failed
        self.writes_plainly = mode == "rw"
        self.files = _chips.Files(fd, length)
        self.at_close: Callable[[], None] = lambda: None

    @property
    def writable(self) -> bool:
        return self.mode == "rw"

    def read(self, offset: int, buffers: Buffers) -> None:
        length = sum(map(len, buffers))
        there = min(length, max(self.length - offset, 0))
        if there < length:
            for view in _cut(buffers, there, length - there):
                view[:] = bytes(len(view))
            buffers = _cut(buffers, 0, there)
        _transfer(os.preadv, self.fd, buffers, offset)

    def read_at_once(self, offset: int, buffers: Buffers) -> bool:
        length = sum(map(len, buffers))
        return length <= AT_ONCE and offset + length <= self.length and _read_now(self.fd, buffers, offset, length)

    def write(self, offset: int, buffers: Buffers, *, through: bool = False) -> None:
        if through:
            self._check_flushes()
            try:
                _transfer(_write_through, self.fd, buffers, offset)
            except OSError as error:
                self._failure = error.errno or EIO
                raise
        else:
            _transfer(os.pwritev, self.fd, buffers, offset)

    def flush(self) -> None:
        """fdatasync(2). Once it has failed every later one fails, too: the kernel reports a lost page once, and to
        say afterwards that all is on the disk would be a lie."""
        self._check_flushes()
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._failure = error.errno or EIO
            raise

    def _check_flushes(self) -> None:
        if self._failure:
            raise OSError(self._failure, "an earlier flush has failed")

    def discard(self, offset: int, length: int) -> None:
        fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        if unmap and self.can_discard:
            fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
            return
        if self._can_zero:
            try:
                fallocate(self.fd, ZERO_RANGE | KEEP_SIZE, offset, length)
                return
            except OSError:
                self._can_zero = False  # not on this file system
        while length:
            size = min(length, len(_ZEROS))
            self.write(offset, [memoryview(_ZEROS)[:size]])
            offset, length = offset + size, length - size

    def extents(self) -> Iterator[tuple[int, int]]:
        try:
            yield from extents(self.fd, 0, self.length)
        except OSError:  # of a block device, or on a file system that tells nobody
            yield 0, self.length

    def save_map(self) -> dict[int, bytes]:
        return {}

    def check_map(self, chunks: Mapping[int, bytes]) -> None:
        if chunks:
            raise Invalid(f"a disk that is {self.mode} has no overlay")

    def load_map(self, chunks: Mapping[int, bytes]) -> None:
        pass

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.at_close()
            try:
                os.close(fd)
            except OSError as error:  # what was written and not flushed is lost, as the guest has to expect
                log.warning("a disk's file: %s", error.strerror)


def _write_through(fd: int, buffers: Buffers, offset: int) -> int:
    return os.pwritev(fd, buffers, offset, os.RWF_DSYNC)


def _transfer(call: Callable[[int, Buffers, int], int], fd: int, buffers: Buffers, offset: int) -> None:
    """All of it, however the kernel parts it. A file that ends too early, since somebody cut it, is an OSError."""
    left = list(buffers)
    while left:
        done = call(fd, left[:_MAX_VECTORS], offset)
        if done <= 0:
            raise OSError(EIO, "the file ends before the disk does")
        offset += done
        at = 0
        while at < len(left) and done >= len(left[at]):
            done -= len(left[at])
            at += 1
        del left[:at]
        if done:
            left[0] = left[0][done:]


def _read_now(fd: int, buffers: Buffers, offset: int, length: int) -> bool:
    """Whether it was all in the host's memory."""
    try:
        return len(buffers) <= _MAX_VECTORS and os.preadv(fd, buffers, offset, os.RWF_NOWAIT) == length
    except OSError:  # EAGAIN, or the file system does not know that
        return False


class Written:
    """A file of an overlay that no disk writes any more, and its map. Snapshots and overlays share it; with the last of
    them it is closed, and its `held` bytes are free."""

    def __init__(self, fd: int, clusters: Any, room: Room, held: int) -> None:
        self.fd = fd
        self.clusters = clusters
        self._room, self._held = room, held

    @property
    def taken(self) -> int:
        """Bytes of the host's disk."""
        return os.fstat(self.fd).st_blocks * SECTOR

    @property
    def is_memory(self) -> bool:
        """It is a memfd, of a history, and no file of a user's folder."""
        return os.readlink(f"/proc/self/fd/{self.fd}").startswith("/memfd:")

    def absorb(self, below: Written, size: int) -> None:
        """Have what it has not of `below`, the next one below it, too."""
        for has, start, length in _runs(below.clusters, 0, size):
            for is_here, at, count in _runs(self.clusters, start, length) if has else ():
                end = at + count
                while not is_here and at < end:
                    at += os.pwrite(self.fd, os.pread(below.fd, min(end - at, len(_ZEROS)), at), at)
        self.clusters.add(below.clusters)
        self._held += below._held
        below._held = 0

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)
        self._room.release(self._held)


class Frozen:
    """What an overlay of a disk of `size` bytes had: files, the newest last. Read, it has zeros for what is the base's.
    """

    def __init__(self, files: tuple[Written, ...], size: int) -> None:
        self.files = files
        self.size = size

    def extents(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of the clusters that were written."""
        return _extents((one.clusters for one in self.files), self.size)

    def read_at(self, offset: int, length: int) -> bytes:
        length = max(min(length, self.size - offset), 0)
        data = bytearray(length)
        view = memoryview(data)
        for fd, start, size in _parts(tuple((one.fd, one.clusters) for one in self.files), offset, length):
            if fd >= 0:
                _transfer(os.preadv, fd, [view[start - offset : start - offset + size]], start)
        return bytes(data)


def merge(stacks: Sequence[Frozen], disk: Overlay) -> None:
    """Have a frozen file that is in no stack without the next one over it be one with that, in all of these and in
    `disk`. The machine stands still."""
    lists = [*(one.files for one in stacks), disk.lower]
    above: dict[Written, set[Written | None]] = {}
    for files in lists:
        for at, one in enumerate(files):
            over = files[at + 1] if at + 1 < len(files) else None
            above.setdefault(one, set()).add(over)
    gone = set()
    for one in dict.fromkeys(one for files in lists for one in files):
        over = next(iter(above[one])) if len(above[one]) == 1 else None
        if over is not None and one.is_memory and over.is_memory:
            over.absorb(one, disk.size)
            gone.add(one)
    if gone:
        for stack in stacks:
            stack.files = tuple(one for one in stack.files if one not in gone)
        disk.lower = tuple(one for one in disk.lower if one not in gone)
        disk.tell_files()


Files = tuple[tuple[int, Any], ...]  # of an overlay, the newest last: descriptor and map (vmfs.devices._chips.Clusters)


def _runs(clusters: Any, offset: int, length: int) -> Iterator[tuple[bool, int, int]]:
    """(whether it is in that map, offset, length) of the parts of a range, in order."""
    end = offset + length
    while offset < end:
        cluster = offset // CLUSTER
        has, count = clusters.run(cluster, -(-end // CLUSTER))
        upto = min((cluster + count) * CLUSTER, end)
        yield has, offset, upto - offset
        offset = upto


def _parts(files: Files, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(descriptor, offset, length) of the parts of a range, in order: of the last of these files that has it; -1 where
    none has."""
    if not files:
        yield -1, offset, length
        return
    (fd, clusters), below = files[-1], files[:-1]
    for has, start, size in _runs(clusters, offset, length):
        if has:
            yield fd, start, size
        else:
            yield from _parts(below, start, size)


def _whole(maps: Iterable[Any], size: int) -> Any:
    whole = _chips.Clusters(-(-size // CLUSTER))
    for clusters in maps:
        whole.add(clusters)
    return whole


def _extents(maps: Iterable[Any], size: int) -> Iterator[tuple[int, int]]:
    return ((start, start + length) for has, start, length in _runs(_whole(maps, size), 0, size) if has)


class Overlay:
    """What is written goes into a file without a name, which is gone with the machine; the base stays as it is.

    In the folder for temporary files (TMPDIR): it takes disk space as it grows, and where that ends, or `room` does,
    writes fail. To flush it has no meaning: nothing of it outlives the machine. Below that file are those that are
    frozen (`lower`, the newest last), which snapshots share.
    """

    mode = "cow"
    writable = True
    writes_plainly = False

    def __init__(self, base: RawDisk, new_file: Callable[[], int], room: Room) -> None:
        self.new_file = new_file
        self._room = room
        self._held = 0  # bytes that are reserved there
        self._taken = 0  # that the file took when it was last looked at
        self._since = 0  # that it may have taken since
        self.base = base
        self.size = base.size
        self.lower: tuple[Written, ...] = ()
        self.can_discard = True
        self.files = _chips.Files(base.fd, base.length)
        self._writing = threading.Lock()
        self._write_to(new_file())

    def _write_to(self, fd: int) -> None:
        """Have that new file be the one that is written."""
        self.fd = fd
        os.ftruncate(fd, self.size)
        self._punches = can_punch(fd)
        self._clusters = _chips.Clusters(-(-self.size // CLUSTER))  # that the file has
        self.tell_files()

    def tell_files(self) -> None:
        lower = ((one.fd, one.clusters) for one in reversed(self.lower))
        self.files.set(((self.fd, self._clusters), *lower))

    # ---- snapshots

    @property
    def is_written(self) -> bool:
        """Whether anything was since it was frozen last."""
        return self._clusters.any

    def freeze(self, new_file: Callable[[], int]) -> Frozen:
        """What it has, for somebody to keep. It is not written to meanwhile. `new_file` gives the next to be written,
        where one is needed (`is_written`)."""
        if self.is_written:
            fresh = new_file()
            self.lower = (*self.lower, Written(self.fd, self._clusters, self._room, self._held))
            self._held = self._taken = self._since = 0
            self._write_to(fresh)
        return Frozen(self.lower, self.size)

    def go_back(self, frozen: Frozen) -> None:
        """Have what was frozen then, and no more. Nobody reads it meanwhile."""
        self.lower = frozen.files
        if self.is_written:
            os.ftruncate(self.fd, 0)
            self._write_to(self.fd)
            self._room.release(self._held)
            self._held = self._taken = self._since = 0
        self.tell_files()

    def _hold(self, length: int) -> None:
        """Before so many bytes are written. OSError where there is no room for them."""
        self._since += length + 2 * CLUSTER
        if self._taken + self._since <= self._held:
            return
        self._taken, self._since = os.fstat(self.fd).st_blocks * SECTOR, length + 2 * CLUSTER
        more = self._taken + self._since - self._held
        if more > 0:
            more = -(-more // ROOM_STEP) * ROOM_STEP
            try:
                self._room.reserve(more)
            except VmfsError as error:
                self._since = 0
                raise OSError(error.errno, str(error)) from None
            self._held += more

    def _has(self, cluster: int) -> bool:
        has: bool = self._clusters.run(cluster, cluster + 1)[0]
        return has

    @property
    def _files(self) -> Files:
        return (*((one.fd, one.clusters) for one in self.lower), (self.fd, self._clusters))

    def read(self, offset: int, buffers: Buffers) -> None:
        self._read(_parts(self._files, offset, sum(map(len, buffers))), buffers)

    def read_at_once(self, offset: int, buffers: Buffers) -> bool:
        length = sum(map(len, buffers))
        if length > AT_ONCE or offset + length > self.base.length:
            return False
        at = 0
        for fd, start, size in _parts(self._files, offset, length):
            if not _read_now(self.base.fd if fd < 0 else fd, _cut(buffers, at, size), start, size):
                return False
            at += size
        return True

    def read_at(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read(offset, [memoryview(data)])
        return bytes(data)

    def _read(self, parts: Iterator[tuple[int, int, int]], buffers: Buffers) -> None:
        at = 0
        for fd, start, size in parts:
            part = _cut(buffers, at, size)
            if fd < 0:
                self.base.read(start, part)
            else:
                _transfer(os.preadv, fd, part, start)
            at += size

    def write(self, offset: int, buffers: Buffers, *, through: bool = False) -> None:
        length = sum(map(len, buffers))
        with self._writing:
            self._hold(length)
            self._fill(offset, length)
            _transfer(os.pwritev, self.fd, buffers, offset)
            self._clusters.mark(offset // CLUSTER, -(-(offset + length) // CLUSTER))

    def _fill(self, offset: int, length: int) -> None:
        """Copy what a write leaves of its first and its last cluster."""
        end = offset + length
        for cluster, is_cut in ((offset // CLUSTER, offset % CLUSTER), (end // CLUSTER, end % CLUSTER)):
            if is_cut and not self._has(cluster):
                at = cluster * CLUSTER
                data = memoryview(bytearray(min(CLUSTER, self.size - at)))
                self._read(_parts(self._files[:-1], at, len(data)), [data])
                _transfer(os.pwritev, self.fd, [data], at)
                self._clusters.mark(cluster, cluster + 1)

    def flush(self) -> None:
        pass

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, unmap=True)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        with self._writing:
            self._hold(0 if self._punches else length)
            self._fill(offset, length)
            if self._punches:
                fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
            else:
                self._write_zeros(offset, length)
            self._clusters.mark(offset // CLUSTER, -(-(offset + length) // CLUSTER))

    def _write_zeros(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            size = min(end - offset, len(_ZEROS))
            _transfer(os.pwritev, self.fd, [memoryview(_ZEROS)[:size]], offset)
            offset += size

    def save_map(self) -> dict[int, bytes]:
        chunks: dict[int, bytes] = _whole((clusters for _, clusters in self._files), self.size).save()
        return chunks

    def extents(self) -> Iterator[tuple[int, int]]:
        return joined((self.base.extents(), self.written()))

    def written(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of the clusters that are not the base's."""
        return _extents((clusters for _, clusters in self._files), self.size)

    def check_map(self, chunks: Mapping[int, bytes]) -> None:
        clusters = -(-self.size // CLUSTER)
        for chunk, bits in chunks.items():
            last = int.from_bytes(bits, "little").bit_length() - 1
            if len(bits) != _CHUNK // 8 or last < 0 or chunk * _CHUNK + last >= clusters:
                raise Invalid(f"the overlay of a disk of {self.size} bytes has no such clusters as chunk {chunk} says")

    def load_map(self, chunks: Mapping[int, bytes]) -> None:
        if chunks != self.save_map():
            self.lower = ()
            self._clusters.load(dict(chunks))
            self.tell_files()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._room.release(self._held)
            self.lower = ()
        self.base.close()


def _cut(buffers: Buffers, offset: int, length: int) -> list[memoryview]:
    """The memory of `length` bytes from `offset` on."""
    taken = []
    for buffer in buffers:
        if offset >= len(buffer):
            offset -= len(buffer)
            continue
        piece = buffer[offset : offset + length]
        taken.append(piece)
        length -= len(piece)
        offset = 0
        if not length:
            break
    return taken
