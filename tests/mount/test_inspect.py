"""Looking into a guest on a real mount: symbols, virt, pagetable, disasm, stack, core."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mounting import blocked_write, failing

from vmfs.debug.sources import Sources

LAST = 1 << 63  # no offset is that high
TABLES = 0x100000
HIGH = 0xFFFF_FFFF_8000_0000

MAP = """\
0000000000001000 T start
0000000000001005 t helper
0000000000001010 T leaf
0000000000002000 D table
"""


def offset(address: int) -> int:
    """Of an address in `virt`."""
    return address & (LAST - 1)


def poke(vm, at: int, data: bytes) -> None:
    fd = os.open(vm / "mem", os.O_RDWR)
    os.pwrite(fd, data, at)
    os.close(fd)


def shell(vm, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], cwd=vm.path, capture_output=True, text=True)


@pytest.fixture
def long_vm(vm):
    """64-bit code at 0x1000, RAM identity mapped; and at HIGH pages of our own tables:
    0x200000 writable, 0x300000 read-only and not executable, then a page that is not mapped, then 0x400000."""
    vm.write("mode", "long")
    vm.write("registers", "rip 0x1000\nrsp 0x9000\n")
    fd = os.open(vm / "mem", os.O_RDWR)
    root = int(vm.read("reg/cr3"), 16)
    low = os.pread(fd, 8, root)  # the identity mapping stays
    os.pwrite(fd, low + bytes(8 * 510) + struct.pack("<Q", TABLES + 0x1000 | 3), TABLES)
    os.pwrite(fd, bytes(8 * 510) + struct.pack("<QQ", TABLES + 0x2000 | 3, 0), TABLES + 0x1000)
    os.pwrite(fd, struct.pack("<Q", TABLES + 0x3000 | 3), TABLES + 0x2000)
    pages = (0x200000 | 3, 0x300000 | 1 << 63 | 1, 0, 0x400000 | 3)
    os.pwrite(fd, struct.pack("<4Q", *pages), TABLES + 0x3000)
    os.close(fd)
    efer = int(vm.read("reg/efer"), 16) | 1 << 11  # NXE
    vm.write("registers", f"cr3 {TABLES:#x}\nefer {efer:#x}\n")
    return vm


# ---- symbols


def test_a_map_is_taken_at_the_close(vm):
    assert vm.read("symbols") == ""
    assert shell(vm, f"printf '{MAP}' > symbols").returncode == 0
    assert vm.read("symbols") == MAP
    vm.write("symbols", "0000000000007c00 T boot\n")
    assert vm.read("symbols") == "0000000000007c00 T boot\n"
    vm.write("symbols", "clear\n")
    assert vm.read("symbols") == ""


def test_symbols_are_added_with_append(vm):
    vm.write("symbols", MAP)
    assert shell(vm, "echo '0000000000007c00 T boot' >> symbols").returncode == 0
    assert vm.read("symbols") == MAP + "0000000000007c00 T boot\n"


def test_what_is_no_file_of_symbols_fails_at_the_close_and_changes_nothing(vm, tmp_path):
    vm.write("symbols", MAP)
    (tmp_path / "bad").write_text("0000000000001000 T start\nnonsense\n")
    done = subprocess.run(["cp", tmp_path / "bad", vm / "symbols"], capture_output=True, text=True)
    assert done.returncode and "Invalid argument" in done.stderr
    assert vm.read("error") == "symbols: line 2: 'nonsense' is not `ADDRESS TYPE NAME`\n"
    fd = os.open(vm / "symbols", os.O_WRONLY)
    os.write(fd, b"\x7fELF" + bytes(100))
    assert failing(os.close, fd) == errno.EINVAL
    assert "ELF file is damaged" in vm.read("error")
    assert vm.read("symbols") == MAP


def test_an_elf_file_of_many_mebibytes_with_a_cp(vm, tmp_path):
    """A program with its symbols at the end, after 40 MiB: as a vmlinux has its debug information."""
    if not shutil.which("ld") or not shutil.which("as"):
        pytest.skip("no as and ld: install binutils")
    source = tmp_path / "a.s"
    source.write_text(
        ".globl _start\n_start: ret\nlocal: nop\n.data\n.globl big\nbig: .fill 40 << 20, 1, 0x55\n.bss\nroom: .skip 8\n"
    )
    subprocess.run(["as", "-o", tmp_path / "a.o", source], check=True)
    subprocess.run(["ld", "-Ttext=0x401000", "-o", tmp_path / "a", tmp_path / "a.o"], check=True)
    assert (tmp_path / "a").stat().st_size > 40 << 20
    subprocess.run(["cp", tmp_path / "a", vm / "symbols"], check=True)
    found = {
        name: (address, letter) for address, letter, name in map(str.split, vm.read("symbols").splitlines())
    }
    listed = subprocess.run(["nm", tmp_path / "a"], capture_output=True, text=True, check=True).stdout
    for address, letter, name in map(str.split, listed.splitlines()):
        assert found[name] == (address, letter), name


def test_lines_of_a_kernel_stop_it(vm, tmp_path):
    """Lines of C and of assembly, by break and by until, and what is said of those that there are not."""
    course, elf = Path(__file__).parents[2] / "examples" / "course", tmp_path / "kernel.elf"
    flags = "-m32 -O1 -g -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none -nostdlib -static"
    sources = ("-Wl,--build-id=none,-z,noexecstack,-T,kernel.ld", "boot.S", "kernel.c")
    subprocess.run(["gcc", *flags.split(), *sources, "-o", elf], cwd=course, check=True)
    lines = Sources(elf)  # by pyelftools
    text = (course / "kernel.c").read_text().splitlines()
    print_hello = next(number for number, line in enumerate(text, 1) if 'print("hello from' in line)
    vm.write("machine", "pc")
    vm.write("kernel", elf.read_bytes())
    assert failing(vm.write, "debug", "break kernel.c:5\n") == errno.EINVAL
    assert "'kernel.c:5' is not known: no ELF file with DWARF" in vm.read("error")
    subprocess.run(["cp", elf, vm / "symbols"], check=True)
    vm.write("debug", f"break boot.S:9\nbreak kernel.c:{print_hello} once\n")
    assert [line.split()[1] for line in vm.read("debug").splitlines()[1:]] == ["break", "break"]
    assert failing(vm.write, "debug", f"break 0x1000\nbreak kernel.c:{len(text) + 1}\n") == errno.EINVAL
    assert vm.read("error").startswith("debug: line 2: kernel.c has no code at line ")
    assert "0x1000 " not in vm.read("debug")

    def where() -> str:
        return lines.line_of(int(vm.read("reg/rip"), 16))

    assert vm.read("vm_run").startswith("debug cause=breakpoint id=1 ")
    assert where() == "boot.S:9"
    assert vm.read("vm_run").startswith("debug cause=breakpoint id=2 ")
    assert where() == f"kernel.c:{print_hello}"
    vm.write("vm_run", f"until kernel.c:{print_hello + 1}\n")
    assert vm.read("exit").startswith("debug cause=breakpoint rip=") and where() == f"kernel.c:{print_hello + 1}"
    vm.write("disasm", f"kernel.c:{print_hello} 1\n")
    address = vm.read("disasm").split()[0]
    assert lines.line_of(int(address, 16)) == f"kernel.c:{print_hello}"


def test_the_machine_answers_while_lines_are_searched_and_a_signal_ends_it(vm, tmp_path):
    """A line table of 24 MiB, a row each byte, takes many seconds."""
    head = bytes((1, 1, 1, 0xFB, 14, 13, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1))  # DWARF 5, 6.2.4
    head += b"\1\1\x08\1d\0" + b"\2\1\x08\2\x0b\1f.c\0\0"  # a folder and a file, 0
    rows = (b"\x21" * 100 + b"\3\x9c\x7f") * (1 << 13)  # an address and a line further; 100 lines back
    unit = struct.pack("<HBBI", 5, 8, 0, len(head)) + head + b"\4\0" + rows
    (tmp_path / "lines").write_bytes((struct.pack("<I", len(unit)) + unit) * 28)
    source, elf = tmp_path / "a.s", tmp_path / "a"
    source.write_text(f'.globl _start\n_start: ret\n.section .debug_line\n.incbin "{tmp_path}/lines"\n')
    subprocess.run(["gcc", "-nostdlib", "-static", "-Wl,-Ttext=0x1000", source, "-o", elf], check=True)
    subprocess.run(["cp", elf, vm / "symbols"], check=True)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    fd = os.open(vm / "debug", os.O_WRONLY)
    writer = blocked_write(fd, b"break f.c:5\n")
    time.sleep(0.3)
    for _ in range(5):
        assert vm.read("reg/rip")
        assert writer.result is None  # so the search was not in the way
    writer.signal()
    assert writer.end()[:2] == (-1, errno.EINTR)
    os.close(fd)
    assert vm.read("debug") == "0\n"


def test_there_are_no_kallsyms_without_a_linux(vm):
    assert failing(vm.write, "symbols", "kallsyms") == errno.EINVAL
    assert vm.read("error").startswith("symbols: no kallsyms tables in RAM")


def test_closes_are_told_without_the_hooks(own_server, tmp_path):
    """libfuse's own answer to an open has the kernel tell of the closes of all files."""
    vm = own_server(environment={"VMFS_NO_FUSE_HOOKS": "1"}).make()
    (tmp_path / "map").write_text(MAP)
    subprocess.run(["cp", tmp_path / "map", vm / "symbols"], check=True)
    assert vm.read("symbols") == MAP
    fd = os.open(vm / "symbols", os.O_WRONLY)
    os.write(fd, b"nonsense")
    assert failing(os.close, fd) == errno.EINVAL
    assert vm.read("symbols") == MAP


