"""The TLB's two places: pages of one index, of which each takes the first from the other, and stays in the second.

Every kind of access in loops, interpreted and as host code: the same state, and hardly a miss. And what is to be
dropped is dropped from both places.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator.test_translator import go_by  # noqa: E402

from vmfs.engine.base import Vcpu  # noqa: E402
from vmfs.engine.emulator.engine import EmulatorEngine, EmulatorMachine  # noqa: E402
from vmfs.memory.ram import Memory  # noqa: E402
from vmfs.words.modes import set_mode  # noqa: E402
from vmfs.words.registers import read_register, write_registers  # noqa: E402

RAM = 1 << 20
CODE, TABLES, STACK, PAGES_AT = 0x1000, 0x10000, 0x30000, 0x40000
APART = 4 << 20  # linear addresses of one index
FIRST = 0x8000
COUNT = 5
# Two of them; the others are of another index.
PAGES = [FIRST + APART * number + (0x4000 if number > 1 else 0) for number in range(COUNT)]
ROUNDS = 2000
WAYS = {
    "interpreted": {"VMFS_NO_JIT": "1"},
    "host code": {"VMFS_JIT_THRESHOLD": "0"},
    "host code in pieces": {"VMFS_JIT_THRESHOLD": "0", "VMFS_JIT_SEED": "5"},
}
OTHER_BLOCK = b"\xeb\x00"  # JMP: accesses of two blocks do not share a check
CR4_PGE, CR4_SMAP = 1 << 7, 1 << 21


def physical(number: int) -> int:
    return PAGES_AT + number * 0x1000


def entry(linear: int) -> int:
    """Where the last table's entry lies: a table for each two MiB."""
    return TABLES + 0x3000 + (linear >> 21) * 0x1000 + (linear >> 12 & 511) * 8


@contextmanager
def machine(
    way: dict[str, str], monkeypatch, cr4: int = 0, flags: int = 0
) -> Iterator[tuple[EmulatorMachine, Vcpu, Memory]]:
    """64-bit mode. The low MiB is where it is, each of PAGES at `physical`, full of its number, and the page after it
    further on."""
    go_by(way, monkeypatch)
    memory = Memory(RAM)
    found = EmulatorEngine().create_machine()
    try:
        found.map_memory(0, 0, memory.fd, 0, RAM)
        cpu = found.create_vcpu(0)
        set_mode(cpu, memory, RAM, "long")
        memory.write(TABLES, struct.pack("<Q", TABLES + 0x1000 | 7))
        memory.write(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x2000 | 7))
        tables = range(TABLES + 0x3000, TABLES + 0x3000 + 2 * COUNT * 0x1000, 0x1000)
        memory.write(TABLES + 0x2000, struct.pack(f"<{len(tables)}Q", *(at | 7 for at in tables)))
        memory.write(TABLES + 0x3000, struct.pack("<256Q", *(page * 4096 | 3 | flags for page in range(256))))
        for number, linear in enumerate([*PAGES, *(page + 0x1000 for page in PAGES)]):
            memory.write(entry(linear), struct.pack("<Q", physical(number) | 3 | flags))
            memory.write(physical(number), bytes([0x10 + number]) * 4096)
        cr4 |= int(read_register(cpu, "cr4"), 0) | 1 << 9
        write_registers(cpu, {"cr3": TABLES, "cr4": cr4, "rip": CODE, "rsp": STACK})
        yield found, cpu, memory
    finally:
        found.close()
        memory.close()


def loop(body: str, rounds: int = ROUNDS) -> bytes:
    """`body` again and again: MOV EBP, rounds; body; DEC EBP; JNZ body; HLT."""
    code = bytes.fromhex(body) + b"\xff\xcd"
    return b"\xbd" + struct.pack("<I", rounds) + code + b"\x0f\x85" + struct.pack("<i", -(len(code) + 6)) + b"\xf4"


