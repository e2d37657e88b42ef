"""The memory of host code: 64 MiB a machine, in parts that are dropped in turn, and given back by machines at rest."""

from __future__ import annotations

import re
import resource
import signal
import struct
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from vmfs.engine.emulator.engine import EmulatorEngine  # noqa: E402
from vmfs.memory.ram import Memory  # noqa: E402
from vmfs.words.exits import Hlt, Interrupted  # noqa: E402
from vmfs.words.modes import set_mode  # noqa: E402
from vmfs.words.registers import read_register, write_registers  # noqa: E402

MIB = 1 << 20
BOUND = 64 * MIB
RAM = 8 * MIB
DATA, LOOP, CODE = 0x8000, 0x9000, 0x100000
ADDS = 1300  # instructions that each page has, of memory: some 200 bytes of host code each
# ADD [RBP+8], EAX again and again; ADD RCX, 4096; JMP RCX
PAGE = b"\x01\x45\x08" * ADDS + b"\x48\x81\xc1\0\x10\0\0\xff\xe1"
SLEEP = b"\xfb\xf4\xeb\xfd"  # STI; HLT, again and again
REGION = 400  # instructions that one has, at the most
SOON = 60


@pytest.fixture
def jit(monkeypatch):
    monkeypatch.delenv("VMFS_NO_JIT", raising=False)
    monkeypatch.delenv("VMFS_JIT_SEED", raising=False)
    monkeypatch.setenv("VMFS_JIT_THRESHOLD", "0")
    return monkeypatch


class Guest:
    """Its code is pages that are as one, each of which goes on to the next; the last one halts."""

    def __init__(self, cpus: int = 1, *, chip: bool = False, pages: int = 340) -> None:
        self.memory = Memory(RAM)
        self.machine = EmulatorEngine().create_machine()
        self.machine.map_memory(0, 0, self.memory.fd, 0, RAM)
        if chip:
            self.machine.create_irqchip()
        self.cpus = [self.machine.create_vcpu(index) for index in range(cpus)]
        self.pages = pages
        for number in range(pages):
            self.memory.write(CODE + number * 4096, PAGE)
        for cpu in self.cpus:
            set_mode(cpu, self.memory, RAM, "long")

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.machine.close()
        self.memory.close()

    def end_at(self, page: int) -> int:
        """The page before is the last one. Where HLT is now, in the place of the first byte of ADD."""
        at = CODE + page * 4096
        self.memory.write(at, b"\xf4")
        return at

    def aim(self, cpu, first: int) -> None:
        write_registers(
            cpu, {"rip": CODE + first * 4096, "rcx": CODE + first * 4096, "rax": 1, "rbp": DATA + cpu.index * 64}
        )

    def sum(self, cpu) -> int:
        return struct.unpack("<I", self.memory.read(DATA + cpu.index * 64 + 8, 4))[0]

    def passes(self, cpu, first: int, count: int) -> None:
        """Execute so many pages."""
        before = self.sum(cpu)
        self.aim(cpu, first)
        end = self.end_at(first + count)
        assert isinstance(cpu.run(), Hlt)
        self.memory.write(end, b"\x01")
        assert self.sum(cpu) == (before + count * ADDS) % (1 << 32)


def mappings() -> list[int]:
    """Of each mapping of this process by which host code is written, its resident bytes. No other one is as large."""
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(r"^(\w+)-(\w+) rw-s .*\n(?:\w+:.*\n)*?Rss:\s+(\d+) kB", text, re.MULTILINE)
    return [int(rss) * 1024 for start, end, rss in found if int(end, 16) - int(start, 16) == BOUND + 4096]


def held() -> int:
    return sum(mappings())


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.01)


def code_bytes(cpu) -> int:
    return cpu.counters()["code_bytes"]


