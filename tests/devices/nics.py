"""What drives network cards in tests: pretended drivers, and a backend that takes all and gives what it is told to."""

from __future__ import annotations

import os
import struct
from collections import deque

from devices.fakes import FakeMachine, Guest

from vmfs.devices.machine import Pc
from vmfs.devices.network import e1000, ne2000, rtl8139
from vmfs.memory.ram import Memory

RINGS = 0x1_0000
MAC = b"\x52\x54\0\0\0\x07"


class Cable:
    """`sent`: frames that the card has sent. While it is `full` it takes none."""

    is_plugged = True
    collects = unsent = False

    def __init__(self):
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.sent = []
        self.coming = deque()
        self.full = False

    def bring(self, *frames):
        self.coming.extend(frames)
        os.eventfd_write(self.fd, 1)

    def collect(self):
        return 0

    def flush(self):
        pass

    def send_all(self, frames):
        if self.full:
            return 0
        self.sent.extend(frames)
        return len(frames)

    def receive_all(self, most):
        if self.coming:
            return [self.coming.popleft() for _ in range(min(most, len(self.coming)))]
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass
        return []

    def describe(self):
        return {"backend": "cable"}

    def close(self):
        os.close(self.fd)


class PluggedCard:
    """A card of PCI on a board of its own: CARD, whose registers are at the memory of BAR."""

    CARD: type
    BAR: int

    def __init__(self) -> None:
        self.memory = Memory(2 << 20)
        self.pc = Pc(FakeMachine(), self.memory)
        self.cable = Cable()
        self.card = self.CARD(self.pc, "net0", 4, self.cable, MAC)
        self.pc.plug(self.card)
        self.guest = Guest(self.pc)
        self.guest.config(4, 4, 0x107, size=2)
        self.base = self.card.bar(self.BAR)
        self.tail = self.seen = 0

    def close(self) -> None:
        self.pc.close()
        self.memory.close()

    def put(self, at: int, value: int, size: int = 4) -> None:
        self.guest.store(self.base + at, value, size)

    def get(self, at: int, size: int = 4) -> int:
        return self.guest.load(self.base + at, size)


def a_frame(dice, tag=None):
    """Of any kind that a card looks into, mostly to its address."""
    to = dice.choice((MAC, MAC, b"\xff" * 6, b"\1\0\x5e\0\0\1", dice.randbytes(6)))
    data = dice.randbytes(dice.choice((0, 20, 46, 200, 1480, 1500, 4000)))
    kind = dice.choice((b"\x08\0", b"\x81\0", b"\x86\xdd", b"\x08\x06"))
    if kind == b"\x08\0" and len(data) >= 20:
        protocol = dice.choice((6, 17, 1))
        data = struct.pack(">BBHHHBBH8s", 0x45, 0, len(data), 1, 0, 64, protocol, 0, dice.randbytes(8)) + data[20:]
    return to + dice.randbytes(6) + kind + data


def come(device, frame):
    """A frame arrives, as the card's thread brings it."""
    with device.board.lock:
        if device.listens:
            device.deliver_all([frame])
            device.delivered()


def drive_e1000(dice, pc, guest, device):
    """A driver's steps, most of them right; all that it read."""
    guest.config(device.slot, 4, 0x107, size=2)
    base, seen = device.bar(0), []
    if base is None:
        device.reset()
        guest.config(device.slot, 4, 0x107, size=2)
        base = device.bar(0)

    def put(at, value):
        guest.store(base + at, value)

    if dice.random() < 0.3 or not device.listens:
        size = dice.choice((128, 256, 128, 0x1000))
        for low, at in ((e1000.RDBAL, RINGS), (e1000.TDBAL, RINGS + 0x1000)):
            for offset, value in ((0, at), (4, 0), (8, size), (16, 0), (24, 0)):
                put(low + offset, value)
        for index in range(8):
            struct.pack_into("<QQ", pc.ram, RINGS + 16 * index, RINGS + 0x4000 + 0x1000 * index, 0)
        put(e1000.RAL, int.from_bytes(MAC[:4], "little"))
        put(e1000.RAL + 4, 1 << 31 | int.from_bytes(MAC[4:], "little"))
        put(e1000.RCTL, 2 | dice.choice((0x8000, 0x801C, 0x8020, 0x0404_8002, 0x0201_8020)) | dice.choice((0, 1 << 18)))
        put(e1000.TCTL, 0xA)
        put(e1000.RXCSUM, dice.choice((0, 0x300)))
        put(e1000.ITR, dice.choice((0, 0, 200)))
        put(e1000.CTRL, dice.choice((0x40, 0x4000_0040)))
        put(e1000.IMS, 0x9D)
        put(e1000.RDT, dice.randrange(8))
    for _ in range(dice.randrange(4)):
        come(device, a_frame(dice))
    tail = device.regs[e1000.TDT] % 8
    for _ in range(dice.randrange(1, 5)):
        kind = dice.random()
        if kind < 0.2:
            sizes = dice.choice((0, 100, 1460)) << 16 | dice.choice((54, 54, 20, 255)) << 8
            command = dice.choice((0x2700_0000, 0x2300_0000)) | dice.choice((3000, 0))
            row = struct.pack("<IIII", 0x0021_180E, 0x3222, command, sizes)
        else:
            length, flags = dice.choice((60, 54, 1514, 3000, 0xF_FFFF)), dice.choice((0x0B, 0x0B, 0x08, 0x4B, 0x0F, 0))
            if kind < 0.6:
                row = struct.pack(
                    "<QII", RINGS + 0x8000, length & 0xFFFF | flags << 24, dice.getrandbits(32) & 0xFFFF_FF00
                )
            else:
                low = length | 0x0010_0000 | (flags | 0x20) << 24
                row = struct.pack(
                    "<QII", dice.choice((RINGS + 0x8000, RINGS + 0x8000, 1 << 40)), low, dice.randrange(4) << 8
                )
        pc.ram[RINGS + 0x1000 + 16 * tail : RINGS + 0x1010 + 16 * tail] = row
        tail = (tail + 1) % 8
    pc.ram[RINGS + 0x8000 : RINGS + 0x8100] = a_frame(dice).ljust(256, b"\0")[:256]
    put(e1000.TDT, tail)
    put(e1000.RDT, dice.randrange(9))
    for at in (e1000.ICR, e1000.STATUS, e1000.TDH, e1000.RDH, e1000.GPRC, e1000.EECD, e1000.MDIC):
        if dice.random() < 0.3:
            seen.append(guest.load(base + at))
    if dice.random() < 0.2:
        put(
            e1000.MDIC,
            dice.choice((0x0800_0000, 0x0400_0000)) | 1 << 21 | dice.randrange(32) << 16 | dice.getrandbits(16),
        )
    if dice.random() < 0.3:
        put(e1000.EECD, dice.getrandbits(3) | 0x40)
    return seen


