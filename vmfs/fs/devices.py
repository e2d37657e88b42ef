"""dev/: a directory a device, `add`, by which disks, networks and shares are attached, and `unclaimed`: what no
device has.

DEVICE_FILES are the files of a device, a row each. A device is detached by rmdir, before the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from vmfs.devices.attach import Writer, attach, parse_attachment
from vmfs.devices.device import Device
from vmfs.devices.pci import PciDevice
from vmfs.fs.inodes import Directory, File, Handle, Kind, Node, Scope
from vmfs.fs.kinds import Text
from vmfs.fs.lines import Do, LineHandle, Undo
from vmfs.fs.rights import as_user, credentials_of, open_path
from vmfs.fs.scopes import MachineScope
from vmfs.machine.machine import Vm
from vmfs.words.errors import NotPermitted, Unsupported


class DeviceScope(Scope):
    """One device of a machine, with which it goes."""

    def __init__(self, machine: MachineScope, device: Device) -> None:
        self.machine = machine
        self.device = device
        super().__init__()

    @property
    def removed(self) -> bool:  # type: ignore[override]
        return self._removed or self.machine.removed

    @removed.setter
    def removed(self, value: bool) -> None:
        self._removed = value

    def modified_ns(self) -> int:
        return self.machine.modified_ns()

    def touch(self) -> None:
        self.machine.touch()

    def complain(self, sentence: str, about: object) -> None:
        self.machine.complain(sentence, about)

    def succeeded(self, about: object) -> None:
        self.machine.succeeded(about)


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


_KINDS = {row.name: _text_of(row) for row in DEVICE_FILES}


_UNCLAIMED = Text(lambda scope: scope.vm.unclaimed())


@dataclass(frozen=True)
class Add(Kind):
    """`dev/add`: a command a write."""

    readable = False
    writable = True

    def open(self, node: File, pid: int, nonblocking: bool, writing: bool) -> Handle:
        return _AddHandle(node, pid, nonblocking, writing)


class _AddHandle(LineHandle):
    def __init__(self, node: File, pid: int, nonblocking: bool, writing: bool) -> None:
        super().__init__(node, pid, nonblocking, writing)
        self._who = credentials_of(pid)

    def parse(self, text: str) -> Do:
        asked, vm, who, own_device = parse_attachment(text), self.scope.vm, self._who, self.scope.host.own_device
        writer = Writer(partial(as_user, who), partial(open_path, own_device=own_device), who, own_device)

        async def do() -> Undo:
            # In a thread: a path may be on a slow file system.
            device = await trio.to_thread.run_sync(attach, vm, asked, writer)
            return Undo(
                (device,),
                lambda devices: _detach(vm, devices),
                lambda: lambda: not vm.has_run,
                join=lambda one, two: one + two,
            )

        return do


async def _detach(vm: Vm, devices: tuple[PciDevice, ...]) -> None:
    def work() -> None:
        for device in reversed(devices):
            if vm.board is not None and vm.board.devices.get(device.name) is device:
                vm.detach(device)

    await trio.to_thread.run_sync(work)


class DevicesDirectory(Directory):
    """dev/."""

    scope: MachineScope

    def __init__(self, machine: Directory, umask: int) -> None:
        super().__init__(machine.inodes, machine.scope, "dev", machine.mode, machine.uid, machine.gid)
        self._umask = umask
        for name, mode, kind in (("add", 0o222, Add()), ("unclaimed", 0o444, _UNCLAIMED)):
            self.add(File(self.inodes, self.scope, name, mode & ~umask, self.uid, self.gid, kind))

    async def lookup(self, name: str) -> Node | None:
        self._refresh()
        return await super().lookup(name)

    async def entries(self) -> Iterable[tuple[str, Node]]:
        self._refresh()
        return await super().entries()

    async def rmdir(self, name: str) -> None:
        self._refresh()
        child = self.children.get(name)
        if not isinstance(child, _DeviceDirectory):
            raise NotPermitted(f"{name} is no device")
        self.scope.vm.detach(child.scope.device)
        self._refresh()

    def _refresh(self) -> None:
        """Have the directories of the devices that there are."""
        board = self.scope.vm.board
        devices = dict(board.devices) if board is not None else {}
        for name, node in list(self.children.items()):
            if isinstance(node, _DeviceDirectory) and devices.get(name) is not node.scope.device:
                self.take(name)
                node.scope.remove()
                self.inodes.remove(node)
        for name, device in devices.items():
            if name not in self.children:
                self.add(_DeviceDirectory(self, DeviceScope(self.scope, device), self._umask))


class _DeviceDirectory(Directory):
    scope: DeviceScope
    attr_seconds = 0

    def __init__(self, parent: Directory, scope: DeviceScope, umask: int) -> None:
        super().__init__(parent.inodes, scope, scope.device.name, parent.mode, parent.uid, parent.gid)
        for row in DEVICE_FILES:
            mode = row.mode & ~umask
            self.add(File(self.inodes, scope, row.name, mode, self.uid, self.gid, _KINDS[row.name]))


def require_board(scope: MachineScope) -> Any:
    """The board of a machine that has devices, else Unsupported."""
    board = scope.vm.board
    if board is None:
        raise Unsupported("a bare machine has no devices: write pc to machine first")
    return board
