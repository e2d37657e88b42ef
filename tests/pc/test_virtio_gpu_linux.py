"""Linux's driver of virtio-gpu, and its console on the screen that it makes."""

from __future__ import annotations

import hashlib
import io

import pytest
from mounting import wait_until
from pc.conftest import Pc, boot_linux
from pc.kernels import GENERIC, needs_kernels

from vmfs.devices import screen
from vmfs.devices.vga import FONT_GLYPH
from vmfs.devices.virtio.edid import edid
from vmfs.words.errors import Unsupported

pytestmark = needs_kernels


def text_of(png: bytes) -> str:
    """What is written on a console's screen in the font of every VGA: of each cell the glyph that it is."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("L").point(lambda light: 255 if light > 60 else 0).convert("1")
    font = screen.host_font()
    glyphs = {font[FONT_GLYPH * code :][:16]: chr(code) for code in range(32, 127)}
    lines = []
    for y in range(0, picture.height - 15, 16):
        cells = (picture.crop((x, y, x + 8, y + 16)).tobytes() for x in range(0, picture.width - 7, 8))
        lines.append("".join(glyphs.get(cell, "?") for cell in cells).rstrip())
    return "\n".join(lines)


def test_linux_has_its_console_there(make_pc) -> None:
    try:
        screen.host_font()
    except Unsupported as error:
        pytest.skip(str(error))
    pc: Pc = make_pc()
    pc.write("dev/add", "gpu 800x600\n")
    boot_linux(pc, modules=("virtio_pci", "virtio_gpu"), kernel=GENERIC, cmdline="fbcon=font:VGA8x16")
    pc.expect("guest# ")
    device = "/sys/class/drm/card0"
    assert "virtio0" in pc.shell("ls /sys/bus/virtio/drivers/virtio_gpu")
    assert pc.shell(f"cat {device}-Virtual-1/status") == "connected\n"
    assert pc.shell(f"head -n 1 {device}-Virtual-1/modes") == "800x600\n"
    said = pc.shell(f"sha256sum <{device}-Virtual-1/edid")
    assert said.split()[0] == hashlib.sha256(edid(800, 600)).hexdigest()
    pc.shell("echo Seen on one line. >/dev/tty1")
    wait_until(lambda: "Seen on one line." in text_of((pc.path / "screen.png").read_bytes()), "the text")
    assert pc.read("screen.txt") == "graphics 800x600x32\n"
