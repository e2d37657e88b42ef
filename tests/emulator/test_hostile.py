"""Whatever state a client sets and code it runs: the core neither crashes nor hangs nor leaves its memory.

What the core must not do shows itself: a crash ends the tests; slots lie between guard pages, and the pages
of the file around them hold a pattern; every run has a budget. `make asan` runs it under the sanitizers.
VMFS_CASES=N for more.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import struct
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.engine.base import MACHINE_STATES, VCPU_STATES, DebugRequest
from vmfs.words import exits
from vmfs.words.errors import Invalid, Unsupported, VmfsError
from vmfs.words.modes import set_mode
from vmfs.words.stops import Breakpoint, Watchpoint

_core = pytest.importorskip("vmfs.engine.emulator._core")
from vmfs.engine.emulator.engine import EmulatorEngine  # noqa: E402

PAGE = 4096
PAGES = 32
PATTERN = b"\xa5\x5a\xc3\x3c" * (PAGE // 4)
FIRST, LAST = 4, PAGES - 4  # the pages of the file that slots may have
CODE = 0x1000
CASES = int(os.environ.get("VMFS_CASES", 60))
ADDRESSES = (
    0,
    0,
    0x8000,
    0xA0000,
    0x100000,
    0xFFFF0000,
    0xFEE00000,
    0xFEC00000,
    1 << 32,
    1 << 39,
    (1 << 52) - 0x4000,
)
EXITS = (
    exits.Io,
    exits.Mmio,
    exits.Hlt,
    exits.Debug,
    exits.Shutdown,
    exits.Interrupted,
    exits.Limit,
    exits.Error,
)
ROWS = [(row["map"], row["opcode"]) for row in _core.instructions()]
MAPS = {"": b"", "0F": b"\x0f", "0F38": b"\x0f\x38", "0F3A": b"\x0f\x3a"}
hostile = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))


class Window:
    """Guest-physical memory from 0 on, for set_mode."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def write(self, offset: int, data: bytes) -> None:
        at = FIRST * PAGE + offset
        self._memory[at : at + len(data)] = data


class Box:
    """A machine, and a file of which its slots have a part."""

    def __init__(self, *, irqchip: bool) -> None:
        self.fd = os.memfd_create("vmfs-hostile", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, PAGES * PAGE)
        self.memory = mmap.mmap(self.fd, PAGES * PAGE)
        self.memory[:] = PATTERN * PAGES
        self.machine = EmulatorEngine().create_machine()
        if irqchip:
            self.machine.create_irqchip()
        self.irqchip = irqchip
        self.mapped = {page: False for page in range(FIRST, FIRST + 12)}
        self.machine.map_memory(0, 0, self.fd, FIRST * PAGE, 12 * PAGE)
        self.vcpu = self.machine.create_vcpu(0)

    def map(self, slot: int, address: int, page: int, pages: int, read_only: bool) -> None:
        with contextlib.suppress(Invalid):
            self.machine.map_memory(slot, address, self.fd, page * PAGE, pages * PAGE, read_only=read_only)
            self.mapped |= {
                one: read_only for one in range(page, page + pages) if self.mapped.get(one) is not False
            }

    def check(self) -> None:
        for page in range(PAGES):
            if self.mapped.get(page, True):
                assert self.memory[page * PAGE : (page + 1) * PAGE] == PATTERN, f"page {page} was written"

    def run(self, budget: int) -> exits.Exit:
        if not self.irqchip:
            return self.vcpu.run(budget=budget)
        # With interrupt controllers, hlt waits for ever for an interrupt that never comes.
        result: list[exits.Exit] = []
        thread = threading.Thread(target=lambda: result.append(self.vcpu.run(budget=budget)), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.01)
            self.vcpu.kick()
        self.vcpu.clear_kick()
        return result[0]

    def close(self) -> None:
        self.machine.close()
        self.memory.close()
        os.close(self.fd)


@contextlib.contextmanager
def box(**options):
    one = Box(**options)
    try:
        yield one
    finally:
        one.close()


