"""The RTL8139 and the NE2000s, by their registers."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import zlib

import pytest
from devices.fakes import FakeMachine, Guest, pass_time
from devices.nics import MAC, Cable, come
from mounting import wait_until

from vmfs.devices import _chips
from vmfs.devices.machine import Pc
from vmfs.devices.network import ne2000, offload, rtl8139
from vmfs.devices.network.backends import Passt
from vmfs.devices.network.ne2000 import Ne2000, Ne2000Pci
from vmfs.devices.network.rtl8139 import Rtl8139
from vmfs.memory.ram import Memory

scapy = pytest.importorskip("scapy.all", reason="scapy is not installed (make setup)")

RING, DATA = 0x1_0000, 0x8_0000
FROM = b"\x52\x54\0\0\0\x09"
FRAME = MAC + FROM + b"\x88\xb5" + bytes(range(90))
ROOM = 4 + len(FRAME) + 4  # that it takes in an RTL8139's ring


class Nic:
    def __init__(self, make) -> None:
        self.memory = Memory(2 << 20)
        self.pc = Pc(FakeMachine(), self.memory)
        self.cable = Cable()
        self.card = make(self.pc, self.cable)
        self.pc.plug(self.card)
        self.guest = Guest(self.pc)
        if self.card.TYPE != "ne2000":
            self.guest.config(4, 4, 0x107, size=2)
        self.base = ne2000.ISA_BASE if self.card.TYPE == "ne2000" else self.card.bar(0)

    def out(self, at: int, value: int, size: int = 1) -> None:
        self.guest.out(self.base + at, value, size)

    def inp(self, at: int, size: int = 1) -> int:
        return self.guest.inp(self.base + at, size)

    @property
    def line(self) -> bool:
        return self.pc.machine.lines.get(self.card.irq, False)

    def close(self) -> None:
        self.pc.close()
        self.memory.close()


# ---- RTL8139


@pytest.fixture
def realtek():
    one = Nic(lambda pc, cable: Rtl8139(pc, "net0", 4, cable, MAC))
    one.out(rtl8139.CR, 0x10)
    one.out(rtl8139.RBSTART, RING, 4)
    one.out(rtl8139.CR, 0x0C)
    one.out(rtl8139.RCR, 0x0E, 4)
    one.out(rtl8139.IMR, 0xC07F, 2)
    yield one
    one.close()


def test_realtek_is_what_a_driver_finds(realtek) -> None:
    assert realtek.guest.config(4, 0) == 0x8139_10EC and realtek.guest.config(4, 8) & 0xFF == 0x20
    assert bytes(realtek.inp(at) for at in range(6)) == MAC
    assert realtek.inp(rtl8139.TCR, 4) & 0x7CC0_0000 == 0x7480_0000 and realtek.inp(rtl8139.CR) == 0x0D

    def word(index: int) -> int:
        """Microwire, as 9346CR has it."""
        value = 0
        for bit in f"110{index:06b}":
            for clock in 0, 4:
                realtek.out(rtl8139.EEPROM, 0x88 | 2 * int(bit) | clock)
        for _ in range(16):
            realtek.out(rtl8139.EEPROM, 0x88)
            realtek.out(rtl8139.EEPROM, 0x8C)
            value = value << 1 | realtek.inp(rtl8139.EEPROM) & 1
        realtek.out(rtl8139.EEPROM, 0)
        return value

    assert word(0) == 0x8129 and struct.pack("<3H", word(7), word(8), word(9)) == MAC
    realtek.out(0, 0xAA)
    assert realtek.inp(0) == MAC[0]  # the lock
    realtek.out(rtl8139.EEPROM, 0xC0)
    realtek.out(0, 0xAA)
    assert realtek.inp(0) == 0xAA


def test_realtek_sends(realtek) -> None:
    realtek.pc.ram[DATA : DATA + len(FRAME)] = FRAME
    for number in range(4):
        realtek.out(rtl8139.TSAD + 4 * number, DATA, 4)
        realtek.out(rtl8139.TSD + 4 * number, 60 + number, 4)
    assert [len(frame) for frame in realtek.cable.sent] == [60, 61, 62, 63]
    assert realtek.inp(rtl8139.TSD, 4) & 0xA000 == 0xA000 and realtek.inp(rtl8139.TSADS, 2) == 0xF00F
    assert realtek.line and realtek.inp(rtl8139.ISR, 2) == rtl8139.TOK
    realtek.out(rtl8139.ISR, rtl8139.TOK, 2)
    assert not realtek.line
    for address, length in ((1 << 31, 60), (DATA, 1793)):
        realtek.out(rtl8139.TSAD, address, 4)
        realtek.out(rtl8139.TSD, length, 4)
        assert realtek.inp(rtl8139.TSD, 4) & 0x4000_2000 == 0x4000_2000
    assert realtek.inp(rtl8139.ISR, 2) == rtl8139.TER and len(realtek.cable.sent) == 4


def test_realtek_receives_round_its_ring(realtek) -> None:
    """Each packet as it is, whether it goes over the ring's end or past it."""
    for wrap in 0x0E, 0x8E:
        realtek.out(rtl8139.RCR, wrap, 4)
        read = realtek.card._write
        for _ in range(200):
            come(realtek.card, FRAME)
            ring = bytes(realtek.pc.ram[RING : RING + 8192 + 2048])
            got = ring[read : read + 4 + len(FRAME) + 4]
            if wrap == 0x0E and read + len(got) > 8192:
                got = ring[read:8192] + ring[: read + len(got) - 8192]
            assert got == struct.pack("<HH", 0x4001, len(FRAME) + 4) + FRAME + zlib.crc32(FRAME).to_bytes(4, "little")
            read = (read + 4 + len(FRAME) + 4 + 3 & ~3) % 8192
            assert realtek.inp(rtl8139.CBR, 2) == read and not realtek.inp(rtl8139.CR) & 1
            realtek.out(rtl8139.CAPR, read - 16 & 0xFFFF, 2)
            assert realtek.inp(rtl8139.CR) & 1


