"""Backends: where the frames of a network card go.

`Passt` is the program of that name (https://passt.top): it speaks to the guest as a router with DHCP, and to the world
by ordinary sockets, so it takes no rights. `Tap` is an interface of the host, and takes the right to open it.

Neither blocks, and neither is used by two threads at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from typing import Any, Protocol

from vmfs.words.errors import Invalid, Unsupported

MAX_FRAME = 65_535 + 14  # passt's packets have up to 65520 bytes
_LENGTH = struct.Struct(">I")  # passt's frames follow their length, as QEMU's stream sockets have it
_CHUNK = 1 << 18
# What a guest has not taken yet. A Linux guest offers up to 6 MiB a connection (net.ipv4.tcp_rmem), and passt loses
# frames when its socket is full: of an ARP reply, in Debian 12's, only the second half, which garbles all that follows.
_ROOM = 16 << 20

# Linux include/uapi/linux/if_tun.h
TUNSETIFF = 0x4004_54CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
_NAME_LENGTH = 15
_NOBODY = 65_534


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
    """A passt of its own, which ends with it. It runs as `uid`, `gid` and `groups`; root's as nobody. `options` are
    more of passt's, as ("-t", "2222:22").

    Unsupported where passt is not installed or does not start, with what it said.
    """

    def __init__(self, *, uid: int, gid: int, groups: tuple[int, ...] = (), options: tuple[str, ...] = ()) -> None:
        program = shutil.which("passt")
        if program is None:
            raise Unsupported("passt is not installed (package passt)")
        if uid == 0:
            uid, gid, groups = _NOBODY, _NOBODY, ()
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            identity = {"user": uid, "group": gid, "extra_groups": groups}
        with contextlib.ExitStack() as kept, contextlib.ExitStack() as given:
            mine, its = socket.socketpair()
            kept.callback(mine.close)
            given.callback(its.close)
            ready_fd, pid_file = os.pipe()
            ready = kept.enter_context(open(ready_fd, "rb"))
            given.callback(os.close, pid_file)
            if identity:
                os.fchown(pid_file, uid, gid)
            said = kept.enter_context(tempfile.TemporaryFile())
            # It writes its number when it is ready; when it fails the pipe ends.
            self._process = subprocess.Popen(
                [program, "--foreground", "--quiet", "--stderr", "--fd", str(its.fileno()),
                 "--pid", f"/proc/self/fd/{pid_file}", *options],
                pass_fds=(its.fileno(), pid_file),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                cwd="/",
                **identity,
            )  # fmt: skip
            given.close()
            super().__init__(mine)
            is_ready = bool(ready.read(1))
            if not is_ready:
                self.close()
                said.seek(0)
                lines = [line for line in said.read().decode(errors="replace").splitlines() if "syslog" not in line]
                usage = next((at for at, line in enumerate(lines) if line.startswith("Usage:")), len(lines))
                why = " ".join(lines[:usage][-1:])[:200]
                raise Unsupported(f"passt does not start: {why or 'it does not say why'}")
            kept.pop_all()  # the socket is what stays
            ready.close()
            said.close()

    def describe(self) -> dict[str, str]:
        return {"backend": "passt", "pid": str(self._process.pid)}

    def close(self) -> None:
        super().close()
        self._process.kill()
        self._process.wait()


class Tap:
    """An interface of the host, by the descriptor that `open_tap` gave, which is closed with it."""

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


def open_tap(fd: int, name: str) -> Tap:
    """Make /dev/net/tun, open as `fd`, the tap interface `name`. The calling thread's user must have made or own the
    interface, or be its administrator. Closes `fd` when it fails."""
    try:
        if not 0 < len(name.encode()) <= _NAME_LENGTH or not name.isprintable() or "/" in name:
            raise Invalid(f"{name[:40]!r} is no interface's name")
        request = struct.pack("<16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
        try:
            fcntl.ioctl(fd, TUNSETIFF, request)
        except OSError as error:
            raise Unsupported(f"tap {name}: {os.strerror(error.errno or errno.EIO)} (TUNSETIFF)") from None
        return Tap(fd, name)
    except BaseException:
        os.close(fd)
        raise
