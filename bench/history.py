"""What a past costs a boot and a guest with a network, and what it gives: one step back, and a search through all of
it, against going forward. QEMU's record/replay beside it: what recording costs its boot.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import reverse
from bench.guests import CMDLINE, OFF, Guest, listen, on_tcg, on_vmfs, qemu_version
from bench.harness import Result, mounted
from vmfs.devices.network.backends import Stream
from vmfs.devices.virtio.net import Net
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.machine.history import History
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import CLOUD, FOLDER, GENERIC  # noqa: E402

ROUNDS = 3
STEPS = 15
NOWHERE = 0x1234567  # no instruction is there


def _on(vm: Path) -> None:
    (vm / "history").write_text("on\n")


def _recorded_by_qemu(guest: Guest) -> float:
    """Processor time to the mark while it records."""
    with tempfile.TemporaryDirectory() as folder:
        initrd = Path(folder) / "initrd"
        initrd.write_bytes(guest.initrd)
        command = [
            *"qemu-system-x86_64 -accel tcg -nodefaults -display none -no-reboot -serial stdio".split(),
            *("-icount", f"shift=1,rr=record,rrfile={folder}/record", "-m", str(guest.memory)),
            *("-kernel", str(guest.kernel), "-initrd", str(initrd), "-append", CMDLINE),
        ]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout
            fd = process.stdout.fileno()
            return listen(lambda: os.read(fd, 4096), (process.pid,), None).processor["end"]


def _least(measure: Callable[[], float]) -> float | None:
    """Of some times; None where QEMU's guest came to no mark in any: on a busy host its timers may not work."""
    found = []
    for _ in range(ROUNDS):
        with contextlib.suppress(RuntimeError, KeyError):
            found.append(measure())
    return min(found, default=None)


def _timed(vm: Path, line: str) -> float:
    began = time.perf_counter()
    (vm / "vm_run").write_text(line)
    return time.perf_counter() - began


def _back(mount: Path, kernel: Path) -> tuple[float, float, float]:
    """Seconds of a step back, of a search through all of a boot, and of the same forward; in a booted Debian."""
    vm = mount / "back"
    vm.mkdir()
    try:
        for name, text in (("mem_size", "512M"), ("machine", "pc"), ("time", "instructions"), ("cmdline", CMDLINE)):
            (vm / name).write_text(text)
        (vm / "kernel").write_bytes(kernel.read_bytes())
        (vm / "initrd").write_bytes(build("echo mark end\nread x\n"))
        _on(vm)
        (vm / "state").write_text("run")
        while "mark end" not in (vm / "console.log").read_text():
            time.sleep(0.1)
        (vm / "state").write_text("pause")
        steps = [_timed(vm, "back 1") for _ in range(STEPS)]
        past = dict(line.split(" ", 1) for line in (vm / "history").read_text().splitlines())
        search = _timed(vm, f"back until {NOWHERE:#x}")
        forward = _timed(vm, f"insns {int(past['to']) - int(past['from'])}")  # it is at the begin
        return statistics.median(steps), search, forward
    finally:
        vm.rmdir()


# ---- a network: a peer pings the guest as fast as answers come


MAC, PEER = b"\x52\x54\0\0\0\2", b"\x52\x54\0\0\0\1"
ECHOES, WINDOW, BYTES = 6000, 16, 1400
REACHABLE = "ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0; echo mark end; read x\n"


def _sum(data: bytes) -> bytes:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)


def _echo(number: int) -> bytes:
    """A frame that asks the guest for one."""
    icmp = struct.pack(">BBHHH", 8, 0, 0, 1, number & 0xFFFF) + bytes(BYTES)
    icmp = icmp[:2] + _sum(icmp) + icmp[4:]
    head = struct.pack(">BBHHHBBH4B4B", 0x45, 0, 20 + len(icmp), 0, 0, 64, 1, 0, 10, 0, 0, 1, 10, 0, 0, 2)
    return MAC + PEER + b"\x08\0" + head[:10] + _sum(head) + head[12:] + icmp