# ---- virt


def test_virt_goes_through_the_page_tables(long_vm):
    vm = long_vm
    poke(vm, 0x200FF0, b"0123456789abcdef")
    poke(vm, 0x300000, b"GHIJ")
    fd = os.open(vm / "virt", os.O_RDWR)
    try:
        assert os.pread(fd, 4, 0x200FF0) == b"0123"  # the identity mapping
        assert os.pread(fd, 20, offset(HIGH + 0xFF0)) == b"0123456789abcdefGHIJ"  # two pages far apart
        assert len(os.pread(fd, 8192, offset(HIGH + 0x1800))) == 0x800  # up to the hole
        assert failing(os.pread, fd, 1, offset(HIGH + 0x2000)) == errno.EFAULT
        assert os.pread(fd, 1, offset(HIGH + 0x3000)) == b"\0"
        assert failing(os.pread, fd, 1, offset(HIGH + 0x4000)) == errno.EFAULT
        assert failing(os.pread, fd, 1, 1 << 50) == errno.EFAULT  # not canonical
        assert failing(os.pread, fd, 1, LAST - 2) == errno.EFAULT  # the highest there is
        assert os.pwrite(fd, b"xyz", offset(HIGH + 0xFFE)) == 3  # the second page is read-only
        assert os.pwrite(fd, bytes(0x1000), offset(HIGH + 0x1800)) == 0x800
        assert failing(os.pwrite, fd, b"a", offset(HIGH + 0x2000)) == errno.EFAULT
        assert vm.read("error") == f"virt: {HIGH + 0x2000:#x} is not mapped to RAM\n"
    finally:
        os.close(fd)
    with open(vm / "mem", "rb") as ram:
        ram.seek(0x200FFC)
        assert ram.read(4) == b"cdxy"
        ram.seek(0x300000)
        assert ram.read(2) == b"zH"


