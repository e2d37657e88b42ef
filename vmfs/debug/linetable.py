"""Addresses of source lines, `kernel.c:42`, from the line tables of ELF files (.debug_line, .debug_line_str).

A machine keeps the sections as they are. They are decoded when the first FILE:LINE is asked for, and of the rows only
those of files of that name are kept. pyelftools is not used: it makes objects of every instruction of a table, and
takes a file's word for how many directories it has. All here is bounded by the size of the sections.

Source: DWARF 5, 6.2 (versions 2 to 5); System V ABI, "Compressed Sections".
"""

from __future__ import annotations

import contextlib
import posixpath
import re
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmfs.words.errors import Invalid, LimitReached

SECTIONS_MOST = 64 << 20  # bytes of line tables, of all files together; Linux has some 40 MiB
SOON_MOST = 4 << 20  # bytes of a table that is decoded, a second or two, for a user that did not ask for a line
LINES_MOST = 1 << 18  # that are known at a time, of the files that were asked for
NAMES_MOST = 256 << 20  # bytes of names that are looked at in one search
NAME_MOST = 4096  # of a file's name, PATH_MAX of Linux
FILES_MOST = 1 << 16  # of a unit, and directories
FIELDS_MOST = 16  # that a file has in version 5; compilers write two or three
LINE_MOST = (1 << 31) - 1

_WORD = re.compile(r"([^\s:]+):([0-9]{1,10})", re.ASCII)
_OFFSET = re.compile(r"[+-][0-9]\w*", re.ASCII)
_MASK = (1 << 64) - 1
_LOOK = 4096  # after so many instructions of a table comes a look at whether the caller still waits


def nothing() -> None:
    """Of a search that nobody gives up."""


@dataclass(frozen=True)
class Section:
    """What is in a section of an ELF file, compressed by zlib or not; `size`: without compression."""

    data: bytes = b""
    size: int = 0
    compressed: bool = False

    def contents(self) -> bytes:
        if not self.compressed:
            return self.data
        try:
            data = zlib.decompressobj().decompress(self.data, self.size or 1)
        except zlib.error as error:
            raise Invalid(f"a compressed section is damaged: {error}") from None
        if len(data) != self.size:
            raise Invalid("a compressed section is not as long as it says")
        return data


