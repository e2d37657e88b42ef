"""`Vm.move_to`: a machine goes on with another engine, in the middle of a program and back."""

import struct

import pytest
from engine.asm import ORIGIN
from engine.divergences import active

from vmfs.engine.base import Capability
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words.errors import Busy, Invalid, Unsupported

SECONDS = 30
SIZE = 2 << 20
LSTAR = 0xC0000082


@pytest.fixture
def vm(engine):
    vm = Vm(engine, memory_size=SIZE)
    yield vm
    vm.close()


def load(vm, program, mode="long"):
    vm.set_mode(mode)
    vm.memory.write(ORIGIN, program.code)
    set_rip(vm, ORIGIN)


def set_rip(vm, rip):
    def change(cpu):
        regs = bytearray(cpu.get_state("regs"))
        struct.pack_into("<Q", regs, 128, rip)
        cpu.set_state("regs", bytes(regs))

    vm.change(change)


def state(vm, name):
    return vm.at_boundary(lambda cpu: cpu.get_state(name)).result(SECONDS)


def rax(vm):
    return struct.unpack_from("<Q", state(vm, "regs"))[0]


def run(vm, bound=None):
    return vm.start(bound or Bound()).result(SECONDS)


def test_in_the_middle_of_a_program_and_back(vm, engine, other, assembler):
    program = assembler(
        f"""
            mov ecx, {LSTAR:#x}
            mov eax, 0x12345678
            mov edx, 0xffff8000
            wrmsr
            mov rax, 0x1122334455667788
            mov [0x3000], rax
            out 0x80, al
            mov rbx, [0x3000]
            rdmsr
            out 0x81, al
            mov rax, rbx
            hlt
        end:
        """,
        "long",
    )
    load(vm, program)
    assert run(vm).line().startswith("io direction=out port=0x80 ")
    before = {name: state(vm, name) for name in ("regs", "sregs", "xcrs", "debugregs", "mp_state")}
    vendor = state(vm, "cpuid")[24:36]  # of leaf 0; some other bits follow CR4 and XCR0
    vm.move_to(other)
    assert vm.engine is other
    assert state(vm, "cpuid")[24:36] == vendor
    assert {name: state(vm, name) for name in before} == before
    assert run(vm).line().startswith("io direction=out port=0x81 size=1 count=1 data=0x78 ")
    vm.move_to(engine)
    assert run(vm).line() == f"hlt rip={program.labels['end']:#x}"
    assert vm.state == "halted"
    assert rax(vm) == 0x1122334455667788


def test_16_bit_code_beyond_64_kib(vm, engine, other, assembler):
    """EIP is above FFFF in a 16-bit segment: got, set and gone on with by each engine."""
    program = assembler(
        """
            lgdt [gdtr]
            ljmp 8, 0x10000 - 3
        .balign 8
        gdt: .quad 0, 0x00019a020000ffff    # 16-bit code: base 20000, limit 1FFFF
        gdtr: .word . - gdt - 1
              .long gdt
        .code16
        .org 0x30000 - 3 - 0x1000
            mov al, 1
            nop
            out 0x80, al
            nop
            out 0x81, al
            hlt
        """,
        "protected",
    )
    load(vm, program, "protected")
    assert run(vm).line() == "io direction=out port=0x80 size=1 count=1 data=0x1 rip=0x10002"
    vm.move_to(other)
    assert struct.unpack_from("<Q", state(vm, "regs"), 128) == (0x10002,)
    assert run(vm).line() == "io direction=out port=0x81 size=1 count=1 data=0x1 rip=0x10005"
    assert run(vm).line() == "hlt rip=0x10006"
    vm.move_to(engine)
    set_rip(vm, 0x10002)
    assert run(vm).line() == "io direction=out port=0x81 size=1 count=1 data=0x1 rip=0x10005"


# The MTRRs, machine check banks, IA32_MCG_STATUS, IA32_MISC_ENABLE, IA32_POWER_CTL, HWCR
KEPT = {
    0x200: 0x6, 0x201: 0x8000000800, 0x250: 0x0606060606060606, 0x2FF: 0xC06, 0x277: 0x0007010600070106,
    0x400: 2**64 - 1, 0x47E: 0x1234, 0x17A: 4, 0x1A0: 0x41801, 0x1FC: 2, 0xC0010015: 1 << 24,
}  # fmt: skip


