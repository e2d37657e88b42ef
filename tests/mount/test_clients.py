"""vmfs.client and vmfs.h on a real mount of each engine. Guests are code at CODE, in long mode by default."""

import errno
import os
import signal
import struct
import subprocess
import threading
from pathlib import Path

import pytest

import vmfs
from vmfs.client import Vm
from vmfs.words import exits
from vmfs.words.registers import REGISTERS

INCLUDE = Path(vmfs.__file__).parent / "include"
CODE = 0x1000
LOOP = bytes.fromhex("48ffc0 ebfb")  # inc rax; jmp
OUT = bytes.fromhex("e680 f4")  # out 0x80, al; hlt
OUT_LOOP = bytes.fromhex("e680 ebfc")
IN = bytes.fromhex("e460 f4")  # in al, 0x60; hlt


@pytest.fixture
def vm(mount):
    with Vm.temporary(mount, mem_size="16M", mode="long") as vm:
        yield vm


def load(vm, code, address=CODE):
    vm.mem[address : address + len(code)] = code
    vm.regs.rip = address


def fails(number):
    """The block raises OSError with this errno."""
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


# ---- Python: state


def test_settings_are_what_was_asked(vm, mount):
    assert (vm.mem_size, vm.mode, vm.state, vm.exit) == (16 << 20, "long", "paused", None)
    assert len(vm.mem) == 16 << 20
    assert vm.path.startswith(str(mount))


def test_one_file_is_behind_attribute_name_file_and_dump(vm):
    vm.regs.r15 = 0x1122334455667788
    assert vm.regs["r15"] == vm.regs.read()["r15"] == 0x1122334455667788
    assert vm.read_text("reg/r15") == "0x1122334455667788"
    assert struct.unpack_from("<Q", vm.read("regs"), 120) == (0x1122334455667788,)


def test_every_register_is_the_same_in_its_state_and_in_the_dump(vm):
    dump = vm.regs.read()
    assert set(dump) == set(REGISTERS)
    for name, row in REGISTERS.items():
        assert row.get(vm.read(row.state)) == dump[name] == vm.regs[name], name


def test_registers_of_each_kind_are_set(vm):
    values = {"rsi": 1, "cs.base": 0, "xmm3": (1 << 128) - 2, "dr1": 0x1234, "cr2": 5}
    values["st2"] = 0x4000C90FDAA22168C235  # pi
    vm.regs.update(values)
    assert {name: vm.regs[name] for name in values} == values
    for name in values:
        vm.regs[name] = 0
        assert vm.regs[name] == 0


def test_an_update_is_all_or_nothing(vm):
    before = vm.regs.read()
    with fails(errno.EINVAL) as caught:
        vm.regs.update({"rax": 77, "cr4": 1 << 63, "rbx": 78})  # reserved (SDM 3A 2.5)
    assert caught.value.strerror.startswith("registers: ")
    assert vm.regs.read() == before


def test_msrs(vm):
    lstar = 0xC0000082
    vm.msr[lstar] = 0xFFFFFFFF81000000
    assert vm.msr[lstar] == vm.msr.read()[lstar] == 0xFFFFFFFF81000000
    vm.regs.update({"msr.0xc0000082": 0x1000, "rdx": 3})
    assert (vm.msr[lstar], vm.regs.rdx) == (0x1000, 3)
    with fails(errno.ENOENT):
        vm.msr[0xDEADBEEF]


def test_memory_is_one(vm):
    vm.mem[0x3000:0x3004] = b"mmap"
    assert vm.read_mem(0x3000, 4) == b"mmap"
    vm.write_mem(0x3FFF, b"across pages")
    assert bytes(vm.mem[0x3FFF:0x400B]) == b"across pages"
    with fails(errno.EFBIG) as caught:
        vm.write_mem((16 << 20) - 1, b"two")
    assert "past the end of RAM" in str(caught.value)
    assert vm.mem[-1] == ord("t")  # as with any file: what there was room for
    with fails(errno.EFAULT):
        vm.read_mem((16 << 20) - 1, 2)


