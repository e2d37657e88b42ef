"""`from vmfs import Machine`: registers, memory, runs, snapshots, on each engine."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time

import pytest
from library.conftest import CODE, DATA

from vmfs import Machine
from vmfs.words import exits
from vmfs.words.errors import AlreadyThere, BadAddress, Gone, Invalid, NotThere, Unsupported

ABSENT = 0x20_0000


def test_importing_vmfs_loads_nothing_of_it():
    source = "import sys, vmfs; print([name for name in sys.modules if name.startswith(('vmfs', 'trio', 'pyfuse3'))])"
    assert subprocess.check_output([sys.executable, "-c", source], text=True) == "['vmfs']\n"


def test_the_library_needs_neither_fuse_nor_trio_nor_msgspec():
    source = (
        "import sys; from vmfs import Machine\n"
        "with Machine(memory={0x1000: b'\\x90\\xf4'}) as m:\n"
        "    m.run(start=0x1000); m.restore(m.snapshot())\n"
        "print({'trio', 'pyfuse3', 'msgspec', 'capstone', 'elftools', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", source], text=True) == "set()\n"


# ---- registers


def test_parts_of_registers(make, engine):
    m = make(engine=engine)
    m.rax = 0x1122334455667788
    assert (m.eax, m.ax, m.al, m.ah) == (0x55667788, 0x7788, 0x88, 0x77)
    m.ah = 0xEE
    m.r9, m.r9b = 0x1111, 0xFF
    m.sil = 0x5A
    assert (m.rax, m.r9, m.rsi & 0xFF) == (0x112233445566EE88, 0x11FF, 0x5A)
    m.eax = 7  # as an instruction does, which clears the upper half
    assert m.rax == 7
    m.rbx = -1
    assert m.rbx == (1 << 64) - 1
    m.zf, m.cf = 1, 1
    assert m.rflags & 0x41 == 0x41 and m.eflags == m.rflags
    m.xmm3 = 0x0123456789ABCDEF << 64 | 5
    m.fs_base = 0x1234
    assert m.xmm3 == 0x0123456789ABCDEF << 64 | 5 and m.fs_base == 0x1234
    assert m.registers()["rax"] == 7


@pytest.mark.parametrize(("name", "value"), [("al", 256), ("eax", 1 << 32), ("rax", 1 << 64), ("ah", -129)])
def test_what_does_not_fit_is_refused(make, name, value):
    m = make()
    m.rax = 5
    with pytest.raises(Invalid, match=f"{name} has"):
        setattr(m, name, value)
    assert m.rax == 5


def test_a_name_that_is_no_register_is_refused(make):
    m = make("nop; hlt")
    with pytest.raises(AttributeError, match="raxx"):
        m.raxx = 1
    with pytest.raises(AttributeError, match="raxx"):
        m.raxx  # noqa: B018
    with pytest.raises(Invalid, match="until: 'main' is no address"):
        m.run(until="main")
    assert isinstance(m.run(), exits.Hlt)


def test_each_register_has_its_number(make, assemble, engine):
    """Each is set here and stored by the guest, which has them in its own order."""
    names = "rax rcx rdx rbx rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
    source = "; ".join(f"mov [{DATA + 8 * n:#x}], {name}; inc {name}" for n, name in enumerate(names))
    m = make(source + "; hlt", engine=engine)
    for number, name in enumerate(names):
        setattr(m, name, 0x1000 + number)
    assert isinstance(m.run(), exits.Hlt)
    for number, name in enumerate(names):
        assert int.from_bytes(m.mem[DATA + 8 * number : DATA + 8 * number + 8], "little") == 0x1000 + number
        assert getattr(m, name) == 0x1001 + number


# ---- memory


def test_memory_is_what_was_mapped(make, engine):
    m = make(engine=engine)
    m.mem[DATA : DATA + 4] = b"abcd"
    m.mem[DATA + 4] = 0x65
    assert m.mem[DATA : DATA + 6] == b"abcde\0" and m.mem[DATA + 1] == 0x62
    m.map(DATA + 0x2000, b"more")  # right after the other
    m.mem[DATA + 0x1FFE :] = b"XYZW"
    assert m.mem[DATA + 0x1FFE : DATA + 0x2004] == b"XYZWre"
    assert DATA in m.mem and ABSENT not in m.mem
    before = m.mem[DATA + 0x2F00 : DATA + 0x3000]
    for bad in (lambda: m.mem[ABSENT], lambda: m.mem.write(DATA + 0x2FF0, bytes(32)), lambda: m.mem[0:8]):
        with pytest.raises(BadAddress):
            bad()
    assert m.mem[DATA + 0x2F00 : DATA + 0x3000] == before  # nothing was written
    for wrong in (slice(None, 4), slice(DATA, DATA + 4, 2), slice(DATA, None)):
        with pytest.raises(Invalid):
            m.mem[wrong]
    with pytest.raises(Invalid, match="3 bytes do not fit"):
        m.mem[DATA : DATA + 4] = b"abc"


def test_mapping_and_unmapping(make, engine):
    m = make("mov eax, [0x200000]; hlt", engine=engine)
    region = m.map(ABSENT, b"\x11\x22\x33\x44")
    assert region.size == 0x1000
    with pytest.raises(AlreadyThere):
        m.map(ABSENT, 4096)
    with pytest.raises(Invalid):
        m.map(ABSENT + 0x1800, 4096)
    m.run()
    assert m.eax == 0x44332211
    m.unmap(ABSENT)
    with pytest.raises(NotThere):
        m.unmap(region)
    assert m.run(start=CODE).REASON == "mmio"
    with pytest.raises(NotThere):
        m.unmap(m._tables)


def test_what_a_program_writes_is_code_at_once(make, assemble, engine):
    m = make("mov eax, 1; hlt", engine=engine)
    for number in range(1, 5):
        m.mem[CODE + 1] = number
        m.run(start=CODE)
        assert m.rax == number


def test_read_only_memory(make, engine):
    m = make("mov qword ptr [0x200000], 5; hlt", engine=engine)
    m.map(ABSENT, b"kept", read_only=True)
    exit_ = m.run()
    assert isinstance(exit_, exits.Mmio) and exit_.direction == "write" and exit_.addr == ABSENT
    assert m.mem[ABSENT : ABSENT + 4] == b"kept"


# ---- runs


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_each_mode(make, engine, mode):
    m = make("mov ax, 0x1234; inc ax; hlt", mode, engine)
    assert isinstance(m.run(), exits.Hlt) and m.ax == 0x1235 and m.mode == mode


def test_until_insns_and_timeout(make, assemble, engine):
    m = make("l: inc rax; inc rbx; jmp l", engine=engine)
    exit_ = m.run(until=CODE + 3)
    assert isinstance(exit_, exits.Debug) and m.rip == CODE + 3 and (m.rax, m.rbx) == (1, 0) and m.exit is exit_
    assert m.run(until=CODE + 3).REASON == "debug" and m.rax == 2  # where it begins, it does not stop
    assert isinstance(m.run(insns=2), exits.Limit) and m.rip == CODE and m.rax == 2
    began = time.monotonic()
    assert isinstance(m.run(timeout=0.05), exits.Limit) and 0.04 < time.monotonic() - began < 5
    # Together: what comes first.
    m.rip = CODE
    assert isinstance(m.run(until=CODE + 3, insns=1000, timeout=60), exits.Debug)
    assert isinstance(m.run(until=CODE + 0x500, insns=10, timeout=60), exits.Limit)


def test_stop_from_another_thread(make, engine):
    m = make("jmp .", engine=engine)
    timer = threading.Timer(0.05, m.stop)
    timer.start()
    assert m.run(timeout=60).REASON == "interrupted"
    timer.join()


def test_an_access_elsewhere_is_an_exit(make, engine):
    m = make("mov rax, [0x200000]; mov [0x200008], rbx; hlt", engine=engine)
    m.rbx = 0x77
    exit_ = m.run()
    assert (exit_.REASON, exit_.direction, exit_.addr, exit_.size, m.rip) == ("mmio", "read", ABSENT, 8, CODE)
    m.access_data = 0x1122
    exit_ = m.run()
    assert (exit_.direction, exit_.addr, exit_.data) == ("write", ABSENT + 8, (0x77).to_bytes(8, "little"))
    assert m.rax == 0x1122 and isinstance(m.run(), exits.Hlt)


def test_exceptions_are_exits(make):
    m = make("ud2")
    exit_ = m.run()
    assert (exit_.REASON, exit_.cause, exit_.vector, m.rip) == ("debug", "exception", 6, CODE)
    m = make("xor ecx, ecx; div ecx", exceptions="guest")
    assert m.run().REASON == "shutdown"


def test_an_interrupt_is_an_exit_and_the_next_run_is_after_it(make):
    m = make("int 0x80; int3; mov eax, 5; hlt")
    first, second = m.run(), m.run()
    assert (first.vector, second.vector) == (0x80, 3) and second.rip == CODE + 2
    assert "vector=0x80" in first.line() and isinstance(m.run(), exits.Hlt) and m.eax == 5


def test_a_brief_life_touches_little_memory():
    """Tables that a run of a few instructions hardly uses are neither filled nor cleared."""

    def live() -> None:
        with Machine(memory={0x1000: b"\x48\xff\xc0\x90"}) as machine:
            machine.run(start=0x1000, until=0x1004)
            machine.run(start=0x1000, until=0x1003)  # other stops: what was decoded is forgotten
            assert machine.rax == 2

    for _ in range(20):
        live()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        live()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50 < 100  # 45; each a page


def test_closed_and_bad_arguments(make):
    memory = {3: 4096}, {1 << 60: 1}
    for bad in ({"mode": "huge"}, {"exceptions": "no"}, {"engine": "unicorn"}, *({"memory": one} for one in memory)):
        with pytest.raises(Invalid):
            Machine(**bad)
    with Machine(memory={CODE: b"\xf4"}) as m:
        m.run(start=CODE)
    with pytest.raises(Gone):
        m.run()
    m.close()


# ---- the past


def test_there_and_back(make, engine):
    m = make("l: inc qword ptr [0x8000]; inc rax; inc byte ptr [0x9000 + rax]; cmp rax, 40; jne l; hlt", engine=engine)
    m.run(until=CODE)
    before = m.snapshot()
    assert isinstance(m.run(), exits.Hlt)
    wanted = m.registers(), m.mem[DATA : DATA + 0x2000]
    after = m.snapshot()
    for _ in range(3):
        m.restore(before)
        assert m.rax == 1 and m.mem[DATA] == 1
        m.run()
        assert (m.registers(), m.mem[DATA : DATA + 0x2000]) == wanted
    m.restore(before)
    m.restore(after)
    assert (m.registers(), m.mem[DATA : DATA + 0x2000]) == wanted
    assert sum(after.pages[page] is before.pages.get(page) for page in after.pages) >= 1  # code: it is shared
    with pytest.raises(Invalid):
        make(engine=engine).restore(before)


def test_what_was_written_by_the_program_goes_back_too(make, engine):
    m = make("mov eax, 1; hlt", engine=engine)
    snapshot = m.snapshot()
    m.mem[CODE + 1] = 9
    m.mem[DATA:] = b"gone"
    m.map(ABSENT, b"gone")
    m.restore(snapshot)
    assert m.mem[DATA : DATA + 4] == bytes(4) and ABSENT not in m.mem
    m.run()
    assert m.rax == 1


def test_memory_that_was_unmapped_is_there_again(make, engine):
    m = make("mov eax, [0x200000]; hlt", engine=engine)
    m.map(ABSENT, b"\1\2\3\4")
    snapshot = m.snapshot()
    m.mem[ABSENT] = 0xFF
    m.unmap(ABSENT)
    m.restore(snapshot)
    m.run()
    assert m.eax == 0x04030201


def test_back_into_the_middle_of_an_access(make):
    m = make("in al, 0x60; mov rbx, [0x200000]; hlt")
    m.run()
    at_port = m.snapshot()
    m.access_data = 0x41
    assert m.run().REASON == "mmio"
    at_memory = m.snapshot()
    for value in (0x10, 0x20):
        m.restore(at_port)
        m.access_data = value
        m.run()
        assert m.al == value
        m.restore(at_memory)
        m.access_data = value
        assert isinstance(m.run(), exits.Hlt) and (m.al, m.rbx) == (0x41, value)


def test_context(make, engine):
    m = make("l: inc rax; jmp l", engine=engine)
    m.xmm1 = 5
    context = m.save_context()
    m.run(until=CODE)
    m.xmm1, m.fs_base = 9, 7
    m.load_context(context)
    assert (m.rax, m.xmm1, m.fs_base) == (0, 5, 0)


# ---- assembling


@pytest.mark.parametrize(
    ("mode", "text", "code"),
    [
        ("real", "mov ax, [bx+si]", "8b00"),
        ("protected", "mov eax, [esp+8]", "8b442408"),
        ("long", "lea rax, [rip+8]", "488d0508000000"),
    ],
)
def test_asm_is_for_the_mode(make, mode, text, code):
    pytest.importorskip("keystone", reason="keystone-engine is not installed")
    assert make(mode=mode).asm(text).hex() == code


def test_asm_puts_the_code_there(make, engine):
    pytest.importorskip("keystone", reason="keystone-engine is not installed")
    m = make(engine=engine)
    assert m.asm(f"mov eax, 42; jmp {CODE + 16:#x}", CODE) == bytes(m.mem[CODE : CODE + 7])
    m.asm("hlt", CODE + 16)
    assert m.run(start=CODE).rip == CODE + 17 and m.eax == 42
    with pytest.raises(Invalid, match="^asm: "):
        m.asm("mov eax, ,", CODE)
    assert m.mem[CODE] == 0xB8, "what is refused has changed nothing"


def test_asm_without_keystone(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "keystone", None)
    with pytest.raises(Unsupported, match="pip install keystone-engine"):
        make().asm("hlt")
