"""VMFS_JIT_DUMP: the file is as Linux tools/perf/Documentation/jitdump-specification.txt has it, and perf reads it."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

HEADER, RECORD, LOAD = struct.Struct("<6I2Q"), struct.Struct("<IIQ"), struct.Struct("<II4Q")
CODE_LOAD = 0
# A loop, hot enough for a region.
GUEST = """
import os, struct, sys
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.memory.ram import Memory
from vmfs.words.modes import set_mode
from vmfs.words.registers import write_registers
engine = EmulatorEngine()
engine.prepare_process()
memory = Memory(1 << 20)
machine = engine.create_machine()
machine.map_memory(0, 0, memory.fd, 0, 1 << 20)
cpu = machine.create_vcpu(0)
set_mode(cpu, memory, 1 << 20, "long")
memory.write(0x1000, bytes.fromhex("48ffc9 4801c8 75f8 f4"))  # dec rcx; add rax, rcx; jnz; hlt
write_registers(cpu, {"rip": 0x1000, "rcx": int(sys.argv[1])})
print(os.getpid(), cpu.run().REASON, cpu.counters()["regions"])
"""


def run_guest(folder: Path, times: int, *before: str) -> tuple[int, int]:
    """Its process and how many regions there were."""
    command = [*before, sys.executable, "-c", GUEST, str(times)]
    done = subprocess.run(
        command, env={**os.environ, "VMFS_JIT_DUMP": str(folder)}, capture_output=True, text=True, check=True
    )
    pid, reason, regions = done.stdout.split()
    assert reason == "hlt"
    return int(pid), int(regions)


def loads(data: bytes, pid: int) -> list[tuple[int, bytes, bytes]]:
    """Address, name and code of each record; all of the format is asserted."""
    magic, version, size, machine, reserved, whose, began, flags = HEADER.unpack_from(data)
    assert (magic, version, size, machine, reserved, whose, flags) == (0x4A695444, 1, 40, 62, 0, pid, 0)
    found, at, times = [], size, [began]
    while at < len(data):
        kind, size, when = RECORD.unpack_from(data, at)
        assert kind == CODE_LOAD
        times.append(when)
        whose, thread, address, code, code_size, index = LOAD.unpack_from(data, at + RECORD.size)
        assert (whose, code, index) == (pid, address, len(found))
        assert thread >= pid
        name, _, code = data[at + RECORD.size + LOAD.size : at + size].partition(b"\0")
        assert len(code) == code_size > 0
        found.append((address, name, code))
        at += size
    assert at == len(data)
    assert times == sorted(times)
    return found


def test_format(tmp_path):
    pid, regions = run_guest(tmp_path, 100_000)
    (file,) = tmp_path.glob("vmfs-*/jit-*.dump")
    assert file.name == f"jit-{pid}.dump"
    assert file.stat().st_mode & 0o777 == 0o600
    found = loads(file.read_bytes(), pid)
    assert len(found) == regions > 0
    name, code = found[0][1], b"".join(code for _, _, code in found)
    assert name in (b"guest_1000", b"guest_1003", b"guest_1006")  # a stop in the loop makes a region that begins there
    assert b"\x48\xff\xc9" in code and b"\x48\x01\xc8" in code  # the loop's own instructions


def test_without_a_folder(tmp_path):
    """A word on why there is none, and all goes on."""
    done = subprocess.run(
        [sys.executable, "-c", GUEST, "1000"],
        env={**os.environ, "VMFS_JIT_DUMP": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == f"VMFS_JIT_DUMP={tmp_path / 'none'}: No such file or directory"


@pytest.mark.skipif(not shutil.which("perf"), reason="perf is missing: apt-get install linux-perf")
def test_perf_names_it(tmp_path):
    data, injected = tmp_path / "perf.data", tmp_path / "injected.data"
    record = ("perf", "record", "-q", "-k", "1", "-e", "cpu-clock", "-o", str(data))
    try:
        run_guest(tmp_path, 300_000_000, *record)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"perf may not record here: {error.stderr[-200:]}")
    environment = {**os.environ, "HOME": str(tmp_path), "JITDUMPDIR": str(tmp_path)}
    subprocess.run(["perf", "inject", "-j", "-i", data, "-o", injected], check=True, env=environment, cwd=tmp_path)
    report = subprocess.run(
        ["perf", "report", "-i", injected, "--stdio", "--sort", "symbol"],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    ).stdout
    (line,) = [line for line in report.splitlines() if "guest_1000" in line]
    assert float(line.split("%")[0]) > 20, report
