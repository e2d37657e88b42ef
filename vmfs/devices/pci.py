"""PCI: the host bridge with configuration mechanism 1, and what every PCI device is.

One bus, 32 slots of up to 8 functions; interrupts are INTx or, for a device that has them, MSI and MSI-X. A device's
BARs have addresses from the beginning, as firmware would have given them, so that a kernel that is booted without
firmware finds them; firmware may move them.

Source: PCI Local Bus Specification 3.0, chapters 3.2.2.3 (configuration mechanism 1), 6 (configuration space) and 6.8
(MSI, MSI-X).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec

from vmfs.devices import _chips
from vmfs.devices.chipset import ECAM_SIZE, MEMORY_END
from vmfs.devices.device import U8, U32, U64, DeviceState, Port, QuietDevice, Window
from vmfs.words.errors import Busy, Invalid, LimitReached

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
SLOTS, FUNCTIONS = 32, 8
MEMORY_START = 0xE000_0000  # of memory BARs, from the beginning
PORTS_START, PORTS_END = 0xC000, 0x1_0000
ADDRESSES_END = 1 << 52  # Intel SDM 3A 4.1.4

_COMMAND, _STATUS = 0x04, 0x06
_IO, _MEMORY, _MASTER, _INTX_OFF = 1, 2, 4, 0x400
_STATUS_INTERRUPT, _STATUS_CAPABILITIES = 0x08, 0x10
_HEADER_TYPE, _SEVERAL_FUNCTIONS = 0x0E, 0x80
_BAR0, _ROM, _CAPABILITIES, _INTERRUPT_LINE = 0x10, 0x30, 0x34, 0x3C
_HEADER = 0x40
_ROM_LEAST, _ROM_ENABLED = 0x800, 1
ROM_REGION = 6
MSI_MOST, _MSI_CAPABILITY, _MSI_ENABLE, _MSI_ALLOWED, _MSI_WIDE, _MSI_MASKS = 32, 0x05, 1, 0x70, 0x80, 0x100
_MSI_PENDING = 0x14
MSIX_BAR, _MSIX_CAPABILITY, _MSIX_SIZE = 1, 0x11, 0x1000
_ENABLE_AND_MASK = 0xC0  # of message control's upper byte
_EXPRESS_CAPABILITY, _EXPRESS_SIZE, _INTEGRATED, _ROLE_BASED_ERRORS = 0x10, 0x3C, 0x92, 1 << 15
_DEVICE_CONTROL = 0x7FFF
_SERIAL_NUMBER = 1 << 16 | 0x0003  # of the extended capabilities: version 1, and no other follows
_WRITES_BY_PYTHON, _ALL_BY_PYTHON = 1, 3
_ECAM, ECAM_PAGE = 2, 0x1000  # a region, and the bytes of it that a function has


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: `size` bytes (a power of two) of `space` "port" or "memory". `wide`: of 64 bits, which
    takes the next register, too; it is below 4 GiB until the guest moves it."""

    space: str
    size: int
    prefetchable: bool = False
    wide: bool = False

    @property
    def kind(self) -> int:
        """The read-only bits."""
        return 1 if self.space == "port" else (8 if self.prefetchable else 0) | (4 if self.wide else 0)

    @property
    def mask(self) -> int:
        """The bits of an address."""
        lowest = 4 if self.space == "port" else 16
        return -max(self.size, lowest) & ((1 << 64 if self.wide else 1 << 32) - 1)

    @property
    def length(self) -> int:
        """In bytes, of the register."""
        return 8 if self.wide else 4

    def may_be_at(self, start: int) -> bool:
        """Whether it can answer there. While a guest asks for the size, a BAR is at the end of a space."""
        end = start + self.size
        if self.space == "port":
            return 0 < start and end <= 0x1_0000
        return 0 < start and (end <= MEMORY_END or 1 << 32 <= start and end <= ADDRESSES_END)


MSIX = Bar("memory", _MSIX_SIZE)


