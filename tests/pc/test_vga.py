"""Each mode of a VGA and of VESA, set and drawn in by the BIOS of a VGA: what is on the screen then."""

from __future__ import annotations

import io
import time

import pytest
from engine import asm
from pc.initramfs import build
from pc.kernels import GENERIC, needs_kernels
from pc.media import ISOLINUX, isolinux_iso, needs
from pc.test_screen import SEABIOS, needs_seabios
from PIL import Image
from vnc.rfb import Viewer

pytestmark = [needs_seabios, asm.needs_assembler]

# Sets a mode, says a word, and sets 60 pixels on a diagonal to one colour after another.
SECTOR = """
    cld
    xor ax, ax
    mov ds, ax
    {set}
    mov si, offset hello + {loaded}
next: lodsb
    test al, al
    jz dots
    mov ah, 0x0e
    mov bx, 0x0f
    int 0x10
    jmp next
dots: mov cx, {first}
dot: mov dx, cx
    add dx, 16
    mov ax, cx
    mov ah, 0x0c
    and al, 0x0f
    xor bx, bx
    int 0x10
    inc cx
    cmp cx, {last}
    jne dot
    {more}
    mov dx, 0xf4
    out dx, al
stop: jmp stop
hello: .asciz "Hello, VGA!"
"""
FIRST, LAST = 10, 60  # all in the first 64 KiB: beyond them this BIOS sets none

CGA = ((0, 0, 0), (85, 255, 255), (255, 85, 255), (255, 255, 255))
EGA = [
    (0, 0, 0), (0, 0, 170), (0, 170, 0), (0, 170, 170), (170, 0, 0), (170, 0, 170), (170, 85, 0), (170, 170, 170),
    (85, 85, 85), (85, 85, 255), (85, 255, 85), (85, 255, 255), (255, 85, 85), (255, 85, 255), (255, 255, 85),
    (255, 255, 255),
]  # fmt: skip


def boot(make_pc, tmp_path, mode, more=""):
    """A machine whose boot sector has done it, and the picture that it shows."""
    set_mode = f"mov ax, 0x4f02\nmov bx, {mode}" if mode >= 0x100 else f"mov ax, {mode}"
    loaded = 0x7C00 - asm.ORIGIN
    source = SECTOR.format(set=f"{set_mode}\nint 0x10", loaded=loaded, first=FIRST, last=LAST, more=more)
    code = asm.assemble(source, "real").code
    assert len(code) <= 510
    disk = tmp_path / "disk.img"
    disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 16))
    pc = make_pc()
    pc.write("mem_size", "16M")
    pc.write("dev/add", f"ide {disk} ro")
    pc.load("bios", SEABIOS)
    pc.write("vm_run", "for 60s")
    assert pc.read("exit").startswith("shutdown cause=debug-exit"), pc.read("screen.txt")
    image = Image.open(io.BytesIO((pc.path / "screen.png").read_bytes()))
    return pc, image.convert("RGB")


@pytest.mark.parametrize(
    ("mode", "name", "colours"),
    [
        (0x04, "320x200x2", [CGA[colour & 3] for colour in range(16)]),
        (0x06, "640x200x1", [(CGA[0], CGA[3])[colour & 1] for colour in range(16)]),
        (0x0D, "320x200x4", EGA),
        (0x0E, "640x200x4", EGA),
        (0x10, "640x350x4", EGA),
        (0x12, "640x480x4", EGA),
        (0x13, "320x200x8", EGA),
        (0x101, "640x480x8", EGA),
        (0x103, "800x600x8", EGA),
    ],
    ids=lambda value: f"{value:x}h" if isinstance(value, int) else "",
)
def test_a_mode_by_its_bios(make_pc, tmp_path, mode, name, colours):
    pc, image = boot(make_pc, tmp_path, mode)
    assert pc.read("screen.txt") == f"graphics {name}\n"
    assert image.size == tuple(map(int, name.split("x")[:2]))
    pixels = image.load()
    dots = {(x, x + 16): colours[x & 15] for x in range(FIRST, LAST)}
    below = {(x, y): pixels[x, y] for y in range(16, image.height) for x in range(image.width)}
    assert {at: colour for at, colour in below.items() if colour != (0, 0, 0)} == {
        at: colour for at, colour in dots.items() if colour != (0, 0, 0)
    }
    said = {pixels[x, y] for y in range(8) for x in range(11 * 8)}
    assert said == {(0, 0, 0), colours[15]}


