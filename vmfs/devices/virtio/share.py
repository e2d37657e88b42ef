"""virtio-9p: a folder of the host, which the guest mounts by its tag.

Source: VIRTIO 1.2, section 5, reserves the device type (9); its queue carries whole 9P messages, and its configuration
is the tag, as in Linux (net/9p/trans_virtio.c, include/uapi/linux/virtio_9p.h).

The folder is served by a process of its own, which has the rights of the user that attached it and no others
(`vmfs.host.share_server`); the CPU's thread waits for its answers. So a request is done when its notification is, and
none is under way between two instructions.

While inputs have times (`vmfs.devices.inputs`), each answer is recorded with what the server knows of its client after
it, and the server is asked only for what is new: in a machine's past nothing is done to the folder. Where a machine
goes on from its past, the server is first told what it was to know there.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any, Protocol

import msgspec

from vmfs.devices.device import U32, Port
from vmfs.devices.virtio.ninep import ERROR, HEADER, MAX_MESSAGE
from vmfs.devices.virtio.pci import FIRST_DEVICE, VirtioDevice, VirtioState
from vmfs.devices.virtio.queue import Chain, DriverError, Virtqueue
from vmfs.words.errors import EngineFailed, Invalid, VmfsError

F_MOUNT_TAG = 1
_MAX_TAG = 36  # Linux refuses longer ones
_SMALLEST_ANSWER = 11  # an error

# Between a RemoteServer and its process: a frame is its header and that many bytes more.
FRAME = struct.Struct("<BII")  # what it is; bytes that follow; of HANDLE, the room for the answer
HANDLE, FORGET, SAVE, LOAD = range(4)
_SIZE = struct.Struct("<I")  # of a recorded answer, which comes after it; then what the server knows, if that is new
# Requests after which the server knows the same: statfs, readlink, getattr, setattr, readdir, fsync, lock, getlock,
# read, write.
_KEEP_FIDS = frozenset((8, 22, 24, 26, 40, 50, 52, 54, 116, 118))
FRAME_MOST = 4 << 20  # a saved server has 4,096 paths at most; a 9P message is shorter


class FolderServer(Protocol):
    """What answers 9P messages: `vmfs.devices.virtio.ninep.Server`, or the process of one."""

    read_only: bool

    def handle(self, request: bytes, room: int) -> bytes: ...

    def forget(self) -> None: ...

    def save(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class RemoteServer:
    """A process that serves a folder, at the other end of the stream socket `fd`, which this owns. Calls block.

    EngineFailed when the process is gone.
    """

    def __init__(self, fd: int, *, read_only: bool) -> None:
        self.read_only = read_only
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)

    def handle(self, request: bytes, room: int) -> bytes:
        return self._ask(HANDLE, request, room)

    def forget(self) -> None:
        self._ask(FORGET)

    def save(self) -> dict[str, Any]:
        return msgspec.msgpack.decode(self._ask(SAVE))

    def load(self, state: dict[str, Any]) -> None:
        failure = self._ask(LOAD, msgspec.msgpack.encode(state))
        if failure:
            raise Invalid(failure.decode())

    def close(self) -> None:
        self._socket.close()

    def _ask(self, what: int, data: bytes = b"", room: int = 0) -> bytes:
        try:
            send_frame(self._socket, what, data, room)
            _, answer, _ = receive_frame(self._socket)
        except (OSError, EOFError) as error:
            raise EngineFailed(f"the process that serves the folder is gone: {error}") from None
        return answer


def send_frame(line: socket.socket, what: int, data: bytes, room: int = 0) -> None:
    line.sendall(FRAME.pack(what, len(data), room) + data)


def receive_frame(line: socket.socket) -> tuple[int, bytes, int]:
    """What it is, its bytes, and the room. EOFError at the end, or at what is no frame."""
    what, size, room = FRAME.unpack(_receive(line, FRAME.size))
    if size > FRAME_MOST:
        raise EOFError(f"a frame of {size} bytes")
    return what, _receive(line, size), room


def _receive(line: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = line.recv(size - len(data))
        if not more:
            raise EOFError("the connection has ended")
        data += more
    return bytes(data)


class ServerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a folder's server knows of its client: the size of messages, and fids as number, path and how it is open
    (-1: it is not)."""

    size: int
    fids: tuple[tuple[U32, tuple[bytes, ...], int], ...]


