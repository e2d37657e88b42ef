"""A spare: a process that is to be a machine's as soon as there is one that needs it.

To fork it, and to have what it will use in pages of its own, is most of what a machine's birth takes. So the zygote
has one that has done so, and has RAM and a CPU, but has no user yet, and waits for the first word of its channel. That
says whose it is (`commands.Become`); it becomes that user, goes into the rest of its sandbox, and is the machine,
before it has read anything of anybody's.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import trio

from vmfs.engine.base import Engine
from vmfs.host import _multiply
from vmfs.host.credentials import Credentials
from vmfs.host.sandbox import Sandbox
from vmfs.words import commands

log = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT = 4 << 20  # bytes
_MADV_MERGEABLE = 12
_ONE_TASK = 3  # links of /proc/PID/task (proc(5)): one, ., and that in /proc/PID


@dataclass(frozen=True, slots=True)
class Kind:
    """What a spare can be made for: machines as they are made."""

    engine: str
    memory_size: int


def main(
    channel: socket.socket,
    sandbox: Sandbox,
    kind: Kind,
    engine: Engine,
    engine_named: Callable[[str], Engine],
    *,
    ahead: bool,
    multiplies: bool = False,
) -> None:
    """The spare's life, and the machine's. `ahead`: nobody waits yet. `multiplies`: it is a template."""
    engine.prepare_process()
    if ahead:
        _live_before(engine, engine_named)
    multiplier = Multiplier(sandbox) if multiplies else None
    sandbox.seclude(multiplies=multiplies)
    if ahead:
        sandbox.rehearse()
    trio.run(_live, channel, sandbox, kind, engine, engine_named, multiplier)
    logging.shutdown()
    os._exit(0)  # threads of a CPU that did not stop, or of a device, are not waited for


class Multiplier:
    """By which a template forks (_multiply.c). Pages that it and its forks have of their own the kernel may merge where
    they are equal, if the host's administrator has turned that on (KSM): what one fork writes, its siblings write, too.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        """Before it is secluded."""
        self._sandbox = sandbox
        self._tasks = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._maps = open("/proc/self/maps", "rb")

    def __call__(self, channel: int, first: int) -> None:
        """In the main task of trio, while all other tasks wait for other tasks. Returns in each child, whose `channel`
        is that of the server; RuntimeError in this process, or AttributeError where trio is another one than this is
        for."""
        runner = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        waiting = runner.io_manager
        pairs = [
            (one.wakeup_sock.fileno(), one.write_sock.fileno())
            for one in (runner.entry_queue.wakeup, waiting._force_wakeup)
        ]
        gc.collect()
        gc.freeze()
        if os.fstat(self._tasks).st_nlink != _ONE_TASK:
            raise RuntimeError("a process with more than one thread does not multiply")
        with self._maps:
            for start, size in _own_of(self._maps):
                _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_MERGEABLE)
        _multiply.multiply(first, channel, waiting._epoll.fileno(), *pairs)
        os.close(self._tasks)
        self._sandbox.confine_fork()


def _own_of(maps: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """Address and size of what a process has of memory that is neither a guest's, which all is memfds, nor a stack
    (proc_pid_maps(5))."""
    for line in maps:
        addresses, rights, _, _, _, *name = line.split(None, 5)
        start, end = (int(address, 16) for address in addresses.split(b"-"))
        if rights == b"rw-p" and not (name and name[0].startswith((b"[stack", b"/memfd:"))):
            yield start, end - start


def give_own_pages(size: int) -> None:
    """What is as large as that, in bytes, has pages of its own, until keep_what_is_freed (mallopt(3))."""
    _LIBC.mallopt(_M_MMAP_THRESHOLD, size)


def keep_what_is_freed() -> None:
    """Use again the room of bytes that were on their way to a reader. The zygote gives whatever is large pages of its
    own, for its tables; each read of a stream would be paid for with page faults then."""
    give_own_pages(_KEPT)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT)


def _live_before(engine: Engine, engine_named: Callable[[str], Engine]) -> None:
    """Lead a life of another machine, of nobody's: the pages that lives write to are this process's own then.

    What comes next, a sandbox, is a thread's: no other one is there any more when this returns.
    """
    from vmfs.machine import warmup  # here: the server loads this module, too, and needs none of that

    try:
        warmup.live(engine, engine_named)
    except Exception:
        log.debug("a life came to nothing", exc_info=True)
    gc.collect()  # what it mapped is let go
    warmup.wait_for_threads(1)


async def _live(
    channel: socket.socket,
    sandbox: Sandbox,
    kind: Kind,
    engine: Engine,
    engine_named: Callable[[str], Engine],
    multiplier: Multiplier | None,
) -> None:
    from vmfs.machine import worker  # as above

    def become(order: commands.Become) -> None:
        who = Credentials(order.uid, order.gid, tuple(order.groups), 0, file_size=order.file_size)
        sandbox.confine(who, memory_most=order.memory_most, multiplies=order.multiplies)

    unborn = worker.Unborn(channel, engine, engine_named, kind.memory_size, multiplier)
    keep_what_is_freed()
    await unborn.serve(become)
