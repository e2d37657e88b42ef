"""Nodes, their numbers, and what lives and dies together. Knows no VM; pyfuse3 only as who polls.

A `Scope` is a machine's files, or the root's. A `Node` is an inode: a `Directory` or a `File`. A `Handle` is
an open file. What a file does is its `Kind`'s to say, which is bound to nothing: it is given the scope.
"""

from __future__ import annotations

import itertools
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import trio

from vmfs.words.errors import Gone, Invalid, NotPermitted, NotThere, VmfsError

POLL_IN, POLL_PRI, POLL_OUT, POLL_ERR, POLL_HUP = 0x1, 0x2, 0x4, 0x8, 0x10  # Linux asm-generic/poll.h
ROOT = 1
ATTR_SECONDS = 3600  # attributes other than sizes change only by calls that come through the kernel


WALK, WALK_OF = 3, 4  # the last three files that a walker has opened are of the four before this one
MOST_WALKERS = 16  # of which a scope knows what they opened


class Waker(Protocol):
    """What a poll leaves behind; pyfuse3.PollHandle is one."""

    def notify(self) -> None: ...


class Scope:
    """What lives and dies together. After `remove` its open files answer ENODEV, and whoever waits is woken.

    `complaint` is the last failure in a sentence, until the same succeeds. Used on the trio loop only, except
    `changed`.
    """

    def modified_ns(self) -> int:
        """When files that show its state last changed, for their mtime; 0 where they never do."""
        return 0

    def __init__(self) -> None:
        self.removed = False
        self.complaint = ""
        self._complaint_about: object = None
        self._opened: dict[int, tuple[str, ...]] = {}  # the files that a process has last opened, for reading only
        self._waiting: set[trio.Event] = set()
        self._pollers: dict[Handle, Waker] = {}
        self._token: trio.lowlevel.TrioToken | None = None

    def touch(self) -> None:
        """Something was written."""

    def complain(self, sentence: str, about: object) -> None:
        self.complaint, self._complaint_about = sentence, about

    def succeeded(self, about: object) -> None:
        if about == self._complaint_about:
            self.complaint, self._complaint_about = "", None

    def lists(self, pid: int) -> None:
        """A process looks at what files there are. 0: one that is not to be seen from here."""
        if not pid:
            return
        self._opened.setdefault(pid, ())
        if len(self._opened) > MOST_WALKERS:
            del self._opened[next(iter(self._opened))]

    def is_walking(self, pid: int, file: File) -> bool:
        """Whether a process that opens a file for reading reads a whole directory: as `diff -r` does, it has listed it,
        and opens the files in the order of their names. Some may be left out."""
        before = self._opened.get(pid)
        if before is None or not file.follows:  # those in reg/ and dev/ come in between
            return False
        self._opened[pid] = (*before, file.name)[-WALK:]
        most = WALK - 1 if file.kind.walked else WALK  # to take a run for a walk were worse
        return any(_walks(before, names, most) for names in file.follows)

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
        """`with scope.waiting() as event:` an event that removal sets, or whoever has it."""
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
        """Have everyone who polls ask again."""
        pollers, self._pollers = self._pollers, {}
        for waker in pollers.values():
            try:
                waker.notify()
            except OSError:  # its file is gone
                pass

    def changed(self) -> None:
        """Something may have changed. From any thread; costs nothing while nobody polls."""
        if self._pollers and self._token:
            try:
                self._token.run_sync_soon(self.wake, idempotent=True)
            except trio.RunFinishedError:
                pass


def _walks(opened: tuple[str, ...], names: tuple[str, ...], most: int) -> bool:
    """Whether the last `most` that were opened are in order in `names`. A directory begins with fewer."""
    need = min(most, max(len(names) - 1, 1))
    left = iter(names)
    return len(opened) >= need and all(name in left for name in opened[-need:])


