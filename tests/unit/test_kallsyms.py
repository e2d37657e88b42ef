"""kallsyms in RAM: the layouts of all versions, built here as scripts/kallsyms.c lays them out, and hostile ones."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.debug import kallsyms
from vmfs.debug.paging import Paging
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid

TEXT = 0xFFFF_FFFF_8140_0000  # _text, where KASLR has put it
IMAGE = 0x40_0000  # its physical address
TABLES = 0xA0_0000  # of kallsyms, physical
PAGE_TABLES = 0x1000
SIZE = 32 << 20

LAYOUTS = ("4.19", "6.1", "6.2", "6.4", "6.15", "7.0", "absolute")


@lru_cache
def make_symbols(count: int = 1500) -> tuple[tuple[int, str, str], ...]:
    rng = random.Random(count)
    found = [(0, "A", "fixed_percpu_data"), (0x1000, "A", "cpu_tss_rw"), (TEXT, "T", "_text")]
    address = TEXT
    for number in range(count):
        address += rng.randrange(0, 0x400, 16)
        found.append((address, rng.choice("tTdDbBrRwW"), f"symbol_{number}.{rng.choice('abc')}"))
    found.append((address + 16, "t", "long_" + "x" * 250))  # its length takes two bytes, since 6.1
    return tuple(found)


def tokens() -> list[bytes]:
    """256 of them: those of characters that names have stand for themselves."""
    words = [b"%c" % code if 0x20 < code < 0x7F else b"" for code in range(256)]
    spare = iter((b"symbol_", b"sym", b"per", b"long", b"_data"))
    return [word or next(spare, b"unused%d" % code) for code, word in enumerate(words)]


LONG = [word for word in tokens() if word.startswith((b"sy", b"pe", b"lo", b"_d"))]  # what names have of them


def compress(name: bytes, words: list[bytes]) -> bytes:
    """The longer words stand for themselves where they occur, and characters for the rest."""
    for word in LONG:
        if word in name:
            before, _, after = name.partition(word)
            return compress(before, words) + bytes([words.index(word)]) + compress(after, words)
    return name


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


@lru_cache
def build(layout: str, symbols: tuple[tuple[int, str, str], ...], place: int, text: int = TEXT) -> bytes:
    """The tables, to stand at physical `place`."""
    words = tokens()
    names, markers = b"", []
    for number, (_, letter, name) in enumerate(symbols):
        if number % 256 == 0:
            markers.append(len(names))
        code = compress(f"{letter}{name}".encode(), words)
        names += bytes([len(code)]) if len(code) < 0x80 else bytes([len(code) & 0x7F | 0x80, len(code) >> 7])
        names += code
    offsets_of_words, offset = [], 0
    for word in words:
        offsets_of_words.append(offset)
        offset += len(word) + 1
    number = padded(struct.pack("<I", len(symbols)))
    names_part = padded(names) + padded(struct.pack(f"<{len(markers)}I", *markers))
    token_part = padded(b"".join(word + b"\0" for word in words)) + struct.pack("<256H", *offsets_of_words)
    seqs = padded(b"".join(index.to_bytes(3, "big") for index in range(len(symbols))))
    base = struct.pack("<Q", text)

    def percpu() -> bytes:
        return padded(
            b"".join(struct.pack("<i", one if one < 1 << 31 else text - 1 - one) for one, _, _ in symbols)
        )

    if layout == "absolute":
        return b"".join(struct.pack("<Q", one) for one, _, _ in symbols) + number + names_part + token_part
    if layout in ("4.19", "6.1", "6.2"):
        middle = seqs if layout == "6.2" else b""
        return percpu() + base + number + names_part + middle + token_part
    before = number + names_part + token_part
    if layout == "6.4":
        return before + percpu() + base + seqs
    if layout == "6.15":
        return before + padded(b"".join(struct.pack("<I", one - text) for one, _, _ in symbols)) + base + seqs
    here = text + place - IMAGE + len(before)
    relative = (one - here - 4 * index for index, (one, _, _) in enumerate(symbols))
    return before + padded(b"".join(struct.pack("<i", one) for one in relative)) + seqs


def symbols_of(layout: str) -> tuple[tuple[int, str, str], ...]:
    """Per-CPU symbols are ordinary ones since 6.15; names are not longer than 127 tokens before 6.1."""
    found = make_symbols()
    if layout in ("6.15", "7.0"):
        found = tuple(one for one in found if one[0] >= TEXT)
    return found[:-1] if layout == "4.19" else found


@pytest.fixture
def memory() -> Iterator[Memory]:
    """RAM with the image mapped at TEXT by 2 MiB pages."""
    one = Memory(SIZE)
    for at, entry in (
        (PAGE_TABLES + 8 * 511, PAGE_TABLES + 0x1000 | 3),
        (PAGE_TABLES + 0x1000 + 8 * 510, PAGE_TABLES + 0x2000 | 3),
    ):
        one.write(at, struct.pack("<Q", entry))
    for index in range(8):
        entry = IMAGE + (index << 21) | 0x83
        one.write(PAGE_TABLES + 0x2000 + 8 * ((TEXT >> 21 & 511) + index), struct.pack("<Q", entry))
    yield one
    one.close()


PAGING = Paging(PAGE_TABLES, "4-level", long=True)


def found_in(memory: Memory, paging: Paging = PAGING) -> list[str]:
    with memory.view() as ram:
        return kallsyms.find(ram, paging).text().splitlines()


def lines(symbols: tuple[tuple[int, str, str], ...]) -> list[str]:
    return [f"{address:016x} {letter} {name}" for address, letter, name in symbols]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(memory, layout):
    symbols = symbols_of(layout)
    memory.write(TABLES, build(layout, symbols, TABLES))
    assert found_in(memory) == lines(symbols)


def test_the_tables_that_are_mapped_win(memory):
    """A kernel's file in the page cache is not relocated."""
    symbols = symbols_of("6.1")
    memory.write(0x20_0000, build("6.1", symbols, 0x20_0000, text=0xFFFF_FFFF_8100_0000))
    memory.write(TABLES, build("6.1", symbols, TABLES))
    assert found_in(memory) == lines(symbols)


