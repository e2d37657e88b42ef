"""The display: VGA registers, the VBE, what they make of memory as text and as a picture."""

from __future__ import annotations

import io
import os
import threading

import pytest
from devices.fakes import FakeMachine, Guest, load, plain, refuses, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vmfs.devices import screen
from vmfs.devices.display import FRAMEBUFFER_SIZE, SLOT
from vmfs.devices.machine import DISPLAY_SLOT, Pc
from vmfs.devices.vga import FRAME
from vmfs.memory.ram import Memory
from vmfs.words.errors import Gone, Invalid, Unsupported

needs_font = pytest.mark.skipif(not screen.vga_bios(), reason="no VGA BIOS here: apt-get install seabios")
ENABLED, LFB, DAC_8BIT, GETCAPS, NO_CLEAR = 0x01, 0x40, 0x20, 0x02, 0x80


def write_text(memory, text, attribute=7, at=0):
    memory.write(0xB8000 + 2 * at, bytes(part for character in text.encode("cp437") for part in (character, attribute)))


def text_of(pc):
    return screen.text(pc.display).splitlines()


def image_of(pc):
    image = Image.open(io.BytesIO(screen.picture(pc.display)))
    image.load()
    return image.convert("RGB")


def same_pictures(one, other):
    return one.tobytes() == other.tobytes()


def vbe(guest, index, value=None):
    guest.out(0x1CE, index, 2)
    if value is None:
        return guest.inp(0x1CF, 2)
    guest.out(0x1CF, value, 2)
    return None


def set_mode(guest, width, height, bits, flags=ENABLED | LFB):
    vbe(guest, 4, 0)
    for index, value in ((1, width), (2, height), (3, bits)):
        vbe(guest, index, value)
    vbe(guest, 4, flags)


def colour(pc, index):
    return tuple(pc.display.vga.colours()[3 * index : 3 * index + 3])


def crtc(guest, index, value):
    guest.out(0x3D4, value << 8 | index, 2)


# ---- text


def test_a_new_screen_is_80x25_and_blank(pc):
    assert text_of(pc) == [""] * 25
    assert pc.display.describe()["mode"] == "text 80x25"


def test_text_is_code_page_437_without_trailing_blanks(pc):
    write_text(pc.memory, "Grüße ░▒▓│┤ α")
    pc.memory.write(0xB8000 + 160, b"\x01\x07\x00\x07\x7f\x07\xff\x07")
    assert text_of(pc)[:2] == ["Grüße ░▒▓│┤ α", "☺ ⌂"]
    assert len(screen.CP437) == 256 and screen.CP437[0xDB] == "█"


def test_the_start_address_scrolls(pc, guest):
    for row in range(30):
        write_text(pc.memory, f"row {row}", at=80 * row)
    crtc(guest, 0x0D, 80 * 2)
    assert text_of(pc)[0] == "row 2" and text_of(pc)[24] == "row 26"
    last = 0x8000 // 160  # the window has a part of a row at its end
    crtc(guest, 0x0C, 80 * last >> 8)
    crtc(guest, 0x0D, 80 * last & 0xFF)
    rest = (0x8000 - 160 * last) // 2
    write_text(pc.memory, ("from the end " + "x" * rest)[:rest], at=80 * last)
    assert text_of(pc)[0] == ("from the end " + "x" * rest)[:rest]  # planes have more, which nobody has written to
    crtc(guest, 0x0C, 0xFF)  # and wrap
    crtc(guest, 0x0D, 0xFE)
    assert text_of(pc)[0] == "  row 0"


def test_50_rows_of_8_lines_and_40_columns(pc, guest):
    crtc(guest, 9, 0x47)
    assert len(text_of(pc)) == 50
    crtc(guest, 0x11, 0x0E)  # the first eight are no longer protected
    crtc(guest, 1, 39)
    crtc(guest, 0x13, 20)
    write_text(pc.memory, "a" * 40 + "second")
    assert text_of(pc)[:2] == ["a" * 40, "second"] and str(pc.display.mode()) == "text 40x50"


