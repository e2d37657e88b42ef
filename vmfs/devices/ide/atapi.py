"""An ATAPI CD-ROM drive, with a disc of one session and one track of data: an image of any size.

Data goes by PIO, in pieces of up to the byte count limit, or by DMA. Left out, and answered as unknown commands:
audio, DVD structures, writing, sub-channels. A drive has no unit attention after a reset, only after a change of its
disc.

Source: ATA/ATAPI-6, 8.23 (PACKET), 9.8 (protocol), 8.16 (IDENTIFY PACKET DEVICE); MMC-4 (INCITS 401).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from vmfs.devices.device import U8, U32, Port
from vmfs.devices.ide import mmc
from vmfs.devices.ide.drive import ABRT, DRDY, DSC, ERR, Drive, DriveState, mode_words, words_of
from vmfs.devices.ide.sectors import USER, parts, raw_sector, sector_of
from vmfs.devices.medium import Removable
from vmfs.devices.scsi import (
    BAD_COMMAND,
    BAD_FIELD,
    NO_SENSE,
    NOT_SAVED,
    OUT_OF_RANGE,
    READ_ERROR,
    Sense,
    sense_data,
)
from vmfs.devices.virtio.disk import Disk
from vmfs.words.errors import Invalid

_PACKET = 12
_DMA = 1  # of the features
_TO_HOST, _COMPLETE = 2, 3  # interrupt reason
_PIECE_MOST = 0xFFFE
_BLOCKS_AT_ONCE = 16
_USER_DATA = 0x10  # READ CD's byte 9
BLOCKS_MOST = 0xFFFF_FFFF

NO_MEDIUM: Sense = (2, 0x3A, 0)
LOCKED: Sense = (5, 0x53, 2)
WRONG_TRACK: Sense = (5, 0x64, 0)
CHANGED: Sense = (6, 0x28, 0)
EVENT_NONE, EVENT_EJECT, EVENT_NEW, EVENT_REMOVED = range(4)


class CdState(DriveState):
    """`reply`: what is still to be given; then `left` sectors from `address` on, of each the `parts` (READ CD's byte
    9). `limit`: of a piece by PIO; `attention`: a change of the disc that the host was not told of; `blocks`: of the
    disc, 0 without one."""

    reply: Annotated[bytes, msgspec.Meta(max_length=0x1_0000)]
    address: U32
    left: U32
    parts: U8
    limit: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
    sense: tuple[U8, U8, U8]
    attention: bool
    event: Annotated[int, msgspec.Meta(ge=0, le=3)]
    is_locked: bool
    is_open: bool
    standby: bool
    blocks: U32


class CdDrive(Removable, Drive[CdState]):
    TYPE = "atapi-cdrom"
    STATE = CdState
    SIGNATURE = 0x14, 0xEB
    AFTER_RESET = 0
    HAS_DISK = True
    is_packet = True

    def __init__(self, board: Port, name: str, disk: Disk | None = None, *, path: str = "") -> None:
        self.disk, self.path = disk, path
        self._defaults()
        super().__init__(board, name)
        if disk is not None:
            self.accepts(disk)

    def _defaults(self) -> None:
        self.reply = b""
        self.address = self.left = 0
        self.parts = _USER_DATA
        self.limit = 0
        self.sense: Sense = NO_SENSE
        self.has_attention = False
        self.event = EVENT_NONE
        self.is_locked = self.is_open = False

    def reset(self) -> None:
        super().reset()
        self._defaults()

    def sign(self, unit_bits: int) -> None:
        super().sign(unit_bits)
        self.reply, self.left = b"", 0

    # ---- the disc

    @property
    def blocks(self) -> int:
        """Of the disc, whether the tray is open or not."""
        return 0 if self.disk is None else -(-self.disk.size // USER)

    @property
    def has_medium(self) -> bool:
        return self.disk is not None and not self.is_open

    def accepts(self, disk: Disk) -> None:
        if disk.size > BLOCKS_MOST * USER:
            raise Invalid(f"{self.name}: {disk.size} bytes are more than a disc has")

    def eject_asked(self) -> None:
        self.event = EVENT_EJECT

    def stop(self) -> None:
        self.cable.settle()

    def medium_changed(self) -> None:
        self.is_open = self.is_locked = False
        self.has_attention = True
        self.event = EVENT_NEW if self.disk is not None else EVENT_REMOVED

    def _read(self, address: int, views: Sequence[memoryview]) -> None:
        """Sectors of user data. OSError."""
        disk = self.disk
        if disk is None or self.is_open:
            raise OSError(errno.ENOMEDIUM, "no medium")
        disk.read(address * USER, views)

    def _sectors(self, address: int, count: int) -> bytearray:
        data = bytearray(count * USER)
        self._read(address, [memoryview(data)])
        if self.parts == _USER_DATA:
            return data
        wanted, out = parts(self.parts), bytearray()
        for number in range(count):
            sector = raw_sector(address + number, memoryview(data)[number * USER : (number + 1) * USER])
            for at, length in wanted:
                out += sector[at : at + length]
        return out

    @property
    def _sector_size(self) -> int:
        return sum(length for _, length in parts(self.parts))

    # ---- commands of ATA

    def begin(self, command: int) -> None:
        self.command = command
        self.error = 0
        self.status = DRDY | DSC
        run = COMMANDS.get(command)
        if run is None:
            self.fail(ABRT)
        else:
            run(self)

    def _refuse_as_packet_device(self) -> None:
        """IDENTIFY DEVICE and READ SECTORS show what it is instead (9.12)."""
        self.sector_count = self.low = 1
        self.mid, self.high = self.SIGNATURE
        self.fail(ABRT)

    def _identify(self) -> None:
        self.reply, self.left = b"", 0
        self.offer(True, self.identification(), interrupt=True)

    def _set_features(self) -> None:
        if self.features & 0xFF == 0x03 and self.set_transfer_mode(self.sector_count & 0xFF):
            self.finish()
        elif self.features & 0xFF in (0x66, 0xCC):
            self.finish()
        else:
            self.fail(ABRT)

    def _packet(self) -> None:
        self.reply, self.left = b"", 0
        self.limit = self.mid & 0xFF | (self.high & 0xFF) << 8
        self.sector_count = 1  # a command, to the drive
        self.offer(False, bytes(_PACKET), interrupt=False)
        self.phase = "packet"

    # ---- the protocol of packets

    def block_done(self, data: bytes) -> None:
        if self.phase == "packet":
            self._execute(data)
        elif self.command == 0xA0:
            self._next_piece()
        else:
            self.finish(interrupt=False)  # of an identification

    def _execute(self, packet: bytes) -> None:
        packet = packet[:_PACKET].ljust(_PACKET, b"\0")
        operation = packet[0]
        self.counters["packets"] += 1
        if self.has_attention and operation not in _DESPITE_ATTENTION:
            self.has_attention = False
            self._check(CHANGED)
            return
        run = PACKETS.get(operation)
        if run is None:
            self._check(BAD_COMMAND)
            return
        if operation != 0x03:
            self.sense = NO_SENSE
        self.standby = False
        run(self, packet)

    def _check(self, sense: Sense) -> None:
        """CHECK CONDITION."""
        self.sense = sense
        self.reply, self.left = b"", 0
        self.sector_count = _COMPLETE
        self.phase = "idle"
        self.error = sense[0] << 4 | (ABRT if sense[0] == 5 else 0)
        self.status = DRDY | DSC | ERR
        self.cable.close_block()
        self.cable.changed()
        self.cable.interrupt(self)

    def _complete(self) -> None:
        self.sector_count = _COMPLETE
        self.finish()

    def _answer(self, data: bytes, room: int) -> None:
        """Give that, as far as there is room for it at the host."""
        self.reply, self.left = data[:room], 0
        self._transfer()

    def _transfer(self) -> None:
        if not self.reply and not self.left:
            self._complete()
        elif self.features & _DMA:
            self.sector_count = _TO_HOST
            self.await_dma(to_host=True)
        elif not self.limit:
            self.fail(ABRT)  # 8.23.4: there is no piece of nothing
        else:
            self._next_piece()

    def _next_piece(self) -> None:
        if not self.reply and self.left:
            count = min(self.left, max(self.limit // self._sector_size, 1), _BLOCKS_AT_ONCE)
            try:
                self.reply = bytes(self._sectors(self.address, count))
            except OSError as error:
                self._host_failed(error)
                return
            self._passed(count)
        if not self.reply:
            self._complete()
            return
        most = min(self.limit, _PIECE_MOST)
        if len(self.reply) > most:
            most = max(most & ~1, 1)  # an odd piece can only be the last
        piece, self.reply = self.reply[:most], self.reply[most:]
        self.mid, self.high = len(piece) & 0xFF, len(piece) >> 8
        self.sector_count = _TO_HOST
        self.offer(True, piece, interrupt=True)

    def _passed(self, sectors: int) -> None:
        self.address += sectors
        self.left -= sectors
        self.counters["read_requests"] += 1
        self.counters["read_bytes"] += sectors * USER

    def _host_failed(self, error: OSError) -> None:
        if error.errno == errno.ENOMEDIUM:
            self._check(NO_MEDIUM)
            return
        self.count_host_error(error)
        self._check(READ_ERROR)

    # ---- DMA

    def dma_length(self) -> int:
        return len(self.reply) or self.left * self._sector_size

    def dma_unit(self) -> int:
        return 1 if self.reply else self._sector_size

    def dma_move(self, length: int, views: Sequence[memoryview]) -> None:
        if not self.reply and self.parts == _USER_DATA:
            self._read(self.address, views)
            return
        at, count = 0, length // self.dma_unit()
        data = memoryview(self.reply if self.reply else self._sectors(self.address, count))
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)

    def dma_at_once(self, length: int, views: Sequence[memoryview]) -> bool:
        disk = self.disk
        if self.reply or self.parts != _USER_DATA or disk is None or self.is_open:
            return False
        return disk.read_at_once(self.address * USER, views)

    def dma_moved(self, length: int, failure: OSError | None) -> None:
        if failure is not None:
            self._host_failed(failure)
            return
        if self.reply:
            self.reply = self.reply[length:]
        else:
            self._passed(length // self._sector_size)
        if not self.reply and not self.left:
            self._complete()

    def end_dma(self) -> None:
        self.fail(ABRT)

    def fail(self, error: int, *, fault: bool = False) -> None:
        self.reply, self.left = b"", 0
        super().fail(error, fault=fault)

    # ---- packets

    def _needs_medium(self) -> bool:
        if self.has_medium:
            return True
        self._check(NO_MEDIUM)
        return False

    def _test_ready(self, packet: bytes) -> None:
        if self._needs_medium():
            self._complete()

    def _request_sense(self, packet: bytes) -> None:
        sense, self.sense = self.sense, NO_SENSE
        if self.has_attention and sense == NO_SENSE:
            sense, self.has_attention = CHANGED, False
        self._answer(sense_data(sense), packet[4])

    def _inquiry(self, packet: bytes) -> None:
        if packet[1] & 1 or packet[2]:
            self._check(BAD_FIELD)  # no pages of vital product data
        else:
            self._answer(mmc.inquiry(), int.from_bytes(packet[3:5], "big"))

    def _start_stop(self, packet: bytes) -> None:
        loads, starts = packet[4] & 2, packet[4] & 1
        if packet[4] >> 4:  # power conditions
            self.standby = packet[4] >> 4 >= 3
        elif loads and starts:
            if self.is_open:
                self.is_open = False
                if self.disk is not None:
                    self.has_attention, self.event = True, EVENT_NEW
        elif loads:
            if self.is_locked:
                self._check(LOCKED)
                return
            if not self.is_open:
                self.is_open, self.event = True, EVENT_REMOVED
        self._complete()

    def _prevent(self, packet: bytes) -> None:
        self.is_locked = bool(packet[4] & 1)
        self._complete()

    def _capacity(self, packet: bytes) -> None:
        if self._needs_medium():
            self._answer(struct.pack(">II", self.blocks - 1, USER), 8)

    def _read_10(self, packet: bytes) -> None:
        address, count = struct.unpack_from(">IxH", packet, 2)
        self._read_sectors(address, count)

    def _read_12(self, packet: bytes) -> None:
        self._read_sectors(*struct.unpack_from(">II", packet, 2))

    def _read_sectors(self, address: int, count: int, flags: int = _USER_DATA) -> None:
        if not self._needs_medium():
            return
        if address < 0 or address + count > self.blocks:
            self._check(OUT_OF_RANGE)
            return
        self.reply, self.address, self.left, self.parts = b"", address, count if flags else 0, flags
        self._transfer()

    def _read_cd(self, packet: bytes) -> None:
        address, count = int.from_bytes(packet[2:6], "big"), int.from_bytes(packet[6:9], "big")
        self._read_raw(packet, address, count)

    def _read_cd_msf(self, packet: bytes) -> None:
        first, end = sector_of(*packet[3:6]), sector_of(*packet[6:9])
        if end < first:
            self._check(BAD_FIELD)
        else:
            self._read_raw(packet, first, end - first)

    def _read_raw(self, packet: bytes, address: int, count: int) -> None:
        kind, flags = packet[1] >> 2 & 7, packet[9]
        if flags & 0x07 or packet[10] & 7:  # error flags, sub-channels
            self._check(BAD_FIELD)
        elif kind not in (0, 2):
            self._check(WRONG_TRACK)  # mode 1 is what there is
        else:  # a subheader (40h) is asked for in vain: mode 1 has none
            self._read_sectors(address, count, flags & 0xB8)

    def _seek(self, packet: bytes) -> None:
        if not self._needs_medium():
            return
        if int.from_bytes(packet[2:6], "big") >= self.blocks:
            self._check(OUT_OF_RANGE)
        else:
            self._complete()

    def _toc(self, packet: bytes) -> None:
        if not self._needs_medium():
            return
        in_msf, kind = bool(packet[1] & 2), packet[2] & 0xF or packet[9] >> 6
        if kind == 0:
            data = mmc.toc(self.blocks, in_msf, packet[6])
        elif kind == 1:
            data = mmc.sessions(in_msf)
        elif kind == 2:
            data = mmc.full_toc(self.blocks, packet[6])
        else:
            data = None
        self._answer_or_refuse(data, int.from_bytes(packet[7:9], "big"))

    def _answer_or_refuse(self, data: bytes | None, room: int) -> None:
        if data is None:
            self._check(BAD_FIELD)
        else:
            self._answer(data, room)

    def _disc_information(self, packet: bytes) -> None:
        if packet[1] & 7:
            self._check(BAD_FIELD)
        elif self._needs_medium():
            self._answer(mmc.disc_information(), int.from_bytes(packet[7:9], "big"))

    def _configuration(self, packet: bytes) -> None:
        starting, room = int.from_bytes(packet[2:4], "big"), int.from_bytes(packet[7:9], "big")
        if packet[1] & 3 == 3:
            self._check(BAD_FIELD)
        else:
            self._answer(mmc.configuration(starting, packet[1] & 3, self.has_medium), room)

    def _event_status(self, packet: bytes) -> None:
        if not packet[1] & 1:
            self._check(BAD_FIELD)  # only polled
            return
        event = self.event
        room = int.from_bytes(packet[7:9], "big")
        if packet[4] & 1 << mmc.MEDIA_CLASS and room > 4:
            self.event = EVENT_NONE
        self._answer(mmc.event_status(packet[4], event, self.is_open, self.has_medium), room)

    def _mode_sense(self, packet: bytes) -> None:
        ten = packet[0] == 0x5A
        room = int.from_bytes(packet[7:9], "big") if ten else packet[4]
        control = packet[2] >> 6
        if control == 3:
            self._check(NOT_SAVED)
            return
        pages = mmc.mode_pages(packet[2] & 0x3F, control, self.is_locked)
        medium_type = 0x71 if self.is_open else 0x01 if self.has_medium else 0x70
        self._answer_or_refuse(None if pages is None else mmc.mode_header(medium_type, pages, ten=ten), room)

    def _mechanism(self, packet: bytes) -> None:
        self._answer(mmc.mechanism_status(self.is_open), int.from_bytes(packet[8:10], "big"))

    def _nothing(self, packet: bytes) -> None:
        self._complete()

    # ---- identification

    def identification(self) -> bytes:
        """What IDENTIFY PACKET DEVICE gives."""
        words = bytearray(512)

        def put(word: int, *values: int) -> None:
            struct.pack_into(f"<{len(values)}H", words, 2 * word, *values)

        multiword, ultra = mode_words(self.mode)
        put(0, 0x85C0)  # a CD-ROM drive, removable, DRQ within 50 us, packets of 12 bytes
        words[20:40] = words_of(self.name, 20)
        words[46:54] = words_of("1.0", 8)
        words[54:94] = words_of("vmfs CD-ROM", 40)
        put(49, 0x0B00, 0x4000)
        put(53, 6)
        put(63, multiword, 3, 120, 120, 120, 120)
        put(80, 0x0070)
        put(82, 0x0218, 0x4000, 0x4000, 0x0218, 0, 0x4000, ultra)
        if self.is_serial:
            put(76, 0x000E)
        else:
            put(93, 0x600B)
        words[510] = 0xA5
        words[511] = -sum(words) & 0xFF
        return bytes(words)

    # ---- life

    def save(self) -> CdState:
        return CdState(
            **self.save_registers(),
            reply=self.reply,
            address=self.address,
            left=self.left,
            parts=self.parts,
            limit=self.limit,
            sense=self.sense,
            attention=self.has_attention,
            event=self.event,
            is_locked=self.is_locked,
            is_open=self.is_open,
            standby=self.standby,
            blocks=self.blocks,
        )

    def check(self, state: CdState) -> None:
        if state.blocks != self.blocks:
            raise Invalid(f"{self.name}: the disc in it has {self.blocks} sectors, and had {state.blocks}")
        if state.address + state.left > max(state.blocks, 0) and state.left:
            raise Invalid(f"{self.name}: a transfer that is not inside the disc")
        if state.phase in ("pio_out", "dma_out", "busy"):
            raise Invalid(f"{self.name}: it is in no phase {state.phase}")
        if state.parts & ~0xB8 or (state.left and not state.parts):
            raise Invalid(f"{self.name}: there are no such parts of a sector")
        if state.phase == "dma_in" and not state.reply and not state.left:
            raise Invalid(f"{self.name}: a transfer of nothing")

    def load(self, state: CdState) -> None:
        for name in ("reply", "address", "left", "parts", "limit", "sense", "event", "is_locked", "is_open", "standby"):
            setattr(self, name, getattr(state, name))
        self.has_attention = state.attention
        self.load_registers(state)

    def describe(self) -> dict[str, str]:
        tray, locked = "open" if self.is_open else "closed", "yes" if self.is_locked else "no"
        return {"medium": self.medium, "blocks": str(self.blocks), "tray": tray, "locked": locked}

    def close(self) -> None:
        disk = self.disk
        if disk is not None:
            self.cable.at_end(disk.close)


_DESPITE_ATTENTION = {0x03, 0x12, 0x46, 0x4A}  # REQUEST SENSE, INQUIRY, GET CONFIGURATION, GET EVENT STATUS

COMMANDS: Mapping[int, Callable[[CdDrive], Any]] = {
    0x20: CdDrive._refuse_as_packet_device,
    0x94: CdDrive._stand_by, 0x95: CdDrive._idle, 0x96: CdDrive._stand_by, 0x97: CdDrive._idle,
    0x98: CdDrive._check_power, 0x99: CdDrive._stand_by,
    0xA0: CdDrive._packet,
    0xA1: CdDrive._identify,
    0xE0: CdDrive._stand_by, 0xE1: CdDrive._idle, 0xE2: CdDrive._stand_by, 0xE3: CdDrive._idle,
    0xE5: CdDrive._check_power, 0xE6: CdDrive._stand_by,
    0xEC: CdDrive._refuse_as_packet_device,
    0xEF: CdDrive._set_features,
}  # fmt: skip

PACKETS: Mapping[int, Callable[[CdDrive, bytes], None]] = {
    0x00: CdDrive._test_ready,
    0x03: CdDrive._request_sense,
    0x12: CdDrive._inquiry,
    0x1A: CdDrive._mode_sense,
    0x1B: CdDrive._start_stop,
    0x1E: CdDrive._prevent,
    0x25: CdDrive._capacity,
    0x28: CdDrive._read_10,
    0x2B: CdDrive._seek,
    0x43: CdDrive._toc,
    0x46: CdDrive._configuration,
    0x4A: CdDrive._event_status,
    0x51: CdDrive._disc_information,
    0x5A: CdDrive._mode_sense,
    0xA8: CdDrive._read_12,
    0xB9: CdDrive._read_cd_msf,
    0xBB: CdDrive._nothing,  # SET CD SPEED
    0xBD: CdDrive._mechanism,
    0xBE: CdDrive._read_cd,
}
