"""A machine's past: it goes to any place of it and is what it was there, to the bit; and on from there as it did."""

from __future__ import annotations

import random

import pytest
from engine.asm import ORIGIN, assemble
from engine.typed import typed_into, typing
from engine.walked import SECONDS, WALKER, count, go, run, started

from vmfs.devices.device import NoState, StatelessDevice, Window
from vmfs.machine.journey import Journey
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words import exits
from vmfs.words.errors import Busy, Unsupported
from vmfs.words.modes import set_mode
from vmfs.words.registers import read_register, write_registers


@pytest.mark.parametrize("cpus", [1, 3])
def test_it_is_at_every_place_what_it_was(emulator, assembler, machines, cpus):
    """Typed into by another thread; then to places at random, in any order, and on from there to its end."""
    vm = typed_into(Vm(emulator, memory_size=2 << 20), assembler, cpus)
    machines.append(vm)
    sent = bytearray()
    vm.board.devices["com1"].output = sent.extend
    started(vm, every=0.002)
    dice = random.Random(cpus)
    seen = {}
    with typing(vm, dice):
        for _ in range(25):
            run(vm, instructions=dice.randrange(1, 400_000))
            seen[count(vm)] = vm.state_hash()
    assert vm.board.inputs.recorded()
    end = count(vm)
    for place in dice.sample(sorted(seen), 15):
        exit_ = go(vm, place=place)
        assert isinstance(exit_, exits.Limit) and count(vm) == place
        assert vm.state_hash() == seen[place]
        following = min((one for one in seen if one > place), default=None)
        if following is not None:
            run(vm, instructions=following - place)
            assert count(vm) == following and vm.state_hash() == seen[following]
    go(vm, place=end)
    assert vm.state_hash() == seen[end] and not vm.history.in_past


def test_a_bare_machine_whose_caller_answers_it(walker):
    """Each answer is a change from outside, and begins a stretch; it goes to places in all of them."""
    vm = walker()
    started(vm)
    dice = random.Random(1)
    seen = {}
    for _ in range(60):
        exit_ = run(vm, instructions=dice.randrange(1, 300))
        seen[count(vm)] = vm.state_hash()
        if isinstance(exit_, exits.Io) and exit_.direction == "in":
            vm.set_access_data(bytes([dice.randrange(256)]))
    assert len({one.stretch for one in vm.history.checkpoints}) > 3
    end = vm.state_hash()
    for place in dice.sample(sorted(seen)[:-1], 30):
        go(vm, place=place)
        assert count(vm) == place and vm.history.in_past
    go(vm, place=max(seen))
    assert vm.state_hash() == end


ENDS = {
    "hlt": ("bare", "inc rbx; hlt; inc rcx; hlt"),
    "out and in": ("bare", "inc rbx; out 0x80, al; in al, 0x81; inc rcx; out 0x80, al; hlt"),
    "each of several": ("bare", "mov esi, 0x8000; mov ecx, 3; mov dx, 0x80; rep outsb; hlt"),
    "loads and stores": ("bare", "mov eax, 0x40000000; mov [rax], ecx; inc rcx; mov ecx, [rax]; hlt"),
    "triple fault": ("bare", "inc rbx; lidt [rip + no]; int3; no: .quad 0, 0"),
    "triple fault of a pc": ("pc", "inc rbx; lidt [rip + no]; int3; no: .quad 0, 0"),
    "debug exit": ("pc", "inc rbx; mov dx, 0xf4; mov al, 6; out dx, al; inc rcx; hlt"),
    "power-off": ("pc", "mov dx, 0x604; mov ax, 0x2000; out dx, ax; inc rcx; hlt"),
}


@pytest.mark.parametrize(
    ("end", "answers"), [*((end, False) for end in ENDS), ("out and in", True), ("loads and stores", True)]
)
def test_at_the_place_of_an_exit_it_has_come_to_it(walker, end, answers):
    """As it had the first time: state, exit, a read that waits for its data; and it goes on from there as it did."""
    kind, source = ENDS[end]
    vm = walker(kind, source=source)
    started(vm)
    came: list[tuple] = []

    def here(exit_: exits.Exit) -> tuple:
        return count(vm), exit_, vm.state, vm.state_hash(), vm._is_reading(vm.cpu)

    while vm.state != "shutdown" and len(came) < 4:
        came.append(here(run(vm)))
        if answers and vm._is_reading(vm.cpu) and len(came) < 4:
            vm.set_access_data(b"\x05" * len(vm.access_data))
    first = {place: index for index, (place, *_) in reversed([*enumerate(came)])}
    last = came[-1][0]
    first[last] = len(came) - 1  # the end of the record is the last there
    for place in [*sorted(first), *sorted(first, reverse=True), last]:
        for _ in range(2):
            exit_ = go(vm, place=place)
            assert here(exit_) == came[first[place]]
            assert vm.last_exit == exit_ and vm.history.in_past == (place != last)
        if place != last:
            for index in range(first[place] + 1, len(came)):
                assert here(run(vm)) == came[index]
        elif vm.state == "shutdown":
            assert run(vm) == exit_ and count(vm) == place


