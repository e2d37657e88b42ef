"""`history`: whether the machine's past is kept; and `writer`, which finds in it who wrote some bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.debug.points import parse_watched
from vmfs.engine.base import Vcpu
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.kinds import Text
from vmfs.machine.files.lines import Do
from vmfs.machine.files.request import interruptible
from vmfs.machine.files.waiting import finished
from vmfs.machine.history import EVERY, MEMORY, History
from vmfs.machine.journey import Journey
from vmfs.machine.runloop import Bound
from vmfs.memory.ram import PAGE
from vmfs.words.errors import BadAddress, Busy, Interrupted, Invalid, Unsupported
from vmfs.words.numbers import parse_duration, parse_number, parse_size

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
            await trio.to_thread.run_sync(history.start, vm.past.record())
        except BaseException:
            await scope.budget.hold(_PURPOSE, 0)
            raise

    return do


HISTORY = Text(_get, _put, of_cpu=True)


# ---- writer


@dataclass(frozen=True, slots=True)
class Asked:
    """The bytes whose writer is asked for."""

    address: int
    physical: bool
    length: int


LONGEST = 4096  # bytes


def _parse_asked(scope: Contents, text: str) -> Asked:
    words = text.split()
    if len(words) != 2:
        raise Invalid("writer: it is `[phys:]ADDR LEN`")
    address, physical = parse_watched(words[0], scope.vm.symbols.address_of)
    length = parse_number(words[1], what="writer: LEN")
    if not 0 < length <= LONGEST:
        raise Invalid(f"writer: LEN is 1 to {LONGEST}, not {length}")
    return Asked(address, physical, length)


def _put_writer(scope: Contents, text: str) -> Do:
    asked = _parse_asked(scope, text)

    def do() -> None:
        scope.vm.writer_of = asked

    return do


def _pieces(scope: Contents, cpu: Vcpu, asked: Asked) -> tuple[tuple[int, int], ...]:
    """Where they are, as (guest-physical address, length)."""
    found, memory = [], scope.vm.memory
    address, left = asked.address, asked.length
    while left:
        part = left if asked.physical else min(left, PAGE - address % PAGE)
        physical = address if asked.physical else cpu.translate(address)
        if physical is None or memory.room(physical) < part:
            raise BadAddress(f"writer: {address:#x} is not {'RAM' if asked.physical else 'mapped to RAM'}")
        found.append((physical, part))
        address, left = (address + part) & (1 << 64) - 1, left - part
    return tuple(found)


async def _get_writer(scope: Contents) -> str:
    vm, asked = scope.vm, scope.vm.writer_of
    if asked is None:
        return ""
    if vm.history is None:
        raise Unsupported("writer: the machine has no history to look at: `echo on > history` begins one")
    if vm.state == "running":
        raise Busy("writer: the machine is running: `echo pause > state` first")
    ranges = vm.at_boundary(lambda cpu: _pieces(scope, cpu, asked)).result()
    run = vm.start(Bound(journey=Journey(written=ranges)))
    try:
        async with interruptible():
            await finished(run, scope)
    except Interrupted:
        vm.stop(run)
        raise
    run.result()
    if run.stop_asked:
        raise Interrupted("writer: it was stopped")
    written, begin = run.travel.written, vm.history.begin
    if written is None:
        return f"none since={begin}\n"
    words = [f"writer={written.how}", f"count={written.place}", f"rip={written.rip:#x}"]
    if label := vm.symbols.label(written.rip):
        words.append(f"symbol={label}")
    words += [f"old={_number(written.old)}", f"new={_number(written.new)}"]
    if len(vm.cpus) > 1:
        words.append(f"cpu={written.cpu}")
    return " ".join(words) + "\n"


def _number(data: bytes) -> str:
    """As a number, where they are as many bytes as one has; else as bytes."""
    return f"{int.from_bytes(data, 'little'):#x}" if len(data) in (1, 2, 4, 8) else data.hex()


WRITER = Text(_get_writer, _put_writer, peek=lambda scope: "", of_cpu=True, symbolic=True)
