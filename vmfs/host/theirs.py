"""Memory of another user's process, taken without trust.

A machine's process says by which number it has the descriptor of a memfd. The server opens that memfd anew. To take a
descriptor from it would not do: it may be of a file whose close waits for its user's file system, or for its socket's
peer, and closing, or dropping, it is all that could be done about that.

Source: proc_pid_fd(5), proc_pid_fdinfo(5) (mnt_id), open(2) (O_PATH): nothing here makes the kernel ask a file system,
until it is known to be the kernel's own, of which memfds are.
"""

from __future__ import annotations

import functools
import os

from vmfs.words.errors import ProcessFailed, known


def open_memory(pid: int, number: int) -> int:
    """A descriptor of the memfd that process `pid` has as `number`. ProcessFailed where that is none."""
    try:
        path = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
        try:
            if _mount_of(path) == _mount_of_memory():
                return os.open(f"/proc/self/fd/{path}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(path)
    except OSError as error:
        if (failure := known(error)) is not error:
            raise failure from None
    raise ProcessFailed("what the machine's process calls its memory is none")


def _mount_of(fd: int) -> bytes:
    with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as lines:
        return dict(line.split(b":", 1) for line in lines.read(4096).splitlines())[b"mnt_id"].strip()


@functools.cache
def _mount_of_memory() -> bytes:
    """The kernel's own mount, which nobody else can make files in but by memfd_create(2) and shmget(2)."""
    fd = os.memfd_create("vmfs-probe", os.MFD_CLOEXEC)
    try:
        return _mount_of(fd)
    finally:
        os.close(fd)
