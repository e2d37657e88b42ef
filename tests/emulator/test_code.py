"""Code that changes while it is cached, exact budgets, and what only the core can stop for."""

from __future__ import annotations

import random
import struct
import threading

import pytest
from engine import asm
from engine.asm import ORIGIN, assemble
from engine.machine import RAM, REGS, machine_on

from vmfs.engine.base import DebugRequest
from vmfs.words.errors import EngineFailed
from vmfs.words.exits import Exit
from vmfs.words.stops import Breakpoint, Watchpoint

_core = pytest.importorskip("vmfs.engine.emulator._core")
from vmfs.engine.emulator.engine import EmulatorEngine  # noqa: E402

pytestmark = asm.needs_assembler
PAGE = 4096
HIGH = 0x100000


@pytest.fixture
def vm():
    with machine_on(EmulatorEngine()) as machine:
        yield machine


def to_hlt(vm) -> Exit:
    exit_ = vm.vcpu.run(budget=100_000)
    assert exit_.REASON == "hlt", exit_.line()
    return exit_


# ---- code that changes


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_a_store_into_the_next_instruction(vm, mode):
    """Intel SDM 3A 8.1.3: on the processor that stores, without a jump in between."""
    vm.load(
        assemble("mov cx, 5; again: mov byte ptr [l1 + 1], 7; l1: mov al, 1; dec cx; jnz again; hlt", mode),
        mode,
    )
    to_hlt(vm)
    assert vm.regs()["rax"] & 0xFF == 7


def test_a_store_into_the_running_trace_each_time_round(vm):
    code = """
        mov ecx, 200
        xor ebx, ebx
    again:
        mov [rip + l1 + 1], ecx
        nop
    l1: mov eax, 0
        add ebx, eax
        dec ecx
        jnz again
        hlt
    """
    vm.load(assemble(code, "long"), "long")
    to_hlt(vm)
    assert vm.regs()["rbx"] == 200 * 201 // 2


def test_a_string_store_over_the_code_behind_it(vm):
    """Five times inc eax (0xff 0xc0) over five times nop, nop."""
    vm.load(
        assemble(
            "cld; mov edi, offset l1; mov ax, 0xc0ff; mov cx, 5; rep stosw; xor eax, eax; l1:"
            + "nop;" * 10
            + "hlt",
            "protected",
        ),
        "protected",
    )
    to_hlt(vm)
    assert vm.regs()["rax"] == 5


@pytest.mark.parametrize("first", range(1, 5))
def test_an_instruction_over_the_end_of_a_page(vm, first):
    """`mov eax, imm32` with `first` bytes on the first page; bytes of either page change."""
    at = 0x3000 - first
    vm.ram.write(at, b"\xb8\x11\x22\x33\x44\xc3")
    program = assemble(
        f"mov esp, 0x8000; mov esi, {at}; call esi; mov ebx, eax;"
        f"mov byte ptr [{at + 4}], 0x55; call esi; mov ecx, eax;"
        f"mov byte ptr [{at}], 0xba; call esi; hlt; call esi; hlt",
        "protected",
    )
    vm.load(program, "protected")
    to_hlt(vm)
    regs = vm.regs()
    assert (regs["rbx"], regs["rcx"], regs["rdx"]) == (0x44332211, 0x55332211, 0x55332211)
    vm.ram.write(at + 4, b"\x66")  # by a client, on the second page
    to_hlt(vm)
    assert vm.regs()["rdx"] == 0x66332211


def test_the_second_page_is_mapped_elsewhere(vm):
    """The same linear instruction over two pages, its second page first one, then another."""
    vm.load(
        assemble("mov esi, 0x5fff; call rsi; hlt; mov rax, cr3; mov cr3, rax; call rsi; hlt", "long"), "long"
    )
    vm.set_regs(rsp=0x8000)
    vm.ram.write(0x5FFF, b"\xb8\x01\0\0\0\xc3")
    to_hlt(vm)
    assert vm.regs()["rax"] == 1
    # A table of 4 KiB pages at 0x20000 in place of the first large page, with page 6 at 0x9000.
    vm.ram.write(0x9000, b"\x02\0\0\0\xc3")
    pages = {page: page << 12 for page in range(512)} | {6: 0x9000}
    vm.ram.write(0x20000, struct.pack("<512Q", *(address | 3 for address in pages.values())))
    cr3 = struct.unpack_from("<Q", vm.vcpu.get_state("sregs"), 240)[0]
    pdpt = struct.unpack("<Q", vm.ram.read(cr3, 8))[0] & ~0xFFF
    directory = struct.unpack("<Q", vm.ram.read(pdpt, 8))[0] & ~0xFFF
    vm.ram.write(directory, struct.pack("<Q", 0x20003))
    to_hlt(vm)
    assert vm.regs()["rax"] == 2


