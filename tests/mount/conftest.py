"""Real mounts for tests that are clients of one: `mount` is a directory, `server` and `vm` know more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounting import Machine, Server, reason_against, serving

from vmfs.engine import ENGINES, Row


@dataclass(frozen=True)
class Way:
    """How a mount serves: an engine, and hot files by the lane or by Python."""

    engine: Row
    lane: bool = True

    def __str__(self) -> str:
        return self.engine.name if self.lane else f"{self.engine.name}-no-lane"


WAYS = [Way(engine) for engine in ENGINES]
# The suites of what the lane answers run without it, too.
WITHOUT_LANE = {"test_files", "test_running", "test_clients"}
NO_LANE = [Way(engine, lane=False) for engine in ENGINES if engine.name == "emulator"]


def pytest_generate_tests(metafunc) -> None:
    if "server" in metafunc.fixturenames and "server" not in vars(metafunc.module):  # which has a fixture of its own
        more = NO_LANE if metafunc.module.__name__.rpartition(".")[2] in WITHOUT_LANE else []
        metafunc.parametrize("server", WAYS + more, ids=str, indirect=True, scope="session")


@pytest.fixture(scope="session")
def server(request, tmp_path_factory) -> Iterator[Server]:
    """A mount that tests share, one for each of the ways: they make machines of their own."""
    way = request.param
    reason = reason_against(way.engine)
    if reason:
        pytest.skip(reason)
    environment = {} if way.lane else {"VMFS_NO_LANE": "1"}
    with serving(tmp_path_factory, engine=way.engine.name, environment=environment) as one:
        yield one


@pytest.fixture(scope="session")
def mount(server) -> Path:
    """The directory of a mount, one for each engine."""
    return server.path


@pytest.fixture(scope="session")
def any_engine() -> None:
    reasons = [reason_against(engine) for engine in ENGINES]
    if all(reasons):
        pytest.skip("; ".join(map(str, reasons)))


@pytest.fixture(scope="session", params=["passthrough", "page-cache"])
def either_server(request, tmp_path_factory, any_engine) -> Iterator[Server]:
    """A mount for each way to serve `mem`."""
    environment = {} if request.param == "passthrough" else {"VMFS_NO_PASSTHROUGH": "1"}
    with serving(tmp_path_factory, environment=environment) as one:
        probe = one.make()
        way = dict(line.split() for line in probe.read("stat").splitlines())["memory_served_by"]
        probe.path.rmdir()
        if way != request.param:
            pytest.skip(f"this kernel, or this user's rights, give {way}")
        yield one


@pytest.fixture
def own_server(tmp_path_factory, any_engine) -> Iterator[Callable[..., Server]]:
    """A function that mounts with some settings, for tests that end the server or need limits."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(tmp_path_factory, **settings))


def _machine(server: Server) -> Iterator[Machine]:
    one = server.make()
    yield one
    with contextlib.suppress(FileNotFoundError):
        one.path.rmdir()


@pytest.fixture
def vm(server) -> Iterator[Machine]:
    yield from _machine(server)


@pytest.fixture
def either_vm(either_server) -> Iterator[Machine]:
    yield from _machine(either_server)
