"""AVX, AVX2, F16C, FMA, VAES, VPCLMULQDQ, GFNI: what test_instructions.py leaves out, which runs every row with
random operands. MXCSR in all its states, which encodings exist, the checks of the mode, gathers and masked moves that
end early.

VMFS_CASES sets how many cases a row gets (default 40); VMFS_SEED the first random seed.
"""

import random
import struct

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.native import ARITHMETIC, COMPLETED, DATA, DATA_SIZE, PAGE  # noqa: E402
from emulator.sse_lib import (  # noqa: E402
    CASES,
    CR0,
    CR4,
    GP,
    NM,
    PF,
    UD,
    VECTORS,
    XM,
    compare,
    compare_program,
    compiled,
    eight_bytes,
    fx_image,
    generator,
    mxcsr,
    needs,
    plain,
)
from emulator.system_lib import Guest  # noqa: E402
from emulator.test_instructions import CPUINFO, HOST, row_id  # noqa: E402

pytestmark = needs("avx", "avx2", "fma", "f16c")
ROWS = [row for row in _core.instructions() if row["length"] and CPUINFO.get(row["feature"], "avx") in HOST]
FLOAT = ("VADD", "VSUB", "VMUL", "VDIV", "VSQRT", "VMIN", "VMAX", "VCMP", "VROUND", "VRCP", "VRSQRT", "VHADD", "VHSUB",
         "VDPP", "VUCOMI", "VCOMI", "VCVT", "VFM", "VFNM")
OVERFLOWS = ("VADD", "VSUB", "VMUL", "VDIV", "VFM", "VFNM")


def is_float(row):
    return row["name"].startswith(FLOAT)


# ---- Floating point ----------------------------------------------------------------------------------------


