"""Which memory is used when: a picture with the time to the right and addresses downwards, only those that are used.

Executed code is blue, what is read green, what is written red; the brighter, the more often (in powers of two). A row
is a page, or several where many are used; a column is some number of events. Both become coarser as the trace goes on,
so that what is kept has a bound.
"""

from __future__ import annotations

import base64
import io
from array import array
from typing import BinaryIO
from xml.sax.saxutils import escape

from PIL import Image

from vmfs.traces.place import Place
from vmfs.words.tracing import TraceRecord, instructions_of

COLUMNS, ROWS = 512, 2048
PAGE = 12  # bits of an address in it
KINDS = 3  # in the order of the colours: written, read, executed
LEFT, TOP, RIGHT, BOTTOM = 230, 50, 20, 30  # pixels around the picture
TALL = 900  # pixels that the picture has about
LABELS = 30


class Heat:
    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file, self._place = file, place
        self._rows: dict[int, array[int]] = {}  # by address >> bits: KINDS * COLUMNS counts
        self._bits, self._width, self._events = PAGE, 1, 0

    def take(self, record: TraceRecord) -> None:
        if record.kind == "insn":
            for address, _ in instructions_of(record):
                self._add(address, 2, record.code)
        elif record.kind == "mem":
            self._add(record.address, 0 if record.is_write else 1, 1)

    def _add(self, address: int, kind: int, times: int) -> None:
        column = self._events // self._width
        if column >= COLUMNS:
            self._narrow()
            column = self._events // self._width
        self._events += 1
        row = self._rows.get(address >> self._bits)
        if row is None:
            if len(self._rows) >= ROWS:
                self._join()
            row = self._rows.setdefault(address >> self._bits, array("Q", bytes(8 * KINDS * COLUMNS)))
        row[kind * COLUMNS + column] += times

    def _narrow(self) -> None:
        """Two columns become one."""
        self._width *= 2
        for key, row in self._rows.items():
            halves = array("Q")
            for kind in range(KINDS):
                part = row[kind * COLUMNS : (kind + 1) * COLUMNS]
                halves.extend(map(int.__add__, part[::2], part[1::2]))
                halves.extend(bytes(COLUMNS // 2))
            self._rows[key] = halves

    def _join(self) -> None:
        """Rows side by side become one, until there is room."""
        while len(self._rows) >= ROWS:
            self._bits += 1
            joined: dict[int, array[int]] = {}
            for key, row in self._rows.items():
                other = joined.get(key >> 1)
                joined[key >> 1] = array("Q", map(int.__add__, other, row)) if other else row
            self._rows = joined

    def picture(self) -> Image.Image:
        """A pixel a row and column."""
        keys = sorted(self._rows)
        columns = min(-(-self._events // self._width), COLUMNS)
        most = max((max(row) for row in self._rows.values()), default=0).bit_length()
        picture = Image.new("RGB", (max(columns, 1), max(len(keys), 1)))
        pixels = picture.load()
        assert pixels is not None
        for y, key in enumerate(keys):
            row = self._rows[key]
            for x in range(columns):
                counts = (row[kind * COLUMNS + x] for kind in range(KINDS))
                pixels[x, y] = tuple(95 + 160 * count.bit_length() // most if count else 0 for count in counts)
        return picture

    def end(self) -> None:
        self._file.write(self.svg().encode())
        self._file.flush()

    def svg(self) -> str:
        keys = sorted(self._rows)
        small = self.picture()
        tall = max(1, min(16, TALL // max(len(keys), 1)))
        width, height = 2 * COLUMNS, tall * max(len(keys), 1)
        png = io.BytesIO()
        small.save(png, "PNG")
        data = base64.b64encode(png.getvalue()).decode()
        whole = LEFT + width + RIGHT, TOP + height + BOTTOM
        head = f"{self._events} instructions and accesses" + (f" of {self._place.title}" if self._place.title else "")
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{whole[0]}"'
            f' height="{whole[1]}" viewBox="0 0 {whole[0]} {whole[1]}" font-family="monospace" font-size="11">',
            f'<rect width="{whole[0]}" height="{whole[1]}" fill="white"/>',
            f'<text x="{LEFT}" y="18" font-size="14">{escape(head)}</text>',
            f'<text x="{LEFT}" y="38"><tspan fill="#c00">written</tspan> <tspan fill="#080">read</tspan>'
            f' <tspan fill="#00c">executed</tspan>;'
            f" a row is {1 << self._bits >> 10} KiB, a column {self._width} events</text>",
            f'<image x="{LEFT}" y="{TOP}" width="{width}" height="{height}" preserveAspectRatio="none"'
            f' style="image-rendering: pixelated" xlink:href="data:image/png;base64,{data}"/>',
        ]
        shown = -100
        for number, key in enumerate(keys):
            new = number == 0 or key != keys[number - 1] + 1  # where addresses go on elsewhere
            if number * tall >= shown + 13 and (new or number * tall >= shown + height // LABELS):
                shown = number * tall
                lines.append(self._label(key, TOP + shown))
        lines.append(f'<text x="{LEFT}" y="{TOP + height + 18}">0</text>')
        lines.append(f'<text x="{LEFT + width}" y="{TOP + height + 18}" text-anchor="end">{self._events} events</text>')
        return "\n".join([*lines, "</svg>\n"])

    def _label(self, key: int, y: int) -> str:
        address = key << self._bits
        found = self._place.name_of(address)
        label = f"{found[0][:16]} " if found else ""
        return f'<text x="{LEFT - 6}" y="{y + 9}" text-anchor="end">{escape(label)}{address:#x}</text>'
