"""The RTL8139C+'s rings of descriptors. What it makes of frames is checked by scapy."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
from devices.fakes import pass_time
from devices.nics import MAC, PluggedCard, a_frame, come
from devices.test_e1000 import FROM, a_segment, right
from mounting import wait_until

from vmfs.devices.network import rtl8139
from vmfs.devices.network.rtl8139 import Rtl8139

scapy = pytest.importorskip("scapy.all", reason="scapy is not installed (make setup)")

TX, HIGH, RX, DATA, BUFFERS = 0x1_0000, 0x1_1000, 0x1_2000, 0x2_0000, 0x8_0000
OWN, EOR, FS, LS, LGSEN, IPCS, UDPCS, TCPCS, TES = (1 << bit for bit in (31, 30, 29, 28, 27, 18, 17, 16, 23))
WHOLE = FS | LS
COUNT, ROOM = 8, 1536


class Nic(PluggedCard):
    CARD, BAR = Rtl8139, 1

    def get(self, at: int, size: int = 2) -> int:
        return super().get(at, size)

    def begin(self, plus: int = 0x23, control: int = 0x0E, room: int = ROOM) -> None:
        """As Linux's driver does."""
        self.put(rtl8139.CR, 0x10, 1)
        self.put(rtl8139.CPCR, plus, 2)
        for register, ring in ((rtl8139.TNPDS, TX), (rtl8139.THPDS, HIGH), (rtl8139.RDSAR, RX)):
            self.put(register, ring)
            self.put(register + 4, 0)
        self.pc.ram[TX : RX + 0x1000] = bytes(RX + 0x1000 - TX)
        self.tail = self.seen = 0
        for index in range(COUNT):
            self.give(index, room)
        self.put(rtl8139.CR, 0x0C, 1)
        self.put(rtl8139.RCR, control)
        self.put(rtl8139.IMR, 0xE1FF, 2)

    def give(self, index: int, room: int = ROOM) -> None:
        """A descriptor to receive into."""
        command = OWN | (EOR if index == COUNT - 1 else 0) | room
        struct.pack_into("<IIQ", self.pc.ram, RX + 16 * index, command, 0, BUFFERS + 0x1000 * index)

    def queue(self, frame: bytes, command: int = WHOLE, tag: int = 0, ring: int = TX, at: int = DATA) -> int:
        """A descriptor to send; where it is."""
        self.pc.ram[at : at + len(frame)] = frame
        place = ring + 16 * self.tail
        end = EOR if self.tail == COUNT - 1 else 0
        struct.pack_into("<IIQ", self.pc.ram, place, OWN | end | command | len(frame), tag, at)
        self.tail = (self.tail + 1) % COUNT
        return place

    def send(self, *args, poll: int = 0x40, **more) -> list[bytes]:
        before = len(self.cable.sent)
        self.queue(*args, **more)
        self.put(rtl8139.TPPOLL, poll, 1)
        return self.cable.sent[before:]

    def word(self, at: int) -> int:
        return int.from_bytes(self.pc.ram[at : at + 4], "little")

    def received(self) -> list[tuple[bytes, int, int]]:
        """Frames with their status and tag; the descriptors stay the driver's."""
        found = []
        while not self.word(RX + 16 * self.seen) & OWN and self.word(RX + 16 * self.seen):
            data, status = b"", 0
            while not status & LS:
                status, tag, at = struct.unpack_from("<IIQ", self.pc.ram, RX + 16 * self.seen)
                whole = status & 0x1FFF
                data += bytes(self.pc.ram[at : at + (whole - len(data) if status & LS else ROOM)])
                self.pc.ram[RX + 16 * self.seen : RX + 16 * self.seen + 4] = bytes(4)
                self.seen = (self.seen + 1) % COUNT
            assert data[-4:] == zlib.crc32(data[:-4]).to_bytes(4, "little")
            found.append((data[:-4], status, tag))
        return found


@pytest.fixture
def nic():
    one = Nic()
    yield one
    one.close()


def a_datagram(payload: bytes):
    ip = scapy.Ether(src=MAC, dst=FROM) / scapy.IP(src="10.0.0.1", dst="10.0.0.2")
    return ip / scapy.UDP(sport=1, dport=2) / payload


def without_sums(packet) -> bytes:
    packet = packet.copy()
    for layer in scapy.IP, scapy.TCP, scapy.UDP:
        if layer in packet:
            packet[layer].chksum = 0x1234
    return bytes(packet)


def test_what_is_sent(nic) -> None:
    nic.begin()
    frame = MAC + FROM + b"\x88\xb5" + bytes(range(100))
    assert nic.send(frame) == [frame] and nic.word(TX) == WHOLE
    assert nic.send(frame[:30]) == [frame[:30].ljust(60, b"\0")]
    nic.queue(frame[:20], FS)
    nic.queue(frame[20:20], 0, at=DATA + 0x1000)
    assert nic.send(frame[20:], LS, at=DATA + 0x2000) == [frame]
    for number in range(20):  # round the ring
        assert nic.send(bytes(60 + number)) == [bytes(60 + number)]
    assert nic.card.counters["tx_frames"] == 23 and not nic.card.counters["tx_bad"]


