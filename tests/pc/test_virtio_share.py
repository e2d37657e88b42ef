"""The share: 9P2000.L by a client in Python, a good one and hostile ones."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pc.virtio_driver import Bench, Driver

from vmfs.devices.virtio.ninep import MAX_FIDS, MAX_OPEN, MESSAGES, Server
from vmfs.devices.virtio.share import SAVE, RemoteServer, Share, receive_frame, send_frame
from vmfs.words.errors import EngineFailed, Invalid

ROOM = 1 << 16


def text(name: str | bytes) -> bytes:
    data = name if isinstance(name, bytes) else name.encode()
    return struct.pack("<H", len(data)) + data


class Client:
    """Asks a server; an error is an OSError."""

    def __init__(self, handle: Callable[[bytes, int], bytes]) -> None:
        self.handle = handle
        self.next = 1
        self.ask(100, "I", ROOM, text("9P2000.L"))
        self.ask(104, "II", 0, 0xFFFF_FFFF, text("root") + text("") + bytes(4))

    def ask(self, kind: int, code: str, *values: Any) -> bytes:
        """Numbers by `code`; a last value that is bytes is what follows."""
        tail = b""
        if values and isinstance(values[-1], bytes):
            values, tail = values[:-1], values[-1]
        body = struct.pack(f"<{code}", *values) + tail
        answer = self.handle(struct.pack("<IBH", 7 + len(body), kind, 9) + body, ROOM)
        size, got, tag = struct.unpack_from("<IBH", answer)
        assert size == len(answer) <= ROOM and tag == 9
        if got == 7:
            (number,) = struct.unpack_from("<I", answer, 7)
            raise OSError(number, os.strerror(number))
        assert got == kind + 1
        return answer[7:]

    def walk(self, path: str, start: int = 0) -> int:
        """A new fid."""
        names = [name for name in path.split("/") if name]
        fid, self.next = self.next, self.next + 1
        answer = self.ask(110, "IIH", start, fid, len(names), b"".join(map(text, names)))
        (count,) = struct.unpack_from("<H", answer)
        if count != len(names):
            raise OSError(errno.ENOENT, path)
        return fid

    def open(self, path: str, flags: int = 0) -> int:
        fid = self.walk(path)
        self.ask(12, "II", fid, flags)
        return fid

    def create(self, folder: str, name: str, flags: int = os.O_RDWR, mode: int = 0o644) -> int:
        fid = self.walk(folder)
        self.ask(14, "I", fid, text(name) + struct.pack("<III", flags, mode, 0))
        return fid

    def read(self, fid: int, offset: int, count: int) -> bytes:
        answer = self.ask(116, "IQI", fid, offset, count)
        assert struct.unpack_from("<I", answer)[0] == len(answer) - 4
        return answer[4:]

    def write(self, fid: int, offset: int, data: bytes) -> int:
        return int(struct.unpack("<I", self.ask(118, "IQI", fid, offset, len(data), data))[0])

    def getattr(self, fid: int) -> dict[str, int]:
        answer = self.ask(24, "IQ", fid, 0x7FF)
        assert len(answer) == 153
        mode, uid, gid, nlink, rdev, size = struct.unpack_from("<IIIQQQ", answer, 21)
        return {"mode": mode, "uid": uid, "gid": gid, "nlink": nlink, "size": size, "qid": answer[8]}

    def setattr(self, fid: int, valid: int, mode: int = 0, size: int = 0, uid: int = 0, mtime: int = 0) -> None:
        self.ask(26, "IIIIIQQQQQ", fid, valid, mode, uid, 0, size, 0, 0, mtime, 0)

    def list(self, path: str, count: int = 200) -> list[str]:
        fid = self.open(path, os.O_DIRECTORY)
        names, offset = [], 0
        while data := self.ask(40, "IQI", fid, offset, count)[4:]:
            assert len(data) <= count
            while data:
                offset, _, length = struct.unpack_from("<QBH", data, 13)
                names.append(data[24 : 24 + length].decode())
                data = data[24 + length :]
        self.ask(120, "I", fid)
        return sorted(names)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("not for guests")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("hello")
    (shared / "sub").mkdir()
    (shared / "sub" / "deep").write_text("deeper")
    return shared


def server_of(folder: Path, **options: bool) -> Server:
    return Server(os.open(folder, os.O_PATH | os.O_DIRECTORY), **options)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = server_of(folder)
    yield server
    server.close()


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.handle)


def refused(number: int) -> Any:
    return pytest.raises(OSError, match=os.strerror(number).replace("(", r"\(").replace(")", r"\)"))


def test_nothing_is_opened_on_the_mount_whose_server_it_is() -> None:
    """A share of / that has another file system below: /proc stands for the mount."""
    server = Server(os.open("/", os.O_PATH | os.O_DIRECTORY), barred=os.stat("/proc").st_dev)
    try:
        client = Client(server.handle)
        assert "proc" in client.list("/", 4000)
        client.walk("tmp")
        for path in ("proc", "proc/version"):
            with refused(errno.EACCES):
                client.walk(path)
        with pytest.raises(OSError):
            client.walk("tmp/../proc")
        assert client.walk("tmp/..") > 0
    finally:
        server.close()


def test_files_are_read_written_and_made(client: Client, folder: Path) -> None:
    fid = client.open("file", os.O_RDWR)
    assert client.read(fid, 0, 100) == b"hello" and client.read(fid, 3, 1) == b"l" and client.read(fid, 9, 9) == b""
    assert client.write(fid, 5, b", guest") == 7
    assert (folder / "file").read_text() == "hello, guest"
    made = client.create("sub", "new", mode=0o4640)
    client.write(made, 10, b"x")
    assert (folder / "sub" / "new").read_bytes() == bytes(10) + b"x"
    assert stat.S_IMODE((folder / "sub" / "new").stat().st_mode) == 0o640
    client.ask(50, "II", made, 1)
    client.ask(120, "I", made)
    with refused(errno.EBADF):
        client.read(made, 0, 1)
    with refused(errno.EEXIST):
        client.create("", "file", os.O_RDWR | os.O_EXCL)
    again = client.create("", "file", os.O_RDWR | os.O_TRUNC)  # without O_EXCL it is opened
    assert client.getattr(again)["size"] == 0


def test_folders(client: Client, folder: Path) -> None:
    assert client.list("") == [".", "..", "file", "sub"]
    root = client.walk("")
    client.ask(72, "I", root, text("made") + struct.pack("<II", 0o2750, 0))
    assert stat.S_IMODE((folder / "made").stat().st_mode) == 0o750
    for number in range(300):
        (folder / "made" / f"{number:03}").touch()
    assert client.list("made", 64) == [".", ".."] + [f"{number:03}" for number in range(300)]
    with refused(errno.ENOTEMPTY):
        client.ask(76, "I", root, text("made") + struct.pack("<I", 0x200))
    with refused(errno.EISDIR):
        client.ask(76, "I", root, text("made") + bytes(4))
    client.ask(76, "I", root, text("file") + bytes(4))
    assert not (folder / "file").exists()


def test_names_move_and_fids_move_with_them(client: Client, folder: Path) -> None:
    deep, root = client.open("sub/deep", os.O_RDWR), client.walk("")
    beside = client.walk("sub/deep")
    client.ask(74, "I", root, text("sub") + struct.pack("<I", root) + text("moved"))
    assert (folder / "moved" / "deep").exists()
    assert client.read(deep, 0, 9) == b"deeper"
    assert client.getattr(beside)["size"] == 6
    client.ask(20, "II", beside, root, text("up"))
    client.ask(70, "II", root, beside, text("link"))
    assert client.getattr(beside)["nlink"] == 2
    client.ask(122, "I", beside)
    assert sorted(os.listdir(folder)) == ["file", "link", "moved"]


def test_symbolic_links_are_the_guests_to_follow(client: Client, folder: Path) -> None:
    root = client.walk("")
    client.ask(16, "I", root, text("abs") + text("/etc/passwd") + bytes(4))
    assert os.readlink(folder / "abs") == "/etc/passwd"
    link = client.walk("abs")
    assert client.ask(22, "I", link) == text("/etc/passwd")
    assert client.getattr(link)["qid"] == 2
    with refused(errno.ELOOP):
        client.ask(12, "II", link, 0)


def test_attributes(client: Client, folder: Path) -> None:
    fid = client.walk("file")
    found = (folder / "file").stat()
    assert client.getattr(fid) == {
        "mode": found.st_mode, "uid": found.st_uid, "gid": found.st_gid, "nlink": 1, "size": 5, "qid": 0,
    }  # fmt: skip
    client.setattr(fid, 1 | 8, mode=0o600, size=2)
    client.setattr(fid, 0x20 | 0x100, mtime=1_000_000_000)
    after = (folder / "file").stat()
    assert stat.S_IMODE(after.st_mode) == 0o600 and after.st_size == 2 and after.st_mtime == 1e9
    assert after.st_atime_ns == found.st_atime_ns
    client.setattr(fid, 0x20)
    assert (folder / "file").stat().st_mtime > found.st_mtime - 60
    for valid, change, number in (
        (1, {"mode": 0o4755}, errno.EPERM),
        (8, {"size": 2**63}, errno.EINVAL),
        (0x120, {"mtime": 2**63}, errno.EINVAL),
    ):
        with refused(number):
            client.setattr(fid, valid, **change)
    assert struct.unpack_from("<II", client.ask(8, "I", fid))[0] == 0x0102_1997


def test_nothing_leaves_the_folder(client: Client, folder: Path, tmp_path: Path) -> None:
    (folder / "out").symlink_to(tmp_path)
    (folder / "up").symlink_to("..")
    for path in ("../secret", "sub/../../secret", "out/secret", "up/secret", "sub/../../../../../../etc/passwd"):
        with pytest.raises(OSError):
            client.open(path)
    assert client.getattr(client.walk(".."))["qid"] == 0x80
    assert client.list("..") == client.list("")  # the folder is its own parent
    root = client.walk("")
    for name in (b"..", b".", b"", b"../x", b"/etc/x", b"a/b", b"a\0b"):
        for kind, rest in ((72, bytes(8)), (76, bytes(4)), (16, text("t") + bytes(4)), (18, bytes(16)), (14, bytes(8))):
            with pytest.raises(OSError):
                client.ask(kind, "I", root, text(name) + rest)
        with pytest.raises(OSError):
            client.ask(74, "I", root, text("file") + struct.pack("<I", root) + text(name))
        with pytest.raises(OSError):
            client.ask(110, "IIH", 0, 999, 1, text(name) if name not in (b".", b"..") else text(b"/"))
    for change in (
        lambda: client.create("out", "made"),
        lambda: client.ask(72, "I", client.walk("out"), text("made") + bytes(8)),
        lambda: client.ask(74, "I", root, text("file") + struct.pack("<I", client.walk("out")) + text("stolen")),
        lambda: client.ask(76, "I", client.walk("out"), text("secret") + bytes(4)),
    ):
        with pytest.raises(OSError):
            change()
    assert sorted(os.listdir(tmp_path)) == ["secret", "shared"]
    assert (folder / "file").exists()


def test_a_folder_that_the_host_replaces_by_a_link_leads_nowhere(client: Client, folder: Path, tmp_path: Path) -> None:
    fid = client.walk("sub")
    (tmp_path / "deep").write_text("outside")
    os.rename(folder / "sub", folder / "old")
    (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(OSError):
        client.walk("deep", fid)
    with pytest.raises(OSError):
        client.ask(76, "I", fid, text("deep") + bytes(4))
    assert (tmp_path / "deep").exists()


def test_only_files_and_folders_are_opened(client: Client, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with refused(errno.ENXIO):
        client.open("pipe")
    root = client.walk("")
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        with refused(errno.EPERM):
            client.ask(18, "I", root, text("node") + struct.pack("<IIII", kind | 0o666, 1, 3, 0))
    client.ask(18, "I", root, text("mine") + struct.pack("<IIII", stat.S_IFIFO | 0o600, 0, 0, 0))
    assert stat.S_ISFIFO((folder / "mine").stat().st_mode)


def test_read_only(folder: Path) -> None:
    server = server_of(folder, read_only=True)
    client = Client(server.handle)
    before = sorted(os.listdir(folder))
    assert client.read(client.open("file"), 0, 9) == b"hello"
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_TRUNC):
        with refused(errno.EROFS):
            client.open("file", flags)
    for kind, row in MESSAGES.items():
        if row.changes:
            with refused(errno.EROFS):
                client.ask(kind, "I", 0, bytes(100))
    assert sorted(os.listdir(folder)) == before
    server.close()


def test_locks_are_the_hosts(client: Client, folder: Path, server: Server) -> None:
    other = server_of(folder)
    rival = Client(other.handle)
    mine, its = client.open("file", os.O_RDWR), rival.open("file", os.O_RDWR)
    lock = struct.pack("<BIQQI", 1, 0, 0, 0, 7) + text("me")
    assert client.ask(52, "I", mine, lock) == b"\0"
    assert rival.ask(52, "I", its, lock) == b"\1"
    assert rival.ask(54, "I", its, struct.pack("<BQQI", 1, 0, 0, 7) + text("me"))[0] == 1
    client.ask(120, "I", mine)
    assert rival.ask(52, "I", its, lock) == b"\0"
    other.close()


def test_fids_are_bounded(client: Client, server: Server) -> None:
    with refused(errno.EMFILE):
        for _ in range(MAX_OPEN + 1):
            client.open("file")
    with refused(errno.EMFILE):
        for _ in range(MAX_FIDS):
            client.walk("file")
    client.ask(100, "I", ROOM, text("9P2000.L"))  # a new session has none
    assert not server.fids


def test_saved_fids_go_on(client: Client, server: Server, folder: Path) -> None:
    client.next = 50
    fid, walked, gone = client.open("file", os.O_RDWR), client.walk("sub/deep"), client.open("sub/deep")
    state = server.save()
    (folder / "file").write_text("changed")
    other = server_of(folder)
    other.load(state)
    client.handle = other.handle
    assert client.read(fid, 0, 100) == b"changed"
    assert client.write(fid, 0, b"C") == 1
    assert client.getattr(walked)["size"] == 6
    os.unlink(folder / "sub" / "deep")
    third = server_of(folder)
    third.load(state)
    client.handle = third.handle
    with refused(errno.EBADF):
        client.read(gone, 0, 1)
    other.close()
    third.close()


MESSAGE = st.tuples(
    st.one_of(st.sampled_from(sorted(MESSAGES)), st.integers(0, 255)),
    st.lists(
        st.one_of(
            st.integers(0, 3).map(lambda number: struct.pack("<I", number)),
            st.integers(0, 2**64 - 1).map(lambda number: struct.pack("<Q", number)),
            st.sampled_from(["file", "sub", "deep", "..", "new", "link", "/", "sub/deep", ""]).map(text),
            st.integers(0, 17).map(lambda number: struct.pack("<H", number)),
            st.binary(max_size=20),
        ),
        max_size=8,
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=st.lists(MESSAGE, max_size=25), room=st.sampled_from([11, 30, 200, ROOM]))
def test_hostile_messages(
    tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[int, list[bytes]]], room: int
) -> None:
    base = tmp_path_factory.mktemp("hostile")
    (base / "outside").write_text("as it was")
    folder = base / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("x")
    (folder / "sub" / "deep").write_text("y")
    (folder / "link").symlink_to(base)
    files = len(os.listdir("/proc/self/fd"))
    server = server_of(folder)
    client = Client(server.handle)
    client.walk("file")
    client.walk("sub")
    client.open("file", os.O_RDWR)
    for kind, parts in messages:
        body = b"".join(parts)
        answer = server.handle(struct.pack("<IBH", 7 + len(body), kind, 1) + body, room)
        assert 7 <= len(answer) <= max(room, 11) and struct.unpack_from("<I", answer)[0] == len(answer)
    server.close()
    assert len(os.listdir("/proc/self/fd")) == files
    assert sorted(os.listdir(base)) == ["folder", "outside"] and (base / "outside").read_text() == "as it was"


# ---- the device


def plugged(bench: Bench, folder: Path) -> Driver:
    share = Share(bench.board, "share0", 6, server_of(folder), "host")
    return bench.plug(share).start()


def through(driver: Driver) -> Client:
    def handle(request: bytes, room: int) -> bytes:
        driver.next = 0x8000
        (answer,), length = driver.request([request], [room])
        return answer[:length]

    return Client(handle)


def test_the_device_serves_and_forgets_at_reset(folder: Path) -> None:
    bench = Bench()
    driver = plugged(bench, folder)
    assert b"".join(driver.read(4, at, 1).to_bytes(1, "little") for at in range(6)) == text("host")
    client = through(driver)
    assert client.read(client.open("sub/deep"), 0, 99) == b"deeper"
    assert driver.device.counters["requests"] == 5
    driver.write(1, 20, 1, 0)
    driver.next = 0x10_0000
    driver.start()
    driver.next = 0x8000
    with refused(errno.EBADF):
        client.read(1, 0, 1)
    bench.close()


def test_messages_that_are_none_are_the_drivers_error(folder: Path) -> None:
    for readable, room in ((b"short", 100), (bytes(100), 10)):
        bench = Bench()
        driver = plugged(bench, folder)
        ring = driver.queues[0]
        ring.add([(driver.put(readable), len(readable), False), (0x3000, room, True)])
        ring.notify()
        assert driver.needs_reset
        bench.close()


@pytest.mark.parametrize("tag", ["", "x" * 37, "a,b", "a\nb"])
def test_tags_that_linux_refuses(folder: Path, tag: str) -> None:
    bench, server = Bench(), server_of(folder)
    with pytest.raises(Invalid):
        Share(bench.board, "share0", 6, server, tag)
    server.close()
    bench.close()


def test_a_server_that_is_gone_cannot_be_recorded() -> None:
    """`history on` fails with a sentence, and nothing is recorded; one that goes meanwhile does not hold the end up."""
    ours, its = socket.socketpair()

    def serve() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                what, _, _ = receive_frame(ours)
                send_frame(ours, what, msgspec.msgpack.encode({"size": 4096, "fids": []}) if what == SAVE else b"")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    bench = Bench()
    bench.board.time_source = "instructions"
    bench.plug(Share(bench.board, "share0", 4, RemoteServer(its.detach(), read_only=True), "tag"))
    bench.board.inputs.record()
    ours.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    bench.board.inputs.stop()
    with pytest.raises(EngineFailed, match="is gone"):
        bench.board.inputs.record()
    assert not bench.board.inputs.have_times
    bench.close()
    ours.close()