def test_realtek_without_room_holds_back(realtek) -> None:
    with realtek.pc.lock:
        taken = 0
        while realtek.card.deliver(FRAME):
            taken += 1
    assert taken == (8192 - 1) // ROOM
    realtek.out(rtl8139.ISR, 0xFFFF, 2)
    come(realtek.card, FRAME)
    assert realtek.inp(rtl8139.ISR, 2) == rtl8139.ROK  # again, as one waits
    realtek.out(rtl8139.CAPR, ROOM - 16 & 0xFFFF, 2)
    with realtek.pc.lock:
        assert realtek.card.deliver(FRAME) and not realtek.card.deliver(FRAME)


def test_a_held_back_frame_is_told_again_until_it_is_taken(realtek) -> None:
    """The driver has cleared the interrupt of packets that it has not looked at."""
    realtek.out(rtl8139.CAPR, 16 * 16 - 16, 2)  # room for two
    realtek.cable.bring(*[FRAME] * 4)
    wait_until(lambda: realtek.card._starved, "the ring is full")
    for _ in range(3):
        realtek.out(rtl8139.ISR, 0xFFFF, 2)
        wait_until(lambda: realtek.line, "told again")
    realtek.out(rtl8139.CAPR, 2 * ROOM - 16, 2)
    wait_until(lambda: realtek.card.counters["rx_frames"] == 4, "all have come")


