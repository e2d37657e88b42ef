"""Sessions: a gdb that is connected to a machine. One at a time.

A session is a thread, since a step is a matter of microseconds, and to pass a packet through the event loop takes
longer. What it does while the guest runs is wait for the run, or for gdb: a ^C, or its end. Whatever ends the session,
its points go and the machine stands still and usable.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable

import trio

from vmfs.machine.gdb.inferior import Inferior, Surroundings
from vmfs.machine.gdb.packets import Acknowledged, Damaged, Decoder, Event, Interrupt, Packet, TooLong, frame
from vmfs.machine.gdb.stub import PACKET_SIZE, Bye, Resume, Said, Stub, console_text
from vmfs.machine.runloop import Bound, Run
from vmfs.words.errors import Busy, VmfsError
from vmfs.words.exits import Exit

log = logging.getLogger(__name__)

_CHUNK = 1 << 16
_MOST_WAITING = 64  # packets that wait while the guest runs
_TEXT_CHUNK = PACKET_SIZE // 8  # bytes of text in an O packet
_SHORT_SECONDS = 20e-3  # that a ^C may go unheard, for a step is most often done by then
_REFUSAL_SECONDS = 5.0  # that a gdb which is one too many has for its first packet
_LAST_SECONDS = 1.0  # to acknowledge the last packet

Words = tuple[str, bool]  # a layout's name ("": the one that goes with the symbols), and whether its pc is linear


class Gdb:
    """A machine's gdb: who may be connected, and how registers are described to the next."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self.words: Words = ("", False)
        self._scope = trio.CancelScope()
        self._session: Session | None = None
        self._gone = trio.Event()  # of that session

    @property
    def connected(self) -> bool:
        return self._session is not None and not self._session.is_over

    def disconnect(self) -> None:
        """End the session, if there is one."""
        if self._session is not None:
            self._scope.cancel()

    async def is_free(self) -> bool:
        """Whether a session may begin. One whose gdb has gone is waited for: a gdb may be back at once."""
        while self._session is not None and self._session.is_over:
            await self._gone.wait()
        return self._session is None

    async def serve(
        self, line: socket.socket, words: Words | None = None, moved: Callable[[], None] = lambda: None
    ) -> None:
        """A session over a stream socket, to its end; one that is one too many is told so. The socket stays the
        caller's, to close. Raises nothing but cancellations. `moved`: called, in any thread, when bytes have."""
        if not await self.is_free():
            await _refuse(line, "another gdb is connected to this machine")
            return
        line.setblocking(True)
        try:
            session = Session(self._surroundings, line, *(words or self.words), moved)
        except OSError as error:
            await _refuse(line, f"the session has no descriptor: {error.strerror}")
            return
        self._scope, self._session, self._gone = trio.CancelScope(), session, trio.Event()
        try:
            with session, self._scope:
                await _served(session)
        except VmfsError as error:  # the machine is gone
            log.debug("gdb: %s", error)
        except Exception:
            log.exception("a gdb session failed")
        finally:
            self._session = None
            self._gone.set()


async def _served(session: Session) -> None:
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_hang_up_when_cancelled, session)
        try:
            await trio.to_thread.run_sync(session.serve, limiter=trio.CapacityLimiter(1))
        except Exception as error:  # not through the nursery, which would make a group of it
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _hang_up_when_cancelled(session: Session) -> None:
    try:
        await trio.sleep_forever()
    finally:
        session.hang_up()


