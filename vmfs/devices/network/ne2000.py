"""ne2000: cards with a DP8390: an NE2000 on the ISA bus, and a Realtek RTL8029, which is one on PCI.

Source: National Semiconductor DP8390D/NS32490D data sheet; AN-729 (the NE2000's address map); RTL8029AS data sheet.

16 KiB of the card's own RAM at 4000h, of which a driver makes a ring for what comes and a place for what it sends; it
copies by the remote DMA at the data port (chips/remote.c).

Drivers stay in their interrupt while packets come, and copy them with the CPU. So to one that takes interrupts packets
come as on a wire of 10 Mbit/s: the driver first reads those that are there, and then the wire rests for as long as
they take on it. Else such a guest does nothing else any more. It clears the interrupt of what it has not looked at yet,
so it is told again and again of packets that are not read.
"""

from __future__ import annotations

import struct
import zlib
from typing import Annotated, TypeVar

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U8, U64, Device, DeviceState, Port, Window
from vmfs.devices.network.backends import Backend
from vmfs.devices.network.card import Card
from vmfs.devices.network.offload import LEAST_ON_WIRE, group_bit
from vmfs.devices.pci import Bar, PciDevice, PciState
from vmfs.devices.timers import Timer
from vmfs.words.nets import MAX_FRAME

PORTS, ISA_BASE, ISA_IRQ = 0x20, 0x300, 9
_DATA, _RESET = 0x10, 0x18
_RAM, _RAM_END, _PROM = 0x4000, 0x8000, 32

_STP, _STA, _TXP, _ABORT = 1, 2, 4, 0x20  # CR
_READ, _WRITE, _SEND = 1, 2, 3  # of CR's RD bits
PSTART, PSTOP, BNRY, TPSR, TBCR, ISR, RSAR, RBCR, RCR, TCR, DCR, IMR = 1, 2, 3, 4, 5, 7, 8, 10, 12, 13, 14, 15
PRX, PTX, TXE, RDC, RST = 1, 2, 8, 0x40, 0x80  # ISR
_RUNTS, _BROADCAST, _MULTICAST, _ALL, _MONITOR = 2, 4, 8, 0x10, 0x20  # RCR
_WORDS = 1  # DCR
_LOOPBACK = 6  # TCR
_LONGEST = 0x3FFF
_BYTE = 800  # nanoseconds on the wire
_AGAIN = 10_000_000  # nanoseconds after which the driver is told again

S = TypeVar("S", bound=DeviceState)


