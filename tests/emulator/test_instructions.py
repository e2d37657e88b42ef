"""Every row of the instruction table against the host CPU, with random operands.

VMFS_CASES sets how many cases a row gets (default 40); VMFS_SEED the first random seed.
"""

import os
import platform
import random
import shutil
import zlib

import pytest

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the oracle is an x86-64 host CPU"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the oracle is compiled"),
]
_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402

CASES = int(os.environ.get("VMFS_CASES", "40"))
SEED = int(os.environ.get("VMFS_SEED", "0"))
ROWS = _core.instructions()
# CPUID feature of a row: the word in /proc/cpuinfo. BASE and what is not listed: every x86-64 CPU has it.
CPUINFO = {
    "SSE3": "pni",
    "SSE41": "sse4_1",
    "SSE42": "sse4_2",
    "PCLMUL": "pclmulqdq",
    "SHA": "sha_ni",
    "LZCNT": "abm",
    "LAHF": "lahf_lm",
    "SSSE3": "ssse3",
    "CX16": "cx16",
    "MOVBE": "movbe",
    "POPCNT": "popcnt",
    "AES": "aes",
    "BMI1": "bmi1",
    "BMI2": "bmi2",
    "ADX": "adx",
    "AVX": "avx",
    "AVX2": "avx2",
    "F16C": "f16c",
    "FMA": "fma",
    "VAES": "vaes",
    "VPCLMUL": "vpclmulqdq",
    "GFNI": "gfni",
}
_CPUINFO = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
HOST = set(_CPUINFO.partition("flags")[2].partition("\n")[0].split())


def row_id(row):
    operands = ",".join(operand for operand in row["operands"] if operand)
    digit = f"/{row['digit']}" if row["digit"] >= 0 else ""
    prefix = "" if row["prefix"] in ("any", "none", "no-rep") else row["prefix"] + "."
    length = f".{row['length']}" if row["length"] else ""
    return f"{row['name']}-{operands}-{prefix}{row['map']}{row['opcode']:02X}{digit}{length}"


def test_the_table_has_rows():
    assert len(ROWS) > 200
    assert {"ADD", "JNE", "PUSH", "CMOVLE"} <= {row["name"] for row in ROWS}


@pytest.mark.parametrize("row", [row for row in ROWS if encode.testable(row)], ids=row_id)
def test_row(row, host, core):
    """The row does what the host does: registers, defined flags, memory, faults with all as it was."""
    if row["feature"] in CPUINFO and CPUINFO[row["feature"]] not in HOST:
        pytest.skip(f"the host CPU has no {row['feature']}")
    rng = random.Random(zlib.crc32(row_id(row).encode()) + SEED)
    completed = 0
    for _ in range(CASES):
        case = encode.make_case(row, rng)
        expected, found = host.run(case), core.run(case)
        completed += expected.vector == native.COMPLETED
        wrong = native.differences(case, expected, found)
        assert not wrong, f"{native.describe(case)}: {'; '.join(wrong)}"
    assert completed or row["name"].startswith("UD"), "no case completed: the row is not tested"
