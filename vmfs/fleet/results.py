"""What comes back of a case."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vmfs.fleet.values import Refused, unpack_value


class Raw(msgspec.Struct, omit_defaults=True):
    """What a runner and its worker say of a case; the fields are those of `Result`."""

    number: int
    value: bytes = b""
    kind: str = ""
    error: str = ""
    exit: str = ""
    console: str = ""
    output: str = ""
    why: str = ""
    coverage: bytes = b""
    saved: bytes = b""
    note: str = ""
    seconds: float = 0
    worker: str = ""


@dataclass(frozen=True)
class Result:
    """What became of a case. Texts of a guest may have anything in them, escape sequences, too: print their repr."""

    number: int
    """Which input it was, from 0."""
    input: Any
    value: Any = None
    """What the function returned."""
    kind: str = ""
    """"" where it went well. `raised`, `timeout`, `memory`, `disk`, `processes`, `died` (its process ended), `value`
    (what it returned is no plain data), `template`, `worker` (each worker that had it died)."""
    error: str = ""
    """The sentence; where the function raised, its traceback."""
    exit: str = ""
    """The machine's last exit, as the file `exit` has it."""
    console: str = ""
    output: str = ""
    """The end of what the function printed."""
    why: str = ""
    coverage: bytes = field(default=b"", repr=False)
    saved: Path | None = None
    """Of a case that failed, where it was asked for: what `vmfs load`, or `Machine.load` of the library, takes."""
    seconds: float = 0
    worker: str = ""
    note: str = ""
    """What is to be said beside that: why its machine was not kept, or not with its past."""

    @property
    def is_ok(self) -> bool:
        return not self.kind


def result_of(raw: Raw, given: Any, saved: Path | None) -> Result:
    kind, error, value = raw.kind, raw.error, None
    if not kind:
        try:
            value = unpack_value(raw.value)
        except Refused as failure:
            kind, error = "value", str(failure)
    return Result(
        raw.number,
        given,
        value,
        kind,
        error,
        raw.exit,
        raw.console,
        raw.output,
        raw.why,
        raw.coverage,
        saved,
        raw.seconds,
        raw.worker,
        raw.note,
    )
