"""A session without files: what a stub is given, and a client at the other end of its channel."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import trio
import trio.testing

from vmfs.debug.gdb.inferior import nothing
from vmfs.debug.gdb.packets import Decoder, Packet, frame
from vmfs.debug.gdb.server import Gdb
from vmfs.errors import Invalid
from vmfs.vm import Vm


class Surroundings:
    """What a stub is given, without files."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.complaints: list[str] = []
        self.commands: list[str] = []

    async def wait(self, future: Future[Any]) -> None:
        if not future.done():
            done, token = trio.Event(), trio.lowlevel.current_trio_token()
            future.add_done_callback(lambda _: token.run_sync_soon(done.set))
            await done.wait()

    def changing_memory(self) -> Any:
        return nothing()

    async def command(self, text: str) -> str:
        self.commands.append(text)
        if text.startswith("bad"):
            raise Invalid("it is bad")
        return text * 2

    def complain(self, sentence: str) -> None:
        self.complaints.append(sentence)


class Client:
    """The other end of a stub's channel: sends packets, and collects what comes."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._decoder = Decoder()
        self.payloads: list[bytes] = []

    async def send(self, payload: bytes) -> None:
        await self.stream.send_all(frame(payload))

    async def raw(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def reply(self) -> bytes:
        """The next packet."""
        while not self.payloads:
            data = await self.stream.receive_some(1 << 16)
            if not data:
                raise EOFError
            self.payloads += [event.payload for event in self._decoder.feed(data) if isinstance(event, Packet)]
        with contextlib.suppress(trio.BrokenResourceError):  # it was the last one
            await self.stream.send_all(b"+")
        return self.payloads.pop(0)

    async def ask(self, payload: bytes) -> bytes:
        await self.send(payload)
        return await self.reply()

    async def ask_and_hear(self, payload: bytes) -> tuple[str, bytes]:
        """The text of O packets, and the reply behind them."""
        await self.send(payload)
        text = b""
        while (reply := await self.reply())[:1] == b"O" and reply != b"OK":
            text += bytes.fromhex(reply[1:].decode())
        return text.decode(), reply


@contextlib.asynccontextmanager
async def connected(gdb: Gdb) -> AsyncIterator[Client]:
    """A session, which ends with the block."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_serve, gdb, theirs)
        try:
            yield Client(ours)
        finally:
            await ours.aclose()


async def _serve(gdb: Gdb, stream: trio.abc.Stream) -> None:
    await gdb.serve(stream)
    await stream.aclose()
