"""Switches: between modes, and between tasks by the hardware (Intel SDM 3A 9.8, 9.9, chapter 7)."""

from __future__ import annotations

import struct

import pytest
from emulator.system_lib import (
    CODE16,
    CODE32,
    CODE64,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    DATA16,
    DATA32,
    DB,
    DF,
    FREE,
    GDT,
    GP,
    KERNEL_STACK,
    LDT_SELECTOR,
    NP,
    NT,
    PF,
    RF,
    SS,
    STACK1,
    STOP,
    TABLES,
    TS,
    TSS,
    TSS2,
    TSS2_SELECTOR,
    TSS_SELECTOR,
    USER_DATA,
    VM,
    Guest,
    descriptor,
    gate,
    tss_descriptor,
)  # fmt: skip
from engine.asm import ORIGIN

from vmfs.engine.emulator import _core

GDT_BASE = 8 * 24  # in struct kvm_sregs


def test_real_protected_long_compatibility_and_back():
    """From real mode to each mode and back; a mark of each in memory at 0x30000."""
    with Guest("real") as guest:
        guest.identity_4level()
        code = f"""
            xor ax, ax; mov ds, ax; mov sp, 0x8000
            mov word ptr [0x2000], 0xfff; mov dword ptr [0x2002], {GDT}
            .byte 0x66; lgdt [0x2000]
            mov eax, cr0; or al, 1; mov cr0, eax
            ljmp {CODE32}, offset protected
        .code32
        protected:
            mov ax, {DATA32}; mov ds, ax; mov ss, ax; mov esp, {KERNEL_STACK}
            mov dword ptr [0x30000], 0x32323232
            mov eax, cr4; or eax, 0x20; mov cr4, eax
            mov eax, {TABLES}; mov cr3, eax
            mov ecx, 0xc0000080; rdmsr; or eax, 0x100; wrmsr
            mov eax, cr0; bts eax, 31; mov cr0, eax
            mov ecx, 0xc0000080; rdmsr; mov [0x30010], eax
            .byte 0x40; inc eax
            ljmp {CODE64}, offset long
        .code64
        long:
            mov rax, 0x6464646464646464; mov [0x30008], rax
            mov qword ptr [rsp - 16], offset compat; mov word ptr [rsp - 8], {CODE32}
            rex.W; ljmp [rsp - 16]
        .code32
        compat:
            .byte 0x40
            mov dword ptr [0x30014], 0xc0c0c0c0
            mov eax, cr0; btr eax, 31; mov cr0, eax
            mov ecx, 0xc0000080; rdmsr; mov [0x30018], eax
            btr eax, 8; wrmsr
            ljmp {CODE16}, offset protected16
        .code16
        protected16:
            mov ax, {DATA16}; mov ds, ax; mov es, ax; mov ss, ax
            mov eax, cr0; and al, 0xfe; mov cr0, eax
            ljmp 0, offset back
        back:
            mov ax, 0x3000; mov ds, ax; mov word ptr [0x1c], 0x1616
            hlt
        """
        guest.load(code)
        exit_ = guest.go()
        assert exit_[0] == _core.EXIT_HLT, exit_
        assert guest.get(0x30000, 4) == 0x32323232
        assert guest.get(0x30008) == 0x6464646464646464
        assert guest.get(0x30010, 4) & 0x500 == 0x500  # LME and LMA
        assert guest.get(0x30014, 4) == 0xC0C0C0C0
        assert guest.get(0x30018, 4) & 0x500 == 0x100  # LMA went with PG
        assert guest.get(0x3001C, 2) == 0x1616
        assert guest.control("cr0") == 0x10 and guest.control("efer") == 0


def test_mode_stops():
    with Guest("real") as guest:
        guest.load("mov eax, cr0; or al, 1; mov cr0, eax; nop; nop; hlt")
        guest.cpu.set_debug(False, [(_core.STOP_MODE, 7, 0, 0, False, False)])
        exit_ = guest.go()
        assert (exit_[0], exit_[6], exit_[7]) == (_core.EXIT_DEBUG, _core.DEBUG_MODE, 7)
        assert exit_[1] == guest.labels["stop"] - 3
        assert guest.go()[0] == _core.EXIT_HLT