class _Pinging:
    """A process at the other end of a card, so that what it takes is not the machine's."""

    def __init__(self) -> None:
        self._ask, asked = socket.socketpair()
        wire, self.card = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            with contextlib.suppress(OSError):
                self._serve(asked, wire)
            os._exit(0)
        for one in (asked, wire):
            one.close()

    def __call__(self) -> float:
        """Seconds of ECHOES."""
        self._ask.sendall(b"x")
        return float(struct.unpack("d", self._ask.recv(8))[0])

    def _serve(self, asked: socket.socket, wire: socket.socket) -> None:
        while asked.recv(1):
            began, sent, came = time.perf_counter(), 0, 0
            while came < ECHOES:
                while sent < min(came + WINDOW, ECHOES):
                    self._send(wire, _echo(sent))
                    sent += 1
                wire.settimeout(1.0)
                try:
                    frame = self._take(wire)
                except TimeoutError:  # some were lost
                    sent = came
                    continue
                if frame[12:14] == b"\x08\x06":
                    self._send(wire, MAC + PEER + frame[12:20] + b"\0\2" + PEER + frame[38:42] + frame[22:32])
                came += frame[12:14] == b"\x08\0" and frame[34:35] == b"\0"
            asked.sendall(struct.pack("d", time.perf_counter() - began))

    @staticmethod
    def _send(wire: socket.socket, frame: bytes) -> None:
        wire.sendall(struct.pack(">I", len(frame)) + frame)

    @staticmethod
    def _take(wire: socket.socket) -> bytes:
        def exactly(count: int) -> bytes:
            data = b""
            while len(data) < count:
                if not (more := wire.recv(count - len(data))):
                    raise OSError
                data += more
            return data

        return exactly(struct.unpack(">I", exactly(4))[0])


def _network() -> list[Result]:
    """Processor time of the machine a frame that comes and one that goes, recorded and not, in turn."""
    pinging = _Pinging()
    vm = Vm(EmulatorEngine(), memory_size=192 << 20)
    try:
        vm.set_machine("pc")
        vm.images["kernel"].write(0, GENERIC.image.read_bytes())
        vm.images["initrd"].write(0, build(REACHABLE, modules=("virtio_pci", "virtio_net"), kernel=GENERIC))
        vm.images.cmdline = CMDLINE
        backend = Stream(pinging.card)
        vm.attach(lambda board: Net(board, "net0", board.pci.free_slot(), backend, MAC))
        while b"mark end" not in vm.board.devices["com1"].sent.read(0, 1 << 20):
            vm.start(Bound(seconds=0.5)).result()
        taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for is_on in (False, True) * ROUNDS:
            history = History(vm)
            if is_on:
                history.start()
            run, before = vm.start(), time.process_time()
            seconds = pinging()
            taken[is_on].append((time.process_time() - before, seconds))
            vm.stop(run)
            run.result()
            if is_on:
                history.stop()
        (plain, alone), (recorded, told) = (map(min, zip(*taken[is_on], strict=True)) for is_on in (False, True))
        each = 1e6 / ECHOES
        return [
            Result("history on: a ping of 1,400 bytes, CPU", "us", recorded * each, "off", plain * each, "<= 1.25x"),
            Result("history on: the same, elapsed", "us", told * each, "off", alone * each),
        ]
    finally:
        vm.close()
        os.kill(pinging.pid, signal.SIGKILL)
        os.waitpid(pinging.pid, 0)


def results() -> list[Result]:
    if not (FOLDER / "stamp").exists():
        print("bench history: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return []
    guest = Guest(CLOUD.image, build(f"echo mark end\n{OFF}", kernel=CLOUD))
    plain, recorded, steps = [], [], []
    with mounted("--engine", "emulator") as mount:
        for _ in range(ROUNDS):
            plain.append(on_vmfs(mount, guest).processor["end"])
            recorded.append(on_vmfs(mount, guest, _on).processor["end"])
            steps.append(_back(mount, CLOUD.image))
    network = _network()
    back, search, forward = (min(column) for column in zip(*steps, strict=True))
    found = [
        Result("history on: cloud kernel to a mark, CPU time", "s", min(recorded), "off", min(plain), "<= 1.25x"),
        *network,
        Result("back 1 in a booted Debian", "ms", back * 1000, "", None, "< 100"),
        Result("back until nowhere, through a boot", "s", search, "forward", forward, "< 2x"),
    ]
    if shutil.which("qemu-system-x86_64") is not None:
        theirs = _least(lambda: on_tcg(guest).processor["end"])
        theirs_recorded = _least(lambda: _recorded_by_qemu(guest))
        if theirs_recorded is not None:
            found.append(Result("(QEMU) rr=record, the same", "s", theirs_recorded, f"{qemu_version()}, off", theirs))
    return found + reverse.results()