def float_case(row, rng):
    """Special values in registers and memory, any MXCSR."""
    case = encode.make_case(row, rng)
    width = 8 if row["w"] == "W1" or row["name"].endswith(("D", "2SI", "PD2PS", "SD2SS")) else 4
    wide = rng.choice((width, width, width, 12 - width))
    case.fx = fx_image(rng, mxcsr(rng), wide)
    case.ymm = b"".join(eight_bytes(rng, wide) for _ in range(32))
    case.data = b"".join(eight_bytes(rng, wide) for _ in range(DATA_SIZE // 64)) * 8
    return case


@pytest.mark.parametrize("row", [row for row in ROWS if is_float(row)], ids=row_id)
def test_float(row, host, core):
    """Results, MXCSR flags, and unmasked exceptions, which leave everything but the flags as it was."""
    rng = generator("vex float", row_id(row))
    vectors = {compare(host, core, float_case(row, rng)).vector for _ in range(CASES)}
    assert COMPLETED in vectors
    if CASES >= 40 and row["name"].startswith(OVERFLOWS):
        assert XM in vectors


def near_limits(rng, width, half=False):
    """Eight bytes of floats whose products and sums lie around the greatest and the least normal number; or of singles
    that do so as 16 bits."""
    if half:
        return struct.pack("<II", *(
            rng.getrandbits(1) << 31
            | (127 + rng.choice((-127, -26, -25, -24, -23, -16, -15, -14, 14, 15, 16, 17))) << 23
            | rng.choice((0, 0x7FE000, 0x7FF000, 0x7FFFFF, 1, 0x1000, rng.getrandbits(10) << 13, rng.getrandbits(23)))
            for _ in range(2)))

    def one(bias, bits):
        exponent = bias + rng.choice((0, bias, bias - 1, -bias + 1, bias // 2, -bias // 2)) + rng.randrange(-3, 4)
        exponent = min(max(exponent, 0), 2 * bias)
        mantissa = rng.choice((0, 1, 1 << bits - 1, (1 << bits) - 1, rng.getrandbits(bits)))
        return (rng.getrandbits(1) * 2 * (bias + 1) + exponent) << bits | mantissa
    if width == 4:
        return struct.pack("<II", one(127, 23), one(127, 23))
    return struct.pack("<Q", one(1023, 52))


@pytest.mark.parametrize(
    "name",
    ["VFM", "VFN", "VMUL", "VADD", "VDIV", "VDPP", "VHADD", "VHSUB", "VADDSUB", "VCVTPS2PH", "VCVTPD2PS"],
)
def test_overflow_and_underflow(name, host, core):
    """Unmasked, whose precision flag is that of a result with an unbounded exponent."""
    rng = generator("limits", name)
    rows = [row for row in ROWS if row["name"].startswith(name)]
    vectors = set()
    for _ in range(CASES * 8):
        row = rng.choice(rows)
        case = encode.make_case(row, rng)
        width = 8 if row["w"] == "W1" or row["name"].endswith(("PD", "SD", "PD2PS")) else 4
        control = mxcsr(rng) & ~(rng.choice((8, 16, 24, 32, 56)) << 7)
        case.fx = fx_image(rng, control, width)
        half = name == "VCVTPS2PH"
        halves = [b"".join(near_limits(rng, width, half) for _ in range(32)) for _ in range(2)]
        case.fx = case.fx[:160] + halves[0] + case.fx[416:]
        case.ymm = halves[1]
        case.data = b"".join(near_limits(rng, width) for _ in range(DATA_SIZE // 64)) * 8
        vectors.add(compare(host, core, case).vector)
    assert {COMPLETED, XM} <= vectors


# ---- Which encodings exist ---------------------------------------------------------------------------------

# By map: what the host may have and the core has not. Mask registers of AVX-512; AMX, AVX-VNNI and its kind, SHA-512,
# SM3, SM4, CMPccXADD; AMX and SM3 again.
FOREIGN = {
    1: {*range(0x41, 0x4C), *range(0x90, 0x9A)},
    2: {0x49, 0x4B, *range(0x50, 0x54), 0x5C, 0x5E, 0x6C, 0x72, 0xB0, 0xB1, 0xB4, 0xB5, 0xCB, 0xCC, 0xCD, 0xD2, 0xD3,
        0xDA, *range(0xE0, 0xF0)},
    3: {*range(0x30, 0x34), 0xDE},
}
IMMEDIATES = {*range(0x70, 0x74), 0xC2, 0xC4, 0xC5, 0xC6}  # opcodes of map 1


def register_form(map_, opcode, pp, long, wide, vvvv, modrm):
    immediate = bytes([0x21]) if map_ == 3 or (map_ == 1 and opcode in IMMEDIATES) else b""
    last = wide << 7 | (~vvvv & 15) << 3 | long << 2 | pp
    code = bytes([0xC4, 0xE0 | map_, last, opcode])
    return code if (map_, opcode) == (1, 0x77) else code + bytes([modrm]) + immediate  # VZEROUPPER


@pytest.mark.parametrize("compat", [False, True], ids=["long", "compat"])
@pytest.mark.parametrize("map_", [1, 2, 3])
def test_which_encodings_exist(map_, compat, host):
    """Each opcode byte with each prefix, length, W, with vvvv 1111 and another, register form: #UD where the host has
    it."""
    rng = generator("exist", map_)
    core = native.Core()
    if compat:
        compat_mode(core)
    here = 0
    for opcode in range(256):
        if opcode in FOREIGN[map_]:
            continue
        for choice in range(32):
            vvvv = choice & 1 and rng.randrange(1, 16)
            modrm = 0xC0 | rng.randrange(8) << 3 | rng.randrange(8)
            code = register_form(map_, opcode, choice >> 1 & 3, choice >> 3 & 1, choice >> 4, vvvv, modrm)
            case = plain(code, rdi=DATA)
            case.ymm, case.undefined = bytes(range(256)), ARITHMETIC if map_ == 2 and opcode >= 0xF0 else 0  # BMI
            expected, found = run_host(host, case, compat), core.run(case)
            if UD in (expected.vector, found.vector) or expected.vector == COMPLETED:
                wrong = native.differences(case, expected, found)
                assert not wrong, f"{native.describe(case)}: {'; '.join(wrong)}"
            here += expected.vector == COMPLETED
    assert here > 100


def run_host(host, case, compat):
    """In compatibility mode R8 to R15 are not the test's."""
    outcome = host.run(case, compat)
    if compat:
        outcome.gprs.update({name: case.gprs[name] for name in native.GPRS[8:]})
    return outcome


def compat_mode(core):
    """Code of 32 bits at CPL 3."""
    sregs = bytearray(core.cpu.get_state("sregs"))
    sregs[17], sregs[19] = 1, 0  # struct kvm_segment of CS: db, l
    core.cpu.set_state("sregs", bytes(sregs))


@pytest.mark.parametrize("prefix", ["66", "f2", "f3", "f0", "48", "40"])
@pytest.mark.parametrize("code", ["c5f458c2", "c4e27519c2", "c5f877", "c4e2f0f2c2"])
def test_prefixes_before_vex(prefix, code, host, core):
    case = plain(bytes.fromhex(prefix + code))
    assert compare(host, core, case).vector == UD


@pytest.mark.parametrize("code", ["642e67c5fc1000", "2ec5fc1003", "6567c5f85803"])
def test_segment_and_address_prefixes_before_vex(code, core):
    case = plain(bytes.fromhex(code), rbx=DATA, rax=DATA)
    assert core.run(case).vector in (COMPLETED, PF)


# ---- The checks of the mode --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cr0", "cr4", "xcr0", "code", "vector"),
    [
        (1 << 3, 0, 7, "c5f458c2", NM),  # TS: vaddps
        (1 << 2, 0, 7, "c5f458c2", COMPLETED),  # EM is nothing to AVX
        (0, 1 << 9, 7, "c5f458c2", COMPLETED),  # nor OSFXSR
        (0, 1 << 18, 7, "c5f458c2", UD),  # no OSXSAVE
        (1 << 3, 1 << 18, 7, "c5f458c2", UD),
        (0, 0, 3, "c5f458c2", UD),  # not enabled in XCR0
        (0, 0, 1, "c5f058c2", UD),
        (1 << 3, 0, 3, "c5f458c2", UD),
        (1 << 3, 0, 7, "c5f877", NM),  # vzeroupper
        (0, 0, 3, "c4e270f2c2", COMPLETED),  # andn is not of the vector unit
        (1 << 3, 1 << 18, 3, "c4e270f2c2", COMPLETED),
    ],
)
def test_checks(cr0, cr4, xcr0, code, vector, core):
    """Bits of `cr0` set, of `cr4` cleared."""
    before, xcrs_before = core.cpu.get_state("sregs"), core.cpu.get_state("xcrs")
    sregs, xcrs = bytearray(before), bytearray(xcrs_before)
    struct.pack_into("<Q", sregs, CR0, struct.unpack_from("<Q", sregs, CR0)[0] | cr0)
    struct.pack_into("<Q", sregs, CR4, struct.unpack_from("<Q", sregs, CR4)[0] & ~cr4)
    struct.pack_into("<Q", xcrs, 16, xcr0)
    core.cpu.set_state("xcrs", bytes(xcrs))
    core.cpu.set_state("sregs", bytes(sregs))
    try:
        assert core.run(plain(bytes.fromhex(code), rbx=DATA)).vector == vector
    finally:
        core.cpu.set_state("sregs", before)
        core.cpu.set_state("xcrs", xcrs_before)


def test_real_mode_has_no_vex():
    """C5 F8 77 is VZEROUPPER in protected mode; in real mode LDS with a register, which is #UD."""
    with Guest("real") as guest:
        assert guest.run(".byte 0xc5, 0xf8, 0x77") == UD


def test_unmasked_without_osxmmexcpt_is_ud(core):
    before = core.cpu.get_state("sregs")
    sregs = bytearray(before)
    struct.pack_into("<Q", sregs, CR4, struct.unpack_from("<Q", sregs, CR4)[0] & ~(1 << 10))
    case = plain(bytes.fromhex("c5fc5ec1"))  # vdivps ymm0, ymm0, ymm1: 0 / 0
    fx = bytearray(case.fx)
    struct.pack_into("<I", fx, 24, 0x1F00)
    fx[160:192] = bytes(32)
    case.fx = bytes(fx)
    assert core.run(case).vector == XM
    core.cpu.set_state("sregs", bytes(sregs))
    try:
        assert core.run(case).vector == UD
    finally:
        core.cpu.set_state("sregs", before)


@pytest.mark.parametrize("bit", [(1, 2, 28), (7, 1, 5), (1, 2, 12), (1, 2, 29)], ids=["AVX", "AVX2", "FMA", "F16C"])
def test_rows_of_a_missing_feature_are_ud(bit):
    """CPUID of a client's choice without the feature, or without AVX and so without all."""
    leaf, register, number = bit
    codes = {(1, 2, 28): ["c5f458c2", "c5f458c2", "c4e2f5a8c2", "c4e27d13c2", "c5f5fec2"], (7, 1, 5): ["c5f5fec2"],
             (1, 2, 12): ["c4e2f5a8c2"], (1, 2, 29): ["c4e27d13c2"]}[bit]
    core = native.Core()
    for code in codes:
        assert core.run(plain(bytes.fromhex(code))).vector == COMPLETED
    cpuid = bytearray(core.cpu.get_state("cpuid"))
    count = struct.unpack_from("<I", cpuid)[0]
    for i in range(count):
        at = 8 + 40 * i
        if struct.unpack_from("<II", cpuid, at) == (leaf, 0):
            where = at + 12 + 4 * register
            struct.pack_into("<I", cpuid, where, struct.unpack_from("<I", cpuid, where)[0] & ~(1 << number))
    core.cpu.set_state("cpuid", bytes(cpuid))
    for code in codes:
        assert core.run(plain(bytes.fromhex(code))).vector == UD


# ---- Masked moves, gathers ---------------------------------------------------------------------------------


def test_vmaskmovdqu(host, core):
    rng = generator("vmaskmovdqu")
    row = next(row for row in ROWS if row["name"] == "VMASKMOVDQU")
    for _ in range(CASES * 4):
        case = encode.make_case(row, rng)
        case.gprs["rdi"] = DATA + rng.randrange(DATA_SIZE - 16)
        case.fx = case.fx[:160] + bytes(rng.choice((0, 0x7F, 0x80, 0xFF)) for _ in range(256)) + case.fx[416:]
        compare(host, core, case)


def masks(rng, size):
    return b"".join(rng.choice((bytes(size), b"\xff" * size, bytes(size - 1) + b"\x80")) for _ in range(32 // size))


@pytest.mark.parametrize("row", [row for row in ROWS if "MASKMOV" in row["name"] and row["mod"] == "mem"], ids=row_id)
def test_masked_moves_at_the_border(row, host, core):
    """Over the end of memory: only what the mask chooses faults."""
    rng = generator("masked", row_id(row))
    size, vectors = 8 if row["w"] == "W1" or row["name"].endswith("PD") else 4, set()
    for _ in range(CASES * 4):
        case = encode.make_case(row, rng)
        last = encode.vex_prefix(row, 8 if row["w"] == "W1" else 2, rng.randrange(16), rng.randrange(2) == 1)[2]
        vvvv, mask = ~last >> 3 & 15, masks(rng, size)
        code = bytes([0xC4, 0xE2, last, row["opcode"], 0x80 | 3])  # [rbx + 0]
        case.code, case.gprs["rbx"] = code + bytes(4), rng.choice((DATA - 16, DATA + DATA_SIZE - 16, DATA + PAGE - 12))
        fx, ymm = bytearray(case.fx), bytearray(case.ymm)
        fx[160 + 16 * vvvv : 176 + 16 * vvvv], ymm[16 * vvvv : 16 * vvvv + 16] = mask[:16], mask[16:]
        case.fx, case.ymm = bytes(fx), bytes(ymm)
        vectors.add(compare(host, core, case).vector)
    assert vectors == {COMPLETED, PF}


def test_gather_goes_on_after_a_fault(core):
    """The elements before the fault are done, their mask bits clear: then the instruction completes with the rest."""
    case = plain(bytes.fromhex("c4e26d900c83"), rbx=DATA)  # vpgatherdd ymm1, [rbx + ymm0 * 4], ymm2
    fx, ymm = bytearray(case.fx), bytearray(256)
    outside = DATA_SIZE // 4
    fx[160:208] = struct.pack("<4i4i4I", 0, 1, outside, 3, *[-1] * 4, *[2**32 - 1] * 4)
    ymm[0:48] = struct.pack("<4i4i4I", 4, 5, 6, 7, *[-1] * 4, *[2**32 - 1] * 4)
    case.fx, case.ymm = bytes(fx), bytes(ymm)
    case.data = struct.pack("<8I", *range(10, 18)).ljust(DATA_SIZE, b"\0")
    found = core.run(case)
    assert found.vector == PF
    assert struct.unpack_from("<4i", found.fx, 176) == (10, 11, -1, -1)
    assert struct.unpack_from("<4I", found.fx, 192) == (0, 0, 2**32 - 1, 2**32 - 1)
    fx[160:176] = struct.pack("<4i", 0, 1, 2, 3)
    fx[176:208] = found.fx[176:208]
    case.fx, case.ymm = bytes(fx), found.ymm
    again = core.run(case)
    assert again.vector == COMPLETED
    assert struct.unpack("<8I", again.fx[176:192] + again.ymm[16:32]) == tuple(range(10, 18))
    assert not any(again.fx[192:208] + again.ymm[32:48])


def test_gather_and_masked_moves_of_device_memory():
    """An exit for each element that the mask chooses; the instruction is done once."""
    core = native.Core()
    device, page = 0x9000_0000, DATA + DATA_SIZE
    struct.pack_into("<Q", core.memory, 0x4000 + (page >> 12 & 511) * 8, device | 7)
    # nop * 8; vpgatherdd xmm1, [rbx + xmm0 * 4], xmm2; vpmaskmovd [rbx], xmm3, xmm1
    case = plain(b"\x90" * 8 + bytes.fromhex("c4e269900c83 c4e2618e0b"), rbx=page)
    fx = bytearray(case.fx)
    fx[160:224] = struct.pack("<16I", 0, 9, 2, 5, *[7] * 4, 2**31, 0, 2**31, 2**31, 0, 2**31, 0, 2**31)
    case.fx = bytes(fx)
    core.run(case)
    assert core.cpu.run(7)[0] == _core.EXIT_LIMIT
    for number, value in ((0, 100), (2, 102), (5, 105)):
        exit = core.cpu.run(1)
        assert (exit[0], exit[2], exit[3], exit[5]) == (_core.EXIT_MMIO, False, 4, device + 4 * number)
        core.cpu.access_data = struct.pack("<I", value)
    assert core.cpu.run(1)[0] == _core.EXIT_LIMIT
    assert struct.unpack_from("<4I", core.cpu.get_state("xsave"), 176) == (100, 7, 102, 105)
    for at, value in ((4, 7), (12, 105)):
        exit = core.cpu.run(1)
        assert (exit[0], exit[2], exit[3], exit[5]) == (_core.EXIT_MMIO, True, 4, device + at)
        assert core.cpu.access_data == struct.pack("<I", value)


def test_thirty_two_bytes_of_device_memory():
    core = native.Core()
    device, page = 0x9000_0000, DATA + DATA_SIZE
    struct.pack_into("<Q", core.memory, 0x4000 + (page >> 12 & 511) * 8, device | 7)
    # nop * 8; vmovups ymm0, [rbx]; vmovups [rbx + 64], ymm0
    core.run(plain(b"\x90" * 8 + bytes.fromhex("c5fc1003 c5fc114340"), rbx=page))
    assert core.cpu.run(7)[0] == _core.EXIT_LIMIT
    for i in range(4):
        exit = core.cpu.run(1)
        assert (exit[0], exit[2], exit[3], exit[5]) == (_core.EXIT_MMIO, False, 8, device + 8 * i)
        core.cpu.access_data = struct.pack("<Q", 1000 + i)
    assert core.cpu.run(1)[0] == _core.EXIT_LIMIT
    for i in range(4):
        exit = core.cpu.run(1)
        assert (exit[0], exit[2], exit[3], exit[5]) == (_core.EXIT_MMIO, True, 8, device + 64 + 8 * i)
        assert core.cpu.access_data == struct.pack("<Q", 1000 + i)


# ---- Many instructions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", ["-O1 -mavx", "-O3 -ffast-math -mavx2 -mfma", "-O3 -mavx2 -mfma -mf16c -mno-vzeroupper"]
)
def test_program(flags, host, core, tmp_path):
    """A program of vectorized loops and intrinsics leaves the same data and registers as on the host."""
    expected = compare_program(host, core, compiled("vector_program.c", f"{VECTORS} {flags}", tmp_path))
    assert core.cpu.get_state("xsave")[576:832] == expected.ymm


def test_random_rows_in_compatibility_mode(host):
    """Eight registers: the top bit of vvvv is ignored, and that of a register in an immediate. VZEROALL clears 8."""
    core = native.Core()
    compat_mode(core)
    rng = generator("compat")
    rows = [row for row in ROWS if encode.testable(row) and row["mod"] != "mem" and row["length"] != "LNONE"]
    done = 0
    for _ in range(CASES * 40):
        row = rng.choice(rows)
        case = encode.make_case(row, random.Random(rng.getrandbits(32)))
        if case.code[0] not in (0xC4, 0xC5):
            continue
        code = bytearray(case.code)
        at = 3 if code[0] == 0xC5 else 4
        code[1] |= 0x80 if code[0] == 0xC5 else 0xE0  # else it is LES or LDS
        if code[0] == 0xC5:
            code[1] |= 0x40
        if row["digit"] >= 0 or row["name"] not in ("VZEROALL", "VZEROUPPER"):
            if code[at] < 0xC0:
                continue
        case.code, case.flags = bytes(code), case.flags & ARITHMETIC
        case.gprs = {name: value % 2**32 if name[1:].isalpha() else 0 for name, value in case.gprs.items()}
        case.fx = case.fx[:160] + case.fx[160:288] * 2 + case.fx[416:]
        expected, found = run_host(host, case, True), core.run(case)
        wrong = native.differences(case, expected, found)
        assert not wrong, f"{native.describe(case)}: {'; '.join(wrong)}"
        done += expected.vector == COMPLETED
    assert done > CASES * 5


def test_alignment(host, core):
    """VMOVAPS and VMOVNTPS ask for the operand's size, other instructions for nothing."""
    for code, size in (("c5f82803", 16), ("c5fc2803", 32), ("c5fc2903", 32), ("c5fc2b03", 32), ("c4e27d2a03", 32)):
        for offset in range(0, 64, 8):
            case = plain(bytes.fromhex(code), rbx=DATA + offset)
            assert compare(host, core, case).vector == (GP if offset % size else COMPLETED)
    for code in ("c5fc5803", "c5fc1003", "c5f5fe03"):
        for offset in (0, 1, 8, 16):
            assert compare(host, core, plain(bytes.fromhex(code), rbx=DATA + offset)).vector == COMPLETED
