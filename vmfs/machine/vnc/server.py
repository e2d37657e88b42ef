"""A machine's viewers: connections that speak RFB, several at a time.

Each has two tasks. One reads what the client says, a message after another, and waits for what it does; so a client
that sends more than can be done is not read. The other sends: an update is made only when the client has asked for one
and what was sent before has gone, rectangles of `_BATCH` bytes and one more of at most 64 Ki pixels after another. So a
client holds no more memory than that, however slow it is, and one that takes nothing for `STUCK_SECONDS` is let go.

Sources: as vmfs.machine.vnc.messages.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import math
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.devices.screen import TILE, Picture
from vmfs.devices.usb.hid import PLACES
from vmfs.machine.vnc import des, messages
from vmfs.machine.vnc.encodings import (
    KNOWN,
    ROUGH_PIXELS_MOST,
    Encoder,
    Rectangle,
    as_jpeg,
    bands_of,
    is_photograph,
    jpeg_quality,
    parts_of,
)
from vmfs.machine.vnc.keysyms import Keys
from vmfs.machine.vnc.messages import (
    Decoder,
    KeyEvent,
    PointerEvent,
    SetDesktopSize,
    SetEncodings,
    SetPixelFormat,
    UpdateRequest,
)
from vmfs.machine.vnc.motion import Motion
from vmfs.machine.vnc.screen import News, Screen
from vmfs.words.errors import VmfsError, WouldBlock

log = logging.getLogger(__name__)

CLIENTS_MOST = 16
GREETED_MOST = 32  # connections in their handshake; one more is closed
HANDSHAKE_SECONDS = 10.0
PASSWORD_SECONDS = 60.0  # more, where somebody is asked for the password
STUCK_SECONDS = 30.0
_WRONG_SECONDS = 1.0  # from a wrong password to the next try of anybody
_LAST_SECONDS = 1.0  # to let keys go
_CHUNK = 1 << 14
_SOON = 1 << 12  # pixels that are encoded at once, and not in a thread
_BATCH = 1 << 18  # bytes of rectangles after which they are sent
_WAITING_MOST = 16  # messages of one client that wait to be sent
_STAYS = 0x7FFF  # what a pointer that says how far it went adds to both ways


class Vnc:
    """Those who look at a machine. `scope` is its Contents, `name` what a viewer has for a title."""

    def __init__(self, scope: Any, name: str = "vmfs") -> None:
        self.scope = scope
        self.name = name
        self.password: str | None = None
        self.screen = Screen(
            scope,
            lambda size: scope.budget.hold("vnc", size),
            lambda: any(client.waits for client in self._clients),
        )
        self._clients: set[Client] = set()
        self._greeted = 0  # connections that are no clients yet
        self._keeping: trio.CancelScope | None = None
        self._trying = trio.Lock()

    @property
    def count(self) -> int:
        """Viewers that are connected."""
        return len(self._clients)

    async def serve(self, line: socket.socket) -> None:
        """One client, to its end. Raises nothing but cancellations."""
        line.setblocking(False)
        if line.family != socket.AF_UNIX:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._greeted >= GREETED_MOST:
            return
        client = Client(self, line)
        try:
            with client:
                self._greeted += 1
                try:
                    await client.greet(is_full=len(self._clients) >= CLIENTS_MOST)
                finally:
                    self._greeted -= 1
                self._clients.add(client)
                self._keep()
                await client.serve()
        except (_Ended, OSError, VmfsError, trio.TooSlowError) as error:
            log.debug("vnc: %s", error)
        except Exception:
            log.exception("a viewer's connection failed")
        finally:
            self._clients.discard(client)
            if not self._clients and self._keeping is not None:
                self._keeping.cancel()
                self._keeping = None
                self.screen.forget()
                self.scope.budget.drop("vnc")

    def _keep(self) -> None:
        """Have somebody look at the screen."""
        if self._keeping is None:
            self._keeping = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._look, self._keeping)

    async def _look(self, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await self.screen.keep()
        except Exception:
            log.exception("vnc: looking at the screen failed")

    async def knows(self, password: str, challenge: bytes, answer: bytes) -> bool:
        """Whether it is the answer of a viewer that knows the password. After a wrong one nobody tries for a while."""
        async with self._trying:
            is_right = hmac.compare_digest(des.encrypt(password, challenge), answer)
            if not is_right:
                await trio.sleep(_WRONG_SECONDS)
            return is_right


@dataclass(frozen=True, slots=True)
class _Job:
    """A rectangle that is to be sent: a part of a picture, where it is for the client, and of what quality it may be
    (percent of JPEG; None: as it is)."""

    picture: Picture
    part: Rectangle
    to: Rectangle
    quality: int | None = None


class _Ended(Exception):
    """The connection has."""


class Client:
    """One connection. A context manager, which has the socket."""

    def __init__(self, vnc: Vnc, line: socket.socket) -> None:
        self._vnc = vnc
        self._screen = vnc.screen
        self._line = trio.socket.from_stdlib_socket(line)
        self._format = messages.FORMAT
        self._takes: frozenset[int] = frozenset()  # encodings
        self._encoding = messages.RAW
        self._quality: int | None = None  # of JPEG; None: it takes none
        self._encoder = Encoder()
        self._picture = vnc.screen.picture
        self._motion = Motion()
        self._dirty = bytearray()  # a byte a tile of the picture: the client has it as it was
        self._size = 0, 0  # as the client knows it
        self._black = False  # what of that size the picture does not have is to be sent
        self.waits = False  # it has asked for an update
        self._answers: list[bytes] = []  # messages that are no updates
        self._says: list[bytes] = []  # rectangles that are no pixels
        self._leds = 0
        self._awake = trio.Event()
        self._keys = Keys()
        self._at: tuple[int, int] | None = None  # the pointer
        self._is_relative = False  # it tells ways, not places
        self._buttons = 0
        self._failure: Exception | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._line.close()

    # ---- bytes

    async def _receive(self, count: int) -> bytes:
        """Exactly so many."""
        data = b""
        while len(data) < count:
            more = await self._line.recv(count - len(data))
            if not more:
                raise _Ended("the client has gone")
            data += more
        return data

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            with trio.fail_after(STUCK_SECONDS):
                view = view[await self._line.send(view) :]

    # ---- how it begins

    async def greet(self, *, is_full: bool) -> None:
        """Versions, security, and the size. _Ended where it comes to nothing."""
        with trio.fail_after(HANDSHAKE_SECONDS) as limit:
            await self._agree(is_full, limit)
            await self._receive(1)  # whether it would share: all do
        try:
            await self._screen.look()
        except VmfsError as error:
            self._vnc.scope.complain(f"vnc: {error}")
            raise
        self._take(self._screen.picture)
        self._size = self._screen.size
        self._leds = self._screen.leds
        await self._send(messages.server_init(*self._size, self._vnc.name))

    async def _agree(self, is_full: bool, limit: trio.CancelScope) -> None:
        await self._send(b"RFB 003.008\n")
        said = await self._receive(messages.VERSION_LENGTH)
        if not said.startswith(b"RFB 003."):
            raise _Ended("that is no RFB")
        version = messages.VERSIONS.get(said, (3, 3))  # a number that there is not is taken for the first
        password = self._vnc.password
        kind = messages.NO_AUTHENTICATION if password is None else messages.VNC_AUTHENTICATION
        if is_full:
            none = b"\0" if version > (3, 3) else bytes(4)
            await self._send(none + messages.reason(f"{CLIENTS_MOST} viewers are connected already"))
            raise _Ended("one too many")
        if version == (3, 3):
            await self._send(kind.to_bytes(4, "big"))
        else:
            await self._send(bytes((1, kind)))
            if (await self._receive(1))[0] != kind:
                await self._refuse("that security was not offered", version)
        if password is not None:
            challenge = secrets.token_bytes(messages.CHALLENGE)
            await self._send(challenge)
            limit.deadline += PASSWORD_SECONDS
            answer = await self._receive(messages.CHALLENGE)
            if not await self._vnc.knows(password, challenge, answer):
                await self._refuse("the password is wrong", version)
        if password is not None or version == (3, 8):
            await self._send(bytes(4))

    async def _refuse(self, sentence: str, version: tuple[int, int]) -> None:
        await self._send(b"\0\0\0\1" + (messages.reason(sentence) if version == (3, 8) else b""))
        raise _Ended(sentence)

    # ---- what it says

    async def serve(self) -> None:
        """To its end."""
        self._screen.watchers.add(self._hear)
        try:
            async with trio.open_nursery() as nursery:
                for one in (self._listen, self._tell):
                    nursery.start_soon(self._until_it_fails, one, nursery.cancel_scope)
            if self._failure is not None:
                raise self._failure
        finally:
            self._screen.watchers.discard(self._hear)
            with trio.move_on_after(_LAST_SECONDS, shield=True), contextlib.suppress(VmfsError):
                await self._let_go()

    async def _until_it_fails(self, one: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        """Not through the nursery, which would make a group of the failure."""
        try:
            await one()
        except Exception as error:
            self._failure = self._failure or error
            scope.cancel()

    async def _listen(self) -> None:
        decoder = Decoder()
        while data := await self._line.recv(_CHUNK):
            for event in decoder.feed(data):
                await self._handle(event)
        raise _Ended("the client has gone")

    async def _handle(self, event: messages.Event) -> None:
        match event:
            case UpdateRequest():
                self._ask(event)
            case KeyEvent():
                await self._press(event)
            case PointerEvent():
                await self._point(event)
            case SetPixelFormat():
                self._format = event.format
                if event.format.mapped:
                    self._wait(self._answers, messages.colour_map())
            case SetEncodings():
                self._set_encodings(event.encodings)
            case SetDesktopSize() if messages.EXTENDED_DESKTOP_SIZE in self._takes:
                self._wait(self._says, messages.extended_size(*self._size, 1, messages.PROHIBITED))

    def _ask(self, event: UpdateRequest) -> None:
        """As QEMU does it, an update has all that has changed, wherever that is."""
        self.waits = True
        if not event.incremental:
            _mark(self._dirty, self._picture, event.x, event.y, event.width, event.height)
            self._black = True
        self._screen.want()
        self._awake.set()

    def _wait(self, waiting: list[bytes], what: bytes) -> None:
        if len(waiting) >= _WAITING_MOST:
            raise _Ended("the client asks, and does not listen")
        waiting.append(what)
        self._awake.set()

    def _set_encodings(self, encodings: tuple[int, ...]) -> None:
        new, self._takes = frozenset(encodings) - self._takes, frozenset(encodings)
        self._encoding = next((one for one in encodings if one in KNOWN), messages.RAW)
        self._quality = jpeg_quality(encodings) if self._encoding == messages.TIGHT else None
        self._is_relative = messages.POINTER_MOTION in encodings and not self._screen.board.keyboard.has_tablet
        motion = 0 if self._is_relative else 1
        first = {
            messages.EXTENDED_KEY: messages.rectangle(0, 0, 0, 0, messages.EXTENDED_KEY),
            messages.POINTER_MOTION: messages.rectangle(motion, 0, 0, 0, messages.POINTER_MOTION),
            messages.CURSOR: messages.rectangle(0, 0, 0, 0, messages.CURSOR),  # the guest draws its own
            messages.LED_STATE: self._leds_rectangle(),
            messages.EXTENDED_DESKTOP_SIZE: messages.extended_size(*self._size),
        }
        for encoding, rectangle in first.items():
            if encoding in new:
                self._wait(self._says, rectangle)

    def _leds_rectangle(self) -> bytes:
        return messages.rectangle(0, 0, 0, 0, messages.LED_STATE) + bytes((self._leds,))

    # ---- what it does

    async def _press(self, event: KeyEvent) -> None:
        keyboard = self._screen.board.keyboard
        capitals = bool(keyboard.leds & 4)
        keys = self._keys.event(event.down, event.symbol, event.code, capitals)
        if keys:
            with contextlib.suppress(WouldBlock):  # nobody reads them
                await trio.to_thread.run_sync(keyboard.press, keys)

    async def _point(self, event: PointerEvent) -> None:
        keyboard, is_first = self._screen.board.keyboard, self._at is None
        points = keyboard.has_tablet and not self._is_relative
        if self._is_relative:
            x, y = event.x - _STAYS, event.y - _STAYS
        else:
            was = self._at or (event.x, event.y)
            x, y = event.x - was[0], event.y - was[1]
            self._at = event.x, event.y
        pressed = event.buttons & ~self._buttons
        wheel = (pressed >> 4 & 1) - (pressed >> 3 & 1)
        buttons = event.buttons & 1 | event.buttons >> 1 & 2 | event.buttons << 1 & 4 | event.buttons >> 4 & 8
        changed = (event.buttons ^ self._buttons) & 0x87
        self._buttons = event.buttons
        if not (x or y or wheel or changed or points and is_first):
            return
        if points:
            await trio.to_thread.run_sync(keyboard.point, *self._place(), wheel, buttons)
        else:
            await trio.to_thread.run_sync(keyboard.move_mouse, x, y, wheel, buttons)

    def _place(self) -> tuple[int, ...]:
        """Where the pointer is, for a tablet."""
        places = zip(self._at or (0, 0), self._size, strict=True)
        return tuple(min(PLACES - 1, (2 * at + 1) * PLACES // (2 * max(size, 1))) for at, size in places)

    async def _let_go(self) -> None:
        """What it holds down goes up."""
        keyboard = self._screen.board.keyboard
        keys = self._keys.let_go()
        buttons, self._buttons = self._buttons & 0x87, 0

        def work() -> None:
            if keys:
                keyboard.press(keys)
            if buttons and keyboard.has_tablet and not self._is_relative:
                keyboard.point(*self._place(), 0, 0)
            elif buttons:
                keyboard.move_mouse(0, 0, 0, 0)

        if keys or buttons:
            await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    # ---- what it is told

    def _take(self, picture: Picture) -> None:
        self._picture = picture
        self._dirty = bytearray(b"\1" * (picture.across * picture.down))
        self._motion = Motion()
        self._black = True

    def _hear(self, news: News) -> None:
        if news.picture is not self._picture:
            self._take(news.picture)
        elif news.changed:
            self._dirty = self._tiles(_set(self._dirty) | _set(news.changed))
        if self._screen.leds != self._leds:
            self._leds = self._screen.leds
            if messages.LED_STATE in self._takes and len(self._says) < _WAITING_MOST:
                self._says.append(self._leds_rectangle())
        self._awake.set()

    async def _tell(self) -> None:
        """Until the client has gone: what it has said before that is still to be heard, and `_listen` finds its end."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                with trio.move_on_after(self._motion.rests_in(trio.current_time()) if self.waits else math.inf):
                    await self._awake.wait()
                self._awake = trio.Event()
                answers, self._answers = self._answers, []
                for answer in answers:
                    await self._send(answer)
                if self.waits:
                    await self._update()
        self.waits = False

    async def _update(self) -> None:
        """One, if there is something to say."""
        picture, encoding, format = self._picture, self._encoding, self._format
        if (picture.width, picture.height) != self._size and self._can_resize:
            self._size = picture.width, picture.height
            self.waits = False
            await self._send(messages.update_header(1) + self._resized())
            return
        within = 0, 0, min(picture.width, self._size[0]), min(picture.height, self._size[1])
        motion, quality = self._motion, self._quality
        still, moves = self._split(picture, format)
        jobs = [_Job(picture, part, part) for part in parts_of(picture, still, within)]
        if self._black:
            outside = self._outside(*within[2:])
            nothing = {part[2:]: Picture(*part[2:]) for part in outside}
            jobs += [_Job(nothing[part[2:]], (0, 0, *part[2:]), part) for part in outside]
        rough = parts_of(picture, moves, within, ROUGH_PIXELS_MOST)
        says, self._says = self._says, []
        self._dirty = bytearray(len(self._dirty))
        if not jobs and not rough and not says:
            return
        self.waits = self._black = False
        photographs: list[Rectangle] = []

        def begin() -> bytes:
            for part in rough:
                if is_photograph(picture, part):
                    photographs.append(part)
                    jobs.append(_Job(picture, part, part, quality))
                else:
                    jobs.extend(_Job(picture, band, band) for band in bands_of(part))
            # From the top, as readers read; vncdotool takes the first one that it gets for the upper left corner.
            jobs.sort(key=lambda job: (job.to[1], job.to[0]), reverse=True)
            head = messages.update_header(len(jobs) + len(says)) + b"".join(says)
            return head + self._encode(jobs, encoding, format)

        if rough or sum(job.to[2] * job.to[3] for job in jobs) > _SOON:
            data = await trio.to_thread.run_sync(begin)
        else:
            data = begin()
        for part in photographs:
            tiles = bytearray(picture.across * picture.down)
            _mark(tiles, picture, *part)
            motion.sent_roughly(_set(tiles))
        await self._send(data)
        while jobs:
            await self._send(await trio.to_thread.run_sync(self._encode, jobs, encoding, format))

    def _encode(self, jobs: list[_Job], encoding: int, format: messages.PixelFormat) -> bytes:
        """The next rectangles, taken from the end of `jobs`."""
        done, size = [], 0
        while jobs and size < _BATCH:
            job = jobs.pop()
            if job.quality is None:
                data = self._encoder.encode(encoding, job.picture, job.part, format)
            else:
                data = as_jpeg(job.picture, job.part, job.quality)
            done += [messages.rectangle(*job.to, encoding), data]
            size += len(data)
        return b"".join(done)

    def _split(self, picture: Picture, format: messages.PixelFormat) -> tuple[bytearray, bytearray]:
        """Tiles that are sent as they are, and those that move."""
        if self._quality is None or not format.takes_jpeg:
            return self._dirty, bytearray()
        still, moves = self._motion.split(_set(self._dirty), trio.current_time())
        return self._tiles(still), self._tiles(moves)

    def _tiles(self, set_: int) -> bytearray:
        return bytearray(set_.to_bytes(len(self._dirty), "little"))

    @property
    def _can_resize(self) -> bool:
        return messages.DESKTOP_SIZE in self._takes or messages.EXTENDED_DESKTOP_SIZE in self._takes

    def _resized(self) -> bytes:
        if messages.EXTENDED_DESKTOP_SIZE in self._takes:
            return messages.extended_size(*self._size)
        return messages.rectangle(0, 0, *self._size, messages.DESKTOP_SIZE)

    def _outside(self, width: int, height: int) -> list[Rectangle]:
        """What a client whose size stays has beyond a smaller picture."""
        right, bottom = self._size
        strips = [(width, 0, right - width, height), (0, height, right, bottom - height)]
        return [
            (x, y + at, across, min(TILE, down - at))
            for x, y, across, down in strips if across > 0
            for at in range(0, down, TILE)
        ]  # fmt: skip


def _mark(tiles: bytearray, picture: Picture, x: int, y: int, width: int, height: int) -> None:
    """Those of a part of the picture become 1."""
    left, right = x // TILE, min(-(-(x + width) // TILE), picture.across)
    for row in range(y // TILE, min(-(-(y + height) // TILE), picture.down)):
        if left < right:
            tiles[row * picture.across + left : row * picture.across + right] = b"\1" * (right - left)


def _set(tiles: bytearray) -> int:
    """As vmfs.machine.vnc.motion has it."""
    return int.from_bytes(tiles, "little")
