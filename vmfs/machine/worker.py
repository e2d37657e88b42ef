"""The process of a machine: its contents, by the commands of `vmfs.words.commands`.

`serve` makes the machine and answers calls until the channel ends, and then ends the machine. It is a thin layer: what
a file gets and puts is in `vmfs.machine.files`.
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
import trio

from vmfs.engine.base import Engine
from vmfs.machine.files import monitor, request
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.devices import DEV_KINDS, Devices, kind_of
from vmfs.machine.files.forks import CopyHandle, Forks
from vmfs.machine.files.handles import POLL_ERR, POLL_HUP, POLL_IN, EmptyHandle, File, Handle
from vmfs.machine.files.snapshots import Snapshots, take_restore
from vmfs.machine.files.table import CONTENTS, CPU_CONTENTS, REGISTER_KINDS, has_msr, listed_registers, register_file
from vmfs.machine.files.waiting import finished
from vmfs.machine.machine import Vm
from vmfs.words import commands
from vmfs.words.commands import (
    DATA_MOST,
    FOUND_ARRIVING,
    FOUND_DIRECTORY,
    FOUND_FILE,
    FOUND_NOTHING,
    FOUND_READ_ONLY,
    Channel,
    ChannelBroken,
    Done,
    Failed,
    Granted,
    Listed,
    Measured,
    Message,
    Opened,
    Refused,
    ToMachine,
)
from vmfs.words.door import Listening
from vmfs.words.errors import (
    EngineFailed,
    Gone,
    HostError,
    Interrupted,
    LimitReached,
    NotPermitted,
    VmfsError,
    WouldBlock,
    known,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

REST_MS = 30000  # as the emulator's core has it for a CPU that sleeps
REST_SECONDS_MOST = 600.0
NO_DESCRIPTOR = "the machine's process has no file descriptor left (ulimit -n)"
Become = Callable[[commands.Become], None]
# With the numbers of the channel and of an end of another one: returns in another process, whose channel that is.
Multiply = Callable[[int, int], None]
_decode_result = msgspec.msgpack.Decoder(commands.Result).decode


async def serve(
    sock: socket.socket, engine: Engine, engine_named: Callable[[str], Engine], memory_size: int
) -> None:
    """Be a machine until the other end of `sock` is closed. `engine_named`: those that it may be moved to."""
    await Unborn(sock, engine, engine_named, memory_size).serve(lambda order: None)


class Unborn:
    """A machine in a process that nobody has yet."""

    def __init__(
        self,
        sock: socket.socket,
        engine: Engine,
        engine_named: Callable[[str], Engine],
        memory_size: int,
        multiply: Multiply | None = None,
    ) -> None:
        self._channel: Channel[ToMachine] = Channel(sock, ToMachine)
        self._make = lambda: Worker(self._channel, Vm(engine, memory_size=memory_size), engine_named, multiply)
        self._worker: Worker | None = None
        with contextlib.suppress(Exception):  # it is told to the machine's maker, if it is still so then
            self._worker = self._make()

    async def serve(self, become: Become) -> None:
        """Be a machine until the other end of the channel is closed. `become` makes this process its user's."""
        order: Become | None = become
        try:
            if self._worker is None:
                await _be_somebodys(self._channel, become)
                order = None
                try:
                    self._worker = self._make()
                except Exception as raised:
                    await self._channel.send(_not_made(known(raised)))
                    return
            await self._worker.serve(order)
        except ChannelBroken as error:
            log.debug("the channel: %s", error)
        finally:
            if self._worker is not None:
                with trio.CancelScope(shield=True):
                    self._worker.contents.remove()
                    await trio.to_thread.run_sync(self._worker.contents.vm.close)
            self._channel.close()


def _not_made(error: BaseException) -> Failed:
    if not isinstance(error, VmfsError):
        log.error("a machine cannot be made", exc_info=error)
    return Failed(0, getattr(error, "errno", None) or errno.EIO, str(error))


