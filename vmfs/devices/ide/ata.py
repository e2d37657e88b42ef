"""An ATA disk: PIO, multiple, DMA; CHS, LBA of 28 and of 48 bits; IDENTIFY DEVICE, SET FEATURES, flushes.

At a port of SATA it has queued commands (NCQ). What is not there and is answered with ABRT: SMART, security, host
protected area, streaming commands, queues of PATA.
A disk that is `ro` aborts what would write.

Source: ATA/ATAPI-6 (T13/1410D), chapters 6.2 (addresses), 8 (commands) and 8.15 (IDENTIFY DEVICE); ATA8-ACS, 4.15
(NCQ), A.3 and A.14 (logs).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec

from vmfs.devices.device import U32, U64, Port
from vmfs.devices.ide.drive import (
    ABRT,
    DRDY,
    DSC,
    ERR,
    IDNF,
    LBA,
    QUEUED,
    UNC,
    WRITE_QUEUED,
    Drive,
    DriveState,
    mode_words,
    words_of,
)
from vmfs.devices.virtio.disk import SECTOR, Disk
from vmfs.words.errors import Invalid

MULTIPLE_MOST = 16  # sectors of a block
_LBA28_MOST = 0x0FFF_FFFF
_LBA48_MOST = (1 << 48) - 1
_HEADS, _TRACK, _CYLINDERS_MOST = 16, 63, 16383
_NO_ADDRESS = -1
_READ_LOG, _DIRECTORY, _QUEUE_ERRORS = 0x2F, 0x00, 0x10
_ERROR = struct.Struct("<BxBB3BB3BxH")  # of a queued command: tag, status, error, address, device, address, count
_NOT_QUEUED = 0x80
_FUA = 0x80  # of the device register

OverlayMap = dict[U32, Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]]


class AtaState(DriveState):
    """`address`: of the next sector; `left`: how many are to come, `block` at a time; `translation`: heads and
    sectors a track as INITIALIZE DEVICE PARAMETERS has set them; `queue_error`: what the log says of the queued command
    that has failed, until that is read; the rest as of virtio's disks."""

    VERSION: ClassVar[int] = 2

    address: U64
    left: Annotated[int, msgspec.Meta(ge=0, le=0x1_0000)]
    block: Annotated[int, msgspec.Meta(ge=0, le=MULTIPLE_MOST)]
    multiple: Annotated[int, msgspec.Meta(ge=0, le=MULTIPLE_MOST)]
    translation: tuple[Annotated[int, msgspec.Meta(ge=1, le=16)], Annotated[int, msgspec.Meta(ge=1, le=255)]]
    write_cache: bool
    standby: bool
    queue_error: Annotated[bytes, msgspec.Meta(max_length=_ERROR.size)]
    size: U64
    overlay: OverlayMap


