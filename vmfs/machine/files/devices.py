"""What stands in dev/: the devices, `add`, by which disks, networks and shares are attached, and `unclaimed`: what no
device has.

DEVICE_FILES are the files of a device, a row each. A device is detached by rmdir, before the first run.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.devices.device import Device
from vmfs.devices.medium import Removable
from vmfs.devices.network.card import Card
from vmfs.devices.parallel import ParallelPort
from vmfs.devices.speaker import Speaker, tone
from vmfs.devices.virtio.disk import SECTOR
from vmfs.machine.attach import attach, parse_attachment, parse_medium, parse_pcap
from vmfs.machine.files.console import TALKERS, Console, ConsolePort, Log, Talker
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.handles import File, Handle, Kind, Scope
from vmfs.machine.files.kinds import Text
from vmfs.machine.files.lines import Do, LineHandle, Undo
from vmfs.machine.files.snapshots import few
from vmfs.machine.files.waiting import finished
from vmfs.machine.machine import Vm
from vmfs.words.commands import (
    FOUND_CARD,
    FOUND_DIRECTORY,
    FOUND_DISK,
    FOUND_DRIVE,
    FOUND_PORT,
    FOUND_PRINTER,
    FOUND_SPEAKER,
)
from vmfs.words.errors import HostError, NotPermitted


class DeviceScope(Scope):
    """One device of a machine, with which it goes."""

    def __init__(self, machine: Contents, device: Device) -> None:
        self.machine = machine
        self.device = device
        super().__init__()

    @property
    def vm(self) -> Vm:
        return self.machine.vm

    def port_device(self, device: str) -> Talker | None:
        return self.machine.port_device(device or self.device.name)

    def console_port(self, device: str) -> ConsolePort | None:
        return self.machine.console_port(device or self.device.name)


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A file of a device."""

    name: str
    mode: int
    get: Callable[[Device], str]


def _address(device: Device) -> str:
    return "".join(f"{window}\n" for window in device.windows())


def _irq(device: Device) -> str:
    return "none\n" if device.irq is None else f"{device.irq}\n"


def _counters(device: Device) -> str:
    # Without the board's lock: a CPU holds it while a disk is slow, and nothing on the trio loop may wait for that.
    return "".join(f"{name} {count}\n" for name, count in dict(device.counters).items())


def _info(device: Device) -> str:
    return "".join(f"{name} {value}\n" for name, value in device.describe().items())


DEVICE_FILES: tuple[DeviceRow, ...] = (
    DeviceRow("type", 0o444, lambda device: f"{device.TYPE}\n"),
    DeviceRow("address", 0o444, _address),
    DeviceRow("irq", 0o444, _irq),
    DeviceRow("counters", 0o444, _counters),
    DeviceRow("info", 0o444, _info),
)


def _text_of(row: DeviceRow) -> Text:
    return Text(lambda scope: row.get(scope.device))


def _put_media(scope: Any, text: str) -> Do:
    """A path, or `eject`."""
    device, door = scope.device, scope.machine.door
    change = parse_medium(device, text)

    async def do() -> None:
        scope.machine.vm.check_no_history("media")
        # In a thread: a path may be on a slow file system, and a read of the old medium under way.
        await trio.to_thread.run_sync(change, door)

    return do


@dataclass(frozen=True)
class DiskImage(Kind):
    """What the guest has on a disk, as it is now."""

    walked = False  # it is not a file of the machine's, as `cp -r` would have it

    def size(self, scope: Any) -> int:
        disk = scope.device.disk
        return disk.size if disk is not None else 0

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _DiskHandle(node, nonblocking)