def four_at(address: int) -> str:
    return struct.pack("<I", address).hex()


# RBX, RSI, RDI are the first three pages, RCX is 8. Each goes to all three in turn.
ACCESSES = {
    "loads": "0303 0306 0307",  # ADD EAX, [RBX]; ...
    "stores": "8903 8906 8907 ffc0",  # MOV [RBX], EAX; ...; INC EAX
    "both": "4801 03 4811 06 4829 07 480306 48ffc0",  # ADD [RBX], RAX; ADC [RSI], RAX; SUB [RDI], RAX; ...
    "an index": "480304cb 480304ce 480304cf 4889444b40 4889444e40",  # ADD RAX, [RBX+RCX*8]; ...
    "known pages": "".join("030425" + four_at(page) for page in PAGES[:3]),  # ADD EAX, [PAGE]
    "known pages, with flags": "".join("130425" + four_at(page + 8) for page in PAGES[:3]),  # ADC EAX, [PAGE+8]
    "stores to known pages": "".join("890425" + four_at(page) for page in PAGES[:3]) + "ffc0",
    # MOVAPS XMM0, [RBX]; PADDB XMM0, [RSI]; MOVAPS [RDI], XMM0; PADDB XMM0, [RDI+16]; MOVAPS [RSI], XMM0
    "aligned vectors": "0f2803 660ffc06 0f2907 660ffc4710 0f2906",
    "vectors": "0f104303 660fd44630 0f114707",  # MOVUPS XMM0, [RBX+3]; PADDQ XMM0, [RSI+30h]; MOVUPS [RDI+7], XMM0
    # Accesses with one check:
    # MOV RAX, [RBX]; ADD RAX, [RBX+8]; ADD [RSI], RAX; ADC [RSI+16], RAX; MOV [RDI+4], RAX; ADD RAX, [RDI]
    "stretches": "488b03 48034308 480106 48114610 48894704 480307",
    # LEA RSP, [RBX+64]; PUSH RAX; PUSH RCX; LEA RSP, [RSI+64]; PUSH RAX; POP RDX; ADD RAX, RDX;
    # LEA RSP, [RDI+64]; PUSH [RBX]; POP [RSI]
    "stacks": "488d6340 50 51 488d6640 50 5a 4801d0 488d6740 ff33 8f06",
    # LEA RDX, [RIP+11]; LEA RSP, [RBX+64]; PUSH RDX; MOV EAX, [RSI]; RET, to here
    "returns": "488d1508000000 488d6340 52 8b06 c3 0307",
    # LEA RDX, [RIP+12]; MOV [RBX], RDX; MOV EAX, [RSI]; ADD EAX, [RDI]; JMP [RBX], to here
    "jumps": "488d1509000000 488913 8b06 0307 ff23",
    # LOCK XADD [RBX], EAX; XCHG [RSI], EAX; LOCK INC dword [RDI]
    "locked": "f00fc103 8706 f0ff07",
    # MOV [RBX], SIL; SETC [RSI]; CMP byte [RDI], 20h; ADC AL, [RBX]
    "bytes": "408833 0f9206 803f20 1203",
    # ADD EAX, [RBX+FFEh]; ADD [RSI+FFDh], EAX; MOVUPS XMM0, [RDI+FF8h]; MOV EAX, [RBX]; ADD EAX, [RSI]; ADD EAX, [RDI]
    "over the end": "0383fe0f0000 0186fd0f0000 0f1087f80f0000 8b03 0306 0307",
}


def run(way: dict[str, str], body: str, monkeypatch, **options) -> tuple[list, dict]:
    with machine(way, monkeypatch, **options) as (_, cpu, memory):
        memory.write(CODE, loop(body))
        write_registers(cpu, {"rbx": PAGES[0], "rsi": PAGES[1], "rdi": PAGES[2], "rcx": 8, "rax": 0x0123456789ABCDEF})
        assert cpu.run().REASON == "hlt"
        return [cpu.get_state("regs"), cpu.get_state("xsave"), memory.read(PAGES_AT, COUNT << 13)], cpu.counters()


