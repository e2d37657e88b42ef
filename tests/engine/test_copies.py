"""Copies of a machine, as forks are made of them: the same machine, and hostile ones are refused."""

from __future__ import annotations

import fcntl
import os
import random
from contextlib import ExitStack

import msgspec
import pytest
from engine.conftest import engine_or_skip
from engine.saving import be, fork_of
from engine.test_past import ORIGIN, SIZE, WALKER, beside_one_left_alone, look, run
from engine.test_past import make as make  # noqa: PLC0414  # the fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.machine import copies
from vmfs.machine.machine import Vm
from vmfs.memory.layers import SEALS
from vmfs.memory.ram import PAGE
from vmfs.words.errors import VmfsError


@pytest.fixture
def again():
    with ExitStack() as made:

        def one(vm: Vm, name: str = "") -> Vm:
            """A machine of a copy of it."""
            child = fork_of(vm, name)
            made.callback(child.close)
            return child

        yield one


@pytest.mark.parametrize("kind", ["bare", "pc"])
def test_it_is_the_same(engine, make, again, kind):
    vm = make(engine, kind)
    run(vm, 5000)
    child = again(vm)
    assert look(child) == look(vm) and child.memory.base is not None and child.state == "paused"
    run(vm, 9021)
    then = look(vm)
    assert look(child) != then
    run(child, 9021)
    assert look(child) == then


def test_it_runs_on_as_one_that_was_left_alone(make, again):
    """Forks of forks, and their snapshots, at any instruction."""

    def disturb(vm, number, dice):
        if not number % 3:
            return again(vm)
        vm.past.take("own")
        run(vm, dice.randrange(1, 20_000))
        child = again(vm, "own")
        run(vm, dice.randrange(1, 20_000))
        vm.past.drop("own")
        return child

    beside_one_left_alone(make, disturb)


def test_pages_that_are_all_over_ram_are_mapped_and_copied(make, again, monkeypatch):
    """Of each layer runs of pages are mapped as far as there may be mappings, the rest is copied."""
    from vmfs.memory import ram

    engine = engine_or_skip("emulator")
    for most in (0, 3, 2048):
        monkeypatch.setattr(ram, "_MAPPINGS_MOST", most)
        vm = make(engine)
        vm.past.take("base")
        dice = random.Random(most)
        for layer in range(copies.LAYERS_MOST + 6):
            for _ in range(5):
                vm.memory.write(dice.randrange(SIZE // PAGE) * PAGE + layer, b"%d" % layer)
            vm.past.take(f"s{layer}")
        child = again(vm, f"s{layer}")
        assert look(child) == look(vm)
        child.past.take("mine")
        mine = look(child)
        run(child, 9000)
        child.memory.write(0x300000, b"x" * 50_000)
        child.past.restore("mine")
        assert look(child) == mine
        vm.past.restore("s2")
        assert look(again(vm, "s2")) == look(vm) and look(child) == mine


def test_on_another_engine(make, again):
    """A fork is on the engine of its parent, and may be moved as any machine."""
    engine, other = engine_or_skip("emulator"), engine_or_skip("kvm")
    vm = make(engine, source=WALKER.replace("rdtsc;", ""))
    run(vm, 5000)
    child = again(vm)
    child.move_to(other)
    assert child.memory.read(0, SIZE) == vm.memory.read(0, SIZE)
    grandchild = again(child)
    assert grandchild.engine.name == "kvm" and grandchild.memory.read(ORIGIN, 64) == vm.memory.read(ORIGIN, 64)


# ---- hostile copies


def sealed(data: bytes, seals: int = SEALS) -> int:
    fd = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.fixture(scope="module")
def parts():
    """A copy of a PC that has booted nothing: its description, and its memory."""
    vm = Vm(engine_or_skip("emulator"), memory_size=SIZE)
    vm.set_machine("pc")
    vm.memory.write(ORIGIN, b"something")
    vm.images["initrd"].write(0, b"an image")
    copy = copies.copy_of(vm, vm.past.take("", is_kept=False), 1)
    yield os.pread(copy.memory[0], 1 << 20, 0), copy
    vm.close()


def refused(memory: list[int]) -> str:
    child = Vm(engine_or_skip("emulator"))
    try:
        with pytest.raises(VmfsError) as caught:
            be(child, memory)
        return str(caught.value)
    finally:
        child.close()


def test_memory_that_others_may_change_is_refused(parts):
    data, copy = parts
    for which in range(len(copy.memory)):
        memory = [os.dup(fd) for fd in copy.memory]
        size = os.fstat(memory[which]).st_size
        os.close(memory[which])
        memory[which] = os.memfd_create("open", os.MFD_ALLOW_SEALING)
        os.ftruncate(memory[which], size)
        os.pwrite(memory[which], data[:size], 0)
        fcntl.fcntl(memory[which], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        assert "others may change" in refused(memory), which


def test_memory_that_is_too_short_or_too_little_is_refused(parts):
    data, copy = parts
    for which in range(1, len(copy.memory)):
        memory = [os.dup(fd) for fd in copy.memory]
        os.close(memory[which])
        memory[which] = sealed(b"short")
        refused(memory)
    refused([os.dup(fd) for fd in copy.memory[:-1]])
    refused([os.dup(fd) for fd in (*copy.memory, copy.memory[1])])


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255), st.integers(0, 2)), min_size=1, max_size=6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_a_description_of_any_bytes_is_a_machine_or_refused(parts, changes):
    """Nothing but a sentence comes of it, and no descriptor is left."""
    data, copy = parts
    mutant = bytearray(data)
    for at, byte, how in changes:
        at %= len(mutant)
        if how == 0:
            mutant[at] = byte
        elif how == 1:
            del mutant[at : at + byte]
        else:
            mutant[at:at] = bytes([byte])
        if not mutant:
            return
    child = Vm(engine_or_skip("emulator"))
    try:
        be(child, [sealed(bytes(mutant)), *(os.dup(fd) for fd in copy.memory[1:])])
        run(child, 100)
    except VmfsError:
        pass
    finally:
        child.close()


def test_a_description_with_other_values(parts):
    data, copy = parts
    description = msgspec.msgpack.decode(data, type=copies.Description)
    for changed in (
        {"format": 2},
        {"layers": (b"\xff",)},
        {"layers": (None, None)},
        {"handed": {"blk0": 1}},
        {"handed": {"blk0": -1}},
        {"disks": {"blk0": ({},)}},
        {"state": b""},
    ):
        mutant = msgspec.msgpack.encode(msgspec.structs.replace(description, **changed))
        refused([sealed(mutant), *(os.dup(fd) for fd in copy.memory[1:])])
