"""What a CD-ROM drive answers to commands that ask for data: of one session with one track of data.

Source: MMC-4 (INCITS 401), chapters 5 (features), 6 (commands), 7 (mode pages); SPC-3 for INQUIRY.
"""

from __future__ import annotations

import struct

from vmfs.devices.ide.sectors import msf

DATA_TRACK = 0x14  # ADR 1, a data track
LEAD_OUT = 0xAA
VENDOR, PRODUCT, REVISION = b"vmfs    ", b"CD-ROM          ", b"1.0 "
MEDIA_CLASS = 4
_CD_PROFILE = 0x0008


def inquiry() -> bytes:
    return bytes((5, 0x80, 5, 0x32, 31, 0, 0, 0)) + VENDOR + PRODUCT + REVISION


def _address(sector: int, in_msf: bool) -> bytes:
    return bytes((0, *msf(sector))) if in_msf else struct.pack(">I", sector)


def toc(blocks: int, in_msf: bool, first: int) -> bytes | None:
    """Format 0: from track `first` on; None where there is none."""
    if 1 < first != LEAD_OUT:
        return None
    rows = b""
    if first <= 1:
        rows += bytes((0, DATA_TRACK, 1, 0)) + _address(0, in_msf)
    rows += bytes((0, DATA_TRACK, LEAD_OUT, 0)) + _address(blocks, in_msf)
    return struct.pack(">HBB", 2 + len(rows), 1, 1) + rows


def sessions(in_msf: bool) -> bytes:
    """Format 1: the last complete session."""
    return struct.pack(">HBB", 10, 1, 1) + bytes((0, DATA_TRACK, 1, 0)) + _address(0, in_msf)


def full_toc(blocks: int, first_session: int) -> bytes | None:
    """Format 2: the points of the lead-in. Always minutes, seconds, frames."""
    if first_session > 1:
        return None

    def row(point: int, place: tuple[int, int, int]) -> bytes:
        return bytes((1, DATA_TRACK, 0, point, 0, 0, 0, 0, *place))

    rows = row(0xA0, (1, 0, 0)) + row(0xA1, (1, 0, 0)) + row(0xA2, msf(blocks)) + row(1, msf(0))
    return struct.pack(">HBB", 2 + len(rows), 1, 1) + rows


def disc_information() -> bytes:
    """A finished disc of one session."""
    data = bytearray(34)
    struct.pack_into(">HBBBBB", data, 0, len(data) - 2, 0x0E, 1, 1, 1, 1)
    data[7] = 0x20  # it may be used without restriction
    data[16:24] = b"\xff" * 8  # no lead-in, no lead-out to be written
    return bytes(data)


def configuration(starting: int, kind: int, has_medium: bool) -> bytes:
    """GET CONFIGURATION: features from `starting` on; `kind` 0: all, 1: those that are current, 2: that one."""
    rows = (
        (0x0000, True, 0, struct.pack(">HBB", _CD_PROFILE, has_medium, 0)),
        (0x0001, True, 2, struct.pack(">IB3x", 2, 1)),  # core: ATAPI; its events are asked for
        (0x0002, True, 1, bytes((2, 0, 0, 0))),  # morphing: an eject request comes as an event
        (0x0003, True, 0, bytes((0x29, 0, 0, 0))),  # removable medium: a tray, eject, lock
        (0x0010, has_medium, 0, struct.pack(">IHBB", 2048, 1, 0, 0)),  # random access
        (0x001E, has_medium, 0, bytes(4)),  # CD read
        (0x0100, True, 0, b""),  # power management
        (0x0105, True, 0, bytes(4)),  # timeout
    )
    data = b""
    for code, is_current, version, rest in rows:
        if code < starting or (kind == 2 and code != starting) or (kind == 1 and not is_current):
            continue
        is_persistent = code not in (0x0010, 0x001E)
        flags = version << 2 | (2 if is_persistent else 0) | is_current
        data += struct.pack(">HBB", code, flags, len(rest)) + rest
    return struct.pack(">IHH", 4 + len(data), 0, _CD_PROFILE if has_medium else 0) + data


def mode_pages(page: int, control: int, locked: bool) -> bytes | None:
    """Of a page, or all of them (3Fh); None where there is none. `control` 1: what can be changed, which is nothing."""
    pages = {
        0x01: bytes((0x01, 10, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0)),  # error recovery: five retries
        0x0E: bytes((0x0E, 14, 4, 0, 0, 0, 0, 0, *(0,) * 8)),  # audio: there is none
        0x2A: _capabilities(locked),
    }
    if page == 0x3F:
        found = b"".join(pages[number] for number in sorted(pages))
    elif page in pages:
        found = pages[page]
    else:
        return None
    if control != 1:
        return found
    changeable, at = bytearray(found), 0
    while at < len(found):
        length = found[at + 1]
        changeable[at + 2 : at + 2 + length] = bytes(length)
        at += 2 + length
    return bytes(changeable)


def _capabilities(locked: bool) -> bytes:
    speed = 16 * 176
    return struct.pack(
        ">BBBBBBBBHHHHBBHBB",
        0x2A, 20,
        0x03, 0x00,  # reads CD-R and CD-RW; writes nothing
        0x30,  # mode 2, both forms
        0x00,
        0x29 | (2 if locked else 0),  # a tray; eject, lock
        0x00,
        speed, 0, 512, speed, 0, 0, 0, 0, 0,
    )  # fmt: skip


def mode_header(medium_type: int, pages: bytes, *, ten: bool) -> bytes:
    if ten:
        return struct.pack(">HBBHH", 6 + len(pages), medium_type, 0, 0, 0) + pages
    return bytes((3 + len(pages), medium_type, 0, 0)) + pages


def event_status(classes: int, event: int, is_open: bool, has_medium: bool) -> bytes:
    """GET EVENT STATUS NOTIFICATION: of the media class, where that is asked for."""
    supported = 1 << MEDIA_CLASS
    if not classes & supported:
        return struct.pack(">HBB", 2, 0x80, supported)  # none of these
    return struct.pack(">HBBBBBB", 6, MEDIA_CLASS, supported, event, is_open | has_medium << 1, 0, 0)


def mechanism_status(is_open: bool) -> bytes:
    return bytes((0, 0x10 if is_open else 0, 0, 0, 0, 1, 0, 0))
