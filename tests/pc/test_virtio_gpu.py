"""virtio-gpu, by a driver in Python, and by Linux's."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from devices.fakes import FakeMachine
from pc.virtio_driver import SIZE, Bench, Driver

from vmfs.devices import screen
from vmfs.devices.machine import Pc
from vmfs.devices.screen import Picture
from vmfs.devices.virtio import gpu
from vmfs.devices.virtio.edid import edid
from vmfs.devices.virtio.gpu import Gpu
from vmfs.machine.attach import gpu_size
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid, LimitReached


class Room:
    """Of so many bytes."""

    def __init__(self, size: int) -> None:
        self.left = size

    def reserve(self, size: int) -> None:
        if size > self.left:
            raise LimitReached("no room")
        self.left -= size

    def release(self, size: int) -> None:
        self.left += size


class Card:
    def __init__(self, room: int = 1 << 20) -> None:
        self.bench, self.room = Bench(), Room(room)
        self.device = Gpu(self.bench.board, "gpu0", 4, self.room, (640, 480))
        self.driver: Driver = self.bench.plug(self.device)
        self.driver.start()

    def ask(
        self, kind: int, body: bytes = b"", queue: int = 0, room: int = 1100, fence: int | None = None
    ) -> tuple[int, bytes]:
        """The answer's code and what comes with it."""
        head = struct.pack("<IIQI4x", kind, fence is not None, fence or 0, 0)
        (answer,), length = self.driver.request([head, body], [room], queue=queue)
        code, flags, number = struct.unpack_from("<IIQ", answer)
        assert (flags, number) == ((1, fence) if fence is not None else (0, 0))
        return code, answer[24:length]

    def do(self, kind: int, *words: int, queue: int = 0, code: int = gpu.OK_NODATA) -> None:
        self.driver.next = max(self.driver.next, 0x4_0000) if self.driver.next < SIZE // 2 else 0x4_0000
        assert self.ask(kind, struct.pack(f"<{len(words)}I", *(word & 0xFFFF_FFFF for word in words)), queue)[0] == code

    def resource(self, number: int, width: int, height: int, kind: int = 2, at: int = 0x10_0000) -> None:
        """Backed by two pieces of RAM, the second one before the first."""
        self.do(gpu.CREATE_2D, number, kind, width, height)
        size = 4 * width * height
        first = size // 3
        self.do(gpu.ATTACH, number, 2, at + size, 0, first, 0, at, 0, size - first, 0)
        self.at, self.first, self.size = at, first, size

    def back(self, pixels: bytes) -> None:
        self.bench.memory.write(self.at + self.size, pixels[: self.first])
        self.bench.memory.write(self.at, pixels[self.first :])

    def close(self) -> None:
        self.bench.close()


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card()
    yield card
    card.close()


