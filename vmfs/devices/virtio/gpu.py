"""virtio-gpu: a display with one screen and a cursor, 2D.

Source: VIRTIO 1.2, section 5.7; VESA E-EDID release A.2 (vmfs.devices.virtio.edid). What a driver makes are resources,
pictures of the host's; it has pixels copied there from memory of its own, and one of them shown. All is done when it is
asked for, so a fence has passed with its answer. There is no 3D, no blob.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any, Protocol

import msgspec

from vmfs.devices.device import U32, U64, Port
from vmfs.devices.vga import GraphicsMode
from vmfs.devices.virtio.edid import edid
from vmfs.devices.virtio.pci import FIRST_DEVICE, VirtioDevice, VirtioState
from vmfs.devices.virtio.queue import Chain, DriverError, Virtqueue
from vmfs.words.errors import Gone, Invalid, VmfsError

F_EDID = 1 << 1
GET_DISPLAY_INFO, CREATE_2D, UNREF, SET_SCANOUT, FLUSH, TRANSFER, ATTACH, DETACH = range(0x100, 0x108)
GET_EDID = 0x10A
UPDATE_CURSOR, MOVE_CURSOR = 0x300, 0x301
OK_NODATA, OK_DISPLAY_INFO, OK_EDID = 0x1100, 0x1101, 0x1104
ERR_UNSPEC, ERR_OUT_OF_MEMORY, ERR_SCANOUT, ERR_RESOURCE, ERR_PARAMETER = 0x1200, 0x1201, 0x1202, 0x1203, 0x1205
FENCE = 1

# Of formats: where blue, green, red are in a pixel's four bytes, and alpha, or -1.
FORMATS = {
    1: (0, 1, 2, 3), 2: (0, 1, 2, -1), 3: (3, 2, 1, 0), 4: (3, 2, 1, -1),
    67: (2, 1, 0, 3), 68: (1, 2, 3, -1), 121: (1, 2, 3, 0), 134: (2, 1, 0, -1),
}  # fmt: skip
CURSOR = 64  # pixels, both ways
LEAST, MOST = 1, 8192  # of a resource, both ways
RESOURCES_MOST, SPANS_MOST = 1024, 1 << 15
_HEADER = struct.Struct("<IIQIB3x")
_RECT = struct.Struct("<IIII")
_SCANOUTS = 16  # that an answer has room for
_CONTROL, _CURSOR = 0, 1


class Room(Protocol):
    """What the resources take of the machine's memory; `reserve` raises where there is not so much."""

    def reserve(self, size: int) -> None: ...
    def release(self, size: int) -> None: ...


class _Refused(Exception):
    """`code` is the answer."""

    def __init__(self, code: int) -> None:
        self.code = code


class ResourceState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`backing`: the driver's memory, addresses and lengths; None: there is none. `pixels`: empty where all are 0."""

    number: U32
    format: U32
    width: Annotated[int, msgspec.Meta(ge=LEAST, le=MOST)]
    height: Annotated[int, msgspec.Meta(ge=LEAST, le=MOST)]
    backing: Annotated[tuple[tuple[U64, U32], ...], msgspec.Meta(max_length=SPANS_MOST)] | None
    pixels: bytes


class GpuState(VirtioState):
    """`scanout`: a resource's number, and what of it is shown: x, y, width, height. `cursor`: its pixels, blue, green,
    red, alpha, or none; `cursor_at`: where."""

    events: Annotated[int, msgspec.Meta(ge=0, le=1)]
    resources: Annotated[tuple[ResourceState, ...], msgspec.Meta(max_length=RESOURCES_MOST)]
    scanout: tuple[U32, U32, U32, U32, U32] | None
    cursor: Annotated[bytes, msgspec.Meta(max_length=4 * CURSOR * CURSOR)]
    cursor_at: tuple[int, int]


@dataclass(slots=True)
class _Resource:
    format: int
    width: int
    height: int
    pixels: bytearray
    spans: list[tuple[int, int]] | None = None
    starts: list[int] = field(default_factory=list)  # where each of them begins in all

    @property
    def pitch(self) -> int:
        return 4 * self.width

    def back(self, spans: list[tuple[int, int]] | None) -> None:
        self.spans = spans
        self.starts = list(accumulate((length for _, length in spans or ()), initial=0))

    def holds(self, x: int, y: int, width: int, height: int) -> bool:
        return x + width <= self.width and y + height <= self.height


