"""What system instructions check and do: a program in a mode, and the exception that the Intel SDM gives."""

from __future__ import annotations

import pytest
from emulator.system_lib import (
    AC,
    AC_FLAG,
    BP,
    CF,
    CODE16,
    CODE32,
    CODE64,
    CONFORMING,
    CR0_AM,
    CR0_TS,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_PVI,
    CR4_TSD,
    CR4_UMIP,
    CR4_VME,
    DATA,
    DATA32,
    DB,
    DF,
    FREE,
    GP,
    IF,
    IOPL3,
    KERNEL_STACK,
    NP,
    NT,
    OF,
    PF,
    RF,
    SHUTDOWN,
    SS,
    STACK1,
    STOP,
    TF,
    TSS,
    UD,
    USER_CODE32,
    USER_CODE64,
    USER_DATA,
    USER_STACK,
    VIF,
    VIP,
    VM,
    Guest,
    descriptor,
    gate,
)  # fmt: skip

# mode, CPL, program, vector, error code (None: it has none)
FAULTS = [
    # Control registers (SDM 2B MOV CRn; 3A 2.5).
    ("protected", 0, "mov eax, cr0; or eax, 0x20000000; mov cr0, eax", GP, 0),  # NW without CD
    ("real", 0, "mov eax, 0x80000000; mov cr0, eax", GP, None),  # PG without PE
    ("long", 0, "mov rax, cr0; bts rax, 32; mov cr0, rax", GP, 0),
    ("long", 0, "mov rax, cr0; btr rax, 31; mov cr0, rax", GP, 0),  # PG off in 64-bit mode
    ("long", 0, "mov rax, cr4; btr rax, 5; mov cr4, rax", GP, 0),  # PAE off in long mode
    ("long", 0, "mov rax, cr4; bts rax, 12; mov cr4, rax", GP, 0),  # LA57 in long mode
    ("long", 0, "mov rax, cr4; bts rax, 30; mov cr4, rax", GP, 0),  # reserved
    ("long", 0, "mov rax, cr4; bts rax, 32; mov cr4, rax", GP, 0),
    ("protected", 0, "mov eax, cr4; bts eax, 17; mov cr4, eax", GP, 0),  # PCIDE outside of long mode
    (
        "long",
        0,
        "mov rax, cr3; or rax, 8; mov cr3, rax; mov rax, cr4; bts rax, 17; mov cr4, rax",
        GP,
        0,
    ),  # PCID not 0
    ("long", 0, "mov rax, cr3; bts rax, 40; mov cr3, rax", GP, 0),  # above MAXPHYADDR
    ("long", 0, "mov rax, cr3; bts rax, 63; mov cr3, rax", GP, 0),  # bit 63 without PCIDE
    ("long", 0, "mov eax, 16; mov cr8, rax", GP, 0),
    ("protected", 0, ".byte 0x0f, 0x20, 0xc8", UD, None),  # CR1
    ("protected", 0, ".byte 0x0f, 0x22, 0xe8", UD, None),  # CR5
    ("long", 3, "mov rax, cr0", GP, 0),
    ("long", 3, "mov cr3, rax", GP, 0),
    ("long", 3, ".byte 0x0f, 0x20, 0xc8", UD, None),  # #UD before #GP
    ("v86", 3, "mov eax, cr0", GP, 0),
    ("protected", 3, "clts", GP, 0),
    ("protected", 3, "lmsw ax", GP, 0),
    ("protected", 3, "invlpg [0]", GP, 0),
    ("protected", 3, "wbinvd", GP, 0),
    ("protected", 3, "hlt", GP, 0),
    # Debug registers (3B 17.2).
    ("protected", 3, "mov eax, dr7", GP, 0),
    ("protected", 0, "mov eax, cr4; or eax, 8; mov cr4, eax; mov eax, dr4", UD, None),
    ("protected", 0, "mov eax, 0x2400; mov dr7, eax; mov eax, dr0", DB, None),  # GD
    ("long", 0, "mov rax, 0x100000000; mov dr7, rax", GP, 0),
    ("long", 0, "mov rax, 0x100000000; mov dr6, rax", GP, 0),
    ("long", 0, ".byte 0x44, 0x0f, 0x21, 0xc0", UD, None),  # DR8
    # MSRs, time.
    ("long", 0, "mov ecx, 0x12345; rdmsr", GP, 0),
    ("long", 0, "mov ecx, 0x12345; wrmsr", GP, 0),
    ("long", 3, "rdmsr", GP, 0),
    ("v86", 3, "rdmsr", GP, 0),
    ("long", 0, "mov ecx, 0xc0000080; mov eax, 0x1000; xor edx, edx; wrmsr", GP, 0),  # reserved in EFER
    ("long", 0, "mov ecx, 0xc0000080; rdmsr; btr eax, 8; wrmsr", GP, 0),  # LME while paging
    (
        "long",
        0,
        "mov ecx, 0xc0000082; mov edx, 0x1000000; wrmsr",
        GP,
        0,
    ),  # LSTAR not canonical: CPUID has LA57
    ("long", 0, "mov ecx, 0xc0000100; mov edx, 0x1000000; wrmsr", GP, 0),
    ("long", 0, "mov ecx, 0x277; mov eax, 2; xor edx, edx; wrmsr", GP, 0),  # PAT: reserved type
    ("long", 0, "mov ecx, 0x2ff; mov eax, 0xc02; xor edx, edx; wrmsr", GP, 0),  # MTRRs: the same
    ("long", 0, "mov ecx, 0x10a; xor eax, eax; xor edx, edx; wrmsr", GP, 0),  # read-only
    ("long", 0, "mov ecx, 0x802; rdmsr", GP, 0),  # x2APIC: no LAPIC
    ("long", 0, "xor ecx, ecx; rdpmc", GP, 0),
    ("protected", 3, "rdtscp; rdtsc", STOP, None),
    # I/O, IF.
    ("protected", 3, "in al, 0x80", GP, 0),
    ("protected", 3, "out 0x80, al", GP, 0),
    ("protected", 3, "rep outsb", STOP, None),  # rCX is 0: nothing is accessed
    ("protected", 3, "mov ecx, 1; rep outsb", GP, 0),
    ("protected", 3, "cli", GP, 0),
    ("protected", 3, "sti", GP, 0),
    ("v86", 3, "sti", GP, 0),
    ("v86", 3, "pushf", GP, 0),
    ("v86", 3, "int 0x80", GP, 0),
    ("v86", 3, "iret", GP, 0),
    ("v86", 3, "int3", BP, None),  # not sensitive to IOPL
    # Segment registers (2B MOV).
    ("protected", 0, "mov ax, 0x10; .byte 0x8e, 0xc8", UD, None),  # MOV CS
    ("protected", 0, ".byte 0x8e, 0xf0", UD, None),  # no segment register 6
    ("protected", 0, "xor eax, eax; mov ss, ax", GP, 0),
    ("protected", 0, "mov ax, 0x1000; mov ds, ax", GP, 0x1000),  # beyond the limit
    ("protected", 0, "mov ax, 0x23; mov ss, ax", GP, 0x20),  # DPL, RPL not CPL
    ("protected", 0, "mov ax, 8; mov ss, ax", GP, 8),  # code
    ("protected", 3, "mov ax, 0x10; mov ds, ax", GP, 0x10),  # privilege
    ("protected", 0, "mov ax, 0x13; mov ds, ax", GP, 0x10),
    ("protected", 0, "mov ax, 0x48; mov ds, ax", GP, 0x48),  # a TSS
    ("protected", 0, "xor eax, eax; mov ds, ax; mov eax, [0]", GP, 0),  # null is loaded, and then used
    ("protected", 0, "mov ax, 0x404; mov ds, ax", GP, 0x404),  # empty LDT entry
    ("protected", 0, "mov ax, 0x40; mov ds, ax; mov eax, [0x10000]", GP, 0),  # limit
    ("protected", 0, "mov ax, 0x40; mov ss, ax; mov esp, 0x100; mov eax, [esp + 0x20000]", SS, 0),
    (
        "protected",
        0,
        "mov ax, 0x10; mov ds, ax; mov ax, 8; mov es, ax; mov es:[0], eax",
        GP,
        0,
    ),  # write to code
    ("protected", 0, "mov byte ptr cs:[0x1000], 0", GP, 0),
    ("long", 0, "xor eax, eax; mov ss, ax; mov ds, ax; mov rax, [0x1000]", STOP, None),  # null SS at CPL 0
    ("long", 3, "mov eax, 3; mov ss, ax", GP, 0),
    ("long", 0, "mov rax, 0x800000000000; mov rax, [rax]", GP, 0),  # not canonical
    ("long", 0, "mov rax, 0x800000000000; jmp rax", GP, 0),
    ("long", 3, "rdfsbase rax", UD, None),  # CR4.FSGSBASE is clear
    ("protected", 0, ".byte 0xf3, 0x0f, 0xae, 0xc0", UD, None),  # RDFSBASE outside of 64-bit mode
    ("long", 0, "swapgs", STOP, None),
    ("long", 3, "swapgs", GP, 0),
    ("protected", 0, ".byte 0x0f, 0x01, 0xf8", UD, None),
    # Descriptor tables.
    ("protected", 3, "lgdt [0x1000]", GP, 0),
    ("protected", 3, "lidt [0x1000]", GP, 0),
    ("protected", 3, "lldt ax", GP, 0),
    ("protected", 3, "ltr ax", GP, 0),
    ("protected", 3, "sgdt [esp - 16]; sidt [esp - 16]; sldt ax; str ax; smsw ax", STOP, None),
    ("real", 0, ".byte 0x0f, 0x00, 0xc0", UD, None),  # SLDT
    ("v86", 3, ".byte 0x0f, 0x00, 0xc8", UD, None),  # STR
    ("real", 0, ".byte 0x0f, 0x02, 0xc0", UD, None),  # LAR
    ("real", 0, ".byte 0x63, 0xc0", UD, None),  # ARPL
    ("long", 0, "mov rax, 0x100000000000000; mov [0x30002], rax; lgdt [0x30000]", GP, 0),
    ("protected", 0, "xor eax, eax; ltr ax", GP, 0),
    ("protected", 0, "mov ax, 0x48; ltr ax", GP, 0x48),  # busy
    ("protected", 0, "mov ax, 0x10; ltr ax", GP, 0x10),
    ("protected", 0, "mov ax, 0x404; ltr ax", GP, 0x404),  # not in the GDT
    ("protected", 0, "mov ax, 0x48; lldt ax", GP, 0x48),
    ("protected", 0, "xor eax, eax; lldt ax; mov ax, 4; mov ds, ax", GP, 4),  # no LDT then
    # Far transfers.
    ("protected", 0, "jmp 0:0x1000", GP, 0),
    ("protected", 0, "jmp 0x1000:0x1000", GP, 0x1000),
    ("protected", 0, "jmp 0x10:0x1000", GP, 0x10),  # data
    ("protected", 0, "jmp 0x18:0x1000", GP, 0x18),  # DPL 3 from CPL 0
    ("protected", 3, "jmp 0x08:0x1000", GP, 8),
    ("protected", 0, "jmp 0x38:0x10000", GP, 0),  # beyond the target's limit
    ("protected", 0, "jmp 0x68:0", GP, 0x68),  # an LDT
    ("protected", 3, "push 8; push 0x1000; retf", GP, 8),  # to an inner level
    ("protected", 0, "push 0; push 0x1000; retf", GP, 0),
    ("protected", 0, "push 0x10; push 0; push 0x1b; push 0x1000; retf", GP, 0x10),  # SS's DPL
    ("protected", 0, "push 0; push 0; push 0x1b; push 0x1000; retf", GP, 0),  # SS null
    ("protected", 3, "push 2; push 8; push 0x1000; iret", GP, 8),
    ("long", 0, "push 0x23; push 0x8000; push 2; push 0x33; mov rax, 0x800000000000; push rax; iretq", GP, 0),
    ("long", 0, "push 0; push 0x8000; push 2; push 0x33; push 0x1000; iretq", GP, 0),
    ("long", 0, "pushf; or dword ptr [rsp], 0x4000; popf; iretq", GP, 0),  # NT in long mode
    ("long", 0, ".byte 0xea", UD, None),
    ("long", 0, ".byte 0x9a", UD, None),
    ("long", 0, ".byte 0xce", UD, None),
    ("protected", 3, "int 0x81", GP, 0x81 * 8 + 2),  # the gate's DPL
    ("protected", 3, "int 0x80", 0x80, None),
    ("protected", 3, "int3", BP, None),
    ("protected", 3, "mov al, 0x7f; add al, 1; into", OF, None),
    ("protected", 3, "into", STOP, None),
    ("protected", 3, ".byte 0xf1", DB, None),  # INT1 does not look at the gate's DPL
    # Fast system calls.
    ("protected", 0, "syscall", UD, None),
    ("compat", 3, "syscall", UD, None),
    ("protected", 3, "sysenter", GP, 0),  # IA32_SYSENTER_CS is null
    ("protected", 3, "sysexit", GP, 0),
    ("real", 0, "sysenter", GP, None),
    ("long", 3, "sysretq", GP, 0),
    ("long", 0, "mov rcx, 0x800000000000; sysretq", GP, 0),
    # Not there.
    ("protected", 0, "rsm", UD, None),
    ("protected", 0, "vmcall", UD, None),
    ("protected", 0, ".byte 0x0f, 0x01, 0xd8", UD, None),  # VMRUN
    ("protected", 0, ".byte 0x0f, 0x37", UD, None),  # GETSEC
    ("protected", 0, "monitor", UD, None),
    ("long", 3, "stac", UD, None),
    ("long", 0, "stac; clac", STOP, None),
    ("long", 0, "xor ecx, ecx; rdpkru", UD, None),  # CR4.PKE is clear
    # LOCK.
    ("protected", 0, "lock; nop", UD, None),
    ("protected", 0, ".byte 0xf0; cli", UD, None),
]


