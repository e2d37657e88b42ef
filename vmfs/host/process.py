"""A machine as the server has it: a row that costs little until something needs its contents, and then a process.

`MachineProcess.call` is the one way to it. A machine that is gone answers ENODEV, one whose process has failed EIO;
every waiter is woken then. What the process asks for is answered here, as the user on whose call it asks.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import shlex
import signal
import socket
import tempfile
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import trio

from vmfs.host import opener
from vmfs.host.credentials import Credentials, HostError
from vmfs.host.inheritance import Inheritance
from vmfs.host.theirs import open_memory
from vmfs.host.zygote import Job
from vmfs.memory.hostfile import punch
from vmfs.memory.ram import check_size
from vmfs.words import commands
from vmfs.words.commands import (
    Channel,
    ChannelBroken,
    ChannelEnded,
    Failed,
    Granted,
    Message,
    Refused,
    Result,
    ToServer,
)
from vmfs.words.errors import Gone, LimitReached, ProcessFailed, VmfsError, WouldBlock, known
from vmfs.words.nets import PCAP

log = logging.getLogger(__name__)

BIRTH_SECONDS = 20.0  # that a process has to become a machine, on a host that is busy
CLOSE_SECONDS = 1.0  # that a removed machine has to end by itself
OPENER_SECONDS = 20.0  # that an opener has, and a passt to start
NO_DESCRIPTOR = "the server has no file descriptor left (ulimit -n)"
OPENERS_MOST = 16  # of a machine at a time
HELPERS_MOST = 64  # processes that live for a machine's devices, and sockets that it listens at
TELL_SECONDS = 0.005  # until what a machine need not hear at once is said by itself: each wakes it
MESSAGES_MOST = 4  # of one machine that are heard before others have their turn
SENTENCE_MOST = 2000
SAID_MOST = 1 << 16  # bytes of lines
SIZE_MOST = (1 << 63) - 1
_LOOPBACK = ("127.0.0.1", "::1")
HANDOVER = "\0vmfs-gdb-"  # how the names of sockets begin at which a gdb.stream is handed over
# The flags that a machine opens what a line names with; an overlay's are the last.
_OPENINGS = (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_TMPFILE | os.O_RDWR)

_CHANGE_SNAPSHOTS = commands.Take | commands.Remove | commands.Arrive | commands.Make | commands.Fill | commands.Rename
_decode_result = msgspec.msgpack.Decoder(Result).decode


class CallFailed(VmfsError):
    """What a machine answered to a call that failed."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.sentence[:SENTENCE_MOST])
        self.errno = failed.errno if 0 < failed.errno < 512 else errno.EIO  # what FUSE takes for one
        self.quiet = failed.quiet
        self.unsaved = failed.unsaved


class _SpareEnded(ProcessFailed):
    """Before it was a machine."""


class Asker:
    """A user that opened a file whose lines give a machine something of the host, and those lines."""

    def __init__(self, who: Credentials) -> None:
        self.who = who
        self._said = b""

    def says(self, data: bytes) -> None:
        self._said = (self._said + data)[-SAID_MOST:]

    def lines(self) -> list[set[str]]:
        """The words of each."""
        found = []
        for line in self._said.decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(set(shlex.split(line, comments=True)))
        return found

    def names(self, words: set[str], *, changes: bool) -> bool:
        """Whether a line has all of them; with `changes`, and does not say that it is only read."""
        return any(words <= line and not (changes and line & {"ro", "cow"}) for line in self.lines())


class _Call:
    """A call that waits for its answer."""

    def __init__(self, message: Any, asker: Asker | None) -> None:
        self.what = type(message).__name__
        self.asker = asker
        self.answered_by = commands.ANSWERS.get(type(message), commands.Done)
        self.event = trio.Event()
        self.answer: Any = None
        self.failure: VmfsError | None = None  # why there is no machine to answer


class Watcher:
    """Hears what a machine says by itself; on the loop."""

    def woken(self, handle: int) -> None:
        """A poll of that handle may have another answer."""

    def complained(self, sentence: str) -> None:
        """It leaves a sentence for `error`."""

    def ending(self) -> None:
        """The process says nothing any more."""

    def ended(self) -> None:
        """The process is gone: failed, or removed."""

    async def invalidate(self, ranges: list[tuple[int, int]]) -> None:
        """Write back and drop pages of `mem` from the kernel's cache."""


