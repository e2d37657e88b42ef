"""Builds an initramfs: a cpio archive (format newc) of busybox, kernel modules, an /init and more files.

The format: Linux Documentation/driver-api/early-userspace/buffer-format.rst. It is not compressed, which takes a
kernel that is emulated the least time.

By hand: `PYTHONPATH=tests .venv/bin/python -m pc.initramfs OUT [--kernel cloud] [--modules virtio_blk,...]`.
"""

from __future__ import annotations

import argparse
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from pc.kernels import BUSYBOX, CLOUD, GENERIC, Kernel

_ALIGNMENT = 4
_MODINFO = re.compile(rb"(?<=\0)depends=([\w,\-]*)\0")

# Debian's busybox finds its own applets without links to them, once /proc is there.
_PROLOGUE = """\
#!/bin/sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/bin HOME=/ PS1='guest# '
"""

SHELL = "exec setsid cttyhack sh\n"  # a shell with job control on the console
VIRTIO = ("virtio_pci", "virtio_blk", "virtio_net")


class Archive:
    """A cpio archive, written from front to back."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0
        self._made: set[str] = set()

    def add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """A file of type and permissions `mode`; the folders above it are made first, as they are missing."""
        path = path.strip("/")
        folder = path.rpartition("/")[0]
        if folder and folder not in self._made:
            self.add(folder, stat.S_IFDIR | 0o755)
        if path in self._made:
            raise ValueError(f"{path} is in the archive already")
        self._made.add(path)
        self._entry(path, mode, data, device)

    def _entry(self, path: str, mode: int, data: bytes, device: tuple[int, int]) -> None:
        self._count += 1
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._count, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += (_padded(header + name), _padded(data))

    def bytes(self) -> bytes:
        """The archive with its trailer. Nothing can be added afterwards."""
        self._entry("TRAILER!!!", 0, b"", (0, 0))
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def with_dependencies(kernel: Kernel, names: Iterable[str]) -> list[Path]:
    """The files of modules and of all that they depend on, in the order in which they can be loaded.

    A module that is built into the kernel has no file and is left out.
    """
    files = {path.stem.replace("-", "_"): path for path in kernel.modules.rglob("*.ko")}
    builtin = {Path(line).stem.replace("-", "_") for line in (kernel.modules / "modules.builtin").read_text().split()}
    order: list[Path] = []

    def visit(name: str) -> None:
        name = name.replace("-", "_")
        if name in builtin:
            return
        if name not in files:
            raise ValueError(f"{kernel.name} has no module {name}")
        if files[name] not in order:
            found = _MODINFO.search(files[name].read_bytes())
            for one in filter(None, (found[1] if found else b"").decode().split(",")):
                visit(one)
            order.append(files[name])

    for name in names:
        visit(name)
    return order


def build(
    script: str = SHELL,
    *,
    kernel: Kernel = CLOUD,
    modules: Iterable[str] = (),
    files: Mapping[str, bytes] | None = None,
    busybox: Path = BUSYBOX,
) -> bytes:
    """An initramfs whose /init mounts /proc, /sys and /dev, loads `modules`, and then is `script`, in sh.

    `files`: more of them by their paths, all executable. When the script ends, the kernel panics: end it with
    `poweroff -f` or `exec`.
    """
    archive = Archive()
    for folder in ("proc", "sys", "dev", "mnt", "tmp"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    lines = [_PROLOGUE]
    for path in with_dependencies(kernel, modules):
        archive.add(f"lib/modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes())
        lines.append(f"insmod /lib/modules/{path.name}\n")
    archive.add("init", stat.S_IFREG | 0o755, "".join((*lines, script)).encode())
    for path, data in (files or {}).items():
        archive.add(path, stat.S_IFREG | 0o755, data)
    return archive.bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description="write an initramfs of busybox")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kernel", choices=(CLOUD.name, GENERIC.name), default=CLOUD.name)
    parser.add_argument("--modules", default=",".join(VIRTIO), help="names, with commas between them")
    parser.add_argument("--script", default=SHELL, help="what /init does (default: a shell)")
    arguments = parser.parse_args()
    names = [name for name in arguments.modules.split(",") if name]
    arguments.out.write_bytes(build(arguments.script, kernel=Kernel(arguments.kernel), modules=names))


if __name__ == "__main__":
    main()
