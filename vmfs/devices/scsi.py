"""Sense data: why a drive has failed a command of SCSI's, for the host that asks.

Source: SPC-3 (INCITS 408), 4.5 and annex D.
"""

from __future__ import annotations

Sense = tuple[int, int, int]  # key, additional code, its qualifier

NO_SENSE: Sense = (0, 0, 0)
READ_ERROR: Sense = (3, 0x11, 0)
WRITE_ERROR: Sense = (3, 0x0C, 0)
BAD_COMMAND: Sense = (5, 0x20, 0)
OUT_OF_RANGE: Sense = (5, 0x21, 0)
BAD_FIELD: Sense = (5, 0x24, 0)
NOT_SAVED: Sense = (5, 0x39, 0)
WRITE_PROTECTED: Sense = (7, 0x27, 0)


def sense_data(sense: Sense) -> bytes:
    """In the fixed format, as REQUEST SENSE answers."""
    key, code, qualifier = sense
    return bytes((0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0))
