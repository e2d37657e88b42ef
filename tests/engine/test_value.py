"""A machine is a value: taken at any moment, put into another one, it goes on as if nothing had happened."""

from __future__ import annotations

import random
import time
from contextlib import contextmanager

import msgspec
import pytest
from engine.asm import ORIGIN
from engine.conftest import engine_or_skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.engine.base import MACHINE_REST, MACHINE_STATES, VCPU_REST, VCPU_STATES, Capability
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.machine.state import ROWS, Owner, Part, State
from vmfs.words.errors import Busy, Invalid, Unsupported, VmfsError
from vmfs.words.registers import write_registers

SECONDS = 60
SIZE = 4 << 20

# Every part of a PC that a small guest can keep busy: the timer and its interrupt, the clock's, serial ports, the
# keyboard, PCI configuration, VGA and CMOS, ports that nobody has, code that changes itself, strings.
BUSY = """
    xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax; mov sp, 0x7000
    mov word ptr [0x80], offset tick; mov word ptr [0x82], 0
    mov word ptr [0xa0], offset clock; mov word ptr [0xa2], 0
    mov al, 0x11; out 0x20, al; out 0xa0, al; mov al, 0x20; out 0x21, al; mov al, 0x28; out 0xa1, al
    mov al, 4; out 0x21, al; mov al, 2; out 0xa1, al; mov al, 1; out 0x21, al; out 0xa1, al
    mov al, 0xfa; out 0x21, al; mov al, 0xfe; out 0xa1, al
    mov al, 0x34; out 0x43, al; mov al, 0x40; out 0x40, al; mov al, 3; out 0x40, al
    mov al, 0x0b; out 0x70, al; mov al, 0x42; out 0x71, al; mov al, 0x0a; out 0x70, al; mov al, 0x26; out 0x71, al
    sti
l:  inc word ptr [0x500]; mov bx, [0x500]
    mov dx, 0x3f8; mov al, bl; out dx, al; mov dx, 0x3fd; in al, dx; mov [0x502], al
    mov dx, 0x3f9; mov al, bh; and al, 3; out dx, al
    mov al, 0x60; out 0x64, al; mov al, 0x47; out 0x60, al; in al, 0x60; mov [0x503], al
    mov dx, 0xcf8; mov eax, 0x80000000; mov ah, bl; and al, 0xfc; out dx, eax; mov dx, 0xcfc; in eax, dx
    add [0x504], eax; mov dx, 0x3c8; mov al, bl; out dx, al; inc dx; out dx, al; out dx, al; mov dx, 0x3da; in al, dx
    add [0x508], al
    mov al, 0; out 0x70, al; in al, 0x71; mov [0x509], al; mov dx, 0x608; in eax, dx; add [0x50c], eax
    mov dx, 0x5555; in al, dx; out dx, al; rdtsc; add [0x510], eax
    mov cx, bx; and cx, 0x3ff; mov si, 0x8000; mov di, 0x8801; rep movsb; inc byte ptr [0x8000]
    mov byte ptr [change + 1], bl; change: mov al, 0; add [0x514], al
    test bx, 7; jne l
    hlt
    jmp l
tick: push ax; inc word ptr [0x520]; mov al, 0x20; out 0x20, al; pop ax; iret
clock: push ax; inc word ptr [0x522]; mov al, 0x0c; out 0x70, al; in al, 0x71; mov al, 0x20; out 0xa0, al; out 0x20, al
    pop ax; iret
"""
CPU_ONLY = """
    mov rax, cr4; or eax, 1 << 18; mov cr4, rax; xor ecx, ecx; xor edx, edx; mov eax, 7; xsetbv
l:  mov dr1, rbx; mov rax, dr1; add rdx, rax; vmovdqu ymm3, [0x8000]; vpaddb ymm4, ymm4, ymm3
    inc rbx; mov rcx, rbx; and ecx, 0xfff; mov esi, 0x8000; mov edi, 0x9801; rep movsb; inc byte ptr [0x8000]
    mov byte ptr [rip + change + 1], bl; change: mov eax, 0; add rdx, rax; cvtsi2sd xmm0, rbx; sqrtsd xmm1, xmm0
    fild qword ptr [0x8000]; fstp qword ptr [0x8008]; test rbx, 63; jne l
    out 0x80, al; in al, 0x81; mov [0x7000], al; mov edi, 0x10000000 - 4; mov [rdi], rbx; jmp l
"""
ANYWHERE = """
l:  inc ebx; mov ecx, 77; mov esi, 0x8000; mov edi, 0x9801; rep movsb; inc byte ptr [0x8000]; mov eax, ebx
    out 0x80, al; in al, 0x81; mov [0x7000], al; mov edi, 0x10000000 - 4; mov [rdi], rbx; mov rdx, [rdi]
    push rdx; mov esi, 0x8000; mov dx, 0x82; outsb; pop rdx; jmp l
"""


