"""Tables of symbols: System.map, ELF, looking up, and hostile files."""

from __future__ import annotations

import os
import struct
import subprocess
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.debug.symbols import REACH, SymbolTable, parse, parse_elf, parse_file, parse_map
from vmfs.words.errors import Invalid, LimitReached

MAP = b"""\
0000000000000000 A percpu_start
ffffffff81000000 T _text
ffffffff81000000 t local_alias
ffffffff81000040 t helper
ffffffff81000100 T start_kernel\t[module]

ffffffff82000000 D data
                 U undefined
"""


def test_a_map():
    table = parse(MAP)
    assert table.address_of("start_kernel") == 0xFFFFFFFF81000100
    assert table.address_of("undefined") is None
    assert table.name_of(0xFFFFFFFF81000000) == ("_text", 0)  # of two, the global one
    assert table.name_of(0xFFFFFFFF810000FF) == ("helper", 0xBF)
    assert table.name_of(0xFFFFFFFF80FFFFFF) is None
    assert table.name_of(0xFFFFFFFF82000000 + REACH - 1) == ("data", REACH - 1)
    assert table.name_of(0xFFFFFFFF82000000 + REACH) is None
    assert table.name_of(0x10) is None  # absolute symbols name no address
    assert table.address_of("percpu_start") == 0
    assert table.label(0xFFFFFFFF81000042) == "helper+0x2"
    assert table.label(0xFFFFFFFF81000040) == "helper"
    assert table.label(5) == ""
    assert parse(table.text().encode()).text() == table.text()


def test_global_symbols_win_by_name():
    table = SymbolTable(
        [(0x100, "t", "init"), (0x200, "T", "init"), (0x300, "T", "init"), (0x50, "d", "init")]
    )
    assert table.address_of("init") == 0x200
    assert SymbolTable([(0x20, "t", "x"), (0x10, "t", "x")]).address_of("x") == 0x10


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0x10", 0x10),
        ("16", 16),
        ("-1", (1 << 64) - 1),
        ("start_kernel", 0xFFFFFFFF81000100),
        ("start_kernel+0x10", 0xFFFFFFFF81000110),
        ("start_kernel+16", 0xFFFFFFFF81000110),
        ("start_kernel-1", 0xFFFFFFFF810000FF),
    ],
)
def test_an_address_is_a_number_or_a_symbol(text, address):
    assert parse(MAP).resolve(text) == address


@pytest.mark.parametrize(
    "text", ["", "nobody", "nobody+1", "start_kernel+x", "start_kernel+", "+1", "12ab", "0x"]
)
def test_what_is_no_address_is_said_with_its_field(text):
    with pytest.raises(Invalid, match="^ADDR: "):
        parse(MAP).resolve(text)


def test_a_name_with_a_dot_or_a_plus_is_looked_up_whole_first():
    table = SymbolTable([(0x10, "t", "f.cold"), (0x20, "t", "operator+1")])
    assert table.resolve("f.cold+1") == 0x11
    assert table.resolve("operator+1") == 0x20


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "no symbol in it"),
        (b"hello\n", "line 1: 'hello' is not"),
        (b"1000 T a\n1000 TT b\n", "line 2"),
        (b"1000 T a b\n", "line 1"),
        (b"10000000000000000 T a\n", "line 1"),
        (b"1000 T a\xc3\xa4\n", "no ELF file"),
        (b"0000000000000000 T a\n0000000000000000 T b\n", "kptr_restrict"),
    ],
)
def test_what_is_no_map(data, sentence):
    with pytest.raises(Invalid, match=sentence):
        parse(data)


def test_debian_s_placeholder_of_a_map_says_where_the_real_one_is():
    with pytest.raises(Invalid, match="The real System.map is in the linux-image"):
        parse(b"ffffffffffffffff B The real System.map is in the linux-image-6.1-dbg package\n")


def test_tables_are_merged():
    one, other = SymbolTable([(1, "T", "a"), (5, "T", "b")]), SymbolTable([(3, "T", "c"), (5, "T", "b")])
    assert one.merged(other).text() == SymbolTable([(1, "T", "a"), (3, "T", "c"), (5, "T", "b")]).text()
    assert one.merged(SymbolTable()) is one or len(one.merged(SymbolTable())) == 2
    assert SymbolTable().merged(one) is one


