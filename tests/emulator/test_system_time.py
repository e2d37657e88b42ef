"""The interrupt controllers and timers as a CPU sees them, other CPUs, HLT, and time.

Intel SDM 3A chapters 8 and 11; data sheets of the 8254 and 8259A."""

from __future__ import annotations

import struct
import threading

import pytest
from emulator.system_lib import CODE32, CODE64, IF, STOP, Guest, gate

from vmfs.engine.emulator import _core

JOIN = 30
PIC = """mov al, 0x11; out 0x20, al; out 0xa0, al; mov al, 0x20; out 0x21, al; mov al, 0x28; out 0xa1, al;
    mov al, 4; out 0x21, al; mov al, 2; out 0xa1, al; mov al, 1; out 0x21, al; out 0xa1, al;"""


def map_apic(guest: Guest) -> None:
    """0xfe000000 .. 0xffffffff by 2 MiB pages."""
    pdpt, pd = 0x101000, 0x108000
    guest.put(pdpt + 8 * 3, pd | 3)
    for n in range(496, 512):
        guest.put(pd + 8 * n, 0xC0000000 + (n << 21) | 0x83)


def test_the_pit_interrupts_through_the_pic():
    with Guest("protected", chip=True) as guest:
        guest.set_gate(0x20, gate(CODE32, 0x8000, 14))
        guest.load(
            PIC + "mov al, 0xfe; out 0x21, al; mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; "
            "mov al, 4; out 0x40, al;"
            "sti; again: hlt; cmp ebx, 5; jb again; cli"
        )
        guest.write(0x8000, bytes.fromhex("43 b0 20 e6 20 cf"))  # inc ebx; mov al, 0x20; out 0x20, al; iret
        assert guest.run() == STOP
        assert guest.regs()["rbx"] == 5
        now = guest.cpu.get_msr(0x10)
        # Five periods of 1193 ticks at 1,193,182 Hz are 4,999,238 ns; a nanosecond is an instruction.
        assert 4_999_000 < now < 5_003_000


def test_hlt_is_the_same_run_every_time():
    def run():
        with Guest("protected", chip=True) as guest:
            guest.set_gate(0x20, gate(CODE32, 0x8000, 14))
            guest.load(
                PIC + "mov al, 0xfe; out 0x21, al; mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; "
                "mov al, 4; out 0x40, al;"
                "sti; again: inc ecx; cmp ebx, 3; jb again; cli"
            )
            guest.write(0x8000, bytes.fromhex("43 b0 20 e6 20 cf"))
            assert guest.run(budget=10_000_000) == STOP
            return guest.regs(), guest.cpu.get_msr(0x10), guest.cpu.counters()["instructions"]

    assert run() == run()


def test_apic_timer_periodic_and_eoi():
    with Guest("long", chip=True) as guest:
        map_apic(guest)
        guest.set_gate(0x40, gate(CODE64, 0x8000, 14))
        guest.write(
            0x8000, bytes.fromhex("ffc3 c782 b000 0000 0000 0000 48cf")
        )  # inc ebx; mov dword [rdx+0xb0], 0; iretq
        guest.load("""mov edx, 0xfee00000; mov dword ptr [rdx + 0xf0], 0x1ff;
        mov dword ptr [rdx + 0x3e0], 0xb;
                   mov dword ptr [rdx + 0x320], 0x20040; mov dword ptr [rdx + 0x380], 10000; rdtsc;
                   mov esi, eax; mov edx, 0xfee00000;
                   sti; again: hlt; cmp ebx, 4; jb again; cli; rdtsc; sub eax, esi""")
        assert guest.run() == STOP
        assert guest.regs()["rbx"] == 4
        assert 40_000 <= guest.regs()["rax"] < 40_100  # divided by 1: 1 GHz


