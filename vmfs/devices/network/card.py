"""Card: what every network card does, whatever its driver sees of it: it carries frames between the driver's buffers
and a backend.

What the guest sends goes to the backend in the CPU's thread, at once; when the backend has no room, a thread goes on as
soon as it has. That thread also brings what arrives, with the board's lock held. What the guest has no buffers for
waits in the backend, or is lost.

While inputs have times (`vmfs.devices.inputs`), what the guest sees comes of it and of inputs alone: a frame that
arrives and the end of the link are inputs; a frame that is sent is taken at once, and waits here where the backend has
no room. The card has room for one frame that the guest has no buffer for; others that come meanwhile are lost. In a
machine's past nothing is sent, and what arrives waits in the backend.
"""

from __future__ import annotations

import os
import select
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypeVar

from vmfs.devices.device import Device, DeviceState
from vmfs.devices.network import offload
from vmfs.devices.network.backends import Backend, Passt
from vmfs.devices.network.capture import Capture
from vmfs.words.errors import Invalid
from vmfs.words.nets import LEAST_FRAME, MAX_FRAME

_POSTED_MOST = 8 << 20  # bytes that wait for the backend
_PAST = 100  # milliseconds after which a thread looks whether a machine is in its past any more
_NUDGE = 10  # milliseconds
_BATCH = 64  # frames a turn with the lock held, so that the CPU is not kept from its devices
_SENDS = 256  # frames that are given to the backend at a time

S = TypeVar("S", bound=DeviceState)


