"""The two sides of the comparisons of instructions: the host CPU, whose memory is at fixed addresses and so
mapped once a process, and the core."""

import pytest


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    from emulator import native

    return native.Host(native.build(tmp_path_factory.mktemp("native")))


@pytest.fixture(scope="module")
def core():
    from emulator import native

    return native.Core()