@pytest.mark.parametrize(
    "mode, cpl, code, vector, error", FAULTS, ids=lambda v: str(v).replace("\n", " ")[:60]
)
def test_checks(mode, cpl, code, vector, error):
    with Guest(mode, cpl) as guest:
        guest.load(code)
        before = guest.regs()
        assert guest.run() == vector
        if error is not None:
            assert hex(guest.error) == hex(error)
        if vector == STOP:
            return
        ip, _, flags = guest.frame(error is not None)[:3]
        assert ip < guest.labels["stop"] or vector in (BP, OF, 0x80, DB)
        assert flags & (IF | IOPL3 | NT) in (0, before["rflags"] & (IF | IOPL3), NT)


def expect(guest: Guest, code: str, **registers: int) -> None:
    """The program comes to its end, with these registers."""
    assert guest.run(code) == STOP
    after = guest.regs()
    if guest.mode != "real":
        flags = guest.frame(False)[2]
        after["rflags"] = flags & ~RF
    assert {name: hex(after[name]) for name in registers} == {
        name: hex(value) for name, value in registers.items()
    }


def test_cr4_umip():
    for instruction in ("sgdt [esp - 16]", "sidt [esp - 16]", "sldt ax", "str ax", "smsw ax"):
        with Guest("protected", 3) as guest:
            guest.set(cr4=CR4_UMIP)
            assert guest.run(instruction) == GP
            assert guest.error == 0


