"""A session without files: what a stub is given, and a client at the other end of its channel."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future

import trio

from vmfs.machine.gdb.packets import Decoder, Packet, frame
from vmfs.machine.gdb.server import Gdb
from vmfs.machine.machine import Vm
from vmfs.words.errors import Invalid


class Surroundings:
    """What a stub is given, without files."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.complaints: list[str] = []
        self.commands: list[str] = []

    def change_memory(self, change: Callable[[], Future[None]]) -> None:
        change().result()

    def command(self, text: str) -> str:
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

    async def heard(self, expected: bytes) -> bool:
        """Whether these are the next bytes, however they arrive."""
        data = b""
        while len(data) < len(expected) and (part := await self.stream.receive_some(len(expected) - len(data))):
            data += part
        return data == expected

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
        """The text of O packets, and the reply after them."""
        await self.send(payload)
        text = b""
        while (reply := await self.reply())[:1] == b"O" and reply != b"OK":
            text += bytes.fromhex(reply[1:].decode())
        return text.decode(), reply


@contextlib.asynccontextmanager
async def connected(gdb: Gdb) -> AsyncIterator[Client]:
    """A session, which ends with the block."""
    ours, theirs = socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_serve, gdb, theirs)
        client = Client(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        try:
            yield client
        finally:
            await client.stream.aclose()


async def _serve(gdb: Gdb, line: socket.socket) -> None:
    with line:
        await gdb.serve(line)
