"""Conditions of break- and watchpoints: `rax==5 && u32(rdi+8)!=0`. Parsed when they are written, never Python.

Values are unsigned numbers of 64 bits; what goes beyond wraps around, a shift by 64 or more gives 0, and a
comparison is 1 or 0. The operators and their precedence are C's. Operands:

- numbers, as everywhere in vmfs;
- registers by their names in REGISTERS, up to 64 bits wide (`rax`, `cs.base`, `cr3`, `msr.0xc0000082`), and the
  parts of general registers (`eax`, `ax`, `al`, `ah`, `r8d`); a `$` before them is taken, too;
- symbols, which become their addresses when the condition is parsed;
- memory: `[ADDR]` and `u64(ADDR)` are 8 bytes at a linear address, `u8`, `u16` and `u32` fewer.

What cannot be read (an unmapped page, no RAM, an MSR that is none) raises Unreadable.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vmfs.words.errors import Invalid, VmfsError
from vmfs.words.numbers import parse_number
from vmfs.words.registers import REGISTERS, parse_msr

Resolve = Callable[[str], int | None]  # the address of a symbol, or None

MOST_TOKENS = 256  # of a condition: evaluation may go as deep as it has operators
_MASK = (1 << 64) - 1
_PAGE = 4096

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+|[0-9]+)(?!\w))"
    r"|(?P<name>\$?[A-Za-z_][\w.$@]*)"
    r"|(?P<operator>&&|\|\||==|!=|<=|>=|<<|>>|[-+*&|^~!<>()\[\]]))",
    re.ASCII,
)
_OFFSET = re.compile(r"(.+)([+-])([0-9]\w*)", re.ASCII)  # after a symbol, whose name may have such signs, too


class Unreadable(VmfsError):
    """Something that a condition looks at is not there."""


class Looker(Protocol):
    """What conditions look at."""

    def register(self, name: str) -> int: ...
    def read(self, linear: int, size: int) -> bytes: ...


Evaluate = Callable[[Looker], int]


@dataclass(frozen=True, slots=True)
class Condition:
    """`text` has no spaces and no symbols; parsed, it gives an equal condition."""

    text: str
    evaluate: Evaluate = field(compare=False, repr=False)

    def holds(self, looker: Looker) -> bool:
        """Raises Unreadable."""
        return self.evaluate(looker) != 0


def no_symbols(_name: str) -> int | None:
    return None


# ---- what names mean


def _parts() -> Mapping[str, tuple[str, int, int]]:
    """Parts of general registers: the register, the shift, the mask (Intel SDM 1 3.4.1)."""
    parts: dict[str, tuple[str, int, int]] = {}
    for letter in "abcd":
        whole = f"r{letter}x"
        parts |= {f"e{letter}x": (whole, 0, 0xFFFFFFFF), f"{letter}x": (whole, 0, 0xFFFF)}
        parts |= {f"{letter}l": (whole, 0, 0xFF), f"{letter}h": (whole, 8, 0xFF)}
    for name in ("si", "di", "sp", "bp"):
        parts |= {f"e{name}": (f"r{name}", 0, 0xFFFFFFFF), name: (f"r{name}", 0, 0xFFFF)}
        parts[f"{name}l"] = (f"r{name}", 0, 0xFF)
    for number in range(8, 16):
        whole = f"r{number}"
        parts |= {f"{whole}d": (whole, 0, 0xFFFFFFFF), f"{whole}w": (whole, 0, 0xFFFF)}
        parts[f"{whole}b"] = (whole, 0, 0xFF)
    parts |= {"eip": ("rip", 0, 0xFFFFFFFF), "eflags": ("rflags", 0, 0xFFFFFFFF)}
    return parts


_PARTS = _parts()
_WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


def _register(name: str) -> Evaluate | None:
    if name in _PARTS:
        whole, shift, mask = _PARTS[name]
        return lambda looker: looker.register(whole) >> shift & mask
    row = REGISTERS.get(name)
    if (row is not None and row.bits <= 64) or parse_msr(name) is not None:
        return lambda looker: looker.register(name)
    return None


def _memory(address: Evaluate, size: int) -> Evaluate:
    return lambda looker: int.from_bytes(looker.read(address(looker), size), "little")


def parse_address(text: str, resolve: Resolve = no_symbols, *, what: str = "ADDR") -> int:
    """A number, a symbol or FILE:LINE, or one of these with an offset: `start_kernel+0x10`."""
    if (text[:1].isdigit() or text[:1] == "-") and ":" not in text:
        return parse_number(text, what=what)
    name, sign, offset = text, "+", "0"
    address = resolve(text)
    if address is None and (match := _OFFSET.fullmatch(text)):
        name, sign, offset = match.groups()
        address = resolve(name)
    if address is None:
        raise Invalid(f"{what}: {name[:60]!r} is neither a number nor a symbol that is known")
    distance = parse_number(offset, what=what)
    return (address + (distance if sign == "+" else -distance)) & _MASK


# ---- operators

_Binary = Callable[[int, int], int]


def _strict(function: _Binary) -> Callable[[Evaluate, Evaluate], Evaluate]:
    return lambda left, right: lambda looker: function(left(looker), right(looker)) & _MASK


def _left(value: int, count: int) -> int:
    return value << count if count < 64 else 0


def _right(value: int, count: int) -> int:
    return value >> count if count < 64 else 0


# How tight each binds, and what it makes of its operands. && and || look at the right one only if they must.
_OPERATORS: Mapping[str, tuple[int, Callable[[Evaluate, Evaluate], Evaluate]]] = {
    "||": (1, lambda left, right: lambda looker: int(left(looker) != 0 or right(looker) != 0)),
    "&&": (2, lambda left, right: lambda looker: int(left(looker) != 0 and right(looker) != 0)),
    "|": (3, _strict(operator.or_)),
    "^": (4, _strict(operator.xor)),
    "&": (5, _strict(operator.and_)),
    "==": (6, _strict(operator.eq)),
    "!=": (6, _strict(operator.ne)),
    "<": (7, _strict(operator.lt)),
    "<=": (7, _strict(operator.le)),
    ">": (7, _strict(operator.gt)),
    ">=": (7, _strict(operator.ge)),
    "<<": (8, _strict(_left)),
    ">>": (8, _strict(_right)),
    "+": (9, _strict(operator.add)),
    "-": (9, _strict(operator.sub)),
    "*": (10, _strict(operator.mul)),
}
_UNARY: Mapping[str, Callable[[int], int]] = {
    "!": operator.not_,
    "-": operator.neg,
    "~": operator.invert,
}


# ---- parsing


def parse_condition(text: str, resolve: Resolve = no_symbols) -> tuple[Condition, str]:
    """The condition that `text` begins with, and what stands after it: where no operator goes on."""
    parser = _Parser(text, resolve)
    evaluate = parser.expression(1)
    return Condition("".join(parser.taken), evaluate), text[parser.at :].strip()


class _Parser:
    """Precedence climbing; `taken` are the tokens so far, with the addresses of symbols in their places."""

    def __init__(self, text: str, resolve: Resolve) -> None:
        self.text = text
        self.resolve = resolve
        self.at = 0
        self.taken: list[str] = []

    def expression(self, least: int) -> Evaluate:
        value = self._operand()
        while True:
            row = _OPERATORS.get(self._peek("operator"))
            if row is None or row[0] < least:
                return value
            self._take()
            value = row[1](value, self.expression(row[0] + 1))

    def _operand(self) -> Evaluate:
        if number := self._peek("number"):
            constant = parse_number(number, what="if")
            self._take()
            return lambda _looker: constant
        if name := self._peek("name"):
            return self._named(name)
        sign = self._peek("operator")
        if sign in _UNARY:
            self._take()
            function, operand = _UNARY[sign], self._operand()
            return lambda looker: function(operand(looker)) & _MASK
        if sign == "(":
            return self._bracketed(")")
        if sign == "[":
            return _memory(self._bracketed("]"), 8)
        rest = self.text[self.at :].strip()
        where = f"before {rest[:20]!r}" if rest else "at the end"
        raise Invalid(f"if: a register, a number, a symbol or memory is missing {where}")

    def _named(self, name: str) -> Evaluate:
        bare = name.removeprefix("$")
        known = _register(bare.lower())
        if known is not None:
            self._take(bare.lower())
            return known
        if bare in _WIDTHS:
            self._take()
            if self._peek("operator") != "(":
                raise Invalid(f"if: it is {bare}(ADDR)")
            return _memory(self._bracketed(")"), _WIDTHS[bare])
        address = self.resolve(bare)
        if address is None:
            raise Invalid(f"if: {bare[:60]!r} is neither a register nor a symbol that is known")
        self._take(f"{address:#x}")
        return lambda _looker: address

    def _bracketed(self, end: str) -> Evaluate:
        self._take()
        value = self.expression(1)
        if self._peek("operator") != end:
            raise Invalid(f"if: a {end!r} is missing")
        self._take()
        return value

    def _match(self) -> re.Match[str] | None:
        return _TOKEN.match(self.text, self.at)

    def _peek(self, kind: str) -> str:
        match = self._match()
        return (match[kind] or "") if match else ""

    def _take(self, instead: str | None = None) -> None:
        if len(self.taken) >= MOST_TOKENS:
            raise Invalid(f"if: it has more than {MOST_TOKENS} words and signs")
        match = self._match()
        assert match is not None
        self.taken.append(instead or match[0].strip())
        self.at = match.end()


# ---- what is looked at


class Cpu(Protocol):
    """Of `vmfs.engine.base.Vcpu`."""

    def get_state(self, name: str) -> bytes: ...
    def get_msr(self, index: int) -> int: ...
    def translate(self, linear: int) -> int | None: ...


class CpuLooker:
    """A CPU that stands still and its RAM; each state is got once, when it is first looked at."""

    def __init__(self, cpu: Cpu, read_ram: Callable[[int, int], bytes]) -> None:
        self._cpu = cpu
        self._read_ram = read_ram
        self._states: dict[str, bytes] = {}

    def register(self, name: str) -> int:
        msr = parse_msr(name)
        if msr is not None:
            try:
                return self._cpu.get_msr(msr)
            except VmfsError as error:
                raise Unreadable(str(error)) from error
        row = REGISTERS[name]
        if row.state not in self._states:
            self._states[row.state] = self._cpu.get_state(row.state)
        return row.get(self._states[row.state])

    def read(self, linear: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            at = (linear + len(data)) & _MASK
            physical = self._cpu.translate(at)
            if physical is None:
                raise Unreadable(f"{at:#x} is not mapped")
            piece = self._read_ram(physical, min(size - len(data), _PAGE - at % _PAGE))
            if not piece:
                raise Unreadable(f"{at:#x} is not in RAM")
            data += piece
        return data
