"""A machine's RAM: one memfd that the engine maps and the `mem` file is. An offset in it is a guest-physical address.

RAM lies in regions: up to LOW_MOST from address 0 on, and the rest from 4 GiB on, as on a PC. Between them are the BARs
of PCI, the APICs and the flash; the memfd has a hole there, which takes no memory and is nobody's.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmfs.memory.hostfile import punch
from vmfs.memory.mapping import PAGE, Mapping
from vmfs.words.errors import Busy, EngineFailed, Gone, Invalid, PastEnd

DEFAULT_SIZE = 128 << 20
# Below PCI's memory, the flash, the APICs and the pages that KVM takes on Intel hosts, all of which are under 4 GiB.
LOW_MOST = 0xE000_0000
HIGH_START = 1 << 32
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
    """

    def __init__(self, size: int = DEFAULT_SIZE) -> None:
        check_size(size)
        self.fd = os.memfd_create("vmfs-mem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._sealed = False
        self._closed = False
        self.written: Callable[[int, int], None] = lambda address, size: None  # called after this object wrote RAM
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
        if self._sealed and size != self.size:
            raise Busy("the machine has run: the size of its RAM is fixed")
        check_size(size)
        self._set_size(size)

    def seal(self) -> None:
        """Fix the size: from now on no holder of the descriptor can shrink RAM under the guest."""
        if not self._sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._sealed = True

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer at the end of a region, none where there is no RAM."""
        self._check_open()
        return os.pread(self.fd, min(length, self.room(offset)), offset)

    def read_file(self, offset: int, length: int) -> bytes:
        """As the file `mem` has it: between the regions are zeros."""
        self._check_open()
        return os.pread(self.fd, length, offset)

    def write(self, offset: int, data: bytes) -> int:
        """How many bytes were written: all that fit into a region. PastEnd when none does."""
        self._check_open()
        room = self.room(offset)
        if room <= 0 and data:
            where = "past the end of RAM" if offset >= self.end else "between the parts of RAM, which ends at"
            raise PastEnd(f"mem: {offset:#x} is {where}, {self.end:#x}")
        done = 0
        view = memoryview(data)[:room]
        while done < len(view):
            done += os.pwrite(self.fd, view[done:], offset + done)
        self.written(offset, done)
        return done

    def clear(self, offset: int, length: int) -> None:
        """Set bytes to zero; whole pages are given back instead of written."""
        self._check_open()
        first, last = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
        if first < last:
            self.write(offset, bytes(first - offset))
            if punch(self.fd, first, last - first):
                raise EngineFailed(f"mem: fallocate does not clear {last - first} bytes at {first:#x}")
            self.written(first, last - first)
            self.write(last, bytes(offset + length - last))
        else:
            self.write(offset, bytes(length))

    def view(self, check: Callable[[], None] = lambda: None) -> MemoryView:
        """For a thread that reads RAM for a while: it may outlive this object. `check` is called before each read, and
        raises what ends the work; what computes for long calls it, too."""
        self._check_open()
        return MemoryView(os.dup(self.fd), self.regions, check)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            punch(self.fd, 0, self.end)  # where it fails the last unmap frees them
            os.close(self.fd)

    def _check_open(self) -> None:
        if self._closed:
            raise Gone("the machine was removed")


class MemoryView:
    """RAM, to be read through a descriptor of its own: `with memory.view() as ram`. Zeros once it is closed."""

    def __init__(self, fd: int, regions: tuple[Region, ...], check: Callable[[], None] = lambda: None) -> None:
        self.fd = fd
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
        return os.pread(self.fd, min(length, self.room(offset)), offset)

    def extents(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of what was ever touched; between them are zeros that take no memory."""
        end = 0
        while end < self.end:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    return
                raise
            end = os.lseek(self.fd, start, os.SEEK_HOLE)
            yield start, end
