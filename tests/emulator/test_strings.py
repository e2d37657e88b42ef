"""String instructions with and without REP, against the host CPU: sizes of elements and addresses, both
directions, overlap, faults in the middle; and that an iteration is one instruction for the budget. 16-bit
addresses, which the host cannot run here, by the manual."""

import mmap
import os
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
# lea r8, [r8 + 1]; lea r9, [r9 + 1]: so that it is in the middle of a trace, and its flags are seen.
BEFORE, AFTER = b"\x4d\x8d\x40\x01", b"\x4d\x8d\x49\x01"


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
        code=BEFORE + code + AFTER, gprs=gprs, flags=rng.getrandbits(32) & ARITHMETIC | rng.choice((0, DF)),
        data=bytes(data), fx=encode.fx_image(rng), ip=START,
        name=f"rep{rep.hex()} {name}{size * 8} a{32 if short else 64}",
    )


def iterations(case: Case, outcome: native.Outcome) -> int:
    """Instructions that the case retired: the two LEAs and one an iteration; those after a fault did not."""
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
                assert exit[0] == _core.EXIT_LIMIT, f"{native.describe(case)}: {exit}, not {total}"
                exit = core.cpu.run(1)
            found = core.outcome(case, exit)
            wrong = native.differences(case, expected, found)
            assert not wrong, f"{native.describe(case)}: {slices}: {'; '.join(wrong)}"
    assert outcomes >= {native.COMPLETED, 14}


def test_each_iteration_is_a_step(core):
    """With a budget of one at a time: rip stays, the count falls; after the last iteration rip moves on."""
    case = string_case("movs", random.Random(0))
    case.code, case.flags = b"\xf3\xa4", 0
    case.gprs |= {"rsi": DATA, "rdi": DATA + PAGE - 2, "rcx": 5}
    core.load(case)
    for left in (4, 3, 2, 1, 0):
        found = core.outcome(case, core.cpu.run(1))
        done, gprs = 5 - left, found.gprs
        assert (gprs["rcx"], gprs["rsi"], gprs["rdi"]) == (left, DATA + done, DATA + PAGE - 2 + done)
        assert found.ip == (START if left else START + 2)
    assert found.data[PAGE - 2 : PAGE + 3] == case.data[:5]


def test_a_trap_comes_after_each_iteration(core):
    """EFLAGS.TF: #DB with rip at the instruction until the last iteration, as the manual has it (2B REP)."""
    case = string_case("stos", random.Random(0))
    case.code, case.flags = b"\xf3\xaa", native.TF
    case.gprs |= {"rdi": DATA, "rcx": 3}
    core.load(case)
    exit = core.cpu.run(10)  # there is no IDT to take it
    regs = struct.unpack("<18Q", core.cpu.get_state("regs"))
    assert exit[0] != _core.EXIT_LIMIT
    assert (regs[2], regs[16]) == (2, START)


# ---- Real mode ------------------------------------------------------------------------------------------

KVM = {name: at for at, name in enumerate(native.KVM_ORDER)}


class RealMachine:
    """1 MiB of memory; code at 0:7C00, DS at 1000:, ES at 2000:, SS at 3000:."""

    def __init__(self) -> None:
        self.vm = _core.Vm()
        fd = os.memfd_create("real")
        os.ftruncate(fd, 1 << 20)
        self.memory = mmap.mmap(fd, 1 << 20)
        self.vm.map(0, 0, fd, 0, 1 << 20)
        os.close(fd)
        self.cpu = self.vm.create_vcpu(0)
        sregs = bytearray(self.cpu.get_state("sregs"))
        for at, selector in enumerate((0, 0x1000, 0x2000, 0, 0, 0x3000)):  # cs ds es fs gs ss, 24 bytes each
            struct.pack_into("<Q", sregs, 24 * at, selector << 4)
            struct.pack_into("<H", sregs, 24 * at + 12, selector)
        self.cpu.set_state("sregs", bytes(sregs))
        self.cpu.set_debug(False, [(_core.STOP_VECTOR, vector, vector, 0, 0, 0) for vector in range(32)])

    def run(self, code: bytes, budget: int, flags: int = 0, **gprs: int) -> dict[str, int]:
        """Run `budget` instructions: the registers, rip and the exception (-1: none)."""
        self.memory[0x7C00 : 0x7C00 + len(code)] = code
        regs = [0] * 16
        for name, value in gprs.items():
            regs[KVM[name]] = value
        self.cpu.set_state("regs", struct.pack("<18Q", *regs, 0x7C00, flags | 2))
        exit = self.cpu.run(budget)
        assert exit[0] in (_core.EXIT_LIMIT, _core.EXIT_DEBUG), exit
        values = struct.unpack("<18Q", self.cpu.get_state("regs"))
        found = {name: values[at] for name, at in KVM.items()}
        return found | {"rip": values[16], "vector": exit[8] if exit[0] == _core.EXIT_DEBUG else -1}


