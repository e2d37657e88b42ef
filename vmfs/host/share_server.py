"""The process of a shared folder: answers a machine's 9P messages with the rights of the user that attached it, and
with no others."""

from __future__ import annotations

import os
import socket

import msgspec

from vmfs.devices.virtio.ninep import Server
from vmfs.devices.virtio.share import FORGET, HANDLE, LOAD, SAVE, receive_frame, send_frame


def serve(root: int, line: socket.socket, *, read_only: bool, barred: int | None = None) -> None:
    """Until the other end is closed, or says what is no frame. `root`: an O_PATH descriptor of the folder. `barred`:
    the st_dev of a mount of which nothing is opened."""
    os.umask(0)
    server = Server(root, read_only=read_only, barred=barred)
    try:
        while True:
            what, data, room = receive_frame(line)
            send_frame(line, what, _answer(server, what, data, room))
    except (EOFError, OSError):
        pass
    finally:
        server.close()


def _answer(server: Server, what: int, data: bytes, room: int) -> bytes:
    if what == HANDLE:
        return server.handle(data, room)
    if what == FORGET:
        server.forget()
        return b""
    if what == SAVE:
        return msgspec.msgpack.encode(server.save())
    if what == LOAD:
        try:
            server.load(msgspec.msgpack.decode(data))
        except (KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
            return f"what was saved of the folder's server is none: {error!r}"[:200].encode()
        return b""
    raise EOFError("no frame")
