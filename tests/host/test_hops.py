"""What the server answers without asking a machine: its last answer said so. The machine stands still meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
from host.users import Child, pid_of
from mounting import Machine, failing

PROMPT = 10.0


@pytest.fixture
def vm(server) -> Iterator[Machine]:
    one = server.make().load("f4")
    yield one
    one.path.rmdir()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("name", ["state", "mode", "registers", "vm_run"])
def test_the_end_of_a_text_is_known(vm, name):
    pid = pid_of(vm)
    fd = os.open(vm / name, os.O_RDONLY)
    size = len(os.read(fd, 1 << 16))
    assert size
    with stopped(pid):
        for at in (size, size + 100):
            assert Child(0, lambda at=at: os.pread(fd, 4096, at)).result(PROMPT) == b""
    assert len(os.pread(fd, 1 << 16, 0)) >= 4  # again, from the beginning
    os.close(fd)


def test_the_end_of_half_a_text_is_not_known(vm):
    whole = vm.read("registers")
    fd = os.open(vm / "registers", os.O_RDONLY)
    assert os.read(fd, 10).decode() + os.read(fd, 1 << 16).decode() == whole
    assert os.read(fd, 10) == b""
    os.close(fd)


def test_a_file_that_was_understood_is_closed_at_once(vm):
    pid = pid_of(vm)
    fd = os.open(vm / "mode", os.O_WRONLY)
    os.write(fd, b"real\n")
    with stopped(pid):
        Child(0, lambda: os.close(fd)).result(PROMPT)
    os.close(fd)


def test_a_close_still_says_what_was_never_understood(vm):
    fd = os.open(vm / "registers", os.O_WRONLY)
    os.write(fd, b"rax")
    assert failing(os.close, fd) == 22
    assert "registers" in vm.read("error")
