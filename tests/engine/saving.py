"""Copies of a machine within a process: a fork, and a saved machine that comes in elsewhere."""

from __future__ import annotations

import os

from vmfs.engine import by_name
from vmfs.machine import copies
from vmfs.machine.arrivals import Arrival
from vmfs.machine.files.arrivals import rebuild
from vmfs.machine.machine import Vm


class Door:
    """Which has room, and opens what it is asked for."""

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags, 0o600)

    def reserve(self, what: str, size: int) -> None:
        pass

    release = reserve


class Contents:
    """What `rebuild` needs of a machine's."""

    door = Door()
    arrivals = type("", (), {"is_live": False})

    def __init__(self, vm: Vm) -> None:
        self.vm = vm

    def plug_consoles(self) -> None:
        """Nobody has one open."""


def be(child: Vm, memory: list[int], files: list[int] | None = None) -> None:
    """Be the copy that these are. They are closed."""
    files = files or []
    try:
        copies.become(child, copies.read_description(memory), memory, files, by_name, Door())
    finally:
        for fd in (*memory, *files):
            os.close(fd)


def fork_of(vm: Vm, name: str = "") -> Vm:
    """A machine of a copy of what it is, or of a snapshot."""
    snapshot = vm.past[name] if name else vm.past.take("", is_kept=False)
    copy = copies.copy_of(vm, snapshot, 1)
    child = Vm(vm.engine)
    be(child, [os.dup(fd) for fd in copy.memory], [os.dup(fd) for fd in copy.files])
    return child


def arrival_of(vm: Vm, name: str) -> Arrival:
    """A snapshot of it, on its way in elsewhere."""
    snapshot, arrival = vm.past[name], Arrival(name, Door())
    arrival.write(arrival.make("state"), 0, snapshot.encoded)
    pieces = {"mem": (snapshot.ram.read, list(snapshot.ram.extents()), snapshot.ram.end)}
    for disk, frozen in snapshot.overlays.items():
        pieces[f"disks/{disk}"] = frozen.read_at, list(frozen.extents()), frozen.size
    for part in snapshot.record.names() if snapshot.record is not None else ():
        one = snapshot.record.file(part, snapshot.ram)
        pieces[f"history/{part}"] = one.read_at, list(one.extents()), one.size
    for path, (read, extents, size) in pieces.items():
        file = arrival.make(path)
        for start, end in extents:
            arrival.write(file, start, read(start, end - start))
        arrival.truncate(file, size)
    for name_, kept in (*snapshot.images.items(), *(() if snapshot.rom is None else (("rom", snapshot.rom.kept),))):
        arrival.write(arrival.make(f"images/{name_}"), 0, kept.read_at(0, kept.size))
    return arrival


def save(vm: Vm) -> Arrival:
    """What it is now, as `saved`."""
    vm.past.take("saved")
    try:
        return arrival_of(vm, "saved")
    finally:
        vm.past.drop("saved")


def come_in(vm: Vm, arrival: Arrival) -> None:
    """Be a machine of the parts that it is of, and that; it is a snapshot of `vm` from now on."""
    made = arrival.snapshot(vm.engine, by_name)
    vm.past.adopt(made.snapshot)
    arrival.close()
    rebuild(Contents(vm), made.snapshot)  # type: ignore[arg-type]
