"""A trace's records in other forms: text, tables, call stacks, pictures, and the formats of other programs.

    from vmfs.traces import write

    with machine.trace() as trace:                       # vmfs.Machine; of a mount, its file `trace.bin`
        machine.run(insns=1_000_000)
    with open("flame.svg", "wb") as file:
        write([trace.data], "flame", file, Place(symbols))

FORMATS is the table of them. Each is a class with `take(record)` for each record in order and `end()`, and writes as it
goes: what it keeps is bounded by the code that runs or by a constant, and not by the length of the trace.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple, Protocol

from vmfs.traces.place import Place
from vmfs.words.errors import Invalid
from vmfs.words.tracing import TraceRecord, TraceRecords

__all__ = ["FORMATS", "Format", "Place", "write"]


class Format(Protocol):
    """How a class of FORMATS is made, by `(file, place)`, and used."""

    def take(self, record: TraceRecord) -> None: ...

    def end(self) -> None:
        """Nothing comes any more: what is left is written. The file stays open."""


class Row(NamedTuple):
    module: str
    of: str  # the class in it
    binary: bool  # no text for a terminal
    needs: str  # what has to be traced
    what: str


FORMATS = {
    "text": Row("tables", "Text", False, "", "a line an event, as the file `trace` has them"),
    "csv": Row("tables", "Csv", False, "", "a row an event, with a head"),
    "ndjson": Row("tables", "Json", False, "", "a JSON object an event, a line each"),
    "perfetto": Row("timeline", "Timeline", True, "insn", "calls on a time line, for ui.perfetto.dev"),
    "folded": Row("stacks", "Folded", False, "insn", "instructions by call stack, for speedscope and flamegraph.pl"),
    "flame": Row("flame", "Flame", False, "insn", "the same as a picture: a flame graph (SVG)"),
    "heat": Row("heat", "Heat", False, "insn or mem", "which memory is used when, as a picture (SVG)"),
    "drcov": Row("coverage", "Coverage", True, "insn", "which code has run, for Lighthouse, Cartographer and others"),
    "tenet": Row("steps", "Tenet", False, "insn and mem", "instructions and accesses, for Tenet"),
    "qira": Row("steps", "Qira", True, "insn and mem", "the same for QIRA"),
}


def make(name: str, file: BinaryIO, place: Place) -> Format:
    """The writer of a format; Invalid for a name that is none."""
    row = FORMATS.get(name)
    if row is None:
        raise Invalid(f"{name[:20]!r} is none of {', '.join(FORMATS)}")
    return getattr(importlib.import_module(f"vmfs.traces.{row.module}"), row.of)(file, place)


def write(
    parts: Iterable[bytes], name: str, file: BinaryIO, place: Place | None = None, *, cpu: int | None = None
) -> None:
    """Records (`struct vmfs_trace`), in pieces of any size, to `file`. `cpu`: only that one's.

    A KeyboardInterrupt ends the stream early, and not the file: what came before it is there, whole.
    """
    format_ = make(name, file, place or Place())
    records = TraceRecords()
    try:
        for part in parts:
            for record in records.read(part):
                if cpu is None or record.cpu == cpu or record.kind == "dropped":
                    format_.take(record)
    except KeyboardInterrupt:
        format_.end()
        raise
    format_.end()
