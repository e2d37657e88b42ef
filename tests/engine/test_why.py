"""Why a machine has shut down: the faults, the registers before them, the last instructions; what each engine has."""

from __future__ import annotations

import re

import pytest
from engine import asm
from engine.asm import ORIGIN, assemble

from vmfs.debug.symbols import SymbolTable
from vmfs.engine import by_name
from vmfs.machine.machine import Vm
from vmfs.words.registers import write_registers

pytestmark = asm.needs_assembler

SECONDS = 20


@pytest.fixture
def vm(engine):
    vm = Vm(engine, memory_size=16 << 20)
    yield vm
    vm.close()


def crash(vm, source, mode="long", times=1):
    """Run to the shutdown; the account of it, by section, and the labels."""
    program = assemble(source, mode)
    vm.set_mode(mode)
    vm.memory.write(ORIGIN, program.code)
    vm.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN, "rsp": 0x9000, "cr2": 0x77}))
    vm.symbols = SymbolTable((address, "t", name) for name, address in program.labels.items())
    exit_ = vm.start().result(SECONDS)
    assert exit_.line().startswith("shutdown cause=triple-fault"), exit_.line()
    return told(vm), program.labels


def told(vm):
    head, *sections = vm.account.text(vm.symbols).partition("\n\ncpu ")[0].split("\n\n")
    by_name_ = dict(section.split(":\n", 1) for section in sections)
    return {"head": head} | {name: text.splitlines() for name, text in by_name_.items()}


def codes(lines):
    """Without what depends on where the code lies."""
    return [re.sub(r" (rsp|instruction)=\S+| at=\S+", "", line) for line in lines]


def page_fault(error, what, address, label=""):
    line = f"exception vector=0xe error={error:#x} addr={address:#x} {label}".rstrip()
    return f"{line}  # #PF: {what} {address:#x} in kernel mode, which is not mapped"


emulator = pytest.mark.usefixtures("only_emulator")


@pytest.fixture
def only_emulator(engine):
    if engine.name != "emulator":
        pytest.skip("KVM does not tell its faults")


@emulator
def test_no_idt(vm):
    """A student's first interrupt."""
    why, labels = crash(vm, "lidt [none]; mov eax, 5; here: int 0x80; nop; none: .quad 0, 0")
    assert why["head"].startswith(f"shutdown cause=triple-fault rip={labels['here']:#x} here\ninstructions 2")
    assert codes(why["faults"]) == [
        f"exception vector=0xd error={code:#x} here  # #GP: entry {entry} of the IDT, which has no entry {entry}"
        f" (its limit is 0x0), in the delivery of {what}"
        for code, entry, what in (
            (0x402, "0x80", "INT 0x80"),
            (0x6B, "0xd", "#GP, so a double fault"),
            (0x43, "0x8", "#DF, so the CPU shuts down"),
        )
    ]
    assert "rax 0x0000000000000005" in why["registers"] and "cr2 0x0000000000000077" in why["registers"]
    assert [line.split(":")[0] for line in why["instructions"]] == [
        f"0x{ORIGIN:016x} <_start>",
        f"0x{ORIGIN + 8:016x} <_start+0x8>",
        f"0x{labels['here']:016x} <here>",
    ]
    assert why["instructions"][1].endswith("mov eax, 5")
    assert why["instructions"][2].endswith("int 0x80  # where it stands: not executed")


@emulator
def test_a_bad_gdt(vm):
    """A segment beyond the table."""
    why, _ = crash(vm, "lidt [none]; mov eax, 0xfff0; here: mov ds, ax; none: .quad 0, 0", "protected")
    first = "exception vector=0xd error=0xfff0 here  # #GP: selector 0xfff0, entry 0x1ffe of the GDT"
    assert codes(why["faults"])[0] == first
    assert len(why["faults"]) == 3


@emulator
def test_a_stack_that_has_no_end(vm):
    """A recursion into a page that is not mapped: the page fault cannot be delivered, nor the double fault."""
    source = """
        mov rsp, 0x8000000100
        here: call here
        """
    why, labels = crash(vm, source)
    assert codes(why["faults"])[0] == page_fault(2, "a write to", 0x80000000F8, "here")
    assert why["faults"][-1].endswith("so the CPU shuts down")
    assert "cr2 0x0000000000000077" in why["registers"], "as it was before the first of them"
    assert why["instructions"][-1].startswith(f"0x{labels['here']:016x} <here>: e8 ")


