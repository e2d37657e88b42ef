"""The lane: reads of hot files that C threads answer. The answers and the facts are those that there are without it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import select
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import (
    LIBC,
    Machine,
    Server,
    blocked_read,
    failing,
    has_news,
    reason_against,
    running,
    serving,
    wait_until,
)
from vmfs.machine._lane import ENDED, ORDER

from vmfs.engine import ENGINES
from vmfs.engine.base import INTERRUPT_QUEUE
from vmfs.words.exits import parse_exit

OUT_LOOP = "e680 ebfc"  # again: out 0x80, al; jmp again
FOREVER = "ebfe"


WAYS = [(engine, way) for engine in ENGINES for way in ("lane", "no-lane")]


@pytest.fixture(scope="module", params=WAYS, ids=[f"{engine.name}-{way}" for engine, way in WAYS])
def server(request, tmp_path_factory) -> Iterator[Server]:
    """With the lane and without: what a test says holds of both."""
    engine, way = request.param
    reason = reason_against(engine)
    if reason:
        pytest.skip(reason)
    environment = {} if way == "lane" else {"VMFS_NO_LANE": "1"}
    with serving(tmp_path_factory, engine=engine.name, environment=environment) as one:
        one.has_lane = way == "lane"
        one.engine = engine.name
        yield one


def stat(vm: Machine) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in vm.read("stat").splitlines())


def looping(vm: Machine, code: str = OUT_LOOP) -> Machine:
    """A machine that has run once: only then are runs the CPU's alone."""
    vm.write("mode", "real")
    vm.load(code)
    vm.run()
    return vm


@contextlib.contextmanager
def opened(vm: Machine, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(vm / name, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def run(fd: int) -> bytes:
    return os.pread(fd, 64, 0)


def test_it_serves(server, vm):
    looping(vm)
    on_kvm = server.engine == "kvm"  # where sregs after a run and all writes are Python's
    names = ("regs", "exit.data", "exit.bin", "state", *(() if on_kvm else ("sregs",)))
    with contextlib.ExitStack() as stack:
        still = [stack.enter_context(opened(vm, name)) for name in names]
        for name in ("vm_run.bin", "vm_run"):
            runs = stack.enter_context(opened(vm, name))
            for fd in still:
                before = stat(vm)
                for _ in range(200):
                    run(runs)
                    os.pread(fd, 8, 0)
                after = stat(vm)
                done = {what: int(after[what]) - int(before[what]) for what in ("lane_runs", "lane_reads")}
                assert min(done.values()) > 100 if server.has_lane else not any(done.values()), (done, fd)
        regs = stack.enter_context(opened(vm, "regs", os.O_RDWR))
        for _ in range(200):
            run(runs)
            os.pwrite(regs, bytes(8), 0)
        written = int(stat(vm)["lane_writes"])
        assert written > 100 if server.has_lane and not on_kvm else not written


def calls_of(vm: Machine) -> int:
    """How often the machine's process was woken: it is for each message."""
    status = (Path("/proc") / stat(vm)["pid"] / "status").read_text()
    return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])


def test_what_stands_still_costs_the_machine_nothing(server, vm):
    """`cat regs`: neither the open, nor the size, nor the read."""
    looping(vm)
    names = ("regs", "exit.data", "exit.bin", "state")
    for name in names * 2:
        (vm / name).read_bytes()
        os.stat(vm / name)
    before = calls_of(vm)
    for _ in range(50):
        for name in names:
            data = (vm / name).read_bytes()
            assert os.stat(vm / name).st_size == len(data)
    woken = calls_of(vm) - before
    assert woken < 20 if server.has_lane else woken > 200
    for number in range(5):
        vm.write("reg/rbx", f"{number}")
        assert struct.unpack_from("<Q", (vm / "regs").read_bytes(), 8) == (number,)


def test_sizes_and_times_follow_the_runs(server, vm):
    looping(vm, "e480 f4 ebfb")  # in, hlt
    with opened(vm, "vm_run.bin") as runs:
        for _ in range(3):
            for _ in range(2):
                run(runs)
                for name in ("regs", "exit.data", "exit.bin", "state"):
                    assert os.stat(vm / name).st_size == len((vm / name).read_bytes()), name
            before = os.stat(vm / "regs").st_mtime_ns
            assert os.stat(vm / "regs").st_mtime_ns == before
            time.sleep(0.02)
            run(runs)
            assert os.stat(vm / "regs").st_mtime_ns > before


