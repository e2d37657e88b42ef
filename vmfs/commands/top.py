"""`vmfs top`: the machines of a mount, live, those that do most first.

/proc tells of all their processes which have used processor time since the last look. Of the machines, those are asked
that are shown and have used some, by one file each: a thousand machines cost little more than to read /proc.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from vmfs.commands import machines, table
from vmfs.commands.options import argument, count
from vmfs.words.numbers import parse_duration

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
NEW_ONES = 10  # machines that are asked for the first time in one look
ASKED_MOST = 32  # machines that are asked in one look, each after those that were asked before it
_KEPT = 128  # machines whose file stays open: those that do most
_HEAD = ("NAME", "STATE", "ENGINE", "CPU%", "MIPS", "EXITS/S", "RESIDENT", "MAKER")
_HOME, _REST, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", nargs="?", help="a mount (default: the first one of yours)")
    parser.add_argument("--delay", metavar="TIME", type=argument(parse_duration), default=1.0,
                        help="between two looks, as 500ms (default: 1s)")
    parser.add_argument("--count", metavar="N", type=argument(count), default=0, help="so many looks, then end")


def run(arguments: argparse.Namespace) -> int:
    directory = machines.mount(arguments.directory)
    live = sys.stdout.isatty()
    looks = Looks(directory)
    looks.look(_rows_of_terminal() if live else None)
    done = 0
    try:
        if live:
            print("\x1b[2J", end="")
        while True:
            time.sleep(arguments.delay)
            lines = looks.look(_rows_of_terminal() if live else None)
            if live:
                columns = shutil.get_terminal_size().columns
                print(_HOME + "\n".join(line[:columns] + _REST for line in lines) + "\n" + _BELOW, end="", flush=True)
            else:
                print("\n".join(lines), flush=True)
            done += 1
            if done == arguments.count:
                return 0
    except KeyboardInterrupt:
        return 0


def _rows_of_terminal() -> int:
    return max(shutil.get_terminal_size().lines - 3, 1)  # the title, the head, and where the cursor stands


@dataclass(eq=False)
class Machine:
    """One that has a process, as it was at the last look."""

    name: str
    uid: int
    pid: int
    ticks: int  # of processor time
    at: float
    file: table.Facts
    cpu: float = 0.0  # per cent
    resident: int = 0
    asked: dict[str, str] = field(default_factory=dict)
    asked_ticks: int = -1  # when it was asked
    asked_at: float = 0.0
    mips: float = 0.0
    exits: float = 0.0


class Looks:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._machines: dict[tuple[str, int], Machine] = {}

    def close(self) -> None:
        """Keep no file of a machine's open."""
        for machine in self._machines.values():
            machine.file.close()
        self._machines = {}

    def look(self, most: int | None = None) -> list[str]:
        """The table, after what has happened since the last time; no more than `most` machines of it."""
        shown, new = self.machines(most)
        busy = sum(machine.cpu > 0 for machine in self._machines.values())
        rows = [_row(machine) for machine in shown]
        room = None if most is None else most - len(rows)
        rows += [(one.name, "new", *"-----", table.user_name(one.uid)) for one in new[:room]]
        title = f"{self._directory}: {len(self._machines) + len(new)} machines, {busy} busy"
        return [title, *table.lines_of(_HEAD, rows)]

    def machines(self, most: int | None = None) -> tuple[list[Machine], list[table.Entry]]:
        """`most` of those that have a process, the busiest first, and all that have none."""
        before, self._machines = self._machines, {}
        new = []
        for entry in table.listing(self._directory):
            if not entry.pid:
                new.append(entry)
                continue
            key, (ticks, resident), now = (entry.name, entry.pid), _used(entry.pid), time.monotonic()
            machine = before.get(key) or Machine(*entry, ticks, now, table.Facts(self._directory / entry.name))
            self._machines[key] = machine
            machine.cpu = (ticks - machine.ticks) / _TICK / max(now - machine.at, 1e-9) * 100
            machine.ticks, machine.at, machine.resident = ticks, now, resident
        found = sorted(self._machines.values(), key=lambda one: (-one.cpu, one.name))
        self._ask(found[:most])
        for machine in {*before.values(), *found}.difference(found[:most][:_KEPT]):
            machine.file.close()
        return found[:most], new

    def _ask(self, shown: list[Machine]) -> None:
        """Those that have done something; at a later look those for which this one has no room."""
        due, new = [], 0
        for machine in shown:
            if machine.ticks == machine.asked_ticks:
                machine.mips = machine.exits = 0.0
            elif machine.asked_ticks >= 0 or new < NEW_ONES:
                new += machine.asked_ticks < 0
                due.append(machine)
        for machine in sorted(due, key=lambda one: one.asked_at)[:ASKED_MOST]:
            facts, now = machine.file.read(keep=True), time.monotonic()
            if machine.asked_ticks >= 0:
                past = max(now - machine.asked_at, 1e-9)
                done = table.number(facts, "instructions") - table.number(machine.asked, "instructions")
                machine.mips = max(done, 0) / past / 1e6
                machine.exits = max(_exits(facts) - _exits(machine.asked), 0) / past
            machine.asked, machine.asked_at = facts, now
            # What it has used to answer is no reason to ask it again, and is not what its guest uses.
            machine.ticks = machine.asked_ticks = _used(machine.pid)[0]


def _row(machine: Machine) -> tuple[str, ...]:
    state, engine = (machine.asked.get(key, "-") for key in ("state", "engine"))
    mips = f"{machine.mips:.0f}" if machine.mips else "-"
    numbers = f"{machine.cpu:.0f}", mips, f"{machine.exits:.0f}", table.size(machine.resident)
    return machine.name, state, engine, *numbers, table.user_name(machine.uid)


def _used(pid: int) -> tuple[int, int]:
    """Ticks of processor time, and bytes of resident memory, of a process; none of one that is gone."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return 0, 0
    try:
        fields = os.read(descriptor, 4096).rpartition(b")")[2].split()
    except OSError:
        return 0, 0
    finally:
        os.close(descriptor)
    return int(fields[11]) + int(fields[12]), int(fields[21]) * _PAGE  # utime, stime, rss: proc_pid_stat(5)


def _exits(facts: dict[str, str]) -> int:
    return sum(int(value) for key, value in facts.items() if key.startswith("exits."))