def test_beyond_an_end_that_is_a_shutdown_nothing_is_executed(walker):
    vm = walker("pc", source=ENDS["debug exit"][1])
    started(vm)
    shut = run(vm)
    place = count(vm)
    go(vm, place=1)
    assert go(vm, place=place + 100) == shut and count(vm) == place and vm.state == "shutdown"
    go(vm, place=1)
    assert run(vm) == shut and vm.state == "shutdown" and not vm.history.in_past


def test_who_asks_for_a_writer_leaves_a_read_waiting(walker):
    vm = walker(source="inc rbx; mov [0x7000], rbx; in al, 0x81; hlt")
    started(vm)
    asks, there = run(vm), vm.state_hash()
    asked = writer(vm, 0x7000, 8)
    asked.result(SECONDS)
    assert asked.travel.written.how == "instruction" and vm.state_hash() == there and vm.last_exit == asks
    vm.set_access_data(b"\x07")
    run(vm)
    assert int(state(vm)["rax"], 16) & 0xFF == 7


@pytest.mark.parametrize("cause, source", [("reset", "mov dx, 0xcf9; mov al, 6; out dx, al"),
                                           ("suspend", "mov dx, 0x604; mov ax, 0x2400; out dx, ax")])  # fmt: skip
def test_a_reset_in_the_past_is_no_change_from_outside(walker, cause, source):
    """What came after it comes again, and at the end of the record the machine is reset, as it was."""
    vm = walker("pc", source=f"inc rbx; {source}; l: inc rcx; jmp l")
    started(vm)
    reset = run(vm)
    assert isinstance(reset, exits.Shutdown) and reset.cause == cause and vm.state == "paused"
    place, there = count(vm), vm.state_hash()
    go(vm, place=1)
    assert go(vm, place=place) == reset and vm.state_hash() == there and not vm.history.in_past
    vm.change(lambda vcpu: set_mode(vcpu, vm.memory, 4 << 20, "long"))
    vm.change(lambda vcpu: write_registers(vcpu, {"rip": ORIGIN}))
    assert run(vm) == reset and run(vm).REASON == "error"
    vm.change(lambda vcpu: set_mode(vcpu, vm.memory, 4 << 20, "long"))
    vm.change(lambda vcpu: write_registers(vcpu, {"rip": reset.rip}))
    run(vm, instructions=1000)
    end, there = count(vm), vm.state_hash()
    for start in (0, place):
        go(vm, place=start)
        for _ in range(2 - (start > 0)):
            assert run(vm) == reset and vm.state == "paused" and vm.history.in_past
        run(vm, instructions=end - count(vm))
        assert (count(vm), vm.state_hash()) == (end, there) and "forgotten" not in vm.history.text()


def state(vm: Vm) -> dict[str, int]:
    names = ("rip", "rbx", "rcx", "rax")
    return vm.at_boundary(lambda cpu: {name: read_register(cpu, name) for name in names}).result()


def test_back_n_is_step_backwards(walker):
    vm = walker("pc")
    started(vm)
    run(vm, instructions=100_000)
    seen = []
    for _ in range(200):
        seen.append((count(vm), state(vm)))
        run(vm, steps=1)
    for before in reversed(seen):
        exit_ = go(vm, back=1)
        assert isinstance(exit_, exits.Debug) and exit_.cause == "step"
        assert (count(vm), state(vm)) == before
    go(vm, back=50_000)
    assert count(vm) == 50_000
    assert isinstance(go(vm, back=60_000), exits.Limit) and count(vm) == 0


