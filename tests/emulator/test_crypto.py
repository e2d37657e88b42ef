"""The C forms of AES, PCLMULQDQ and SHA, for hosts without the instructions, against a host that has them."""

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORE = HERE.parents[1] / "vmfs/engine/emulator/core"
INSN = CORE / "insn"
CPUINFO = Path("/proc/cpuinfo")
FLAGS = CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split() if CPUINFO.exists() else []
LACKING = {"aes", "pclmulqdq", "sha_ni"} - set(FLAGS)
SEED = int(os.environ.get("VMFS_SEED", "0"))


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the comparison is compiled")
@pytest.mark.skipif(bool(LACKING), reason=f"the host CPU lacks {LACKING}")
def test_portable_forms(tmp_path):
    library = tmp_path / "crypto.so"
    subprocess.run(
        ["gcc", "-std=gnu11", "-O1", "-fwrapv", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-maes",
         "-mpclmul", "-msha", f"-I{CORE}", f"-I{CORE / 'cpu'}",
         f"-I{INSN}", "-o", library, HERE / "crypto_shim.c", INSN / "crypto.c"],
        check=True,
    )
    check = ctypes.CDLL(str(library)).crypto_check
    check.restype, check.argtypes = ctypes.c_char_p, [ctypes.c_char_p, ctypes.c_size_t]
    blocks = 4096
    assert check(random.Random(SEED).randbytes(16 * blocks), blocks) is None
