"""The sessions that people copy do what they show: `make demo`, and the one in the README."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import guides
import pytest
from mounting import reason_against

from vmfs.engine import ENGINES

ROOT = Path(__file__).resolve().parents[2]
KERNEL = ROOT / ".cache" / "kernels" / "cloud" / "vmlinuz"
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.skipif(not (BIN / "vmfs").exists(), reason=f"{BIN}/vmfs is not installed: make setup")


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def engine(request):
    reason = reason_against(request.param)
    if reason:
        pytest.skip(reason)
    return request.param.name


@pytest.mark.timeout(600)  # ten seconds, on a host that has nothing else to do
def test_the_demo(engine):
    environment = {**os.environ, "VMFS_ENGINE": engine, "PATH": f"{BIN}:{os.environ['PATH']}"}
    # Linux is on the emulator, whatever the first machine is on: once will do.
    whole = engine == "emulator" and KERNEL.exists()
    command = ["scripts/demo.sh", *([] if whole else ["short"])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert ("I am the second" in done.stdout) == whole


def test_the_session_in_the_readme(engine, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    # As a fresh shell has it: the command is found by the session's own first line, where the clone has its .venv.
    fresh = [each for each in os.environ["PATH"].split(":") if not (Path(each) / "vmfs").exists()]
    if BIN != ROOT / ".venv" / "bin":
        fresh.append(str(BIN))
    meant = {"/tmp/vmfs": str(home / "vms"), "vmfs mount ": f"vmfs mount --engine {engine} "}
    guides.run(ROOT / "README.md", home, meant, start=ROOT, path=":".join(fresh))
    assert os.listdir(home / "vms") == []


def test_the_c_in_the_readme_compiles(tmp_path):
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    snippet = re.search(r"```c\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    source = tmp_path / "readme.c"
    source.write_text(f"#include <stdio.h>\n#include <vmfs.h>\nint main(void)\n{{\n{snippet}return 0;\n}}\n")
    flags = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-result", f"-I{ROOT}/vmfs/include"]
    done = subprocess.run(["gcc", *flags, "-o", tmp_path / "readme", source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