class _Waiting:
    def __init__(self, events: set[trio.Event]) -> None:
        self._events = events
        self._event = trio.Event()

    def __enter__(self) -> trio.Event:
        self._events.add(self._event)
        return self._event

    def __exit__(self, *exception: object) -> None:
        self._events.discard(self._event)


class Handle:
    """An open file. `pid` (0: unknown) is who opened it, `nonblocking` whether with O_NONBLOCK."""

    direct_io = True  # the server answers every read; a size of 0 does not cut them
    keep_cache = False
    tells_closing = False  # `flush` is called
    appending = False  # opened with O_APPEND
    walking = False  # opened for reading by who reads all files of a directory
    unsaved = False  # `flush` has something to do
    waits = False  # what was written has not been understood yet

    def __init__(self, node: File, pid: int, nonblocking: bool) -> None:
        self.node = node
        self.scope: Any = node.scope
        self.pid = pid
        self.nonblocking = nonblocking

    async def read(self, offset: int, size: int) -> bytes:
        raise Invalid(f"{self.node.name} cannot be read")

    async def write(self, offset: int, data: bytes) -> int:
        raise Invalid(f"{self.node.name} cannot be written")

    async def flush(self) -> None:
        """A close(2), of one of its descriptors: what this raises, that call fails with."""

    def poll(self) -> int:
        """What would not block, as POLL_ bits. A plain file never blocks."""
        return POLL_IN | POLL_OUT

    def prepare_answer(self) -> None:
        """Called last before the open is answered, in the same task."""

    def close(self) -> None:
        """The last descriptor and the last mapping are gone."""


