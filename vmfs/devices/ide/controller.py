"""The IDE function of a PIIX3: two channels at the ports of old, and a bus master that moves their data.

Source: Intel 82371SB (PIIX3) data sheet, chapters 2.3 (configuration), 2.7 (bus master registers); Programming
Interface for Bus Master IDE Controller 1.0; ATA/ATAPI-6, chapters 7 and 9.

Where the machine's time is the host's, a worker moves the data of DMA while the guest goes on, and the interrupt comes
when it is done. Where time follows the instructions all is done when the guest starts it. A channel without a drive
reads as zeros, as on QEMU and Bochs.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U8, U32, DeviceState, Port, Window
from vmfs.devices.ide.drive import BSY, COMMAND, DATA, DEV, DEVICE, NAMES, STATUS, Drive, cut
from vmfs.devices.pci import Bar, PciDevice, PciState
from vmfs.devices.worker import Worker
from vmfs.words.errors import Invalid


class Place(NamedTuple):
    """Of a channel: its ports and its line."""

    command: int
    control: int
    irq: int


PLACES = Place(0x1F0, 0x3F6, 14), Place(0x170, 0x376, 15)
COMMAND_0, CONTROL_0, COMMAND_1, CONTROL_1, BUS_MASTER = range(5)  # regions; the last is BAR 4
_IDETIM, _DECODE = 0x40, 0x8000
_NIEN, _SRST, _HOB = 2, 4, 0x80  # device control
_BM_COMMAND, _BM_STATUS, _BM_TABLE = 0, 2, 4
_START, _TO_RAM = 1, 8
_ACTIVE, _BM_ERROR, _BM_INTERRUPT, _CAPABLE = 1, 2, 4, 0x60
_DEVICE_RESET, _DIAGNOSTIC = 0x08, 0x90
_BLOCK_MOST = 1 << 16


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At the data port: its bytes, and how many of them have gone."""

    to_host: bool
    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=_BLOCK_MOST)]
    at: Annotated[int, msgspec.Meta(ge=0, lt=_BLOCK_MOST)]


class ChannelState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`unit`: the drive that is selected; `pending`: INTRQ of each drive; `bus_*`: the bus master's registers."""

    unit: Annotated[int, msgspec.Meta(ge=0, le=1)]
    control: U8
    pending: tuple[bool, bool]
    bus_command: U8
    bus_status: U8
    bus_table: U32
    block: Block | None


class IdeState(DeviceState):
    pci: PciState
    channels: tuple[ChannelState, ChannelState]


