"""Xen's PVH entry: 32-bit protected mode, and ebx points to struct hvm_start_info.

Source: Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct

from vmfs.boot import elf, start
from vmfs.boot.plan import Plan
from vmfs.boot.platform import HIGH
from vmfs.boot.source import Source
from vmfs.boot.start import Entry, Request

_MAGIC = 0x336EC578  # XEN_HVM_START_MAGIC_VALUE
_VERSION = 1  # the first with the memory map
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MAP_ENTRY = struct.Struct("<QQII")


def is_pvh(image: Source) -> bool:
    return elf.is_elf(image) and elf.read(image).pvh is not None


def load(plan: Plan, request: Request) -> Entry:
    """The initrd is the one module, at the top of RAM."""
    image, initrd = request.image, request.initrd
    found = elf.read(image)
    assert found.pvh is not None  # is_pvh
    elf.check_entry(image.name, found, found.pvh)
    elf.claim(plan, image, found)
    modules = b""
    if initrd is not None:
        address = plan.place("initrd", initrd.size, low=HIGH, high=plan.top, last=True)
        plan.write(address, initrd)
        modules = _MODULE.pack(address, initrd.size, 0, 0)
    command = plan.put("the command line", request.cmdline + b"\0", low=start.LOW, high=start.LOW_END)
    ranges = request.platform.e820
    entries = b"".join(_MAP_ENTRY.pack(one.address, one.size, one.type, 0) for one in ranges)
    size = _START_INFO.size + len(entries) + len(modules)
    info = plan.place("the PVH start info", size, low=start.LOW, high=start.LOW_END)
    map_at = info + _START_INFO.size
    modules_at = map_at + len(entries) if modules else 0
    header = _START_INFO.pack(
        _MAGIC, _VERSION, 0, len(modules) // _MODULE.size, modules_at, command, request.rsdp, map_at, len(ranges), 0
    )
    plan.write(info, header + entries + modules)
    registers = start.protected(plan, {"rip": found.pvh, "rbx": info}, start.LOADER)
    return Entry(registers, f"ELF{found.bits}, PVH entry at {found.pvh:#x}")
