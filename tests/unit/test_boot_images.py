"""Images to memory and registers: each format's structures, byte by byte, and what is refused."""

import struct

import pytest
from booting import (
    MIB,
    bzimage,
    e820_of,
    elf,
    loaded,
    multiboot2_header,
    multiboot_header,
    pvh_note,
    source,
    text_at,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs import boot
from vmfs.boot import linux
from vmfs.boot.plan import Plan
from vmfs.boot.platform import Platform
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid
from vmfs.words.registers import REGISTERS

CODE = bytes(range(256)) * 8
SECTOR = b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"
BIOS = b"\xf4" * (65536 - 16) + b"\xea\x5b\xe0\x00\xf0".ljust(16, b"\0")
MULTIBOOT = elf([(MIB, multiboot_header(3) + CODE, 8192)], entry=MIB + 12, bits=32, machine=3)
IMAGES = {
    "bzImage": bzimage(CODE),
    "bzImage-16": bzimage(CODE, version=0x207, xloadflags=0),
    "multiboot1": MULTIBOOT,
    "multiboot2": elf([(MIB, multiboot2_header() + CODE, 8192)], entry=MIB + 24),
    "elf-pvh": elf([(MIB, CODE, 4096)], entry=MIB, notes=pvh_note(MIB + 16)),
    "elf": elf([(MIB, CODE, 4096)], entry=MIB),
    "bios": BIOS,
    "boot-sector": SECTOR,
}


def walk(memory, cr3, linear):
    """A 4-level walk to a 2 MiB page (Intel SDM 3A 4.5.4)."""
    table = cr3
    for shift in (39, 30, 21):
        (entry,) = struct.unpack("<Q", memory.read(table + 8 * (linear >> shift & 511), 8))
        assert entry & 3 == 3
        table = entry & 0x000F_FFFF_FFFF_F000
    assert entry & 0x80
    return table + (linear & 0x1F_FFFF)


# ---- formats


def test_images_of_this_file_are_all_formats():
    assert IMAGES.keys() == {row.name for row in boot.IMAGES}


@pytest.mark.parametrize("name", IMAGES)
def test_probe(name):
    with source(IMAGES[name]) as image:
        assert boot.probe(image) == name


@pytest.mark.parametrize("data", [b"", b"\0", b"hello\n", bytes(4096), b"\x7fELF", b"#!/bin/sh\n" * 999])
def test_what_is_no_image(data):
    with source(data) as image, pytest.raises(Invalid, match="^kernel: "):
        boot.probe(image)


@pytest.mark.parametrize("name", IMAGES)
def test_registers_are_ones_that_there_are(name):
    with loaded(IMAGES[name]) as (start, _):
        assert start.format == name
        for register, value in start.registers.items():
            assert 0 <= value < 1 << REGISTERS[register].bits
        assert bool(start.registers) == (name not in ("bzImage-16", "bios"))


@pytest.mark.parametrize("name", IMAGES)
def test_written_is_all_that_changed(name):
    with loaded(IMAGES[name], size=8 * MIB) as (start, memory):
        ram = bytearray(memory.read(0, memory.size))
        for address, size in start.written:
            ram[address : address + size] = bytes(size)
        assert not any(ram)


# ---- bzImage


def test_bzimage_64():
    initrd = b"an initrd" * 1000
    with loaded(bzimage(CODE), initrd=initrd, cmdline=b"console=ttyS0") as (start, memory):
        regs = start.registers
        assert regs["rip"] == MIB + 0x200
        assert memory.read(MIB, len(CODE)) == CODE
        page = memory.read(regs["rsi"], 4096)
        assert page[0x1F1:0x1F2] == b"\4" and page[0x202:0x206] == b"HdrS"
        assert page[0x210] == 0xFF
        command, address, size = (struct.unpack_from("<I", page, at)[0] for at in (0x228, 0x218, 0x21C))
        assert text_at(memory, command) == b"console=ttyS0"
        assert (size, address % 4096) == (len(initrd), 0)
        assert memory.read(address, size) == initrd
        assert address + 4096 > memory.size - size  # at the top
        (rsdp,) = struct.unpack_from("<Q", page, 0x70)
        assert memory.read(rsdp, 8) == b"RSD PTR "
        assert e820_of(memory, regs["rsi"]) == [
            (0, 0x9FC00, 1),
            (0x9FC00, 0x400, 2),
            (0xF0000, 0x10000, 2),
            (MIB, 63 * MIB, 1),
        ]
        assert page[6:8] == bytes((3, 80)) and page[0x0E:0x10] == bytes((25, 1))
        for linear in (0, 0x1234, MIB, memory.size - 1, 0xFEE0_0000, (4 << 30) - 1):
            assert walk(memory, regs["cr3"], linear) == linear
        assert regs["cr0"] & 0x8000_0001 == 0x8000_0001
        assert regs["cr4"] & 0x20 and regs["efer"] == 0x500
        assert (regs["cs"], regs["cs.l"], regs["cs.db"]) == (0x10, 1, 0)
        assert (regs["ds"], regs["rflags"]) == (0x18, 2)


def test_a_machine_without_devices_is_told_of_none():
    bare = {"serial": (), "parallel": (), "ps2": False, "rtc": False, "vga": False, "acpi": False}
    with loaded(bzimage(CODE), platform=bare) as (start, memory):
        page = memory.read(start.registers["rsi"], 4096)
        assert not any(page[4:0x1C0]) and page[0x1E8] == 4
        assert not any(memory.read(0xE0000, 0x1FC00))
        assert not any(memory.read(0x400, 8)) and memory.read(0x410, 2) == b"\2\0"
        assert not any(memory.read(0x449, 0x100 - 0x49))
    with loaded(IMAGES["bios"], platform=bare) as (start, _):
        assert start.firmware_files.keys() == {"etc/e820"}


def test_gdt_says_what_the_segments_say():
    for image in (IMAGES["bzImage"], IMAGES["multiboot1"]):
        with loaded(image) as (start, memory):
            regs = start.registers
            table = memory.read(regs["gdtr.base"], regs["gdtr.limit"] + 1)
            for name in ("cs", "ds", "ss"):
                low, base, middle, access, flags, high = struct.unpack_from("<HHBBBB", table, regs[name])
                assert base | middle << 16 | high << 24 == regs[f"{name}.base"] == 0
                limit = low | (flags & 15) << 16
                assert limit << 12 | 0xFFF == regs[f"{name}.limit"] == 0xFFFF_FFFF
                assert access & 15 == regs[f"{name}.type"]
                assert (flags >> 5 & 1, flags >> 6 & 1) == (regs[f"{name}.l"], regs[f"{name}.db"])


def test_bzimage_32():
    with loaded(bzimage(CODE, xloadflags=0)) as (start, memory):
        regs = start.registers
        assert regs["rip"] == MIB and regs["efer"] == 0 and regs["cr0"] & 0x8000_0001 == 1
        assert (regs["cs.db"], regs["cs.l"], regs["rbp"], regs["rdi"], regs["rbx"]) == (1, 0, 0, 0, 0)
        assert memory.read(regs["rsi"] + 0x202, 4) == b"HdrS"


def test_bzimage_goes_where_it_prefers_aligned():
    image = bzimage(CODE, address=5 * MIB, align=(0x230, "<I", 2 * MIB))
    with loaded(image) as (start, memory):
        assert start.registers["rip"] == 6 * MIB + 0x200
        assert memory.read(6 * MIB, 16) == CODE[:16]


def test_bzimage_that_cannot_be_moved_is_not_aligned():
    image = bzimage(CODE, address=5 * MIB, align=(0x230, "<I", 2 * MIB), relocatable=(0x234, "<B", 0))
    with loaded(image) as (start, _):
        assert start.registers["rip"] == 5 * MIB + 0x200


def test_loadflags_and_fields_of_the_kernel_are_kept():
    image = bzimage(CODE, flags=(0x211, "<B", 0x23), root=(0x1FC, "<H", 0x1234), setup_data=(0x250, "<Q", 77))
    with loaded(image) as (start, memory):
        page = memory.read(start.registers["rsi"], 4096)
        assert page[0x211] == 0x21  # KASLR_FLAG is the decompressor's to set
        assert struct.unpack_from("<H", page, 0x1FC) == (0x1234,)
        assert struct.unpack_from("<Q", page, 0x250) == (0,)


def test_initrd_below_what_the_kernel_allows():
    image = bzimage(CODE, top=(0x22C, "<I", 20 * MIB - 1))
    with loaded(image, initrd=bytes(3 * MIB)) as (start, memory):
        page = memory.read(start.registers["rsi"], 4096)
        assert struct.unpack_from("<I", page, 0x218) == (17 * MIB,)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (bzimage(CODE)[:-16], {}, "truncated"),
        (bzimage(CODE)[:0x280], {}, "truncated"),
        (bzimage(CODE, flags=(0x211, "<B", 0)), {}, "zImage"),
        (bzimage(CODE, version=0x1FF), {}, "boot protocol 0x1ff"),
        (bzimage(CODE, jump=(0x201, "<B", 0xFF)), {}, "setup header that ends at 0x301"),
        (bzimage(CODE, align=(0x230, "<I", 3)), {}, "alignment 0x3"),
        (bzimage(CODE, size=(0x1F4, "<I", 0)), {"cmdline": b"x" * 256}, "takes 255"),
        (bzimage(CODE, init_size=63 * MIB + 1), {}, "RAM ends at 0x4000000"),
        (bzimage(CODE, address=1 << 40), {}, "RAM ends at"),
        (bzimage(CODE, address=0x9_0000), {}, "not all RAM"),
        (bzimage(CODE), {"cmdline": b"x" * 256}, "cmdline: 256 bytes, and the kernel takes 255"),
        (bzimage(CODE), {"cmdline": b"a\0b"}, "NUL"),
        (bzimage(CODE), {"initrd": bytes(60 * MIB)}, "initrd .* finds no room"),
        (bzimage(CODE, top=(0x22C, "<I", 2 * MIB)), {"initrd": bytes(2 * MIB)}, "finds no room"),
        (bzimage(CODE), {"size": MIB}, "more than 1 MiB"),
    ],
)
def test_what_is_refused_changes_nothing(image, options, message):
    size = options.pop("size", 64 * MIB)
    memory = Memory(size)
    memory.write(0, b"\xa5" * min(size, 2 * MIB))
    before = memory.read(0, size)
    initrd = options.pop("initrd", None)
    with source(image) as kernel, source(initrd or b"", "initrd") as disk:
        with pytest.raises(Invalid, match=message):
            boot.load(kernel, initrd=disk if initrd else None, memory=memory, platform=Platform(size), **options)
    assert memory.read(0, size) == before
    memory.close()


