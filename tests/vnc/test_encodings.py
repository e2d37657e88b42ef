"""Pictures: what has changed of one is found, and what a client decodes is what was there."""

from __future__ import annotations

import io
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vnc.reader import Reader

from vmfs.devices import _pixels
from vmfs.devices.screen import TILE, Picture, Shown
from vmfs.machine.vnc.encodings import Encoder, as_jpeg, bands_of, is_photograph, jpeg_quality, parts_of
from vmfs.machine.vnc.messages import FORMAT, JPEG_QUALITY, RAW, TIGHT, ZRLE, PixelFormat, colour_map, parse_format
from vmfs.machine.vnc.motion import CALM_SECONDS, Motion

FORMATS = {
    "bgrx": FORMAT,
    "xrgb": PixelFormat(4, True, (255, 255, 255), (16, 8, 0)),
    "rgbx": PixelFormat(4, False, (255, 255, 255), (24, 16, 8)),
    "xbgr, big": PixelFormat(4, True, (255, 255, 255), (8, 16, 24)),
    "10 bits": PixelFormat(4, False, (1023, 1023, 1023), (20, 10, 0), depth=30),
    "565": PixelFormat(2, False, (31, 63, 31), (11, 5, 0), depth=16),
    "555, big": PixelFormat(2, True, (31, 31, 31), (10, 5, 0), depth=15),
    "332": PixelFormat(1, False, (7, 7, 3), (5, 2, 0), depth=8),
    "mapped": parse_format(struct.pack(">BBBBHHHBBB3x", 8, 8, 0, 0, 0, 0, 0, 0, 0, 0)),
}


