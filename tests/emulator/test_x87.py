"""The x87 against the host CPU: every row from any state of the unit, random programs, and what modes and control
registers do.

VMFS_CASES scales the number of cases (default 40); VMFS_SEED the first random seed.
"""

import platform
import shutil
import struct

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.native import COMPLETED, DATA, DATA_SIZE, GPRS, START, Case  # noqa: E402
from emulator.x87_lib import (  # noqa: E402
    CASES,
    MF,
    NM,
    PF,
    UD,
    compare,
    describe,
    fx_image,
    generator,
    memory,
    plain,
)

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the oracle is an x86-64 host CPU"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the oracle is compiled"),
]
ALL_ROWS = _core.instructions()
ROWS = [row for row in ALL_ROWS if row["opcode"] >> 3 == 0x1B and row["map"] == ""]
MMX_ROWS = [row for row in ALL_ROWS if "MMX" in row["attributes"] and "NOTEST" not in row["attributes"]]
KINDS = ("real32", "real64", "real80", "decimal", "integer")
OPERANDS = {"Md": "real32", "Mq": "real64", "Mt": "real80"}
CR0 = 8 * 24 + 2 * 16  # in struct kvm_sregs
MP, EM, TS, NE = 2, 4, 8, 32
PENDING = bytes.fromhex("7b0384b8")  # control word without ZM, status word with ZE and ES, TOP 7


class HostLikeCore(native.Core):
    """With the selectors that Linux gives a 64-bit program (or, `compat`, a 32-bit one), which FNSTENV stores."""

    def __init__(self, compat=False):
        super().__init__()
        sregs = bytearray(native.user_sregs(0x1000))
        data = 0x2B if compat else 0
        for segment, selector in enumerate((0x23 if compat else 0x33, data, data, 0, 0, 0x2B)):
            struct.pack_into("<H", sregs, 24 * segment + 12, selector)
        if compat:
            sregs[17], sregs[19] = 1, 0  # CS.D, CS.L
        self.cpu.set_state("sregs", bytes(sregs))


@pytest.fixture(scope="module")
def core():
    return HostLikeCore()


@pytest.fixture(scope="module")
def compat_core():
    return HostLikeCore(compat=True)


def row_id(row):
    return f"{row['name']}-{row['opcode']:02X}-{row['digit']}-{row['mod']}"


def kinds(row):
    if row["name"].startswith(("FI", "FB", "FN")):
        return ("decimal",) if row["name"] == "FBLD" else ("integer",)
    return [OPERANDS[name] for name in row["operands"] if name in OPERANDS] or KINDS


