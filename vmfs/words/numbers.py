"""Numbers and sizes as people write them in files and options."""

import re

from vmfs.words.errors import Invalid

_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+|[0-9]+)", re.ASCII)
_SIZE = re.compile(r"([0-9]+)\s*([KMGT]?)(iB|B)?", re.ASCII | re.IGNORECASE)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|ms|s|m|h)", re.ASCII)
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_number(text: str, bits: int = 64, *, what: str = "number") -> int:
    """`text` (decimal, 0x, 0o, 0b; a minus sign means two's complement) as an unsigned number of `bits` bits.

    A leading zero is decimal, not octal: `010` is ten. Raises Invalid, naming `what`.
    """
    if len(text) > 160 or not _NUMBER.fullmatch(text):  # 160: more digits than 128 bits have in any base
        raise Invalid(f"{what}: {text[:40]!r} is not a number (decimal, 0x, 0o, 0b)")
    digits = text.lstrip("-")
    value = int(digits, 0) if digits[:2].lower() in ("0x", "0o", "0b") else int(digits, 10)
    if text.startswith("-"):
        if value > 1 << (bits - 1):
            raise Invalid(f"{what}: {text} does not fit {bits} bits")
        return -value & ((1 << bits) - 1)
    if value >> bits:
        raise Invalid(f"{what}: {text} does not fit {bits} bits")
    return value


def parse_size(text: str, *, what: str = "size") -> int:
    """Bytes: a number, or one with K, M, G or T (powers of 1024; `MiB` and `MB` mean the same)."""
    match = _SIZE.fullmatch(text) if len(text) <= 40 else None
    if match:
        return int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))
    return parse_number(text, what=what)


def parse_duration(text: str) -> float:
    """Seconds: a number with its unit (ns, us, ms, s, m, h)."""
    match = _DURATION.fullmatch(text) if len(text) <= 40 else None
    if not match:
        raise Invalid(f"time: {text[:40]!r} is not a number with ns, us, ms, s, m or h")
    return float(match[1]) * _SECONDS[match[2]]
