"""Why a stock Linux has gone: a panic with reboot=t, which is a triple fault of the kernel's own making."""

from __future__ import annotations

import pytest
from pc.conftest import Pc, boot_linux
from pc.kernels import needs_kernels

pytestmark = needs_kernels


def sections(pc: Pc) -> dict[str, list[str]]:
    head, *rest = pc.read("why").split("\n\n")
    return {"head": head.splitlines()} | {each.split(":\n")[0]: each.split(":\n", 1)[1].splitlines() for each in rest}


@pytest.fixture
def pc(pc_mount):
    pc = Pc(pc_mount / "gone")
    yield pc
    pc.remove()


def test_a_panic_with_reboot_t(pc):
    boot_linux(pc, cmdline="reboot=t panic=-1")
    pc.expect("guest# ")
    pc.write("state", "pause")
    pc.ended()
    pc.write("symbols", "kallsyms")
    pc.start()
    pc.type("echo c > /proc/sysrq-trigger\n")
    assert pc.ended().startswith("shutdown cause=triple-fault")
    why = sections(pc)
    if pc.read("engine") != "emulator\n":
        return
    assert "native_machine_emergency_restart" in why["head"][0]
    (first, second, third) = why["faults"]
    assert "#BP" in first or "INT 0x3" in first, first
    assert "which has no entry" in first and third.endswith("so the CPU shuts down")
    executed = why["instructions"]
    assert executed[-1].split(": ")[1].split()[:1] == ["cc"], executed[-1]  # int3
    assert any("lidt" in line for line in executed[:-1]), executed
    assert len(executed) == 33 and sum("native_machine_emergency_restart" in line for line in executed) > 1
