"""`mem` on a real mount, both ways to serve it."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import signal
import subprocess
import sys

import pytest
from mounting import failing

SIZE = 128 << 20
# mov al, [0x5000]; inc al; mov [0x6000], al; hlt
INCREMENT = "a0 0050 fec0 a2 0060 f4"


def opened(vm, flags=os.O_RDWR) -> int:
    return os.open(vm / "mem", flags)


def test_what_the_guest_and_a_mapping_write_the_other_sees(either_vm):
    vm = either_vm.load(INCREMENT)
    fd = opened(vm)
    with mmap.mmap(fd, SIZE) as ram:
        for value in (1, 7, 0x41):
            ram[0x5000] = value
            assert ram[0x6000] in (0, 2, 8)  # a page that is cached when the guest changes it
            vm.write("reg/rip", "0x1000")
            assert vm.run() == "hlt rip=0x1009\n"
            assert ram[0x6000] == value + 1
            assert os.pread(fd, 1, 0x6000)[0] == value + 1
            os.pwrite(fd, b"\x20", 0x5000)
            assert ram[0x5000] == 0x20
    os.close(fd)


def test_two_clients_see_each_other(either_vm):
    one, two = opened(either_vm), opened(either_vm)
    with mmap.mmap(one, SIZE) as here, mmap.mmap(two, SIZE) as there:
        here[0x1234] = 99
        assert there[0x1234] == 99
        assert os.pread(two, 1, 0x1234) == b"\x63"
        os.pwrite(two, b"hello", SIZE - 5)
        assert here[SIZE - 5 :] == b"hello"
    os.close(one)
    os.close(two)


def test_all_mixes_of_opens(either_vm):
    """Every order of the three ways to open, all open at once: each reads, writes and maps as it may."""
    ways = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
    for number, order in enumerate(itertools.permutations(ways), 1):
        fds = {flags: opened(either_vm, flags) for flags in order}
        assert os.pwrite(fds[os.O_WRONLY], bytes([number]), 0x3000) == 1
        assert os.pread(fds[os.O_RDONLY], 1, 0x3000)[0] == number
        assert os.pread(fds[os.O_RDWR], 1, 0x3000)[0] == number
        with mmap.mmap(fds[os.O_RDWR], SIZE) as ram:
            assert ram[0x3000] == number
            ram[0x3000] = number + 100
            with mmap.mmap(fds[os.O_RDONLY], SIZE, prot=mmap.PROT_READ) as view:
                assert view[0x3000] == number + 100
        assert os.pread(fds[os.O_RDONLY], 1, 0x3000)[0] == number + 100
        assert failing(os.pread, fds[os.O_WRONLY], 1, 0) == errno.EBADF
        assert failing(os.pwrite, fds[os.O_RDONLY], b"1", 0) == errno.EBADF
        for fd in fds.values():
            os.close(fd)


def test_the_end(either_vm):
    fd = opened(either_vm)
    for _ in range(2):
        assert os.pread(fd, 10, SIZE) == b"" and os.pread(fd, 10, SIZE + 12345) == b""
        assert os.pread(fd, 10, SIZE - 4) == bytes(4)
        assert failing(os.pwrite, fd, b"12345678", SIZE) == errno.EFBIG
        assert failing(os.pwrite, fd, b"1", SIZE + (1 << 40)) == errno.EFBIG
        assert os.pwrite(fd, b"12345678", SIZE - 4) == 4
        assert os.pread(fd, 10, SIZE - 4) == b"1234"
        assert os.fstat(fd).st_size == SIZE
        os.pwrite(fd, bytes(4), SIZE - 4)
        either_vm.load("f4").run()  # and now it is sealed
    os.close(fd)


def test_a_file_can_be_copied_into_it(either_vm, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(os.urandom(3_000_001))
    subprocess.run(["cp", image, either_vm / "mem"], check=True)
    fd = opened(either_vm, os.O_RDONLY)
    assert os.pread(fd, 3_000_001, 0) == image.read_bytes()
    assert os.fstat(fd).st_size == SIZE
    os.close(fd)
    subprocess.run(
        ["dd", f"if={image}", f"of={either_vm / 'mem'}", "bs=4096", "seek=1000", "conv=notrunc"],
        check=True,
    )
    assert (either_vm / "mem").read_bytes()[4096000:7096001] == image.read_bytes()


def test_an_open_with_o_trunc_leaves_memory_and_mappings_alone(either_vm):
    if "signals_noticed_by interrupt-message" not in either_vm.read("stat"):
        pytest.skip("without the hooks in front of libfuse O_TRUNC is the kernel's, and a SIGBUS to mappings")
    one = opened(either_vm)
    with mmap.mmap(one, SIZE) as ram:
        ram[0x5000] = 1
        two = opened(either_vm, os.O_RDWR | os.O_TRUNC)
        assert ram[0x5000] == 1 and os.pread(two, 1, 0x5000) == b"\1"
        os.truncate(either_vm / "mem", 0)
        ram[0x5000] = 2
        assert os.pread(two, 1, 0x5000) == b"\2" and os.fstat(two).st_size == SIZE
        assert failing(os.ftruncate, two, 0) == errno.EINVAL
        assert failing(os.truncate, either_vm / "mem", 4097) == errno.EINVAL
    os.close(one)
    os.close(two)


def test_memory_costs_nothing_until_it_is_touched(either_vm):
    # The page tables of `mode` aside.
    assert (either_vm / "mem").stat().st_blocks * 512 < 1 << 20
    fd = opened(either_vm)
    os.pread(fd, 16 << 20, 0)
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.pwrite(fd, bytes(4 << 20), 1 << 20)
    assert 4 << 20 <= os.fstat(fd).st_blocks * 512 < 5 << 20
    os.close(fd)


def test_what_the_server_changes_is_seen(either_vm):
    """`mode` writes page tables."""
    fd = opened(either_vm)
    with mmap.mmap(fd, SIZE) as ram:
        assert not any(ram[SIZE - (1 << 20) :])
        either_vm.write("mode", "long")
        assert any(ram[SIZE - (1 << 20) :])
        root = int(either_vm.read("reg/cr3"), 16)
        entry = int.from_bytes(ram[root : root + 8], "little")
        assert entry & 1 and os.pread(fd, 8, root) == entry.to_bytes(8, "little")
    os.close(fd)


def test_a_mapping_grows_with_the_memory(either_vm):
    fd = opened(either_vm)
    os.ftruncate(fd, 4 << 20)
    assert os.fstat(fd).st_size == 4 << 20
    assert failing(os.pwrite, fd, b"1", 4 << 20) == errno.EFBIG
    os.ftruncate(fd, 8 << 20)
    with mmap.mmap(fd, 8 << 20) as ram:
        ram[-1] = 5
    assert os.pread(fd, 2, (8 << 20) - 1) == b"\x05"
    os.close(fd)


DIRTY_CLIENT = """
import mmap, os, sys, signal
fd = os.open(sys.argv[1], os.O_RDWR)
ram = mmap.mmap(fd, 128 << 20)
for page in range(0, 1 << 20, 4096):
    ram[0x5000 + page] = 0x33
