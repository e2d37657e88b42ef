"""VirtioDevice: the PCI transport of virtio 1.x, and what every virtio device is.

Source: VIRTIO 1.2, section 2.1 to 2.4 (status, features, notifications), 4.1 (PCI). Devices are non-transitional: a
driver must accept VERSION_1. Interrupts are by MSI-X, with a vector a queue and one for the configuration where the
driver wants so, or INTx.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U8, U16, U32, U64, DeviceState, Port
from vmfs.devices.pci import MSIX, MSIX_BAR, Bar, PciDevice, PciState
from vmfs.devices.virtio.queue import Chain, DriverError, QueueState, Virtqueue
from vmfs.words.errors import Invalid

VENDOR = 0x1AF4
FIRST_DEVICE = 0x1040  # and the type's number of section 5

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80

INDIRECT_DESC, EVENT_IDX, VERSION_1 = 1 << 28, 1 << 29, 1 << 32
_TRANSPORT_FEATURES = INDIRECT_DESC | EVENT_IDX | VERSION_1

_ISR_QUEUE, _ISR_CONFIG = 1, 2
_NO_VECTOR = 0xFFFF  # VIRTIO_MSI_NO_VECTOR
_OF_CONFIG = _chips.CONFIG

# BAR 0: a page a structure (4.1.4).
_COMMON, _ISR, _CONFIG, _NOTIFY, _BAR_SIZE = 0x0000, 0x1000, 0x2000, 0x3000, 0x4000
_NOTIFY_MULTIPLIER = 4
_CAP_COMMON, _CAP_NOTIFY, _CAP_ISR, _CAP_DEVICE, _CAP_PCI = 1, 2, 3, 4, 5
_VENDOR_CAPABILITY = 9

# struct virtio_pci_common_cfg (4.1.4.3): offset -> size and name. A 64-bit field is accessed as two of 32 bits.
_COMMON_FIELDS: dict[int, tuple[int, str]] = {
    0: (4, "device_feature_select"),
    4: (4, "device_feature"),
    8: (4, "driver_feature_select"),
    12: (4, "driver_feature"),
    16: (2, "config_msix_vector"),
    18: (2, "num_queues"),
    20: (1, "device_status"),
    21: (1, "config_generation"),
    22: (2, "queue_select"),
    24: (2, "queue_size"),
    26: (2, "queue_msix_vector"),
    28: (2, "queue_enable"),
    30: (2, "queue_notify_off"),
    32: (4, "queue_desc"),
    36: (4, "queue_desc_high"),
    40: (4, "queue_driver"),
    44: (4, "queue_driver_high"),
    48: (4, "queue_device"),
    52: (4, "queue_device_high"),
}
_COMMON_LENGTH = 56
_ADDRESSES = {"queue_desc": "descriptors", "queue_driver": "driver", "queue_device": "device"}


class VirtioState(DeviceState):
    """What the transport has of every device: attributes of VirtioDevice by their names, but for `pci` and `queues`.
    `vectors`: of the configuration, and of each queue."""

    VERSION: ClassVar[int] = 2

    pci: PciState
    status: U8
    accepted: U64
    isr: Annotated[int, msgspec.Meta(ge=0, le=_ISR_QUEUE | _ISR_CONFIG)]
    generation: U8
    device_select: U32
    driver_select: U32
    queue_select: U16
    failure: str
    queues: tuple[QueueState, ...]
    vectors: tuple[U16, ...]


_SAVED = tuple(name for name in VirtioState.__struct_fields__ if name not in ("pci", "queues", "vectors"))
V = TypeVar("V", bound=VirtioState)


class VirtioDevice(PciDevice[V]):
    """A virtio device. A subclass sets the identity of PciDevice, STATE and QUEUES (the largest size of each), and does
    what drivers ask for in `notified`. Its constructor sets what `features` and `device_config` need first. What its
    STATE has beyond VirtioState is of `save_own`, `check_own` and `load_own`."""

    VENDOR = VENDOR
    EXPRESS = True
    REVISION = 1  # 4.1.2.1: of a non-transitional device
    BARS = {0: Bar("memory", _BAR_SIZE), MSIX_BAR: MSIX}
    QUEUES: tuple[int, ...] = ()

    def __init__(self, board: Port, name: str, slot: int) -> None:
        self.SUBSYSTEM = (VENDOR, self.DEVICE)
        super().__init__(board, name, slot)
        self.queues = [Virtqueue(board, index, size) for index, size in enumerate(self.QUEUES)]
        self._add_capability(_CAP_COMMON, _COMMON, _COMMON_LENGTH)
        notify = _NOTIFY_MULTIPLIER * len(self.queues)
        self._add_capability(_CAP_NOTIFY, _NOTIFY, notify, struct.pack("<I", _NOTIFY_MULTIPLIER))
        self._add_capability(_CAP_ISR, _ISR, 1)
        if self.device_config():
            self._add_capability(_CAP_DEVICE, _CONFIG, len(self.device_config()))
        # 4.1.4.9: the BAR, reached through configuration space: bar, offset, length and data are the driver's.
        writable = bytes(4) + b"\xff" + bytes(3) + b"\xff" * 12
        self._window = self._add_capability(_CAP_PCI, 0, 0, bytes(4), writable)
        self.answers_itself(self._window + 16, 4)
        self.add_msix(len(self.queues) + 1)
        self.chip = _chips.Virtio(board.bus, self.number, self.function, _ISR, _NOTIFY, len(self.queues))
        self.generation = 0
        self._forget_driver()

    def _add_capability(self, kind: int, offset: int, length: int, more: bytes = b"", writable: bytes = b"") -> int:
        head = struct.pack("<BBBBB3xII", _VENDOR_CAPABILITY, 0, 16 + len(more), kind, 0, offset, length)
        return self.add_capability(head + more, writable)

    # ---- what a subclass says

    def features(self) -> int:
        """The feature bits of the device type that it offers."""
        return 0

    def device_config(self) -> bytes:
        """The device-specific configuration; its length never changes."""
        return b""

    def write_device_config(self, offset: int, data: bytes) -> None:
        """The driver writes configuration: nothing unless the type has a field to write."""

    def notified(self, queue: Virtqueue) -> None:
        """The driver has made requests available. May raise DriverError."""

    def started(self) -> None:
        """The driver is ready (DRIVER_OK), or was when the state was saved that was loaded now."""

    def live_changed(self) -> None:
        """`is_live` may be another now; where it is not, the queues are about to be reset. One with workers: when this
        returns, they use no queue unless it is."""

    def stopped(self) -> None:
        """The device was reset: forget what was under way."""

    # ---- what a subclass uses

    @property
    def is_live(self) -> bool:
        """Whether the device may use its queues."""
        wanted = FEATURES_OK | DRIVER_OK
        return self.status & (wanted | NEEDS_RESET | FAILED) == wanted and self.is_master

    def has(self, feature: int) -> bool:
        """Whether the driver accepted a feature."""
        return bool(self.status & FEATURES_OK and self.accepted & feature)

    def serve(self, queue: Virtqueue, do: Callable[[Chain], int]) -> None:
        """Do all requests of a queue that wait; `do` returns how many bytes it has written to one."""
        while True:
            while (chain := queue.pop()) is not None:
                queue.push(chain, do(chain))
            queue.want_notifications()
            if not queue.pending():
                break
        self.tell(queue)

    def tell(self, queue: Virtqueue) -> None:
        """Interrupt the driver, if it wants to hear of what was pushed."""
        if queue.wants_interrupt():
            self.counters["interrupts"] += 1
            self.chip.interrupt(queue.index)

    def config_changed(self) -> None:
        """Tell the driver that `device_config` is another now."""
        self.generation = (self.generation + 1) & 0xFF
        if self.status & DRIVER_OK:
            self.chip.interrupt(_OF_CONFIG)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What touches queues: a DriverError puts the device into its error state (2.1.2)."""
        try:
            yield
        except DriverError as error:
            self._fail(error)

    def _fail(self, error: DriverError) -> None:
        self.counters["errors"] += 1
        self.failure = str(error)
        self.status |= NEEDS_RESET
        self.live_changed()
        if self.status & DRIVER_OK:
            self.chip.interrupt(_OF_CONFIG)

    @property
    def isr(self) -> int:
        return self.chip.isr

    # ---- the BAR

    def read(self, region: int, offset: int, size: int) -> int:
        if region == MSIX_BAR:
            return self.function.read_msix(offset, size)
        if offset < _ISR:
            return self._read_common(offset, size)
        if offset < _CONFIG:
            return self.chip.read(0, offset, size) or 0
        if offset < _NOTIFY:
            at = offset - _CONFIG
            return int.from_bytes(self.device_config()[at : at + size], "little")
        return 0

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if region == MSIX_BAR:
            self.function.write_msix(offset, size, value)
        elif offset >= _NOTIFY:
            index = (offset - _NOTIFY) // _NOTIFY_MULTIPLIER
            if index < len(self.queues):
                self._notify(self.queues[index])
        elif offset >= _CONFIG:
            self.write_device_config(offset - _CONFIG, value.to_bytes(size, "little"))
        elif offset < _ISR:
            self._write_common(offset, size, value)

    def _notify(self, queue: Virtqueue) -> None:
        self.counters["notifications"] += 1
        if queue.enabled and self.is_live:
            try:
                self.notified(queue)
            except DriverError as error:
                self._fail(error)

    def _read_common(self, offset: int, size: int) -> int:
        # Drivers access each field by its size (4.1.3.1). Others get the bytes, too, which takes nothing.
        value = 0
        for at, (width, name) in _COMMON_FIELDS.items():
            if at < offset + size and offset < at + width:
                shift = 8 * (at - offset)
                field = self._get(name)
                value |= field << shift if shift >= 0 else field >> -shift
        return value & (1 << 8 * size) - 1

    def _get(self, name: str) -> int:
        queue = self._selected()
        if name == "device_feature":
            return self._half(self._offered(), self.device_select)
        if name == "driver_feature":
            return self._half(self.accepted, self.driver_select)
        if name == "device_feature_select":
            return self.device_select
        if name == "driver_feature_select":
            return self.driver_select
        if name == "config_msix_vector":
            return self.chip.vector(_OF_CONFIG)
        if name == "queue_msix_vector":
            return _NO_VECTOR if queue is None else self.chip.vector(queue.index)
        if name == "num_queues":
            return len(self.queues)
        if name == "device_status":
            return self.status
        if name == "config_generation":
            return self.generation
        if name == "queue_select":
            return self.queue_select
        if queue is None:  # 4.1.4.3.1: a queue that is not there has size 0
            return 0
        if name == "queue_size":
            return queue.size
        if name == "queue_enable":
            return int(queue.enabled)
        if name == "queue_notify_off":
            return queue.index
        address: int = getattr(queue, _ADDRESSES[name.removesuffix("_high")])
        return address >> 32 if name.endswith("_high") else address & 0xFFFF_FFFF

    def _write_common(self, offset: int, size: int, value: int) -> None:
        width, name = _COMMON_FIELDS.get(offset, (0, ""))
        if size == 8 and name in _ADDRESSES:
            self._write_common(offset, 4, value & 0xFFFF_FFFF)
            self._write_common(offset + 4, 4, value >> 32)
            return
        if width != size:
            self.counters["bad_accesses"] += 1
            return
        queue = self._selected()
        if name == "device_feature_select":
            self.device_select = value
        elif name == "driver_feature_select":
            self.driver_select = value
        elif name == "driver_feature":
            self._accept(value)
        elif name == "device_status":
            self._set_status(value)
        elif name == "queue_select":
            self.queue_select = value
        elif name == "config_msix_vector":
            self.chip.set_vector(_OF_CONFIG, value)
        elif name == "queue_msix_vector" and queue is not None:
            self.chip.set_vector(queue.index, value)
        elif queue is None or queue.enabled:
            pass  # 4.1.4.3.2: nothing of a queue that is in use can be changed
        elif name == "queue_size":
            queue.size = value
        elif name == "queue_enable" and value == 1:
            with self.guarded():
                queue.enable(event_index=self.has(EVENT_IDX), indirect=self.has(INDIRECT_DESC))
        elif name.startswith(tuple(_ADDRESSES)):
            which = _ADDRESSES[name.removesuffix("_high")]
            keep = getattr(queue, which)
            is_high = name.endswith("_high")
            setattr(queue, which, value << 32 | keep & 0xFFFF_FFFF if is_high else keep >> 32 << 32 | value)

    def _selected(self) -> Virtqueue | None:
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    # ---- status and features

    def _offered(self) -> int:
        return self.features() | _TRANSPORT_FEATURES

    @staticmethod
    def _half(features: int, select: int) -> int:
        return features >> 32 * select & 0xFFFF_FFFF if select < 2 else 0

    def _accept(self, value: int) -> None:
        if self.driver_select < 2 and not self.status & FEATURES_OK:  # 2.2.1: fixed from FEATURES_OK on
            shift = 32 * self.driver_select
            self.accepted = self.accepted & ~(0xFFFF_FFFF << shift) | value << shift

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._reset_driver()
            self.set_irq(False)
            return
        was_live = self.is_live
        if value & FEATURES_OK and not self.status & FEATURES_OK:
            # 3.1.1: the driver reads back whether the device agrees.
            if self.accepted & ~self._offered() or not self.accepted & VERSION_1:
                value &= ~FEATURES_OK
        self.status = value & 0xFF | self.status & NEEDS_RESET
        self.live_changed()
        if self.is_live and not was_live:
            self.started()

    def _reset_driver(self) -> None:
        self.status = 0
        self.live_changed()
        self._forget_driver()
        self.stopped()

    def _forget_driver(self) -> None:
        """Everything that the driver has set (2.1.2)."""
        self.status = 0
        self.accepted = 0
        self.chip.isr = 0
        self.device_select = self.driver_select = self.queue_select = 0
        self.failure = ""
        self.chip.set_vector(_OF_CONFIG, _NO_VECTOR)
        for queue in self.queues:
            queue.reset()
            self.chip.set_vector(queue.index, _NO_VECTOR)

    def _config_changed(self) -> None:
        super()._config_changed()
        self.live_changed()  # by the bus master bit

    # ---- the BAR through configuration space

    def read_config(self, offset: int, size: int) -> int:
        if self._window + 16 < offset + size and offset < self._window + 20:
            found = self._windowed()
            if found is not None:
                at, length = found
                self.config[self._window + 16 : self._window + 16 + length] = self.read(0, at, length).to_bytes(
                    length, "little"
                )
        return super().read_config(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        super().write_config(offset, size, value)
        if self._window + 16 < offset + size and offset < self._window + 20:
            found = self._windowed()
            if found is not None:
                at, length = found
                data = self.config[self._window + 16 : self._window + 16 + length]
                self.write(0, at, length, int.from_bytes(data, "little"))

    def _windowed(self) -> tuple[int, int] | None:
        """Offset in the BAR and length, as the driver has set them in the capability, where they can be."""
        bar, at, length = struct.unpack_from("<B3xII", self.config, self._window + 4)
        if bar != 0 or length not in (1, 2, 4) or at % length or at + length > _BAR_SIZE:
            return None
        return at, length

    # ---- life

    def reset(self) -> None:
        self._reset_driver()
        super().reset()

    def save(self) -> V:
        common = {name: getattr(self, name) for name in _SAVED}
        queues = tuple(queue.save() for queue in self.queues)
        vectors = tuple(self.chip.vector(of) for of in self._of_vectors())
        return self.STATE(pci=self.save_pci(), queues=queues, vectors=vectors, **common, **self.save_own())

    def check(self, state: V) -> None:
        self.check_pci(state.pci)
        if len(state.queues) != len(self.queues):
            raise Invalid(f"{self.name}: it has {len(self.queues)} queues")
        if len(state.vectors) != len(self.queues) + 1:
            raise Invalid(f"{self.name}: it has {len(self.queues)} vectors, and one for its configuration")
        if any(len(self.queues) < vector != _NO_VECTOR for vector in state.vectors):
            raise Invalid(f"{self.name}: there is no vector {max(state.vectors)}")
        if state.accepted & ~self._offered() and state.status & FEATURES_OK:
            raise Invalid(f"{self.name}: the driver was offered what is not there now")
        for queue, one in zip(self.queues, state.queues, strict=True):
            queue.check(one)
        self.check_own(state)

    def load(self, state: V) -> None:
        self._reset_driver()
        self.load_own(state)
        self.load_pci(state.pci)
        for name in _SAVED:
            setattr(self.chip if name == "isr" else self, name, getattr(state, name))
        for queue, one in zip(self.queues, state.queues, strict=True):
            queue.load(one)
        for of, vector in zip(self._of_vectors(), state.vectors, strict=True):
            self.chip.set_vector(of, vector)
        self.live_changed()
        if self.is_live:
            self.started()

    def _of_vectors(self) -> tuple[int, ...]:
        return (_OF_CONFIG, *range(len(self.queues)))

    def save_own(self) -> dict[str, Any]:
        """What STATE has beyond VirtioState."""
        return {}

    def check_own(self, state: V) -> None:
        """Invalid for what STATE's type lets through and this device cannot be."""

    def load_own(self, state: V) -> None:
        """Set what `save_own` gives. The device is reset; the driver's settings and `started` come afterwards."""

    def describe(self) -> dict[str, str]:
        lines = {**super().describe(), "driver": self._driver_state()}
        if self.failure:
            lines["failure"] = self.failure
        return lines

    def _driver_state(self) -> str:
        if self.status & NEEDS_RESET:
            return "needs-reset"
        if self.status & FAILED:
            return "failed"
        if self.status & DRIVER_OK:
            return "ready"
        return "none" if not self.status else "starting"
