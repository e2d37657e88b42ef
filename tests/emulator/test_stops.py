"""Stops change nothing: a run with them comes, instruction by instruction, through the states of one without."""

from __future__ import annotations

import random
import struct

import pytest
from engine import asm
from engine.asm import assemble
from engine.machine import RAM, machine_on

from vmfs.engine.base import DebugRequest
from vmfs.words import exits
from vmfs.words.stops import Breakpoint, PortStop, VectorStop, Watchpoint

_core = pytest.importorskip("vmfs.engine.emulator._core")
from vmfs.engine.emulator.engine import EmulatorEngine  # noqa: E402

pytestmark = asm.needs_assembler

STATES = ("regs", "sregs", "fpu", "xsave", "xcrs", "msrs", "debugregs", "events", "mp_state", "lapic")
MOST = 2500  # instructions of a program
_DATA, _STACK = 0x20000, 0x60000

# What a program is made of, {n} a number of its own; all keep to the data at r15 and leave the stack as it was.
PIECES = (
    "add rax, rbx; adc rcx, rax; xor rdx, rcx",
    "mov [r15 + 64], rax; add rbx, [r15 + 64]",
    "push rax; pop rbx; lea rax, [rax + rbx * 2 + 7]",
    "mov ecx, 5; l{n}: add rax, rcx; dec ecx; jnz l{n}",
    "mov rdi, r15; lea rsi, [r15 + 100]; mov ecx, 9; rep movsb",
    "mov rdi, r15; mov ecx, 3; rep stosq",
    "call f{n}; jmp g{n}; f{n}: inc rbx; ret; g{n}: nop",
    "int 0x30",
    "ud2",
    "out 0x20, al; in al, 0x21",
    "pushf; or dword ptr [rsp], 0x100; popf; nop; pushf; and dword ptr [rsp], -0x101; popf",
    "cli; inc r9; sti; nop",
    "movq xmm0, rax; paddq xmm1, xmm0; movups [r15 + 200], xmm1",
    "fild qword ptr [r15 + 64]; fistp qword ptr [r15 + 72]",
    "mov byte ptr [rip + m{n} + 2], 3; m{n}: add ebx, 1",
    "mov rax, cr3; mov cr3, rax; rdtsc; add rbx, rax",
)
HANDLERS = {
    1: "inc r10; iretq",
    6: "add qword ptr [rsp], 2; inc r11; iretq",
    0x30: "inc r12; iretq",
    0x40: "push rax; inc r13; mov eax, 0xfee000b0; mov dword ptr [rax], 0; pop rax; iretq",
}


def program(chance: random.Random) -> asm.Program:
    gates = []
    for vector in range(0x41):
        present = "0x8e00" if vector in HANDLERS else "0"
        gates.append(f".word {f'handler{vector}' if vector in HANDLERS else 0}, 8, {present}, 0, 0, 0, 0, 0")
    body = ["int 0x30", "ud2", *(chance.choice(PIECES).format(n=n) for n in range(chance.randint(5, 40)))]
    chance.shuffle(body)
    lines = [
        "lidt [idtr]; jmp begin; .balign 8; idt:",
        *gates,
        "idtr: .word . - idt - 1; .quad idt",
        *(f"handler{vector}: {code}" for vector, code in HANDLERS.items()),
        "begin: mov r8d, 0xfee00000",
        # The local APIC (SDM 3A 11.5): on, its timer periodic, vector 0x40, divided by 1.
        "mov dword ptr [r8 + 0xf0], 0x1ff; mov dword ptr [r8 + 0x3e0], 0xb",
        f"mov dword ptr [r8 + 0x320], 0x20040; mov dword ptr [r8 + 0x380], {chance.randint(40, 300)}",
        "finit; sti; again:",
        *body,
        "jmp again",
    ]
    return assemble("\n".join(lines), "long")


class Machine:
    """A machine with interrupt controllers, in deterministic time, at the start of a program."""

    def __init__(self, vm, code: asm.Program) -> None:
        self.vm = vm
        self.cpu = vm.vcpu
        vm.load(code, "long")
        vm.set_regs(r15=_DATA, rsp=_STACK)

    def done(self) -> int:
        return self.cpu.counters()["instructions"]

    def picture(self) -> tuple[bytes, ...]:
        return (*(self.cpu.get_state(name) for name in STATES), self.vm.ram.read(0, RAM))


