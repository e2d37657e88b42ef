"""Operations without a mount: requests as the kernel sends them, on the fake engine."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from fs.fake_engine import FakeEngine

from vmfs.engine import EngineInfo
from vmfs.fs.hooks import pyfuse3
from vmfs.fs.inodes import ROOT, Inodes
from vmfs.fs.operations import Operations
from vmfs.fs.scopes import RootScope
from vmfs.fs.tree import RootDirectory
from vmfs.host.credentials import Credentials
from vmfs.host.machines import Host
from vmfs.host.settings import MountSettings
from vmfs.host.zygote import Job
from vmfs.machine import worker
from vmfs.words.errors import Invalid

INFOS = (EngineInfo("fake", True, True, 1.5, 'it is "fake"'), EngineInfo("other", False, False, None, "no"))


class Waker:
    """In the place of pyfuse3.PollHandle."""

    def __init__(self) -> None:
        self.woken = trio.Event()

    def notify(self) -> None:
        self.woken.set()


class Descriptor:
    """An open file."""

    def __init__(self, kernel: Kernel, number: int, inode: int, info: pyfuse3.FileInfo) -> None:
        self._kernel = kernel
        self.number = number
        self.inode = inode
        self.info = info

    async def read(self, size: int = 1 << 17, offset: int = 0) -> bytes:
        return bytes(await self._kernel.call(self._kernel.operations.read, self.number, offset, size))

    async def write(self, data: bytes, offset: int = 0) -> int:
        return await self._kernel.call(self._kernel.operations.write, self.number, offset, data)

    async def poll(self, waker: Waker | None = None) -> int:
        operations, context = self._kernel.operations, self._kernel.context
        return await self._kernel.call(operations.poll, self.inode, self.number, waker, context)

    async def close(self) -> None:
        try:
            await self._kernel.call(self._kernel.operations.flush, self.number)
        finally:
            await self._kernel.call(self._kernel.operations.release, self.number)


class Threads:
    """In the place of the zygote: a machine is a thread of the test, so that it has the test's engine. `layers` are
    none."""

    layers: dict[str, str] = {}

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count(1)

    def tell_taken(self) -> None:
        pass

    def machine(self, engine: str, memory_size: int, *, fresh: bool = False) -> tuple[Job, socket.socket]:
        job = Job(next(self._numbers))
        ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        token = trio.lowlevel.current_trio_token()
        job.pid = os.getpid()
        job.forked.set()

        def ended() -> None:
            job.code = 0
            job.ended.set()

        def live() -> None:
            try:
                trio.run(worker.serve, end, self._engine, self._named, memory_size)
            finally:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(ended)

        threading.Thread(target=live, daemon=True).start()
        return job, ours

    def _named(self, name: str) -> FakeEngine:
        if name != self._engine.name:
            raise Invalid(f"there is no engine {name}: {self._engine.name}")
        return self._engine

    def opener(self, who: Credentials, work: Any, answer: socket.socket) -> Job:
        raise AssertionError("nothing of the host is opened here")

    def kill(self, job: Job) -> None:
        """A thread ends by itself."""


class Kernel:
    """What the kernel does to Operations; failures are OSError."""

    def __init__(self, **limits: int) -> None:
        self.engine = FakeEngine()
        self.host = Host(Threads(self.engine), self.engine, MountSettings(**limits))
        self.inodes = Inodes()
        self.root = RootDirectory(self.inodes, RootScope(self.host, INFOS), 0o755, 0, 0)
        self.operations = Operations(self.inodes, self.host.capacity)
        self.context: Any = SimpleNamespace(uid=1000, gid=1001, pid=0, umask=0o022)

    async def call(self, handler: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await handler(*arguments)
        except pyfuse3.FUSEError as error:
            raise OSError(error.errno, os.strerror(error.errno)) from None

    async def walk(self, path: str) -> pyfuse3.EntryAttributes:
        entry = await self.operations.getattr(ROOT, self.context)
        for name in path.split("/"):
            if name:
                entry = await self.call(self.operations.lookup, entry.st_ino, os.fsencode(name), self.context)
        return entry

    async def size(self, path: str) -> int:
        """As stat(2) has it."""
        entry = await self.walk(path)
        return (await self.call(self.operations.getattr, entry.st_ino, self.context)).st_size

    async def open(self, path: str, flags: int = os.O_RDWR) -> Descriptor:
        inode = (await self.walk(path)).st_ino
        info = await self.call(self.operations.open, inode, flags, self.context)
        return Descriptor(self, info.fh, inode, info)

    async def mkdir(self, name: str, mode: int = 0o755) -> pyfuse3.EntryAttributes:
        """The machine has its process (here: thread) from now on, so that `engine.cpu` is its CPU."""
        entry = await self.call(self.operations.mkdir, ROOT, os.fsencode(name), mode, self.context)
        await self.root.children[name].scope.machine.start()
        return entry

    async def rmdir(self, name: str) -> None:
        await self.call(self.operations.rmdir, ROOT, os.fsencode(name), self.context)

    async def rename(self, old: str, new: str, flags: int = 0) -> None:
        names = os.fsencode(old), ROOT, os.fsencode(new)
        await self.call(self.operations.rename, ROOT, *names, flags, self.context)

    async def read(self, path: str) -> str:
        file = await self.open(path, os.O_RDONLY)
        try:
            return (await file.read()).decode()
        finally:
            await file.close()

    async def write(self, path: str, data: str | bytes) -> None:
        file = await self.open(path, os.O_WRONLY)
        try:
            await file.write(data.encode() if isinstance(data, str) else data)
        finally:
            await file.close()


def run_on_fs(test: Callable[[Kernel], Any], **limits: int) -> None:
    """Runs `await test(kernel)`, and ends all machines."""

    async def main() -> None:
        kernel = Kernel(**limits)
        try:
            with trio.fail_after(60):
                await test(kernel)
        finally:
            await kernel.root.close()

    trio.run(main)


@pytest.fixture
def on_fs() -> Callable[..., None]:
    return run_on_fs
