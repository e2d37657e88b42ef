"""Machines with devices on every engine: accesses that devices answer, bounds, interrupts, power, and the move."""

from __future__ import annotations

import gc
import os
import struct
import time
import weakref

import pytest
from engine.asm import ORIGIN
from engine.saving import arrival_of, come_in
from engine.test_memory import open_files

from vmfs.engine.base import Capability
from vmfs.machine.born import Birth, parse_birth
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words.errors import Busy, Invalid, NotPermitted, Unsupported
from vmfs.words.registers import read_register, write_registers

SECONDS = 30
SIZE = 2 << 20

# The 8259 with IRQ 0 at vector 0x20; what follows is its mask.
PIC = "mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al"

# The timer at 100 Hz through the 8259s to vector 0x20, whose handler counts in [0x500]; runs until it has counted 3.
TIMER = f"""
    xor ax, ax
    mov ds, ax
    mov word ptr [0x80], offset handler
    mov word ptr [0x82], 0
    {PIC}
    mov al, 0xfe
    out 0x21, al
    mov al, 0x34
    out 0x43, al
    mov al, 0x9c
    out 0x40, al
    mov al, 0x2e
    out 0x40, al
    sti
wait:
    hlt
    cmp byte ptr [0x500], 3
    jb wait
    mov dx, 0xf4
    mov al, 7
    out dx, al
handler:
    push ax
    inc byte ptr [0x500]
    mov dx, 0x3f8
    mov al, '.'
    out dx, al
    mov al, 0x20
    out 0x20, al
    pop ax
    iret
"""


@pytest.fixture
def pc(engine):
    vm = Vm(engine, memory_size=SIZE)
    vm.set_machine("pc")
    vm.sent = bytearray()
    vm.board.devices["com1"].output = vm.sent.extend
    yield vm
    vm.close()


def load(vm, program, mode="real"):
    vm.set_mode(mode)
    vm.memory.write(ORIGIN, program.code)
    vm.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN}))


def run(vm, **bound):
    return vm.start(Bound(**bound)).result(SECONDS)


def register(vm, name):
    return int(vm.at_boundary(lambda cpu: read_register(cpu, name)).result(SECONDS), 0)


def test_nothing_is_left_of_one_that_is_closed_or_replaced(engine):
    """Its descriptors are closed at once; no chip keeps the board."""

    def born() -> list[weakref.ref]:
        vm = Vm(engine, memory_size=SIZE)
        vm.set_machine("pc")
        boards = [weakref.ref(vm.board)]
        vm.past.take("one")
        arrival = arrival_of(vm, "one")
        vm.past.drop("one")
        come_in(vm, arrival)
        boards.append(weakref.ref(vm.board))
        assert boards[0]() is not boards[1]()
        assert sum("framebuffer" in path for path in open_files()) == 2  # itself, and a mapping's
        vm.close()
        return boards

    born()  # what the engine opens once
    before = open_files()
    boards = born()
    assert open_files() == before
    gc.collect()
    assert [board() for board in boards] == [None, None]


def test_accesses_are_answered_and_no_exits(pc, assembler):
    load(pc, assembler("mov dx, 0x3f8; mov al, 'A'; out dx, al; mov dx, 0x3fd; in al, dx; out 0xf4, al", "real"))
    assert run(pc).line().startswith("shutdown cause=debug-exit code=193 ")  # 0x60 * 2 + 1
    assert pc.sent == b"A" and pc.state == "shutdown"
    counters = pc.counters()
    assert counters["exits.io"] == 0 and counters["exits.shutdown"] == 1


def test_what_no_device_claims_reads_as_ones(pc, assembler):
    load(pc, assembler("mov dx, 0x1234; mov al, 5; out dx, al; in al, dx; mov dx, 0xf4; out dx, al", "real"))
    assert run(pc).line().startswith("shutdown cause=debug-exit code=511 ")
    assert pc.counters()["board.unclaimed"] == 2


def test_what_nothing_claims_is_listed(pc, assembler):
    program = assembler(
        """
        mov dx, 0x1234; in al, dx; a: in al, dx; b: out dx, al; c:
        mov esi, 0xe8000000; mov eax, [rsi]
        lea rax, [rip + fault]; mov word ptr [gate], ax; lidt [table]
        mov ecx, 0x12345678; d: rdmsr
    fault:
        mov dx, 0xf4; out dx, al
    table: .word 0xff; .quad gate - 13 * 16
        .balign 16
    gate: .word 0, 0x8, 0x8e00, 0; .quad 0
        """,
        "long",
    )
    load(pc, program, "long")
    selector = register(pc, "cs")
    pc.memory.write(program.labels["gate"] + 2, selector.to_bytes(2, "little"))
    assert run(pc).line().startswith("shutdown cause=debug-exit")
    lines = pc.unclaimed().result(SECONDS).splitlines()
    assert lines[0] == f"port=0x1234 reads=2 writes=1 rip={program.labels['c']:#x}"
    assert lines[1].startswith("memory=0xe8000000 reads=1 writes=0 rip=0x")
    assert lines[2:] == [f"msr=0x12345678 reads=1 writes=0 rip={program.labels['d']:#x}"]
    assert sum(count for name, count in pc.counters().items() if name.startswith("exits.")) == 1  # shutdown


