"""Every test here runs on each engine that works on this host; what an engine has not is said by its exception."""

from __future__ import annotations

import pytest
from engine.asm import assemble as assemble_with_binutils
from engine.asm import missing_tools

from vmfs import Machine
from vmfs.engine import ENGINES
from vmfs.words.errors import VmfsError

CODE, DATA = 0x1000, 0x8000


@pytest.fixture(scope="session")
def assemble():
    if missing := missing_tools():
        pytest.skip(f"no {' and '.join(missing)}: install binutils")
    return lambda source, mode="long": assemble_with_binutils(source, mode).code


@pytest.fixture
def make(assemble):
    """A machine with code at CODE and a page at DATA. It is closed after the test."""
    made = []

    def one(source="", mode="long", engine="emulator", **options):
        machine = Machine(mode, {CODE: 0x4000, DATA: 0x2000}, engine=engine, **options)
        made.append(machine)
        if source:
            machine.mem[CODE:] = assemble(source, mode)
        machine.rip, machine.rsp = CODE, DATA + 0x2000
        return machine

    yield one
    for machine in made:
        machine.close()


@pytest.fixture(params=[row.name for row in ENGINES])
def engine(request):
    row = next(row for row in ENGINES if row.name == request.param)
    try:
        availability = row.load().probe()
    except VmfsError as error:
        pytest.skip(str(error))
    if not availability.available:
        pytest.skip(f"{row.name}: {availability.reason}")
    return request.param
