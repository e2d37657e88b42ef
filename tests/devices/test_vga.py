"""The VGA's memory and its pictures: what the CPU reads and writes through latches, masks and logic, against a model
that goes bit by bit; and each mode, against pictures that are made without planes."""

from __future__ import annotations

import io
import random

import pytest
from devices.fakes import FakeMachine, Guest, load, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vmfs.devices import screen
from vmfs.devices.machine import Pc
from vmfs.memory.ram import Memory

# Registers of the modes, as the manual's tables have them: miscellaneous output, sequencer, CRT controller, graphics
# controller, attribute controller.
_FLAT = "000102030405060708090a0b0c0d0e0f"
_EGA = "000102030405140738393a3b3c3d3e3f"
MODES = {
    "4": ("63", "0309030002", "2d2728902b80bf1f00c10000000000009c8e8f140096b9a2ff", "0000000000300f0fff",
          "0013151702040607101112131415161701 00030000"),
    "6": ("63", "0301010006", "5f4f50825480bf1f00c10000000000009c8e8f280096b9c2ff", "0000000000000d0fff",
          "00171717171717171717171717171717 0100010000"),
    "d": ("63", "03090f0006", "2d2728902b80bf1f00c00000000000009c8e8f140096b9e3ff", "000000000000050fff",
          _EGA + "01000f0000"),
    "12": ("e3", "03010f0006", "5f4f508254800b3e0040000000000000ea8cdf2800e704e3ff", "000000000000050fff",
           _EGA + "01000f0000"),
    "13": ("63", "03010f000e", "5f4f50825480bf1f00410000000000009c8e8f284096b9a3ff", "000000000040050fff",
           _FLAT + "41000f0000"),
    "X": ("e3", "03010f0006", "5f4f508254800d3e0041000000000000eaacdf2800e706e3ff", "000000000040050fff",
          _FLAT + "41000f0000"),
}  # fmt: skip


def set_mode(guest, name):
    misc, *parts = (bytes.fromhex(part.replace(" ", "")) for part in MODES[name])
    sequencer, crtc, graphics, attributes = parts
    assert [len(part) for part in parts] == [5, 25, 9, 21]
    guest.out(0x3C2, misc[0])
    for index, value in enumerate(sequencer):
        guest.out(0x3C4, value << 8 | index, 2)
    guest.out(0x3D4, 0x0011, 2)
    for index, value in enumerate(crtc):
        guest.out(0x3D4, value << 8 | index, 2)
    for index, value in enumerate(graphics):
        guest.out(0x3CE, value << 8 | index, 2)
    guest.inp(0x3DA)
    for index, value in enumerate(attributes):
        guest.out(0x3C0, index)
        guest.out(0x3C0, value)
    guest.out(0x3C0, 0x20)


class Window:
    """What a CPU does at A0000-BFFFF: to RAM where that is mapped, else to the device."""

    def __init__(self, pc, guest):
        self.pc, self.guest = pc, guest

    def is_ram(self, address):
        return self.pc._window[address >> 16 & 1] == "ram"

    def write(self, address, value):
        if self.is_ram(address):
            self.pc.memory.write(address, bytes((value,)))
        else:
            self.guest.store(address, value, 1)

    def read(self, address):
        return self.pc.memory.read(address, 1)[0] if self.is_ram(address) else self.guest.load(address, 1)


@pytest.fixture
def window(pc, guest):
    return Window(pc, guest)


def graphics(guest, index, value):
    guest.out(0x3CE, value << 8 | index, 2)


def map_mask(guest, value):
    guest.out(0x3C4, value << 8 | 2, 2)


def picture(pc):
    image = Image.open(io.BytesIO(screen.picture(pc.display)))
    image.load()
    return image


# ---- accesses, against a model of the manual's figures