@dataclass(frozen=True)
class LineTable:
    """Of one ELF file. `code`: where its executable sections begin and end, by address: a linker leaves the rows of
    functions that it has dropped, at other addresses."""

    lines: Section
    strings: Section
    code: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Bytes that are kept, or made of them for a search."""
        return sum(max(len(one.data), one.size) for one in (self.lines, self.strings))


_Rows = dict[str, dict[int, int]]  # of each path: the lowest address of each line
_Known = dict[str, dict[str, tuple[list[int], list[int]]]]  # by a path's last part, the path: lines, their addresses

class Lines:
    """Of the ELF files that were written. Another takes its place; what it has learnt is all that changes.

    `missing`: why there is none of a file that has DWARF.
    """

    def __init__(self, tables: tuple[LineTable, ...] = (), missing: str = "") -> None:
        self._tables = tables
        self._missing = missing
        self.size = sum(table.size for table in tables)
        if self.size > SECTIONS_MOST:
            raise LimitReached(f"the line tables (.debug_line) have {self.size} bytes, more than {SECTIONS_MOST}")
        self._known: _Known = {}

    def merged(self, other: Lines) -> Lines:
        more = tuple(one for one in other._tables if one not in self._tables)
        missing = self._missing or other._missing
        return Lines(self._tables + more, missing) if more or missing != self._missing else self

    def unknown(self, text: str) -> set[str]:
        """The names of the files that `learn(text)` has to look for."""
        if not self._tables or ":" not in text:
            return set()
        words = (word.removeprefix("phys:").rpartition(":") for word in text.split() if ":" in word)
        matches = (_WORD.fullmatch(file + colon + _OFFSET.sub("", line)) for file, colon, line in words)
        names = {posixpath.basename(posixpath.normpath(match[1])) for match in matches if match}
        return names - {"", ".", ".."} - self._known.keys()

    def learn(self, text: str, check: Callable[[], None] = nothing) -> _Known:
        """Decode what is needed for all FILE:LINE that stand in `text`; `check` may raise, which ends it. Invalid for
        damaged tables. In any thread."""
        known, names = self._known, self.unknown(text)
        if not names:
            return known
        rows: _Rows = {}
        for table in self._tables:
            _Search(table, {name.encode() for name in names}, rows, check).run()
        found: _Known = {name: {} for name in names}
        for path, addresses in rows.items():
            ordered = sorted(addresses)
            found[posixpath.basename(path)][path] = ordered, [addresses[line] for line in ordered]
        before = sum(len(lines) for paths in known.values() for lines, _ in paths.values())
        is_room = before + sum(map(len, rows.values())) <= LINES_MOST
        self._known = known = {**known, **found} if is_room else found
        return known

    def places_of(self, addresses: set[int], check: Callable[[], None] = nothing) -> dict[int, str]:
        """`FILE:LINE` of those addresses that have one, the file without its folders; of tables that are soon decoded,
        and of none that is damaged. In any thread."""
        found: dict[int, str] = {}
        for table in self._tables:
            if addresses and table.lines.size <= SOON_MOST:
                with contextlib.suppress(Invalid):
                    _Places(table, addresses, found, check).run()
        return found

    def address_of(self, text: str) -> int | None:
        """The lowest address of the code of `FILE:LINE`, or of the next line of the file that has code. None where it
        is no FILE:LINE, Invalid where there is none such."""
        match = _WORD.fullmatch(text)
        if match is None:
            return None
        if not self._tables:
            why = self._missing or "no ELF file with DWARF (gcc -g) was written to `symbols`"
            raise Invalid(f"{text[:80]!r} is not known: {why}")
        wanted, line = posixpath.normpath(match[1]), int(match[2])
        paths = self.learn(text).get(posixpath.basename(wanted), {})
        fitting = [wanted] if wanted in paths else sorted(path for path in paths if path.endswith("/" + wanted))
        if not fitting:
            why = f" ({self._missing})" if self._missing else ""
            raise Invalid(f"the line tables of `symbols` have no code of a file {wanted[:80]!r}{why}")
        if len(fitting) > 1:
            names = ", ".join(fitting[:4]) + (f" and {len(fitting) - 4} more" if len(fitting) > 4 else "")
            raise Invalid(f"there are {len(fitting)} files {wanted[:80]!r}: {names}")
        lines, addresses = paths[fitting[0]]
        at = bisect_left(lines, line)
        if at == len(lines):
            last = f"the last line with code is {lines[-1]}"
            raise Invalid(f"{wanted[:80]} has no code at line {line} or after it: {last}")
        return addresses[at]


# ---- decoding

_STRING, _BLOCK, _DATA1, _DATA2, _DATA4, _DATA8, _DATA16 = 0x08, 0x09, 0x0B, 0x05, 0x06, 0x07, 0x1E
_STRP, _UDATA, _LINE_STRP = 0x0E, 0x0F, 0x1F
_SIZES = {_DATA1: 1, _DATA2: 2, _DATA4: 4, _DATA8: 8, _DATA16: 16}
_PATH, _DIRECTORY = 1, 2  # DW_LNCT_


class _Damaged(Exception):
    pass


@dataclass
class _Unit:
    """The head of a unit's table, and where its instructions are."""

    at: int
    end: int
    step: int  # minimum_instruction_length
    is_stmt: bool
    line_base: int
    line_range: int
    opcode_base: int
    lengths: bytes
    paths: dict[int, str]  # by number, those of the files that are searched for