def test_back_until_and_back_to_the_last_stop(walker):
    vm = walker("pc")
    started(vm, every=0.002)
    code = assemble(WALKER, "long")
    at = code.labels["round"]
    stops = []
    vm.set_points(lambda points: points.add_watch(0x7000, 4, False, True)).result()
    for _ in range(20):
        exit_ = run(vm)
        stops.append((count(vm), exit_.rip, state(vm)))
    for place, rip, registers in reversed(stops[:-1]):
        exit_ = go(vm)
        assert exit_.cause == "watchpoint" and (count(vm), exit_.rip, state(vm)) == (place, rip, registers)
    assert isinstance(go(vm), exits.Limit) and count(vm) == 0
    go(vm, place=stops[-1][0])
    assert not vm.history.in_past
    for place, _, _ in reversed(stops[:-1]):
        exit_ = go(vm, until=at)
        assert exit_.cause == "breakpoint" and exit_.rip == at and count(vm) == place
    with pytest.raises(Busy):
        vm.set_time_source("host")


def test_what_comes_anew_forgets_the_future(walker):
    vm = walker("pc")
    started(vm)
    run(vm, instructions=200_000)
    go(vm, place=100_000)
    assert vm.history.in_past and vm.history.end == 200_000
    vm.change(lambda cpu: write_registers(cpu, {"rbx": 7}))
    run(vm, instructions=1000)
    assert not vm.history.in_past and vm.history.end == 101_000 and "forgotten" in vm.history.text()
    go(vm, back=500)
    assert count(vm) == 100_500
    go(vm, place=50_000)
    go(vm, place=150_000)  # past the end it goes on live
    assert count(vm) == 150_000 and not vm.history.in_past


def test_thinned_out_it_is_still_what_it_was(walker):
    """Many checkpoints, of which most go, and their layers become one."""
    vm = walker("pc")
    started(vm)
    dice = random.Random(3)
    seen = {}
    for _ in range(120):
        run(vm, instructions=dice.randrange(1, 20_000))
        seen[count(vm)] = vm.state_hash()
        with vm._lock:
            vm.history.take()
    kept = vm.history.checkpoints
    assert len(kept) < 80 and len({layer for one in kept for layer in one.ram.layers}) <= len(kept) + 2
    for place in dice.sample(sorted(seen), 30):
        go(vm, place=place)
        assert vm.state_hash() == seen[place]


TYPED = """
l: inc rbx; test ebx, 0xfff; jne l; mov dx, 0x3fd; in al, dx; test al, 1; je l
   mov dx, 0x3f8; in al, dx; mov [0x7000], al; jmp l
"""