class ChipState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A DP8390's: `control`, CR; `page0` what was written to page 0's registers, `page1` those of page 1 (from 1 on:
    the address, CURR, the groups); `address` the remote DMA's, and how much is `left`; `tsr`, `rsr` how the last
    packets went; `burst`: bytes that have come since the wire last rested; `closed`: they are to
    be read first; `due`: when it has rested, or when the
    driver is to be told again."""

    control: U8
    page0: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    page1: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    address: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    left: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    tsr: U8
    rsr: U8
    ram: Annotated[bytes, msgspec.Meta(min_length=_RAM_END - _RAM, max_length=_RAM_END - _RAM)]
    burst: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    rests: bool = False
    closed: bool = False
    due: U64 | None = None


class CardState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mac: Annotated[bytes, msgspec.Meta(min_length=6, max_length=6)]
    frame: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME)] | None
    link_up: bool


class Dp8390(Card[S]):
    """The chip, and the card around it, whose `drive_line` has its interrupt."""

    IS_SLOW = True

    def make_chip(self) -> None:
        """Before `power_on`, once."""
        self._memory = bytearray(_RAM_END - _RAM)
        self.chip = _chips.Remote(self.board.bus, self.number, self._memory)
        self._timer: Timer | None = None

    def power_on(self) -> None:
        self.control = _STP | _ABORT
        self._page0, self._page1 = bytearray(16), bytearray(16)
        self._tsr = self._rsr = 0
        self._memory[:] = bytes(len(self._memory))
        self._met = 0
        self._set_remote(0, 0)
        prom = b"".join(bytes((byte, byte)) for byte in self.mac)
        self._prom = prom.ljust(28, b"\0") + b"WWWW"
        self._reset()

    def _reset(self) -> None:
        self.control = _STP | _ABORT
        self._page0[ISR] = RST
        self._page0[IMR] = 0
        self._set_remote(left=0)
        self._burst, self._rests, self._is_closed = 0, False, False
        self._set_timer(None)
        self.forget_frames()
        self._drive()

    def drive_line(self, level: bool) -> None:
        raise NotImplementedError

    @property
    def _is_high(self) -> bool:
        raise NotImplementedError

    # ---- what a card says

    @property
    def listens(self) -> bool:
        first, end = self._page0[PSTART], self._page0[PSTOP]
        return self.control & (_STP | _STA) == _STA and not self._page0[RCR] & _MONITOR and first < end

    @property
    def sends(self) -> bool:
        return self.control & (_STP | _STA) == _STA

    def link_changed(self) -> None:
        """The chip has no word for it."""

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        value = self.chip.read(region, offset, size)
        if value is not None:
            return int(value)
        if offset >= _RESET:
            self._reset()
            return 0
        if offset >= _DATA:
            return int.from_bytes(self._remote(size), "little")
        if offset in (ISR, 0x0C) and self.listens and self._polls:
            self.look()
        return int.from_bytes(bytes(self._register(at) for at in range(offset, min(offset + size, _DATA))), "little")

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if self.chip.write(region, offset, size, value):
            return
        data = value.to_bytes(8, "little")[:size]
        if offset >= _RESET:
            return
        if offset >= _DATA:
            self._put_data(data)
        else:
            for at, byte in enumerate(data, offset):
                if at < _DATA:
                    self._set(at, byte)

    def _register(self, at: int) -> int:
        page = self.control >> 6
        if at == 0:
            return self.control
        if page == 1:
            return self._page1[at]
        if page == 2:
            return self._page0[at] if at in (PSTART, PSTOP, TPSR) else self._page0[at] | 0xC0 if at >= RCR else 0
        if page == 3:
            return 0
        address, _ = self.chip.place()
        found = {
            1: address & 0xFF, 2: address >> 8, BNRY: self._page0[BNRY], 4: self._tsr,
            ISR: self._page0[ISR],
            8: address & 0xFF, 9: address >> 8, 0x0A: self.ID[0], 0x0B: self.ID[1], 0x0C: self._rsr,
        }  # fmt: skip
        return found.get(at, 0)

    ID = 0xFF, 0xFF

    def _set(self, at: int, byte: int) -> None:
        page = self.control >> 6
        if at == 0:
            self._command(byte)
        elif page == 1:
            self._page1[at] = byte
        elif page == 0:
            if at == ISR:
                self._page0[ISR] &= ~byte | RST
                self._drive()
                return
            self._page0[at] = byte
            if at == IMR:
                self._page0[IMR] = byte & 0x7F
                self._drive()
            elif at == BNRY:
                self._has_read()
            elif at in (RSAR, RSAR + 1):
                self._set_remote(at=self._page0[RSAR] | self._page0[RSAR + 1] << 8)
            elif at in (RBCR, RBCR + 1):
                self._set_remote(left=self._page0[RBCR] | self._page0[RBCR + 1] << 8)
            elif at in (PSTOP, DCR):
                self._set_remote()

    def _command(self, byte: int) -> None:
        """CR: TXP stays until the packet has gone, and is not cleared by a write."""
        # STA stays until STP: drivers write CR with neither.
        self.control = byte & ~_TXP | self.control & _TXP | (0 if byte & _STP else self.control & _STA)
        if byte & _STP:
            self._page0[ISR] |= RST
            self.control &= ~_TXP
        else:
            self._page0[ISR] &= ~RST
        if self.sends:
            if self._thread is None:
                self.begin_carrying()
            self.buffers_came()
        what = byte >> 3 & 7
        if what == _SEND:  # the packet at BNRY
            address = self._page0[BNRY] << 8
            self._set_remote(address, int.from_bytes(self._peek(address + 2, 2), "little"))
        else:
            self._set_remote()
        if what in (_READ, _WRITE) and not self.chip.place()[1]:
            self._raise(RDC)
        if byte & _TXP and self.sends:
            self.control |= _TXP
            self.send_on()
        self._drive()

    # ---- its memory

    def _peek(self, address: int, length: int) -> bytes:
        if _RAM <= address and address + length <= _RAM_END:
            return bytes(self._memory[address - _RAM : address - _RAM + length])
        return bytes(self._byte(address + at) for at in range(length))

    def _byte(self, address: int) -> int:
        if address < _PROM:
            return self._prom[address]
        return self._memory[address - _RAM] if _RAM <= address < _RAM_END else 0xFF

    def _set_remote(self, at: int | None = None, left: int | None = None) -> None:
        """Where the remote DMA is, and how it goes on."""
        is_at, is_left = self.chip.place()
        mode = {_READ: 1, _SEND: 1, _WRITE: 2}.get(self.control >> 3 & 7, 0) | (4 if self._page0[DCR] & _WORDS else 0)
        self.chip.set(is_at if at is None else at, is_left if left is None else left, mode, self._page0[PSTOP] << 8)

    def _step(self, count: int) -> None:
        """The remote DMA goes on, and from the ring's end to its beginning."""
        at, left = self.chip.place()
        at = at + count & 0xFFFF
        if at == self._page0[PSTOP] << 8:
            at = self._page0[PSTART] << 8
        self._set_remote(at, max(left - count, 0))
        if count >= left:
            self._raise(RDC)

    def _remote(self, size: int) -> bytes:
        if self.control >> 3 & 7 not in (_READ, _SEND) or not self.chip.place()[1]:
            return b"\xff" * size
        wide = self._page0[DCR] & _WORDS
        if not wide:
            data = bytes((self._byte(self.chip.place()[0]),))
            self._step(1)
            return data.ljust(size, b"\0")
        parts = []
        for _ in range(max(size // 2, 1)):
            parts.append(self._peek(self.chip.place()[0], 2))
            self._step(2)
        return b"".join(parts)[:size]

    def _put_data(self, data: bytes) -> None:
        if self.control >> 3 & 7 != _WRITE or not self.chip.place()[1]:
            return
        step = 2 if self._page0[DCR] & _WORDS and len(data) > 1 else 1
        for at in range(0, len(data) if step == 2 else 1, step):
            start = self.chip.place()[0]
            for address, byte in enumerate(data[at : at + step], start):
                if _RAM <= address < _RAM_END:
                    self._memory[address - _RAM] = byte
            self._step(step)

    # ---- interrupts

    def _raise(self, causes: int) -> None:
        self._page0[ISR] |= causes
        self._drive()

    def _drive(self) -> None:
        wanted = bool(self._page0[ISR] & self._page0[IMR])
        if wanted != self._is_high:
            self.counters["interrupts"] += wanted
            self.drive_line(wanted)

    # ---- what the guest sends

    def send_on(self) -> None:
        if not self.control & _TXP or self._blocked:
            return
        at, length = self._page0[TPSR] << 8, self._page0[TBCR] | self._page0[TBCR + 1] << 8
        self.control &= ~_TXP
        if not _RAM <= at or at + length > _RAM_END:
            self.counters["tx_bad"] += 1
            self._tsr = 0x20  # underrun: there is no memory
            self._raise(TXE)
            return
        frame = self._peek(at, length)
        if self._page0[TCR] & _LOOPBACK:
            if self.listens and not self.deliver(frame):
                self.counters["rx_dropped"] += 1
            self.delivered()
        else:
            self.send_all([frame])
            self.sent()
        self._tsr = 1
        self._raise(PTX)

    # ---- what the guest receives

    def deliver(self, frame: bytes) -> bool:
        group = bool(frame[0] & 1)
        if not self._accepts(frame):
            return True
        if not self._polls and (self._rests or self._is_closed and self.has_unread()):
            return False
        if len(frame) < LEAST_ON_WIRE:
            frame = frame.ljust(LEAST_ON_WIRE, b"\0")
        first, end = self._page0[PSTART], self._page0[PSTOP]
        pages = end - first
        at = self._page1[7]
        if not first <= at < end:
            self.counters["rx_dropped"] += 1
            return True
        size = len(frame) + 4  # with the CRC
        needed = -(-(size + 4) // 256)
        if needed >= pages or size > _LONGEST:
            self.counters["rx_dropped"] += 1
            return True
        free = (self._page0[BNRY] - at - 1) % pages + 1
        if needed >= free:
            return False
        after = first + (at - first + needed) % pages
        self._rsr = 0x21 if group else 1
        data = struct.pack("<BBH", self._rsr, after, size) + frame + zlib.crc32(frame).to_bytes(4, "little")
        rest = (end - at) << 8
        for address, part in ((at << 8, data[:rest]), (first << 8, data[rest:])):
            lowest, highest = max(address, _RAM), min(address + len(part), _RAM_END)
            if lowest < highest:
                self._memory[lowest - _RAM : highest - _RAM] = part[lowest - address : highest - address]
        self._page1[7] = after
        self._burst = min(self._burst + size, 1 << 20)
        self.count_received([frame])
        self._met |= PRX
        return True

    def has_unread(self) -> bool:
        # A driver has BNRY one page below what it reads next, or on it.
        first, end = self._page0[PSTART], self._page0[PSTOP]
        return self.listens and (self._page1[7] - self._page0[BNRY]) % (end - first) > 1

    def delivered(self) -> None:
        causes, self._met = self._met, 0
        if causes:
            self._is_closed = True  # until that is read
            self._set_timer(_AGAIN)
            self._raise(causes)

    @property
    def _polls(self) -> bool:
        """The driver takes no interrupts: it looks when it likes."""
        return not self._page0[IMR] & PRX

    def _has_read(self) -> None:
        """The driver has moved BNRY."""
        if self._polls:
            self.buffers_came()
        elif self._is_closed and not self.has_unread():
            self._is_closed, self._rests = False, True
            self._set_timer(self._burst * _BYTE)
            self._burst = 0

    def _set_timer(self, nanoseconds: int | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if nanoseconds is None else self.board.schedule(self.board.now() + nanoseconds, self._is_due)

    def _is_due(self) -> None:
        self._timer = None
        if self._rests:
            self._rests = False
        elif self.has_unread():
            self._set_timer(_AGAIN)
            self._raise(PRX)
        self.buffers_came()

    def _accepts(self, frame: bytes) -> bool:
        control = self._page0[RCR]
        if frame[:6] == b"\xff" * 6:
            return bool(control & _BROADCAST)
        if frame[0] & 1:
            bit = group_bit(frame)
            return bool(control & _MULTICAST and self._page1[8 + (bit >> 3)] >> (bit & 7) & 1)
        return bool(control & _ALL) or frame[:6] == self._page1[1:7]

    # ---- life

    def save_chip(self) -> ChipState:
        return ChipState(
            control=self.control,
            page0=bytes(self._page0),
            page1=bytes(self._page1),
            address=self.chip.place()[0],
            left=self.chip.place()[1],
            tsr=self._tsr,
            rsr=self._rsr,
            ram=bytes(self._memory),
            burst=self._burst,
            rests=self._rests,
            closed=self._is_closed,
            due=None if self._timer is None else self._timer.when,
        )

    def save_cable(self) -> CardState:
        return CardState(mac=self.mac, frame=self._frame, link_up=self.link_up)

    def load_chip(self, state: ChipState, cable: CardState) -> None:
        self.mac = cable.mac
        self.power_on()
        self.control = state.control
        self._page0[:], self._page1[:], self._memory[:] = state.page0, state.page1, state.ram
        self._set_remote(state.address, state.left)
        self._burst, self._rests, self._is_closed = state.burst, state.rests, state.closed
        if state.due is not None:
            self._timer = self.board.schedule(state.due, self._is_due)
        self._tsr, self._rsr = state.tsr, state.rsr
        self.load_card(cable.mac, cable.frame, cable.link_up)
        if self.sends:
            self.begin_carrying()

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "driver": "ready" if self.sends else "none"}


class Ne2000State(DeviceState):
    chip: ChipState
    card: CardState
    pending: bool


class Ne2000(Dp8390[Ne2000State], Device[Ne2000State]):
    TYPE = "ne2000"
    STATE = Ne2000State
    irq = ISA_IRQ

    def __init__(self, board: Port, name: str, backend: Backend, mac: bytes) -> None:
        self.plug_in(backend, mac)
        super().__init__(board, name)
        self._high = False
        self.make_chip()
        self.power_on()

    @property
    def _is_high(self) -> bool:
        return self._high

    def drive_line(self, level: bool) -> None:
        self._high = level
        self.set_irq(level)

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", ISA_BASE, PORTS, 0),)

    def reset(self) -> None:
        self.power_on()

    def save(self) -> Ne2000State:
        return Ne2000State(chip=self.save_chip(), card=self.save_cable(), pending=self._high)

    def check(self, state: Ne2000State) -> None:
        self.check_card(state.card.mac)

    def load(self, state: Ne2000State) -> None:
        self.load_chip(state.chip, state.card)
        self.drive_line(state.pending)


class Ne2000PciState(DeviceState):
    pci: PciState
    chip: ChipState
    card: CardState


class Ne2000Pci(Dp8390[Ne2000PciState], PciDevice[Ne2000PciState]):
    TYPE = "ne2000-pci"
    STATE = Ne2000PciState
    VENDOR, DEVICE, CLASS = 0x10EC, 0x8029, 0x020000
    SUBSYSTEM = 0x10EC, 0x8029
    BARS = {0: Bar("port", PORTS)}
    ID = 0x50, 0x43  # "P", "C"

    def __init__(self, board: Port, name: str, slot: int, backend: Backend, mac: bytes) -> None:
        self.plug_in(backend, mac)
        super().__init__(board, name, slot)
        self.make_chip()
        self.power_on()

    @property
    def _is_high(self) -> bool:
        return self.pending

    def drive_line(self, level: bool) -> None:
        self.set_irq(level)

    def reset(self) -> None:
        super().reset()
        self.power_on()

    def save(self) -> Ne2000PciState:
        return Ne2000PciState(pci=self.save_pci(), chip=self.save_chip(), card=self.save_cable())

    def check(self, state: Ne2000PciState) -> None:
        self.check_pci(state.pci)
        self.check_card(state.card.mac)

    def load(self, state: Ne2000PciState) -> None:
        self.load_chip(state.chip, state.card)
        self.load_pci(state.pci)