async def _be_somebodys(channel: Channel[ToMachine], become: Become) -> None:
    """Hear whose machine this process is. Nothing else is done before."""
    order, fds = await channel.receive()
    commands.close_all(fds)
    if not isinstance(order, commands.Become):
        raise ChannelBroken(f"{type(order).__name__} before it is somebody's")
    become(order)


class Worker:
    """Answers the server's calls. Each is a task of its own."""

    def __init__(
        self,
        channel: Channel[ToMachine],
        vm: Vm,
        engine_named: Callable[[str], Engine],
        multiply: Multiply | None = None,
    ) -> None:
        self._channel = channel
        self._multiply = multiply
        self._door = ServerDoor(channel)
        self.contents = Contents(vm, self._door, self._complain, monitor.command, engine_named)
        self._devices = Devices(self.contents)
        self._snapshots = Snapshots(self.contents)
        self._forks = Forks(self.contents)
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(1)
        self._requests: dict[int, request.Request] = {}
        self._outbox_in, self._outbox = trio.open_memory_channel[Message](1000)

    async def serve(self, become: Become | None) -> None:
        """Until the channel ends: ChannelBroken. `become`: see `Unborn.serve`; None: the process is somebody's."""
        failure: ChannelBroken | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_news)
            nursery.start_soon(self._rest)
            try:
                if become is not None:
                    await _be_somebodys(self._channel, become)
                await self._channel.send(self._born())
                while True:
                    message, fds = await self._channel.receive()
                    self._take(nursery, message, fds)
            except ChannelBroken as error:
                failure = error  # not through the nursery, which would make a group of it
                self._door.end()
            nursery.cancel_scope.cancel()
        raise failure or ChannelBroken("it has ended")

    def _born(self) -> commands.Born:
        vm = self.contents.vm
        return commands.Born(commands.VERSION, vm.engine.name, vm.memory.fd)

    def _be_many(self, multiply: Multiply, line: int) -> None:
        """Go on in another process, as the same machine, which nobody has yet, with that channel; again and again."""
        multiply(self._channel.fileno(), line)
        self._multiply = None
        self._forks.part()
        self._channel.post(self._born())

    async def _rest(self) -> None:
        """Have a machine that stands still for long give back what it has for runs alone; one that sleeps within a run
        does so itself. The longer it stands still, the more seldom it is looked at."""
        pause = shortest = int(os.environ.get("VMFS_JIT_IDLE", REST_MS)) / 1000
        seen: int | None = None
        while True:
            await trio.sleep(pause)
            before, seen = seen, self.contents.vm.rest(seen)
            pause = shortest if seen != before else min(pause * 2, REST_SECONDS_MOST)

    def _take(self, nursery: trio.Nursery, message: Any, fds: list[int] | None) -> None:
        match message:
            case Granted() | Refused():
                self._door.answered(message, fds)
                return
            case commands.Become():
                commands.close_all(fds)
                raise ChannelBroken("it is somebody's already")
            case commands.Interrupt():
                if asked := self._requests.get(message.call):
                    asked.interrupt()
            case commands.Close():
                self._close(message.handle)
            case commands.Lane():
                if fds is not None and len(fds) == 1:
                    self._attach_lane(message, *fds)
                else:  # this process had no room for it
                    self.say(Failed(message.call, errno.ENOSPC, "no lane: there is no descriptor left", quiet=True))
            case commands.Multiply():
                if self._multiply is None or fds is None or len(fds) != 1:
                    commands.close_all(fds)
                    raise ChannelBroken("it does not multiply")
                self._be_many(self._multiply, *fds)
                return
            case commands.Share():
                self._share(message.handle, fds)
            case commands.Clients():
                self.contents.memory.set_clients(message.cached, message.writing)
            case _:
                # Here, so that an Interrupt that comes next finds it.
                asked = request.Request(message.call, getattr(message, "flags", commands.ANY_FLAGS))
                self._requests[message.call] = asked
                if isinstance(message, commands.Hand | commands.Inherit):
                    nursery.start_soon(self._answer, message, asked, fds)
                    return
                nursery.start_soon(self._answer, message, asked)
        commands.close_all(fds)

    async def _begin(self, message: commands.Begin) -> Done:
        self._forks.begin()
        return Done(message.call)

    def _attach_lane(self, message: commands.Lane, page: int) -> None:
        try:
            self.contents.vm.attach_lane(page, partial(take_restore, self.contents, trio.lowlevel.current_trio_token()))
            answer: Message = Done(message.call)
        except OSError as error:
            answer = Failed(message.call, error.errno or errno.EIO, f"no lane: {error.strerror}", quiet=True)
        self.say(answer)

    async def _answer(self, message: Any, asked: request.Request, fds: list[int] | None = None) -> None:
        request.begin(asked)
        try:
            if isinstance(message, commands.Hand):
                answer = await self._hand(message, fds)
            elif isinstance(message, commands.Inherit):
                await self._forks.inherit(message.files, fds, multiplies=self._multiply is not None)
                answer = Done(message.call)
            else:
                answer = await _CALLS[type(message)](self, message)
        except Exception as error:
            answer = self._failure(error, message)
        finally:
            self._requests.pop(message.call, None)
        try:
            await self._channel.send(answer)
        except ChannelBroken:
            pass  # `serve` hears of it, too

    def _failure(self, raised: Exception, message: Any) -> Failed:
        name, error = self._name_of(message), known(raised)
        if isinstance(error, VmfsError):
            may_be_asked_again = isinstance(error, WouldBlock) and isinstance(message, commands.Read)
            quiet = may_be_asked_again or isinstance(error, Interrupted)
            if error.errno == errno.EIO:
                log.error("%s %s: %s", type(message).__name__, name, error, exc_info=error)
            sentence = str(error)
            sentence = sentence if sentence.startswith(f"{name}: ") else f"{name}: {sentence}"
            if not isinstance(error, Interrupted):
                self.contents.complaint = sentence
            handle = self._handles.get(getattr(message, "handle", 0))
            unsaved = handle is not None and handle.unsaved
            return Failed(message.call, error.errno, sentence, error.errno == errno.EIO, quiet, unsaved)
        log.error("%s %s failed", type(message).__name__, name, exc_info=error)
        return Failed(message.call, errno.EIO, "", True, True)

    def _name_of(self, message: Any) -> str:
        handle = self._handles.get(getattr(message, "handle", 0))
        path = getattr(message, "file", "") or getattr(message, "path", "") or getattr(message, "directory", "")
        return handle.node.name if handle is not None else path.rpartition("/")[2]

    # ---- open files

    async def _open(self, message: commands.Open) -> Any:
        request_now = request.current()
        assert request_now is not None
        request_now.uid = message.uid
        file = await self._file(message.file)
        if message.walking and not file.kind.walked:
            handle: Handle = EmptyHandle(file, False)
        else:
            handle = file.kind.open(file, message.nonblocking, message.writing)
        handle.appending, handle.walking = message.appending, message.walking
        handle.number = number = next(self._numbers)
        self._handles[number] = handle
        return Opened(message.call, number, handle.tells_closing, -1 if handle.memory is None else handle.memory)

    def _handle(self, number: int) -> Handle:
        handle = self._handles.get(number)
        if handle is None:
            raise Gone("the file is not open")
        if handle.scope.removed:
            raise Gone("the device was removed")
        return handle

    async def _read(self, message: commands.Read) -> Done | commands.Placed:
        handle = self._handle(message.handle)
        data = await handle.read(message.offset, min(message.size, DATA_MOST))
        if data is None:
            return commands.Placed(message.call)
        return Done(message.call, bytes(data), int(handle.ends(message.offset + len(data))))

    def _share(self, number: int, fds: list[int] | None) -> None:
        """Where that is not possible, the file is read as before."""
        handle = self._handles.get(number)
        if handle is not None and fds is not None and len(fds) == 1:
            try:
                handle.share(*fds)
            except OSError as error:
                log.warning("%s is not read ahead: %s", handle.node.name, error)

    async def _write(self, message: commands.Write) -> Done:
        handle = self._handle(message.handle)
        done = await handle.write(message.offset, message.data)
        return Done(message.call, b"", done, handle.unsaved, handle.waits)

    async def _flush(self, message: commands.Flush) -> Done:
        await self._handle(message.handle).flush()
        return Done(message.call)

    async def _poll(self, message: commands.Poll) -> Done:
        handle = self._handles.get(message.handle)
        if handle is None or handle.scope.removed:
            return Done(message.call, b"", POLL_ERR | POLL_HUP | POLL_IN)
        if message.watch:  # before looking, so that a change in between is not lost
            handle.scope.watch(handle, _Waker(self, message.handle))
            self.contents.vm.settle()  # from now on the lane runs nothing, until it is woken
        handle.sees(message.seen)
        return Done(message.call, b"", handle.poll())

    def _close(self, number: int) -> None:
        handle = self._handles.pop(number, None)
        if handle is not None:
            handle.scope.unwatch(handle)
            handle.close()

    # ---- names, sizes

    async def _file(self, path: str) -> File:
        """Gone for what is not there any more: the server knows the names that were."""
        cpu, path_there = _cpu_of(path)
        folder, _, name = path_there.rpartition("/")
        contents = self.contents.of_cpu(cpu)
        if cpu is not None and not folder:
            kind = CPU_CONTENTS.get(name)
        elif folder == "reg":
            kind = REGISTER_KINDS.get(name) or (register_file(name) if await self._has_msr(contents, name) else None)
        elif folder == "dev":
            kind = DEV_KINDS.get(name)
        elif folder.startswith("snap/"):
            found = self._snapshots.find(path_there.removeprefix("snap/"))
            if found is not None:
                return File(name, *found)
            kind = None
        elif folder.startswith("dev/"):
            scope = self._devices.scope(folder.removeprefix("dev/"))
            found = None if scope is None else kind_of(scope.device, name)
            if found is not None:
                return File(name, found, scope)
            kind = None
        else:
            kind = None if folder else CONTENTS.get(name)
        if kind is None:
            raise Gone(f"there is no {path} any more")
        return File(name, kind, contents)

    async def _has_msr(self, contents: Contents, name: str) -> bool:
        found = contents.vm.at_boundary(lambda cpu: has_msr(cpu, name))
        await finished(found, contents)
        return bool(found.result())

    async def _find(self, message: commands.Find) -> Done:
        cpu, path = _cpu_of(message.path)
        folder, _, name = path.rpartition("/")
        found = FOUND_NOTHING
        if folder == "reg":
            if name in REGISTER_KINDS:
                found = FOUND_FILE if REGISTER_KINDS[name].writable else FOUND_READ_ONLY
            elif await self._has_msr(self.contents.of_cpu(cpu), name):
                found = FOUND_FILE
        elif folder == "dev" and self._devices.scope(name) is not None:
            found = FOUND_DIRECTORY
        return Done(message.call, b"", found)

    async def _list(self, message: commands.List) -> Listed:
        cpu, directory = _cpu_of(message.directory)
        if directory == "reg":
            listed = self.contents.of_cpu(cpu).vm.at_boundary(listed_registers)
            await finished(listed, self.contents)
            names = [(name, _found(name)) for name in listed.result()]
        elif directory == "cpus":
            names = [(f"cpu{cpu.index}", FOUND_DIRECTORY) for cpu in self.contents.vm.cpus]
        elif directory == "dev":
            names = [(name, self._devices.found(name)) for name in self._devices.names()]
        elif directory == "snap":
            names = [(name, FOUND_DIRECTORY) for name in self._snapshots.names()]
            names += [(name, FOUND_ARRIVING) for name in self._snapshots.arrivals.names()]
        elif directory.startswith("snap/"):
            snapshot = directory.removeprefix("snap/")
            is_arriving = snapshot.partition("/")[0] in self._snapshots.arrivals.names()
            found = FOUND_FILE if is_arriving else FOUND_READ_ONLY
            names = [(name, found) for name in self._snapshots.listed(snapshot)]
        else:
            names = []
        return Listed(message.call, names)

    async def _remove(self, message: commands.Remove) -> Done:
        folder, _, name = message.path.rpartition("/")
        if folder == "dev":
            self._devices.remove(name)
        elif folder == "snap":
            await self._snapshots.remove(name)
            self._forks.forget(name)
        elif folder.startswith("snap/"):
            if not self._snapshots.arrivals.remove(message.path.removeprefix("snap/")):
                raise NotPermitted("a snapshot is only read")
        else:
            raise NotPermitted("only a device's directory and a snapshot can be removed")
        return Done(message.call)

    async def _take_snapshot(self, message: commands.Take) -> Done:
        await self._snapshots.take(message.name, message.live)
        return Done(message.call)

    async def _extents(self, message: commands.Extents) -> Done:
        found = await trio.to_thread.run_sync(self._handle(message.handle).extents)
        return Done(message.call, array.array("Q", itertools.chain.from_iterable(found)).tobytes())

    async def _arrive(self, message: commands.Arrive) -> Done:
        await self._snapshots.arrivals.begin(message.name, message.is_new, message.live)
        return Done(message.call)

    async def _make_file(self, message: commands.Make) -> Done:
        await self._snapshots.arrivals.make(message.path.removeprefix("snap/"))
        return Done(message.call)

    async def _fill(self, message: commands.Fill) -> Done:
        await self._snapshots.arrivals.fill(message.path.removeprefix("snap/"), message.source)
        return Done(message.call)

    async def _rename(self, message: commands.Rename) -> Done:
        await self._snapshots.arrivals.rename(message.path.removeprefix("snap/"), message.new.removeprefix("snap/"))
        return Done(message.call)

    async def _fork(self, message: commands.Fork) -> commands.Copied:
        handle, copy = await self._forks.copy(message.snapshot, message.live)
        handle.number = number = next(self._numbers)
        self._handles[number] = handle
        return commands.Copied(
            message.call, number, copy.number, copy.engine, copy.size, list(copy.memory), bool(copy.files)
        )

    async def _hand(self, message: commands.Hand, fds: list[int] | None) -> Done:
        handle = self._handles.get(message.copy)
        copy = handle.copy if isinstance(handle, CopyHandle) else None
        if copy is None:
            commands.close_all(fds)
            raise Gone("there is no such copy")
        await self._forks.hand(copy, fds)
        return Done(message.call)

    async def _measure(self, message: commands.Measure) -> Measured:
        sizes = []
        for path in message.files:
            if (now := request.current()) is not None and now.interrupted:
                raise Interrupted("the caller does not wait any more")
            try:
                file = await self._file(path)
                size = file.kind.size(file.scope)
                if size is None:
                    async with request.interruptible():
                        size = await file.kind.measure(file.scope)
                sizes.append((size, file.kind.blocks(file.scope, size)))
            except Exception as error:
                if isinstance(known(error), LimitReached | Interrupted) or not isinstance(error, VmfsError):
                    raise
                sizes.append((0, 0))
        return Measured(message.call, sizes, self.contents.modified_ns())

    async def _truncate(self, message: commands.Truncate) -> Done:
        file = await self._file(message.file)
        done = file.kind.truncate(file.scope, message.size, message.opened)
        if done is not None:
            await done
        return Done(message.call)

    # ---- what the machine says by itself

    async def _send_news(self) -> None:
        try:
            async for message in self._outbox:
                await self._channel.send(message)
        except ChannelBroken:
            pass

    def say(self, message: Message) -> None:
        """On the loop. When too much waits to be said, a poll may be late; nothing else is said this way."""
        try:
            self._outbox_in.send_nowait(message)
        except trio.WouldBlock:
            log.warning("the server does not listen: %r is not said", message)

    def _complain(self, sentence: str) -> None:
        self.say(commands.Complaint(sentence))


