"""Which code has run, as drcov of DynamoRIO writes it (version 2, module table version 2).

The format, as its readers have it: text lines of a head and of modules, `BB Table: N bbs`, and N times a 32-bit offset
into a module, a 16-bit length and a 16-bit number of the module. A block here is what ran from where a jump led to
where the next one was taken.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from vmfs.traces.place import Place
from vmfs.words.errors import LimitReached
from vmfs.words.tracing import TraceRecord, instructions_of

MOST = 1 << 21  # blocks
GAP = 16 << 20  # bytes between two blocks: what is further apart is in two modules
REACH = 1 << 32  # bytes of a module
MODULES = 1 << 16
_ENTRY = struct.Struct("<IHH")
_LONGEST = 0xFFFF
_KERNEL = ("vmlinux", "_text", "_end")  # Linux: vmlinux.lds.S


class Coverage:
    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file, self._place = file, place
        self._blocks: set[tuple[int, int]] = set()  # first byte, and after the last one
        self._open: dict[int, tuple[int, int]] = {}  # of each CPU: the one that it is in

    def take(self, record: TraceRecord) -> None:
        if record.kind == "dropped":
            self._close()
        if record.kind != "insn":
            return
        begin, end = self._open.get(record.cpu, (-1, -1))
        first = record.words[1]
        if first != end or end - begin > _LONGEST - 16 * 15:
            self._add(begin, end)
            begin = first
        for address, length in instructions_of(record):
            end = address + (length or 1)
        self._open[record.cpu] = begin, end

    def _add(self, begin: int, end: int) -> None:
        if begin >= 0:
            self._blocks.add((begin, end))
            if len(self._blocks) > MOST:
                raise LimitReached(f"drcov: there are more than {MOST} blocks: trace less, by --range")

    def _close(self) -> None:
        for begin, end in self._open.values():
            self._add(begin, end)
        self._open.clear()

    def end(self) -> None:
        self._close()
        blocks = sorted(self._blocks)
        modules = self._modules(blocks)
        lines = ["DRCOV VERSION: 2", "DRCOV FLAVOR: drcov", f"Module Table: version 2, count {len(modules)}"]
        lines.append("Columns: id, base, end, entry, path")
        for number, (name, base, end) in enumerate(modules):
            lines.append(f"{number:3}, {base:#x}, {end:#x}, {0:#018x}, {name}")
        entries = bytearray()
        number = 0
        for begin, end in blocks:
            while begin >= modules[number][2]:
                number += 1
            entries += _ENTRY.pack(begin - modules[number][1], end - begin, number)
        lines.append(f"BB Table: {len(blocks)} bbs\n")
        self._file.write("\n".join(lines).encode() + entries)
        self._file.flush()

    def _modules(self, blocks: list[tuple[int, int]]) -> list[tuple[str, int, int]]:
        """In order, without overlap: those that are named, the kernel where symbols say which, and what else lies
        together."""
        named = [(name, first, last + 1) for name, first, last in self._place.modules]
        name, text, end = _KERNEL
        begin, after = (self._place.symbols.address_of(each) for each in (text, end))
        if begin is not None and after is not None and begin < after:
            named += [(name, begin, after)] if all(last <= begin or after <= first for _, first, last in named) else []
        found: list[tuple[str, int, int]] = []
        edges = sorted(named, key=lambda one: one[1])
        for first, last in blocks:
            inside = next((one for one in edges if one[1] <= first < one[2]), None)
            if inside:
                if inside not in found:
                    found.append(inside)
                continue
            name, base, after = found[-1] if found else ("", -GAP - REACH, -GAP - REACH)
            if (name, base, after) in edges or first - after > GAP or last - base >= REACH:
                base = first & ~0xFFF
                base = max(base, found[-1][2]) if found else base
                found.append((f"{base:#x}", base, last))
            else:
                found[-1] = (name, base, max(after, last))
        if len(found) > MODULES:
            raise LimitReached(f"drcov: the code is in more than {MODULES} places: trace less, by --range")
        return found
