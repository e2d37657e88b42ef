"""The sessions that people copy do what they show: `make demo`, and the one in the README."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def commands(text):
    """[(command, output it shows)] of the session in a README: indented, `$ ` before a command."""
    session = re.search(r"## A session to copy\n\n((?:    .*\n)+)", text)[1]
    shown = [line.removeprefix("    ") for line in session.splitlines()]
    found = []
    for line in shown:
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line)
    return found


def test_the_session_in_the_readme(engine, tmp_path):
    session = commands((ROOT / "README.md").read_text())
    assert len(session) > 10
    mark = "=====next command====="
    # /tmp/vmfs is what the README says; several of these may run at a time.
    script = "".join(f"{command}\necho '{mark}'\n" for command, _ in session)
    for said, meant in ("/tmp/vmfs", '"$HOME"/vmfs'), ("vmfs mount ", f"vmfs mount --engine {engine} "):
        script = script.replace(said, meant)
    # As a fresh shell has it: the command is found by the session's own first line, where the clone has its .venv.
    fresh = [each for each in os.environ["PATH"].split(":") if not (Path(each) / "vmfs").exists()]
    if BIN != ROOT / ".venv" / "bin":
        fresh.append(str(BIN))
    environment = {**os.environ, "PATH": ":".join(fresh), "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          cwd=ROOT, env=environment)
    printed = done.stdout.split(f"{mark}\n")[:-1]
    shown = ["".join(f"{line}\n" for line in output) for _, output in session]
    assert list(zip(printed, [command for command, _ in session], strict=True)) == \
        list(zip(shown, [command for command, _ in session], strict=True))
    assert os.listdir(tmp_path / "vmfs") == []


def test_the_c_in_the_readme_compiles(tmp_path):
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    snippet = re.search(r"```c\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    source = tmp_path / "readme.c"
    source.write_text(f"#include <stdio.h>\n#include <vmfs.h>\nint main(void)\n{{\n{snippet}return 0;\n}}\n")
    flags = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-result", f"-I{ROOT}/vmfs/include"]
    done = subprocess.run(["gcc", *flags, "-o", tmp_path / "readme", source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
