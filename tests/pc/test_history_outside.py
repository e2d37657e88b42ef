"""A Debian with a network card and a shared folder has a past: what came comes again, what it did is done once."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time

import pytest
from pc.initramfs import build
from pc.kernels import GENERIC, needs_kernels
from pc.repeated import BIRTH, SECONDS

from vmfs.devices.network.backends import Stream
from vmfs.devices.virtio.net import Net
from vmfs.devices.virtio.ninep import Server
from vmfs.devices.virtio.share import Share
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.machine.history import History
from vmfs.machine.journey import Journey
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound

pytestmark = needs_kernels

SLICE = 10_000_000
MODULES = ("virtio_pci", "virtio_net", "9pnet_virtio", "9p")
# The folder's file grows by a line each round, so that what is done twice is seen.
SCRIPT = """\
exec 2>&1
ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0
mount -t 9p -o trans=virtio,version=9p2000.L,cache=none share /mnt
echo ready
for i in 1 2 3 4 5 6; do
    cat /mnt/question >> /mnt/answers
    echo "round $i" >> /mnt/answers
    ping -c 2 -i 0.05 -W 3 10.0.0.1 | grep -c "bytes from"
    ls -l /mnt | md5sum
done
echo waiting
while [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.02; done
echo unplugged
poweroff -f
"""


class Peer(threading.Thread):
    """The other end of the card: it answers ARP and pings after a while of its own, and sends what nobody asked for."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.end, other = socket.socketpair()
        self.backend = Stream(other)
        self.pings: list[bytes] = []  # number and sequence of each
        self._dice = random.Random(1)

    def run(self) -> None:
        try:
            while True:
                frame = self._exactly(struct.unpack(">I", self._exactly(4))[0])
                time.sleep(self._dice.random() / 100)
                if frame[12:14] == b"\x08\x06":
                    self._send(frame[6:12] + MAC + frame[12:20] + b"\0\2" + MAC + frame[38:42] + frame[22:32])
                elif frame[12:14] == b"\x08\0" and frame[34:35] == b"\x08":
                    self.pings.append(frame[38:42])
                    ip = frame[14:26] + frame[30:34] + frame[26:30]
                    icmp = bytearray(b"\0" + frame[35:])
                    icmp[2:4] = bytes(2)
                    total = sum(struct.unpack(f">{len(icmp) // 2}H", icmp))
                    total = (total & 0xFFFF) + (total >> 16)
                    icmp[2:4] = struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF)
                    self._send(frame[6:12] + MAC + frame[12:14] + ip + icmp)
                self._send(b"\xff" * 6 + MAC + b"\x88\xb5" + self._dice.randbytes(50))
        except OSError:
            pass

    def _send(self, frame: bytes) -> None:
        self.end.sendall(struct.pack(">I", len(frame)) + frame)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            if not (more := self.end.recv(count - len(data))):
                raise OSError
            data += more
        return data


MAC = bytes.fromhex("525400000001")


@pytest.fixture
def outside(tmp_path):
    """The machine, the peer, the folder."""
    (tmp_path / "question").write_text("what\n")
    (tmp_path / "answers").write_text("")
    peer = Peer()
    vm = Vm(EmulatorEngine(), memory_size=192 << 20)
    vm.set_machine("pc")
    vm.set_birth(BIRTH)
    vm.images["kernel"].write(0, GENERIC.image.read_bytes())
    vm.images["initrd"].write(0, build(SCRIPT, modules=MODULES, kernel=GENERIC))
    vm.images.cmdline = "console=ttyS0 quiet"
    vm.attach(lambda board: Net(board, "net0", board.pci.free_slot(), peer.backend, b"\x52\x54\0\0\0\2"))
    server = Server(os.open(tmp_path, os.O_PATH | os.O_DIRECTORY))
    vm.attach(lambda board: Share(board, "share0", board.pci.free_slot(), server, "share"))
    peer.start()
    yield vm, peer, tmp_path
    vm.close()
    peer.end.close()


def said(vm: Vm) -> bytes:
    return vm.board.devices["com1"].sent.read(0, 1 << 20)


def run(vm: Vm, **bound) -> None:
    vm.start(Bound(**bound)).result(SECONDS)


def go(vm: Vm, **journey) -> int:
    vm.start(Bound(journey=Journey(**journey))).result(SECONDS)
    return vm.counters()["instructions"]


def test_frames_and_answers_come_again(outside):
    vm, peer, folder = outside
    while b"ready" not in said(vm):
        run(vm, instructions=SLICE)
    History(vm).start()
    seen, dice = {}, random.Random(2)
    while b"waiting" not in said(vm):
        run(vm, instructions=dice.randrange(1, SLICE))
        seen[vm.counters()["instructions"]] = vm.state_hash()
    assert said(vm).count(b"\n2\r\n") >= 4, said(vm)
    assert "frame" in {one.kind for one in vm.board.inputs.recorded()} and len(peer.pings) >= 8
    pings, answers, log = list(peer.pings), (folder / "answers").read_text(), said(vm)
    assert answers.count("what\n") == 6
    places = sorted(seen)
    for place in dice.sample(places[:-1], 5):
        assert go(vm, place=place) == place and vm.state_hash() == seen[place]
        following = places[places.index(place) + 1]
        run(vm, instructions=following - place)
        assert vm.state_hash() == seen[following]
    assert go(vm, place=places[-1]) == places[-1] and vm.state_hash() == seen[places[-1]] and not vm.history.in_past
    assert (folder / "answers").read_text() == answers and said(vm) == log
    assert peer.pings == pings

    # From the middle on, another future: the folder and the card are really used again.
    go(vm, place=places[len(places) // 2])
    vm.board.devices["com1"].receive(b"x")
    (folder / "question").write_text("why\n")
    while b"waiting" not in said(vm):
        run(vm, instructions=SLICE)
    assert not vm.history.in_past and len(peer.pings) > len(pings)
    assert "why\n" in (folder / "answers").read_text()

    # The end of the link is an input, too, and comes again.
    peer.end.shutdown(socket.SHUT_RDWR)
    before = vm.counters()["instructions"]
    while vm.state != "shutdown":
        run(vm, instructions=SLICE)
    assert b"unplugged" in said(vm)
    end, card = vm.counters()["instructions"], vm.board.devices["net0"]
    for place, is_up in ((before, True), (end, False), (before, True)):
        assert go(vm, place=place) == place and card.link_up == is_up
    vm.board.devices["com1"].receive(b"x")  # and in another future it comes anew
    while vm.state != "shutdown":
        run(vm, instructions=SLICE)
    assert b"unplugged" in said(vm) and not card.link_up
