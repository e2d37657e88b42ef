"""What the core tells of itself is exactly what it did, and telling changes nothing.

The oracles: the same program in single steps; RAM, to which the traced stores are applied again; the same run without
tracing. VMFS_CASES=N for more.
"""

from __future__ import annotations

import random
import struct
import threading

import pytest
from emulator.test_hostile import PAGE, Window, box, hostile, hostile_code, play, set_rip
from engine import asm
from engine.asm import ORIGIN, assemble
from engine.machine import RAM, machine_on
from hypothesis import given
from hypothesis import strategies as st

from vmfs.debug.trace import linear_rip
from vmfs.debug.trace_buffer import count
from vmfs.engine.base import VCPU_STATES, DebugRequest, TraceRequest
from vmfs.words import exits, tracing
from vmfs.words.errors import Unsupported
from vmfs.words.modes import set_mode
from vmfs.words.tracing import RECORD

_core = pytest.importorskip("vmfs.engine.emulator._core")
from vmfs.engine.emulator.engine import EmulatorEngine  # noqa: E402

pytestmark = asm.needs_assembler

INSN = TraceRequest(instructions=True)
MEM = TraceRequest(memory=True)
EVENTS = TraceRequest(exceptions=True, interrupts=True)
ALL = TraceRequest(instructions=True, memory=True, exceptions=True, interrupts=True)
READ, STORE = False, True


class Sink:
    """Keeps the records and looks whether their count is right."""

    def __init__(self) -> None:
        self.records: list[tuple] = []
        self.events = 0

    def __call__(self, records: bytes, events: int, ended: bool) -> None:
        new = list(RECORD.iter_unpack(records))
        assert events == count(records)
        self.records += new
        self.events += events

    def instructions(self) -> list[int]:
        return [address for _, address, _ in self.numbered()]

    def numbered(self) -> list[tuple[int, int, int]]:
        """(number, address, length) of each instruction, repetitions one by one."""
        found = []
        for kind, _, size, times, number, address, lengths in self.records:
            if kind != tracing.INSN:
                continue
            assert 1 <= size <= 16 and (times == 1 or size == 1)
            for n in range(size):
                length = lengths >> 4 * n & 15
                for again in range(times):
                    found.append((number + n + again, address, length))
                address += length
        return found

    def accesses(self) -> list[tuple]:
        """(place, write, address, bytes, implicit), pieces joined."""
        found, place, goes_on = [], None, False
        for kind, flags, size, _, *words in self.records:
            if kind in (tracing.INSN, tracing.AT):
                place = words[1]
                for n in range(size - 1):
                    place += words[2] >> 4 * n & 15
            if kind == tracing.MEM:
                data = struct.pack("<2Q", *words[1:])[:size]
                if goes_on:
                    data = found.pop()[3] + data
                    address = words[0] + size - len(data)
                else:
                    address = words[0]
                found.append((place, bool(flags & tracing.WRITE), address, data, bool(flags & tracing.IMPLICIT)))
                goes_on = bool(flags & tracing.MORE)
        return found

    def happened(self) -> list[tuple]:
        """(kind, flags, vector, error, place, cr2) of events."""
        kinds = (tracing.EXCEPTION, tracing.INTERRUPT)
        return [(r[0], r[1], r[2], r[3], r[5], r[6]) for r in self.records if r[0] in kinds]


@pytest.fixture
def vm():
    with machine_on(EmulatorEngine()) as machine:
        yield machine


def traced(vm, source: str, mode: str, request: TraceRequest, budget: int = 10_000) -> Sink:
    vm.load(assemble(source, mode), mode)
    sink = Sink()
    vm.vcpu.set_trace(request, sink)
    vm.vcpu.run(budget=budget)
    return sink


# ---- instructions

PROGRAMS = {
    "loop": "mov ecx, 40; again: dec ecx; jnz again; nop; hlt",
    "calls": "mov ecx, 9; a: call f; loop a; hlt; f: push cx; pop cx; cmp cx, 4; je g; ret; g: nop; ret",
    "strings": """cld; mov edi, 0x20ff0; mov esi, 0x21000; mov ecx, 100; rep movsb
                  xor ecx, ecx; rep stosb; mov ecx, 50; mov al, 1; repne scasb; mov ecx, 3; rep lodsw; hlt""",
    "itself": "mov ecx, 50; again: mov byte ptr [l1 + 1], cl; l1: mov al, 1; dec ecx; jnz again; hlt",
    "straight": "nop;" * 100 + "hlt",
    "device": "mov ecx, 3; a: mov eax, [0xa0000]; in al, 0x80; mov [0xa0004], eax; out 0x80, al; loop a; hlt",
}


