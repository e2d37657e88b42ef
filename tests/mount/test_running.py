"""Running on a real mount: callers that block, signals, polls, and the machine's end under them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import resource
import select
import signal
import time
from collections.abc import Iterator

import pytest
from emulator.test_jitdump import loads
from mounting import SOON, Blocked, blocked_read, blocked_write, failing, running, wait_until

from vmfs.words.registers import REGISTERS

SPIN = "ebfe"  # jmp $
COUNT = "ff06 0020 ebfa"  # inc word [0x2000]; jmp
OUT_HLT = "b042 e680 f4"
IN_HLT = "e481 f4"

@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """SIGUSR1 is caught, and does nothing but to interrupt."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def run_fd(vm) -> Iterator[int]:
    fd = os.open(vm / "vm_run", os.O_RDWR)
    yield fd
    os.close(fd)


# ---- what a run is


def test_a_read_runs_once(vm, run_fd):
    vm.load(OUT_HLT)
    assert os.read(run_fd, 5) == b"io di"
    assert os.read(run_fd, 1000).startswith(b"rection=out port=0x80")
    assert os.read(run_fd, 1000) == b""
    assert vm.read("state") == "paused\n"
    assert os.pread(run_fd, 1000, 0) == b"hlt rip=0x1005\n"
    assert vm.read("state") == "halted\n"


@pytest.mark.parametrize(
    ("bound", "line"),
    [
        ("step", "debug cause=step rip=0x1001"),
        ("step 3", "debug cause=step rip=0x1003"),
        ("until 0x1002", "debug cause=breakpoint rip=0x1002"),
        ("insns 4", "limit rip=0x1004"),
        ("run", "hlt rip=0x1006"),
    ],
)
def test_bounds(vm, bound, line):
    vm.load("90 90 90 90 90 f4")
    vm.write("vm_run", bound)
    assert vm.read("exit") == f"{line}\n"


def test_a_bound_of_time(vm):
    vm.load(SPIN)
    vm.write("vm_run", "for 20ms")
    assert vm.read("exit") == "limit rip=0x1000\n"


def test_it_runs_in_the_background(vm):
    vm.load(COUNT)
    vm.write("state", "run")
    assert vm.read("state") == "running\n"
    for name, value in (("reg/rax", "1"), ("state", "run"), ("state", "reset"), ("mode", "long")):
        assert failing(vm.write, name, value) == errno.EBUSY
        assert vm.read("error").endswith("running\n")
    assert failing(vm.write, "regs", bytes(8)) == errno.EBUSY
    assert failing(vm.write, "engine", vm.read("engine")) == errno.EBUSY  # its own engine, too
    assert failing(vm.write, "exit.data", b"a") == errno.EBUSY
    assert failing(vm.run) == errno.EBUSY
    assert vm.read("reg/rip") in ("0x0000000000001000\n", "0x0000000000001004\n")
    assert "rip 0x000000000000100" in vm.read("registers")
    assert vm.read("state") == "running\n"  # reading has not stopped it
    vm.write("state", "pause")
    assert vm.read("state") == "paused\n"
    assert vm.read("exit").startswith("interrupted rip=0x100")
    vm.write("state", "pause")
    vm.write("reg/rax", "1")
    vm.write("state", "reset")
    assert vm.read("reg/rip") == "0x000000000000fff0\n"


def test_all_state_can_be_read_while_it_runs(vm):
    vm.load(COUNT)
    vm.write("state", "run")
    for name in "regs sregs fpu msrs events cpuid clock mode stat dirty debug".split():
        assert (vm / name).read_bytes(), name
    assert set(REGISTERS) <= set(os.listdir(vm / "reg"))
    assert (vm / "regs").stat().st_size == 144
    vm.write("debug", "break 0x1000")
    wait_until(lambda: not vm.is_running(), "the breakpoint stops it")
    assert vm.read("exit") == "debug cause=breakpoint id=1 rip=0x1000\n"


