"""The files `gdb` and `gdb.stream`: who may connect where, and what becomes of it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mounting import SOON, failing, wait_until

from vmfs.machine.gdb import handover
from vmfs.machine.gdb.packets import Decoder, Packet, frame


class Peer:
    """A client that speaks packets over a socket."""

    def __init__(self, one: socket.socket) -> None:
        self.socket = one
        one.settimeout(SOON)
        self._decoder = Decoder()
        self._payloads: list[bytes] = []

    def ask(self, payload: bytes) -> bytes:
        self.socket.sendall(frame(payload))
        return self.reply()

    def reply(self) -> bytes:
        while not self._payloads:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._payloads += [event.payload for event in self._decoder.feed(data) if isinstance(event, Packet)]
        return self._payloads.pop(0)

    def is_ended(self) -> bool:
        try:
            self.reply()
        except (EOFError, ConnectionError):
            return True
        return False

    def close(self) -> None:
        self.socket.close()


def tcp(machine) -> Peer:
    host, port = machine.read("gdb").split()[0].rsplit(":", 1)
    return Peer(socket.create_connection((host.strip("[]"), int(port)), SOON))


def unix(path) -> Peer:
    one = socket.socket(socket.AF_UNIX)
    one.connect(str(path))
    return Peer(one)


@pytest.mark.parametrize("written", ("127.0.0.1:0", ":0", "0", "localhost:0"))
def test_tcp(machine, written):
    assert machine.read("gdb") == "off\n"
    machine.write("gdb", f"{written}\n")
    shown = machine.read("gdb")
    assert shown.startswith("127.0.0.1:") and not shown.endswith(":0\n")
    peer = tcp(machine)
    assert peer.ask(b"qC") == b"QC1"
    machine.write("gdb", "off\n")
    assert machine.read("gdb") == "off\n"
    assert peer.is_ended()
    peer.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(shown.split(":")[1])))


def test_other_addresses(machine):
    machine.write("gdb", "0.0.0.0:0\n")
    assert machine.read("gdb").startswith("0.0.0.0:")
    machine.write("gdb", "127.0.0.1:0 i386 linear\n")
    assert machine.read("gdb").endswith(" i386 linear\n")
    peer = tcp(machine)
    assert b"<architecture>i386<" in peer.ask(b"qXfer:features:read:target.xml:0,1000")
    peer.close()


def test_an_address_in_use(machine, server):
    machine.write("gdb", "127.0.0.1:0\n")
    shown = machine.read("gdb")
    machine.write("gdb", shown)  # what was read can be written
    assert machine.read("gdb") == shown
    other = server.make()
    assert failing(other.write, "gdb", shown) == errno.EADDRINUSE
    assert other.read("error") == f"gdb: {shown.strip()}: Address already in use\n"
    assert other.read("gdb") == "off\n"
    other.path.rmdir()


def test_a_path(machine, tmp_path):
    path = tmp_path / "a socket"
    machine.write("gdb", f"'{path}'\n")
    assert machine.read("gdb") == f"'{path}'\n"
    status = path.stat()
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
    peer = unix(path)
    assert peer.ask(b"qC") == b"QC1"
    assert failing(machine.write, "gdb", f"{tmp_path}/none/socket\n") == errno.ENOENT
    assert peer.ask(b"qC") == b"QC1"  # what failed has changed nothing
    peer.close()
    machine.path.rmdir()
    wait_until(lambda: not path.exists(), "the socket goes with the machine")


def test_paths_that_are_there(machine, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert failing(machine.write, "gdb", f"{tmp_path}/file\n") == errno.EADDRINUSE
    assert (tmp_path / "file").read_text() == "precious"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "dead"))
    dead.close()
    machine.write("gdb", f"{tmp_path}/dead\n")  # nobody listens there: of a server that was killed
    peer = unix(tmp_path / "dead")
    assert peer.ask(b"qC") == b"QC1"
    peer.close()
    alive = socket.socket(socket.AF_UNIX)
    alive.bind(str(tmp_path / "alive"))
    alive.listen()
    assert failing(machine.write, "gdb", f"{tmp_path}/alive\n") == errno.EADDRINUSE
    alive.close()


def test_one_gdb_at_a_time(machine, tmp_path):
    machine.write("gdb", f"{tmp_path}/socket\n")
    first, second = unix(tmp_path / "socket"), unix(tmp_path / "socket")
    assert first.ask(b"qC") == b"QC1"
    assert second.ask(b"qSupported") == b"E.another gdb is connected to this machine"
    assert second.is_ended()
    fd = os.open(machine / "gdb.stream", os.O_RDWR)
    assert failing(os.pwrite, fd, frame(b"qC"), 0) == errno.EBUSY
    assert first.ask(b"qC") == b"QC1"
    first.close()
    second.close()
    wait_until(lambda: _can(fd), "the stream is free")
    third = unix(tmp_path / "socket")
    assert third.ask(b"qC").startswith(b"E.")
    os.close(fd)
    third.close()


def _can(fd: int) -> bool:
    try:
        os.pwrite(fd, frame(b"qC"), 0)
    except OSError:
        return False
    heard = b""
    while b"#" not in heard:
        heard += os.pread(fd, 100, 0)
    return b"QC1" in heard


def test_one_that_vanishes_while_the_guest_runs(machine):
    machine.load("eb fe")
    machine.write("gdb", "127.0.0.1:0\n")
    peer = tcp(machine)
    assert peer.ask(b"Z0,7777,1") == b"OK"
    peer.socket.sendall(frame(b"c"))
    wait_until(machine.is_running, "it runs")
    peer.close()
    wait_until(lambda: machine.read("state") == "paused\n", "it stands still")
    wait_until(lambda: machine.read("debug") == "0\n", "the points are gone")
    peer = tcp(machine)  # and it listens still
    assert peer.ask(b"?").startswith(b"T05")
    peer.close()


def test_removal_ends_it(machine):
    machine.load("eb fe")
    machine.write("gdb", "127.0.0.1:0\n")
    peer = tcp(machine)
    peer.socket.sendall(frame(b"c"))
    wait_until(machine.is_running, "it runs")
    machine.path.rmdir()
    assert peer.is_ended()
    peer.close()


def test_hostile_bytes_do_not_stop_the_mount(machine, server):
    machine.write("gdb", "127.0.0.1:0\n")
    for data in (
        b"$" + b"A" * (1 << 20),
        b"$m0,ffffffffffffffff#00" * 100,
        bytes(range(256)) * 64,
        b"\x03" * 4096,
        b"-" * 4096,
        b"$g#67" * 2000,
        b"$" * 10000,
    ):
        peer = tcp(machine)
        peer.socket.setblocking(False)
        try:
            peer.socket.send(data)  # and nothing is read
        except BlockingIOError:
            pass
        assert machine.read("state") == "paused\n"  # the mount answers
        peer.close()
        wait_until(lambda: _answers(machine), "the next gdb is served")


def _answers(machine) -> bool:
    peer = tcp(machine)
    try:
        return peer.ask(b"qC") == b"QC1"
    except (EOFError, ConnectionError):
        return False
    finally:
        peer.close()


# ---- gdb.stream


def test_the_stream_is_no_file_to_look_into(machine):
    fd = os.open(machine / "gdb.stream", os.O_RDONLY)
    assert failing(os.pread, fd, 10, 0) == errno.EINVAL
    os.close(fd)
    fd = os.open(machine / "gdb.stream", os.O_RDWR)
    assert failing(os.pread, fd, 10, 0) == errno.EINVAL  # gdb begins
    os.close(fd)


def test_the_stream(machine):
    fd = os.open(machine / "gdb.stream", os.O_RDWR)
    heard = b""
    done = threading.Event()

    def listen() -> None:
        nonlocal heard
        while part := os.pread(fd, 7, 0):
            heard += part
        done.set()

    os.pwrite(fd, frame(b"qC"), 0)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    wait_until(lambda: frame(b"QC1") in heard, "the answer")
    os.pwrite(fd, frame(b"D"), 0)
    assert done.wait(SOON)  # the end of the file
    assert heard == b"+" + frame(b"QC1") + b"+" + frame(b"OK")
    assert failing(os.pwrite, fd, b"+", 0) == errno.ENODEV
    os.close(fd)


def test_removal_ends_the_stream(machine):
    fd = os.open(machine / "gdb.stream", os.O_RDWR)
    os.pwrite(fd, frame(b"qC"), 0)
    assert os.pread(fd, 1, 0) == b"+"
    heard = b""
    while len(heard) < len(frame(b"QC1")):
        heard += os.pread(fd, 100, 0)
    assert heard == frame(b"QC1")
    machine.path.rmdir()
    assert failing(os.pread, fd, 100, 0) == errno.ENODEV
    os.close(fd)


def test_the_pipe_says_what_is_wrong(machine, tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "vmfs.cli", "gdb", *map(str, arguments)],
            input=frame(b"qC"),
            capture_output=True,
            timeout=SOON,
        )

    done = run(tmp_path)
    assert done.returncode == 1 and b"is no machine" in done.stderr
    done = run(machine.path, "vax")
    assert done.returncode == 1 and b"layout 'vax'" in done.stderr
    machine.write("gdb", f"{tmp_path}/socket\n")
    peer = unix(tmp_path / "socket")
    assert peer.ask(b"qC") == b"QC1"
    done = run(machine.path)
    assert done.returncode == 1 and b"another gdb is connected" in done.stderr
    peer.close()


# ---- `vmfs gdb`, which hands a socket over


def piped(machine, *words: str) -> tuple[subprocess.Popen, Peer]:
    """As gdb starts it: with one socket for its standard input and output."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "vmfs.cli", "gdb", str(machine.path), *words]
        program = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    return program, Peer(ours)


