"""Real mounts for tests that are clients of one: `mount` is a directory, `server` and `vm` know more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import Machine, Server, reason_against, serving

from vmfs.engine import ENGINES


@pytest.fixture(scope="session", params=ENGINES, ids=lambda engine: engine.name)
def server(request, tmp_path_factory) -> Iterator[Server]:
    """A mount that tests share, one for each engine: they make machines of their own."""
    reason = reason_against(request.param)
    if reason:
        pytest.skip(reason)
    with serving(tmp_path_factory, engine=request.param.name) as one:
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
