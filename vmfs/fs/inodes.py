"""Nodes, their numbers, and what lives and dies together. Knows no VM; pyfuse3 only for what polls.

A `Scope` is a machine's files, or the root's. A `Node` is an inode: a `Directory` or a `File`. A `Handle` is
an open file. What a file does is its `Kind`'s to say, which is bound to nothing: it is given the scope.
"""

from __future__ import annotations

import itertools
import stat
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol

from vmfs.words.errors import Gone, Invalid, NotPermitted, NotThere, VmfsError

POLL_IN, POLL_PRI, POLL_OUT, POLL_ERR, POLL_HUP = 0x1, 0x2, 0x4, 0x8, 0x10  # Linux asm-generic/poll.h
ROOT = 1
ATTR_SECONDS = 3600  # attributes other than sizes change only by calls that come through the kernel

WALK, WALK_OF = 3, 4  # the last three files that a walker has opened are of the four before this one
MOST_WALKERS = 16  # of which a scope knows what they opened


class Waker(Protocol):
    """What a poll leaves here; pyfuse3.PollHandle is one."""

    def notify(self) -> None: ...


class Scope:
    """What lives and dies together. After `remove` its open files answer ENODEV, and every waiter is woken.

    `complaint` is the last failure in a sentence, until the same succeeds. Used on the trio loop only.
    """

    def __init__(self) -> None:
        self.removed = False
        self.complaint = ""
        self._complaint_about: object = None
        self._opened: dict[int, tuple[str, ...]] = {}  # the files that a process has last opened, for reading only
        self.modified_ns = 0  # when files that show its state last changed, for their mtime; 0 where they never do
        self._pollers: dict[int, Waker] = {}

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
        self.wake_all()

    def watch(self, handle: int, waker: Waker) -> None:
        """Wake that poll, of the open file with that number, at the next `wake`."""
        self._pollers[handle] = waker

    def unwatch(self, handle: int) -> None:
        self._pollers.pop(handle, None)

    def wake(self, handle: int) -> None:
        """Have the pollers of that open file ask again."""
        waker = self._pollers.pop(handle, None)
        if waker is not None:
            try:
                waker.notify()
            except OSError:  # its file is gone
                pass

    def wake_all(self) -> None:
        for handle in list(self._pollers):
            self.wake(handle)


def _walks(opened: tuple[str, ...], names: tuple[str, ...], most: int) -> bool:
    """Whether the last `most` that were opened are in order in `names`. A directory begins with fewer."""
    need = min(most, max(len(names) - 1, 1))
    left = iter(names)
    return len(opened) >= need and all(name in left for name in opened[-need:])


class Handle:
    """An open file. `pid` (0: unknown) is its opener's."""

    direct_io = True  # the server answers every read; a size of 0 does not cut them
    keep_cache = False
    tells_closing = False  # `flush` is called
    walking = False  # opened for reading by a program that reads all files of a directory
    unsaved = False  # `flush` has something to do
    waits = False  # what was written has not been understood yet

    def __init__(self, node: File, pid: int) -> None:
        self.node = node
        self.scope: Any = node.scope
        self.pid = pid

    async def read(self, offset: int, size: int) -> bytes:
        raise Invalid(f"{self.node.name} cannot be read")

    async def write(self, offset: int, data: bytes) -> int:
        raise Invalid(f"{self.node.name} cannot be written")

    async def flush(self) -> None:
        """A close(2), of one of its descriptors: what this raises, that call fails with."""

    async def poll(self, waker: Waker | None) -> int:
        """What would not block, as POLL_ bits; a plain file never blocks. `waker` is notified when that may be other.
        """
        return POLL_IN | POLL_OUT

    def numbered(self, number: int) -> None:
        """The kernel will know it by that number."""

    def prepare_answer(self) -> None:
        """Called last before the open is answered, in the same task."""

    def close(self) -> None:
        """The last descriptor and the last mapping are gone."""


class Kind:
    """What a file does. Stateless: the same for the files of all machines."""

    readable = True
    writable = False
    sized = False  # its size may change: the kernel asks for the attributes each time
    reading_acts = False  # a read changes the machine: it takes the right to write, too
    dated = True  # its mtime is when its machine last changed
    only_shows = False  # a write chooses what it shows, and changes nothing of the machine
    lasting = False  # its size never changes: once it was measured, the kernel may keep the attributes
    walked = True  # a program that copies or compares whole directories reads it, as any file

    async def open(self, node: File, pid: int, flags: int, uid: int, walking: bool) -> Handle:
        """`flags` of open(2), whose it is, and whether a program that reads all files of a directory opens it. Called
        only for what the kind is readable and writable for."""
        raise NotImplementedError

    async def truncate(self, node: File, size: int, opened: bool) -> None:
        """O_TRUNC or truncate(2), or, on an open file, ftruncate(2). Ignored where it means nothing."""

    def stands_since(self, node: File) -> object | None:
        """While this is the same, and not None, the size and the time of the file are as they were."""
        return None

    def local_size(self, node: File) -> tuple[int, int] | None:
        """st_size and st_blocks, where the server knows them; None: the machine is asked."""
        return None

    def added_size(self, node: File) -> int:
        """Bytes that the server adds to what the machine gives."""
        return 0


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

    size = (0, 0)  # st_size and st_blocks, as they were last measured

    @property
    def st_mode(self) -> int:
        return self.format | self.mode

    def modified_ns(self) -> int:
        return self.mtime_ns


class File(Node):
    """`path`: from the directory of its scope on, as its machine knows it."""

    format = stat.S_IFREG
    measured_at: object = None  # `Kind.stands_since`, when it was measured

    def __init__(
        self, inodes: Inodes, scope: Scope, path: str, mode: int, uid: int, gid: int, kind: Kind
    ) -> None:
        super().__init__(inodes, scope, path.rpartition("/")[2], mode, uid, gid)
        self.path = path
        self.kind = kind
        self.group = self.name  # what failures are told by: `error` is about the last write of such a file
        self.follows: tuple[tuple[str, ...], ...] = ()  # the names that come before it in a walk
        self.attr_seconds = 0 if kind.sized else ATTR_SECONDS
        # Of a file that can be written once that was called with the writer's process, or raised.
        self.becomes_writable: Callable[[int], Awaitable[None]] | None = None
        # Of a file that a sealed memfd can be: called with the file, the memfd's path, and who says so.
        self.takes_memfd: Callable[[File, str, int], Awaitable[None]] | None = None

    def touch(self) -> None:
        """It was written."""
        if self.kind.only_shows:
            self.mtime_ns = time.time_ns()
        else:
            self.scope.touch()

    def modified_ns(self) -> int:
        return max(self.mtime_ns, self.scope.modified_ns) if self.kind.dated else self.mtime_ns


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

    asks = False  # there may be children that are not known

    def known(self, name: str) -> Node | None:
        """A child that is there for sure. None: there is none, or, in one that `asks`, `lookup` has to say."""
        return self.children.get(name)

    async def lookup(self, name: str) -> Node | None:
        return self.known(name)

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

    async def mkdir(self, name: str, mode: int, caller: Any) -> Node:
        """`mode`: as it was asked for; the umask is the caller's."""
        raise NotPermitted("directories are made at the root of the mount only")

    async def create(self, name: str, mode: int, caller: Any) -> Node:
        """A new file: O_CREAT."""
        raise self.no_such(name)

    async def unlink(self, name: str, pid: int) -> None:
        raise NotPermitted("a machine's files go with its directory: rmdir")

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