class _DiskHandle(Handle):
    async def read(self, offset: int, size: int) -> bytes:
        # In a thread: the host's disk may be slow, and a CPU hold the board's lock for it.
        return await trio.to_thread.run_sync(self._read, offset, size)

    def _read(self, offset: int, size: int) -> bytes:
        device = self.scope.device
        with device.board.lock:  # so that it is not closed meanwhile
            disk = device.disk
            end = min(offset + size, disk.size if disk is not None else 0)
            if offset >= end:
                return b""
            start = offset // SECTOR * SECTOR
            data = memoryview(bytearray(-(-end // SECTOR) * SECTOR - start))
            try:
                disk.read(start, [data])
            except OSError as error:
                raise HostError(error.errno or errno.EIO, f"{device.name}: {os.strerror(error.errno or 5)}") from None
        return bytes(data[offset - start : end - start])

    def extents(self) -> list[tuple[int, int]]:
        device = self.scope.device
        with device.board.lock:
            return few(device.disk.extents()) if device.disk is not None else []


async def _tone(scope: Any) -> str:
    pit = scope.vm.get_machine_state("pit")
    await finished(pit, scope)
    hertz = tone(pit.result())
    return f"{hertz:.1f}\n" if hertz else "off\n"


def _put_pcap(scope: Any, text: str) -> Do:
    """A path, or `off`."""
    change = parse_pcap(text)

    async def do() -> None:
        await trio.to_thread.run_sync(change, scope.machine.door, scope.device)

    return do


PCAP = Text(lambda scope: f"{scope.device.captured}\n", _put_pcap, acts=True)
MEDIA = Text(lambda scope: f"{scope.device.medium}\n", _put_media, acts=True)
DEVICE_KINDS = {row.name: _text_of(row) for row in DEVICE_FILES}
# Of a device, by what is found of it, what it has besides: OWN_FILES of vmfs.fs.files has the same names.
_IMAGE, _LOG = DiskImage(), Log("")
OWN_KINDS: Mapping[int, Mapping[str, Kind]] = {
    FOUND_DIRECTORY: {},
    FOUND_DISK: {"image": _IMAGE},
    FOUND_DRIVE: {"image": _IMAGE, "media": MEDIA},
    FOUND_PORT: {"stream": Console(""), "log": _LOG},
    FOUND_PRINTER: {"stream": Console("", takes=False), "log": _LOG},
    FOUND_SPEAKER: {"tone": Text(_tone, of_cpu=True)},
    FOUND_CARD: {"pcap": PCAP},
}


def _found(device: Device) -> int:
    if isinstance(device, Removable):
        return FOUND_DRIVE
    if device.HAS_DISK:
        return FOUND_DISK
    if isinstance(device, Card):
        return FOUND_CARD
    if isinstance(device, ParallelPort):
        return FOUND_PRINTER
    if isinstance(device, TALKERS):
        return FOUND_PORT
    return FOUND_SPEAKER if isinstance(device, Speaker) else FOUND_DIRECTORY


def kind_of(device: Device, name: str) -> Kind | None:
    """Of a file of a device; None where it has none of that name."""
    return DEVICE_KINDS.get(name) or OWN_KINDS[_found(device)].get(name)


UNCLAIMED = Text(lambda scope: scope.vm.unclaimed())


@dataclass(frozen=True)
class Add(Kind):
    """`dev/add`: a command a line."""

    readable = False
    writable = True

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _AddHandle(node, nonblocking, writing)


class _AddHandle(LineHandle):
    def parse(self, text: str) -> Do:
        asked, vm, door = parse_attachment(text), self.scope.vm, self.scope.door

        async def do() -> Undo:
            # In a thread: a path may be on a slow file system.
            device = await trio.to_thread.run_sync(attach, vm, asked, door)
            return Undo(
                (device,),
                lambda devices: _detach(vm, devices),
                lambda: lambda: not vm.has_run,
                join=lambda one, two: one + two,
            )

        return do


async def _detach(vm: Vm, devices: tuple[Device, ...]) -> None:
    def work() -> None:
        for device in reversed(devices):
            if vm.board is not None and vm.board.devices.get(device.name) is device:
                vm.detach(device)

    await trio.to_thread.run_sync(work)


# What stands in dev/ besides the devices.
DEV_KINDS: Mapping[str, Kind] = {"add": Add(), "unclaimed": UNCLAIMED}


class Devices:
    """The devices of a machine, each with the scope of its files."""

    def __init__(self, machine: Contents) -> None:
        self._machine = machine
        self._scopes: dict[str, DeviceScope] = {}

    def names(self) -> list[str]:
        self._refresh()
        return list(self._scopes)

    def scope(self, name: str) -> DeviceScope | None:
        self._refresh()
        return self._scopes.get(name)

    def found(self, name: str) -> int:
        """What a listing says of one that is there."""
        return _found(self._scopes[name].device)

    def remove(self, name: str) -> None:
        """Detach it."""
        scope = self.scope(name)
        if scope is None:
            raise NotPermitted(f"{name} is no device")
        self._machine.vm.detach(scope.device)
        self._refresh()

    def _refresh(self) -> None:
        """Have a scope for each device that there is, and end those of others."""
        board = self._machine.vm.board
        devices = dict(board.devices) if board is not None else {}
        for name, scope in list(self._scopes.items()):
            if devices.get(name) is not scope.device:
                del self._scopes[name]
                scope.remove()
        for name, device in devices.items():
            if name not in self._scopes:
                self._scopes[name] = DeviceScope(self._machine, device)