print("mapped", flush=True)
signal.pause()
"""


def test_a_client_that_dies_with_mappings_has_written(either_vm):
    vm = either_vm.load(INCREMENT)
    client = subprocess.Popen([sys.executable, "-c", DIRTY_CLIENT, vm / "mem"], stdout=subprocess.PIPE)
    assert client.stdout.readline() == b"mapped\n"
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdout.close()
    assert vm.run() == "hlt rip=0x1009\n"
    fd = opened(vm, os.O_RDONLY)
    assert os.pread(fd, 1, 0x6000) == b"\x34"
    os.close(fd)


def test_a_machine_is_removed_while_it_is_mapped(either_server):
    vm = either_server.make().load(INCREMENT)
    fd = opened(vm)
    ram = mmap.mmap(fd, SIZE)
    ram[0x5000] = 1
    vm.run()
    vm.path.rmdir()
    assert failing(os.pwrite, fd, b"1", 0) == errno.ENODEV
    assert failing(os.fstat, fd) == errno.ENODEV
    os.close(fd)
    ram.close()
    assert either_server.make().load("f4").run() == "hlt rip=0x1001\n"  # the mount lives on


@pytest.mark.parametrize("mode, what", [("long", "page tables"), ("protected", "GDT")])
def test_memory_is_not_cut_off_under_tables(either_vm, mode, what):
    """Those that `mode` has written at its end. The machine runs on as it would have."""
    vm = either_vm.load("b8 2a000000 f4")  # mov eax, 42; hlt
    vm.write("mode", mode)
    vm.write("reg/rip", "0x1000")
    assert failing(vm.write, "mem_size", "64M") == errno.EINVAL
    assert f"the {what} of cpu0, at 0x" in vm.read("error") and "write mem_size before mode" in vm.read("error")
    assert failing(os.truncate, vm / "mem", SIZE - mmap.PAGESIZE) == errno.EINVAL
    assert vm.read("mem_size") == f"{SIZE}\n"
    vm.write("mem_size", "256M")  # they stay where they are
    assert vm.run() == "hlt rip=0x1006\n"
    assert vm.read("reg/rax") == "0x000000000000002a\n"


def test_memory_is_cut_before_the_mode(either_vm):
    vm = either_vm.load("b8 2a00 f4")
    vm.write("mode", "long")
    vm.write("mode", "real")
    vm.write("mem_size", "64M")
    vm.write("mode", "long")
    assert failing(vm.write, "mem_size", "32M") == errno.EINVAL
