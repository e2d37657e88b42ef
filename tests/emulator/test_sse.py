"""SSE to SSE4.2, AES, PCLMULQDQ, SHA against the host CPU: MXCSR in all its states, special values, and the
rows that test_instructions.py leaves out.

VMFS_CASES sets how many cases a row gets (default 40); VMFS_SEED the first random seed.
"""

import struct

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.native import COMPLETED, DATA, DATA_SIZE  # noqa: E402
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

pytestmark = needs("pni", "ssse3", "sse4_1", "sse4_2", "aes", "pclmulqdq", "sha_ni")

ROWS = _core.instructions()
ZE = 4  # in MXCSR
FLOAT = {
    *(name + kind for name in ("SQRT", "ADD", "SUB", "MUL", "DIV", "MIN", "MAX", "CMP", "ROUND") for kind in
      ("PS", "PD", "SS", "SD")),
    "RCPPS", "RCPSS", "RSQRTPS", "RSQRTSS", "HADDPS", "HADDPD", "HSUBPS", "HSUBPD", "ADDSUBPS", "ADDSUBPD",
    "DPPS", "DPPD", "UCOMISS", "UCOMISD", "COMISS", "COMISD", "CVTSI2SS", "CVTSI2SD", "CVTSS2SI", "CVTSD2SI",
    "CVTTSS2SI", "CVTTSD2SI", "CVTSS2SD", "CVTSD2SS", "CVTPS2PD", "CVTPD2PS", "CVTDQ2PD", "CVTDQ2PS",
    "CVTPS2DQ", "CVTTPS2DQ", "CVTPD2DQ", "CVTTPD2DQ",
}
def row_id(row):
    operands = ",".join(operand for operand in row["operands"] if operand)
    return f"{row['name']}-{operands}-{row['mod']}"


# ---- Floating point ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row["name"] in FLOAT and row["map"]], ids=row_id)
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
    if CASES >= 40 and row["name"].startswith(("ADD", "SUB", "MUL", "DIV", "SQRT")):
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


# ---- Rows that need more than a random state ---------------------------------------------------------------


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
                    n = rng.randrange(18)
                    lengths = n, n, -n % 2**64, -n % 2**32, rng.getrandbits(64), 1 << 63, 1 << 31
                    case.gprs[register] = rng.choice(lengths)
            compare(host, core, case)


# ---- Checks ------------------------------------------------------------------------------------------------


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
        (0, 0, "f30f3800c1", UD),  # pshufb has no F3 form
    ],
)
def test_checks(cr0, cr4, code, vector, core):
    """Bits of `cr0` set, of `cr4` cleared."""
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


# ---- Many instructions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["-O1", "-O3 -ffast-math -msse2", "-O3 -mno-red-zone"])
def test_program(flags, host, core, tmp_path):
    """A program of vectorized loops and intrinsics leaves the same data and registers as on the host."""
    compare_program(host, core, compiled("vector_program.c", f"{flags} {VECTORS}", tmp_path))


def test_mxcsr_outlives_a_run_and_stays_inside(core):
    """Rounding and sticky flags are the guest's from run to run, and none of it is the host's."""
    code = bytes.fromhex("0fae13 f30f5ec1 0fae5b08")  # ldmxcsr [rbx]; divss xmm0, xmm1; stmxcsr [rbx + 8]
    case = plain(code, rbx=DATA)
    fx = bytearray(case.fx)
    struct.pack_into("<f", fx, 160, 1.0)
    struct.pack_into("<f", fx, 176, 3.0)
    case.fx, case.data = bytes(fx), struct.pack("<I", 0x5F80).ljust(DATA_SIZE, b"\0")  # up
    core.run(case)
    for _ in range(2):
        assert core.cpu.run(1)[0] == _core.EXIT_LIMIT
        assert 1 / 3 == 0x15555555555555 / 2**54  # to nearest, in Python
    saved = core.cpu.get_state("xsave")
    assert struct.unpack_from("<I", saved, 160)[0] == 0x3EAAAAAB
    assert struct.unpack_from("<I", saved, 24)[0] == 0x5FA0
    assert struct.unpack_from("<I", core.memory[-DATA_SIZE:], 8)[0] == 0x5FA0


def test_device_memory_by_eights():
    """Sixteen bytes of device memory are two exits of eight, and the instruction is done once."""
    core = native.Core()
    device, page = 0x9000_0000, DATA + DATA_SIZE
    struct.pack_into("<Q", core.memory, 0x4000 + (page >> 12 & 511) * 8, device | 7)
    # nop * 8; movups xmm0, [rbx]; movups [rbx + 16], xmm0
    core.run(plain(b"\x90" * 8 + bytes.fromhex("0f1003 0f114310"), rbx=page))
    assert core.cpu.run(7)[0] == _core.EXIT_LIMIT
    for address, value in ((device, 0x1122334455667788), (device + 8, 0x99AABBCCDDEEFF00)):
        exit = core.cpu.run(1)
        assert (exit[0], exit[2], exit[3], exit[5]) == (_core.EXIT_MMIO, False, 8, address)
        core.cpu.access_data = struct.pack("<Q", value)
    assert core.cpu.run(1)[0] == _core.EXIT_LIMIT
    for address, value in ((device + 16, 0x1122334455667788), (device + 24, 0x99AABBCCDDEEFF00)):
        exit = core.cpu.run(1)
        assert (exit[0], exit[2], exit[3], exit[5]) == (_core.EXIT_MMIO, True, 8, address)
        assert core.cpu.access_data == struct.pack("<Q", value)
