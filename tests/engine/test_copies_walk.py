"""A machine is taken, run, put back, forked, saved, loaded, moved, sent through its past: it is always what it was."""

from __future__ import annotations

from contextlib import ExitStack

from engine.conftest import engine_or_skip
from engine.saving import arrival_of, come_in, fork_of
from engine.test_past import SECONDS, run
from engine.test_past import make as make  # noqa: PLC0414  # the fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.machine.history import History
from vmfs.machine.journey import Journey
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound

DOES = ("run", "take", "restore", "fork", "load", "write", "move", "back", "home")
ACTS = st.lists(st.tuples(st.sampled_from(DOES), st.integers(1, 20_000)), min_size=1, max_size=14)


def go_through_the_past(vm: Vm, count: int) -> None:
    """Its past is kept for a while: it goes to where it was, and to a place before that, and stays at one of them."""
    history = History(vm)
    history.start()
    run(vm, count)
    there, place = vm.state_hash(), vm.counters()["instructions"]
    run(vm, count // 2 + 1)
    end = vm.counters()["instructions"]
    for journey in (Journey(back=1), Journey(place=place), Journey(place=end), Journey(place=place)):
        vm.start(Bound(journey=journey)).result(SECONDS)
    assert vm.state_hash() == there and vm.counters()["instructions"] == place
    history.stop()
    assert vm.state_hash() == there


def bring_home(vm: Vm, count: int, name: str) -> Vm:
    """A copy that was saved with its past, which has been through that; both are where they were."""
    history = History(vm)
    history.start()
    run(vm, count)
    there, place = vm.state_hash(), vm.counters()["instructions"]
    vm.past.take(name)
    history.stop()
    other = Vm(vm.engine)
    come_in(other, arrival_of(vm, name))
    again = History(other)
    again.start(other.past.record())
    assert again.begin == place - count and again.end == place
    for to in (again.begin, place - count // 2, place):
        other.start(Bound(journey=Journey(place=to))).result(SECONDS)
        assert other.counters()["instructions"] == to
    assert other.state_hash() == there
    again.stop()
    return other


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=ACTS)
def test_any_walk(make, acts):
    with ExitStack() as made:
        vm = make(engine_or_skip("emulator"), "pc")
        kept: dict[str, bytes] = {}  # the hash of each snapshot that it has
        for number, (act, count) in enumerate(acts):
            name = f"s{number}"
            if act == "run":
                run(vm, count)
            elif act == "write":
                vm.memory.write(0x120000 + count, b"%d" % count)
            elif act == "take":
                vm.past.take(name)
                kept[name] = vm.state_hash()
            elif act == "restore" and kept:
                name = sorted(kept)[count % len(kept)]
                vm.past.restore(name)
                assert vm.state_hash() == kept[name]
            elif act == "move":
                before = vm.state_hash()
                vm.move_to(EmulatorEngine())
                assert vm.state_hash() == before
            elif act == "back":
                go_through_the_past(vm, count)
            elif act == "home":
                other = bring_home(vm, count, name)
                made.callback(other.close)
                kept = {name: vm.state_hash()}
                vm = other
            elif act in ("fork", "load"):
                before = vm.state_hash()
                if act == "fork":
                    other, kept = fork_of(vm), {}
                else:
                    other = Vm(vm.engine)
                    vm.past.take(name)
                    come_in(other, arrival_of(vm, name))
                    kept = {name: before}
                made.callback(other.close)
                assert other.state_hash() == before and vm.state_hash() == before
                assert run(vm, count) == run(other, count)
                assert other.state_hash() == vm.state_hash()
                vm = other
