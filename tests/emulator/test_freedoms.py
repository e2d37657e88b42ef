"""The freedoms of processors: each is recognized where a host uses it, and what is only like it stays a difference.

The outcomes are made up, so this holds on any host.
"""

import random
import struct
from dataclasses import replace

import pytest

pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.freedoms import FREEDOMS, GP, PF, SS, UD  # noqa: E402
from emulator.native import ARITHMETIC, COMPLETED, DATA, DATA_SIZE, GPRS, PAGE, START, Case, Outcome  # noqa: E402

BR, MF = 5, 16
END = DATA + DATA_SIZE
INVALID_UNMASKED = 0x37E


def case(code, *, control=0x37F, top=3, data=bytes(DATA_SIZE), **gprs):
    fx = bytearray(encode.fx_image(random.Random(1)))
    struct.pack_into("<HHB", fx, 0, control, top << 11, 0x5A)
    registers = dict.fromkeys(GPRS, 0) | {"rsp": DATA + 2048} | gprs
    return Case(code=bytes.fromhex(code), gprs=registers, flags=0x44, data=data, fx=bytes(fx))


def faulted(given, vector, **changes):
    """The outcome of a processor that leaves everything as it was."""
    address = END if vector == PF else 0
    flags = given.flags & ARITHMETIC
    outcome = Outcome(vector, dict(given.gprs), given.ip, flags, given.data, given.fx, given.ymm, address=address)
    return replace(outcome, **changes)


def stored(given, address, value):
    data = bytearray(given.data)
    data[address - DATA : address - DATA + len(value)] = value
    return bytes(data)


def with_top_0(fx):
    fx, old, top = bytearray(fx), fx, fx[3] >> 3 & 7
    fx[3] &= ~0x38
    for i in range(8):
        fx[32 + 16 * ((top + i) & 7) : 48 + 16 * ((top + i) & 7)] = old[32 + 16 * i : 48 + 16 * i]
    return bytes(fx)


def status(fx, value, at=2):
    fx = bytearray(fx)
    struct.pack_into("<H", fx, at, value)
    return bytes(fx)


def patched(fx, at, value):
    return fx[:at] + bytes([value]) + fx[at + 1 :]


MOVNTQ = case("0fe700", rax=END)
FSTP = case("dd18", control=INVALID_UNMASKED, rax=END)
REFUSED = faulted(FSTP, COMPLETED, ip=START + 2, fx=status(FSTP.fx, 3 << 11 | 0x80C1))
FSTP80 = case("db38", rax=END - 9)
CALL = case("ff1500000000")
RETURN = struct.pack("<Q", START + 6)
BAD_STACK = case("ff1500000000", rsp=END + 8)
BOUND = case("6205fc3f0220", data=bytes(DATA_SIZE - 4) + struct.pack("<i", -5), rax=2**32 - 6)  # at END - 4
INSIDE = replace(BOUND, gprs=BOUND.gprs | {"rax": 2**32 - 5})
REP = case("f367a4", rcx=5 << 32, rsi=6 << 32 | 1, rdi=7 << 32 | 2)
REP_GPRS = REP.gprs | {"rcx": 0, "rsi": 1, "rdi": 2}
DONE = {"vector": COMPLETED, "ip": START + 3}
REP64 = replace(REP, code=bytes.fromhex("f3a4"))
MOVSXD = case("666303", rbx=END - 2)
LOADED = faulted(MOVSXD, COMPLETED, ip=START + 3, gprs=MOVSXD.gprs | {"rax": 0x8181})
MOVSXD32 = replace(MOVSXD, code=b"\x66\x48\x63\x03")
HALF = case("c4e3791d0000", rax=END - 4)  # vcvtps2ph [rax], xmm0, 0
INEXACT = status(HALF.fx, 0x1FA0, 24)
DENORMAL = replace(case("c4e3791dc000"), fx=status(HALF.fx, 0x1780, 24))  # vcvtps2ph xmm0, xmm0, 0
PRECISE = {"vector": COMPLETED, "ip": START + 6, "fx": status(DENORMAL.fx, 0x1782, 24)}
GATHER = replace(case("c4e269900c83", rbx=END), ymm=bytes(range(256)))  # vpgatherdd xmm1, [rbx + xmm0 * 4], xmm2
GATHER = replace(GATHER, fx=GATHER.fx[:192] + struct.pack("<4I", 1, 1 << 31, 2**32 - 1, 2**31 - 1) + GATHER.fx[208:])
EXTENDED = {
    "fx": GATHER.fx[:192] + struct.pack("<4I", 0, 2**32 - 1, 2**32 - 1, 0) + GATHER.fx[208:],
    "ymm": GATHER.ymm[:32] + bytes(16) + GATHER.ymm[48:],
}
PERMUTE = case("c4e37d00c021")
INSERT = case("c4e3f922c003", rax=5)
INSERTED = {"vector": COMPLETED, "ip": START + 6, "fx": INSERT.fx[:172] + b"\5\0\0\0" + INSERT.fx[176:]}
SCAS = case("f3ae", rcx=9, rdi=END - 2)