def test_memory_of_devices(pc, assembler):
    code = "mov edi, 0xe8000000; mov dword ptr [rdi], 5; mov eax, [rdi]; mov dx, 0xf4; out dx, al"
    load(pc, assembler(code, "long"), "long")
    assert run(pc).line().startswith("shutdown cause=debug-exit code=511 ")


def test_bounds_count_accesses_that_devices_answer(pc, assembler):
    program = assembler("mov dx, 0x3f8; mov al, 'A'; l2: out dx, al; l3: in al, dx; l4: nop; l5: hlt", "real")
    load(pc, program)
    for label in ("l2", "l3", "l4"):
        exit_ = run(pc, steps=2 if label == "l2" else 1)
        assert exit_.line() == f"debug cause=step rip={program.labels[label]:#x}"
    assert pc.sent == b"A" and register(pc, "rax") & 0xFF == 0
    pc.set_points(lambda points: points.set_stepping(True)).result()
    pc.change(lambda cpu: write_registers(cpu, {"rip": program.labels["l2"]}))
    assert run(pc).line() == f"debug cause=step rip={program.labels['l3']:#x}"
    assert run(pc).line() == f"debug cause=step rip={program.labels['l4']:#x}"


def test_exact_bounds_over_accesses(pc, assembler):
    """By the engine's own budget, or by steps: `done` is what the loop's counter and rip say."""
    code = "mov bx, 0; l0: inc bx; l1: in al, dx; l2: out dx, al; l3: nop; l4: jmp l0"
    program = assembler(code, "real")
    load(pc, program)
    pc.change(lambda cpu: write_registers(cpu, {"rdx": 0x3F8}))
    done = 0
    for count in (1, 2, 3, 7, 100, 1001):
        done += count
        assert run(pc, instructions=count).line() == f"limit rip={program.labels[f'l{(done - 1) % 5}']:#x}"
        assert register(pc, "rbx") & 0xFFFF == (done - 1 + 4) // 5
        if Capability.BUDGET in pc.capabilities:
            assert pc.counters()["instructions"] == done


def test_the_timer_wakes_it(pc, assembler):
    load(pc, assembler(TIMER, "real"))
    assert run(pc).line().startswith("shutdown cause=debug-exit code=15 ")
    assert pc.sent == b"..."


def test_a_device_interrupts(pc, assembler):
    """Received bytes, by IRQ 4 through the 8259s, while the CPU halts."""
    program = assembler(
        f"""
        xor ax, ax
        mov ds, ax
        mov word ptr [0x90], offset handler
        mov word ptr [0x92], 0
        {PIC}
        mov al, 0xef
        out 0x21, al
        mov dx, 0x3f9
        mov al, 1
        out dx, al
        mov dx, 0x3fc
        mov al, 8
        out dx, al
        mov dx, 0x3f8
        mov al, 'r'
        out dx, al
        sti
    wait:
        hlt
        jmp wait
    handler:
        mov dx, 0x3f8
        in al, dx
        out 0xf4, al
        """,
        "real",
    )
    load(pc, program)
    ready = []
    pc.board.devices["com1"].output = lambda data: ready.append(pc.board.devices["com1"].receive(b"!"))
    assert run(pc).line().startswith(f"shutdown cause=debug-exit code={ord('!') * 2 + 1} ")
    assert ready


@pytest.mark.parametrize("stop", ["poweroff", "reset", "suspend"])
def test_power(pc, assembler, stop):
    code = {
        "poweroff": "mov dx, 0x604; mov ax, 0x2000; out dx, ax; l: jmp l",
        "reset": "mov dx, 0xcf9; mov al, 6; out dx, al; l: jmp l",
        "suspend": "mov dx, 0x604; mov ax, 0x2400; out dx, ax; l: jmp l",
    }[stop]
    load(pc, assembler(f"mov dx, 0x3ff; mov al, 7; out dx, al; {code}", "real"))
    program_end = run(pc)
    assert program_end.line().startswith(f"shutdown cause={stop} rip=")
    if stop == "poweroff":
        assert pc.state == "shutdown"
        assert run(pc).line() == program_end.line()
    else:
        assert pc.state == "paused"
        assert register(pc, "rip") == 0xFFF0 and register(pc, "cs.base") == 0xFFFF0000
        assert pc.board.devices["com1"].save().scr == 0
        assert pc.memory.read(ORIGIN, 1) != b"\0"  # RAM keeps its contents
        assert pc.board.devices["power"].save().status == (0x8000 if stop == "suspend" else 0)


