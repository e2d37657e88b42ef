"""What one open file is told is one change, in however many writes it comes."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
import trio
from fs.conftest import run_on_fs
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.machine.files import lines
from vmfs.words.exits import Hlt, Io


async def refused(awaitable) -> int:
    with pytest.raises(OSError) as caught:
        await awaitable
    return caught.value.errno


async def told(kernel, path: str, *pieces: str | bytes) -> list[int]:
    """The errno of each write and of the close, 0 for none: all pieces are written, as bash does."""
    file = await kernel.open(path, os.O_WRONLY)
    results = []
    for piece in pieces:
        try:
            await file.write(piece.encode() if isinstance(piece, str) else piece)
            results.append(0)
        except OSError as error:
            results.append(error.errno)
    try:
        await file.close()
        results.append(0)
    except OSError as error:
        results.append(error.errno)
    return results


BAD = errno.EINVAL
OUT = Io(direction="out", port=0x80, size=1, data=b"\x42", rip=0x1004)


@pytest.mark.parametrize(
    ("file", "pieces", "results", "sentence"),
    [
        ("registers", ("rax 1\n", "bogus 2\n", "rbx 3\n"), [0, BAD, BAD, 0], "registers: line 2: there is no "),
        ("registers", ("rax 1\nrbx 2\n", "\n", "rcx 3\nrdx x\n"), [0, 0, BAD, 0], "registers: line 5: rdx: 'x' is not"),
        ("registers", ("rax 1\n", "rbx "), [0, 0, BAD], "registers: line 2: 'rbx' is not NAME VALUE"),
        ("registers", ("rax 1\nrbx", " 5", "x", "\n"), [0, 0, 0, BAD, 0], "registers: line 2: rbx: '5x' is not"),
        ("registers", ("rax 1\n", "msr.0x999 1\n"), [0, BAD, 0], "registers: line 2: there is no MSR 0x999"),
        ("registers", ("rax 1\n", b"\xff"), [0, BAD, 0], "registers: it is not UTF-8"),
        ("reg/rax", ("5\n", "six\n"), [0, BAD, 0], "rax: line 2: rax: 'six' is not"),
        ("debug", ("break 0x10\n", "break nowhere\n", "1\n"), [0, BAD, BAD, 0], "debug: line 2: "),
        ("debug", ("1\n", "delete 7\n"), [0, BAD, 0], "debug: line 2: "),
        ("debug", ("break 1\n", "break 2\n", "break 3\nbreak 4\nbreak 5\n"), [0, 0, errno.EOPNOTSUPP, 0], "debug: "),
        ("trace", ("exits on\n", "full drop\n", "insn maybe\n"), [0, 0, BAD, 0], "trace: line 3: "),
        ("disasm", ("0x1000 4\n", "0x2000 0\n"), [0, BAD, 0], "disasm: line 2: "),
    ],
)
def test_a_line_that_fails_takes_back_what_came_before(on_fs, file, pieces, results, sentence):
    async def test(kernel):
        await kernel.mkdir("a")
        before = await _settings(kernel)
        assert await told(kernel, f"a/{file}", *pieces) == results
        assert (await kernel.read("a/error")).startswith(sentence)
        assert await _settings(kernel) == before

    on_fs(test)


async def _settings(kernel) -> dict[str, str]:
    shown = {name: await kernel.read(f"a/{name}") for name in ("registers", "reg/msr.0x10", "debug", "disasm", "state")}
    shown["trace"] = next(line for line in (await kernel.read("a/stat")).splitlines() if line.startswith("trace "))
    return shown


@pytest.mark.parametrize(
    ("file", "text", "check", "shown"),
    [
        ("registers", "rax 0x57\nrbx=2 rcx = 3\n\n# a comment\nr8 4\n", "reg/rax", "0x0000000000000057\n"),
        ("registers", "rbx=2 rcx = 3 rdx 4\n", "reg/rdx", "0x0000000000000004\n"),
        ("reg/rax", "0x123\n", "reg/rax", "0x0000000000000123\n"),
        ("debug", "break 0x7c00 if rax==5 once\n", "debug", "0\n1 break 0x7c00 if rax==5 once hits=0 by=engine\n"),
        ("cmdline", "console=ttyS0 root=/dev/vda ro\n", "cmdline", "console=ttyS0 root=/dev/vda ro\n"),
        ("mem_size", "16M\n", "mem_size", f"{16 << 20}\n"),
        ("disasm", "0x2000 3\n", None, None),
    ],
)
def test_it_does_not_matter_how_a_text_is_cut(on_fs, file, text, check, shown):
    async def test(kernel):
        names = map(str, itertools.count())
        for at in range(len(text)):
            for to in (*range(at + 1, len(text), 7), len(text)):
                name = next(names)
                await kernel.mkdir(name)
                pieces = [piece for piece in (text[:at], text[at:to], text[to:]) if piece]
                assert not any(await told(kernel, f"{name}/{file}", *pieces)), pieces
                if check:
                    result = await kernel.read(f"{name}/{check}")
                    if file == "debug":  # a point that a piece made was taken back, and its id is used once
                        result = "0\n1 " + result.partition(" ")[2]
                    assert result == shown, pieces
                await kernel.rmdir(name)

    on_fs(test, max_vms=2)


def test_a_piece_that_parses_takes_effect_at_once(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        debug = await kernel.open("a/debug")
        for text, shown in (("1", "1\n"), ("0", "0\n"), ("1", "1\n"), ("\n", "1\n"), ("\n", "1\n"), ("0", "0\n")):
            await debug.write(text.encode())
            assert await kernel.read("a/debug") == shown
        await debug.write(b"break 0x1000")
        assert "break 0x1000 hits" in await kernel.read("a/debug")
        await debug.write(b" if rax==1")
        assert "break 0x1000 if rax==1" in await kernel.read("a/debug")
        await debug.write(b"\nbreak 0x2000\n")
        assert (await kernel.read("a/debug")).count("break") == 2
        await debug.close()

    on_fs(test)


def test_rusts_writeln(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        for name, pieces in (
            ("registers", ("rax ", "0x", "5", "\n", "rbx ", "7", "\n")),
            ("mem_size", ("64", "M", "\n")),
            ("reg/rcx", ("1", "23", "\n")),
            ("irq", ("32", "\n")),
            ("vm_run", ("step ", "3", "\n")),
        ):
            assert not any(await told(kernel, f"a/{name}", *pieces)), name
        assert await kernel.read("a/reg/rax") == "0x0000000000000005\n"
        assert await kernel.read("a/reg/rbx") == "0x0000000000000007\n"
        assert await kernel.read("a/reg/rcx") == "0x000000000000007b\n"
        assert await kernel.read("a/mem_size") == f"{64 << 20}\n"
        assert kernel.engine.cpu.interrupts == [32]
        assert "runs 1\n" in await kernel.read("a/stat")

    on_fs(test)


def test_what_has_run_has_run(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        assert await told(kernel, "a/irq", "32\n", "bogus\n", "33\n") == [0, BAD, 0, 0]
        assert kernel.engine.cpu.interrupts == [32, 33]
        assert await told(kernel, "a/vm_run", "step\n", "jump\n") == [0, BAD, 0]
        assert "runs 1\n" in await kernel.read("a/stat")

    on_fs(test)


def test_nothing_is_taken_back_after_something_else_has_happened(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        registers = await kernel.open("a/registers")
        await registers.write(b"rax 1\n")
        await kernel.write("a/vm_run", "step")
        await registers.write(b"rbx 2\n")
        assert await refused(registers.write(b"bogus\n")) == BAD
        assert await kernel.read("a/reg/rax") == "0x0000000000000001\n"
        assert await kernel.read("a/reg/rbx") == "0x0000000000000000\n"
        debug = await kernel.open("a/debug")
        await debug.write(b"break 1\n")
        await kernel.write("a/debug", "break 2")
        assert await refused(debug.write(b"bogus\n")) == BAD
        assert (await kernel.read("a/debug")).count("break") == 2

    on_fs(test)


def test_a_descriptor_takes_nothing_more_of_a_change_that_failed_but_others(on_fs, monkeypatch):
    async def test(kernel):
        await kernel.mkdir("a")
        registers = await kernel.open("a/registers")
        assert await refused(registers.write(b"bogus 1\n")) == BAD
        assert await refused(registers.write(b"rax 1\n")) == BAD
        await kernel.write("a/registers", "rbx 2\n")
        monkeypatch.setattr(lines, "FAILED_SECONDS", 0.0)
        await registers.write(b"rax 1\n")
        assert await kernel.read("a/reg/rax") == "0x0000000000000001\n"

    on_fs(test)


def test_a_halted_cpu_is_halted_again(on_fs):


    async def test(kernel):
        await kernel.mkdir("a")
        kernel.engine.cpu.play([Hlt(rip=5)])
        await kernel.read("a/vm_run")
        assert (await told(kernel, "a/registers", "rax 1\n", "bogus\n"))[1] == BAD
        assert await kernel.read("a/state") == "halted\n"

    on_fs(test)


def test_a_close_after_rmdir_succeeds_unless_something_waits(on_fs):
    async def test(kernel):
        for piece, number in ((b"rax 1\n", 0), (b"rax", errno.ENODEV)):
            await kernel.mkdir("a")
            file = await kernel.open("a/registers")
            await file.write(piece)
            await kernel.rmdir("a")
            if number:
                assert await refused(file.close()) == number
            else:
                await file.close()
            await trio.lowlevel.checkpoint()

    on_fs(test)


def test_a_close_runs_nothing(on_fs):
    """The caller may be dying then, and could not be interrupted."""

    async def test(kernel):
        await kernel.mkdir("a")
        assert await told(kernel, "a/vm_run", "run ") == [0, BAD]
        assert await told(kernel, "a/state", "ru") == [0, BAD]
        assert "runs 0\n" in await kernel.read("a/stat")

    on_fs(test)


def test_one_who_reads_some_files_in_any_order_does_not_walk(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        machine = (await kernel.walk("a")).st_ino
        kernel.context.pid = 77
        await kernel.call(kernel.operations.opendir, machine, kernel.context)
        for names in (("exit", "state", "stat"), ("symbols", "trace.bin", "virt"), ("virt",), ("trace", "virt")):
            for name in names:
                await (await kernel.open(f"a/{name}", os.O_RDONLY)).close()
            kernel.engine.cpu.play([OUT])
            assert await kernel.read("a/vm_run") == f"{OUT.line()}\n", names
        for name in ("time", "trace", "trace.bin", "virt"):
            await (await kernel.open(f"a/{name}", os.O_RDONLY)).close()
        assert await kernel.read("a/vm_run") == ""
        kernel.context.pid = 78  # who has not listed the directory
        kernel.engine.cpu.play([OUT])
        for name in ("trace", "trace.bin", "virt"):
            await (await kernel.open(f"a/{name}", os.O_RDONLY)).close()
        assert await kernel.read("a/vm_run") == f"{OUT.line()}\n"

    on_fs(test)


@pytest.mark.parametrize("cpu", [0, 1])
def test_a_walk_through_a_cpus_folder_reads_no_virt(on_fs, cpu):
    async def test(kernel):
        await kernel.mkdir("a")
        await kernel.write("a/cpus", "2")
        folder = (await kernel.walk(f"a/cpu{cpu}")).st_ino
        kernel.context.pid = os.getpid()
        await kernel.call(kernel.operations.opendir, folder, kernel.context)
        assert await kernel.read(f"a/cpu{cpu}/virt")
        for name in ("stack", "stat", "state"):
            await (await kernel.open(f"a/cpu{cpu}/{name}", os.O_RDONLY)).close()
        assert not await kernel.read(f"a/cpu{cpu}/virt")

    on_fs(test)


def test_o_nofollow_walks(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        for name in ("vm_run", "vm_run.bin", "trace", "virt", "gdb.stream", "console", "lapic", "screen.png"):
            file = await kernel.open(f"a/{name}", os.O_RDONLY | os.O_NOFOLLOW)
            assert await file.read() == b""
            await file.close()
        assert "runs 0\n" in await kernel.read("a/stat")
        assert await kernel.read("a/error") == ""

    on_fs(test)


_PIECES = st.lists(
    st.sampled_from(
        ["rax", " ", "=", "5", "0x", "\n", "\n\n", "#", "break", "0x1000", " if ", "1", "0", "watch 0x10 4 w", "rip 4"]
        + ["exits on", "off", "full drop", "nmi", "32", "delete all", '"a"', "f1", "64M", "é", "\x00", "real"]
    ),
    max_size=12,
)


ACTING = "keyboard", "mouse"


@settings(max_examples=100)
@given(st.sampled_from([*"registers reg/rax debug trace irq disasm cmdline mem_size mode".split(), *ACTING]), _PIECES)
def test_any_pieces_are_taken_or_refused_and_what_is_refused_changes_nothing(file, pieces):
    async def test(kernel):
        await kernel.mkdir("a")
        before = await _settings(kernel)
        results = await told(kernel, f"a/{file}", *pieces)
        assert set(results) <= {0, errno.EINVAL, errno.EOPNOTSUPP, errno.EBUSY}, results
        if any(results) and file not in ("irq", *ACTING):  # where what follows is for itself, and clears `error`
            assert (await kernel.read("a/error")).startswith(f"{file.split('/')[-1]}: ")
            if file in ("registers", "reg/rax", "debug", "trace", "disasm"):
                assert await _settings(kernel) == before

    run_on_fs(test)
