"""xHCI, and what is plugged into it, as a driver sees them; and drivers that mean harm."""

from __future__ import annotations

import os
import random
import struct
import threading

import pytest
from devices.fakes import IMAGE_SECTORS, FakeMachine, load, pass_time, plain, refuses, saved
from devices.usb import (
    BUFFER,
    BULK_IN,
    BULK_OUT,
    COMMANDS,
    CONFIG,
    CRCR,
    DOORBELL,
    ERDP,
    EVENTS,
    INPUT,
    INTERRUPT_IN,
    OUTPUTS,
    PORTSC,
    RINGS,
    SHORT,
    STALL,
    SUCCESS,
    TABLE,
    TRANSACTION_ERROR,
    TRB_ERROR,
    USBCMD,
    USBSTS,
    Driver,
)

from vmfs.devices import keys, moves
from vmfs.devices.machine import XHCI_SLOT, Pc
from vmfs.devices.usb.hid import USAGES, UsbKeyboard, UsbTablet
from vmfs.devices.usb.storage import UsbDisk
from vmfs.devices.virtio.disk import open_disk
from vmfs.memory.ram import Memory
from vmfs.words.errors import Busy, Invalid, Unsupported, WouldBlock

RAM = 8 << 20
KEYBOARD, TABLET, DISK = 1, 3, 5  # ports
MILLISECOND = 1_000_000


def a_pc(image, mode="rw"):
    pc = Pc(FakeMachine(), Memory(RAM))
    flags = os.O_RDWR if mode == "rw" else os.O_RDONLY
    pc.plug(UsbDisk(pc, "usb-disk0", open_disk(os.open(image, flags), mode), path=str(image)))
    pc.plug(UsbKeyboard(pc, "usb-kbd0"))
    pc.plug(UsbTablet(pc, "usb-tablet0", lambda: (640, 400)))
    return pc


@pytest.fixture
def pc(image):
    pc = a_pc(image)
    yield pc
    pc.close()
    pc.memory.close()


@pytest.fixture
def driver(pc):
    return Driver(pc)


# ---- the controller


def test_registers(pc, driver):
    assert driver.config(XHCI_SLOT, 8) >> 8 == 0x0C0330 and driver.config(XHCI_SLOT, 0x60, size=1) == 0x30
    assert driver.get(0) == 0x0100_0040 and driver.get(4) == 0x0800_0410 and driver.get(0x10) == 0x0140_0001
    assert [driver.get(0x500 + at) for at in (0, 4, 8)] == [0x0200_0402, 0x2042_5355, 0x0401]
    assert [driver.get(0x510 + at) for at in (0, 4, 8)] == [0x0300_0002, 0x2042_5355, 0x0405]
    assert driver.get(0x48) == 1 and driver.get(CONFIG) == 16 and driver.get(USBCMD) == 5
    assert not driver.get(USBSTS) & 1
    driver.put(USBCMD, 4)
    assert driver.get(USBSTS) & 1 and not driver.get(CRCR) & 8
    driver.put(USBCMD, 0x205)  # there is no state to restore
    assert driver.get(USBSTS) & 0x400
    pc.machine.time = 125_000 * 0x4003
    assert driver.get(0x1000) == 3
    driver.put(USBCMD, 2)
    assert driver.get(USBCMD) == 0 and driver.get(USBSTS) == 1 and driver.get(CONFIG) == 0


def test_ports(driver):
    driver.events()
    at = PORTSC + 0x10 * (KEYBOARD - 1)
    assert driver.get(at) == 0x2_02E1  # connected, polling, and that has changed
    assert driver.get(PORTSC + 0x10) == 0x2A0 and driver.get(PORTSC + 0x70) == 0x2A0  # nothing
    assert driver.get(PORTSC + 0x10 * (DISK - 1)) == 0x2_1203  # enabled, at super speed
    driver.put(at, 0x2_0200)
    driver.put(at, 0x210)
    assert driver.get(at) == 0x20_0603 and driver.events()[0][::2] == (KEYBOARD << 24, 34 << 10 | 1)
    driver.put(at, 0x20_0200)
    for link, reads, changes in ((3, 0x663, 0), (15, 0x7E3, 0), (0, 0x603, 0x40_0000)):
        driver.put(at, 0x1_0200 | link << 5)
        assert driver.get(at) == reads | changes
    driver.put(at, 0x40_0202)  # disabled
    assert driver.get(at) == 0x2E1
    at = PORTSC + 0x10 * (DISK - 1)
    driver.put(at, 0x8002_0200)  # a warm reset
    assert driver.get(at) == 0x28_1203
    for link, reads in ((3, 0x28_1263), (0, 0x68_1203), (4, 0x68_0281), (5, 0x68_1203)):
        driver.put(at, 0x1_0200 | link << 5)
        assert driver.get(at) == reads
    driver.put(PORTSC + 0x10, 0x8000_0210)
    assert driver.get(PORTSC + 0x10) == 0x2A0


