"""Debian's drivers on our virtio devices: disks, a network, entropy."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from pc.conftest import Pc, boot_linux
from pc.kernels import BUSYBOX, CLOUD, GENERIC, Kernel, needs_kernels

pytestmark = needs_kernels

MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng")
MIB = 1 << 20


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    """A file with an empty ext4."""
    if shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None:
        pytest.skip("mkfs.ext4 is not installed (package e2fsprogs)")
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(48 * MIB)
    _e2("mkfs.ext4", "-q", "-F", path)
    return path


def _e2(program: str, *arguments: object) -> int:
    path = f"{os.environ['PATH']}:/sbin:/usr/sbin"
    done = subprocess.run(
        [shutil.which(program, path=path) or program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), f"{program}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.returncode


def booted(
    pc: Pc, files: dict[str, str] | None = None, *, modules: tuple[str, ...] = MODULES, kernel: Kernel = CLOUD
) -> Pc:
    """Commands longer than the terminal's line go into `files`."""
    scripts = {f"bin/{name}": f"#!/bin/sh\nset -e\n{text}\n".encode() for name, text in (files or {}).items()}
    boot_linux(pc, modules=modules, files=scripts, kernel=kernel)
    pc.expect("guest# ")
    return pc


def counters(pc: Pc, device: str) -> dict[str, int]:
    lines = (pc.path / "dev" / device / "counters").read_text().splitlines()
    return {name: int(count) for name, count in (line.split() for line in lines)}


def info(pc: Pc, device: str) -> dict[str, str]:
    lines = (pc.path / "dev" / device / "info").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def test_disks(make_pc, ext4: Path, tmp_path: Path) -> None:
    """Three at once: one that is written, one that keeps its file as it is, one that cannot be written."""
    content = os.urandom(2 * MIB)
    raw = tmp_path / "raw.img"
    raw.write_bytes(content)
    pc = make_pc()
    pc.write("dev/add", f"blk {ext4} rw\n")
    pc.write("dev/add", f"blk {raw} cow\n")
    shutil.copy(raw, tmp_path / "copy of it.img")
    pc.write("dev/add", f"blk '{tmp_path}/copy of it.img' ro\n")
    pc.write("dev/add", "rng\n")
    booted(
        pc,
        {
            "fill": "mount /dev/vda /mnt\ndd if=/dev/vdb of=/mnt/copy bs=64k 2>/dev/null\nsync\nmd5sum </mnt/copy",
            "scribble": "dd if=/dev/zero of=/dev/vdb bs=4k seek=3 count=5 conv=notrunc 2>/dev/null\nsync",
        },
    )
    digest = hashlib.md5(content).hexdigest()
    assert pc.shell("fill").split()[0] == digest
    assert pc.shell("md5sum </dev/vdc").split()[0] == digest
    assert pc.shell("blockdev --getro /dev/vdc") == "1\n"
    assert pc.shell("blockdev --getsize64 /dev/vda") == f"{48 * MIB}\n"
    pc.shell("scribble")
    pc.shell("echo 3 >/proc/sys/vm/drop_caches")
    scribbled = content[: 3 * 4096] + bytes(5 * 4096) + content[8 * 4096 :]
    assert pc.shell("md5sum </dev/vdb").split()[0] == hashlib.md5(scribbled).hexdigest()
    assert raw.read_bytes() == content
    freed = ext4.stat().st_blocks
    pc.shell("rm /mnt/copy; sync; fstrim /mnt")
    assert info(pc, "blk0")["driver"] == "ready" and info(pc, "blk0")["path"] == str(ext4)
    if info(pc, "blk0")["discard"] == "yes":
        assert counters(pc, "blk0")["discard_bytes"] > 20 * MIB
        assert ext4.stat().st_blocks <= freed - 2 * MIB // 512
    assert counters(pc, "blk0")["flushes"] > 0 and "errors" not in counters(pc, "blk0")
    assert pc.shell("head -c 100 /dev/hwrng | wc -c") == "100\n"
    assert counters(pc, "rng0")["bytes"] >= 100
    pc.shell("umount /mnt")
    assert _e2("e2fsck", "-fn", ext4) == 0


