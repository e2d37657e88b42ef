"""Instructions, stacks and cores, from memory that is made up."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.debug.corefile import PHYSICAL_WINDOW, RAM_OFFSET, CpuState, core_header, find_vmcoreinfo
from vmfs.debug.disasm import Listing, disassemble, listing_text, parse_listing
from vmfs.debug.paging import Paging, linear_reader, mapped_ranges, ranges_text
from vmfs.debug.stack import DEPTH, STACKS_MOST, StackState, stack_text
from vmfs.debug.symbols import SymbolTable
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid
from vmfs.words.modes import CodeMode, set_mode
from vmfs.words.registers import REGISTERS

SYMBOLS = SymbolTable([(0x1000, "T", "start"), (0x1100, "t", "helper"), (0x2000, "D", "table")])


class Cpu:
    """States as an engine keeps them, and nothing after them."""

    def __init__(self) -> None:
        self.states = {"regs": bytes(144), "sregs": bytes(312), "fpu": bytes(416), "xcrs": bytes(392)}
        self.states |= {"cpuid": bytes(8), "xsave": bytes(4096)}
        self.msrs = {0xC0000102: 0x1234}

    def get_state(self, name: str) -> bytes:
        return self.states[name]

    def set_state(self, name: str, data: bytes) -> None:
        self.states[name] = data

    def get_msr(self, index: int) -> int:
        return self.msrs[index]

    def set(self, **values: int) -> None:
        for name, value in values.items():
            row = REGISTERS[name.replace("_", ".")]
            blob = bytearray(self.states[row.state])
            row.put(blob, value)
            self.states[row.state] = bytes(blob)


@pytest.fixture
def memory() -> Iterator[Memory]:
    one = Memory(8 << 20)
    yield one
    one.close()


@pytest.fixture
def cpu(memory) -> Cpu:
    one = Cpu()
    set_mode(one, memory, memory.size, "long", reach=1 << 30)
    one.set(rip=0x1000, rsp=0x9000)
    return one


def read_from(code: bytes, at: int = 0x1000):
    def read(address: int, length: int) -> bytes:
        return code[address - at : address - at + length] if address >= at else b""

    return read


def texts(code: str, bits: int, base: int = 0, at: int = 0x1000) -> list[str]:
    data = bytes.fromhex(code)
    return [one.text for one in disassemble(read_from(data, at), at, bits, 99, base=base, symbols=SYMBOLS)]


# ---- disasm


def test_the_same_bytes_in_each_mode():
    assert texts("b8 01000000 48 40", 64)[0] == "mov eax, 1"
    assert texts("b8 0100 48", 16) == ["mov ax, 1", "dec ax"]
    assert texts("48", 32) == ["dec eax"]


def test_addresses_get_their_names():
    assert texts("e8 fb000000", 64) == ["call 0x1100 <helper>"]
    assert texts("488b05 f90f0000", 64) == ["mov rax, qword ptr [rip + 0xff9]  # 0x2000 <table>"]
    assert texts("7403", 64) == ["je 0x1005 <start+0x5>"]
    assert texts("488b042500200000", 64) == ["mov rax, qword ptr [0x2000]"]  # may be any number
    assert texts("ffe0", 64) == ["jmp rax"]


def test_branches_in_real_mode_are_relative_to_their_segment_and_wrap():
    # At f000:fff0 jump back by 8, and at ffff:fff0 forward over the end of the segment.
    assert texts("ebf6", 16, base=0xF0000, at=0xFFFF0) == ["jmp 0xffe8"]
    assert texts("e91000", 16, base=0xF0000, at=0xFFFFD) == ["jmp 0x10"]


@pytest.mark.parametrize(
    ("code", "bits", "base", "at", "target"),
    [
        ("eb1e", 16, 0, 0xFFF0, 0x10),
        ("66eb1d", 16, 0, 0xFFF0, 0x10010),
        ("3e660f8417000000", 16, 0, 0xFFF0, 0x1000F),
        ("ebee", 16, 0x20000, 0x30000, 0xFFF0),  # EIP is 10000 there
        ("66e91a00", 32, 0, 0xFFF0, 0xE),
        ("e91b000000", 32, 0, 0xFFF0, 0x10010),
        ("66eb1d", 64, 0, 0xFFF0, 0x10010),
    ],
)
def test_branches_of_operand_size_16_are_cut_and_others_not(code, bits, base, at, target):
    assert texts(code, bits, base, at)[0].partition(" <")[0].split()[1] == f"{target:#x}"


def test_a_target_is_named_by_its_linear_address():
    # CS begins 1000h below 4 GiB: offset 2000h is address 1000h.
    assert texts("eb02", 16, base=0xFFFFF000, at=0x0FFE)[-1] == "jmp 0x2002 <start+0x2>"


def test_what_is_no_instruction_is_a_byte():
    assert texts("06 90", 64) == [".byte 0x06", "nop"]
    assert texts("0f0b ff", 64) == ["ud2", ".byte 0xff"]  # cut off where memory ends


def test_addresses_and_bytes_are_those_in_memory():
    found = disassemble(read_from(bytes.fromhex("90 b801000000 c3")), 0x1000, 64, 2)
    assert [(one.address, one.code.hex()) for one in found] == [(0x1000, "90"), (0x1001, "b801000000")]


@given(code=st.binary(max_size=200), bits=st.sampled_from([16, 32, 64]), count=st.integers(1, 40))
def test_any_bytes_are_shown_in_their_order(code, bits, count):
    found = disassemble(read_from(code), 0x1000, bits, count)
    assert len(found) <= count
    shown = b"".join(one.code for one in found)
    assert code.startswith(shown)
    assert len(found) == count or shown == code
    address = 0x1000
    for one in found:
        assert one.address == address and one.text
        address += len(one.code)


def test_a_listing():
    assert parse_listing("rip", SYMBOLS) == Listing(None, 16)
    assert parse_listing("helper+4 3\n", SYMBOLS) == Listing(0x1104, 3)
    for bad in ("", "rip 0", "rip 5000", "rip -1", "nobody", "1 2 3", "rip x"):
        with pytest.raises(Invalid):
            parse_listing(bad, SYMBOLS)
    text = listing_text(read_from(b"\x90"), CodeMode(64, 0, 0x1000), Listing(), SYMBOLS)
    assert text.splitlines() == [
        "0x0000000000001000 <start>: 90                       nop",
        "# 0x1001 is not mapped to RAM or ROM",
    ]


# ---- stack


def stack_of(memory, cpu) -> list[str]:
    return stack_text(memory, StackState.of(cpu, memory), SYMBOLS).splitlines()


@pytest.mark.parametrize(
    "call",
    "e800000000 ffd0 41ffd2 ff10 ff5008 ff9000010000 ff142500200000 ff942480000000 ff1500000000".split(),
)
def test_a_word_after_any_call_is_a_guess(memory, cpu, call):
    code = bytes.fromhex(call)
    memory.write(0x1100, bytes(16) + code)
    back = 0x1110 + len(code)
    memory.write(0x9010, struct.pack("<Q", back))
    assert stack_of(memory, cpu) == [
        "#0 0x0000000000001000 start",
        f"?  {back:#018x} helper+{back - 0x1100:#x} at 0x9010",
    ]


@pytest.mark.parametrize("code", ["90 90 90 90 90 90", "ffe0", "ff20", "e9 00000000", "ff6008"])
def test_a_word_after_something_else_is_none(memory, cpu, code):
    memory.write(0x1100, bytes(16) + bytes.fromhex(code))
    memory.write(0x9010, struct.pack("<Q", 0x1110 + len(bytes.fromhex(code))))
    assert stack_of(memory, cpu) == ["#0 0x0000000000001000 start"]


def test_a_chain_of_frames_is_sure_and_ends_where_it_is_broken(memory, cpu):
    memory.write(0x1100, b"\xe8" + bytes(4))
    frames = [0x9020, 0x9060, 0x9100]
    for frame, caller in zip(frames, [*frames[1:], 0x9050], strict=True):  # the last one leads back
        memory.write(frame, struct.pack("<QQ", caller, 0x1105))
    cpu.set(rbp=frames[0])
    lines = stack_of(memory, cpu)
    assert [line.split()[0] for line in lines] == ["#0", "#1", "#2", "#3"]
    assert [line.split()[-1] for line in lines[1:]] == ["0x9028", "0x9068", "0x9108"]


def test_a_frame_that_is_its_own_caller_ends(memory, cpu):
    memory.write(0x1100, b"\xe8" + bytes(4))
    memory.write(0x9000, struct.pack("<QQ", 0x9000, 0x1105))
    cpu.set(rbp=0x9000)
    assert len(stack_of(memory, cpu)) == 2


def test_stacks_of_16_and_32_bits(memory):
    for mode, word in (("real", "<H"), ("protected", "<I")):
        cpu = Cpu()
        set_mode(cpu, memory, memory.size, mode)
        cpu.set(rip=0x1000, rsp=0x5000, rbp=0x5000)
        memory.write(0x1100, b"\xe8" + bytes(4))
        back = 0x1100 + (3 if mode == "real" else 5)
        memory.write(0x5000, struct.pack(word, 0) + struct.pack(word, back))
        lines = stack_of(memory, cpu)
        assert lines[1].startswith(f"#1 {back:#010x} helper+"), (mode, lines)
        memory.write(0x5000, bytes(16))


def test_a_stack_full_of_return_addresses_is_bounded(memory, cpu):
    memory.write(0x1100, b"\xe8" + bytes(4))
    memory.write(0x9000, struct.pack("<Q", 0x1105) * (2 * DEPTH // 8))
    assert 200 < len(stack_of(memory, cpu)) < 1000


def test_stacks_that_lead_to_each_other_end(memory, cpu):
    """The last words of RAM name another place there, which ends there, too."""
    top = memory.size - 0x100
    memory.write(memory.size - 8, struct.pack("<Q", top + 8))
    cpu.set(rsp=top)
    state = StackState.of(cpu, memory)
    assert 1 <= len(state.stacks) <= STACKS_MOST
    assert stack_of(memory, cpu)


_REGISTER = st.integers(0, (1 << 64) - 1)


@given(_REGISTER, st.one_of(_REGISTER, st.integers(0, 0xFFFF)), _REGISTER, st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_registers_give_a_stack(rip, rsp, rbp, seed):
    memory = Memory(1 << 20)
    try:
        cpu = Cpu()
        set_mode(cpu, memory, memory.size, "long", reach=1 << 30)
        memory.write(0, random.Random(seed).randbytes(1 << 16))
        cpu.set(rip=rip, rsp=rsp, rbp=rbp & 0xFFFF)
        assert stack_of(memory, cpu)[0].startswith("#0 ")
    finally:
        memory.close()


# ---- pagetable


def test_runs_of_pages_are_one_range(memory, cpu):
    memory.write(0x10000, struct.pack("<Q", 0x11003))
    memory.write(0x11000, struct.pack("<Q", 0x12003))
    memory.write(0x12000, struct.pack("<Q", 0x13003))
    entries = [0x200000 + 4096 * page | 0x63 for page in range(512)]
    entries[100] &= ~0x40  # not dirty: the same range
    entries[200] &= ~2  # read-only: another
    entries[300] = 0
    memory.write(0x13000, struct.pack("<512Q", *entries))
    cpu.set(cr3=0x10000)
    text = ranges_text(mapped_ranges(memory, Paging.of(cpu)))
    assert text == (
        "0000000000000000-00000000000c8000 rwx- 800K 0x200000 4K A,d\n"
        "00000000000c8000-00000000000c9000 r-x- 4K 0x2c8000 4K A,D\n"
        "00000000000c9000-000000000012c000 rwx- 396K 0x2c9000 4K A,D\n"
        "000000000012d000-0000000000200000 rwx- 844K 0x32d000 4K A,D\n"
    )


def test_tables_beyond_ram_map_nothing(memory):
    for cr3 in (memory.size, memory.size - 8, (1 << 52) - 4096):
        paging = Paging(cr3, "4-level", long=True)
        assert not mapped_ranges(memory, paging) and paging.translate(memory, 0) is None


# ---- core


def headers(blob: bytes) -> list[tuple[int, ...]]:
    count, size = struct.unpack_from("<H", blob, 56)[0], 56
    if count == 0xFFFF:
        (sections,) = struct.unpack_from("<Q", blob, 40)
        (count,) = struct.unpack_from("<I", blob, sections + 44)
    return [struct.unpack_from("<IIQQQQQQ", blob, 64 + size * number) for number in range(count)]


def test_the_program_headers_of_a_core(memory, cpu):
    with memory.view() as ram:
        blob = core_header(ram, [CpuState.of(cpu)])
    note, physical, *mapped = headers(blob)
    assert note[0] == 4 and note[2] + note[5] <= len(blob) <= RAM_OFFSET
    # An alignment of 0: with any other, crash takes it for another format.
    assert physical[2:] == (RAM_OFFSET, PHYSICAL_WINDOW, 0, memory.size, memory.size, 0)
    assert [one[2:7] for one in mapped] == [(RAM_OFFSET, 0, 0, memory.size, memory.size)]


def test_a_core_without_paging_has_linear_addresses_that_are_physical(memory):
    cpu = Cpu()
    with memory.view() as ram:
        _, one = headers(core_header(ram, [CpuState.of(cpu)]))
    assert one[2:7] == (RAM_OFFSET, 0, 0, memory.size, memory.size)


def test_more_headers_than_16_bits_count(memory, cpu):
    """Pages that alternate between two places: each is a range."""
    tables = range(0x10000, 0x10000 + 0x1000 * 131, 0x1000)
    memory.write(tables[0], struct.pack("<Q", tables[1] | 3))
    memory.write(tables[1], struct.pack("<Q", tables[2] | 3))
    memory.write(tables[2], struct.pack("<128Q", *(table | 3 for table in tables[3:])))
    for table in tables[3:]:
        memory.write(table, struct.pack("<512Q", *([0x3003, 0x7003] * 256)))
    cpu.set(cr3=tables[0])
    with memory.view() as ram:
        blob = core_header(ram, [CpuState.of(cpu)])
    assert struct.unpack_from("<H", blob, 56) == (0xFFFF,)
    assert len(headers(blob)) == 2 + 128 * 512


def test_vmcoreinfo_is_taken_as_linux_lays_it_out(memory):
    text = b"OSRELEASE=6.1\nKERNELOFFSET=0\n"
    with memory.view() as ram:
        assert find_vmcoreinfo(ram) == b""
        memory.write(0x3000, b"VMCOREINFO\0\0OSRELEASE=in a file\n")  # without the head of a note
        memory.write(0x5000, struct.pack("<3I", 11, 1 << 30, 0) + b"VMCOREINFO\0\0" + text)  # too long
        memory.write(0, b"VMCOREINFO\0\0" + text)  # nothing before it
        assert find_vmcoreinfo(ram) == b""
        memory.write((1 << 20) - 17, struct.pack("<3I", 11, len(text), 0) + b"VMCOREINFO\0\0" + text)
        assert find_vmcoreinfo(ram) == text


def test_reading_by_page(memory, cpu):
    read = linear_reader(memory, Paging.of(cpu))
    memory.write(0x1FF0, bytes(range(32)))
    assert read(0x1FF0, 32) == bytes(range(32))
    assert read(memory.size - 4, 100) == bytes(4)
    assert read(1 << 40, 1) == b""
