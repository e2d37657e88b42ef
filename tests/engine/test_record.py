"""A saved machine takes a part of its past along: it goes to places in it, elsewhere, and is what it was there."""

from __future__ import annotations

import random

import msgspec
import pytest
from engine.saving import Door, arrival_of, come_in
from engine.typed import typed_into, typing
from engine.walked import count, go, run, started

from vmfs.machine import attach
from vmfs.machine.history import History
from vmfs.machine.machine import Vm
from vmfs.machine.record import unpack
from vmfs.words import exits
from vmfs.words.errors import Invalid, VmfsError
from vmfs.words.registers import write_registers


def loaded(vm: Vm, machines: list[Vm], name: str = "saved") -> Vm:
    """Another machine, of that snapshot, with its past."""
    other = Vm(vm.engine)
    machines.append(other)
    come_in(other, arrival_of(vm, name))
    History(other).start(other.past.record())
    return other


@pytest.mark.parametrize("cpus", [1, 3])
def test_it_goes_back_elsewhere_to_the_bit(emulator, assembler, machines, cpus):
    """Typed into; saved in the middle of its past's record; older checkpoints are gone and layers one."""
    vm = typed_into(Vm(emulator, memory_size=2 << 20), assembler, cpus)
    machines.append(vm)
    started(vm, every=0.002)
    dice = random.Random(cpus)
    seen = {}
    with typing(vm, dice):
        for number in range(20):
            run(vm, instructions=dice.randrange(1, 300_000))
            seen[count(vm)] = vm.state_hash()
            if number == 12:
                vm.past.take("saved")
                end = count(vm)
    assert vm.past["saved"].record.inputs
    other = loaded(vm, machines)
    assert count(other) == end and other.state_hash() == seen[end]
    assert (other.history.begin, other.history.end) == (vm.history.begin, end)
    for place in dice.sample([one for one in seen if one < end], 8):
        go(other, place=place)
        assert count(other) == place and other.state_hash() == seen[place] and other.history.in_past
        following = min(one for one in seen if one > place)
        run(other, instructions=following - place)
        assert other.state_hash() == seen[following]
    go(other, place=end)
    assert other.state_hash() == seen[end] and not other.history.in_past
    run(other, instructions=50_000)
    there = other.state_hash()
    go(other, place=min(seen))
    assert other.state_hash() == seen[min(seen)]
    go(other, place=end + 50_000)
    assert other.state_hash() == there


def test_what_was_changed_at_the_end_is_no_part_of_it(walker, machines):
    """An answer to a read, registers: the record has what came before, and what was changed is a new part."""
    vm = walker(source="l: inc rbx; mov [rbx * 8 + 0x100000], rbx; in al, 0x81; add rcx, rax; jmp l")
    started(vm)
    for answer in range(1, 6):
        asks = run(vm)
        vm.set_access_data(bytes([answer]))
    vm.change(lambda vcpu: write_registers(vcpu, {"r15": 7}))
    there = vm.state_hash()
    vm.past.take("saved")
    other = loaded(vm, machines)
    assert other.state_hash() == there and other.history.begin < count(other) == other.history.end
    exit_ = go(other, place=count(other) - 2)
    assert isinstance(exit_, exits.Limit) and other.history.in_past
    assert isinstance(exit_ := run(other), exits.Io) and exit_ == asks  # as it came to it the first time
    go(other, place=count(vm))
    assert other.state_hash() == there and not other.history.in_past


def test_a_failing_machine_comes_back_with_how_it_failed(walker, machines):
    writes = "mov ecx, 3000; l: mov [rcx * 8 + 0x100000], rcx; loop l;"
    vm = walker("pc", source=f"{writes} lidt [rip + no]; int3; no: .quad 0, 0")
    started(vm)
    shut = run(vm)
    vm.past.take("saved")
    other = loaded(vm, machines)
    assert other.state == "shutdown" and run(other) == shut
    go(other, back=4)
    assert count(other) == count(vm) - 4 and other.state == "paused" and other.history.in_past
    assert go(other, place=count(vm)) == shut and other.state == "shutdown"
    assert go(other, place=5) != shut and run(other) == shut


