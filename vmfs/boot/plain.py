"""An ELF executable that names no boot protocol: its segments at their physical addresses, the CPU at its entry.

One for x86-64 begins in long mode with the first 4 GiB mapped to themselves, one for i386 in 32-bit protected mode
without paging; both with a small stack. rsi (esi) points to Linux's "zero page" with the command line, the
initrd, the memory map and the RSDP, so that an uncompressed Linux (vmlinux) boots, too; others need not look.
"""

from __future__ import annotations

import struct

from vmfs.boot import elf, linux, start
from vmfs.boot.plan import Plan
from vmfs.boot.platform import HIGH
from vmfs.boot.start import Entry, Request


def load(plan: Plan, request: Request) -> Entry:
    image, initrd = request.image, request.initrd
    found = elf.read(image)
    elf.check_entry(image.name, found, found.entry)
    elf.claim(plan, image, found)
    params = linux.boot_params(request.platform, request.rsdp)
    struct.pack_into("<HH4sH", params, 0x1FE, 0xAA55, 0, b"HdrS", linux.VERSION)
    params[0x210] = 0xFF  # type_of_loader
    if initrd is not None:
        address = plan.place("initrd", initrd.size, low=HIGH, high=plan.top, last=True)
        plan.write(address, initrd)
        struct.pack_into("<II", params, 0x218, address, initrd.size)
    command = plan.put("the command line", request.cmdline + b"\0", low=start.LOW, high=start.LOW_END)
    struct.pack_into("<I", params, 0x228, command)
    zero_page = plan.put("the boot parameters", bytes(params), low=start.LOW, high=start.LOW_END)
    bits = 64 if found.machine == elf.X86_64 else 32
    enter = start.long if bits == 64 else start.protected
    registers = enter(plan, {"rip": found.entry, "rsi": zero_page})
    return Entry(registers, f"ELF{found.bits}, entered at {found.entry:#x} in {bits}-bit mode")
