"""Host paths that a write names are opened with the writer's rights, never with the server's.

The kernel checks a path by the file system uid, gid and groups of the thread that opens it (setfsuid(2)), and takes
the capabilities that override permissions from a thread whose fsuid stops being 0. So a thread of its own becomes the
writer in that sense, opens, and ends. Who the writer is, is looked up in /proc when the command file is opened: its
opener waits for the answer then, so the process is there and is the right one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from dataclasses import dataclass

from vmfs.errors import Invalid, NotPermitted, VmfsError

_LIBC = ctypes.CDLL(None, use_errno=True)
# Raw system calls act on the calling thread; glibc's wrappers act on all threads. x86-64 numbers.
_SETGROUPS, _SETFSUID, _SETFSGID = 116, 122, 123


class HostError(VmfsError):
    """A host path could not be opened: the errno that the writer would have got."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of a process, as the kernel checks paths with them."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def credentials_of(pid: int) -> Credentials | None:
    """Of a running process or thread, or None where it is not visible from here."""
    try:
        with open(f"/proc/{pid}/status") as status:
            fields = dict(line.split(":", 1) for line in status if ":" in line)
        uid, gid = int(fields["Uid"].split()[3]), int(fields["Gid"].split()[3])
        return Credentials(uid, gid, tuple(map(int, fields["Groups"].split())))
    except (OSError, KeyError, ValueError, IndexError):
        return None


def open_as(who: Credentials | None, path: str, flags: int) -> int:
    """open(2) of an absolute path as `who`. Blocks; never on a FIFO.

    HostError with open's errno; NotPermitted where the server cannot take the writer's place.
    """
    if not path.startswith("/"):
        raise Invalid(f"{path[:200]!r} is not an absolute path")
    if "\0" in path:
        raise Invalid("there is a NUL in the path")
    if who is None:
        raise NotPermitted("the writer is not to be seen in /proc: a path cannot be opened for it")
    result: list[int | OSError] = []

    def work() -> None:
        try:
            _become(who)
            result.append(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=work, name="vmfs-open")
    thread.start()
    thread.join()
    outcome = result[0]
    if isinstance(outcome, OSError):
        failure = HostError(f"{path}: {os.strerror(outcome.errno or errno.EIO)}")
        failure.errno = outcome.errno or errno.EIO
        raise failure
    return outcome


def _become(who: Credentials) -> None:
    """This thread checks paths as `who` from now on."""
    if (os.geteuid(), os.getegid()) == (who.uid, who.gid) and who.uid != 0:
        return
    if os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "the server is another user")
    groups = (ctypes.c_uint32 * len(who.groups))(*who.groups)
    if _LIBC.syscall(_SETGROUPS, ctypes.c_size_t(len(who.groups)), groups) != 0:
        raise PermissionError(ctypes.get_errno(), "setgroups")
    # They return the id before; asked for an id that is none, they change nothing.
    for number, wanted in ((_SETFSGID, who.gid), (_SETFSUID, who.uid)):
        _LIBC.syscall(number, ctypes.c_uint32(wanted))
        if _LIBC.syscall(number, ctypes.c_uint32(0xFFFF_FFFF)) != wanted:
            raise PermissionError(errno.EPERM, "setfsuid")