@emulator
def test_a_fault_in_a_hot_loop_and_a_handler_that_faults(vm):
    """An IDT whose #PF handler is there, and faults itself: that is another chain; the one before is told, too."""
    source = """
        lea rax, [handler]; mov [idt + 14*16], ax; mov word ptr [idt + 14*16 + 2], cs
        mov word ptr [idt + 14*16 + 4], 0x8e00
        lidt [idtr]
        mov rdi, 0x200000; mov ecx, 5000
        again: mov [rdi], rax; add rdi, 8; dec rcx; jnz again
        mov rbx, 0x8000000000; here: mov rax, [rbx]
        handler: pop rcx; pop rcx; bad: ud2
        idtr: .word 15*16 - 1; .quad idt
        .balign 16; idt: .fill 512
        """
    why, labels = crash(vm, source)
    assert codes(why["exceptions before"]) == [page_fault(0, "a read of", 0x8000000000, "here")]
    assert codes(why["faults"])[0] == "exception vector=0x6 bad  # #UD"
    texts = [line.split(": ")[1] for line in why["instructions"]]
    assert len(texts) == 33
    assert [text[25:] for text in texts[-3:-1]] == ["pop rcx", "pop rcx"]
    assert all("<again" in line for line in why["instructions"][:-4])


@emulator
def test_a_jump_to_what_must_not_be_executed(vm):
    why, labels = crash(vm, "lidt [none]; mov rax, 0x8000000000; here: jmp rax; none: .quad 0, 0")
    assert codes(why["faults"])[0] == page_fault(0, "a fetch from", 0x8000000000)
    assert "<here>" in why["instructions"][-2]
    assert why["instructions"][-1] == "0x0000008000000000: not mapped to RAM or ROM  # where it stands: not executed"


@emulator
def test_a_page_that_must_not_be_executed(vm):
    """NX, by the page table of its own mode: the entry of 2 MiB gets bit 63, and EFER.NXE is set."""
    source = """
        lidt [none]; mov ecx, 0xc0000080; rdmsr; or eax, 0x800; wrmsr
        mov rax, cr3; mov rax, [rax]; and rax, ~0xfff; bts qword ptr [rax], 63; mov rax, cr3; mov cr3, rax
        here: nop; none: .quad 0, 0"""
    why, labels = crash(vm, source)
    line = codes(why["faults"])[0]
    assert "error=0x11" in line and "a fetch from" in line and line.endswith("which is not allowed"), line
    assert why["instructions"][-2].endswith("mov cr3, rax")


@emulator
def test_real_mode(vm):
    why, _ = crash(vm, "lidt [none]; here: int 0x21; none: .long 0, 0", "real")
    assert codes(why["faults"])[0] == (
        "exception vector=0xd here  # #GP, which has no entry 0x21 (its limit is 0x0), in the delivery of INT 0x21"
    )
    assert why["instructions"][0].endswith("lidt [0x1007]")


@emulator
def test_it_stays_until_the_next_one(vm):
    crash(vm, "lidt [none]; ud2; none: .quad 0, 0")
    before = vm.account
    vm.reset()
    vm.set_mode("long")
    vm.memory.write(ORIGIN, b"\xf4")
    vm.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN}))
    vm.start().result(SECONDS)
    assert vm.account is before
    crash(vm, "lidt [none]; nop; ud2; none: .quad 0, 0")
    assert vm.account is not before


def test_every_engine_tells_the_exit_and_the_registers(vm):
    why, _ = crash(vm, "lidt [none]; mov ebx, 1234; ud2; none: .quad 0, 0")
    assert why["head"].startswith("shutdown cause=triple-fault rip=")
    assert any(line.startswith("cr3 ") for line in why["registers"])
    assert why["faults"] and why["instructions"]


def test_several_cpus():
    vm = Vm(by_name("emulator"), memory_size=16 << 20)
    try:
        vm.set_machine("pc")
        vm.set_cpu_count(2)
        why, _ = crash(vm, "lidt [none]; ud2; none: .quad 0, 0")
        assert list(why).count("registers") == 1
        assert "\n\ncpu 1:\n" in vm.account.text(vm.symbols)
    finally:
        vm.close()


@pytest.mark.parametrize("machine", ["bare", "pc"])
def test_the_last_exits_where_no_instructions_are_told(vm, machine):
    """Also those that devices in C, or nobody, answered, and of runs before. The emulator tells instructions."""
    if vm.engine.name == "emulator":
        assert vm.cpu.vcpu.last_exits() is None
        return
    if machine == "pc":
        vm.set_machine("pc")
    source = "lidt [none]; mov edx, 0x300; mov ecx, 40; l: mov eax, ecx; out dx, al; loop l; ud2; none: .quad 0, 0"
    program = assemble(source, "long")
    vm.set_mode("long")
    vm.memory.write(ORIGIN, program.code)
    vm.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN}))
    vm.symbols = SymbolTable((address, "t", name) for name, address in program.labels.items())
    while not vm.start().result(SECONDS).line().startswith("shutdown"):
        pass
    outs = told(vm)["exits"]
    assert [re.search(r" port=0x300 .* data=(0x\w+) ", line)[1] for line in outs] == [hex(n) for n in range(32, 0, -1)]
    assert all(line.endswith(f" rip={program.labels['l'] + 3:#x} l+0x3") for line in outs), outs
