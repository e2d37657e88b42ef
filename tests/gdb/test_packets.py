"""The framing, on its own and against hostile bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmfs.machine.gdb import packets
from vmfs.machine.gdb.packets import (
    Acknowledged,
    Damaged,
    Decoder,
    Interrupt,
    Packet,
    TooLong,
    checksum,
    escape,
    frame,
    unescape,
)


def events(*pieces: bytes) -> list:
    decoder = Decoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def test_a_packet_as_the_manual_has_it():
    assert frame(b"OK") == b"$OK#9a"
    assert events(b"$OK#9a") == [Packet(b"OK")]
    assert events(b"$OK#9A") == [Packet(b"OK")]
    assert events(b"$#00") == [Packet(b"")]


def test_between_packets():
    assert events(b"+-\x03\x00\xffx#12\n") == [Acknowledged(True), Acknowledged(False), Interrupt()]
    assert events(b"$a\x03b#c6") == [Packet(b"a\x03b")]  # not between them


def test_a_wrong_checksum():
    assert events(b"$OK#9b$OK#9a") == [Damaged(), Packet(b"OK")]
    assert events(b"$OK#zz+") == [Damaged(), Acknowledged(True)]


def test_a_packet_that_another_interrupts():
    assert events(b"$O$OK#9a") == [Damaged(), Packet(b"OK")]
    assert events(b"$OK#$OK#9a") == [Damaged(), Packet(b"OK")]
    assert events(b"$OK#9$OK#9a") == [Damaged(), Packet(b"OK")]


def test_escapes():
    assert escape(b"a#$}*") == b"a}\x03}\x04}]}\x0a"
    assert unescape(b"}]}}}x}") == b"}]X"  # } and }, an escaped }, then x; what is cut off is nothing


def test_too_long_a_packet_is_skipped():
    long = b"x" * (packets.MOST + 1)
    assert events(b"$" + long, b"x" * 100, b"#12", b"$OK#9a") == [TooLong(), Packet(b"OK")]
    most = b"x" * packets.MOST
    assert events(frame(most)) == [Packet(most)]


def test_nothing_is_kept_of_a_packet_without_an_end():
    decoder = Decoder()
    chunk = b"y" * 65536
    assert not list(decoder.feed(b"$"))
    for _ in range(64):
        assert not list(decoder.feed(chunk))
    assert len(decoder._payload) <= packets.MOST


@given(st.binary(max_size=300))
def test_what_is_escaped_comes_back(data):
    assert unescape(escape(data)) == data
    assert not set(escape(data)) & set(b"#$*")


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_packets_come_back_however_they_are_cut(payloads, data):
    stream = b"".join(frame(escape(payload)) for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert events(*pieces) == [Packet(payload) for payload in payloads]


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([b"$", b"#", b"}", b"+", b"\x03", b"$g#67"]))))
def test_no_bytes_break_it(pieces):
    decoder = Decoder()
    for piece in pieces:
        for event in decoder.feed(piece):
            assert isinstance(event, packets.Event)
    # Whatever came before, the next packet but one is understood.
    assert list(decoder.feed(b"$#00$g#67"))[-1] == Packet(b"g")


@given(st.binary(max_size=50), st.integers(0, 255), st.data())
def test_one_wrong_byte_is_noticed(payload, byte, data):
    sent = bytearray(frame(escape(payload)))
    at = data.draw(st.integers(1, len(sent) - 1))
    if sent[at] == byte:
        return
    same_digit = chr(byte).lower() == chr(sent[at]).lower() and at >= len(sent) - 2
    sent[at] = byte
    if not same_digit:
        assert Packet(payload) not in events(bytes(sent))


def test_checksums_wrap():
    assert checksum(b"\xff\xff") == 0xFE
