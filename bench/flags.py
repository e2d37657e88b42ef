"""python -m bench.flags [VARIANT ...]: the emulator's core with other compiler flags, on the loops of bench/cpu.py.

Builds each variant in a folder of its own and times all of them in turn, each in a process that has loaded only
that core. What setup.py says of its flags is from this table. Times are of the CPU, the best of some rounds, so
that other work on the machine disturbs little.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench import cpu

ROOT = Path(__file__).parent.parent
ROUNDS = 2
BASE = "as it is"


@dataclass(frozen=True, slots=True)
class Variant:
    """Flags that follow those of setup.py. `trained`: built twice, with a profile of a run of the loops between."""

    name: str
    compile: str = ""
    link: str = ""
    trained: bool = False


VARIANTS = (
    Variant(BASE),
    Variant("-O3", "-O3"),
    Variant("-Os", "-Os"),
    Variant("LTO", "-flto", "-flto=2 -O2"),
    Variant("x86-64-v2", "-march=x86-64-v2"),
    Variant("x86-64-v3", "-march=x86-64-v3"),
    Variant("CET, SLP, cross-jumping", "-fcf-protection=full -ftree-slp-vectorize -fcrossjumping"),
    Variant("PGO", trained=True),
)


def build(variant: Variant, where: Path, more: str = "") -> Path:
    """The variant's `_core` library."""
    environment = os.environ | {
        "VMFS_CFLAGS": f"{variant.compile} {more} -g0",
        "VMFS_LDFLAGS": f"{variant.link} {more}",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force"]
    command += ["--build-lib", where / "lib", "--build-temp", where / "temp"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
    (library,) = (where / "lib").rglob("_core*.so")
    return library


def trained(variant: Variant, where: Path, image: Path) -> Path:
    profile = where / "profile"
    measure(build(variant, where, f"-fprofile-generate -fprofile-update=single -fprofile-dir={profile}"), image)
    use = f"-fprofile-use -fprofile-dir={profile} -fprofile-partial-training -Wno-missing-profile"
    return build(variant, where, use)


def measure(library: Path, image: Path) -> list[float]:
    """MIPS of each loop, in a new process."""
    command = [sys.executable, "-m", "bench.flags", "--measure", library, image]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def _measure(library: str, image: str) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("vmfs.engine.emulator._core", library)
    assert spec and spec.loader
    sys.modules["vmfs.engine.emulator._core"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["vmfs.engine.emulator._core"])
    emulator = cpu.Emulator(Path(image).read_bytes())
    speeds = []
    for number, kernel in enumerate(cpu.KERNELS):
        began = time.process_time()
        _, few = emulator.run(number, kernel.few)
        middle = time.process_time()
        _, many = emulator.run(number, kernel.many)
        seconds = (time.process_time() - middle) - (middle - began)
        speeds.append((many - few) / seconds / 1e6)
    print(json.dumps(speeds))


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        return _measure(*sys.argv[2:])
    wanted = [each for each in VARIANTS if each.name in {BASE, *(sys.argv[1:] or [v.name for v in VARIANTS])}]
    with tempfile.TemporaryDirectory(prefix="vmfs-flags-") as folder:
        image = Path(folder) / "guest.bin"
        image.write_bytes(cpu.build())
        libraries = {}
        for number, variant in enumerate(wanted):
            where = Path(folder) / str(number)
            libraries[variant.name] = trained(variant, where, image) if variant.trained else build(variant, where)
        best: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name, library in libraries.items():
                speeds = measure(library, image)
                best[name] = [max(pair) for pair in zip(speeds, best.get(name, speeds), strict=True)]
    print("| flags |", " | ".join(kernel.name for kernel in cpu.KERNELS), "| mean, MIPS | ratio |")
    print("| --- |", " | ".join("---" for _ in cpu.KERNELS), "| --- | --- |")
    means = {name: math.exp(statistics.mean(map(math.log, speeds))) for name, speeds in best.items()}
    for name, speeds in best.items():
        cells = " | ".join(f"{speed:.0f}" for speed in speeds)
        print(f"| {name} | {cells} | {means[name]:.0f} | {means[name] / means[BASE]:.3f} |")


if __name__ == "__main__":
    main()
