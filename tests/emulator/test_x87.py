"""The x87 against the host CPU: every row from any state of the unit, random programs, and what modes and
control registers do.

VMFS_CASES scales the number of cases (default 40); VMFS_SEED the first random seed.
"""

import ctypes
import math
import platform
import shutil
import struct

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.native import COMPLETED, DATA, DATA_SIZE, GPRS, START  # noqa: E402
from emulator.sse_lib import compiled  # noqa: E402
from emulator.system_lib import STOP, Guest  # noqa: E402
from emulator.x87_lib import (  # noqa: E402
    CASES,
    MF,
    NM,
    PF,
    UD,
    compare,
    fx_image,
    generator,
    keeps_pointers,
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
    """With the selectors of a 64-bit (or, `compat`, a 32-bit) program of Linux, which FNSTENV stores."""

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
    """Each of the pairs D8 C0 to DF FF and each memory form is an instruction where it is one on the host."""
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


def rows_of_programs(host):
    """What programs are made of, the more frequent FNSTENV last; on a host that does not keep the pointers,
    nothing that stores them."""
    storing = [next(row for row in ROWS if row["name"] == name) for name in ("FNSAVE", "FNSTENV")]
    return [row for row in ROWS if row not in storing] + (storing if keeps_pointers(host) else [])


def program(rng, length, rows):
    """Code and its number of instructions: a random state by FRSTOR, then any x87 and MMX instructions."""
    code = [bytes.fromhex("dbe3"), bytes.fromhex("dd23")]
    for _ in range(length):
        kind = rng.randrange(20)
        if kind < 14:
            code.append(instruction(rng.choice(rows), rng))
        elif kind < 17:
            code.append(instruction(rng.choice(MMX_ROWS), rng))
        elif kind == 17:
            code.append(b"\x9b")
        elif kind == 18:
            code.append(instruction(rows[-1], rng))
        else:  # ADDPS, DIVPS: an unmasked exception of these needs the host's x87
            code.append(bytes([0x0F, rng.choice((0x58, 0x5E)), 0xC0 | rng.randrange(64)]))
    return code


def program_case(rng, length, rows):
    code = program(rng, length, rows)
    data = bytearray(memory(rng, KINDS))
    fx = bytearray(fx_image(rng))
    masked = rng.randrange(3)
    struct.pack_into(
        "<HHHHHH",
        data,
        0,
        struct.unpack_from("<H", fx)[0] | (0x3F if masked else 0),
        0xFFFF,
        0,
        0xFFFF,
        rng.choice((0, 0, 0x5555, rng.getrandbits(16))),
        0xFFFF,
    )
    if masked:
        for at in range(16, DATA_SIZE, 16):  # for FLDCW and FLDENV
            data[at] |= 0x3F
    struct.pack_into("<I", fx, 24, 0x1F80 if rng.randrange(3) else rng.getrandbits(16))
    case = plain(
        b"".join(code), fx=fx, data=bytes(data), **{name: encode.value(rng) for name in ("rax", "rdx", "rsi")}
    )
    case.ip = START
    return case, len(code)


def test_programs(host, core):
    """State goes between x87, MMX and memory; pointers and opcode are those of the last instruction."""
    rng = generator("x87 programs")
    ended = set()
    rows = rows_of_programs(host)
    for _ in range(CASES * 10):
        case, count = program_case(rng, 10, rows)
        ended.add(compare(host, core, case, count).vector)
    assert {COMPLETED, MF} <= ended


def test_programs_in_compatibility_mode(host, compat_core):
    """The same in 32-bit code, without the instructions that 64-bit code encodes otherwise."""
    rng = generator("x87 compat")
    rows = rows_of_programs(host)
    for _ in range(CASES * 3):
        case, count = program_case(rng, 8, rows)
        case.gprs = {name: value & 0xFFFFFFFF if name in GPRS[:8] else 0 for name, value in case.gprs.items()}
        compare(host, compat_core, case, count, compat=True)


def test_operands_over_pages(host, core):
    """Loads and stores that leave the mapped memory change nothing; those over a border do all or nothing."""
    rng = generator("x87 pages")
    rows = [row for row in ROWS if row["mod"] == "mem"]
    faults = 0
    for _ in range(CASES * 5):
        row = rng.choice(rows)
        target = rng.choice((DATA + native.PAGE, DATA + DATA_SIZE, DATA + 1)) - rng.randrange(1, 110)
        case = plain(
            bytes([row["opcode"], row["digit"] << 3]),
            fx=fx_image(rng),
            data=memory(rng, kinds(row)),
            rax=target,
        )
        expected = compare(host, core, case)
        faults += expected.vector == PF
    assert faults


@pytest.mark.parametrize("control", [0x37F, 0x37E])
def test_pointers_are_those_of_the_last_instruction(control, core, compat_core):
    """Whatever the host does: no FDP_EXCPTN_ONLY, no deprecated FCS and FDS, and the opcode of each instruction."""
    for cpu, selectors in ((core, (0x33, 0)), (compat_core, (0x23, 0x2B))):
        leaves = struct.iter_unpack("<10I", cpu.cpu.get_state("cpuid")[8:])
        bits = next(leaf[4] for leaf in leaves if leaf[:2] == (7, 0))
        assert not bits & (1 << 6 | 1 << 13)
        # fninit; fldcw [rbx]; fadd [rbx + 16], with an empty stack; fnclex; fld [rbx + 20]; fnstenv [rcx]
        case = plain("dbe3 d92b d84310 dbe2 d94314 d931", data=struct.pack("<H", control).ljust(64, b"\0"))
        cpu.load(case)
        image = struct.unpack_from("<7I", cpu.outcome(case, cpu.cpu.run(6)).data, 512)
        assert image[3:] == (case.ip + 9, selectors[0] | 0x143 << 16, DATA + 20, selectors[1] | 0xFFFF0000)


# ---- Programs of a compiler --------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["-O1", "-O3 -ffast-math"])
def test_program(flags, host, core, tmp_path):
    """A program in extended precision leaves the same data on the host and here, in one run and in many."""
    case = compiled("x87_program.c", f"-mfpmath=387 {flags}", tmp_path)
    expected = host.run(case)
    assert expected.vector == UD
    for budget in (10_000_000, 777):
        core.load(case)
        exit = core.cpu.run(budget)
        while exit[0] == _core.EXIT_LIMIT:
            exit = core.cpu.run(budget)
        assert exit[0] == _core.EXIT_DEBUG and exit[8] == UD, exit
        found = core.outcome(case, exit)
        assert found.data == expected.data
        assert found.fx[:5] == expected.fx[:5]
        assert found.fx[32:416] == expected.fx[32:416]


def test_the_host_has_its_own_x87_between_runs(core):
    """A guest with a full stack, single precision and a pending exception: the C library still computes."""
    root = ctypes.CDLL("libm.so.6").sqrtl
    root.argtypes, root.restype = [ctypes.c_longdouble], ctypes.c_longdouble
    fx = bytearray(pending_fx())
    struct.pack_into("<H", fx, 0, 0x007B)
    case = plain("dbe2 d9c0 d9c0 dec9 90 90", fx=fx)  # fnclex; fld st(0) twice: a fault; fmulp
    core.load(case)
    core.cpu.run(2)
    assert root(2.0) == math.sqrt(2.0)
    core.cpu.run(2)
    assert root(2.0) == math.sqrt(2.0)
    assert struct.unpack_from("<H", core.cpu.get_state("xsave"))[0] == 0x7B


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
        ("d9e8", MF), ("9b", MF), ("d9d0", MF), ("d92b", MF), ("dd23", MF), ("d923", MF), ("0fefc0", MF),
        ("0f77", MF),
        ("0f2a00", PF), ("0f2a03", COMPLETED), ("0f2ac0", MF), ("0fd7c0", MF), ("660f2dc0", MF),
        ("d9d1", UD), ("0fae03", COMPLETED), ("dbe3", COMPLETED), ("dbe2", COMPLETED), ("d933", COMPLETED),
        ("dd33", COMPLETED), ("d93b", COMPLETED), ("dd3b", COMPLETED), ("dfe0", COMPLETED),
        ("dbe4", COMPLETED),
        ("dd00", MF), ("0f6f00", MF), ("d98000000001", MF),
    ],
)  # fmt: skip
def test_pending_exceptions(code, vector, host, core):
    """Waiting instructions raise #MF before operand faults; others, and CVTPI2PS from memory, do not."""
    case = plain(code, fx=pending_fx(), rax=8)
    found = core.run(case)
    if code != "0fae03":  # FXSAVE on AMD leaves the pointers out
        expected = host.run(case)
        assert not native.differences(case, expected, found), code
    assert found.vector == vector


