"""How fast TCP is between a Debian and the host, by virtio, e1000 and rtl8139, against QEMU TCG with the same cards:
several rounds in turn.

The same kernel and initramfs on both. Ours goes by passt, QEMU by its own user network, since Debian 12's passt takes
none of the short acknowledgements that QEMU's e1000 and rtl8139 send. Both lead to a server on the host's loopback,
frames have 1500 bytes, and busybox's wget gets and posts. Figures are between marks that the guest says, and the best
of the rounds: by the host's clock, and by processor time, passt's with ours. VMFS_BENCH_CARDS names some of the cards.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from bench.guests import OFF, Guest, Told, on_tcg, on_vmfs, qemu_version
from bench.harness import Result, mounted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import CLOUD, FOLDER, GENERIC  # noqa: E402

ROUNDS = 3
MIB = 32
WAYS = dict.fromkeys(("receive", "send"), float(MIB))
CARDS = {
    "virtio": (CLOUD, ("virtio_pci", "virtio_net"), "virtio-net-pci"),
    "e1000": (GENERIC, ("e1000",), "e1000"),
    "rtl8139": (GENERIC, ("8139cp",), "rtl8139"),
}
DHCP = '#!/bin/sh\n[ "$1" != bound ] || { ifconfig $interface $ip netmask $subnet && route add default gw $router; }\n'
SCRIPT = f"""
ifconfig eth0 up
udhcpc -n -q -i eth0 -s /dhcp >/dev/null 2>&1
url=http://$(route -n | awk '/^0.0.0.0/ {{ print $2 }}'):PORT/
yes | head -c {MIB}m >/tmp/text
sleep 1
echo mark receive.begin
wget -q -O /dev/null $url || echo failed
echo mark receive.end
echo mark send.begin
wget -q -O /dev/null --post-file /tmp/text $url || echo failed
echo mark send.end
""" + OFF


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(MIB << 20))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the guest that gives up
            for _ in range(MIB):
                self.wfile.write(bytes(1 << 20))

    def do_POST(self) -> None:
        left = int(self.headers["Content-Length"])
        while left and (data := self.rfile.read1(min(left, 1 << 20))):
            left -= len(data)
        self.send_response(200 if not left else 400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def server() -> Iterator[int]:
    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one.server_address[1]
    one.shutdown()
    one.server_close()


Rates = dict[str, tuple[float, float]]


def measure(mount: Path, card: str, peer: str) -> tuple[list[Rates], list[Rates]]:
    kernel, modules, device = CARDS[card]
    ours, theirs = [], []
    with server() as port:
        files = {"dhcp": DHCP.encode()}
        initrd = build(SCRIPT.replace("PORT", str(port)), kernel=kernel, modules=modules, files=files)
        guest = Guest(kernel.image, initrd)
        for _ in range(ROUNDS):
            ours.append(rates(on_vmfs(mount, guest, lambda vm: add(vm, card))))
            if peer:
                theirs.append(rates(on_tcg(guest, "-netdev", "user,id=n", "-device", f"{device},netdev=n")))
    return ours, theirs


def rates(told: Told) -> Rates:
    if "failed" in told.said:
        raise RuntimeError(f"the guest's wget has failed:\n{told.said[-2000:]}")
    return told.rates(WAYS)


def add(vm: Path, card: str) -> tuple[int]:
    """Returns passt's process."""
    (vm / "dev/add").write_text(f"net user model={card}")
    info = dict(line.split(maxsplit=1) for line in (vm / "dev/net0/info").read_text().splitlines())
    return (int(info["pid"]),)


def results() -> list[Result]:
    if not (FOLDER / "stamp").exists():
        print("bench net: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return []
    peer, found = qemu_version(), []
    if not peer:
        print("bench net: qemu-system-x86_64 is not installed: no peer", file=sys.stderr)
    with mounted("--engine", "emulator") as mount:
        for card in os.environ.get("VMFS_BENCH_CARDS", " ".join(CARDS)).split():
            ours, theirs = measure(mount, card, peer)
            for at, kind in enumerate(("", ", by processor time")):
                for one, other in zip(ours, theirs, strict=False):
                    line = (f"{way} {one[way][at]:.4g}/{other[way][at]:.4g}" for way in WAYS)
                    print(f"bench net: {card}{kind}", *line, file=sys.stderr)
                for way in WAYS:
                    best = max(one[way][at] for one in ours)
                    other_best = max((one[way][at] for one in theirs), default=None)
                    unit, mark = ("MiB/s CPU", "") if at else ("MiB/s", ">= 0.8x")
                    found.append(Result(f"net: {card}, TCP, {way}{kind}", unit, best, peer, other_best, mark))
    return found
