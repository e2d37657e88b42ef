"""TRBs of xHCI: what a ring has next, and transfers.

Source: eXtensible Host Controller Interface 1.1, chapters 4.9 (rings), 4.11 (TRBs), 6.4.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmfs.devices.device import Port

TRB = struct.Struct("<QII")
NORMAL, SETUP_STAGE, DATA_STAGE, STATUS_STAGE, ISOCH, LINK, EVENT_DATA, NO_OP = range(1, 9)
TRANSFER_EVENT, COMMAND_EVENT, PORT_EVENT = 32, 33, 34

_CYCLE, _TOGGLES, _ON_SHORT, _CHAIN, _ON_COMPLETION, _IMMEDIATE, _BLOCKS_EVENT = 1, 2, 4, 0x10, 0x20, 0x40, 0x200
_LINKS_MOST = 16  # one after the other
_TRBS_MOST = 1024  # of a transfer


class BadRing(Exception):
    """Not all RAM, or it leads nowhere."""


class Place(NamedTuple):
    """Where a ring is read next, and the cycle bit of what is there when it is the driver's."""

    at: int
    cycle: bool


class Trb(NamedTuple):
    address: int
    parameter: int
    status: int
    control: int

    @property
    def type(self) -> int:
        return self.control >> 10 & 0x3F

    @property
    def length(self) -> int:
        """Of the data."""
        return self.status & 0x1_FFFF

    @property
    def target(self) -> int:
        """The interrupter of its event."""
        return self.status >> 22

    @property
    def chains(self) -> bool:
        return bool(self.control & _CHAIN)

    @property
    def tells(self) -> bool:
        return bool(self.control & _ON_COMPLETION)

    @property
    def tells_short(self) -> bool:
        return bool(self.control & _ON_SHORT)

    @property
    def is_immediate(self) -> bool:
        """The data are in it."""
        return bool(self.control & _IMMEDIATE)

    @property
    def is_silent(self) -> bool:
        """Its event does not interrupt."""
        return bool(self.control & _BLOCKS_EVENT)


class Transfer(NamedTuple):
    """`place`: what comes after it."""

    trbs: list[Trb]
    place: Place


def next_trb(board: Port, place: Place) -> tuple[Trb, Place] | None:
    """The next of a ring, and what comes after it; None where the driver has written none yet."""
    at, cycle = place
    for _ in range(_LINKS_MOST):
        if not board.is_ram(at, TRB.size):
            raise BadRing
        parameter, status, control = TRB.unpack(board.dma_read(at, TRB.size))
        if bool(control & _CYCLE) != cycle:
            return None
        if control >> 10 & 0x3F != LINK:
            return Trb(at, parameter, status, control), Place(at + TRB.size, cycle)
        at = parameter & ~0xF
        cycle ^= bool(control & _TOGGLES)
    raise BadRing


def next_transfer(board: Port, place: Place, *, control: bool) -> Transfer | None:
    """A whole transfer, of a `control` endpoint with all its stages; None where it is not whole yet."""
    trbs: list[Trb] = []
    ends = not control
    while len(trbs) < _TRBS_MOST:
        found = next_trb(board, place)
        if found is None:
            return None
        trb, place = found
        trbs.append(trb)
        ends |= trb.type in (STATUS_STAGE, NO_OP) or (control and trb.type == SETUP_STAGE and len(trbs) > 1)
        if ends and not trb.chains:
            return Transfer(trbs, place)
    raise BadRing