def test_gdbs_own_socket_is_handed_over(machine):
    program, peer = piped(machine, "i386", "linear")
    assert b"<architecture>i386<" in peer.ask(b"qXfer:features:read:target.xml:0,1000")
    os.kill(program.pid, signal.SIGSTOP)  # nothing takes the way through it
    assert peer.ask(b"qC") == b"QC1"
    os.kill(program.pid, signal.SIGCONT)
    assert peer.ask(b"D") == b"OK"
    assert program.wait(SOON) == 0
    assert peer.is_ended()
    peer.close()


def test_the_session_ends_with_whoever_goes(machine):
    machine.load("eb fe")
    for killed in (True, False):
        program, peer = piped(machine)
        assert peer.ask(b"Z0,7777,1") == b"OK"
        peer.socket.sendall(frame(b"c"))
        wait_until(machine.is_running, "it runs")
        if killed:
            program.kill()
            assert peer.is_ended()
        peer.close()
        program.wait(SOON)
        wait_until(lambda: machine.read("state") == "paused\n", "it stands still")
        wait_until(lambda: machine.read("debug") == "0\n", "the points are gone")
    program, peer = piped(machine)
    assert peer.ask(b"qC") == b"QC1"
    machine.path.rmdir()
    assert peer.is_ended()
    assert program.wait(SOON) == 0
    peer.close()