def test_memory_size_can_change_before_the_first_run_only(mount):
    with Vm.temporary(mount) as vm:
        vm.mem[0] = 1
        vm.mem_size = "8M"
        assert (vm.mem_size, len(vm.mem)) == (8 << 20, 8 << 20)
        vm.mode = "long"
        load(vm, b"\xf4")
        vm.run()
        with fails(errno.EBUSY):
            vm.mem_size = 4 << 20
        assert vm.mem_size == 8 << 20


def test_a_refused_value_is_a_sentence(vm):
    with fails(errno.EINVAL) as caught:
        vm.mode = "odd"
    assert caught.value.strerror == "mode: there is no mode odd: real, protected, long"


# ---- Python: running


def test_exits_are_the_same_as_line_and_as_struct(vm):
    load(vm, OUT)
    vm.regs.rax = 0x41
    expected = exits.Io(direction="out", port=0x80, size=1, data=b"A", rip=CODE + 2)
    assert vm.run() == vm.exit == expected
    assert vm.read("exit.bin") == expected.pack()
    assert vm.read("vm_run.bin") == exits.Hlt(rip=CODE + 3).pack()
    assert vm.exit == exits.Hlt(rip=CODE + 3)
    assert vm.state == "halted"


@pytest.mark.parametrize(("answer", "rax"), [(0x5A, 0x5A), (-1, 0xFF), (b"\x07", 7), (None, 0xFF)])
def test_an_input_is_answered(vm, answer, rax):
    load(vm, IN)
    vm.regs.rax = 0
    assert vm.run() == exits.Io(direction="in", port=0x60, size=1, rip=CODE)
    if answer is not None:
        vm.answer(answer)
    assert vm.run() == exits.Hlt(rip=CODE + 3)
    assert vm.regs.rax == rax


def test_a_load_and_a_store_beyond_ram(vm):
    load(vm, bytes.fromhex("bb000000d0 488b03 48ffc0 66894302 f4"))  # rax = [0xd0000000] + 1; [rbx + 2] = ax
    assert vm.run() == exits.Mmio(direction="read", addr=0xD0000000, size=8, rip=CODE + 5)
    vm.answer(0x1122334455667788)
    exit_ = vm.run()
    assert exit_ == exits.Mmio(direction="write", addr=0xD0000002, size=2, data=b"\x89\x77", rip=CODE + 15)
    assert vm.run() == exits.Hlt(rip=CODE + 16)


def test_an_answer_of_the_wrong_size_is_refused(vm):
    load(vm, IN)
    vm.run()
    with fails(errno.EFBIG):
        vm.answer(b"two")
    with pytest.raises(ValueError, match="does not fit 1 byte"):
        vm.answer(256)


def test_steps(vm):
    load(vm, LOOP)
    vm.regs.rax = 0
    assert vm.step() == exits.Debug(cause="step", rip=CODE + 3)
    assert vm.step(4) == exits.Debug(cause="step", rip=CODE + 3)
    assert vm.regs.rax == 3


def test_a_step_over_an_exit_is_that_exit(vm):
    load(vm, OUT)
    vm.regs.rax = 0
    assert vm.step() == exits.Io(direction="out", port=0x80, size=1, data=b"\0", rip=CODE + 2)
    assert vm.step() == exits.Hlt(rip=CODE + 3)


def test_a_count_of_instructions_ends_a_run(vm):
    load(vm, LOOP)
    vm.regs.rax = 0
    assert vm.run(insns=101) == exits.Limit(rip=CODE + 3)
    assert vm.regs.rax == 51


def test_a_run_ends_at_the_first_of_its_bounds(vm):
    load(vm, LOOP)
    assert vm.run(until=CODE + 3, timeout=600) == exits.Debug(cause="breakpoint", rip=CODE + 3)
    assert vm.run(until=CODE, insns=50) == exits.Debug(cause="breakpoint", rip=CODE)
    assert isinstance(vm.run(until=0x4000, timeout=0.05), exits.Limit)
    load(vm, LOOP)
    assert vm.run(until=0x4000, insns=3, timeout=600) == exits.Limit(rip=CODE + 3)
    assert vm.run(until=0x4000, steps=2) == exits.Debug(cause="step", rip=CODE + 3)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("step 1 insns 1", "a run counts `step` or `insns`, not both"),
        ("for 1s for 2s", "each bound stands once"),
        ("until 0x1000 0x2000 for 1s", "it is `until ADDR`"),
        ("until for", "'for' is neither a number nor a symbol"),
        ("until", "it is `until ADDR`"),
        ("for 1s never", "it is `for TIME`"),
        ("1s for", "there is no '1s'"),
    ],
)
def test_bounds_that_are_none(vm, line, sentence):
    with fails(errno.EINVAL) as caught:
        vm.write("vm_run", line)
    assert sentence in caught.value.strerror
    assert (vm.exit, vm.state) == (None, "paused")


