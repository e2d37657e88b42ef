"""Points on every engine, through Vm: conditions, counts, once, owners, and bounds that stay exact."""

from __future__ import annotations

import pytest

from vmfs.debug.points import Options, parse_options
from vmfs.debug.symbols import SymbolTable
from vmfs.engine.base import Capability
from vmfs.machine.files.commands import parse_commands
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words.errors import Unsupported
from vmfs.words.registers import read_register, write_registers

AT = 0x1000
SECONDS = 20

# again: inc rax; l3: mov [0x3000], al; lb: jmp again
COUNT = bytes.fromhex("48ffc0 88042500300000 ebf4")
STORE, JUMP = AT + 3, AT + 10


@pytest.fixture
def vm(engine):
    vm = Vm(engine, memory_size=16 << 20)
    vm.set_mode("long")
    vm.memory.write(AT, COUNT)
    vm.change(lambda cpu: write_registers(cpu, {"rip": AT}))
    yield vm
    vm.close()


def debug(vm, text):
    vm.set_points(parse_commands("debug", text, {"again": AT, "store": STORE}.get)).result(SECONDS)


def run(vm, **bound):
    return vm.start(Bound(**bound)).result(SECONDS).line()


def register(vm, name):
    return int(vm.at_boundary(lambda cpu: read_register(cpu, name)).result(SECONDS), 0)


def lines(vm):
    """Of the `debug` file, without what the engine says."""
    return [line.partition(" by=")[0] for line in vm.points_text().splitlines()]


def test_a_condition_stops_when_it_holds(vm):
    debug(vm, "break store if rax==5 || rax>=7 && u8(0x3000)!=6")
    assert run(vm) == f"debug cause=breakpoint id=1 rip={STORE:#x}"
    assert register(vm, "rax") == 5
    assert run(vm) == f"debug cause=breakpoint id=1 rip={STORE:#x}"
    assert register(vm, "rax") == 8
    assert lines(vm) == ["0", "1 break 0x1003 if rax==5||rax>=7&&u8(0x3000)!=6 hits=2"]


def test_ignored_stops_are_hits(vm):
    debug(vm, "break again if rax&1 ignore 3")
    assert run(vm) == f"debug cause=breakpoint id=1 rip={AT:#x}"
    assert register(vm, "rax") == 7
    assert lines(vm) == ["0", "1 break 0x1000 if rax&1 hits=4"]
    debug(vm, "ignore 1 2")
    assert lines(vm) == ["0", "1 break 0x1000 if rax&1 ignore 2 hits=4"]
    run(vm)
    assert register(vm, "rax") == 13
    assert vm.points.hits(1) == 7


def test_what_cannot_be_read_is_false_and_counted(vm):
    debug(vm, f"break store if u64(rax<<46)\nbreak {JUMP} if rax==3")
    assert run(vm) == f"debug cause=breakpoint id=2 rip={JUMP:#x}"
    assert lines(vm)[1] == "1 break 0x1003 if u64(rax<<46) hits=0 unreadable=3"


def test_once(vm):
    debug(vm, "break store if rax==2 once\nbreak store")
    assert [run(vm) for _ in range(3)] == [f"debug cause=breakpoint id={id_} rip={STORE:#x}" for id_ in (2, 1, 2)]
    # Both were come to at the second time; it was the first that stopped, and is no more.
    assert lines(vm) == ["0", "2 break 0x1003 hits=3"]


def test_once_together_with_another(vm):
    """It has stopped the machine, though the exit names the first."""
    debug(vm, "break store\nbreak store if rax==2 once\nbreak store if 2==rax ignore 1 once")
    assert [run(vm) for _ in range(3)] == [f"debug cause=breakpoint id=1 rip={STORE:#x}"] * 3
    assert lines(vm) == ["0", "1 break 0x1003 hits=3", "3 break 0x1003 if 2==rax once hits=1"]


def test_disabled_points_do_nothing(vm):
    debug(vm, "break store disabled\nbreak again if rax==4")
    assert run(vm) == f"debug cause=breakpoint id=2 rip={AT:#x}"
    assert lines(vm) == ["0", "1 break 0x1003 disabled hits=0", "2 break 0x1000 if rax==4 hits=1"]
    debug(vm, "disable all\nenable 1")
    assert run(vm) == f"debug cause=breakpoint id=1 rip={STORE:#x}"
    assert lines(vm)[2] == "2 break 0x1000 if rax==4 disabled hits=1"


def test_what_is_read_can_be_written_back(vm):
    debug(vm, "break store if rax==3 ignore 1\non cr3 disabled\niobreak 0x60-0x64\nwatch phys:0x3000 8 w once\n1")
    text = vm.points_text()
    debug(vm, "delete all\n" + text)
    assert [line.partition(" ")[2] for line in vm.points_text().splitlines()] == [
        line.partition(" ")[2] for line in text.splitlines()
    ]
    assert [line.partition(" ")[0] for line in vm.points_text().splitlines()] == ["1", "5", "6", "7", "8"]