# Writes its count to each sector of an IDE disk in turn (LBA in ecx, the sector's words from 0x8000 on).
WRITES = """
    xor ecx, ecx
l:  inc ecx; and ecx, 0x7f; inc rbx; mov [0x8000], rbx; mov dx, 0x1f6; mov al, 0xe0; out dx, al
    mov dx, 0x1f2; mov al, 1; out dx, al; mov dx, 0x1f3; mov al, cl; out dx, al
    mov dx, 0x1f4; xor al, al; out dx, al; mov dx, 0x1f5; out dx, al; mov dx, 0x1f7; mov al, 0x30; out dx, al
w:  in al, dx; test al, 8; je w
    mov rsi, 0x8000; mov dx, 0x1f0; mov r15, rcx; mov ecx, 256; rep outsw; mov rcx, r15; mov dx, 0x1f7
b:  in al, dx; test al, 0x88; jne b
    jmp l
"""


def test_what_was_written_to_a_disk_goes_back_elsewhere(walker, machines, tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(random.Random(1).randbytes(1 << 20))
    vm = walker("pc", source=WRITES)
    attach.attach(vm, attach.parse_attachment(f"ide {image} cow"), Door())
    started(vm, every=0.002)
    seen = {}
    for _ in range(12):
        run(vm, instructions=20_000)
        with vm.lock:
            vm.history.take()
        seen[count(vm)] = vm.state_hash()
    del vm.history.checkpoints[0]  # so that the record begins with something written
    first = vm.history.checkpoints[0].place  # perhaps not where the first run ended: old ones are left out
    vm.past.take("saved")
    assert any(one.files for one in vm.past["saved"].record.overlays.values())
    other = loaded(vm, machines)
    for place in [*(one for one in sorted(seen)[1::3] if one >= first), max(seen), first + 1]:
        go(other, place=place)
        assert count(other) == place and (place not in seen or other.state_hash() == seen[place])


def test_switched_off_and_on_where_it_was_taken_it_has_its_past(walker):
    vm = walker("pc")
    started(vm)
    run(vm, instructions=30_000)
    vm.past.take("here")
    there = vm.state_hash()
    vm.history.stop()
    History(vm).start(vm.past.record())
    go(vm, place=10_000)
    assert vm.history.in_past and count(vm) == 10_000
    go(vm, place=30_000)
    assert vm.state_hash() == there
    run(vm, instructions=5)
    assert vm.past.record() is None


def test_one_that_is_damaged_is_refused_and_nothing_changes(walker, machines):
    """Each field, and bytes at random: Invalid when it comes in or when the past is taken up, or a past."""
    vm = walker("pc")
    started(vm)
    vm.board.devices["com1"].receive(b"typed")
    run(vm, instructions=30_000)
    vm.past.take("saved")
    record = vm.past["saved"].record
    good = unpack(record.packed(vm.past["saved"].ram))
    assert good.inputs and good.pages
    wrong = {
        "format": 2, "cpu": 3, "of_cpus": (1, 2), "end": 29_999, "state": good.state[:-20], "pages": b"\xff" * 4096,
        "inputs": (msgspec.structs.replace(good.inputs[0], taker="nobody"),),
        "exits": ((5, ("no exit",)),),
    }  # fmt: skip
    for name, value in wrong.items():
        packed = msgspec.structs.replace(good, **{name: value})
        assert refusal(vm, machines, msgspec.msgpack.encode(packed)), name
    dice = random.Random(7)
    encoded = msgspec.msgpack.encode(good)
    for _ in range(60):
        data = bytearray(encoded)
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data) if dice.randrange(2) else 60)] = dice.randrange(256)
        refusal(vm, machines, bytes(data[: dice.choice([len(data), len(data), dice.randrange(len(data))])]))


def refusal(vm: Vm, machines: list[Vm], data: bytes) -> str:
    """Why a saved machine with that record is none, or has no past; empty where it has one, which it goes to."""
    arrival = arrival_of(vm, "saved")
    arrival.truncate(arrival["history/record"], 0)
    arrival.write(arrival["history/record"], 0, data)
    other = Vm(vm.engine)
    machines.append(other)
    before = other.state_hash()
    try:
        come_in(other, arrival)
    except Invalid as error:
        assert other.state_hash() == before and arrival.problems()
        return str(error)
    there = other.state_hash()
    try:
        record = other.past.record()
        if record is None:
            return "it ends elsewhere"
        History(other).start(record)
        assert other.history.checkpoints
    except Invalid as error:
        assert other.history is None and other.state_hash() == there
        return str(error)
    try:
        go(other, place=other.history.begin)
        go(other, place=other.history.end)
    except VmfsError:
        pass
    return ""
