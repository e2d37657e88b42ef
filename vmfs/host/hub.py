"""Hub: the process of a wire. A frame that comes in at a port goes out at all others.

A port is a socket of packets to a machine, which is not trusted: what is no frame is lost, and one that does not take
what it gets loses what is beyond `_ROOM`; nobody waits for it. Ports come over `control`, of which each
is told as an end once it is closed; where the server closes that, the hub ends.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections import deque

from vmfs.words.nets import LEAST_FRAME, MAX_FRAME

_TURN = 64  # frames of a port, before the others have theirs
_ROOM = 1 << 20  # bytes that wait for a port
GONE = b"-"  # over `control`: a port is closed


class _Port:
    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.waiting: deque[bytes] = deque()
        self.size = 0

    def give(self, frame: bytes) -> None:
        if self.waiting:
            if self.size + len(frame) <= _ROOM:
                self.waiting.append(frame)
                self.size += len(frame)
        elif not self._send(frame):
            self.waiting.append(frame)
            self.size = len(frame)

    def flush(self) -> None:
        while self.waiting and self._send(self.waiting[0]):
            self.size -= len(self.waiting.popleft())

    def _send(self, frame: bytes) -> bool:
        try:
            self.socket.send(frame, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError:  # it is closed, or the host has no memory: the frame is lost
            pass
        return True

    def receive(self) -> bytes | None:
        """A packet; empty at the end. None when there is none."""
        try:
            return self.socket.recv(MAX_FRAME + 1)
        except BlockingIOError:
            return None
        except OSError:
            return b""


def serve(control: socket.socket) -> None:
    """Until the server closes `control`."""
    with contextlib.suppress(ConnectionError):  # it ends while it is told something
        _serve(control)


def _serve(control: socket.socket) -> None:
    ports: dict[int, _Port] = {}
    watched: dict[int, int] = {}
    poller = select.epoll()
    poller.register(control, select.EPOLLIN)
    while True:
        for fd, events in poller.poll():
            if fd == control.fileno():
                said, fds, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
                if not said:
                    return
                for new in fds:
                    port = _Port(socket.socket(fileno=new))
                    ports[new], watched[new] = port, select.EPOLLIN
                    poller.register(new, select.EPOLLIN)
                continue
            port = ports[fd]
            if events & select.EPOLLOUT:
                port.flush()
            if events & ~select.EPOLLOUT and not _carry(port, ports):
                poller.unregister(fd)
                del ports[fd], watched[fd]
                port.socket.close()
                control.send(GONE, socket.MSG_NOSIGNAL)
        for fd, port in ports.items():
            wanted = select.EPOLLIN | (select.EPOLLOUT if port.waiting else 0)
            if wanted != watched[fd]:
                watched[fd] = wanted
                poller.modify(fd, wanted)


def _carry(port: _Port, ports: dict[int, _Port]) -> bool:
    """Some frames of a port. False at its end."""
    for _ in range(_TURN):
        frame = port.receive()
        if frame is None:
            break
        if not frame:
            return False
        if LEAST_FRAME <= len(frame) <= MAX_FRAME:
            for other in ports.values():
                if other is not port:
                    other.give(frame)
    return True
