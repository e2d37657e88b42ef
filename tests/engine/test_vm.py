"""Vm on every engine: runs, their bounds, stops, samples of a running machine, breakpoints, reset, end."""

from __future__ import annotations

import threading
import time

import pytest

from vmfs.engine import by_name
from vmfs.engine.base import INTERRUPT_QUEUE, VCPU_STATES, has_state
from vmfs.machine.control import MemoryHooks
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.memory.ram import PAGE
from vmfs.words import exits
from vmfs.words.errors import Busy, Gone, Invalid, LimitReached, Unsupported, VmfsError, WouldBlock
from vmfs.words.registers import read_register, write_registers

AT = 0x1000
SECONDS = 20  # for what takes milliseconds; a bound for a hang, not a measure

LOOP = b"\xeb\xfe"  # jmp .
COUNT = b"\x48\xff\xc0\xeb\xfb"  # 1: inc rax; jmp 1b
OUT_IN_HLT = bytes.fromhex("b041 e680 e460 f4")  # mov al, 'A'; out 0x80, al; in al, 0x60; hlt
STORE_HLT = bytes.fromhex("c6042500300000ff f4")  # mov byte [0x3000], 0xff; hlt


@pytest.fixture
def vm(engine):
    vm = Vm(engine, memory_size=16 << 20)
    vm.set_mode("long")
    yield vm
    vm.close()


def load(vm, code):
    vm.memory.write(AT, code)
    vm.change(lambda cpu: write_registers(cpu, {"rip": AT}))


def run(vm, bound=None):
    return vm.start(bound or Bound()).result(SECONDS)


def register(vm, name):
    return int(vm.at_boundary(lambda cpu: read_register(cpu, name)).result(SECONDS), 0)


