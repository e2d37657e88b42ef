"""Two machines that are born alike, follow the instructions and are typed to alike do the same, to the instruction: a
Debian from its first instruction to its power-off, with a disk and a keyboard, compared by the hash of all state.

A few points in `make test`; `make repeat` compares every 10 million instructions.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import random

import pytest
from pc.kernels import needs_kernels
from pc.repeated import SECONDS, life

pytestmark = needs_kernels

STEP = int(os.environ.get("VMFS_REPEAT_STEP", "100_000_000"))  # instructions from one hash to the next


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("cpus", [1, 4])
def test_two_lives_are_the_same(tmp_path, cpus):
    image = tmp_path / "disk"
    image.write_bytes(random.Random(1).randbytes(4 << 20))
    # Processes of their own, begun anew: nothing of one is the other's, its hashes of str neither.
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        first, second = (each.result() for each in [pool.submit(life, image, cpus, STEP) for _ in range(2)])
    assert first[1] == second[1]
    assert first[0] == second[0]
    said = first[1]
    assert b"typed: an answer" in said and b"Thu Jan  1 00:0" in said and f"\r\n{cpus}\r\n".encode() in said, said
    assert len(first[0]) > 1_000_000_000 // STEP
