"""Integer instructions where a random comparison with the host would not look: undefined encodings, counts
whose result makers differ in, random numbers."""

import platform
import random
import shutil
import struct

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.native import DATA, GPRS, START, Case  # noqa: E402

needs_host = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("gcc"),
    reason="the oracle is an x86-64 host CPU, through gcc",
)


def make_case(code: str, **gprs: int) -> Case:
    rng = random.Random(code)
    registers = {name: DATA + 64 for name in GPRS} | gprs
    return Case(code=bytes.fromhex(code), gprs=registers, flags=0, data=rng.randbytes(native.DATA_SIZE),
                fx=encode.fx_image(rng), ip=START, name=code)


UNDEFINED = {
    "lock shl [rax], 1": "f0d120",
    "lock rol [rax], cl": "f0d300",
    "lock shld [rax], ebx, cl": "f00fa518",
    "lock bt [rax], ebx": "f00fa318",
    "lock bt [rax], 1": "f00fba2001",
    "lock bts eax, ebx": "f00fabd8",
    "lock bts eax, 1": "f00fbae801",
    "lock mul [rax]": "f0f720",
    "lock movsb": "f0a4",
    "lock rep stosb": "f0f3aa",
    "lock cdq": "f099",
    "lock cmpxchg8b with a register": "f00fc7c8",
    "cmpxchg8b with a register": "0fc7c8",
    "bt group /0": "0fba0001",
    "bt group /3": "0fba1801",
    "movbe with registers": "0f38f0c3",
    "andn with VEX.L": "c4e264f2c3",
    "66 andn": "66c4e260f2c3",
    "f3 andn": "f3c4e260f2c3",
    "f2 andn": "f2c4e260f2c3",
    "lock andn": "f0c4e260f2c3",
    "rex andn": "48c4e260f2c3",
    "rorx with vvvv": "c4e373f0c307",
    "rorx with VEX.L": "c4e37ff0c307",
    "rorx without F2": "c4e378f0c307",
    "bls group /0": "c4e278f3c3",
    "bls group /4": "c4e278f3e3",
    "VEX map 0": "c4e078f2c3",
    "VEX map 31": "c4ff78f2c3",
    "mulx without VEX": "f20f38f6c3",
    "pext without VEX": "f30f38f5c3",
}


@needs_host
@pytest.mark.parametrize("code", UNDEFINED.values(), ids=UNDEFINED.keys())
def test_undefined_encodings(code, host, core):
    """#UD on the host and on the core, with nothing changed."""
    case = make_case(code)
    expected = host.run(case)
    assert expected.vector == 6
    assert not native.differences(case, expected, core.run(case))


DEFINED = {
    "lock bts [rax], ebx": "f00fab18",
    "lock cmpxchg8b [rax]": "f00fc708",
    "lock cmpxchg16b [rax]": "f0480fc708",
    "andn eax, ebx, ecx": "c4e260f2c1",
    "andn rax, r15, [rdx + 8]": "c4e280f24208",
    "67 andn eax, ebx, [edx]": "67c4e260f202",
    "rorx rax, [rip + ...], 9": "c4e3fbf005f0ff000009",  # a displacement and an immediate
    "f2 bsf eax, ebx": "f20fbcc3",
    "f2 lzcnt is bsr": "f20fbdc3",
    "66 f3 tzcnt ax, bx": "66f30fbcc3",
    "rep bswap eax": "f30fc8",
    "rex.w cmpxchg8b, address not of 16": "480fc74808",
    "cwde after two prefixes": "6666664898",
}


@needs_host
@pytest.mark.parametrize("code", DEFINED.values(), ids=DEFINED.keys())
def test_rare_encodings(code, host, core):
    case = make_case(code)
    case.undefined = native.ARITHMETIC
    wrong = native.differences(case, host.run(case), core.run(case))
    assert not wrong, wrong


# 16-bit double shifts by more than 16: undefined in the manual. As Intel does: bits of a, b, a in one row.
def test_shld_16_by_more_than_16(core):
    got = core.run(make_case("660fa4d814", rax=0x1234, rbx=0xABCD))  # shld ax, bx, 20
    assert got.gprs["rax"] == 0xBCD1
    assert got.flags & native.CF == 0  # the last bit that left: bit 12 of ABCD


def test_shrd_16_by_more_than_16(core):
    got = core.run(make_case("660facd814", rax=0x1234, rbx=0xABCD))  # shrd ax, bx, 20
    assert got.gprs["rax"] == 0x4ABC
    assert got.flags & native.CF == native.CF  # bit 3 of ABCD


def rdrand_numbers(core, count: int) -> list[int]:
    numbers = []
    core.load(make_case("480fc7f0" * count, rax=0))
    for _ in range(count):
        exit = core.cpu.run(1)
        assert exit[0] == _core.EXIT_LIMIT
        regs = struct.unpack("<18Q", core.cpu.get_state("regs"))
        assert regs[17] & native.ARITHMETIC == native.CF
        numbers.append(regs[0])
    return numbers


def test_random_numbers_follow_the_instructions():
    """Deterministic time: a run gives the numbers that the same run gave, all different, bits evenly set."""
    first, second = (rdrand_numbers(native.Core(), 64) for _ in range(2))
    assert first == second
    assert len(set(first)) == 64
    assert 0.4 < sum(number.bit_count() for number in first) / (64 * 64) < 0.6


def test_random_numbers_of_the_host_differ():
    cores = [native.Core(), native.Core()]
    for core in cores:
        core.vm.set_host_time(True)
    assert rdrand_numbers(cores[0], 4) != rdrand_numbers(cores[1], 4)


def test_rdrand_writes_its_size(core):
    ones = 2**64 - 1
    assert core.run(make_case("660fc7f0", rax=ones)).gprs["rax"] >> 16 == ones >> 16
    assert core.run(make_case("0fc7f8", rax=ones)).gprs["rax"] >> 32 == 0  # rdseed eax


@pytest.mark.parametrize(("code", "size"), [("666303", 2), ("6303", 4), ("486303", 4), ("66486303", 4)])
def test_movsxd_reads_its_operand_and_no_more(code, size, core):
    """With operand size 16 that is 16 bits (SDM 2B MOVSX): at the end of what is mapped there is no more."""
    case = make_case(code, rbx=DATA + native.DATA_SIZE - size, rax=0)
    found = core.run(case)
    value = int.from_bytes(case.data[-size:], "little", signed=True)
    width = 2 if size == 2 else 8 if "48" in code else 4
    assert (found.vector, found.gprs["rax"]) == (native.COMPLETED, value % 256**width)
    case.gprs["rbx"] += 1
    assert core.run(case).vector == 14