def test_a_machine_with_devices(server, vm):
    """Reads of what stands still are the lane's there, too."""
    vm.write("machine", "pc")
    vm.write("mode", "real")
    vm.load("90 ebfd")
    vm.write("vm_run", "step 3")
    with opened(vm, "regs") as regs, opened(vm, "state") as state, opened(vm, "vm_run.bin", os.O_RDWR) as runs:
        for number in range(10):
            vm.write("reg/rbx", f"{number}")
            before = int(stat(vm)["lane_reads"])
            for _ in range(20):
                assert struct.unpack("<Q", os.pread(regs, 8, 8)) == (number,)
                assert os.pread(state, 100, 0) == b"paused\n"
            assert (int(stat(vm)["lane_reads"]) - before > 30) == server.has_lane
        call = blocked_read(runs)
        running(vm)
        assert os.pread(state, 100, 0) == b"running\n"
        vm.write("state", "pause")
        assert call.end()[2][:4] == struct.pack("<I", 10)
        assert stat(vm)["lane_runs"] == "0"


ACCESSES = {
    "out": "b012 e680 ebfa",
    "in": "e480 ebfc",
    "a word out": "b83412 e780 ebf9",
    "many out": "be0010 b93c00 fc ba8000 f36e ebf2",
    "many in": "bf0020 b90500 fc ba8000 f36c ebf2",
    "hlt": "f4 ebfd",
}


@pytest.mark.parametrize("code", ACCESSES.values(), ids=ACCESSES)
def test_the_answer_is_the_exit(server, vm, code):
    """The struct that C packs is the one of `exit.bin`, and all that is told of the exit is of that one."""
    looping(vm, code)
    with (
        opened(vm, "vm_run.bin") as runs,
        opened(vm, "regs") as regs,
        opened(vm, "exit.data") as data,
        opened(vm, "exit.bin") as last,
        opened(vm, "state") as state,
    ):
        for number in range(5):
            line = run(runs)
            read, pending = os.pread(regs, 144, 0), os.pread(data, 4096, 0)
            assert os.pread(last, 100, 0) == line
            assert os.pread(state, 100, 0) == (b"halted\n" if line[0] == 5 else b"paused\n")
            if number % 2:
                continue  # nobody looks
            assert (vm / "exit.bin").read_bytes() == line
            assert (vm / "exit.data").read_bytes() == pending
            reason, _, rip = struct.unpack_from("<IIQ", line)
            assert struct.unpack_from("<Q", read, 128) == (rip,)
            assert f"rip={rip:#x}" in vm.read("exit")
            assert vm.read("state") == ("halted\n" if reason == 5 else "paused\n")
            assert vm.read("registers").partition("\n")[0].split()[0] == "rax"


@pytest.mark.parametrize("code", ["b8000000f0 c70078563412 ebf8", "b8000000f0 8b18 ebfc"], ids=["store", "load"])
def test_memory_that_is_none(server, vm, code):
    vm.write("mode", "long")
    with opened(vm, "mem", os.O_RDWR) as mem:
        os.pwrite(mem, bytes.fromhex(code), 0x1000)
    vm.write("reg/rip", "0x1000")
    vm.run()
    with opened(vm, "vm_run.bin") as runs:
        for _ in range(5):
            line = run(runs)
            assert struct.unpack_from("<IIQQ", line)[::3] == (6, 0xF0000000)
            assert (vm / "exit.bin").read_bytes() == line
            assert vm.read("exit").startswith("mmio ")
    with opened(vm, "vm_run") as runs:
        for _ in range(5):
            line = os.pread(runs, 4096, 0).decode()
            assert line == vm.read("exit") == parse_exit(line).line() + "\n"


@pytest.mark.parametrize("code", ACCESSES.values(), ids=ACCESSES)
def test_the_line_is_the_exit(server, vm, code):
    looping(vm, code)
    with opened(vm, "vm_run") as runs:
        for _ in range(5):
            line = os.pread(runs, 4096, 0).decode()
            assert line == vm.read("exit") == parse_exit(line).line() + "\n"
            assert os.pread(runs, 4096, 3).decode() == line[3:]