def test_virt_by_dd(long_vm):
    poke(long_vm, 0x200FF0, b"0123456789abcdef")
    at = f"$((0x{HIGH + 0xFF4:x} & 0x7fffffffffffffff))"
    done = shell(long_vm, f"dd if=virt bs=1 count=4 skip={at} status=none")
    assert (done.stdout, done.stderr) == ("4567", "")
    done = shell(long_vm, f"printf XY | dd of=virt bs=1 seek={at} status=none conv=notrunc")
    assert done.returncode == 0, done.stderr
    done = shell(long_vm, "od -An -c -j $((0x200ff0)) -N 8 virt")
    assert done.stdout.split() == list("0123XY67")


def test_without_paging_virt_is_physical(vm):
    poke(vm, 0x12345, b"here")
    fd = os.open(vm / "virt", os.O_RDONLY)
    assert os.pread(fd, 4, 0x12345) == b"here"
    assert len(os.pread(fd, 8192, (128 << 20) - 16)) == 16
    assert failing(os.pread, fd, 1, 128 << 20) == errno.EFAULT
    assert failing(os.pread, fd, 1, 1 << 32) == errno.EFAULT
    os.close(fd)


def test_code_written_through_virt_is_what_runs(long_vm):
    vm = long_vm
    poke(vm, 0x1000, bytes.fromhex("b042 e680 ebfa"))  # l: mov al, 0x42; out 0x80, al; jmp l
    assert "data=0x42" in vm.run()
    fd = os.open(vm / "virt", os.O_WRONLY)
    os.pwrite(fd, b"\x43", 0x1001)
    os.close(fd)
    assert "data=0x43" in vm.run()