@contextmanager
def machine(engine, kind="bare"):
    vm = Vm(engine, memory_size=SIZE)
    try:
        if kind != "bare":
            vm.set_machine(kind)
            if Capability.DETERMINISTIC in vm.capabilities:
                vm.set_time_source("instructions")
        yield vm
    finally:
        vm.close()


def begin(vm, assembler, source=CPU_ONLY, mode="long"):
    source, mode = (BUSY, "real") if vm.board is not None else (source, mode)
    vm.set_mode(mode)
    vm.memory.write(ORIGIN, assembler(source, mode).code)
    vm.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN}))


def go_into(vm, other):
    """`other` becomes what `vm` is, by way of bytes."""
    other.memory.write(0, vm.memory.read(0, SIZE))
    other.put(State.decode(vm.take().result(SECONDS).encode()))


def part(vm, name):
    return vm.take().result(SECONDS).parts[name]


def different(vm, other):
    """The parts that are not alike."""
    a, b = (one.take().result(SECONDS).parts for one in (vm, other))
    assert a.keys() == b.keys()
    found = {name for name in a if a[name] != b[name]}
    return found | ({"ram"} if vm.memory.read(0, SIZE) != other.memory.read(0, SIZE) else set())


@pytest.fixture(scope="module")
def emulator():
    return engine_or_skip("emulator")


# ---- the table


def test_what_a_row_needs_is_set_before_it():
    set_ = set()
    for row in ROWS:
        assert set(row.after) <= set_, row.name
        set_.add(row.name)
    assert len(set_) == len(ROWS)


def test_every_state_of_an_engine_is_in_a_row():
    """But for views of others: `fpu` of xsave, `clock` of time."""
    named = {row.name for row in ROWS if row.owner in (Owner.CPU, Owner.ENGINE)}
    assert named == {*VCPU_STATES, *VCPU_REST, *MACHINE_STATES, *MACHINE_REST} - {"fpu", "clock"}


def test_bytes_and_back(engine, assembler):
    with machine(engine) as vm:
        begin(vm, assembler)
        state = vm.take().result(SECONDS)
        assert State.decode(state.encode()) == state
        assert {name.partition("/")[0] for name in state.parts} == {"machine", "engine", "cpu0"}


# ---- at any moment


@pytest.mark.parametrize("kind", ["bare", "pc"])
def test_at_any_moment(emulator, assembler, kind):
    dice = random.Random(kind)
    with machine(emulator, kind) as alone, machine(emulator, kind) as first, machine(emulator, kind) as second:
        begin(alone, assembler)
        go_into(alone, first)
        for number in range(60):
            bound = Bound(instructions=dice.choice((1, 2, 5, 90, 700, 4000)))
            lines = [vm.start(bound).result(SECONDS).line() for vm in (alone, first)]
            assert lines[0] == lines[1], number
            if alone.access_data and "direction=in" in lines[0]:
                for vm in (alone, first):
                    vm.set_access_data(bytes([number]))
            if kind == "pc" and number % 9 == 0:
                for vm in (alone, first):
                    vm.board.devices["com1"].receive(b"some text")
                    vm.board.keyboard.type([("a",), ("shift", "b")])
            if dice.random() < 0.4:
                go_into(first, second)
                first, second = second, first
            if number % 5 == 4:
                assert different(alone, first) == set(), number
                assert alone.state_hash() == first.state_hash()
        if kind == "pc":
            assert int.from_bytes(alone.memory.read(0x520, 2), "little") > 10
            assert alone.board.devices["com1"].sent.read(0, 1)


