"""The speaker's tone on every engine: of what a guest has written to the timer and to port 61."""

from __future__ import annotations

import pytest
from engine.test_pc import SECONDS, load, pc, run  # noqa: F401

from vmfs.devices.speaker import tone

SAYS = "mov al, 0xb6; out 0x43, al; mov al, 0x98; out 0x42, al; mov al, 0x0a; out 0x42, al"


@pytest.mark.parametrize("port_61, hertz", [(3, 439.96), (2, 0), (1, 0)])
def test_a_tone(pc, assembler, port_61, hertz):  # noqa: F811
    load(pc, assembler(f"{SAYS}; in al, 0x61; and al, 0xfc; or al, {port_61}; out 0x61, al; out 0xf4, al", "real"))
    run(pc)
    assert tone(pc.get_machine_state("pit").result(SECONDS)) == pytest.approx(hertz, abs=0.01)
