"""The symbols that a Linux guest carries in its memory: kallsyms, found from nothing but RAM.

scripts/kallsyms.c writes the tables into .rodata of the kernel: names, compressed with 256 tokens, and
addresses. Versions differ in their order and in how addresses are encoded:

    up to 6.3   offsets, relative_base, num_syms, names, markers, [seqs_of_names,] token_table, token_index
    since 6.4   num_syms, names, markers, token_table, token_index, offsets, [relative_base,] [seqs_of_names]

What all have is a token table whose tokens for `0` to `9` follow each other, and after it an index of 256
offsets that agrees with it: that is what RAM is searched for. The rest is found from there, and everything is
checked: a guest may hold anything. KASLR needs no care, for the kernel relocates its tables.

Symbols of modules are in each module's own table, with names that are not compressed. The list of modules
leads there, through structs whose offsets differ with the configuration: so each pointer of a `struct module` is tried
for what it points to.

Not found: 32-bit kernels, kernels built without CONFIG_KALLSYMS, and modules while page table isolation
hides them (in user mode).

Facts: Linux scripts/kallsyms.c and kernel/kallsyms.c of 6.1, 6.4 (404bad70fcf7) and 7.0 (a081b5789255).
"""

from __future__ import annotations

import operator
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice, pairwise

from vmfs.debug.paging import Paging, Ram, Reader, linear_reader, mapped_ranges
from vmfs.debug.symbols import MOST, NAME_MOST, Symbol, SymbolTable
from vmfs.memory.ram import PAGE, MemoryView
from vmfs.words.errors import Invalid

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_CHUNK = 1 << 20
_TOKENS = 256
_TOKENS_MOST = 16 << 10  # bytes of the token table; 16 bits index it, and some 1,000 are usual
_NAMES_MOST = 32 << 20  # bytes from num_syms to the token table; some 3 MiB are usual
_LEAST = 256  # symbols; a kernel has more than 10,000
_MARKED = 256  # a marker for each so many names
_TYPES = frozenset(bytes([letter]) for letter in b"aAbBcCdDgGiInNpPrRsStTuUvVwW?-")
_ZERO = ord("0")
_KERNEL = 0xFFFF_FFFF_8000_0000  # where the kernel's image is mapped (Documentation/arch/x86/x86_64/mm.rst)
_IMAGE_MOST = 1 << 30
_CANDIDATES_MOST = 16
_LOOKS_MOST = 1 << 15  # at 256 names, for each candidate: what a hostile guest can make them take is seconds


def find(memory: MemoryView, paging: Paging) -> SymbolTable:
    """The symbols of the Linux that runs in `memory`. Invalid where there is none.

    A kernel's file in the page cache and what a boot loader left in RAM have such tables, too. The page tables
    tell which are in force: those whose `_text` is mapped to just before them, or, where page table isolation
    hides that, some of whose image is. A kernel that is not mapped so, though paging is on, has not yet
    relocated itself: its addresses are none. With paging off it is the one that ran before.
    """
    is_there, unmapped = False, None
    for tables in _candidates(memory):
        symbols = _symbols(memory, paging, tables)
        if symbols is None:
            continue
        is_there = True
        text = symbols.address_of("_text") or symbols.address_of("_stext")
        page = paging.translate(memory, text) if text is not None else None
        if page and 0 <= tables.tokens - page.physical < _IMAGE_MOST:
            return symbols.merged(SymbolTable(_of_modules(linear_reader(memory, paging), symbols)))
        if unmapped is None and (paging.kind == "off" or text and _is_partly_mapped(memory, paging, tables, text)):
            unmapped = symbols
    if unmapped is not None:
        return unmapped
    if is_there:
        raise Invalid("the Linux in RAM does not run at its addresses yet: the page tables do not map it there")
    raise Invalid("no kallsyms tables in RAM: no Linux for x86-64 has begun to run, or it has none")


def _is_partly_mapped(memory: Ram, paging: Paging, tables: _Tables, text: int) -> bool:
    """Whether pages of the image that begins at `text` are mapped, and as far from it as its tables are."""
    return any(
        text <= one.start < text + _IMAGE_MOST and 0 <= tables.tokens + one.start - one.physical - text < _IMAGE_MOST
        for one in mapped_ranges(memory, paging)
    )


class _Tables:
    """Physical addresses: of the token table, and of what follows its index."""

    def __init__(self, tokens: int, words: list[bytes], end: int) -> None:
        self.tokens = tokens
        self.words = words
        self.end = end


def _candidates(memory: MemoryView) -> Iterator[_Tables]:
    found = 0
    for place in _places(memory):
        tables = _token_table(memory, place)
        if tables is not None:
            yield tables
            found += 1
            if found == _CANDIDATES_MOST:
                return


def _places(memory: MemoryView) -> Iterator[int]:
    """Where the digits are."""
    for start, end in memory.extents():
        for at in range(start, end, _CHUNK):
            chunk = memory.read(at, min(_CHUNK, end - at) + len(_DIGITS) - 1)
            place = -1
            while (place := chunk.find(_DIGITS, place + 1)) >= 0:
                yield at + place


