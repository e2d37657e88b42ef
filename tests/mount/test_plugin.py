"""The pytest plugin in projects of its users: fixtures, and what the report of a failing test shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROJECT = """
import pytest
from vmfs.words import exits

@pytest.mark.vmfs(mem_size="16M", mode="long")
class TestIt:
    def test_good(self, vm, make_vm):
        vm.mem[0x1000:0x1003] = bytes.fromhex("e680f4")
        vm.regs.rip = 0x1000
        assert isinstance(vm.run(), exits.Io)
        assert make_vm(mem_size="1M").mem_size == 1 << 20

    @pytest.mark.vmfs(mem_size="8M")
    def test_bad(self, vm):
        assert (vm.mem_size, vm.mode) == (8 << 20, "long")
        vm.mem[0x1000:0x1002] = bytes.fromhex("0f0b")  # ud2, and there is no IDT
        vm.regs.update(rip=0x1000, rax=0x1122334455667788)
        assert isinstance(vm.run(), exits.Hlt)
"""

LIBRARY = """
import pytest

@pytest.mark.machine(memory={0x1000: bytes.fromhex("48ffc0f4")})  # inc rax; hlt
def test_good(machine):
    machine.rip, machine.rax = 0x1000, 41
    assert machine.run().REASON == "hlt" and machine.rax == 42

@pytest.mark.machine(mode="real", memory={0x1000: bytes.fromhex("0f0b")})
def test_bad(machine):
    machine.rip, machine.rbx = 0x1000, 0x77
    assert machine.run().REASON == "hlt"
"""


def run_pytest(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={folder}", "-p", "no:cacheprovider"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, *options, str(folder)],
        cwd=folder,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def project(any_engine, tmp_path) -> Path:
    (tmp_path / "test_project.py").write_text(PROJECT)
    return tmp_path


def mounts_in(folder: Path) -> list[str]:
    return [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]


def test_a_failing_test_shows_its_machine_and_nothing_stays(project):
    ran = run_pytest(project, "--vmfs-engine", "emulator", TMPDIR=str(project))
    assert "1 failed, 1 passed" in ran.stdout, ran.stdout
    (shown,) = re.findall(r"-+ vmfs machine test_bad-\d+-0 -+\n(.*?)\n===", ran.stdout, re.DOTALL)
    assert "state shutdown; last exit: shutdown cause=triple-fault rip=0x1000\n" in shown
    assert "rax 1122334455667788" in shown and "rip 0000000000001000" in shown
    assert mounts_in(project) == []
    assert not list(project.glob("vmfs-*"))


def test_the_machine_of_a_failing_test_is_kept_when_asked(project):
    ran = run_pytest(project, "--vmfs-keep", "--vmfs-engine", "emulator", TMPDIR=str(project))
    (kept,) = map(Path, re.findall(r"-+ vmfs kept -+\n(.*)\n", ran.stdout))
    try:
        assert (kept / "reg/rax").read_text() == "0x1122334455667788\n"
        assert [each.name for each in kept.parent.iterdir() if each.is_dir()] == [kept.name]  # the good one's are gone
    finally:
        subprocess.run(["fusermount3", "-u", kept.parent], check=True)


def test_workers_of_xdist_have_a_mount_each(project):
    ran = run_pytest(project, "-n", "2", "--vmfs-engine", "emulator", TMPDIR=str(project))
    assert "1 failed, 1 passed" in ran.stdout, ran.stdout
    assert "vmfs machine test_bad" in ran.stdout
    assert not list(project.glob("vmfs-*"))


def test_a_mount_that_is_there_is_used_and_left(project, mount):
    before = sorted(each.name for each in mount.iterdir())
    ran = run_pytest(project, "--vmfs-mount", str(mount), "-k", "good")
    assert "1 passed" in ran.stdout, ran.stdout
    assert sorted(each.name for each in mount.iterdir()) == before


def test_where_nothing_can_be_mounted_tests_skip_with_the_reason(project):
    ran = run_pytest(project, "-rs", TMPDIR=str(project), PATH="/nowhere")
    assert "2 skipped" in ran.stdout and "fusermount3 is not installed" in ran.stdout, ran.stdout


def test_booted_says_what_it_needs(project):
    (project / "test_project.py").write_text("def test(booted): pass\n")
    ran = run_pytest(project, TMPDIR=str(project))
    assert "needs a fixture vmfs_boot in conftest.py" in ran.stdout and ran.returncode == 1


def test_machines_of_the_library_need_no_mount(project):
    (project / "test_project.py").write_text(LIBRARY)
    ran = run_pytest(project, PATH="/nowhere", TMPDIR=str(project))
    assert "1 failed, 1 passed" in ran.stdout, ran.stdout
    assert "last exit: debug cause=exception id=1 vector=0x6 rip=0x1000\nregisters:\n" in ran.stdout
    assert "rbx 0000000000000077" in ran.stdout


def test_what_does_not_boot_is_told_with_its_machine(project):
    (project / "conftest.py").write_text(
        "import pytest\n@pytest.fixture(scope='session')\ndef vmfs_boot():\n"
        "    sector = bytes.fromhex('baf803 b053 ee faf4').ljust(510, bytes(1)) + bytes.fromhex('55aa')\n"
        "    return dict(kernel=sector, cmdline=None, ready='never', timeout=1,\n"
        "                settings=dict(mem_size='16M', engine='emulator'))\n"
    )
    (project / "test_project.py").write_text("def test(booted): pass\n")
    ran = run_pytest(project, TMPDIR=str(project))
    assert "the machine for `booted` did not boot: 'never' did not come within 1 s after:\n" in ran.stdout, ran.stdout
    assert "last exit: hlt rip=" in ran.stdout
    assert not list(project.glob("vmfs-*"))


def test_the_course_passes(any_engine, tmp_path):
    ran = run_pytest(ROOT / "examples/course", TMPDIR=str(tmp_path))
    assert re.search(r"\b11 passed\b", ran.stdout), ran.stdout
