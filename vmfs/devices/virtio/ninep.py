"""A server of 9P2000.L over a folder of the host: messages in, messages out, as bytes.

Source: Plan 9's intro(5) for 9P2000, and the messages of 9P2000.L as Linux has them (net/9p, include/net/9p/9p.h).

The client is hostile. A fid is a path of names below the shared folder; each use of it resolves it anew with
openat2(2), which goes through no symbolic link and to nowhere outside (RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS). Only
regular files and folders are ever opened. Nothing makes a device node, or a file that runs with its owner's rights.
Errors are the host's errno. Rights are those of the thread that calls.

Left out: extended attributes, authentication (EOPNOTSUPP).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MAX_MESSAGE = 1 << 19
MIN_MESSAGE = 4096
HEADER = struct.Struct("<IBH")  # size, type, tag
MAX_FIDS = 4096
MAX_OPEN = 256
VERSION = b"9P2000.L"

ERROR = 7
_QID = struct.Struct("<BIQ")
_DIRECTORY, _SYMLINK = 0x80, 0x02  # qid types
_READ_HEADER = HEADER.size + 4  # of an answer that has data after a count
_GETATTR_BASIC = 0x7FF

_SYS_OPENAT2 = 437
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x02, 0x04, 0x08
_LIBC = ctypes.CDLL(None, use_errno=True)
_OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | os.O_DSYNC | os.O_SYNC | os.O_DIRECTORY
_REMOVE_FOLDER = 0x200  # AT_REMOVEDIR
_EMPTY_PATH = 0x1000  # AT_EMPTY_PATH
_OFD_GETLK, _OFD_SETLK = 36, 37
_LOCK = struct.Struct("@hhqqi")
# Tsetattr's valid bits
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _CTIME, _ATIME_SET, _MTIME_SET = (1 << bit for bit in range(9))

Path = tuple[bytes, ...]


def _fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass(slots=True)
class Fid:
    path: Path
    fd: int = -1  # once it is open
    flags: int = 0
    names: list[tuple[bytes, int, int]] = field(default_factory=list)  # of a folder: name, type (d_type), inode


class Message:
    """Takes a request apart. OSError EINVAL where it is shorter than it should be."""

    def __init__(self, data: bytes, at: int = HEADER.size) -> None:
        self.data = data
        self.at = at

    def numbers(self, code: str) -> tuple[int, ...]:
        try:
            values = struct.unpack_from(f"<{code}", self.data, self.at)
        except struct.error:
            raise _fail(errno.EINVAL) from None
        self.at += struct.calcsize(f"<{code}")
        return values

    def bytes(self, length: int) -> bytes:
        if self.at + length > len(self.data):
            raise _fail(errno.EINVAL)
        self.at += length
        return self.data[self.at - length : self.at]

    def text(self) -> bytes:
        return self.bytes(self.numbers("H")[0])

    def name(self) -> bytes:
        """A name in a folder: not "..", no path."""
        name = self.text()
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise _fail(errno.EINVAL)
        return name


def _text(data: bytes) -> bytes:
    return struct.pack("<H", len(data)) + data


class Server:
    """Serves the folder open as `root` (closed with it), to be changed or not.

    Nothing is opened that lies on the device `barred` (st_dev): the mount whose own server this is. A guest that waited
    for a file of its own machine would wait for ever.
    """

    def __init__(self, root: int, *, read_only: bool = False, barred: int | None = None) -> None:
        self.root = root
        self.barred = barred
        self.read_only = read_only
        self.fids: dict[int, Fid] = {}
        self.size = MIN_MESSAGE  # of the largest message, once the version is agreed
        self._devices: dict[int, int] = {}

    def handle(self, request: bytes, room: int) -> bytes:
        """The answer to a request, of `room` bytes at most (which are enough for an error: 11)."""
        _, kind, tag = HEADER.unpack_from(request)
        try:
            row = MESSAGES.get(kind)
            if row is None:
                raise _fail(errno.EOPNOTSUPP)
            if row.changes and self.read_only:
                raise _fail(errno.EROFS)
            answer = row.do(self, Message(request), min(room, self.size))
            if HEADER.size + len(answer) > room:
                raise _fail(errno.EMSGSIZE)
            kind += 1
        except OSError as error:
            kind, answer = ERROR, struct.pack("<I", error.errno or errno.EIO)
        except (OverflowError, ValueError):  # a number that Python does not hand to the kernel
            kind, answer = ERROR, struct.pack("<I", errno.EINVAL)
        return HEADER.pack(HEADER.size + len(answer), kind, tag) + answer

    def close(self) -> None:
        self.forget()
        if self.root >= 0:
            os.close(self.root)
            self.root = -1

    def forget(self) -> None:
        for number in list(self.fids):
            self._clunk(number)

    # ---- paths

    def _open(self, path: Path, flags: int) -> int:
        how = struct.pack("<QQQ", flags | os.O_CLOEXEC, 0, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)
        name = b"/".join(path) or b"."
        while True:
            fd = _LIBC.syscall(_SYS_OPENAT2, self.root, ctypes.c_char_p(name), ctypes.c_char_p(how), len(how))
            if fd >= 0:
                if self.barred is not None and os.fstat(fd).st_dev == self.barred:
                    os.close(fd)
                    raise _fail(errno.EACCES)
                return int(fd)
            number = ctypes.get_errno()
            if number == errno.EXDEV:  # out of the folder
                number = errno.EACCES
            if number not in (errno.EINTR, errno.EAGAIN):
                raise _fail(number)

    @contextmanager
    def _at(self, path: Path) -> Iterator[int]:
        """A descriptor that names the file, for no access to its contents."""
        fd = self._open(path, os.O_PATH | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _parent(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """The folder that has it, and its name there."""
        if not path:
            raise _fail(errno.EBUSY)
        fd = self._open(path[:-1], os.O_PATH | os.O_DIRECTORY)
        try:
            yield fd, path[-1]
        finally:
            os.close(fd)

    def _fid(self, number: int) -> Fid:
        if number not in self.fids:
            raise _fail(errno.EBADF)
        return self.fids[number]

    def _opened(self, number: int) -> Fid:
        fid = self._fid(number)
        if fid.fd < 0:
            raise _fail(errno.EBADF)
        return fid

    def _add(self, number: int, fid: Fid) -> None:
        if number in self.fids:
            raise _fail(errno.EBADF)
        if len(self.fids) >= MAX_FIDS:
            raise _fail(errno.EMFILE)
        self.fids[number] = fid

    def _clunk(self, number: int) -> None:
        fid = self.fids.pop(number, None)
        if fid is None:
            raise _fail(errno.EBADF)
        if fid.fd >= 0:
            os.close(fid.fd)

    def _stat(self, fid: Fid) -> os.stat_result:
        if fid.fd >= 0:
            return os.fstat(fid.fd)
        with self._at(fid.path) as fd:
            return os.fstat(fd)

    def _qid(self, status: os.stat_result) -> bytes:
        kind = _DIRECTORY if stat.S_ISDIR(status.st_mode) else _SYMLINK if stat.S_ISLNK(status.st_mode) else 0
        return self._pack_qid(kind, status.st_dev, status.st_ino)

    def _pack_qid(self, kind: int, device: int, inode: int) -> bytes:
        number = self._devices.setdefault(device, len(self._devices))
        return _QID.pack(kind, 0, (inode ^ number << 56) & 0xFFFF_FFFF_FFFF_FFFF)

    def _qid_of(self, path: Path) -> bytes:
        with self._at(path) as fd:
            return self._qid(os.fstat(fd))

    # ---- messages

    def version(self, message: Message, room: int) -> bytes:
        (size,) = message.numbers("I")
        wanted = message.text()
        self.forget()
        self.size = max(min(size, MAX_MESSAGE), MIN_MESSAGE)
        return struct.pack("<I", min(size, self.size)) + _text(VERSION if wanted == VERSION else b"unknown")

    def attach(self, message: Message, room: int) -> bytes:
        number, _ = message.numbers("II")
        qid = self._qid(os.fstat(self.root))
        self._add(number, Fid(()))
        return qid

    def flush(self, message: Message, room: int) -> bytes:
        return b""  # each request is answered before the next one is looked at

    def walk(self, message: Message, room: int) -> bytes:
        number, new, count = message.numbers("IIH")
        path = self._fid(number).path
        qids: list[bytes] = []
        for _ in range(min(count, 16)):
            name = message.text()
            following = path[:-1] if name == b".." else path if name == b"." else (*path, name)
            if b"/" in name or b"\0" in name or not name:
                raise _fail(errno.ENOENT)
            try:
                qids.append(self._qid_of(following))
            except OSError:
                if not qids:
                    raise
                break
            path = following
        if len(qids) == count:
            if new == number:
                fid = self._fid(number)
                if fid.fd >= 0:
                    raise _fail(errno.EBUSY)
                fid.path = path
            else:
                self._add(new, Fid(path))
        return struct.pack("<H", len(qids)) + b"".join(qids)

    def clunk(self, message: Message, room: int) -> bytes:
        self._clunk(message.numbers("I")[0])
        return b""

    def lopen(self, message: Message, room: int) -> bytes:
        number, flags = message.numbers("II")
        fid = self._fid(number)
        if fid.fd >= 0:
            raise _fail(errno.EBADF)
        qid = self._reopen(fid, flags)
        return qid + bytes(4)

    def _reopen(self, fid: Fid, flags: int) -> bytes:
        if self.read_only and (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC):
            raise _fail(errno.EROFS)
        if sum(one.fd >= 0 for one in self.fids.values()) >= MAX_OPEN:
            raise _fail(errno.EMFILE)
        with self._at(fid.path) as fd:
            status = os.fstat(fd)
            if stat.S_ISLNK(status.st_mode):
                raise _fail(errno.ELOOP)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise _fail(errno.ENXIO)  # to open a FIFO or a device has effects of its own
            # By this name it is the file that was looked at, whatever its path leads to now.
            flags &= _OPEN_FLAGS
            fid.fd = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
            fid.flags = flags & ~os.O_TRUNC
        return self._qid(status)

    def lcreate(self, message: Message, room: int) -> bytes:
        (number,) = message.numbers("I")
        name = message.name()
        flags, mode, _ = message.numbers("III")
        fid = self._fid(number)
        if fid.fd >= 0:
            raise _fail(errno.EBADF)
        if sum(one.fd >= 0 for one in self.fids.values()) >= MAX_OPEN:
            raise _fail(errno.EMFILE)
        path = (*fid.path, name)
        with self._parent(path) as (folder, name):
            # A file that is there already is opened if it is one; the client has asked for O_EXCL if it minds.
            how = flags & _OPEN_FLAGS & ~os.O_DIRECTORY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            try:
                fd = os.open(name, how, _bits(mode), dir_fd=folder)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                new = Fid(path)
                qid = self._reopen(new, flags)
                self.fids[number] = new
                return qid + bytes(4)
        fid.path, fid.fd, fid.flags = path, fd, flags & _OPEN_FLAGS & ~os.O_TRUNC
        os.fchmod(fd, _bits(mode))  # the server's umask is not the guest's
        return self._qid(os.fstat(fd)) + bytes(4)

    def read(self, message: Message, room: int) -> bytes:
        number, offset, count = message.numbers("IQI")
        fd = self._opened(number).fd
        data = os.pread(fd, max(min(count, room - _READ_HEADER), 0), _signed(offset))
        return struct.pack("<I", len(data)) + data

    def write(self, message: Message, room: int) -> bytes:
        number, offset, count = message.numbers("IQI")
        data = message.bytes(count)
        return struct.pack("<I", os.pwrite(self._opened(number).fd, data, _signed(offset)))

    def fsync(self, message: Message, room: int) -> bytes:
        (number,) = message.numbers("I")
        fd = self._opened(number).fd
        has_more = message.at + 4 <= len(message.data)  # older clients do not send it
        if has_more and message.numbers("I")[0]:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
        return b""

    def readdir(self, message: Message, room: int) -> bytes:
        number, offset, count = message.numbers("IQI")
        fid = self._opened(number)
        if offset == 0:
            here = os.fstat(fid.fd).st_ino
            fid.names = [(b".", 4, here), (b"..", 4, here)]
            with os.scandir(fid.fd) as entries:
                fid.names += [(os.fsencode(one.name), _type_of(one), one.inode()) for one in entries]
        device = os.fstat(fid.fd).st_dev
        left = min(count, room - _READ_HEADER)
        parts = []
        for at in range(offset, len(fid.names)):
            name, kind, inode = fid.names[at]
            qid_kind = _DIRECTORY if kind == 4 else _SYMLINK if kind == 10 else 0
            entry = self._pack_qid(qid_kind, device, inode) + struct.pack("<QB", at + 1, kind) + _text(name)
            if len(entry) > left:
                break
            left -= len(entry)
            parts.append(entry)
        data = b"".join(parts)
        return struct.pack("<I", len(data)) + data

    def getattr(self, message: Message, room: int) -> bytes:
        (number, _) = message.numbers("IQ")
        status = self._stat(self._fid(number))
        times = []
        for nanoseconds in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns, 0):
            times += divmod(nanoseconds, 1_000_000_000)
        return (
            struct.pack("<Q", _GETATTR_BASIC)
            + self._qid(status)
            + struct.pack("<IIIQQQQQ", status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_rdev,
                          status.st_size, status.st_blksize, status.st_blocks)
            + struct.pack("<8q", *times)
            + bytes(16)
        )  # fmt: skip

    def setattr(self, message: Message, room: int) -> bytes:
        number, valid, mode, uid, gid, size, atime, atime_ns, mtime, mtime_ns = message.numbers("IIIIIQQQQQ")
        fid = self._fid(number)
        with self._at(fid.path) as fd:  # looked at and changed by one descriptor: a path may lead elsewhere meanwhile
            status = os.fstat(fd)
            if valid & _MODE:
                if mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISDIR(status.st_mode):
                    raise _fail(errno.EPERM)
                os.chmod(f"/proc/self/fd/{fd}", mode & 0o7777)
            if valid & (_UID | _GID):
                _chown(fd, uid if valid & _UID else -1, gid if valid & _GID else -1)
            if valid & _SIZE:
                if not stat.S_ISREG(status.st_mode):
                    raise _fail(errno.EINVAL)
                if fid.fd >= 0 and fid.flags & os.O_ACCMODE != os.O_RDONLY:
                    os.ftruncate(fid.fd, _signed(size))
                else:
                    os.truncate(f"/proc/self/fd/{fd}", _signed(size))
            if valid & (_ATIME | _MTIME):
                self._set_times(fid, status, valid, atime, atime_ns, mtime, mtime_ns)
        return b""

    def _set_times(
        self, fid: Fid, status: os.stat_result, valid: int, atime: int, atime_ns: int, mtime: int, mtime_ns: int
    ) -> None:
        now = time.time_ns()
        given = [
            ((seconds * 10**9 + rest) if valid & is_set else now) if valid & bit else old
            for bit, is_set, seconds, rest, old in (
                (_ATIME, _ATIME_SET, atime, atime_ns, status.st_atime_ns),
                (_MTIME, _MTIME_SET, mtime, mtime_ns, status.st_mtime_ns),
            )
        ]
        if max(given) >= 1 << 63 or atime_ns >= 10**9 or mtime_ns >= 10**9:
            raise _fail(errno.EINVAL)
        with self._parent(fid.path) as (folder, name):
            os.utime(name, ns=(given[0], given[1]), dir_fd=folder, follow_symlinks=False)

    def statfs(self, message: Message, room: int) -> bytes:
        self._fid(message.numbers("I")[0])
        found = os.fstatvfs(self.root)
        return struct.pack("<IIQQQQQQI", 0x0102_1997, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail,
                           found.f_files, found.f_ffree, found.f_fsid & 0xFFFF_FFFF_FFFF_FFFF,
                           found.f_namemax)  # fmt: skip

    def mkdir(self, message: Message, room: int) -> bytes:
        path = (*self._fid(message.numbers("I")[0]).path, message.name())
        mode, _ = message.numbers("II")
        with self._parent(path) as (folder, name):
            os.mkdir(name, mode & 0o1777, dir_fd=folder)
        with self._at(path) as fd:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):  # else somebody has put something else in its place
                os.chmod(f"/proc/self/fd/{fd}", mode & 0o1777)
            return self._qid(status)

    def symlink(self, message: Message, room: int) -> bytes:
        path = (*self._fid(message.numbers("I")[0]).path, message.name())
        target = message.text()
        if not target or b"\0" in target:
            raise _fail(errno.ENOENT)
        with self._parent(path) as (folder, name):
            os.symlink(target, name, dir_fd=folder)
        return self._qid_of(path)

    def readlink(self, message: Message, room: int) -> bytes:
        fid = self._fid(message.numbers("I")[0])
        with self._parent(fid.path) as (folder, name):
            return _text(os.readlink(name, dir_fd=folder))

    def mknod(self, message: Message, room: int) -> bytes:
        path = (*self._fid(message.numbers("I")[0]).path, message.name())
        mode, _, _, _ = message.numbers("IIII")
        if stat.S_IFMT(mode) not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise _fail(errno.EPERM)
        with self._parent(path) as (folder, name):
            os.mknod(name, stat.S_IFMT(mode) | _bits(mode), dir_fd=folder)
        return self._qid_of(path)

    def link(self, message: Message, room: int) -> bytes:
        folder_number, number = message.numbers("II")
        path = (*self._fid(folder_number).path, message.name())
        with self._parent(self._fid(number).path) as (old, old_name), self._parent(path) as (new, new_name):
            os.link(old_name, new_name, src_dir_fd=old, dst_dir_fd=new, follow_symlinks=False)
        return b""

    def renameat(self, message: Message, room: int) -> bytes:
        old = (*self._fid(message.numbers("I")[0]).path, message.name())
        new = (*self._fid(message.numbers("I")[0]).path, message.name())
        self._rename(old, new)
        return b""

    def rename(self, message: Message, room: int) -> bytes:
        number, folder = message.numbers("II")
        self._rename(self._fid(number).path, (*self._fid(folder).path, message.name()))
        return b""

    def _rename(self, old: Path, new: Path) -> None:
        with self._parent(old) as (old_folder, old_name), self._parent(new) as (new_folder, new_name):
            os.rename(old_name, new_name, src_dir_fd=old_folder, dst_dir_fd=new_folder)
        for fid in self.fids.values():
            if fid.path[: len(old)] == old:
                fid.path = new + fid.path[len(old) :]

    def unlinkat(self, message: Message, room: int) -> bytes:
        path = (*self._fid(message.numbers("I")[0]).path, message.name())
        (flags,) = message.numbers("I")
        with self._parent(path) as (folder, name):
            (os.rmdir if flags & _REMOVE_FOLDER else os.unlink)(name, dir_fd=folder)
        return b""

    def remove(self, message: Message, room: int) -> bytes:
        (number,) = message.numbers("I")
        fid = self._fid(number)
        try:
            is_folder = stat.S_ISDIR(self._stat(fid).st_mode)
            with self._parent(fid.path) as (folder, name):
                (os.rmdir if is_folder else os.unlink)(name, dir_fd=folder)
        finally:
            self._clunk(number)  # whether or not it could be removed
        return b""

    def lock(self, message: Message, room: int) -> bytes:
        number, kind, _, start, length, _ = message.numbers("IBIQQI")
        fd = self._opened(number).fd
        if kind > 2:
            raise _fail(errno.EINVAL)
        try:
            fcntl.fcntl(fd, _OFD_SETLK, _LOCK.pack(kind, 0, _signed(start), _signed(length), 0))
        except BlockingIOError:
            return b"\1"  # somebody else has it: the client asks again
        return b"\0"

    def getlock(self, message: Message, room: int) -> bytes:
        number, kind, start, length, owner = message.numbers("IBQQI")
        client = message.text()
        fd = self._opened(number).fd
        if kind > 2:
            raise _fail(errno.EINVAL)
        found = fcntl.fcntl(fd, _OFD_GETLK, _LOCK.pack(kind, 0, _signed(start), _signed(length), 0))
        kind, _, start, length, _ = _LOCK.unpack(found)
        return struct.pack("<BQQI", kind, start, length, owner) + _text(client)

    # ---- state

    def save(self) -> dict[str, Any]:
        """Without what is locked. Files that were unlinked while open cannot be had again."""
        fids = [[number, list(fid.path), fid.flags if fid.fd >= 0 else -1] for number, fid in self.fids.items()]
        return {"size": self.size, "fids": fids}

    def load(self, state: dict[str, Any]) -> None:
        """Fids whose path is not there any more are not there either: the client gets EBADF."""
        self.forget()
        self.size = max(min(int(state["size"]), MAX_MESSAGE), MIN_MESSAGE)
        for number, path, flags in state["fids"][:MAX_FIDS]:
            fid = Fid(tuple(bytes(name) for name in path))
            if any(name in (b"", b".", b"..") or b"/" in name or b"\0" in name for name in fid.path):
                continue
            try:
                if flags >= 0:
                    self._reopen(fid, flags)
            except OSError:
                continue
            self.fids[number] = fid


def _chown(fd: int, uid: int, gid: int) -> None:
    """Of what an O_PATH descriptor names, be it a symbolic link."""
    if _LIBC.fchownat(fd, b"", uid, gid, _EMPTY_PATH):
        raise _fail(ctypes.get_errno())


def _bits(mode: int) -> int:
    """Permissions of a new file: never set-user-ID."""
    return mode & 0o1777


def _signed(number: int) -> int:
    """An offset, or OSError EINVAL."""
    if number >= 1 << 63:
        raise _fail(errno.EINVAL)
    return number


def _type_of(entry: os.DirEntry[str]) -> int:
    """d_type: 4 a folder, 10 a symbolic link, 8 a file, 0 another."""
    if entry.is_symlink():
        return 10
    return 4 if entry.is_dir(follow_symlinks=False) else 8 if entry.is_file(follow_symlinks=False) else 0


@dataclass(frozen=True, slots=True)
class Row:
    do: Callable[[Server, Message, int], bytes]
    changes: bool = False  # refused where the folder is read-only


MESSAGES: Mapping[int, Row] = {
    8: Row(Server.statfs),
    12: Row(Server.lopen),
    14: Row(Server.lcreate, True),
    16: Row(Server.symlink, True),
    18: Row(Server.mknod, True),
    20: Row(Server.rename, True),
    22: Row(Server.readlink),
    24: Row(Server.getattr),
    26: Row(Server.setattr, True),
    40: Row(Server.readdir),
    50: Row(Server.fsync),
    52: Row(Server.lock),
    54: Row(Server.getlock),
    70: Row(Server.link, True),
    72: Row(Server.mkdir, True),
    74: Row(Server.renameat, True),
    76: Row(Server.unlinkat, True),
    100: Row(Server.version),
    104: Row(Server.attach),
    108: Row(Server.flush),
    110: Row(Server.walk),
    116: Row(Server.read),
    118: Row(Server.write, True),
    120: Row(Server.clunk),
    122: Row(Server.remove, True),
}
