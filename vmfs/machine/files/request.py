"""The call that a task of the machine process works for, and the end of its wait when a signal comes for the caller."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar

import trio

from vmfs.words.commands import ANY_FLAGS
from vmfs.words.errors import Interrupted


class Request:
    """A call from its dispatch to its answer. `flags`: its file's, as they are now; `uid`: whose an open is."""

    def __init__(self, call: int, flags: int = ANY_FLAGS, uid: int | None = None) -> None:
        self.call = call
        self.flags = flags
        self.uid = uid
        self.interrupted = False
        self.on_interrupt: Callable[[], None] | None = None

    def interrupt(self) -> None:
        """A signal came for the caller."""
        if not self.interrupted:
            self.interrupted = True
            if self.on_interrupt is not None:
                self.on_interrupt()


_current: ContextVar[Request | None] = ContextVar("vmfs_request", default=None)


def current() -> Request | None:
    """Of the running task, and of tasks and threads that it has started; None where nobody has called."""
    return _current.get()


def begin(request: Request) -> None:
    """The running task serves it from now on."""
    _current.set(request)


def is_nonblocking(at_open: bool) -> bool:
    """O_NONBLOCK as it is now (fcntl); where that is not known, as it was at the open."""
    request = current()
    if request is None or request.flags < 0:
        return at_open
    return bool(request.flags & os.O_NONBLOCK)


@asynccontextmanager
async def interruptible() -> AsyncIterator[None]:
    """Around what may wait: raises Interrupted (EINTR) if a signal comes for the caller.

        async with interruptible():
            line = await lines.get()

    A signal cancels the body, at a checkpoint, as any cancellation in trio. A body that ends all the same is left
    alone: what it got is not lost. A signal that came before the body ends it before it begins. It may be nested.
    """
    request = current()
    if request is None:
        yield
        return
    if request.interrupted:
        raise Interrupted("a signal came for the caller")
    scope = trio.CancelScope()
    outer, request.on_interrupt = request.on_interrupt, scope.cancel
    try:
        with scope:
            yield
    finally:
        request.on_interrupt = outer
        if outer is not None and request.interrupted:
            outer()
    if scope.cancelled_caught:
        raise Interrupted("a signal came for the caller")
