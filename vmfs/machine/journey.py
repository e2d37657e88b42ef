"""Journey: where in its past a machine is to go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Journey:
    """Where to. `place`: there; `back`: so many instructions, of `cpu` where one is named; else to the last stop: at
    `until`, or of the machine's points. `before`: a stop that comes after its instruction is the place before it."""

    place: int | None = None
    back: int | None = None
    until: int | None = None
    cpu: int | None = None
    before: bool = False
    written: tuple[tuple[int, int], ...] = ()  # guest-physical (address, length), whose last writer is looked for