class Card(Device[S]):
    """Comes first among the bases of a card, whose constructor calls `plug_in` before any other. STATE has `mac`,
    `frame` and `link_up`: what the backend has not given, or not taken, is on the wire, where frames may be lost."""

    INPUTS = "frame", "link"  # that has arrived; the end of the link
    # It takes seconds for what a connection may send at once. passt sends all of that again after two, and again, so
    # with passt the windows of connections that the guest opens are kept small.
    IS_SLOW = False
    # While frames wait for buffers, or to be read, the driver is told again and again: those of such cards clear the
    # interrupt of what they have not looked at yet, and go by the next frame's.
    NUDGES = False

    def plug_in(self, backend: Backend, mac: bytes) -> None:
        """The card's address `mac` (six bytes), and `backend`, which is closed with it."""
        if len(mac) != 6 or mac[0] & 1:
            raise Invalid("a network card's address is six bytes, and none of a group (the first one is even)")
        self.backend = backend
        self.mac = mac
        self._narrows = self.IS_SLOW and isinstance(backend, Passt)
        self.link_up = backend.is_plugged
        self.capture: Capture | None = None
        self._frame: bytes | None = None  # arrived, and no buffer for it yet
        self._starved = False  # frames may wait in the backend for buffers
        self._blocked = False  # frames of the guest wait for room in the backend
        self._is_timed = self._ends = False  # inputs have times; the end of the link is one that has not come yet
        self._keeps = False  # the thread reads nothing from the backend until it is told to go on
        self._held: deque[bytes] = deque()  # frames after `_frame`, which were taken from the backend with it
        self._posted: deque[bytes] = deque()  # frames that were sent, and that the backend has not taken
        self._posted_size = 0
        self._closing = False
        self._asleep = False
        self._wake = -1
        self._taking = threading.Lock()  # of what has come: the thread collects without the board's lock
        self._thread: threading.Thread | None = None

    # ---- what a card says

    @property
    @abstractmethod
    def listens(self) -> bool:
        """Whether a driver takes frames; else those that come are lost."""

    @property
    @abstractmethod
    def sends(self) -> bool:
        """Whether what the guest has to send may be looked at."""

    @abstractmethod
    def deliver(self, frame: bytes) -> bool:
        """Give a frame to the guest, or let it go. False when it has no buffers, and `buffers_came` will be called."""

    def deliver_all(self, frames: list[bytes]) -> int:
        """Give frames to the guest, or let them go, as far as there are buffers. Returns how many."""
        for number, frame in enumerate(frames):
            if not self.deliver(frame):
                return number
        return len(frames)

    @abstractmethod
    def delivered(self) -> None:
        """`deliver` was called, some times: the driver is to hear of it."""

    @abstractmethod
    def send_on(self) -> None:
        """Send what waits, while it is not `_blocked`."""

    @abstractmethod
    def link_changed(self) -> None:
        """The driver is to hear of `link_up`."""

    def has_unread(self) -> bool:
        """Of a card that NUDGES: whether its driver has frames that it has not read."""
        return False

    def tell_again(self) -> None:  # noqa: B027
        """Of these."""

    def guarded(self) -> AbstractContextManager[None]:
        """Around all that the thread does with what is the driver's."""
        return nullcontext()

    # ---- what a card uses

    def mapped_ram(self) -> Any:
        """For C, which takes what is not mapped for none."""
        assert self.board.ram is not None  # to ask maps it
        return self.board.ram_chip

    def begin_carrying(self) -> None:
        """A driver is there."""
        self._starved = self._blocked = False
        if self._thread is None and not self._closing:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.Thread(target=self._work, name=f"vmfs-{self.name}", daemon=True)
            self._thread.start()
        self._wake_up()

    def forget_frames(self) -> None:
        """There is no driver any more."""
        self._frame = None
        self._held.clear()
        self._starved = self._blocked = False
        self._wake_up()

    def buffers_came(self) -> None:
        """The driver has given buffers to receive into."""
        if self._is_timed:
            self._bring()
        elif self._starved:
            self._starved = False
            self._wake_up()

    def take_more(self) -> None:
        """The same, where the frames that wait are to come at once: to hand over to the thread costs more than they."""
        if self._is_timed or not self._starved:
            self.buffers_came()
        elif not self._asleep:
            self._starved = False
            with self.guarded():
                more = self._receive()
            if more:
                self._wake_up()

    def send_soon(self) -> None:
        """The driver has something to send, and what it had before waits for the backend, or for less."""
        self._wake_up()

    def send_all(self, frames: list[bytes]) -> None:
        """Send them, and keep those that the backend has no room for until it has: `_blocked` says so."""
        good = [frame for frame in frames if LEAST_FRAME <= len(frame) <= MAX_FRAME]
        if self._narrows:
            good = [offload.without_scale(frame) for frame in good]
        if len(good) < len(frames):
            self.counters["tx_bad"] += len(frames) - len(good)
        if not self.link_up:
            self.counters["tx_dropped"] += len(good)
            return
        done = 0
        if not self._is_timed and not self._posted:
            try:
                while done < len(good) and (count := self.backend.send_all(good[done : done + _SENDS])):
                    self._count_sent(good[done : done + count])
                    done += count
            except OSError:
                self._link_down()
                self.counters["tx_dropped"] += len(good) - done
                return
            self._blocked = done < len(good)
        self._post(good[done:])

    def sent(self) -> None:
        """After some calls of `send_all`."""
        if self._blocked or self.backend.unsent or self._posted:
            self._wake_up()

    def _count_sent(self, frames: list[bytes]) -> None:
        self.counters["tx_frames"] += len(frames)
        self.counters["tx_bytes"] += sum(map(len, frames))
        self._note(frames)

    def count_received(self, frames: list[bytes]) -> None:
        """The guest has got frames."""
        self.counters["rx_frames"] += len(frames)
        self.counters["rx_bytes"] += sum(map(len, frames))
        self._note(frames)

    def _note(self, frames: list[bytes]) -> None:
        if self.capture is not None and not self.board.is_silent:
            for frame in frames:
                if not self.capture.note(self.board.date(), frame):
                    self.counters["pcap_errors"] += 1

    def _post(self, frames: list[bytes]) -> None:
        """Send them, unless that was done before. What the backend has no room for the thread sends when it has, as far
        as there is room for it here."""
        self._count_sent(frames)
        if self.board.is_silent:
            return
        done = 0
        if self._is_timed and not self._posted:
            try:
                while done < len(frames) and (count := self.backend.send_all(frames[done : done + _SENDS])):
                    done += count
            except OSError:
                self._end_link()
                return
        for frame in frames[done:]:
            if self._posted_size + len(frame) > _POSTED_MOST:
                self.counters["tx_lost"] += 1
            else:
                self._posted.append(frame)
                self._posted_size += len(frame)

    @property
    def captured(self) -> str:
        """The file of its frames, and what ended it; `none` where there is none."""
        capture = self.capture
        if capture is None:
            return "none"
        return f"{capture.path} ended: {capture.failure}" if capture.failure else capture.path

    def set_capture(self, capture: Capture | None) -> None:
        """Where frames are kept from now on; what was there before is closed."""
        with self.board.lock:
            if self._closing and capture is not None:
                capture.close()
                return
            before, self.capture = self.capture, capture
        if before is not None:
            before.close()

    # ---- the thread

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
                is_sending = self._blocked and self.sends or self.backend.unsent or bool(self._posted)
                holds_back = self._holds_back()
                more = more or self._keeps and not holds_back
                self._keeps = self._is_timed and holds_back
                is_receiving = not holds_back or self.backend.collects
                in_past = self._is_timed and self.board.is_silent
                if self._asleep:
                    is_sending = is_receiving = False
                elif in_past or self._ends:
                    is_receiving = False
                events = (select.POLLIN if is_receiving else 0) | (select.POLLOUT if is_sending else 0)
                if events and self.link_up:
                    poller.register(self.backend.fd, events)
                nudges = self.NUDGES and not (self._asleep or self._is_timed) and (self._starved or self.has_unread())
                looks = nudges or self._keeps and self._frame is None  # what others have entered is too much
            came = poller.poll(0 if more else _PAST if in_past else _NUDGE if looks else None)
            lost = self._collect()  # before it waits for the lock
            with self.board.lock:
                if self._closing:
                    return
                if any(fd == self._wake for fd, _ in came):
                    _drain(self._wake)
                self._count_lost(lost)
                if self._asleep:
                    more = False
                    continue
                if nudges and not self._starved and self.has_unread():
                    self.tell_again()
                elif nudges:
                    self._starved = False
                with self.guarded():
                    self._go_on_sending()
                    more = self._enter() if self._is_timed else self._receive()

    def _go_on_sending(self) -> None:
        try:
            if self.backend.unsent and self.link_up:
                self.backend.flush()
            while self._posted and self.link_up:
                count = self.backend.send_all(list(islice(self._posted, _SENDS)))
                if not count:
                    break
                for _ in range(count):
                    self._posted_size -= len(self._posted.popleft())
        except OSError:
            self._end_link()
        if self._blocked and self.sends and not self._posted:
            self._blocked = False
            self.send_on()

    def _holds_back(self) -> bool:
        """Frames that arrive are to wait."""
        if self._is_timed:
            return self._frame is not None or self.board.inputs.new >= _BATCH
        return self._starved

    def _receive(self) -> bool:
        """Bring what has arrived to the guest, or nowhere while it has no driver. True when there is more."""
        listens, count = self.listens, 0
        while count < _BATCH and not self._starved and self.link_up:
            self._count_lost(self._collect())  # often: passt sends faster than a guest receives
            try:
                frames = self._fetch(_BATCH - count)
            except OSError:
                self._link_down()
                break
            if not frames:
                break
            count += len(frames)
            if not listens:
                self.counters["rx_dropped"] += len(frames)
                continue
            done = self.deliver_all(frames)
            if done < len(frames):
                self._starved = True
                self._frame = frames[done]
                self._held.extendleft(reversed(frames[done + 1 :]))
        self.delivered()
        return count >= _BATCH

    def _collect(self) -> int:
        with self._taking:
            return self.backend.collect()

    def _fetch(self, most: int) -> list[bytes]:
        """Frames that have come; the first one may have had no buffer before. OSError where none will."""
        frames = [] if self._frame is None else [self._frame]
        while self._held and len(frames) < most:
            frames.append(self._held.popleft())
        self._frame = None
        if not frames:
            with self._taking:
                frames = self.backend.receive_all(most)
        return frames

    def look(self) -> None:
        """The driver looks whether something has come, and may do so without end, while the thread hardly gets the
        lock."""
        if self._thread is not None and self.link_up and not (self._is_timed or self._asleep or self._starved):
            with self.guarded():
                self._receive()

    def _count_lost(self, frames: int) -> None:
        if frames:
            self.counters["rx_dropped"] += frames

    def _let_go_on(self) -> None:
        """The thread may bring what it has left where it was."""
        if self._keeps and not self._holds_back():
            self._keeps = False
            self._wake_up()

    def _wake_up(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)

    # ---- inputs that have times

    def _enter(self) -> bool:
        """What has arrived comes in, as inputs. True when there is more."""
        more = False
        if self.link_up and not (self._ends or self.board.is_silent or self._holds_back()):
            most = _BATCH - self.board.inputs.new
            try:
                frames = self._fetch(most)
            except OSError:
                frames = []
                self._end_link()
            if frames:
                self.board.inputs.enter_all(self, "frame", frames)
            more = len(frames) == most
        self._keeps = self._holds_back()
        return more

    def check_input(self, kind: str, data: bytes) -> None:
        super().check_input(kind, data)
        if len(data) > MAX_FRAME:
            raise Invalid(f"{self.name}: a frame has up to {MAX_FRAME} bytes, and not {len(data)}")

    def input(self, kind: str, data: bytes) -> None:
        self.input_all(kind, (data,))

    def input_all(self, kind: str, some: Sequence[bytes]) -> None:
        if kind == "link":
            self._ends = False
            with self.guarded():
                self._link_down()
        else:
            self._arrive(list(some))
        self._let_go_on()

    def _arrive(self, frames: list[bytes]) -> None:
        while frames:
            if not self.listens or self._frame is not None:
                self.counters["rx_dropped"] += 1
                if self.NUDGES and self.listens:
                    self._bring()
                del frames[0]
                continue
            done = len(frames)  # where the driver has done something that it may not, they are lost
            with self.guarded():
                done = self.deliver_all(frames)
                self.delivered()
            self._frame = frames[done] if done < len(frames) else None
            del frames[: done + 1]

    def _bring(self) -> None:
        """The frame that has come, to the guest, if it has a buffer."""
        if self._frame is None:
            return
        with self.guarded():
            if self.deliver(self._frame):
                self._frame = None
                self._let_go_on()
            self.delivered()

    def inputs_have_times(self, they_have: bool) -> None:
        self._is_timed, self._starved = they_have, False
        if they_have:
            with self.guarded():
                if self._blocked and self.sends:
                    self._blocked = False
                    self.send_on()
                if self.listens:
                    self._bring()
        self._wake_up()

    # ---- the link

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
            self.link_changed()

    # ---- life

    def check_card(self, mac: bytes) -> None:
        """Invalid for what cannot be in a state."""
        if mac[0] & 1:
            raise Invalid(f"{self.name}: {mac.hex(':')} is the address of a group")

    def load_card(self, mac: bytes, frame: bytes | None, link_up: bool) -> None:
        """The link is as its backend is: a driver that knew another is to be told; by an input, while these have
        times."""
        self.mac, self._frame = mac, frame
        if self._is_timed:
            self.link_up, self._ends = link_up, False

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
        self.set_capture(None)
        if self._wake >= 0:
            os.close(self._wake)


def _drain(fd: int) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        pass