def test_tsc_deadline_and_x2apic():
    with Guest("long", chip=True) as guest:
        guest.set_gate(0x40, gate(CODE64, 0x8000, 14))
        guest.write(
            0x8000, bytes.fromhex("0f31 89c6 ffc3 b90b080000 31c0 31d2 0f30 48cf")
        )  # rdtsc; mov esi,eax; inc ebx; EOI
        guest.load("""mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr; mov ecx, 0x80f; mov eax, 0x1ff;
        xor edx, edx; wrmsr;
                   mov ecx, 0x832; mov eax, 0x40040; wrmsr; rdtsc; add eax, 5000; mov edi, eax;
                   mov ecx, 0x6e0; wrmsr;
                   sti; again: test ebx, ebx; jz again; cli; mov ecx, 0x802; rdmsr""")
        assert guest.run() == STOP
        regs = guest.regs()
        assert regs["rbx"] == 1 and regs["rax"] == 0
        assert 0 <= regs["rsi"] - regs["rdi"] < 4  # it came on the instruction


def test_self_ipi_and_tpr():
    with Guest("long", chip=True) as guest:
        map_apic(guest)
        guest.set(rflags=2 | IF)
        guest.load("""mov edx, 0xfee00000; mov dword ptr [rdx + 0xf0], 0x1ff; mov eax, 4; mov cr8, rax;
                   mov dword ptr [rdx + 0x300], 0x40040; nop; mov ecx, [rdx + 0x80]; mov rbx, cr8;
                   xor eax, eax; at: mov cr8, rax; nop""")
        assert guest.run() == 0x40
        assert (guest.regs()["rcx"], guest.regs()["rbx"]) == (0x40, 4)
        assert guest.frame(False)[0] == guest.labels["stop"] - 1


def test_nmi_by_ipi():
    with Guest("long", chip=True) as guest:
        map_apic(guest)
        guest.load(
            "mov edx, 0xfee00000; mov dword ptr [rdx + 0xf0], 0x1ff; mov dword ptr [rdx + 0x300], 0x40400; "
            "nop"
        )
        assert guest.run() == 2


def test_a_line_from_another_thread_wakes_hlt():
    with Guest("protected", chip=True) as guest:
        guest.set(rflags=2)
        guest.load(PIC + "mov al, 0xef; out 0x21, al; out 0x98, al; sti; hlt")
        assert guest.go()[5] == 0x98
        guest.set_gate(0x24, gate(CODE32, guest.stub(0x24), 14))
        result = []
        thread = threading.Thread(target=lambda: result.append(guest.cpu.run()), daemon=True)
        thread.start()
        guest.vm.irq_line(4, True)
        thread.join(JOIN)
        assert not thread.is_alive()
        assert (result[0][0], result[0][1]) == (_core.EXIT_IO, guest.stub(0x24) + 2)


@pytest.mark.parametrize(
    "way",
    [
        "mov dword ptr [rdx + 0x350], 0x400",  # LINT0, which the 8259 drives: NMI
        "mov esi, 0xfec00000; mov dword ptr [rsi], 0x14; mov dword ptr [rsi + 0x10], 0x400",  # the IOAPIC's pin 2: NMI
    ],
    ids=["lint0", "ioapic"],
)
def test_a_timer_that_sends_nmis_wakes_a_halt_with_interrupts_off(way):
    with Guest("long", chip=True) as guest:
        map_apic(guest)
        pit = PIC + "mov al, 0xfe; out 0x21, al; mov al, 0x34; out 0x43, al; mov al, 9; out 0x40, al; out 0x40, al;"
        guest.load(f"mov edx, 0xfee00000; mov dword ptr [rdx + 0xf0], 0x1ff; {way}; {pit} cli; at: hlt; nop")
        assert guest.run() == 2
        assert guest.frame(False)[0] == guest.labels["at"] + 1