def test_an_empty_initrd_is_none():
    with loaded(bzimage(CODE), initrd=b"") as (start, memory):
        assert struct.unpack("<II", memory.read(start.registers["rsi"] + 0x218, 8)) == (0, 0)


def test_a_file_that_becomes_shorter_is_refused():
    import os

    memory = Memory(64 * MIB)
    with source(bzimage(CODE)) as kernel:
        os.ftruncate(kernel.fd, 3000)
        with pytest.raises(Invalid, match="shorter"):
            boot.load(kernel, memory=memory, platform=Platform(64 * MIB))
    memory.close()


# ---- a kernel that needs a BIOS


def test_real_mode_kernel_is_an_option_rom():
    image = bzimage(CODE, version=0x207, xloadflags=0, cmdline=(0x238, "<I", 2047))
    with loaded(image, cmdline=b"dhcp", initrd=b"script") as (start, memory):
        assert not start.registers and start.rom is None
        assert memory.read(MIB, len(CODE)) == CODE
        rom = start.firmware_files["genroms/vmfs-kernel.rom"]
        assert start.firmware_files["bootorder"] == b"/rom@genroms/vmfs-kernel.rom\0"
        assert rom[:2] == b"\x55\xaa" and rom[2] * 512 == len(rom) and sum(rom) % 256 == 0
        pnp = struct.unpack_from("<H", rom, 0x1A)[0]
        assert rom[pnp : pnp + 4] == b"$PnP" and sum(rom[pnp : pnp + rom[pnp + 5] * 16]) % 256 == 0
        setup = rom.index(image[:0x1F1])
        address, size = struct.unpack_from("<II", rom, setup + 0x218)
        assert memory.read(address, size) == b"script"
        assert struct.unpack_from("<I", rom, setup + 0x228) == (0x1E000,)
        assert rom[setup + 2560 :].startswith(b"dhcp\0")
        assert {"etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader", "etc/e820"} <= start.firmware_files.keys()


