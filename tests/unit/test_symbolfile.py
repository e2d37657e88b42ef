"""A table of symbols as an ELF file: pyelftools, readelf and our own reader find in it what the table has."""

from __future__ import annotations

import shutil
import subprocess
from io import BytesIO

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

from vmfs.debug.symbolfile import size_of, symbol_file
from vmfs.debug.symbols import REACH, SymbolTable, parse_elf

TABLE = SymbolTable(
    [
        (0xFFFF_FFFF_8100_0000, "T", "_text"),
        (0xFFFF_FFFF_8100_0010, "t", "work"),
        (0xFFFF_FFFF_8120_0000, "D", "jiffies"),
        (0xFFFF_FFFF_8120_0008, "b", "local"),
        (0xFFFF_FFFF_C000_0000, "W", "of_a_module"),
        (0x1F00, "A", "per_cpu"),
    ]
)
NAMES = st.text("abcdefghij_.0123456789", min_size=1, max_size=12)
SYMBOLS = st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.sampled_from("TtWwDdBbRrAa"), NAMES), max_size=40)


def test_what_is_in_it():
    elf = ELFFile(BytesIO(symbol_file(TABLE)))
    assert elf.get_machine_arch() == "x64" and elf["e_type"] == "ET_EXEC"
    sections = [(one.name, one["sh_addr"], one["sh_size"]) for one in elf.iter_sections() if one["sh_addr"]]
    assert sections == [
        (".text", 0xFFFF_FFFF_8100_0000, 0x10 + REACH),
        (".data", 0xFFFF_FFFF_8120_0000, 8 + REACH),
        (".text", 0xFFFF_FFFF_C000_0000, REACH),
    ]
    symbols = {one.name: one for one in elf.get_section_by_name(".symtab").iter_symbols()}
    assert symbols["_text"]["st_size"] == 0x10
    assert symbols["work"]["st_info"] == {"bind": "STB_LOCAL", "type": "STT_FUNC"}
    assert symbols["jiffies"]["st_info"] == {"bind": "STB_GLOBAL", "type": "STT_OBJECT"}
    assert symbols["per_cpu"]["st_shndx"] == "SHN_ABS"


def test_an_empty_table():
    assert list(ELFFile(BytesIO(symbol_file(SymbolTable()))).get_section_by_name(".symtab").iter_symbols())


@given(SYMBOLS)
def test_it_comes_back(symbols):
    table = SymbolTable(symbols)
    data = symbol_file(table)
    assert len(data) == size_of(table)
    back = parse_elf(BytesIO(data))
    assert {(address, name) for address, _, name in back} == {(address, name) for address, _, name in table}


def test_binutils_read_it(tmp_path):
    for tool in ("readelf", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    path = tmp_path / "symbols.elf"
    path.write_bytes(symbol_file(TABLE))
    done = subprocess.run(["readelf", "-Wa", path], capture_output=True, text=True, check=True)
    assert not done.stderr
    shown = subprocess.run(["nm", "-n", path], capture_output=True, text=True, check=True).stdout
    assert "ffffffff81200000 B jiffies" in shown and "ffffffff81000010 t work" in shown
