"""The memory of a library's machine: what was mapped, at guest-physical addresses, and nothing else."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from vmfs.engine.base import Machine as EngineMachine
from vmfs.memory.layers import extents
from vmfs.memory.mapping import PAGE, Mapping
from vmfs.words.errors import AlreadyThere, BadAddress, Invalid, LimitReached

ZEROS = bytes(PAGE)
TABLES = "tables"  # the name of the region that a machine makes by itself
_SLOTS_MOST = 256
_WRITTEN = re.compile(rb"[^\0]")  # a byte of a dirty log
_BITS = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))


class Region:
    """`size` bytes at `address`, zeros at first; or, private over it, what the memfd `ground` has, which nobody writes
    any more."""

    __slots__ = ("_fd", "_is_private", "address", "end", "mapping", "name", "read_only", "size", "view")

    def __init__(
        self, address: int, size: int, *, read_only: bool = False, name: str = "", ground: int | None = None
    ) -> None:
        self.address, self.size, self.end = address, size, address + size
        self.read_only, self.name = read_only, name
        self._is_private = ground is not None
        if ground is None:
            self._fd = os.memfd_create("vmfs-library", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, size)
        else:
            self._fd = os.dup(ground)
        self.mapping = Mapping(self._fd, size, private=self._is_private)
        self.view = self.mapping.view

    def touched(self) -> Iterator[int]:
        """The addresses of the pages that were ever written; those over a ground are not among them."""
        for start, end in extents(self._fd, 0, self.size):
            yield from range(self.address + start, self.address + end, PAGE)

    def as_mapped(self, page: int) -> bytes:
        """A page as it was at first."""
        return os.pread(self._fd, PAGE, page - self.address) if self._is_private else ZEROS

    def __del__(self, close: object = os.close) -> None:
        close(self._fd)  # type: ignore[operator]

    def __repr__(self) -> str:
        return f"<{self.address:#x}-{self.end - 1:#x}{' read-only' * self.read_only}{self.name and f' {self.name}'}>"


class Memory:
    """`memory[a]` is a byte, `memory[a:b]` bytes; both can be set. BadAddress where something is not mapped, and then
    nothing was written. What is written here the guest sees at once, as code, too."""

    def __init__(self, machine: EngineMachine) -> None:
        self._machine = machine
        self.regions: list[Region] = []  # by address
        self._starts: list[int] = []
        self._slots: dict[Region, int] = {}
        self._own: set[int] = set()  # addresses of pages that were written here

    # ---- what there is

    def map(self, region: Region) -> None:
        """AlreadyThere where something of it is mapped."""
        if region.address % PAGE or region.size % PAGE or region.size <= 0:
            raise Invalid(f"memory is mapped in pages of {PAGE} bytes, and not at {region.address:#x}")
        for other in self.regions:
            if region.address < other.end and other.address < region.end:
                raise AlreadyThere(f"{region} is where {other} is already")
        slot = next((slot for slot in range(_SLOTS_MOST) if slot not in self._slots.values()), None)
        if slot is None:
            raise LimitReached(f"a machine has up to {_SLOTS_MOST} pieces of memory")
        self._machine.map_memory(slot, region.address, region.mapping, 0, region.size, read_only=region.read_only)
        self._slots[region] = slot
        self.regions.append(region)
        self._sort()

    def unmap(self, region: Region) -> None:
        self._machine.map_memory(self._slots.pop(region), 0, 0, 0, 0)
        self.regions.remove(region)
        self._own = {page for page in self._own if not region.address <= page < region.end}
        self._sort()

    def _sort(self) -> None:
        self.regions.sort(key=lambda region: region.address)
        self._starts = [region.address for region in self.regions]

    def find(self, address: int) -> Region | None:
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self.regions[index].end:
            return self.regions[index]
        return None

    def __contains__(self, address: int) -> bool:
        return self.find(address) is not None

    # ---- its bytes

    def read(self, address: int, size: int) -> bytes:
        region = self.find(address)
        if region is not None and 0 <= size <= region.end - address:
            at = address - region.address
            return bytes(region.view[at : at + size])
        return b"".join(bytes(part) for part in self._parts(address, size))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        size = len(data)
        region = self.find(address)
        if region is not None and size <= region.end - address:
            at = address - region.address
            region.view[at : at + size] = data
        else:
            done = 0
            for part in list(self._parts(address, size)):
                part[:] = data[done : done + len(part)]
                done += len(part)
        if size:
            self._own.update(range(address & -PAGE, address + size, PAGE))
            self._machine.memory_written(address, size)

    def _parts(self, address: int, size: int) -> Iterator[memoryview]:
        if size < 0:
            raise Invalid(f"memory[{address:#x}:{address + size:#x}] ends before it begins")
        while size:
            region = self.find(address)
            if region is None:
                raise BadAddress(f"there is no memory at {address:#x}")
            here = min(size, region.end - address)
            at = address - region.address
            yield region.view[at : at + here]
            address, size = address + here, size - here

    def __getitem__(self, where: int | slice) -> int | bytes:
        if isinstance(where, slice):
            start, stop = _bounds(where)
            return self.read(start, stop - start)
        return self.read(where, 1)[0]

    def __setitem__(self, where: int | slice, value: int | bytes | bytearray | memoryview) -> None:
        if not isinstance(where, slice):
            self.write(where, bytes((value,)))  # type: ignore[arg-type]
            return
        if isinstance(value, int):
            raise Invalid("a slice of memory is set to bytes, and one address to a number")
        start, stop = where.start, where.stop
        if stop is not None and (stop < start or len(value) != stop - start):
            raise Invalid(f"{len(value)} bytes do not fit into memory[{start:#x}:{stop:#x}]")
        _bounds(slice(start, start + len(value), where.step))
        self.write(start, value)

    # ---- what was written

    def take_written(self) -> set[int]:
        """The addresses of the pages that the guest or `write` has written since the last time."""
        found, self._own = self._own, set()
        for region in self.regions:
            if not region.read_only:
                log = self._machine.dirty_log(self._slots[region])
                for match in _WRITTEN.finditer(log):
                    byte = match.start()
                    found.update(region.address + (8 * byte + bit) * PAGE for bit in _BITS[log[byte]])
        return found

    def touched(self) -> set[int]:
        """The addresses of the pages that were ever written."""
        return {page for region in self.regions if region.name != TABLES for page in region.touched()}

    def put(self, pages: Iterable[int], image: dict[int, bytes]) -> None:
        """Have these pages be as they are in `image`, or, where that has none, as they were mapped."""
        region, wrote = None, self._machine.memory_written
        for page in pages:
            if region is None or not region.address <= page < region.end:
                region = self.find(page)
                if region is None:
                    continue
            at = page - region.address
            data = image.get(page)
            region.view[at : at + PAGE] = region.as_mapped(page) if data is None else data
            wrote(page, PAGE)


def _bounds(where: slice) -> tuple[int, int]:
    if where.start is None or where.stop is None or where.step not in (None, 1) or where.start < 0:
        raise Invalid("a slice of memory has a first address and one after the last, and no step")
    return where.start, where.stop