class Model:
    """Four planes, bit by bit."""

    def __init__(self):
        self.planes = [[0] * 65536 for _ in range(4)]
        self.latches = [0] * 4

    def read(self, at, registers):
        g = registers
        self.latches = [plane[at] for plane in self.planes]
        if not g["mode"] & 8:
            return self.latches[g["read_map"]]
        result = 0
        for bit in range(8):
            colour = [latch >> bit & 1 for latch in self.latches]
            wanted = [g["compare"] >> plane & 1 for plane in range(4)]
            cares = [g["care"] >> plane & 1 for plane in range(4)]
            if all(one == other or not care for one, other, care in zip(colour, wanted, cares, strict=True)):
                result |= 1 << bit
        return result

    def write(self, at, value, registers):
        g = registers
        mode, rotate, logic = g["mode"] & 3, g["rotate"] & 7, g["rotate"] >> 3 & 3
        turned = (value >> rotate | value << 8 - rotate) & 0xFF
        for plane in range(4):
            if not g["map_mask"] >> plane & 1:
                continue
            latch, out = self.latches[plane], 0
            for bit in range(8):
                held = latch >> bit & 1
                passes = g["bit_mask"] >> bit & 1
                if mode == 1:
                    out |= held << bit
                    continue
                if mode == 0:
                    new = g["set_reset"] >> plane & 1 if g["enable"] >> plane & 1 else turned >> bit & 1
                elif mode == 2:
                    new = value >> plane & 1
                else:
                    new = g["set_reset"] >> plane & 1
                    passes &= turned >> bit & 1
                new = (new, new & held, new | held, new ^ held)[logic]
                out |= (new if passes else held) << bit
            self.planes[plane][at] = out


INDEX = {"set_reset": 0, "enable": 1, "compare": 2, "rotate": 3, "read_map": 4, "mode": 5, "care": 7, "bit_mask": 8}


def test_accesses_to_planes_are_those_of_the_model(pc, guest, window):
    set_mode(guest, "12")
    dice, model = random.Random(12), Model()
    registers = dict.fromkeys(INDEX, 0) | {"care": 15, "bit_mask": 0xFF, "map_mask": 15}
    for _ in range(6000):
        name = dice.choice((*INDEX, "map_mask", "mode"))
        most = {"rotate": 31, "read_map": 3, "mode": 3, "bit_mask": 255}.get(name, 15)
        value = dice.randint(0, most) | (dice.choice((0, 8)) if name == "mode" else 0)
        registers[name] = value
        if name == "map_mask":
            map_mask(guest, value)
        else:
            graphics(guest, INDEX[name], value)
        at = dice.choice((0, 1, 5, 0xFFFF, 0x1234))
        if dice.random() < 0.5:
            byte = dice.randrange(256)
            window.write(0xA0000 + at, byte)
            model.write(at, byte, registers)
        else:
            assert window.read(0xA0000 + at) == model.read(at, registers), registers
    planes = pc.display.planes()
    for at in (0, 1, 5, 0xFFFF, 0x1234):
        assert list(planes[4 * at : 4 * at + 4]) == [plane[at] for plane in model.planes]


def test_wide_accesses_are_those_of_their_bytes(pc, guest, window):
    set_mode(guest, "12")
    map_mask(guest, 5)
    guest.store(0xA0010, 0x8877_6655_4433_2211, 8)
    graphics(guest, 4, 2)
    assert guest.load(0xA0010, 8) == 0x8877_6655_4433_2211 and guest.load(0xA0012, 2) == 0x4433
    graphics(guest, 4, 1)
    assert guest.load(0xA0010, 8) == 0


def test_what_is_beyond_the_window_reads_as_ones(guest, window):
    set_mode(guest, "12")
    graphics(guest, 6, 0x01)  # 128 KiB
    assert window.read(0xB8000) == 0
    graphics(guest, 6, 0x0D)  # B8000 alone
    assert guest.load(0xB0000, 1) == 0xFF
    guest.store(0xB0000, 0x55, 1)
    assert guest.load(0xB8000, 1) == 0


# ---- what is RAM, and what is not