def places_by_steps(vm, limit: int = 10_000) -> list[int]:
    """The linear address of each instruction, in single steps."""
    places: list[int] = []
    vm.vcpu.set_debug(DebugRequest(step=True))
    for _ in range(limit):
        before, done = linear_rip(vm.vcpu), vm.vcpu.counters()["instructions"]
        exit_ = vm.vcpu.run()
        places += [before] * (vm.vcpu.counters()["instructions"] - done)
        if isinstance(exit_, exits.Hlt):
            return places
    raise AssertionError("it did not end")


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_instructions_are_those_of_single_steps(vm, name, mode):
    program = assemble(PROGRAMS[name].replace("0x2", "0x7" if mode == "real" else "0x2"), mode)
    for request in (INSN, ALL):
        vm.load(program, mode)
        sink, done = Sink(), vm.vcpu.counters()["instructions"]
        vm.vcpu.set_trace(request, sink)
        while not isinstance(vm.vcpu.run(budget=50_000), exits.Hlt):
            pass
        assert vm.vcpu.counters()["instructions"] - done == len(sink.instructions())
        numbers = [number for number, _, _ in sink.numbered()]
        assert numbers == list(range(done, done + len(numbers)))
        vm.vcpu.set_trace(TraceRequest(), sink)
        vm.load(program, mode)
        assert sink.instructions() == places_by_steps(vm)
        vm.vcpu.set_debug(DebugRequest())


def test_single_steps_and_small_budgets_are_traced_too(vm):
    program = assemble(PROGRAMS["strings"], "long")
    whole = traced(vm, PROGRAMS["strings"], "long", INSN).instructions()
    for budget in (1, 3, 7):
        vm.load(program, "long")
        sink = Sink()
        vm.vcpu.set_trace(INSN, sink)
        while not isinstance(vm.vcpu.run(budget=budget), exits.Hlt):
            pass
        assert sink.instructions() == whole
    vm.load(program, "long")
    sink = Sink()
    vm.vcpu.set_trace(INSN, sink)
    places_by_steps(vm)
    assert sink.instructions() == whole


def test_a_long_trace_is_complete(vm):
    """Many buffers full, of straight runs that are as short as can be."""
    sink = traced(vm, "mov ecx, 100000; a: jmp b; nop; b: dec ecx; jnz a; hlt", "long", INSN, -1)
    assert sink.events == vm.vcpu.counters()["instructions"] == 300_002
    assert [number for number, _, _ in sink.numbered()] == list(range(300_002))


# ---- memory

ACCESSES = [
    ("mov al, [rdi]", [(READ, 0x20000, 1)]),
    ("mov [rdi + 3], bx", [(STORE, 0x20003, 2)]),
    ("mov eax, [rdi]", [(READ, 0x20000, 4)]),
    ("add [rdi], rbx", [(READ, 0x20000, 8), (STORE, 0x20000, 8)]),
    ("movzx eax, word ptr [rdi]", [(READ, 0x20000, 2)]),
    ("xchg [rdi], rbx", [(READ, 0x20000, 8), (STORE, 0x20000, 8)]),
    ("lock inc dword ptr [rdi]", [(READ, 0x20000, 4), (STORE, 0x20000, 4)]),
    ("mov [rdi + 0xffc], rbx", [(STORE, 0x20FFC, 8)]),  # over a page's end
    ("push rbx", [(STORE, 0x2FFF8, 8)]),
    ("push [rdi]", [(READ, 0x20000, 8), (STORE, 0x2FFF8, 8)]),
    ("pop rax", [(READ, 0x30000, 8)]),
    ("call l; l:", [(STORE, 0x2FFF8, 8)]),
    ("enter 16, 0", [(STORE, 0x2FFF8, 8)]),
    ("movups [rdi + 1], xmm1", [(STORE, 0x20001, 16)]),
    ("movaps xmm0, [rdi]", [(READ, 0x20000, 16)]),
    ("addsd xmm0, [rdi]", [(READ, 0x20000, 8)]),
    ("movq mm0, [rdi]; emms", [(READ, 0x20000, 8)]),
    ("fninit; fld tbyte ptr [rdi]", [(READ, 0x20000, 10)]),
    ("fninit; fldpi; fstp qword ptr [rdi]", [(STORE, 0x20000, 8)]),
    ("movsq", [(READ, 0x20100, 8), (STORE, 0x20000, 8)]),
    ("mov cl, 2; rep stosd", [(STORE, 0x20000, 4), (STORE, 0x20004, 4)]),
    ("cmpxchg16b [rdi]", [(READ, 0x20000, 16), (STORE, 0x20000, 16)]),
    ("bts qword ptr [rdi], 9", [(READ, 0x20000, 8), (STORE, 0x20000, 8)]),
    ("lea rax, [rdi]; nop dword ptr [rdi]; prefetcht0 [rdi]", []),
    ("sgdt [rdi]", [(STORE, 0x20000, 2), (STORE, 0x20002, 8)]),
]


