"""A machine moves from one engine to another, or to itself, in the middle of a program."""

import struct

from engine.machine import RAM, machine_on

from vmfs.engine import measure_speed

# In this order: EFER and CR0 decide what of the rest is valid, and xcrs what xsave holds.
STATES = ("sregs", "xcrs", "fpu", "debugregs", "regs", "events", "mp_state")
MSRS = (0xC0000081, 0xC0000082, 0xC0000084, 0xC0000102, 0x174, 0x175, 0x176)  # STAR to SYSENTER_EIP

PROGRAM = """
    mov ecx, 0xc0000082
    mov eax, 0x12345678
    mov edx, 0xffff8000
    wrmsr
    mov rax, 0x1122334455667788
    mov [0x3000], rax
    in al, 0x80
    mov rbx, [0x3000]
    rdmsr
    hlt
end:
"""


def move(source, target):
    target.ram.write(0, source.ram.read(0, RAM))
    for name in STATES:
        target.vcpu.set_state(name, source.vcpu.get_state(name))
    for index in MSRS:
        target.vcpu.set_msr(index, source.vcpu.get_msr(index))


def test_a_machine_moves_between_two_accesses(vm, other, assembler):
    program = assembler(PROGRAM, "long")
    vm.load(program, "long")
    fpu = bytearray(vm.vcpu.get_state("fpu"))
    fpu[152:168] = b"0123456789abcdef"  # xmm0
    vm.vcpu.set_state("fpu", bytes(fpu))
    assert vm.vcpu.run().line().startswith("io direction=in port=0x80 ")
    vm.vcpu.access_data = b"\x99"
    vm.vcpu.complete()
    with machine_on(other) as target:
        move(vm, target)
        for name in STATES:
            assert target.vcpu.get_state(name) == vm.vcpu.get_state(name), name
        assert target.vcpu.run().line() == f"hlt rip={program.labels['end']:#x}"
        regs = target.regs()
        assert regs["rbx"] == 0x1122334455667788
        assert (regs["rdx"], regs["rax"]) == (0xFFFF8000, 0x12345678)
        assert target.vcpu.get_state("fpu")[152:168] == b"0123456789abcdef"
        move(target, vm)
        assert vm.regs() == regs


def test_a_pending_in_moves_as_not_yet_executed(vm, other, assembler):
    """What is read at an `in` is the CPU before it: the other machine executes it anew."""
    program = assembler("mov eax, 1; l0: in al, 0x80; hlt; end:", "long")
    vm.load(program, "long")
    assert vm.vcpu.run().REASON == "io"
    with machine_on(other) as target:
        move(vm, target)
        assert (
            target.vcpu.run().line()
            == f"io direction=in port=0x80 size=1 count=1 rip={program.labels['l0']:#x}"
        )
        target.vcpu.access_data = b"\x07"
        assert target.vcpu.run().line() == f"hlt rip={program.labels['end']:#x}"
        assert target.regs()["rax"] == 7


def test_speed_is_measured(engine):
    speed = measure_speed(engine, seconds=0.001)
    assert 0.001 < speed < 1e6


def test_kvm_regs_have_one_layout(vm):
    values = tuple(range(1, 17))
    vm.vcpu.set_state("regs", struct.pack("<16QQQ", *values, 0x1000, 2))
    assert struct.unpack("<18Q", vm.vcpu.get_state("regs")) == (*values, 0x1000, 2)