def test_msrs_go_along_there_and_back_and_a_reset_sets_them_back(vm, engine, other):
    vm.set_mode("long")

    def put(cpu):
        for index, value in KEPT.items():
            cpu.set_msr(index, value)

    def values(cpu):
        return {index: cpu.get_msr(index) for index in KEPT}

    fresh = vm.at_boundary(values).result(SECONDS)
    vm.change(put)
    for target in (other, engine):
        vm.move_to(target)
        assert vm.at_boundary(values).result(SECONDS) == KEPT
    vm.reset()
    assert vm.at_boundary(values).result(SECONDS) == fresh


def test_of_a_new_machine(vm, other):
    """The CPUID is the new engine's then: nobody has seen the old one's."""
    theirs = Vm(other, memory_size=SIZE)
    try:
        made = state(theirs, "cpuid")
    finally:
        theirs.close()
    vm.move_to(other)
    assert state(vm, "cpuid") == made
    vm.reset()
    assert struct.unpack_from("<Q", state(vm, "regs"), 128) == (0xFFF0,)


def test_in_the_middle_of_an_in(vm, engine, other, assembler):
    """The read goes on waiting, with the bytes that it was given, there and back."""
    program = assembler("mov eax, 1; l0: in al, 0x80; mov bl, al; in ax, 0x82; hlt; end:", "long")
    load(vm, program)
    line = f"io direction=in port=0x80 size=1 count=1 rip={program.labels['l0']:#x}"
    assert run(vm).line() == line
    vm.move_to(other)
    assert vm.access_data == b"\xff" and vm.last_exit.line() == line
    vm.set_access_data(b"\x07")
    assert rax(vm) == 1
    vm.move_to(engine)
    assert vm.access_data == b"\x07"
    assert run(vm).line().startswith("io direction=in port=0x82 size=2 ")
    vm.set_access_data(b"\x34\x12")
    vm.move_to(other)
    assert run(vm).line() == f"hlt rip={program.labels['end']:#x}"
    assert rax(vm) == 0x1234 and state(vm, "regs")[8] == 7


def test_in_the_middle_of_a_string_from_a_port(vm, engine, other, assembler):
    """The engines ask for other numbers of elements: all that one was given arrives, once and in order."""
    load(vm, assembler("mov edi, 0x8000; mov ecx, 9; mov dx, 0x80; rep insw; hlt", "long"))
    given, engines = b"", [other, engine]
    while (exit_ := run(vm)).REASON == "io":
        data = bytes(range(len(given) + 1, len(given) + 1 + exit_.size * exit_.count))
        vm.set_access_data(data)
        given += data
        engines.reverse()
        vm.move_to(engines[0])
    assert exit_.REASON == "hlt" and len(given) == 18
    assert vm.memory.read(0x8000, 19) == given + b"\0"


def test_in_the_middle_of_a_load_and_a_store_over_two_pages(vm, engine, other, assembler):
    edge = 4 << 20
    program = assembler(
        f"mov rdi, {edge - 4:#x}; mov rax, [rdi]; mov rbx, rax; mov [rdi], rbx; mov rsi, {edge - 0x100:#x};"
        f"mov rdi, 0x8000; mov ecx, 2; rep movsq; hlt",
        "long",
    )
    load(vm, program)
    engines = [other, engine]
    lines, values = [], iter(range(1, 9))
    while (exit_ := run(vm)).REASON == "mmio":
        lines.append((exit_.direction, exit_.addr, exit_.size, exit_.data))
        if exit_.direction == "read":
            vm.set_access_data(bytes([next(values)]) * exit_.size)
        engines.reverse()
        vm.move_to(engines[0])
    assert exit_.REASON == "hlt"
    assert lines == [
        ("read", edge - 4, 4, b""), ("read", edge, 4, b""),
        ("write", edge - 4, 4, b"\1" * 4), ("write", edge, 4, b"\2" * 4),
        ("read", edge - 0x100, 8, b""), ("read", edge - 0xF8, 8, b""),
    ]  # fmt: skip
    assert vm.memory.read(0x8000, 17) == b"\3" * 8 + b"\4" * 8 + b"\0"


def test_in_the_middle_of_a_repeated_string(vm, engine, other, assembler):
    load(vm, assembler("mov esi, 0x8000; mov edi, 0x10001; mov ecx, 0x7000; mov eax, 5; rep movsb; hlt; end:", "long"))
    vm.memory.write(0x8000, bytes(range(251)) * 150)
    wanted = vm.memory.read(0x8000, 0x7000)
    if Capability.BUDGET in vm.capabilities:
        run(vm, Bound(instructions=1000))
        assert 0 < struct.unpack_from("<Q", state(vm, "regs"), 16)[0] < 0x7000
    vm.move_to(other)
    assert run(vm).REASON == "hlt"
    assert vm.memory.read(0x10001, 0x7001) == wanted + b"\0"