@pytest.mark.parametrize(("source", "expected"), ACCESSES, ids=[source for source, _ in ACCESSES])
@pytest.mark.parametrize("request_", [MEM, ALL], ids=["mem", "all"])
def test_accesses_of_all_widths(vm, source, expected, request_):
    """Sizes and places as written here, values as RAM has them before or after."""
    program = assemble(f"{source}; hlt", "long")
    vm.load(program, "long")
    content = bytes(range(7, 7 + 64)) * 2
    for at in (0x20000, 0x20100, 0x20FF0, 0x2FFF0, 0x30000):
        vm.ram.write(at, content)
    vm.set_regs(rdi=0x20000, rsi=0x20100, rsp=0x30000, rbx=0x1122334455667788, rcx=0)
    vm.vcpu.set_trace(request_, sink := Sink())
    before = vm.ram.read(0, RAM)
    vm.vcpu.run(budget=100)
    after = vm.ram.read(0, RAM)
    found = [one for one in sink.accesses() if not one[4]]
    assert [(write, address, len(data)) for _, write, address, data, _ in found] == expected
    assert [one for one in sink.accesses() if one[4]] == []
    for place, write, address, data, _ in found:
        assert data == (after if write else before)[address : address + len(data)]
        assert ORIGIN <= place < ORIGIN + len(program.code)


def test_a_large_access_is_in_pieces(vm):
    sink = traced(vm, "mov edi, 0x20000; fxsave [rdi]; hlt", "long", MEM)
    stores = [(address, len(data)) for _, write, address, data, _ in sink.accesses() if write]
    assert sum(size for _, size in stores) >= 160 + 256  # the reserved end need not be written
    assert stores[0][0] == 0x20000
    assert all(kind != tracing.MEM or size <= 16 for kind, _, size, *_ in sink.records)


def test_an_access_is_traced_when_it_is_done(vm):
    """A load from nowhere is an exit, and an access when the next run has completed it."""
    vm.load(assemble("mov eax, [0xa0000]; mov [0xa0008], eax; hlt", "protected"), "protected")
    vm.vcpu.set_trace(MEM, sink := Sink())
    assert vm.vcpu.run().REASON == "mmio"
    assert sink.accesses() == []
    vm.vcpu.access_data = b"\1\2\3\4"
    while vm.vcpu.run().REASON == "mmio":
        pass
    assert [one[1:4] for one in sink.accesses()] == [
        (READ, 0xA0000, b"\1\2\3\4"),
        (STORE, 0xA0008, b"\1\2\3\4"),
    ]


def test_what_the_cpu_accesses_itself_is_implicit(vm):
    """The vector table and the frame of an INT 0x21, in real mode."""
    code = "mov sp, 0x800; mov word ptr [0x84], offset handler; mov word ptr [0x86], 0; int 0x21; handler: hlt"
    vm.load(assemble(code, "real"), "real")
    vm.vcpu.set_trace(ALL, sink := Sink())
    vm.vcpu.run(budget=100)
    implicit = [one for one in sink.accesses() if one[4]]
    assert [(write, address, len(data)) for _, write, address, data, _ in implicit] == [
        (READ, 0x84, 4),
        (STORE, 0x7FE, 2),
        (STORE, 0x7FC, 2),
        (STORE, 0x7FA, 2),
    ]
    assert len({place for place, *_ in implicit}) == 1
    ((kind, flags, vector, _, place, _),) = sink.happened()
    assert (kind, flags, vector, place) == (tracing.INTERRUPT, tracing.SOFTWARE, 0x21, implicit[0][0])


