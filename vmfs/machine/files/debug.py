"""The files one looks into a guest with: `symbols`, `virt`, `pagetable`, `disasm`, `stack`, `core`.

What takes more than a few milliseconds is done in a thread, on the registers as they were at a boundary and
on RAM through a descriptor of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from vmfs.debug import kallsyms
from vmfs.debug.corefile import RAM_OFFSET, CpuState, core_header, core_size
from vmfs.debug.disasm import LONGEST, listing_text
from vmfs.debug.paging import (
    Paging,
    linear_reader,
    mapped_ranges,
    ranges_text,
    read_linear,
    write_linear,
)
from vmfs.debug.stack import StackState, stack_text
from vmfs.debug.symbolfile import size_of, symbol_file
from vmfs.debug.symbols import FILE_MOST, SymbolTable, parse_file
from vmfs.debug.why import places_in, with_sources
from vmfs.engine.base import Vcpu
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.handles import File, Handle, Kind
from vmfs.machine.files.waiting import finished, value_of
from vmfs.machine.machine import Vm
from vmfs.memory.ram import PAGE, MemoryView
from vmfs.words.errors import BadAddress, PastEnd
from vmfs.words.modes import CodeMode

T = TypeVar("T")


async def _sampled(scope: Contents, look: Callable[[Vcpu], T]) -> T:
    """What `look` finds at the CPU, between two instructions, and then in RAM."""
    await scope.memory.settle()
    future = scope.vm.at_boundary(look)
    await finished(future, scope)
    return future.result()


async def _in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """A signal to the caller ends the wait, and the work at its next look at RAM, where that is through `_ram`."""
    return await trio.to_thread.run_sync(work, *arguments, abandon_on_cancel=True)


def _ram(vm: Vm) -> MemoryView:
    """For `_in_thread`."""
    return vm.memory.view(trio.from_thread.check_cancelled)


# ---- symbols

SYMBOL_COMMANDS = ("kallsyms", "clear")
_COMMAND_MOST = 64
SYMBOL_COST = 200  # bytes that a symbol takes in a table, about


@dataclass(frozen=True)
class Symbols(Kind):
    """`symbols`: a file is gathered while it is written, and understood when it is closed."""

    writable = True

    def size(self, scope: Any) -> int | None:
        known, size = scope.symbols_text
        return size if known is scope.vm.symbols else None

    async def measure(self, scope: Any) -> int:
        table = scope.vm.symbols
        size = len((await _in_thread(table.text)).encode())
        scope.symbols_text = table, size
        return size

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _SymbolsHandle(node, nonblocking, writing)


class _SymbolsHandle(Handle):
    """Every close of a descriptor is told, that of a duplicate, too: what was written since the last time is
    then taken, together with what was before."""

    def __init__(self, node: File, nonblocking: bool, writing: bool) -> None:
        super().__init__(node, nonblocking)
        self.tells_closing = writing
        self._fd = -1
        self._size = 0
        self.unsaved = False
        self._before = self.scope.vm.symbols  # to which O_APPEND adds
        self._snapshot: bytes | None = None

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0 or self._snapshot is None:
            text = await value_of(_in_thread(self.scope.vm.symbols.text), self)
            self._snapshot = text.encode()
        return self._snapshot[offset : offset + size]

    async def write(self, offset: int, data: bytes) -> int:
        word = data.strip() if len(data) <= _COMMAND_MOST and not self._size else b""
        if word.decode("latin-1") in SYMBOL_COMMANDS:
            await value_of(self._do(word.decode()), self)
            return len(data)
        at = self._size if self.appending else offset
        if at + len(data) > FILE_MOST:
            raise PastEnd(f"symbols: a file of more than {FILE_MOST} bytes is not taken")
        size = max(self._size, at + len(data))
        if not self.scope.budget.has(self, size):
            self.unsaved = False  # the half of a file is not taken
            await self.scope.budget.hold(self, size)
        if self._fd < 0:
            self._fd = os.memfd_create("vmfs-symbols", os.MFD_CLOEXEC)
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], at + done)
        self._size = max(self._size, at + len(data))
        self.unsaved = True
        return len(data)

    async def _do(self, command: str) -> None:
        await self._take(await symbols_by(self.scope, command))

    async def _take(self, table: SymbolTable) -> None:
        table = self._before.merged(table) if self.appending else table
        await self.scope.budget.hold("symbols", SYMBOL_COST * len(table) + table.lines.size)
        self.scope.vm.symbols = table

    async def flush(self) -> None:
        if not self.unsaved:
            return
        self.unsaved = False
        # Not to be given up: the descriptor may be closed after it.
        await self._take(await trio.to_thread.run_sync(parse_file, self._fd))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self.scope.budget.drop(self)


async def symbols_by(scope: Contents, command: str) -> SymbolTable:
    """The symbols that a word of SYMBOL_COMMANDS asks for."""
    if command == "clear":
        return SymbolTable()
    paging = await _sampled(scope, Paging.of)
    return await _in_thread(_kallsyms, _ram(scope.vm), paging)


def _kallsyms(ram: MemoryView, paging: Paging) -> SymbolTable:
    with ram:
        return kallsyms.find(ram, paging)


async def symbols_elf(scope: Contents) -> bytes:
    """`symbols.elf`, made once of a table: a debugger reads it in many pieces."""
    table = scope.vm.symbols
    if scope.symbol_file is None or scope.symbol_file[0] is not table:
        scope.symbol_file = table, await _in_thread(symbol_file, table)
    return scope.symbol_file[1]


def symbols_elf_size(scope: Contents) -> int:
    table = scope.vm.symbols
    if scope.symbol_file_size is None or scope.symbol_file_size[0] is not table:
        scope.symbol_file_size = table, size_of(table)
    return scope.symbol_file_size[1]


# ---- memory by linear address


@dataclass(frozen=True)
class Virt(Kind):
    """`virt`: the offset is the linear address without its bit 63, which is as bit 62. It has no size, as
    /proc/PID/mem has none: what is mapped is not one piece."""

    writable = True
    walked = False

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _VirtHandle(node, nonblocking)


def linear_address(offset: int) -> int:
    """Of a byte of `virt`."""
    return offset | (offset & 1 << 62) << 1


class _VirtHandle(Handle):
    async def read(self, offset: int, size: int) -> bytes:
        vm, address = self.scope.vm, linear_address(offset)
        await self.scope.memory.settle()
        data = await value_of(
            vm.at_boundary(lambda cpu: read_linear(vm.memory, Paging.of(cpu), address, size)), self
        )
        if size and not data:
            raise BadAddress(f"virt: {address:#x} is not mapped to RAM")
        return data

    async def write(self, offset: int, data: bytes) -> int:
        return await value_of(self._write(linear_address(offset), data), self)

    async def _write(self, address: int, data: bytes) -> int:
        vm = self.scope.vm
        async with self.scope.memory.change():
            return await _sampled(
                self.scope, lambda cpu: write_linear(vm.memory, Paging.of(cpu), address, data)
            )


# ---- what is mapped


async def pagetable(scope: Contents) -> str:
    """`pagetable`."""
    paging = await _sampled(scope, Paging.of)
    if paging.kind == "off":
        return "# paging is off: linear addresses are physical\n"
    return await _in_thread(_pagetable, _ram(scope.vm), paging)


def _pagetable(ram: MemoryView, paging: Paging) -> str:
    with ram:
        return ranges_text(mapped_ranges(ram, paging), ram.check)


# ---- code and calls


async def disasm(scope: Contents) -> str:
    """`disasm`."""
    vm = scope.vm
    listing, symbols, memory = vm.listing, vm.symbols, vm.memory

    def look(cpu: Vcpu) -> tuple[CodeMode, Paging, int, bytes]:
        """With code that is not in RAM, but in the ROM: its address, and up to a page of it."""
        code, paging = CodeMode.of(cpu.get_state("regs"), cpu.get_state("sregs")), Paging.of(cpu)
        start = code.address if listing.address is None else listing.address
        page = paging.translate(memory, start)
        if page is None or memory.room(page.physical):
            return code, paging, start, b""
        length = min(LONGEST * listing.count, page.size - start % page.size)
        return code, paging, start, vm.read_physical(page.physical, length)

    code, paging, start, rom = await _sampled(scope, look)

    def work(ram: MemoryView) -> str:
        with ram:
            in_ram = linear_reader(ram, paging)

            def read(linear: int, length: int) -> bytes:
                at = linear - start
                return rom[at : at + length] if 0 <= at < len(rom) else in_ram(linear, length)

            return listing_text(read, code, listing, symbols)

    return await _in_thread(work, _ram(vm))


async def stack(scope: Contents) -> str:
    """`stack`."""
    vm = scope.vm
    state = await _sampled(scope, lambda cpu: StackState.of(cpu, vm.memory))

    def work(ram: MemoryView) -> str:
        with ram:
            return stack_text(ram, state, vm.symbols)

    return await _in_thread(work, _ram(vm))


async def why(scope: Contents) -> str:
    """`why`."""
    account, symbols = scope.vm.account, scope.vm.symbols
    if account is None:
        return ""

    def work() -> str:
        text = account.text(symbols)
        return with_sources(text, symbols.lines.places_of(places_in(text), trio.from_thread.check_cancelled).get)

    return await _in_thread(work)


# ---- the machine as a file


@dataclass(frozen=True)
class Core(Kind):
    """`core`: headers as of the first read, and RAM after them as it is."""

    def size(self, scope: Any) -> int:
        return core_size(scope.vm.memory.end)

    def blocks(self, scope: Any, size: int) -> int:
        return scope.vm.memory.blocks + PAGE // 512  # RAM, and headers that are never all zeros

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _CoreHandle(node, nonblocking)


class _CoreHandle(Handle):
    _header: bytes | None = None

    async def read(self, offset: int, size: int) -> bytes:
        if offset >= RAM_OFFSET:
            return self.scope.vm.memory.read_at(offset - RAM_OFFSET, size)
        if self._header is None:
            self._header = await value_of(self._make_header(), self)
        head = self._header[offset : offset + size].ljust(min(size, RAM_OFFSET - offset), b"\0")
        # A short read is the end of the file for tar and others.
        return head + self.scope.vm.memory.read_at(0, size - len(head)) if len(head) < size else head

    async def _make_header(self) -> bytes:
        vm = self.scope.vm
        cpus = await _sampled(self.scope, lambda _: [CpuState.of(cpu.vcpu) for cpu in vm.cpus])

        def work(ram: MemoryView) -> bytes:
            with ram:
                return core_header(ram, cpus)

        return await _in_thread(work, _ram(vm))
