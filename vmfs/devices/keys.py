"""Keys of a US keyboard: their names and scan codes, and what `keyboard` takes: `ctrl-alt-del f1 "some text\\n"`.

Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller" (scan code sets 1
and 2, and the controller's translation of one into the other).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vmfs.words.errors import Invalid

# What the controller makes of each code of set 2, by the code: set 1.
SET_2_TO_1 = bytes.fromhex(
    "ff 43 41 3f 3d 3b 3c 58 64 44 42 40 3e 0f 29 59"
    "65 38 2a 70 1d 10 02 5a 66 71 2c 1f 1e 11 03 5b"
    "67 2e 2d 20 12 05 04 5c 68 39 2f 21 14 13 06 5d"
    "69 31 30 23 22 15 07 5e 6a 72 32 24 16 08 09 5f"
    "6b 33 25 17 18 0b 0a 60 6c 34 35 26 27 19 0c 61"
    "6d 73 28 74 1a 0d 62 6e 3a 36 1c 1b 75 2b 63 76"
    "55 56 77 78 79 7a 0e 7b 7c 4f 7d 4b 47 7e 7f 6f"
    "52 53 50 4c 4d 48 01 45 57 4e 51 4a 37 49 46 54"
)
SET_1_TO_2 = {code: index for index, code in enumerate(SET_2_TO_1) if index} | {0x41: 0x83}
_TRANSLATED_HIGH = {0x83: 0x41, 0x84: 0x54}


def translate(code: int) -> int:
    """A byte of set 2, other than F0, as the controller passes it on."""
    return SET_2_TO_1[code] if code < 0x80 else _TRANSLATED_HIGH.get(code, code)


def _row(first: int, names: str) -> dict[str, int]:
    return {name: first + at for at, name in enumerate(names.split())}


_EXTENDED = 0xE000
# Name -> code of set 1; those that begin with E0 have it above.
KEYS: Mapping[str, int] = {
    "esc": 0x01,
    **_row(0x02, "1 2 3 4 5 6 7 8 9 0 minus equal backspace tab"),
    **_row(0x10, "q w e r t y u i o p leftbracket rightbracket enter ctrl"),
    **_row(0x1E, "a s d f g h j k l semicolon apostrophe grave shift backslash"),
    **_row(0x2C, "z x c v b n m comma dot slash rshift kpasterisk alt space capslock"),
    **_row(0x3B, "f1 f2 f3 f4 f5 f6 f7 f8 f9 f10 numlock scrolllock"),
    **_row(0x47, "kp7 kp8 kp9 kpminus kp4 kp5 kp6 kpplus kp1 kp2 kp3 kp0 kpdot"),
    **{"lessgreater": 0x56, "f11": 0x57, "f12": 0x58},
    **{
        name: _EXTENDED | code
        for name, code in (
            ("kpenter", 0x1C), ("rctrl", 0x1D), ("kpslash", 0x35), ("ralt", 0x38), ("home", 0x47), ("up", 0x48),
            ("pgup", 0x49), ("left", 0x4B), ("right", 0x4D), ("end", 0x4F), ("down", 0x50), ("pgdn", 0x51),
            ("ins", 0x52), ("del", 0x53), ("win", 0x5B), ("rwin", 0x5C), ("menu", 0x5D),
        )
    },
    "print": -1,  # it and the next have sequences of their own
    "pause": -2,
}  # fmt: skip

# Press and release in set 2, after IBM's tables; Pause says nothing when it is released.
_SPECIAL = {
    "print": (b"\xe0\x12\xe0\x7c", b"\xe0\xf0\x7c\xe0\xf0\x12"),
    "pause": (b"\xe1\x14\x77\xe1\xf0\x14\xf0\x77", b""),
}

_PLAIN = "1234567890-=\b\tqwertyuiop[]\n asdfghjkl;'`\\zxcvbnm,./ \x1b"
_SHIFTED = {
    **dict(zip('!@#$%^&*()_+{}:"~|<>?', "1234567890-=[];'`\\,./", strict=True)),
    **{letter.upper(): letter for letter in "abcdefghijklmnopqrstuvwxyz"},
}
_NAMES = {
    "-": "minus", "=": "equal", "\b": "backspace", "\t": "tab", "[": "leftbracket", "]": "rightbracket", "\n": "enter",
    ";": "semicolon", "'": "apostrophe", "`": "grave", "\\": "backslash", ",": "comma", ".": "dot", "/": "slash",
    " ": "space", "\x1b": "esc", "\r": "enter",
}  # fmt: skip
_OTHER_NAMES = {
    "escape": "esc", "return": "enter", "delete": "del", "insert": "ins", "pageup": "pgup", "pagedown": "pgdn",
    "control": "ctrl", "super": "win", "spc": "space", "sysrq": "print",
}  # fmt: skip

Chord = tuple[str, ...]  # keys that go down in this order, and up in the other


def of_text(text: str) -> list[Chord]:
    """The keys that type a text. Invalid for a character that a US keyboard has not."""
    chords: list[Chord] = []
    for character in text:
        plain = _SHIFTED.get(character, character)
        name = _NAMES.get(plain, plain)
        if name not in KEYS or len(plain) != 1:
            raise Invalid(f"keyboard: a US keyboard has no {character!r}")
        chords.append(("shift", name) if character in _SHIFTED else (name,))
    return chords


_WORD = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"(?=\s|$)|([^\s"]+)(?=\s|$))', re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "e": "\x1b", "b": "\b", '"': '"', "\\": "\\"}


def parse(text: str) -> list[Chord]:
    """Words: a key's name, names joined by `-`, or a quoted text. Invalid, with the word that is wrong."""
    chords: list[Chord] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _WORD.match(text, at, end)
        if match is None:
            raise Invalid(f"keyboard: {text[at:end].strip()[:40]!r} is no key and no whole quoted text")
        quoted, word = match.groups()
        chords += of_text(_unescape(quoted)) if quoted is not None else [_chord(word)]
        at = match.end()
    if not chords:
        raise Invalid('keyboard: it takes keys and text: `a enter ctrl-alt-del "some text"`')
    return chords


