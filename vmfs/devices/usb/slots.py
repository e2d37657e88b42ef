"""Slots of xHCI, their endpoints, and the contexts by which a driver sees them.

Source: eXtensible Host Controller Interface 1.1, chapters 4.5 (slots), 4.8 (endpoints) and 6.2 (contexts).
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from vmfs.devices.device import U32, U64, Port
from vmfs.devices.usb.device import IN
from vmfs.devices.usb.rings import BadRing, Place

SLOTS = 16
CONTEXT = 32  # bytes
CONTEXTS = 32  # of a slot: its own and 31 of endpoints
CONTROL = 1  # the first endpoint
DISABLED, RUNNING, HALTED, STOPPED, FAILED = range(5)  # of an endpoint
ENABLED, DEFAULT, ADDRESSED, CONFIGURED = range(4)  # of a slot
_KINDS_IN, _KINDS_OUT, KIND_CONTROL = (6, 7), (2, 3), 4  # bulk and interrupt


class EndpointState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`active`: its doorbell was rung, and its ring was not found empty since."""

    state: Annotated[int, msgspec.Meta(ge=RUNNING, le=FAILED)]
    at: U64
    cycle: bool
    active: bool


class SlotState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`port`: its number, or 0 until there is an address; `context`: where the driver sees it; `endpoints` by their
    DCI."""

    state: Annotated[int, msgspec.Meta(ge=ENABLED, le=CONFIGURED)]
    port: U32
    context: U64
    endpoints: dict[Annotated[int, msgspec.Meta(ge=CONTROL, lt=CONTEXTS)], EndpointState]


class SlotEndpoint:
    """`is_busy`: a transfer of it waits for the host."""

    def __init__(self, place: Place) -> None:
        self.state = RUNNING
        self.place = place
        self.active = False
        self.is_busy = False

    def save(self) -> EndpointState:
        return EndpointState(state=self.state, at=self.place.at, cycle=self.place.cycle, active=self.active)

    @classmethod
    def of(cls, state: EndpointState) -> SlotEndpoint:
        made = cls(Place(state.at, state.cycle))
        made.state, made.active = state.state, state.active
        return made


def address_of(dci: int) -> int:
    """The address of an endpoint."""
    return dci >> 1 | (IN if dci & 1 and dci != CONTROL else 0)


def dci_of(address: int) -> int:
    return (address & 0xF) << 1 | bool(address & IN)


class Slot:
    def __init__(self, board: Port) -> None:
        self._board = board
        self.state = ENABLED
        self.port = 0
        self.context = 0
        self.endpoints: dict[int, SlotEndpoint] = {}

    # ---- what the driver sees

    def words(self, number: int) -> tuple[int, ...]:
        """Of a context of the slot. BadRing."""
        return read_words(self._board, self.context + CONTEXT * number)

    def put_words(self, number: int, words: tuple[int, ...]) -> None:
        at = self.context + CONTEXT * number
        if not self._board.is_ram(at, CONTEXT):
            raise BadRing
        self._board.dma_write(at, struct.pack("<8I", *words))

    def show(self, *, address: int | None = None, entries: int | None = None) -> None:
        """Its state, and what is new besides."""
        first, second, third, last = self.words(0)[:4]
        if address is None:
            address = last & 0xFF
        if entries is not None:
            first = first & 0x07FF_FFFF | entries << 27
        self.put_words(0, (first, second, third, address | self.state << 27, 0, 0, 0, 0))

    def show_endpoint(self, dci: int) -> None:
        """Its state, and where its ring is read."""
        one = self.endpoints.get(dci)
        words = self.words(dci)
        state = DISABLED if one is None else one.state
        low, high = words[2], words[3]
        if one is not None:
            low, high = one.place.at & 0xFFFF_FFF0 | one.place.cycle, one.place.at >> 32
        self.put_words(dci, (words[0] & ~7 | state, words[1], low, high, *words[4:]))

    def open(self, dci: int, words: tuple[int, ...]) -> None:
        """Have an endpoint of what a driver has written for it."""
        self.endpoints[dci] = SlotEndpoint(Place((words[2] | words[3] << 32) & ~0xF, bool(words[2] & 1)))
        self.put_words(dci, (words[0] & ~7 | RUNNING, *words[1:5], 0, 0, 0))

    def close(self, dci: int) -> None:
        if self.endpoints.pop(dci, None) is not None:
            self.show_endpoint(dci)

    # ---- life

    def save(self) -> SlotState:
        endpoints = {dci: one.save() for dci, one in self.endpoints.items()}
        return SlotState(state=self.state, port=self.port, context=self.context, endpoints=endpoints)

    @classmethod
    def of(cls, board: Port, state: SlotState) -> Slot:
        made = cls(board)
        made.state, made.port, made.context = state.state, state.port, state.context
        made.endpoints = {dci: SlotEndpoint.of(one) for dci, one in state.endpoints.items()}
        return made


def read_words(board: Port, at: int) -> tuple[int, ...]:
    """A context. BadRing."""
    if not board.is_ram(at, CONTEXT):
        raise BadRing
    return struct.unpack("<8I", board.dma_read(at, CONTEXT))


def can_be(dci: int, words: tuple[int, ...]) -> bool:
    """Whether an endpoint can be as a driver has written it: of a kind that is there, and no streams."""
    kind = words[1] >> 3 & 7
    kinds = (KIND_CONTROL,) if dci == CONTROL else _KINDS_IN if dci & 1 else _KINDS_OUT
    return kind in kinds and not words[0] >> 10 & 0x1F and bool(words[1] >> 16)
