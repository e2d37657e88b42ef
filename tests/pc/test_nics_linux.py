"""Linux's drivers of the cards that PCs have had: they bind, and carry traffic both ways."""

from __future__ import annotations

import hashlib
import os
import socket
import urllib.request
from collections.abc import Iterator

import pytest
from pc.conftest import Pc, boot_linux
from pc.kernels import GENERIC, needs_kernels
from pc.test_virtio_linux import DHCP, counters, info
from pc.web import served

pytestmark = needs_kernels

CONTENT = os.urandom(2 << 20)


@pytest.fixture
def server() -> Iterator[int]:
    """Its port."""
    with served(lambda path: CONTENT[: int(path[1:])]) as number:
        yield number


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize(
    "model, module, size",
    [("e1000", "e1000", 2 << 20), ("rtl8139", "8139cp", 2 << 20), ("ne2000-pci", "ne2k-pci", 1 << 20)],
)
def test_a_card(make_pc, server: int, model: str, module: str, size: int) -> None:
    pc: Pc = make_pc()
    port = free_port()
    pc.write("dev/add", f"net user model={model} tcp={port}:80\n")
    url = f"http://$(route -n | awk '/^0.0.0.0/ {{ print $2 }}'):{server}/{size}"
    scripts = {
        "dhcp": DHCP,
        "up": "ifconfig eth0 up\nudhcpc -n -q -i eth0 -s /bin/dhcp",
        "get": f"wget -q -O - {url} | tee /tmp/content | sha256sum",
        "serve": "httpd -p 80 -h /tmp",
    }
    files = {f"bin/{name}": f"#!/bin/sh\nset -e\n{text}\n".encode() for name, text in scripts.items()}
    boot_linux(pc, modules=(module,), files=files, kernel=GENERIC)
    pc.expect("guest# ")
    assert pc.shell("basename $(readlink /sys/class/net/eth0/device/driver)") == f"{module}\n"
    pc.shell("up 2>&1")
    got = pc.shell("get 2>&1")
    assert got.split()[0] == hashlib.sha256(CONTENT[:size]).hexdigest()
    pc.shell("serve")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/content", timeout=60) as answer:
        assert answer.read() == CONTENT[:size]
    seen = counters(pc, "net0")
    assert seen["rx_bytes"] > size and seen["tx_bytes"] > size
    assert not {"tx_bad", "bad_dma"} & seen.keys()
    assert info(pc, "net0")["driver"] == "ready"
    assert "errors:0" in pc.shell("ifconfig eth0 | grep 'RX packets'")