# ---- ELF


def test_elf_segments_and_bss():
    memory = Memory(16 * MIB)
    memory.write(0, b"\xff" * memory.size)
    image = elf([(2 * MIB, CODE, 3 * MIB + 5), (MIB, b"first", 5)], entry=2 * MIB + 8)
    with source(image) as kernel:
        start = boot.load(kernel, memory=memory, platform=Platform(memory.size), cmdline=b"words")
    assert start.registers["rip"] == 2 * MIB + 8
    assert memory.read(MIB, 6) == b"first\xff"
    assert memory.read(2 * MIB, len(CODE)) == CODE
    assert memory.read(2 * MIB + len(CODE), 3 * MIB + 6 - len(CODE)) == bytes(3 * MIB + 5 - len(CODE)) + b"\xff"
    page = memory.read(start.registers["rsi"], 4096)
    assert text_at(memory, struct.unpack_from("<I", page, 0x228)[0]) == b"words"
    assert start.registers["cs.l"] == 1
    memory.close()


def test_elf_entry_may_be_virtual():
    image = elf([(MIB, CODE, 4096)], entry=0xFFFF_FFFF_8010_0010, virtual=0xFFFF_FFFF_8000_0000)
    with loaded(image) as (start, _):
        assert start.registers["rip"] == MIB + 0x10


