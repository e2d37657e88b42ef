"""A viewer that speaks RFB byte by byte, to say what real ones do not."""

from __future__ import annotations

import socket
import struct

from mounting import SOON

from vmfs.machine.vnc.messages import VERSION_LENGTH


class Viewer:
    """Connected; `begin` does the handshake."""

    def __init__(self, where) -> None:
        if isinstance(where, tuple):
            self.line = socket.create_connection(where, SOON)
        else:
            self.line = socket.socket(socket.AF_UNIX)
            self.line.settimeout(SOON)
            self.line.connect(str(where))

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.line.close()

    def get(self, count: int) -> bytes:
        """EOFError where fewer come."""
        data = b""
        while len(data) < count:
            try:
                more = self.line.recv(count - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                raise EOFError(data)
            data += more
        return data

    def put(self, data: bytes) -> None:
        self.line.sendall(data)

    def begin(self, version: bytes = b"RFB 003.008\n") -> tuple[int, int]:
        """Without a password; the size."""
        assert self.get(VERSION_LENGTH) == b"RFB 003.008\n"
        self.put(version)
        if version == b"RFB 003.003\n":
            assert self.get(4) == b"\0\0\0\1"
        else:
            assert self.get(2) == b"\1\1"
            self.put(b"\1")
            if version == b"RFB 003.008\n":
                assert self.get(4) == bytes(4)
        self.put(b"\1")
        width, height, _, length = struct.unpack(">HH16sI", self.get(24))
        assert self.get(length) == b"vmfs"
        return width, height

    def takes(self, *encodings: int) -> None:
        self.put(struct.pack(f">BxH{len(encodings)}i", 2, len(encodings), *encodings))

    def ask(self, width: int, height: int, *, incremental: bool = False) -> None:
        self.put(struct.pack(">B?HHHH", 3, incremental, 0, 0, width, height))

    def rectangles(self) -> list[tuple[int, int, int, int, int]]:
        """Of the next update, which has raw pixels and what has no data."""
        kind, count = struct.unpack(">BxH", self.get(4))
        assert kind == 0
        found = []
        for _ in range(count):
            found.append(struct.unpack(">HHHHi", self.get(12)))
            *_, width, height, encoding = found[-1]
            self.get({0: 4 * width * height, -308: 20, -261: 1}.get(encoding, 0))
        return found

    def tight_rectangles(self) -> list[tuple[int, int, int, int, bytes]]:
        """Of the next update: where they are, and what follows their headers. Pixels are of 32 bits."""
        kind, count = struct.unpack(">BxH", self.get(4))
        assert kind == 0
        found = []
        for _ in range(count):
            x, y, width, height, encoding = struct.unpack(">HHHHi", self.get(12))
            assert encoding == 7
            found.append((x, y, width, height, self._tight(width, height)))
        return found

    def _tight(self, width: int, height: int) -> bytes:
        data = self.get(1)
        kind, size = data[0] >> 4, 3 * width * height
        if kind == 8:
            return data + self.get(3)
        if kind < 8 and kind & 4:
            data += self.get(2)
            count = data[2] + 1
            data += self.get(3 * count)
            size = (width + 7) // 8 * height if count == 2 else width * height
        if kind < 8 and size < 12:
            return data + self.get(size)
        length = 0
        for shift in (0, 7, 14):
            data += self.get(1)
            length |= (data[-1] & (255 if shift == 14 else 127)) << shift
            if not data[-1] & 128:
                break
        return data + self.get(length)

    def key(self, down: bool, symbol: int) -> None:
        self.put(struct.pack(">B?xxI", 4, down, symbol))

    def point(self, buttons: int, x: int, y: int) -> None:
        self.put(struct.pack(">BBHH", 5, buttons, x, y))

    def is_ended(self) -> bool:
        """What comes meanwhile is not looked at."""
        try:
            while self.line.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True
