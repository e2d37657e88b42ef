"""A saved machine as one file: a tar of the directory of a snapshot, in zstd, whose frame has a checksum.

So `tar --zstd -xf FILE` has the directory again. Sparse files are in GNU's format 1.0 (GNU tar's manual, "Storing
Sparse Files"), which Python's tarfile reads and does not write.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import zstandard

from vmfs.words.errors import EngineFailed, Invalid, known

STEP = 1 << 20
PAST = "history"  # the folder with a machine's past, where it has one
FILES_MOST = 200
_BLOCK = tarfile.BLOCKSIZE
# The last bytes: a frame that zstd skips (RFC 8878, 3.1.2). A file that is cut has another end.
END = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + b"vmfs 1\n\0"
_SAID_SECONDS = 0.2


class Progress:
    """What of it is done, on a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._said = 0.0
        self._is_shown = sys.stderr.isatty()

    def more(self, count: int) -> None:
        self._done += count
        if self._is_shown and time.monotonic() - self._said > _SAID_SECONDS:
            self._said = time.monotonic()
            part = f"{100 * self._done // self._total:3} %" if self._total else f"{self._done >> 20} MiB"
            print(f"\r{self._what}: {part}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._is_shown:
            print(f"\r{self._what}: {self._done >> 20} MiB", file=sys.stderr)


# ---- out


def extents(fd: int, size: int) -> list[tuple[int, int]]:
    """The (start, length) of a file's data."""
    found, at = [], 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as failure:
            if failure.errno == errno.ENXIO:
                return found
            if failure.errno == errno.EINVAL:  # it tells nobody
                return [*found, (at, size - at)]
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at - start))
    return found


def paths_in(folder: Path, *, with_past: bool = False) -> Iterator[str]:
    """`mem` last, which is the longest."""
    yield from ("state", "info")
    for inner in ("images", "disks", *([PAST] if with_past and (folder / PAST).is_dir() else [])):
        yield from (f"{inner}/{name}" for name in sorted(os.listdir(folder / inner)))
    yield "mem"


def write(folder: Path, out: Any, what: str, *, with_past: bool = False) -> None:
    """The directory of a snapshot into a file that is open for writing."""
    opened: list[tuple[str, int, int, list[tuple[int, int]]]] = []
    try:
        for path in paths_in(folder, with_past=with_past):
            os.stat(folder / path)  # the size that it has now
            fd = os.open(folder / path, os.O_RDONLY)
            opened.append((path, fd, size := os.fstat(fd).st_size, extents(fd, size)))
        progress = Progress(what, sum(length for _, _, _, parts in opened for _, length in parts))
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        with compressor.stream_writer(out, closefd=False) as packed:
            written = 0
            for path, fd, size, parts in opened:
                written += _add(packed, path, fd, size, parts, progress)
            packed.write(bytes(2 * _BLOCK + -(written + 2 * _BLOCK) % tarfile.RECORDSIZE))
        out.write(END)
        progress.end()
    finally:
        for _, fd, _, _ in opened:
            os.close(fd)


