"""Saved machines: a snapshot's directory copied out and in by plain programs, on a real mount."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from mount.test_forks import ONCE, number, put
from mounting import Machine, failing

SMALL = 4 << 20


@pytest.fixture
def saved(vm, tmp_path) -> Path:
    """One that has run once, of 4 MiB."""
    vm.write("mem_size", f"{SMALL}\n")
    vm.load(ONCE)
    vm.run()
    put(vm, 0x234567, b"somewhere")
    (vm / "snap" / "one").mkdir()
    subprocess.run(["cp", "-r", vm / "snap" / "one", tmp_path / "saved"], check=True)
    return tmp_path / "saved"


COPIERS = {
    "cp": ["cp", "-r", "{source}", "{target}"],
    "cp -a": ["cp", "-a", "{source}", "{target}"],
    "rsync": ["rsync", "-a", "{source}/", "{target}"],
    "rsync -S": ["rsync", "-rS", "{source}/", "{target}"],
    "tar": ["sh", "-c", 'mkdir "{target}" && tar -cSf - -C "{source}" . | tar -xSf - -C "{target}"'],
    "tar -x": ["sh", "-c", 'tar -cf - -C "{source}" . | (mkdir "{target}" && tar -xf - -C "{target}")'],
    "python": ["python3", "-c", "import shutil; shutil.copytree('{source}', '{target}', dirs_exist_ok=True)"],
}


@pytest.mark.parametrize("copier", COPIERS)
def test_in_by_plain_programs(vm, saved, server, copier):
    words = COPIERS[copier]
    if not shutil.which(words[0]):
        pytest.skip(f"there is no {words[0]}")
    other = server.make()
    target = other / "snap" / "in"
    subprocess.run([word.format(source=saved, target=target) for word in words], check=True)
    assert other.read("snap/in/info").splitlines()[-1].startswith("whole"), other.read("snap/in/info")
    other.write("restore", "in\n")
    assert other.read("mem_size") == f"{SMALL}\n" and other.read("state") == "halted\n" and number(other) == 1
    assert number(other, 0x234567) == int.from_bytes(b"some", "little")
    assert other.run() == "hlt rip=0x1006\n" and number(other) == 2
    other.write("restore", "in\n")
    assert number(other) == 1 and "memory 4194304" in other.read("snap/in/info")
    assert (other / "mem").stat().st_size == SMALL
    other.path.rmdir()


def test_what_is_in_it_is_the_same_again(vm, saved, server, tmp_path):
    other = server.make()
    subprocess.run(["cp", "-r", saved, other / "snap" / "in"], check=True)
    other.write("restore", "in\n")
    subprocess.run(["cp", "-r", other / "snap" / "in", tmp_path / "again"], check=True)
    for name in ("mem", "state"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "again")) == ["disks", "images", "info", "mem", "state"]
    other.write("fork", "of-saved from in\n")
    child = Machine(server.path / "of-saved")
    assert number(child) == 1
    child.path.rmdir()
    other.path.rmdir()


def test_a_machine_of_the_same_parts_goes_on_with_what_it_has(vm, saved):
    pid = vm.read("stat").split("pid ")[1].split()[0]
    subprocess.run(["cp", "-r", saved, vm / "snap" / "in"], check=True)
    put(vm, 0x234567, b"elsewhere")
    vm.run()
    vm.write("restore", "in\n")
    assert number(vm) == 1 and number(vm, 0x234567) == int.from_bytes(b"some", "little")
    vm.write("restore", "one\n")
    assert number(vm) == 1 and vm.read("stat").split("pid ")[1].split()[0] == pid


def test_nobody_else_writes_into_a_snapshot(vm):
    (vm / "snap" / "mine").mkdir()  # this process may
    assert subprocess.run(["setsid", "sh", "-c", f"echo > {vm / 'snap/mine/mem'}"], stderr=-3).returncode
    assert "only read" in vm.read("error")
    assert subprocess.run(["setsid", "touch", f"{vm / 'snap/mine/file'}"], stderr=-3).returncode
    assert subprocess.run(["setsid", "rm", "-f", f"{vm / 'snap/mine/mem'}"], stderr=-3).returncode
    vm.write("restore", "mine\n")


def broken(folder: Path, path: str) -> None:
    """Change a file of a copy by an action of its name."""
    data = (folder / "state").read_bytes()
    {
        "no state": lambda: (folder / "state").unlink(),
        "no mem": lambda: (folder / "mem").unlink(),
        "short mem": lambda: os.truncate(folder / "mem", SMALL - 4096),
        "long mem": lambda: os.truncate(folder / "mem", SMALL + 4096),
        "short state": lambda: os.truncate(folder / "state", len(data) - 100),
        "empty state": lambda: os.truncate(folder / "state", 0),
        "other state": lambda: (folder / "state").write_bytes(b"\xc1" * 1000),
        "another format": lambda: (folder / "state").write_bytes(data.replace(b"\xa6format\x01", b"\xa6format\x02")),
        "more memory": lambda: (folder / "state").write_bytes(data.replace(b"\xce\0\x40\0\0", b"\xce\0\x50\0\0")),
    }[path]()  # fmt: skip


@pytest.mark.parametrize(
    "what",
    ["no state", "no mem", "short mem", "long mem", "short state", "empty state", "other state", "another format",
     "more memory"],
)  # fmt: skip
def test_one_that_is_not_whole_is_refused_and_nothing_changes(vm, saved, server, what):
    broken(saved, what)
    other = server.make()
    subprocess.run(["cp", "-r", saved, other / "snap" / "in"], check=True)
    before = other.read("registers")
    assert other.read("snap/in/info").splitlines()[0] == "arriving" and "wrong " in other.read("snap/in/info")
    assert failing(lambda: other.write("restore", "in\n")) == errno.EINVAL
    assert other.read("error").startswith("restore: in is no whole machine: ") and other.read("error").count("\n") == 1
    assert failing(lambda: other.write("fork", "of-broken from in\n")) == errno.EINVAL
    assert other.read("registers") == before and other.read("mem_size") == f"{128 << 20}\n"
    (other / "snap" / "in").rmdir()
    assert os.listdir(other / "snap") == []
    other.path.rmdir()


def test_one_that_was_mended(vm, saved, server):
    broken(saved, "short mem")
    other = server.make()
    subprocess.run(["cp", "-r", saved, other / "snap" / "in"], check=True)
    assert failing(lambda: other.write("restore", "in\n")) == errno.EINVAL
    os.truncate(other / "snap" / "in" / "mem", SMALL)
    other.write("restore", "in\n")
    assert number(other) == 1
    other.path.rmdir()


def test_with_a_disk_and_an_image(server, tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    vm, other = server.make(), server.make()
    vm.write("machine", "pc\n")
    vm.write("dev/add", f"blk {image} cow\n")
    vm.write("dev/add", "rng\n")
    vm.write("initrd", b"an initrd")
    (vm / "snap" / "one").mkdir()
    assert os.listdir(vm / "snap" / "one" / "images") == ["initrd"]
    subprocess.run(["cp", "-r", vm / "snap" / "one", tmp_path / "saved"], check=True)
    vm.path.rmdir()
    subprocess.run(["cp", "-r", tmp_path / "saved", other / "snap" / "in"], check=True)
    other.write("restore", "in\n")
    assert {"blk0", "rng0"} <= set(os.listdir(other / "dev")) and other.read("initrd") == "an initrd"
    assert other.read("machine") == "pc\n" and "mode cow" in other.read("dev/blk0/info")
    other.path.rmdir()
    third = server.make()
    image.unlink()
    subprocess.run(["cp", "-r", tmp_path / "saved", third / "snap" / "in"], check=True)
    assert failing(lambda: third.write("restore", "in\n")) == errno.ENOENT and str(image) in third.read("error")
    assert third.read("machine") == "bare\n"
    image.write_bytes(bytes(2 << 20))
    assert failing(lambda: third.write("restore", "in\n")) == errno.EINVAL and third.read("machine") == "bare\n"
    third.path.rmdir()
