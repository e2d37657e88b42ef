"""Which machines `vmfs top` asks; tests/mount has it with a mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmfs.commands import table, top


@pytest.fixture
def hundred(monkeypatch):
    """A mount of 100 machines, of which those in `busy` use processor time from look to look: a function that looks and
    returns the machines that were asked, `busy`, and the lines of the last look."""
    asked: list[str] = []
    busy: set[int] = set()
    used = dict.fromkeys(range(1, 101), 0)

    def ticks(pid: int) -> tuple[int, int]:
        return used[pid], 1 << 20

    def read(one: table.Facts, *, keep: bool = False) -> dict[str, str]:
        asked.append(one.path.name)
        return {"state": "running", "instructions": str(used[int(one.path.name)] * 10**9)}

    monkeypatch.setattr(table, "listing", lambda directory: [table.Entry(str(pid), 0, pid) for pid in used])
    monkeypatch.setattr(top, "_used", ticks)
    monkeypatch.setattr(table.Facts, "read", read)
    looks = top.Looks(Path("/nowhere"))

    lines: list[str] = []

    def look() -> list[str]:
        for pid in busy:
            used[pid] += 7
        asked.clear()
        lines[:] = looks.look()[2:]
        return list(asked)

    return look, busy, lines


def test_each_is_asked_once_and_then_those_that_are_busy(hundred):
    look, busy, _ = hundred
    found = [look() for _ in range(10)]
    assert [len(each) for each in found] == [top.NEW_ONES] * 10
    assert len({name for each in found for name in each}) == 100
    assert look() == []
    busy.update({5, 50, 95})
    assert sorted(look()) == ["5", "50", "95"] and sorted(look()) == ["5", "50", "95"]


def test_those_that_are_busy_take_turns_where_they_are_many(hundred):
    look, busy, lines = hundred
    for _ in range(10):
        look()
    busy.update(range(1, 81))
    found = [look() for _ in range(5)]
    assert [len(each) for each in found] == [top.ASKED_MOST] * 5
    assert all(sum(str(pid) in each for each in found) == 2 for pid in busy), "160 askings of 80"
    rows = {int(line.split()[0]): line.split() for line in lines}
    assert {pid for pid, row in rows.items() if row[4] != "-"} == busy, "MIPS, also of those that were not asked now"
