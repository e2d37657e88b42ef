"""Corners of protection, decoding and interrupts that an examination of the core found wrong."""

from __future__ import annotations

import struct

import pytest
from emulator.system_lib import (
    _TABLES_AT,
    CODE64,
    DATA,
    DATA16,
    DATA32,
    DB,
    FREE,
    GP,
    KERNEL_STACK,
    NT,
    PF,
    RF,
    SHUTDOWN,
    SS,
    STOP,
    TABLES,
    TSS,
    TSS2_SELECTOR,
    UD,
    Guest,
    P,
    W,
    descriptor,
    gate,
)  # fmt: skip
from engine.asm import ORIGIN, assemble

LAST = 0xFFFE
_NMI_MASKED = 14  # in struct kvm_vcpu_events


@pytest.mark.parametrize("code", ["push rax", "call stop", "push qword ptr [rip]", "enter 0, 0", "pushf"])
def test_a_stack_whose_end_is_not_canonical(code):
    """It begins in the lower half and ends after it: #SS, as every access of the stack."""
    with Guest("long") as guest:
        guest.set_gate(SS, gate(CODE64, guest.stub(SS), 14) | 1 << 32)
        assert guest.run(f"mov rsp, 0x800000000004; {code}") == SS
        assert guest.error == 0


def test_tables_do_not_go_on_after_the_lower_half():
    """In compatibility mode, too, linear addresses of tables have 64 bits."""
    with Guest("compat") as guest:
        upper = TABLES + 0x1000
        guest.put(TABLES + 8 * 256, upper | P | W)  # what stands after 7fffffffffff must not be taken for it
        guest.put(TABLES + 8 * 255, upper | P | W)
        for vector in range(8, 32):
            guest.put(16 * vector - 0x80, gate(CODE64, guest.stub(vector), 14))
        sregs = bytearray(guest.cpu.get_state("sregs"))
        struct.pack_into("<Q", sregs, _TABLES_AT + 16, 0x7FFF_FFFF_FFFF - 0x7F)  # the IDT: eight gates
        guest.cpu.set_state("sregs", bytes(sregs))
        assert guest.run("int 0x10") == SHUTDOWN


def test_breakpoints_know_32_bits_of_linear_addresses():
    """CS begins below 4 GiB and its code after it."""
    with Guest("protected") as guest:
        guest.load("mov eax, offset place; mov dr0, eax; mov eax, 0x401; mov dr7, eax; place: nop; nop")
        sregs = bytearray(guest.cpu.get_state("sregs"))
        struct.pack_into("<Q", sregs, 0, 0xFFFF_F000)
        guest.cpu.set_state("sregs", bytes(sregs))
        guest.set(rip=guest.regs()["rip"] + 0x1000)
        assert guest.run() == DB
        assert guest.frame(False)[0] == guest.labels["place"] + 0x1000


def test_what_was_refused_is_looked_at_again():
    """Decoding remembers that bytes are refused: for all the bytes that it saw."""
    with Guest("real") as guest:
        guest.load("nop; nop; nop; nop; nop")  # the first: a run's first instruction is decoded anew
        start = guest.regs()["rip"] + 1
        guest.write(start, b"\xc4\xc0")  # VEX is for protected mode
        assert guest.run() == UD
        assert guest.frame(False)[0] == start
        guest.write(start + 1, b"\x06")  # LES AX, [9090]
        guest.begin()
        assert guest.run() == STOP
    with Guest("protected") as guest:
        sregs = bytearray(guest.cpu.get_state("sregs"))
        struct.pack_into("<I", sregs, 8, 0x3002)  # the limit of CS
        guest.labels = {"stop": 0x3001}
        guest.write(0x2FFE, b"\x90\x0f\x80\x00\x00\x00\x00")  # JO rel32, over the end of the page and of the segment
        for byte, what in ((0x80, GP), (0xC8, STOP), (0x80, GP)):  # C8: BSWAP EAX
            guest.write(0x3000, bytes((byte,)))
            guest.write(0x3001, b"\x0f\x0b")
            guest.cpu.set_state("sregs", bytes(sregs))
            guest.set(rip=0x2FFE)
            assert guest.run() == what


def test_enter_with_a_32_bit_operand_on_a_16_bit_stack():
    """EBP gets ESP, of which the push moved the low half only: so have processors it (tests/emulator/fuzz)."""
    with Guest("protected") as guest:
        assert guest.run(
            f"mov eax, {DATA16}; mov ss, eax; mov esp, 0x80000000; enter 2, 0; mov eax, {DATA32}; mov esi, esp;"
            f"mov ss, eax; mov esp, {KERNEL_STACK}"
        ) == STOP  # fmt: skip
        regs = guest.regs()
        assert (hex(regs["rbp"]), hex(regs["rsi"])) == ("0x8000fffc", "0x8000fffa")


