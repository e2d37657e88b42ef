"""Linux: a bzImage by the x86 boot protocol.

The kernel is entered in the widest mode that it names: 64-bit, else 32-bit; where its protocol is so old that it
can only be entered in real mode (iPXE's .lkrn is such an image), a BIOS has to do it: `optionrom.py`.

Where the host has a library for the compressed kernel inside, it is decompressed here, put where it is linked to be,
and entered at once. That kernel is where System.map has it: KASLR is off, as with `nokaslr`. With the word `kaslr` in
the command line (a parameter of Linux 3.14 to 4.7, unknown to later ones, which do not mind), the decompressor that
is part of the image runs in the guest, and moves the kernel about.

Source: Linux Documentation/arch/x86/boot.rst and zero-page.rst. Left out: zImage (loaded below 1 MiB; none was
built for x86 since Linux 2.6.30), setup_data, EFI and EDD information, kernels and initrds above 4 GiB.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from vmfs.boot import elf, payload, start
from vmfs.boot.plan import Plan
from vmfs.boot.platform import HIGH, Platform
from vmfs.boot.source import Source
from vmfs.boot.start import Entry, Request
from vmfs.words.errors import Invalid

_SECTOR = 512
_HEADER_AT, _HEADER_END = 0x1F1, 0x290  # the setup header in the image and, the same, in struct boot_params
_LOADED_HIGH, _KASLR = 1 << 0, 1 << 1  # loadflags
_KERNEL_64 = 1 << 0  # xloadflags
VERSION = 0x20F  # of the protocol, as far as it is known here
_FIRST_32_BIT = 0x208  # the first version whose images are sure to have a 32-bit entry: Linux 2.6.26
_E820_ENTRIES = 128


@dataclass(frozen=True, slots=True)
class Header:
    """The setup header, with the defaults that boot.rst gives for fields which the version does not have."""

    raw: bytes  # struct setup_header
    version: int  # 0x20f is 2.15
    setup_size: int  # bytes of the real-mode part
    size: int  # bytes of the protected-mode part after it
    loadflags: int
    xloadflags: int
    address: int  # where it wants to be
    init_size: int  # bytes of RAM that it needs there until it knows the memory map
    initrd_max: int  # the highest address that the initrd's last byte may have
    cmdline_size: int
    payload: tuple[int, int]  # offset in the image, length; 0, 0 where it is not named

    @property
    def bits(self) -> int:
        """The widest mode in which it can be entered."""
        if self.xloadflags & _KERNEL_64:
            return 64
        return 32 if self.version >= _FIRST_32_BIT else 16


def is_bzimage(image: Source) -> bool:
    head = image.head(0x206)
    return head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS"


def read_header(image: Source) -> Header:
    """Invalid where the image is not whole, or a zImage."""
    name = image.name
    head = image.read(0, _HEADER_END)

    def field(offset: int, size: int, since: int = 0x200, default: int = 0) -> int:
        return int.from_bytes(head[offset : offset + size], "little") if version >= since else default

    version = int.from_bytes(head[0x206:0x208], "little")
    end = 0x202 + head[0x201]  # the header ends where the jump over it goes to
    if version < 0x200 or not 0x230 <= end <= _HEADER_END:
        raise Invalid(f"{name}: boot protocol {version:#x} with a setup header that ends at {end:#x}")
    loadflags = field(0x211, 1)
    if not loadflags & _LOADED_HIGH:
        raise Invalid(f"{name}: a zImage, which is loaded below 1 MiB; only a bzImage can be booted")
    setup_size = ((head[_HEADER_AT] or 4) + 1) * _SECTOR
    # In 16-byte units; up to version 2.03 the field has 16 bits, which is too few.
    size = field(0x1F4, 4, 0x204) * 16 or max(image.size - setup_size, 0)
    if setup_size + size > image.size + 15 or size < _SECTOR:
        raise Invalid(f"{name}: truncated: its header says {setup_size + size} bytes, and it has {image.size}")
    size = min(size, image.size - setup_size)
    address = field(0x258, 8, 0x20A, HIGH) or HIGH
    align = field(0x230, 4, 0x205) if field(0x234, 1, 0x205) else 0
    if align:
        if align & align - 1:
            raise Invalid(f"{name}: its alignment {align:#x} is not a power of two")
        address = -(-address // align) * align
    offset, length = field(0x248, 4, 0x208), field(0x24C, 4, 0x208)
    if offset + length > size:
        offset = length = 0
    return Header(
        raw=head[_HEADER_AT:end],
        version=version,
        setup_size=setup_size,
        size=size,
        loadflags=loadflags,
        xloadflags=field(0x236, 2, 0x20C),
        address=address,
        init_size=max(field(0x260, 4, 0x20A), size),
        initrd_max=field(0x22C, 4, 0x203, 0x37FF_FFFF),
        cmdline_size=field(0x238, 4, 0x206, 255),
        payload=(setup_size + offset, length) if length else (0, 0),
    )


def check_cmdline(header: Header, cmdline: bytes) -> None:
    if len(cmdline) > header.cmdline_size:
        raise Invalid(f"cmdline: {len(cmdline)} bytes, and the kernel takes {header.cmdline_size}")


def place_initrd(plan: Plan, header: Header, initrd: Source) -> int:
    """As high as the kernel allows: it is out of the way there until it is unpacked."""
    address = plan.place("initrd", initrd.size, low=HIGH, high=min(plan.top, header.initrd_max + 1), last=True)
    plan.write(address, initrd)
    return address


def load(plan: Plan, request: Request) -> Entry:
    """A bzImage with a 64- or 32-bit entry, in the widest mode that it has one for."""
    image, initrd, cmdline = request.image, request.initrd, request.cmdline
    header = read_header(image)
    check_cmdline(header, cmdline)
    plan.claim(f"{image.name}: the kernel", header.address, header.init_size)
    placed = place_initrd(plan, header, initrd) if initrd is not None else 0
    command = plan.put("the command line", cmdline + b"\0", low=start.LOW, high=start.LOW_END)
    params = boot_params(request.platform, request.rsdp, header.raw)
    params[0x210] = 0xFF  # type_of_loader: not one that has a number
    params[0x211] = header.loadflags & ~_KASLR
    struct.pack_into("<H", params, 0x1FA, 0xFFFF)  # vid_mode: as it is
    struct.pack_into("<I", params, 0x214, header.address)  # code32_start
    struct.pack_into("<II", params, 0x218, placed, initrd.size if initrd is not None else 0)
    struct.pack_into("<I", params, 0x228, command)
    if header.version >= 0x209:
        struct.pack_into("<Q", params, 0x250, 0)  # setup_data
    zero_page = plan.put("the boot parameters", bytes(params), low=start.LOW, high=start.LOW_END)

    entry = None
    if request.decompress and b"kaslr" not in cmdline.split():
        entry = _load_vmlinux(plan, image, header)
    if entry is not None:
        kind = payload.name_of(image, header.payload[0])
        how = f"bzImage, {kind} decompressed on the host, vmlinux entered at {entry:#x}"
    else:
        plan.write(header.address, image.part(header.setup_size, header.size))
        entry = header.address + (0x200 if header.bits == 64 else 0)
        how = f"bzImage, {header.bits}-bit entry at {entry:#x}"
    enter = start.long if header.bits == 64 else start.protected
    return Entry(enter(plan, {"rip": entry, "rsi": zero_page}), how)


def boot_params(platform: Platform, rsdp: int, header: bytes = b"") -> bytearray:
    """The "zero page" without what a bzImage's loader adds: screen, memory map, ACPI."""
    params = bytearray(4096)
    params[_HEADER_AT : _HEADER_AT + len(header)] = header
    if platform.vga:
        # struct screen_info: a colour text screen of 80x25, characters of 16 lines, the cursor below the first line
        struct.pack_into("<BBH", params, 0x00, 0, 1, 0)
        struct.pack_into("<HBB", params, 0x04, 0, 3, 80)
        struct.pack_into("<BBH", params, 0x0E, 25, 1, 16)
    struct.pack_into("<Q", params, 0x70, rsdp)
    above = platform.extended >> 10
    struct.pack_into("<H", params, 0x02, min(above, 0xFFFF))  # ext_mem_k
    struct.pack_into("<I", params, 0x1E0, above)  # alt_mem_k
    ranges = platform.e820
    assert len(ranges) <= _E820_ENTRIES
    params[0x1E8] = len(ranges)
    for number, one in enumerate(ranges):
        struct.pack_into("<QQI", params, 0x2D0 + 20 * number, *one)
    return params


def _load_vmlinux(plan: Plan, image: Source, header: Header) -> int | None:
    """Put the kernel of the payload where it is linked to be; its entry, or None to let it decompress itself."""
    offset, length = header.payload
    vmlinux = payload.decompress(image, offset, length, header.init_size) if length else None
    if vmlinux is None:
        return None
    plan.callback(os.close, vmlinux.fd)
    try:
        found = elf.read(vmlinux)
        elf.check_entry(vmlinux.name, found, found.entry)
    except Invalid:
        return None
    ends = sorted((one.physical, one.physical + one.size) for one in found.segments)
    if (
        found.bits != header.bits
        or found.type != elf.EXECUTABLE
        or found.start != header.address
        or found.end > header.address + header.init_size
        or any(one[1] > other[0] for one, other in zip(ends, ends[1:], strict=False))
    ):
        return None
    elf.write(plan, vmlinux, found)
    return found.entry