def test_realteks_filters(realtek) -> None:
    group = b"\1\0\x5e\0\0\1"
    for control, to, head in ((0, MAC, 0), (2, MAC, 0x4001), (2, FROM, 0), (1, FROM, 1), (8, b"\xff" * 6, 0x2001),
                              (2, b"\xff" * 6, 0), (4, group, 0)):  # fmt: skip
        realtek.out(rtl8139.RCR, control, 4)
        at = realtek.card._write
        come(realtek.card, to + FRAME[6:])
        assert (realtek.card._write != at) == bool(head), (control, to)
        if head:
            assert int.from_bytes(realtek.pc.ram[RING + at : RING + at + 2], "little") == head
    realtek.out(rtl8139.RCR, 4, 4)
    for at in range(8):
        realtek.out(rtl8139.MAR + at, 0xFF)
    at = realtek.card._write
    come(realtek.card, group + FRAME[6:])
    assert realtek.card._write != at


def test_realteks_timer(realtek) -> None:
    realtek.out(rtl8139.TCTR, 0, 4)
    realtek.out(rtl8139.TIMER, 33_000, 4)
    pass_time(realtek.pc, 999_000)
    assert not realtek.line and realtek.inp(rtl8139.TCTR, 4) == 999 * 33
    pass_time(realtek.pc, 1_001_000)
    assert realtek.line and realtek.inp(rtl8139.ISR, 2) == rtl8139.TIMEOUT


# ---- NE2000


@pytest.fixture(params=[Ne2000, Ne2000Pci], ids=["isa", "pci"])
def novell(request):
    kind = request.param
    one = Nic(lambda pc, cable: kind(pc, "net0", *([4] if kind is Ne2000Pci else []), cable, MAC))
    for at, value in ((0, 0x21), (14, 0x49), (10, 0), (11, 0), (12, 0x20), (13, 2), (1, 0x46), (2, 0x80), (3, 0x46)):
        one.out(at, value)
    for at, value in ((7, 0xFF), (15, 0x7F), (0, 0x61), *enumerate(MAC, 1), (7, 0x46)):
        one.out(at, value)
    for at, value in ((0, 0x22), (13, 0), (12, 4)):
        one.out(at, value)
    yield one
    one.close()


def remote(novell, address: int, length: int, data: bytes = b"") -> bytes:
    """Remote DMA, by words."""
    for at, value in ((8, address & 0xFF), (9, address >> 8), (10, length & 0xFF), (11, length >> 8)):
        novell.out(at, value)
    novell.out(0, 0x12 if data else 0x0A)
    got = b""
    for at in range(0, length, 2):
        if data:
            novell.out(16, int.from_bytes(data[at : at + 2], "little"), 2)
        else:
            got += novell.inp(16, 2).to_bytes(2, "little")
    assert novell.inp(7) & 0x40
    novell.out(7, 0x40)
    return got


def test_novells_memory(novell) -> None:
    assert remote(novell, 0, 12)[::2] == MAC and remote(novell, 28, 4) == b"WWWW"
    remote(novell, 0x4000, 100, bytes(range(100)))
    assert remote(novell, 0x4000, 100) == bytes(range(100))
    remote(novell, 0x3FFE, 4, b"abcd")
    assert remote(novell, 0x4000, 2) == b"cd" and remote(novell, 0x3000, 2) == b"\xff\xff"
    novell.inp(0x1F)
    assert novell.inp(7) == 0x80 and novell.inp(0) & 1


@pytest.mark.parametrize("size, words", [(1, False), (2, True), (4, True)])
def test_novells_data_port(novell, size: int, words: bool) -> None:
    """Over the ring's end, and over the memory's, whatever takes the access."""
    data = bytes(range(1, 241))
    novell.out(14, 0x49 if words else 0x48)
    novell.out(2, 0x7F)  # PSTOP
    for start in 0x7F00 - 120, 0x8000 - 120, 0x4000 - 120:
        for command in 0x12, 0x0A:
            for at, value in ((8, start & 0xFF), (9, start >> 8), (10, len(data)), (11, 0), (0, command)):
                novell.out(at, value)
            got = b""
            for at in range(0, len(data), size):
                assert not novell.inp(7) & 0x40
                if command == 0x12:
                    novell.out(16, int.from_bytes(data[at : at + size], "little"), size)
                else:
                    got += novell.inp(16, size).to_bytes(size, "little")
            assert novell.inp(7) & 0x40
            novell.out(7, 0x40)
        memory = novell.card.save_chip().ram
        if start < 0x4000:
            assert got[120:] == data[120:] == memory[:120]
        elif start < 0x7F00:
            assert got == data and memory[start - 0x4000 :][:120] + memory[0x600:][:120] == data
        else:
            assert got[:120] == data[:120] == memory[-120:] and got[120:] == b"\xff" * 120


