"""String instructions with and without REP, against the host CPU: sizes of elements and addresses, both directions, overlap,
faults in the middle; and that an iteration is one instruction for the budget."""

import platform
import random
import shutil
import struct

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.native import ARITHMETIC, DATA, DATA_SIZE, DF, GPRS, PAGE, START, Case  # noqa: E402

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the oracle is an x86-64 host CPU"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the oracle is compiled"),
]

CASES = 150
OPCODES = {"movs": 0xA4, "cmps": 0xA6, "stos": 0xAA, "lods": 0xAC, "scas": 0xAE}
BEFORE, AFTER = b"\x49\xff\xc0", b"\x49\xff\xc1"  # inc r8; inc r9: so that it is in the middle of a trace


def string_case(name: str, rng: random.Random) -> Case:
    size = rng.choice((1, 2, 4, 8))
    short = rng.randrange(4) == 0
    rep = rng.choice((b"", b"\xf2", b"\xf3", b"\xf3"))
    prefixes = [rep] + [b"\x67"] * short + [b"\x66"] * (size == 2) + [b"\x2e"] * (rng.randrange(8) == 0)
    rng.shuffle(prefixes)
    code = b"".join(prefixes) + b"\x48" * (size == 8) + bytes([OPCODES[name] + (size > 1)])
    gprs = {register: encode.value(rng) for register in GPRS}
    gprs["rsi"], gprs["rdi"] = (encode.operand_target(rng, size) for _ in range(2))
    if rng.randrange(3) == 0:  # overlap
        gprs["rdi"] = gprs["rsi"] + rng.choice((-1, 1)) * rng.choice((0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 24, 100))
    gprs["rcx"] = rng.choice((0, 1, 2, rng.randrange(40), rng.randrange(3 * PAGE // size)))
    if short:
        for register in ("rsi", "rdi", "rcx"):
            gprs[register] |= rng.getrandbits(32) << 32
    if rng.randrange(2):  # long runs of equal elements
        data = bytearray(rng.getrandbits(8) for _ in range(size)) * (DATA_SIZE // size)
        for _ in range(rng.randrange(3)):
            data[rng.randrange(DATA_SIZE)] ^= rng.getrandbits(8)
        gprs["rax"] = struct.unpack_from("<Q", data)[0] ^ rng.choice((0, 1))
    else:
        data = bytearray(rng.randbytes(DATA_SIZE))
    return Case(
        code=BEFORE + code + AFTER, gprs=gprs, flags=rng.getrandbits(32) & ARITHMETIC | rng.choice((0, DF)), data=bytes(data),
        fx=encode.fx_image(rng), ip=START, name=f"rep{rep.hex()} {name}{size * 8} a{32 if short else 64}",
    )


def iterations(case: Case, outcome: native.Outcome) -> int:
    """Instructions that the case retired: the two INCs and one an iteration; those behind a fault did not."""
    moved = (case.gprs["rcx"] - outcome.gprs["rcx"]) % 2**32
    if outcome.vector != native.COMPLETED:
        return 1 + moved
    return 2 + max(moved, 1)


@pytest.mark.parametrize("name", OPCODES)
def test_as_the_host(name, host, core):
    rng = random.Random(name)
    outcomes = set()
    for _ in range(CASES):
        case = string_case(name, rng)
        expected = host.run(case)
        outcomes.add(expected.vector)
        total = iterations(case, expected)
        for slices in ([total], [rng.randrange(1, total + 1), total]):  # at once; in two parts
            core.load(case)
            done, exit = 0, None
            for limit in slices:
                if limit - done:
                    exit = core.cpu.run(limit - done)
                    done = limit
            if expected.vector != native.COMPLETED:
                assert exit[0] == _core.EXIT_LIMIT, f"{native.describe(case)}: {exit}, not {total} instructions"
                exit = core.cpu.run(1)
            found = core.outcome(case, exit)
            wrong = native.differences(case, expected, found)
            assert not wrong, f"{native.describe(case)}: {slices}: {'; '.join(wrong)}"
    assert outcomes >= {native.COMPLETED, 14}


def test_each_iteration_is_a_step(core):
    """With a budget of one at a time: rip stays, the count falls; behind the last iteration rip moves on."""
    case = string_case("movs", random.Random(0))
    case.code, case.flags = b"\xf3\xa4", 0
    case.gprs |= {"rsi": DATA, "rdi": DATA + PAGE - 2, "rcx": 5}
    core.load(case)
    for left in (4, 3, 2, 1, 0):
        found = core.outcome(case, core.cpu.run(1))
        done = 5 - left
        assert (found.gprs["rcx"], found.gprs["rsi"], found.gprs["rdi"]) == (left, DATA + done, DATA + PAGE - 2 + done)
        assert found.ip == (START if left else START + 2)
    assert found.data[PAGE - 2 : PAGE + 3] == case.data[:5]


def test_a_trap_comes_behind_each_iteration(core):
    """EFLAGS.TF: #DB with rip at the instruction until the last iteration, as the manual has it (2B REP)."""
    case = string_case("stos", random.Random(0))
    case.code, case.flags = b"\xf3\xaa", native.TF
    case.gprs |= {"rdi": DATA, "rcx": 3}
    core.load(case)
    exit = core.cpu.run(10)  # there is no IDT to take it
    regs = struct.unpack("<18Q", core.cpu.get_state("regs"))
    assert exit[0] != _core.EXIT_LIMIT
    assert (regs[2], regs[16]) == (2, START)
