"""Stops of translated code are those of the interpreter: the same program with the same points, in the same runs.

Programs are the loops of test_translator.py; points have conditions, counts and `once`; runs have bounds. The fuzzer's
--ways (fuzz/ways.c) does so with millions, and with traces, below the points of a machine.
"""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator.test_translator import CODE, COUNTER, DATA, INTERPRETED, STACK, TIMES, WAYS, go_by, program  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from vmfs.engine.emulator.engine import EmulatorEngine  # noqa: E402
from vmfs.machine.files.commands import parse_commands  # noqa: E402
from vmfs.machine.machine import Vm  # noqa: E402
from vmfs.machine.runloop import Bound  # noqa: E402
from vmfs.words.registers import write_registers  # noqa: E402

SECONDS = 20
RUNS = 25
CONDITIONS = ("rax&1", "rcx>rdx", f"u8({DATA:#x})!=6", f"u32({COUNTER:#x})<30", "rflags&0x41", "(r8^r9)&3")

options = st.one_of(
    st.just(""),
    st.sampled_from(CONDITIONS).map(lambda condition: f" if {condition}"),
    st.integers(1, 9).map(lambda n: f" ignore {n}"),
    st.just(" once"),
)
breaks = st.integers(0, 120).map(lambda offset: f"break {CODE + offset:#x}")
watches = st.builds(
    lambda physical, at, size, kind: f"watch {physical}{at:#x} {size} {kind}",
    st.sampled_from(["", "phys:"]),
    st.one_of(st.integers(DATA - 128, DATA + 128), st.integers(STACK - 64, STACK - 1), st.just(COUNTER)),
    st.sampled_from([1, 2, 4, 8, 64]),
    st.sampled_from(["r", "w", "rw"]),
)
catches = st.sampled_from(["catch 0", "catch 6", "catch 0-31"])
points = st.lists(
    st.tuples(st.one_of(breaks, breaks, watches, catches), options),
    min_size=1,
    max_size=5,
    unique_by=lambda point: point[0],
).map(lambda lines: "\n".join(map("".join, lines)))
bounds = st.lists(
    st.one_of(
        st.builds(dict),
        st.integers(1, 400).map(lambda n: {"instructions": n}),
        st.integers(1, 20).map(lambda n: {"steps": n}),
        st.integers(0, 120).map(lambda offset: {"until": CODE + offset, "instructions": 5000}),
    ),
    min_size=1,
    max_size=RUNS,
)


def stops(way, code, state, text, runs):
    """After each run: how it ended, the registers, the points with their counts, and what was executed."""
    rng = random.Random(state)
    with pytest.MonkeyPatch.context() as patch:
        go_by(way, patch)
        vm = Vm(EmulatorEngine(), memory_size=1 << 20)
        try:
            vm.set_mode("long")
            vm.memory.write(CODE, code)
            vm.memory.write(DATA - 256, rng.randbytes(768))
            vm.memory.write(COUNTER, TIMES.to_bytes(4, "little"))
            names = "rax rcx rdx rbx rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
            values = {name: rng.getrandbits(rng.choice((8, 32, 64))) for name in names}
            features = {"cr4": 0x60 | 1 << 9 | 1 << 18 | 1 << 5, "xcr0": 7, "fs.base": 64, "gs.base": 128}
            vm.change(
                lambda cpu: write_registers(cpu, {**values, **features, "rip": CODE, "rsp": STACK, "rbp": DATA})
            )
            vm.set_points(parse_commands("debug", text, {}.get)).result(SECONDS)
            found = []
            for bound in runs:
                ended = vm.start(Bound(**bound)).result(SECONDS).line()
                state = vm.at_boundary(lambda cpu: (cpu.get_state("regs"), cpu.get_state("xsave"))).result(SECONDS)
                found.append((ended, state, vm.points_text(), vm.counters()["instructions"]))
                if ended.startswith(("hlt", "shutdown")):
                    break
            return found, bytes(vm.memory.read(DATA - 256, 768)), vm.counters()["regions"]
        finally:
            vm.close()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), text=points, runs=bounds)
def test_stops(seed, text, runs):
    code = program(random.Random(seed), True, changes_itself=seed % 5 == 0)
    expected = stops(INTERPRETED, code, seed, text, runs)
    assert expected[-1] == 0
    for way in WAYS:
        found = stops(way, code, seed, text, runs)
        assert found[:-1] == expected[:-1], f"{way}: {code.hex()}"


def test_points_leave_other_code_translated():
    """A loop with a breakpoint elsewhere, and one in it that is never true."""
    code = bytes.fromhex("ffc0 ff0c25") + COUNTER.to_bytes(4, "little") + bytes.fromhex("75f5 f4")
    for text in ("break 0x2000", "watch 0x9000 8 rw", f"break {CODE + 2:#x} if rax==1", "catch 0-31"):
        found, _, regions = stops({"VMFS_JIT_THRESHOLD": "0"}, code, 1, text, [{}])
        assert found[-1][0].startswith("hlt"), text
        assert regions, text
