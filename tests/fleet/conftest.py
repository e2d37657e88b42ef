"""A cluster of two workers on this host, which the tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import wait_until

distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'vmfs[fleet]'")

from vmfs import Machine  # noqa: E402
from vmfs.fleet import Fleet, local_cluster  # noqa: E402
from vmfs.fleet.fleet import Template  # noqa: E402

COUNT = bytes.fromhex("48ffc0 48ffc9 75f8 f4")  # l: inc rax; dec rcx; jne l; hlt
LINGER = 1.0


@pytest.fixture(scope="session")
def cluster() -> Iterator[distributed.LocalCluster]:
    with local_cluster(n_workers=2, threads_per_worker=1, memory_limit="2GiB", host="127.0.0.1") as found:
        yield found


@pytest.fixture(scope="session")
def client(cluster) -> Iterator[distributed.Client]:
    with distributed.Client(cluster) as found:
        yield found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fleet") / "store"


@pytest.fixture(scope="module")
def fleet(client, root) -> Iterator[Fleet]:
    with Fleet(client, linger=LINGER, root=str(root)) as found:
        yield found
    wait_until(lambda: not root.exists(), "nothing of it is left")


@pytest.fixture(scope="module")
def counting(fleet) -> Template:
    with Machine(memory={0x1000: COUNT}) as machine:
        machine.rip = 0x1000
        return fleet.template(machine)


def count(machine, number):
    """rax counts to what rcx is."""
    machine.rcx = number
    machine.run()
    return machine.rax


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
