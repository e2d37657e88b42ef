"""A wire between machines: its process, whom it lets on, and what hostile ones can do there."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from host.users import A, B, children
from mounting import Machine, wait_until

from vmfs.devices.network.backends import Wire
from vmfs.host import hub
from vmfs.host.wires import PORTS_MOST, WIRES_MOST_USER
from vmfs.words.nets import MAX_FRAME


class Hub:
    """The loop of a wire's process, in a thread; `plug` gives a port."""

    def __init__(self) -> None:
        self.control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(60)
        self._thread = threading.Thread(target=hub.serve, args=(its,))
        self._thread.start()
        self._its = its

    def plug(self) -> socket.socket:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(60)
        socket.send_fds(self.control, [b"+"], [its.fileno()])
        its.close()
        return ours

    def close(self) -> None:
        self.control.close()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._its.close()


@pytest.fixture
def wire() -> Iterator[Hub]:
    one = Hub()
    yield one
    one.close()


def test_a_frame_goes_to_all_others(wire: Hub) -> None:
    one, two, three = (wire.plug() for _ in range(3))
    for size in (14, 1514, MAX_FRAME):
        frame = random.Random(size).randbytes(size)
        two.send(frame)
        assert one.recv(1 << 17) == frame and three.recv(1 << 17) == frame
    two.setblocking(False)
    with pytest.raises(BlockingIOError):
        two.recv(1)


def test_what_is_no_frame_is_lost(wire: Hub) -> None:
    one, two = wire.plug(), wire.plug()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    for size in (1, 13, MAX_FRAME + 1):
        one.send(bytes(size))
    read, write = os.pipe()
    socket.send_fds(one, [b"a frame, and a descriptor"], [write])  # which nobody gets
    os.close(write)
    assert two.recv(1 << 17) == b"a frame, and a descriptor"
    assert os.read(read, 1) == b""
    os.close(read)


def test_one_that_reads_nothing_does_not_stop_the_others(wire: Hub) -> None:
    writer, reader, idle = wire.plug(), wire.plug(), wire.plug()
    frame = bytes(1500)
    for number in range(4000):  # 6 MB: more than the hub keeps for a port
        writer.send(number.to_bytes(4, "big") + frame)
        assert reader.recv(1 << 17)[:4] == number.to_bytes(4, "big")
    got = []
    idle.settimeout(1)
    with contextlib.suppress(TimeoutError):
        while True:
            got.append(int.from_bytes(idle.recv(1 << 17)[:4], "big"))
    assert got == sorted(got) and 100 < len(got) < 2000


def test_a_port_that_is_closed_is_told(wire: Hub) -> None:
    one, two, three = wire.plug(), wire.plug(), wire.plug()
    one.close()
    assert wire.control.recv(9) == hub.GONE
    two.send(b"to whom is left")
    assert three.recv(99) == b"to whom is left"
    two.send(b"")  # the end, to who reads packets
    assert wire.control.recv(9) == hub.GONE


def test_ports_at_random(wire: Hub) -> None:
    """Sent, closed, plugged and not read in any order: it goes on, and counts right."""
    dice, ports, closed = random.Random(5), [wire.plug(), wire.plug()], 0
    for port in ports:
        port.setblocking(False)
    for _ in range(3000):
        what = dice.random()
        if what < 0.02 and len(ports) < 10:
            ports.append(wire.plug())
            ports[-1].setblocking(False)
        elif what < 0.03 and len(ports) > 2:
            ports.pop(dice.randrange(len(ports))).close()
            closed += 1
        else:
            with contextlib.suppress(OSError):
                if what < 0.6:
                    dice.choice(ports).send(dice.randbytes(dice.choice((1, 60, 1514, 9000))))
                else:
                    dice.choice(ports).recv(1 << 17)
    for _ in range(closed):
        assert wire.control.recv(9) == hub.GONE


def test_what_a_card_takes_of_a_wire() -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    backend = Wire(its.detach(), "lan")
    for frame in (b"short", bytes(14), bytes(60), bytes(MAX_FRAME), bytes(MAX_FRAME + 1)):
        ours.send(frame)
    assert backend.collect() == 2
    assert [len(frame) for frame in backend.receive_all(9)] == [14, 60, MAX_FRAME] and not backend.receive_all(9)
    while backend.send_all([bytes(1500)]):  # nobody reads
        pass
    ours.close()
    backend.collect()
    with pytest.raises(OSError):
        backend.receive_all(9)
    with pytest.raises(OSError) as ended:
        backend.send_all([bytes(60)])
    assert ended.value.errno == errno.EPIPE
    backend.close()


# ---- of a mount


def hubs(server) -> set[int]:
    """Processes below the server's that wait for sockets, and have no memory of a machine's."""
    return {pid for pid in children(server.server.pid) if _is_hub(pid)}


