"""What the core says that it did last is what a trace of the same run says, and how much of it there is.

VMFS_CASES=N for more random programs.
"""

from __future__ import annotations

import os
import random

import pytest
from emulator.test_tracing import INSN, Sink
from engine import asm
from engine.asm import assemble
from engine.machine import machine_on

from vmfs.words import exits

pytest.importorskip("vmfs.engine.emulator._core")
from vmfs.engine.emulator.engine import EmulatorEngine  # noqa: E402

pytestmark = asm.needs_assembler

MOST = 32


BUDGET = 5_000_000


def last_of(source: str, mode: str = "long", *, traced: bool = False) -> list[int]:
    """Run until the triple fault: addresses of the last instructions as told, or as traced."""
    program = assemble(source, mode)
    with machine_on(EmulatorEngine()) as m:
        m.load(program, mode)
        m.set_regs(rsp=0x8000)
        sink = Sink()
        if traced:
            m.vcpu.set_trace(INSN, sink)
        exit_ = m.vcpu.run(BUDGET)
        while isinstance(exit_, exits.Io):
            exit_ = m.vcpu.run(BUDGET)
        assert isinstance(exit_, exits.Shutdown), exit_.line()
        if traced:
            return sink.instructions()[-MOST:]
        return [step[0] for step in m.vcpu.last_steps(MOST)]


def check(source: str, least: int, **options) -> None:
    """What is told is what was traced, and at least so much."""
    truth = last_of(source, traced=True, **options)
    told = last_of(source, **options)
    assert told == truth[len(truth) - len(told) :], (list(map(hex, told)), list(map(hex, truth)))
    assert len(told) >= min(least, len(truth)), (len(told), len(truth))


JITS = {"translated": {}, "interpreted": {"VMFS_NO_JIT": "1"}, "at once": {"VMFS_JIT_THRESHOLD": "0"}}
ENDS = "lidt [none]; ud2; none: .quad 0, 0"
LOOP = """
    mov ecx, {times}
again:
    add rax, rcx
    lea rbx, [rax + rcx]
    dec ecx
    jnz again
"""


@pytest.fixture(params=JITS)
def jit(request, monkeypatch):
    for name, value in JITS[request.param].items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("jit")
@pytest.mark.parametrize("mode", ["real", "protected", "long"])
@pytest.mark.parametrize("times", [1, 5, 39, 40, 41, 100, 100000])
def test_a_loop_and_a_fault_after_it(mode, times):
    registers = {"long": "r"}.get(mode, "e")
    source = LOOP.format(times=times).replace("rax", registers + "ax").replace("rbx", registers + "bx")
    source = source.replace("rcx", registers + "cx")
    check(source + ENDS, MOST, mode=mode)


@pytest.mark.usefixtures("jit")
def test_a_fault_within_a_loop():
    loop = "again: mov [rdi], rax; add rdi, 8; cmp rax, rbx; je again"
    check(f"lidt [none]; mov rdi, 0x10000; {loop}; none: .quad 0, 0", MOST)


def test_calls_are_followed_back_through_their_returns():
    calls = "again: call f; dec ecx; jnz again; ud2; f: add rax, 1; push rbx; pop rbx; ret"
    check(f"lidt [none]; mov ecx, 1000; {calls}; none: .quad 0, 0", MOST)


def test_repeated_instructions_count_once():
    loop = "again: mov ecx, 50; mov edi, 0x6000; rep stosb; dec edx; jnz again"
    source = f"lidt [none]; mov edx, {{}}; {loop}; ud2; none: .quad 0, 0"
    for times in (1, 3, 200):
        program = source.format(times)
        truth = last_of(program, traced=True)
        told = last_of(program)
        # a trace has each iteration
        short = [a for a, b in zip(truth, [*truth[1:], 0], strict=True) if a != b]
        assert told[-len(short) :] == short[-len(told) :]
        assert len(told) >= min(MOST, 3 + 5 * times - 1) - 1


FILLING = ("imul eax, eax, 1103515245", "add eax, 12345", "ror eax, 7", "nop", "mov ebx, eax")


WAYS = int(os.environ.get("VMFS_CASES", "60"))


@pytest.mark.parametrize("seed", range(WAYS))
def test_random_ways(monkeypatch, seed):
    """Random jumps, calls and loops: what is told is never wrong."""
    rng = random.Random(seed)
    if seed % 3 == 1:
        monkeypatch.setenv("VMFS_NO_JIT", "1")
    if seed % 3 == 2:
        monkeypatch.setenv("VMFS_JIT_THRESHOLD", str(rng.choice((0, 2, 10))))
    parts = rng.randrange(2, 12)
    lines = ["lidt [none]", f"mov r8d, {rng.choice((20, 300, 5000))}", f"mov eax, {rng.randrange(1 << 31)}"]
    for part in range(parts):
        lines.append(f"p{part}:")
        lines.append("dec r8d; jz out")
        for _ in range(rng.randrange(5)):
            lines.append(rng.choice(FILLING if rng.random() < 0.9 else ("out 0x80, al",)))
        kind = rng.randrange(5)
        target = rng.randrange(parts)
        if kind == 0:
            lines.append(f"test eax, {1 << rng.randrange(16)}; jnz p{target}")
        elif kind == 1:
            lines.append(f"call f{rng.randrange(3)}")
        elif kind == 2:
            lines.append(f"test eax, {1 << rng.randrange(16)}; lea rbx, [p{target}]; lea rdx, [n{part}]")
            lines.append(f"cmovz rbx, rdx; jmp rbx; n{part}: nop")
        elif kind == 3:
            lines.append(f"test eax, {1 << rng.randrange(16)}; jnz p{target}; push rax; pop rbx")
    lines.append("jmp p0; out: ud2")
    for f in range(3):
        lines.append(f"f{f}: add eax, {f}; test eax, {2 << f}; jz g{f}; ror eax, 3; ret; g{f}: nop; ret")
    lines.append("none: .quad 0, 0")
    check("; ".join(lines), 1)
