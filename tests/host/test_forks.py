"""Whose a fork is, and what one of them can do to another."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

from host.users import A, B, pid_of, status
from mounting import Machine, failing, wait_until


def test_it_is_the_writers(server):
    vm = A.makes(server.path / "forked-by-b")
    A.does(vm.load, "66ff060050 f4 ebf8")
    A.does(vm.run)
    assert B.does(failing, lambda: vm.write("fork", "no\n")) == errno.EACCES
    A.does(lambda: os.chmod(vm / "fork", 0o622))
    B.does(vm.write, "fork", "fork-of-b\n")
    child = Machine(server.path / "fork-of-b")
    there = os.stat(child.path)
    assert (there.st_uid, there.st_gid) == (B.uid, B.uid)
    assert A.does(failing, lambda: child.read("state")) == errno.EACCES
    assert B.does(child.run) == "hlt rip=0x1006\n"
    assert status(B.does(pid_of, child))["Uid"].split() == [str(B.uid)] * 4
    A.does(vm.path.rmdir)
    assert B.does(child.run) == "hlt rip=0x1006\n"
    B.does(child.path.rmdir)


def test_a_disk_goes_along_with_the_rights_that_the_parent_has(server, folder):
    image = folder / "disk"
    image.write_bytes(bytes(1 << 20))
    os.chown(image, A.uid, A.uid)
    image.chmod(0o600)
    vm = A.makes(server.path / "forked-with-a-disk")
    A.does(vm.write, "machine", "pc\n")
    A.does(vm.write, "dev/add", f"blk {image} cow\n")
    A.does(lambda: os.chmod(vm / "fork", 0o622))
    B.does(vm.write, "fork", "disk-of-b\n")
    child = Machine(server.path / "disk-of-b")
    assert "mode cow" in B.does(child.read, "dev/blk0/info")
    A.does(vm.path.rmdir)
    B.does(child.path.rmdir)


def test_a_parent_that_dies_leaves_its_forks_alone(server):
    vm = server.make().load("66ff060050 f4 ebf8")
    vm.run()
    names = [f"orphan{count}" for count in range(3)]
    for name in names:
        vm.write("fork", f"{name}\n")
    orphans = [Machine(server.path / name) for name in names]
    assert orphans[0].run() == "hlt rip=0x1006\n"
    os.kill(pid_of(vm), signal.SIGKILL)
    wait_until(lambda: vm.read("state") == "failed\n")
    assert failing(lambda: vm.write("fork", "late\n")) == errno.EIO
    for one in orphans:
        assert one.run() == "hlt rip=0x1006\n"
    os.kill(pid_of(orphans[0]), signal.SIGKILL)
    wait_until(lambda: orphans[0].read("state") == "failed\n")
    assert orphans[1].run() == "hlt rip=0x1006\n"
    for one in (vm, *orphans):
        one.path.rmdir()


def test_a_stopped_parent_holds_up_nobody_but_its_forker(server):
    vm, other = server.make(), server.make()
    pid = pid_of(vm)
    os.kill(pid, signal.SIGSTOP)
    child = os.fork()
    if child == 0:
        try:
            vm.write("fork", "of-stopped\n")
        finally:
            os._exit(0)
    try:
        wait_until(lambda: Path(f"/proc/{child}/syscall").read_text().startswith("1 "), "it is in write(2)")
        other.write("fork", "of-other\n")
        assert Machine(server.path / "of-other").read("state") == "paused\n"
        assert failing(lambda: os.mkdir(server.path / "of-stopped")) == errno.EEXIST
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        wait_until(lambda: not failing_or_none(lambda: os.mkdir(server.path / "of-stopped")))
    finally:
        os.kill(pid, signal.SIGCONT)
    for name in ("of-stopped", "of-other"):
        (server.path / name).rmdir()
    vm.path.rmdir()
    other.path.rmdir()


def failing_or_none(call) -> int:
    try:
        call()
    except OSError as error:
        return error.errno
    return 0