def test_events_and_interrupts(pc, driver):
    driver.events()
    assert not driver.interrupt
    driver.commands.put(0, 0, 23 << 10)
    driver.put(DOORBELL, 0)
    assert driver.interrupt and driver.get(USBSTS) & 8 and driver.get(ERDP) & 8
    driver.put(0x1020, 3)
    assert not driver.interrupt
    driver.commands.put(0, 0, 23 << 10)
    driver.put(DOORBELL, 0)
    assert not driver.interrupt  # the handler is busy
    driver.put(ERDP, EVENTS | 8, 8)  # and ends before it has read all
    assert driver.interrupt
    assert [event[1] >> 24 for event in driver.events()] == [SUCCESS] * 2 and not driver.interrupt
    driver.put(USBCMD, 1)
    assert driver.command(23)[0] == SUCCESS and not driver.interrupt
    driver.put(USBCMD, 5)
    at = next(at for at in range(0x40, 0x80, 4) if driver.config(XHCI_SLOT, at, size=1) == 0x11)
    for word, value in ((0, 0xFEE0_0000), (8, 0x41), (12, 0)):
        driver.store(pc.xhci.bar(1) + word, value)
    driver.config(XHCI_SLOT, at + 2, 0x8000, size=2)
    pc.machine.messages.clear()
    driver.commands.put(0, 0, 23 << 10)
    driver.put(DOORBELL, 0)
    assert pc.machine.messages == [(0xFEE0_0000, 0x41)] and driver.get(0x1020) == 2 and not driver.interrupt


def test_an_event_ring_that_is_full(driver):
    """Nothing is lost, and nothing is begun, until there is room; over two segments."""
    driver.put(USBCMD, 2)
    struct.pack_into("<QIIQII", driver.board.ram, TABLE, EVENTS, 16, 0, EVENTS + 0x400, 16, 0)
    driver.put(CRCR, COMMANDS | 1, 8)
    driver.put(0x1028, 2)
    driver.put(ERDP, EVENTS, 8)
    driver.put(0x1030, TABLE, 8)
    ram = driver.board.ram
    ram[EVENTS : EVENTS + 0x800] = bytes(0x800)
    driver.put(USBCMD, 1)
    ports = 3  # told when it began
    for _ in range(28):
        driver.commands.put(0, 0, 23 << 10)
    driver.put(DOORBELL, 0)

    def codes(first, count):
        ats = (EVENTS + 16 * n if n < 16 else EVENTS + 0x400 + 16 * (n - 16) for n in range(first, first + count))
        return [struct.unpack_from("<I", ram, at + 12)[0] & 0xFC01 for at in ats]

    command = 33 << 10 | 1
    assert codes(0, 32) == [34 << 10 | 1] * ports + [command] * 28 + [0]
    for _ in range(2):
        driver.commands.put(0, 0, 23 << 10)
    driver.put(DOORBELL, 0)
    assert codes(31, 1) == [0]
    driver.put(ERDP, EVENTS + 16 * 3, 8)
    assert codes(31, 1) == [command] and codes(0, 2) == [command & ~1] + [34 << 10 | 1]


def test_commands_that_cannot_be(driver):
    assert driver.command(23) == (SUCCESS, 0) and driver.command(40)[0] == TRB_ERROR
    for kind in (10, 11, 12, 13, 14, 15, 16, 17):
        assert driver.command(kind, INPUT, 3 << 24 | 1 << 16)[0] == 11
    assert driver.command(9) == (SUCCESS, 1)
    for kind in (12, 13, 14, 15, 16, 17):
        assert driver.command(kind, INPUT, 1 << 24 | 1 << 16)[0] == 19
    for add, words, control, code in (
        (1, (1 << 27, 1 << 16), (4, 8), 17), (3, (1 << 27, 9 << 16), (4, 8), 17), (3, (1 << 27, 0), (4, 8), 17),
        (3, (1 << 27 | 1, 1 << 16), (4, 8), 17), (3, (1 << 27, 1 << 16), (6, 8), 17),
        (3, (1 << 27, 1 << 16), (4, 0), 17), (3, (1 << 27, 2 << 16), (4, 8), TRANSACTION_ERROR),
        (3, (1 << 27, 1 << 16), (4, 8), TRANSACTION_ERROR),  # the port was not reset
    ):  # fmt: skip
        driver.input(0, add, words, {1: (*control, RINGS)})
        assert driver.command(11, INPUT, 1 << 24) == (code, 1)
    slot = driver.address(KEYBOARD)
    assert slot == 2 and driver.command(11, INPUT, slot << 24)[0] == 19
    assert driver.command(11, INPUT, 1 << 24)[0] == TRB_ERROR  # that device is another slot's
    for drop, add, endpoints in (
        (0, 0x9, {3: (2, 8)}), (0, 0x9, {3: (5, 8)}), (1, 9, {3: (7, 8)}), (0, 8, {3: (7, 8)}), (0, 3, {1: (4, 8)})
    ):
        driver.input(drop, add, (3 << 27,), {dci: (*one, RINGS) for dci, one in endpoints.items()})
        assert driver.command(12, INPUT, slot << 24)[0] == 17
    driver.configure(slot, {INTERRUPT_IN: (7, 8)})
    context = driver.board.ram[OUTPUTS + 0x400 * slot :]
    assert struct.unpack_from("<I", context, 12)[0] == 3 << 27 | slot and context[96] & 7 == 1
    driver.input(0, 9, (3 << 27,), {3: (7, 8, RINGS)})
    assert driver.command(12, INPUT, slot << 24)[0] == 17  # it is there already
    assert driver.command(16, RINGS | 1, slot << 24 | 3 << 16)[0] == 19  # it runs
    assert driver.command(15, 0, slot << 24 | 3 << 16)[0] == SUCCESS and context[96] & 7 == 3
    assert driver.command(14, 0, slot << 24 | 3 << 16)[0] == 19
    assert driver.command(17, 0, slot << 24)[0] == SUCCESS and struct.unpack_from("<I", context, 12)[0] == 1 << 27
    assert driver.command(10, 0, slot << 24)[0] == SUCCESS and driver.command(10, 0, slot << 24)[0] == 11
    assert [driver.command(9)[0] for _ in range(16)] == [SUCCESS] * 15 + [9]


