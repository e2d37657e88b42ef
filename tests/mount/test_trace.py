"""`trace`, `trace.bin` and `coverage` on real mounts: lines, ends, readers that come and go, a guest that waits."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from mounting import LIBC, SOON, Blocked, Machine, Server, failing, reason_against, serving, wait_until

from vmfs.debug.trace_buffer import count
from vmfs.engine import ENGINES
from vmfs.words.tracing import DROPPED, INSN, RECORD

# mov cx, 3; l: push cx; pop ax; loop l; out 0x80, al; hlt
PROGRAM = "b90300 51 58 e2fc e680 f4"
LINES = (
    ["insn 0x1000"]
    + ["insn 0x1003", "insn 0x1004", "insn 0x1005"] * 3
    + ["insn 0x1007", "exit io direction=out port=0x80 size=1 count=1 data=0x1 rip=0x1009"]
    + ["insn 0x1009", "exit hlt rip=0x100a"]
)
SPIN = "40 ebfd"  # inc ax; jmp


def engine_of(vm) -> str:
    return vm.read("engine").strip()


@pytest.fixture(scope="module", params=["lane", "no-lane"])
def emulator(request, tmp_path_factory) -> Iterator[Server]:
    """With the lane and without: what a test says holds of both."""
    reason = reason_against(next(row for row in ENGINES if row.name == "emulator"))
    if reason:
        pytest.skip(reason)
    environment = {} if request.param == "lane" else {"VMFS_NO_LANE": "1"}
    with serving(tmp_path_factory, engine="emulator", environment=environment) as one:
        one.has_lane = request.param == "lane"
        yield one


@pytest.fixture
def emulated(emulator) -> Machine:
    """For what KVM, which traces by steps, does not show, or would show slowly."""
    return emulator.make()


def stat(vm) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in vm.read("stat").splitlines())


@pytest.fixture
def threads():
    with ThreadPoolExecutor() as pool:
        yield pool


def blocked_read(threads, fd: int) -> Future[bytes]:
    """In a thread, from where the descriptor stands."""
    return threads.submit(os.read, fd, 1000)


def run_to_hlt(vm) -> None:
    while not vm.run().startswith("hlt"):
        pass


def test_lines_of_a_program_on_every_engine(vm):
    vm.load(PROGRAM)
    vm.write("registers", "rsp 0x800")
    vm.write("trace", "insn on\nexits on")
    run_to_hlt(vm)
    vm.write("trace", "off")
    assert vm.read("trace").splitlines() == LINES
    assert vm.read("trace") == ""  # what was read is not kept
    assert stat(vm)["trace_dropped"] == "0"
    assert stat(vm)["trace"].startswith("off,")


@pytest.mark.parametrize("line", ["mem on", "exceptions on", "interrupts on", "mode user"])
def test_what_an_engine_does_not_show_is_refused_and_changes_nothing(vm, line):
    if engine_of(vm) == "emulator":
        vm.write("trace", f"insn on\n{line}")
        assert not stat(vm)["trace"].startswith("off,")
    else:
        assert failing(vm.write, "trace", f"insn on\n{line}") == errno.EOPNOTSUPP
        assert "write emulator to `engine`" in vm.read("error")
        assert stat(vm)["trace"].startswith("off,")


def test_symbols_are_told(emulated):
    vm = emulated.load(PROGRAM)
    vm.write("registers", "rsp 0x800")
    vm.write("symbols", "0000000000001003 T again\n")
    vm.write("trace", "insn on\nmem on\nrange again-again+1")
    run_to_hlt(vm)
    vm.write("trace", "off")
    assert vm.read("trace").splitlines()[:4] == [
        "insn 0x1003 again",
        "write 0x7fe size=2 value=0x3 at=0x1003 again",
        "insn 0x1004 again+0x1",
        "read 0x7fe size=2 value=0x3 at=0x1004 again+0x1",
    ]


def test_records_are_the_same_trace(emulated):
    vm = emulated.load(PROGRAM)
    vm.write("registers", "rsp 0x800")
    vm.write("trace", "insn on")
    first, second = (os.open(vm / name, os.O_RDONLY) for name in ("trace.bin", "trace"))
    run_to_hlt(vm)
    vm.write("trace", "off")
    records = b""
    while part := os.read(first, 40):  # no multiple of a record
        records += part
    text = b""
    while part := os.read(second, 7):
        text += part
    os.close(first)
    os.close(second)
    assert count(records) == 12 and len(records) % 32 == 0
    assert text.decode().splitlines() == [line for line in LINES if line.startswith("insn")]


def test_a_read_waits_for_what_comes_and_ends_when_it_is_off(emulated, threads):
    vm = emulated.load(PROGRAM)
    vm.write("registers", "rsp 0x800")
    fd = os.open(vm / "trace", os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(fd, 100) == b""  # off
    vm.write("trace", "insn on")
    assert failing(os.read, fd, 100) == errno.EAGAIN
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0) == []
    waiting = os.open(vm / "trace", os.O_RDONLY)
    reader = blocked_read(threads, waiting)
    vm.write("vm_run", "step")
    assert reader.result(SOON) == b"insn 0x1000\n"
    assert poll.poll(10_000)
    assert os.read(fd, 100) == b"insn 0x1000\n"
    reader = blocked_read(threads, waiting)
    vm.write("trace", "off")
    assert reader.result(SOON) == b""
    assert os.pread(fd, 100, 5) == b"0x1000\n"  # what was read can be read again
    assert failing(os.pread, fd, 100, 100) == errno.EINVAL
    os.close(fd)
    os.close(waiting)


def test_what_a_reader_leaves_is_for_the_next(emulated):
    vm = emulated.load(PROGRAM)
    vm.write("registers", "rsp 0x800")
    vm.write("trace", "insn on")
    run_to_hlt(vm)
    vm.write("trace", "off")
    lines = []
    for _ in range(12):
        with open(vm / "trace", "rb", buffering=0) as file:
            lines.append(file.read(12))
    assert b"".join(lines).decode().splitlines() == [line for line in LINES if line.startswith("insn")]


def test_programs_that_read_ahead_and_seek_back(emulated):
    """head(1), and bash's read."""
    vm = emulated.load(PROGRAM)
    vm.write("registers", "rsp 0x800")
    vm.write("trace", "insn on\nexits on")
    run_to_hlt(vm)
    vm.write("trace", "off")
    script = "while read -r line; do echo $line; done <trace"
    done = subprocess.run(["bash", "-c", script], cwd=vm.path, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.splitlines()) == (0, "", LINES)
    vm.write("trace", "insn on")
    vm.write("registers", "rip 0x1000")
    run_to_hlt(vm)
    done = subprocess.run(["head", "-n", "2", "trace"], cwd=vm.path, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.splitlines()) == (0, "", LINES[:2])