def test_back_in_time(emulator, assembler):
    """The same machine is what it was before, and comes to the same once more."""
    with machine(emulator, "pc") as vm:
        begin(vm, assembler)
        vm.start(Bound(instructions=30_000)).result(SECONDS)
        was, ram = vm.take().result(SECONDS), vm.memory.read(0, SIZE)
        vm.start(Bound(instructions=50_000)).result(SECONDS)
        then = vm.state_hash()
        for _ in range(2):
            vm.memory.write(0, ram)
            vm.put(was)
            assert vm.take().result(SECONDS) == was
            vm.start(Bound(instructions=50_000)).result(SECONDS)
            assert vm.state_hash() == then


def test_while_it_runs(engine, assembler):
    with machine(engine) as vm, machine(engine) as other:
        vm.set_mode("long")
        vm.memory.write(ORIGIN, assembler("l: inc rbx; jmp l", "long").code)
        vm.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN}))
        run = vm.start()
        other.memory.write(0, vm.memory.read(0, SIZE))
        other.put(vm.take().result(SECONDS))
        with pytest.raises(Busy):
            vm.put(other.take().result(SECONDS))
        vm.stop()
        assert run.result(SECONDS).REASON == "interrupted"
        assert other.state == "paused" and other.last_exit is None
        assert other.start(Bound(seconds=0.01)).result(SECONDS).REASON == "limit"


def test_into_a_machine_that_has_stood_for_longer(emulator, assembler):
    """Its clock goes back before the time at which its chips were last asked, and its 8254 goes on from there. (It
    once counted from a time before the first, for ever.)"""
    ticks = assembler(f"""
        mov al, 0x34; out 0x43, al; mov al, 0xff; out 0x40, al; mov al, 0x04; out 0x40, al
    read: xor al, al; out 0x43, al; in al, 0x40; mov bl, al; in al, 0x40; mov bh, al
        mov [{0x520}], bx; inc dword ptr [{0x524}]; jmp read
    """, "real")
    with machine(emulator, "pc") as first:
        first.set_time_source("host")
        first.set_mode("real")
        first.memory.write(ORIGIN, ticks.code)
        first.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN}))
        first.start(Bound(seconds=0.02)).result(SECONDS)
        names = ("time", "irqchip", "pit", "chips")
        states = [first._machine.get_state(name) for name in names]
        for stands in (0.05, 0.6):
            with machine(emulator, "pc") as second:
                second.set_time_source("host")
                time.sleep(stands)
                for name, state in zip(names, states, strict=True):  # and nothing else asks the chips before
                    second._machine.set_state(name, state)
                second.set_mode("real")
                second.memory.write(0, first.memory.read(0, SIZE))
                second.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN + 12}))
                reads = int.from_bytes(second.memory.read(0x524, 4), "little")
                assert second.start(Bound(seconds=0.05)).result(SECONDS).REASON == "limit"
                assert int.from_bytes(second.memory.read(0x524, 4), "little") > reads
                assert 0 < int.from_bytes(second.memory.read(0x520, 2), "little") <= 0x4FF


def test_into_a_machine_of_another_engine(engine, other, assembler):
    """At every exit, in the middle of an `in`, of loads and stores over two pages: as one that stays where it is."""
    with machine(engine) as vm, machine(other) as there, machine(engine) as alone:
        for one in (vm, alone):
            begin(one, assembler, ANYWHERE)
        given = {"in": 0, "read": 0}
        for number in range(40):
            exit_ = vm.start().result(SECONDS)
            go_into(vm, there)
            assert there.last_exit.line() == exit_.line() and there.access_data == vm.access_data
            if getattr(exit_, "direction", "") in given:
                there.set_access_data(bytes(range(number, number + len(there.access_data))))
            vm, there = there, vm
            wanted = alone.start().result(SECONDS)
            assert exit_.line() == wanted.line(), number
            if getattr(wanted, "direction", "") in given:
                alone.set_access_data(bytes(range(number, number + len(alone.access_data))))
                given[wanted.direction] += 1
        assert min(given.values()) > 1