def test_requests(pc, driver):
    slot = driver.address(KEYBOARD)
    code, device = driver.control(slot, 0x80, 6, 0x100, 0, 64)
    assert code == SUCCESS and len(device) == 18 and device[:8] == bytes((18, 1, 0, 2, 0, 0, 0, 8))
    assert driver.control(slot, 0x80, 6, 0x100, 0, 8) == (SUCCESS, device[:8])
    code, all_of_it = driver.control(slot, 0x80, 6, 0x200, 0, 255)
    assert len(all_of_it) == 34 == all_of_it[2] and all_of_it[27:] == bytes((7, 5, 0x81, 3, 8, 0, 8))
    assert driver.control(slot, 0x80, 6, 0x302, 0x409, 255)[1] == b"\x12\x03" + "keyboard".encode("utf-16-le")
    assert driver.control(slot, 0x81, 6, 0x2200, 0, 255)[1] == UsbKeyboard.DESCRIPTOR
    assert driver.control(slot, 0x80, 8, 0, 0, 1) == (SUCCESS, b"\0")
    for request in ((0x80, 6, 0x304, 0, 8), (0x80, 6, 0x700, 0, 8), (0x80, 6, 0xF00, 0, 8), (0x00, 9, 2),
                    (0xC0, 1, 0, 0, 8), (0x80, 0x40, 0, 0, 8), (0x02, 3, 0, 0x82), (0x00, 5, 7)):  # fmt: skip
        assert driver.control(slot, *request)[0] == STALL, request
        driver.recover(slot, 1)
    assert driver.control(slot, 0x80, 0, 0, 0, 2) == (SUCCESS, b"\1\0")
    slot = driver.address(DISK)
    assert driver.control(slot, 0x80, 6, 0x100, 0, 18)[1][2:8] == bytes((0x10, 3, 0, 0, 0, 9))
    assert len(driver.control(slot, 0x80, 6, 0xF00, 0, 64)[1]) == 22
    assert driver.control(slot, 0x80, 6, 0x200, 0, 64)[1][2] == 9 + 9 + 2 * 13
    assert driver.control(slot, 0x00, 0x30, data=bytes(6)) == (SUCCESS, b"")
    assert pc.xhci.counters["halts"] == 8


def test_a_driver_that_reads_no_memory(pc, driver):
    """A ring that is not RAM, and a function that may not be bus master, end the controller until it is reset."""
    for spoil in (
        lambda: driver.put(CRCR, 1 << 40 | 1, 8),
        lambda: driver.config(XHCI_SLOT, 4, 0x102, size=2),
        lambda: struct.pack_into("<QII", pc.ram, COMMANDS, COMMANDS, 0, 6 << 10 | 1),
        lambda: struct.pack_into("<QII", pc.ram, TABLE, 1 << 50, 16, 0) or driver.put(0x1030, TABLE, 8),
        lambda: struct.pack_into("<QII", pc.ram, COMMANDS, 1 << 40, 0, 11 << 10 | 1),
    ):
        driver.begin()
        driver.commands.put(0, 0, 9 << 10)
        driver.put(USBCMD, 4)
        spoil()
        driver.put(USBCMD, 5)
        driver.put(DOORBELL, 0)
        if driver.get(USBSTS) & 4 == 0:  # an address of slot 0 is refused before its memory is looked at
            assert driver.events()[-1][1] >> 24 == 11
            continue
        assert driver.get(USBSTS) & 5 == 5 and not driver.get(USBCMD) & 1
        driver.put(USBCMD, 5)
        assert driver.get(USBSTS) & 1
    driver.begin()
    slot = driver.address(DISK)
    driver.configure(slot, {BULK_OUT: (2, 1024)})
    driver.transfer(slot, BULK_OUT, (1 << 40, 31))
    assert driver.get(USBSTS) & 5 == 5 and pc.xhci.counters["bad_dma"] >= 4


