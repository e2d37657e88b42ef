"""The PC speaker. Its registers, port 61 and channel 2 of the 8254, are the engine's; what it says is worked out of
their state."""

from __future__ import annotations

from vmfs.devices.device import StatelessDevice
from vmfs.words import layouts

_HZ = 1_193_182
_CHANNEL = 2
_COUNT, _MODE, _GATE = 0, 9, 11  # of PIT_CHANNEL
_RATE, _SQUARE = 2, 3  # modes that repeat


class Speaker(StatelessDevice):
    TYPE = "speaker"
    IS_LATE = True


def tone(pit: bytes) -> float:
    """What `struct kvm_pit_state2` has the speaker say, in Hz; 0: nothing."""
    channel = layouts.PIT_CHANNEL.unpack_from(pit, _CHANNEL * layouts.PIT_CHANNEL.size)
    sounds = channel[_GATE] and pit[layouts.PIT_FLAGS_AT] & layouts.PIT_SPEAKER and channel[_MODE] in (_RATE, _SQUARE)
    return _HZ / (channel[_COUNT] or 0x1_0000) if sounds else 0.0
