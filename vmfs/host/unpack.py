"""The process that unpacks a disk image: qcow2, VMDK, VHDX, VDI, and what is compressed, into a sparse file without a
name. Images are hostile: it opens them as the user who named them, and then has no right but to read and write what it
has open; it is bounded in time and memory, and what it takes of the host's disk it asks for.

To its machine it says over a socket, a packet each: T and a number of bytes, to be answered with a byte before it
writes them; in the end R and `Result`, with the file and its size, or why not. A socket that is closed ends it.

The formats are dissect.hypervisor's. They are imported before the process becomes the user, whose they need not be.
"""

from __future__ import annotations

import array
import errno
import io
import lzma
import os
import resource
import signal
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import zstandard

from vmfs.words.commands import Result
from vmfs.words.errors import HostError, Invalid, LimitReached, Unsupported, VmfsError
from vmfs.words.images import COMPRESSED, HEAD, format_of

SECONDS_MOST = 900
MEMORY_MOST = 1 << 30
SIZE_MOST = 256 << 30  # of a disk
READ_MOST = 16 << 20  # bytes that a format's reader asks for at once: a table larger than that is none
CHAIN_MOST = 8
STEP = 64 << 20  # bytes that are asked for at a time
_CHUNK = 1 << 20
_BLOCK = 64 << 10  # of zeros: a hole
_ZEROS = bytes(_CHUNK)
_LAYERS_MOST = 3  # a compressed image, of a format, with what that holds
_WINDOW_MOST = 128 << 20
_LIBRARY = "dissect.hypervisor"


def load() -> None:
    """Import what reads the formats. Before the rights go."""
    try:
        from dissect.hypervisor.disk import qcow2, vdi, vhdx, vmdk  # noqa: F401
    except ImportError:
        pass  # `_reader` says so where it is needed


class Asker:
    """Its end of the socket."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._room = 0

    def take(self, size: int) -> None:
        """Before so many bytes are written. LimitReached where the machine has no room."""
        while self._room < size:
            self._line.send(b"T" + struct.pack("<Q", STEP))
            if self._line.recv(1) != b"\x01":
                raise LimitReached("there is no room for what is in the image")
            self._room += STEP
        self._room -= size

    def say(self, number: int, text: str, fd: int | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        try:
            self._line.sendmsg([b"R" + msgspec.msgpack.encode(Result(number, text[:500]))], rights, socket.MSG_NOSIGNAL)
        except OSError:  # nobody waits any more
            pass


def serve(path: str, asked: str, line: socket.socket, open_file: Callable[[str], int], new_file: Callable[[], int],
          confine: Callable[[], None]) -> None:  # fmt: skip
    """Unpack the image at `path`, of the format `asked` ("": what its first bytes say), and answer over `line`.

    `open_file` opens it, and the backing files of a qcow2, which are named only where `asked` is qcow2: a guest could
    have written such a header into a raw image. `confine` takes the rights away."""

    def work(asker: Asker) -> tuple[str, int]:
        files = _chain(path, asked, open_file)
        results = [new_file() for _ in range(_LAYERS_MOST)]
        confine()
        _bound()
        fd, size = _unpack(files, asked, results, asker)
        return str(size), fd

    _answer(path, Asker(line), work)


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MOST, MEMORY_MOST))
    signal.alarm(SECONDS_MOST)


def _answer(path: str, asker: Asker, work: Callable[[Asker], tuple[str, int | None]]) -> None:
    """Say what came of it, or why nothing did."""
    try:
        text, fd = work(asker)
        asker.say(0, text, fd)
    except VmfsError as error:
        asker.say(error.errno, str(error))
    except MemoryError:
        asker.say(errno.EINVAL, f"{path}: the image takes more memory than {MEMORY_MOST >> 30} GiB")
    except OSError as error:
        asker.say(error.errno or errno.EIO, f"{path}: {os.strerror(error.errno or errno.EIO)}")
    except Exception as error:  # of the formats' readers, which raise anything
        asker.say(errno.EINVAL, f"{path}: it is damaged: {type(error).__name__}: {error}"[:400])


def unpacked(path: str, asked: str, new_file: Callable[[], int]) -> tuple[int, int]:
    """What `serve` does, for a command: the file, and its size."""
    text, fds = _in_a_child(path, lambda line: serve(path, asked, line, _open, new_file, lambda: None))
    return fds[0], int(text)


def looked_at(path: str) -> dict[str, str]:
    """What an image says of itself: `format`, `size` (of its disk, as far as that is known), `backing`. For a command.
    """

    def work(asker: Asker) -> tuple[str, None]:
        fd = _open(path)
        _bound()
        kind, size, backing = format_of(os.pread(fd, HEAD, 0)), "", ""
        if kind == "raw":
            size = str(os.lseek(fd, 0, os.SEEK_END))
        elif kind == "qcow2":
            _check_qcow2(fd)
            size, backing = str(int.from_bytes(os.pread(fd, 8, 24), "big")), _backing_of(fd)
        elif kind not in COMPRESSED:
            size = str(int(_reader(kind, fd, []).size))
        return "\0".join((kind, size, backing)), None

    text, _ = _in_a_child(path, lambda line: _answer(path, Asker(line), work))
    return dict(zip(("format", "size", "backing"), text.split("\0"), strict=True))


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _in_a_child(path: str, work: Callable[[socket.socket], None]) -> tuple[str, list[int]]:
    """With the rights of this process."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    load()
    child = os.fork()
    if not child:
        try:
            ours.close()
            work(its)
        finally:
            os._exit(0)
    its.close()
    try:
        with ours:
            while True:
                packet, fds, _, _ = socket.recv_fds(ours, 4096, 1, socket.MSG_CMSG_CLOEXEC)
                if packet[:1] != b"T":
                    break
                ours.send(b"\x01")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not packet:
        raise HostError(errno.ETIMEDOUT, f"{path}: the process that unpacks it was ended")
    result = msgspec.msgpack.decode(packet[1:], type=Result)
    if result.errno:
        raise HostError(result.errno, result.text)
    return result.text, fds


