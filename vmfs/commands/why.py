"""`vmfs why MACHINE`: why it has shut down, with source lines where a file says them."""

import argparse

from vmfs.commands import machines
from vmfs.debug.why import with_sources
from vmfs.words.errors import Invalid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("--symbols", metavar="FILE", action="append", default=[],
                        help="an ELF file whose DWARF says the source lines, where `symbols` does not; may be given "
                        "several times")


def run(arguments: argparse.Namespace) -> int:
    machine = machines.machine(arguments.machine)
    text = machines.read(machine, "why")
    if not text:
        raise Invalid(f"{machine} has not shut down, and was not reset")
    sources = [_sources(path) for path in arguments.symbols]
    print(with_sources(text, lambda at: next(filter(None, (of.line_of(at) for of in sources)), None)), end="")
    return 0


def _sources(path: str):
    from vmfs.debug.sources import Sources  # pyelftools takes a moment

    return Sources(path)
