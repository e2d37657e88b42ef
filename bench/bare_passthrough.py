"""The peer of reads of `mem`: a file system with one file of 128 MiB that the kernel serves from a memfd, and no
vmfs but the hook that lets pyfuse3 say so. What it costs over the memfd is the kernel's FUSE passthrough alone.

    python -m bench.bare_passthrough MOUNTPOINT     as bench.bare_fuse
"""

import errno
import os

# isort: off
from vmfs.fs.hooks import pyfuse3  # before anything else imports pyfuse3
from bench.bare_fuse import OneFile, serve
# isort: on
from vmfs.fs.passthrough import Backing

SIZE = 128 << 20


class PassedFile(OneFile):
    def __init__(self):
        super().__init__(b"mem", SIZE)
        fd = os.memfd_create("bare")
        os.ftruncate(fd, SIZE)
        self.backing = Backing(fd)

    async def open(self, inode, flags, ctx):
        if not self.backing.answer_open():
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        return pyfuse3.FileInfo(fh=inode)


if __name__ == "__main__":
    serve(PassedFile())
