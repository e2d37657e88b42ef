"""What a client makes of rectangles: decoders written by the protocol's description, which share nothing with the
encoders."""

from __future__ import annotations

import struct
import zlib

from vmfs.machine.vnc.messages import RAW, TIGHT, ZRLE


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
