"""e1000: an Intel 82540EM, "PRO/1000 MT Desktop".

Source: PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual (317453), chapters 3 (descriptors),
5 (EEPROM), 6 (PCI), 8 (PHY), 13 (registers).

All that a driver has to send is sent when it writes TDT, up to a bound, after which the guest goes on for a moment.
Interrupts are moderated by ITR; the delays of TIDV, TADV, RDTR and RADV are none.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from typing import Annotated

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U32, U64, DeviceState, Port
from vmfs.devices.network import offload
from vmfs.devices.network.backends import Backend
from vmfs.devices.network.card import Card
from vmfs.devices.network.microwire import WORDS, Eeprom, EepromState
from vmfs.devices.pci import Bar, PciDevice, PciState
from vmfs.devices.timers import Timer
from vmfs.words.errors import Invalid
from vmfs.words.nets import LEAST_FRAME, MAX_FRAME

CTRL, STATUS, EECD, EERD, CTRL_EXT, MDIC = 0x00, 0x08, 0x10, 0x14, 0x18, 0x20
FCAL, FCAH, FCT, VET = 0x28, 0x2C, 0x30, 0x38
ICR, ITR, ICS, IMS, IMC = 0xC0, 0xC4, 0xC8, 0xD0, 0xD8
RCTL, FCTTV, TXCW, RXCW, TCTL, TIPG, AIFS, LEDCTL, PBA = 0x100, 0x170, 0x178, 0x180, 0x400, 0x410, 0x458, 0xE00, 0x1000
FCRTL, FCRTH, RDBAL, RDBAH, RDLEN, RDH, RDT, RDTR, RXDCTL, RADV, RSRPD = (
    0x2160, 0x2168, 0x2800, 0x2804, 0x2808, 0x2810, 0x2818, 0x2820, 0x2828, 0x282C, 0x2C00,
)  # fmt: skip
TDBAL, TDBAH, TDLEN, TDH, TDT, TIDV, TXDCTL, TADV, TSPMT = (
    0x3800, 0x3804, 0x3808, 0x3810, 0x3818, 0x3820, 0x3828, 0x382C, 0x3830,
)  # fmt: skip
_STATISTICS, _STATISTICS_END = 0x4000, 0x4100
RXCSUM, MTA, RAL, VFTA, WUC, WUFC, WUS, MANC = 0x5000, 0x5200, 0x5400, 0x5600, 0x5800, 0x5808, 0x5810, 0x5820
_RAL_END = RAL + 8 * 16
_REGISTERS_END = 0x8000

_RST, _PHY_RST, _SLU, _VME = 1 << 26, 1 << 31, 1 << 6, 1 << 30  # CTRL
_FULL_DUPLEX, _LINK_UP, _GIGABIT = 1, 2, 0x80  # STATUS
_SK, _CS, _DI, _DO, _REQUEST, _GRANT, _PRESENT = 1, 2, 4, 8, 0x40, 0x80, 0x100  # EECD
_EERD_START, _EERD_DONE = 1, 0x10
_MDIC_WRITE, _MDIC_READ, _MDIC_READY, _MDIC_INTERRUPT, _MDIC_ERROR = 1, 2, 1 << 28, 1 << 29, 1 << 30
TXDW, TXQE, LSC, RXDMT0, RXO, RXT0, MDAC = 1, 2, 4, 0x10, 0x40, 0x80, 0x200
_CAUSES = 0x1_F6DF
_ENABLE = 2  # RCTL and TCTL
_UPE, _MPE, _LPE, _BAM, _VFE, _BSEX, _SECRC = 8, 0x10, 0x20, 0x8000, 1 << 18, 1 << 25, 1 << 26
_PAD = 8  # TCTL
_AV = 1 << 31  # RAH
_IPOFLD, _TUOFLD = 0x100, 0x200  # RXCSUM

_EOP, _IFCS, _IC_OR_TSE, _RS, _DEXT, _VLE = 1 << 24, 1 << 25, 1 << 26, 1 << 27, 1 << 29, 1 << 30
_DATA, _CONTEXT = 1, 0
_IXSM, _TXSM = 1, 2  # POPTS
_TU_TCP = 1  # TUCMD
_DD = 1
_RX_DD, _RX_EOP, _RX_IXSM, _RX_VP, _RX_TCPCS, _RX_IPCS, _RX_PIF = 1, 2, 4, 8, 0x20, 0x40, 0x80
_RX_TCPE, _RX_IPE = 0x20, 0x40  # errors
_DESCRIPTOR = struct.Struct("<QII")
_RECEIVED = struct.Struct("<HHBBH")  # its upper half: length, checksum, status, errors, special

_LONGEST = 16_288  # of a frame, that it sends and receives (LPE)
_TSO_MOST = 1 << 18  # bytes of a packet that is to be cut into segments
_LEAST_SEGMENT = 64
_TURN_DESCRIPTORS, _TURN_FRAMES = 1024, 2048  # sent at a time
_PAUSE = 1000  # nanoseconds after that
_ITR_UNIT = 256  # nanoseconds
_CRC = 4
_STRIPS, _CHECKS_IP, _CHECKS_TRANSPORT = 1, 2, 4  # of _chips.e1000_put
_PADS, _TAGS = 1, 2  # of _chips.e1000_take
_AT_ONCE = 256  # frames that C makes before the backend is asked for room

# Registers that are no more than what is written there, by the bits that are; all others read as 0.
_PLAIN: dict[int, int] = {
    CTRL: 0x7FFF_FFFF & ~_RST, CTRL_EXT: 0xFFFF_FFFF, FCAL: 0xFFFF_FFFF, FCAH: 0xFFFF, FCT: 0xFFFF, VET: 0xFFFF,
    ITR: 0xFFFF, RCTL: 0x07FF_FFFE, FCTTV: 0xFFFF, TXCW: 0xFFFF_FFFF, TCTL: 0x03FF_FFFA, TIPG: 0x3FFF_FFFF,
    AIFS: 0xFFFF,
    LEDCTL: 0xFFFF_FFFF, PBA: 0x7F, FCRTL: 0x8000_FFF8, FCRTH: 0xFFF8, RDBAL: 0xFFFF_FFF0, RDBAH: 0xFFFF_FFFF,
    RDLEN: 0xF_FF80, RDH: 0xFFFF, RDT: 0xFFFF, RDTR: 0xFFFF, RXDCTL: 0x013F_3F3F, RADV: 0xFFFF, RSRPD: 0xFFF,
    TDBAL: 0xFFFF_FFF0, TDBAH: 0xFFFF_FFFF, TDLEN: 0xF_FF80, TDH: 0xFFFF, TDT: 0xFFFF, TIDV: 0xFFFF,
    TXDCTL: 0xFFFF_FFFF, TADV: 0xFFFF, TSPMT: 0xFFFF_FFFF, RXCSUM: 0x7FF, WUC: 0xF, WUFC: 0xF_FFFF, MANC: 0xFFFF_FFFF,
    **dict.fromkeys(range(MTA, MTA + 0x200, 4), 0xFFFF_FFFF),
    **dict.fromkeys(range(RAL, _RAL_END, 8), 0xFFFF_FFFF),
    **dict.fromkeys(range(RAL + 4, _RAL_END, 8), 0x8003_FFFF),
    **dict.fromkeys(range(VFTA, VFTA + 0x200, 4), 0xFFFF_FFFF),
}  # fmt: skip
_AT_RESET = {
    CTRL: 0x201 | _SLU, PBA: 0x30, VET: offload.VLAN, TXDCTL: 0, TIPG: 0x60200A, LEDCTL: 0x0706_0302, RXCSUM: 0,
}  # fmt: skip
_KEPT = frozenset((*range(MTA, MTA + 0x200, 4), *range(VFTA, VFTA + 0x200, 4), *range(RAL + 8, _RAL_END, 4)))

# Statistics (13.7), which are cleared when they are read.
PRC64, MPC, GPRC, BPRC, MPRC, GPTC = 0x405C, 0x4010, 0x4074, 0x4078, 0x407C, 0x4080
GORC, GOTC, TOR, TOT, TPR, TPT, PTC64, MPTC, BPTC, TSCTC = (
    0x4088, 0x4090, 0x40C0, 0x40C8, 0x40D0, 0x40D4, 0x40D8, 0x40F0, 0x40F4, 0x40F8,
)  # fmt: skip
_WIDE = GORC, GOTC, TOR, TOT  # of 64 bits; a read of the upper half clears both
_SIZES = 64, 127, 255, 511, 1023, 1522

# The PHY, an 88E1011 (8.8): what it begins with, and what a driver may change.
_PHY_CONTROL, _PHY_STATUS, _PHY_SPECIFIC = 0, 1, 17
_PHY = {
    0: 0x1140, 1: 0x7949, 2: 0x0141, 3: 0x0C20, 4: 0x0DE1, 5: 0x0000, 6: 0x0004, 7: 0x2001, 9: 0x0E00, 10: 0x0000,
    15: 0x3000, 16: 0x0360, 17: 0x8000, 18: 0, 19: 0, 20: 0x0D60, 21: 0,
}  # fmt: skip
_PHY_WRITABLE = {0: 0x5DC0, 4: 0xFFFF, 7: 0xFFFF, 9: 0xFFFF, 16: 0xFFFF, 18: 0xFFFF, 20: 0xFFFF, 29: 0xFFFF, 30: 0xFFFF}
_PHY_RESET, _PHY_LOOPBACK = 0x8000, 0x4000


class E1000State(DeviceState):
    """`registers`: those that are not 0. `packet`: of a packet whose last descriptor has not come, what has, and its
    `packet_head`: command and options of the first. `contexts`: of sums, and of segments, as their descriptors.
    `moderated`: when the interrupt line last went up, in the guest's time; `due`: when it may again, if
    it is to; `rests`: until when it sends nothing, if it does."""

    pci: PciState
    mac: Annotated[bytes, msgspec.Meta(min_length=6, max_length=6)]
    frame: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME)] | None
    link_up: bool
    registers: dict[int, U32]
    statistics: dict[int, U64]
    causes: U32
    mask: U32
    phy: dict[int, Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]]
    eeprom: EepromState
    eecd: U32
    mdic: U32
    eerd: U32
    address: U32
    packet: Annotated[bytes, msgspec.Meta(max_length=_TSO_MOST)]
    packet_head: tuple[U32, U32] | None
    packet_is_bad: bool
    contexts: tuple[
        Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)],
        Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)],
    ]
    moderated: int
    due: U64 | None
    rests: U64 | None


class E1000(Card[E1000State], PciDevice[E1000State]):
    TYPE = "e1000"
    STATE = E1000State
    VENDOR, DEVICE, CLASS, REVISION = 0x8086, 0x100E, 0x020000, 2
    SUBSYSTEM = 0x8086, 0x001E
    BARS = {0: Bar("memory", 1 << 17), 2: Bar("port", 0x40)}

    def __init__(self, board: Port, name: str, slot: int, backend: Backend, mac: bytes) -> None:
        self.plug_in(backend, mac)
        super().__init__(board, name, slot)
        self.eeprom = Eeprom(self._contents(mac))
        self._moderating: Timer | None = None
        self._resting: Timer | None = None
        self._moderated = 0
        self._causes_met = 0  # in `deliver`, that `delivered` has to raise
        self.regs: dict[int, int] = {}
        self._power_on()

    def _contents(self, mac: bytes) -> bytes:
        """Of the EEPROM (5.6): the sum of its words is BABAh."""
        words = [0] * WORDS
        words[:3] = struct.unpack("<3H", mac)
        words[3:10] = 0x0000, 0xFFFF, 0x0000, 0x0000, 0x0000, 0x3000, 0x1000
        words[0x0A:0x10] = 0x6C09, self.SUBSYSTEM[1], self.SUBSYSTEM[0], self.DEVICE, self.VENDOR, 0xB280
        words[0x3F] = 0xBABA - sum(words) & 0xFFFF
        return struct.pack(f"<{WORDS}H", *words)

    def _power_on(self) -> None:
        self.regs.clear()
        self.phy = dict(_PHY)
        self._negotiate()
        self._reset()

    def _reset(self) -> None:
        """Of the MAC (CTRL.RST): what is not kept is as at power-on."""
        kept = {at: value for at, value in self.regs.items() if at in _KEPT}
        self.regs = {**dict.fromkeys(_PLAIN, 0), **_AT_RESET, **kept}
        low, high = struct.unpack("<IH", self.eeprom.data[:6])
        self.regs[RAL], self.regs[RAL + 4] = low, high | _AV
        self.causes = self.mask = 0
        self.statistics: Counter[int] = Counter()
        self.address = self._eecd = 0
        self.mdic = _MDIC_READY
        self.eerd = _EERD_DONE
        self._packet, self._packet_head, self._packet_is_bad = bytearray(), None, False
        self._contexts = bytearray(32)  # of sums, of segments
        self._causes_met = 0
        self.forget_frames()
        self._drive()

    # ---- what a card says

    @property
    def listens(self) -> bool:
        return bool(self.regs[RCTL] & _ENABLE) and self.is_master and self._ring(RDBAL) is not None

    @property
    def sends(self) -> bool:
        return bool(self.regs[TCTL] & _ENABLE) and self.is_master

    def link_changed(self) -> None:
        self._negotiate()
        self._raise(LSC)

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        if region == 2:  # IOADDR and IODATA (13.2.2)
            if offset & ~3 == 0:
                value = self.address
            else:
                value = self._get(self.address) if offset & ~3 == 4 and self.address < _REGISTERS_END else 0
            return value >> 8 * (offset & 3)
        if size == 8:
            return self._get(offset) | self._get(offset + 4) << 32
        return self._get(offset & ~3) >> 8 * (offset & 3)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if offset & 3 or size < 4:
            return  # a register is written as a whole (13.2)
        if region == 2:
            if offset == 0:
                self.address = value & 0xFFFF_FFFC
            elif offset == 4 and self.address < _REGISTERS_END:
                self._set(self.address, value)
            return
        self._set(offset, value & 0xFFFF_FFFF)
        if size == 8:
            self._set(offset + 4, value >> 32)

    def _get(self, at: int) -> int:
        value = self.regs.get(at)
        if value is not None:
            return value
        if at == ICR:
            value, self.causes = self.causes, 0
            self._drive()
            return value
        if at == STATUS:
            return _FULL_DUPLEX | _GIGABIT | (_LINK_UP if self.link_up and self.regs[CTRL] & _SLU else 0)
        if at in (IMS, IMC):
            return self.mask
        if at == EECD:
            return self._eecd | (_DO if self.eeprom.do else 0) | (_GRANT if self._eecd & _REQUEST else 0) | _PRESENT
        if at == MDIC:
            return self.mdic
        if at == EERD:
            return self.eerd
        if _STATISTICS <= at < _STATISTICS_END:
            return self._take_statistic(at)
        return 0

    def _set(self, at: int, value: int) -> None:
        mask = _PLAIN.get(at)
        if mask is not None:
            self.regs[at] = value & mask
        if at == TDT:
            self.send_on()
        elif at == RDT:
            self.buffers_came()
        elif at == IMS:
            self.mask |= value & _CAUSES
            self._drive()
        elif at == IMC:
            self.mask &= ~value
            self._drive()
        elif at == ICR:
            self.causes &= ~value
            self._drive()
        elif at == ICS:
            self._raise(value & _CAUSES)
        elif at == CTRL:
            if value & _PHY_RST:
                self.phy = dict(_PHY)
                self._negotiate()
            if value & _RST:
                self._reset()
        elif at == EECD:
            self._eecd = value & (_SK | _CS | _DI | 0x30 | _REQUEST)
            self.eeprom.drive(bool(value & _CS), bool(value & _SK), bool(value & _DI))
        elif at == EERD and value & _EERD_START:
            index = value >> 8 & 0xFF
            self.eerd = _EERD_DONE | index << 8 | (self.eeprom.word(index) if index < WORDS else 0) << 16
        elif at == MDIC:
            self._access_phy(value)
        elif at in (RCTL, TCTL):
            if value & _ENABLE and self._thread is None:
                self.begin_carrying()
            self.buffers_came()
            self.send_on()

    def _take_statistic(self, at: int) -> int:
        low = at & ~4
        if low in _WIDE:
            value = self.statistics[low]
            if at & 4:
                del self.statistics[low]
                return value >> 32 & 0xFFFF_FFFF
            return value & 0xFFFF_FFFF
        return min(self.statistics.pop(at, 0), 0xFFFF_FFFF)

    # ---- the PHY

    def _access_phy(self, value: int) -> None:
        register, phy, operation = value >> 16 & 0x1F, value >> 21 & 0x1F, value >> 26 & 3
        self.mdic = value & 0x07FF_FFFF | _MDIC_READY
        if phy != 1 or operation not in (_MDIC_READ, _MDIC_WRITE):
            self.mdic |= _MDIC_ERROR
        elif operation == _MDIC_READ:
            self.mdic = self.mdic & ~0xFFFF | self.phy.get(register, 0)
        elif register in _PHY_WRITABLE:
            self._write_phy(register, value & 0xFFFF)
        if value & _MDIC_INTERRUPT:
            self._raise(MDAC)

    def _write_phy(self, register: int, value: int) -> None:
        if register == _PHY_CONTROL and value & _PHY_RESET:
            self.phy = dict(_PHY)
        else:
            self.phy[register] = value & _PHY_WRITABLE[register]
        if register == _PHY_CONTROL and value & (_PHY_RESET | 0x0200):
            self._negotiate()
            self._raise(LSC)

    def _negotiate(self) -> None:
        """The link is as the backend's, and negotiated at once: 1000 Mbit/s, full duplex."""
        up = self.link_up
        self.phy[_PHY_STATUS] = _PHY[1] | (0x24 if up else 0)
        self.phy[5], self.phy[6] = (0xCDE1, 0x0007) if up else (0, 4)
        self.phy[10] = 0x7C00 if up else 0
        self.phy[_PHY_SPECIFIC] = 0xAC08 if up else 0x8000

    @property
    def _loops(self) -> bool:
        """What it sends comes back to it."""
        return self.regs[RCTL] >> 6 & 3 == 1 or bool(self.phy[_PHY_CONTROL] & _PHY_LOOPBACK)

    # ---- interrupts

    def _raise(self, causes: int) -> None:
        self.causes |= causes
        self._drive()

    def _drive(self) -> None:
        """INTA is as causes and mask say; it goes up no more often than ITR allows (13.4.18)."""
        wanted = bool(self.causes & self.mask)
        if wanted == self.pending:
            return
        if not wanted:
            self.set_irq(False)
            return
        gap = self.regs.get(ITR, 0) * _ITR_UNIT
        if gap:
            if self._moderating is not None:
                return
            now = self.board.now()
            due = self._moderated + gap
            if now < due and due - now <= gap:
                self._moderating = self.board.schedule(due, self._moderated_long_enough)
                return
            self._moderated = now
        self.counters["interrupts"] += 1
        self.set_irq(True)

    def _moderated_long_enough(self) -> None:
        self._moderating = None
        self._moderated = self.board.now() - 0x1_0000 * _ITR_UNIT
        self._drive()

    # ---- rings

    def _ring(self, base: int) -> tuple[int, int] | None:
        """Where a ring is, and how many descriptors it has; None where that cannot be."""
        regs = self.regs
        start, length = regs[base] | regs[base + 4] << 32, regs[base + 8]
        if not length or not self.board.is_ram(start, length):
            return None
        return start, length >> 4

    # ---- what the guest sends (3.3 to 3.5)

    def send_on(self) -> None:
        if not self.sends or self._resting is not None:
            return
        ring = self._ring(TDBAL)
        if ring is None:
            return
        start, count = ring
        regs, ram = self.regs, self.board.ram
        head, tail = regs[TDH], regs[TDT]
        if head >= count or tail >= count or head == tail:
            return
        causes, spans = 0, []
        self._frames_left, left = _TURN_FRAMES, _TURN_DESCRIPTORS
        while head != tail and not self._blocked:
            if left <= 0 or self._frames_left <= 0:
                self._rest()
                break
            taken, head, told = self._send_plain(start, count, head, tail, left)
            causes |= TXDW if told else 0
            if taken:
                left -= taken
                continue
            left -= 1
            at = start + 16 * head
            address, low, high = _DESCRIPTOR.unpack_from(ram, at)
            self._one(address, low, high, at)
            head = head + 1 if head + 1 < count else 0
            if low & _RS:
                ram[at + 12] = ram[at + 12] & 0xF0 | _DD
                spans.append((at + 12, 1))
                causes |= TXDW
        regs[TDH] = head
        if spans:
            self.board.wrote_all(spans)
        if head == tail:
            causes |= TXQE
        self.sent()
        if causes:
            self._raise(causes)

    def _send_plain(self, start: int, count: int, head: int, tail: int, most: int) -> tuple[int, int, bool]:
        """By C: whole packets without tags, up to one that is not that. How many descriptors those were, the new head,
        and whether a status was written."""
        if self._packet_head is not None or self._loops:
            return 0, head, False
        regs, statistics = self.regs, self.statistics
        flags = (_PADS if regs[TCTL] & _PAD else 0) | (_TAGS if regs[CTRL] & _VME else 0)
        frames, head, taken, told, cut, octets, sizes, broadcasts, groups = _chips.e1000_take(
            self.mapped_ram(), start, count, head, tail, most, min(self._frames_left, _AT_ONCE), flags, self._contexts
        )
        if frames:
            self._frames_left -= len(frames)
            for at, value in (
                *((at, len(frames)) for at in (GPTC, TPT)), *((at, octets) for at in (GOTC, TOT)), (TSCTC, cut),
                (BPTC, broadcasts), (MPTC, groups), *((PTC64 + 4 * step, value) for step, value in enumerate(sizes)),
            ):  # fmt: skip
                if value:
                    statistics[at] += value
            self.send_all(frames)
        return taken, head, told

    def _rest(self) -> None:
        """There is more than is sent at a time: the guest goes on for a moment."""
        self._resting = self.board.schedule(self.board.now() + _PAUSE, self._rested)

    def _rested(self) -> None:
        self._resting = None
        self.send_on()

    def _one(self, address: int, low: int, high: int, at: int) -> None:
        """A descriptor."""
        if low & _DEXT and low >> 20 & 0xF == _CONTEXT:
            place = 16 if low & _IC_OR_TSE else 0
            self._contexts[place : place + 16] = self.board.ram[at : at + 16]
            return
        length = low & (0xF_FFFF if low & _DEXT else 0xFFFF)
        if self._packet_head is None:
            self._packet_head = low, high
        if length:
            if len(self._packet) + length > _TSO_MOST or not self.board.is_ram(address, length):
                self._packet_is_bad = True
            elif not self._packet_is_bad:
                self._packet += self.board.ram[address : address + length]
        if low & _EOP:
            first, options = self._packet_head
            packet, is_bad = self._packet, self._packet_is_bad
            self._packet, self._packet_head, self._packet_is_bad = bytearray(), None, False
            if is_bad:
                self._frames_left -= 1
                self.counters["tx_bad"] += 1
            else:
                self._send_packet(packet, first, options, low, high)

    def _send_packet(self, packet: bytearray, first: int, options: int, last: int, high: int) -> None:
        """What the first descriptor's commands and options say, with those of the last (3.3.6, 3.3.7)."""
        tag = high >> 16 if last & _VLE and self.regs[CTRL] & _VME else None
        if not first & _DEXT:
            if last & _IC_OR_TSE:
                _chips.insert_sum(packet, high >> 8 & 0xFF, last >> 16 & 0xFF, 0)
            self._emit(bytes(packet), tag)
            return
        ip, tcp, size, more = struct.unpack_from("<IIII", self._contexts, 16 if first & _IC_OR_TSE else 0)
        options >>= 8
        sums = ip >> 8 & 0xFF, ip >> 16, tcp >> 8 & 0xFF, tcp >> 16
        if first & _IC_OR_TSE:
            header, most = more >> 8 & 0xFF, more >> 16
            starts = ip & 0xFF, tcp & 0xFF
            whole = starts[0] + 20 <= header and starts[1] + 20 <= header <= len(packet)
            if not whole or most < _LEAST_SEGMENT or not size >> 24 & _TU_TCP:
                self._frames_left -= 1
                self.counters["tx_bad"] += 1
                return
            self.statistics[TSCTC] += 1
            for frame in _chips.segments(packet, header, most, *starts, sums):
                self._emit(frame, tag)
            return
        if options & _IXSM:
            _chips.insert_sum(packet, ip & 0xFF, sums[0], sums[1])
        if options & _TXSM:
            _chips.insert_sum(packet, tcp & 0xFF, sums[2], sums[3])
        self._emit(bytes(packet), tag)

    def _emit(self, frame: bytes, tag: int | None) -> None:
        self._frames_left -= 1
        if not LEAST_FRAME <= len(frame) <= _LONGEST:
            self.counters["tx_bad"] += 1
            return
        if tag is not None:
            frame = offload.add_tag(frame, self.regs[VET], tag)
        if len(frame) < offload.LEAST_ON_WIRE and self.regs[TCTL] & _PAD:
            frame = frame.ljust(offload.LEAST_ON_WIRE, b"\0")
        self._count(frame, GPTC, GOTC, TOT, TPT, PTC64)
        if frame[0] & 1:
            self.statistics[BPTC if frame[:6] == b"\xff" * 6 else MPTC] += 1
        if not self._loops:
            self.send_all([frame])
        elif not self.listens or not self.deliver(frame):
            self.counters["rx_dropped"] += 1
        else:
            self.delivered()

    def _count(self, frame: bytes, good: int, octets: int, all_octets: int, all_: int, sizes: int) -> None:
        statistics, size = self.statistics, len(frame) + _CRC
        statistics[good] += 1
        statistics[all_] += 1
        statistics[octets] += size
        statistics[all_octets] += size
        step = next((step for step, most in enumerate(_SIZES) if size <= most), 5)
        statistics[sizes + 4 * step] += 1

    # ---- what the guest receives (3.2)

    def deliver_all(self, frames: list[bytes]) -> int:
        """Most by C: those to its own address, that fit into one buffer."""
        done = 0
        while done < len(frames):
            done += self._deliver_plain(frames[done:] if done else frames)
            if done == len(frames) or not self.deliver(frames[done]):
                break
            done += 1
        return done

    def _deliver_plain(self, frames: list[bytes]) -> int:
        regs, ring, ram = self.regs, self._ring(RDBAL), self.board.ram
        if ring is None or ram is None or not regs[RAL + 4] & _AV or regs[RAL + 4] & 3 << 16:
            return 0
        control, wanted = regs[RCTL], regs[RXCSUM]
        flags = (_STRIPS if control & _SECRC else 0) | (_CHECKS_IP if wanted & _IPOFLD else 0)
        flags |= _CHECKS_TRANSPORT if wanted & _TUOFLD else 0
        address = struct.pack("<IH", regs[RAL], regs[RAL + 4] & 0xFFFF)
        done, regs[RDH], octets, sizes = _chips.e1000_put(
            self.mapped_ram(), *ring, regs[RDH], regs[RDT], self._room, flags, regs[VET], address, frames
        )
        if done:
            statistics = self.statistics
            for at, value in ((GPRC, done), (TPR, done), (GORC, octets), (TOR, octets)):
                statistics[at] += value
            for step, value in enumerate(sizes):
                if value:
                    statistics[PRC64 + 4 * step] += value
            self.count_received(frames if done == len(frames) else frames[:done])
            free = (regs[RDT] - regs[RDH]) % ring[1]
            self._causes_met |= RXT0 | (RXDMT0 if free << 1 + (control >> 8 & 3) <= ring[1] else 0)
        return int(done)

    @property
    def _room(self) -> int:
        """Of a buffer."""
        control = self.regs[RCTL]
        room = 2048 >> (control >> 16 & 3)
        return room * 16 if control & _BSEX and room < 2048 else room

    def deliver(self, frame: bytes) -> bool:
        regs, statistics, came = self.regs, self.statistics, frame
        tag, control = None, regs[RCTL]
        if int.from_bytes(frame[12:14], "big") == regs[VET] and len(frame) >= LEAST_FRAME + 4:
            tag = int.from_bytes(frame[14:16], "big")
        if not self._accepts(frame, tag, control):
            return True
        ring = self._ring(RDBAL)
        assert ring is not None  # `listens`
        start, count = ring
        status = error = special = 0
        if tag is not None and regs[CTRL] & _VME:
            frame, status, special = frame[:12] + frame[16:], _RX_VP, tag
        if len(frame) < offload.LEAST_ON_WIRE:
            frame = frame.ljust(offload.LEAST_ON_WIRE, b"\0")
        status, error = self._checked(frame, status)
        data = frame if control & _SECRC else frame + zlib.crc32(frame).to_bytes(4, "little")
        room = self._room
        needed = -(-len(data) // room)
        head, tail = regs[RDH], regs[RDT]
        if head >= count or tail >= count or needed >= count:
            self.counters["rx_dropped"] += 1
            return True
        free = tail - head if tail >= head else tail - head + count
        if free < needed:
            return False
        ram, is_ram, spans = self.board.ram, self.board.is_ram, []
        for number in range(needed):
            at = start + 16 * head
            address = int.from_bytes(ram[at : at + 8], "little")
            part = data[number * room : (number + 1) * room]
            if is_ram(address, len(part)):
                ram[address : address + len(part)] = part
                spans.append((address, len(part)))
            else:
                self.counters["bad_dma"] += 1
            is_last = number + 1 == needed
            _RECEIVED.pack_into(
                ram, at + 8, len(part), 0, status | (_RX_EOP | _RX_DD if is_last else _RX_DD), error, special
            )
            spans.append((at + 8, 8))
            head = head + 1 if head + 1 < count else 0
        regs[RDH] = head
        self.board.wrote_all(spans)
        self._count(frame, GPRC, GORC, TOR, TPR, PRC64)
        if frame[0] & 1:
            statistics[BPRC if frame[:6] == b"\xff" * 6 else MPRC] += 1
        self.count_received([came])
        self._causes_met |= RXT0
        if (free - needed) << 1 + (control >> 8 & 3) <= count:
            self._causes_met |= RXDMT0
        return True

    def delivered(self) -> None:
        causes, self._causes_met = self._causes_met, 0
        if causes:
            self._raise(causes)

    def _accepts(self, frame: bytes, tag: int | None, control: int) -> bool:
        """The filters (3.2.1)."""
        size = len(frame) + _CRC - (4 if tag is not None else 0)
        if size > (_LONGEST if control & _LPE else 1518):
            self.counters["rx_too_long"] += 1
            return False
        regs = self.regs
        if control & _VFE and tag is not None and not regs[VFTA + (tag >> 5 & 0x7F) * 4] >> (tag & 0x1F) & 1:
            return False
        if frame[0] & 1:
            if control & _MPE or frame[:6] == b"\xff" * 6 and control & _BAM:
                return True
        elif control & _UPE:
            return True
        low, high = int.from_bytes(frame[:4], "little"), int.from_bytes(frame[4:6], "little")
        for at in range(RAL, _RAL_END, 8):
            if regs[at] == low and regs[at + 4] & 0x8000_FFFF == high | _AV:
                return True
        if not frame[0] & 1:
            return False
        index = high >> (4, 3, 2, 0)[control >> 12 & 3] & 0xFFF
        return bool(regs[MTA + 4 * (index >> 5)] >> (index & 0x1F) & 1)

    def _checked(self, frame: bytes, status: int) -> tuple[int, int]:
        """Status and errors with what checksums say (3.2.9)."""
        wanted = self.regs[RXCSUM]
        if not wanted & (_IPOFLD | _TUOFLD):
            return status | _RX_IXSM, 0
        ip, tcp = _chips.sums_found(frame)
        if ip is None or not wanted & _IPOFLD:
            return status | _RX_IXSM, 0
        status, error = status | _RX_IPCS, 0 if ip else _RX_IPE
        if tcp is not None and wanted & _TUOFLD:
            status, error = status | _RX_TCPCS, error | (0 if tcp else _RX_TCPE)
        return status, error

    # ---- life

    def reset(self) -> None:
        super().reset()
        self._cancel()
        self._power_on()

    def _cancel(self) -> None:
        for timer in self._moderating, self._resting:
            if timer is not None:
                timer.cancel()
        self._moderating = self._resting = None

    def time_shifted(self, by: int) -> None:
        self._moderated += by

    def save(self) -> E1000State:
        return E1000State(
            pci=self.save_pci(),
            mac=self.mac,
            frame=self._frame,
            link_up=self.link_up,
            registers={at: value for at, value in sorted(self.regs.items()) if value},
            statistics=dict(sorted(self.statistics.items())),
            causes=self.causes,
            mask=self.mask,
            phy=dict(sorted(self.phy.items())),
            eeprom=self.eeprom.save(),
            eecd=self._eecd,
            mdic=self.mdic,
            eerd=self.eerd,
            address=self.address,
            packet=bytes(self._packet),
            packet_head=self._packet_head,
            packet_is_bad=self._packet_is_bad,
            contexts=(bytes(self._contexts[:16]), bytes(self._contexts[16:])),
            moderated=self._moderated,
            due=None if self._moderating is None else self._moderating.when,
            rests=None if self._resting is None else self._resting.when,
        )

    def check(self, state: E1000State) -> None:
        self.check_pci(state.pci)
        self.check_card(state.mac)
        for at, value in state.registers.items():
            if at not in _PLAIN or value & ~(_PLAIN[at] | _AT_RESET.get(at, 0)):
                raise Invalid(f"{self.name}: its register {at:#x} cannot be {value:#x}")
        if any(not _STATISTICS <= at < _STATISTICS_END or at & 3 for at in state.statistics):
            raise Invalid(f"{self.name}: it has no such statistics")
        if any(at > 31 for at in state.phy) or not _PHY.keys() <= state.phy.keys():
            raise Invalid(f"{self.name}: its PHY has other registers")

    def load(self, state: E1000State) -> None:
        self._cancel()
        self.load_pci(state.pci)
        self.regs = {**dict.fromkeys(_PLAIN, 0), **state.registers}
        self.statistics = Counter(state.statistics)
        self.causes, self.mask, self.address = state.causes, state.mask, state.address
        self.phy = dict(state.phy)
        self.eeprom.load(state.eeprom)
        self._eecd, self.mdic, self.eerd = state.eecd, state.mdic, state.eerd
        self._packet, self._packet_head = bytearray(state.packet), state.packet_head
        self._packet_is_bad = state.packet_is_bad
        self._contexts[:] = b"".join(state.contexts)
        self._moderated = state.moderated
        self._causes_met = 0
        self.load_card(state.mac, state.frame, state.link_up)
        if state.due is not None:
            self._moderating = self.board.schedule(state.due, self._moderated_long_enough)
        if state.rests is not None:
            self._resting = self.board.schedule(state.rests, self._rested)
        if self.sends or self.listens:
            self.begin_carrying()
        if state.link_up != self.link_up:
            self.link_changed()

    def describe(self) -> dict[str, str]:
        ready = bool(self.regs[RCTL] & self.regs[TCTL] & _ENABLE)
        return {**super().describe(), "driver": "ready" if ready else "none"}
