"""Commands of xHCI: what a driver asks of the controller for a slot.

Source: eXtensible Host Controller Interface 1.1, chapters 4.6 and 6.4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from vmfs.devices.device import Port
from vmfs.devices.usb import slots
from vmfs.devices.usb.ports import RootPort
from vmfs.devices.usb.rings import Place, Trb
from vmfs.devices.usb.slots import ADDRESSED, CONFIGURED, CONTEXT, CONTEXTS, CONTROL, DEFAULT, ENABLED, SLOTS, Slot

SUCCESS, TRANSACTION_ERROR, TRB_ERROR, STALL_ERROR, NO_SLOTS = 1, 4, 5, 6, 9
SLOT_NOT_ENABLED, SHORT_PACKET, PARAMETER_ERROR, CONTEXT_STATE_ERROR, RING_STOPPED, STOPPED = 11, 13, 17, 19, 24, 26
_DROPS_ALL, _BLOCKS_REQUEST = 0x200, 0x200  # deconfigure; BSR


class Host(Protocol):
    """What a command sees of the controller."""

    board: Port
    ports: dict[int, RootPort]
    slots: dict[int, Slot]
    configured_slots: int

    def context_of(self, number: int) -> int:
        """Where the driver sees a slot. BadRing."""

    def settle(self, slot: Slot) -> None:
        """Nothing of it is under way any more."""

    def tell_stopped(self, number: int, dci: int) -> None:
        """An endpoint is stopped: if a transfer has begun, that it was."""


class Refused(Exception):
    """A command, with its completion code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"completion code {code}")
        self.code = code


def run(host: Host, trb: Trb) -> tuple[int, int]:
    """The completion code, and the slot. BadRing."""
    number = trb.control >> 24
    command = _COMMANDS.get(trb.type)
    try:
        if command is None:
            raise Refused(TRB_ERROR)
        return SUCCESS, command(host, trb, number)
    except Refused as refusal:
        return refusal.code, number


def _slot(host: Host, number: int) -> Slot:
    slot = host.slots.get(number)
    if slot is None:
        raise Refused(SLOT_NOT_ENABLED)
    return slot


def _endpoint(host: Host, trb: Trb, number: int) -> tuple[Slot, int]:
    """Of a command for one: its slot and DCI."""
    slot, dci = _slot(host, number), trb.control >> 16 & 0x1F
    if dci not in slot.endpoints:
        raise Refused(CONTEXT_STATE_ERROR if dci else TRB_ERROR)
    return slot, dci


def _no_op(host: Host, trb: Trb, number: int) -> int:
    return 0


def _enable(host: Host, trb: Trb, number: int) -> int:
    free = next((one for one in range(1, min(host.configured_slots, SLOTS) + 1) if one not in host.slots), 0)
    if not free:
        raise Refused(NO_SLOTS)
    host.slots[free] = Slot(host.board)
    return free


def _disable(host: Host, trb: Trb, number: int) -> int:
    slot = _slot(host, number)
    host.settle(slot)
    del host.slots[number]
    if slot.context:
        slot.state = ENABLED
        slot.show(address=0)
    return number


def _address(host: Host, trb: Trb, number: int) -> int:
    slot, is_blocked = _slot(host, number), bool(trb.control & _BLOCKS_REQUEST)
    if slot.state not in ((ENABLED,) if is_blocked else (ENABLED, DEFAULT)):
        raise Refused(CONTEXT_STATE_ERROR)
    board, at = host.board, trb.parameter & ~0xF
    added = slots.read_words(board, at)[1]
    words, control = slots.read_words(board, at + CONTEXT), slots.read_words(board, at + 2 * CONTEXT)
    port = host.ports.get(words[1] >> 16 & 0xFF)
    if added & 3 != 3 or port is None or words[0] & 0xF_FFFF or not slots.can_be(CONTROL, control):
        raise Refused(PARAMETER_ERROR)
    if any(one.port == port.number for key, one in host.slots.items() if key != number):
        raise Refused(TRB_ERROR)
    if not port.is_live:
        raise Refused(TRANSACTION_ERROR)
    slot.context = host.context_of(number)
    slot.port = port.number
    slot.state = DEFAULT if is_blocked else ADDRESSED
    slot.put_words(0, words)
    slot.show(address=0 if is_blocked else number, entries=1)
    slot.open(CONTROL, control)
    return number


