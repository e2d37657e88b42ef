"""The FUSE operations: inodes and handles only. What a file is and does, `files.py` and `kinds.py` say.

Here is the one place where a failure becomes an errno: a `VmfsError` is its `errno`, and its sentence goes to
the scope's `complaint`. Anything else that a handler raises is a bug: logged, answered with EIO, and the
mount lives on.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import trio

from vmfs.fs.hooks import _fuse, pyfuse3
from vmfs.fs.inodes import POLL_ERR, POLL_HUP, POLL_IN, ROOT, Directory, File, Handle, Inodes, Node, Waker
from vmfs.fs.interrupts import interruptible
from vmfs.fs.lane import keep_attributes
from vmfs.fs.sizes import is_measured, measure
from vmfs.host.process import CallFailed
from vmfs.memory.ram import PAGE
from vmfs.words.errors import Interrupted, NotPermitted, ProcessFailed, VmfsError, WouldBlock, known

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Of what is as long: programs that read as much at a time as st_blksize says (cmp, diff) make a request for each.
LARGE_BLOCK = 128 << 10
ENTRY_SECONDS = 3600  # names change only by calls that come through the kernel, which then knows
MEMFD = b"user.vmfs.memfd"  # the attribute by which a file of a saved machine is a memfd of the host's
_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


def _answers(handler: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """A handler whose failures are errnos."""

    @functools.wraps(handler)
    async def answering(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except Exception as error:
            raise _failure(known(error), handler.__name__) from None

    return answering


def _failure(error: BaseException, where: str) -> pyfuse3.FUSEError:
    if isinstance(error, pyfuse3.FUSEError):
        return error
    if isinstance(error, VmfsError):
        log.debug("%s: %s", where, error)
        if error.errno == errno.EIO and not isinstance(error, CallFailed | ProcessFailed):  # those are logged
            log.error("%s: %s", where, error, exc_info=error)
        return pyfuse3.FUSEError(error.errno)
    log.error("%s failed", where, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


def _directory(node: Node) -> Directory:
    if not isinstance(node, Directory):
        raise pyfuse3.FUSEError(errno.ENOTDIR)
    return node


def _attributes(node: Node) -> pyfuse3.EntryAttributes:
    """With the size as it was last measured: the kernel asks again before it is used."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = node.number
    entry.st_mode = node.st_mode
    entry.st_nlink = node.links
    entry.st_uid, entry.st_gid = node.uid, node.gid
    entry.st_size, entry.st_blocks = node.size
    entry.st_blksize = PAGE if entry.st_size < LARGE_BLOCK else LARGE_BLOCK
    entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = node.atime_ns, node.modified_ns(), node.ctime_ns
    entry.attr_timeout = node.attr_seconds
    entry.entry_timeout = ENTRY_SECONDS
    return entry


def _kept(node: Node) -> pyfuse3.EntryAttributes:
    """_attributes. The root's the kernel asks for after each name that comes or goes: the lane has them."""
    entry = _attributes(node)
    if node.number == ROOT:
        keep_attributes(ROOT, entry)
    return entry


