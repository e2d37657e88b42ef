"""`make fuzz`: the differential fuzzer of fuzz/*.c. Builds it from the objects of the extension, and runs it.

    make fuzz ARGS="--seconds 60 --seed 7"

Random instruction sequences from the core's table (one in four with other prefixes and fields), from random
state, in 64-bit mode, in compatibility mode, and in segments of an LDT (16-bit and 32-bit code and stacks, limits,
expand-down, read-only and execute-only ones, code that runs over the end of its segment and over 10000h), run on the
host CPU and on the core. A difference is shrunk and printed as a line that begins with "case"; put into finds.txt,
it is a test. With --ways, the interpreter and host code on the core (fuzz/ways.c).
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from vmfs.engine.emulator import _core

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FUZZ = HERE / "fuzz"
HEADERS = ROOT / "vmfs/engine/emulator/core"
FINDS = HERE / "finds.txt"
SOURCES = ("main.c", "freedoms.c", "generate.c", "host.c", "ways.c")


def objects() -> list[str]:
    """What the extension in use was linked from, but for what knows Python. VMFS_FUZZ_OBJECTS: another folder."""
    if folder := os.environ.get("VMFS_FUZZ_OBJECTS"):
        found = glob.glob(f"{folder}/**/*.o", recursive=True)
    elif sanitized():
        found = glob.glob(str(ROOT / "build/asan/temp/vmfs/engine/emulator/core/**/*.o"), recursive=True)
    else:
        found = glob.glob(str(ROOT / "build/temp.*/vmfs/engine/emulator/core/**/*.o"), recursive=True)
    return sorted(each for each in found if "/core/python/" not in each and _has_source(each))


def _has_source(compiled: str) -> bool:
    """Not so for what setup.py left from before a source was moved."""
    _, inside, path = compiled.rpartition("emulator/core/")
    return not inside or (HEADERS / path).with_suffix(".c").exists()


def sanitized() -> bool:
    return "build/asan" in _core.__file__


def missing() -> str | None:
    """Why it cannot be built here."""
    if platform.machine() != "x86_64":
        return "the oracle is an x86-64 host CPU"
    if not shutil.which("gcc"):
        return "gcc is missing: the fuzzer is compiled"
    if not objects():
        return "the objects of the emulator core are gone: make setup"
    return None


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def build(directory: Path, without: tuple[str, ...] = ()) -> Path:
    """Compile and link; `without` are objects of the core to leave out, e.g. ops_crypto."""
    program = Path(directory) / ("fuzz" + "".join(f"-{name}" for name in without))
    linked = [each for each in objects() if Path(each).stem not in without]
    flags = ["-fsanitize=address,undefined"] if sanitized() else []
    subprocess.run(
        ["gcc", "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fPIE", "-pie",
         "-fno-stack-protector", "-mno-red-zone", f"-I{HEADERS}", "-o", program,
         *(FUZZ / name for name in SOURCES), *linked, *flags, "-lpthread", "-lm"],
        check=True, env=clean_environment(),
    )
    return program


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Without the host under AddressSanitizer: its shadow lies where wild addresses of tests go."""
    host = ["--no-host"] if sanitized() else []
    command = [program, *map(str, arguments), *host]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment())


def main(arguments: list[str]) -> int:
    if why := missing():
        print(f"fuzz: {why}", file=sys.stderr)
        return 2
    directory = ROOT / "build/fuzz"
    directory.mkdir(parents=True, exist_ok=True)
    program = build(directory)
    host = ["--no-host"] if sanitized() else []
    return subprocess.run([program, *arguments, *host], env=clean_environment()).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
