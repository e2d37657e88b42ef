"""What is known of a trace beside its records: names of addresses, and the code, where there still is a machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from vmfs.debug.symbols import SymbolTable

_LABELS = 1 << 16  # of addresses, kept
_LONGEST = 15  # bytes of an instruction (SDM 2.3.11)
_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_REX = range(0x40, 0x50)

CALL, RETURN, JUMP = "call", "return", "jump"
_ONE = {0xE8: CALL, 0x9A: CALL, 0xC3: RETURN, 0xC2: RETURN, 0xCB: RETURN, 0xCA: RETURN, 0xCF: RETURN}
_TWO = {0x05: CALL, 0x34: CALL, 0x07: RETURN, 0x35: RETURN}  # 0F: SYSCALL, SYSENTER, SYSRET, SYSEXIT


class Place:
    """`symbols` names addresses. `read(address, size)` gives bytes of linear memory, and fewer or none where it
    cannot."""

    def __init__(
        self,
        symbols: SymbolTable | None = None,
        read: Callable[[int, int], bytes] | None = None,
        *,
        title: str = "",
        modules: tuple[tuple[str, int, int], ...] = (),
    ) -> None:
        self.symbols = SymbolTable() if symbols is None else symbols
        self.title = title
        self.modules = modules  # (name, first, last): for `drcov`
        self._read = read
        self.label = lru_cache(_LABELS)(self.symbols.label)
        self.name_of = lru_cache(_LABELS)(self.symbols.name_of)
        self.way_of = lru_cache(_LABELS)(self._way_of)

    def function(self, address: int) -> str:
        """Of the symbol that an address belongs to, else the address itself."""
        found = self.name_of(address)
        return found[0] if found else f"{address:#x}"

    def begins(self, address: int) -> bool:
        """Whether a symbol is there."""
        found = self.name_of(address)
        return found is not None and found[1] == 0

    def _way_of(self, address: int) -> str:
        """How the instruction at `address` leaves for elsewhere: CALL, RETURN, JUMP; "" where its bytes are not
        known."""
        code = self._read(address, _LONGEST) if self._read else b""
        return way_of(code) if code else ""


def way_of(code: bytes) -> str:
    """CALL, RETURN, or JUMP for all else. The opcodes are the same in all modes: 40h to 4Fh, which are REX prefixes in
    64-bit mode, are INC and DEC in the others, and none of these leaves for elsewhere."""
    at = 0
    while at < len(code) and code[at] in _PREFIXES:
        at += 1
    if at < len(code) and code[at] in _REX:
        at += 1
    first, second = (code[at : at + 2] + b"\0\0")[:2]
    if first == 0x0F:
        return _TWO.get(second, JUMP)
    if first == 0xFF:  # group 5: /2 and /3 are CALL
        return CALL if second >> 3 & 7 in (2, 3) else JUMP
    return _ONE.get(first, JUMP)
