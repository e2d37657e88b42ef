"""Why a machine has shut down, or was reset: what its CPUs did last, as it was at that moment, and as text.

An `Account` is taken once, when a run ends so; it is made text when somebody reads it, with the symbols that there are
then. Sources: Intel SDM 3A 6.13 (error codes), 4.7 (those of page faults), 6.15 (double fault, shutdown).
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vmfs.debug.disasm import LONGEST, disassemble
from vmfs.debug.symbols import SymbolTable
from vmfs.engine.base import Fault, Step, Vcpu
from vmfs.words.errors import VmfsError
from vmfs.words.exits import Exit, Shutdown
from vmfs.words.modes import CodeMode
from vmfs.words.registers import REGISTERS
from vmfs.words.stops import EXCEPTIONS

STEPS = 32
_NAMES = {vector: name for name, vector in EXCEPTIONS.items()}
_DOUBLE_FAULT = EXCEPTIONS["#DF"]
_WITH_SELECTOR = {EXCEPTIONS[name] for name in ("#TS", "#NP", "#SS", "#GP")}
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_SHOWN = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rip", "rflags"),
    *(f"{segment}{field}" for segment in _SEGMENTS for field in ("", ".base", ".limit")),
    *("gdtr.base", "gdtr.limit", "idtr.base", "idtr.limit"),
    *("cr0", "cr2", "cr3", "cr4", "efer", "dr6", "dr7"),
)
_EFER_LMA = 1 << 10
_CR0_PE = 1
_EVENTS = struct.Struct("<4BI")  # the beginning of struct kvm_vcpu_events: injected, nr, has_error_code, pending, error

Reader = Callable[[Vcpu, int, int], bytes]  # of a CPU, up to so many bytes from a linear address on


@dataclass(frozen=True, slots=True)
class CpuAccount:
    """What one CPU did last, and how it stands. None: the engine does not tell."""

    index: int
    instructions: int | None
    faults: Sequence[Fault] | None
    steps: Sequence[Step] | None
    exits: Sequence[Exit] | None
    registers: dict[str, int]
    stands: Step  # before this instruction
    injected: tuple[int, int | None] | None  # an exception that KVM was delivering: vector, error code

    @staticmethod
    def of(cpu: Vcpu, read: Reader) -> CpuAccount:
        blobs: dict[str, bytes | None] = {}
        registers = {}
        for name in _SHOWN:
            row = REGISTERS.get(name)
            if row is not None:
                if row.state not in blobs:
                    blobs[row.state] = _state(cpu, row.state)
                blob = blobs[row.state]
                if blob is not None:
                    registers[name] = row.get(blob)
        code = CodeMode.of(cpu.get_state("regs"), cpu.get_state("sregs"))
        steps = cpu.last_steps(STEPS)
        if steps is not None:
            steps = [step if step.code else step._replace(code=read(cpu, step.linear, LONGEST)) for step in steps]
        injected = None
        events = _state(cpu, "events")
        if cpu.last_faults() is None and events is not None:
            is_injected, vector, has_error, pending, error = _EVENTS.unpack_from(events)
            if is_injected or pending:
                injected = vector, error if has_error else None
        at_rip = read(cpu, code.address, LONGEST) or next(  # its page tables may be gone: what it has executed there
            (step.code for step in reversed(steps or ()) if step.linear == code.address), b""
        )
        stands = Step(code.address, code.ip, code.bits, at_rip)
        done = cpu.counters().get("instructions")
        faults = _on_the_way(cpu.last_faults())
        return CpuAccount(cpu.index, done, faults, steps, cpu.last_exits(), registers, stands, injected)


def _on_the_way(faults: Sequence[Fault] | None) -> Sequence[Fault] | None:
    """The last ones that led to where the CPU is: those before were raised on another way, when it was put back to a
    place before them (`goto`, a search through its past, `restore`)."""
    start = len(faults or ())
    while faults and start and (start == len(faults) or faults[start - 1].instructions <= faults[start].instructions):
        start -= 1
    return faults and faults[start:]


def _state(cpu: Vcpu, name: str) -> bytes | None:
    with contextlib.suppress(VmfsError):
        return cpu.get_state(name)
    return None


@dataclass(frozen=True, slots=True)
class Account:
    """Of a machine: the exit, and its CPUs, that of the exit first."""

    exit: Exit
    cpus: Sequence[CpuAccount]

    @staticmethod
    def of(exit_: Exit, cpus: Sequence[Vcpu], read: Reader) -> Account:
        ordered = sorted(cpus, key=lambda cpu: (cpu.index != exit_.cpu, cpu.index))
        return Account(exit_, [CpuAccount.of(cpu, read) for cpu in ordered])

    def text(self, symbols: SymbolTable) -> str:
        return "\n".join(self._sections(symbols))

    def _sections(self, symbols: SymbolTable) -> Iterator[str]:
        first, *others = self.cpus
        label = symbols.label(first.stands.linear)
        head = f"{self.exit.line()}{' ' if label else ''}{label}\n"
        yield head + ("" if first.instructions is None else f"instructions {first.instructions}\n")
        is_fault = isinstance(self.exit, Shutdown) and self.exit.cause == "triple-fault"
        yield from _cpu_sections(first, is_fault, symbols)
        for cpu in others:
            yield f"cpu {cpu.index}:\n"
            yield from _cpu_sections(cpu, False, symbols)


_PLACES = re.compile(r"\bat=0x([0-9a-f]+)|^0x([0-9a-f]+)\b")

_SOURCE = re.compile(r"  \[[^] ]+:\d+\]$")


def _place(line: str) -> int | None:
    """The address of an instruction that a line is about."""
    match = _PLACES.search(line)
    return None if match is None else int(match[1] or match[2], 16)


def places_in(text: str) -> set[int]:
    return {place for line in text.splitlines() if (place := _place(line)) is not None}


def with_sources(text: str, source_of: Callable[[int], str | None]) -> str:
    """Lines about an instruction end with where in a source it is, in brackets, if that is known and not there yet."""
    lines = []
    for line in text.splitlines():
        place = None if _SOURCE.search(line) else _place(line)
        source = None if place is None else source_of(place)
        lines.append(f"{line}  [{source}]" if source else line)
    return "".join(f"{line}\n" for line in lines)


def _exit_line(exit_: Exit, symbols: SymbolTable) -> str:
    return f"{exit_.line()} {symbols.label(exit_.rip)}".rstrip() + "\n"


def _cpu_sections(cpu: CpuAccount, is_fault: bool, symbols: SymbolTable) -> Iterator[str]:
    chain: Sequence[Fault] = []
    before = list(cpu.faults or ())
    if is_fault and before and before[-1].becomes is None:
        start = len(before) - 1
        while start and before[start].within == "exception":
            start -= 1
        before, chain = before[:start], before[start:]
    if is_fault:
        yield "faults:\n" + (_lines(cpu, chain, symbols) or _unknown_faults(cpu))
    if before:
        yield "exceptions before:\n" + _lines(cpu, before, symbols)
    registers = cpu.registers | ({"cr2": chain[0].cr2} if chain else {})
    yield "registers:\n" + "".join(f"{name} {REGISTERS[name].text(value)}\n" for name, value in registers.items())
    if cpu.exits:
        yield "exits:\n" + "".join(_exit_line(exit_, symbols) for exit_ in cpu.exits)
    yield "instructions:\n" + _steps_text(cpu, symbols)


def _unknown_faults(cpu: CpuAccount) -> str:
    if cpu.injected is None:
        return "# KVM does not tell which; the registers are those that it leaves. The emulator knows: `engine`\n"
    vector, error = cpu.injected
    code = "" if error is None else f" error={error:#x}"
    return f"exception vector={vector:#x}{code}  # {_name(vector)}, which KVM was delivering\n"


def _lines(cpu: CpuAccount, faults: Sequence[Fault], symbols: SymbolTable) -> str:
    return "".join(f"{_fault_line(fault, symbols)}  # {_sentence(cpu, fault)}\n" for fault in faults)


def _fault_line(fault: Fault, symbols: SymbolTable) -> str:
    label = symbols.label(fault.linear)
    words = [
        "exception",
        f"vector={fault.vector:#x}",
        "" if fault.error is None else f"error={fault.error:#x}",
        "" if fault.address is None else f"addr={fault.address:#x}",
        f"at={fault.linear:#x}",
        f"rsp={fault.rsp:#x}",
        f"instruction={fault.instructions}",
        label,
    ]
    return " ".join(word for word in words if word)


def _sentence(cpu: CpuAccount, fault: Fault) -> str:
    """What a fault is about, where it came, and what comes of it."""
    parts = [_name(fault.vector)]
    if fault.address is not None and fault.error is not None:
        parts[0] += f": {_page_fault(fault.error, fault.address, fault.linear)}"
    elif fault.vector in _WITH_SELECTOR and fault.error:
        parts[0] += f": {_selector(cpu, fault.error)}"
    elif fault.error is None and fault.within and fault.delivering is not None:
        parts[0] += _beyond(cpu, fault.delivering)
    if fault.within and fault.delivering is not None:
        of = {"interrupt": f"interrupt {fault.delivering:#x}", "software": f"INT {fault.delivering:#x}"}
        parts.append(f"in the delivery of {of.get(fault.within, _name(fault.delivering))}")
    if fault.becomes is None:
        parts.append("so the CPU shuts down")
    elif fault.becomes == _DOUBLE_FAULT != fault.vector:
        parts.append("so a double fault")
    return ", ".join(parts)


def _name(vector: int) -> str:
    return _NAMES.get(vector, f"exception {vector:#x}")


def _page_fault(error: int, address: int, linear: int) -> str:
    is_fetch = error & 16 or address == linear  # the bit is there with NX or SMEP only
    what = "a fetch from" if is_fetch else "a write to" if error & 2 else "a read of"
    why = "a reserved bit is set" if error & 8 else "which is not allowed" if error & 1 else "which is not mapped"
    return f"{what} {address:#x} in {'user' if error & 4 else 'kernel'} mode, {why}"


def _selector(cpu: CpuAccount, error: int) -> str:
    """SDM 3A 6.13."""
    if error & 2:
        return f"entry {error >> 3:#x} of the IDT{_beyond(cpu, error >> 3)}"
    return f"selector {error & 0xFFFC:#x}, entry {error >> 3:#x} of the {'LDT' if error & 4 else 'GDT'}"


def _beyond(cpu: CpuAccount, vector: int) -> str:
    registers = cpu.registers
    size = 16 if registers.get("efer", 0) & _EFER_LMA else 8 if registers.get("cr0", 0) & _CR0_PE else 4
    limit = registers.get("idtr.limit", 0xFFFF)
    return f", which has no entry {vector:#x} (its limit is {limit:#x})" if vector * size + size - 1 > limit else ""


def _steps_text(cpu: CpuAccount, symbols: SymbolTable) -> str:
    if cpu.steps is None:
        lines = ["# KVM does not tell which it has executed\n"]
    else:
        lines = [_step_line(step, symbols) for step in cpu.steps]
        if len(cpu.steps) < STEPS and cpu.instructions != len(cpu.steps):
            lines.insert(0, "# which came before these is not certain\n")
    return "".join(lines) + _step_line(cpu.stands, symbols, "  # where it stands: not executed")


def _step_line(step: Step, symbols: SymbolTable, more: str = "") -> str:
    base = step.linear - step.ip & 0xFFFFFFFF if step.bits != 64 else 0
    found = disassemble(
        lambda at, length: step.code[at - step.linear : at - step.linear + length],
        *(step.linear, step.bits, 1),
        base=base,
        symbols=symbols,
    )
    label = symbols.label(step.linear)
    width = 16 if step.bits == 64 else 8
    head = f"0x{step.linear:0{width}x}{f' <{label}>' if label else ''}:"
    if not found:
        return f"{head} not mapped to RAM or ROM{more}\n"
    return f"{head} {found[0].code.hex(' '):<24} {found[0].text}{more}\n"