def test_ram_that_ends_below_the_screen_is_blank():
    memory = Memory(64 << 10)
    pc = Pc(FakeMachine(), memory)
    try:
        assert text_of(pc) == [""] * 25
    finally:
        pc.close()
        memory.close()


@needs_font
def test_a_picture_of_text_has_the_glyphs_the_colours_and_the_cursor(pc, guest):
    write_text(pc.memory, "A", 0x4E)  # yellow on red
    crtc(guest, 0x0F, 2)
    image = image_of(pc)
    assert image.size == (720, 400)
    pixels = image.load()
    yellow, red, black, grey = (255, 255, 85), (170, 0, 0), (0, 0, 0), (170, 170, 170)
    glyph = ["".join("#" if pixels[x, y] == yellow else "." for x in range(9)) for y in range(16)]
    assert all(pixels[x, y] in (yellow, red) for x in range(9) for y in range(16))
    assert glyph[2:5] == ["...#.....", "..###....", ".##.##..."] and glyph[15] == "........."
    assert pixels[9, 0] == black
    write_text(pc.memory, " ", 7, at=2)
    cursor = image_of(pc).load()
    assert [cursor[18, y] == grey for y in range(16)] == [13 <= y <= 14 for y in range(16)]
    crtc(guest, 0x0A, 0x20)
    assert image_of(pc).load()[18, 13] == black


def test_a_font_that_the_guest_has_loaded_is_the_one_that_is_drawn(pc, guest):
    write_text(pc.memory, "A", 0x0F)
    for index, value in ((2, 4), (4, 7)):  # plane 2 alone, not in turns
        guest.out(0x3C4, value << 8 | index, 2)
    guest.out(0x3CE, 0x0406, 2)  # the window is at A0000
    guest.out(0x3CE, 0x0005, 2)
    for y in range(16):
        guest.store(0xA0000 + 32 * ord("A") + y, 0xF0, 1)
    for index, value in ((2, 3), (4, 2)):
        guest.out(0x3C4, value << 8 | index, 2)
    guest.out(0x3CE, 0x1005, 2)
    guest.out(0x3CE, 0x0E06, 2)
    guest.out(0x3D4, 0x200A, 2)  # no cursor
    image = image_of(pc)
    white = (255, 255, 255)
    assert [image.getpixel((x, 15)) == white for x in range(9)] == [True] * 4 + [False] * 5
    state, planes = saved(pc), pc.display.planes()
    pc.reset()
    os.pwrite(pc.display.framebuffer, bytes(len(planes)), 0)
    load(pc, state)
    assert pc.display.planes() == planes and same_pictures(image, image_of(pc))


def test_without_a_font_there_is_no_picture(pc, monkeypatch):
    monkeypatch.setattr(screen, "VGA_BIOSES", ())
    with pytest.raises(Unsupported, match="font"):
        image_of(pc)


# ---- registers


def test_attribute_registers_alternate_at_one_port_and_the_palette_is_kept_while_the_screen_is_on(pc, guest):
    guest.inp(0x3DA)
    guest.out(0x3C0, 0x10)
    guest.out(0x3C0, 0x04)
    assert (guest.inp(0x3C0), guest.inp(0x3C1)) == (0x10, 0x04)
    guest.out(0x3C0, 0x20 | 1)
    guest.out(0x3C0, 0x3F)
    assert guest.inp(0x3C1) == 1
    guest.out(0x3C0, 1)
    guest.out(0x3C0, 0x3F)
    assert guest.inp(0x3C1) == 0x3F
    guest.out(0x3C0, 0x20)
    guest.inp(0x3DA)
    assert pc.display.vga.registers().attribute_data is False


