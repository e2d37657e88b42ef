"""What every USB device is: descriptors, the requests that all devices know, endpoints that can be halted.

The controller sees no packets: it gives an endpoint the memory of a whole transfer, and learns how much of it was
moved, that the device has nothing yet (NAK), or that it stalls.

Source: Universal Serial Bus 2.0, chapter 9; Universal Serial Bus 3.1, chapter 9.
"""

from __future__ import annotations

import abc
import struct
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

import msgspec

from vmfs.devices.device import U8, DeviceState, Port, QuietDevice

FULL, LOW, HIGH, SUPER = 1, 2, 3, 4  # speeds, as xHCI numbers them
IN = 0x80  # of an endpoint's address, and of a request's type
BULK, INTERRUPT = 2, 3  # kinds of endpoints
VENDOR = 0x1234

_DEVICE, _CONFIGURATION, _STRING, _INTERFACE, _ENDPOINT, _BOS, _COMPANION = 1, 2, 3, 4, 5, 0x0F, 0x30
_ENGLISH = 0x0409
_SELF_POWERED = 0x40
_HALT = 0


class Stall(Exception):
    """The device answers with STALL."""


class Job(NamedTuple):
    """Of a transfer that may wait for the host: `do`, in any thread; `then`, with the board's lock held and the OSError
    or None, which returns how many bytes were moved, or raises Stall; `at_once` does it where that does not wait."""

    do: Callable[[], None]
    then: Callable[[OSError | None], int]
    at_once: Callable[[], bool] = lambda: False


class Setup(NamedTuple):
    """A request (9.3). `kind`: bmRequestType."""

    kind: int
    request: int
    value: int
    index: int
    length: int


SETUP = struct.Struct("<BBHHH")


class Hub(Protocol):
    """What a device asks of what it is plugged into."""

    def ready(self, device: UsbDevice[Any], endpoint: int) -> None:
        """The endpoint, which had nothing, has something now."""

    def at_end(self, device: UsbDevice[Any], call: Callable[[], None]) -> None:
        """Call that once nothing of it is under way any more, nor will be."""


class UsbState(DeviceState):
    """`configuration`: 0 while there is none; `halted`: addresses of endpoints."""

    configuration: Annotated[int, msgspec.Meta(ge=0, le=1)]
    halted: Annotated[tuple[U8, ...], msgspec.Meta(max_length=4)]


S = TypeVar("S", bound=UsbState)


class Endpoint(NamedTuple):
    """`interval` as the descriptor has it."""

    address: int
    kind: int
    size: int
    interval: int = 0