@pytest.mark.parametrize(("bits", "machine", "long"), [(64, 62, 1), (32, 62, 1), (32, 3, 0)])
def test_elf_mode_is_the_machines(bits, machine, long):
    with loaded(elf([(MIB, CODE, 4096)], entry=MIB, bits=bits, machine=machine)) as (start, _):
        assert start.registers["cs.l"] == long


def test_elf_below_64_kib_pushes_the_loaders_structures_away():
    with loaded(elf([(0x1_0000, CODE, 0x4_0000)], entry=0x1_0000)) as (start, memory):
        assert memory.read(0x1_0000, len(CODE)) == CODE
        for address in (start.registers[name] for name in ("rsi", "cr3", "gdtr.base")):
            assert 0x5_0000 <= address < 0x9_FC00


def test_pvh():
    initrd = b"disk" * 5000
    with loaded(IMAGES["elf-pvh"], initrd=initrd, cmdline=b"quiet") as (start, memory):
        regs = start.registers
        assert regs["rip"] == MIB + 16 and regs["efer"] == 0 and regs["tr.limit"] == 0x67
        info = struct.unpack("<IIIIQQQQII", memory.read(regs["rbx"], 56))
        magic, version, flags, modules, list_at, command, rsdp, map_at, entries, _ = info
        assert (magic, version, flags, modules, entries) == (0x336EC578, 1, 0, 1, 4)
        assert text_at(memory, command) == b"quiet"
        assert memory.read(rsdp, 8) == b"RSD PTR "
        address, size, _, _ = struct.unpack("<4Q", memory.read(list_at, 32))
        assert memory.read(address, size) == initrd
        assert struct.unpack("<QQII", memory.read(map_at, 24)) == (0, 0x9FC00, 1, 0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (elf([(MIB, CODE, 4096)], entry=MIB)[:-1], "truncated"),
        (elf([(MIB, CODE, 4096)], entry=MIB)[:70], "truncated"),
        (elf([(MIB, CODE, 100)], entry=MIB), "2048 bytes in the file and 100 in memory"),
        (elf([(MIB, CODE, 4096)], entry=MIB - 1), "entry 0xfffff is in none"),
        (elf([(MIB, CODE, 4096)], entry=MIB, machine=183), "machine 183"),
        (elf([(MIB, CODE, 4096)], entry=MIB, kind=1), "type 1"),
        (elf([], entry=MIB), "0 program headers"),
        (elf([(MIB, b"", 0)], entry=MIB), "without a segment"),
        (elf([(MIB, CODE, 4096), (MIB + 4095, CODE, 4096)], entry=MIB), "overlaps kernel: its ELF segment 0"),
        (elf([(0x400, CODE, 4096)], entry=0x400), "overlaps the interrupt vectors"),
        (elf([(0x9F000, CODE, 4096)], entry=0x9F000), "not all RAM"),
        (elf([(MIB, CODE, 64 * MIB)], entry=MIB), "RAM ends"),
        (elf([(1 << 63, CODE, 1 << 63)], entry=1 << 63), "RAM ends"),
        (elf([(MIB, CODE, 4096)], entry=MIB, notes=pvh_note(5)), "entry 0x5 is in none"),
        (b"\x7fELF\x02\x02".ljust(64, b"\0"), "little-endian"),
    ],
)
def test_elf_refused(image, message):
    with pytest.raises(Invalid, match=message), loaded(image):
        pass


