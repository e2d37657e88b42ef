"""Device: what every device of a machine is; and Port: all that it knows of the machine, which `Board` has.

A device is registers at ports and in memory (`windows`), lines to the interrupt controllers, perhaps access
to RAM. It knows no engine, no board and no file. The bus calls `read` and `write` with an offset into a window, never
an address; values are integers, little-endian on the wire.

Time: `board.now()` is the guest's, `board.date()` the date, `board.schedule(when, callback)` has the device called. No
device has a timer, a clock or a thread of the host's for that.

Threads: the board calls devices with its lock held, so a device has none of its own. What comes from
elsewhere (a key, a packet) takes the lock first: `with device.board.lock`.

State: `save` gives what a guest could tell apart, and what decides what the device does next, as a DeviceState of its
own type; `load` of another device of the same type with the same windows makes it the same. It is whole or not at all:
the type's constraints, then `check`, say what no device can be, before anything is set. Times in it are the guest's.
"""

from __future__ import annotations

import abc
import errno
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar

import msgspec

from vmfs.devices.chipset import Chipset
from vmfs.devices.timers import Timer
from vmfs.words.errors import Invalid

FIRST_SLOT = 3  # of memory, for `map_memory`: 0 and 2 are RAM, 1 the BIOS
WINDOW, WINDOW_HALF = 0xA_0000, 0x1_0000  # where a display has its memory, in two halves: a slot each
WINDOW_SLOTS = (16, 17)

U8 = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # no more fits into msgpack


