"""A mount of root's that everybody may use."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import Server, reason_against, serving

from vmfs.engine import ENGINES


def open_up(directory: Path) -> None:
    """Everybody may come to it: pytest's folders are their maker's alone. No folder loses a right by that."""
    for each in (directory, *directory.parents[:-1]):
        mode = stat.S_IMODE(each.stat().st_mode)
        if mode & 0o011 != 0o011:
            each.chmod(mode | 0o011)


def shared(server: Server) -> Server:
    open_up(server.path.parent)
    return server


@pytest.fixture(scope="session")
def for_everybody() -> dict[str, object]:
    """The settings of a mount that root makes for all."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for row in ENGINES[::-1]:
        if row.name == "emulator" and (reason := reason_against(row)):
            pytest.skip(reason)
    return {"allow_other": True, "engine": "emulator"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, for_everybody) -> Iterator[Server]:
    with serving(tmp_path_factory, **for_everybody) as one:
        yield shared(one)


@pytest.fixture
def own_server(tmp_path_factory, for_everybody) -> Iterator[Callable[..., Server]]:
    """For tests that end the server, or need settings."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: shared(
            stack.enter_context(serving(tmp_path_factory, **{**for_everybody, **settings}))
        )


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """Which everybody may come to."""
    path = tmp_path_factory.mktemp("host")
    path.chmod(0o755)
    open_up(path)
    return path