def test_the_line_goes_on(server, vm):
    looping(vm)
    with opened(vm, "vm_run.bin") as fd:
        whole = run(fd)
        assert os.pread(fd, 64, 16) == whole[16:]
        assert os.pread(fd, 64, 64) == b""
        assert os.pread(fd, 10, 0) == run(fd)[:10]
        assert len(os.pread(fd, 100, 10)) == 54


def test_counts(server, vm):
    looping(vm)
    before = stat(vm)
    with opened(vm, "vm_run.bin") as fd:
        for _ in range(500):
            run(fd)
    after = stat(vm)
    for name in ("runs", "exits.io"):
        assert int(after[name]) - int(before[name]) == 500
    if "instructions" in after:
        assert int(after["instructions"]) - int(before["instructions"]) == 1000
    assert int(after["run_time_us"]) > int(before["run_time_us"])


def test_what_is_set_is_read(server, vm):
    looping(vm)
    with opened(vm, "regs", os.O_RDWR) as regs, opened(vm, "sregs") as sregs, opened(vm, "vm_run.bin") as runs:
        for number in range(20):
            vm.write("reg/rbx", f"{number}")
            assert struct.unpack("<Q", os.pread(regs, 8, 8)) == (number,)
            os.pwrite(regs, struct.pack("<Q", number + 7), 8)
            assert struct.unpack("<Q", os.pread(regs, 8, 8)) == (number + 7,)
            vm.write("reg/cr3", f"{number << 12:#x}")
            assert os.pread(sregs, 312, 0) == (vm / "sregs").read_bytes()
            run(runs)
            assert struct.unpack("<Q", os.pread(regs, 8, 8)) == (number + 7,)
            vm.write("state", "reset")
            assert struct.unpack("<Q", os.pread(regs, 8, 128)) == (0xFFF0,)
            vm.write("registers", "rip 0x1000\ncs 0\ncs.base 0\n")
            assert os.pread(regs, 144, 0) == (vm / "regs").read_bytes()


def test_a_read_gets_its_bytes(server, vm):
    looping(vm, ACCESSES["in"])
    with opened(vm, "vm_run.bin") as runs, opened(vm, "exit.data", os.O_RDWR) as data:
        for value in range(100):
            run(runs)
            assert os.pread(data, 8, 0) == b"\xff"
            os.pwrite(data, bytes([value]), 0)
            assert os.pread(data, 8, 0) == bytes([value])
            run(runs)
            assert int(vm.read("reg/rax"), 0) == value


def test_what_cannot_be_written(server, vm):
    """The errno, the sentence and that nothing has changed are Python's; the next that can be clears the sentence."""
    looping(vm)
    with (
        opened(vm, "regs", os.O_RDWR) as regs,
        opened(vm, "sregs", os.O_RDWR) as sregs,
        opened(vm, "exit.data", os.O_RDWR) as data,
        opened(vm, "vm_run.bin") as runs,
    ):
        run(runs)
        before = os.pread(regs, 144, 0), os.pread(sregs, 312, 0)
        assert failing(os.pwrite, regs, bytes(16), 136) == failing(os.pwrite, regs, bytes(8), 144) == errno.EFBIG
        assert failing(os.pwrite, regs, bytes(8), 1 << 40) == errno.EFBIG
        assert "past" in vm.read("error")
        assert failing(os.pwrite, sregs, struct.pack("<Q", 1 << 31), 224) == errno.EINVAL  # PG without PE
        assert failing(os.pwrite, data, b"1", 0) == errno.EINVAL  # no read waits
        assert (os.pread(regs, 144, 0), os.pread(sregs, 312, 0)) == before
        assert vm.read("error").startswith("exit.data")
        os.pwrite(regs, before[0][:8], 0)
        assert vm.read("error").startswith("exit.data")
        assert failing(os.pwrite, regs, bytes(8), 144) == errno.EFBIG
        assert vm.read("error").startswith("regs")
        os.pwrite(regs, before[0][:8], 0)
        assert vm.read("error") == ""


def test_a_write_is_dated(server, vm):
    looping(vm)
    with opened(vm, "regs", os.O_RDWR) as regs:
        os.pread(regs, 8, 0)
        before = os.stat(vm / "regs").st_mtime_ns
        time.sleep(0.05)
        os.pwrite(regs, bytes(8), 0)
        assert os.stat(vm / "regs").st_mtime_ns > before