def test_there_is_a_limit(monkeypatch):
    monkeypatch.setattr("vmfs.debug.symbols.MOST", 2)
    with pytest.raises(Invalid, match="more than 2"):
        parse(b"1 T a\n2 T b\n3 T c\n")
    with pytest.raises(LimitReached):
        SymbolTable([(1, "T", "a"), (2, "T", "b")]).merged(SymbolTable([(3, "T", "c")]))


# ---- ELF


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Files made by as and ld, 64 and 32 bits, and what nm says of them."""
    folder = tmp_path_factory.mktemp("elf")
    source = folder / "a.s"
    source.write_text(
        ".globl _start, data, big, weak\n.weak weak\n_start: nop\nlocal: nop\nweak: nop\n"
        ".equ constant, 0x1234\n.data\ndata: .long 1\n.bss\nbig: .skip 64\n.section .rodata\nread: .long 2\n"
    )

    def build(bits: int, *options: str):
        target, shape = folder / f"a{bits}{len(options)}", {64: "elf_x86_64", 32: "elf_i386"}[bits]
        subprocess.run(["as", f"--{bits}", "-o", folder / "a.o", source], check=True)
        command = ["ld", "-m", shape, "-Ttext=0x401000", *options, "-o", target, folder / "a.o"]
        subprocess.run(command, check=True)
        return target

    try:
        return {64: build(64), 32: build(32), "stripped": build(64, "-s"), "object": folder / "a.o"}
    except FileNotFoundError as error:
        pytest.skip(f"install binutils: {error}")


@pytest.mark.parametrize("bits", [64, 32])
def test_an_elf_file_is_as_nm_shows_it(program, bits):
    shown = subprocess.run(["nm", program[bits]], capture_output=True, text=True, check=True).stdout
    fd = os.open(program[bits], os.O_RDONLY)
    found = {
        name: (int(address, 16), letter)
        for address, letter, name in map(str.split, parse_file(fd).text().splitlines())
    }
    os.close(fd)
    theirs = {
        name: (int(address, 16), letter) for address, letter, name in map(str.split, shown.splitlines())
    }
    assert found == theirs


def test_elf_files_without_symbols_for_us(program):
    with pytest.raises(Invalid, match="stripped"):
        parse(program["stripped"].read_bytes())
    with pytest.raises(Invalid, match="relocatable"):
        parse(program["object"].read_bytes())
    other = bytearray(program[64].read_bytes())
    struct.pack_into("<H", other, 18, 183)  # AArch64
    with pytest.raises(Invalid, match="not for x86"):
        parse(bytes(other))
    with pytest.raises(Invalid, match="cut off"):
        parse(program[64].read_bytes()[:-100])
    other = bytearray(program[64].read_bytes())
    struct.pack_into("<H", other, 58, 1)  # e_shentsize
    with pytest.raises(Invalid, match="section headers of 1 bytes"):
        parse(bytes(other))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_elf_file_is_parsed_or_refused(program, data):
    blob = bytearray(program[64].read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(0, 63), st.integers(len(blob) - 1024, len(blob) - 1)))
        blob[at] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.integers(4, len(blob)))]
    try:
        table = parse_elf(BytesIO(bytes(blob)))
    except Invalid as error:
        assert str(error)
        return
    for line in table.text().splitlines():
        assert len(line.split(" ")) == 3


@given(st.binary(max_size=200))
def test_any_bytes_are_a_map_or_refused(data):
    try:
        table = parse_map(data)
    except Invalid:
        return
    assert len(table) and parse_map(table.text().encode()).text() == table.text()


@given(
    st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.sampled_from("TtDdA"), st.text("abc", min_size=1)))
)
def test_looking_up_is_what_a_search_finds(symbols):
    table = SymbolTable(symbols)
    for address, _, name in symbols:
        assert table.address_of(name) in {at for at, _, other in symbols if other == name}
        found = table.name_of(address)
        starts = [at for at, letter, _ in symbols if letter != "A" and at <= address]
        nearest = max(starts, default=None)
        if nearest is None or address - nearest >= REACH:
            assert found is None
        else:
            assert found is not None and found[1] == address - nearest