def _add(packed: Any, path: str, fd: int, size: int, parts: list[tuple[int, int]], progress: Progress) -> int:
    """How many bytes it took."""
    info = tarfile.TarInfo(f"machine/{path}")
    info.mode, info.mtime, info.size = 0o600, int(os.fstat(fd).st_mtime), size
    numbers = b""
    if sum(length for _, length in parts) < size:
        mapped = [*parts, (size, 0)]  # for where the file ends
        lines = [len(mapped), *(number for part in mapped for number in part)]
        numbers = "".join(f"{line}\n" for line in lines).encode()
        numbers += bytes(-len(numbers) % _BLOCK)
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": info.name,
            "GNU.sparse.realsize": str(size),
        }
        info.name = f"machine/{os.path.dirname(path)}/GNUSparseFile.0/{os.path.basename(path)}".replace("//", "/")
        info.size = len(numbers) + sum(length for _, length in parts)
    head = info.tobuf(tarfile.PAX_FORMAT) + numbers
    packed.write(head)
    for start, length in parts:
        at, end = start, start + length
        while at < end:
            data = os.pread(fd, min(STEP, end - at), at)
            if not data:
                raise EngineFailed(f"{path} became shorter")
            packed.write(data)
            progress.more(len(data))
            at += len(data)
    packed.write(bytes(-info.size % _BLOCK))
    return len(head) - len(numbers) + -(-info.size // _BLOCK) * _BLOCK


@contextlib.contextmanager
def new_file(path: Path, *, replaces: bool = True) -> Iterator[Any]:
    """A file that has its name once it is whole, and is not there before: it is without a name as long as it is
    written, where the file system has such files. One that has the name is replaced, or else it is a FileExistsError.
    """
    try:
        fd = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o600)
        name = None
    except OSError as failure:
        if failure.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        fd, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb", buffering=STEP) as file:
            yield file
            file.flush()
            os.fsync(fd)
            if name is None and not replaces:
                os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
                return
            if name is None:
                name = os.path.join(path.parent, f".{path.name[:100]}.{os.getpid()}")
                # With a directory's descriptor it is linkat(2), which follows the link.
                os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)
        if replaces:
            os.replace(name, path)
        else:
            os.link(name, path)
            os.unlink(name)
    except BaseException:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise


# ---- in


def load(machine: Path, source: Any, what: str, total: int, *, keep: str = "") -> None:
    """Make a machine of a file that is open for reading, or none. `keep`: the name of the snapshot that then stays."""

    def fill(folder: Path) -> None:
        read(source, lambda path: new_in(folder, path), what, total)

    come_in(machine, fill, keep, removed_if_killed)


