"""What the tests of the x87 and of MMX share: values in all the forms of 80 bits, and states of the unit."""

import os
import random
import struct
import zlib

from emulator import encode, native
from emulator.native import DATA, DATA_SIZE, GPRS, Case

CASES = int(os.environ.get("VMFS_CASES", "40"))
SEED = int(os.environ.get("VMFS_SEED", "0"))
UD, NM, GP, PF, MF, XM = 6, 7, 13, 14, 16, 19
IE, DE, ZE, OE, UE, PE, SF, ES = 1, 2, 4, 8, 16, 32, 64, 128
TOP_BIT = 1 << 63
MANTISSAS = (
    TOP_BIT, TOP_BIT | 1, 2**64 - 1, TOP_BIT | 1 << 62, TOP_BIT | 1 << 61, TOP_BIT | 1 << 40,
    TOP_BIT | 0x7FF, TOP_BIT | 0x400, TOP_BIT | 0x3FF, TOP_BIT | 0x401, 2**64 - 0x400, 2**64 - 0x401,
    TOP_BIT | 1 << 39, TOP_BIT | 3 << 39, 2**64 - (1 << 39), 0, 1, TOP_BIT - 1, 1 << 62, 0xC90FDAA22168C235,
    0xB17217F7D1CF79AC,
)  # fmt: skip
EXPONENTS = (
    0, 0, 1, 2, 0x7FFF, 0x7FFF, 0x7FFE, 0x7FFD, 0x3FFF, 0x3FFF, 0x3FFE, 0x4000, 0x3FFD, 0x3F80, 0x3F81,
    0x3F6A, 0x3C00, 0x3C01, 0x3BCD, 0x407E, 0x407F, 0x43FE, 0x43FF, 0x400D, 0x400E, 0x401D, 0x401E, 0x403D,
    0x403E, 0x403F, 0x4040, 0x3FBE, 0x3FBF, 0x1FFF, 0x2000, 0x5FFF, 0x6000, 0x4039, 0x403A,
)  # fmt: skip
# Operands that the manual names: zero, one, infinity, quiet and signalling NaN, the indefinite,
# pseudo-denormal, pseudo-infinity, pseudo-NaN, unnormal, denormal.
NAMED = (
    (0, 0), (0x3FFF, TOP_BIT), (0x7FFF, TOP_BIT), (0x7FFF, 3 << 62 | 5), (0x7FFF, TOP_BIT | 5),
    (0x7FFF, 3 << 62), (0, TOP_BIT | 1), (0x7FFF, 0), (0x7FFF, 7), (0x3FFF, 1 << 62), (0, 1),
)  # fmt: skip


def generator(*words):
    return random.Random(zlib.crc32(" ".join(map(str, words)).encode()) + SEED)


def extended(rng):
    """(exponent with sign, mantissa)."""
    kind, sign = rng.randrange(10), rng.choice((0, 0x8000))
    if kind < 2:
        exponent, mantissa = rng.choice(NAMED)
        return exponent | sign, mantissa
    if kind < 4:
        return rng.choice(EXPONENTS) | sign, rng.choice(MANTISSAS)
    if kind == 4:
        return rng.getrandbits(16), rng.getrandbits(64)
    if kind == 5:  # an integer, or near one
        n = rng.getrandbits(rng.choice((1, 4, 8, 15, 16, 17, 31, 32, 33, 60, 63, 64))) or 1
        length = n.bit_length()
        return 0x3FFE + length | sign, n << 64 - length
    if kind == 6:  # a double's precision
        return rng.randrange(0x3FE0, 0x4020) | sign, TOP_BIT | rng.getrandbits(52) << 11
    return rng.randrange(0x3FF0, 0x4010) | sign, TOP_BIT | rng.getrandbits(63)


