"""Copies: a snapshot as descriptors and a description, of which another process makes a machine.

What makes a copy is hostile to whoever makes a machine of it: they may be two users'. So what is memory is sealed,
which is looked at again, and all that the description says is checked, by its types and then as any state is, before
it is a machine's.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from vmfs.devices import _chips
from vmfs.devices.machine import Pc
from vmfs.devices.virtio.disk import CLUSTER, Frozen, Overlay, Written
from vmfs.engine.base import Engine
from vmfs.machine import attach
from vmfs.machine.images import Kept
from vmfs.machine.machine import Vm
from vmfs.machine.past import Rom, Snapshot
from vmfs.machine.state import Setup, State, setup_of
from vmfs.memory.layers import SEALS, Image, Layer, is_sealed, runs
from vmfs.memory.mapping import PAGE
from vmfs.memory.ram import check_size, regions_of
from vmfs.words.door import Door
from vmfs.words.errors import Invalid, Unsupported

LAYERS_MOST = 16  # of a copy's RAM: each is a descriptor
FILES_MOST = 4096  # of a copy's disks
_FORMAT = 1
_STEP = 16 << 20
U64 = Annotated[int, msgspec.Meta(ge=0)]


class Description(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of a copy. `layers`: the pages that each layer of RAM has, a bit each, the lowest first (None: all). `disks`: of
    the device by that name, the clusters that each file of its overlay has, by their chunk of 512. `handed`: how many
    descriptors there are of a device's own."""

    format: int
    name: str
    state: bytes
    layers: Annotated[tuple[bytes | None, ...], msgspec.Meta(min_length=1, max_length=LAYERS_MOST)]
    disks: dict[str, tuple[dict[int, bytes], ...]]
    handed: dict[str, int]
    taken_ns: int
    instructions: int | None


@dataclass(frozen=True, slots=True)
class Copy:
    """`memory`: memfds, which the holder of this object has open: that of the description, of the layers, the ROM, the
    images. `files`: descriptors of the host's files. `kept` is what they are of."""

    number: int
    memory: tuple[int, ...]
    files: tuple[int, ...]
    size: int  # of RAM
    engine: str
    kept: tuple[object, ...]