def test_cr4_tsd():
    with Guest("protected", 3) as guest:
        guest.set(cr4=CR4_TSD)
        assert guest.run("rdtsc") == GP


def test_smsw_sldt_str_widths():
    with Guest("long") as guest:
        expect(
            guest,
            "mov rax, -1; mov rbx, -1; mov rcx, -1; mov rdx, -1; str ax; str ebx; str rcx; smsw rdx;"
            "mov qword ptr [0x30000], -1; sldt [0x30000]; mov rsi, [0x30000]",
            rax=0xFFFFFFFFFFFF0048, rbx=0x48, rcx=0x48, rdx=guest.control("cr0"), rsi=0xFFFFFFFFFFFF0068,
        )  # fmt: skip


def test_lar_lsl_verr_verw():
    with Guest("protected", 3) as guest:
        guest.set_descriptor(FREE, descriptor(kind=1, dpl=3, limit=0x123, granular=0))  # read-only
        guest.set_descriptor(FREE + 8, descriptor(kind=9, dpl=3))  # execute-only
        expect(
            guest,
            f"mov eax, -1; mov ecx, {USER_DATA}; lar eax, cx; mov ecx, {FREE | 3}; lsl ebx, cx;"
            f"verr cx; setz dl; verw cx; setz dh; mov ecx, {FREE + 8}; verr cx; setz ch; mov esi, -1; "
            f"mov ecx, {DATA32};"
            "lar esi, cx; setz cl; mov edi, 7; push eax; xor eax, eax; lsl edi, ax; pop eax",
            rax=0xC0F300, rbx=0x123, rdx=1, rsi=0xFFFFFFFF, rdi=7,
        )  # fmt: skip
        assert guest.regs()["rcx"] & 0xFF == 0


def test_arpl():
    with Guest("protected", 3) as guest:
        expect(
            guest, "mov eax, 0x10; mov ecx, 3; arpl ax, cx; setz bl; arpl ax, cx; setz bh", rax=0x13, rbx=1
        )


def test_arpl_writes_only_what_it_changes():
    """ES read-only: no fault where the RPL is not raised, #GP where it is; in a page, #PF."""
    code = ".byte 0x26, 0x63, 0x1d, 0, 0, 3, 0"  # arpl es:[0x30000], bx
    for rpl, vector in ((2, STOP), (3, STOP), (1, STOP), (0, STOP)):
        with Guest("protected") as guest:
            guest.set_descriptor(FREE, descriptor(kind=1))
            guest.put(DATA, 0x13, 2)
            assert guest.run(f"mov eax, {FREE}; mov es, eax; mov ebx, {rpl}; {code}; setz cl") == vector
            assert guest.get(DATA, 2) == 0x13
    with Guest("protected") as guest:
        guest.set_descriptor(FREE, descriptor(kind=1))
        guest.put(DATA, 0x12, 2)
        assert guest.run(f"mov eax, {FREE}; mov es, eax; mov ebx, 3; {code}") == GP
        assert guest.get(DATA, 2) == 0x12
    for stored, vector in ((0x13, STOP), (0x12, PF)):
        with Guest("compat", 3) as guest:
            guest.put(guest.pte(DATA), DATA | 5)  # present, user, read-only
            guest.put(DATA, stored, 2)
            assert guest.run(f"mov ebx, 3; {code[:6]}0x63, 0x1d, 0, 0, 3, 0") == vector
            if vector == PF:
                assert guest.error == 7  # a write


READS = ("bt dword ptr [rdi], 7", "verw word ptr [rdi]", "lar eax, [rdi]", "cmovb eax, [rdi]", "test [rdi], eax",
         "rep movsb", "rep stosb", "cmp [rdi], eax")  # fmt: skip
WRITES = (
    *(f"{name} {size} ptr [rdi], {count}" for name in ("shl", "sar", "rol", "rcl") for size in ("byte", "qword")
      for count in ("cl", 0)),
    "rcl byte ptr [rdi], 9", "shld [rdi], edx, 0", "shrd [rdi], rdx, cl", "shld [rdi], dx, 0", "cmpxchg [rdi], ebx",
    "cmpxchg [rdi], bl", "lock cmpxchg [rdi], ebx", "cmpxchg8b [rdi]", "cmpxchg16b [rdi]",
    "bts dword ptr [rdi], 7", "btr dword ptr [rdi], 0", "bts [rdi], eax", "or dword ptr [rdi], 0", "xadd [rdi], eax",
)  # fmt: skip