SLEEPS = """
    mov dx, 0x70; mov al, 0x40; out dx, al; inc dx; mov al, 0x5a; out dx, al
    mov dx, 0x604; mov ax, 0x2400; out dx, ax
    l: jmp l
    .balign 32
woken:
    mov ax, cs; mov [0x600], ax
    mov dx, 0x70; mov al, 0x40; out dx, al; inc dx; in al, dx
    out 0xf4, al
"""


@pytest.mark.parametrize("vector, is_woken", [(True, True), (False, False)])
def test_the_run_after_a_suspend_wakes_it(pc, other, assembler, vector, is_woken):
    """Where the FACS has a vector; a state that was saved meanwhile sleeps on, on another engine, too."""
    program = assembler(SLEEPS, "real")
    load(pc, program)
    place = program.labels["woken"]
    pc.memory.write(0xF_0040, struct.pack("<4sIII", b"FACS", 64, 0, place if vector else 0))
    assert run(pc).line().startswith("shutdown cause=suspend rip=")
    state = pc.take().result(SECONDS)
    pc.reset()
    assert run(pc, instructions=1).line().startswith(("limit", "shutdown", "error")), "it boots, and there is nothing"
    pc.put(state)
    pc.move_to(other)
    assert pc.state == "paused"
    if is_woken:
        assert run(pc).line().startswith(f"shutdown cause=debug-exit code={0x5A * 2 + 1} ")
        assert pc.memory.read(0x600, 2) == struct.pack("<H", place >> 4)
    else:
        assert register(pc, "cs.base") == 0xFFFF0000
        run(pc, instructions=1)
        assert pc.memory.read(0x600, 2) == bytes(2)


def test_a_machine_with_devices_moves(pc, other, assembler):
    """In the middle of a program with a timer, to an engine and back: devices, controllers and timers go along."""
    load(pc, assembler(TIMER, "real"))
    pc.set_points(lambda points: points.add_break(assembler(TIMER, "real").labels["handler"]) and points).result()
    for engine in (other, pc.engine):
        assert run(pc).line().startswith("debug cause=breakpoint ")
        pc.move_to(engine)
        assert pc.engine is engine and pc.machine_name == "pc"
    pc.set_points(lambda points: points.delete_all()).result()
    assert run(pc).line().startswith("shutdown cause=debug-exit code=15 ")
    assert pc.sent == b"..."


def test_the_framebuffer_is_memory_that_goes_along(pc, other, assembler):
    code = "mov edi, 0xe0000000; inc byte ptr [rdi]; mov al, [rdi + 0x10000]; out 0xf4, al"
    framebuffer = pc.board.display.framebuffer
    assert pc.board.display.bar(0) == 0xE000_0000
    os.pwrite(framebuffer, b"\x21", 0x10000)
    for count, engine in enumerate((other, pc.engine), 1):
        pc.move_to(engine)
        load(pc, assembler(code, "long"), "long")
        assert run(pc).line().startswith("shutdown cause=debug-exit code=67 "), engine.name
        assert os.pread(framebuffer, 1, 0)[0] == count


def test_the_a20_gate_is_what_the_guest_reads_of_it(pc, assembler):
    """Bit 1 of port 92 is switched off; a store to FFFF:0010 goes to 0 where that took."""
    code = "xor al, al; out 0x92, al; mov bx, 0xffff; mov ds, bx; mov byte ptr [0x10], 0x5a; in al, 0x92; out 0xf4, al"
    load(pc, assembler(code, "real"))
    line = run(pc).line()
    is_off = line.startswith("shutdown cause=debug-exit code=1 ")
    assert is_off or line.startswith("shutdown cause=debug-exit code=5 ")
    assert is_off == (pc.engine.name == "emulator")
    assert (pc.memory.read(0, 1) == b"\x5a") == is_off and (pc.memory.read(1 << 20, 1) == b"\x5a") == (not is_off)
    if is_off:
        pc.reset()
        assert pc.board.keyboard.describe()["a20"] == "on"