class AtaDisk(Drive[AtaState]):
    """`path` is what `info` shows."""

    TYPE = "ata-disk"
    STATE = AtaState
    SIGNATURE = 0, 0
    AFTER_RESET = DRDY | DSC
    HAS_DISK = True

    def __init__(self, board: Port, name: str, disk: Disk, *, path: str = "", serial: str = "") -> None:
        self.disk = disk
        self.path = path
        self.serial = serial or name
        self.sectors = min(disk.size // SECTOR, _LBA48_MOST)
        self.cylinders, *translation = geometry(self.sectors)
        self._own_translation = translation[0], translation[1]
        self._defaults()
        super().__init__(board, name)

    def _defaults(self) -> None:
        self.translation = self._own_translation
        self.multiple = 0
        self.write_cache = True
        self.address = self.left = self.block = 0

    def reset(self) -> None:
        super().reset()
        self._defaults()

    # ---- addresses

    @property
    def _is_extended(self) -> bool:
        return self.command in _EXTENDED

    def _asked(self) -> tuple[int, int]:
        """The address and the number of sectors that the registers say; _NO_ADDRESS for what is none."""
        low, mid, high = self.low & 0xFF, self.mid & 0xFF, self.high & 0xFF
        if self._is_extended:
            upper = self.low >> 8 | self.mid & 0xFF00 | (self.high & 0xFF00) << 8
            count = self.features if self.command in QUEUED else self.sector_count
            return low | mid << 8 | high << 16 | upper << 24, count or 0x1_0000
        count = self.sector_count & 0xFF or 0x100
        head = self.device & 0xF
        if self.device & LBA:
            return low | mid << 8 | high << 16 | head << 24, count
        heads, track = self.translation
        if head >= heads or not 1 <= low <= track:
            return _NO_ADDRESS, count
        return ((high << 8 | mid) * heads + head) * track + low - 1, count

    def _show_address(self) -> None:
        """Where a command has come to: the first sector that it has not transferred, and how many are left."""
        address, left = self.address, self.left
        if self._is_extended:
            self.low = address & 0xFF | (address >> 24 & 0xFF) << 8
            self.mid = address >> 8 & 0xFF | (address >> 32 & 0xFF) << 8
            self.high = address >> 16 & 0xFF | (address >> 40 & 0xFF) << 8
            if self.command not in QUEUED:  # it has its tag there
                self.sector_count = left & 0xFFFF
            return
        self.sector_count = left & 0xFF
        if self.device & LBA:
            head, self.low = address >> 24, address & 0xFF
            self.mid, self.high = address >> 8 & 0xFF, address >> 16 & 0xFF
        else:
            heads, track = self.translation
            rest, sector = divmod(address, track)
            cylinder, head = divmod(rest, heads)
            self.low, self.mid, self.high = sector + 1, cylinder & 0xFF, cylinder >> 8 & 0xFF
        self.device = self.device & 0xF0 | head & 0xF

    # ---- commands

    def begin(self, command: int) -> None:
        self.command = command
        self.error = 0
        self.status = DRDY | DSC
        run = COMMANDS.get(command)
        if run is None:
            self.fail(ABRT)
        else:
            run(self)

    def _begin_sectors(self, block: int = 1, *, writes: bool = False) -> bool:
        """Set where a transfer begins; False where it failed."""
        self.standby = False
        address, count = self._asked()
        if writes and not self.disk.writable or not block:
            self.fail(ABRT)
        elif address == _NO_ADDRESS or address + count > self.sectors:
            self.fail(IDNF)
        else:
            self.address, self.left, self.block = address, count, block
            return True
        return False

    def _read_pio(self, block: int = 1) -> None:
        if self._begin_sectors(block):
            self._next_in()

    def _write_pio(self, block: int = 1) -> None:
        if self._begin_sectors(block, writes=True):
            self._next_out(interrupt=False)

    def _read_multiple(self) -> None:
        self._read_pio(self.multiple)

    def _write_multiple(self) -> None:
        self._write_pio(self.multiple)

    def _read_dma(self) -> None:
        if self._begin_sectors():
            self.await_dma(to_host=True)

    def _write_dma(self) -> None:
        if self._begin_sectors(writes=True):
            self.await_dma(to_host=False)

    # ---- queued commands

    def _read_queued(self) -> None:
        if self.is_serial:
            self._read_dma()
        else:
            self.fail(ABRT)

    def _write_queued(self) -> None:
        if self.is_serial:
            self._write_dma()
        else:
            self.fail(ABRT)

    def aborts(self, command: int, *, others: bool) -> bool:
        if command == _READ_LOG or not (others or self.queue_error):
            return False
        self.command = command
        if not self.queue_error:
            self.queue_error = self._error(_NOT_QUEUED, ABRT)
        self.fail(ABRT)
        return True

    def _error(self, tag: int, error: int) -> bytes:
        low, mid, high, count = self.low, self.mid, self.high, self.sector_count
        return _ERROR.pack(
            tag, DRDY | DSC | ERR, error, low & 0xFF, mid & 0xFF, high & 0xFF, self.device, low >> 8, mid >> 8,
            high >> 8, count,
        )  # fmt: skip

    def fail(self, error: int, *, fault: bool = False) -> None:
        if self.command in QUEUED and self.is_serial and not self.queue_error:
            self.queue_error = self._error(self.tag, error)
        super().fail(error, fault=fault)

    def _read_log(self) -> None:
        """The directory, or what has failed of the queue, which with that may go on."""
        log, page, self.left = self.low & 0xFF, bytearray(512), 0
        if not self.is_serial or log not in (_DIRECTORY, _QUEUE_ERRORS) or self.mid or self.sector_count != 1:
            self.fail(ABRT)
            return
        if log == _DIRECTORY:
            struct.pack_into("<H", page, 0, 1)
            struct.pack_into("<H", page, 2 * _QUEUE_ERRORS, 1)
        else:
            page[: _ERROR.size] = self.queue_error or bytes((_NOT_QUEUED,)).ljust(_ERROR.size, b"\0")
            page[511] = -sum(page) & 0xFF
            self.queue_error = b""
        self.offer(True, page, interrupt=True)

    def sign(self, unit_bits: int) -> None:
        super().sign(unit_bits)
        self.queue_error = b""

    def _verify(self) -> None:
        if self._begin_sectors():
            self.address, self.left = self.address + self.left, 0
            self._show_address()
            self.finish()

    def _seek(self) -> None:
        address, _ = self._asked()
        if address == _NO_ADDRESS or address >= self.sectors:
            self.fail(IDNF)
        else:
            self.finish()

    def _identify(self) -> None:
        self.left = 0
        self.offer(True, self.identification(), interrupt=True)

    def _set_multiple(self) -> None:
        count = self.sector_count & 0xFF
        if count > MULTIPLE_MOST or count & (count - 1):
            self.fail(ABRT)
        else:
            self.multiple = count
            self.finish()

    def _initialize_parameters(self) -> None:
        heads, track = (self.device & 0xF) + 1, self.sector_count & 0xFF
        if not track:
            self.fail(ABRT)
        else:
            self.translation = heads, track
            self.finish()

    def _set_features(self) -> None:
        feature = self.features & 0xFF
        if feature in (0x02, 0x82):
            self.write_cache = feature == 0x02
            if not self.write_cache:
                self._flush()
                return
        elif feature == 0x03:
            if not self.set_transfer_mode(self.sector_count & 0xFF):
                self.fail(ABRT)
                return
        elif feature not in (0x55, 0xAA, 0x66, 0xCC):  # read look-ahead, and whether settings outlive SRST
            self.fail(ABRT)
            return
        self.finish()

    def _flush(self) -> None:
        try:
            self.disk.flush()
        except OSError as error:
            self._host_failed(error, ABRT)
        else:
            self.counters["flushes"] += 1
            self.finish()

    # ---- PIO

    def _next_in(self) -> None:
        data = bytearray(min(self.block, self.left) * SECTOR)
        try:
            self.disk.read(self.address * SECTOR, [memoryview(data)])
        except OSError as error:
            self._host_failed(error, UNC)
        else:
            self.offer(True, data, interrupt=True)

    def _next_out(self, *, interrupt: bool) -> None:
        self.offer(False, bytes(min(self.block, self.left) * SECTOR), interrupt=interrupt)

    def block_done(self, data: bytes) -> None:
        is_out = self.phase == "pio_out"
        if is_out:
            if len(data) != min(self.block, self.left) * SECTOR:  # of a state that somebody has made up
                self.fail(ABRT)
                return
            try:
                self.disk.write(self.address * SECTOR, [memoryview(data)], through=not self.write_cache)
            except OSError as error:
                self._host_failed(error, ABRT)
                return
        if self.left:  # of the disk's: not an identification
            self._passed(min(self.block, self.left))
        if not self.left:
            self.finish(interrupt=is_out)
        elif is_out:
            self._next_out(interrupt=True)
        else:
            self._next_in()

    def _passed(self, sectors: int) -> None:
        what = "write" if self.phase in ("pio_out", "dma_out") else "read"
        self.counters[f"{what}_requests"] += 1
        self.counters[f"{what}_bytes"] += sectors * SECTOR
        self.address += sectors
        self.left -= sectors
        self._show_address()

    def _host_failed(self, error: OSError, code: int) -> None:
        self.count_host_error(error)
        self._show_address()
        self.fail(code)

    # ---- DMA

    def dma_length(self) -> int:
        return self.left * SECTOR

    def dma_unit(self) -> int:
        return SECTOR

    def dma_move(self, length: int, views: Sequence[memoryview]) -> None:
        if self.phase == "dma_in":
            self.disk.read(self.address * SECTOR, views)
        else:
            through = not self.write_cache or self.command == WRITE_QUEUED and bool(self.device & _FUA)
            self.disk.write(self.address * SECTOR, views, through=through)

    def dma_at_once(self, length: int, views: Sequence[memoryview]) -> bool:
        return self.phase == "dma_in" and self.disk.read_at_once(self.address * SECTOR, views)

    def dma_moved(self, length: int, failure: OSError | None) -> None:
        if failure is not None:
            self._host_failed(failure, UNC if self.phase == "dma_in" else ABRT)
            return
        self._passed(length // SECTOR)
        if not self.left:
            self.finish()

    def end_dma(self) -> None:
        self._show_address()
        self.fail(ABRT)

    # ---- identification

    def identification(self) -> bytes:
        """What IDENTIFY DEVICE gives: 256 words."""
        words = bytearray(512)

        def put(word: int, *values: int) -> None:
            struct.pack_into(f"<{len(values)}H", words, 2 * word, *values)

        heads, track = self._own_translation
        now_heads, now_track = self.translation
        now_cylinders = min(self.sectors // (now_heads * now_track), 0xFFFF)
        capacity = now_cylinders * now_heads * now_track
        multiword, ultra = mode_words(self.mode)
        put(0, 0x0040)
        put(1, self.cylinders)
        put(3, heads)
        put(6, track)
        words[20:40] = words_of(self.serial, 20)
        words[46:54] = words_of("1.0", 8)
        words[54:94] = words_of("vmfs disk", 40)
        put(47, 0x8000 | MULTIPLE_MOST)
        put(49, 0x0B00, 0x4000, 0x0200)  # IORDY, LBA, DMA
        put(53, 7, now_cylinders, now_heads, now_track, capacity & 0xFFFF, capacity >> 16)
        put(59, 0x0100 | self.multiple if self.multiple else 0)
        lba28 = min(self.sectors, _LBA28_MOST)
        put(60, lba28 & 0xFFFF, lba28 >> 16)
        put(63, multiword, 3, 120, 120, 120, 120)
        put(80, 0x0070)  # ATA-4 to ATA/ATAPI-6
        put(82, 0x0068, 0x7400, 0x4000)  # power management, write cache, look-ahead; 48-bit addresses, both flushes
        put(85, 0x0048 | (0x20 if self.write_cache else 0), 0x3400, 0x4000, ultra)
        if self.is_serial:
            put(75, 31, 0x010E)  # a queue of 32; 1.5, 3 and 6 Gb/s, queued commands
            put(84, 0x4020)  # logs
            put(87, 0x4020)
        else:
            put(93, 0x600B)  # the cable has 80 wires
        put(100, *(self.sectors >> shift & 0xFFFF for shift in (0, 16, 32, 48)))
        words[510] = 0xA5
        words[511] = -sum(words) & 0xFF
        return bytes(words)

    # ---- life

    def save(self) -> AtaState:
        return AtaState(
            **self.save_registers(),
            address=self.address,
            left=self.left,
            block=self.block,
            multiple=self.multiple,
            translation=self.translation,
            write_cache=self.write_cache,
            standby=self.standby,
            queue_error=self.queue_error,
            size=self.disk.size,
            overlay=self.disk.save_map(),
        )

    def check(self, state: AtaState) -> None:
        if state.size != self.disk.size:
            raise Invalid(f"{self.name}: the disk has {self.disk.size} bytes, and had {state.size}")
        if state.address + state.left > self.sectors or (state.phase == "pio_out" and not state.left):
            raise Invalid(f"{self.name}: a transfer that is not inside the disk")
        if state.phase in ("pio_out", "dma_out") and not self.disk.writable or state.phase in ("busy", "packet"):
            raise Invalid(f"{self.name}: it is in no phase {state.phase}")
        if state.left and not state.block:
            raise Invalid(f"{self.name}: blocks of no sector")
        if len(state.queue_error) not in (0, _ERROR.size):
            raise Invalid(f"{self.name}: a log of {len(state.queue_error)} bytes")
        self.disk.check_map(state.overlay)

    def load(self, state: AtaState) -> None:
        for name in ("address", "left", "block", "multiple", "translation", "write_cache", "standby", "queue_error"):
            setattr(self, name, getattr(state, name))
        self.disk.load_map(state.overlay)
        self.load_registers(state)

    def describe(self) -> dict[str, str]:
        return {"path": self.path, "mode": self.disk.mode, "size": str(self.disk.size), "serial": self.serial}

    def close(self) -> None:
        self.cable.at_end(self.disk.close)


def geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors a track that a drive of so many sectors says it has (6.2.1). One that has no
    cylinder of 16 heads has one head, so that all of it has an address."""
    if sectors >= _HEADS * _TRACK:
        return min(sectors // (_HEADS * _TRACK), _CYLINDERS_MOST), _HEADS, _TRACK
    cylinders = max(-(-sectors // _TRACK), 1)
    return cylinders, 1, max(sectors // cylinders, 1)


COMMANDS: Mapping[int, Callable[[AtaDisk], Any]] = {
    0x10: AtaDisk.finish,  # RECALIBRATE
    0x20: AtaDisk._read_pio, 0x21: AtaDisk._read_pio, 0x24: AtaDisk._read_pio,
    0x25: AtaDisk._read_dma, 0x29: AtaDisk._read_multiple, 0x2F: AtaDisk._read_log,
    0x30: AtaDisk._write_pio, 0x31: AtaDisk._write_pio, 0x34: AtaDisk._write_pio,
    0x35: AtaDisk._write_dma, 0x39: AtaDisk._write_multiple,
    0x40: AtaDisk._verify, 0x41: AtaDisk._verify, 0x42: AtaDisk._verify,
    0x60: AtaDisk._read_queued, 0x61: AtaDisk._write_queued,
    0x70: AtaDisk._seek,
    0x91: AtaDisk._initialize_parameters,
    0x94: AtaDisk._stand_by, 0x95: AtaDisk._idle, 0x96: AtaDisk._stand_by, 0x97: AtaDisk._idle,
    0x98: AtaDisk._check_power, 0x99: AtaDisk._stand_by,
    0xC4: AtaDisk._read_multiple, 0xC5: AtaDisk._write_multiple, 0xC6: AtaDisk._set_multiple,
    0xC8: AtaDisk._read_dma, 0xC9: AtaDisk._read_dma, 0xCA: AtaDisk._write_dma, 0xCB: AtaDisk._write_dma,
    0xE0: AtaDisk._stand_by, 0xE1: AtaDisk._idle, 0xE2: AtaDisk._stand_by, 0xE3: AtaDisk._idle,
    0xE5: AtaDisk._check_power, 0xE6: AtaDisk._stand_by,
    0xE7: AtaDisk._flush, 0xEA: AtaDisk._flush,
    0xEC: AtaDisk._identify, 0xEF: AtaDisk._set_features,
}  # fmt: skip
_EXTENDED = {0x24, 0x25, 0x29, 0x34, 0x35, 0x39, 0x42, *QUEUED, 0xEA}
