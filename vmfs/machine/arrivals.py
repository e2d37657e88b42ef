"""Arrivals: saved machines on their way in: the files of a snapshot's directory, written from outside, until they are a
snapshot.

Whoever writes them is the machine's owner, and yet they are hostile: they may come from anywhere, cut and mended. What
they say is looked at as a whole before anything of the machine changes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from vmfs.devices import _chips
from vmfs.devices.virtio.disk import CLUSTER, SECTOR, Frozen, Written
from vmfs.engine.base import Engine
from vmfs.machine import record
from vmfs.machine.attach import Room, row_of, unnamed_file
from vmfs.machine.images import NAMES, Kept
from vmfs.machine.past import Rom, Snapshot
from vmfs.machine.state import Setup, State, setup_of
from vmfs.memory.hostfile import punch
from vmfs.memory.layers import Image, Layer, extents, is_sealed
from vmfs.memory.ram import MAXIMUM_SIZE, check_size, regions_of
from vmfs.words.door import Door
from vmfs.words.errors import AlreadyThere, Busy, Invalid, LimitReached, NotPermitted, NotThere, VmfsError

FILES_MOST = 200
STATE_MOST = 64 << 20  # bytes
_ROOM_STEP = 4 << 20
_ZEROS = bytes(1 << 20)  # more than comes at a time
_PART = re.compile(r"[A-Za-z0-9._-]{1,100}", re.ASCII)
_FOLDERS = ("disks", "images", record.FOLDER)
_ON_DISK = ("disks/", f"{record.FOLDER}/disk.")  # of the host: all that is written to disks
_TAKEN = re.compile(rb"^taken (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", re.MULTILINE)
_INSTRUCTIONS = re.compile(rb"^instructions (\d{1,19})$", re.MULTILINE)


def images_of(snapshot: Snapshot) -> dict[str, Kept]:
    """What of a snapshot stands in images/."""
    return {**snapshot.images, **({} if snapshot.rom is None else {"rom": snapshot.rom.kept})}


class ArrivingFile:
    """`writers`: how often it is open for writing. `is_shared`: others have its bytes, too, and nobody changes them."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.writers = 0
        self.is_shared = False

    def share(self, fd: int) -> None:
        """Have what a sealed memfd has, which is this object's now."""
        os.close(self.fd)
        self.fd, self.is_shared = fd, True

    def check_own(self) -> None:
        if self.is_shared:
            raise NotPermitted("its bytes are a sealed memfd's, which nobody can change")

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    @property
    def taken(self) -> int:
        return os.fstat(self.fd).st_blocks * SECTOR

    def extents(self) -> Iterator[tuple[int, int]]:
        return extents(self.fd, 0, self.size)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)


@dataclass(frozen=True, slots=True)
class Made:
    """What an arrival has come to. `setup` is that of the state."""

    snapshot: Snapshot
    setup: Setup


