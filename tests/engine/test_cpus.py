"""Several CPUs: started by INIT and SIPI, stopped together, stepped one by one; locks, interrupts, time."""

import struct
import threading
import time

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.debug.points import Options
from vmfs.debug.trace import TraceText
from vmfs.engine.base import Capability
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words import exits
from vmfs.words.errors import Busy, Invalid, Unsupported
from vmfs.words.registers import write_registers

SECONDS = 60
SIZE = 2 << 20
ENTRY = 0x1000
COUNTERS = 0x8000

# The first CPU, in real mode with DS reaching the LAPIC, starts the others at 0x2000 (Intel SDM 3A 9.4.4.1).
START = """
    cli; xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax; mov sp, 0x7000
    lgdt [gdtr]
    mov eax, cr0; or al, 1; mov cr0, eax
    mov bx, 8; mov ds, bx
    and al, 0xfe; mov cr0, eax
    xor ax, ax; mov ds, ax
    mov esi, 0xfee00000
    mov dword ptr [esi + 0xf0], 0x1ff
    mov dword ptr [esi + 0x300], 0xc4500
    mov dword ptr [esi + 0x300], 0xc4602
"""
# So that a CPU that starts reaches its LAPIC, too: DS keeps the limit of 4 GiB in real mode.
UNREAL = """
    cli; xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax
    lgdt [gdtr]
    mov eax, cr0; or al, 1; mov cr0, eax
    mov bx, 8; mov ds, bx
    and al, 0xfe; mov cr0, eax
    xor ax, ax; mov ds, ax
    mov esi, 0xfee00000
    mov dword ptr [esi + 0xf0], 0x1ff
"""
GDT = """
    .balign 8
gdt: .quad 0, 0x008f92000000ffff
gdtr: .word 15
    .long gdt
"""


def program(first: str, others: str) -> str:
    return f"{START}\n{first}\n{GDT}\n.org 0x1000\n{others}\n"


@pytest.fixture
def make(engine, assembler):
    """A PC of so many CPUs with a program, at its beginning."""
    made = []

    def make(count: int, source: str, **symbols) -> Vm:
        if Capability.IRQCHIP not in engine_capabilities(engine):
            pytest.skip("no interrupt controllers")
        vm = Vm(engine, memory_size=SIZE)
        made.append(vm)
        vm.set_machine("pc")
        vm.set_cpu_count(count)
        load(vm, assembler(source, "real").code)
        return vm

    yield make
    for vm in made:
        vm.close()


def engine_capabilities(engine):
    machine = engine.create_machine()
    try:
        return machine.capabilities
    finally:
        machine.close()


def load(vm: Vm, code: bytes, cpu: int = 0, at: int = ENTRY) -> None:
    vm.memory.write(at, code)
    vm.set_mode("real")
    vm.change(lambda one: write_registers(one, {"rip": at}), cpu=cpu)


def result(run) -> exits.Exit:
    return run.result(SECONDS)


def words(vm: Vm, at: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}I", vm.memory.read(at, 4 * count))


LOCKS = """
    mov ecx, {rounds}
    1: lock inc dword ptr [0x8000]
    mov eax, 3
    lock xadd dword ptr [0x8004], eax
    2: mov eax, [0x8008]; lea ebx, [eax + 5]
    lock cmpxchg dword ptr [0x8008], ebx
    jne 2b
    mov al, 1
    3: xchg al, [0x8010]; test al, al; jz 4f; pause; jmp 3b
    4: add dword ptr [0x800c], 7
    mov byte ptr [0x8010], 0
    loopd 1b
    lock inc dword ptr [0x8014]
"""
WAIT_FOR_ALL = "1: pause; cmp dword ptr [0x8014], {count}; jne 1b; mov dx, 0xf4; xor eax, eax; out dx, eax; cli; hlt"


@pytest.mark.parametrize("count", [2, 4])
def test_no_update_is_lost(make, count):
    rounds = 300
    locks = LOCKS.format(rounds=rounds)
    others = f"xor ax, ax; mov ds, ax; {locks} cli; 9: hlt; jmp 9b"
    source = program(locks + WAIT_FOR_ALL.format(count=count), others)
    vm = make(count, source)
    assert result(vm.start()).line().startswith("shutdown cause=debug-exit ")
    n = count * rounds
    assert words(vm, COUNTERS, 4) == (n, 3 * n, 5 * n, 7 * n)


