"""Every device: what it is goes into a fresh one, and both go on alike. Random accesses drive them, time and the
host."""

from __future__ import annotations

import os
import random
import socket
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from devices import nics
from devices.fakes import FakeMachine, Guest, load, pass_time, plain, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.devices import moves
from vmfs.devices.device import DeviceState, NoState
from vmfs.devices.floppy import COMMANDS, Fdc, FloppyDrive
from vmfs.devices.ide.ata import AtaDisk
from vmfs.devices.ide.atapi import PACKETS, CdDrive
from vmfs.devices.ide.controller import Ide
from vmfs.devices.ide.drive import Drive
from vmfs.devices.machine import Pc
from vmfs.devices.network.backends import Stream
from vmfs.devices.network.e1000 import E1000
from vmfs.devices.network.ne2000 import Ne2000, Ne2000Pci
from vmfs.devices.network.rtl8139 import Rtl8139
from vmfs.devices.nvme.controller import Nvme
from vmfs.devices.pflash import Pflash
from vmfs.devices.sata.ahci import NAMES as SATA_NAMES
from vmfs.devices.sata.ahci import Ahci
from vmfs.devices.serial import Serial
from vmfs.devices.usb.device import UsbDevice
from vmfs.devices.usb.hid import UsbKeyboard, UsbTablet
from vmfs.devices.usb.storage import UsbDisk
from vmfs.devices.usb.xhci import Xhci
from vmfs.devices.virtio.block import Block
from vmfs.devices.virtio.console import Console
from vmfs.devices.virtio.disk import open_disk
from vmfs.devices.virtio.gpu import Gpu
from vmfs.devices.virtio.net import Net
from vmfs.devices.virtio.ninep import Server
from vmfs.devices.virtio.pci import VirtioDevice
from vmfs.devices.virtio.rng import Rng
from vmfs.devices.virtio.share import Share
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid

RAM = 1 << 20
DISK = 1 << 20
FLOPPY = 360 << 10
QUEUES = 0x1_0000  # what the pretended driver has there, 64 KiB a queue


class Room:
    """For resources; all fit in."""

    reserve = release = staticmethod(lambda size: None)


class OtherEnd:
    """Of a network card: what it sends is lost, and nothing comes."""

    def __init__(self):
        self.ours, self.theirs = socket.socketpair()

    def close(self):
        self.theirs.close()


@contextmanager
def a_pc(folder):
    """With every device that there is."""
    memory = Memory(RAM)
    pc = Pc(FakeMachine(), memory)
    end = OtherEnd()
    image = folder / "image"
    if not image.exists():
        image.write_bytes(random.Random(4).randbytes(DISK))
        (folder / "floppy").write_bytes(random.Random(6).randbytes(FLOPPY))
        (folder / "shared").mkdir()
        (folder / "shared" / "file").write_text("shared")
    disks = {name: open_disk(os.open(image, os.O_RDONLY), name) for name in ("ro", "cow")}
    for make in (
        lambda slot: Block(pc, "blk0", slot, disks["ro"]),
        lambda slot: Block(pc, "blk1", slot, disks["cow"]),
        lambda slot: Net(pc, "net0", slot, Stream(end.ours), b"\2\0\0\0\0\1"),
        lambda slot: E1000(pc, "net1", slot, nics.Cable(), nics.MAC),
        lambda slot: Rtl8139(pc, "net2", slot, nics.Cable(), nics.MAC),
        lambda slot: Ne2000(pc, "net3", nics.Cable(), nics.MAC),
        lambda slot: Ne2000Pci(pc, "net4", slot, nics.Cable(), nics.MAC),
        lambda slot: Gpu(pc, "gpu0", slot, Room, (640, 480)),
        lambda slot: Rng(pc, "rng0", slot),
        lambda slot: Console(pc, "hvc0", slot),
        lambda slot: Share(pc, "share0", slot, Server(os.open(folder / "shared", os.O_PATH)), "tag"),
        lambda slot: AtaDisk(pc, "hda", open_disk(os.open(image, os.O_RDONLY), "cow")),
        lambda slot: FloppyDrive(pc, "fd0", open_disk(os.open(folder / "floppy", os.O_RDONLY), "cow")),
        lambda slot: Pflash(pc, "pflash0", open_disk(os.open(folder / "floppy", os.O_RDONLY), "cow"), pc.flash_end),
        lambda slot: CdDrive(pc, "hdb", open_disk(os.open(image, os.O_RDONLY), "ro")),
        lambda slot: Nvme(pc, "nvme0", slot, open_disk(os.open(image, os.O_RDONLY), "cow")),
        lambda slot: AtaDisk(pc, "sata0", open_disk(os.open(image, os.O_RDONLY), "cow")),
        lambda slot: CdDrive(pc, "sata1", open_disk(os.open(image, os.O_RDONLY), "ro")),
        lambda slot: UsbDisk(pc, "usb-disk0", open_disk(os.open(image, os.O_RDONLY), "cow")),
        lambda slot: UsbKeyboard(pc, "usb-kbd0"),
        lambda slot: Serial(pc, "uart0", 0x2A0, 5),
        lambda slot: UsbTablet(pc, "usb-tablet0", pc.display.size),
    ):
        pc.plug(make(pc.pci.free_slot()))
    pc.devices["smbus"].describe_memory(192 << 20)
    pc.devices["net2"].NUDGES = False  # by the host's clock
    try:
        yield pc
    finally:
        pc.close()
        memory.close()
        end.close()


