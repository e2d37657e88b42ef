"""ATTACHABLE: what a user attaches to a PC, a row a kind, by a line such as `blk /srv/disk.img rw`.

The words after the kind are the row's arguments; a path with spaces is quoted as in a shell. A device goes into a free
slot of the PCI bus, a drive into its controller, before the first run.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmfs.devices.device import Device
from vmfs.devices.floppy import FloppyDrive
from vmfs.devices.ide.ata import AtaDisk
from vmfs.devices.ide.atapi import CdDrive
from vmfs.devices.ide.drive import NAMES
from vmfs.devices.machine import Pc
from vmfs.devices.medium import Removable
from vmfs.devices.network.backends import Backend, Passt, Tap, Unplugged, Wire
from vmfs.devices.network.capture import Capture
from vmfs.devices.network.card import Card
from vmfs.devices.network.e1000 import E1000
from vmfs.devices.network.ne2000 import Ne2000, Ne2000Pci
from vmfs.devices.network.rtl8139 import Rtl8139
from vmfs.devices.nvme.controller import Nvme
from vmfs.devices.pflash import NAMES as FLASH_NAMES
from vmfs.devices.pflash import Pflash
from vmfs.devices.sata.ahci import NAMES as SATA_NAMES
from vmfs.devices.serial import Serial
from vmfs.devices.usb.hid import UsbKeyboard, UsbTablet
from vmfs.devices.usb.storage import UsbDisk
from vmfs.devices.usb.xhci import PLACES as USB_PLACES
from vmfs.devices.virtio.block import Block
from vmfs.devices.virtio.console import Console
from vmfs.devices.virtio.disk import Disk, Overlay, RawDisk, open_disk
from vmfs.devices.virtio.edid import MOST as EDID_MOST
from vmfs.devices.virtio.gpu import Gpu
from vmfs.devices.virtio.net import Net
from vmfs.devices.virtio.rng import Rng
from vmfs.devices.virtio.share import RemoteServer, Share
from vmfs.machine.machine import Vm
from vmfs.machine.state import Attached
from vmfs.words import nets
from vmfs.words.door import Door
from vmfs.words.errors import Busy, Invalid, LimitReached, Unsupported
from vmfs.words.images import FORMATS, HEAD, format_of

_GPU_SIZE, _GPU_LEAST = (1024, 768), 64
PCAP_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, slots=True)
class Request:
    """The board, the device's name, and the words of the line after its kind."""

    board: Pc
    name: str
    words: list[str]
    place: int | None = None  # of what was there before: its slot

    @property
    def slot(self) -> int:
        """For what goes into a slot of the PCI bus."""
        return self.board.pci.free_slot() if self.place is None else self.place


@dataclass(frozen=True, slots=True)
class Row:
    """`usage` is the line; `least` and `most` are how many words may follow the kind.

    `acquire` gets what the host has to give, through the door and with no lock held; `make` makes the device of it, by
    the name that `name` gives. For a fork, `hand` says which descriptors of such a device another process needs, and
    raises where it cannot have one; `take` makes of them what `acquire` gave. `mode`: of the disk or medium that a line
    gives it, ro, rw or cow, and empty where it gives none; it is one descriptor then.
    """

    usage: str
    least: int
    most: int
    acquire: Callable[[Door, list[str]], Any]
    make: Callable[[Request, Any], Device]
    name: Callable[[Pc, str, list[str]], str] = lambda board, kind, words: _by_number(board, kind, words)
    hand: Callable[[Any], tuple[int, ...]] = lambda device: _alone(device)
    take: Callable[[Door, list[str], tuple[int, ...]], Any] = lambda door, words, fds: None
    mode: Callable[[list[str]], str] = lambda words: ""


def _by_number(board: Pc, kind: str, words: list[str]) -> str:
    return _numbered(board, kind)


def _alone(device: Device) -> tuple[int, ...]:
    raise Unsupported(f"{device.name} can be no other machine's, too")


