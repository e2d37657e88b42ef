"""What comes from outside comes in by one door: recorded there, and fed again, it finds the same machine."""

from __future__ import annotations

import random
import threading
import time
from functools import partial

import pytest
from engine.typed import typed_into
from hypothesis import given
from hypothesis import strategies as st

from vmfs.devices import keys
from vmfs.devices.inputs import Input, pack_inputs, unpack_inputs
from vmfs.engine.base import Capability
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words.errors import Busy, Invalid, Unsupported, VmfsError

SECONDS = 60


@pytest.fixture
def make(engine, assembler):
    made = []

    def one(cpus: int = 1) -> Vm:
        vm = Vm(engine, memory_size=2 << 20)
        made.append(vm)
        if Capability.DETERMINISTIC not in vm.capabilities:
            pytest.skip("its time is the host's")
        return typed_into(vm, assembler, cpus)

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
    acts = [
        *(partial(one.irq_line, 5, bool(number % 2)) for number in range(4)),  # nobody listens, and it is state
        *(partial(one.board.devices["com1"].receive, bytes(dice.choices(b"abc", k=count))) for count in (1, 2, 3, 1)),
        *[partial(one.board.keyboard.type, keys.parse('"xy"'))] * 8,
    ]
    dice.shuffle(acts)
    waits = [dice.random() / 50 for _ in acts]

    def user():
        for wait, act in zip(waits, acts, strict=True):
            time.sleep(wait)
            act()
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


@pytest.mark.parametrize("cpus", [1, 3])
def test_an_end_soon_is_at_the_place_of_a_deadline_of_that_time(make, cpus):
    """Asked for by another thread at any moment, of a guest that is interrupted and sleeps."""
    one = make(cpus)
    machine, runner = one.board.machine, one.in_turn()
    places, dice = [], random.Random(cpus)
    for _ in range(20):
        timer = threading.Timer(dice.random() / 100, machine.end_soon)
        timer.start()
        while True:
            runner.run(budget=None, goes_on=True)
            one.board.call_due()
            if machine.ended_soon():
                break
        timer.join()
        assert not machine.ended_soon()
        places.append((one.board.now(), [vcpu.counters()["instructions"] for vcpu in one.vcpus], one.state_hash()))
    again = make(cpus)
    runner = again.in_turn()
    for at, counts, hashed in places:
        again.board.schedule(at, lambda: None)
        while again.board.now() < at:
            runner.run(budget=None, goes_on=True)
            again.board.call_due()
        assert ([vcpu.counters()["instructions"] for vcpu in again.vcpus], again.state_hash()) == (counts, hashed)
        assert not again.board.machine.ended_soon()


def test_inputs_that_come_together_end_the_run_once(make, monkeypatch):
    def looks(count: int) -> int:
        vm, calls = make(), []
        vm.board.inputs.record()
        call_due = vm.board.call_due
        monkeypatch.setattr(vm.board, "call_due", lambda: (calls.append(1), call_due()))
        for _ in range(count):
            vm.board.devices["com1"].receive(b"x")
        vm.start(Bound(instructions=100)).result(SECONDS)
        assert len(vm.board.inputs.recorded()) == count
        return len(calls)

    assert looks(40) - looks(0) == 1


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
