"""Looking into a stock Debian kernel that runs: its own symbols, page tables, stack and core.

One machine for all tests here, booted with KASLR and stopped at its shell's prompt.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from pc.conftest import Pc, boot_linux
from pc.kernels import CLOUD, needs_kernels

pytestmark = needs_kernels

MODULES = 0xFFFF_FFFF_C000_0000  # where they begin (Linux Documentation/arch/x86/x86_64/mm.rst)
NAMES = (
    "_text _etext _end start_kernel vfs_read linux_banner init_task jiffies_64 entry_SYSCALL_64 page_offset_base"
).split()


@pytest.fixture(scope="module")
def guest(pc_mount) -> Iterator[tuple[Pc, dict[str, int]]]:
    """The machine, and what its own /proc/kallsyms says of some symbols. It is paused."""
    pc = Pc(pc_mount / "inspected")
    try:
        boot_linux(pc, cmdline="kaslr", modules=("virtio_blk",))
        pc.expect("guest# ")
        wanted = pc.shell(f"grep -E ' ({'|'.join(NAMES)})$' /proc/kallsyms")
        theirs = {name: int(address, 16) for address, _, name in map(str.split, wanted.splitlines())}
        assert set(theirs) == set(NAMES)
        theirs["lines"] = int(pc.shell(r"grep -vc '\[' /proc/kallsyms"))
        for line in pc.shell(r"grep '\[virtio' /proc/kallsyms").splitlines():
            theirs[line.split("\t")[0]] = int(line[:16], 16)
        pc.write("state", "pause")
        assert pc.ended().startswith(("interrupted", "hlt"))
        pc.write("symbols", "kallsyms")
        yield pc, theirs
    finally:
        pc.remove()


def symbols_of(pc: Pc) -> dict[str, int]:
    return {name: int(address, 16) for address, _, name in map(str.split, pc.read("symbols").splitlines())}


def at(address: int) -> int:
    """The offset in `virt`."""
    return address & ((1 << 63) - 1)


def test_kallsyms_are_those_that_the_guest_itself_shows(guest):
    pc, theirs = guest
    lines = pc.read("symbols").splitlines()
    found = symbols_of(pc)
    assert {name: found[name] for name in NAMES} == {name: theirs[name] for name in NAMES}
    of_modules = {name for name in theirs if " " in name}  # whole lines
    assert of_modules and of_modules <= set(lines)
    assert len([line for line in lines if int(line[:16], 16) < MODULES]) == theirs["lines"]
    assert found["_text"] != 0xFFFF_FFFF_8100_0000  # KASLR has moved it


def test_virt_reads_the_banner_by_its_symbol(guest):
    pc, theirs = guest
    with open(pc.path / "virt", "rb", buffering=0) as virt:
        virt.seek(at(theirs["linux_banner"]))
        assert virt.read(200).startswith(b"Linux version " + CLOUD.release.encode())


def test_pagetable_has_the_kernel_as_linux_maps_it(guest):
    pc, theirs = guest
    ranges = []
    for line in pc.read("pagetable").splitlines():
        span, rights, *_ = line.split()
        start, end = (int(word, 16) for word in span.split("-"))
        ranges.append((start, end, rights))
    assert ranges == sorted(ranges)

    def rights_at(address: int) -> str:
        (found,) = [rights for start, end, rights in ranges if start <= address < end]
        return found

    assert rights_at(theirs["_text"]) == "r-x-"
    assert rights_at(theirs["vfs_read"]) == "r-x-"
    assert rights_at(theirs["linux_banner"]) == "r---"
    assert rights_at(theirs["jiffies_64"]) == "rw--"
    assert not any(rights[1:3] == "wx" for _, _, rights in ranges)  # CONFIG_STRICT_KERNEL_RWX


def test_the_stack_of_an_idle_kernel_leads_to_where_it_began(guest):
    pc, _ = guest
    lines = pc.read("stack").splitlines()
    assert lines[0].startswith("#0 0x")
    called = re.findall(r" (\w[\w.]*)\+0x", "\n".join(lines))
    # The idle loop, a kernel thread, or where a shell waits, by when the pause came; if it came in an interrupt, that
    # is on another stack.
    assert {"do_idle", "cpu_startup_entry", "ret_from_fork", "do_syscall_64"} & set(called), lines


def test_disasm_names_functions(guest):
    pc, theirs = guest
    pc.write("disasm", "vfs_read 100")
    text = pc.read("disasm")
    assert text.startswith(f"{theirs['vfs_read']:#x} <vfs_read>: ")
    assert re.search(r"call 0x[0-9a-f]+ <\w+>", text)
    pc.write("disasm", "rip")
    rip = pc.read("reg/rip").strip()
    assert pc.read("disasm").startswith(rip)


def test_gdb_opens_its_core(guest):
    if not shutil.which("gdb"):
        pytest.skip("no gdb: install gdb")
    pc, theirs = guest
    rip = pc.read("reg/rip").strip()
    done = subprocess.run(
        [
            "gdb",
            "-nx",
            "-batch",
            "-ex",
            "p/x $rip",
            "-ex",
            f"x/s {theirs['linux_banner']:#x}",
            "-c",
            pc.path / "core",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"$1 = 0x{int(rip, 16):x}\n" in done.stdout, done.stderr
    assert f'"Linux version {CLOUD.release}' in done.stdout


DRGN = """
import sys, drgn
from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms
program = drgn.Program()
program.set_core_dump(sys.argv[1])
program.register_symbol_finder("kallsyms", load_vmlinux_kallsyms(program), enable_index=0)
for symbol in program.symbols():
    print(f"{symbol.address:x} {symbol.name}")
