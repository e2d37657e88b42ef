"""The library in one's own process (`from vmfs import Machine`) against Unicorn's Python binding: what scripts do all
the time. Both take turns, in one process, and the best of several is taken of each."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

from bench.harness import Result
from vmfs import Machine

CODE, DATA = 0x1000, 0x8000
TINY = bytes.fromhex("48ffc0 48ffc3 90")  # inc rax; inc rbx; nop
LOOP = bytes.fromhex("48ffc0 48ffc3 48ffc9 75f5")  # l: inc rax; inc rbx; dec rcx; jne l
STORES = bytes.fromhex("48890425 00800000 48ffc9 75f3")  # l: mov [0x8000], rax; dec rcx; jne l
PORTS = bytes.fromhex("e680 ebfc")  # l: out 0x80, al; jmp l
TURNS = 4000  # of a loop that is hooked
CASE = 1000  # instructions
ROUNDS = 9

Action = Callable[[], object]


def _best(ours: Action, theirs: Action | None, times: int) -> tuple[float, float]:
    """Seconds of one, each the best of ROUNDS; of more where one takes long."""
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS if times > 1 else 20 * ROUNDS):
        for which, action in enumerate((ours, theirs)):
            if action is not None:
                began = time.perf_counter()
                for _ in range(times):
                    action()
                best[which] = min(best[which], (time.perf_counter() - began) / times)
    return best[0], best[1]


def _machine(code: bytes) -> Machine:
    machine = Machine(memory={CODE: 0x1000, DATA: 0x1000})
    machine.mem[CODE:] = code
    machine.rip = CODE
    return machine


class _Ours:
    """What is timed of ours. Unicorn's side has the same names."""

    def __init__(self) -> None:
        self.loop, self.stores, self.ports = _machine(LOOP), _machine(STORES), _machine(PORTS)
        self.hook = self.loop.hook_code(lambda machine, address: None)
        self.stores.hook_memory(lambda machine, write, address, size, value: None, read=False)
        self.plain = _machine(TINY)
        self.context = self.plain.save_context()

    def create(self) -> None:
        with Machine(memory={CODE: TINY}) as machine:
            machine.rax = 5
            machine.run(start=CODE, until=CODE + len(TINY))
            assert machine.rax == 6

    def read(self) -> None:
        self.plain.rax  # noqa: B018

    def load(self) -> None:
        self.plain.load_context(self.context)

    def hooked(self) -> None:
        self.loop.rcx = TURNS // 4
        self.loop.run(start=CODE, until=CODE + len(LOOP))

    def stored(self) -> None:
        self.stores.rcx = TURNS // 4
        self.stores.run(start=CODE, until=CODE + len(STORES))

    def again(self) -> None:
        self.plain.run(start=CODE, until=CODE + len(TINY))


def _unicorn() -> object | None:
    if importlib.util.find_spec("unicorn") is None:
        return None
    import unicorn
    from unicorn.x86_const import UC_X86_REG_RAX, UC_X86_REG_RCX

    def made(code: bytes) -> unicorn.Uc:
        uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc.mem_map(CODE, 0x1000)
        uc.mem_map(DATA, 0x1000)
        uc.mem_write(CODE, code)
        return uc

    class Theirs:
        def __init__(self) -> None:
            self.loop, self.stores, self.plain = made(LOOP), made(STORES), made(TINY)
            self.loop.hook_add(unicorn.UC_HOOK_CODE, lambda uc, address, size, data: None)
            self.stores.hook_add(unicorn.UC_HOOK_MEM_WRITE, lambda uc, kind, address, size, value, data: None)
            self.context = self.plain.context_save()

        def create(self) -> None:
            uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
            uc.mem_map(CODE, 0x1000)
            uc.mem_write(CODE, TINY)
            uc.reg_write(UC_X86_REG_RAX, 5)
            uc.emu_start(CODE, CODE + len(TINY))
            assert uc.reg_read(UC_X86_REG_RAX) == 6

        def read(self) -> None:
            self.plain.reg_read(UC_X86_REG_RAX)

        def load(self) -> None:
            self.plain.context_restore(self.context)

        def hooked(self) -> None:
            self.loop.reg_write(UC_X86_REG_RCX, TURNS // 4)
            self.loop.emu_start(CODE, CODE + len(LOOP))

        def stored(self) -> None:
            self.stores.reg_write(UC_X86_REG_RCX, TURNS // 4)
            self.stores.emu_start(CODE, CODE + len(STORES))

        def again(self) -> None:
            self.plain.emu_start(CODE, CODE + len(TINY))

    return Theirs()


def _fuzz(covered: bool) -> float:
    """Cases a second: restore, put the input into memory, run a thousand instructions to their end."""
    machine = _machine(STORES + b"\xf4")
    machine.rcx = CASE // 3
    snapshot = machine.snapshot()
    if covered:
        machine.coverage()

    def case() -> None:
        machine.restore(snapshot)
        machine.mem[DATA:] = b"an input"
        machine.run()

    took, _ = _best(case, None, 300)
    return 1 / took


def results() -> list[Result]:
    ours, theirs = _Ours(), _unicorn()
    rows = []
    for name, what, times, unit, per, mark in (
        ("create a machine and run 3 instructions", "create", 1, "us", 1e6, "<= 1.0"),
        ("read a register", "read", 5000, "us", 1e6, "<= 1.0"),
        ("set the registers back", "load", 2000, "us", 1e6, "<= 2.0"),
        ("run 3 instructions", "again", 1000, "us", 1e6, ""),
    ):
        mine, peer = _best(getattr(ours, what), theirs and getattr(theirs, what), times)
        rows.append(Result(f"library: {name}", unit, mine * per, "Unicorn", peer * per if theirs else None, mark))
    for name, what, events, mark in (
        ("a hook of code in Python", "hooked", TURNS, ">= 1.0"),
        ("a hook of stores in Python", "stored", TURNS // 4, ""),
    ):
        mine, peer = _best(getattr(ours, what), theirs and getattr(theirs, what), 1)
        peers = events / peer / 1e6 if theirs else None
        rows.append(Result(f"library: {name}", "million/s", events / mine / 1e6, "Unicorn", peers, mark))
    spin = _machine(b"\xeb\xfe")
    stop, _ = _best(lambda: spin.run(insns=1), None, 2000)
    port, _ = _best(ours.ports.run, None, 2000)
    snapshot = ours.ports.snapshot()
    same, _ = _best(lambda: ours.ports.restore(snapshot), None, 1000)
    rows += [
        Result("library: stop after an instruction, and go on", "us", stop * 1e6, "-", mark="<= 2 us"),
        Result("library: an exit for a port", "us", port * 1e6, "-"),
        Result("library: restore a snapshot, nothing was written", "us", same * 1e6, "-"),
        Result(f"library: fuzz cases of {CASE} instructions", "/s", _fuzz(covered=False), "-", mark=">= 20,000"),
        Result("library: the same with coverage", "/s", _fuzz(covered=True), "-"),
    ]
    return rows