class PciState(DeviceState):
    """The configuration space, and INTA as the device drives it; of MSI-X the table and the pending bits."""

    config: Annotated[bytes, msgspec.Meta(min_length=256, max_length=256)]
    pending: bool
    table: bytes = b""
    waiting: U64 = 0


P = TypeVar("P", bound=DeviceState)


class PciDevice(QuietDevice[P]):
    """A function of the PCI bus, `function` of its slot. A subclass sets its identity, BARS by their index, and reads
    and writes with the BAR's index as the region. `rom`: what is in its expansion ROM (6.2.5.2), of which it gives
    `read_rom` for ROM_REGION."""

    VENDOR: int
    DEVICE: int
    CLASS: int  # class, subclass and programming interface, as 0x020000
    REVISION = 0
    SUBSYSTEM = (0, 0)  # vendor, device
    INTERRUPT = True
    EXPRESS = False  # it is of PCI Express, where the board has that
    BARS: dict[int, Bar] = {}
    function_number = 0
    rom = b""

    def __init__(self, board: Port, name: str, slot: int) -> None:
        super().__init__(board, name)
        self.slot = slot
        size = max(_ROM_LEAST, 1 << (len(self.rom) - 1).bit_length()) if self.rom else 0
        self.rom_bar = Bar("memory", size) if self.rom else None
        wired = (board.chipset.gsi(slot), board.chipset.wired(slot)) if self.INTERRUPT else None
        self.irq = wired[0] if wired else None
        self.given: dict[int, int] = {}  # BAR -> the address it has from the beginning
        # The configuration space is the bridge's chip's to read and write, but for what is marked as Python's.
        self.function = _chips.Function(board.bus, self.number, wired)
        parts = memoryview(self.function)
        self.config, self._by_python = parts[:256], parts[512:]
        self._mask = parts[256:512]  # bits that a guest can change
        self.writes_have_effects(_COMMAND, 2)
        self.writes_have_effects(_BAR0, _CAPABILITIES - _BAR0)
        self._fixed = self._identity()
        self._own_bits = bytearray(256)  # that the chip changes
        self._own_bits[_STATUS] = _STATUS_INTERRUPT
        self._new_table = b""
        self._next = _HEADER
        self._last_link = _CAPABILITIES
        self._was: tuple[Window, ...] = ()
        if self.EXPRESS and board.chipset.ecam:
            self._add_express()

    def _identity(self) -> bytearray:
        config = bytearray(256)
        struct.pack_into("<HHHH", config, 0, self.VENDOR, self.DEVICE, 0, 0)
        struct.pack_into("<I", config, 8, self.CLASS << 8 | self.REVISION)
        struct.pack_into("<HH", config, 0x2C, *self.SUBSYSTEM)
        config[0x3D] = 1 if self.INTERRUPT else 0
        self._mask[_COMMAND], self._mask[_COMMAND + 1] = _IO | _MEMORY | _MASTER, _INTX_OFF >> 8
        self._mask[0x0C] = 0xFF  # cache line size
        self._mask[_INTERRUPT_LINE] = 0xFF
        for index, bar in self.BARS.items():
            config[_BAR0 + 4 * index] = bar.kind
            self._put(self._mask, _BAR0 + 4 * index, bar, bar.mask)
        if self.rom_bar is not None:
            self._put(self._mask, _ROM, self.rom_bar, self.rom_bar.mask | _ROM_ENABLED)
        return config

    @staticmethod
    def _put(config: bytearray | memoryview, at: int, bar: Bar, value: int) -> None:
        config[at : at + bar.length] = value.to_bytes(bar.length, "little")

    def _address(self, at: int, bar: Bar) -> int:
        return int.from_bytes(self.config[at : at + bar.length], "little") & bar.mask

    def _add_express(self) -> None:
        """An endpoint that is integrated into the root complex, as all on a root bus are (PCI Express 3.0, 7.8): no
        link and no slot. Its extended configuration space has its serial number (7.12)."""
        data = struct.pack("<BxHI", _EXPRESS_CAPABILITY, _INTEGRATED, _ROLE_BASED_ERRORS).ljust(_EXPRESS_SIZE, b"\0")
        self.add_capability(data, struct.pack("<8xH", _DEVICE_CONTROL))
        serial = self.board.own_bytes(f"serial number of {self.name}", 8)
        self.function.set_extended(struct.pack("<I", _SERIAL_NUMBER) + serial + bytes(4))

    def leave_to_firmware(self, *, wakes: bool) -> None:  # noqa: B027
        """Be as the chip is after a reset, where that is not what firmware would have made of it. `wakes`: it begins
        to wake a system that sleeps."""

    def add_msi(self, messages: int) -> None:
        """MSI of up to so many messages, a power of two, with an address of 64 bits and a mask of each. In the
        constructor only."""
        assert messages in (1, 2, 4, 8, 16, MSI_MOST)
        control = messages.bit_length() - 1 << 1 | _MSI_WIDE | _MSI_MASKS
        masks = (1 << messages) - 1
        data = struct.pack("<BBHQIII", _MSI_CAPABILITY, 0, control, 0, 0, 0, 0)
        writable = struct.pack("<2xHQII4x", _MSI_ENABLE | _MSI_ALLOWED, -4 & (1 << 64) - 1, 0xFFFF, masks)
        at = self.add_capability(data, writable)
        self.writes_have_effects(at + 2, 2)
        self.writes_have_effects(at + 0x10, 4)
        self._own_bits[at + _MSI_PENDING : at + _MSI_PENDING + 4] = masks.to_bytes(4, "little")
        self.function.set_msi(at)

    def signal(self, vector: int) -> bool:
        """Send a message, of MSI-X or MSI. False: the driver has enabled neither, and INTA is its interrupt."""
        sent: bool = self.function.signal(vector)
        return sent

    def add_msix(self, vectors: int) -> None:
        """MSI-X, with its table and its pending bits in BAR MSIX_BAR, which the device gives to the chip. In the
        constructor only."""
        assert self.BARS[MSIX_BAR] == MSIX
        table, pending = MSIX_BAR, _chips.MSIX_PENDING | MSIX_BAR
        data = struct.pack("<BBHII", _MSIX_CAPABILITY, 0, vectors - 1, table, pending)
        at = self.add_capability(data, bytes((0, 0, 0, _ENABLE_AND_MASK)))
        self.writes_have_effects(at + 2, 2)
        self.function.set_msix(at, vectors)
        self._new_table = struct.pack("<QII", 0, 0, 1) * vectors  # masked

    def add_capability(self, data: bytes, writable: bytes = b"") -> int:
        """Append a capability: its ID, a byte for the link, its contents; `writable` masks bits that a guest changes.

        Returns its offset. In the constructor only.
        """
        at = self._next
        if at + len(data) > 256:
            raise Invalid(f"{self.name}: the capabilities pass the configuration space")
        self._fixed[at : at + len(data)] = data
        self._fixed[at + 1] = 0
        self._mask[at : at + len(writable)] = writable
        self._fixed[self._last_link] = at
        self._last_link = at + 1
        self._fixed[_STATUS] |= _STATUS_CAPABILITIES
        self._next = (at + len(data) + 3) & ~3
        return at

    # ---- configuration space

    def writes_have_effects(self, at: int, length: int) -> None:
        """Writes of these bytes of the configuration space come to `write_config`."""
        self._by_python[at : at + length] = bytes((_WRITES_BY_PYTHON,)) * length

    def answers_itself(self, at: int, length: int) -> None:
        """Reads of these bytes of the configuration space, and writes, come to `read_config` and `write_config`."""
        self._by_python[at : at + length] = bytes((_ALL_BY_PYTHON,)) * length

    def read_config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            mask = self._mask[at]
            self.config[at] = self.config[at] & ~mask | byte & mask
        if offset < _INTERRUPT_LINE:
            self._config_changed()
        else:
            self.function.drive()

    def _config_changed(self) -> None:
        windows = self.windows()
        if windows != self._was:
            self._was = windows
            self.board.rewire(self)
            self.moved()
        self.function.drive()

    def windows(self) -> tuple[Window, ...]:
        command = self.config[_COMMAND]
        windows = []
        for index, bar in self.BARS.items():
            start = self._address(_BAR0 + 4 * index, bar)
            if command & (_IO if bar.space == "port" else _MEMORY) and bar.may_be_at(start):
                windows.append(Window(bar.space, start, bar.size, index))
        if self.rom_bar is not None and command & _MEMORY and self.config[_ROM] & _ROM_ENABLED:
            start = self._address(_ROM, self.rom_bar)
            if self.rom_bar.may_be_at(start):
                windows.append(Window("memory", start, self.rom_bar.size, ROM_REGION))
        return tuple(windows)

    def read_rom(self, offset: int, size: int) -> int:
        return int.from_bytes(self.rom[offset : offset + size].ljust(size, b"\xff"), "little")

    def read(self, region: int, offset: int, size: int) -> int:
        return self.read_rom(offset, size) if region == ROM_REGION else super().read(region, offset, size)

    def bar(self, index: int) -> int | None:
        """Where a BAR is, or None while it is not decoded."""
        return next((window.start for window in self.windows() if window.region == index), None)

    def moved(self) -> None:
        """A BAR was moved, enabled or disabled: for those that map memory of their own there."""

    @property
    def is_master(self) -> bool:
        """Whether the guest lets the device read and write RAM."""
        return bool(self.config[_COMMAND] & _MASTER)

    # ---- interrupts

    @property
    def pending(self) -> bool:
        """INTA as the device drives it; the command register can hold it back."""
        return self.function.pending

    def set_irq(self, level: bool) -> None:
        """Drive INTA."""
        self.function.set_irq(level)

    # ---- life

    def reset(self) -> None:
        self.config[:] = self._fixed
        for index, address in self.given.items():
            if index == ROM_REGION:
                assert self.rom_bar is not None
                self._put(self.config, _ROM, self.rom_bar, address)  # disabled
            else:
                self._put(self.config, _BAR0 + 4 * index, self.BARS[index], address | self.BARS[index].kind)
        self.config[_COMMAND] = _IO | _MEMORY
        if self.INTERRUPT:
            self.config[_INTERRUPT_LINE] = self.board.chipset.pic_irq(self.slot)
        self.function.table, self.function.waiting = self._new_table, 0
        self.function.set_irq(False)
        self._config_changed()

    def save_pci(self) -> PciState:
        function = self.function
        return PciState(
            config=bytes(self.config), pending=self.pending, table=function.table, waiting=function.waiting
        )

    def check_pci(self, state: PciState) -> None:
        """Invalid where a value that no guest can change is not as it is here."""
        bits = zip(state.config, self.config, self._mask, self._own_bits, strict=True)
        for at, (value, is_, mask, own) in enumerate(bits):
            if (value ^ is_) & ~(mask | own):
                raise Invalid(f"{self.name}: byte {at:#x} of its configuration space cannot be {value:#x}")
        vectors = len(self._new_table) // 16
        if len(state.table) != len(self._new_table) or state.waiting >> vectors:
            raise Invalid(f"{self.name}: it has {vectors} vectors of MSI-X")
        for address, _, control in struct.iter_unpack("<QII", state.table):
            if address & 3 or control & ~1:
                raise Invalid(f"{self.name}: a reserved bit of its MSI-X table is set")

    def load_pci(self, state: PciState) -> None:
        self.config[:] = state.config
        self.function.table, self.function.waiting = state.table, state.waiting
        self.function.set_irq(state.pending)
        self._config_changed()

    def describe(self) -> dict[str, str]:
        return {"pci": f"00:{self.slot:02x}.{self.function_number} {self.VENDOR:04x}:{self.DEVICE:04x}"}

    @property
    def place(self) -> int:
        """Of the bus: slot and function."""
        return self.slot << 3 | self.function_number

    def all_bars(self) -> dict[int, Bar]:
        """By their index, and the ROM's as ROM_REGION."""
        return self.BARS if self.rom_bar is None else {**self.BARS, ROM_REGION: self.rom_bar}

    def has_others(self, several: bool) -> None:
        """Whether its slot has other functions than this, number 0: a search looks for them then (6.2.1)."""
        for config in self._fixed, self.config:
            config[_HEADER_TYPE] = config[_HEADER_TYPE] & ~_SEVERAL_FUNCTIONS | (_SEVERAL_FUNCTIONS if several else 0)


