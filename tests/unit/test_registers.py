"""REGISTERS against the kernel's own headers, and the parsing and writing of register files."""

import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.words.errors import Invalid, Unsupported, VmfsError
from vmfs.words.registers import (
    REGISTERS,
    Ymm,
    dump_registers,
    msr_name,
    parse_msr,
    parse_registers,
    read_register,
    write_registers,
)

SIZES = {"regs": 144, "sregs": 312, "debugregs": 128, "xcrs": 392, "fpu": 416, "xsave": 4096}
AVX = struct.pack("<II 7I 3I", 1, 0, 1, 0, 0, 0, 0, 1 << 28, 0, 0, 0, 0)  # CPUID: one entry, leaf 1


class Cpu:
    """Blobs in place of a CPU. `refuse` is the state (or MSR) that it does not take."""

    def __init__(self, refuse=None):
        self.states = {name: bytes(size) for name, size in SIZES.items()} | {"cpuid": AVX}
        self.states["xsave"] = bytes(512) + b"\2" + bytes(3583)  # XSTATE_BV has SSE
        self.msrs = {0x10: 0, 0xC0000082: 5}
        self.refuse = refuse

    def get_state(self, name):
        return self.states[name]

    def set_state(self, name, data):
        assert len(data) == SIZES[name]
        if name == self.refuse:
            raise Invalid(f"{name} refused")
        self.states[name] = data
        if name == "fpu":  # XMM is in both
            area = self.states["xsave"]
            in_use = (area[512] | 2).to_bytes(1, "little")
            self.states["xsave"] = area[:160] + data[152:408] + area[416:512] + in_use + area[513:]
        elif name == "xsave":
            self.states["fpu"] = self.states["fpu"][:152] + data[160:416] + self.states["fpu"][408:]

    def get_msr(self, index):
        if index not in self.msrs:
            raise Invalid(f"no MSR {index:#x}")
        return self.msrs[index]

    def set_msr(self, index, value):
        if index == self.refuse:
            raise Invalid("refused")
        self.msrs[index] = value


def _c_place(row):
    """The C expression for the field that a row names: the kernel's words for our table."""
    name = row.name
    if row.state == "regs":
        return "kvm_regs", name
    if row.state == "debugregs":
        return "kvm_debugregs", f"db[{name[2]}]" if name in ("dr0", "dr1", "dr2", "dr3") else name
    if row.state == "xcrs":
        return "kvm_xcrs", "xcrs[0].value"
    if row.state == "fpu":
        for prefix, member in (("st", "fpr"), ("xmm", "xmm")):
            if name.startswith(prefix):
                return "kvm_fpu", f"{member}[{name.removeprefix(prefix)}]"
        renamed = {"ftw": "ftwx", "fop": "last_opcode", "fip": "last_ip", "fdp": "last_dp"}
        return "kvm_fpu", renamed.get(name, name)
    base, _, part = name.partition(".")
    base = {"ldtr": "ldt", "gdtr": "gdt", "idtr": "idt"}.get(base, base)
    if base.startswith("cr") or base in ("efer", "apic_base"):
        return "kvm_sregs", base
    return "kvm_sregs", f"{base}.{part or 'selector'}"


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
def test_rows_lie_where_the_kernel_headers_say(tmp_path):
    rows = [row for row in REGISTERS.values() if row.state != "xsave"]  # whose parts are the processor's
    lines = [
        f'  printf("%zu %zu\\n", offsetof(struct {struct}, {member}), '
        f"sizeof(((struct {struct} *)0)->{member}));"
        for struct, member in map(_c_place, rows)
    ]
    source = tmp_path / "places.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {\n"
        + "\n".join(lines)
        + "\n}\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "places", source], check=True)
    places = subprocess.run([tmp_path / "places"], check=True, capture_output=True, text=True).stdout
    for row, place in zip(rows, places.splitlines(), strict=True):
        offset, size = map(int, place.split())
        assert row.offset == offset, row.name
        # An st register is 10 bytes in a field of 16.
        assert row.size == (10 if row.name.startswith("st") and row.state == "fpu" else size), row.name


def test_registers_of_one_state_do_not_overlap():
    taken = set()
    for row in (row for row in REGISTERS.values() if not isinstance(row, Ymm)):
        bytes_ = {(row.state, at) for at in range(row.offset, row.offset + row.size)}
        assert not bytes_ & taken, row.name
        taken |= bytes_


def test_dump_can_be_written_back():
    cpu = Cpu()
    write_registers(cpu, {"rax": 1, "xmm3": 2**127, "cs.base": 7, "st0": 2**79, "xcr0": 3})
    text = dump_registers(cpu)
    other = Cpu()
    write_registers(other, parse_registers(text))
    assert other.states == cpu.states
    assert "rax 0x0000000000000001\n" in text
    assert "cs 0x0000\n" in text