def test_a_symbol_may_have_the_name_of_a_bound(vm):
    load(vm, b"\x90" * 8)
    vm.write("symbols", f"{CODE + 5:016x} T for\n")
    vm.write("vm_run", "until for for 600s")
    assert vm.exit == exits.Debug(cause="breakpoint", rip=CODE + 5)


def test_what_is_understood_at_the_close_is_there_after_a_write(vm):
    vm.write("symbols", "0000000000001000 T begin\n")
    vm.write("symbols", "0000000000001005 T there\n")  # in place of those before
    assert vm.read_text("symbols") == "0000000000001005 T there"
    load(vm, b"\x90" * 16)
    assert vm.run(until="there") == exits.Debug(cause="breakpoint", rip=CODE + 5)
    with fails(errno.EINVAL) as caught:
        vm.write("symbols", b"\x7fELF and no more")
    assert caught.value.strerror.startswith("symbols: ")
    vm.write("kernel", b"the longer one")
    vm.write("kernel", b"short")
    assert vm.read("kernel") == b"short"


def test_a_start_that_fails_is_an_exit_of_its_own(mount):
    with Vm.temporary(mount, machine="pc", kernel="no kernel") as vm:
        with fails(errno.EINVAL) as caught:
            vm.run()
        assert "kernel: not an image that can be booted" in caught.value.strerror
        vm.start()
        ended = vm.wait(timeout=60)
        assert isinstance(ended, exits.Error) and "kernel: not an image that can be booted" in ended.reason
        assert (vm.state, ended.rip) == ("paused", 0xFFF0)


def test_a_machine_that_is_gone_is_closed_without_a_failure(mount):
    before = os.listdir("/proc/self/fd")
    vm = Vm.create(mount / "gone")
    vm.regs.rax = 1
    fd = os.open(os.path.join(vm.path, "symbols"), os.O_WRONLY)
    os.write(fd, b"0000000000001000 T begin\n")
    vm._files["symbols", os.O_WRONLY] = fd  # a file whose close fails: ENODEV
    vm.remove()
    assert os.listdir("/proc/self/fd") == before


def test_until_and_breakpoints(vm):
    load(vm, b"\x90" * 16 + b"\xf4")
    assert vm.run(until=CODE + 5) == exits.Debug(cause="breakpoint", rip=CODE + 5)
    first, second = vm.breakpoint(CODE + 8), vm.breakpoint(CODE + 12)
    assert first != second
    assert vm.run() == exits.Debug(cause="breakpoint", id=first, rip=CODE + 8)
    assert vm.run() == exits.Debug(cause="breakpoint", id=second, rip=CODE + 12)
    vm.regs.rip = CODE
    vm.delete(first)
    assert vm.run() == exits.Debug(cause="breakpoint", id=second, rip=CODE + 12)
    vm.delete()
    assert vm.run() == exits.Hlt(rip=CODE + 17)
    with fails(errno.EINVAL):
        vm.delete(first)


def test_a_time_ends_a_run(vm):
    load(vm, LOOP)
    exit_ = vm.run(timeout=0.05)
    assert isinstance(exit_, exits.Limit)
    assert exit_.rip in (CODE, CODE + 3)
    assert vm.state == "paused"


def test_in_the_background(vm):
    load(vm, bytes.fromhex("803c250020000000 74f6 f4"))  # until the byte at 0x2000 is set; hlt
    vm.start()
    assert vm.state == "running"
    assert vm.wait(timeout=0) is None
    for refused in (vm.run, vm.start, vm.reset, lambda: vm.regs.update(rax=1), lambda: vm.answer(b"x")):
        with fails(errno.EBUSY):
            refused()
    assert vm.regs.rip in (CODE, CODE + 8)
    if not vm.mem_is_live:
        vm.pause()
    vm.mem[0x2000] = 1
    if not vm.mem_is_live:
        vm.start()
    assert vm.wait(timeout=60) == exits.Hlt(rip=CODE + 11)
    assert vm.wait(timeout=0) is None  # an exit is news once


