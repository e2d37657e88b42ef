"""Debian's gdb on a mount: firmware from the reset vector on, and a kernel."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from engine.divergences import active
from gdb.conftest import needed
from gdb.guest import KERNEL_AT
from mounting import SOON, failing, wait_until

VMFS = f"{shlex.quote(sys.executable)} -m vmfs.cli"
ROOT = Path(__file__).parents[2]


def command(*arguments: str | Path) -> list[str]:
    fixed = ["-nx", "-q", "-ex", "set pagination off", "-ex", "set confirm off", "-ex", "set width 0"]
    fixed += ["-ex", f"set remotetimeout {SOON:.0f}"]  # 2 seconds are few on a busy machine
    return [needed("gdb"), *fixed, *map(str, arguments)]


def gdb(elf: Path | None, *commands: str) -> str:
    """What it says to some commands, in order."""
    asked = [part for one in commands for part in ("-ex", one)]
    files = [elf] if elf else []
    done = subprocess.run(
        command("-batch", *files, *asked),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SOON,
        cwd=ROOT,
    )
    return done.stdout


def pipe(machine, words: str = "") -> str:
    return f"target remote | {VMFS} gdb {shlex.quote(str(machine.path))} {words}"


def in_order(text: str, *parts: str) -> None:
    at = 0
    for part in parts:
        found = text.find(part, at)
        assert found >= 0, f"{part!r} is missing, or not in its place, in:\n{text}"
        at = found + len(part)


def test_one_session_from_the_reset_vector_to_a_kernel(booting, guest):
    firmware, _, kernel, _ = guest
    said = gdb(
        firmware,
        pipe(booting, "linear"),
        "p/x $pc",
        "x/2xb $pc",
        f"add-symbol-file {shlex.quote(str(kernel))}",
        "hbreak *&_start",
        "break work",  # long before there are page tables
        "break protected",
        "break long_mode",
        "delete 1",
        "stepi",
        "p/x $pc",
        "p $cr0",
        "continue",
        "p/x $ebx",
        "p $cr0",
        "continue",
        "p $efer",
        "p $cr4",
        "continue",
        "p $rdi",
        "bt",
        "info threads",
    )
    in_order(
        said,
        "$1 = 0xfffffff0",
        "0xea",
        "Breakpoint 2 at 0xffffffff8010",
        "$2 = 0xf0000",
        "$3 = [ ",
        "Breakpoint 3, protected ()",
        "$4 = 0x12345678",
        "$5 = [ PE",
        "Breakpoint 4, long_mode ()",
        "$6 = [ LME LMA ]",
        "$7 = [ PAE ]",
        "Breakpoint 2, work ()",
        "$8 = 1",
        "#1 ",
        "again ()",
        'Thread 1 "cpu0" (long)',
    )
    assert booting.read("debug") == "0\n"


def test_stepping(in_kernel, guest):
    said = gdb(
        guest[2],
        pipe(in_kernel),
        "stepi 4",
        "p $rbx",
        "p $rdi",
        "next",  # over the call
        "p $rax",
        "p *(long*)&counter",
        "break work",
        "continue",
        "step",
        "finish",
        "p $rax",
        "stepi",
        "x/i $pc",
    )
    in_order(said, "$1 = 1", "$2 = 1", "$3 = 2", "$4 = 2", "Breakpoint 1, work", "again ()", "$5 = 4", "=> ")


def test_conditions_and_counts(in_kernel, guest):
    said = gdb(
        guest[2],
        pipe(in_kernel),
        "break work if $rdi == 7",
        "continue",
        "p $rdi",
        "delete",
        "tbreak work",
        "ignore 2 4",
        "continue",
        "p $rdi",
        f"monitor break {KERNEL_AT + 0x1E:#x} if rdi==20 once",
        "continue",
        "p $rdi",
        "monitor debug",
    )
    in_order(said, "Breakpoint 1, work", "$1 = 7", "Temporary breakpoint 2, work", "$2 = 12", "SIGTRAP", "$3 = 20")


def test_watchpoints(in_kernel, guest):
    said = gdb(
        guest[2],
        pipe(in_kernel),
        "watch *(long*)&counter",
        "continue",
        "continue",
        "info watchpoints",
    )
    in_order(
        said,
        "Hardware watchpoint 1: *(long*)&counter",
        "Old value = 0",
        "New value = 2",
        "Old value = 2",
        "New value = 4",
        "already hit 2 times",
    )


def test_access_watchpoints(in_kernel, guest):
    said = gdb(guest[2], pipe(in_kernel), "awatch *(long*)&counter", "continue", "continue")
    if "pvm-no-watchpoints" in active(in_kernel.read("engine").strip()):
        in_order(said, "Could not insert hardware watchpoint 1")
        assert failing(in_kernel.write, "debug", "watch 0x3000 8 rw\n") == errno.EOPNOTSUPP
        assert in_kernel.read("state") == "paused\n"
        return
    in_order(said, "Hardware access (read/write) watchpoint 1", "New value = 2", "Old value = 2", "New value = 4")


def test_writing_memory_and_registers(in_kernel, guest, tmp_path):
    data = bytes(range(256)) * 300
    (tmp_path / "data").write_bytes(data)
    said = gdb(
        guest[2],
        pipe(in_kernel),
        f"cd {tmp_path}",
        "restore data binary 0x400000",
        "set var *(long*)&counter = 0x1122334455667788",
        f"dump binary memory back 0xffffffff80400000 0xffffffff80400000+{len(data)}",
        "p/x *(long*)&counter",
        "set var $rax = 0x99",
        "p/x $rax",
        "p $xmm1.v2_double = {1.5, -2}",
        "p $xmm1.v2_double",
        "p $st0 = 2.5",
        "p $st0",
        "p $mxcsr",
        "x/x 0x7000000000",
    )
    in_order(said, "0x1122334455667788", "0x99", "{1.5, -2}", "{1.5, -2}", "= 2.5", "= 2.5", "= [ ", "Cannot access")
    assert (tmp_path / "back").read_bytes() == data
    assert in_kernel.read("reg/rax") == "0x0000000000000099\n"
    assert in_kernel.read("reg/st0") == "0x4000a000000000000000\n"
    fd = os.open(in_kernel / "mem", os.O_RDONLY)
    assert os.pread(fd, len(data), 0x40_0000) == data
    os.close(fd)


def test_monitor(in_kernel, guest):
    said = gdb(
        guest[2],
        pipe(in_kernel),
        "monitor info",
        "monitor watch 0x3000 8 w",
        "monitor registers rax 0x77",
        "maintenance flush register-cache",
        "p/x $rax",
        "monitor reg rax",
    )
    in_order(said, "mode        long", "watch 0x3000 8 w", "= 0x77", "there is no 'reg'", "Protocol error")
    said = gdb(
        None,
        pipe(in_kernel),
        "monitor reg/rax",
        "monitor reg/msr.0xc0000080",
        "monitor reg/msr.0x12345",
        "monitor reg/rbx 0x1234",
        "p/x $rbx",
        "monitor irq 0x20",
        "monitor irq line 3 2",
        "monitor trace insn on",
        "monitor trace off",
        "monitor symbols kallsyms",
        "monitor symbols",
    )
    in_order(
        said,
        *("0x0000000000000077", "0x0000000000000", "there is no 'reg/msr.0x12345'", "= 0x1234", "'2' is not 0 or 1"),
        *("trace insn,", "trace off", "no kallsyms tables in RAM", "0 symbols"),
    )
    assert "\ninterrupts_queued 1\n" in in_kernel.read("stat")
    said = gdb(None, pipe(in_kernel), "monitor reset", "maintenance flush register-cache", "p/x $rip")
    in_order(said, "the machine is reset", "= 0xfff0")
    assert "watch 0x3000 8 w" in in_kernel.read("debug")  # the files', not gdb's


def test_detaching_and_connecting_again(in_kernel, guest):
    said = gdb(
        guest[2],
        pipe(in_kernel),
        "break work",
        "continue",
        "detach",
        pipe(in_kernel),
        "p $rdi",
        "continue",
        "p $rdi",
        "kill",
        pipe(in_kernel),
        "p $rdi",
        "disconnect",
    )
    in_order(said, "Breakpoint 1, work", "detached", "$1 = 1", "Breakpoint 1, work", "$2 = 2", "killed", "$3 = 2")
    assert in_kernel.read("state") == "paused\n"
    assert in_kernel.read("debug") == "0\n"
    assert in_kernel.run().startswith("hlt")


def test_exits_of_a_bare_machine(machine):
    machine.load("b0 41 e6 e9 e4 60 f4 eb f7")  # mov al, 'A'; out 0xe9, al; in al, 0x60; hlt; and again
    said = gdb(
        None,
        pipe(machine, "i8086"),
        "continue",
        "continue",
        "monitor answer 0x5a",
        "stepi",
        "p/x $al",
        "x/i $pc",
        "continue",
        "handle SIGUSR1 nostop noprint",
        "continue",
    )
    in_order(
        said,
        "vmfs: io direction=out port=0xe9 size=1 count=1 data=0x41",
        "SIGUSR1",
        "vmfs: io direction=in port=0x60",
        "= 0x5a",
        "hlt",
        "vmfs: hlt",
        "SIGSTOP",
        "vmfs: hlt",
    )
    assert said.count("vmfs: io") == 2


def test_a_triple_fault_is_no_end(machine):
    machine.load("0f 0b")  # ud2
    machine.write("mode", "protected\n")  # without an IDT
    machine.write("reg/rip", "0x1000\n")
    said = gdb(
        None, pipe(machine), "continue", "p/x $rip", "set var $rip = 0x1002", "monitor state", "x/i $pc"
    )
    in_order(said, "vmfs: shutdown cause=triple-fault", "SIGSEGV", "= 0x1000", "paused")


def test_the_guests_own_int3_is_the_guests(machine):
    # int3; inc ax; hlt. Its handler, at 0x2000: inc bx; iret
    machine.load("cc 40 f4")
    fd = os.open(machine / "mem", os.O_RDWR)
    os.pwrite(fd, bytes.fromhex("00200000"), 3 * 4)
    os.pwrite(fd, bytes.fromhex("43cf"), 0x2000)
    os.close(fd)
    machine.write("registers", "rsp 0x800\nss 0\nss.base 0\nrax 0\nrbx 0\n")
    said = gdb(None, pipe(machine), "break *0x1001", "continue", "p $rbx", "p $rax", "continue", "p $rax")
    in_order(said, "Breakpoint 1, ", "$1 = 1", "$2 = 0", "vmfs: hlt", "$3 = 1")


def test_interrupting_and_killing_gdb(in_kernel, guest):
    """^C stops the guest; a gdb that is killed while it runs leaves the machine standing, and usable."""
    _jump_to_forever(in_kernel, guest)
    asked = ["-ex", pipe(in_kernel), "-ex", "break *0x7777", "-ex", "continue", "-ex", "echo stopped\\n"]
    asked += ["-ex", "continue"]
    process = subprocess.Popen(
        command(guest[2], *asked),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout
        wait_until(in_kernel.is_running, "it runs")
        os.kill(process.pid, signal.SIGINT)
        said = ""
        while "stopped\n" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        assert "SIGINT" in said
        wait_until(in_kernel.is_running, "it runs again")
        assert in_kernel.read("debug").count("owner=gdb") == 1
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    wait_until(lambda: in_kernel.read("state") == "paused\n", "it stands still")
    wait_until(lambda: in_kernel.read("debug") == "0\n", "gdb's points are gone")
    in_kernel.write("vm_run", "insns 10\n")
    assert in_kernel.read("exit").startswith("limit")
    assert "= 0x" in gdb(guest[2], pipe(in_kernel), "p/x $rip")


def _jump_to_forever(machine, guest):
    said = gdb(guest[2], "p/x (long)&forever")
    machine.write("reg/rip", said.split("= ")[1])


def test_a_run_of_somebody_else(in_kernel, guest):
    _jump_to_forever(in_kernel, guest)
    said = gdb(
        guest[2],
        pipe(in_kernel),
        f"shell echo run > {shlex.quote(str(in_kernel / 'state'))}",
        "continue",
        f"shell cat {shlex.quote(str(in_kernel / 'error'))}",
        f"shell echo pause > {shlex.quote(str(in_kernel / 'state'))}",
        "stepi",
        "x/i $pc",
    )
    in_order(said, "vmfs: the machine is running: somebody else has started it", "gdb: the machine is running", "=> ")


def test_the_other_layouts(in_kernel, booting):
    for words, architecture in (("i386", "i386"), ("i8086", "i8086"), ("", "i386:x86-64")):
        said = gdb(None, pipe(in_kernel, words), "show architecture", "info registers")
        assert f'"{architecture}"' in said
        assert ("rip " in said) == (not words) and ("eip " in said) == bool(words)
    said = gdb(None, pipe(in_kernel, "vax"), "show architecture")
    assert "there is no register layout 'vax'" in said or "there is no such layout" in said


def test_a_thread_is_a_cpu(machine):
    machine.write("cpus", "3\n")
    with open(machine.path / "mem", "r+b") as mem:
        for cpu in range(3):
            mem.seek(0x1000 * (cpu + 1))
            mem.write(bytes.fromhex("40 eb fd"))  # again: inc ax; jmp again
            registers = f"cs 0\ncs.base 0\nrip {0x1000 * (cpu + 1):#x}\n"
            (machine.path / f"cpu{cpu}" / "registers").write_text(registers)
    said = gdb(
        None,
        pipe(machine, "i8086"),
        "info threads",
        "break *0x3001",
        "continue",
        "delete",
        "thread apply all print $_thread * 0x1000",
        "thread 2",
        "set var $bx = 7",
        "set scheduler-locking on",
        "stepi",
        "stepi",
        "print/x $pc",
        "thread 1",
        "print $bx",
    )
    stop = 'Thread 3 "cpu2" hit Breakpoint 1, 0x00003001'
    in_order(said, '"cpu0"', '"cpu1"', '"cpu2"', stop, "= 12288", "= 8192", "= 4096")
    at = re.search(r"Switching to thread 2.*?0x0000(200[01])", said, re.DOTALL)[1]  # it runs, too, until all stop
    other = {"2000": "2001", "2001": "2000"}[at]
    there = f"0x0000{at}", f"0x0000{other}", f"0x0000{at}", f"= 0x{at}"
    in_order(said, "Switching to thread 2", *there, "Switching to thread 1", "= 0")
    assert (machine.path / "cpu1" / "reg" / "rbx").read_text() == f"{7:#018x}\n"
