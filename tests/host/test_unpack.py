"""The unpacker against hostile images: it answers, or is ended by its bounds, and asks before it takes room."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess

import msgspec
import pytest

from vmfs.host import unpack
from vmfs.words.commands import Result

SIZE = 1 << 20
FORMATS = ("qcow2", "vmdk", "vhdx", "vdi")
pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="package qemu-utils is not there")


def unpacked(path: str, room: int, seconds: int = 20) -> tuple[Result | None, int]:
    """What it says of an image, in a process of its own; None where its bounds ended it. And how much it asked for."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        ours.close()
        unpack.SECONDS_MOST = seconds
        try:
            unpack.serve(
                path, "", its, lambda name: os.open(name, os.O_RDONLY), lambda: os.memfd_create("x"), lambda: None
            )
        finally:
            os._exit(0)
    its.close()
    asked, said = 0, None
    with ours:
        while packet := ours.recv(4096):
            if packet[:1] == b"R":
                said = msgspec.msgpack.decode(packet[1:], type=Result)
                break
            asked += int.from_bytes(packet[1:9], "little")
            ours.send(b"\x01" if asked <= room else b"\0")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGALRM)
    return said, asked


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    unpack.load()
    folder = tmp_path_factory.mktemp("images")
    raw = folder / "raw"
    raw.write_bytes(random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 2))
    for kind in FORMATS:
        subprocess.run(["qemu-img", "convert", "-O", kind, raw, folder / kind], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_images(images, kind, tmp_path):
    data, dice = (images / kind).read_bytes(), random.Random(kind)
    said, _ = unpacked(str(images / kind), 1 << 30)
    assert said is not None and (said.errno, said.text) == (0, str(SIZE))
    outcomes = set()
    for _ in range(25):
        blob = bytearray(data)
        for _ in range(dice.choice((1, 1, 3, 8))):
            at = dice.choice((dice.randrange(128), dice.randrange(512), dice.randrange(min(len(blob), 1 << 18))))
            blob[at] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        (tmp_path / "image").write_bytes(blob)
        said, _ = unpacked(str(tmp_path / "image"), 1 << 30)
        assert said is None or said.text
        outcomes.add(None if said is None else said.errno)
    assert {0, 22} & outcomes


def test_no_room(images):
    said, asked = unpacked(str(images / "qcow2"), 0)
    assert said is not None and "no room" in said.text and asked == unpack.STEP


def test_an_image_takes_no_more_than_its_time(images, tmp_path):
    subprocess.run(["qemu-img", "create", "-f", "qcow2", tmp_path / "large", "255G"], check=True, capture_output=True)
    said, asked = unpacked(str(tmp_path / "large"), 0, seconds=1)
    assert said is None and not asked
