"""USB mass storage: a disk, by Bulk-Only Transport and SCSI's commands.

Left out, and answered as unknown commands: what discards, mode select, diagnostics, persistent reservations. A disk has
no unit attention after a reset.

Source: Universal Serial Bus Mass Storage Class, Bulk-Only Transport 1.0; SPC-3 and SBC-2 (INCITS 408, 405).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import msgspec

from vmfs.devices.device import U8, U32, U64, Port
from vmfs.devices.ide.ata import OverlayMap
from vmfs.devices.ide.drive import cut
from vmfs.devices.scsi import (
    BAD_COMMAND,
    BAD_FIELD,
    NO_SENSE,
    NOT_SAVED,
    OUT_OF_RANGE,
    READ_ERROR,
    WRITE_ERROR,
    WRITE_PROTECTED,
    Sense,
    sense_data,
)
from vmfs.devices.usb.device import BULK, SUPER, Endpoint, Job, Setup, Stall, UsbDevice, UsbState, scatter
from vmfs.devices.virtio.disk import SECTOR, Disk
from vmfs.words.errors import Invalid

BULK_IN, BULK_OUT = 0x81, 0x02
_CBW, _CSW = struct.Struct("<4sIIBBB16s"), struct.Struct("<4sIIB")
PASSED, FAILED, PHASE_ERROR = range(3)
_REPLY_MOST = 4096
_FUA = 0x08  # of a write's second byte
_RESET, _MAX_LUN = 0xFF, 0xFE


class UsbDiskState(UsbState):
    """Of a command: `tag` and `wanted`, the bytes that the host has announced; `length`, those that the disk has or
    takes, of `reply` or from `start` on; `moved` of them. `partial`: what came of a sector. `is_stuck`: nothing but a
    reset is taken (6.6.1). The rest as of virtio's disks."""

    phase: Literal["command", "in", "out", "status"]
    tag: U32
    wanted: U32
    length: U32
    moved: U32
    reply: Annotated[bytes, msgspec.Meta(max_length=_REPLY_MOST)]
    start: U64
    partial: Annotated[bytes, msgspec.Meta(max_length=SECTOR - 1)]
    through: bool
    status: Annotated[int, msgspec.Meta(ge=PASSED, le=PHASE_ERROR)]
    sense: tuple[U8, U8, U8]
    is_stuck: bool
    size: U64
    overlay: OverlayMap