IPIS = """
    mov word ptr [0x41 * 4], offset handler
    mov word ptr [0x41 * 4 + 2], 0
    1: pause; cmp dword ptr [0x8014], {others}; jne 1b
    mov ecx, 20
    again: push ecx
    mov eax, [0x8000]; add eax, {others}; mov edi, eax
    mov dword ptr [esi + 0x300], 0xc4041    # fixed, vector 0x41, to all others
    2: pause; cmp [0x8000], edi; jne 2b
    pop ecx
    loopd again
    mov dword ptr [esi + 0x310], 0x01000000
    mov dword ptr [esi + 0x300], 0x4041     # to APIC id 1
    3: pause; cmp dword ptr [0x8000], {all}; jne 3b
    mov dx, 0xf4; out dx, al; cli; hlt
    handler: lock inc dword ptr [0x8000]
    mov dword ptr [esi + 0xb0], 0
    iret
"""


def test_interrupts_between_cpus_wake_them(make):
    count = 3
    first = IPIS.format(others=count - 1, all=20 * (count - 1) + 1)
    others = UNREAL.replace("cli;", "cli; mov sp, 0x6000;") + """
        mov eax, [esi + 0x20]; shr eax, 24; shl eax, 8      # a stack of its own
        sub sp, ax
        lock inc dword ptr [0x8014]
        1: sti; hlt; jmp 1b
    """
    vm = make(count, program(first, others))
    assert result(vm.start()).line().startswith("shutdown cause=debug-exit ")
    assert words(vm, COUNTERS, 1) == (20 * (count - 1) + 1,)


# As Linux looks for a TSC that warps: a CPU that has the lock finds no TSC later than its own.
TSC = """
    mov ecx, {rounds}
    1: mov al, 1
    2: xchg al, [0x8010]; test al, al; jz 3f; pause; jmp 2b
    3: rdtsc
    cmp edx, [0x8004]; jb 4f; ja 5f; cmp eax, [0x8000]; jae 5f
    4: inc dword ptr [0x8008]
    5: mov [0x8000], eax; mov [0x8004], edx
    mov byte ptr [0x8010], 0
    loopd 1b
    lock inc dword ptr [0x8014]
"""


@pytest.mark.parametrize("source", ["host", "instructions"])
def test_the_tsc_of_all_is_in_step(make, source):
    """When CPUs are added, after a reset, and after a value was put."""
    tsc = TSC.format(rounds=1500)
    vm = make(1, program(tsc + WAIT_FOR_ALL.format(count=3), f"xor ax, ax; mov ds, ax; {tsc} cli; 9: hlt; jmp 9b"))
    if source == "instructions":
        if Capability.DETERMINISTIC not in vm.capabilities:
            pytest.skip("its time is the host's")
        vm.set_time_source(source)
    time.sleep(0.02)  # the first one is older
    vm.set_cpu_count(3)

    def reset():
        vm.reset()
        vm.change(lambda cpu: write_registers(cpu, {"cs": 0, "cs.base": 0, "rip": ENTRY}))

    def put():
        reset()
        vm.put(vm.take().result(SECONDS))

    for prepare in (lambda: None, reset, put):
        vm.memory.write(COUNTERS, bytes(32))
        prepare()
        assert result(vm.start()).line().startswith("shutdown cause=debug-exit ")
        assert words(vm, COUNTERS + 8, 1) == (0,)


ENDLESS = program(
    "1: lock inc dword ptr [0x8000]; jmp 1b",
    """xor ax, ax; mov ds, ax; mov eax, 1; lock xadd dword ptr [0x8020], eax
    1: inc dword ptr [0x8004 + eax * 4]; jmp 1b""",
)


def test_all_stop_together(make):
    vm = make(3, ENDLESS)
    for _ in range(5):
        assert isinstance(result(vm.start(Bound(seconds=0.1))), exits.Limit)
        before = words(vm, COUNTERS, 3)
        time.sleep(0.02)
        assert words(vm, COUNTERS, 3) == before
    assert all(before)


def test_a_stop_says_whose_it_is_and_holds_on_one(make):
    vm = make(3, ENDLESS)
    result(vm.start(Bound(seconds=0.2)))
    rips = [vm.at_boundary(rip, cpu).result() for cpu in range(3)]
    assert rips[0] >> 12 == 1 and {one >> 12 for one in rips[1:]} == {0}  # CS has base 0x2000 there
    # The last instruction of the others' loop, a jump of two bytes, stands where one of them will come by.
    code = vm.memory.read(0x2000, 64)
    jump = 0x2000 + code.rindex(b"\xeb")
    for cpu in (1, 2):
        vm.set_points(lambda points: points.delete_all()).result()
        vm.set_points(lambda points, cpu=cpu: points.add_break(jump, Options(cpu=cpu))).result()
        for _ in range(3):
            stop = result(vm.start())
            assert isinstance(stop, exits.Debug) and stop.cpu == cpu and stop.cause == "breakpoint"
            assert stop.line().endswith(f" cpu={cpu}")
    seen = set()
    for _ in range(100):
        vm.set_points(lambda points: points.delete_all()).result()
        result(vm.start(Bound(seconds=0.005)))
        vm.set_points(lambda points: points.add_break(jump)).result()
        seen.add(result(vm.start()).cpu)
        if len(seen) == 2:
            break
    assert seen == {1, 2}
    with pytest.raises(Invalid):
        vm.set_points(lambda points: points.add_break(0x1234, Options(cpu=3))).result()


