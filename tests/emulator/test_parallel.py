"""CPUs that execute at the same time: locked accesses, the order of memory, code that another one writes, A and D bits,
and what changes a machine under way. ThreadSanitizer does not see host code: these tests are in its place."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from engine import asm
from engine.asm import ORIGIN, assemble
from engine.machine import Ram, TestMachine

from vmfs.words.exits import Exit

pytest.importorskip("vmfs.engine.emulator._core")
from vmfs.engine.emulator._core import STOP_BREAKPOINT  # noqa: E402

from vmfs.engine.emulator.engine import EmulatorEngine, EmulatorMachine, EmulatorVcpu  # noqa: E402

pytestmark = asm.needs_assembler
SIZE = 4 << 20
DATA = 0x20000  # far from code
# The long proof: VMFS_LOCKS=25000000 pytest -k 'lost and aligned' (10^8 of each kind by four CPUs).
ROUNDS = int(os.environ.get("VMFS_LOCKS", "200000"))
SECONDS = 60 + ROUNDS // 10_000


class Several:
    """CPUs with RAM in common, in long mode, each at an entry of one program."""

    def __init__(self, machine: EmulatorMachine, ram: Ram, count: int) -> None:
        self.machine, self.ram = machine, ram
        self.cpus = [machine.create_vcpu(index) for index in range(count)]
        machine.set_time("host")
        assert list(machine.runners(self.cpus)) == self.cpus  # each in a thread of its own

    def load(self, source: str, entries: list[str], **registers: list[int]) -> None:
        program = assemble(source, "long")
        for index, (cpu, entry) in enumerate(zip(self.cpus, entries, strict=True)):
            one = TestMachine(self.machine, cpu, self.ram)
            one.load(program, "long")
            values = {name: each[index] for name, each in registers.items()}
            one.set_regs(rip=program.labels[entry], rsp=SIZE - 0x40000 + 0x1000 * index, **values)

    def run(self) -> list[Exit]:
        """Until each has come to an exit."""
        return self.while_running(lambda: None)

    def while_running(self, act: Callable[[], object]) -> list[Exit]:
        came: list[Exit | BaseException | None] = [None] * len(self.cpus)

        def run(index: int, cpu: EmulatorVcpu) -> None:
            try:
                came[index] = cpu.run()
            except BaseException as error:
                came[index] = error

        threads = [threading.Thread(target=run, args=(index, cpu)) for index, cpu in enumerate(self.cpus)]
        for thread in threads:
            thread.start()
        try:
            act()
        finally:
            for thread in threads:
                thread.join(SECONDS)
            late = [thread for thread in threads if thread.is_alive()]
            for cpu in self.cpus if late else ():
                cpu.kick()
        assert not late, "it did not end"
        for one in came:
            if isinstance(one, BaseException):
                raise one
        return came  # type: ignore[return-value]

    def halts(self) -> None:
        assert [exit_.REASON for exit_ in self.run()] == ["hlt"] * len(self.cpus)

    def regs(self, index: int) -> dict[str, int]:
        return TestMachine(self.machine, self.cpus[index], self.ram).regs()

    def words(self, at: int, count: int, size: int = 8) -> list[int]:
        data = self.ram.read(at, count * size)
        return list(struct.unpack(f"<{count}{' BH I   Q'[size]}", data))


@contextmanager
def machine_of(count: int) -> Iterator[Several]:
    ram = Ram(SIZE)
    machine = EmulatorEngine().create_machine()
    try:
        machine.map_memory(0, 0, ram.fd, 0, SIZE)
        yield Several(machine, ram, count)
    finally:
        machine.close()
        ram.close()


@pytest.fixture(params=["translated", "interpreted"])
def make(request, monkeypatch):
    if request.param == "interpreted":
        monkeypatch.setenv("VMFS_NO_JIT", "1")
    return machine_of


# ---- locked accesses

LOCKED = {
    "inc byte": ("lock inc byte ptr [rbx]", 1, 1),
    "add word": ("lock add word ptr [rbx], 3", 2, 3),
    "add dword": ("lock add dword ptr [rbx], 5", 4, 5),
    "sub qword": ("mov eax, 7; lock sub qword ptr [rbx], rax", 8, -7),
    "dec qword": ("lock dec qword ptr [rbx]", 8, -1),
    "adc": ("stc; lock adc qword ptr [rbx], 10", 8, 11),
    "xadd dword": ("mov eax, 9; lock xadd dword ptr [rbx], eax", 4, 9),
    "xadd qword": ("mov eax, 9; lock xadd qword ptr [rbx], rax", 8, 9),
    "cmpxchg": ("mov rax, [rbx]; 2: lea rdx, [rax + 3]; lock cmpxchg [rbx], rdx; jne 2b", 8, 3),
    "cmpxchg dword": ("mov eax, [rbx]; 2: lea edx, [rax + 3]; lock cmpxchg [rbx], edx; jne 2b", 4, 3),
    "neg, twice": ("lock neg qword ptr [rbx]; lock neg qword ptr [rbx]; lock inc qword ptr [rbx + 8]", 8, 0),
    "cmpxchg8b": (
        "mov rsi, rbx; mov rdi, rcx; mov eax, [rsi]; mov edx, [rsi + 4]; "
        "2: mov ebx, eax; mov ecx, edx; add ebx, 0x40000001; adc ecx, 0; lock cmpxchg8b [rsi]; jne 2b; "
        "mov rbx, rsi; mov rcx, rdi", 8, 0x40000001),
    "exchange": (  # a lock of its own: 16 bytes further
        "2: mov eax, 1; xchg eax, [rbx + 16]; test eax, eax; jz 3f; pause; jmp 2b; "
        "3: add qword ptr [rbx], 2; mov dword ptr [rbx + 16], 0", 8, 2),
    "bts": ("2: lock bts dword ptr [rbx + 16], 5; jnc 3f; pause; jmp 2b; "
            "3: add qword ptr [rbx], 2; lock btr dword ptr [rbx + 16], 5", 8, 2),
    "bts of a string": ("mov eax, 37; 2: lock bts dword ptr [rbx + 16], eax; jnc 3f; pause; jmp 2b; "
                        "3: add qword ptr [rbx], 2; lock btc dword ptr [rbx + 16], eax", 8, 2),
}  # fmt: skip
# They begin together, so that the host executes them at the same time.
TOGETHER = "lock inc qword ptr [rbp]; 0: cmp qword ptr [rbp], {count}; jb 0b"
LOOP = "start: {together}; 1: {body}; dec rcx; jnz 1b; hlt"


@pytest.mark.parametrize("kind", LOCKED)
@pytest.mark.parametrize("place", ["aligned", "across lines", "across pages"])
def test_no_update_is_lost(make, kind, place):
    body, size, by = LOCKED[kind]
    count = 4
    at = DATA + {"aligned": 0, "across lines": 61, "across pages": 0xFFF - (size > 2) * 2 - (size > 4)}[place]
    rounds = ROUNDS if place == "aligned" else ROUNDS // 10 if place == "across lines" else ROUNDS // 400
    with make(count) as several:
        source = LOOP.format(together=TOGETHER.format(count=count), body=body)
        several.load(source, ["start"] * count, rbx=[at] * count, rcx=[rounds] * count, rbp=[DATA + 0x4000] * count)
        several.halts()
        assert several.words(at, 1, size) == [count * rounds * by % (1 << 8 * size)]


def test_no_update_of_16_bytes_is_lost(make):
    """CMPXCHG16B: each counts in one half, and takes from the other."""
    body = """
        mov rax, [rdi]; mov rdx, [rdi + 8]
        2: lea rbx, [rax + 3]; lea r9, [rdx - 5]; xchg rcx, r9
        lock cmpxchg16b [rdi]
        mov rcx, r9
        jne 2b
        mov rcx, rsi
    """
    source = f"start: mov rsi, rcx; 1: {body}; dec rsi; mov rcx, rsi; jnz 1b; hlt"
    count, rounds = 3, ROUNDS // 4
    with make(count) as several:
        several.load(source, ["start"] * count, rdi=[DATA] * count, rcx=[rounds] * count)
        several.halts()
        low, high = several.words(DATA, 2)
        assert (low, -high % (1 << 64)) == (3 * count * rounds, 5 * count * rounds)


def test_a_store_beside_a_locked_access_is_not_lost(make):
    """An unlocked store of one byte, and locked additions to its neighbours, in one word: each byte has one writer."""
    source = """
        adds: 1: lock add word ptr [rbx], 1; lock inc byte ptr [rbx + 3]; dec rcx; jnz 1b; hlt
        stores: 1: mov eax, ecx; mov byte ptr [rbx + 2], al; cmp byte ptr [rbx + 2], al; jne 9f; dec rcx; jnz 1b; hlt
        9: ud2
    """
    with make(2) as several:
        several.load(source, ["adds", "stores"], rbx=[DATA] * 2, rcx=[ROUNDS] * 2)
        several.halts()
        low, byte, high = struct.unpack("<HBB", several.ram.read(DATA, 4))
        assert (low, byte, high) == (ROUNDS % 65536, 1, ROUNDS % 256)


# ---- the order of memory (Intel SDM 3A 9.2): CPUs go through arrays of cells side by side; what TSO forbids is sought

CELLS = 4096
AREA = CELLS * 8
X, Y, SEEN = (
    1 << 20,
    (1 << 20) + AREA,
    (1 << 20) + 2 * AREA,
)  # what is written, and what each CPU has seen: two arrays each
LITMUS = """
    cpu{index}:
        xor r15d, r15d
        lock inc qword ptr [rbp]
    2:  cmp qword ptr [rbp], {count}; jb 2b
    1:  {step}
        lea rdi, [r15 * 8 + {x:#x}]
        lea rsi, [r15 * 8 + {y:#x}]
        {part}
        lea r10, [r15 * 8 + {seen:#x}]
        mov [r10], r8
        mov [r10 + {area}], r9
        inc r15
        cmp r15, {cells}
        jb 1b
        mov qword ptr [rbp + {index} * 64 + 64], {cells}
        hlt
"""
# Two go in step, each a little later than the other in turn: so that they meet in the middle of their parts.
STEP = """
        mov [rbp + {index} * 64 + 64], r15
    3:  cmp [rbp + {other} * 64 + 64], r15; jb 3b
        mov ecx, r15d; shr ecx, {index} * 6; and ecx, 63
    4:  dec ecx; jns 4b
"""
TO_X, TO_Y = "mov [rdi], r14", "mov [rsi], r14"
BOTH_OLD = [(0, 0, 0), (1, 0, 0)]  # CPU, register, value: that all of these are so may not be


def stores_and_loads(between: str) -> list[str]:
    return [f"{TO_X}; {between}; mov r8, [rsi]", f"{TO_Y}; {between}; mov r8, [rdi]"]


# What each CPU does with its two cells, and what it may not have seen.
FORBIDDEN: dict[str, tuple[list[str], list[tuple[int, int, int]]]] = {
    "stores and loads, with MFENCE": (stores_and_loads("mfence"), BOTH_OLD),
    "stores and loads, with LOCK": (stores_and_loads("lock add dword ptr [rsp], 0"), BOTH_OLD),
    "stores and loads, with CPUID": (stores_and_loads("xor eax, eax; cpuid"), BOTH_OLD),
    "stores by XCHG": (["mov rax, r14; xchg [rdi], rax; mov r8, [rsi]", "mov rax, r14; xchg [rsi], rax; mov r8, [rdi]"],
                       BOTH_OLD),
    "a message": ([f"{TO_X}; {TO_Y}", "mov r8, [rsi]; mov r9, [rdi]"], [(1, 0, 1), (1, 1, 0)]),
    "loads before stores": ([f"mov r8, [rsi]; {TO_X}", f"mov r8, [rdi]; {TO_Y}"], [(0, 0, 1), (1, 0, 1)]),
    "two see two stores in one order": (
        [TO_X, TO_Y, "mov r8, [rdi]; mov r9, [rsi]", "mov r8, [rsi]; mov r9, [rdi]"],
        [(2, 0, 1), (2, 1, 0), (3, 0, 1), (3, 1, 0)]),
}  # fmt: skip


def seen_together(make, parts: list[str], what: list[tuple[int, int, int]]) -> int:
    """In how many cells all of that was so."""
    count = len(parts)
    source = "\n".join(
        LITMUS.format(
            index=index,
            count=count,
            part=part,
            x=X,
            y=Y,
            seen=SEEN + 2 * AREA * index,
            area=AREA,
            cells=CELLS,
            step=STEP.format(index=index, other=1 - index) if count == 2 else "",
        )
        for index, part in enumerate(parts)
    )
    with make(count) as several:
        several.ram.write(X, bytes(2 * AREA))
        several.ram.write(DATA, bytes(256))
        several.load(source, [f"cpu{index}" for index in range(count)], rbp=[DATA] * count, r14=[1] * count)
        several.halts()
        arrays = [several.words(SEEN + 2 * AREA * cpu + AREA * number, CELLS) for cpu, number, _ in what]
        wanted = [value for _, _, value in what]
        return sum(list(cell) == wanted for cell in zip(*arrays, strict=True))


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_order_that_is_forbidden(make, name):
    assert seen_together(make, *FORBIDDEN[name]) == 0


def test_the_order_that_is_allowed_is_seen(make):
    """Without a fence a load may come before an older store: where that is seen, the tests above could fail, too."""
    if not any(seen_together(make, stores_and_loads("nop"), BOTH_OLD) for _ in range(5)):
        pytest.skip("the host has executed no two CPUs at the same time")


@pytest.mark.parametrize("kind", ["add dword", "dec qword", "xadd qword", "cmpxchg", "cmpxchg8b", "exchange", "bts"])
def test_no_update_is_lost_in_step(make, kind):
    """Two do it at the same moment, as near as that can be had."""
    body, size, by = LOCKED[kind]
    source = "\n".join(
        f"cpu{index}: xor r15d, r15d; {TOGETHER.format(count=2)};"
        f"1: {STEP.format(index=index, other=1 - index)}; {body};"
        f"inc r15; cmp r15, {CELLS}; jb 1b; mov qword ptr [rbp + {index} * 64 + 64], {CELLS}; hlt"
        for index in range(2)
    )
    with make(2) as several:
        several.load(source, ["cpu0", "cpu1"], rbx=[DATA + 0x1000] * 2, rbp=[DATA] * 2)
        several.halts()
        assert several.words(DATA + 0x1000, 1, size) == [2 * CELLS * by % (1 << 8 * size)]


# ---- code that another CPU writes

# One writes the number of the round into an instruction, and says so; the other serialises (3A 9.1.3), and calls it.
PATCH = """
    writes: xor r15d, r15d
    1:  inc r15
        mov [rdi + 1], r15d
        mov [rbp], r15
    2:  pause; cmp [rbp + 64], r15; jb 2b
        dec rcx
        jnz 1b
        hlt
    calls: xor r15d, r15d; mov r14, rcx
    1:  inc r15
    2:  pause; cmp [rbp], r15; jb 2b
        xor eax, eax; cpuid
        call rdi
        cmp rax, r15; jne 9f
        call rdi
        cmp rax, r15; jne 9f
        mov [rbp + 64], r15
        dec r14
        jnz 1b
        hlt
    9:  ud2
"""


@pytest.mark.parametrize("where", ["a page of its own", "a page that it writes to"])
def test_code_that_another_one_patches(make, where):
    code = 0x30000
    flags = DATA if where == "a page of its own" else code + 0x800
    with make(2) as several:
        several.ram.write(code, b"\xb8\0\0\0\0\xc3")  # mov eax, ...; ret
        several.load(PATCH, ["writes", "calls"], rdi=[code] * 2, rbp=[flags] * 2, rcx=[2000] * 2)
        several.halts()


# Pages that are data, then code, then data again: what one has written elsewhere, by REP MOVS, the other one executes.
PAGES = """
    writes: xor r15d, r15d; mov r14, rcx
    1:  inc r15
        mov rax, r15; and eax, 7; shl eax, 12; lea rdi, [rbx + rax]
        mov [rsi + 1], r15d
        push rsi; push rdi; mov ecx, 64; rep movsb; pop rdi; pop rsi
        mov [rbp], r15
        mov eax, r15d; add eax, 3; and eax, 7; shl eax, 12; inc qword ptr [rbx + rax + 0x100]
    2:  pause; cmp [rbp + 64], r15; jb 2b
        dec r14
        jnz 1b
        hlt
    calls: xor r15d, r15d; mov r14, rcx; mov r12, rbx
    1:  inc r15
        mov rax, r15; and eax, 7; shl eax, 12; lea rdi, [r12 + rax]
    2:  pause; cmp [rbp], r15; jb 2b
        xor eax, eax; cpuid
        call rdi
        cmp rax, r15; jne 9f
        mov [rbp + 64], r15
        dec r14
        jnz 1b
        hlt
    9:  ud2
"""


def test_pages_that_become_code(make):
    with make(2) as several:
        several.ram.write(0x30000, b"\xb8\0\0\0\0\xc3" + b"\x90" * 58)
        several.load(PAGES, ["writes", "calls"], rbx=[0x38000] * 2, rsi=[0x30000] * 2, rbp=[DATA] * 2, rcx=[3000] * 2)
        several.halts()
        assert sum(several.words(0x38100 + 0x1000 * page, 1)[0] for page in range(8)) == 3000


def test_code_that_several_write_and_several_execute(make):
    """Each CPU writes into the function of another one, and executes its own: no one waits for anybody."""
    source = """
        start:
        1:  inc dword ptr [rdi + 1]     # of the other's: mov eax, N; ret
            call rsi
            cmp eax, r15d; jb 9f        # it never goes back
            mov r15d, eax
            dec rcx
            jnz 1b
            hlt
        9:  ud2
    """
    count = 3
    with make(count) as several:
        for index in range(count):
            several.ram.write(0x30000 + 0x80 * index, b"\xb8\0\0\0\0\xc3")
        several.load(
            source, ["start"] * count, rcx=[1000] * count, r15=[0] * count,
            rdi=[0x30000 + 0x80 * ((index + 1) % count) for index in range(count)],
            rsi=[0x30000 + 0x80 * index for index in range(count)],
        )  # fmt: skip
        several.halts()
        for index in range(count):
            assert several.words(0x30001 + 0x80 * index, 1, 4) == [1000]


# ---- page tables


def test_no_bit_of_an_entry_is_lost(make):
    """One adds to bits of a page table entry that are free for software, and clears A and D; accesses of others set
    these."""
    source = """
        counts:
        1:  mov rax, 1 << 52
            test ecx, 1024; jnz 2f      # up and down again
            neg rax
        2:  lock add [rdi], rax
            lock btr qword ptr [rdi], 5
            lock btr qword ptr [rdi], 6
            dec rcx
            jnz 1b
            lock inc qword ptr [rbp]
            hlt
        touches:
        1:  invlpg [rsi]
            mov rax, [rsi]
            invlpg [rsi]
            lock inc qword ptr [rsi]
            inc r14
            cmp qword ptr [rbp], 0; je 1b
            hlt
    """
    with make(3) as several:
        several.load(source, ["counts", "touches", "touches"], rcx=[99 * 1024 + 1023] * 3, rbp=[DATA] * 3, rdi=[0] * 3,
                     rsi=[DATA + 0x5000] * 3, r14=[0] * 3)  # fmt: skip
        entry = entry_of(several, DATA + 0x5000)
        for index in range(3):
            TestMachine(several.machine, several.cpus[index], several.ram).set_regs(rdi=entry)
        before = several.words(entry, 1)[0]
        several.halts()
        after = several.words(entry, 1)[0]
        assert after >> 52 == 1
        assert (after ^ before) & 0x800F_FFFF_FFFF_FF9F == 0  # all else is as it was
        assert several.words(DATA + 0x5000, 1)[0] == several.regs(1)["r14"] + several.regs(2)["r14"]


def entry_of(several: Several, linear: int) -> int:
    """Where the last entry for it is, whose page is made one of 4 KiB: `long` maps large ones."""
    (cr3,) = struct.unpack_from("<Q", several.cpus[0].get_state("sregs"), 8 * 24 + 2 * 16 + 16)
    table = cr3
    for shift in (39, 30, 21):
        at = table + (linear >> shift & 511) * 8
        (found,) = several.words(at, 1)
        if found & 0x80:
            assert shift == 21
            table = SIZE - 0x60000
            first = found & 0x000F_FFFF_FFE0_0000
            several.ram.write(table, struct.pack("<512Q", *(first + 4096 * n | 0x67 for n in range(512))))
            several.ram.write(at, struct.pack("<Q", table | 0x67))
        else:
            table = found & 0x000F_FFFF_FFFF_F000
    return table + (linear >> 12 & 511) * 8


# ---- what happens to a machine under way

COUNTING = "start: 1: lock inc qword ptr [rbx]; inc qword ptr [rdi]; jmp 1b"


def test_each_is_stopped_at_any_moment(make):
    count = 4
    with make(count) as several:
        own_cells = [DATA + 0x100 * (n + 1) for n in range(count)]
        several.load(COUNTING, ["start"] * count, rbx=[DATA] * count, rdi=own_cells)
        for _ in range(30):

            def stop() -> None:
                time.sleep(random.random() / 200)
                for cpu in several.cpus:
                    cpu.kick()

            exits = several.while_running(stop)
            assert {exit_.REASON for exit_ in exits} == {"interrupted"}
        own = [several.words(cell, 1)[0] for cell in own_cells]
        ahead = several.words(DATA, 1)[0] - sum(own)
        assert all(own) and 0 <= ahead <= count  # one each, between the two instructions


def test_memory_is_mapped_while_they_run(make):
    """A slot comes and goes, and its contents change, while CPUs read it: they see one or the other."""
    with make(3) as several:
        other = Ram(0x2000)
        other.write(0, struct.pack("<QQ", 0x1111, 0x1111) * 0x200)
        source = """
            start: mov r14d, 0x1111
            1:  mov rax, [rsi]; inc r13
                cmp rax, -1; je 2f      # nothing is there: an exit
                cmp rax, r14; jne 9f
            2:  cmp qword ptr [rbp], 0; je 1b
                hlt
            9:  ud2
        """
        several.load(source, ["start"] * 3, rsi=[0x800000 + 8 * n for n in range(3)], rbp=[DATA] * 3, r13=[0] * 3)
        several.machine.map_memory(3, 0x800000, other.fd, 0, 0x2000)

        def change() -> None:
            for number in range(60):
                several.machine.map_memory(3, 0x800000, other.fd, 0x1000 * (number % 2), 0x1000)
                time.sleep(0.002)
            several.ram.write(DATA, b"\1")

        assert [exit_.REASON for exit_ in several.while_running(change)] == ["hlt"] * 3
        assert all(several.regs(n)["r13"] > 100 for n in range(3))
        other.close()


def test_no_page_is_missing_in_the_log(make):
    """Pages that CPUs write while the log is taken are in it, or in the next."""
    source = """
        start:
        1:  mov rdi, rsi
        2:  inc qword ptr [rdi]
            add rdi, 4096
            cmp rdi, rdx; jb 2b
            dec rcx
            jnz 1b
            hlt
    """
    first = 0x80000  # below are the page tables
    with make(2) as several:
        several.load(source, ["start"] * 2, rsi=[first, first + 0x20000], rdx=[first + 0x20000, first + 0x40000],
                     rcx=[20_000] * 2)  # fmt: skip
        contents: dict[int, int] = {}
        ended = threading.Event()

        def look() -> None:
            while not ended.is_set():
                log = several.machine.dirty_log(0)
                for page in range(first >> 12, (first + 0x40000) >> 12):
                    if log[page >> 3] >> (page & 7) & 1:
                        contents[page] = several.words(page << 12, 1)[0]

        looker = threading.Thread(target=look)
        looker.start()
        several.halts()
        ended.set()
        looker.join()
        log = several.machine.dirty_log(0)
        for page in range(first >> 12, (first + 0x40000) >> 12):
            if not log[page >> 3] >> (page & 7) & 1:
                assert contents[page] == 20_000, hex(page)
            assert several.words(page << 12, 1) == [20_000]


def test_one_forgets_its_code_while_others_execute(make):
    """A CPU that stands gets other breakpoints, and decodes anew what others execute and write meanwhile."""
    code, flags = 0x30000, 0x30800
    with make(3) as several:
        several.ram.write(code, b"\xb8\0\0\0\0\xc3")
        idle = several.cpus.pop()
        one = TestMachine(several.machine, idle, several.ram)
        one.load(assemble("start: call rdi; jmp start", "long"), "long")
        one.set_regs(rdi=code, rsp=SIZE - 0x30000)
        several.load(PATCH, ["writes", "calls"], rdi=[code] * 2, rbp=[flags] * 2, rcx=[3000] * 2)
        one.set_regs(rip=ORIGIN + 0x800)
        several.ram.write(ORIGIN + 0x800, assemble("start: call rdi; jmp start", "long").code)

        def forget() -> None:
            for number in range(150):
                assert idle.run(budget=50).REASON == "limit"
                idle._cpu.set_debug(False, [(STOP_BREAKPOINT, 1, 0x70000 + number, 0, False, False)])

        assert [exit_.REASON for exit_ in several.while_running(forget)] == ["hlt"] * 2


def test_it_goes_on_in_turn_and_back(make):
    """A machine that was stopped is the same value in both ways of running: none of its additions is lost."""
    count = 3
    with make(count) as several:
        own_cells = [DATA + 0x100 * (n + 1) for n in range(count)]
        several.load(COUNTING, ["start"] * count, rbx=[DATA] * count, rdi=own_cells)
        turns = several.machine.in_turn(several.cpus)
        for number in range(6):
            if number % 2:
                assert turns.run(budget=300_000).REASON == "limit"
            else:
                several.while_running(lambda: (time.sleep(0.01), [cpu.kick() for cpu in several.cpus]))
            own = [several.words(cell, 1)[0] for cell in own_cells]
            assert 0 <= several.words(DATA, 1)[0] - sum(own) <= count
        assert all(own)