def test_a_triple_fault_and_reset(vm):
    vm.write("mode", "protected")
    fd = os.open(vm / "mem", os.O_RDWR)
    os.pwrite(fd, b"\x0f\x0b", 0x1000)  # ud2, with an IDT that has no room for any vector
    os.close(fd)
    vm.write("registers", "rip 0x1000\nidtr.base 0\nidtr.limit 0\n")
    line = vm.run()
    assert line.startswith("shutdown cause=triple-fault rip=")
    assert vm.read("state") == "shutdown\n"
    assert vm.run() == line
    vm.write("state", "reset")
    assert vm.read("state") == "paused\n"


# ---- signals


def test_a_signal_stops_the_guest_and_nothing_is_lost(vm, run_fd):
    vm.load(COUNT)
    mem = os.open(vm / "mem", os.O_RDONLY)
    for _ in range(5):
        reader = blocked_read(run_fd)
        running(vm)
        reader.signal()
        assert reader.end() == (-1, errno.EINTR, b"")
        assert vm.read("state") == "paused\n"  # at once, so that the next run is not EBUSY
        assert vm.read("exit").startswith("interrupted rip=0x100")
    before = int.from_bytes(os.pread(mem, 2, 0x2000), "little")
    vm.write("vm_run", "step 8")  # four turns at most, and at least
    after = int.from_bytes(os.pread(mem, 2, 0x2000), "little")
    assert (after - before) & 0xFFFF == 4
    os.close(mem)


def test_a_signal_stops_a_write(vm, run_fd):
    vm.load(SPIN)
    writer = blocked_write(run_fd, b"until 0x5000")
    running(vm)
    writer.signal()
    assert writer.end()[:2] == (-1, errno.EINTR)
    assert vm.read("state") == "paused\n"


def test_without_hooks_a_signal_for_another_thread_than_the_opener_is_noticed(own_server):
    vm = own_server(environment={"VMFS_NO_FUSE_HOOKS": "1"}).make()
    vm.load(SPIN)
    with open(vm / "vm_run", "rb", buffering=0) as opened:
        reader = blocked_read(opened.fileno())
        running(vm)
        reader.signal()
        assert reader.end() == (-1, errno.EINTR, b"")
    assert vm.read("state") == "paused\n"


def test_a_killed_caller_is_gone_and_its_guest_stops(vm):
    vm.load(SPIN)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            vm.run()
        os._exit(1)
    running(vm)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    wait_until(lambda: not vm.is_running(), "the guest stops")
    assert vm.load(OUT_HLT).run().startswith("io ")


# ---- O_NONBLOCK and poll


def polled(fd: int, events: int, seconds: float = 0) -> int:
    poll = select.poll()
    poll.register(fd, events)
    return dict(poll.poll(seconds * 1000)).get(fd, 0)


def test_running_without_blocking(vm):
    vm.load(OUT_HLT + SPIN)
    fd = os.open(vm / "vm_run", os.O_RDWR | os.O_NONBLOCK)
    assert polled(fd, select.POLLIN | select.POLLOUT) == select.POLLOUT
    lines = []
    while len(lines) < 2:
        try:
            lines.append(os.pread(fd, 1000, 0))
        except BlockingIOError:
            assert polled(fd, select.POLLIN, SOON) == select.POLLIN
    assert lines[0].startswith(b"io direction=out") and lines[1] == b"hlt rip=0x1005\n"
    assert failing(os.pread, fd, 1000, 0) == errno.EAGAIN  # it spins now
    assert polled(fd, select.POLLIN | select.POLLOUT) == 0
    assert failing(os.pread, fd, 1000, 0) == errno.EAGAIN
    assert failing(os.write, fd, b"step") == errno.EBUSY
    vm.write("state", "pause")
    assert polled(fd, select.POLLIN, SOON) == select.POLLIN
    assert os.pread(fd, 1000, 0) == b"interrupted rip=0x1005\n"
    os.write(fd, b"step 5")
    assert polled(fd, select.POLLIN, SOON) == select.POLLIN
    assert os.pread(fd, 1000, 0) == b"debug cause=step rip=0x1005\n"
    assert failing(os.pread, fd, 1000, 0) == errno.EAGAIN
    assert vm.is_running()
    os.close(fd)
    wait_until(lambda: not vm.is_running(), "a run that nobody waits for stops")


