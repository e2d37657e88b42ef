"""The file `engine`: a machine moves from one engine to another, and its files with it."""

from __future__ import annotations

import errno
import mmap
import os

from mounting import failing, running

COUNT_OUT = "ff06 0020 e680 ebf8"  # inc word [0x2000]; out 0x80, al; jmp
STATES = ("regs", "sregs", "xsave", "msrs", "cpuid")


def available(server):
    lines = (server.path / "engines").read_text().splitlines()
    return [line.split()[0] for line in lines if " available=yes " in line]


def test_a_machine_moves_to_every_engine_and_back(server, vm):
    """Between two exits of one program; RAM that is mapped stays what the guest has."""
    home = vm.read("engine").strip()
    vm.load(COUNT_OUT)
    fd = os.open(vm / "mem", os.O_RDWR)
    try:
        with mmap.mmap(fd, 0x3000) as ram:
            for count, name in enumerate([*available(server), home], 1):
                vm.write("engine", name)
                assert vm.read("engine") == f"{name}\n"
                assert vm.run().startswith("io direction=out port=0x80 size=1 ")
                assert ram[0x2000:0x2002] == bytes((count, 0))
                for state in STATES:
                    assert len((vm / state).read_bytes()) == (vm / state).stat().st_size, state
    finally:
        os.close(fd)


def test_a_running_machine_does_not_move(server, vm):
    home = vm.read("engine").strip()
    vm.load("ebfe")
    vm.write("state", "run")
    running(vm)
    for name in available(server):
        assert failing(vm.write, "engine", name) == errno.EBUSY
        assert "running" in vm.read("error")
    vm.write("state", "pause")
    assert vm.read("engine") == f"{home}\n"
