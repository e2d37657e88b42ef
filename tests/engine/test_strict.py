"""A strict machine: what works on one that forgives, and dies on a board, is found here."""

from __future__ import annotations

import pytest
from engine.test_pc import ORIGIN, load

from vmfs.machine.files.commands import parse_commands
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words.errors import Unsupported

SECONDS = 20
MIB = 1 << 20

# Counts in a word that it takes for zero, and writes above 1 MiB without a look at the A20 gate. Then it ends the run
# with what it has come to.
SECTOR = """
.code16
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    push cs                 # what it has written itself it may read
    pop ax
    mov word ptr [0x500], 0x1111
    mov ax, 0xffff
    mov es, ax
    mov word ptr es:[0x510], 0x2222     # 100500h
    mov cx, 3
again:
    inc word ptr [0x9000]   # .bss, as it believes
    loop again
    mov al, [0x9000]
    cmp word ptr [0x500], 0x1111
    je good
    mov al, 0x77
good:
    out 0xf4, al
"""


@pytest.fixture
def make(engine, assembler):
    made = []

    def make(kind: str) -> Vm:
        vm = Vm(engine, memory_size=4 * MIB)
        made.append(vm)
        vm.set_machine(kind)
        code = assembler(SECTOR, "real").code
        vm.images["kernel"].write(0, code.ljust(510, b"\0") + b"\x55\xaa")
        return vm

    yield make
    for vm in made:
        vm.close()


def run(vm, **bound):
    return vm.start(Bound(**bound)).result(SECONDS).line()


def debug(vm, text):
    vm.set_points(parse_commands("debug", text, {}.get)).result(SECONDS)


def strict_or_refused(make, engine):
    """On an engine that does not see such reads there is no such machine, and nothing has changed."""
    if engine.name == "emulator":
        return make("strict")
    with pytest.raises(Unsupported, match="does not see reads of memory that nobody has written"):
        make("strict")
    vm = make("pc")
    assert not any(vm.memory.read(0, vm.memory.size))
    return None


def test_a_sector_that_works_in_qemu_and_dies_on_the_board(make, engine):
    strict = strict_or_refused(make, engine)
    assert run(make("pc")) == "shutdown cause=debug-exit code=7 rip=0x7c35"
    if strict is None:
        return
    assert run(strict) == "shutdown cause=debug-exit code=239 rip=0x7c35"  # 0x77: the A20 gate is closed
    assert strict.board.devices["keyboard"].describe()["a20"] == "off"
    assert strict.cpu.vcpu.counters()["unwritten_reads"] == 1  # told once, though it counts to three


def test_a_read_of_what_nobody_has_written_stops(make, engine):
    vm = make("pc")
    with pytest.raises(Unsupported):
        debug(vm, "on unwritten")
    if (vm := strict_or_refused(make, engine)) is None:
        return
    debug(vm, "on unwritten")
    assert run(vm) == "debug cause=unwritten id=1 addr=0x9000 rip=0x7c24"
    assert "on unwritten" in vm.points_text()
    assert run(vm).startswith("shutdown")


def test_what_others_write_is_written(make, engine):
    """What is in RAM because a client or a loader has put it there."""
    if (vm := strict_or_refused(make, engine)) is None:
        return
    debug(vm, "on unwritten")
    vm.memory.write(0x9000, b"\0\0")
    assert run(vm).startswith("shutdown")
    vm = make("strict")
    debug(vm, "on unwritten")
    pattern = vm.memory.read(0, 4096)
    assert pattern.count(0) == 0 and vm.memory.read(3 * MIB, 4096) == pattern
    vm.resize_memory(8 * MIB)
    assert vm.memory.read(8 * MIB - 4096, 4096) == pattern
    assert run(vm) == "debug cause=unwritten id=1 addr=0x9000 rip=0x7c24"


def test_snapshots_are_of_their_time(make, engine):
    """What the CPU has written after a snapshot is unwritten again when that is back."""
    if (vm := strict_or_refused(make, engine)) is None:
        return
    vm.start(Bound(instructions=2)).result(SECONDS)
    vm.past.take("first")
    debug(vm, "on unwritten")
    for _ in range(2):
        assert run(vm) == "debug cause=unwritten id=1 addr=0x9000 rip=0x7c24"
        vm.past.restore("first")


# Port 80h, two ports and three accesses of memory that no device claims.
LOST = """
.code16
    xor ax, ax
    out 0x80, al
    mov dx, 0x1234
    out dx, ax
    in al, 0x79
    mov bx, 0xffff
    mov ds, bx
    mov al, [0x20]          # 100010h, where there is no RAM
    mov [0x31], al
    inc byte ptr [0x42]
    mov al, 0x10
    out 0xf4, al
"""


def test_what_no_device_claims_stops(engine, assembler):
    """After the instruction, in any PC, once for each of its accesses; the guest goes on as without."""
    vm = Vm(engine, memory_size=MIB)
    try:
        vm.set_machine("pc")
        load(vm, assembler(LOST, "real"))
        if engine.name != "emulator":
            with pytest.raises(Unsupported, match="on unclaimed: KVM has no way"):
                debug(vm, "on unclaimed")
            return
        debug(vm, "on unclaimed")
        lines = [run(vm) for _ in range(6)]
        wanted = [(0x1234, 8), (0x79, 10), (0x100010, 18), (0x100021, 21), (0x100032, 25)]
        assert lines[:5] == [f"debug cause=unclaimed id=1 addr={at:#x} rip={ORIGIN + rip:#x}" for at, rip in wanted]
        assert lines[5].startswith("shutdown cause=debug-exit code=33 "), lines
        uses = [line.partition(" rip=")[0] for line in vm.unclaimed().result(SECONDS).splitlines()]
        assert "port=0x80 reads=0 writes=1" in uses and "memory=0x100032 reads=1 writes=1" in uses, uses
    finally:
        vm.close()