def _unescape(quoted: str) -> str:
    def one(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            raise Invalid(f"keyboard: there is no \\{match[1]} in a text")
        return _ESCAPES[match[1]]

    return re.sub(r"\\(.)", one, quoted, flags=re.DOTALL)


def _chord(word: str) -> Chord:
    if word == "-":
        return ("minus",)
    parts = word[:-2].split("-") + ["minus"] if word.endswith("--") else word.split("-")
    names: list[str] = []
    for part in parts:
        if len(part) == 1:
            names += [key for key in of_text(part)[0] if key not in names]
            continue
        name = part.lower()
        name = _OTHER_NAMES.get(name, name)
        if name not in KEYS:
            raise Invalid(f"keyboard: there is no key {part[:40]!r}")
        names.append(name)
    return tuple(names)


def codes(name: str, down: bool) -> bytes:
    """What a keyboard sends in set 2."""
    if name in _SPECIAL:
        return _SPECIAL[name][not down]
    code = KEYS[name]
    prefix = b"\xe0" if code & _EXTENDED else b""
    return prefix + (b"" if down else b"\xf0") + bytes([SET_1_TO_2[code & 0xFF]])


def translated(data: bytes) -> bytes:
    """Whole codes of set 2 as the controller passes them on: F0 becomes bit 7 of the next."""
    result, release = bytearray(), 0
    for byte in data:
        if byte == 0xF0:
            release = 0x80
        else:
            result.append(translate(byte) | release)
            release = 0
    return bytes(result)


def chord_codes(chord: Chord) -> list[bytes]:
    """A press of all keys and their release, a piece a key, in set 2."""
    return [codes(name, True) for name in chord] + [codes(name, False) for name in reversed(chord)]
