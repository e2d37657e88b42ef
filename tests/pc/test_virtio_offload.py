"""What a virtio card does for its driver: checksums, TCP cut into segments, and segments made one again."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from pc.test_virtio_net import MAC, Card
from pc.virtio_driver import SIZE

from vmfs.devices import _chips
from vmfs.devices.virtio.net import F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_HOST_TSO4, F_MRG_RXBUF

PEER = b"\x9a\x55\x9a\x55\x9a\x55"
ACK, PSH, FIN = 0x10, 0x08, 0x01
NEEDS_CSUM, DATA_VALID, TCPV4, TCPV6 = 1, 2, 1, 4


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card()
    card.driver.start()
    yield card
    card.close()


def total(data: bytes) -> int:
    """The sum of words modulo FFFFh, by long division; of an odd number of bytes as if a zero came after them."""
    return int.from_bytes(data + bytes(len(data) & 1), "big") % 0xFFFF


def put_sum(data: bytearray, start: int, at: int) -> None:
    struct.pack_into(">H", data, at, 0xFFFF - total(bytes(data[start:])) or 0xFFFF)


def tcp(
    payload: bytes,
    sequence: int = 1000,
    flags: int = ACK,
    *,
    six: bool = False,
    options: bytes = b"",
    number: int = 7,
    acknowledges: int = 5,
    partial: bool = False,
) -> bytes:
    """A frame of TCP; `partial`: its checksum is that of the pseudo header, as a driver leaves it to a card."""
    segment = bytearray(
        struct.pack(
            ">HHIIBBHHH", 80, 4000, sequence & 0xFFFF_FFFF, acknowledges, (20 + len(options)) << 2, flags, 500, 0, 0
        )
        + options
        + payload
    )
    size = len(segment)
    if six:
        ip = bytearray(struct.pack(">IHBB", 6 << 28, size, 6, 64) + bytes(range(32)))
        pseudo = total(ip[8:40]) + 6 + size
    else:
        ip = bytearray(
            struct.pack(">BBHHHBBHII", 0x45, 0, 20 + size, number & 0xFFFF, 0x4000, 64, 6, 0, 0x0A000001, 0x0A000002)
        )
        put_sum(ip, 0, 10)
        pseudo = total(ip[12:20]) + 6 + size
    struct.pack_into(">H", segment, 16, pseudo % 0xFFFF)
    if not partial:
        put_sum(segment, 0, 16)
    return MAC + PEER + (b"\x86\xdd" if six else b"\x08\0") + bytes(ip) + bytes(segment)


def train(payload: bytes, most: int, *, six: bool = False, options: bytes = b"", flags: int = ACK | PSH) -> list[bytes]:
    """A stream of TCP as frames, as a sender makes them: `flags` are the last one's."""
    starts = range(0, len(payload), most)
    return [
        tcp(
            payload[at : at + most],
            1000 + at,
            flags if at == starts[-1] else ACK,
            six=six,
            options=options,
            number=7 + number,
        )
        for number, at in enumerate(starts)
    ]


def send(card: Card, head: bytes, frame: bytes, cut: int = 0) -> None:
    """A request of one or, with `cut`, two buffers."""
    data = head.ljust(12, b"\0") + frame
    card.driver.next = 0x4_0000
    card.driver.request([data[:cut], data[cut:]] if cut else [data], [], queue=1)


@pytest.mark.parametrize("six", [False, True], ids=["v4", "v6"])
@pytest.mark.parametrize(
    "length, most, options", [(1, 100, b""), (4000, 1448, b"\1" * 12), (2896, 1448, b""), (60_001, 1460, b"")]
)
def test_tcp_is_cut_as_a_sender_would(card: Card, six: bool, length: int, most: int, options: bytes) -> None:
    payload = random.Random(length).randbytes(length)
    start = 54 if six else 34
    head = struct.pack("<BBHHHH", NEEDS_CSUM, TCPV6 if six else TCPV4, 0, most, start, 16)
    whole = tcp(payload, six=six, options=options, flags=ACK | PSH | FIN, partial=True)
    for cut in 0, 5, 30, 70:
        send(card, head, whole, cut)
        wanted = train(payload, most, six=six, options=options, flags=ACK | PSH | FIN)
        assert [card.wire.receive() for _ in wanted] == wanted
    assert not card.device.counters["tx_bad"]


