"""The network card, by a driver in Python, and its backends."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mounting import has_news
from pc.virtio_driver import SIZE, Bench, Driver

from vmfs.devices.network.backends import Stream
from vmfs.devices.virtio.net import F_CTRL_VQ, F_MQ, F_MRG_RXBUF, Net, _flow
from vmfs.devices.virtio.pci import EVENT_IDX, NEEDS_RESET
from vmfs.devices.virtio.queue import Virtqueue
from vmfs.words.errors import Invalid
from vmfs.words.nets import MAX_FRAME

HEADER = bytes(12)
MAC = bytes.fromhex("525400123456")


class Wire:
    """The other end of a card: frames after their lengths."""

    def __init__(self) -> None:
        self.end, other = socket.socketpair()
        self.end.settimeout(60)
        self.backend = Stream(other)

    def send(self, *frames: bytes) -> None:
        self.end.sendall(b"".join(struct.pack(">I", len(frame)) + frame for frame in frames))

    def receive(self) -> bytes:
        (length,) = struct.unpack(">I", self._exactly(4))
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.end.recv(count - len(data))
            assert more
            data += more
        return data


class Card:
    """A card with its driver; `interrupted` waits for one."""

    def __init__(self, cpus: int = 1) -> None:
        self.bench = Bench()
        self.bench.board.cpu_count = cpus
        self.wire = Wire()
        self.event = threading.Event()
        lower = self.bench.machine.irq_line

        def irq_line(gsi: int, level: bool) -> None:
            lower(gsi, level)
            if level:
                self.event.set()

        self.bench.machine.irq_line = irq_line  # type: ignore[method-assign]
        self.device = Net(self.bench.board, "net0", 4, self.wire.backend, MAC)
        self.driver: Driver = self.bench.plug(self.device)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until an interrupt has made it true."""
        while True:
            with self.bench.board.lock:
                if condition():
                    return
                self.event.clear()
                self.driver.isr()
            assert self.event.wait(60)

    def close(self) -> None:
        thread = self.device._thread
        self.bench.close()
        if thread is not None:
            thread.join(60)
            assert not thread.is_alive()
        self.wire.end.close()


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card()
    yield card
    card.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0)


def frame_of(size: int, seed: int = 1) -> bytes:
    return bytes((seed + at) & 0xFF for at in range(size))


def test_its_address_and_link(card: Card) -> None:
    config = b"".join(card.driver.read(4, at, 1).to_bytes(1, "little") for at in range(8))
    assert config == MAC + b"\1\0"


@pytest.mark.parametrize("mac", [b"", bytes(5), b"\1" + bytes(5)])
def test_addresses_that_no_card_has(mac: bytes) -> None:
    bench, wire = Bench(), Wire()
    with pytest.raises(Invalid):
        Net(bench.board, "net0", 4, wire.backend, mac)
    bench.close()
    wire.backend.close()
    wire.end.close()


def test_frames_go_out(card: Card) -> None:
    card.driver.start()
    for size in (14, 60, 1514, MAX_FRAME):
        frame = frame_of(size)
        card.driver.request([HEADER[:5], HEADER[5:] + frame[:1], frame[1:]], [], queue=1)
        assert card.wire.receive() == frame
    assert card.device.counters["tx_frames"] == 4


def test_what_is_no_frame_stays_here(card: Card) -> None:
    card.driver.start()
    for data in (HEADER + b"short", b"\2" + HEADER[1:] + frame_of(60), HEADER + frame_of(MAX_FRAME + 1)):
        card.driver.request([data], [], queue=1)
    card.driver.request([HEADER + frame_of(20)], [], queue=1)
    assert card.wire.receive() == frame_of(20)
    assert card.device.counters["tx_bad"] == 3 and not card.driver.needs_reset


def test_a_frame_without_a_header_is_the_drivers_error(card: Card) -> None:
    card.driver.start()
    ring = card.driver.queues[1]
    ring.add([(card.driver.put(b"xx"), 2, False)])
    ring.notify()
    assert card.driver.needs_reset