def test_a_ring_without_an_end(pc, driver):
    """It costs the guest, not the host: no more than so many transfers at a time."""
    slot = driver.address(KEYBOARD)
    ring = driver.rings[slot, 1]
    ram, (setup,) = pc.ram, struct.unpack("<Q", struct.pack("<BBHHH", 0x80, 8, 0, 0, 0))
    at = ring.start
    for number, entry in enumerate(((setup, 8, 2 << 10 | 0x41), (0, 0, 4 << 10 | 1), (at, 0, 6 << 10 | 1))):
        struct.pack_into("<QII", ram, at + 16 * number, *entry)
    assert driver.command(15, 0, slot << 24 | 1 << 16)[0] == SUCCESS
    assert driver.command(16, at | 1, slot << 24 | 1 << 16)[0] == SUCCESS
    before = pc.xhci.counters["transfers"]
    driver.put(DOORBELL + 4 * slot, 1)
    assert pc.xhci.counters["transfers"] - before == 256
    pass_time(pc, 125_000)
    assert pc.xhci.counters["transfers"] - before == 512
    assert driver.command(15, 0, slot << 24 | 1 << 16)[0] == SUCCESS
    pass_time(pc, MILLISECOND)
    assert pc.xhci.counters["transfers"] - before == 512


# ---- the keyboard and the tablet


def reports(driver, slot, size, count=1000):
    """What comes of an endpoint, and how much of the guest's time it took."""
    found, began = [], driver.board.machine.time
    while len(found) < count:
        came = driver.transfer(slot, INTERRUPT_IN, (BUFFER, size))
        if not came and driver.board.machine.deadline is not None:
            pass_time(driver.board, driver.board.machine.deadline)
            came = driver.answer(slot, INTERRUPT_IN)
        if not came:
            break
        assert came == [(SUCCESS, 0)]
        found.append(bytes(driver.board.ram[BUFFER : BUFFER + size]))
    return found, driver.board.machine.time - began


def test_the_keyboard(pc, driver):
    slot = driver.address(KEYBOARD)
    pc.keyboard.type(keys.parse("x"))
    assert pc.devices["usb-kbd0"].describe()["waiting"] == "0"  # the PS/2 keyboard has it
    driver.configure(slot, {INTERRUPT_IN: (7, 8)})
    pc.keyboard.type(keys.parse('"aB" pause'))
    found, took = reports(driver, slot, 8, 8)
    a, b, pause = (USAGES[name] for name in ("a", "b", "pause"))
    rows = (0, a), (0, 0), (2, 0), (2, b), (2, 0), (0, 0), (0, pause), (0, 0)
    assert found == [bytes((modifiers, 0, key, 0, 0, 0, 0, 0)) for modifiers, key in rows] and took == 56 * MILLISECOND
    pc.keyboard.press([(key, True) for key in "abcdefg"])
    found, _ = reports(driver, slot, 8)
    assert found[5] == bytes((0, 0, 4, 5, 6, 7, 8, 9)) and found[6] == bytes((0, 0, *[1] * 6))
    assert driver.control(slot, 0xA1, 1, 0x100, 0, 8) == (SUCCESS, found[6])
    assert driver.control(slot, 0x21, 9, 0x200, 0, data=b"\3") == (SUCCESS, b"")
    assert pc.devices["usb-kbd0"].describe()["leds"] == "numlock capslock" and pc.keyboard.leds == 6
    for request, value in ((0x0A, 0x500), (0x0B, 0)):
        assert driver.control(slot, 0x21, request, value)[0] == SUCCESS
    assert driver.control(slot, 0xA1, 2, 0, 0, 1)[1] == b"\5" and driver.control(slot, 0xA1, 3, 0, 0, 1)[1] == b"\0"
    with pytest.raises(WouldBlock):
        pc.keyboard.press([("a", True)] * (1 << 17))
        pc.keyboard.press([("a", False)] * 2)
    driver.begin()  # its driver has gone
    pc.keyboard.type(keys.parse("y"))
    assert pc.devices["usb-kbd0"].describe()["waiting"] == "0" and pc.keyboard.leds == 0


def test_all_keys():
    assert set(USAGES) == set(keys.KEYS)
    assert len(set(USAGES.values())) == len(USAGES)


def test_the_tablet(pc, driver):
    with pytest.raises(Unsupported):
        pc.keyboard.move(moves.parse("@3,4"))
    slot = driver.address(TABLET)
    assert not pc.keyboard.has_tablet
    driver.configure(slot, {INTERRUPT_IN: (7, 8)})
    assert pc.keyboard.has_tablet
    pc.keyboard.move(moves.parse("@639,0 +left -64,40 wheel-down -left -9999,-9999 wheel-up"))
    found, took = reports(driver, slot, 6, 7)
    right = 0x8000 * 1279 // 1280
    left = right - 3277
    rows = (0, right, 40, 0), (1, right, 40, 0), (1, left, 3316, 0), (1, left, 3316, -1), (0, left, 3316, 0)
    assert [struct.unpack("<BHHb", one) for one in found] == [*rows, (0, 0, 0, 0), (0, 0, 0, 1)]
    assert took == 24 * MILLISECOND
    for x in range(100, 200):
        pc.keyboard.point(x, 7, 0, 0)
    pc.keyboard.point(200, 7, 0, 2)
    pc.keyboard.point(300, 7, 1, 2)
    found, _ = reports(driver, slot, 6)
    got = [struct.unpack("<BHHb", one) for one in found]
    assert got == [(0, 199, 7, 0), (2, 200, 7, 0), (2, 300, 7, -1)], got  # only where ways lead
    with pytest.raises(WouldBlock):
        pc.keyboard.move(moves.parse("left " * 2049))
    with pytest.raises(Invalid):
        moves.parse("@-1,5")
    assert driver.control(slot, 0x21, 9, 0x200, 0, data=b"\3")[0] == STALL