class Keeper(Protocol):
    """What a machine needs of its keeper. `vmfs.host.machines.Host` says how each works."""

    own_device: int
    fresh_sizes: dict[str, tuple[int, int]] | None

    @property
    def layers(self) -> dict[str, str]: ...
    def spawn(self, machine: MachineProcess, *, fresh: bool) -> tuple[Job, Channel[ToServer]]: ...
    def spawn_ready(self, machine: MachineProcess) -> tuple[Job, Channel[ToServer]] | None: ...
    def end_templates(self, inheritances: Iterable[Inheritance]) -> None: ...
    async def learn_sizes(self, machine: MachineProcess) -> None: ...
    def open(self, who: Credentials, work: opener.Work, answer: socket.socket) -> Job: ...
    def kill(self, job: Job) -> None: ...
    def reserve(self, machine: MachineProcess, what: str, size: int) -> None: ...
    def share(self, machine: MachineProcess, size: int) -> None: ...


class MachineProcess:
    """One machine. On the loop only."""

    def __init__(
        self,
        host: Keeper,
        owner: Credentials,
        engine: str,
        memory_size: int,
        inheritance: Inheritance | None = None,
    ) -> None:
        self.host = host
        self.owner = owner
        self.engine = engine
        self.memory_size = memory_size  # of RAM, as it counts against the limits
        self.reserved = 0  # bytes of everything else that does
        self.shared = 0  # ... and that this server has made for it
        self.inheritance = inheritance  # of a fork: what it is made of
        self._copies: weakref.WeakValueDictionary[int, Inheritance] = weakref.WeakValueDictionary()  # of it
        self._copied: dict[str, tuple[commands.Copied, Inheritance]] = {}  # of snapshots that are what they were
        self._changes = 0  # of its snapshots
        self._files: tuple[socket.socket, Asker, trio.Event] | None = None  # the fork's, which it hears of once
        self.watcher = Watcher()
        self.memory_fd = -1
        self.failure = ""  # why the process has failed
        self.removed = False
        self._job: Job | None = None
        self._channel: Channel[ToServer] | None = None  # of a machine that was born, or is about to be
        self._birth = trio.Event()  # it was, or could not be
        self._unborn: VmfsError | None = None  # why the last birth came to nothing
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count(1)
        self._asked = 0
        self._helpers: set[Job] = set()  # what lives for a device
        self._openers: set[Job] = set()  # of host paths
        self._sockets: dict[str, _Socket] = {}  # those that it listens at, by path
        self._last = ""  # the last command
        self._waiting: list[Message] = []  # that need not be said at once
        # What was said to a process of which nobody knows yet that it is a machine, with descriptors.
        self._said: list[tuple[Message, tuple[int, ...]]] | None = None
        self._finished = trio.Event()

    @property
    def born(self) -> bool:
        return self._channel is not None and self._birth.is_set()

    @property
    def _is_over(self) -> bool:
        return self.removed or bool(self.failure)

    @property
    def is_blank(self) -> bool:
        """It was only made, and is as every machine is then."""
        return not self.born and self.inheritance is None

    @property
    def knows_sizes(self) -> bool:
        """Whether there are sizes of a machine that was only made: they are known once the first one was born."""
        return self.host.fresh_sizes is not None

    @property
    def pid(self) -> int:
        """Of its process; 0 while there is none."""
        return self._job.pid if self._job is not None and self._job.code is None else 0

    # ---- calls

    async def call(
        self,
        make: Callable[[int], Message],
        *,
        asker: Asker | None = None,
        began: Callable[[int], None] | None = None,
        send: tuple[int, ...] = (),
    ) -> Any:
        """The answer. CallFailed as the machine says.

        As `asker` the machine may ask for things meanwhile. `began` gets the number of the call, for `interrupt`.
        `send`: descriptors that go along.
        """
        if self.host.fresh_sizes is None:
            await self.host.learn_sizes(self)
        return await self._call(make, asker, began, send)

    async def _call(
        self,
        make: Callable[[int], Message],
        asker: Asker | None = None,
        began: Callable[[int], None] | None = None,
        send: tuple[int, ...] = (),
    ) -> Any:
        channel = self._begin()
        if self.inheritance is not None:
            await self._be_there()
        return await self._ask(channel, make, asker, began, send)

    async def _ask(
        self,
        channel: Channel[ToServer],
        make: Callable[[int], Message],
        asker: Asker | None = None,
        began: Callable[[int], None] | None = None,
        send: tuple[int, ...] = (),
        sent: Callable[[], None] = lambda: None,
    ) -> Any:
        """`sent` is called when it has been said."""
        number = next(self._numbers)
        message = make(number)
        changes = isinstance(message, _CHANGE_SNAPSHOTS)
        if changes:
            self._forget_copied()
        waiting = self._calls[number] = _Call(message, asker)
        self._last = f"{waiting.what} {getattr(message, 'file', '') or getattr(message, 'path', '')}".strip()
        try:
            if began is not None:
                began(number)
            self._tell_waiting()
            if self._said is not None:
                self._said.append((message, send))
            with contextlib.suppress(ChannelBroken):  # its listener says so
                await channel.send(message, send)
            sent()
            await waiting.event.wait()
        finally:
            self._calls.pop(number, None)
            if changes:
                self._forget_copied()
            if waiting.answer is None:  # nobody waits any more: it need not go on
                self.interrupt(number)
        answer = waiting.answer
        if answer is None:
            raise waiting.failure or self._gone()
        if isinstance(answer, Failed):
            raise CallFailed(answer)
        return answer

    def open_memory(self, number: int) -> int:
        """What the machine says is memory of its, by its number there. ProcessFailed where it is none."""
        assert self._job is not None
        return open_memory(self._job.pid, number)

    def fresh_size(self, file: str) -> tuple[int, int] | None:
        """st_size and st_blocks of a file, while the machine is only made and that is known."""
        sizes = self.host.fresh_sizes if self.is_blank else None
        return None if sizes is None else sizes.get(file, (0, 0))

    async def measure(self, files: Sequence[str]) -> tuple[dict[str, tuple[int, int]], int]:
        """(st_size, st_blocks) of files, by their paths, and when what they show last changed (in nanoseconds; 0: it
        has not)."""
        return self._sizes(files, await self.call(lambda at: commands.Measure(at, list(files))))

    async def first_sizes(self, files: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Those of a machine of which nothing was asked yet."""
        if not files:
            return {}
        return self._sizes(files, await self._call(lambda at: commands.Measure(at, list(files))))[0]

    @staticmethod
    def _sizes(files: Sequence[str], answer: Any) -> tuple[dict[str, tuple[int, int]], int]:
        sizes = [(min(max(size, 0), SIZE_MOST), min(max(blocks, 0), SIZE_MOST)) for size, blocks in answer.sizes]
        return dict(zip(files, sizes, strict=False)), max(min(answer.modified_ns, time.time_ns()), 0)

    def interrupt(self, number: int) -> None:
        """A signal came for the caller of that call: it is answered soon."""
        self.tell(commands.Interrupt(number))

    def tell(self, message: Message, *, at_once: bool = True) -> None:
        """Say what has no answer: now, or at the latest before anything else is said. Nothing is said to a machine that
        has no process."""
        if not at_once:
            if not self._waiting:
                trio.lowlevel.spawn_system_task(self._tell_later)
            self._waiting.append(message)
            return
        self._tell_waiting()
        self._post(message)

    async def _tell_later(self) -> None:
        await trio.sleep(TELL_SECONDS)
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self._post(message)

    def _post(self, message: Message) -> None:
        channel = self._channel
        if channel is not None and not self._is_over:
            if self._said is not None:
                self._said.append((message, ()))
            try:
                if not channel.post(message):
                    trio.lowlevel.spawn_system_task(self._tell, channel, message)
            except ChannelBroken:
                pass  # its listener says so

    def hand(self, message: Message, fds: tuple[int, ...]) -> bool:
        """Say what has no answer, and give descriptors along. False where that would have to wait, or there is none to
        hear it."""
        channel = self._channel
        try:
            return channel is not None and self._said is None and not self._is_over and channel.post(message, fds)
        except ChannelBroken:
            return False

    @staticmethod
    async def _tell(channel: Channel[ToServer], message: Message) -> None:
        try:
            await channel.send(message)
        except (ChannelBroken, trio.ClosedResourceError):
            pass

    def _gone(self) -> VmfsError:
        if self.removed:
            return Gone("the machine was removed")
        return ProcessFailed(self.failure or "the machine's process is gone")

    # ---- its process

    async def start(self) -> None:
        """Have a process. VmfsError where there can be none: the machine stays as it was made, and may be asked
        again."""
        if self.host.fresh_sizes is None:
            await self.host.learn_sizes(self)
        self._begin()
        await self._be_there()

    async def _be_there(self) -> None:
        await self._birth.wait()
        if self._channel is None or self._is_over:
            raise self._unborn or self._gone()

    def _begin(self) -> Channel[ToServer]:
        """The channel of its process, which from now on becomes a machine: what is asked is answered after that."""
        if self._is_over:
            raise self._gone()
        if self._channel is None:
            self._birth, self._unborn = trio.Event(), None
            ready = self.host.spawn_ready(self) if self._files is None else None
            self._said = []
            if ready is not None:
                self._birth.set()
                return self._hear_from(*ready)
            return self._spawn()
        return self._channel

    def _hear_from(self, job: Job, channel: Channel[ToServer], *, is_born: bool = True) -> Channel[ToServer]:
        self._job, self._channel = job, channel
        trio.lowlevel.spawn_system_task(self._listen, channel, job, is_born)
        return channel

    def _spawn(self, *, fresh: bool = False) -> Channel[ToServer]:
        """`fresh`: not of a spare."""
        try:
            job, channel = self.host.spawn(self, fresh=fresh)
        except OSError as error:
            raise LimitReached(f"the server has no descriptor left for it: {error.strerror}") from error
        return self._hear_from(job, channel, is_born=False)

    async def _be_born(self, channel: Channel[ToServer], job: Job) -> None:
        """VmfsError where it is not: then it has done nothing of what it was asked. From the moment when it has said
        that it is born, its end is a machine's: ChannelBroken."""
        born: Any = None
        with trio.move_on_after(BIRTH_SECONDS):
            try:
                born, _ = await channel.receive()
            except ChannelBroken as error:
                raise await self._not_begun(job, error) from None
            await job.forked.wait()
        if isinstance(born, Failed):
            raise CallFailed(born)
        if not isinstance(born, commands.Born) or born.version != commands.VERSION:
            raise ProcessFailed("the machine's process did not begin")
        try:
            if self.inheritance is None:  # else it gets other RAM
                self.memory_fd = open_memory(job.pid, born.memory)
        except ProcessFailed as error:
            with trio.move_on_after(CLOSE_SECONDS):
                await job.ended.wait()
                raise ChannelEnded from None  # how it has ended says more
            raise ChannelBroken(str(error)) from None
        self._said = None
        if self.inheritance is None:
            self._birth.set()

    async def _not_begun(self, job: Job, error: ChannelBroken) -> VmfsError:
        if job.was_spare:
            return _SpareEnded("the process that was ready for it has ended")
        with trio.move_on_after(1):
            await job.ended.wait()
        if job.errno:
            return LimitReached(f"the machine has no process: {os.strerror(job.errno)}")
        return ProcessFailed(f"the machine's process did not begin: {_how(job) or error}")

    async def _be_born_of_another(self, channel: Channel[ToServer], job: Job) -> None:
        """The spare has ended with nothing done: a process that is made for the machine is told the same."""
        channel.close()
        self.host.kill(job)
        said, self._said = self._said or [], []
        try:
            again = self._spawn(fresh=True)
        except VmfsError as error:
            self._stay_unborn(channel, job, error)
            return
        waiting = [one for one in said if getattr(one[0], "call", None) in (None, *self._calls)]
        self._said = waiting
        with contextlib.suppress(ChannelBroken, trio.ClosedResourceError):  # its listener says so
            await again.send_all(waiting)

    async def _be_made_anew(self, channel: Channel[ToServer], job: Job) -> None:
        """A template's fork has ended with nothing answered, and whatever it has done is gone with it: be that fork in
        another process."""
        channel.close()
        self.host.kill(job)
        said, self._said, self._birth = self._said or [], [], trio.Event()
        try:
            self._spawn(fresh=True)
        except VmfsError as error:
            self._stay_unborn(channel, job, error)
            return
        await self._birth.wait()
        if self._channel is not None and not self._is_over:
            with contextlib.suppress(ChannelBroken, trio.ClosedResourceError):  # its listener says so
                await self._channel.send_all(
                    [one for one in said if getattr(one[0], "call", None) in (None, *self._calls)]
                )

    async def _come_into(self, channel: Channel[ToServer], job: Job, inheritance: Inheritance) -> None:
        """Of a fork: have its process be the copied machine, before anything else is asked of it."""
        fds, files, self._files = tuple(inheritance.fds), self._files, None
        line, asker, sent = files if files is not None else (None, None, trio.Event())

        def said() -> None:
            if line is not None:
                line.close()  # nobody has it now but the fork, and the other end has nobody yet
            sent.set()

        try:
            await self._ask(
                channel,
                lambda at: commands.Inherit(at, line is not None),
                asker,
                send=fds if line is None else (*fds, line.fileno()),
                sent=said,
            )
        except VmfsError as error:
            if not self.removed and not self.failure:
                self._stay_unborn(channel, job, error)
        else:
            self._birth.set()
        finally:
            said()

    async def begin_with_files(self, line: socket.socket, asker: Asker, sent: trio.Event) -> None:
        """`start`, of a fork that gets files by that socket, which is closed, and `sent` set, as soon as it has it. It
        opens what it needs besides as `asker`."""
        self._files = line, asker, sent
        try:
            await self.start()
        finally:
            line.close()
            sent.set()

    async def copy(
        self, snapshot: str, live: bool, asker: Asker | None, ask: Callable[..., Awaitable[Any]]
    ) -> tuple[commands.Copied, Inheritance]:
        """What a fork of it is made of: of now, or of that snapshot. `ask` is `call`, as the caller of the mount has
        it. `close_copy` is to be called."""
        if snapshot in self._copied:
            return self._copied[snapshot]
        changes = self._changes
        answer = await ask(self, lambda at: commands.Fork(at, snapshot, live), asker)
        try:
            inheritance = self._copies.get(answer.same)
            if inheritance is None:
                assert self._job is not None
                inheritance = self._copies[answer.same] = Inheritance(self._job.pid, answer.memory)
            check_size(answer.size)
        except BaseException:
            self.tell(commands.Close(answer.copy))
            raise
        if snapshot and not answer.files and changes == self._changes and not self._is_over:
            self._copied[snapshot] = answer, inheritance
        return answer, inheritance

    def close_copy(self, copy: commands.Copied) -> None:
        """It is made a machine of. That of a snapshot the server may use again."""
        if not any(copy is kept for kept, _ in self._copied.values()):
            self.tell(commands.Close(copy.copy), at_once=False)

    def _forget_copied(self) -> None:
        self._changes += 1
        copied, self._copied = self._copied, {}
        if not self._is_over:
            for copy, _ in copied.values():
                self.tell(commands.Close(copy.copy), at_once=False)

    def _stay_unborn(self, channel: Channel[ToServer], job: Job, why: VmfsError) -> None:
        """Be as it was made."""
        channel.close()
        self.host.kill(job)
        self._job, self._channel, self._said, self._unborn = None, None, None, why
        for call in self._calls.values():
            call.failure = why
            call.event.set()
        self._birth.set()

    async def _listen(self, channel: Channel[ToServer], job: Job, is_born: bool) -> None:
        """Hear the machine, from its birth, unless it is born already, to its end."""
        why = ""  # it is ended by this server
        try:
            if not is_born and not await self._begin_life(channel, job):
                return
            while True:
                for _ in range(MESSAGES_MOST):
                    message, _ = await channel.receive()
                    self._said = None
                    self._hear(message)
                await trio.lowlevel.checkpoint()
        except (ChannelEnded, trio.ClosedResourceError):
            if is_born and self._said is not None and not self.removed:
                await self._be_made_anew(channel, job)
                return
        except ChannelBroken as error:
            why = f"was ended: {error}"
            self.host.kill(job)
        if self._channel is not channel:  # it stays as it was made
            return
        with trio.CancelScope(shield=True):
            await self._end(channel, job, why)

    async def _begin_life(self, channel: Channel[ToServer], job: Job) -> bool:
        """Whether this process is the machine's: else it stays as it was made, or is another one's."""
        try:
            await self._be_born(channel, job)
        except VmfsError as error:
            if self.removed:
                raise ChannelEnded from error
            if isinstance(error, _SpareEnded):
                await self._be_born_of_another(channel, job)
            else:
                self._stay_unborn(channel, job, error)
            return False
        if self.inheritance is not None:
            trio.lowlevel.spawn_system_task(self._come_into, channel, job, self.inheritance)
        return True

    async def _end(self, channel: Channel[ToServer], job: Job, why: str) -> None:
        self.watcher.ending()
        await self._kill(job)
        if not self.removed:
            how = why or _how(job) or "has closed its channel"
            self.failure = f"the machine's process {how}; the last command was {self._last or 'none'}"
            log.error("%s", self.failure)
            self.watcher.complained(self.failure)
        self._said = None
        self._birth.set()
        for call in self._calls.values():
            call.event.set()
        for helper in list(self._helpers):
            self.host.kill(helper)
        if not self.removed:
            channel.close()
        self._release_memory()
        self.inheritance = None
        self._forget_copied()
        self.host.end_templates(self._copies.values())
        self.watcher.ended()
        with trio.move_on_after(CLOSE_SECONDS):
            async with trio.open_nursery() as nursery:
                for path in list(self._sockets):
                    nursery.start_soon(self._unlink, path)
        self._finished.set()

    async def _kill(self, job: Job) -> None:
        """Have it end, by itself if it does. One that the kernel keeps, for a file of its user's that hangs, is left to
        the kernel: nothing of it runs any more."""
        with trio.move_on_after(CLOSE_SECONDS):
            await job.ended.wait()
        self.host.kill(job)
        with trio.move_on_after(CLOSE_SECONDS):
            await job.ended.wait()
        if job.code is None:
            log.warning("process %d of a removed or failed machine is kept by the kernel", job.pid)

    def _release_memory(self) -> None:
        if self.memory_fd >= 0:
            punch(self.memory_fd, 0, os.fstat(self.memory_fd).st_size)  # at once, even if others still map it
            os.close(self.memory_fd)
            self.memory_fd = -1

    async def remove(self) -> None:
        """End it. Its waiters are woken at once; returns when its process is gone and its memory free."""
        if self.removed:
            return
        self.removed = True
        self.inheritance = None
        self._forget_copied()
        for call in self._calls.values():
            call.event.set()
        channel, job = self._channel, self._job
        if channel is None or job is None:
            return
        if not self.failure:
            channel.close()  # it ends by itself then: files are written, guests stopped
        await self._finished.wait()

    # ---- what it says

    def _hear(self, message: Any) -> None:
        match message:
            case commands.Woken():
                self.watcher.woken(message.handle)
            case commands.Complaint():
                self.watcher.complained(message.sentence[:SENTENCE_MOST])
            case commands.Born():
                raise ChannelBroken("it was born twice")
            case _ if isinstance(message, commands.Question):
                if self._asked >= commands.ASKED_MOST:
                    raise ChannelBroken("it asks too much at a time")
                self._asked += 1
                trio.lowlevel.spawn_system_task(self._answer, message)
            case _:
                call = self._calls.get(message.call)
                if call is not None and call.answer is None:
                    if not isinstance(message, call.answered_by | Failed):
                        raise ChannelBroken(f"it answered {call.what} by {type(message).__name__}")
                    call.answer = message
                    call.event.set()

    async def _answer(self, question: Any) -> None:
        fds: list[int] = []
        try:
            text, fds = await _ANSWERS[type(question)](self, question)
            reply: Granted | Refused = Granted(question.ask, text)
        except Exception as raised:
            error = known(raised)
            if isinstance(error, VmfsError):
                reply = Refused(question.ask, error.errno, str(error))
            else:
                log.error("a machine's question failed", exc_info=error)
                reply = Refused(question.ask, errno.EIO, f"the server failed: {type(error).__name__}")
        channel = self._channel
        try:
            if channel is not None and not self.removed:
                await channel.send(reply, tuple(fds))
        except (ChannelBroken, trio.ClosedResourceError):
            pass
        finally:
            self._asked -= 1  # now: a machine that does not listen asks no more
            commands.close_all(fds)

    # ---- what it asks

    def _who(self, call: int, *words: str, changes: bool = False) -> Credentials:
        """On whose call it asks. HostError where nobody is.

        Where that is another user than the machine's own, it gets what a line of that user names (`words`), and
        nothing else: what a machine's process asks for is its owner's choice. `changes`: it will not only be read.
        """
        waiting = self._calls.get(call)
        asker = waiting.asker if waiting is not None else None
        if asker is None:
            raise HostError(errno.EPERM, "a machine gets nothing of the host that no user has asked for")
        if asker.who.uid != self.owner.uid and not asker.names(set(words), changes=changes):
            raise HostError(errno.EACCES, "another user's machine gets what a line names, and nothing else")
        if len(self._helpers) >= HELPERS_MOST or len(self._sockets) >= HELPERS_MOST:
            raise LimitReached(f"the machine has {HELPERS_MOST} helpers already")
        return asker.who

    async def _opened(self, who: Credentials, work: opener.Work, *, lives: bool = False) -> tuple[str, list[int]]:
        """What an opener got. With `lives`, its process goes on, until the machine ends."""
        return await self._opened_by(_line(), who, work, lives=lives)

    async def _opened_by(
        self, line: tuple[socket.socket, socket.socket], who: Credentials, work: opener.Work, *, lives: bool = False
    ) -> tuple[str, list[int]]:
        ours, its = line
        with ours:
            with its:
                job = self.host.open(who, work, its)
            self._helpers.add(job)
            try:
                packet, fds = b"", []
                with trio.move_on_after(OPENER_SECONDS) as scope:
                    await trio.lowlevel.wait_readable(ours)
                    packet, fds, flags, _ = socket.recv_fds(ours, 4096, commands.FDS_MOST, socket.MSG_CMSG_CLOEXEC)
                    if flags & socket.MSG_CTRUNC:
                        commands.close_all(fds)
                        raise LimitReached(NO_DESCRIPTOR)
                text, fds = self._result_of(packet, fds, late=scope.cancelled_caught)
            except BaseException:
                self._helpers.discard(job)
                self.host.kill(job)
                raise
        if not lives:  # its own descriptors of what it got are gone then: a port that is closed is free
            with trio.move_on_after(CLOSE_SECONDS):
                await job.ended.wait()
            self._helpers.discard(job)
        elif self._is_over:
            self.host.kill(job)
        else:
            trio.lowlevel.spawn_system_task(self._forget, job)
        return text, fds

    async def _forget(self, helper: Job) -> None:
        await helper.ended.wait()
        self._helpers.discard(helper)

    @staticmethod
    def _result_of(packet: bytes, fds: list[int], *, late: bool) -> tuple[str, list[int]]:
        """What an opener said."""
        if not packet:
            if late:
                raise HostError(errno.ETIMEDOUT, f"the host did not answer in {OPENER_SECONDS:g} seconds")
            raise ProcessFailed("the process that was to open it has ended")
        try:
            result = _decode_result(packet)
        except msgspec.MsgspecError as error:
            commands.close_all(fds)
            raise ProcessFailed("the process that was to open it said what cannot be") from error
        if result.errno:
            commands.close_all(fds)
            raise HostError(result.errno, result.text)
        return result.text, fds

    async def _open_path(self, ask: commands.OpenPath) -> tuple[str, list[int]]:
        """A socket at which the opener answers the machine."""
        if ask.flags not in _OPENINGS:
            raise HostError(errno.EINVAL, f"a machine opens nothing with the flags {ask.flags:#o}")
        if ask.flags == _OPENINGS[-1]:  # an overlay, which has no name
            who = self._who(ask.call, "cow")
            path = tempfile.gettempdir()
        else:
            word = f"{PCAP}{ask.path}" if ask.flags & os.O_CREAT else ask.path
            who, path = self._who(ask.call, word, changes=ask.flags != os.O_RDONLY), ask.path
        if len(self._openers) >= OPENERS_MOST:
            raise WouldBlock(f"{len(self._openers)} openers of the machine wait for the host already")
        theirs, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            try:
                job = self.host.open(who, opener.OpenPath(path, ask.flags, self.host.own_device), its)
            except BaseException:
                theirs.close()
                raise
        trio.lowlevel.spawn_system_task(self._bound, job)
        return "", [theirs.detach()]

    async def _bound(self, job: Job) -> None:
        """Kill an opener that takes too long. One that the kernel keeps all the same counts until it ends."""
        self._openers.add(job)
        with trio.move_on_after(OPENER_SECONDS):
            await job.ended.wait()
        self.host.kill(job)
        await job.ended.wait()
        self._openers.discard(job)

    async def _open_tap(self, ask: commands.OpenTap) -> tuple[str, list[int]]:
        return await self._opened(self._who(ask.call, ask.name), opener.OpenTap(ask.name))

    async def _listen_at(self, ask: commands.Listen) -> tuple[str, list[int]]:
        if ask.path.startswith("\0"):  # where a gdb.stream is handed over
            if not ask.path.startswith(HANDOVER):
                raise HostError(errno.EACCES, "no such socket is a machine's")
            who = self._who(ask.call)
        else:
            who = self._who(ask.call, ask.path or self._address_in(ask))
        with contextlib.ExitStack() as unused:
            line = _line()
            for end in line:
                unused.enter_context(end)
            text, fds = await self._opened(who, opener.Listen(ask.path, ask.host, ask.port, self.host.own_device))
            port, *made = text.split()
            if made:
                unused.pop_all()
                self._sockets[ask.path] = _Socket(who, (int(made[0]), int(made[1])), line)
        return port, fds

    def _address_in(self, ask: commands.Listen) -> str:
        """The word of the line that means that address."""
        waiting = self._calls.get(ask.call)
        lines = waiting.asker.lines() if waiting is not None and waiting.asker is not None else []
        for word in itertools.chain(*lines):
            if word.rpartition(":")[2] == str(ask.port) and (ask.host in _LOOPBACK or ask.host in word):
                return word
        return "\0"

    async def _unlink_at(self, ask: commands.Unlink) -> tuple[str, list[int]]:
        await self._unlink(ask.path)
        return "", []

    async def _unlink(self, path: str) -> None:
        made = self._sockets.pop(path, None)
        if made is not None:
            try:
                await self._opened_by(made.line, made.who, opener.Unlink(path, made.identity))
            except VmfsError as error:
                log.debug("%s: %s", path, error)

    async def _join_wire(self, ask: commands.JoinWire) -> tuple[str, list[int]]:
        return "", [self.host.wires.join(self._who(ask.call, ask.name), ask.name).detach()]

    async def _start_passt(self, ask: commands.StartPasst) -> tuple[str, list[int]]:
        return await self._opened(self._who(ask.call, *ask.options), opener.StartPasst(ask.options), lives=True)

    async def _start_share(self, ask: commands.StartShare) -> tuple[str, list[int]]:
        work = opener.StartShare(ask.path, ask.read_only, self.host.own_device)
        who = self._who(ask.call, ask.path, changes=not ask.read_only)
        return await self._opened(who, work, lives=True)

    async def _start_unpack(self, ask: commands.StartUnpack) -> tuple[str, list[int]]:
        words = (ask.path, f"format={ask.format}") if ask.format else (ask.path,)
        work = opener.StartUnpack(ask.path, ask.format, self.host.own_device)
        return await self._opened(self._who(ask.call, *words), work, lives=True)

    async def _reserve(self, ask: commands.Reserve) -> tuple[str, list[int]]:
        self.host.reserve(self, ask.what, ask.size)
        return "", []

    async def _invalidate(self, ask: commands.Invalidate) -> tuple[str, list[int]]:
        await self.watcher.invalidate(ask.ranges[:1000])
        return "", []


_ANSWERS: dict[type, Callable[[MachineProcess, Any], Awaitable[tuple[str, list[int]]]]] = {
    commands.OpenPath: MachineProcess._open_path,
    commands.OpenTap: MachineProcess._open_tap,
    commands.Listen: MachineProcess._listen_at,
    commands.Unlink: MachineProcess._unlink_at,
    commands.JoinWire: MachineProcess._join_wire,
    commands.StartPasst: MachineProcess._start_passt,
    commands.StartShare: MachineProcess._start_share,
    commands.StartUnpack: MachineProcess._start_unpack,
    commands.Reserve: MachineProcess._reserve,
    commands.Invalidate: MachineProcess._invalidate,
}


class _Socket(NamedTuple):
    """A path that was made for a machine which listens there. `line`: to the opener that will remove it, so that this
    needs no descriptor that there may not be."""

    who: Credentials
    identity: tuple[int, int]  # st_dev, st_ino
    line: tuple[socket.socket, socket.socket]


def _line() -> tuple[socket.socket, socket.socket]:
    """Our end and an opener's."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, its


def _how(job: Job) -> str:
    """How a process has ended; "" while it has not."""
    if job.code is None:
        return ""
    if job.code < 0:
        return f"was killed by {signal.Signals(-job.code).name}"
    return f"ended with code {job.code}"