@pytest.mark.parametrize("features", [F_MRG_RXBUF, F_MRG_RXBUF | EVENT_IDX, 0])
def test_frames_come_in_in_order(card: Card, features: int) -> None:
    card.driver.start(features)
    ring = card.driver.queues[0]
    places = {}
    for _ in range(64):
        at = card.driver.take(2048)
        places[ring.add([(at, 2048, True)])] = at
    ring.notify()
    frames = [frame_of(size, size) for size in range(60, 1500, 90)]
    card.wire.send(*frames)
    done: list[tuple[int, int]] = []
    card.wait(lambda: len(done.__iadd__(ring.used())) == len(frames))
    for (head, length), frame in zip(done, frames, strict=True):
        data = card.driver.get(places[head], length)
        assert data == HEADER[:10] + b"\1\0" + frame
    assert card.device.counters["rx_frames"] == len(frames)


def test_a_long_frame_is_spread_over_buffers_that_merge(card: Card) -> None:
    card.driver.start(F_MRG_RXBUF)
    ring = card.driver.queues[0]
    at = card.driver.take(20 * 1000)
    for index in range(20):
        ring.add([(at + 1000 * index, 1000, True)])
    ring.notify()
    frame = frame_of(9000)
    card.wire.send(frame)
    done: list[tuple[int, int]] = []
    card.wait(lambda: len(done.__iadd__(ring.used())) == 10)
    assert [length for _, length in done] == [1000] * 9 + [12]
    assert card.driver.get(at, 9012) == HEADER[:10] + struct.pack("<H", 10) + frame


def test_a_frame_too_long_for_its_buffer_is_dropped(card: Card) -> None:
    card.driver.start(0)
    ring = card.driver.queues[0]
    for _ in range(2):
        ring.add([(card.driver.take(100), 100, True)])
    ring.notify()
    card.wire.send(frame_of(200), frame_of(60))
    done: list[tuple[int, int]] = []
    card.wait(lambda: len(done.__iadd__(ring.used())) == 2)
    assert [length for _, length in done] == [0, 72]
    assert card.device.counters["rx_dropped"] == 1


def test_frames_wait_in_the_backend_for_buffers(card: Card) -> None:
    card.driver.start(EVENT_IDX | F_MRG_RXBUF)
    ring = card.driver.queues[0]
    frames = [frame_of(100, at) for at in range(200)]
    card.wire.send(*frames)
    seen = []
    places = {}
    while len(seen) < len(frames):
        at = card.driver.take(256)
        with card.bench.board.lock:
            places[ring.add([(at, 256, True)])] = at
            ring.notify()
        done: list[tuple[int, int]] = []
        card.wait(lambda done=done: bool(done.__iadd__(ring.used())))
        seen += [card.driver.get(places[head], length)[12:] for head, length in done]
    assert seen == frames and card.device.counters["rx_dropped"] == 0


def test_a_frame_that_waits_for_more_buffers_is_told_of_each(card: Card) -> None:
    """Some are there, but too few: the device wants to hear of the next one, whatever number it has."""
    card.driver.start(EVENT_IDX | F_MRG_RXBUF)
    ring = card.driver.queues[0]
    frame = frame_of(1000)
    at = card.driver.take(4 * 256)
    with card.bench.board.lock:
        for index in range(2):
            ring.add([(at + 256 * index, 256, True)])
        ring.notify()
    card.wire.send(frame)
    for index in range(2, 4):
        until(lambda: card.device._starved)
        with card.bench.board.lock:
            ring.add([(at + 256 * index, 256, True)])
            assert ring.notify_if_wanted()
    done: list[tuple[int, int]] = []
    card.wait(lambda: len(done.__iadd__(ring.used())) == 4)
    assert card.driver.get(at, 1012)[12:] == frame


