"""Symbols: names of addresses, from an ELF file, a System.map, or the text of /proc/kallsyms; and an ELF file's lines.

A table is never changed: a file that is written makes another, and `Vm.symbols` is the one in force.

Sources: System V ABI, "Symbol Table"; nm(1) for the letters of the types; Linux Documentation/admin-guide
for the lines of /proc/kallsyms (`ffffffff81000000 T name [module]`).
"""

from __future__ import annotations

import operator
import os
import re
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any, BinaryIO

from elftools.common.exceptions import ELFError
from elftools.common.utils import struct_parse
from elftools.elf.elffile import ELFFile

from vmfs.debug.linetable import SECTIONS_MOST as LINES_MOST
from vmfs.debug.linetable import Lines, LineTable, Section
from vmfs.words.errors import Invalid, LimitReached
from vmfs.words.numbers import parse_number

MOST = 1 << 20  # symbols of a table; Debian's Linux has some 150,000
FILE_MOST = 2 << 30  # bytes of an ELF file; Linux with its debug information has 0.5 GiB
TEXT_MOST = 256 << 20  # bytes of a System.map
SECTIONS_MOST = 1 << 16  # of an ELF file
NAME_MOST = 1024  # of a name's characters; KSYM_NAME_LEN of Linux is 512
REACH = 256 << 10  # how far after the start of its symbol an address still is said to belong to it

_MAGIC = b"\x7fELF"

NO_LINES = Lines()

Symbol = tuple[int, str, str]  # address, the type's letter, name


class SymbolTable:
    """Names and addresses. `len()` is how many symbols there are.

    Of symbols of one name the first global one counts, else the one at the lowest address. Absolute ones
    (`A`, `a`: sizes, offsets into the per-CPU area of Linux) have an address but name none.
    """

    def __init__(self, symbols: Iterable[Symbol] = (), lines: Lines = NO_LINES, bits: int = 64) -> None:
        self.lines = lines
        self.bits = bits  # of the ELF file that they are of
        ordered = sorted(symbols, key=lambda symbol: symbol[0])
        self._symbols = ordered
        places = [symbol for symbol in ordered if symbol[1] not in "Aa"]
        self._places = places
        self._addresses = array("Q", [symbol[0] for symbol in places])
        # The last write wins: so local ones from the highest down, then global ones.
        self._by_name = {name: address for address, _, name in reversed(ordered)}
        self._by_name.update(
            (name, address) for address, letter, name in reversed(ordered) if letter.isupper()
        )

    def __len__(self) -> int:
        return len(self._symbols)

    def __iter__(self) -> Iterator[Symbol]:
        """By address."""
        return iter(self._symbols)

    def address_of(self, name: str) -> int | None:
        """The linear address of `name`, a symbol or FILE:LINE, or None. Invalid for a line that is not known."""
        address = self._by_name.get(name)
        return self.lines.address_of(name) if address is None and ":" in name else address

    def name_of(self, address: int) -> tuple[str, int] | None:
        """The symbol that `address` belongs to, and how many bytes after its start: the last one that does
        not begin after it, if that is near (REACH). Of several at one place a global function comes first.
        """
        end = bisect_right(self._addresses, address)
        if not end:
            return None
        start = self._addresses[end - 1]
        if address - start >= REACH:
            return None
        first = bisect_left(self._addresses, start, 0, end)
        best = min(self._places[first : min(end, first + 64)], key=_rank)
        return best[2], address - start

    def label(self, address: int) -> str:
        """`name+0x10`, `name`, or nothing."""
        found = self.name_of(address)
        if found is None:
            return ""
        name, offset = found
        return f"{name}+{offset:#x}" if offset else name

    def resolve(self, text: str, *, what: str = "ADDR") -> int:
        """The address that `text` is: a number, a symbol, FILE:LINE, or one of these and a number (`name+0x10`).

        Invalid, naming `what`, where it is none of these.
        """
        if (text[:1].isdigit() or text[:1] == "-") and ":" not in text:
            return parse_number(text, what=what)
        address = self.address_of(text)
        if address is not None:
            return address
        match = re.fullmatch(r"(.+)([+-])([0-9]\w*)", text)
        address = self.address_of(match[1]) if match else None
        if match is None or address is None:
            name = (match[1] if match else text)[:80]
            reason = (
                f"no symbol {name!r}" if len(self) else f"{name!r} is no number, and there are no symbols"
            )
            raise Invalid(f"{what}: {reason}")
        offset = parse_number(match[3], what=what)
        return (address + (offset if match[2] == "+" else -offset)) & ((1 << 64) - 1)

    def merged(self, other: SymbolTable) -> SymbolTable:
        """The symbols of both."""
        if not len(self) or not len(other):
            return self if len(self) else other
        if len(self) + len(other) > MOST:
            raise LimitReached(f"together there were more than {MOST} symbols")
        mine = set(self._symbols)
        symbols = (*self._symbols, *(one for one in other._symbols if one not in mine))
        return SymbolTable(symbols, self.lines.merged(other.lines), self.bits)

    def text(self) -> str:
        """A line a symbol, by address: `ffffffff81000000 T _stext`."""
        return "".join([f"{address:016x} {letter} {name}\n" for address, letter, name in self._symbols])