def test_unreal_mode_keeps_the_limits():
    with Guest("real") as guest:
        guest.put(0x2000, 0xFFF, 2)
        guest.put(0x2002, GDT, 4)
        guest.put(0x100000 + 0x50, 0x1234, 4)
        guest.load(f"""xor ax, ax; mov ds, ax; .byte 0x66; lgdt [0x2000]; mov eax, cr0; or al, 1;
        mov cr0, eax;
                   mov bx, {DATA32}; mov fs, bx; and al, 0xfe; mov cr0, eax; xor bx, bx; mov fs, bx;
                   mov ebx, 0x100050; mov ecx, fs:[ebx]; hlt""")
        assert guest.go()[0] == _core.EXIT_HLT
        assert guest.regs()["rcx"] & 0xFFFFFFFF == 0x1234


# ---- Tasks ------------------------------------------------------------


def task(guest: Guest, ip: int, **fields: int) -> None:
    """The second task, at TSS2: 32-bit."""
    values = {"eip": ip, "eflags": 2, "esp": STACK1, "eax": 0xAAAA, "ebx": 0xBBBB, "ldt": LDT_SELECTOR}
    values |= {"es": DATA32, "cs": CODE32, "ss": DATA32, "ds": DATA32} | fields
    names = "cr3 eip eflags eax ecx edx ebx esp ebp esi edi es cs ss ds fs gs ldt trap".split()
    offsets = {name: 28 + 4 * n for n, name in enumerate(names)}  # 7.2.1
    for name, value in values.items():
        guest.put(TSS2 + offsets[name], value, 4)


def busy(guest: Guest, selector: int) -> bool:
    return bool(guest.get(GDT + selector + 5, 1) & 2)


def test_jump_to_a_task_saves_and_loads_everything():
    with Guest("protected") as guest:
        guest.load(f"mov ecx, 0x1234; stc; jmp {TSS2_SELECTOR}:0; back: hlt; other: nop")
        task(guest, guest.labels["other"])
        assert guest.run() == STOP
        regs = guest.regs()
        assert (regs["rax"], regs["rbx"], regs["rcx"]) == (0xAAAA, 0xBBBB, 0)
        assert regs["rsp"] == STACK1 - 12
        assert guest.frame(False)[2] & ~RF == 2  # no NT
        assert guest.get(TSS + 32, 4) == guest.labels["back"]
        assert guest.get(TSS + 36, 4) & 1
        assert guest.get(TSS + 44, 4) == 0x1234
        assert guest.get(TSS + 76, 2) == CODE32
        assert not busy(guest, TSS_SELECTOR) and busy(guest, TSS2_SELECTOR)
        assert guest.control("cr0") & CR0_TS
        assert guest.segment("tr").selector == TSS2_SELECTOR


def test_call_and_iret_between_tasks():
    with Guest("protected") as guest:
        guest.load(
            f"mov ecx, 5; call {TSS2_SELECTOR}:0; back: inc ecx; jmp stop; other: pushfd; pop edx; "
            f"mov [0x30000], edx; iret"
        )
        task(guest, guest.labels["other"])
        assert guest.run() == STOP
        assert guest.regs()["rcx"] == 6
        assert guest.get(0x30000, 4) & NT
        assert guest.get(TSS2, 2) == TSS_SELECTOR  # the link
        assert busy(guest, TSS_SELECTOR) and not busy(guest, TSS2_SELECTOR)
        assert guest.get(TSS2 + 36, 4) & NT == 0  # cleared in what IRET saved
        assert guest.get(TSS2 + 32, 4) == guest.labels["stop"]
        assert guest.frame(False)[2] & NT == 0