def test_text_and_mode_13h_are_ram_and_planes_are_not(pc, guest, window):
    assert window.is_ram(0xA0000) and window.is_ram(0xB8000)
    window.write(0xB8000, ord("x"))
    set_mode(guest, "12")
    assert not window.is_ram(0xA0000) and window.is_ram(0xB8000)
    set_mode(guest, "13")
    assert window.is_ram(0xA0000)
    set_mode(guest, "X")
    assert not window.is_ram(0xA0000)
    set_mode(guest, "4")
    assert window.is_ram(0xB8000)
    set_mode(guest, "6")
    assert not window.is_ram(0xB8000) and window.is_ram(0xA0000)
    pc.reset()
    assert window.is_ram(0xA0000) and window.is_ram(0xB8000)


def test_bytes_go_along_from_mode_13h_to_mode_x_and_back(pc, guest, window):
    set_mode(guest, "13")
    for x in range(64):
        window.write(0xA0000 + x, x + 1)
    guest.out(0x3C4, 0x0604, 2)  # no longer chained
    for plane in range(4):
        graphics(guest, 4, plane)
        # Of the manual: an address's low two bits chose the plane, and the others are the address in it.
        assert [window.read(0xA0000 + at) for at in range(0, 64, 4)] == [at + plane + 1 for at in range(0, 64, 4)]
    map_mask(guest, 2)
    window.write(0xA0004, 0xEE)
    map_mask(guest, 15)
    graphics(guest, 4, 0)
    guest.out(0x3C4, 0x0E04, 2)
    assert window.is_ram(0xA0000) and [window.read(0xA0004 + at) for at in range(4)] == [5, 0xEE, 7, 8]


def test_a_font_is_loaded_without_hurting_the_text(pc, guest, window):
    window.write(0xB8000, ord("A"))
    window.write(0xB8001, 0x0F)
    map_mask(guest, 4)
    guest.out(0x3C4, 0x0704, 2)
    graphics(guest, 5, 0)
    graphics(guest, 6, 4)
    window.write(0xA0000 + 32 * ord("A") + 3, 0xA5)
    window.write(0xA0000 + 0x2000 + 32 * ord("A") + 3, 0xFF)  # of font 4, the second in the plane
    map_mask(guest, 3)
    guest.out(0x3C4, 0x0304, 2)
    graphics(guest, 5, 0x10)
    graphics(guest, 6, 0x0E)
    guest.out(0x3D4, 0x200A, 2)
    assert window.read(0xB8000) == ord("A") and screen.text(pc.display).startswith("A\n")
    row = [picture(pc).convert("RGB").getpixel((x, 3)) == (255, 255, 255) for x in range(9)]
    assert row == [bool(0xA5 >> 7 - x & 1) for x in range(8)] + [False]
    guest.out(0x3C4, 0x2003, 2)  # characters with bit 3 of the attribute have font 4
    assert [picture(pc).convert("RGB").getpixel((x, 3)) == (255, 255, 255) for x in range(8)] == [True] * 8
    window.write(0xB8001, 0x07)
    assert picture(pc).convert("RGB").getpixel((0, 3)) == (170, 170, 170)
    assert picture(pc).convert("RGB").getpixel((1, 3)) == (0, 0, 0)


def test_state_has_the_planes_and_the_latches(pc, guest, window):
    set_mode(guest, "12")
    window.write(0xA0000, 0x5A)
    window.read(0xA0000)
    state = saved(pc)
    graphics(guest, 5, 1)
    window.write(0xA0001, 0)
    pc.reset()
    load(pc, state)
    assert not window.is_ram(0xA0000)
    graphics(guest, 5, 1)
    window.write(0xA0002, 0)  # from the latches
    assert window.read(0xA0002) == 0x5A and window.read(0xA0001) == 0


# ---- pictures