# ---- events


def test_a_triple_fault_shows_how_it_came(vm):
    """No table: a #UD, whose delivery fails, a double fault, and the end."""
    sink = traced(vm, "lidt [zero]; ud2; zero: .quad 0, 0", "protected", ALL)
    assert [(vector, error) for _, _, vector, error, _, _ in sink.happened()] == [
        (6, 0),  # #UD
        (13, 6 * 8 + 2 + 1),  # its gate is beyond the limit: #GP(IDT, EXT), a fault on its own
        (13, 13 * 8 + 2 + 1),  # and that one's gate: a double fault
        (8, 0),
        (13, 8 * 8 + 2 + 1),  # and that one's
    ]
    assert len(sink.instructions()) == 1  # lidt; what faults was not executed


def test_external_interrupts_and_nmis(vm):
    code = "mov word ptr [0x80], offset h; mov word ptr [0x82], 0; mov word ptr [8], offset h; mov word ptr [10], 0"
    vm.load(assemble(f"mov sp, 0x800; {code}; sti; nop; nop; hlt; h: iret", "real"), "real")
    vm.vcpu.set_trace(EVENTS, sink := Sink())
    vm.vcpu.run(budget=5)
    vm.vcpu.interrupt(0x20)
    vm.vcpu.nmi()
    vm.vcpu.run(budget=100)
    assert [(kind, flags, vector) for kind, flags, vector, *_ in sink.happened()] == [
        (tracing.INTERRUPT, tracing.NMI, 2),
        (tracing.INTERRUPT, 0, 0x20),
    ]


def test_a_run_to_the_end_of_the_segment(vm):
    """All instructions before it are there, and the fetch that faults is at an EIP of 10000h."""
    vm.load(assemble("handler: hlt", "real"), "real")
    vm.ram.write(13 * 4, ORIGIN.to_bytes(4, "little"))
    vm.ram.write(0xFFC0, b"\x90" * 64)
    vm.set_regs(rip=0xFFC0, rsp=0x8000)
    vm.vcpu.set_trace(ALL, sink := Sink())
    vm.vcpu.run(budget=100)
    assert sink.instructions() == [*range(0xFFC0, 0x10000), ORIGIN]
    assert [(vector, place) for _, _, vector, _, place, _ in sink.happened()] == [(13, 0x10000)]


def test_page_faults_have_their_address(vm):
    vm.load(assemble("mov rax, 0x123456789000; mov [rax], al; hlt", "long"), "long")
    vm.vcpu.set_trace(EVENTS, sink := Sink())
    vm.vcpu.run(budget=100)
    kind, flags, vector, error, place, address = sink.happened()[0]
    assert (kind, vector, error, address) == (tracing.EXCEPTION, 14, 2, 0x123456789000)
    assert flags & tracing.ERROR_CODE and place == ORIGIN + 10


# ---- filters


def test_ranges_of_places_and_of_data(vm):
    code = "mov edi, 0x20000; mov ecx, 5; a: mov [rdi], cl; call f; loop a; hlt; f: mov [rdi + 8], cl; ret"
    program = assemble(code, "long")
    first, last = program.labels["f"], program.labels["f"] + 3
    sink = traced(vm, code, "long", TraceRequest(instructions=True, memory=True, place=(first, last)))
    assert set(sink.instructions()) == {first, last}
    assert len(sink.instructions()) == 10
    assert {one[0] for one in sink.accesses()} == {first, last}  # the store, and the ret
    sink = traced(vm, code, "long", TraceRequest(memory=True, data=(0x20008, 0x20008)))
    assert [(write, address) for _, write, address, _, _ in sink.accesses()] == [(STORE, 0x20008)] * 5
    sink = traced(vm, code, "long", TraceRequest(memory=True, data=(0, 0x1FFF)))
    assert sink.accesses() == []


