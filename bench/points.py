"""What points cost a run of the emulator that never comes to them: the CPU time of kernels of bench/guest with
points elsewhere against that without, in turn.

The thread's CPU time and not the clock's, so that what else the host does counts for neither.
"""

from __future__ import annotations

import statistics
import time

from bench.cpu import ENTER64, IMAGE_AT, KERNELS, RAM, STACK, build
from bench.harness import Result
from vmfs.engine import by_name
from vmfs.engine.base import NO_DEBUG, DebugRequest
from vmfs.machine.files.commands import parse_commands
from vmfs.machine.machine import Vm
from vmfs.memory.ram import Memory
from vmfs.words.exits import Debug, Hlt
from vmfs.words.modes import set_mode
from vmfs.words.registers import write_registers
from vmfs.words.stops import Breakpoint, PortStop, VectorStop, Watchpoint

ROUNDS = 5
SHARE = 3  # of the repetitions of bench.cpu
KERNEL_NAMES = ("alu", "sort", "calls", "bytecode")
_LOOP_AT = 0x1000
_ELSEWHERE = 0x1800000  # RAM that no kernel uses
_NEAR_STACK = STACK - 0x1000  # a page that `calls` uses, and a byte of it that it does not

REQUESTS = {
    "1,000 breakpoints elsewhere": DebugRequest(
        stops=tuple(Breakpoint(n + 1, _ELSEWHERE + 37 * n) for n in range(1000))
    ),
    "65,536 breakpoints elsewhere": DebugRequest(
        stops=tuple(Breakpoint(n + 1, _ELSEWHERE + 37 * n) for n in range(1 << 16))
    ),
    "1,000 watchpoints elsewhere": DebugRequest(
        stops=tuple(Watchpoint(n + 1, _ELSEWHERE + 64 * n, 8, True, True) for n in range(1000))
    ),
    "ports and vectors watched": DebugRequest(stops=(PortStop(1, 0x60, 0x64), VectorStop(2, tuple(range(32))))),
}


def _seconds(image: bytes, number: int, times: int, request: DebugRequest) -> float:
    memory = Memory(RAM)
    machine = by_name("emulator").create_machine()
    try:
        machine.map_memory(0, 0, memory.fd, 0, RAM)
        cpu = machine.create_vcpu(0)
        set_mode(cpu, memory, RAM, "long")
        memory.write(IMAGE_AT, image)
        write_registers(cpu, {"rip": ENTER64, "rsp": STACK, "rdi": number, "rsi": times})
        cpu.set_debug(request)
        began = time.thread_time()
        exit_ = cpu.run()
        taken = time.thread_time() - began
        assert isinstance(exit_, Hlt), exit_.line()
        return taken
    finally:
        machine.close()
        memory.close()


def _speed(image: bytes, names: tuple[str, ...], request: DebugRequest) -> float:
    """How fast a run is with the points: 1 is as fast as without. The geometric mean of medians."""
    ratios = []
    for number, kernel in enumerate(KERNELS):
        if kernel.name in names:
            pairs = [
                _seconds(image, number, kernel.many // SHARE, NO_DEBUG)
                / _seconds(image, number, kernel.many // SHARE, request)
                for _ in range(ROUNDS)
            ]
            ratios.append(statistics.median(pairs))
    return statistics.geometric_mean(ratios)


def _conditions(engine: str, times: int) -> float:
    """How many times a second a breakpoint in a loop is come to and does not stop, because rax is not `times`."""
    vm = Vm(by_name(engine), memory_size=1 << 20)
    try:
        vm.set_mode("long")
        vm.memory.write(_LOOP_AT, bytes.fromhex("48ffc0 ebfb"))  # again: inc rax; jmp again
        vm.change(lambda cpu: write_registers(cpu, {"rip": _LOOP_AT}))
        lines = f"break {_LOOP_AT + 3:#x} if rax=={times}"
        vm.set_points(parse_commands("debug", lines)).result()
        began = time.perf_counter()
        exit_ = vm.start().result()
        taken = time.perf_counter() - began
        assert isinstance(exit_, Debug) and exit_.cause == "breakpoint", exit_.line()
        return times / taken
    finally:
        vm.close()


def results() -> list[Result]:
    image = build()
    found = [
        Result(f"debug: run with {name}", "of none", _speed(image, KERNEL_NAMES, request), "", mark=">= 0.95")
        for name, request in REQUESTS.items()
    ]
    near = DebugRequest(stops=(Watchpoint(1, _NEAR_STACK, 1, True, True),))
    speed = _speed(image, ("calls",), near)
    found.append(Result("debug: run with a watched byte in the page of its stack", "of none", speed, ""))
    for engine, times in (("emulator", 100_000), ("kvm", 10_000)):
        if by_name(engine).probe().available:
            rate = _conditions(engine, times)
            found.append(Result(f"debug: conditions that do not hold, {engine}", "/s", rate, ""))
    return found