@pytest.mark.parametrize("code", (*READS, *WRITES))
def test_what_writes_even_if_nothing_changes(code):
    """On a page that is read-only, as an Intel Xeon does it: there ARPL alone may do without the write. (The
    manual leaves open what MASKMOVDQU with an empty mask does.)"""
    with Guest("long", 3) as guest:
        guest.put(guest.pte(DATA), DATA | 5)
        guest.write(DATA, b"\x80" * 64)
        guest.set(cr4=guest.control("cr4") | 0x600)  # OSFXSR, OSXMMEXCPT
        assert guest.run(f"mov edi, {DATA}; mov esi, edi; xor ecx, ecx; xor eax, eax; xor edx, edx; {code}") == (
            PF if code in WRITES else STOP
        )
        assert guest.memory[DATA : DATA + 64] == b"\x80" * 64


# ---- Addresses that registers take ----

WIDE = 0x00FAAAAAAAAAAAAA  # canonical in 57 bits, not in 48
TOO_WIDE = 0x01FAAAAAAAAAAAAA
TAKES = {
    **{f"wrmsr-{msr:x}": f"mov ecx, {msr:#x}; mov eax, {{low:#x}}; mov edx, {{high:#x}}; wrmsr"
       for msr in (0xC0000100, 0xC0000101, 0xC0000102, 0xC0000082, 0xC0000083, 0x175, 0x176)},
    "lgdt": "movabs rax, {address:#x}; mov [0x30002], rax; sgdt [0x30010]; lgdt [0x30000]; lgdt [0x30010]",
    "lidt": "movabs rax, {address:#x}; mov [0x30002], rax; sidt [0x30010]; lidt [0x30000]; lidt [0x30010]",
    "ltr": "mov eax, 0x90; ltr ax",
    "lldt": "mov eax, 0xa0; lldt ax",
    "invpcid": "movabs rax, {address:#x}; mov [0x30008], rax; xor ecx, ecx; invpcid rcx, [0x30000]",
    "wrfsbase": "movabs rax, {address:#x}; wrfsbase rax",
    "mov": "movabs rax, {address:#x}; mov rax, [rax]",
    "jmp": "movabs rax, {address:#x}; jmp rax",
}  # fmt: skip
BY_CR4 = ("wrfsbase", "mov", "jmp")


@pytest.mark.parametrize("address", [WIDE, TOO_WIDE], ids=["wide", "too-wide"])
@pytest.mark.parametrize("takes", TAKES)
@pytest.mark.parametrize("la57", [True, False], ids=["la57", "no-la57"])
def test_addresses_that_registers_take(la57, takes, address):
    """By CPUID, whatever CR4.LA57 is; accesses, jumps and WRFSBASE by CR4."""
    with Guest("long") as guest:
        if not la57:
            cpuid = bytearray(guest.cpu.get_state("cpuid"))
            for at in range(8, len(cpuid), 40):
                if int.from_bytes(cpuid[at : at + 4], "little") == 7:
                    cpuid[at + 22] &= 0xFE  # ECX bit 16
            guest.cpu.set_state("cpuid", bytes(cpuid))
        guest.set(cr4=guest.control("cr4") | CR4_FSGSBASE)
        for selector, kind in ((0x90, 9), (0xA0, 2)):
            guest.set_descriptor(
                selector, descriptor(address & 0xFFFFFFFF, 0x67, kind, s=0, big=0, granular=0), address >> 32
            )
        taken = la57 and address == WIDE and takes not in BY_CR4
        code = TAKES[takes].format(address=address, low=address & 0xFFFFFFFF, high=address >> 32)
        assert guest.run(code) == (STOP if taken else GP)
        if taken and takes.startswith("wrmsr"):
            assert guest.cpu.get_msr(int(takes[6:], 16)) == address


def test_a_base_that_cr4_makes_unusable_is_a_fault_where_it_is_used():
    code = f"mov ecx, 0xc0000100; mov eax, {WIDE & 0xFFFFFFFF:#x}; mov edx, {WIDE >> 32:#x}; wrmsr; {{}}"
    with Guest("long") as guest:
        assert guest.run(code.format("mov rax, fs:[0]")) == GP
    with Guest("long") as guest:  # the table itself: nothing can be delivered
        assert guest.run(f"movabs rax, {WIDE:#x}; mov [0x30002], rax; lidt [0x30000]; ud2") == SHUTDOWN
    with Guest("long") as guest:
        guest.cpu.set_msr(0xC0000081, CODE64 << 32)
        guest.cpu.set_msr(0xC0000082, WIDE)
        assert guest.run("syscall") == GP
        assert guest.frame(True)[0] == WIDE


def test_accessed_bits_are_set():
    with Guest("protected") as guest:
        guest.set_descriptor(FREE, descriptor(kind=2))
        guest.set_descriptor(FREE + 8, descriptor(kind=0xA))
        expect(guest, f"mov ax, {FREE}; mov es, ax; jmp {FREE + 8}:next; next: nop")
        assert guest.get(0x10000 + FREE + 5, 1) & 1
        assert guest.get(0x10000 + FREE + 8 + 5, 1) & 1


def test_not_present_segments():
    for selector, load, vector in ((FREE, "mov ds, ax", NP), (FREE, "mov ss, ax", SS)):
        with Guest("protected") as guest:
            guest.set_descriptor(selector, descriptor(present=0))
            assert guest.run(f"mov ax, {selector}; {load}") == vector
            assert guest.error == selector
    with Guest("protected") as guest:
        guest.set_descriptor(FREE, descriptor(kind=0xB, present=0))
        assert guest.run(f"jmp {FREE}:0") == NP
        assert guest.error == FREE


def test_expand_down():
    with Guest("protected") as guest:
        guest.set_descriptor(FREE, descriptor(kind=7, limit=0x2FFFF, granular=0))
        load = f"mov ax, {FREE}; mov es, ax;"
        assert guest.run(load + "mov eax, es:[0x30000]; mov eax, es:[0x2fffe]") == GP
        assert guest.frame(True)[0] == guest.labels["stop"] - 6


def test_push_of_a_segment_keeps_the_high_half():
    with Guest("protected") as guest:
        expect(guest, "mov dword ptr [esp - 4], -1; push ds; pop eax", rax=0xFFFF0000 | DATA32)
    with Guest("long") as guest:
        expect(guest, "mov qword ptr [rsp - 8], -1; push fs; pop rax", rax=DATA32)