# ---- what cannot be


@pytest.fixture(scope="module")
def busy(emulator):
    from engine.asm import assemble

    with machine(emulator, "pc") as vm:
        begin(vm, assemble)
        vm.start(Bound(instructions=20_000)).result(SECONDS)
        yield vm


def test_a_state_of_another_machine_is_refused(busy, emulator):
    state = busy.take().result(SECONDS)
    with machine(emulator) as bare, pytest.raises(Invalid, match="another kind: pc"):
        bare.put(state)
    smaller = Vm(emulator, memory_size=SIZE // 2)
    try:
        smaller.set_machine("pc")
        with pytest.raises(Invalid, match="another RAM"):
            smaller.put(state)
    finally:
        smaller.close()


def test_a_pc_that_was_saved_before_there_was_a_generation_id(emulator, assembler):
    """It has neither the device nor general-purpose events."""
    with machine(emulator, "pc") as vm, machine(emulator, "pc") as other:
        begin(vm, assembler)
        vm.start(Bound(instructions=30_000)).result(SECONDS)
        state = vm.take().result(SECONDS)
        parts = {name: part for name, part in state.parts.items() if name != "device/vmgenid"}
        power = msgspec.msgpack.decode(parts["device/power"].data)
        assert (power.pop("gpe_status"), power.pop("gpe_enable")) == (0, 0)
        parts["device/power"] = Part(1, msgspec.msgpack.encode(power))
        own = other.board.devices["vmgenid"].save()
        other.put(State(state.format, parts))
        then = other.take().result(SECONDS).parts
        assert other.board.devices["vmgenid"].save() == own != vm.board.devices["vmgenid"].save()
        assert {**then, "device/vmgenid": None} == {**state.parts, "device/vmgenid": None}


def test_a_part_too_few_or_too_many_is_refused(busy):
    state = busy.take().result(SECONDS)
    before = busy.state_hash()
    late = {f"device/{name}" for name, device in busy.board.devices.items() if device.IS_LATE}
    for name in state.parts:
        if name not in late:  # machines of before have none
            with pytest.raises(Invalid):
                busy.put(State(state.format, {key: value for key, value in state.parts.items() if key != name}))
        newer = Part(state.parts[name].version + 1, state.parts[name].data)
        with pytest.raises(Invalid):
            busy.put(State(state.format, {**state.parts, name: newer}))
    with pytest.raises(Invalid, match="other devices: com9"):
        busy.put(State(state.format, {**state.parts, "device/com9": state.parts["device/com1"]}))
    with pytest.raises(Invalid, match="has not: 'cpu1/regs'"):
        busy.put(State(state.format, {**state.parts, "cpu1/regs": state.parts["cpu0/regs"]}))
    assert busy.state_hash() == before


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_any_part_are_refused_whole_or_taken(busy, data):
    state = busy.take().result(SECONDS)
    name = data.draw(st.sampled_from(sorted(state.parts)))
    blob = bytearray(state.parts[name].data)
    if data.draw(st.booleans()):
        for at, value in data.draw(st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), max_size=4)):
            blob[at % len(blob)] = value
    else:
        blob = data.draw(st.binary(max_size=40))
    before = busy.state_hash()
    try:
        busy.put(State(state.format, {**state.parts, name: Part(state.parts[name].version, bytes(blob))}))
    except (Invalid, Unsupported):
        assert busy.state_hash() == before
    else:
        try:
            busy.start(Bound(instructions=50)).result(SECONDS)
        except VmfsError:
            pass
        busy.put(state)
    assert busy.take().result(SECONDS) == state


@given(st.binary(max_size=60))
def test_bytes_that_are_no_state(blob):
    with pytest.raises(Invalid):
        State.decode(blob)
    with pytest.raises(Invalid):
        State.decode(msgspec.msgpack.encode({"format": 2, "parts": {}}))
