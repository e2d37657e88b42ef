"""Snapshots of a machine are its owner's alone."""

from __future__ import annotations

import errno
import os

from host.users import A, B
from mounting import failing


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
