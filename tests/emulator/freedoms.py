"""What processors may do as they like, one row each: where the host CPU uses such a freedom another way than the core,
the comparison takes the host's outcome back to the core's way, and everything is compared then.

A row asserts what must hold of the host's way, so that it hides no fault: what it does not recognize to the byte is a
difference. `fuzz/freedoms.c` has the same freedoms, and those of segments and of stored x87 pointers, for the fuzzer.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

PAGE = 4096
DATA = 0x2002_0000  # where the data of a case is
ARITHMETIC, DF = 0x8D5, 0x400
COMPLETED, BR, UD, SS, GP, PF, AC, XM = -1, 5, 6, 12, 13, 14, 17, 19
MEMORY_FAULTS = (SS, GP, PF, AC)
PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"
ES, EXCEPTIONS = 1 << 7, 0x1F  # of the status word; the precision exception does not keep a store back


@dataclass(frozen=True)
class Instruction:
    """The one at which an outcome stopped; without an opcode outside of the code. `digit` and `memory` are ModRM's."""

    prefixes: bytes
    opcode: bytes
    digit: int
    memory: bool


def instruction_at(case, ip: int) -> Instruction:
    code, at = case.code[max(ip - case.ip, 0) :], 0
    while at < len(code) and (code[at] in PREFIXES or code[at] >> 4 == 4):  # the legacy tests have no INC or DEC here
        at += 1
    size = 2 if code[at : at + 1] == b"\x0f" else 1
    modrm = code[at + size] if len(code) > at + size else 0
    return Instruction(code[:at], code[at : at + size], modrm >> 3 & 7, modrm < 0xC0)


@dataclass(frozen=True)
class Vex:
    """One of three bytes at which an outcome stopped, or completed."""

    space: int
    opcode: int
    prefix: int
    wide: bool
    long: bool
    vvvv: int
    reg: int


def vex_at(case, ip: int) -> Vex | None:
    code = case.code[max(ip - case.ip, 0) :].lstrip(PREFIXES)
    if len(code) < 5 or code[0] != 0xC4:
        return None
    _, first, second, opcode, modrm = code[:5]
    reg = (first >> 4 & 8 ^ 8) | modrm >> 3 & 7
    return Vex(first & 31, opcode, second & 3, second > 127, bool(second & 4), ~second >> 3 & 15, reg)


def changed(before: bytes, after: bytes) -> tuple[int, int]:
    """The first byte that differs, and the one after the last."""
    places = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    return (places[0], places[-1] + 1) if places else (0, 0)


def _mmx_top(case, host, core):
    """Before a store of MMX faults, TOP is 0 already; registers and tags are as they were."""
    at = instruction_at(case, core.ip)
    stores = (b"\x0f\x7e", b"\x0f\x7f", b"\x0f\xe7", b"\x0f\xf7")
    mandatory = set(at.prefixes) & set(b"\x66\xf2\xf3")
    if host.vector != core.vector or core.vector not in MEMORY_FAULTS or at.opcode not in stores or mandatory:
        return None
    status, top = (struct.unpack_from("<H", each.fx, 2)[0] for each in (host, core))
    if status & 0x3800:
        return None
    top = top >> 11 & 7
    fx = bytearray(host.fx)
    struct.pack_into("<H", fx, 2, status | top << 11)
    for i in range(8):
        register = 32 + 16 * ((top + i) & 7)
        fx[32 + 16 * i : 48 + 16 * i] = host.fx[register : register + 16]
    return replace(host, fx=bytes(fx))


X87_STORES = {b"\xd9": (2, 3), b"\xdb": (1, 2, 3, 7), b"\xdd": (1, 2, 3), b"\xdf": (1, 2, 3, 6, 7)}


def _refused_store(case, host, core):
    """An unmasked exception keeps a store of the x87 back before its memory is looked at."""
    at = instruction_at(case, core.ip)
    if core.vector not in MEMORY_FAULTS or host.vector != COMPLETED or host.ip != case.ip + len(case.code):
        return None
    if not at.memory or at.digit not in X87_STORES.get(at.opcode, ()) or host.data != case.data:
        return None
    control, before = struct.unpack_from("<HH", case.fx)
    status = struct.unpack_from("<H", host.fx, 2)[0]
    unmasked = status & ~control & EXCEPTIONS
    # Nothing but exceptions, ES, B and C1 has changed: nothing was popped.
    if not unmasked or not status & ES or (status ^ before) & 0x7D00 or host.fx[4] != case.fx[4]:
        return None
    fx = bytearray(host.fx)
    fx[2:4] = case.fx[2:4]
    return replace(host, vector=core.vector, ip=core.ip, fx=bytes(fx))