def come_in(
    machine: Path,
    fill: Callable[[Path], None],
    keep: str = "",
    guard: Callable[[Path], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Make a machine of what `fill` puts into the directory of a saved one, or none. `guard`: what is around it."""
    if machine.exists():
        raise failed(machine, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)))
    with guard(machine):
        try:
            machine.mkdir()
        except OSError as failure:
            raise failed(machine, failure) from None
        try:
            if not (machine / "vm_run").exists():
                raise Invalid(f"{machine} is in no mount of vmfs")
            _come_in(machine, machine / "snap" / (keep or "loaded"), fill)
            if not keep:
                (machine / "snap/loaded").rmdir()
        except BaseException:
            with contextlib.suppress(OSError):
                machine.rmdir()
            raise


@contextlib.contextmanager
def removed_if_killed(folder: Path) -> Iterator[None]:
    """Of a process with one thread: another one removes a directory of a mount, which is not there yet, where this one
    is killed meanwhile. (One that is killed while it makes it is there until that is done.)"""
    ended, tells = os.pipe()
    watcher = os.fork()
    if not watcher:
        try:
            os.close(tells)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which its parent gets, too, and ends by
                signal.signal(number, signal.SIG_IGN)
            if not os.read(ended, 1):
                os.rmdir(folder)
        finally:
            os._exit(0)
    os.close(ended)
    try:
        yield
    finally:
        os.write(tells, b".")
        os.close(tells)
        os.waitpid(watcher, 0)


def _come_in(machine: Path, folder: Path, fill: Callable[[Path], None]) -> None:
    try:
        before = os.umask(0)  # which says that 0700 is meant
        try:
            folder.mkdir(0o700)
        finally:
            os.umask(before)
        fill(folder)
        (machine / "restore").write_text(f"{folder.name}\n")
        if (folder / PAST).is_dir():
            _take_up_past(machine)
    except OSError as failure:
        raise refused(machine, failure) from None


def _take_up_past(machine: Path) -> None:
    """Where it can be had here; without it the machine is what it was all the same."""
    try:
        (machine / "history").write_text("on\n")
    except OSError as failure:
        if failure.errno not in (errno.EOPNOTSUPP, errno.ENOSPC):
            raise
        print(f"vmfs: its past is left out: {refused(machine, failure)}", file=sys.stderr)


def read(source: Any, make: Callable[[str], int], what: str, total: int, *, most: int | None = None) -> None:
    """A file that is open for reading; `make(path)`: a new, empty file for one of the saved directory, open for
    writing, which is closed here. Invalid for what is no saved machine, or is cut, or unpacks to more than `most`
    bytes."""
    progress = Progress(what, total)
    source.seek(-min(len(END), total), os.SEEK_END)
    if source.read() != END:
        raise Invalid("that is no saved machine, or it is cut")
    source.seek(0)
    try:
        packed = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(_Counted(source, progress))
        with tarfile.open(fileobj=_Whole(packed, most), mode="r|") as archive:
            count = 0
            for member in archive:
                count += 1
                if count > FILES_MOST:
                    raise Invalid(f"a saved machine has up to {FILES_MOST} files")
                if not member.isdir():
                    _take(archive, member, make)
        while packed.read(STEP):  # to the checksum
            pass
    except (tarfile.TarError, zstandard.ZstdError, EOFError, ValueError, OverflowError) as failure:
        raise Invalid(f"that is no saved machine, or it is damaged: {failure}") from None
    progress.end()


class _Counted(io.RawIOBase):
    def __init__(self, source: Any, progress: Progress) -> None:
        self._source, self._progress = source, progress

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._source.read(size)
        self._progress.more(len(data))
        return data


class _Whole:
    """tarfile takes a short read for the end of a file, and says nothing where an archive ends too early."""

    def __init__(self, packed: Any, most: int | None) -> None:
        self._packed, self._most, self._done = packed, most, 0

    def read(self, size: int) -> bytes:
        self._done += size
        if self._most is not None and self._done > self._most:
            raise Invalid(f"the saved machine unpacks to more than the {self._most} bytes that there is room for")
        data = bytearray()
        while len(data) < size and (more := self._packed.read(size - len(data))):
            data += more
        if len(data) < size:
            raise EOFError("it ends too early")
        return bytes(data)


def new_in(folder: Path, path: str) -> int:
    """A new, empty file of a saved directory, open for writing."""
    with contextlib.suppress(FileExistsError):
        os.mkdir((folder / path).parent, 0o700)
    return os.open(folder / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, make: Callable[[str], int]) -> None:
    path = member.name.removeprefix("machine/")
    parts = path.split("/")
    is_known = path in ("state", "info", "mem") or len(parts) == 2 and parts[0] in ("images", "disks", PAST)
    if not member.isfile() and not member.issparse() or not is_known or parts[-1] in ("", ".", ".."):
        raise Invalid(f"a saved machine has no {member.name[:80]!r}")
    data = archive.extractfile(member)
    assert data is not None
    fd = make(path)
    try:
        at, zeros = 0, bytes(STEP)
        while more := data.read(STEP):
            view = memoryview(more)
            while len(view) and more != zeros[: len(more)]:
                done = os.pwrite(fd, view, at + len(more) - len(view))
                view = view[done:]
            at += len(more)
        if at != member.size:
            raise EOFError("it ends too early")
        os.ftruncate(fd, at)
    finally:
        os.close(fd)


# ---- sentences


def failed(path: object, failure: OSError) -> Invalid:
    """What a call on a file of the user's came to."""
    reason = known(failure)
    text = failure.strerror if reason is failure else str(reason)
    return Invalid(f"{path}: {text}")


def refused(machine: Path, failure: OSError) -> Invalid:
    """What a call on a file of a machine came to: its `error` says why."""
    with contextlib.suppress(OSError):
        if sentence := (machine / "error").read_text().strip():
            return Invalid(sentence)
    return Invalid(f"{failure.filename or machine}: {failure.strerror}")
