"""What clients say: whole, in pieces, and what a client must not say."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.devices import keys
from vmfs.machine.vnc import des
from vmfs.machine.vnc.keysyms import Keys, key_of_code
from vmfs.machine.vnc.messages import (
    Decoder,
    KeyEvent,
    PixelFormat,
    PointerEvent,
    SetDesktopSize,
    SetEncodings,
    SetPixelFormat,
    UpdateRequest,
    parse_format,
)
from vmfs.words.errors import Invalid

RGB565 = struct.pack(">BBBBHHHBBB3x", 16, 16, 0, 1, 31, 63, 31, 11, 5, 0)
MESSAGES = {
    b"\0\0\0\0" + RGB565: SetPixelFormat(PixelFormat(2, False, (31, 63, 31), (11, 5, 0), depth=16)),
    struct.pack(">BxHiii", 2, 3, 16, 0, -223): SetEncodings((16, 0, -223)),
    struct.pack(">BxH", 2, 0): SetEncodings(()),
    struct.pack(">BBHHHH", 3, 1, 1, 2, 640, 480): UpdateRequest(True, 1, 2, 640, 480),
    struct.pack(">BBxxI", 4, 1, 0xFF0D): KeyEvent(True, 0xFF0D),
    struct.pack(">BBHH", 5, 4, 10, 20): PointerEvent(4, 10, 20),
    struct.pack(">BxxxI", 6, 5) + b"hello": None,
    struct.pack(">BxHHBx", 251, 800, 600, 1) + bytes(16): SetDesktopSize(800, 600),
    struct.pack(">BBHII", 255, 0, 0, 0x61, 0x1E): KeyEvent(False, 0x61, 0x1E),
}


@given(st.lists(st.sampled_from(sorted(MESSAGES)), max_size=8), st.lists(st.integers(1, 40)))
def test_messages_come_whole_and_in_pieces(said, cuts):
    data, events, decoder, at = b"".join(said), [], Decoder(), 0
    for cut in [*cuts, len(data) + 1]:
        events += decoder.feed(data[at : at + cut])
        at += cut
    assert events == [MESSAGES[one] for one in said if MESSAGES[one] is not None]
    assert decoder.held == 0


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=20))
def test_any_bytes_are_events_or_the_end(pieces):
    decoder = Decoder()
    try:
        for piece in pieces:
            for event in decoder.feed(piece):
                assert event is not None
            assert decoder.held <= 8 + 16 * 255  # the longest message that may wait for its rest
    except Invalid as error:
        assert str(error).startswith("vnc: ")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (b"\x01", "there is no message 1"),
        (b"\xff\x01", "there is no message 255 of kind 1"),
        (struct.pack(">BxH", 2, 1025), "1025 encodings are too many"),
        (struct.pack(">BxxxI", 6, (1 << 20) + 1), "a text of 1048577 bytes is too long"),
        (b"\0\0\0\0" + struct.pack(">BBBBHHHBBB3x", 24, 24, 0, 1, 255, 255, 255, 16, 8, 0), "no pixels of 24 bits"),
        (b"\0\0\0\0" + struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 0, 255, 255, 16, 8, 0), "have no colour of 0 << 16"),
        (b"\0\0\0\0" + struct.pack(">BBBBHHHBBB3x", 16, 16, 0, 1, 31, 63, 31, 12, 5, 0), "have no colour of 31 << 12"),
        (b"\0\0\0\0" + struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 254, 255, 255, 16, 8, 0), "no colour of 254 << 16"),
        (b"\0\0\0\0" + struct.pack(">BBBBHHHBBB3x", 16, 16, 0, 0, 0, 0, 0, 0, 0, 0), "a map of colours is for pixels"),
    ],
)
def test_what_is_no_message(said, sentence):
    with pytest.raises(Invalid, match=sentence):
        list(Decoder().feed(said))


@given(st.binary(min_size=16, max_size=16))
def test_formats(data):
    try:
        one = parse_format(data)
    except Invalid:
        return
    assert parse_format(one.pack()) == one  # what is sent of it says the same


def test_des():
    """The key and the block of FIPS 74's example; of the password each byte's bits are the other way round."""
    key = "".join(chr(int(f"{byte:08b}"[::-1], 2)) for byte in bytes.fromhex("133457799BBCDFF1"))

    class Latin(str):
        def encode(self, *args):
            return super().encode("latin-1")

    assert des.encrypt(Latin(key), bytes.fromhex("0123456789ABCDEF")) == bytes.fromhex("85E813540F0AB405")


# ---- keys


class Typist:
    """Presses and releases, and what a guest's driver with a US keyboard makes of it."""

    def __init__(self):
        self.keys, self.down, self.capitals = Keys(), set(), False

    def event(self, down, symbol, code=0):
        seen = ""
        for key, goes_down in self.keys.event(down, symbol, code, self.capitals):
            (self.down.add if goes_down else self.down.discard)(key)
            if goes_down and key not in ("shift", "rshift"):
                seen += self._character(key)
        return seen

    def _character(self, key):
        shifted = bool(self.down & {"shift", "rshift"})
        if len(key) == 1 and key.isalpha():
            shifted ^= self.capitals
        for code in range(0x20, 0x7F):
            *shift, name = keys.of_text(chr(code))[0]
            if name == key and (bool(shift) == shifted or key == "space"):
                return chr(code)
        return f"<{key}>"


@pytest.mark.parametrize("held", [(), (0xFFE1,), (0xFFE2,), (0xFFE1, 0xFFE2)])
@pytest.mark.parametrize("capitals", [False, True])
def test_each_character_is_typed_whatever_shift_is_down(held, capitals):
    typist = Typist()
    typist.capitals = capitals
    for symbol in held:
        typist.event(True, symbol)
    down = set(typist.down)
    for code in range(0x20, 0x7F):
        # Of letters shift and `b` is B: programs say so, and keyboards say B.
        meant = chr(code).upper() if held and not capitals else chr(code)
        assert typist.event(True, code) == meant
        assert typist.event(False, code) == "" and typist.down == down  # and what was down is so again
    for symbol in held:
        typist.event(False, symbol)
    assert not typist.down


def test_keys_by_their_numbers_are_keys_and_no_characters():
    typist = Typist()
    assert typist.event(True, ord("a"), 0x10) == "q"  # a French keyboard's A: the guest has a layout of its own
    assert typist.event(True, ord("Q"), 0x10) == "q" and typist.event(False, 0, 0x10) == ""
    assert not typist.down
    assert key_of_code(0xC8) == "up" and key_of_code(0x48) == "kp8" and key_of_code(0x9D) == "rctrl"
    assert {key_of_code(code) for code in (0x54, 0xB7)} == {"print"} and key_of_code(0xC6) == "pause"
    assert key_of_code(0x7F) is None
    assert {key_of_code(code) for code in range(256)} - {None} == set(keys.KEYS)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 0xFFFF_FFFF), st.integers(0, 255)), max_size=200))
def test_what_goes_down_goes_up(events):
    typist = Typist()
    for down, symbol, code in events:
        typist.event(down, symbol, code)
        assert len(typist.down) <= 64
    for key, down in typist.keys.let_go():
        assert not down
        typist.down.discard(key)
    assert not typist.down
