"""virtio-net: a network card, whose frames a backend carries.

Source: VIRTIO 1.2, section 5.1. No offloads: each frame is whole, with its checksums, as on a wire.

With several CPUs a driver may use several pairs of queues (5.1.6.5.5). What is received of a flow comes by the pair by
which the guest last sent of it; the rest by the first.

What the guest sends goes to the backend in the CPU's thread, at once; when the backend has no room, a thread goes on as
soon as it has. That thread also brings what arrives, with the board's lock held. What the guest has no buffers for
waits in the backend, or is lost.

While inputs have times (`vmfs.devices.inputs`), what the guest sees comes of it and of inputs alone: a frame that
arrives and the end of the link are inputs; a frame that is sent is taken at once, and waits here for the backend. The
card has room for one frame that the guest has no buffer for; others that come meanwhile are lost. In a machine's past
nothing is sent, and what arrives waits in the backend.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections import deque
from typing import Annotated, Any, ClassVar

import msgspec

from vmfs.devices.device import Port
from vmfs.devices.virtio.backends import MAX_FRAME, Backend
from vmfs.devices.virtio.pci import FIRST_DEVICE, VirtioDevice, VirtioState
from vmfs.devices.virtio.queue import Chain, DriverError, Virtqueue
from vmfs.words.errors import Invalid

F_MAC, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_MQ = 1 << 5, 1 << 15, 1 << 16, 1 << 17, 1 << 22
_STATUS_LINK_UP = 1

# struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
_HEADER = struct.Struct("<BBHHHHH")
MOST_PAIRS = 4
_PAIR = 2  # queues: of it the first one receives
_CONTROL = _PAIR * MOST_PAIRS  # the last of QUEUES; where it is for a driver, `_control` says
_CTRL_MQ, _PAIRS_SET = 4, 0
_OK, _ERR = b"\0", b"\1"
_FLOWS = 1024  # that are remembered
_POSTED_MOST = 8 << 20  # bytes that wait for the backend
_PAST = 100  # milliseconds after which a thread looks whether a machine is in its past any more
_BATCH = 64  # frames a turn with the lock held, so that the CPU is not kept from its devices


class NetState(VirtioState):
    """`frame` has arrived, and the guest has no buffer for it yet. What the backend has not given, or not taken, is on
    the wire, where frames may be lost. `pairs`: of queues, that the driver uses; by which a flow comes is forgotten."""

    VERSION: ClassVar[int] = 3

    mac: Annotated[bytes, msgspec.Meta(min_length=6, max_length=6)]
    pairs: Annotated[int, msgspec.Meta(ge=1, le=MOST_PAIRS)]
    frame: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME)] | None
    link_up: bool


class Net(VirtioDevice[NetState]):
    """A card with the address `mac` (six bytes), and `backend`, which is closed with it."""

    TYPE = "virtio-net"
    INPUTS = "frame", "link"  # that has arrived; the end of the link
    STATE = NetState
    DEVICE = FIRST_DEVICE + 1
    CLASS = 0x020000
    QUEUES = (256,) * _CONTROL + (64,)

    def __init__(self, board: Port, name: str, slot: int, backend: Backend, mac: bytes) -> None:
        if len(mac) != 6 or mac[0] & 1:
            raise Invalid("a network card's address is six bytes, and none of a group (the first one is even)")
        self.backend = backend
        self.mac = mac
        self.link_up = backend.is_plugged
        self._frame: bytes | None = None  # arrived, and no buffer for it yet
        self.pairs = 1  # that the driver uses
        self._flows: dict[bytes, int] = {}  # as the guest receives them -> their pair
        self._starved = False  # frames may wait in the backend for buffers
        self._blocked = False  # frames of the guest wait for room in the backend
        self._is_timed = self._ends = False  # inputs have times; the end of the link is one that has not come yet
        self._posted: deque[bytes] = deque()  # frames that were sent, and that the backend has not taken
        self._posted_size = 0
        self._closing = False
        self._asleep = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        try:
            super().__init__(board, name, slot)
        except BaseException:
            os.close(self._wake)
            raise

    def features(self) -> int:
        features = F_MAC | F_STATUS | F_MRG_RXBUF
        return features | F_CTRL_VQ | F_MQ if self._most_pairs > 1 else features

    @property
    def _most_pairs(self) -> int:
        return min(self.board.cpu_count, MOST_PAIRS)

    @property
    def _control(self) -> int:
        """The control queue's number (5.1.2); _CONTROL + 1: the driver has none."""
        if not self.has(F_CTRL_VQ):
            return _CONTROL + 1
        return _PAIR * self._most_pairs if self.has(F_MQ) else _PAIR

    def device_config(self) -> bytes:
        return struct.pack("<6sHH", self.mac, _STATUS_LINK_UP if self.link_up else 0, self._most_pairs)

    def started(self) -> None:
        self._starved = self._blocked = False
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._work, name=f"vmfs-{self.name}", daemon=True)
            self._thread.start()
        self._wake_up()

    def stopped(self) -> None:
        self._frame = None
        self._starved = self._blocked = False
        self.pairs = 1
        self._flows.clear()
        self._wake_up()

    def notified(self, queue: Virtqueue) -> None:
        if queue.index == self._control:
            self.serve(queue, self._command)
        elif queue.index >= _PAIR * self.pairs:
            pass
        elif queue.index % _PAIR:
            if self._blocked:
                self._wake_up()  # it may have been held back meanwhile by more than the backend
            else:
                self._transmit(queue)
        elif self._is_timed:
            self._bring()
        elif self._starved:
            self._starved = False
            self._wake_up()

    def _command(self, chain: Chain) -> int:
        """Of the control queue (5.1.6.5): there is one."""
        command = chain.read(0, 5)
        if len(command) < 2 or not chain.writable_length:
            raise DriverError("a command without its class, or without room for an answer")
        answer = _ERR
        if command[:2] == bytes((_CTRL_MQ, _PAIRS_SET)) and len(command) == 4 and self.has(F_MQ):
            pairs = int.from_bytes(command[2:], "little")
            if 1 <= pairs <= self._most_pairs:
                self.pairs, answer = pairs, _OK
                self._starved = False
                self._wake_up()
        return chain.write(answer)

    # ---- to the backend

    def _transmit(self, queue: Virtqueue) -> None:
        """Send what waits, as far as the backend takes it."""
        self._blocked = False
        while True:
            while not self._blocked and (chain := queue.pop()) is not None:
                length = chain.readable_length - _HEADER.size
                if length < 0:
                    raise DriverError("a frame without its header")
                frame = chain.read(_HEADER.size, MAX_FRAME + 1)
                if self.pairs > 1:
                    self._note_flow(frame, queue.index // _PAIR)
                if not self._send_one(chain.read(0, _HEADER.size), frame):
                    self._blocked = True
                    queue.unpop()
                else:
                    queue.push(chain, 0)
            if self._blocked:
                break
            queue.want_notifications()
            if not queue.pending():
                break
        if self._blocked or self.backend.unsent or self._posted:
            self._wake_up()
        self.tell(queue)

    def _note_flow(self, frame: bytes, pair: int) -> None:
        flow = _flow(frame, sent=True)
        if flow is None:
            return
        if len(self._flows) >= _FLOWS and flow not in self._flows:
            del self._flows[next(iter(self._flows))]
        self._flows[flow] = pair

    def _queue_for(self, frame: bytes) -> Virtqueue:
        if self.pairs > 1 and not self._is_timed and (flow := _flow(frame, sent=False)) is not None:
            pair = self._flows.get(flow, 0)
            queue = self.queues[_PAIR * pair]
            if pair < self.pairs and queue.enabled:
                return queue
        return self.queues[0]

    def _send_one(self, header: bytes, frame: bytes) -> bool:
        """False when it is to be tried again later."""
        flags, gso = header[0], header[1]
        if flags or gso or not 14 <= len(frame) <= MAX_FRAME:
            self.counters["tx_bad"] += 1  # asks for what was not offered, or is no frame
            return True
        if not self.link_up:
            self.counters["tx_dropped"] += 1
            return True
        if self._is_timed or self._posted:
            self._post(frame)
            return True
        try:
            if not self.backend.send(frame):
                return False
        except OSError:
            self._link_down()
            self.counters["tx_dropped"] += 1
            return True
        self.counters["tx_frames"] += 1
        self.counters["tx_bytes"] += len(frame)
        return True

    def _post(self, frame: bytes) -> None:
        """Have it sent by the thread, unless that was done before, or there is no room."""
        self.counters["tx_frames"] += 1
        self.counters["tx_bytes"] += len(frame)
        if self.board.is_silent:
            return
        if self._posted_size + len(frame) > _POSTED_MOST:
            self.counters["tx_lost"] += 1
            return
        self._posted.append(frame)
        self._posted_size += len(frame)

    def _go_on_sending(self) -> None:
        try:
            if self.backend.unsent and self.link_up:
                self.backend.flush()
            while self._posted and self.link_up and self.backend.send(self._posted[0]):
                self._posted_size -= len(self._posted.popleft())
        except OSError:
            self._end_link()
        if self._blocked and self.is_live:
            for index in range(1, _PAIR * self.pairs, _PAIR):
                if self.queues[index].enabled:
                    self._transmit(self.queues[index])
                if self._blocked:
                    break

    # ---- from the backend

    def _work(self) -> None:
        try:
            self._carry()
        finally:
            self._free()

    def _carry(self) -> None:
        more = False
        while True:
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            with self.board.lock:
                is_sending = self._blocked and self.is_live or self.backend.unsent or bool(self._posted)
                is_receiving = not self._holds_back() or self.backend.collects
                in_past = self._is_timed and self.board.is_silent
                if self._asleep:
                    is_sending = is_receiving = False
                elif in_past or self._ends:
                    is_receiving = False
                events = (select.POLLIN if is_receiving else 0) | (select.POLLOUT if is_sending else 0)
                if events and self.link_up:
                    poller.register(self.backend.fd, events)
            poller.poll(0 if more else _PAST if in_past else None)
            lost = self.backend.collect()  # before it waits for the lock
            with self.board.lock:
                if self._closing:
                    return
                _drain(self._wake)
                self._count_lost(lost)
                if self._asleep:
                    more = False
                    continue
                with self.guarded():
                    self._go_on_sending()
                    more = self._enter() if self._is_timed else self._receive()

    def _holds_back(self) -> bool:
        """Frames that arrive are to wait."""
        if self._is_timed:
            return self._frame is not None or self.board.inputs.new >= _BATCH
        return self._starved

    def _enter(self) -> bool:
        """What has arrived comes in, as inputs. True when there is more."""
        count = 0
        while not self._holds_back() and self.link_up and not self._ends and not self.board.is_silent:
            self._count_lost(self.backend.collect())
            try:
                frame = self.backend.receive()
            except OSError:
                self._end_link()
                break
            if frame is None:
                break
            self.board.inputs.enter(self, "frame", frame)
            count += 1
        return count == _BATCH

    def check_input(self, kind: str, data: bytes) -> None:
        super().check_input(kind, data)
        if len(data) > MAX_FRAME:
            raise Invalid(f"{self.name}: a frame has up to {MAX_FRAME} bytes, and not {len(data)}")

    def input(self, kind: str, data: bytes) -> None:
        if kind == "link":
            self._ends = False
            with self.guarded():
                self._link_down()
        elif not (self.is_live and self.queues[0].enabled) or self._frame is not None:
            self.counters["rx_dropped"] += 1
        else:
            self._frame = data
            self._bring()
        self._wake_up()

    def _bring(self) -> None:
        """The frame that has come, to the guest, if it has a buffer."""
        if self._frame is None:
            return
        with self.guarded():
            if self._deliver(self.queues[0], self._frame):
                self._frame = None
                self._wake_up()
            self.tell(self.queues[0])

    def inputs_have_times(self, they_have: bool) -> None:
        self._is_timed, self._starved = they_have, False
        if they_have and self.is_live:
            with self.guarded():
                if self._blocked:
                    for index in range(1, _PAIR * self.pairs, _PAIR):
                        if self.queues[index].enabled:
                            self._transmit(self.queues[index])
                self._bring()
        self._wake_up()

    def _count_lost(self, frames: int) -> None:
        if frames:
            self.counters["rx_dropped"] += frames

    def _receive(self) -> bool:
        """Bring what has arrived to the guest, or nowhere while it has no driver. True when there is more."""
        is_live = self.is_live and self.queues[0].enabled
        used: dict[Virtqueue, None] = {}  # in order
        count = 0
        while count < _BATCH and not self._starved and self.link_up:
            self._count_lost(self.backend.collect())  # at each frame: passt sends faster than a guest receives
            if self._frame is None:
                try:
                    self._frame = self.backend.receive()
                except OSError:
                    self._link_down()
                    break
            if self._frame is None:
                break
            if not is_live:
                self.counters["rx_dropped"] += 1
            else:
                queue = self._queue_for(self._frame)
                used[queue] = None
                if not self._deliver(queue, self._frame):
                    self._starved = True
                    break
            self._frame = None
            count += 1
        for queue in used:
            self.tell(queue)
        return count == _BATCH

    def _deliver(self, queue: Virtqueue, frame: bytes) -> bool:
        """Give a frame to the guest. False when it has no buffers, and has been asked to notify when it has."""
        size = _HEADER.size + len(frame)
        chains = self._take(queue, size)
        while chains is None:
            waiting = queue.pending()
            queue.want_notifications()
            if queue.pending() == waiting:
                return False
            chains = self._take(queue, size)
        if sum(chain.writable_length for chain in chains) < size:
            for chain in chains:
                queue.push(chain, 0)
            self.counters["rx_dropped"] += 1  # longer than the buffers that the driver chose
            return True
        data = memoryview(_HEADER.pack(0, 0, 0, 0, 0, 0, len(chains)) + frame)
        for chain in chains:
            done = chain.write(data)
            data = data[done:]
            queue.push(chain, done)
        self.counters["rx_frames"] += 1
        self.counters["rx_bytes"] += len(frame)
        return True

    def _take(self, queue: Virtqueue, size: int) -> list[Chain] | None:
        """The buffers for a frame: one, or, where they may be merged, as many as it takes. None: there are too few
        now."""
        chains: list[Chain] = []
        room = 0
        most = queue.size if self.has(F_MRG_RXBUF) else 1
        while room < size and len(chains) < most:
            chain = queue.pop()
            if chain is None:
                for _ in chains:
                    queue.unpop()
                return None
            if chain.writable_length < _HEADER.size:
                raise DriverError(f"a receive buffer of {chain.writable_length} bytes")
            chains.append(chain)
            room += chain.writable_length
        return chains

    def _end_link(self) -> None:
        """The backend has ended."""
        if not self._is_timed:
            self._link_down()
        elif not self._ends:
            self._ends = True
            self.board.inputs.enter(self, "link", b"")

    def _link_down(self) -> None:
        """The backend has ended: so has the link, which the guest sees."""
        if self.link_up:
            self.link_up = False
            self.counters["backend_ended"] += 1
            self.config_changed()

    def _wake_up(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)

    # ---- life

    def save_own(self) -> dict[str, Any]:
        return {"mac": self.mac, "pairs": self.pairs, "frame": self._frame, "link_up": self.link_up}

    def check_own(self, state: NetState) -> None:
        if state.mac[0] & 1:
            raise Invalid(f"{self.name}: {state.mac.hex(':')} is the address of a group")
        if state.pairs > self._most_pairs:
            raise Invalid(f"{self.name}: it has {self._most_pairs} pairs of queues")

    def load_own(self, state: NetState) -> None:
        """The link is as its backend is: a driver that knew another is told; by an input, while these have times."""
        self.mac, self.pairs, self._frame = state.mac, state.pairs, state.frame
        if self._is_timed:
            self.link_up, self._ends = state.link_up, False

    def load(self, state: NetState) -> None:
        super().load(state)
        if state.link_up != self.link_up:
            self.config_changed()

    def sleep(self) -> None:
        self._asleep = True  # its thread works with the board's lock held, which the caller has

    def wake(self) -> None:
        self._asleep = False
        self._wake_up()

    def describe(self) -> dict[str, str]:
        return {
            **super().describe(),
            "mac": self.mac.hex(":"),
            "link": "up" if self.link_up else "down",
            **self.backend.describe(),
        }

    def close(self) -> None:
        # The thread may wait for the board's lock, which the caller holds: it ends by itself, and closes the backend.
        with self.board.lock:
            if self._closing:
                return
            self._closing = True
            if self._thread is None:
                self._free()
            else:
                self._wake_up()

    def _free(self) -> None:
        self.backend.close()
        os.close(self._wake)


def _flow(frame: bytes, *, sent: bool) -> bytes | None:
    """What all frames of a flow of TCP or UDP have, as they are received; one that is sent has it the other way round.
    None for another frame, a fragment, or one with IP options."""
    kind = frame[12:14]
    if kind == b"\x08\0" and frame[14:15] == b"\x45" and not int.from_bytes(frame[20:22], "big") & 0x3FFF:
        protocol, addresses, length, ports = frame[23:24], 26, 4, 34
    elif kind == b"\x86\xdd":
        protocol, addresses, length, ports = frame[20:21], 22, 16, 54
    else:
        return None
    if protocol not in (b"\x06", b"\x11") or len(frame) < ports + 4:
        return None
    source, target = frame[addresses : addresses + length], frame[addresses + length : addresses + 2 * length]
    from_, to = frame[ports : ports + 2], frame[ports + 2 : ports + 4]
    if sent:
        source, target, from_, to = target, source, to, from_
    return protocol + source + target + from_ + to


def _drain(fd: int) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        pass
