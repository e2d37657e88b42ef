"""`fork` on a real mount, as a shell sees it."""

from __future__ import annotations

import errno
import os

import pytest
from mounting import Machine, failing, number, put, stat, wait_until

SIZE = 128 << 20
# inc dword [0x5000]; hlt; jmp to the beginning. The same without hlt.
ONCE, COUNTING = "66ff060050 f4 ebf8", "66ff060050 ebf9"


@pytest.fixture
def fork():
    made = []

    def one(vm: Machine, name: str, snapshot: str = "") -> Machine:
        vm.write("fork", f"{name} from {snapshot}\n" if snapshot else f"{name}\n")
        child = Machine(vm.path.parent / name)
        made.append(child)
        return child

    yield one
    for child in made:
        if child.path.exists():
            child.path.rmdir()


def test_siblings_go_their_own_ways(either_vm, fork):
    vm = either_vm.load(ONCE)
    vm.run()
    children = [fork(vm, f"fork{count}") for count in range(3)]
    for child in children:
        assert child.path.stat().st_mode & 0o777 == 0o777 & ~os.umask(os.umask(0o22))
        assert child.read("state") == "halted\n" and child.read("exit") == "hlt rip=0x1006\n" and number(child) == 1
    put(vm, 0x5000, bytes((77,)))
    for runs, child in enumerate(children):
        for _ in range(runs):
            assert child.run() == "hlt rip=0x1006\n"
    assert [number(child) for child in children] == [1, 2, 3] and number(vm) == 77
    assert len({stat(child)["pid"] for child in (vm, *children)}) == 4
    vm.run()
    assert [number(child) for child in children] == [1, 2, 3]


def test_of_a_snapshot_and_of_a_fork(vm, fork):
    vm.load(ONCE)
    for name in ("one", "two"):
        vm.run()
        (vm / "snap" / name).mkdir()
    vm.run()
    put(vm, 0x700000, b"later")
    first, second = fork(vm, "first", "one"), fork(vm, "second", "two")
    assert (number(first), number(second)) == (1, 2) and number(first, 0x700000) == 0
    put(second, 0x6000, b"\x11")
    assert os.listdir(second / "snap") == []
    (second / "snap" / "own").mkdir()
    third = fork(second, "third", "own")
    put(second, 0x6000, b"\x22")
    second.run()
    fourth = fork(second, "fourth")
    vm.path.rmdir()
    second.write("restore", "own\n")
    second.path.rmdir()
    assert [(number(one), number(one, 0x6000)) for one in (first, third, fourth)] == [(1, 0), (2, 0x11), (3, 0x22)]
    for one in (first, third, fourth):
        assert one.run() == "hlt rip=0x1006\n"
    assert [number(one) for one in (first, third, fourth)] == [2, 3, 4]


def test_of_a_machine_that_runs(vm, fork):
    vm.load(COUNTING)
    vm.write("state", "run\n")
    wait_until(vm.is_running)
    before = number(vm)
    children = [fork(vm, f"of-running{count}") for count in range(3)]
    assert vm.is_running()
    numbers = [number(child) for child in children]
    assert before <= numbers[0] <= numbers[1] <= numbers[2] and {one.read("state") for one in children} == {"paused\n"}
    children[0].write("vm_run", "for 50ms\n")
    assert number(children[0]) != numbers[0] and number(children[1]) == numbers[1]
    vm.write("state", "pause\n")


def test_it_has_no_process_until_something_is_asked_of_it(server, vm, fork):
    vm.load(ONCE)
    vm.run()
    (vm / "snap" / "one").mkdir()
    children = [fork(vm, f"unborn{count}", "one") for count in range(40)]
    assert {child.path.name for child in children} <= set(os.listdir(server.path))
    with open(f"/proc/{server.server.pid}/task/{server.server.pid}/children") as file:
        zygote = file.read().split()[0]

    def machines() -> int:
        with open(f"/proc/{zygote}/task/{zygote}/children") as file:
            return len(file.read().split())

    assert machines() < 10
    vm.path.rmdir()  # what they are made of is there all the same
    assert number(children[7]) == 1 and children[7].run() == "hlt rip=0x1006\n" and number(children[7]) == 2
    assert machines() < 10 and number(children[8]) == 1
    assert children[9].path.joinpath("mem").stat().st_size == SIZE
    assert children[10].read("exit") == "hlt rip=0x1006\n"