def _rank(symbol: Symbol) -> int:
    """Functions before the rest, global ones first."""
    return {"T": 0, "t": 1, "W": 2, "w": 3}.get(symbol[1], 4)


def parse(data: bytes) -> SymbolTable:
    """The symbols of an ELF file's contents or a System.map's text."""
    return parse_elf(BytesIO(data)) if data[:4] == _MAGIC else parse_map(data)


def parse_file(fd: int) -> SymbolTable:
    """The same of an open file, of which only what is needed is read."""
    if os.pread(fd, 4, 0) == _MAGIC:
        with open(os.dup(fd), "rb") as file:
            return parse_elf(file)
    return parse_map(os.pread(fd, TEXT_MOST + 1, 0))


# ---- System.map, /proc/kallsyms, nm

# An undefined symbol, as nm shows it, has no address and is passed over.
_LINE = re.compile(
    rb"^(?:([0-9a-fA-F]{1,16})|[ ]{8,16}) ([A-Za-z?]) (\S+)(?:[ \t]+\[\S+\])?[ \t\r]*$", re.MULTILINE
)


def parse_map(data: bytes) -> SymbolTable:
    """The symbols of `ADDRESS TYPE NAME` lines, hexadecimal without 0x. Empty lines are none."""
    if len(data) > TEXT_MOST:
        raise Invalid(f"it is no ELF file, and longer than the {TEXT_MOST} bytes that a System.map may have")
    if not data.isascii():
        raise Invalid("it is no ELF file, and there are bytes in it that no System.map has")
    matches = _LINE.findall(data)
    if len(matches) != sum(1 for line in data.split(b"\n") if line.strip()):
        _complain_of_line(data)
    if len(matches) > MOST:
        raise Invalid(f"{len(matches)} symbols are more than {MOST}")
    symbols = [
        (int(address, 16), letter.decode(), name.decode())
        for address, letter, name in matches
        if address and len(name) <= NAME_MOST
    ]
    if not symbols:
        raise Invalid("there is no symbol in it")
    if len(symbols) > 1 and not any(address for address, _, _ in symbols):
        raise Invalid("every address is 0: /proc/kallsyms shows them to root only (kptr_restrict)")
    return SymbolTable(symbols)


def _complain_of_line(data: bytes) -> None:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip() and not _LINE.fullmatch(line):
            raise Invalid(f"line {number}: {line[:100].decode()!r} is not `ADDRESS TYPE NAME`")
    raise Invalid("it is not lines of `ADDRESS TYPE NAME`")


# ---- ELF

_MACHINES = ("EM_386", "EM_X86_64")
_SHN_UNDEF, _SHN_ABS, _SHN_XINDEX = 0, 0xFFF1, 0xFFFF
_NO_SYMBOLS = (3, 4, 6)  # STT_SECTION, STT_FILE, STT_TLS: they name no address
_STB_LOCAL, _STB_WEAK = 0, 2
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR, _SHF_COMPRESSED = 1, 2, 4, 0x800
_LINES, _STRINGS = b".debug_line\0", b".debug_line_str\0"