def _configure(host: Host, trb: Trb, number: int) -> int:
    slot = _slot(host, number)
    if slot.state not in (ADDRESSED, CONFIGURED):
        raise Refused(CONTEXT_STATE_ERROR)
    if trb.control & _DROPS_ALL:
        dropped, added, at = ~3, 0, 0
    else:
        at = trb.parameter & ~0xF
        dropped, added = slots.read_words(host.board, at)[:2]
        if dropped & 3 or added & 3 != 1:
            raise Refused(PARAMETER_ERROR)
    new = {
        dci: slots.read_words(host.board, at + CONTEXT * (dci + 1))
        for dci in range(CONTROL + 1, CONTEXTS) if added >> dci & 1
    }  # fmt: skip
    for dci, words in new.items():
        if not slots.can_be(dci, words):
            raise Refused(PARAMETER_ERROR)
        if dci in slot.endpoints and not dropped >> dci & 1:
            raise Refused(PARAMETER_ERROR)
    host.settle(slot)
    for dci in range(CONTROL + 1, CONTEXTS):
        if dropped >> dci & 1:
            slot.close(dci)
        if dci in new:
            slot.open(dci, new[dci])
    slot.state = CONFIGURED if len(slot.endpoints) > 1 else ADDRESSED
    slot.show(entries=max(slot.endpoints))
    return number


def _evaluate(host: Host, trb: Trb, number: int) -> int:
    slot, at = _slot(host, number), trb.parameter & ~0xF
    if slot.state == ENABLED:
        raise Refused(CONTEXT_STATE_ERROR)
    _, added = slots.read_words(host.board, at)[:2]
    if added & 1:  # latency and interrupter
        words, now = slots.read_words(host.board, at + CONTEXT), slot.words(0)
        second, third = now[1] & ~0xFFFF | words[1] & 0xFFFF, now[2] & 0x3F_FFFF | words[2] & ~0x3F_FFFF
        slot.put_words(0, (now[0], second, third, *now[3:]))
    if added & 2:  # the size of a packet
        words, now = slots.read_words(host.board, at + 2 * CONTEXT), slot.words(CONTROL)
        slot.put_words(CONTROL, (now[0], now[1] & 0xFFFF | words[1] & ~0xFFFF, *now[2:]))
    return number


def _reset_endpoint(host: Host, trb: Trb, number: int) -> int:
    slot, dci = _endpoint(host, trb, number)
    if slot.endpoints[dci].state != slots.HALTED:
        raise Refused(CONTEXT_STATE_ERROR)
    _stop(slot, dci)
    return number


def _stop(slot: Slot, dci: int) -> None:
    one = slot.endpoints[dci]
    one.state, one.active = slots.STOPPED, False
    slot.show_endpoint(dci)


def _stop_endpoint(host: Host, trb: Trb, number: int) -> int:
    slot, dci = _endpoint(host, trb, number)
    if slot.endpoints[dci].state != slots.RUNNING:
        raise Refused(CONTEXT_STATE_ERROR)
    host.settle(slot)
    if slot.endpoints[dci].state == slots.RUNNING:  # else the last transfer was stalled
        host.tell_stopped(number, dci)
        _stop(slot, dci)
    return number


def _set_dequeue(host: Host, trb: Trb, number: int) -> int:
    slot, dci = _endpoint(host, trb, number)
    one = slot.endpoints[dci]
    if one.state not in (slots.STOPPED, slots.FAILED):
        raise Refused(CONTEXT_STATE_ERROR)
    if trb.parameter & 0xE or trb.status >> 16:  # of streams
        raise Refused(TRB_ERROR)
    one.place, one.state = Place(trb.parameter & ~0xF, bool(trb.parameter & 1)), slots.STOPPED
    slot.show_endpoint(dci)
    return number


def _reset_device(host: Host, trb: Trb, number: int) -> int:
    slot = _slot(host, number)
    if slot.state not in (ADDRESSED, CONFIGURED):
        raise Refused(CONTEXT_STATE_ERROR)
    host.settle(slot)
    for dci in tuple(slot.endpoints):
        if dci != CONTROL:
            slot.close(dci)
    slot.state = DEFAULT
    slot.show(address=0, entries=1)
    return number


_COMMANDS: Mapping[int, Callable[[Host, Trb, int], int]] = {
    9: _enable,
    10: _disable,
    11: _address,
    12: _configure,
    13: _evaluate,
    14: _reset_endpoint,
    15: _stop_endpoint,
    16: _set_dequeue,
    17: _reset_device,
    23: _no_op,
}