def rip(cpu) -> int:
    return struct.unpack_from("<Q", cpu.get_state("regs"), 128)[0]


def test_one_steps_while_the_others_stand(make):
    vm = make(3, ENDLESS)
    result(vm.start(Bound(seconds=0.2)))
    regs = lambda: [vm.at_boundary(lambda one: one.get_state("regs"), cpu).result() for cpu in range(3)]  # noqa: E731
    for cpu in (2, 0, 1):
        for steps in (1, 3):
            before = regs()
            stop = result(vm.start(Bound(steps=steps, cpu=cpu)))
            assert isinstance(stop, exits.Debug) and stop.cause == "step" and stop.cpu == cpu
            after = regs()
            assert [one for one in range(3) if before[one] != after[one]] == [cpu]
    assert result(vm.start(Bound(steps=1))).cpu == 1  # the one that stopped last
    with pytest.raises(Invalid):
        vm.start(Bound(steps=1, cpu=3))


def test_state_of_each_while_they_run(make):
    vm = make(3, ENDLESS)
    run = vm.start()
    for _ in range(20):
        futures = [vm.at_boundary(rip, cpu) for cpu in (0, 1, 2)]
        seen = [future.result(SECONDS) for future in futures]
    assert seen[0] >> 12 == 1
    vm.stop(run)
    assert isinstance(result(run), exits.Interrupted)


def test_cpus_are_fixed_by_the_first_run(make):
    vm = make(2, ENDLESS)
    with pytest.raises(Invalid):
        vm.set_cpu_count(0)
    with pytest.raises(Invalid):
        vm.set_cpu_count(65)
    result(vm.start(Bound(seconds=0.05)))
    vm.set_cpu_count(2)
    with pytest.raises(Busy):
        vm.set_cpu_count(3)
    assert len(vm.cpus) == 2


def test_the_states_of_cpus(make):
    """Which wait for their SIPI, which halt."""
    vm = make(3, "cli; mov dx, 0xf4; out dx, al; 1: jmp 1b")
    assert [vm.cpu_state(cpu).result() for cpu in range(3)] == ["running\n", "wait-for-sipi\n", "wait-for-sipi\n"]
    halting = program("1: pause; cmp dword ptr [0x8000], 2; jne 1b; 2: jmp 2b",
                      "xor ax, ax; mov ds, ax; lock inc dword ptr [0x8000]; cli; 1: hlt; jmp 1b")
    vm = make(3, halting)
    result(vm.start(Bound(seconds=1)))
    assert [vm.cpu_state(cpu).result() for cpu in range(3)] == ["running\n", "halted\n", "halted\n"]


def test_reset_starts_over(make):
    vm = make(3, ENDLESS)
    made = [cpu.vcpu.get_state("mp_state") for cpu in vm.cpus]
    result(vm.start(Bound(seconds=0.1)))
    vm.reset()
    assert [cpu.vcpu.get_state("mp_state") for cpu in vm.cpus] == made


def test_cpuid_tells_of_the_others(make):
    vm = make(6, ENDLESS)
    for cpu in vm.cpus:
        data = cpu.vcpu.get_state("cpuid")
        leaves = {one[:2]: one[3:7] for one in struct.iter_unpack("<7I12x", data[8:])}
        eax, ebx, ecx, edx = leaves[1, 0]
        assert ebx >> 24 == cpu.index and ebx >> 16 & 0xFF == 8 and edx >> 28 & 1
        assert leaves[0xB, 0] == (0, 1, 0x100, cpu.index)
        assert leaves[0xB, 1] == (3, 6, 0x201, cpu.index)
        assert leaves[0x8000_0008, 0][2] & 0xFF == 5


def test_a_closed_machine_of_several_ends_its_run(make):
    vm = make(4, ENDLESS)
    run = vm.start()
    time.sleep(0.05)
    done = threading.Thread(target=vm.close, daemon=True)
    done.start()
    done.join(SECONDS)
    assert not done.is_alive() and run.exception(SECONDS) is not None