def test_virt_and_mappings_of_mem_see_each_other(either_vm):
    """However `mem` is served."""
    vm = either_vm
    with open(vm / "mem", "r+b") as file, mmap.mmap(file.fileno(), 1 << 20) as mapped:
        virt = os.open(vm / "virt", os.O_RDWR)
        try:
            assert mapped[0x5000] == 0
            mapped[0x5000:0x5004] = b"mine"
            assert os.pread(virt, 4, 0x5000) == b"mine"
            os.pwrite(virt, b"ours", 0x5000)
            assert mapped[0x5000:0x5004] == b"ours"
            mapped[0x1000] = 0xF4
            vm.write("registers", "rip 0x1000\ncs 0\ncs.base 0\n")
            assert ": f4 " in vm.read("disasm").splitlines()[0]
        finally:
            os.close(virt)


def test_virt_of_a_running_machine(long_vm):
    vm = long_vm
    poke(vm, 0x1000, bytes.fromhex("48ff0425 00202000 ebf6"))  # l: inc qword [0x202000]; jmp l
    vm.write("state", "run")
    fd = os.open(vm / "virt", os.O_RDWR)
    try:
        first = struct.unpack("<Q", os.pread(fd, 8, 0x202000))[0]
        os.pwrite(fd, struct.pack("<Q", 1 << 60), 0x202000)
        assert struct.unpack("<Q", os.pread(fd, 8, 0x202000))[0] >= 1 << 60 > first
        assert vm.is_running()
    finally:
        os.close(fd)
        vm.write("state", "pause")


# ---- pagetable


def test_pagetable(long_vm):
    lines = long_vm.read("pagetable").splitlines()
    assert lines[0].split()[:5] == ["0000000000000000-0000000100000000", "rwxu", "4194304K", "0x0", "2M"]
    assert [line.split()[:5] for line in lines[1:]] == [
        ["ffffffff80000000-ffffffff80001000", "rwx-", "4K", "0x200000", "4K"],
        ["ffffffff80001000-ffffffff80002000", "r---", "4K", "0x300000", "4K"],
        ["ffffffff80003000-ffffffff80004000", "rwx-", "4K", "0x400000", "4K"],
    ]


def test_pagetable_without_paging_says_so(vm):
    assert vm.read("pagetable") == "# paging is off: linear addresses are physical\n"
    assert (vm / "cpu0" / "pagetable").read_text() == vm.read("pagetable")


