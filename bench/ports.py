"""What an access to a port of a PC costs a guest that does nothing else, and a loop that makes one now and then.

The code is 64-bit, made by hand: a loop around one access. Processor time, of which that of the same loop with a NOP
is taken off.
"""

from __future__ import annotations

import struct
import time

from bench.harness import Result
from vmfs.engine import by_name
from vmfs.machine.machine import Vm
from vmfs.words.registers import write_registers

AT, TURNS, ROUNDS = 0x100000, 200_000, 5
NOP = b"\x90"
IN_AL, OUT_AL, IN_EAX = b"\xec", b"\xee", b"\xed"  # by DX

# name, port, what RAX is before, the access
PORTS = (
    ("out to port 80h, which nobody claims", 0x80, 0, OUT_AL),
    ("in of a UART's LSR", 0x3FD, 0, IN_AL),
    ("out of a byte by a UART", 0x3F8, 0x41, OUT_AL),
    ("in of a CMOS byte", 0x71, 0, IN_AL),
    ("in of the ACPI timer", 0x608, 0, IN_EAX),
    ("in of PCI configuration", 0xCFC, 0, IN_EAX),
    ("in of port 61h", 0x61, 0, IN_AL),
    ("in of port 92h", 0x92, 0, IN_AL),
)
BY_PYTHON = ("in of a port that Python answers (VGA, 3DAh)", 0x3DA, 0, IN_AL)


def seconds(access: bytes, port: int, rax: int, turns: int, inner: int = 0) -> tuple[float, int]:
    """Processor time of the loop on the emulator, and the instructions that it executed."""
    spin = b"\xbb" + struct.pack("<I", inner) + b"\xff\xcb\x75\xfc" if inner else b""  # mov ebx, N; dec ebx; jnz
    body = access + spin + b"\xff\xc9"  # dec ecx
    code = body + b"\x75" + struct.pack("<b", -len(body) - 2) + b"\xba\xf4\0\0\0\xee"  # jnz; out 0xf4
    vm = Vm(by_name("emulator"), memory_size=4 << 20)
    try:
        vm.set_machine("pc")
        vm.set_mode("long")
        vm.memory.write(AT, code)
        registers = {"rip": AT, "rcx": turns, "rdx": port, "rax": rax}
        vm.change(lambda cpu: write_registers(cpu, registers))
        began = time.process_time()
        vm.start().result(120)
        return time.process_time() - began, vm.counters()["instructions"]
    finally:
        vm.close()


def access_ns(row: tuple[str, int, int, bytes], turns: int = TURNS) -> float:
    _, port, rax, access = row
    empty = min(seconds(NOP, port, rax, turns)[0] for _ in range(ROUNDS))
    return (min(seconds(access, port, rax, turns)[0] for _ in range(ROUNDS)) - empty) * 1e9 / turns


def mips(access: bytes) -> float:
    """Of a loop with the access every 1,000 instructions."""
    best = 0.0
    for _ in range(ROUNDS):
        took, instructions = seconds(access, 0x80, 0, 60_000, 498)
        best = max(best, instructions / took / 1e6)
    return best


def results() -> list[Result]:
    found = [Result(row[0], "ns", access_ns(row), "", None, "<= 150 ns") for row in PORTS]
    found.append(Result(BY_PYTHON[0], "ns", access_ns(BY_PYTHON, TURNS // 20), ""))
    with_out, without = mips(OUT_AL), mips(NOP)
    found.append(Result("a loop with an out every 1,000 instructions", "MIPS", with_out, "without", without, ">= 0.9"))
    return found
