"""fw_cfg, as firmware reads it: by port and by DMA."""

from __future__ import annotations

import struct

import pytest
from devices.fakes import FakeMachine, Guest, load, plain, refuses, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.devices import fw_cfg
from vmfs.devices.machine import Pc
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid

FILES = {"etc/e820": bytes(range(20)), "bootorder": b"/rom\0", "genroms/x.rom": b"\x55\xaa" * 3000}


@pytest.fixture
def cfg(pc):
    pc.devices["fw-cfg"].set_files(FILES)
    return pc.devices["fw-cfg"]


def read(guest, key, length):
    guest.out(0x510, key, 2)
    return bytes(guest.inp(0x511) for _ in range(length))


def directory(guest):
    (count,) = struct.unpack(">I", read(guest, 0x19, 4))
    data = read(guest, 0x19, 4 + 64 * count)[4:]
    return {name.rstrip(b"\0").decode(): (key, size) for size, key, _, name in struct.iter_unpack(">IHH56s", data)}


def dma(guest, memory, control, length, target, at=0x8000):
    """The control word afterwards."""
    memory.write(at, struct.pack(">IIQ", control, length, target))
    guest.out(0x514, int.from_bytes((at >> 32).to_bytes(4, "big"), "little"), 4)
    guest.out(0x518, int.from_bytes((at & 0xFFFF_FFFF).to_bytes(4, "big"), "little"), 4)
    return struct.unpack(">I", memory.read(at, 4))[0]


def test_numbers(cfg, guest, memory):
    assert read(guest, 0, 4) == b"QEMU" and read(guest, 1, 4) == b"\x03\0\0\0"
    assert struct.unpack("<Q", read(guest, 3, 8)) == (memory.size,)
    assert read(guest, 5, 2) == read(guest, 0xF, 2) == b"\1\0" and read(guest, 0x8002, 1) == b"\1"
    assert read(guest, 0x7777, 3) == bytes(3)
    assert guest.inp(0x514, 4).to_bytes(4, "little") + guest.inp(0x518, 4).to_bytes(4, "little") == b"QEMU CFG"


def test_files_are_in_the_directory(cfg, guest):
    found = directory(guest)
    assert list(found) == sorted(FILES)
    for name, data in FILES.items():
        key, size = found[name]
        assert size == len(data) and read(guest, key, size + 2) == data + b"\0\0"


def test_the_size_of_ram_is_the_one_it_has(cfg, pc, guest, memory):
    memory.resize(32 << 20)
    pc.memory_resized()
    pc.set_firmware_files({})
    assert struct.unpack("<Q", read(guest, 3, 8)) == (32 << 20,)


def test_a_name_that_is_too_long_is_refused(cfg, guest):
    with pytest.raises(Invalid, match="longer"):
        cfg.set_files({"x" * 56: b""})
    assert list(directory(guest)) == sorted(FILES)
    cfg.set_files({"x" * 55: b""})
    assert list(directory(guest)) == ["x" * 55]


def test_the_vga_bios_is_among_the_files(pc, guest, monkeypatch, tmp_path):
    rom = tmp_path / "rom"
    rom.write_bytes(b"\x55\xaa\x01")
    monkeypatch.setattr("vmfs.devices.screen.VGA_BIOSES", (rom,))
    pc.set_firmware_files({"a": b"b"})
    key, size = directory(guest)["pci1234,1111.rom"]
    assert read(guest, key, size) == b"\x55\xaa\x01" and "a" in directory(guest)
    monkeypatch.setattr("vmfs.devices.screen.VGA_BIOSES", ())  # a host that has none
    pc.set_firmware_files({})
    assert directory(guest) == {}


def test_dma_selects_skips_and_reads(cfg, guest, memory, pc):
    key, size = directory(guest)["genroms/x.rom"]
    assert dma(guest, memory, key << 16 | 8 | 2, size + 4, 0x10_0000) == 0
    assert memory.read(0x10_0000, size + 4) == FILES["genroms/x.rom"] + bytes(4)
    key, _ = directory(guest)["etc/e820"]
    assert dma(guest, memory, key << 16 | 8, 0, 0) == 0
    assert dma(guest, memory, 4, 5, 0) == 0
    assert dma(guest, memory, 0, 3, 0) == 0  # asks for nothing
    assert dma(guest, memory, 2, 3, 0x9000) == 0 and memory.read(0x9000, 3) == bytes((5, 6, 7))
    assert guest.inp(0x511) == 8  # both ways go on in the same place
    assert pc.take_dirty() & 1 << 0x100


@pytest.mark.parametrize(
    ("control", "length", "target"),
    [
        (2, 16, 0xFFFF_FFFF_FFFF_FFF8),
        (2, 1, 16 << 20),
        (2, 0xFFFF_FFFF, 0),
        (2, fw_cfg.DMA_MOST + 1, 0),
        (16, 4, 0x9000),
    ],
)
def test_what_cannot_be_is_an_error_and_changes_no_ram(cfg, guest, memory, control, length, target):
    before = memory.read(0, 0x8000) + memory.read(0x8010, 0x8000)
    assert dma(guest, memory, 8 | control, length, target) == 1
    assert memory.read(0, 0x8000) + memory.read(0x8010, 0x8000) == before


@pytest.mark.parametrize("at", [16 << 20, (16 << 20) - 8, 0xFFFF_FFFF_FFFF_FFF0])
def test_a_descriptor_outside_of_ram_is_ignored(cfg, guest, at):
    guest.out(0x514, int.from_bytes((at >> 32).to_bytes(4, "big"), "little"), 4)
    guest.out(0x518, int.from_bytes((at & 0xFFFF_FFFF).to_bytes(4, "big"), "little"), 4)
    assert cfg.counters["bad_dma"] == 1
    assert read(guest, 0, 4) == b"QEMU"


def test_state_goes_to_another_machine(cfg, pc, guest, memory):
    key, _ = directory(guest)["etc/e820"]
    read(guest, key, 3)
    state = saved(pc)
    other = Pc(FakeMachine(), memory)
    try:
        load(other, state)
        assert saved(other) == state
        there = Guest(other)
        assert there.inp(0x511) == 3 and list(directory(there)) == sorted(FILES)
    finally:
        other.close()
    assert refuses(cfg, {**plain(cfg), "key": 1 << 16}) and refuses(cfg, {**plain(cfg), "files": {"é" * 30: b""}})


_ACCESS = st.tuples(
    st.integers(0, 11), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFF_FFFF), st.booleans(), st.binary(max_size=16)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(_ACCESS))
def test_hostile_accesses(accesses):
    memory = Memory(1 << 20)
    pc = Pc(FakeMachine(), memory)
    try:
        pc.devices["fw-cfg"].set_files(FILES)
        guest = Guest(pc)
        for offset, size, value, out, descriptor in accesses:
            memory.write(value % 4096, descriptor)
            if out:
                guest.out(0x510 + offset, value & (1 << 8 * size) - 1, size)
                guest.out(0x518, int.from_bytes((value % 4096).to_bytes(4, "big"), "little"), 4)
            else:
                guest.inp(0x510 + offset, size)
        assert read(guest, 0, 4) == b"QEMU"
    finally:
        pc.close()
        memory.close()
