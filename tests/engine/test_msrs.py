"""MSRs that the CPU does not have: the guest gets #GP and no run ends, and the engine remembers them."""

from __future__ import annotations

import pytest
from engine.cases.exceptions import idt64

from vmfs.engine.base import UNCLAIMED_MSRS, DebugRequest
from vmfs.words.errors import Invalid

NOWHERE = 0x12345678  # in none of the ranges that Intel, AMD or a hypervisor use
LSTAR = 0xC0000082

# #GP at a RDMSR or WRMSR: count it, and go on after the instruction.
SKIP = "handler13: inc rbx; add rsp, 8; add qword ptr [rsp], 2; iretq"


@pytest.fixture
def nowhere(vm):
    with pytest.raises(Invalid):
        vm.vcpu.get_msr(NOWHERE)
    return NOWHERE


def test_it_faults_and_is_remembered(vm, assembler, nowhere):
    program = assembler(
        f"""
        {idt64(13)}
        xor ebx, ebx; mov eax, 5; mov edx, 6
        mov ecx, {nowhere + 1}; rdmsr
        mov ecx, {nowhere}; rdmsr; wrmsr
        mov ecx, {nowhere + 1}; last: rdmsr
        hlt; end:
        {SKIP}
        """,
        "long",
    )
    vm.load(program, "long")
    assert vm.vcpu.unclaimed_msrs() == ()
    assert vm.vcpu.run().line() == f"hlt rip={program.labels['end']:#x}"
    regs = vm.regs()
    assert (regs["rbx"], regs["rax"], regs["rdx"]) == (4, 5, 6)
    (write, read) = vm.vcpu.unclaimed_msrs()
    assert write[:3] == (nowhere, 1, 1)
    assert read == (nowhere + 1, 2, 0, program.labels["last"])


def test_one_that_does_not_take_the_value_is_there(vm, assembler):
    """LSTAR with an address that is not canonical."""
    code = f"xor ebx, ebx; mov ecx, {LSTAR}; mov eax, 5; mov edx, 0x40000000; wrmsr; hlt; end:"
    program = assembler(f"{idt64(13)}; {code} {SKIP}", "long")
    vm.load(program, "long")
    assert vm.vcpu.run().line() == f"hlt rip={program.labels['end']:#x}"
    assert vm.regs()["rbx"] == 1
    assert vm.vcpu.unclaimed_msrs() == ()


def test_the_last_used_are_remembered(vm, assembler, nowhere):
    count = UNCLAIMED_MSRS + 8
    code = f"mov ecx, {nowhere}; again: rdmsr; inc ecx; cmp ecx, {nowhere + count}; jne again; hlt"
    vm.load(assembler(f"{idt64(13)}; {code}; {SKIP}", "long"), "long")
    assert vm.vcpu.run().REASON == "hlt"
    assert [row[0] for row in vm.vcpu.unclaimed_msrs()] == list(range(nowhere + 8, nowhere + count))


def test_steps_do_not_see_it(vm, assembler, nowhere, divergences):
    """A step of the instruction ends at the handler."""
    code = f"mov ecx, {nowhere}; at: rdmsr; hlt"
    program = assembler(f"{idt64(13)}; {code}; handler13: nop; second: hlt", "long")
    vm.load(program, "long")
    vm.vcpu.set_debug(DebugRequest(step=True))
    while vm.regs()["rip"] != program.labels["at"]:
        assert vm.vcpu.run().REASON == "debug"
    place = "second" if "pvm-steps-past-exceptions" in divergences else "handler13"
    assert vm.vcpu.run().line() == f"debug cause=step rip={program.labels[place]:#x}"
    assert len(vm.vcpu.unclaimed_msrs()) == 1


def test_an_interrupt_does_not_come_between_fault_and_handler(vm, assembler, nowhere):
    """An engine that has both at once would break into the handler, though interrupts are off there."""
    code = f"""
        {idt64(13, 0x30)}
        mov ecx, {nowhere}; xor ebx, ebx; xor ebp, ebp; xor r8, r8; sti
    again:
        rdmsr
        .rept 64; nop; .endr
        cmp ebp, 60
        jb again
        cli; hlt; end:
    handler48: bt dword ptr [rsp + 16], 9; cmc; adc r8, 0; inc ebp; iretq
    """
    program = assembler(f"{code}; {SKIP}", "long")
    vm.load(program, "long")
    for _ in range(60):
        vm.vcpu.interrupt(0x30)
    assert vm.vcpu.run().line() == f"hlt rip={program.labels['end']:#x}"
    regs = vm.regs()
    assert regs["rbp"] == 60 and regs["r8"] == 0
    (row,) = vm.vcpu.unclaimed_msrs()
    assert row[1] == regs["rbx"]