def test_ymm_lies_in_two_parts_that_the_header_names():
    """Intel SDM 1 13.4: XMM in the legacy region, the upper halves at 576; XSTATE_BV says which are not zero."""
    cpu = Cpu()
    cpu.states["xsave"] = b"\xee" * 512 + bytes(64) + b"\xee" * 3520
    assert read_register(cpu, "ymm3") == "0x" + "0" * 64
    write_registers(cpu, {"ymm3": 7 << 128 | 5})
    area = cpu.states["xsave"]
    assert struct.unpack_from("<Q", area, 512) == (6,)
    assert area[160 : 160 + 256] == bytes(48) + (5).to_bytes(16, "little") + bytes(192)
    assert area[576 : 576 + 256] == bytes(48) + (7).to_bytes(16, "little") + bytes(192)
    assert area[:160] == b"\xee" * 160 and area[832:] == b"\xee" * 3264
    cpu.states["xsave"] = bytes(4096)
    write_registers(cpu, {"ymm3": 5})
    assert struct.unpack_from("<Q", cpu.states["xsave"], 512) == (2,)  # no AVX where none is needed


def test_ymm_is_there_with_avx_only():
    cpu = Cpu()
    assert "ymm15 0x" in dump_registers(cpu)
    cpu.states["cpuid"] = bytes(8)
    assert "ymm" not in dump_registers(cpu)


def test_xmm_and_ymm_of_one_change_agree():
    with pytest.raises(Invalid, match="ymm1 and xmm1"):
        write_registers(Cpu(), {"ymm1": 1 << 200 | 2, "xmm1": 3})


def test_dump_leaves_out_what_the_engine_lacks():
    class NoXcrs(Cpu):
        def get_state(self, name):
            if name == "xcrs":
                raise Unsupported("no XSAVE")
            return super().get_state(name)

    assert "xcr0" not in dump_registers(NoXcrs())


def test_single_registers():
    cpu = Cpu()
    write_registers(cpu, {"rip": 0x7C00, "msr.0x10": 9})
    assert read_register(cpu, "rip") == "0x0000000000007c00"
    assert read_register(cpu, "msr.0x10") == "0x0000000000000009"
    with pytest.raises(KeyError):
        read_register(cpu, "eax")


@pytest.mark.parametrize("refuse", ["sregs", "fpu", 0x10])
def test_a_refused_part_undoes_the_whole_change(refuse):
    cpu = Cpu(refuse)
    states, msrs = dict(cpu.states), dict(cpu.msrs)
    with pytest.raises(VmfsError):
        write_registers(cpu, {"rax": 1, "msr.0xc0000082": 6, "cr3": 4096, "xmm0": 1, "msr.0x10": 3, "rip": 5})
    assert (cpu.states, cpu.msrs) == (states, msrs)


def test_an_unknown_msr_changes_nothing():
    cpu = Cpu()
    states = dict(cpu.states)
    with pytest.raises(Invalid):
        write_registers(cpu, {"rax": 1, "msr.0x999": 1})
    assert cpu.states == states


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rax",
        "rax 1 2",
        "eax 1",
        "rax 0x10000000000000000",
        "cs 0x10000",
        "cs.type 16",
        "ss.dpl 4",
        "tr.present 2",
        "ldtr.unusable 0xff",
        "cr8 16",
        "rax 1\nrax 2",
        "rax 1\nnothing",
        "msr.0xC0000082 1",
        "msr.0x010 1",
        "msr.16 1",
        "rax ١",
    ],
)
def test_what_does_not_parse(text):
    with pytest.raises(Invalid) as caught:
        parse_registers(text)
    assert str(caught.value)


def test_forms_of_a_line():
    assert parse_registers("rax 1\n\n# all of it\nrbx = 0x2 # two\nmsr.0x10=-1\n") == {
        "rax": 1,
        "rbx": 2,
        "msr.0x10": 2**64 - 1,
    }


@given(st.integers(0, 2**32 - 1))
def test_msr_names_round_trip(index):
    assert parse_msr(msr_name(index)) == index


@given(st.text(max_size=200))
def test_any_text_parses_or_is_invalid(text):
    try:
        values = parse_registers(text)
    except Invalid as error:
        assert str(error)
    else:
        assert values or "#" in text


@given(st.dictionaries(st.sampled_from(sorted(REGISTERS)), st.integers(0, 2**128 - 1), min_size=1))
def test_written_values_are_read_back(values):
    values = {name: value % (1 << REGISTERS[name].settable) for name, value in values.items()}
    for name in [name for name in values if name.startswith("ymm")]:
        values.pop(name.replace("ymm", "xmm"), None)
    cpu = Cpu()
    text = "".join(f"{name} {REGISTERS[name].text(value)}\n" for name, value in values.items())
    write_registers(cpu, parse_registers(text))
    for name, value in values.items():
        assert int(read_register(cpu, name), 0) == value