@pytest.mark.parametrize("code", ["clflush cs:[edi]", "clflushopt cs:[edi]", "clwb cs:[edi]"])
def test_flushing_a_line_of_an_execute_only_segment(code):
    """Intel SDM 2A CLFLUSH allows it; a load is refused, and so is what lies outside."""
    with Guest("protected") as guest:
        guest.set_descriptor(FREE, descriptor(kind=9))
        begin = f"push {FREE}; push offset there; retf; there: mov edi, {DATA};"
        assert guest.run(f"{begin} {code}") == STOP
        guest.begin()
        assert guest.run(f"{begin} mov al, cs:[edi]") == GP
        guest.begin()
        guest.set_descriptor(FREE, descriptor(kind=9, limit=0xFFFF, granular=0))
        assert guest.run(f"{begin} {code}") == GP


def test_a_breakpoint_comes_before_the_faults_of_the_fetch():
    """Intel SDM 3A table 6-2. If it came after, it would never: the frame of a fault has RF. Processors do so."""
    with Guest("long") as guest:
        there = DATA
        guest.put(guest.pte(there), 0)
        load = f"mov eax, {there}; mov dr0, rax; mov ebx, 0x401; mov dr7, rbx"
        assert guest.run(f"{load}; jmp rax") == DB
        assert guest.frame(False)[0] == there
        guest.set(rip=there, rflags=RF | 2)
        assert guest.run() == PF
        assert (guest.frame(True)[0], guest.frame(True)[2] & RF) == (there, RF)


@pytest.mark.parametrize("code", ["nop; nop", "mov al, 1", ".byte 0x70, 0x1e", "cmp al, [bx]", "xlatb; cmc"])
def test_virtual_8086_code_ends_at_ffff(code):
    """#GP, whose gate of 32 bits pushes EIP 10000h."""
    with Guest("v86") as guest:
        guest.write(LAST, assemble(code, "real").code)
        guest.write(0, b"\xf4\xf4")
        guest.labels = {"stop": 0}
        guest.set(rip=LAST, rbx=0x1000)
        assert guest.run() == GP
        assert guest.frame(True)[0] == 0x10000


@pytest.mark.parametrize("limit", [0x1FFFF, 0xFFFF])
@pytest.mark.parametrize("code", [
    "pushd 0x10010; .byte 0x66, 0xc3",  # RET
    "pushd 0x2000; pushd 0x10010; .byte 0x66, 0xcb",  # RETF
    "pushd 2; pushd 0x2000; pushd 0x10010; .byte 0x66, 0xcf",  # IRET
    ".byte 0x66, 0xe9; .long 0x10010 - 0x1006",  # JMP
    ".byte 0x66, 0xea; .long 0x10010; .word 0x2000",
])  # fmt: skip
def test_real_mode_goes_beyond_ffff_by_32_bit_operands(code, limit):
    """As far as the limit of CS allows; what is refused has changed nothing."""
    with Guest("real") as guest:
        guest.load(code)
        guest.write(0x21000, guest.memory[ORIGIN : ORIGIN + 64])
        guest.write(0x30010, b"\xb0\x01\x0f\x0b")  # mov al, 1; ud2
        sregs = bytearray(guest.cpu.get_state("sregs"))
        struct.pack_into("<QIH", sregs, 0, 0x20000, limit, 0x2000)
        guest.cpu.set_state("sregs", bytes(sregs))
        last = guest.labels["stop"]
        guest.labels = {"stop": -1}
        if limit == 0x1FFFF:
            assert guest.run() == UD
            assert (guest.regs()["rax"] & 0xFF, guest.frame(False)[:2]) == (1, [0x12, 0x2000])
        else:
            assert guest.run() == GP
            assert ORIGIN <= guest.frame(False)[0] < last


@pytest.mark.parametrize(("mode", "code", "vector"), [
    ("protected", "push 0; push 0; push 0; iret", GP),
    ("v86", "iret", GP),
    ("protected", f"push {2 | NT}; popfd; iret", 10),
    ("protected", "pushfd; push cs; push offset stop; iret", STOP),
])  # fmt: skip
def test_iret_unmasks_nmis_even_if_it_faults(mode, code, vector):
    """Intel SDM 3A 6.7.1."""
    with Guest(mode) as guest:
        guest.put(TSS, TSS2_SELECTOR, 2)  # where a nested task would return to; it is not busy
        events = bytearray(guest.cpu.get_state("events"))
        events[_NMI_MASKED] = 1
        guest.cpu.set_state("events", bytes(events))
        guest.cpu.nmi()
        guest.load(code)
        guest.write(guest.stub(vector if vector != STOP else UD), b"\x90\xf4")
        assert guest.run() == 2  # before the handler's first instruction, or the one returned to
