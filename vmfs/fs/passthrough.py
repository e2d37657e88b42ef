"""Memory that the kernel serves: reads, writes and mappings go to a memfd and never reach the server.

Then the memfd answers, not the server: a write past its end makes it grow, or, if it is sealed (F_SEAL_GROW),
fails with EPERM, after a short write where it starts before the end. Where that must be another errno
(EFBIG), answer the open with direct_io set: mappings stay live, while reads and writes come to the server.
Opens of either sort may be mixed.

The size that stat and the page offsets of a mapping go by is the server's: getattr tells the memfd's.

Source: Documentation/filesystems/fuse/fuse-passthrough.rst; fs/fuse/iomode.c for what opens may be mixed.
"""

import logging

from vmfs.fs.hooks import _fuse

log = logging.getLogger(__name__)


class Backing:
    """The backing file of one inode, for as long as the inode lives.

    The kernel refuses (EIO) an open that passes through while another of the same inode goes through the page
    cache, or to another backing file. So the first open settles it for all later ones.
    """

    def __init__(self, fd):
        """fd: an open regular file (a memfd), read at the first open; it remains the owner's to close."""
        self._fd = fd
        self._id = None         # None: not settled; 0: page cache; else the kernel's id

    def answer_open(self, unique=None):
        """In an open handler: its answer lets the kernel serve the file.

        False, with nothing changed, where that cannot be: the handler then answers as for any other file.
        unique: an open's that is not the one which the running task serves.
        """
        if self._id is None:
            self._id = self._open()
        if not self._id:
            return False
        if unique is None:
            _fuse.passthrough_next_open(self._id)
        else:
            _fuse.passthrough_open(unique, self._id)
        return True

    def _open(self):
        if not _fuse.passthrough_available():
            return 0
        try:
            return _fuse.backing_open(self._fd)
        except OSError as error:
            log.warning("memory goes through the page cache: %s", error)
            return 0

    def close(self):
        """The inode is gone. Files still open keep the memory; a new open would not pass through."""
        number, self._id = self._id, 0
        if number:
            _fuse.backing_close(number)
