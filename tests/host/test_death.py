"""What ends, how it is told, and that nothing lingers."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host.users import A, B, children, is_there, pid_of, status, zygote_of
from mounting import (
    LIBC,
    SOON,
    Machine,
    blocked_read,
    failing,
    for_plain_processes,
    reason_against_mounts,
    running,
    wait_until,
)

from vmfs.commands import boot
from vmfs.host import zygote
from vmfs.words.errors import Invalid

SPIN = "40 ebfd"  # inc ax; jmp


@pytest.fixture
def vm(server) -> Iterator[Machine]:
    one = server.make()
    yield one
    with contextlib.suppress(FileNotFoundError):
        one.path.rmdir()


PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_ATTACH, PTRACE_DETACH = 12, 13, 16, 17
RIP = 16 * 8  # in struct user_regs_struct


def crash(pid: int) -> None:
    """Have its main thread jump to 0. (A SIGSEGV that is sent is nothing to the first process of a pid namespace.)"""
    registers = ctypes.create_string_buffer(27 * 8)

    def ptrace(what: int, data: object = None) -> None:
        if LIBC.ptrace(what, pid, None, data):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    try:
        ptrace(PTRACE_ATTACH)
    except PermissionError:
        pytest.skip("no process may be traced here (CAP_SYS_PTRACE)")
    os.waitpid(pid, 0x40000000)  # __WALL
    ptrace(PTRACE_GETREGS, registers)
    registers[RIP : RIP + 8] = bytes(8)
    ptrace(PTRACE_SETREGS, registers)
    ptrace(PTRACE_DETACH)


ENDS: dict[str, Callable[[int], None]] = {"SIGKILL": lambda pid: os.kill(pid, signal.SIGKILL), "SIGSEGV": crash}


# ASan has a handler for SIGSEGV.
@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGSEGV", marks=for_plain_processes)])
def test_a_process_that_ends_fails_its_machine_only(server, vm, name):
    other = server.make()
    other.load(SPIN).write("state", "run")
    vm.load(SPIN)
    watched = os.open(vm / "state", os.O_RDONLY)
    console = os.open(vm / "vm_run", os.O_RDONLY)
    poll = select.poll()
    poll.register(watched, select.POLLPRI)
    os.pread(watched, 100, 0)
    reader = blocked_read(console)
    running(vm)
    while poll.poll(0):
        os.pread(watched, 100, 0)
    pid = pid_of(vm)
    ENDS[name](pid)
    assert reader.end()[:2] == (-1, errno.EIO)
    assert poll.poll(SOON * 1000), "a poller is woken"
    assert vm.read("state") == "failed\n"
    error = vm.read("error")
    assert f"was killed by {name}" in error and "the last command was " in error
    for file in ("regs", "registers", "vm_run", "mem", "console", "stat"):
        assert failing((vm / file).read_bytes) == errno.EIO, file
    assert failing(vm.write, "state", "run") == errno.EIO
    assert is_there(pid_of(other)) and other.read("state") == "running\n"
    listed = set(os.listdir(vm.path))
    assert {"state", "error", "regs", "dev"} <= listed
    os.close(watched)
    os.close(console)
    vm.path.rmdir()
    assert not vm.path.exists()
    other.path.rmdir()


def test_the_log_names_it_once_and_has_no_traceback(server, vm):
    """(A traceback in the log fails every test of a mount, at its end.)"""
    os.kill(pid_of(vm), signal.SIGKILL)
    wait_until(lambda: vm.read("state") == "failed\n")
    lines = [line for line in server.log.read_text().splitlines() if "was killed by SIGKILL" in line]
    assert lines


SIZE = 64 << 20


def memory_of(pid: int) -> int:
    """A descriptor of the machine's memory. (What all of this host is shared changes with other tests, too.)"""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            path = f"/proc/{pid}/fd/{name}"
            if os.readlink(path).startswith("/memfd:") and os.stat(path).st_size >= SIZE:
                return os.open(path, os.O_RDONLY)
    raise AssertionError("it has no memory")