class _Failed(Exception):
    """A command, with what it is to be asked for."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(str(sense))
        self.sense = sense


class UsbDisk(UsbDevice[UsbDiskState]):
    """`path` is what `info` shows."""

    TYPE = "usb-disk"
    STATE = UsbDiskState
    SPEED = SUPER
    PRODUCT, TITLE = 0x0003, "disk"
    INTERFACE = 8, 6, 0x50
    ENDPOINTS = (Endpoint(BULK_IN, BULK, 1024), Endpoint(BULK_OUT, BULK, 1024))
    HAS_DISK = True

    def __init__(self, board: Port, name: str, disk: Disk, *, path: str = "") -> None:
        super().__init__(board, name)
        self.disk = disk
        self.path = path
        self.blocks = disk.size // SECTOR
        self.sense = NO_SENSE
        self._begin_anew()

    def _begin_anew(self) -> None:
        """The next is a command."""
        self.phase: Literal["command", "in", "out", "status"] = "command"
        self.tag = self.wanted = self.length = self.moved = self.start = 0
        self.reply = self.partial = b""
        self.through = self.is_stuck = False
        self.status = PASSED

    def bus_reset(self) -> None:
        super().bus_reset()
        self.sense = NO_SENSE
        self._begin_anew()

    def configured(self) -> None:
        self._begin_anew()

    def request(self, setup: Setup, data: bytes) -> bytes:
        if (setup.kind, setup.request, setup.value, setup.index) == (0xA1, _MAX_LUN, 0, 0):
            return b"\0"[: setup.length]
        if (setup.kind, setup.request) == (0x21, _RESET):
            self._begin_anew()
            return b""
        raise Stall

    def clear_halt(self, setup: Setup) -> bytes:
        super().clear_halt(setup)
        if self.is_stuck:  # until it is reset
            self.halted |= {BULK_IN, BULK_OUT}
        return b""

    # ---- Bulk-Only Transport

    def transfer(self, endpoint: int, views: list[memoryview]) -> int | Job | None:
        if endpoint == BULK_OUT:
            if self.phase == "command":
                return self._take_command(views)
            return self._take(views) if self.phase == "out" else None
        if self.phase == "in":
            return self._give(views)
        return self._give_status(views) if self.phase == "status" else None

    def _take_command(self, views: list[memoryview]) -> int | Job:
        size = sum(map(len, views))
        data = b"".join(bytes(view) for view in views) if size == _CBW.size else b""
        signature, tag, wanted, flags, unit, length, block = _CBW.unpack(data or bytes(_CBW.size))
        if signature != b"USBC" or unit or not 1 <= length <= 16:
            self.counters["bad_commands"] += 1
            self.is_stuck = True
            self.halt(BULK_IN)
            self.halt(BULK_OUT)
            raise Stall
        self._begin_anew()
        self.tag, self.wanted = tag, wanted
        to_host = bool(flags & 0x80)
        self.counters["commands"] += 1
        operation = block[0]
        if operation != 0x03:
            self.sense = NO_SENSE
        if operation in _SYNCHRONIZE:
            self.phase = ("in" if to_host else "out") if wanted else "status"
            return Job(self._flush, self._flushed)
        try:
            run = _COMMANDS.get(operation)
            if run is None:
                raise _Failed(BAD_COMMAND)
            gives, length = run(self, block)
        except _Failed as failure:
            self._fail(failure.sense)
            gives, length = to_host, 0
        if length and (gives != to_host or not wanted or length > wanted):
            if self.reply and gives == to_host and wanted:
                length = wanted  # of an answer the host takes less
                self.reply = self.reply[:length]
            else:
                self.status, length, self.reply = PHASE_ERROR, 0, b""
        self.length = length
        self.phase = ("in" if to_host else "out") if wanted else "status"
        return _CBW.size

    def _fail(self, sense: Sense) -> None:
        self.status, self.sense, self.length = FAILED, sense, self.moved

    def _no_more(self, endpoint: int) -> Stall:
        """The host wants to move more than there is: the endpoint is halted, and the status comes next."""
        self.halt(endpoint)
        self.phase = "status"
        return Stall()

    def _moved_so_far(self, count: int, asked: int) -> int:
        self.moved += count
        if self.moved == self.wanted or self.phase == "in" and count < asked:
            self.phase = "status"
        return count

    def _give_status(self, views: list[memoryview]) -> int:
        if sum(map(len, views)) < _CSW.size:
            raise Stall
        answer = _CSW.pack(b"USBS", self.tag, self.wanted - self.moved, self.status)
        self._begin_anew()
        return scatter(answer, views)

    # ---- data

    def _give(self, views: list[memoryview]) -> int | Job:
        asked = sum(map(len, views))
        count = min(asked, self.length - self.moved)
        if not count and asked:
            raise self._no_more(BULK_IN)
        if self.reply:
            scatter(self.reply[self.moved : self.moved + count], views)
            return self._moved_so_far(count, asked)
        at, into = self.start + self.moved, cut(views, count)
        skip, end = at % SECTOR, -(-(at + count) // SECTOR) * SECTOR
        is_whole = not skip and end == at + count
        sectors = bytearray(0 if is_whole else end - at + skip)

        def do() -> None:
            self.disk.read(at - skip, into if is_whole else [memoryview(sectors)])

        def then(error: OSError | None) -> int:
            if error is not None:
                self._host_failed(error, READ_ERROR)
                raise self._no_more(BULK_IN)
            if not is_whole:
                scatter(bytes(sectors[skip : skip + count]), into)
            self._count("read", count)
            return self._moved_so_far(count, asked)

        return Job(do, then, lambda: is_whole and self.disk.read_at_once(at, into))

    def _take(self, views: list[memoryview]) -> int | Job:
        asked = sum(map(len, views))
        count = min(asked, self.length - self.moved)
        if not count and asked:
            raise self._no_more(BULK_OUT)
        at, data = self.start + self.moved - len(self.partial), cut(views, count)
        whole = (len(self.partial) + count) // SECTOR * SECTOR
        rest = self.partial
        if self.partial or whole != count:
            joined = self.partial + b"".join(bytes(view) for view in data)
            data, rest = [memoryview(joined)[:whole]], joined[whole:]

        def do() -> None:
            if whole:
                self.disk.write(at, data, through=self.through)

        def then(error: OSError | None) -> int:
            if error is not None:
                self._host_failed(error, WRITE_ERROR)
                raise self._no_more(BULK_OUT)
            self.partial = rest
            self._count("write", count)
            done = self._moved_so_far(count, asked)
            if count < asked:
                raise self._no_more(BULK_OUT)
            return done

        return Job(do, then)

    def _count(self, what: str, count: int) -> None:
        self.counters[f"{what}_requests"] += 1
        self.counters[f"{what}_bytes"] += count

    def _host_failed(self, error: OSError, sense: Sense) -> None:
        self.count_host_error(error)
        self._fail(sense)

    # ---- commands: whether data goes to the host, and how much

    def _answer(self, data: bytes, room: int) -> tuple[bool, int]:
        self.reply = data[:room]
        return True, len(self.reply)

    def _nothing(self, block: bytes) -> tuple[bool, int]:
        return True, 0

    def _request_sense(self, block: bytes) -> tuple[bool, int]:
        sense, self.sense = self.sense, NO_SENSE
        return self._answer(sense_data(sense), block[4])

    def _inquiry(self, block: bytes) -> tuple[bool, int]:
        room = int.from_bytes(block[3:5], "big")
        if not block[1] & 1:
            if block[2]:
                raise _Failed(BAD_FIELD)
            return self._answer(b"\0\0\5\2\x1f\0\0\0" + b"vmfs    " + b"vmfs disk".ljust(16) + b"1.0 ", room)
        serial = self.name.encode()
        pages = {
            0x00: b"\x00\x80\x83",
            0x80: serial,
            0x83: bytes((2, 1, 0, 8 + len(serial))) + b"vmfs    " + serial,
        }
        page = pages.get(block[2])
        if page is None:
            raise _Failed(BAD_FIELD)
        return self._answer(struct.pack(">BBH", 0, block[2], len(page)) + page, room)

    def _mode_sense(self, block: bytes) -> tuple[bool, int]:
        is_long = block[0] == 0x5A
        room = int.from_bytes(block[7:9], "big") if is_long else block[4]
        page, control = block[2] & 0x3F, block[2] >> 6
        if control == 3:
            raise _Failed(NOT_SAVED)
        if page not in (0x08, 0x3F) or block[3] not in (0, 0xFF):
            raise _Failed(BAD_FIELD)
        has_cache = 4 if self.disk.writable and control != 1 else 0
        pages = bytes((8, 0x12, has_cache)).ljust(0x14, b"\0")
        flags = 0x10 | (0 if self.disk.writable else 0x80)  # FUA; write protected
        if is_long:
            header = struct.pack(">HBBHH", 6 + len(pages), 0, flags, 0, 0)
        else:
            header = bytes((3 + len(pages), 0, flags, 0))
        return self._answer(header + pages, room)

    def _capacity(self, block: bytes) -> tuple[bool, int]:
        return self._answer(struct.pack(">II", min(self.blocks - 1, 0xFFFF_FFFF), SECTOR), 8)

    def _long_capacity(self, block: bytes) -> tuple[bool, int]:
        if block[1] & 0x1F != 0x10:
            raise _Failed(BAD_COMMAND)
        data = struct.pack(">QI", self.blocks - 1, SECTOR).ljust(32, b"\0")
        return self._answer(data, int.from_bytes(block[10:14], "big"))

    def _format_capacities(self, block: bytes) -> tuple[bool, int]:
        data = struct.pack(">III", 8, min(self.blocks, 0xFFFF_FFFF), 2 << 24 | SECTOR)  # it is formatted
        return self._answer(data, int.from_bytes(block[7:9], "big"))

    def _units(self, block: bytes) -> tuple[bool, int]:
        return self._answer(struct.pack(">II8x", 8, 0), int.from_bytes(block[6:10], "big"))

    def _move(self, block: bytes) -> tuple[bool, int]:
        """Read or write."""
        address, count = _address(block)
        is_read = block[0] & 0x0F == 0x08
        if not is_read and not self.disk.writable:
            raise _Failed(WRITE_PROTECTED)
        if address + count > self.blocks:
            raise _Failed(OUT_OF_RANGE)
        self.start = address * SECTOR
        self.through = not is_read and block[0] != 0x0A and bool(block[1] & _FUA)
        return is_read, count * SECTOR

    def _verify(self, block: bytes) -> tuple[bool, int]:
        address, count = _address(block)
        if block[1] & 0x02:  # with the host's data
            raise _Failed(BAD_FIELD)
        if address + count > self.blocks:
            raise _Failed(OUT_OF_RANGE)
        return True, 0

    def _flush(self) -> None:
        if self.disk.writable:
            self.disk.flush()

    def _flushed(self, error: OSError | None) -> int:
        if error is not None:
            self._host_failed(error, WRITE_ERROR)
        else:
            self.counters["flushes"] += 1
        return _CBW.size

    # ---- life

    def save(self) -> UsbDiskState:
        return UsbDiskState(
            **self.save_usb(),
            **{name: getattr(self, name) for name in _PLAIN},
            size=self.disk.size,
            overlay=self.disk.save_map(),
        )

    def check(self, state: UsbDiskState) -> None:
        if state.size != self.disk.size:
            raise Invalid(f"{self.name}: the disk has {self.disk.size} bytes, and had {state.size}")
        is_right = (
            state.moved <= state.length <= state.wanted
            and (len(state.reply) == state.length or not state.reply and state.start % SECTOR == 0)
            and (state.reply or state.start + state.length <= state.size)
            and (not state.partial or state.phase == "out" and len(state.partial) <= state.moved)
            and (state.phase != "out" or self.disk.writable or not state.length)
            and not (state.phase == "out" and state.reply)
            and {BULK_IN, BULK_OUT}.issuperset(state.halted)
        )
        if not is_right:
            raise Invalid(f"{self.name}: a command that it cannot have")
        self.disk.check_map(state.overlay)

    def load(self, state: UsbDiskState) -> None:
        self.load_usb(state)
        for name in _PLAIN:
            setattr(self, name, getattr(state, name))
        self.disk.load_map(state.overlay)

    def close(self) -> None:
        if self.hub is None:
            self.disk.close()
        else:
            self.hub.at_end(self, self.disk.close)

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "path": self.path, "mode": self.disk.mode, "size": str(self.disk.size)}


def _address(block: bytes) -> tuple[int, int]:
    """The first block and how many there are, by the command's length, which its first three bits say."""
    group = block[0] >> 5
    if group == 0:
        return int.from_bytes(block[1:4], "big") & 0x1F_FFFF, block[4] or 256
    layout, at = {1: (">IxH", 2), 4: (">QI", 2), 5: (">II", 2)}[group]
    address, count = struct.unpack_from(layout, block, at)
    return address, count