def test_busy_bits_are_written_only_where_they_change():
    """A call leaves the old task's descriptor alone, and IRET that of the task it returns to: it may be read-only."""
    table = 0x23000 - TSS2_SELECTOR + 8  # the page ends before the second task's descriptor
    with Guest("protected") as guest:
        guest.load(f"mov ecx, 5; call {TSS2_SELECTOR}:0; inc ecx; jmp stop; other: iret")
        task(guest, guest.labels["other"], cr3=TABLES)
        guest.put(TSS + 28, TABLES, 4)
        guest.write(table, guest.memory[GDT : GDT + 0x100])
        guest.put(TABLES, TABLES + 0x1000 | 3, 4)
        for page in range(0x200):
            guest.put(TABLES + 0x1000 + 4 * page, page << 12 | (1 if page == 0x22 else 3), 4)
        sregs = bytearray(guest.cpu.get_state("sregs"))
        struct.pack_into("<Q", sregs, GDT_BASE, table)
        guest.cpu.set_state("sregs", bytes(sregs))
        guest.set(cr3=TABLES, cr0=guest.control("cr0") | CR0_PG | CR0_WP)
        assert guest.run() == STOP
        assert guest.regs()["rcx"] == 6
        at = table + TSS2_SELECTOR + 5
        assert not guest.get(at, 1) & 2
        guest.put(at - 5, tss_descriptor(TSS2))
        guest.set(rip=ORIGIN, rsp=KERNEL_STACK - 0x800)
        assert guest.run(f"jmp {TSS2_SELECTOR}:0; nop") == PF  # a jump makes the old one free


def test_task_gates():
    for code, vector in (("int 0x80", None), ("push 0; mov ax, 0x1000; at: mov ds, ax", GP)):
        with Guest("protected") as guest:
            guest.load(code + "; back: nop; jmp stop; other: mov ecx, [esp]; nop")
            task(guest, guest.labels["other"], esp=STACK1)
            guest.set_gate(vector or 0x80, gate(TSS2_SELECTOR, 0, 5))
            guest.put(STACK1, 0x77, 4)
            assert guest.run() == STOP or vector
            assert guest.regs()["rcx"] == (0x1000 if vector else 0x77)  # the error code is on the new stack
            assert guest.get(TSS + 32, 4) == guest.labels["at" if vector else "back"]
            assert bool(guest.get(TSS + 36, 4) & RF) == bool(vector)
            assert guest.regs()["rflags"] & NT or guest.frame(False)[2] & NT
    with Guest("protected") as guest:
        guest.load(f"call {FREE}:0; other: nop")
        task(guest, guest.labels["other"])
        guest.set_descriptor(FREE, gate(TSS2_SELECTOR, 0, 5))
        assert guest.run() == STOP
        assert guest.segment("tr").selector == TSS2_SELECTOR


def test_to_a_16_bit_task():
    with Guest("protected") as guest:
        guest.load(f"mov edx, 0x12345678; jmp {FREE}:0; other: movzx esp, sp")
        guest.set_descriptor(FREE, tss_descriptor(TSS2, 43, 1))
        other = guest.labels["other"]
        for offset, value in ((14, other), (16, 2), (18, 0x11), (26, 0x8000), (34, DATA32), (36, CODE32),
                              (38, DATA32), (40, DATA32), (42, 0)):  # fmt: skip
            guest.put(TSS2 + offset, value, 2)
        assert guest.run() == STOP
        regs = guest.regs()
        assert regs["rax"] == 0xFFFF0011  # the upper halves are ones
        assert {regs[name] for name in ("rcx", "rdx", "rbx", "rbp", "rsi", "rdi")} == {0xFFFF0000}
        assert guest.get(TSS + 48, 4) == 0x12345678
        assert guest.segment("fs").unusable


def test_to_a_v86_task():
    with Guest("protected") as guest:
        guest.load(f"jmp {TSS2_SELECTOR}:0; nop")
        guest.write(0x2000, b"\x8c\xd8\xcd\x80")
        guest.put(TSS2 + 4, KERNEL_STACK, 4)
        guest.put(TSS2 + 8, DATA32, 4)
        task(guest, 0, cs=0x200, ss=0, esp=0x8000, ds=0x1234, es=1, eflags=VM | 2, fs=2, gs=3)
        assert guest.run() == GP
        assert guest.frame(True)[:2] == [2, 0x200]
        assert guest.regs()["rax"] == 0x1234


