"""What gdb's `monitor` takes: the verbs of `debug`, and any text file of the machine by its name."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any

from vmfs.debug.gdb.stub import parse_layout
from vmfs.errors import Invalid
from vmfs.fs.commands import COMMANDS, parse_commands
from vmfs.fs.files import FILES
from vmfs.fs.kinds import Text
from vmfs.fs.scopes import MachineScope
from vmfs.fs.waiting import finished
from vmfs.numbers import parse_number

_TEXTS: Mapping[str, Text] = {row.name: row.kind for row in FILES if isinstance(row.kind, Text)}


async def command(scope: MachineScope, text: str) -> str:
    """Do it; what there is to say about it. Invalid for what is none."""
    word, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if word in WORDS:
        return await WORDS[word][1](scope, rest)
    if word in _VERBS or word.isdigit():
        change = parse_commands("debug", text, scope.vm.symbols.address_of)
        await _settled(scope.vm.set_points(change), scope)
        return scope.vm.points_text()
    kind = _TEXTS.get(word)
    if kind is None:
        raise Invalid(f"there is no {word[:40]!r}: see `monitor help`")
    if not rest:
        if kind.get is None:
            raise Invalid(f"{word} can only be written")
        said = await _settled(kind.get(scope), scope)
        return said if isinstance(said, str) else said.hex() + "\n"
    if kind.put is None:
        raise Invalid(f"{word} cannot be written")
    await _settled(kind.put(scope, rest + "\n"), scope)
    return ""


_VERBS = frozenset(one.name for one in COMMANDS["debug"] if one.name)


async def _settled(value: Any, scope: MachineScope) -> Any:
    if isinstance(value, Future):
        await finished(value, scope)
        return value.result()
    if inspect.isawaitable(value):
        return await value
    return value


async def _help(_scope: MachineScope, _rest: str) -> str:
    lines = [f"{word:<24}{about}\n" for word, (about, _) in sorted(WORDS.items())]
    lines.append(f"{'phys [on|off]':<24}whether addresses are guest-physical\n")
    lines.append(f"{'FILE':<24}read one of: {' '.join(name for name, kind in _TEXTS.items() if kind.get)}\n")
    lines.append(f"{'FILE TEXT':<24}write one of: {' '.join(name for name, kind in _TEXTS.items() if kind.put)}\n")
    lines += [f"{one.usage}\n" for one in COMMANDS["debug"] if one.name and not one.name.isdigit()]
    return "".join(lines)


async def _info(scope: MachineScope, _rest: str) -> str:
    parts = {name: await command(scope, name) for name in ("state", "exit", "mode", "machine", "engine", "mem_size")}
    return "".join(f"{name:<12}{text}" for name, text in parts.items() if text) + f"{'gdb':<12}{scope.gdb.text()}"


async def _reset(scope: MachineScope, _rest: str) -> str:
    scope.vm.reset()
    return "the machine is reset; gdb's registers are old until `maintenance flush register-cache`\n"


async def _answer(scope: MachineScope, rest: str) -> str:
    size = len(scope.vm.access_data)
    if not size:
        raise Invalid("no access is pending")
    value = parse_number(rest, 8 * min(size, 16), what="answer")
    scope.vm.set_access_data(value.to_bytes(size, "little"))
    return ""


async def _layout(scope: MachineScope, rest: str) -> str:
    if rest:
        scope.gdb.gdb.words = parse_layout(rest.split())
    name, linear = scope.gdb.gdb.words
    return f"layout {name}{' linear' * linear}, from the next connection on\n"


# Words that are no files: what they are for, and what does it.
WORDS: Mapping[str, tuple[str, Callable[[MachineScope, str], Awaitable[str]]]] = {
    "help": ("this", _help),
    "info": ("what the machine is, and why it last stopped", _info),
    "reset": ("the CPU as after power-on; RAM stays", _reset),
    "answer": ("VALUE: what the `in` or load that waits returns", _answer),
    "layout": ("[x86-64|i386|i8086] [linear]: the registers that the next connection gets", _layout),
}
