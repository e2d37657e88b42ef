"""What kernels find at their entry, beside what they find on QEMU 7.2 after SeaBIOS 1.16 (docs/boot.md has the table).

QEMU's values were read by kernels of a few instructions: `jmp .`, with the monitor's `info registers`, `info lapic`
and `info pic`; and one that sends every MSR and port."""

from __future__ import annotations

import struct

import pytest
from booting import MIB, bzimage, elf, multiboot2_header, multiboot_header, pvh_note
from engine.asm import ORIGIN

from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words.registers import read_register

SECONDS = 30
CODE = bytes.fromhex("ebfe") + bytes(1022)
MULTIBOOT1 = multiboot_header(1 << 16, (MIB, MIB, 0, 0, MIB + 32)) + CODE
_HEADER2 = multiboot2_header()
IMAGES = {
    "multiboot": MULTIBOOT1,
    "multiboot2": elf([(MIB, b"pad!" + _HEADER2 + CODE, 4096)], entry=MIB + 4 + len(_HEADER2), bits=32, machine=3),
    "pvh": elf([(MIB, CODE, 4096)], entry=MIB, notes=pvh_note(MIB)),
    "linux-32": bzimage(CODE, xloadflags=0),
    "linux-64": bzimage(CODE),
    "sector": b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa",
}

# What QEMU has at the entries of multiboot and PVH kernels. Its GDT lies in an option ROM, and esp is what the ROM had.
LOADER = {
    "cs": 0x08, "cs.base": 0, "cs.limit": 0xFFFFFFFF, "cs.db": 1, "cs.l": 0,
    **{f"{name}{part}": value for name in ("ds", "es", "fs", "gs", "ss")
       for part, value in (("", 0x10), (".base", 0), (".limit", 0xFFFFFFFF), (".db", 1))},
    "gdtr.limit": 0x27, "idtr.base": 0, "idtr.limit": 0x3FF, "tr": 0, "tr.base": 0, "tr.type": 11,
    "ldtr": 0, "ldtr.limit": 0xFFFF,
    "cr0": 0x11, "cr2": 0, "cr3": 0, "cr4": 0, "efer": 0, "rflags": 2,
    "dr6": 0xFFFF0FF0, "dr7": 0x400, "fcw": 0x37F, "fsw": 0, "mxcsr": 0x1F80, "apic_base": 0xFEE00900,
}  # fmt: skip
LINUX = {"cs": 0x10, "ds": 0x18, "es": 0x18, "ss": 0x18, "gdtr.limit": 0x2F, "tr": 0x20, "idtr.limit": 0}
DESCRIPTORS = {8: (0xFFFFFFFF, 11, 1), 0x10: (0xFFFFFFFF, 3, 1), 0x18: (0xFFFF, 11, 0), 0x20: (0xFFFF, 3, 0)}

MSRS = {
    0x1B: 0xFEE00900, 0x174: 0, 0x175: 0, 0x176: 0, 0x1D9: 0,
    0x250: 0x0606060606060606, 0x258: 0x0606060606060606, 0x259: 0,
    **dict.fromkeys(range(0x268, 0x270), 0x0505050505050505),
    **dict.fromkeys(range(0x202, 0x210), 0),
    0x277: 0x0007040600070406, 0x2FF: 0xC06, 0xC0000081: 0, 0xC0000082: 0, 0xC0000102: 0,
}  # fmt: skip
LAPIC = {
    0x80: 0, 0xD0: 0, 0xE0: 0xFFFFFFFF, 0xF0: 0x1FF, 0x320: 0x10000, 0x350: 0x8700, 0x360: 0x8400, 0x370: 0x10000,
    0x380: 0,
}  # fmt: skip


@pytest.fixture
def pc(engine):
    vm = Vm(engine, memory_size=64 * MIB)
    vm.set_machine("pc")
    yield vm
    vm.close()


def enter(vm, name):
    """Load it, and execute nothing."""
    vm.images["kernel"].write(0, IMAGES[name])
    assert vm.load().result(SECONDS).line().startswith("limit rip=")


def state(vm, name):
    return vm.at_boundary(lambda cpu: cpu.get_state(name)).result(SECONDS)


def registers(vm, names):
    return vm.at_boundary(lambda cpu: {name: int(read_register(cpu, name), 0) for name in names}).result(SECONDS)


@pytest.mark.parametrize("name", ["multiboot", "multiboot2", "pvh"])
def test_registers_are_those_of_other_loaders(pc, name):
    enter(pc, name)
    assert registers(pc, LOADER) == LOADER
    (base,) = registers(pc, ["gdtr.base"]).values()
    for selector, (limit, kind, big) in DESCRIPTORS.items():
        low, base_low, base_middle, access, flags, base_high = struct.unpack(
            "<HHBBBB", pc.memory.read(base + selector, 8)
        )
        size = low | (flags & 15) << 16
        assert (size << 12 | 0xFFF if flags & 0x80 else size) == limit
        assert (base_low, base_middle, base_high) == (0, 0, 0)
        assert (access & 15, access >> 4, flags >> 6 & 1) == (kind, 9, big)


