"""Devices in C: what a guest sees of them when the engine asks them by itself is what it sees when each access is an
exit, and they cost no call of Python."""

from __future__ import annotations

import random
import time

import pytest
from engine.test_pc import load, run

from vmfs.devices.board import Board
from vmfs.engine.base import Capability
from vmfs.machine.machine import Vm

RESULTS, MANY = 0x4000, 300
UARTS = 0x3F8, 0x2F8, 0x3E8, 0x2E8
PCI = [0x80000000 | slot << 11 | at for slot in (0, 3, 30, 31) for at in (0, 4, 8, 0x0C, 0x10, 0x2C, 0x34, 0x3C)]
IN, OUT = {1: "in al, dx", 2: "in ax, dx", 4: "in eax, dx"}, {1: "out dx, al", 2: "out dx, ax", 4: "out dx, eax"}


def accesses(dice):
    """(port, size, value or None) of what is in C, hostile ones too; none that ends the run, or is Python's."""
    byte = dice.getrandbits(8)
    port = dice.choice(UARTS)
    return dice.choice(
        [
            [(port + dice.randrange(8), dice.choice((1, 1, 1, 2, 4)), dice.choice((None, byte, dice.getrandbits(32))))],
            [(port + 5, 1, None), (port, 1, byte)],
            [(port + 4, 1, dice.choice((0xB, 0x1B, 8, 0))), (port + 1, 1, dice.randrange(16)), (port + 2, 1, None)],
            [(0x70, 1, dice.randrange(128)), (0x71, 1, dice.choice((None, byte)))],
            [(0x70, 2, dice.getrandbits(16)), (0x70, 2, None)],
            [(0x70, 1, 11), (0x71, 1, byte), (0x70, 1, 12), (0x71, 1, None)],
            [(0x600, dice.choice((1, 2, 4)), dice.choice((None, dice.getrandbits(32))))],
            [(0x604, 2, dice.getrandbits(13)), (0x604, 2, None)],
            [(0x608 + dice.randrange(4), dice.choice((1, 2, 4)), None)],
            [(0xCF8, 4, dice.choice(PCI)), (0xCFC + dice.randrange(4), dice.choice((1, 2, 4)), None)],
            [(0xCF8, 4, dice.choice(PCI) | 0x3C), (0xCFC, 1, byte), (0xCFC, 4, None)],
            [(0xCF8, dice.choice((1, 2, 4)), None), (dice.choice((0x64, 0x92)), 1, None)],
            [(dice.choice((0x80, 0x1234, 0xFFFF)), dice.choice((1, 2, 4)), dice.choice((None, byte)))],
            [(dice.choice((0xE9, 0x402)), 1, dice.choice((None, byte)))],
            [(0x3D4, 2, dice.getrandbits(16)), (0x3D5, 1, None)],
            [(0x3C8, 1, byte), (0x3C9, dice.choice((1, 2, 4)), dice.getrandbits(32)), (0x3C9, 2, None)],
            [(0x3C0, 1, byte), (0x3C1, 1, None), (0x3CE, 1, byte), (0x3CF, 1, None)],
        ]
    )


def program(seed):
    dice = random.Random(seed)
    lines, count = ["xor ax, ax", "mov ds, ax", f"mov di, {RESULTS}"], 0
    while count < MANY:
        for port, size, value in accesses(dice):
            lines.append(f"mov dx, {port}")
            if value is None:
                lines += ["mov eax, 0x5a5a5a5a", IN[size], "mov [di], eax", "add di, 4"]
                count += 1
            else:
                lines += [f"mov eax, {value}", OUT[size]]
    return "\n".join([*lines, "mov dx, 0xf4", "out dx, al"])


@pytest.fixture
def make(engine):
    made = []

    def machine(*, fast=True):
        vm = Vm(engine, memory_size=2 << 20)
        made.append(vm)
        vm.set_machine("pc")
        if Capability.DETERMINISTIC in vm.capabilities:
            vm.set_time_source("instructions")
            vm.board.set_birth(1_780_000_000_000_000_000, bytes(16))
        if not fast:
            vm.board.machine.set_fast_bus(None)
            vm.board._is_fast = vm.board._sees_due = False
        return vm

    yield machine
    for vm in made:
        vm.close()