def _numbered(board: Pc, kind: str) -> str:
    """`kind` and the first number that no device has."""
    number = 0
    while f"{kind}{number}" in board.devices:
        number += 1
    return f"{kind}{number}"


_AS = "as="


def _drive_name(board: Pc, words: list[str], order: Sequence[str]) -> str:
    """What `as=` says; else the first of `order` that is free."""
    for word in words:
        if word.startswith(_AS):
            name = word.removeprefix(_AS)
            if name not in NAMES:
                raise Invalid(f"dev/add: a drive is {', '.join(NAMES)}, not {name[:20]!r}")
            return name
    free = board.free_drives()
    name = next((name for name in order if name in free), "")
    if not name:
        raise LimitReached(f"dev/add: an IDE controller has {len(NAMES)} drives, and all are there")
    return name


def _sata_name(board: Pc, kind: str, words: list[str]) -> str:
    free = board.free_drives(SATA_NAMES)
    if not free:
        raise LimitReached(f"dev/add: an AHCI controller has {len(SATA_NAMES)} ports, and a drive is at each")
    return free[0]


_UARTS_MOST = 4  # beside the four of every PC
_UART_IRQS = (3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15)


def _uart_name(board: Pc, kind: str, words: list[str]) -> str:
    free = board.free_drives([f"uart{number}" for number in range(_UARTS_MOST)])
    if not free:
        raise LimitReached(f"dev/add: a machine has up to {_UARTS_MOST} UARTs beside com1 to com4")
    return free[0]


def _make_uart(request: Request, _: Any) -> Device:
    try:
        port, irq = (int(word, 0) for word in request.words)
    except ValueError:
        raise Invalid("dev/add: a UART is a PORT and an IRQ, such as `uart 0x2a0 5`") from None
    if not 0x100 <= port <= 0xFFF8 or port % 8:
        raise Invalid(f"dev/add: a UART has 8 ports from a multiple of 8, from 0x100 to 0xfff8, not from {port:#x}")
    if irq not in _UART_IRQS:
        raise Invalid(f"dev/add: a UART has one of the IRQs {', '.join(map(str, _UART_IRQS))}, not {irq}")
    return Serial(request.board, request.name, port, irq)


def _usb_name(board: Pc, kind: str, words: list[str]) -> str:
    names = [name for name in USB_PLACES if name.startswith(kind)]
    free = board.free_drives(names)
    if not free:
        raise LimitReached(f"dev/add: a machine has up to {len(names)} of {kind}, and all are there")
    return free[0]


_FORMAT = "format="


def _plain(words: list[str]) -> list[str]:
    """Without the options, which are `as=` and `format=`."""
    return [word for word in words if not word.startswith((_AS, _FORMAT))]


def _format_in(words: list[str]) -> str:
    """What `format=` says; empty where it says nothing."""
    for word in words:
        if word.startswith(_FORMAT):
            name = word.removeprefix(_FORMAT)
            if name not in FORMATS:
                raise Invalid(f"dev/add: a disk's format is {', '.join(FORMATS)}, not {name[:20]!r}")
            return name
    return ""


def _disk_mode(words: list[str]) -> str:
    words = _plain(words)
    return words[1] if len(words) > 1 else "rw"


def _open_disk(door: Door, words: list[str]) -> Any:
    kind, words = _format_in(words), _plain(words)
    if not 1 <= len(words) <= 2:
        raise Invalid("dev/add: a disk is a PATH, and ro, rw or cow")
    path, mode = words[0], _disk_mode(words)
    return _open_image(door, path, mode, kind), path


