"""What the host keeps for a machine counts, though it grows while the guest runs: what it prints and nobody reads, and
overlays."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from host.guests import SEABIOS, boot_disk, writes_sector
from host.users import A, B, Child, pid_of
from mounting import Machine, Server, failing, for_plain_processes, wait_until

from vmfs.devices.virtio.disk import CLUSTER, ROOM_STEP, open_disk
from vmfs.host.sandbox import DESCRIPTORS_MOST, OWN_MEMORY
from vmfs.machine.files.budget import Budget
from vmfs.machine.files.streams import SLACK, Stream
from vmfs.words.errors import LimitReached

MIB = 1 << 20


class Account:
    """A door, or the room of an overlay, that has so many bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    def reserve(self, *what: object) -> None:
        size = what[-1]
        assert isinstance(size, int)
        if self.held + size > self.most:
            raise LimitReached(f"{size} bytes more than the {self.held} in use")
        self.held += size

    def release(self, *what: object) -> None:
        self.reserve(*what[:-1], -what[-1])  # type: ignore[operator]


# ---- streams


def streaming(most: int, act: Callable) -> Account:
    account = Account(most)

    async def main() -> None:
        purpose = object()
        stream: Stream

        def has(size: int) -> None:
            stream.room = size

        stream = Stream(16 * MIB, ask=Budget(account).follower(purpose, lambda: stream.wanted(), has))  # type: ignore
        await act(stream)

    trio.run(main)
    return account


async def settled() -> None:
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked(0.01)