def _is_hub(pid: int) -> bool:
    with contextlib.suppress(OSError):
        names = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        return "anon_inode:[eventpoll]" in names and not any("memfd:" in name for name in names)
    return False


def tried(vm: Machine, line: str, file: str = "dev/add") -> int:
    """What a write ends with; 0 when it works."""
    try:
        vm.write(file, line)
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.fixture
def pcs(server) -> Iterator[list[Machine]]:
    """Two of A's, one of B's, one of root's."""
    made = [A.makes(server.path / "one"), A.makes(server.path / "two"), B.makes(server.path / "theirs")]
    made.append(server.make())
    for user, vm in zip((A, A, B, None), made, strict=True):
        (user.does if user else lambda act, *words: act(*words))(vm.write, "machine", "pc")
    yield made
    for vm in made:
        with contextlib.suppress(FileNotFoundError):
            vm.path.rmdir()


def test_a_wire_is_its_first_users(pcs) -> None:
    one, two, theirs, roots = pcs
    A.does(one.write, "dev/add", "net wire lan")
    A.does(two.write, "dev/add", "net wire lan")
    assert B.does(tried, theirs, "net wire lan") == errno.EACCES
    assert B.does(theirs.read, "error") == "add: the wire lan is another user's\n"
    assert "net0" not in B.does(os.listdir, theirs / "dev")
    roots.write("dev/add", "net wire lan")
    assert "wire lan" in A.does(two.read, "dev/net0/info").splitlines()
    A.does((one / "dev/net0").rmdir)
    A.does((two / "dev/net0").rmdir)
    assert B.does(tried, theirs, "net wire lan") == errno.EACCES  # root's card is on it
    (roots / "dev/net0").rmdir()

    def gone() -> bool:
        return B.does(tried, theirs, "net wire lan") == 0

    wait_until(gone, "nobody's any more, and so the next one's")
    assert A.does(tried, one, "net wire lan") == errno.EACCES


def test_names_and_limits(server, pcs) -> None:
    one = pcs[0]
    for line in ("net wire", "net wire .lan", "net wire a/b", "net wire a b", f"net wire {'a' * 65}",
                 "net wire lan model=x", "net wire lan mac=1"):  # fmt: skip
        assert A.does(tried, one, line) == errno.EINVAL, line
    before = hubs(server)
    for number in range(WIRES_MOST_USER):
        A.does(one.write, "dev/add", f"net wire lan{number}")
    wait_until(lambda: len(hubs(server) - before) == WIRES_MOST_USER, "each has its process")
    assert A.does(tried, one, "net wire more") == errno.ENOSPC
    A.does(one.path.rmdir)
    wait_until(lambda: hubs(server) == before, "the wires are gone with the machine")


def test_a_wire_is_full(server, pcs) -> None:
    """Of cards that are not a guest's: as many as a machine has slots for, of two machines."""
    one, two, *_ = pcs
    taken = 0
    for vm in one, two:
        while taken < PORTS_MOST and A.does(tried, vm, "net wire full") == 0:
            taken += 1
    assert taken == PORTS_MOST
    assert A.does(tried, two, "net wire full") == errno.ENOSPC


def test_a_hub_that_is_killed_ends_the_links(server, pcs) -> None:
    one, *_ = pcs
    before = hubs(server)
    A.does(one.write, "dev/add", "net wire lan")
    wait_until(lambda: hubs(server) - before, "it is there")
    (pid,) = hubs(server) - before
    os.kill(pid, 9)
    wait_until(lambda: A.does(tried, one, "net wire lan") == 0, "there is another one")


def test_a_capture_is_written_with_the_callers_rights(pcs, folder: Path) -> None:
    one, *_ = pcs
    A.does(one.write, "dev/add", "net wire lan")
    (folder / "theirs").write_text("theirs")
    for path, number in ((folder / "new", errno.EACCES), (folder / "theirs", errno.EACCES), (folder, errno.EISDIR),
                         (one / "cmdline", errno.EINVAL),
                         ("/dev/full", errno.EINVAL), ("x", errno.EINVAL)):  # fmt: skip
        assert A.does(tried, one, f"{path}\n", "dev/net0/pcap") == number, path
        assert A.does(tried, one, f"net wire lan pcap={path}\n") == number, path
    assert (folder / "theirs").read_text() == "theirs" and A.does(one.read, "dev/net0/pcap") == "none\n"
    os.chown(folder, A.uid, A.uid)
    A.does(one.write, "dev/net0/pcap", f"{folder}/new")
    assert (folder / "new").stat().st_uid == A.uid and (folder / "new").stat().st_size == 24
    assert A.does(one.read, "dev/net0/pcap") == f"{folder}/new\n"
    for text in ("", "a b", "'"):
        assert A.does(tried, one, f"{text}\n", "dev/net0/pcap") == errno.EINVAL, text
    A.does(one.write, "dev/net0/pcap", "off")
    assert A.does(one.read, "dev/net0/pcap") == "none\n"
