"""A server, or a machine's process, without a free descriptor: each call fails with EMFILE or ENOSPC, and works again
when there are some."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import SOON, Machine, reason_against, spares, wait_until

from vmfs.engine import ENGINES
from vmfs.fs.files import FILES
from vmfs.host.zygote import SPARES

MOST_NEEDED = 24  # descriptors of any call here
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOSPC)
SECTOR = bytes.fromhex("b001 e6f4").ljust(510, b"\0") + b"\x55\xaa"  # mov al, 1; out 0xf4, al
BIOS = bytes(0x20000 - 16) + bytes.fromhex("b001 e6f4").ljust(16, b"\xf4")


def descriptors(pid: int) -> list[int]:
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


def settled(server: int) -> int:
    """How many it has, with those for the next machines' processes, which come a moment after one was taken."""
    wait_until(lambda: len(spares(server)) == SPARES, "all spares are there")
    return len(descriptors(server))


def limit(pid: int, room: int | None) -> None:
    """Leave the process `room` descriptors more than it has; None: as many as it may have."""
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    soft = most
    if room is not None:
        taken, soft = set(descriptors(pid)), 0
        while True:
            room -= soft not in taken
            if room < 0:
                break
            soft += 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, most))


WAITING = ("vm_run", "vm_run.bin", "trace", "trace.bin", "console", "hvc", "virt")  # a read of these may

# ---- calls that need descriptors of the server


def make_pc(vm: Machine, tmp_path: Path) -> None:
    vm.write("machine", "pc")


def make_long(vm: Machine, tmp_path: Path) -> None:
    vm.write("mode", "long")


def move(vm: Machine, tmp_path: Path) -> None:
    here = vm.read("engine").strip()
    others = [row for row in ENGINES if row.name != here]
    for other in others:
        if reason := reason_against(other):
            pytest.skip(reason)
        vm.write("engine", other.name)


def run(vm: Machine, tmp_path: Path) -> None:
    vm.load("f4")
    assert vm.run() == "hlt rip=0x1001\n"


def boot(vm: Machine, tmp_path: Path) -> None:
    vm.write("state", "reset")
    (vm / "kernel").write_bytes(SECTOR)
    assert vm.run().startswith("shutdown cause=debug-exit code=3")


def boot_bios(vm: Machine, tmp_path: Path) -> None:
    vm.write("state", "reset")
    (vm / "bios").write_bytes(BIOS)
    assert vm.run().startswith("shutdown cause=debug-exit code=3")


def run_in_background(vm: Machine, tmp_path: Path) -> None:
    vm.load("ebfe")
    vm.write("state", "run")
    vm.write("state", "pause")


def symbols(vm: Machine, tmp_path: Path) -> None:
    vm.write("symbols", "0000000000001000 T begin\n")
    assert vm.read("symbols").startswith("0000000000001000 T begin")
    assert (vm / "symbols.elf").read_bytes().startswith(b"\x7fELF")


def images(vm: Machine, tmp_path: Path) -> None:
    for name in ("kernel", "initrd", "bios"):
        (vm / name).write_bytes(name.encode())
        assert (vm / name).read_bytes() == name.encode()


def all_files(vm: Machine, tmp_path: Path) -> None:
    failures = []
    for row in FILES:
        if row.kind.readable and row.name not in WAITING:
            try:
                fd = os.open(vm / row.name, os.O_RDONLY)
                try:
                    os.read(fd, 65536)
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno in EXHAUSTED:
                    failures.append(error)
                elif error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of a bare machine
                    raise
    if failures:
        raise failures[0]


def framebuffer(vm: Machine, tmp_path: Path) -> None:
    with open(vm / "framebuffer", "r+b", buffering=0) as file:
        file.write(b"pixel")
    assert (vm / "screen.png").read_bytes().startswith(b"\x89PNG")
    assert len(vm.read("screen.txt").splitlines()) == 25


def map_memory(vm: Machine, tmp_path: Path) -> None:
    with open(vm / "mem", "r+b", buffering=0) as file, mmap.mmap(file.fileno(), 4096) as memory:
        memory[:4] = b"mine"
    with open(vm / "mem", "rb", buffering=0) as file:
        assert file.read(4) == b"mine"


def attach(line: str) -> Callable[[Machine, Path], None]:
    def act(vm: Machine, tmp_path: Path) -> None:
        (tmp_path / "disk").write_bytes(bytes(4096))
        (tmp_path / "folder").mkdir(exist_ok=True)
        vm.write("dev/add", line.format(tmp_path))
        (one,) = (name for name in os.listdir(vm / "dev") if name.rstrip("0123456789") == line.split()[0])
        (vm / "dev" / one).rmdir()

    return act


