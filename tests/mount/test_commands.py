"""The commands about machines, as processes, on a real mount: each prints what it says, and fails with a sentence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmfs import cli
from vmfs.commands import set as _set  # noqa: F401 - before another user asks for it
from vmfs.commands import table
from vmfs.commands.top import Looks

ROOT = Path(__file__).resolve().parents[2]
# lidt [0x1020]; mov eax, 5; nop; nop; ud2
CRASH = "0f011c25 20100000 b805000000 90 90 0f0b"


def vmfs(*argv, **options):
    command = [sys.executable, "-m", "vmfs.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, **options)


def ok(*argv, **options) -> str:
    done = vmfs(*argv, **options)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def refused(*argv) -> str:
    done = vmfs(*argv)
    assert done.returncode == 1 and not done.stdout, done
    return done.stderr


@pytest.fixture
def crashing(vm):
    vm.write("mode", "long")
    vm.load(CRASH)
    vm.write("registers", "rip=0x1000 rsp=0x9000")
    return vm


def test_set_step_run_disasm_why(crashing):
    path = crashing.path
    assert ok("set", path, "rbx=7", "rcx=0x8") == ""
    assert (crashing.read("reg/rbx"), crashing.read("reg/rcx")) == ("0x0000000000000007\n", "0x0000000000000008\n")
    assert ok("step", path).splitlines() == [
        "debug cause=step rip=0x1008",
        "0x0000000000001008: b8 05 00 00 00           mov eax, 5",
    ]
    assert ok("step", path, 2).startswith("debug cause=step rip=0x100e\n")
    assert ok("disasm", path, "0x100f", 1) == "0x000000000000100f: 0f 0b                    ud2\n"
    assert refused("why", path).endswith("has not shut down, and was not reset\n")
    assert ok("run", path, "until", "0x100f") == "debug cause=breakpoint rip=0x100f\n"
    assert ok("run", path) == "shutdown cause=triple-fault rip=0x100f\n"
    assert ok("why", path) == crashing.read("why")


def test_mistakes_are_answered_with_what_was_meant(crashing):
    path = crashing.path
    assert refused("set", path, "rpx=1").endswith("there is no register 'rpx': did you mean rsp?\n")
    assert "'zz' is not a number" in refused("set", path, "rax=zz")
    assert "'rax' is not NAME=VALUE" in refused("set", path, "rax")
    assert refused("step", f"{path}x").endswith(f"vm_run: did you mean {path.name}?\n")
    assert vmfs("stpe", path).stderr == "vmfs: there is no command 'stpe': did you mean step? (see vmfs --help)\n"
    meant = "vmfs boot: there is no option '--braek': did you mean --break? (see vmfs boot --help)\n"
    assert vmfs("boot", "--braek", "main", "kernel.elf").stderr == meant
    assert vmfs("rm", path, "--xyzzy=1").stderr.startswith("vmfs rm: there is no option '--xyzzy' (see")
    assert vmfs("why", path, "now").stderr.startswith("vmfs why: 'now' is one argument too many (see")
    assert vmfs("run").stderr.startswith("vmfs run: the following arguments are required: MACHINE (see")
    assert refused("trace", path, "start", "inns").endswith("did you mean insn?\n")
    assert refused("screen", path).endswith("a bare machine has no screen: write pc to `machine`\n")


def test_why_with_the_lines_of_a_file(crashing, tmp_path):
    """A program whose line 3 is where the machine stands."""
    source, elf = tmp_path / "boot.S", tmp_path / "boot.elf"
    source.write_text(".globl _start\n_start: lidt 0x1020\nmov $5, %eax\nnop\nnop\nud2\n")
    subprocess.run(["gcc", "-g", "-nostdlib", "-static", "-Wl,-Ttext=0x1000", source, "-o", elf], check=True)
    ok("run", crashing.path)
    lines = ok("why", crashing.path, "--symbols", elf).splitlines()
    assert lines[-1].endswith("  [boot.S:6]")
    if crashing.read("engine") == "emulator\n":
        assert [line.rpartition("[")[2] for line in lines[-5:]] == [f"boot.S:{n}]" for n in (2, 3, 4, 5, 6)]
        assert any(line.startswith("exception vector=0x6") and line.endswith("[boot.S:6]") for line in lines)
    assert "[boot.S:" not in crashing.read("why")
    crashing.path.joinpath("symbols").write_bytes(elf.read_bytes())
    assert [line.rpartition("  [")[2] for line in crashing.read("why").splitlines()] == [
        line.rpartition("  [")[2] for line in ok("why", crashing.path, "--symbols", elf).splitlines()
    ]
    assert ok("why", crashing.path).splitlines()[-1].endswith("  [boot.S:6]")
    subprocess.run(["strip", elf], check=True)
    assert "no DWARF" in refused("why", crashing.path, "--symbols", elf)
    assert "is no ELF file" in refused("why", crashing.path, "--symbols", source)


def test_trace(crashing):
    path = crashing.path
    ok("trace", path, "start", "insn", "exits", "--range", "0x1008-0x100e")
    ok("run", path)
    ok("trace", path, "stop")
    lines = ok("trace", path, "print").splitlines()
    assert [line for line in lines if line.startswith("insn")] == ["insn 0x1008", "insn 0x100d", "insn 0x100e"]


def test_trace_in_other_forms(crashing, tmp_path):
    """What a machine's `trace.bin` gave, kept in a file, is written as the machine's own; and what is wrong is said."""
    path = crashing.path
    assert refused("trace", path, "--format", "flames").endswith("did you mean flame?\n")
    crashing.write("symbols", "1000 T _start\n100d T end\n")
    ok("trace", path, "start")
    ok("run", path)
    ok("trace", path, "stop")
    saved = tmp_path / "saved"
    saved.write_bytes((path / "trace.bin").read_bytes())
    lines = ok("trace", "--symbols", path / "symbols", saved).splitlines()
    assert lines == ["insn 0x1000 _start", "insn 0x1008 _start+0x8", "insn 0x100d end", "insn 0x100e end+0x1"]
    out = tmp_path / "out"
    assert ok("trace", "--format", "folded", "--symbols", path / "symbols", "-o", out, saved) == ""
    assert out.read_text() == "_start 4\n", "nothing has called `end`"
    ok("trace", path, "start")
    ok("set", path, "rip=0x1000")
    ok("run", path)
    ok("trace", path, "stop")
    assert "_start: 4 instructions, 100.00 %" in ok("trace", "--format", "flame", path)
    nowhere = tmp_path / "none" / "x"
    assert refused("trace", "--format", "csv", "-o", nowhere, saved).endswith("x: No such file or directory\n")
    assert "is no machine" in refused("trace", tmp_path / "nothing")
    assert "is not NAME=FIRST-LAST" in refused("trace", "--module", "x=9-1", "--format", "drcov", saved)


def test_trace_until_a_key(crashing, tmp_path):
    """^C ends it, and the picture is whole."""
    out = tmp_path / "flame.svg"
    crashing.load("ebfe")
    ok("trace", crashing.path, "start")
    crashing.write("state", "run")
    command = [sys.executable, "-m", "vmfs.cli", "trace", crashing.path, "--format", "flame", "-o", out]
    reader = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        reader.send_signal(signal.SIGINT)
        assert (reader.wait(30), reader.stderr.read()) == (130, b"")
    finally:
        reader.kill()
        crashing.write("trace", "off")
        crashing.write("state", "pause")
    assert re.search(r"<title>all: \d+ instructions", out.read_text()) and out.read_text().endswith("</svg>\n")


def test_screen(vm, tmp_path):
    """Text that stands in the VGA's memory, as text and as a picture of it."""
    vm.write("machine", "pc")
    with open(vm.path / "mem", "r+b", buffering=0) as file:
        file.seek(0xB8000)
        file.write(b"".join(bytes((letter, 7)) for letter in b"hello"))
    assert ok("screen", vm.path).splitlines()[0].rstrip() == "hello"
    picture = tmp_path / "screen.png"
    assert ok("screen", vm.path, "--png", picture) == ""
    assert picture.read_bytes() == (vm.path / "screen.png").read_bytes() and picture.read_bytes()[:4] == b"\x89PNG"
    command = [sys.executable, "-m", "vmfs.cli", "screen", vm.path, "--png", "-"]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, check=True).stdout == picture.read_bytes()
    assert refused("screen", vm.path, "--png", tmp_path / "none" / "x").endswith("x: No such file or directory\n")