def test_what_is_dropped_is_counted_to_the_last(emulated):
    """Nobody reads, and what was kept of it is the end."""
    vm = emulated.load(SPIN)
    vm.write("trace", "insn on\nbuffer 1M")
    vm.write("vm_run", "insns 1000000")
    vm.write("trace", "off")
    dropped = int(stat(vm)["trace_dropped"])
    records = list(RECORD.iter_unpack((vm / "trace.bin").read_bytes()))
    assert records[0][0] == DROPPED and records[0][4] == dropped > 0
    insns = [record for record in records if record[0] == INSN]
    assert sum(record[2] for record in insns) == 1_000_000 - dropped
    assert insns[0][4] == dropped and insns[-1][4] + insns[-1][2] == 1_000_000


def test_the_guest_waits_for_a_slow_reader_and_can_be_paused(emulated):
    vm = emulated.load(SPIN)
    vm.write("trace", "insn on\nbuffer 1M")
    fd = os.open(vm / "trace.bin", os.O_RDONLY)
    vm.write("state", "run")
    wait_until(lambda: int(stat(vm)["trace_events"]) > 50_000)
    assert vm.read("registers")  # a boundary, in the middle of the wait
    vm.write("state", "pause")
    wait_until(lambda: not vm.is_running())
    vm.write("trace", "off")
    records = b""
    while part := os.read(fd, 1 << 17):
        records += part
    os.close(fd)
    assert stat(vm)["trace_dropped"] == "0"
    assert count(records) == int(stat(vm)["instructions"])
    numbers = [(number, size) for kind, _, size, _, number, _, _ in RECORD.iter_unpack(records) if kind == INSN]
    assert all(a + size == b for (a, size), (b, _) in zip(numbers, numbers[1:], strict=False))