class Channel:
    """Two drives, of which one is selected."""

    def __init__(self, controller: Ide, number: int) -> None:
        self.controller = controller
        self.number = number
        self.place = PLACES[number]
        self.drives: list[Drive[Any] | None] = [None, None]
        self.renew_worker()
        self.clear()

    def renew_worker(self) -> None:
        self.worker = Worker(self.controller.board, f"ide-{self.number}")

    def clear(self) -> None:
        self.unit = self.control = 0
        self.pending = [False, False]
        self.controller.chip.take(self.number)
        self.controller.chip.set_bus(self.number, 0, 0, 0)

    @property
    def selected(self) -> Drive[Any] | None:
        return self.drives[self.unit]

    # ---- of its drives

    def open_block(self, to_host: bool, data: bytes | bytearray) -> None:
        self.controller.chip.open(self.number, to_host, data, 0)

    def close_block(self) -> None:
        self.controller.chip.close(self.number)

    def interrupt(self, drive: Drive[Any]) -> None:
        self.pending[self.drives.index(drive)] = True
        self.controller.counters[f"interrupts.{self.number}"] += 1
        self.changed()

    def changed(self) -> None:
        """Have the chip know how it is, and drive the line: a CPU may take the interrupt at once, and finds its
        status."""
        pending = self.pending[self.unit]
        level = pending and not self.control & _NIEN and self.selected is not None
        takes = not self.control & _SRST and not any(one is not None and one.is_waiting for one in self.drives)
        self.controller.chip.show(self.number, self.status, self.unit, pending, level, takes)

    def catch_up(self) -> None:
        """Do what the chip has taken note of. It answers nothing then, until `changed`."""
        log = self.controller.chip.take(self.number)
        for at in range(0, len(log), 2):
            offset, value = log[at], log[at + 1]
            if offset == STATUS:
                self.pending[self.unit] = False
            else:
                self._write_register(offset, value)
        for drive in self.drives if log else ():  # it is another than a restore has left
            if drive is not None:
                self.controller.board.bus.touch(drive.number)

    @contextlib.contextmanager
    def caught_up(self) -> Iterator[None]:
        """For what is done to the channel: its log is done before, and the chip knows all after it."""
        self.catch_up()
        try:
            yield
        finally:
            self.changed()

    def settle(self) -> None:
        self.worker.hold()

    def at_end(self, call: Callable[[], None]) -> None:
        self.worker.at_end(call)

    @property
    def status(self) -> int:
        drive = self.selected
        if drive is None:
            return 0
        return BSY if self.control & _SRST else drive.status

    # ---- the command block

    def read(self, offset: int, size: int) -> int:
        drive = self.selected
        if offset == DATA:
            return self._data(size, None)
        if offset == STATUS:
            status = self.status
            self.pending[self.unit] = False
            return status
        if drive is None:
            other = self.drives[0]  # drive 0 answers for a drive 1 that is not there (9.16.1)
            return 0 if other is None else other.read_register(offset, bool(self.control & _HOB))
        return drive.read_register(offset, bool(self.control & _HOB))

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == DATA:
            self._data(size, value)
            return
        value &= 0xFF
        if offset == COMMAND:
            self.control &= ~_HOB
            self._command(value)
            return
        self._write_register(offset, value)

    def _write_register(self, offset: int, value: int) -> None:
        self.control &= ~_HOB
        selected = self.selected
        if self.control & _SRST or (selected is not None and selected.is_waiting):
            return
        for drive in self.drives:
            if drive is not None and not drive.is_waiting:
                drive.write_register(offset, value)
        if offset == DEVICE:
            self.unit = 1 if value & DEV else 0

    def _data(self, size: int, value: int | None) -> int:
        """An access to the data port that the chip does not answer: it ends a block, or there is none."""
        drive, chip = self.selected, self.controller.chip
        block = chip.state(self.number)
        if drive is None or block is None or block[0] == (value is not None):
            return 0
        read, is_done = chip.last(self.number, value is not None, size, value or 0)
        if is_done:
            data = b"" if block[0] else chip.state(self.number)[1]
            chip.close(self.number)
            drive.block_done(data)
        return read

    def _command(self, value: int) -> None:
        if self.control & _SRST:
            return
        if value == _DIAGNOSTIC:
            self._stop()
            self._reset_drives()
            for drive in self.drives:
                if drive is not None:
                    self.interrupt(drive)
            return
        drive = self.selected
        if drive is None:
            return
        if value == _DEVICE_RESET and drive.is_packet:
            self._stop()
            drive.sign(DEV if self.unit else 0)
            self.pending[self.unit] = False
            return
        if drive.is_waiting:
            return
        self.pending[self.unit] = False
        drive.begin(value)

    def write_control(self, value: int) -> None:
        was, self.control = self.control, value
        if value & _SRST and not was & _SRST:
            self._stop()
            self.pending = [False, False]
            for drive in self.drives:
                if drive is not None:
                    drive.phase = "idle"
        elif was & _SRST and not value & _SRST:
            self._reset_drives()

    def _stop(self) -> None:
        """Nothing is under way any more."""
        self.worker.hold()
        self.close_block()

    def _reset_drives(self) -> None:
        self.unit = 0
        for drive in self.drives:
            if drive is not None:
                drive.sign(0)

    # ---- the bus master

    def write_bus(self, offset: int, size: int, value: int) -> None:
        """The chip leaves the rest to this: writes that begin or end something, and those that no driver makes."""
        command, status, table = self.controller.chip.bus(self.number)
        if offset >= _BM_TABLE:
            shift, mask = 8 * (offset - _BM_TABLE), (1 << 8 * size) - 1
            table = (table & ~(mask << shift) | (value & mask) << shift) & 0xFFFF_FFFF
            self.controller.chip.set_bus(self.number, command, status, table)
            return
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            if at == _BM_COMMAND:
                self._write_bus_command(byte)
            elif at == _BM_STATUS:
                kept = byte & (_BM_ERROR | _BM_INTERRUPT) | _CAPABLE
                self._mark(kept, byte & _CAPABLE)

    def _mark(self, clear: int, set_: int = 0) -> None:
        """Bits of the bus master's status."""
        self.controller.chip.mark_bus(self.number, clear, set_)

    def _write_bus_command(self, value: int) -> None:
        was, _, table = self.controller.chip.bus(self.number)
        if not value & _START and was & _START:
            self.worker.hold()
        _, status, _ = self.controller.chip.bus(self.number)
        active = _ACTIVE if value & _START and (not was & _START or status & _ACTIVE) else 0
        self.controller.chip.set_bus(self.number, value & (_START | _TO_RAM), status & ~_ACTIVE | active, table)
        if active and not was & _START:
            drive = self.selected
            if drive is not None and drive.phase in ("dma_in", "dma_out"):
                self._move(drive)

    def dma_ready(self, drive: Drive[Any]) -> None:
        command, status, _ = self.controller.chip.bus(self.number)
        if command & _START and status & _ACTIVE:
            self._move(drive)

    def _spans(self, length: int) -> tuple[list[tuple[int, int]], bool]:
        """Where the next `length` bytes of RAM are, or fewer; and whether that is all of the table. Invalid where it
        is not RAM."""
        board = self.controller.board
        assert board.ram is not None  # it is mapped
        spans, is_all = board.ram_chip.prds(self.controller.chip.bus(self.number)[2], length)
        if isinstance(spans, int):
            raise Invalid("a table that is not RAM, leads elsewhere, or has no end")
        return spans, is_all

    def _move(self, drive: Drive[Any]) -> None:
        """Have the bus master do what its table says."""
        controller, board = self.controller, self.controller.board
        to_ram = drive.phase == "dma_in"
        try:
            if not controller.is_master:
                raise Invalid("the function is no bus master")
            if to_ram != bool(controller.chip.bus(self.number)[0] & _TO_RAM):
                raise Invalid("the bus master goes the other way")
            spans, is_all = self._spans(drive.dma_length())
        except Invalid:
            controller.counters["bad_dma"] += 1
            self._mark(_ACTIVE, _BM_ERROR)
            drive.end_dma()
            return
        length = sum(size for _, size in spans)
        length -= length % drive.dma_unit()
        is_short = length < drive.dma_length()
        ram = board.ram
        views = cut([ram[start : start + size] for start, size in spans], length)

        def then(failure: Exception | None) -> None:
            if to_ram:
                board.wrote_all(spans)
            if failure is not None and not isinstance(failure, OSError):
                raise failure
            drive.set_busy(False)
            if is_short or is_all:
                self._mark(_ACTIVE)
            drive.dma_moved(length, failure)

        def finish(failure: Exception | None) -> None:
            with self.caught_up():
                then(failure)

        drive.dma_begin(self.worker, length, views, then, finish)

    # ---- life

    def save(self) -> ChannelState:
        with self.caught_up():
            pass
        block = self.controller.chip.state(self.number)
        bus_command, bus_status, bus_table = self.controller.chip.bus(self.number)
        return ChannelState(
            unit=self.unit,
            control=self.control,
            pending=(self.pending[0], self.pending[1]),
            bus_command=bus_command,
            bus_status=bus_status,
            bus_table=bus_table,
            block=None if block is None else Block(*block),
        )

    def load(self, state: ChannelState) -> None:
        chip = self.controller.chip
        chip.take(self.number)  # what is not done yet is not of this state
        self.unit, self.control = state.unit, state.control
        self.pending = list(state.pending)
        if state.block is None:
            self.close_block()
        else:
            chip.open(self.number, state.block.to_host, state.block.data, state.block.at)
        self.changed()
        chip.set_bus(self.number, state.bus_command, state.bus_status, state.bus_table)


