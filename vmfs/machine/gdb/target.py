"""What gdb is told of the CPU: layouts of registers, a row a register, and the XML that describes them.

A layout is fixed for a session, so that one session goes from real to protected to long mode: `x86-64` has every
register at its full width in any mode. `i386` and `i8086` are the lower 32 bits, for a gdb that disassembles 32- and
16-bit code by them.

The names of the features and of the registers in them are gdb's (GDB manual, appendix G.5.5, "i386 Features"); the
feature `org.vmfs.system` has the registers that no program but a kernel uses, by their names in REGISTERS with an
underscore in the place of a dot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol
from xml.sax.saxutils import quoteattr

from vmfs.words import layouts
from vmfs.words.errors import Invalid
from vmfs.words.layouts import put_quad, quad
from vmfs.words.modes import CodeMode
from vmfs.words.registers import REGISTERS, msr_name, parse_msr

KERNEL_GS_BASE = msr_name(0xC000_0102)
_MASK = (1 << 64) - 1


class Cpu(Protocol):
    """What registers are read from: `vmfs.engine.base.Vcpu` is one."""

    def get_state(self, name: str) -> bytes: ...
    def get_msr(self, index: int) -> int: ...


class States:
    """A CPU that stands still; each state is got once."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._blobs: dict[str, bytes] = {}

    def blob(self, state: str) -> bytes:
        if state not in self._blobs:
            self._blobs[state] = self._cpu.get_state(state)
        return self._blobs[state]

    get_state = blob  # so that it can be taken for a CPU

    def value(self, name: str) -> int:
        """Of a row of REGISTERS, or of an MSR."""
        row = REGISTERS.get(name)
        if row is not None:
            return row.get(self.blob(row.state))
        index = parse_msr(name)
        if index is None:
            raise KeyError(name)
        return self._cpu.get_msr(index)


Change = Mapping[str, int]  # names of REGISTERS (or of MSRs, or `ymmNh`) and their values


@dataclass(frozen=True, slots=True)
class Register:
    """A register as gdb has it. `put` says what of REGISTERS is set to set it."""

    name: str
    bits: int
    type: str
    feature: str
    get: Callable[[States], int]
    put: Callable[[States, int], Change]
    group: str = ""
    where: tuple[str, int, int] | None = None  # it is these bytes of a state, and zeros: state, first, end

    @property
    def size(self) -> int:
        return self.bits // 8

    def read(self, states: States) -> bytes:
        """In the byte order of the guest."""
        if self.where is None:
            return self.get(states).to_bytes(self.size, "little")
        state, first, end = self.where
        return states.blob(state)[first:end].ljust(self.size, b"\0")


# ---- features

CORE, SSE, SEGMENTS, AVX = (f"org.gnu.gdb.i386.{name}" for name in ("core", "sse", "segments", "avx"))
SYSTEM = "org.vmfs.system"

_GENERAL_64 = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip".split()
_GENERAL_32 = "eax ecx edx ebx esp ebp esi edi eip".split()
_SELECTORS = "cs ss ds es fs gs".split()