def test_ss_load_shadows_one_instruction():
    with Guest("protected") as guest:
        guest.set(rflags=2 | IF)
        guest.cpu.interrupt(0x40)
        guest.load("nop")
        # The interrupt is taken at once; with a shadow it comes after the next instruction.
        assert guest.run() == 0x40
    with Guest("protected") as guest:
        guest.load("cli; mov ax, ss; sti; mov ss, ax; mov esp, 0x17000; inc ebx; nop")
        guest.cpu.interrupt(0x40)
        assert guest.run() == 0x40
        assert guest.frame(False)[0] == guest.labels["stop"] - 2
    with Guest("protected") as guest:
        guest.load("sti; nop; nop")
        guest.cpu.interrupt(0x40)
        assert guest.run() == 0x40
        assert guest.frame(False)[0] == guest.labels["stop"] - 1
    with Guest("protected") as guest:
        guest.load("sti; cli; nop")
        guest.cpu.interrupt(0x40)
        assert guest.run() == STOP
        assert guest.cpu.interrupts_queued == 1


def test_single_step_traps():
    with Guest("protected") as guest:
        guest.set(rflags=2 | TF)
        assert guest.run("inc eax; inc eax") == DB
        assert guest.frame(False)[0] == guest.labels["stop"] - 1
        assert guest.regs()["rax"] == 1
        assert dr6(guest) & 0xE00F == 0x4000
        assert guest.regs()["rflags"] & TF == 0
    with Guest("protected") as guest:  # not after MOV SS, and not after INT n
        assert guest.run("push 0x102; popf; mov ax, ss; nop") == DB
        assert guest.frame(False)[0] == guest.labels["stop"] - 1  # POPF's trap is the next instruction's
    with Guest("protected") as guest:
        guest.set(rflags=2 | TF)
        assert guest.run("int 0x80") == 0x80
        assert guest.frame(False)[2] & TF


def test_steps_by_branches():
    """IA32_DEBUGCTL.BTF: traps after jumps only, and #DB clears it."""
    with Guest("protected") as guest:
        guest.cpu.set_msr(0x1D9, 2)
        guest.set(rflags=2 | TF)
        assert guest.run("inc eax; test al, al; jz over; inc eax; jmp there; over: nop; there: inc ecx") == DB
        assert guest.frame(False)[0] == guest.labels["there"]
        assert (guest.regs()["rax"], guest.regs()["rcx"]) == (2, 0)
        assert guest.cpu.get_msr(0x1D9) == 0


def dr6(guest: Guest) -> int:
    return int.from_bytes(guest.cpu.get_state("debugregs")[32:40], "little")


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_debug_registers(mode):
    enable = "mov {r}, {address}; mov dr0, {r}; mov {r}, {control}; mov dr7, {r};"
    r = "rax" if mode == "long" else "eax"
    with Guest(mode) as guest:  # execution: a fault, before it
        guest.load(enable.format(r=r, address="offset target", control=0x401) + "inc ebx; target: inc ecx")
        assert guest.run() == DB
        assert guest.frame(False)[0] == guest.labels["target"]
        assert (guest.regs()["rbx"], guest.regs()["rcx"]) == (1, 0)
        assert dr6(guest) & 0xE00F == 1
        frame = guest.regs()["rsp"]
        size = 8 if mode == "long" else 4
        guest.put(frame + 2 * size, guest.get(frame + 2 * size, size) | RF, size)  # what a debugger does
        guest.write(guest.stub(DB), b"\x48\xcf" if mode == "long" else b"\xcf")
        guest.set(rip=guest.stub(DB))
        assert guest.run() == STOP
        assert guest.regs()["rcx"] == 1
    with Guest(mode) as guest:  # a store: a trap, after it
        assert (
            guest.run(
                enable.format(r=r, address=DATA, control=0x401 | 0xD << 16) + f"mov [{DATA}], eax; inc ecx"
            )
            == DB
        )
        assert guest.regs()["rcx"] == 0
        assert dr6(guest) & 0xE00F == 1
    with Guest(mode) as guest:  # loads do not count for a store's breakpoint; others' bytes neither
        assert (
            guest.run(
                enable.format(r=r, address=DATA, control=0x401 | 0xD << 16)
                + f"mov ebx, [{DATA}]; mov [{DATA + 4}], eax; mov [{DATA - 1}], al"
            )
            == STOP
        )
    with Guest(mode) as guest:
        assert (
            guest.run(
                enable.format(r=r, address=DATA, control=0x401 | 0xF << 16) + f"mov ebx, [{DATA + 2}]; nop"
            )
            == DB
        )
    with Guest(mode) as guest:  # I/O
        guest.set(cr4=guest.control("cr4") | CR4_DE)
        guest.load(enable.format(r=r, address=0x80, control=0x401 | 2 << 16) + "out 0x80, al; nop")
        assert guest.go()[0] == 1
        assert guest.run() == DB
        assert guest.frame(False)[0] == guest.labels["stop"] - 1


def test_dr7_gd_is_cleared_for_the_handler():
    with Guest("protected") as guest:
        assert guest.run("mov eax, 0x2400; mov dr7, eax; mov eax, dr0") == DB
        assert dr6(guest) & 0x2000
        assert int.from_bytes(guest.cpu.get_state("debugregs")[40:48], "little") & 0x2000 == 0


def test_dr4_dr5_are_dr6_dr7():
    with Guest("protected") as guest:
        expect(
            guest,
            "mov eax, dr4; mov ebx, dr5; mov ecx, dr6; mov edx, dr7",
            rax=0xFFFF0FF0,
            rbx=0x400,
            rcx=0xFFFF0FF0,
            rdx=0x400,
        )


def test_call_gates():
    for kind, size, push in (
        (12, 4, "push 0x11223344; push 0x55667788;"),
        (4, 2, "pushw 0x3344; pushw 0x7788;"),
    ):
        with Guest("protected", 3) as guest:
            guest.load(push + f"call {FREE | 3}:0; stopped: hlt; .balign 16; entry: nop")
            guest.set_descriptor(FREE, gate(CODE32, guest.labels["entry"], kind, dpl=3, parameters=2))
            assert guest.run() == STOP
            sp = guest.regs()["rsp"] + 12  # after the frame of the UD2: same level
            mask = (1 << 8 * size) - 1
            got = [guest.get(sp + size * n, size) for n in range(6)]
            first, second = (0x11223344, 0x55667788) if size == 4 else (0x3344, 0x7788)
            back, old_sp = guest.labels["stopped"] & mask, (USER_STACK - 2 * size) & mask
            assert got == [back, USER_CODE32 | 3, second, first, old_sp, USER_DATA | 3]
            assert guest.segment("cs").selector == CODE32
    with Guest("long", 3) as guest:
        guest.load(
            f"push 0; mov word ptr [rsp + 4], {FREE | 3}; call fword ptr [rsp]; stopped: hlt; .balign 16; "
            f"entry: nop"
        )
        guest.set_descriptor(FREE, gate(CODE64, guest.labels["entry"], 12, dpl=3), 0)
        assert guest.run() == STOP
        ip, cs, flags, sp, ss = guest.frame(False)[:5]
        assert cs == CODE64 and sp == KERNEL_STACK - 32
        pushed = [guest.get(sp + 8 * n) for n in range(4)]
        assert pushed == [guest.labels["stopped"], USER_CODE64 | 3, USER_STACK - 8, USER_DATA | 3]