def test_16_colours(pc, guest, window):
    set_mode(guest, "12")
    assert str(pc.display.mode()) == "graphics 640x480x4"
    colours = [x * 7 + y * 3 & 15 for y in range(480) for x in range(640)]
    for plane in range(4):
        map_mask(guest, 1 << plane)
        for at in range(0, 640 * 480 // 8, 8):
            bits = (sum((colours[8 * byte + x] >> plane & 1) << 7 - x for x in range(8)) for byte in range(at, at + 8))
            guest.store(0xA0000 + at, int.from_bytes(bytes(bits), "little"), 8)
    palette = [0, 1, 2, 3, 4, 5, 0x14, 7, *range(0x38, 0x40)]
    assert picture(pc).tobytes() == bytes(palette[colour] for colour in colours)


@pytest.mark.parametrize(("mode", "height"), [("13", 200), ("X", 240)])
def test_256_colours(pc, guest, window, mode, height):
    set_mode(guest, mode)
    assert str(pc.display.mode()) == f"graphics 320x{height}x8"
    dice = random.Random(mode)
    pixels = dice.randbytes(320 * height)
    if mode == "13":
        assert window.is_ram(0xA0000)
        pc.memory.write(0xA0000, pixels)
    else:
        for plane in range(4):
            map_mask(guest, 1 << plane)
            part = pixels[plane::4]
            for at in range(0, len(part), 8):
                guest.store(0xA0000 + at, int.from_bytes(part[at : at + 8], "little"), 8)
    assert picture(pc).tobytes() == pixels


def test_320x200_with_4_and_640x200_with_2_colours(pc, guest, window):
    dice = random.Random(4)
    for mode, width, depth, palette in (("4", 320, 2, (0, 0x13, 0x15, 0x17)), ("6", 640, 1, (0, 0x17))):
        set_mode(guest, mode)
        assert str(pc.display.mode()) == f"graphics {width}x200x{depth}"
        pixels = [dice.randrange(1 << depth) for _ in range(width * 200)]
        for y in range(200):  # lines are in two halves, even and odd ones, of 80 bytes each
            for byte in range(80):
                first = y * width + byte * 8 // depth
                value = 0
                for pixel in pixels[first : first + 8 // depth]:
                    value = value << depth | pixel
                window.write(0xB8000 + 0x2000 * (y & 1) + 80 * (y >> 1) + byte, value)
        assert picture(pc).tobytes() == bytes(palette[pixel] for pixel in pixels), mode


def test_each_line_twice_and_half_as_many_dots(pc, guest, window):
    set_mode(guest, "d")
    assert str(pc.display.mode()) == "graphics 320x200x4"
    map_mask(guest, 1)
    window.write(0xA0000 + 40 * 3 + 1, 0x80)
    assert [at for at, one in enumerate(picture(pc).tobytes()) if one] == [320 * 3 + 8]


def rows_of(pc):
    """The number that each line of mode 12h was drawn with, and where its mark is."""
    image = picture(pc)
    pixels = image.tobytes()
    return [pixels[y * 640 : (y + 1) * 640] for y in range(480)]


@pytest.fixture
def marked(pc, guest, window):
    """Mode 12h, whose line Y has a mark of two dots at column Y, as far as there are columns."""
    set_mode(guest, "12")
    map_mask(guest, 15)
    for y in range(800):
        x = y % 600
        window.write(0xA0000 + 80 * y + x // 8, 0xC0 >> x % 8)
        if x % 8 == 7:
            window.write(0xA0000 + 80 * y + x // 8 + 1, 0x80)
    return pc


def marks(pc):
    return [row.find(b"\x3f") for row in rows_of(pc)]


def crtc(guest, index, value):
    guest.out(0x3D4, value << 8 | index, 2)


def attribute(guest, index, value):
    guest.inp(0x3DA)
    guest.out(0x3C0, 0x20 | index)
    guest.out(0x3C0, value)


def test_start_address_and_panning(marked, guest):
    assert marks(marked)[:300] == list(range(300))
    crtc(guest, 0x0C, 80 * 10 >> 8)
    crtc(guest, 0x0D, (80 * 10 & 0xFF) + 2)
    assert marks(marked)[20:300] == [y + 10 - 16 for y in range(20, 300)]
    attribute(guest, 0x13, 3)
    assert marks(marked)[20:300] == [y + 10 - 16 - 3 for y in range(20, 300)]
    crtc(guest, 8, 0x20)  # a byte more
    assert marks(marked)[30:300] == [y + 10 - 16 - 3 - 8 for y in range(30, 300)]
    crtc(guest, 0x13, 80)  # each line is as far as two
    crtc(guest, 0x0C, 0)
    crtc(guest, 0x0D, 0)
    crtc(guest, 8, 0)
    attribute(guest, 0x13, 0)
    assert marks(marked)[:200] == list(range(0, 400, 2))


@pytest.mark.parametrize("pans", [False, True])
def test_a_split_screen_begins_at_0(marked, guest, pans):
    crtc(guest, 0x0C, 80 * 20 >> 8)
    crtc(guest, 0x0D, 80 * 20 & 0xFF)
    crtc(guest, 0x18, 100)  # the line compare has bits in three registers
    crtc(guest, 7, 0x2E)
    crtc(guest, 9, 0)
    attribute(guest, 0x13, 2)
    attribute(guest, 0x10, 0x21 if pans else 0x01)
    seen = marks(marked)
    assert seen[:101] == [y + 20 - 2 for y in range(101)]
    assert seen[110:300] == [y - 101 - (0 if pans else 2) for y in range(110, 300)]


def test_the_palette_and_colour_select(pc, guest, window):
    set_mode(guest, "12")
    map_mask(guest, 5)
    window.write(0xA0000, 0x80)
    assert picture(pc).tobytes()[0] == 5
    attribute(guest, 0x14, 0x0F)
    assert picture(pc).tobytes()[0] == 0xC5
    attribute(guest, 0x10, 0x81)
    assert picture(pc).tobytes()[0] == 0xF5
    attribute(guest, 0x12, 0x0B)  # plane 2 is not shown
    assert picture(pc).tobytes()[0] == 0xF1
    guest.out(0x3C6, 0x0F)
    guest.out(0x3C8, 1)
    for value in (63, 32, 1):
        guest.out(0x3C9, value)
    assert picture(pc).convert("RGB").getpixel((0, 0)) == (255, 130, 4)


def test_banks_of_the_framebuffer(pc, guest, machine):
    for index, value in ((4, 0), (1, 640), (2, 480), (3, 8), (4, 1)):
        guest.out(0x1CE, index, 2)
        guest.out(0x1CF, value, 2)
    slot = {start: rest for start, *rest in machine.slots.values()}[0xA0000]
    assert slot[:3] == [pc.display.framebuffer, 0, 0x10000]
    guest.out(0x1CE, 5, 2)
    guest.out(0x1CF, 4, 2)
    assert {start: rest for start, *rest in machine.slots.values()}[0xA0000][1] == 4 << 16
    guest.out(0x1CE, 4, 2)
    guest.out(0x1CF, 0, 2)
    assert pc._window == ["ram", "ram"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_the_registers_say_is_a_picture(data):
    memory = Memory(2 << 20)
    pc = Pc(FakeMachine(), memory)
    try:
        guest = Guest(pc)
        set_mode(guest, data.draw(st.sampled_from(sorted(MODES))))
        crtc(guest, 0x11, 0)
        ports = st.sampled_from((0x3C4, 0x3CE, 0x3D4))
        for port, index, value in data.draw(st.lists(st.tuples(ports, st.integers(0, 31), st.integers(0, 255)))):
            guest.out(port, value << 8 | index, 2)
            at = 0xA0000 + (value << 9)
            guest.store(at, value * 0x0101, 2)
            guest.load(at + 1, 4)
        mode = pc.display.mode()
        assert picture(pc).size[1] == mode.height
        assert screen.text(pc.display)
        load(pc, saved(pc))
    finally:
        pc.close()
        memory.close()