def _token_table(memory: Ram, digits: int) -> _Tables | None:
    """The token table that has its digits there, if its index agrees."""
    ahead = memory.read(digits, _TOKENS_MOST)
    length = 0  # of the tokens from `0` on
    for _ in range(_ZERO, _TOKENS):
        length = ahead.find(b"\0", length) + 1
        if not length:
            return None
    index = digits + length + -(digits + length) % 8
    offsets = memory.read(index, 2 * _TOKENS)
    if len(offsets) < 2 * _TOKENS:
        return None
    (before,) = struct.unpack_from("<H", offsets, 2 * _ZERO)
    start = digits - before
    if start < 0 or start % 8:
        return None
    words = memory.read(start, before + length)[:-1].split(b"\0")
    ends = accumulate(len(word) + 1 for word in words)
    if len(words) != _TOKENS or offsets != struct.pack(f"<{_TOKENS}H", 0, *islice(ends, _TOKENS - 1)):
        return None
    return _Tables(start, words, index + len(offsets))


# ---- names


def _symbols(memory: Ram, paging: Paging, tables: _Tables) -> SymbolTable | None:
    for number, names, count in _counts(memory, tables):
        symbols = _expanded(names, count, tables.words)
        if symbols is None:
            continue
        anchor = next((at for at, (_, name) in enumerate(symbols) if name in ("_text", "_stext")), -1)
        addresses = _addresses(memory, paging, tables, number, count, anchor)
        if addresses is not None:
            # Below the kernel's image are offsets into the per-CPU area; since 6.2 their type does not tell.
            return SymbolTable(
                (address, letter if address >= _KERNEL else "A", name)
                for address, (letter, name) in zip(addresses, symbols, strict=True)
            )
    return None


def _counts(memory: Ram, tables: _Tables) -> Iterator[tuple[int, memoryview, int]]:
    """Where kallsyms_num_syms may be, the names after it, and what it is.

    It is one of the numbers before the token table that are aligned and followed by zero, and that as many
    names follow.
    """
    start = max(tables.tokens - _NAMES_MOST, 0) & ~7
    before = memoryview(memory.read(start, tables.tokens - start))
    numbers = before[: len(before) & ~7].cast("Q")
    looks = _LOOKS_MOST
    for place in range(len(numbers) - 1, -1, -1):
        if not _LEAST <= numbers[place] <= MOST:
            continue
        names, count = before[8 * place + 8 :], numbers[place]
        looks -= 1
        if count * 2 < len(names) and _names_end(names, min(count, _LEAST), tables.words):
            looks -= count // _LEAST
            end = _names_end(names, count, tables.words)
            if end and _has_markers(names, end, count):
                yield start + 8 * place, names, count
        if looks < 0:
            return


def _names_end(names: memoryview, count: int, words: list[bytes]) -> int:
    """Where `count` names end, or 0 where they cannot be names."""
    at = 0
    size = len(names)
    for _ in range(count):
        if at + 2 >= size:
            return 0
        length = names[at]
        at += 1
        if length & 0x80:  # since 6.1: seven bits, and above them those of another byte
            length = length & 0x7F | names[at] << 7
            at += 1
        if not length or length > NAME_MOST or words[names[at] if at < size else 0][:1] not in _TYPES:
            return 0
        at += length
    return at if at <= size else 0


