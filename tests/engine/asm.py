"""An assembler for tests: GNU as and ld, which come with gcc, in Intel syntax."""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass

import pytest

ORIGIN = 0x1000
TOOLS = ("as", "ld")
_CODE = {"real": ".code16", "protected": ".code32", "long": ".code64", "user": ".code64"}

# ELF-64: what of the header, the program headers and the symbol table is read here.
_EHDR = struct.Struct("<32xQQ6xHHHHH")  # e_phoff e_shoff / e_phentsize e_phnum e_shentsize e_shnum e_shstrndx
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_PT_LOAD, _SHT_SYMTAB = 1, 2


@dataclass(frozen=True)
class Program:
    """Bytes for address `ORIGIN`, and where the labels are."""

    code: bytes
    labels: dict[str, int]


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


_MISSING = missing_tools()
needs_assembler = pytest.mark.skipif(bool(_MISSING), reason=f"no {' and '.join(_MISSING)}: install binutils")


@functools.cache
def assemble(source: str, mode: str) -> Program:
    """Assemble for a mode of tests/engine/machine.py; `.code16` and the like in the source change it."""
    text = f".intel_syntax noprefix\n.text\n{_CODE[mode]}\n.globl _start\n_start:\n{source}\n"
    with tempfile.TemporaryDirectory() as folder:
        unlinked, linked = os.path.join(folder, "a.o"), os.path.join(folder, "a.elf")
        _tool(["as", "--64", "-o", unlinked, "-"], text)
        # -N: text is writable and not aligned to a page in the file, and all is one segment.
        _tool(["ld", "-N", f"-Ttext={ORIGIN:#x}", "--no-warn-rwx-segments", "-o", linked, unlinked])
        with open(linked, "rb") as file:
            return _read_elf(file.read())


def _tool(command: list[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{command[0]}: {done.stderr}\n{text}")


def _read_elf(elf: bytes) -> Program:
    phoff, shoff, phentsize, phnum, shentsize, shnum, _ = _EHDR.unpack_from(elf)
    code = b""
    for number in range(phnum):
        kind, _, offset, address, _, size, *_ = _PHDR.unpack_from(elf, phoff + number * phentsize)
        if kind == _PT_LOAD and size:
            assert address == ORIGIN and not code, "one segment at ORIGIN"
            code = elf[offset : offset + size]
    sections = [_SHDR.unpack_from(elf, shoff + number * shentsize) for number in range(shnum)]
    labels = {}
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind != _SHT_SYMTAB:
            continue
        strings = sections[link][4]
        for at in range(offset, offset + size, _SYM.size):
            name_at, _, _, _, value, _ = _SYM.unpack_from(elf, at)
            name = elf[strings + name_at : elf.index(b"\0", strings + name_at)].decode()
            labels[name] = value
    return Program(code, labels)