def expected(pixel, format):
    """The colours of a pixel as far as the format has them."""
    shown = [(pixel >> at & 255) for at in (0, 8, 16)]
    return tuple((one * most + 127) // 255 for one, most in zip(shown, format.most, strict=True))


def draw(dice, width, height):
    """A picture of one of the kinds that encodings make a difference of."""
    colours = [dice.randrange(1 << 24) for _ in range(dice.choice((1, 2, 3, 4, 5, 16, 17, 127, 128, 256, 257, 4000)))]
    longest = dice.choice((1, 3, 40, 300, 6000))
    pixels = []
    while len(pixels) < width * height:
        pixels += [dice.choice(colours)] * dice.randint(1, longest)
    picture = Picture(width, height)
    picture.pixels[:] = struct.pack(f"<{width * height}I", *pixels[: width * height])
    return picture


def within(picture, part):
    x, y, width, height = part
    pixels = memoryview(picture.pixels).cast("I")
    return [pixels[(y + row) * picture.width + x + at] for row in range(height) for at in range(width)]


@pytest.mark.parametrize("encoding", [RAW, ZRLE, TIGHT])
@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
def test_what_is_decoded_is_what_was_there(encoding, format):
    dice = random.Random(5)
    encoder, reader = Encoder(), Reader(format)
    kinds = set()
    for _ in range(60):
        picture = draw(dice, dice.randint(1, 150), dice.randint(1, 130))
        x, y = dice.randrange(picture.width), dice.randrange(picture.height)
        part = x, y, dice.randint(1, picture.width - x), dice.randint(1, picture.height - y)
        data = encoder.encode(encoding, picture, part, format)
        assert reader.read(encoding, data, part[2], part[3]) == [expected(one, format) for one in within(picture, part)]
        kinds.add(data[0])
    if encoding == TIGHT:
        assert kinds >= {0x80, 0x50, 0x60, 0x00}  # one colour, two, some, many: each way was taken


def test_colours_of_a_map():
    words = struct.unpack(">BxHH768H", colour_map())
    assert words[:3] == (1, 0, 256)
    assert words[3 + 3 * 0b01_010_111 :][:3] == (65535, 2 * 65535 // 7, 65535 // 3)


def test_a_tile_of_noise_is_no_longer_than_raw():
    picture = Picture(64, 64)
    picture.pixels[:] = random.Random(1).randbytes(64 * 64 * 4)
    assert len(_pixels.zrle(picture.pixels, 64, 0, 0, 64, 64, FORMAT.words)) == 1 + 64 * 64 * 3


# ---- what has changed


@pytest.mark.parametrize("bits", [8, 15, 16, 24, 32])
def test_what_changes_is_found(bits):
    dice = random.Random(bits)
    width, height, size = 70, 40, (bits + 7) // 8
    pitch, start = width * size + 10, 33
    data = bytearray(dice.randbytes(start + pitch * height))
    shown = Shown(width, height, bits, data, start, pitch, dice.randbytes(768))
    picture = Picture(width, height)
    assert picture.update(shown) is not None and picture.update(shown) is None
    for _ in range(12):
        before = bytes(picture.pixels)
        for _ in range(dice.choice((1, 1, 3))):
            data[dice.randrange(len(data))] ^= dice.randint(1, 255)
        changed = picture.update(shown) or bytes(picture.across * picture.down)
        for y in range(height):
            for x in range(width):
                at = start + y * pitch + x * size
                value = int.from_bytes(data[at : at + size], "little")
                pixel = struct.unpack_from("<I", picture.pixels, 4 * (y * width + x))[0]
                assert pixel == as_colours(value, bits, shown.colours)
        old, new = memoryview(before).cast("I"), memoryview(picture.pixels).cast("I")
        tiles = {y // TILE * picture.across + x // TILE for y in range(height) for x in range(width)
                 if old[y * width + x] != new[y * width + x]}  # fmt: skip
        assert tiles == {number for number, mark in enumerate(changed) if mark}


def as_colours(value, bits, palette):
    if bits == 8:
        red, green, blue = palette[3 * value : 3 * value + 3]
    elif bits in (15, 16):
        green_bits = bits - 10
        red, green, blue = value >> 5 + green_bits & 31, value >> 5 & (1 << green_bits) - 1, value & 31
        red, blue = red << 3 | red >> 2, blue << 3 | blue >> 2
        green = green << 3 | green >> 2 if green_bits == 5 else green << 2 | green >> 4
    else:
        red, green, blue = value >> 16 & 255, value >> 8 & 255, value & 255
    return blue << 16 | green << 8 | red


def test_what_is_beyond_the_end_is_black():
    picture = Picture(40, 10)
    picture.update(Shown(40, 10, 32, b"\xff" * (40 * 4 * 3 + 81), 0, 160))
    pixels = memoryview(picture.pixels).cast("I")
    assert set(pixels[: 40 * 3 + 20]) == {0xFFFFFF} and set(pixels[40 * 3 + 20 :]) == {0}
    assert picture.update(Shown(40, 10, 8, b"", 1 << 40, 1 << 20, bytes(768))) is not None
    assert not any(picture.pixels)


@given(st.integers(1, 400), st.integers(1, 300), st.data())
@settings(max_examples=60)
def test_parts_are_the_tiles_that_changed(width, height, data):
    picture = Picture(width, height)
    dirty = bytearray(data.draw(st.lists(
        st.integers(0, 1), min_size=picture.across * picture.down, max_size=picture.across * picture.down
    )))  # fmt: skip
    inside = (0, 0, data.draw(st.integers(1, width)), data.draw(st.integers(1, height)))
    seen = set()
    for x, y, across, down in parts_of(picture, dirty, inside):
        assert across > 0 and down > 0 and across * down <= 1 << 16
        cells = {(column, row) for column in range(x, x + across) for row in range(y, y + down)}
        assert not cells & seen
        seen |= cells
    assert seen == {
        (x, y) for y in range(inside[3]) for x in range(inside[2]) if dirty[y // TILE * picture.across + x // TILE]
    }


def test_parts_of_a_large_picture_are_few_and_bounded():
    picture = Picture(8192, 64)
    parts = parts_of(picture, bytearray(b"\1" * (picture.across * picture.down)), (0, 0, 8192, 64))
    assert len(parts) == 8 and all(part[2] <= 2048 and part[2] * part[3] <= 1 << 16 for part in parts)


def test_bad_calls_are_refused():
    pixels = bytearray(4 * 64 * 64)
    for x, y, width, height in ((0, 0, 65, 1), (1, 0, 64, 1), (0, 64, 1, 1), (0, 0, 0, 1), (1 << 31, 0, 1 << 31, 1)):
        for encode in (_pixels.raw, _pixels.zrle, _pixels.tight):
            with pytest.raises(ValueError, match="not in the picture"):
                encode(pixels, 64, x, y, width, height, FORMAT.words)
    for bad in ((3, *FORMAT.words[1:]), (*FORMAT.words[:5], 32, 0, 0, 3, 0, 1), (*FORMAT.words[:8], 4, 1, 0)):
        with pytest.raises(ValueError, match="no such format"):
            _pixels.raw(pixels, 64, 0, 0, 1, 1, bad)
    for width, height, tile, count in ((65, 64, 32, 6), (64, 64, 32, 3), (64, 64, 0, 4), (20000, 1, 32, 999)):
        with pytest.raises(ValueError, match="too small"):
            _pixels.update(pixels, width, height, b"", 0, 0, 8, bytes(1024), tile, bytearray(count))


def photograph(width, height):
    """Smooth, and of more colours than a palette has."""
    picture = Picture(width, height)
    picture.pixels[:] = b"".join(
        bytes(((x + y) // 2, y, x, 0)) for y in range(height) for x in range(width)
    )  # fmt: skip
    return picture


def test_what_is_like_a_photograph_is_found():
    picture = photograph(200, 150)
    whole, small = (0, 0, 200, 150), (10, 10, 20, 20)
    assert is_photograph(picture, whole) and not is_photograph(picture, small)
    few = Picture(200, 150)
    few.pixels[:] = struct.pack("<30000I", *(n % 256 for n in range(30000)))
    assert not is_photograph(few, whole)
    few.pixels[-4:] = b"\0\1\0\0"  # the 257th, at the end
    assert is_photograph(few, whole)


@pytest.mark.parametrize("part", [(0, 0, 200, 150), (40, 30, 160, 120), (7, 0, 50, 150), (199, 149, 1, 1)])
def test_jpeg_is_the_part(part):
    picture = photograph(200, 150)
    data = as_jpeg(picture, part, jpeg_quality((TIGHT, JPEG_QUALITY[9])))
    length, at = data[1] & 127, 2
    for shift in (7, 14):
        if data[at - 1] & 128:
            length |= (data[at] & (127 if shift == 7 else 255)) << shift
            at += 1
    assert data[0] == 0x90 and length == len(data) - at
    shown = Image.open(io.BytesIO(data[at:]))
    assert (shown.format, shown.size) == ("JPEG", part[2:])
    data = shown.tobytes()
    for n, pixel in enumerate(within(picture, part)):
        assert all(abs(one - other) < 12 for one, other in zip(data[3 * n :], expected(pixel, FORMAT), strict=False))


def test_bands_of_a_large_part():
    bands = bands_of((10, 20, 1000, 300))
    assert all(width * height <= 1 << 16 for _, _, width, height in bands)
    assert [band[1] for band in bands] == [20 + sum(one[3] for one in bands[:n]) for n in range(len(bands))]
    assert sum(band[3] for band in bands) == 300 and {(band[0], band[2]) for band in bands} == {(10, 1000)}


def test_who_takes_jpeg():
    assert jpeg_quality((TIGHT, ZRLE)) is None
    assert jpeg_quality((TIGHT, -26)) == 72 and jpeg_quality((-32,)) == 30 and jpeg_quality((-23,)) == 93
    assert jpeg_quality((-33, -22)) is None


def test_what_moves_is_rough_and_what_rests_is_not():
    motion = Motion()
    tile, other = 1, 1 << 8
    assert motion.split(tile | other, 0.0) == (tile | other, 0)  # the first time it may be all
    assert motion.split(tile, 0.1) == (0, tile)
    motion.sent_roughly(tile)
    assert 0.0 < motion.rests_in(0.1) <= CALM_SECONDS
    assert motion.split(0, 0.2) == (0, 0)
    at = 0.2
    while (found := motion.split(0, at)) == (0, 0):
        at += motion.rests_in(at)
        assert at < 10 * CALM_SECONDS
    assert found == (tile, 0) and at - 0.1 >= CALM_SECONDS
    assert motion.rests_in(at) == float("inf")
    assert motion.split(tile, at + 5) == (tile, 0)  # long after


def test_what_moves_again_is_not_sharpened_meanwhile():
    motion = Motion()
    motion.split(1, 0.0)
    for n in range(1, 60):
        assert motion.split(1, n / 30) == (0, 1)
        motion.sent_roughly(1)