_PLAIN = (
    "phase", "tag", "wanted", "length", "moved", "reply", "start", "partial", "through", "status", "sense", "is_stuck",
)  # fmt: skip
_SYNCHRONIZE = 0x35, 0x91
_COMMANDS: Mapping[int, Callable[[UsbDisk, bytes], tuple[bool, int]]] = {
    0x00: UsbDisk._nothing,  # TEST UNIT READY
    0x03: UsbDisk._request_sense,
    0x08: UsbDisk._move, 0x28: UsbDisk._move, 0x88: UsbDisk._move, 0xA8: UsbDisk._move,
    0x0A: UsbDisk._move, 0x2A: UsbDisk._move, 0x8A: UsbDisk._move, 0xAA: UsbDisk._move,
    0x12: UsbDisk._inquiry,
    0x1A: UsbDisk._mode_sense,
    0x1B: UsbDisk._nothing,  # START STOP UNIT
    0x1E: UsbDisk._nothing,  # PREVENT ALLOW MEDIUM REMOVAL
    0x23: UsbDisk._format_capacities,
    0x25: UsbDisk._capacity,
    0x2F: UsbDisk._verify,
    0x5A: UsbDisk._mode_sense,
    0x9E: UsbDisk._long_capacity,
    0xA0: UsbDisk._units,
}  # fmt: skip
