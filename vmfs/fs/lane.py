"""The lane, for one machine: which of its open files are answered by the C thread (lane.c), and the page for it."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Mapping
from typing import Any

import trio

from vmfs.fs.hooks import _fuse, pyfuse3
from vmfs.fs.ring import Ring, sealed_memory
from vmfs.host.process import MachineProcess
from vmfs.words import commands
from vmfs.words.errors import VmfsError

log = logging.getLogger(__name__)

SECOND = 1_000_000_000  # nanoseconds
SIZE = 4096  # LANE_SIZE of vmfs/words/lane.h
# enum lane_file there
_NAMES = (
    "regs", "sregs", "exit.data", "exit.bin", "state", "vm_run.bin", "vm_run", "irq", "trace", "trace.bin", "restore",
)  # fmt: skip
FILES: Mapping[str, int] = {name: number for number, name in enumerate(_NAMES)}
STILL = frozenset(_NAMES[:5])  # what they give is the same while the CPU stands still
USES = 3  # an open is one, and so is a read: from then on a machine has a page
ANSWER_SECONDS = 2.0  # that a machine has to take the page


_FLUSH, _GETATTR = 25, 3  # enum fuse_opcode
_ATTR_OUT = struct.Struct("<Q8x6Q10I")  # struct fuse_attr_out


def keep_closing(number: int, nothing: bool) -> None:
    """Whether a close of that open file has nothing to do: then Python does not hear of it, until that changes."""
    _fuse.lane_keep(_FLUSH, number, b"" if nothing else None)


def keep_attributes(number: int, entry: pyfuse3.EntryAttributes | None) -> None:
    """The attributes of an inode, while they are as now. None: Python is asked for them."""
    if entry is None:
        _fuse.lane_keep(_GETATTR, number, None)
        return
    times = entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns
    answer = _ATTR_OUT.pack(
        int(entry.attr_timeout), entry.st_ino, entry.st_size, entry.st_blocks,
        *(time // SECOND for time in times), *(time % SECOND for time in times),
        entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, 0, entry.st_blksize, 0,
    )  # fmt: skip
    _fuse.lane_keep(_GETATTR, number, answer)


class MachineLane:
    """Of one machine. A machine without a page is served as ever."""

    def __init__(self, machine: MachineProcess) -> None:
        self._machine = machine
        self._page: Any = None
        self._tried = False
        self._uses = 0

    def used(self) -> None:
        """A file that a page could answer was used once more. Most machines are run once, and need none."""
        self._uses += 1
        if self._uses >= USES:
            self.prepare()

    def prepare(self) -> None:
        """Have the page, where there can be one. Until the machine has it, too, Python answers what is asked."""
        if self._tried or not _fuse.lane_serves():
            return
        self._tried = True
        try:
            fd = sealed_memory("vmfs-lane", SIZE)
        except OSError as error:
            log.warning("a machine has no lane: %s", error)
            return
        try:
            self._page = _fuse.lane_map(fd)
        except OSError as error:
            os.close(fd)
            log.warning("a machine has no lane: %s", error)
            return
        trio.lowlevel.spawn_system_task(self._share, fd)

    async def _share(self, fd: int) -> None:
        try:
            with trio.fail_after(ANSWER_SECONDS):
                await self._machine.call(commands.Lane, send=(fd,))
        except (VmfsError, trio.TooSlowError) as error:
            log.warning("a machine has no lane: %s", error)
            self.close()
        finally:
            os.close(fd)

    def add(self, number: int, name: str, handle: int, written: bool) -> bool:
        """The open file `number` of the mount is `handle` of the machine. Whether the lane has it."""
        if self._page is None or name not in FILES:
            return False
        return _fuse.lane_add(number, self._page, FILES[name], handle, written)

    def add_stream(self, number: int, name: str, ring: Ring) -> bool:
        """The open file `number` is read by that ring. Whether the lane has it."""
        return self._page is not None and _fuse.lane_add_stream(number, self._page, FILES[name], ring.opaque)

    def forget(self, number: int) -> None:
        _fuse.lane_forget(number)

    @property
    def is_ready(self) -> bool:
        """Whether there is a page."""
        return self._page is not None

    def still(self) -> int | None:
        """The same number while the CPU stands still; None where the page does not say so."""
        return None if self._page is None else _fuse.lane_still(self._page)

    def seen(self, number: int) -> int:
        """What a read by the lane has seen of the news of that open file."""
        return _fuse.lane_seen(number)

    def leave(self, about: object) -> None:
        """Leave to Python the files that a complaint is about, so that it hears when they succeed. None: no more."""
        if self._page is not None:
            verb, name = about if isinstance(about, tuple) else (None, None)
            file = 1 << FILES[name] if name in FILES else 0
            _fuse.lane_leave(self._page, file if verb == "read" else 0, file if verb == "write" else 0)

    @property
    def written_ns(self) -> int:
        """When the lane last did a write."""
        return 0 if self._page is None else _fuse.lane_counts(self._page)[4]

    def facts(self) -> dict[str, object]:
        """What `stat` shows of it."""
        reads, runs, writes, left, _ = _fuse.lane_counts(self._page) if self._page is not None else (0, 0, 0, 0, 0)
        return {"lane_reads": reads, "lane_runs": runs, "lane_writes": writes, "lane_left": left}

    def close(self) -> None:
        """Nothing is answered without the machine any more."""
        page, self._page, self._tried = self._page, None, True
        if page is not None:
            _fuse.lane_close(page)
