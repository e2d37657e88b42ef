"""Blocked calls end when a signal comes for their caller.

The kernel sends one FUSE_INTERRUPT for a request, at the first signal; until the request is answered its
caller cannot even be killed. `_fuse` marks the request and calls its `on_interrupt`, in the thread of the
trio loop. A message cannot come before its request was dispatched nor after it was answered, since one thread
reads and answers them all; one that comes before the handler waits is kept on the request.

Where the hooks did not take, a watch on the caller's pending signals in /proc takes their place.

An answer of EINTR is final: FUSE takes no -ERESTARTSYS, so a call fails with EINTR also where the handler was
installed with SA_RESTART, and after a stop and a SIGCONT, like the calls that signal(7) lists as never
restarted.

Source: Documentation/filesystems/fuse/fuse.rst, "Interrupting filesystem operations"; proc_pid_status(5);
signal(7).
"""

import errno
import os
import signal
from contextlib import asynccontextmanager

import trio

from vmfs.fs.hooks import _fuse
from vmfs.words.errors import Interrupted

INTERVAL = 0.03
"""Seconds between two looks at a watched caller: unfelt at a keyboard, a small load for hundreds of them."""


class Caller:
    """A caller that waits, as `interruptible` gives it: `interrupted` says whether a signal came for it."""

    def __init__(self, end):
        self.interrupted = False
        self._end = end

    def interrupt(self):
        """A signal came: ends the wait, once."""
        if not self.interrupted:
            self.interrupted = True
            self._end()


@asynccontextmanager
async def interruptible(pid, unique=None, *, stop=None):
    """In a handler, around what may wait: raises Interrupted (EINTR) if a signal comes for the caller.

        async with interruptible(pid):
            line = await lines.get()

    A signal cancels the body, at a checkpoint, as any cancellation in trio. A body that ends all the same is
    left alone: what it got is not lost. A signal that came before the body began ends it before it begins.

    With `stop`, for what cannot be cancelled, such as a vCPU's run in a thread: a signal calls `stop()`,
    once, on the trio loop, and the body goes on to its end, which `stop` should bring about. Nothing is
    raised then; the `interrupted` of the Caller that this yields tells.

    pid: the caller's thread id, as in the context of open. It is used only where the hooks did not take (0:
    no watch). unique: the request's number if it is another than the one which the running task serves.

    It may be nested. Not for two tasks of one request at a time: the later one takes the signal.
    """
    request = _fuse.current_request() if unique is None else _fuse.request(unique)
    scope = trio.CancelScope()
    caller = Caller(stop if stop is not None else scope.cancel)
    if request is None:
        watching = _watch(pid, caller)
    else:
        watching = _listen(request, caller)
    with watching, scope:
        yield caller
    if scope.cancelled_caught:
        raise Interrupted("a signal came for the caller")


class _listen:
    """While entered, the request's interrupt is the caller's."""

    def __init__(self, request, caller):
        self.request = request
        self.caller = caller

    def __enter__(self):
        if self.request.interrupted:
            raise Interrupted("a signal came for the caller")
        self.outer = self.request.on_interrupt
        self.request.on_interrupt = self.caller.interrupt

    def __exit__(self, *exception):
        self.request.on_interrupt = self.outer
        if self.outer is not None and self.request.interrupted:
            self.outer()


# ---- without the hooks ----

class Watch:
    """Looks at the pending signals of all callers that wait, from one task while there are any.

    A signal sent to a process of several threads is pending for all of them until one takes it, so that a
    thread for which it was not meant may be interrupted, too.
    """

    def __init__(self, interval=INTERVAL):
        self.interval = interval
        self.callers = {}
        self.running = False

    def add(self, caller, pid):
        self.callers[caller] = pid
        if not self.running:
            self.running = True
            trio.lowlevel.spawn_system_task(self._look, name="vmfs.fs.interrupts")

    def remove(self, caller):
        del self.callers[caller]

    async def _look(self):
        try:
            while self.callers:
                openers = set(self.callers.values())
                for caller, pid in list(self.callers.items()):
                    if caller in self.callers and signalled(pid, openers):
                        caller.interrupt()
                await trio.sleep(self.interval)
        finally:
            self.running = False


_BLOCKED = Watch()
"""One for the process, as the hooks whose place it takes and as the mount."""


class _watch:
    """While entered, a signal pending for the thread `pid` is the caller's interrupt."""

    def __init__(self, pid, caller):
        self.pid = pid
        self.caller = caller

    def __enter__(self):
        if self.pid:
            _BLOCKED.add(self.caller, self.pid)

    def __exit__(self, *exception):
        if self.pid:
            _BLOCKED.remove(self.caller)


def signalled(pid, openers=frozenset()):
    """Whether a thread of the process has a signal pending, not blocked or ignored, or no thread is left.

    `pid` is the thread that opened the file, and another may be the one that waits: any but the `openers`,
    which wait for what they opened. For a thread that does not wait, a signal is not pending for long.
    """
    try:
        return _signalled(pid, openers)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # it is looked at again in a moment
            return False
        raise


def _signalled(pid, openers):
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return True
    left = 0
    for thread in threads:
        if int(thread) != pid and int(thread) in openers:
            left += 1
            continue
        try:
            with open(f"/proc/{pid}/task/{thread}/status", "rb") as file:
                status = file.read()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if not ended(status):
            left += 1
            if deliverable(status):
                return True
    return not left


def ended(status):
    """Whether a /proc/PID/status is of a thread that has ended."""
    return b"\nState:\tZ" in status or b"\nState:\tX" in status


def deliverable(status):
    """Whether a /proc/PID/status, as bytes, shows a signal that would end a wait, or a thread that has ended.

    A signal that kills a process is pending as SIGKILL for each of its threads.
    """
    masks = dict.fromkeys((b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn"), 0)
    for line in status.splitlines():
        name, _, value = line.partition(b":")
        if name in masks:
            masks[name] = int(value, 16)
        elif name == b"State" and value.strip()[:1] in (b"Z", b"X"):
            return True
    pending = masks[b"SigPnd"] | masks[b"ShdPnd"]
    kill = 1 << (signal.SIGKILL - 1)
    return bool(pending & (~(masks[b"SigBlk"] | masks[b"SigIgn"]) | kill))