def test_only_who_asked_may_hand_over(machine):
    fd = os.open(machine / "gdb.stream", os.O_RDWR)
    os.pwrite(fd, frame(handover.QUERY), 0)
    reply = os.pread(fd, 100, 0)[1:-3]
    name, secret = reply.decode().split(",")
    assert f"@vmfs-gdb-{name}" in Path("/proc/net/unix").read_text()  # everybody sees that
    ours, theirs = socket.socketpair()
    listening = socket.socket(socket.AF_UNIX)
    with open("/dev/null") as null, listening, theirs:
        for wrong, sent in (
            ("0" * len(secret), [theirs.fileno()]),
            (secret, [null.fileno()]),
            (secret, [listening.fileno()]),
            (secret[:-1], [theirs.fileno()]),
            (secret, []),
        ):
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(f"\0vmfs-gdb-{name}")
                socket.send_fds(one, [wrong.encode()], sent)
                one.settimeout(SOON)
                assert one.recv(1) == b""  # it is told nothing
        connection = handover.send(reply, theirs.fileno())
    assert connection is not None
    peer = Peer(ours)
    assert peer.ask(b"qC") == b"QC1"
    assert failing(os.pwrite, fd, frame(b"qC"), 0) == errno.EBUSY
    assert handover.send(reply, 0) is None  # once
    connection.close()
    assert peer.is_ended()
    peer.close()
    os.close(fd)


def test_a_stream_goes_on_where_nothing_is_handed_over(machine):
    """In another network namespace there is no way to the server but its files."""
    fd = os.open(machine / "gdb.stream", os.O_RDWR)
    assert failing(os.pwrite, fd, frame(handover.QUERY + b":vax"), 0) == errno.EINVAL
    assert "'vax'" in machine.read("error")
    os.pwrite(fd, frame(handover.QUERY + b":"), 0)
    assert os.pread(fd, 100, 0).startswith(b"$")
    assert _can(fd)
    os.close(fd)


# ---- races


def test_reconnections_are_not_refused(machine):
    """A gdb may be back before the session of the one before has ended."""
    machine.load("eb fe")
    machine.write("gdb", "127.0.0.1:0\n")
    for number in range(60):
        peer = tcp(machine)
        assert peer.ask(b"qC") == b"QC1", number
        if number % 3 == 0:
            assert peer.ask(b"D") == b"OK"
        elif number % 3 == 1:
            peer.socket.sendall(frame(b"c"))
        peer.close()
    wait_until(lambda: machine.read("state") == "paused\n", "it stands still")


def test_an_interrupt_that_comes_with_the_packet_that_resumes(machine):
    machine.load("eb fe")
    machine.write("gdb", "127.0.0.1:0\n")
    peer = tcp(machine)
    for _ in range(50):
        peer.socket.sendall(frame(b"c") + b"\x03")
        assert peer.reply().startswith(b"T02")
    peer.close()
