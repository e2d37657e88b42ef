"""A library's machine as bytes, to be made again in another process or on another host, where its engine is.

The bytes are `MAGIC` and a zstd frame, which has a checksum, of a msgpack map: see `_Saved`.
"""

from __future__ import annotations

from typing import Any

import msgspec
import zstandard

from vmfs.memory.mapping import PAGE
from vmfs.words.errors import Invalid, Unsupported, VmfsError

MAGIC = b"vmfs library 1\n"
_MOST = 1 << 32  # bytes that a machine may come to
_TABLES = "tables"  # the region that the machine makes by itself


class _Saved(msgspec.Struct):
    mode: str
    engine: str
    exceptions: str
    regions: list[tuple[int, int, bool, str]]
    """address, size, whether it is read-only, name"""
    machine: dict[str, bytes]
    cpu: dict[str, bytes]
    pages: list[int]
    """The addresses of those that are no zeros."""
    data: bytes
    """Their bytes, one page after the other."""


def save(machine: Any) -> bytes:
    """What the machine is now: registers, memory, the access that waits. Hooks are not in it. Unsupported for one that
    runs a Linux program."""
    if getattr(machine, "linux", None) is not None:
        raise Unsupported("a machine that runs a Linux program cannot be saved: what the program has open is not in it")
    snapshot = machine.snapshot()
    pages = sorted(page for page, data in snapshot.pages.items() if data.count(0) < PAGE)
    saved = _Saved(
        mode=machine.mode,
        engine=machine.engine,
        exceptions=machine.exceptions,
        regions=[(r.address, r.size, r.read_only, r.name) for r in snapshot.regions if r.name != _TABLES],
        machine=snapshot.machine,
        cpu=snapshot.cpu,
        pages=pages,
        data=b"".join(snapshot.pages[page] for page in pages),
    )
    return MAGIC + zstandard.ZstdCompressor(level=3, write_checksum=True).compress(msgspec.msgpack.encode(saved))


def load(cls: Any, data: bytes, engine: str | None) -> Any:
    """The machine, of a class, that was saved. Invalid, with a sentence, for anything else."""
    if not data.startswith(MAGIC):
        raise Invalid("that is no saved machine of the library")
    try:
        packed = data[len(MAGIC) :]
        size = zstandard.frame_content_size(packed)
        if not 0 <= size <= _MOST:
            raise Invalid(f"that is no saved machine of the library: it has no size, or one above {_MOST} bytes")
        saved = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(packed), type=_Saved)
    except (zstandard.ZstdError, msgspec.MsgspecError) as failure:
        raise Invalid(f"that is no saved machine of the library, or it is damaged: {failure}") from None
    if len(saved.data) != len(saved.pages) * PAGE or any(page % PAGE for page in saved.pages):
        raise Invalid("the pages of the saved machine are not those that it lists")
    if sum(size for _, size, _, _ in saved.regions) > _MOST * 16:
        raise Invalid("the saved machine has more memory than a machine may have")
    machine = cls(saved.mode, engine=engine or saved.engine, exceptions=saved.exceptions)
    try:
        for address, size, read_only, name in saved.regions:
            machine.map(address, size, read_only=read_only, name=name)
        for number, page in enumerate(saved.pages):
            machine.mem.write(page, saved.data[number * PAGE : (number + 1) * PAGE])
        _put(machine, saved)
    except BaseException:
        machine.close()
        raise
    return machine


def _put(machine: Any, saved: _Saved) -> None:
    try:
        machine._put_states(saved.machine, saved.cpu)
    except VmfsError as failure:
        raise Invalid(f"the saved machine has a state that this engine does not take: {failure}") from None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Invalid("the saved machine has a state that this engine does not know") from None