def test_owners_have_their_own_points(vm):
    debug(vm, "break store")
    vm.set_points(lambda points: points.add_break(STORE, owner="gdb").add_break(AT, owner="gdb")).result(SECONDS)
    assert run(vm) == f"debug cause=breakpoint id=1 rip={STORE:#x}"
    assert lines(vm)[1:] == [
        "1 break 0x1003 hits=1",
        "2 break 0x1003 hits=1 owner=gdb",
        "3 break 0x1000 hits=0 owner=gdb",
    ]
    vm.set_points(lambda points: points.delete_of("gdb")).result(SECONDS)
    assert lines(vm) == ["0", "1 break 0x1003 hits=1"]


def test_a_false_condition_and_until(vm):
    """The run's own breakpoint stops where a point of the same place does not want to."""
    debug(vm, "break store if rax==1000")
    assert run(vm, until=STORE) == f"debug cause=breakpoint rip={STORE:#x}"
    assert run(vm, until=STORE) == f"debug cause=breakpoint rip={STORE:#x}"
    assert register(vm, "rax") == 2
    assert lines(vm)[1].endswith("hits=0")


@pytest.mark.parametrize("text", ["break again if 0\nbreak store ignore 1000", "on mode\nbreak store if rax==-1"])
def test_bounds_are_exact_where_points_do_not_stop(vm, text):
    debug(vm, text)
    assert run(vm, steps=7) == f"debug cause=step rip={STORE:#x}"
    assert register(vm, "rax") == 3
    assert run(vm, instructions=10) == f"limit rip={JUMP:#x}"
    assert register(vm, "rax") == 6
    assert run(vm, instructions=1) == f"limit rip={AT:#x}"


def test_bounds_end_at_a_point(vm):
    debug(vm, "break store if rax==2")
    assert run(vm, steps=100) == f"debug cause=breakpoint id=1 rip={STORE:#x}"
    assert run(vm, instructions=3) == f"limit rip={STORE:#x}"


def test_samples_of_a_running_machine_lose_no_stop(vm):
    """Each sample stops the guest somewhere; a run that goes on there comes to what is there."""
    debug(vm, "break store if rax==500\nbreak again ignore 1000000")
    run_ = vm.start()
    samples = 0
    while not run_.done():
        vm.at_boundary(lambda cpu: cpu.get_state("regs")).result(SECONDS)
        samples += 1
    assert run_.result().line() == f"debug cause=breakpoint id=1 rip={STORE:#x}"
    assert samples > 1
    assert (vm.points.hits(2), register(vm, "rax")) == (499, 500)


def test_watchpoints_with_conditions(vm, divergences):
    debug(vm, "watch 0x3000 1 w if al==3\nwatch phys:0x2fff 4096 w ignore 3")
    assert run(vm) == f"debug cause=watchpoint id=1 addr=0x3000 rip={JUMP:#x}"
    assert run(vm) == f"debug cause=watchpoint id=2 addr=0x3000 rip={JUMP:#x}"
    assert register(vm, "rax") == 4
    assert [line.split("hits=")[1] for line in lines(vm)[1:]] == ["1", "4"]


def test_stores_that_change_nothing(vm, divergences):
    """More watchpoints than the CPU has debug registers."""
    vm.memory.write(AT, bytes.fromhex("48ffc0 880c2500300000 ebf4"))  # the store is of cl, which is there already
    vm.memory.write(0x3000, b"\x09")
    vm.change(lambda cpu: write_registers(cpu, {"rcx": 9}))
    debug(vm, "watch phys:0x3000 1 w\n" + "".join(f"watch {0x4000 + 8 * n} 8 w\n" for n in range(5)))
    if "kvm-steps-see-changes" in divergences:
        assert run(vm, steps=9) == f"debug cause=step rip={AT:#x}"
        vm.change(lambda cpu: write_registers(cpu, {"rcx": 8}))
    assert run(vm, steps=9) == f"debug cause=watchpoint id=1 addr=0x3000 rip={JUMP:#x}"


def test_how_points_are_watched_for(vm):
    debug(vm, "".join(f"break {AT + n}\n" for n in range(20, 26)) + "iobreak 1\non mode\nbreak 5 disabled")
    ways = [line.partition(" by=")[2] for line in vm.points_text().splitlines()[1:]]
    if Capability.BREAKPOINTS_UNLIMITED in vm.capabilities:
        assert ways == ["engine"] * 8 + [""]
    else:
        assert ways == ["hardware"] * 4 + ["stepping"] * 2 + ["exits", "stepping", ""]


