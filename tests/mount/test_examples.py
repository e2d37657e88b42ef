"""The programs in examples/, each on a real mount of each engine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vmfs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
INCLUDE = Path(vmfs.__file__).parent / "include"
CFLAGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{INCLUDE}"]

# What runs each (or, for `vcpu.c`, what compiles it), and a part of what it prints.
RUN = {
    "hello.sh": (["bash"], "it printed 'Hello from a guest'"),
    "watch.sh": (["bash"], "data=0x2a rip=0x1017"),
    "ports.pl": (["perl"], "the guest wrote: EVERY VM IS A DIRECTORY."),
    "trace.lua": (["lua5.4"], "60 instructions, 8 steps from 6 to 1"),
    "profile.py": ([sys.executable], "rounds while it was running"),
    "corrupted.sh": (["bash"], """rename(&tasks[6], "the seventieth task's")\n--- called before list.c:52\n"""),
    "vcpu.c": (["gcc", "-std=gnu99", "-x", "c"], "stored 42, and ended with rax 0x6b"),
    "vcpu.c as C++": (["g++", "-std=c++11", "-x", "c++"], "stored 42, and ended with rax 0x6b"),
}
# Which other tests run the rest, and by what words.
ELSEWHERE = {
    "course": ("mount/test_plugin.py", '"examples/course"'),
    "matrix.py": ("fleet/proof.py", '"matrix.py"'),
    "fuzz.py": ("library/test_examples.py", '"fuzz.py"'),
}
PARTS = {"README.md", "guest"}  # `guest` is what fuzz.py fuzzes, and corrupted.sh looks into


def test_every_example_is_run_here():
    tests = Path(__file__).parents[1]
    gallery = (tests / "pc" / "test_gallery.py").read_text()
    others = {path.name for path in EXAMPLES.iterdir() if f'script("{path.name}"' in gallery}
    others |= {name for name, (where, words) in ELSEWHERE.items() if words in (tests / where).read_text()}
    there = {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"}
    assert there == {name.split()[0] for name in RUN} | others | PARTS


def test_the_readme_names_every_example():
    readme = (EXAMPLES / "README.md").read_text()
    for name in (*RUN, *(path.name for path in EXAMPLES.glob("*.sh"))):
        assert f"[{name.split()[0]}]({name.split()[0]})" in readme


def command_of(name, folder):
    program, _ = RUN[name]
    if not shutil.which(program[0]):
        pytest.skip(f"{program[0]} is not installed")
    source = EXAMPLES / name.split()[0]
    if source.suffix != ".c":
        return [*program, source]
    executable = folder / source.stem
    subprocess.run([*program, *CFLAGS, source, "-o", executable], check=True)
    return [executable]


def run(command, mount):
    return subprocess.run([*command, mount], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", RUN)
def test_example(mount, tmp_path, name):
    before = os.listdir(mount)
    done = run(command_of(name, tmp_path), mount)
    assert done.returncode == 0, done.stdout + done.stderr
    assert RUN[name][1] in done.stdout
    assert done.stderr == ""
    assert os.listdir(mount) == before  # it has removed its machine


@pytest.mark.parametrize("name", RUN)
def test_example_fails_where_there_is_no_mount(tmp_path, name):
    """Their exit code means something."""
    missing = tmp_path / "missing"
    done = run(command_of(name, tmp_path), missing)
    assert done.returncode not in (0, -11)
    assert "missing" in done.stderr
    assert not missing.exists()