def test_tables_that_nothing_maps_are_better_than_none(memory):
    """Of a kernel whose CPU was reset."""
    symbols = symbols_of("6.1")
    memory.write(TABLES, build("6.1", symbols, TABLES))
    assert found_in(memory, Paging()) == lines(symbols)


def test_a_kernel_that_page_table_isolation_hides(memory):
    """In user mode only its entry is mapped, as far from `_text` as it always is."""
    symbols = symbols_of("6.1")
    memory.write(TABLES, build("6.1", symbols, TABLES))
    directory = PAGE_TABLES + 0x2000 + 8 * (TEXT >> 21 & 511)
    memory.write(directory, bytes(16))  # nothing of `_text` on
    assert found_in(memory) == lines(symbols)


def test_a_kernel_that_is_not_relocated_yet_has_no_addresses(memory):
    """Decompressed, in the page tables of its decompressor, which KASLR will have move it."""
    symbols = symbols_of("6.1")
    memory.write(TABLES, build("6.1", symbols, TABLES))
    tables = PAGE_TABLES + 0x4000
    for at, entry in ((tables, tables + 0x1000 | 3), (tables + 0x1000, 0x83)):
        memory.write(at, struct.pack("<Q", entry))  # the first GiB to itself
    with pytest.raises(Invalid, match="does not run at its addresses yet"):
        found_in(memory, Paging(tables, "4-level", long=True))
    # Nor where what is mapped there lies after the tables.
    memory.write(PAGE_TABLES + 0x2000 + 8 * (TEXT >> 21 & 511), struct.pack("<Q", 0x100_0083) + bytes(8 * 7))
    with pytest.raises(Invalid, match="does not run at its addresses yet"):
        found_in(memory, Paging(PAGE_TABLES, "4-level", long=True))


def test_no_linux(memory):
    with pytest.raises(Invalid, match="no kallsyms"):
        found_in(memory)


def test_digits_at_the_border_of_a_chunk(memory):
    symbols = symbols_of("6.1")
    tables = build("6.1", symbols, 0)
    digits = tables.index(kallsyms._DIGITS)
    for shift in (0, 8, 16):  # the needle across 1 MiB
        place = (11 << 20) - digits // 8 * 8 - shift
        memory.write(place, tables)
        assert found_in(memory) == lines(symbols)
        memory.write(place, bytes(len(tables)))


