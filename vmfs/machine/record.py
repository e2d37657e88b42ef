"""Record: the part of its past that a snapshot has of a machine with a history, and a saved machine takes along
(docs/decisions/0016): a checkpoint, and what came from outside from there up to the snapshot.

In a saved machine it is the folder history/: `record`, which is `Packed`; `mem`, which has the pages of RAM that are
not those of the snapshot; `disk.NAME`, what had been written to a `cow` disk. All of it is hostile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from vmfs.devices.inputs import Input
from vmfs.devices.virtio.disk import Frozen
from vmfs.machine.state import Setup, State, setup_of
from vmfs.memory.layers import Image, pages_of, runs
from vmfs.memory.mapping import PAGE
from vmfs.words import exits
from vmfs.words.errors import Invalid

FORMAT = 1
SIZE_MOST = 512 << 20  # bytes of a packed one
FOLDER = "history"
U64 = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class Packed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`cpu`: the only one that executed, of several. `of_cpus`: how many instructions each had done at the checkpoint.
    `end`: how many all had done at the snapshot. `pages`: of RAM, a bit each, that are in history/mem. `exits`: as
    lines, by their place, those that come with no instruction done."""

    format: int
    cpu: Annotated[int, msgspec.Meta(ge=0, lt=64)] | None
    of_cpus: Annotated[tuple[U64, ...], msgspec.Meta(min_length=1, max_length=64)]
    after_event: bool
    end: U64
    state: bytes
    pages: bytes
    inputs: tuple[Input, ...]
    exits: tuple[tuple[U64, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """As `Packed`, with what stands beside it."""

    cpu: int | None
    of_cpus: tuple[int, ...]
    after_event: bool
    end: int
    state: State
    ram: Image
    overlays: dict[str, Frozen]
    inputs: tuple[Input, ...]
    exits: dict[int, tuple[exits.Exit, ...]]
    _packed: list[bytes] = field(default_factory=list)

    @property
    def place(self) -> int:
        return sum(self.of_cpus)

    def packed(self, ram: Image) -> bytes:
        """Beside the snapshot that it is of, whose RAM that is."""
        if not self._packed:
            pages = self.ram.differs(ram)
            one = Packed(
                format=FORMAT,
                cpu=self.cpu,
                of_cpus=self.of_cpus,
                after_event=self.after_event,
                end=self.end,
                state=self.state.encode(),
                pages=pages.to_bytes((pages.bit_length() + 7) // 8, "little"),
                inputs=self.inputs,
                exits=tuple((at, tuple(exit_.line() for exit_ in there)) for at, there in self.exits.items()),
            )
            self._packed.append(msgspec.msgpack.encode(one))
        return self._packed[0]

    def file(self, name: str, ram: Image) -> Pages | Bytes | Frozen | None:
        """What stands in the folder by that name; None where nothing does."""
        if name == "record":
            return Bytes(self.packed(ram))
        if name == "mem":
            return Pages(self.ram, self.ram.differs(ram))
        return self.overlays.get(name.removeprefix("disk.")) if name.startswith("disk.") else None

    def names(self) -> list[str]:
        return ["record", "mem", *(f"disk.{name}" for name in self.overlays)]


class Bytes:
    """A file that is all data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def extents(self) -> Iterator[tuple[int, int]]:
        yield 0, self.size

    def read_at(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class Pages:
    """Some pages of an image, at their places; all else is holes."""

    def __init__(self, image: Image, pages: int) -> None:
        self._image, self._pages = image, pages
        self.size = image.end

    def extents(self) -> Iterator[tuple[int, int]]:
        for first, count in runs(self._pages):
            yield first * PAGE, (first + count) * PAGE

    def read_at(self, offset: int, length: int) -> bytes:
        data = bytearray(max(min(length, self.size - offset), 0))
        for first, count in runs(self._pages & pages_of(offset, len(data))):
            start, end = max(first * PAGE, offset), min((first + count) * PAGE, offset + len(data))
            data[start - offset : end - offset] = self._image.read(start, end - start)
        return bytes(data)


def unpack(data: bytes) -> Packed:
    """Invalid for what is none, or of a format that is not known here."""
    try:
        packed = msgspec.msgpack.decode(data, type=Packed)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Invalid(f"it is no record of a past: {error}") from None
    if packed.format != FORMAT:
        raise Invalid(f"it is of format {packed.format}, where {FORMAT} is known")
    return packed


def opened(packed: Packed, setup: Setup) -> tuple[State, dict[int, tuple[exits.Exit, ...]]]:
    """Its state and its exits, of a machine that is as `setup` says now. Invalid where it can be none of that."""
    state = State.decode(packed.state)
    then = setup_of(state)
    for what, is_, was in (
        ("kind", setup.machine, then.machine),
        ("engine", setup.engine, then.engine),
        ("source of time", setup.time_source, then.time_source),
        ("RAM", setup.memory, then.memory),
        ("number of CPUs", setup.cpus, then.cpus),
        ("number of CPUs", setup.cpus, len(packed.of_cpus)),
        ("boot images", (setup.images, setup.rom), (then.images, then.rom)),
        ("devices", setup.attached, then.attached),
    ):
        if is_ != was:
            raise Invalid(f"the past is of a machine with another {what}")
    if packed.cpu is not None and packed.cpu >= setup.cpus:
        raise Invalid(f"cpu{packed.cpu} executed in it, of {setup.cpus}")
    if sum(packed.of_cpus) > packed.end:
        raise Invalid(f"it begins at {sum(packed.of_cpus)}, after its end at {packed.end}")
    if any(one.at > other.at for one, other in zip(packed.inputs, packed.inputs[1:], strict=False)):
        raise Invalid("its inputs are in no order")
    there = {at: tuple(map(exits.parse_exit, lines)) for at, lines in packed.exits}
    if any(one.cpu >= setup.cpus for ones in there.values() for one in ones):
        raise Invalid("an exit is of a CPU that there is not")
    return state, there


def problems(data: Callable[[], bytes], sizes: Mapping[str, int], setup: Setup, end: int) -> Iterator[str]:
    """A sentence for each thing that is missing or wrong in the folder, of which `sizes` are the files'. `end` is that
    of RAM."""
    if not sizes:
        return
    if "record" not in sizes:
        yield f"{FOLDER}/record is missing"
        return
    try:
        packed = unpack(data())
        opened(packed, setup)
        if int.from_bytes(packed.pages, "little").bit_length() > end // PAGE:
            raise Invalid("it has pages where there is no RAM")
    except Invalid as error:
        yield f"{FOLDER}/record: {error}"
        return
    if sizes.get("mem") != end:
        yield f"{FOLDER}/mem has {sizes.get('mem', 0)} bytes of {end}"

