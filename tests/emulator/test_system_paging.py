"""Paging (Intel SDM 3A chapter 4): error codes, CR2, accessed and dirty bits, in each of its forms."""

from __future__ import annotations

import pytest
from emulator.system_lib import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PKE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    DATA,
    EFER_NXE,
    GP,
    NX,
    PF,
    PS,
    RAM,
    STOP,
    TABLES,
    A,
    D,
    Guest,
    P,
    U,
    W,
)  # fmt: skip

PRESENT, WRITE, USER, RESERVED, FETCH, KEY = 1, 2, 4, 8, 16, 32
PAGE = DATA  # the page that the tests change

# CPL, entry flags, program (rsi = the page), CR0 and CR4 bits on top, error code or STOP
FAULTS = [
    (0, 0, "mov eax, [rsi + 5]", 0, 0, 0),
    (0, 0, "mov [rsi + 5], eax", 0, 0, WRITE),
    (3, 0, "mov eax, [rsi + 5]", 0, 0, USER),
    (3, 0, "mov [rsi + 5], eax", 0, 0, USER | WRITE),
    (3, 0, "add [rsi + 5], eax", 0, 0, USER | WRITE),  # read-modify-write faults as a write
    (3, P | W, "mov eax, [rsi + 5]", 0, 0, PRESENT | USER),
    (3, P | U, "mov [rsi + 5], eax", 0, 0, PRESENT | USER | WRITE),
    (3, P | U, "mov eax, [rsi + 5]", 0, 0, STOP),
    (0, P | U, "mov [rsi + 5], eax", CR0_WP, 0, PRESENT | WRITE),
    (0, P, "mov [rsi + 5], eax", CR0_WP, 0, PRESENT | WRITE),
    (0, P, "mov [rsi + 5], eax", 0, 0, STOP),  # WP is clear
    (3, 0, "lea rsi, [rsi + 5]; jmp rsi", 0, 0, USER | FETCH),
    (3, P | W, "lea rsi, [rsi + 5]; jmp rsi", 0, 0, PRESENT | USER | FETCH),
    (3, P | W | U | NX, "lea rsi, [rsi + 5]; jmp rsi", 0, 0, PRESENT | USER | FETCH),
    (0, P | W | NX, "lea rsi, [rsi + 5]; jmp rsi", 0, 0, PRESENT | FETCH),
    (0, P | W | U, "lea rsi, [rsi + 5]; jmp rsi", 0, CR4_SMEP, PRESENT | FETCH),
    (0, P | W | U, "mov eax, [rsi + 5]", 0, CR4_SMAP, PRESENT),
    (0, P | W | U, "mov [rsi + 5], eax", 0, CR4_SMAP, PRESENT | WRITE),
    (0, P | W | U, "stac; mov eax, [rsi + 5]", 0, CR4_SMAP, STOP),
    (0, P | W | U, "stac; mov eax, [rsi + 5]; clac; mov eax, [rsi + 5]", 0, CR4_SMAP, PRESENT),
    (3, P | W | U | 1 << 51, "mov eax, [rsi + 5]", 0, 0, PRESENT | USER | RESERVED),
    (0, P | W | 1 << 40, "mov [rsi + 5], eax", 0, 0, PRESENT | WRITE | RESERVED),
    (3, P | W | U | 1 << 59, "mov eax, 4; xor ecx, ecx; xor edx, edx; wrpkru; mov eax, [rsi + 5]", 0, CR4_PKE,
     PRESENT | USER | KEY),  # PKRU.AD of key 1
    (3, P | W | U | 1 << 59, "mov eax, 8; xor ecx, ecx; xor edx, edx; wrpkru; mov eax, [rsi + 5]; "
                             "mov [rsi + 5], eax", 0,
     CR4_PKE, PRESENT | USER | WRITE | KEY),
    (0, P | W | U | 1 << 59, "mov eax, 4; xor ecx, ecx; xor edx, edx; wrpkru; "
                             "mov eax, [rsi + 5]", 0, CR4_PKE, PRESENT | KEY),
    (3, P | U | 1 << 59, "mov eax, 8; xor ecx, ecx; xor edx, edx; wrpkru; mov [rsi + 5], eax", 0,
     CR4_PKE, PRESENT | USER | WRITE | KEY),  # W and the key: 4.7 shows both
    (0, P | W | U | 1 << 59, "mov eax, 4; xor ecx, ecx; xor edx, edx; wrpkru; "
                             "mov eax, [rsi + 5]", 0, CR4_PKE | CR4_SMAP, PRESENT | KEY),
    (0, P | W | 1 << 59, "mov eax, 4; xor ecx, ecx; xor edx, edx; wrpkru; "
                         "mov eax, [rsi + 5]", 0, CR4_PKE, STOP),
]  # fmt: skip


