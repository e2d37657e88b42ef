"""i8042: the keyboard controller at ports 60 and 64, with a keyboard and a mouse, and the fast gate at port 92.

What is typed by the host waits here and goes to the keyboard key by key: the next no sooner than KEY_TIME after
the guest took the one before, so that a BIOS, whose buffer has 15 keys, loses none.

The A20 gate works where the engine has one (the emulator); with KVM address bit 20 is always on.

Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller"; the names are those
of Linux include/linux/i8042.h.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sized
from typing import Annotated, Protocol, TypeVar

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U8, DeviceState, Port, QuietDevice, Window
from vmfs.devices.keys import Chord, chord_codes, codes, translated
from vmfs.devices.moves import Move
from vmfs.devices.ps2 import MOVED_MOST, Keyboard, KeyboardState, Mouse, MouseState
from vmfs.devices.timers import Timer
from vmfs.words.errors import Invalid, Unsupported, WouldBlock

DATA, COMMAND, FAST_GATE = 0x60, 0x64, 0x92
KEYBOARD_IRQ, MOUSE_IRQ = 1, 12
KEY_TIME = 5_000_000  # ns
TYPED_MOST = 1 << 17  # strokes that wait for the guest
MOVES_MOST = 1 << 12  # moves of the mouse that wait

_OUTPUT_FULL, _SYSTEM, _COMMAND_LAST, _UNLOCKED, _FROM_MOUSE = 0x01, 0x04, 0x08, 0x10, 0x20  # status
# The command byte. Firmware leaves it so: both interrupts on, self-test passed, codes translated to set 1.
_KEYBOARD_INT, _MOUSE_INT, _KEYBOARD_OFF, _MOUSE_OFF, _TRANSLATE = 0x01, 0x02, 0x10, 0x20, 0x40
_FIRST_CONTROL = _KEYBOARD_INT | _MOUSE_INT | 0x04 | _TRANSLATE
_RESET_LINE, _A20 = 0x01, 0x02  # the output port; the reset line is active low
_REPLIES = 16


class I8042State(DeviceState):
    """`replies`: the controller's bytes that wait, and whether as if from the mouse. `typed`: codes of set 2 that wait,
    a piece a key; `next_key`: when the next one is due. `moves`: what the mouse is still to do."""

    control: U8
    ram: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    output_port: U8
    a20: bool
    fast_gate: U8
    command: U8
    command_last: bool
    replies: Annotated[tuple[tuple[U8, bool], ...], msgspec.Meta(max_length=_REPLIES)]
    buffer: U8 | None
    from_mouse: bool
    last: U8
    half: U8
    keyboard: KeyboardState
    mouse: MouseState
    typed: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=TYPED_MOST)]
    next_key: int | None
    moves: Annotated[tuple[Move, ...], msgspec.Meta(max_length=MOVES_MOST)] = ()


# Of an input "strokes", of one "moves", and of one "mouse".
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(tuple[bytes, ...]).decode
_unpack_moves = msgspec.msgpack.Decoder(tuple[Move, ...]).decode
_MOVE = struct.Struct("<hhbB")
_PLACE = struct.Struct("<HHbB")  # of one "place"


class OtherKeyboard(Protocol):
    """One that has what is typed while the guest drives it."""

    @property
    def is_configured(self) -> bool: ...
    @property
    def reports(self) -> Sized: ...
    @property
    def ps2_leds(self) -> int: ...
    def type(self, strokes: Iterable[bytes]) -> None: ...


class Tablet(Protocol):
    """What is moved instead of the mouse while the guest drives it."""

    @property
    def is_configured(self) -> bool: ...
    @property
    def reports(self) -> Sized: ...
    def point(self, x: int, y: int, wheel: int, buttons: int) -> None: ...
    def move(self, moves: Iterable[Move]) -> None: ...


_T = TypeVar("_T", OtherKeyboard, Tablet)


def _driven(devices: list[_T]) -> _T | None:
    return next((one for one in devices if one.is_configured), None)


class I8042(QuietDevice[I8042State]):
    """Regions 0, 1, 2: ports 60, 64, 92."""

    TYPE = "i8042"
    INPUTS = ("strokes", "moves", "mouse", "place")
    STATE = I8042State
    irq = KEYBOARD_IRQ

    def __init__(self, board: Port, name: str) -> None:
        super().__init__(board, name)
        self.keyboard, self.mouse = Keyboard(), Mouse()
        self.typed: deque[bytes] = deque()  # codes of set 2, a piece a key
        self._timer: Timer | None = None
        self.moves: deque[Move] = deque()
        self.keyboards: list[OtherKeyboard] = []
        self.tablets: list[Tablet] = []
        self._a20 = True
        self.chip = _chips.Latch(board.bus, self.number)
        self._clear()
        self._show()

    def windows(self) -> tuple[Window, ...]:
        return tuple(Window("port", port, 1, region) for region, port in enumerate((DATA, COMMAND, FAST_GATE)))

    def _clear(self) -> None:
        self.control = _FIRST_CONTROL
        self.ram = bytearray(32)
        self.output_port = 0xCC | _RESET_LINE | _A20
        self.fast_gate = 0  # port 92, but for A20: its other bits are kept, and do nothing
        self.command = 0  # the one whose argument comes next at port 60
        self.command_last = False
        self.replies: deque[tuple[int, bool]] = deque()  # the controller's, and whether as if from the mouse
        self.buffer: int | None = None
        self.from_mouse = False
        self.last = 0  # what port 60 reads as when the buffer is empty
        self._half = 0  # bit 7 of the next code: F0 came before

    # ---- ports

    def read(self, region: int, offset: int, size: int) -> int:
        if region == 0:
            return self._read_data()
        return self._status() if region == 1 else self._gate()

    def _status(self) -> int:
        return (
            (_OUTPUT_FULL if self.buffer is not None else 0)
            | (self.control & _SYSTEM)
            | (_COMMAND_LAST if self.command_last else 0)
            | _UNLOCKED
            | (_FROM_MOUSE if self.buffer is not None and self.from_mouse else 0)
        )

    def _gate(self) -> int:
        return self.fast_gate | (_A20 if self._a20 else 0)

    def _show(self) -> None:
        """What reads get that change nothing."""
        self.chip.show((self.last if self.buffer is None else None, self._status(), self._gate()))

    def _read_data(self) -> int:
        if self.buffer is None:
            return self.last
        self.last, self.buffer = self.buffer, None
        self._lines()  # low, so that the next byte is an edge
        self._fill()
        if self.typed:
            self._type_later()
        return self.last

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if region == 0:
            self.command_last = False
            self._write_data(value)
        elif region == 1:
            self.command_last = True
            self._write_command(value)
        else:
            self._set_a20(bool(value & _A20))
            self.fast_gate = value & ~_A20 & ~1
            if value & 1:
                self.board.stop("reset")
        self._fill()

    def _write_command(self, value: int) -> None:
        self.command = 0
        if value & 0xE0 == 0x20:  # 20-3F
            self._reply(self.control if value == 0x20 else self.ram[value & 31])
            return
        if value & 0xE0 == 0x60 or 0xD1 <= value <= 0xD4:
            self.command = value
            return
        if value >= 0xF0:  # lines of the output port are pulsed low, where the bit is 0
            if not value & _RESET_LINE:
                self.board.stop("reset")
            return
        match value:
            case 0xA4:
                self._reply(0xF1)  # there is no password
            case 0xA7 | 0xA8:
                self._set_control(self.control & ~_MOUSE_OFF | (_MOUSE_OFF if value == 0xA7 else 0))
            case 0xA9 | 0xAB:  # tests of the interfaces
                self._reply(0)
            case 0xAA:
                self._set_control(self.control | _SYSTEM)
                self._reply(0x55)
            case 0xAD | 0xAE:
                self._set_control(self.control & ~_KEYBOARD_OFF | (_KEYBOARD_OFF if value == 0xAD else 0))
            case 0xC0:
                self._reply(0x80)  # the keyboard is not locked
            case 0xD0:
                port = self.output_port & ~_A20 | (_A20 if self._a20 else 0)
                full = self.buffer is not None
                self._reply(port | (0x20 if full and self.from_mouse else 0x10 if full else 0))
            case 0xDD | 0xDF:
                self._set_a20(value == 0xDF)

    def _write_data(self, value: int) -> None:
        command, self.command = self.command, 0
        if command == 0x60:
            self._set_control(value)
        elif command & 0xE0 == 0x60:
            self.ram[command & 31] = value
        elif command == 0xD1:
            self.output_port = value & ~0x30
            self._set_a20(bool(value & _A20))
            if not value & _RESET_LINE:
                self.board.stop("reset")
        elif command == 0xD2:
            self._reply(value)
        elif command == 0xD3:
            self._reply(value, from_mouse=True)
        elif command == 0xD4:
            self.control &= ~_MOUSE_OFF
            self.mouse.write(value)
        else:
            self.control &= ~_KEYBOARD_OFF
            self.keyboard.write(value)
            if self.typed:  # it may have been switched on
                self._type_later()

    def _set_control(self, value: int) -> None:
        self.control = value
        self._lines()

    def _set_a20(self, on: bool) -> None:
        if on == self._a20:
            return
        try:
            self.board.set_a20(on)
            self._a20 = on
        except Unsupported:
            self.counters["a20_stays_on"] += 1

    # ---- the output buffer

    def _reply(self, value: int, *, from_mouse: bool = False) -> None:
        if len(self.replies) < _REPLIES:
            self.replies.append((value, from_mouse))

    def _fill(self) -> None:
        """Take the next byte, when the guest has read the last."""
        while self.buffer is None:
            if self.replies:
                self.buffer, self.from_mouse = self.replies.popleft()
            elif self.keyboard.queue and not self.control & _KEYBOARD_OFF:
                self._take_code(self.keyboard.take())
            elif self.mouse.queue and not self.control & _MOUSE_OFF:
                self.buffer, self.from_mouse = self.mouse.take(), True
                self._move_next()
            else:
                break
        self._lines()

    def _take_code(self, byte: int) -> None:
        if self.control & _TRANSLATE:
            if byte == 0xF0:
                self._half = 0x80
                return
            byte = translated(bytes((byte,)))[0] | self._half if byte < 0xE0 else byte
        self._half = 0
        self.buffer, self.from_mouse = byte, False

    def _lines(self) -> None:
        self._show()  # first: a CPU may take the interrupt at once, and must find its byte
        full = self.buffer is not None
        self.board.set_irq(self, KEYBOARD_IRQ, full and not self.from_mouse and bool(self.control & _KEYBOARD_INT))
        self.board.set_irq(self, MOUSE_IRQ, full and self.from_mouse and bool(self.control & _MOUSE_INT))

    # ---- what is typed

    def type(self, chords: Iterable[Chord]) -> None:
        """Press keys and release them, as soon as the guest takes them; from any thread.

        WouldBlock, and nothing was typed, when more wait already than anyone will read.
        """
        self._enter([code for chord in chords for code in chord_codes(chord) if code])

    def press(self, keys: Iterable[tuple[str, bool]]) -> None:
        """Keys by their names go down (True) or up; as `type`."""
        self._enter([code for name, down in keys if (code := codes(name, down))])

    def move_mouse(self, x: int, y: int, wheel: int, buttons: int) -> None:
        """So far to the right, down and towards the user; these buttons are down now: bit 0 left, 1 right, 2 middle,
        3 and 4 those at the side. From any thread."""
        x, y = (max(-MOVED_MOST, min(MOVED_MOST, way)) for way in (x, y))
        wheel = max(-127, min(127, wheel))
        self.board.inputs.enter(self, "mouse", _MOVE.pack(x, -y, wheel, buttons & 31))

    @property
    def has_tablet(self) -> bool:
        """The guest drives one."""
        return _driven(self.tablets) is not None

    @property
    def leds(self) -> int:
        """Of the keyboard that the guest drives: scroll, num, caps."""
        other = _driven(self.keyboards)
        return self.keyboard.leds if other is None else other.ps2_leds

    def point(self, x: int, y: int, wheel: int, buttons: int) -> None:
        """Have a tablet point there, in 32768 parts of the screen each way; the rest as `move_mouse`. From any thread.
        It is lost where the guest drives none."""
        self.board.inputs.enter(self, "place", _PLACE.pack(x & 0x7FFF, y & 0x7FFF, wheel, buttons & 31))

    def move(self, moves: list[Move]) -> None:
        """Move the mouse and press its buttons, each when the guest has been told of the one before; from any thread.

        A guest that has the mouse off loses them, as it does with a mouse of a desk. WouldBlock as `type`.
        """
        with self.board.lock:
            tablet = _driven(self.tablets)
            if tablet is None and any(one.is_place for one in moves):
                raise Unsupported("mouse: only a tablet that the guest drives points to a place (dev/add usb-tablet)")
            waiting = len(self.moves if tablet is None else tablet.reports)
            if waiting + len(moves) > MOVES_MOST:
                raise WouldBlock(f"mouse: {waiting} moves wait; the guest does not take them")
            self.board.inputs.enter(self, "moves", _pack(moves))

    def _enter(self, strokes: list[bytes]) -> None:
        with self.board.lock:
            other = _driven(self.keyboards)
            waiting = len(self.typed if other is None else other.reports)
            if waiting + len(strokes) > TYPED_MOST:
                raise WouldBlock(f"keyboard: {waiting} strokes wait; the guest does not take them")
            self.board.inputs.enter(self, "strokes", _pack(strokes))

    def input(self, kind: str, data: bytes) -> None:
        keyboard, tablet = _driven(self.keyboards), _driven(self.tablets)
        if kind == "place":
            if tablet is not None:
                tablet.point(*_PLACE.unpack(data))
            return
        if kind == "moves" and tablet is not None:
            tablet.move(_unpack_moves(data))
            return
        if kind == "strokes" and keyboard is not None:
            keyboard.type(_unpack(data))
            return
        if kind == "mouse":
            self.mouse.move(*_MOVE.unpack(data))
            self.mouse.report()
            self._fill()
            return
        if kind == "moves":
            self.moves += _unpack_moves(data)[: MOVES_MOST - len(self.moves)]
            self._move_next()
            self._fill()
            return
        strokes = _unpack(data)[: TYPED_MOST - len(self.typed)]
        self.typed += strokes
        self.counters["typed"] += len(strokes)
        self._type_next()

    def check_input(self, kind: str, data: bytes) -> None:
        super().check_input(kind, data)
        if kind in ("mouse", "place"):
            if len(data) != _MOVE.size:
                raise Invalid(f"{self.name}: that is no move of a mouse")
            return
        try:
            (_unpack if kind == "strokes" else _unpack_moves)(data)
        except msgspec.DecodeError:
            raise Invalid(f"{self.name}: these are no {kind}") from None

    def _type_next(self) -> None:
        """With the lock held: a key goes into the keyboard when the one before has left it."""
        if self.typed and self.buffer is None and not self.keyboard.queue and self.keyboard.press(self.typed[0]):
            self.typed.popleft()
            self._fill()

    def _type_later(self) -> None:
        if self._timer is None:
            self._timer = self.board.schedule(self.board.now() + KEY_TIME, self._type_now)

    def _type_now(self) -> None:
        self._timer = None
        self._type_next()

    def _move_next(self) -> None:
        """With the lock held: the mouse says what it has to, and when that is taken, it does what comes next."""
        self.mouse.report()
        while self.moves and not self.mouse.has_more:
            x, y, wheel, button, down, is_place = self.moves.popleft()
            if is_place:  # the tablet has gone meanwhile
                continue
            buttons = self.mouse.buttons
            self.mouse.move(x, -y, wheel, buttons | button if down else buttons & ~button)
            self.mouse.report()

    # ---- life

    def describe(self) -> dict[str, str]:
        leds = self.keyboard.leds
        names = [name for bit, name in enumerate(("scrolllock", "numlock", "capslock")) if leds >> bit & 1]
        return {"leds": " ".join(names) or "none", "waiting": str(len(self.typed)), "a20": "on" if self._a20 else "off"}

    def reset(self) -> None:
        """What was typed or moved and not taken is lost."""
        self.typed.clear()
        self.moves.clear()
        self.keyboard.reset()
        self.mouse.reset()
        self._clear()
        self._set_a20(True)
        self._lines()

    def close_a20(self) -> None:
        """As firmware may leave it."""
        self._set_a20(False)
        self._show()

    def machine_changed(self) -> None:
        if not self._a20:
            self._a20 = True  # as every new machine has it
            self._set_a20(False)
            self._show()

    def save(self) -> I8042State:
        return I8042State(
            control=self.control,
            ram=bytes(self.ram),
            output_port=self.output_port,
            a20=self._a20,
            fast_gate=self.fast_gate,
            command=self.command,
            command_last=self.command_last,
            replies=tuple(self.replies),
            buffer=self.buffer,
            from_mouse=self.from_mouse,
            last=self.last,
            half=self._half,
            keyboard=self.keyboard.save(),
            mouse=self.mouse.save(),
            typed=tuple(self.typed),
            next_key=self._timer.when if self._timer is not None else None,
            moves=tuple(self.moves),
        )

    def load(self, state: I8042State) -> None:
        self.keyboard.load(state.keyboard)
        self.mouse.load(state.mouse)
        for name in ("control", "output_port", "command", "command_last", "last", "fast_gate", "buffer", "from_mouse"):
            setattr(self, name, getattr(state, name))
        self.ram, self._half = bytearray(state.ram), state.half
        self.replies, self.typed, self.moves = deque(state.replies), deque(state.typed), deque(state.moves)
        self._set_a20(state.a20)
        self._lines()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if state.next_key is None else self.board.schedule(state.next_key, self._type_now)
