"""Boot: an image on the host becomes memory and registers, as its format's boot protocol has it.

`load` decides where everything goes, checks all of it, and only then changes RAM. The formats are rows of IMAGES,
in the order in which they are looked for: `probe` names the first that an image is of.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from vmfs.boot import (
    acpi,
    bios,
    elf,
    linux,
    mptable,
    multiboot,
    multiboot2,
    optionrom,
    pirtable,
    plain,
    pvh,
    sector,
    smbios,
    start,
)
from vmfs.boot.bios import load_bios
from vmfs.boot.plan import Plan
from vmfs.boot.platform import BIOS_DATA_END, FIRMWARE, HIGH, USABLE, Platform
from vmfs.boot.source import Source
from vmfs.boot.start import Entry, Request, Rom, Start
from vmfs.devices import power
from vmfs.memory.ram import Memory, regions_of
from vmfs.words.errors import Invalid
from vmfs.words.registers import RegisterFile

__all__ = [
    "IMAGES", "Image", "Platform", "Rom", "Source", "Start", "firmware_files", "load", "load_bios", "probe", "wake",
]  # fmt: skip


_TABLES = FIRMWARE + 64  # ACPI's, after their root pointer; the first is the FACS
# Of S0 to S5, whether there is one, and its sleep type, as OVMF and SeaBIOS ask for it.
_SLEEPS = bytes((0x80, 0, 0, 0x80 | power.S3, 0, 0x80 | power.S5))


@dataclass(frozen=True, slots=True)
class Image:
    """A format: its name, how it is told, what plans it, and in a line what it is."""

    name: str
    is_one: Callable[[Source], bool]
    load: Callable[[Plan, Request], Entry]
    what: str


IMAGES: tuple[Image, ...] = (
    Image("bzImage-16", optionrom.is_real_mode, optionrom.load, "the same, so old that it needs a BIOS"),
    Image("bzImage", linux.is_bzimage, linux.load, "a Linux kernel, or what uses its boot protocol"),
    Image("multiboot1", multiboot.is_multiboot, multiboot.load, "the magic number 1BADB002 in the first 8 KiB"),
    Image("multiboot2", multiboot2.is_multiboot2, multiboot2.load, "E85250D6 in the first 32 KiB"),
    Image("elf-pvh", pvh.is_pvh, pvh.load, "an ELF file with Xen's PVH entry note"),
    Image("elf", elf.is_elf, plain.load, "any other ELF executable for x86"),
    Image("bios", bios.is_bios, bios.load, "a multiple of 64 KiB with a jump at the reset vector"),
    Image("boot-sector", sector.is_boot_sector, sector.load, "512 bytes that end with 55 AA, and what follows"),
)


def _find(image: Source) -> Image:
    if not image.size:
        raise Invalid(f"{image.name}: it is empty")
    for row in IMAGES:
        if row.is_one(image):
            return row
    raise Invalid(f"{image.name}: not an image that can be booted ({', '.join(row.name for row in IMAGES)})")


def probe(image: Source) -> str:
    """The name of the image's format. Invalid where it has none, or is not whole."""
    return _find(image).name


def load(
    image: Source,
    *,
    initrd: Source | None = None,
    cmdline: bytes = b"",
    memory: Memory,
    platform: Platform,
    decompress: bool = True,
) -> Start:
    """Put an image into RAM. Invalid, and RAM as it was, where that cannot be.

    `cmdline` is without a NUL. `decompress=False` has a bzImage's own decompressor run in the guest, as the word
    `kaslr` in `cmdline` does.
    """
    if b"\0" in cmdline:
        raise Invalid("cmdline: there is a NUL in it")
    if memory.size != platform.memory_size:
        raise Invalid(f"mem_size: the platform has {platform.memory_size} bytes, RAM {memory.size}")
    if memory.size <= HIGH:
        raise Invalid(f"mem_size: {memory.size} bytes; booting a PC needs more than 1 MiB")
    row = _find(image)
    initrd = initrd if initrd is not None and initrd.size else None
    with Plan(platform.e820) as plan:
        plan.reserve("the interrupt vectors and the BIOS's data", 0, BIOS_DATA_END)
        rsdp, root = (FIRMWARE, acpi.tables(platform).rsdp(_TABLES)) if platform.acpi else (0, b"")
        entry = row.load(plan, Request(image, initrd, cmdline, platform, rsdp, root, decompress))
        files = dict(entry.firmware_files or {})
        if entry.registers:
            start.bios_data(plan, platform)
            if platform.acpi:
                plan.write(rsdp, root)
                _write_tables(plan, platform)
        else:
            files = {**firmware_files(platform), **files}
        written = plan.commit(memory)
    return Start(row.name, entry.how, entry.registers, written, entry.rom, files)


def _write_tables(plan: Plan, platform: Platform) -> None:
    """ACPI's tables, and after them the PCI interrupt routing table, the multiprocessor tables and SMBIOS's."""
    at = _TABLES
    for make in (
        acpi.tables(platform).at,
        lambda at: pirtable.table(platform.chipset),
        lambda at: mptable.table(platform, at),
        lambda at: smbios.for_memory(platform, at),
    ):
        data = make(at)
        plan.write(at, data)
        at = -(-(at + len(data)) // 16) * 16


_VECTOR, _MOST = 12, 0xF_FFFF  # of the FACS: where its vector is; and the last address of real mode


def wake(memory: Memory, cpu: RegisterFile) -> bool:
    """Have a CPU in its reset state begin where a system that was started without firmware wants to be woken (ACPI 6.4,
    5.2.10: in real mode). False, and nothing is done, where it has said no such address."""
    if memory.size <= HIGH:
        return False
    facs = memory.read(_TABLES, _VECTOR + 4)
    vector = int.from_bytes(facs[_VECTOR:], "little")
    if facs[:4] != b"FACS" or not 0 < vector <= _MOST:
        return False
    registers = start.real(rip=vector & 0xF, rsp=0, code_segment=vector >> 4)
    Start("wake", "the system's waking vector", registers).apply(cpu)
    return True


def firmware_files(platform: Platform) -> dict[str, bytes]:
    """What a BIOS asks fw_cfg for to know the machine, by the names of its files."""
    ram = b"".join(struct.pack("<QQI", one.address, one.size, USABLE) for one in regions_of(platform.memory_size))
    if not platform.acpi:
        return {"etc/e820": ram}
    tables = {**acpi.tables(platform).for_firmware(), **smbios.for_firmware(platform)}
    return {"etc/e820": ram, "etc/system-states": _SLEEPS, **tables}
