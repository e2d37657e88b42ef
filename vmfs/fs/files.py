"""FILES: the directory of a machine, a row a file; ROOT_FILES: those of the mount. A new file is a row."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import trio

from vmfs import __version__
from vmfs.engine import EngineInfo, by_name
from vmfs.engine.base import Vcpu, has_state
from vmfs.fs.commands import parse_command, parse_commands
from vmfs.fs.console import Console
from vmfs.fs.debug_files import Core, Symbols, Virt, disasm, pagetable, set_disasm, stack, symbols_elf, symbols_elf_size
from vmfs.fs.gdb_files import GdbFile, GdbStream
from vmfs.fs.hooks import status
from vmfs.fs.inodes import Kind
from vmfs.fs.kinds import AccessData, ImageFile, Irq, State, Text, VmRun
from vmfs.fs.memory_file import Mem
from vmfs.fs.scopes import MachineScope, RootScope
from vmfs.fs.screen_files import Framebuffer, screen_picture, screen_text, type_keys
from vmfs.fs.trace_file import TraceFile
from vmfs.fs.waiting import finished
from vmfs.machine.memory import PAGE
from vmfs.words.errors import Busy, Invalid, Unsupported
from vmfs.words.exits import Exit
from vmfs.words.modes import check_mode
from vmfs.words.numbers import parse_number, parse_size
from vmfs.words.registers import (
    REGISTERS,
    dump_registers,
    msr_name,
    parse_msr,
    parse_registers,
    read_register,
    write_registers,
)


@dataclass(frozen=True, slots=True)
class Row:
    """A file. `mode`: its permission bits, before the maker's umask. `per_cpu`: it stands in cpuN/, too."""

    name: str
    mode: int
    kind: Kind
    per_cpu: bool = False


# ---- what rows read and write


def _registers(scope: MachineScope) -> Future[str]:
    return scope.vm.at_boundary(dump_registers)


def _set_registers(scope: MachineScope, text: str) -> None:
    values = parse_registers(text)
    if scope.vm.state != "running":  # then it is Busy
        # Before `change`, which completes a pending access: whether there are such MSRs.
        scope.vm.at_boundary(lambda cpu: [read_register(cpu, name) for name in values]).result()
    scope.vm.change(lambda cpu: write_registers(cpu, values))


def _set_debug(scope: MachineScope, text: str) -> Future[None]:
    return scope.vm.set_points(parse_commands("debug", text, scope.vm.symbols.address_of))


def _set_state(scope: MachineScope, text: str) -> Any:
    return parse_command("state", text)(scope.vm)


def _exit_line(scope: MachineScope) -> str:
    last = scope.vm.last_exit
    return "" if last is None else f"{last.line()}\n"


def _exit_struct(scope: MachineScope) -> bytes:
    last = scope.vm.last_exit
    return b"" if last is None else last.pack()


def _stat(scope: MachineScope) -> str:
    counted: dict[str, object] = {
        **scope.vm.counters(),
        "memory_bytes": scope.vm.memory.size,
        "trace": scope.vm.trace.settings.line(),
        "trace_events": scope.vm.trace.buffer.events,
        "trace_dropped": scope.vm.trace.buffer.dropped,
        "memory_served_by": scope.memory.way,
        "signals_noticed_by": "interrupt-message" if status().interrupts else "watch",
    }
    return "".join(f"{key} {value}\n" for key, value in counted.items())


def _take_dirty(scope: MachineScope) -> bytes:
    return scope.vm.take_dirty("file")


