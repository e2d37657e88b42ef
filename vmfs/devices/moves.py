"""What `mouse` takes: `100,-20 left +left 50,0 -left wheel-down @640,400`."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

import msgspec

from vmfs.devices.ps2 import MOVED_MOST, Moved
from vmfs.words.errors import Invalid

BUTTONS = ("left", "right", "middle", "side", "extra")
_WHEEL = {"wheel-up": -1, "wheel-down": 1}
_WAY = re.compile(r"(@?)([+-]?[0-9]{1,6}),([+-]?[0-9]{1,6})", re.ASCII)
_BUTTON = re.compile(r"([+-]?)([a-z]+)")


class Move(NamedTuple):
    """`x` to the right, `y` down, `wheel` towards the user; `button`, the bit of one that goes down or up, or 0.
    `is_place`: `x` and `y` are a pixel of the screen, which a tablet can point to."""

    x: Moved = 0
    y: Moved = 0
    wheel: Annotated[int, msgspec.Meta(ge=-1, le=1)] = 0
    button: Annotated[int, msgspec.Meta(ge=0, le=1 << 4)] = 0
    down: bool = False
    is_place: bool = False


def parse(text: str) -> list[Move]:
    """Invalid, with the word that is wrong."""
    moves: list[Move] = []
    for word in text.split():
        if match := _WAY.fullmatch(word):
            x, y = int(match[2]), int(match[3])
            if max(abs(x), abs(y)) > MOVED_MOST:
                raise Invalid(f"mouse: {word} is too far: up to {MOVED_MOST} at once")
            if match[1] and min(x, y) < 0:
                raise Invalid(f"mouse: {word} is not on the screen")
            moves.append(Move(x, y, is_place=bool(match[1])))
        elif word in _WHEEL:
            moves.append(Move(wheel=_WHEEL[word]))
        elif (match := _BUTTON.fullmatch(word)) and match[2] in BUTTONS:
            button = 1 << BUTTONS.index(match[2])
            moves += [Move(button=button, down=way == "+") for way in match[1] or "+-"]
        else:
            raise Invalid(
                f"mouse: {word[:40]!r} is no move (`10,-5`), no place (`@10,5`), no wheel-up, wheel-down or button"
            )
    if not moves:
        raise Invalid("mouse: it takes moves and buttons: `10,-5 left +left 0,20 -left wheel-down`")
    return moves