"""


def test_drgn_finds_the_same_symbols_in_its_core(guest, tmp_path):
    """By VMCOREINFO and the page tables: another way than that of `kallsyms`, which has RAM only."""
    pytest.importorskip("drgn", reason="no drgn: pip install drgn")
    pc, _ = guest
    core = tmp_path / "core"  # drgn reads each name by itself, 87,000 of them
    subprocess.run(["cp", "--sparse=always", pc.path / "core", core], check=True)
    done = subprocess.run([sys.executable, "-c", DRGN, core], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = set(done.stdout.splitlines())
    ours = {
        f"{int(address, 16):x} {name}"
        for address, _, name in map(str.split, pc.read("symbols").splitlines())
        if int(address, 16) < MODULES
    }
    assert theirs == ours and len(ours) > 10_000


def test_looking_changes_nothing(guest):
    """What a core and a stack are made from is read only: the guest goes on."""
    pc, _ = guest
    before = pc.read("registers")
    for name in ("pagetable", "stack", "disasm", "symbols"):
        pc.read(name)
    with open(pc.path / "core", "rb") as core:
        core.read(1 << 20)
    assert pc.read("registers") == before


def test_a_running_kernel_is_looked_into(guest):
    """The last test here: the machine runs on."""
    pc, theirs = guest
    pc.start()
    assert pc.shell("echo still $((40 + 2))") == "still 42\n"
    fd = os.open(pc.path / "virt", os.O_RDONLY)
    jiffies = [int.from_bytes(os.pread(fd, 8, at(theirs["jiffies_64"])), "little")]
    pc.shell("sleep 0.1")
    jiffies.append(int.from_bytes(os.pread(fd, 8, at(theirs["jiffies_64"])), "little"))
    os.close(fd)
    assert jiffies[1] > jiffies[0] > 0
    assert f"{theirs['_text']:016x}-" in pc.read("pagetable")
    assert pc.read("stack").startswith("#0 0x")
    pc.write("symbols", "kallsyms")
    assert symbols_of(pc)["_text"] == theirs["_text"]