class _Search:
    """The rows of files with one of these names, in one file's table, into `rows`."""

    def __init__(self, table: LineTable, names: set[bytes] | None, rows: _Rows, check: Callable[[], None]) -> None:
        """`names`: None: of all files."""
        self._data = table.lines.contents()
        self._strings = table.strings.contents()
        self._starts = [start for start, _ in table.code]
        self._ends = [end for _, end in table.code]
        self._names = names
        self._rows = rows
        self._check = check
        self._read = 0  # bytes of names
        self._count = sum(map(len, rows.values()))

    def run(self) -> None:
        try:
            for unit in self._units():
                if unit.paths:
                    self._run(unit)
        except (_Damaged, IndexError) as error:
            raise Invalid(f"the line table (.debug_line) is damaged: {error}") from None

    # ---- heads

    def _units(self) -> Iterator[_Unit]:
        at = 0
        while at < len(self._data):
            self._check()
            length, width = self._number(at, 4), 4
            at += 4
            if length == 0xFFFFFFFF:
                length, width = self._number(at, 8), 8
                at += 8
            if at + length > len(self._data):
                raise _Damaged("a unit goes beyond its end")
            if length:
                unit = self._unit(at, at + length, width)
                if unit:
                    yield unit
            at += length

    def _unit(self, at: int, end: int, width: int) -> _Unit | None:
        version = self._number(at, 2)
        if not 2 <= version <= 5:
            return None
        at += 2 + (2 if version >= 5 else 0)  # address_size, segment_selector_size
        program = at + width + self._number(at, width)
        at += width
        step = self._number(at, 1)
        at += 2 if version >= 4 else 1  # maximum_operations_per_instruction is 1 on x86
        is_stmt, base, line_range, opcode_base = self._number(at, 4).to_bytes(4, "little")
        lengths = self._data[at + 4 : at + 3 + opcode_base] if opcode_base else b""
        at += 4 + len(lengths)
        if not line_range or not opcode_base or program > end or at > program:
            raise _Damaged("the head of a unit makes no sense")
        files = self._files_5(at, program, width) if version >= 5 else self._files_2(at, program)
        return _Unit(program, end, step, bool(is_stmt), (base ^ 0x80) - 0x80, line_range, opcode_base, lengths, files)

    def _files_2(self, at: int, end: int) -> dict[int, str]:
        """Versions 2 to 4: names one after the other, an empty one after the last."""
        directories = [b""]  # 0 is where it was compiled, which is not here
        while self._data[at]:
            name, at = self._string(self._data, at)
            directories.append(name)
            self._check_count(len(directories))
        at += 1
        files, number = {}, 1
        while self._data[at]:
            name, at = self._string(self._data, at)
            directory, at = self._uleb(at, end)
            _, at = self._uleb(at, end)
            _, at = self._uleb(at, end)
            self._file(files, number, name, directories, directory)
            self._check_count(number)
            number += 1
        return files

    def _check_count(self, count: int) -> None:
        if count > FILES_MOST:
            raise _Damaged(f"a unit has more than {FILES_MOST} files or directories")

    def _files_5(self, at: int, end: int, width: int) -> dict[int, str]:
        directories, at = self._entries(at, end, width)
        entries, _ = self._entries(at, end, width)
        names = [name for name, _ in directories]
        files: dict[int, str] = {}
        for number, (name, directory) in enumerate(entries):
            self._file(files, number, name, names, directory)
        return files

    def _entries(self, at: int, end: int, width: int) -> tuple[list[tuple[bytes, int]], int]:
        """A list of version 5: each entry's path and the number of its directory."""
        kinds = []
        count = self._number(at, 1)
        if count > FIELDS_MOST:
            raise _Damaged(f"a unit's files have {count} fields, more than {FIELDS_MOST}")
        at += 1
        for _ in range(count):
            content, at = self._uleb(at, end)
            form, at = self._uleb(at, end)
            kinds.append((content, form))
        count, at = self._uleb(at, end)
        self._check_count(count)
        entries = []
        for _ in range(count):
            name, directory = b"", 0
            for content, form in kinds:
                value, at = self._value(form, at, end, width, content == _PATH)
                if content == _PATH and isinstance(value, bytes):
                    name = value
                elif content == _DIRECTORY and isinstance(value, int):
                    directory = value
            entries.append((name, directory))
        return entries, at

    def _value(self, form: int, at: int, end: int, width: int, wanted: bool) -> tuple[bytes | int, int]:
        if at >= end:
            raise _Damaged("the head of a unit goes beyond its end")
        if form == _STRING:
            return self._string(self._data, at)
        if form in (_LINE_STRP, _STRP):  # .debug_str is not kept: no compiler has names of files there
            offset = self._number(at, width)
            name = self._string(self._strings, offset)[0] if wanted and form == _LINE_STRP else b""
            return name, at + width
        if form == _UDATA:
            return self._uleb(at, end)
        if form == _BLOCK:
            size, at = self._uleb(at, end)
            return 0, at + size
        if form not in _SIZES:
            raise _Damaged(f"a unit's files have a field of the unknown form {form:#x}")
        return self._number(at, _SIZES[form]), at + _SIZES[form]

    def _file(self, files: dict[int, str], number: int, name: bytes, directories: list[bytes], directory: int) -> None:
        if self._names is not None and name.rpartition(b"/")[2] not in self._names:
            return
        if directory < len(directories):
            compiled_in, folder = directories[0], directories[directory]
            # A build that leaves out where it was done has a relative name for that, too.
            name = posixpath.join(b"" if folder == compiled_in else compiled_in, folder, name)
        files[number] = posixpath.normpath(name.decode(errors="replace"))

    # ---- rows

    def _run(self, unit: _Unit) -> None:
        """The instructions of a table (6.2.5)."""
        data, end, step = self._data, unit.end, unit.step
        line_base, line_range, opcode_base = unit.line_base, unit.line_range, unit.opcode_base
        advance_of_const = (255 - opcode_base) // line_range * step
        address, file, line, is_stmt = 0, 1, 1, unit.is_stmt
        at, look = unit.at, unit.at + _LOOK
        while at < end:
            if at >= look:
                self._check()
                look = at + _LOOK
            opcode = data[at]
            at += 1
            if opcode >= opcode_base:
                by_address, by_line = divmod(opcode - opcode_base, line_range)
                address += by_address * step
                line += line_base + by_line
                if is_stmt and file in unit.paths:
                    self._row(unit.paths[file], line, address)
            elif opcode == 0:  # extended
                length, at = self._uleb(at, end)
                if not length or at + length > end:
                    raise _Damaged("an instruction goes beyond its unit")
                if data[at] == 1:  # DW_LNE_end_sequence
                    self._sequence_ends(address)
                    address, file, line, is_stmt = 0, 1, 1, unit.is_stmt
                elif data[at] == 2:  # DW_LNE_set_address
                    address = int.from_bytes(data[at + 1 : at + min(length, 9)], "little")
                at += length
            elif opcode == 1:  # DW_LNS_copy
                if is_stmt and file in unit.paths:
                    self._row(unit.paths[file], line, address)
            elif opcode == 2:  # DW_LNS_advance_pc
                by, at = self._uleb(at, end)
                address = address + by * step & _MASK
            elif opcode == 3:  # DW_LNS_advance_line
                by, at = self._sleb(at, end)
                line += by
            elif opcode == 4:  # DW_LNS_set_file
                file, at = self._uleb(at, end)
            elif opcode == 6:  # DW_LNS_negate_stmt
                is_stmt = not is_stmt
            elif opcode == 8:  # DW_LNS_const_add_pc
                address += advance_of_const
            elif opcode == 9:  # DW_LNS_fixed_advance_pc
                address += self._number(at, 2)
                at += 2
            else:  # columns, blocks, prologues, and what later versions may have
                for _ in range(unit.lengths[opcode - 1]):
                    _, at = self._uleb(at, end)

    def _row(self, path: str, line: int, address: int) -> None:
        code = bisect_right(self._starts, address) - 1
        if code < 0 or address >= self._ends[code] or not 0 < line <= LINE_MOST:
            return
        lines = self._rows.setdefault(path, {})
        if line not in lines:
            self._count += 1
            if self._count > LINES_MOST:
                raise Invalid(f"the files of that name have more than {LINES_MOST} lines with code")
            lines[line] = address
        elif address < lines[line]:
            lines[line] = address

    def _sequence_ends(self, address: int) -> None:
        """Code ends there, that the last rows are of."""

    # ---- values

    def _number(self, at: int, size: int) -> int:
        if at + size > len(self._data):
            raise _Damaged("it is cut off")
        return int.from_bytes(self._data[at : at + size], "little")

    def _string(self, data: bytes, at: int) -> tuple[bytes, int]:
        stop = data.find(b"\0", at, at + NAME_MOST)
        if stop < 0:
            raise _Damaged("a file's name has no end")
        self._read += stop - at + 1
        if self._read > NAMES_MOST:
            raise _Damaged(f"the names of its files have more than {NAMES_MOST} bytes")
        return data[at:stop], stop + 1

    def _uleb(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        for byte in self._data[at : min(end, at + 10)]:
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & _MASK, at
            shift += 7
        raise _Damaged("a number has no end")

    def _sleb(self, at: int, end: int) -> tuple[int, int]:
        value, after = self._uleb(at, end)
        bits = min(7 * (after - at), 64)
        return (value - (1 << bits) if value >> (bits - 1) & 1 else value), after


class _Places(_Search):
    """The lines of some addresses: a row is of the code up to the next one of its sequence."""

    def __init__(
        self, table: LineTable, addresses: set[int], found: dict[int, str], check: Callable[[], None]
    ) -> None:
        super().__init__(table, None, {}, check)
        self._wanted = sorted(addresses)
        self._found = found
        self._last: tuple[int, str, int] | None = None

    def _row(self, path: str, line: int, address: int) -> None:
        self._sequence_ends(address)
        self._last = address, path, line

    def _sequence_ends(self, address: int) -> None:
        if self._last is None:
            return
        start, path, line = self._last
        self._last = None
        code = bisect_right(self._starts, start) - 1
        if code < 0 or start >= self._ends[code] or not 0 < line <= LINE_MOST:
            return
        for at in range(bisect_left(self._wanted, start), bisect_left(self._wanted, address)):
            self._found[self._wanted[at]] = f"{posixpath.basename(path)}:{line}"