def _dirty_size(scope: MachineScope) -> int:
    return (scope.vm.memory.size // PAGE + 7) // 8


def _set_mem_size(scope: MachineScope, text: str) -> None:
    scope.host.resize_memory(scope.vm, parse_size(text.strip(), what="mem_size"))


async def _set_engine(scope: MachineScope, text: str) -> None:
    name = text.strip()
    engine = by_name(name)
    if scope.vm.state == "running":
        raise Busy("the machine is running")
    if name == scope.vm.engine.name:
        return

    def move() -> None:  # in a thread: to probe an engine and to end a machine take a moment
        availability = engine.probe()
        if not availability.available:
            raise Unsupported(f"the engine {name} does not work here: {availability.reason}")
        scope.vm.move_to(engine)

    await trio.to_thread.run_sync(move)
    scope.forget_sizes()


async def _mode(scope: MachineScope) -> str:
    mode = scope.vm.mode()
    await finished(mode, scope)
    return f"{mode.result()}\n"


async def _set_mode(scope: MachineScope, text: str) -> None:
    mode = text.strip()
    check_mode(mode)
    async with scope.memory.change():
        scope.vm.set_mode(mode)


def _set_machine(scope: MachineScope, text: str) -> None:
    scope.vm.set_machine(text.strip())
    scope.forget_sizes()


def _set_cmdline(scope: MachineScope, text: str) -> None:
    if scope.vm.state == "running":
        raise Busy("the machine is running")
    scope.vm.images.cmdline = text.removesuffix("\n")


def _complaint(scope: MachineScope) -> str:
    return f"{scope.complaint}\n" if scope.complaint else ""


def _news_of_exits(scope: MachineScope) -> int:
    return scope.vm.exit_number


def _news_of_state(scope: MachineScope) -> int:
    return scope.changes


# ---- the tables

FILES: tuple[Row, ...] = (
    # running
    Row("vm_run", 0o666, VmRun(lambda exit_: f"{exit_.line()}\n".encode())),
    Row("vm_run.bin", 0o666, VmRun(Exit.pack)),
    Row("exit", 0o444, Text(get=_exit_line, news=_news_of_exits)),
    Row("exit.bin", 0o444, Text(get=_exit_struct, news=_news_of_exits)),
    Row("exit.data", 0o666, AccessData()),
    Row("state", 0o666, Text(lambda scope: f"{scope.vm.state}\n", _set_state, news=_news_of_state)),
    Row("stat", 0o444, Text(_stat)),
    # state
    Row("regs", 0o666, State("regs", still=True), per_cpu=True),
    Row("sregs", 0o666, State("sregs", still=True), per_cpu=True),
    Row("fpu", 0o666, State("fpu", still=True), per_cpu=True),
    Row("xsave", 0o666, State("xsave", still=True), per_cpu=True),
    Row("xcrs", 0o666, State("xcrs", still=True), per_cpu=True),
    Row("msrs", 0o666, State("msrs", entries=16), per_cpu=True),
    Row("debugregs", 0o666, State("debugregs", still=True), per_cpu=True),
    Row("events", 0o666, State("events"), per_cpu=True),
    Row("mp_state", 0o666, State("mp_state"), per_cpu=True),
    Row("cpuid", 0o666, State("cpuid", entries=40, still=True), per_cpu=True),
    Row("lapic", 0o666, State("lapic"), per_cpu=True),
    Row("irqchip", 0o666, State("irqchip")),
    Row("pit", 0o666, State("pit")),
    Row("clock", 0o666, State("clock")),
    Row("registers", 0o666, Text(_registers, _set_registers), per_cpu=True),
    Row("mem", 0o666, Mem()),
    Row(
        "dirty",
        0o444,
        Text(_take_dirty, room=_dirty_size, acts=True),
    ),
    # configuration
    Row("mem_size", 0o666, Text(lambda scope: f"{scope.vm.memory.size}\n", _set_mem_size)),
    Row("engine", 0o666, Text(lambda scope: f"{scope.vm.engine.name}\n", _set_engine)),
    Row("mode", 0o666, Text(_mode, _set_mode)),
    Row("machine", 0o666, Text(lambda scope: f"{scope.vm.machine_name}\n", _set_machine)),
    Row(
        "time",
        0o666,
        Text(lambda scope: f"{scope.vm.time_source}\n", lambda scope, text: scope.vm.set_time_source(text.strip())),
    ),
    Row("console", 0o666, Console("com1")),
    Row("hvc", 0o666, Console("hvc0")),
    Row("screen.txt", 0o444, Text(screen_text)),
    Row("screen.png", 0o444, Text(screen_picture)),
    Row("framebuffer", 0o666, Framebuffer()),
    Row("keyboard", 0o222, Text(put=type_keys)),
    # what is booted
    Row("kernel", 0o666, ImageFile("kernel")),
    Row("initrd", 0o666, ImageFile("initrd")),
    Row("bios", 0o666, ImageFile("bios")),
    Row("cmdline", 0o666, Text(lambda scope: f"{scope.vm.images.cmdline}\n", _set_cmdline)),
    # interrupts and debugging
    Row("irq", 0o222, Irq()),
    Row("debug", 0o666, Text(lambda scope: scope.vm.points_text(), _set_debug)),
    Row("trace", 0o666, TraceFile()),
    Row("trace.bin", 0o444, TraceFile(binary=True)),
    Row("symbols", 0o666, Symbols()),
    Row("symbols.elf", 0o444, Text(symbols_elf, room=symbols_elf_size)),
    Row("virt", 0o666, Virt(), per_cpu=True),
    Row("pagetable", 0o444, Text(pagetable), per_cpu=True),
    Row("disasm", 0o666, Text(disasm, set_disasm), per_cpu=True),
    Row("stack", 0o444, Text(stack), per_cpu=True),
    Row("core", 0o444, Core()),
    Row("gdb", 0o666, GdbFile()),
    Row("gdb.stream", 0o666, GdbStream()),
    Row("error", 0o444, Text(_complaint)),
)


def _engine_line(info: EngineInfo) -> str:
    yes_no = ("no", "yes")
    speed = "-" if info.speed is None else f"{info.speed:.3g}"
    reason = info.reason.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return (
        f"{info.name} available={yes_no[info.available]} preferred={yes_no[info.preferred]} "
        f'speed={speed} reason="{reason}"\n'
    )


def _engines(scope: RootScope) -> str:
    return "".join(map(_engine_line, scope.engines))


ROOT_FILES: tuple[Row, ...] = (
    Row("engines", 0o444, Text(_engines)),
    Row("version", 0o444, Text(lambda scope: f"{__version__}\n")),
)


# ---- reg/


def register_file(name: str) -> Row:
    """The row of one register or MSR, which is there."""
    row = REGISTERS.get(name)

    def get(scope: MachineScope) -> Future[str]:
        return scope.vm.at_boundary(lambda cpu: f"{read_register(cpu, name)}\n")

    def put(scope: MachineScope, text: str) -> None:
        value = row.parse(text.strip()) if row else parse_number(text.strip(), what=name)
        scope.vm.change(lambda cpu: write_registers(cpu, {name: value}))

    writable = row is None or row.writable
    return Row(name, 0o666 if writable else 0o444, Text(get, put if writable else None))


REGISTER_FILES: Mapping[str, Row] = {name: register_file(name) for name in REGISTERS}


def has_msr(cpu: Vcpu, name: str) -> bool:
    """Whether `name` is an MSR that the CPU has."""
    index = parse_msr(name)
    if index is None:
        return False
    try:
        cpu.get_msr(index)
    except (Invalid, Unsupported):
        return False
    return True


def listed_registers(cpu: Vcpu) -> list[str]:
    """The registers that the CPU has, and those MSRs that are in its `msrs`."""
    has = {state: has_state(cpu, state) for state in {row.state for row in REGISTERS.values()}}
    names = [row.name for row in REGISTERS.values() if has[row.state]]
    if has_state(cpu, "msrs"):
        names += [msr_name(index) for index, _, _ in struct.iter_unpack("<IIQ", cpu.get_state("msrs")[8:])]
    return names