def test_a_transfer_that_waits_is_stopped(pc, driver):
    slot = driver.hid(KEYBOARD)
    assert driver.transfer(slot, INTERRUPT_IN, (BUFFER, 8)) == []
    driver.commands.put(0, 0, 15 << 10 | slot << 24 | INTERRUPT_IN << 16)
    driver.put(DOORBELL, 0)
    events = driver.events()
    assert [(event[1] >> 24, event[2] >> 10 & 63) for event in events] == [(26, 32), (SUCCESS, 33)]
    pc.keyboard.type(keys.parse("a"))
    assert driver.answer(slot, INTERRUPT_IN) == []
    driver.put(DOORBELL + 4 * slot, INTERRUPT_IN)
    assert driver.answer(slot, INTERRUPT_IN) == [(SUCCESS, 0)] and pc.ram[BUFFER + 2] == USAGES["a"]


# ---- the disk


@pytest.fixture
def disk(driver):
    return driver.disk()


def read_block(lba, count):
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, count, 0)


def write_block(lba, count, flags=0):
    return struct.pack(">BBIBHB", 0x2A, flags, lba, 0, count, 0)


@pytest.mark.parametrize("sizes", [(512,), (4096, 4096), (100, 412), (1000, 1, 23, 1024), (65536, 65536)])
def test_reads_and_writes(pc, driver, disk, image, sizes):
    """Of one part, and of several at once; sectors that are cut."""
    before, length = image.read_bytes(), sum(sizes)
    parts = tuple((BUFFER + 0x1000 + 0x1_0010 * number, size) for number, size in enumerate(sizes))
    count = length // 512
    assert driver.scsi(disk, read_block(5, count), length, parts=parts) == (0, 0, before[2560 : 2560 + length])
    data = random.Random(length).randbytes(length)
    assert driver.scsi(disk, write_block(7, count), length, to_host=False, data=data, parts=parts) == (0, 0, b"")
    assert image.read_bytes() == before[:3584] + data + before[3584 + length :]
    counters = pc.devices["usb-disk0"].counters
    assert (counters["read_bytes"], counters["write_bytes"]) == (length, length)


def test_a_transfer_in_several_pieces(pc, driver, disk, image):
    """Transfers of the ring that end inside a sector."""
    before = image.read_bytes()
    pc.ram[BUFFER : BUFFER + 31] = struct.pack("<4sIIBBB16s", b"USBC", 1, 1024, 0x80, 0, 10, read_block(9, 2))
    driver.transfer(disk, BULK_OUT, (BUFFER, 31))
    got = b""
    for size in (300, 0, 212, 1, 511):
        assert driver.transfer(disk, BULK_IN, (BUFFER, size)) == [(SUCCESS, 0)]
        got += bytes(pc.ram[BUFFER : BUFFER + size])
    assert got == before[9 * 512 : 11 * 512] and driver.transfer(disk, BULK_IN, (BUFFER, 13)) == [(SUCCESS, 0)]
    pc.ram[BUFFER : BUFFER + 31] = struct.pack("<4sIIBBB16s", b"USBC", 1, 1024, 0, 0, 10, write_block(9, 2))
    driver.transfer(disk, BULK_OUT, (BUFFER, 31))
    pc.ram[BUFFER : BUFFER + 512] = b"abcd" * 128
    for size in (300, 0, 212, 4, 508):
        assert driver.transfer(disk, BULK_OUT, (BUFFER, size)) == [(SUCCESS, 0)]
    wanted = (b"abcd" * 75) + (b"abcd" * 53) + b"abcd" + b"abcd" * 127
    assert image.read_bytes() == before[: 9 * 512] + wanted + before[11 * 512 :]
    assert driver.transfer(disk, BULK_IN, (BUFFER, 512)) == [(SHORT, 499)]


def test_what_a_disk_says(driver, disk):
    def ask(text, length):
        return driver.scsi(disk, bytes.fromhex(text), length, parts=((BUFFER + 0x1000, length),))

    assert ask("12 00 00 00 24 00", 36)[2][8:] == b"vmfs    vmfs disk       1.0 "
    assert ask("12 01 00 00 ff 00", 255) == (0, 255 - 7, b"\0\0\0\3\0\x80\x83")
    assert ask("12 01 80 00 ff 00", 255)[2] == b"\0\x80\0\x09usb-disk0" and ask("12 01 83 00 ff 00", 255)[1] == 255 - 25
    assert ask("25" + "00" * 9, 8) == (0, 0, struct.pack(">II", IMAGE_SECTORS - 1, 512))
    assert ask("9e 10" + "00" * 11 + "20 00 00", 32)[2][:12] == struct.pack(">QI", IMAGE_SECTORS - 1, 512)
    assert ask("1a 00 3f 00 c0 00", 192)[2][:7] == bytes((23, 0, 0x10, 0, 8, 0x12, 4))
    assert ask("5a 00 08 00 00 00 00 00 c0 00", 192)[2][:11] == bytes((0, 26, 0, 0x10, 0, 0, 0, 0, 8, 0x12, 4))
    assert ask("a0" + "00" * 8 + "10 00 00", 16)[2] == struct.pack(">Q8x", 8 << 32)
    assert ask("23" + "00" * 6 + "00 0c 00", 12)[2] == struct.pack(">III", 8, IMAGE_SECTORS, 2 << 24 | 512)
    assert ask("03 00 00 00 12 00", 18)[2] == b"\x70" + bytes(6) + b"\x0a" + bytes(10)
    for text in ("00" * 6, "1b 00 00 00 01 00", "1e" + "00" * 5, "35" + "00" * 9, "2f" + "00" * 7 + "10 00"):
        assert driver.scsi(disk, bytes.fromhex(text)) == (0, 0, b"")
    assert driver.control(disk, 0xA1, 0xFE, 0, 0, 1) == (SUCCESS, b"\0")