def _plain(name: str, row: str, bits: int, type_: str, feature: str, group: str = "") -> Register:
    """A register of REGISTERS (or an MSR), or its lower `bits` bits: setting those keeps the others."""
    width = REGISTERS[row].bits if row in REGISTERS else 64
    mask = (1 << bits) - 1

    def get(states: States) -> int:
        return states.value(row) & mask

    def put(states: States, value: int) -> Change:
        kept = states.value(row) & ~mask if bits < width else 0
        return {row: kept | value & (1 << width) - 1}

    known = REGISTERS.get(row)
    where = known and (known.state, known.offset, known.offset + min(known.size, bits // 8))
    return Register(name, bits, type_, feature, get, put, group, where)


def _x87() -> Iterator[Register]:
    """st0 to st7, and the control registers as FSAVE has them, each 32 bits wide (gdb's i387)."""
    for number in range(8):
        yield _plain(f"st{number}", f"st{number}", 80, "i387_ext", CORE)
    yield _plain("fctrl", "fcw", 32, "int", CORE, "float")
    yield _plain("fstat", "fsw", 32, "int", CORE, "float")
    yield Register("ftag", 32, "int", CORE, _full_tags, _abridged_tags, "float")
    # An FXSAVE image of 64-bit mode has 64-bit pointers; gdb has the selector where their bits 32 to 47 are.
    for selector, offset, row in (("fiseg", "fioff", "fip"), ("foseg", "fooff", "fdp")):
        yield _part(selector, row, 32, 0xFFFF)
        yield _part(offset, row, 0, 0xFFFF_FFFF)
    yield _plain("fop", "fop", 32, "int", CORE, "float")


def _part(name: str, row: str, shift: int, mask: int) -> Register:
    def get(states: States) -> int:
        return states.value(row) >> shift & mask

    def put(states: States, value: int) -> Change:
        return {row: states.value(row) & ~(mask << shift) & _MASK | (value & mask) << shift}

    return Register(name, 32, "int", CORE, get, put, "float")


def _full_tags(states: States) -> int:
    """Two bits a physical register: 0 valid, 1 zero, 2 special, 3 empty (Intel SDM 1 8.1.7, 10.5.1.1)."""
    top = states.value("fsw") >> 11 & 7
    used = states.value("ftw")
    tags = 0
    for number in range(8):
        tag = 3
        if used >> number & 1:
            value = states.value(f"st{number - top & 7}")
            exponent, fraction = value >> 64 & 0x7FFF, value & _MASK
            if exponent == 0x7FFF:
                tag = 2
            elif exponent:
                tag = 0 if fraction >> 63 else 2
            else:
                tag = 2 if fraction else 1
        tags |= tag << 2 * number
    return tags


def _abridged_tags(_states: States, value: int) -> Change:
    return {"ftw": sum(1 << number for number in range(8) if value >> 2 * number & 3 != 3)}


def _sse(count: int) -> Iterator[Register]:
    for number in range(count):
        yield _plain(f"xmm{number}", f"xmm{number}", 128, "vec128", SSE)
    yield _plain("mxcsr", "mxcsr", 32, "i386_mxcsr", SSE, "vector")


def _avx(count: int) -> Iterator[Register]:
    for number in range(count):

        def get(states: States, at: int = layouts.XSAVE_YMM_HIGH + 16 * number) -> int:
            area = states.blob("xsave")
            in_use = quad(area, layouts.XSAVE_STATE_BV)
            return int.from_bytes(area[at : at + 16], "little") if in_use & layouts.XSAVE_AVX else 0

        def put(_states: States, value: int, name: str = f"ymm{number}h") -> Change:
            return {name: value}

        yield Register(f"ymm{number}h", 128, "uint128", AVX, get, put)


def set_ymm_highs(area: bytes, values: Mapping[int, int]) -> bytes:
    """An XSAVE area with the upper halves of some YMM registers set."""
    new = bytearray(area)
    in_use = quad(new, layouts.XSAVE_STATE_BV)
    if not in_use & layouts.XSAVE_AVX:  # in their initial state, and the bytes there mean nothing
        new[layouts.XSAVE_YMM_HIGH : layouts.XSAVE_AVX_END] = bytes(256)
        put_quad(new, layouts.XSAVE_STATE_BV, in_use | layouts.XSAVE_AVX)
    for number, value in values.items():
        at = layouts.XSAVE_YMM_HIGH + 16 * number
        new[at : at + 16] = value.to_bytes(16, "little")
    return bytes(new)


_SYSTEM_ROWS = (
    *"cr0 cr2 cr3 cr4 cr8 efer xcr0 apic_base".split(),
    *(f"{table}.{field}" for table in ("gdtr", "idtr") for field in ("base", "limit")),
    *("tr", "tr.base", "tr.limit", "ldtr", "ldtr.base", "ldtr.limit"),
    *(f"{segment}.{field}" for segment in ("cs", "ss", "ds", "es") for field in ("base", "limit")),
    *("fs.limit", "gs.limit"),
    *"dr0 dr1 dr2 dr3 dr6 dr7".split(),
)
_SYSTEM_TYPES = {"cr0": "vmfs_cr0", "cr4": "vmfs_cr4", "efer": "vmfs_efer"}


def _system(bits: int) -> Iterator[Register]:
    for row in _SYSTEM_ROWS:
        width = min(-(-REGISTERS[row].bits // 16) * 16, bits)
        type_ = _SYSTEM_TYPES.get(row, "data_ptr" if row.endswith(".base") and width == bits else f"uint{width}")
        yield _plain(row.replace(".", "_"), row, width, type_, SYSTEM, "system")


# Fields of the types that are flags: name, first bit, last bit; and the size in bytes, 0 for that of an address.
# Intel SDM 1 3.4.3, 10.2.3; 3A 2.5, 2.2.1. gdb shows bits without a field as unknown, so the one that is always 1
# has an empty name.
def _bits(names: str) -> tuple[tuple[str, int, int], ...]:
    return tuple((name, bit, bit) for bit, name in enumerate(names.split()) if name != "_")


def _at(first: int, names: str) -> tuple[tuple[str, int, int], ...]:
    return tuple((name, first + bit, first + bit) for name, bit, _ in _bits(names))


_FLAGS: Mapping[str, tuple[int, tuple[tuple[str, int, int], ...]]] = {
    "i386_eflags": (
        4,
        (
            ("CF", 0, 0),
            ("", 1, 1),
            *_at(2, "PF _ AF _ ZF SF TF IF DF OF"),
            ("IOPL", 12, 13),
            *_at(14, "NT _ RF VM AC VIF VIP ID"),
        ),
    ),
    "i386_mxcsr": (4, (*_bits("IE DE ZE OE UE PE DAZ IM DM ZM OM UM PM"), ("RC", 13, 14), ("FZ", 15, 15))),
    "vmfs_cr0": (0, (*_bits("PE MP EM TS ET NE"), *_at(16, "WP _ AM"), *_at(29, "NW CD PG"))),
    "vmfs_cr4": (
        0,
        (
            *_bits("VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT UMIP LA57 VMXE SMXE"),
            *_at(16, "FSGSBASE PCIDE OSXSAVE KL SMEP SMAP PKE CET PKS"),
        ),
    ),
    "vmfs_efer": (0, (("SCE", 0, 0), *_at(8, "LME _ LMA NXE SVME LMSLE FFXSR"))),
}

_VECTOR = (  # gdb's own view of a 128-bit register
    ("v4_float", "ieee_single", 4),
    ("v2_double", "ieee_double", 2),
    ("v16_int8", "int8", 16),
    ("v8_int16", "int16", 8),
    ("v4_int32", "int32", 4),
    ("v2_int64", "int64", 2),
)


# ---- layouts


@dataclass(frozen=True, slots=True)
class Layout:
    """The registers in the order of their numbers, which is that of a `g` packet."""

    name: str
    architecture: str
    bits: int  # of an address
    registers: tuple[Register, ...]
    pc: int  # number of the instruction pointer
    expedited: tuple[int, ...]  # what a stop reply has, so that gdb need not ask

    def xml(self) -> str:
        """target.xml."""
        lines = [
            '<?xml version="1.0"?>',
            '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
            "<target>",
            f"<architecture>{self.architecture}</architecture>",
        ]
        for feature in dict.fromkeys(register.feature for register in self.registers):
            rows = [register for register in self.registers if register.feature == feature]
            lines.append(f"<feature name={quoteattr(feature)}>")
            lines += _types(dict.fromkeys(row.type for row in rows), self.bits)
            for row in rows:
                group = f" group={quoteattr(row.group)}" if row.group else ""
                lines.append(
                    f'<reg name={quoteattr(row.name)} bitsize="{row.bits}" type={quoteattr(row.type)}{group}/>'
                )
            lines.append("</feature>")
        lines.append("</target>")
        return "\n".join(lines) + "\n"


def _types(names: Iterable[str], bits: int) -> Iterator[str]:
    for name in names:
        if name in _FLAGS:
            size, flags = _FLAGS[name]
            yield f'<flags id="{name}" size="{size or bits // 8}">'
            for flag, first, last in flags:
                yield f'<field name="{flag}" start="{first}" end="{last}"/>'
            yield "</flags>"
        elif name == "vec128":
            for vector, element, count in _VECTOR:
                yield f'<vector id="{vector}" type="{element}" count="{count}"/>'
            yield '<union id="vec128">'
            for vector, _, _ in _VECTOR:
                yield f'<field name="{vector}" type="{vector}"/>'
            yield '<field name="uint128" type="uint128"/>'
            yield "</union>"


def _flat(bits: int) -> Iterator[Register]:
    if bits == 64:
        for name in _GENERAL_64:
            type_ = {"rip": "code_ptr", "rsp": "data_ptr", "rbp": "data_ptr"}.get(name, "int64")
            yield _plain(name, name, 64, type_, CORE, "general")
    else:
        for name in _GENERAL_32:
            type_ = {"eip": "code_ptr", "esp": "data_ptr", "ebp": "data_ptr"}.get(name, "int32")
            yield _plain(name, f"r{name[1:]}", 32, type_, CORE, "general")
    yield _plain("eflags", "rflags", 32, "i386_eflags", CORE, "general")
    for name in _SELECTORS:
        yield _plain(name, name, 32, "int32", CORE, "general")
    yield from _x87()
    yield from _sse(16 if bits == 64 else 8)
    if bits == 64:
        for name in ("fs", "gs"):
            yield _plain(f"{name}_base", f"{name}.base", 64, "int", SEGMENTS, "system")
        yield _plain("k_gs_base", KERNEL_GS_BASE, 64, "int", SYSTEM, "system")
    else:
        for name in ("fs", "gs"):
            yield _plain(f"{name}_base", f"{name}.base", 32, "data_ptr", SYSTEM, "system")
    yield from _system(bits)


def _linear(pc: Register) -> Register:
    def code(states: States) -> CodeMode:
        return CodeMode.of(states.blob("regs"), states.blob("sregs"))

    def get(states: States) -> int:
        return code(states).address & (1 << pc.bits) - 1

    def put(states: States, value: int) -> Change:
        return {"rip": code(states).ip_of(value)}

    return replace(pc, get=get, put=put, where=None)


# Names of layouts, and gdb's names of their architectures.
LAYOUTS: Mapping[str, tuple[str, int]] = {
    "x86-64": ("i386:x86-64", 64),
    "i386": ("i386", 32),
    "i8086": ("i8086", 32),
}
DEFAULT = "x86-64"


def layout(name: str, *, avx: bool, linear: bool = False) -> Layout:
    """A row of LAYOUTS; `avx`: with the upper halves of the YMM registers. Invalid for a name that is none.

    `linear`: the instruction pointer is a linear address, CS's base included, as gdb expects it in code whose
    segment does not begin at 0.
    """
    if name not in LAYOUTS:
        raise Invalid(f"there is no register layout {name[:40]!r}: {', '.join(LAYOUTS)}")
    architecture, bits = LAYOUTS[name]
    registers = [_linear(row) if linear and row.type == "code_ptr" else row for row in _flat(bits)]
    if avx:
        registers += _avx(16 if bits == 64 else 8)
    numbers = {register.name: number for number, register in enumerate(registers)}
    letter = "r" if bits == 64 else "e"
    # The instruction, stack and frame pointers, the flags.
    expedited = tuple(numbers[one] for one in (f"{letter}ip", f"{letter}sp", f"{letter}bp", "eflags"))
    return Layout(name, architecture, bits, tuple(registers), expedited[0], expedited)
