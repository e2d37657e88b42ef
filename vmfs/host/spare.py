"""A spare: a process that is to be a machine's as soon as there is one that needs it.

To fork it, and to have what it will use in pages of its own, is most of what a machine's birth takes. So the zygote
has one that has done so, and has RAM and a CPU, but has no user yet. Its order says whose it is; it becomes that
user, goes into the rest of its sandbox, and is the machine, before it has read anything of anybody's.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import trio

from vmfs.engine.base import Engine
from vmfs.host.credentials import Credentials
from vmfs.host.sandbox import Sandbox

log = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT = 4 << 20  # bytes
_PACKET = 1 << 16
_encode = msgspec.msgpack.Encoder().encode


class Order(msgspec.Struct, frozen=True, array_like=True):
    """Whose machine it is, and how much memory that user may have, as far as there is a limit (0: none)."""

    who: Credentials
    memory_most: int


_decode = msgspec.msgpack.Decoder(Order).decode


@dataclass(frozen=True, slots=True)
class Kind:
    """What a spare can be made for: machines as they are made."""

    engine: str
    memory_size: int


class Spare:
    """The zygote's end."""

    def __init__(self, kind: Kind, pid: int, line: socket.socket) -> None:
        self.kind = kind
        self.pid = pid
        self._line = line

    def give(self, order: Order, channel: int) -> bool:
        """Have it be that machine, at the other end of that channel. False where it has gone."""
        with self._line:
            try:
                socket.send_fds(self._line, [_encode(order)], [channel], socket.MSG_NOSIGNAL)
            except OSError:
                return False
        return True

    def close(self) -> None:
        """It ends."""
        self._line.close()


def main(
    line: socket.socket,
    sandbox: Sandbox,
    kind: Kind,
    engine: Engine,
    engine_named: Callable[[str], Engine],
) -> None:
    """The spare's life, and the machine's."""
    sandbox.seclude()
    trio.run(_live, line, sandbox, kind, engine, engine_named)
    logging.shutdown()
    os._exit(0)  # threads of a CPU that did not stop, or of a device, are not waited for


def give_own_pages(size: int) -> None:
    """What is as large as that, in bytes, has pages of its own, until keep_what_is_freed (mallopt(3))."""
    _LIBC.mallopt(_M_MMAP_THRESHOLD, size)


def keep_what_is_freed() -> None:
    """Use again the room of bytes that were on their way to a reader. The zygote gives whatever is large pages of its
    own, for its tables; each read of a stream would be paid for with page faults then."""
    give_own_pages(_KEPT)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT)


async def _live(
    line: socket.socket,
    sandbox: Sandbox,
    kind: Kind,
    engine: Engine,
    engine_named: Callable[[str], Engine],
) -> None:
    from vmfs.machine import worker  # here: the server loads this module, too, and needs none of that

    unborn = worker.Unborn(engine, engine_named, kind.memory_size)
    await trio.lowlevel.wait_readable(line)
    with line:
        packet, fds, _, _ = socket.recv_fds(line, _PACKET, 1)
    if packet:
        order = _decode(packet)
        sandbox.confine(order.who, memory_most=order.memory_most)
        if unborn.failure is not None:  # it is long ago
            unborn = worker.Unborn(engine, engine_named, kind.memory_size)
        keep_what_is_freed()
        await unborn.serve(socket.socket(fileno=fds[0]))