TASK_FAULTS = [
    ({}, dict(limit=0x66), TS, TSS2_SELECTOR),  # the TSS is too small
    ({}, dict(present=0), NP, TSS2_SELECTOR),
    ({}, dict(kind=0xB), GP, TSS2_SELECTOR),  # busy
    (dict(cs=0), {}, TS, 0),
    (dict(cs=DATA32), {}, TS, DATA32),
    (dict(cs=0x800), {}, TS, 0x800),
    (dict(ss=0), {}, TS, 0),
    (dict(ss=CODE32), {}, TS, CODE32),
    (dict(ss=USER_DATA | 3), {}, TS, USER_DATA),
    (dict(ds=TSS_SELECTOR), {}, TS, TSS_SELECTOR),
    (dict(ds=FREE), {}, NP, FREE),
    (dict(ss=FREE), {}, SS, FREE),
    (dict(ldt=CODE32), {}, TS, CODE32),
    (dict(cs=CODE16, eip=0x10000), {}, GP, 0),
]


@pytest.mark.parametrize("fields, tss, vector, error", TASK_FAULTS)
def test_faults_of_a_switch(fields, tss, vector, error):
    """Checks of the TSS fault in the old task; those of what it holds in the new one (7.3, table 7-1)."""
    with Guest("protected") as guest:
        guest.load(f"nop; at: jmp {TSS2_SELECTOR}:0; other: nop")
        task(
            guest,
            **({"ip": guest.labels["other"]} | fields)
            if "eip" not in fields
            else {"ip": fields["eip"]} | fields,
        )
        guest.set_descriptor(TSS2_SELECTOR, tss_descriptor(TSS2, **tss))
        guest.set_descriptor(FREE, descriptor(present=0))
        # The handler runs in a task of its own: the new task's segments may be of no use.
        third = 0x1E000
        guest.write(third, bytes(guest.memory[TSS2 : TSS2 + 0x68]))
        stub = guest.stub(vector)
        for offset, value in ((32, stub), (36, 2), (56, 0x1F000), (72, DATA32), (76, CODE32), (80, DATA32),
                              (84, DATA32), (96, LDT_SELECTOR)):  # fmt: skip
            guest.put(third + offset, value, 4)
        guest.set_descriptor(FREE + 8, tss_descriptor(third))
        guest.set_gate(vector, gate(FREE + 8, 0, 5))
        assert guest.run() == vector
        assert hex(guest.error) == hex(error)
        old = guest.get(third, 2)
        if tss:
            assert old == TSS_SELECTOR and guest.get(TSS + 32, 4) == guest.labels["at"]
        else:
            assert old == TSS2_SELECTOR and guest.get(TSS2 + 32, 4) == fields.get(
                "eip", guest.labels["other"]
            )


def test_the_debug_trap_of_a_task():
    with Guest("protected") as guest:
        guest.load(f"jmp {TSS2_SELECTOR}:0; other: inc eax")
        task(guest, guest.labels["other"], trap=1)
        assert guest.run() == DB
        assert guest.frame(False)[0] == guest.labels["other"]
        assert int.from_bytes(guest.cpu.get_state("debugregs")[32:40], "little") & 0x8000


def test_iret_without_a_task_to_return_to():
    with Guest("protected") as guest:
        guest.put(TSS, 0, 2)
        assert guest.run("pushfd; or dword ptr [esp], 0x4000; popfd; iret") == TS
        assert guest.error == 0
    with Guest("protected") as guest:
        guest.put(TSS, TSS2_SELECTOR, 2)  # not busy
        assert guest.run("pushfd; or dword ptr [esp], 0x4000; popfd; iret") == TS
        assert guest.error == TSS2_SELECTOR


def test_a_double_fault_in_a_task_of_its_own():
    """What task gates are still used for: a stack that is gone."""
    with Guest("protected") as guest:
        guest.load("mov esp, 0; mov ax, 0x40; mov ss, ax; mov sp, 1; at: push eax; other: nop")
        task(guest, guest.stub(DF))
        guest.set_gate(DF, gate(TSS2_SELECTOR, 0, 5))
        assert guest.run() == DF
        assert guest.error == 0
        assert guest.get(TSS + 32, 4) == guest.labels["at"]