def test_a_packet_is_sent_when_all_of_it_is_there(nic) -> None:
    nic.begin()
    first = nic.queue(bytes(20), FS)
    assert nic.send(bytes(40), LS, at=DATA + 0x1000, poll=0) == []
    nic.pc.ram[first + 19] = 0x10  # the last is the driver's yet
    nic.put(rtl8139.TPPOLL, 0x40, 1)
    assert nic.cable.sent == [] and nic.word(first) & OWN
    nic.pc.ram[first + 19] = 0x90
    nic.put(rtl8139.TPPOLL, 0x40, 1)
    assert nic.cable.sent == [bytes(60)] and not nic.word(first) & OWN


def test_the_ring_of_high_priority_is_the_first(nic) -> None:
    nic.begin()
    nic.queue(bytes(60))
    nic.tail = 0
    assert nic.send(b"\2" * 60, ring=HIGH, at=DATA + 0x1000, poll=0) == []
    nic.put(rtl8139.TPPOLL, 0xC0, 1)
    assert nic.cable.sent == [b"\2" * 60, bytes(60)]


@pytest.mark.parametrize("make", [a_segment, a_datagram])
def test_checksums_are_put_in(nic, make) -> None:
    nic.begin()
    packet = make(b"some text")
    frame = without_sums(packet)
    assert nic.send(frame, WHOLE | IPCS | UDPCS | TCPCS) == [right(bytes(packet)).ljust(60, b"\0")]
    assert nic.send(frame) == [frame.ljust(60, b"\0")]


def test_a_long_segment_is_cut_and_tagged(nic) -> None:
    nic.begin()
    payload = random.Random(1).randbytes(4000)
    tag = int.from_bytes((0x2005).to_bytes(2, "big"), "little")
    sent = nic.send(without_sums(a_segment(payload)), WHOLE | LGSEN | 1460 << 16, 1 << 17 | tag)
    assert [frame[12:16] for frame in sent] == [b"\x81\0\x20\x05"] * 3
    plain = [frame[:12] + frame[16:] for frame in sent]
    assert plain == [right(frame) for frame in plain]
    assert b"".join(bytes(scapy.Ether(frame)[scapy.TCP].payload) for frame in plain) == payload
    assert [len(frame) - 54 for frame in plain] == [1460, 1460, 1080]


def test_what_drivers_must_not_send(nic) -> None:
    nic.begin()
    frame = bytes(a_segment(bytes(2000)))
    arp = MAC + FROM + b"\x08\x06" + bytes(60)
    cut = WHOLE | LGSEN
    for bad, command in ((frame, cut | 63 << 16), (arp, cut | 1460 << 16), (frame, LS), (b"short", WHOLE)):
        place = TX + 16 * nic.tail
        assert nic.send(bad, command) == [] and nic.word(place) & (OWN | TES) == TES
    place = nic.queue(frame)
    struct.pack_into("<Q", nic.pc.ram, place + 8, 1 << 40)
    nic.put(rtl8139.TPPOLL, 0x40, 1)
    assert nic.cable.sent == [] and nic.card.counters["tx_bad"] == 5
    assert nic.send(frame[:100]) == [frame[:100]]
    # All descriptors without an end: the chip takes all, once.
    nic.begin()
    nic.pc.ram[TX : TX + 1024] = struct.pack("<IIQ", OWN | 60, 0, DATA) * 64
    nic.put(rtl8139.TPPOLL, 0x40, 1)
    assert nic.cable.sent[1:] == [] and not any(nic.word(TX + 16 * index) & OWN for index in range(64))


def test_a_ring_elsewhere_than_in_ram(nic) -> None:
    nic.begin()
    for register in rtl8139.TNPDS, rtl8139.RDSAR:
        nic.put(register + 4, 1)
    nic.put(rtl8139.TPPOLL, 0xC0, 1)
    come(nic.card, MAC + FROM + bytes(60))
    assert nic.cable.sent == [] and nic.received() == []


def test_a_full_backend_holds_the_guest_back(nic) -> None:
    nic.begin()
    nic.cable.full = True
    nic.queue(bytes(60))
    assert nic.send(bytes(61)) == [] and nic.send(bytes(62)) == []
    assert nic.word(TX + 32) & OWN
    nic.cable.full = False
    wait_until(lambda: len(nic.cable.sent) == 3, "its thread sends on")


def test_the_driver_hears_of_what_was_sent_together(nic) -> None:
    nic.begin()
    for _ in range(3):
        nic.send(bytes(1000))
        assert not nic.get(rtl8139.ISR)
    pass_time(nic.pc, nic.pc.machine.time + 100_000)
    assert nic.get(rtl8139.ISR) == rtl8139.TOK | rtl8139.TDU and nic.card.counters["interrupts"] == 1
    nic.put(rtl8139.TPPOLL, 1, 1)
    assert nic.get(rtl8139.ISR) & rtl8139.SWINT