@pytest.mark.parametrize(("mode", "name"), [(0x10E, "320x200x16"), (0x115, "800x600x24"), (0x144, "1024x768x32")])
def test_a_mode_of_vesa_has_its_pixels_in_the_framebuffer(make_pc, tmp_path, mode, name):
    pc, image = boot(make_pc, tmp_path, mode | 0x4000)
    assert pc.read("screen.txt") == f"graphics {name}\n"
    assert image.size == tuple(map(int, name.split("x")[:2]))
    assert {image.getpixel((x, y)) for y in range(16) for x in range(88)} > {(0, 0, 0)}


def test_a_bank_of_the_framebuffer_is_at_a0000(make_pc, tmp_path):
    """By VESA's function 5, and a store there, with no linear framebuffer."""
    bank = "mov ax, 0x4f05\nxor bx, bx\nmov dx, 4\nint 0x10\nmov ax, 0xa000\nmov es, ax\nmov byte ptr es:[0x10], 15"
    _, image = boot(make_pc, tmp_path, 0x103, bank)
    at = (4 << 16) + 0x10
    assert image.getpixel((at % 800, at // 800)) == (255, 255, 255)


def test_text_of_40_columns_has_the_font_that_its_bios_has_loaded(make_pc, tmp_path):
    pc, image = boot(make_pc, tmp_path, 1)
    assert pc.read("screen.txt").startswith("Hello, VGA!\n") and image.size == (360, 400)
    glyph = ["".join("#" if image.getpixel((x, y)) != (0, 0, 0) else "." for x in range(9)) for y in range(16)]
    assert glyph[2:5] == ["##...##.."] * 3 and glyph[6] == "#######.."


def test_a_screen_is_filled_soon(make_pc, tmp_path):
    """By a loop of stores, by one instruction, and by the BIOS: far slower than it is, and fast enough to be used."""
    fill = """mov ax, 0xa000
    mov es, ax
    xor di, di
    mov cx, 9600
    mov eax, -1
    rep stosd
    mov ax, 0x0600
    mov bx, 0x0200
    mov cx, 0x0500
    mov dx, 0x1d4f
    int 0x10"""
    began = time.monotonic()
    _, image = boot(make_pc, tmp_path, 0x12, fill)
    assert time.monotonic() - began < 60
    colours = {count: colour for count, colour in image.getcolors()}
    assert colours == {640 * 80: (255, 255, 255), 640 * 400: (0, 170, 0)}


@needs_kernels
@needs("xorriso", ISOLINUX)
def test_linux_draws_its_console_and_follows_the_mouse(make_pc, tmp_path):
    """vesafb in a mode that the kernel's setup has set by the BIOS; psmouse, by a mouse with a wheel."""
    script = """
    cat /proc/fb > /dev/ttyS0
    echo "text on the screen" > /dev/tty0
    until grep Mouse /proc/bus/input/devices > /dev/ttyS0; do sleep 0.1; done
    echo ready > /dev/ttyS0
    exec cat /dev/input/mice > /dev/ttyS0
    """
    initrd = build(script, kernel=GENERIC, modules=["psmouse"])
    config = (
        "serial 0 115200\ndefault a\nprompt 0\nlabel a\nkernel /vmlinuz\ninitrd /initrd\n"
        "append vga=0x315 console=tty0 console=ttyS0 quiet\n"
    )
    image = isolinux_iso(tmp_path / "linux.iso", config, {"vmlinuz": GENERIC.image, "initrd": initrd})
    pc = make_pc()
    pc.write("mem_size", "256M")
    pc.load("bios", SEABIOS)
    pc.write("dev/add", f"cdrom {image}")
    pc.start()
    pc.expect("VESA VGA")
    pc.expect("ImExPS/2 Generic Explorer Mouse")
    pc.expect("ready")
    assert pc.read("screen.txt") == "graphics 800x600x24\n"
    picture = Image.open(io.BytesIO((pc.path / "screen.png").read_bytes())).convert("L")
    rows = [y for y in range(600) if any(picture.getpixel((x, y)) for x in range(200))]
    assert len(rows) >= 10  # what it has said
    pc.write("vnc", f"{tmp_path}/s")
    with Viewer(tmp_path / "s") as viewer:
        assert viewer.begin() == (800, 600)
        viewer.point(0, 400, 300)
        viewer.point(0, 407, 295)
        pc.expect("\x08\x07\x05")
        viewer.point(1, 407, 295)
        pc.expect("\x09\0\0")
