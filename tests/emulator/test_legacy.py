"""Instructions that 64-bit mode does not have, against the host CPU in compatibility mode (32-bit code)."""

import platform
import random
import shutil
import struct
import zlib

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode, native  # noqa: E402
from emulator.native import DATA, DATA_SIZE, GPRS, START, Case  # noqa: E402

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the oracle is an x86-64 host CPU"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the oracle is compiled"),
]

CASES = 150
NARROW = GPRS[:8]
# The rest of what is legacy-only moves segment registers or leaves the program: tests of the system part.
SIMPLE = {
    "AAA", "AAS", "AAM", "AAD", "DAA", "DAS", "SALC", "BOUND", "ARPL", "LAHF", "SAHF", "INC", "DEC", "PUSHA", "POPA",
    "ADD", "OR", "ADC", "SBB", "AND", "SUB", "XOR", "CMP",
}


class CompatCore(native.Core):
    """The core in compatibility mode."""

    def __init__(self) -> None:
        super().__init__()
        sregs = bytearray(native.user_sregs(0x1000))
        sregs[17], sregs[19] = 1, 0  # CS.D, CS.L of struct kvm_sregs
        self.cpu.set_state("sregs", bytes(sregs))


@pytest.fixture(scope="module")
def core():
    return CompatCore()


def make_case(row: dict, rng: random.Random) -> Case:
    gprs = {name: encode.value(rng) & 0xFFFFFFFF if name in NARROW else 0 for name in GPRS}
    gprs["rsp"] = DATA + rng.randrange(64, DATA_SIZE - 64, 4)
    data = bytearray(b"".join(encode.float_bytes(rng) for _ in range(DATA_SIZE // 64)) * 8)
    operands = [operand for operand in row["operands"] if operand]
    prefix = b"\x66" if row["size"] == "V" and rng.randrange(3) == 0 else b""
    opcode = row["opcode"] + (rng.randrange(8) if "OPREG" in row["attributes"] else 0)
    modrm = b""
    if encode.has_modrm(row):
        reg = row["digit"] if row["digit"] >= 0 else rng.randrange(8)
        if row["mod"] == "rm" and rng.randrange(2):
            modrm = bytes([0xC0 | reg << 3 | rng.randrange(8)])
        else:
            target = encode.operand_target(rng, 8)
            modrm = bytes([reg << 3 | 5]) + struct.pack("<I", target)
            if row["name"] == "BOUND":
                _bounds(gprs[GPRS[reg]], target, 2 if prefix else 4, data, rng)
    immediate = bytes([encode.value(rng) & 0xFF]) if {"Ib", "sIb"} & set(operands) else b""
    if row["name"] in ("AAM", "AAD") and rng.randrange(2):
        immediate = b"\x0a"
    return Case(
        code=prefix + bytes.fromhex(row["map"]) + bytes([opcode]) + modrm + immediate, gprs=gprs,
        flags=rng.getrandbits(32) & native.ARITHMETIC, data=bytes(data), fx=encode.fx_image(rng), ip=START,
        name=f"{row['name']} {','.join(operands)}", undefined=row["flags_undefined"],
    )


def _bounds(index: int, target: int, size: int, data: bytearray, rng: random.Random) -> None:
    """Bounds near the index, at `target` if that is in the data area."""
    at, half = target - DATA, 1 << (8 * size - 1)
    signed = (index & (2 * half - 1) ^ half) - half
    for offset, low in ((0, -3), (size, -1)):
        bound = (signed + rng.randrange(low, low + 5)) % (2 * half)
        if 0 <= at + offset <= DATA_SIZE - size:
            data[at + offset : at + offset + size] = bound.to_bytes(size, "little")


def row_id(row):
    return f"{row['name']}-{row['opcode']:02X}" + (f"-{row['digit']}" if row["digit"] >= 0 else "")


def legacy_rows():
    return [row for row in _core.instructions() if "NO64" in row["attributes"] and row["name"] in SIMPLE]


def test_all_are_there():
    assert {row["name"] for row in legacy_rows()} == SIMPLE


@pytest.mark.parametrize("row", legacy_rows(), ids=row_id)
def test_row(row, host, core):
    rng = random.Random(zlib.crc32(row_id(row).encode()))
    completed = 0
    for _ in range(CASES):
        case = make_case(row, rng)
        expected, found = host.run(case, compat=True), core.run(case)
        completed += expected.vector == native.COMPLETED
        for name in GPRS:  # the high halves do not exist here, nor do R8 to R15
            expected.gprs[name] = expected.gprs[name] & 0xFFFFFFFF if name in NARROW else 0
        wrong = native.differences(case, expected, found)
        assert not wrong, f"{native.describe(case)}: {'; '.join(wrong)}"
    assert completed