def test_a_guest_without_buffers_does_not_hold_the_backend_back(card: Card) -> None:
    """It keeps some MiB of frames for the guest: passt loses some, and itself, where its socket is full."""
    card.driver.start(F_MRG_RXBUF)
    frames = [frame_of(60_000, at) for at in range(8 * 16)]  # 7.3 MiB: more than any socket has
    card.wire.send(*frames)
    ring = card.driver.queues[0]
    at = card.driver.take(60_100)
    seen = []
    for _ in frames:
        with card.bench.board.lock:
            ring.add([(at, 60_100, True)])
            ring.notify()
        done: list[tuple[int, int]] = []
        card.wait(lambda done=done: bool(done.__iadd__(ring.used())))
        seen.append(card.driver.get(at, done[0][1])[12:])
    assert seen == frames and card.device.counters["rx_dropped"] == 0


def test_the_backend_is_read_while_the_guest_is_served(card: Card) -> None:
    """passt loses what its socket has no room for, so the socket is emptied before frames are given."""
    card.driver.start()
    ring = card.driver.queues[0]
    for _ in range(40):
        ring.add([(card.driver.take(256), 256, True)])
    waiting: list[int] = []
    deliver = card.device._deliver

    def deliver_and_send(queue: Virtqueue, frames: list[bytes]) -> int:
        waiting.append(len(has_news(card.wire.backend.fd, seconds=0)))
        if len(waiting) < 10:
            card.wire.send(frame_of(61))
        return deliver(queue, frames)

    card.device._deliver = deliver_and_send  # type: ignore[method-assign]
    card.wire.send(*[frame_of(60)] * 20)
    ring.notify()
    card.wait(lambda: card.device.counters["rx_frames"] == 29)
    assert len(waiting) >= 10 and not any(waiting)


def test_a_backend_without_end_loses_whole_frames(card: Card) -> None:
    """It never waits, and what is kept arrives as it was, in its order."""
    card.driver.start()
    size = 60_000
    count = (64 << 20) // size
    for number in range(count):
        card.wire.send(struct.pack(">I", number) + bytes(size - 4))
    until(lambda: not has_news(card.wire.backend.fd, seconds=0))
    ring = card.driver.queues[0]
    at = card.driver.take(size + 12)
    seen: list[int] = []

    def arrived() -> bool:
        for _, length in ring.used():
            assert length == size + 12
            seen.append(int.from_bytes(card.driver.get(at + 12, 4), "big"))
            ring.add([(at, size + 12, True)])
            ring.notify()
        return len(seen) + card.device.counters["rx_dropped"] == count

    ring.add([(at, size + 12, True)])
    ring.notify()
    card.wait(arrived)
    assert seen == sorted(seen) and (4 << 20) // size < len(seen) < (32 << 20) // size


def test_what_comes_without_a_driver_is_dropped(card: Card) -> None:
    card.driver.start()
    card.driver.write(1, 20, 1, 0)
    card.wire.send(frame_of(60), frame_of(61))
    card.driver.next = 0x20_0000
    card.driver.start()
    # The two are dropped or still on their way; what comes after them arrives.
    ring = card.driver.queues[0]
    for _ in range(3):
        ring.add([(card.driver.take(256), 256, True)])
    ring.notify()
    card.wire.send(frame_of(99))
    lengths: list[int] = []

    def arrived() -> bool:
        lengths.extend(length for _, length in ring.used())
        return 111 in lengths

    card.wait(arrived)


def test_a_full_backend_holds_the_guest_back_and_loses_nothing(card: Card) -> None:
    card.driver.start()
    frame = frame_of(8000)
    at = card.driver.put(HEADER + frame)
    ring = card.driver.queues[1]
    sent = 0
    while card.device.counters["tx_frames"] == sent:
        ring.add([(at, 12 + len(frame), False)])
        ring.notify()
        sent += 1
        ring.used()
        assert sent < 10_000
    # The last one waits; more come after it.
    for _ in range(3):
        ring.add([(at, 12 + len(frame), False)])
        ring.notify()
    assert card.device.counters["tx_frames"] < sent
    for _ in range(sent + 3):
        assert card.wire.receive() == frame
    with card.bench.board.lock:  # the thread counts a frame after it has gone
        assert card.device.counters["tx_frames"] == sent + 3


