"""MSRs by RDMSR and WRMSR, and by state: what tests/engine/cases/processor.py does not have on both engines."""

from __future__ import annotations

import struct

import pytest
from emulator.system_lib import CF, EFER_NXE, GP, STOP, Guest

BANKS = 32
MISC_ENABLE, EFER = 0x1A0, 0xC0000080
WRITE = "mov ecx, {msr:#x}; mov eax, {low:#x}; mov edx, {high:#x}; wrmsr;"


def write(msr: int, value: int) -> str:
    return WRITE.format(msr=msr, low=value & 0xFFFFFFFF, high=value >> 32)


def msrs(guest: Guest) -> dict[int, int]:
    return {index: value for index, _, value in struct.iter_unpack("<IIQ", guest.cpu.get_state("msrs")[8:])}


def change_cpuid(guest: Guest, function: int, register: int, bit: int) -> None:
    """Take a bit away; registers are 0 to 3: EAX to EDX."""
    cpuid = bytearray(guest.cpu.get_state("cpuid"))
    for at in range(8, len(cpuid), 40):
        if struct.unpack_from("<I", cpuid, at)[0] == function:
            (value,) = struct.unpack_from("<I", cpuid, at + 12 + 4 * register)
            struct.pack_into("<I", cpuid, at + 12 + 4 * register, value & ~(1 << bit))
    guest.cpu.set_state("cpuid", bytes(cpuid))


# ---- IA32_MISC_ENABLE (SDM 4 table 2-2) ----


@pytest.mark.parametrize("bit", range(64))
def test_the_bits_of_misc_enable(bit):
    with Guest("long") as guest:
        made = guest.cpu.get_msr(MISC_ENABLE)
        assert made == 1 | 1 << 11 | 1 << 12
        value = made ^ 1 << bit
        taken = bit in (0, 18, 22, 23, 34)
        assert guest.run(write(MISC_ENABLE, value)) == (STOP if taken else GP)
        assert guest.cpu.get_msr(MISC_ENABLE) == (value if taken else made)


def test_misc_enable_limits_cpuid():
    with Guest("long") as guest:
        code = "xor eax, eax; cpuid; mov esi, eax; " + write(MISC_ENABLE, 0x1801 | 1 << 22)
        assert guest.run(code + "xor eax, eax; cpuid; mov edi, eax; mov edi, edi") == STOP
        assert (guest.regs()["rsi"], guest.regs()["rdi"]) == (0x16, 2)


def test_misc_enable_switches_nx_off():
    look = "mov eax, 0x80000001; cpuid; bt edx, 20; setc {}; "
    with Guest("long") as guest:
        guest.set(efer=guest.control("efer") & ~EFER_NXE)
        code = look.format("sil") + write(MISC_ENABLE, 0x1801 | 1 << 34) + look.format("dil")
        assert guest.run("xor esi, esi; xor edi, edi; " + code) == STOP
        assert (guest.regs()["rsi"], guest.regs()["rdi"]) == (1, 0)
        guest.begin()
        assert guest.run(f"mov ecx, {EFER:#x}; rdmsr; or eax, {EFER_NXE:#x}; wrmsr") == GP


def test_another_engine_may_have_counters():
    """What is read-only for the guest describes the engine; a machine that comes from another brings its own."""
    with Guest("long") as guest:
        guest.cpu.set_msr(MISC_ENABLE, 1 << 18 | 1)
        assert guest.run(write(MISC_ENABLE, 1)) == STOP
        guest.begin()
        assert guest.run(write(MISC_ENABLE, 1 | 1 << 11)) == GP
        with pytest.raises(OSError):
            guest.cpu.set_msr(MISC_ENABLE, 1 << 3)


# ---- Machine checks ----


def test_every_bank_is_there_and_goes_along():
    with Guest("long") as guest, Guest("long") as other:
        for index in range(0x400, 0x400 + 4 * BANKS):
            guest.cpu.set_msr(index, 2**64 - 1 if index % 4 == 0 else index)
        guest.cpu.set_msr(0x17A, 4)
        saved = msrs(guest)
        assert [index for index in saved if 0x400 <= index < 0x500] == list(range(0x400, 0x480))
        other.cpu.set_state("msrs", guest.cpu.get_state("msrs"))
        assert msrs(other) == saved
        assert (
            other.run("mov ecx, 0x47f; rdmsr; mov esi, eax; mov ecx, 0x47d; xor eax, eax; xor edx, edx; wrmsr") == STOP
        )
        assert (other.regs()["rsi"], other.cpu.get_msr(0x47D)) == (0x47F, 0)


@pytest.mark.parametrize("msr", [0x0, 0x179, 0x17A, 0x400, 0x47F])
def test_without_machine_checks_in_cpuid(msr):
    with Guest("long") as guest:
        change_cpuid(guest, 1, 3, 7)
        change_cpuid(guest, 1, 3, 14)
        assert guest.run(f"mov ecx, {msr:#x}; rdmsr") == GP
        guest.begin()
        assert guest.run("mov rax, cr4; or eax, 0x40; mov cr4, rax") == GP
        assert msr not in msrs(guest)


# ---- What is written for nothing ----


@pytest.mark.parametrize("msr", [0x79, 0xC0010020])
def test_updates_are_written_and_not_read(msr):
    with Guest("long") as guest:
        assert guest.run(write(msr, 0x1234)) == STOP
        guest.begin()
        assert guest.run(f"mov ecx, {msr:#x}; rdmsr") == GP


def test_last_branches_are_switched_on_in_vain():
    with Guest("long") as guest:
        assert guest.run(write(0x1D9, 3) + "xor eax, eax; rdmsr; mov esi, eax; mov esi, esi") == STOP
        assert guest.regs()["rsi"] == 2


def test_constants_are_no_state():
    with Guest("long") as guest:
        assert not {0x2C, 0xCD, 0x198, 0xC001001B} & msrs(guest).keys()
        guest.cpu.set_msr(0xCD, 3)  # from another engine
        with pytest.raises(OSError):
            guest.cpu.set_msr(0xCD, 4)


def test_the_bytes_of_ovmf():
    """The first that it does in protected mode: CR4 = 640h (MCE, PAE.. come later)."""
    with Guest("protected") as guest:
        assert guest.run("mov eax, 0x640; mov cr4, eax; mov esi, cr4; stc") == STOP
        assert guest.regs()["rsi"] == 0x640 and guest.frame(False)[2] & CF
