"""What a machine's `kernel`, `initrd`, `cmdline` and `bios` files become when its next run boots them."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmfs.boot import Platform, Rom, Source, firmware_files, load, load_bios
from vmfs.devices.chipset import I440FX, Chipset
from vmfs.devices.pflash import Pflash
from vmfs.engine.base import Machine, Vcpu
from vmfs.machine.images import Images
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid
from vmfs.words.layouts import cpuid_entries

# What a kernel is told of a machine without devices: its RAM.
_BARE = {"serial": (), "parallel": (), "ps2": False, "rtc": False, "vga": False, "power_button": False, "acpi": False}


_SHADOW = 128 << 10  # of firmware, below 1 MiB


@dataclass(frozen=True, slots=True)
class Booted:
    """What was done: a sentence, where RAM was written (address, size), what is to be mapped read-only, what the
    firmware asks for by name, and whether it is to load `kernel`."""

    how: str
    written: tuple[tuple[int, int], ...]
    rom: Rom | None
    files: Mapping[str, bytes]
    firmware_loads: bool = False


def boot(
    images: Images,
    memory: Memory,
    machine: Machine,
    cpus: Sequence[Vcpu],
    *,
    has_devices: bool,
    flash: Pflash | None = None,
    uuid: bytes = bytes(16),
    uarts: tuple[tuple[int, int], ...] = (),
    chipset: Chipset = I440FX,
) -> Booted:
    """Load the images, and set the first CPU to where they begin. Invalid for what cannot be: nothing has changed.
    `flash` is what the CPU begins in, where there is one: its firmware loads the kernel. `uarts`, `chipset`: as a
    Platform has them."""
    is_bare = {"serial": uarts, "chipset": chipset} if has_devices else _BARE
    processor_id, processor = _processor(cpus[0].get_state("cpuid"))
    platform = Platform(
        memory.size, len(cpus), uuid=uuid, processor_id=processor_id, processor=processor, **is_bare  # type: ignore[arg-type]
    )
    bios = _source(images, "bios")
    if flash is not None:
        if bios is not None:
            raise Invalid(f"bios: the machine's firmware is in its flash ({flash.name}): a machine has one of both")
        return _boot_flash(flash, images, memory, platform)
    if not images.there("kernel"):
        assert bios is not None
        rom = load_bios(bios, memory)
        return Booted("the BIOS", _shadow(rom), rom, firmware_files(platform))
    started = load(
        _source(images, "kernel"),  # type: ignore[arg-type]
        initrd=_source(images, "initrd"),
        cmdline=os.fsencode(images.cmdline),
        memory=memory,
        platform=platform,
    )
    rom, written = started.rom, started.written
    if rom is None and not started.registers:
        if bios is None:
            raise Invalid(f"kernel: it is a {started.format}, which needs a BIOS to boot: write one to `bios`")
        rom = load_bios(bios, memory)
        written = (*written, *_shadow(rom))
    started.apply(cpus[0])
    if has_devices:
        started.apply_to_chips(machine, cpus[0])
    return Booted(started.how, written, rom, started.firmware_files or {})


def _boot_flash(flash: Pflash, images: Images, memory: Memory, platform: Platform) -> Booted:
    if memory.size < 1 << 20:
        raise Invalid(f"mem_size: firmware needs 1 MiB of RAM, and there are {memory.size} bytes")
    length = min(flash.size, _SHADOW)
    address = (1 << 20) - length
    memory.write(address, flash.read_at(flash.size - length, length))
    return Booted(
        "the firmware in its flash",
        ((address, length),),
        None,
        firmware_files(platform),
        firmware_loads=images.there("kernel"),
    )


def _processor(cpuid: bytes) -> tuple[bytes, str]:
    """Its identity, and its name (Intel SDM 2A, CPUID, leaves 1 and 8000_0002 to 8000_0004)."""
    leaves = {function: registers for function, index, _, *registers in cpuid_entries(cpuid) if not index}
    eax, _, _, edx = leaves.get(1, (0, 0, 0, 0))
    brand = b"".join(struct.pack("<4I", *leaves.get(0x8000_0002 + part, (0, 0, 0, 0))) for part in range(3))
    return struct.pack("<II", eax, edx), brand.split(b"\0")[0].decode("ascii", "replace").strip()


def _source(images: Images, name: str) -> Source | None:
    image = images[name]
    return Source(image.fd, image.size, name) if image.size else None


def _shadow(rom: Rom) -> tuple[tuple[int, int], ...]:
    size = min(len(rom.data), _SHADOW)
    return (((1 << 20) - size, size),)