def test_the_dac_takes_three_bytes_a_colour_and_goes_on(pc, guest):
    guest.out(0x3C8, 7)
    for value in (0x3F, 0x15, 0xFF, 1, 2, 3):
        guest.out(0x3C9, value)
    assert colour(pc, 7) == (255, 85, 255)
    guest.out(0x3C7, 7)
    assert [guest.inp(0x3C9) for _ in range(6)] == [0x3F, 0x15, 0x3F, 1, 2, 3]
    assert guest.inp(0x3C7) == 3 and guest.inp(0x3C8) == 9
    guest.out(0x3C8, 7)
    guest.out(0x3C9, 0)
    guest.out(0x3C9, 0)  # without its blue it is no colour yet
    assert colour(pc, 7) == (255, 85, 255)


def test_crtc_registers_are_protected_and_are_where_the_output_register_says(pc, guest):
    guest.out(0x3D4, 0)
    old = guest.inp(0x3D5)
    guest.out(0x3D5, old ^ 0xFF)
    assert guest.inp(0x3D5) == old
    guest.out(0x3D4, 7)
    was = guest.inp(0x3D5)
    guest.out(0x3D5, 0xFF)
    assert guest.inp(0x3D5) == was | 0x10
    assert guest.inp(0x3B5) == 0xFF
    guest.out(0x3C2, 0x66)
    assert guest.inp(0x3CC) == 0x66 and guest.inp(0x3D5) == 0xFF and guest.inp(0x3B5) == was | 0x10
    guest.out(0x3B4, 0x3F)
    assert guest.inp(0x3B5) == 0


