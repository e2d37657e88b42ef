"""`born`: what a PC got of the host's time and chance when it was made. With the same, two machines that follow the
instructions do the same."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from vmfs.devices.board import SEED_SIZE
from vmfs.words.errors import Invalid

SECOND = 1_000_000_000
_LAST = 1 << 62  # nanoseconds: the year 2116; what is added to it stays in 64 bits
_DATE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Birth(NamedTuple):
    """`date`: nanoseconds since 1970, UTC, when the guest's time was 0. `seed`: SEED_SIZE bytes."""

    date: int
    seed: bytes

    def text(self) -> str:
        when = _EPOCH + timedelta(seconds=self.date // SECOND)
        return f"date {when:%Y-%m-%dT%H:%M:%S}.{self.date % SECOND:09}Z\nseed {self.seed.hex()}\n"


class BirthLines(NamedTuple):
    """What was written of a Birth; None where it was not."""

    date: int | None = None
    seed: bytes | None = None

    def over(self, birth: Birth) -> Birth:
        """`birth`, where nothing else was written."""
        return Birth(birth.date if self.date is None else self.date, birth.seed if self.seed is None else self.seed)


def parse_birth(text: str) -> BirthLines:
    """`date DATE` and `seed HEX`, a line each, none or one. Raises Invalid."""
    lines = BirthLines()
    for line in text.splitlines():
        word, _, value = line.strip().partition(" ")
        if word == "date":
            lines = lines._replace(date=_parse_date(value.strip()))
        elif word == "seed":
            lines = lines._replace(seed=_parse_seed(value.strip()))
        elif word:
            raise Invalid(f"born: it is `date YYYY-MM-DDTHH:MM:SS[.FRACTION]Z` or `seed HEX`, not {line[:40]!r}")
    return lines


def _parse_date(text: str) -> int:
    match = _DATE.fullmatch(text)
    try:
        when = datetime.fromisoformat(f"{match[1]}+00:00") if match else None
    except ValueError:  # month 13
        when = None
    if match is None or when is None:
        raise Invalid(f"born: {text[:40]!r} is no date as 2026-01-31T12:00:00Z")
    date = (when - _EPOCH) // timedelta(seconds=1) * SECOND + int((match[2] or "").ljust(9, "0"))
    if not 0 <= date < _LAST:
        raise Invalid("born: the date is from 1970 to 2116")
    return date


def _parse_seed(text: str) -> bytes:
    if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * SEED_SIZE}}}", text, re.ASCII):
        raise Invalid(f"born: a seed is {2 * SEED_SIZE} hexadecimal digits")
    return bytes.fromhex(text)