INDEFINITE = bytes(7) + b"\xc0"  # what an empty register stores
X87_LONG_STORES = {(b"\xdb", 7): 10, (b"\xdf", 6): 10, (b"\xd9", 6): 28, (b"\xdd", 6): 108}


def _stored_in_part(case, host, core):
    """A store of more than 8 bytes over the end of what is mapped has stored what lies before."""
    at = instruction_at(case, core.ip)
    width = X87_LONG_STORES.get((at.opcode, at.digit), 0) if at.memory else 0
    if not width or host.vector != PF or core.vector != PF or core.data != case.data:
        return None
    end = len(host.data)  # the data area ends where the fault is
    first, last = changed(core.data, host.data)
    if host.address % PAGE or first < end - width:
        return None
    if (at.opcode, at.digit) == (b"\xdb", 7):  # the mantissa and not the exponent
        start = end - 9 if host.data[end - 9 : end - 1] in (case.fx[32:40], INDEFINITE) else end - 8
        if host.data[start : start + 8] not in (case.fx[32:40], INDEFINITE) or first < start or last > start + 8:
            return None
    return replace(host, data=core.data)


def _call_pushed(case, host, core):
    """CALL of an address that is not canonical: the return address may be stored already; RSP is as it was."""
    at = instruction_at(case, core.ip)
    if host.vector != GP or core.vector != GP or (at.opcode, at.digit) != (b"\xff", 2):
        return None
    slot = core.gprs["rsp"] - 8 - DATA
    pushed = struct.pack("<Q", case.ip + len(case.code))
    first, last = changed(core.data, host.data)
    if not 0 <= slot <= first < last <= slot + 8 or host.data[slot : slot + 8] != pushed:
        return None
    return replace(host, data=core.data)


def _call_order(case, host, core):
    """CALL of an address that is not canonical, with a stack that faults: which is found first."""
    at = instruction_at(case, core.ip)
    if core.vector != GP or host.vector not in (SS, PF) or (at.opcode, at.digit) != (b"\xff", 2):
        return None
    return replace(host, vector=GP)


def _bound_first(case, host, core):
    """BOUND: an index below the lower bound needs no look at the upper one, which is not there."""
    at = instruction_at(case, core.ip)
    if host.vector != BR or core.vector != PF or at.opcode != b"\x62" or not at.memory:
        return None
    size = 2 if 0x66 in at.prefixes else 4
    lower = struct.unpack("<I", case.code[-4:])[0] - DATA
    index = case.gprs["rax rcx rdx rbx rsp rbp rsi rdi".split()[at.digit]].to_bytes(8, "little")[:size]
    if not len(case.data) - 2 * size < lower <= len(case.data) - size:
        return None
    bound = case.data[lower : lower + size]
    if int.from_bytes(index, "little", signed=True) >= int.from_bytes(bound, "little", signed=True):
        return None
    return replace(host, vector=PF)


REPEATED = re.compile(rb"([\x26\x2e\x36\x3e\x64-\x67\xf2\xf3]+)[\x40-\x4f]?[\xa4-\xa7\xaa-\xaf]")


def _repeat_halves(case, host, core):
    """A repeated string instruction with 32-bit addresses that does no iteration: the high halves of its registers."""
    found = REPEATED.search(case.code)
    if not found or 0x67 not in found[1] or not set(found[1]) & {0xF2, 0xF3} or host.vector != core.vector:
        return None
    if core.gprs["rcx"] != case.gprs["rcx"]:  # an iteration was done, and zero-extended it
        return None
    gprs = dict(host.gprs)
    for name in ("rcx", "rsi", "rdi"):
        if gprs[name] == core.gprs[name] & 0xFFFFFFFF:
            gprs[name] = core.gprs[name]
    return replace(host, gprs=gprs)


def _repeat_flags(case, host, core):
    """A fault amid a repeated CMPS or SCAS, the first instruction of the case or after a LEA: flags of before it."""
    at = instruction_at(case, core.ip)
    compares = (b"\xa6", b"\xa7", b"\xae", b"\xaf")
    if host.vector != core.vector or core.vector not in MEMORY_FAULTS or at.opcode not in compares:
        return None
    if not set(at.prefixes) & {0xF2, 0xF3} or host.flags != case.flags & (ARITHMETIC | DF):
        return None
    return replace(host, flags=core.flags)