def test_a_machine_of_several_as_a_value(make):
    """It goes on in another one; a last exit of a CPU that there is not is refused."""
    one, other = make(2, ENDLESS), make(2, ENDLESS)
    result(one.start(Bound(seconds=0.1)))
    assert one.last_exit.cpu < 2
    other.memory.write(0, one.memory.read(0, SIZE))
    state = one.take().result(SECONDS)
    other.put(state)
    assert [rip(cpu.vcpu) for cpu in other.cpus] == [rip(cpu.vcpu) for cpu in one.cpus]
    before = words(other, COUNTERS, 2)
    assert isinstance(result(other.start(Bound(seconds=0.2))), exits.Limit)
    assert all(now != then for now, then in zip(words(other, COUNTERS, 2), before, strict=True))
    seen = msgspec.structs.replace(one.save_seen(), last_exit="hlt rip=0x0 cpu=2")
    with pytest.raises(Invalid):
        other.check_seen(seen)


# ---- in turn: the same to the instruction


def whole(vm: Vm) -> list[bytes]:
    """What there is of the CPUs, RAM, chips and turns."""
    states = [cpu.vcpu.get_state(name) for cpu in vm.cpus for name in ("regs", "sregs", "mp_state", "lapic", "msrs")]
    return [*states, vm.memory.read(0, SIZE), *(vm._machine.get_state(name) for name in ("turns", "clock"))]


@pytest.fixture
def in_turn(make):
    def make_one(count: int, source: str) -> Vm:
        vm = make(count, source)
        if Capability.DETERMINISTIC not in vm.capabilities:
            pytest.skip("CPUs execute at the same time")
        vm.set_time_source("instructions")
        return vm

    return make_one


def test_two_runs_are_the_same_however_often_one_is_stopped(in_turn):
    one, other = in_turn(4, ENDLESS), in_turn(4, ENDLESS)
    total = 2_000_000
    result(one.start(Bound(instructions=total)))
    left, pieces = total, 0
    while left:
        run = other.start(Bound(instructions=min(left, 98_765)))
        if pieces % 3:
            other.at_boundary(lambda cpu: None, pieces % 4).result(SECONDS)
        before = left
        result(run)
        left = total - other.counters()["instructions"] + 0
        assert left < before
        pieces += 1
    assert one.counters()["instructions"] == other.counters()["instructions"] == total
    assert whole(one) == whole(other)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.tuples(st.just("insns"), st.integers(1, 60_000)), st.tuples(st.just("kick"), st.just(0))),
                min_size=1, max_size=12))
def test_stops_change_nothing(in_turn, acts):
    """Runs cut anywhere, or stopped by another thread at any moment, come to where one run in one piece comes."""
    cut, piece = in_turn(3, ENDLESS), in_turn(3, ENDLESS)
    for kind, count in acts:
        if kind == "insns":
            result(cut.start(Bound(instructions=count)))
        else:
            run = cut.start()
            cut.stop(run)
            assert isinstance(result(run), exits.Interrupted)
    done = cut.counters()["instructions"]
    if done:
        result(piece.start(Bound(instructions=done)))
    assert whole(cut) == whole(piece)


def test_what_counts_on_an_engine_that_cannot_count(make):
    vm = make(2, ENDLESS)
    if Capability.BUDGET in vm.capabilities:
        result(vm.start(Bound(instructions=5000)))
        assert vm.counters()["instructions"] == 5000
    else:
        with pytest.raises(Unsupported):
            vm.start(Bound(instructions=5000))


def test_a_trace_says_whose_its_records_are(engine, assembler):
    """Read in pieces of a few records, with the exits in between."""
    code = assembler("one: inc eax; jmp one; .org 0x100; other: inc ebx; nop; out 0x80, al; jmp other", "real")
    vm = Vm(engine, memory_size=SIZE)
    try:
        vm.set_cpu_count(2)
        vm.memory.write(0, code.code)
        for cpu, at in zip(vm.cpus, (0, 0x100), strict=True):
            values = {"cs.base": 0, "cs": 0, "rip": at}
            vm.change(lambda vcpu, values=values: write_registers(vcpu, values), cpu=cpu.index)
        vm.set_trace(lambda settings: settings.switch("insn", True).switch("exits", True)).result(SECONDS)
        reader, text = vm.trace.buffer.open(), TraceText(lambda: vm.symbols)
        lines = []
        for _ in range(10):
            assert result(vm.start()).line().startswith("io direction=out port=0x80 ")
            while piece := vm.trace.buffer.take(reader, 96):
                made = text.lines(piece.data)
                lines += (made if piece.text is None else piece.text).decode().splitlines()
    finally:
        vm.close()
    assert all(line.endswith(("cpu=0", "cpu=1")) for line in lines)
    exits_of = [line for line in lines if line.startswith("exit ")]
    assert len(exits_of) == 10 and all(line.endswith("cpu=1") for line in exits_of)
    found = {(int(line.split()[1], 16) >= 0x100, line[-1]) for line in lines if line.startswith("insn")}
    assert found == {(False, "0"), (True, "1")}
