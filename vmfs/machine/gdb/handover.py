"""A program that may write a machine's `gdb.stream` gives the server the socket at which its gdb is.

The program asks over the stream, with a packet. The answer is the name of a socket in the abstract namespace and a
secret, for the names of such sockets are everybody's to see. It connects there, and sends the secret and its
descriptor. The session ends with that connection, and the connection with the session.

Source: unix(7), "Abstract sockets", SCM_RIGHTS.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import socket
import stat
import struct
from collections.abc import Callable

from vmfs.words.door import Listening

QUERY = b"qvmfs.Socket"  # and after a colon the words of a layout, with commas
_REPLY = re.compile(rb"([0-9a-f]{32}),([0-9a-f]{32})")
_BYTES = 16


class Offer:
    """The machine's side, of one socket. `listen` makes a listening socket at an address, by the machine's door."""

    def __init__(self, listen: Callable[[str], Listening]) -> None:
        self._name, self._secret = secrets.token_bytes(_BYTES).hex(), secrets.token_bytes(_BYTES).hex()
        self.listening = socket.socket(fileno=listen(_address(self._name)).fd)
        self.listening.setblocking(False)

    @property
    def text(self) -> bytes:
        """The answer to the query."""
        return f"{self._name},{self._secret}".encode()

    def take(self, connection: socket.socket) -> socket.socket | None:
        """The socket that was sent over a connection that is readable, or None: whoever sent that is not the one who
        asked, or it is no socket to speak over."""
        fds: list[int] = []
        try:
            said, fds, _, _ = socket.recv_fds(
                connection, len(self._secret), 1, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
            if not fds or not hmac.compare_digest(said, self._secret.encode()) or not is_stream(fds[0]):
                return None
            return socket.socket(fileno=fds.pop(0))
        except OSError:
            return None
        finally:
            for fd in fds:
                os.close(fd)


def send(reply: bytes, fd: int) -> socket.socket | None:
    """The program's side: the connection that lasts as long as the session, or None where there is no way to the
    server, which may be in another network namespace."""
    found = _REPLY.fullmatch(reply)
    if not found:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(_address(found[1].decode()))
        socket.send_fds(connection, [found[2]], [fd])
    except OSError:
        connection.close()
        return None
    return connection


def peer_of(connection: socket.socket) -> int:
    """The effective user id of the process that has connected."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid


def is_stream(fd: int) -> bool:
    """Whether it is a connected stream socket."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as one:
        try:
            one.getpeername()
        except OSError:
            return False
        return one.type == socket.SOCK_STREAM


def _address(name: str) -> str:
    return f"\0vmfs-gdb-{name}"