def _movsxd_reads_more(case, host, core):
    """MOVSXD with operand size 16, of which only 16 bits are there."""
    at = instruction_at(case, host.ip)
    short = 0x66 in at.prefixes and not at.prefixes[-1] & 0xF8 == 0x48
    if host.vector != PF or core.vector != COMPLETED or at.opcode != b"\x63" or not at.memory or not short:
        return None
    if core.ip != case.ip + len(case.code) or host.address % PAGE:
        return None
    changes = [name for name in host.gprs if host.gprs[name] != core.gprs[name]]
    if len(changes) > 1 or any((host.gprs[name] ^ core.gprs[name]) >> 16 for name in changes):
        return None
    return replace(host, vector=COMPLETED, ip=core.ip, gprs=dict(core.gprs))


MXCSR = slice(24, 28)
MXCSR_FLAGS = 0x3F


def _half_floats_refused(case, host, core):
    """VCVTPS2PH whose store faults, or whose floats do: MXCSR has no flags of it."""
    at = vex_at(case, core.ip)
    if host.vector not in MEMORY_FAULTS or core.vector not in (host.vector, XM) or at is None:
        return None
    if (at.space, at.opcode) != (3, 0x1D) or host.fx[MXCSR] != case.fx[MXCSR]:
        return None
    flags = int.from_bytes(case.fx[MXCSR], "little") ^ int.from_bytes(core.fx[MXCSR], "little")
    if flags & ~MXCSR_FLAGS:
        return None
    return replace(host, vector=core.vector, address=core.address, fx=host.fx[:24] + core.fx[MXCSR] + host.fx[28:])


def _precision_of_denormals(case, host, core):
    """VCVTPS2PH of denormals with underflow unmasked: no precision flag, and no exception of it."""
    at = vex_at(case, case.ip)
    precision, underflow = 0x20, 0x800
    if at is None or (at.space, at.opcode) != (3, 0x1D) or host.vector not in (COMPLETED, XM):
        return None
    theirs, ours = (int.from_bytes(each.fx[MXCSR], "little") for each in (host, core))
    if ours != theirs | precision or ours & underflow:
        return None
    if core.vector != host.vector:  # precision is unmasked, too
        if ours & 0x1000 or core.fx[:24] + core.fx[28:] != case.fx[:24] + case.fx[28:]:
            return None
        return core
    return replace(host, fx=host.fx[:24] + core.fx[MXCSR] + host.fx[28:])


def _faulted_gather(case, host, core):
    """Mask bits of what is not done are as they were, and so are upper halves."""
    at = vex_at(case, core.ip)
    if host.vector != core.vector or core.vector not in MEMORY_FAULTS or at is None:
        return None
    if at.space != 2 or not 0x90 <= at.opcode <= 0x93:
        return None
    size = 8 if at.wide else 4
    fx, ymm = bytearray(host.fx), bytearray(host.ymm)
    for half, image, before, mine, first in (
        (0, fx, case.fx, core.fx, 160 + 16 * at.vvvv),
        (1, ymm, case.ymm, core.ymm, 16 * at.vvvv),
    ):
        for place in range(first, first + 16, size):
            here = slice(place, place + size)
            extended = (b"\xff" if before[here][-1] & 0x80 else b"\0") * size
            beyond = bytes(size) if half and not at.long else extended
            if image[here] == before[here] and mine[here] in (extended, beyond):
                image[here] = mine[here]
    upper = slice(16 * at.reg, 16 * at.reg + 16)
    if not at.long and ymm[upper] == case.ymm[upper] and core.ymm[upper] == bytes(16):
        ymm[upper] = core.ymm[upper]
    return replace(host, fx=bytes(fx), ymm=bytes(ymm))


def _w_is_ignored(case, host, core):
    """VPERMQ and VPERMPD with W clear."""
    at = vex_at(case, core.ip)
    if at is None or (at.space, at.opcode | 1, at.prefix, at.long, at.wide) != (3, 1, 1, True, False):
        return None
    if (host.vector, core.vector) != (COMPLETED, UD):
        return None
    return replace(host, vector=UD, ip=case.ip, fx=core.fx, ymm=case.ymm)  # its vector register aside