def set_hostile(box: Box, dice: random.Random, name: str) -> None:
    """Some bytes of a state, or all; what is refused has changed nothing."""
    owner = box.machine if name in MACHINE_STATES else box.vcpu
    try:
        old = owner.get_state(name)
    except Unsupported:
        return
    data = bytearray(old)
    how = dice.randrange(8)
    if how == 0:
        data = bytearray(dice.randbytes(len(data)))
    elif how == 1:
        data = bytearray(dice.randbytes(dice.randrange(2 * len(data))))
    else:
        for _ in range(dice.choice((1, 1, 2, 8))):
            at = dice.randrange(len(data))
            if dice.randrange(2):
                data[at] ^= 1 << dice.randrange(8)
            else:
                data[at & ~7 : (at & ~7) + 8] = interesting(dice)
    try:
        owner.set_state(name, bytes(data))
    except VmfsError:
        if name not in ("msrs", "pit", "clock", "lapic", "irqchip"):  # time goes on in these
            assert owner.get_state(name) == old
    else:
        again = owner.get_state(name)
        owner.set_state(name, again)  # what is got can be set


def interesting(dice: random.Random) -> bytes:
    value = dice.choice(
        (0, 1, 0x1000, 0x7FFF, 0xFFFF, 0xFFFFFFFF, 1 << 31, 1 << 47, (1 << 64) - 1, dice.getrandbits(64))
    )
    return struct.pack("<Q", (value + dice.choice((0, 0, 1, -1, 8))) & (1 << 64) - 1)


def hostile_code(dice: random.Random, size: int) -> bytes:
    """Prefixes, opcodes of the table, and what comes after them."""
    code = bytearray()
    while len(code) < size:
        map_, opcode = dice.choice(ROWS)
        code += bytes(
            dice.choices((0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x2E, 0x64, 0x48, 0x4F), k=dice.choice((0, 0, 1, 2)))
        )
        code += MAPS.get(map_, b"") + bytes((opcode,)) + dice.randbytes(dice.choice((1, 1, 2, 5)))
        if not dice.randrange(6):
            code += dice.choice(
                (b"\xc3", b"\xcf", b"\xeb\xfe", b"\xf4", b"\xf3\xa4", b"\xcd\x80", b"\x0f\x05")
            )
    return bytes(code[:size])


def set_rip(box: Box, rip: int) -> None:
    regs = bytearray(box.vcpu.get_state("regs"))
    struct.pack_into("<Q", regs, 128, rip)
    with contextlib.suppress(VmfsError):
        box.vcpu.set_state("regs", bytes(regs))


