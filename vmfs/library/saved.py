"""A library's machine as bytes, to be made again in another process or on another host, where its engine is.

The bytes are `MAGIC`; a zstd frame, which has a checksum, of the length of the head, the head in msgpack (`Saved`) and
the pages; and `_END`, by which one that was cut is known. They are written and read piece by piece, since a machine may
have much memory.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import zstandard

from vmfs.library.memory import TABLES, ZEROS, Region
from vmfs.memory.mapping import PAGE
from vmfs.words.errors import Invalid, Unsupported, VmfsError

MAGIC = b"vmfs library 2\n"
_END = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + b"library\0"  # a frame that zstd skips (RFC 8878, 3.1.2)
_MOST = 1 << 32  # bytes that the pages may come to
_HEAD_MOST = 1 << 28
_REGIONS_MOST = 255  # and that of the tables
_LENGTH = struct.Struct("<Q")
_STEP = 1 << 20


class Saved(msgspec.Struct):
    """The head."""

    mode: str
    engine: str
    exceptions: str
    regions: list[tuple[int, int, bool, str]]
    """address, size, whether it is read-only, name"""
    machine: dict[str, bytes]
    cpu: dict[str, bytes]
    pages: list[int]
    """The addresses, in order, of those that are no zeros; their bytes come after the head."""

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(region, offset in it, bytes) of each run of pages. Invalid where a page is in no region."""
        at = 0
        while at < len(self.pages):
            page, first = self.pages[at], at
            number = next((n for n, (start, size, _, _) in enumerate(self.regions) if 0 <= page - start < size), -1)
            if number < 0 or page % PAGE:
                raise Invalid(f"the saved machine has a page at {page:#x}, where it has no memory")
            start, size, _, _ = self.regions[number]
            while at < len(self.pages) and self.pages[at] == page + (at - first) * PAGE < start + size:
                at += 1
            yield number, page - start, (at - first) * PAGE


def write(machine: Any, out: Any) -> None:
    """What the machine is now, into a file: registers, memory, the access that waits. Hooks are not in it. Unsupported
    for one that runs a Linux program."""
    if getattr(machine, "linux", None) is not None:
        raise Unsupported("a machine that runs a Linux program cannot be saved: what the program has open is not in it")
    states, cpu, touched = machine._what_it_is()
    memory = machine.mem
    own = [region for region in memory.regions if region.name == TABLES]  # each engine has that elsewhere
    saved = Saved(
        mode=machine.mode,
        engine=machine.engine,
        exceptions=machine.exceptions,
        regions=[(r.address, r.size, r.read_only, r.name) for r in memory.regions if r not in own],
        machine=states,
        cpu=cpu,
        pages=[page for page in sorted(touched) if memory.find(page) not in own and memory.read(page, PAGE) != ZEROS],
    )
    head = msgspec.msgpack.encode(saved)
    out.write(MAGIC)
    with zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(out, closefd=False) as packed:
        packed.write(_LENGTH.pack(len(head)) + head)
        for number, offset, size in saved.pieces():
            start, end = saved.regions[number][0] + offset, saved.regions[number][0] + offset + size
            for at in range(start, end, _STEP):
                packed.write(memory.read(at, min(_STEP, end - at)))
    out.write(_END)


def read(source: Any, begin: Callable[[Saved], Callable[[int, int, memoryview], object]]) -> Saved:
    """A file that is open for reading. `begin(head)` returns what puts bytes into a region of the head's, at an offset.
    Invalid, with a sentence, for what is no saved machine, and for one that is damaged or cut."""
    if source.read(len(MAGIC)) != MAGIC:
        raise Invalid("that is no saved machine of the library")
    source.seek(-len(_END), os.SEEK_END)
    if source.read() != _END:
        raise Invalid("the saved machine of the library is cut")
    source.seek(len(MAGIC))
    try:
        packed = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(source)
        (size,) = _LENGTH.unpack(_take(packed, bytearray(_LENGTH.size)))
        if not 0 < size <= _HEAD_MOST:
            raise Invalid(f"that is no saved machine of the library: its head has {size} bytes")
        saved = msgspec.msgpack.decode(_take(packed, bytearray(size)), type=Saved)
        _check(saved)
        put, room = begin(saved), memoryview(bytearray(_STEP))
        for number, offset, size in saved.pieces():
            for at in range(0, size, _STEP):
                put(number, offset + at, _take(packed, room[: min(_STEP, size - at)]))
        if packed.read(1):  # up to the checksum
            raise Invalid("the saved machine has more pages than it lists")
    except (zstandard.ZstdError, msgspec.MsgspecError, EOFError) as failure:
        raise Invalid(f"that is no saved machine of the library, or it is damaged: {failure}") from None
    return saved


def _take(packed: Any, room: Any) -> Any:
    """Fill it with the next bytes."""
    view = memoryview(room)
    while view:
        done = packed.readinto(view)
        if not done:
            raise EOFError("it ends too early")
        view = view[done:]
    return room


def _check(saved: Saved) -> None:
    if len(saved.pages) * PAGE > _MOST:
        raise Invalid(f"the saved machine has more than {_MOST} bytes of pages")
    if len(saved.regions) > _REGIONS_MOST or sum(size for _, size, _, _ in saved.regions) > _MOST * 16:
        raise Invalid("the saved machine has more memory than a machine may have")
    if any(size <= 0 or size % PAGE or address < 0 or address % PAGE for address, size, _, _ in saved.regions):
        raise Invalid("the saved machine has memory that is no whole pages")


def load(cls: Any, data: bytes, engine: str | None) -> Any:
    """The machine, of a class, that was saved. Invalid, with a sentence, for anything else."""
    made: list[Region] = []

    def put(number: int, offset: int, piece: memoryview) -> None:
        made[number].view[offset : offset + len(piece)] = piece

    def begin(saved: Saved) -> Callable[[int, int, memoryview], None]:
        made.extend(Region(at, size, read_only=is_rom, name=name) for at, size, is_rom, name in saved.regions)
        return put

    saved = read(io.BytesIO(data), begin)
    return _machine(cls, saved, made, engine)


def load_over(cls: Any, saved: Saved, grounds: list[int], engine: str | None) -> Any:
    """The machine whose memory is private over these memfds, one a region, which nobody writes any more."""
    made = [
        Region(address, size, read_only=is_rom, name=name, ground=fd)
        for (address, size, is_rom, name), fd in zip(saved.regions, grounds, strict=True)
    ]
    machine = _machine(cls, saved, made, engine)
    machine._begin_over_grounds()
    return machine


def _machine(cls: Any, saved: Saved, regions: list[Region], engine: str | None) -> Any:
    machine = cls(saved.mode, engine=engine or saved.engine, exceptions=saved.exceptions)
    try:
        for region in regions:
            machine.mem.map(region)
        machine._put_states(saved.machine, saved.cpu)
    except BaseException as failure:
        machine.close()
        if isinstance(failure, VmfsError):
            raise Invalid(f"the saved machine has what this engine does not take: {failure}") from None
        if isinstance(failure, KeyError | TypeError | ValueError | OverflowError):
            raise Invalid("the saved machine has a state that this engine does not know") from None
        raise
    return machine
