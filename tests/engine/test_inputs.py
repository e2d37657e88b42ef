"""What comes from outside comes in by one door: recorded there, and fed again, it finds the same machine."""

from __future__ import annotations

import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.devices import keys
from vmfs.devices.inputs import Input, pack_inputs, unpack_inputs
from vmfs.engine.base import Capability
from vmfs.machine.born import Birth
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words.errors import Busy, Invalid, Unsupported, VmfsError
from vmfs.words.registers import write_registers

SECONDS = 60
BIRTH = Birth(1_700_000_000_000_000_000, bytes(16))

# Notes at 0x8000 how often it had gone round when each byte came, on COM1 (polled) and from the keyboard (IRQ 1), while
# the timer ticks 1000 times a second. It sleeps every few thousand rounds. `q` ends it.
GUEST = """
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7000
    mov word ptr [0x80], offset tick
    mov word ptr [0x82], 0
    mov word ptr [0x84], offset key
    mov word ptr [0x86], 0
    mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
    mov al, 0xfc; out 0x21, al
    mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 4; out 0x40, al
    mov al, 0x60; out 0x64, al; mov al, 0x01; out 0x60, al
    mov edi, 0x8000
    xor ebx, ebx
    sti
l:  inc ebx
    test bx, 0x3fff
    jnz 2f
    hlt
2:  mov dx, 0x3fd
    in al, dx
    test al, 1
    jz l
    mov dx, 0x3f8
    in al, dx
    call note
    cmp al, 0x71
    jne l
    mov al, 1
    out 0xf4, al
note:
    pushf
    cli
    mov [edi], ebx
    mov [edi + 4], al
    mov ecx, [0x7f00]
    mov [edi + 8], ecx
    add edi, 12
    popf
    ret
tick:
    push ax
    inc dword ptr [0x7f00]
    mov al, 0x20
    out 0x20, al
    pop ax
    iret
key:
    push ax
    in al, 0x60
    call note
    mov al, 0x20
    out 0x20, al
    pop ax
    iret
"""


@pytest.fixture
def make(engine, assembler):
    made = []

    def one(cpus: int = 1) -> Vm:
        vm = Vm(engine, memory_size=2 << 20)
        made.append(vm)
        if Capability.DETERMINISTIC not in vm.capabilities:
            pytest.skip("its time is the host's")
        vm.set_machine("pc")
        vm.set_cpu_count(cpus)
        vm.set_birth(BIRTH)
        vm.set_time_source("instructions")
        vm.memory.write(0x1000, assembler(GUEST, "real").code)
        vm.change(lambda cpu: write_registers(cpu, {"cs": 0, "cs.base": 0, "rip": 0x1000}))
        return vm

    yield one
    for vm in made:
        vm.close()


def kinds(vm):
    return {one.kind for one in vm.board.inputs.recorded()}


@pytest.mark.parametrize("cpus", [1, 3])
@pytest.mark.parametrize("pauses", [False, True])
def test_what_was_recorded_comes_again_at_the_same_instruction(make, cpus, pauses):
    """Typed by another thread whenever it likes, on a machine that is stopped now and then, or not."""
    one, other = make(cpus), make(cpus)
    one.board.inputs.record()
    dice = random.Random(cpus)

    def user():
        for _ in range(20):
            time.sleep(dice.random() / 50)
            if dice.random() < 0.2:
                one.irq_line(5, bool(dice.randrange(2)))  # nobody listens, and it is state
            elif dice.random() < 0.5:
                one.board.devices["com1"].receive(bytes(dice.choices(b"abc", k=dice.randrange(1, 4))))
            else:
                one.board.keyboard.type(keys.parse('"xy"'))
        one.board.devices["com1"].receive(b"q")

    thread = threading.Thread(target=user)
    thread.start()
    while one.state != "shutdown":
        one.start(Bound(seconds=dice.random() / 30) if pauses else Bound()).result(SECONDS)
    thread.join()
    assert kinds(one) == {"bytes", "strokes", "line"}
    other.board.inputs.feed(unpack_inputs(pack_inputs(one.board.inputs.stop())))
    assert other.start(Bound()).result(SECONDS) == one.last_exit
    noted = [vm.memory.read(0x8000, 1 << 12) for vm in (one, other)]
    assert noted[0] == noted[1] and noted[0].count(b"q")
    assert one.state_hash() == other.state_hash()


def test_a_machine_that_is_not_recorded_takes_it_at_once(make):
    vm = make()
    vm.board.devices["com1"].receive(b"q" * 100)
    assert len(vm.board.devices["com1"].waiting) >= 84 and not vm.board.inputs.recorded()


def test_what_cannot_be_recorded_or_fed(make):
    vm = make()
    inputs = vm.board.inputs
    vm.set_time_source("host")
    with pytest.raises(Unsupported, match="only where `time` is instructions"):
        inputs.record()
    vm.set_time_source("instructions")
    inputs.record()
    with pytest.raises(Busy):
        inputs.record()
    good = Input(vm.board.now() + 1000, "com1", "bytes", b"x")
    for bad, sentence in (
        (Input(good.at, "com9", "bytes", b""), "there is no 'com9'"),
        (Input(good.at, "com1", "strokes", b""), "com1 takes no 'strokes'"),
        (Input(good.at, "keyboard", "strokes", b"\xff"), "these are no strokes"),
        (Input(good.at, "irq", "line", b"\x18\0"), "lines 0 to 23"),
        (Input(0, "com1", "bytes", b""), "it is .* already"),
    ):
        with pytest.raises(Invalid, match=sentence):
            inputs.feed([good, bad])
    vm.start(Bound(instructions=5000)).result(SECONDS)
    assert vm.board.devices["com1"].counters["received"] == 0  # nothing of what was refused


@given(st.binary(max_size=200))
def test_bytes_that_are_no_inputs_are_refused(data):
    try:
        unpack_inputs(data)
    except VmfsError as error:
        assert isinstance(error, Invalid)


def test_inputs_are_packed():
    some = (Input(5, "com1", "bytes", b"\0\xff"), Input(5, "power", "press", b""))
    assert unpack_inputs(pack_inputs(some)) == some
    with pytest.raises(Invalid):
        unpack_inputs(pack_inputs(some)[:-1])
    with pytest.raises(Invalid):
        unpack_inputs(pack_inputs([Input(-1, "com1", "bytes", b"")]))
