"""Saved machines of any bytes: what comes in is a machine or a sentence, and nothing changes before it is whole."""

from __future__ import annotations

import os

import pytest
from engine.conftest import engine_or_skip
from engine.saving import Contents, arrival_of, come_in
from engine.test_past import SECONDS, SIZE, run
from engine.test_past import make as make  # noqa: PLC0414  # the fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.engine import by_name
from vmfs.machine.files.arrivals import rebuild
from vmfs.machine.machine import Vm
from vmfs.words.errors import Busy, VmfsError


@pytest.mark.parametrize("kind", ["bare", "pc"])
def test_it_runs_on_as_one_that_was_left_alone(make, kind):
    """Saved and loaded again and again, at any instruction: half-done ones, too."""
    engine = engine_or_skip("emulator")
    alone, vm = make(engine, kind), make(engine, kind)
    vm.put(alone.take().result(SECONDS))
    for number, count in enumerate((1, 3, 100, 9000, 2, 20_000)):
        assert run(alone, count) == run(vm, count)
        vm.past.take(f"s{number}")
        new = Vm(engine)
        come_in(new, arrival_of(vm, f"s{number}"))
        assert new.state_hash() == alone.state_hash(), (kind, number)
        vm.close()
        vm = new
    vm.close()


def test_on_another_engine(make):
    vm = make(engine_or_skip("kvm"))
    run(vm, 50)
    vm.past.take("one")
    new = Vm(engine_or_skip("emulator"))
    arrival = arrival_of(vm, "one")
    made = arrival.snapshot(new.engine, lambda name: by_name("emulator"))  # this host has no other
    assert made.snapshot.engine.name == "emulator"
    new.past.adopt(made.snapshot)
    rebuild(Contents(new), made.snapshot)  # type: ignore[arg-type]
    assert new.memory.read(0, SIZE) == vm.memory.read(0, SIZE)
    assert new.cpu.vcpu.get_state("regs") == vm.cpu.vcpu.get_state("regs")
    run(new, 1000)
    new.close()


def test_one_that_is_written_is_not_whole(make):
    vm = make(engine_or_skip("emulator"))
    vm.past.take("one")
    arrival = arrival_of(vm, "one")
    arrival.files["mem"].writers += 1
    with pytest.raises(Busy):
        arrival.snapshot(vm.engine, by_name)


@pytest.fixture(scope="module")
def saved():
    vm = Vm(engine_or_skip("emulator"), memory_size=SIZE)
    vm.set_machine("pc")
    vm.memory.write(0x1000, b"something")
    vm.past.take("one")
    yield vm
    vm.close()


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255), st.integers(0, 2)), min_size=1, max_size=6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_a_state_of_any_bytes(saved, changes):
    arrival = arrival_of(saved, "one")
    data = bytearray(saved.past["one"].encoded)
    for at, byte, how in changes:
        at %= len(data)
        if how == 0:
            data[at] = byte
        elif how == 1:
            del data[at : at + byte]
        else:
            data[at:at] = bytes([byte])
        if not data:
            return
    state = arrival.files["state"]
    os.ftruncate(state.fd, 0)
    arrival.write(state, 0, bytes(data))
    vm = Vm(engine_or_skip("emulator"))
    before = vm.state_hash()
    try:
        made = arrival.snapshot(vm.engine, by_name)
    except VmfsError:
        assert vm.state_hash() == before
        vm.close()
        return
    try:
        vm.past.adopt(made.snapshot)
        rebuild(Contents(vm), made.snapshot)  # type: ignore[arg-type]
        run(vm, 100)
    except VmfsError:
        pass
    finally:
        vm.close()