@pytest.mark.parametrize("more", [{}, {"cr4": CR4_SMAP}, {"cr4": CR4_PGE, "flags": 0x100}], ids=["", "SMAP", "global"])
@pytest.mark.parametrize("body", ACCESSES)
def test_pages_of_one_index_stay(body, more, monkeypatch):
    states = []
    for way in WAYS.values():
        state, counters = run(way, ACCESSES[body], monkeypatch, **more)
        states.append(state)
        assert counters["tlb_misses"] < 30, counters["tlb_misses"]
        assert bool(counters["instructions_translated"]) == ("VMFS_NO_JIT" not in way)
    assert states[0] == states[1] == states[2]


# ADD EAX, [RBX]; ADD EAX, [RSI]; ADD EAX, [RDI]
LOADS = "0303 0306 0307"


@pytest.mark.parametrize("flags", [0, 0x100], ids=["local", "global"])
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("way", WAYS)
def test_a_page_is_dropped_from_both_places(way, number, flags, monkeypatch):
    """The guest maps one of the pages elsewhere and says so by INVLPG."""
    new, at = physical(COUNT - 1) | 3 | flags, entry(PAGES[number])
    # MOV dword [entry], new; INVLPG [page]
    change = "c70425" + four_at(at) + four_at(new) + "0f013c25" + four_at(PAGES[number])
    with machine(WAYS[way], monkeypatch, cr4=CR4_PGE) as (_, cpu, memory):
        code = loop(LOADS, 100)[:-1] + bytes.fromhex(change) + loop(LOADS, 100)
        memory.write(CODE, code)
        write_registers(cpu, {"rbx": PAGES[0], "rsi": PAGES[1], "rdi": PAGES[2], "rax": 0})
        assert cpu.run().REASON == "hlt"
        values = [(0x10 + each) * 0x01010101 for each in range(COUNT)]
        expected = 100 * sum(values[:3])
        values[number] = values[-1]
        expected += 100 * sum(values[:3])
        assert int(read_register(cpu, "rax"), 0) == expected & 0xFFFFFFFF


GLOBAL = 0x100


@pytest.mark.parametrize("flags", [(0, 0, 0), (GLOBAL,) * 3, (GLOBAL, 0, 0), (0, GLOBAL, 0)])
@pytest.mark.parametrize("way", WAYS)
def test_an_address_space_takes_its_pages_along(way, flags, monkeypatch):
    """MOV to CR3: pages that are not global are looked for again, in whichever place they were; the others stay."""
    pages = list(zip(PAGES, flags, strict=False))
    changes = "".join("c70425" + four_at(entry(page)) + four_at(physical(COUNT - 1) | 3 | flag) for page, flag in pages)
    with machine(WAYS[way], monkeypatch, cr4=CR4_PGE) as (_, cpu, memory):
        for number, (page, flag) in enumerate(pages):
            memory.write(entry(page), struct.pack("<Q", physical(number) | 3 | flag))
        code = loop(LOADS, 100)[:-1] + bytes.fromhex(changes + "0f20da 0f22da") + loop(LOADS, 100)  # RDX
        memory.write(CODE, code)
        write_registers(cpu, {"rbx": PAGES[0], "rsi": PAGES[1], "rdi": PAGES[2], "rax": 0})
        assert cpu.run().REASON == "hlt"
        values = [(0x10 + each) * 0x01010101 for each in range(COUNT)]
        after = sum(values[number if flag else -1] for number, flag in enumerate(flags))
        assert int(read_register(cpu, "rax"), 0) == 100 * (sum(values[:3]) + after) & 0xFFFFFFFF


