"""The kernel is built and booted once; every test gets a fork of it, booted, and may do to it what it likes."""

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CC = ("gcc", "-m32", "-march=i686", "-O1", "-g", "-Wall", "-Wextra", "-ffreestanding", "-fno-pic",
      "-fno-stack-protector", "-fcf-protection=none", "-nostdlib", "-static",
      "-Wl,--build-id=none,-z,noexecstack,-T,kernel.ld")  # fmt: skip


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    """The kernel as an ELF file, with symbols."""
    made = tmp_path_factory.mktemp("kernel") / "kernel.elf"
    subprocess.run([*CC, "-o", made, "boot.S", "kernel.c"], cwd=HERE, check=True)
    return made


@pytest.fixture(scope="session")
def vmfs_boot(kernel):
    return {"kernel": kernel, "symbols": kernel, "cmdline": None, "ready": "> ",
            "settings": {"mem_size": "16M", "engine": "emulator"}}  # fmt: skip