# ---- Against the host --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_row(row, host, core):
    """Special operands, every control word, stacks full, empty and mixed, exceptions unmasked and pending."""
    rng = generator("x87", row_id(row))
    completed = 0
    for _ in range(max(CASES // 3, 1)):
        case = encode.make_case(row, rng)
        case.fx, case.data = fx_image(rng), memory(rng, kinds(row))
        completed += compare(host, core, case).vector == COMPLETED
    assert completed


def test_all_encodings_are_decided(host, core):
    """Each of the pairs D8 C0 to DF FF, and each memory form: an instruction here where it is one on the host."""
    codes = [bytes([first, second]) for first in range(0xD8, 0xE0) for second in range(0xC0, 0x100)]
    codes += [bytes([first, digit << 3 | 3]) for first in range(0xD8, 0xE0) for digit in range(8)]
    undefined = 0
    for code in codes:
        undefined += compare(host, core, plain(code)).vector == UD
    assert undefined > 50


def instruction(row, rng, avoid=(3, 4)):
    """An encoding with operands in the data area by RBX; RBX and RSP are not written."""
    prefix = {"66": b"\x66", "F3": b"\xf3", "F2": b"\xf2"}.get(row["prefix"], b"")
    general = any(name[:1] in ("E", "G") for name in row["operands"])
    registers = [n for n in range(8) if not (general and n in avoid)]
    reg = row["digit"] if row["digit"] >= 0 else rng.choice(registers)
    if not encode.has_modrm(row):
        modrm = b""
    elif row["mod"] == "mem" or (row["mod"] == "rm" and rng.randrange(2)):
        modrm = bytes([0x83 | reg << 3]) + struct.pack("<i", rng.randrange(0, DATA_SIZE - 256, 16))
    else:
        modrm = bytes([0xC0 | reg << 3 | (int(row["mod"][3]) if row["mod"][3:] else rng.choice(registers))])
    immediate = bytes([rng.getrandbits(8)]) if "Ib" in row["operands"] else b""
    return prefix + bytes.fromhex(row["map"]) + bytes([row["opcode"]]) + modrm + immediate


def program(rng, length):
    """Code and its number of instructions: a random state by FRSTOR, then any x87 and MMX instructions."""
    code = [bytes.fromhex("dbe3"), bytes.fromhex("dd23")]
    for _ in range(length):
        kind = rng.randrange(20)
        if kind < 14:
            code.append(instruction(rng.choice(ROWS), rng))
        elif kind < 17:
            code.append(instruction(rng.choice(MMX_ROWS), rng))
        elif kind == 17:
            code.append(b"\x9b")
        elif kind == 18:  # FNSTENV, whose image has pointers and opcode of the instruction before
            code.append(bytes.fromhex("d9b3") + struct.pack("<i", rng.randrange(0, DATA_SIZE - 256, 16)))
        else:  # ADDPS, DIVPS: an unmasked exception of these borrows the host's x87
            code.append(bytes([0x0F, rng.choice((0x58, 0x5E)), 0xC0 | rng.randrange(64)]))
    return code


def program_case(rng, length):
    code = program(rng, length)
    data = bytearray(memory(rng, KINDS))
    fx = bytearray(fx_image(rng))
    masked = rng.randrange(3)
    struct.pack_into("<HHHHHH", data, 0, struct.unpack_from("<H", fx)[0] | (0x3F if masked else 0), 0xFFFF, 0, 0xFFFF,
                     rng.choice((0, 0, 0x5555, rng.getrandbits(16))), 0xFFFF)
    if masked:
        for at in range(16, DATA_SIZE, 16):  # for FLDCW and FLDENV
            data[at] |= 0x3F
    struct.pack_into("<I", fx, 24, 0x1F80 if rng.randrange(3) else rng.getrandbits(16))
    case = plain(b"".join(code), fx=fx, data=bytes(data), **{name: encode.value(rng) for name in ("rax", "rdx", "rsi")})
    case.ip = START
    return case, len(code)


def test_programs(host, core):
    """Sequences: state goes between x87, MMX and memory, and pointers and opcode are those of the last instruction."""
    rng = generator("x87 programs")
    ended = set()
    for _ in range(CASES * 10):
        case, count = program_case(rng, 10)
        ended.add(compare(host, core, case, count).vector)
    assert {COMPLETED, MF} <= ended


def test_programs_in_compatibility_mode(host, compat_core):
    """The same in 32-bit code, without the instructions that 64-bit code encodes otherwise."""
    rng = generator("x87 compat")
    for _ in range(CASES * 3):
        case, count = program_case(rng, 8)
        case.gprs = {name: value & 0xFFFFFFFF if name in GPRS[:8] else 0 for name, value in case.gprs.items()}
        expected = host.run(case, compat=True)
        compat_core.load(case)
        found = compat_core.outcome(case, compat_core.cpu.run(count))
        for name in GPRS[8:]:
            expected.gprs[name] = found.gprs[name] = 0
        wrong = native.differences(case, expected, found)
        assert not wrong, f"{describe(case)}: {'; '.join(wrong)}"


def test_operands_over_pages(host, core):
    """Loads and stores that leave the mapped memory change nothing; those over a border do all or nothing."""
    rng = generator("x87 pages")
    rows = [row for row in ROWS if row["mod"] == "mem"]
    faults = 0
    for _ in range(CASES * 5):
        row = rng.choice(rows)
        target = rng.choice((DATA + native.PAGE, DATA + DATA_SIZE, DATA + 1)) - rng.randrange(1, 110)
        case = plain(bytes([row["opcode"], row["digit"] << 3]), fx=fx_image(rng), data=memory(rng, kinds(row)), rax=target)
        expected = compare(host, core, case)
        faults += expected.vector == PF
    assert faults


# ---- Checks ------------------------------------------------------------------------------------------------


def with_cr0(core, set_bits, clear_bits, case, count=1):
    before = core.cpu.get_state("sregs")
    sregs = bytearray(before)
    value = struct.unpack_from("<Q", sregs, CR0)[0]
    struct.pack_into("<Q", sregs, CR0, (value | set_bits) & ~clear_bits)
    core.cpu.set_state("sregs", bytes(sregs))
    try:
        core.load(case)
        return core.outcome(case, core.cpu.run(count))
    finally:
        core.cpu.set_state("sregs", before)


def pending_fx():
    fx = bytearray(plain("90").fx)
    fx[:5] = PENDING + b"\xff"
    return fx


@pytest.mark.parametrize(
    ("cr0", "code", "vector"),
    [
        (EM, "d9e8", NM), (TS, "d9e8", NM), (TS, "dbe3", NM), (EM, "dfe0", NM), (EM, "d93b", NM),
        (MP | TS, "9b", NM), (TS, "9b", COMPLETED), (MP, "9b", COMPLETED), (EM | MP, "9b", COMPLETED),
        (EM, "0f77", UD), (TS, "0f77", NM), (EM | TS, "0fefc0", UD), (TS, "0fefc0", NM),
        (TS, "d9d1", UD), (TS, "dae9", NM), (TS, "f0d9e8", UD),
    ],
)  # fmt: skip
def test_checks_of_cr0(cr0, code, vector, core):
    fx = pending_fx() if vector == NM else None  # #NM comes before #MF
    found = with_cr0(core, cr0, (MP | EM | TS) & ~cr0, plain(code, fx=fx))
    assert found.vector == vector
    if vector != COMPLETED:
        assert found.ip == START


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        ("d9e8", MF), ("9b", MF), ("d9d0", MF), ("d92b", MF), ("dd23", MF), ("d923", MF), ("0fefc0", MF), ("0f77", MF),
        ("0f2a00", PF), ("0f2a03", COMPLETED), ("0f2ac0", MF), ("0fd7c0", MF), ("660f2dc0", MF),
        ("d9d1", UD), ("0fae03", COMPLETED), ("dbe3", COMPLETED), ("dbe2", COMPLETED), ("d933", COMPLETED),
        ("dd33", COMPLETED), ("d93b", COMPLETED), ("dd3b", COMPLETED), ("dfe0", COMPLETED), ("dbe4", COMPLETED),
        ("dd00", MF), ("0f6f00", MF), ("d98000000001", MF),
    ],
)  # fmt: skip
def test_pending_exceptions(code, vector, host, core):
    """Waiting instructions raise #MF, before their operand's faults; the others do not, nor does CVTPI2PS from memory."""
    case = plain(code, fx=pending_fx(), rax=8)
    found = core.run(case)
    if code != "0fae03":  # FXSAVE on AMD leaves the pointers out
        expected = host.run(case)
        assert not native.differences(case, expected, found), code
    assert found.vector == vector


