"""Host paths that a write names are opened with the writer's rights, never with the server's.

So is whatever else a write asks of the host. A thread of its own becomes the writer (setresuid(2) and its siblings as
raw system calls, which act on one thread and take its capabilities), does the work, and ends. Who the writer is, is
looked up in /proc when the command file is opened: its opener waits for the answer then, so the process is there
and is the right one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from vmfs.words.errors import Invalid, NotPermitted, VmfsError, known

_LIBC = ctypes.CDLL(None, use_errno=True)
# Raw system calls act on the calling thread; glibc's wrappers act on all threads. x86-64 numbers.
_SETGROUPS, _SETRESUID, _SETRESGID = 116, 117, 119

T = TypeVar("T")


class HostError(VmfsError):
    """A host path could not be opened: the errno that the writer would have got."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of a process, as the kernel checks paths with them."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def credentials_of(pid: int) -> Credentials | None:
    """Of a running process or thread, or None where it is not visible from here. LimitReached without a descriptor."""
    try:
        with open(f"/proc/{pid}/status") as status:
            fields = dict(line.split(":", 1) for line in status if ":" in line)
        uid, gid = int(fields["Uid"].split()[3]), int(fields["Gid"].split()[3])
        return Credentials(uid, gid, tuple(map(int, fields["Groups"].split())))
    except (OSError, KeyError, ValueError, IndexError) as error:
        if (failure := known(error)) is not error:
            raise failure from None
        return None


def as_user(who: Credentials | None, work: Callable[[], T]) -> T:
    """What `work` returns, or raises, when `who` does it. Blocks.

    NotPermitted where the server cannot take the writer's place.
    """
    if who is None:
        raise NotPermitted("the writer is not to be seen in /proc: nothing of the host can be opened for it")
    future: Future[T] = Future()

    def run() -> None:
        try:
            _become(who)
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="vmfs-as-user", daemon=True)  # a share keeps its own
    thread.start()
    thread.join()
    return future.result()


def open_path(path: str, flags: int, own_device: int | None = None) -> int:
    """open(2) of an absolute path, by whoever calls; never blocks on a FIFO. HostError with open's errno.

    Not on the mount itself, whose st_dev is `own_device`: Invalid.
    """
    if not path.startswith("/") or "\0" in path:
        raise Invalid(f"{path[:200]!r} is not an absolute path")
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        failure = HostError(f"{path}: {os.strerror(error.errno or errno.EIO)}")
        failure.errno = error.errno or errno.EIO
        raise failure from None
    if own_device is not None and os.fstat(fd).st_dev == own_device:
        os.close(fd)
        raise own_path(path)
    return fd


def own_path(path: str) -> Invalid:
    """Why a path on the mount itself is refused."""
    return Invalid(f"{path} is on this mount itself: its server would wait for its own answers")


def _become(who: Credentials) -> None:
    """This thread is `who` from now on."""
    if os.geteuid() == who.uid:
        if who.uid == 0 and os.getegid() == who.gid:
            return
        if who.uid != 0:
            return  # the server's own user
    if os.geteuid() != 0:
        raise NotPermitted("the server is another user: nothing of the host can be opened for the writer")
    groups = (ctypes.c_uint32 * len(who.groups))(*who.groups)
    uid, gid = ctypes.c_uint32(who.uid), ctypes.c_uint32(who.gid)
    for call in (
        (_SETGROUPS, ctypes.c_size_t(len(who.groups)), groups),
        (_SETRESGID, gid, gid, gid),
        (_SETRESUID, uid, uid, uid),
    ):
        if _LIBC.syscall(*call) != 0:
            raise NotPermitted(f"the server cannot take the writer's place: {os.strerror(ctypes.get_errno())}")
