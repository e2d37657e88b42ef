"""Source lines of addresses, from the DWARF of an ELF file.

A unit's line table is read when an address of it is asked for: a kernel has thousands. Source: DWARF 5, 6.2.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

from elftools.common.exceptions import DWARFError, ELFError
from elftools.elf.elffile import ELFFile

from vmfs.words.errors import Invalid

# What pyelftools raises for a damaged file is not of one class.
_BAD = (ELFError, DWARFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, AssertionError)


class Sources:
    """Of an ELF file. Invalid where it is none, or has no DWARF."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        try:
            self._file = open(path, "rb")
        except OSError as failure:
            raise Invalid(f"{path}: {failure.strerror}") from None
        try:
            elf = ELFFile(self._file)
            self._dwarf = elf.get_dwarf_info() if elf.has_dwarf_info() else None
            self._units = self._dwarf.get_aranges() if self._dwarf else None
        except _BAD as failure:
            raise Invalid(f"{path} is no ELF file: {failure}") from None
        if self._dwarf is None:
            raise Invalid(f"{path} has no DWARF: it was compiled without -g, or stripped")
        self._tables: dict[int, tuple[list[int], list[str]]] = {}  # by the offset of the unit: addresses, FILE:LINE

    def line_of(self, address: int) -> str:
        """`FILE:LINE`, or nothing."""
        try:
            for unit in self._units_of(address):
                if unit.cu_offset not in self._tables:
                    self._tables[unit.cu_offset] = _table(self._dwarf, unit)
                addresses, lines = self._tables[unit.cu_offset]
                at = bisect_right(addresses, address) - 1
                if at >= 0 and lines[at]:
                    return lines[at]
        except _BAD:  # of a damaged file nothing is said
            pass
        return ""

    def _units_of(self, address: int) -> list[Any]:
        assert self._dwarf is not None
        if self._units is not None:
            offset = self._units.cu_offset_at_addr(address)
            return [] if offset is None else [self._dwarf.get_CU_at(offset)]
        return list(self._dwarf.iter_CUs())


def _table(dwarf: Any, unit: Any) -> tuple[list[int], list[str]]:
    """The rows of a unit's line table, by address; an empty text where code ends."""
    program = dwarf.line_program_for_CU(unit)
    rows: list[tuple[int, bool, str]] = []
    if program is not None:
        first = 0 if program["version"] >= 5 else 1  # what the number of the first file is
        names = [entry.name.decode(errors="replace") for entry in program["file_entry"]]
        for entry in program.get_entries():
            state = entry.state
            if state is None:
                continue
            number = state.file - first
            name = names[number] if 0 <= number < len(names) else "?"
            rows.append((state.address, not state.end_sequence, "" if state.end_sequence else f"{name}:{state.line}"))
    rows.sort(key=lambda row: row[:2])  # an end comes before what begins there
    return [row[0] for row in rows], [row[2] for row in rows]