@pytest.fixture
def exits(monkeypatch):
    """The accesses that came to Python."""
    seen, access = [], Board.access

    def noted(self, exit_, cpu):
        seen.append(exit_)
        return access(self, exit_, cpu)

    monkeypatch.setattr(Board, "access", noted)
    return seen


def seen_of(vm):
    with vm.board.asleep():
        states = vm.board.pack_devices()
    chips = vm.get_machine_state("irqchip").result(30)
    counters = {name: dict(device.counters) for name, device in vm.board.devices.items()}
    return vm.memory.read(RESULTS, 4 * (MANY + 8)), states, chips, vm.board.unclaimed(), counters


@pytest.mark.parametrize("seed", range(6))
def test_a_chip_is_the_same_by_the_bus_and_by_exits(make, exits, assembler, seed):
    code = assembler(program(seed), "real")
    outcomes = []
    for fast in (True, False):
        vm = make(fast=fast)
        for device in ("com1", "com3"):
            vm.board.devices[device].receive(b"typed before" * 10)
        load(vm, code)
        exits.clear()
        assert run(vm).line().startswith("shutdown cause=debug-exit")
        assert len(exits) == 1 if fast else len(exits) > MANY
        outcomes.append(seen_of(vm))
    if vm.engine.name == "emulator":  # else time is the host's
        assert outcomes[0] == outcomes[1]


def test_an_interrupt_comes_before_the_next_instruction(make, assembler):
    """One that an `out` raises, whether the run is in one piece, in steps, or each access an exit."""
    code = assembler(
        """
        xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax; mov sp, 0x7000
        mov word ptr [4 * 0x24], offset handler; mov word ptr [4 * 0x24 + 2], 0
        mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
        mov al, 0xef; out 0x21, al
        mov dx, 0x3fc; mov al, 8; out dx, al
        sti
        mov dx, 0x3f9; mov al, 2; out dx, al
        after: inc bx; inc bx; inc bx; jmp $
        handler: pop cx; mov dx, 0xf4; out dx, al
        """,
        "real",
    )
    for fast in (True, False):
        vm = make(fast=fast)
        load(vm, code)
        run(vm)
        at = vm.at_boundary(lambda cpu: cpu.get_state("regs")).result(30)
        assert int.from_bytes(at[16:18], "little") == code.labels["after"], vm.engine.name


def test_what_a_port_sends_comes_whole_and_in_order(make, exits, assembler):
    """More than its ring has room for, while nobody fetches it, and its end before the exit is seen."""
    vm = make()
    said = bytearray()
    vm.board.devices["com1"].output = said.extend
    count = 60_000 if vm.engine.name == "emulator" else 2_000  # each an exit there, and slow
    load(vm, assembler(f"mov ecx, {count}; mov dx, 0x3f8; l: mov al, cl; out dx, al; loop32: dec ecx; jnz l;"
                       "mov dx, 0xf4; out dx, al", "real"))
    run(vm)
    assert bytes(said) == bytes((count - i) & 0xFF for i in range(count))
    assert vm.board.devices["com1"].counters["sent"] == count
    assert len(exits) < 100


def test_what_is_sent_is_fetched_while_the_guest_runs(make, assembler):
    vm = make()
    said = bytearray()
    vm.board.devices["com1"].output = said.extend
    load(vm, assembler("mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp $", "real"))
    under_way = vm.start()

    deadline = time.monotonic() + 30
    while not said and time.monotonic() < deadline:
        time.sleep(0.001)
    vm.stop(under_way)
    assert said == b"x"


def test_a_machine_that_is_gone_is_asked_nothing(make, assembler):
    """A board that moves to another engine's machine, and its old one."""
    vm = make()
    load(vm, assembler("mov dx, 0x3f9; mov al, 2; out dx, al; mov dx, 0x3fc; mov al, 8; out dx, al; hlt", "real"))
    run(vm, instructions=7)
    vm.move_to(vm.engine)
    before = vm.get_machine_state("irqchip").result(30)
    vm.board.devices["com1"].write(0, 1, 1, 0)
    assert vm.board.bus.holders()[4] == 0
    run(vm, instructions=1)
    assert vm.get_machine_state("irqchip").result(30) != before