def test_what_an_engine_cannot_watch_for_is_refused_whole(vm, divergences):
    debug(vm, "break again")
    if "kvm-delivers-by-itself" not in divergences:
        debug(vm, "catch #PF\ncatch 0-255 if cr2==0")
        assert lines(vm)[2:] == ["2 catch #PF hits=0", "3 catch 0x0-0xff if cr2==0 hits=0"]
        return
    with pytest.raises(Unsupported, match="catch: KVM delivers"):
        debug(vm, "delete all\ncatch #PF")
    assert lines(vm) == ["0", "1 break 0x1000 hits=0"]
    assert run(vm) == f"debug cause=breakpoint id=1 rip={AT:#x}"


def test_symbols_are_shown_and_taken_back(vm):
    vm.symbols = SymbolTable([(AT, "T", "again"), (STORE, "T", "store-it")])
    vm.set_points(parse_commands("debug", "break store-it+7\nbreak store-it if rip==again", vm.symbols.address_of))
    text = vm.points_text()
    assert [line.partition(" hits=")[0] for line in text.splitlines()] == [
        "0",
        f"1 break {JUMP:#x} at=store-it+0x7",
        f"2 break {STORE:#x} if rip=={AT:#x} at=store-it",
    ]
    debug(vm, "delete all\n" + text)
    assert len(vm.points) == 2


def test_options():
    options = parse_options("once if rax == 5 ignore 3 disabled hits=7 by=engine unreadable=2")
    assert (options.once, options.ignore, options.enabled, options.hits) == (True, 3, False, 7)
    assert options.condition is not None and options.condition.text == "rax==5"
    assert parse_options("") == Options()


# ---- machines with devices, which answer accesses inside of a run


@pytest.fixture
def pc(engine):
    vm = Vm(engine, memory_size=2 << 20)
    vm.set_machine("pc")
    vm.set_mode("real")
    yield vm
    vm.close()


def load(vm, assembler, source):
    program = assembler(source, "real")
    vm.memory.write(AT, program.code)
    vm.change(lambda cpu: write_registers(cpu, {"rip": AT}))
    return program.labels


def test_a_breakpoint_behind_an_access_that_a_device_answered(pc, assembler):
    """The run goes on inside, and stops there."""
    at = load(pc, assembler, "mov dx, 0x3f8; out dx, al; l1: in al, dx; l2: out 0x80, al; l3: jmp l3")
    debug(pc, f"break {at['l1']}\nbreak {at['l2']}\nbreak {at['l3']}")
    assert [run(pc) for _ in range(3)] == [
        f"debug cause=breakpoint id={id_} rip={at[label]:#x}" for id_, label in ((1, "l1"), (2, "l2"), (3, "l3"))
    ]


def test_ports_of_devices_are_watched(pc, assembler):
    at = load(pc, assembler, "mov dx, 0x3fd; again: in al, dx; l1: out 0x80, al; mov dl, 0xff; out dx, al; l2: nop")
    debug(pc, "iobreak 0x3f8-0x3ff if al==0x60\niobreak 0x80 ignore 1\niobreak 0x3ff once")
    assert run(pc) == f"debug cause=io id=1 addr=0x3fd rip={at['l1']:#x}"
    assert register(pc, "rax") & 0xFF == 0x60  # the transmitter of the serial port is empty
    assert run(pc) == f"debug cause=io id=1 addr=0x3ff rip={at['l2']:#x}"
    assert [line.split("hits=")[1] for line in lines(pc)[1:]] == ["2", "1"]  # the third stopped with the first


def test_steps_and_counts_over_devices_with_points(pc, assembler):
    at = load(pc, assembler, "mov dx, 0x3ff; again: out dx, al; l1: in al, dx; l2: inc bx; l3: jmp again")
    debug(pc, "iobreak 0x3ff ignore 1000\nbreak 0x5000")
    assert run(pc, steps=4) == f"debug cause=step rip={at['l3']:#x}"
    assert run(pc, instructions=9) == f"limit rip={at['again']:#x}"
    assert register(pc, "rbx") & 0xFFFF == 3
    assert pc.points.hits(1) == 6


def test_a_reset_forgets_stops_that_are_still_to_be_told(pc, assembler):
    at = load(pc, assembler, "mov al, 3; out 0xf4, al; l1: hlt")
    debug(pc, "iobreak 0xf4")
    assert run(pc) == f"shutdown cause=debug-exit code=7 rip={at['l1']:#x}"
    pc.reset()
    pc.set_mode("real")
    at = load(pc, assembler, "nop; out 0x80, al; l1: nop; mov al, 1; out 0xf4, al; l2: hlt")
    assert run(pc) == f"shutdown cause=debug-exit code=3 rip={at['l2']:#x}"
