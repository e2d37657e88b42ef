"""Backends: where the frames of a network card go.

`Passt` is the program of that name (https://passt.top): it speaks to the guest as a router with DHCP, and to the world
by ordinary sockets, so it takes no rights. `Tap` is an interface of the host, and takes the right to open it. `Wire` is
a port of a wire between machines.

Neither blocks. Frames in one direction are for one thread at a time.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import deque
from typing import Protocol

from vmfs.devices import _chips
from vmfs.devices.network.offload import connection_begun
from vmfs.words.nets import LEAST_FRAME, MAX_FRAME

_LENGTH = struct.Struct(">I")  # passt's frames follow their length, as QEMU's stream sockets have it
_CHUNK = 1 << 18
_PACKETS = 256  # of a wire, that are collected at a time
# What a guest has not taken yet. A Linux guest offers up to 6 MiB a connection (net.ipv4.tcp_rmem). More would only
# make all wait for what passt sends again and again after a loss.
_ROOM = 8 << 20
_BEGUN_MOST = 1024  # connections
_CLOSED = "the other end has closed the connection"


class Backend(Protocol):
    """`fd` is readable when a frame has come, and writable when one can be sent. Not `is_plugged`: there is no link."""

    fd: int
    is_plugged: bool

    @property
    def collects(self) -> bool:
        """Whether `collect` may find something when `fd` is readable."""
        ...

    def collect(self) -> int:
        """Keep what has come for `receive`, so that the other end need not wait. Returns how many frames are lost,
        because there was no room for them."""
        ...

    @property
    def unsent(self) -> bool:
        """A part of a frame that was taken is still here: `flush` when `fd` is writable."""
        ...

    def flush(self) -> None: ...

    def send_all(self, frames: list[bytes]) -> int:
        """Take frames, from the first on. Returns for how many there is room now. OSError when there will be none any
        more."""
        ...

    def receive_all(self, most: int) -> list[bytes]:
        """Up to so many frames of those that have come. OSError when there is none, and there will be none."""
        ...

    def describe(self) -> dict[str, str]: ...

    def close(self) -> None: ...


class Unplugged:
    """No cable: what is sent is lost, and nothing comes."""

    is_plugged = collects = unsent = False

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def collect(self) -> int:
        return 0

    def flush(self) -> None:
        pass

    def send_all(self, frames: list[bytes]) -> int:
        return len(frames)

    def receive_all(self, most: int) -> list[bytes]:
        return []

    def describe(self) -> dict[str, str]:
        return {"backend": "unplugged"}

    def close(self) -> None:
        os.close(self.fd)


class _Collected:
    """A socket whose frames are taken from it as they come, and kept for the guest as far as there is room."""

    is_plugged = True

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.fd = sock.fileno()
        self._frames: deque[bytes] = deque()
        self._held = 0  # bytes in _frames
        self._end = ""  # why there will be no more

    @property
    def collects(self) -> bool:
        return not self._end

    def _keep(self, frame: bytes) -> bool:
        """False where there is no room for it."""
        if self._held + len(frame) > _ROOM:
            return False
        self._frames.append(frame)
        self._held += len(frame)
        return True

    def _take(self, buffer: memoryview) -> int:
        """How much has come, into `buffer`; 0 when nothing has, or will."""
        try:
            size = self._socket.recv_into(buffer)
        except BlockingIOError:
            return 0
        except OSError:
            size = 0
        if not size:
            self._end = _CLOSED
        return size

    def receive_all(self, most: int) -> list[bytes]:
        if not self._frames and self._end:
            raise OSError(self._end)
        frames = [self._frames.popleft() for _ in range(min(most, len(self._frames)))]
        self._held -= sum(map(len, frames))
        return frames

    def close(self) -> None:
        self._socket.close()


class Stream(_Collected):
    """Frames, each after its length in 32 bits, over a connected stream socket, which is closed with it.

    What the guest does not take is lost here and not left in the socket: passt takes no account of a full one. It loses
    the frames that do not fit (tap.c, tap_send_frames_passt), and of an ARP reply, in Debian 12's, only the second half
    (tap_send), which garbles all that follows.
    """

    UNPADS = False  # IPv4 goes without what drivers put after a short packet

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._in = bytearray()  # what has come of frames, which begin in it, and room; none before there is anything
        self._filled = 0
        self._out = b""  # the rest of a frame that the socket took a part of

    def collect(self) -> int:
        lost = 0
        self._in = self._in or bytearray(_CHUNK + _LENGTH.size + MAX_FRAME)
        for _ in range(_ROOM // _CHUNK):
            size = 0 if self._end else self._take(memoryview(self._in)[self._filled :])
            if not size:
                break
            frames, self._filled, nonsense = _chips.split(self._in, self._filled + size)
            if nonsense >= 0:
                self._end = f"a frame of {nonsense} bytes"
            lost += sum(not self._keep(frame) for frame in frames)
        return lost

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    def flush(self) -> None:
        try:
            done = self._socket.send(self._out)
        except BlockingIOError:
            done = 0
        self._out = self._out[done:]

    def send_all(self, frames: list[bytes]) -> int:
        if self._out:
            self.flush()
            if self._out:
                return 0
        count, self._out = _chips.send(self.fd, frames, self.UNPADS)
        return int(count)

    def describe(self) -> dict[str, str]:
        return {"backend": "stream"}


class Passt(Stream):
    """A passt of its own, at the other end of the stream socket `fd`, with which it ends. `pid` is what `info` shows.

    A guest that has had no answer for a second begins its connection again, with the same frame. passt, to which the
    first has come in any case, takes that for an error, and resets the connection (tcp.c, tcp_tap_handler). So such a
    frame is sent once.
    """

    UNPADS = True  # Debian 12's passt does not take an ACK with it

    def __init__(self, fd: int, pid: int) -> None:
        super().__init__(socket.socket(fileno=fd))
        self._pid = pid
        self._begun: dict[bytes, None] = {}  # connections, in order

    def send_all(self, frames: list[bytes]) -> int:
        at, begun = next(
            ((at, begun) for at, frame in enumerate(frames) if (begun := connection_begun(frame))), (len(frames), b"")
        )
        if at:
            return super().send_all(frames[:at])
        if begun in self._begun:
            return 1
        count = super().send_all(frames[:1])
        if count:
            self._begun[begun] = None
            if len(self._begun) > _BEGUN_MOST:
                del self._begun[next(iter(self._begun))]
        return count

    def describe(self) -> dict[str, str]:
        return {"backend": "passt", "pid": str(self._pid)}


class Wire(_Collected):
    """A port of a wire between machines (vmfs.host.hub): a socket of packets, each a frame. Others on the wire may send
    what they like."""

    unsent = False  # a packet is taken whole

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(socket.socket(fileno=fd))
        self._name = name
        self._packet = memoryview(bytearray(MAX_FRAME + 1))

    def collect(self) -> int:
        lost = 0
        for _ in range(_PACKETS):
            size = 0 if self._end else self._take(self._packet)
            if not size:
                break
            lost += not (LEAST_FRAME <= size <= MAX_FRAME and self._keep(bytes(self._packet[:size])))
        return lost

    def flush(self) -> None:
        pass

    def send_all(self, frames: list[bytes]) -> int:
        for count, frame in enumerate(frames):
            try:
                self._socket.send(frame, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return count
        return len(frames)

    def describe(self) -> dict[str, str]:
        return {"backend": "wire", "wire": self._name}


class Tap:
    """An interface of the host, by a descriptor of /dev/net/tun that is it, which is closed with it."""

    is_plugged = True

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.unsent = False
        self.collects = False  # the interface has a queue of its own
        os.set_blocking(fd, False)

    def collect(self) -> int:
        return 0

    def flush(self) -> None:
        pass

    def send_all(self, frames: list[bytes]) -> int:
        for count, frame in enumerate(frames):
            try:
                os.write(self.fd, frame)
            except BlockingIOError:
                return count
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EIO):
                    raise
                # A frame that the kernel takes for none, or an interface that is down: as on a wire, it is lost.
        return len(frames)

    def receive_all(self, most: int) -> list[bytes]:
        frames: list[bytes] = []
        try:
            while len(frames) < most:
                frames.append(os.read(self.fd, MAX_FRAME))
        except BlockingIOError:
            pass
        except OSError:
            if not frames:
                raise
        return frames

    def describe(self) -> dict[str, str]:
        return {"backend": "tap", "interface": self.name}

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