@pytest.mark.parametrize("rounds", [1, 40, 100])
@pytest.mark.parametrize("way", WAYS)
def test_the_page_that_was_filled_last_stays(way, rounds, monkeypatch):
    """A third page comes to two of one index. Whichever places they have by then, the second of them stays: it is read
    as it was, though the guest has changed its entry since (without INVLPG), and the first as it is."""
    third = PAGES[3] - 0x4000
    new = four_at(physical(4) | 3)
    changes = "".join("c70425" + four_at(entry(page)) + new for page in PAGES[:2])
    with machine(WAYS[way], monkeypatch) as (_, cpu, memory):
        memory.write(entry(third), struct.pack("<Q", physical(3) | 3))
        end = "8b17 448b06 8b0b"  # MOV EDX, [RDI]; MOV R8D, [RSI]; MOV ECX, [RBX]
        code = loop("0303 0306", rounds)[:-1] + bytes.fromhex(changes) + OTHER_BLOCK + bytes.fromhex(end + "f4")
        memory.write(CODE, code)
        write_registers(cpu, {"rbx": PAGES[0], "rsi": PAGES[1], "rdi": third, "rax": 0})
        assert cpu.run().REASON == "hlt"
        found = [int(read_register(cpu, name), 0) & 0xFF for name in ("rdx", "r8", "rcx")]
        assert found == [0x13, 0x11, 0x14]


