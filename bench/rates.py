"""What a guest does so often a second on a machine of ours and under QEMU TCG: rounds in turn, of which the best
counts, by the host's clock and by processor time. Each round says NAME.begin and NAME.end of each row.

A busy host slows both down, so the rounds alternate.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.guests import Told, qemu_version
from bench.harness import Result

MIB = 1 << 20


class Row(NamedTuple):
    """`amount`, of `unit`s times seconds, is done between its marks. `mark` is set for the rate by the clock."""

    name: str
    unit: str
    what: str
    amount: float
    mark: str = ""


@contextmanager
def image(size_mib: int, first: bytes = b"") -> Iterator[Path]:
    """A disk image that begins so; all of it is in the host's page cache."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        file.write(first.ljust(MIB, b"\x5a"))
        for _ in range(size_mib - 1):
            file.write(b"\x5a" * MIB)
        file.flush()
        yield Path(file.name)


def peer_or_none(bench: str) -> str:
    peer = qemu_version()
    if not peer:
        print(f"bench {bench}: qemu-system-x86_64 is not installed: no peer", file=sys.stderr)
    return peer


def compare(
    bench: str, title: str, rows: Sequence[Row], rounds: int, on_ours: Callable[[], Told],
    on_peer: Callable[[], Told], peer: str,
) -> list[Result]:  # fmt: skip
    """Rows by the clock, then by processor time. `title` begins each; without a `peer` there is none."""
    amounts = {row.name: row.amount for row in rows}
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(on_ours().rates(amounts))
        if peer:
            theirs.append(on_peer().rates(amounts))
            pairs = (f"{row.name} {ours[-1][row.name][0]:.4g}/{theirs[-1][row.name][0]:.4g}" for row in rows)
            print(f"bench {bench}: {title}", *pairs, file=sys.stderr)
    found = []
    for way, (by, per) in enumerate((("", ""), (", by processor time", " CPU"))):
        for row in rows:
            best = max(one[row.name][way] for one in ours)
            other = max((one[row.name][way] for one in theirs), default=None)
            mark = "" if way else row.mark
            found.append(Result(f"{title}: {row.what}{by}", row.unit + per, best, peer, other, mark))
    return found