def test_what_is_not_read_is_asked_for_and_given_back():
    async def act(stream: Stream) -> None:
        reader = stream.open()
        for _ in range(80):
            stream.append(bytes(MIB // 10))
            await settled()
        assert stream.room >= 8 * MIB
        total = 0
        while stream.ready(reader):
            data, lost = stream.take(reader, MIB)
            assert not lost
            total += len(data)
        assert total == 80 * (MIB // 10)
        await settled()
        assert stream.room == 0

    assert streaming(100 * MIB, act).held == 0


def test_without_room_it_is_lost_and_told():
    async def act(stream: Stream) -> None:
        reader = stream.open()
        for _ in range(100):
            stream.append(bytes(MIB // 10))
            await settled()
        assert stream.room <= 3 * MIB
        data, lost = stream.take(reader, 100 * MIB)
        assert 2 * MIB <= len(data) <= 1.3 * (3 * MIB + SLACK)
        assert lost + len(data) == 100 * (MIB // 10)
        stream.close(reader)
        await settled()

    assert streaming(3 * MIB, act).held == 0


# ---- overlays


@pytest.fixture
def disk(tmp_path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(b"base" * (4 * MIB))  # 16 MiB
    return path


def overlay(path: Path, account: Account):
    return open_disk(os.open(path, os.O_RDONLY), "cow", room=account)


def test_an_overlay_is_asked_for_as_it_grows_and_given_back(disk):
    account = Account(100 * MIB)
    one = overlay(disk, account)
    assert account.held == 0
    one.write(0, [memoryview(b"x" * 512)])
    assert account.held == ROOM_STEP
    for at in range(0, 10 * MIB, MIB):
        one.write(at, [memoryview(bytes(MIB))])
    assert 10 * MIB <= account.held <= 10 * MIB + 2 * ROOM_STEP
    before = account.held
    for at in range(0, 10 * MIB, MIB):  # what is there already
        one.write(at, [memoryview(bytes(MIB))])
    assert account.held <= before + ROOM_STEP
    one.close()
    assert account.held == 0


def test_over_the_limit_a_write_fails_and_what_is_there_stays(disk):
    one = overlay(disk, Account(ROOM_STEP))
    one.write(CLUSTER, [memoryview(b"overlay!" * 512)])
    assert failing(one.write, 8 * MIB, [memoryview(bytes(ROOM_STEP))]) == 28
    assert failing(one.write, 8 * MIB, [memoryview(bytes(ROOM_STEP))]) == 28
    room = bytearray(CLUSTER)
    one.read(CLUSTER, [memoryview(room)])
    assert bytes(room) == b"overlay!" * 512
    one.read(8 * MIB, [memoryview(room)])
    assert bytes(room) == b"base" * 1024
    one.write(2 * CLUSTER, [memoryview(bytes(512))])  # a small one has its room
    one.close()


# ---- on a mount


def free(server: Server) -> int:
    facts = os.statvfs(server.path)
    return facts.f_bavail * facts.f_frsize


PRINTS = "baf803 b90080 31f6 f36e ebf4"  # mov dx, 3f8h; again: mov cx, 8000h; xor si, si; rep outsb; jmp again


@pytest.fixture
def limited(own_server) -> Iterator[Server]:
    yield own_server(max_memory=160 * MIB)


@for_plain_processes
def test_what_a_guest_prints_counts(limited):
    vm = B.makes(limited.path / "one")

    def set_up() -> None:
        vm.write("machine", "pc")
        vm.write("mode", "real")
        vm.load(PRINTS)

    B.does(set_up)
    before = free(limited)
    console = os.open(vm / "console", os.O_RDONLY | os.O_NONBLOCK)
    B.does(vm.write, "state", "run")
    wait_until(lambda: free(limited) < before, "it counts")
    B.does(vm.write, "state", "pause")
    with contextlib.suppress(BlockingIOError):
        while os.read(console, 1 << 17):
            pass
    wait_until(lambda: free(limited) == before, "it counts no more")
    os.close(console)
    vm.path.rmdir()


@for_plain_processes
@pytest.mark.skipif(not SEABIOS.exists(), reason=f"{SEABIOS} is not there: Debian's package seabios")
@pytest.mark.parametrize("room", [True, False])
def test_an_overlay_counts(limited, folder, room):
    disk = folder / "disk"
    disk.write_bytes(writes_sector(b"new").ljust(4096, b"\0"))
    disk.chmod(0o644)
    vm = B.makes(limited.path / "one")
    B.does(vm.write, "mem_size", "16M")
    other = A.makes(limited.path / "other")  # 128 MiB of the 160, with one of 16 MiB and its BIOS
    if not room:
        A.does(other.write, "mem_size", f"{142 * MIB}")
    before = free(limited)
    said = B.does(boot_disk, vm, disk, "cow")
    assert said.startswith(f"shutdown cause=debug-exit code={1 if room else 3} "), said
    if room:
        assert free(limited) <= before - ROOM_STEP
    vm.path.rmdir()
    other.path.rmdir()


# ---- what the kernel holds a machine's process to


def limits_of(pid: int) -> dict[str, str]:
    """The soft ones."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:].split()[0] for line in lines}


@for_plain_processes
def test_the_kernel_bounds_what_a_machine_keeps(limited):
    vm = B.makes(limited.path / "one")
    limits = limits_of(pid_of(vm))
    assert int(limits["Max data size"]) == 160 * MIB + OWN_MEMORY
    assert int(limits["Max open files"]) <= DESCRIPTORS_MOST
    assert limits["Max core file size"] == "0"
    vm.path.rmdir()


@for_plain_processes
def test_files_become_no_longer_than_the_makers(limited):
    """RLIMIT_FSIZE, as setrlimit(2) has it: a write past it fails with EFBIG, for a disk's file as for any."""
    path = limited.path / "one"
    Child(B.uid, path.mkdir, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))).result()
    vm = Machine(path)
    B.does(vm.write, "cmdline", "short")
    assert limits_of(pid_of(vm))["Max file size"] == str(4 * MIB)

    def write(at: int) -> None:
        fd = os.open(vm / "initrd", os.O_WRONLY)
        try:
            os.pwrite(fd, b"x", at)
        finally:
            os.close(fd)

    B.does(write, 4 * MIB - 1)
    assert failing(B.does, write, 5 * MIB) == 28
    assert "RLIMIT_FSIZE" in vm.read("error")
    vm.path.rmdir()
    other = B.makes(path)
    B.does(write, 5 * MIB)
    other.path.rmdir()