def test_ls_and_rm(vm):
    mount = vm.path.parent
    names = [f"{vm.path.name}-{letter}" for letter in "ab"]
    for name in names:
        (mount / name).mkdir()
    vm.load("f4")
    vm.write("mode", "long")
    vm.write("reg/rip", "0x1000")
    vm.read("vm_run")
    rows = {line.split()[0]: line.split() for line in ok("ls", mount).splitlines()}
    assert rows["NAME"][:4] == ["NAME", "STATE", "ENGINE", "MACHINE"]
    assert rows[vm.path.name][1:6] == ["halted", vm.read("engine").strip(), "bare", "1", "128M"]
    assert rows[names[0]][1:7] == ["new", "-", "-", "-", "-", "-"]
    pids = dict(re.findall(r"^(\S+) uid=\d+ pid=(\d+)$", (mount / "machines").read_text(), re.MULTILINE))
    assert pids[names[0]] == "0" and pids[vm.path.name] != "0", "nothing was asked of a new one"
    assert refused("rm", mount / names[0], mount / "nobody").startswith("vmfs rm: ")
    assert (mount / names[0]).exists()
    ok("rm", *(mount / name for name in names))
    assert not any((mount / name).exists() for name in names)
    assert "is not a vmfs mount" in refused("ls", vm.path)