def test_a_halted_cpu_is_set(server, vm):
    """It is paused then."""
    looping(vm, ACCESSES["hlt"])
    with opened(vm, "regs", os.O_RDWR) as regs, opened(vm, "vm_run.bin") as runs, opened(vm, "state") as state:
        for _ in range(5):
            run(runs)
            assert os.pread(state, 100, 0) == b"halted\n"
            os.pwrite(regs, bytes(8), 0)
            assert os.pread(state, 100, 0) == b"paused\n"


def test_a_pending_read_is_done_before_a_write(server, vm):
    looping(vm, ACCESSES["in"])
    with (
        opened(vm, "regs", os.O_RDWR) as regs,
        opened(vm, "vm_run.bin") as runs,
        opened(vm, "exit.data", os.O_RDWR) as data,
    ):
        for value in range(20):
            run(runs)
            os.pwrite(data, bytes([value]), 0)
            os.pwrite(regs, struct.pack("<Q", 1), 8)
            assert struct.unpack("<QQ", os.pread(regs, 16, 0)) == (value, 1)
            assert os.pread(data, 8, 0) == b""


def test_interrupts(server, vm):
    """Packets: each is delivered once, and as many wait as ever."""
    vm.write("mode", "real")
    with opened(vm, "mem", os.O_RDWR) as mem:
        os.pwrite(mem, struct.pack("<HH", 0x2000, 0), 0x20 * 4)
        os.pwrite(mem, bytes.fromhex("e681 cf"), 0x2000)  # out 0x81, al; iret
        os.pwrite(mem, bytes.fromhex("fb e680 ebfc"), 0x1000)  # sti
    vm.write("reg/rip", "0x1000")
    vm.write("reg/rsp", "0x8000")
    vm.run()
    with opened(vm, "irq", os.O_WRONLY) as irq, opened(vm, "vm_run.bin") as runs:
        for _ in range(20):
            assert struct.unpack_from("<H", run(runs), 18) == (0x80,)
            os.write(irq, struct.pack("<I", 0x20))
            while (port := struct.unpack_from("<H", run(runs), 18)) != (0x81,):
                assert port == (0x80,)
        vm.write("reg/rflags", "2")
        for _ in range(INTERRUPT_QUEUE):
            os.write(irq, struct.pack("<I", 0x20))
        assert stat(vm)["interrupts_queued"] == str(INTERRUPT_QUEUE)
        assert failing(os.write, irq, struct.pack("<I", 0x20)) == errno.EAGAIN
        assert failing(os.write, irq, struct.pack("<I", 0x100)) == errno.EINVAL
        assert stat(vm)["interrupts_queued"] == str(INTERRUPT_QUEUE)


def test_going_back(server, vm):
    """A line for `restore` goes past both channels, and what is wrong with it is said as ever."""
    looping(vm)
    (vm / "snap" / "one").mkdir()

    def look() -> tuple[bytes, str, bytes]:
        with open(vm / "mem", "rb", buffering=0) as memory:
            return (vm / "regs").read_bytes(), vm.read("exit"), os.pread(memory.fileno(), 0x8000, 0)

    then = look()
    with opened(vm, "restore", os.O_WRONLY) as fd:
        for number in range(5):
            vm.run()
            vm.write("reg/rbx", str(number + 1000))
            with open(vm / "mem", "r+b", buffering=0) as memory:
                os.pwrite(memory.fileno(), bytes([number]), 0x2000)
            assert os.write(fd, b"one\n") == 4
            assert look() == then and vm.read("state") == "paused\n"
        time.sleep(0.02)  # in which it hears that nobody has `mem` open
        written = int(stat(vm)["lane_writes"])
        for _ in range(30):
            vm.run()
            os.write(fd, b"one\n")
            assert (vm / "regs").read_bytes() == then[0]
        by_lane = int(stat(vm)["lane_writes"]) - written
        assert by_lane > 10 if server.has_lane else not by_lane
        wrong = (b"none\n", errno.ENOENT, "no snapshot 'none'"), (b"one two\n", errno.EINVAL, "no name")
        for line, error, words in wrong:
            with pytest.raises(OSError) as failure:
                os.write(fd, line)
            assert failure.value.errno == error and words in vm.read("error")
            assert os.write(fd, b"one\n") == 4
            assert vm.read("error") == ""
        assert os.write(fd, b"one") == 3
    assert vm.read("restore") == "one\n"