def test_the_link_goes_down_with_the_backend(card: Card) -> None:
    card.driver.start()
    card.wire.end.close()
    card.wait(lambda: card.driver.read(4, 6, 2) == 0)
    assert card.device.describe()["link"] == "down"
    card.driver.request([HEADER + frame_of(60)], [], queue=1)
    assert card.device.counters["tx_dropped"] == 1


def test_a_backend_that_sends_nonsense_is_ended(card: Card) -> None:
    card.driver.start()
    card.wire.end.sendall(b"\xff\xff\xff\xff")
    card.wait(lambda: card.driver.read(4, 6, 2) == 0)


@settings(max_examples=40, deadline=None)
@given(
    buffers=st.lists(st.tuples(st.integers(0, SIZE + 5000), st.integers(0, 5000)), min_size=1, max_size=8),
    features=st.sampled_from([0, F_MRG_RXBUF, F_MRG_RXBUF | EVENT_IDX]),
    sizes=st.lists(st.integers(1, 3000), max_size=5),
)
def test_hostile_buffers(buffers: list[tuple[int, int]], features: int, sizes: list[int]) -> None:
    card = Card()
    try:
        card.driver.start(features)
        for ring in card.driver.queues.values():
            for address, length in buffers:
                ring.add([(address, length, ring.index == 0)])
        card.wire.send(*map(frame_of, sizes))
        for ring in card.driver.queues.values():
            ring.notify()

        def is_done() -> bool:
            device = card.device
            with card.bench.board.lock:
                done = device.counters["rx_frames"] + device.counters["rx_dropped"]
                return done == len(sizes) or device._starved or bool(device.status & NEEDS_RESET)

        until(is_done)
        assert card.device.status & 0x0F == 0x0F
    finally:
        card.close()  # which waits for the thread: it has ended without an exception, or pytest says so


@given(
    frames=st.lists(st.binary(min_size=1, max_size=80), max_size=6),
    nonsense=st.none() | st.just(0) | st.integers(MAX_FRAME + 1, (1 << 32) - 1),
    cuts=st.lists(st.integers(1, 50), max_size=10),
)
def test_a_stream_in_any_pieces(frames: list[bytes], nonsense: int | None, cuts: list[int]) -> None:
    """Frames come out as they went in; a length that none has is an OSError after them."""
    data = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)
    if nonsense is not None:
        data += struct.pack(">I", nonsense)
    wire = Wire()
    got, failed = [], False
    try:
        for cut in (*cuts, len(data)):
            piece, data = data[:cut], data[cut:]
            wire.end.sendall(piece)
            wire.backend.collect()
            while some := wire.backend.receive_all(4):
                got += some
    except OSError:
        failed = True
    finally:
        wire.end.close()
        wire.backend.close()
    assert got == frames
    assert failed == (nonsense is not None)


# ---- several pairs of queues


def udp(source: int, target: int, *, six: bool = False, note: bytes = b"") -> bytes:
    """From address and port `source` to `target`."""
    ports = struct.pack(">HHHH", source, target, 8 + len(note), 0) + note
    if six:
        head = struct.pack(">IHBB", 6 << 28, len(ports), 17, 64)
        return bytes(12) + b"\x86\xdd" + head + source.to_bytes(16, "big") + target.to_bytes(16, "big") + ports
    head = struct.pack(">BBHHHBBHII", 0x45, 0, 20 + len(ports), 0, 0x4000, 64, 17, 0, source, target)
    return bytes(12) + b"\x08\0" + head + ports


@pytest.fixture
def wide() -> Iterator[Card]:
    card = Card(cpus=3)
    yield card
    card.close()


def command(card: Card, what: bytes, queue: int = 6) -> bytes:
    return card.driver.request([what], [1], queue=queue)[0][0]


def send_by(card: Card, pair: int, frame: bytes) -> None:
    card.driver.request([HEADER + frame], [], queue=2 * pair + 1)
    assert card.wire.receive() == frame