ALLOWED = {
    "TOP after a faulting MMX store": (MOVNTQ, faulted(MOVNTQ, PF, fx=with_top_0(MOVNTQ.fx)), faulted(MOVNTQ, PF)),
    "an unmasked x87 exception or a fault of the operand of a store": (FSTP, REFUSED, faulted(FSTP, PF)),
    "a long store in part": (
        FSTP80, faulted(FSTP80, PF, data=stored(FSTP80, END - 9, FSTP80.fx[32:40])), faulted(FSTP80, PF)
    ),
    "CALL that pushed": (CALL, faulted(CALL, GP, data=stored(CALL, DATA + 2040, RETURN)), faulted(CALL, GP)),
    "CALL with two faults": (BAD_STACK, faulted(BAD_STACK, PF), faulted(BAD_STACK, GP)),
    "BOUND reads one bound": (BOUND, faulted(BOUND, BR), faulted(BOUND, PF)),
    "high halves of repeated strings' registers": (
        REP, faulted(REP, gprs=REP_GPRS, **DONE), faulted(REP, **DONE)
    ),
    "MOVSXD of 16 bits": (MOVSXD, faulted(MOVSXD, PF), LOADED),
    "flags of a repeated comparison that faults": (
        SCAS,
        faulted(SCAS, PF, gprs=SCAS.gprs | {"rcx": 7, "rdi": END}),
        faulted(SCAS, PF, gprs=SCAS.gprs | {"rcx": 7, "rdi": END}, flags=0x85),
    ),
    "VCVTPS2PH that faults": (HALF, faulted(HALF, PF), faulted(HALF, PF, fx=INEXACT)),
    "VCVTPS2PH of denormals": (
        DENORMAL, faulted(DENORMAL, **PRECISE), faulted(DENORMAL, **PRECISE | {"fx": status(DENORMAL.fx, 0x17A2, 24)})
    ),
    "a gather that faults": (GATHER, faulted(GATHER, PF), faulted(GATHER, PF, **EXTENDED)),
    "VEX.W of VPERMQ and VPERMPD": (
        PERMUTE, faulted(PERMUTE, COMPLETED, ip=START + 6, fx=patched(PERMUTE.fx, 160, 0x77)), faulted(PERMUTE, UD)
    ),
    "VEX.W of VPEXTRD and VPINSRD outside of 64-bit mode": (INSERT, faulted(INSERT, UD), faulted(INSERT, **INSERTED)),
}  # fmt: skip
TOP_0 = with_top_0(MOVNTQ.fx)
# What a wrong core, or a wrong freedom, would make.
REFUSALS = {
    "a register changed, too": (MOVNTQ, faulted(MOVNTQ, PF, fx=patched(TOP_0, 34, 0x99)), faulted(MOVNTQ, PF)),
    "tags changed, too": (MOVNTQ, faulted(MOVNTQ, PF, fx=patched(TOP_0, 4, 0xFF)), faulted(MOVNTQ, PF)),
    "the core cleared TOP": (MOVNTQ, faulted(MOVNTQ, PF), faulted(MOVNTQ, PF, fx=TOP_0)),
    "a load": (
        replace(MOVNTQ, code=b"\x0f\x6f\x00"), faulted(MOVNTQ, PF, fx=with_top_0(MOVNTQ.fx)), faulted(MOVNTQ, PF)
    ),
    "no unmasked exception": (FSTP, replace(REFUSED, fx=status(FSTP.fx, 3 << 11 | 0x20)), faulted(FSTP, PF)),
    "the host popped": (FSTP, replace(REFUSED, fx=status(FSTP.fx, 4 << 11 | 0x80C1)), faulted(FSTP, PF)),
    "the host stored": (FSTP, replace(REFUSED, data=stored(FSTP, END - 4, b"1")), faulted(FSTP, PF)),
    "the host went elsewhere": (FSTP, replace(REFUSED, ip=START + 3), faulted(FSTP, PF)),
    "the core took #MF": (FSTP, REFUSED, faulted(FSTP, MF)),
    "the core did not fault": (FSTP, faulted(FSTP, PF), REFUSED),
    "not what is in ST0": (FSTP80, faulted(FSTP80, PF, data=stored(FSTP80, END - 9, b"12345678")), faulted(FSTP80, PF)),
    "elsewhere": (
        FSTP80, faulted(FSTP80, PF, data=stored(FSTP80, END - 99, FSTP80.fx[32:40])), faulted(FSTP80, PF)
    ),
    "the core stored in part": (
        FSTP80, faulted(FSTP80, PF), faulted(FSTP80, PF, data=stored(FSTP80, END - 9, FSTP80.fx[32:40]))
    ),
    "not the return address": (CALL, faulted(CALL, GP, data=stored(CALL, DATA + 2040, b"12")), faulted(CALL, GP)),
    "another slot": (CALL, faulted(CALL, GP, data=stored(CALL, DATA + 2032, RETURN)), faulted(CALL, GP)),
    "RSP moved": (
        CALL,
        faulted(CALL, GP, data=stored(CALL, DATA + 2040, RETURN), gprs=CALL.gprs | {"rsp": DATA + 2040}),
        faulted(CALL, GP),
    ),
    "the push first": (BAD_STACK, faulted(BAD_STACK, GP), faulted(BAD_STACK, SS)),
    "an index at the bound": (INSIDE, faulted(INSIDE, BR), faulted(INSIDE, PF)),
    "the core reads one bound": (BOUND, faulted(BOUND, PF), faulted(BOUND, BR)),
    "a low half": (REP, faulted(REP, gprs=REP_GPRS | {"rsi": 3}, **DONE), faulted(REP, **DONE)),
    "another register": (REP, faulted(REP, gprs=REP_GPRS | {"rdx": 3}, **DONE), faulted(REP, **DONE)),
    "64-bit addresses": (REP64, faulted(REP64, gprs=REP_GPRS, **DONE), faulted(REP64, **DONE)),
    "32 bits loaded": (MOVSXD, faulted(MOVSXD, PF), replace(LOADED, gprs=MOVSXD.gprs | {"rax": 0x81818181})),
    "MOVSXD of 32 bits": (MOVSXD32, faulted(MOVSXD32, PF), replace(LOADED, ip=START + 4)),
    "other flags than before": (SCAS, faulted(SCAS, PF, flags=0x81), faulted(SCAS, PF, flags=0x85)),
    "other flags of MXCSR": (HALF, faulted(HALF, PF), faulted(HALF, PF, fx=status(HALF.fx, 0x9F80, 24))),
    "the host set flags": (HALF, faulted(HALF, PF, fx=INEXACT), faulted(HALF, PF)),
    "underflow is masked": (
        replace(DENORMAL, fx=HALF.fx),
        faulted(DENORMAL, **PRECISE | {"fx": status(DENORMAL.fx, 0x1F82, 24)}),
        faulted(DENORMAL, **PRECISE | {"fx": status(DENORMAL.fx, 0x1FA2, 24)}),
    ),
    "another mask": (
        GATHER, faulted(GATHER, PF), faulted(GATHER, PF, **EXTENDED | {"fx": patched(EXTENDED["fx"], 195, 0xFF)})
    ),
    "the mask is as it was": (GATHER, faulted(GATHER, PF, **EXTENDED), faulted(GATHER, PF)),
    "the upper half of another register": (
        GATHER, faulted(GATHER, PF), faulted(GATHER, PF, **EXTENDED | {"ymm": bytes(48) + GATHER.ymm[48:]})
    ),
    "VPERMQ that changed a register": (
        PERMUTE,
        faulted(PERMUTE, COMPLETED, ip=START + 6, gprs=PERMUTE.gprs | {"rax": 1}),
        faulted(PERMUTE, UD),
    ),
    "VPEXTRD that stored": (
        INSERT, faulted(INSERT, UD), faulted(INSERT, **INSERTED, data=stored(INSERT, DATA, b"1"))
    ),
    "flags of what is done": (SCAS, faulted(SCAS, COMPLETED), faulted(SCAS, COMPLETED, flags=0x85)),
}  # fmt: skip


def test_each_has_an_example():
    assert set(ALLOWED) == {freedom.name for freedom in FREEDOMS}
    assert all(freedom.why for freedom in FREEDOMS)


@pytest.mark.parametrize("name", ALLOWED)
def test_is_allowed(name):
    """By its own row, and by no other."""
    given, host, core = ALLOWED[name]
    assert native.differences(given, core, core) == []
    assert native.differences(given, host, core) == []
    for freedom in FREEDOMS:
        other = freedom.use(given, host, core)
        explains = other not in (None, host) and native.differences(given, other, core) == []
        assert explains == (freedom.name == name), freedom.name


@pytest.mark.parametrize("why", REFUSALS)
def test_is_a_difference(why):
    given, host, core = REFUSALS[why]
    assert native.differences(given, host, core)


def test_the_pages_of_the_comparison_are_those_of_the_freedoms():
    assert (DATA % PAGE, END % PAGE) == (0, 0)