def test_parts_are_dropped_in_turn(jit):
    """More code than there is room for: the oldest goes, the youngest stays, and what it computes is right."""
    with Guest() as guest:
        (cpu,) = guest.cpus
        most = 0
        for first in range(0, 320, 20):
            guest.passes(cpu, first, 20)
            most = max(most, code_bytes(cpu))
        assert 0.9 * BOUND < most <= BOUND
        assert held() <= BOUND + 4096
        counters = cpu.counters()
        assert counters["regions_killed"] > 0
        guest.passes(cpu, 300, 19)  # it was last: nothing is translated but what the HLT took along
        again = cpu.counters()
        assert again["regions"] - counters["regions"] <= 50
        assert again["instructions_translated"] - counters["instructions_translated"] > 0.9 * 19 * ADDS
        guest.passes(cpu, 0, 20)  # it was first, and is translated again: by now each region has several blocks
        assert cpu.counters()["regions"] - again["regions"] >= 20 * ADDS // REGION
        assert code_bytes(cpu) <= BOUND


def test_a_cpu_that_comes_late_gets_its_share(jit):
    """In threads of their own, CPUs drop what is more than their share when they come to look."""
    with Guest(2) as guest:
        first, second = guest.cpus
        guest.passes(first, 0, 320)
        assert code_bytes(first) > 0.9 * BOUND
        for at in range(0, 320, 10):
            guest.passes(second, at, 10)
            guest.passes(first, 300, 1)
        assert BOUND * 0.4 < code_bytes(second) <= BOUND / 2
        assert code_bytes(first) + code_bytes(second) <= BOUND


def test_cpus_in_turn_share_it(jit):
    with Guest(2) as guest:
        first, second = guest.cpus
        guest.passes(first, 0, 320)
        (runner,) = guest.machine.runners(guest.cpus)
        guest.memory.write(LOOP, b"\xeb\xfe")  # JMP to itself
        write_registers(first, {"rip": LOOP})
        guest.aim(second, 0)
        guest.end_at(320)
        exit_ = runner.run()
        assert isinstance(exit_, Hlt)
        assert exit_.cpu == 1
        assert guest.sum(second) == 320 * ADDS
        assert BOUND * 0.4 < code_bytes(second) <= BOUND / 2
        assert code_bytes(first) + code_bytes(second) <= BOUND


def test_it_is_mapped_when_code_is_first_kept(jit):
    with Guest() as guest:
        (cpu,) = guest.cpus
        jit.setenv("VMFS_JIT_THRESHOLD", "1000")
        with Guest(pages=2) as brief:
            before = len(mappings())
            brief.passes(brief.cpus[0], 0, 1)
            assert len(mappings()) == before
        before = len(mappings())
        guest.passes(cpu, 0, 10)
        assert len(mappings()) == before + 1


def test_a_limit_of_the_length_of_files_is_none_of_code(jit):
    """A machine's process has its maker's (RLIMIT_FSIZE) by the time that it translates."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Guest() as guest:
        (cpu,) = guest.cpus
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (RAM, hard))
            guest.passes(cpu, 0, 10)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert cpu.counters()["instructions_translated"] > 0


def test_a_machine_at_rest_gives_all_back(jit):
    with Guest() as guest:
        (cpu,) = guest.cpus
        before = held()
        guest.passes(cpu, 0, 100)
        assert held() - before > 10 * MIB
        guest.machine.rest()
        assert code_bytes(cpu) == 0
        assert held() - before <= 4096
        guest.passes(cpu, 0, 100)
        assert code_bytes(cpu) > 10 * MIB


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_cpu_that_sleeps_gives_its_code_back(jit, cpus):
    """Nothing is due, so nothing wakes it; with several, one sleeps for all."""
    jit.setenv("VMFS_JIT_IDLE", "300")
    with Guest(cpus, chip=True, pages=60) as guest:
        cpu = guest.cpus[0]
        guest.machine.set_time("host")
        guest.memory.write(CODE + 60 * 4096, SLEEP)
        guest.aim(cpu, 0)
        runner = guest.machine.in_turn(guest.cpus)
        came_to = []
        run = threading.Thread(target=lambda: came_to.append(runner.run()))
        run.start()
        try:
            wait_until(lambda: guest.sum(cpu) == 60 * ADDS, "the code has run")
            wait_until(lambda: code_bytes(cpu) == 0, "the code is given back")
            assert run.is_alive()
            assert held() <= 4096
        finally:
            runner.kick()
            run.join(SOON)
        assert isinstance(came_to[0], Interrupted)
        assert int(read_register(cpu, "rip"), 0) - (CODE + 60 * 4096) in (2, 3, 4)
