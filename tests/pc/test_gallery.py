"""The debugging scripts of examples/ do what they say, on Debian's kernel where they take one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pc.initramfs import build
from pc.kernels import CLOUD, needs_kernels

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SEABIOS = Path("/usr/share/seabios/bios-256k.bin")


@pytest.fixture
def script(pc_mount, tmp_path):
    """Runs one with its arguments after the mount; what it prints, or complains of. It leaves no machine behind."""

    def run(name: str, *arguments: object, code: int = 0) -> str:
        before = set(os.listdir(pc_mount))
        command = ["bash", EXAMPLES / name, pc_mount, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=230)
        assert done.returncode == code, f"{name}: {done.stdout}\n{done.stderr}"
        assert set(os.listdir(pc_mount)) == before
        return done.stderr if code == 1 else done.stdout

    return run


@pytest.fixture(scope="session")
def initrd(tmp_path_factory):
    path = tmp_path_factory.mktemp("gallery") / "initrd"
    path.write_bytes(build("cat /proc/version > /dev/null; poweroff -f\n"))
    return path


@needs_kernels
def test_syscalls(script, initrd):
    lines = script("syscalls.sh", CLOUD.image, initrd, 3).splitlines()
    assert re.fullmatch(r"--- \d{5,} symbols; do_sys_openat2 is at ffffffff[0-9a-f]{8}", lines[0])
    assert lines[1] == 'open(-100, "/init")' and len(lines) == 4


@needs_kernels
def test_who_writes(script):
    said = script("whowrites.sh", CLOUD.image, "jiffies_64", 8, 3)
    values = [int.from_bytes(bytes.fromhex(one), "little") for one in re.findall(r"written: (\w{16})", said)]
    assert values == list(range(values[0], values[0] + 3))  # a tick each
    assert said.count("do_timer+0x") >= 3 and "tick_periodic+0x" in said


@needs_kernels
def test_gdt(script):
    said = script("gdt.sh", CLOUD.image)
    # Linux's, by arch/x86/include/asm/segment.h
    assert re.search(r"^0x0010 base 0x0+ limit 0xffffffff code:ra +ring 0 64-bit$", said, re.M)
    assert re.search(r"^0x0030 base 0x0+ limit 0xffffffff code:ra +ring 3 64-bit$", said, re.M)
    assert re.search(r"^0x0040 base 0x\w+ limit 0x\w+ tss:busy +ring 0$", said, re.M)
    assert "base[63:32] 0xfffffe" in said


@needs_kernels
def test_symbols(script):
    said = script("symbols.sh", CLOUD.image)
    moved = re.match(r"--- _text is at (ffffffff\w{8}), moved by 0x\w+; \d{5,} symbols\n", said)
    assert moved and moved[1] != "ffffffff81000000"  # not those of the kernel that is about to be moved
    assert f"no symbol {'no' * 4}\n" in script("symbols.sh", CLOUD.image, "no" * 4, code=1)
    assert re.search(r"^ffffffff\w{8} T start_kernel$", said, re.M)
    assert re.search(r"^ffffffff\w{8} D sys_call_table$", said, re.M)
    # Linux overwrites the calls of __fentry__ with nops while it boots.
    assert re.search(r"^0xffffffff\w{8} <start_kernel>: .* (call 0x\w+ <__fentry__>|nop.*)$", said, re.M)


@pytest.mark.parametrize("name", ["symbols.sh", "whowrites.sh", "gdt.sh", "profile.sh"])
def test_what_is_no_kernel_is_said(script, tmp_path, name):
    (tmp_path / "text").write_text("no kernel\n")
    assert "vm_run: " in script(name, "text", code=1)


def test_a_kernel_that_dies_before_it_has_symbols(script, tmp_path):
    sector = bytes.fromhex("0f011e067c cc").ljust(510, b"\0") + b"\x55\xaa"  # lidt [0x7c06]; int3
    (tmp_path / "sector").write_bytes(sector)
    assert script("gdt.sh", "sector", code=1).endswith("shutdown cause=triple-fault rip=0x7c05\n")


@needs_kernels
def test_profile(script, tmp_path):
    busy = tmp_path / "busy"  # it has two million instructions more, whenever it is asked for them
    busy.write_bytes(build("while :; do :; done\n"))
    rows = [line.split() for line in script("profile.sh", CLOUD.image, busy, 150).splitlines()]
    shares = [float(row[0]) for row in rows]
    assert shares == sorted(shares, reverse=True) and 5 < sum(shares) <= 100.5
    assert all(re.fullmatch(r"[\w.]+", row[2]) for row in rows) and len(rows) >= 5
    picture = (tmp_path / "profile.svg").read_text()
    assert re.search(r">2000000 instructions of profile\.\d+<", picture)
    assert len(re.findall(r"<title>[\w.]+: \d+ instructions, ", picture)) >= 10


def test_bisect(script):
    first, runs, code = script("bisect.sh").splitlines()
    assert first == "after 1000000 instructions it hangs in 0x7c09..0x7c0e"
    assert "instruction 20003 is the first of it" in runs  # mov, 20000 times loop, mov, out
    assert code.endswith("out 0xe9, al")


@needs_kernels
def test_hang(script):
    """A kernel without a root file system panics, and stays there."""
    lines = script("hang.sh", CLOUD.image).splitlines()
    assert lines[0] == "it hangs in panic, which was called by" and "mount_block_root+0x" in lines[1]
    assert re.fullmatch(r"\d\d looks: it began with instruction 1\d{9}, which is", lines[-3])
    assert re.match(r"0xffffffff\w{8} <panic\+0x\w+>: .* call ", lines[-2])
    assert lines[-1].endswith('"VFS: Unable to mount root fs on %s"')


@pytest.mark.skipif(not SEABIOS.exists(), reason="SeaBIOS is not installed (package seabios)")
def test_ports(script):
    lines = script("ports.sh", "0x70-0x71", SEABIOS, 6).splitlines()
    assert lines[0].startswith("port 0x70 out 0x70, al   al 0x8f ")  # the shutdown status, NMI off
    assert lines[1].startswith("port 0x71 in al, 0x71 ")
    assert len(lines) == 6 and lines[-1].endswith(" protected")


def test_fuzz_of_a_boot_sector(script):
    counts = dict(line.split() for line in script("fuzzboot.sh", "", 20).splitlines())
    assert sum(map(int, counts.values())) == 20 and int(counts["hlt"]) > 5


def test_engines(script):
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        script("engines.sh", code=77)
        pytest.skip("/dev/kvm is not accessible: one engine only")
    said = script("engines.sh")
    assert re.match(r"instruction 6\d, 0x0*1013: 0f a2 +cpuid: < kvm, > emulator\n", said), said
    assert re.search(r"^< rax 0x", said, re.M) and re.search(r"^> rax 0x", said, re.M)


def test_triple_fault(script, tmp_path):
    if not shutil.which("gdb"):
        pytest.skip("gdb is not installed")
    said = script("triplefault.sh")
    assert said.startswith("shutdown cause=triple-fault rip=0x1009\n")
    assert re.search(r"^=> 0x1009:\s+div +%ecx$", said, re.M) and re.search(r"^rax +0x4d2 +1234$", said, re.M)
    assert (tmp_path / "triplefault.core").stat().st_size > 128 << 20
