"""Kicks, runs in several threads, state that is set between runs: what is not a straight line of exits."""

import signal
import struct
import threading

import pytest
from engine.asm import ORIGIN
from engine.machine import MMIO, machine_on

from vmfs.engine.base import INTERRUPT_QUEUE, Capability
from vmfs.words import exits
from vmfs.words.errors import Invalid, Unsupported, WouldBlock

SECONDS = 30  # for what takes milliseconds: a bound for a hang


class Runner:
    """One `run` in a thread of its own."""

    def __init__(self, vcpu):
        self._vcpu = vcpu
        self._exit = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        self._exit = self._vcpu.run()

    def exit(self):
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the run does not end"
        return self._exit


# The guest says where it is by a counter in RAM, so that a kick can be known to hit a guest that runs.
COUNT = "again: inc dword ptr [0x3000]; jmp again"


def wait_for_guest(vm, after=0):
    """Until the counter has moved on from `after`."""
    deadline = threading.Event()
    for _ in range(SECONDS * 1000):
        if struct.unpack("<I", vm.ram.read(0x3000, 4))[0] != after:
            return
        deadline.wait(0.001)
    raise AssertionError("the guest does not run")


@pytest.mark.parametrize("mode", ["real", "long", "user"])
def test_kick_ends_an_endless_loop(vm, assembler, mode):
    vm.load(assembler(COUNT, mode), mode)
    for _ in range(3):
        before = struct.unpack("<I", vm.ram.read(0x3000, 4))[0]
        run = Runner(vm.vcpu)
        wait_for_guest(vm, before)
        vm.vcpu.kick()
        exit_ = run.exit()
        assert isinstance(exit_, exits.Interrupted)
        assert exit_.rip == vm.regs()["rip"]


def test_a_kick_is_answered_once(vm, assembler):
    vm.load(assembler("hlt; l1: hlt; l2:", "long"), "long")
    for _ in range(5):
        vm.vcpu.kick()
    assert vm.vcpu.run().line() == f"interrupted rip={ORIGIN:#x}"
    assert vm.vcpu.run().line() == f"hlt rip={ORIGIN + 1:#x}"
    assert vm.vcpu.run().line() == f"hlt rip={ORIGIN + 2:#x}"


def test_no_kick_is_lost_and_none_is_left_over(vm, assembler):
    """Kicks at any point of a run that ends all the time by itself, each answered by exactly one exit."""
    vm.load(assembler("again: out 0x80, al; jmp again", "long"), "long")
    kicks = 200
    answered = threading.Semaphore(0)
    interrupted = 0

    def kick():
        for _ in range(kicks):
            vm.vcpu.kick()
            assert answered.acquire(timeout=SECONDS)

    kicker = threading.Thread(target=kick, daemon=True)
    kicker.start()
    while interrupted < kicks:
        if isinstance(vm.vcpu.run(), exits.Interrupted):
            interrupted += 1
            answered.release()
    kicker.join(SECONDS)
    assert not kicker.is_alive()
    assert all(vm.vcpu.run().REASON == "io" for _ in range(20)), "a kick was left over"


def test_kick_when_the_running_thread_has_ended(vm, assembler):
    vm.load(assembler("hlt; hlt", "long"), "long")
    assert Runner(vm.vcpu).exit().REASON == "hlt"
    vm.vcpu.kick()
    assert Runner(vm.vcpu).exit().REASON == "interrupted"


def test_runs_go_on_in_another_thread(vm, assembler):
    vm.load(assembler("mov eax, 1; out 0x80, al; in al, 0x81; hlt", "long"), "long")
    assert Runner(vm.vcpu).exit().REASON == "io"
    assert Runner(vm.vcpu).exit().line().startswith("io direction=in port=0x81 ")
    vm.vcpu.access_data = b"\x2a"
    assert Runner(vm.vcpu).exit().REASON == "hlt"
    assert vm.regs()["rax"] == 0x2A