ALIASES = ((0x4000, HIGH + 0x4000), (HIGH + 0x4000, 0x4000))


@pytest.mark.parametrize(("code", "store"), ALIASES)
@pytest.mark.parametrize("cached_first", [True, False])
def test_a_store_through_another_slot_of_the_same_memory(vm, code, store, cached_first):
    vm.machine.map_memory(1, HIGH, vm.ram.fd, 0, RAM)
    warm = f"mov byte ptr [{store + 0x80}], 0;" if cached_first else ""
    vm.load(
        assemble(
            f"mov esp, 0x8000; mov esi, {code}; {warm} mov ecx, 3; xor ebx, ebx;"
            f"again: call esi; add ebx, eax; inc byte ptr [{store + 1}]; dec ecx; jnz again; hlt",
            "protected",
        ),
        "protected",
    )
    vm.ram.write(0x4000, b"\xb8\x0a\0\0\0\xc3")
    to_hlt(vm)
    assert vm.regs()["rbx"] == 10 + 11 + 12


def test_aliases_of_parts_of_a_file(vm):
    """Two slots, of which one begins in the middle of the other; then they are no aliases any more."""
    vm.machine.map_memory(1, HIGH, vm.ram.fd, 0x4000, 2 * PAGE)
    program = assemble(
        f"mov esp, 0x8000; mov esi, 0x5000; call esi; mov byte ptr [{HIGH + PAGE + 1:#x}], 2; call esi; hlt",
        "protected",
    )
    for wanted in (2, 1):
        vm.load(program, "protected")
        vm.ram.write(0x5000, b"\xb8\x01\0\0\0\xc3")
        to_hlt(vm)
        assert vm.regs()["rax"] == wanted
        vm.machine.map_memory(1, HIGH, vm.ram.fd, 0x10000, 2 * PAGE)


def test_a_store_through_another_linear_address(vm):
    vm.load(
        assemble(
            "mov r8, 0xffff800000000000; mov esi, 0x4000; call rsi;"
            "mov byte ptr [r8 + 0x4001], 9; call rsi; hlt",
            "long",
        ),
        "long",
    )
    cr3 = struct.unpack_from("<Q", vm.vcpu.get_state("sregs"), 240)[0]
    vm.ram.write(cr3 + 8 * 256, vm.ram.read(cr3, 8))
    vm.ram.write(0x4000, b"\xb8\x01\0\0\0\xc3")
    vm.set_regs(rsp=0x8000)
    to_hlt(vm)
    assert vm.regs()["rax"] == 9


def test_a20(vm):
    """Off, bit 20 of an address is nothing: also for code, and for stores into code."""
    vm.machine.map_memory(1, HIGH, vm.ram.fd, 0x40000, 0x8000)
    vm.ram.write(0x4000, b"\xb8\x01\0\0\0\xc3")
    vm.ram.write(0x44000, b"\xb8\x10\0\0\0\xc3")
    program = assemble(
        f"mov esp, 0x8000; mov esi, {HIGH + 0x4000}; mov edi, 0x4000; call edi; call esi; mov ebx, eax;"
        f"mov byte ptr [{HIGH + 0x4001}], 2; call edi; hlt",
        "protected",
    )
    for enabled, first, second in ((False, 1, 2), (True, 0x10, 1), (False, 1, 2)):
        vm.ram.write(0x4001, b"\1")
        vm.ram.write(0x44001, b"\x10")
        vm.machine._vm.set_a20(enabled)
        vm.load(program, "protected")
        to_hlt(vm)
        assert (vm.regs()["rbx"], vm.regs()["rax"]) == (first, second), enabled


