"""Every test here runs on every engine of vmfs.engine.ENGINES; one that does not work on this host skips. On the
emulator they run a second time, with all code translated before it first runs: at its usual threshold the code of most
of them is interpreted."""

from __future__ import annotations

import pytest
from engine import asm
from engine.asm import ORIGIN, assemble
from engine.divergences import active
from engine.machine import machine_on
from engine.walked import WALKER

from vmfs.engine import ENGINES
from vmfs.machine.machine import Vm
from vmfs.words.errors import VmfsError
from vmfs.words.modes import set_mode
from vmfs.words.registers import write_registers

pytest.register_assert_rewrite("engine.case")


def engine_or_skip(name):
    row = next(row for row in ENGINES if row.name == name)
    try:
        engine = row.load()
    except VmfsError as error:
        pytest.skip(str(error))
    availability = engine.probe()
    if not availability.available:
        pytest.skip(f"{row.name}: {availability.reason}")
    return engine


@pytest.fixture(scope="session", params=[*(row.name for row in ENGINES), "translated"])
def engine(request):
    if request.param != "translated":
        yield engine_or_skip(request.param)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMFS_JIT_THRESHOLD", "0")
        yield engine_or_skip("emulator")


@pytest.fixture(params=[row.name for row in ENGINES])
def other(request):
    """One more engine, the same one too: pairs of them."""
    return engine_or_skip(request.param)


@pytest.fixture(scope="session")
def divergences(engine):
    """The names of the divergences that this engine has on this host."""
    return active(engine.name)


@pytest.fixture(scope="session")
def assembler():
    missing = asm.missing_tools()
    if missing:
        pytest.skip(f"no {' and '.join(missing)}: install binutils")
    return asm.assemble


@pytest.fixture
def vm(engine):
    with machine_on(engine) as machine:
        yield machine


@pytest.fixture
def emulator():
    return engine_or_skip("emulator")


@pytest.fixture
def machines():
    made: list[Vm] = []
    yield made
    for vm in made:
        vm.close()


@pytest.fixture
def walker(emulator, machines):
    def make(kind: str = "bare", cpus: int = 1, source: str = WALKER) -> Vm:
        vm = Vm(emulator, memory_size=4 << 20)
        machines.append(vm)
        if kind != "bare":
            vm.set_machine(kind)
            vm.set_time_source("instructions")
        vm.set_cpu_count(cpus)
        code = assemble(source, "long")
        vm.memory.write(ORIGIN, code.code)
        for cpu in vm.cpus:
            vm.change(lambda vcpu: set_mode(vcpu, vm.memory, 4 << 20, "long"), cpu=cpu.index)
            vm.change(
                lambda vcpu, at=cpu.index: write_registers(vcpu, {"rip": ORIGIN, "rbx": at << 20}), cpu=cpu.index
            )
        return vm

    return make
