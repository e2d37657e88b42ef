"""A BIOS boots over each card: SeaBIOS, iPXE's ROM, DHCP, a script by HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pc.test_screen import SEABIOS, needs_seabios, run_until
from pc.web import served

from vmfs.devices.network import roms

SCRIPT = b"#!ipxe\necho It came over ${net0/mac}.\nshell\n"
CARDS = {
    "virtio": (0x1AF4, 0x1041),
    "e1000": (0x8086, 0x100E),
    "rtl8139": (0x10EC, 0x8139),
    "ne2000-pci": (0x10EC, 0x8029),
}


@pytest.fixture
def port() -> Iterator[int]:
    with served(lambda path: SCRIPT) as number:
        yield number


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