def test_points_and_traces_are_asked_for(server, vm):
    looping(vm)
    with opened(vm, "vm_run.bin") as fd:
        for _ in range(3):
            assert struct.unpack_from("<I", run(fd)) == (2,)
            vm.write("debug", "break 0x1000")
            assert struct.unpack_from("<I", run(fd)) == (4,)
            assert struct.unpack_from("<I", run(fd)) == (2,)
            vm.write("debug", "delete all")
            assert struct.unpack_from("<I", run(fd)) == (2,)
            vm.write("trace", "insn on")
            before = int(stat(vm)["trace_events"])
            run(fd)
            assert int(stat(vm)["trace_events"]) > before
            vm.write("trace", "insn off")


def test_polls_hear_of_runs(server, vm):
    looping(vm, "f4 ebfd")
    with contextlib.ExitStack() as stack:
        runs = stack.enter_context(opened(vm, "vm_run.bin"))
        for name in ("exit", "exit.bin", "state"):
            fd = stack.enter_context(opened(vm, name))
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            for _ in range(3):
                for _ in range(3):
                    run(runs)
                assert poll.poll(0) == poll.poll(0) == [(fd, select.POLLPRI)]
                os.pread(fd, 100, 0)
                assert poll.poll(0) == poll.poll(0) == []
                run(runs)
                os.pread(fd, 100, 0)
                run(runs)
                assert poll.poll(0) == [(fd, select.POLLPRI)]
                os.pread(fd, 100, 0)
                assert poll.poll(0) == []
                vm.write("reg/rbx", "1")
                if name != "state":  # it is not halted any more
                    assert poll.poll(0) == []
                os.pread(fd, 100, 0)
                waiting = threading.Timer(0.05, run, (runs,))
                waiting.start()
                assert poll.poll(20000)
                waiting.join()


def test_a_long_run_is_interrupted(server, vm):
    looping(vm)
    with opened(vm, "vm_run.bin") as fd:
        run(fd)
        vm.load(FOREVER)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        for _ in range(3):
            call = blocked_read(fd)
            running(vm)
            call.signal()
            assert call.end()[:2] == (-1, errno.EINTR)
            wait_until(lambda: not vm.is_running())
        assert "interrupted" in vm.read("exit")


def test_a_long_run_is_seen(server, vm):
    """A machine that the lane runs is seen to run, and is stopped, as any other."""
    looping(vm)
    with opened(vm, "vm_run.bin") as fd, opened(vm, "regs") as regs:
        run(fd)
        if server.has_lane:
            wait_until(lambda: run(fd) and int(stat(vm)["lane_runs"]), "the lane runs it")
        vm.load(FOREVER)
        call = blocked_read(fd)
        running(vm)
        assert failing(os.pread, fd, 64, 0) == errno.EBUSY  # another read of the same open file, not the one that waits
        assert struct.unpack("<Q", os.pread(regs, 8, 128)) == (0x1000,)
        assert failing(vm.write, "reg/rbx", "1") == errno.EBUSY
        assert failing(os.pread, fd, 64, 0) == errno.EBUSY
        assert "rip 0x0000000000001000\n" in vm.read("registers")
        vm.write("state", "pause")
        size, _, line = call.end()
        assert (size, line[:4]) == (64, struct.pack("<I", 10))
        assert vm.read("exit.data") == ""


def test_a_killed_caller(server, vm):
    looping(vm)
    vm.load(FOREVER)
    child = os.fork()
    if child == 0:
        fd = os.open(vm / "vm_run.bin", os.O_RDONLY)
        os.pread(fd, 64, 0)
        os._exit(1)
    running(vm)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    wait_until(lambda: not vm.is_running())


def test_without_blocking(server, vm):
    looping(vm)
    with opened(vm, "vm_run.bin") as blocking, opened(vm, "vm_run.bin", os.O_RDONLY | os.O_NONBLOCK) as fd:
        run(blocking)
        for _ in range(20):
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            try:
                line = run(fd)
            except BlockingIOError:
                assert poll.poll(20000)
                line = run(fd)
            assert line[:4] == run(blocking)[:4] == struct.pack("<I", 2)
        vm.load(FOREVER)
        assert failing(run, fd) == errno.EAGAIN
        assert failing(run, blocking) == errno.EBUSY
        vm.write("state", "pause")
        assert run(fd)[:4] == struct.pack("<I", 10)


