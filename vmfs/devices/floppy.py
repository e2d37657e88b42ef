"""A floppy controller, the 82077AA in its AT mode, with two drives.

Its disks have the formats of `FORMATS`, told by an image's size; all sectors are of 512 bytes, in MFM, with the IDs
that a PC formats. A command is done when its last byte is written: seeks and rotation take no time. A command that
needs a disk to turn does not end while the drive's motor is off or the drive is empty, as no index pulse comes: a reset
ends it.

Left out: FM, other sector sizes, SCAN, marks of deleted data (WRITE DELETED DATA writes plain data), the registers
SRA, SRB and TDR, which are of PS/2 modes. Formatting a track with other IDs than its own is refused (no address mark).

Source: Intel 82077AA data sheet (290166), chapters 2 (registers), 4 and 5 (commands), 6 (status registers).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from vmfs.devices.device import U8, U32, U64, DeviceState, Port, QuietDevice, Window
from vmfs.devices.dma import Dma
from vmfs.devices.medium import Removable
from vmfs.devices.virtio.disk import SECTOR, Disk
from vmfs.words.errors import Invalid

PORT, DIGITAL_INPUT, IRQ, CHANNEL = 0x3F0, 0x3F7, 6, 2
DRIVES = "fd0", "fd1"


class Format(NamedTuple):
    """`rates`: the data rates at which it can be read; `drive`: the type of a drive for it, as CMOS 10h has it."""

    cylinders: int
    heads: int
    sectors: int
    rates: tuple[int, ...]
    drive: int

    @property
    def size(self) -> int:
        return self.cylinders * self.heads * self.sectors * SECTOR


_500K, _300K, _250K, _1M = 0, 1, 2, 3
_DOUBLE, _HIGH, _EXTRA = (_250K, _300K), (_500K,), (_1M,)
FORMATS: Mapping[int, Format] = {
    one.size: one
    for one in (
        Format(40, 1, 8, _DOUBLE, 1), Format(40, 1, 9, _DOUBLE, 1), Format(40, 2, 8, _DOUBLE, 1),
        Format(40, 2, 9, _DOUBLE, 1),  # 360 KiB
        Format(80, 2, 9, _DOUBLE, 3),  # 720 KiB
        Format(80, 2, 15, _HIGH, 2),  # 1.2 MB
        Format(80, 2, 18, _HIGH, 4),  # 1.44 MB
        Format(80, 2, 21, _HIGH, 4), Format(82, 2, 21, _HIGH, 4),
        Format(80, 2, 36, _EXTRA, 5),  # 2.88 MB
    )
}  # fmt: skip
_EMPTY_DRIVE = 4
_LAST_TRACK = 83  # that a drive's head reaches
_RECALIBRATE_STEPS = 79

_STATUS_B, _OUTPUT, _TAPE, _MAIN, _DATA = 1, 2, 3, 4, 5
_RUN, _GATE, _MOTORS = 4, 8, 4  # of the digital output register; the motors' bits begin there
_RATE_RESET = 0x80
_RQM, _TO_HOST, _NON_DMA, _BUSY = 0x80, 0x40, 0x20, 0x10
_CHANGED = 0x80
# ST0
_ABNORMAL, _INVALID, _READY_CHANGED, _SEEK_END, _CHECK = 0x40, 0x80, 0xC0, 0x20, 0x10
# ST1 and ST2
_END_OF_CYLINDER, _CRC, _OVERRUN, _NO_DATA, _PROTECTED, _NO_MARK = 0x80, 0x20, 0x10, 4, 2, 1
_CONTROL_MARK, _WRONG_CYLINDER = 0x40, 0x10
_MT, _MFM = 0x80, 0x40
_IMPLIED_SEEK, _NO_FIFO = 0x40, 0x20
_OF_FIFO = 0x2F

Phase = Literal["idle", "command", "read", "write", "result", "hung"]


class DriveState(DeviceState):
    """`track`: where its head is; `cylinder`: where the controller takes it to be (PCN); `size`: of the disk in it, 0
    without one."""

    track: Annotated[int, msgspec.Meta(ge=0, le=_LAST_TRACK)]
    cylinder: U8
    is_changed: bool
    size: U64
    overlay: dict[U32, Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]]


class FloppyDrive(Removable, QuietDevice[DriveState]):
    """One drive, of a type for the disk that is in it at first."""

    TYPE = "floppy"
    STATE = DriveState
    MODES = "rw", "ro", "cow"
    HAS_DISK = True

    def __init__(self, board: Port, name: str, disk: Disk | None = None, *, path: str = "") -> None:
        super().__init__(board, name)
        if disk is not None:
            self.accepts(disk)
        self.disk, self.path = disk, path
        self.kind = FORMATS[disk.size].drive if disk is not None else _EMPTY_DRIVE
        self.track = self.cylinder = 0
        self.is_changed = True

    @property
    def format(self) -> Format | None:
        return None if self.disk is None else FORMATS[self.disk.size]

    def accepts(self, disk: Disk) -> None:
        if disk.size not in FORMATS:
            sizes = ", ".join(f"{size >> 10}" for size in FORMATS)
            raise Invalid(f"{self.name}: {disk.size} bytes are no floppy; there are those of {sizes} KiB")

    def medium_changed(self) -> None:
        self.is_changed = True

    def step_to(self, track: int) -> None:
        """Move the head. A step with a disk in the drive ends the change line."""
        track = max(0, min(track, _LAST_TRACK))
        if track != self.track and self.disk is not None:
            self.is_changed = False
        self.track = track

    def reset(self) -> None:
        self.track = self.cylinder = 0
        self.is_changed = True

    def save(self) -> DriveState:
        disk = self.disk
        return DriveState(
            track=self.track,
            cylinder=self.cylinder,
            is_changed=self.is_changed,
            size=0 if disk is None else disk.size,
            overlay={} if disk is None else disk.save_map(),
        )

    def check(self, state: DriveState) -> None:
        size = 0 if self.disk is None else self.disk.size
        if state.size != size:
            raise Invalid(f"{self.name}: the disk in it has {size} bytes, and had {state.size}")
        if self.disk is not None:
            self.disk.check_map(state.overlay)
        elif state.overlay:
            raise Invalid(f"{self.name}: there is no disk in it")

    def load(self, state: DriveState) -> None:
        self.track, self.cylinder, self.is_changed = state.track, state.cylinder, state.is_changed
        if self.disk is not None:
            self.disk.load_map(state.overlay)

    def describe(self) -> dict[str, str]:
        shape = self.format
        said = "none" if shape is None else f"{shape.cylinders} cylinders, {shape.heads} heads, {shape.sectors} sectors"
        mode = "none" if self.disk is None else self.disk.mode
        return {"medium": self.medium, "mode": mode, "format": said}

    def close(self) -> None:
        if self.disk is not None:
            self.disk.close()


class FdcState(DeviceState):
    """`command`: its bytes so far; `left`: of PIO, what is still to be read, or room for what is to be written.
    `sector`: where a transfer is: cylinder, head, sector. `senses`: ST0 of each drive that SENSE INTERRUPT tells of."""

    output: U8
    rate: U8
    specify: tuple[U8, U8]
    configuration: tuple[U8, U8]
    perpendicular: U8
    is_locked: bool
    phase: Phase
    command: Annotated[bytes, msgspec.Meta(max_length=9)]
    results: Annotated[bytes, msgspec.Meta(max_length=10)]
    buffer: Annotated[bytes, msgspec.Meta(max_length=SECTOR)]
    sector: tuple[U8, U8, U8]
    senses: Annotated[tuple[U8, ...], msgspec.Meta(max_length=4)]
    is_interrupting: bool


class Fdc(QuietDevice[FdcState]):
    """Region 0: ports 3F0 to 3F5; 1: port 3F7."""

    TYPE = "fdc"
    STATE = FdcState
    irq = IRQ

    def __init__(self, board: Port, name: str, dma: Dma) -> None:
        super().__init__(board, name)
        self.dma = dma
        self.drives: list[FloppyDrive | None] = [None, None, None, None]
        self._clear()

    def windows(self) -> tuple[Window, ...]:
        return Window("port", PORT, 6, 0), Window("port", DIGITAL_INPUT, 1, 1)

    def _clear(self) -> None:
        self.output = _GATE
        self.rate = _250K
        self.specify = 0, 0
        self.configuration = _NO_FIFO, 0
        self.perpendicular = 0
        self.is_locked = False
        self._stop()

    def _stop(self) -> None:
        """Nothing is under way."""
        self.phase: Phase = "idle"
        self.command = self.results = self.buffer = b""
        self.sector = 0, 0, 0
        self.senses: list[int] = []
        self.is_interrupting = False

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        if region == 1:
            drive = self._turning(self.output & 3)
            return _CHANGED if drive is not None and drive.is_changed else 0
        if offset == _OUTPUT:
            return self.output
        if offset == _MAIN:
            return self._status()
        if offset == _DATA:
            return self._read_data()
        return 0xFF

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if region == 1:
            self.rate = value & 3
        elif offset == _OUTPUT:
            self._write_output(value)
        elif offset == _MAIN:
            self.rate = value & 3
            if value & _RATE_RESET and self.output & _RUN:
                self._begin_reset()
                self._end_reset()
        elif offset == _DATA and self.output & _RUN:
            self._write_data(value)

    def _status(self) -> int:
        if not self.output & _RUN or self.phase == "hung":
            return _BUSY if self.phase == "hung" else 0
        status = _RQM
        if self.phase in ("read", "result"):
            status |= _TO_HOST
        if self.phase in ("read", "write"):
            status |= _NON_DMA
        if self.phase != "idle":
            status |= _BUSY
        return status

    def _write_output(self, value: int) -> None:
        was, self.output = self.output, value
        if was & _RUN and not value & _RUN:
            self._begin_reset()
        elif value & _RUN and not was & _RUN:
            self._end_reset()
        self._drive_line()

    def _begin_reset(self) -> None:
        self._stop()
        # LOCK keeps the FIFO's parameters; implied seeks and polling are as after power-on in any case (5.2.9).
        first, second = self.configuration
        self.configuration = (first & _OF_FIFO, second) if self.is_locked else (_NO_FIFO, 0)
        self._drive_line()

    def _end_reset(self) -> None:
        """The drives are polled, and each is news (5.2.4)."""
        self.senses = [_READY_CHANGED | number for number in range(4)]
        self._interrupt()

    def _interrupt(self) -> None:
        self.is_interrupting = True
        self.counters["interrupts"] += 1
        self._drive_line()

    def _drive_line(self) -> None:
        self.set_irq(self.is_interrupting and bool(self.output & _GATE))

    # ---- the data register

    def _read_data(self) -> int:
        if self.phase == "result":
            self.is_interrupting = False
            value, self.results = self.results[0], self.results[1:]
            if not self.results:
                self.phase = "idle"
            self._drive_line()
            return value
        if self.phase == "read":
            value, self.buffer = self.buffer[0], self.buffer[1:]
            if not self.buffer:
                self._next_by_hand()
            return value
        return 0

    def _write_data(self, value: int) -> None:
        if self.phase == "write":
            self.buffer += bytes((value,))
            if len(self.buffer) == SECTOR:
                self._take_by_hand()
            return
        if self.phase not in ("idle", "command"):
            return
        self.command += bytes((value,))
        self.phase = "command"
        row = _find(self.command[0])
        if len(self.command) == (row.length if row is not None else 1):
            self.is_interrupting = False
            self._drive_line()
            self.counters["commands"] += 1
            self.results = b""
            if row is None:
                self._result(_INVALID)
            else:
                row.run(self)

    def _result(self, *values: int) -> None:
        self.buffer = b""
        self.results = bytes(value & 0xFF for value in values)
        self.phase = "result" if values else "idle"
        self.command = b""

    # ---- drives

    @property
    def _unit(self) -> int:
        return self.command[1] & 3

    @property
    def _head(self) -> int:
        return self.command[1] >> 2 & 1

    def _turning(self, unit: int) -> FloppyDrive | None:
        """The drive, while it is selected and its motor is on."""
        on = self.output & _RUN and self.output >> _MOTORS >> unit & 1 and self.output & 3 == unit
        return self.drives[unit] if on else None

    def _disk(self) -> tuple[FloppyDrive, Format] | None:
        """The drive of a command and the format of the disk that turns there; None, and it hangs, where none does."""
        drive = self._turning(self._unit)
        shape = drive.format if drive is not None else None
        if drive is None or shape is None:
            self.phase = "hung"
            return None
        return drive, shape

    # ---- commands without a transfer

    def _specify(self) -> None:
        self.specify = self.command[1], self.command[2]
        self._result()

    def _sense_drive(self) -> None:
        drive = self.drives[self._unit]
        status = self.command[1] & 7 | 0x28
        if drive is not None and not drive.track:
            status |= 0x10
        if drive is not None and drive.disk is not None and not drive.disk.writable:
            status |= 0x40
        self._result(status)

    def _recalibrate(self) -> None:
        unit, drive = self._unit, self.drives[self._unit]
        if drive is None:  # no track 0 comes
            self._seek_ended(unit, _ABNORMAL | _SEEK_END | _CHECK)
            return
        drive.step_to(drive.track - _RECALIBRATE_STEPS)
        drive.cylinder = 0
        self._seek_ended(unit, _SEEK_END | (_ABNORMAL | _CHECK if drive.track else 0))

    def _seek(self) -> None:
        drive = self.drives[self._unit]
        if drive is not None:
            self._step(drive, self.command[2] - drive.cylinder)
            drive.cylinder = self.command[2]
        self._seek_ended(self._unit, _SEEK_END | self._head << 2)

    def _relative_seek(self) -> None:
        drive = self.drives[self._unit]
        if drive is not None:
            by = self.command[2] if self.command[0] & 0x40 else -self.command[2]
            self._step(drive, by)
            drive.cylinder = (drive.cylinder + by) & 0xFF
        self._seek_ended(self._unit, _SEEK_END | self._head << 2)

    @staticmethod
    def _step(drive: FloppyDrive, by: int) -> None:
        drive.step_to(drive.track + by)

    def _seek_ended(self, unit: int, status: int) -> None:
        self.senses = [sense for sense in self.senses if sense & 3 != unit] + [status | unit]
        self._result()
        self._interrupt()

    def _sense_interrupt(self) -> None:
        if not self.senses:
            self._result(_INVALID)
            return
        sense = self.senses.pop(0)
        drive = self.drives[sense & 3]
        self._result(sense, drive.cylinder if drive is not None else 0)

    def _configure(self) -> None:
        self.configuration = self.command[2], self.command[3]
        self._result()

    def _version(self) -> None:
        self._result(0x90)

    def _dump(self) -> None:
        cylinders = (drive.cylinder if drive is not None else 0 for drive in self.drives)
        lock = self.is_locked << 7 | self.perpendicular & 0x7F
        self._result(*cylinders, *self.specify, self.sector[2], lock, *self.configuration)

    def _set_perpendicular(self) -> None:
        value = self.command[1]
        # Without OW only the gap and write gate bits change (5.2.10).
        self.perpendicular = value & 0x7F if value & 0x80 else self.perpendicular & 0x3C | value & 3
        self._result()

    def _lock(self) -> None:
        self.is_locked = bool(self.command[0] & 0x80)
        self._result(self.is_locked << 4)

    # ---- commands that transfer

    def _end(self, st0: int, st1: int = 0, st2: int = 0) -> None:
        """The result of one: with the next sector's ID after a success."""
        cylinder, head, sector = self.sector
        st0 |= self.command[1] & 7 if len(self.command) > 1 else 0
        self._result(st0, st1, st2, cylinder, head, sector, 2)
        self._interrupt()

    def _refuse(self, st1: int, st2: int = 0) -> None:
        self._end(_ABNORMAL, st1, st2)

    def _begin(self) -> tuple[FloppyDrive, Format] | None:
        """What is common to those that look for a sector; None where the command has ended, or hangs."""
        self.sector = self.command[2], self.command[3], self.command[4]
        if self.configuration[0] & _IMPLIED_SEEK and (drive := self.drives[self._unit]) is not None:
            self._step(drive, self.command[2] - drive.cylinder)
            drive.cylinder = self.command[2]
        found = self._disk()
        if found is None:
            return None
        drive, shape = found
        if not self._is_readable(drive, shape):
            self._refuse(_NO_MARK)
        elif self.command[2] != drive.track:
            self._refuse(_NO_DATA, _WRONG_CYLINDER)
        elif self.command[3] != self._head or self.command[5] != 2:
            self._refuse(_NO_DATA)
        else:
            return found
        return None

    def _is_readable(self, drive: FloppyDrive, shape: Format) -> bool:
        """Whether there are address marks for this head, at this rate."""
        return bool(
            self.command[0] & _MFM
            and self.rate in shape.rates
            and drive.track < shape.cylinders
            and self._head < shape.heads
        )

    def _offset(self, shape: Format) -> int | None:
        """Of the sector in the image; None where the disk has none of that ID."""
        cylinder, head, sector = self.sector
        if not (cylinder < shape.cylinders and head < shape.heads and 1 <= sector <= shape.sectors):
            return None
        return ((cylinder * shape.heads + head) * shape.sectors + sector - 1) * SECTOR

    def _advance(self) -> bool:
        """Go to the next sector; whether there is one before the end of the cylinder."""
        cylinder, head, sector = self.sector
        if sector != self.command[6]:
            self.sector = cylinder, head, (sector + 1) & 0xFF
            return True
        if self.command[0] & _MT and not head & 1:
            self.sector = cylinder, head | 1, 1
            return True
        self.sector = (cylinder + 1) & 0xFF, head & ~1 if self.command[0] & _MT else head, 1
        return False

    def _load_sector(self, drive: FloppyDrive, shape: Format) -> bytes | None:
        """Its data; None where the command has ended with an error."""
        offset = self._offset(shape)
        if offset is None:
            self._refuse(_NO_DATA)
            return None
        data = bytearray(SECTOR)
        try:
            assert drive.disk is not None
            drive.disk.read(offset, [memoryview(data)])
        except OSError as error:
            self._host_failed(drive, error)
            return None
        drive.counters["read_bytes"] += SECTOR
        return bytes(data)

    def _store_sector(self, drive: FloppyDrive, shape: Format, data: bytes) -> bool:
        offset = self._offset(shape)
        if offset is None:
            self._refuse(_NO_DATA)
            return False
        try:
            assert drive.disk is not None
            drive.disk.write(offset, [memoryview(data)])
        except OSError as error:
            self._host_failed(drive, error)
            return False
        drive.counters["write_bytes"] += SECTOR
        return True

    def _host_failed(self, drive: FloppyDrive, error: OSError) -> None:
        drive.counters[f"host_errors.{errno.errorcode.get(error.errno or errno.EIO, str(error.errno))}"] += 1
        self.board.counters["host_errors"] += 1
        self._refuse(_CRC, _CRC)

    @property
    def _by_hand(self) -> bool:
        """The processor moves the bytes (ND of SPECIFY)."""
        return bool(self.specify[1] & 1)

    def _read_sectors(self) -> None:
        found = self._begin()
        if found is None:
            return
        if self._by_hand:
            self._offer_by_hand(*found)
            return
        marks = _CONTROL_MARK if self.command[0] & 0x1F == 0x0C else 0
        for _ in range(2 * 256):
            data = self._load_sector(*found)
            if data is None:
                return
            moved, ended = self.dma.to_memory(CHANNEL, data)
            if not ended and moved < SECTOR:
                self._refuse(_OVERRUN)
                return
            more = self._advance()
            if ended or marks:
                self._end(0, 0, marks)
                return
            if not more:
                break
        self._refuse(_END_OF_CYLINDER)

    def _write_sectors(self) -> None:
        found = self._begin()
        if found is None or self._refuses_writes(found[0]):
            return
        if self._by_hand:
            self._accept_by_hand()
            return
        for _ in range(2 * 256):
            if self._offset(found[1]) is None:
                self._refuse(_NO_DATA)
                return
            data, ended = self.dma.from_memory(CHANNEL, SECTOR)
            if not ended and len(data) < SECTOR:
                self._refuse(_OVERRUN)
                return
            if not self._store_sector(*found, data.ljust(SECTOR, b"\0")):
                return
            more = self._advance()
            if ended:
                self._end(0)
                return
            if not more:
                break
        self._refuse(_END_OF_CYLINDER)

    def _refuses_writes(self, drive: FloppyDrive) -> bool:
        if drive.disk is not None and drive.disk.writable:
            return False
        self._refuse(_PROTECTED)
        return True

    def _verify(self) -> None:
        """As a read whose data goes nowhere; EC has it end after SC sectors (5.1.7)."""
        found = self._begin()
        if found is None:
            return
        left = self.command[8] or 256
        while True:
            if self._load_sector(*found) is None:
                return
            left -= 1
            more = self._advance()
            if self.command[1] & 0x80 and not left or not more:
                self._end(0)
                return

    def _read_track(self) -> None:
        """Sectors as they come after the index hole, whatever their IDs: 1 and so on."""
        found = self._begin()
        if found is None:
            return
        cylinder, head, _ = self.sector
        wanted, self.sector = self.command[4], (cylinder, head, 1)
        if self._by_hand:
            self._refuse(_OVERRUN)
            return
        for number in range(1, (self.command[6] or 1) + 1):
            self.sector = cylinder, head, number
            data = self._load_sector(*found)
            if data is None:
                return
            moved, ended = self.dma.to_memory(CHANNEL, data)
            if ended:
                self._end(0, 0 if number >= wanted else _NO_DATA)
                return
            if moved < SECTOR:
                self._refuse(_OVERRUN)
                return
        self._end(0, 0)

    def _read_id(self) -> None:
        found = self._disk()
        if found is None:
            return
        drive, shape = found
        self.sector = drive.track, self._head, 1
        if self._is_readable(drive, shape):
            self._end(0)
        else:
            self._refuse(_NO_MARK)

    def _format(self) -> None:
        """The IDs come from the processor: C, H, R, N of each sector; each gets the filler."""
        found = self._disk()
        if found is None:
            return
        drive, shape = found
        count, filler = self.command[3], self.command[5]
        self.sector = drive.track, self._head, 1
        if self._refuses_writes(drive):
            return
        if not self._is_readable(drive, shape) or self.command[2] != 2 or count > shape.sectors:
            self._refuse(_NO_MARK)
            return
        if self._by_hand:
            self._refuse(_OVERRUN)
            return
        for _ in range(count):
            ids, ended = self.dma.from_memory(CHANNEL, 4)
            if len(ids) < 4:
                self._refuse(_OVERRUN)
                return
            if ids[0] != drive.track or ids[1] != self._head or ids[3] != 2:
                self._refuse(_NO_MARK)
                return
            self.sector = ids[0], ids[1], ids[2]
            if not self._store_sector(drive, shape, bytes((filler,)) * SECTOR):
                return
            if ended:
                break
        self._end(0)

    # ---- by hand

    def _still_there(self) -> tuple[FloppyDrive, Format] | None:
        """The disk of a transfer that goes on. Its motor may be off meanwhile, or it may be gone."""
        found = self._disk()
        if found is None:
            self.buffer = b""
        return found

    def _offer_by_hand(self, drive: FloppyDrive, shape: Format) -> None:
        data = self._load_sector(drive, shape)
        if data is not None:
            self.buffer = data
            self.phase = "read"
            self._interrupt()

    def _next_by_hand(self) -> None:
        self.is_interrupting = False
        self._drive_line()
        if not self._advance():
            self._refuse(_END_OF_CYLINDER)  # there is no terminal count by hand
        elif (found := self._still_there()) is not None:
            self._offer_by_hand(*found)

    def _accept_by_hand(self) -> None:
        self.buffer = b""
        self.phase = "write"
        self._interrupt()

    def _take_by_hand(self) -> None:
        self.is_interrupting = False
        self._drive_line()
        found, data = self._still_there(), self.buffer
        if found is None or self._refuses_writes(found[0]) or not self._store_sector(*found, data):
            return
        if self._advance():
            self._accept_by_hand()
        else:
            self._refuse(_END_OF_CYLINDER)

    # ---- life

    def connect(self, drive: FloppyDrive) -> None:
        unit = DRIVES.index(drive.name)
        if self.drives[unit] is not None:
            raise Invalid(f"there is a drive {drive.name} already")
        self.drives[unit] = drive
        drive.boot_path = f"/pci@i0cf8/isa@{self.board.chipset.isa_slot:x}/fdc@{PORT:04x}/floppy@{unit}"

    def disconnect(self, drive: FloppyDrive) -> None:
        self.drives[DRIVES.index(drive.name)] = None

    @property
    def types(self) -> tuple[int, int]:
        """Of the drives, as CMOS 10h has them; 0 where there is none."""
        first, second = (drive.kind if drive is not None else 0 for drive in self.drives[:2])
        return first, second

    def reset(self) -> None:
        self._clear()
        self._drive_line()

    def save(self) -> FdcState:
        return FdcState(**{name: _plain(getattr(self, name)) for name in FdcState.__struct_fields__})

    def check(self, state: FdcState) -> None:
        if (state.phase == "result") != bool(state.results) or (state.phase == "read") != bool(
            state.buffer and state.phase != "write"
        ):
            raise Invalid(f"{self.name}: a {state.phase} of nothing")
        if state.phase in ("read", "write") and len(state.command) != 9 or len(state.buffer) >= SECTOR + (
            state.phase == "read"
        ):
            raise Invalid(f"{self.name}: it is in the middle of no command")
        row = _find(state.command[0]) if state.command else None
        if state.phase == "command" and (row is None or len(state.command) >= row.length):
            raise Invalid(f"{self.name}: a command that is whole")

    def load(self, state: FdcState) -> None:
        for name in FdcState.__struct_fields__:
            setattr(self, name, getattr(state, name))
        self.senses = list(state.senses)
        self._drive_line()

    def describe(self) -> dict[str, str]:
        return {"drives": " ".join(drive.name for drive in self.drives if drive is not None) or "none"}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Row(NamedTuple):
    """A command: its code and the bits that say it, its length with its parameters, and what does it."""

    code: int
    mask: int
    length: int
    run: Callable[[Fdc], None]