@pytest.mark.parametrize(
    ("text", "length", "sense"),
    [
        ("ff" + "00" * 5, 8, (5, 0x20)),
        ("12 00 80 00 24 00", 36, (5, 0x24)),
        ("12 01 b0 00 24 00", 36, (5, 0x24)),
        ("1a 00 05 00 c0 00", 192, (5, 0x24)),
        ("1a 00 c8 00 c0 00", 192, (5, 0x39)),
        ("9e 11" + "00" * 14, 32, (5, 0x20)),
        ("28 00 00 00 10 00 00 00 01 00", 512, (5, 0x21)),
        ("88 00 ff ff ff ff ff ff ff ff 00 00 00 01 00 00", 512, (5, 0x21)),
    ],
)
def test_commands_of_a_disk_that_cannot_be(driver, disk, text, length, sense):
    """The data's endpoint is halted, and the status says that it failed."""
    assert driver.scsi(disk, bytes.fromhex(text), length) == (1, length, b"")
    data = driver.scsi(disk, bytes.fromhex("03 00 00 00 12 00"), 18, parts=((BUFFER + 0x1000, 18),))[2]
    assert (data[2], data[12]) == sense
    assert driver.scsi(disk, read_block(0, 1), 512)[0] == 0


def test_phases_that_do_not_fit(driver, disk, image):
    before = image.read_bytes()
    assert driver.scsi(disk, read_block(0, 2), 512)[:2] == (2, 512)
    assert driver.scsi(disk, read_block(0, 1), 512, to_host=False, data=b"x")[:2] == (2, 512)
    assert driver.scsi(disk, write_block(0, 1), 512)[:2] == (2, 512)
    assert driver.scsi(disk, read_block(0, 1))[:2] == (2, 0)
    parts = ((BUFFER + 0x1000, 1024),)
    assert driver.scsi(disk, read_block(0, 1), 1024, parts=parts) == (0, 512, before[:512])
    assert driver.scsi(disk, write_block(0, 1), 1024, to_host=False, data=b"x" * 1024)[:2] == (0, 512)
    assert image.read_bytes() == b"x" * 512 + before[512:]


def test_a_command_that_is_none(driver, disk):
    """Both endpoints are halted until a reset recovery."""
    for options in ({"signature": b"USBX"}, {"unit": 1}):
        assert driver.scsi(disk, bytes(6), **options)[-1][0] == STALL
        assert driver.command(14, 0, disk << 24 | BULK_OUT << 16)[0] == SUCCESS
        assert driver.control(disk, 2, 1, 0, 2)[0] == SUCCESS
        assert driver.control(disk, 0x82, 0, 0, 2, 2) == (SUCCESS, b"\1\0")  # still halted
        assert driver.control(disk, 0x21, 0xFF)[0] == SUCCESS
        for address in (2, 0x81):
            assert driver.control(disk, 2, 1, 0, address)[0] == SUCCESS
            assert driver.control(disk, 0x82, 0, 0, address, 2) == (SUCCESS, b"\0\0")
        ring = driver.rings[disk, BULK_OUT]
        at = ring.start + 16 * ring.index | ring.cycle
        assert driver.command(16, at, disk << 24 | BULK_OUT << 16)[0] == SUCCESS
        assert driver.scsi(disk, bytes(6)) == (0, 0, b"")


def test_a_disk_that_is_ro(image):
    pc = a_pc(image, "ro")
    try:
        driver = Driver(pc)
        disk = driver.disk()
        assert driver.scsi(disk, write_block(0, 1), 512, to_host=False, data=b"x")[:2] == (1, 512)
        assert driver.scsi(disk, bytes.fromhex("1a 00 08 00 c0 00"), 192, parts=((BUFFER, 192),))[2][2] == 0x90
    finally:
        pc.close()
        pc.memory.close()


def test_an_error_of_the_host(pc, driver, disk, image):
    os.truncate(image, 512)
    assert driver.scsi(disk, read_block(5, 1), 512)[:2] == (1, 512)
    assert pc.devices["usb-disk0"].counters["host_errors.EIO"] == 1 and pc.counters["host_errors"] == 1
    assert driver.scsi(disk, read_block(0, 1), 512)[0] == 0