class ShareState(VirtioState):
    """Files are the host's."""

    server: ServerState


class Share(VirtioDevice[ShareState]):
    """The folder of `server`, which is closed with the device."""

    TYPE = "virtio-9p"
    ASKS = True
    STATE = ShareState
    DEVICE = FIRST_DEVICE + 9
    CLASS = 0x018000
    QUEUES = (128,)

    def __init__(
        self, board: Port, name: str, slot: int, server: FolderServer, tag: str, *, path: str = ""
    ) -> None:
        if not 0 < len(tag.encode()) <= _MAX_TAG or not tag.isprintable() or "," in tag:
            raise Invalid(f"a share's tag has up to {_MAX_TAG} letters and no comma, not {tag[:50]!r}")
        self.tag = tag
        self.path = path  # what `info` shows
        self.server = server
        self._is_timed = False  # inputs have times: then
        self._known = b""  # what the server is to know of its client, encoded
        self._servers = b""  # what it does know
        super().__init__(board, name, slot)

    def features(self) -> int:
        return F_MOUNT_TAG

    def device_config(self) -> bytes:
        tag = self.tag.encode()
        return struct.pack("<H", len(tag)) + tag

    def inputs_have_times(self, they_have: bool) -> None:
        if they_have and not self._is_timed:
            self._known = self._servers = self._ask_known()
        elif self._is_timed and not they_have:
            with contextlib.suppress(VmfsError):  # of a server that is gone, which the guest will see
                self._make_known()
        self._is_timed = they_have

    def _ask_known(self) -> bytes:
        return msgspec.msgpack.encode(msgspec.convert(self.server.save(), ServerState))

    def _make_known(self) -> None:
        """Have the server know what it is to."""
        if self._servers != self._known:
            state = msgspec.msgpack.decode(self._known, type=ServerState)
            self.server.load(msgspec.to_builtins(state, builtin_types=(bytes,)))
            self._servers = self._known

    def stopped(self) -> None:
        if self._is_timed:
            state = msgspec.msgpack.decode(self._known, type=ServerState)
            self._known = msgspec.msgpack.encode(msgspec.structs.replace(state, fids=()))
        else:
            self.server.forget()

    def notified(self, queue: Virtqueue) -> None:
        self.serve(queue, self._answer)

    def _answer(self, chain: Chain) -> int:
        request = chain.read(0, MAX_MESSAGE + 1)
        room = chain.writable_length
        if len(request) < HEADER.size or room < _SMALLEST_ANSWER:
            raise DriverError("a 9P request that is shorter than its header, or without room for an answer")
        answer = self._handle(request, room)
        self.counters["requests"] += 1
        if answer[4] == ERROR:
            self.counters["errors.9p"] += 1
        return chain.write(answer)

    def _handle(self, request: bytes, room: int) -> bytes:
        if not self._is_timed:
            return self.server.handle(request, room)

        def work() -> bytes:
            self._make_known()
            answer = self.server.handle(request, room)
            if request[4] not in _KEEP_FIDS:
                self._servers = self._ask_known()
            return _SIZE.pack(len(answer)) + answer + (self._servers if self._servers != self._known else b"")

        recorded = self.board.inputs.ask(work)
        end = _SIZE.size + _SIZE.unpack_from(recorded)[0]
        self._known = recorded[end:] or self._known
        return recorded[_SIZE.size : end]

    # ---- life

    def save_own(self) -> dict[str, Any]:
        if self._is_timed:
            return {"server": msgspec.msgpack.decode(self._known, type=ServerState)}
        return {"server": msgspec.convert(self.server.save(), ServerState)}

    def load_own(self, state: ShareState) -> None:
        if self._is_timed:
            self._known = msgspec.msgpack.encode(state.server)
            return
        self.server.load(msgspec.to_builtins(state.server, builtin_types=(bytes,)))

    def describe(self) -> dict[str, str]:
        mode = "ro" if self.server.read_only else "rw"
        return {**super().describe(), "path": self.path, "tag": self.tag, "mode": mode}

    def close(self) -> None:
        self.server.close()
