"""Where scripts/fetch_kernels.sh and fetch_root.sh put what tests boot: Debian's kernels, busybox, iPXE, memtest86+,
and a small Debian.

Debian's System.map is in the packages of debugging symbols only (hundreds of MB), so there is none here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "kernels"
BUSYBOX = FOLDER / "busybox"
IPXE = FOLDER / "ipxe.lkrn"  # has the header of a bzImage
MEMTEST = FOLDER / "memtest.bin"  # as a bzImage, too
MEMTEST_ISO = FOLDER / "memtest.iso"
EFI = FOLDER.parent / "efi"  # shimx64.efi, grubx64.efi, systemd-bootx64.efi: scripts/fetch_efi.sh
DEBIAN = FOLDER.parent / "debian"  # the unpacked packages of a root


@dataclass(frozen=True, slots=True)
class Kernel:
    """A package's kernel: `image` is a bzImage, `modules` the folder that is /lib/modules/RELEASE."""

    name: str
    folder: Path = FOLDER

    @property
    def image(self) -> Path:
        return self.folder / self.name / "vmlinuz"

    @property
    def config(self) -> Path:
        return self.folder / self.name / "config"

    @property
    def modules(self) -> Path:
        return self.folder / self.name / "modules"

    @property
    def release(self) -> str:
        return (self.folder / self.name / "release").read_text().strip()


CLOUD = Kernel("cloud")  # linux-image-cloud-amd64: smaller, boots faster; has no 9p
GENERIC = Kernel("generic")  # linux-image-amd64, without modules for hardware



def _reason_against(stamp: Path, script: str) -> str | None:
    """Why no Linux is booted here, or None."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        return "`make asan`: with sanitizers a Linux takes minutes to boot"
    return None if stamp.exists() else f"{stamp.parent} is not there: scripts/{script} could not make it"


_NO_KERNELS = _reason_against(FOLDER / "stamp", "fetch_kernels.sh")
_NO_DEBIAN = _reason_against(DEBIAN.with_suffix(".stamp"), "fetch_root.sh")
needs_kernels = pytest.mark.skipif(_NO_KERNELS is not None, reason=str(_NO_KERNELS))
needs_debian = pytest.mark.skipif(_NO_DEBIAN is not None, reason=str(_NO_DEBIAN))