class _Waker:
    """Tells the server that a poll of a handle may have another answer."""

    def __init__(self, worker: Worker, handle: int) -> None:
        self._worker = worker
        self._handle = handle

    def notify(self) -> None:
        self._worker.say(commands.Woken(self._handle))


_CPU = re.compile(r"cpu([0-9]{1,2})/(.+)")


def _cpu_of(path: str) -> tuple[int | None, str]:
    """Of which cpuN/ it is a path in, if of any, and what it is there."""
    match = _CPU.fullmatch(path)
    return (int(match[1]), match[2]) if match else (None, path)


def _found(register: str) -> int:
    kind = REGISTER_KINDS.get(register)
    return FOUND_FILE if kind is None or kind.writable else FOUND_READ_ONLY


_CALLS: dict[type, Callable[[Worker, Any], Awaitable[Any]]] = {
    commands.Open: Worker._open,
    commands.Read: Worker._read,
    commands.Write: Worker._write,
    commands.Flush: Worker._flush,
    commands.Poll: Worker._poll,
    commands.Measure: Worker._measure,
    commands.Truncate: Worker._truncate,
    commands.List: Worker._list,
    commands.Find: Worker._find,
    commands.Take: Worker._take_snapshot,
    commands.Remove: Worker._remove,
    commands.Extents: Worker._extents,
    commands.Arrive: Worker._arrive,
    commands.Make: Worker._make_file,
    commands.Fill: Worker._fill,
    commands.Rename: Worker._rename,
    commands.Fork: Worker._fork,
    commands.Begin: Worker._begin,
}