NAMES = (
    "pci bridge com1 com2 com3 com4 rtc power keyboard fw-cfg debugcon debugcon2 debug-exit isa-bridge power-pci "
    "display blk0 blk1 net0 net1 net2 net3 net4 gpu0 rng0 hvc0 share0 ide hda hdb dma fdc fd0 vmgenid pflash0 hpet "
    "ahci sata0 sata1 lpt1 speaker nvme0 xhci usb-disk0 usb-kbd0 usb-tablet0 smbus uart0"
).split()


def begin_virtio(guest, device):
    """As a driver does it: features, queues, DRIVER_OK."""
    guest.config(device.slot, 4, 0x107, size=2)
    base = device.bar(0)
    device._set_status(0)
    features = (8, 4, 1), (12, 4, 1), (8, 4, 0), (12, 4, 1 << 28)
    for offset, size, value in ((20, 1, 1), (20, 1, 3), *features, (20, 1, 11)):
        guest.store(base + offset, value, size)
    for queue in range(len(device.queues)):
        at = QUEUES + (queue << 16)
        areas = (32, 8, at), (40, 8, at + 0x1000), (48, 8, at + 0x2000)
        for offset, size, value in ((22, 2, queue), (24, 2, 16), *areas):
            guest.store(base + offset, value, size)
        guest.store(base + 28, 1, 2)
    guest.store(base + 20, 15, 1)
    assert device.is_live


