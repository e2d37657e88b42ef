"""Backends: where the frames of a network card go.

`Passt` is the program of that name (https://passt.top): it speaks to the guest as a router with DHCP, and to the world
by ordinary sockets, so it takes no rights. `Tap` is an interface of the host, and takes the right to open it.

Neither blocks, and neither is used by two threads at a time.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Protocol

MAX_FRAME = 65_535 + 14  # passt's packets have up to 65520 bytes
_LENGTH = struct.Struct(">I")  # passt's frames follow their length, as QEMU's stream sockets have it
_CHUNK = 1 << 18
# What a guest has not taken yet. A Linux guest offers up to 6 MiB a connection (net.ipv4.tcp_rmem), and passt loses
# frames when its socket is full: of an ARP reply, in Debian 12's, only the second half, which garbles all that follows.
_ROOM = 16 << 20


class Backend(Protocol):
    """`fd` is readable when a frame has come, and writable when one can be sent."""

    fd: int

    @property
    def has_room(self) -> bool:
        """Whether `collect` would keep frames that have come."""
        ...

    def collect(self) -> None:
        """Keep what has come for `receive`, as far as there is room, so that the other end need not wait."""
        ...

    @property
    def unsent(self) -> bool:
        """A part of a frame that was taken is still here: `flush` when `fd` is writable."""
        ...

    def flush(self) -> None: ...

    def send(self, frame: bytes) -> bool:
        """Take a frame. False when there is no room now. OSError when there will be none any more."""
        ...

    def receive(self) -> bytes | None:
        """A frame, or None when none has come. OSError when none will."""
        ...

    def describe(self) -> dict[str, str]: ...

    def close(self) -> None: ...


class Stream:
    """Frames, each behind its length in 32 bits, over a connected stream socket, which is closed with it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.fd = sock.fileno()
        self._in = bytearray()
        self._ended = False
        self._out = b""  # the rest of a frame that the socket took a part of

    @property
    def has_room(self) -> bool:
        return len(self._in) < _ROOM and not self._ended

    def collect(self) -> None:
        while self.has_room:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self._in += data
            self._ended = not data

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    def flush(self) -> None:
        try:
            done = self._socket.send(self._out)
        except BlockingIOError:
            done = 0
        self._out = self._out[done:]

    def send(self, frame: bytes) -> bool:
        if self._out:
            self.flush()
            if self._out:
                return False
        self._out = _LENGTH.pack(len(frame)) + frame
        self.flush()
        return True

    def receive(self) -> bytes | None:
        while True:
            if len(self._in) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._in)
                if not 0 < length <= MAX_FRAME:
                    raise OSError(f"a frame of {length} bytes")
                end = _LENGTH.size + length
                if len(self._in) >= end:
                    frame = bytes(self._in[_LENGTH.size : end])
                    del self._in[:end]
                    return frame
            before = len(self._in)
            self.collect()
            if len(self._in) == before:
                if self._ended:
                    raise OSError("the other end has closed the connection")
                return None

    def describe(self) -> dict[str, str]:
        return {"backend": "stream"}

    def close(self) -> None:
        self._socket.close()


class Passt(Stream):
    """A passt of its own, at the other end of the stream socket `fd`, with which it ends. `pid` is what `info` shows.
    """

    def __init__(self, fd: int, pid: int) -> None:
        super().__init__(socket.socket(fileno=fd))
        self._pid = pid

    def describe(self) -> dict[str, str]:
        return {"backend": "passt", "pid": str(self._pid)}


class Tap:
    """An interface of the host, by a descriptor of /dev/net/tun that is it, which is closed with it."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.unsent = False
        self.has_room = False  # the interface has a queue of its own
        os.set_blocking(fd, False)

    def collect(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def send(self, frame: bytes) -> bool:
        try:
            os.write(self.fd, frame)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EIO):
                raise
            # A frame that the kernel takes for none, or an interface that is down: as on a wire, it is lost.
        return True

    def receive(self) -> bytes | None:
        try:
            return os.read(self.fd, MAX_FRAME)
        except BlockingIOError:
            return None

    def describe(self) -> dict[str, str]:
        return {"backend": "tap", "interface": self.name}

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
