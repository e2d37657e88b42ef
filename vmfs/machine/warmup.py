"""Lives of machines that nobody has asked for, so that those of users cost less.

CPython rewrites a function's code while it is called for the first times (PEP 659), and makes caches as it goes. What
the zygote has done of that, its children share; what it has not, each does in pages of its own. So the zygote leads a
few short lives, and then lays together the code that they used: what they did not use fills no page that is touched.
"""

from __future__ import annotations

import gc
import socket
import types
from collections.abc import Callable
from typing import Any

import trio

from vmfs.engine.base import Engine
from vmfs.machine.machine import Vm
from vmfs.machine.worker import Worker
from vmfs.words import commands
from vmfs.words.commands import Channel, ChannelBroken, ToMachine, ToServer

LIVES = 12  # calls until CPython has rewritten a function
SECONDS = 0.5  # that a life may take: an engine that does not come to its hlt has shown what it can
_CODE_AT, _HLT = 0x1000, b"\xf4"
_SIZES = ["mode", "registers", "state", "exit", "regs", "mem"]


def live(engine: Engine, engine_named: Callable[[str], Engine]) -> bool:
    """A life from birth to end, with a run. Whether it came to its end in time. In a process of one thread, which it
    has again afterwards."""
    return trio.run(_live, engine, engine_named)


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
                for file, text in (("mode", b"real\n"), ("reg/rip", b"%#x\n" % _CODE_AT)):
                    await client.put(file, text)
                for file in ("vm_run", "state", "exit", "regs"):
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

    async def ask(self, make: Callable[[int], commands.Message]) -> Any:
        self._call += 1
        await self._channel.send(make(self._call))
        while True:
            answer, _ = await self._channel.receive()
            if getattr(answer, "call", 0) == self._call:
                return answer

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


def gather_code() -> None:
    """Lay together the code of all functions that have become warm: CPython then writes into few pages. A copy is cold
    again, so some lives have to follow."""
    copies: dict[int, tuple[types.CodeType, types.CodeType]] = {}  # each beside its original, which keeps its number

    def copy(code: types.CodeType) -> types.CodeType:
        if id(code) not in copies:
            inner = (copy(one) if isinstance(one, types.CodeType) and _is_warm(one) else one for one in code.co_consts)
            copies[id(code)] = code, code.replace(co_consts=tuple(inner))
        return copies[id(code)][1]

    gc.unfreeze()  # what is frozen is in no list
    for one in gc.get_objects():
        if type(one) is types.FunctionType and _is_warm(one.__code__):
            one.__code__ = copy(one.__code__)
    gc.freeze()


def _is_warm(code: types.CodeType) -> bool:
    """Whether CPython has rewritten it."""
    return code._co_code_adaptive != code.co_code  # type: ignore[attr-defined]