def _chain(path: str, asked: str, open_file: Callable[[str], int]) -> list[int]:
    """The image, and the backing files under it."""
    files = [open_file(path)]
    while asked == "qcow2" and (name := _backing_of(files[-1])):
        if len(files) == CHAIN_MOST:
            raise Invalid(f"{path}: more than {CHAIN_MOST} files are behind each other")
        path = os.path.join(os.path.dirname(path), name)
        files.append(open_file(path))
    return files


def _backing_of(fd: int) -> str:
    """The name in a qcow2's header; empty where there is none."""
    head = os.pread(fd, 20, 0)
    if len(head) < 20 or format_of(head) != "qcow2":
        return ""
    at, length = struct.unpack_from(">QI", head, 8)
    if not at:
        return ""
    name = os.pread(fd, min(length, 1024), at) if at < 1 << 40 else b""
    if not name or length > 1023 or b"\0" in name:
        raise Invalid("the name of its backing file is none")
    return os.fsdecode(name)


def _unpack(files: list[int], asked: str, results: list[int], asker: Asker) -> tuple[int, int]:
    """The file with the disk's contents, and its size."""
    fd, rest = files[0], files[1:]
    for result in results:
        found = format_of(os.pread(fd, HEAD, 0))
        kind = found if found in COMPRESSED or not asked else asked
        if kind == "raw":
            return fd, os.lseek(fd, 0, os.SEEK_END)
        size = _write(_DECOMPRESSORS[kind](fd) if kind in COMPRESSED else _contents(kind, fd, rest), result, asker)
        fd, rest = result, []
        if kind not in COMPRESSED:
            return fd, size
    raise Invalid("it is compressed more than once")


def _write(chunks: Iterator[bytes], fd: int, asker: Asker) -> int:
    """As a sparse file. Returns its size."""
    at = 0
    for chunk in chunks:
        if at + len(chunk) > SIZE_MOST:
            raise Invalid(f"a disk of more than {SIZE_MOST >> 30} GiB is not unpacked: `qemu-img convert` makes it raw")
        if chunk != _ZEROS[: len(chunk)]:
            for start in range(0, len(chunk), _BLOCK):
                block = chunk[start : start + _BLOCK]
                if block != _ZEROS[: len(block)]:
                    asker.take(len(block))
                    os.pwrite(fd, block, at + start)
        at += len(chunk)
    if not at:
        raise Invalid("the image has nothing in it")
    os.ftruncate(fd, at)
    return at


# ---- compressed files


def _pieces(fd: int) -> Iterator[bytes]:
    at = 0
    while data := os.pread(fd, _CHUNK, at):
        yield data
        at += len(data)


