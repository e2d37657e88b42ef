"""The exits: why a run ended. One type each, one line of text each, one 64-byte struct for all.

A line is `REASON key=value ... rip=0x...`, the same words on both engines, in the files `exit` and
`vm_run`, in vmfs.h and in the docs. Addresses, ports, vectors and data are hexadecimal; sizes,
counts, codes and ids decimal.

`rip` is what the `regs` file holds after the exit: for `out` and stores the next instruction (the
access is done), for `in` and loads the instruction itself (the next run completes it with the bytes
of `exit.data`), for `hlt` the instruction after it.

CODE is KVM's KVM_EXIT_* number (Linux include/uapi/linux/kvm.h) where KVM has the same exit; what
KVM lacks starts at 0x100.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vmfs.words.errors import Invalid
from vmfs.words.stops import STOPS

EXIT_STRUCT_SIZE = 64
_HEADER = struct.Struct("<IIQ")  # reason, cpu, rip
_BODY_SIZE = EXIT_STRUCT_SIZE - _HEADER.size

IO_IN, IO_OUT = 0, 1  # as KVM_EXIT_IO_IN and KVM_EXIT_IO_OUT
# The struct holds a cause as its index here plus one; vmfs.h has the same names in capitals.
DEBUG_CAUSES = (
    "step", "breakpoint", "watchpoint", "io", "exception", "mode", "cr3", "interrupt", "unwritten", "unclaimed",
)  # fmt: skip
STOPS_AFTER = frozenset(stop.CAUSE for stop in STOPS if stop.COMES_AFTER)
SHUTDOWN_CAUSES = ("triple-fault", "poweroff", "reset", "debug-exit", "suspend")


@dataclass(slots=True, kw_only=True)
class Exit:
    """Why a run ended. `rip` as the `regs` file has it, `cpu` the index of the virtual CPU."""

    REASON: ClassVar[str]
    CODE: ClassVar[int]

    rip: int
    cpu: int = 0
    of_several: bool = field(default=False, compare=False, repr=False)  # the machine has more CPUs: the line says which

    def line(self) -> str:
        """The exit as one line of text, without a newline."""
        words = [self.REASON, *(f"{key}={value}" for key, value in self._details())]
        words.append(f"rip={self.rip:#x}")
        if self.cpu or self.of_several:
            words.append(f"cpu={self.cpu}")
        return " ".join(words)

    def pack(self) -> bytes:
        """The exit as `struct vmfs_exit` of vmfs.h: 64 bytes, little-endian."""
        return _HEADER.pack(self.CODE, self.cpu, self.rip) + self._body().ljust(_BODY_SIZE, b"\0")

    def _details(self) -> Iterator[tuple[str, str]]:
        """The words between the reason and `rip`, in the order of the line."""
        return iter(())

    def _body(self) -> bytes:
        """The union of `struct vmfs_exit`: 48 bytes at most."""
        return b""


@dataclass(slots=True, kw_only=True)
class Io(Exit):
    """An access to a port that no device claims: `count` elements of `size` bytes (1, 2 or 4).

    `data` is `size * count` bytes for `out` and empty for `in`. The line shows a number an element,
    separated by commas; the struct holds the first 40 bytes, `exit.data` all of them.
    """

    REASON: ClassVar[str] = "io"
    CODE: ClassVar[int] = 2

    direction: str  # "in" or "out"
    port: int
    size: int
    count: int = 1
    data: bytes = b""

    def _details(self) -> Iterator[tuple[str, str]]:
        yield "direction", self.direction
        yield "port", f"{self.port:#x}"
        yield "size", str(self.size)
        yield "count", str(self.count)
        if self.direction == "out":
            elements = (self.data[at : at + self.size] for at in range(0, len(self.data), self.size))
            yield "data", ",".join(f"{int.from_bytes(element, 'little'):#x}" for element in elements)

    def _body(self) -> bytes:
        direction = IO_OUT if self.direction == "out" else IO_IN
        return struct.pack("<BBHI40s", direction, self.size, self.port, self.count, self.data[:40])


@dataclass(slots=True, kw_only=True)
class Mmio(Exit):
    """An access of `size` bytes (1 to 8) to guest-physical memory that is neither RAM nor a device.

    `data` is `size` bytes for a write and empty for a read. An access of more bytes, or across a
    page, is several exits.
    """

    REASON: ClassVar[str] = "mmio"
    CODE: ClassVar[int] = 6

    direction: str  # "read" or "write"
    addr: int
    size: int
    data: bytes = b""

    def _details(self) -> Iterator[tuple[str, str]]:
        yield "direction", self.direction
        yield "addr", f"{self.addr:#x}"
        yield "size", str(self.size)
        if self.direction == "write":
            yield "data", f"{int.from_bytes(self.data, 'little'):#x}"

    def _body(self) -> bytes:
        return struct.pack("<Q8sIB", self.addr, self.data, self.size, self.direction == "write")


@dataclass(slots=True, kw_only=True)
class Hlt(Exit):
    """The guest executed HLT and nothing in the machine can wake it. The next run goes on after it."""

    REASON: ClassVar[str] = "hlt"
    CODE: ClassVar[int] = 5


@dataclass(slots=True, kw_only=True)
class Debug(Exit):
    """A single step ended, or a break- or watchpoint stopped the guest.

    `id` is the point's number in the `debug` file; `addr` the address of the access (watchpoint) or
    the port (io), or what a page fault (exception) is about; `vector` the exception or interrupt that was
    caught and is not delivered yet. `also`, from an engine: the other stops that were
    reached at the same time.
    """

    REASON: ClassVar[str] = "debug"
    CODE: ClassVar[int] = 4

    cause: str  # one of DEBUG_CAUSES
    id: int | None = None
    addr: int | None = None
    vector: int | None = None
    also: tuple[Debug, ...] = field(default=(), compare=False, repr=False)

    def _details(self) -> Iterator[tuple[str, str]]:
        yield "cause", self.cause
        if self.id is not None:
            yield "id", str(self.id)
        if self.addr is not None:
            yield "addr", f"{self.addr:#x}"
        if self.vector is not None:
            yield "vector", f"{self.vector:#x}"

    def _body(self) -> bytes:
        return struct.pack("<IIQI", DEBUG_CAUSES.index(self.cause) + 1, self.id or 0, self.addr or 0, self.vector or 0)


@dataclass(slots=True, kw_only=True)
class Shutdown(Exit):
    """The machine is off until `reset` is written to `state`, or a register is set."""

    REASON: ClassVar[str] = "shutdown"
    CODE: ClassVar[int] = 8

    cause: str = "triple-fault"  # one of SHUTDOWN_CAUSES
    code: int | None = None

    def _details(self) -> Iterator[tuple[str, str]]:
        yield "cause", self.cause
        if self.code is not None:
            yield "code", str(self.code)

    def _body(self) -> bytes:
        return struct.pack("<II", SHUTDOWN_CAUSES.index(self.cause) + 1, self.code or 0)


@dataclass(slots=True, kw_only=True)
class Interrupted(Exit):
    """The run was stopped from outside (a signal, `pause`) at an instruction boundary; nothing is lost."""

    REASON: ClassVar[str] = "interrupted"
    CODE: ClassVar[int] = 10


@dataclass(slots=True, kw_only=True)
class Limit(Exit):
    """The bound of the run was reached: `insns N`, `for TIME`."""

    REASON: ClassVar[str] = "limit"
    CODE: ClassVar[int] = 0x100


@dataclass(slots=True, kw_only=True)
class Error(Exit):
    """The engine could not go on: `reason` says what it could not do, and why, in a sentence."""

    REASON: ClassVar[str] = "error"
    CODE: ClassVar[int] = 17

    reason: str

    def _details(self) -> Iterator[tuple[str, str]]:
        quoted = self.reason.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
        yield "reason", f'"{quoted}"'

    def _body(self) -> bytes:
        text = self.reason.encode("ascii", "replace")[: _BODY_SIZE - 1]  # the rest keeps its final NUL
        return text


# Every exit, in the order of the documentation; vmfs.h has a VMFS_EXIT_ constant for each.
EXITS: tuple[type[Exit], ...] = (Io, Mmio, Hlt, Debug, Shutdown, Interrupted, Limit, Error)


def unpack_access(packed: bytes, data: bytes) -> Exit:
    """The exit of an access or a halt that C code has packed as `struct vmfs_exit`. `data`: all that was written."""
    code, cpu, rip = _HEADER.unpack_from(packed)
    if code == Io.CODE:
        direction, size, port, count = struct.unpack_from("<BBHI", packed, _HEADER.size)
        way = "out" if direction == IO_OUT else "in"
        return Io(direction=way, port=port, size=size, count=count, data=data, rip=rip, cpu=cpu)
    if code == Mmio.CODE:
        addr, size, is_write = struct.unpack_from("<Q8xIB", packed, _HEADER.size)
        return Mmio(direction="write" if is_write else "read", addr=addr, size=size, data=data, rip=rip, cpu=cpu)
    if code == Hlt.CODE:
        return Hlt(rip=rip, cpu=cpu)
    raise ValueError(f"exit {code} is no access and no halt")


_WORD = re.compile(r' ([a-z]+)=("(?:[^"\\]|\\.)*"|[^ "]+)')
_DIRECTIONS = {"io": ("in", "out"), "mmio": ("read", "write")}


def parse_exit(line: str) -> Exit:
    """The exit that `line` (with or without its newline) shows: what `Exit.line` made, read back.

    Raises Invalid for anything that `Exit.line` does not write, so that no word is dropped or guessed.
    """
    line = line.removesuffix("\n")
    reason = line.partition(" ")[0]
    fields: dict[str, Any] = {}
    try:
        kind = next(kind for kind in EXITS if reason == kind.REASON)
        for key, text in _WORD.findall(line):
            fields[key] = _parse_value(key, text, fields)
        exit_ = kind(**fields, of_several="cpu" in fields)
        exit_.pack()  # a cause that is none, a number too wide for its field
    except (StopIteration, TypeError, ValueError, OverflowError, KeyError, struct.error):
        raise Invalid(f"exit: {line[:80]!r} is not a line of an exit") from None
    if exit_.line() != line or fields.get("direction") not in _DIRECTIONS.get(reason, (None,)):
        raise Invalid(f"exit: {line[:80]!r} is not a line of an exit")
    return exit_


@functools.lru_cache(maxsize=64)
def parsed_exit(line: str) -> Exit:
    """The same, of a line that was made by an exit of as many CPUs: one object for all who ask, not to be changed."""
    return parse_exit(line)


def _parse_value(key: str, text: str, before: dict[str, Any]) -> Any:
    if key in ("direction", "cause"):
        return text
    if key == "reason":
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if key == "data":  # a number an element, as wide as the word `size` before it says
        return b"".join(int(element, 0).to_bytes(before["size"], "little") for element in text.split(","))
    return int(text, 0)
