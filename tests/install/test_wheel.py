"""The wheel is installed where there is no compiler and no pyfuse3, and works there: as a library and as a client."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from mounting import SANITIZED

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(SANITIZED, reason="`make asan`: a wheel is built without")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Of this tree, linked from the objects that are built already."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", folder / "lib"]
    command += ["bdist_wheel", "--bdist-dir", folder / "tree", "-d", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = {name for name in names if name.endswith(".so")}
    assert built == {str(path.relative_to(ROOT)) for path in ROOT.glob(f"vmfs/**/*{suffix}")}
    assert "vmfs/include/vmfs.h" in names and "vmfs/files.md" in names
    assert not [name for name in names if name.endswith((".c", ".def")) or name.startswith("tests")]
    command = ["objdump", "-p", *(ROOT / name for name in built)]
    needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED +(\S+)", needed)) <= {"libc.so.6", "libm.so.6"}, "libfuse is found at run time"


def test_it_is_installed_without_a_compiler(wheel, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    keep = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name == "HOME"}
    environment = {**keep, "PATH": str(venv / "bin"), "CC": "/nonexistent"}

    def run(*command, code=0) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    pip = sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "--disable-pip-version-check"
    run(*pip, "install", "-q", "--no-compile", "--only-binary", ":all:", wheel)
    assert run(venv / "bin" / "python", Path(__file__).with_name("checks.py")) == ""
    assert "vm_run" in run("vmfs", "help", "vm_run") and "usage: vmfs boot" in run("vmfs", "boot", "--help")
    found = run("vmfs", "doctor", code=1)
    assert re.search(r"^missing +pyfuse3 .*\n +-> pip install 'vmfs\[mount\]'$", found, re.MULTILINE)
