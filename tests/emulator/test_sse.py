"""SSE to SSE4.2, AES, PCLMULQDQ, SHA against the host CPU: MXCSR in all its states, special values, and the rows that
test_instructions.py leaves out.

VMFS_CASES sets how many cases a row gets (default 40); VMFS_SEED the first random seed.
"""

import os
import random
import shutil
import struct
import zlib

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.native import COMPLETED, DATA, DATA_SIZE, GPRS, PAGE, Case  # noqa: E402

HOST_FLAGS = open("/proc/cpuinfo").read().partition("flags")[2].partition("\n")[0].split()
NEEDED = {"pni", "ssse3", "sse4_1", "sse4_2", "aes", "pclmulqdq", "sha_ni", "xsave", "xsavec"}
pytestmark = [
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the oracle is compiled"),
    pytest.mark.skipif(not set(HOST_FLAGS) >= NEEDED, reason=f"the host CPU lacks {NEEDED - set(HOST_FLAGS)}"),
]

CASES = int(os.environ.get("VMFS_CASES", "40"))
SEED = int(os.environ.get("VMFS_SEED", "0"))
ROWS = _core.instructions()
RESERVED = [16, *range(18, 32)]  # bits of MXCSR; 17 is AMD's misaligned mode, which the core does not have
UD, NM, GP, PF, XM = 6, 7, 13, 14, 19
IE, DE, ZE, OE, UE, PE = 1, 2, 4, 8, 16, 32
FLOAT = {
    *(name + kind for name in ("SQRT", "ADD", "SUB", "MUL", "DIV", "MIN", "MAX", "CMP", "ROUND") for kind in
      ("PS", "PD", "SS", "SD")),
    "RCPPS", "RCPSS", "RSQRTPS", "RSQRTSS", "HADDPS", "HADDPD", "HSUBPS", "HSUBPD", "ADDSUBPS", "ADDSUBPD", "DPPS", "DPPD",
    "UCOMISS", "UCOMISD", "COMISS", "COMISD", "CVTSI2SS", "CVTSI2SD", "CVTSS2SI", "CVTSD2SI", "CVTTSS2SI", "CVTTSD2SI",
    "CVTSS2SD", "CVTSD2SS", "CVTPS2PD", "CVTPD2PS", "CVTDQ2PD", "CVTDQ2PS", "CVTPS2DQ", "CVTTPS2DQ", "CVTPD2DQ",
    "CVTTPD2DQ",
}
SINGLES = [
    *(sign | bits for sign in (0, 1 << 31) for bits in (
        0, 1, 0x400000, 0x7FFFFF, 0x800000, 0x800001, 0xFFFFFF, 0x1000000, 0x3F800000, 0x3F000000, 0x3FC00000, 0x40400000,
        0x3F7FFFFF, 0x3F800001, 0x4B000001, 0x4EFFFFFF, 0x4F000000, 0x4F000001, 0x5EFFFFFF, 0x5F000000, 0x7F7FFFFF,
        0x7F000000, 0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FC12345, 0x00000123, 0x20000000, 0x20000001,
    )),
]
DOUBLES = [
    *(sign | bits for sign in (0, 1 << 63) for bits in (
        0, 1, 1 << 51, (1 << 52) - 1, 1 << 52, (1 << 52) + 1, (1 << 53) - 1, 0x3FF0000000000000, 0x3FE0000000000000,
        0x3FF8000000000000, 0x4008000000000000, 0x3FEFFFFFFFFFFFFF, 0x3FF0000000000001, 0x41DFFFFFFFC00000,
        0x41E0000000000000, 0x41DFFFFFFFE00000, 0x43DFFFFFFFFFFFFF, 0x43E0000000000000, 0x7FEFFFFFFFFFFFFF,
        0x7FE0000000000000, 0x7FF0000000000000, 0x7FF0000000000001, 0x7FF7FFFFFFFFFFFF, 0x7FF8000000000000,
        0x7FF8000000012345, 0x2000000000000000, 0x2000000000000001, 0x47EFFFFFE0000000, 0x47EFFFFFF0000000,
        0x3810000000000000, 0x380FFFFFFFFFFFFF, 0x36A0000000000000, 0x3690000000000000, 0x3800000000000000,
    )),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return native.Host(native.build(tmp_path_factory.mktemp("native")))


@pytest.fixture(scope="module")
def core():
    return native.Core()


def row_id(row):
    operands = ",".join(operand for operand in row["operands"] if operand)
    return f"{row['name']}-{operands}-{row['mod']}"


def generator(*words):
    return random.Random(zlib.crc32(" ".join(map(str, words)).encode()) + SEED)


def eight_bytes(rng, width):
    """Of floats: special, near a special one, random bits, or a plain number; `width` 4 or 8."""
    if width == 4:
        def single():
            kind = rng.randrange(5)
            if kind < 2:
                return rng.choice(SINGLES)
            if kind == 2:
                return (rng.choice(SINGLES) + rng.randrange(-3, 4)) % 2**32
            if kind == 3:
                return rng.getrandbits(32)
            return struct.unpack("<I", struct.pack("<f", rng.uniform(-100, 100)))[0]
        return struct.pack("<II", single(), single())
    kind = rng.randrange(5)
    if kind < 2:
        return struct.pack("<Q", rng.choice(DOUBLES))
    if kind == 2:
        return struct.pack("<Q", (rng.choice(DOUBLES) + rng.randrange(-3, 4)) % 2**64)
    return struct.pack("<Q", rng.getrandbits(64)) if kind == 3 else struct.pack("<d", rng.uniform(-100, 100))


def mxcsr(rng):
    """Any rounding, DAZ, FTZ, sticky flags; all masked more often than not."""
    masks = 0x3F if rng.randrange(5) < 3 else rng.getrandbits(6)
    return (rng.getrandbits(6) if rng.randrange(4) == 0 else 0) | rng.choice((0, 0, 1)) << 6 | masks << 7 \
        | rng.randrange(4) << 13 | rng.choice((0, 0, 1)) << 15


def fx_image(rng, control, width):
    fx = bytearray(encode.fx_image(rng))
    struct.pack_into("<I", fx, 24, control)
    for at in range(160, 416, 8):
        fx[at : at + 8] = eight_bytes(rng, width)
    return bytes(fx)


def compare(host, core, case):
    expected, found = host.run(case), core.run(case)
    wrong = native.differences(case, expected, found)
    assert not wrong, f"{native.describe(case)} mxcsr={struct.unpack_from('<I', case.fx, 24)[0]:#x}: {'; '.join(wrong)}"
    return expected


# ---- Floating point ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row["name"] in FLOAT and row["map"] != ""], ids=row_id)
def test_float(row, host, core):
    """Results, MXCSR flags, and unmasked exceptions, which leave everything but the flags as it was."""
    rng = generator("float", row_id(row))
    width = 4 if "PS" in row["name"][-3:] or "SS" in row["name"] else 8
    vectors = set()
    for _ in range(CASES):
        case = encode.make_case(row, rng)
        wide = rng.choice((width, width, width, 12 - width))
        case.fx = fx_image(rng, mxcsr(rng), wide)
        case.data = b"".join(eight_bytes(rng, wide) for _ in range(DATA_SIZE // 64)) * 8
        vectors.add(compare(host, core, case).vector)
    assert COMPLETED in vectors
    if CASES >= 40 and not row["name"].startswith(("RCP", "RSQRT", "CVT")):
        assert XM in vectors


def test_dot_products_by_steps(host, core):
    """Each multiplication and addition of DPPS and DPPD has its own exceptions."""
    rng = generator("dot")
    rows = [row for row in ROWS if row["name"] in ("DPPS", "DPPD")]
    for _ in range(CASES * 5):
        row = rng.choice(rows)
        case = encode.make_case(row, rng)
        width = 4 if row["name"] == "DPPS" else 8
        case.fx = fx_image(rng, mxcsr(rng) & ~(rng.getrandbits(6) << 7), width)
        compare(host, core, case)


# ---- Rows that need more than a random state -------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row["feature"] == "SHA"], ids=row_id)
def test_sha(row, host, core):
    rng = generator("sha", row_id(row))
    for _ in range(CASES):
        case = encode.make_case(row, rng)
        expected, found = host.run(case), core.run(case)
        if found.vector == GP and expected.vector != GP:
            continue  # AMD's SHA takes unaligned operands; Intel's manual has them fault
        assert not native.differences(case, expected, found), native.describe(case)


def test_sha_operands_must_be_aligned(core):
    case = plain(bytes.fromhex("0f38c808"), rax=DATA + 8)  # sha1nexte xmm1, [rax]
    assert core.run(case).vector == GP
    case.gprs["rax"] = DATA + 16
    assert core.run(case).vector == COMPLETED


def test_maskmovdqu(host, core):
    rng = generator("maskmovdqu")
    for _ in range(CASES * 4):
        case = encode.make_case(next(row for row in ROWS if row["name"] == "MASKMOVDQU"), rng)
        case.gprs["rdi"] = encode.operand_target(rng, 16)
        fx = bytearray(case.fx)
        if rng.randrange(2):
            for at in range(160, 416):
                fx[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
        case.fx = bytes(fx)
        if DATA <= case.gprs["rdi"] <= DATA + DATA_SIZE - 16:  # what else faults is left open
            compare(host, core, case)
        else:
            assert core.run(case).vector in (COMPLETED, PF)


@pytest.mark.parametrize("name", ["PCMPESTRI", "PCMPESTRM", "PCMPISTRI", "PCMPISTRM"])
def test_string_comparison(name, host, core):
    """Every immediate, texts that match, all kinds of lengths."""
    rng = generator(name)
    row = next(row for row in ROWS if row["name"] == name)
    for immediate in range(256):
        for _ in range(max(CASES // 40, 1)):
            case = encode.make_case(row, rng)
            letters = rng.choice((b"ab\0cz", b"abcz\xff", b"ab"))
            text = bytes(rng.choices(letters, k=512)) * (DATA_SIZE // 512)
            fx = bytearray(case.fx)
            fx[160:416] = text[:256]
            case.code, case.fx, case.data = case.code[:-1] + bytes([immediate]), bytes(fx), text
            for register in ("rax", "rdx"):
                if not DATA - 2**23 < case.gprs[register] % 2**32 < DATA + 2**23:
                    case.gprs[register] = rng.choice((
                        rng.randrange(0, 18), -rng.randrange(18) % 2**64, -rng.randrange(18) % 2**32, rng.getrandbits(64), 1 << 63,
                        1 << 31))
            compare(host, core, case)


# ---- State: FXSAVE, XSAVE ------------------------------------------------------------------------------------------------


def plain(code, **registers):
    gprs = dict.fromkeys(GPRS, 0) | {"rsp": DATA + 2048} | registers
    return Case(code=code, gprs=gprs, flags=0, data=bytes(DATA_SIZE), fx=encode.fx_image(random.Random(1)), name=code.hex())


CODES = {  # with the operand [rbx]
    "fxsave": "0fae03", "fxsave64": "480fae03", "fxrstor": "0fae0b", "fxrstor64": "480fae0b", "xsave": "0fae23",
    "xsave64": "480fae23", "xsavec": "0fc723", "xsaveopt": "0fae33", "xrstor": "0fae2b", "xrstor64": "480fae2b",
    "ldmxcsr": "0fae13", "xsetbv": "0f01d1", "xgetbv": "0f01d0",
}


@pytest.fixture
def xsave_core():
    """XCR0: x87 and SSE."""
    core = native.Core()
    xcrs = bytearray(core.cpu.get_state("xcrs"))
    struct.pack_into("<Q", xcrs, 16, 3)
    core.cpu.set_state("xcrs", bytes(xcrs))
    return core


CR0, CR4 = 8 * 24 + 2 * 16, 8 * 24 + 2 * 16 + 24  # in struct kvm_sregs


def save_area(rng, *, reserved=True):
    """An area to restore from, sometimes one that must fault."""
    area = bytearray(encode.fx_image(rng)) + bytearray(64)
    bad = 1 << rng.choice(RESERVED) if reserved and rng.randrange(8) == 0 else 0
    struct.pack_into("<I", area, 24, rng.getrandbits(16) | bad)
    struct.pack_into("<Q", area, 512, rng.choice((0, 1, 2, 3, 3, 3)))
    if reserved and rng.randrange(6) == 0:
        at = rng.randrange(512, 536)
        area[at] |= 1 << rng.randrange(8)
    for at in range(160, 416, 8):
        area[at : at + 8] = eight_bytes(rng, 8)
    return bytes(area)


@pytest.mark.parametrize("name", ["fxsave", "fxsave64", "xsave", "xsave64", "xsavec"])
def test_save(name, host, xsave_core):
    """The saved bytes, but for the pointers and the opcode of x87, whose keeping differs between processors."""
    rng = generator(name)
    for _ in range(CASES):
        at = DATA + PAGE - 64 * rng.randrange(12) + rng.choice((0, 0, 0, 16, 8))
        case = plain(bytes.fromhex(CODES[name]), rbx=at, rax=rng.randrange(4), rdx=0)
        case.fx = fx_image(rng, mxcsr(rng), 8)
        case.data = rng.randbytes(DATA_SIZE)
        expected, found = host.run(case), xsave_core.run(case)
        for outcome in (expected, found):
            data = bytearray(outcome.data)
            start = at - DATA
            if outcome.vector == COMPLETED:
                data[start + 6 : start + 24] = bytes(18)
                assert data[start + 28 : start + 30] in (b"\xff\xff", case.data[start + 28 : start + 30])
                data[start + 28 : start + 32] = bytes(4)  # MXCSR_MASK: AMD's has bit 17
            outcome.data = bytes(data)
        if expected.vector == COMPLETED and name.startswith("xsave"):
            # which components are in use: the core tells exactly, a processor may tell more
            start = at - DATA + 512
            more, exact = struct.unpack_from("<Q", expected.data, start)[0], struct.unpack_from("<Q", found.data, start)[0]
            assert exact & ~more == 0
            if more != exact:
                continue
        assert not native.differences(case, expected, found), (name, native.describe(case))


@pytest.mark.parametrize("name", ["fxrstor", "fxrstor64", "xrstor", "xrstor64"])
def test_restore(name, host, xsave_core):
    rng = generator(name)
    vectors = set()
    for _ in range(CASES * 3):
        at = DATA + PAGE - 64 * rng.randrange(12) + rng.choice((0, 0, 0, 0, 0, 16, 8))
        case = plain(bytes.fromhex(CODES[name]), rbx=at, rax=rng.randrange(4), rdx=0)
        case.fx = fx_image(rng, mxcsr(rng), 8)
        area = save_area(rng)
        case.data = (bytes(at - DATA) + area).ljust(DATA_SIZE, b"\0")
        expected, found = host.run(case), xsave_core.run(case)
        vectors.add(expected.vector)
        assert not native.differences(case, expected, found), (name, native.describe(case), native.differences(case, expected, found))
    assert vectors == {COMPLETED, GP}


def test_compacted_form_round_trip(xsave_core):
    """XSAVEC and back: components not requested stay, those not in the area become initial, MXCSR with SSE."""
    rng = generator("compacted")
    for mask in range(4):
        case = plain(bytes.fromhex(CODES["xsavec"]), rbx=DATA, rax=mask)
        case.fx = fx_image(rng, 0x7F80, 8)
        saved = xsave_core.run(case)
        assert struct.unpack_from("<QQ", saved.data, 512) == (mask, mask | 1 << 63)
        restore = plain(bytes.fromhex(CODES["xrstor"]), rbx=DATA, rax=3)
        restore.data = saved.data
        fx = xsave_core.run(restore).fx
        assert fx[160:416] == (case.fx[160:416] if mask & 2 else bytes(256))
        assert fx[24:28] == struct.pack("<I", 0x7F80 if mask & 2 else 0x1F80)
        assert fx[32:42] == (case.fx[32:42] if mask & 1 else bytes(10))


def test_ldmxcsr(host, core):
    for value in [*(1 << i for i in range(32) if i != 17), 0xFFFF, 0x1F80, 0, 0xFFFFFFFF]:
        case = plain(bytes.fromhex(CODES["ldmxcsr"]), rbx=DATA)
        case.data = struct.pack("<I", value).ljust(DATA_SIZE, b"\0")
        compare(host, core, case)


# ---- Checks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cr0", "cr4", "code", "vector"),
    [
        (1 << 2, 0, "0f28c1", UD),  # EM: movaps
        (1 << 3, 0, "0f28c1", NM),  # TS
        (1 << 2 | 1 << 3, 0, "0f28c1", UD),
        (0, 1 << 9, "0f28c1", UD),  # no OSFXSR
        (1 << 3, 1 << 9, "0f28c1", UD),
        (1 << 3, 0, "f20f38f1c1", COMPLETED),  # crc32 is not of the vector unit
        (1 << 3, 0, "0fc303", COMPLETED),  # nor movnti
        (1 << 2, 0, "0fae03", NM),  # fxsave
        (1 << 3, 0, "0fae03", NM),
        (0, 1 << 9, "0fae03", COMPLETED),
        (0, 1 << 18, "0fae23", UD),  # xsave without OSXSAVE
        (0, 1 << 18, "0f01d0", UD),  # xgetbv without OSXSAVE
        (0, 0, "f00fae03", UD),  # lock
        (0, 0, "660fae03", UD),
        (1 << 3, 0, "0faee8", COMPLETED),  # lfence
        (0, 0, "f30f0e", UD),
        (0, 0, "0f3800c1", UD),  # pshufb without 66: MMX registers
    ],
)
def test_checks(cr0, cr4, code, vector, core):
    """Bits of `cr0` set, of `cr4` cleared."""
    if code == "0f3800c1" and any(row["name"] == "PSHUFB" and row["prefix"] == "none" for row in ROWS):
        pytest.skip("the MMX form is there")
    before = core.cpu.get_state("sregs")
    sregs = bytearray(before)
    struct.pack_into("<Q", sregs, CR0, struct.unpack_from("<Q", sregs, CR0)[0] | cr0)
    struct.pack_into("<Q", sregs, CR4, struct.unpack_from("<Q", sregs, CR4)[0] & ~cr4)
    core.cpu.set_state("sregs", bytes(sregs))
    try:
        assert core.run(plain(bytes.fromhex(code), rbx=DATA)).vector == vector
    finally:
        core.cpu.set_state("sregs", before)


def test_without_osxmmexcpt_an_unmasked_exception_is_ud(core):
    before = core.cpu.get_state("sregs")
    sregs = bytearray(before)
    struct.pack_into("<Q", sregs, CR4, struct.unpack_from("<Q", sregs, CR4)[0] & ~(1 << 10))
    case = plain(bytes.fromhex("f20f5ec1"))  # divsd xmm0, xmm1
    fx = bytearray(case.fx)
    struct.pack_into("<I", fx, 24, 0x1F80 & ~(ZE << 7))
    struct.pack_into("<dd", fx, 160, 1.0, 0.0)
    struct.pack_into("<dd", fx, 176, 0.0, 0.0)
    case.fx = bytes(fx)
    assert core.run(case).vector == XM
    core.cpu.set_state("sregs", bytes(sregs))
    try:
        assert core.run(case).vector == UD
    finally:
        core.cpu.set_state("sregs", before)
