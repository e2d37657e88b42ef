"""A Debian is told that it is another machine than it was: by a fork, a restore, and a machine that came in."""

from __future__ import annotations

import os
import subprocess

import pytest
from pc.conftest import Pc
from pc.kernels import GENERIC, needs_kernels

pytestmark = needs_kernels


def generation(pc: Pc) -> str:
    """The ID, as a user sees it."""
    (line,) = [line for line in pc.read("dev/vmgenid/info").splitlines() if line.startswith("id ")]
    return line


def told(pc: Pc) -> tuple[int, int]:
    """How often the guest has had an event, and how often its kernel took new randomness for it."""
    events = int(pc.shell("cat /sys/firmware/acpi/interrupts/gpe00").split()[0])
    return events, pc.shell("dmesg").count("crng reseeded due to virtual machine fork")


@pytest.fixture
def other(pc_mount):
    """Machines that are there already, and end with the test."""
    made = []

    def one(name: str) -> Pc:
        made.append(Pc(pc_mount / f"{name}-{os.getpid()}"))
        return made[-1]

    yield one
    for pc in made:
        pc.remove()


def test_linux_takes_new_randomness(linux, other, tmp_path):
    pc = linux(kernel=GENERIC, mem="128M")
    pc.shell("dd if=/dev/random bs=1 count=1 2>/dev/null | wc -c")  # once there is any
    pc.shell("ls /sys/bus/acpi/drivers/vmgenid/VMFS0001:00")
    first = generation(pc)
    (pc.path / "snap" / "one").mkdir()
    assert told(pc) == (0, 0) and generation(pc) == first

    pc.write("fork", f"forked-{os.getpid()} from one\n")
    subprocess.run(["cp", "-r", pc.path / "snap" / "one", tmp_path / "one"], check=True)
    loaded = pc.path.parent / f"loaded-{os.getpid()}"
    loaded.mkdir()
    subprocess.run(["cp", "-r", tmp_path / "one", loaded / "snap" / "in"], check=True)
    (loaded / "restore").write_text("in\n")
    pc.write("state", "pause\n")
    pc.ended()
    pc.write("restore", "one\n")
    machines = [pc, other("forked"), other("loaded")]
    ids = {first, *map(generation, machines)}
    assert len(ids) == 4
    for one in machines:
        one.start()
        assert told(one) == (1, 1), one.path
    assert {first, *map(generation, machines)} == ids