CALL_GATE_FAULTS = [
    (gate(CODE32, 0x1000, 12, dpl=0), GP, FREE),  # DPL
    (gate(CODE32, 0x1000, 12, dpl=3, present=0), NP, FREE),
    (gate(0, 0x1000, 12, dpl=3), GP, 0),
    (gate(DATA32, 0x1000, 12, dpl=3), GP, DATA32),
    (gate(0x800, 0x1000, 12, dpl=3), GP, 0x800),
    (gate(CODE16, 0x10000, 12, dpl=3), GP, 0),  # beyond the limit
]


@pytest.mark.parametrize("value, vector, error", CALL_GATE_FAULTS)
def test_call_gate_faults(value, vector, error):
    with Guest("protected", 3) as guest:
        guest.set_descriptor(FREE, value)
        assert guest.run(f"call {FREE}:0") == vector
        assert guest.error == error


def test_conforming_code_keeps_the_cpl():
    with Guest("protected", 3) as guest:
        assert guest.run(f"call {CONFORMING}:there; there: mov ax, cs") == STOP
        assert guest.frame(False)[1] == CONFORMING | 3


def test_retf_to_an_outer_level():
    with Guest("protected") as guest:
        expect(
            guest,
            f"push {USER_DATA | 3}; push {USER_STACK}; push 1; push 2; push {USER_CODE32 | 3}; "
            f"push offset there; retf 8;"
            "there: mov eax, esp; mov bx, ds; mov cx, ss",
            rax=USER_STACK + 8, rbx=0, rcx=USER_DATA | 3,
        )  # fmt: skip
        assert guest.frame(False)[1] == USER_CODE32 | 3


LEAVES = {
    "iret": "push 2; push {cs}; {push_there}; .byte 0x48, 0xcf",
    "retf": "push {cs}; {push_there}; .byte 0x48, 0xcb",
    "iretd": "push 2; push {cs}; push offset there; .byte 0xcf",
    "retfd": "push {cs}; push offset there; .byte 0xcb",
}


@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("selector", [1, 2, 3, DATA32, USER_DATA | 3, CONFORMING, "dpl1"])
def test_what_a_return_to_an_outer_level_leaves_of_segments(leave, selector):
    """Null selectors lose their RPL; segments that the level may not have become null; the others stay."""
    long = leave in ("iret", "retf")
    code_selector = (USER_CODE64 if long else USER_CODE32) | 3
    stays = selector in (USER_DATA | 3, CONFORMING)
    wanted = selector if stays else 0
    selector = 0x88 if selector == "dpl1" else selector
    with Guest("long" if long else "protected") as guest:
        leaving = LEAVES[leave].format(cs=code_selector, push_there="lea rax, [rip + there]; push rax")
        loads = "; ".join(f"mov {name}, cx" for name in ("ds", "es", "fs", "gs"))
        stores = "; ".join(
            f"mov {register}, {name}"
            for register, name in (("eax", "ds"), ("ebx", "es"), ("esi", "fs"), ("edi", "gs"))
        )
        expect(
            guest,
            f"mov ecx, {selector}; {loads}; push {USER_DATA | 3}; push {USER_STACK}; {leaving}; there: {stores}",
            rax=wanted, rbx=wanted, rsi=wanted, rdi=wanted,
        )  # fmt: skip
        for name in ("ds", "es", "fs", "gs"):
            assert bool(guest.segment(name).unusable) != stays


@pytest.mark.parametrize("selector", [0, 3, DATA32])
@pytest.mark.parametrize("leave", ["iret", "retf"])
@pytest.mark.parametrize("name, prefix, msr", [("fs", 0x64, 0xC0000100), ("gs", 0x65, 0xC0000101)])
def test_fs_and_gs_keep_their_bases_when_a_return_takes_their_selectors(name, prefix, msr, leave, selector):
    leaving = LEAVES[leave].format(cs=USER_CODE64 | 3, push_there="lea rax, [rip + there]; push rax")
    with Guest("long") as guest:
        guest.put(DATA, 0x1122334455667788)
        expect(
            guest,
            f"mov ecx, {selector}; mov {name}, cx; mov ecx, {msr:#x}; mov eax, {DATA}; xor edx, edx; wrmsr;"
            f"push {USER_DATA | 3}; push {USER_STACK}; {leaving};"
            f"there: .byte {prefix:#x}, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0; mov ebx, {name}",
            rax=0x1122334455667788, rbx=0,
        )  # fmt: skip


def test_a_return_to_the_same_level_leaves_segments_alone():
    with Guest("long") as guest:
        expect(
            guest,
            f"mov ecx, 3; mov ds, cx; push {DATA32}; push {STACK1}; push 2; push {CODE64};"
            "lea rax, [rip + there]; push rax; iretq; there: mov eax, ds",
            rax=3,
        )  # fmt: skip


def test_iret_flags_by_privilege():
    with Guest("protected", 3) as guest:  # neither IF nor IOPL
        guest.load(f"push {0x3202 | CF | NT}; push {USER_CODE32 | 3}; push offset there; iret; there: nop")
        assert guest.run() == STOP
        assert guest.frame(False)[2] & ~RF == 2 | CF | NT
    with Guest("protected") as guest:
        guest.load(f"push {0x3202 | CF | AC_FLAG | VIP}; push {CODE32}; push offset there; iret; there: nop")
        assert guest.run() == STOP
        assert guest.frame(False)[2] & ~RF == 0x3202 | CF | AC_FLAG | VIP


def test_iretq_always_pops_the_stack():
    with Guest("long") as guest:
        expect(
            guest,
            f"push {DATA32}; push {STACK1}; push 2; push {CODE64}; lea rax, [rip + there]; push rax; iretq;"
            "there: mov rbx, rsp",
            rbx=STACK1,
        )


def test_iret_to_compatibility_mode_and_back():
    with Guest("long") as guest:
        guest.load(
            f"push {USER_DATA | 3}; push {USER_STACK}; push 2; push {USER_CODE32 | 3}; push offset there; "
            f"iretq;"
            ".code32; there: mov eax, 0x12345678; push eax; .byte 0x40; .byte 0x90; .code64; mov ecx, 1"
        )
        assert guest.run() == STOP
        ip, cs, flags, sp, ss = guest.frame(False)[:5]
        assert (cs, sp, ss) == (USER_CODE32 | 3, USER_STACK - 4, USER_DATA | 3)
        assert guest.regs()["rax"] == 0x12345679  # 40 is INC EAX there
        assert guest.segment("cs").long == 1


