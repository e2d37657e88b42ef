"""The VM generation ID: 16 bytes by which a guest knows that it is another machine than it was.

A machine gets one when it is born, and another when it is forked, loaded or put back to a snapshot (`renew`). The
guest is told by a general-purpose event, and may then throw away what only one machine may use: a random generator's
state, a nonce.

Source: Microsoft, "Virtual Machine Generation ID" (2012). The ACPI device with the address is in vmfs/boot/acpi.py.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vmfs.devices.device import DeviceState, Port, QuietDevice, Window
from vmfs.devices.power import Power

ADDRESS, LENGTH = 0xFEF0_0000, 0x1000  # between the LAPIC and the firmware: a page in which nothing else is
EVENT = 0  # of GPE0
SIZE = 16


class VmGenIdState(DeviceState):
    id: Annotated[bytes, msgspec.Meta(min_length=SIZE, max_length=SIZE)]


class VmGenId(QuietDevice[VmGenIdState]):
    """The page reads as the ID and zeros; nothing can be written."""

    TYPE = "vmgenid"
    STATE = VmGenIdState
    IS_LATE = True

    def __init__(self, board: Port, name: str, power: Power) -> None:
        super().__init__(board, name)
        self._power = power
        self.date_set()

    def windows(self) -> tuple[Window, ...]:
        return (Window("memory", ADDRESS, LENGTH),)

    def read(self, region: int, offset: int, size: int) -> int:
        return int.from_bytes(self._id[offset : offset + size], "little")

    def date_set(self) -> None:
        self._id = self.board.own_bytes("generation", SIZE)

    def renew(self) -> None:
        self._id = self.board.random(SIZE)
        self._power.raise_event(EVENT)

    def save(self) -> VmGenIdState:
        return VmGenIdState(id=self._id)

    def load(self, state: VmGenIdState) -> None:
        self._id = state.id

    def describe(self) -> dict[str, str]:
        return {"id": self._id.hex()}
