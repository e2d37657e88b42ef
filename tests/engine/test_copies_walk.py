"""A machine is taken, run, gone back with, forked, saved and loaded, in any order: it is always what it was."""

from __future__ import annotations

import os
from contextlib import ExitStack

from engine.conftest import engine_or_skip
from engine.test_arrivals import arrival_of, come_in
from engine.test_copies import be
from engine.test_past import make as make  # noqa: PLC0414  # the fixture
from engine.test_past import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.machine import copies
from vmfs.machine.machine import Vm

ACTS = st.lists(
    st.tuples(st.sampled_from(["run", "take", "restore", "fork", "load", "write"]), st.integers(1, 20_000)),
    min_size=1,
    max_size=14,
)


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
            elif act in ("fork", "load"):
                before = vm.state_hash()
                other = Vm(vm.engine)
                made.callback(other.close)
                if act == "fork":
                    copy = copies.copy_of(vm, vm.past.take("", is_kept=False), 1)
                    be(other, [os.dup(fd) for fd in copy.memory])
                    kept = {}
                else:
                    vm.past.take(name)
                    come_in(other, arrival_of(vm, name))
                    kept = {name: before}
                assert other.state_hash() == before and vm.state_hash() == before
                assert run(vm, count) == run(other, count)
                assert other.state_hash() == vm.state_hash()
                vm = other