@pytest.fixture
def real():
    machine = RealMachine()
    machine.memory[0x10000:0x20000] = random.Random(7).randbytes(0x10000)
    yield machine
    machine.vm.close()


def test_16_bit_addresses_wrap(real):
    """rep movsb past FFFF goes on at 0 of the same segment, and the high halves of the registers stay."""
    high = 0x55550000
    got = real.run(b"\xf3\xa4", 32, rsi=high | 0xFFF0, rdi=high | 0xFFFC, rcx=high | 32)
    assert (got["rsi"], got["rdi"], got["rcx"]) == (high | 0x10, high | 0x1C, high)
    source = real.memory[0x1FFF0:0x20000] + real.memory[0x10000:0x10010]
    # ES starts where DS ends, so nothing that is copied was written before
    assert real.memory[0x2FFFC:0x30000] + real.memory[0x20000:0x2001C] == source
    assert got["rip"] == 0x7C02


def test_downwards_wraps_too(real):
    got = real.run(b"\xf3\xaa", 8, flags=DF, rax=0xAB, rdi=3, rcx=8)
    assert got["rdi"] == 0xFFFB and not got["rcx"]
    assert real.memory[0x20000:0x20004] == real.memory[0x2FFFC:0x30000] == b"\xab" * 4


def test_an_element_over_the_limit_faults_exactly_there(real):
    """rep movsw: a word at FFFF is beyond the limit. What was done is done; the registers say where."""
    got = real.run(b"\xf3\xa5", 100, rsi=0x100, rdi=0xFFFB, rcx=20)
    assert got["vector"] == 13
    assert (got["rsi"], got["rdi"], got["rcx"], got["rip"]) == (0x104, 0xFFFF, 18, 0x7C00)
    assert real.memory[0x2FFFB:0x2FFFF] == real.memory[0x10100:0x10104]


def test_the_source_has_a_segment_override_and_the_target_has_not(real):
    real.memory[0x30010:0x30014] = b"abcd"
    code = b"\x36\xf3\xa4\x36\xaa"  # ss rep movsb; ss stosb
    got = real.run(code, 5, rsi=0x10, rdi=0x20, rcx=4, rax=ord("e"))
    assert real.memory[0x20020:0x20025] == b"abcde" and got["rip"] == 0x7C05


def test_32_bit_addresses_stop_at_the_limit(real):
    """67: ESI is used whole, and 64 KiB is the limit."""
    got = real.run(b"\x67\xf3\xac", 100, rsi=0xFFFE, rcx=10)
    assert (got["vector"], got["rsi"], got["rcx"]) == (13, 0x10000, 8)


def test_code_that_a_repetition_overwrites_is_seen(real):
    """rep stosb over the instructions after it, in a page that has decoded code: INC AX becomes INC DX."""
    real.run(b"\x40\x40\x40", 3)  # decoded once
    sregs = bytearray(real.cpu.get_state("sregs"))
    struct.pack_into("<Q", sregs, 48, 0)  # ES = 0
    struct.pack_into("<H", sregs, 60, 0)
    real.cpu.set_state("sregs", bytes(sregs))
    got = real.run(b"\xf3\xaa\x40\x40\x40", 6, rdi=0x7C02, rcx=3, rax=0x42)  # INC DX three times
    assert (got["rdx"], got["rax"], got["rip"]) == (3, 0x42, 0x7C05)


def test_a_breakpoint_stops_once_at_a_repetition(real):
    """The core looks around in the middle of the repetition, and does not stop there again."""
    # loop $; not cx; rep lodsb; nop
    code = b"\xe2\xfe\xf7\xd1\xf3\xac\x90"
    at = 0x7C04
    real.memory[0x7C00 : 0x7C00 + len(code)] = code
    stops = [(_core.STOP_BREAKPOINT, 1, at, 0, 0, 0), (_core.STOP_BREAKPOINT, 2, at + 2, 0, 0, 0)]
    real.cpu.set_debug(False, stops)
    regs = [0] * 16
    regs[KVM["rcx"]] = 60000
    real.cpu.set_state("regs", struct.pack("<18Q", *regs, 0x7C00, 2))
    seen = []
    for _ in range(2):
        exit = real.cpu.run()
        regs = struct.unpack("<18Q", real.cpu.get_state("regs"))
        seen.append((exit[0], regs[16], regs[KVM["rcx"]]))
    assert seen == [(_core.EXIT_DEBUG, at, 0xFFFF), (_core.EXIT_DEBUG, at + 2, 0)]
    assert real.cpu.counters()["instructions"] == 60000 + 1 + 0xFFFF


def test_steps_go_through_a_repetition(real):
    real.cpu.set_debug(True, [])
    for left in (2, 1, 0):
        got = real.run(b"\xf3\xaa", 10, rcx=left + 1)
        assert got["rcx"] == left and got["rip"] == (0x7C00 if left else 0x7C02)
