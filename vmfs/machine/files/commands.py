"""COMMANDS: the verbs that command files take, a row a verb: its name, its arguments, what it does.

A handler is called with what the file is about (the Vm; for `vm_run` a Bound; for `debug` a Points), then its
arguments. A verb of another file or a new one is a row, and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vmfs.debug.conditions import Resolve, no_symbols, parse_address
from vmfs.debug.points import (
    LONGEST_WATCH,
    ON,
    Options,
    Points,
    parse_access,
    parse_options,
    parse_ports,
    parse_vectors,
    parse_watched,
)
from vmfs.debug.trace import (
    KINDS,
    TraceSettings,
    check_size,
    parse_full,
    parse_modes,
    parse_span,
    parse_switch,
)
from vmfs.machine.journey import Journey
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import UNBOUND, Bound
from vmfs.words.errors import Invalid
from vmfs.words.numbers import parse_duration, parse_number, parse_size

# ---- arguments


@dataclass(frozen=True, slots=True)
class Argument:
    """How one word is called in the documentation, and what parses it."""

    name: str
    parse: Callable[..., Any]
    optional: bool = False
    rest: bool = False  # it is all words that are left, none as well
    symbolic: bool = False  # `parse` gets what resolves symbols, too


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
_cpu = _natural("cpu", (1 << 32) - 1)
_line = Argument("N", _natural("line", (1 << 32) - 1))
_ignored = Argument("N", _natural("N", (1 << 63) - 1))

# ---- verbs


@dataclass(frozen=True, slots=True)
class Command:
    """`name` None: the command begins with its first argument, a number (`0x20` in `irq`)."""

    name: str | None
    arguments: tuple[Argument, ...]
    handler: Callable[..., Any]

    def fits(self, words: list[str]) -> bool:
        """Whether it is this command that `words` are, right or wrong."""
        if self.name is None:
            return bool(words) and words[0][:1].isdigit()
        # `1` is a command, and `1 break 0x7c00` a line that begins with an id.
        return words[:1] == [self.name] and not (self.name.isdigit() and len(words) > 1)

    @property
    def usage(self) -> str:
        words = [self.name] if self.name else []
        words += [f"[{one.name}]" if one.optional and one.name[0] != "[" else one.name for one in self.arguments]
        return " ".join(words)

    def bind(self, words: list[str], resolve: Resolve = no_symbols) -> Callable[[Any], Any]:
        if self.arguments and self.arguments[-1].rest:
            at = len(self.arguments) - 1
            words = [*words[:at], " ".join(words[at:])] if len(words) >= at else words
        least = sum(not one.optional for one in self.arguments)
        if not least <= len(words) <= len(self.arguments):
            raise Invalid(f"it is `{self.usage}`")
        values = [
            argument.parse(word, resolve) if argument.symbolic else argument.parse(word)
            for argument, word in zip(self.arguments, words, strict=False)
        ]
        return lambda target: self.handler(target, *values)


def _journey(bound: Bound, **where: int | None) -> Bound:
    if bound.journey is not None:
        raise Invalid("a run goes `back` or `goto` a place, not both")
    return replace(bound, journey=Journey(**where))


def _travelling(bound: Bound) -> Bound:
    """A line with `back` or `goto`, whose other words are about that."""
    journey = bound.journey
    if bound.steps or bound.instructions or bound.seconds:
        raise Invalid("`step`, `insns` and `for` are bounds of a run that goes on, and not of `back` and `goto`")
    if bound.until is not None:
        if journey.back is not None or journey.place is not None:
            raise Invalid("it is `back until ADDR`, without a number")
        journey = replace(journey, until=bound.until)
    if bound.cpu is not None:
        if journey.back is None:
            raise Invalid("cpu=K says whose instructions `back N` counts")
        journey = replace(journey, cpu=bound.cpu)
    return Bound(journey=journey)


def _run_in_background(vm: Vm) -> None:
    vm.start()


def _pulse(vm: Vm, line: int) -> None:
    vm.irq_line(line, True)
    vm.irq_line(line, False)


def _delete(points: Points, id_: int | None) -> Points:
    return points.delete_all() if id_ is None else points.delete(id_)


def _enable(points: Points, id_: int | None, *, on: bool) -> Points:
    return points.enable_all(on) if id_ is None else points.enable(id_, on)


def _watch(points: Points, where: tuple[int, bool], length: int, access: tuple[bool, bool], options: Options) -> Points:
    address, physical = where
    return points.add_watch(address, length, *access, options, physical=physical)


def _iobreak(points: Points, ports: tuple[int, int], options: Options) -> Points:
    return points.add_iobreak(*ports, options)


def _shown(words: str, resolve: Resolve) -> Callable[[Any], Any]:
    """What stands after the id in a line that the `debug` file shows: the verb that makes such a point."""
    if not words:
        raise Invalid(f"a number other than 1 and 0 is no command: {_usages('debug')}")
    if words[:1].isdigit():
        raise Invalid(f"there is no {words[:40]!r}: {_usages('debug')}")
    return _bound("debug", words.split(), resolve)


_address = Argument("ADDR", parse_address, symbolic=True)
_options = Argument("[OPTION...]", parse_options, rest=True, symbolic=True)
_ids = Argument("ID|all", _id)
_switch = Argument("on|off", parse_switch)
_span = Argument("FIRST-LAST|all", parse_span, symbolic=True)


def _traced(kind: str) -> Command:
    return Command(kind, (_switch,), lambda settings, on: settings.switch(kind, on))


COMMANDS: Mapping[str, tuple[Command, ...]] = {
    "vm_run": (
        Command("run", (), lambda bound: bound),
        Command("step", (Argument("N", _count, optional=True),), lambda bound, n=1: replace(bound, steps=n)),
        Command("until", (_address,), lambda bound, address: replace(bound, until=address)),
        Command("insns", (Argument("N", _count),), lambda bound, n: replace(bound, instructions=n)),
        Command("for", (Argument("TIME", _seconds),), lambda bound, seconds: replace(bound, seconds=seconds)),
        Command("back", (Argument("N", _count, optional=True),), lambda bound, n=None: _journey(bound, back=n)),
        Command("goto", (Argument("N", _natural("N", (1 << 63) - 1)),), lambda bound, n: _journey(bound, place=n)),
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
        Command("break", (_address, _options), Points.add_break),
        Command(
            "watch",
            (
                Argument("[phys:]ADDR", parse_watched, symbolic=True),
                Argument("LEN", _natural("LEN", LONGEST_WATCH)),
                Argument("r|w|rw", parse_access),
                _options,
            ),
            _watch,
        ),
        Command("iobreak", (Argument("PORT[-PORT]", parse_ports), _options), _iobreak),
        Command("catch", (Argument("VECTOR[,VECTOR]", parse_vectors), _options), Points.add_catch),
        Command("on", (Argument("|".join(ON), str), _options), Points.add_on),
        Command("delete", (_ids,), _delete),
        Command("enable", (_ids,), partial(_enable, on=True)),
        Command("disable", (_ids,), partial(_enable, on=False)),
        Command("ignore", (Argument("ID", _natural("ID", (1 << 32) - 1)), _ignored), Points.ignore),
        Command(
            None,
            (Argument("ID", _natural("ID", (1 << 32) - 1)), Argument("LINE", _shown, rest=True, symbolic=True)),
            lambda points, _id, make: make(points),
        ),
    ),
    "trace": (
        *(_traced(kind) for kind in KINDS),
        Command("range", (_span,), TraceSettings.only_at),
        Command("data", (_span,), TraceSettings.only_data),
        Command("mode", (Argument("user|kernel|real|protected|long[,...]|all", parse_modes),), TraceSettings.only_in),
        Command("full", (Argument("wait|drop", parse_full),), TraceSettings.when_full),
        Command("buffer", (Argument("SIZE", lambda text: check_size(parse_size(text))),), TraceSettings.keep),
        Command("off", (), TraceSettings.off),
    ),
}


def parse_command(file: str, text: str, resolve: Resolve = no_symbols) -> Callable[[Any], Any]:
    """The one command that `text` is, ready to be called with its target."""
    words = text.split()
    if len(text.splitlines()) > 1 or not words:
        raise Invalid(f"it takes one command: {_usages(file)}")
    return _bound(file, words, resolve)


def parse_bound(text: str, resolve: Resolve = no_symbols) -> Bound:
    """The line of `vm_run`: commands that together say when a run ends, as `until ADDR for TIME`."""
    words = text.split()
    cpus = [word.removeprefix("cpu=") for word in words if word.startswith("cpu=")]
    words = [word for word in words if not word.startswith("cpu=")]
    if len(text.splitlines()) > 1 or not words:
        raise Invalid(f"it takes one line of {_usages('vm_run')}, and cpu=K")
    if len(cpus) > 1:
        raise Invalid("cpu=K stands once in the line")
    needs_argument = {row.name: any(not one.optional for one in row.arguments) for row in COMMANDS["vm_run"]}
    commands: list[list[str]] = []
    for word in words:
        # The word after `until` is its argument, also where a symbol has the name of a command.
        is_argument = bool(commands) and len(commands[-1]) == 1 and needs_argument.get(commands[-1][0], False)
        if commands and (is_argument or word not in needs_argument):
            commands[-1].append(word)
        else:
            commands.append([word])
    verbs = [command[0] for command in commands]
    if len(verbs) != len(set(verbs)):
        raise Invalid("each bound stands once in the line")
    if {"step", "insns"} <= set(verbs):
        raise Invalid("a run counts `step` or `insns`, not both")
    bound = replace(UNBOUND, cpu=_cpu(cpus[0])) if cpus else UNBOUND
    for command in commands:
        bound = _bound("vm_run", command, resolve)(bound)
    return bound if bound.journey is None else _travelling(bound)


def parse_commands(file: str, text: str, resolve: Resolve = no_symbols) -> Callable[[Any], Any]:
    """The commands that the lines of `text` are, as one: each is called with what the one before it returned.

    Empty lines are none; a line's number stands before what is wrong with it. `resolve` knows the symbols.
    """
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise Invalid(f"it takes commands: {_usages(file)}")
    bound = [(number, _at_line(number, lambda words=words: _bound(file, words, resolve))) for number, words in lines]

    def apply(target: Any) -> Any:
        for number, one in bound:
            target = _at_line(number, lambda one=one, target=target: one(target))
        return target

    return apply


def _at_line(number: int, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Invalid as error:
        error.line = number
        raise


def _bound(file: str, words: list[str], resolve: Resolve) -> Callable[[Any], Any]:
    for command in COMMANDS[file]:
        if command.fits(words):
            return command.bind(words if command.name is None else words[1:], resolve)
    raise Invalid(f"there is no {words[0][:40] if words else ''!r}: {_usages(file)}")


def _usages(file: str) -> str:
    return ", ".join(f"`{command.usage}`" for command in COMMANDS[file])
