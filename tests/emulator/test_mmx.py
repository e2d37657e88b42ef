"""MMX and its 64-bit relatives against the host CPU, from any state of the x87, whose registers they use.

VMFS_CASES scales the number of cases (default 40); VMFS_SEED the first random seed.
"""

import platform
import shutil
import struct

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, sse_lib  # noqa: E402
from emulator.native import COMPLETED, DATA, DATA_SIZE  # noqa: E402
from emulator.x87_lib import CASES, MF, PF, XM, compare, fx_image, generator, memory, plain  # noqa: E402

FLAGS = (
    open("/proc/cpuinfo").read().partition("flags")[2].partition("\n")[0].split()
    if platform.system() == "Linux"
    else []
)
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the oracle is an x86-64 host CPU"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the oracle is compiled"),
    pytest.mark.skipif("ssse3" not in FLAGS, reason="the host CPU lacks ssse3"),
]
ROWS = [
    row for row in _core.instructions() if "MMX" in row["attributes"] and "NOTEST" not in row["attributes"]
]
CONVERSIONS = [row for row in ROWS if row["name"].startswith("CVT")]


def row_id(row):
    return f"{row['name']}-{row['opcode']:02X}-{','.join(row['operands']).strip(',')}"


def test_all_rows_are_there():
    assert len(ROWS) == 97
    assert len(CONVERSIONS) == 6


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_row(row, host, core):
    """TOP, tags and exponents as the host leaves them; pending exceptions come first."""
    rng = generator("mmx", row_id(row))
    completed = 0
    for _ in range(max(CASES // 5, 1)):
        case = encode.make_case(row, rng)
        case.fx, case.data = fx_image(rng), memory(rng, ("real32", "integer"))
        completed += compare(host, core, case).vector == COMPLETED
    assert completed


@pytest.mark.parametrize("row", CONVERSIONS, ids=row_id)
def test_conversions(row, host, core):
    """Results, MXCSR, and unmasked exceptions."""
    rng = generator("mmx conversions", row_id(row))
    vectors = set()
    width = 8 if "PD" in row["name"] else 4
    for _ in range(CASES):
        case = encode.make_case(row, rng)
        fx = bytearray(fx_image(rng, control=0x37F))
        fx[24:28] = struct.pack("<I", sse_lib.mxcsr(rng))
        for at in range(160, 416, 8):
            fx[at : at + 8] = sse_lib.eight_bytes(rng, width)
        case.fx = bytes(fx)
        case.data = b"".join(sse_lib.eight_bytes(rng, width) for _ in range(DATA_SIZE // 64)) * 8
        vectors.add(compare(host, core, case).vector)
    assert COMPLETED in vectors
    if CASES >= 40 and row["name"] != "CVTPI2PD":  # exact
        assert XM in vectors


def test_maskmovq(host, core):
    rng = generator("maskmovq")
    vectors = set()
    for _ in range(CASES):
        fx = bytearray(fx_image(rng))
        if rng.randrange(2):
            for at in range(32, 160):
                fx[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
        code = rng.choice(("", "67", "49")) + f"0ff7{0xC0 | rng.randrange(64):02x}"
        case = plain(code, fx=fx, rdi=encode.operand_target(rng, 8))
        if DATA <= case.gprs["rdi"] <= DATA + DATA_SIZE - 8:  # what else faults is left open
            vectors.add(compare(host, core, case).vector)
        else:
            assert core.run(case).vector in (COMPLETED, PF, MF)
    assert COMPLETED in vectors