# ---- Modes -------------------------------------------------------------------------------------------------


def real_mode(core, code, fx, data):
    """Run one instruction after another in real mode, CS 1200, DS 1400; the data segment's first 128 bytes."""
    sregs = bytearray(native.user_sregs(0))
    for segment in range(6):
        selector = 0x1200 if segment == 0 else 0x1400
        struct.pack_into("<QIHBBBBBBBB", sregs, 24 * segment, selector << 4, 0xFFFF, selector, 11 if segment == 0 else 3, 1,
                         0, 0, 1, 0, 0, 0)
    struct.pack_into("<7Q", sregs, CR0, 0x20 | 0x10, 0, 0, 0x600, 0, 0, 0xFEE00900)
    before = core.cpu.get_state("sregs")
    memory_before = bytes(core.memory[:0x10000])
    core.cpu.set_state("sregs", bytes(sregs))
    try:
        low = core.memory
        # the page tables at 1000 to 5000 stay: code and data lie behind them, in the slot of the first 64 KiB
        for segment in (0, 1):
            struct.pack_into("<QIH", sregs, 24 * segment, (0x6000, 0x7000)[segment], 0xFFFF, (0x600, 0x700)[segment])
        for segment in range(2, 6):
            struct.pack_into("<QIH", sregs, 24 * segment, 0x7000, 0xFFFF, 0x700)
        core.cpu.set_state("sregs", bytes(sregs))
        instructions = [bytes.fromhex(part) for part in code.split()]
        low[0x6010 : 0x6010 + sum(map(len, instructions))] = b"".join(instructions)
        low[0x7000 : 0x7000 + len(data)] = data
        regs = [0] * 16 + [0x10, 2]
        regs[1] = 0x20  # rbx
        core.cpu.set_state("regs", struct.pack("<18Q", *regs))
        xsave = bytearray(4096)
        xsave[:512] = fx
        struct.pack_into("<Q", xsave, 512, 3)
        core.cpu.set_state("xsave", bytes(xsave))
        exit = core.cpu.run(len(instructions))
        assert exit[0] == _core.EXIT_LIMIT, exit
        return bytes(low[0x7000:0x7100])
    finally:
        core.memory[:0x10000] = memory_before
        core.cpu.set_state("sregs", before)


