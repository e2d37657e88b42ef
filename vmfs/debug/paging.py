"""The guest's page tables, read from its RAM: one address, or all that is mapped.

All of the CPU's formats are walked: 32-bit, PAE, 4-level and 5-level. An entry with a reserved bit set maps
nothing, as the CPU faults on it. Nothing is written: accessed and dirty bits stay as they are.

Source: Intel SDM 3A chapter 4, "Paging"; the tables there say which bits are reserved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vmfs.memory.ram import PAGE
from vmfs.words.errors import BadAddress
from vmfs.words.layouts import cpuid_entries
from vmfs.words.modes import CR0_PG, CR4_LA57, CR4_PAE, EFER_LMA
from vmfs.words.registers import REGISTERS

CR4_PSE, CR4_PKE = 1 << 4, 1 << 22
EFER_NXE = 1 << 11

PRESENT, WRITABLE, USER, WRITE_THROUGH, UNCACHED = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
ACCESSED, DIRTY, LARGE, GLOBAL, LARGE_PAT = 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 12
NO_EXECUTE = 1 << 63
ADDRESS = ((1 << 52) - 1) & -PAGE  # of an 8-byte entry
_AVAILABLE = 0x7 << 9 | 0x7F << 52  # to software

TABLES_MOST = 1 << 14  # tables that are looked at: what 32 GiB of 4 KiB pages have
RANGES_MOST = 1 << 17
_LINES_BETWEEN_CHECKS = 1 << 10


class States(Protocol):
    """What of a virtual CPU is used here."""

    def get_state(self, name: str) -> bytes: ...


class Ram(Protocol):
    """Guest-physical RAM: `vmfs.memory.ram.Memory`, or a `MemoryView`."""

    def room(self, address: int) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


class WritableRam(Ram, Protocol):
    def write(self, offset: int, data: bytes) -> int: ...


class Page(NamedTuple):
    """What an address is mapped by. `flags`: the entry's bits, WRITABLE, USER and NO_EXECUTE combined with
    those of the tables above it."""

    physical: int  # of the address itself
    size: int  # of the page
    flags: int


@dataclass(slots=True)
class Range:
    """Pages of one kind that follow each other, in linear and in physical addresses.

    `flags` as in `Page`, without ACCESSED and DIRTY: `every` has the bits that all entries have, `some` those
    that any has.
    """

    start: int
    end: int
    physical: int
    page: int
    flags: int
    every: int
    some: int


@dataclass(frozen=True, slots=True)
class Paging:
    """How a CPU translates, by its registers and its CPUID."""

    cr3: int = 0
    kind: str = "off"  # `off`, `32-bit`, `PAE`, `4-level`, `5-level`
    no_execute: bool = False
    large: bool = True  # 32-bit: CR4.PSE
    huge: bool = True  # 1 GiB pages
    physical_bits: int = 52
    long: bool = False  # IA-32e mode: linear addresses have 64 bits
    amd: bool = False  # bit 8 of a PML4E and a PML5E is reserved (APM 2 5.3), not ignored

    @staticmethod
    def of(cpu: States) -> Paging:
        """That of a CPU between two instructions."""
        sregs = cpu.get_state("sregs")
        cr0, cr3, cr4, efer = (REGISTERS[name].get(sregs) for name in ("cr0", "cr3", "cr4", "efer"))
        long = bool(efer & EFER_LMA)
        if not cr0 & CR0_PG:
            return Paging()
        if long:
            kind = "5-level" if cr4 & CR4_LA57 else "4-level"
        else:
            kind = "PAE" if cr4 & CR4_PAE else "32-bit"
        bits, huge, amd = _cpu_limits(cpu.get_state("cpuid"))
        large = kind != "32-bit" or bool(cr4 & CR4_PSE)
        return Paging(cr3, kind, bool(efer & EFER_NXE), large, huge, bits, long, amd)

    @property
    def linear_bits(self) -> int:
        """Of an address that can be mapped, without its sign extension."""
        return {"4-level": 48, "5-level": 57}.get(self.kind, 32)

    def is_canonical(self, linear: int) -> bool:
        if not self.long:
            return linear < 1 << 32
        top = linear >> (self.linear_bits - 1)
        return top in (0, (1 << (65 - self.linear_bits)) - 1)

    def translate(self, memory: Ram, linear: int) -> Page | None:
        """The page of a linear address, or None where nothing is mapped."""
        if not self.is_canonical(linear):
            return None
        if self.kind == "off":
            return Page(linear, 1 << 32, WRITABLE | USER)
        rights = WRITABLE | USER
        for step in self.walk(memory, linear):
            rights = step.level.rights(rights, step.entry)
            if step.leads == "page":
                size = 1 << step.level.shift
                flags = step.entry & ~(WRITABLE | USER | NO_EXECUTE | ADDRESS) | rights
                return Page(step.level.leaf_base(step.entry) | linear & (size - 1), size, flags)
        return None

    def walk(self, memory: Ram, linear: int) -> Iterator[Step]:
        """The entries that the CPU reads for a canonical linear address, with paging on, from the top down to one that
        ends the walk."""
        table = 0
        for number, level in enumerate(_levels(self)):
            table = table if number else level.base(self.cr3)
            at = table + (linear >> level.shift & (level.entries - 1)) * level.width
            raw = memory.read(at, level.width)
            if len(raw) < level.width:
                yield Step(level, at, 0, "no RAM")
                return
            entry = int.from_bytes(raw, "little")
            leaf = level.is_leaf(entry)
            if not entry & PRESENT:
                leads = "not present"
            elif entry & (level.reserved_leaf if leaf else level.reserved):
                leads = "reserved bits"
            else:
                leads = "page" if leaf else "table"
            yield Step(level, at, entry, leads)
            if leads != "table":
                return
            table = entry & level.next_table


@functools.lru_cache(maxsize=8)
def _cpu_limits(cpuid: bytes) -> tuple[int, bool, bool]:
    """MAXPHYADDR, whether there are 1 GiB pages (SDM 3A 4.1.4), and whether it is a CPU by AMD's manual."""
    bits, huge, amd = 36, False, False
    for function, _, _, eax, ebx, _, edx in cpuid_entries(cpuid):
        if function == 0:
            amd = ebx in _AMD
        elif function == 0x8000_0008:
            bits = eax & 0xFF or bits
        elif function == 0x8000_0001:
            huge = bool(edx & 1 << 26)
    return min(bits, 52), huge, amd