# ---- Modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "v86"])
def test_environment_in_real_mode(mode):
    """Intel SDM 1 figures 8-10 and 8-12: linear addresses of 20 and 32 bits, and the opcode."""
    with Guest(mode) as guest:
        guest.put(0x7FF0, 0x3FF0000000000000)
        assert (
            guest.run("""
            mov ax, 0x700
            mov ds, ax
            fninit
        here:
            fld qword ptr [0xff0]
            fnstenv [0x20]
            .byte 0x66
            fnstenv [0x40]
        """)
            == STOP
        )
        here = guest.labels["here"]
        narrow = struct.unpack("<7H", guest.memory[0x7020:0x702E])
        assert narrow == (0x37F, 0x3800, 0x3FFF, here, 0x506, 0x7FF0, 0)
        wide = struct.unpack("<7I", guest.memory[0x7040:0x705C])
        ones = 0xFFFF0000
        assert wide == (ones | 0x37F, ones | 0x3800, ones | 0x3FFF, ones | here, 0x506, ones | 0x7FF0, 0)


def test_environment_in_real_mode_loads():
    """What FLDENV takes, FNSTENV gives; addresses above 64 KiB keep their high bits."""
    narrow = struct.pack("<7H", 0x27F, 0x1000, 0xFFFF, 0x1234, 0xA555, 0x5678, 0xB000)
    wide = struct.pack(
        "<7I", 0xFFFF027F, 0xFFFF1000, 0xFFFFFFFF, 0xFFFF1234, 0x0ABCD555, 0xFFFF5678, 0x01234000
    )
    with Guest("real") as guest:
        guest.write(0x7000, narrow)
        guest.write(0x7040, wide)
        assert (
            guest.run("""
            fldenv [0x7000]
            fnstenv [0x7020]
            .byte 0x66
            fldenv [0x7040]
            .byte 0x66
            fnstenv [0x7080]
        """)
            == STOP
        )
        assert guest.memory[0x7020:0x702E] == narrow
        assert guest.memory[0x7080:0x709C] == wide


