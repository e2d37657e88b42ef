"""`vmfs ls`: the machines of a mount, a row each. What nobody has used yet stays so: nothing of it is read."""

import argparse
from pathlib import Path

from vmfs.commands import machines, table
from vmfs.words.errors import Invalid

HEAD = ("NAME", "STATE", "ENGINE", "MACHINE", "CPUS", "RAM", "MIPS", "MAKER")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", nargs="?", help="a mount (default: all of yours)")


def run(arguments: argparse.Namespace) -> int:
    given = arguments.directory
    directories = [machines.mount(given)] if given is not None else list(machines.own_mounts())
    if not directories:
        raise Invalid(machines.NO_MOUNT)
    for directory in directories:
        if len(directories) > 1:  # as ls(1) has it
            print(f"{directory}:")
        table.show(HEAD, [row(directory, each) for each in table.listing(directory)])
    return 0


def row(directory: Path, entry: table.Entry) -> tuple[str, ...]:
    path = directory / entry.name
    maker = table.user_name(entry.uid)
    if not entry.pid:
        return entry.name, "new", "-", "-", "-", "-", "-", maker
    facts = table.facts(path)
    seconds = table.number(facts, "run_time_us") / 1e6
    mips = f"{table.number(facts, 'instructions') / seconds / 1e6:.0f}" if seconds and "instructions" in facts else "-"
    words = (facts.get(key, "-") for key in ("state", "engine", "machine", "cpus"))
    ram = table.size(table.number(facts, "memory_bytes")) if facts else "-"
    return entry.name, *words, ram, mips, maker
