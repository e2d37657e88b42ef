"""The FUSE device of the mount, for what pyfuse3 has no call for: dropping a range of a file's cache, and
seeing an abort. Messages: Linux include/uapi/linux/fuse.h; Documentation/filesystems/fuse/fuse.rst."""

from __future__ import annotations

import os
import select
import stat
import struct

_INVAL_INODE = 2  # enum fuse_notify_code
_OUT_HEADER = struct.Struct("<IiQ")  # struct fuse_out_header: len, error (here: code), unique (0)
_INVAL_INODE_OUT = struct.Struct("<Qqq")  # struct fuse_notify_inval_inode_out: ino, off, len
_DEVICE = os.makedev(10, 229)  # Linux include/linux/miscdevice.h: MISC_MAJOR, FUSE_MINOR


class Connection:
    """A descriptor of the mount's own FUSE device."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._errors = select.poll()
        self._errors.register(fd, 0)

    def aborted(self) -> bool:
        """Whether the kernel has given the mount up (umount -f, or /sys/fs/fuse/connections/N/abort)."""
        return bool(self._errors.poll(0))

    def invalidate(self, inode: int, offset: int = 0, length: int = 0) -> None:
        """Write back and drop the pages of a file's cache that hold these bytes; `length` 0 is to the end.

        Blocks until the server has answered the writes: never on the trio loop. OSError: ENOENT where the
        kernel does not know the inode.
        """
        body = _INVAL_INODE_OUT.pack(inode, offset, length)
        os.write(self._fd, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), _INVAL_INODE, 0) + body)

    def close(self) -> None:
        os.close(self._fd)


def fuse_descriptors() -> set[int]:
    """Those of this process that are FUSE devices. A new one after a mount is the mount's."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:  # the descriptor of the listing itself
            continue
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _DEVICE:  # whatever its path, as in a container
            found.add(int(name))
    return found