def user_pages(guest: Guest, cpl: int) -> None:
    """With SMEP and SMAP, the kernel's own pages are supervisor pages."""
    if cpl == 0:
        guest.identity_4level(P | W)


@pytest.mark.parametrize("cpl, flags, code, cr0, cr4, error", FAULTS)
def test_faults_of_4_level_paging(cpl, flags, code, cr0, cr4, error):
    with Guest("long", cpl) as guest:
        user_pages(guest, cpl)
        guest.put(guest.pte(PAGE), PAGE | flags)
        guest.set(cr0=CR0_PE | CR0_ET | CR0_PG | cr0, cr4=CR4_PAE | cr4, rsi=PAGE)
        if error == STOP:
            assert guest.run(code) == STOP
            return
        assert guest.run(code) == PF
        assert hex(guest.error) == hex(error)
        assert hex(guest.control("cr2")) == hex(PAGE + 5)


def test_cr2_of_an_access_that_crosses_pages():
    with Guest("long", 3) as guest:
        guest.put(guest.pte(PAGE + 0x1000), 0)
        guest.set(rsi=PAGE + 0xFFE)
        assert guest.run("mov [rsi], rax") == PF
        assert guest.error == USER | WRITE
        assert guest.control("cr2") == PAGE + 0x1000


def test_instruction_that_crosses_into_a_missing_page():
    with Guest("long", 3) as guest:
        guest.put(guest.pte(PAGE + 0x1000), 0)
        guest.write(PAGE + 0xFFE, b"\x48\xb8")
        guest.set(rsi=PAGE + 0xFFE)
        assert guest.run("jmp rsi") == PF
        assert guest.error == USER | FETCH
        assert guest.control("cr2") == PAGE + 0x1000
        assert guest.frame(True)[0] == PAGE + 0xFFE


def test_accessed_and_dirty():
    with Guest("long", 3) as guest:
        entry = guest.pte(PAGE)
        assert guest.run(f"mov eax, [{PAGE}]") == STOP
        assert guest.get(entry) & (A | D) == A
        assert guest.get(TABLES) & A and guest.get(TABLES + 0x1000) & A and guest.get(TABLES + 0x2000) & A
        assert guest.get(TABLES + 0x2000) & D == 0
        guest.set(rip=0x1000, cr3=TABLES)
    with Guest("long", 3) as guest:
        assert guest.run(f"mov eax, [{PAGE}]; mov [{PAGE}], eax") == STOP
        assert guest.get(guest.pte(PAGE)) & (A | D) == A | D
    with Guest("long", 3) as guest:  # a store that faults sets nothing dirty
        guest.put(guest.pte(PAGE), PAGE | P | U)
        assert guest.run(f"mov [{PAGE}], eax") == PF
        assert guest.get(guest.pte(PAGE)) & D == 0


def test_a_cached_translation_stays_until_invlpg():
    """The other way round would be legal too; this is that INVLPG, MOV CR3 and INVPCID do what they say."""
    for flush in ("invlpg [rsi]", "mov rax, cr3; mov cr3, rax", "mov qword ptr [0x31000], 0; "
        "mov [0x31008], rsi; xor eax, eax;"
                  "invpcid rax, [0x31000]", "mov eax, 2; mov qword ptr [0x31000], 0; "
                                            "invpcid rax, [0x31000]"):  # fmt: skip
        with Guest("long") as guest:
            guest.put(PAGE, 1, 4)
            guest.put(PAGE + 0x2000, 2, 4)
            guest.set(rsi=PAGE, rdi=guest.pte(PAGE), rbx=PAGE + 0x2000 | P | W | U)
            assert guest.run(f"mov ecx, [rsi]; mov [rdi], rbx; {flush}; mov edx, [rsi]") == STOP
            assert guest.regs()["rcx"] == 1
            assert guest.regs()["rdx"] == 2


def test_a_global_page_outlives_mov_cr3():
    """SDM 3A 4.10.2.4: of the translations, and of the code that was fetched by them. 2 is of after the flush."""
    invpcid = "mov qword ptr [0x31000], 0; mov eax, {}; invpcid rax, [0x31000]"
    for flush, seen in (
        ("mov rax, cr3; mov cr3, rax", 1),
        (invpcid.format(3), 1),
        (invpcid.format(2), 2),
        ("invlpg [rsi]", 2),
        ("mov rax, cr4; btc rax, 7; mov cr4, rax", 2),
    ):
        for is_global in (True, False):
            with Guest("long") as guest:
                for page, number in ((PAGE, 1), (PAGE + 0x2000, 2)):
                    guest.put(page, number, 4)
                    guest.put(page + 8, 0xC3 << 40 | number << 8 | 0xB8)  # mov eax, number; ret
                entry = P | W | U | (0x100 if is_global else 0)
                guest.put(guest.pte(PAGE), PAGE | entry)
                guest.set(rsi=PAGE, rdi=guest.pte(PAGE), rbx=PAGE + 0x2000 | entry)
                times = 60  # enough for host code
                program = f"""
                    mov rax, cr4; bts rax, 7; mov cr4, rax
                    lea r8, [rsi + 8]; mov ebp, {times}
                    1: call r8; dec ebp; jnz 1b
                    mov ecx, [rsi]; mov [rdi], rbx; {flush}; mov edx, [rsi]; call r8; mov r9, rax
                """
                assert guest.run(program) == STOP
                regs = guest.regs()
                assert regs["rcx"] == 1
                assert (regs["rdx"], regs["r9"]) == ((seen, seen) if is_global else (2, 2)), (flush, is_global)


