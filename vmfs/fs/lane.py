"""The lane, for one machine: which of its open files are answered by the C thread (lane.c), and the page for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import trio

from vmfs.fs.hooks import _fuse
from vmfs.fs.ring import Ring, sealed_memory
from vmfs.host.process import MachineProcess
from vmfs.words import commands
from vmfs.words.errors import VmfsError

log = logging.getLogger(__name__)

SIZE = 4096  # LANE_SIZE of vmfs/words/lane.h
# enum lane_file there
_NAMES = ("regs", "sregs", "exit.data", "exit.bin", "state", "vm_run.bin", "vm_run", "irq", "trace", "trace.bin")
FILES: Mapping[str, int] = {name: number for number, name in enumerate(_NAMES)}
STILL = frozenset(_NAMES[:5])  # what they give is the same while the CPU stands still
ANSWER_SECONDS = 2.0  # that a machine has to take the page


class MachineLane:
    """Of one machine. A machine without a page is served as ever."""

    def __init__(self, machine: MachineProcess) -> None:
        self._machine = machine
        self._page: Any = None
        self._tried = False

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