class ServerDoor:
    """The door of a machine with a server: it asks it over the channel. For threads; `vmfs.words.door.Door`."""

    def __init__(self, channel: Channel[ToMachine]) -> None:
        self._channel = channel
        self._token = trio.lowlevel.current_trio_token()
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[trio.Event, list[Any]]] = {}
        self._room = trio.Semaphore(commands.ASKED_MOST)
        self._ended = False

    def open(self, path: str, flags: int) -> int:
        line = self._one_fd(self._ask(lambda ask: commands.OpenPath(ask, _call(), path, flags)))
        with socket.socket(fileno=line) as opener:
            packet, fds, cut, _ = socket.recv_fds(opener, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        if cut & socket.MSG_CTRUNC:
            raise LimitReached(NO_DESCRIPTOR)
        if not packet:
            raise HostError(errno.ETIMEDOUT, f"{path[:200]}: the host does not answer")
        try:
            result = _decode_result(packet)
        except msgspec.MsgspecError as error:
            commands.close_all(fds)
            raise EngineFailed("the process that was to open it said what cannot be") from error
        if result.errno:
            commands.close_all(fds)
            raise HostError(result.errno, result.text)
        return self._one_fd(("", fds))

    def tap(self, name: str) -> int:
        return self._one_fd(self._ask(lambda ask: commands.OpenTap(ask, _call(), name)))

    def wire(self, name: str) -> int:
        return self._one_fd(self._ask(lambda ask: commands.JoinWire(ask, _call(), name)))

    def listen(self, where: str | tuple[str, int]) -> Listening:
        path, host, port = (where, "", 0) if isinstance(where, str) else ("", *where)
        text, fds = self._ask(lambda ask: commands.Listen(ask, _call(), path, host, port))
        return Listening(self._one_fd((text, fds)), int(text or 0))

    def unlink(self, path: str) -> None:
        self._ask(lambda ask: commands.Unlink(ask, path))

    def passt(self, options: tuple[str, ...]) -> tuple[int, int]:
        text, fds = self._ask(lambda ask: commands.StartPasst(ask, _call(), list(options)))
        return self._one_fd((text, fds)), int(text)

    def share(self, path: str, read_only: bool) -> int:
        return self._one_fd(self._ask(lambda ask: commands.StartShare(ask, _call(), path, read_only)))

    def unpack(self, path: str, format: str, take: Callable[[int], None]) -> tuple[int, int]:
        line = self._one_fd(self._ask(lambda ask: commands.StartUnpack(ask, _call(), path, format)))
        with socket.socket(fileno=line) as unpacker:
            while True:
                packet, fds, cut, _ = socket.recv_fds(unpacker, 4096, 1, socket.MSG_CMSG_CLOEXEC)
                if cut & socket.MSG_CTRUNC:
                    raise LimitReached(NO_DESCRIPTOR)
                if not packet:
                    raise HostError(errno.ETIMEDOUT, f"{path[:200]}: the process that unpacks it was ended")
                if packet[:1] != b"T":
                    break
                take(int.from_bytes(packet[1:9], "little"))
                unpacker.send(b"\x01")
        try:
            result = _decode_result(packet[1:])
            size = int(result.text) if not result.errno else 0
        except (msgspec.MsgspecError, ValueError) as error:
            commands.close_all(fds)
            raise EngineFailed("the process that was to unpack it said what cannot be") from error
        if result.errno:
            commands.close_all(fds)
            raise HostError(result.errno, result.text)
        return self._one_fd(("", fds)), size

    def reserve(self, what: str, size: int) -> None:
        self._ask(lambda ask: commands.Reserve(ask, what, size))

    def release(self, what: str, size: int) -> None:
        ask = next(self._numbers)
        with contextlib.suppress(trio.RunFinishedError):  # the machine is removed, and all that it held is free
            self._token.run_sync_soon(trio.lowlevel.spawn_system_task, self._say, commands.Reserve(ask, what, -size))

    async def _say(self, message: Message) -> None:
        with contextlib.suppress(ChannelBroken, trio.ClosedResourceError, Gone):
            await self._answer_to(message.ask, message)

    def invalidate(self, ranges: list[tuple[int, int]]) -> None:
        if ranges:
            self._ask(lambda ask: commands.Invalidate(ask, ranges))

    def end(self) -> None:
        """On the loop: no answer comes any more. Threads that wait for one go on, since the loop waits for them."""
        self._ended = True
        for event, answer in self._asked.values():
            answer[:] = Refused(0, errno.ENODEV, "the machine was removed"), []
            event.set()

    def answered(self, message: Granted | Refused, fds: list[int] | None) -> None:
        """On the loop: the server's answer has come."""
        waiting = self._asked.pop(message.ask, None)
        if waiting is None:
            commands.close_all(fds)
            return
        event, answer = waiting
        answer[:] = message, fds
        event.set()

    def _ask(self, make: Callable[[int], Message]) -> tuple[str, list[int]]:
        ask = next(self._numbers)
        message = make(ask)  # here, in the context of the call
        try:
            answer, fds = trio.from_thread.run(self._answer_to, ask, message, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled, ChannelBroken):
            raise Gone("the machine was removed") from None
        if isinstance(answer, Refused):
            commands.close_all(fds)
            raise HostError(answer.errno, answer.sentence)
        if fds is None:
            raise LimitReached(NO_DESCRIPTOR)
        return answer.text, fds

    async def _answer_to(self, ask: int, message: Message) -> tuple[Granted | Refused, list[int]]:
        async with self._room:
            if self._ended:
                raise Gone("the machine was removed")
            event, answer = self._asked[ask] = trio.Event(), []
            try:
                await self._channel.send(message)
                await event.wait()
            finally:
                self._asked.pop(ask, None)
        return answer[0], answer[1]

    @staticmethod
    def _one_fd(answer: tuple[str, list[int]]) -> int:
        _, fds = answer
        if len(fds) != 1:
            commands.close_all(fds)
            raise EngineFailed("the server granted something else than was asked for")
        return fds[0]


def _call() -> int:
    """The call that the running thread works for; 0 is none."""
    now = request.current()
    return 0 if now is None else now.call
