"""`vmfs why MACHINE`: why it has shut down, with source lines where a file says them."""

import argparse
import re

from vmfs.commands import machines
from vmfs.words.errors import Invalid

_PLACES = (re.compile(r"\bat=0x([0-9a-f]+)"), re.compile(r"^0x([0-9a-f]+)\b"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("--symbols", metavar="FILE", action="append", default=[],
                        help="an ELF file whose DWARF says the source lines; may be given several times")


def run(arguments: argparse.Namespace) -> int:
    machine = machines.machine(arguments.machine)
    text = machines.read(machine, "why")
    if not text:
        raise Invalid(f"{machine} has not shut down, and was not reset")
    sources = [_sources(path) for path in arguments.symbols]
    for line in text.splitlines():
        places = [match[1] for match in (pattern.search(line) for pattern in _PLACES) if match]
        found = [where for of in sources for place in places if (where := of.line_of(int(place, 16)))]
        print(line + (f"  [{found[0]}]" if found else ""))
    return 0


def _sources(path: str):
    from vmfs.debug.sources import Sources  # pyelftools takes a moment

    return Sources(path)
