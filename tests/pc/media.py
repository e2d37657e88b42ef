"""Media that a BIOS boots, made of Debian's packages: GRUB's rescue ISO and floppy, ISOLINUX, SYSLINUX."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

SEABIOS = Path("/usr/share/seabios/bios.bin")
ISOLINUX = Path("/usr/lib/ISOLINUX")
MODULES = Path("/usr/lib/syslinux/modules/bios")
GRUB = Path("/usr/lib/grub/i386-pc")
# GRUB's, on the first serial port.
ON_SERIAL = "serial --unit=0 --speed=115200\nterminal_input serial\nterminal_output serial\n"


def needs(*programs: str | Path) -> pytest.MarkDecorator:
    """Skips where one of these is not there: a program of PATH, or a file."""
    path = f"{os.environ['PATH']}:/sbin:/usr/sbin"
    missing = [
        str(one)
        for one in programs
        if not (one.exists() if isinstance(one, Path) else shutil.which(one, path=path))
    ]
    return pytest.mark.skipif(bool(missing), reason=f"not there: {', '.join(missing)} (see scripts/setup.sh)")


def _run(*words: object, **options: object) -> None:
    subprocess.run(
        [str(word) for word in words], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, **options,
    )  # type: ignore[call-overload]  # fmt: skip


def _tree(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.read_bytes() if isinstance(data, Path) else data)


def grub_iso(path: Path, config: str = ON_SERIAL, files: Mapping[str, bytes | Path] | None = None) -> Path:
    """grub-mkrescue's, for a BIOS: a CD by El Torito, and a disk by its MBR."""
    tree = path.with_suffix(".d")
    _tree(tree, {"boot/grub/grub.cfg": config.encode(), **(files or {})})
    modules = "normal iso9660 biosdisk serial echo ls cat linux multiboot test reboot halt"
    _run("grub-mkrescue", "-d", GRUB, "--fonts=", "--locales=", "--themes=", f"--install-modules={modules}", "-o", path,
         tree)  # fmt: skip
    return path


def isolinux_iso(path: Path, config: str, files: Mapping[str, bytes | Path], *, hybrid: bool = False) -> Path:
    tree = path.with_suffix(".d")
    system = {
        "isolinux/isolinux.bin": ISOLINUX / "isolinux.bin",
        "isolinux/ldlinux.c32": MODULES / "ldlinux.c32",
        "isolinux/isolinux.cfg": config.encode(),
    }
    _tree(tree, {**system, **files})
    options = ("-isohybrid-mbr", ISOLINUX / "isohdpfx.bin") if hybrid else ()
    _run("xorriso", "-as", "mkisofs", "-quiet", "-o", path, "-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat",
         "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", *options, tree)  # fmt: skip
    return path


def syslinux_floppy(path: Path, config: str, files: Mapping[str, bytes | Path]) -> Path:
    """Of 1.44 MB."""
    tree = path.with_suffix(".d")
    _tree(tree, {"syslinux.cfg": config.encode(), **files})
    _run("mformat", "-C", "-f", "1440", "-i", path, "::")
    for file in sorted(tree.iterdir()):
        _run("mcopy", "-i", path, file, "::")
    _run("syslinux", "--install", path)
    return path


def grub_floppy(path: Path, config: str = ON_SERIAL) -> Path:
    """GRUB's boot sector and its core with all that it needs, on a floppy of 1.44 MB."""
    early = path.with_suffix(".cfg")
    early.write_text(config + "normal\n")
    core = path.with_suffix(".core")
    _run("grub-mkimage", "-d", GRUB, "-O", "i386-pc", "-p", "/boot/grub", "-c", early, "-o", core,
         "biosdisk", "serial", "terminal", "normal", "echo", "ls", "hexdump", "reboot", "halt")  # fmt: skip
    boot = (GRUB / "boot.img").read_bytes()
    path.write_bytes((boot + core.read_bytes()).ljust(1440 << 10, b"\0"))
    return path


def esp(path: Path, files: Mapping[str, bytes | Path], size: int = 4 << 20) -> Path:
    """A disk that is an EFI system partition, without a partition table."""
    with open(path, "wb") as image:
        image.truncate(size)
    _run("mformat", "-i", path, "-v", "ESP", "::")
    tree = path.with_suffix(".d")
    _tree(tree, files)
    _run("mcopy", "-s", "-i", path, *sorted(tree.iterdir()), "::")
    return path
