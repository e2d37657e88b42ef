"""What a machine's `kernel`, `initrd`, `cmdline` and `bios` files become when its next run boots them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmfs.boot import Platform, Rom, Source, firmware_files, load, load_bios
from vmfs.engine.base import Machine, Vcpu
from vmfs.machine.images import Images
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid

# What a kernel is told of a machine without devices: its RAM.
_BARE = {"serial": (), "ps2": False, "rtc": False, "vga": False, "power_button": False, "acpi": False}


@dataclass(frozen=True, slots=True)
class Booted:
    """What was done: a sentence, where RAM was written (address, size), what is to be mapped read-only, and what the
    firmware asks for by name."""

    how: str
    written: tuple[tuple[int, int], ...]
    rom: Rom | None
    files: Mapping[str, bytes]


def boot(images: Images, memory: Memory, machine: Machine, cpus: Sequence[Vcpu], *, has_devices: bool) -> Booted:
    """Load the images, and set the first CPU to where they begin. Invalid for what cannot be: nothing has changed."""
    is_bare = {} if has_devices else _BARE
    platform = Platform(memory.size, len(cpus), **is_bare)  # type: ignore[arg-type]
    bios = _source(images, "bios")
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


def _source(images: Images, name: str) -> Source | None:
    image = images[name]
    return Source(image.fd, image.size, name) if image.size else None


def _shadow(rom: Rom) -> tuple[tuple[int, int], ...]:
    size = min(len(rom.data), 128 << 10)
    return (((1 << 20) - size, size),)