def test_a_table_that_contains_itself_is_cut_off(long_vm):
    """All 512 entries of the top table lead to itself: 2^36 pages, by what the CPU makes of it."""
    poke(long_vm, TABLES, struct.pack("<Q", TABLES | 3) * 512)
    text = long_vm.read("pagetable")
    assert text.splitlines()[-1].startswith("# cut off: ")
    assert len(text) < 32 << 20


# ---- disasm and stack


def test_disasm_follows_the_mode(vm):
    vm.load("b8 3412 e8 0500 90 eb fe f4 90 c3")
    vm.write("symbols", MAP)
    vm.write("disasm", "rip 4")
    assert vm.read("disasm").splitlines() == [
        "0x00001000 <start>: b8 34 12                 mov ax, 0x1234",
        "0x00001003 <start+0x3>: e8 05 00                 call 0x100b <helper+0x6>",
        "0x00001006 <helper+0x1>: 90                       nop",
        "0x00001007 <helper+0x2>: eb fe                    jmp 0x1007 <helper+0x2>",
    ]
    for mode, text in (("protected", "mov eax, 0x5e81234"), ("long", "mov eax, 0x5e81234")):
        vm.write("mode", mode)
        vm.write("reg/rip", "0x1000")
        assert text in vm.read("disasm").splitlines()[0]
    vm.write("disasm", "helper+2 1")
    assert vm.read("disasm").endswith(": eb fe                    jmp 0x1007 <helper+0x2>\n")
    assert failing(vm.write, "disasm", "nobody") == errno.EINVAL
    assert vm.read("error") == "disasm: ADDR: no symbol 'nobody'\n"


def test_disasm_ends_where_memory_ends(long_vm):
    long_vm.write("disasm", f"{HIGH + 0x1FFE:#x} 4")
    poke(long_vm, 0x300FFE, b"\x90\x90")
    *_, last = long_vm.read("disasm").splitlines()
    assert last == f"# {HIGH + 0x2000:#x} is not mapped to RAM or ROM"


def test_disasm_of_a_rom(vm):
    """The reset vector of a PC is in its BIOS, and no RAM is there."""
    vm.write("machine", "pc")
    image = bytearray(b"\xf4" * (128 << 10))  # hlt
    image[-16:-11] = bytes.fromhex("ea 00e0 00f0")
    (vm / "bios").write_bytes(image)
    vm.write("vm_run", "step")
    assert vm.read("exit") == "debug cause=step rip=0xe000\n"
    vm.write("disasm", "0xfffffff0 2")
    assert vm.read("disasm").splitlines() == [
        "0xfffffff0: ea 00 e0 00 f0           ljmp 0xf000:0xe000",
        "0xfffffff5: f4                       hlt",
    ]
    vm.write("disasm", "0xfffc0000")
    assert vm.read("disasm") == "# 0xfffc0000 is not mapped to RAM or ROM\n"


def test_stack_with_frame_pointers(long_vm):
    """start calls helper with a frame, helper calls leaf with a frame, leaf halts."""
    vm = long_vm
    code = {
        0x1000: "e8 0b000000 f4",  # call 0x1010; hlt
        0x1010: "55 4889e5 e8 17000000 5d c3",  # push rbp; mov rbp, rsp; call 0x1030; pop rbp; ret
        0x1030: "55 4889e5 f4",  # push rbp; mov rbp, rsp; hlt
    }
    for at, text in code.items():
        poke(vm, at, bytes.fromhex(text))
    poke(vm, 0x9000, struct.pack("<Q", 0x1005))  # looks like a return address, and is none
    vm.write("symbols", "1000 T start\n1010 T middle\n1030 T leaf\n")
    assert vm.run().startswith("hlt")
    assert vm.read("stack").splitlines() == [
        "#0 0x0000000000001035 leaf+0x5",
        "#1 0x0000000000001019 middle+0x9 at 0x8fe8",
        "#2 0x0000000000001005 start+0x5 at 0x8ff8",
        "?  0x0000000000001005 start+0x5 at 0x9000",
    ]


