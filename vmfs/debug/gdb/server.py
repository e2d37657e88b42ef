"""Sessions: a gdb that is connected to a machine. One at a time.

A session is a trio task. What it does while the guest runs is wait for the run, or for gdb: a ^C, or its end.
Whatever ends the session, its points go and the machine stands still and usable.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from vmfs.debug.gdb.inferior import Inferior, Surroundings
from vmfs.debug.gdb.packets import Acknowledged, Damaged, Decoder, Event, Interrupt, Packet, TooLong, frame
from vmfs.debug.gdb.stub import PACKET_SIZE, Bye, Resume, Said, Stub, console_text
from vmfs.errors import Busy, VmfsError
from vmfs.exits import Exit
from vmfs.vm import Bound, Run

log = logging.getLogger(__name__)

_CHUNK = 1 << 16
_MOST_WAITING = 64  # packets that wait while the guest runs
_TEXT_CHUNK = PACKET_SIZE // 8  # bytes of text in an O packet
# As in vmfs.fs.kinds: a step takes some 20 us, sleeping until its end many times that.
_SHORT_SECONDS = 200e-6
_END_SECONDS = 5.0  # that a machine has to stop when its gdb is gone


class Channel(Protocol):
    """A connection: trio.SocketStream is one."""

    async def receive_some(self, max_bytes: int) -> bytes: ...
    async def send_all(self, data: bytes) -> None: ...


class Gdb:
    """A machine's gdb: who may be connected, and how registers are described to the next."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self.words: tuple[str, bool] = ("x86-64", False)
        self._session: trio.CancelScope | None = None

    @property
    def connected(self) -> bool:
        return self._session is not None

    def disconnect(self) -> None:
        """End the session, if there is one."""
        if self._session is not None:
            self._session.cancel()

    async def serve(self, channel: Channel) -> None:
        """A session, to its end; one that is one too many is told so. Raises nothing but cancellations."""
        if self._session is not None:
            await _refuse(channel, "another gdb is connected to this machine")
            return
        self._session = trio.CancelScope()
        try:
            with self._session:
                await Session(self._surroundings, channel, *self.words).serve()
        except VmfsError as error:  # the machine is gone
            log.debug("gdb: %s", error)
        except Exception:
            log.exception("a gdb session failed")
        finally:
            self._session = None


