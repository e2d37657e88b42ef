"""A keyboard and a tablet, of the class of human interface devices.

What is typed and moved is a queue of reports, which the guest takes one by one at its endpoint, the next no sooner than
the interval after the one before. A report comes when something has changed; the idle rate is kept, and repeats none.

Source: Device Class Definition for HID 1.11; HID Usage Tables 1.12.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, TypeVar

import msgspec

from vmfs.devices.device import U8, U64, Port
from vmfs.devices.keys import KEYS, codes
from vmfs.devices.moves import Move
from vmfs.devices.timers import Timer
from vmfs.devices.usb.device import FULL, INTERRUPT, Endpoint, Setup, Stall, UsbDevice, UsbState, scatter
from vmfs.words.errors import Invalid

REPORTS_MOST = 1 << 17
PLACES = 0x8000  # of a tablet, each way
_HID, _REPORT = 0x21, 0x22
_ENDPOINT = 0x81
_MILLISECOND = 1_000_000

Report = Annotated[bytes, msgspec.Meta(min_length=6, max_length=8)]


class HidState(UsbState):
    """`reports`: those that wait; `last`: the one that was taken last; `next_report`: until when none is given."""

    protocol: Annotated[int, msgspec.Meta(ge=0, le=1)]
    idle: U8
    reports: Annotated[tuple[Report, ...], msgspec.Meta(max_length=REPORTS_MOST)]
    last: Report
    next_report: U64 | None


S = TypeVar("S", bound=HidState)


class Hid(UsbDevice[S]):
    SPEED = FULL
    SIZE: int  # of a report
    DESCRIPTOR: bytes
    INTERVAL: int  # milliseconds

    def __init__(self, board: Port, name: str) -> None:
        super().__init__(board, name)
        self.reports: deque[bytes] = deque()
        self._timer: Timer | None = None
        self.bus_reset()

    def bus_reset(self) -> None:
        super().bus_reset()
        self.reports.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.protocol, self.idle = 1, 0
        self.last = bytes(self.SIZE)

    def put(self, report: bytes) -> None:
        if len(self.reports) < REPORTS_MOST:
            self.reports.append(report)
            self.ready(_ENDPOINT)

    def transfer(self, endpoint: int, views: list[memoryview]) -> int | None:
        if endpoint != _ENDPOINT:
            raise Stall
        if not self.reports or self._timer is not None:
            return None
        self.last = self.reports.popleft()
        self.counters["reports"] += 1
        self._timer = self.board.schedule(self.board.now() + self.INTERVAL * _MILLISECOND, self._interval_over)
        return scatter(self.last, views)

    def _interval_over(self) -> None:
        self._timer = None
        if self.reports:
            self.ready(_ENDPOINT)

    def between(self) -> bytes:
        return struct.pack("<BBHBBBH", 9, _HID, 0x0111, 0, 1, _REPORT, len(self.DESCRIPTOR))

    def descriptor_of_interface(self, setup: Setup) -> bytes:
        if setup.value == _REPORT << 8:
            return self.DESCRIPTOR
        if setup.value == _HID << 8:
            return self.between()
        raise Stall

    def request(self, setup: Setup, data: bytes) -> bytes:
        match setup.kind, setup.request:
            case 0xA1, 0x01 if setup.value >> 8 == 1:  # GET_REPORT, of input
                return self.last[: setup.length]
            case 0xA1, 0x02:
                return bytes((self.idle,))[: setup.length]
            case 0xA1, 0x03 if self.INTERFACE[1]:
                return bytes((self.protocol,))[: setup.length]
            case 0x21, 0x09 if setup.value >> 8 == 2 and len(data) == 1:  # SET_REPORT, of output
                self.lit(data[0])
            case 0x21, 0x0A:
                self.idle = setup.value >> 8
            case 0x21, 0x0B if self.INTERFACE[1] and setup.value <= 1:
                self.protocol = setup.value
            case _:
                raise Stall
        return b""

    def lit(self, lights: int) -> None:
        raise Stall

    # ---- life

    def save_hid(self) -> dict[str, object]:
        return {
            **self.save_usb(), "protocol": self.protocol, "idle": self.idle, "reports": tuple(self.reports),
            "last": self.last, "next_report": self._timer.when if self._timer is not None else None,
        }  # fmt: skip

    def load_hid(self, state: S) -> None:
        self.load_usb(state)
        self.protocol, self.idle, self.last = state.protocol, state.idle, state.last
        self.reports = deque(state.reports)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if state.next_report is None else self.board.schedule(state.next_report, self._interval_over)

    def check(self, state: S) -> None:
        if any(len(one) != self.SIZE for one in (state.last, *state.reports)):
            raise Invalid(f"{self.name}: its reports have {self.SIZE} bytes")

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "waiting": str(len(self.reports))}


# ---- the keyboard

_MODIFIERS = "ctrl", "shift", "alt", "win", "rctrl", "rshift", "ralt", "rwin"  # E0 to E7
_FIRST_MODIFIER = 0xE0
_ROWS = (
    (0x04, "a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2 3 4 5 6 7 8 9 0 enter esc backspace tab space"),
    (0x2D, "minus equal leftbracket rightbracket backslash"),
    (0x33, "semicolon apostrophe grave comma dot slash capslock f1 f2 f3 f4 f5 f6 f7 f8 f9 f10 f11 f12"),
    (0x46, "print scrolllock pause ins home pgup del end pgdn right left down up numlock kpslash kpasterisk kpminus"),
    (0x57, "kpplus kpenter kp1 kp2 kp3 kp4 kp5 kp6 kp7 kp8 kp9 kp0 kpdot lessgreater menu"),
    (_FIRST_MODIFIER, " ".join(_MODIFIERS)),
)
USAGES: Mapping[str, int] = {name: first + at for first, names in _ROWS for at, name in enumerate(names.split())}
# What a PS/2 keyboard sends of a key -> its usage, and whether it goes down.
_OF_CODES: Mapping[bytes, tuple[int, bool]] = {
    code: (USAGES[name], down) for name in KEYS for down in (True, False) if (code := codes(name, down))
}
_PAUSE = USAGES["pause"]
_KEYS, _ROLL_OVER = 6, 1


class KeyboardState(HidState):
    """`pressed`: usages of what is down at the end of the queue, in the order in which it went down."""

    leds: U8
    pressed: Annotated[tuple[U8, ...], msgspec.Meta(max_length=256)]


class UsbKeyboard(Hid[KeyboardState]):
    """A boot keyboard of six keys and modifiers; its boot report is its report."""

    TYPE = "usb-keyboard"
    STATE = KeyboardState
    PRODUCT, TITLE = 0x0001, "keyboard"
    INTERFACE = 3, 1, 1
    INTERVAL, SIZE = 8, 8
    ENDPOINTS = (Endpoint(_ENDPOINT, INTERRUPT, SIZE, INTERVAL),)
    # Modifiers, a byte of nothing, five lights, six keys of 0 to 101.
    DESCRIPTOR = bytes.fromhex(
        "0501 0906 a101 0507 19e0 29e7 1500 2501 7501 9508 8102 9501 7508 8101"
        "0508 1901 2905 9505 7501 9102 9501 7503 9101 0507 1900 2965 1500 2565 9506 7508 8100 c0"
    )

    def bus_reset(self) -> None:
        super().bus_reset()
        self.leds = 0
        self.pressed: list[int] = []

    def type(self, strokes: Iterable[bytes]) -> None:
        """What a PS/2 keyboard sends in set 2, a piece a key."""
        for stroke in strokes:
            usage, down = _OF_CODES.get(stroke, (0, False))
            if not usage:
                continue
            if usage in self.pressed:
                self.pressed.remove(usage)
            if down:
                self.pressed.append(usage)
            self.put(self._report())
            if usage == _PAUSE:  # says nothing when it is released
                self.pressed.remove(usage)
                self.put(self._report())

    def _report(self) -> bytes:
        modifiers = sum(1 << usage - _FIRST_MODIFIER for usage in self.pressed if usage >= _FIRST_MODIFIER)
        keys = [usage for usage in self.pressed if usage < _FIRST_MODIFIER]
        if len(keys) > _KEYS:
            keys = [_ROLL_OVER] * _KEYS
        return bytes((modifiers, 0, *keys)).ljust(self.SIZE, b"\0")

    def lit(self, lights: int) -> None:
        self.leds = lights & 0x1F

    @property
    def ps2_leds(self) -> int:
        """As a PS/2 keyboard has them: scroll, num, caps."""
        return self.leds >> 2 & 1 | self.leds << 1 & 2 | self.leds << 1 & 4

    def save(self) -> KeyboardState:
        return KeyboardState(**self.save_hid(), leds=self.leds, pressed=tuple(self.pressed))

    def check(self, state: KeyboardState) -> None:
        super().check(state)
        known = set(USAGES.values())
        if len(set(state.pressed)) != len(state.pressed) or not known.issuperset(state.pressed):
            raise Invalid(f"{self.name}: there are no such keys")

    def load(self, state: KeyboardState) -> None:
        self.load_hid(state)
        self.leds, self.pressed = state.leds, list(state.pressed)

    def describe(self) -> dict[str, str]:
        names = [name for bit, name in enumerate(("numlock", "capslock", "scrolllock")) if self.leds >> bit & 1]
        return {**super().describe(), "leds": " ".join(names) or "none"}


# ---- the tablet


class TabletState(HidState):
    """Where it points, and the buttons that are down, at the end of the queue."""

    x: Annotated[int, msgspec.Meta(ge=0, lt=PLACES)]
    y: Annotated[int, msgspec.Meta(ge=0, lt=PLACES)]
    buttons: Annotated[int, msgspec.Meta(ge=0, lt=32)]


class UsbTablet(Hid[TabletState]):
    """An absolute pointer with five buttons and a wheel. `screen`: how wide and high the screen is."""

    TYPE = "usb-tablet"
    STATE = TabletState
    PRODUCT, TITLE = 0x0002, "tablet"
    INTERFACE = 3, 0, 0
    INTERVAL, SIZE = 4, 6
    ENDPOINTS = (Endpoint(_ENDPOINT, INTERRUPT, SIZE, INTERVAL),)
    # Five buttons, x and y of 0 to 7FFF, a wheel of -127 to 127.
    DESCRIPTOR = bytes.fromhex(
        "0501 0902 a101 0901 a100 0509 1901 2905 1500 2501 9505 7501 8102 9501 7503 8101"
        "0501 0930 0931 1500 26ff7f 3500 46ff7f 7510 9502 8102 0938 1581 257f 3500 4500 7508 9501 8106 c0 c0"
    )

    def __init__(self, board: Port, name: str, screen: Callable[[], tuple[int, int]]) -> None:
        super().__init__(board, name)
        self._screen = screen

    def bus_reset(self) -> None:
        super().bus_reset()
        self.x = self.y = self.buttons = 0

    def point(self, x: int, y: int, wheel: int, buttons: int) -> None:
        """To a place of PLACES each way. A way that the guest has not taken yet is forgotten for where it leads."""
        is_way = buttons == self.buttons and not wheel
        self.x, self.y, self.buttons = max(0, min(PLACES - 1, x)), max(0, min(PLACES - 1, y)), buttons & 31
        if is_way and self.reports and self.reports[-1][0] == self.buttons and not self.reports[-1][5]:
            self.reports.pop()
        self.put(self._report(wheel))

    def move(self, moves: Iterable[Move]) -> None:
        for x, y, wheel, button, down, is_place in moves:
            width, height = self._screen()
            if is_place:
                self.x, self.y = _scaled(x, width), _scaled(y, height)
            else:
                self.x, self.y = (
                    max(0, min(PLACES - 1, at + by * PLACES // max(size, 1)))
                    for at, by, size in ((self.x, x, width), (self.y, y, height))
                )
            self.buttons = self.buttons | button if down else self.buttons & ~button
            self.put(self._report(wheel))

    def _report(self, wheel: int) -> bytes:
        """A HID wheel counts away from the user."""
        return struct.pack("<BHHb", self.buttons, self.x, self.y, max(-127, min(127, -wheel)))

    def save(self) -> TabletState:
        return TabletState(**self.save_hid(), x=self.x, y=self.y, buttons=self.buttons)

    def load(self, state: TabletState) -> None:
        self.load_hid(state)
        self.x, self.y, self.buttons = state.x, state.y, state.buttons


def _scaled(pixel: int, size: int) -> int:
    """The middle of a pixel."""
    return max(0, min(PLACES - 1, (2 * pixel + 1) * PLACES // (2 * max(size, 1))))
