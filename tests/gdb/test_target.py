"""The register layouts: what gdb is told is what it gets, on a CPU of either engine."""

from __future__ import annotations

import struct
from xml.etree import ElementTree

import pytest

from vmfs.engine import ENGINES
from vmfs.machine.gdb.inferior import _set
from vmfs.machine.gdb.target import AVX, CORE, LAYOUTS, SEGMENTS, SSE, States, layout, set_ymm_highs
from vmfs.words.errors import Invalid
from vmfs.words.registers import REGISTERS, has_avx

# GDB manual G.5.5: what each of its features must have.
NEEDED = {
    CORE: "{}cs ss ds es fs gs st0 st1 st2 st3 st4 st5 st6 st7 fctrl fstat ftag fiseg fioff foseg fooff fop",
    SSE: "mxcsr",
}
GENERAL = {
    64: "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip eflags ",
    32: "eax ecx edx ebx esp ebp esi edi eip eflags ",
}


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def cpu(request):
    engine = request.param.load()
    availability = engine.probe()
    if not availability.available:
        pytest.skip(availability.reason)
    machine = engine.create_machine()
    yield machine.create_vcpu(0)
    machine.close()


@pytest.mark.parametrize("avx", (False, True))
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_xml_is_the_layout(name, avx):
    described = layout(name, avx=avx)
    root = ElementTree.fromstring(described.xml())
    assert root.findtext("architecture") == LAYOUTS[name][0]
    rows = [(reg.get("name"), int(reg.get("bitsize"))) for reg in root.iter("reg")]
    assert rows == [(row.name, row.bits) for row in described.registers]
    assert len({name for name, _ in rows}) == len(rows)
    features = {one.get("name"): {reg.get("name") for reg in one.iter("reg")} for one in root.iter("feature")}
    for feature, needed in NEEDED.items():
        assert features[feature] >= set(needed.format(GENERAL[described.bits]).split())
    assert (AVX in features) == avx
    assert (SEGMENTS in features) == (described.bits == 64)
    defined = {element.get("id") for element in root.iter() if element.get("id")}
    known = {"int", "int32", "int64", "code_ptr", "data_ptr", "i387_ext", "uint16", "uint32", "uint64", "uint128"}
    assert {reg.get("type") for reg in root.iter("reg")} <= defined | known


def test_the_layouts_have_what_a_kernel_needs():
    names = {row.name for row in layout("x86-64", avx=True).registers}
    needed = "fs_base gs_base k_gs_base cr0 cr2 cr3 cr4 cr8 efer gdtr_base idtr_limit tr ymm15h xmm15"
    assert names >= set(needed.split())


def test_there_is_no_other_layout():
    with pytest.raises(Invalid, match="x86-64, i386, i8086"):
        layout("arm", avx=False)


def _set_one(cpu, row, value):
    _set(cpu, row.put(States(cpu), value))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_set_is_read_and_nothing_else_changes(cpu, name):
    """Every register that takes any value; control registers have rules of their own."""
    one = layout(name, avx=has_avx(cpu))
    checked = "cr0 cr3 cr4 cr8 efer xcr0 apic_base fstat eflags mxcsr dr6 dr7 ftag fop k_gs_base".split()
    free = [row for row in one.registers if row.name not in checked]
    free = [row for row in free if not row.name.startswith(("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldtr"))]
    assert len(free) > 30
    for number, row in enumerate(free):
        before = {other.name: other.get(States(cpu)) for other in one.registers}
        width = {"fctrl": 16, "fiseg": 16, "foseg": 16, "gdtr_limit": 16, "idtr_limit": 16}.get(row.name, row.bits)
        value = int.from_bytes(bytes((0x11 + number + at) & 0x7F for at in range(width // 8)), "little")
        if row.name.endswith("_base") or row.name in ("rip", "fioff", "fooff") or row.name.startswith("dr"):
            value &= 0x7FFF_FFFF
        if row.name == "fctrl":
            value = 0x27F
        _set_one(cpu, row, value)
        after = {other.name: other.get(States(cpu)) for other in one.registers}
        assert after[row.name] == value, row.name
        assert {key for key in after if after[key] != before[key]} <= {row.name, "ftag"}, row.name


def test_values_are_those_of_the_register_files(cpu):
    regs = bytearray(cpu.get_state("regs"))
    REGISTERS["rbx"].put(regs, 0x1122_3344_5566_7788)
    cpu.set_state("regs", bytes(regs))
    wide = {row.name: row for row in layout("x86-64", avx=False).registers}
    narrow = {row.name: row for row in layout("i386", avx=False).registers}
    assert wide["rbx"].get(States(cpu)) == 0x1122_3344_5566_7788
    assert narrow["ebx"].get(States(cpu)) == 0x5566_7788
    _set_one(cpu, narrow["ebx"], 0x99)
    assert wide["rbx"].get(States(cpu)) == 0x1122_3344_0000_0099
    assert wide["cs_base"].get(States(cpu)) == 0xFFFF_0000  # Intel SDM 3A table 9-1


def test_a_linear_instruction_pointer(cpu):
    for name, pc in (("x86-64", "rip"), ("i8086", "eip")):
        rows = {row.name: row for row in layout(name, avx=False, linear=True).registers}
        assert rows[pc].get(States(cpu)) == 0xFFFF_FFF0  # the reset vector
        _set_one(cpu, rows[pc], 0xFFFF_1234)
        assert REGISTERS["rip"].get(cpu.get_state("regs")) == 0x1234
        _set_one(cpu, rows[pc], 0xFFFF_FFF0)
        assert rows["cs_base"].get(States(cpu)) == 0xFFFF_0000


def test_full_tag_words(cpu):
    """Intel SDM 1 8.1.7: valid, zero, special, empty, by physical register."""
    fpu = bytearray(cpu.get_state("fpu"))
    one, zero, infinity, denormal = 0x3FFF << 64 | 1 << 63, 0, 0x7FFF << 64 | 1 << 63, 5
    for number, value in enumerate((one, zero, infinity, denormal)):
        REGISTERS[f"st{number}"].put(fpu, value)
    REGISTERS["fsw"].put(fpu, 6 << 11)  # st0 is R6, st2 is R0
    REGISTERS["ftw"].put(fpu, 0b1100_0011)
    cpu.set_state("fpu", bytes(fpu))
    rows = {row.name: row for row in layout("x86-64", avx=False).registers}
    assert rows["ftag"].get(States(cpu)) == 0b01_00_11_11_11_11_10_10
    _set_one(cpu, rows["ftag"], 0b11_00_11_11_11_11_11_10)
    assert REGISTERS["ftw"].get(cpu.get_state("fpu")) == 0b0100_0001


def test_upper_halves_of_a_state_that_is_not_in_use_are_zero():
    area = bytearray(4096)
    area[576 : 576 + 256] = b"\xee" * 256  # means nothing: XSTATE_BV says so
    row = next(row for row in layout("x86-64", avx=True).registers if row.name == "ymm3h")

    class Cpu:
        def get_state(self, name):
            return bytes(area)

    assert row.get(States(Cpu())) == 0
    new = set_ymm_highs(bytes(area), {3: 0x55})
    assert struct.unpack_from("<Q", new, 512) == (4,)
    assert new[576 : 576 + 256] == bytes(48) + b"\x55" + bytes(207)
