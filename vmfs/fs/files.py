"""FILES: the directory of a machine, a row a file; ROOT_FILES: those of the mount. A new file is a row."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import trio

from vmfs import __version__
from vmfs.debug.disasm import Listing, parse_listing
from vmfs.devices.machine import machine_type
from vmfs.engine import EngineInfo, by_name
from vmfs.engine.base import Vcpu, has_state
from vmfs.fs.commands import parse_command, parse_commands
from vmfs.fs.console import Console, Log
from vmfs.fs.debug_files import Core, Symbols, Virt, disasm, pagetable, stack, symbols_elf, symbols_elf_size
from vmfs.fs.gdb_files import GdbFile, GdbStream
from vmfs.fs.hooks import status
from vmfs.fs.inodes import Kind, Scope
from vmfs.fs.kinds import AccessData, ImageFile, Irq, State, Text, VmRun
from vmfs.fs.lines import Do, Undo, same
from vmfs.fs.memory_file import Mem
from vmfs.fs.scopes import MachineScope, RootScope
from vmfs.fs.screen_files import Framebuffer, put_keys, screen_picture, screen_text
from vmfs.fs.trace_file import TraceFile
from vmfs.fs.waiting import finished, settled
from vmfs.machine.machine import Vm, check_time
from vmfs.machine.memory import PAGE, check_size
from vmfs.words.errors import Busy, Invalid, Unsupported
from vmfs.words.exits import Exit
from vmfs.words.modes import check_mode
from vmfs.words.numbers import parse_number, parse_size
from vmfs.words.registers import (
    REGISTERS,
    dump_registers,
    msr_name,
    msr_text,
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


def _put_registers(scope: MachineScope, text: str) -> Do:
    values = parse_registers(text)
    return lambda: _set_registers(scope.vm, values)


def _set_registers(vm: Vm, values: dict[str, int]) -> Undo | None:
    if not values:
        return None
    state, before = vm.state, {}
    if state != "running":  # then it is Busy
        # Before `change`, which completes a pending access: whether there are such MSRs.
        texts = vm.at_boundary(lambda cpu: {name: read_register(cpu, name) for name in values}).result()
        before = {name: int(text, 16) for name, text in texts.items()}
    vm.change(lambda cpu: write_registers(cpu, values))

    def put_back(old: dict[str, int]) -> None:
        vm.change(lambda cpu: write_registers(cpu, old), then=state)

    return Undo(before, put_back, lambda: same(lambda: vm.still), join=lambda first, second: {**second, **first})


def _put_debug(scope: MachineScope, text: str) -> Do:
    vm = scope.vm
    change = parse_commands("debug", text, vm.symbols.address_of)

    async def do() -> Undo:
        before = vm.points
        await settled(vm.set_points(change), scope)
        return Undo(before, vm.put_points, lambda: same(lambda: vm.points, lambda: vm.still))

    return do


def _put_disasm(scope: MachineScope, text: str) -> Do:
    vm = scope.vm
    listing = parse_listing(text, vm.symbols)

    def put(one: Listing) -> None:
        vm.listing = one

    def do() -> Undo:
        before = vm.listing
        put(listing)
        return Undo(before, put, lambda: same(lambda: vm.listing))

    return do


def _put_state(scope: MachineScope, text: str) -> Do:
    command = parse_command("state", text)
    return lambda: command(scope.vm)


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


def _dirty_size(scope: MachineScope) -> int:
    return (scope.vm.memory.size // PAGE + 7) // 8


def _put_mem_size(scope: MachineScope, text: str) -> Do:
    size = parse_size(text.strip(), what="mem_size")
    check_size(size)
    return lambda: scope.host.resize_memory(scope.vm, size)


def _put_engine(scope: MachineScope, text: str) -> Do:
    name = text.strip()
    engine = by_name(name)

    def move() -> None:  # in a thread: to probe an engine and to end a machine take a moment
        availability = engine.probe()
        if not availability.available:
            raise Unsupported(f"the engine {name} does not work here: {availability.reason}")
        scope.vm.move_to(engine)

    async def do() -> None:
        if scope.vm.state == "running":
            raise Busy("the machine is running")
        if name != scope.vm.engine.name:
            await trio.to_thread.run_sync(move)
            scope.forget_sizes()

    return do


async def _mode(scope: MachineScope) -> str:
    mode = scope.vm.mode()
    await finished(mode, scope)
    return f"{mode.result()}\n"


def _put_mode(scope: MachineScope, text: str) -> Do:
    mode = text.strip()
    check_mode(mode)

    async def do() -> None:
        async with scope.memory.change():
            scope.vm.set_mode(mode)

    return do


def _put_machine(scope: MachineScope, text: str) -> Do:
    name = text.strip()
    machine_type(name)

    def do() -> None:
        scope.vm.set_machine(name)
        scope.forget_sizes()

    return do


def _put_time(scope: MachineScope, text: str) -> Do:
    source = text.strip()
    check_time(source)
    return lambda: scope.vm.set_time_source(source)


def _put_cmdline(scope: MachineScope, text: str) -> Do:
    def do() -> None:
        if scope.vm.state == "running":
            raise Busy("the machine is running")
        scope.vm.images.cmdline = text.removesuffix("\n")

    return do


def _complaint(scope: Scope) -> str:
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
    Row("state", 0o666, Text(lambda scope: f"{scope.vm.state}\n", _put_state, news=_news_of_state, acts=True)),
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
    Row("registers", 0o666, Text(_registers, _put_registers, of_cpu=True, whole=True), per_cpu=True),
    Row("mem", 0o666, Mem()),
    Row(
        "dirty",
        0o444,
        Text(
            lambda scope: scope.vm.take_dirty("file"), peek=lambda scope: scope.vm.peek_dirty("file"), room=_dirty_size
        ),
    ),
    # configuration
    Row("mem_size", 0o666, Text(lambda scope: f"{scope.vm.memory.size}\n", _put_mem_size)),
    Row("engine", 0o666, Text(lambda scope: f"{scope.vm.engine.name}\n", _put_engine)),
    Row("mode", 0o666, Text(_mode, _put_mode, of_cpu=True)),
    Row("machine", 0o666, Text(lambda scope: f"{scope.vm.machine_name}\n", _put_machine)),
    Row("time", 0o666, Text(lambda scope: f"{scope.vm.time_source}\n", _put_time)),
    Row("console", 0o666, Console("com1")),
    Row("console.log", 0o444, Log("com1")),
    Row("hvc", 0o666, Console("hvc0")),
    Row("hvc.log", 0o444, Log("hvc0")),
    Row("screen.txt", 0o444, Text(screen_text, slow=True)),
    Row("screen.png", 0o444, Text(screen_picture, slow=True)),
    Row("framebuffer", 0o666, Framebuffer()),
    Row("keyboard", 0o222, Text(put=put_keys, whole=True, acts=True)),
    # what is booted
    Row("kernel", 0o666, ImageFile("kernel")),
    Row("initrd", 0o666, ImageFile("initrd")),
    Row("bios", 0o666, ImageFile("bios")),
    Row("cmdline", 0o666, Text(lambda scope: f"{scope.vm.images.cmdline}\n", _put_cmdline, whole=True, continues=True)),
    # interrupts and debugging
    Row("irq", 0o222, Irq()),
    Row("debug", 0o666, Text(lambda scope: scope.vm.points_text(), _put_debug, whole=True)),
    Row("trace", 0o666, TraceFile()),
    Row("trace.bin", 0o444, TraceFile(binary=True)),
    Row("symbols", 0o666, Symbols()),
    Row("symbols.elf", 0o444, Text(symbols_elf, room=symbols_elf_size)),
    Row("virt", 0o666, Virt(), per_cpu=True),
    Row("pagetable", 0o444, Text(pagetable, slow=True), per_cpu=True),
    Row("disasm", 0o666, Text(disasm, _put_disasm, slow=True), per_cpu=True),
    Row("stack", 0o444, Text(stack, slow=True), per_cpu=True),
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
    Row("error", 0o444, Text(_complaint)),
)


# ---- reg/


def register_file(name: str) -> Row:
    """The row of one register or MSR, which is there."""
    row = REGISTERS.get(name)

    def get(scope: MachineScope) -> Future[str]:
        return scope.vm.at_boundary(lambda cpu: f"{read_register(cpu, name)}\n")

    def put(scope: MachineScope, text: str) -> Do:
        value = row.parse(text.strip()) if row else parse_number(text.strip(), what=name)
        return lambda: _set_registers(scope.vm, {name: value})

    writable = row is None or row.writable
    size = len(f"{row.text(0) if row else msr_text(0)}\n")
    return Row(name, 0o666 if writable else 0o444, Text(get, put if writable else None, width=size))


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
