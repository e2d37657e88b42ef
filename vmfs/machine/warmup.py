"""Lives of machines that nobody has asked for, so that those of users cost less.

CPython rewrites a function's code while it is called for the first times (PEP 659), and makes caches as it goes. What
the zygote has done of that, its children share; what it has not, each does in pages of its own. So the zygote leads a
few short lives, before and after what they use is laid together (gather.py). And a spare leads one, so that the pages
that a life writes to are its own before a user waits.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import trio

from vmfs.engine.base import Engine
from vmfs.machine.machine import Vm
from vmfs.machine.worker import Worker
from vmfs.words import commands
from vmfs.words.commands import Channel, ChannelBroken, ToMachine, ToServer

LIVES = 12  # calls until CPython has rewritten a function
THREADS_SECONDS = 1.0  # that threads which were joined may take to be gone
SECONDS = 0.5  # that a life may take: an engine that does not come to its hlt has shown what it can
_CODE_AT, _HLT = 0x1000, b"\xf4"
_SIZES = ["mode", "registers", "state", "exit", "regs", "mem"]


def live(engine: Engine, engine_named: Callable[[str], Engine]) -> bool:
    """A life from birth to end, with a run. Whether it came to its end in time. The process has as many threads
    afterwards as before."""
    threads = _threads()
    try:
        return trio.run(_live, engine, engine_named)
    finally:
        wait_for_threads(threads)


def wait_for_threads(most: int) -> None:
    """Until there are so many: one that was joined is there for a moment. RuntimeError where they do not end."""
    end = time.monotonic() + THREADS_SECONDS
    while _threads() > most:
        if time.monotonic() > end:
            raise RuntimeError("a thread is left of a life")
        time.sleep(0.0005)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


async def _live(engine: Engine, engine_named: Callable[[str], Engine]) -> bool:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client, channel = _Client(ours), Channel[ToMachine](its, ToMachine)
    vm = Vm(engine)
    worker = Worker(channel, vm, engine_named)
    try:
        with trio.move_on_after(SECONDS) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_serve, worker)
                await client.send(commands.Become(0, 0, [], 0, 0))
                vm.memory.write(_CODE_AT, _HLT)
                await client.put("mode", b"real\n")
                for is_open in (True, False):  # `mem`
                    await client.send(commands.Clients(False, is_open))
                await client.put("reg/rip", b"%#x\n" % _CODE_AT)
                await client.share_page()
                for file in ("vm_run", "state", "exit", "regs", "stat"):
                    await client.get(file)
                await client.ask(lambda at: commands.Measure(at, _SIZES))
                client.close()
        return not limit.cancelled_caught
    finally:
        client.close()
        worker.contents.remove()
        vm.close()
        channel.close()


async def _serve(worker: Worker) -> None:
    try:
        await worker.serve(lambda order: None)
    except ChannelBroken:
        pass


class _Client:
    """In the place of a server."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel[ToServer](sock, ToServer)
        self._call = 0

    async def send(self, message: commands.Message) -> None:
        await self._channel.send(message)

    async def ask(self, make: Callable[[int], commands.Message], *fds: int) -> Any:
        self._call += 1
        await self._channel.send(make(self._call), fds)
        while True:
            answer, _ = await self._channel.receive()
            if getattr(answer, "call", 0) == self._call:
                return answer

    async def share_page(self) -> None:
        """That of the lane (vmfs/words/lane.h)."""
        page = os.memfd_create("vmfs-lane", os.MFD_CLOEXEC)
        try:
            os.ftruncate(page, mmap.PAGESIZE)
            await self.ask(commands.Lane, page)
        finally:
            os.close(page)

    async def _open(self, file: str, *, writing: bool) -> int:
        opened = await self.ask(lambda at: commands.Open(at, file, writing, False, False, False, 0))
        return getattr(opened, "handle", 0)

    async def get(self, file: str) -> None:
        handle = await self._open(file, writing=False)
        await self.ask(lambda at: commands.Read(at, handle, 0, 4096, 0))
        await self._channel.send(commands.Close(handle))

    async def put(self, file: str, text: bytes) -> None:
        handle = await self._open(file, writing=True)
        await self.ask(lambda at: commands.Write(at, handle, 0, text, 0))
        await self.ask(lambda at: commands.Flush(at, handle))
        await self._channel.send(commands.Close(handle))

    def close(self) -> None:
        self._channel.close()

