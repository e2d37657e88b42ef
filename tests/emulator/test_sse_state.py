"""FXSAVE, XSAVE and their like: against the host CPU where it can be, else by the manual (Intel SDM 1
chapter 13)."""

import struct

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.native import COMPLETED, DATA, DATA_SIZE, PAGE  # noqa: E402
from emulator.sse_lib import (  # noqa: E402
    CASES,
    GP,
    HOST_FLAGS,
    compare,
    eight_bytes,
    fx_image,
    generator,
    mxcsr,
    needs,
    plain,
)

pytestmark = needs("xsave", "xsavec")
CODES = {  # with the operand [rbx]
    "fxsave": "0fae03", "fxsave64": "480fae03", "fxrstor": "0fae0b", "fxrstor64": "480fae0b",
    "xsave": "0fae23", "xsave64": "480fae23", "xrstor": "0fae2b", "xrstor64": "480fae2b",
    "xsaveopt": "0fae33", "xsavec": "0fc723", "xsaves": "0fc72b", "xrstors": "0fc71b",
    "ldmxcsr": "0fae13", "xsetbv": "0f01d1", "xgetbv": "0f01d0",
}
RESERVED = [16, *range(18, 32)]  # bits of MXCSR; 17 is AMD's misaligned mode, which the core does not have


@pytest.fixture
def xsave_core():
    """XCR0: x87 and SSE."""
    core = native.Core()
    xcrs = bytearray(core.cpu.get_state("xcrs"))
    struct.pack_into("<Q", xcrs, 16, 3)
    core.cpu.set_state("xcrs", bytes(xcrs))
    return core


def save_area(rng, *, reserved=True):
    """An area to restore from, sometimes one that must fault."""
    area = bytearray(encode.fx_image(rng)) + bytearray(64)
    bad = 1 << rng.choice(RESERVED) if reserved and rng.randrange(8) == 0 else 0
    struct.pack_into("<I", area, 24, rng.getrandbits(16) | bad)
    struct.pack_into("<Q", area, 512, rng.choice((0, 1, 2, 3, 3, 3)))
    if reserved and rng.randrange(6) == 0:
        at = rng.randrange(515, 536)  # components below 24 may be the host's
        area[at] |= 1 << rng.randrange(8)
    struct.pack_into("<HHB", area, 0, rng.getrandbits(16), rng.getrandbits(16), rng.getrandbits(8))
    for at in range(160, 416, 8):
        area[at : at + 8] = eight_bytes(rng, 8)
    return bytes(area)


@pytest.mark.parametrize("name", ["fxsave", "fxsave64", "xsave", "xsave64", "xsavec"])
def test_save(name, host, xsave_core):
    """The saved bytes, but for x87's pointers and opcode, whose keeping differs between processors."""
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
            more, exact = (struct.unpack_from("<Q", each.data, start)[0] for each in (expected, found))
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
        assert not native.differences(case, expected, found), (name, native.describe(case))
    assert vectors == {COMPLETED, GP}


def test_compacted_form_round_trip(xsave_core):
    """XSAVEC and back: components that the area does not have become initial, MXCSR with SSE."""
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


# ---- What the host cannot show at CPL 3: supervisor instructions, XCR0, other modes -----------------------


def change_segments(core, **fields):
    """Fields of CS and SS in sregs: l, db, dpl, as in struct kvm_segment."""
    offsets = {"dpl": 16, "db": 17, "l": 19}
    sregs = bytearray(core.cpu.get_state("sregs"))
    for segment in (0, 5 * 24):
        for name, value in fields.items():
            if not (name == "l" and segment):
                sregs[segment + offsets[name]] = value
        sregs[segment + 12] = sregs[segment + 12] & ~3 | fields.get("dpl", 3)
    core.cpu.set_state("sregs", bytes(sregs))


@pytest.fixture
def kernel_core(xsave_core):
    """The same at CPL 0."""
    change_segments(xsave_core, dpl=0)
    return xsave_core


def components(core):
    """XCR0."""
    return struct.unpack_from("<Q", core.cpu.get_state("xcrs"), 16)[0]


def run(core, name, **registers):
    """The instruction with its operand at DATA, unless rbx says otherwise, on the memory that is there."""
    case = plain(bytes.fromhex(CODES[name]), **{"rbx": DATA} | registers)
    case.data = core.memory[-DATA_SIZE:]
    return core.run(case)


@pytest.mark.parametrize(
    ("rcx", "value", "vector"),
    [
        (0, 1, COMPLETED), (0, 3, COMPLETED), (0, 0x203, COMPLETED),
        (0, 0, GP), (0, 2, GP), (0, 5, GP), (0, 1 << 62 | 1, GP), (0, 1 << 10 | 3, GP), (1, 3, GP),
    ],
)
def test_xsetbv(rcx, value, vector, kernel_core):
    outcome = run(kernel_core, "xsetbv", rcx=rcx, rax=value % 2**32, rdx=value >> 32)
    assert outcome.vector == vector
    assert components(kernel_core) == (value if vector == COMPLETED else 3)


