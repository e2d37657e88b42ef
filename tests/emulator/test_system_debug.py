"""#DB: DR6, and the traps that wait after a load of SS (Intel SDM 3A 6.8.3, 3B 17.2.3).

What drops such a trap and what keeps it is in no manual; processors do what these tests say.
"""

from __future__ import annotations

import struct

import pytest
from emulator.system_lib import (
    BP,
    CODE32,
    CODE64,
    CR4_VME,
    DATA,
    DATA32,
    DB,
    GP,
    IF,
    NMI,
    OF,
    STOP,
    TSS,
    TSS2,
    TSS2_SELECTOR,
    UD,
    Guest,
    gate,
)
from engine.asm import ORIGIN

from vmfs.engine.emulator import _core

WATCH = 0x70401  # DR7: DR0 watches loads and stores of a word
LOADS = ("mov-protected", "pop-protected", "mov-long")


def dr6(guest: Guest) -> int:
    return int.from_bytes(guest.cpu.get_state("debugregs")[32:40], "little")


def set_debug(guest: Guest, *, address: int = 0, dr7: int = 0x400, dr6: int = 0xFFFF0FF0, number: int = 0) -> None:
    state = bytearray(guest.cpu.get_state("debugregs"))
    struct.pack_into("<Q", state, 8 * number, address)
    struct.pack_into("<2Q", state, 32, dr6, dr7)
    guest.cpu.set_state("debugregs", bytes(state))


def watched(load: str, after: str) -> Guest:
    """A load of SS from a word that DR0 watches, and what comes after it, at the label `next`."""
    instruction, mode = load.split("-")
    guest = Guest(mode)
    guest.put(DATA, DATA32, 4)
    place = DATA - ORIGIN - 6 if mode == "long" else DATA  # relative to RIP, or absolute
    code = b"\x8e\x15" + struct.pack("<i", place) if instruction == "mov" else b"\x17"
    guest.load(f".byte {', '.join(map(hex, code))}; next: {after}")
    if instruction == "pop":
        guest.set(rsp=DATA)
    set_debug(guest, address=DATA, dr7=WATCH)
    return guest


def test_db_comes_behind_the_next_instruction():
    with watched("mov-protected", "inc eax; after: inc ecx") as guest:
        assert guest.run() == DB
        assert guest.frame(False)[0] == guest.labels["after"]
        assert dr6(guest) & 0xE00F == 1


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    "after, vector, length",
    [
        (".byte 0xf1", DB, 1),  # INT1
        ("int3", BP, 1),
        ("int 0x80", 0x80, 2),
        ("int 1", DB, 2),
        (".byte 0x0f, 0x0b", UD, 0),
        (".byte 0xf0, 0x90", UD, 0),  # LOCK NOP: raised by the decoder
        ("mov ds, [0x30010]", GP, 0),  # a selector beyond the table
    ],
)
def test_what_drops_the_trap(load, after, vector, length):
    with watched(load, after) as guest:
        guest.put(0x30010, 0xFFF8, 2)
        guest.set_gate(1, gate(CODE64 if guest.long else CODE32, guest.stub(1), 14, dpl=3))
        assert guest.run() == vector
        assert guest.frame(vector == GP)[0] == guest.labels["next"] + length
        assert not dr6(guest) & 15
        before = guest.regs()["rsp"]
        guest.write(guest.stub(vector), b"\x90\xf4")  # none comes in the handler
        guest.set(rip=guest.stub(vector))
        assert guest.go()[0] == _core.EXIT_HLT
        assert (guest.regs()["rsp"], guest.regs()["rip"]) == (before, guest.stub(vector) + 2)


def test_into_drops_it_if_it_is_taken():
    with watched("mov-protected", "into") as guest:
        guest.set(rflags=2 | 1 << 11)
        assert guest.run() == OF
        assert not dr6(guest) & 15
    with watched("mov-protected", "into; after: nop") as guest:
        assert guest.run() == DB
        assert guest.frame(False)[0] == guest.labels["after"]


def test_a_virtual_8086_interrupt_that_is_redirected_drops_it():
    with Guest("v86") as guest:
        guest.set(cr4=guest.control("cr4") | CR4_VME)
        guest.put(TSS + 102, 0x88, 2)
        guest.write(TSS + 0x68, bytes(32))
        guest.put(4 * 0x21, 0x2000, 4)
        guest.write(0x2000, b"\x90\x0f\x0b")  # nop; ud2
        guest.put(0x5000, 0, 2)
        guest.load("mov ss, [0x5000]; int 0x21")
        set_debug(guest, address=0x5000, dr7=WATCH)
        assert guest.run() == UD
        assert guest.frame(False)[0] == 0x2001
        assert not dr6(guest) & 15


def test_syscall_keeps_it():
    """It comes at the entry of the kernel (CVE-2018-8897)."""
    with watched("mov-long", "syscall; other: nop") as guest:
        guest.cpu.set_msr(0xC0000081, CODE64 << 32)
        guest.cpu.set_msr(0xC0000082, guest.labels["other"])
        assert guest.run() == DB
        assert guest.frame(False)[0] == guest.labels["other"] and dr6(guest) & 15 == 1