def _open_image(door: Door, path: str, mode: str, kind: str = "") -> Disk:
    """`kind`: its format; empty: what its first bytes say."""
    if mode not in ("ro", "rw", "cow"):
        raise Invalid(f"a disk is ro, rw or cow, not {mode[:20]!r}")
    flags = os.O_RDWR if mode == "rw" else os.O_RDONLY
    fd = door.open(path, flags)
    try:
        found = kind or format_of(os.pread(fd, HEAD, 0))
    except OSError:  # a folder: `open_disk` says what is wrong
        found = "raw"
    if found == "raw":
        return _image_of(door, fd, mode)
    os.close(fd)
    if mode == "rw":
        raise Invalid(f"{path}: it is {found}, which is read and not written: ro or cow; format=raw takes it as it is")
    taken = _Taken(Room(door))
    try:
        fd, _ = door.unpack(path, kind, taken.take)
        disk = _image_of(door, fd, mode)
    except BaseException:
        taken.release()
        raise
    base = disk.base if isinstance(disk, Overlay) else disk
    assert isinstance(base, RawDisk)
    base.at_close = taken.release
    return disk


def _image_of(door: Door, fd: int, mode: str) -> Disk:
    return open_disk(fd, mode, lambda: unnamed_file(door), Room(door))


def _open_cdrom(door: Door, words: list[str]) -> Any:
    kind, words = _format_in(words), _plain(words)
    if len(words) > 1:
        raise Invalid(f"dev/add: it is `{ATTACHABLE['cdrom'].usage}`")
    return (_open_image(door, words[0], "ro", kind), words[0]) if words else None


def _make_cdrom(request: Request, disc: Any) -> Device:
    disk, path = disc or (None, "")
    return CdDrive(request.board, request.name, disk, path=path)


def _open_floppy(door: Door, words: list[str]) -> Any:
    return _open_disk(door, words) if words else None


def _make_floppy(request: Request, floppy: Any) -> Device:
    disk, path = floppy or (None, "")
    return FloppyDrive(request.board, request.name, disk, path=path)


def _flash_name(board: Pc, kind: str, words: list[str]) -> str:
    if len(board.flash) == len(FLASH_NAMES):
        raise LimitReached(f"dev/add: a machine has up to {len(FLASH_NAMES)} flash chips")
    return FLASH_NAMES[len(board.flash)]


def _make_flash(request: Request, disk: Any) -> Device:
    return Pflash(request.board, request.name, disk[0], request.board.flash_end, path=disk[1])


def _floppy_name(board: Pc, kind: str, words: list[str]) -> str:
    free = board.free_floppies()
    if not free:
        raise LimitReached("dev/add: a floppy controller has two drives, and both are there")
    return free[0]


def parse_medium(drive: Any, text: str) -> Callable[[Door], None]:
    """What a text written to the `media` of a drive asks for: a path, quoted as in a shell, perhaps with a mode; or
    `eject`, `eject force`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Invalid(f"media: {error}") from None
    if len(text.splitlines()) != 1 or not 1 <= len(words) <= 2:
        raise Invalid(f"media: it takes a PATH ({'|'.join(drive.MODES)}), or eject [force]")
    if words[0] == "eject":
        if words[1:] not in ([], ["force"]):
            raise Invalid("media: it is `eject`, or `eject force`")
        return lambda door: drive.eject(force=len(words) > 1)
    mode = words[1] if len(words) > 1 else drive.MODES[0]
    if mode not in drive.MODES:
        raise Invalid(f"media: {drive.name} takes {' or '.join(drive.MODES)}, not {mode[:20]!r}")

    def insert(door: Door) -> None:
        drive.check_changeable()
        disk = _open_image(door, words[0], mode)
        try:
            drive.insert(disk, words[0])
        except BaseException:
            disk.close()
            raise

    return insert


def unnamed_file(door: Door) -> int:
    """For what is written to a disk, on the host's disk."""
    return door.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR)


def _hand_disk(device: Block | AtaDisk | UsbDisk | Removable) -> tuple[int, ...]:
    disk: Any = device.disk
    if disk is None:  # of a drive that is empty
        return ()
    if disk.mode == "rw":
        raise Busy(f"{device.name} is a disk that is rw, which two machines cannot write: attach it with cow")
    return ((disk.base if disk.mode == "cow" else disk).fd,)


