"""rtl8139: a Realtek RTL8139C+: the four descriptors and the receive ring of an RTL8139C, or, where a driver enables
them in C+CR, rings of descriptors, with checksums, segments of TCP and VLAN tags (chips/rtl8139.c).

Source: RTL8139C(L) data sheet 1.4, chapters 5 (registers), 6 (EEPROM), 8 (rings); RTL8139C+ data sheet 1.6, 6 and 9.

By descriptors, that frames were sent is told when they would have gone out on a wire of 100 Mbit/s, or a little before,
so that a driver that sends many hears of them together.
"""

from __future__ import annotations

import struct
import zlib
from typing import Annotated, ClassVar

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U8, U16, U64, DeviceState, Port
from vmfs.devices.network.backends import Backend
from vmfs.devices.network.card import Card
from vmfs.devices.network.microwire import WORDS, Eeprom, EepromState
from vmfs.devices.network.offload import LEAST_ON_WIRE, group_bit
from vmfs.devices.pci import Bar, PciDevice, PciState
from vmfs.devices.timers import Timer
from vmfs.words.errors import Invalid
from vmfs.words.nets import MAX_FRAME

_SIZE = 0x100
IDR, MAR, TSD, TSAD, RBSTART, ERSR, CR, CAPR, CBR, IMR, ISR, TCR, RCR = (
    0x00, 0x08, 0x10, 0x20, 0x30, 0x36, 0x37, 0x38, 0x3A, 0x3C, 0x3E, 0x40, 0x44,
)  # fmt: skip
TCTR, MPC, EEPROM, CONFIG0, CONFIG1, TIMER, MSR, CONFIG3, CONFIG4, MULINT, REVISION, TSADS = (
    0x48, 0x4C, 0x50, 0x51, 0x52, 0x54, 0x58, 0x59, 0x5A, 0x5C, 0x5E, 0x60,
)  # fmt: skip
BMCR, BMSR, ANAR, ANLPAR, ANER, NWAYTR, CSCR, CONFIG5 = 0x62, 0x64, 0x66, 0x68, 0x6A, 0x70, 0x74, 0xD8
DTCCR, TNPDS, THPDS, TPPOLL, CPCR, RDSAR, ETTHR = 0x10, 0x20, 0x28, 0xD9, 0xE0, 0xE4, 0xEC  # C+ mode

_EMPTY, _TE, _RE, _RST = 1, 4, 8, 0x10  # CR
_OWN, _TOK, _TABT = 0x2000, 0x8000, 0x4000_0000  # TSD
ROK, TOK, TER, RDU, LINK, TDU, SWINT, TIMEOUT, SERR = 0x1, 0x4, 0x8, 0x10, 0x20, 0x80, 0x100, 0x4000, 0x8000  # ISR
_AAP, _APM, _AM, _AB, _WRAP = 1, 2, 4, 8, 0x80  # RCR
_LOOPBACK = 0x6_0000  # TCR
_HARDWARE = 0x7480_0000  # TCR: an RTL8139C+
_MULTICAST, _PHYSICAL, _BROADCAST = 0x8000, 0x4000, 0x2000  # of a packet's head
_CP_SENDS, _CP_LISTENS, _CP_CHECKS, _CP_DETAGS = 1, 2, 0x20, 0x40  # C+CR
_HIGH_POLLED, _POLLED, _SOFTWARE = 0x80, 0x40, 1  # TPPOLL
_CP_HEAD_SHIFT = 11  # from a packet's head to a descriptor's status
_DETAGS, _CHECKS = 1, 2  # of _chips.rtl8139_put
_DUMP = 8  # DTCCR
_TALLY = struct.Struct("<QQQIHHIIQQIHH")
_TX_OK, _RX_OK, _TX_BAD, _RX_BAD, _RX_PHYSICAL, _RX_BROADCAST, _RX_GROUP = 0, 1, 2, 3, 8, 9, 10  # of it
_AT_ONCE = 256  # frames that are sent before the backend is asked for room
_PAUSE = 1000  # nanoseconds after that
_TOLD_AFTER = 80  # nanoseconds a byte on the wire,
_TOLD_AT_LAST = 100_000  # and the most before the driver hears that it was sent
_PROGRAM, _CONFIGURE, _CS, _SK, _DI, _DO = 0x80, 0xC0, 8, 4, 2, 1  # 9346CR
_LONGEST = 1792  # that it sends
_CLOCK = 33  # ticks of TCTR in 1000 ns


