"""REGISTERS: every register by name, with its width and where it lies in which KVM UAPI struct.

The table drives the files `registers` and `reg/`, the constants of vmfs.h, the Python client and gdb.
Names: Intel SDM; fields of a segment's hidden part and of the descriptor table registers after a dot (`cs.base`,
`gdtr.limit`).

MSRs are not rows, because which there are is the engine's to say: they are `msr.0xc0000082`, see `parse_msr`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from vmfs.words import layouts
from vmfs.words.errors import Invalid, Unsupported, VmfsError
from vmfs.words.numbers import parse_number


@dataclass(frozen=True, slots=True)
class Register:
    """`bits` bits at byte `offset` of the state `state`; a container of more bits keeps the rest. `used`: how many
    of them the register really has, where the struct has more room."""

    name: str
    bits: int
    state: str
    offset: int
    writable: bool = True
    used: int = 0

    @property
    def settable(self) -> int:
        """How many bits a new value may have."""
        return self.used or self.bits

    @property
    def size(self) -> int:
        """Bytes."""
        return (self.bits + 7) // 8

    def get(self, blob: bytes) -> int:
        return int.from_bytes(blob[self.offset : self.offset + self.size], "little")

    def put(self, blob: bytearray, value: int) -> None:
        blob[self.offset : self.offset + self.size] = value.to_bytes(self.size, "little")

    def text(self, value: int) -> str:
        """The value as the files show it: hexadecimal, as many digits as the register has."""
        return f"0x{value:0{(self.bits + 3) // 4}x}"

    def parse(self, text: str) -> int:
        if not self.writable:
            raise Invalid(f"{self.name} cannot be written")
        return parse_number(text, self.settable, what=self.name)


@dataclass(frozen=True, slots=True)
class Ymm(Register):
    """A YMM register: `offset` is where the state has its lower half, which is XMM. A part that is in its initial
    state, as the header says, is zero, whatever its bytes are."""

    high: int = 0

    def get(self, blob: bytes) -> int:
        value = 0
        for at, component, shift in self._parts():
            if layouts.quad(blob, layouts.XSAVE_STATE_BV) & component:
                value |= int.from_bytes(blob[at : at + 16], "little") << shift
        return value

    def put(self, blob: bytearray, value: int) -> None:
        in_use = layouts.quad(blob, layouts.XSAVE_STATE_BV)
        for at, component, shift in self._parts():
            part = value >> shift & (1 << 128) - 1
            if not in_use & component:
                if not part:
                    continue
                first = layouts.XSAVE_XMM if component == layouts.XSAVE_SSE else layouts.XSAVE_YMM_HIGH
                blob[first : first + 256] = bytes(256)
                in_use |= component
            blob[at : at + 16] = part.to_bytes(16, "little")
        layouts.put_quad(blob, layouts.XSAVE_STATE_BV, in_use)

    def _parts(self) -> Iterable[tuple[int, int, int]]:
        return (self.offset, layouts.XSAVE_SSE, 0), (self.high, layouts.XSAVE_AVX, 128)


# Bits that a register has, where the struct has more room: those that a descriptor has for a segment (SDM 3A 3.4.5),
# and a priority class for CR8 (SDM 3A 11.8.6.1), of which KVM takes more, and keeps 0.
_USED = {"type": 4, "present": 1, "dpl": 2, "db": 1, "s": 1, "l": 1, "g": 1, "avl": 1, "unusable": 1, "cr8": 4}


def _sregs() -> Iterable[Register]:
    for index, segment in enumerate(layouts.SEGMENTS):
        for field, (bits, offset) in layouts.SEGMENT_FIELDS.items():
            name = segment if field == "selector" else f"{segment}.{field}"
            at = index * layouts.SEGMENT.size + offset
            yield Register(name, bits, "sregs", at, used=_USED.get(field, bits))
    for index, table in enumerate(layouts.TABLES):
        at = layouts.GDTR + index * layouts.TABLE.size
        yield Register(f"{table}.base", 64, "sregs", at)
        yield Register(f"{table}.limit", 16, "sregs", at + 8)
    for index, name in enumerate(layouts.CONTROL):
        yield Register(name, 64, "sregs", layouts.CONTROL_AT + 8 * index, used=_USED.get(name, 64))


_ROWS = (
    *(Register(name, 64, "regs", 8 * index) for index, name in enumerate(layouts.GENERAL)),
    *_sregs(),
    *(Register(name, 64, "debugregs", offset) for name, offset in layouts.DEBUGREGS_FIELDS.items()),
    Register("xcr0", 64, "xcrs", layouts.XCR0),
    *(Register(name, bits, "fpu", offset) for name, (bits, offset) in layouts.FPU_FIELDS.items()),
    *(
        Ymm(f"ymm{n}", 256, "xsave", layouts.XSAVE_XMM + 16 * n, high=layouts.XSAVE_YMM_HIGH + 16 * n)
        for n in range(16)
    ),
)

REGISTERS: Mapping[str, Register] = {row.name: row for row in _ROWS}

_EQUALS = re.compile(r"\s*=\s*")
_MSR = re.compile(r"msr\.0x([0-9a-f]{1,8})", re.ASCII)


def msr_name(index: int) -> str:
    """The file name of an MSR."""
    return f"msr.{index:#x}"


def parse_msr(name: str) -> int | None:
    """The number of the MSR that `name` names in its one spelling (`msr.0x10`), or None."""
    match = _MSR.fullmatch(name)
    if not match or name != msr_name(int(match[1], 16)):
        return None
    return int(match[1], 16)


def msr_text(value: int) -> str:
    """The value of an MSR as the files show it."""
    return f"{value:#018x}"


class RegisterFile(Protocol):
    """What registers are read from and written to: `vmfs.engine.base.Vcpu` is one."""

    def get_state(self, name: str) -> bytes: ...
    def set_state(self, name: str, data: bytes) -> None: ...
    def get_msr(self, index: int) -> int: ...
    def set_msr(self, index: int, value: int) -> None: ...


def read_register(cpu: RegisterFile, name: str) -> str:
    """The text of one register or MSR; KeyError where there is none of that name."""
    msr = parse_msr(name)
    if msr is not None:
        return msr_text(cpu.get_msr(msr))
    row = REGISTERS[name]
    return row.text(row.get(cpu.get_state(row.state)))


def has_avx(cpu: RegisterFile) -> bool:
    """By its CPUID (leaf 1, ECX bit 28), and that its XSAVE area has the place for it."""
    try:
        for function, _, _, _, _, ecx, _ in layouts.cpuid_entries(cpu.get_state("cpuid")):
            if function == 1:
                return bool(ecx >> 28 & 1) and len(cpu.get_state("xsave")) >= layouts.XSAVE_AVX_END
    except Unsupported:
        pass
    return False


def there_are(cpu: RegisterFile, rows: Iterable[Register]) -> list[Register]:
    """Those of rows that the CPU has, as far as AVX goes."""
    rows = list(rows)
    return rows if has_avx(cpu) else [row for row in rows if not isinstance(row, Ymm)]


def dump_registers(cpu: RegisterFile) -> str:
    """Every register that the engine has, a line each: `rax 0x0000000000000000`."""
    blobs: dict[str, bytes | None] = {}
    lines = []
    for row in there_are(cpu, REGISTERS.values()):
        if row.state not in blobs:
            blobs[row.state] = _state_or_none(cpu, row.state)
        blob = blobs[row.state]
        if blob is not None:
            lines.append(f"{row.name} {row.text(row.get(blob))}\n")
    return "".join(lines)


def _state_or_none(cpu: RegisterFile, state: str) -> bytes | None:
    try:
        return cpu.get_state(state)
    except Unsupported:
        return None


def parse_registers(text: str) -> dict[str, int]:
    """Lines of `NAME VALUE` or `NAME=VALUE`, one or more a line, as values by name. Empty lines and `#` comments are
    allowed.

    A name may stand once only: with two values for one register, either order would be a guess.
    """
    values: dict[str, int] = {}
    if not text.strip():
        raise Invalid("no register is named")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            for name, value in _assignments(line):
                if name in values:
                    raise Invalid(f"{name} is set twice")
                values[name] = _parse_value(name, value)
        except Invalid as error:
            error.line = number
            raise
    return values


def _assignments(line: str) -> Iterable[tuple[str, str]]:
    words = iter(_EQUALS.sub("=", line.split("#", 1)[0]).split())
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            value = next(words, "")
        if not name or not value or "=" in value:
            raise Invalid(f"{line.strip()[:60]!r} is not NAME VALUE")
        yield name, value


def _parse_value(name: str, value: str) -> int:
    if parse_msr(name) is not None:
        return parse_number(value, what=name)
    if name not in REGISTERS:
        raise Invalid(f"there is no register {name[:40]!r}")
    return REGISTERS[name].parse(value)


def write_registers(cpu: RegisterFile, values: Mapping[str, int]) -> None:
    """Set registers as one change: when the engine refuses a part of it, what was set before is set back.

    YMM registers come last, because `fpu` has their lower halves, too.
    """
    by_state: dict[str, list[tuple[Register, int]]] = {}
    msrs: dict[int, int] = {}
    for name, value in values.items():
        msr = parse_msr(name)
        if msr is not None:
            msrs[msr] = value
            continue
        row = REGISTERS[name]
        if isinstance(row, Ymm):
            low = values.get(name.replace("y", "x", 1), value)
            if (low ^ value) & (1 << 128) - 1:
                raise Invalid(f"{name} and {name.replace('y', 'x', 1)} say different things")
        by_state.setdefault(row.state, []).append((row, value))
    before = {state: cpu.get_state(state) for state in by_state}
    msrs_before = {index: cpu.get_msr(index) for index in msrs}

    states_set: list[str] = []
    msrs_set: list[int] = []
    try:
        for state in sorted(by_state, key=lambda name: name == "xsave"):
            states_set.append(state)
            blob = bytearray(cpu.get_state(state) if state == "xsave" else before[state])
            for row, value in by_state[state]:
                row.put(blob, value)
            cpu.set_state(state, bytes(blob))
        for index, value in msrs.items():
            msrs_set.append(index)
            cpu.set_msr(index, value)
    except VmfsError:
        for index in reversed(msrs_set[:-1]):
            cpu.set_msr(index, msrs_before[index])
        done = states_set if msrs_set else states_set[:-1]  # the one that was refused has changed nothing
        for state in reversed(done):
            cpu.set_state(state, before[state])
        raise
