"""CONTENTS: what each file of a machine gets and puts, a row a name. The row of a name in FILES (`vmfs.fs.files`) says
who may read and write it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import trio

from vmfs.debug.disasm import Listing, parse_listing
from vmfs.devices.machine import machine_type
from vmfs.engine.base import MACHINE_STATES, VCPU_STATES, Vcpu, has_state
from vmfs.machine.born import parse_birth
from vmfs.machine.files.commands import parse_command, parse_commands
from vmfs.machine.files.console import Console, Log
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.coverage import CoverageFile
from vmfs.machine.files.debug import Core, Symbols, Virt, disasm, pagetable, stack, symbols_elf, symbols_elf_size, why
from vmfs.machine.files.gdb import GdbStream, gdb_file
from vmfs.machine.files.handles import Kind
from vmfs.machine.files.history import HISTORY, WRITER
from vmfs.machine.files.kinds import AccessData, ImageFile, Irq, State, Text, VmRun
from vmfs.machine.files.lines import Do, Undo, same
from vmfs.machine.files.memory import Mem, resize_memory
from vmfs.machine.files.screen import Framebuffer, put_keys, put_moves, screen_picture, screen_text
from vmfs.machine.files.snapshots import RESTORE
from vmfs.machine.files.trace import TraceFile
from vmfs.machine.files.vnc import vnc_file
from vmfs.machine.files.waiting import finished, settled
from vmfs.machine.machine import Vm, check_cpu_count, check_time
from vmfs.memory.ram import PAGE, check_size
from vmfs.words.errors import Busy, Invalid, Unsupported
from vmfs.words.exits import Exit
from vmfs.words.layouts import unpack_msrs
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
    there_are,
    write_registers,
)

# ---- what rows read and write


def _registers(scope: Contents) -> Future[str]:
    return scope.vm.at_boundary(dump_registers)


def _put_registers(scope: Contents, text: str) -> Do:
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


def _put_debug(scope: Contents, text: str) -> Do:
    vm = scope.vm
    change = parse_commands("debug", text, vm.symbols.address_of)

    async def do() -> Undo:
        before = vm.points
        await settled(vm.set_points(change), scope)
        return Undo(before, vm.put_points, lambda: same(lambda: vm.points, lambda: vm.still))

    return do


def _put_disasm(scope: Contents, text: str) -> Do:
    vm = scope.vm
    listing = parse_listing(text, vm.symbols)

    def put(one: Listing) -> None:
        vm.listing = one

    def do() -> Undo:
        before = vm.listing
        put(listing)
        return Undo(before, put, lambda: same(lambda: vm.listing))

    return do


def _put_state(scope: Contents, text: str) -> Do:
    command = parse_command("state", text)
    return lambda: command(scope.vm)


def _exit_line(scope: Contents) -> str:
    last = scope.vm.last_exit
    return "" if last is None else f"{last.line()}\n"


def _exit_struct(scope: Contents) -> bytes:
    last = scope.vm.last_exit
    return b"" if last is None else last.pack()


def _stat(scope: Contents) -> str:
    counted: dict[str, object] = {
        **scope.vm.counters(),
        "state": scope.vm.state,
        "engine": scope.vm.engine.name,
        "machine": scope.vm.machine_name,
        "cpus": len(scope.vm.cpus),
        "memory_bytes": scope.vm.memory.size,
        "trace": scope.vm.trace.settings.line(),
        "trace_events": scope.vm.trace.buffer.events,
        "trace_dropped": scope.vm.trace.buffer.dropped,
    }
    return "".join(f"{key} {value}\n" for key, value in counted.items())


def _dirty_size(scope: Contents) -> int:
    return (scope.vm.memory.end // PAGE + 7) // 8


def _put_mem_size(scope: Contents, text: str) -> Do:
    size = parse_size(text.strip(), what="mem_size")
    check_size(size)
    return lambda: resize_memory(scope, size)


def _put_cpus(scope: Contents, text: str) -> Do:
    count = parse_number(text.strip(), what="cpus")
    check_cpu_count(count)

    def do() -> None:
        scope.vm.set_cpu_count(count)
        scope.forget_sizes()

    return do


def _cpu_stat(scope: Contents) -> str:
    return "".join(f"{key} {value}\n" for key, value in scope.vm.cpu_counters().items())


def _put_engine(scope: Contents, text: str) -> Do:
    name = text.strip()
    engine = scope.engine_named(name)

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


async def _mode(scope: Contents) -> str:
    mode = scope.vm.mode()
    await finished(mode, scope)
    return f"{mode.result()}\n"


def _put_mode(scope: Contents, text: str) -> Do:
    mode = text.strip()
    check_mode(mode)

    async def do() -> None:
        async with scope.memory.change():
            scope.vm.set_mode(mode)

    return do


def _put_machine(scope: Contents, text: str) -> Do:
    name = text.strip()
    machine_type(name)

    def do() -> None:
        scope.vm.set_machine(name)
        scope.forget_sizes()

    return do


def _put_time(scope: Contents, text: str) -> Do:
    source = text.strip()
    check_time(source)
    return lambda: scope.vm.set_time_source(source)


def _put_born(scope: Contents, text: str) -> Do:
    lines = parse_birth(text)
    return lambda: scope.vm.set_birth(lines.over(scope.vm.birth()))


def _put_cmdline(scope: Contents, text: str) -> Do:
    def do() -> None:
        if scope.vm.state == "running":
            raise Busy("the machine is running")
        scope.vm.images.cmdline = text.removesuffix("\n")

    return do


def _complaint(scope: Contents) -> str:
    return f"{scope.complaint}\n" if scope.complaint else ""


def _news_of_exits(scope: Contents) -> int:
    return scope.vm.exit_number


def _news_of_state(scope: Contents) -> int:
    return scope.changes


# ---- the tables

CONTENTS: Mapping[str, Kind] = {
    # running
    "vm_run": VmRun(lambda exit_: f"{exit_.line()}\n".encode()),
    "vm_run.bin": VmRun(Exit.pack),
    "exit": Text(get=_exit_line, news=_news_of_exits),
    "exit.bin": Text(get=_exit_struct, news=_news_of_exits),
    "exit.data": AccessData(),
    "state": Text(lambda scope: f"{scope.vm.state}\n", _put_state, news=_news_of_state, acts=True),
    "stat": Text(_stat),
    # state
    **{name: State(name, still=row.still) for name, row in (*VCPU_STATES.items(), *MACHINE_STATES.items())},
    "registers": Text(_registers, _put_registers, of_cpu=True, whole=True),
    "mem": Mem(),
    "dirty": Text(
            lambda scope: scope.vm.take_dirty("file"), peek=lambda scope: scope.vm.peek_dirty("file"), room=_dirty_size
        ),
    "restore": RESTORE,
    "history": HISTORY,
    "writer": WRITER,
    # configuration
    "mem_size": Text(lambda scope: f"{scope.vm.memory.size}\n", _put_mem_size),
    "cpus": Text(lambda scope: f"{len(scope.vm.cpus)}\n", _put_cpus),
    "engine": Text(lambda scope: f"{scope.vm.engine.name}\n", _put_engine),
    "mode": Text(_mode, _put_mode, of_cpu=True),
    "machine": Text(lambda scope: f"{scope.vm.machine_name}\n", _put_machine),
    "time": Text(lambda scope: f"{scope.vm.shown_time_source}\n", _put_time),
    "born": Text(lambda scope: scope.vm.birth().text(), _put_born, whole=True),
    "console": Console("com1"),
    "console.log": Log("com1"),
    "hvc": Console("hvc0"),
    "hvc.log": Log("hvc0"),
    "screen.txt": Text(screen_text, slow=True),
    "screen.png": Text(screen_picture, slow=True),
    "framebuffer": Framebuffer(),
    "keyboard": Text(put=put_keys, whole=True, acts=True),
    "mouse": Text(put=put_moves, whole=True, acts=True),
    "vnc": vnc_file(),
    # what is booted
    "kernel": ImageFile("kernel"),
    "initrd": ImageFile("initrd"),
    "bios": ImageFile("bios"),
    "cmdline": Text(lambda scope: f"{scope.vm.images.cmdline}\n", _put_cmdline, whole=True, continues=True),
    # interrupts and debugging
    "irq": Irq(),
    "debug": Text(lambda scope: scope.vm.points_text(), _put_debug, whole=True, symbolic=True),
    "trace": TraceFile(),
    "trace.bin": TraceFile(binary=True),
    "coverage": CoverageFile(),
    "symbols": Symbols(),
    "symbols.elf": Text(symbols_elf, room=symbols_elf_size),
    "virt": Virt(),
    "pagetable": Text(pagetable, slow=True),
    "disasm": Text(disasm, _put_disasm, slow=True, symbolic=True),
    "stack": Text(stack, slow=True),
    "core": Core(),
    "why": Text(why, slow=True),
    "gdb": gdb_file(),
    "gdb.stream": GdbStream(),
    "error": Text(_complaint),
}


# Of cpuN/, where they are a CPU's. What of them stands at the top, too, is of the first.
CPU_CONTENTS: Mapping[str, Kind] = {
    **{name: CONTENTS[name] for name in (*VCPU_STATES, "registers", "virt", "pagetable", "disasm", "stack")},
    "state": Text(lambda scope: scope.vm.cpu_state(), of_cpu=True),
    "stat": Text(_cpu_stat),
}


# ---- reg/


def register_file(name: str) -> Text:
    """The kind of one register or MSR, which is there."""
    row = REGISTERS.get(name)

    def get(scope: Contents) -> Future[str]:
        return scope.vm.at_boundary(lambda cpu: f"{read_register(cpu, name)}\n")

    def put(scope: Contents, text: str) -> Do:
        value = row.parse(text.strip()) if row else parse_number(text.strip(), what=name)
        return lambda: _set_registers(scope.vm, {name: value})

    writable = row is None or row.writable
    size = len(f"{row.text(0) if row else msr_text(0)}\n")
    return Text(get, put if writable else None, width=size)


REGISTER_KINDS: Mapping[str, Text] = {name: register_file(name) for name in REGISTERS}


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
    names = [row.name for row in there_are(cpu, REGISTERS.values()) if has[row.state]]
    if has_state(cpu, "msrs"):
        names += [msr_name(index) for index, _ in unpack_msrs(cpu.get_state("msrs"))]
    return names
