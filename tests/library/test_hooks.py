"""Hooks: code, blocks, memory, ports, what is not there, interrupts, system calls; traces and coverage."""

from __future__ import annotations

import weakref

import pytest
from library.conftest import CODE, DATA

from vmfs.words import exits
from vmfs.words.errors import Busy, Invalid, Unsupported, VmfsError

LOOP = "l: inc rax; dec rcx; jne l; nop; hlt"  # 3, 3, 2, 1, 1 bytes
STARTS = [CODE, CODE + 3, CODE + 6]


def test_code(make, engine):
    m = make(LOOP, engine=engine)
    m.rcx, seen = 3, []
    hook = m.hook_code(lambda machine, address: seen.append((address, machine.rcx)))
    assert isinstance(m.run(), exits.Hlt)
    assert [address for address, _ in seen] == STARTS * 3 + [CODE + 8, CODE + 9]
    assert [rcx for address, rcx in seen if address == CODE] == [3, 2, 1]
    assert hook.hits == 11
    hook.remove()
    m.rcx = 2
    m.run(start=CODE)
    assert len(seen) == 11 and hook.hits == 11


def test_a_range_and_one_address(make, engine):
    m = make(LOOP, engine=engine)
    m.rcx = 4
    part, one = m.hook_code(None, CODE + 3, CODE + 8), m.hook_address(CODE + 8)
    m.run()
    assert (part.hits, one.hits) == (8, 1)


def test_blocks(make, engine):
    m = make("xor eax, eax; l: inc rax; cmp eax, 3; jne l; call f; hlt; f: ret", engine=engine)
    seen = []
    m.hook_block(lambda machine, address: seen.append(address - CODE))
    m.run()
    assert seen == [0, 2, 2, 0x10, 0xF]


def test_a_hook_ends_the_run_and_the_next_one_goes_on(make, engine):
    m = make(LOOP, engine=engine)
    m.rcx = 5
    m.hook_address(CODE + 6, lambda machine, address: machine.rcx == 2)
    exit_ = m.run()
    assert isinstance(exit_, exits.Debug) and m.rip == CODE + 6 and m.rcx == 2
    assert isinstance(m.run(), exits.Hlt) and m.rax == 5
    m = make(LOOP, engine=engine)
    m.rcx = 5
    stop = m.hook_code(None, CODE + 6, CODE + 7, stop=True)
    for rcx in (4, 3):
        assert isinstance(m.run(), exits.Debug) and m.rcx == rcx
    assert stop.hits == 2


@pytest.mark.parametrize("width", [1, 20])
def test_until_where_a_hook_is(make, engine, width):
    """The run ends before that instruction; its hook is called when the run goes on from there."""
    m = make(LOOP, engine=engine)
    m.rcx, seen = 1, []
    m.hook_code(lambda machine, address: seen.append(address), CODE + 3, CODE + 3 + width)
    assert isinstance(m.run(until=CODE + 3), exits.Debug)
    assert seen == []
    assert isinstance(m.run(until=CODE + 6), exits.Debug)
    assert seen == [CODE + 3]
    assert isinstance(m.run(until=CODE + 9), exits.Debug)
    assert seen == ([CODE + 3] if width == 1 else [CODE + 3, CODE + 6, CODE + 8])


def test_a_store_before_the_end_is_seen(make, engine):
    """Its hook is called where the run ends after it, as well."""
    m = make("mov [0x8000], rax; nop; hlt", engine=engine)
    seen = []
    m.hook_memory(lambda machine, is_write, address, size, value: seen.append(value), DATA, DATA + 8, read=False)
    m.hook_code(lambda machine, address: seen.append(hex(address)), CODE + 8, CODE + 9)
    m.rax = 7
    assert isinstance(m.run(until=CODE + 8), exits.Debug)
    assert seen == [7]


def test_a_closed_machine_holds_its_hooks_no_more(make):
    class Call:
        def __call__(self, machine, address):
            pass

    m, call = make(LOOP), Call()
    gone = weakref.ref(call)
    m.hook_code(call)
    del call
    m.close()
    assert gone() is None


