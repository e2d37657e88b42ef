"""What the tests of the vector instructions share: values that are interesting as floats, cases, compiled programs."""

import os
import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from emulator import encode, native
from emulator.native import CODE, CODE_SIZE, DATA, DATA_SIZE, GPRS, Case

CASES = int(os.environ.get("VMFS_CASES", "40"))
SEED = int(os.environ.get("VMFS_SEED", "0"))
CR0, CR4 = 8 * 24 + 2 * 16, 8 * 24 + 2 * 16 + 24  # in struct kvm_sregs
UD, NM, GP, PF, XM = 6, 7, 13, 14, 19
SINGLES = [
    *(sign | bits for sign in (0, 1 << 31) for bits in (
        0, 1, 0x400000, 0x7FFFFF, 0x800000, 0x800001, 0xFFFFFF, 0x1000000, 0x3F800000, 0x3F000000,
        0x3FC00000, 0x40400000, 0x3F7FFFFF, 0x3F800001, 0x4B000001, 0x4EFFFFFF, 0x4F000000, 0x4F000001,
        0x5EFFFFFF, 0x5F000000, 0x7F7FFFFF, 0x7F000000, 0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000,
        0x7FC12345, 0x00000123, 0x20000000, 0x20000001,
    )),
]
DOUBLES = [
    *(sign | bits for sign in (0, 1 << 63) for bits in (
        0, 1, 1 << 51, (1 << 52) - 1, 1 << 52, (1 << 52) + 1, (1 << 53) - 1, 0x3FF0000000000000,
        0x3FE0000000000000, 0x3FF8000000000000, 0x4008000000000000, 0x3FEFFFFFFFFFFFFF,
        0x3FF0000000000001, 0x41DFFFFFFFC00000, 0x41E0000000000000, 0x41DFFFFFFFE00000,
        0x43DFFFFFFFFFFFFF, 0x43E0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FE0000000000000,
        0x7FF0000000000000, 0x7FF0000000000001, 0x7FF7FFFFFFFFFFFF, 0x7FF8000000000000,
        0x7FF8000000012345, 0x2000000000000000, 0x2000000000000001, 0x47EFFFFFE0000000,
        0x47EFFFFFF0000000, 0x3810000000000000, 0x380FFFFFFFFFFFFF, 0x36A0000000000000,
        0x3690000000000000, 0x3800000000000000,
    )),
]

HOST_FLAGS = frozenset(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())


def needs(*features):
    """The marks of a module that compares with a host that has these."""
    lacking = sorted(set(features) - HOST_FLAGS)
    return [
        pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the oracle is compiled"),
        pytest.mark.skipif(bool(lacking), reason=f"the host CPU lacks {' '.join(lacking)}"),
    ]


def generator(*words):
    return random.Random(zlib.crc32(" ".join(map(str, words)).encode()) + SEED)


def eight_bytes(rng, width):
    """Of floats: special, near a special one, random bits, or a plain number; `width` 4 or 8."""
    if width == 4:
        def single():
            kind = rng.randrange(5)
            if kind < 2:
                return rng.choice(SINGLES)
            if kind == 2:
                return (rng.choice(SINGLES) + rng.randrange(-3, 4)) % 2**32
            if kind == 3:
                return rng.getrandbits(32)
            return struct.unpack("<I", struct.pack("<f", rng.uniform(-100, 100)))[0]
        return struct.pack("<II", single(), single())
    kind = rng.randrange(5)
    if kind < 2:
        return struct.pack("<Q", rng.choice(DOUBLES))
    if kind == 2:
        return struct.pack("<Q", (rng.choice(DOUBLES) + rng.randrange(-3, 4)) % 2**64)
    return struct.pack("<Q", rng.getrandbits(64)) if kind == 3 else struct.pack("<d", rng.uniform(-100, 100))


def mxcsr(rng):
    """Any rounding, DAZ, FTZ, sticky flags; all masked more often than not."""
    masks = 0x3F if rng.randrange(5) < 3 else rng.getrandbits(6)
    sticky = rng.getrandbits(6) if rng.randrange(4) == 0 else 0
    daz, ftz = rng.choice((0, 0, 1)), rng.choice((0, 0, 1))
    return sticky | daz << 6 | masks << 7 | rng.randrange(4) << 13 | ftz << 15


def fx_image(rng, control, width):
    fx = bytearray(encode.fx_image(rng))
    struct.pack_into("<I", fx, 24, control)
    for at in range(160, 416, 8):
        fx[at : at + 8] = eight_bytes(rng, width)
    return bytes(fx)


def compare(host, core, case):
    """Both run the case and agree; the outcome."""
    expected, found = host.run(case), core.run(case)
    wrong = native.differences(case, expected, found)
    control = struct.unpack_from("<I", case.fx, 24)[0]
    assert not wrong, f"{native.describe(case)} mxcsr={control:#x}: {'; '.join(wrong)}"
    return expected


def plain(code, **registers):
    """The code with all other registers zero."""
    gprs = dict.fromkeys(GPRS, 0) | {"rsp": DATA + 2048} | registers
    fx = encode.fx_image(random.Random(1))
    return Case(code=code, gprs=gprs, flags=0, data=bytes(DATA_SIZE), fx=fx, name=code.hex())


FREESTANDING = [
    "-std=gnu11", "-Wall", "-Wextra", "-fno-math-errno", "-ffreestanding", "-nostdlib", "-static", "-fno-pic",
    "-no-pie", "-fno-stack-protector", "-fcf-protection=none", f"-Wl,-Ttext={CODE:#x}",
    "-Wl,--build-id=none,-N,--oformat=binary",
]  # fmt: skip
VECTORS = "-msse4.2 -maes -mpclmul -msha"


def compiled(source, flags, tmp_path):
    """A C program that ends in UD2, as a case."""
    image = tmp_path / "program"
    path = Path(__file__).parent / source
    subprocess.run(["gcc", *flags.split(), *FREESTANDING, "-o", image, path], check=True)
    code = image.read_bytes()
    assert len(code) < CODE_SIZE
    case = plain(code, rdi=DATA, rsp=DATA + DATA_SIZE - 72)  # as after a CALL
    case.ip, case.name = CODE, "program"
    return case


def compare_program(host, core, case):
    """It leaves the same data and XMM registers on both; the outcome of the host."""
    expected = host.run(case)
    assert expected.vector == UD
    core.run(case)
    exit = core.cpu.run(100_000_000)
    assert exit[8] == UD, exit
    assert core.memory[-DATA_SIZE:] == expected.data
    assert core.cpu.get_state("xsave")[160:416] == expected.fx[160:416]
    return expected
