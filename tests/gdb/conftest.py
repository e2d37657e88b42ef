"""A stub on a machine of its own without a mount, and real mounts for real debuggers."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from gdb.guest import FIRMWARE, FIRMWARE_AT, KERNEL, KERNEL_AT, KERNEL_LOADED
from gdb.stub_client import Surroundings, connected
from mounting import Machine, Server, reason_against

from vmfs.engine import ENGINES, by_name
from vmfs.machine.gdb.server import Gdb
from vmfs.machine.machine import Vm


@pytest.fixture
def vm() -> Iterator[Vm]:
    """On the emulator, in real mode at 0."""
    one = Vm(by_name("emulator"), memory_size=1 << 20)
    one.set_mode("real")
    yield one
    one.close()


@pytest.fixture
def on_stub(vm) -> Callable[..., None]:
    """Runs `test(client, surroundings)` with a session on `vm`; at its end nothing was logged."""

    def run(test: Callable[..., Any]) -> None:
        async def main() -> None:
            surroundings = Surroundings(vm)
            with trio.fail_after(60):
                async with connected(Gdb(surroundings)) as client:
                    await test(client, surroundings)

        trio.run(main)

    return run


@pytest.fixture(autouse=True)
def no_errors_logged(caplog):
    yield
    assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text


# ---- real mounts


@pytest.fixture(scope="session", params=ENGINES, ids=lambda engine: engine.name)
def server(request, tmp_path_factory) -> Iterator[Server]:
    reason = reason_against(request.param)
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("mount") / "m"
    directory.mkdir()
    one = Server(directory, engine=request.param.name)
    try:
        yield one
    finally:
        log = one.end()
    assert "Traceback" not in log, log


@pytest.fixture
def machine(server) -> Iterator[Machine]:
    one = server.make()
    yield one
    with contextlib.suppress(FileNotFoundError):
        one.path.rmdir()


def needed(tool: str) -> str:
    """Its path; skips the test where it is not installed."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


def built(source: str, origin: int, folder: Path) -> tuple[Path, bytes]:
    """An ELF file with symbols and lines of an assembler source, linked for `origin`, and its flat bytes."""
    for tool in ("as", "ld", "objcopy"):
        needed(tool)
    text, unlinked, linked, flat = (folder / name for name in ("code.s", "code.o", "code.elf", "code.bin"))
    text.write_text(source)
    subprocess.run(["as", "--64", "-g", "-o", unlinked, text], check=True)
    subprocess.run(
        ["ld", "-N", "--no-warn-rwx-segments", f"-Ttext={origin:#x}", "-o", linked, unlinked], check=True
    )
    subprocess.run(["objcopy", "-O", "binary", linked, flat], check=True)
    return linked, flat.read_bytes()


@pytest.fixture(scope="session")
def guest(tmp_path_factory):
    """ELF files of the firmware and the kernel, and their bytes."""
    folders = [tmp_path_factory.mktemp(name) for name in ("firmware", "kernel")]
    return built(FIRMWARE, FIRMWARE_AT, folders[0]) + built(KERNEL, KERNEL_AT, folders[1])


@pytest.fixture
def booting(machine, guest):
    """A machine with the firmware, at its reset vector, and the kernel in place."""
    _, firmware, _, kernel = guest
    machine.write("mem_size", "16M\n")
    (machine / "bios").write_bytes(firmware)
    fd = os.open(machine / "mem", os.O_RDWR)
    os.pwrite(fd, kernel, KERNEL_LOADED)
    os.close(fd)
    return machine


@pytest.fixture
def in_kernel(booting):
    """It has come to the kernel."""
    booting.write("vm_run", f"until {KERNEL_AT:#x}\n")
    assert "cause=breakpoint" in booting.read("exit")
    return booting