class Session:
    """One connection."""

    def __init__(self, surroundings: Surroundings, channel: Channel, layout: str, linear: bool) -> None:
        self._channel = channel
        self._inferior = Inferior(surroundings)
        self._stub = Stub(self._inferior, layout, linear=linear)
        self._decoder = Decoder()
        self._events: deque[Event] = deque()
        self._ended = False  # nothing more comes
        self._acknowledges = True
        self._last_reply = b""

    async def serve(self) -> None:
        try:
            while (event := await self._next()) is not None:
                if not await self._handle(event):
                    break
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _END_SECONDS):
                with contextlib.suppress(VmfsError):
                    await self._inferior.forget()

    async def _next(self) -> Event | None:
        while not self._events:
            if self._ended:
                return None
            await self._receive()
        return self._events.popleft()

    async def _receive(self) -> None:
        data = await self._channel.receive_some(_CHUNK)
        self._ended = not data
        self._events.extend(self._decoder.feed(data))

    async def _handle(self, event: Event) -> bool:
        """False when the session is over."""
        match event:
            case Packet():
                if self._acknowledges:
                    await self._channel.send_all(b"+")
                return await self._answer(event.payload)
            case TooLong():
                if self._acknowledges:
                    await self._channel.send_all(b"+")
                await self._reply(b"E.the packet is longer than %d bytes" % PACKET_SIZE)
            case Damaged():
                # Without acknowledgements the line is reliable, and nobody would send it again.
                await self._channel.send_all(b"-" if self._acknowledges else frame(b"E.the checksum is wrong"))
            case Acknowledged(well=False):
                if self._acknowledges and self._last_reply:
                    await self._channel.send_all(self._last_reply)
        return True

    async def _answer(self, payload: bytes) -> bool:
        answer = await self._stub.answer(payload)
        match answer:
            case Resume():
                if self._ended:  # it would run for nobody
                    return False
                await self._reply(await self._resume(answer))
            case Said():
                await self._tell(answer.text)
                await self._reply(answer.reply)
            case Bye():
                await self._inferior.forget()
                if answer.reply is not None:
                    await self._reply(answer.reply)
                return False
            case bytes():
                await self._reply(answer)
                if self._stub.no_acknowledgements:
                    self._acknowledges = False
        return True

    async def _reply(self, payload: bytes) -> None:
        self._last_reply = frame(payload)
        await self._channel.send_all(self._last_reply)

    async def _tell(self, text: str) -> None:
        for at in range(0, len(text), _TEXT_CHUNK):
            await self._reply(console_text(text[at : at + _TEXT_CHUNK]))

    # ---- running

    async def _resume(self, what: Resume) -> bytes:
        """The stop reply."""
        failure: Exception | None = None
        reply = b""
        async with _Runner(self._inferior, self._listen) as runner:
            try:
                reply = await self._stub.resume(what, runner.run, self._tell)
            except (VmfsError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                failure = error  # not through the runner's nursery, which would make a group of it
        if failure is not None:
            raise failure
        return reply

    async def _listen(self, stop: Callable[[], None]) -> None:
        """While the guest runs: ^C stops it, and so does a gdb that goes away."""
        while not self._ended:
            before = len(self._events)
            try:
                await self._receive()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._ended = True
            news = list(self._events)[before:]
            # A gdb says nothing else while it waits for a stop; what a peer sends all the same must not pile up.
            while len(self._events) > _MOST_WAITING:
                self._events.pop()
            if self._ended or any(isinstance(event, Interrupt) for event in news):
                stop()


class _Runner:
    """The runs of one resumption, and a task that listens meanwhile.

    A single step is most often done before anybody could listen: the task begins when it is not, or with the second
    run of several.
    """

    def __init__(self, inferior: Inferior, listen: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        self._vm = inferior.vm
        self._wait = inferior.surroundings.wait
        self._listen = listen
        self._stack = contextlib.AsyncExitStack()
        self._run: Run | None = None
        self._listening = False
        self._stop_asked = False

    async def __aenter__(self) -> _Runner:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    async def run(self, bound: Bound) -> Exit:
        """To the next exit."""
        is_first = self._run is None
        try:
            run = self._run = self._vm.start(bound)
        except Busy:
            raise Busy("the machine is running: somebody else has started it") from None
        try:
            if self._stop_asked:
                self._vm.stop(run)
            if bound.steps is not None:
                with contextlib.suppress(TimeoutError):
                    run.exception(_SHORT_SECONDS)
            if not is_first or not run.done():
                await self._begin_listening()
                await self._wait(run)
                await trio.lowlevel.checkpoint()
        finally:
            if not run.done():  # the session is ended from outside, or the machine goes
                self._vm.stop(run)
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _END_SECONDS):
                    with contextlib.suppress(VmfsError):
                        await self._wait(run)
        return run.result()

    async def _begin_listening(self) -> None:
        if not self._listening:
            self._listening = True
            nursery = await self._stack.enter_async_context(trio.open_nursery())
            self._stack.callback(nursery.cancel_scope.cancel)
            nursery.start_soon(self._listen, self._stop)

    def _stop(self) -> None:
        self._stop_asked = True
        self._vm.stop(self._run)


async def _refuse(channel: Channel, sentence: str) -> None:
    """Answer the first packet with the reason, which gdb shows."""
    decoder = Decoder()
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.move_on_after(_END_SECONDS):
        while data := await channel.receive_some(_CHUNK):
            if any(isinstance(event, Packet) for event in decoder.feed(data)):
                await channel.send_all(b"+" + frame(b"E." + sentence.encode()))
                return