def test_machine_is_chosen_before_the_first_run(engine, assembler):
    vm = Vm(engine, memory_size=SIZE)
    try:
        with pytest.raises(Invalid, match="bare, pc"):
            vm.set_machine("atari")
        vm.change(lambda cpu: write_registers(cpu, {"rbx": 5}))
        vm.set_machine("pc")
        vm.set_machine("pc")
        assert register(vm, "rbx") == 5
        with pytest.raises(Unsupported, match="controllers"):
            vm.interrupt(0x20)
        vm.set_machine("bare")
        vm.interrupt(0x20)
        assert vm.board is None and register(vm, "rbx") == 5
        load(vm, assembler("hlt", "real"))
        run(vm)
        with pytest.raises(Busy, match="has run"):
            vm.set_machine("pc")
    finally:
        vm.close()


def test_devices_are_attached_before_the_first_run(pc, assembler):
    from vmfs.devices.virtio.rng import Rng

    pc.attach(lambda board: Rng(board, "rng0", board.pci.free_slot()))
    assert pc.board.devices["rng0"].irq >= 16
    with pytest.raises(NotPermitted):
        pc.detach(pc.board.devices["com1"])
    pc.detach(pc.board.devices["rng0"])
    assert "rng0" not in pc.board.devices
    load(pc, assembler("out 0xf4, al", "real"))
    run(pc)
    with pytest.raises(Busy):
        pc.attach(lambda board: Rng(board, "rng0", board.pci.free_slot()))


def test_what_devices_write_is_in_the_dirty_log(pc):
    pc.take_dirty("file")
    pc.board.dma_write(5 * 4096, b"x")
    dirty = int.from_bytes(pc.take_dirty("file"), "little")
    assert dirty == 1 << 5


def test_time_has_its_source(pc, assembler):
    assert pc.time_source == "host"
    if Capability.DETERMINISTIC not in pc.capabilities:
        with pytest.raises(Unsupported):
            pc.set_time_source("instructions")
        return
    assert register(pc, "msr.0x10") > 0
    pc.set_time_source("instructions")
    assert register(pc, "msr.0x10") == 0  # what passed on the host before the first run is in no run
    load(pc, assembler("mov ecx, 1000; l: dec ecx; jnz l; out 0xf4, al", "real"))
    before = struct.unpack_from("<Q", pc.get_machine_state("clock").result(SECONDS))[0]
    run(pc)
    after = struct.unpack_from("<Q", pc.get_machine_state("clock").result(SECONDS))[0]
    assert after - before == pc.counters()["instructions"]


# Seconds, minutes, hours, day, month, year and century of the clock, sent to COM1.
DATE = "".join(
    f"mov al, {at}; out 0x70, al; in al, 0x71; mov dx, 0x3f8; out dx, al;" for at in (0, 2, 4, 7, 8, 9, 0x32)
)


def test_a_machine_is_born_when_its_user_says(pc, assembler):
    born = parse_birth("date 2031-12-24T18:30:00Z\nseed 000102030405060708090a0b0c0d0e0f\n").over(pc.birth())
    pc.set_birth(born)
    if Capability.DETERMINISTIC in pc.capabilities:
        pc.set_time_source("instructions")  # the date stays that of its time 0
    assert pc.birth() == born and parse_birth(born.text()).over(Birth(0, b"")) == born
    load(pc, assembler(DATE + "mov dx, 0xf4; mov al, 1; out dx, al", "real"))
    assert run(pc).line().startswith("shutdown cause=debug-exit code=3")
    assert pc.sent[1:] == bytes.fromhex("30 18 24 12 31 20") and pc.sent[0] < 0x10
    with pytest.raises(Busy, match="it has run"):
        pc.set_birth(born)


def test_cards_have_their_addresses_from_the_seed(pc):
    one, other = ([board_bytes(pc, seed, name) for name in ("net0", "net1")] for seed in (bytes(16), bytes([1] * 16)))
    assert len({*one, *other}) == 4
    assert [board_bytes(pc, bytes(16), name) for name in ("net0", "net1")] == one


def board_bytes(vm, seed, name):
    vm.set_birth(Birth(0, seed))
    return vm.board.own_bytes(f"mac of {name}", 3)


def test_code_that_a_debugger_writes_while_the_guest_runs(pc, assembler):
    program = assembler("l: call code; out 0x80, al; jmp l; code: mov al, 1; ret", "real")
    load(pc, program)
    pc.change(lambda cpu: write_registers(cpu, {"rsp": 0x7000}))
    going = pc.start()
    time.sleep(0.05)
    stop = assembler("mov dx, 0xf4; out dx, al", "real").code
    pc.at_boundary(lambda cpu: pc.memory.write(program.labels["code"], stop)).result(SECONDS)
    assert going.result(SECONDS).line().startswith("shutdown cause=debug-exit ")