COMMANDS: tuple[Row, ...] = (
    Row(0x06, 0x1F, 9, Fdc._read_sectors),
    Row(0x0C, 0x1F, 9, Fdc._read_sectors),  # READ DELETED DATA: what there is has the other mark
    Row(0x05, 0x3F, 9, Fdc._write_sectors),
    Row(0x09, 0x3F, 9, Fdc._write_sectors),
    Row(0x02, 0x9F, 9, Fdc._read_track),
    Row(0x16, 0x1F, 9, Fdc._verify),
    Row(0x0D, 0xBF, 6, Fdc._format),
    Row(0x0A, 0xBF, 2, Fdc._read_id),
    Row(0x07, 0xFF, 2, Fdc._recalibrate),
    Row(0x08, 0xFF, 1, Fdc._sense_interrupt),
    Row(0x03, 0xFF, 3, Fdc._specify),
    Row(0x04, 0xFF, 2, Fdc._sense_drive),
    Row(0x0F, 0xFF, 3, Fdc._seek),
    Row(0x8F, 0xBF, 3, Fdc._relative_seek),
    Row(0x13, 0xFF, 4, Fdc._configure),
    Row(0x10, 0xFF, 1, Fdc._version),
    Row(0x0E, 0xFF, 1, Fdc._dump),
    Row(0x12, 0xFF, 2, Fdc._set_perpendicular),
    Row(0x14, 0x7F, 1, Fdc._lock),
)


def _find(code: int) -> Row | None:
    return next((row for row in COMMANDS if code & row.mask == row.code), None)
