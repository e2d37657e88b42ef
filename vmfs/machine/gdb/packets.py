"""The framing of GDB's Remote Serial Protocol: `$payload#checksum`, acknowledgements, and the ^C byte.

Pure: bytes go in, events come out. Nothing that a peer sends raises; what is no packet is an event, or is skipped.
Run-length encoding, which a stub may use in what it sends, is not used.

Source: GDB manual, appendix E, "Overview" and "Packet Acknowledgment".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MOST = 1 << 18  # bytes of a payload as it is sent, escapes included
INTERRUPT_BYTE = 0x03
_START, _END, _ESCAPE, _FLIP = ord("$"), ord("#"), ord("}"), 0x20
_ACK, _NAK = ord("+"), ord("-")
_MUST_ESCAPE = re.compile(rb"[#$}*]")
_ESCAPED = re.compile(rb"}(.?)", re.DOTALL)
_WHOLE = re.compile(rb"\$([^$#]*)#([0-9a-fA-F]{2})")
_HEX = frozenset(b"0123456789abcdefABCDEF")


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet with the right checksum, its escapes undone."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Damaged:
    """A packet whose checksum is wrong, or that was begun and not ended."""


@dataclass(frozen=True, slots=True)
class TooLong:
    """A packet with more than `MOST` bytes."""


@dataclass(frozen=True, slots=True)
class Interrupt:
    """^C between packets."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """`+`, or `-`, which asks for the last packet again."""

    well: bool


Event = Packet | Damaged | TooLong | Interrupt | Acknowledged


def checksum(data: bytes) -> int:
    return sum(data) & 0xFF


def escape(data: bytes) -> bytes:
    """For a payload with binary data."""
    return _MUST_ESCAPE.sub(lambda found: bytes((_ESCAPE, found[0][0] ^ _FLIP)), data)


def unescape(data: bytes) -> bytes:
    """An escape at the very end stands for nothing."""
    if b"}" not in data:
        return data
    return _ESCAPED.sub(lambda found: bytes(byte ^ _FLIP for byte in found[1]), data)


def frame(payload: bytes) -> bytes:
    """A payload, escaped already, as it is sent."""
    return b"$%b#%02x" % (payload, checksum(payload))


class Decoder:
    """Cuts a stream of bytes, however it arrives, into events."""

    def __init__(self) -> None:
        self._payload: bytearray | None = None  # of the packet that has begun
        self._too_long = False
        self._digits = b""
        self._in_checksum = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that are complete with `data`. To be used up before the next call."""
        at = 0
        while at < len(data):
            whole = _WHOLE.match(data, at) if self._payload is None else None
            if whole is not None and len(whole[1]) <= MOST:  # as nearly all are
                at = whole.end()
                yield Packet(unescape(whole[1])) if int(whole[2], 16) == checksum(whole[1]) else Damaged()
                continue
            if self._in_checksum:
                at, event = self._checksum(data, at)
            elif self._payload is not None:
                at, event = self._body(data, at)
            else:
                at, event = self._between(data, at)
            if event is not None:
                yield event

    def _between(self, data: bytes, at: int) -> tuple[int, Event | None]:
        byte = data[at]
        event: Event | None = None
        if byte == _START:
            self._payload = bytearray()
        elif byte == INTERRUPT_BYTE:
            event = Interrupt()
        elif byte in (_ACK, _NAK):
            event = Acknowledged(byte == _ACK)
        return at + 1, event  # anything else is noise on the line

    def _body(self, data: bytes, at: int) -> tuple[int, Event | None]:
        assert self._payload is not None
        end = data.find(_END, at)
        stop = len(data) if end < 0 else end
        again = data.find(_START, at, stop)  # a `$` is never in a payload: another packet begins
        if again >= 0:
            self._payload, self._too_long = bytearray(), False
            return again + 1, Damaged()
        if len(self._payload) + stop - at > MOST:
            self._payload.clear()
            self._too_long = True
        if not self._too_long:
            self._payload += data[at:stop]
        self._in_checksum = end >= 0
        return stop + (end >= 0), None

    def _checksum(self, data: bytes, at: int) -> tuple[int, Event | None]:
        assert self._payload is not None
        if data[at] == _START:  # the packet before was cut off
            self._reset()
            self._payload = bytearray()
            return at + 1, Damaged()
        self._digits += data[at : at + 1]
        if len(self._digits) < 2:
            return at + 1, None
        payload, digits, too_long = bytes(self._payload), self._digits, self._too_long
        self._reset()
        if too_long:
            return at + 1, TooLong()
        if not _HEX.issuperset(digits) or int(digits, 16) != checksum(payload):
            return at + 1, Damaged()
        return at + 1, Packet(unescape(payload))

    def _reset(self) -> None:
        self._payload, self._too_long, self._digits, self._in_checksum = None, False, b"", False