def test_v86_round_trip():
    with Guest("protected") as guest:
        pushes = "".join(
            f"push {n};" for n in (6, 5, 4, 3, 2, 0x8000, VM | 2, 0x100, 0)
        )  # gs fs ds es ss esp eflags cs eip
        guest.write(0x1000, b"")
        guest.load(pushes + "iret")
        guest.write(0x1000 + 0x100, b"")
        code = guest.labels["stop"]
        assert code < 0x1100 - 2
        guest.write(0x1000, guest.memory[0x1000 : code + 2])
        guest.put(0x1000 + 0x100, 0, 1)
        # The V86 program, at 0x100:0 = 0x1000: overwritten by nothing, so place it by another base.
        pushes = pushes.replace("push 256;", "push 0x200;")
        guest.load(pushes + "iret")
        guest.write(0x2000, b"\x8c\xd8\x8c\xe3\xcd\x80")  # mov ax, ds; mov bx, fs; int 0x80
        assert guest.run() == GP
        ip, cs, flags, sp, ss, es, ds, fs, gs = guest.frame(True)
        assert (ip, cs, sp, ss, es, ds, fs, gs) == (4, 0x200, 0x8000, 2, 3, 4, 5, 6)
        assert flags & VM
        regs = guest.regs()
        assert (regs["rax"], regs["rbx"]) == (4, 5)
        assert [guest.segment(name).selector for name in ("ds", "es", "fs", "gs")] == [0, 0, 0, 0]
        assert guest.segment("ds").unusable


def test_vme():
    with Guest("v86") as guest:
        guest.set(cr4=CR4_VME)
        guest.put(TSS + 102, 0x68 + 32, 2)
        guest.write(TSS + 0x68, bytes(32))  # all vectors are redirected
        guest.put(4 * 0x21, 0x0000_1080, 4)
        guest.load(
            "sti; pushf; pop ax; cli; pushf; pop bx; sti; int 0x21; hlt; .org 0x80; pop cx; pop dx; "
            "pop si; pushf; pop di"
        )
        assert guest.run() == STOP
        regs = guest.regs()
        assert regs["rax"] & 0xFFFF == 0x3202 and regs["rbx"] & 0xFFFF == 0x3002
        assert (regs["rdx"] & 0xFFFF, regs["rsi"] & 0xFFFF, regs["rdi"] & 0xFFFF) == (0, 0x3202, 0x3002)
    with Guest("v86") as guest:  # VIP: STI is #GP
        guest.set(cr4=CR4_VME, rflags=2 | VM | VIP)
        assert guest.run("sti") == GP


def test_pvi():
    with Guest("protected", 3) as guest:
        guest.set(cr4=CR4_PVI)
        assert guest.run("sti") == STOP
        assert guest.frame(False)[2] & (VIF | IF) == VIF
    with Guest("protected", 3) as guest:
        guest.set(cr4=CR4_PVI, rflags=2 | VIP)
        assert guest.run("sti") == GP