def test_a_killed_reader_does_not_hold_the_guest(emulated):
    vm = emulated.load(SPIN)
    vm.write("trace", "insn on\nbuffer 1M")
    holding = ["sh", "-c", "exec 3<trace.bin; echo open; exec sleep 1000"]
    reader = subprocess.Popen(holding, cwd=vm.path, stdout=subprocess.PIPE)
    assert reader.stdout and reader.stdout.readline() == b"open\n"
    run = subprocess.Popen(["sh", "-c", "echo insns 3000000 >vm_run"], cwd=vm.path)
    wait_until(lambda: int(stat(vm)["trace_events"]) > 50_000)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    reader.stdout.close()
    assert run.wait(60) == 0
    assert int(stat(vm)["trace_events"]) == 3_000_000


def test_a_machine_that_goes_ends_its_readers(emulated, threads):
    emulated.write("trace", "insn on")
    fd = os.open(emulated / "trace", os.O_RDONLY)
    reader = blocked_read(threads, fd)
    emulated.path.rmdir()
    with pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
        reader.result(SOON)
    os.close(fd)


def test_a_machine_moves_with_its_trace(emulated):
    """To an engine that cannot show it, it does not."""
    if "kvm available=yes" not in (emulated.path.parent / "engines").read_text():
        pytest.skip("there is no KVM to move to")
    emulated.write("trace", "mem on")
    assert failing(emulated.write, "engine", "kvm") == errno.EOPNOTSUPP
    assert engine_of(emulated) == "emulator"
    emulated.write("trace", "mem off\ninsn on")
    emulated.write("engine", "kvm")
    emulated.load(PROGRAM)
    emulated.write("vm_run", "step")
    emulated.write("trace", "off")
    assert emulated.read("trace") == "insn 0x1000\n"


def test_what_was_read_ahead_for_a_reader_is_for_the_next(emulated):
    """Large reads are answered out of shared memory, in which the machine reads ahead: nothing of that is lost, nor
    given twice, whatever the reader does."""
    emulated.load(SPIN)
    emulated.write("trace", "insn on")
    emulated.write("vm_run", "insns 600000")
    emulated.write("trace", "off")
    large = 128 << 10
    with open(emulated.path / "trace.bin", "rb", buffering=0) as first:
        records = first.read(large)
        assert os.pread(first.fileno(), 64, 32) == records[32:96]  # as programs do that seek back
        records += first.read(large)
        assert os.pread(first.fileno(), 64, large - 32) == records[large - 32 : large + 32]
        records += first.read(4096)
    with open(emulated.path / "trace.bin", "rb", buffering=0) as second:
        records += second.read(100)
        while part := second.read(large):
            records += part
        assert os.pread(second.fileno(), 64, second.tell() - large) == records[-large:][:64]
        assert failing(os.pread, second.fileno(), large, 0) == errno.EINVAL  # too far back
    assert count(records) == 600000

    assert stat(emulated)["trace_dropped"] == "0"


def test_the_lines_that_were_read_ahead_are_for_the_next(emulated):
    emulated.load(SPIN)
    emulated.write("trace", "insn on")
    emulated.write("vm_run", "insns 300000")
    emulated.write("trace", "off")
    with open(emulated.path / "trace", "rb", buffering=0) as first:
        lines = first.read(128 << 10)
    with open(emulated.path / "trace", "rb", buffering=0) as second:
        while part := second.read(128 << 10):
            lines += part
    assert lines.splitlines() == [b"insn 0x1000", b"insn 0x1001"] * 150000


