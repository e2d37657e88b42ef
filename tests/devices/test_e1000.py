"""The e1000, by its registers and rings. What it makes of frames is checked by scapy."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
from devices.fakes import pass_time, settle
from devices.nics import MAC, PluggedCard, a_frame, come
from mounting import wait_until

from vmfs.devices.network import e1000
from vmfs.devices.network.e1000 import E1000

scapy = pytest.importorskip("scapy.all", reason="scapy is not installed (make setup)")

RX, TX, DATA = 0x1_0000, 0x2_0000, 0x4_0000
COUNT = 64
FROM = b"\x52\x54\0\0\0\x09"


class Nic(PluggedCard):
    CARD, BAR = E1000, 0

    def begin(self, control: int = 0x8002, **more: int) -> None:
        for low, at in ((e1000.RDBAL, RX), (e1000.TDBAL, TX)):
            for offset, value in ((0, at), (4, 0), (8, 16 * COUNT), (16, 0), (24, 0)):
                self.put(low + offset, value)
        for index in range(COUNT):
            struct.pack_into("<QQ", self.pc.ram, RX + 16 * index, DATA + 0x1000 * index, 0)
        for name, value in more.items():
            self.put(getattr(e1000, name), value)
        self.put(e1000.RCTL, control)
        self.put(e1000.RDT, COUNT - 1)
        self.put(e1000.TCTL, 0xA)

    def send(self, *rows: bytes) -> list[bytes]:
        """Descriptors; what has gone out since."""
        before = len(self.cable.sent)
        for row in rows:
            self.pc.ram[TX + 16 * self.tail : TX + 16 * self.tail + 16] = row
            self.tail = (self.tail + 1) % COUNT
        self.put(e1000.TDT, self.tail)
        return self.cable.sent[before:]

    def data(self, frame: bytes, at: int = 0x8_0000) -> tuple[int, int]:
        self.pc.ram[at : at + len(frame)] = frame
        return at, len(frame)

    def received(self) -> list[tuple[bytes, int, int, int]]:
        """What has come since: data, status, errors, special."""
        found = []
        while self.pc.ram[RX + 16 * self.seen + 12] & 1:
            at, length, _, status, errors, special = struct.unpack_from("<QHHBBH", self.pc.ram, RX + 16 * self.seen)
            found.append((bytes(self.pc.ram[at : at + length]), status, errors, special))
            self.pc.ram[RX + 16 * self.seen + 12] = 0
            self.seen = (self.seen + 1) % COUNT
        return found


@pytest.fixture
def nic():
    one = Nic()
    yield one
    one.close()


def legacy(at: int, length: int, command: int = 0x0B, cso: int = 0, css: int = 0, tag: int = 0) -> bytes:
    return struct.pack("<QHBBBBH", at, length, cso, command, 0, css, tag)


def context(ip: tuple[int, int, int], tcp: tuple[int, int, int], command: int, header: int = 0, most: int = 0,
            size: int = 0) -> bytes:  # fmt: skip
    return struct.pack("<BBHBBHIBBH", *ip, *tcp, size | (command | 0x20) << 24, 0, header, most)


def extended(at: int, length: int, command: int, options: int = 0, tag: int = 0) -> bytes:
    return struct.pack("<QIBBH", at, length | 1 << 20 | (command | 0x20) << 24, 0, options, tag)


def a_segment(payload: bytes, flags: str = "PA", ip=None):
    ip = ip or scapy.IP(src="10.0.0.1", dst="10.0.0.2", id=77)
    return scapy.Ether(src=MAC, dst=FROM) / ip / scapy.TCP(sport=1, dport=2, seq=0xFFFF_FF00, flags=flags) / payload


def right(frame: bytes) -> bytes:
    """The frame with the checksums that scapy makes."""
    packet = scapy.Ether(frame)
    for layer in scapy.IP, scapy.TCP, scapy.UDP:
        if layer in packet:
            del packet[layer].chksum
    return bytes(packet)


def test_what_a_driver_finds(nic) -> None:
    assert nic.guest.config(4, 0) == 0x100E_8086 and nic.get(e1000.STATUS) & 3 == 3
    assert nic.get(e1000.RAL) == int.from_bytes(MAC[:4], "little") and nic.get(e1000.RAL + 4) == 0x8000_0700

    def word(index: int) -> int:
        nic.put(e1000.EERD, 1 | index << 8)
        value = nic.get(e1000.EERD)
        assert value & 0x10
        return value >> 16

    assert sum(map(word, range(64))) & 0xFFFF == 0xBABA and word(0x0D) == 0x100E
    for register, value in ((2, 0x0141), (3, 0x0C20), (1, 0x796D)):
        nic.put(e1000.MDIC, 2 << 26 | 1 << 21 | register << 16)
        assert nic.get(e1000.MDIC) & 0x5000_FFFF == 0x1000_0000 | value
    nic.put(e1000.MDIC, 2 << 26 | 5 << 21)
    assert nic.get(e1000.MDIC) & 0x4000_0000  # there is no such PHY
    port = nic.card.bar(2)
    nic.guest.out(port, e1000.STATUS, 4)
    assert nic.guest.inp(port + 4, 4) & 3 == 3


def test_the_eeprom_bit_by_bit(nic) -> None:
    """Microwire: read, and written only after EWEN."""

    def command(bits: str, reads: int = 0) -> str:
        for bit in bits:
            nic.put(e1000.EECD, 2 | 4 * int(bit))
            nic.put(e1000.EECD, 3 | 4 * int(bit))
        out = ""
        for _ in range(reads):
            nic.put(e1000.EECD, 2)
            nic.put(e1000.EECD, 3)
            out += "1" if nic.get(e1000.EECD) & 8 else "0"
        nic.put(e1000.EECD, 0)
        return out

    def read(index: int, words: int = 1) -> int:
        return int(command(f"110{index:06b}", 16 * words), 2)

    assert read(0x0E) == 0x8086 and read(0x0D, 2) == 0x100E_8086
    assert read(63, 2) == read(63) << 16 | read(0)
    command(f"101{9:06b}{0x1234:016b}")
    assert read(9) == 0x1000
    command("100110000")  # EWEN
    command(f"101{9:06b}{0x1234:016b}")
    assert read(9) == 0x1234
    command(f"111{9:06b}")
    assert read(9) == 0xFFFF
    command("100000000")  # EWDS
    command(f"101{9:06b}{0x1234:016b}")
    assert read(9) == 0xFFFF


def test_frames_of_legacy_descriptors(nic) -> None:
    nic.begin()
    frame = bytes(range(200))
    at, _ = nic.data(frame)
    assert nic.send(legacy(at, 100, 0), legacy(at + 100, 100)) == [frame]
    assert nic.get(e1000.TDH) == 2 and nic.pc.ram[TX + 28] & 1 and not nic.pc.ram[TX + 12] & 1
    assert nic.send(legacy(at, 20)) == [frame[:20].ljust(60, b"\0")]
    segment = bytearray(bytes(a_segment(b"data")))
    segment[50:52] = struct.pack(">H", 0)
    row = legacy(*nic.data(bytes(segment), 0x9_0000), 0x0F, cso=50, css=34)
    assert nic.send(row)[0][50:52] != b"\0\0"
    nic.put(e1000.CTRL, 0x4000_0040)
    assert nic.send(legacy(at, 100, 0x4B, tag=0x2005)) == [frame[:12] + b"\x81\0\x20\x05" + frame[12:100]]


@pytest.mark.parametrize("kind", ["tcp", "udp", "tcp6"])
def test_checksums_are_put_in(nic, kind: str) -> None:
    nic.begin()
    ip = scapy.IPv6(src="fd00::1", dst="fd00::2") if kind == "tcp6" else scapy.IP(src="10.0.0.1", dst="10.0.0.2")
    layer = scapy.UDP(sport=5, dport=6) if kind == "udp" else scapy.TCP(sport=1, dport=2)
    good = bytes(scapy.Ether(src=MAC, dst=FROM) / ip / layer / b"an odd payload, and more!")
    start = 54 if kind == "tcp6" else 34
    at = start + (6 if kind == "udp" else 16)
    frame = bytearray(good)
    protocol = 17 if kind == "udp" else 6
    addresses = good[22:54] if kind == "tcp6" else good[26:34]
    pseudo = addresses + struct.pack(">II", len(good) - start, protocol)
    frame[at : at + 2] = struct.pack(">H", sum(struct.unpack(f">{len(pseudo) // 2}H", pseudo)) % 0xFFFF)
    if kind != "tcp6":
        frame[24:26] = b"\0\0"
    row = context((14, 24, 33), (start, at, 0), 1)
    assert nic.send(row, extended(*nic.data(bytes(frame)), 0x0B, 2 if kind == "tcp6" else 3)) == [good]


def test_a_long_segment_is_cut(nic) -> None:
    nic.begin()
    payload = bytes(index * 7 & 0xFF for index in range(10_001))
    frame = bytearray(bytes(a_segment(payload, "FPA")))
    frame[16:18] = frame[24:26] = b"\0\0"
    pseudo = bytes(frame[26:34]) + struct.pack(">I", 6)
    frame[50:52] = struct.pack(">H", sum(struct.unpack(">6H", pseudo)) % 0xFFFF)
    at, length = nic.data(bytes(frame))
    row = context((14, 24, 33), (34, 50, 0), 0x7, header=54, most=1460, size=length - 54)
    out = nic.send(row, extended(at, 54, 0x06, 3), extended(at + 54, length - 54, 0x0F, 3))
    assert [len(one) for one in out] == [54 + 1460] * 6 + [54 + 10_001 - 6 * 1460]
    found = [scapy.Ether(one) for one in out]
    assert b"".join(bytes(one[scapy.TCP].payload) for one in found) == payload
    assert [one[scapy.IP].id for one in found] == list(range(77, 84))
    assert [one[scapy.TCP].seq for one in found] == [0xFFFF_FF00 + 1460 * n & 0xFFFF_FFFF for n in range(7)]
    assert [str(one[scapy.TCP].flags) for one in found] == ["A"] * 6 + ["FPA"]
    assert all(right(one) == one for one in out) and nic.get(e1000.TSCTC) == 1


def test_what_drivers_must_not_send(nic) -> None:
    nic.begin()
    at, _ = nic.data(bytes(100))
    for row in (legacy(at, 10), legacy(1 << 40, 100), extended(at, 0xF_FFFF, 0x0B), extended(at, 100, 0x0F),
                legacy(at, 0)):  # fmt: skip
        assert nic.send(row) == []
    for most, header in ((1, 54), (1460, 20), (1460, 255)):
        assert nic.send(context((14, 24, 33), (34, 50, 0), 7, header, most, 5), extended(at, 100, 0x0F, 3)) == []
    assert nic.card.counters["tx_bad"] == 8 and nic.get(e1000.TDH) == nic.tail
    for low, value in ((e1000.TDLEN, 0), (e1000.TDBAL, 0xFFFF_FFF0), (e1000.TDT, 0xFFFF)):
        nic.put(low, value)
    nic.begin()
    nic.tail = 0
    assert len(nic.send(legacy(at, 100))) == 1


def test_more_than_is_sent_at_a_time(nic) -> None:
    """The guest goes on meanwhile, for a moment."""
    nic.begin(TDLEN=16 * 4096)
    nic.put(e1000.TDLEN, 16 * 4096)
    at, _ = nic.data(bytes(100))
    nic.pc.ram[TX : TX + 16 * 4000] = legacy(at, 60) * 4000
    nic.put(e1000.TDT, 4000)
    assert len(nic.cable.sent) == 1024
    pass_time(nic.pc, nic.pc.machine.time + 1_000_000)
    assert len(nic.cable.sent) == 4000 and nic.get(e1000.TDH) == 4000


def test_a_full_backend_holds_the_guest_back(nic) -> None:
    nic.begin()
    at, _ = nic.data(bytes(100))
    nic.cable.full = True
    assert nic.send(*[legacy(at, 60)] * 5) == [] and nic.send(*[legacy(at, 60)] * 3) == []
    assert nic.get(e1000.TDH) == 5 and len(nic.card._posted) == 5
    nic.cable.full = False
    wait_until(lambda: nic.get(e1000.TDH) == 8, "its thread sends on")
    assert len(nic.cable.sent) == 8


@pytest.fixture
def timed(nic):
    """Its inputs have times."""
    nic.begin()
    nic.pc.time_source = "instructions"
    nic.pc.inputs.record()
    return nic


def test_what_is_sent_while_inputs_have_times_wakes_no_thread(timed, monkeypatch) -> None:
    at, _ = timed.data(bytes(100))
    woken = []
    monkeypatch.setattr(timed.card, "_wake_up", lambda: woken.append(1))
    assert len(timed.send(*[legacy(at, 60)] * 5)) == 5 and not woken
    timed.cable.full = True
    assert timed.send(*[legacy(at, 60)] * 5) == [] and timed.get(e1000.TDH) == 10  # the guest sees them taken
    assert woken
    monkeypatch.undo()
    timed.cable.full = False
    timed.card.send_soon()
    wait_until(lambda: len(timed.cable.sent) == 10, "its thread sends them")


def test_a_backend_that_ends_while_inputs_have_times(timed, monkeypatch) -> None:
    """The end of the link is an input: the guest sees it after what it has sent."""
    at, _ = timed.data(bytes(100))

    def ends(frames: list[bytes]) -> int:
        raise OSError("it has ended")

    monkeypatch.setattr(timed.cable, "send_all", ends)
    timed.send(legacy(at, 60), legacy(at, 60))
    assert timed.get(e1000.TDH) == 2 and timed.card.link_up
    settle(timed.pc)
    assert not timed.card.link_up and [one.kind for one in timed.pc.inputs.recorded()] == ["link"]


def test_more_frames_arrive_than_are_taken_at_a_time(timed) -> None:
    """They wait in the backend, and the thread is told when it may go on. All of a batch are of one time."""
    timed.put(e1000.RCTL, 0)  # the driver takes none
    frames = [MAC + FROM + b"\x88\xb5" + bytes([number]) * 50 for number in range(200)]
    timed.cable.bring(*frames)
    for count in (64, 128, 192, 200):
        left = min(64, count - len(timed.pc.inputs.recorded()))
        wait_until(lambda left=left: timed.pc.inputs.new == left, "a batch")
        settle(timed.pc)
        assert len(timed.pc.inputs.recorded()) == count
    log = timed.pc.inputs.recorded()
    assert [one.data for one in log] == frames and len({one.at for one in log}) == 4


def test_what_others_have_entered_holds_frames_back_no_longer_than_it_waits(timed) -> None:
    for _ in range(64):
        timed.pc.devices["com1"].receive(b"x")
    timed.cable.bring(MAC + FROM + b"\x88\xb5" + bytes(50))
    timed.card.send_soon()  # its thread looks, and leaves the frame
    wait_until(lambda: timed.card._keeps, "it is held back")
    settle(timed.pc)
    wait_until(lambda: timed.pc.inputs.new == 1, "the frame comes in")


def test_of_frames_of_one_time_one_waits_for_a_buffer(timed) -> None:
    """The others are lost; and so it is when they come again."""
    frames = [MAC + FROM + b"\x88\xb5" + bytes([number]) * 50 for number in range(9)]
    again = Nic()
    try:
        again.begin()
        again.pc.time_source = "instructions"
        for nic in timed, again:
            nic.put(e1000.RDT, 4)
        with timed.pc.lock:  # its thread brings them all at once
            timed.cable.bring(*frames)
            timed.card.send_soon()
        wait_until(lambda: timed.pc.inputs.new == len(frames), "they come in")
        settle(timed.pc)
        again.pc.inputs.feed(timed.pc.inputs.recorded())
        pass_time(again.pc, timed.pc.now())
        for nic in timed, again:
            assert [one[0][:-4] for one in nic.received()] == frames[:4]
            assert nic.card.counters["rx_frames"] == 4 and nic.card.counters["rx_dropped"] == 4
            nic.put(e1000.RDT, 8)
            wait_until(lambda nic=nic: [one[0][:-4] for one in nic.received()] == frames[4:5], "the one that waited")
        assert timed.card.save() == again.card.save() and timed.card.counters == again.card.counters
    finally:
        again.close()


def test_frames_come_in(nic) -> None:
    nic.begin()
    frame = MAC + FROM + b"\x88\xb5" + bytes(range(100))
    come(nic.card, frame)
    come(nic.card, frame[:30])
    (first, status, errors, _), (short, *_) = nic.received()
    assert first == frame + zlib.crc32(frame).to_bytes(4, "little") and (status, errors) == (7, 0)
    assert short[:60] == frame[:30].ljust(60, b"\0") and len(short) == 64
    nic.put(e1000.RCTL, 0x0402_8022)  # 512 bytes a buffer, no CRC, long frames
    nic.put(e1000.RCTL, 0x0402_8022)
    long = frame + bytes(1500)
    come(nic.card, long)
    parts = nic.received()
    assert b"".join(part[0] for part in parts) == long and [part[1] & 2 for part in parts] == [0, 0, 0, 2]
    assert nic.get(e1000.GPRC) == 3 and nic.get(e1000.GPRC) == 0


def test_a_ring_without_room_holds_back(nic) -> None:
    nic.begin()
    nic.put(e1000.RDT, 2)
    frame = MAC + FROM + b"\x88\xb5" + bytes(50)
    with nic.pc.lock:
        assert [nic.card.deliver(frame) for _ in range(3)] == [True, True, False]
    nic.put(e1000.RDT, 3)
    with nic.pc.lock:
        assert nic.card.deliver(frame)


FILTERS = {
    "own": (0x2, MAC, True), "other": (0x2, FROM, False), "promiscuous": (0xA, FROM, True),
    "broadcast": (0x8002, b"\xff" * 6, True), "no broadcast": (0x2, b"\xff" * 6, False),
    "group": (0x2, b"\1\0\x5e\0\0\1", False), "all groups": (0x12, b"\1\0\x5e\0\0\1", True),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_filters(nic, name: str) -> None:
    control, to, comes = FILTERS[name]
    nic.begin(control)
    come(nic.card, to + FROM + b"\x88\xb5" + bytes(50))
    assert bool(nic.received()) == comes


def test_groups_and_tags_that_are_listed(nic) -> None:
    nic.begin(0x2)
    to = b"\1\0\x5e\0\0\1"
    index = (to[5] << 8 | to[4]) >> 4 & 0xFFF
    nic.put(e1000.MTA + 4 * (index >> 5), 1 << (index & 31))
    come(nic.card, to + FROM + b"\x88\xb5" + bytes(50))
    assert len(nic.received()) == 1
    nic.put(e1000.RCTL, 2 | 1 << 18)
    nic.put(e1000.CTRL, 0x4000_0040)
    nic.put(e1000.VFTA, 1 << 5)
    tagged = MAC + FROM + b"\x81\0\x20\x05\x88\xb5" + bytes(60)
    come(nic.card, tagged)
    come(nic.card, tagged.replace(b"\x20\x05", b"\x20\x06"))
    ((data, status, _, special),) = nic.received()
    assert data[:-4] == MAC + FROM + b"\x88\xb5" + bytes(60) and status & 8 and special == 0x2005


def test_checksums_are_looked_at(nic) -> None:
    nic.begin(RXCSUM=0x300)
    good = bytearray(bytes(a_segment(b"some data", ip=scapy.IP(src="1.2.3.4", dst="5.6.7.8"))))
    good[:6] = MAC
    bad_ip, bad_tcp = bytearray(good), bytearray(good)
    bad_ip[24] ^= 1
    bad_tcp[-1] ^= 1
    udp = bytearray(bytes(scapy.Ether(dst=MAC, src=FROM) / scapy.IP(dst="1.1.1.1") / scapy.UDP() / b"xy"))
    arp = MAC + FROM + b"\x08\x06" + bytes(46)
    for frame in good, bad_ip, bad_tcp, udp, arp:
        come(nic.card, bytes(frame))
    found = [(status & 0x64, errors) for _, status, errors, _ in nic.received()]
    assert found == [(0x60, 0), (0x60, 0x40), (0x60, 0x20), (0x60, 0), (4, 0)]


def test_interrupts_and_their_moderation(nic) -> None:
    nic.begin()
    gsi, frame = nic.card.irq, MAC + FROM + b"\x88\xb5" + bytes(50)
    nic.put(e1000.IMS, 0x80)
    come(nic.card, frame)
    assert nic.pc.machine.lines[gsi] and nic.get(e1000.ICR) & 0x80 and not nic.pc.machine.lines[gsi]
    assert nic.get(e1000.ICR) == 0
    nic.put(e1000.ITR, 1000)  # 256 us
    pass_time(nic.pc, 10_000_000)
    come(nic.card, frame)
    assert nic.pc.machine.lines[gsi]
    nic.get(e1000.ICR)
    come(nic.card, frame)
    assert not nic.pc.machine.lines[gsi]
    pass_time(nic.pc, 10_255_000)
    assert not nic.pc.machine.lines[gsi]
    pass_time(nic.pc, 10_257_000)
    assert nic.pc.machine.lines[gsi]
    nic.put(e1000.IMC, 0x80)
    assert not nic.pc.machine.lines[gsi]
    nic.put(e1000.ICS, 4)
    nic.put(e1000.IMS, 4)
    pass_time(nic.pc, 20_000_000)
    assert nic.pc.machine.lines[gsi] and nic.get(e1000.ICR) & 4


def test_the_link_goes_down(nic) -> None:
    nic.begin()
    nic.put(e1000.IMS, 4)
    with nic.pc.lock:
        nic.card._link_down()
    assert nic.get(e1000.ICR) == 4 and not nic.get(e1000.STATUS) & 2
    nic.put(e1000.MDIC, 2 << 26 | 1 << 21 | 1 << 16)
    assert not nic.get(e1000.MDIC) & 4
    assert nic.send(legacy(nic.data(bytes(60))[0], 60)) == [] and nic.card.counters["tx_dropped"] == 1


def test_a_loop(nic) -> None:
    nic.begin(0x8042)
    frame = MAC + FROM + b"\x88\xb5" + bytes(60)
    assert nic.send(legacy(*nic.data(frame))) == []
    assert [data[:-4] for data, *_ in nic.received()] == [frame]


def test_a_reset_keeps_filters_and_forgets_the_rest(nic) -> None:
    nic.begin()
    nic.put(e1000.MTA, 5)
    nic.put(e1000.IMS, 0x80)
    nic.put(e1000.CTRL, 1 << 26)
    assert nic.get(e1000.MTA) == 5 and nic.get(e1000.RCTL) == nic.get(e1000.IMS) == nic.get(e1000.TDT) == 0
    assert nic.get(e1000.CTRL) & 1 << 26 == 0 and nic.get(e1000.RAL + 4) == 0x8000_0700


@pytest.mark.parametrize("control", [0x8002, 0x0400_8002, 0x3_8002, 0x801A], ids=["plain", "stripped", "small", "all"])
def test_many_frames_at_once_are_as_one_by_one(control: int) -> None:
    """C takes the plain ones of many, and is the same."""
    dice = random.Random(control)
    cards = [Nic(), Nic()]
    try:
        for nic in cards:
            nic.begin(control, RXCSUM=0x300, CTRL=0x4000_0040, IMS=0x9D)
        for _ in range(12):
            frames = [a_frame(dice) for _ in range(dice.randrange(1, 30))]
            for _ in range(20):
                frame = bytearray(MAC + FROM + bytes(a_segment(dice.randbytes(dice.randrange(1200))))[12:])
                frame[dice.randrange(14, 54)] ^= dice.choice((0, 0, 1))
                frames.append(bytes(frame[: dice.choice((1500, 1500, 1500, 13))]))
            dice.shuffle(frames)
            one, many = cards
            with one.pc.lock, many.pc.lock:
                done = next((at for at, frame in enumerate(frames) if not one.card.deliver(frame)), len(frames))
                assert many.card.deliver_all(list(frames)) == done
                one.card.delivered(), many.card.delivered()
            tail = dice.randrange(COUNT)
            for nic in cards:
                nic.put(e1000.RDT, tail)
            assert one.card.save() == many.card.save() and one.pc.ram == many.pc.ram
            assert one.card.counters == many.card.counters
            assert one.pc.take_dirty() == many.pc.take_dirty()
        assert one.card.counters["rx_frames"] > 100
    finally:
        for nic in cards:
            nic.close()


@pytest.mark.parametrize("control", [0x40, 0x4000_0040], ids=["plain", "tags"])
def test_what_c_sends_is_as_python_sends_it(control: int, monkeypatch) -> None:
    dice = random.Random(control)
    cards = [Nic(), Nic()]
    try:
        monkeypatch.setattr(cards[0].card, "_send_plain", lambda start, count, head, tail, most: (0, head, False))
        for nic in cards:
            nic.begin(CTRL=control, IMS=0x9D)
        for _ in range(250):
            at, length = 0x8_0000, dice.choice((20, 60, 300, 1514, 9000))
            data = bytes(a_segment(dice.randbytes(length)))
            rows = []
            for _ in range(dice.randrange(1, 6)):
                size, tag = dice.choice((len(data), len(data), 13, 0)), dice.getrandbits(16)
                command = dice.choice((0x0B, 0x0B, 0x09, 0x0A, 0x03, 0x4B, 0x0F, 0x0E))
                kind = dice.random()
                if kind < 0.3:
                    sums = (14, 24, 33), (34, dice.choice((50, 250)), dice.choice((0, 60)))
                    header, most = dice.choice((54, 54, 54, 20, 255)), dice.choice((1460, 100, 63))
                    rows.append(context(*sums, dice.choice((9, 0xF, 0xD, 6)), header, most, 9000))
                elif kind < 0.6:
                    where, sums = dice.choice((at, at, 1 << 40)), (dice.randrange(80), dice.randrange(40))
                    rows.append(legacy(where, size, command, *sums, tag))
                else:
                    rows.append(extended(at, size, command, dice.randrange(4), tag))
            sent = []
            for nic in cards:
                nic.data(data)
                sent.append(nic.send(*rows))
            assert sent[0] == sent[1]
            one, other = cards
            assert one.card.save() == other.card.save() and one.pc.ram == other.pc.ram
            assert one.card.counters == other.card.counters and one.pc.take_dirty() == other.pc.take_dirty()
        assert one.card.counters["tx_frames"] > 100 and one.card.statistics[e1000.TSCTC] > 5
    finally:
        for nic in cards:
            nic.close()
