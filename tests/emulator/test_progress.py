"""What the emulator is in the middle of: a machine that goes into another one at any moment goes on undisturbed."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
from engine.asm import ORIGIN, assemble, needs_assembler
from engine.machine import RAM, machine_on
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.engine import rest
from vmfs.engine.base import DebugRequest
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.engine.rest import Chips, Flag, Progress, Time, Waiting
from vmfs.machine.state import put_cpu, put_engine, take_cpu, take_engine
from vmfs.words.errors import Invalid
from vmfs.words.stops import PortStop, Watchpoint

pytestmark = needs_assembler
ENGINE = EmulatorEngine()

PIC = "mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al;"
TIMER = f"""
    xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax; mov sp, 0x7000
    mov word ptr [0x80], offset tick; mov word ptr [0x82], 0
    {PIC}
    mov al, 0xfe; out 0x21, al
    mov al, 0x34; out 0x43, al; mov al, 0x40; out 0x40, al; mov al, 2; out 0x40, al
    sti
"""
TICK = """
tick: push ax; inc word ptr [0x500]; test byte ptr [0x500], 3; jne 1f
    mov al, 0x36; out 0x43, al; mov al, byte ptr [0x500]; out 0x40, al; mov al, 3; out 0x40, al
1:  mov al, 0x20; out 0x20, al; pop ax; iret
"""
# Name -> mode, whether with interrupt controllers, program. Each goes on for ever.
GUESTS = {
    "rep": ("real", False, """
        xor ax, ax; mov ds, ax; mov es, ax
        l: mov cx, 300; mov si, 0x2000; mov di, 0x2801; rep movsb
        mov cx, 40; mov di, 0x4000; mov al, 7; repne scasb
        mov cx, 5; mov di, 0x5000; mov dx, 0x99; rep insb
        mov cx, 3; mov si, 0x5000; mov dx, 0x98; rep outsw
        inc word ptr [0x2001]; jmp l"""),
    "code that changes itself": ("long", False, """
        lea rbx, [rip + there]; xor ecx, ecx
        l: inc ecx; mov [rbx + 1], ecx; there: mov eax, 0; add rdx, rax
        lea rdi, [rip + there + 9]; mov byte ptr [rip + place], 0xc3; call place; mov byte ptr [rip + place], 0x90
        jmp l; place: nop; ret"""),
    "devices out of reach": ("long", False, """
        mov edi, 0x80000 + 0x20000 - 4; mov ebx, 0xa0000; mov esp, 0x70000
        l: mov rax, [rdi]; add rax, rcx; mov [rdi], rax; movdqu xmm0, [rbx + 8]; movdqu [rbx + 0x18], xmm0
        push qword ptr [rbx]; pop rcx; xchg [rbx + 0x40], rdx; in eax, 0x80; out 0x81, eax
        mov rsi, rbx; lea rdi, [rbx + 0x100]; movsq; cmpsb; mov edi, 0x80000 + 0x20000 - 4; jmp l"""),
    "a timer and hlt": ("real", True, TIMER + """
        l: hlt; inc word ptr [0x502]; in al, 0x40; mov [0x504], al; jmp l;""" + TICK),
    "a timer and loops": ("real", True, TIMER + """
        l: mov cx, 0x123; rep stosb; in al, 0x61; xor al, 1; out 0x61, al; add [0x506], ax
        rdtsc; mov [0x508], eax; mov ax, 0; in al, 0x40; out 0x80, al; jmp l;""" + TICK),
    "the local APIC": ("long", True, """
        lea rax, [rip + tick]; mov [0x3000 + 0x400], ax; mov dword ptr [0x3402], 0x8e000008
        mov ax, cs; mov [0x3402], ax; mov dword ptr [0x3406], 0; mov dword ptr [0x340a], 0
        lidt [rip + table]; mov esp, 0x70000; mov edx, 0xfee00000; mov dword ptr [rdx + 0xf0], 0x1ff
        mov dword ptr [rdx + 0x320], 0x20040; mov dword ptr [rdx + 0x3e0], 0xb; mov dword ptr [rdx + 0x380], 777; sti
        l: mov eax, [rdx + 0x390]; add [0x2000], eax; inc ecx; test ecx, 1023; jne l
        mov dword ptr [rdx + 0x380], ecx; hlt; jmp l
        tick: inc dword ptr [0x2008]; mov dword ptr [rdx + 0xb0], 0; mov dword ptr [rdx + 0x300], 5; iretq
        table: .word 0xfff; .quad 0x3000"""),
    "the TSC deadline": ("long", True, """
        lea rax, [rip + tick]; mov [0x3000 + 0x400], ax; mov dword ptr [0x3402], 0x8e000008
        mov ax, cs; mov [0x3402], ax; mov dword ptr [0x3406], 0; mov dword ptr [0x340a], 0
        lidt [rip + table]; mov esp, 0x70000; mov edx, 0xfee00000; mov dword ptr [rdx + 0xf0], 0x1ff
        mov dword ptr [rdx + 0x320], 0x40040; mov ecx, 0x6e0; sti
        arm: rdtsc; add eax, 1500; mov edx, 0; wrmsr; mov edi, [0x2008]
        l: inc rsi; cmp edi, [0x2008]; je l; hlt_: mov edx, 0xfee00000; jmp arm
        tick: push rdx; mov edx, 0xfee00000; inc dword ptr [0x2008]; mov dword ptr [rdx + 0xb0], 0; pop rdx; iretq
        table: .word 0xfff; .quad 0x3000"""),
    "single steps": ("real", False, """
        xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000; mov word ptr [4], offset trap; mov word ptr [6], 0
        mov word ptr [0x84], offset gate; mov word ptr [0x86], 0
        pushf; pop ax; or ax, 0x100; push ax; popf
        l: inc bx; push ss; pop ss; nop; mov cx, 3; rep stosb; int 0x21; sti; add bp, bx; jmp l
        trap: inc word ptr [0x500]; iret
        gate: iret"""),
}  # fmt: skip


def begin(vm, name):
    mode, _, source = GUESTS[name]
    vm.load(assemble(source, mode), mode)
    vm.ram.write(0x2000, bytes(range(256)) * 8)


def everything(vm):
    return {**take_engine(vm.machine), **take_cpu(vm.vcpu), "ram": vm.ram.read(0, RAM)}


def go_into(vm, other):
    """`other` becomes what `vm` is."""
    other.ram.write(0, vm.ram.read(0, RAM))
    put_engine(other.machine, take_engine(vm.machine))
    put_cpu(other.vcpu, take_cpu(vm.vcpu))


def step(vm, dice):
    """A slice of the run, with an answer for what it reads, and something from outside now and then."""
    exit_ = vm.vcpu.run(budget=dice.choice((1, 1, 2, 3, 7, 50, 400, 3000)), goes_on=dice.random() < 0.5)
    data = vm.vcpu.access_data
    if exit_.REASON in ("io", "mmio") and exit_.direction in ("in", "read") and dice.random() < 0.9:
        vm.vcpu.access_data = bytes(dice.getrandbits(8) for _ in data)
    what = dice.random()
    if what < 0.02:
        vm.vcpu.nmi()
    elif what < 0.04 and "irqchip" in vm.kinds:
        vm.machine.irq_line(4, dice.random() < 0.5)
    return exit_


@pytest.mark.parametrize("name", GUESTS)
def test_at_any_moment(name):
    with_chips = GUESTS[name][1]
    for seed in range(3):
        rng = random.Random(f"{name} {seed}")
        with machine_on(ENGINE, irqchip=with_chips) as alone, machine_on(ENGINE, irqchip=with_chips) as first:
            with machine_on(ENGINE, irqchip=with_chips) as second:
                for vm in (alone, first, second):
                    vm.kinds = {"irqchip"} if with_chips else set()
                begin(alone, name)
                begin(first, name)
                begin(second, name)
                for number in range(150):
                    luck = rng.getrandbits(64)
                    exits = [step(vm, random.Random(luck)).line() for vm in (alone, first)]
                    assert exits[0] == exits[1], number
                    if rng.random() < 0.5:
                        go_into(first, second)
                        first, second = second, first
                    if number % 10 == 9:
                        is_, was = everything(first), everything(alone)
                        assert {key for key in was if was[key] != is_[key]} == set(), number
        assert rest.Progress.unpack(was["progress"]).instructions > 100


def test_bytes_of_progress_are_what_python_says():
    with machine_on(ENGINE, irqchip=True) as vm:
        begin(vm, "devices out of reach")
        dice, seen, vm.kinds = random.Random(5), set(), set()
        for _ in range(300):
            exit_ = step(vm, dice)
            seen.add(exit_.REASON)
            for unpack, data in (
                (Progress.unpack, vm.vcpu.get_state("progress")),
                (Time.unpack, vm.machine.get_state("time")),
                (Chips.unpack, vm.machine.get_state("chips")),
            ):
                assert unpack(data).pack() == data
        assert {"io", "mmio"} <= seen


def test_stops_that_wait_go_along():
    with machine_on(ENGINE) as vm, machine_on(ENGINE) as other:
        program = assemble("mov edi, 0xa0ffc; mov [rdi], rax; l: out 0x80, al; end: hlt", "long")
        vm.load(program, "long")
        vm.vcpu.set_debug(
            DebugRequest(
                stops=(PortStop(1, 0x80, 0x80), PortStop(2, 0x70, 0x90), Watchpoint(3, 0xA0FFC, 8, False, True))
            )
        )
        assert vm.vcpu.run().line().startswith("mmio direction=write addr=0xa0ffc size=4 ")
        go_into(vm, other)
        assert other.vcpu.exits_waiting
        stop = other.vcpu.run()
        assert (stop.cause, stop.id, stop.rip) == ("watchpoint", 3, program.labels["l"])
        assert other.vcpu.run().line().startswith("mmio direction=write addr=0xa1000 size=4 ")
        assert other.vcpu.run().line().startswith("io direction=out port=0x80 ")
        vm.vcpu.run(), vm.vcpu.run(), vm.vcpu.run()
        go_into(vm, other)
        stop = other.vcpu.run()
        assert (stop.cause, stop.id, [also.id for also in stop.also]) == ("io", 2, [1])
        assert other.vcpu.run().line() == f"hlt rip={program.labels['end'] + 1:#x}"


def test_what_a_string_out_of_a_device_wrote_waits_with_its_bytes():
    """OUTS whose read completes because state was set: the `out` is an exit of the next run, and has its data."""
    with machine_on(ENGINE) as vm:
        vm.load(assemble("mov esi, 0xa0000; mov dx, 0x80; outsw; hlt", "long"), "long")
        assert vm.vcpu.run().line().startswith("mmio direction=read ")
        vm.vcpu.access_data = b"\x34\x12"
        vm.vcpu.complete()
        assert vm.vcpu.run().line().startswith("io direction=out port=0x80 size=2 count=1 data=0x1234 ")
        assert vm.vcpu.run().REASON == "hlt"


def test_input_of_several_elements():
    """KVM asks for many elements of a REP INS at once: the instruction goes on with them, and asks for the rest."""
    with machine_on(ENGINE) as vm:
        vm.load(assemble("mov edi, 0x3000; mov ecx, 6; mov dx, 0x80; l: rep insw; hlt", "long"), "long")
        rip = vm.vcpu.run().rip
        asked = Progress.unpack(vm.vcpu.get_state("progress"))
        assert (asked.address, asked.element, asked.data) == (0x80, 2, b"\xff\xff")
        vm.vcpu.set_state("progress", replace(asked, data=b"abcdefgh").pack())
        assert vm.vcpu.access_data == b"abcdefgh"
        assert vm.vcpu.run(budget=2).REASON == "limit"
        half = Progress.unpack(vm.vcpu.get_state("progress"))
        assert half.data == b"efgh" and half.flags & Flag.FED and vm.regs()["rcx"] == 4
        vm.vcpu.set_state("progress", half.pack())
        assert vm.vcpu.run().line() == f"io direction=in port=0x80 size=2 count=1 rip={rip:#x}"
        assert vm.ram.read(0x3000, 9) == b"abcdefgh\0" and vm.regs()["rcx"] == 2


def test_time_is_moved_and_timers_keep_what_they_have_left():
    with machine_on(ENGINE, irqchip=True) as vm, machine_on(ENGINE, irqchip=True) as moved:
        for one in (vm, moved):
            begin(one, "a timer and loops")
            one.vcpu.run(budget=5000)
        time = Time.unpack(moved.machine.get_state("time"))
        for now in (10**15, 3):
            moved.machine.set_state("time", replace(time, now=now, clock=now + 5).pack())
            assert struct.unpack_from("<Q", moved.machine.get_state("clock"))[0] == now + 5
            assert moved.machine.get_state("chips") == vm.machine.get_state("chips")
            assert moved.vcpu.get_msr(0x10) == vm.vcpu.get_msr(0x10)
        before = [one.ram.read(0x500, 2) for one in (vm, moved)]
        for one in (vm, moved):
            while one.ram.read(0x500, 2) == before[0]:
                one.vcpu.run(budget=1)
        assert vm.regs() == moved.regs()


@pytest.mark.parametrize("text", [b"\x80", b"a\0b", b"a\n", "\u00e9".encode()])
def test_an_error_that_waits_is_a_sentence(text):
    with machine_on(ENGINE) as vm:
        now = Progress.unpack(vm.vcpu.get_state("progress"))
        waits = replace(now, exits=(Waiting(8, 0x1000, data=b"it went wrong"),)).pack()
        vm.vcpu.set_state("progress", waits)
        refused = replace(now, exits=(Waiting(8, 0x1000, data=text),)).pack()
        with pytest.raises(Invalid):
            vm.vcpu.set_state("progress", refused)
        with pytest.raises(Invalid):
            Progress.unpack(refused)
        assert vm.vcpu.get_state("progress") == waits
        assert vm.vcpu.run().line().startswith("error ")


# ---- any bytes


def _damaged(data, cuts):
    blob = bytearray(data)
    for at, value in cuts:
        if blob:
            blob[at % len(blob)] = value
    return bytes(blob)


@pytest.fixture(scope="module")
def saved():
    """A machine, and states of it that are full of things."""
    with machine_on(ENGINE, irqchip=True) as vm:
        begin(vm, "devices out of reach")
        dice = random.Random(7)
        vm.kinds = {"irqchip"}
        while True:
            step(vm, dice)
            progress = Progress.unpack(vm.vcpu.get_state("progress"))
            if progress.reads and progress.reading == rest.Reading.MEMORY:
                break
        full = replace(
            progress,
            exits=(
                Waiting(2, 0x1000, 0xA0000, 4, 1, b"1234", write=True),
                Waiting(1, 0x1000, 0x80, 2, 3, b"123456", write=True),
                Waiting(4, 0x1000, cause=2, id=9),
                Waiting(4, 0x1000, cause=3, id=8, also=True),
                Waiting(8, 0x1000, data=b"it went wrong"),
            ),
            msrs=((5, 1, 2, 3),),
        )
        vm.vcpu.set_state("progress", full.pack())
        assert vm.vcpu.get_state("progress") == full.pack()
        rest_of_it = {name: vm.machine.get_state(name) for name in ("time", "chips")}
        yield vm, {"progress": full.pack(), **rest_of_it}


@given(
    name=st.sampled_from(("progress", "time", "chips")),
    cuts=st.lists(st.tuples(st.integers(0, 1 << 10), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 40) | st.just(0),
    any_=st.none() | st.binary(max_size=300),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_refused_whole_or_taken(saved, name, cuts, cut, any_):
    vm, states = saved
    data = any_ if any_ is not None else _damaged(states[name], cuts)[: len(states[name]) - cut]
    target = vm.vcpu if name == "progress" else vm.machine
    vm.ram.write(ORIGIN, b"\xeb\xfe")
    for key, value in states.items():
        (vm.vcpu if key == "progress" else vm.machine).set_state(key, value)
    before = {**take_cpu(vm.vcpu), **take_engine(vm.machine)}
    try:
        target.set_state(name, data)
    except Invalid:
        after = {**take_cpu(vm.vcpu), **take_engine(vm.machine)}
        assert {key for key in before if before[key] != after[key]} == set()
    for _ in range(8):
        vm.vcpu.run(budget=20)
