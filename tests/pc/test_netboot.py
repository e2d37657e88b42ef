"""A BIOS boots over each card: SeaBIOS, iPXE's ROM, DHCP, a script by HTTP."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator

import pytest
from pc.test_screen import SEABIOS, needs_seabios, run_until

from vmfs.devices.network import roms

SCRIPT = b"#!ipxe\necho It came over ${net0/mac}.\nshell\n"
CARDS = {
    "virtio": (0x1AF4, 0x1041),
    "e1000": (0x8086, 0x100E),
    "rtl8139": (0x10EC, 0x8139),
    "ne2000-pci": (0x10EC, 0x8029),
}


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(SCRIPT)))
        self.end_headers()
        self.wfile.write(SCRIPT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed (package passt)")
    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one.server_address[1]
    one.shutdown()
    one.server_close()


@needs_seabios
@pytest.mark.parametrize("model", CARDS)
def test_a_script_by_http(make_pc, port: int, model: str) -> None:
    if not roms.of(*CARDS[model]):
        pytest.skip("iPXE is not installed (package ipxe-qemu)")
    pc = make_pc()
    pc.write("dev/add", f"net user model={model} mac=52:54:00:00:00:0a\n")
    pc.load("bios", SEABIOS)
    run_until(pc, "Ctrl-B")
    pc.write("keyboard", "ctrl-b")
    run_until(pc, r"iPXE> ?\n")
    pc.write("keyboard", f'"dhcp && chain http://${{net0/gateway}}:{port}/x\\n"')
    run_until(pc, r"It came over 52:54:00:00:00:0a\.")
