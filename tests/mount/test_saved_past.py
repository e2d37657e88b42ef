"""A machine is saved with its past, and goes back in it elsewhere: as a directory, and as one file."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess

import pytest
from engine.asm import assemble
from mount.test_saved import vmfs
from mounting import Machine, failing

SMALL = 4 << 20
# Counts in memory, and dies of what was typed: of `x` it has no way out.
DIES = """
l: inc rbx; mov [0x7000], rbx; mov dx, 0x3fd; in al, dx; test al, 1; je l
   mov dx, 0x3f8; in al, dx; mov [0x7008], al; inc rcx; cmp al, 'x'; jne l; lidt [rip + no]; int3; no: .quad 0, 0
"""


@pytest.fixture
def dead(server) -> Machine:
    """It was typed into, and has shut down."""
    vm = server.make()
    if not vm.read("engine").startswith("emulator"):
        vm.path.rmdir()
        pytest.skip("KVM does not repeat what it has done")
    vm.write("mem_size", f"{SMALL}\n")
    vm.write("machine", "pc\n")
    vm.write("time", "instructions\n")
    vm.write("mode", "long\n")
    with open(vm / "mem", "r+b") as memory:
        memory.seek(0x1000)
        memory.write(assemble(DIES, "long").code)
    vm.write("reg/rip", "0x1000\n")
    vm.write("history", "on\n")
    for text in ("ab", "cx"):
        vm.write("console", text)
        vm.write("vm_run", "insns 200000\n")
    assert vm.read("state") == "shutdown\n"
    return vm


def past_of(vm: Machine) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in vm.read("history").splitlines() if " " in line)


def walk(vm: Machine, places: list[int]) -> list[tuple[str, ...]]:
    found = []
    for place in places:
        vm.write("vm_run", f"goto {place}\n")
        found.append((place, vm.read("exit"), vm.read("state"), vm.read("registers")))
    return found


@pytest.mark.parametrize("way", ["file", "cp", "rsync"])
def test_a_dead_machine_goes_back_elsewhere(dead, server, tmp_path, way):
    end, shut, why = int(past_of(dead)["now"]), dead.read("exit"), dead.read("why")
    places = [end, 5, end // 2, 200_000, end - 1, end]
    (dead / "snap" / "dead").mkdir()
    other = Machine(server.path / f"again-{way}")
    if way == "file":
        assert vmfs("save", "--history", f"{dead.path}:dead", tmp_path / "file").stderr == ""
        assert vmfs("load", tmp_path / "file", other.path).stderr == ""
    else:
        if not shutil.which(way):
            pytest.skip(f"there is no {way}")
        assert sorted(os.listdir(dead / "snap/dead/history")) == ["mem", "record"]
        out, folder = tmp_path / "saved", other / "snap"
        subprocess.run(["cp", "-r", dead / "snap" / "dead", out], check=True)
        other.path.mkdir()
        words = {
            "cp": ["cp", "-r", out, folder / "saved"],
            "rsync": ["rsync", "-aI", f"{out}/", folder / "saved"],
        }
        subprocess.run(words[way], check=True)
        assert other.read("snap/saved/info").splitlines()[-1].startswith("whole"), other.read("snap/saved/info")
        other.write("restore", "saved\n")
        assert other.read("history") == "off\n"
        other.write("history", "on\n")
    assert past_of(other)["from"] == past_of(dead)["from"] and past_of(other)["to"] == str(end)
    assert walk(other, places) == walk(dead, places)
    assert other.read("exit") == shut and other.read("state") == "shutdown\n"
    other.write("vm_run", f"goto {end - 60}\n")
    other.write("vm_run", "run\n")
    assert other.read("exit") == shut and other.read("why") == why
    other.write("vm_run", "back 3\n")
    assert other.read("state") == "paused\n" and past_of(other)["past"] == "yes"
    other.write("writer", "phys:0x7008 1\n")
    assert "new=0x78" in other.read("writer")  # the x
    other.path.rmdir()
    dead.path.rmdir()


def test_it_is_left_out_unless_asked_for(dead, server, tmp_path):
    assert vmfs("save", dead.path, tmp_path / "file").stderr == ""
    other = Machine(server.path / "without-past")
    assert vmfs("load", tmp_path / "file", other.path).stderr == ""
    assert other.read("history") == "off\n" and other.read("state") == "shutdown\n"
    assert "has no past to save" in vmfs("save", "--history", other.path, tmp_path / "no").stderr
    assert not (tmp_path / "no").exists() and os.listdir(other / "snap") == []
    other.path.rmdir()
    dead.path.rmdir()


@pytest.mark.parametrize("what", ["record", "mem", "cut"])
def test_a_damaged_past_is_refused(dead, server, tmp_path, what):
    (dead / "snap" / "dead").mkdir()
    out = tmp_path / "saved"
    subprocess.run(["cp", "-r", dead / "snap" / "dead", out], check=True)
    record = out / "history" / "record"
    {
        "record": record.unlink,
        "mem": lambda: os.truncate(out / "history" / "mem", SMALL - 4096),
        "cut": lambda: os.truncate(record, record.stat().st_size - 40),
    }[what]()
    other = server.make()
    subprocess.run(["cp", "-r", out, other / "snap" / "in"], check=True)
    before = other.read("registers")
    assert failing(lambda: other.write("restore", "in\n")) == errno.EINVAL
    assert "history/" in other.read("error") and other.read("registers") == before
    other.path.rmdir()
    dead.path.rmdir()
