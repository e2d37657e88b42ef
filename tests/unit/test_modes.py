"""Setting up a mode, by the bytes, and telling which one a CPU is in."""

import struct

import pytest

from vmfs.engine.kvm import stepping
from vmfs.words.errors import Invalid
from vmfs.words.modes import CODE, DATA, RFLAGS, RIP, RSP, CodeMode, mode_of, set_mode

SEGMENT = struct.Struct("<QIHBBBBBBBBBx")
NAMES = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
GIB = 1 << 30


class Cpu:
    """regs and sregs, with a value in each register that modes leave alone."""

    def __init__(self):
        self.states = {"regs": bytes(range(144)), "sregs": b"\xa5" * 312}

    def get_state(self, name):
        return self.states[name]

    def set_state(self, name, data):
        assert len(data) == len(self.states[name])
        self.states[name] = data

    def segment(self, name):
        return SEGMENT.unpack_from(self.states["sregs"], NAMES.index(name) * 24)

    def control(self):
        cr0, cr2, cr3, cr4, cr8, efer = struct.unpack_from("<6Q", self.states["sregs"], 224)
        return {"cr0": cr0, "cr2": cr2, "cr3": cr3, "cr4": cr4, "cr8": cr8, "efer": efer}

    def reg(self, offset):
        return struct.unpack_from("<Q", self.states["regs"], offset)[0]


class Memory:
    def __init__(self, size):
        self.size = size
        self.bytes = {}

    def write(self, offset, data):
        assert 0 <= offset and offset + len(data) <= self.size
        for at in range(0, len(data), 8):
            self.bytes[offset + at] = data[at : at + 8]

    def entry(self, address):
        return int.from_bytes(self.bytes.get(address, b""), "little")

    def walk(self, cr3, linear):
        """A 4-level walk to a 2 MiB page (Intel SDM 3A 4.5.4); None where it ends early."""
        table = cr3
        for shift in (39, 30, 21):
            entry = self.entry(table + 8 * (linear >> shift & 511))
            if not entry & 1:
                return None
            assert entry & 7 == 7, "present, writable, for user mode"
            table = entry & 0x000FFFFFFFFFF000
        assert entry & 0x80, "a large page"
        return (entry & 0x000FFFFFFFE00000) | linear & 0x1FFFFF


def set_up(mode, size=16 << 20, **options):
    cpu, memory = Cpu(), Memory(size)
    set_mode(cpu, memory, size, mode, **options)
    return cpu, memory


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_the_mode_is_the_one_that_was_set(mode):
    cpu, _ = set_up(mode)
    assert mode_of(cpu.states["regs"], cpu.states["sregs"]) == mode


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_registers(mode):
    before = Cpu()
    cpu, _ = set_up(mode)
    assert (cpu.reg(RIP), cpu.reg(RFLAGS)) == (0, 2)
    assert 0 < cpu.reg(RSP) < 16 << 20 and cpu.reg(RSP) % 16 == 0
    kept = [offset for offset in range(0, 144, 8) if offset not in (RIP, RSP, RFLAGS)]
    assert [cpu.reg(offset) for offset in kept] == [before.reg(offset) for offset in kept]
    assert cpu.states["sregs"][272:] == before.states["sregs"][272:]  # apic_base, interrupt_bitmap


def test_real_is_flat():
    cpu, memory = set_up("real")
    assert not memory.bytes
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        base, limit, selector, kind, present, dpl, db, s, long, g, *_ = cpu.segment(name)
        assert (base, limit, selector, present, dpl, db, s, long, g) == (0, 0xFFFF, 0, 1, 0, 0, 1, 0, 0)
        assert kind == (11 if name == "cs" else 3)
    assert cpu.reg(RSP) == 0xFFF0
    assert struct.unpack_from("<QH", cpu.states["sregs"], 208) == (0, 0x3FF)


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_segments_are_those_of_the_gdt(mode):
    """A guest that loads its selectors anew gets the same segments."""
    cpu, memory = set_up(mode)
    gdt, limit = struct.unpack_from("<QH", cpu.states["sregs"], 192)
    for name, selector in (("cs", CODE), ("ds", DATA), ("ss", DATA)):
        base, seg_limit, sel, kind, present, dpl, db, s, long, g, avl, unusable = cpu.segment(name)
        assert sel == selector and selector + 7 <= limit and not unusable
        raw = memory.entry(gdt + selector)
        assert raw >> 16 & 0xFFFFFF | raw >> 32 & 0xFF000000 == base == 0
        assert raw & 0xFFFF | raw >> 32 & 0xF0000 == seg_limit >> 12 == 0xFFFFF
        access = raw >> 40 & 0xFF
        assert (access & 0xF, access >> 4 & 1, access >> 5 & 3, access >> 7) == (kind, s, dpl, present)
        flags = raw >> 52 & 0xF
        assert (flags & 1, flags >> 1 & 1, flags >> 2 & 1, flags >> 3) == (avl, long, db, g)
    assert cpu.segment("cs")[8] == (mode == "long")  # CS.L


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_vm_entry_checks(mode):
    """Intel SDM 3C 27.3.1.2: TR is a busy TSS, LDTR an LDT, both present system segments."""
    cpu, _ = set_up(mode)
    for name, kind in (("tr", 11), ("ldt", 2)):
        _, _, selector, type_, present, _, _, s, _, g, _, unusable = cpu.segment(name)
        assert (selector & 4, type_, present, s, g, unusable) == (0, kind, 1, 0, 0, 0)
    control = cpu.control()
    paging, lme, lma = control["cr0"] >> 31, control["efer"] >> 8 & 1, control["efer"] >> 10 & 1
    assert lma == (lme & paging)
    assert not paging or control["cr0"] & 1
    assert not lma or control["cr4"] & 0x20


