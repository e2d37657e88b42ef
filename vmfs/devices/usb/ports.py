"""A port of xHCI's root hub.

What is plugged in is there from power-on. Link power management is kept, and does nothing; there is no overcurrent.

Source: eXtensible Host Controller Interface 1.1, chapters 4.19 and 5.4.8.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vmfs.devices.device import U32
from vmfs.devices.usb.device import UsbDevice

CONNECTED, _ENABLED, _RESET, _POWER, _WRITES_LINK, WARM_RESET = 1, 2, 0x10, 0x200, 1 << 16, 1 << 31
CONNECT_CHANGE, _WARM_CHANGE, _RESET_CHANGE, _LINK_CHANGE = 1 << 17, 1 << 19, 1 << 21, 1 << 22
_CHANGES = 0x00FE_0000
_WAKES = 7 << 25
_LINK, _LINK_AT = 0x1E0, 5
U0, U3, _DISABLED, _DETECTS, _POLLS, _RESUMES = 0, 3, 4, 5, 7, 15


class PortState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kept`: bits of PORTSC that change and wake; `power`: PORTPMSC."""

    enabled: bool
    link: U32
    kept: U32
    power: U32


class RootPort:
    """`number` begins with 1. `is_super`: of USB 3."""

    def __init__(self, number: int, is_super: bool) -> None:
        self.number = number
        self.is_super = is_super
        self.device: UsbDevice[Any] | None = None
        self.clear()

    def clear(self) -> None:
        """As after power-on."""
        self.kept = self.power = 0
        self.enabled, self.link = False, _DETECTS
        if self.device is not None:
            self.device.bus_reset()
            self.kept = CONNECT_CHANGE
            self.enabled, self.link = (True, U0) if self.is_super else (False, _POLLS)

    @property
    def is_live(self) -> bool:
        """The device answers."""
        return self.enabled and self.link == U0

    @property
    def has_changed(self) -> bool:
        return bool(self.kept & _CHANGES)

    def read(self, offset: int) -> int:
        if offset:
            return self.power if offset == 4 else 0
        value = self.kept | _POWER | self.link << _LINK_AT
        if self.device is not None:
            value |= CONNECTED | (_ENABLED | self.device.SPEED << 10 if self.enabled else 0)
        return value

    def write(self, offset: int, value: int) -> bool:
        """Whether there is a change that is to be told."""
        if offset:
            if offset == 4:
                self.power = value & (0xFFFF if self.is_super else 0xFFF8)
            return False
        had_changes = self.has_changed
        self.kept = self.kept & _CHANGES & ~value | value & _WAKES
        had_changes &= self.has_changed
        if value & _ENABLED and self.enabled and not self.is_super:  # to disable it
            self.enabled, self.link = False, _POLLS
        if value & _RESET or value & WARM_RESET and self.is_super:
            self._reset(warm=not value & _RESET)
        elif value & _WRITES_LINK:
            self._set_link((value & _LINK) >> _LINK_AT)
        return self.has_changed and not had_changes

    def _reset(self, *, warm: bool) -> None:
        if self.device is None:
            return
        self.device.bus_reset()
        self.enabled, self.link = True, U0
        self.kept |= _RESET_CHANGE | (_WARM_CHANGE if warm else 0)

    def _set_link(self, link: int) -> None:
        if self.device is None:
            return
        if link == _DETECTS and self.is_super and self.link == _DISABLED:
            self.device.bus_reset()
            self.enabled, self.link = True, U0
            self.kept |= _LINK_CHANGE
        elif not self.enabled:
            pass
        elif link == _DISABLED and self.is_super:
            self.enabled, self.link = False, _DISABLED
        elif link == U3:
            self.link = U3
        elif link == _RESUMES and self.link == U3 and not self.is_super:
            self.link = _RESUMES
        elif link == U0 and self.link in (U3, _RESUMES):
            self.link = U0
            self.kept |= _LINK_CHANGE

    def save(self) -> PortState:
        return PortState(enabled=self.enabled, link=self.link, kept=self.kept, power=self.power)

    def may_be(self, state: PortState) -> bool:
        return (
            state.link in (U0, U3, _DISABLED, _DETECTS, _POLLS, _RESUMES)
            and not state.kept & ~(_CHANGES | _WAKES)
            and (not state.enabled or self.device is not None and state.link in (U0, U3, _RESUMES))
        )

    def load(self, state: PortState) -> None:
        self.enabled, self.link, self.kept, self.power = state.enabled, state.link, state.kept, state.power