def test_invlpg_of_a_large_page_takes_all_of_it():
    with Guest("long") as guest:
        pd = TABLES + 0x2000
        guest.put(pd + 8, 0 | P | W | PS)  # 2 MiB at 2 MiB: RAM again
        guest.put(PAGE, 1, 4)
        guest.set(rsi=RAM + PAGE, rdi=pd + 8, rbx=0)
        assert guest.run(f"mov ecx, [rsi]; mov [rdi], rbx; invlpg [{RAM}]; mov edx, [rsi]") == PF
        assert guest.regs()["rcx"] == 1
        assert guest.control("cr2") == RAM + PAGE


def test_1_gib_and_2_mib_pages():
    with Guest("long") as guest:
        guest.put(TABLES + 0x1000 + 8, 0 | P | W | PS)  # 1 GiB at 1 GiB
        guest.put(TABLES + 0x2000 + 8, 0 | P | W | PS)
        guest.put(PAGE, 0x1234, 4)
        assert (
            guest.run(
                f"mov eax, [0x40000000 + {PAGE}]; mov ebx, [0x200000 + {PAGE}]; mov [0x200000 + {PAGE}], eax"
            )
            == STOP
        )
        assert guest.regs()["rax"] == guest.regs()["rbx"] == 0x1234
        assert guest.get(TABLES + 0x1000 + 8) & (A | D) == A
        assert guest.get(TABLES + 0x2000 + 8) & (A | D) == A | D
    with Guest("long") as guest:  # reserved: address bits below the page's size
        guest.put(TABLES + 0x2000 + 8, 0x4000 | P | W | PS)
        assert guest.run("mov eax, [0x200000]") == PF
        assert guest.error == PRESENT | RESERVED


def legacy(guest: Guest, cr4: int = 0) -> None:
    """32-bit paging: directory at TABLES, table at TABLES + 4096, identity."""
    guest.put(TABLES, TABLES + 0x1000 | P | W | U, 4)
    for page in range(RAM >> 12):
        guest.put(TABLES + 0x1000 + 4 * page, page << 12 | P | W | U, 4)
    guest.set(cr0=CR0_PE | CR0_ET | CR0_PG | CR0_WP, cr3=TABLES, cr4=cr4)


def test_32_bit_paging():
    with Guest("protected", 3) as guest:
        legacy(guest)
        guest.put(TABLES + 0x1000 + 4 * (PAGE >> 12), PAGE | P | U, 4)
        guest.put(PAGE, 7, 4)
        assert guest.run(f"mov eax, [{PAGE}]; mov [{PAGE + 4}], eax") == PF
        assert (guest.error, guest.control("cr2"), guest.regs()["rax"]) == (
            PRESENT | USER | WRITE,
            PAGE + 4,
            7,
        )
        assert guest.get(TABLES + 0x1000 + 4 * (PAGE >> 12), 4) & (A | D) == A
        assert guest.get(TABLES, 4) & A
    with Guest("protected") as guest:
        legacy(guest, CR4_PSE)
        guest.put(TABLES + 4, 0 | P | W | PS, 4)
        guest.put(PAGE, 0x77, 4)
        assert guest.run(f"mov eax, [0x400000 + {PAGE}]; mov [0x400000 + {PAGE}], eax") == STOP
        assert guest.regs()["rax"] == 0x77
        assert guest.get(TABLES + 4, 4) & (A | D) == A | D
    with Guest("protected") as guest:  # without PSE, PS is nothing
        legacy(guest)
        guest.put(TABLES + 4, TABLES + 0x1000 | P | W | PS, 4)
        assert guest.run(f"mov eax, [0x400000 + {PAGE}]") == STOP
    with Guest("protected") as guest:  # a fetch is not told from a read without NXE and SMEP
        legacy(guest)
        guest.put(TABLES + 0x1000 + 4 * (PAGE >> 12), 0, 4)
        assert guest.run(f"mov eax, {PAGE}; jmp eax") == PF
        assert guest.error == 0