def allocated(memory: int) -> int:
    return os.fstat(memory).st_blocks * 512


@pytest.mark.parametrize("how", ["removed", "killed", "stopped"])
def test_memory_comes_back_within_a_second(server, how):
    vm = server.make()
    vm.write("mem_size", f"{SIZE}")
    with open(vm / "mem", "r+b", buffering=0) as file:
        for at in range(0, SIZE, 1 << 20):
            file.seek(at)
            file.write(b"\xff" * (1 << 20))
    pid = pid_of(vm)
    memory = memory_of(pid)
    assert allocated(memory) == SIZE
    if how != "removed":
        os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    began = time.monotonic()
    vm.path.rmdir()
    wait_until(lambda: not allocated(memory), "its memory is free")
    took = time.monotonic() - began
    os.close(memory)
    assert took < (1.0 if how != "stopped" else 2.5), took
    wait_until(lambda: not is_there(pid), "its process is gone")


def test_a_machine_out_of_memory_takes_nobody_along(own_server):
    """As the kernel's OOM killer does: SIGKILL of the one that has the most, which is no process of root's."""
    server = own_server()
    machines = [who.makes(server.path / f"of{who.uid}") for who in (A, B)]
    os.kill(pid_of(machines[1]), signal.SIGKILL)
    wait_until(lambda: machines[1].read("state") == "failed\n")
    assert len((machines[0] / "regs").read_bytes()) == 144
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (server.server.pid, pid_of(machines[0]))]
    assert scores[0] <= scores[1]


# ---- the zygote, the server


def test_without_its_zygote_a_server_says_so(own_server, monkeypatch):
    server = own_server()
    monkeypatch.setattr(boot, "own_mounts", lambda: iter([Path(server.path)]))
    with boot.mount(None, keep=True) as (directory, _):
        assert directory == Path(server.path)
    vm = server.make().load(SPIN)
    fd = os.open(vm / "vm_run", os.O_RDONLY)
    reader = blocked_read(fd)
    running(vm)
    pid = pid_of(vm)
    os.kill(zygote_of(server), signal.SIGKILL)
    assert reader.end()[:2] == (-1, errno.EIO)
    os.close(fd)
    assert vm.read("state") == "failed\n"
    wait_until(lambda: not is_there(pid), "its process is gone")
    late = server.make()
    assert failing((late / "regs").read_bytes) == errno.EIO
    assert "the process that makes machines is gone: unmount, and mount anew" in late.read("error")
    with pytest.raises(Invalid, match="--keep needs a mount that stays"), boot.mount(None, keep=True):
        pass  # `vmfs boot` does not use it
    vm.path.rmdir()
    server.server.terminate()
    server.server.wait(SOON)
    assert not server.is_mounted()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "running"])
def test_a_server_that_is_killed_leaves_nothing(folder, for_everybody, busy):
    """By the command, since its watcher unmounts."""
    if reason := reason_against_mounts():
        pytest.skip(reason)
    mount = folder / "m"
    mount.mkdir()
    command = [sys.executable, "-m", "vmfs.cli"]
    options = ["--engine", "emulator", "--allow-other", "--log", folder / "log"]
    subprocess.run([*command, "mount", *options, mount], check=True)
    server = server_of(mount)
    vm = Machine(mount / "one")
    vm.path.mkdir()
    vm.write("machine", "pc")
    os.makedirs(folder / "share")
    vm.write("dev/add", f"share {folder / 'share'} tag")
    if any(os.access(f"{path}/passt", os.X_OK) for path in os.environ["PATH"].split(":")):
        vm.write("dev/add", "net user")
    vm.write("gdb", f"{folder}/socket")
    if busy:
        bare = Machine(mount / "two")
        bare.path.mkdir()
        bare.load(SPIN).write("state", "run")
    tree = [*children(server)]
    assert len(tree) >= 4
    os.kill(server, signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: not any(map(is_there, tree)), "all processes are gone")
    assert time.monotonic() - began < 3
    wait_until(lambda: not os.path.ismount(mount), "it is unmounted")
    mount.rmdir()
    assert not os.path.lexists(folder / "socket")
    assert "Traceback" not in (folder / "log").read_text()