# ---- core


def test_the_size_of_a_core_is_that_of_ram_and_its_headers(vm):
    assert (vm / "core").stat().st_size == (8 << 20) + (128 << 20)
    assert failing(os.open, vm / "core", os.O_RDWR) == errno.EACCES


def gdb(vm, *commands: str) -> str:
    if not shutil.which("gdb"):
        pytest.skip("no gdb: install gdb")
    words = [word for command in commands for word in ("-ex", command)]
    done = subprocess.run(
        ["gdb", "-nx", "-batch", *words, "-c", vm / "core"], capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


def test_gdb_reads_registers_and_linear_memory_of_a_core(long_vm):
    vm = long_vm
    poke(vm, 0x200FF8, struct.pack("<Q", 0x1122334455667788))
    poke(vm, 0x300000, struct.pack("<Q", 0xAABBCCDD))
    vm.write(
        "registers",
        "rax 0x1234567\nr15 0xfedcba\nrflags 0x202\nxmm3 0x2a\nst0 0x3fff8000000000000000\nftw 1\n",
    )
    shown = gdb(
        vm,
        "p/x $rax", "p/x $r15", "p/x $rip", "p/x $eflags", "p $xmm3.uint128", "p $st0", "p/x $cs",
        f"x/2gx {HIGH + 0xFF8:#x}", "x/gx 0x8000000000300000", f"x/x {HIGH + 0x2000:#x}",
    )  # fmt: skip
    for line in (
        "$1 = 0x1234567", "$2 = 0xfedcba", "$3 = 0x1000", "$4 = 0x202", "$5 = 42", "$6 = 1", "$7 = 0x8",
        f"{HIGH + 0xFF8:#x}:\t0x1122334455667788\t0x00000000aabbccdd", "0x8000000000300000:\t0x00000000aabbccdd",
    ):  # fmt: skip
        assert line in shown, shown
    assert f"Cannot access memory at address {HIGH + 0x2000:#x}" in shown


def test_gdb_reads_ymm_of_a_core(long_vm):
    """NT_X86_XSTATE, once the guest has enabled AVX."""
    if "ymm0" not in os.listdir(long_vm / "reg"):
        pytest.skip("the CPU has no AVX")
    long_vm.write("registers", f"xcr0 7\nymm3 {0x11223344 << 128 | 0x55667788:#x}\n")
    assert int(long_vm.read("reg/ymm3"), 16) == 0x11223344 << 128 | 0x55667788
    assert "ymm3 0x" in long_vm.read("registers")
    assert gdb(long_vm, "print/x $ymm3.v8_int32").splitlines()[-1] == (
        "$1 = {0x55667788, 0x0, 0x0, 0x0, 0x11223344, 0x0, 0x0, 0x0}"
    )


def test_gdb_reads_a_core_without_paging(vm):
    vm.load("f4")
    assert "=> 0x1000:\thlt" in gdb(vm, "x/i $pc")


def test_a_core_is_what_readelf_takes_it_for(long_vm):
    done = subprocess.run(["readelf", "-hlnW", long_vm / "core"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "CORE (Core file)" in done.stdout
    assert "NT_PRSTATUS" in done.stdout and "QEMU" in done.stdout
    loads = [line.split() for line in done.stdout.splitlines() if line.lstrip().startswith("LOAD")]
    assert [int(word, 16) for word in loads[-1][1:4]] == [0xC00000, HIGH + 0x3000, 0x400000]


def test_a_core_that_was_copied_is_a_core(vm, tmp_path):
    vm.load("f4")
    subprocess.run(["cp", "--sparse=always", vm / "core", tmp_path / "core"], check=True)
    copied = (tmp_path / "core").stat()
    assert copied.st_size == (vm / "core").stat().st_size and copied.st_blocks * 512 < 1 << 20
    with open(tmp_path / "core", "rb") as file:
        file.seek((8 << 20) + 0x1000)
        assert file.read(1) == b"\xf4"


def test_the_header_of_a_core_is_of_one_moment(vm):
    with open(vm / "core", "rb", buffering=0) as one:
        before = one.read(4096)
        vm.write("reg/rax", "0x77")
        one.seek(0)
        assert one.read(4096) == before
    with open(vm / "core", "rb", buffering=0) as other:
        assert other.read(4096) != before


def test_drgn_reads_a_core(long_vm):
    """With what Linux would have left in RAM, for drgn takes cores of Linux only."""
    pytest.importorskip("drgn", reason="no drgn: pip install drgn")
    poke(long_vm, 0x200000, b"paged")
    info = (
        f"OSRELEASE=6.1.0-test\nPAGESIZE=4096\nSYMBOL(swapper_pg_dir)={TABLES:x}\nKERNELOFFSET=0\n".encode()
    )
    info += b"NUMBER(phys_base)=0\nNUMBER(pgtable_l5_enabled)=0\n"
    poke(long_vm, 0x280004, struct.pack("<3I", 11, len(info), 0) + b"VMCOREINFO\0\0" + info)
    script = (
        "import drgn, sys; p = drgn.Program(); p.set_core_dump(sys.argv[1]); "
        f"print(p.read({HIGH:#x}, 5).decode(), p.read(0x200000, 5, physical=True).decode(), p.flags)"
    )
    done = subprocess.run([sys.executable, "-c", script, long_vm / "core"], capture_output=True, text=True)
    assert done.stdout.startswith("paged paged ") and "IS_LINUX_KERNEL" in done.stdout, done.stderr


def test_a_machine_that_was_only_made_has_sizes_of_its_own(own_server):
    """Not those that the first one of the mount got by what was written to it first."""
    server = own_server()
    server.make().write("mem_size", "16M\n")
    assert (server.make() / "core").stat().st_size == (8 << 20) + (128 << 20)


# ---- why


def test_why_is_empty_before_a_shutdown_and_tells_of_it_afterwards(long_vm):
    vm = long_vm
    assert vm.read("why") == ""
    vm.load("0f011c25 10100000 b805000000 0f0b")  # lidt [0x1010]; mov eax, 5; ud2
    vm.write("symbols", "0000000000001000 T start\n")
    assert vm.read("vm_run").startswith("shutdown cause=triple-fault")
    head, *sections = vm.read("why").split("\n\n")
    assert head.startswith("shutdown cause=triple-fault rip=")
    assert [section.split("\n")[0] for section in sections[-2:]] == ["registers:", "instructions:"]
    if vm.read("engine") == "emulator\n":
        assert "exception vector=0x6 at=0x100d" in sections[0] and "start+0xd  # #UD" in sections[0]
        assert "mov eax, 5" in sections[-1]
    vm.write("state", "reset")
    assert vm.read("why").startswith(head)


def test_why_stays_when_the_machine_moves_to_another_engine(server, long_vm):
    vm = long_vm
    home = vm.read("engine").strip()
    lines = (server.path / "engines").read_text().splitlines()
    others = [line.split()[0] for line in lines if " available=yes " in line and line.split()[0] != home]
    if not others:
        pytest.skip("there is no other engine")
    vm.load("0f011c25 10100000 0f0b")  # lidt [0x1010]; ud2
    assert vm.read("vm_run").startswith("shutdown cause=triple-fault")
    told = vm.read("why")
    for name in (*others, home):
        vm.write("engine", name)
        assert vm.read("engine") == f"{name}\n" and vm.read("why") == told
    vm.write("engine", others[0])
    vm.write("state", "reset")
    vm.write("mode", "long")
    vm.write("registers", "rip 0x1000\nrsp 0x9000\nrbx 0x1234\n")
    assert vm.read("vm_run").startswith("shutdown cause=triple-fault")
    assert vm.read("why") != told  # of the engine that it is on
    if others[0] == "emulator":
        assert "rbx 0x0000000000001234" in vm.read("why") and "exception vector=0x6 at=0x1008" in vm.read("why")