class Arrival:
    """One directory. For one thread at a time."""

    def __init__(self, name: str, door: Door) -> None:
        self.name = name
        self._door = door
        self._room = Room(door)
        self._held = 0
        self.files: dict[str, ArrivingFile] = {}

    # ---- the files

    def make(self, path: str) -> ArrivingFile:
        """A new, empty file; AlreadyThere, Invalid."""
        folder, _, name = path.rpartition("/")
        if folder not in ("", *_FOLDERS) or not _PART.fullmatch(name) or name in ("..", ".") or path in _FOLDERS:
            raise Invalid(f"a saved machine has no file {path[:80]!r}")
        if path in self.files:
            raise AlreadyThere(f"there is a {path} already")
        if len(self.files) >= FILES_MOST:
            raise LimitReached(f"a saved machine has up to {FILES_MOST} files")
        self.files[path] = file = ArrivingFile(self._new(path))
        return file

    def _new(self, path: str) -> int:
        if path.startswith(_ON_DISK):
            return unnamed_file(self._door)
        return os.memfd_create("vmfs-arrival", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def fill(self, path: str, source: str) -> None:
        """Have what the sealed memfd has that a path of the host names. Invalid for any other file: its bytes may
        change."""
        file = self[path]
        if path.startswith(_ON_DISK):
            raise Invalid("a disk's file is written, and no memory")
        if file.writers:
            raise Busy(f"{path} is still written")
        fd = self._door.open(source, os.O_RDONLY)
        try:
            if not is_sealed(fd):
                raise Invalid(f"{source[:200]} is no sealed memfd: its bytes may change")
            if os.fstat(fd).st_size > MAXIMUM_SIZE:
                raise LimitReached(f"a saved machine has no file of {os.fstat(fd).st_size} bytes")
            self._hold(os.fstat(fd).st_blocks * SECTOR)
        except BaseException:
            os.close(fd)
            raise
        file.share(fd)

    def __getitem__(self, path: str) -> ArrivingFile:
        file = self.files.get(path)
        if file is None:
            raise NotThere(f"there is no {path[:80]}")
        return file

    def remove(self, path: str) -> None:
        self[path]
        del self.files[path]

    def rename(self, path: str, new: str) -> None:
        file = self[path]
        if new.startswith(_ON_DISK) != path.startswith(_ON_DISK):
            raise Invalid("a disk's file stays one")
        self.files.pop(new, None)
        del self.files[path]
        try:
            self.make(new)
        except BaseException:
            self.files[path] = file
            raise
        self.files[new] = file

    def write(self, file: ArrivingFile, offset: int, data: bytes) -> int:
        """Zeros take nothing."""
        file.check_own()
        end = offset + len(data)
        if end > MAXIMUM_SIZE:
            raise LimitReached(f"a saved machine has no file of {end} bytes")
        if data == _ZEROS[: len(data)]:
            there = file.size
            if end > there:
                os.ftruncate(file.fd, end)
            if offset < there:
                first, last = -(-offset // CLUSTER) * CLUSTER, end // CLUSTER * CLUSTER
                if first < last and not punch(file.fd, first, last - first):
                    os.pwrite(file.fd, data[: first - offset], offset)
                    os.pwrite(file.fd, data[last - offset :], last)
                else:
                    os.pwrite(file.fd, data, offset)
            return len(data)
        self._hold(len(data) + 2 * CLUSTER)
        done = 0
        while done < len(data):
            done += os.pwrite(file.fd, data[done:], offset + done)
        return done

    def truncate(self, file: ArrivingFile, size: int) -> None:
        if size == file.size:
            return
        file.check_own()
        if size > MAXIMUM_SIZE:
            raise LimitReached(f"a saved machine has no file of {size} bytes")
        os.ftruncate(file.fd, size)

    def _hold(self, more: int) -> None:
        wanted = sum(file.taken for file in self.files.values()) + more
        if wanted > self._held:
            step = -(-(wanted - self._held) // _ROOM_STEP) * _ROOM_STEP
            self._room.reserve(step)
            self._held += step

    def close(self) -> None:
        """Nothing of it is needed any more; what a snapshot was made of counts as that."""
        self.files.clear()
        held, self._held = self._held, 0
        if held:
            self._room.release(held)

    # ---- whether it is whole

    def problems(self) -> list[str]:
        """A sentence for each thing that is missing or wrong."""
        found: list[str] = []
        try:
            setup = setup_of(self._state())
            found += self._problems(setup)
        except VmfsError as error:
            found.append(f"state: {error}")
        found += [f"{path} is still written" for path, file in sorted(self.files.items()) if file.writers]
        return found

    def _state(self) -> State:
        file = self.files.get("state")
        if file is None:
            raise Invalid("it is missing")
        if not 0 < file.size <= STATE_MOST:
            raise Invalid(f"it has {file.size} bytes")
        return State.decode(file.read(0, STATE_MOST))

    def _problems(self, setup: Setup) -> Iterator[str]:
        try:
            check_size(setup.memory)
        except Invalid as error:
            yield f"state: {error}"
            return
        wanted = {"mem": regions_of(setup.memory)[-1].end}
        if set(setup.images) - set(NAMES):
            yield "state: it has images that no machine has"
        wanted.update({f"images/{name}": size for name, size in setup.images.items()})
        if setup.rom is not None:
            wanted["images/rom"] = setup.rom[1]
        for path, size in wanted.items():
            if path not in self.files:
                yield f"{path} is missing"
            elif self.files[path].size != size:
                yield f"{path} has {self.files[path].size} bytes of {size}"
        for one in setup.attached:
            try:
                row = row_of(one)
            except Invalid as error:
                yield f"state: {error}"
                continue
            if row.mode(list(one.words)) == "cow" and f"disks/{one.name}" not in self.files:
                yield f"disks/{one.name} is missing"
        yield from record.problems(self._packed, self._sizes(f"{record.FOLDER}/"), setup, wanted["mem"])

    def _sizes(self, folder: str) -> dict[str, int]:
        return {path.removeprefix(folder): one.size for path, one in self.files.items() if path.startswith(folder)}

    def _packed(self) -> bytes:
        file = self.files[f"{record.FOLDER}/record"]
        if file.size > record.SIZE_MOST:
            raise Invalid(f"it has {file.size} bytes")
        return file.read(0, file.size)

    def snapshot(self, engine: Engine, others: Callable[[str], Engine]) -> Made:
        """What it is, whole. Invalid with the first thing that is wrong. `engine`: the machine's, for a state of one
        that does not work here; `others`: all that there are."""
        if any(file.writers for file in self.files.values()):
            raise Busy(f"{self.name} is still written")
        if problems := self.problems():
            raise Invalid(f"{self.name} is no whole machine: {problems[0]}")
        state = self._state()
        setup = setup_of(state)
        maps = {one.name: _overlay_of(state, one.name) for one in setup.attached}
        overlays = self._overlays("disks/", maps)
        try:
            named = others(setup.engine)
            engine = named if named.probe().available else engine
        except Invalid:  # there is no such engine here
            pass
        end = regions_of(setup.memory)[-1].end
        layer = Layer(os.dup(self.files["mem"].fd), None)
        layer.seal()
        info = self.files["info"].read(0, 4096) if "info" in self.files else b""
        taken, count = _TAKEN.search(info), _INSTRUCTIONS.search(info)
        snapshot = Snapshot(
            name=self.name,
            state=state,
            engine=engine,
            ram=Image((layer,), end),
            rom=None if setup.rom is None else Rom(self._kept("images/rom"), setup.rom[0]),
            images={name: self._kept(f"images/{name}") for name in setup.images},
            overlays=overlays,
            taken_ns=_date(taken[1].decode()) if taken else time.time_ns(),
            instructions=int(count[1]) if count else None,
            rw_disks=tuple(one.name for one in setup.attached if row_of(one).mode(list(one.words)) == "rw"),
            memory_size=setup.memory,
            encoded=state.encode(),
            record=self._record(setup, layer, end),
        )
        return Made(snapshot, setup)

    def _overlays(self, prefix: str, maps: Mapping[str, Mapping[int, bytes]]) -> dict[str, Frozen]:
        return {
            name: Frozen((self._written(f"{prefix}{name}", chunks),), self.files[f"{prefix}{name}"].size)
            for name, chunks in maps.items()
            if f"{prefix}{name}" in self.files
        }

    def _record(self, setup: Setup, ram: Layer, end: int) -> record.Record | None:
        """What stands in history/, beside RAM in that layer."""
        if f"{record.FOLDER}/record" not in self.files:
            return None
        packed = record.unpack(self._packed())
        state, exits = record.opened(packed, setup)
        others = Layer(os.dup(self.files[f"{record.FOLDER}/mem"].fd), int.from_bytes(packed.pages, "little"))
        others.seal()
        maps = {one.name: _overlay_of(state, one.name) for one in setup.attached}
        return record.Record(
            cpu=packed.cpu,
            of_cpus=packed.of_cpus,
            after_event=packed.after_event,
            end=packed.end,
            state=state,
            ram=Image((ram, others), end),
            overlays=self._overlays(f"{record.FOLDER}/disk.", maps),
            inputs=packed.inputs,
            exits=exits,
        )

    def _kept(self, path: str) -> Kept:
        file = self.files[path]
        return Kept(os.dup(file.fd), file.size)

    def _written(self, path: str, chunks: Mapping[int, bytes]) -> Written:
        file = self.files[path]
        count = -(-file.size // CLUSTER)
        for chunk, bits in chunks.items():
            last = int.from_bytes(bits, "little").bit_length() - 1
            if not 0 <= chunk < count // 512 + 1 or len(bits) != 64 or last < 0 or chunk * 512 + last >= count:
                raise Invalid(f"{path} has no such clusters as the state says")
        clusters = _chips.Clusters(count)
        clusters.load(dict(chunks))
        taken = file.taken
        self._room.reserve(taken)
        return Written(os.dup(file.fd), clusters, self._room, taken)


def _overlay_of(state: State, device: str) -> dict[int, bytes]:
    """Which clusters its disk had written; Invalid for what is no map."""
    part = state.parts.get(f"device/{device}")
    try:
        fields: Any = msgspec.msgpack.decode(part.data) if part is not None else {}
        return msgspec.convert(fields.get("overlay", {}), dict[int, bytes])
    except (msgspec.MsgspecError, AttributeError):
        raise Invalid(f"the state of {device} is none") from None


def _date(text: str) -> int:
    try:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000_000
    except ValueError:
        return time.time_ns()