_AMD = tuple(int.from_bytes(start, "little") for start in (b"Auth", b"Hygo"))  # AuthenticAMD, HygonGenuine


# ---- the levels of each format


@dataclass(frozen=True, slots=True)
class _Level:
    """One level of tables. `shift`: where its index lies in a linear address."""

    shift: int
    entries: int
    width: int  # bytes of an entry
    may_be_leaf: bool
    last: bool
    reserved: int  # of an entry that points to a table
    reserved_leaf: int
    next_table: int  # the address bits of an entry that points to a table
    has_rights: bool = True
    base_mask: int = ADDRESS
    extended: bool = False  # 4 MiB pages: bits 13 to 20 are address bits 32 to 39

    def base(self, cr3: int) -> int:
        return cr3 & self.base_mask

    def is_leaf(self, entry: int) -> bool:
        return self.last or bool(self.may_be_leaf and entry & LARGE)

    def leaf_base(self, entry: int) -> int:
        base = entry & ADDRESS & -(1 << self.shift)
        if self.extended:
            return base & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32
        return base

    def rights(self, above: int, entry: int) -> int:
        """WRITABLE and USER where all levels have them, NO_EXECUTE where one has it."""
        if not self.has_rights:
            return above
        return above & entry & (WRITABLE | USER) | (above | entry) & NO_EXECUTE


@functools.lru_cache(maxsize=64)
def _levels(paging: Paging) -> tuple[_Level, ...]:
    """From the table that CR3 names down to the last."""
    if paging.kind == "32-bit":
        low = 0xFFFF_F000
        # Bit 21 and, above MAXPHYADDR, the bits that stand for address bits 32 to 39 (SDM 3A table 4-4).
        beyond = (0xFF << max(paging.physical_bits - 32, 0) & 0xFF) << 13
        directory = _Level(
            22, 1024, 4, paging.large, False, 0, 1 << 21 | beyond, low, base_mask=low, extended=True
        )
        return directory, _Level(12, 1024, 4, True, True, 0, 0, low, base_mask=low)
    high = ADDRESS >> paging.physical_bits << paging.physical_bits
    if paging.kind == "PAE":
        high |= 0x7FF << 52
    if not paging.no_execute:
        high |= NO_EXECUTE
    table = _Level(12, 512, 8, True, True, high, high, ADDRESS)
    directory = _Level(21, 512, 8, True, False, high, high | 0xFF << 13, ADDRESS)
    if paging.kind == "PAE":
        # Four entries, at a multiple of 32, without rights of their own (SDM 3A table 4-8).
        pointers = _Level(
            30,
            4,
            8,
            False,
            False,
            high | NO_EXECUTE | 0x1E6,
            0,
            ADDRESS,
            has_rights=False,
            base_mask=0xFFFF_FFE0,
        )
        return pointers, directory, table
    no_huge = 0 if paging.huge else LARGE
    upper_high = high | GLOBAL if paging.amd else high
    pointers = _Level(30, 512, 8, paging.huge, False, high | no_huge, high | 0x1FFFF << 13, ADDRESS)
    upper = [_Level(39, 512, 8, False, False, upper_high | LARGE, 0, ADDRESS)]
    if paging.kind == "5-level":
        upper.insert(0, _Level(48, 512, 8, False, False, upper_high | LARGE, 0, ADDRESS))
    return (*upper, pointers, directory, table)