class Kind:
    """What a file does. Stateless: the same for the files of all machines."""

    readable = True
    writable = False
    attr_seconds: float = 0  # for which the kernel may keep size, blocks and mtime
    dated = True  # its mtime is when its machine last changed
    reading_acts = False  # a read changes the machine: only who may write the file may read it
    walked = True  # a program that copies or compares whole directories reads it, as any file

    def size(self, scope: Any) -> int | None:
        """The bytes that reading gives; None where `measure` has to find out. 0, as in /proc, for streams and what
        acts, and where a machine that runs would have to stop for it."""
        return 0

    async def measure(self, scope: Any) -> int:
        """Where `size` does not know: by making the contents. Only stat asks for that; `ls` without -l does not."""
        raise NotImplementedError

    def blocks(self, scope: Any, size: int) -> int:
        """512-byte blocks in use. A file with a size and no block is taken for a hole by tar -S."""
        return -(-size // 512)

    def truncate(self, scope: Any, size: int, opened: bool) -> None:
        """O_TRUNC or truncate(2), or, on an open file, ftruncate(2). Ignored where it means nothing."""

    def open(self, node: File, pid: int, nonblocking: bool, writing: bool) -> Handle:
        """`writing`: not O_RDONLY. Called only for what the kind is readable and writable for."""
        raise NotImplementedError


class EmptyHandle(Handle):
    """What who walks a directory gets of a file that is no plain one: its end."""

    async def read(self, offset: int, size: int) -> bytes:
        return b""


class Node:
    """An inode. `links`: in how many directories it stands."""

    format: int
    attr_seconds: float  # how long the kernel may keep its attributes

    def __init__(self, inodes: Inodes, scope: Scope, name: str, mode: int, uid: int, gid: int) -> None:
        self.inodes = inodes
        self.scope = scope
        self.name = name
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.links = 1
        self.atime_ns = self.mtime_ns = self.ctime_ns = time.time_ns()
        self.lookups = 0
        self.number = inodes.add(self)

    @property
    def st_mode(self) -> int:
        return self.format | self.mode

    size = blocks = 0  # as `look` or `measure` last found them

    def look(self) -> None:
        """Find out `size` and `blocks` where that is quick."""

    async def measure(self) -> None:
        """Find out `size` and `blocks`."""

    def modified_ns(self) -> int:
        return self.mtime_ns


class File(Node):
    format = stat.S_IFREG

    def __init__(
        self, inodes: Inodes, scope: Scope, name: str, mode: int, uid: int, gid: int, kind: Kind
    ) -> None:
        super().__init__(inodes, scope, name, mode, uid, gid)
        self.kind = kind
        self.group = name  # what failures are told by: `error` is about the last write of such a file
        self.follows: tuple[tuple[str, ...], ...] = ()  # the names that come before it in a walk
        self.attr_seconds = kind.attr_seconds

    def look(self) -> None:
        size = self.kind.size(self.scope)
        if size is not None:
            self.size, self.blocks = size, self.kind.blocks(self.scope, size)

    async def measure(self) -> None:
        if self.kind.size(self.scope) is None:
            self.size = await self.kind.measure(self.scope)
            self.blocks = self.kind.blocks(self.scope, self.size)
        else:
            self.look()

    def modified_ns(self) -> int:
        return max(self.mtime_ns, self.scope.modified_ns()) if self.kind.dated else self.mtime_ns


class Directory(Node):
    """A directory of `children`. Nothing may be made, removed or renamed in it, unless a subclass says so."""

    format = stat.S_IFDIR
    attr_seconds = ATTR_SECONDS

    def __init__(self, inodes: Inodes, scope: Scope, name: str, mode: int, uid: int, gid: int) -> None:
        super().__init__(inodes, scope, name, mode, uid, gid)
        self.links = 2
        self.parent: Directory = self
        self.children: dict[str, Node] = {}

    def add(self, node: Node) -> None:
        self.children[node.name] = node
        if isinstance(node, Directory):
            node.parent = self
            self.links += 1

    def take(self, name: str) -> Node:
        node = self.children.pop(name)
        if isinstance(node, Directory):
            self.links -= 1
        return node

    async def lookup(self, name: str) -> Node | None:
        return self.children.get(name)

    async def entries(self) -> Iterable[tuple[str, Node]]:
        """The children, in the order of their numbers, which never changes."""
        return sorted(self.children.items(), key=lambda item: item[1].number)

    @property
    def prefix(self) -> str:
        """Of the names in it, as sentences have them."""
        return f"{self.name}/"

    def no_such(self, name: str) -> VmfsError:
        """Why a file that is not there cannot be opened: O_CREAT, as shells have it, makes none."""
        return NotThere("there is no such file; a machine has those that it has")

    async def mkdir(self, name: str, mode: int, uid: int, gid: int, umask: int) -> Node:
        raise NotPermitted("directories are made at the root of the mount only")

    async def rmdir(self, name: str) -> None:
        raise NotPermitted("only a machine's directory can be removed")

    async def rename(self, name: str, parent: Directory, new_name: str, flags: int) -> None:
        raise NotPermitted("only a machine's directory can be renamed")

    def subtree(self) -> Iterator[Node]:
        yield self
        for child in self.children.values():
            if isinstance(child, Directory):
                yield from child.subtree()
            else:
                yield child


class Inodes:
    """The nodes by number. Numbers are never used twice, so there are no generations."""

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}
        self._numbers = itertools.count(ROOT)

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, node: Node) -> int:
        number = next(self._numbers)
        self._nodes[number] = node
        return number

    def get(self, number: int) -> Node:
        """Gone for a number that was forgotten, or that never was."""
        node = self._nodes.get(number)
        if node is None or node.scope.removed:
            raise Gone("the machine was removed")
        return node

    def forget(self, number: int, lookups: int) -> None:
        node = self._nodes.get(number)
        if node is not None:
            node.lookups -= lookups
            self._drop_if_unknown(node)

    def remove(self, top: Directory) -> None:
        """Its scope was removed: drop what the kernel does not know, and the rest when it forgets it."""
        for node in list(top.subtree()):
            self._drop_if_unknown(node)

    def _drop_if_unknown(self, node: Node) -> None:
        if node.lookups <= 0 and node.scope.removed:
            self._nodes.pop(node.number, None)
