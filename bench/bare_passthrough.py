"""The peer of reads of `mem`: a file system with one file of 128 MiB that the kernel serves from a memfd, and no
vmfs but the hook that lets pyfuse3 say so. What it costs over the memfd is the kernel's FUSE passthrough alone.

    python -m bench.bare_passthrough MOUNTPOINT     as bench.bare_fuse
"""

import errno
import os
import stat
import sys

import trio

from vmfs.fs.hooks import pyfuse3
from vmfs.fs.passthrough import Backing

NAME = b"mem"
SIZE = 128 << 20
FILE_INODE = pyfuse3.ROOT_INODE + 1


class OneFile(pyfuse3.Operations):
    def __init__(self):
        super().__init__()
        fd = os.memfd_create("bare")
        os.ftruncate(fd, SIZE)
        self.backing = Backing(fd)

    async def getattr(self, inode, ctx=None):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o755
        else:
            entry.st_mode = stat.S_IFREG | 0o644
            entry.st_size = SIZE
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        return entry

    async def lookup(self, parent_inode, name, ctx=None):
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE_INODE)

    async def open(self, inode, flags, ctx):
        if not self.backing.answer_open():
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        return pyfuse3.FileInfo(fh=inode)


def main() -> None:
    options = set(pyfuse3.default_options) | {"fsname=bare"}
    pyfuse3.init(OneFile(), sys.argv[1], options)
    print("ready", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