def test_a_segment_of_the_files_headers_alone_may_be_where_a_bios_has_its_rom():
    """So `ld -Ttext=0x100000` makes it, and a boot loader's writes there are lost."""
    image = bytearray(elf([(MIB - 4096, b"", 0), (MIB, CODE, 4096)], entry=MIB))
    headers = 64 + 2 * 56
    struct.pack_into("<QQQQQ", image, 64 + 8, 0, MIB - 4096, MIB - 4096, headers, headers)
    with loaded(bytes(image)) as (start, memory):
        assert start.registers["rip"] == MIB
        assert memory.read(MIB, len(CODE)) == CODE
        assert memory.read(MIB - 4096, 4) != b"\x7fELF"
    struct.pack_into("<QQ", image, 64 + 8 + 24, headers + 1, headers + 1)
    with pytest.raises(Invalid, match="not all RAM"), loaded(bytes(image)):
        pass


# ---- multiboot


def multiboot_info(start, memory):
    assert start.registers["rax"] == 0x2BADB002
    return memory.read(start.registers["rbx"], 116)


def test_multiboot_elf():
    initrd = b"module" * 3000
    with loaded(MULTIBOOT, initrd=initrd, cmdline=b"a b") as (start, memory):
        regs = start.registers
        assert regs["rip"] == MIB + 12 and regs["cr0"] & 0x8000_0001 == 1 and regs["efer"] == 0
        info = multiboot_info(start, memory)
        flags, lower, upper, _, command, count, table = struct.unpack_from("<7I", info)
        assert flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9 | 1 << 12
        assert (lower, upper) == (639, 63 * 1024)
        assert text_at(memory, command) == b"a b"
        begin, end, title, _ = struct.unpack("<4I", memory.read(table, 16))
        assert count == 1 and begin == MIB + 8192 and begin % 4096 == 0
        assert memory.read(begin, end - begin) == initrd
        assert text_at(memory, title) == b"initrd"
        length, at = struct.unpack_from("<II", info, 44)
        assert length == 4 * 24
        assert struct.unpack("<IQQI", memory.read(at + 72, 24)) == (20, MIB, 63 * MIB, 1)
        assert text_at(memory, struct.unpack_from("<I", info, 64)[0]) == b"vmfs"
        assert struct.unpack_from("<QIIIBB", info, 88) == (0xB8000, 160, 80, 25, 16, 2)


def test_multiboot_addresses():
    # The header is 64 bytes into the file, and the file from byte 32 on is loaded.
    header = multiboot_header(1 << 16, (MIB + 32, MIB, MIB + 32 + 32 + len(CODE), MIB + 0x3000, MIB + 64))
    memory = Memory(16 * MIB)
    memory.write(MIB, b"\xff" * 0x4000)
    with source(b"x" * 64 + header + CODE + b"not loaded") as kernel:
        start = boot.load(kernel, memory=memory, platform=Platform(memory.size))
    assert start.registers["rip"] == MIB + 64
    assert memory.read(MIB, 64 + len(CODE)) == b"x" * 32 + header + CODE
    assert memory.read(MIB + 64 + len(CODE), 0x3000 - 64 - len(CODE)) == bytes(0x3000 - 64 - len(CODE))
    assert memory.read(MIB + 0x3000, 2) == b"\xff\xff"
    memory.close()


def test_multiboot_addresses_without_ends_load_the_whole_file():
    image = multiboot_header(1 << 16, (MIB, MIB, 0, 0, MIB + 32)) + CODE
    with loaded(image) as (_, memory):
        assert memory.read(MIB, len(image) + 1) == image + b"\0"
    header = multiboot_header(1 << 16, (MIB + 32, MIB, 0, 0, MIB + 64))  # of a file that is loaded from byte 32 on
    with loaded(b"x" * 64 + header + CODE) as (_, memory):
        assert memory.read(MIB, 32 + len(header + CODE) + 1) == b"x" * 32 + header + CODE + b"\0"


