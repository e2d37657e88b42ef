"""snap/ and `restore` on a real mount, as a shell sees them."""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mounting import Machine, blocked_read, failing, number, put, running, stat, wait_until

from vmfs.words.modes import MODES

SIZE = 128 << 20
# inc dword [0x5000]; jmp to itself; the same with hlt after each
COUNTING, ONCE = "66ff060050 ebf9", "66ff060050 f4"


def make(vm: Machine, name: str) -> None:
    (vm / "snap" / name).mkdir()


def info(vm: Machine, name: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in vm.read(f"snap/{name}/info").splitlines())


def test_there_and_back(either_vm):
    vm = either_vm.load(ONCE)
    for count in range(1, 4):
        assert vm.run() == "hlt rip=0x1006\n"
        make(vm, f"s{count}")
        vm.write("reg/rip", "0x1000")
    assert sorted(os.listdir(vm / "snap")) == ["s1", "s2", "s3"]
    for count in (2, 1, 3, 1):
        vm.write("restore", f"s{count}\n")
        assert (number(vm), vm.read("state"), vm.read("reg/rip")) == (count, "halted\n", f"{0x1006:#018x}\n")
        assert vm.read("restore") == f"s{count}\n" and vm.read("exit") == "hlt rip=0x1006\n"
        vm.write("reg/rip", "0x1000")
        assert vm.run() == "hlt rip=0x1006\n" and number(vm) == count + 1
    assert stat(vm)["memory_served_by"] == "page-cache"


def test_of_a_machine_that_runs(vm):
    vm.load(COUNTING)
    fd = os.open(vm / "vm_run", os.O_RDONLY)
    waiting = blocked_read(fd)
    running(vm)
    for name in "abc":
        make(vm, name)
        assert vm.is_running()
    vm.write("restore", "b\n")
    returned, _, line = waiting.end()
    assert returned > 0 and line.startswith(b"interrupted rip=")
    os.close(fd)
    assert vm.read("state") == "paused\n" and vm.read("exit") == ""
    then = number(vm)
    kept = []
    for name in "abc":
        with open(vm / "snap" / name / "mem", "rb") as ram:
            ram.seek(0x5000)
            kept.append(int.from_bytes(ram.read(4), "little"))
    assert kept == sorted(kept) and kept[1] == then
    vm.write("vm_run", "for 50ms\n")
    assert number(vm) != then