def test_the_trap_of_a_task_is_not_dropped_by_the_int_that_switches_to_it():
    with watched("mov-protected", "int 0x80; other: nop") as guest:
        for offset, value in ((32, guest.labels["other"]), (36, 2), (56, 0x8000), (72, DATA32), (76, 8),
                              (80, DATA32), (84, DATA32)):  # fmt: skip
            guest.put(TSS2 + offset, value, 4)
        guest.put(TSS2 + 100, 1, 1)
        guest.set_gate(0x80, gate(TSS2_SELECTOR, 0, 5))
        assert guest.run() == DB
        assert dr6(guest) & 0xE00F == 0x8000


def test_a_second_load_of_ss_is_the_next_instruction():
    """Of loads in a row only the first holds back."""
    with watched("mov-protected", f"mov ss, [{DATA}]; after: inc eax") as guest:
        assert guest.run() == DB
        assert guest.frame(False)[0] == guest.labels["after"]
    with Guest("protected") as guest:
        guest.load(f"mov eax, {DATA32}; mov ss, eax; mov ss, eax; after: inc ecx")
        guest.set(rflags=2 | IF)
        guest.cpu.run(2)
        guest.cpu.nmi()
        assert guest.run() == NMI
        assert guest.frame(False)[0] == guest.labels["after"]


def test_a_catch_does_not_lose_the_place_behind_a_load_of_ss():
    """The exception is caught, not delivered: going on, it drops the trap as ever, and no NMI comes before it."""
    with watched("mov-protected", "int3") as guest:
        guest.cpu.set_debug(False, [(_core.STOP_VECTOR, BP, BP, 0, 0, 0)])
        exit_ = guest.go()
        assert (exit_[0], exit_[8], exit_[1]) == (_core.EXIT_DEBUG, BP, guest.labels["next"])
        guest.cpu.nmi()
        assert guest.go()[0] == _core.EXIT_HLT
        assert guest.regs()["rip"] == guest.stub(NMI) + 1, "the NMI, in the handler of INT3"
        assert guest.frame(False)[0] == guest.stub(BP)
        assert not dr6(guest) & 15
    with watched("mov-protected", "ud2") as guest:
        guest.cpu.set_debug(False, [(_core.STOP_VECTOR, UD, UD, 0, 0, 0)])
        assert guest.go()[8] == UD
        assert guest.run() == UD
        assert not dr6(guest) & 15


def test_a_trap_that_waits_goes_along_in_the_state():
    names = ("sregs", "debugregs", "regs", "events")
    for after, vector in (("nop", DB), ("int3", BP)):
        with watched("mov-protected", after) as one, Guest("protected") as other:
            one.cpu.run(1)
            assert not dr6(one) & 15, "it is not delivered yet"
            other.write(0x1000, one.memory[0x1000:0x1100])
            for name in names:
                other.cpu.set_state(name, one.cpu.get_state(name))
            assert other.run() == vector
            assert other.frame(False)[0] == one.labels["next"] + 1
            assert dr6(other) & 15 == (vector == DB)


# ---- DR6 ----


def test_dr6_has_what_matches_now_and_keeps_the_rest():
    """The bytes of issue 9, item 3."""
    with Guest("protected") as guest:
        guest.load(".byte 0x90")
        set_debug(guest, address=0x1000, dr7=0x400 | 1 << 4, dr6=0xFFFF4FF2, number=2)
        assert guest.run() == DB
        assert hex(dr6(guest)) == "0xffff4ff4"


@pytest.mark.parametrize(
    "code, before, after",
    [
        ("mov [0x30000], eax", 0xFFFFEFFE, 0xFFFFEFF1),  # a data breakpoint
        ("mov eax, dr0", 0xFFFF0FFF, 0xFFFF2FF0),  # GD: none matches
        (".byte 0xf1", 0xFFFF8FFF, 0xFFFF8FF0),  # INT1: the same
        ("int 1", 0xFFFF8FFF, 0xFFFF8FFF),  # no debug exception
    ],
)
def test_dr6_behind(code, before, after):
    with Guest("protected") as guest:
        guest.set_gate(1, gate(CODE32, guest.stub(1), 14, dpl=3))
        guest.load(code)
        set_debug(guest, address=DATA, dr7=0xD0401 | (0x2000 if "dr0" in code else 0), dr6=before)
        assert guest.run() == DB
        assert hex(dr6(guest)) == hex(after)


def test_dr6_behind_a_single_step():
    with Guest("protected") as guest:
        guest.load("nop")
        guest.set(rflags=2 | 0x100)
        set_debug(guest, dr6=0xFFFF0FF3)
        assert guest.run() == DB
        assert hex(dr6(guest)) == "0xffff4ff0"


def test_a_step_that_waits_is_shown_as_it_will_be():
    with Guest("protected") as guest:
        guest.load("nop")
        guest.set(rflags=2 | 0x100)
        set_debug(guest, dr6=0xFFFF0FF3)
        guest.cpu.run(1)
        assert hex(dr6(guest)) == "0xffff4ff0"
        assert guest.run() == DB and hex(dr6(guest)) == "0xffff4ff0"


def test_stop_is_left_alone():
    with watched("mov-protected", "nop") as guest:
        set_debug(guest)
        assert guest.run() == STOP
