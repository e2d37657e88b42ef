"""Platform: what firmware would know of the machine, and tells a kernel: its memory map and what ACPI lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vmfs.devices.chipset import ECAM_SIZE, I440FX, Chipset
from vmfs.memory.ram import regions_of

# E820 types (ACPI Specification 6.4, 15.2, table 15.3). Multiboot's and PVH's memory maps use the same numbers.
USABLE, RESERVED = 1, 2

# The first MiB. The BIOS's data and the interrupt vectors in the first page are RAM to a kernel that has its own.
BIOS_DATA_END = 0x500
EBDA = 0x9_FC00  # extended BIOS data area, 1 KiB at the end of conventional memory
VIDEO = 0xA_0000
FIRMWARE = 0xF_0000  # ACPI's and the multiprocessor tables, where firmware's code is on a PC
HIGH = 0x10_0000


class Range(NamedTuple):
    """`size` bytes of guest-physical addresses, of an E820 type."""

    address: int
    size: int
    type: int

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(frozen=True, slots=True)
class Platform:
    """A PC as kernels are told of it. `serial` are the ports' (base, IRQ) in order; `memory_size` is all RAM, which
    lies in `vmfs.memory.ram.regions_of` it."""

    memory_size: int
    cpus: int = 1
    serial: tuple[tuple[int, int], ...] = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
    parallel: tuple[tuple[int, int], ...] = ((0x378, 7),)
    ps2: bool = True  # an 8042 with keyboard and mouse
    rtc: bool = True
    vga: bool = True  # a text screen at B8000
    power_button: bool = True  # the fixed one, of PM1
    acpi: bool = True  # the interrupt controllers, PCI and PM registers that the tables describe
    uuid: bytes = bytes(16)  # RFC 9562, in network order
    processor_id: bytes = bytes(8)  # EAX and EDX of CPUID's leaf 1
    processor: str = ""  # its brand
    chipset: Chipset = I440FX

    @property
    def e820(self) -> tuple[Range, ...]:
        """The memory map, in order of addresses. Hole is what is not listed: the video memory, devices."""
        low, *high = regions_of(self.memory_size)
        top = low.end
        ranges = [
            Range(0, min(EBDA, top), USABLE),
            Range(EBDA, VIDEO - EBDA, RESERVED),
            Range(FIRMWARE, HIGH - FIRMWARE, RESERVED),
        ]
        if top > HIGH:
            ranges.append(Range(HIGH, top - HIGH, USABLE))
        if self.chipset.ecam:
            ranges.append(Range(self.chipset.ecam, ECAM_SIZE, RESERVED))
        ranges += (Range(one.address, one.size, USABLE) for one in high)
        return tuple(ranges)

    @property
    def extended(self) -> int:
        """Bytes of RAM from 1 MiB on, up to the first hole."""
        return max(regions_of(self.memory_size)[0].end - HIGH, 0)
