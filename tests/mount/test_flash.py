"""Flash on a real mount: what a CPU that begins there programs, in snapshots, forks and the user's file."""

from __future__ import annotations

import errno

import pytest
from engine.asm import assemble, needs_assembler
from mounting import Machine, failing, number

pytestmark = needs_assembler
BLOCK = 4096
# It is at IP F000 of the reset segment, FFFFF000. Each run programs one bit of the byte at FFFFE000, and tells in RAM
# what is there.
PROGRAM = """
again: cli
    data32 lgdt cs:[0xf000 + gdtr - _start]
    mov eax, cr0; or al, 1; mov cr0, eax
    mov bx, 8; mov ds, bx
    and al, 0xfe; mov cr0, eax
    mov esi, 0xffffe000
    mov al, [esi]; shl al, 1
    mov byte ptr [esi], 0x40; mov [esi], al
wait: cmp byte ptr [esi], 0x80; jne wait
    mov byte ptr [esi], 0xff
    mov al, [esi]; mov edi, 0x5000; mov [edi], al
    hlt; jmp again
    .balign 8
gdt: .quad 0, 0x008f93000000ffff  # accessed: it cannot be written
gdtr: .word 15
    .long 0xfffff000 + gdt - _start
"""
JUMP = b"\xe9" + (0xF000 - 0xFFF3 & 0xFFFF).to_bytes(2, "little")  # at the reset vector


@pytest.fixture
def flashes(tmp_path):
    code, store = tmp_path / "code", tmp_path / "store"
    code.write_bytes(assemble(PROGRAM, "real").code.ljust(BLOCK - 16, b"\xf4") + JUMP.ljust(16, b"\0"))
    store.write_bytes(b"\xff" * BLOCK)
    return code, store


def prepare(vm, flashes, mode):
    code, store = flashes
    vm.write("machine", "pc\n")
    vm.write("dev/add", f"pflash {code} ro\n")
    vm.write("dev/add", f"pflash {store} {mode}\n")


def test_what_is_programmed_goes_along(vm, server, flashes):
    prepare(vm, flashes, "cow")

    def run(machine):
        assert machine.run().startswith("hlt rip=0x"), machine.read("exit")
        return number(machine)

    assert run(vm) == 0xFE
    (vm / "snap" / "one").mkdir()
    assert (run(vm), run(vm)) == (0xFC, 0xF8)
    vm.write("fork", "sibling\n")
    vm.write("restore", "one\n")
    assert run(vm) == 0xFC and flashes[1].read_bytes() == b"\xff" * BLOCK
    sibling = Machine(server.path / "sibling")
    try:
        assert (run(sibling), run(vm)) == (0xF0, 0xF8)
    finally:
        sibling.path.rmdir()
    vm.write("state", "reset\n")
    assert run(vm) == 0xF0, "a reset keeps it"
    assert "programmed 4\n" in vm.read("dev/pflash1/counters")


def test_a_file_that_is_rw_keeps_it(vm, flashes):
    prepare(vm, flashes, "rw")
    vm.run()
    assert flashes[1].read_bytes() == b"\xfe" + b"\xff" * (BLOCK - 1)
    assert failing(lambda: vm.write("fork", "no\n")) == errno.EBUSY and "rw" in vm.read("error")


def test_what_cannot_be_is_refused(vm, flashes, tmp_path):
    prepare(vm, flashes, "cow")
    assert failing(lambda: vm.write("dev/add", f"pflash {flashes[0]} ro\n")) == errno.ENOSPC
    assert failing(vm.path.joinpath("dev/pflash0").rmdir) == errno.EBUSY
    vm.path.joinpath("dev/pflash1").rmdir()
    (tmp_path / "odd").write_bytes(bytes(1000))
    assert failing(lambda: vm.write("dev/add", f"pflash {tmp_path}/odd ro\n")) == errno.EINVAL
    assert "a multiple of 4 KiB" in vm.read("error")
    vm.path.joinpath("bios").write_bytes(bytes(65536))
    assert failing(lambda: vm.read("vm_run")) == errno.EINVAL and "in its flash (pflash0)" in vm.read("error")
