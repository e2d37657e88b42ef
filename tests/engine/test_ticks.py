"""Timers in the guest's time: a guest that halts between ticks gets all of them, by the host's clock and by its own."""

from __future__ import annotations

import threading

import pytest
from engine.test_pc import load, run

from vmfs.engine.base import Capability
from vmfs.machine.machine import Vm

SECOND = 1_000_000_000
COUNTED, BEGAN, ENDED = 0x500, 0x508, 0x510  # where the guest has its numbers

# Count the ticks of a vector in [COUNTED]; BEGAN is the TSC at the first one, ENDED the TSC at tick `ticks` + 1.
# `acknowledge` is what the handler does besides.
COUNT = """
    xor ax, ax
    mov ds, ax
    mov word ptr [4 * {vector}], offset handler
    mov word ptr [4 * {vector} + 2], 0
    mov al, 0x11; out 0x20, al; out 0xa0, al
    mov al, 0x20; out 0x21, al; mov al, 0x28; out 0xa1, al
    mov al, 4; out 0x21, al; mov al, 2; out 0xa1, al
    mov al, 1; out 0x21, al; out 0xa1, al
    mov al, {masks} & 0xff; out 0x21, al
    mov al, {masks} >> 8; out 0xa1, al
    {begin}
    sti
wait:
    hlt
    cmp dword ptr [{counted}], {ticks}
    jbe wait
    cli
    mov dx, 0xf4
    out dx, al
handler:
    push eax
    push edx
    {acknowledge}
    inc dword ptr [{counted}]
    cmp dword ptr [{counted}], 1
    ja later
    rdtsc
    mov [{began}], eax
    mov [{began} + 4], edx
later:
    rdtsc
    mov [{ended}], eax
    mov [{ended} + 4], edx
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
    pop edx
    pop eax
    iret
"""

RTC = {
    "vector": 0x28,
    "masks": 0xFEFB,
    "begin": "mov al, 0x0a; out 0x70, al; mov al, 0x23; out 0x71, al; mov al, 0x0b; out 0x70, al; mov al, 0x42;"
    "out 0x71, al; mov al, 0x0c; out 0x70, al; in al, 0x71",
    "acknowledge": "mov al, 0x0c; out 0x70, al; in al, 0x71",
}
PIT = {
    "vector": 0x20,
    "masks": 0xFFFE,
    "begin": "mov al, 0x34; out 0x43, al; mov al, 146; out 0x40, al; xor al, al; out 0x40, al",
    "acknowledge": "",
}


@pytest.fixture(params=["host", "instructions"])
def pc(engine, request):
    vm = Vm(engine, memory_size=2 << 20)
    vm.set_machine("pc")
    if request.param == "instructions":
        if Capability.DETERMINISTIC not in vm.capabilities:
            vm.close()
            pytest.skip(f"{engine.name}: time follows the host's clock")
        vm.set_time_source("instructions")
    yield vm
    vm.close()


def number(vm, address):
    return int.from_bytes(vm.memory.read(address, 8), "little")


def ticked(pc, assembler, source, hertz):
    """Let it count the ticks of two seconds; how many more there should have been in the time that passed."""
    ticks = round(2 * hertz)
    places = {"counted": COUNTED, "began": BEGAN, "ended": ENDED}
    load(pc, assembler(COUNT.format(ticks=ticks, **source, **places), "real"))
    pc.memory.write(COUNTED, bytes(4))
    began = pc.board.now()
    assert run(pc).line().startswith("shutdown cause=debug-exit")
    if pc.engine.name == "kvm":  # whose TSC has the host's rate
        passed = pc.board.now() - began
    else:
        passed = number(pc, ENDED) - number(pc, BEGAN)
    lost = passed / SECOND * hertz - ticks
    print(f"{pc.engine.name} {pc.time_source}: {lost:.2f} ticks lost of {ticks}")
    return lost / ticks


@pytest.mark.parametrize("source, hertz", [(RTC, 8192), (PIT, 1193182 / 146)], ids=["rtc", "pit"])
def test_no_tick_is_lost(pc, assembler, source, hertz):
    """Two seconds of the fastest ticks that PCs are used with. The guest gets each, however late the host wakes its CPU
    or lets it go on: the machine's time waits for it. On an idle host the RTC lost 590 as calls of Python, and 66 when
    only a CPU that slept was waited for. The bound is for hosts that are slower than the ticks, as with sanitizers; the
    first tick may be a part of one."""
    if pc.engine.name == "kvm":
        pytest.skip("the host's KVM may be slower than the ticks: test_a_tick_wakes_a_cpu_that_halts")
    tries, most = (1, 1) if pc.time_source == "instructions" else (6, 16)  # of 16384
    assert any(abs(ticked(pc, assembler, source, hertz)) * 2 * hertz < most for _ in range(tries))


def test_a_tick_wakes_a_cpu_that_halts(pc, assembler):
    """At 128 Hz, which every engine can; no thread comes with a tick."""
    before = set(threading.enumerate())
    slow = {**RTC, "begin": RTC["begin"].replace("0x23", "0x29")}
    assert any(ticked(pc, assembler, slow, 128) < 0.1 for _ in range(3))
    new = set(threading.enumerate()) - before
    assert not any(isinstance(thread, threading.Timer) for thread in new)
    assert [thread.name for thread in new].count("vmfs-deadline") == (pc.engine.name == "kvm")


# The TSC over 10 ms of PIT channel 2 (port 61h has its gate and its output), as kernels calibrate it.
CALIBRATE = """
    in al, 0x61
    and al, 0xfc
    or al, 1
    out 0x61, al
    mov al, 0xb0; out 0x43, al
    mov al, 11932 & 0xff; out 0x42, al
    mov al, 11932 >> 8; out 0x42, al
    rdtsc
    mov esi, eax
l:  in al, 0x61
    test al, 0x20
    jz l
    rdtsc
    sub eax, esi
    mov [0x500], eax
    mov dx, 0xf4
    out dx, al
"""


def test_the_tsc_has_its_rate_by_the_pit(pc, assembler):
    """1000 MHz, as CPUID says (leaf 15h), with both times."""
    if pc.engine.name == "kvm":
        pytest.skip("the TSC is the host's")
    best = 1.0
    for _ in range(20 if pc.time_source == "host" else 1):  # a busy host may keep it from running in between
        load(pc, assembler("xor ax, ax; mov ds, ax;" + CALIBRATE, "real"))
        run(pc)
        cycles = int.from_bytes(pc.memory.read(0x500, 4), "little")
        best = min(best, abs(cycles * 1193182 / 11932 / 1e9 - 1))
    assert best < 0.01