DIVIDE_BY_ZERO = """
    fninit
    fnstcw [0x7000]
    and word ptr [0x7000], 0xfffb
    fldcw [0x7000]
    fld1
    fldz
    fdivp
here:
"""
PIC = "".join(
    f"mov al, {value}\nout {port}, al\n"
    for port, value in ((0x20, 0x11), (0x21, 0x08), (0x21, 4), (0x21, 1), (0xA0, 0x11),
                        (0xA1, 0x70), (0xA1, 2), (0xA1, 1),
                        (0x21, 0xFB), (0xA1, 0xDF))
)  # fmt: skip


def test_numeric_error_as_an_exception():
    """CR0.NE: #MF at the next waiting instruction, with its address, as a fault."""
    with Guest("protected") as guest:
        guest.set(cr0=guest.control("cr0") | NE)
        assert guest.run(DIVIDE_BY_ZERO + "nop\nfwait") == MF
        assert guest.frame(False)[0] == guest.labels["here"] + 1


def test_numeric_error_as_irq_13():
    """Without CR0.NE: IRQ 13 comes before the waiting instruction, which runs when the handler returns."""
    program = (
        PIC
        + "sti\n"
        + DIVIDE_BY_ZERO
        + """
        fld1
        jmp stop
    handler:
        inc bp
        fnclex
        mov al, 0x20
        out 0xa0, al
        out 0x20, al
        iret
    """
    )
    with Guest("real", chip=True) as guest:
        assert guest.run(program) == 0x75
        assert guest.frame(False)[0] == guest.labels["here"]
    with Guest("real", chip=True) as guest:
        guest.load(program)
        guest.put(4 * 0x75, guest.labels["handler"], 4)
        assert guest.run() == STOP
        assert guest.regs()["rbp"] == 1
        fsw = struct.unpack_from("<H", guest.cpu.get_state("xsave"), 2)[0]
        assert fsw == 5 << 11  # FDIVP did not pop, FLD1 pushed


def test_numeric_error_waits_for_an_interrupt():
    """With interrupts off, the CPU stands still before the instruction, for good; an NMI goes on."""
    with Guest("real", chip=True) as guest:
        guest.load(PIC + DIVIDE_BY_ZERO + "fld1")
        for _ in range(2):
            assert guest.go()[:2] == (_core.EXIT_HLT, guest.labels["here"])
        guest.cpu.nmi()
        assert guest.run() == 2
        assert guest.frame(False)[0] == guest.labels["here"]


def test_reset():
    """A new CPU can use the x87 at once, as on KVM."""
    fpu = _core.Vm().create_vcpu(0).get_state("fpu")
    assert fpu[:128] == bytes(128)
    assert struct.unpack_from("<HHB", fpu, 128) == (0x37F, 0, 0)


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
        core.load(
            plain("dd00 d9e0 dd5808 db7803 90", fx=fx, rax=page)
        )  # fld m64; fchs; fstp m64; fstp m80 over words
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
