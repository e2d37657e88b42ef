"""`vmfs top`: the machines of a mount, live, those that do most first.

A machine is asked only when its process has used processor time since the last look: /proc tells that for all of them,
so a thousand machines at rest cost next to nothing.
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
NEW_ONES = 50  # machines that are asked for the first time in one look
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
    looks.look()
    done = 0
    try:
        if live:
            print("\x1b[2J", end="")
        while True:
            time.sleep(arguments.delay)
            lines = looks.look()
            if live:
                room = shutil.get_terminal_size()
                shown = (line[: room.columns] + _REST for line in lines[: room.lines - 1])
                print(_HOME + "\n".join(shown) + "\n" + _BELOW, end="", flush=True)
            else:
                print("\n".join(lines), flush=True)
            done += 1
            if done == arguments.count:
                return 0
    except KeyboardInterrupt:
        return 0


@dataclass
class _Seen:
    """Of a machine, at the last look."""

    ticks: int = -1
    state: str = "new"
    engine: str = "-"
    facts: dict[str, int] = field(default_factory=dict)
    at: float = 0.0
    rates: tuple[float, float, float] = (0.0, 0.0, 0.0)  # CPU, MIPS, exits a second


class Looks:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: dict[tuple[str, int], _Seen] = {}
        self._room = NEW_ONES

    def look(self) -> list[str]:
        """The table, after what has happened since the last time."""
        rows, before, self._seen = [], self._seen, {}
        running, self._room = 0, NEW_ONES
        for entry in table.listing(self._directory):
            seen = before.get((entry.name, entry.pid)) or _Seen(state="-" if entry.pid else "new")
            self._seen[entry.name, entry.pid] = seen
            resident = self._update(entry, seen) if entry.pid else 0
            running += seen.state == "running"
            cpu, mips, exits = seen.rates
            rates = (f"{cpu:.0f}", f"{mips:.0f}" if mips else "-", f"{exits:.0f}")
            name = table.user_name(entry.uid)
            rows.append((seen.rates, (entry.name, seen.state, seen.engine, *rates, table.size(resident), name)))
        rows.sort(key=lambda row: (tuple(-rate for rate in row[0]), row[1]))
        return [f"{self._directory}: {len(rows)} machines, {running} running",
                *table.lines_of(_HEAD, [row for _, row in rows])]

    def _update(self, entry: table.Entry, seen: _Seen) -> int:
        """Ask a machine that has done something; its resident memory."""
        ticks, resident = _used(entry.pid)
        now = time.monotonic()
        if ticks == seen.ticks:
            seen.rates, seen.at = (0.0, 0.0, 0.0), now
            return resident
        if seen.ticks < 0:
            self._room -= 1
            if self._room < 0:  # at a later look
                return resident
        path = self._directory / entry.name
        facts = table.facts(path) if os.access(path / "stat", os.R_OK) else {}
        if seen.ticks >= 0:
            past = max(now - seen.at, 1e-9)
            done = facts.get("instructions", 0) - seen.facts.get("instructions", 0)
            exits = _exits(facts) - _exits(seen.facts)
            seen.rates = (ticks - seen.ticks) / _TICK / past * 100, max(done, 0) / past / 1e6, max(exits, 0) / past
        seen.state, seen.engine = table.word(path, "state"), table.word(path, "engine")
        # What it has used to answer is no reason to ask it again.
        seen.ticks, seen.facts, seen.at = _used(entry.pid)[0], facts, now
        return resident


def _used(pid: int) -> tuple[int, int]:
    """Ticks of processor time, and bytes of resident memory, of a process; none of one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0
    return int(fields[11]) + int(fields[12]), int(fields[21]) * _PAGE  # utime, stime, rss: proc_pid_stat(5)


def _exits(facts: dict[str, int]) -> int:
    return sum(value for key, value in facts.items() if key.startswith("exits."))
