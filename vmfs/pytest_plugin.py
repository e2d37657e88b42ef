"""A pytest plugin: machines as fixtures, and what a failing test's machine was, in the report. docs/pytest.md.

vm          a bare machine (`vmfs.client.Vm`) of a mount that the session has to itself; the mark `vmfs` sets it up
make_vm     makes more of them, which end with the test
booted      a PC that was booted once a session: each test gets a fork of it, which runs on from there
vmfs_boot   what `booted` boots; a project's conftest.py overrides it
vmfs_mount  the directory of the mount
machine     a `vmfs.Machine`, in the process of the tests: no mount; the mark `machine` has its arguments
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmfs.client import MountFailed, Vm, private_mount
from vmfs.words.registers import REGISTERS

if TYPE_CHECKING:
    from vmfs import Machine

Make = Callable[..., Vm]
SHOWN = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16)),
         "rip", "rflags", "cs", "ss", "cr0", "cr2", "cr3", "cr4", "efer")  # fmt: skip
CONSOLE_LINES = 30


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmfs", "virtual machines as directories")
    group.addoption("--vmfs-mount", metavar="DIR", help="make machines on this mount (default: one for the session)")
    group.addoption("--vmfs-engine", metavar="ENGINE", help="what they run on: auto, kvm or emulator")
    group.addoption("--vmfs-keep", action="store_true", help="leave the machines of tests that fail, and their mount")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", 'vmfs(**settings): files of the machine that the fixture `vm` makes, as mem_size="16M", mode="long"'
    )
    config.addinivalue_line(
        "markers", "machine(**arguments): those of the vmfs.Machine that the fixture `machine` makes, as mode='real'"
    )


# ---- the mount


@dataclass
class _Session:
    """The mount of this process; `stay` makes it stay there at the end."""

    path: Path
    stay: Callable[[], None]
    keeps: bool


_SESSION = pytest.StashKey[_Session]()


@pytest.fixture(scope="session")
def vmfs_mount(pytestconfig: pytest.Config) -> Iterator[Path]:
    """The directory of a mount that this session (with xdist: each of its workers) has to itself. Skips, with the
    reason, where there can be none."""
    keeps = pytestconfig.getoption("--vmfs-keep")
    engine = pytestconfig.getoption("--vmfs-engine")
    given = pytestconfig.getoption("--vmfs-mount")
    if given:
        pytestconfig.stash[_SESSION] = _Session(Path(given).absolute(), lambda: None, keeps)
        yield Path(given).absolute()
        return
    stays: list[Callable[[], None]] = []
    try:
        with private_mount(["--engine", engine] if engine else [], staying=stays.append) as path:
            pytestconfig.stash[_SESSION] = _Session(path, stays[0], keeps)
            yield path
    except MountFailed as failure:
        pytest.skip(f"vmfs: {failure}")


# ---- machines of a test


@dataclass
class _Machines:
    """Those of one test. `failed`: the test has."""

    made: list[Vm] = field(default_factory=list)
    own: list[Machine] = field(default_factory=list)  # in this process
    failed: bool = False


_MACHINES = pytest.StashKey[_Machines]()


def _machines_of(item: pytest.Item) -> _Machines:
    return item.stash.setdefault(_MACHINES, _Machines())


@pytest.fixture
def make_vm(vmfs_mount: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    """`make_vm(mem_size="16M", mode="long")` makes a machine, with what is written into its files, for this test."""
    machines = _machines_of(request.node)

    def make(**settings: Any) -> Vm:
        return _added(machines, Vm.create(vmfs_mount / _name_for(request.node, len(machines.made)), **settings))

    yield make
    _end(machines, request.config)


@pytest.fixture
def vm(make_vm: Make, request: pytest.FixtureRequest) -> Vm:
    """A bare machine; with the settings that marks `vmfs` of the test, its class and its module have."""
    return make_vm(**_marked(request.node, "vmfs"))


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A `vmfs.Machine`, with the arguments that marks `machine` of the test, its class and its module have."""
    from vmfs import Machine  # for those who use it

    with Machine(**_marked(request.node, "machine")) as made:
        _machines_of(request.node).own.append(made)
        yield made


def _marked(item: pytest.Item, name: str) -> dict[str, Any]:
    """What the marks of that name have; the nearest one wins."""
    settings: dict[str, Any] = {}
    for mark in reversed(list(item.iter_markers(name))):
        if mark.args:
            raise pytest.UsageError(f"the mark {name} takes what it has by name, as {name}(mode='long')")
        settings.update(mark.kwargs)
    return settings


