"""The cost of a run: mkdir to the first exit, and port exits against raw KVM ioctls."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path

from bench.harness import Result, mounted
from vmfs.engine import by_name
from vmfs.engine.base import SIZES
from vmfs.engine.kvm import abi
from vmfs.engine.kvm.abi import Ioctl
from vmfs.memory.ram import DEFAULT_SIZE, Memory
from vmfs.words import layouts
from vmfs.words.exits import Hlt
from vmfs.words.modes import RIP, set_mode
from vmfs.words.registers import write_registers

# again: out 0x80, al; jmp again
OUT_LOOP = b"\xe6\x80\xeb\xfc"
HLT = b"\xf4"
AT = 0x1000


def first_exit(mount: Path, number: int) -> float:
    """Milliseconds from before mkdir until a read of `vm_run` has the line of a hlt, by system calls alone."""
    vm = os.fspath(mount / f"first{number}")
    began = time.perf_counter()
    os.mkdir(vm)
    write(f"{vm}/mode", b"real")
    write(f"{vm}/mem", HLT, AT)
    write(f"{vm}/reg/rip", b"%d" % AT)
    fd = os.open(f"{vm}/vm_run", os.O_RDONLY)
    line = os.read(fd, 4096)
    took = (time.perf_counter() - began) * 1e3
    assert line.startswith(b"hlt "), line
    os.close(fd)
    os.rmdir(vm)
    return took


def write(path: str, data: bytes, offset: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, offset)
    os.close(fd)


def raw_first_exit() -> float:
    """Milliseconds of the same by KVM's ioctls alone: as much RAM, the host's CPUID, real mode, a hlt."""
    began = time.perf_counter()
    device = os.open("/dev/kvm", os.O_RDWR)
    vm = fcntl.ioctl(device, int(Ioctl.KVM_CREATE_VM), 0)
    ram = mmap.mmap(-1, DEFAULT_SIZE)
    ram[AT] = HLT[0]
    address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    region = abi.MEMORY_REGION.pack(0, abi.KVM_MEM_LOG_DIRTY_PAGES, 0, DEFAULT_SIZE, address)
    fcntl.ioctl(vm, int(Ioctl.KVM_SET_USER_MEMORY_REGION), region)
    cpu = fcntl.ioctl(vm, int(Ioctl.KVM_CREATE_VCPU), 0)
    cpuid = bytearray(layouts.LIST_HEAD.size + abi.CPUID_MAX_ENTRIES * layouts.CPUID_ENTRY.size)
    layouts.LIST_HEAD.pack_into(cpuid, 0, abi.CPUID_MAX_ENTRIES, 0)
    fcntl.ioctl(device, int(Ioctl.KVM_GET_SUPPORTED_CPUID), cpuid)
    fcntl.ioctl(cpu, int(Ioctl.KVM_SET_CPUID2), cpuid)
    page = mmap.mmap(cpu, fcntl.ioctl(device, int(Ioctl.KVM_GET_VCPU_MMAP_SIZE), 0))
    sregs, regs = bytearray(SIZES["sregs"]), bytearray(SIZES["regs"])
    fcntl.ioctl(cpu, int(Ioctl.KVM_GET_SREGS), sregs)
    sregs[0:8] = bytes(8)  # cs: base and selector
    sregs[12:14] = bytes(2)
    fcntl.ioctl(cpu, int(Ioctl.KVM_SET_SREGS), sregs)
    struct.pack_into("<QQ", regs, RIP, AT, 2)
    fcntl.ioctl(cpu, int(Ioctl.KVM_SET_REGS), regs)
    fcntl.ioctl(cpu, int(Ioctl.KVM_RUN), 0)
    took = (time.perf_counter() - began) * 1e3
    (reason,) = struct.unpack_from("<I", page, abi.RUN_EXIT_REASON)
    assert reason == abi.ExitReason.KVM_EXIT_HLT, reason
    page.close()
    for fd in (cpu, vm, device):
        os.close(fd)
    return took


def mount_exits(mount: Path, exits: int = 2000) -> float:
    """Microseconds an exit of a loop of `out`, each exit a read of `vm_run` through the mount."""
    vm = mount / "loop"
    vm.mkdir()
    (vm / "mode").write_text("real")
    with open(vm / "mem", "r+b", buffering=0) as mem:
        mem.seek(AT)
        mem.write(OUT_LOOP)
    (vm / "reg" / "rip").write_text(hex(AT))
    fd = os.open(vm / "vm_run", os.O_RDONLY)
    began = time.perf_counter()
    for _ in range(exits):
        line = os.pread(fd, 4096, 0)
    took = (time.perf_counter() - began) * 1e6 / exits
    assert line.startswith(b"io direction=out port=0x80 "), line
    os.close(fd)
    vm.rmdir()
    return took


def engine_exits(name: str, rounds: int = 15, exits: int = 2000) -> tuple[float, float]:
    """Microseconds an `out` exit, by `Vcpu.run` and by what is below it (ioctl(KVM_RUN), the core's own run), in
    turn on the same CPU."""
    memory = Memory(16 << 20)
    machine = by_name(name).create_machine()
    machine.map_memory(0, 0, memory.fd, 0, memory.size)
    cpu = machine.create_vcpu(0)
    set_mode(cpu, memory, memory.size, "long")
    memory.write(AT, OUT_LOOP)
    regs = bytearray(cpu.get_state("regs"))
    regs[128:136] = AT.to_bytes(8, "little")
    cpu.set_state("regs", bytes(regs))

    below: Callable[[], object]
    if name == "kvm":
        run, fd = int(Ioctl.KVM_RUN), cpu._fd

        def below() -> object:
            return fcntl.ioctl(fd, run, 0)
    else:
        core = cpu._cpu

        def below() -> object:
            return core.run(-1, False)

    ours, raw = [], []
    for _ in range(rounds):
        for one, times in ((cpu.run, ours), (below, raw)):
            began = time.perf_counter()
            for _ in range(exits):
                one()
            times.append((time.perf_counter() - began) * 1e6 / exits)
    machine.close()
    memory.close()
    return statistics.median(ours), statistics.median(raw)


def budgets(rounds: int = 15, instructions: int = 20_000_000) -> tuple[float, float]:
    """Milliseconds of a loop of so many instructions until its hlt: with a bound just after it, and without."""
    memory = Memory(16 << 20)
    machine = by_name("emulator").create_machine()
    machine.map_memory(0, 0, memory.fd, 0, memory.size)
    cpu = machine.create_vcpu(0)
    set_mode(cpu, memory, memory.size, "long")
    # again: add rax, rcx; xor rdx, rax; dec rcx; jnz again; hlt
    memory.write(AT, bytes.fromhex("4801c8 4831c2 48ffc9 75f5 f4"))
    bounded: list[float] = []
    free: list[float] = []
    for _ in range(rounds):
        for budget, times in ((instructions + 2, bounded), (None, free)):
            write_registers(cpu, {"rip": AT, "rcx": instructions // 4})
            began = time.perf_counter()
            exit_ = cpu.run(budget)
            times.append((time.perf_counter() - began) * 1e3)
            assert isinstance(exit_, Hlt), exit_.line()
    machine.close()
    memory.close()
    return statistics.median(bounded), statistics.median(free)


def results() -> list[Result]:
    found = []
    with mounted("--engine", "kvm") as mount:
        first_exit(mount, 0)
        pairs = [(first_exit(mount, number), raw_first_exit()) for number in range(1, 26)]
        ours, raw = (statistics.median(times) for times in zip(*pairs, strict=True))
        found.append(Result("mkdir to the first exit", "ms", ours, "raw ioctls", raw, "<= 5 ms"))
        found.append(Result("exit by vm_run, through the mount", "us", mount_exits(mount), ""))
    ours, raw = engine_exits("kvm")
    found.append(Result("port exit in the server", "us", ours, "raw ioctl(KVM_RUN)", raw, "<= +5 us"))
    ours, raw = engine_exits("emulator")
    found.append(Result("emulator: port exit to Python", "us", ours, "the core's own run", raw, "<= 3 us"))
    bounded, free = budgets()
    found.append(Result("emulator: a loop with an exact bound", "ms", bounded, "without one", free, "<= 1.02"))
    return found