def _w_is_refused(case, host, core):
    """VPEXTRD and VPINSRD with W set outside of 64-bit mode."""
    at = vex_at(case, host.ip)
    if at is None or (at.space, at.prefix, at.long, at.wide) != (3, 1, False, True) or at.opcode not in (0x16, 0x22):
        return None
    if (host.vector, core.vector) != (UD, COMPLETED):
        return None
    if sum(host.gprs[name] != core.gprs[name] for name in host.gprs) > 1 or host.data != core.data:
        return None
    return core


@dataclass(frozen=True)
class Freedom:
    """`use(case, host, core)`: the host's outcome in the core's way, or None where the freedom is not what differs."""

    name: str
    why: str
    use: Callable


FREEDOMS = (
    Freedom(
        "TOP after a faulting MMX store",
        "SDM 3A 6.5 has a fault leave the state as it was. Errata of Intel's processors say that this one may not "
        "(Faulting MMX Instruction May Incorrectly Update x87 FPU Tag Word); Sapphire Rapids clears TOP",
        _mmx_top,
    ),
    Freedom(
        "an unmasked x87 exception or a fault of the operand of a store",
        "SDM 1 8.5.1, 8.5.4: with the exception unmasked nothing is stored, so no address needs to be valid; SDM 3A "
        "table 6-2 leaves the order of faults of one instruction's execution to implementations. AMD looks first",
        _refused_store,
    ),
    Freedom(
        "a long store in part",
        "SDM 3A 8.1.1: an x87 instruction that stores more than a quadword may use several accesses, and those that "
        "completed stay visible when another faults",
        _stored_in_part,
    ),
    Freedom(
        "CALL that pushed",
        "SDM 2A CALL checks the target first, AMD's APM 3 pushes first; Intel's processors store, and then take #GP. "
        "What lies below RSP is nobody's",
        _call_pushed,
    ),
    Freedom("CALL with two faults", "as above: the target or the push first", _call_order),
    Freedom(
        "BOUND reads one bound",
        "SDM 2A BOUND: below the lower bound or above the upper one; nothing says that both are read",
        _bound_first,
    ),
    Freedom(
        "high halves of repeated strings' registers",
        "SDM 1 3.4.1.1 zero-extends results of 32 bits; where ECX is 0 or the first iteration faults there is none. "
        "Intel's processors extend nevertheless (Linux arch/x86/kvm/emulate.c, string_registers_quirk)",
        _repeat_halves,
    ),
    Freedom(
        "MOVSXD of 16 bits",
        "SDM 2B MOVSX: MOVSXD r16, r/m16. AMD's APM 3 has forms of 32 bits only, and its processors read them",
        _movsxd_reads_more,
    ),
    Freedom(
        "flags of a repeated comparison that faults",
        "SDM 2B REP: EFLAGS is restored to the state prior to the execution of the instruction. AMD's processors have "
        "the flags of the last iteration, as the core has, where iterations are instructions of their own",
        _repeat_flags,
    ),
    Freedom(
        "VCVTPS2PH that faults",
        "SDM 3A table 6-2 has an exception of floats and the fault of a store in one class, and no manual says whether "
        "MXCSR has its flags then. AMD's processors take the fault first, without flags",
        _half_floats_refused,
    ),
    Freedom(
        "VCVTPS2PH of denormals",
        "SDM 2C has no word on the precision exception of a tiny result while underflow is unmasked. AMD's raise none",
        _precision_of_denormals,
    ),
    Freedom(
        "a gather that faults",
        "SDM 2C VGATHERDPS: each element of the mask becomes its top bit first, and the rest is cleared. AMD's "
        "processors do so with what is done, and with upper halves when all is",
        _faulted_gather,
    ),
    Freedom(
        "VEX.W of VPERMQ and VPERMPD",
        "SDM 2C VPERMQ has W1 only, and 2A 2.7.9 has #UD for another one. AMD's processors do not look at W",
        _w_is_ignored,
    ),
    Freedom(
        "VEX.W of VPEXTRD and VPINSRD outside of 64-bit mode",
        "SDM 2B PEXTRD: it is ignored. AMD's processors raise #UD",
        _w_is_refused,
    ),
)


def in_the_cores_way(case, host, core):
    """The host's outcome for each freedom that explains something of the difference."""
    found = []
    for freedom in FREEDOMS:
        other = freedom.use(case, host, core)
        if other is not None:
            found.append(other)
    return found
