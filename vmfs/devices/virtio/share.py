"""virtio-9p: a folder of the host, which the guest mounts by its tag.

Source: VIRTIO 1.2, section 5, reserves the device type (9); its queue carries whole 9P messages, and its configuration
is the tag, as in Linux (net/9p/trans_virtio.c, include/uapi/linux/virtio_9p.h).

A thread of its own, which has the rights of whoever attached the folder, does what the guest asks; the CPU's thread
waits for it. So a request is done when its notification is, and none is under way between two instructions.
"""

from __future__ import annotations

import queue
import struct
import threading
from collections.abc import Callable
from typing import Any

from vmfs.devices.board import Board
from vmfs.devices.virtio.ninep import ERROR, HEADER, MAX_MESSAGE, Server
from vmfs.devices.virtio.pci import FIRST_DEVICE, VirtioDevice
from vmfs.devices.virtio.queue import Chain, DriverError, Virtqueue
from vmfs.words.errors import Invalid

F_MOUNT_TAG = 1
_MAX_TAG = 36  # Linux refuses longer ones
_SMALLEST_ANSWER = 11  # an error

As = Callable[[Callable[[], Any]], Any]


class Share(VirtioDevice):
    """The folder of `server`. `as_owner(work)` does `work`, which does not end before the device is closed, with the
    rights that it is to have; what it raises comes out of here. The server is closed with the device."""

    TYPE = "virtio-9p"
    DEVICE = FIRST_DEVICE + 9
    CLASS = 0x018000
    QUEUES = (128,)

    def __init__(
        self, board: Board, name: str, slot: int, server: Server, tag: str, as_owner: As, *, path: str = ""
    ) -> None:
        if not 0 < len(tag.encode()) <= _MAX_TAG or not tag.isprintable() or "," in tag:
            raise Invalid(f"a share's tag has up to {_MAX_TAG} letters and no comma, not {tag[:50]!r}")
        self.tag = tag
        self.path = path  # what `info` shows
        self.server = server
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._as_owner = as_owner
        self._thread = threading.Thread(target=self._run, name=f"vmfs-{name}", daemon=True)
        super().__init__(board, name, slot)
        self._thread.start()
        self._do(lambda: None)

    def features(self) -> int:
        return F_MOUNT_TAG

    def device_config(self) -> bytes:
        tag = self.tag.encode()
        return struct.pack("<H", len(tag)) + tag

    def stopped(self) -> None:
        self._do(self.server.forget)

    def notified(self, queue: Virtqueue) -> None:
        self.serve(queue, self._answer)

    def _answer(self, chain: Chain) -> int:
        request = chain.read(0, MAX_MESSAGE + 1)
        room = chain.writable_length
        if len(request) < HEADER.size or room < _SMALLEST_ANSWER:
            raise DriverError("a 9P request that is shorter than its header, or without room for an answer")
        answer = self._do(lambda: self.server.handle(request, room))
        self.counters["requests"] += 1
        if answer[4] == ERROR:
            self.counters["errors.9p"] += 1
        return chain.write(answer)

    # ---- the thread that has the rights

    def _do(self, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises, there."""
        self._work.put(work)
        result = self._done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self) -> None:
        try:
            self._as_owner(self._loop)
        except BaseException as error:  # it could not have the rights: so says the first `_do`
            self._done.put(error)

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                self._done.put(work())
            except BaseException as error:
                self._done.put(error)

    # ---- life

    def save(self) -> dict[str, Any]:
        """The fids by their paths; not the files, which are the host's."""
        return {**super().save(), "server": self._do(self.server.save)}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._do(lambda: self.server.load(state["server"]))

    def describe(self) -> dict[str, str]:
        mode = "ro" if self.server.read_only else "rw"
        return {**super().describe(), "path": self.path, "tag": self.tag, "mode": mode}

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()
        self.server.close()
