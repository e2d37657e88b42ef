"""PCs with disks, a CD and a floppy are kept, forked and saved: with what was written, and the medium that is there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from engine import asm
from mount.test_forks import fork as fork  # noqa: PLC0414  # the fixture
from mounting import Machine, failing

pytestmark = asm.needs_assembler

# Writes 512 bytes at 0x6000 to sector 5 of hda, and halts; from there on reads them to 0x6200, and halts.
GUEST = """
    mov si, 0x6000
    mov bl, 0x30
    call task
1:  mov dx, 0x1f7
    in al, dx
    test al, 8
    jz 1b
    mov cx, 256
    mov dx, 0x1f0
    rep outsw
2:  mov dx, 0x1f7
    in al, dx
    test al, 0x80
    jnz 2b
    hlt
again:
    mov di, 0x6200
    mov bl, 0x20
    call task
3:  mov dx, 0x1f7
    in al, dx
    test al, 8
    jz 3b
    mov cx, 256
    mov dx, 0x1f0
    rep insw
    hlt
    jmp again
task:
    mov dx, 0x1f6
    mov al, 0xe0
    out dx, al
    mov dx, 0x1f2
    mov al, 1
    out dx, al
    inc dx
    mov al, 5
    out dx, al
    inc dx
    mov al, 0
    out dx, al
    inc dx
    out dx, al
    mov dx, 0x1f7
    mov al, bl
    out dx, al
    ret
"""
SECTOR = b"what the guest wrote, in 64 bytes of a sector of its disk......\n" * 8


def memory(vm: Machine, at: int, size: int) -> bytes:
    with open(vm / "mem", "rb") as file:
        return os.pread(file.fileno(), size, at)


@pytest.fixture
def pc(vm, tmp_path):
    """One that has written a sector of its disk."""
    for name, size in (("disk", 1 << 20), ("floppy", 1440 << 10), ("one.iso", 64 << 10), ("two.iso", 32 << 10)):
        (tmp_path / name).write_bytes(name.encode().ljust(size, b"\0"))
    vm.write("mem_size", "4M\n")
    vm.write("machine", "pc\n")
    vm.write("dev/add", f"ide {tmp_path}/disk cow\ncdrom {tmp_path}/one.iso\n")
    vm.write("dev/add", f"floppy {tmp_path}/floppy cow\ncdrom as=hdd\n")
    vm.load(asm.assemble(GUEST, "real").code.hex())
    vm.write("registers", "rsp 0x5000\nss 0\nds 0\nes 0\nds.base 0\nes.base 0\nss.base 0\n")
    with open(vm / "mem", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), SECTOR, 0x6000)
    assert vm.run().startswith("hlt")
    return vm


def test_copies_have_what_was_written_and_the_medium_that_is_there(pc, fork, server, tmp_path):
    pc.write("dev/hdc/media", f"{tmp_path}/two.iso\n")
    (pc / "snap/one").mkdir()
    saved = tmp_path / "saved.vmfs"
    subprocess.run([sys.executable, "-m", "vmfs.cli", "save", f"{pc.path}:one", saved], check=True)
    loaded = Machine(server.path / "loaded")
    subprocess.run([sys.executable, "-m", "vmfs.cli", "load", saved, loaded.path], check=True)
    try:
        child = fork(pc, "child")
        copies = [child, fork(pc, "of-snapshot", "one"), fork(child, "of-child"), loaded, fork(loaded, "of-loaded")]
        for copy in copies:
            assert copy.read("dev/hdc/media") == f"{tmp_path}/two.iso\n" and copy.read("dev/hdd/media") == "none\n"
            assert copy.read("dev/fd0/media") == f"{tmp_path}/floppy\n"
            assert copy.run().startswith("hlt") and memory(copy, 0x6200, 512) == SECTOR, copy.path
        child.write("dev/hdc/media", f"{tmp_path}/one.iso\n")  # each has its own
        child.write("dev/hdd/media", f"{tmp_path}/one.iso\n")
        assert loaded.read("dev/hdc/media") == f"{tmp_path}/two.iso\n"
        assert fork(child, "changed").read("dev/hdd/media") == f"{tmp_path}/one.iso\n"
    finally:
        loaded.path.rmdir()
    assert (tmp_path / "disk").read_bytes().rstrip(b"\0") == b"disk"


def test_a_snapshot_is_of_the_medium_that_was_there(pc, fork, tmp_path):
    """`restore` puts it in again; a fork is made of what is there."""
    (pc / "snap/one").mkdir()
    pc.write("dev/hdc/media", f"{tmp_path}/two.iso\n")
    assert failing(pc.write, "fork", "child from one\n") == errno.EBUSY
    assert f"hdc had another medium in it, which is to be in it again: {tmp_path}/one.iso" in pc.read("error")
    pc.write("restore", "one\n")
    assert pc.read("dev/hdc/media") == f"{tmp_path}/one.iso\n"
    for vm in (pc, fork(pc, "child", "one")):
        assert vm.run().startswith("hlt") and memory(vm, 0x6200, 512) == SECTOR


def test_a_floppy_that_is_written_is_of_one_machine(pc, tmp_path):
    pc.write("dev/fd0/media", "eject\n")
    pc.write("dev/fd0/media", f"{tmp_path}/floppy rw\n")
    assert failing(pc.write, "fork", "child\n") == errno.EBUSY and "fd0 is a disk that is rw" in pc.read("error")
