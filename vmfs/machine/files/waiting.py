"""From the threads of a Vm to the coroutines of FUSE, and nothing else between the two worlds."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any

import trio

from vmfs.machine.files.handles import Handle, Scope
from vmfs.machine.files.request import interruptible
from vmfs.words.errors import Gone


async def finished(future: Future[Any], scope: Scope) -> None:
    """Returns when the future is done; Gone when the scope is removed first."""
    if future.done():
        return
    token = trio.lowlevel.current_trio_token()
    with scope.waiting() as event:

        def wake(_: object) -> None:
            try:
                token.run_sync_soon(event.set)
            except trio.RunFinishedError:
                pass

        future.add_done_callback(wake)
        if scope.removed:
            event.set()
        await event.wait()
    if not future.done():
        raise Gone("the machine was removed")


async def settled(value: Any, scope: Scope) -> Any:
    """`value`, or what comes of it where it is a Future or a coroutine, in whatever time."""
    if isinstance(value, Future):
        await finished(value, scope)
        return value.result()
    return await value if inspect.isawaitable(value) else value


async def value_of(value: Any, handle: Handle) -> Any:
    """`value`, or what comes of it where it is a Future or a coroutine. At once where it is there.

    Where it must be waited for, a signal to the caller ends the wait: Interrupted, the future goes on.
    """
    if isinstance(value, Future):
        if not value.done():
            async with interruptible():
                await finished(value, handle.scope)
        return value.result()
    if inspect.iscoroutine(value):
        return await _awaited(value, handle)
    return value


async def _awaited(coroutine: Awaitable[Any], handle: Handle) -> Any:
    async with interruptible():
        return await coroutine