def test_blocking_may_be_switched_after_the_open(vm):
    if "signals_noticed_by interrupt-message" not in vm.read("stat"):
        pytest.skip("without the hooks in front of libfuse a read does not tell its file's flags")
    vm.load(SPIN)
    fd = os.open(vm / "vm_run", os.O_RDWR)
    os.set_blocking(fd, False)
    assert failing(os.pread, fd, 1000, 0) == errno.EAGAIN
    assert vm.is_running()
    os.set_blocking(fd, True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        line = pool.submit(os.pread, fd, 1000, 0)  # waits for the run that there is
        vm.write("state", "pause")
        assert line.result(SOON) == b"interrupted rip=0x1000\n"
    os.set_blocking(fd, False)
    os.write(fd, b"step 3")
    assert polled(fd, select.POLLIN, SOON) == select.POLLIN
    assert os.pread(fd, 1000, 0) == b"debug cause=step rip=0x1000\n"
    os.close(fd)


def test_a_poll_wakes_for_a_new_exit(vm):
    vm.load(OUT_HLT + "90" + SPIN)
    fd = os.open(vm / "exit", os.O_RDONLY)
    assert polled(fd, select.POLLIN | select.POLLPRI) == 0
    for start in ("io ", "hlt "):
        waiting = Blocked(lambda: (polled(fd, select.POLLPRI, SOON), b""))
        vm.write("state", "run")
        assert waiting.end()[0] == select.POLLPRI
        assert polled(fd, select.POLLIN) == select.POLLIN  # until it is read
        assert os.pread(fd, 1000, 0).decode().startswith(start)
        assert polled(fd, select.POLLIN | select.POLLPRI) == 0
    late = os.open(vm / "exit", os.O_RDONLY)
    assert polled(late, select.POLLIN) == select.POLLIN  # it has not read the last exit
    os.close(late)
    os.close(fd)


def test_a_poll_wakes_for_a_new_state(vm):
    vm.load(SPIN)
    fd = os.open(vm / "state", os.O_RDONLY)
    assert polled(fd, select.POLLIN) == select.POLLIN
    for verb, state in (("run", b"running\n"), ("pause", b"paused\n")):
        os.pread(fd, 100, 0)
        waiting = Blocked(lambda: (polled(fd, select.POLLIN, SOON), b""))
        vm.write("state", verb)
        assert waiting.end()[0] == select.POLLIN
        wait_until(lambda state=state: os.pread(fd, 100, 0) == state)
    os.close(fd)


def test_a_poll_wakes_when_the_interrupt_queue_has_room(vm):
    vm.load("fb" + SPIN)  # sti; jmp $
    # Vectors 0x20 on lead to an iret, so the guest takes one after another.
    mem = os.open(vm / "mem", os.O_RDWR)
    os.pwrite(mem, b"\x00\x20\x00\x00", 4 * 0x20)
    os.pwrite(mem, b"\xcf", 0x2000)
    os.close(mem)
    vm.write("registers", "rsp 0x8000\nss 0\nss.base 0\n")
    fd = os.open(vm / "irq", os.O_WRONLY | os.O_NONBLOCK)
    assert polled(fd, select.POLLOUT) == select.POLLOUT
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"\x20\0\0\0")
    assert polled(fd, select.POLLOUT) == 0
    waiting = Blocked(lambda: (polled(fd, select.POLLOUT, SOON), b""))
    vm.write("state", "run")
    assert waiting.end()[0] == select.POLLOUT
    vm.write("state", "pause")
    os.close(fd)


def test_plain_files_are_always_ready(vm):
    fd = os.open(vm / "regs", os.O_RDWR)
    assert polled(fd, select.POLLIN | select.POLLOUT) == select.POLLIN | select.POLLOUT
    os.close(fd)


# ---- the end