def test_novell_sends(novell) -> None:
    remote(novell, 0x4000, len(FRAME), FRAME)
    for at, value in ((4, 0x40), (5, len(FRAME)), (6, 0), (0, 0x26)):
        novell.out(at, value)
    assert novell.cable.sent == [FRAME] and novell.line and novell.inp(7) == 2 and novell.inp(4) == 1
    assert not novell.inp(0) & 4
    novell.out(7, 2)
    assert not novell.line
    for page, high in ((0x10, 0), (0x7F, 2)):
        for at, value in ((4, page), (6, high), (0, 0x26)):
            novell.out(at, value)
        assert novell.inp(7) & 8
    assert len(novell.cable.sent) == 1


def test_novell_receives_round_its_ring(novell) -> None:
    page = 0x46
    long = MAC + FROM + b"\x88\xb5" + bytes(range(250)) * 6
    for number in range(60):
        frame = long[: 60 + 20 * number]
        come(novell.card, frame)
        assert novell.inp(7) & 1
        novell.out(7, 1)
        status, after, length = struct.unpack("<BBH", remote(novell, page << 8, 4))
        assert (status, length) == (1, len(frame) + 4)
        got = remote(novell, (page << 8) + 4, length + (length & 1))
        assert got[:length] == frame + zlib.crc32(frame).to_bytes(4, "little")
        assert 0x46 <= after < 0x80 and after == 0x46 + (page - 0x46 + -(-(length + 4) // 256)) % 0x3A
        page = after
        novell.out(3, page)
        pass_time(novell.pc, (number + 1) * 10_000_000)


def fill(novell) -> int:
    """Frames until it takes no more; how many."""
    taken = 0
    with novell.pc.lock:
        while novell.card.deliver(FRAME):
            taken += 1
        novell.card.delivered()
    return taken


def test_novell_without_room_holds_back(novell) -> None:
    assert fill(novell) == 0x39
    novell.out(7, 0xFF)
    come(novell.card, FRAME)
    assert not novell.inp(7)  # or a driver that is just reading goes on and on
    for again in 10_000_001, 20_000_002:
        pass_time(novell.pc, again)
        assert novell.inp(7) == 1 and novell.line  # the driver may have cleared what it has not looked at
        novell.out(7, 0xFF)
    novell.out(15, 0)
    novell.out(3, 0x47)
    assert fill(novell) == 1  # a driver without interrupts may have more at once


def test_novell_lets_its_driver_out_of_the_interrupt(novell) -> None:
    """Linux reads on while packets come, and did nothing else while they came faster than on such a wire."""
    with novell.pc.lock:
        assert novell.card.deliver_all([FRAME] * 3) == 3
        novell.card.delivered()
    assert novell.line
    for boundary in 0x47, 0x48, 0x49:
        assert fill(novell) == 0  # until all is read
        novell.out(3, boundary)
    novell.out(7, 0xFF)
    on_wire = 3 * (len(FRAME) + 4) * 800
    pass_time(novell.pc, on_wire - 1)
    assert fill(novell) == 0 and not novell.line  # and the wire has rested as long as they took
    pass_time(novell.pc, on_wire)
    assert fill(novell) > 1 and novell.line


def test_novells_filters(novell) -> None:
    def comes(to: bytes) -> bool:
        novell.out(0, 0x62)
        before = novell.inp(7)
        come(novell.card, to + FRAME[6:])
        after = novell.inp(7)
        novell.out(0, 0x22)
        return before != after

    group = b"\1\0\x5e\0\0\1"
    novell.out(15, 0)
    for control, to, wanted in ((0, MAC, True), (0, FROM, False), (0x10, FROM, True), (0, b"\xff" * 6, False),
                                (4, b"\xff" * 6, True), (8, group, False), (0x24, MAC, False)):  # fmt: skip
        novell.out(12, control)
        assert comes(to) == wanted, (control, to)
    novell.out(12, 8)
    novell.out(0, 0x62)
    for at in range(8, 16):
        novell.out(at, 0xFF)
    assert comes(group)


# ---- windows of slow cards


def test_a_connection_begins_without_a_window_scale() -> None:
    for ip in scapy.IP(src="10.0.0.1", dst="10.0.0.2"), scapy.IPv6(src="fd00::1", dst="fd00::2"):
        options = [("MSS", 1460), ("SAckOK", b""), ("NOP", None), ("WScale", 7), ("EOL", None)]
        for flags, changes in (("S", True), ("SA", False), ("A", False), ("SEC", True)):
            packet = scapy.Ether(src=MAC, dst=FROM) / ip / scapy.TCP(sport=1, dport=2, flags=flags, options=options)
            frame = bytes(packet)
            got = offload.without_scale(frame)
            assert (got != frame) == changes and len(got) == len(frame)
            assert b"\3\3\7" in frame and (b"\3\3\7" in got) != changes
            if changes:
                again = scapy.Ether(got)
                del again[scapy.TCP].chksum
                assert bytes(again) == got and ("WScale", 7) not in scapy.Ether(got)[scapy.TCP].options
                assert offload.without_scale(got) == got
            for cut in range(len(frame)):
                assert offload.without_scale(frame[:cut]) == frame[:cut]
    dice = random.Random(2)
    frame = bytes(scapy.Ether(src=MAC, dst=FROM) / scapy.IP() / scapy.TCP(flags="S", options=[("WScale", 7)] * 3))
    for _ in range(3000):
        wrong = bytearray(frame)
        wrong[dice.randrange(12, len(wrong))] = dice.getrandbits(8)
        assert len(offload.without_scale(bytes(wrong))) == len(frame)


@pytest.mark.parametrize("ip", ["IP", "IPv6"])
def test_passt_gets_the_begin_of_a_connection_once(ip: str) -> None:
    """It resets a connection whose first frame comes again."""

    def frame(sequence: int, flags: str = "S", port: int = 5000) -> bytes:
        there = scapy.IP(dst="10.0.0.2") if ip == "IP" else scapy.IPv6(dst="fd00::2")
        tcp = scapy.TCP(sport=port, dport=80, seq=sequence, flags=flags)
        return bytes(scapy.Ether(src=MAC, dst=FROM) / there / tcp)

    ours, its = socket.socketpair()
    its.setblocking(False)
    passt = Passt(ours.detach(), 0)

    def sent(*frames: bytes) -> list[bytes]:
        left, data = list(frames), bytearray()
        while left:
            left = left[passt.send_all(left) :]
            with contextlib.suppress(BlockingIOError):
                data += its.recv(1 << 16)
        return _chips.split(data, len(data))[0]

    try:
        first, data, other = frame(1), frame(2, "A"), frame(7)
        assert sent(data, first, data, first, data) == [data, first, data, data]
        assert sent(first) == [] and sent(other, other, data) == [other, data]
        assert sent(frame(1, port=5001), first) == [frame(1, port=5001)]
        frames = [frame(number) for number in range(10_000, 11_024)]
        assert sent(*frames) == frames
        assert sent(first) == [first]  # it remembers the last 1024
    finally:
        passt.close()
        its.close()
