"""From what a client says of a key, its symbol or QEMU's number of it, to the name of a key (vmfs.devices.keys).

A symbol is a key of a US keyboard and whether it needs shift: a client with another layout, and one that says `A` and
never shift, type what they mean.

Sources: X11's keysymdef.h for the symbols; the RFB community's protocol description, "QEMU Extended Key Event Message",
for the numbers (scan code set 1, with bit 7 for those that begin with E0).
"""

from __future__ import annotations

from collections.abc import Mapping

from vmfs.devices.keys import KEYS, of_text
from vmfs.words.errors import Invalid

_NAMED: Mapping[int, str] = {
    0xFF08: "backspace", 0xFF09: "tab", 0xFE20: "tab", 0xFF0A: "enter", 0xFF0D: "enter", 0xFF1B: "esc",
    0xFF13: "pause", 0xFF14: "scrolllock", 0xFF15: "print", 0xFF61: "print", 0xFF6B: "pause", 0xFFFF: "del",
    0xFF50: "home", 0xFF51: "left", 0xFF52: "up", 0xFF53: "right", 0xFF54: "down", 0xFF55: "pgup", 0xFF56: "pgdn",
    0xFF57: "end", 0xFF63: "ins", 0xFF67: "menu", 0xFF7F: "numlock", 0xFFE5: "capslock",
    0xFFE1: "shift", 0xFFE2: "rshift", 0xFFE3: "ctrl", 0xFFE4: "rctrl", 0xFFE7: "win", 0xFFE8: "rwin",
    0xFFE9: "alt", 0xFFEA: "ralt", 0xFFEB: "win", 0xFFEC: "rwin", 0xFE03: "ralt", 0xFF7E: "ralt",
    0xFF8D: "kpenter", 0xFFAA: "kpasterisk", 0xFFAB: "kpplus", 0xFFAD: "kpminus", 0xFFAE: "kpdot", 0xFFAF: "kpslash",
    0xFFAC: "kpdot", 0xFF95: "kp7", 0xFF96: "kp4", 0xFF97: "kp8", 0xFF98: "kp6", 0xFF99: "kp2", 0xFF9A: "kp9",
    0xFF9B: "kp3", 0xFF9C: "kp1", 0xFF9D: "kp5", 0xFF9E: "kp0", 0xFF9F: "kpdot",
    **{0xFFB0 + digit: f"kp{digit}" for digit in range(10)},
    **{0xFFBE + at: f"f{at + 1}" for at in range(12)},
}  # fmt: skip

_OF_CODE: Mapping[int, str] = {
    **{code & 0x7F | (0x80 if code >> 8 else 0): name for name, code in KEYS.items() if code >= 0},
    0x54: "print", 0xB7: "print", 0xC6: "pause",
}  # fmt: skip


def key_of_code(code: int) -> str | None:
    return _OF_CODE.get(code)


def key_of_symbol(symbol: int) -> tuple[str, bool | None] | None:
    """A key, and whether it needs shift, where that matters. None: a US keyboard has none such."""
    name = _NAMED.get(symbol)
    if name is not None:
        return name, None
    if 0x0100_0000 <= symbol < 0x0100_0080:  # Unicode
        symbol -= 0x0100_0000
    if not 0x20 <= symbol < 0x7F:
        return None
    try:
        *shift, name = of_text(chr(symbol))[0]
    except Invalid:
        return None
    return name, bool(shift) if name != "space" else None


class Keys:
    """What one client holds down, and what the guest sees for it: (key, down) for each event."""

    def __init__(self) -> None:
        self._down: dict[int, str] = {}  # by the code, or by the symbol above all codes
        self._shifts: list[str] = []  # that are down, by their names

    def event(self, down: bool, symbol: int, code: int, capitals: bool) -> list[tuple[str, bool]]:
        """`capitals`: the guest's Caps Lock is on, which makes letters the other way round."""
        what = code or symbol << 8
        if not down:
            name = self._down.pop(what, None)
            if name is None or name in self._down.values():
                return []
            self._note(name, False)
            return [(name, False)]
        if code:
            found: tuple[str, bool | None] | None = (name, None) if (name := key_of_code(code)) else None
        else:
            found = key_of_symbol(symbol)
        if found is None or (what not in self._down and len(self._down) >= _DOWN_MOST):
            return []
        key, shifted = found
        self._down[what] = key
        self._note(key, True)
        if shifted is not None and len(key) == 1 and key.isalpha():
            if self._shifts and not capitals:
                shifted = True  # a client that says shift and `b` means B
            else:
                shifted ^= capitals
        if shifted is None or shifted == bool(self._shifts):
            return [(key, True)]
        if shifted:
            return [("shift", True), (key, True), ("shift", False)]
        without = [(name, False) for name in self._shifts]
        return [*without, (key, True), *((name, True) for name in self._shifts)]

    def _note(self, name: str, down: bool) -> None:
        if name in ("shift", "rshift"):
            self._shifts = [one for one in self._shifts if one != name] + [name] * down

    def let_go(self) -> list[tuple[str, bool]]:
        """All that is down goes up."""
        names = list(dict.fromkeys(self._down.values()))
        self._down, self._shifts = {}, []
        return [(name, False) for name in names]


_DOWN_MOST = 64