def test_a_checksum_is_put_in(card: Card) -> None:
    send(card, struct.pack("<BBHHHH", NEEDS_CSUM, 0, 0, 0, 34, 16), tcp(b"seven!!", partial=True))
    assert card.wire.receive() == tcp(b"seven!!")


def test_what_was_not_offered_or_cannot_be_is_not_sent(card: Card) -> None:
    frame = tcp(bytes(3000), partial=True)
    good = (NEEDS_CSUM, TCPV4, 0, 1448, 34, 16)
    for at, value in (
        (0, 0),
        (1, 3),
        (1, 0x81),
        (1, TCPV6),
        (3, 15),
        (4, 33),
        (4, 3034),
        (4, 0xFFFF),
        (5, 6),
        (5, 0xFFFF),
    ):
        send(
            card, struct.pack("<BBHHHH", *(value if at == number else word for number, word in enumerate(good))), frame
        )
    assert card.device.counters["tx_bad"] == 10
    for features in (F_CSUM, F_HOST_TSO4, 0):
        card.driver.next = 0x20_0000
        card.driver.start(features)
        send(card, struct.pack("<BBHHHH", *good), frame)
    assert card.device.counters["tx_bad"] == 13 and not card.driver.needs_reset
    send(card, b"", tcp(b"x"))
    assert card.wire.receive() == tcp(b"x")


class Receiver:
    """The driver's side of the first queue, with all buffers of one size."""

    def __init__(self, card: Card, count: int = 256, size: int = 1536) -> None:
        self.card, self.ring, self.size = card, card.driver.queues[0], size
        self.places = {}
        for _ in range(count):
            at = card.driver.take(size)
            self.places[self.ring.add([(at, size, True)])] = at

    def come(self, *frames: bytes) -> list[tuple[tuple[int, ...], bytes]]:
        """Frames arrive; what was got, as heads without the number of buffers, and packets."""
        device, got = self.card.device, []
        with self.card.bench.board.lock:
            assert device.deliver_all(list(frames)) == len(frames)
            device.delivered()
        done = self.ring.used()
        while done:
            (first, *_), data = done[0], b""
            count = int.from_bytes(self.card.driver.get(self.places[first] + 10, 2), "little")
            for head, length in done[:count]:
                data += self.card.driver.get(self.places[head], length)
            assert len(done) >= count > 0
            got.append((struct.unpack("<BBHHHH", data[:10]), data[12:]))
            for head, _ in done[:count]:
                self.ring.offer(head)
            done = done[count:]
        return got


@pytest.mark.parametrize("six", [False, True], ids=["v4", "v6"])
def test_segments_are_one_packet_that_is_cut_into_them_again(card: Card, six: bool) -> None:
    receiver = Receiver(card)
    for length, most, options in (
        (1448 * 40 + 3, 1448, b"\1\1\x08\x0a" + bytes(8)),
        (200, 100, b""),
        (2920, 1460, b""),
        (65_000, 1448, b""),
    ):
        payload = random.Random(length).randbytes(length)
        frames = train(payload, most, six=six, options=options)
        ((head, packet),) = receiver.come(*frames)
        start = 54 if six else 34
        header = start + 20 + len(options)
        assert head == (NEEDS_CSUM, TCPV6 if six else TCPV4, header, most, start, 16)
        assert packet == tcp(payload, six=six, options=options, flags=ACK | PSH, partial=True)
        send(card, struct.pack("<BBHHHH", *head), packet)
        assert [card.wire.receive() for _ in frames] == frames
    assert card.device.counters["rx_bytes"] == card.device.counters["tx_bytes"]


def test_what_does_not_go_on_is_a_packet_of_its_own(card: Card) -> None:
    receiver = Receiver(card)
    first, second, third = train(bytes(range(250)) * 3, 250)
    bad = bytearray(second)
    bad[-1] ^= 1
    alone = (DATA_VALID, 0, 0, 0, 0, 0)
    for frames in (
        (second, first),
        (first, third),
        (first, first),
        (tcp(b"a" * 250, flags=ACK | PSH), second),
        (tcp(b"a" * 250, flags=ACK | FIN), second),
        (first, tcp(b"b" * 250, 1250, acknowledges=6)),
        (first, tcp(b"b" * 250, 1250, options=b"\1" * 4)),
        (first, tcp(b"b" * 251, 1250)),
        (first, tcp(b"b" * 250, 1250, six=True)),
    ):
        got = receiver.come(*frames)
        assert [packet for _, packet in got] == list(frames)
    assert receiver.come(first) == [(alone, first)]
    assert receiver.come(first, bytes(bad)) == [(alone, first), ((0,) * 6, bytes(bad))]  # which the guest finds


