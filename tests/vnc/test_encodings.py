"""Pictures: what has changed of one is found, and what a client decodes is what was there. The decoders are written by
the protocol's description, and share nothing with the encoders."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.devices import _pixels
from vmfs.devices.screen import TILE, Picture, Shown
from vmfs.machine.vnc.encodings import Encoder, parts_of
from vmfs.machine.vnc.messages import FORMAT, RAW, TIGHT, ZRLE, PixelFormat, colour_map, parse_format

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
    shown = [(pixel >> at & 255) for at in (16, 8, 0)]
    return tuple((one * most + 127) // 255 for one, most in zip(shown, format.most, strict=True))


class Reader:
    """A client: it takes bytes and makes pixels of them, each the three numbers that the format has."""

    def __init__(self, format):
        self.format = format
        self.zrle = zlib.decompressobj()
        self.tight = [zlib.decompressobj() for _ in range(4)]

    def colours(self, value):
        return tuple(value >> shift & most for most, shift in zip(self.format.most, self.format.shift, strict=True))

    def pixel(self, data):
        return self.colours(int.from_bytes(data, "big" if self.format.big else "little")), self.format.size

    def cpixel(self, data):
        """RFC 6143, 7.7.5."""
        format = self.format
        used = sum(most << shift for most, shift in zip(format.most, format.shift, strict=True))
        if format.size != 4 or format.depth > 24:
            return self.pixel(data[: format.size])
        if used < 1 << 24:
            whole = b"\0" + data[:3] if format.big else data[:3] + b"\0"
        elif not used & 0xFF:
            whole = data[:3] + b"\0" if format.big else b"\0" + data[:3]
        else:
            return self.pixel(data[:4])
        return self.pixel(whole)[0], 3

    def tpixel(self, data):
        format = self.format
        if format.size == 4 and format.depth == 24 and format.most == (255, 255, 255):
            return tuple(data[:3]), 3
        return self.pixel(data[: format.size])

    def read(self, encoding, data, width, height):
        return {RAW: self.read_raw, ZRLE: self.read_zrle, TIGHT: self.read_tight}[encoding](data, width, height)

    def read_raw(self, data, width, height):
        size = self.format.size
        assert len(data) == width * height * size
        return [self.pixel(data[at : at + size])[0] for at in range(0, len(data), size)]

    def read_zrle(self, data, width, height):
        (length,) = struct.unpack(">I", data[:4])
        assert length == len(data) - 4
        data, at = self.zrle.decompress(data[4:]), 0
        pixels = [None] * (width * height)

        def take(count):
            nonlocal at
            at += count
            assert at <= len(data)
            return data[at - count : at]

        def cpixel():
            nonlocal at
            value, size = self.cpixel(data[at:])
            at += size
            return value

        def run():
            length = 1
            while (byte := take(1)[0]) == 255:
                length += 255
            return length + byte

        for top in range(0, height, 64):
            for left in range(0, width, 64):
                across, down = min(64, width - left), min(64, height - top)
                kind, tile = take(1)[0], []
                if kind == 0:
                    tile = [cpixel() for _ in range(across * down)]
                elif kind == 1:
                    tile = [cpixel()] * (across * down)
                elif kind <= 16:
                    palette = [cpixel() for _ in range(kind)]
                    bits = 1 if kind == 2 else 2 if kind <= 4 else 4
                    for _ in range(down):
                        row = take((across * bits + 7) // 8)
                        for x in range(across):
                            index = row[x * bits // 8] >> 8 - bits - x * bits % 8 & (1 << bits) - 1
                            tile.append(palette[index])
                elif kind == 128:
                    while len(tile) < across * down:
                        value = cpixel()
                        tile += [value] * run()
                else:
                    assert kind >= 130
                    palette = [cpixel() for _ in range(kind - 128)]
                    while len(tile) < across * down:
                        index = take(1)[0]
                        tile += [palette[index & 127]] * (run() if index & 128 else 1)
                assert len(tile) == across * down
                for y in range(down):
                    begin = (top + y) * width + left
                    pixels[begin : begin + across] = tile[y * across : (y + 1) * across]
        assert at == len(data)
        return pixels

    def read_tight(self, data, width, height):
        kind, at = data[0] >> 4, 1
        assert not data[0] & 15  # no stream begins anew
        if kind == 8:
            value, size = self.tpixel(data[1:])
            assert len(data) == 1 + size
            return [value] * (width * height)
        assert kind < 8
        palette = []
        if kind & 4:
            assert data[1] == 1
            count, at = data[2] + 1, 3
            for _ in range(count):
                value, size = self.tpixel(data[at:])
                palette.append(value)
                at += size
        pixel_size = self.tpixel(bytes(4))[1]
        row = (width + 7) // 8 if len(palette) == 2 else width if palette else width * pixel_size
        if row * height < 12:
            plain = data[at:]
        else:
            length = shift = 0
            for shift in (0, 7, 14):
                byte = data[at]
                at += 1
                length |= (byte if shift == 14 else byte & 127) << shift
                if not byte & 128:
                    break
            assert length == len(data) - at
            plain = self.tight[kind & 3].decompress(data[at:])
        assert len(plain) == row * height
        if len(palette) == 2:
            return [palette[plain[y * row + x // 8] >> 7 - x % 8 & 1] for y in range(height) for x in range(width)]
        if palette:
            return [palette[one] for one in plain]
        return [self.tpixel(plain[at:])[0] for at in range(0, len(plain), pixel_size)]


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
    return red << 16 | green << 8 | blue


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