class Ide(PciDevice[IdeState]):
    TYPE = "ide"
    STATE = IdeState
    VENDOR, DEVICE, CLASS = 0x8086, 0x7010, 0x010180
    INTERRUPT = False  # INTA is not used: each channel has its line
    BARS: Mapping[int, Bar] = {4: Bar("port", 16)}  # type: ignore[assignment]
    works = True

    def __init__(self, board: Port, name: str, slot: int, function: int = 0) -> None:
        self.function_number = function
        super().__init__(board, name, slot)
        self.chip = _chips.Pio(board.bus, self.number, tuple(place.irq for place in PLACES))
        self.channels = Channel(self, 0), Channel(self, 1)
        self.writes_have_effects(_IDETIM, 4)
        self._mask[_IDETIM : _IDETIM + 5] = b"\xff" * 5  # and SIDETIM
        self._fixed[_IDETIM : _IDETIM + 4] = struct.pack("<HH", _DECODE, _DECODE)

    # ---- drives

    def place_of(self, name: str) -> tuple[Channel, int]:
        number = NAMES.index(name)
        return self.channels[number >> 1], number & 1

    def free_names(self) -> list[str]:
        return [name for name in NAMES if self._drive(name) is None]

    def _drive(self, name: str) -> Drive[Any] | None:
        channel, unit = self.place_of(name)
        return channel.drives[unit]

    def connect(self, drive: Drive[Any]) -> None:
        """Put it where its name says. Invalid where another drive is."""
        channel, unit = self.place_of(drive.name)
        if channel.drives[unit] is not None:
            raise Invalid(f"there is a drive {drive.name} already")
        channel.drives[unit] = drive
        drive.cable = channel
        place = f"{self.slot:x},{self.function_number:x}"
        drive.boot_path = f"/pci@i0cf8/ide@{place}/drive@{channel.number}/disk@{unit}"
        channel.changed()

    def disconnect(self, drive: Drive[Any]) -> None:
        channel, unit = self.place_of(drive.name)
        channel.drives[unit] = None
        channel.renew_worker()  # the drive has ended it
        channel.changed()

    @property
    def drives(self) -> list[Drive[Any]]:
        return [drive for channel in self.channels for drive in channel.drives if drive is not None]

    # ---- accesses

    def windows(self) -> tuple[Window, ...]:
        windows = list(super().windows())
        if self.config[4] & 1:
            for number, place in enumerate(PLACES):
                if self.config[_IDETIM + 2 * number + 1] & _DECODE >> 8:
                    windows.append(Window("port", place.command, 8, 2 * number))
                    windows.append(Window("port", place.control, 1, 2 * number + 1))
        return tuple(windows)

    def write_config(self, offset: int, size: int, value: int) -> None:
        super().write_config(offset, size, value)
        if offset >= _IDETIM:
            self._config_changed()

    def read(self, region: int, offset: int, size: int) -> int:
        value = self.chip.read(region, offset, size)
        if value is not None:
            return int(value)
        channel = self.channels[region >> 1]
        with channel.caught_up():
            return channel.status if region & 1 else channel.read(offset, size)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if self.chip.write(region, offset, size, value):
            return
        channel = self.channels[offset >> 3 if region == BUS_MASTER else region >> 1]
        with channel.caught_up():
            if region == BUS_MASTER:
                channel.write_bus(offset & 7, size, value)
            elif region & 1:
                channel.write_control(value & 0xFF)
            else:
                channel.write(offset, size, value)

    # ---- life

    def run_ends(self) -> None:
        self.sleep()

    def sleep(self) -> None:
        for channel in self.channels:
            with channel.caught_up():
                channel.worker.hold()

    def reset(self) -> None:
        super().reset()
        for channel in self.channels:
            channel.clear()
            channel.close_block()
            channel.changed()

    def save(self) -> IdeState:
        channels = self.channels[0].save(), self.channels[1].save()
        return IdeState(pci=self.save_pci(), channels=channels)

    def check(self, state: IdeState) -> None:
        self.check_pci(state.pci)
        for channel in state.channels:
            if channel.block is not None and channel.block.at >= len(channel.block.data):
                raise Invalid(f"{self.name}: a block that is at its end")

    def load(self, state: IdeState) -> None:
        self.load_pci(state.pci)
        for channel, its in zip(self.channels, state.channels, strict=True):
            channel.load(its)

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "drives": " ".join(drive.name for drive in self.drives) or "none"}

    def close(self) -> bool:
        return all([channel.worker.close() for channel in self.channels])
