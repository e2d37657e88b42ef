"""A little of `make past`: machines that are disturbed all their lives are what those are that never were."""

from __future__ import annotations

import pytest
from engine import asm
from engine.conftest import engine_or_skip
from pc.undisturbed import live


@asm.needs_assembler
@pytest.mark.parametrize("cpus", [1, 3])
def test_a_loop_that_changes_its_own_code(cpus):
    engine_or_skip("emulator")
    sides = live("walker", cpus, seed=cpus, share=0.7, most=4_000_000, slice_=100_000)
    assert len(sides.compared) == 40 and set(sides.done) == {"restore", "fork", "load", "move", "goto"}
