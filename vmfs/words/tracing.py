"""The records of a trace: `struct vmfs_trace` of vmfs.h, 32 bytes each, packed and taken apart."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

# As VMFS_TRACE_ in vmfs.h, where each record is documented.
RECORD_KINDS = ("insn", "mem", "exception", "interrupt", "exit", "at", "dropped", "cpu")
RECORD_FLAGS = ("write", "implicit", "more", "error-code", "nmi", "software")
INSN, MEM, EXCEPTION, INTERRUPT, EXIT, AT, DROPPED, CPU = range(1, 9)
WRITE, IMPLICIT, MORE, ERROR_CODE, NMI, SOFTWARE = (1 << bit for bit in range(6))
RECORD = struct.Struct("<BBHIQQQ")  # kind, flags, size, code, three words


class TraceRecord(NamedTuple):
    """A record. What `size`, `code` and the three `words` are depends on `kind`, one of RECORD_KINDS: see vmfs.h.

    `cpu` is the CPU that it is of, `at` the linear address of the instruction that it is about: of an access the one
    that made it, of several instructions the first. None where the stream has not said it yet.
    """

    kind: str
    cpu: int
    at: int | None
    flags: int
    size: int
    code: int
    words: tuple[int, int, int]

    @property
    def is_write(self) -> bool:
        """Of an access or an exit: a store or an `out`."""
        return bool(self.flags & WRITE)

    @property
    def address(self) -> int:
        """What an access or an exit is to; of instructions the first's own; of an event the instruction's."""
        return self.words[0] if self.kind in ("mem", "exit") else self.words[1]

    @property
    def value(self) -> int:
        """What an access or an exit has read or written."""
        return self.words[1] | (self.words[2] << 64 if self.kind == "mem" else 0)


class TraceRecords:
    """Takes a stream of records apart, which may come in pieces of any size."""

    def __init__(self) -> None:
        self._cpu = 0
        self._at: dict[int, int] = {}
        self._rest = b""

    def read(self, data: bytes) -> Iterator[TraceRecord]:
        """The records that are whole with `data`, but those that only say whose or where the next are."""
        data = self._rest + data
        whole = len(data) - len(data) % RECORD.size
        self._rest = data[whole:]
        for kind, flags, size, code, *words in RECORD.iter_unpack(data[:whole]):
            if kind == CPU:
                self._cpu = code
                continue
            if kind == AT:
                self._at[self._cpu] = words[1]
                continue
            at = words[1] if kind in (INSN, EXCEPTION, INTERRUPT) else self._at.get(self._cpu)
            if kind == INSN:  # accesses after it are of its last instruction
                self._at[self._cpu] = _last_of(words[1], words[2], size)
            yield TraceRecord(RECORD_KINDS[kind - 1], self._cpu, at, flags, size, code, (words[0], words[1], words[2]))


def _last_of(address: int, lengths: int, count: int) -> int:
    """Where the last of `count` instructions in a row stands."""
    for number in range(count - 1):
        address += lengths >> 4 * number & 15
    return address & 0xFFFF_FFFF_FFFF_FFFF


def instructions_of(record: TraceRecord) -> Iterator[tuple[int, int]]:
    """(address, bytes) of each instruction of a record `insn`; bytes is 0 where it is not known."""
    address = record.words[1]
    for number in range(record.size):
        length = record.words[2] >> 4 * number & 15
        yield address, length
        address = address + length & 0xFFFF_FFFF_FFFF_FFFF