def test_xgetbv(xsave_core):
    outcome = run(xsave_core, "xgetbv", rax=2**64 - 1, rdx=2**64 - 1)
    assert (outcome.vector, outcome.gprs["rax"], outcome.gprs["rdx"]) == (COMPLETED, 3, 0)
    assert run(xsave_core, "xgetbv", rcx=2).vector == GP


def ymm_core():
    """XCR0: x87, SSE, AVX."""
    core = native.Core()
    set_components(core, 7)
    return core


@pytest.mark.skipif(not {"avx", "xgetbv1"} <= HOST_FLAGS, reason="the host CPU lacks AVX or XGETBV(1)")
@pytest.mark.parametrize("name", ["xgetbv", "xsave", "xsavec", "xsaveopt"])
def test_ymm_is_saved_as_the_host_does(name, host):
    """XINUSE of XGETBV(1); the standard and the compacted form, whole or in part; upper halves that are zero or not."""
    core, rng = ymm_core(), generator("ymm", name)
    for _ in range(CASES):
        at = DATA + PAGE - 64 * rng.randrange(14)
        mask = rng.randrange(8) & rng.choice((4, 6, 7))
        case = plain(bytes.fromhex(CODES[name]), rbx=at, rax=mask, rcx=int(name == "xgetbv"))
        case.fx = fx_image(rng, rng.choice((0x1F80, 0x5F80)), 8)
        if rng.randrange(2):
            case.fx = case.fx[:160] + bytes(256) + case.fx[416:]
        case.ymm = bytes(256) if rng.randrange(2) else rng.randbytes(256)
        if name == "xgetbv":
            expected, found = (outcome.gprs["rax"] & 6 for outcome in (host.run(case), core.run(case)))
            sse = any(case.fx[160:416]) or case.fx[24:28] != struct.pack("<I", 0x1F80)
            assert found == expected == 2 * sse | 4 * any(case.ymm)
            continue
        case.data = rng.randbytes(at - DATA + 512) + bytes(16) + rng.randbytes(DATA_SIZE - (at - DATA) - 528)
        expected, found = host.run(case), core.run(case)
        start = at - DATA
        assert expected.vector == found.vector == COMPLETED
        wanted, got = bytearray(expected.data), bytearray(found.data)
        for data in (wanted, got):  # x87's part differs between processors
            data[start : start + 160] = bytes(160)
            data[start + 512] &= ~1
        if name == "xsaveopt":  # the host may know what it loaded from there
            wanted[start + 160 : start + 832] = got[start + 160 : start + 832]
        assert wanted == got, f"{case.gprs['rax']:#x}"


@pytest.mark.skipif("avx" not in HOST_FLAGS, reason="the host CPU has no AVX")
@pytest.mark.parametrize("compacted", [False, True])
def test_ymm_is_restored_as_the_host_does(compacted, host):
    """Of each set of components: loaded, initialized, left alone."""
    core, rng = ymm_core(), generator("restore ymm", compacted)
    for _ in range(CASES):
        mask = rng.randrange(8) & 6
        case = plain(bytes.fromhex(CODES["xrstor"]), rbx=DATA, rax=mask)
        case.fx, case.ymm = fx_image(rng, 0x1F80, 8), rng.randbytes(256)
        area = bytearray(save_area(rng, reserved=False)) + rng.randbytes(256)
        format = rng.randrange(8) if compacted else 7
        struct.pack_into("<QQ", area, 512, rng.randrange(8) & format, (1 << 63 | format) if compacted else 0)
        case.data = bytes(area).ljust(DATA_SIZE, b"\0")
        expected, found = host.run(case), core.run(case)
        assert expected.vector == found.vector == COMPLETED
        assert found.fx[160:416] == expected.fx[160:416]
        assert found.fx[24:28] == expected.fx[24:28]
        assert found.ymm == expected.ymm


@pytest.mark.parametrize("name", ["xsetbv", "xsaves", "xrstors"])
def test_supervisor_instructions(name, xsave_core):
    assert run(xsave_core, name, rax=3).vector == GP


def test_xsaves_round_trip(kernel_core):
    rng = generator("xsaves")
    case = plain(bytes.fromhex(CODES["xsaves"]), rbx=DATA, rax=3)
    case.fx = fx_image(rng, 0x5F80, 8)
    saved = kernel_core.run(case)
    assert struct.unpack_from("<QQ", saved.data, 512) == (3, 3 | 1 << 63)
    restored = run(kernel_core, "xrstors", rax=3)
    assert restored.vector == COMPLETED
    for start, end in native.FX_COMPARED:
        assert restored.fx[start:end] == case.fx[start:end]