class Step(NamedTuple):
    """An entry on the way to a page. `leads`: to a `table` or a `page`, or why it ends there: `not present`, `reserved
    bits`, `no RAM`."""

    level: _Level
    address: int  # of the entry, physical
    entry: int
    leads: str


# ---- all that is mapped


class Ranges(list[Range]):
    """What is mapped, by address. `cut`: there is more, but the tables are larger than any that make sense."""

    cut: str = ""


def mapped_ranges(memory: Ram, paging: Paging) -> Ranges:
    """All that the tables map, in order. At most TABLES_MOST of them are looked at, and RANGES_MOST returned."""
    walk = _Walk(memory, paging)
    if paging.kind != "off":
        walk.table(0, walk.levels[0].base(paging.cr3), 0, WRITABLE | USER)
    return walk.ranges


class _Walk:
    def __init__(self, memory: Ram, paging: Paging) -> None:
        self.memory = memory
        self.levels = _levels(paging)
        self.ranges = Ranges()
        self._left = TABLES_MOST
        self._sign = 1 << (paging.linear_bits - 1) if paging.long else 0
        self._extension = -(1 << paging.linear_bits) & ((1 << 64) - 1)

    def table(self, number: int, address: int, linear: int, rights: int) -> None:
        """The table at physical `address`, at level `number`, which maps from `linear` on."""
        level = self.levels[number]
        raw = self.memory.read(address, level.entries * level.width)
        if not self._left or len(self.ranges) >= RANGES_MOST:
            self.ranges.cut = f"more than {TABLES_MOST} tables or {RANGES_MOST} ranges"
            return
        self._left -= 1
        entries = memoryview(raw[: len(raw) // level.width * level.width]).cast("QI"[level.width == 4])
        if level.last:
            self._last(level, entries, linear, rights)
            return
        step = 1 << level.shift
        for index, entry in enumerate(entries):
            if not entry & PRESENT:
                continue
            start = linear + index * step
            if level.is_leaf(entry):
                if not entry & level.reserved_leaf:
                    keep = entry & ~(ACCESSED | DIRTY)
                    self._add(level, start, 1, keep, level.rights(rights, entry), entry, entry)
            elif not entry & level.reserved:
                self.table(number + 1, entry & level.next_table, start, level.rights(rights, entry))
            if self.ranges.cut:
                return

    def _last(self, level: _Level, entries: memoryview, linear: int, rights: int) -> None:
        """A table of pages: runs of entries that differ in nothing but the address are taken at once."""
        available = _AVAILABLE if level.width == 8 else 0x7 << 9
        ignored = ~(ACCESSED | DIRTY | available & ~level.reserved_leaf)
        expected = -1  # what the next entry is, if the run goes on
        begin = first = every = some = 0
        for index, entry in enumerate(entries):
            kept = entry & ignored
            if kept == expected:
                expected += PAGE
                every &= entry
                some |= entry
                continue
            if expected >= 0:
                self._add_run(level, linear, begin, index, first, rights, every, some)
                expected = -1
            if entry & PRESENT:
                begin, first, expected, every, some = index, kept, kept + PAGE, entry, entry
        if expected >= 0:
            self._add_run(level, linear, begin, len(entries), first, rights, every, some)

    def _add_run(
        self, level: _Level, linear: int, begin: int, end: int, first: int, rights: int, every: int, some: int
    ) -> None:
        if not first & level.reserved_leaf:
            at = linear + begin * PAGE
            self._add(level, at, end - begin, first, level.rights(rights, first), every, some)

    def _add(
        self, level: _Level, linear: int, count: int, entry: int, rights: int, every: int, some: int
    ) -> None:
        """`count` pages of the size of the level, from `linear` on."""
        size = 1 << level.shift
        if linear & self._sign:
            linear |= self._extension
        pat = LARGE if level.last else LARGE_PAT
        flags = entry & (GLOBAL | WRITE_THROUGH | UNCACHED) | rights | (LARGE_PAT if entry & pat else 0)
        physical = level.leaf_base(entry)
        if self.ranges:
            before = self.ranges[-1]
            if (
                before.end == linear
                and before.flags == flags
                and before.page == size
                and before.physical + before.end - before.start == physical
            ):
                before.end += count * size
                before.every &= every
                before.some |= some
                return
        self.ranges.append(Range(linear, linear + count * size, physical, size, flags, every, some))


# ---- reading and writing by linear address


def pieces(memory: Ram, paging: Paging, linear: int, length: int) -> Iterator[tuple[int, int]]:
    """The (physical address, length) that `length` bytes from `linear` on lie at, in RAM, up to the first
    page that is not mapped or not in RAM."""
    while length > 0:
        page = paging.translate(memory, linear)
        if page is None or not (room := memory.room(page.physical)):
            return
        part = min(length, page.size - linear % page.size, room)
        yield page.physical, part
        linear += part
        length -= part


def read_linear(memory: Ram, paging: Paging, linear: int, length: int) -> bytes:
    """Up to `length` bytes; fewer where what follows is not mapped."""
    return b"".join(memory.read(at, part) for at, part in pieces(memory, paging, linear, length))


def write_linear(memory: WritableRam, paging: Paging, linear: int, data: bytes) -> int:
    """How many bytes were written: those up to the first page that is not mapped. Rights are not asked for,
    as a debugger's writes ask for none. BadAddress when there is no byte."""
    done = 0
    for at, part in pieces(memory, paging, linear, len(data)):
        memory.write(at, data[done : done + part])
        done += part
    if data and not done:
        raise BadAddress(f"virt: {linear:#x} is not mapped to RAM")
    return done


Reader = Callable[[int, int], bytes]
"""`read(linear, length)`: up to so many bytes of memory; fewer, or none, where it is not mapped."""


def linear_reader(memory: Ram, paging: Paging) -> Reader:
    """Reads by linear address. Pages are looked up once: for one look at a machine, not for longer."""
    found: dict[int, Page | None] = {}

    def read(linear: int, length: int) -> bytes:
        parts = []
        while length > 0:
            number, offset = divmod(linear, PAGE)
            if number not in found:
                found[number] = paging.translate(memory, number * PAGE)
            page = found[number]
            if page is None or not memory.room(page.physical):
                break
            part = memory.read(page.physical + offset, min(length, PAGE - offset))
            if not part:
                break
            parts.append(part)
            linear += len(part)
            length -= len(part)
        return b"".join(parts)

    return read


# ---- as text


def ranges_text(ranges: Ranges, check: Callable[[], None] = lambda: None) -> str:
    """A line a range: `START-END rwxu SIZE PHYSICAL PAGE [FLAGS]`. `check` is called now and then, and may raise."""
    lines = []
    for at, one in enumerate(ranges):
        if not at % _LINES_BETWEEN_CHECKS:
            check()
        lines.append(_line(one))
    if ranges.cut:
        lines.append(f"# cut off: {ranges.cut}\n")
    return "".join(lines)


_PAGE_NAMES = {1 << 12: "4K", 1 << 21: "2M", 1 << 22: "4M", 1 << 30: "1G"}


def _line(one: Range) -> str:
    flags = one.flags
    rights = "r{}{}{}".format(
        "w" if flags & WRITABLE else "-",
        "-" if flags & NO_EXECUTE else "x",
        "u" if flags & USER else "-",
    )
    words = [
        name
        for name, bit in (("G", GLOBAL), ("PWT", WRITE_THROUGH), ("PCD", UNCACHED), ("PAT", LARGE_PAT))
        if flags & bit
    ]
    for name, bit in (("A", ACCESSED), ("D", DIRTY)):
        if one.every & bit:
            words.append(name)
        elif one.some & bit:
            words.append(name.lower())
    tail = f" {','.join(words)}" if words else ""
    size = (one.end - one.start) >> 10
    return (
        f"{one.start:016x}-{one.end:016x} {rights} {size}K {one.physical:#x} {_PAGE_NAMES[one.page]}{tail}\n"
    )