def test_what_stands_in_it(vm):
    vm.load(ONCE)
    vm.run()
    before = time.time()
    make(vm, "one")
    folder = vm / "snap" / "one"
    assert sorted(os.listdir(folder)) == ["disks", "images", "info", "mem", "state"]
    assert os.listdir(folder / "disks") == os.listdir(folder / "images") == []
    for path, mode in ((vm / "snap", 0o700), (folder, 0o700), (folder / "mem", 0o600), (folder / "state", 0o600)):
        assert path.stat().st_mode & 0o777 == mode, path
    told = info(vm, "one")
    assert told["engine"] == vm.read("engine").strip() and told["memory"] == str(SIZE)
    assert abs(time.mktime(time.strptime(told["taken"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone - before) < 100
    assert int(told["shared"]) >= 4096 and int(told["own"]) == 0
    state = (folder / "state").read_bytes()
    assert len(state) == (folder / "state").stat().st_size and b"cpu0/regs" in state
    there = (folder / "mem").stat()
    assert there.st_size == SIZE and 0 < there.st_blocks * 512 < 1 << 20
    with open(folder / "mem", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as ram:
        assert ram[0x5000] == 1
        put(vm, 0x5000, b"\x77")
        assert ram[0x5000] == 1 and ram[SIZE - 1] == 0
    for name in ("mem", "state", "info"):
        assert failing(lambda name=name: os.open(folder / name, os.O_RDWR)) == errno.EACCES
        others = f"exec 2>&- setsid dd if=/dev/null of={folder / name}"
        assert subprocess.run(["sh", "-c", others], check=False).returncode
        assert failing(lambda name=name: os.unlink(folder / name)) == errno.EPERM
    assert failing(lambda: os.mkdir(folder / "more")) == errno.EPERM
    assert failing(lambda: os.rename(folder, vm / "snap" / "two")) == errno.EPERM


def test_it_is_copied_by_plain_programs(vm, tmp_path):
    size = 8 << 20
    vm.write("mem_size", f"{size}\n")
    put(vm, 0x123456, b"somewhere")
    make(vm, "one")
    put(vm, 0x123456, b"elsewhere")
    subprocess.run(["cp", "-r", vm / "snap" / "one", tmp_path / "cp"], check=True)
    with open(tmp_path / "one.tar", "wb") as archive:
        subprocess.run(["tar", "-cSf", "-", "-C", vm / "snap", "one"], stdout=archive, check=True)
    subprocess.run(["tar", "-xSf", tmp_path / "one.tar", "-C", tmp_path], check=True)
    for copy in (tmp_path / "cp", tmp_path / "one"):
        ram = copy / "mem"
        assert ram.stat().st_size == size and ram.stat().st_blocks * 512 < 1 << 20
        assert ram.read_bytes()[0x123456 : 0x123456 + 9] == b"somewhere"
        assert (copy / "state").read_bytes() == (vm / "snap" / "one" / "state").read_bytes()
    subprocess.run(["chmod", "-R", "u+w", tmp_path], check=True)


@pytest.mark.parametrize("writes", [False, True])
def test_clients_that_have_mem_open(either_server, either_vm, writes):
    """They go on seeing RAM, and it them, through snapshots and back."""
    vm = either_vm.load(ONCE)
    vm.run()
    fd = os.open(vm / "mem", os.O_RDWR if writes else os.O_RDONLY)
    with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)) as ram:
        way = stat(vm)["memory_served_by"]
        assert ram[0x5000] == 1
        if writes:
            ram[0x6000] = 11
        make(vm, "one")
        assert stat(vm)["memory_served_by"] == way
        if writes:
            ram[0x6000] = 22
            ram[0x700000] = 33
        vm.write("reg/rip", "0x1000")
        vm.run()
        assert ram[0x5000] == 2
        make(vm, "two")
        vm.write("restore", "one\n")
        assert ram[0x5000] == 1 and os.pread(fd, 1, 0x5000) == b"\1"
        assert (ram[0x6000], ram[0x700000]) == ((11, 0) if writes else (0, 0))
        vm.write("restore", "two\n")
        assert (ram[0x5000], ram[0x6000], ram[0x700000]) == ((2, 22, 33) if writes else (2, 0, 0))
        vm.write("reg/rip", "0x1000")
        vm.run()
        assert ram[0x5000] == 3
    os.close(fd)
    make(vm, "three")
    assert stat(vm)["memory_served_by"] == "page-cache"
    vm.write("restore", "one\n")
    assert number(vm) == 1
    vm.write("restore", "three\n")
    assert number(vm) == 3


def test_mem_after_a_snapshot(vm):
    """As any file, by the machine: reads, writes, mappings, the end; the guest sees them at its next run."""
    make(vm, "one")
    fd = os.open(vm / "mem", os.O_RDWR)
    data = os.urandom(1 << 20)
    assert os.pwrite(fd, data, 0x345678) == len(data) and os.pread(fd, len(data), 0x345678) == data
    assert os.pwrite(fd, b"12345678", SIZE - 4) == 4 and os.pread(fd, 9, SIZE - 4) == b"1234"
    assert failing(lambda: os.pwrite(fd, b"x", SIZE)) == errno.EFBIG and os.pread(fd, 1, SIZE) == b""
    with mmap.mmap(fd, SIZE) as ram:
        ram[0x1000:0x1008] = bytes.fromhex(ONCE).ljust(8, b"\xf4")
        vm.write("registers", "rip 0x1000\ncs 0\ncs.base 0\n")
        for count in (1, 2):
            assert vm.run() == "hlt rip=0x1006\n" and ram[0x5000] == count
            vm.write("reg/rip", "0x1000")
        make(vm, "two")
        ram[0x5000] = 9
        vm.write("restore", "two\n")
        assert ram[0x5000] == 2
    os.close(fd)
    assert number(vm, 0x345678) == int.from_bytes(data[:4], "little")


def test_what_cannot_be(vm):
    make(vm, "one")
    for name, number_ in ((".hidden", errno.EINVAL), ("a b", errno.EINVAL), ("x" * 65, errno.EINVAL)):
        assert failing(lambda name=name: make(vm, name)) == number_
        assert "is no name for a snapshot" in vm.read("error")
    assert failing(lambda: make(vm, "one")) == errno.EEXIST
    assert failing(lambda: (vm / "snap" / "two").rmdir()) == errno.ENOENT
    for text, number_ in (("two", errno.ENOENT), ("one two", errno.EINVAL), ("../one", errno.EINVAL), ("", 0)):
        if number_:
            assert failing(lambda text=text: vm.write("restore", f"{text}\n")) == number_, text
            assert vm.read("error").startswith("restore: ")
    assert failing(lambda: os.open(vm / "snap" / "file", os.O_CREAT | os.O_WRONLY)) == errno.ENOENT
    for name, text in (("mem_size", "64M"), ("cpus", "2"), ("machine", "pc")):
        assert failing(lambda name=name, text=text: vm.write(name, f"{text}\n")) == errno.EBUSY, name
    (vm / "snap" / "one").rmdir()
    vm.write("cpus", "2\n")
    assert os.listdir(vm / "snap") == []


def test_an_open_file_of_one_that_was_dropped(vm):
    make(vm, "one")
    fd = os.open(vm / "snap" / "one" / "info", os.O_RDONLY)
    (vm / "snap" / "one").rmdir()
    assert failing(lambda: os.pread(fd, 10, 0)) == errno.ENODEV
    os.close(fd)
    make(vm, "one")
    assert info(vm, "one")["memory"] == str(SIZE)


def test_without_room(own_server):
    server = own_server(engine="emulator", max_memory=2 * SIZE + (24 << 20))
    vm = server.make()
    put(vm, 0, os.urandom(8 << 20))
    make(vm, "one")  # RAM and the base under it
    free = os.statvfs(server.path).f_bavail
    put(vm, 0, os.urandom(8 << 20))
    make(vm, "two")
    put(vm, 0, os.urandom(20 << 20))
    assert failing(lambda: make(vm, "three")) == errno.ENOSPC
    assert "--max-mem" in vm.read("error")
    assert sorted(os.listdir(vm / "snap")) == ["one", "two"]
    assert failing(lambda: (server.path / "another").mkdir()) == errno.ENOSPC
    vm.write("restore", "two\n")
    (vm / "snap" / "two").rmdir()
    vm.write("restore", "one\n")
    wait_until(lambda: os.statvfs(server.path).f_bavail >= free, "room is given back")
    vm.path.rmdir()
    server.make()


def test_news_of_exits_come_where_it_went_back(vm):
    vm.load(ONCE)
    make(vm, "fresh")
    vm.run()
    fd = os.open(vm / "exit", os.O_RDONLY)
    poll = select.poll()
    poll.register(fd, select.POLLPRI)
    assert os.pread(fd, 100, 0) == b"hlt rip=0x1006\n" and not poll.poll(0)
    vm.write("restore", "fresh\n")
    assert poll.poll(10_000) and os.pread(fd, 100, 0) == b""
    vm.run()
    assert poll.poll(10_000) and os.pread(fd, 100, 0) == b"hlt rip=0x1006\n"
    os.close(fd)


def test_a_disk_that_is_cow(server, tmp_path):
    vm = server.make()
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    try:
        vm.write("machine", "pc\n")
        vm.write("dev/add", f"blk {image} cow\n")
        make(vm, "one")
        assert os.listdir(vm / "snap" / "one" / "disks") == ["blk0"]
        there = (vm / "snap" / "one" / "disks" / "blk0").stat()
        assert there.st_size == 1 << 20 and there.st_blocks == 0
        assert info(vm, "one")["disk"] == "blk0 cow"
        vm.write("restore", "one\n")
    finally:
        vm.path.rmdir()


def test_a_disk_that_is_rw_stays_as_it_is(server, tmp_path):
    vm = server.make()
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    try:
        vm.write("machine", "pc\n")
        vm.write("dev/add", f"blk {image}\n")
        make(vm, "one")
        vm.write("restore", "one\n")
        wait_until(lambda: "rw hold stays as it is now: blk0" in vm.read("error"))
    finally:
        vm.path.rmdir()


@pytest.mark.parametrize("moment", [0.0, 0.002, 0.01, 0.03])
def test_a_machine_that_is_killed_meanwhile_leaves_nothing(own_server, moment):
    server = own_server(engine="emulator", max_memory=2 << 30)
    vm = server.make()
    put(vm, 0, os.urandom(1 << 20) * 100)
    fd = os.open(vm / "mem", os.O_RDONLY)  # so that all is copied
    pid = int(stat(vm)["pid"])
    child = os.fork()
    if child == 0:
        try:
            (vm / "snap" / "one").mkdir()
        finally:
            os._exit(0)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(lambda: vm.read("state") == "failed\n")
    assert failing(lambda: make(vm, "two")) == errno.EIO
    os.close(fd)
    vm.path.rmdir()
    assert not Path(f"/proc/{pid}").exists()
    other = server.make()
    make(other, "one")
    other.write("restore", "one\n")


def test_each_mode_of_code_comes_back(vm):
    for mode in MODES:
        vm.write("mode", f"{mode}\n")
        before = vm.read("registers")
        make(vm, mode)
        vm.write("mode", "real\n")
        vm.write("restore", f"{mode}\n")
        if vm.read("engine") == "emulator\n":
            assert vm.read("registers") == before
        assert vm.read("mode") == f"{mode}\n"
    for mode in MODES:
        (vm / "snap" / mode).rmdir()
    assert os.listdir(vm / "snap") == []