def test_a_halt_in_an_nmi_handler_is_for_good():
    """NMIs are blocked until IRET: one that waits does not wake it."""
    with Guest("long", chip=True) as guest:
        guest.load("l: jmp l")
        guest.set_gate(2, gate(CODE64, 0x8000, 14))
        guest.write(0x8000, bytes.fromhex("f4 ebfd"))  # hlt; jmp to it
        guest.cpu.nmi()
        for _ in range(2):
            assert guest.go()[:2] == (_core.EXIT_HLT, 0x8001)
            guest.cpu.nmi()


def test_a_halt_is_for_good_once_all_cpus_are_asleep():
    """Another CPU could send an NMI: what ends there is the last one's run, and then that of the one before."""
    with Guest("long", chip=True) as guest:
        other = guest.vm.create_vcpu(1)
        other.set_state("mp_state", struct.pack("<I", 0))
        guest.load("cli; hlt; l: jmp l")
        result = []
        thread = threading.Thread(target=lambda: result.append(guest.go(-1)), daemon=True)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        other.set_state("mp_state", struct.pack("<I", 1))  # KVM_MP_STATE_UNINITIALIZED: it waits for an INIT
        assert other.run(1000)[0] == _core.EXIT_HLT
        thread.join(JOIN)
        assert not thread.is_alive()
        assert result[0][0] == _core.EXIT_HLT


def test_init_and_sipi_start_another_cpu():
    """The bootstrap processor sends INIT and SIPI; the other one marks memory and halts."""
    with Guest("long", chip=True) as guest:
        map_apic(guest)
        other = guest.vm.create_vcpu(1)
        assert struct.unpack("<I", other.get_state("mp_state"))[0] == 1  # KVM_MP_STATE_UNINITIALIZED
        guest.write(
            0x9000, bytes.fromhex("8cc8 31db 8edb a30000 fa f4".replace(" ", ""))
        )  # mov ax, cs; xor bx, bx; mov ds, bx; mov [0], ax
        guest.put(0, 0, 2)
        guest.load("""mov edx, 0xfee00000; mov dword ptr [rdx + 0xf0], 0x1ff;
        mov dword ptr [rdx + 0x310], 0x1000000;
                   mov dword ptr [rdx + 0x300], 0x4500; mov dword ptr [rdx + 0x300], 0x4609;
                   again: pause; cmp word ptr [0], 0; je again""")
        result = []
        thread = threading.Thread(target=lambda: result.append(other.run()), daemon=True)
        thread.start()
        assert guest.run(budget=500_000_000) == STOP
        assert guest.get(0, 2) == 0x900
        other.kick()
        thread.join(JOIN)
        assert not thread.is_alive()
        assert result[0][0] == _core.EXIT_INTERRUPTED
        assert struct.unpack("<I", other.get_state("mp_state"))[0] == 3  # KVM_MP_STATE_HALTED


def test_cpuid_is_what_there_is():
    def leaves(guest):
        data = guest.cpu.get_state("cpuid")
        return {(e[0], e[1]): e[3:] for e in struct.iter_unpack("<7I12x", data[8:])}

    with Guest("long") as guest:
        plain = leaves(guest)
    with Guest("long", chip=True) as guest:
        chip = leaves(guest)
    apic, deadline, x2apic = plain[1, 0][3] >> 9 & 1, plain[1, 0][2] >> 24 & 1, plain[1, 0][2] >> 21 & 1
    assert (apic, deadline, x2apic) == (0, 0, 0)
    assert chip[1, 0][3] >> 9 & 1 and chip[1, 0][2] >> 24 & 1 and chip[1, 0][2] >> 21 & 1
    a, b, hz, _ = chip[0x15, 0]
    assert hz * b // a == 1_000_000_000
    assert chip[0x40000010, 0][0] == 1_000_000
    assert struct.pack("<4I", *chip[0x80000002, 0]).rstrip(b"\0") == b"vmfs"