def until(condition):
    """Wait for what another thread brings about."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def test_exits_come_one_by_one(vm):
    load(vm, OUT_IN_HLT)
    assert run(vm).line() == "io direction=out port=0x80 size=1 count=1 data=0x41 rip=0x1004"
    assert vm.access_data == b"A"
    assert vm.state == "paused"
    assert run(vm).line() == "io direction=in port=0x60 size=1 count=1 rip=0x1004"
    assert vm.access_data == b"\xff"
    vm.set_access_data(b"\x5a")
    assert run(vm).line() == "hlt rip=0x1007"
    assert vm.state == "halted"
    assert register(vm, "rax") & 0xFF == 0x5A
    assert vm.exit_number == 3
    counters = vm.counters()
    assert (counters["runs"], counters["exits.io"], counters["exits.hlt"]) == (3, 2, 1)


def states_of(engine, change=None):
    """All states but the MSRs, whose time goes on, of a CPU that was just made and then changed."""
    machine = engine.create_machine()
    try:
        cpu = machine.create_vcpu(0)
        if change:
            change(cpu)
        return {name: cpu.get_state(name) for name in VCPU_STATES if name != "msrs" and has_state(cpu, name)}
    finally:
        machine.close()


def test_a_new_cpu_is_as_it_is_made_whatever_those_before_it_did(engine):
    """An engine may know what a CPU is made as; one that never made one has to ask."""

    def change_all(cpu):
        regs = bytearray(cpu.get_state("regs"))
        regs[:8] = b"\x55" * 8
        cpu.set_state("regs", bytes(regs))
        cpu.set_msr(0xC0000082, 0x1234)

    def nmi(cpu):
        cpu.get_state("events")
        cpu.nmi()

    fresh = states_of(by_name(engine.name))
    assert states_of(engine) == fresh
    changed = states_of(engine, change_all)
    assert changed["regs"][:8] == b"\x55" * 8
    assert changed.keys() == fresh.keys()
    assert states_of(engine, nmi)["events"] != fresh["events"]
    cpuid = states_of(engine, lambda cpu: cpu.set_state("cpuid", bytes(8)))["cpuid"]
    assert cpuid != fresh["cpuid"]
    assert states_of(engine) == fresh


def test_a_run_changes_what_a_new_cpu_answers(engine):
    vm = Vm(engine, memory_size=16 << 20)
    try:
        assert register(vm, "rip") == 0xFFF0
        vm.start(Bound(seconds=0)).result(SECONDS)
        assert register(vm, "rip") == 0xFFF0
        exit_ = run(vm)  # at the reset vector, where there is nothing
        asked = vm.at_boundary(lambda cpu: cpu.get_state("regs")).result(SECONDS)
        assert int.from_bytes(asked[128:136], "little") == exit_.rip
    finally:
        vm.close()


def test_reset_forgets_a_read_that_waits(vm):
    load(vm, OUT_IN_HLT)
    run(vm)
    assert run(vm).line().startswith("io direction=in ")
    vm.reset()
    assert vm.access_data == b"" and vm.state == "paused"
    assert vm.mode().result(SECONDS) == "real"
    assert register(vm, "rip") == 0xFFF0


def test_a_new_machine_is_in_the_reset_state(engine):
    vm = Vm(engine)
    try:
        assert vm.mode().result(SECONDS) == "real"
        assert register(vm, "rip") == 0xFFF0
        assert register(vm, "cs.base") == 0xFFFF0000
        assert register(vm, "rflags") == 2
    finally:
        vm.close()


def test_reset_brings_the_registers_back_and_keeps_ram(vm):
    load(vm, OUT_IN_HLT)
    run(vm)
    vm.change(lambda cpu: write_registers(cpu, {"xmm3": 7, "dr0": 0x1234}))
    vm.reset()
    assert register(vm, "rip") == 0xFFF0
    assert register(vm, "cr0") & 1 == 0
    assert register(vm, "rax") == register(vm, "xmm3") == register(vm, "dr0") == 0
    assert vm.memory.read(AT, len(OUT_IN_HLT)) == OUT_IN_HLT
    vm.set_mode("long")
    load(vm, OUT_IN_HLT)
    assert run(vm).REASON == "io"


def test_a_running_machine_is_sampled_and_goes_on(vm):
    load(vm, COUNT)
    run_ = vm.start()
    assert vm.state == "running"
    first = register(vm, "rax")
    until(lambda: register(vm, "rax") > first)
    assert register(vm, "rip") in (AT, AT + 3)
    assert not run_.done()
    for refused in (
        lambda: vm.start(),
        lambda: vm.change(lambda cpu: None),
        lambda: vm.reset(),
        lambda: vm.set_mode("real"),
        lambda: vm.resize_memory(8 << 20),
        lambda: vm.set_access_data(b"x"),
    ):
        with pytest.raises(Busy):
            refused()
    vm.stop(run_)
    assert isinstance(run_.result(SECONDS), exits.Interrupted)
    assert vm.state == "paused"
    stopped_at = register(vm, "rax")
    assert register(vm, "rax") == stopped_at
    run(vm, Bound(steps=2))
    assert register(vm, "rax") == stopped_at + 1  # nothing was lost and nothing done twice


def test_stop_without_a_run_does_nothing(vm):
    vm.stop()
    load(vm, OUT_IN_HLT)
    first = vm.start()
    first.result(SECONDS)
    vm.stop(first)  # of a run that is over
    assert run(vm).REASON == "io"


def test_many_stops_lose_nothing(vm):
    """The counter of a guest that is always interrupted equals its instructions: none is lost or repeated."""
    load(vm, bytes.fromhex("48ffc0 48ffc3 ebf8"))  # 1: inc rax; inc rbx; jmp 1b
    for _ in range(50):
        run_ = vm.start()
        vm.stop(run_)
        assert isinstance(run_.result(SECONDS), exits.Interrupted)
        assert register(vm, "rax") - register(vm, "rbx") in (0, 1)


def test_bounds(vm):
    load(vm, COUNT)
    assert run(vm, Bound(steps=1)).line() == "debug cause=step rip=0x1003"
    assert run(vm, Bound(steps=4)).line() == "debug cause=step rip=0x1003"
    assert register(vm, "rax") == 3
    assert run(vm, Bound(instructions=5)).line() == "limit rip=0x1000"
    assert register(vm, "rax") == 5
    assert run(vm, Bound(until=AT + 3)).line() == "debug cause=breakpoint rip=0x1003"
    assert run(vm, Bound(until=AT + 3)).line() == "debug cause=breakpoint rip=0x1003"
    assert register(vm, "rax") == 7
    assert run(vm, Bound(seconds=0.02)).REASON == "limit"
    assert register(vm, "rax") > 7


def test_a_bound_ends_with_an_exit_that_comes_before(vm):
    load(vm, OUT_IN_HLT)
    assert run(vm, Bound(steps=100)).REASON == "io"
    assert run(vm, Bound(instructions=100)).REASON == "io"
    assert run(vm, Bound(seconds=5)).REASON == "hlt"


def test_every_run_is_a_step_while_debug_is_on(vm):
    load(vm, OUT_IN_HLT)
    vm.set_points(lambda points: points.set_stepping(True)).result(SECONDS)
    lines = [run(vm).line() for _ in range(4)]
    assert lines == [
        "debug cause=step rip=0x1002",
        "io direction=out port=0x80 size=1 count=1 data=0x41 rip=0x1004",
        "io direction=in port=0x60 size=1 count=1 rip=0x1004",
        "debug cause=step rip=0x1006",
    ]
    vm.set_points(lambda points: points.set_stepping(False)).result(SECONDS)
    assert run(vm).REASON == "hlt"


def test_breakpoints_stop_and_count(vm):
    load(vm, COUNT)
    vm.set_points(lambda points: points.add_break(AT).add_break(AT + 3)).result(SECONDS)
    lines = [run(vm).line() for _ in range(3)]
    # The run begins at the first one, and executes the instruction there.
    assert lines == [
        "debug cause=breakpoint id=2 rip=0x1003",
        "debug cause=breakpoint id=1 rip=0x1000",
        "debug cause=breakpoint id=2 rip=0x1003",
    ]
    assert vm.points.text() == "0\n1 break 0x1000 hits=1\n2 break 0x1003 hits=2\n"
    vm.set_points(lambda points: points.delete(2)).result(SECONDS)
    assert run(vm).line() == "debug cause=breakpoint id=1 rip=0x1000"


def test_a_breakpoint_set_while_it_runs(vm):
    load(vm, COUNT)
    run_ = vm.start()
    vm.set_points(lambda points: points.add_break(AT + 3)).result(SECONDS)
    assert run_.result(SECONDS).line() == "debug cause=breakpoint id=1 rip=0x1003"


def test_points_the_engine_cannot_watch_change_nothing(vm):
    def with_a_catch(points):
        return points.add_break(0x2000).add_catch((14,))

    try:
        vm.set_points(with_a_catch).result(SECONDS)
    except Unsupported as error:
        assert "KVM" in str(error)
        assert len(vm.points) == 0
    else:
        assert len(vm.points) == 2
    with pytest.raises(Invalid):
        vm.set_points(lambda points: points.delete(99)).result(SECONDS)


def test_shutdown_stays_until_a_register_is_set(vm):
    load(vm, b"\x0f\x0b")  # ud2, with no IDT: a triple fault
    assert run(vm).line().startswith("shutdown cause=triple-fault")
    assert vm.state == "shutdown"
    assert run(vm).REASON == "shutdown"
    load(vm, b"\xf4")
    assert vm.state == "paused"
    assert run(vm).line() == "hlt rip=0x1001"


REFUSED = {  # by any x86-64 CPU
    "sregs": lambda cpu: cpu.set_state("sregs", _with(cpu, "sregs", 224, b"\0\0\0\x80")),  # CR0.PG without PE
    "xcrs": lambda cpu: cpu.set_state("xcrs", _with(cpu, "xcrs", 16, b"\x06")),  # XCR0 without x87
    "fpu": lambda cpu: cpu.set_state("fpu", _with(cpu, "fpu", 408, b"\xff" * 4)),  # reserved bits of MXCSR
    "cpuid": lambda cpu: cpu.set_state("cpuid", _with(cpu, "cpuid", 0, b"\xff\xff")),  # more than its bytes
    "an MSR": lambda cpu: cpu.set_msr(0xC0000082, 1 << 60),  # LSTAR takes canonical addresses
    "regs, then sregs": lambda cpu: write_registers(cpu, {"rbx": 5, "cr4": 1 << 60}),
}


def _with(cpu, name, offset, data):
    blob = cpu.get_state(name)
    return blob[:offset] + data + blob[offset + len(data) :]


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_a_read_pending(vm, change):
    load(vm, bytes.fromhex("e460 f4"))
    pending = run(vm)
    vm.set_access_data(b"\x5a")
    before = register(vm, "rip"), register(vm, "rbx"), vm.still
    with pytest.raises(Invalid):
        vm.change(change)
    assert (register(vm, "rip"), register(vm, "rbx"), vm.still) == before
    assert before[0] == pending.rip
    assert vm.access_data == b"\x5a"
    assert isinstance(run(vm), exits.Hlt)
    assert register(vm, "rax") & 0xFF == 0x5A


def test_what_is_taken_completes_a_read_first(vm):
    load(vm, bytes.fromhex("e460 f4"))
    run(vm)
    vm.set_access_data(b"\x5a")
    vm.change(lambda cpu: write_registers(cpu, {"rbx": 5, "cs.limit": 0xFFFFFFFF, "msr.0xc0000082": 0x1234}))
    assert register(vm, "rip") == AT + 2
    assert register(vm, "rax") & 0xFF == 0x5A
    assert (register(vm, "rbx"), vm.access_data) == (5, b"")
    assert register(vm, "msr.0xc0000082") == 0x1234
    assert isinstance(run(vm), exits.Hlt)


def test_dirty_pages_are_told_to_each_reader(vm):
    load(vm, STORE_HLT)
    vm.take_dirty("file"), vm.take_dirty("cache")
    run(vm)
    for reader in ("file", "cache"):
        pages = int.from_bytes(vm.take_dirty(reader), "little")
        assert pages >> (0x3000 // PAGE) & 1, reader
        assert not int.from_bytes(vm.take_dirty(reader), "little")
    assert vm.memory.read(0x3000, 1) == b"\xff"


def test_memory_hooks_surround_a_run(vm):
    calls = []
    vm.hooks = MemoryHooks(lambda: calls.append("before"), lambda log: calls.append(log))
    load(vm, STORE_HLT)
    vm.take_dirty("cache")
    run(vm)
    assert calls[0] == "before"
    assert int.from_bytes(calls[1], "little") >> 3 & 1
    assert len(calls) == 2


def test_interrupt_queue_is_bounded(vm):
    for _ in range(INTERRUPT_QUEUE):
        vm.interrupt(0x20)
    with pytest.raises(WouldBlock):
        vm.interrupt(0x20)
    assert vm.interrupts_queued == INTERRUPT_QUEUE
    with pytest.raises(VmfsError):
        vm.interrupt(256)


def test_resize_before_the_first_run_only(vm):
    vm.resize_memory(32 << 20)
    vm.memory.write((32 << 20) - 1, b"x")
    load(vm, b"\xf4")
    assert run(vm).REASON == "hlt"
    with pytest.raises(Busy):
        vm.resize_memory(16 << 20)
    vm.resize_memory(32 << 20)


def test_subscribers_hear_of_every_change(vm):
    states = []
    unsubscribe = vm.subscribe(lambda: states.append(vm.state))
    load(vm, b"\xf4")
    run(vm)
    until(lambda: states == ["running", "halted"])
    unsubscribe()
    run(vm, Bound(steps=1))
    assert states == ["running", "halted"]


def test_close_while_it_runs(engine):
    vm = Vm(engine, memory_size=16 << 20)
    vm.set_mode("long")
    load(vm, LOOP)
    threads = threading.active_count()
    run_ = vm.start()
    vm.close()
    with pytest.raises(Gone):
        run_.result(SECONDS)
    vm.close()
    assert threading.active_count() == threads
    for call in (
        lambda: vm.start(),
        lambda: vm.at_boundary(lambda cpu: None),
        lambda: vm.change(lambda cpu: None),
        lambda: vm.interrupt(1),
        lambda: vm.counters(),
        lambda: vm.memory.read(0, 1),
        lambda: vm.take_dirty("file"),
        lambda: vm.access_data,
    ):
        with pytest.raises(Gone):
            call()


def test_a_host_without_room_for_a_thread(vm, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    load(vm, b"\xf4")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(LimitReached, match="can't start new thread"):
            vm.start()
    assert vm.state == "paused"
    assert run(vm).line().startswith("hlt ")