@pytest.fixture(scope="session")
def vmfs_boot() -> dict[str, Any]:
    """What the fixture `booted` boots. Override it in conftest.py, with the scope `session`, and return a dictionary:

    `ready`, the pattern that the console shows when it has booted; `timeout`, the seconds that this may take (60);
    `settings`, of files, as {"mem_size": "512M"}; all else are arguments of `Vm.boot`: kernel, initrd, cmdline, ...
    """
    raise pytest.UsageError("`booted` needs a fixture vmfs_boot in conftest.py that says what to boot: docs/pytest.md")


@pytest.fixture(scope="session")
def vmfs_template(vmfs_mount: Path, vmfs_boot: dict[str, Any]) -> Iterator[Vm]:
    """The machine that was booted once, paused, with the snapshot `booted`."""
    options = dict(vmfs_boot)
    ready, timeout = options.pop("ready"), options.pop("timeout", 60.0)
    with Vm.create(vmfs_mount / f"booted-{os.getpid()}", **options.pop("settings", {})) as template:
        try:
            template.boot(**options)
            try:
                template.console.expect(ready, timeout)
            except (EOFError, TimeoutError) as failure:
                pytest.fail(f"the machine for `booted` did not boot: {failure}\n{describe(template)}", pytrace=False)
            template.pause()
            template.snapshot("booted")
            yield template
        finally:
            template.remove()


@pytest.fixture
def booted(vmfs_template: Vm, vmfs_boot: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Vm]:
    """A PC that has booted what `vmfs_boot` says, and runs on from there: a fork, so no test sees what another did."""
    machines = _machines_of(request.node)
    fork = _added(machines, vmfs_template.fork(_name_for(request.node, len(machines.made)), "booted"))
    if symbols := vmfs_boot.get("symbols"):
        fork.load_symbols(symbols)  # those of what was forked stay there
    _ = fork.console
    fork.start()
    yield fork
    _end(machines, request.config)


def _added(machines: _Machines, vm: Vm) -> Vm:
    machines.made.append(vm)
    return vm


def _name_for(item: pytest.Item, number: int) -> str:
    """A name for a machine that says of which test it is: up to 64 characters of those that a name may have."""
    base = re.sub(r"[^A-Za-z0-9_-]+", "-", item.name).strip("-")[:40] or "test"
    return f"{base}-{os.getpid()}-{number}"


def _end(machines: _Machines, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    made, machines.made = machines.made, []
    if machines.failed and session.keeps:
        for vm in made:
            with suppress(OSError):
                vm.pause()
            vm.close()
        session.stay()
        return
    for vm in made:
        with suppress(FileNotFoundError):  # the test has removed it
            vm.remove()


# ---- reports


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    machines = item.stash.get(_MACHINES, None)
    if machines and report.failed and report.when != "teardown":
        machines.failed = True
        for number, own in enumerate(machines.own):
            report.sections.append((f"vmfs machine {number}", describe_own(own)))
        for vm in machines.made:
            report.sections.append((f"vmfs machine {os.path.basename(vm.path)}", describe(vm)))
            session = item.config.stash.get(_SESSION, None)
            if session and session.keeps:
                report.sections.append(("vmfs kept", f"{vm.path}\n`vmfs umount {session.path}` removes all"))
    return report


def describe(vm: Vm) -> str:
    """What a machine is now, as text: state, last exit, why it shut down, registers, what screen and console show."""
    parts = []
    for title, tell in (
        ("", lambda: f"state {vm.state}; last exit: {vm.read_text('exit') or 'none'}"),
        ("why", lambda: vm.why),
        ("registers", lambda: _registers(vm)),
        ("screen", lambda: vm.screen.rstrip()),
        ("console", lambda: _console_tail(vm)),
    ):
        with suppress(OSError, EOFError):  # what the machine does not have, or cannot say any more
            if text := tell():
                parts.append(f"{title}:\n{text}" if title else text)
    return "\n".join(parts) or "the machine is gone"


def describe_own(machine: Machine) -> str:
    """What a machine of this process is now, as text."""
    exit_ = machine.exit.line() if machine.exit else "none"
    return f"{machine!r}; last exit: {exit_}\nregisters:\n{_cells({name: getattr(machine, name) for name in SHOWN})}"


def _registers(vm: Vm) -> str:
    return _cells(vm.regs.read())


def _cells(values: Mapping[str, int]) -> str:
    cells = [f"{name:>6} {values[name]:0{-(-REGISTERS[name].bits // 4)}x}" for name in SHOWN if name in values]
    return "\n".join("  ".join(cells[at : at + 4]) for at in range(0, len(cells), 4))


def _console_tail(vm: Vm) -> str:
    text = vm.read("console.log", keep=False).decode(errors="replace").replace("\r\n", "\n")
    return "\n".join(text.splitlines()[-CONSOLE_LINES:])