def test_frames_come_in(nic) -> None:
    nic.begin()
    frame = MAC + FROM + b"\x88\xb5" + bytes(range(100))
    for one, bits in ((frame, 1 << 25), (b"\xff" * 6 + frame[6:], 1 << 24), (MAC + FROM + b"\x08\0", 1 << 25)):
        come(nic.card, one)
        [(data, status, _)] = nic.received()
        assert data == one.ljust(60, b"\0") and status & ~EOR == WHOLE | bits | len(data) + 4
    come(nic.card, FROM + MAC + bytes(60))  # to another
    assert nic.received() == [] and nic.get(rtl8139.ISR) & rtl8139.ROK
    assert nic.card.counters["rx_frames"] == 3


def test_a_long_frame_takes_several(nic) -> None:
    nic.begin()
    frame = MAC + FROM + b"\x88\xb5" + random.Random(2).randbytes(4000)
    come(nic.card, frame)
    [(data, *_)] = nic.received()
    assert data == frame and nic.seen == 3
    come(nic.card, MAC + FROM + bytes(9000))
    assert nic.received() == [] and nic.card.counters["bad_dma"] == 1


def test_checksums_and_tags_of_what_comes(nic) -> None:
    nic.begin(0x63)
    to_it = {"src": FROM, "dst": MAC}
    ip = scapy.Ether(**to_it) / scapy.IP(src="10.0.0.2", dst="10.0.0.1")
    cases = (
        (bytes(ip / scapy.TCP() / bytes(20)), 1 << 16),
        (bytes(ip / scapy.TCP(chksum=7) / bytes(20)), 1 << 16 | 1 << 13),
        (bytes(ip / scapy.UDP() / bytes(20)), 2 << 16),
        (bytes(ip / scapy.UDP(chksum=7) / bytes(20)), 2 << 16 | 1 << 14),
        (bytes(scapy.Ether(**to_it) / scapy.IP(chksum=7) / scapy.ICMP() / bytes(30)), 3 << 16 | 1 << 15),
        (bytes(scapy.Ether(**to_it) / scapy.ARP()), 0),
    )
    for frame, kind in cases:
        come(nic.card, frame)
        [(_, status, tag)] = nic.received()
        assert status >> 13 & 0x1F == kind >> 13 and not tag
        nic.give((nic.seen - 1) % COUNT)
    come(nic.card, MAC + FROM + b"\x81\0\x20\x05" + bytes(80))
    [(data, _, tag)] = nic.received()
    assert data == MAC + FROM + bytes(80) and tag == 1 << 16 | 0x0520


def test_a_ring_without_room_holds_back(nic) -> None:
    nic.begin()
    frames = [MAC + FROM + b"\x88\xb5" + bytes((number,)) * 60 for number in range(COUNT + 3)]
    nic.cable.bring(*frames)
    wait_until(lambda: nic.card.counters["rx_frames"] == COUNT, "the ring is full")
    assert [data for data, *_ in nic.received()] == frames[:COUNT]
    assert nic.get(rtl8139.ISR) & rtl8139.RDU
    for index in range(COUNT):
        nic.give(index)
    nic.put(rtl8139.ISR, 0xFFFF, 2)
    wait_until(lambda: nic.card.counters["rx_frames"] == COUNT + 3, "the others")
    assert [data for data, *_ in nic.received()] == frames[COUNT:]


def test_the_tally(nic) -> None:
    nic.begin()
    nic.send(bytes(60))
    come(nic.card, MAC + FROM + bytes(60))
    come(nic.card, b"\xff" * 6 + FROM + bytes(60))
    nic.put(rtl8139.DTCCR + 4, 0)
    nic.put(rtl8139.DTCCR, DATA | 8)
    assert nic.get(rtl8139.DTCCR, 4) == DATA  # it is done
    tally = struct.unpack_from("<QQQIHHIIQQIHH", nic.pc.ram, DATA)
    assert (tally[0], tally[1], tally[8], tally[9]) == (1, 2, 1, 1)
    nic.put(rtl8139.DTCCR + 4, 9)
    nic.put(rtl8139.DTCCR, 8)
    assert nic.card.counters["bad_dma"] == 1


def test_any_descriptors(nic) -> None:
    """Of no driver that is right: the chip ends, and what is in its state can be loaded."""
    dice = random.Random(3)
    for _ in range(200):
        nic.begin(dice.choice((0x03, 0x63)), dice.choice((0x0E, 0x0F)))
        for ring in TX, HIGH, RX:
            for index in range(64):
                row = dice.getrandbits(32) | dice.choice((OWN, OWN, 0)), dice.getrandbits(32)
                buffer = dice.choice((DATA + dice.getrandbits(12), dice.getrandbits(22), dice.getrandbits(64)))
                struct.pack_into("<IIQ", nic.pc.ram, ring + 16 * index, *row, buffer)
        nic.put(rtl8139.TPPOLL, dice.getrandbits(8), 1)
        for _ in range(10):
            come(nic.card, a_frame(dice))
        state = nic.card.save()
        nic.card.check(state)
        nic.card.load(state)
        assert nic.card.save() == state
    assert nic.card.counters["tx_frames"] and nic.card.counters["tx_bad"] and nic.card.counters["rx_frames"]
