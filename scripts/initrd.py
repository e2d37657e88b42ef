"""initrd.py BUSYBOX OUT: a root for the demo's Linux: busybox and an /init that ends in a shell on the serial port.

A cpio archive, format newc: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import stat
import sys
from pathlib import Path

INIT = b"""#!/bin/sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/bin PS1='guest# '
echo 'Hello from a directory.' > /dev/tty0
echo 'guest: up'
exec setsid cttyhack sh
"""
DIRECTORY, FILE, LINK, TERMINAL = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755, stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o600
CONSOLE = (5, 1)


def main() -> None:
    busybox, out = map(Path, sys.argv[1:])
    entries = [(name, DIRECTORY, b"", (0, 0)) for name in ("bin", "dev", "proc", "tmp")]
    entries += [
        ("dev/console", TERMINAL, b"", CONSOLE),
        ("bin/busybox", FILE, busybox.read_bytes(), (0, 0)),
        ("bin/sh", LINK, b"busybox", (0, 0)),
        ("init", FILE, INIT, (0, 0)),
        ("TRAILER!!!", 0, b"", (0, 0)),
    ]
    out.write_bytes(b"".join(entry(number, *each) for number, each in enumerate(entries, 1)))


def entry(number: int, path: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    name = path.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
    return padded(b"070701" + b"".join(b"%08X" % field for field in fields) + name) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


if __name__ == "__main__":
    main()
