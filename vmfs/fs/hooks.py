"""pyfuse3, and what it does not surface: import it from here, so that `_fuse` is always loaded before it.

`_fuse` stands in front of some functions of libfuse (see `_fuse.c`), which works only if it is loaded first
and with its symbols global. `status()` says what that gave; a mount works without either part.

    from vmfs.fs.hooks import _fuse, pyfuse3, status
    from vmfs.fs.interrupts import interruptible
    from vmfs.fs.passthrough import Backing

    class Operations(pyfuse3.Operations):
        async def open(self, inode, flags, ctx):
            info = pyfuse3.FileInfo(fh=self.add(inode, ctx.pid), keep_cache=True)
            self.backing.answer_open()              # a Backing of the memfd: read, write, mmap pass through
            return info                             # (False, and nothing changed, where they cannot)

        async def read(self, fh, offset, size):
            async with interruptible(self.pid[fh]): # Interrupted (EINTR) if the caller is signalled or killed
                await self.exit.wait()
            async with interruptible(self.pid[fh], stop=vcpu.kick) as caller:   # kick() instead of cancelling
                line = await trio.to_thread.run_sync(vcpu.run)      # ends early; caller.interrupted is True
            return line                             # a body that ends has its result returned, signal or not

`_fuse.current_request()` is the request that the running task serves, at any time from its dispatch to its
answer, also after an await and in tasks and threads started from it: `.unique`, `.pid` (a thread id), `.uid`,
`.gid`, `.file_flags` (which pyfuse3 does not give to read and write), `.interrupted`. It is None where the
hooks did not take.

Environment, read once: VMFS_NO_FUSE_HOOKS=1 leaves libfuse's functions alone, VMFS_NO_PASSTHROUGH=1 only asks
for no passthrough, VMFS_NO_LANE=1 has pyfuse3 read /dev/fuse itself (lane.c). For tests, and for a machine where
one of them misbehaves.
"""

import importlib
import os
import sys
from dataclasses import dataclass

__all__ = ["Status", "_fuse", "pyfuse3", "status"]


@dataclass(frozen=True)
class Status:
    """What the mount can do beyond pyfuse3. A reason is a sentence without a full stop."""

    interrupts: bool
    interrupts_reason: str
    passthrough: bool
    passthrough_reason: str


def _load():
    """Imports `_fuse`, then pyfuse3. Returns both, and why the hooks cannot take ("" where they can)."""
    if os.environ.get("VMFS_NO_FUSE_HOOKS") == "1":
        reason = "switched off by VMFS_NO_FUSE_HOOKS"
    elif "pyfuse3" in sys.modules:
        reason = "pyfuse3 was imported before vmfs.fs.hooks"
    elif "vmfs.fs._fuse" in sys.modules:
        reason = "vmfs.fs._fuse was imported without vmfs.fs.hooks"
    else:
        reason = ""

    if reason:
        pyfuse3 = importlib.import_module("pyfuse3")
        _fuse = importlib.import_module("vmfs.fs._fuse")
    else:
        flags = sys.getdlopenflags()
        sys.setdlopenflags(flags | os.RTLD_GLOBAL)
        try:
            _fuse = importlib.import_module("vmfs.fs._fuse")
        finally:
            sys.setdlopenflags(flags)
        pyfuse3 = importlib.import_module("pyfuse3")
        _bind(_fuse)
        if not _fuse.interposed():
            reason = "the dynamic linker does not let vmfs.fs._fuse stand in front of libfuse"

    if reason:
        _fuse.want_passthrough(False, reason)
        _fuse.want_lane(False)
    elif os.environ.get("VMFS_NO_PASSTHROUGH") == "1":
        _fuse.want_passthrough(False, "switched off by VMFS_NO_PASSTHROUGH")
    if os.environ.get("VMFS_NO_LANE") == "1":
        _fuse.want_lane(False)
    return _fuse, pyfuse3, reason


def _bind(_fuse):
    """Gives `_fuse` libfuse's own functions, before pyfuse3 calls any. ImportError if there are none."""
    loaded = [module.__file__ for name, module in sys.modules.items()
              if name.partition(".")[0] == "pyfuse3" and getattr(module, "__file__", None)]
    failure = None
    for library in [*loaded, "libfuse3.so.4", "libfuse3.so.3"]:
        try:
            return _fuse.bind(library)
        except OSError as error:
            failure = failure or error
    raise ImportError(f"pyfuse3 has loaded no libfuse: {failure}") from failure


_fuse, pyfuse3, _no_hooks = _load()


def status():
    """What works. Before the mount: whether interrupts should, and not yet whether passthrough does."""
    if _no_hooks:
        interrupts, reason = False, f"{_no_hooks}; the caller's pending signals are watched instead"
    elif _fuse.seen():
        interrupts, reason = True, "the kernel's interrupt messages reach the handlers"
    else:
        interrupts, reason = True, "the kernel's interrupt messages will reach the handlers"
    return Status(interrupts, reason, _fuse.passthrough_available(), _fuse.passthrough_reason())
