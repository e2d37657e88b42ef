"""Parallel flash below 4 GiB, where a CPU begins: a firmware's code, and the variables that it keeps.

The chip is one of Intel's 28F...J3 with a bus of 8 bits, in blocks of 4 KiB: commands are bytes that are written
anywhere in it. While it is read as an array the guest has its contents as memory; after a command that makes it answer
otherwise (a status, its identity) reads come here. To program clears bits, to erase a block sets them. Nothing takes
time: after a command the status is ready. Clear Status clears that bit, too, as QEMU's chip does: OVMF knows by it
that there is flash.

What is programmed goes to the disk that it is on once the chip is an array again, or nothing may be under way.

Source: Intel StrataFlash Memory (J3) data sheet, chapters 4 (commands) and 4.2 (status); JEDEC JESD68.01 (CFI).
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from typing import Annotated, Literal

import msgspec

from vmfs.devices.device import FIRST_SLOT, U8, U32, Device, DeviceState, Port, Window
from vmfs.devices.virtio.disk import SECTOR, Disk
from vmfs.words.errors import Invalid, VmfsError

NAMES = "pflash0", "pflash1"  # from 4 GiB downwards
TOP, BOTTOM = 1 << 32, 0xFF00_0000  # below are the APICs' addresses
BLOCK = 4096
_SLOT = FIRST_SLOT + 1  # of the engine's memory, and the next one

_ARRAY, _STATUS, _CLEAR, _ID, _CFI = 0xFF, 0x70, 0x50, 0x90, 0x98
_PROGRAM, _PROGRAM_TOO, _ERASE, _BUFFER, _LOCK, _CONFIRM, _SET_LOCK = 0x40, 0x10, 0x20, 0xE8, 0x60, 0xD0, 0x01
_READY, _ERASE_FAILED, _PROGRAM_FAILED, _IS_LOCKED = 0x80, 0x20, 0x10, 0x02
_WRONG_SEQUENCE = _ERASE_FAILED | _PROGRAM_FAILED
_MAKER, _KIND = 0x89, 0x18  # Intel, a 28F128J3
BUFFER_MOST = 32

# What it answers or waits for: "array" to "cfi" are modes, the others are the middle of a command.
Mode = Literal["array", "status", "id", "cfi", "program", "erase", "lock", "count", "buffer", "confirm"]
_AFTER: dict[int, Mode] = {
    _ARRAY: "array", _STATUS: "status", _ID: "id", _CFI: "cfi", _PROGRAM: "program", _PROGRAM_TOO: "program",
    _ERASE: "erase", _BUFFER: "count", _LOCK: "lock",
}  # fmt: skip


class PflashState(DeviceState):
    """`locked`: blocks; `left`: bytes that the buffer still waits for. `contents` is a digest of them, which are the
    disk's."""

    mode: Mode
    status: U8
    locked: Annotated[tuple[U32, ...], msgspec.Meta(max_length=(TOP - BOTTOM) // BLOCK)]
    left: Annotated[int, msgspec.Meta(ge=0, le=BUFFER_MOST)]
    buffer: Annotated[tuple[tuple[U32, U8], ...], msgspec.Meta(max_length=BUFFER_MOST)]
    contents: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    overlay: dict[U32, bytes]


class Pflash(Device[PflashState]):
    """`disk` has its contents; a chip whose disk is `ro` is protected: to program or erase it fails. It ends before
    `end`."""

    TYPE = "pflash"
    STATE = PflashState
    HAS_DISK = True

    def __init__(self, board: Port, name: str, disk: Disk, end: int, *, path: str = "") -> None:
        super().__init__(board, name)
        if disk.size % BLOCK or disk.size > end - BOTTOM:
            raise Invalid(
                f"{name}: flash has a multiple of 4 KiB, all of it up to {(TOP - BOTTOM) >> 20} MiB, and {path} has "
                f"{disk.size} bytes"
            )
        self.disk, self.path = disk, path
        self.size, self.start = disk.size, end - disk.size
        self._slot = _SLOT + NAMES.index(name)
        self._fd = os.memfd_create(f"vmfs-{name}", os.MFD_CLOEXEC)
        self._written: set[int] = set()  # sectors that the disk has not yet
        self._digest = b""
        self._is_mapped = False
        self.locked: set[int] = set()
        self._fetch()
        self._become("array")
        self.reset()

    def windows(self) -> tuple[Window, ...]:
        return (Window("memory", self.start, self.size),)

    # ---- contents

    def _fetch(self) -> None:
        data = bytearray(self.size)
        self.disk.read(0, [memoryview(data)])
        os.pwrite(self._fd, data, 0)
        self._written.clear()
        self._digest = b""

    def read_at(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def _put(self, offset: int, data: bytes) -> None:
        os.pwrite(self._fd, data, offset)
        self._written.update(range(offset // SECTOR, (offset + len(data) - 1) // SECTOR + 1))
        self._digest = b""

    def _store(self) -> None:
        """Give the disk what it has not. What the host refuses is counted, and tried again the next time."""
        for start, end in _runs(sorted(self._written)):
            data = bytearray(self.read_at(start * SECTOR, (end - start) * SECTOR))
            try:
                self.disk.write(start * SECTOR, [memoryview(data)])
            except (OSError, VmfsError) as error:
                name = errno.errorcode.get(error.errno or errno.EIO, "EIO") if isinstance(error, OSError) else "ENOSPC"
                self.counters[f"host_errors.{name}"] += 1
                return
            self._written.difference_update(range(start, end))

    @property
    def contents(self) -> bytes:
        if not self._digest:
            self._digest = hashlib.blake2b(self.read_at(0, self.size), digest_size=16).digest()
        return self._digest

    # ---- the chip

    def _become(self, mode: Mode) -> None:
        self.mode = mode
        is_array = mode == "array"
        if is_array == self._is_mapped:
            return
        self._is_mapped = is_array
        if is_array:
            self._store()
            self.board.map_memory(self._slot, self.start, self._fd, 0, self.size, read_only=True)
        else:
            self.board.map_memory(self._slot, 0, 0, 0, 0)

    def withdraw(self) -> None:
        """Have no memory of the guest's any more."""
        self._become("status")

    def read(self, region: int, offset: int, size: int) -> int:
        size = min(size, self.size - offset)
        if self.mode == "array":
            return int.from_bytes(self.read_at(offset, size), "little")
        return int.from_bytes(bytes(self._answer(at) for at in range(offset, offset + size)), "little")

    def _answer(self, at: int) -> int:
        if self.mode == "id":
            block, at = divmod(at, BLOCK)
            return {0: _MAKER, 1: _KIND, 2: int(block in self.locked or not self.disk.writable)}.get(at, 0)
        if self.mode == "cfi":
            table = _query(self.size)
            return table[at] if at < len(table) else 0
        return _READY if self.mode in ("count", "buffer", "confirm") else self.status

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """A byte is a cycle of its bus; more bytes are as many."""
        for number, byte in enumerate(value.to_bytes(size, "little")[: self.size - offset]):
            self._cycle(offset + number, byte)

    def _cycle(self, at: int, byte: int) -> None:
        mode = self.mode
        if mode == "program":
            self._program(((at, byte),))
        elif mode == "erase":
            self._erase(at // BLOCK) if byte == _CONFIRM else self._fail(_WRONG_SEQUENCE)
        elif mode == "lock":
            self._lock(at // BLOCK, byte)
        elif mode == "count":
            self.left, self.buffer = byte + 1, []
            self._become("buffer") if byte < BUFFER_MOST else self._fail(_WRONG_SEQUENCE)
        elif mode == "buffer":
            self.buffer.append((at, byte))
            self.left -= 1
            if not self.left:
                self._become("confirm")
        elif mode == "confirm":
            one_block = len({where // BLOCK for where, _ in self.buffer} | {at // BLOCK}) == 1
            buffer, self.buffer = self.buffer, []
            self._program(buffer) if byte == _CONFIRM and one_block else self._fail(_WRONG_SEQUENCE)
        elif byte == _CLEAR:
            self.status = 0
        elif byte in _AFTER:
            self._become(_AFTER[byte])

    def _fail(self, bits: int) -> None:
        self.left, self.buffer = 0, []
        self.status |= bits
        self._done("failed")

    def _done(self, what: str, count: int = 1) -> None:
        self.status |= _READY
        self.counters[what] += count
        self._become("status")

    def _is_protected(self, block: int) -> bool:
        return not self.disk.writable or block in self.locked

    def _program(self, cells: tuple[tuple[int, int], ...] | list[tuple[int, int]]) -> None:
        if self._is_protected(cells[0][0] // BLOCK):
            self._fail(_PROGRAM_FAILED | _IS_LOCKED)
            return
        for at, byte in cells:
            self._put(at, bytes((self.read_at(at, 1)[0] & byte,)))
        self._done("programmed", len(cells))

    def _erase(self, block: int) -> None:
        if self._is_protected(block):
            self._fail(_ERASE_FAILED | _IS_LOCKED)
            return
        self._put(block * BLOCK, b"\xff" * BLOCK)
        self._done("erased")

    def _lock(self, block: int, byte: int) -> None:
        """A bit is set for a block, and cleared for all."""
        if byte == _SET_LOCK:
            self.locked.add(block)
        elif byte == _CONFIRM:
            self.locked.clear()
        else:
            self._fail(_WRONG_SEQUENCE)
            return
        self._done("locks")

    # ---- life

    def reset(self) -> None:
        """Contents and locks stay."""
        self.status, self.left, self.buffer = _READY, 0, []
        self._become("array")

    def sleep(self) -> None:
        self._store()

    def wake(self) -> None:
        pass

    def save(self) -> PflashState:
        return PflashState(
            mode=self.mode,
            status=self.status,
            locked=tuple(sorted(self.locked)),
            left=self.left,
            buffer=tuple(self.buffer),
            contents=self.contents,
            overlay=self.disk.save_map(),
        )

    def check(self, state: PflashState) -> None:
        self.disk.check_map(state.overlay)
        blocks = self.size // BLOCK
        if any(block >= blocks for block in state.locked) or any(at >= self.size for at, _ in state.buffer):
            raise Invalid(f"{self.name}: it has {blocks} blocks")
        is_whole = bool(state.buffer) and not state.left
        waits = bool(state.left) and state.left + len(state.buffer) <= BUFFER_MOST
        if (state.mode == "buffer" and not waits) or (state.mode == "confirm" and not is_whole):
            raise Invalid(f"{self.name}: it is in the middle of no command")
        if state.mode not in ("buffer", "confirm") and (state.left or state.buffer):
            raise Invalid(f"{self.name}: its buffer is that of no command")

    def load(self, state: PflashState) -> None:
        self.status, self.left, self.locked = state.status, state.left, set(state.locked)
        self.buffer = list(state.buffer)
        self.disk.load_map(state.overlay)
        is_same = state.contents == self.contents
        if not is_same:
            self._fetch()
        self._become(state.mode)
        if not is_same:
            self.board.wrote_slot(self._slot)

    def describe(self) -> dict[str, str]:
        return {"path": self.path, "mode": self.disk.mode, "at": f"{self.start:#x}-{self.start + self.size - 1:#x}"}

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._written:
                self._fd = fd
                self._store()
                self._fd = -1
            os.close(fd)
        self.disk.close()


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, end) of what is in a row."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs


def _query(size: int) -> bytes:
    """What CFI says of it, from its byte 0 on: the primary command set is Intel's, with nothing of its extended table
    that a driver has to know."""
    primary = 0x31
    identification = struct.pack("<3sHHHH", b"QRY", 1, primary, 0, 0)
    volts = bytes((0x45, 0x55, 0, 0))  # 4.5 to 5.5, and none to program
    times = bytes((7, 7, 10, 0, 4, 4, 4, 0))  # powers of two, of us and ms; and how many times that at the most
    buffer = (BUFFER_MOST - 1).bit_length()
    geometry = struct.pack("<BHHBHH", (size - 1).bit_length(), 0, buffer, 1, size // BLOCK - 1, BLOCK // 256)
    extended = struct.pack("<3s2sIBH", b"PRI", b"11", 0x08, 0, 0)  # locks are kept
    return bytes(0x10) + identification + volts + times + geometry + extended