def test_several_cpus_and_much_memory(vm, fork):
    vm.write("mem_size", "5G\n")
    vm.write("cpus", "4\n")
    vm.load(ONCE)
    vm.run()
    put(vm, 0x1_0000_1000, b"high")
    child = fork(vm, "large")
    assert sorted(name for name in os.listdir(child.path) if name.startswith("cpu") and name[3].isdigit()) == [
        "cpu0", "cpu1", "cpu2", "cpu3",
    ]  # fmt: skip
    assert child.read("mem_size") == f"{5 << 30}\n"
    assert number(child, 0x1_0000_1000) == int.from_bytes(b"high", "little")
    assert child.read("cpu3/state") == vm.read("cpu3/state")


def test_what_cannot_be(vm, fork, server):
    (vm / "snap" / "one").mkdir()
    fork(vm, "there")
    for text, code, sentence in (
        ("", errno.EINVAL, "NEW from SNAPSHOT"),
        ("a b", errno.EINVAL, "NEW from SNAPSHOT"),
        ("a from", errno.EINVAL, "NEW from SNAPSHOT"),
        ("a from one two", errno.EINVAL, "NEW from SNAPSHOT"),
        ("x" * 2000, errno.EINVAL, "NEW from SNAPSHOT"),
        (".a", errno.EINVAL, "no name for a machine"),
        ("a/b", errno.EINVAL, "no name for a machine"),
        ("a from .one", errno.EINVAL, "no name for a snapshot"),
        ("there", errno.EEXIST, "already"),
        ("engines", errno.EEXIST, "already"),
        ("a from two", errno.ENOENT, "no snapshot"),
    ):
        assert failing(lambda text=text: vm.write("fork", f"{text}\n")) == code, text
        assert vm.read("error").startswith("fork: ") and sentence in vm.read("error"), text
    assert not (server.path / "a").exists()
    assert failing(lambda: os.open(vm / "fork", os.O_RDONLY)) == errno.EACCES


def test_a_text_in_pieces(vm, fork, server):
    fd = os.open(vm / "fork", os.O_WRONLY)
    (vm / "snap" / "one").mkdir()
    for piece in (b" ", b"in-pieces from ", b"one\n"):
        os.write(fd, piece)
    os.close(fd)
    Machine(server.path / "in-pieces").path.rmdir()
    fd = os.open(vm / "fork", os.O_WRONLY)
    os.write(fd, b"a from ")
    assert failing(lambda: os.close(fd)) == errno.EINVAL


def test_over_the_limits(own_server):
    server = own_server(engine="emulator", max_memory=4 * SIZE, max_vms=3)
    vm = server.make()
    put(vm, 0, bytes(range(256)) * (4 << 12))  # 4 MiB
    vm.write("fork", "one\n")  # RAM twice, and the base
    one = Machine(server.path / "one")
    assert failing(lambda: one.write("mem_size", "64M\n")) == errno.EBUSY
    assert failing(lambda: vm.write("fork", "two\n")) == errno.ENOSPC and "--max-mem" in vm.read("error")
    assert not (server.path / "two").exists()
    vm.path.rmdir()
    one.write("fork", "two\n")
    one.write("fork", "three\n")
    assert failing(lambda: one.write("fork", "four\n")) == errno.ENOSPC and "--max-vms" in one.read("error")
    (server.path / "two").rmdir()
    one.write("fork", "four\n")


def test_disks(server, fork, tmp_path):
    vm = server.make()
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    try:
        vm.write("machine", "pc\n")
        vm.write("dev/add", f"blk {image} cow\n")
        vm.write("dev/add", f"blk {image} ro\n")
        vm.write("dev/add", "rng\n")
        vm.write("dev/add", "net user\n")
        (vm / "snap" / "one").mkdir()
        for child in (fork(vm, "with-disks"), fork(vm, "with-disks-then", "one")):
            assert {"blk0", "blk1", "rng0", "net0"} <= set(os.listdir(child / "dev"))
            assert "mode cow" in child.read("dev/blk0/info") and "mode ro" in child.read("dev/blk1/info")
            assert "unplugged" in child.read("dev/net0/info") and "link down" in child.read("dev/net0/info")
            assert fork(child, f"{child.path.name}-again").read("machine") == "pc\n"
    finally:
        vm.path.rmdir()


def test_what_only_one_machine_can_have(server, tmp_path):
    vm = server.make()
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    try:
        vm.write("machine", "pc\n")
        vm.write("dev/add", f"blk {image}\n")
        assert failing(lambda: vm.write("fork", "no\n")) == errno.EBUSY and "cow" in vm.read("error")
        vm.path.joinpath("dev/blk0").rmdir()
        vm.write("dev/add", f"share {tmp_path} tag\n")
        assert failing(lambda: vm.write("fork", "no\n")) == errno.EBUSY and "share" in vm.read("error")
        assert not (server.path / "no").exists()
    finally:
        vm.path.rmdir()
