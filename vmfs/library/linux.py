"""Enough of Linux to run a static program for x86-64: its ELF file, its stack, and the system calls that a C library's
start, its memory and its output need. What a program does is kept from the host: it has its standard streams as bytes,
no files, no clock but that of the machine's instructions, and no randomness but a seed's.

Sources: System V ABI, AMD64, 3.4.1 (the stack), Linux arch/x86/entry/syscalls/syscall_64.tbl (the numbers).
"""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable, Mapping
from typing import Any

from vmfs.boot import elf as elf_file
from vmfs.boot.source import Source
from vmfs.library.hooks import check_engine
from vmfs.memory.mapping import PAGE
from vmfs.words.errors import BadAddress, Invalid, VmfsError
from vmfs.words.exits import Exit, Shutdown

PIE_AT = 0x4000_0000
HEAP_SIZE, STACK_SIZE, MAPS_SIZE = 64 << 20, 1 << 20, 256 << 20
STACK_AT, MAPS_AT = 0x7F_0000_0000, 0x70_0000_0000
_ARCH_SET_GS, _ARCH_SET_FS, _ARCH_GET_FS, _ARCH_GET_GS = 0x1001, 0x1002, 0x1003, 0x1004
_AT_PHDR, _AT_PHENT, _AT_PHNUM, _AT_PAGESZ, _AT_ENTRY, _AT_RANDOM = 3, 4, 5, 6, 9, 25
_MAP_FIXED = 0x10
_WORD = (1 << 64) - 1