def test_the_retrace_comes_with_time(pc, guest, machine):
    seen = set()
    for machine.time in range(0, FRAME, FRAME // 40):
        seen.add(guest.inp(0x3DA))
    assert seen == {0, 9}


# ---- VBE


def test_a_mode_is_set_and_its_pixels_are_those_of_the_framebuffer(pc, guest):
    assert vbe(guest, 0) == 0xB0C5 and vbe(guest, 10) == FRAMEBUFFER_SIZE >> 16
    vbe(guest, 0, 0xB0C0)
    assert vbe(guest, 0) == 0xB0C0
    vbe(guest, 0, 0x1234)
    assert vbe(guest, 0) == 0xB0C0
    os.pwrite(pc.display.framebuffer, b"\xff" * 4096, 0)
    set_mode(guest, 640, 480, 32)
    assert text_of(pc) == ["graphics 640x480x32"]
    assert os.pread(pc.display.framebuffer, 4096, 0) == bytes(4096)
    os.pwrite(pc.display.framebuffer, b"\x10\x20\x30\xff", 4 * (640 * 2 + 1))
    image = image_of(pc)
    assert image.size == (640, 480) and image.getpixel((1, 2)) == (0x30, 0x20, 0x10)
    info = pc.display.describe()
    assert info["mode"] == "graphics 640x480x32" and info["framebuffer"] == "start=0 pitch=2560 bits=32"
    vbe(guest, 6, 800)  # a wider line, and another part of it
    vbe(guest, 8, 8)
    vbe(guest, 9, 4)
    assert pc.display.describe()["framebuffer"] == f"start={4 * (4 * 800 + 8)} pitch=3200 bits=32"
    vbe(guest, 4, 0)
    assert pc.display.describe()["mode"] == "text 80x25"


@pytest.mark.parametrize(
    ("bits", "pixel", "colour"),
    [
        (8, b"\x0c", (255, 85, 85)),
        (15, (0x1F << 10).to_bytes(2, "little"), (255, 0, 0)),
        (16, (0x3F << 5).to_bytes(2, "little"), (0, 255, 0)),
        (24, b"\x01\x02\x03", (3, 2, 1)),
    ],
)
def test_depths(pc, guest, bits, pixel, colour):
    if bits == 8:
        guest.out(0x3C8, 0x0C)
        for value in (0x3F, 0x15, 0x15):
            guest.out(0x3C9, value)
    set_mode(guest, 64, 48, bits)
    os.pwrite(pc.display.framebuffer, pixel, pc.display.mode().pitch)
    image = image_of(pc)
    assert image.getpixel((0, 1)) == colour and image.getpixel((1, 1)) == (0, 0, 0)


def test_modes_that_cannot_be_are_not_set(pc, guest):
    set_mode(guest, 8192, 8192, 32)
    assert vbe(guest, 4) & ENABLED == 0
    set_mode(guest, 641, 480, 33)  # neither is taken, what was before stays
    assert (vbe(guest, 1), vbe(guest, 3)) == (8192, 32)
    set_mode(guest, 800, 600, 16, ENABLED | LFB | NO_CLEAR)
    vbe(guest, 1, 640)  # not while it is shown
    assert vbe(guest, 1) == 800
    vbe(guest, 9, 0xFFFF)
    vbe(guest, 6, 0xFFF8)
    assert vbe(guest, 9) == 0 and vbe(guest, 6) == 800
    vbe(guest, 4, ENABLED | GETCAPS)
    assert (vbe(guest, 1), vbe(guest, 3)) == (8192, 32)
    assert vbe(guest, 99) == 0


def test_the_dac_has_8_bits_where_the_vbe_says_so(pc, guest):
    set_mode(guest, 64, 64, 8, ENABLED | DAC_8BIT)
    guest.out(0x3C8, 1)
    for value in (0x81, 0x82, 0x83):
        guest.out(0x3C9, value)
    assert colour(pc, 1) == (0x81, 0x82, 0x83)


def test_the_bank_has_as_many_bits_as_there_are_banks(guest):
    vbe(guest, 5, 0x405)
    assert vbe(guest, 5) == 5


def test_the_registers_are_in_memory_too(pc, guest):
    base = guest.config(DISPLAY_SLOT, 0x18)
    assert guest.load(base + 0x500, 2) == 0xB0C5
    guest.store(base + 0x502, 320, 2)
    assert vbe(guest, 1) == 320
    guest.store(base + 0x414, 0x0F, 1)  # the CRT controller, at 3D4
    guest.store(base + 0x415, 0x55, 1)
    assert guest.load(base + 0x415, 1) == 0x55 and pc.display.vga.registers().crtc[15] == 0x55
    assert guest.load(base, 4) == 0 and guest.load(base + 0x600, 4) == 0  # no EDID, no more registers


def test_the_framebuffer_is_mapped_where_its_bar_is(pc, guest, machine):
    (address,) = [guest.config(DISPLAY_SLOT, 0x10) & ~15]
    assert machine.slots[SLOT][0] == address and machine.slots[SLOT][1:4] == (
        pc.display.framebuffer, 0, FRAMEBUFFER_SIZE,
    )  # fmt: skip
    guest.config(DISPLAY_SLOT, 4, 0, size=2)
    assert SLOT not in machine.slots
    guest.config(DISPLAY_SLOT, 0x10, 0xF000_0000)
    guest.config(DISPLAY_SLOT, 4, 3, size=2)
    assert machine.slots[SLOT][0] == 0xF000_0000
    guest.config(DISPLAY_SLOT, 0x10, 0xFFFF_FFFF)  # its size is asked for
    assert guest.config(DISPLAY_SLOT, 0x10) == 0xFC00_0008 and SLOT not in machine.slots


def test_a_framebuffer_over_ram_is_not_mapped(pc, guest, machine):
    def refuse(slot, address, *rest, **options):
        if address:
            raise Invalid("it overlaps")
        machine.slots.pop(slot, None)

    machine.map_memory = refuse
    guest.config(DISPLAY_SLOT, 0x10, 0x400_0000)
    assert pc.display.counters["overlaps"] == 1 and SLOT not in machine.slots
    guest.store(0x400_0000, 0x1234_5678)
    assert guest.load(0x400_0000) == 0x1234_5678
    assert os.pread(pc.display.framebuffer, 4, 0) == b"\x78\x56\x34\x12"


def test_it_opens_while_a_device_holds_the_board(pc):
    """A disk's image may be a file of the server that opens it."""
    opened = []
    with pc.lock:
        thread = threading.Thread(target=lambda: opened.append(pc.display.open_framebuffer()))
        thread.start()
        thread.join(10)
    assert opened and os.fstat(opened[0]).st_size == FRAMEBUFFER_SIZE
    os.close(opened[0])


def test_a_closed_one_has_no_memory_any_more(pc):
    display, planes_at = pc.display, (8, 0, 1)  # a byte of the window at A0000
    assert display.chip.read(*planes_at) is not None
    pc.close()
    with pytest.raises(Gone):
        display.planes()
    for access in (lambda: display.chip.seen(None, False), lambda: display.chip.copy(bytearray(16), False, True)):
        with pytest.raises(ValueError, match="closed"):
            access()
    assert display.chip.read(*planes_at) is None  # it is not the chip's any more
    display.close()


# ---- state


def test_state_goes_to_another_machine(pc, guest, memory):
    set_mode(guest, 320, 200, 16)
    os.pwrite(pc.display.framebuffer, b"picture", 5000)
    os.pwrite(pc.display.framebuffer, b"end", FRAMEBUFFER_SIZE - 3)
    guest.out(0x3C8, 200)
    guest.out(0x3C9, 9)
    state = saved(pc)
    other = Pc(FakeMachine(), memory)
    try:
        os.pwrite(other.display.framebuffer, b"old", 1 << 20)
        load(other, state)
        assert saved(other) == state
        assert os.pread(other.display.framebuffer, 7, 5000) == b"picture"
        assert os.pread(other.display.framebuffer, 3, 1 << 20) == bytes(3)
        assert str(other.display.mode()) == "graphics 320x200x16"
    finally:
        other.close()
    with pytest.raises(Gone):
        other.display.open_framebuffer()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["vga"].update(dac_read=768),
        lambda state: state["vga"].update(crtc=b""),
        lambda state: state["vbe"]["registers"].__setitem__(1, 9000),
        lambda state: state["vbe"]["registers"].__setitem__(4, 1),
        lambda state: state["vbe"]["registers"].append(0),
        lambda state: state["framebuffer"].append([FRAMEBUFFER_SIZE, b"x"]),
    ],
)
def test_a_state_that_no_display_has_is_refused(pc, change):
    state = plain(pc.display)
    state["vbe"]["registers"], state["framebuffer"] = list(state["vbe"]["registers"]), list(state["framebuffer"])
    assert not refuses(pc.display, state)
    change(state)
    assert refuses(pc.display, state)


_PORTS = st.one_of(st.integers(0x3B0, 0x3DF), st.sampled_from((0x1CE, 0x1CF, 0x3C0, 0x3C4, 0x3C5, 0x3CF, 0x3D5)))
_ACCESSES = st.lists(st.tuples(_PORTS, st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFF_FFFF), st.booleans()))


@settings(max_examples=50, deadline=None)
@given(_ACCESSES, st.lists(st.tuples(st.integers(0, 10), st.integers(0, 0xFFFF))))
def test_whatever_a_guest_writes_there_is_a_screen(accesses, modes):
    memory = Memory(2 << 20)
    pc = Pc(FakeMachine(), memory)
    try:
        guest = Guest(pc)
        for port, size, value, out in accesses:
            if out:
                guest.out(port, value & (1 << 8 * size) - 1, size)
            else:
                guest.inp(port, size)
        for index, value in modes:
            vbe(guest, index, value % 1024 if value & 1 else value)
        assert text_of(pc)
        mode = pc.display.mode()
        if mode.width * mode.height < 1 << 18:
            try:
                image_of(pc)
            except Unsupported:
                pass
        state = pc.display.save()
        pc.display.load(state)
        assert pc.display.save() == state
    finally:
        pc.close()
        memory.close()
