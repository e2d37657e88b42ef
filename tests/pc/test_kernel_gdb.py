"""gdb on a stock Debian kernel with KASLR: its own symbols, found in its RAM, and breakpoints before it runs."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from pc.conftest import BOOT_SECONDS
from pc.kernels import needs_kernels

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed"),
]


def gdb(pc, *commands: str) -> subprocess.Popen:
    asked = ["set pagination off", "set confirm off", "set width 0"]
    asked += [f"target remote | {sys.executable} -m vmfs.cli gdb {pc.path}", *commands]
    return subprocess.Popen(
        ["gdb", "-nx", "-q", "-batch", pc.path / "symbols.elf", *(part for one in asked for part in ("-ex", one))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=BOOT_SECONDS)[0]
    finally:
        process.kill()


def test_a_running_kernel(linux):
    pc = linux(cmdline="kaslr")
    pc.write("state", "pause")
    assert pc.ended().startswith("interrupted")
    pc.write("symbols", "kallsyms")
    debugger = gdb(
        pc,
        "info threads",
        "p &linux_banner",
        "x/s &linux_banner",
        "break __x64_sys_mkdir",
        "continue",
        "bt 3",
        "p/x $cr0 & 0x80000001",
        "x/2i $pc",
        "finish",
        "monitor break do_sys_openat2 if rsi!=0 once",
        "continue",
        "info symbol $pc",
        "monitor delete all",
        "delete",
    )
    pc.type("mkdir /made; cat /proc/version; echo $((6 * 7))\n")
    text = said(debugger)
    place = 0
    for part in (
        "Linux version 6.",
        "Breakpoint 1, 0xffffffff",
        "__x64_sys_mkdir ()",
        "#1  0xffffffff",
        "$2 = 0x80000001",
        "in do_syscall_64 ()\n0\n1 break",
        "vmfs: debug cause=breakpoint",
        "do_sys_openat2 in section .text",
    ):
        found = text.find(part, place)
        assert found >= 0, f"{part!r} is missing, or not in its place, in:\n{text}"
        place = found + len(part)
    assert pc.read("state") == "paused\n" and pc.read("debug") == "0\n"
    pc.start()  # and it goes on
    pc.expect(r"\n42\r\n")
    pc.expect("guest# ")
    assert pc.shell("ls -d /made") == "/made\n"


def test_a_breakpoint_before_the_kernel_runs(linux):
    """Set when the machine is new: the kernel's page tables, and the kernel at that address, come long after."""
    pc = linux(cmdline="nokaslr")
    pc.write("state", "pause")
    pc.ended()
    pc.write("symbols", "kallsyms")
    pc.write("state", "reset")
    text = said(
        gdb(
            pc,
            "p $efer",
            "x/xb start_kernel",
            "break start_kernel",
            "continue",
            "p $efer",
            "x/s &linux_banner",
            "bt 2",
        )
    )
    place = 0
    for part in ("$1 = [ ", "Cannot access memory", "Breakpoint 1, 0xffffffff8", "start_kernel ()", "LMA", "Linux v"):
        found = text.find(part, place)
        assert found >= 0, f"{part!r} is missing, or not in its place, in:\n{text}"
        place = found + len(part)