class Gpu(VirtioDevice[GpuState]):
    """`size` is that of the screen that a driver finds: it may take another."""

    TYPE = "virtio-gpu"
    STATE = GpuState
    DEVICE = FIRST_DEVICE + 16
    CLASS = 0x038000
    QUEUES = (64, 16)

    def __init__(self, board: Port, name: str, slot: int, room: Room, size: tuple[int, int]) -> None:
        self._room = room
        self._wanted = size
        self._events = 0
        self._resources: dict[int, _Resource] = {}
        self._scanout: tuple[int, int, int, int, int] | None = None
        self._cursor, self._cursor_at = b"", (0, 0)
        self._closed = False
        super().__init__(board, name, slot)
        self._commands: dict[int, Callable[[bytes], tuple[int, bytes]]] = {
            GET_DISPLAY_INFO: self._display_info, CREATE_2D: self._create, UNREF: self._unref,
            SET_SCANOUT: self._set_scanout, FLUSH: self._flush, TRANSFER: self._transfer, ATTACH: self._attach,
            DETACH: self._detach, GET_EDID: self._edid,
        }  # fmt: skip
        self._cursor_commands = {UPDATE_CURSOR: self._update_cursor, MOVE_CURSOR: self._move_cursor}

    def features(self) -> int:
        return F_EDID

    def device_config(self) -> bytes:
        return struct.pack("<IIII", self._events, 0, 1, 0)

    def write_device_config(self, offset: int, data: bytes) -> None:
        if offset == 4:  # events_clear
            self._events &= ~int.from_bytes(data, "little")

    def stopped(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._scanout, self._cursor, self._cursor_at, self._events = None, b"", (0, 0), 0
        for number in list(self._resources):
            self._drop(number)

    def _drop(self, number: int) -> None:
        self._room.release(len(self._resources.pop(number).pixels))

    # ---- commands

    def notified(self, queue: Virtqueue) -> None:
        commands = self._commands if queue.index == _CONTROL else self._cursor_commands
        self.serve(queue, lambda chain: self._answer(chain, commands))

    def _answer(self, chain: Chain, commands: dict[int, Callable[[bytes], tuple[int, bytes]]]) -> int:
        request = chain.read(0, 32 + 16 * SPANS_MOST)
        if len(request) < _HEADER.size:
            raise DriverError("a command without its header")
        kind, flags, fence, context, ring = _HEADER.unpack_from(request)
        command = commands.get(kind)
        data = b""
        try:
            if command is None:
                raise _Refused(ERR_UNSPEC)
            code, data = command(request[_HEADER.size :])
        except _Refused as refused:
            code = refused.code
        except struct.error:  # it is shorter than such a command
            code = ERR_PARAMETER
        self.counters["commands"] += 1
        if code >= ERR_UNSPEC:
            self.counters["refused"] += 1
        is_fenced = flags & FENCE
        head = _HEADER.pack(code, is_fenced, fence if is_fenced else 0, context if is_fenced else 0, ring)
        return chain.write(head + data)

    def _resource(self, number: int) -> _Resource:
        found = self._resources.get(number)
        if found is None:
            raise _Refused(ERR_RESOURCE)
        return found

    def _display_info(self, _: bytes) -> tuple[int, bytes]:
        one = struct.pack("<IIIIII", 0, 0, *self._wanted, 1, 0)
        return OK_DISPLAY_INFO, one.ljust(24 * _SCANOUTS, b"\0")

    def _edid(self, data: bytes) -> tuple[int, bytes]:
        (scanout,) = struct.unpack_from("<I", data)
        if scanout:
            raise _Refused(ERR_SCANOUT)
        block = edid(*self._wanted)
        return OK_EDID, struct.pack("<II", len(block), 0) + block.ljust(1024, b"\0")

    def _create(self, data: bytes) -> tuple[int, bytes]:
        number, kind, width, height = struct.unpack_from("<IIII", data)
        if not number or number in self._resources:
            raise _Refused(ERR_RESOURCE)
        if kind not in FORMATS or not (LEAST <= width <= MOST and LEAST <= height <= MOST):
            raise _Refused(ERR_PARAMETER)
        if len(self._resources) >= RESOURCES_MOST:
            raise _Refused(ERR_OUT_OF_MEMORY)
        try:
            self._room.reserve(4 * width * height)
        except VmfsError:
            raise _Refused(ERR_OUT_OF_MEMORY) from None
        self._resources[number] = _Resource(kind, width, height, bytearray(4 * width * height))
        return OK_NODATA, b""

    def _unref(self, data: bytes) -> tuple[int, bytes]:
        (number,) = struct.unpack_from("<I", data)
        self._resource(number)
        self._drop(number)
        if self._scanout is not None and self._scanout[0] == number:
            self._scanout = None
        return OK_NODATA, b""

    def _attach(self, data: bytes) -> tuple[int, bytes]:
        number, count = struct.unpack_from("<II", data)
        resource = self._resource(number)
        if resource.spans is not None:
            raise _Refused(ERR_UNSPEC)
        if not 0 < count <= SPANS_MOST:
            raise _Refused(ERR_PARAMETER)
        rows = struct.iter_unpack("<QII", data[8 : 8 + 16 * count])
        spans = [(address, length) for address, length, _ in rows if length]
        if len(data) < 8 + 16 * count or not all(self.board.is_ram(*span) for span in spans):
            raise _Refused(ERR_PARAMETER)
        resource.back(spans)
        return OK_NODATA, b""

    def _detach(self, data: bytes) -> tuple[int, bytes]:
        resource = self._resource(*struct.unpack_from("<I", data))
        if resource.spans is None:
            raise _Refused(ERR_UNSPEC)
        resource.back(None)
        return OK_NODATA, b""

    def _transfer(self, data: bytes) -> tuple[int, bytes]:
        x, y, width, height, offset, number = struct.unpack_from("<IIIIQI", data)
        resource = self._resource(number)
        if resource.spans is None:
            raise _Refused(ERR_UNSPEC)
        if not resource.holds(x, y, width, height):
            raise _Refused(ERR_PARAMETER)
        if not width or not height:
            return OK_NODATA, b""
        pitch, size = resource.pitch, 4 * width
        if offset + pitch * (height - 1) + size > resource.starts[-1]:
            raise _Refused(ERR_PARAMETER)
        at = pitch * y + 4 * x
        if size == pitch:
            self._copy(resource, offset, at, pitch * height)
        else:
            for row in range(height):
                self._copy(resource, offset + pitch * row, at + pitch * row, size)
        self.counters["transferred"] += size * height
        return OK_NODATA, b""

    def _copy(self, resource: _Resource, offset: int, to: int, size: int) -> None:
        """Bytes of its backing into its pixels."""
        ram, pixels, spans = self.board.ram, resource.pixels, resource.spans
        assert spans is not None
        index = bisect_right(resource.starts, offset) - 1
        skip = offset - resource.starts[index]
        while size:
            address, length = spans[index]
            part = min(length - skip, size)
            pixels[to : to + part] = ram[address + skip : address + skip + part]
            to, size, index, skip = to + part, size - part, index + 1, 0

    def _set_scanout(self, data: bytes) -> tuple[int, bytes]:
        x, y, width, height, scanout, number = struct.unpack_from("<IIIIII", data)
        if scanout:
            raise _Refused(ERR_SCANOUT)
        if not number:
            self._scanout = None
            return OK_NODATA, b""
        if not self._resource(number).holds(x, y, width, height) or not width or not height:
            raise _Refused(ERR_PARAMETER)
        self._scanout = number, x, y, width, height
        self.counters["modes"] += 1
        return OK_NODATA, b""

    def _flush(self, data: bytes) -> tuple[int, bytes]:
        """What is looked at is the resource itself."""
        *rect, number = struct.unpack_from("<IIIII", data)
        if not self._resource(number).holds(*rect):
            raise _Refused(ERR_PARAMETER)
        self.counters["flushes"] += 1
        return OK_NODATA, b""

    def _update_cursor(self, data: bytes) -> tuple[int, bytes]:
        scanout, x, y, _, number = struct.unpack_from("<IiiII", data)
        if scanout:
            raise _Refused(ERR_SCANOUT)
        cursor = b""
        if number:
            resource = self._resource(number)
            if (resource.width, resource.height) != (CURSOR, CURSOR):
                raise _Refused(ERR_PARAMETER)
            cursor = _in_order(bytes(resource.pixels), resource.format)
        self._cursor, self._cursor_at = cursor, (x, y)
        return OK_NODATA, b""

    def _move_cursor(self, data: bytes) -> tuple[int, bytes]:
        scanout, x, y = struct.unpack_from("<Iii", data)
        if scanout:
            raise _Refused(ERR_SCANOUT)
        self._cursor_at = x, y
        return OK_NODATA, b""

    # ---- what is shown

    @property
    def is_shown(self) -> bool:
        """A driver has something on its screen."""
        return self._scanout is not None

    def mode(self) -> GraphicsMode:
        with self.board.lock:
            _, _, _, width, height = self._scanout or (0, 0, 0, *self._wanted)
            return GraphicsMode(width, height, 32)

    def size(self) -> tuple[int, int]:
        mode = self.mode()
        return mode.width, mode.height

    def pixels(self) -> tuple[int, int, bytes]:
        """Width, height, and what is shown with the cursor, lines of pixels that are blue, green, red and 0. From any
        thread. Gone after the machine has ended."""
        with self.board.lock:
            if self._closed:
                raise Gone("the machine was removed")
            if self._scanout is None:
                return *self._wanted, bytes(4 * self._wanted[0] * self._wanted[1])
            number, x, y, width, height = self._scanout
            resource = self._resources[number]
            start, pitch = resource.pitch * y + 4 * x, resource.pitch
            if width == resource.width:
                shown = bytes(resource.pixels[start : start + pitch * height])
            else:
                rows = range(start, start + pitch * height, pitch)
                shown = b"".join(bytes(resource.pixels[row : row + 4 * width]) for row in rows)
            kind, cursor, cursor_at = resource.format, self._cursor, self._cursor_at
        shown = _in_order(shown, kind)
        return width, height, _with_cursor(shown, width, height, cursor, *cursor_at) if cursor else shown

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "mode": str(self.mode()) if self.is_shown else "none"}

    # ---- life

    def close(self) -> None:
        with self.board.lock:
            self._closed = True
            self._forget()

    def save_own(self) -> dict[str, Any]:
        resources = tuple(
            ResourceState(
                number, one.format, one.width, one.height, None if one.spans is None else tuple(one.spans),
                bytes(one.pixels) if any(one.pixels) else b"",
            )
            for number, one in sorted(self._resources.items())
        )  # fmt: skip
        return {
            "events": self._events,
            "resources": resources,
            "scanout": self._scanout,
            "cursor": self._cursor,
            "cursor_at": self._cursor_at,
        }

    def check_own(self, state: GpuState) -> None:
        sizes = {}
        for one in state.resources:
            size = 4 * one.width * one.height
            if not one.number or one.number in sizes or one.format not in FORMATS or len(one.pixels) not in (0, size):
                raise Invalid(f"{self.name}: there is no such resource as {one.number}")
            if not all(length and self.board.is_ram(address, length) for address, length in one.backing or ()):
                raise Invalid(f"{self.name}: resource {one.number} is backed by what is not RAM")
            sizes[one.number] = one.width, one.height
        if state.scanout is not None:
            number, x, y, width, height = state.scanout
            most = sizes.get(number, (0, 0))
            if not width or not height or x + width > most[0] or y + height > most[1]:
                raise Invalid(f"{self.name}: resource {number} cannot be shown")
        is_near = all(-(1 << 31) <= at < 1 << 31 for at in state.cursor_at)
        if len(state.cursor) not in (0, 4 * CURSOR * CURSOR) or not is_near:
            raise Invalid(f"{self.name}: there is no such cursor")

    def load_own(self, state: GpuState) -> None:
        self._room.reserve(sum(4 * one.width * one.height for one in state.resources))
        self._forget()
        for one in state.resources:
            resource = _Resource(one.format, one.width, one.height, bytearray(one.pixels or 4 * one.width * one.height))
            resource.back(None if one.backing is None else list(one.backing))
            self._resources[one.number] = resource
        self._events, self._scanout = state.events, state.scanout
        self._cursor, self._cursor_at = state.cursor, state.cursor_at


def _in_order(pixels: bytes, kind: int) -> bytes:
    """As blue, green, red, and alpha or 0."""
    if kind == 1:
        return pixels
    order, to = FORMATS[kind], bytearray(len(pixels))
    for at, of in enumerate(order):
        if of >= 0:
            to[at::4] = pixels[of::4]
    return bytes(to)


def _with_cursor(shown: bytes, width: int, height: int, cursor: bytes, x: int, y: int) -> bytes:
    """The cursor over it, as far as it is on the screen; its colours are multiplied by its alpha already."""
    out = bytearray(shown)
    for row in range(max(-y, 0), min(CURSOR, height - y)):
        line = cursor[4 * CURSOR * row : 4 * CURSOR * (row + 1)]
        if not any(line):
            continue
        for column in range(max(-x, 0), min(CURSOR, width - x)):
            alpha = line[4 * column + 3]
            if alpha:
                at = 4 * (width * (y + row) + x + column)
                for channel in range(3):
                    under = out[at + channel] * (255 - alpha) // 255
                    out[at + channel] = min(line[4 * column + channel] + under, 255)
    return bytes(out)
