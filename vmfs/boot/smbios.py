"""SMBIOS tables: what `dmidecode` tells of a machine: its maker and UUID, its processor, its memory.

They are in RAM for a kernel that is started without firmware. Firmware gets them by fw_cfg, puts them where it likes,
and describes itself (type 0).

Source: DMTF DSP0134, System Management BIOS Reference Specification 3.6: 5.2.1 (entry point), 6 (structures), 7.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vmfs.boot.acpi import checksum
from vmfs.boot.platform import Platform
from vmfs.memory.ram import regions_of

MAKER, PRODUCT = "vmfs", "vmfs PC"
_VERSION = 2, 8
_ENTRY_SIZE = 31
_MODULE = 16 << 30  # bytes of a memory device at the most
_KIB_MOST, _MIB_MOST = 0x8000_0000, 0x7FFF  # the field beside has more
_NONE = 0xFFFE  # a handle of nothing: no errors are told of
_ARRAY = 0x1000
_RELEASED = "11/30/2026"


def tables(platform: Platform, *, with_firmware: bool) -> bytes:
    """All structures, to the end's. `with_firmware`: of the firmware, too, in the place of which kernels are loaded."""
    return b"".join(_structures(platform, with_firmware))


def entry_point(data: bytes, address: int) -> bytes:
    """Of these structures at `address`. It belongs on a multiple of 16 in F0000-FFFFF."""
    sizes = list(_sizes(data))
    rest = struct.pack("<5sxHIHB", b"_DMI_", len(data), address, len(sizes), _VERSION[0] << 4 | _VERSION[1])
    rest = rest[:5] + bytes((checksum(rest),)) + rest[6:]
    head = struct.pack("<4sxBBBHB5x", b"_SM_", _ENTRY_SIZE, *_VERSION, max(sizes), 0)
    return head[:4] + bytes((checksum(head + rest),)) + head[5:] + rest


def for_memory(platform: Platform, address: int) -> bytes:
    """Entry point and structures, for `address`, a multiple of 16."""
    data = tables(platform, with_firmware=True)
    return entry_point(data, address + 32) + b"\0" + data


def for_firmware(platform: Platform) -> dict[str, bytes]:
    """The files of fw_cfg."""
    data = tables(platform, with_firmware=False)
    return {"etc/smbios/smbios-anchor": entry_point(data, 0), "etc/smbios/smbios-tables": data}


def _sizes(data: bytes) -> Iterator[int]:
    """Of each structure with its strings."""
    at = 0
    while at < len(data):
        end = data.index(b"\0\0", at + data[at + 1]) + 2
        yield end - at
        at = end


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """Fields refer to strings by their numbers, from 1 on (6.1.3)."""
    text = b"".join(one.encode("ascii", "replace") + b"\0" for one in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + text + b"\0"


def _structures(platform: Platform, with_firmware: bool) -> Iterator[bytes]:
    if with_firmware:
        pci, selectable, no_more = 1 << 7, 1 << 16, 0xFF
        acpi, is_virtual = 1, 1 << 4
        body = struct.pack("<BBHBBQBBBBBB", 1, 2, 0xF000, 3, 0, pci | selectable, acpi, is_virtual, 0, 0,
                           no_more, no_more)  # fmt: skip
        yield _structure(0, 0, body, MAKER, "none: a kernel is started directly", _RELEASED)
    uuid = platform.uuid
    wire = uuid[3::-1] + uuid[5:3:-1] + uuid[7:5:-1] + uuid[8:]  # 7.2.1: the first three fields are little-endian
    power_switch = 6
    yield _structure(1, 0x100, struct.pack("<BBBB16sBBB", 1, 2, 3, 0, wire, power_switch, 0, 0), MAKER, PRODUCT, "1")
    other, safe, no_security = 1, 3, 3
    body = struct.pack("<BBBBBBBBBIBBBBB", 1, other, 0, 0, 0, safe, safe, safe, no_security, 0, 0, 0, 0, 0, 0)
    yield _structure(3, 0x300, body, MAKER)
    yield _processor(platform)
    yield from _memory(platform)
    yield _structure(32, 0x2000, bytes(7))  # booted without errors
    yield _structure(127, 0x7F00, b"")


def _processor(platform: Platform) -> bytes:
    """One package, as CPUID has it (vmfs.machine.topology)."""
    central, other_family, other_upgrade, no_cache = 3, 1, 1, 0xFFFF
    populated_and_enabled = 0x41
    is_64_bit, cores = 1 << 2, min(platform.cpus, 0xFF)
    several = 1 << 3 if platform.cpus > 1 else 0
    body = struct.pack(
        "<BBBB8sBBHHHBBHHHBBBBBBHH", 1, central, other_family, 2, platform.processor_id, 3, 0, 0, 0, 0,
        populated_and_enabled, other_upgrade, no_cache, no_cache, no_cache, 0, 0, 0, cores, cores, cores,
        is_64_bit | several, other_family,
    )  # fmt: skip
    return _structure(4, 0x400, body, "CPU 0", MAKER, platform.processor or "x86-64")


def _memory(platform: Platform) -> Iterator[bytes]:
    size = platform.memory_size
    count = -(-size // _MODULE)
    on_board, system_memory, no_correction = 3, 3, 3
    kib = size >> 10
    body = struct.pack("<BBBIHHQ", on_board, system_memory, no_correction, min(kib, _KIB_MOST), _NONE, count,
                       size if kib >= _KIB_MOST else 0)  # fmt: skip
    yield _structure(16, _ARRAY, body)
    unknown_width, dimm, ram, other = 0xFFFF, 9, 7, 2
    for number in range(count):
        mib = min(_MODULE, size - number * _MODULE) >> 20
        wide = mib if mib >= _MIB_MOST else 0
        body = struct.pack(
            "<HHHHHBBBBBHHBBBBBIHHHH", _ARRAY, _NONE, unknown_width, unknown_width, min(mib, _MIB_MOST), dimm, 0, 1, 0,
            ram, other, 0, 2, 0, 0, 0, 0, wide, 0, 0, 0, 0,
        )  # fmt: skip
        yield _structure(17, 0x1100 + number, body, f"DIMM {number}", MAKER)
    for number, region in enumerate(regions_of(size)):
        first, last = region.address >> 10, (region.end >> 10) - 1
        fits = last < 0xFFFF_FFFF
        small, large = ((first, last), (0, 0)) if fits else ((0xFFFF_FFFF,) * 2, (region.address, region.end - 1))
        yield _structure(19, 0x1300 + number, struct.pack("<IIHBQQ", *small, _ARRAY, 1, *large))
