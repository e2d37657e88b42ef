"""Drive: what a disk and a CD-ROM drive have in common: the registers of the command block, and how a command goes on.

A command is in a phase. In `pio_in` and `pio_out` a block is at the data port (the channel has it); in `dma_in` and
`dma_out` the drive waits for the bus master, or is being served by it. What is transferred next is said by fields that
are in the state, so that a drive goes on in the middle of a command.

Source: ATA/ATAPI-6 (T13/1410D), chapters 7 (registers), 9 (protocols) and 9.12 (signatures).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

from vmfs.devices.device import U8, U16, DeviceState, Port, QuietDevice
from vmfs.devices.worker import Then, Worker

BSY, DRDY, DF, DSC, DRQ, ERR = 0x80, 0x40, 0x20, 0x10, 0x08, 0x01  # status
ICRC, UNC, IDNF, ABRT = 0x80, 0x40, 0x10, 0x04  # error
DATA, ERROR, COUNT, LOW, MID, HIGH, DEVICE, STATUS = range(8)
FEATURES, COMMAND = ERROR, STATUS
DEV, LBA = 0x10, 0x40  # device register
READ_QUEUED, WRITE_QUEUED = QUEUED = 0x60, 0x61  # of SATA (ATA8-ACS, 7.27, 7.62)
_OBSOLETE = 0xA0  # bits of the device register that read as ones

Phase = Literal["idle", "busy", "packet", "pio_in", "pio_out", "dma_in", "dma_out"]

NAMES = "hda", "hdb", "hdc", "hdd"


class DriveState(DeviceState):
    """The registers that have two bytes (7.1, the previous content) have both; `command`: the one under way."""

    features: U16
    sector_count: U16
    low: U16
    mid: U16
    high: U16
    device: U8
    status: U8
    error: U8
    command: U8
    phase: Phase
    mode: U8


D = TypeVar("D", bound=DriveState)


class Cable(Protocol):
    """What a drive asks of its channel."""

    def open_block(self, to_host: bool, data: bytes | bytearray) -> None:
        """Have a block at the data port; `block_done` when it has gone through."""

    def close_block(self) -> None: ...

    def interrupt(self, drive: Drive[Any]) -> None:
        """Assert INTRQ."""

    def dma_ready(self, drive: Drive[Any]) -> None:
        """The drive waits for the bus master."""

    def changed(self) -> None:
        """A status has."""

    def settle(self) -> None:
        """Have nothing under way beside the CPU."""

    def at_end(self, call: Callable[[], None]) -> None:
        """Call that once nothing is under way any more, nor will be."""


class _NoCable:
    """Of a drive that is in no channel yet."""

    def open_block(self, to_host: bool, data: bytes | bytearray) -> None:
        pass

    def close_block(self) -> None:
        pass

    def interrupt(self, drive: Drive[Any]) -> None:
        pass

    def dma_ready(self, drive: Drive[Any]) -> None:
        pass

    def changed(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def at_end(self, call: Callable[[], None]) -> None:
        call()


def cut(views: list[memoryview], length: int) -> list[memoryview]:
    """The first `length` bytes."""
    taken = []
    for view in views:
        if length <= 0:
            break
        taken.append(view[:length])
        length -= len(view)
    return taken


class Drive(QuietDevice[D], abc.ABC):
    """One of the two drives of a channel, or the one of a SATA port, which has the interrupt and the block of data."""

    SIGNATURE: tuple[int, int]  # mid and high after a reset
    AFTER_RESET: int  # status
    is_packet = False
    is_serial = False  # it is at a port of SATA

    def __init__(self, board: Port, name: str) -> None:
        super().__init__(board, name)
        self.cable: Cable = _NoCable()
        self.mode = 0
        self.standby = False
        self.clear()

    def clear(self) -> None:
        """As after power-on."""
        self.features = self.sector_count = self.low = self.mid = self.high = 0
        self.device = 0
        self.status = self.error = self.command = 0
        self.phase: Phase = "idle"
        self.sign(0)

    def sign(self, unit_bits: int) -> None:
        """Show the signature (9.12): after resets and diagnostics. Nothing is under way any more."""
        self.phase = "idle"
        self.sector_count = self.low = 1
        self.mid, self.high = self.SIGNATURE
        self.device = unit_bits
        self.error = 1  # passed
        self.status = self.AFTER_RESET

    # ---- registers

    def read_register(self, offset: int, previous: bool) -> int:
        """All but data and status. `previous`: HOB is set in the device control register."""
        if offset == ERROR:
            return self.error
        if offset == DEVICE:
            return self.device | _OBSOLETE
        value: int = getattr(self, _TWO_BYTES[offset])
        return value >> 8 if previous else value & 0xFF

    def write_register(self, offset: int, value: int) -> None:
        """All but data and command."""
        if offset == DEVICE:
            self.device = value
        else:
            name = _TWO_BYTES[offset]
            setattr(self, name, (getattr(self, name) & 0xFF) << 8 | value)

    @property
    def is_waiting(self) -> bool:
        """It takes neither a command nor the parameters of one."""
        return bool(self.status & (BSY | DRQ))

    # ---- commands

    @abc.abstractmethod
    def begin(self, command: int) -> None:
        """The command register was written, and there is nothing under way."""

    def aborts(self, command: int, *, others: bool) -> bool:
        """At a port of SATA, before `begin`: whether it fails since queued commands have failed, or since there are
        `others`, which are queued where it is not."""
        return False

    @property
    def tag(self) -> int:
        """Of a queued command."""
        return self.sector_count >> 3 & 31

    @abc.abstractmethod
    def block_done(self, data: bytes) -> None:
        """The block has gone through the data port; `data` is what the host has written."""

    @abc.abstractmethod
    def dma_length(self) -> int:
        """Bytes that are to be moved yet, in the phases of DMA."""

    @abc.abstractmethod
    def dma_unit(self) -> int:
        """It moves multiples of so many bytes at a time."""

    @abc.abstractmethod
    def dma_move(self, length: int, views: Sequence[memoryview]) -> None:
        """Move the next `length` bytes. In a thread of a worker; nothing of the drive changes meanwhile. OSError."""

    def dma_at_once(self, length: int, views: Sequence[memoryview]) -> bool:
        """Move them now, where that does not wait for the host. False where it would, and nothing is moved."""
        return False

    def dma_begin(
        self, worker: Worker, length: int, views: Sequence[memoryview], then: Then, later: Then
    ) -> None:
        """Move them: `then` is called with an OSError or None where that does not wait for the host, else `later`, by
        the worker, with whatever its thread has raised."""

        def work() -> OSError | None:
            try:
                if length:
                    self.dma_move(length, views)
            except OSError as error:
                return error
            return None

        self.set_busy(True)
        if not self.board.has_workers:
            then(work())
        elif self.dma_at_once(length, views):
            then(None)
        else:
            worker.submit(work, later)

    @abc.abstractmethod
    def dma_moved(self, length: int, failure: OSError | None) -> None:
        """So many were, or could not be; then the command goes on or ends."""

    @abc.abstractmethod
    def end_dma(self) -> None:
        """Nothing more can be moved: the bus master could not reach RAM."""

    def finish(self, *, interrupt: bool = True) -> None:
        """The command has succeeded."""
        self.phase = "idle"
        self.status = DRDY | DSC
        self.cable.changed()
        if interrupt:
            self.cable.interrupt(self)

    def fail(self, error: int, *, fault: bool = False) -> None:
        self.phase = "idle"
        self.error = error
        self.status = DRDY | DSC | ERR | (DF if fault else 0)
        self.cable.close_block()
        self.cable.changed()
        self.cable.interrupt(self)

    def offer(self, to_host: bool, data: bytes | bytearray, *, interrupt: bool) -> None:
        """Have a block at the data port."""
        self.phase = "pio_in" if to_host else "pio_out"
        self.status = DRDY | DSC | DRQ
        self.cable.open_block(to_host, data)
        self.cable.changed()
        if interrupt:
            self.cable.interrupt(self)

    def await_dma(self, to_host: bool) -> None:
        self.phase = "dma_in" if to_host else "dma_out"
        self.status = DRDY | DSC | DRQ
        self.cable.changed()
        self.cable.dma_ready(self)

    def set_busy(self, is_busy: bool) -> None:
        """The bus master moves data beside the CPU."""
        self.status = BSY if is_busy else DRDY | DSC | DRQ
        self.cable.changed()

    def set_transfer_mode(self, value: int) -> bool:
        """SET FEATURES 03 (8.46): whether there is such a mode."""
        if value not in MODES:
            return False
        if value >= 0x20:
            self.mode = value
        return True

    # ---- commands that all drives have

    def _check_power(self) -> None:
        self.sector_count = 0 if self.standby else 0xFF
        self.finish()

    def _stand_by(self) -> None:
        self.standby = True
        self.finish()

    def _idle(self) -> None:
        self.standby = False
        self.finish()

    # ---- life

    def reset(self) -> None:
        self.mode = 0
        self.clear()

    def save_registers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in DriveState.__struct_fields__}

    def load_registers(self, state: DriveState) -> None:
        for name in DriveState.__struct_fields__:
            setattr(self, name, getattr(state, name))
        self.cable.changed()


_TWO_BYTES = {FEATURES: "features", COUNT: "sector_count", LOW: "low", MID: "mid", HIGH: "high"}
# PIO by default, PIO 0 to 4, multiword DMA 0 to 2, Ultra DMA 0 to 5
MODES = {0, 1, *range(8, 13), *range(0x20, 0x23), *range(0x40, 0x46)}


def mode_words(mode: int) -> tuple[int, int]:
    """Words 63 and 88 of the identification: the modes of multiword and Ultra DMA, and which one is selected."""
    multiword = 1 << 8 + mode - 0x20 if 0x20 <= mode < 0x40 else 0
    ultra = 1 << 8 + mode - 0x40 if mode >= 0x40 else 0
    return 0x07 | multiword, 0x3F | ultra


def words_of(text: str, length: int) -> bytes:
    """ASCII as the identification has it: padded with spaces, the bytes of each word swapped."""
    data = bytearray(text.encode("ascii", "replace")[:length].ljust(length))
    data[0::2], data[1::2] = data[1::2], data[0::2]
    return bytes(data)
