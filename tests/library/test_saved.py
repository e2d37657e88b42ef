"""Machines of the library as bytes: what they were they are again, also over memory that others have, too."""

from __future__ import annotations

import fcntl
import io
import os
import random

import msgspec
import pytest

from vmfs import Machine
from vmfs.library import saved
from vmfs.memory.layers import SEALS
from vmfs.memory.mapping import PAGE
from vmfs.words.errors import Invalid

CODE, DATA, SIZE = 0x1000, 0x10_0000, 64 * PAGE
STORE = bytes.fromhex("48890f 48 81c700100000 48ffc9 75f1 f4")  # l: [rdi] = rcx; rdi += 4096; dec rcx; jne l; hlt


def made() -> Machine:
    machine = Machine(memory={CODE: STORE})
    region = machine.map(DATA, SIZE)
    for page in (3, 4, 5, 40):
        region.view[page * PAGE : (page + 1) * PAGE] = bytes([page]) * PAGE
    machine.rip, machine.rdi, machine.rcx = CODE, DATA, 8
    return machine


def all_of(machine: Machine) -> tuple[bytes, int, int]:
    return machine.mem[DATA : DATA + SIZE], machine.rip, machine.rcx


def over_grounds(data: bytes) -> Machine:
    """As a fleet's runner has it: private over sealed memfds."""
    fds: list[int] = []

    def begin(head: saved.Saved):
        for _, size, _, _ in head.regions:
            fds.append(os.memfd_create("ground", os.MFD_ALLOW_SEALING))
            os.ftruncate(fds[-1], size)
        return lambda number, offset, piece: os.pwrite(fds[number], piece, offset)

    head = saved.read(io.BytesIO(data), begin)
    for fd in fds:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    try:
        return saved.load_over(Machine, head, fds, None)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("load", [Machine.load, over_grounds])
def test_a_machine_is_what_it_was_and_can_be_again(load):
    with made() as machine:
        data, was = machine.save(), all_of(machine)
        machine.run()
        ran = all_of(machine)
    with load(data) as again:
        assert all_of(again) == was
        start = again.snapshot()
        for _ in range(2):
            again.run()
            again.mem[DATA + 50 * PAGE :] = b"written from outside"
            assert all_of(again)[1:] == ran[1:] and again.mem[DATA : DATA + 40 * PAGE] == ran[0][: 40 * PAGE]
            with load(again.save()) as third:  # over pages of the ground, written ones, and holes
                assert all_of(third) == all_of(again)
            again.restore(start)
            assert all_of(again) == was


def test_a_snapshot_of_one_over_memory_of_others_has_what_was_written():
    with made() as machine, over_grounds(machine.save()) as again:
        again.run()
        second, there = again.snapshot(), all_of(again)
        again.mem[DATA:] = bytes(SIZE)
        again.restore(second)
        assert all_of(again) == there


def test_bytes_that_are_no_machine_have_a_sentence():
    with made() as machine:
        data = machine.save()
    rng = random.Random(1)
    for number in range(200):
        wrong = bytearray(data)
        at = rng.randrange(len(wrong))
        if number % 2:
            wrong[at] ^= 1 << rng.randrange(8)
        else:
            del wrong[at : at + 1 + number]
        with pytest.raises(Invalid):
            Machine.load(bytes(wrong))


def test_a_head_that_does_not_fit_has_a_sentence():
    with made() as machine:
        out = io.BytesIO()
        saved.write(machine, out)
        head = saved.read(io.BytesIO(out.getvalue()), lambda head: lambda number, offset, piece: None)
    for changes in (
        {"pages": [DATA + 1]},
        {"pages": [DATA + SIZE]},
        {"regions": [(0, 1, False, "")], "pages": []},
        {"regions": [(-PAGE, PAGE, False, "")], "pages": []},
        {"regions": [(0, PAGE, False, "")] * 256, "pages": []},
        {"regions": [(0, 1 << 60, False, "")], "pages": []},
    ):
        with pytest.raises(Invalid):
            wrong = msgspec.structs.replace(head, **changes)
            saved._check(wrong)
            list(wrong.pieces())
