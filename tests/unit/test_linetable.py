"""Addresses of source lines: what compilers and linkers write, names, and hostile tables."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.debug import linetable
from vmfs.debug.linetable import SECTIONS_MOST, Lines, LineTable, Section
from vmfs.debug.symbols import SymbolTable, parse
from vmfs.words.errors import Invalid

COURSE = Path(__file__).parents[2] / "examples" / "course"
SOURCE = """\
int one(int x)
{
    return x + 1;
}

/* no code here */

int two(int x)
{
    return one(x) * 2;
}
void _start(void) { two(3); }
"""

MANY = "".join(f"int dropped_{number}(void)\n{{\n    return {number};\n}}\n" for number in range(100))


def compiled(folder: Path, *flags: str, sources: dict[str, str] | None = None) -> Path:
    sources = sources or {"main.c": SOURCE}
    for name, text in sources.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    made = folder / "a.elf"
    command = ("gcc", "-g", "-O0", "-static", "-nostdlib", "-ffreestanding", "-Wl,-Ttext=0x401000", *flags)
    subprocess.run([*command, *sources, "-o", made], cwd=folder, check=True)
    return made


def compressed_sections(elf: Path) -> set[bytes]:
    with elf.open("rb") as file:
        sections = list(ELFFile(file).iter_sections())
        return {section.name.encode() for section in sections if section["sh_flags"] & 0x800}


def rows_of(elf: Path) -> dict[tuple[str, int], int]:
    """The lowest address of each line, as objdump decodes the table: name, line, address, [view], [x]."""
    text = subprocess.run(["objdump", "--dwarf=decodedline", elf], capture_output=True, text=True, check=True).stdout
    rows: dict[tuple[str, int], int] = {}
    for words in map(str.split, text.splitlines()):
        if len(words) >= 4 and words[1].isdigit() and words[2].startswith("0x") and words[-1] == "x":
            key, address = (words[0], int(words[1])), int(words[2], 16)
            rows[key] = min(address, rows.get(key, address))
    return rows


@pytest.mark.parametrize(
    "flags",
    [("-gdwarf-5",), ("-gdwarf-4",), ("-gdwarf-3",), ("-gdwarf-2",), ("-gdwarf64",), ("-gz=zlib",),
     ("-gz=zlib", "-m32"), ("-m32",), ("-O2",), ("-gno-as-loc-support",), ("-ffunction-sections", "-Wl,--gc-sections")],
    ids=" ".join,
)  # fmt: skip
def test_every_line_is_where_objdump_says(tmp_path, flags):
    elf = compiled(tmp_path, *flags, sources={"main.c": SOURCE + MANY})
    assert any("-gz" in flag for flag in flags) == (b".debug_line" in compressed_sections(elf))
    table, rows = parse(elf.read_bytes()), rows_of(elf)
    if "-Wl,--gc-sections" in flags:  # the linker leaves the rows of what it dropped, at 0
        assert 0 <= rows["main.c", 15] < 0x1000
        with pytest.raises(Invalid, match="the last line with code is 12"):
            table.resolve("main.c:15")
        rows = {key: address for key, address in rows.items() if address >= 0x401000}
    assert len(rows) >= 5
    for (name, line), address in rows.items():
        assert table.resolve(f"{name}:{line}") == address, line


def test_the_kernel_of_the_course(tmp_path):
    flags = "-m32 -O1 -g -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none -nostdlib -static"
    made = tmp_path / "kernel.elf"
    sources = ("-Wl,--build-id=none,-z,noexecstack,-T,kernel.ld", "boot.S", "kernel.c")
    subprocess.run(["gcc", *flags.split(), *sources, "-o", made], cwd=COURSE, check=True)
    table, rows = parse(made.read_bytes()), rows_of(made)
    assert {name for name, _ in rows} == {"boot.S", "kernel.c"}
    assert {table.resolve(f"{name}:{line}"): None for name, line in rows} == dict.fromkeys(rows.values())
    assert table.resolve("boot.S:8") == table.address_of("_start")


def test_a_line_without_code_is_the_next_that_has_some(tmp_path):
    table = parse(compiled(tmp_path).read_bytes())
    assert table.resolve("main.c:6") == table.resolve("main.c:9") == table.address_of("two")
    assert table.resolve("main.c:1") == table.address_of("one") == 0x401000
    assert table.resolve("main.c:6+4") == table.address_of("two") + 4
    with pytest.raises(Invalid, match=r"^main.c has no code at line 13 or after it: the last line with code is 12$"):
        table.resolve("main.c:13")
    with pytest.raises(Invalid, match="the line tables of `symbols` have no code of a file 'other.c'$"):
        table.resolve("other.c:1")
    with pytest.raises(Invalid, match="no code of a file 'ain.c'"):  # the end of a name is no name
        table.resolve("ain.c:1")
    for text in ("main.c:", ":5", "main.c:x", "main.c:-1", "main.c:99999999999", "..:5", "/:5", "./:5"):
        with pytest.raises(Invalid):
            table.resolve(text)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    one, two = "int one(void) { return 1; }\n", "\nint two(void) { return 2; }\nvoid _start(void) { }\n"
    for version in ("-gdwarf-5", "-gdwarf-4"):
        elf = compiled(tmp_path, version, sources={"a/8250.c": one, "b/8250.c": two})
        table = parse(elf.read_bytes())
        with pytest.raises(Invalid, match=r"^there are 2 files '8250.c': \S*a/8250.c, \S*b/8250.c$"):
            table.resolve("8250.c:1")
        assert table.resolve("a/8250.c:1") == table.address_of("one")
        assert table.resolve("./b/8250.c:1") == table.address_of("two")
        if version == "-gdwarf-5":  # before, where a unit was compiled is not in its line table
            assert table.resolve(f"{tmp_path}/b/8250.c:1") == table.address_of("two")


def test_a_build_that_leaves_out_where_it_was_done(tmp_path):
    header = '#include "inline.h"\nvoid _start(void) { inlined(); }\n'
    sources = {"main.c": SOURCE.replace("_start", "start"), "other.c": header}
    (tmp_path / "inline.h").write_text("static int inlined(void)\n{\n    return 1;\n}\n")
    table = parse(compiled(tmp_path, f"-fdebug-prefix-map={tmp_path}=./top", sources=sources).read_bytes())
    for name in ("main.c:9", "top/main.c:9"):
        assert table.resolve(name) == table.address_of("two")
    assert table.resolve("top/inline.h:1") == table.address_of("inlined")
    with pytest.raises(Invalid, match="no code of a file 'top/top/main.c'"):
        table.resolve("top/top/main.c:9")


def test_without_dwarf_a_line_is_refused_with_the_reason(tmp_path):
    elf = compiled(tmp_path)
    subprocess.run(["strip", "--strip-debug", elf], check=True)
    for table in (parse(elf.read_bytes()), parse(b"1000 T a\n"), SymbolTable()):
        with pytest.raises(Invalid, match=r"^'main.c:3' is not known: no ELF file with DWARF \(gcc -g\) was written"):
            table.resolve("main.c:3")


def test_a_symbol_with_a_colon_comes_first():
    assert parse(b"1000 T main.c:3\n").resolve("main.c:3") == 0x1000


def test_tables_that_are_added_know_the_lines_of_both(tmp_path):
    tables = []
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        flag = f"-Wl,-Ttext={0x401000 + 0x1000 * number:#x}"
        tables.append(parse(compiled(tmp_path / name, flag, sources={f"{name}.c": SOURCE}).read_bytes()))
    both = tables[0].merged(tables[1])
    assert both.resolve("a.c:1") == 0x401000 and both.resolve("b.c:1") == 0x402000
    assert both.lines.size == sum(table.lines.size for table in tables)
    assert both.merged(tables[1]).lines.size == both.lines.size
    assert both.merged(parse(b"5 T x\n")).resolve("b.c:1") == 0x402000


def test_a_table_that_is_of_no_use_leaves_the_symbols(tmp_path):
    """A section that is compressed in another way, or cut off, or too long."""
    elf = compiled(tmp_path, "-gz=zlib", sources={"main.c": SOURCE + MANY})
    data = elf.read_bytes()
    with elf.open("rb") as file:
        parsed = ELFFile(file)
        number, offset = parsed.get_section_index(".debug_line"), parsed.get_section_by_name(".debug_line")["sh_offset"]
        header = parsed["e_shoff"] + 64 * number

    def changed(at: int, value: bytes) -> SymbolTable:
        return parse(data[:at] + value + data[at + len(value) :])

    for at, value, reason in (
        (offset, b"\2", "it is compressed in way 2 and not by zlib$"),
        (header + 32, b"\xff" * 7, f"it has more than {SECTIONS_MOST} bytes$"),
        (header + 32, (1 << 20).to_bytes(8, "little"), r"the ELF file is cut off: a section is past its end$"),
        (offset + 8, (SECTIONS_MOST + 1).to_bytes(8, "little"), f"more than {SECTIONS_MOST}$"),
        (offset + 8, b"\xff", "a compressed section is not as long as it says$"),
        (offset + 26, b"\xff\xff", "a compressed section is damaged"),
    ):
        table = changed(at, value)
        assert table.address_of("two")
        with pytest.raises(Invalid, match=reason):
            table.resolve("main.c:3")


# ---- hostile tables


def lines_of(data: bytes, strings: bytes = b"", code=((0, 1 << 64),)) -> Lines:
    return Lines((LineTable(Section(data, len(data)), Section(strings, len(strings)), code),))


def unit(body: bytes, *, version: int = 5, line_range: int = 14, head: bytes | None = None) -> bytes:
    """With one folder `d` and one file `f.c`, which is 0."""
    files = b"\1\1\x08\1d\0" + b"\2\1\x08\2\x0b\1f.c\0\0" if head is None else head
    head = bytes((1, 1, 1, 0xFB, line_range, 13)) + bytes((0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1)) + files
    whole = version.to_bytes(2, "little") + b"\x08\0" + len(head).to_bytes(4, "little") + head + body
    return len(whole).to_bytes(4, "little") + whole


SET_FILE = b"\4\0"


def test_a_table_by_hand():
    address = b"\0\x09\2" + (0x1000).to_bytes(8, "little")
    body = SET_FILE + address + b"\1" + b"\3\x7f\1" + b"\3\5\x02\x10\1" + b"\6\3\1\1\6\x13"
    lines = lines_of(unit(body))
    assert lines.address_of("f.c:1") == 0x1000
    assert lines.address_of("d/f.c:2") == lines.address_of("d/f.c:5") == 0x1010  # line 0 is none
    assert lines.address_of("f.c:6") == 0x1010
    with pytest.raises(Invalid, match="the last line with code is 7"):
        lines.address_of("f.c:8")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\1", "cut off"),
        (b"\xff\xff\xff\x7f\0", "a unit goes beyond its end"),
        (b"\xff\xff\xff\xff" + b"\xff" * 8, "a unit goes beyond its end"),
        (unit(b"", line_range=0), "makes no sense"),
        (unit(b"", head=b"\xff" + bytes(600)), "255 fields"),
        (unit(b"", head=b"\0\xff\xff\xff\xff\x0f"), "more than 65536 files"),
        (unit(b"", head=b"\1\1\x08\xff\xff\xff\xff\xff\x0f"), "more than 65536 files"),
        (unit(b"", head=b"\1\1\x1f\1\xff\xff\xff\xff\0\0"), "a file's name has no end"),
        (unit(b"", head=b"\1\1\x55\1\0"), "unknown form 0x55"),
        (unit(b"", head=b"\1\1\x09\1\xff\xff\xff\xff\xff\xff\xff\xff\xff\1"), "cut off"),
        (unit(SET_FILE + b"\2" + b"\x80" * 11), "a number has no end"),
        (unit(SET_FILE + b"\0\x09\2"), "an instruction goes beyond its unit"),
        (unit(SET_FILE + b"\0\0"), "an instruction goes beyond its unit"),
        (unit(SET_FILE + b"\x09\1"), "cut off"),
        ((30).to_bytes(4, "little") + b"\4\0" + bytes(28), "makes no sense"),
    ],
)
def test_damaged_tables_are_refused_with_a_sentence(data, reason):
    with pytest.raises(Invalid, match=rf"^the line table \(.debug_line\) is damaged: .*{reason}"):
        lines_of(data).address_of("f.c:1")


def test_names_that_are_read_again_and_again_have_an_end(monkeypatch):
    """4 bytes of a table name 4 KiB of strings."""
    monkeypatch.setattr(linetable, "NAMES_MOST", 1 << 20)
    count = 1000
    head = b"\1\1\x1f" + bytes((count & 0x7F | 0x80, count >> 7)) + bytes(4 * count) + b"\0\0"
    with pytest.raises(Invalid, match="names of its files have more than"):
        lines_of(unit(b"", head=head), b"x" * 4000 + b"\0").address_of("f.c:1")


def test_lines_that_are_kept_have_an_end(monkeypatch):
    monkeypatch.setattr(linetable, "LINES_MOST", 100)
    assert lines_of(unit(SET_FILE + b"\x21" * 100)).address_of("f.c:50")
    with pytest.raises(Invalid, match="more than 100 lines with code"):
        lines_of(unit(SET_FILE + b"\x21" * 101)).address_of("f.c:50")


def test_what_was_learnt_is_forgotten_for_more(monkeypatch):
    monkeypatch.setattr(linetable, "LINES_MOST", 150)
    other = unit(SET_FILE + b"\x21" * 100, head=b"\1\1\x08\1d\0" + b"\2\1\x08\2\x0b\1g.c\0\0")
    lines = lines_of(unit(SET_FILE + b"\x21" * 100) + other)
    for _ in range(2):
        assert lines.address_of("f.c:50") == lines.address_of("g.c:50")


def test_words_of_a_long_text_are_found_in_time():
    lines = lines_of(unit(SET_FILE + b"\x21" * 10))
    begun = time.monotonic()
    for text in ("x" * 65536, "x:" * 32768, ":" * 65536, "f.c:5+" * 10000, "1" * 65536 + ":1"):
        lines.unknown(text)
    assert time.monotonic() - begun < 1
    assert lines.unknown("break f.c:5 if rax==1\nwatch phys:d/g.c:7+4 4 w\nbreak 0x10\nbreak k.c:5-0x1") == {
        "f.c", "g.c", "k.c",
    }  # fmt: skip


def test_a_search_ends_when_nobody_waits_for_it():
    class GivenUpError(Exception):
        pass

    def check() -> None:
        raise GivenUpError

    lines = lines_of(unit(SET_FILE + b"\x21" * 10))
    with pytest.raises(GivenUpError):
        lines.learn("f.c:1", check)
    assert lines.address_of("f.c:3")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_in_a_table_is_invalid_at_the_worst(data):
    whole = bytearray(unit(SET_FILE + b"\x21" * 20 + b"\3\5\1\2\x10\1\0\1\1"))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        address = lines_of(bytes(whole), b"f.c\0").address_of("f.c:1")
        assert address is not None and 0 <= address < 1 << 64
    except Invalid:
        pass
