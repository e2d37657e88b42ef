"""Formats of disk images other than raw, and files that are compressed: what tells each, by its first bytes."""

from __future__ import annotations

HEAD = 512  # bytes that tell

COMPRESSED = ("gz", "xz", "zstd")
FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi")
_MAGIC = (
    (0, b"\x1f\x8b", "gz"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)


def format_of(head: bytes) -> str:
    """The name of one of them; `raw` for everything else."""
    return next((name for at, magic, name in _MAGIC if head[at:].startswith(magic)), "raw")
