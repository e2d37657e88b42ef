"""ROMs: iPXE, by which a BIOS boots over a card; the host's, of Debian's package ipxe-qemu."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

FOLDERS = tuple(map(Path, ("/usr/lib/ipxe/qemu", "/usr/share/qemu")))
# By a card's vendor and device.
FILES: Mapping[tuple[int, int], str] = {
    (0x1AF4, 0x1041): "pxe-virtio.rom",
    (0x8086, 0x100E): "pxe-e1000.rom",
    (0x10EC, 0x8139): "pxe-rtl8139.rom",
    (0x10EC, 0x8029): "pxe-ne2k_pci.rom",
}


@functools.cache
def of(vendor: int, device: int) -> bytes:
    """Empty where there is none. Read once: a machine in its sandbox opens no file."""
    name = FILES.get((vendor, device), "")
    path = next((folder / name for folder in FOLDERS if name and (folder / name).is_file()), None)
    return b"" if path is None else path.read_bytes()


def warm_up() -> None:
    """Have all of them."""
    for card in FILES:
        of(*card)