def gdb_port(vm: Machine, tmp_path: Path) -> None:
    for address in ("127.0.0.1:0", f"{tmp_path}/socket"):
        vm.write("gdb", address)
        vm.write("gdb", "off")
    assert os.listdir(tmp_path) == []


def gdb_stream(vm: Machine, tmp_path: Path) -> None:
    fd = os.open(vm / "gdb.stream", os.O_RDWR)
    try:
        for packet in (b"$?#3f", b"$g#67"):
            os.write(fd, packet)
            answer = b""
            while b"#" not in answer:
                answer += os.read(fd, 65536)
            if b"$E" in answer:  # there is no other way to say it over this line
                assert b"$E.the session has no descriptor: Too many open files#" in answer
                raise OSError(errno.EMFILE, answer.decode())
            os.write(fd, b"+")
    finally:
        os.close(fd)


CALLS: dict[str, tuple[Callable[[Machine, Path], None] | None, Callable[[Machine, Path], None]]] = {
    "machine": (None, make_pc),
    "move": (None, move),
    "move-pc": (make_pc, move),
    "run": (None, run),
    "boot": (make_pc, boot),
    "bios": (make_pc, boot_bios),
    "background": (None, run_in_background),
    "symbols": (None, symbols),
    "images": (None, images),
    "files": (make_long, all_files),
    "files-pc": (make_pc, all_files),
    "framebuffer": (make_pc, framebuffer),
    "mem": (None, map_memory),
    "blk-ro": (make_pc, attach("blk {}/disk ro")),
    "blk-rw": (make_pc, attach("blk {}/disk rw")),
    "blk-cow": (make_pc, attach("blk {}/disk cow")),
    "share": (make_pc, attach("share {}/folder tag")),
    "net": (make_pc, attach("net user")),
    "rng": (make_pc, attach("rng")),
    "hvc": (make_pc, attach("hvc")),
    "gdb": (None, gdb_port),
    "gdb.stream": (None, gdb_stream),
}


def process_of(vm: Machine) -> int:
    """Of its process, which it has from now on."""
    return int(dict(line.split() for line in vm.read("stat").splitlines() if len(line.split()) == 2)["pid"])


@pytest.mark.parametrize("whose", ["server", "machine"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_descriptors_fails_and_then_works(server, tmp_path, name, whose):
    prepare, act = CALLS[name]
    process_of(one := server.make())  # libfuse has pipes of its own from the first request on
    one.path.rmdir()
    pid = server.server.pid
    before = settled(pid)
    succeeded = False
    for room in range(MOST_NEEDED):
        vm = server.make()
        try:
            if prepare:
                prepare(vm, tmp_path)
            limited = pid if whose == "server" else process_of(vm)
            limit(limited, room)
            try:
                act(vm, tmp_path)
                succeeded = True
            except OSError as error:
                assert error.errno in EXHAUSTED, f"{error} with {room} descriptors: {vm.read('error')}"
            finally:
                limit(limited, None)
            act(vm, tmp_path)
        finally:
            vm.path.rmdir()
        if succeeded:
            break
    assert succeeded
    wait_until(lambda: len(descriptors(pid)) == before, "it has the descriptors that it had before")
    assert "Traceback" not in server.log.read_text()


def test_a_machine_is_not_made_without_descriptors(server):
    process_of(one := server.make())
    one.path.rmdir()
    pid = server.server.pid
    before = settled(pid)
    for room in range(MOST_NEEDED):
        limit(pid, room)
        path = server.path / "new"
        try:
            path.mkdir()
        except OSError as error:
            assert error.errno in EXHAUSTED
        else:
            path.rmdir()
            break
        finally:
            limit(pid, None)
        assert not path.exists() and len(descriptors(pid)) == before
    else:
        raise AssertionError("it was never made")
    wait_until(lambda: len(descriptors(pid)) == before, "it has the descriptors that it had before")


def test_a_gdb_waits_for_a_descriptor(server):
    vm = server.make()
    vm.write("gdb", "127.0.0.1:0")
    host, _, port = vm.read("gdb").strip().partition(":")
    limit(pid := process_of(vm), 0)
    try:
        with socket.create_connection((host, int(port))) as line:
            line.sendall(b"$?#3f")
            wait_until(lambda: "a connection has to wait" in server.log.read_text(), "it is told in the log")
            limit(pid, None)
            line.settimeout(SOON)
            assert line.recv(1) == b"+"
    finally:
        limit(pid, None)
        vm.path.rmdir()
    assert "Traceback" not in server.log.read_text()