def test_removal(server, vm):
    looping(vm)
    with opened(vm, "vm_run.bin") as runs, opened(vm, "regs") as regs:
        run(runs)
        os.pread(regs, 8, 0)
        vm.load(FOREVER)
        call = blocked_read(runs)
        running(vm)
        vm.path.rmdir()
        assert call.end()[:2] == (-1, errno.ENODEV)
        assert failing(run, runs) == failing(os.pread, regs, 8, 0) == errno.ENODEV


def has_failed(vm: Machine) -> bool:
    try:
        return vm.read("state") == "failed\n"
    except OSError:  # it is about to
        return False


@pytest.mark.skipif(os.getuid() != 0, reason="another's process is killed")
def test_a_machine_that_dies(tmp_path_factory, any_engine):
    with contextlib.ExitStack() as stack:
        directory = tmp_path_factory.mktemp("mount") / "m"
        directory.mkdir()
        server = Server(directory, engine="emulator")
        stack.callback(server.end)
        vm = looping(server.make())
        with opened(vm, "vm_run.bin") as runs, opened(vm, "regs") as regs:
            run(runs)
            os.pread(regs, 8, 0)
            os.kill(int(stat(vm)["pid"]), signal.SIGKILL)
            wait_until(lambda: has_failed(vm))
            assert failing(run, runs) == failing(os.pread, regs, 8, 0) == errno.EIO
        other = looping(server.make())
        with opened(other, "vm_run.bin") as runs:
            assert len(run(runs)) == 64
            other.load(FOREVER)
            call = blocked_read(runs)
            time.sleep(0.2)  # nobody looks: it is the lane's alone
            os.kill(int(stat(other)["pid"]), signal.SIGKILL)
            assert call.end()[:2] == (-1, errno.EIO)


def test_a_server_that_dies(tmp_path_factory, any_engine):
    """Its readers wake up, and the CPU that ran for the lane ends."""
    with contextlib.ExitStack() as stack:
        directory = tmp_path_factory.mktemp("mount") / "m"
        directory.mkdir()
        server = Server(directory, engine="emulator")
        stack.callback(server.end)
        vm = looping(server.make())
        fd = os.open(vm / "vm_run.bin", os.O_RDONLY)
        stack.callback(os.close, fd)
        run(fd)
        machine = os.pidfd_open(int(stat(vm)["pid"]))
        stack.callback(os.close, machine)
        vm.load(FOREVER)
        call = blocked_read(fd)
        time.sleep(0.2)
        server.server.kill()
        size, error, _ = call.end()
        assert size == -1 and error in (errno.ECONNABORTED, errno.ENOTCONN)
        assert has_news(machine, seconds=20), "the machine's process has not ended"