def stepped(code: asm.Program, wanted: set[int] = frozenset()) -> tuple[list[tuple[int, int]], dict]:
    """Where the machine was, step by step (one ends after an event, too): rip, and how many instructions were
    done. And what it was where rip was one of `wanted`, by the number of the step."""
    with machine_on(EmulatorEngine(), irqchip=True) as vm:
        machine = Machine(vm, code)
        machine.cpu.set_debug(DebugRequest(step=True))
        places, pictures = [], {}
        while machine.done() < MOST:
            rip = vm.regs()["rip"]
            if rip in wanted:
                pictures[len(places)] = machine.picture()
            places.append((rip, machine.done()))
            exit_ = machine.cpu.run()
            assert exit_.line() == f"debug cause=step rip={exit_.rip:#x}"
        return places, pictures


def in_one_piece(code: asm.Program) -> tuple[bytes, ...]:
    with machine_on(EmulatorEngine(), irqchip=True) as vm:
        machine = Machine(vm, code)
        assert machine.cpu.run(budget=MOST).REASON == "limit"
        return machine.picture()


@pytest.mark.parametrize("seed", range(12))
def test_a_stop_leaves_what_an_undisturbed_run_has_there(seed):
    chance = random.Random(seed)
    code = program(chance)
    timer, trap = code.labels["handler64"], code.labels["handler1"]
    places, _ = stepped(code)
    rips = {rip for rip, _ in places}
    assert timer in rips, "the timer did not come"
    chosen = {*chance.sample(sorted(rips), 8), timer}
    _, pictures = stepped(code, chosen)
    expected = []
    for n in range(1, len(places) - 1):
        (before, _), (rip, done), (then, done_then) = places[n - 1 : n + 2]
        takes_event = then in (timer, trap) and done_then == done  # before it arrives at a breakpoint
        goes_on = before == rip  # an iteration of a repeated instruction, which is no arrival
        if rip in chosen and not takes_event and not goes_on:
            expected.append(n)
    with machine_on(EmulatorEngine(), irqchip=True) as vm:
        machine = Machine(vm, code)
        elsewhere = tuple(Breakpoint(100 + n, 0x70000 + n) for n in range(200))
        machine.cpu.set_debug(
            DebugRequest(
                stops=(
                    *elsewhere,
                    *(Breakpoint(1 + n, place) for n, place in enumerate(chosen)),
                    Watchpoint(50, _DATA + 4000, 8, True, True),
                    Watchpoint(51, 0x70000, 9, True, True),
                    PortStop(60, 0x70, 0x7F),
                    VectorStop(70, (0, 13, 14)),
                )
            )
        )
        for number in expected:
            goes_on = chance.random() < 0.5 and number != expected[0]
            exit_ = machine.cpu.run(goes_on=goes_on)
            assert isinstance(exit_, exits.Debug) and exit_.cause == "breakpoint", exit_.line()
            assert (exit_.rip, machine.done()) == places[number]
            assert machine.picture() == pictures[number], f"step {number}, at {exit_.rip:#x}"
        while machine.done() < MOST:
            machine.cpu.run(budget=MOST - machine.done())
        assert machine.picture() == in_one_piece(code)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_watched_runs_as_what_is_not(seed):
    """Watchpoints, ports and caught vectors all over the program: the end is the same, and nothing is missed."""
    chance = random.Random(1000 + seed)
    code = program(chance)
    causes = set()
    with machine_on(EmulatorEngine(), irqchip=True) as vm:
        machine = Machine(vm, code)
        machine.cpu.set_debug(
            DebugRequest(
                stops=(
                    Watchpoint(1, _DATA, 4096, on_read=False, on_write=True),
                    Watchpoint(2, _STACK - 4096, 4096, on_read=True, on_write=True, physical=True),
                    PortStop(3, 0, 0xFFFF),
                    VectorStop(4, tuple(range(256))),
                )
            )
        )
        while (left := MOST - machine.done()) > 0:
            exit_ = machine.cpu.run(budget=left, goes_on=True)
            causes.add(getattr(exit_, "cause", exit_.REASON))
        assert causes >= {"watchpoint", "exception", "interrupt"}
        assert machine.picture() == in_one_piece(code)


