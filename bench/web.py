"""What a page with a live screen costs: a bare PC draws 30 different pictures of 1024x768 a second, and a page looks.

The page is a program that speaks RFB over the page's WebSocket, and asks for the next picture when it has one, as noVNC
does. What counts is the processor time of the server of the page and of the machine's process, without what the machine
takes to draw, which is measured with nobody looking.
"""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.harness import Result, mounted, one_core
from vmfs.client import Vm

_PICTURES = 13
WIDTH, HEIGHT, FRAMES = 1024, 768, 30
SECONDS = 6.0
_TICK = os.sysconf("SC_CLK_TCK")
_VBE = ((4, 0), (1, WIDTH), (2, HEIGHT), (3, 32), (4, 0x41))  # XRES, YRES, BPP; ENABLE, with a linear framebuffer
_TIGHT, _DESKTOP_SIZE, _QUALITY = 7, -223, -26  # what noVNC wants first, a size that changes, and its quality of JPEG


def results() -> list[Result]:
    rows = []
    with one_core(), mounted("--engine", "emulator") as mount:
        for name, height in (("a window of 320x240 moves", 240), ("the whole screen is new", HEIGHT)):
            still, _, _ = _cost(mount, height, looks=False)
            spent, frames, sent = _cost(mount, height, looks=True)
            server, machine = ((looked - alone) * 100 for looked, alone in zip(spent, still, strict=True))
            what = f"{name}: {frames:.0f} frames/s, {sent / 1e6:.1f} MB/s; the page's server {server:.1f}"
            rows.append(Result(f"live screen, {what}", "% of a core", server + machine, "", None, "< 15"))
    return rows


def _cost(mount: Path, height: int, *, looks: bool) -> tuple[list[float], float, float]:
    """Of a second: cores that the page's server and the machine use, frames and bytes that come."""
    with Vm.temporary(mount, mem_size="8M", machine="pc") as vm, _Page(mount) as page:
        set_mode(vm)
        draws = _Draws(vm, height)
        viewer = page.look(Path(vm.path).name) if looks else None
        draws.start()
        time.sleep(1.5)
        pids = page.pid, int(vm.stat["pid"])
        before, began = [_used(pid) for pid in pids], time.monotonic()
        frames, bytes_ = (viewer.frames, viewer.bytes) if viewer else (0, 0)
        time.sleep(SECONDS)
        past = time.monotonic() - began
        spent = [(_used(pid) - was) / past for pid, was in zip(pids, before, strict=True)]
        draws.end()
        if viewer is None:
            return spent, 0.0, 0.0
        found = spent, (viewer.frames - frames) / past, (viewer.bytes - bytes_) / past
        viewer.end()
        return found


def _used(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def set_mode(vm: Vm) -> None:
    """By the VBE's ports, from 16-bit code: out dx, ax."""
    code = bytearray()
    for index, value in _VBE:
        for port, word in ((0x1CE, index), (0x1CF, value)):
            code += b"\xba" + struct.pack("<H", port) + b"\xb8" + struct.pack("<H", word) + b"\xef"  # out dx, ax
    code += b"\xf4"
    vm.mode = "real"
    vm.write_mem(0x1000, bytes(code))
    vm.regs.rip = 0x1000
    vm.run(timeout=10)


class _Draws(threading.Thread):
    """What a guest's driver does, but from outside, so that its time is nobody's: bytes into `framebuffer`."""

    def __init__(self, vm: Vm, height: int) -> None:
        super().__init__(daemon=True)
        with open(os.path.join(vm.path, "framebuffer"), "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4 * WIDTH * HEIGHT)
        self._height = height
        self._width = WIDTH if height == HEIGHT else 320
        self._ended = threading.Event()

    def run(self) -> None:
        number, next_ = 0, time.monotonic()
        line = b"".join(struct.pack("<I", (x * 37 ^ x << 9) & 0xFFFFFF) for x in range(WIDTH + 64))
        lines = [line[4 * first :][: 4 * self._width] for first in range(_PICTURES)]
        whole = [each * HEIGHT for each in lines] if self._width == WIDTH else []  # drawn at once, so never seen half
        while not self._ended.is_set():
            number = (number + 1) % _PICTURES
            if whole:
                self._map[:] = whole[number]
            else:
                for y in range(self._height):
                    at = 4 * WIDTH * y
                    self._map[at : at + 4 * self._width] = lines[number]
            next_ += 1 / FRAMES
            time.sleep(max(next_ - time.monotonic(), 0))

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._map.close()


class _Page:
    """`vmfs web`."""

    def __init__(self, mount: Path) -> None:
        command = [sys.executable, "-m", "vmfs.cli", "web", "--listen", "127.0.0.1:0", str(mount)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        url, _, self._token = self._process.stdout.readline().strip().partition("/#token=")
        self._host = url.removeprefix("http://")
        self.pid = self._process.pid

    def __enter__(self) -> _Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def look(self, machine: str) -> _Viewer:
        viewer = _Viewer(f"ws://{self._host}/api/machines/{machine}/vnc", self._token)
        viewer.start()
        return viewer


class _Viewer(threading.Thread):
    """Asks for picture after picture, and counts."""

    def __init__(self, url: str, token: str) -> None:
        from websockets.sync.client import connect

        super().__init__(daemon=True)
        self._line = connect(url, subprotocols=["vmfs", f"token.{token}"], max_size=None, compression=None)
        self._rest = b""
        self.frames = self.bytes = 0

    def _read(self, count: int) -> bytes:
        while len(self._rest) < count:
            data = self._line.recv()
            self.bytes += len(data)
            self._rest += data
        found, self._rest = self._rest[:count], self._rest[count:]
        return found

    def run(self) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            self._greet()
            self._ask(0)
            while True:
                kind, _, count = struct.unpack(">BBH", self._read(4))
                assert kind == 0, f"a message {kind}"
                for _ in range(count):
                    self._rectangle()
                self.frames += 1
                self._ask(1)
        except ConnectionClosed:
            pass

    def _greet(self) -> None:
        self._read(12)
        self._line.send(b"RFB 003.008\n")
        self._read(self._read(1)[0])
        self._line.send(b"\1")
        self._read(4)
        self._line.send(b"\1")
        *_, length = struct.unpack(">HH16sI", self._read(24))
        self._read(length)
        self._line.send(struct.pack(">BBHiii", 2, 0, 3, _TIGHT, _DESKTOP_SIZE, _QUALITY))

    def _ask(self, incremental: int) -> None:
        self._line.send(struct.pack(">BBHHHH", 3, incremental, 0, 0, WIDTH, HEIGHT))

    def _rectangle(self) -> None:
        _, _, width, height, encoding = struct.unpack(">HHHHi", self._read(12))
        if encoding == _TIGHT:
            self._tight(width, height)

    def _tight(self, width: int, height: int) -> None:
        control = self._read(1)[0] >> 4
        if control == 8:  # fill
            self._read(3)
            return
        size, bits = width * height * 3, 24
        if control & 4:
            if (kind := self._read(1)[0]) == 1:
                colours = self._read(1)[0] + 1
                self._read(3 * colours)
                bits = 1 if colours == 2 else 8
                size = (width + 7) // 8 * height if bits == 1 else width * height
            assert kind in (0, 1, 2)
        if size < 12 and control != 9:
            self._read(size)
            return
        length = 0
        for shift in (0, 7, 14):
            byte = self._read(1)[0]
            length |= (byte & (0x7F if shift < 14 else 0xFF)) << shift
            if not byte & 0x80:
                break
        self._read(length)

    def end(self) -> None:
        self._line.close()
        self.join()
