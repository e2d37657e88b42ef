"""Snapshots of a machine are its owner's alone."""

from __future__ import annotations

import errno
import os
import signal
import subprocess

from host.users import A, B, pid_of
from mounting import failing, number, wait_until

ONCE = "66ff060050 f4 ebf8"  # again: inc dword [0x5000]; hlt; jmp again


def test_another_user_gets_nothing_of_them(server):
    vm = A.makes(server.path / "snapshots-of-a")
    A.does((vm / "snap" / "one").mkdir)
    folder = vm / "snap" / "one"
    assert A.does(lambda: sorted(os.listdir(folder))) == ["disks", "images", "info", "mem", "state"]
    for act in (
        lambda: os.listdir(vm / "snap"),
        lambda: os.mkdir(vm / "snap" / "two"),
        lambda: os.rmdir(folder),
        lambda: os.listdir(folder),
        lambda: os.open(folder / "mem", os.O_RDONLY),
        lambda: os.open(folder / "state", os.O_RDONLY),
        lambda: os.open(vm / "restore", os.O_WRONLY),
        lambda: os.open(vm / "restore", os.O_RDONLY),
    ):
        assert B.does(failing, act) == errno.EACCES
    assert A.does(lambda: os.listdir(vm / "snap")) == ["one"]
    A.does(vm.path.rmdir)


def test_a_disk_of_another_users_line_is_frozen_with_files_of_the_one_who_asks(server, folder):
    """A snapshot needs a new file for what is written to a cow disk from then on."""
    image = folder / "disk"
    image.write_bytes(bytes(1 << 20))
    image.chmod(0o644)
    vm = A.makes(server.path / "snapshots-with-a-disk")
    A.does(vm.write, "machine", "pc\n")
    A.does(vm.write, "dev/add", f"blk {image} cow\n")
    for name in ("one", "two"):
        A.does((vm / "snap" / name).mkdir)
    assert A.does(lambda: os.listdir(vm / "snap" / "one" / "disks")) == ["blk0"]
    A.does(vm.path.rmdir)


def test_a_saved_machine_is_loaded_by_another_user_who_gets_it(server, folder):
    """It is that user's then, in all that it has."""
    folder.chmod(0o777)
    vm = A.makes(server.path / "saved-by-a")
    A.does(vm.load, ONCE)
    A.does(vm.run)
    A.does((vm / "snap" / "one").mkdir)
    saved = folder / "saved"
    A.does(subprocess.check_call, ["cp", "-r", vm / "snap" / "one", saved])
    other = B.makes(server.path / "loaded-by-b")
    copy = ["cp", "-r", saved, other / "snap" / "in"]
    assert B.does(subprocess.call, copy)  # it is A's alone
    B.does(lambda: [os.rmdir(other / "snap" / name) for name in os.listdir(other / "snap")])
    subprocess.check_call(["chown", "-R", f"{B.uid}:{B.uid}", saved])
    B.does(subprocess.check_call, copy)
    B.does(other.write, "restore", "in\n")
    assert B.does(number, other) == 1 and B.does(other.run) == "hlt rip=0x1006\n" and B.does(number, other) == 2
    assert os.stat(other.path).st_uid == B.uid and A.does(failing, lambda: other.read("regs")) == errno.EACCES
    for who, one in ((A, vm), (B, other)):
        who.does(one.path.rmdir)


def test_a_process_that_is_killed_with_a_history_leaves_nothing(server):
    vm, other = server.make(), server.make()
    for one in (vm, other):
        one.load("66ff060050 ebf9")
    vm.write("history", "on\n")
    vm.write("state", "run\n")
    wait_until(lambda: int(dict(line.split(" ", 1) for line in vm.read("history").splitlines())["checkpoints"]) > 2)
    os.kill(pid_of(vm), signal.SIGKILL)
    wait_until(lambda: vm.read("state") == "failed\n")
    assert "SIGKILL" in vm.read("error") and failing(lambda: vm.write("vm_run", "back 1\n")) == errno.EIO
    other.write("vm_run", "insns 100\n")
    assert other.read("exit").startswith("limit ")
    for one in (vm, other):
        one.path.rmdir()
