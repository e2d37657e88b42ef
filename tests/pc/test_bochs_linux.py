"""Linux's driver of Bochs' VBE, in a mode of 4K: its console, as a picture and to a viewer."""

from __future__ import annotations

import pytest
from mounting import wait_until
from pc.conftest import Pc, boot_linux
from pc.kernels import GENERIC, needs_kernels
from pc.test_virtio_gpu_linux import text_of
from PIL import Image
from vnc.rfb import Viewer

from vmfs.devices import screen
from vmfs.words.errors import Unsupported

pytestmark = needs_kernels
WIDTH, HEIGHT = 3840, 2160


def test_its_console_in_4k(make_pc, tmp_path) -> None:
    try:
        screen.host_font()
    except Unsupported as error:
        pytest.skip(str(error))
    pc: Pc = make_pc()
    last = b"#!/bin/sh\nprintf '\\033[2J\\033[135;460HSeen in a corner.' >/dev/tty1\n"  # of 135 rows of 480 columns
    cmdline = f"fbcon=font:VGA8x16 video={WIDTH}x{HEIGHT}"
    boot_linux(pc, modules=("bochs",), kernel=GENERIC, cmdline=cmdline, files={"bin/say": last})
    pc.expect("guest# ")
    assert pc.shell("cat /proc/fb") == "0 bochs-drmdrmfb\n"
    assert pc.read("screen.txt") == f"graphics {WIDTH}x{HEIGHT}x32\n"
    pc.shell("say")

    def corner() -> bytes:
        with Image.open(pc.path / "screen.png") as image:
            assert image.size == (WIDTH, HEIGHT)
            part = image.crop((WIDTH - 320, HEIGHT - 160, WIDTH, HEIGHT))
        part.save(tmp_path / "corner.png")
        return (tmp_path / "corner.png").read_bytes()

    wait_until(lambda: "Seen in a corner." in text_of(corner()), "the text")
    pc.write("vnc", f"{tmp_path}/s")
    with Viewer(tmp_path / "s") as viewer:
        assert viewer.begin() == (WIDTH, HEIGHT)
        viewer.ask(WIDTH, HEIGHT)
        assert sum(width * height for _, _, width, height, _ in viewer.rectangles()) == WIDTH * HEIGHT
