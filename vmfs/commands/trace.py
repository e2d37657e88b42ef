"""`vmfs trace MACHINE start|stop|print`: what it executes, as text, as pictures, and in the formats of other
programs."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from vmfs import traces
from vmfs.commands import machines
from vmfs.debug import symbols
from vmfs.words.errors import EngineFailed, Invalid, VmfsError

KINDS = ("insn", "mem", "exceptions", "interrupts", "exits", "coverage")
_CHUNK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", metavar="MACHINE", help=f"{machines.HELP}; or a file with what its `trace.bin` gave")
    parser.add_argument("what", choices=("start", "stop", "print"), nargs="?", default="print",
                        help="start: from the next instruction on; stop; print (default): what was and is traced")
    parser.add_argument("kinds", metavar="KIND", nargs="*", default=[],
                        help=f"start: {', '.join(KINDS)} (default: insn)")
    parser.add_argument("--range", metavar="FIRST-LAST", help="start: only what instructions there do")
    parser.add_argument("--drop", action="store_true", help="start: drop what nobody reads in time")
    parser.add_argument("--format", metavar="NAME", default="text",
                        help="print: " + "; ".join(f"{name}: {row.what}" for name, row in traces.FORMATS.items()))
    parser.add_argument("-o", "--output", metavar="FILE", help="print: write it there")
    parser.add_argument("--cpu", metavar="K", type=int, help="print: only this CPU's")
    parser.add_argument("--symbols", metavar="FILE",
                        help="print: names from an ELF file or a System.map, beside the machine's")
    parser.add_argument("--module", metavar="NAME=FIRST-LAST", action="append", default=[],
                        help="print, for drcov: where a program is")


def run(arguments: argparse.Namespace) -> int:
    if arguments.format not in traces.FORMATS:
        near = machines.did_you_mean(arguments.format, traces.FORMATS)
        raise Invalid(f"{arguments.format[:20]!r} is none of {', '.join(traces.FORMATS)}{near}")
    for kind in arguments.kinds:
        if arguments.what != "start":
            raise Invalid(f"{arguments.what} takes no {kind[:20]!r}")
        if kind not in KINDS:
            raise Invalid(f"{kind[:20]!r} is none of {', '.join(KINDS)}{machines.did_you_mean(kind, KINDS)}")
    if arguments.what == "print":
        _print(arguments)
        return 0
    machine = machines.machine(arguments.machine)
    if arguments.what == "stop":
        machines.write(machine, "trace", "off")
    else:
        lines = [f"{kind} {'on' if kind in (arguments.kinds or ['insn']) else 'off'}" for kind in KINDS]
        lines += [f"range {arguments.range or 'all'}", f"full {'drop' if arguments.drop else 'wait'}"]
        machines.write(machine, "trace", "\n".join(lines))
    return 0


def _print(arguments: argparse.Namespace) -> None:
    """Until tracing is switched off."""
    given = Path(arguments.machine)
    saved = given.is_file()
    machine = given if saved else machines.machine(arguments.machine)
    plain = not saved and arguments.format == "text" and arguments.cpu is None and arguments.symbols is None
    row = traces.FORMATS[arguments.format]
    if row.binary and arguments.output is None and sys.stdout.isatty():
        raise Invalid(f"{arguments.format} is no text for a terminal: -o FILE")
    with contextlib.ExitStack() as stack:
        place = traces.Place() if plain else _place(arguments, machine, saved, stack)
        source = machine if saved else machine / ("trace" if plain else "trace.bin")
        parts = _parts(source, _refusal(machine, source, saved), stack)
        file = _output(arguments.output, stack)
        try:
            if plain:
                for part in parts:
                    file.write(part)
                    file.flush()
            else:
                traces.write(parts, arguments.format, file, place, cpu=arguments.cpu)
        except (BrokenPipeError, VmfsError):
            raise
        except OSError as failure:
            raise EngineFailed(f"{arguments.output or 'stdout'}: {failure.strerror}") from None


def _refusal(machine: Path, source: Path, saved: bool) -> Callable[[OSError], Exception]:
    if saved:
        return lambda failure: EngineFailed(f"{source}: {failure.strerror}")
    return lambda failure: machines.reason(machine, source.name, failure)


def _parts(source: Path, refusal: Callable[[OSError], Exception], stack: contextlib.ExitStack) -> Iterator[bytes]:
    """What a stream gives, as it comes. It is opened now."""
    try:
        file = stack.enter_context(open(source, "rb", buffering=0))
    except OSError as failure:
        raise refusal(failure) from None

    def parts() -> Iterator[bytes]:
        while True:
            try:
                data = os.read(file.fileno(), _CHUNK)
            except OSError as failure:
                raise refusal(failure) from None
            if not data:
                return
            yield data

    return parts()


def _output(name: str | None, stack: contextlib.ExitStack) -> BinaryIO:
    if name is None:
        sys.stdout.flush()
        return sys.stdout.buffer
    try:
        return stack.enter_context(open(name, "wb"))
    except OSError as failure:
        raise EngineFailed(f"{name}: {failure.strerror}") from None


def _place(arguments: argparse.Namespace, machine: Path, saved: bool, stack: contextlib.ExitStack) -> traces.Place:
    """The names and the code that a machine has, as they are now."""
    table = symbols.SymbolTable()
    if arguments.symbols is not None:
        try:
            with open(arguments.symbols, "rb") as file:
                table = symbols.parse_file(file.fileno())
        except OSError as failure:
            raise EngineFailed(f"{arguments.symbols}: {failure.strerror}") from None
        except Invalid as failure:
            raise Invalid(f"{arguments.symbols}: {failure}") from None
    read = None
    if not saved:
        if text := machines.read(machine, "symbols"):
            table = table.merged(symbols.parse_map(text.encode()))
        with contextlib.suppress(OSError):  # without, calls are told from jumps by symbols
            memory = stack.enter_context(open(machine / "virt", "rb", buffering=0))
            read = lambda address, size: _memory(memory.fileno(), address, size)  # noqa: E731
    modules = tuple(_module(each) for each in arguments.module)
    return traces.Place(table, read, title=machine.name, modules=modules)


def _memory(file: int, address: int, size: int) -> bytes:
    try:
        return os.pread(file, size, address & (1 << 63) - 1)
    except OSError:  # nothing is mapped there, or not any more
        return b""


def _module(text: str) -> tuple[str, int, int]:
    name, equals, span = text.partition("=")
    first, dash, last = span.partition("-")
    try:
        bounds = int(first, 0), int(last, 0)
    except ValueError:
        bounds = 1, 0
    if not name or not equals or not dash or not 0 <= bounds[0] <= bounds[1] < 1 << 64:
        raise Invalid(f"--module: {text[:60]!r} is not NAME=FIRST-LAST")
    return name, *bounds