def random_pixels(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(4 * count)


def test_what_a_driver_finds(card: Card) -> None:
    assert [card.driver.read(4, at, 4) for at in (0, 4, 8, 12)] == [0, 0, 1, 0]
    code, data = card.ask(gpu.GET_DISPLAY_INFO, fence=77)
    assert code == gpu.OK_DISPLAY_INFO and len(data) == 16 * 24
    assert struct.unpack("<6I", data[:24]) == (0, 0, 640, 480, 1, 0) and not any(data[24:])
    code, data = card.ask(gpu.GET_EDID, struct.pack("<II", 0, 0))
    assert code == gpu.OK_EDID and data[:8] == struct.pack("<II", 128, 0) and data[8:136] == edid(640, 480)
    card.do(gpu.GET_EDID, 1, 0, code=gpu.ERR_SCANOUT)


@pytest.mark.parametrize("size", [(640, 480), (1024, 768), (1920, 1080), (3840, 2160), (4095, 4095), (64, 64)])
def test_what_the_monitor_says(size: tuple[int, int]) -> None:
    block = edid(*size)
    assert len(block) == 128 and sum(block) % 256 == 0 and block[:8] == b"\0\xff\xff\xff\xff\xff\xff\0"
    timing = block[54:72]
    assert (timing[2] | timing[4] >> 4 << 8, timing[5] | timing[7] >> 4 << 8) == size
    blanks = timing[3] | (timing[4] & 15) << 8, timing[6] | (timing[7] & 15) << 8
    hertz = int.from_bytes(timing[:2], "little") * 10_000 / ((size[0] + blanks[0]) * (size[1] + blanks[1]))
    assert hertz == pytest.approx(60, abs=0.5) or size == (4095, 4095)


@pytest.mark.parametrize("kind", gpu.FORMATS)
def test_pixels_go_from_the_drivers_memory_to_the_screen(card: Card, kind: int) -> None:
    width, height = 50, 40
    pixels = random_pixels(width * height)
    assert not card.device.is_shown
    card.resource(1, width, height, kind)
    card.back(pixels)
    card.do(gpu.SET_SCANOUT, 0, 0, width, height, 0, 1)
    assert card.device.pixels() == (width, height, bytes(4 * width * height))
    card.do(gpu.TRANSFER, 0, 0, width, height, 0, 0, 1, 0)
    card.do(gpu.FLUSH, 0, 0, width, height, 1, 0)
    order = gpu.FORMATS[kind]
    wanted = bytes(pixels[at + of] if of >= 0 else 0 for at in range(0, len(pixels), 4) for of in order)
    assert card.device.pixels() == (width, height, wanted) and card.device.is_shown
    assert screen.text(card.device) == "graphics 50x40x32\n"
    picture = Picture(width, height)
    assert picture.update(screen.look(card.device)) and not picture.update(screen.look(card.device))
    assert picture.pixels[0::4] == wanted[2::4] and picture.pixels[2::4] == wanted[0::4]
    assert screen.picture(card.device)[:4] == b"\x89PNG"
    card.do(gpu.SET_SCANOUT, 0, 0, 0, 0, 0, 0)
    assert not card.device.is_shown


def test_a_part_is_copied_and_a_part_is_shown(card: Card) -> None:
    width, height = 30, 20
    pixels = random_pixels(width * height)
    card.resource(1, width, height)
    card.back(pixels)
    x, y, wide, high = 7, 3, 11, 9
    card.do(gpu.TRANSFER, x, y, wide, high, 4 * (width * y + x), 0, 1, 0)
    card.do(gpu.SET_SCANOUT, x - 1, y, wide + 1, high, 0, 1)
    rows = (4 * (width * row + x) for row in range(y, y + high))
    wanted = b"".join(
        bytes(4) + b"".join(pixels[at : at + 3] + b"\0" for at in range(row, row + 4 * wide, 4)) for row in rows
    )
    assert card.device.pixels() == (wide + 1, high, wanted)


def test_a_cursor_is_over_it(card: Card) -> None:
    card.resource(1, 100, 80)
    card.back(bytes((200, 100, 40, 0)) * 8000)
    card.do(gpu.TRANSFER, 0, 0, 100, 80, 0, 0, 1, 0)
    card.do(gpu.SET_SCANOUT, 0, 0, 100, 80, 0, 1)
    card.resource(2, 64, 64, 1, at=0x18_0000)
    half = bytes((0, 0, 128, 128))
    card.back((bytes((10, 20, 30, 255)) + half + bytes(4)).ljust(4 * 64 * 64 - 4, b"\0") + bytes((1, 2, 3, 255)))
    card.do(gpu.TRANSFER, 0, 0, 64, 64, 0, 0, 2, 0)
    plain = card.device.pixels()[2]
    card.do(gpu.UPDATE_CURSOR, 0, 5, 6, 0, 2, 0, 0, 0, queue=1)

    def at(x: int, y: int) -> bytes:
        return card.device.pixels()[2][4 * (100 * y + x) :][:3]

    assert (
        at(5, 6) == bytes((10, 20, 30))
        and at(6, 6) == bytes((99, 49, 147))
        and at(7, 6) == at(4, 6) == bytes((200, 100, 40))
    )
    assert at(68, 69) == bytes((1, 2, 3))
    card.do(gpu.MOVE_CURSOR, 0, -63, -63, 0, 2, 0, 0, 0, queue=1)
    assert at(0, 0) == bytes((1, 2, 3)) and at(5, 6) == bytes((200, 100, 40))
    for x, y in ((100, 0), (-64, 0), (0, 80), (2**31 - 1, -(2**31))):
        card.do(gpu.MOVE_CURSOR, 0, x, y, 0, 2, 0, 0, 0, queue=1)
        assert card.device.pixels()[2] == plain
    card.do(gpu.UPDATE_CURSOR, 0, 5, 6, 0, 0, 0, 0, 0, queue=1)
    assert card.device.pixels()[2] == plain
    card.do(gpu.UPDATE_CURSOR, 0, 5, 6, 0, 1, 0, 0, 0, queue=1, code=gpu.ERR_PARAMETER)


def test_what_a_driver_may_not(card: Card) -> None:
    card.resource(1, 32, 32)
    bad = [
        (gpu.ERR_RESOURCE, gpu.CREATE_2D, 1, 2, 8, 8), (gpu.ERR_RESOURCE, gpu.CREATE_2D, 0, 2, 8, 8),
        (gpu.ERR_PARAMETER, gpu.CREATE_2D, 2, 5, 8, 8), (gpu.ERR_PARAMETER, gpu.CREATE_2D, 2, 2, 0, 8),
        (gpu.ERR_PARAMETER, gpu.CREATE_2D, 2, 2, 8, 8193), (gpu.ERR_OUT_OF_MEMORY, gpu.CREATE_2D, 2, 2, 1024, 1024),
        (gpu.ERR_RESOURCE, gpu.UNREF, 9, 0), (gpu.ERR_UNSPEC, gpu.ATTACH, 1, 1, 0, 0, 64, 0),
        (gpu.ERR_RESOURCE, gpu.ATTACH, 9, 1, 0, 0, 64, 0), (gpu.ERR_RESOURCE, gpu.DETACH, 9, 0),
        (gpu.ERR_PARAMETER, gpu.TRANSFER, 1, 0, 32, 32, 0, 0, 1, 0),
        (gpu.ERR_PARAMETER, gpu.TRANSFER, 0, 0, 32, 32, 4, 0, 1, 0),
        (gpu.ERR_PARAMETER, gpu.TRANSFER, 0, 0, 8, 8, 0, 1, 1, 0),
        (gpu.ERR_RESOURCE, gpu.TRANSFER, 0, 0, 8, 8, 0, 0, 3, 0),
        (gpu.ERR_PARAMETER, gpu.TRANSFER, 0xFFFF_FFFF, 0, 1, 1, 0, 0, 1, 0),
        (gpu.ERR_PARAMETER, gpu.TRANSFER, 0, 0, 8), (gpu.ERR_SCANOUT, gpu.SET_SCANOUT, 0, 0, 8, 8, 1, 1),
        (gpu.ERR_PARAMETER, gpu.SET_SCANOUT, 1, 0, 32, 32, 0, 1),
        (gpu.ERR_PARAMETER, gpu.SET_SCANOUT, 0, 0, 0, 8, 0, 1),
        (gpu.ERR_RESOURCE, gpu.SET_SCANOUT, 0, 0, 8, 8, 0, 7), (gpu.ERR_PARAMETER, gpu.FLUSH, 0, 0, 33, 1, 1, 0),
        (gpu.ERR_UNSPEC, 0x108, 0, 0), (gpu.ERR_UNSPEC, gpu.MOVE_CURSOR, 0),
    ]  # fmt: skip
    for code, kind, *words in bad:
        card.do(kind, *words, code=code)
    card.do(gpu.DETACH, 1, 0)
    card.do(gpu.TRANSFER, 0, 0, 8, 8, 0, 0, 1, 0, code=gpu.ERR_UNSPEC)
    card.do(gpu.ATTACH, 1, 2, 0x1000, 0, 64, 0, code=gpu.ERR_PARAMETER)
    card.do(gpu.ATTACH, 1, 1, SIZE - 8, 0, 64, 0, code=gpu.ERR_PARAMETER)
    card.do(gpu.ATTACH, 1, 0, code=gpu.ERR_PARAMETER)
    assert card.device.counters["refused"] == len(bad) + 4 and not card.driver.needs_reset
    card.do(gpu.SET_SCANOUT, 0, 0, 8, 8, 0, 1)
    card.do(gpu.UNREF, 1, 0)
    assert not card.device.is_shown and card.room.left == 1 << 20


def test_it_is_shown_while_a_driver_has_something_there(card: Card) -> None:
    memory = Memory(1 << 20)
    pc = Pc(FakeMachine(), memory)
    pc.plug(Gpu(pc, "gpu0", 4, Room(1 << 20), (640, 480)))
    assert pc.shown is pc.display
    card.resource(1, 8, 8)
    card.do(gpu.SET_SCANOUT, 0, 0, 8, 8, 0, 1)
    found = pc.devices["gpu0"]
    found.load(card.device.save())
    assert pc.shown is found and found._room.left == (1 << 20) - 256
    pc.close()
    assert found._room.left == 1 << 20
    memory.close()


def test_a_reset_gives_all_back(card: Card) -> None:
    card.resource(1, 32, 32)
    card.do(gpu.SET_SCANOUT, 0, 0, 8, 8, 0, 1)
    card.driver.write(1, 20, 1, 0)
    assert not card.device.is_shown and card.room.left == 1 << 20


def test_random_commands_get_an_answer(card: Card) -> None:
    dice = random.Random(4)
    kinds = (*range(0x100, 0x10B), gpu.UPDATE_CURSOR, gpu.MOVE_CURSOR)
    for turn in range(1500):
        words = [dice.choice((0, 1, 2, 3, 8, 64, 64, 4096, dice.getrandbits(32))) for _ in range(dice.randrange(12))]
        card.driver.next = 0x4_0000
        code, _ = card.ask(dice.choice(kinds), struct.pack(f"<{len(words)}I", *words), queue=dice.randrange(2))
        assert 0x1100 <= code < 0x1300
        if turn % 50 == 0:
            width, height, pixels = card.device.pixels()
            assert len(pixels) == 4 * width * height
            state = card.device.save()
            card.device.check(state)
            card.device.load(state)
            assert card.device.save() == state
    assert card.device.counters["refused"] < card.device.counters["commands"]
    ring = card.driver.queues[0]
    ring.add([(card.driver.put(b"short"), 5, False)])
    ring.notify()
    assert card.driver.needs_reset


@pytest.mark.parametrize("word", ["", "x", "640", "640x", "63x64", "4096x64", "0x0", "640x480x32", "٦٤٠x٤٨٠"])
def test_sizes_that_no_screen_has(word: str) -> None:
    with pytest.raises(Invalid):
        gpu_size([word])
    assert gpu_size(["3840x2160"]) == (3840, 2160) and gpu_size([]) == (1024, 768)
