"""How a mount ends, and who may do what on it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from mounting import SOON, blocked_read, running, wait_until

SPIN = "ebfe"  # jmp $


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_while_a_guest_runs(own_server, number):
    server = own_server()
    vm = server.make().load(SPIN)
    fd = os.open(vm / "vm_run", os.O_RDONLY)
    held = os.open(vm / "mem", os.O_RDWR)
    reader = blocked_read(fd)
    running(vm)
    server.server.send_signal(number)
    assert reader.end()[:2] == (-1, errno.ENODEV)
    assert server.server.wait(SOON) == 0
    assert not server.is_mounted()
    os.close(fd)
    os.close(held)


def test_fusermount_unmounts_and_ends_the_server(own_server):
    server = own_server()
    vm = server.make().load(SPIN)
    vm.write("state", "run")
    subprocess.run(["fusermount3", "-u", server.path], check=True)
    assert server.server.wait(SOON) == 0
    assert os.listdir(server.path) == []


def test_a_killed_server_leaves_a_mount_that_can_be_unmounted(own_server):
    server = own_server()
    vm = server.make().load(SPIN)
    fd = os.open(vm / "vm_run", os.O_RDONLY)
    reader = blocked_read(fd)
    running(vm)
    server.server.kill()
    server.server.wait()
    returned, number, _ = reader.end()
    assert returned == -1 and number in (errno.ECONNABORTED, errno.ENOTCONN)
    os.close(fd)
    if server.is_mounted():
        subprocess.run(["fusermount3", "-u", server.path], check=True)
    assert not server.is_mounted()
    assert os.listdir(server.path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="libfuse 3.14's auto_unmount leaves the mounts of users other than root")
def test_a_killed_server_is_unmounted_by_auto_unmount(own_server):
    server = own_server(fuse_options=["auto_unmount"])
    server.make().load(SPIN).write("state", "run")
    server.server.kill()
    server.server.wait()
    wait_until(lambda: not server.is_mounted(), "fusermount3 unmounts")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can abort a connection by umount -f")
def test_an_aborted_connection_ends_the_server(own_server):
    server = own_server()
    vm = server.make().load(SPIN)
    fd = os.open(vm / "vm_run", os.O_RDONLY)
    reader = blocked_read(fd)
    running(vm)
    server.abort()
    returned, number, _ = reader.end()
    assert returned == -1 and number in (errno.ECONNABORTED, errno.ENOTCONN)
    server.server.wait(SOON)
    os.close(fd)


def test_a_mount_on_what_is_no_directory_fails_with_a_sentence(tmp_path):
    code = (
        "import sys; from vmfs.fs import serve; from vmfs.host.settings import MountSettings\n"
        "from vmfs.words.errors import VmfsError\n"
        "try: serve(sys.argv[1], MountSettings(), lambda: print('ready'))\n"
        "except VmfsError as error: print(error)\n"
    )
    program = [sys.executable, "-c", code, tmp_path / "nothing"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=SOON, check=True)
    assert "could not be mounted" in done.stdout and len(done.stdout.splitlines()) == 1


AS_NOBODY = """
import errno, os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.umask(0o077)
root = sys.argv[1]
def answer(call, *arguments):
    try:
        call(*arguments)
        return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
print(answer(os.listdir, root))
print(answer(os.open, root + "/theirs/regs", os.O_RDONLY))
print(answer(os.open, root + "/theirs/regs", os.O_RDWR))
print(answer(os.open, root + "/private/regs", os.O_RDONLY))
print(answer(os.rmdir, root + "/theirs"))
print(answer(os.rename, root + "/theirs", root + "/taken"))
print(answer(os.chmod, root + "/theirs", 0o777))
print(answer(os.mkdir, root + "/mine"))
print(answer(os.open, root + "/mine/mem", os.O_RDWR))
print(answer(os.chown, root + "/mine", 0, 0))
print(oct(os.stat(root + "/mine/mem").st_mode & 0o777), os.stat(root + "/mine/mem").st_uid)
print(answer(os.rename, root + "/mine", root + "/renamed"))
print(answer(os.rmdir, root + "/renamed"))
"""


def as_nobody(root) -> list[str]:
    program = ["python3", "-c", AS_NOBODY, root]
    return subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def umask_022() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_two_users(own_server, umask_022):
    server = own_server(allow_other=True)
    for parent in server.path.parents[:-1]:  # pytest's folders are their maker's alone
        parent.chmod(parent.stat().st_mode | 0o011)
    (server.path / "theirs").mkdir()
    (server.path / "private").mkdir(0o700)
    assert as_nobody(server.path) == [
        "ok", "EACCES", "EACCES", "EACCES", "EPERM", "EPERM", "EPERM",
        "ok", "ok", "EPERM", "0o600 65534", "ok", "ok",
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_without_allow_other_others_see_nothing(own_server):
    server = own_server()
    for parent in server.path.parents[:-1]:
        parent.chmod(parent.stat().st_mode | 0o011)
    (server.path / "theirs").mkdir()
    assert set(as_nobody_lists(server.path)) == {"EACCES"}


def as_nobody_lists(root) -> list[str]:
    code = "\n".join(AS_NOBODY.splitlines()[:12])
    program = ["python3", "-c", code, root]
    return subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