def parse_elf(file: BinaryIO) -> SymbolTable:
    """The symbols of an ELF file for x86: its .symtab, or where that was stripped its .dynsym."""
    # pyelftools reads the headers; the entries are unpacked here, for it takes some 20 us for each of them.
    try:
        return _parse_elf(file)
    except Invalid:
        raise
    except (ELFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        # What pyelftools raises for headers that point nowhere is not of one class.
        raise Invalid(f"the ELF file is damaged: {error}") from None


def _parse_elf(file: BinaryIO) -> SymbolTable:
    size = file.seek(0, 2)
    file.seek(0)
    elf = ELFFile(file)
    header = elf.header
    if header["e_machine"] not in _MACHINES or not elf.little_endian:
        raise Invalid("the ELF file is not for x86")
    if header["e_type"] == "ET_REL":
        raise Invalid("the ELF file is relocatable: it is not linked, and its symbols have no addresses")
    if not header["e_shoff"]:
        raise Invalid("the ELF file has no sections")
    step, count = header["e_shentsize"], elf.num_sections()
    if step != elf.structs.Elf_Shdr.sizeof() or count > SECTIONS_MOST:
        raise Invalid(f"the ELF file is damaged: {count} section headers of {step} bytes")
    if header["e_shoff"] + count * step > size:
        raise Invalid("the ELF file is cut off: its section headers are past its end")
    # Headers only: making pyelftools' sections reads what is in them, however long that says it is.
    first = header["e_shoff"]
    headers = [struct_parse(elf.structs.Elf_Shdr, file, first + step * number) for number in range(count)]
    for wanted in ("SHT_SYMTAB", "SHT_DYNSYM"):
        for section in headers:
            if section["sh_type"] == wanted and section["sh_size"]:
                strings = headers[section["sh_link"]]
                entries, names = (_contents(file, size, one) for one in (section, strings))
                letters = [_letter(one) for one in headers]
                # Of Linux up to 6.14, linked at 0: offsets into each CPU's copy.
                titles = _contents(file, size, headers[elf.get_shstrndx()])
                sections: dict[bytes, dict[str, int]] = {}
                for number, one in enumerate(headers):
                    if titles.startswith(b".data..percpu\0", one["sh_name"]) and not one["sh_addr"]:
                        letters[number] = "A"
                    for name in (_LINES, _STRINGS):
                        if titles.startswith(name, one["sh_name"]):
                            sections[name] = one
                lines = _elf_lines(file, size, headers, sections, elf.elfclass) if _LINES in sections else NO_LINES
                return SymbolTable(_elf_symbols(entries, names, letters, elf.elfclass), lines, elf.elfclass)
    raise Invalid("the ELF file has no symbols: it was stripped")


def _contents(file: BinaryIO, size: int, section: dict[str, int]) -> bytes:
    if section["sh_offset"] + section["sh_size"] > size:
        raise Invalid("the ELF file is cut off: a section is past its end")
    file.seek(section["sh_offset"])
    return file.read(section["sh_size"])


def _elf_lines(
    file: BinaryIO, size: int, headers: list[dict[str, Any]], sections: dict[bytes, dict[str, int]], bits: int
) -> Lines:
    """The line table, not decoded. Symbols are taken also where it is of no use."""
    try:
        if sum(section["sh_size"] for section in sections.values()) > LINES_MOST:
            raise Invalid(f"it has more than {LINES_MOST} bytes")
        kept = {name: _section(one, _contents(file, size, one), bits) for name, one in sections.items()}
        wanted = _SHF_ALLOC | _SHF_EXECINSTR
        code = sorted(
            (one["sh_addr"], one["sh_addr"] + one["sh_size"]) for one in headers if one["sh_flags"] & wanted == wanted
        )
        return Lines((LineTable(kept[_LINES], kept.get(_STRINGS, Section()), tuple(code)),))
    except (Invalid, LimitReached) as error:
        return Lines(missing=f"the line table (.debug_line) was not taken: {error}")


def _section(section: dict[str, int], data: bytes, bits: int) -> Section:
    if not section["sh_flags"] & _SHF_COMPRESSED:
        return Section(data, len(data))
    header = struct.Struct("<IxxxxQ8x" if bits == 64 else "<II4x")  # ch_type, ch_size
    if len(data) < header.size:
        raise Invalid("it is cut off")
    kind, whole = header.unpack_from(data)
    if kind != 1:  # ELFCOMPRESS_ZLIB
        raise Invalid(f"it is compressed in way {kind} and not by zlib")
    return Section(data[header.size :], whole, True)


def _elf_symbols(entries: bytes, names: bytes, section_letters: list[str], bits: int) -> list[Symbol]:
    if bits == 64:  # Elf64_Sym: name, info, other, shndx, value, size
        entry, order = struct.Struct("<IBxHQ8x"), (0, 1, 2, 3)
    else:  # Elf32_Sym: name, value, size, info, other, shndx
        entry, order = struct.Struct("<II4xBxH"), (0, 2, 3, 1)
    count = len(entries) // entry.size
    if count > MOST:
        raise Invalid(f"{count} symbols are more than {MOST}")
    letters = dict(enumerate(section_letters))
    letters[_SHN_ABS] = "A"
    letters[_SHN_XINDEX] = "N"  # its section's number is in another table
    find, pick = names.find, operator.itemgetter(*order)
    symbols = []
    for at, info, section, value in map(pick, entry.iter_unpack(memoryview(entries)[: count * entry.size])):
        letter = letters.get(section)
        if letter is None or section == _SHN_UNDEF or info & 0xF in _NO_SYMBOLS:
            continue
        end = find(b"\0", at, at + NAME_MOST + 1)
        if end <= at:
            continue
        name = names[at:end].decode("ascii", "backslashreplace")
        if not name.isprintable() or " " in name:
            continue
        binding = info >> 4
        if binding == _STB_WEAK:
            letter = "W"
        elif binding == _STB_LOCAL:
            letter = letter.lower()
        symbols.append((value, letter, name))
    return symbols


def _letter(section: dict[str, Any]) -> str:
    """The type of a section's global symbols as nm(1) shows it."""
    if section["sh_type"] == "SHT_NULL":
        return "N"
    flags = section["sh_flags"]
    if flags & _SHF_EXECINSTR:
        return "T"
    if not flags & _SHF_ALLOC:
        return "N"
    if not flags & _SHF_WRITE:
        return "R"
    return "B" if section["sh_type"] == "SHT_NOBITS" else "D"