def test_a_hook_changes_the_machine(make, engine):
    m = make("mov eax, 1; mov ebx, 2; nop; hlt", engine=engine)

    def skip(machine, address):
        machine.rip = CODE + 10  # after the second mov
        machine.mem[DATA] = 7

    m.hook_address(CODE + 5, skip)
    m.run()
    assert (m.rax, m.rbx, m.mem[DATA]) == (1, 0, 7)


def test_hooks_that_come_and_go_in_a_hook(make, engine):
    m = make(LOOP, engine=engine)
    m.rcx, seen = 6, []

    def first(machine, address):
        seen.append("first")
        if len(seen) == 2:
            hook.remove()
            machine.hook_address(CODE + 3, lambda machine, address: seen.append("second"))

    hook = m.hook_address(CODE, first)
    m.run()
    assert seen == ["first"] * 2 + ["second"] * 5


def test_an_exception_in_a_hook_ends_the_run_where_it_is(make, engine):
    m = make(LOOP, engine=engine)
    m.rcx = 3

    def fail(machine, address):
        if machine.rcx == 2:
            raise LookupError("of the hook")

    hook = m.hook_address(CODE + 6, fail)
    with pytest.raises(LookupError, match="of the hook"):
        m.run()
    assert m.rip == CODE + 6 and m.rcx == 2
    hook.remove()
    assert isinstance(m.run(), exits.Hlt) and m.rax == 3


def test_what_a_hook_may_not(make, engine):
    m = make(LOOP, engine=engine)
    m.rcx, refused = 1, []

    def run_and_close(machine, address):
        for what in (machine.run, machine.close):
            try:
                what()
            except VmfsError as error:
                refused.append(type(error))

    m.hook_address(CODE + 3, run_and_close)
    assert isinstance(m.run(), exits.Hlt)
    assert refused == [Busy, Busy]
    for bad in ((5, 5), (-1, 5), (0, 1 << 60)):
        with pytest.raises(Invalid):
            m.hook_code(None, *bad)


def test_memory(make):
    m = make("mov [0x8010], rbx; mov al, [0x8011]; mov cl, [0x7fff]; mov [0x9000], al; hlt")
    m.map(0x7000, 0x1000)
    m.rbx, seen = 0x1234, []
    hook = m.hook_memory(lambda machine, *access: seen.append((machine.rip, *access)), DATA, DATA + 0x1000)
    only_writes = m.hook_memory(None, 0, None, read=False)
    m.run()
    assert seen == [(CODE + 8, True, DATA + 0x10, 8, 0x1234), (CODE + 15, False, DATA + 0x11, 1, 0x12)]
    assert (hook.hits, only_writes.hits) == (2, 2)
    with pytest.raises(Invalid):
        m.hook_memory(None, read=False, write=False)


def test_writes_on_any_engine(make, engine):
    m = make("mov rax, 5; mov [0x8010], rax; mov [0x8018], rax; hlt", engine=engine)
    seen = []
    try:
        m.hook_memory(lambda *access: seen.append(access[2:4]), 0x8010, 0x8018, read=False)
    except Unsupported as error:
        assert "watch" in str(error)
        assert isinstance(m.run(), exits.Hlt)  # and nothing is left of it
        return
    m.run()
    assert seen == [(0x8010, 8)]


def test_ports(make, engine):
    m = make("mov al, 0x41; out 0x80, al; in eax, 0x60; out 0x81, al; in al, 0x61; hlt", engine=engine)
    seen = []

    def port(machine, number, size, value):
        seen.append((number, size, value))
        return {0x60: 0x11223344, 0x81: True}.get(number)

    m.hook_ports(port)
    exit_ = m.run()
    assert (exit_.port, seen) == (0x81, [(0x80, 1, 0x41), (0x60, 4, None), (0x81, 1, 0x44)])
    assert m.eax == 0x11223344
    assert m.run().port == 0x61  # a read that nobody answers
    m.hook_ports(None)
    m.access_data = b"\x05"
    assert isinstance(m.run(), exits.Hlt) and m.al == 5


