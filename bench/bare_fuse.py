"""The peer of the file benchmarks: a file system of pyfuse3 alone, with one file of 8 bytes.

    python -m bench.bare_fuse MOUNTPOINT     serves until it is unmounted; prints "ready" when mounted

It does the least that a pyfuse3 file can: a read handler that slices bytes.
"""

import errno
import os
import stat
import sys

import pyfuse3
import trio

CONTENT = bytes(range(8))
FILE_INODE = pyfuse3.ROOT_INODE + 1


class OneFile(pyfuse3.Operations):
    """A folder with a file; how that is read is up to a subclass."""

    def __init__(self, name, size):
        super().__init__()
        self.name, self.size = name, size

    async def getattr(self, inode, ctx=None):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o755
        else:
            entry.st_mode = stat.S_IFREG | 0o644
            entry.st_size = self.size
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        return entry

    async def lookup(self, parent_inode, name, ctx=None):
        if name != self.name:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE_INODE)


class Eight(OneFile):
    def __init__(self):
        super().__init__(b"eight", len(CONTENT))

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh, off, size):
        return CONTENT[off : off + size]


def serve(operations: OneFile) -> None:
    options = set(pyfuse3.default_options) | {"fsname=bare"}
    pyfuse3.init(operations, sys.argv[1], options)
    print("ready", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    serve(Eight())
