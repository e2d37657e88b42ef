"""A PC's CPU that sleeps: for good, so that the run ends with `hlt`, or until an interrupt, for which a run that is
bounded by instructions does not wait for ever."""

from __future__ import annotations

import struct
import time

import pytest
from engine.asm import ORIGIN

from vmfs.engine.base import SLEEP_MOST, Capability
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words.registers import read_register, write_registers

SECONDS = 30
SIZE = 2 << 20
KERNEL = 0.2  # seconds in which a program of some instructions comes to its HLT
RUNNABLE, INIT_RECEIVED, HALTED = 0, 2, 3  # KVM_MP_STATE_*

# The CPU's own way out, and no other: masks at both 8259, the PIT does not count.
SILENT = "mov al, 0xff; out 0x21, al; out 0xa1, al; mov al, 0x38; out 0x43, al;"


@pytest.fixture
def pc(engine):
    vm = Vm(engine, memory_size=SIZE)
    vm.set_machine("pc")
    yield vm
    vm.close()


def load(vm, program, mode="real"):
    vm.set_mode(mode)
    vm.memory.write(ORIGIN, program.code)
    vm.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN}))


def run(vm, **bound):
    return vm.start(Bound(**bound)).result(SECONDS).line()


def register(vm, name):
    return int(vm.at_boundary(lambda cpu: read_register(cpu, name)).result(SECONDS), 0)


def test_a_halt_that_nothing_ends_ends_the_run(pc, divergences, assembler):
    program = assembler("mov bl, 1; cli; hlt; l1: inc bl; hlt; l2: mov bl, 9; l3: nop", "real")
    load(pc, program)
    began = time.monotonic()
    assert run(pc) == f"hlt rip={program.labels['l1']:#x}"
    assert time.monotonic() - began > SLEEP_MOST / 2 or "kvm-sleeps-in-the-kernel" not in divergences
    assert pc.state == "halted"
    assert run(pc) == f"hlt rip={program.labels['l2']:#x}"
    assert register(pc, "rbx") & 0xFF == 2
    assert run(pc, steps=1) == f"debug cause=step rip={program.labels['l3']:#x}"
    assert pc.state == "paused" and pc.counters()["exits.hlt"] == 2


def test_bounds_on_a_halt_that_nothing_ends(pc, divergences, assembler):
    """A step is as long as the engine has it: the halt ends it, or is what the next one finds."""
    program = assembler("cli; l0: hlt; l1: hlt; l2: jmp l2", "real")
    load(pc, program)
    assert run(pc, steps=1) == f"debug cause=step rip={program.labels['l0']:#x}"
    after = run(pc, steps=1)
    if "pvm-steps-past-hlt" in divergences:
        assert after == f"debug cause=step rip={program.labels['l1']:#x}"
        assert run(pc, instructions=1000) == f"limit rip={program.labels['l2']:#x}"
        return
    if "kvm-sleeps-in-the-kernel" in divergences:
        assert after == f"debug cause=step rip={program.labels['l1']:#x}"
        after = run(pc, steps=1)
    assert after == f"hlt rip={program.labels['l1']:#x}"
    assert run(pc, instructions=1000) == f"hlt rip={program.labels['l2']:#x}"
    assert run(pc, instructions=1000) == f"limit rip={program.labels['l2']:#x}"


def test_an_nmi_ends_a_halt_that_nothing_in_the_machine_would(pc, assembler):
    code = "mov word ptr [8], offset nmi; mov word ptr [10], 0; cli; hlt; l1: jmp l1; nmi: mov bl, 7; out 0xf4, al"
    program = assembler("xor ax, ax; mov ds, ax;" + code, "real")
    load(pc, program)
    assert run(pc).startswith("hlt ")
    pc.nmi()
    assert run(pc).startswith("shutdown cause=debug-exit ")
    assert register(pc, "rbx") & 0xFF == 7


def test_a_halt_that_an_nmi_of_a_pin_could_end_goes_on(pc, assembler):
    """LINT0 sends what the 8259 has as an NMI, though nothing comes. Then it is masked, and the halt is for good."""

    def set_lint0(value):
        def change(cpu):
            lapic = bytearray(cpu.get_state("lapic"))
            struct.pack_into("<I", lapic, 0xF0, 0x1FF)
            struct.pack_into("<I", lapic, 0x350, value)
            cpu.set_state("lapic", bytes(lapic))

        pc.change(change)

    program = assembler(f"{SILENT} cli; hlt; l1: jmp l1", "real")
    load(pc, program)
    set_lint0(0x400)
    assert run(pc, seconds=SLEEP_MOST * 1.3) == f"limit rip={program.labels['l1']:#x}"
    set_lint0(0x10400)
    assert run(pc) == f"hlt rip={program.labels['l1']:#x}"