def test_rmdir_ends_what_is_open_and_who_is_blocked(server):
    vm = server.make().load(SPIN)
    names = ("regs", "registers", "mem", "exit", "state", "stat", "reg/rax", "error", "dirty", "cpu0/sregs")
    fds = {name: os.open(vm / name, os.O_RDONLY) for name in names}
    run, irq = os.open(vm / "vm_run", os.O_RDWR), os.open(vm / "irq", os.O_WRONLY)
    writing = os.open(vm / "mem", os.O_RDWR)
    os.pread(fds["exit"], 100, 0)
    passes = "memory_served_by passthrough" in vm.read("stat")
    reader = blocked_read(run)
    poller = Blocked(lambda: (polled(fds["exit"], select.POLLIN, SOON), b""))
    running(vm)
    began = time.monotonic()
    vm.path.rmdir()
    assert reader.end()[:2] == (-1, errno.ENODEV)
    assert poller.end()[0] & (select.POLLERR | select.POLLHUP)
    assert time.monotonic() - began < SOON / 2
    for name, fd in fds.items():
        if name == "mem" and passes:  # the kernel answers
            assert os.pread(fd, 10, 0x1000) == bytes(10)
            continue
        assert failing(os.pread, fd, 10, 0) == errno.ENODEV, name
    assert failing(os.fstat, fds["regs"]) == errno.ENODEV
    assert failing(os.pread, run, 100, 0) == errno.ENODEV
    assert failing(os.write, run, b"run") == errno.ENODEV
    assert failing(os.write, irq, b"1") == errno.ENODEV
    assert failing(os.pread, writing, 1, 0) == errno.ENODEV
    assert failing(os.pwrite, writing, b"1", 0) == errno.ENODEV
    assert failing(os.open, vm / "regs", os.O_RDONLY) == errno.ENOENT
    assert polled(fds["exit"], select.POLLIN) & select.POLLHUP
    for fd in (*fds.values(), run, irq, writing):
        os.close(fd)


def test_a_new_machine_of_the_same_name_is_another(server):
    vm = server.make()
    vm.write("reg/rax", "5")
    fd = os.open(vm / "regs", os.O_RDONLY)
    vm.path.rmdir()
    vm.path.mkdir()
    assert failing(os.pread, fd, 8, 0) == errno.ENODEV
    assert vm.read("reg/rax") == "0x0000000000000000\n"
    os.close(fd)
    vm.path.rmdir()


def test_a_directory_descriptor_outlives_its_machine(server):
    vm = server.make()
    directory = os.open(vm.path, os.O_RDONLY | os.O_DIRECTORY)
    vm.path.rmdir()
    with pytest.raises(OSError) as caught:
        os.open("regs", os.O_RDONLY, dir_fd=directory)
    assert caught.value.errno in (errno.ENOENT, errno.ENODEV)
    os.close(directory)


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 500, reason="200 machines take their server some 420 descriptors"
)
def test_two_hundred_blocked_callers(own_server):
    """On the engine that takes no CPU time: the mount answers others, and all are released."""
    server = own_server(fake=True, engine="fake")
    machines = [server.make() for _ in range(200)]
    fds = [os.open(vm / "vm_run", os.O_RDONLY) for vm in machines]
    readers = [blocked_read(fd) for fd in fds]
    for vm in machines:
        running(vm)
    other = server.make()
    assert len(other.read("registers").splitlines()) > 100
    assert (other / "regs").read_bytes()
    for reader in readers[:100]:
        reader.signal()
    for reader in readers[:100]:
        assert reader.end() == (-1, errno.EINTR, b"")
    for vm in machines[100:150]:
        vm.write("state", "pause")
    for reader in readers[100:150]:
        assert reader.end()[2].startswith(b"interrupted ")
    for vm in machines[150:]:
        vm.path.rmdir()
    for reader in readers[150:]:
        assert reader.end()[:2] == (-1, errno.ENODEV)
    for fd in fds:
        os.close(fd)


