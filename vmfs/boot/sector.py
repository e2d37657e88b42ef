"""A boot sector as the BIOS starts one: at 0000:7C00 in real mode, the drive's number in dl.

Only that there is no BIOS: see `start.bios_data`. For a sector that needs int 10h or int 13h, give the machine a disk
and a BIOS.

Source: IBM's PS/2 BIOS Interface Technical Reference, INT 19h; the two bytes 55 AA at offset 510.
"""

from __future__ import annotations

from vmfs.boot import start
from vmfs.boot.plan import Plan
from vmfs.boot.platform import EBDA
from vmfs.boot.source import Source
from vmfs.boot.start import Entry, Request
from vmfs.words.errors import Invalid

ADDRESS = 0x7C00
SECTOR = 512
DRIVE = 0x80  # the first hard disk


def is_boot_sector(image: Source) -> bool:
    return image.size >= SECTOR and image.read(SECTOR - 2, 2) == b"\x55\xaa"


def load(plan: Plan, request: Request) -> Entry:
    """The sector and what follows it in the image, as a whole."""
    image = request.image
    request.refuse_arguments("a boot sector")
    if image.size > EBDA - ADDRESS:
        raise Invalid(
            f"{image.name}: {image.size} bytes that begin with a boot sector are more than fit below 640 KiB: "
            "it is a disk"
        )
    plan.claim(f"{image.name}: the boot sector", ADDRESS, image.size)
    plan.write(ADDRESS, image)
    registers = start.real(rip=ADDRESS, rsp=ADDRESS, rdx=DRIVE)
    return Entry(registers, "boot sector at 0000:7c00, without a BIOS")