@given(data=st.data(), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_tables_give_symbols_or_a_sentence(memory, data, layout):
    symbols = make_symbols(300) if layout not in ("6.15", "7.0") else make_symbols(300)[2:]
    tables = bytearray(build(layout, symbols, TABLES))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(tables) - 1))
        damage = data.draw(st.binary(min_size=1, max_size=8))
        tables[at : at + len(damage)] = damage
    memory.write(TABLES, bytes(tables) + bytes(4096))
    try:
        found = found_in(memory)
    except Invalid:
        return
    assert all(len(line.split()) == 3 for line in found)


def test_a_guest_full_of_counts_is_given_up(memory):
    """Each aligned number before the tokens says that 300 names follow, and they do, but no addresses."""
    words = tokens()
    table = b"".join(word + b"\0" for word in words)
    index, offset = [], 0
    for word in words:
        index.append(offset)
        offset += len(word) + 1
    tail = padded(table) + struct.pack("<256H", *index)
    # 0x12c: a count of 300; as names it is one of 0x2c tokens, `\1` and zeros, and so on.
    memory.write(TABLES - (4 << 20), struct.pack("<Q", 300) * (4 << 17) + tail)
    memory.write(TABLES + (1 << 20), os.urandom(64) + b"\1T" * (1 << 20) + tail)
    with pytest.raises(Invalid):
        found_in(memory)


# ---- modules


def with_modules(memory: Memory, *modules: tuple[int, list[tuple[str, str, int]]], last: int) -> list[str]:
    """A kernel with a list of modules, each at a physical address of the image; `last` is what the last leads to."""
    head = TEXT + 0x90_0000
    symbols = (*symbols_of("6.1"), (head, "D", "modules"))
    memory.write(TABLES, build("6.1", symbols, TABLES))
    nodes = [TEXT - IMAGE + at + 8 for at, _ in modules]
    memory.write(head - TEXT + IMAGE, struct.pack("<Q", nodes[0]))
    for (at, those), following in zip(modules, [*nodes[1:], last or head], strict=True):
        names, entries, letters = b"\0", bytes(24), b"\0"
        for letter, name, value in those:
            entries += struct.pack("<IBBHQQ", len(names), 0, 0, 1, value, 0)
            names += name.encode() + b"\0"
            letters += letter.encode()
        here = TEXT - IMAGE + at
        memory.write(at, struct.pack("<QQQ56s", 0, following, here, b"module"))
        memory.write(at + 0x200, struct.pack("<QQ", here + 0x100, here + 0x300))  # one that leads nowhere
        table = struct.pack("<QI4xQQ", here + 0x1000, len(those) + 1, here + 0x2000, here + 0x3000)
        memory.write(at + 0x300, table)
        for offset, data in ((0x1000, entries), (0x2000, names), (0x3000, letters)):
            memory.write(at + offset, data)
    found = found_in(memory)
    return found[len(symbols) :] if len(found) > len(symbols) else []


MODULE = 0xFFFF_FFFF_C000_1000


def test_the_symbols_of_modules(memory):
    found = with_modules(
        memory,
        (0xE0_0000, [("t", "probe", MODULE), ("D", "table", MODULE + 0x100)]),
        (0xE1_0000, [("T", "remove", MODULE + 0x2000), ("t", "bad name", MODULE + 0x3000)]),
        last=0,
    )
    assert found == lines(
        ((MODULE, "t", "probe"), (MODULE + 0x100, "D", "table"), (MODULE + 0x2000, "T", "remove"))
    )


def test_a_list_of_modules_that_leads_back_ends(memory):
    loop = TEXT - IMAGE + 0xE0_0000 + 8
    assert len(with_modules(memory, (0xE0_0000, [("t", "probe", MODULE)]), last=loop)) == 1


def test_a_list_of_modules_that_leads_nowhere_ends(memory):
    assert len(with_modules(memory, (0xE0_0000, [("t", "probe", MODULE)]), last=0xDEAD_BEEF)) == 1


def test_module_tables_that_are_too_long_are_left_out(memory):
    with_modules(memory, (0xE0_0000, [("t", "probe", MODULE)]), last=0)
    memory.write(0xE0_0000 + 0x308, struct.pack("<I", 1 << 31))
    assert found_in(memory)[-1].endswith(" D modules")