class Linux:
    """The kernel of one program. `stdin` is read, `stdout` and `stderr` are what it has written, `code` what it ended
    with; `calls` are the numbers of the system calls that there are not."""

    def __init__(self, machine: Any, brk: int, *, stdin: bytes = b"", seed: int = 0) -> None:
        self.stdin, self.stdout, self.stderr = stdin, bytearray(), bytearray()
        self.code: int | None = None
        self.calls: list[int] = []
        self._read = 0
        self._first, self._brk, self._end = brk, brk, brk + HEAP_SIZE
        self._next = MAPS_AT
        self._random = random.Random(seed)
        machine.map(brk, HEAP_SIZE, name="heap")
        machine.map(MAPS_AT, MAPS_SIZE, name="maps")
        machine.linux = self
        machine.hook_syscall(self._call)

    def _call(self, machine: Any) -> Exit | None:
        handler = _CALLS.get(machine.rax)
        if handler is None:
            self.calls.append(machine.rax)
            machine.rax = -errno.ENOSYS
            return None
        arguments = machine.rdi, machine.rsi, machine.rdx, machine.r10, machine.r8, machine.r9
        try:
            result = handler(self, machine, *arguments)
        except BadAddress:
            result = -errno.EFAULT
        machine.rax = result & _WORD
        return None if self.code is None else Shutdown(cause="poweroff", code=self.code, rip=machine.rip)

    # ---- the calls: (machine, six arguments) -> result

    def read(self, machine: Any, fd: int, at: int, size: int, *_: int) -> int:
        if fd != 0:
            return -errno.EBADF
        data = self.stdin[self._read : self._read + size]
        machine.mem.write(at, data)
        self._read += len(data)
        return len(data)

    def write(self, machine: Any, fd: int, at: int, size: int, *_: int) -> int:
        if fd not in (1, 2):
            return -errno.EBADF
        (self.stdout if fd == 1 else self.stderr).extend(machine.mem.read(at, size))
        return size

    def writev(self, machine: Any, fd: int, at: int, count: int, *_: int) -> int:
        if count > 1024:
            return -errno.EINVAL
        done = 0
        for base, size in struct.iter_unpack("<QQ", machine.mem.read(at, 16 * count)):
            result = self.write(machine, fd, base, size)
            if result < 0:
                return done or result
            done += result
        return done

    def brk(self, machine: Any, wanted: int, *_: int) -> int:
        if self._first <= wanted <= self._end:
            self._brk = wanted
        return self._brk

    def mmap(self, machine: Any, at: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
        size = -(-size // PAGE) * PAGE
        if not size or fd & 0xFFFFFFFF != 0xFFFFFFFF:
            return -errno.ENODEV if size else -errno.EINVAL
        if flags & _MAP_FIXED or self._next + size > MAPS_AT + MAPS_SIZE:
            return -errno.ENOMEM
        at, self._next = self._next, self._next + size
        return at

    def arch_prctl(self, machine: Any, code: int, address: int, *_: int) -> int:
        if code == _ARCH_SET_FS:
            machine.fs_base = address
        elif code == _ARCH_SET_GS:
            machine.gs_base = address
        elif code in (_ARCH_GET_FS, _ARCH_GET_GS):
            base = machine.fs_base if code == _ARCH_GET_FS else machine.gs_base
            machine.mem.write(address, struct.pack("<Q", base))
        else:
            return -errno.EINVAL
        return 0

    def exit(self, machine: Any, code: int, *_: int) -> int:
        self.code = code & 0xFF
        return 0

    def getrandom(self, machine: Any, at: int, size: int, *_: int) -> int:
        machine.mem.write(at, self._random.randbytes(min(size, 256)))
        return min(size, 256)

    def uname(self, machine: Any, at: int, *_: int) -> int:
        names = ("Linux", "vmfs", "6.1.0", "#1", "x86_64", "(none)")
        machine.mem.write(at, b"".join(name.encode().ljust(65, b"\0") for name in names))
        return 0

    def fstat(self, machine: Any, fd: int, at: int, *_: int) -> int:
        if fd > 2:
            return -errno.EBADF
        stat = bytearray(144)  # struct stat: st_mode at 24 (a pipe), st_blksize at 56
        struct.pack_into("<I", stat, 24, 0o010600)
        struct.pack_into("<Q", stat, 56, 4096)
        machine.mem.write(at, stat)
        return 0

    def newfstatat(self, machine: Any, fd: int, path: int, at: int, *_: int) -> int:
        return self.fstat(machine, fd, at) if machine.mem[path] == 0 else -errno.ENOENT

    def prlimit(self, machine: Any, pid: int, which: int, new: int, old: int, *_: int) -> int:
        if old:
            machine.mem.write(old, struct.pack("<QQ", STACK_SIZE, STACK_SIZE))
        return 0

    def clock_gettime(self, machine: Any, clock: int, at: int, *_: int) -> int:
        seconds, nanoseconds = divmod(machine._driver.instructions() if machine._driver.counts else 0, 10**9)
        machine.mem.write(at, struct.pack("<QQ", seconds, nanoseconds))
        return 0

    def done(self, *_: Any) -> int:
        return 0

    def tid(self, *_: Any) -> int:
        return 1

    def no_file(self, *_: Any) -> int:
        return -errno.ENOENT

    def no_call(self, *_: Any) -> int:
        return -errno.ENOSYS

    def no_terminal(self, *_: Any) -> int:
        return -errno.ENOTTY


_CALLS: Mapping[int, Callable[..., int]] = {
    0: Linux.read, 1: Linux.write, 2: Linux.no_file, 3: Linux.done, 5: Linux.fstat, 9: Linux.mmap, 10: Linux.done,
    11: Linux.done, 12: Linux.brk, 13: Linux.done, 14: Linux.done, 16: Linux.no_terminal, 20: Linux.writev,
    21: Linux.no_file, 28: Linux.done, 39: Linux.tid, 60: Linux.exit, 63: Linux.uname, 89: Linux.no_file,
    102: Linux.done, 104: Linux.done, 107: Linux.done, 108: Linux.done, 158: Linux.arch_prctl, 186: Linux.tid,
    202: Linux.done, 218: Linux.tid, 228: Linux.clock_gettime, 231: Linux.exit, 257: Linux.no_file,
    262: Linux.newfstatat, 267: Linux.no_file, 273: Linux.done, 302: Linux.prlimit, 318: Linux.getrandom,
    334: Linux.no_call,
}  # fmt: skip


def load(kind: Callable[..., Any], path: str, arguments: tuple[str, ...], options: dict[str, Any]) -> Any:
    """A machine at the entry of a static program; what `Linux` takes may be among the options. Invalid for another
    file."""
    environment = options.pop("environment", {})
    ours = {name: options.pop(name) for name in ("stdin", "seed") if name in options}
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        image = Source.of(fd, os.path.basename(path))
        program = elf_file.read(image)
        if (program.bits, program.machine) != (64, elf_file.X86_64):
            raise Invalid(f"{image.name}: not a program for x86-64")
        if _has_interpreter(image):
            raise Invalid(f"{image.name}: it is linked dynamically: link it with -static")
        moved = PIE_AT if program.type == elf_file.SHARED else 0
        pages: dict[int, bytearray] = {}
        for segment in program.segments:
            _put(pages, segment.virtual + moved, image.read(segment.offset, segment.filled), segment.size)
        header = image.read(0, 64)
    finally:
        os.close(fd)
    entry, table = struct.unpack_from("<QQ", header, 24)
    row_size, rows = struct.unpack_from("<HH", header, 54)
    machine = kind("long", **options)
    try:
        check_engine(machine.capabilities, "elf")  # which maps as much as a program's memory reaches to
        for start, data in _joined(pages):
            machine.map(start, data, name=os.path.basename(path))
        linux = Linux(machine, max(pages) + 0x10_0000, **ours)
        machine.map(STACK_AT, STACK_SIZE, name="stack")
        first = min(segment.virtual for segment in program.segments if segment.offset == 0) + moved
        vector = {
            _AT_PHDR: first + table, _AT_PHENT: row_size, _AT_PHNUM: rows, _AT_PAGESZ: PAGE, _AT_ENTRY: entry + moved,
        }  # fmt: skip
        machine.rsp = _stack(machine, (path, *arguments), environment, vector, linux._random.randbytes(16))
        machine.rip = entry + moved
    except BaseException as error:
        machine.close()
        if isinstance(error, (VmfsError, OSError)):
            raise
        raise Invalid(f"{os.path.basename(path)}: its segments are not as those of a program: {error}") from error
    return machine


def _has_interpreter(image: Source) -> bool:
    table = struct.unpack("<Q", image.read(32, 8))[0]
    size, count = struct.unpack("<HH", image.read(54, 4))
    return any(struct.unpack("<I", image.read(table + size * row, 4))[0] == 3 for row in range(count))


def _put(pages: dict[int, bytearray], at: int, data: bytes, size: int) -> None:
    if not 0 < at <= at + size < PIE_AT + (1 << 30):
        raise Invalid(f"a segment of the program is at {at:#x}, where there is no room for it")
    for page in range(at & -PAGE, at + size, PAGE):
        pages.setdefault(page, bytearray(PAGE))
    done = 0
    while done < len(data):
        page, offset = (at + done) & -PAGE, (at + done) % PAGE
        part = data[done : done + PAGE - offset]
        pages[page][offset : offset + len(part)] = part
        done += len(part)


def _joined(pages: dict[int, bytearray]) -> list[tuple[int, bytes]]:
    """Runs of pages."""
    found: list[tuple[int, bytearray]] = []
    for page in sorted(pages):
        if found and found[-1][0] + len(found[-1][1]) == page:
            found[-1][1].extend(pages[page])
        else:
            found.append((page, bytearray(pages[page])))
    return [(start, bytes(data)) for start, data in found]


def _stack(
    machine: Any, arguments: tuple[str, ...], environment: Mapping[str, str], vector: dict[int, int], seed: bytes
) -> int:
    """Put what a program finds on its stack; the stack pointer."""
    at = STACK_AT + STACK_SIZE - 64

    def put(data: bytes) -> int:
        nonlocal at
        at -= len(data)
        machine.mem.write(at, data)
        return at

    places = [put(os.fsencode(one) + b"\0") for one in arguments]
    settings = [put(os.fsencode(f"{name}={value}") + b"\0") for name, value in environment.items()]
    words = [len(places), *places, 0, *settings, 0]
    for name, value in {**vector, _AT_RANDOM: put(seed), 0: 0}.items():
        words += [name, value]
    at = (at - 8 * len(words)) & -16
    machine.mem.write(at, struct.pack(f"<{len(words)}Q", *words))
    return at
