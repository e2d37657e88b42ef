"""A machine's RAM: one memfd, in which an offset is a guest-physical address, and one mapping of it, which the engine
and the devices use.

The memfd is mapped shared, and `mem` is that memfd. Or it is a base that nobody writes any more, mapped private: what
is written then is the mapping's alone, and snapshots and forks share the rest (docs/decisions/0010).

RAM lies in regions: up to LOW_MOST from address 0 on, and the rest from 4 GiB on, as on a PC. Between them are the BARs
of PCI, the APICs and the flash; the memfd has a hole there, which takes no memory and is nobody's.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmfs.memory.hostfile import punch
from vmfs.memory.layers import Image, Layer, bits, extents, joined, runs
from vmfs.memory.mapping import PAGE, Mapping
from vmfs.words.errors import Busy, EngineFailed, Gone, Invalid, PastEnd

DEFAULT_SIZE = 128 << 20
# Below PCI's memory, the flash, the APICs and the pages that KVM takes on Intel hosts, all of which are under 4 GiB.
LOW_MOST = 0xE000_0000
HIGH_START = 1 << 32
_STEP = 16 << 20  # bytes that are mapped anew, or copied, at a time
_ZEROS = 1 << 20
_FEW = 32  # pages that are copied back: the guest writes them again, and to give them back costs it a fault each
_MAPPINGS_MOST = 2048  # of parts of layers
F_SEAL_FUTURE_WRITE = 0x10  # Linux include/uapi/linux/fcntl.h; the fcntl module lacks it
MAXIMUM_SIZE = 1 << 39  # so that all of it has an address of 40 bits, as the emulator's CPUID says


def check_size(size: int) -> None:
    """Raises Invalid where a machine cannot have `size` bytes of RAM."""
    if size <= 0 or size % PAGE or size > MAXIMUM_SIZE:
        raise Invalid(f"RAM cannot have {size} bytes: a multiple of {PAGE} up to {MAXIMUM_SIZE}")


@dataclass(frozen=True, slots=True)
class Region:
    """`size` bytes of RAM at a guest-physical address, which is their offset in the memfd, too."""

    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


def regions_of(size: int) -> tuple[Region, ...]:
    """Where `size` bytes of RAM lie."""
    if size <= LOW_MOST:
        return (Region(0, size),)
    return Region(0, LOW_MOST), Region(HIGH_START, size - LOW_MOST)


def size_to(end: int) -> int:
    """The RAM of a machine whose last region ends there. Invalid where none does."""
    size = end if end <= LOW_MOST else end - HIGH_START + LOW_MOST
    if LOW_MOST < end <= HIGH_START:
        raise Invalid(f"mem: no RAM ends at {end:#x}: from {LOW_MOST:#x} to {HIGH_START:#x} are devices")
    return size


def room_in(regions: tuple[Region, ...], address: int) -> int:
    """How many bytes of RAM there are from an address on, up to the end of its region; none where it is no RAM."""
    return next((one.end - address for one in regions if one.address <= address < one.end), 0)


class Memory:
    """`size` bytes of guest-physical RAM in `regions`; pages cost nothing until they are touched.

    `fd` is the memfd. Clients hold mappings of it that this object knows nothing of; it stays valid
    until `close`, which gives the pages back at once, even if something still maps them (they read zeros then).
    `base`: it is private, over that image.
    """

    base: Image | None = None

    @classmethod
    def over(cls, size: int, image: Image) -> tuple[Memory, int]:
        """`size` bytes, private over an image of RAM, and which pages of it are copies: each run of pages of a layer
        over another takes a mapping, of which a process has 65,530."""
        check_size(size)
        memory = cls.__new__(cls)
        memory._sealed, memory._closed, memory._writing = True, False, threading.Lock()
        memory.written, memory.noted = lambda address, size: None, lambda: 0
        memory.size, memory.regions = size, regions_of(size)
        ground = image.layers[0]
        if image.end != memory.end or ground.pages is not None:
            raise Invalid(f"an image of RAM up to {image.end:#x} is none of {size} bytes")
        memory.mapping = Mapping(ground.fd, memory.end, private=True)
        visible = [(layer, here) for layer, here in image.parts(bits(0, memory.end // PAGE)) if layer is not ground]
        pieces = [(count, first, number) for number, (_, here) in enumerate(visible) for first, count in runs(here)]
        mapped, copied = [0] * len(visible), 0
        for at, (count, first, number) in enumerate(sorted(pieces, reverse=True)):
            fd, start, length = visible[number][0].fd, first * PAGE, count * PAGE
            if at < _MAPPINGS_MOST:
                memory.mapping.own(fd, start, length)
                mapped[number] |= bits(first, count)
            else:
                _read_all(fd, memory.mapping.view[start : start + length], start)
                copied |= bits(first, count)
        upper = [Layer(os.dup(layer.fd), its) for (layer, _), its in zip(visible, mapped, strict=True) if its]
        memory.base = Image((ground, *reversed(upper)), memory.end)
        memory.fd = os.dup(ground.fd)
        return memory, copied

    def __init__(self, size: int = DEFAULT_SIZE) -> None:
        check_size(size)
        self.fd = os.memfd_create("vmfs-mem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._sealed = False
        self._writing = threading.Lock()  # held while the way to write, and seals, are looked at and used
        self._closed = False
        self.written: Callable[[int, int], None] = lambda address, size: None  # called after this object wrote RAM
        self.noted: Callable[[], int] = lambda: 0  # the pages that are known to be written since there is a base
        try:
            self._set_size(size)
        except BaseException:
            os.close(self.fd)
            raise

    def _set_size(self, size: int) -> None:
        regions = regions_of(size)
        os.ftruncate(self.fd, regions[-1].end)
        self.mapping = Mapping(self.fd, regions[-1].end)  # where engine and devices have it
        self.size, self.regions = size, regions

    @property
    def end(self) -> int:
        """The first address after all RAM, and the size of the memfd."""
        return self.regions[-1].end

    def room(self, address: int) -> int:
        """How many bytes of RAM there are from an address on, up to the end of its region; none where it is no RAM."""
        return room_in(self.regions, address)

    def is_ram(self, address: int, length: int) -> bool:
        """Whether all of that is RAM of one region."""
        return 0 <= length <= self.room(address) or (length == 0 and 0 <= address <= self.end)

    def resize(self, size: int) -> None:
        """Before `seal` only, else Busy. What is cut off is lost, what is added is zero."""
        self._check_open()
        if size != self.size:
            self.check_resizable()
        check_size(size)
        self._set_size(size)

    def check_resizable(self) -> None:
        """Busy after `seal`."""
        if self._sealed:
            raise Busy("the machine has run: the size of its RAM is fixed")

    def seal(self) -> None:
        """Fix the size: from now on no holder of the descriptor can shrink RAM under the guest."""
        with self._writing:
            if not self._sealed:
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
                self._sealed = True

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer at the end of a region, none where there is no RAM."""
        return self.read_at(offset, min(length, self.room(offset)))

    def read_at(self, offset: int, length: int) -> bytes:
        """As the file `mem` has it: between the regions are zeros."""
        self._check_open()
        if self.base is None:
            return os.pread(self.fd, length, offset)
        return _read_private(self.mapping, self.base, offset, length)

    def write(self, offset: int, data: bytes) -> int:
        """How many bytes were written: all that fit into a region. PastEnd when none does."""
        self._check_open()
        room = self.room(offset)
        if room <= 0 and data:
            where = "past the end of RAM" if offset >= self.end else "between the parts of RAM, which ends at"
            raise PastEnd(f"mem: {offset:#x} is {where}, {self.end:#x}")
        return self._write(offset, memoryview(data)[:room])

    def write_at(self, offset: int, data: bytes) -> int:
        """As the file `mem` takes it: between the regions, too."""
        self._check_open()
        if data and offset >= self.end:
            raise PastEnd(f"mem: {offset:#x} is past the end of RAM, {self.end:#x}")
        return self._write(offset, memoryview(data)[: max(self.end - offset, 0)])

    def _write(self, offset: int, view: memoryview) -> int:
        done = 0
        with self._writing:
            if self.base is not None:
                self.mapping.view[offset : offset + len(view)] = view
                done = len(view)
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], offset + done)
        self.written(offset, done)
        return done

    def fill_holes(self, pattern: bytes) -> None:
        """Have a pattern, of a page, in all that nobody has touched; of memory that is not over an image."""
        if self.base is not None:
            return
        block = memoryview(pattern * (_ZEROS // len(pattern)))
        for region in self.regions:
            at = region.address
            for start, end in (*extents(self.fd, at, region.end), (region.end, region.end)):
                while at < start:
                    at += self._write(at, block[: min(len(block), start - at)])
                at = end

    def clear(self, offset: int, length: int) -> None:
        """Set bytes to zero; whole pages are given back instead of written."""
        self._check_open()
        first, last = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
        if first < last:
            self.write(offset, bytes(first - offset))
            if self.base is not None:
                for start, end in list(self._touched(first, last)):
                    for at in range(start, end, _ZEROS):
                        self.mapping.view[at : min(at + _ZEROS, end)] = bytes(min(_ZEROS, end - at))
            elif punch(self.fd, first, last - first):
                raise EngineFailed(f"mem: fallocate does not clear {last - first} bytes at {first:#x}")
            self.written(first, last - first)
            self.write(last, bytes(offset + length - last))
        else:
            self.write(offset, bytes(length))

    def view(self, check: Callable[[], None] = lambda: None) -> MemoryView:
        """For a thread that reads RAM for a while: it may outlive this object. `check` is called before each read, and
        raises what ends the work; what computes for long calls it, too."""
        self._check_open()
        return MemoryView(os.dup(self.fd), self.mapping, self.base, self.noted(), self.regions, check)

    @property
    def blocks(self) -> int:
        """Of 512 bytes, that what was ever touched takes."""
        return os.fstat(self.fd).st_blocks

    def extents(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of what was ever touched; between them are zeros that take no memory."""
        self._check_open()
        return extents(self.fd, 0, self.end) if self.base is None else self._touched(0, self.end)

    def _touched(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What of a private mapping may be other than zeros: what the base has, and what was written over it."""
        assert self.base is not None
        return _touched(self.base, self.noted(), start, end)

    # ---- a base, and back to it

    def become_private(self) -> None:
        """Make the memfd a base that nobody writes any more, and have it private. The guest may run meanwhile. Nobody
        else may have it mapped for writing: EngineFailed then, at the end, and it is private all the same."""
        if self.base is not None:
            return
        self.seal()
        layer = Layer(os.dup(self.fd), None)
        with self._writing:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
            self.base = Image((layer,), self.end)
        for at in range(0, self.end, _STEP):
            self.mapping.own(self.fd, at, min(_STEP, self.end - at))
        layer.seal()

    def put(self, pages: int, image: Image) -> None:
        """Have these pages be as they are in `image`. Nobody may look meanwhile."""
        view = self.mapping.view
        for layer, here in image.parts(pages):
            back = 0
            if self.base is not None:  # what was not written since is so already
                for under, its in self.base.parts(here):
                    if under is layer:
                        back |= its
                for first, count in runs(back):
                    if count > _FEW or os.preadv(
                        layer.fd, [view[first * PAGE : (first + count) * PAGE]], first * PAGE
                    ) != count * PAGE:
                        self.mapping.drop(first * PAGE, count * PAGE)
            for first, count in runs(here & ~back):
                at, end = first * PAGE, (first + count) * PAGE
                for start, stop in extents(layer.fd, at, end):
                    self._zero(at, start)
                    at = stop
                    while start < stop:
                        start += os.preadv(layer.fd, [view[start : min(start + _STEP, stop)]], start)
                self._zero(at, end)

    def _zero(self, start: int, end: int) -> None:
        """Whole pages, of which nobody is told."""
        if start >= end:
            return
        if self.base is None:
            punch(self.fd, start, end - start)
            return
        for at, stop in list(self._touched(start, end)):
            for one in range(at, stop, _ZEROS):
                self.mapping.view[one : min(one + _ZEROS, stop)] = bytes(min(_ZEROS, stop - one))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self.base is None:
                punch(self.fd, 0, self.end)  # where it fails the last unmap frees them
            else:
                self.mapping.drop(0, self.end)
                self.base = None
            os.close(self.fd)

    def _check_open(self) -> None:
        if self._closed:
            raise Gone("the machine was removed")


class MemoryView:
    """RAM, to be read through a descriptor of its own: `with memory.view() as ram`. Zeros once it is closed."""

    def __init__(
        self,
        fd: int,
        mapping: Mapping,
        base: Image | None,
        noted: int,
        regions: tuple[Region, ...],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.fd = fd
        self._mapping = mapping
        self._base = base
        self._noted = noted
        self.regions = regions
        self.check = check

    @property
    def end(self) -> int:
        """The first address after all RAM."""
        return self.regions[-1].end

    def room(self, address: int) -> int:
        """How many bytes of RAM there are from an address on, up to the end of its region; none where it is no RAM."""
        return room_in(self.regions, address)

    def __enter__(self) -> MemoryView:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer at the end of a region, none where there is no RAM."""
        self.check()
        length = min(length, self.room(offset))
        if self._base is None:
            return os.pread(self.fd, length, offset)
        return _read_private(self._mapping, self._base, offset, length)

    def extents(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of what was ever touched; between them are zeros that take no memory."""
        if self._base is None:
            return extents(self.fd, 0, self.end)
        return _touched(self._base, self._noted, 0, self.end)


def _read_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + _STEP]], offset + done)
        if not got:
            raise EngineFailed(f"an image of RAM ends at {offset + done:#x}")
        done += got


def _touched(base: Image, noted: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """When a page of a hole is written, the kernel reads it first, and the file has it; but that is clean, and may be
    dropped again."""
    written = ((first * PAGE, (first + count) * PAGE) for first, count in runs(noted))
    within = ((max(at, start), min(stop, end)) for at, stop in written if at < end and stop > start)
    return joined((within, *(extents(layer.fd, start, end) for layer in base.layers)))


def _read_private(mapping: Mapping, base: Image, offset: int, length: int) -> bytes:
    return bytes(mapping.view[offset : offset + max(min(length, base.end - offset), 0)])