def _take_disk(door: Door, words: list[str], fds: tuple[int, ...], mode: str = "") -> Any:
    (fd,) = fds
    mode = mode or _disk_mode(words)
    if mode not in ("ro", "cow"):
        os.close(fd)
        raise Invalid("a fork has no disk that is rw")
    return _image_of(door, fd, mode), _plain(words)[0]


def _take_floppy(door: Door, words: list[str], fds: tuple[int, ...]) -> Any:
    return _take_disk(door, words, fds) if fds else None


def _take_cdrom(door: Door, words: list[str], fds: tuple[int, ...]) -> Any:
    return _take_disk(door, words, fds, "ro") if fds else None


def _nothing(door: Door, words: list[str]) -> None:
    return None


class Room:
    """Room for an overlay counts as memory of the machine does."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def reserve(self, size: int) -> None:
        self._door.reserve("beside", size)

    def release(self, size: int) -> None:
        self._door.release("beside", size)


class _Taken:
    """What a file of an unpacked image has of the room."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = 0

    def take(self, size: int) -> None:
        self._room.reserve(size)
        self._size += size

    def release(self) -> None:
        size, self._size = self._size, 0
        if size:
            self._room.release(size)


def _open_gpu(door: Door, words: list[str]) -> Room:
    gpu_size(words)
    return Room(door)


def gpu_size(words: list[str]) -> tuple[int, int]:
    """Of the screen, in pixels."""
    if not words:
        return _GPU_SIZE
    found = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", words[0], re.ASCII)
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(_GPU_LEAST <= pixels <= EDID_MOST for pixels in size):
        raise Invalid(f"dev/add: a screen has {_GPU_LEAST} to {EDID_MOST} pixels, as 1280x800, not {words[0][:20]!r}")
    return size


def _open_net(door: Door, words: list[str]) -> Any:
    asked = nets.parse(words, tuple(_CARDS))
    backend = _open_backend(door, asked)
    try:
        capture = Capture(door.open(asked.pcap, PCAP_FLAGS), asked.pcap) if asked.pcap else None
    except BaseException:
        backend.close()
        raise
    return _Cable(backend, capture)


