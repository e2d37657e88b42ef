"""Debian's gdb goes backwards: in a small kernel, and in a Debian."""

from __future__ import annotations

import contextlib

import pytest
from gdb.test_gdb import gdb, in_order, pipe
from mounting import wait_until


def switched_on(machine) -> bool:
    """Once no program has `mem` open any more: closes come a moment later."""
    with contextlib.suppress(OSError):
        machine.write("history", "on\n")
    return machine.read("history").startswith("on")


@pytest.fixture
def recorded(in_kernel):
    if in_kernel.read("engine") != "emulator\n":
        pytest.skip("KVM does not repeat what it has done")
    wait_until(lambda: switched_on(in_kernel))
    in_kernel.write("vm_run", "insns 300\n")
    return in_kernel


def test_reverse_of_all_kinds(recorded, guest):
    """To breakpoints, out of a function, to writes, by instructions and lines, over a call, to the begin, and on."""
    said = gdb(
        guest[2],
        pipe(recorded),
        "p $rbx",
        "break work",
        "reverse-continue",
        "p $rbx",
        "reverse-continue",
        "p $rbx",
        "reverse-finish",
        "x/i $pc",
        "delete",
        "watch *(long *)&counter",
        "reverse-continue",
        "x/i $pc",
        "reverse-continue",
        "p *(long *)&counter",
        "delete",
        "stepi",
        "p *(long *)&counter",
        "reverse-stepi",
        "p *(long *)&counter",
        "reverse-step",
        "tbreak 11",
        "continue",
        "p $rbx",
        "reverse-next",
        "reverse-next",
        "reverse-continue",
        "stepi",
        "p $rbx",
        "break forever",
        "continue",
        "p $rbx",
    )
    in_order(
        said,
        "$1 = 28",
        "Breakpoint 1, work",
        "$2 = 27",
        "Breakpoint 1, work",
        "$3 = 26",
        "call ",
        "Old value = 50\nNew value = 48\n",
        "mov    %rax,0x4(%rip)",
        "Old value = 48\nNew value = 46\n",
        "$4 = 46",
        "$5 = 48",
        "$6 = 46",
        "24\t",  # the line before
        "11\t",
        "$7 = 24",
        "10\t",  # over the call, and not into it
        "9\t",
        "No more reverse-execution history.",
        "$8 = 305419896",  # as the firmware left it
        "forever ()",
        "$9 = 50",
    )


def test_a_machine_without_a_history_says_so(in_kernel, guest):
    said = gdb(guest[2], pipe(in_kernel), "reverse-stepi")
    assert "does not support" in said
