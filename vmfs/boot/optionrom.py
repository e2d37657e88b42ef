"""Kernels that can only be entered in real mode, with a BIOS: iPXE's .lkrn, and Linux before 2.6.26.

The kernel is put into RAM; an option ROM of our own has the part that runs in real mode. The BIOS finds the ROM among
its files (fw_cfg, "genroms/"), boots from it first ("bootorder"), and the ROM copies that part to where it belongs
and jumps into it, as a boot loader would.

Sources: Linux Documentation/arch/x86/boot.rst ("Running the kernel"); BIOS Boot Specification 1.01, 3.2 (BEV); Plug and
Play BIOS Specification 1.0A, 3.2 (the expansion header); SeaBIOS docs/Runtime_config.md.
"""

from __future__ import annotations

import struct

from vmfs.boot import linux
from vmfs.boot.plan import Plan
from vmfs.boot.platform import HIGH
from vmfs.boot.source import Source
from vmfs.boot.start import Entry, Request
from vmfs.words.errors import Invalid

FILE = "genroms/vmfs-kernel.rom"

SEGMENT = 0x1000  # where the real-mode part goes
_STACK = 0xE000  # in that segment: the heap and the stack end there, and the command line begins
_ROM_UNIT = 512
_PNP_AT, _ENTRY_AT = 0x20, 0x60
_CAN_USE_HEAP = 0x80
_BIOS_RAM = 4 << 20  # what a BIOS uses at the top of RAM until it has booted


def is_real_mode(image: Source) -> bool:
    return linux.is_bzimage(image) and linux.read_header(image).bits == 16


def load(plan: Plan, request: Request) -> Entry:
    """The files that make a BIOS boot it."""
    image, cmdline = request.image, request.cmdline
    header = linux.read_header(image)
    linux.check_cmdline(header, cmdline)
    if header.setup_size > _STACK - 0x400 or len(cmdline) >= 0x1_0000 - _STACK:
        raise Invalid(f"{image.name}: a real-mode part of {header.setup_size} bytes, or its cmdline, is too large")
    if plan.top > 4 * _BIOS_RAM:
        plan.reserve("the BIOS", plan.top - _BIOS_RAM, plan.top)
    plan.claim(f"{image.name}: the kernel", HIGH, header.size)
    plan.write(HIGH, image.part(header.setup_size, header.size))
    setup = bytearray(image.read(0, header.setup_size))
    if request.initrd is not None:
        address = linux.place_initrd(plan, header, request.initrd)
        struct.pack_into("<II", setup, 0x218, address, request.initrd.size)
    setup[0x210] = 0xFF  # type_of_loader
    setup[0x211] |= _CAN_USE_HEAP
    struct.pack_into("<H", setup, 0x1FA, 0xFFFF)  # vid_mode
    struct.pack_into("<H", setup, 0x224, _STACK - 0x200)  # heap_end_ptr
    struct.pack_into("<I", setup, 0x228, (SEGMENT << 4) + _STACK)  # cmd_line_ptr
    files = {FILE: _rom(bytes(setup), cmdline), "bootorder": f"/rom@{FILE}".encode() + b"\0"}
    how = f"bzImage, 16-bit entry at {SEGMENT + 0x20:#x}:0 from an option ROM"
    return Entry({}, how, firmware_files=files)


def _rom(setup: bytes, cmdline: bytes) -> bytes:
    """An option ROM with a bootstrap entry vector."""
    setup += bytes(len(setup) % 2)
    code_size = len(_code(0, 0, 0, 0))
    setup_at = _ENTRY_AT + code_size
    code = _code(setup_at, len(setup) // 2, setup_at + len(setup), len(cmdline) + 1)
    product = b"vmfs kernel\0"
    product_at = setup_at + len(setup) + len(cmdline) + 1
    size = -(-(product_at + len(product) + 1) // _ROM_UNIT)
    rom = bytearray(size * _ROM_UNIT)
    # Signature, length, and the initialisation: nothing to do, a device to boot from is there (BBS 3.2, AX bit 5).
    rom[: 3 + 4] = b"\x55\xaa" + bytes([size]) + b"\xb8\x20\x00\xcb"  # mov ax, 0x20; retf
    struct.pack_into("<HH", rom, 0x18, 0, _PNP_AT)
    pnp = bytearray(
        struct.pack("<4sBBHBBIHH", b"$PnP", 1, 2, 0, 0, 0, 0, 0, product_at)
        # A network-like device that is a boot device; no BCV, no disconnect vector, the BEV.
        + struct.pack("<3sBHHHHH", b"\x00\x00\x02", 0x14, 0, 0, _ENTRY_AT, 0, 0)
    )
    pnp[9] = -sum(pnp) & 0xFF
    rom[_PNP_AT : _PNP_AT + len(pnp)] = pnp
    body = code + setup + cmdline + b"\0" + product
    rom[_ENTRY_AT : _ENTRY_AT + len(body)] = body
    rom[-1] = -sum(rom) & 0xFF
    return bytes(rom)


def _code(setup_at: int, setup_words: int, cmdline_at: int, cmdline_bytes: int) -> bytes:
    """What the BIOS calls to boot: copies both parts, and enters the kernel. It does not return."""
    return b"".join(
        (
            b"\xfa\xfc",  # cli; cld
            b"\x8c\xc8\x8e\xd8",  # mov ax, cs; mov ds, ax
            b"\xb8" + struct.pack("<H", SEGMENT),  # mov ax, SEGMENT
            b"\x8e\xc0",  # mov es, ax
            b"\xbe" + struct.pack("<H", setup_at),  # mov si, setup_at
            b"\x31\xff",  # xor di, di
            b"\xb9" + struct.pack("<H", setup_words),  # mov cx, setup_words
            b"\xf3\xa5",  # rep movsw
            b"\xbe" + struct.pack("<H", cmdline_at),  # mov si, cmdline_at
            b"\xbf" + struct.pack("<H", _STACK),  # mov di, _STACK
            b"\xb9" + struct.pack("<H", cmdline_bytes),  # mov cx, cmdline_bytes
            b"\xf3\xa4",  # rep movsb
            b"\x8e\xd8\x8e\xe0\x8e\xe8\x8e\xd0",  # mov ds, ax; mov fs, ax; mov gs, ax; mov ss, ax
            b"\xbc" + struct.pack("<H", _STACK),  # mov sp, _STACK
            b"\xea" + struct.pack("<HH", 0, SEGMENT + 0x20),  # jmp SEGMENT + 0x20:0
        )
    )