def test_a_zero_page_has_the_header_and_the_size_of_ram():
    """Linux Documentation/arch/x86/zero-page.rst: ext_mem_k at 002, alt_mem_k at 1E0, the setup header at 1F1."""
    params = linux.boot_params(Platform(64 * MIB), 0x1234_5678_9ABC, bytes(range(1, 0x78)))
    assert len(params) == 4096 and params[0x1F1 : 0x1F1 + 0x77] == bytes(range(1, 0x78))
    assert struct.unpack_from("<Q", params, 0x70) == (0x1234_5678_9ABC,)
    assert struct.unpack_from("<H", params, 0x02) == (63 * 1024,)
    assert struct.unpack_from("<I", params, 0x1E0) == (63 * 1024,)
    large = linux.boot_params(Platform(512 * MIB), 0)
    assert struct.unpack_from("<H", large, 0x02) == (0xFFFF,)
    assert struct.unpack_from("<I", large, 0x1E0) == (511 * 1024,)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (multiboot_header(8) + CODE, "flags 0x8"),
        (multiboot_header(0) + CODE, "not ELF"),
        (multiboot_header(1 << 16, (MIB - 1, MIB, 0, 0, MIB)) + CODE, "no place in the file"),
        (multiboot_header(1 << 16, (MIB + 64, MIB, 0, 0, MIB)) + CODE, "no place in the file"),
        (multiboot_header(1 << 16, (MIB, MIB, MIB + 9999, 0, MIB)) + CODE, "truncated"),
        (multiboot_header(1 << 16, (MIB, MIB, MIB - 1, 0, MIB)) + CODE, "end before they begin"),
        (multiboot_header(1 << 16, (MIB, MIB, 0, 0, MIB - 1)) + CODE, "outside of the kernel"),
        (multiboot_header(1 << 16, (MIB, MIB, 0, 0xFFFF_FFFF, MIB)) + CODE, "RAM ends"),
    ],
)
def test_multiboot_refused(image, message):
    with pytest.raises(Invalid, match=message), loaded(image):
        pass


@pytest.mark.parametrize("before", [4, 8192 - 32])
def test_multiboot_header_is_found_where_it_is_whole(before):
    with source(bytes(before) + multiboot_header(1 << 16, (MIB, MIB, 0, 0, MIB)) + CODE) as image:
        assert boot.probe(image) == "multiboot1"


@pytest.mark.parametrize(
    "data",
    [
        bytes(8192 - 28) + multiboot_header(1 << 16, (MIB, MIB, 0, 0, MIB)) + CODE,  # not whole in 8 KiB
        bytes(2) + multiboot_header(1 << 16, (MIB, MIB, 0, 0, MIB)),  # not aligned
        struct.pack("<III", 0x1BADB002, 0, 1) + CODE,  # checksum
        multiboot_header(1 << 16),  # ends before the addresses
    ],
)
def test_multiboot_header_that_is_none(data):
    with source(data) as image, pytest.raises(Invalid, match="not an image"):
        boot.probe(image)


# ---- multiboot 2


