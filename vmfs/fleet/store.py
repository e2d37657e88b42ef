"""Templates on a host: a folder that all workers of a user share there, in which each template is once.

    ROOT/ID/data     the template, whole
    ROOT/ID/users    locked (shared) by each worker that uses it, so it goes with the last of them
    ROOT/ID/writer   locked by who writes `data.part`, or unpacks it
    ROOT/ID/disk-*, ROOT/ID/memory-PID   the template unpacked: vmfs/fleet/unpacked.py
    ROOT/work-*      what a worker writes for itself; it goes with the worker

A template is named by its content: the ID is the hash of its manifest, which has the hashes of its chunks. What comes
from elsewhere is checked chunk by chunk before it is `data`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from vmfs.words.errors import Invalid

CHUNK = 4 << 20
_AT_A_TIME = 4  # chunks on their way
KINDS = ("library", "saved", "files")
_ID = re.compile(r"[0-9a-f]{32}")


class Manifest(msgspec.Struct, frozen=True):
    kind: str
    """`library`: of `Machine.save`; `saved`: of `vmfs save`; `files`: a tar in zstd."""
    size: int
    chunks: tuple[bytes, ...]
    """The hash of each CHUNK bytes; the last one may have fewer."""

    @property
    def id(self) -> str:
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()

    def check(self) -> None:
        if self.kind not in KINDS or len(self.chunks) != -(-self.size // CHUNK):
            raise Invalid("the manifest of a template does not fit its size, or its kind is not known")

    def size_of(self, number: int) -> int:
        return min(CHUNK, self.size - number * CHUNK)


def digest(data: Any) -> bytes:
    return hashlib.sha256(data).digest()


class Hashing:
    """A file that is open for writing, and the hashes of what is written through this."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._size = 0
        self._hash = hashlib.sha256()
        self._chunks: list[bytes] = []

    def write(self, data: Any) -> int:
        view = memoryview(data)
        while view:
            part = view[: CHUNK - self._size % CHUNK]
            self._hash.update(part)
            self._file.write(part)
            self._size += len(part)
            if not self._size % CHUNK:
                self._end_chunk()
            view = view[len(part) :]
        return len(data)

    def _end_chunk(self) -> None:
        self._chunks.append(self._hash.digest())
        self._hash = hashlib.sha256()

    def manifest(self, kind: str) -> Manifest:
        """Of all that was written."""
        if self._size % CHUNK:
            self._end_chunk()
        return Manifest(kind, self._size, tuple(self._chunks))


async def in_turn(numbers: Iterable[int], work: Callable[[int], Awaitable[None]]) -> None:
    """Chunks, several at a time. What fails ends all."""
    left = iter(numbers)

    async def some() -> None:
        for number in left:
            await work(number)

    tasks = [asyncio.create_task(some()) for _ in range(_AT_A_TIME)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def default_root() -> Path:
    return Path(tempfile.gettempdir()) / f"vmfs-fleet-{os.getuid()}"


class Store:
    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.root, 0o700)
        found = os.lstat(self.root)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise Invalid(f"{self.root} is not a folder of this user's alone")
        self._used: dict[str, int] = {}

    def use(self, manifest: Manifest) -> Entry:
        """The entry of a template, which stays as long as this process lives, or until `close`."""
        manifest.check()
        while manifest.id not in self._used:
            folder = self.root / manifest.id
            folder.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # it went at this moment
                fd = os.open(folder / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(fd, fcntl.LOCK_SH)
                if _is_at(fd, folder / "users"):
                    self._used[manifest.id] = fd
                else:
                    os.close(fd)
        return Entry(self.root / manifest.id, manifest)

    def find(self, id: str) -> Path | None:
        """Where a template is that is here whole."""
        path = self.root / id / "data"
        return path if _ID.fullmatch(id) and path.exists() else None

    def close(self) -> None:
        while self._used:
            os.close(self._used.popitem()[1])

    def sweep(self, age: float = 0) -> None:
        """Remove the templates that nobody uses, and has not used for `age` seconds."""
        for folder in self.root.iterdir():
            if _ID.fullmatch(folder.name):
                with contextlib.suppress(FileNotFoundError):
                    _sweep_one(folder, age)


def _sweep_one(folder: Path, age: float) -> None:
    if time.time() - folder.stat().st_mtime < age:
        return
    fd = os.open(folder / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    ours, there = os.fstat(fd), os.stat(path)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


class Entry:
    """A template's folder on this host."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.path = folder / "data"

    @property
    def is_whole(self) -> bool:
        return self.path.exists()

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Wait until nobody else writes it; whether there is something to be written still."""
        fd = os.open(self.folder / "writer", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield not self.is_whole
        finally:
            os.close(fd)

    def part(self, path: Path | None = None) -> Part:
        """What is to be it, for who is in `writing`; at another path of this file system, for anybody."""
        return Part(path or self.folder / "data.part", self.manifest)

    def take(self, part: Part) -> None:
        """It is whole. For who is in `writing`."""
        os.replace(part.path, self.path)


class Part:
    """A template that comes chunk by chunk, in any order, from several threads."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self._manifest = path, manifest
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self.missing = set(range(len(manifest.chunks)))

    def put(self, number: int, data: Any) -> None:
        """Invalid where it is not what the manifest says."""
        expected = self._manifest.chunks[number]
        if len(data) != self._manifest.size_of(number) or digest(data) != expected:
            raise Invalid(f"chunk {number} of template {self._manifest.id} is not what its maker had")
        view, at = memoryview(data), number * CHUNK
        while view:
            done = os.pwrite(self._fd, view, at)
            view, at = view[done:], at + done
        self.missing.discard(number)

    def close(self) -> None:
        """What has not become a template is gone."""
        os.close(self._fd)
        self.path.unlink(missing_ok=True)


def read_chunk(path: Path, number: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), CHUNK, number * CHUNK)