def drive_rtl8139(dice, pc, guest, device):
    guest.config(device.slot, 4, 0x107, size=2)
    base, seen = device.bar(1), []
    if base is None:
        device.reset()
        guest.config(device.slot, 4, 0x107, size=2)
        base = device.bar(1)
    if dice.random() < 0.3 or not device.listens:
        guest.store(base + rtl8139.CR, 0x10, 1)
        guest.store(base + rtl8139.RBSTART, dice.choice((RINGS, RINGS, 1 << 31)))
        guest.store(base + rtl8139.CR, 0x0C, 1)
        guest.store(base + rtl8139.RCR, dice.choice((0x0F, 0x0E, 0x8F, 0x180F)))
        guest.store(base + rtl8139.IMR, 0xC07F, 2)
        guest.store(base + rtl8139.TCR, dice.choice((0x0600, 0x0600, 0x6_0600)))
    for _ in range(dice.randrange(4)):
        come(device, a_frame(dice))
    pc.ram[RINGS + 0x8000 : RINGS + 0x8100] = a_frame(dice).ljust(256, b"\0")[:256]
    for _ in range(dice.randrange(3)):
        number = dice.randrange(4)
        guest.store(base + rtl8139.TSAD + 4 * number, dice.choice((RINGS + 0x8000, RINGS + 0x8000, 1 << 31)))
        guest.store(base + rtl8139.TSD + 4 * number, dice.choice((60, 256, 1514, 0x1FFF, 0x2000)))
    for at in (rtl8139.CR, rtl8139.CAPR, rtl8139.CBR, rtl8139.ISR, rtl8139.MSR, rtl8139.TSADS, rtl8139.BMSR):
        if dice.random() < 0.3:
            seen.append(guest.load(base + at, dice.choice((1, 2))))
    guest.store(base + rtl8139.CAPR, dice.choice((device._write - 16 & 0xFFFF, dice.getrandbits(13))), 2)
    guest.store(base + rtl8139.ISR, dice.getrandbits(16), 2)
    if dice.random() < 0.3:
        guest.store(base + rtl8139.EEPROM, dice.getrandbits(4) | dice.choice((0x80, 0x80, 0xC0, 0)), 1)
    if dice.random() < 0.2:
        guest.store(base + rtl8139.TIMER, dice.choice((0, 33_000)))
        guest.store(base + rtl8139.TCTR, 0)
    return seen


def drive_ne2000(dice, pc, guest, device):
    base, seen = ne2000.ISA_BASE, []
    if isinstance(device, ne2000.Ne2000Pci):
        guest.config(device.slot, 4, 0x107, size=2)
        base = device.bar(0)
        if base is None:
            device.reset()
            guest.config(device.slot, 4, 0x107, size=2)
            base = device.bar(0)

    def out(*pairs):
        for at, value in pairs:
            guest.out(base + at, value)

    if dice.random() < 0.3 or not device.listens:
        out(
            (0, 0x21),
            (14, dice.choice((0x48, 0x49))),
            (1, 0x46),
            (2, 0x80),
            (3, 0x46),
            (4, 0x40),
            (12, 0x1E),
            (15, 0x7F),
        )
        out((13, dice.choice((0, 0, 2))), (0, 0x61), (7, dice.choice((0x47, 0x47, 0))))
        out(*((1 + at, byte) for at, byte in enumerate(MAC)), (0, 0x22))
    for _ in range(dice.randrange(4)):
        come(device, a_frame(dice))
    length, at = dice.choice((0, 4, 60, 256)), dice.choice((0, 0x4000, 0x4600, 0x7F80, 0x9000))
    out(
        (8, at & 0xFF), (9, at >> 8), (10, length & 0xFF), (11, length >> 8), (0, dice.choice((0x0A, 0x12, 0x1A, 0x22)))
    )
    for _ in range(dice.choice((0, length // 2, length))):
        size = dice.choice((1, 2, 2, 4))
        if dice.random() < 0.5:
            seen.append(guest.inp(base + 16, size))
        else:
            guest.out(base + 16, dice.getrandbits(8 * size), size)
    if dice.random() < 0.5:
        out((4, dice.choice((0x40, 0x40, 0x7F, 0))), (5, dice.choice((60, 255))), (6, dice.choice((0, 3))), (0, 0x26))
    seen += [guest.inp(base + at) for at in range(16)]
    out((7, dice.getrandbits(8)), (3, dice.choice((0x46, 0x50, device._page1[7] or 0x46))))
    if dice.random() < 0.05:
        seen.append(guest.inp(base + 31))
    return seen
