"""Instructions as text, in the syntax of Intel's manuals, with names where there are symbols.

Capstone decodes; this reads the guest's memory for it, and gives the operands that are addresses their names.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import capstone

from vmfs.debug.paging import Reader
from vmfs.debug.symbols import SymbolTable
from vmfs.words.errors import Invalid
from vmfs.words.modes import CodeMode
from vmfs.words.numbers import parse_number

LONGEST = 15  # bytes of an instruction (SDM 2A 2.3.11)
COUNT = 16
COUNT_MOST = 4096

_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}


class Instruction(NamedTuple):
    address: int  # linear
    code: bytes
    text: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What `disasm` shows: `count` instructions from `address` on, or from rip (None)."""

    address: int | None = None
    count: int = COUNT


def parse_listing(text: str, symbols: SymbolTable) -> Listing:
    """`ADDR [N]` or `rip [N]`."""
    words = text.split()
    if not 1 <= len(words) <= 2:
        raise Invalid("it is `ADDR [N]` or `rip [N]`")
    address = None if words[0] == "rip" else symbols.resolve(words[0])
    count = parse_number(words[1], what="N") if len(words) > 1 else COUNT
    if not 1 <= count <= COUNT_MOST:
        raise Invalid(f"N: {count} is not from 1 to {COUNT_MOST}")
    return Listing(address, count)


def disassemble(
    read: Reader, address: int, bits: int, count: int, *, base: int = 0, symbols: SymbolTable | None = None
) -> list[Instruction]:
    """Up to `count` instructions from linear `address` on; fewer where memory ends.

    `bits` is 16, 32 or 64, `base` that of the code segment: branches are shown as the instruction has them,
    relative to it. A byte that begins no instruction is `.byte`.
    """
    engine = capstone.Cs(capstone.CS_ARCH_X86, _MODES[bits])
    mode = CodeMode(bits, base, 0)
    found: list[Instruction] = []
    while len(found) < count:
        code = read(address, min(LONGEST * (count - len(found)), 4096))
        used = 0
        for at, size, mnemonic, operands in engine.disasm_lite(
            code, mode.ip_of(address), count - len(found)
        ):
            one = bytes(code[used : used + size])
            text = _text(mnemonic, operands, one, replace(mode, ip=at + size), symbols)
            found.append(Instruction(mode.linear(at), one, text))
            used += size
        if len(found) < count and used < len(code) and (used == 0 or len(code) - used >= LONGEST):
            found.append(Instruction(address + used & mode.mask, code[used : used + 1], f".byte {code[used]:#04x}"))
            used += 1
        if not used:
            break
        address = address + used & mode.mask
    return found


_TARGET = re.compile(r"0x[0-9a-f]+|[0-9]")
_RIP = re.compile(r"\[rip(?: ([+-]) (0x[0-9a-f]+|[0-9]))?\]")
_ABSOLUTE = re.compile(r"\[(0x[0-9a-f]{5,16})\]")
_BRANCHES = re.compile(r"(?:bnd |notrack )*(?:call|jmp|j[a-z]+|loop[a-z]*|xbegin)")


_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"


def _target_bits(code: bytes, bits: int) -> int:
    """Of a near branch, which its operand size cuts (Intel SDM 2A JMP): 66h chooses the other one of 16 and 32."""
    if bits == 64:
        return 64
    prefixes = itertools.takewhile(_PREFIXES.__contains__, code)
    return bits ^ (16 ^ 32) if 0x66 in prefixes else bits


def _text(mnemonic: str, operands: str, code: bytes, after: CodeMode, symbols: SymbolTable | None) -> str:
    """An instruction with the names of what it refers to. `after`: the CPU after it."""
    if not operands:
        return mnemonic
    text = f"{mnemonic} {operands}"
    if _TARGET.fullmatch(operands) and _BRANCHES.fullmatch(mnemonic):
        target = int(operands, 0) & (1 << _target_bits(code, after.bits)) - 1  # capstone cuts none to 16
        text = f"{mnemonic} {target:#x}"
        return text + _name(after.linear(target), symbols)
    if match := _RIP.search(operands):
        offset = int(match[2], 0) if match[2] else 0
        address = after.linear(after.ip + (offset if match[1] == "+" else -offset))
        return f"{text}  # {address:#x}{_name(address, symbols)}"
    if match := _ABSOLUTE.search(operands):
        return text + _name(int(match[1], 0), symbols)
    return text


def _name(address: int, symbols: SymbolTable | None) -> str:
    label = symbols.label(address) if symbols else ""
    return f" <{label}>" if label else ""


def listing_text(read: Reader, code: CodeMode, listing: Listing, symbols: SymbolTable) -> str:
    """A line an instruction: `ADDRESS <SYMBOL>: BYTES  TEXT`."""
    address = code.address if listing.address is None else listing.address
    found = disassemble(read, address, code.bits, listing.count, base=code.base, symbols=symbols)
    width = 16 if code.bits == 64 else 8
    lines = [
        f"0x{one.address:0{width}x}{_name(one.address, symbols)}: {one.code.hex(' '):<24} {one.text}\n"
        for one in found
    ]
    if len(found) < listing.count:
        end = found[-1].address + len(found[-1].code) if found else address
        lines.append(f"# {end:#x} is not mapped to RAM or ROM\n")
    return "".join(lines)