def test_nothing_is_lost_among_others(server, vm):
    """One runs, others look, set, interrupt and poll at the same time: each exit is somebody's, once."""
    looping(vm)
    before = stat(vm)
    end = time.monotonic() + 3
    counts = {"done": 0, "interrupted": 0}
    failures: list[BaseException] = []
    signal.signal(signal.SIGUSR1, lambda *_: None)

    def runner() -> None:
        with opened(vm, "vm_run.bin") as fd:
            while time.monotonic() < end:
                call = blocked_read(fd)
                if counts["done"] % 7 == 0:
                    with contextlib.suppress(ProcessLookupError):
                        call.signal()
                size, error, line = call.end()
                if size < 0:
                    assert error == errno.EINTR, error
                    counts["interrupted"] += 1
                else:
                    assert line[:4] == struct.pack("<I", 2), line
                    counts["done"] += 1

    def looker() -> None:
        choose = random.Random(4)
        with opened(vm, "regs") as regs, opened(vm, "exit") as exits:
            poll = select.poll()
            poll.register(exits, select.POLLPRI)
            while time.monotonic() < end:
                what = choose.randrange(6)
                if what == 0:
                    assert struct.unpack("<Q", os.pread(regs, 8, 128))[0] in (0x1000, 0x1002)
                elif what == 1:
                    assert "rip" in vm.read("registers")
                elif what == 2:
                    stat(vm)
                elif what == 3:
                    poll.poll(1)
                elif what == 4:
                    with contextlib.suppress(OSError):
                        vm.write("reg/rbx", "5")
                else:
                    vm.read("state")

    def guarded(what) -> None:
        try:
            what()
        except BaseException as failure:
            failures.append(failure)

    def interrupter() -> None:
        with opened(vm, "irq", os.O_WRONLY) as irq:
            for _ in range(INTERRUPT_QUEUE):
                os.write(irq, struct.pack("<I", 0x20))
                time.sleep(2 / INTERRUPT_QUEUE)

    threads = [threading.Thread(target=guarded, args=(what,)) for what in (runner, looker, interrupter)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures, failures
    after = stat(vm)
    assert after["interrupts_queued"] == str(INTERRUPT_QUEUE)
    assert counts["done"] > 20
    assert int(after["exits.io"]) - int(before["exits.io"]) == counts["done"]
    ran = counts["done"] + int(after["exits.interrupted"]) - int(before["exits.interrupted"])
    assert int(after["runs"]) - int(before["runs"]) == ran


def wake(futex) -> None:
    """futex(2), FUTEX_WAKE of one who sleeps there."""
    LIBC.syscall(202, futex, 1, 1, None, None, 0)


def answering_threads(server) -> int:
    """The server's threads that answer runs: one for each machine with `vm_run.bin` open."""
    count = 0
    for task in Path(f"/proc/{server.server.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            count += (task / "comm").read_text() == "vmfs-lane-runs\n"
    return count


@pytest.mark.skipif(os.getuid() != 0, reason="another's memory is written")
def test_a_hostile_page(server, vm):
    """What a machine writes into its page hurts nobody but its own readers."""
    if not server.has_lane:
        pytest.skip("there is no page")
    looping(vm)
    other = looping(server.make())
    with opened(vm, "vm_run.bin") as runs, opened(vm, "regs") as regs, opened(vm, "exit.data") as data:
        run(runs)
        process = Path("/proc") / stat(vm)["pid"]
        lines = (process / "maps").read_text().splitlines()  # a mapping that changes meanwhile may be there twice
        line = next(line for line in lines if "memfd:vmfs-lane" in line)
        place = "-".join(part.lstrip("0") for part in line.split()[0].split("-"))
        fd = os.open(process / "map_files" / place, os.O_RDWR)
        page = mmap.mmap(fd, 4096)
        ended = ctypes.c_uint32.from_buffer(mmap.mmap(fd, 4096), ENDED)
        assert failing(os.ftruncate, fd, 0) == errno.EPERM
        os.close(fd)
        os.kill(int(stat(vm)["pid"]), signal.SIGSTOP)  # it is this test from now on
        choose = random.Random(9)
        end = time.monotonic() + 3
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                for at in range(0, 56, 4):
                    number = choose.choice((0, 1, 2, 7, 0xFFFFFFFF, choose.getrandbits(32)))
                    page[at : at + 4] = struct.pack("<I", number)
                for at in (*range(ORDER, ORDER + 32, 4), *range(ENDED, ENDED + 12, 4)):
                    page[at : at + 4] = struct.pack("<I", choose.choice((0, 1, 0xFFFFFFFF, choose.randrange(4096))))
                wake(ctypes.byref(ended))

        writer = threading.Thread(target=write)
        writer.start()
        calls = []
        with opened(other, "vm_run.bin") as theirs, opened(other, "regs") as their_regs:
            while time.monotonic() < end:
                calls.append(blocked_read(choose.choice((runs, regs, data))))
                assert run(theirs)[:4] == struct.pack("<I", 2)
                assert struct.unpack("<Q", os.pread(their_regs, 8, 128))[0] == 0x1002
        stop.set()
        writer.join()
        deadline = time.monotonic() + 20
        while answering_threads(server):  # it wakes its thread of the server all the time, until it has none
            assert time.monotonic() < deadline
            for _ in range(100):
                ended.value += 1
                wake(ctypes.byref(ended))
        page.close()
        os.kill(int(stat(other)["pid"]), 0)
        vm.path.rmdir()
        for call in calls:
            call.end()
    other.path.rmdir()