def test_environment_in_real_mode(core):
    """Intel SDM 1 figures 8-10 and 8-12: linear addresses of 20 and 32 bits, and the opcode."""
    fx = bytearray(plain("90").fx)
    struct.pack_into("<HHB", fx, 0, 0x37F, 0, 0)
    operand = b"".join((bytes(0x20), struct.pack("<d", 1.0)))
    code = "dd07 d977 20".replace("77 20", "7720")  # fld qword [bx]; fnstenv [bx+0x20]
    found = real_mode(core, code, fx, operand)[0x40:]
    assert struct.unpack_from("<7H", found) == (0x37F, 0x3800, 0x3FFF, 0x6010, 0x507, 0x7020, 0)
    found = real_mode(core, "dd07 66d97720", fx, operand)[0x40:]
    assert struct.unpack_from("<7I", found) == (
        0xFFFF037F, 0xFFFF3800, 0xFFFF3FFF, 0xFFFF6010, 0x507, 0xFFFF7020, 0,
    )  # fmt: skip


def test_environment_in_real_mode_loads(core):
    """What FLDENV takes, FNSTENV gives; addresses above 64 KiB keep their high bits."""
    fx = bytearray(plain("90").fx)
    words = (0x27F, 0x1000, 0xFFFF, 0x1234, 0xA555, 0x5678, 0xB000)
    found = real_mode(core, "d967e0 d97720", fx, struct.pack("<7H", *words))[0x40:]
    assert struct.unpack_from("<7H", found) == words
    words = (0xFFFF027F, 0xFFFF1000, 0xFFFFFFFF, 0xFFFF1234, 0x0ABCD555, 0xFFFF5678, 0x01234000)
    found = real_mode(core, "66d967e0 66d97720", fx, struct.pack("<7I", *words))[0x40:]
    assert struct.unpack_from("<7I", found) == words


def test_state_is_the_same_through_fxsave(core):
    """FXSAVE and FXRSTOR in the middle of a program see and set what the instructions around them do."""
    rng = generator("x87 fxsave")
    for _ in range(CASES):
        fx = fx_image(rng, control=0x37F)
        first, second = (bytes([0xD9, rng.choice((0xE8, 0xEB, 0xE0, 0xC3, 0xF6))]) for _ in range(2))
        around = plain(first + bytes.fromhex("480fae03 dbe3 480fae0b") + second, fx=fx)
        core.load(around)
        saved = core.outcome(around, core.cpu.run(5))
        without = plain(first + second, fx=fx)
        core.load(without)
        direct = core.outcome(without, core.cpu.run(2))
        assert saved.fx[:5] == direct.fx[:5]
        assert saved.fx[32:160] == direct.fx[32:160]


# ---- Memory that is not memory -----------------------------------------------------------------------------


def test_device_memory(core):
    """Loads and stores exit as those of other instructions do, and happen once; ST(0) is popped once."""
    page = DATA + DATA_SIZE
    entry = 0x4000 + (page >> 12 & 511) * 8
    struct.pack_into("<Q", core.memory, entry, 0xC0000000 | 7)
    try:
        fx = bytearray(plain("90").fx)
        struct.pack_into("<HHB", fx, 0, 0x37F, 0, 0)
        core.load(plain("dd00 d9e0 dd5808 db7803 90", fx=fx, rax=page))  # fld m64; fchs; fstp m64; fstp m80 over words
        loaded = core.cpu.run(-1)
        assert loaded[0] == _core.EXIT_MMIO and core.cpu.reading
        core.cpu.access_data = struct.pack("<d", 1.5)
        stored = core.cpu.run(-1)
        assert stored[0] == _core.EXIT_MMIO and not core.cpu.reading
        assert bytes(core.cpu.access_data) == struct.pack("<d", -1.5)
        assert core.cpu.get_state("fpu")[130:133] != b""
        fsw = struct.unpack_from("<H", core.cpu.get_state("xsave"), 2)[0]
        assert fsw >> 11 & 7 == 0
    finally:
        struct.pack_into("<Q", core.memory, entry, 0)