def multiboot2_tags(start, memory):
    """The information's tags by type, and that it is one in itself."""
    assert start.registers["rax"] == 0x36D76289
    at = start.registers["rbx"]
    (total,) = struct.unpack("<I", memory.read(at, 4))
    data, found, at = memory.read(at, total), {}, 8
    while True:
        assert at % 8 == 0
        kind, size = struct.unpack_from("<II", data, at)
        if kind == 0:
            assert (size, at + 8) == (8, total)
            return found
        assert kind not in found
        found[kind] = data[at + 8 : at + size]
        at += -(-size // 8) * 8


def test_multiboot2_elf():
    initrd = b"module" * 3000
    asked = (1, 0, struct.pack("<5I", 1, 3, 6, 8, 15))
    image = elf([(MIB, multiboot2_header(asked) + CODE, 8192)], entry=MIB + 64, bits=64)
    with loaded(image, initrd=initrd, cmdline=b"a b") as (start, memory):
        regs = start.registers
        assert regs["rip"] == MIB + 64 and regs["cr0"] & 0x8000_0001 == 1 and regs["efer"] == 0
        tags = multiboot2_tags(start, memory)
        assert tags.keys() == {1, 2, 3, 4, 6, 8, 14, 15}
        assert (tags[1], tags[2]) == (b"a b\0", b"vmfs\0")
        begin, end = struct.unpack_from("<II", tags[3])
        assert begin == MIB + 8192 and memory.read(begin, end - begin) == initrd and tags[3][8:] == b"initrd\0"
        assert struct.unpack("<II", tags[4]) == (639, 63 * 1024)
        assert struct.unpack_from("<II", tags[6]) == (24, 0)
        assert struct.unpack("<QQII", tags[6][8 + 72 :]) == (MIB, 63 * MIB, 1, 0)
        assert struct.unpack_from("<QIIIBB", tags[8]) == (0xB8000, 160, 80, 25, 16, 2)
        assert tags[15] == memory.read(0xF0000, 36) and tags[14] == tags[15][:20]
        assert sum(tags[14]) % 256 == 0 and sum(tags[15]) % 256 == 0


@pytest.mark.parametrize("load_at", [MIB, 0xFFFF_FFFF])
def test_multiboot2_addresses(load_at):
    addresses = struct.pack("<4I", MIB + 32, load_at, 0, 0)
    header = multiboot2_header((2, 0, addresses), (3, 0, struct.pack("<I", MIB + 128)))
    with loaded(bytes(32) + header + CODE) as (start, memory):
        assert start.registers["rip"] == MIB + 128
        assert memory.read(MIB + 32, len(header) + len(CODE)) == header + CODE


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([(1, 0, struct.pack("<2I", 9, 6))], "information of type 9"),
        ([(99, 0, b"")], "tag 99"),
        ([(2, 0, struct.pack("<4I", MIB, MIB, 0, 0))], "no entry"),
        ([(2, 0, struct.pack("<4I", MIB - 1, MIB, 0, 0)), (3, 0, bytes(4))], "no place in the file"),
        ([(3, 0, struct.pack("<I", 7))], "entry 0x7 is in none"),
    ],
)
def test_multiboot2_refused(tags, message):
    image = elf([(MIB, multiboot2_header(*tags) + CODE, 8192)], entry=MIB + 64)
    with pytest.raises(Invalid, match=message), loaded(image):
        pass


def test_multiboot2_what_is_optional_may_be_missing():
    tags = [(1, 1, struct.pack("<I", 9)), (99, 1, b"12345"), (5, 0, struct.pack("<3I", 1024, 768, 32))]
    image = elf([(MIB, multiboot2_header(*tags) + CODE, 8192)], entry=MIB + 64)
    with loaded(image) as (start, memory):
        assert 9 not in multiboot2_tags(start, memory)


def test_multiboot2_with_a_tag_of_no_size():
    header = bytearray(multiboot2_header((99, 1, b"12345678")))
    struct.pack_into("<I", header, 20, 0)
    with pytest.raises(Invalid, match="has 0 bytes"), loaded(bytes(header) + CODE):
        pass


# ---- boot sectors and BIOS images


def test_boot_sector():
    with loaded(SECTOR + b"more") as (start, memory):
        regs = start.registers
        assert (regs["rip"], regs["cs"], regs["cs.base"], regs["rdx"]) == (0x7C00, 0, 0, 0x80)
        assert memory.read(0x7C00, 516) == SECTOR + b"more"


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in ("bios", "bzImage-16")])
def test_without_a_bios_every_vector_halts(name):
    with loaded(IMAGES[name]) as (_, memory):
        for vector in (0, 0x10, 0x13, 0xFF):
            offset, segment = struct.unpack("<HH", memory.read(4 * vector, 4))
            assert segment == 0xF000 and offset == 0xFC00 + 2 * vector
            assert memory.read((segment << 4) + offset, 2) == b"\xfa\xf4"
        assert struct.unpack("<H", memory.read(0x40E, 2)) == (0x9FC0,)
        assert struct.unpack("<H", memory.read(0x413, 2)) == (639,)
        assert struct.unpack("<4H", memory.read(0x400, 8)) == (0x3F8, 0x2F8, 0x3E8, 0x2E8)
        assert struct.unpack("<H", memory.read(0x410, 2)) == (1 << 14 | 4 << 9 | 2 << 4 | 1 << 2 | 1 << 1,)


def test_a_disk_is_no_boot_sector():
    with pytest.raises(Invalid, match="it is a disk"), loaded(SECTOR + bytes(640 << 10)):
        pass


@pytest.mark.parametrize("image", [SECTOR, BIOS])
@pytest.mark.parametrize("options", [{"cmdline": b"x"}, {"initrd": b"x"}])
def test_no_place_for_arguments(image, options):
    with pytest.raises(Invalid, match="takes no"), loaded(image, **options):
        pass