class Operations(pyfuse3.Operations):
    """Over the tree below `root`. `capacity` gives statfs its (bytes, bytes free, names, names free)."""

    supports_dot_lookup = False

    def __init__(
        self,
        inodes: Inodes,
        capacity: Callable[[], tuple[int, int, int, int]],
        began: trio.Event | None = None,
    ) -> None:
        super().__init__()
        self._inodes = inodes
        self._capacity = capacity
        self._began = began
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(1)

    def init(self) -> None:
        if self._began is not None:
            self._began.set()

    # ---- reading and writing: a short path, for a pread of 8 bytes is to cost what a bare FUSE file costs

    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self._handles[fh]
        try:
            if handle.scope.removed:
                raise pyfuse3.FUSEError(errno.ENODEV)
            data = await handle.read(off, size)
        except Exception as raised:
            error = known(raised)
            if handle.walking and getattr(error, "errno", 0) == errno.EOPNOTSUPP:
                return b""  # a file that such a machine does not have
            # What a walker cannot read is not what anyone asked for.
            if not isinstance(error, WouldBlock | pyfuse3.FUSEError) and not handle.walking:
                _complain(handle.node, error, _reading(handle.node))
            raise _failure(error, f"read {handle.node.name}") from None
        if handle.scope.complaint:
            handle.scope.succeeded(_reading(handle.node))
        return data

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._handles[fh]
        try:
            if handle.scope.removed:
                raise pyfuse3.FUSEError(errno.ENODEV)
            done = await handle.write(off, buf)
        except Exception as raised:
            error = known(raised)
            _complain(handle.node, error, _writing(handle.node))
            raise _failure(error, f"write {handle.node.name}") from None
        self._written(handle)
        return done

    @staticmethod
    def _written(handle: Handle) -> None:
        handle.node.touch()
        if handle.scope.complaint and not handle.waits:
            handle.scope.succeeded(_writing(handle.node))

    # ---- opening

    @_answers
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self._inodes.get(inode)
        if not isinstance(node, File):
            raise pyfuse3.FUSEError(errno.EISDIR)
        access = flags & _ACCESS
        reading, writing = access != os.O_WRONLY, access != os.O_RDONLY
        if access == os.O_WRONLY and node.becomes_writable is not None:
            try:
                await node.becomes_writable(ctx.pid)
            except Exception as raised:
                error = known(raised)
                _complain(node, error, _writing(node))
                raise error from None
        return await self._open(node, flags, ctx, reading, writing)

    async def _open(
        self, node: File, flags: int, ctx: pyfuse3.RequestContext, reading: bool, writing: bool
    ) -> pyfuse3.FileInfo:
        # The kernel has checked the mode, but root passes that check.
        if writing and not node.kind.writable or reading and not node.kind.readable:
            raise pyfuse3.FUSEError(errno.EACCES)
        # cp -r, tar, rsync, grep -r open with O_NOFOLLOW.
        walking = not writing and (node.scope.is_walking(ctx.pid, node) or bool(flags & os.O_NOFOLLOW))
        try:
            handle = await node.kind.open(node, ctx.pid, flags, ctx.uid, walking)
            handle.walking = walking
            request = _fuse.current_request()
            if handle.tells_closing and request is not None:
                request.tell_closing = True
            try:
                handle.prepare_answer()
            except BaseException:
                handle.close()
                raise
        except Exception as raised:
            error = known(raised)
            _complain(node, error, _writing(node) if writing else _reading(node))
            raise error from None
        number = next(self._numbers)
        self._handles[number] = handle
        handle.numbered(number)
        return pyfuse3.FileInfo(fh=number, direct_io=handle.direct_io, keep_cache=handle.keep_cache)

    @_answers
    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        handle.close()

    async def flush(self, fh: int) -> None:
        handle = self._handles[fh]
        if not handle.tells_closing:  # asked for all the same, without the hooks or by a kernel before 5.18
            return
        unsaved = handle.unsaved
        try:
            if unsaved and handle.scope.removed:
                raise pyfuse3.FUSEError(errno.ENODEV)
            await handle.flush()
        except Exception as raised:
            error = known(raised)
            _complain(handle.node, error, _writing(handle.node))
            raise _failure(error, f"close {handle.node.name}") from None
        if unsaved:
            self._written(handle)

    async def fsync(self, fh: int, datasync: bool) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # a write has reached its file already

    @_answers
    async def poll(self, inode: int, fh: int, poll_handle: Waker | None, ctx: pyfuse3.RequestContext) -> int:
        handle = self._handles.get(fh)
        if handle is None or handle.scope.removed:
            return POLL_ERR | POLL_HUP | POLL_IN
        return await handle.poll(poll_handle)

    # ---- names and attributes

    @_answers
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        parent = _directory(self._inodes.get(parent_inode))
        node = parent.known(os.fsdecode(name))
        if node is None and parent.asks:
            async with interruptible(ctx.pid):
                node = await parent.lookup(os.fsdecode(name))
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        node.lookups += 1
        return _attributes(node)

    async def forget(self, inode_list: list[tuple[int, int]]) -> None:
        for number, lookups in inode_list:
            self._inodes.forget(number, lookups)

    @_answers
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        node = self._inodes.get(inode)
        if not is_measured(node):
            async with interruptible(ctx.pid):
                await measure([node])
        return _kept(node)

    @_answers
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Whose it is to change, the kernel has checked (default_permissions)."""
        node = self._inodes.get(inode)
        if fields.update_size and isinstance(node, File):
            try:
                await node.kind.truncate(node, attr.st_size, opened=fh is not None)
            except Exception as raised:
                error = known(raised)
                _complain(node, error, _writing(node))
                raise error from None
        if fields.update_mode:
            node.mode = attr.st_mode & 0o7777
        if fields.update_uid:
            node.uid = attr.st_uid
        if fields.update_gid:
            node.gid = attr.st_gid
        if fields.update_atime:
            node.atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            node.mtime_ns = attr.st_mtime_ns
        return _kept(node)

    @_answers
    async def opendir(self, inode: int, ctx: Any) -> int:
        directory = _directory(self._inodes.get(inode))
        directory.scope.lists(ctx.pid)
        return directory.number

    @_answers
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """An entry's position is its number, so a directory may change while it is read."""
        directory = _directory(self._inodes.get(fh))
        dots = ((".", directory, 1), ("..", directory.parent, 2))
        children = ((name, node, node.number + 2) for name, node in await directory.entries())
        for name, node, position in (*dots, *children):
            if position > start_id:
                if not pyfuse3.readdir_reply(token, os.fsencode(name), _attributes(node), position):
                    break
                if position > 2:  # the kernel does not keep the dots
                    node.lookups += 1

    async def releasedir(self, fh: int) -> None:
        pass

    @_answers
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        size, free, names, names_free = self._capacity()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = PAGE
        data.f_blocks = size // PAGE
        data.f_bfree = data.f_bavail = free // PAGE
        data.f_files = names
        data.f_ffree = data.f_favail = names_free
        data.f_namemax = 64
        return data

    # ---- making and removing

    @_answers
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = _directory(self._inodes.get(parent_inode))
        with _naming(parent, name):
            node = await parent.mkdir(os.fsdecode(name), mode & 0o7777, ctx)
        node.lookups += 1
        _kept(parent)
        return _attributes(node)

    @_answers
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        parent = _directory(self._inodes.get(parent_inode))
        with _naming(parent, name):
            await parent.rmdir(os.fsdecode(name))
        _kept(parent)

    @_answers
    async def rename(
        self, parent_old: int, name_old: bytes, parent_new: int, name_new: bytes, flags: int, ctx: Any
    ) -> None:
        old, new = (_directory(self._inodes.get(number)) for number in (parent_old, parent_new))
        with _naming(old, name_old):
            await old.rename(os.fsdecode(name_old), new, os.fsdecode(name_new), flags)

    @_answers
    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        """An open with O_CREAT of a name that was not found."""
        parent = _directory(self._inodes.get(parent_inode))
        with _naming(parent, name):
            node = await parent.create(os.fsdecode(name), mode & 0o7777 & ~ctx.umask, ctx)
        access = flags & _ACCESS
        info = await self._open(node, flags, ctx, access != os.O_WRONLY, access != os.O_RDONLY)
        node.lookups += 1
        return info, _attributes(node)

    @_answers
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        self._make_nothing(parent_inode, name)

    @_answers
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any:
        self._make_nothing(parent_inode, name)

    @_answers
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any:
        self._make_nothing(new_parent_inode, new_name)

    @_answers
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        node = self._inodes.get(inode)
        if name != MEMFD or not isinstance(node, File) or node.takes_memfd is None:
            raise pyfuse3.FUSEError(errno.ENOTSUP)
        about = _writing(node)
        try:
            await node.takes_memfd(node, os.fsdecode(value), ctx.pid)
        except Exception as error:
            _complain(node, known(error), about)
            raise
        node.scope.succeeded(about)

    def _make_nothing(self, parent_inode: int, name: bytes) -> None:
        with _naming(_directory(self._inodes.get(parent_inode)), name):
            raise NotPermitted("there are only the files that a machine has")

    @_answers
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        parent = _directory(self._inodes.get(parent_inode))
        with _naming(parent, name):
            await parent.unlink(os.fsdecode(name), ctx.pid)


# ---- the sentences in `error`


def _reading(node: File) -> object:
    """What a failed read is about."""
    return "read", node.group


def _writing(node: File) -> object:
    return "write", node.group


@contextlib.contextmanager
def _naming(directory: Directory, name: bytes) -> Iterator[None]:
    """Around what makes, removes or renames a name."""
    about = "names", directory.prefix
    try:
        yield
    except Exception as raised:
        error = known(raised)
        if isinstance(error, VmfsError):
            shown = ascii(os.fsdecode(name)[:80])[1:-1]
            directory.scope.complain(_told(directory.prefix + shown, error), about)
        raise error from None
    directory.scope.succeeded(about)


def _complain(node: Node, error: BaseException, about: object) -> None:
    """Leave the sentence for the `error` file, and say which file it is about."""
    quiet = isinstance(error, Interrupted) or getattr(error, "quiet", False)
    if isinstance(error, VmfsError) and not quiet:
        node.scope.complain(_told(node.name, error), about)


def _told(name: str, error: VmfsError) -> str:
    sentence = str(error)
    return sentence if sentence.startswith(f"{name}: ") else f"{name}: {sentence}"
