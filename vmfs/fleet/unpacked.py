"""A template unpacked, once a host: its memory is sealed memfds, which machines of all workers there map.

The first worker that needs it unpacks it. Each that has it tells in ROOT/ID/memory-PID which descriptor of its has
which file; the next ones open these by /proc, and look whether they are that, and sealed. So the memory goes with the
last process that has it, however that ends. Files of disks, which machines write to, are in ROOT/ID, and are copied.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from vmfs.commands import archive
from vmfs.fleet.store import Entry
from vmfs.library import saved
from vmfs.memory.layers import SEALS, extents, is_sealed
from vmfs.memory.mapping import PAGE
from vmfs.words.errors import Invalid

_STEP = 1 << 20
_SEAL_SECONDS = 10.0
_MEMFD = "user.vmfs.memfd"  # docs/files.md, snap/


class Told(msgspec.Struct):
    """What a worker says of its own."""

    pid: int
    head: bytes
    memory: dict[str, int]
    disks: dict[str, str]


class Unpacked:
    """`memory`: descriptors of sealed memfds, by the file of a saved directory, or by the number of a region of the
    library's. `head`: of a machine of the library, `Saved` without its pages, in msgpack. `disks`: paths."""

    def __init__(self, head: bytes = b"") -> None:
        self.head = head
        self.memory: dict[str, int] = {}
        self.disks: dict[str, Path] = {}

    def close(self) -> None:
        while self.memory:
            os.close(self.memory.popitem()[1])

    # ---- with the other workers of the host

    @classmethod
    def of(cls, entry: Entry) -> Unpacked:
        """What another worker has, or it is unpacked now. Invalid for what is no template of its kind."""
        with entry.writing():
            adopted = (cls._adopt(path, entry) for path in sorted(entry.folder.glob("memory-*")))
            found = next((each for each in adopted if each is not None), None)
            is_new = found is None
            found = found or cls()
            try:
                if is_new:
                    found._unpack(entry)
                found._tell(entry)
            except BaseException:
                found.close()
                raise
            return found

    @classmethod
    def _adopt(cls, path: Path, entry: Entry) -> Unpacked | None:
        found = cls()
        try:
            told = msgspec.msgpack.decode(path.read_bytes(), type=Told)
            found.head = told.head
            found.disks = {name: entry.folder / file for name, file in told.disks.items()}
            for name, number in told.memory.items():
                there = f"/proc/{told.pid}/fd/{number}"
                # The process may have ended, and its number be another's.
                if not os.readlink(there).startswith(f"/memfd:{_name(entry, name)} "):
                    raise Invalid("it is another file")
                found.memory[name] = fd = os.open(there, os.O_RDONLY | os.O_CLOEXEC)
                if not is_sealed(fd):
                    raise Invalid("it is not whole")
        except (OSError, msgspec.MsgspecError, Invalid):
            found.close()
            return None
        return found

    def _tell(self, entry: Entry) -> None:
        told = Told(os.getpid(), self.head, self.memory, {name: path.name for name, path in self.disks.items()})
        part = entry.folder / "part"
        part.write_bytes(msgspec.msgpack.encode(told))
        os.replace(part, entry.folder / f"memory-{os.getpid()}")

    # ---- unpacking

    def _unpack(self, entry: Entry) -> None:
        def make(name: str) -> int:
            if name.startswith("disks/"):
                self.disks[name] = entry.folder / f"disk-{name.partition('/')[2]}"
                return os.open(self.disks[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            if name in self.memory:
                raise Invalid(f"the saved machine has {name} twice")
            self.memory[name] = fd = os.memfd_create(_name(entry, name), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            return os.dup(fd)

        most = psutil.virtual_memory().available  # a small file may come to anything
        with open(entry.path, "rb") as source:
            if entry.manifest.kind == "library":
                self._unpack_library(source, make, most)
            else:
                archive.read(source, make, str(entry.path), entry.manifest.size, most=most)
        for fd in self.memory.values():
            _seal(fd)

    def _unpack_library(self, source: Any, make: Callable[[str], int], most: int) -> None:
        fds: list[int] = []

        def put(number: int, offset: int, piece: memoryview) -> None:
            while piece:
                done = os.pwrite(fds[number], piece, offset)
                piece, offset = piece[done:], offset + done

        def begin(head: saved.Saved) -> Callable[[int, int, memoryview], None]:
            if len(head.pages) * PAGE > most:
                raise Invalid(f"the saved machine unpacks to more than the {most} bytes that there is room for")
            for number, (_, size, _, _) in enumerate(head.regions):
                fds.append(make(str(number)))
                os.ftruncate(fds[-1], size)
            return put

        try:
            head = saved.read(source, begin)
        finally:
            for fd in fds:
                os.close(fd)
        head.pages = []
        self.head = msgspec.msgpack.encode(head)

    # ---- into a mount

    def fill(self, folder: Path) -> None:
        """The files of a saved directory that comes in: memory as it is here, disks as copies."""
        for name in ("images", "disks"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        for name, fd in self.memory.items():
            os.close(archive.new_in(folder, name))
            os.setxattr(folder / name, _MEMFD, f"/proc/{os.getpid()}/fd/{fd}".encode())
        for name, path in self.disks.items():
            with _opened(path) as source, _closing(archive.new_in(folder, name)) as fd:
                size = os.fstat(source).st_size
                for start, end in extents(source, 0, size):
                    for at in range(start, end, _STEP):
                        os.pwrite(fd, os.pread(source, min(_STEP, end - at), at), at)
                os.ftruncate(fd, size)


def _seal(fd: int) -> None:
    """The kernel says EBUSY as long as something else of its own holds a page, as where memory is compacted."""
    end = time.monotonic() + _SEAL_SECONDS
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            return
        except OSError as failure:
            if failure.errno != errno.EBUSY or time.monotonic() > end:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _opened(path: Path) -> contextlib.AbstractContextManager[int]:
    return _closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _name(entry: Entry, name: str) -> str:
    """Of a memfd. It has no space, which ends it in /proc."""
    return f"vmfs-fleet-{entry.manifest.id}-{name}"