def offer_room(card: Card, pair: int) -> int:
    """A buffer: where."""
    ring, where = card.driver.queues[2 * pair], card.driver.take(2048)
    ring.add([(where, 2048, True)])
    ring.notify()
    return where


def test_one_cpu_has_one_pair(card: Card) -> None:
    assert not card.driver.offered() & (F_MQ | F_CTRL_VQ)
    assert card.driver.read(4, 8, 2) == 1


def test_what_comes_of_a_flow_comes_where_it_was_sent_from(wide: Card) -> None:
    assert wide.driver.read(4, 8, 2) == 3
    wide.driver.start()
    assert command(wide, bytes((4, 0)) + struct.pack("<H", 3)) == b"\0"
    flows = {(port, six): port % 3 for port in range(1000, 1009) for six in (False, True)}
    for (port, six), pair in flows.items():
        send_by(wide, pair, udp(port, 53, six=six))
    where = {pair: offer_room(wide, pair) for pair in range(3)}
    for (port, six), pair in flows.items():
        answer = udp(53, port, six=six, note=b"answer")
        wide.wire.send(answer)
        done: list[tuple[int, int]] = []
        wide.wait(lambda pair=pair, done=done: bool(done.extend(wide.driver.queues[2 * pair].used()) or done))
        assert done[0][1] == len(HEADER + answer)
        assert wide.driver.get(where[pair] + 12, len(answer)) == answer
        for other in {0, 1, 2} - {pair}:
            assert wide.driver.queues[2 * other].used() == []
        where[pair] = offer_room(wide, pair)
    wide.wire.send(bytes(60))  # of no flow
    wide.wait(lambda: bool(wide.driver.queues[0].used()))


@pytest.mark.parametrize(
    "what", [b"\4\0\4\0", b"\4\0\0\0", b"\4\0\1", b"\4\0\1\0\0", b"\4\1\1\0", b"\0\0\1", b"\4\0\xff\xff", b"\1\0"]
)
def test_a_command_that_cannot_be_is_an_error(wide: Card, what: bytes) -> None:
    wide.driver.start()
    assert command(wide, b"\4\0\2\0") == b"\0"
    assert command(wide, what) == b"\1" and wide.device.pairs == 2
    assert not wide.driver.needs_reset


def test_a_command_without_its_class_or_room_needs_a_reset(wide: Card) -> None:
    wide.driver.start()
    ring = wide.driver.queues[6]
    ring.add([(wide.driver.put(b"\4"), 1, False), (wide.driver.take(1), 1, True)])
    ring.notify()
    assert wide.driver.needs_reset


def test_without_the_feature_queues_are_two(wide: Card) -> None:
    """Nobody looks at the others, and the control queue follows the first pair."""
    wide.driver.start(wide.driver.offered() & ~F_MQ)
    assert command(wide, b"\4\0\2\0", queue=2) == b"\1" and wide.device.pairs == 1
    ring = wide.driver.queues[3]
    ring.add([(wide.driver.put(HEADER + bytes(60)), 72, False)])
    ring.notify()
    assert ring.used() == []
    send_by(wide, 0, bytes(60))


def test_pairs_are_of_the_state_and_end_with_the_driver(wide: Card) -> None:
    wide.driver.start()
    assert command(wide, b"\4\0\3\0") == b"\0"
    state = wide.device.save()
    assert state.pairs == 3
    wide.driver.write(1, 20, 1, 0)
    assert wide.device.pairs == 1
    wide.device.check(state)
    wide.device.load(state)
    assert wide.device.pairs == 3
    wide.bench.board.cpu_count = 2
    with pytest.raises(Invalid):
        wide.device.check(state)


@given(frame=st.binary(max_size=80), kind=st.sampled_from([b"", b"\x08\0\x45", b"\x86\xdd\x60"]))
def test_no_frame_has_a_flow_that_fails(frame: bytes, kind: bytes) -> None:
    whole = bytes(12) + kind + frame
    sent, received = _flow(whole, sent=True), _flow(whole, sent=False)
    assert (sent is None) == (received is None)
    assert sent is None or len(sent) == len(received) in (13, 37)