def test_bios():
    image = bytes(range(256)) * 512 + BIOS
    with loaded(image) as (start, memory):
        assert start.rom == boot.Rom((4 << 30) - len(image), image)
        assert memory.read(0xE0000, 0x20000) == image[-0x20000:]
        assert start.firmware_files


def test_load_bios():
    memory = Memory(2 * MIB)
    with source(BIOS, "bios") as image:
        assert boot.load_bios(image, memory) == boot.Rom(0xFFFF_0000, BIOS)
        assert memory.read(0xF0000, 0x10000) == BIOS
        assert not any(memory.read(0xE0000, 0x10000))
    memory.close()


@pytest.mark.parametrize("size", [0, 1000, 65537, 17 * MIB])
def test_load_bios_refused(size):
    memory = Memory(2 * MIB)
    with source(bytes(size), "bios") as image, pytest.raises(Invalid, match="^bios: "):
        boot.load_bios(image, memory)
    memory.close()


# ---- hostile images: whatever the bytes are, it is an answer or Invalid

EDGES = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFE, 0xFF])


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(IMAGES)), st.lists(st.tuples(st.integers(0, 0x300), EDGES | st.integers(0, 255))))
def test_damaged_headers(name, changes):
    image = bytearray(IMAGES[name][:8192])
    for at, value in changes:
        if at < len(image):
            image[at] = value
    try:
        with loaded(bytes(image), size=8 * MIB, initrd=b"i" * 5000, cmdline=b"c") as (start, memory):
            assert start.format in IMAGES
            assert all(0 <= address and address + size <= memory.size for address, size in start.written)
    except Invalid as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["<I", "<Q"]), st.integers(0, 0x2A0), st.integers(-3, 3), st.sampled_from([0, 31, 32, 63, 64]),
    st.sampled_from(sorted(IMAGES)),
)  # fmt: skip
def test_extreme_fields(layout, at, more, power, name):
    image = bytearray(IMAGES[name][:8192])
    size = struct.calcsize(layout)
    at = min(at, len(image) - size)
    struct.pack_into(layout, image, at, (1 << power) + more & (1 << 8 * size) - 1)
    try:
        with loaded(bytes(image), size=8 * MIB) as (start, memory):
            assert all(0 <= address and address + length <= memory.size for address, length in start.written)
    except Invalid as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes(data):
    for head in (
        b"",
        multiboot2_header((1, 1, b"")),
        b"\x7fELF\x02\x01",
        b"\x7fELF\x01\x01",
        multiboot_header(1 << 16),
    ):
        with source(head + data) as image:
            try:
                assert boot.probe(image) in IMAGES
            except Invalid as error:
                assert str(error)


# ---- the plan


def ranges_apart(plan_claims):
    taken = sorted(plan_claims)
    return all(one[1] <= other[0] for one, other in zip(taken, taken[1:], strict=False))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 8 * MIB),
            st.integers(1, 2 * MIB),
            st.sampled_from([1, 16, 4096]),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_claims_are_apart_and_in_ram(wishes):
    platform = Platform(8 * MIB)
    plan = Plan(platform.e820)
    claims = []
    for fixed, address, size, align, last in wishes:
        try:
            if fixed:
                plan.claim("x", address, size)
            else:
                address = plan.place("x", size, low=address, high=plan.top, align=align, last=last)
                assert address % align == 0
        except Invalid:
            continue
        claims.append((address, address + size))
        assert any(one.type == 1 and one.address <= address and address + size <= one.end for one in platform.e820)
    assert ranges_apart(claims)


def test_place_finds_any_room_there_is():
    plan = Plan(Platform(2 * MIB).e820)
    plan.claim("low", MIB, 0x1000)
    plan.claim("high", 2 * MIB - 0x1000, 0x1000)
    assert plan.place("all between", MIB - 0x2000, low=MIB, high=plan.top) == MIB + 0x1000
    with pytest.raises(Invalid, match="no room"):
        plan.place("a page more", 4096, low=MIB, high=plan.top)


@pytest.mark.parametrize("last", [False, True])
def test_place_takes_the_first_or_the_last(last):
    plan = Plan(Platform(2 * MIB).e820)
    plan.claim("middle", MIB + 0x8000, 0x1000)
    assert plan.place("x", 100, low=MIB, high=plan.top, last=last) == (2 * MIB - 4096 if last else MIB)
