"""Host code does what the interpreter does, from the first instruction of stock kernels and firmware to a mark of
theirs: translated at once, in regions that are cut at random, and as it is by default. Compared are the hash of all
state after each STEP instructions, what was sent, and the screen.

memtest86+ in `make test`; `make repeat` has all of them, compared every 10 million instructions.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os

import pytest
from pc.both_ways import GUESTS, SECONDS, Life, live
from pc.kernels import needs_kernels

pytestmark = needs_kernels

STEP = int(os.environ.get("VMFS_REPEAT_STEP", "20_000_000"))
NAMES = list(GUESTS) if "VMFS_REPEAT_STEP" in os.environ else ["memtest86+"]
INTERPRETED = {"VMFS_NO_JIT": "1"}
AT_ONCE = {"VMFS_JIT_THRESHOLD": "0"}
WAYS = (AT_ONCE, {**AT_ONCE, "VMFS_JIT_SEED": "3"}, {})


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_and_firmware(name):
    for each in GUESTS[name].needs:
        if not each.exists():
            pytest.skip(f"{each} is not there: scripts/setup.sh, scripts/fetch_bench.sh")
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        began = [pool.submit(live, name, way, STEP) for way in (INTERPRETED, *WAYS)]
        interpreted, *others = (each.result() for each in began)
    assert not interpreted.translated
    for way, other in zip(WAYS, others, strict=True):
        assert first_difference(interpreted, other) is None, way
        assert (other.sent, other.screen) == (interpreted.sent, interpreted.screen), way
        assert other.translated > 0 and other.regions > 50, way
    print(f"{name}: {interpreted.hashes[-1][0] / 1e6:.0f} million instructions,", *(each.translated for each in others))


def first_difference(one: Life, other: Life) -> tuple[object, object] | None:
    """Of the hashes, with where they were taken."""
    if one.hashes == other.hashes:
        return None
    pairs = zip(one.hashes, other.hashes, strict=False)
    return next(((a, b) for a, b in pairs if a != b), (len(one.hashes), len(other.hashes)))