def parse_pcap(text: str) -> Callable[[Door, Card], None]:
    """What a text written to the `pcap` of a card asks for: a path, quoted as in a shell, or `off`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Invalid(f"pcap: {error}") from None
    if len(text.splitlines()) != 1 or len(words) != 1:
        raise Invalid("pcap: it takes a PATH, or off")
    (path,) = words

    def change(door: Door, card: Card) -> None:
        card.set_capture(None if path == "off" else Capture(door.open(path, PCAP_FLAGS), path))

    return change


def _open_backend(door: Door, asked: nets.NetLine) -> Backend:
    if asked.kind == "user":
        return Passt(*door.passt(asked.rest))
    (name,) = asked.rest
    return Tap(door.tap(name), name) if asked.kind == "tap" else Wire(door.wire(name), name)


@dataclass(frozen=True, slots=True)
class _Cable:
    """What a card is plugged into."""

    backend: Backend
    capture: Capture | None = None

    def close(self) -> None:
        self.backend.close()
        if self.capture is not None:
            self.capture.close()


def _make_net(request: Request, cable: _Cable) -> Device:
    asked = nets.parse(request.words, tuple(_CARDS))
    card = _CARDS[asked.model](request, cable.backend, asked.mac or _mac(request))
    card.set_capture(cable.capture)
    return card


_CARDS: Mapping[str, Callable[[Request, Backend, bytes], Card]] = {
    "virtio": lambda request, backend, mac: Net(request.board, request.name, request.slot, backend, mac),
    "e1000": lambda request, backend, mac: E1000(request.board, request.name, request.slot, backend, mac),
    "rtl8139": lambda request, backend, mac: Rtl8139(request.board, request.name, request.slot, backend, mac),
    "ne2000": lambda request, backend, mac: Ne2000(request.board, request.name, backend, mac),
    "ne2000-pci": lambda request, backend, mac: Ne2000Pci(request.board, request.name, request.slot, backend, mac),
}


def _mac(request: Request) -> bytes:
    """Locally administered; no two cards on a host's bridge shall have the same. A machine that is born as another one
    has the same cards."""
    return b"\x52\x54\x00" + request.board.own_bytes(f"mac of {request.name}", 3)


def _open_share(door: Door, words: list[str]) -> Any:
    mode = words[2] if len(words) > 2 else "rw"
    if mode not in ("ro", "rw"):
        raise Invalid(f"dev/add: a share is ro or rw, not {mode[:20]!r}")
    return RemoteServer(door.share(words[0], mode == "ro"), read_only=mode == "ro")


def _hand_share(device: Share) -> tuple[int, ...]:
    raise Busy(f"{device.name} is a share, whose open files are those of one machine")


def _make_share(request: Request, server: Any) -> Device:
    path, tag = request.words[:2]
    return Share(request.board, request.name, request.slot, server, tag, path=path)


def _disk(
    line: str,
    most: int,
    make: Callable[[Request, Any], Device],
    name: Callable[[Pc, str, list[str]], str] = _by_number,
) -> Row:
    """Of a device that is one disk."""
    return Row(line, 1, most, _open_disk, make, name, hand=_hand_disk, take=_take_disk, mode=_disk_mode)


def _ata(line: str, most: int, name: Callable[[Pc, str, list[str]], str]) -> Row:
    """A disk at a controller of ATA's."""
    return _disk(line, most, lambda request, disk: AtaDisk(request.board, request.name, disk[0], path=disk[1]), name)


def _atapi(line: str, most: int, name: Callable[[Pc, str, list[str]], str]) -> Row:
    """A CD-ROM drive at one."""
    return Row(
        line,
        0,
        most,
        _open_cdrom,
        _make_cdrom,
        name,
        hand=_hand_disk,
        take=_take_cdrom,
        mode=lambda words: "ro" if _plain(words) else "",
    )


def _ide_name(board: Pc, kind: str, words: list[str]) -> str:
    return _drive_name(board, words, NAMES)


def _ide_cdrom_name(board: Pc, kind: str, words: list[str]) -> str:
    return _drive_name(board, words, ("hdc", "hdd", "hdb", "hda"))