def test_io_permission_map():
    with Guest("protected", 3) as guest:
        guest.put(TSS + 0x68 + 0x80 // 8, 0xFC, 1)  # ports 0x80 and 0x81
        guest.load("out 0x80, al; mov edx, 0x80; out dx, ax; out dx, eax")
        assert [guest.go()[5] for _ in range(2)] == [0x80, 0x80]
        assert guest.run() == GP
    with Guest("v86", iopl=3) as guest:  # IOPL does not count
        assert guest.run("out 0x80, al") == GP
    with Guest("protected", 3, iopl=3) as guest:
        guest.load("out 0x80, al")
        assert guest.go()[5] == 0x80


def test_syscall_sysret():
    with Guest("long", 3) as guest:
        guest.cpu.set_msr(0xC0000081, (0x50 - 0x30) << 48 | CODE64 << 32)
        guest.load(
            "mov eax, 5; stc; syscall; back: inc eax; .balign 16; entry: mov rbx, rsp; mov rdi, rcx; "
            "mov rsi, r11; mov dx, cs; hlt"
        )
        guest.cpu.set_msr(0xC0000082, guest.labels["entry"])
        guest.cpu.set_msr(0xC0000084, CF | IF)
        exit_ = guest.go()
        assert exit_[0] == 3
        regs = guest.regs()
        assert (regs["rdi"], regs["rsi"], regs["rdx"], regs["rbx"]) == (
            guest.labels["back"],
            3,
            CODE64,
            USER_STACK,
        )
        assert regs["rflags"] & CF == 0
        assert guest.segment("ss").selector == CODE64 + 8 and guest.segment("ss").dpl == 0
        guest.load("sysretq; back: stc")
        guest.set(rip=0x1000, rcx=guest.labels["back"], r11=0x3F7ED7)
        assert guest.run() == STOP
        ip, cs, flags, sp, ss = guest.frame(False)[:5]
        assert (cs, ss) == (0x20 + 16 | 3, 0x20 + 8 | 3)
        assert flags & ~RF == 0x3C7ED7


def test_sysenter_sysexit():
    with Guest("protected", 3) as guest:
        guest.load(
            "sysenter; .balign 16; entry: mov ax, cs; mov bx, ss; mov esi, esp; mov edx, offset back; "
            "mov ecx, 0x17000;"
            "sysexit; back: mov bp, cs"
        )
        for msr, value in ((0x174, CODE32), (0x175, STACK1), (0x176, guest.labels["entry"])):
            guest.cpu.set_msr(msr, value)
        assert guest.run() == STOP
        regs = guest.regs()
        assert (regs["rax"], regs["rbx"], regs["rsi"], regs["rbp"]) == (
            CODE32,
            DATA32,
            STACK1,
            CODE32 + 16 | 3,
        )


def test_swapgs_and_bases():
    with Guest("long") as guest:
        guest.set(cr4=guest.control("cr4") | CR4_FSGSBASE)
        guest.cpu.set_msr(0xC0000102, 0x30000)
        guest.put(0x30008, 0x1234)
        expect(
            guest,
            "mov eax, 0x5000; wrgsbase rax; swapgs; mov rbx, gs:[8]; rdgsbase rcx; swapgs; rdgsbase rdx;"
            "mov rax, 0x30000; wrfsbase rax; mov rsi, fs:[8]",
            rbx=0x1234,
            rcx=0x30000,
            rdx=0x5000,
            rsi=0x1234,
        )


def test_ist_and_stack_alignment():
    with Guest("long") as guest:
        guest.set_gate(UD, gate(CODE64, guest.stub(UD), 14) | 1 << 32)
        assert guest.run("mov rsp, 0x17ffb") == STOP
        assert guest.regs()["rsp"] == STACK1 - 40
        assert guest.frame(False)[3] == 0x17FFB
    with Guest("long") as guest:
        assert guest.run("mov rsp, 0x17ffb") == STOP
        assert guest.regs()["rsp"] == 0x17FF0 - 40


def test_a_stack_that_is_not_canonical():
    with Guest("long") as guest:
        guest.set_gate(SS, gate(CODE64, guest.stub(SS), 14) | 1 << 32)
        assert guest.run("mov rsp, 0x900000000000; push rax") == SS
        assert guest.error == 0
        guest.set_gate(DF, gate(CODE64, guest.stub(DF), 14) | 1 << 32)
        guest.set_gate(SS, gate(CODE64, guest.stub(SS), 14))
        guest.set(rip=0x1000)
        assert guest.run() == DF


def test_trap_gates_leave_if():
    with Guest("protected") as guest:
        guest.set(rflags=2 | IF)
        guest.set_gate(0x80, gate(CODE32, guest.stub(0x80), 15, dpl=3))
        assert guest.run("int 0x80") == 0x80
        assert guest.regs()["rflags"] & IF


def test_16_bit_gates():
    with Guest("protected") as guest:
        guest.write(0x8000, b"\xf4")
        guest.set_gate(0x80, gate(CODE32, 0x8000, 6))
        guest.load("int 0x80; back: nop")
        assert guest.go()[1] == 0x8001
        sp = guest.regs()["rsp"]
        assert sp == KERNEL_STACK - 0x800 - 6
        assert guest.get(sp, 2) == guest.labels["back"]


EVENT_FAULTS = [
    (gate(CODE32, 0, 14, present=0), NP, 0x40 * 8 + 2),
    (0, GP, 0x40 * 8 + 2),
    (gate(0, 0, 14), GP, 0),
    (gate(DATA32, 0, 14), GP, DATA32),
    (gate(USER_CODE32, 0, 14), GP, USER_CODE32),  # outwards
    (gate(0x800, 0, 14), GP, 0x800),
]


@pytest.mark.parametrize("value, vector, error", EVENT_FAULTS)
@pytest.mark.parametrize("external", [False, True])
def test_bad_gates(value, vector, error, external):
    """The EXT bit says whether the program asked for it (3A 6.13)."""
    with Guest("protected") as guest:
        guest.set_gate(0x40, value)
        if external:
            guest.set(rflags=2 | IF)
            guest.cpu.interrupt(0x40)
            assert guest.run("nop") == vector
        else:
            guest.load("nop; at: int 0x40")
            assert guest.run() == vector
            assert guest.frame(True)[0] == guest.labels["at"]
        assert guest.error == error | external


def test_double_and_triple_faults():
    with Guest("protected") as guest:  # #NP while #GP is delivered
        guest.set_gate(GP, gate(CODE32, 0, 14, present=0))
        assert guest.run("mov ax, 0x1000; mov ds, ax") == DF
        assert guest.error == 0
    with Guest("protected") as guest:  # #UD is benign: the #NP is delivered as such
        guest.set_gate(UD, gate(CODE32, 0, 14, present=0))
        assert guest.run("nop") == NP
        assert guest.error == UD * 8 + 2 + 1
    with Guest("protected") as guest:
        guest.set_gate(GP, 0)
        guest.set_gate(DF, 0)
        assert guest.run("mov ax, 0x1000; mov ds, ax") == "shutdown"


def test_nmi_is_masked_until_iret():
    with Guest("protected") as guest:
        guest.cpu.nmi()
        assert guest.run("nop") == 2
        guest.cpu.nmi()
        guest.write(guest.stub(2), b"\x90\xcf")  # nop; iret
        guest.set(rip=guest.stub(2))
        guest.cpu.run(1)
        assert guest.regs()["rip"] == guest.stub(2) + 1
        guest.write(guest.stub(2), b"\x90\xcf")
        guest.cpu.run(2)  # iret, and then the NMI that waited, and one instruction of its handler
        assert guest.regs()["rip"] in (guest.stub(2), guest.stub(2) + 1)


def test_alignment_check():
    with Guest("protected", 3) as guest:
        guest.set(cr0=guest.control("cr0") | CR0_AM, rflags=2 | AC_FLAG)
        assert guest.run("mov eax, [0x30001]") == AC
        assert guest.error == 0


def test_ts_and_clts():
    with Guest("protected") as guest:
        guest.set(cr0=guest.control("cr0") | CR0_TS)
        assert guest.run("clts; mov eax, cr0") == STOP
        assert guest.control("cr0") & CR0_TS == 0


def test_lmsw_sets_pe_and_never_clears_it():
    with Guest("protected") as guest:
        expect(guest, "xor eax, eax; lmsw ax; smsw bx; mov ax, 0xe; lmsw ax; smsw cx", rbx=0x11, rcx=0x1F)


def test_rdtscp_rdpid():
    with Guest("long") as guest:
        guest.cpu.set_msr(0xC0000103, 0x1234)
        expect(guest, "rdtscp; mov ebx, ecx; rdpid rdx", rbx=0x1234, rdx=0x1234)


def test_tsc_counts_instructions_and_adjusts():
    with Guest("long") as guest:
        expect(
            guest,
            "mov ecx, 0x3b; rdmsr; mov esi, eax; rdtsc; mov ebx, eax; nop; nop; rdtsc; sub eax, ebx; "
            "mov ebx, eax;"
            "mov ecx, 0x10; mov edx, 1; xor eax, eax; wrmsr; rdtsc; mov edi, edx; mov ecx, 0x3b; rdmsr; "
            "mov eax, edx",
            rbx=4,
            rsi=0,
            rdi=1,
            rax=0,
        )
        assert guest.cpu.get_msr(0x3B) > 0xFF000000


def test_lgdt_widths():
    with Guest("protected") as guest:
        guest.put(DATA, 0x1234 | 0xAABBCCDD << 16)
        expect(
            guest,
            f"data16 lgdt [{DATA}]; sgdt [{DATA + 16}]; mov eax, [{DATA + 18}]; "
            f"movzx ebx, word ptr [{DATA + 16}]; lgdt [{DATA + 32}]"
            if False
            else f".byte 0x66; lidt [{DATA}]; sidt [{DATA + 16}]; mov eax, [{DATA + 18}]; "
            f"movzx ebx, word ptr [{DATA + 16}];"
            f"mov word ptr [{DATA}], 0x7ff; mov dword ptr [{DATA + 2}], 0x11000; lidt [{DATA}]",
            rax=0xBBCCDD,
            rbx=0x1234,
        )