def test_thousands_of_breakpoints_are_each_found():
    """Over the whole of a page of nops, at odd addresses: a run comes to each."""
    with machine_on(EmulatorEngine()) as vm:
        vm.load(assemble(".fill 3000, 1, 0x90; hlt", "long"), "long")
        points = tuple(Breakpoint(n, 0x1000 + n) for n in range(1, 3000, 2))
        far = tuple(Breakpoint(10000 + n, (n * 0x9E3779B97F4A7C15) % (1 << 64) | 1 << 40) for n in range(60000))
        vm.vcpu.set_debug(DebugRequest(stops=(*far, *reversed(points))))
        for point in points:
            exit_ = vm.vcpu.run()
            assert (exit_.REASON, exit_.rip, exit_.id) == ("debug", point.address, point.id)
        assert vm.vcpu.run().REASON == "hlt"


def test_a_kick_at_a_breakpoint_does_not_pass_it():
    """A run in slices stops wherever one in one piece does."""
    with machine_on(EmulatorEngine()) as vm:
        code = assemble("l0: inc rax; l1: inc rax; l2: inc rax; jmp l0", "long")
        vm.load(code, "long")
        vm.vcpu.set_debug(DebugRequest(stops=(Breakpoint(7, code.labels["l1"]),)))
        assert vm.vcpu.run(budget=1).REASON == "limit"
        for _ in range(5):
            vm.vcpu.kick()
            assert vm.vcpu.run(goes_on=True).REASON == "interrupted"
        line = f"debug cause=breakpoint id=7 rip={code.labels['l1']:#x}"
        assert vm.vcpu.run(goes_on=True).line() == line
        for _ in range(5):  # it has stopped there, so that it is not come to again
            vm.vcpu.kick()
            assert vm.vcpu.run(goes_on=True).REASON == "interrupted"
        before = struct.unpack_from("<Q", vm.vcpu.get_state("regs"))[0]
        assert vm.vcpu.run(goes_on=True).line() == line
        assert vm.regs()["rax"] - before == 3


def test_hundreds_of_stops_of_one_place_all_come():
    """At once, each once, however often the instruction accesses what they watch."""
    with machine_on(EmulatorEngine()) as vm:
        vm.load(assemble("mov ecx, 4; mov edi, 0x2000; l0: rep movsq; l1: nop; l2: hlt", "long"), "long")
        watches = tuple(Watchpoint(n, 0x2000 + n % 8, 1 + n % 5, n % 2 == 0, True) for n in range(1, 301))
        points = tuple(Breakpoint(n, 0x100A) for n in range(1000, 1400))
        vm.vcpu.set_debug(DebugRequest(stops=(*points, *watches)))
        exit_ = vm.vcpu.run()
        assert (exit_.cause, exit_.rip) == ("breakpoint", 0x100A)
        assert [exit_.id, *(stop.id for stop in exit_.also)] == [point.id for point in points]
        exit_ = vm.vcpu.run()
        assert (exit_.cause, exit_.rip) == ("watchpoint", 0x100A)
        ids = {exit_.id, *(stop.id for stop in exit_.also)}
        assert ids == {watch.id for watch in watches} and len(exit_.also) == 299
        for stop in (exit_, *exit_.also):
            assert 0x2000 <= stop.addr < 0x2008 + 5 and stop.rip == exit_.rip


def test_what_is_held_survives_other_points():
    """An `out` at a watched port is first the exit of the access; points are changed; then comes the stop."""
    with machine_on(EmulatorEngine()) as vm:
        vm.load(assemble("out 0x80, al; l1: hlt", "long"), "long")
        vm.vcpu.set_debug(DebugRequest(stops=(*(PortStop(n, 0x80, 0x80) for n in range(1, 9)),)))
        assert vm.vcpu.run().REASON == "io"
        vm.vcpu.set_debug(DebugRequest(stops=(Breakpoint(1, 0x5000),)))
        exit_ = vm.vcpu.run()
        assert [exit_.id, *(stop.id for stop in exit_.also)] == list(range(1, 9)) and exit_.cause == "io"
        vm.vcpu.set_debug(DebugRequest())
        assert vm.vcpu.run().REASON == "hlt"


def test_the_core_has_the_words_of_the_exits_in_their_order():
    numbers = {name: number for name, number in vars(_core).items() if name.startswith(("EXIT_", "DEBUG_"))}
    wanted = {f"EXIT_{kind.REASON.upper()}": at for at, kind in enumerate(exits.EXITS, 1)}
    wanted |= {f"DEBUG_{cause.upper()}": at for at, cause in enumerate(exits.DEBUG_CAUSES)}
    assert numbers == wanted
