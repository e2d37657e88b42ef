"""The files of a machine on a real mount: what each shows, takes and refuses."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess

import pytest
from mounting import failing, for_plain_processes

from vmfs.fs.files import CPU_FILES, FILES, ROOT_FILES
from vmfs.words.exits import EXIT_STRUCT_SIZE
from vmfs.words.registers import REGISTERS

OUT_HLT = "b042 e680 f4"  # mov al, 0x42; out 0x80, al; hlt
IN_OUT = "e481 e680 f4"  # in al, 0x81; out 0x80, al; hlt


def test_the_root(server):
    names = set(os.listdir(server.path))
    assert {row.name for row in ROOT_FILES} <= names
    assert (server.path / "version").read_text().strip()
    for line in (server.path / "engines").read_text().splitlines():
        name, available, preferred, speed, reason = line.split(maxsplit=4)
        assert available in ("available=yes", "available=no")
        assert preferred in ("preferred=yes", "preferred=no")
        assert speed.startswith("speed=") and reason.startswith('reason="') and reason.endswith('"')


def test_a_machine_has_the_files_of_the_table_and_its_maker_owns_them(server):
    old = os.umask(0o027)
    try:
        vm = server.make()
    finally:
        os.umask(old)
    info = vm.path.stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o750, os.getuid(), os.getgid())
    assert set(os.listdir(vm.path)) == {row.name for row in FILES} | {"cpu0", "dev", "reg", "snap"}
    for row in FILES:
        info = (vm / row.name).stat()
        assert stat.S_ISREG(info.st_mode)
        denied = 0o027 | (0o044 if row.kind.reading_acts else 0)  # to read it is to run
        assert stat.S_IMODE(info.st_mode) == row.mode & ~denied, row.name
        assert (info.st_uid, info.st_gid) == (os.getuid(), os.getgid())
        twin = vm / "cpu0" / row.name
        assert twin.exists() == (row.per_cpu or row.name in {own.name for own in CPU_FILES})
        if row.per_cpu:
            assert twin.stat().st_ino == info.st_ino and info.st_nlink == 2
    vm.path.rmdir()


def test_every_file_can_be_read_or_says_why_not(vm):
    of_a_pc = set("lapic irqchip pit born console console.log hvc hvc.log screen.txt screen.png framebuffer".split())
    streams = {"gdb.stream", "trace", "trace.bin"}
    for row in FILES:
        if not row.kind.readable or row.name.startswith("vm_run") or row.name in streams:
            continue
        try:
            data = (vm / row.name).read_bytes()
        except OSError as error:
            # Past RAM there is nothing.
            assert error.errno == (errno.EFAULT if row.name == "virt" else errno.EOPNOTSUPP), row.name
            assert row.name == "virt" or row.name in of_a_pc
            assert vm.read("error").startswith(f"{row.name}: ")
        else:
            assert (vm / row.name).stat().st_size == (len(data) if row.kind.walked else 0), row.name


def test_files_are_opened_only_for_what_they_do_even_by_root(vm):
    assert failing(os.open, vm / "exit", os.O_WRONLY) == errno.EACCES
    assert failing(os.open, vm / "exit", os.O_RDWR) == errno.EACCES
    assert failing(os.open, vm / "irq", os.O_RDONLY) == errno.EACCES


def test_regs_is_struct_kvm_regs(vm):
    fd = os.open(vm / "regs", os.O_RDWR)
    assert os.fstat(fd).st_size == 144
    before = os.pread(fd, 1000, 0)
    assert len(before) == 144
    assert os.pwrite(fd, struct.pack("<Q", 0x1122334455667788), 8) == 8
    assert os.pread(fd, 8, 8) == struct.pack("<Q", 0x1122334455667788)
    assert os.pwrite(fd, b"\xee", 9) == 1
    after = os.pread(fd, 1000, 0)
    assert after == before[:8] + bytes.fromhex("88ee665544332211") + before[16:]
    assert vm.read("reg/rbx") == "0x112233445566ee88\n"
    assert os.pread(fd, 8, 144) == b"" and os.pread(fd, 8, 140) == after[140:]
    assert failing(os.pwrite, fd, b"12345678", 140) == errno.EFBIG
    assert failing(os.pwrite, fd, b"1", 144) == errno.EFBIG
    assert os.pread(fd, 1000, 0) == after
    assert vm.read("error").startswith("regs: ")
    os.close(fd)


def test_states_can_be_copied_out_and_in(vm, server, tmp_path):
    other = server.make()
    other.write("registers", "rax 0x1234\nxmm3 0x55\ndr0 0x77\nmsr.0xc0000082 0x4000\n")
    for name in ("regs", "sregs", "fpu", "debugregs", "msrs", "cpuid", "mp_state", "events", "xcrs"):
        subprocess.run(["cp", other / name, tmp_path / name], check=True)
        subprocess.run(["cp", tmp_path / name, vm / name], check=True)
    for name in ("rax", "xmm3", "dr0", "msr.0xc0000082"):
        assert vm.read(f"reg/{name}") == other.read(f"reg/{name}")
    other.path.rmdir()


def test_registers_change_together_or_not_at_all(vm):
    before = vm.read("registers")
    for text, number in (
        ("rax 1\nrbx zz\n", errno.EINVAL),
        ("rax 1\nnone 2\n", errno.EINVAL),
        ("rax 1\nrax 2\n", errno.EINVAL),
        ("rax 1\0", errno.EINVAL),
        ("\n", errno.EINVAL),
    ):
        assert failing(vm.write, "registers", text) == number
        assert vm.read("registers") == before
        assert vm.read("error").startswith("registers: ")
    vm.write("registers", "rax 0x5\nrbx=6\n")
    assert (vm.read("reg/rax"), vm.read("reg/rbx")) == ("0x0000000000000005\n", "0x0000000000000006\n")
    assert before.splitlines()[0] == "rax 0x0000000000000000"


def test_reg_has_a_file_a_register(vm):
    names = os.listdir(vm / "reg")
    assert set(REGISTERS) <= set(names)
    msrs = [name for name in names if name.startswith("msr.")]
    assert "msr.0xc0000082" in msrs
    assert sorted(os.listdir(vm / "cpu0" / "reg")) == sorted(names)
    assert (vm / "reg/rax").stat().st_ino == (vm / "cpu0/reg/rax").stat().st_ino
    vm.write("reg/msr.0xc0000082", "0x1234")
    assert vm.read("reg/msr.0xc0000082") == "0x0000000000001234\n"
    assert not (vm / "reg/msr.0xdead").exists() and not (vm / "reg/msr.0xC0000080").exists()
    assert not (vm / "reg/eax").exists()


def test_the_shell_writes_files(vm):
    script = """
        set -e
        echo 0x10 > reg/rax; cat reg/rax
        printf 'rcx 7\\n' >> registers; cat reg/rcx
        echo 0x1000 | tee reg/rip
        echo 64M > mem_size; cat mem_size; stat -c %s mem
        echo protected > mode; cat mode
        dd if=regs of=/dev/stdout bs=8 count=1 status=none | od -An -tx8
    """
    done = subprocess.run(["sh", "-c", script], cwd=vm.path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "0x0000000000000010", "0x0000000000000007", "0x1000", "67108864", "67108864", "protected",
        "0000000000000010",
    ]  # fmt: skip


def test_a_read_goes_on_in_its_snapshot(vm):
    with open(vm / "registers", "rb", buffering=0) as one:
        start = one.read(6)
        vm.write("reg/rbx", "0x99")
        rest = one.read()
        assert b"rbx 0x0000000000000000" in start + rest
        one.seek(0)
        assert b"rbx 0x0000000000000099" in one.read()


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("state", "walk", errno.EINVAL),
        ("state", "run\npause", errno.EINVAL),
        ("vm_run", "fly", errno.EINVAL),
        ("vm_run", "step 0", errno.EINVAL),
        ("vm_run", "for 10", errno.EINVAL),
        ("mode", "imaginary", errno.EINVAL),
        ("mem_size", "100", errno.EINVAL),
        ("mem_size", "1T", errno.EINVAL),
        ("engine", "steam", errno.EINVAL),
        ("debug", "break 0x10\nbreak nowhere", errno.EINVAL),
        ("debug", "watch 1 2 q", errno.EINVAL),
        ("irq", "256", errno.EINVAL),
        ("irq", b"\0\1\0\0", errno.EINVAL),
        ("irq", b"\x20\0\0\0\0", errno.EINVAL),
        ("irq", "line 1 1", errno.EOPNOTSUPP),
        ("irq", "pulse 1", errno.EOPNOTSUPP),
        ("exit.data", "A", errno.EINVAL),
        ("reg/rax", "0x10000000000000000", errno.EINVAL),
        ("reg/cs.present", "2", errno.EINVAL),
        ("reg/cr8", "16", errno.EINVAL),
        ("registers", b"rax \xff", errno.EINVAL),
        ("registers", b"#" * 70000, errno.EINVAL),
    ],
)
def test_bad_input(vm, name, text, number):
    before = {row.name: (vm / row.name).read_bytes() for row in FILES if row.name in _STABLE}
    assert failing(vm.write, name, text) == number
    assert vm.read("error").startswith(f"{name.split('/')[-1]}: ")
    assert {name: (vm / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("name", ["sregs", "fpu", "xsave", "xcrs", "msrs", "debugregs", "events", "mp_state", "cpuid"])
def test_a_refused_state_says_why(vm, name):
    state = (vm / name).read_bytes()
    assert failing(vm.write, name, b"\xff" * len(state)) == errno.EINVAL
    if name != "msrs":  # the TSC goes on
        assert (vm / name).read_bytes() == state
    file, _, reason = vm.read("error").rstrip("\n").partition(": ")
    assert file == name
    assert reason.startswith("KVM_SET_") or reason != os.strerror(errno.EINVAL)


_STABLE = "regs sregs fpu debugregs registers mem_size engine mode debug exit state".split()


def test_nothing_else_can_be_made_or_removed(server, vm, tmp_path):
    root = server.path
    outside = tmp_path / "outside"
    outside.touch()
    assert failing(os.open, root / "new", os.O_CREAT | os.O_WRONLY) == errno.EPERM
    for name in ("new", "reg/raz", "reg/msr.0x99999", "cpu0/new", "dev/new"):  # as any name that is not there
        assert failing(os.open, vm / name, os.O_CREAT | os.O_WRONLY) == errno.ENOENT
        assert vm.read("error").startswith(f"{name}: there is no such ")
    assert failing(os.mkdir, vm / "new") == errno.EPERM
    assert failing(os.mknod, vm / "new") == errno.EPERM
    assert failing(os.symlink, "a", root / "new") == errno.EPERM
    assert failing(os.link, vm / "regs", vm / "new") == errno.EPERM
    assert failing(os.unlink, vm / "regs") == errno.EPERM
    assert failing(os.unlink, root / "version") == errno.EPERM
    assert failing(os.rmdir, vm / "cpu0") == errno.EPERM
    assert failing(os.rename, vm / "regs", vm / "sregs") == errno.EPERM
    assert failing(os.rename, vm / "cpu0", root / "new") == errno.EPERM
    assert failing(os.rename, vm.path, vm / "cpu0" / "new") == errno.EINVAL  # into itself
    assert failing(os.rename, outside, root / "new") == errno.EXDEV
    assert failing(os.rmdir, root / "version") == errno.ENOTDIR
    assert failing(os.rmdir, root / "nothing") == errno.ENOENT


def test_names(server):
    root = server.path
    for name in (".hidden", "a b", "a" * 65, "ä", "a:b", "a\n", "a+b"):
        assert failing(os.mkdir, root / name) == errno.EINVAL, name
    for name in ("a" * 64, "-", "_", "A.b-c_9", "0"):
        (root / name).mkdir()
        assert failing(os.mkdir, root / name) == errno.EEXIST
        (root / name).rmdir()
    assert failing(os.mkdir, root / "version") == errno.EEXIST
    assert failing(os.mkdir, root / ("a" * 300)) == errno.EINVAL


def test_rename(server):
    one, two = server.make(), server.make()
    one.write("reg/rax", "7")
    fd = os.open(one / "regs", os.O_RDONLY)
    new = server.path / "renamed"
    os.rename(one.path, new)
    assert not one.path.exists()
    assert (new / "reg/rax").read_text() == "0x0000000000000007\n"
    assert os.pread(fd, 8, 0)[0] == 7
    os.close(fd)
    assert failing(os.rename, new, two.path) == errno.ENOTEMPTY
    assert failing(os.rename, new, server.path / "a b") == errno.EINVAL
    assert failing(os.rename, new, server.path / ".a") == errno.EINVAL
    assert failing(os.rename, new, server.path / "version") == errno.ENOTDIR
    assert failing(os.rename, server.path / "version", server.path / "v") == errno.EPERM
    one.path.mkdir()  # the old name is free
    assert one.read("reg/rax") == "0x0000000000000000\n"
    for path in (one.path, two.path, new):
        path.rmdir()


def test_modes_and_owners_can_be_changed_by_the_owner(vm):
    os.chmod(vm / "mem", 0o600)
    os.chmod(vm.path, 0o700)
    owner = (12, 34) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(vm / "mem", *owner)
    if os.geteuid():
        assert failing(os.chown, vm / "mem", 12, 34) == errno.EPERM
    os.utime(vm / "mem", ns=(1, 2))
    info = (vm / "mem").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o600, *owner)
    assert (info.st_atime_ns, info.st_mtime_ns) == (1, 2)
    assert stat.S_IMODE(vm.path.stat().st_mode) == 0o700


def test_exits(vm):
    assert vm.read("exit") == vm.read("exit.bin") == vm.read("exit.data") == ""
    vm.load(OUT_HLT)
    line = vm.run()
    assert line == "io direction=out port=0x80 size=1 count=1 data=0x42 rip=0x1004\n"
    assert vm.read("exit") == line
    struct_exit = (vm / "exit.bin").read_bytes()
    assert len(struct_exit) == EXIT_STRUCT_SIZE
    assert struct.unpack_from("<IIQ", struct_exit) == (2, 0, 0x1004)
    assert (vm / "exit.data").read_bytes() == b"\x42"
    assert failing(vm.write, "exit.data", b"\x43") == errno.EINVAL  # it is done
    assert vm.run() == "hlt rip=0x1005\n"
    assert vm.read("state") == "halted\n"
    counted = dict(line.split() for line in vm.read("stat").splitlines())
    assert (counted["runs"], counted["exits.io"], counted["exits.hlt"]) == ("2", "1", "1")


def test_the_data_of_an_in(vm):
    vm.load(IN_OUT)
    assert vm.run().startswith("io direction=in port=0x81 size=1 count=1 rip=0x1000")
    assert (vm / "exit.data").read_bytes() == b"\xff"
    assert failing(vm.write, "exit.data", b"ab") == errno.EFBIG
    vm.write("exit.data", b"\x2a")
    assert (vm / "exit.data").read_bytes() == b"\x2a"
    assert vm.run().startswith("io direction=out port=0x80 size=1 count=1 data=0x2a")


def test_dirty(vm):
    vm.load("c606 0050 07 c706 ff8f 3412 f4")  # mov byte [0x5000], 7; mov word [0x8fff], 0x1234; hlt
    assert (vm / "dirty").stat().st_size == (128 << 20) // 4096 // 8
    (vm / "dirty").read_bytes()
    assert vm.run().startswith("hlt")
    bits = int.from_bytes((vm / "dirty").read_bytes(), "little")
    assert bits == 1 << 5 | 1 << 8 | 1 << 9
    assert not any((vm / "dirty").read_bytes())


def _points(vm) -> list[str]:
    """The lines of `debug`, without how the engine looks for each."""
    return [line.split(" by=")[0] for line in vm.read("debug").splitlines()]


def test_breakpoints(vm):
    vm.load("90 90 90 f4")
    vm.write("debug", "break 0x1001\nbreak 0x1002\n")
    assert _points(vm) == ["0", "1 break 0x1001 hits=0", "2 break 0x1002 hits=0"]
    assert failing(vm.write, "debug", "delete 1\ndelete 9") == errno.EINVAL
    assert "line 2" in vm.read("error")
    assert vm.run() == "debug cause=breakpoint id=1 rip=0x1001\n"
    vm.write("debug", "delete 1\n1\n")
    assert _points(vm) == ["1", "2 break 0x1002 hits=0"]
    assert vm.run() == "debug cause=step rip=0x1002\n"
    vm.write("debug", "0\ndelete all")
    assert vm.run() == "hlt rip=0x1004\n"


def test_interrupts(vm):
    # The handler of vector 0x20, at 0x2000, writes 0x55 to port 0x80: mov al, 0x55; out 0x80, al; iret
    vm.load("fb f4 90 f4")  # sti; hlt; nop; hlt
    fd = os.open(vm / "mem", os.O_RDWR)
    os.pwrite(fd, bytes.fromhex("b055e680cf"), 0x2000)
    os.pwrite(fd, struct.pack("<HH", 0x2000, 0), 4 * 0x20)
    os.close(fd)
    vm.write("registers", "rsp 0x8000\nss 0\nss.base 0\n")
    for packet in (struct.pack("<I", 0x20), "0x20\n", "32"):
        vm.write("reg/rip", "0x1000")
        vm.write("irq", packet)
        lines = [vm.run() for _ in range(3)]
        assert any("data=0x55" in line for line in lines), (packet, lines)
        while vm.run() != "hlt rip=0x1004\n":
            pass
    counters = vm.read("stat").splitlines()
    assert "interrupts 3" in counters and "interrupts_queued 0" in counters


def test_the_interrupt_queue_is_bounded(vm):
    vm.load("fa f4")  # cli; hlt: none is ever taken
    for _ in range(64):
        vm.write("irq", "0x21")
    assert failing(vm.write, "irq", "0x21") == errno.EAGAIN
    assert vm.read("error").startswith("irq: ")


@for_plain_processes
def test_limits(own_server):
    server = own_server(max_vms=2, max_memory=256 << 20)
    one, two = server.make(), server.make()
    assert failing(server.make) == errno.ENOSPC
    assert failing(one.write, "mem_size", "129M") == errno.ENOSPC
    one.write("mem_size", "64M")
    two.write("mem_size", "192M")
    two.path.rmdir()
    assert failing(os.truncate, one / "mem", 512 << 20) == errno.ENOSPC
    os.truncate(one / "mem", 256 << 20)
    assert one.read("mem_size") == f"{256 << 20}\n"
    assert failing(server.make) == errno.ENOSPC
    space = os.statvfs(server.path)
    assert space.f_bfree == 0 and space.f_ffree == 1


def test_the_size_of_memory_is_fixed_by_the_first_run(vm):
    os.truncate(vm / "mem", 1 << 20)
    assert (vm.read("mem_size"), (vm / "mem").stat().st_size) == ("1048576\n", 1 << 20)
    vm.load("f4")
    vm.run()
    assert failing(os.truncate, vm / "mem", 2 << 20) == errno.EBUSY
    assert failing(vm.write, "mem_size", "2M") == errno.EBUSY
    os.truncate(vm / "mem", 1 << 20)
    vm.write("mem_size", "1M")


def test_engine(vm):
    name = vm.read("engine").strip()
    vm.write("engine", name)
    assert vm.read("engine").strip() == name


def test_paths_on_the_mount_itself_are_refused(server, vm, tmp_path):
    """The server would have to answer what it waits for."""
    other = server.make()
    vm.write("machine", "pc")
    (tmp_path / "link").symlink_to(other.path)
    lines = [
        f"blk {other.path}/mem rw",
        f"blk {tmp_path}/link/mem ro",
        f"blk {vm.path}/kernel cow",
        f"share {server.path} tag",
        f"share {tmp_path}/link tag",
    ]
    for line in lines:
        assert failing(vm.write, "dev/add", line) == errno.EINVAL
        assert " is on this mount itself: its machine would wait for its own answers" in vm.read("error")
    for path in (f"{server.path}/socket", f"{tmp_path}/link/socket", f"{vm.path}/gdb"):
        assert failing(vm.write, "gdb", path) == errno.EINVAL
        assert vm.read("error").startswith(f"gdb: {path} is on this mount itself: ")
    assert vm.read("gdb") == "off\n"
    assert not any((vm / "dev" / name).exists() for name in ("blk0", "share0"))
    vm.write("dev/add", f"share {server.path.parent} tag")  # it has the mount below, where no guest gets to
    other.path.rmdir()


def test_a_disk_on_another_mount_of_vmfs_is_a_disk(own_server, vm):
    other = own_server().make()
    other.write("mem_size", "1M")
    vm.write("machine", "pc")
    vm.write("dev/add", f"blk {other.path}/mem ro")
    assert (vm / "dev/blk0").is_dir()
