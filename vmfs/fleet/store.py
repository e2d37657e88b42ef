"""Templates on a host: a folder that all workers of a user share there, in which each template is once.

    ROOT/ID/data     the template, whole
    ROOT/ID/users    locked (shared) by each worker that uses it, so it goes with the last of them
    ROOT/ID/writer   locked by who writes `data.part`
    ROOT/work-*      what a worker writes for itself; it goes with the worker

A template is named by its content: the ID is the hash of its manifest, which has the hashes of its chunks. What comes
from elsewhere is checked chunk by chunk before it is `data`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from vmfs.words.errors import Invalid

CHUNK = 4 << 20
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


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def manifest_of(path: Path, kind: str) -> Manifest:
    with open(path, "rb") as file:
        chunks = []
        size = 0
        while data := file.read(CHUNK):
            chunks.append(digest(data))
            size += len(data)
    return Manifest(kind, size, tuple(chunks))


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

    def write(self, chunk: Callable[[int], bytes]) -> None:
        """All of it, by a function that has chunk `n`. Invalid where one is not what the manifest says, and then it is
        not here. For who is in `writing`."""
        part = self.folder / "data.part"
        try:
            with open(part, "wb") as file:
                for number, expected in enumerate(self.manifest.chunks):
                    data = chunk(number)
                    if len(data) != self.manifest.size_of(number) or digest(data) != expected:
                        raise Invalid(f"chunk {number} of template {self.manifest.id} is not what its maker had")
                    file.write(data)
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)


def read_chunk(path: Path, number: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(number * CHUNK)
        return file.read(CHUNK)