def test_modes(vm):
    """From real to protected mode, and a filter for one of them."""
    code = """
        cli
        lgdt [gdtr]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .byte 0xea
        .word code32, 8
        gdtr: .word 15
        .long gdt
        gdt: .quad 0, 0x00cf9a000000ffff
        .code32
        code32: nop
        nop
        hlt
    """
    real = traced(vm, code, "real", TraceRequest(instructions=True, modes=frozenset({"real"})))
    both = traced(vm, code, "real", INSN)
    protected = traced(vm, code, "real", TraceRequest(instructions=True, modes=frozenset({"protected"})))
    user = traced(vm, code, "real", TraceRequest(instructions=True, privileges=frozenset({"user"})))
    assert len(real.instructions()) == 5 and len(protected.instructions()) == 4
    assert real.instructions() + protected.instructions() == both.instructions()
    assert user.records == []


# ---- what must not change


def final(one) -> tuple:
    states = []
    for name in VCPU_STATES:
        try:
            states.append((name, one.vcpu.get_state(name)))
        except Unsupported:
            pass
    return states, bytes(one.memory), one.vcpu.counters()["instructions"]


@hostile
@given(
    seed=st.integers(0, (1 << 64) - 1),
    kinds=st.sampled_from((INSN, MEM, EVENTS, ALL, TraceRequest(instructions=True, place=(0x1000, 0x1400)))),
)
def test_a_trace_changes_nothing_whatever_runs(seed, kinds):
    with box(irqchip=False) as plain:
        play(plain, random.Random(seed))
        expected = final(plain)
    with box(irqchip=False) as one:
        sink = Sink()
        one.vcpu.set_trace(kinds, sink)
        play(one, random.Random(seed))
        one.check()
        assert final(one) == expected
        if kinds in (INSN, ALL):
            assert len(sink.instructions()) == expected[2]


@hostile
@given(seed=st.integers(0, (1 << 64) - 1), mode=st.sampled_from(("real", "protected")))
def test_stores_done_again_give_the_same_memory(seed, mode):
    """Without paging: linear addresses are those of RAM."""
    dice = random.Random(seed)
    with box(irqchip=False) as one:
        set_mode(one.vcpu, Window(one.memory), 12 * PAGE, mode)
        at = 0x1000 + dice.randrange(PAGE)
        Window(one.memory).write(at, hostile_code(dice, dice.choice((16, 256, 3 * PAGE))))
        Window(one.memory).write(0, struct.pack("<I", at) * 256)  # handlers of real mode
        set_rip(one, at)
        memory = bytearray(one.memory)
        one.vcpu.set_trace(ALL, sink := Sink())
        for _ in range(40):  # an instruction that waits for its data may have stored, and will again
            if getattr(one.run(100), "direction", "") not in ("in", "read"):
                break
        if struct.unpack_from("<Q", one.vcpu.get_state("sregs"), 224)[0] >> 31:
            return  # it has switched paging on
        for _, write, address, data, _ in sink.accesses():
            for offset, byte in enumerate(data):
                where = address + offset & 0xFFFFFFFF
                if write and where < 12 * PAGE:
                    memory[4 * PAGE + where] = byte
        assert memory == one.memory


# ---- the sink


def test_what_the_sink_raises_ends_the_run(vm):
    vm.load(assemble("a: jmp a", "long"), "long")

    def sink(records: bytes, events: int, ended: bool) -> None:
        raise RuntimeError("no room")

    vm.vcpu.set_trace(INSN, sink)
    with pytest.raises(RuntimeError, match="no room"):
        vm.vcpu.run()
    vm.vcpu.clear_kick()
    vm.vcpu.set_trace(TraceRequest(), sink)
    assert vm.vcpu.run(budget=10).REASON == "limit"


def test_it_is_delivered_while_the_guest_runs(vm):
    vm.load(assemble("a: inc eax; jmp a", "long"), "long")
    came = threading.Event()

    def sink(records: bytes, events: int, ended: bool) -> None:
        if not ended:
            came.set()

    vm.vcpu.set_trace(INSN, sink)
    thread = threading.Thread(target=vm.vcpu.run)
    thread.start()
    try:
        assert came.wait(60)
    finally:
        vm.vcpu.kick()
        thread.join()


def test_a_halted_cpu_has_delivered(vm):
    """With interrupt controllers HLT is no exit."""
    with machine_on(EmulatorEngine(), irqchip=True) as machine:
        machine.load(assemble("nop; hlt", "long"), "long")
        came = threading.Event()
        machine.vcpu.set_trace(INSN, lambda records, events, ended: came.set())
        thread = threading.Thread(target=machine.vcpu.run)
        thread.start()
        try:
            assert came.wait(60)
        finally:
            machine.vcpu.kick()
            thread.join()