ATTACHABLE: Mapping[str, Row] = {
    "blk": _disk(
        "blk PATH [ro|rw|cow] [format=FORMAT]",
        3,
        lambda request, disk: Block(request.board, request.name, request.slot, disk[0], path=disk[1]),
    ),
    "ide": _ata("ide PATH [ro|rw|cow] [as=hda|hdb|hdc|hdd] [format=FORMAT]", 4, _ide_name),
    "cdrom": _atapi("cdrom [PATH] [as=hda|hdb|hdc|hdd] [format=FORMAT]", 3, _ide_cdrom_name),
    "ahci": _ata("ahci PATH [ro|rw|cow] [format=FORMAT]", 3, _sata_name),
    "ahci-cdrom": _atapi("ahci-cdrom [PATH] [format=FORMAT]", 2, _sata_name),
    "nvme": _disk(
        "nvme PATH [ro|rw|cow] [format=FORMAT]",
        3,
        lambda request, disk: Nvme(request.board, request.name, request.slot, disk[0], path=disk[1]),
    ),
    "usb-disk": _disk(
        "usb-disk PATH [ro|rw|cow] [format=FORMAT]",
        3,
        lambda request, disk: UsbDisk(request.board, request.name, disk[0], path=disk[1]),
        _usb_name,
    ),
    "usb-kbd": Row(
        "usb-kbd", 0, 0, _nothing, lambda r, _: UsbKeyboard(r.board, r.name), _usb_name, hand=lambda device: ()
    ),
    "usb-tablet": Row(
        "usb-tablet",
        0,
        0,
        _nothing,
        lambda r, _: UsbTablet(r.board, r.name, lambda: r.board.shown.size()),
        _usb_name,
        hand=lambda device: (),
    ),
    "floppy": Row(
        "floppy [PATH [ro|rw|cow] [format=FORMAT]]",
        0,
        3,
        _open_floppy,
        _make_floppy,
        _floppy_name,
        hand=_hand_disk,
        take=_take_floppy,
        mode=lambda words: _disk_mode(words) if _plain(words) else "",
    ),
    "pflash": _disk("pflash PATH [ro|rw|cow]", 2, _make_flash, _flash_name),
    "net": Row(
        nets.USAGE,
        1,
        32,
        _open_net,
        _make_net,
        hand=lambda device: (),
        take=lambda door, words, fds: _Cable(Unplugged()),
    ),
    "uart": Row("uart PORT IRQ", 2, 2, _nothing, _make_uart, _uart_name, hand=lambda device: ()),
    "gpu": Row(
        "gpu [WIDTHxHEIGHT]",
        0,
        1,
        _open_gpu,
        lambda request, room: Gpu(request.board, request.name, request.slot, room, gpu_size(request.words)),
        hand=lambda device: (),
        take=lambda door, words, fds: Room(door),
    ),
    "rng": Row("rng", 0, 0, _nothing, lambda r, _: Rng(r.board, r.name, r.slot), hand=lambda device: ()),
    "hvc": Row("hvc", 0, 0, _nothing, lambda r, _: Console(r.board, r.name, r.slot), hand=lambda device: ()),
    "share": Row(
        "share FOLDER TAG [ro|rw]",
        2,
        3,
        _open_share,
        _make_share,
        hand=_hand_share,
    ),
}


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a line asks for."""

    kind: str
    arguments: list[str]


def parse_attachment(text: str) -> Attachment:
    if len(text.splitlines()) != 1:
        raise Invalid(f"dev/add takes one line: {usages()}")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Invalid(f"dev/add: {error}") from None
    if not words or words[0] not in ATTACHABLE:
        raise Invalid(f"dev/add: there is no {(words or [''])[0][:40]!r}: {usages()}")
    row = ATTACHABLE[words[0]]
    if not row.least <= len(words) - 1 <= row.most:
        raise Invalid(f"dev/add: it is `{row.usage}`")
    return Attachment(words[0], words[1:])


def attach(vm: Vm, asked: Attachment, door: Door) -> Device:
    """Do what a line says. Busy after the first run."""
    kind, arguments, row = asked.kind, asked.arguments, ATTACHABLE[asked.kind]
    vm.check_attachable()
    resource = row.acquire(door, arguments)

    def make(board: Pc) -> Device:
        return row.make(Request(board, row.name(board, kind, arguments), arguments), resource)

    try:
        return vm.attach(make, kind, arguments)
    except BaseException:
        close_resource(resource)
        raise


def remake(board: Pc, one: Attached, resource: Any) -> None:
    """Have a device as it was attached, with what the host has given for it."""
    request = Request(board, one.name, list(one.words), one.slot)
    board.plug(ATTACHABLE[one.kind].make(request, resource))


def row_of(one: Attached) -> Row:
    """Invalid where there is none."""
    row = ATTACHABLE.get(one.kind)
    if row is None or not row.least <= len(one.words) <= row.most:
        raise Invalid(f"{one.name}: {one.kind[:40]!r} is no device that can be attached so")
    return row


def close_resource(resource: Any) -> None:
    one = resource[0] if isinstance(resource, tuple) else resource
    if one is not None:
        one.close()


def usages() -> str:
    return ", ".join(f"`{row.usage}`" for row in ATTACHABLE.values())