def operand(rng, kind):
    """A memory operand: 16, 32, 64 bits, an extended real or a decimal, in bytes."""
    if kind == "real32":
        values = (
            0,
            1,
            0x7FFFFF,
            0x800000,
            0x3F800000,
            0x7F7FFFFF,
            0x7F800000,
            0x7F800001,
            0x7FC00000,
            rng.getrandbits(31),
        )
        return struct.pack("<I", rng.choice(values) | rng.choice((0, 1 << 31)))
    if kind == "real64":
        values = (
            0,
            1,
            2**52 - 1,
            2**52,
            0x3FF << 52,
            0x7FF << 52,
            0x7FF << 52 | 1,
            0xFFF << 51,
            rng.getrandbits(63),
        )
        return struct.pack("<Q", rng.choice(values) | rng.choice((0, 1 << 63)))
    if kind == "real80":
        exponent, mantissa = extended(rng)
        return struct.pack("<QH", mantissa, exponent)
    if kind == "decimal":
        digits = bytes(rng.randrange(10) << 4 | rng.randrange(10) for _ in range(9))
        return (digits if rng.randrange(4) else rng.getrandbits(72).to_bytes(9, "little")) + bytes(
            [rng.choice((0, 0x80))]
        )
    return struct.pack("<Q", encode.value(rng))


def control_word(rng, unmask=True):
    """Any precision (the reserved one too) and rounding; all masked more often than not."""
    masks = rng.getrandbits(6) if unmask and rng.randrange(2) else 0x3F
    return (
        masks
        | 0x40
        | rng.choice((0x300, 0x300, 0x200, 0, 0x100))
        | rng.randrange(4) << 10
        | rng.choice((0, 0, 0, 0x1000))
    )


def status_word(rng, control):
    """Any TOP and condition codes; flags that may be set, and rarely one that pends."""
    flags = rng.choice((0, 0, 0, rng.getrandbits(7)))
    if rng.randrange(16):
        flags &= control | SF
    status = flags | rng.choice((0, rng.getrandbits(16) & 0x4700)) | rng.randrange(8) << 11
    return status | (0x8080 if flags & ~control & 0x3F else 0)


def fx_image(rng, control=None):
    """An FXSAVE image with any state of the x87: full, empty and mixed stacks."""
    fx = bytearray(encode.fx_image(rng))
    control = control_word(rng) if control is None else control
    tags = rng.choice((0xFF, 0xFF, 0xFF, 0, rng.getrandbits(8), rng.getrandbits(8)))
    struct.pack_into("<HHB", fx, 0, control, status_word(rng, control), tags)
    for i in range(8):
        exponent, mantissa = extended(rng)
        struct.pack_into("<QH", fx, 32 + 16 * i, mantissa, exponent)
    return bytes(fx)


def memory(rng, kinds):
    """Contents of the data area, 16 bytes an operand."""
    return b"".join(operand(rng, rng.choice(kinds)).ljust(16, b"\0") for _ in range(64)) * (DATA_SIZE // 1024)


def plain(code, fx=None, data=b"", **registers):
    """The code with all other registers zero."""
    gprs = dict.fromkeys(GPRS, 0) | {"rsp": DATA + 2048, "rbx": DATA, "rcx": DATA + 512} | registers
    fx = fx or encode.fx_image(random.Random(1))
    code = bytes.fromhex(code) if isinstance(code, str) else code
    return Case(
        code=code, gprs=gprs, flags=0, data=data.ljust(DATA_SIZE, b"\0"), fx=bytes(fx), name=code.hex()
    )


def describe(case):
    control, status, tags = struct.unpack_from("<HHB", case.fx)
    stack = " ".join(
        "{1:04x}.{0:016x}".format(*struct.unpack_from("<QH", case.fx, 32 + 16 * i)) for i in range(8)
    )
    return f"{native.describe(case)} fcw={control:#x} fsw={status:#x} tags={tags:#x} st={stack}"


def compare(host, core, case, instructions=1, compat=False):
    """Both run the case and agree; the host's outcome."""
    core.load(case)
    found = core.outcome(case, core.cpu.run(instructions))
    for _ in range(3):  # a switch of tasks amid a program loses FCS and FDS: Linux keeps 64-bit pointers
        expected = host.run(case, compat)
        for name in GPRS[8:] if compat else ():
            expected.gprs[name] = found.gprs[name] = 0
        wrong = native.differences(case, expected, found)
        if not wrong:
            return expected
    raise AssertionError(f"{describe(case)}: {'; '.join(wrong)}")


def keeps_pointers(host):
    """Whether FNSTENV stores the last instruction's opcode, addresses and selectors on this host: newer
    processors of Intel keep those of exceptions only, and no selectors."""
    case = plain("dbe3 d903 d931")  # fninit; fld dword ptr [rbx]; fnstenv [rcx]
    for _ in range(3):
        image = struct.unpack_from("<7I", host.run(case).data, 512)
        if image[3:6] == (case.ip + 2, 0x33 | 0x103 << 16, DATA):
            return True
    return False