def test_vectors_that_wait_and_points_go_along(vm, other, assembler):
    program = assembler(
        "mov word ptr [0x80], offset handler; mov word ptr [0x82], 0; mov sp, 0x8000; mov si, 0x3000; hlt;"
        "sti; mov cx, 10000; wait: cmp si, 0x3002; je done; loop wait; done: cli;"
        "nop; l1: nop; hlt; end: handler: mov byte ptr [si], 0x20; inc si; iret",
        "real",
    )
    load(vm, program, "real")
    assert run(vm).REASON == "hlt"
    vm.interrupt(0x20)
    vm.interrupt(0x20)
    vm.set_points(lambda points: points.add_break(program.labels["l1"])).result(SECONDS)
    vm.move_to(other)
    assert vm.interrupts_queued == 2
    assert run(vm).line() == f"debug cause=breakpoint id=1 rip={program.labels['l1']:#x}"
    assert vm.interrupts_queued == 0
    assert vm.memory.read(0x3000, 3) == b"\x20\x20\0"
    assert run(vm).line() == f"hlt rip={program.labels['end']:#x}"


def test_what_was_written_stays_in_the_dirty_log(vm, other, assembler):
    load(vm, assembler("mov [0x8000], al; hlt; mov [0x20000], al; hlt", "protected"), "protected")
    vm.take_dirty("file")
    run(vm)
    vm.move_to(other)
    run(vm)
    log = vm.take_dirty("file")
    assert [page for page in range(SIZE >> 12) if log[page // 8] & 1 << page % 8] == [0x8, 0x20]


def test_a_running_machine_does_not_move(vm, engine, other, assembler):
    load(vm, assembler("again: jmp again", "long"))
    running = vm.start()
    with pytest.raises(Busy):
        vm.move_to(other)
    assert vm.engine is engine
    vm.stop()
    assert running.result(SECONDS).REASON == "interrupted"


def test_what_is_counted_goes_on(vm, engine, other, assembler):
    load(vm, assembler("nop; nop; out 0x80, al; nop; out 0x80, al; hlt", "long"))
    run(vm)
    before = vm.counters().get("instructions")
    vm.move_to(other)
    run(vm)
    vm.move_to(engine)
    counted = 1 + (other.name == "emulator")  # parts of the program that an engine with a counter has run
    if before is not None:
        assert before == 3 and vm.counters()["instructions"] == (3 if counted == 1 else 5)


class NoPoints:
    """An engine that can watch for nothing."""

    def __init__(self, engine):
        self._engine = engine
        self.name = "no-points"

    def create_machine(self):
        machine = self._engine.create_machine()
        create = machine.create_vcpu

        def create_vcpu(index):
            vcpu = create(index)

            def set_debug(request):
                raise Unsupported("nothing can be watched for")

            vcpu.set_debug = set_debug
            return vcpu

        machine.create_vcpu = create_vcpu
        return machine


def test_a_refused_move_changes_nothing(vm, engine, assembler):
    program = assembler("l0: in al, 0x80; hlt", "long")
    load(vm, program)
    run(vm)
    vm.set_access_data(b"\x31")
    vm.set_points(lambda points: points.add_break(program.labels["l0"])).result(SECONDS)
    regs = state(vm, "regs")
    with pytest.raises(Unsupported, match="nothing can be watched for"):
        vm.move_to(NoPoints(engine))
    assert vm.engine is engine
    assert vm.access_data == b"\x31"
    assert state(vm, "regs") == regs
    assert run(vm).REASON == "hlt"
    assert rax(vm) & 0xFF == 0x31


def test_a_change_that_fails_is_taken_back_whole(vm, assembler):
    load(vm, assembler("in al, 0x80; hlt", "long"))
    for ran in (False, True):  # the second time a read waits
        before = {name: state(vm, name) for name in ("regs", "sregs", "xcrs", "xsave", "debugregs")}

        def change(cpu, before=before):
            cpu.set_state("regs", bytes(8) + before["regs"][8:])
            cpu.set_state("debugregs", (1 << 40).to_bytes(8, "little") + before["debugregs"][8:])
            sregs = bytearray(before["sregs"])
            struct.pack_into("<Q", sregs, 264, 1 << 60)  # EFER
            cpu.set_state("sregs", bytes(sregs))

        with pytest.raises(Invalid):
            vm.change(change)
        assert {name: state(vm, name) for name in before} == before
        assert vm.access_data == (b"\xff" if ran else b"")
        if not ran:
            run(vm)
    vm.set_access_data(b"\x05")
    assert run(vm).REASON == "hlt" and rax(vm) & 0xFF == 5


def test_a_reset_leaves_nothing_of_a_cpu(vm, assembler):
    load(vm, assembler("mov dword ptr [0x300000], 5; in al, 0x80; hlt", "long"))
    fresh = {name: state(vm, name) for name in ("xsave", "events", "debugregs")}
    xsave = bytearray(fresh["xsave"])
    xsave[512:520] = (7).to_bytes(8, "little")
    xsave[160:176] = b"x" * 16
    try:
        vm.change(lambda cpu: cpu.set_state("xsave", bytes(xsave)))
    except Invalid:
        pytest.skip("the host's CPU has no YMM registers")
    run(vm)  # with a store that is an exit, and one that is left
    vm.nmi()
    vm.reset()
    assert {name: state(vm, name) for name in fresh} == fresh
    assert vm.access_data in (b"", b"\5\0\0\0") and not vm.cpu.vcpu.exits_waiting


DEADLINE = """
    mov dword ptr [0x8000], 0x00086000; lea rax, [rip + tick]; mov [gate], ax
    lidt [table]; mov esp, 0x7000; mov edx, 0xfee00000; mov dword ptr [rdx + 0xf0], 0x1ff
    mov dword ptr [rdx + 0x320], 0x40040; mov ecx, 0x6e0; rdtsc; add eax, 1000000000; adc edx, 0; wrmsr
    out 0x80, al; sti; hlt; mov dx, 0xf4; mov al, 1; out dx, al
tick: mov dx, 0xf4; mov al, 2; out dx, al
    .balign 8
table: .word 0x40 * 16 + 15; .quad gate - 0x40 * 16
    .balign 16
gate: .word 0, 0x8, 0x8e00, 0; .quad 0
"""


def test_a_tsc_deadline_goes_along(engine, other, assembler):
    vm = Vm(engine, memory_size=SIZE)
    try:
        vm.set_machine("pc")
        program = assembler(DEADLINE, "long")
        load(vm, program)
        selector = int.from_bytes(state(vm, "sregs")[12:14], "little")
        vm.memory.write(program.labels["gate"] + 2, selector.to_bytes(2, "little"))
        vm.set_points(lambda points: points.add_iobreak(0x80, 0x80)).result(SECONDS)
        assert run(vm).line().startswith("debug cause=io ")
        left = vm.at_boundary(lambda cpu: cpu.get_msr(0x6E0) - cpu.get_msr(0x10)).result(SECONDS)
        vm.move_to(other)
        there = vm.at_boundary(lambda cpu: cpu.get_msr(0x6E0) - cpu.get_msr(0x10)).result(SECONDS)
        if "pvm-tsc-is-the-hosts" not in active(other.name):  # else it may be over at once
            assert left >= there > 0
        assert run(vm).line().startswith("shutdown cause=debug-exit code=5 ")
    finally:
        vm.close()


def test_a_machine_that_has_moved_is_reset(engine, other, assembler):
    """Its CPUID is that of the engine where it has run, and some MSRs of the other one are not there, or constant."""
    vm = Vm(engine, memory_size=SIZE)
    try:
        load(vm, assembler("out 0x80, al", "long"))
        run(vm)
        vm.move_to(other)
        vm.reset()
        regs = state(vm, "regs")
        assert struct.unpack_from("<Q", regs, 128)[0] == 0xFFF0 and vm.state == "paused"
    finally:
        vm.close()


def test_msrs_are_tried_without_effect(engine, assembler):
    """A deadline that is past by the present TSC is none by that which is set with it."""
    vm = Vm(engine, memory_size=SIZE)
    try:
        if Capability.DETERMINISTIC not in vm.capabilities:
            pytest.skip("time goes on by itself")
        vm.set_machine("pc")
        vm.set_time_source("instructions")
        program = assembler(DEADLINE, "long")
        load(vm, program)
        vm.set_points(lambda points: points.add_iobreak(0x80, 0x80)).result(SECONDS)
        assert run(vm).line().startswith("debug cause=io ")
        msrs, lapic = state(vm, "msrs"), state(vm, "lapic")
        vm.change(lambda cpu: cpu.set_msr(0x10, 1 << 50))
        vm.change(lambda cpu: cpu.set_state("lapic", lapic))
        vm.change(lambda cpu: cpu.set_state("msrs", msrs))
        assert state(vm, "lapic")[0x200:0x280] == lapic[0x200:0x280]
    finally:
        vm.close()