def _masks() -> bytes:
    """The bits of each byte that a driver can write, as they are."""
    masks = bytearray(_SIZE)
    for at, length, value in (
        (IDR, 6, 0xFF), (MAR, 8, 0xFF), (TSD, 16, 0), (TSAD, 16, 0xFF), (RBSTART, 4, 0xFF), (CAPR, 2, 0xFF),
        (IMR, 2, 0xFF), (RCR, 4, 0xFF), (TIMER, 4, 0xFF), (MULINT, 2, 0xFF), (ANAR, 2, 0xFF), (NWAYTR, 2, 0xFF),
        (CSCR, 2, 0xFF), (0x78, 12, 0xFF), (CONFIG1, 1, 0xFF), (CONFIG3, 1, 0xFF), (CONFIG4, 1, 0xFF),
        (CONFIG5, 1, 0xFF), (CPCR, 1, 0x7B), (RDSAR, 8, 0xFF), (ETTHR, 1, 0x3F),
    ):  # fmt: skip
        masks[at : at + length] = bytes((value,)) * length
    masks[CR] = _TE | _RE
    masks[TCR : TCR + 4] = b"\xf0\x07\x07\x03"
    masks[BMCR : BMCR + 2] = b"\0\x31"
    masks[RDSAR] = 0
    masks[IMR + 1] = 0xE1
    return bytes(masks)


_MASKS = _masks()
_CONFIGURED = frozenset((*range(IDR, IDR + 6), CONFIG0, CONFIG1, CONFIG3, CONFIG4, BMCR, BMCR + 1))  # under a lock


Place = Annotated[int, msgspec.Meta(ge=0, lt=64)]


class Rtl8139State(DeviceState):
    """`registers`: those at 0 to FFh; `write`: where the next packet goes in the receive ring; `queue`: descriptors
    that are to be sent, in order; `born`: when TCTR was 0; `rings`: when the timer is due. Of C+ mode: `places` of the
    next descriptors to send (normal, high priority) and to receive into; `polled`: which rings may have something to
    send; `tally`: what DTCCR dumps; `tells`: when the driver is to hear that `sent` causes are there; `rests`: until
    when it sends nothing, if it does."""

    VERSION: ClassVar[int] = 2

    pci: PciState
    mac: Annotated[bytes, msgspec.Meta(min_length=6, max_length=6)]
    frame: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME)] | None
    link_up: bool
    registers: Annotated[bytes, msgspec.Meta(min_length=_SIZE, max_length=_SIZE)]
    command: U8
    write: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    queue: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=3)], ...], msgspec.Meta(max_length=4)]
    eeprom: EepromState
    born: int
    rings: U64 | None
    places: tuple[Place, Place, Place]
    polled: U8
    tally: Annotated[tuple[U64, ...], msgspec.Meta(min_length=13, max_length=13)]
    sent: U16
    tells: U64 | None
    rests: U64 | None