def test_pause_ends_the_run_of_another_thread(vm):
    load(vm, LOOP)
    found = []
    runner = threading.Thread(target=lambda: found.append(vm.run()))
    runner.start()
    while vm.state != "running":
        pass
    vm.pause()
    runner.join(60)
    assert [type(exit_) for exit_ in found] == [exits.Interrupted]
    assert found[0].rip == vm.regs.rip
    assert vm.exit == found[0]
    assert vm.step().rip in (CODE, CODE + 3)  # it goes on


def test_a_signal_handler_that_raises_ends_a_run(vm):
    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    load(vm, LOOP)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with pytest.raises(Alarm):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            vm.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert vm.state == "paused"
    count = vm.regs.rax
    vm.step(2)
    assert vm.regs.rax == count + 1


def test_a_bound_is_kept_across_signals(vm):
    """Python repeats a call that a signal has ended; the run is not to begin its count anew."""
    count = 20_000_000 if vm.engine == "emulator" else 4000
    seen = []

    def ring(*_):
        seen.append(vm.state)
        if len(seen) % 3:  # one at a time, however long that took
            signal.setitimer(signal.ITIMER_REAL, 0.005)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        while "running" not in seen:  # each run lasts longer than that, on an idle machine
            load(vm, LOOP)
            vm.regs.rax = 0
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            assert vm.run(insns=count) == exits.Limit(rip=CODE)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert vm.regs.rax == count // 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_that_raises_ends_a_run_with_a_bound(vm):
    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    load(vm, LOOP)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with pytest.raises(Alarm):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            vm.run(timeout=1000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert vm.state == "paused"
    assert isinstance(vm.exit, exits.Interrupted)
    count = vm.regs.rax
    assert vm.run(insns=2).rip == vm.regs.rip
    assert vm.regs.rax == count + 1


# ---- Python: points, traces, CPUs, snapshots


def test_points_and_their_options(vm):
    load(vm, LOOP)
    vm.regs.rax = 0
    third = vm.breakpoint(CODE, condition="rax==3", once=True)
    assert vm.run() == exits.Debug(cause="breakpoint", id=third, rip=CODE)
    assert (vm.regs.rax, vm.points()) == (3, [])
    store = vm.iobreak("0x60-0x64", ignore=1)
    (point,) = vm.points()
    assert (point.id, point.hits) == (store, 0) and point.what.startswith("iobreak 0x60-0x64 ignore 1 ")
    vm.delete(store)
    assert vm.points() == []


def test_what_is_traced_can_be_read_while_and_after(vm):
    if vm.engine != "emulator":
        pytest.skip("KVM traces instructions and exits only")
    load(vm, bytes.fromhex("ff0425 00200000 ebf7"))  # inc dword [0x2000]; jmp
    with vm.trace("insn", "mem") as records:
        vm.run(insns=4)
        first = next(records)
    rest = list(records)
    assert (first.kind, first.address, first.cpu) == ("insn", CODE, 0)
    accesses = [(each.is_write, each.address, each.size, each.value, each.at) for each in rest if each.kind == "mem"]
    assert accesses == [(way, 0x2000, 4, number + way, CODE) for number in (0, 1) for way in (False, True)]
    assert sum(each.size for each in (first, *rest) if each.kind == "insn") == 4
    assert vm.stat["trace"].startswith("off")


def test_cpus_have_registers_of_their_own(mount):
    with Vm.temporary(mount, mem_size="16M", cpus=2) as vm:
        vm.cpu(1).regs.rax = 7
        assert (vm.cpus, vm.cpu(1).regs.rax, vm.regs.rax, vm.cpu(1).state) == (2, 7, 0, "running")
        assert vm.read_text("cpu1/reg/rax") == "0x0000000000000007"
        with fails(errno.ENOENT):
            vm.cpu(2)


def test_a_snapshot_is_gone_back_to(vm):
    load(vm, LOOP)
    vm.run(insns=4)
    vm.snapshot("there")
    before = vm.regs.read()
    vm.run(insns=100)
    vm.mem[0x3000] = 1
    vm.restore("there")
    assert (vm.regs.read(), vm.read_mem(0x3000, 1)) == (before, b"\0")
    with pytest.raises(FileExistsError):
        vm.snapshot("there")
    assert vm.snapshots == ["there"]
    vm.drop("there")
    assert vm.snapshots == []
    with fails(errno.ENOENT):
        vm.restore("there")


def test_a_fork_goes_its_own_way(vm):
    load(vm, LOOP)
    vm.run(insns=4)
    vm.snapshot("there")
    rax = vm.regs.rax
    vm.run(insns=4)
    with vm.fork(os.path.basename(vm.path) + "-a", "there") as then, vm.fork(os.path.basename(vm.path) + "-b") as now:
        try:
            assert (then.regs.rax, now.regs.rax, then.state) == (rax, rax + 2, "paused")
            then.run(insns=2)
            assert (then.regs.rax, vm.regs.rax) == (rax + 1, rax + 2)
            with pytest.raises(FileExistsError):
                vm.fork(os.path.basename(then.path))
        finally:
            then.remove()
            now.remove()


def test_going_back_in_time_and_who_wrote_it(vm):
    if vm.engine != "emulator":
        with fails(errno.EOPNOTSUPP):
            vm.record()
        return
    load(vm, bytes.fromhex("ff0425 00200000 ebf7"))  # inc dword [0x2000]; jmp
    vm.record(memory="64M")
    vm.run(insns=1000)
    done = vm.stat["instructions"]
    assert vm.read_mem(0x2000, 4) == (500).to_bytes(4, "little")
    assert vm.back(10).rip == CODE
    assert vm.read_mem(0x2000, 4) == (495).to_bytes(4, "little")
    vm.goto(done - 500)
    assert vm.read_mem(0x2000, 4) == (250).to_bytes(4, "little")
    assert vm.back(until=CODE + 7) == exits.Debug(cause="breakpoint", rip=CODE + 7)
    vm.goto(done)
    vm.watch(0x2000, 4, "w")
    assert isinstance(vm.back(), exits.Debug)
    vm.record(False)


def test_why_it_shut_down(vm):
    load(vm, bytes.fromhex("0f0b"))  # UD2, and there is no IDT
    assert vm.run() == exits.Shutdown(cause="triple-fault", rip=vm.regs.rip)
    assert "#UD" in vm.why or vm.engine == "kvm"
    assert f"{CODE:#x}" in vm.why


def test_the_next_instructions_and_symbols(vm):
    load(vm, LOOP)
    vm.load_symbols(f"{CODE:016x} T begin\n".encode())
    assert vm.symbol("begin") == CODE
    assert [line.rpartition("  ")[2] for line in vm.disasm(count=2)] == ["inc rax", "jmp 0x1000 <begin>"]
    with pytest.raises(KeyError):
        vm.symbol("end")


def real_mode_interrupts(vm):
    """A guest that halts with interrupts on; the handlers of vector 0x21 and of the NMI set bx."""
    vm.mode = "real"  # where the table of vectors is as simple as this
    vm.mem[4 * 0x21 : 4 * 0x21 + 4] = struct.pack("<HH", 0x2000, 0)
    vm.mem[4 * 2 : 4 * 2 + 4] = struct.pack("<HH", 0x2010, 0)  # NMI
    vm.mem[0x2000:0x2004] = bytes.fromhex("bb3412 cf")  # mov bx, 0x1234; iret
    vm.mem[0x2010:0x2014] = bytes.fromhex("bb7856 cf")
    load(vm, bytes.fromhex("fb 90 f4 f4"))  # sti; nop; hlt; hlt
    vm.regs.rbx = 0


def test_an_interrupt(vm):
    real_mode_interrupts(vm)
    assert vm.run() == exits.Hlt(rip=CODE + 3)
    vm.interrupt(0x21)
    assert vm.run() == exits.Hlt(rip=CODE + 4)
    assert vm.regs.rbx == 0x1234


def test_a_non_maskable_interrupt(vm):
    real_mode_interrupts(vm)
    vm.run()
    vm.nmi()
    assert vm.run() == exits.Hlt(rip=CODE + 4)
    assert vm.regs.rbx == 0x5678


def test_a_full_queue_would_block(vm):
    with pytest.raises(BlockingIOError):
        for _ in range(1000):
            vm.interrupt(0x21)


def test_a_shutdown_and_a_reset(vm):
    load(vm, bytes.fromhex("0f0b"))  # ud2, and no IDT
    assert vm.run() == exits.Shutdown(cause="triple-fault", rip=CODE)
    assert vm.state == "shutdown"
    vm.reset()
    assert (vm.state, vm.mode, vm.regs.rip, vm.regs["cs.base"]) == ("paused", "real", 0xFFF0, 0xFFFF0000)


# ---- Python: the end


def test_a_removed_machine_is_gone(mount):
    vm = Vm.create(mount / "gone", mode="long")
    other = Vm.open(mount / "gone")
    assert other.regs.rax == 0
    other.fileno()
    with pytest.raises(FileExistsError):
        Vm.create(mount / "gone")
    vm.remove()
    with fails(errno.ENODEV):
        other.regs.rax  # noqa: B018
    with fails(errno.ENODEV):
        other.regs.rax = 1
    other.close()
    with pytest.raises(FileNotFoundError):
        Vm.open(mount / "gone")


def test_removing_ends_a_run(mount):
    vm = Vm.create(mount / "runs", mode="long")
    load(vm, LOOP)
    found = []

    def run():
        try:
            found.append(vm.run())
        except OSError as error:
            found.append(error.errno)

    runner = threading.Thread(target=run)
    runner.start()
    while vm.state != "running":
        pass
    os.rmdir(vm.path)
    runner.join(60)
    vm.close()
    assert found == [errno.ENODEV]


def test_a_refused_setting_leaves_no_machine(mount):
    before = os.listdir(mount)
    with fails(errno.EINVAL):
        Vm.create(mount / "refused", mode="odd")
    assert os.listdir(mount) == before


# ---- C

INTERRUPTED = r"""
#include <signal.h>
#include <stdio.h>
#include <sys/time.h>
#include <vmfs.h>
static void ring(int number) { (void)number; }
static void show(int answer)
{
    printf("%d %d\n", answer, errno);
    errno = 0;
}
int main(int argc, char **argv)
{
    struct vmfs_exit e;
    struct sigaction action;
    struct itimerval soon;
    int ctx = open(argv[argc - 1], O_RDONLY | O_DIRECTORY);
    int run = openat(ctx, "vm_run.bin", O_RDONLY);

    memset(&action, 0, sizeof action);
    action.sa_handler = ring; /* without SA_RESTART: the call is to fail */
    sigaction(SIGALRM, &action, NULL);
    memset(&soon, 0, sizeof soon);
    soon.it_value.tv_usec = 50000;
    setitimer(ITIMER_REAL, &soon, NULL);
    show(kvm_run(ctx, &e));
    setitimer(ITIMER_REAL, &soon, NULL);
    show(vmfs_run(run, &e));
    vmfs_write(ctx, "debug", "1");
    show(vmfs_run(run, &e));
    show(kvm_run(ctx, &e));
    show(vmfs_destroy(argv[argc - 1]));
    show(vmfs_run(run, &e));
    return 0;
}
"""


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_a_c_program_is_interrupted_and_goes_on(mount, tmp_path, compiler):
    source = tmp_path / ("program.c" if compiler == "gcc" else "program.cc")
    source.write_text(INTERRUPTED)
    program = tmp_path / "program"
    subprocess.run([compiler, f"-I{INCLUDE}", source, "-o", program], check=True)
    with Vm.create(mount / f"c-{compiler.replace('+', 'p')}", mode="long") as vm:
        load(vm, LOOP)
        done = subprocess.run([program, vm.path], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        f"-1 {errno.EINTR}",
        f"-1 {errno.EINTR}",
        "4 0",
        "4 0",
        "0 0",
        f"-1 {errno.ENODEV}",
    ]


def test_two_runners_are_one_too_many(vm):
    load(vm, OUT_LOOP)
    descriptors = [os.open(os.path.join(vm.path, name), os.O_RDONLY) for name in ("vm_run", "vm_run.bin")]
    for fd in descriptors * 3:  # in turn, both run
        assert os.pread(fd, 4096, 0)
    load(vm, LOOP)
    vm.start()
    for fd in descriptors:
        with fails(errno.EBUSY):
            os.pread(fd, 4096, 0)
        os.close(fd)
    vm.pause()
