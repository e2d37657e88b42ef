"""Reading and writing the files of one directory, kept open; what fails has the sentence of the machine's `error`."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK = 1 << 16


def read_whole(fd: int) -> bytes:
    """All of an open file."""
    data, part = bytearray(), bytes(CHUNK)
    while len(part) == CHUNK:  # a short read is the end of all but streams
        part = os.pread(fd, CHUNK, len(data))
        data += part
    return bytes(data)


def write_whole(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data`, in one write(2) where the file takes it so."""
    view = memoryview(data).cast("B")
    while view:
        if not (done := os.pwrite(fd, view, offset)):
            raise OSError(errno.EIO, "nothing was written")
        view, offset = view[done:], offset + done


class Directory:
    """The files of the directory `path`, by their names in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self._files: dict[tuple[str, int], int] = {}
        self._lock = threading.RLock()  # guards _files; a signal handler may use it, too

    def close(self) -> None:
        """Close every descriptor; never fails."""
        with self._lock:
            files, self._files = [*self._files.values(), self._directory], {}
            self._directory = -1
        for fd in files:
            if fd >= 0:
                with suppress(OSError):  # ENODEV of a machine that is gone: Linux has closed it all the same (close(2))
                    os.close(fd)

    def pread(self, name: str, size: int, offset: int = 0) -> bytes:
        """Exactly `size` bytes of a binary file at `offset`; OSError (EFAULT) where it ends before."""
        fd = self._open(name, os.O_RDONLY)
        data = bytearray()
        with self._errors(name):
            while len(data) < size and (part := os.pread(fd, size - len(data), offset + len(data))):
                data += part
        if len(data) < size:
            end = f"{name} has {len(data)} of the {size} bytes at {offset:#x}"
            raise OSError(errno.EFAULT, end, os.path.join(self.path, name))
        return bytes(data)

    def pwrite(self, name: str, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Write all of `data` at `offset` of a binary file. What takes effect when it is closed, `write` writes."""
        fd = self._open(name, os.O_WRONLY)
        with self._errors(name, writing=True):
            write_whole(fd, data, offset)

    def read(self, name: str, *, keep: bool = True) -> bytes:
        """The whole file. `keep` its descriptor open for the next time."""
        fd = self._open(name, os.O_RDONLY, keep=keep)
        try:
            with self._errors(name):
                return read_whole(fd)
        finally:
            if not keep:
                os.close(fd)

    def read_text(self, name: str, *, keep: bool = True) -> str:
        """A text file, without its last newline."""
        return self.read(name, keep=keep).decode().removesuffix("\n")

    def write(self, name: str, data: str | bytes | bytearray | memoryview) -> None:
        """Replace the file's contents: open, write and close, as `cat data > name` does.

        A command or a value takes effect whole, or fails. So does what is understood at the close only, as `symbols`.
        """
        fd = self._open(name, os.O_WRONLY | os.O_TRUNC, keep=False)
        with self._errors(name, writing=True):
            try:
                write_whole(fd, data.encode() if isinstance(data, str) else data, 0)
            except BaseException:
                with suppress(OSError):  # the first failure is the one that tells why
                    os.close(fd)
                raise
            os.close(fd)

    def _open(self, name: str, flags: int, *, keep: bool = True) -> int:
        with self._lock:
            fd = self._files.get((name, flags))
            if fd is None or not keep:
                if self._directory < 0:
                    raise OSError(errno.EBADF, "the Vm is closed", self.path)
                with self._errors(name):
                    fd = os.open(name, flags, dir_fd=self._directory)
                if keep and (kept := self._files.setdefault((name, flags), fd)) != fd:
                    os.close(fd)  # a signal handler has opened it meanwhile
                    return kept
            return fd

    def _forget(self, name: str) -> None:
        """Close what is kept open of a file."""
        with self._lock:
            kept = [key for key in self._files if key[0] == name]
            for key in kept:
                os.close(self._files.pop(key))

    @contextmanager
    def _errors(self, name: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = self._reason() if writing else ""
            path = os.path.join(self.path, name)
            raise OSError(error.errno, reason or os.strerror(error.errno or 0), path) from None

    def _reason(self) -> str:
        """The sentence about the last refused write; empty where it cannot be read (the machine is gone)."""
        try:
            fd = os.open("error", os.O_RDONLY, dir_fd=self._directory)
        except OSError:
            return ""
        try:
            return os.read(fd, CHUNK).decode(errors="replace").rstrip("\n")
        except OSError:
            return ""
        finally:
            os.close(fd)
