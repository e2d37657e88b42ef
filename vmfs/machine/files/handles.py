"""Files and open files of a machine, as its kinds see them.

A `File` is a name and its `Kind`; a `Handle` is an open file. A `Scope` is what its files see: the machine, or one
device of it. Its names, owners and permissions are the server's (`vmfs.fs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import trio

from vmfs.words.errors import Gone, Invalid

POLL_IN, POLL_PRI, POLL_OUT, POLL_ERR, POLL_HUP = 0x1, 0x2, 0x4, 0x8, 0x10  # Linux asm-generic/poll.h


class Waker(Protocol):
    """What a poll leaves here."""

    def notify(self) -> None: ...


class Scope:
    """What lives and dies together. Used on the trio loop only, except `changed`."""

    def __init__(self) -> None:
        self.removed = False
        self._waiting: set[trio.Event] = set()
        self._pollers: dict[Handle, Waker] = {}
        self._token: trio.lowlevel.TrioToken | None = None

    def check(self) -> None:
        """Raises Gone after removal."""
        if self.removed:
            raise Gone("the machine was removed")

    def remove(self) -> None:
        self.removed = True
        for event in self._waiting:
            event.set()
        self.wake()

    def waiting(self) -> _Waiting:
        """`with scope.waiting() as event:` an event that removal sets, or another holder."""
        return _Waiting(self._waiting)

    def watch(self, handle: Handle, waker: Waker) -> None:
        """Wake that poll at the next `wake`."""
        self._token = trio.lowlevel.current_trio_token()
        self._pollers[handle] = waker

    def unwatch(self, handle: Handle) -> None:
        self._pollers.pop(handle, None)

    def watched(self, handle: Handle) -> bool:
        return handle in self._pollers

    def wake(self) -> None:
        """Have all that poll it ask again."""
        pollers, self._pollers = self._pollers, {}
        for waker in pollers.values():
            waker.notify()

    def changed(self) -> None:
        """Something may have changed. From any thread; costs nothing while nobody polls."""
        if self._pollers and self._token:
            try:
                self._token.run_sync_soon(self.wake, idempotent=True)
            except trio.RunFinishedError:
                pass


class _Waiting:
    def __init__(self, events: set[trio.Event]) -> None:
        self._events = events
        self._event = trio.Event()

    def __enter__(self) -> trio.Event:
        self._events.add(self._event)
        return self._event

    def __exit__(self, *exception: object) -> None:
        self._events.discard(self._event)


@dataclass(frozen=True, slots=True)
class File:
    """A file of a machine or a device."""

    name: str
    kind: Kind
    scope: Any


class Handle:
    """An open file."""

    tells_closing = False  # `flush` is called
    unsaved = False  # `flush` has something to do
    waits = False  # what was written has not been understood yet
    number = 0  # by which the server calls it
    memory: int | None = None  # a descriptor of what the server and the kernel serve by themselves

    def __init__(self, node: File, nonblocking: bool) -> None:
        self.node = node
        self.scope: Any = node.scope
        self.nonblocking = nonblocking  # opened with O_NONBLOCK
        self.appending = False  # opened with O_APPEND
        self.walking = False  # opened for reading by a program that reads all files of a directory

    async def read(self, offset: int, size: int) -> bytes | None:
        """None: it is in the memory that is shared."""
        raise Invalid(f"{self.node.name} cannot be read")

    def share(self, memory: int) -> None:
        """Hand on what is read by that memory from now on, a descriptor of vmfs/words/ring.h, which stays its caller's;
        a file that is not a stream for many bytes does not."""

    def ends(self, offset: int) -> bool:
        """Whether reads from there on get nothing, until one is from the beginning."""
        return False

    def extents(self) -> list[tuple[int, int]]:
        """The (start, end) of what may be other than zeros, as few as a message has room for. In a thread."""
        return []

    async def write(self, offset: int, data: bytes) -> int:
        raise Invalid(f"{self.node.name} cannot be written")

    async def flush(self) -> None:
        """A close(2), of one of its descriptors: what this raises, that call fails with."""

    def sees(self, news: int) -> None:
        """The lane has answered a read with what is of these news."""

    def poll(self) -> int:
        """What would not block, as POLL_ bits. A plain file never blocks."""
        return POLL_IN | POLL_OUT

    def close(self) -> None:
        """The last descriptor and the last mapping are gone."""


class EmptyHandle(Handle):
    """What a reader of a whole directory gets of a file that is no plain one: its end."""

    async def read(self, offset: int, size: int) -> bytes:
        return b""


class Kind:
    """What a file does. Stateless: the same for the files of all machines."""

    readable = True
    writable = False

    walked = True  # a program that copies or compares whole directories reads it, as any file

    def size(self, scope: Any) -> int | None:
        """The bytes that reading gives; None where `measure` has to find out. 0, as in /proc, for streams and what
        acts, and where a machine that runs would have to stop for it."""
        return 0

    async def measure(self, scope: Any) -> int:
        """Where `size` does not know: by making the contents."""
        raise NotImplementedError

    def blocks(self, scope: Any, size: int) -> int:
        """512-byte blocks in use. A file with a size and no block is taken for a hole by tar -S."""
        return -(-size // 512)

    def truncate(self, scope: Any, size: int, opened: bool) -> Any:
        """O_TRUNC or truncate(2), or, on an open file, ftruncate(2). Ignored where it means nothing."""

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        """`writing`: not O_RDONLY. Called only for what the kind is readable and writable for."""
        raise NotImplementedError
