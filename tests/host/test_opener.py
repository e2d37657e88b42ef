"""An opener gets a host path with the rights of the user who wrote its line, and with no others."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
import struct
import threading
import time
from pathlib import Path

import pytest
from host.openers import NOBODY, Opened, me
from mounting import wait_until

from vmfs.devices.network.backends import Passt, Tap
from vmfs.devices.virtio.share import RemoteServer
from vmfs.host import opener
from vmfs.host.credentials import ALL_CAPABILITIES, Credentials, HostError, credentials_of
from vmfs.words.errors import VmfsError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
CAP_DAC = 0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER


def refused(work: opener.Work, who: Credentials) -> HostError:
    with pytest.raises(HostError) as caught:
        Opened(work, who)
    return caught.value


@as_root
def test_a_path_is_opened_with_the_callers_rights(folder):
    (folder / "theirs").write_text("theirs")
    (folder / "theirs").chmod(0o600)
    (folder / "ours").write_text("ours")
    os.chown(folder / "ours", 65534, 65534)
    done = Opened(opener.OpenPath(str(folder / "ours"), os.O_RDWR, 0), NOBODY)
    assert os.read(done.fds[0], 9) == b"ours" and done.wait() == 0
    os.close(done.fds[0])
    failure = refused(opener.OpenPath(str(folder / "theirs"), os.O_RDONLY, 0), NOBODY)
    assert failure.errno == errno.EACCES and str(failure) == f"{folder}/theirs: Permission denied"


@as_root
def test_roots_capabilities_are_the_callers(folder):
    """A process of uid 0 that has given them up, as in a container, opens no more than it could itself."""
    (folder / "file").write_text("theirs")
    os.chown(folder / "file", 65534, 65534)
    (folder / "file").chmod(0o600)
    work = opener.OpenPath(str(folder / "file"), os.O_RDONLY, 0)
    assert refused(work, Credentials(0, 0, (), ALL_CAPABILITIES & ~CAP_DAC)).errno == errno.EACCES
    done = Opened(work, Credentials(0, 0, (), ALL_CAPABILITIES))
    assert done.wait() == 0
    os.close(done.fds[0])


@as_root
def test_credentials_are_the_callers(folder):
    """As a process in a chroot and without capabilities sees it: from /proc, while it waits."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chroot(folder)
        os.setgroups((54323,))
        os.setresgid(54322, 54322, 54322)
        os.setresuid(54321, 54321, 54321)
        os.write(tell, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    found = credentials_of(pid)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert found == Credentials(54321, 54322, (54323,), 0, "root directory")
    failure = refused(opener.OpenPath(str(folder), os.O_RDONLY, 0), found)
    assert failure.errno == errno.EACCES and "another root directory than the server" in str(failure)
    assert credentials_of(pid) is None


def test_what_is_on_the_mount_itself_is_refused(folder):
    (folder / "disk").write_text("1")
    failure = refused(opener.OpenPath(str(folder / "disk"), os.O_RDONLY, os.stat(folder).st_dev), me())
    assert failure.errno == errno.EINVAL and "on this mount itself" in str(failure)


def test_a_fifo_does_not_hold_it_up(folder):
    os.mkfifo(folder / "fifo")
    done = Opened(opener.OpenPath(str(folder / "fifo"), os.O_RDONLY, 0), me())
    assert done.wait() == 0
    os.close(done.fds[0])


@as_root
def test_a_listener_is_its_users(folder):
    folder.chmod(0o777)
    (folder / "closed").mkdir(mode=0o700)
    done = Opened(opener.Listen(str(folder / "theirs"), "", 0), NOBODY)
    there = (folder / "theirs").stat()
    assert (there.st_uid, there.st_gid, stat.S_IMODE(there.st_mode)) == (65534, 65534, 0o600)
    assert done.text == f"0 {there.st_dev} {there.st_ino}" and done.wait() == 0
    os.close(done.fds[0])
    assert Opened(opener.Unlink(str(folder / "theirs"), (there.st_dev, there.st_ino + 1)), NOBODY).wait() == 0
    assert (folder / "theirs").exists()  # another one
    assert Opened(opener.Unlink(str(folder / "theirs"), (there.st_dev, there.st_ino)), NOBODY).wait() == 0
    assert not (folder / "theirs").exists()
    assert refused(opener.Listen(str(folder / "closed" / "socket"), "", 0), NOBODY).errno == errno.EACCES
    assert refused(opener.Listen("", "127.0.0.1", 1), NOBODY).errno == errno.EACCES


def test_a_port_is_told():
    done = Opened(opener.Listen("", "127.0.0.1", 0), me())
    with socket.socket(fileno=done.fds[0]) as one, socket.create_connection(("127.0.0.1", int(done.text)), 60):
        one.accept()[0].close()
    done.wait()


def test_tap_names_and_rights() -> None:
    for name in ("", "x" * 16, "a/b", "a\0b"):
        assert refused(opener.OpenTap(name), me()).errno == errno.EINVAL


@as_root
def test_frames_through_a_tap() -> None:
    """What is written to an interface of the host is what its packet sockets see, and the other way round."""
    name = f"vmfs{os.getpid() % 100000}"
    try:
        done = Opened(opener.OpenTap(name), me())
    except VmfsError as error:
        pytest.skip(f"no tap interface can be made here: {error}")
    done.wait()
    assert refused(opener.OpenTap(f"{name}x"), NOBODY).errno in (errno.EOPNOTSUPP, errno.EACCES)
    tap = Tap(done.fds[0], name)
    mac = b"\x52\x54\x00\x12\x34\x56"
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as packets:
            request = struct.pack("<16sH22x", name.encode(), 0x1043)  # up, running, multicast
            fcntl.ioctl(packets, 0x8914, request)  # SIOCSIFFLAGS
            packets.bind((name, 0))
            packets.settimeout(60)
            frame = b"\xff" * 6 + mac + b"\x88\xb5" + b"from the guest".ljust(50)
            assert tap.send_all([frame]) == 1
            while packets.recv(2000) != frame:
                pass
            packets.send(b"\xff" * 6 + mac + b"\x88\xb5" + b"to the guest".ljust(50))
            wait_until(lambda: any(b"to the guest" in one for one in tap.receive_all(16)), "the frame comes")
    finally:
        tap.close()


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_passt_starts_and_ends() -> None:
    for uid in (0, 1000) if os.geteuid() == 0 else (os.geteuid(),):
        done = Opened(opener.StartPasst([]), Credentials(uid, uid))
        backend = Passt(done.fds[0], int(done.text))
        pid = int(backend.describe()["pid"])
        if os.geteuid() == 0:
            assert os.stat(f"/proc/{pid}").st_uid == (uid or 65534)
        backend.close()
        assert done.wait() == 0
        assert not os.path.exists(f"/proc/{pid}")
    failure = refused(opener.StartPasst(["-i", "nonesuch"]), me())
    assert failure.errno == errno.EOPNOTSUPP and "nonesuch" in str(failure)


# ---- folders


@pytest.fixture
def shared(folder):
    (folder / "file").write_text("the host's")
    (folder / "file").chmod(0o600)
    (folder / "sub").mkdir(mode=0o777)
    (folder / "sub").chmod(0o777)
    (folder / "sub" / "deep").write_text("deeper")
    return folder


@as_root
def test_a_folders_process_is_its_user_and_ends_with_its_socket(shared):
    from pc.test_virtio_share import Client
    from pc.test_virtio_share import refused as client_refused

    owner = Credentials(54321, 54322, (54323,), 0)
    done = Opened(opener.StartShare(str(shared), False, 0), owner)
    server = RemoteServer(done.fds[0], read_only=False)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{done.pid}/status").read_text().splitlines())
    assert status["Uid"].split() == ["54321"] * 4 and status["Groups"].split() == ["54323"]
    assert int(status["CapPrm"], 16) == 0 and status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    client = Client(server.handle)
    assert client.read(client.open("sub/deep"), 0, 9) == b"deeper"
    for path, flags in (("file", os.O_RDONLY), ("sub/deep", os.O_RDWR)):
        with client_refused(errno.EACCES):
            client.open(path, flags)
    with client_refused(errno.EACCES):
        client.create("", "mine")
    client.create("sub", "mine")
    found = (shared / "sub" / "mine").stat()
    assert (found.st_uid, found.st_gid) == (54321, 54322)
    with client_refused(errno.EPERM):
        client.setattr(client.walk("sub/mine"), 2, uid=0)
    state = server.save()
    server.forget()
    server.load(state)
    assert server.save() == state
    server.close()
    assert done.wait() == 0


def test_a_folders_process_that_is_gone_is_an_error(shared):
    done = Opened(opener.StartShare(str(shared), True, 0), me())
    server = RemoteServer(done.fds[0], read_only=True)
    done.kill()
    with pytest.raises(VmfsError, match="the process that serves the folder is gone"):
        server.handle(bytes(20), 100)
    server.close()


@as_root
def test_two_clients_make_no_set_user_id_file(shared):
    """One looks at a folder and changes a file: what is looked at is what is changed, and the filter of the process
    lets nobody make such a file. Won in 1.3 seconds where a path was resolved twice."""
    from pc.test_virtio_share import Client

    root = Credentials(0, 0, (), ALL_CAPABILITIES)
    servers = [opened_share(shared, root) for _ in range(2)]
    first, second = (Client(server.handle) for server, _ in servers)
    (shared / "a").mkdir()
    (shared / "b").write_bytes(b"#!")
    stop = threading.Event()

    def swap() -> None:
        """renameat2 with RENAME_EXCHANGE is not 9P's: by three renames."""
        while not stop.is_set():
            for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
                (shared / old).rename(shared / new)

    thread = threading.Thread(target=swap)
    thread.start()
    tries = 0
    try:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            tries += 1
            for client in (first, second):
                try:
                    client.setattr(client.walk("a"), 1, mode=(0o6755, 0o2755)[tries % 2])  # one passes the filter
                except OSError:
                    pass
            for name in "abc":
                with contextlib.suppress(FileNotFoundError):
                    mode = (shared / name).lstat().st_mode
                    assert stat.S_ISDIR(mode) or not mode & 0o6000, name
    finally:
        stop.set()
        thread.join()
        for server, _ in servers:  # all: each process was forked with the sockets of those before
            server.close()
        for _, done in servers:
            done.wait()
    assert tries > 20


def opened_share(folder: Path, who: Credentials) -> tuple[RemoteServer, Opened]:
    done = Opened(opener.StartShare(str(folder), False, 0), who)
    return RemoteServer(done.fds[0], read_only=False), done


@as_root
def test_what_a_guest_writes_of_roots_loses_set_user_id(shared):
    from pc.test_virtio_share import Client

    (shared / "tool").write_bytes(b"root's")
    (shared / "tool").chmod(0o4755)
    server, done = opened_share(shared, Credentials(0, 0, (), ALL_CAPABILITIES))
    client = Client(server.handle)
    client.write(client.open("tool", os.O_RDWR), 0, b"guest's")
    server.close()
    done.wait()
    assert (shared / "tool").read_bytes() == b"guest's"
    assert stat.S_IMODE((shared / "tool").stat().st_mode) == 0o755