@pytest.mark.skipif("avx" not in HOST_FLAGS, reason="the host CPU has no AVX")
def test_xsaves_and_xrstors_have_the_upper_halves():
    """At CPL 0, where the host does not let us: as XSAVEC does it, which the host was asked of (SDM 1 13.11, 13.12)."""
    core = ymm_core()
    change_segments(core, dpl=0)
    rng = generator("xsaves ymm")
    for mask in (4, 6, 7):
        case = plain(bytes.fromhex(CODES["xsaves"]), rbx=DATA, rax=mask)
        case.fx, case.ymm = fx_image(rng, 0x1F80, 8), rng.randbytes(256)
        saved = core.run(case)
        compacted = plain(bytes.fromhex(CODES["xsavec"]), rbx=DATA, rax=mask)
        compacted.fx, compacted.ymm = case.fx, case.ymm
        assert saved.vector == COMPLETED and core.run(compacted).data == saved.data
        assert struct.unpack_from("<QQ", saved.data, 512) == (mask, mask | 1 << 63)
        assert saved.data[576 : 576 + 256] == case.ymm
        again = plain(bytes.fromhex(CODES["xrstors"]), rbx=DATA, rax=mask)
        again.fx, again.ymm, again.data = fx_image(rng, 0x1F80, 8), rng.randbytes(256), saved.data
        restored = core.run(again)
        assert restored.vector == COMPLETED and restored.ymm == case.ymm


def test_xrstors_takes_only_the_compacted_form(kernel_core):
    run(kernel_core, "xsave", rax=3)
    assert run(kernel_core, "xrstor", rax=3).vector == COMPLETED
    assert run(kernel_core, "xrstors", rax=3).vector == GP


def test_xsaveopt_leaves_initial_components_out(xsave_core):
    case = plain(bytes.fromhex(CODES["xsaveopt"]), rbx=DATA, rax=3)
    case.fx = case.fx[:160] + bytes(256) + case.fx[416:]
    case.data = b"\xaa" * DATA_SIZE
    saved = xsave_core.run(case)
    assert struct.unpack_from("<Q", saved.data, 512)[0] & 3 == 1
    assert saved.data[160:416] == b"\xaa" * 256
    assert saved.data[:5] == case.fx[:5]


def set_components(core, value):
    xcrs = bytearray(core.cpu.get_state("xcrs"))
    struct.pack_into("<Q", xcrs, 16, value)
    core.cpu.set_state("xcrs", bytes(xcrs))


def test_pkru_component(kernel_core):
    """At offset 2688; in the compacted form directly after the header."""
    core = kernel_core
    set_components(core, 0x203)
    for name, at in (("xsave", 2688), ("xsavec", 576)):
        core.memory[-DATA_SIZE:] = bytes(DATA_SIZE)
        case = plain(bytes.fromhex(CODES["xrstor"]), rbx=DATA, rax=0x200)
        case.data = bytearray(DATA_SIZE)
        struct.pack_into("<Q", case.data, 512, 0x200)
        struct.pack_into("<Q", case.data, 2688, 0xC)  # key 1: no access, no write
        assert core.run(case).vector == COMPLETED
        # Core.run sets all state anew, so keep the register for the next one by hand
        xsave = core.cpu.get_state("xsave")
        assert struct.unpack_from("<Q", xsave, 2688)[0] == 0xC
        core.cpu.set_state("regs", regs(CODES[name], core, rbx=DATA, rax=0x200))
        assert core.cpu.run(1)[0] == _core.EXIT_LIMIT
        data = core.memory[-DATA_SIZE:]
        assert struct.unpack_from("<Q", data, 512)[0] & 0x200
        assert struct.unpack_from("<Q", data, at)[0] == 0xC


def regs(code, core, **registers):
    """The bytes of the regs state, with the code in memory."""
    at = native.START - native.CODE + 0x10000
    core.memory[at : at + 16] = bytes.fromhex(code).ljust(16, b"\xcc")
    values = [registers.get(name, 0) for name in native.KVM_ORDER]
    return struct.pack("<18Q", *values, native.START, 0x202)


def test_fxsave_outside_of_64_bit_mode(xsave_core):
    """Eight XMM registers; the rest of the area stays. REX.W does not exist."""
    change_segments(xsave_core, l=0, db=1)
    case = plain(bytes.fromhex(CODES["fxsave"]), rbx=DATA)
    case.data = b"\xaa" * DATA_SIZE
    saved = xsave_core.run(case)
    assert saved.vector == COMPLETED
    assert saved.data[160:288] == case.fx[160:288]
    assert saved.data[288:] == b"\xaa" * (DATA_SIZE - 288)
    restore = plain(bytes.fromhex(CODES["fxrstor"]), rbx=DATA)
    restore.data = bytes(24) + struct.pack("<II", 0x1F80, 0) + bytes(DATA_SIZE - 32)
    fx = xsave_core.run(restore).fx
    assert fx[160:288] == bytes(128)
    assert fx[288:416] == restore.fx[288:416]


@pytest.mark.parametrize("name", ["fxsave", "xsave", "xsavec", "fxrstor", "xrstor"])
def test_a_fault_in_the_area_changes_nothing(name, xsave_core):
    """The second page of the area is not mapped."""
    case = plain(bytes.fromhex(CODES[name]), rbx=DATA + DATA_SIZE - 256, rax=3)
    case.data = b"\x11" * DATA_SIZE
    found = xsave_core.run(case)
    assert found.vector == 14
    assert found.data == case.data
    for start, end in native.FX_COMPARED:
        assert found.fx[start:end] == case.fx[start:end]
