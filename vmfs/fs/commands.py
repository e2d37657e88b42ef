"""COMMANDS: the verbs that command files take, a row a verb: its name, its arguments, what it does.

A handler is called with what the file is about (the Vm; for `vm_run` a Bound; for `debug` a Points), then its
arguments. A verb of another file or a new one is a row, and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vmfs.debug.points import Points
from vmfs.errors import Invalid
from vmfs.numbers import parse_duration, parse_number
from vmfs.vm import Vm

# ---- arguments


@dataclass(frozen=True, slots=True)
class Argument:
    """How one word is called in the documentation, and what parses it."""

    name: str
    parse: Callable[[str], Any]
    optional: bool = False


def _address(text: str) -> int:
    return parse_number(text, what="ADDR")


def _count(text: str) -> int:
    count = _natural("N", (1 << 64) - 1)(text)
    if not count:
        raise Invalid("N: it is at least 1")
    return count


def _seconds(text: str) -> float:
    seconds = parse_duration(text)
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise Invalid(f"time: {text[:40]!r} is nothing that can be waited for")
    return seconds


def _natural(what: str, limit: int) -> Callable[[str], int]:
    """A number from 0 to `limit`."""

    def parse(text: str) -> int:
        if text.startswith("-"):
            raise Invalid(f"{what}: {text[:40]!r} is negative")
        number = parse_number(text, what=what)
        if number > limit:
            raise Invalid(f"{what}: {text[:40]} is more than {limit}")
        return number

    return parse


def _level(text: str) -> bool:
    if text not in ("0", "1"):
        raise Invalid(f"line: the level {text[:40]!r} is not 0 or 1")
    return text == "1"


def _id(text: str) -> int | None:
    """None for all."""
    return None if text == "all" else _natural("ID", (1 << 32) - 1)(text)


_vector = _natural("vector", 255)
_line = Argument("N", _natural("line", (1 << 32) - 1))

# ---- verbs


@dataclass(frozen=True, slots=True)
class Command:
    """`name` None: the command is its first argument alone (`0x20` in `irq`)."""

    name: str | None
    arguments: tuple[Argument, ...]
    handler: Callable[..., Any]

    @property
    def usage(self) -> str:
        words = [self.name] if self.name else []
        words += [f"[{one.name}]" if one.optional else one.name for one in self.arguments]
        return " ".join(words)

    def bind(self, words: list[str]) -> Callable[[Any], Any]:
        least = sum(not one.optional for one in self.arguments)
        if not least <= len(words) <= len(self.arguments):
            raise Invalid(f"it is `{self.usage}`")
        values = [argument.parse(word) for argument, word in zip(self.arguments, words, strict=False)]
        return lambda target: self.handler(target, *values)


def _run_in_background(vm: Vm) -> None:
    vm.start()


def _pulse(vm: Vm, line: int) -> None:
    vm.irq_line(line, True)
    vm.irq_line(line, False)


def _delete(points: Points, id_: int | None) -> Points:
    return points.delete_all() if id_ is None else points.delete(id_)


COMMANDS: Mapping[str, tuple[Command, ...]] = {
    "vm_run": (
        Command("run", (), lambda bound: bound),
        Command("step", (Argument("N", _count, optional=True),), lambda bound, n=1: replace(bound, steps=n)),
        Command("until", (Argument("ADDR", _address),), lambda bound, address: replace(bound, until=address)),
        Command("insns", (Argument("N", _count),), lambda bound, n: replace(bound, instructions=n)),
        Command("for", (Argument("TIME", _seconds),), lambda bound, seconds: replace(bound, seconds=seconds)),
    ),
    "state": (
        Command("run", (), _run_in_background),
        Command("pause", (), Vm.pause),
        Command("reset", (), Vm.reset),
    ),
    "irq": (
        Command(None, (Argument("VECTOR", _vector),), Vm.interrupt),
        Command("nmi", (), Vm.nmi),
        Command("line", (_line, Argument("0|1", _level)), Vm.irq_line),
        Command("pulse", (_line,), _pulse),
    ),
    "debug": (
        Command("1", (), lambda points: points.set_stepping(True)),
        Command("0", (), lambda points: points.set_stepping(False)),
        Command("break", (Argument("ADDR", _address),), Points.add_break),
        Command("delete", (Argument("ID|all", _id),), _delete),
    ),
}


def parse_command(file: str, text: str) -> Callable[[Any], Any]:
    """The one command that `text` is, ready to be called with its target."""
    words = text.split()
    if len(text.splitlines()) > 1 or not words:
        raise Invalid(f"it takes one command: {_usages(file)}")
    return _bound(file, words)


def parse_commands(file: str, text: str) -> Callable[[Any], Any]:
    """The commands that the lines of `text` are, as one: each is called with what the one before it returned.

    Empty lines are none; a line's number stands before what is wrong with it.
    """
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise Invalid(f"it takes commands: {_usages(file)}")
    bound = [(number, _at_line(number, lambda words=words: _bound(file, words))) for number, words in lines]

    def apply(target: Any) -> Any:
        for number, one in bound:
            target = _at_line(number, lambda one=one, target=target: one(target))
        return target

    return apply


def _at_line(number: int, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Invalid as error:
        raise Invalid(f"line {number}: {error}") from None


def _bound(file: str, words: list[str]) -> Callable[[Any], Any]:
    unnamed = None
    for command in COMMANDS[file]:
        if command.name == words[0]:
            return command.bind(words[1:])
        if command.name is None:
            unnamed = command
    if unnamed and words[0][:1].isdigit():
        return unnamed.bind(words)
    raise Invalid(f"there is no {words[0][:40]!r}: {_usages(file)}")


def _usages(file: str) -> str:
    return ", ".join(f"`{command.usage}`" for command in COMMANDS[file])