def test_the_dirty_log_of_pages_with_code(vm):
    """A store beside code takes another path than one to a page without."""
    vm.load(assemble("again: mov [0x1800], eax; mov [0x9000], eax; hlt; jmp again", "protected"), "protected")
    for _ in range(3):
        to_hlt(vm)
        log = vm.machine.dirty_log(0)
        assert [page for page in range(RAM // PAGE) if log[page // 8] & 1 << page % 8] == [1, 9]


def test_a_watchpoint_on_code_and_a_breakpoint_in_it(vm):
    program = assemble("mov byte ptr [rip + l2 + 1], 7; l1: nop; l2: mov al, 1; l3: hlt; end:", "long")
    vm.load(program, "long")
    labels = program.labels
    watch = Watchpoint(1, labels["l2"], 2, on_read=False, on_write=True)
    vm.vcpu.set_debug(DebugRequest(stops=(Breakpoint(2, labels["l2"]), watch)))
    line = vm.vcpu.run().line()
    assert line.startswith("debug cause=watchpoint id=1 ") and line.endswith(f"rip={labels['l1']:#x}")
    assert vm.vcpu.run().line() == f"debug cause=breakpoint id=2 rip={labels['l2']:#x}"
    to_hlt(vm)
    assert vm.regs()["rax"] & 0xFF == 7


# ---- budgets

WORK = """
    cld
    mov ecx, 40
outer:
    mov eax, ecx
    mul eax
    mov [0x3000 + ecx * 4], eax
    push rcx
    mov esi, 0x3000
    mov edi, 0x4000
    mov ecx, 13
    rep movsb
    pop rcx
    test cl, 1
    jz even
    add byte ptr [rip + even], 0
even:
    call leaf
    loop outer
    hlt
leaf:
    xor ebx, eax
    ret
"""


def test_slices_of_any_length_are_one_run(vm):
    program = assemble(WORK.replace("[0x3000 + ecx * 4]", "[0x3000 + rcx * 4]"), "long")
    vm.load(program, "long")
    vm.set_regs(rsp=0x8000)
    start = vm.vcpu.counters()["instructions"]
    to_hlt(vm)
    whole, wanted = vm.vcpu.counters()["instructions"] - start, vm.regs()
    dice = random.Random(1)
    for longest in (1, 3, 40, 1000):
        vm.load(program, "long")
        vm.set_regs(**{name: 0 for name in REGS if name not in ("rip", "rflags")} | {"rsp": 0x8000})
        done = 0
        while True:
            budget = dice.randint(1, longest)
            before = vm.vcpu.counters()["instructions"]
            exit_ = vm.vcpu.run(budget=budget)
            used = vm.vcpu.counters()["instructions"] - before
            done += used
            if exit_.REASON == "hlt":
                break
            assert exit_.REASON == "limit"
            assert used == budget
        assert done == whole
        assert vm.regs() == wanted


def test_a_budget_ends_before_the_fetch_that_faults(vm):
    """What the fetch raises is no part of the instruction before it: a run in any pieces ends in the same place."""
    vm.load(assemble("handler: hlt", "real"), "real")
    vm.ram.write(13 * 4, ORIGIN.to_bytes(4, "little"))
    vm.ram.write(0xFFF0, b"\x90" * 16)
    for pieces in ((16,), (15, 1), (1,) * 16):
        vm.set_regs(rip=0xFFF0, rsp=0x8000)
        lines = [vm.vcpu.run(budget=budget).line() for budget in pieces]
        assert lines[-1] == "limit rip=0x10000"
        assert vm.vcpu.run(budget=1).line() == f"hlt rip={ORIGIN + 1:#x}"


@pytest.mark.parametrize("first", [0xFFF0, 0xFF00, 0xFE30])
def test_what_ran_to_the_end_of_the_segment_is_counted(vm, first):
    """The limit of CS is the end of a page and of a trace: the next fetch faults, and what was before it has run."""
    vm.load(assemble("handler: hlt", "real"), "real")
    vm.ram.write(13 * 4, ORIGIN.to_bytes(4, "little"))
    vm.ram.write(first, b"\x90" * (0x10000 - first))
    for budget in (None, 1, 7, 16):
        vm.set_regs(rip=first, rsp=0x8000)
        before = vm.vcpu.counters()["instructions"]
        while (exit_ := vm.vcpu.run(budget=budget)).REASON == "limit":
            pass
        assert exit_.line() == f"hlt rip={ORIGIN + 1:#x}"
        assert vm.vcpu.counters()["instructions"] - before == 0x10000 - first + 1


# ---- stops of the core


def stop_at(vm, kind, address, number=5):
    vm.vcpu._cpu.set_debug(False, [(kind, number, address, 1, True, True)])


def test_a_port_ends_the_run_behind_the_access(vm):
    """A port of a device in the core: any other is an exit anyhow."""
    with machine_on(EmulatorEngine(), irqchip=True) as pc:
        pc.load(assemble("in al, 0x21; l1: out 0x21, al; l2: in al, 0x61; l3: cli; hlt", "real"), "real")
        stop_at(pc, _core.STOP_IO, 0x21)
        assert pc.vcpu.run().line() == f"debug cause=io id=5 addr=0x21 rip={ORIGIN + 2:#x}"
        assert pc.vcpu.run().line() == f"debug cause=io id=5 addr=0x21 rip={ORIGIN + 4:#x}"
        assert pc.vcpu.run(budget=2).line() == f"limit rip={ORIGIN + 7:#x}"


@pytest.mark.parametrize(
    ("code", "vector"), [("ud2", 6), ("int3", 3), ("xor ecx, ecx; div ecx", 0), ("mov al, [0x80000000]", 13)]
)
def test_an_exception_ends_the_run_before_it_is_delivered(vm, code, vector):
    """Then it is: here as a triple fault, as there is no table of gates."""
    program = assemble(f"nop; {code.rpartition(';')[0] or 'nop'}; l1: {code.rpartition(';')[2]}", "protected")
    vm.load(program, "protected")
    if vector == 13:
        sregs = bytearray(vm.vcpu.get_state("sregs"))
        struct.pack_into("<I", sregs, 24 + 8, 0xFFFFF)  # the limit of DS
        vm.vcpu.set_state("sregs", bytes(sregs))
    stop_at(vm, _core.STOP_VECTOR, vector)
    assert (
        vm.vcpu.run().line() == f"debug cause=exception id=5 vector={vector:#x} rip={program.labels['l1']:#x}"
    )
    assert vm.vcpu.run().REASON == "shutdown"


def test_a_change_of_cr3_ends_the_run(vm):
    program = assemble("mov rax, cr3; mov cr3, rax; or al, 8; mov cr3, rax; l1: hlt", "long")
    vm.load(program, "long")
    stop_at(vm, _core.STOP_CR3, 0)
    assert vm.vcpu.run().line() == f"debug cause=cr3 id=5 rip={program.labels['l1']:#x}"
    to_hlt(vm)


def test_a_switch_of_the_mode_ends_the_run(vm):
    program = assemble(
        "mov eax, cr0; or al, 1; mov cr0, eax; l1: and al, 0xfe; mov cr0, eax; l2: hlt", "real"
    )
    vm.load(program, "real")
    stop_at(vm, _core.STOP_MODE, 0)
    for label in ("l1", "l2"):
        assert vm.vcpu.run().line() == f"debug cause=mode id=5 rip={program.labels[label]:#x}"
    to_hlt(vm)


def test_a_machine_is_not_closed_or_changed_under_a_cpu_that_runs(vm):
    vm.load(assemble("again: inc dword ptr [0x3000]; jmp again", "long"), "long")
    result = []
    thread = threading.Thread(target=lambda: result.append(vm.vcpu.run()), daemon=True)
    thread.start()
    while vm.ram.read(0x3000, 4) == bytes(4):
        thread.join(0.001)
    for forbidden in (
        vm.machine.close,
        vm.vcpu.close,
        lambda: vm.machine.map_memory(0, 0, 0, 0, 0),
        lambda: vm.machine.create_vcpu(1),
        lambda: vm.vcpu.get_state("regs"),
    ):
        with pytest.raises(EngineFailed):
            forbidden()
    vm.vcpu.kick()
    thread.join(30)
    assert result[0].REASON == "interrupted"


def test_a_watchpoint_that_setting_state_hits_is_an_exit_of_the_next_run(vm):
    """The load completes when registers are set; what it hit is told then, with rip as it was."""
    program = assemble("mov al, [rdi]; l1: nop; l2: hlt", "long")
    vm.load(program, "long")
    vm.set_regs(rdi=0xA0000)
    vm.vcpu.set_debug(DebugRequest(stops=(Watchpoint(3, 0xA0000, 1, on_read=True, on_write=False),)))
    assert vm.vcpu.run().REASON == "mmio"
    assert not vm.vcpu.exits_waiting
    vm.set_regs(rip=program.labels["l2"])
    assert vm.vcpu.exits_waiting
    assert vm.vcpu.run().line() == f"debug cause=watchpoint id=3 addr=0xa0000 rip={program.labels['l1']:#x}"
    assert not vm.vcpu.exits_waiting
    to_hlt(vm)