def test_a_worker_reads_while_the_guest_goes_on(pc, driver, disk, image):
    """And what it does ends when the machine sleeps; what is not begun then begins afterwards."""
    pc._is_fast, pc._time_source = True, "host"
    gate, file = threading.Event(), pc.devices["usb-disk0"].disk
    read = file.read
    file.read_at_once = lambda *rest: False
    file.read = lambda at, views: (gate.wait(20), read(at, views))
    with pc.lock:
        pc.ram[BUFFER : BUFFER + 31] = struct.pack("<4sIIBBB16s", b"USBC", 1, 512, 0x80, 0, 10, read_block(3, 1))
        assert driver.transfer(disk, BULK_OUT, (BUFFER, 31)) == [(SUCCESS, 0)]
        assert driver.transfer(disk, BULK_IN, (BUFFER, 512)) == []
        assert driver.command(23)[0] == SUCCESS
        gate.set()
        with pc.asleep():
            assert driver.answer(disk, BULK_IN) == [(SUCCESS, 0)]
            assert driver.transfer(disk, BULK_IN, (BUFFER + 512, 13)) == []
        assert driver.answer(disk, BULK_IN) == [(SUCCESS, 0)]
    assert bytes(pc.ram[BUFFER : BUFFER + 512]) == image.read_bytes()[1536:2048] and pc.ram[BUFFER + 524] == 0


# ---- the machine


def test_places(image):
    pc = a_pc(image, "cow")
    try:
        with pytest.raises(Busy):
            pc.unplug(pc.xhci)
        with pytest.raises(Invalid):
            pc.plug(UsbKeyboard(pc, "usb-kbd0"))
        assert pc.devices["usb-disk0"].boot_path == "/pci@i0cf8/usb@1d/storage@5/channel@0/disk@0,0"
        pc.unplug(pc.devices["usb-disk0"])
        pc.plug(UsbDisk(pc, "usb-disk0", open_disk(os.open(image, os.O_RDONLY), "cow")))
        driver = Driver(pc)
        assert driver.scsi(driver.disk(), read_block(0, 1), 512)[0] == 0
        for name in ("usb-disk0", "usb-kbd0", "usb-tablet0"):
            pc.unplug(pc.devices[name])
        assert pc.xhci is None and not pc.keyboard.keyboards and not pc.keyboard.tablets
    finally:
        pc.close()
        pc.memory.close()


def test_a_saved_machine_goes_on(image):
    """In the middle of a command, with a report that waits."""
    pc, other = a_pc(image, "cow"), a_pc(image, "cow")
    try:
        driver = Driver(pc)
        keyboard, disk = driver.hid(KEYBOARD), driver.disk()
        pc.ram[BUFFER : BUFFER + 31] = struct.pack("<4sIIBBB16s", b"USBC", 1, 1024, 0x80, 0, 10, read_block(3, 2))
        driver.transfer(disk, BULK_OUT, (BUFFER, 31))
        driver.transfer(disk, BULK_IN, (BUFFER, 700))
        assert driver.transfer(keyboard, INTERRUPT_IN, (BUFFER + 0x2000, 8)) == []
        other.ram[:] = pc.ram[:]
        load(other, saved(pc))
        driver.board = other
        for ring in driver.rings.values():
            ring.ram = other.ram
        driver.commands.ram = other.ram
        other.keyboard.type(keys.parse("a"))
        assert driver.answer(keyboard, INTERRUPT_IN) == [(SUCCESS, 0)] and other.ram[BUFFER + 0x2002] == USAGES["a"]
        assert driver.transfer(disk, BULK_IN, (BUFFER + 700, 324)) == [(SUCCESS, 0)]
        assert bytes(other.ram[BUFFER : BUFFER + 1024]) == image.read_bytes()[1536:2560]
    finally:
        for one in (pc, other):
            one.close()
            one.memory.close()


def test_states_that_cannot_be(pc, driver):
    driver.hid(KEYBOARD)
    state = plain(pc.xhci)
    assert not refuses(pc.xhci, state)
    slot, port, interrupter = state["slots"][1], state["ports"][0], state["interrupters"][0]
    for changed in (
        {"command": 1 << 20}, {"status": 1 << 20}, {"contexts": 4}, {"configured_slots": 17}, {"ring": 3},
        {"status": 1}, {"ports": state["ports"][1:]}, {"slots": {17: slot}}, {"slots": {1: slot | {"port": 9}}},
        {"slots": {1: slot | {"port": 0}}}, {"slots": {1: slot | {"context": 4}}},
        {"slots": {1: slot | {"endpoints": {}}}}, {"slots": {1: slot | {"state": 0}}},
        {"ports": [port | {"link": 9}, *state["ports"][1:]]}, {"ports": [port | {"kept": 1}, *state["ports"][1:]]},
        {"ports": [port, port, *state["ports"][2:]]},
        *({"interrupters": [interrupter | bad, *state["interrupters"][1:]]} for bad in (
            {"segments": 17}, {"at": 1}, {"left": 1 << 30}, {"management": 4}, {"waiting": [b"1"]},
        )),
    ):  # fmt: skip
        assert refuses(pc.xhci, state | changed), changed
    for name, changes in (
        ("usb-kbd0", ({"configuration": 2}, {"last": b"123456"}, {"reports": [b"123456"]}, {"pressed": [2]},
                      {"pressed": [4, 4]})),
        ("usb-tablet0", ({"x": 0x8000}, {"buttons": 32}, {"last": bytes(8)})),
        ("usb-disk0", ({"size": 512}, {"phase": "x"}, {"moved": 1}, {"length": 1}, {"partial": b"1"},
                       {"start": 512 * IMAGE_SECTORS + 512}, {"halted": [7]}, {"reply": b"1"}, {"status": 3})),
    ):  # fmt: skip
        state = plain(pc.devices[name])
        assert not refuses(pc.devices[name], state)
        for changed in changes:
            assert refuses(pc.devices[name], state | changed), (name, changed)