def _has_markers(names: memoryview, end: int, count: int) -> bool:
    """Whether markers follow the names: the offset of every 256th name."""
    marked = -(-count // _MARKED)
    at = -(-end // 8) * 8
    raw = bytes(names[at : at + 4 * marked])
    if len(raw) < 4 * marked:
        return False
    markers = struct.unpack(f"<{marked}I", raw)
    return markers[0] == 0 and markers[-1] < end and all(one < other for one, other in pairwise(markers))


def _expanded(names: memoryview, count: int, words: list[bytes]) -> list[tuple[str, str]] | None:
    """(type, name) of each symbol."""
    symbols = []
    data, at = bytes(names), 0
    for _ in range(count):
        length = data[at]
        at += 1
        if length & 0x80:
            length = length & 0x7F | data[at] << 7
            at += 1
        name = b"".join([words[token] for token in data[at : at + length]])
        at += length
        if not 2 <= len(name) <= NAME_MOST or not name.isascii():
            return None
        text = name.decode()
        if not text.isprintable() or " " in text:
            return None
        symbols.append((text[0], text[1:]))
    return symbols


# ---- addresses


def _addresses(
    memory: Ram, paging: Paging, tables: _Tables, number: int, count: int, anchor: int
) -> list[int] | None:
    """The address of each symbol: of the encodings that there were, the first by which they are plausible.

    They ascend, most of them are the kernel's, and that of symbol `anchor` (_text or _stext) begins a page.
    """
    room = -(-4 * count // 8) * 8
    before = number - 8 - room
    after = -(-tables.end // 8) * 8
    encodings: tuple[Callable[[], Iterable[int]], ...] = (
        # CONFIG_KALLSYMS_ABSOLUTE_PERCPU: absolute ones are positive, the others negative.
        lambda: _absolute_percpu(_offsets(memory, before, count), _word(memory, number - 8)),
        lambda: _base_relative(_offsets(memory, before, count), _word(memory, number - 8)),
        lambda: array("Q", memory.read(max(number - 8 * count, 0), 8 * count)),
        lambda: _absolute_percpu(_offsets(memory, after, count), _word(memory, after + room)),
        lambda: _base_relative(_offsets(memory, after, count), _word(memory, after + room)),
        lambda: _relative_to_its_place(_offsets(memory, after, count), _linear(memory, paging, after)),
    )
    for encoding in encodings:
        addresses = list(encoding())
        if (
            len(addresses) == count
            and not any(map(operator.gt, addresses, islice(addresses, 1, None)))
            and addresses[0] >= 0
            and addresses[-1] < 1 << 64
            and addresses[count // 2] >= _KERNEL
            and (anchor < 0 or addresses[anchor] % PAGE == 0)
        ):
            return addresses
    return None


def _word(memory: Ram, address: int) -> int:
    return int.from_bytes(memory.read(max(address, 0), 8), "little")


def _offsets(memory: Ram, address: int, count: int) -> array[int]:
    raw = memory.read(max(address, 0), 4 * count)
    return array("i", raw if len(raw) == 4 * count else b"")


def _absolute_percpu(offsets: array[int], base: int) -> Iterable[int]:
    """4.6 to 6.14."""
    return [one if one >= 0 else base - 1 - one for one in offsets]


def _base_relative(offsets: array[int], base: int) -> Iterable[int]:
    """6.15 to 6.19, and kernels without per-CPU areas before."""
    return [base + (one & 0xFFFF_FFFF) for one in offsets]


def _relative_to_its_place(offsets: array[int], place: int) -> Iterable[int]:
    """Since 7.0."""
    return [place + 4 * index + offset for index, offset in enumerate(offsets)] if place else []


def _linear(memory: Ram, paging: Paging, physical: int) -> int:
    """Where the kernel's image has a byte, or 0."""
    for one in mapped_ranges(memory, paging):
        if one.start >= _KERNEL and one.physical <= physical < one.physical + one.end - one.start:
            return one.start + physical - one.physical
    return 0


# ---- modules

_MODULES_MOST = 1024
_MODULE_SYMBOLS_MOST = 1 << 18
_STRINGS_MOST = 4 << 20  # bytes of a module's names
_MODULE = 2048  # bytes of a struct module that are looked through
_LIST = 8  # offset of `list` in it, after `state`
_SYM = struct.Struct("<IBBHQQ")  # Elf64_Sym


def _of_modules(read: Reader, symbols: SymbolTable) -> list[Symbol]:
    """The symbols of all modules that are loaded (struct module, include/linux/module.h)."""
    head = symbols.address_of("modules")
    found: list[Symbol] = []
    seen = {head}
    left = _MODULE_SYMBOLS_MOST  # to be looked at
    at = _pointer(read, head) if head else 0
    while at and at not in seen and len(seen) <= _MODULES_MOST and left > 0:
        seen.add(at)
        for table in _tables_of_module(read, at - _LIST):
            left -= table[1]
            if left > 0 and (those := _module_symbols(read, *table)):
                found += those
                break
        at = _pointer(read, at)
    return found


def _pointer(read: Reader, address: int) -> int:
    return int.from_bytes(read(address, 8), "little")


def _tables_of_module(read: Reader, module: int) -> Iterator[tuple[int, int, int, int]]:
    """What may be its `struct mod_kallsyms`: symtab, num_symtab, strtab, typetab."""
    raw = read(module, _MODULE)
    for (candidate,) in struct.iter_unpack("<Q", raw[: len(raw) & ~7]):
        if candidate % 8 or not candidate >> 63:
            continue
        table = read(candidate, 32)
        if len(table) < 32:
            continue
        symtab, count, strtab, typetab = struct.unpack("<QI4xQQ", table)
        # The first of an ELF file's symbols and strings is empty.
        if count < 2 or read(symtab, _SYM.size) != bytes(_SYM.size) or read(strtab, 1) != b"\0":
            continue
        yield symtab, count, strtab, typetab


def _module_symbols(read: Reader, symtab: int, count: int, strtab: int, typetab: int) -> list[Symbol]:
    entries, types = read(symtab, count * _SYM.size), read(typetab, count)
    if len(entries) < count * _SYM.size or len(types) < count:
        return []
    fields = list(_SYM.iter_unpack(entries))
    strings = read(strtab, min(max(at for at, *_ in fields) + NAME_MOST, _STRINGS_MOST))
    found = []
    for (at, _, _, _, value, _), letter in zip(fields, types, strict=True):
        end = strings.find(b"\0", at, at + NAME_MOST)
        if end <= at or bytes([letter]) not in _TYPES or value < _KERNEL:
            continue
        name = strings[at:end].decode("ascii", "backslashreplace")
        if name.isprintable() and " " not in name:
            found.append((value, chr(letter), name))
    return found
