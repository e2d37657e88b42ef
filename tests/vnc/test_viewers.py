"""`vnc`: viewers see what the machine shows, type and point; real ones, and some that are none."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounting import SOON, failing, wait_until
from PIL import Image, ImageChops
from vnc.reader import Reader
from vnc.rfb import Viewer

from vmfs.machine.vnc import des
from vmfs.machine.vnc.messages import FORMAT


def vncdo(machine, *words, check=True):
    """vncdotool's command, a viewer that is driven by words."""
    place, secret, _ = machine.read("vnc").split()
    host, port = place.split(":")
    password = ["-p", secret.removeprefix("password=")] if secret != "nopassword" else []
    done = subprocess.run(
        [Path(sys.executable).parent / "vncdo", "-t", str(int(SOON)), "-s", f"{host}::{port}", *password, *words],
        capture_output=True, text=True, timeout=2 * SOON,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


def same(one, other):
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def saw(path):
    with Image.open(path) as image:
        return image.convert("RGB")


# ---- the file


def test_places(pc, tmp_path):
    assert pc.read("vnc") == "off\n"
    pc.write("vnc", "0\n")
    place, password, clients = pc.read("vnc").split()
    assert place.startswith("127.0.0.1:") and clients == "clients=0"
    assert len(password) == len("password=") + 8  # made up, for others of this host reach the port
    pc.write("vnc", pc.read("vnc"))  # what was read can be written
    assert pc.read("vnc").split() == [place, password, clients]
    pc.write("vnc", "127.0.0.1:0 password='a word'\n")
    assert pc.read("vnc").endswith(" password='a word' clients=0\n")
    path = tmp_path / "a socket"
    pc.write("vnc", f"'{path}'\n")
    assert pc.read("vnc") == f"'{path}' nopassword clients=0\n"
    status = path.stat()
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
    with Viewer(path) as viewer:
        viewer.begin()
        wait_until(lambda: pc.read("vnc").endswith("clients=1\n"), "it is counted")
        assert failing(pc.write, "vnc", f"{tmp_path}/none/socket\n") == errno.ENOENT
        assert failing(pc.write, "vnc", "0.0.0.0:0 nopassword\n") == errno.EINVAL
        assert pc.read("error") == "vnc: 0.0.0.0:0 can be reached by other hosts: it needs a password\n"
        viewer.ask(1, 1)
        assert viewer.rectangles()  # what failed has changed nothing
        pc.write("vnc", "\n")
        assert viewer.is_ended()
    assert pc.read("vnc") == "off\n" and not path.exists()
    pc.write("vnc", f"{tmp_path}/other password=a\n")
    pc.path.rmdir()
    wait_until(lambda: not (tmp_path / "other").exists(), "the socket goes with the machine")


def test_a_bare_machine_has_no_screen(server):
    one = server.make()
    assert failing(one.write, "vnc", "0\n") == errno.EOPNOTSUPP
    assert one.read("error") == "vnc: a bare machine has no screen: write pc to `machine`\n"
    one.path.rmdir()


def test_passwords(pc):
    pc.write("vnc", "0 password=right\n")
    assert vncdo(pc, "pause", "0").returncode == 0
    host, port = pc.read("vnc").split()[0].split(":")
    for version in (b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n"):
        with Viewer((host, int(port))) as viewer:
            assert viewer.get(12) == b"RFB 003.008\n"
            viewer.put(version)
            if version == b"RFB 003.003\n":
                assert viewer.get(4) == b"\0\0\0\2"
            else:
                assert viewer.get(2) == b"\1\2"
                viewer.put(b"\2")
            viewer.get(16)
            viewer.put(bytes(16))
            assert viewer.get(4) == b"\0\0\0\1"
            if version == b"RFB 003.008\n":
                assert viewer.get(4 + 21)[4:] == b"the password is wrong"
            assert viewer.is_ended()
    with Viewer((host, int(port))) as viewer:  # nobody comes in by what was not offered
        viewer.get(12)
        viewer.put(b"RFB 003.008\n")
        assert viewer.get(2) == b"\1\2"
        viewer.put(b"\1")
        assert viewer.get(4) == b"\0\0\0\1"


@pytest.mark.parametrize("version", [b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n", b"RFB 003.889\n"])
def test_versions(pc, tmp_path, version):
    pc.write("vnc", f"{tmp_path}/s\n")
    with Viewer(tmp_path / "s") as viewer:
        assert viewer.begin(b"RFB 003.003\n" if version.endswith(b"889\n") else version) == (720, 400)
        viewer.ask(720, 400)
        assert sum(width * height for _, _, width, height, _ in viewer.rectangles()) == 720 * 400


# ---- a real viewer


def test_a_viewer_sees_types_and_points(guest, tmp_path):
    guest.write("vnc", "127.0.0.1:0\n")
    vncdo(guest, "capture", tmp_path / "text.png")
    assert same(saw(tmp_path / "text.png"), guest.picture())
    typed = "It reads: {~} \"'\\|/ <A-z_0> +="
    paced = [word for key in typed for word in ("type", key, "pause", "0.1")]  # a guest drops faster keys
    vncdo(guest, *paced, "key", "shift-b")  # no shift is pressed for what is typed
    guest.shows(f"a guest: {typed}B")
    vncdo(guest, "capture", tmp_path / "typed.png")
    assert not same(saw(tmp_path / "typed.png"), saw(tmp_path / "text.png"))

    vncdo(guest, "key", "esc")
    wait_until(lambda: guest.read("screen.txt") == "graphics 640x480x32\n", "graphics")
    pitch = 2560
    fd = os.open(guest / "framebuffer", os.O_WRONLY)
    for y in range(480):
        line = b"".join(struct.pack("<I", x * 0x10203 ^ y << 16 ^ y) for x in range(640))
        os.pwrite(fd, line, y * pitch)
    os.close(fd)
    vncdo(guest, "capture", tmp_path / "graphics.png")
    assert saw(tmp_path / "graphics.png").size == (640, 480)
    assert same(saw(tmp_path / "graphics.png"), guest.picture())

    guest.write("console", "x")  # the sector takes none of it; what the mouse says comes there
    vncdo(guest, "move", "100", "100", "move", "110", "95", "mousedown", "1", "mouseup", "1")
    wait_until(lambda: len((guest / "console.log").read_bytes()) >= 9, "the mouse has said it")
    assert (guest / "console.log").read_bytes()[-9:] == bytes((8, 10, 5, 9, 0, 0, 8, 0, 0))
    guest.write("mouse", "+left 7,-1 -left\n")
    wait_until(lambda: len((guest / "console.log").read_bytes()) >= 18, "it has said that, too")
    assert (guest / "console.log").read_bytes()[-9:] == bytes((9, 0, 0, 9, 7, 1, 8, 0, 0))


def test_a_viewer_follows_the_size(guest, tmp_path):
    guest.write("vnc", f"{tmp_path}/s\n")
    with Viewer(tmp_path / "s") as viewer, Viewer(tmp_path / "s") as other:
        assert viewer.begin() == other.begin() == (720, 400)
        viewer.takes(0, -223)
        viewer.ask(720, 400)
        viewer.rectangles()
        other.ask(720, 400)
        other.rectangles()
        viewer.ask(720, 400, incremental=True)
        other.ask(720, 400, incremental=True)
        viewer.key(True, 0xFF1B)
        while (seen := viewer.rectangles())[0][4] == 0:  # it may have blinked before
            viewer.ask(720, 400, incremental=True)
        assert seen == [(0, 0, 640, 480, -223)]
        viewer.ask(640, 480, incremental=True)
        assert sum(width * height for _, _, width, height, _ in viewer.rectangles()) == 640 * 480
        # One that cannot follow sees what its first size has, and nothing beside it.
        covered = 0
        while covered < 720 * 400:
            covered += sum(width * height for _, _, width, height, _ in other.rectangles())
            other.ask(720, 400, incremental=True)
        viewer.takes(0, -308)
        viewer.ask(640, 480, incremental=True)
        assert viewer.rectangles() == [(0, 0, 640, 480, -308)]
        viewer.put(struct.pack(">BxHHBx", 251, 800, 600, 0))
        viewer.ask(640, 480, incremental=True)
        assert viewer.rectangles() == [(1, 1, 640, 480, -308)]  # asked by this client, and prohibited


def test_only_what_changes_is_sent(guest, tmp_path):
    guest.write("vnc", f"{tmp_path}/s\n")
    with Viewer(tmp_path / "s") as viewer:
        viewer.begin()
        viewer.ask(720, 400)
        viewer.rectangles()
        viewer.ask(720, 400, incremental=True)
        viewer.key(True, ord("x"))
        viewer.key(False, ord("x"))
        area = sum(width * height for _, _, width, height, _ in viewer.rectangles())
        assert 0 < area <= 4 * 32 * 32
        viewer.takes(0, -258, -261, -239)
        viewer.ask(720, 400, incremental=True)
        assert {one[4] for one in viewer.rectangles()} >= {-258, -261, -239}
        viewer.ask(720, 400, incremental=True)
        viewer.put(struct.pack(">BBHII", 255, 0, 1, 0, 0x3A))  # Caps Lock, by QEMU's number of the key
        viewer.put(struct.pack(">BBHII", 255, 0, 0, 0, 0x3A))
        while not any(one[4] == -261 for one in viewer.rectangles()):
            viewer.ask(720, 400, incremental=True)
        assert "leds capslock\n" in (guest / "dev/keyboard/info").read_text()


def moving(number):
    """320x240 pixels of 32 bits, of many colours, which move."""
    line = [bytes((x, (x + number) * 3 & 255)) for x in range(256)]
    return b"".join(line[x & 255] + bytes((y, 0)) for y in range(240) for x in range(320))


@pytest.mark.parametrize("quality", [(), (-26,)], ids=["exact", "jpeg"])
def test_what_moves_is_jpeg_until_it_rests(pc, tmp_path, quality):
    """For a client that takes JPEG; and then it has the very pixels."""
    pc.write("mode", "real\n")
    code = b"".join(
        b"\xba" + struct.pack("<H", port) + b"\xb8" + struct.pack("<H", word) + b"\xef"  # out dx, ax
        for index, value in ((4, 0), (1, 320), (2, 240), (3, 32), (4, 0x41))  # of the VBE: XRES, YRES, BPP, ENABLE
        for port, word in ((0x1CE, index), (0x1CF, value))
    )
    with open(pc / "mem", "r+b") as memory:
        memory.seek(0x1000)
        memory.write(code + b"\xf4")
    pc.write("reg/rip", "0x1000\n")
    assert pc.read("vm_run").startswith("hlt")
    pc.write("vnc", f"{tmp_path}/s\n")
    reader, shown, drawn, kinds, number = Reader(FORMAT), [None] * (320 * 240), [], set(), 0
    deadline = time.monotonic() + SOON
    with Viewer(tmp_path / "s") as viewer, open(pc / "framebuffer", "r+b", buffering=0) as screen:
        assert viewer.begin() == (320, 240)
        viewer.takes(7, *quality)
        viewer.ask(320, 240)
        while (quality and 9 not in kinds) or shown != drawn:
            assert time.monotonic() < deadline
            if number < 3 or (quality and 9 not in kinds):
                number += 1
                picture = moving(number)
                drawn = list(zip(picture[2::4], picture[1::4], picture[::4], strict=True))
                screen.seek(0)
                screen.write(picture)
            for x, y, width, height, data in viewer.tight_rectangles():
                kinds.add(data[0] >> 4)
                pixels = [None] * (width * height) if data[0] == 0x90 else reader.read(7, data, width, height)
                for row in range(height):
                    at = 320 * (y + row) + x
                    shown[at : at + width] = pixels[row * width : (row + 1) * width]
            viewer.ask(320, 240, incremental=True)
    assert (9 in kinds) == bool(quality), kinds


def test_what_a_viewer_held_goes_up_with_it(guest, tmp_path):
    guest.write("vnc", f"{tmp_path}/s\n")
    with Viewer(tmp_path / "s") as viewer:
        viewer.begin()
        viewer.key(True, 0xFFE1)
        viewer.key(True, ord("A"))
        guest.shows("a guest: A")
    wait_until(lambda: guest.clients() == 0, "it has gone")
    guest.write("keyboard", "b")
    guest.shows("a guest: Ab")


# ---- machines that become others


def test_a_fork_has_none_and_a_restored_machine_keeps_its_own(make_guest, server, tmp_path):
    one = make_guest()
    one.write("vnc", f"{tmp_path}/s\n")
    os.mkdir(one / "snap/before")
    name = f"copy-{os.getpid()}"
    one.write("fork", f"{name}\n")
    assert (server.path / name / "vnc").read_text() == "off\n"
    (server.path / name).rmdir()
    with Viewer(tmp_path / "s") as viewer:
        viewer.begin()
        viewer.ask(720, 400)
        viewer.rectangles()
        one.start()
        one.write("keyboard", "esc")
        wait_until(lambda: one.read("screen.txt").startswith("graphics"), "graphics")
        one.stop()
        one.write("restore", "before\n")
        viewer.takes(0, -223)
        viewer.ask(720, 400)
        assert sum(width * height for _, _, width, height, encoding in viewer.rectangles() if not encoding) > 0
        one.start()
        viewer.key(True, ord("z"))
        one.shows("a guest: z")


# ---- those that are none


def test_many_and_too_many(pc, tmp_path):
    pc.write("vnc", f"{tmp_path}/s\n")
    viewers = []
    for _ in range(16):
        viewers.append(Viewer(tmp_path / "s"))
        viewers[-1].begin()
    with Viewer(tmp_path / "s") as one:
        one.get(12)
        one.put(b"RFB 003.008\n")
        sentence = b"16 viewers are connected already"
        assert one.get(1 + 4 + len(sentence)) == struct.pack(">BI", 0, len(sentence)) + sentence
        assert one.is_ended()
    viewers.pop().line.close()
    wait_until(lambda: pc.read("vnc").endswith("clients=15\n"), "one has gone")
    with Viewer(tmp_path / "s") as one:
        assert one.begin() == (720, 400)
    for viewer in viewers:
        viewer.line.close()
    wait_until(lambda: pc.read("vnc").endswith("clients=0\n"), "all have gone")


def test_a_viewer_that_has_gone_is_heard_to_its_end(guest, tmp_path):
    guest.write("vnc", f"{tmp_path}/s\n")
    text = "what it said is typed, though nothing can be sent to it"
    with Viewer(tmp_path / "s") as viewer:
        viewer.begin()
        for character in text:
            viewer.ask(720, 400)
            viewer.key(True, ord(character))
            viewer.key(False, ord(character))
    guest.shows(f"a guest: {text}")


def test_one_that_takes_nothing_holds_up_nobody(guest, tmp_path):
    guest.write("vnc", f"{tmp_path}/s\n")
    with Viewer(tmp_path / "s") as slow, Viewer(tmp_path / "s") as other:
        slow.begin()
        slow.line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.line.settimeout(0.2)
        asked = 0
        try:
            for _ in range(5000):  # it asks for all, again and again, and reads none of it
                slow.ask(720, 400)
                asked += 1
        except TimeoutError:
            pass
        other.begin()
        began = time.monotonic()
        for _ in range(20):
            other.ask(720, 400)
            assert sum(width * height for _, _, width, height, _ in other.rectangles()) >= 720 * 400
        assert time.monotonic() - began < SOON / 2
        other.key(True, ord("y"))
        guest.shows("a guest: y")
        assert int(dict(line.split(maxsplit=1) for line in guest.read("stat").splitlines())["memory_bytes"]) == 16 << 20


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=8), st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_end_at_most_their_connection(hostile, pieces, agrees):
    with Viewer(hostile) as viewer:
        try:
            if agrees:
                viewer.begin()
            for piece in pieces:
                viewer.put(piece)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            pass
    with Viewer(hostile) as viewer:
        assert viewer.begin() == (720, 400)


@pytest.fixture
def hostile(pc, tmp_path):
    pc.write("vnc", f"{tmp_path}/s\n")
    return tmp_path / "s"


def test_those_that_say_nothing_are_let_go(pc, tmp_path):
    """But one that is asked for a password may take the time to type it."""
    pc.write("vnc", f"{tmp_path}/s password=right\n")
    began, silent = time.monotonic(), []
    with Viewer(tmp_path / "s") as typist:
        challenge = challenged(typist)
        for _ in range(31):
            silent.append(Viewer(tmp_path / "s"))
            silent[-1].get(12)
        with Viewer(tmp_path / "s") as viewer:
            assert viewer.is_ended()  # at once
        assert all(viewer.is_ended() for viewer in silent)
        assert 5 < time.monotonic() - began < SOON
        with Viewer(tmp_path / "s") as viewer:
            assert len(challenged(viewer)) == 16
        typist.put(des.encrypt("right", challenge))
        assert typist.get(4) == bytes(4)
    for viewer in silent:
        viewer.line.close()


def challenged(viewer):
    """Up to where it is asked for the password: what it is to encrypt."""
    viewer.get(12)
    viewer.put(b"RFB 003.008\n")
    assert viewer.get(2) == b"\1\2"
    viewer.put(b"\2")
    return viewer.get(16)
