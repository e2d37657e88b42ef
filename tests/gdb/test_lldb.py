"""Debian's lldb on a mount. It is large (some 500 MB with what it needs), so `make setup` does not install it."""

from __future__ import annotations

import subprocess

from gdb.conftest import needed
from mounting import SOON


def lldb(machine, elf, *commands: str) -> str:
    machine.write("gdb", "127.0.0.1:0\n")
    asked = [f"target create '{elf}'", f"gdb-remote {machine.read('gdb').strip()}", *commands]
    done = subprocess.run(
        [needed("lldb"), "-b", "-x", *(part for one in asked for part in ("-o", one))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SOON,
    )
    return done.stdout


def test_a_session(in_kernel, guest):
    elf = guest[2]
    said = lldb(
        in_kernel,
        elf,
        "register read cr0 efer",
        "b work",
        "continue",
        "register read rdi",
        "bt",
        "si",
        "register write rdi 7",
        "finish",
        "p (long)counter",
        "memory write -s 8 `&counter` 0x55",
        "memory read -s 8 -c 1 -f x `&counter`",
        "breakpoint delete -f",
        "watchpoint set expression -s 8 -- &counter",
        "continue",
        "memory region 0x40000000",
        "process plugin packet monitor mode",
        "thread list",
        "detach",
    )
    parts = (
        "cr0 = 0x00000000e0000011",
        "efer = 0x0000000000000500",
        "stop reason = breakpoint 1.1",
        "rdi = 0x0000000000000001",
        "frame #1: 0x",
        "stop reason = instruction step into",
        "stop reason = step out",
        "= 14",
        "0x0000000000000055",
        "Watchpoint 1 hit:",
        "new value: 0x0000000000000004",
        "[0x0000000040000000-0x0000007f80000000) ---",
        "long",
        "tid = 0x0001",
        "detached",
    )
    at = 0
    for part in parts:
        found = said.find(part, at)
        assert found >= 0, f"{part!r} is missing, or not in its place, in:\n{said}"
        at = found + len(part)
    assert in_kernel.read("debug") == "0\n"
    assert in_kernel.read("state") == "paused\n"