def test_two_cpus_have_a_queue_each(make_pc, ext4: Path) -> None:
    """Of disk and card, with a vector of MSI-X each; both CPUs write and read back at the same time."""
    pc = make_pc()
    pc.write("cpus", "2")
    pc.write("dev/add", f"blk {ext4} rw\n")
    with_card = shutil.which("passt") is not None
    if with_card:
        pc.write("dev/add", "net user\n")
    booted(
        pc,
        {
            "fill": "head -c 6000000 /dev/urandom >/tmp/$1\nmkdir -p /mnt/$1\n"
            "for i in 1 2 3; do taskset -c $1 dd if=/tmp/$1 of=/mnt/$1/$i bs=100k 2>/dev/null; done\nsync",
            "both": "mount /dev/vda /mnt\nfill 0 & fill 1 & wait\necho 3 >/proc/sys/vm/drop_caches\n"
            "for c in 0 1; do for i in 1 2 3; do taskset -c $c cmp /tmp/$c /mnt/$c/$i; done; done\n"
            "umount /mnt\necho right",
        },
    )
    assert pc.shell("both").splitlines()[-1] == "right"
    assert pc.shell("ls /sys/block/vda/mq").split() == ["0", "1"]
    vectors = pc.shell("grep virtio /proc/interrupts")
    assert "PCI-MSI" in vectors
    taken = {line.split()[-1]: [int(n) for n in line.split()[1:3]] for line in vectors.splitlines()}
    assert all(sum(taken[f"virtio0-req.{queue}"]) > 0 for queue in (0, 1))
    assert counters(pc, "blk0").keys() >= {"read_requests", "write_requests"} and "errors" not in counters(pc, "blk0")
    assert info(pc, "blk0")["driver"] == "ready"
    if with_card:
        assert {"virtio1-input.0", "virtio1-output.0", "virtio1-input.1", "virtio1-output.1"} <= taken.keys()
        assert pc.shell("ls /sys/class/net/eth0/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]
    assert _e2("e2fsck", "-fn", ext4) == 0


WRITER = """\
mount /dev/vda /mnt
i=0
while i=$((i + 1)); do
    head -c $((i * 700)) /dev/urandom >/mnt/$i
    sync
    echo "synced $i $(md5sum </mnt/$i)"
    [ $((i % 3)) != 0 ] || rm /mnt/$((i - 1))
done
"""
CHECKER = 'mount /dev/vda /mnt\ncd /mnt\nfor one in *[0-9]; do echo "$one $(md5sum <$one)"; done\ncd /'


def test_what_was_synced_is_there_after_a_kill(make_pc, other_mount, ext4: Path) -> None:
    """The server is killed while the guest writes; the file system recovers by its journal, and has what the guest was
    told is on the disk."""
    pc = Pc(other_mount.path / "victim")
    pc.write("dev/add", f"blk {ext4} rw\n")
    boot_linux(pc, WRITER, modules=MODULES)
    for number in range(1, 8):
        pc.expect(rf"synced {number} \S+ +-\r\n")
    pc.die(other_mount)  # it writes the next one now, or flushes, or whatever it does

    synced = {}
    removed = set()
    for line in pc.said.splitlines():
        if line.startswith("synced ") and len(line.split()) == 4:
            number, digest = int(line.split()[1]), line.split()[2]
            synced[number] = digest
            if number % 3 == 0:
                removed.add(number - 1)
    assert len(synced) >= 7
    _e2("e2fsck", "-fp", ext4)  # replays the journal; nothing else is to be repaired
    assert _e2("e2fsck", "-fn", ext4) == 0

    again = make_pc()
    again.write("dev/add", f"blk {ext4} rw\n")
    booted(again, {"check": CHECKER})
    found = dict(line.split()[:2] for line in again.shell("check").splitlines())
    for number, digest in synced.items():
        if number not in removed:
            assert found[str(number)] == digest


class Server(http.server.BaseHTTPRequestHandler):
    """Gives its `content`, and answers what it gets with its SHA-256.

    The passt of Debian 12 stops sending on a connection that the guest has closed on its side (its capture shows the
    guest's acknowledgement as the last segment), so HTTP, which closes none early.
    """

    content = os.urandom(3 * MIB)

    def do_GET(self) -> None:
        self._answer(self.content)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(hashlib.sha256(data).hexdigest().encode())

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


DHCP = '[ "$1" != bound ] || { ifconfig $interface $ip netmask $subnet && route add default gw $router; }'


def test_tcp_with_a_server_on_the_hosts_loopback(make_pc) -> None:
    """By passt: the gateway's address is the host's loopback."""
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed (package passt)")
    pc = make_pc()
    try:
        pc.write("dev/add", "net user\n")
    except OSError as error:
        pytest.skip(f"passt does not start here: {error.strerror}: {pc.read('error')}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://$(route -n | awk '/^0.0.0.0/ {{ print $2 }}'):{server.server_address[1]}/"
        booted(
            pc,
            {
                "dhcp": DHCP,
                "up": "ifconfig eth0 up\nudhcpc -n -q -i eth0 -s /bin/dhcp",
                "get": f"wget -q -O - {url} | sha256sum",
                # wget posts a text: up to its first NUL.
                "put": f"tr '\\0' N </bin/busybox >/tmp/text\nwget -q -O - --post-file /tmp/text {url}",
            },
        )
        pc.shell("up 2>&1")
        assert pc.shell("get").split()[0] == hashlib.sha256(Server.content).hexdigest()
        text = BUSYBOX.read_bytes().replace(b"\0", b"N")
        # A connection right after a large one. Where passt has lost frames of that, it sends all after them again at
        # each duplicate ACK, the SYN-ACK is late for it, and the guest's second SYN is reset (tcp.c, tcp_data_from_tap
        # and tcp_tap_handler; newer ones ignore such a SYN).
        assert pc.shell("put") == hashlib.sha256(text).hexdigest()
        sent = counters(pc, "net0")
        assert sent["rx_bytes"] > len(Server.content) and sent["tx_bytes"] > len(text)
        passt = Path(f"/proc/{info(pc, 'net0')['pid']}")
        assert (passt / "comm").read_text().startswith("passt")
    finally:
        server.shutdown()
        server.server_close()
    pc.write("state", "pause")
    pc.ended()
    pc.path.rmdir()
    deadline = time.monotonic() + 60
    while passt.exists():  # it ends with its card
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_of_the_host_and_a_second_console(make_pc, tmp_path: Path) -> None:
    """The cloud kernel has no 9p, so the generic one."""
    folder = tmp_path / "shared"
    (folder / "sub").mkdir(parents=True)
    content = os.urandom(MIB + 77)
    (folder / "sub" / "data").write_bytes(content)
    (folder / "out").symlink_to("/etc")
    for number in range(120):
        (folder / "sub" / f"name {number}").touch()
    pc = make_pc()
    pc.write("dev/add", f"share {folder} host\n")
    pc.write("dev/add", f"share {folder} kept ro\n")
    pc.write("dev/add", "hvc\n")
    modules = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p")
    mount = "mount -t 9p -o trans=virtio,version=9p2000.L"
    booted(
        pc,
        {
            "both": f"mkdir /m /k\n{mount} host /m\n{mount} kept /k",
            "work": "cd /m\nmkdir -p new/deep\ncp sub/data new/deep/copy\nmv new moved\nln -s data moved/link\n"
            "chmod 640 moved/deep/copy\necho more >>moved/deep/copy\nln moved/deep/copy hard\nrm sub/name*\nsync",
        },
        modules=modules,
        kernel=GENERIC,
    )
    pc.shell("both")
    assert pc.shell("md5sum </m/sub/data").split()[0] == hashlib.md5(content).hexdigest()
    assert pc.shell("ls /m/sub | wc -l") == "121\n"
    pc.shell("work")
    copy = folder / "moved" / "deep" / "copy"
    assert copy.read_bytes() == content + b"more\n" == (folder / "hard").read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o640 and copy.stat().st_nlink == 2
    assert os.readlink(folder / "moved" / "link") == "data" and os.listdir(folder / "sub") == ["data"]
    assert "Read-only file system" in pc.shell("touch /k/x 2>&1 || true")
    assert pc.shell("df /m | tail -1 | cut -c1-4") == "host\n"
    hvc = os.open(pc.path / "hvc", os.O_RDWR)
    try:
        pc.shell("echo to the host >/dev/hvc0")
        assert os.read(hvc, 100) == b"to the host\r\n"
        pc.type("head -n 1 /dev/hvc0\n")
        pc.expect("hvc0\r\n")
        os.write(hvc, b"from the host\n")
        pc.expect("from the host\r\n")
        pc.expect("guest# ")
    finally:
        os.close(hvc)
    assert info(pc, "share0")["tag"] == "host" and counters(pc, "share0")["requests"] > 100