def hostile_hurry(mount: Path, folder: Path, number: int) -> None:
    """All that a machine may have, as fast as it can be had, until the mount is gone."""
    at = 0
    with contextlib.suppress(OSError):
        while True:
            at += 1
            vm = Machine(mount / f"vm{number}-{at}")
            vm.path.mkdir()
            if at % 2:
                vm.load(SPIN).write("state", "run")
                vm.read("registers")
            else:
                vm.write("machine", "pc")
                vm.write("dev/add", f"share {folder} tag")
                vm.write("dev/add", f"blk {folder}/disk cow")
                vm.write("gdb", f"{folder}/socket{number}")
                if number == 0 and PASST:
                    vm.write("dev/add", "net user")
            if at > 4:
                Machine(mount / f"vm{number}-{at - 4}").path.rmdir()


PASST = any(os.access(f"{path}/passt", os.X_OK) for path in os.environ["PATH"].split(":"))


@pytest.mark.parametrize("seed", range(4))
def test_a_server_that_is_killed_at_any_moment_leaves_nothing(folder, for_everybody, seed):
    if reason := reason_against_mounts():
        pytest.skip(reason)
    mount = folder / "m"
    mount.mkdir()
    folder.chmod(0o777)
    (folder / "disk").write_bytes(bytes(1 << 20))
    (folder / "disk").chmod(0o666)
    command = [sys.executable, "-m", "vmfs.cli", "mount", "--engine", "emulator", "--allow-other"]
    subprocess.run([*command, "--log", folder / "log", mount], check=True)
    server = server_of(mount)
    users = [who.begins(hostile_hurry, mount, folder, number) for number, who in enumerate((A, B))]
    time.sleep(random.Random(seed).uniform(0.05, 1.5))
    tree = [*children(server)]
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not any(map(is_there, tree)), "all processes are gone")
    wait_until(lambda: not os.path.ismount(mount), "it is unmounted")
    for user in users:
        user.kill()
    wait_until(lambda: not orphans(folder), "nothing of it is left")
    mount.rmdir()
    assert {path.name for path in folder.iterdir()} == {"disk", "log"}
    assert "Traceback" not in (folder / "log").read_text()


def orphans(folder: Path) -> list[str]:
    """Processes that have something of that folder on their command line or open."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if os.fsencode(folder) in (entry / "cmdline").read_bytes() and is_there(int(entry.name)):
                    found.append(entry.name)
    return found


def server_of(mount: Path) -> int:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"mount" in words and os.fsencode(mount) in words and b"vmfs.cli" in words:
                if status(int(entry.name))["Name"].strip() != "vmfs-zygote":
                    return int(entry.name)
    raise AssertionError("there is no server")


def test_server_and_zygote_that_both_have_much_to_say():
    """As where a thousand machines end at once: neither reads while it writes, if it did no more."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    server = zygote.Zygote(ours, 0)
    jobs = [server._new_job() for _ in range(3000)]
    heard = []

    def be_the_zygote() -> None:
        for job in jobs[::-1]:
            its.send(zygote._encode(zygote.Ended(job.number, 0)))
        while packet := its.recv(1 << 16):
            heard.append(zygote._decode_orders(packet).job)

    thread = threading.Thread(target=be_the_zygote, daemon=True)
    thread.start()
    asked = []
    for job in jobs:
        if job.code is None:
            asked.append(job.number)
        server.kill(job)
    while server._jobs:
        assert server._take_news()
    ours.shutdown(socket.SHUT_WR)
    thread.join(SOON)
    assert not thread.is_alive() and heard == asked and len(asked) > 100
    assert all(job.ended.is_set() for job in jobs)
    ours.close()
    its.close()