def test_the_time_of_a_run_counts_while_it_goes_on(vm):
    def run_time() -> int:
        return int(dict(line.split(" ", 1) for line in vm.read("stat").splitlines())["run_time_us"])

    vm.load("ebfe")  # jmp $
    assert run_time() == 0
    vm.write("state", "run")
    first = run_time()
    time.sleep(0.05)
    second = run_time()
    assert second - first >= 50_000
    vm.write("state", "pause")
    ended = run_time()
    assert ended >= second
    time.sleep(0.01)
    assert run_time() == ended


def test_a_machine_that_stands_still_for_long_gives_its_host_code_back(own_server):
    """It runs again as before, and what it then translates is given back, too."""
    vm = own_server(engine="emulator", environment={"VMFS_JIT_IDLE": "300"}).make()

    def count(name: str) -> int:
        return int(dict(line.split(" ", 1) for line in vm.read("stat").splitlines())[name])

    vm.write("mode", "protected")
    with open(vm / "mem", "r+b", buffering=0) as mem:
        os.pwrite(mem.fileno(), bytes.fromhex("b940420f00 ffc9 75fc f4"), 0x1000)  # mov ecx, 1000000; dec ecx; jnz; hlt
    for times in (1, 2):
        vm.write("reg/rip", "0x1000")
        assert vm.run().startswith("hlt ")
        assert count("regions") == times
        wait_until(lambda: count("code_bytes") == 0, "the code is given back")
        assert int(vm.read("reg/rcx"), 0) == 0


def test_host_code_of_a_confined_machine_is_named_for_perf(own_server, tmp_path):
    """The machine may open no file: its process has had one since before it was confined."""
    tmp_path.chmod(0o777)
    vm = own_server(engine="emulator", environment={"VMFS_JIT_DUMP": str(tmp_path)}).make()
    vm.write("mode", "protected")
    with open(vm / "mem", "r+b", buffering=0) as mem:
        os.pwrite(mem.fileno(), bytes.fromhex("b9a0860100 ffc9 75fc f4"), 0x1000)  # mov ecx, 100000; dec ecx; jnz; hlt
    vm.write("reg/rip", "0x1000")
    assert vm.run().startswith("hlt ")
    names = []
    for file in tmp_path.glob("vmfs-*/jit-*.dump"):  # of spares, too
        names += [name for _, name, code in loads(file.read_bytes(), int(file.stem[4:])) if b"\xff\xc9" in code]
    assert b"guest_1005" in names


def test_several_cpus_stop_together_and_step_alone(vm):
    vm.write("cpus", "3\n")
    with open(vm / "mem", "r+b") as mem:
        for cpu in range(3):
            mem.seek(0x1000 * (cpu + 1))
            mem.write(bytes.fromhex("40 eb fd"))  # again: inc ax; jmp again
            (vm / f"cpu{cpu}" / "registers").write_text(f"cs 0\ncs.base 0\nrip {0x1000 * (cpu + 1):#x}\n")
    assert sorted(name for name in os.listdir(vm.path) if name.startswith("cpu") and name[3:].isdigit()) == [
        "cpu0", "cpu1", "cpu2",
    ]  # fmt: skip
    vm.write("debug", "break 0x2001 cpu=1\n")
    assert vm.run().endswith(" rip=0x2001 cpu=1") or "rip=0x2001 cpu=1" in vm.read("exit")
    assert failing(lambda: vm.write("debug", "break 0x2002 cpu=3\n")) == errno.EINVAL
    before = (vm / "cpu0" / "reg" / "rip").read_text()
    vm.write("vm_run", "step 2 cpu=2\n")
    assert "cause=step" in vm.read("exit") and "cpu=2" in vm.read("exit")
    assert (vm / "cpu0" / "reg" / "rip").read_text() == before
    assert failing(lambda: vm.write("vm_run", "step cpu=3\n")) == errno.EINVAL
    assert failing(lambda: vm.write("cpus", "2\n")) == errno.EBUSY
    assert failing(lambda: (vm / "cpu3" / "regs").read_bytes()) == errno.ENOENT
    assert (vm / "cpu2" / "state").read_text() == "running\n"
