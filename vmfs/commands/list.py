"""`vmfs ls`: the machines of a mount, a row each. What nobody has used yet stays so: nothing of it is read."""

import argparse
import os
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
    if not os.access(path / "stat", os.R_OK):
        return entry.name, "-", "-", "-", "-", "-", "-", maker
    engine, machine, cpus = (table.word(path, name) for name in ("engine", "machine", "cpus"))
    facts = table.facts(path)
    seconds = facts.get("run_time_us", 0) / 1e6
    mips = f"{facts['instructions'] / seconds / 1e6:.0f}" if seconds and "instructions" in facts else "-"
    ram = table.size(facts.get("memory_bytes", 0))
    return entry.name, table.word(path, "state"), engine, machine, cpus, ram, mips, maker