class Session:
    """One connection. A context manager, which has a descriptor."""

    def __init__(
        self, surroundings: Surroundings, line: socket.socket, layout: str, linear: bool, moved: Callable[[], None]
    ) -> None:
        self._line = line
        self._moved = moved
        self._inferior = Inferior(surroundings)
        self._vm = surroundings.vm
        self._stub = Stub(self._inferior, layout, linear=linear)
        self._decoder = Decoder()
        self._events: deque[Event] = deque()
        self._ended = False  # nothing more comes
        self._over = False  # and it is done
        self._acknowledges = True
        self._last_reply = b""
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)  # rings at the end of a run
        self._runs = 0  # of this resumption
        self._stop_asked = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._bell)

    @property
    def is_over(self) -> bool:
        """From any thread: whether it has ended, or its gdb has."""
        poll = select.poll()
        poll.register(self._line, select.POLLRDHUP)
        return self._over or bool(poll.poll(0))

    def hang_up(self) -> None:
        """From any thread: nothing more is received or sent."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        """To its end, in a thread that may block."""
        try:
            while (event := self._next()) is not None:
                if not self._handle(event):
                    break
        except OSError as error:
            log.debug("gdb: the connection broke: %s", error)
        finally:
            with contextlib.suppress(VmfsError):
                self._inferior.forget()
            self._over = True

    def _next(self) -> Event | None:
        while not self._events:
            if self._ended:
                return None
            self._receive()
        return self._events.popleft()

    def _receive(self) -> None:
        try:
            data = self._line.recv(_CHUNK)
        except OSError:
            data = b""
        self._moved()
        self._ended = not data
        self._events.extend(self._decoder.feed(data))

    def _handle(self, event: Event) -> bool:
        """False when the session is over."""
        match event:
            case Packet():
                if self._acknowledges:
                    self._send(b"+")
                if not self._last_reply and self._has_come_again(event):
                    return True
                return self._answer(event.payload)
            case TooLong():
                if self._acknowledges:
                    self._send(b"+")
                self._reply(b"E.the packet is longer than %d bytes" % PACKET_SIZE)
            case Damaged():
                # Without acknowledgements the line is reliable, and nobody would send it again.
                self._send(b"-" if self._acknowledges else frame(b"E.the checksum is wrong"))
            case Acknowledged(well=False):
                if self._acknowledges and self._last_reply:
                    self._send(self._last_reply)
        return True

    def _has_come_again(self, packet: Packet) -> bool:
        """Whether a packet waits once more: gdb sends its first one again where `vmfs gdb` takes more than 2 seconds
        to begin. If each were answered, gdb would take every reply for that to its next packet."""
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        while not self._ended and poll.poll(0):
            self._receive()
        return packet in self._events

    def _answer(self, payload: bytes) -> bool:
        answer = self._stub.answer(payload)
        match answer:
            case bytes():
                self._reply(answer)
                if self._stub.no_acknowledgements:
                    self._acknowledges = False
            case Resume():
                if self._ended:  # it would run for nobody
                    return False
                # The ^C may have come with the packet: gdb waits for a stop then, and does not ask again.
                self._runs, self._stop_asked = 0, self._take_interrupts()
                self._reply(self._stub.resume(answer, self._run, self._tell))
            case Said():
                self._tell(answer.text)
                self._reply(answer.reply)
            case Bye():
                self._inferior.forget()
                self._over = True
                if answer.reply is not None:
                    self._reply(answer.reply)
                    self._linger()
                return False
        return True

    def _linger(self) -> None:
        """Take the acknowledgement of the last reply: a socket that is closed with something unread is reset, and
        over TCP the reply may be lost with it."""
        if self._acknowledges and not self._events:
            self._line.settimeout(_LAST_SECONDS)
            with contextlib.suppress(TimeoutError):
                self._line.recv(_CHUNK)

    def _reply(self, payload: bytes) -> None:
        self._last_reply = frame(payload)
        self._send(self._last_reply)

    def _send(self, data: bytes) -> None:
        self._line.sendall(data)
        self._moved()

    def _tell(self, text: str) -> None:
        for at in range(0, len(text), _TEXT_CHUNK):
            self._reply(console_text(text[at : at + _TEXT_CHUNK]))

    # ---- running

    def _run(self, bound: Bound) -> Exit:
        """To the next exit."""
        try:
            run = self._vm.start(bound)
        except Busy:
            raise Busy("the machine is running: somebody else has started it") from None
        if self._stop_asked:
            self._vm.stop(run)
        self._runs += 1
        # A single step is most often done before anybody could listen. Of several runs, each listens.
        if bound.steps is None or self._runs > 1 or not _is_soon_done(run):
            self._listen(run)
        return run.result()

    def _listen(self, run: Run) -> None:
        """To the end of the run. ^C stops it, and so does a gdb that goes away."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if not self._ended:
            poll.register(self._line, select.POLLIN)
        run.add_done_callback(lambda _: os.eventfd_write(self._bell, 1))
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._line.fileno() in ready:
                self._hear(run)
                if self._ended:
                    poll.unregister(self._line)
            if self._bell in ready:  # and not before: the bell must be there when it rings
                os.eventfd_read(self._bell)
                return

    def _hear(self, run: Run) -> None:
        self._receive()
        is_interrupted = self._take_interrupts()
        # A gdb says nothing else while it waits for a stop; what a peer sends all the same must not pile up.
        while len(self._events) > _MOST_WAITING:
            self._events.pop()
        if self._ended or is_interrupted:
            self._stop_asked = True
            self._vm.stop(run)

    def _take_interrupts(self) -> bool:
        """Whether there are any in what has come."""
        before = len(self._events)
        if not before:
            return False
        self._events = deque(event for event in self._events if not isinstance(event, Interrupt))
        return len(self._events) < before


def _is_soon_done(run: Run) -> bool:
    try:
        run.exception(_SHORT_SECONDS)
    except TimeoutError:
        return False
    return True


async def _refuse(line: socket.socket, sentence: str) -> None:
    """Answer the first packet with the reason, which gdb shows."""
    decoder = Decoder()
    line.setblocking(False)
    with contextlib.suppress(OSError), trio.move_on_after(_REFUSAL_SECONDS):
        while True:
            await trio.lowlevel.wait_readable(line)
            data = line.recv(_CHUNK)
            if not data:
                return
            if any(isinstance(event, Packet) for event in decoder.feed(data)):
                line.send(b"+" + frame(b"E." + sentence.encode()))
                return