@pytest.mark.parametrize("source", ["host", "instructions"])
@pytest.mark.parametrize(
    "timer, bound",
    [
        ("none", {"steps": 50}),
        ("none", {"seconds": 0.1}),
        ("none", {"instructions": 50}),
        ("masked", {"instructions": 50}),
    ],
)
def test_bounds_on_a_halt_that_an_interrupt_would_end(pc, divergences, assembler, source, timer, bound):
    """No timer runs, or one whose interrupts are masked."""
    if source == "instructions":
        if Capability.DETERMINISTIC not in pc.capabilities:
            pytest.skip("the engine has the host's time only")
        pc.set_time_source(source)
    ticks = "mov al, 0x34; out 0x43, al; xor al, al; out 0x40, al; out 0x40, al;" if timer == "masked" else ""
    program = assembler(f"{SILENT} {ticks} sti; nop; hlt; l1: jmp l1", "real")
    load(pc, program)
    assert run(pc, seconds=KERNEL) == f"limit rip={program.labels['l1']:#x}"
    began = time.monotonic()
    words = "debug cause=step" if "steps" in bound else "limit"
    assert run(pc, **bound) == f"{words} rip={program.labels['l1']:#x}"
    assert time.monotonic() - began < SLEEP_MOST + 5
    assert pc.at_boundary(lambda cpu: cpu.get_state("mp_state")).result(SECONDS) == struct.pack("<I", HALTED)


def test_a_switch_to_steps_is_a_bound_on_a_halt(pc, assembler):
    program = assembler(f"{SILENT} sti; nop; hlt; l1: jmp l1", "real")
    load(pc, program)
    assert run(pc, seconds=KERNEL) == f"limit rip={program.labels['l1']:#x}"
    pc.set_points(lambda points: points.set_stepping(True)).result()
    assert run(pc) == f"debug cause=step rip={program.labels['l1']:#x}"


def test_instructions_are_waited_for_while_a_timer_brings_them(pc, assembler):
    """A timer at 20 Hz; the bound counts instructions, and no sleep of them."""
    if Capability.BUDGET not in pc.capabilities:
        pytest.skip("the engine counts by steps, and holds interrupts back in them")
    program = assembler(
        """
        xor ax, ax; mov ds, ax; mov word ptr [0x80], offset handler; mov word ptr [0x82], 0
        mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
        mov al, 0xfe; out 0x21, al; mov al, 0x34; out 0x43, al; mov al, 0x0b; out 0x40, al; mov al, 0xe9; out 0x40, al
        l0: sti
        wait: hlt; jmp wait
        handler: inc bx; mov al, 0x20; out 0x20, al; iret
        """,
        "real",
    )
    load(pc, program)
    run(pc, until=program.labels["l0"])
    before = pc.counters()["instructions"]
    assert run(pc, instructions=1 + 1 + 6 * 6).startswith("limit ")
    assert pc.counters()["instructions"] - before == 38
    assert register(pc, "rbx") & 0xFFFF == 6


def test_a_cpu_that_waits_for_a_sipi_from_nobody(pc, assembler):
    load(pc, assembler("l: jmp l", "real"))
    pc.change(lambda cpu: cpu.set_state("mp_state", struct.pack("<I", INIT_RECEIVED)))
    assert run(pc) == run(pc, instructions=5) == run(pc, steps=1) == run(pc, seconds=9) == f"hlt rip={ORIGIN:#x}"
    pc.change(lambda cpu: cpu.set_state("mp_state", struct.pack("<I", RUNNABLE)))
    assert run(pc, seconds=KERNEL).startswith("limit ")


def test_a_triple_fault_ends_every_bound(pc, assembler):
    load(pc, assembler("lidt [0x500]; ud2", "protected"), "protected")
    end = run(pc)
    assert end.startswith("shutdown cause=triple-fault ")
    for bound in ({"steps": 1}, {"instructions": 9}, {"seconds": 0.1}, {}):
        assert run(pc, **bound) == end
