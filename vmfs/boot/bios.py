"""A BIOS image, mapped so that the CPU's reset vector is its last 16 bytes.

Source: Intel SDM 3A 9.1.4 (the first instruction is at FFFFFFF0); PCs have the last 128 KiB below 1 MiB, too.
"""

from __future__ import annotations

from vmfs.boot.plan import Plan
from vmfs.boot.source import Source
from vmfs.boot.start import Entry, Request, Rom
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid

_GRANULE = 64 << 10
LARGEST = 16 << 20  # below that are the APICs' addresses
_SHADOW = 128 << 10
_SHADOW_END = 0x10_0000
_RESET_VECTOR = 16
# The first instruction: a jump, far or near, perhaps after nops or a wbinvd.
_JUMPS = (b"\xea", b"\xe9", b"\xeb", b"\x90\x90\xe9", b"\x90\x90\xeb", b"\x0f\x09\xe9", b"\x0f\x09\xeb")


def is_bios(image: Source) -> bool:
    if not 0 < image.size <= LARGEST or image.size % _GRANULE:
        return False
    return image.read(image.size - _RESET_VECTOR, 3).startswith(_JUMPS)


def read(image: Source) -> Rom:
    """Invalid where its size is not one of a ROM."""
    if not 0 < image.size <= LARGEST or image.size % _GRANULE:
        raise Invalid(f"{image.name}: a BIOS image has a multiple of 64 KiB, up to 16 MiB, not {image.size} bytes")
    return Rom((4 << 30) - image.size, image.read(0, image.size))


def shadow(rom: Rom) -> tuple[int, bytes]:
    """Where the copy below 1 MiB begins, and its bytes."""
    data = rom.data[-_SHADOW:]
    return _SHADOW_END - len(data), data


def load_bios(image: Source, memory: Memory) -> Rom:
    """Copy the image's end below 1 MiB, and say what is to be mapped. The CPU begins in its reset state."""
    rom = read(image)
    address, data = shadow(rom)
    if address + len(data) > memory.size:
        raise Invalid(f"{image.name}: a BIOS needs 1 MiB of RAM, and there are {memory.size} bytes")
    memory.write(address, data)
    return rom


def load(plan: Plan, request: Request) -> Entry:
    """A BIOS in place of a kernel: as any image."""
    request.refuse_arguments("a BIOS")
    rom = read(request.image)
    plan.write(*shadow(rom))
    return Entry({}, f"BIOS of {request.image.size >> 10} KiB at {rom.address:#x}", rom=rom)