def _members(fd: int, new: Callable[[], Any], take: Callable[[Any, bytes], bytes]) -> Iterator[bytes]:
    """Through one decompressor after the other: what is compressed in pieces is a file of several members."""
    one = new()
    is_begun = False
    for data in _pieces(fd):
        while data:
            out = take(one, data)
            is_begun = True
            if out:
                yield from _of_size(out)
            if one.eof:
                data, one, is_begun = one.unused_data.lstrip(b"\0"), new(), False
            else:
                data = getattr(one, "unconsumed_tail", b"")
                if not data and not getattr(one, "needs_input", True):
                    data = b""
                    while not one.needs_input and not one.eof:
                        yield from _of_size(one.decompress(b"", _CHUNK))
                    if one.eof:
                        data, one, is_begun = one.unused_data.lstrip(b"\0"), new(), False
    if is_begun:
        raise Invalid("the compressed file ends too early")


def _of_size(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]


def _gz(fd: int) -> Iterator[bytes]:
    return _members(
        fd, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), lambda one, data: one.decompress(data, _CHUNK)
    )


def _xz(fd: int) -> Iterator[bytes]:
    return _members(
        fd,
        lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY_MOST // 4),
        lambda one, data: one.decompress(data, _CHUNK),
    )


def _zstd(fd: int) -> Iterator[bytes]:
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MOST).stream_reader(file, read_across_frames=True)
        while data := reader.read(_CHUNK):
            yield data


_DECOMPRESSORS: dict[str, Callable[[int], Iterator[bytes]]] = {"gz": _gz, "xz": _xz, "zstd": _zstd}


# ---- formats


class _File(io.RawIOBase):
    """An image, for a format's reader; what it asks for at once is bounded."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0
        self._size = os.lseek(fd, 0, os.SEEK_END)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        if not 0 <= self._at < 1 << 63:
            raise Invalid("the image points to where no file reaches")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        size = max(self._size - self._at, 0) if size is None or size < 0 else size
        if size > READ_MOST:
            raise Invalid(f"a table of {size} bytes, in an image that may have {READ_MOST}")
        data = os.pread(self._fd, size, self._at)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _contents(kind: str, fd: int, backing: list[int]) -> Iterator[bytes]:
    stream = _reader(kind, fd, backing)
    size = int(stream.size)
    if not 0 < size <= SIZE_MOST:
        raise Invalid(
            f"a disk of {size} bytes, where up to {SIZE_MOST >> 30} GiB are unpacked: `qemu-img convert` makes it raw"
        )
    done = 0
    while done < size:
        data = stream.read(min(_CHUNK, size - done))
        if not data:
            raise Invalid("the image ends before its disk does")
        yield data
        done += len(data)


def _reader(kind: str, fd: int, backing: list[int]) -> Any:
    try:
        from dissect.hypervisor.disk import qcow2, vdi, vhdx, vmdk
    except ImportError:
        raise Unsupported(f"{kind} images take the Python package {_LIBRARY}, which is not installed") from None
    file: Any = _File(fd)
    if kind == "qcow2":
        _check_qcow2(fd)
        below = None
        if backing:
            below = _reader("qcow2", backing[0], backing[1:]) if _is_qcow2(backing[0]) else _File(backing[0])
        elif _backing_of(fd):
            raise Invalid(
                f"its backing file is {_backing_of(fd)!r}, which is opened only where the line says format=qcow2 "
                "(`vmfs boot --format qcow2`): a guest may have written that into a raw image"
            )
        return qcow2.QCow2(file, backing_file=below).open()
    if kind == "vmdk":
        return vmdk.VMDK(file)
    if kind == "vhdx":
        return vhdx.VHDX(file)
    return vdi.VDI(file).open()


_SUBCLUSTERS, _DATA_FILE = 0x10, 0x04  # of the incompatible features


def _check_qcow2(fd: int) -> None:
    """Invalid for what its reader does not read, or reads without an end."""
    head = os.pread(fd, 80, 0).ljust(80, b"\0")
    version, features = struct.unpack_from(">I", head, 4)[0], struct.unpack_from(">Q", head, 72)[0]
    if version >= 3 and features & (_SUBCLUSTERS | _DATA_FILE):
        what = "subclusters (extended_l2)" if features & _SUBCLUSTERS else "a data file of its own"
        raise Invalid(f"a qcow2 with {what} is not read: `qemu-img convert` makes it raw")


def _is_qcow2(fd: int) -> bool:
    return format_of(os.pread(fd, HEAD, 0)) == "qcow2"


