"""A Debian, live and in the host's time, whose past is kept from its shell on: gdb and files go back in it."""

from __future__ import annotations

import shutil
import time

import pytest
from pc.kernels import needs_kernels
from pc.test_kernel_gdb import gdb, said

pytestmark = [needs_kernels, pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")]


def values(text: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in text.splitlines())


def paused(pc) -> None:
    pc.write("state", "pause")
    assert pc.ended().startswith("interrupted")


def test_a_live_debian_goes_back(linux):
    pc = linux()
    paused(pc)
    pc.write("symbols", "kallsyms")
    pc.write("history", "on")
    assert pc.read("time") == "host\n"
    pc.start()
    assert "made" in pc.shell("mkdir /made; ls /")
    began = time.monotonic()
    pc.shell("sleep 1")
    assert time.monotonic() - began > 0.9  # it sleeps as long as the host
    assert pc.shell("rmdir /made; echo $((6 * 7))") == "42\n"
    paused(pc)
    history = values(pc.read("history"))
    end = int(history["to"])
    assert history["past"] == "no" and int(history["from"]) < end == int(history["now"])
    last = pc.read("exit")

    pc.write("writer", "jiffies_64 8")
    jiffies = dict(word.split("=") for word in pc.read("writer").split())
    assert jiffies["writer"] == "instruction" and int(jiffies["new"], 16) > int(jiffies["old"], 16)
    assert "symbol" in jiffies and pc.read("exit") == last and values(pc.read("history"))["past"] == "no"

    pc.write("vm_run", "back until __x64_sys_rmdir")
    assert pc.read("exit").startswith("debug cause=breakpoint ")
    removed = int(values(pc.read("history"))["now"])
    assert removed < end
    answer = said(
        gdb(
            pc,
            "info symbol $pc",
            "break __x64_sys_mkdir",
            "reverse-continue",
            "bt 2",
            "reverse-stepi",
            "info symbol $pc",
            "stepi",
            "info symbol $pc",
            "watch *(long *)&jiffies_64",
            "reverse-continue",
            "delete",
            "break __x64_sys_rmdir",
            "continue",
            "info symbol $pc",
        )
    )
    places = ["__x64_sys_rmdir", "Breakpoint 1, ", "__x64_sys_mkdir", "do_syscall_64"]
    places += ["__x64_sys_mkdir", "Old value", "__x64_sys_rmdir"]
    at = 0
    for place in places:
        at = answer.find(place, at)
        assert at >= 0, (place, answer)
        at += len(place)
    assert int(values(pc.read("history"))["now"]) == removed
    pc.write("vm_run", f"goto {end}")
    assert values(pc.read("history"))["past"] == "no"
    pc.start()
    assert pc.shell("echo $((6 * 9)); ls -d /made 2>&1 | wc -l") == "54\n1\n"  # and what it said before it says once