class PlainPciDevice(PciDevice[PciState]):
    """One that is no more than its configuration space."""

    STATE = PciState

    def save(self) -> PciState:
        return self.save_pci()

    def check(self, state: PciState) -> None:
        self.check_pci(state)

    def load(self, state: PciState) -> None:
        self.load_pci(state)
        self.takes_effect()

    def write_config(self, offset: int, size: int, value: int) -> None:
        super().write_config(offset, size, value)
        self.takes_effect()

    def reset(self) -> None:
        super().reset()
        self.takes_effect()

    def takes_effect(self) -> None:
        """What the configuration space says now, it does: after a write, a reset and a load."""


class HostBridgeState(DeviceState):
    address: U32
    reset_control: U8


class HostBridge(QuietDevice[HostBridgeState]):
    """Ports CF8 and CFC, the memory where a Q35 has the configuration spaces, and the bus. The bridge itself is slot 0
    (an i440FX or a Q35 by its identity, as firmware knows it)."""

    TYPE = "pci-host"
    STATE = HostBridgeState

    def __init__(self, board: Port, name: str = "pci") -> None:
        super().__init__(board, name)
        self.chip = _chips.Bridge(board.bus, self.number)
        self.reset_control = 0
        self._ecam: tuple[int, int] | None = None
        self.functions: dict[int, PciDevice] = {}  # by their place

    def windows(self) -> tuple[Window, ...]:
        ports = Window("port", CONFIG_ADDRESS, 4, 0), Window("port", CONFIG_DATA, 4, 1)
        return ports if self._ecam is None else (*ports, Window("memory", *self._ecam, _ECAM))

    def place_ecam(self, start: int | None, size: int = ECAM_SIZE) -> None:
        """Have the configuration spaces in memory there, a page a function; None: nowhere."""
        ecam = None if start is None else (start, size)
        if ecam != self._ecam:
            self._ecam = ecam
            self.board.rewire(self)

    def free_slot(self) -> int:
        taken = {place >> 3 for place in self.functions}
        for slot in range(1, SLOTS):
            if slot not in taken:
                return slot
        raise LimitReached(f"the PCI bus has {SLOTS} slots, and all are taken")

    def plug(self, device: PciDevice) -> PciDevice:
        """Put a device into its place, give its BARs addresses, and add it to the board. Function 0 of a slot comes
        first, and goes last: no search finds the others without it (3.2.2.3.4)."""
        place = device.place
        if place in self.functions:
            raise Invalid(f"{device.name}: PCI slot {device.slot} is taken")
        if not 0 <= device.function_number < FUNCTIONS or (place & 7 and place & ~7 not in self.functions):
            raise Invalid(f"{device.name}: PCI slot {device.slot} cannot have a function {device.function_number} now")
        for index, bar in device.all_bars().items():
            device.given[index] = self._place(device, bar)
        self.functions[place] = device
        self.chip.set_function(place, device.function)
        try:
            device.reset()
            self.board.remove_windows(device)
            self.board.add(device)
        except BaseException:
            self._take_out(device)
            raise
        self._tell_first(place)
        return device

    def _take_out(self, device: PciDevice) -> None:
        del self.functions[device.place]
        self.chip.set_function(device.place, None)
        self._tell_first(device.place)

    def _tell_first(self, place: int) -> None:
        first = self.functions.get(place & ~7)
        if first is not None:
            first.has_others(any(other & ~7 == place & ~7 and other & 7 for other in self.functions))

    def unplug(self, device: PciDevice) -> None:
        if not device.function_number and any(place & ~7 == device.place and place & 7 for place in self.functions):
            raise Busy(f"{device.name}: its slot has other functions, which go first")
        self._take_out(device)
        self.board.remove(device)

    def _place(self, device: PciDevice, bar: Bar) -> int:
        start, end = (PORTS_START, PORTS_END) if bar.space == "port" else (MEMORY_START, MEMORY_END)
        taken = sorted(
            (address, other.all_bars()[index].size)
            for other in (*self.functions.values(), device)
            for index, address in other.given.items()
            if other.all_bars()[index].space == bar.space
        )
        size = max(bar.size, 0x20)
        at = start
        for address, length in taken:
            if at + size <= address:
                break
            at = max(at, -(-(address + length) // size) * size)
        if at + size > end:
            raise LimitReached(f"{device.name}: the PCI bus has no room for {size} bytes of {bar.space}")
        return at

    def _target(self, offset: int) -> tuple[PciDevice, int] | None:
        address = self.address
        if not address & 0x8000_0000:  # off
            return None
        place = address >> 8 & 0xFFFF  # bus, slot, function
        device = self.functions.get(place)
        return None if device is None else (device, (address & 0xFC) + offset)

    @property
    def address(self) -> int:
        return self.chip.address

    def read(self, region: int, offset: int, size: int) -> int:
        value = self.chip.read(region, offset, size)
        if value is not None:
            return value
        if region == _ECAM:
            return self._read_ecam(offset, size)
        if region == 0:
            return self.reset_control
        target = self._target(offset)
        if target is None:
            return (1 << 8 * size) - 1
        return target[0].read_config(target[1], min(size, 4 - offset))

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if self.chip.write(region, offset, size, value):
            return
        if region == _ECAM:
            self._write_ecam(offset, size, value)
            return
        if region == 0:
            self._reset_control(value)
            return
        target = self._target(offset)
        if target is not None:
            size = min(size, 4 - offset)
            target[0].write_config(target[1], size, value & (1 << 8 * size) - 1)

    def _read_ecam(self, offset: int, size: int) -> int:
        """What the chip does not answer: a byte that is a device's, or an access of more than a dword's bytes."""
        if offset % 4 + size > 4:
            return int.from_bytes((self.read(_ECAM, offset + at, 1) for at in range(size)), "little")
        return self.functions[offset // ECAM_PAGE].read_config(offset % ECAM_PAGE, size)

    def _write_ecam(self, offset: int, size: int, value: int) -> None:
        if offset % 4 + size > 4:
            for at, byte in enumerate(value.to_bytes(size, "little"), offset):
                self.write(_ECAM, at, 1, byte)
            return
        self.functions[offset // ECAM_PAGE].write_config(offset % ECAM_PAGE, size, value)

    def _reset_control(self, value: int) -> None:
        """Port CF9, the reset control register: RST_CPU, a rising edge of bit 2, resets the machine. SYS_RST, bit 1, is
        kept: which of two resets that would be."""
        self.reset_control = value & 2
        if value & 4:
            self.board.stop("reset")

    def reset(self) -> None:
        self.chip.address = self.reset_control = 0

    def save(self) -> HostBridgeState:
        return HostBridgeState(address=self.address, reset_control=self.reset_control)

    def load(self, state: HostBridgeState) -> None:
        self.chip.address, self.reset_control = state.address & 0x80FF_FFFC, state.reset_control & 2


class Bridge(PlainPciDevice):
    """Slot 0: what firmware and kernels look for first."""

    TYPE = "pci-host-bridge"
    VENDOR, DEVICE, CLASS, REVISION = 0x8086, 0x1237, 0x060000, 2
    SUBSYSTEM = 0x1AF4, 0x1100  # by which SeaBIOS knows that there is fw_cfg to ask (its src/fw/paravirt.c)
    INTERRUPT = False
