"""The page tables as debug/paging.py reads them are what the CPU makes of them."""

from __future__ import annotations

import contextlib
import random
from itertools import pairwise

import pytest
from engine.machine import RAM, Ram, machine_on

from vmfs.debug.paging import NO_EXECUTE, USER, WRITABLE, Paging, mapped_ranges
from vmfs.memory.ram import PAGE
from vmfs.words.errors import Invalid, Unsupported
from vmfs.words.modes import CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, MODES, set_mode
from vmfs.words.registers import REGISTERS

PSE, LA57, NXE = 1 << 4, 1 << 12, 1 << 11
FORMATS = {
    "32-bit": (0, 0, (10, 10), 4),
    "32-bit PSE": (PSE, 0, (10, 10), 4),
    "PAE": (CR4_PAE, 0, (2, 9, 9), 8),
    "PAE NXE": (CR4_PAE, NXE, (2, 9, 9), 8),
    "4-level": (CR4_PAE, EFER_LME | EFER_LMA, (9, 9, 9, 9), 8),
    "4-level NXE": (CR4_PAE, EFER_LME | EFER_LMA | NXE, (9, 9, 9, 9), 8),
    "5-level": (CR4_PAE | LA57, EFER_LME | EFER_LMA | NXE, (9, 9, 9, 9, 9), 8),
}
REFUSALS = {  # by divergence: what a format's state is refused with
    "pvm-pages-in-long-mode-only": (("32-bit", "PAE"), Unsupported, "cr0: the host's KVM drops PG"),
    "kvm-no-5-level-paging": (("5-level",), Invalid, "KVM_SET_SREGS"),
}
TABLES = range(0x10000, 0x20000, PAGE)
USED = 6  # entries of a table that are not zero


def kind_of(name: str) -> str:
    return name.split()[0]


def enable(vm, name: str) -> None:
    """Switch paging on, with the first of TABLES."""
    cr4, efer, _, _ = FORMATS[name]
    set_mode(vm.vcpu, vm.ram, RAM, "long" if efer & EFER_LMA else "protected")
    sregs = bytearray(vm.vcpu.get_state("sregs"))
    for register, value in (("cr4", cr4), ("efer", efer), ("cr3", TABLES[0])):
        REGISTERS[register].put(sregs, value)
    REGISTERS["cr0"].put(sregs, REGISTERS["cr0"].get(bytes(sregs)) | CR0_PG)
    vm.vcpu.set_state("sregs", bytes(sregs))


def random_entry(rng: random.Random, width: int, is_pdpte: bool) -> int:
    """Of a table, to a table or to RAM, for RAM is where engines agree what they read."""
    target = rng.choice(TABLES) if rng.random() < 0.85 else rng.randrange(0, RAM, PAGE)
    entry = target | rng.choice((1, 3, 5, 7, 7, 0x67))
    if rng.random() < 0.1:
        entry &= ~1
    if is_pdpte:  # what is reserved there makes MOV CR3 fault
        return entry & ~0x1E6
    if rng.random() < 0.3:
        entry |= 1 << 7  # a large page, PAT, or reserved
    if rng.random() < 0.2:
        entry |= 1 << rng.randrange(8, 12)
    if width == 8 and rng.random() < 0.1:
        entry |= 1 << rng.randrange(48, 64)
    return entry


def fill(ram: Ram, rng: random.Random, bits: tuple[int, ...], width: int) -> list[int]:
    """Tables that lead to each other, and addresses that their entries are for."""
    used: dict[int, list[int]] = {}
    for table in TABLES:
        page = bytearray(PAGE)
        used[table] = indices = [rng.randrange(PAGE // width) for _ in range(USED)] + [0, 1, 2, 3]
        for index in indices:
            entry = random_entry(rng, width, len(bits) == 3 and table == TABLES[0])
            page[index * width : (index + 1) * width] = entry.to_bytes(width, "little")
        ram.write(table, bytes(page))
    addresses = []
    for _ in range(300):
        table, address = TABLES[0], 0
        for level_bits in bits:
            index = rng.choice(used[table]) & ((1 << level_bits) - 1)
            address = address << level_bits | index
            entry = int.from_bytes(ram.read(table + index * width, width), "little")
            table = entry & 0xFFFFF000 if entry & 0xFFFFF000 in used else rng.choice(TABLES)
        address = address << 12 | rng.randrange(PAGE)
        if len(bits) > 3 and address >> (sum(bits) + 11):
            address |= -(1 << (sum(bits) + 12)) & ((1 << 64) - 1)
        addresses.append(address)
    return addresses


@pytest.mark.parametrize("name", FORMATS)
def test_an_address_is_mapped_where_the_engine_says(engine, divergences, name):
    _, _, bits, width = FORMATS[name]
    for divergence, (kinds, refusal, words) in REFUSALS.items():
        if divergence in divergences and kind_of(name) in kinds:
            with machine_on(engine) as vm:
                set_mode(vm.vcpu, vm.ram, RAM, "long" if len(bits) > 3 else "protected")
                before = vm.vcpu.get_state("sregs")
                with pytest.raises(refusal, match=words):
                    enable(vm, name)
                assert vm.vcpu.get_state("sregs") == before
            return
    mapped = 0
    for seed in range(8):
        with machine_on(engine) as vm:
            addresses = fill(vm.ram, random.Random(f"{name} {seed}"), bits, width)
            enable(vm, name)
            paging = Paging.of(vm.vcpu)
            assert paging.kind == kind_of(name)
            for address in addresses:
                page = paging.translate(vm.ram, address)
                ours = None if page is None else page.physical
                assert ours == vm.vcpu.translate(address), f"seed {seed}: {address:#x}"
                mapped += ours is not None
    assert mapped > 20  # else this compares nothing


@pytest.mark.parametrize("mode", MODES)
def test_an_address_that_the_cpu_does_not_have_is_not_mapped(engine, mode):
    """Conditions look at memory by it: what is not canonical is not what its lower bits are."""
    with machine_on(engine) as vm:
        set_mode(vm.vcpu, vm.ram, RAM, mode)
        paging = Paging.of(vm.vcpu)
        assert vm.vcpu.translate(0x1000) == 0x1000
        for beyond in (1 << 47, 1 << 48, 1 << 63, 0xFFFF_0000_0000_0000, *((1 << 32,) if mode != "long" else ())):
            assert vm.vcpu.translate(beyond | 0x1000) is None
            assert paging.translate(vm.ram, beyond | 0x1000) is None


@pytest.fixture
def ram():
    with contextlib.closing(Ram()) as one:
        yield one


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_listed_is_what_single_addresses_give(ram, name):
    cr4, efer, bits, width = FORMATS[name]
    addresses = fill(ram, random.Random(name), bits, width)
    paging = Paging(TABLES[0], kind_of(name), bool(efer & NXE), bool(cr4), long=bool(efer & EFER_LMA))
    ranges = mapped_ranges(ram, paging)
    assert ranges and not ranges.cut
    for one, other in pairwise(ranges):
        assert one.end <= other.start
    for address in addresses:
        page = paging.translate(ram, address)
        found = [one for one in ranges if one.start <= address < one.end]
        assert len(found) == (page is not None), hex(address)
        for one in found:
            assert page and one.physical + address - one.start == page.physical
            assert one.page == page.size
            assert (one.flags ^ page.flags) & (NO_EXECUTE | WRITABLE | USER) == 0
