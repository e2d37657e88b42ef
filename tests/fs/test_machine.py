"""A machine's files over the fake engine: what the kernel sends, and what comes of it."""

from __future__ import annotations

import errno
import os
import struct

import pytest
import trio
from fs.conftest import Waker

from vmfs.fs.hooks import pyfuse3
from vmfs.fs.inodes import POLL_HUP, POLL_IN, POLL_OUT, POLL_PRI, ROOT, Node
from vmfs.words.errors import EngineFailed
from vmfs.words.exits import Hlt, Io, Shutdown

OUT = Io(direction="out", port=0x80, size=1, data=b"\x42", rip=0x1004)


async def failing(awaitable) -> int:
    with pytest.raises(OSError) as caught:
        await awaitable
    return caught.value.errno


# ---- states


def test_a_still_cpu_is_asked_once(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        cpu = kernel.engine.cpu
        file = await kernel.open("a/regs")
        await file.read(8, 0)
        asked = cpu.reads
        for offset in range(0, 144, 8):
            assert await file.read(8, offset) == cpu.states["regs"][offset : offset + 8]
        assert cpu.reads == asked
        # Whatever may have changed it has it asked again.
        for change in ("reg/rax=5", "registers=rbx 6", "mode=long", "vm_run=step", "state=reset", "irq=3"):
            await kernel.write(*(f"a/{change}").split("=", 1))
            assert await file.read() == cpu.states["regs"], change
        assert (await kernel.open("a/regs")).number != file.number

    on_fs(test)


def test_a_running_cpu_is_asked_each_time(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        cpu = kernel.engine.cpu
        file = await kernel.open("a/regs")
        await file.read()
        await kernel.write("a/state", "run")
        await trio.to_thread.run_sync(cpu.running.wait)
        cpu.states["regs"] = bytes(143) + b"1"
        assert await file.read() == bytes(143) + b"1"
        cpu.states["regs"] = bytes(143) + b"2"
        assert await file.read(1, 143) == b"2"
        assert await kernel.read("a/state") == "running\n"
        assert await failing(file.write(b"3")) == errno.EBUSY

    on_fs(test)


def test_structs_with_entries(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        cpu = kernel.engine.cpu
        # Some MSRs alone, as KVM_SET_MSRS takes them.
        await kernel.write("a/msrs", struct.pack("<IIIIQ", 1, 0, 0x174, 0, 99))
        assert cpu.msrs == {0x10: 0, 0x174: 99, 0xC0000080: 0}
        # Another CPUID, of more leaves.
        leaves = struct.pack("<II", 3, 0) + bytes(range(120))
        await kernel.write("a/cpuid", leaves)
        assert cpu.states["cpuid"] == leaves
        assert await kernel.size("a/cpuid") == len(leaves)
        # Neither whole nor inside.
        neither = struct.pack("<II", 9, 0) + bytes(121)
        assert await failing(kernel.write("a/cpuid", neither)) == errno.EFBIG
        # A part.
        file = await kernel.open("a/cpuid")
        await file.write(b"\xaa", 127)
        assert cpu.states["cpuid"] == leaves[:-1] + b"\xaa"

    on_fs(test)


def test_cpu0_and_reg_hold_the_same_inodes(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        for name in ("regs", "msrs", "registers", "reg/rax", "reg/msr.0x10"):
            assert (await kernel.walk(f"a/{name}")).st_ino == (await kernel.walk(f"a/cpu0/{name}")).st_ino
        assert (await kernel.walk("a/reg")).st_ino != (await kernel.walk("a/cpu0/reg")).st_ino
        for name in ("cpu0/mem", "cpu0/vm_run", "cpu0/cpu0", "cpu1", "cpu01", "reg/msr.0x11", "reg/msr.16", "reg/ax"):
            assert await failing(kernel.walk(f"a/{name}")) == errno.ENOENT

    on_fs(test)


def test_cpun_is_that_of_the_machine_as_it_is(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        assert await kernel.read("a/cpus") == "1\n"
        await kernel.write("a/reg/rbx", "7")
        await kernel.write("a/cpus", "3")
        await kernel.write("a/cpu2/reg/rax", "5")
        await kernel.write("a/cpu1/registers", "rax 4\nrcx 6\n")
        assert [await kernel.read(f"a/cpu{cpu}/reg/rax") for cpu in range(3)] == [f"{n:#018x}\n" for n in (0, 4, 5)]
        assert await kernel.read("a/reg/rbx") == f"{7:#018x}\n"  # what was set of a CPU that stays, stays
        assert await kernel.read("a/cpu2/reg/msr.0x10") == f"{0:#018x}\n"
        for name in ("cpu3", "cpu64", "cpu1/mem", "cpu1/vm_run", "cpu2/reg/msr.0x11"):
            assert await failing(kernel.walk(f"a/{name}")) == errno.ENOENT
        assert [await kernel.read(f"a/cpu{cpu}/state") for cpu in range(3)] == ["running\n"] * 3
        assert "interrupts_queued 0\n" in await kernel.read("a/cpu2/stat")
        file = await kernel.open("a/cpu2/regs")
        assert await failing(kernel.write("a/cpu2/registers", "rax 1\nrip x\n")) == errno.EINVAL
        assert await kernel.read("a/cpu2/reg/rax") == f"{5:#018x}\n"
        await kernel.write("a/cpus", "2")
        assert await failing(kernel.walk("a/cpu2")) == errno.ENOENT
        assert await failing(file.read(8)) == errno.ENODEV
        assert await kernel.read("a/cpu1/reg/rax") == f"{4:#018x}\n"

    on_fs(test)


# ---- runs


def test_runs(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        kernel.engine.cpu.play([OUT, Hlt(rip=0x1005), Shutdown(rip=0x1005)])
        file = await kernel.open("a/vm_run")
        line = f"{OUT.line()}\n".encode()
        assert await file.read(4) == line[:4] and await file.read(100, 4) == line[4:]
        assert await file.read(100, len(line)) == b""
        assert await kernel.read("a/exit") == OUT.line() + "\n"
        binary = await kernel.open("a/vm_run.bin")
        assert await binary.read(64) == Hlt(rip=0x1005).pack()
        assert await kernel.read("a/state") == "halted\n"
        await kernel.write("a/vm_run", "run")
        assert await kernel.read("a/state") == "shutdown\n"
        assert await kernel.read("a/vm_run") == Shutdown(rip=0x1005).line() + "\n"

    on_fs(test)


def test_an_engine_that_fails_is_an_error_of_the_call_alone(on_fs, caplog):
    def fail(cpu):
        raise EngineFailed("KVM_RUN: Input/output error")

    def break_down(cpu):
        raise ZeroDivisionError("a bug")

    failures = ((fail, "KVM_RUN: Input/output error"), (break_down, "ZeroDivisionError: a bug"))

    async def test(kernel):
        await kernel.mkdir("a")
        for item, sentence in failures:
            kernel.engine.cpu.play([item, Hlt(rip=1)])
            assert await failing(kernel.read("a/vm_run")) == errno.EIO
            assert await kernel.read("a/error") == f"vm_run: {sentence}\n"
            assert await kernel.read("a/vm_run") == "hlt rip=0x1\n"
        assert "a bug" in caplog.text

    on_fs(test)


def test_one_runner_at_a_time(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.read, "a/vm_run")
            await trio.to_thread.run_sync(kernel.engine.cpu.running.wait)
            assert await failing(kernel.read("a/vm_run")) == errno.EBUSY
            assert await failing(kernel.write("a/vm_run", "step")) == errno.EBUSY
            assert await failing(kernel.write("a/state", "run")) == errno.EBUSY
            await kernel.write("a/state", "pause")
        assert (await kernel.read("a/exit")).startswith("interrupted ")
        assert "exits.interrupted 1\n" in await kernel.read("a/stat")

    on_fs(test)


def test_a_run_without_blocking(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        file = await kernel.open("a/vm_run", os.O_RDWR | os.O_NONBLOCK)
        assert await file.poll() == POLL_OUT
        assert await failing(file.read()) == errno.EAGAIN
        waker = Waker()
        assert await file.poll(waker) == 0
        assert await failing(file.write(b"step")) == errno.EBUSY
        await kernel.write("a/state", "pause")
        await waker.woken.wait()
        while await file.poll() != POLL_IN:
            await trio.sleep(0.001)
        assert (await file.read()).startswith(b"interrupted ")
        assert await kernel.read("a/error") == "vm_run: the machine is running\n"  # of the write
        assert await failing(file.read()) == errno.EAGAIN
        await file.close()
        while await kernel.read("a/state") == "running\n":
            await trio.sleep(0.001)

    on_fs(test)


def test_removal_releases_who_waits(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        answers = []

        async def runner():
            answers.append(await failing(kernel.read("a/vm_run")))

        file, exits = await kernel.open("a/regs"), await kernel.open("a/exit", os.O_RDONLY)
        waker = Waker()
        await exits.poll(waker)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner)
            await trio.to_thread.run_sync(kernel.engine.cpu.running.wait)
            await kernel.rmdir("a")
        assert answers == [errno.ENODEV] and waker.woken.is_set()
        assert await failing(file.read()) == errno.ENODEV
        assert await failing(file.write(b"1")) == errno.ENODEV
        assert await exits.poll() & POLL_HUP
        await file.close()
        await exits.close()
        assert kernel.engine.machines[0].closed == 1

    on_fs(test)


# ---- polls


def test_polls_of_exit_and_state(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        kernel.engine.cpu.play([OUT, Hlt(rip=1)])
        exits, state = await kernel.open("a/exit", os.O_RDONLY), await kernel.open("a/state")
        assert await exits.poll() == 0
        assert await state.poll() == POLL_IN | POLL_PRI | POLL_OUT
        await state.read()
        assert await state.poll() == POLL_OUT
        for read_before in (False, True):
            waker = Waker()
            assert await exits.poll(waker) == 0
            await kernel.write("a/vm_run", "run")
            await waker.woken.wait()
            assert await exits.poll() == POLL_IN | POLL_PRI
            if read_before:
                await exits.read(1, 1)  # goes on in what was read before: not the news
                assert await exits.poll() == POLL_IN | POLL_PRI
            await exits.read()
            assert await exits.poll() == 0
        assert await state.poll() & POLL_IN

    on_fs(test)


def test_polls_of_irq(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        cpu = kernel.engine.cpu
        file = await kernel.open("a/irq", os.O_WRONLY)
        for vector in range(64):
            assert await file.poll() == POLL_OUT
            await file.write(struct.pack("<I", vector))
        assert await failing(file.write(b"1")) == errno.EAGAIN
        waker = Waker()
        assert await file.poll(waker) == 0
        cpu.interrupts.pop(0)
        await waker.woken.wait()
        assert await file.poll() == POLL_OUT
        assert cpu.interrupts == list(range(1, 64))

    on_fs(test)


def test_interrupts(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        cpu, machine = kernel.engine.cpu, kernel.engine.machines[0]
        for text in (b"0x20", b"32\n", b"255\n", b"7", b"\x21\0\0\0", b"\0\0\0\0"):
            await kernel.write("a/irq", text)
        assert cpu.interrupts == [0x20, 32, 255, 7, 0x21, 0]
        await kernel.write("a/irq", b"nmi\n")
        assert cpu.nmis == 1
        machine.lines = []
        for text in (b"line 3 1", b"line 3 0", b"pulse 4"):
            await kernel.write("a/irq", text)
        assert machine.lines == [(3, True), (3, False), (4, True), (4, False)]

    on_fs(test)


# ---- memory


def test_memory(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        file = await kernel.open("a/mem")
        size = 128 << 20
        await file.write(b"hello", 0x1000)
        assert kernel.engine.machines[0].memory[0x1000:0x1005] == b"hello"
        assert await file.write(b"12345678", size - 4) == 4
        assert await failing(file.write(b"1", size)) == errno.EFBIG
        assert await kernel.read("a/error") == f"mem: {size:#x} is past the end of RAM, {size:#x}\n"
        assert await file.read(10, size - 2) == b"34" and await file.read(10, size) == b""

    on_fs(test)


def test_the_cache_is_dropped_around_runs_while_mem_is_open(on_fs, monkeypatch):
    async def test(kernel):
        dropped = []

        class Connection:
            def invalidate(self, inode, offset=0, length=0):
                dropped.append((inode, offset, length))

        kernel.root.scope.connection = Connection()
        await kernel.mkdir("a")

        def store(cpu):
            cpu.machine.store(0x5000, bytes(0x2000))
            cpu.machine.store(0x9000, b"1")
            return Hlt(rip=1)

        kernel.engine.cpu.play([store, store, Hlt(rip=2), store])
        await kernel.write("a/vm_run", "run")
        assert dropped == []
        one = await kernel.open("a/mem")
        two = await kernel.open("a/mem", os.O_RDONLY)
        assert (one.info.direct_io, one.info.keep_cache, two.info.keep_cache) == (False, False, True)
        await kernel.write("a/vm_run", "run")
        inode = one.inode
        assert dropped == [(inode, 0, 0), (inode, 0x5000, 0x2000), (inode, 0x9000, 0x1000)]
        dropped.clear()
        await one.close()
        await kernel.write("a/vm_run", "run")
        assert dropped == [(inode, 0, 0)]
        dropped.clear()
        await kernel.write("a/mode", "long")
        assert dropped == [(inode, 0, 0)] * 2
        dropped.clear()
        await two.close()
        await kernel.write("a/vm_run", "run")
        assert dropped == []

    on_fs(test)


def test_dirty(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")

        def store(cpu):
            cpu.machine.store(0x3000, b"1")
            return Hlt(rip=1)

        kernel.engine.cpu.play([store])
        await kernel.write("a/vm_run", "run")
        file = await kernel.open("a/dirty", os.O_RDONLY)
        assert await file.read(1) == b"\x08"
        assert len(await file.read(1 << 17, 1)) == 4095  # goes on
        assert not any(await file.read())

    on_fs(test)


# ---- the directory


def test_limits(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        await kernel.mkdir("b")
        assert await failing(kernel.mkdir("c")) == errno.ENOSPC
        await kernel.write("a/mem_size", "64M")
        assert await failing(kernel.write("b/mem_size", "193M")) == errno.ENOSPC
        await kernel.write("b/mem_size", "192M")
        await kernel.rmdir("a")
        assert await failing(kernel.mkdir("c")) == errno.ENOSPC  # no longer by their number
        await kernel.write("b/mem_size", "128M")
        await kernel.mkdir("c")

    on_fs(test, max_vms=2, max_memory=256 << 20)


def test_rename(on_fs):
    async def test(kernel):
        entry = await kernel.mkdir("a")
        await kernel.mkdir("b")
        assert await failing(kernel.rename("a", "b")) == errno.ENOTEMPTY
        assert await failing(kernel.rename("a", "b", pyfuse3.RENAME_NOREPLACE)) == errno.EEXIST
        assert await failing(kernel.rename("a", "b", pyfuse3.RENAME_EXCHANGE)) == errno.EINVAL
        assert await failing(kernel.rename("a", "b c")) == errno.EINVAL
        assert await failing(kernel.rename("version", "v")) == errno.EPERM
        assert await failing(kernel.rename("none", "v")) == errno.ENOENT
        await kernel.rename("a", "c")
        assert (await kernel.walk("c")).st_ino == entry.st_ino
        assert await failing(kernel.walk("a")) == errno.ENOENT

    on_fs(test)


def test_owner_and_modes(on_fs):
    async def test(kernel):
        kernel.context.umask = 0o077
        await kernel.mkdir("a", 0o755)
        for path in ("a", "a/regs", "a/reg", "a/reg/rax", "a/cpu0"):
            entry = await kernel.walk(path)
            assert (entry.st_uid, entry.st_gid) == (1000, 1001)
            assert not entry.st_mode & 0o077, path

    on_fs(test)


def test_what_is_forgotten_is_gone(on_fs):
    async def test(kernel):
        before = len(kernel.inodes)
        await kernel.mkdir("a")
        entry = await kernel.walk("a/reg/rax")  # a, reg, rax: looked up
        file = await kernel.open("a/regs")
        await kernel.rmdir("a")
        known = [number for number in range(ROOT + 1, entry.st_ino + 200) if number in kernel.inodes._nodes]
        left = [number for number in known if kernel.inodes._nodes[number].scope.removed]
        assert 0 < len(left) < 10
        for number in left:
            node: Node = kernel.inodes._nodes[number]
            await kernel.operations.forget([(number, node.lookups)])
        assert len(kernel.inodes) == before
        await file.close()
        await kernel.operations.forget([(12345678, 1)])

    on_fs(test)


def test_a_bug_is_eio_and_a_line_in_the_log(on_fs, monkeypatch, caplog):
    async def test(kernel):
        await kernel.mkdir("a")
        monkeypatch.setattr("vmfs.machine.machine.Vm.counters", lambda vm: 1 / 0)
        monkeypatch.setattr(kernel.engine.cpu, "nmi", lambda: 1 / 0)
        monkeypatch.setattr("vmfs.fs.tree.RegisterDirectory.lookup", lambda directory, name: 1 / 0)
        assert await failing(kernel.read("a/stat")) == errno.EIO
        assert await failing(kernel.write("a/irq", "nmi")) == errno.EIO
        assert await failing(kernel.walk("a/reg/msr.0x10")) == errno.EIO
        assert caplog.text.count("ZeroDivisionError") >= 3
        assert await kernel.read("a/state") == "paused\n"

    on_fs(test)