def numbers_of(records: bytes) -> list[tuple[int, int]]:
    """Of each record of instructions the first one's number, and how many there are."""
    return [(number, size) for kind, _, size, _, number, _, _ in RECORD.iter_unpack(records) if kind == INSN]


def test_a_stream_through_the_ring(emulator, emulated):
    """A reader that is killed: what it did not get is for the next. That one goes on while the guest does, reads some
    again, reads without waiting, polls, and comes to an end."""
    emulated.load(SPIN)
    emulated.write("trace", "insn on")
    large = 1 << 17
    with subprocess.Popen(["cat", emulated / "trace.bin"], stdout=subprocess.PIPE) as killed:
        emulated.write("vm_run", "insns 400000")
        got = numbers_of(killed.stdout.read(8 * large))
        killed.kill()
    fd = os.open(emulated / "trace.bin", os.O_RDONLY)
    emulated.write("state", "run")
    records = bytearray()
    while len(records) < 80 * large:
        part = os.read(fd, large)
        assert part
        records += part
        back = min(len(records), large)
        assert os.pread(fd, 64, len(records) - back) == records[len(records) - back :][:64]
    os.set_blocking(fd, False)
    for _ in range(20):
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(10_000) == [(fd, select.POLLIN)]
        with contextlib.suppress(BlockingIOError):
            records += os.read(fd, large)
    emulated.write("state", "pause")
    emulated.write("trace", "off")
    os.set_blocking(fd, True)
    while part := os.read(fd, large):
        records += part
    os.close(fd)
    numbers = numbers_of(records)
    assert all(at + size == then for (at, size), (then, _) in zip(numbers, numbers[1:], strict=False))
    lost = numbers[0][0] - sum(got[-1])  # what cat had in its hands, and in the pipe
    assert 0 <= lost <= 3 * large // RECORD.size * got[0][1]
    assert stat(emulated)["trace_dropped"] == "0"
    assert (int(stat(emulated)["lane_reads"]) > 10) == emulator.has_lane