class Rtl8139(Card[Rtl8139State], PciDevice[Rtl8139State]):
    TYPE = "rtl8139"
    STATE = Rtl8139State
    VENDOR, DEVICE, CLASS, REVISION = 0x10EC, 0x8139, 0x020000, 0x20
    SUBSYSTEM = 0x10EC, 0x8139
    NUDGES = True
    BARS = {0: Bar("port", _SIZE), 1: Bar("memory", _SIZE)}

    def __init__(self, board: Port, name: str, slot: int, backend: Backend, mac: bytes) -> None:
        self.plug_in(backend, mac)
        super().__init__(board, name, slot)
        words = [0] * WORDS
        words[:7] = 0x8129, self.VENDOR, self.DEVICE, *self.SUBSYSTEM, 0x4020, 0xE112
        words[7:10] = struct.unpack("<3H", mac)
        self.eeprom = Eeprom(struct.pack(f"<{WORDS}H", *words))
        self._timer: Timer | None = None
        self._telling: Timer | None = None
        self._resting: Timer | None = None
        self._born = 0
        self._met = 0  # by `deliver`, that `delivered` has to raise
        self._was = 0  # CR before it is written
        self.regs = bytearray(_SIZE)
        self._restart()

    def _restart(self) -> None:
        """A reset by CR: registers but for the address and its filter."""
        kept = bytes(self.regs[:TSD])
        self.regs[:] = bytes(_SIZE)
        self.regs[:TSD] = kept
        self.regs[IDR : IDR + 6] = self.eeprom.data[14:20]
        for number in range(4):
            self._store(TSD + 4 * number, 4, _OWN)
        self._store(TCR, 4, _HARDWARE)
        self._store(CAPR, 2, 0xFFF0)
        self._store(BMCR, 2, 0x3100)
        self._store(ANAR, 2, 0x05E1)
        self.regs[CONFIG1], self.regs[CONFIG3], self.regs[CONFIG5] = 0x0C, 0x01, 0
        self.command = 0  # 9346CR
        self._write = 0
        self._queue: list[int] = []
        self._places = [0, 0, 0]
        self._polled = 0
        self._tally = [0] * 13
        self._met = self._sent = 0
        self._cancel(self._telling, self._resting)
        self._telling = self._resting = None
        self._set_timer()
        self.forget_frames()
        self._drive()

    @staticmethod
    def _cancel(*timers: Timer | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()

    def _word(self, at: int, size: int) -> int:
        return int.from_bytes(self.regs[at : at + size], "little")

    def _store(self, at: int, size: int, value: int) -> None:
        self.regs[at : at + size] = value.to_bytes(size, "little")

    # ---- what a card says

    @property
    def listens(self) -> bool:
        return bool(self.regs[CR] & _RE) and self.is_master

    @property
    def _listens_plus(self) -> bool:
        return bool(self.regs[CPCR] & _CP_LISTENS)

    @property
    def sends(self) -> bool:
        return bool(self.regs[CR] & _TE) and self.is_master

    def link_changed(self) -> None:
        self._raise(LINK)

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        if offset in (CR, ISR):
            if not self.regs[IMR] & ROK and self.listens and not self._listens_plus:  # else the thread tells it
                self.look()
            if offset == CR and size == 1:  # these two for each packet
                return self.regs[CR] & ~_EMPTY | (_EMPTY if self._write == self._read_at else 0)
            if offset == ISR and size == 2:
                return self._word(ISR, 2)
        if offset + size > CR:
            self._refresh(offset, size)
        return int.from_bytes(self.regs[offset : offset + size], "little")

    def _refresh(self, offset: int, size: int) -> None:
        """Have what it makes of other things where it is read."""
        regs, up = self.regs, self.link_up
        regs[CR] = regs[CR] & ~_EMPTY | (_EMPTY if self._write == self._read_at else 0)
        self._store(CBR, 2, self._write)
        if offset < TCTR + 4 and offset + size > TCTR:
            self._store(TCTR, 4, self._ticks() & 0xFFFF_FFFF)
        regs[EEPROM] = self.command & ~_DO | (_DO if self.eeprom.do and self.command & _CS else 0)
        regs[MSR] = 0 if up else 4
        summary = 0
        for number in range(4):
            status = self._word(TSD + 4 * number, 4)
            for flag, shift in ((_OWN, 0), (_TABT, 4), (_TOK, 12)):
                summary |= bool(status & flag) << shift + number
        self._store(TSADS, 2, summary)
        self._store(BMSR, 2, 0x782D if up else 0x7809)
        self._store(ANLPAR, 2, 0x45E1 if up else 0)
        self._store(ANER, 2, 1 if up else 0)
        self._store(CSCR, 2, self._word(CSCR, 2) & ~8 | (8 if up else 0))

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if size == 2 and offset == CAPR:  # and these
            self._store(CAPR, 2, value & 0xFFFF)
            self.take_more()
            return
        if size == 2 and offset == ISR:
            self._store(ISR, 2, self._word(ISR, 2) & ~value)
            self._drive()
            self.take_more()
            return
        is_plus = bool(self.regs[CPCR] & (_CP_SENDS | _CP_LISTENS))
        self._was = self.regs[CR]
        data = value.to_bytes(8, "little")[:size]
        is_locked = self.command & _CONFIGURE != _CONFIGURE
        for at, byte in enumerate(data, offset):
            if at < _SIZE and not (is_locked and at in _CONFIGURED):
                self.regs[at] = self.regs[at] & ~_MASKS[at] | byte & _MASKS[at]
        for at, byte in enumerate(data, offset):
            self._did(at, byte)
        if is_plus and offset == DTCCR and size == 4:
            self._dump(value)
        elif is_plus and offset == DTCCR + 4 and size == 4:
            self._store(offset, 4, value)
        elif TSD <= offset < TSAD and size == 4 and not offset & 3:
            self._begin(offset - TSD >> 2, value)

    def _did(self, at: int, byte: int) -> None:
        """What the write of a byte brings about."""
        if at == CR:
            if byte & _RST:
                self._restart()
            elif byte & (_RE | _TE):
                if not self._was & _TE:
                    self._places[0] = self._places[1] = 0
                if not self._was & _RE:
                    self._places[2] = 0
                if self._thread is None:
                    self.begin_carrying()
                if not byte & _RE:
                    self._write = 0
                self.take_more()
                self.send_on()
        elif at in (ISR, ISR + 1):
            self.regs[at] &= ~byte
            self._drive()
        elif at == IMR + 1 or at == IMR:
            self._drive()
            self.take_more()
        elif at == TPPOLL:
            if byte & _SOFTWARE:
                self._raise(SWINT)
            self._polled |= byte & (_POLLED | _HIGH_POLLED)
            self.send_on()
        elif TNPDS <= at < THPDS:
            self._places[0] = 0
        elif THPDS <= at < THPDS + 8:
            self._places[1] = 0
        elif RDSAR <= at < RDSAR + 8:
            self._places[2] = 0
            self.take_more()
        elif at == CPCR:
            self.take_more()
        elif at == CAPR + 1:
            self.take_more()
        elif at == RBSTART + 3:
            self._write = 0
        elif at == EEPROM:
            self.command = byte
            is_wired = byte & 0xC0 == _PROGRAM
            self.eeprom.drive(is_wired and bool(byte & _CS), bool(byte & _SK), bool(byte & _DI))
            if byte & 0xC0 == 0x40:  # auto-load
                self.regs[IDR : IDR + 6] = self.eeprom.data[14:20]
                self.command = 0
        elif TCTR <= at < TCTR + 4:
            self._born = self.board.now()
            self._set_timer()
        elif at == TIMER + 3:
            self._set_timer()

    # ---- the timer

    def _ticks(self) -> int:
        return max(self.board.now() - self._born, 0) * _CLOCK // 1000

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wanted = self._word(TIMER, 4)
        if wanted:
            due = self._born + -(-wanted * 1000 // _CLOCK)
            if due > self.board.now():
                self._timer = self.board.schedule(due, self._timed)

    def _timed(self) -> None:
        self._timer = None
        self._raise(TIMEOUT)

    # ---- interrupts

    def _raise(self, causes: int) -> None:
        self._store(ISR, 2, self._word(ISR, 2) | causes)
        self._drive()

    def _drive(self) -> None:
        wanted = bool(self._word(ISR, 2) & self._word(IMR, 2))
        if wanted != self.pending:
            self.counters["interrupts"] += wanted
            self.set_irq(wanted)

    # ---- what the guest sends

    def _begin(self, number: int, value: int) -> None:
        """A descriptor's status is written (5.5): with OWN clear it is to be sent."""
        status = value & 0x003F_1FFF | value & _OWN
        if value & _OWN or not self.regs[CR] & _TE:
            self._store(TSD + 4 * number, 4, status | _OWN)
            return
        self._store(TSD + 4 * number, 4, status)
        if number not in self._queue:
            self._queue.append(number)
        self.send_on()

    def send_on(self) -> None:
        if not self.sends:
            return
        if self.regs[CPCR] & _CP_SENDS:
            if self._polled and self._resting is None:
                self._send_polled()
            return
        causes = 0
        while self._queue and not self._blocked:
            number = self._queue.pop(0)
            status, address = self._word(TSD + 4 * number, 4), self._word(TSAD + 4 * number, 4)
            length = status & 0x1FFF
            if length > _LONGEST or not self.board.is_ram(address, length):
                self.counters["tx_bad"] += 1
                status, causes = status | _TABT, causes | TER
            else:
                self._emit(self.board.dma_read(address, length))
                status, causes = status | _TOK, causes | TOK
            self._store(TSD + 4 * number, 4, status | _OWN)
        self.sent()
        if causes:
            self._raise(causes)

    def _send_polled(self) -> None:
        """What the descriptors of C+ mode have, those of high priority first."""
        causes = size = 0
        for index, flag, base in ((1, _HIGH_POLLED, THPDS), (0, _POLLED, TNPDS)):
            while self._polled & flag and not self._blocked:
                frames, self._places[index], sent, bad, more = _chips.rtl8139_take(
                    self.mapped_ram(), self._word(base, 8), self._places[index], _AT_ONCE
                )
                if not more:
                    self._polled &= ~flag
                    causes |= TDU
                causes |= (TOK if sent else 0) | (TER if bad else 0)
                self._tally[_TX_OK] += sent
                self._tally[_TX_BAD] += bad
                if bad:
                    self.counters["tx_bad"] += bad
                self._emit_all(frames)
                size += sum(map(len, frames))
                if more:
                    self._resting = self.board.schedule(self.board.now() + _PAUSE, self._rested)
                    break
            if self._resting is not None:
                break
        self.sent()
        self._sent |= causes
        if causes and self._telling is None:
            after = min(size * _TOLD_AFTER, _TOLD_AT_LAST)
            self._telling = self.board.schedule(self.board.now() + after, self._tell)

    def _rested(self) -> None:
        self._resting = None
        self.send_on()

    def _tell(self) -> None:
        self._telling = None
        causes, self._sent = self._sent, 0
        self._raise(causes)

    def _dump(self, value: int) -> None:
        """The tally counters into RAM (DTCCR)."""
        address = value & ~0x3F | self._word(DTCCR + 4, 4) << 32
        if value & _DUMP:
            if self.is_master and self.board.is_ram(address, _TALLY.size):
                limits = (int.from_bytes(b"\xff" * struct.calcsize(kind), "little") for kind in _TALLY.format[1:])
                self.board.dma_write(address, _TALLY.pack(*map(min, self._tally, limits)))
            else:
                self.counters["bad_dma"] += 1
        self._store(DTCCR, 4, value & ~0x3F)

    def _emit_all(self, frames: list[bytes]) -> None:
        if self._word(TCR, 4) & _LOOPBACK == _LOOPBACK:
            for frame in frames:
                self._emit(frame)
        elif frames:
            self.send_all([frame.ljust(LEAST_ON_WIRE, b"\0") for frame in frames])

    def _emit(self, frame: bytes) -> None:
        if self._word(TCR, 4) & _LOOPBACK != _LOOPBACK:
            self.send_all([frame])
        elif not self.listens or not self.deliver(frame):
            self.counters["rx_dropped"] += 1
        else:
            self.delivered()

    # ---- what the guest receives

    @property
    def _ring_size(self) -> int:
        return 8192 << (self._word(RCR, 4) >> 11 & 3)

    @property
    def _read_at(self) -> int:
        return (self._word(CAPR, 2) + 16) % self._ring_size

    def deliver_all(self, frames: list[bytes]) -> int:
        if not self._listens_plus:
            return super().deliver_all(frames)
        done = 0
        while done < len(frames):
            count = self._deliver_plus(frames[done:] if done else frames)
            if not count:
                break
            done += count
        return done

    def _deliver_plus(self, frames: list[bytes]) -> int:
        """As many of the first as are to the same address; 0: there is no descriptor for the first."""
        control, plus = self._word(RCR, 4), self.regs[CPCR]
        head = self._accepted(frames[0], control)
        if not head:
            return 1
        flags = (_DETAGS if plus & _CP_DETAGS else 0) | (_CHECKS if plus & _CP_CHECKS else 0)
        done, self._places[2], bad, is_full = _chips.rtl8139_put(
            self.mapped_ram(), self._word(RDSAR, 8), self._places[2], frames[0][:6],
            head << _CP_HEAD_SHIFT & 7 << 24, flags, frames,
        )  # fmt: skip
        tally, good = self._tally, done - bad
        tally[_RX_OK] += good
        tally[_RX_BAD] += bad
        tally[{_BROADCAST: _RX_BROADCAST, _MULTICAST: _RX_GROUP}.get(head, _RX_PHYSICAL)] += good
        if bad:
            self.counters["bad_dma"] += bad
        if done:
            self._met |= ROK
            self.count_received(frames if done == len(frames) else frames[:done])
        if is_full:
            self._met |= RDU
        return int(done)

    def deliver(self, frame: bytes) -> bool:
        if self._listens_plus:
            return self._deliver_plus([frame]) == 1
        control, size, start = self._word(RCR, 4), self._ring_size, self._word(RBSTART, 4)
        head = self._accepted(frame, control)
        if not head:
            return True
        if len(frame) < LEAST_ON_WIRE:
            frame = frame.ljust(LEAST_ON_WIRE, b"\0")
        data = struct.pack("<HH", head | 1, len(frame) + 4) + frame + zlib.crc32(frame).to_bytes(4, "little")
        room = -(-len(data) // 4) * 4
        write = self._write % size
        free = (self._read_at - write - 1) % size + 1
        if room >= size:
            self.counters["rx_dropped"] += 1
            return True
        if room >= free:
            self._met |= ROK
            return False
        rest = size - write
        parts = [(start + write, data)]
        if len(data) > rest and (not control & _WRAP or size == 1 << 16):
            parts = [(start + write, data[:rest]), (start, data[rest:])]
        for address, part in parts:
            if self.board.is_ram(address, len(part)):
                self.board.dma_write(address, part)
            else:
                self.counters["bad_dma"] += 1
        self._write = (write + room) % size
        self.count_received([frame])
        self._met |= ROK
        return True

    def has_unread(self) -> bool:
        return self.listens and not self._listens_plus and self._write != self._read_at

    def tell_again(self) -> None:
        self._raise(ROK)

    def delivered(self) -> None:
        causes, self._met = self._met, 0
        if causes:
            self._raise(causes)

    def _accepted(self, frame: bytes, control: int) -> int:
        """By which filter, as its head says it; 0: by none."""
        if frame[:6] == b"\xff" * 6:
            return _BROADCAST if control & (_AB | _AAP) else 0
        if frame[0] & 1:
            bit = group_bit(frame)
            if control & _AAP or control & _AM and self.regs[MAR + (bit >> 3)] >> (bit & 7) & 1:
                return _MULTICAST
            return 0
        if control & _APM and frame[:6] == self.regs[IDR : IDR + 6]:
            return _PHYSICAL
        return 1 if control & _AAP else 0

    # ---- life

    def reset(self) -> None:
        super().reset()
        self.regs[:] = bytes(_SIZE)
        self._born = 0
        self._restart()

    def time_shifted(self, by: int) -> None:
        self._born += by

    def save(self) -> Rtl8139State:
        return Rtl8139State(
            pci=self.save_pci(),
            mac=self.mac,
            frame=self._frame,
            link_up=self.link_up,
            registers=bytes(self.regs),
            command=self.command,
            write=self._write,
            queue=tuple(self._queue),
            eeprom=self.eeprom.save(),
            born=self._born,
            rings=None if self._timer is None else self._timer.when,
            places=(self._places[0], self._places[1], self._places[2]),
            polled=self._polled,
            tally=tuple(self._tally),
            sent=self._sent,
            tells=None if self._telling is None else self._telling.when,
            rests=None if self._resting is None else self._resting.when,
        )

    def check(self, state: Rtl8139State) -> None:
        self.check_pci(state.pci)
        self.check_card(state.mac)
        if len(set(state.queue)) != len(state.queue):
            raise Invalid(f"{self.name}: a descriptor cannot be sent twice")

    def load(self, state: Rtl8139State) -> None:
        self._cancel(self._timer, self._telling, self._resting)
        self.load_pci(state.pci)
        self.regs[:] = state.registers
        self.command, self._write, self._queue = state.command, state.write, list(state.queue)
        self.eeprom.load(state.eeprom)
        self._born, self._met = state.born, 0
        self._places, self._polled, self._tally = list(state.places), state.polled, list(state.tally)
        self._sent = state.sent
        self._timer = None if state.rings is None else self.board.schedule(state.rings, self._timed)
        self._telling = None if state.tells is None else self.board.schedule(state.tells, self._tell)
        self._resting = None if state.rests is None else self.board.schedule(state.rests, self._rested)
        self.load_card(state.mac, state.frame, state.link_up)
        if self.sends or self.listens:
            self.begin_carrying()
        if state.link_up != self.link_up:
            self.link_changed()

    def describe(self) -> dict[str, str]:
        ready = self.regs[CR] & (_RE | _TE) == _RE | _TE
        return {**super().describe(), "driver": "ready" if ready else "none"}
