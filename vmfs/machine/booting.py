"""What a machine's `kernel`, `initrd`, `cmdline` and `bios` files become when its next run boots them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmfs.boot import Platform, Rom, Source, firmware_files, load, load_bios
from vmfs.devices.pflash import Pflash
from vmfs.engine.base import Machine, Vcpu
from vmfs.machine.images import Images
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid

# What a kernel is told of a machine without devices: its RAM.
_BARE = {"serial": (), "ps2": False, "rtc": False, "vga": False, "power_button": False, "acpi": False}


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
) -> Booted:
    """Load the images, and set the first CPU to where they begin. Invalid for what cannot be: nothing has changed.
    `flash` is what the CPU begins in, where there is one: its firmware loads the kernel."""
    is_bare = {} if has_devices else _BARE
    platform = Platform(memory.size, len(cpus), **is_bare)  # type: ignore[arg-type]
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


def _source(images: Images, name: str) -> Source | None:
    image = images[name]
    return Source(image.fd, image.size, name) if image.size else None


def _shadow(rom: Rom) -> tuple[tuple[int, int], ...]:
    size = min(len(rom.data), _SHADOW)
    return (((1 << 20) - size, size),)