def test_two_cpus_in_one_thread(vm, assembler):
    """A kick for one CPU does not end a run of the other, though both run in this thread."""
    other = vm.machine.create_vcpu(1)
    program = assembler("hlt; hlt; hlt", "long")
    vm.load(program, "long")
    for name in ("sregs", "regs"):
        other.set_state(name, vm.vcpu.get_state(name))
    vm.vcpu.kick()
    assert other.run().line() == f"hlt rip={ORIGIN + 1:#x} cpu=1"
    assert vm.vcpu.run().REASON == "interrupted"
    assert vm.vcpu.run().line() == f"hlt rip={ORIGIN + 1:#x}"


def test_a_signal_handler_runs_while_the_guest_does(vm, assembler):
    """In the main thread, a Python signal handler is called during a run, and may kick."""
    vm.load(assembler("again: jmp again", "long"), "long")
    called = []

    def handler(*_):
        called.append(True)
        vm.vcpu.kick()

    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert vm.vcpu.run().REASON == "interrupted"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert called


def test_the_queue_of_interrupts_has_an_end(vm, assembler):
    vm.load(assembler("hlt", "real"), "real")
    for number in range(INTERRUPT_QUEUE):
        assert vm.vcpu.interrupts_queued == number
        vm.vcpu.interrupt(0x20)
    with pytest.raises(WouldBlock):
        vm.vcpu.interrupt(0x20)
    assert vm.vcpu.interrupts_queued == INTERRUPT_QUEUE
    for vector in (-1, 256):
        with pytest.raises(Invalid):
            vm.vcpu.interrupt(vector)


def test_the_vectors_that_wait_are_told_in_order(vm, assembler):
    vm.load(assembler("hlt", "real"), "real")
    assert vm.vcpu.queued_vectors == ()
    for vector in (0x21, 0x20, 0xFF, 0x21):
        vm.vcpu.interrupt(vector)
    assert vm.vcpu.queued_vectors == (0x21, 0x20, 0xFF, 0x21)
    assert vm.vcpu.run().REASON == "hlt"  # with IF clear
    assert vm.vcpu.queued_vectors == (0x21, 0x20, 0xFF, 0x21)


def test_a_full_queue_is_delivered_in_order(vm, assembler):
    """Vectors 0x20 to 0x5f; each handler stores its number."""
    entries = "\n".join(
        f"mov word ptr [{vector * 4}], offset handler{vector}; mov word ptr [{vector * 4 + 2}], 0"
        for vector in range(0x20, 0x20 + INTERRUPT_QUEUE)
    )
    handlers = "\n".join(
        f"handler{vector}: mov byte ptr [si], {vector}; inc si; iret"
        for vector in range(0x20, 0x20 + INTERRUPT_QUEUE)
    )
    program = assembler(
        f"{entries}; mov si, 0x3000; hlt; sti; mov cx, 60000; again: cmp si, {0x3000 + INTERRUPT_QUEUE};"
        f" je done; loop again; done: cli; hlt; end: {handlers}",
        "real",
    )
    vm.load(program, "real")
    assert vm.vcpu.run().REASON == "hlt"
    for vector in range(0x20, 0x20 + INTERRUPT_QUEUE):
        vm.vcpu.interrupt(vector)
    assert vm.vcpu.run().line() == f"hlt rip={program.labels['end']:#x}"
    assert vm.ram.read(0x3000, INTERRUPT_QUEUE) == bytes(range(0x20, 0x20 + INTERRUPT_QUEUE))


def test_an_interrupt_and_a_kick_reach_a_guest_that_runs(vm, assembler):
    program = assembler(
        "mov word ptr [0x80], offset handler; mov word ptr [0x82], 0; sti;"
        "again: inc dword ptr [0x3000]; jmp again; handler: hlt; end:",
        "real",
    )
    vm.load(program, "real")
    run = Runner(vm.vcpu)
    wait_for_guest(vm)
    vm.vcpu.interrupt(0x20)
    vm.vcpu.kick()
    # Where this thread had to wait between the two, the guest may have halted already: then the next run is kicked.
    lines = [run.exit().line(), vm.vcpu.run().line()]
    assert f"hlt rip={program.labels['end']:#x}" in lines
    assert any(line.startswith("interrupted ") for line in lines)