def test_what_came_is_listed_with_its_place(walker):
    """At the first moment of the place it is about to come; of what is forgotten nothing is listed."""
    vm = walker("pc", source=TYPED)
    started(vm)
    for byte in b"abc":
        run(vm, instructions=30_000)
        vm.board.devices["com1"].receive(bytes([byte]))
    vm.board.devices["com1"].receive(bytes(20))
    run(vm, instructions=30_000)

    def listed() -> list[list[str]]:
        return [line.split() for line in vm.history.text().splitlines() if line.startswith("input ")]

    def waits() -> bool:
        return bool(vm.board.devices["com1"].read(0, 5, 1) & 1)

    lines = listed()
    assert [line[2:] for line in lines] == [
        *(["com1", "bytes", f"{byte:02x}"] for byte in b"abc"), ["com1", "bytes", "00" * 16 + "...", "20"]
    ]  # fmt: skip
    assert [int(line[1]) // 30_000 for line in lines[:3]] == [1, 2, 3]
    for line in reversed(lines[:3]):
        go(vm, place=int(line[1]))
        with vm.board.lock:
            assert not waits()
        go(vm, place=int(line[1]) + 1)
        with vm.board.lock:
            assert waits()
    assert listed() == lines  # those that come next, too
    vm.change(lambda cpu: write_registers(cpu, {"r15": 7}))
    run(vm, instructions=10)
    assert listed() == lines[:1]


def test_what_came_before_a_snapshot_was_gone_back_to_is_forgotten(walker):
    """It did not lead to where the machine is; no checkpoint is left that it would be for."""
    vm = walker("pc", source=TYPED)
    started(vm)
    run(vm, instructions=30_000)
    vm.past.take("here")
    for _ in range(3):
        vm.board.devices["com1"].receive(bytes(1000))
        run(vm, instructions=30_000)
    assert vm.board.inputs.size > 3000
    vm.past.restore("here")
    run(vm, instructions=30_000)
    assert "input " not in vm.history.text() and not vm.board.inputs.size
    vm.board.devices["com1"].receive(b"q")
    run(vm, instructions=30_000)
    there = vm.state_hash()
    go(vm, back=40_000)
    run(vm, instructions=40_000)
    assert vm.state_hash() == there and vm.history.text().count("input ") == 1


def test_switched_off_it_goes_on(walker):
    vm = walker("pc")
    started(vm)
    run(vm, instructions=10_000)
    go(vm, back=100)
    vm.history.stop()
    with pytest.raises(Unsupported):
        go(vm, back=1)
    run(vm, instructions=100)
    assert count(vm) == 10_000


def writer(vm: Vm, address: int, length: int):
    return vm.start(Bound(journey=Journey(written=((address, length),))))


def test_who_wrote_last(walker):
    """An instruction, also several checkpoints ago; a client; nobody. The machine stands where it was."""
    vm = walker("pc")
    vm.memory.write(0x7000, bytes(16))
    started(vm)
    vm.set_points(lambda points: points.add_watch(0x7000, 4, False, True)).result()
    run(vm)
    place, new = count(vm) - 1, int(state(vm)["rbx"], 16).to_bytes(4, "little")
    vm.set_points(lambda points: points.delete_all()).result()
    for _ in range(10):
        run(vm, instructions=50)
        with vm._lock:
            vm.history.take()
    there, seen = vm.state_hash(), vm.last_exit
    asked = writer(vm, 0x7000, 4)
    asked.result(SECONDS)
    found = asked.travel.written
    assert (found.how, found.place, found.old, found.new) == ("instruction", place, bytes(4), new)
    assert vm.state_hash() == there and vm.last_exit == seen and not vm.history.in_past
    vm.memory.write(0x7004, b"abcd")
    at = count(vm)
    run(vm, instructions=50)
    asked = writer(vm, 0x7004, 4)
    asked.result(SECONDS)
    found = asked.travel.written
    assert (found.how, found.place, found.old, found.new) == ("client", at, bytes(4), b"abcd")
    asked = writer(vm, 0x7100, 8)
    asked.result(SECONDS)
    assert asked.travel.written is None


def test_what_a_device_wrote_is_said_to_be_a_devices(emulator, machines, tmp_path):
    """The virtio-rng of a Debian would do; here a device writes by hand, when a port is written."""

    class Writer(StatelessDevice):
        TYPE = "writer"
        STATE = NoState

        def windows(self):
            return (Window("port", 0x300, 1),)

        def write(self, region, offset, size, value):
            self.board.dma_write(0x7000, bytes([value]) * 8)

    vm = Vm(emulator, memory_size=4 << 20)
    machines.append(vm)
    vm.set_machine("pc")
    vm.set_time_source("instructions")
    vm.board.add(Writer(vm.board, "writer"))
    program = assemble("mov dx, 0x300; mov al, 7; mov ecx, 5000; a: loop a; out dx, al; b: loop b; jmp b", "long")
    vm.memory.write(ORIGIN, program.code)
    vm.change(lambda vcpu: set_mode(vcpu, vm.memory, 4 << 20, "long"))
    vm.change(lambda vcpu: write_registers(vcpu, {"rip": ORIGIN}))
    started(vm)
    run(vm, instructions=20_000)
    asked = writer(vm, 0x7000, 8)
    asked.result(SECONDS)
    found = asked.travel.written
    assert (found.how, found.place, found.old, found.new) == ("dma", 5003, bytes(8), b"\7" * 8)
    assert count(vm) == 20_000


def test_several_cpus_are_stepped_apart_and_gone_back_with(walker):
    """Steps of one CPU alone are parts of the past; `back N` of one CPU is to where that one had done N fewer."""
    vm = walker(cpus=2, source=WALKER.replace("out 0x80, al; in al, 0x81;", ""))
    started(vm)
    dice = random.Random(5)
    seen = {}
    for _ in range(12):
        run(vm, instructions=dice.randrange(1, 30_000))
        for _ in range(3):
            run(vm, steps=dice.randrange(1, 5), cpu=dice.randrange(2))
            seen[count(vm)] = vm.state_hash()
    places = sorted(seen)
    for place in dice.sample(places[:-1], 12):
        go(vm, place=place)
        assert count(vm) == place
    go(vm, place=places[-1])
    assert vm.state_hash() == seen[places[-1]] and not vm.history.in_past
    for cpu in (1, 0, 1):
        before = vm.cpu_counters(cpu)["instructions"]
        exit_ = go(vm, back=7, cpu=cpu)
        assert vm.cpu_counters(cpu)["instructions"] == before - 7 and exit_.cpu == cpu
        run(vm, steps=7, cpu=cpu)
        assert vm.cpu_counters(cpu)["instructions"] == before
