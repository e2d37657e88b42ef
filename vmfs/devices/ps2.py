"""PS/2 keyboard and mouse: what they answer to the bytes that a controller sends them. Each has a queue of its own.

Typematic repetition is not there: a key goes down and up. How far the mouse has moved adds up until the one packet
that waits for the guest is taken, so that it never lags; the sample rate says nothing about that.

Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard" and "Auxiliary device"; Microsoft's IntelliMouse
protocol for the wheel.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, Generic, Literal, TypeVar

import msgspec

from vmfs.devices.device import U8, DeviceState
from vmfs.devices.keys import translated

ACK, RESEND, ERROR, SELF_TEST_PASSED = 0xFA, 0xFE, 0xFC, 0xAA
QUEUE = 16  # bytes that a keyboard keeps
REPLIES = 64  # bytes of answers that a hostile driver can make wait

MOVED_MOST = 1 << 14  # how far a mouse goes that nobody asks

Flag = Annotated[int, msgspec.Meta(ge=0, le=1)]
Moved = Annotated[int, msgspec.Meta(ge=-MOVED_MOST, le=MOVED_MOST)]


class Ps2State(DeviceState):
    """`queue`: what waits to be sent."""

    queue: Annotated[bytes, msgspec.Meta(max_length=REPLIES)]
    command: U8
    enabled: Flag
    last: U8
    rate: U8


class KeyboardState(Ps2State):
    scan_set: Annotated[int, msgspec.Meta(ge=1, le=2)]
    leds: Annotated[int, msgspec.Meta(ge=0, le=7)]


class MouseState(Ps2State):
    id: Literal[0, 3, 4]
    resolution: Annotated[int, msgspec.Meta(ge=0, le=3)]
    scaling: Flag
    remote: Flag
    wrap: Flag
    knock: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
    x: Moved = 0
    y: Moved = 0
    z: Moved = 0
    buttons: Annotated[int, msgspec.Meta(ge=0, lt=32)] = 0
    told: Annotated[int, msgspec.Meta(ge=0, lt=32)] = 0


S = TypeVar("S", bound=Ps2State)


class Ps2Device(Generic[S]):
    """`queue` is what waits to be sent. `STATE` has its numbers, by the names of its attributes."""

    STATE: type[S]

    def __init__(self) -> None:
        self.queue: deque[int] = deque()
        self.reset()

    def reset(self) -> None:
        """As at power-on."""
        self.queue.clear()
        self.command = 0  # the one whose argument comes next
        self.enabled = 0
        self.last = 0  # what was sent last, for Resend
        self.defaults()

    def defaults(self) -> None:
        """What the command Set Defaults sets."""
        raise NotImplementedError

    def send(self, *data: int) -> None:
        if len(self.queue) + len(data) <= REPLIES:
            self.queue.extend(data)

    def take(self) -> int:
        """The next byte, which is there."""
        self.last = self.queue.popleft()
        return self.last

    def save(self) -> S:
        values = {name: getattr(self, name) for name in self.STATE.__struct_fields__ if name != "queue"}
        return self.STATE(queue=bytes(self.queue), **values)

    def load(self, state: S) -> None:
        self.queue = deque(state.queue)
        for name in self.STATE.__struct_fields__:
            if name != "queue":
                setattr(self, name, getattr(state, name))


class Keyboard(Ps2Device[KeyboardState]):
    """Scan code sets 1 and 2."""

    STATE = KeyboardState

    def reset(self) -> None:
        super().reset()
        self.enabled = 1
        self.leds = 0

    def defaults(self) -> None:
        self.scan_set = 2
        self.rate = 0x2B  # 10.9 a second, after half a second

    def press(self, data: bytes) -> bool:
        """Codes of set 2 of one key. False, and nothing was taken, when there is no room for all of them."""
        if not self.enabled or len(self.queue) + len(data) > QUEUE:
            return False
        self.queue.extend(data if self.scan_set == 2 else translated(data))
        return True

    def write(self, byte: int) -> None:
        command, self.command = self.command, 0
        if command and byte < 0xED or command == 0xF3:
            self._argument(command, byte)
            return
        match byte:
            case 0xED | 0xF0 | 0xF3:
                self.command = byte
                self.send(ACK)
            case 0xEE:  # Echo
                self.send(0xEE)
            case 0xF2:
                self.send(ACK, 0xAB, 0x83)
            case 0xF4:
                self.queue.clear()
                self.enabled = 1
                self.send(ACK)
            case 0xF5 | 0xF6:
                self.queue.clear()
                self.defaults()
                self.enabled = int(byte == 0xF6)
                self.send(ACK)
            case 0xF7 | 0xF8 | 0xF9 | 0xFA:  # what keys of set 3 do
                self.send(ACK)
            case 0xFE:
                self.send(self.last)
            case 0xFF:
                self.reset()
                self.send(ACK, SELF_TEST_PASSED)
            case _:
                self.send(RESEND)

    def _argument(self, command: int, byte: int) -> None:
        if command == 0xED:
            self.leds = byte & 7
        elif command == 0xF3:
            self.rate = byte
        elif byte == 0:
            self.send(ACK, self.scan_set)
            return
        elif byte in (1, 2):
            self.scan_set = byte
        else:
            self.send(RESEND)
            return
        self.send(ACK)


class Mouse(Ps2Device[MouseState]):
    """Three buttons; a wheel and five buttons for drivers that know how to ask.

    `x` (to the right), `y` (up), `z` (the wheel, towards the user) are what it has moved and nobody was told;
    `buttons` are down (left, right, middle, fourth, fifth, from bit 0 on), and `told` those that the guest knows of."""

    STATE = MouseState

    def reset(self) -> None:
        super().reset()
        self.x = self.y = self.z = 0
        self.buttons = self.told = 0
        self.id = 0
        self.wrap = 0
        self.knock = 0  # the last three sample rates

    def defaults(self) -> None:
        self.rate, self.resolution, self.scaling, self.remote = 100, 2, 0, 0
        self.enabled = 0

    def move(self, x: int, y: int, z: int, buttons: int) -> None:
        """So far, and these buttons are down now."""
        self.x, self.y, self.z = (
            max(-MOVED_MOST, min(MOVED_MOST, was + by))
            for was, by in zip((self.x, self.y, self.z), (x, y, z), strict=True)
        )
        if self.buttons != self.told and buttons != self.buttons:
            self.report()  # a click is told, however short it was
        self.buttons = buttons & 31

    @property
    def has_more(self) -> bool:
        """It has not told everything, or the guest has not taken it."""
        return bool(self.queue or self.x or self.y or self.z and self.id or self.buttons != self.told)

    def report(self) -> None:
        """In stream mode: put what is to be told into the queue, when that is empty; a button also when it is not."""
        if not self.enabled or self.remote or self.wrap:
            self.x = self.y = self.z = 0
            self.told = self.buttons
        elif not self.queue and (self.buttons != self.told or self.x or self.y or self.z and self.id):
            self.send(*self._packet(scaled=bool(self.scaling)))
        elif self.buttons != self.told and len(self.queue) <= REPLIES - 4:
            self.send(*self._packet(scaled=bool(self.scaling)))

    def _packet(self, *, scaled: bool = False) -> tuple[int, ...]:
        x, y = (max(-255, min(255, way)) for way in (self.x, self.y))
        z = max(-8, min(7, self.z))
        self.x, self.y, self.z, self.told = self.x - x, self.y - y, self.z - z if self.id else 0, self.buttons
        if scaled:
            x, y = (max(-255, min(255, _scaled(way))) for way in (x, y))
        head = 0x08 | self.buttons & 7 | (x < 0) << 4 | (y < 0) << 5
        last = {0: (), 3: (z & 0xFF,), 4: (z & 0xF | (self.buttons & 0x18) << 1,)}[self.id]
        return head, x & 0xFF, y & 0xFF, *last

    def write(self, byte: int) -> None:
        command, self.command = self.command, 0
        if self.wrap and byte not in (0xEC, 0xFF):
            self.send(byte)
            return
        if command == 0xF3:
            self._set_rate(byte)
            return
        if command == 0xE8:
            self.resolution = byte & 3
            self.send(ACK)
            return
        match byte:
            case 0xE6 | 0xE7:
                self.scaling = byte & 1
                self.send(ACK)
            case 0xE8 | 0xF3:
                self.command = byte
                self.send(ACK)
            case 0xE9:
                left, right, middle = (self.buttons >> bit & 1 for bit in range(3))
                status = self.remote << 6 | self.enabled << 5 | self.scaling << 4 | left << 2 | middle << 1 | right
                self.send(ACK, status, self.resolution, self.rate)
            case 0xEA | 0xF0:
                self.remote = int(byte == 0xF0)
                self.send(ACK)
            case 0xEB:  # Read Data
                self.send(ACK, *self._packet())
            case 0xEC | 0xEE:
                self.wrap = int(byte == 0xEE)
                self.send(ACK)
            case 0xF2:
                self.send(ACK, self.id)
            case 0xF4 | 0xF5:
                self.enabled = int(byte == 0xF4)
                self.send(ACK)
            case 0xF6:
                self.defaults()
                self.send(ACK)
            case 0xFE:
                self.send(self.last)
            case 0xFF:
                self.reset()
                self.send(ACK, SELF_TEST_PASSED, 0)
            case _:
                self.send(RESEND)

    def _set_rate(self, byte: int) -> None:
        self.rate = byte
        self.knock = (self.knock << 8 | byte) & 0xFF_FFFF
        if self.knock == 200 << 16 | 100 << 8 | 80:
            self.id = 3
        elif self.knock == 200 << 16 | 200 << 8 | 80 and self.id == 3:
            self.id = 4
        self.send(ACK)


def _scaled(way: int) -> int:
    """2:1, for those who move it fast."""
    small = (0, 1, 1, 3, 6, 9)
    return 2 * way if abs(way) > 5 else small[abs(way)] * (-1 if way < 0 else 1)