def test_access_data_has_its_length(vm, assembler):
    vm.load(assembler("in ax, 0x80; out 0x80, al; hlt", "long"), "long")
    assert vm.vcpu.access_data == b""
    with pytest.raises(Invalid):
        vm.vcpu.access_data = b"\0"
    vm.vcpu.run()
    for wrong in (b"", b"\0", b"\0\0\0"):
        with pytest.raises(Invalid):
            vm.vcpu.access_data = wrong
    vm.vcpu.access_data = b"\x34\x12"
    assert vm.vcpu.run().line().startswith("io direction=out port=0x80 size=1 count=1 data=0x34 ")
    with pytest.raises(Invalid):  # an `out` waits for nothing
        vm.vcpu.access_data = b"\0"
    assert vm.vcpu.access_data == b"\x34"


def test_complete_ends_a_pending_in(vm, assembler):
    program = assembler("in al, 0x80; l1: mov ebx, eax; hlt; end:", "long")
    vm.load(program, "long")
    vm.vcpu.run()
    vm.vcpu.access_data = b"\x5a"
    vm.vcpu.complete()
    assert vm.regs()["rip"] == program.labels["l1"]
    assert vm.regs()["rax"] & 0xFF == 0x5A
    vm.set_regs(rcx=1)  # a part of regs, got and set: the `in` is not executed again
    assert vm.vcpu.run().line() == f"hlt rip={program.labels['end']:#x}"
    assert vm.regs()["rbx"] & 0xFF == 0x5A
    vm.vcpu.complete()  # nothing to complete


def test_a_split_access_is_several_exits(vm, assembler, engine):
    """8 bytes across the end of RAM: the part in RAM is done, the rest is an exit."""
    with machine_on(engine) as fresh:
        program = assembler(f"mov rdi, {MMIO + 0xFFC:#x}; mov [rdi], rax; mov rbx, [rdi]; hlt; end:", "long")
        fresh.load(program, "long")
        fresh.set_regs(rax=0x1122334455667788)
        lines = []
        reads = iter((b"\x01\x02\x03\x04", b"\x05\x06\x07\x08"))
        while not (exit_ := fresh.vcpu.run()).REASON == "hlt":
            assert isinstance(exit_, exits.Mmio), exit_.line()
            if exit_.direction == "read":
                fresh.vcpu.access_data = next(reads)
            lines.append((exit_.direction, exit_.addr - MMIO, exit_.size, exit_.data))
        assert lines == [
            ("write", 0xFFC, 4, b"\x88\x77\x66\x55"),
            ("write", 0x1000, 4, b"\x44\x33\x22\x11"),
            ("read", 0xFFC, 4, b""),
            ("read", 0x1000, 4, b""),
        ]
        assert fresh.regs()["rbx"] == 0x0807060504030201


def test_budget(vm, assembler):
    program = assembler("nop; nop; nop; l3: nop; hlt; end:", "long")
    vm.load(program, "long")
    if Capability.BUDGET not in vm.machine.capabilities:
        with pytest.raises(Unsupported):
            vm.vcpu.run(budget=3)
        assert vm.regs()["rip"] == ORIGIN
        return
    assert vm.vcpu.run(budget=3).line() == f"limit rip={program.labels['l3']:#x}"
    assert vm.vcpu.run(budget=100).line() == f"hlt rip={program.labels['end']:#x}"


def test_counters(vm, assembler):
    vm.load(assembler("nop; nop; hlt", "long"), "long")
    vm.vcpu.run()
    counters = vm.vcpu.counters()
    assert ("instructions" in counters) == (Capability.COUNTERS in vm.machine.capabilities)
    assert counters.get("instructions", 3) == 3
    assert counters["interrupts"] == 0


def test_a_cpu_that_was_shut_down_runs_again(vm, assembler):
    vm.load(assembler("ud2", "long"), "long")
    assert vm.vcpu.run().REASON == "shutdown"
    vm.load(assembler("mov eax, 3; hlt", "real"), "real")
    assert vm.vcpu.run().REASON == "hlt"
    assert vm.regs()["rax"] & 0xFFFF == 3