def make_request(dice, pc, guest, device):
    """Descriptors of any kind and order, of which some are a request of the device's type."""
    queue = dice.choice(device.queues)
    ram, at = pc.ram, QUEUES + (queue.index << 16)
    data = at + 0x4000 + dice.randrange(8) * 0x800
    kind = dice.choice((0, 0, 1, 1, 4, 8, 11, 13))
    ram[data : data + 16] = struct.pack("<IIQ", kind, 0, dice.randrange(DISK // 512 + 2))
    if isinstance(device, Share):
        ram[data : data + 21] = struct.pack("<IBHIH", 19 + 2, 100, 0xFFFF, 8192, 8) + b"9P2000.L"
    head = 16
    if isinstance(device, Gpu):
        head = 80
        ram[data : data + head] = a_gpu_command(dice)
    length = dice.choice((512, 512, 1024, 7))
    rows = (data, head, False), (data + 0x100, length, kind in (0, 8)), (data + 0x700, 1, True)
    for number, (address, length, writable) in enumerate(rows):
        flags = (1 if number < len(rows) - 1 else 0) | (2 if writable else 0)
        ram[at + 16 * number : at + 16 * number + 16] = struct.pack("<QIHH", address, length, flags, number + 1)
    (index,) = struct.unpack_from("<H", ram, at + 0x1002)
    struct.pack_into("<H", ram, at + 0x1004 + 2 * (index % 16), dice.choice((0, 0, 0, 1)))
    struct.pack_into("<H", ram, at + 0x1002, index + 1 & 0xFFFF)
    guest.store(device.bar(0) + 0x3000 + 4 * queue.index, queue.index, 2)


def a_gpu_command(dice):
    """Of 80 bytes; resources of 64x64 pixels, the first two, mostly."""
    number, rect = dice.choice((1, 2, 3)), (0, 0, 64, dice.choice((64, 64, 65)))
    kind, words = dice.choice((
        (0x100, ()), (0x10A, (0,)), (0x101, (number, dice.choice((1, 2, 67)), 64, 64)), (0x102, (number,)),
        (0x106, (number, 2, QUEUES + 0x2_0000, 0, 9000, 0, QUEUES, 0, 9000, 0)), (0x107, (number,)),
        (0x103, (*rect, 0, dice.choice((0, number)))), (0x104, (*rect, number)), (0x105, (*rect, 0, 0, number)),
        (0x105, (*rect, 0, 0, number)), (0x106, (number, 1, QUEUES, 0, 1 << 15, 0)),
        (0x300, (0, 9, 9, 0, number, 0, 0)), (0x301, (0, 7, 0xFFFF_FFF0, 0, number, 0, 0)),
    ))  # fmt: skip
    head = struct.pack("<IIQII", kind, dice.randrange(2), dice.randrange(99), 0, 0)
    return (head + struct.pack(f"<{len(words)}I", *words)).ljust(80, b"\0")


ATA_COMMANDS = 0x20, 0x24, 0x25, 0x30, 0x34, 0x35, 0x39, 0x91, 0x90, 0xC4, 0xC5, 0xC6, 0xC8, 0xCA, 0xEC, 0xEF, 0xE7


def make_ide_request(dice, pc, guest, unit):
    """A command to a drive of the first channel, and some of what it needs; all that was read."""
    seen, bus = [], pc.ide.given[4]
    guest.config(pc.ide.slot, 4, 7, size=2, function=1)
    guest.config(pc.ide.slot, 0x40, 0x8000, size=2, function=1)
    if dice.random() < 0.1:
        guest.out(0x3F6, dice.choice((0, 2, 4, 0x80)))
    else:
        guest.out(0x3F6, 0)
    values = dice.choice((3, 0x82)), dice.choice((1, 3, 4, 0x22)), dice.randrange(256), dice.randrange(9), 0
    guest.out(0x1F6, 0xE0 | unit << 4)
    for port, value in enumerate(values, 0x1F1):
        guest.out(port, value)
    pc.ram[0x1000:0x1010] = struct.pack("<IHHIHH", QUEUES, 512, 0, QUEUES + 0x800, 1024, 0x8000)
    guest.out(bus + 4, 0x1000, 4)
    guest.out(0x1F7, dice.choice(ATA_COMMANDS) if not unit or dice.random() < 0.3 else 0xA0)
    if unit and dice.random() < 0.9:
        packet = dice.choice(tuple(PACKETS)), *(dice.choice((0, 1, 2, 0x10)) for _ in range(11))
        for at in range(0, 12, 2):
            guest.out(0x1F0, packet[at] | packet[at + 1] << 8, 2)
    guest.out(bus, dice.choice((0, 1, 8, 9)))
    for _ in range(dice.choice((0, 3, 256, 512))):
        if dice.random() < 0.5:
            guest.out(0x1F0, dice.getrandbits(16), 2)
        else:
            seen.append(guest.inp(0x1F0, 2))
    return seen


LIST, FISES, COMMAND_TABLE = 0x2000, 0x2400, 0x3000  # of AHCI


def make_ahci_request(dice, pc, guest, number):
    """A command to a drive of AHCI, most of them right; all that was read."""
    ahci, ram = pc.ahci, pc.ram
    guest.config(ahci.slot, 4, 0x107 if dice.random() < 0.9 else 0x103, size=2)
    if ahci.bar(5) is None:  # it was moved out of reach
        ahci.reset()
        return []
    base = ahci.bar(5)
    port = base + 0x100 + 0x80 * number
    for at, value in ((0, LIST), (4, 0), (8, FISES), (12, 0)):
        guest.store(port + at, value)
    if dice.random() < 0.9:
        guest.store(port + 0x18, 0x11)
    slot, rows = dice.choice((0, 0, 5, 31)), dice.choice((0, 1, 2, 3))
    flags = dice.choice((5, 5, 5, 0x45, 0x25, 0x25, 0x405, 2))
    ram[LIST + 32 * slot : LIST + 32 * slot + 16] = struct.pack("<HHIQ", flags, rows, 0, COMMAND_TABLE)
    command = 0xA0 if number and dice.random() < 0.8 else dice.choice((*ATA_COMMANDS, 0xA1, 0x08))
    fis = 0x27, dice.choice((0x80, 0x80, 0x80, 0)), command, dice.choice((1, 0, 3))
    fis += dice.choice((1, 3, 250)), 0, 0, 0xE0, 0, 0, 0, 0, dice.choice((1, 2, 3, 0)), 0, 0, dice.choice((0, 4))
    ram[COMMAND_TABLE : COMMAND_TABLE + 16] = bytes(fis)
    packet = dice.choice(tuple(PACKETS)), *(dice.choice((0, 1, 2, 0x10)) for _ in range(11))
    ram[COMMAND_TABLE + 0x40 : COMMAND_TABLE + 0x4C] = bytes(packet)
    for row in range(3):
        where = QUEUES + 0x1000 * row if dice.random() < 0.95 else 1 << 40
        entry = struct.pack("<QII", where, 0, dice.choice((511, 1023, 2047, 1)) | dice.choice((0, 1 << 31)))
        ram[COMMAND_TABLE + 0x80 + 16 * row : COMMAND_TABLE + 0x90 + 16 * row] = entry
    guest.store(port + 0x14, dice.choice((0xFFFFFFFF, 0)))
    guest.store(port + 0x38, 1 << slot)
    seen = [guest.load(port + at) for at in (0x10, 0x18, 0x20, 0x24, 0x28, 0x38)]
    guest.store(port + 0x10, dice.choice((0xFFFFFFFF, 0)))
    if dice.random() < 0.3:
        guest.store(port + 0x2C, dice.choice((0, 1, 4)))
    if dice.random() < 0.5:
        guest.store(port + 0x2C, 0)
        guest.store(port + 0x18, 0x10)
    guest.store(base + 4, dice.choice((2, 2, 2, 0, 3)))
    return seen


def begin_nvme(guest, nvme):
    """Enable it, with a pair of queues."""
    guest.config(nvme.slot, 4, 0x107, size=2)
    if nvme.bar(0) is None:  # it was moved out of reach
        nvme.reset()
    base = nvme.bar(0)
    queues = (0x28, 0x2000), (0x2C, 0), (0x30, 0x3000), (0x34, 0)
    for register, value in ((0x14, 0), (0x24, 0xF000F), *queues, (0x14, 0x460001)):
        guest.store(base + register, value)
    for number, (opcode, at, more) in enumerate(((5, 0x5000, 3), (1, 0x4000, 0x10001)), 1):
        entry = struct.pack("<BBHIQQQQ6I", opcode, 0, number, 0, 0, 0, at, 0, 0xF0001, more, 0, 0, 0, 0)
        guest.board.ram[0x2000 + 64 * (number - 1) : 0x2000 + 64 * number] = entry
        guest.store(base + 0x1000, number)


def make_nvme_request(dice, pc, guest):
    """A command of any kind, most of them right; what the guest sees then."""
    nvme = pc.devices["nvme0"]
    if 1 not in nvme.submissions or nvme.bar(0) is None or dice.random() < 0.1:
        begin_nvme(guest, nvme)
    if dice.random() < 0.1:
        guest.config(nvme.slot, 4, dice.choice((0x103, 0x107)), size=2)
    queue = dice.randrange(2)
    it, base = nvme.submissions.get(queue), nvme.bar(0)
    if it is None or base is None:
        return []
    opcode = dice.choice((0, 1, 2, 8, 9) if queue else (0, 2, 4, 6, 6, 9, 10, 12))
    words = [dice.choice((0, 1, 2, 6)), dice.choice((0, 4)), dice.randrange(16), 0, 0, 0]
    entry = struct.pack("<BBHIQQQQ6I", opcode, 0, 9, 1, 0, 0, QUEUES + dice.choice((0, 512)), QUEUES + 0x1000, *words)
    pc.ram[it.base + 64 * it.tail : it.base + 64 * it.tail + 64] = entry
    guest.store(base + 0x1000 + 8 * queue, (it.tail + 1) % it.size)
    if dice.random() < 0.8:
        guest.store(base + 0x1004 + 8 * queue, dice.randrange(16))
    return [guest.load(base + at) for at in (0x0C, 0x14, 0x1C, 0x24)]


USB = 0xC_0000


def make_usb_request(dice, pc, guest):
    """A transfer of the disk, or of a keyboard or tablet; what the guest sees then."""
    xhci, ram = pc.xhci, pc.ram
    guest.config(xhci.slot, 4, 0x107, size=2)
    if xhci.bar(0) is None:  # it was moved out of reach
        xhci.reset()
    base = xhci.bar(0)
    if guest.load(base + 0x44) & 1 or len(xhci.slots) < 2:
        begin_usb(dice, guest, base)
    what = dice.random()
    at = USB + 0x6000 + 0x400 * dice.randrange(4)
    if what < 0.3:
        pc.keyboard.type([("a",), ("shift", "b")])
        pc.keyboard.move(moves.parse("30,-5 +left -left"))
    elif what < 0.6:
        slot, dci, length = dice.choice(((1, 4, 31), (1, 4, 512), (1, 3, 512), (1, 3, 13), (1, 3, 700), (2, 3, 8)))
        block = bytes((dice.choice((0x28, 0x2A, 0x12, 0x35)), *bytes(3), 36, *bytes(3), 2, 0))
        if dci == 4:
            ram[USB + 0x8000 : USB + 0x801F] = struct.pack(
                "<4sIIBBB16s", b"USBC", 9, 1024, dice.choice((0, 0x80)), 0, 10, block
            )
        struct.pack_into("<QII", ram, at, USB + 0x8000, length, 1 << 10 | 0x25)
        struct.pack_into("<QII", ram, at + 16, 0, 0, 0)
        for kind in (15, 14, 16):
            usb_command(guest, base, kind, at | 1, slot << 24 | dci << 16)
        guest.store(base + 0x2000 + 4 * slot, dci)
    else:
        slot, recipient = dice.randrange(1, 3), dice.choice((0x80, 0, 2, 0x21, 0xA1))
        setup = struct.pack("<BBHHH", recipient, dice.choice((0, 1, 6, 9, 0xFF)), dice.choice((1, 0x100)), 0, 8)
        struct.pack_into("<8sII", ram, at, setup, 8, 2 << 10 | 0x41)
        struct.pack_into("<QIIQII", ram, at + 16, USB + 0x9000, 8, 3 << 10 | 1, 0, 0, 4 << 10 | 0x21)
        struct.pack_into("<QII", ram, at + 48, 0, 0, 0)
        for kind in (15, 14, 16):
            usb_command(guest, base, kind, at | 1, slot << 24 | 1 << 16)
        guest.store(base + 0x2000 + 4 * slot, 1)
    if dice.random() < 0.8:
        guest.store(base + 0x1038, pc.xhci.interrupters[0].at & 0xFFFF_FFFF | 8)
    return [guest.load(base + at) for at in (0x40, 0x44, 0x440, 0x1020, 0x1038)]


def usb_command(guest, base, kind, parameter, control):
    ring = guest.board.xhci.ring
    if ring.at >= USB + 0xF00:
        return
    struct.pack_into("<QII", guest.board.ram, ring.at, parameter, 0, kind << 10 | control | 1)
    struct.pack_into("<QII", guest.board.ram, ring.at + 16, 0, 0, 0)
    guest.store(base + 0x2000, 0)


def begin_usb(dice, guest, base):
    """Two slots with their endpoints."""
    ram = guest.board.ram
    ram[USB : USB + 0xA000] = bytes(0xA000)
    guest.store(base + 0x40, 2)
    struct.pack_into("<QII", ram, USB + 0x1000, USB + 0x2000, 64, 0)
    struct.pack_into("<QQ", ram, USB + 0x1108, USB + 0x3000, USB + 0x3800)
    for register, value in ((0x78, 16), (0x70, USB + 0x1100), (0x58, USB | 1), (0x1028, 1), (0x1038, USB + 0x2000),
                            (0x1030, USB + 0x1000), (0x1020, 2), (0x40, 5)):  # fmt: skip
        guest.store(base + register, value)
        guest.store(base + register + 4, 0) if register in (0x70, 0x58, 0x1038, 0x1030) else None
    endpoints = {1: {4: (2, 1024), 3: (6, 1024)}, 2: {3: (7, 8)}}
    for slot, port in ((1, 5), (2, dice.choice((1, 3)))):
        guest.store(base + 0x440 + 0x10 * (port - 1), 0x210)
        usb_command(guest, base, 9, 0, 0)
        contexts = USB + 0x5000
        ram[contexts : contexts + 0x420] = bytes(0x420)
        struct.pack_into("<IIII", ram, contexts + 32, 1 << 27, port << 16, 0, 0)
        for dci, (kind, size) in {1: (4, 8), **endpoints[slot]}.items():
            struct.pack_into("<IIQ", ram, contexts + 32 * (dci + 1), 0, size << 16 | kind << 3, USB + 0x7000 | 1)
        struct.pack_into("<II", ram, contexts, 0, 3)
        usb_command(guest, base, 11, contexts, slot << 24)
        struct.pack_into("<II", ram, contexts, 0, 1 | sum(1 << dci for dci in endpoints[slot]))
        usb_command(guest, base, 12, contexts, slot << 24)
        guest.board.devices[("usb-disk0", "usb-kbd0", "usb-tablet0")[(port == 3) + (port < 5)]].configuration = 1


def make_floppy_request(dice, guest):
    """A command with what it needs, most of them right; all that was read."""
    row, seen = dice.choice(COMMANDS), []
    guest.out(0x3F2, dice.choice((0x1C, 0x1C, 0x1C, 0x18, 0x0C)))
    guest.out(0x3F7, 2)
    for port, value in ((0x0C, 0), (4, 0), (4, 0x10), (5, 0xFF), (5, 3), (0x81, 2), (0xD4, 0)):
        guest.out(port, value)
    guest.out(0x0B, dice.choice((0x46, 0x4A)))
    guest.out(0x0A, 2)
    guest.out(0x3F5, (row.code | 0x40) & 0xFF if row.length > 5 else row.code)
    for value in (0, 0, 0, dice.choice((1, 9)), 2, 9, 0x1B, 0xFF)[: row.length - 1 - dice.choice((0, 0, 0, 1))]:
        guest.out(0x3F5, value)
    for _ in range(dice.choice((0, 3, 7, 10))):
        seen.append(guest.inp(0x3F5))
    return seen


NICS = {
    E1000: nics.drive_e1000,
    Rtl8139: nics.drive_rtl8139,
    Ne2000: nics.drive_ne2000,
    Ne2000Pci: nics.drive_ne2000,
}


def drive(pc, name, seed, count=120):
    """So many accesses, and what comes from outside; all that the guest could see of it."""
    dice = random.Random(seed)
    guest, device, seen = Guest(pc), pc.devices[name], []
    for _ in range(count):
        what = dice.random()
        is_sata = isinstance(device, Ahci) or name in SATA_NAMES
        windows = pc.ide.windows() if isinstance(device, Drive) else device.windows()
        windows = pc.ahci.windows() if name in SATA_NAMES else windows
        windows = pc.fdc.windows() if isinstance(device, FloppyDrive) else windows
        if isinstance(device, (UsbDevice, Xhci)) and what < 0.6:
            seen += make_usb_request(dice, pc, guest)
        elif name == "nvme0" and what < 0.5:
            seen += make_nvme_request(dice, pc, guest)
        elif is_sata and what < 0.5:
            seen += make_ahci_request(dice, pc, guest, dice.randrange(2))
        elif isinstance(device, (Drive, Ide)) and what < 0.4:
            seen += make_ide_request(dice, pc, guest, dice.randrange(2))
        elif isinstance(device, (Fdc, FloppyDrive)) and what < 0.6:
            seen += make_floppy_request(dice, guest)
        elif type(device) in NICS and what < 0.5:
            seen += NICS[type(device)](dice, pc, guest, device)
        elif isinstance(device, VirtioDevice) and what < 0.4:
            if not device.is_live or device.bar(0) is None:
                guest.config(device.slot, 4, 0x107, size=2)
                if device.bar(0) is None:  # it was moved out of reach
                    device.reset()
                begin_virtio(guest, device)
            make_request(dice, pc, guest, device)
        elif hasattr(device, "slot") and what < 0.5:
            offset = dice.choice((4, 5, 6, 0x3C, 0x10, 0x2C, 0x60, 0x61, 0x62, 0x63))
            if offset == 0x10 or dice.random() < 0.5:
                seen.append(guest.config(device.slot, offset, size=1, function=device.function_number))
            else:
                guest.config(device.slot, offset, dice.getrandbits(8), size=1, function=device.function_number)
        elif name == "pci" and what < 0.5:
            seen.append(guest.config(dice.randrange(32), dice.randrange(64) * 4))
        elif windows and what < 0.9:
            window = dice.choice(windows)
            at, size, value = dice.randrange(window.length), dice.choice((1, 1, 2, 4)), dice.getrandbits(32)
            if isinstance(device, VirtioDevice) and 20 <= at < 56:
                at = dice.choice((0, 4, 8, 0x1000, 0x2000, 0x2008))
            if window.space == "port" and dice.random() < 0.5:
                seen.append(guest.inp(window.start + at, size))
            elif window.space == "port":
                guest.out(window.start + at, value & (1 << 8 * size) - 1, size)
            elif dice.random() < 0.5:
                seen.append(guest.load(window.start + at, size))
            else:
                guest.store(window.start + at, value & (1 << 8 * size) - 1, size)
        elif hasattr(device, "receive"):
            device.receive(dice.randbytes(dice.randrange(1, 30)))
        elif name == "keyboard":
            device.type([("a",), ("shift", "b")])
            device.move(moves.parse("300,-5 left +right wheel-up"))
        elif name == "power":
            dice.choice((device.press_button, lambda: device.raise_event(0)))()
        elif name == "vmgenid":
            pc.renew()
        pass_time(pc, pc.machine.time + dice.choice((1, 1000, 5_000_000, 700_000_000)))
        pc.shutdown = None
    return seen


def everything(pc):
    with pc.asleep():
        board = pc.save()
    return {**saved(pc), "board": board, "ram": bytes(pc.ram), "lines": pc.machine.lines, "a20": pc.machine.a20,
            "deadline": pc.machine.deadline}  # fmt: skip


def go_into(pc, other):
    """What the engine and memory have first, then the board, then the devices."""
    with pc.asleep():
        board = msgspec.msgpack.encode(pc.save())
    other.machine.time, other.machine.a20, other.machine.lines = pc.machine.time, True, dict(pc.machine.lines)
    other.ram[:] = pc.ram[:]
    for name in ("blk1", "hda", "fd0", "pflash0", "sata0", "nvme0", "usb-disk0"):
        disk, copy = pc.devices[name].disk, other.devices[name].disk
        os.pwrite(copy.fd, os.pread(disk.fd, disk.size, 0), 0)
    with other.asleep():
        other.load(msgspec.msgpack.decode(board, type=type(pc.save())))
    load(other, saved(pc))


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def no_entropy(monkeypatch):
    monkeypatch.setattr("vmfs.devices.board.os.urandom", lambda count: b"\x5a" * count)


def test_these_are_all(folder):
    with a_pc(folder) as pc:
        assert sorted(NAMES) == sorted(pc.devices)


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_in_a_fresh_machine(folder, name):
    changed = False
    for seed in range(4):
        with a_pc(folder) as pc, a_pc(folder) as other:
            fresh = saved(pc)[name]
            drive(pc, name, f"{name} {seed}")
            go_into(pc, other)
            assert everything(other) == everything(pc)
            changed |= saved(pc)[name] != fresh
            for turn in range(3):
                assert drive(pc, name, f"{seed} {turn}") == drive(other, name, f"{seed} {turn}")
                is_, was = everything(other), everything(pc)
                assert {key for key in was if is_[key] != was[key]} == set()
    assert changed == (name not in ("debugcon", "debugcon2", "debug-exit", "speaker"))


def test_what_an_overlay_has_is_read_where_it_goes(folder):
    with a_pc(folder) as pc, a_pc(folder) as other:
        disk = pc.devices["blk1"].disk
        disk.write(5120, [memoryview(b"x" * 1024)])
        disk.discard(8 << 12, 4096)
        go_into(pc, other)
        got = bytearray(DISK)
        other.devices["blk1"].disk.read(0, [memoryview(got)])
        wanted = bytearray(DISK)
        disk.read(0, [memoryview(wanted)])
        assert got == wanted and got[5120:6144] == b"x" * 1024 and not any(got[8 << 12 : 9 << 12])
        state = plain(other.devices["blk1"])
        for chunk in ({0: b"\xff" * 64}, {9: b"\1".ljust(64, b"\0")}, {0: bytes(64)}):
            state["overlay"] = chunk
            with pytest.raises(Invalid):
                other.devices["blk1"].unpack(1, msgspec.msgpack.encode(state))


def test_every_state_says_its_version_and_bounds(folder):
    with a_pc(folder) as pc:
        for device in pc.devices.values():
            assert issubclass(device.STATE, DeviceState) and isinstance(device.save(), device.STATE)
            with pytest.raises(Invalid, match="of version"):
                device.unpack(device.STATE.VERSION + 1, device.pack())
            if device.STATE is not NoState:
                with pytest.raises(Invalid):
                    device.unpack(device.STATE.VERSION, msgspec.msgpack.encode({}))


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    with a_pc(tmp_path_factory.mktemp("driven")) as pc:
        for name in NAMES:
            drive(pc, name, 11, count=40)
        yield pc


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_whole_or_taken(driven, data):
    before = saved(driven)
    name = data.draw(st.sampled_from(NAMES))
    device = driven.devices[name]
    version, packed = before[name]
    blob = bytearray(packed)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), max_size=3)):
        blob[at % len(blob)] = value
    try:
        state = device.unpack(version, bytes(blob))
    except Invalid:
        assert saved(driven) == before
        return
    with driven.asleep():
        device.load(state)
    drive(driven, name, 12, count=5)
    load(driven, before)


def test_nothing_comes_into_ram_while_the_card_sleeps(folder):
    with a_pc(folder) as pc:
        card = pc.devices["net0"]
        begin_virtio(Guest(pc), card)
        with pc.asleep():
            assert card._asleep
        assert not card._asleep
