"""Traces by instruction, with the memory that each has accessed, as other programs' explorers read them.

Tenet (a plugin of IDA and Binary Ninja): a line an instruction, `rip=0x401000,mr=0x7ffe0:0100,mw=0x7ffe8:05`: registers
that it has changed, and the bytes that it has read and written. A trace has no registers but rip.

QIRA: records of 24 bytes - an address, data, the number of the instruction, flags with the size in bits - after a head
of as many, which has how many there are. So it is written into a file, and not into a pipe.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

from vmfs.traces.place import Place
from vmfs.words.errors import Invalid, LimitReached
from vmfs.words.tracing import TraceRecord, instructions_of


class _OneCpu:
    """Both have one CPU."""

    _cpu: int | None = None
    _name = ""

    def check(self, record: TraceRecord) -> None:
        if self._cpu is None:
            self._cpu = record.cpu
        elif self._cpu != record.cpu:
            raise Invalid(f"{self._name} has one CPU, and here are several: --cpu K takes one")


class Tenet(_OneCpu):
    _name = "tenet"

    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file = file
        self._at: int | None = None  # of the line that is not ended yet
        self._words: list[str] = []

    def take(self, record: TraceRecord) -> None:
        if record.kind == "insn":
            self.check(record)
            for address, _ in instructions_of(record):
                self._step(address)
        elif record.kind == "mem" and record.at is not None:
            self.check(record)
            if record.at != self._at:  # its instruction is not traced, or is out of the range
                self._step(record.at)
            data = struct.pack("<QQ", record.words[1], record.words[2])[: record.size]
            self._words.append(f"{'mw' if record.is_write else 'mr'}={record.address:#x}:{data.hex()}")

    def _step(self, address: int) -> None:
        if self._words:
            self._file.write((",".join(self._words) + "\n").encode())
        self._at, self._words = address, [f"rip={address:#x}"]

    def end(self) -> None:
        self._step(0)
        self._file.flush()


_CHANGE = struct.Struct("<QQII")
_HEAD = struct.Struct("<IIIIii")  # changes with the head, the last number, filtered, the first number, parent's id, pid
VALID, WRITE, MEMORY, START = 1 << 31, 1 << 30, 1 << 29, 1 << 28
_MOST = (1 << 32) - 1


class Qira(_OneCpu):
    _name = "qira"

    def __init__(self, file: BinaryIO, place: Place) -> None:
        if not file.seekable():
            raise Invalid("qira: the head of the file has its length, which is written last: -o FILE, and no pipe")
        self._file, self._begin = file, file.tell()
        self._changes, self._step = 0, 0
        self._at: int | None = None
        file.write(bytes(_HEAD.size))

    def take(self, record: TraceRecord) -> None:
        if record.kind == "insn":
            self.check(record)
            for address, length in instructions_of(record):
                self._start(address, length)
        elif record.kind == "mem" and record.at is not None:
            self.check(record)
            if record.at != self._at:
                self._start(record.at, 0)
            flags = VALID | MEMORY | (WRITE if record.is_write else 0)
            address, data = record.address, struct.pack("<QQ", record.words[1], record.words[2])[: record.size]
            while data:  # 8, 4, 2 or 1 bytes at a time
                size = min(1 << len(data).bit_length() - 1, 8)
                self._put(address, int.from_bytes(data[:size], "little"), flags | 8 * size)
                address, data = address + size & (1 << 64) - 1, data[size:]

    def _start(self, address: int, length: int) -> None:
        self._at = address
        self._step += 1
        self._put(address, length, VALID | START)

    def _put(self, address: int, data: int, flags: int) -> None:
        if self._changes >= _MOST - 1:
            raise LimitReached(f"qira: a file has at most {_MOST - 1} changes")
        self._file.write(_CHANGE.pack(address, data, self._step, flags))
        self._changes += 1

    def end(self) -> None:
        self._file.flush()
        self._file.seek(self._begin)
        self._file.write(_HEAD.pack(self._changes + 1, self._step, 0, 1 if self._step else 0, -1, 0))
        self._file.seek(0, io.SEEK_END)
        self._file.flush()