def drive_at_random(dice, driver):
    """An access or a transfer of a driver, right or wrong."""
    ram, value = driver.board.ram, dice.getrandbits(32)
    slots = list(driver.rings)
    what = dice.random()
    if what < 0.1:
        size = dice.choice((1, 2, 4, 8))
        driver.store(driver.base + dice.randrange(0x2100 - 8), value & (1 << 8 * size) - 1, size)
    elif what < 0.2:
        driver.load(driver.base + dice.randrange(0x2100 - 8), dice.choice((1, 2, 4, 8)))
    elif what < 0.3:
        register = dice.choice((USBCMD, USBSTS, CRCR, 0x70, PORTSC, PORTSC + 0x40, 0x1020, 0x1028, 0x1030, 0x1038))
        driver.put(register, dice.choice((value, value & 0xFF, 5, 1, TABLE, COMMANDS | 1, EVENTS, value & 0xFFFFF)))
    elif what < 0.4 or not slots:
        ram[INPUT : INPUT + 0x400] = bytes(dice.choices((0, 0, 0, 1, 8, 255), k=0x400))
        driver.commands.put(
            dice.choice((INPUT, value, RINGS | 1)), 0,
            dice.choice((*range(9, 18), 23, value & 63)) << 10 | dice.randrange(6) << 24 | dice.randrange(6) << 16,
        )  # fmt: skip
        driver.put(DOORBELL, 0)
    else:
        slot, dci = dice.choice(slots)
        ring = driver.rings[slot, dci]
        if dci == 1 and dice.random() < 0.8:
            setup = struct.pack("<BBHHH", dice.choice((0x80, 0, 0x81, 0x21, 0xA1, 2, value & 255)),
                                dice.choice((*range(12), 0xFE, 0xFF)), dice.choice((0x100, 0x200, 0x301, 1, 0)), 0,
                                dice.choice((0, 8, 64)))  # fmt: skip
            ring.put(int.from_bytes(setup, "little"), 8, 2 << 10 | 0x40)
            ring.put(BUFFER, setup[6], 3 << 10 | dice.choice((4, 0x24)))
            ring.put(0, 0, 4 << 10 | 0x20)
        else:
            operation = dice.choice((0x28, 0x2A, 0x12, 0x03, 0x1A, value & 255))
            block = bytes((operation, *dice.choices((0, 0, 0, 1, 8), k=15)))
            ram[BUFFER : BUFFER + 31] = struct.pack(
                "<4sIIBBB16s", b"USBC", 1, dice.choice((0, 13, 512, value)), value & 0x80, 0, 10, block
            )
            for _ in range(dice.choice((1, 1, 3))):
                length = dice.choice((31, 13, 512, 513, 8, value & 0x1FFFF))
                flags = dice.choice((1, 1, 1, 7, 8, 5)) << 10 | dice.choice((0x20, 0x24, 0x10, 0, value)) & 0x3FE
                ring.put(dice.choice((BUFFER, BUFFER, BUFFER, value)), length, flags)
        driver.put(DOORBELL + 4 * slot, dci)
        if dice.random() < 0.3:
            driver.commands.put(ring.start + 16 * ring.index | ring.cycle, 0,
                                dice.choice((14, 15, 16)) << 10 | slot << 24 | dci << 16)  # fmt: skip
            driver.put(DOORBELL, 0)
    if dice.random() < 0.5:
        driver.events()


@pytest.mark.parametrize("seed", range(10))
def test_any_driver(tmp_path, seed):
    """Registers, commands and transfers of any bytes: nothing but an answer, and a file as long as it was."""
    dice, path = random.Random(seed), tmp_path / "image"
    path.write_bytes(bytes(64 << 10))
    pc = a_pc(path)
    try:
        driver = Driver(pc)
        for _ in range(150):
            if driver.get(USBSTS) & 1 or dice.random() < 0.02:
                driver.begin()
                driver.disk()
                driver.hid(dice.choice((KEYBOARD, TABLET)))
            drive_at_random(dice, driver)
            if dice.random() < 0.1:
                pc.keyboard.type(keys.parse("a"))
                pc.keyboard.move(moves.parse("5,5"))
            pass_time(pc, pc.machine.time + dice.choice((1, 125_000, 10 * MILLISECOND)))
            state = pc.xhci.pack()
            pc.xhci.load(pc.xhci.unpack(1, state))
            assert pc.xhci.pack() == state
    finally:
        pc.close()
        pc.memory.close()
    assert path.stat().st_size == 64 << 10
