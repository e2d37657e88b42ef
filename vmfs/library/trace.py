"""A trace of a library's machine: what it has executed and accessed, as records or as a NumPy array."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from vmfs.engine.base import NO_TRACE, TraceRequest, Vcpu
from vmfs.words.errors import Unsupported

_RECORD = struct.Struct("<BBHIQQQ")  # struct vmfs_trace of vmfs.h
_INSN, _MEM, _AT = 1, 2, 6
_WRITE = 1


class Executed(NamedTuple):
    """An instruction: its number since the machine was made, its linear address and its length."""

    number: int
    address: int
    length: int


class Accessed(NamedTuple):
    """An access of the instruction at `rip`: up to 16 bytes of it; the rest is in the next ones."""

    rip: int
    is_write: bool
    address: int
    data: bytes


class Trace:
    """Records until it is closed. Iterating gives what was recorded so far, in order."""

    def __init__(self, cpu: Vcpu, instructions: bool, memory: bool, begin: int, end: int) -> None:
        self._cpu = cpu
        self._parts: list[bytes] = []
        request = TraceRequest(instructions=instructions, memory=memory, place=(begin, end - 1))
        cpu.set_trace(request, lambda records, events, ended: self._parts.append(records))

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._cpu.set_trace(NO_TRACE, lambda records, events, ended: None)

    def clear(self) -> None:
        self._parts.clear()

    @property
    def data(self) -> bytes:
        """The records as they are: `struct vmfs_trace` of vmfs.h, 32 bytes each."""
        return b"".join(self._parts)

    def __iter__(self) -> Iterator[Executed | Accessed]:
        rip = 0
        for kind, flags, size, code, first, second, third in _RECORD.iter_unpack(self.data):
            if kind == _INSN:  # a straight run, or one that was repeated `code` times
                rip = second
                for index in range(size):
                    length = third >> 4 * index & 15
                    rip = second
                    for time in range(code):
                        yield Executed(first + index + time, second, length)
                    second += length
            elif kind == _AT:
                rip = second
            elif kind == _MEM:
                data = struct.pack("<QQ", second, third)[:size]
                yield Accessed(rip, bool(flags & _WRITE), first, data)

    def array(self) -> Any:
        """The records as a NumPy array with the fields kind, flags, size, code, number, address, lengths."""
        try:
            import numpy
        except ImportError:
            raise Unsupported("an array of a trace needs NumPy: pip install numpy") from None
        fields = [
            ("kind", "u1"), ("flags", "u1"), ("size", "<u2"), ("code", "<u4"), ("number", "<u8"), ("address", "<u8"),
            ("lengths", "<u8"),
        ]  # fmt: skip
        return numpy.frombuffer(self.data, dtype=numpy.dtype(fields))