def test_without_offers_taken_frames_are_as_they_came(card: Card) -> None:
    card.driver.next = 0x10_0000
    card.driver.start(F_MRG_RXBUF)
    frames = train(bytes(3000), 1448)
    assert Receiver(card, 16).come(*frames) == [((0,) * 6, frame) for frame in frames]
    card.driver.next = 0x10_0000
    card.driver.start(F_GUEST_CSUM | F_GUEST_TSO4)  # one buffer a packet
    assert [len(packet) for _, packet in Receiver(card, 16, 1540).come(*frames)] == [1502, 1502, 158]


def test_a_packet_for_which_there_is_no_room_comes_in_parts(card: Card) -> None:
    Receiver(card, 30)
    frames = train(bytes(1448 * 40), 1448)
    with card.bench.board.lock:
        assert 0 < card.device.deliver_all(frames) < 40
    assert not card.driver.needs_reset


def test_hostile_heads_and_frames() -> None:
    """Random requests and frames: an error, a count, or sent; nothing else, and what goes out is a frame."""
    dice = random.Random(5)
    card = Card()
    try:
        for _ in range(12):
            card.driver.next = 0
            card.driver.start()
            for _ in range(20):
                frame = bytearray(
                    tcp(dice.randbytes(dice.choice((0, 1, 700, 3000))), six=dice.random() < 0.5, partial=True)
                )
                for _ in range(dice.choice((0, 0, 1, 3))):
                    frame[dice.randrange(len(frame))] = dice.getrandbits(8)
                words = [
                    dice.choice((1, 1, 0, 255)),
                    dice.choice((0, 1, 4, 1, 255)),
                    0,
                    dice.choice((16, 1448, 0, 65535)),
                    dice.choice((34, 54, 0, 65535, 200)),
                    dice.choice((16, 16, 6, 65535, 0)),
                ]
                ring = card.driver.queues[1]
                at = dice.choice((0x8_0000, 0x8_0000, 0x8_0000, SIZE - 100))
                card.bench.memory.write(0x8_0000, struct.pack("<BBHHHHH", *words, 0) + bytes(frame))
                ring.add([(at, dice.choice((12 + len(frame), 12, 40)), False)])
                ring.notify()
            frames = [
                dice.choice((bytes(frame), tcp(bytes(100), 1000 + 100 * at), dice.randbytes(dice.randrange(14, 200))))
                for at in range(20)
            ]
            receiver = card.driver.queues[0]
            for _ in range(dice.choice((3, 40))):
                receiver.add([(dice.choice((0x10_0000, 0x10_0000, SIZE - 8)), dice.choice((1500, 60, 8, 12)), True)])
            with card.bench.board.lock, card.device.guarded():
                assert 0 <= card.device.deliver_all(frames) <= 20
        counters = card.device.counters
        assert counters["tx_frames"] and counters["tx_bad"] and counters["rx_frames"]
    finally:
        card.close()


def test_a_card_says_which_sums_are_right() -> None:
    dice = random.Random(3)
    for _ in range(200):
        frame = bytearray(tcp(dice.randbytes(dice.randrange(60))))
        assert _chips.sums_found(frame) == (True, True)
        frame[dice.randrange(34, 54)] ^= 1 << dice.randrange(8)
        ip, transport = _chips.sums_found(frame)
        assert ip and not transport
        frame[dice.choice((15, 16, 22, 26))] ^= 0x20
        assert _chips.sums_found(frame)[0] is False
        assert _chips.sums_found(dice.randbytes(dice.randrange(40))) == (None, None)


def test_functions_take_no_nonsense() -> None:
    for words in ((10, 100, 14, 34), (54, 0, 14, 34), (500, 100, 14, 34), (54, 100, 60, 34), (54, 100, 14, 40)):
        with pytest.raises(ValueError, match="headers"):
            _chips.segments(bytes(100), *words, (24, 33, 50, 0))
    with pytest.raises(ValueError, match="buffer"):
        _chips.split(bytearray(8), 9)
    for function, *arguments in (
        (_chips.send, -1, ["x"], False),
        (_chips.send, -1, None, False),
        (_chips.take_frames, None, None, 0, 0),
    ):
        with pytest.raises(TypeError):
            function(*arguments)
    with pytest.raises(OSError, match="Bad file"):
        _chips.send(-1, [b"x"], False)