def hostile_tables(box: Box, dice: random.Random) -> None:
    """Page tables, descriptors: entries that point into RAM more often than chance has them."""
    for _ in range(dice.choice((0, 8, 64))):
        at = (FIRST + dice.randrange(12)) * PAGE + 8 * dice.randrange(PAGE // 8)
        entry = (
            dice.randrange(14) << 12
            | dice.getrandbits(12)
            | dice.choice((0, 0, 1 << 63, 1 << 51, 0x9A << 40))
        )
        box.memory[at : at + 8] = struct.pack("<Q", entry | dice.choice((0, 1, 7, 0x87)))


def play(box: Box, dice: random.Random) -> None:
    for slot in range(dice.randrange(5)):
        page = dice.randrange(FIRST, LAST)
        pages = dice.randrange(1, LAST - page + 1)
        box.map(
            slot + 1, dice.choice(ADDRESSES) + dice.randrange(8) * PAGE, page, pages, not dice.randrange(3)
        )
    with contextlib.suppress(VmfsError):
        set_mode(box.vcpu, Window(box.memory), 12 * PAGE, dice.choice(("real", "protected", "long")))
    hostile_tables(box, dice)
    at = CODE + dice.randrange(PAGE)
    Window(box.memory).write(at, hostile_code(dice, dice.choice((16, 256, 3 * PAGE))))
    names = [*VCPU_STATES, *MACHINE_STATES]
    for name in dice.choices(names, k=dice.randrange(6)):
        set_hostile(box, dice, name)
    if dice.randrange(4):
        set_rip(box, at)
    if not dice.randrange(3):
        stops(box, dice)
    for _ in range(dice.randrange(1, 12)):
        before = box.vcpu.counters()["instructions"]
        budget = dice.choice((0, 1, 7, 100, 3000))
        exit_ = box.run(budget)
        assert isinstance(exit_, EXITS)
        assert box.vcpu.counters()["instructions"] - before <= budget, exit_.line()
        assert exit_.line() and len(exit_.pack()) > 0
        if getattr(exit_, "direction", "") in ("in", "read"):
            box.vcpu.access_data = dice.randbytes(len(box.vcpu.access_data))
        between(box, dice, names)


def stops(box: Box, dice: random.Random) -> None:
    watch = []
    for number in range(dice.randrange(3)):
        address, length = dice.randrange(12 * PAGE), dice.choice((1, 4, 12, 1 << 31))
        physical = not dice.randrange(2)
        watch.append(Watchpoint(number, address, length, on_read=True, on_write=True, physical=physical))
    points = tuple(
        Breakpoint(9 + number, CODE + dice.randrange(PAGE)) for number in range(dice.randrange(20))
    )
    with contextlib.suppress(VmfsError):
        box.vcpu.set_debug(DebugRequest(not dice.randrange(4), (*points, *watch)))


def between(box: Box, dice: random.Random, names: list[str]) -> None:
    """What a client may do between two runs."""
    what = dice.randrange(10)
    if what == 0:
        set_hostile(box, dice, dice.choice(names))
    elif what == 1:
        at = FIRST * PAGE + dice.randrange(12 * PAGE - 64)
        box.memory[at : at + 64] = hostile_code(dice, 64)
    elif what == 2:
        with contextlib.suppress(VmfsError):
            box.vcpu.interrupt(dice.randrange(256))
    elif what == 3:
        box.vcpu.nmi()
    elif what == 4:
        box.machine.dirty_log(0)
    elif what == 5:
        with contextlib.suppress(VmfsError):
            box.machine.irq_line(dice.randrange(24), bool(dice.randrange(2)))
    elif what == 6:
        with contextlib.suppress(VmfsError):
            box.vcpu.set_msr(
                dice.choice((0xC0000080, 0xC0000101, 0x1B, 0x10, 0x277, 0x6E0, 0xDA0)), dice.getrandbits(64)
            )
    elif what == 7:
        box.vcpu.translate(dice.getrandbits(64))
    elif what == 8:
        box.vcpu.complete()


@hostile
@given(seed=st.integers(0, (1 << 64) - 1), irqchip=st.booleans())
def test_hostile_state_and_code(seed, irqchip):
    with box(irqchip=irqchip) as one:
        play(one, random.Random(seed))
        one.check()


@hostile
@given(
    name=st.sampled_from([*VCPU_STATES, *MACHINE_STATES]),
    data=st.binary(max_size=5000),
    irqchip=st.booleans(),
)
def test_bytes_of_any_length(name, data, irqchip):
    with box(irqchip=irqchip) as one:
        owner = one.machine if name in MACHINE_STATES else one.vcpu
        with contextlib.suppress(VmfsError):
            owner.set_state(name, data)
        with contextlib.suppress(Unsupported):
            assert owner.get_state(name)
        one.run(100)
        one.check()


@hostile
@given(
    code=st.binary(min_size=1, max_size=64),
    mode=st.sampled_from(("real", "protected", "long")),
    at=st.integers(0, 63),
)
def test_any_bytes_as_code(code, mode, at):
    """Up to, and over, the end of a page."""
    with box(irqchip=False) as one:
        set_mode(one.vcpu, Window(one.memory), 12 * PAGE, mode)
        start = 2 * PAGE - at
        Window(one.memory).write(start, code)
        set_rip(one, start)
        for _ in range(4):
            before = one.vcpu.counters()["instructions"]
            assert isinstance(one.run(50), EXITS)
            assert one.vcpu.counters()["instructions"] - before <= 50
        one.check()