def test_linux_has_the_selectors_of_its_protocol(pc):
    enter(pc, "linux-32")
    assert registers(pc, LINUX) == LINUX


@pytest.mark.parametrize("name", IMAGES)
def test_memory_types_and_chips_are_those_that_a_bios_leaves(pc, name):
    enter(pc, name)
    assert pc.at_boundary(lambda cpu: {msr: cpu.get_msr(msr) for msr in MSRS}).result(SECONDS) == MSRS
    base, mask = pc.at_boundary(lambda cpu: (cpu.get_msr(0x200), cpu.get_msr(0x201))).result(SECONDS)
    leaves = {leaf[0]: leaf for leaf in struct.iter_unpack("<7I12x", state(pc, "cpuid")[8:])}
    bits = leaves[0x80000008][3] & 0xFF
    assert base == 0xE0000000 and mask == (1 << bits) - 0x20000000 + 0x800  # uncached, from there to 4 GiB
    lapic = state(pc, "lapic")
    assert {at: struct.unpack_from("<I", lapic, at)[0] for at in LAPIC} == LAPIC
    chips = pc.get_machine_state("irqchip").result(SECONDS)
    master, slave = (chips[at : at + 16] for at in (8, 520 + 8))  # imr, irq_base, elcr of struct kvm_pic_state
    assert (master[2], master[5], master[14]) == (0xB8, 0x08, 0)
    assert (slave[2], slave[5], slave[14]) == (0x8E, 0x70, 0x0C)
    assert all(entry & 1 << 16 for entry in struct.unpack_from("<24Q", chips, 2 * 520 + 8 + 24))
    count, mode, gate = struct.unpack_from("<I9xBxB", pc.get_machine_state("pit").result(SECONDS))[:3]
    assert (count, mode, gate) == (0x10000, 2, 1)


def test_a_reset_takes_it_back_and_the_next_run_leaves_it_again(pc):
    enter(pc, "multiboot")
    pc.reset()
    assert pc.at_boundary(lambda cpu: cpu.get_msr(0x2FF)).result(SECONDS) == 0
    assert struct.unpack_from("<I", state(pc, "lapic"), 0xF0)[0] == 0xFF
    enter(pc, "multiboot")
    assert pc.at_boundary(lambda cpu: cpu.get_msr(0x2FF)).result(SECONDS) == 0xC06
    assert struct.unpack_from("<I", state(pc, "lapic"), 0xF0)[0] == 0x1FF


def test_a_cpu_without_mtrrs_gets_none(engine):
    vm = Vm(engine, memory_size=64 * MIB)
    try:
        vm.set_machine("pc")
        cpuid = bytearray(state(vm, "cpuid"))
        for at in range(8, len(cpuid), 40):
            if cpuid[at : at + 4] == b"\1\0\0\0":
                cpuid[at + 25] &= ~(1 << 4)  # leaf 1, edx bit 12
        vm.change(lambda cpu: cpu.set_state("cpuid", bytes(cpuid)))
        enter(vm, "multiboot")
    finally:
        vm.close()


def test_a_kernel_that_only_remaps_the_8259s_gets_the_ticks_of_the_bios(engine, assembler):
    """It keeps the masks that it finds, and never touches the timer: 18.2 ticks a second, so says the guest's TSC."""
    if engine.name != "emulator":
        pytest.skip("the time of the host: its ticks are late")
    program = assembler(
        """
        .long 0x1badb002, 0x10000, -(0x1badb002 + 0x10000), 0x1000, 0x1000, 0, 0, entry
        entry:
            mov word ptr [0x8100], offset tick; mov word ptr [0x8102], 8; mov word ptr [0x8104], 0x8e00
            mov word ptr [0x8106], 0; lidt [pointer]
            in al, 0x21; mov bl, al; in al, 0xa1; mov bh, al
            mov al, 0x11; out 0x20, al; out 0xa0, al; mov al, 0x20; out 0x21, al; mov al, 0x28; out 0xa1, al
            mov al, 4; out 0x21, al; mov al, 2; out 0xa1, al; mov al, 1; out 0x21, al; out 0xa1, al
            mov al, bl; out 0x21, al; mov al, bh; out 0xa1, al
            sti
        wait:
            hlt
            cmp ecx, 1; jne later; rdtsc; mov esi, eax
        later:
            cmp ecx, 11; jb wait
            rdtsc; sub eax, esi; mov dx, 0xf4; out dx, al
        tick:
            inc ecx; push eax; mov al, 0x20; out 0x20, al; pop eax; iret
        pointer: .word 0x7ff; .long 0x8000
        """,
        "protected",
    )
    vm = Vm(engine, memory_size=64 * MIB)
    try:
        vm.set_machine("pc")
        vm.set_time_source("instructions")
        assert ORIGIN == 0x1000
        vm.images["kernel"].write(0, program.code)
        assert vm.start(Bound(instructions=1_000_000)).result(SECONDS).line().startswith("shutdown cause=debug-exit ")
        (nanoseconds,) = registers(vm, ["rax"]).values()
        assert abs(nanoseconds / 10 - 65536 / 1_193_182 * 1e9) < 100
    finally:
        vm.close()