class UsbDevice(QuietDevice[S], abc.ABC):
    """One with a configuration and an interface."""

    SPEED: int
    PRODUCT: int
    TITLE: str
    INTERFACE: tuple[int, int, int]  # class, subclass, protocol
    ENDPOINTS: tuple[Endpoint, ...]

    def __init__(self, board: Port, name: str) -> None:
        super().__init__(board, name)
        self.hub: Hub | None = None
        self.configuration = 0
        self.halted: set[int] = set()

    def bus_reset(self) -> None:
        """The port was reset, or power came."""
        self.configuration = 0
        self.halted.clear()

    def reset(self) -> None:
        self.bus_reset()

    @property
    def is_configured(self) -> bool:
        """A driver has it."""
        return self.configuration != 0

    def ready(self, endpoint: int) -> None:
        if self.hub is not None:
            self.hub.ready(self, endpoint)

    # ---- transfers

    @abc.abstractmethod
    def transfer(self, endpoint: int, views: list[memoryview]) -> int | Job | None:
        """A transfer of an endpoint other than 0 that is not halted: how many bytes were moved, a Job, or None (NAK).
        Stall."""

    def begin(self, endpoint: int, views: list[memoryview]) -> int | Job | None:
        if not self.configuration or endpoint in self.halted:
            raise Stall
        return self.transfer(endpoint, views)

    def halt(self, endpoint: int) -> None:
        """It stalls until the host clears that."""
        self.halted.add(endpoint)

    def has_endpoint(self, endpoint: int) -> bool:
        return any(one.address == endpoint for one in self.ENDPOINTS)

    # ---- requests

    def control(self, setup: Setup, data: bytes) -> bytes:
        """What a request gives to the host; `data` came with it. Stall."""
        if setup.kind & 0x60:
            return self.request(setup, data)
        run = _REQUESTS.get((setup.kind, setup.request))
        if run is None:
            raise Stall
        return run(self, setup)[: setup.length]

    def request(self, setup: Setup, data: bytes) -> bytes:
        """One of its class."""
        raise Stall

    def _status(self, setup: Setup) -> bytes:
        return b"\1\0"

    def _interface_status(self, setup: Setup) -> bytes:
        return bytes(2)

    def _endpoint_status(self, setup: Setup) -> bytes:
        return bytes((setup.index in self.halted, 0))

    def clear_halt(self, setup: Setup) -> bytes:
        if setup.value != _HALT or setup.index & 0x7F and not self.has_endpoint(setup.index):
            raise Stall
        self.halted.discard(setup.index)
        return b""

    def _set_halt(self, setup: Setup) -> bytes:
        if setup.value != _HALT or not self.has_endpoint(setup.index):
            raise Stall
        self.halt(setup.index)
        return b""

    def _get_configuration(self, setup: Setup) -> bytes:
        return bytes((self.configuration,))

    def _set_configuration(self, setup: Setup) -> bytes:
        if setup.value > 1:
            raise Stall
        self.halted.clear()
        self.configuration = setup.value
        self.configured()
        return b""

    def configured(self) -> None:  # noqa: B027
        """A configuration was set, or none."""

    def _get_interface(self, setup: Setup) -> bytes:
        return b"\0"

    def _set_interface(self, setup: Setup) -> bytes:
        if setup.value or setup.index:
            raise Stall
        self.halted.clear()
        return b""

    def _power(self, setup: Setup) -> bytes:
        """Of links at super speed: latencies, U1, U2 and suspended functions, which change nothing here."""
        if self.SPEED != SUPER:
            raise Stall
        return b""

    # ---- descriptors

    def _get_descriptor(self, setup: Setup) -> bytes:
        kind, index = setup.value >> 8, setup.value & 0xFF
        if kind == _STRING:
            return self._string(index)
        if not index:
            if kind == _DEVICE:
                return self._device_descriptor()
            if kind == _CONFIGURATION:
                return self.configuration_descriptor()
            if kind == _BOS and self.SPEED == SUPER:
                return _bos()
        raise Stall

    def descriptor_of_interface(self, setup: Setup) -> bytes:
        raise Stall

    def _device_descriptor(self) -> bytes:
        version, size = (0x0310, 9) if self.SPEED == SUPER else (0x0200, 64 if self.SPEED == HIGH else 8)
        return struct.pack(
            "<BBHBBBBHHHBBBB", 18, _DEVICE, version, 0, 0, 0, size, VENDOR, self.PRODUCT, 0x0100, 1, 2, 3, 1
        )

    def between(self) -> bytes:
        """Descriptors of its class, between the interface's and the endpoints'."""
        return b""

    def configuration_descriptor(self) -> bytes:
        rest = struct.pack("<9B", 9, _INTERFACE, 0, 0, len(self.ENDPOINTS), *self.INTERFACE, 0) + self.between()
        for one in self.ENDPOINTS:
            rest += struct.pack("<BBBBHB", 7, _ENDPOINT, one.address, one.kind, one.size, one.interval)
            if self.SPEED == SUPER:
                rest += struct.pack("<BBBBH", 6, _COMPANION, 15, 0, 0)  # bursts of 16 packets
        return struct.pack("<BBHBBBBB", 9, _CONFIGURATION, 9 + len(rest), 1, 1, 0, 0x80 | _SELF_POWERED, 0) + rest

    def _string(self, index: int) -> bytes:
        if index == 0:
            return struct.pack("<BBH", 4, _STRING, _ENGLISH)
        if index > 3:
            raise Stall
        data = b"".join(struct.pack("<H", ord(one)) for one in ("vmfs", self.TITLE, self.name)[index - 1])
        return bytes((2 + len(data), _STRING)) + data

    # ---- life

    def save_usb(self) -> dict[str, Any]:
        return {"configuration": self.configuration, "halted": tuple(sorted(self.halted))}

    def load_usb(self, state: UsbState) -> None:
        self.configuration, self.halted = state.configuration, set(state.halted)

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "configured": "yes" if self.is_configured else "no"}


def scatter(data: bytes, views: Iterable[memoryview]) -> int:
    """As much as there is room for; how much that was."""
    at = 0
    for view in views:
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
    return at


def _bos() -> bytes:
    """Capabilities: of USB 2.0's link power management none; super speed, without latencies."""
    capabilities = struct.pack("<BBBI", 7, 0x10, 2, 0) + struct.pack("<BBBBHBBH", 10, 0x10, 3, 0, 0x0E, 3, 0, 0)
    return struct.pack("<BBHB", 5, _BOS, 5 + len(capabilities), 2) + capabilities


_OUT_DEVICE, _OUT_INTERFACE, _OUT_ENDPOINT = range(3)
_REQUESTS: dict[tuple[int, int], Callable[[UsbDevice[Any], Setup], bytes]] = {
    (IN | _OUT_DEVICE, 0): UsbDevice._status,
    (IN | _OUT_INTERFACE, 0): UsbDevice._interface_status,
    (IN | _OUT_ENDPOINT, 0): UsbDevice._endpoint_status,
    (_OUT_DEVICE, 1): UsbDevice._power,  # CLEAR_FEATURE
    (_OUT_INTERFACE, 1): UsbDevice._power,
    (_OUT_ENDPOINT, 1): lambda device, setup: device.clear_halt(setup),
    (_OUT_DEVICE, 3): UsbDevice._power,  # SET_FEATURE
    (_OUT_INTERFACE, 3): UsbDevice._power,
    (_OUT_ENDPOINT, 3): UsbDevice._set_halt,
    (IN | _OUT_DEVICE, 6): UsbDevice._get_descriptor,
    (IN | _OUT_INTERFACE, 6): lambda device, setup: device.descriptor_of_interface(setup),
    (IN | _OUT_DEVICE, 8): UsbDevice._get_configuration,
    (_OUT_DEVICE, 9): UsbDevice._set_configuration,
    (IN | _OUT_INTERFACE, 10): UsbDevice._get_interface,
    (_OUT_INTERFACE, 11): UsbDevice._set_interface,
    (_OUT_DEVICE, 0x30): UsbDevice._power,  # SET_SEL
    (_OUT_DEVICE, 0x31): UsbDevice._power,  # SET_ISOCH_DELAY
}