@pytest.mark.parametrize("size", [1 << 20, 16 << 20, 3 * GIB, 6 * GIB + 4096, 600 * GIB])
def test_long_maps_ram_and_4_gib(size):
    cpu, memory = set_up("long", size)
    cr3 = cpu.control()["cr3"]
    reach = max(size, 4 * GIB)
    for linear in (0, 0x1234, size - 1, 2 * GIB, 4 * GIB - 1, reach - 1):
        assert memory.walk(cr3, linear) == linear
    assert memory.walk(cr3, -(-reach // GIB) * GIB) is None
    assert cpu.reg(RSP) <= cr3 and min(memory.bytes) >= cr3


def test_long_maps_as_far_as_asked():
    cpu, memory = set_up("long", reach=32 * GIB)
    assert memory.walk(cpu.control()["cr3"], 32 * GIB - 1) == 32 * GIB - 1


@pytest.mark.parametrize("mode, size", [("real", 0), ("protected", 4096), ("long", 7 * 4096), ("long", 0)])
def test_too_little_ram(mode, size):
    cpu, memory = Cpu(), Memory(size)
    with pytest.raises(Invalid, match="needs more RAM"):
        set_mode(cpu, memory, size, mode)
    assert cpu.states == Cpu().states and not memory.bytes


def test_unknown_mode():
    with pytest.raises(Invalid, match="no mode compat"):
        set_up("compat")


def test_mode_of_the_rest():
    protected, _ = set_up("protected")
    regs = bytearray(protected.states["regs"])
    struct.pack_into("<Q", regs, RFLAGS, 1 << 17 | 2)
    assert mode_of(bytes(regs), protected.states["sregs"]) == "v8086"
    long, _ = set_up("long")
    sregs = bytearray(long.states["sregs"])
    cs = list(SEGMENT.unpack_from(sregs, 0))
    cs[6], cs[8] = 1, 0  # D, and not L
    SEGMENT.pack_into(sregs, 0, *cs)
    assert mode_of(long.states["regs"], bytes(sregs)) == "compat"


@pytest.mark.parametrize(
    ("mode", "changed", "rip", "bits", "address"),
    [
        ("real", {"base": 0x20000}, 0x10010, 16, 0x30010),  # EIP has 32 bits in 16-bit code, too
        ("real", {"base": 0xFFFF0000}, 0x1FFF0, 16, 0xFFF0),
        ("protected", {"base": 0x1000}, 0xFFFFF123, 32, 0x123),
        ("protected", {"base": 0x1000, "l": 1}, 0xFFFFF123, 32, 0x123),  # L means nothing outside of IA-32e mode
        ("long", {"base": 0x1000, "db": 1, "l": 0}, 0x2000, 32, 0x3000),
        ("long", {"base": 0x1000, "db": 0, "l": 0}, 0x12345, 16, 0x13345),
        ("long", {"base": 0x1000}, 0xFFFFFFFF80000123, 64, 0xFFFFFFFF80000123),
    ],
)
def test_the_linear_address_of_code(mode, changed, rip, bits, address):
    cpu, _ = set_up(mode)
    sregs, regs = bytearray(cpu.states["sregs"]), bytearray(cpu.states["regs"])
    cs = list(SEGMENT.unpack_from(sregs, 0))
    for name, value in changed.items():
        cs[{"base": 0, "db": 6, "l": 8}[name]] = value
    SEGMENT.pack_into(sregs, 0, *cs)
    struct.pack_into("<Q", regs, RIP, rip)
    code = CodeMode.of(bytes(regs), bytes(sregs))
    assert (code.bits, code.ip, hex(code.address)) == (bits, rip, hex(address))
    assert code.ip_of(address) == rip & code.mask
    assert stepping.look(bytes(regs), bytes(sregs)).linear == address