def test_what_is_not_there(make):
    m = make("mov rax, [0x200000]; mov [0x300000], rax; mov rbx, [0x400000]; mov rcx, [0x500000]; hlt")
    seen = []

    def invalid(machine, kind, address, size, value):
        seen.append((kind, address, size, value))
        if address == 0x200000:
            return 0x55
        if address < 0x500000:
            machine.map(address, b"\x99")
            return True
        return None

    m.hook_invalid(invalid)
    exit_ = m.run()
    assert exit_.addr == 0x500000
    assert seen[0] == ("read", 0x200000, 8, None) and seen[1] == ("write", 0x300000, 8, 0x55)
    assert (m.rax, m.rbx, m.mem[0x300000]) == (0x55, 0x99, 0x55)


def test_interrupts(make):
    m = make("mov eax, 1; int 0x80; int3; ud2; mov ebx, 9; hlt")
    seen = []

    def interrupt(machine, vector):
        seen.append((vector, machine.rip - CODE))
        if vector == 6:
            machine.rip += 2
        return vector != 3

    m.hook_interrupt(interrupt)
    exit_ = m.run()
    assert (exit_.REASON, exit_.vector) == ("interrupt", 3)
    assert isinstance(m.run(), exits.Hlt) and m.ebx == 9
    assert seen == [(0x80, 7), (3, 8), (6, 8)]


def test_a_page_that_comes_after_its_fault(make):
    """The exception is another one when the instruction is tried again, and is hooked again."""
    m = make("ud2; hlt")
    tries = []

    def patch(machine, vector):
        tries.append(vector)
        if len(tries) == 3:
            machine.mem[CODE : CODE + 2] = b"\x90\x90"
        return True

    m.hook_interrupt(patch, 6)
    assert isinstance(m.run(), exits.Hlt) and tries == [6, 6, 6]


def test_system_calls(make, engine):
    m = make("mov eax, 39; syscall; mov ebx, eax; mov eax, 60; syscall; hlt", engine=engine)
    m.rflags |= 1
    seen = []

    def call(machine):
        seen.append(machine.rax)
        machine.rax = 1234
        return seen[-1] == 60

    m.hook_syscall(call)
    exit_ = m.run()
    assert (exit_.REASON, seen, m.rbx) == ("syscall", [39, 60], 1234)
    assert m.cf == 1 and isinstance(m.run(), exits.Hlt)
    m.hook_syscall(None)
    assert m.run(start=CODE).number == 39


# ---- traces, coverage


def test_a_trace(make):
    m = make("mov rcx, 2; l: mov [0x8000 + rcx], cl; dec rcx; jne l; hlt")
    with m.trace(memory=True) as trace:
        m.run()
    executed = [one for one in trace if hasattr(one, "length")]
    accessed = [one for one in trace if hasattr(one, "data")]
    assert [one.address - CODE for one in executed] == [0, 7, 13, 16, 7, 13, 16, 18]
    assert [one.number for one in executed] == list(range(executed[0].number, executed[0].number + 8))
    assert [(one.rip - CODE, one.is_write, one.address, one.data) for one in accessed] == [
        (7, True, DATA + 2, b"\2"), (7, True, DATA + 1, b"\1"),
    ]  # fmt: skip
    numpy = pytest.importorskip("numpy")
    array = trace.array()
    assert array.dtype["address"] == numpy.uint64 and len(array) * 32 == len(trace.data)


def test_coverage(make, assemble):
    """The same path is the same map, another branch another one; each edge counts how often it was taken."""
    source = "cmp byte ptr [0x8000], 65; jne no; inc rbx; no: mov ecx, 5; l: dec ecx; jne l; hlt"
    m = make(source)
    snapshot = m.snapshot()
    cover = m.coverage()
    maps = []
    for data in (b"A", b"B", b"A"):
        m.restore(snapshot)
        m.mem[DATA:] = data
        cover[:] = bytes(len(cover))
        assert isinstance(m.run(), exits.Hlt)
        maps.append(bytes(cover))
    assert maps[0] == maps[2] != maps[1]
    assert max(maps[0]) == 4  # the jumps of the loop
    assert sum(map(bool, maps[1])) == sum(map(bool, maps[0])) + 1
    with pytest.raises(Busy):
        m.trace()
    m.coverage(0)
    with m.trace():
        pass
    for size in (100, 1000):
        with pytest.raises(Invalid):
            m.coverage(size)
