"""A guest's own debuggers: what Linux tells a user of ptrace, as on a processor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from pc.kernels import needs_kernels

pytestmark = needs_kernels

SIGILL, SIGTRAP = 4, 5
# The instruction after a load of SS whose operand is watched: the signal, DR6, and where, counted from it.
# A Xeon under Linux 6 says the same. INT 80h and SYSCALL end in a handler that a user's watchpoints are not shown.
WANTED = {
    "nop": f"{SIGTRAP} ff1 1",
    "int3": f"{SIGTRAP} ff0 1",
    "int_3": f"{SIGTRAP} ff0 2",
    "int1": f"{SIGTRAP} ff0 1",
    "ud2": f"{SIGILL} ff0 0",
    "int80": "done",
    "syscall": "done",
    "twice": f"{SIGTRAP} ff1 6",
}


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the guest's program is compiled")
def test_watched_loads_of_ss(linux, tmp_path):
    program = tmp_path / "watched_ss"
    source = Path(__file__).with_name("watched_ss.c")
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, source], check=True)
    pc = linux(files={"bin/watched_ss": program.read_bytes()})
    said = dict(line.split(" ", 1) for line in pc.shell("watched_ss").splitlines())
    assert said == WANTED
