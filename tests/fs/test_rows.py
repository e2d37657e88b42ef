"""Every row of the tables: what its mode and its kind say, and what it answers to bad input."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from vmfs.fs.files import DEV_FILES, DEVICE_FILES, FILES, OWN_FILES, REGISTER_ROWS, ROOT_FILES, SNAPSHOT_FILES
from vmfs.fs.forks import ForkFile
from vmfs.fs.kinds import LocalText
from vmfs.machine.files.devices import DEV_KINDS, DEVICE_KINDS, OWN_KINDS
from vmfs.machine.files.snapshots import SNAPSHOT_KINDS
from vmfs.machine.files.table import CONTENTS, REGISTER_KINDS
from vmfs.memory.ram import DEFAULT_SIZE
from vmfs.words.exits import Io

CONTROLLERS = ("lapic", "irqchip", "pit")
# A bare machine has none of them.
OF_A_PC = ("born", "console", "console.log", "hvc", "hvc.log", "screen.txt", "screen.png", "framebuffer")

# What no file of the row takes, and its errno. A row that can be written and is not here fails a test below.
BAD_INPUT: dict[str, tuple[tuple[bytes, int], ...]] = {
    "vm_run": ((b"\n", errno.EINVAL), (b"run run", errno.EINVAL), (b"step -1", errno.EINVAL)),
    "vm_run.bin": ((b"jump", errno.EINVAL), (b"until", errno.EINVAL)),
    "exit.data": ((b"12345678", errno.EFBIG),),
    "state": ((b"stop", errno.EINVAL), (b"run\nrun", errno.EINVAL), (b"\xff", errno.EINVAL)),
    **{
        name: ((bytes(1 << 16), errno.EFBIG),)
        for name in "regs sregs fpu xsave xcrs msrs debugregs events mp_state cpuid clock".split()
    },
    **{name: ((bytes(1024), errno.EOPNOTSUPP),) for name in CONTROLLERS},
    "registers": (
        (b"rax", errno.EINVAL),
        (b"rax 1 2", errno.EINVAL),
        (b"rax 1\nmsr.0x999 1", errno.EINVAL),
        (b"rbx 0x1\0", errno.EINVAL),
        (b"cs.type 256", errno.EINVAL),
    ),
    "mem": (),  # its one failure, past the end, needs an offset
    "mem_size": tuple((size, errno.EINVAL) for size in (b"4095", b"0", b"big", b"-4K", b"\n")),
    "engine": ((b"none such", errno.EINVAL), (b"\n", errno.EINVAL)),
    "mode": ((b"long short", errno.EINVAL), (b"LONG", errno.EINVAL)),
    "machine": ((b"\n", errno.EINVAL), (b"atari", errno.EINVAL), (b"pc", errno.EOPNOTSUPP)),  # it has no controllers
    "time": ((b"noon", errno.EINVAL), (b"instructions", errno.EOPNOTSUPP)),
    "born": (
        (b"date yesterday", errno.EINVAL),
        (b"date 2026-13-01T00:00:00Z", errno.EINVAL),
        (b"date 1969-12-31T23:59:59Z", errno.EINVAL),
        (b"date 2117-01-01T00:00:00Z", errno.EINVAL),
        (b"seed 12", errno.EINVAL),
        (b"seed " + b"g" * 32, errno.EINVAL),
        (b"2026-01-31T12:00:00Z", errno.EINVAL),
        (b"date 2026-01-31T12:00:00Z", errno.EOPNOTSUPP),
    ),
    **{name: () for name in ("kernel", "initrd", "bios")},  # what they are is looked at by the run that boots them
    "console": ((b"a", errno.EOPNOTSUPP),),
    "hvc": ((b"a", errno.EOPNOTSUPP),),
    "framebuffer": ((b"a", errno.EOPNOTSUPP),),
    "keyboard": (
        (b"\n", errno.EINVAL),
        (b"nokey", errno.EINVAL),
        (b'"open', errno.EINVAL),
        (b'"a"b', errno.EINVAL),
        ('"ß"'.encode(), errno.EINVAL),
        (b"a", errno.EOPNOTSUPP),
    ),
    "mouse": (
        (b"\n", errno.EINVAL),
        (b"1,", errno.EINVAL),
        (b"99999,1", errno.EINVAL),
        (b"left nobutton", errno.EINVAL),
        (b"left", errno.EOPNOTSUPP),
    ),
    "cmdline": ((b"a\0b", errno.EINVAL), (b"\xff", errno.EINVAL)),
    "gdb": (
        (b"nowhere", errno.EINVAL),
        (b"127.0.0.1:65536", errno.EINVAL),
        (b"300.0.0.1:1", errno.EINVAL),
        (b"127.0.0.1:0 i486", errno.EINVAL),
        (b"/" + b"x" * 108, errno.EINVAL),
        (b"off off", errno.EINVAL),
        (b"'", errno.EINVAL),
    ),
    "vnc": (
        (b"nowhere", errno.EINVAL),
        (b"127.0.0.1:65536", errno.EINVAL),
        (b"127.0.0.1:0 password=", errno.EINVAL),
        (b"127.0.0.1:0 password=ninechars", errno.EINVAL),
        (b"127.0.0.1:0 nopassword password=a", errno.EINVAL),
        (b"127.0.0.1:0 shared", errno.EINVAL),
        (b"0.0.0.0:0 nopassword", errno.EINVAL),
        (b"/" + b"x" * 108, errno.EINVAL),
        (b"'", errno.EINVAL),
        (b"127.0.0.1:0", errno.EOPNOTSUPP),
    ),
    "gdb.stream": (),  # whatever is written is a stub's to answer
    "coverage": (),  # whatever is written clears it
    "symbols": ((b"kallsyms", errno.EINVAL),),  # a file that is none is found out when it is closed
    "disasm": ((b"\n", errno.EINVAL), (b"rip 0", errno.EINVAL), (b"nowhere", errno.EINVAL), (b"1 2 3", errno.EINVAL)),
    "virt": (),  # its one failure, where nothing is mapped, needs an offset
    "irq": (
        (b"256", errno.EINVAL),
        (b"-1", errno.EINVAL),
        (b"nmi 1", errno.EINVAL),
        (b"line 1 2", errno.EINVAL),
        (b"1\n2", errno.EINVAL),
        (b"\0\0\0", errno.EINVAL),
        (b"\0\0\0\1", errno.EINVAL),
        (b"line 1 1", errno.EOPNOTSUPP),
    ),
    "history": (
        (b"perhaps\n", errno.EINVAL),
        (b"on memory\n", errno.EINVAL),
        (b"on memory=1K\n", errno.EINVAL),
        (b"on every=1us\n", errno.EINVAL),
        (b"on every=1s every=2s\n", errno.EINVAL),
        (b"on\n", errno.EOPNOTSUPP),
    ),
    "writer": (
        (b"0x1000\n", errno.EINVAL),
        (b"0x1000 0\n", errno.EINVAL),
        (b"0x1000 5000\n", errno.EINVAL),
        (b"nowhere 8\n", errno.EINVAL),
    ),
    "restore": (
        (b"\n", errno.EINVAL),
        (b"one two", errno.EINVAL),
        (b"../one", errno.EINVAL),
        (b"one", errno.ENOENT),
        (b"x" * 1000, errno.ENOENT),
    ),
    "fork": (
        (b"\n", errno.EINVAL),
        (b"one from", errno.EINVAL),
        (b"one from two three", errno.EINVAL),
        (b"x" * 2000, errno.EINVAL),
        (b"one", errno.EPERM),  # this caller has no process
    ),
    "cpus": (
        (b"\n", errno.EINVAL),
        (b"0", errno.EINVAL),
        (b"65", errno.EINVAL),
        (b"-1", errno.EINVAL),
        (b"two", errno.EINVAL),
        (b"2 3", errno.EINVAL),
    ),
    "debug": (
        (b"2", errno.EINVAL),
        (b"break", errno.EINVAL),
        (b"1\nbreak x", errno.EINVAL),
        (b"delete 1", errno.EINVAL),
        (b"catch 256", errno.EINVAL),
        (b"catch", errno.EINVAL),
        (b"break 1 if", errno.EINVAL),
        (b"break 1\nbreak 2 if rax==", errno.EINVAL),
        (b"watch 0 0 w", errno.EINVAL),
        (b"watch 0xffffffffffffffff 2 w", errno.EINVAL),
        (b"iobreak 3-2", errno.EINVAL),
        (b"on cr4", errno.EINVAL),
        (b"ignore 1 1", errno.EINVAL),
        (b"".join(b"break %d\n" % address for address in range(5)), errno.EOPNOTSUPP),
    ),
    "trace": (
        (b"insn", errno.EINVAL),
        (b"insn yes", errno.EINVAL),
        (b"insn on\nmode fast", errno.EINVAL),
        (b"range 2-1", errno.EINVAL),
        (b"range nobody-2", errno.EINVAL),
        (b"data 1", errno.EINVAL),
        (b"full stop", errno.EINVAL),
        (b"buffer 1", errno.EINVAL),
        (b"off off", errno.EINVAL),
        (b"insn on\nmem on", errno.EOPNOTSUPP),
    ),
}


def test_names_stand_once():
    for rows in (FILES, ROOT_FILES):
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)


OWN = tuple(row for rows in OWN_FILES.values() for row in rows)
ROWS = (*FILES, *ROOT_FILES, *REGISTER_ROWS.values(), *DEV_FILES, *DEVICE_FILES, *OWN, *SNAPSHOT_FILES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_mode_says_what_the_kind_can(row):
    assert bool(row.mode & 0o444) == row.kind.readable
    # A snapshot's files can be written where a saved machine comes in, and are another kind's then.
    assert bool(row.mode & 0o222) == (row.kind.writable or row in SNAPSHOT_FILES)
    assert not row.mode & ~0o666


def test_the_machine_has_contents_for_each_name():
    tables = (
        ([row for row in FILES if not isinstance(row.kind, ForkFile)], CONTENTS),  # that is the server's own
        (DEV_FILES, DEV_KINDS),
        (DEVICE_FILES, DEVICE_KINDS),
        *((rows, OWN_KINDS[found]) for found, rows in OWN_FILES.items()),
        (SNAPSHOT_FILES, SNAPSHOT_KINDS),
        (REGISTER_ROWS.values(), REGISTER_KINDS),
    )
    for rows, kinds in tables:
        assert {row.name for row in rows} == set(kinds)
        for row in rows:
            kind = kinds[row.name]
            assert (row.kind.readable, row.kind.writable) == (kind.readable, kind.writable), row.name
            assert row.kind.walked == kind.walked or isinstance(row.kind, LocalText), row.name


def test_every_row_is_opened_for_what_it_can_and_for_nothing_else(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        rows = [(f"a/{row.name}", row) for row in FILES] + [(row.name, row) for row in ROOT_FILES]
        for path, row in rows:
            denied = 0o066 if row.kind.reading_acts else 0o022  # without the right to write there is none to run
            assert stat.S_IMODE((await kernel.walk(path)).st_mode) == row.mode & ~denied
            for flags, can in (
                (os.O_RDONLY, row.kind.readable),
                (os.O_WRONLY, row.kind.writable),
                (os.O_RDWR, row.kind.readable and row.kind.writable),
            ):
                if can:
                    await (await kernel.open(path, flags)).close()
                else:
                    with pytest.raises(PermissionError):
                        await kernel.open(path, flags)

    on_fs(test)


def test_bad_input_is_refused_with_a_sentence_and_changes_nothing(on_fs):
    assert set(BAD_INPUT) == {row.name for row in FILES if row.kind.writable}

    async def test(kernel):
        await kernel.mkdir("a")
        kernel.engine.cpu.play([Io(direction="in", port=1, size=4, rip=5)])
        await kernel.read("a/vm_run")
        before = await _all_of(kernel)
        for name, inputs in BAD_INPUT.items():
            for data, number in inputs:
                with pytest.raises(OSError) as caught:
                    await kernel.write(f"a/{name}", data)
                assert caught.value.errno == number, (name, data)
                sentence = await kernel.read("a/error")
                assert sentence.startswith(f"{name}: ") and sentence.endswith("\n"), sentence
                assert len(sentence.splitlines()) == 1
                assert await _all_of(kernel) == before, (name, data)

    on_fs(test)


async def _all_of(kernel) -> dict[str, bytes]:
    """What every file shows, but for what changes by looking, and the complaint itself."""
    shown = {}
    for row in FILES:
        if row.kind.readable and row.name not in (
            *("vm_run", "vm_run.bin", "gdb.stream", "error", "stat", "dirty", "mem"),
        ):
            file = await kernel.open(f"a/{row.name}", os.O_RDONLY)
            try:
                shown[row.name] = await file.read()
            except OSError as error:
                assert error.errno == errno.EOPNOTSUPP and row.name in (*CONTROLLERS, *OF_A_PC)
            await file.close()
    shown["interrupts"] = bytes(kernel.engine.cpu.interrupts)
    return shown


def test_texts_end_with_one_newline(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        texts = "state stat registers mem_size engine mode debug reg/rax reg/cs reg/msr.0x10".split()
        for name in texts:
            text = await kernel.read(f"a/{name}")
            assert text.endswith("\n") and not text.endswith("\n\n"), name
        engines = (await kernel.read("engines")).splitlines()
        assert engines == [
            'fake available=yes preferred=yes speed=1.5 reason="it is \\"fake\\""',
            'other available=no preferred=no speed=- reason="no"',
        ]

    on_fs(test)


def test_sizes_are_those_of_what_is_read(on_fs):
    async def test(kernel):
        await kernel.mkdir("a")
        kernel.engine.cpu.play([Io(direction="in", port=1, size=4, rip=5)])
        await kernel.read("a/vm_run")
        await kernel.write("a/debug", "break 0x1000\nbreak 0x2000\n")
        for path in (*(f"a/{row.name}" for row in FILES), "a/reg/rax", "a/reg/cs", "a/reg/st0", "a/reg/msr.0x10"):
            row = next((one for one in FILES if path == f"a/{one.name}"), None)
            size = await kernel.size(path)
            if row is not None and not row.kind.walked:
                assert not size, path
            elif row is not None and row.name in ("mem", "core"):  # longer than one read
                assert size >= DEFAULT_SIZE
            elif row is None or row.kind.readable:
                file = await kernel.open(path, os.O_RDONLY)
                try:
                    data = await file.read()
                except OSError as error:
                    assert error.errno == errno.EOPNOTSUPP and not size
                else:
                    assert size == len(data), path
                assert file.info.direct_io
                await file.close()

    on_fs(test)
