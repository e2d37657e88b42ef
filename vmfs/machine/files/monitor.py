"""What gdb's `monitor` takes: the verbs of `debug`, any text file of the machine by its name, and more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from vmfs.machine.files.commands import COMMANDS, parse_command, parse_commands
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.debug import SYMBOL_COMMANDS, symbols_by
from vmfs.machine.files.kinds import Text
from vmfs.machine.files.table import CONTENTS, REGISTER_KINDS, has_msr, register_file
from vmfs.machine.files.waiting import settled
from vmfs.machine.gdb.stub import parse_layout
from vmfs.words.errors import Invalid
from vmfs.words.numbers import parse_number

_TEXTS: Mapping[str, Text] = {name: kind for name, kind in CONTENTS.items() if isinstance(kind, Text)}


async def command(scope: Contents, text: str) -> str:
    """Do it; what there is to say about it. Invalid for what is none."""
    word, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    await scope.learn_lines(text)
    if word in WORDS:
        return await WORDS[word][1](scope, rest)
    if word in _VERBS or word.isdigit():
        change = parse_commands("debug", text, scope.vm.symbols.address_of)
        await settled(scope.vm.set_points(change), scope)
        return scope.vm.points_text()
    kind = await _text_file(scope, word)
    if kind is None:
        raise Invalid(f"there is no {word[:40]!r}: see `monitor help`")
    if not rest:
        if kind.get is None:
            raise Invalid(f"{word} can only be written")
        said = await settled(kind.get(scope), scope)
        return said if isinstance(said, str) else said.hex() + "\n"
    if kind.put is None:
        raise Invalid(f"{word} cannot be written")
    await settled(kind.put(scope, rest)(), scope)
    return ""


async def _text_file(scope: Contents, name: str) -> Text | None:
    """What there is of that name, `reg/NAME` too."""
    folder, slash, register = name.partition("/")
    if not slash or folder != "reg":
        return _TEXTS.get(name)
    kind = REGISTER_KINDS.get(register)
    if kind is None and await settled(scope.vm.at_boundary(lambda cpu: has_msr(cpu, register)), scope):
        kind = register_file(register)
    return kind


_VERBS = frozenset(one.name for one in COMMANDS["debug"] if one.name)


async def _help(_scope: Contents, _rest: str) -> str:
    lines = [f"{word:<24}{about}\n" for word, (about, _) in sorted(WORDS.items())]
    lines.append(f"{'phys [on|off]':<24}whether addresses are guest-physical\n")
    for usage, names in (
        ("FILE", [name for name, kind in _TEXTS.items() if kind.get]),
        ("FILE TEXT", [name for name, kind in _TEXTS.items() if kind.put]),
    ):
        lines.append(f"{usage:<24}one of: {' '.join(names)} reg/NAME\n")
    lines += [f"{one.usage}\n" for one in COMMANDS["debug"] if one.name and not one.name.isdigit()]
    return "".join(lines)


async def _info(scope: Contents, _rest: str) -> str:
    parts = {name: await command(scope, name) for name in ("state", "exit", "mode", "machine", "engine", "mem_size")}
    return "".join(f"{name:<12}{text}" for name, text in parts.items() if text) + f"{'gdb':<12}{scope.gdb.text()}"


async def _reset(scope: Contents, _rest: str) -> str:
    scope.vm.reset()
    return "the machine is reset; gdb's registers are old until `maintenance flush register-cache`\n"


async def _answer(scope: Contents, rest: str) -> str:
    size = len(scope.vm.access_data)
    if not size:
        raise Invalid("no access is pending")
    value = parse_number(rest, 8 * min(size, 16), what="answer")
    scope.vm.set_access_data(value.to_bytes(size, "little"))
    return ""


async def _layout(scope: Contents, rest: str) -> str:
    if rest:
        scope.gdb.gdb.words = parse_layout(rest.split())
    name, linear = scope.gdb.gdb.words
    return f"layout {name or 'of the symbols'}{' linear' * linear}, from the next connection on\n"


async def _irq(scope: Contents, rest: str) -> str:
    parse_command("irq", rest)(scope.vm)
    return ""


async def _symbols(scope: Contents, rest: str) -> str:
    if rest:
        if rest not in SYMBOL_COMMANDS:
            raise Invalid(f"symbols: it is {' or '.join(SYMBOL_COMMANDS)}; a file is written to `symbols`")
        scope.vm.symbols = await symbols_by(scope, rest)
    return f"{len(scope.vm.symbols)} symbols\n"


async def _trace(scope: Contents, rest: str) -> str:
    if rest:
        change = parse_commands("trace", rest, scope.vm.symbols.address_of)
        await scope.set_trace(change)
    lines = (await command(scope, "stat")).splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith(("trace ", "trace_")))


# Words that are no texts of files: what they are for, and what does it.
WORDS: Mapping[str, tuple[str, Callable[[Contents, str], Awaitable[str]]]] = {
    "help": ("this", _help),
    "info": ("what the machine is, and why it last stopped", _info),
    "reset": ("the CPU as after power-on; RAM stays", _reset),
    "irq": ("VECTOR, nmi, line N 0|1, pulse N: an interrupt, as written to `irq`", _irq),
    "symbols": ("[kallsyms|clear]: how many there are; find those of the Linux that runs", _symbols),
    "trace": ("[SETTING]: what is traced, as written to `trace`", _trace),
    "answer": ("VALUE: what the `in` or load that waits returns", _answer),
    "layout": ("[x86-64|i386|i8086] [linear]: the registers that the next connection gets", _layout),
}