def pae(guest: Guest) -> None:
    """PAE paging: the four entries at TABLES, a directory, a table."""
    guest.put(TABLES, TABLES + 0x1000 | P)
    for n in range(1, 4):
        guest.put(TABLES + 8 * n, 0)
    guest.put(TABLES + 0x1000, TABLES + 0x2000 | P | W | U)
    guest.put(TABLES + 0x1008, 0 | P | W | PS)
    for page in range(RAM >> 12):
        guest.put(TABLES + 0x2000 + 8 * page, page << 12 | P | W | U)


def test_pae_paging():
    enable = f"""mov eax, cr4; or eax, {CR4_PAE}; mov cr4, eax; mov eax, {TABLES}; mov cr3, eax
        mov eax, cr0; bts eax, 31; mov cr0, eax;"""
    with Guest("protected") as guest:
        pae(guest)
        guest.put(PAGE, 0x55, 4)
        assert (
            guest.run(enable + f"mov ebx, [{PAGE}]; mov ecx, [{RAM + PAGE}]; mov [{RAM + PAGE}], ecx") == STOP
        )
        assert (guest.regs()["rbx"], guest.regs()["rcx"]) == (0x55, 0x55)
        assert guest.get(TABLES + 0x1008) & D
    with Guest("protected") as guest:  # the four entries are registers: a change needs MOV CR3
        pae(guest)
        assert (
            guest.run(enable + f"mov dword ptr [{TABLES + 8}], {TABLES + 0x1000 | P}; mov eax, [0x40000000]")
            == PF
        )
        assert guest.error == 0
        guest.set(rip=0x1000)
        guest.load(f"mov eax, cr3; mov cr3, eax; mov eax, [0x40000000 + {PAGE}]")
        assert guest.run() == STOP
    with Guest("protected") as guest:  # reserved bits in one of them
        pae(guest)
        guest.put(TABLES + 24, TABLES | P | W)
        assert guest.run(enable) == GP
        assert guest.error == 0
    with Guest("protected") as guest:
        pae(guest)
        guest.put(TABLES + 0x2000 + 8 * (PAGE >> 12), PAGE | P | W | NX)
        assert (
            guest.run(
                f"mov ecx, 0xc0000080; rdmsr; or eax, {EFER_NXE}; wrmsr;"
                + enable
                + f"mov eax, {PAGE}; jmp eax"
            )
            == PF
        )
        assert guest.error == PRESENT | FETCH


def test_5_level_paging():
    with Guest("long") as guest:
        top = TABLES + 0x8000
        guest.put(top, TABLES | P | W | U)
        guest.put(top + 8 * 5, TABLES | P | W | U)
        guest.put(PAGE, 0x99, 4)
        guest.set(cr3=top, cr4=CR4_PAE | CR4_LA57)
        assert (
            guest.run(f"mov rsi, {5 << 48 | PAGE:#x}; mov eax, [rsi]; mov rsi, {6 << 48:#x}; mov ebx, [rsi]")
            == PF
        )
        assert guest.regs()["rax"] == 0x99
        assert guest.control("cr2") == 6 << 48
        guest.set(rip=0x1000)
        guest.load("mov rsi, 0x100000000000000; mov eax, [rsi]")
        assert guest.run() == GP


def test_page_faults_of_delivery_are_double_faults():
    with Guest("long") as guest:
        guest.put(guest.pte(PAGE), 0)
        guest.set_gate(PF, 0)
        assert guest.run(f"mov eax, [{PAGE}]") == 8
        assert guest.control("cr2") == PAGE


def test_implicit_accesses_are_the_supervisors():
    """The GDT may be on a supervisor page while CPL 3 loads a segment register."""
    with Guest("long", 3) as guest:
        guest.put(guest.pte(0x10000), 0x10000 | P | W)
        assert guest.run("mov eax, 0x23; mov ds, eax; sub rsp, 8") == STOP
    with Guest("long", 3) as guest:
        guest.put(guest.pte(0x14000), 0)
        assert guest.run("mov eax, 0xf; mov ds, eax") == PF
        assert guest.error == 0  # a supervisor access, although at CPL 3
        assert guest.control("cr2") == 0x14008


def test_translate_knows_no_address_that_is_not_canonical():
    with Guest("long") as guest:
        upper = TABLES + 0x1000
        guest.put(TABLES + 8 * 256, upper | P | W)  # the kernel's half begins with what the user's does
        assert guest.cpu.translate(0xFFFF_8000_0000_0000 + PAGE) == PAGE
        assert guest.cpu.translate(0x0000_8000_0000_0000 + PAGE) is None
        assert guest.cpu.translate(0xFFFE_8000_0000_0000 + PAGE) is None
    with Guest("protected") as guest:
        assert guest.cpu.translate(PAGE) == PAGE
        assert guest.cpu.translate((1 << 32) + PAGE) is None