@pytest.mark.skipif(os.getuid() != 0, reason="another's memory is written")
def test_a_hostile_ring(emulator, emulated):
    """What a machine writes into it hurts nobody but its own readers: they get bytes, an errno, or are let go."""
    emulated.load(SPIN)
    emulated.write("trace", "insn on")
    emulated.write("vm_run", "insns 3000000")
    other = emulator.make()
    fd = os.open(emulated / "trace.bin", os.O_RDONLY)
    assert len(os.read(fd, 1 << 17)) == 1 << 17
    process = Path("/proc") / stat(emulated)["pid"]
    (line,) = [line for line in (process / "maps").read_text().splitlines() if "memfd:vmfs-ring" in line]
    place = "-".join(part.lstrip("0") for part in line.split()[0].split("-"))
    memory = os.open(process / "map_files" / place, os.O_RDWR)
    assert failing(os.ftruncate, memory, 0) == errno.EPERM
    os.kill(int(process.name), signal.SIGSTOP)  # it is this test from now on
    position = ctypes.c_long(1 << 17)
    readers = []
    for number in (0, 1, (1 << 17) - 1, (1 << 17) + 1, 9 << 18, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        for at in (0, 8, 64):  # struct ring_page
            os.pwrite(memory, number.to_bytes(8, "little"), at)
        readers.append(Blocked(lambda: (LIBC.pread(fd, ctypes.create_string_buffer(1 << 17), 1 << 17, position), b"")))
        assert len((other / "regs").read_bytes()) == 144
    signal.signal(signal.SIGUSR1, lambda *_: None)
    for reader in readers:
        if reader.result is None:
            reader.signal()
    for reader in readers:
        size, error, _ = reader.end()
        assert 0 < size <= 1 << 17 or error == errno.EINTR
    os.close(memory)
    os.kill(int(process.name), signal.SIGKILL)
    wait_until(lambda: emulated.read("state") == "failed\n")
    os.close(fd)


# ---- coverage

# cmp byte [0x8000], 65; jne 1; inc bx; 1: mov cx, 5; 2: dec cx; jne 2; hlt
BRANCHES = "803e008041 7501 43 b90500 49 75fd f4"


def covered(vm: Machine, data: bytes) -> bytes:
    """The map of one case, and it is cleared."""
    vm.write("restore", "begin\n")
    with open(vm / "mem", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, 0x8000)
    assert vm.run().startswith("hlt")
    found = (vm / "coverage").read_bytes()
    (vm / "coverage").write_bytes(b"")
    return found


def test_coverage_of_cases(emulated):
    """The same path is the same map, another branch is another one; each jump counts."""
    emulated.load(BRANCHES)
    (emulated / "snap/begin").mkdir()
    emulated.write("trace", "coverage on\n")
    maps = [covered(emulated, data) for data in (b"A", b"B", b"A")]
    assert maps[0] == maps[2] != maps[1] and len(maps[0]) == 1 << 16
    assert max(maps[0]) == 4  # the jumps of the loop
    assert sum(map(bool, maps[1])) == sum(map(bool, maps[0])) + 1
    assert not any((emulated / "coverage").read_bytes())
    emulated.write("trace", f"range {0x1000 + 0x800:#x}-0x2000\n")
    assert not any(covered(emulated, b"A"))
    emulated.write("trace", "range all\n")
    assert covered(emulated, b"A") == maps[0]


def test_a_fork_has_a_coverage_of_its_own(emulated):
    """Nothing at first; what parent and fork count then is each one's."""
    emulated.load(BRANCHES)
    (emulated / "snap/begin").mkdir()
    emulated.write("trace", "coverage on\n")
    assert emulated.run().startswith("hlt")
    counted = (emulated / "coverage").read_bytes()
    emulated.write("fork", "covered from begin\n")
    child = Machine(emulated.path.parent / "covered")
    try:
        assert any(counted) and not any((child / "coverage").read_bytes())
        assert child.run().startswith("hlt") and not any((child / "coverage").read_bytes())
        (child / "snap/begin").mkdir()
        child.write("trace", "coverage on\n")
        there = covered(child, b"A")
        emulated.write("restore", "begin\n")
        assert any(there) and (emulated / "coverage").read_bytes() == counted
    finally:
        child.path.rmdir()


def test_coverage_in_a_mapping(emulated):
    """What a fuzzer maps is the map itself, in both directions."""
    emulated.load(BRANCHES)
    emulated.write("trace", "coverage on\n")
    with open(emulated / "coverage", "r+b", buffering=0) as file:
        if stat(emulated)["memory_served_by"] != "passthrough":
            with pytest.raises(OSError, match="No such device"):
                mmap.mmap(file.fileno(), 1 << 16)
            return
        with mmap.mmap(file.fileno(), 1 << 16) as seen:
            assert emulated.run().startswith("hlt")
            assert max(seen[:]) == 4 and seen[:] == (emulated / "coverage").read_bytes()
            seen[:] = bytes(1 << 16)
            assert not any((emulated / "coverage").read_bytes())
            assert failing(os.ftruncate, file.fileno(), 100) == errno.EINVAL


def test_what_coverage_is_not_counted_with(vm, emulated):
    emulated.write("trace", "insn on\n")
    assert failing(emulated.write, "trace", "coverage on\n") == errno.EINVAL
    assert "insn: `off` ends it" in emulated.read("error")
    emulated.write("trace", "insn off\ncoverage on\n")
    with open(emulated / "trace", "rb", buffering=0) as stream:
        assert stream.read(100) == b""  # it is no stream
    if engine_of(vm) != "emulator":
        assert failing(vm.write, "trace", "coverage on\n") == errno.EOPNOTSUPP
        assert failing(emulated.write, "engine", f"{engine_of(vm)}\n") == errno.EOPNOTSUPP
