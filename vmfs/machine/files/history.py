"""`history`: whether the machine's past is kept; and `writer`, which finds in it who wrote some bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.machine.files.contents import Contents
from vmfs.machine.files.kinds import Text
from vmfs.machine.files.lines import Do
from vmfs.machine.history import EVERY, MEMORY, History
from vmfs.words.errors import Busy, Invalid
from vmfs.words.numbers import parse_duration, parse_size

_PURPOSE = "history"  # of what is held of the limits
_USAGE = "`on [memory=SIZE] [every=TIME]` or `off`"


@dataclass(frozen=True, slots=True)
class _Settings:
    memory: int = MEMORY
    every: float = EVERY


def _parse(text: str) -> _Settings | None:
    """None: off."""
    words = text.split()
    if words == ["off"]:
        return None
    if words[:1] != ["on"]:
        raise Invalid(f"history: it is {_USAGE}")
    parsers: dict[str, Callable[[str], Any]] = {"memory": parse_size, "every": parse_duration}
    values: dict[str, Any] = {}
    for word in words[1:]:
        name, is_given, value = word.partition("=")
        if name not in parsers or not is_given or name in values:
            raise Invalid(f"history: {word[:40]!r} is none of its options: it is {_USAGE}")
        values[name] = parsers[name](value)
    settings = _Settings(**values)
    History.check(settings.memory, settings.every)
    return settings


def _get(scope: Contents) -> str:
    history = scope.vm.history
    if history is None:
        return "off\n"
    return scope.vm.at_boundary(lambda _: history.text())


def _put(scope: Contents, text: str) -> Do:
    settings = _parse(text)

    async def do() -> None:
        vm = scope.vm
        if vm.state == "running":
            raise Busy("history: the machine is running: `echo pause > state` first")
        if settings is None:
            if vm.history is not None:
                await trio.to_thread.run_sync(vm.history.stop)
            await scope.budget.hold(_PURPOSE, 0)
            return
        if vm.history is not None:
            raise Busy("history: it is on already")
        async with scope.memory.change():
            pass
        await scope.budget.hold(_PURPOSE, settings.memory + vm.memory.size)
        try:
            history = History(vm, settings.memory, settings.every)
            await trio.to_thread.run_sync(history.start)
        except BaseException:
            await scope.budget.hold(_PURPOSE, 0)
            raise

    return do


HISTORY = Text(_get, _put, of_cpu=True)