class _Memfd:
    """Bytes that nobody can change."""

    def __init__(self, data: bytes) -> None:
        self.fd = os.memfd_create("vmfs-copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


def copy_of(vm: Vm, snapshot: Snapshot, number: int) -> Copy:
    """Busy, Unsupported where a device can be no other machine's, too."""
    setup = setup_of(snapshot.state)
    vm.check_media(snapshot.state)
    handed: dict[str, tuple[int, ...]] = {}
    devices = vm.board.devices if vm.board is not None else {}
    for one in setup.attached:
        if one.kind not in attach.ATTACHABLE or one.name not in devices:
            raise Unsupported(f"{one.name} can be no other machine's, too")
        handed[one.name] = attach.row_of(one).hand(devices[one.name])
    ram = _few_layers(snapshot.ram)
    description = Description(
        format=_FORMAT,
        name=snapshot.name,
        state=snapshot.encoded,
        layers=tuple(None if layer.pages is None else _bytes(layer.pages) for layer in ram.layers),
        disks={name: tuple(one.clusters.save() for one in disk.files) for name, disk in snapshot.overlays.items()},
        handed={name: len(fds) for name, fds in handed.items()},
        taken_ns=snapshot.taken_ns,
        instructions=snapshot.instructions,
    )
    memfd = _Memfd(msgspec.msgpack.encode(description))
    kept = [*([] if snapshot.rom is None else [snapshot.rom.kept]), *snapshot.images.values()]
    files = [fd for fds in handed.values() for fd in fds]
    files += [one.fd for disk in snapshot.overlays.values() for one in disk.files]
    return Copy(
        number=number,
        memory=(memfd.fd, *(layer.fd for layer in ram.layers), *(one.fd for one in kept)),
        files=tuple(files),
        size=setup.memory,
        engine=snapshot.engine.name,
        kept=(memfd, ram, *kept, *snapshot.overlays.values()),
    )


def _bytes(pages: int) -> bytes:
    return pages.to_bytes((pages.bit_length() + 7) // 8, "little")


def _few_layers(ram: Image) -> Image:
    """The same, of LAYERS_MOST layers: those over the lowest ones are put together in one."""
    if len(ram.layers) <= LAYERS_MOST:
        return ram
    below, above = ram.layers[: LAYERS_MOST - 1], Image(ram.layers[LAYERS_MOST - 1 :], ram.end)
    pages = 0
    for layer in above.layers:
        assert layer.pages is not None
        pages |= layer.pages
    fd = os.memfd_create("vmfs-snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    whole = Layer(fd, pages)
    os.ftruncate(fd, ram.end)
    for layer, here in above.parts(pages):
        for first, count in runs(here):
            at, to = first * PAGE, (first + count) * PAGE
            while at < to:
                at += os.pwrite(fd, os.pread(layer.fd, min(_STEP, to - at), at), at)
    whole.seal()
    return Image((*below, whole), ram.end)


# ---- on the other side


def sealed_size(fd: int) -> int:
    """Of a memfd that nobody can change any more. Invalid for what is none."""
    if not is_sealed(fd):
        raise Invalid("the copy of a machine has memory that others may change")
    return os.fstat(fd).st_size


def read_description(memory: Sequence[int]) -> Description:
    size = sealed_size(memory[0])
    if size > _STEP:
        raise Invalid(f"the description of a machine has {size} bytes")
    try:
        description = msgspec.msgpack.decode(os.pread(memory[0], size, 0), type=Description)
    except msgspec.MsgspecError as error:
        raise Invalid(f"that is no copy of a machine: {error}") from None
    if description.format != _FORMAT:
        raise Invalid(f"a copy of a machine of format {description.format}, where {_FORMAT} is known")
    return description


def files_of(description: Description) -> int:
    """How many descriptors of files there are."""
    if any(count < 0 for count in description.handed.values()):
        raise Invalid("a device has less than no descriptors")
    count = sum(description.handed.values()) + sum(len(files) for files in description.disks.values())
    if count > FILES_MOST:
        raise Invalid(f"the copy of a machine has {count} files")
    return count


def become(
    vm: Vm,
    description: Description,
    memory: list[int],
    files: list[int],
    engine_named: Callable[[str], Engine],
    door: Door,
) -> Snapshot:
    """Have a machine that has done nothing yet be the copied one. What is in the two lists is taken over, item by item:
    what is left there stays the caller's to close."""
    state = State.decode(description.state)
    setup = setup_of(state)
    engine = engine_named(setup.engine)
    if not engine.probe().available:
        raise Unsupported(f"the engine {setup.engine} does not work here")
    check_size(setup.memory)
    end = regions_of(setup.memory)[-1].end
    for fd in memory:
        sealed_size(fd)
    names = [one.name for one in setup.attached]
    if set(names) != description.handed.keys() or not description.disks.keys() <= set(names):
        raise Invalid("the copy of a machine has other devices than its description")
    if len(memory) != 1 + len(description.layers) + (setup.rom is not None) + len(setup.images):
        raise Invalid(f"the copy of a machine has {len(memory)} pieces of memory")
    if len(files) != files_of(description):
        raise Invalid(f"the copy of a machine has {len(files)} files")
    os.close(memory.pop(0))
    layers = [_layer(memory.pop(0), pages, end) for pages in description.layers]
    rom = None if setup.rom is None else Rom(_kept(memory.pop(0), setup.rom[1]), setup.rom[0])
    images = {name: _kept(memory.pop(0), size) for name, size in setup.images.items()}
    resources = _resources(setup, description, files, door)
    overlays: dict[str, Frozen] = {}

    def fill(board: Pc) -> None:
        for one in setup.attached:
            attach.remake(board, one, resources[one.name])
            del resources[one.name]
        for name, maps in description.disks.items():
            disk: Any = getattr(board.devices[name], "disk", None)
            if not isinstance(disk, Overlay):
                raise Invalid(f"{name} has no overlay")
            written = tuple(_written(files.pop(0), clusters, disk, door) for clusters in maps)
            overlays[name] = Frozen(written, disk.size)

    try:
        vm.rebuild(setup, engine, Image(layers, end), fill)
    finally:
        for resource in resources.values():
            attach.close_resource(resource)
    origin = Snapshot(
        name=description.name,
        state=state,
        engine=engine,
        ram=Image(layers, end),
        rom=rom,
        images=images,
        overlays=overlays,
        taken_ns=description.taken_ns,
        instructions=description.instructions,
        rw_disks=(),
        memory_size=setup.memory,
        encoded=b"",
    )
    vm.go_back(origin, lambda: lambda: None)
    return origin


def _layer(fd: int, pages: bytes | None, end: int) -> Layer:
    layer = Layer(fd, None if pages is None else int.from_bytes(pages, "little"))
    if os.fstat(fd).st_size != end or layer.pages is not None and layer.pages.bit_length() > end // PAGE:
        raise Invalid(f"the copy of a machine has a layer that is none of RAM up to {end:#x}")
    return layer


def _kept(fd: int, size: int) -> Kept:
    kept = Kept(fd, size)
    if os.fstat(fd).st_size != size:
        raise Invalid(f"the copy of a machine has an image of {os.fstat(fd).st_size} bytes, and not {size}")
    return kept


def _resources(setup: Setup, description: Description, files: list[int], door: Door) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        for one in setup.attached:
            own = tuple(files.pop(0) for _ in range(description.handed[one.name]))
            try:
                row = attach.row_of(one)
                if len(own) != bool(row.mode(list(one.words))):
                    raise Invalid(f"{one.name} has {len(own)} files")
            except BaseException:
                for fd in own:
                    os.close(fd)
                raise
            found[one.name] = row.take(door, list(one.words), own)
    except BaseException:
        for resource in found.values():
            attach.close_resource(resource)
        raise
    return found


def _written(fd: int, chunks: dict[int, bytes], disk: Overlay, door: Door) -> Written:
    clusters, room, taken = _chips.Clusters(-(-disk.size // CLUSTER)), attach.Room(door), os.fstat(fd).st_blocks * 512
    try:
        room.reserve(taken)
    except BaseException:
        os.close(fd)
        raise
    written = Written(fd, clusters, room, taken)
    disk.check_map(chunks)
    clusters.load(dict(chunks))
    if os.fstat(fd).st_size != disk.size:
        raise Invalid("the overlay of a disk has another size than the disk")
    return written