@pytest.mark.parametrize("way", WAYS)
def test_many_address_spaces(way, monkeypatch):
    """More entries than are noted one by one are dropped all the same."""
    change = "".join("83 3425" + four_at(entry(page)) + "00" for page in PAGES)  # XOR dword [entry], 0: five more pages
    body = LOADS + change + "0f20da 0f22da"
    with machine(WAYS[way], monkeypatch, cr4=CR4_PGE) as (_, cpu, memory):
        memory.write(CODE, loop(body, 600))
        write_registers(cpu, {"rbx": PAGES[0], "rsi": PAGES[1], "rdi": PAGES[2], "rax": 0})
        assert cpu.run().REASON == "hlt"
        assert cpu.counters()["tlb_misses"] > 600 * 3, "nothing stays"
        memory.write(entry(PAGES[1]), struct.pack("<Q", physical(3) | 3))
        write_registers(cpu, {"rip": CODE, "rax": 0})
        assert cpu.run().REASON == "hlt"
        assert int(read_register(cpu, "rax"), 0) == 600 * 0x01010101 * (0x10 + 0x13 + 0x12) & 0xFFFFFFFF


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("way", WAYS)
def test_the_log_has_what_is_stored_by_either_place(way, number, monkeypatch):
    """Also where an entry was there when the log was read: an exit leaves the TLB as it is."""
    with machine(WAYS[way], monkeypatch) as (found, cpu, memory):
        stores = loop(ACCESSES["stores"], 40)  # no more: one store in 64 looks goes another way
        memory.write(CODE, stores[:-1] + bytes.fromhex("e680") + stores)  # OUT 80h, AL
        write_registers(cpu, {"rip": CODE, "rbx": PAGES[0], "rsi": PAGES[1], "rdi": PAGES[2], "rax": 0})
        for reason in ("io", "hlt"):
            assert cpu.run().REASON == reason
            log = int.from_bytes(found.dirty_log(0), "little")
            assert log >> (physical(number) >> 12) & 1, "and it is there again after it was read"


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("way", WAYS)
def test_code_comes_to_a_page_that_is_written(way, number, monkeypatch):
    """Stores to three pages in turn; then code runs in one of them, and a store changes it: it is seen."""
    at = PAGES[number] + 0x800
    stores = loop(ACCESSES["stores"], 100)[:-1]
    # XOR EAX, EAX; CALL R9; MOV byte [R9+1], 7; CALL R9; HLT. There: MOV AL, 5; ADD R8, RAX; RET
    with machine(WAYS[way], monkeypatch) as (_, cpu, memory):
        code = stores + bytes.fromhex("31c0 41ffd1 41c6410107 41ffd1 f4")
        memory.write(CODE, code)
        memory.write(physical(number) + 0x800, bytes.fromhex("b005 4901c0 c3"))
        values = {"rbx": PAGES[0], "rsi": PAGES[1], "rdi": PAGES[2], "rax": 0, "r8": 0, "r9": at}
        write_registers(cpu, values)
        assert cpu.run().REASON == "hlt"
        assert int(read_register(cpu, "r8"), 0) == 12


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("way", WAYS)
def test_a_page_becomes_read_only(way, number, monkeypatch):
    """The entry for writes goes with INVLPG: the store faults, at the instruction that makes it."""
    # AND dword [entry], ~2; INVLPG
    change = "832425" + four_at(entry(PAGES[number])) + "fd" + "0f013c25" + four_at(PAGES[number])
    write_protect = "0f20c0 0fbae810 0f22c0"  # MOV RAX, CR0; BTS EAX, 16; MOV CR0, RAX
    with machine(WAYS[way], monkeypatch) as (_, cpu, memory):
        code = bytes.fromhex(write_protect) + loop(ACCESSES["stores"], 100)[:-1] + bytes.fromhex(change)
        code += OTHER_BLOCK + loop(LOADS, 100)[:-1] + OTHER_BLOCK + loop(ACCESSES["stores"], 100)
        memory.write(CODE, code)
        write_registers(cpu, {"rbx": PAGES[0], "rsi": PAGES[1], "rdi": PAGES[2], "rax": 0, "idtr.limit": 0})
        assert cpu.run().REASON == "shutdown", "a page fault without a handler"
        assert int(read_register(cpu, "cr2"), 0) == PAGES[number]
        assert int(read_register(cpu, "rbp"), 0) == 100, "in the first round"


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("way", WAYS)
def test_what_has_to_be_aligned_faults_in_either_place(way, number, monkeypatch):
    """MOVAPS loads of three pages in turn; after 100 rounds one of them lies 8 bytes further, and in its page."""
    loads = "0f2803 0f2806 0f283f"
    with machine(WAYS[way], monkeypatch) as (_, cpu, memory):
        further = "4883" + ("c3", "c6", "c7")[number] + "08"  # ADD RBX, RSI or RDI, 8
        memory.write(CODE, loop(loads, 100)[:-1] + bytes.fromhex(further) + OTHER_BLOCK + loop(loads, 100))
        write_registers(cpu, {"rbx": PAGES[0], "rsi": PAGES[1], "rdi": PAGES[2], "idtr.limit": 0})
        assert cpu.run().REASON == "shutdown", "#GP without a handler"
        assert int(read_register(cpu, "rbp"), 0) == 100


def test_a_known_page_is_not_another_of_its_index(monkeypatch):
    """Of the addresses of two pages, bit 44 alone differs."""
    far = 1 << 44
    body = LOADS + "030425" + four_at(PAGES[0])  # ADD EAX, [PAGE]
    found = []
    for way in WAYS.values():
        with machine(way, monkeypatch) as (_, cpu, memory):
            table = 0x20000
            ways_there = {TABLES + 32 * 8: table, table: table + 0x1000, table + 0x1000: table + 0x2000}
            for at, to in {**ways_there, table + 0x2000 + (FIRST >> 12) * 8: physical(3)}.items():
                memory.write(at, struct.pack("<Q", to | 7))
            memory.write(CODE, loop(body))
            write_registers(cpu, {"rbx": PAGES[0], "rsi": far + FIRST, "rdi": PAGES[2], "rax": 0})
            assert cpu.run().REASON == "hlt"
            assert cpu.counters()["tlb_misses"] < 30
            found.append(int(read_register(cpu, "rax"), 0))
    assert found == [ROUNDS * (2 * 0x10 + 0x13 + 0x12) * 0x01010101 & 0xFFFFFFFF] * len(WAYS)
