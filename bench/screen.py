"""What 60 screens a second cost a guest that draws: how much it does with a viewer, and with none.

A bare PC in a mode of 1024x768 at 32 bits fills a window of 320x240 with one colour after another, computes a little,
and counts. A viewer asks by RFB for what has changed, 60 times a second, and takes it raw. The two ways go in turn, for
some seconds each; figures are those of all rounds. By the clock the viewer's reading is in it, which on two processors
is next to the guest; by processor time of the guest's own thread it is what the guest has less of in the same time.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

from bench.harness import Result, mounted
from bench.web import HEIGHT, WIDTH, set_mode
from vmfs.client import Vm

ROUNDS, SECONDS, RATE = 4, 2.5, 60
_CODE, _COUNT = 0x2000, 0x3000
_SPIN = 1_500_000  # turns of a loop between two pictures: some 60 to 200 of these a second
_FRAMEBUFFER = 0xE000_0000  # where the display's BAR is from the beginning


def code() -> bytes:
    """In 32 bits."""
    rows = b"\xbb" + struct.pack("<I", 240)  # mov ebx
    row = b"\xb9" + struct.pack("<I", 320) + b"\xf3\xab"  # mov ecx; rep stosd
    row += b"\x81\xc7" + struct.pack("<I", 4 * (WIDTH - 320)) + b"\x4b"  # add edi; dec ebx
    row += b"\x75" + struct.pack("<b", -len(row) - 2)  # jnz row
    spin = b"\xb9" + struct.pack("<I", _SPIN) + b"\x49\x75\xfd"  # mov ecx; dec ecx; jnz
    end = b"\x05" + struct.pack("<I", 0x0001_0305) + b"\xff\x05" + struct.pack("<I", _COUNT)  # add eax; inc [count]
    turn = b"\xbf" + struct.pack("<I", _FRAMEBUFFER) + rows + row + spin + end  # mov edi, and all that
    return turn + b"\xe9" + struct.pack("<i", -len(turn) - 5)  # jmp


class _Viewer(threading.Thread):
    """Takes pictures until it is told to end, RATE a second at the most."""

    def __init__(self, where: Path) -> None:
        super().__init__(daemon=True)
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(str(where))
        self._file = self._line.makefile("rb")
        self._ended = threading.Event()
        self.screens = 0

    def run(self) -> None:
        read, put = self._file.read, self._line.sendall
        read(12)
        put(b"RFB 003.008\n")
        read(read(1)[0])
        put(b"\1")
        read(4)
        put(b"\1")
        *_, length = struct.unpack(">HH16sI", read(24))
        read(length)
        put(struct.pack(">BxHi", 2, 1, 0))  # raw
        next_, asked = time.monotonic(), 0
        while not self._ended.is_set():
            put(struct.pack(">BBHHHH", 3, asked > 0, 0, 0, WIDTH, HEIGHT))
            asked += 1
            _, count = struct.unpack(">BxH", read(4))
            for _ in range(count):
                _, _, width, height, _ = struct.unpack(">HHHHi", read(12))
                read(4 * width * height)
            self.screens += 1
            next_ = max(next_ + 1 / RATE, time.monotonic() - 1 / RATE)
            time.sleep(max(next_ - time.monotonic(), 0))

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._file.close()
        self._line.close()


def _guest_thread(pid: int) -> int:
    """The thread that has used the most processor time."""
    return max((int(task) for task in os.listdir(f"/proc/{pid}/task")), key=lambda task: _used(pid, task))


def _count(vm: Vm) -> int:
    """Pictures that it has drawn."""
    return int.from_bytes(vm.read_mem(_COUNT, 4), "little")


def _used(pid: int, task: int) -> float:
    """In seconds."""
    return int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0]) / 1e9


def results() -> list[Result]:
    with (
        tempfile.TemporaryDirectory() as folder,
        mounted("--engine", "emulator") as mount,
        Vm.temporary(mount, mem_size="8M", machine="pc") as vm,
    ):
        set_mode(vm)
        vm.mode = "protected"
        where = Path(folder, "viewers")
        vm.write("vnc", str(where).encode())
        vm.write_mem(_CODE, code())
        vm.regs.rip = _CODE
        run = threading.Thread(target=vm.run, daemon=True)
        run.start()
        while _count(vm) < 10:
            time.sleep(0.1)
        assert any(Path(vm.path, "framebuffer").read_bytes()[:4096]), "it draws elsewhere"
        pid = int(vm.stat["pid"])
        task = _guest_thread(pid)
        done = {False: [0.0, 0.0, 0.0], True: [0.0, 0.0, 0.0]}  # pictures, seconds, of processor time
        screens = 0
        for _ in range(ROUNDS):
            for looks in (False, True):
                viewer = _Viewer(where) if looks else None
                if viewer:
                    viewer.start()
                    time.sleep(0.3)
                    screens -= viewer.screens
                before = _count(vm), time.monotonic(), _used(pid, task)
                time.sleep(SECONDS)
                after = _count(vm), time.monotonic(), _used(pid, task)
                if viewer:
                    screens += viewer.screens
                    viewer.end()
                done[looks] = [sum_ + new - old for sum_, new, old in zip(done[looks], after, before, strict=True)]
        vm.pause()
        run.join()
    rows = []
    for name, at in (("by the clock", 1), ("by its processor time", 2)):
        alone, looked = (done[looks][0] / done[looks][at] for looks in (False, True))
        what = f"what a guest that draws loses to {screens / done[True][1]:.0f} screens a second of 1024x768, {name}"
        rows.append(Result(what, "%", (1 - looked / alone) * 100, "", None, "<= 10"))
    return rows
