"""A flame graph as one SVG file, without scripts: https://www.brendangregg.com/flamegraphs.html tells how to read one.

Each rectangle is a function on a call stack, as wide as its share of the instructions; what it has called stands on it.
A browser shows the whole name and the numbers of the one under the pointer.
"""

from __future__ import annotations

from collections import Counter
from typing import BinaryIO
from xml.sax.saxutils import escape
from zlib import crc32

from vmfs.traces.place import Place
from vmfs.traces.stacks import Stack, Stacks
from vmfs.words.tracing import TraceRecord

WIDTH, ROW, LETTER, MARGIN, HEAD = 1200, 17, 6.6, 10, 40  # pixels; LETTER: of a name's, about
NARROWEST = 0.3  # pixels: what is narrower is not drawn
MOST = 1 << 16  # stacks that are counted before the rare ones are joined to their callers


class Flame:
    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file, self._title = file, place.title
        self._stacks = Stacks(place)

    def take(self, record: TraceRecord) -> None:
        self._stacks.take(record)
        if len(self._stacks.counts) >= MOST:
            self._join()

    def _join(self) -> None:
        """The rare stacks, to their callers: half as deep, until there are half as many."""
        counts = self._stacks.counts
        while len(counts) > MOST // 2:
            for stack, _ in counts.most_common()[MOST // 2 :]:
                if len(stack) > 1:  # else a CPU's own, of which there are few
                    count = counts.pop(stack)
                    counts[stack[: len(stack) // 2]] += count

    def end(self) -> None:
        self._file.write(svg(self._stacks.named(), self._title).encode())
        self._file.flush()


def svg(counts: Counter[Stack], title: str = "") -> str:
    tree = _Node()
    for stack, count in counts.items():
        node = tree
        node.count += count
        for name in stack:
            node = node.calls.setdefault(name, _Node())
            node.count += count
    boxes: list[str] = []
    scale = (WIDTH - 2 * MARGIN) / max(tree.count, 1)
    depth = _depth(tree, NARROWEST / scale)
    height = HEAD + ROW * (depth + 1) + MARGIN
    waiting = [("all", tree, 0, 0)]
    while waiting:
        name, node, begin, row = waiting.pop()
        x, y = MARGIN + begin * scale, height - MARGIN - ROW * (row + 1)
        boxes.append(_box(name, node.count, tree.count, x, y, scale))
        for callee, one in sorted(node.calls.items()):
            if one.count * scale >= NARROWEST:
                waiting.append((callee, one, begin, row + 1))
            begin += one.count
    head = f"{tree.count} instructions" + (f" of {title}" if title else "")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="monospace" font-size="11">\n'
        "<style>g:hover rect { stroke: black; }</style>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#fffdf5"/>\n'
        f'<text x="{WIDTH // 2}" y="24" text-anchor="middle" font-size="15">{escape(head)}</text>\n'
        + "".join(boxes)
        + "</svg>\n"
    )


class _Node:
    __slots__ = ("calls", "count")

    def __init__(self) -> None:
        self.count = 0
        self.calls: dict[str, _Node] = {}


def _depth(tree: _Node, least: float) -> int:
    deepest, waiting = 0, [(tree, 0)]
    while waiting:
        node, row = waiting.pop()
        deepest = max(deepest, row)
        waiting += [(one, row + 1) for one in node.calls.values() if one.count >= least]
    return deepest


def _box(name: str, count: int, whole: int, x: float, y: int, scale: float) -> str:
    width = count * scale
    fits = int((width - 6) / LETTER)
    text = name if len(name) <= fits else name[: fits - 1] + "\u2026" if fits > 3 else ""
    hue = crc32(name.encode()) % 50  # red to yellow; of one name always the same
    told = f"{name}: {count} instructions, {100 * count / max(whole, 1):.2f} %"
    return (
        f"<g><title>{escape(told)}</title>"
        f'<rect x="{x:.2f}" y="{y}" width="{max(width, NARROWEST):.2f}" height="{ROW - 1}" rx="1"'
        f' fill="hsl({hue} 85% 68%)"/>'
        + (f'<text x="{x + 3:.2f}" y="{y + 12}">{escape(text)}</text>' if text else "")
        + "</g>\n"
    )