def test_a_name_is_looked_for_in_mounts_of_ones_own(vm):
    assert ok("disasm", vm.path.name) == vm.read("disasm")


def test_top_shows_who_works(vm):
    vm.write("mode", "long")
    vm.load("48ffc0 ebfb")  # 1: inc rax; jmp 1b
    vm.write("reg/rip", "0x1000")
    vm.write("state", "run")
    try:
        (first, *rest) = ok("top", "--count", 1, "--delay", "300ms", vm.path.parent).splitlines()
        (busy,) = re.fullmatch(r".*: \d+ machines, (\d+) busy", first).groups()
        assert int(busy) >= 1
        row = next(line.split() for line in rest if line.split()[0] == vm.path.name)
        assert row[1] == "running" and float(row[3]) > 0
        if row[2] == "emulator":
            assert float(row[4]) > 1, "MIPS"
    finally:
        vm.write("state", "pause")


def test_top_asks_those_that_are_shown_and_were_busy(vm, monkeypatch):
    directory = vm.path.parent
    names = [f"{vm.path.name}-{letter}" for letter in "abc"]
    asked = []
    read = table.Facts.read
    monkeypatch.setattr(
        table.Facts, "read", lambda one, **how: asked.append(one.path.name) or read(one, **how)
    )
    for name in names:
        (directory / name).mkdir()
        (directory / name / "regs").read_bytes()  # from now on it has a process
    try:
        looks = Looks(directory)
        assert len(looks.look(1)) == 3 and len(asked) == 1
        lines = looks.look()
        assert set(names) <= set(asked)
        assert {line.split()[1] for line in lines[2:] if line.split()[0] in names} == {"paused"}
        asked.clear()
        for _ in range(8):
            looks.look()
            time.sleep(0.05)
        assert len(asked) < 8 * len(names) // 2, "those at rest are not asked again"
    finally:
        for name in names:
            (directory / name).rmdir()


def test_run_is_stopped_by_a_signal(vm):
    vm.write("mode", "long")
    vm.load("ebfe")
    vm.write("reg/rip", "0x1000")
    process = subprocess.Popen(
        [sys.executable, "-m", "vmfs.cli", "run", vm.path],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    )
    end = time.monotonic() + 20
    while vm.read("state") != "running\n":
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert vm.read("state") == "paused\n"


def test_help_of_a_file():
    assert ok("help", "vm_run").startswith("### `vm_run` (0600, command)\n")
    assert ok("help", "step").startswith("usage: vmfs step")
    assert "did you mean vm_run?" in refused("help", "vmrun")
    assert "vmfs help COMMAND" in ok("help")


def test_another_user_needs_the_rights(vm):
    if os.geteuid():
        pytest.skip("needs root: another user")
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:  # the modules of this interpreter are loaded: another user may not read them
        code = 99
        try:
            os.dup2(theirs, 2)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            sys.stderr = open(2, "w", closefd=False)
            code = cli.main(["set", str(vm.path), "rax=1"])
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(theirs)
    said = open(ours).read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert said == f"vmfs set: {vm.path} is not yours to look at\n"


def test_the_mount_that_the_environment_names(vm, tmp_path):
    elsewhere = {**os.environ, "VMFS_MOUNT": str(vm.path.parent)}
    assert f"\n{vm.path.name} " in ok("ls", env=elsewhere)
    done = vmfs("ls", env={**os.environ, "VMFS_MOUNT": str(tmp_path)})
    assert done.returncode == 1 and f"{tmp_path} is not a vmfs mount" in done.stderr