class DeviceState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device is. VERSION grows when a field changes what it means, or one without a default is added."""

    VERSION: ClassVar[int] = 1


S = TypeVar("S", bound=DeviceState)


def unpack(kind: type[S], version: int, data: bytes, what: str) -> S:
    """A state of bytes; Invalid for what no device can be, by its type."""
    if version != kind.VERSION:
        raise Invalid(f"{what}: a state of version {version}, where {kind.VERSION} is known")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, OverflowError) as error:
        raise Invalid(f"{what}: that is no state of it: {error}") from None


@dataclass(frozen=True, slots=True)
class Window:
    """`length` ports (`space` "port") or bytes of guest-physical memory ("memory") from `start` on.

    `region` is what the device calls it: the first argument of its `read` and `write`.
    """

    space: str
    start: int
    length: int
    region: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length

    def __str__(self) -> str:
        return f"{self.space} {self.start:#x}-{self.end - 1:#x}"


class Port(Protocol):
    """What a device may ask for. `vmfs.devices.board.Board` says how each works."""

    lock: AbstractContextManager[Any]

    @property
    def counters(self) -> Counter[str]: ...
    @property
    def has_workers(self) -> bool: ...
    cpu_count: int  # which is fixed before the first run
    chipset: Chipset
    images: Any  # vmfs.devices.board.Images: what its user wants to boot, or None

    # RAM
    @property
    def ram_size(self) -> int: ...
    def is_ram(self, address: int, length: int) -> bool: ...
    @property
    def ram_chip(self) -> Any: ...
    @property
    def ram(self) -> memoryview: ...
    def dma_read(self, address: int, length: int) -> bytes: ...
    def dma_write(self, address: int, data: bytes | memoryview) -> None: ...
    def wrote(self, address: int, length: int) -> None: ...
    def wrote_all(self, spans: Iterable[tuple[int, int]]) -> None: ...
    def wrote_slot(self, slot: int) -> None: ...

    # What a PC has at WINDOW
    has_window: bool  # RAM reaches beyond it
    def show_window(self, half: int, what: str | tuple[int, int]) -> None: ...

    # Time
    def now(self) -> int: ...
    def date(self) -> int: ...
    def random(self, length: int) -> bytes: ...
    @property
    def uuid(self) -> bytes: ...
    def own_bytes(self, what: str, length: int) -> bytes: ...
    def schedule(self, when: int, callback: Callable[[], None]) -> Timer: ...

    # What comes from outside (vmfs.devices.inputs), and whether what goes there has been there before
    @property
    def inputs(self) -> Any: ...
    is_silent: bool

    # Chips (vmfs.devices._chips)
    @property
    def bus(self) -> Any: ...
    def take_number(self, device: Device[Any]) -> int: ...
    def chip_used(self) -> None: ...

    # Lines, and the end of the run
    def set_irq(self, device: Device[Any], gsi: int, level: bool) -> None: ...
    def signal_msi(self, address: int, data: int) -> None: ...
    def set_a20(self, enabled: bool) -> None: ...
    def set_timer_output(self, connected: bool) -> None: ...
    def stop(self, cause: str, code: int | None = None) -> None: ...

    # Where devices are
    def add(self, device: Device[Any]) -> Device[Any]: ...
    def remove(self, device: Device[Any]) -> None: ...
    def remove_windows(self, device: Device[Any]) -> None: ...
    def rewire(self, device: Device[Any]) -> None: ...
    def map_memory(
        self, slot: int, address: int, fd: int, offset: int, size: int, *, read_only: bool = False
    ) -> None: ...


def error_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or errno.EIO, str(error.errno))


class Device(abc.ABC, Generic[S]):
    """A device with the name that it has under dev/. Subclasses set TYPE and STATE, and what they need of the rest.

    One with a `chip` gives it the accesses that come to `read` and `write`; what it does not answer is the device's.
    `irq` is the interrupt line (GSI) or None; `counters` what its `counters` file shows.
    """

    TYPE: str
    STATE: type[S]
    IS_LATE: bool = False  # machines were saved before there was one: a state without it is as good
    INPUTS: tuple[str, ...] = ()  # the kinds that `input` takes
    ASKS: bool = False  # it calls `board.inputs.ask`
    irq: int | None = None
    HAS_DISK: bool = False  # its `disk` is one (vmfs.devices.virtio.disk), or None in a drive that is empty
    boot_path = ""  # where a BIOS looks for it, as OpenFirmware names places (SeaBIOS src/boot.c); empty: nowhere
    works = False  # it has threads that work while the machine runs: `run_begins` and `run_ends` are for it
    memory_slot: int | None = None  # of `map_memory`, where the guest writes what is of its state
    chip: Any = None  # of vmfs.devices._chips: what of its registers is in C

    def __init__(self, board: Port, name: str) -> None:
        self.board = board
        self.name = name
        self.number = board.take_number(self)
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> Counter[str]:
        self.count()
        return self._counters

    def count_host_error(self, error: OSError) -> None:
        """The host could not do what a command of a drive needs."""
        self.counters[f"host_errors.{error_name(error)}"] += 1
        self.board.counters["host_errors"] += 1

    def count(self) -> None:  # noqa: B027
        """Add what its chip has counted since the last time."""

    def windows(self) -> tuple[Window, ...]:
        """Where it is now. PCI devices change it by their BARs: `board.rewire(self)` afterwards."""
        return ()

    def read(self, region: int, offset: int, size: int) -> int:
        """The guest reads `size` bytes (1, 2, 4; memory: 8, too) at `offset` of a window."""
        return (1 << 8 * size) - 1

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """The guest writes `size` bytes."""

    def input(self, kind: str, data: bytes) -> None:
        """Something comes from outside, of a kind of INPUTS: by `board.inputs.enter`, with the board's lock held."""
        raise NotImplementedError

    def input_all(self, kind: str, some: Sequence[bytes]) -> None:
        """All of these, which come at one time."""
        for data in some:
            self.input(kind, data)

    def check_input(self, kind: str, data: bytes) -> None:
        """Invalid for what `input` cannot take."""
        if kind not in self.INPUTS:
            raise Invalid(f"{self.name} takes no {kind[:40]!r}")

    def inputs_have_times(self, they_have: bool) -> None:  # noqa: B027
        """From now on, or not any more: then all that it does has to come of the guest, of its inputs, and of what
        `board.inputs.ask` answers. With the board's lock held, while the machine stands."""

    def reset(self) -> None:
        """As at power-on; lines are low. What the host attached stays."""

    def machine_changed(self) -> None:
        """The board goes on with another engine's machine. The device sets what an engine keeps and no state has.
        `board.has_workers` may have changed, too."""

    def run_begins(self) -> None:  # noqa: B027
        """The machine runs from now on: what works beside its CPUs may begin."""

    def run_ends(self) -> None:  # noqa: B027
        """It does not any more: nothing is under way when this returns."""

    def time_shifted(self, by: int) -> None:
        """The guest's time was set, to what it was and `by`: times that the device keeps are to move along."""

    def date_set(self) -> None:  # noqa: B027
        """The board's date was set, before the first run: a clock that shows it is to show the new one."""

    def renew(self) -> None:  # noqa: B027
        """The machine was made of another one, or of what it was: what no two machines may have is to be new."""

    @property
    def keeps_time(self) -> bool:
        """Whether its state is of a moment: what it is by it depends on what time it is."""
        return type(self).time_shifted is not Device.time_shifted

    @property
    def changes_unseen(self) -> bool:
        """Whether it may change although nobody has its board's lock, or uses its chip."""
        return self.works

    @abc.abstractmethod
    def save(self) -> S:
        """What it is. With the board's lock held, between `sleep` and `wake`."""

    def check(self, state: S) -> None:  # noqa: B027
        """Invalid for what STATE's type lets through and this device cannot be; nothing has changed."""

    @abc.abstractmethod
    def load(self, state: S) -> None:
        """Be as the device was that `save` was called of. `check` has let it pass."""

    @abc.abstractmethod
    def sleep(self) -> None:
        """Have nothing under way, and begin nothing, until `wake`: neither in the guest's RAM nor at the host's end."""

    @abc.abstractmethod
    def wake(self) -> None:
        """Go on."""

    def pack(self) -> bytes:
        """The state as bytes."""
        return msgspec.msgpack.encode(self.save())

    def unpack(self, version: int, data: bytes) -> S:
        """The state of bytes, checked. Invalid for what it cannot be, and nothing has changed."""
        state = unpack(self.STATE, version, data, self.name)
        self.check(state)
        return state

    def describe(self) -> dict[str, str]:
        """More lines for its `info` file: a disk's path, a backend."""
        return {}

    def drain(self) -> None:  # noqa: B027
        """Give on what its chip has sent. From any thread, without the board's lock."""

    def close(self) -> None:
        """Give back what is the host's."""

    def set_irq(self, level: bool) -> None:
        """Drive the device's line."""
        if self.irq is not None:
            self.board.set_irq(self, self.irq, level)


class QuietDevice(Device[S]):
    """One that does something only when it is called, and then all of it: nothing is ever under way."""

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass


class NoState(DeviceState):
    """Of a device that is the same whatever a guest has done to it."""


class StatelessDevice(QuietDevice[NoState]):
    STATE = NoState

    def save(self) -> NoState:
        return NoState()

    def load(self, state: NoState) -> None:
        pass