def test_cpuid_instruction():
    with Guest("long", chip=True) as guest:
        guest.load(
            "mov eax, 0xb; mov ecx, 7; cpuid; mov esi, ecx; mov edi, edx; mov eax, 0x7fffffff; cpuid; "
            "mov ebp, eax;"
            "mov rax, cr4; bts eax, 18; mov cr4, rax; mov eax, 1; cpuid; mov r8d, ecx; mov eax, 0xd; "
            "xor ecx, ecx; cpuid"
        )
        assert guest.run() == STOP
        regs = guest.regs()
        assert (regs["rsi"], regs["rdi"]) == (7, 0)
        assert regs["rbp"] == 1000  # beyond the last leaf: what the last one, 0x16, says
        assert regs["r8"] >> 27 & 1  # OSXSAVE follows CR4
        assert regs["rbx"] == 576  # x87 and SSE: what XCR0 has enabled needs the header only


def test_cpuid_follows_cr4_pke_and_the_apic():
    with Guest("long", chip=True) as guest:
        leaf7 = "mov eax, 7; xor ecx, ecx; cpuid;"
        leaf1 = "mov eax, 1; cpuid;"
        assert guest.run(
            f"{leaf7} mov esi, ecx; mov rax, cr4; bts eax, 22; mov cr4, rax; {leaf7} mov edi, ecx;"
            f"{leaf1} mov r8d, edx; mov ecx, 0x1b; rdmsr; btr eax, 11; wrmsr; {leaf1} mov r9d, edx"
        ) == STOP  # fmt: skip
        regs = guest.regs()
        assert (regs["rsi"] & 0x18, regs["rdi"] & 0x18) == (8, 0x18)  # PKU; OSPKE with CR4.PKE
        assert (regs["r8"] >> 9 & 1, regs["r9"] >> 9 & 1) == (1, 0)  # APIC, until IA32_APIC_BASE disables it


def test_msrs_that_linux_reads():
    with Guest("long") as guest:
        for index in (0x10, 0x17, 0x3B, 0x8B, 0xCE, 0xFE, 0x10A, 0x174, 0x1A0, 0x1D9, 0x200, 0x20F, 0x250,
                      0x26F, 0x277, 0x2FF,
                      0xC0000080, 0xC0000081, 0xC0000084, 0xC0000100, 0xC0000103):  # fmt: skip
            guest.set(rip=0x1000)
            assert guest.run(f"mov ecx, {index}; rdmsr") == STOP, hex(index)
        guest.set(rip=0x1000)
        assert guest.run("mov ecx, 0x8b; xor eax, eax; xor edx, edx; wrmsr") == STOP


def test_clock_state():
    with Guest("long") as guest:
        data = bytearray(guest.vm.get_state("clock"))
        assert len(data) == 48
        struct.pack_into("<Q", data, 0, 1 << 40)
        guest.vm.set_state("clock", bytes(data))
        assert struct.unpack_from("<Q", guest.vm.get_state("clock"))[0] == 1 << 40
        guest.run("nop; nop")
        assert struct.unpack_from("<Q", guest.vm.get_state("clock"))[0] > 1 << 40


def test_host_time_passes_in_hlt():
    with Guest("long", chip=True) as guest:
        guest.vm.set_host_time(True)
        map_apic(guest)
        guest.set_gate(0x40, gate(CODE64, guest.stub(0x40), 14))
        guest.load("""mov edx, 0xfee00000; mov dword ptr [rdx + 0xf0], 0x1ff;
        mov dword ptr [rdx + 0x3e0], 0xb;
                   mov dword ptr [rdx + 0x320], 0x40; mov dword ptr [rdx + 0x380], 1000000; sti; hlt; nop""")
        result = []
        thread = threading.Thread(target=lambda: result.append(guest.cpu.run()), daemon=True)
        thread.start()
        thread.join(JOIN)
        assert not thread.is_alive()
        assert result[0][0] == _core.EXIT_IO
