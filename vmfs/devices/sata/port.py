"""A port of an AHCI controller: its registers, the command list, and what goes to and from the drive at it.

A drive is one of IDE's, which sees a channel (`Cable`): the port gives it the registers of a command's FIS, moves the
data of PIO and DMA by the command's table, and writes the FISes that a serial drive would send. One command is under
way at a time. A drive takes a queued command (NCQ) when it begins it, and not before: PxCI loses its bit then, and
PxSACT when a Set Device Bits FIS says that it is done.

Source: Serial ATA AHCI 1.3.1, chapters 3.3 (registers), 4.2 (memory), 5 (states), 6 (errors); Serial ATA 3.0, 10.3
(FISes); ATA8-ACS, 4.15 (NCQ).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import msgspec

from vmfs.devices.device import U32, U64, Port
from vmfs.devices.ide.drive import BSY, DRDY, DRQ, DSC, ERR, QUEUED, Drive, cut
from vmfs.devices.worker import Worker

SLOTS = 32
ABAR, FIRST = 5, 0x100  # where ports are, in that region
REGISTERS = 0x80  # bytes of a port's
CLB, CLBU, FB, FBU, IS, IE, CMD, TFD, SIG, SSTS, SCTL, SERR, SACT, CI = (
    0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34, 0x38
)  # fmt: skip
DHRS, PSS, SDBS, DPS, OFS, HBFS, TFES = 1 << 0, 1 << 1, 1 << 3, 1 << 5, 1 << 24, 1 << 29, 1 << 30
_IS_MASK = 0xFDC0_00AF  # what a write of ones clears: not UFS and PCS, which follow SERR
_IE_MASK = 0xFDC0_00FF
ST, SUD, POD, CLO, FRE, FR, CR, ATAPI = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 14, 1 << 15, 1 << 24
_STATUS_BITS = 0x77  # that a Set Device Bits FIS has
_CMD_MASK = ST | FRE | ATAPI | 0x0600_0000  # DLAE and ALPE, too, are kept, and do nothing
_CCS = 8
_SERR_X = 1 << 26  # exchanged
_LINK_UP, _NO_LINK, _OFFLINE = 0x133, 0, 4  # Gen3, active
_DET = 0xF
_NOTHING_YET, _NO_SIGNATURE = 0x7F, 0xFFFF_FFFF

_HEADER = struct.Struct("<HHIQ16x")  # flags, rows, bytes moved, table
_CFL, _TO_DEVICE, _CLEARS_BUSY = 0x1F, 0x40, 0x400
_TABLE, _ACMD = 0x80, 0x40
_FIS_COMMAND, _FIS_REGISTERS, _FIS_PIO, _FIS_BITS = 0x27, 0x34, 0x5F, 0xA1
_AT_PIO, _AT_REGISTERS, _AT_BITS = 0x20, 0x40, 0x58  # in what FB points to
_C, _SRST = 0x80, 4
_I, _D = 0x40, 0x20


class PortState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Its registers; `slot`: of the last command; `signed`: the first FIS after a reset has come; `in_reset`: SRST is
    set in the drive; `failed`: nothing begins until ST is cleared."""

    list_at: U64
    fis_at: U64
    status: U32
    enable: U32
    command: U32
    task: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
    signature: U32
    control: U32
    errors: U32
    issued: U32
    active: U32
    slot: Annotated[int, msgspec.Meta(ge=0, lt=SLOTS)]
    signed: bool
    in_reset: bool
    failed: bool


class Controller(Protocol):
    """What a port asks of its controller."""

    board: Port

    chip: Any  # vmfs.devices._chips.Ahci

    @property
    def counters(self) -> Any: ...
    @property
    def is_master(self) -> bool: ...
    @property
    def is_held(self) -> bool:
        """Nothing is to begin."""
        ...

    def tell(self, is_new: bool) -> None:
        """What the chip has said of an interrupt."""


class _BadTable(Exception):
    """A command's list or table is not all RAM."""


class AhciPort:
    """`drive` is what is at it, or None."""

    def __init__(self, controller: Controller, number: int) -> None:
        self.controller = controller
        self.number = number
        self.drive: Drive[Any] | None = None
        self.renew_worker()
        self._settling = False
        self.clear()

    def renew_worker(self) -> None:
        self.worker = Worker(self.controller.board, f"ahci-{self.number}")

    def clear(self) -> None:
        """As after a reset of the controller."""
        self.list_at = self.fis_at = 0
        self.control = self.errors = self.issued = self.active = self.command = 0
        self.controller.chip.set_port(self.number, 0, 0, False)
        self.slot = 0
        self._begin_link()
        self.failed = False
        self._show()

    def _begin_link(self) -> None:
        """There is a drive, or none: its first FIS comes once FISes are received."""
        self.task, self.signature = _NOTHING_YET, _NO_SIGNATURE
        self.signed = self.drive is None
        self.in_reset = False
        self.failed = bool(self.issued)  # what was issued is not begun again
        self._forget()
        self.is_busy = self.failed

    def _forget(self) -> None:
        """No command is under way."""
        self.is_busy = False
        self._block: tuple[bool, bytes | bytearray] | None = None
        self._raised = False
        self._table = self._rows = self._at = 0
        self._flags = 0
        self._wants_dma = False
        self._row_interrupts = False
        self._tag: int | None = None  # of a queued command, which the drive has taken
        self._noted = 0  # of PxIS, for the next interrupt

    def _show(self) -> None:
        self.controller.chip.show(self.number, self.issued, self.active)

    # ---- registers

    def read(self, offset: int) -> int:
        if offset in _ATTRIBUTES:
            name, shift = _ATTRIBUTES[offset]
            value: int = getattr(self, name) >> shift & 0xFFFF_FFFF
            return value
        if offset in (IS, IE):
            return int(self.controller.chip.read(ABAR, FIRST + REGISTERS * self.number + offset, 4))
        if offset == CMD:
            running = self.command & ST
            return (
                self.command | SUD | POD | (FR if self.command & FRE else 0) | (CR if running else 0)
                | (self.slot << _CCS if running else 0)
            )  # fmt: skip
        if offset == SSTS:
            det = self.control & _DET
            return _OFFLINE if det == 4 else _NO_LINK if self.drive is None or det == 1 else _LINK_UP
        return 0

    def write(self, offset: int, value: int) -> None:
        if offset in (CLB, CLBU, FB, FBU):
            name, shift = _ATTRIBUTES[offset]
            mask = 0xFFFF_FC00 if offset == CLB else 0xFFFF_FF00 if offset == FB else 0xFFFF_FFFF
            setattr(self, name, getattr(self, name) & ~(0xFFFF_FFFF << shift) | (value & mask) << shift)
        elif offset == IE:
            self.controller.tell(self.controller.chip.enable(self.number, value))
        elif offset == CMD:
            self._write_command(value)
        elif offset == SCTL:
            self._write_control(value & 0xFFF)
        elif offset == SERR:
            self.errors &= ~value
            self._tell_errors()
        elif offset == SACT and self.command & ST:
            self.active |= value
            self._show()
        elif offset == CI and self.command & ST:
            self.issued |= value
            self.advance()

    def _write_command(self, value: int) -> None:
        was = self.command
        self.command = value & _CMD_MASK
        if value & CLO:
            self.task &= ~(BSY | DRQ)
        if self.command & FRE and not self.signed:
            self._sign()
        if was & ST and not value & ST:
            self.settle()
            self.issued = self.active = self.slot = 0
            self.failed = False
            self._forget()
            self._show()
        elif self.command & ST:
            self.advance()

    def _write_control(self, value: int) -> None:
        was, self.control = self.control & _DET, value
        det = value & _DET
        if det and not was:
            self.settle()
            if self.drive is not None:
                self.drive.phase = "idle"
            self._begin_link()
        elif was == 1 and not det and self.drive is not None:
            self.drive.sign(0)
            self.errors |= _SERR_X
            if self.command & FRE:
                self._sign()
        self._tell_errors()

    def _tell_errors(self) -> None:
        exchanged = bool(self.errors & _SERR_X)
        self.controller.tell(self.controller.chip.set_exchanged(self.number, exchanged))

    def _sign(self) -> None:
        """The drive's first FIS after a reset (SATA 3.0, 11.3): its signature."""
        drive = self.drive
        if drive is None or self.control & _DET:
            return
        self.signed = True
        self.signature = drive.sector_count & 0xFF | drive.low << 8 & 0xFF00 | drive.mid << 16 & 0xFF_0000 | (
            drive.high & 0xFF
        ) << 24
        self._post_registers(interrupts=False)

    # ---- FISes to the host

    def _set(self, bits: int) -> None:
        bits, self._noted = bits | self._noted, 0
        self.controller.tell(self.controller.chip.interrupt(self.number, bits))

    def _post(self, at: int, fis: bytes) -> None:
        if not self.command & FRE:
            return
        board, address = self.controller.board, self.fis_at + at
        if self.controller.is_master and board.is_ram(address, len(fis)):
            board.dma_write(address, fis)
        else:
            self.controller.counters["bad_dma"] += 1
            self.failed = True
            self._noted |= HBFS

    def _registers(self, kind: int, flags: int, status: int) -> bytearray:
        """A FIS with the drive's."""
        drive = self.drive
        assert drive is not None
        low, mid, high, count = drive.low, drive.mid, drive.high, drive.sector_count
        return bytearray((
            kind, flags, status, drive.error, low & 0xFF, mid & 0xFF, high & 0xFF, drive.device,
            low >> 8 & 0xFF, mid >> 8 & 0xFF, high >> 8 & 0xFF, 0, count & 0xFF, count >> 8 & 0xFF, 0, 0, 0, 0, 0, 0,
        ))  # fmt: skip

    def _post_registers(self, *, interrupts: bool) -> None:
        drive = self.drive
        assert drive is not None
        self.task = drive.error << 8 | drive.status
        self._post(_AT_REGISTERS, self._registers(_FIS_REGISTERS, _I if interrupts else 0, drive.status))
        bits = (DHRS if interrupts else 0) | (DPS if self._row_interrupts else 0)
        if drive.status & ERR:
            bits |= TFES
            self.failed = True
        if bits:
            self._set(bits)

    def _post_pio(self, to_host: bool, length: int, end_status: int) -> None:
        drive = self.drive
        assert drive is not None
        fis = self._registers(_FIS_PIO, _I | (_D if to_host else 0), DRDY | DRQ)
        fis[15] = end_status
        fis[16:18] = struct.pack("<H", length & 0xFFFF)
        self.task = drive.error << 8 | end_status
        self._post(_AT_PIO, fis)

    # ---- commands

    def advance(self) -> None:
        """Begin what was issued, a command after the other. With the board's lock held."""
        while (
            self.issued and self.command & ST and not (self.is_busy or self.failed or self._settling)
            and not self.controller.is_held
        ):  # fmt: skip
            following = ((self.slot + 1 + n) % SLOTS for n in range(SLOTS))
            self.slot = next(slot for slot in following if self.issued >> slot & 1)
            self.is_busy = True
            self.controller.chip.hide(self.number)
            try:
                self._begin()
            except _BadTable:
                self._bad_table()
        self._show()

    def _bad_table(self) -> None:
        """The controller could not reach memory: nothing goes on until ST is cleared (6.1.4)."""
        self.controller.counters["bad_dma"] += 1
        if self.drive is not None and self.drive.phase != "idle":
            self.drive.end_dma()
        self.failed = True
        self._forget()
        self.is_busy = True
        self._set(HBFS)

    def _read(self, address: int, length: int) -> memoryview:
        board = self.controller.board
        if not self.controller.is_master or not board.is_ram(address, length):
            raise _BadTable
        return board.ram[address : address + length]

    def _begin(self) -> None:
        drive = self.drive
        header = self._read(self.list_at + self.slot * _HEADER.size, _HEADER.size)
        self._flags, self._rows, _, table = _HEADER.unpack(header)
        self._table = table & ~0x7F
        self._at, self._block, self._raised, self._wants_dma, self._row_interrupts = 0, None, False, False, False
        fis = bytes(self._read(self._table, 16))
        self._moved(0)
        if drive is None or fis[0] != _FIS_COMMAND or (self._flags & _CFL) < 4:
            self._end()  # a FIS that no drive takes: it is answered by none
            return
        if not fis[1] & _C:
            self._control(drive, fis[15])
            return
        if self.in_reset:
            self._end()
            return
        drive.features, drive.sector_count = fis[3] | fis[11] << 8, fis[12] | fis[13] << 8
        drive.low, drive.mid, drive.high = fis[4] | fis[8] << 8, fis[5] | fis[9] << 8, fis[6] | fis[10] << 8
        drive.device = fis[7]
        self.task = self.task & 0xFF00 | BSY
        if drive.aborts(fis[2], others=bool(self.active) and fis[2] not in QUEUED):
            self._go_on()
            return
        if drive.is_packet and fis[2] == _DEVICE_RESET or fis[2] == _DIAGNOSTIC:
            drive.sign(0)
            self._raised = True
        else:
            drive.begin(fis[2])
        self._go_on()

    def _control(self, drive: Drive[Any], control: int) -> None:
        """A FIS with the device control register: a software reset is SRST, and then not (10.3.4)."""
        if control & _SRST:
            self.in_reset = True
            drive.phase = "idle"
            self.task = 0 if self._flags & _CLEARS_BUSY else BSY
        elif self.in_reset:
            self.in_reset = False
            drive.sign(0)
            self._sign()
        self._end()

    def _go_on(self) -> None:
        """As far as it goes without waiting."""
        drive = self.drive
        assert drive is not None
        while self._block is not None:
            to_host, data = self._block[0], bytearray(self._block[1])
            self._block, self._raised = None, False
            if drive.phase == "packet":
                drive.block_done(bytes(self._read(self._table + _ACMD, len(data))))
                continue
            if not self._move_block(to_host, memoryview(data)):
                self._noted |= OFS
                drive.end_dma()
                break
            self._moved(self._at)
            drive.block_done(b"" if to_host else bytes(data))
            self._post_pio(to_host, len(data), drive.status if self._block is None else BSY | DRDY)
            self._noted |= PSS
        if self._wants_dma:
            self._wants_dma = False
            if drive.command in QUEUED:
                self._take(drive)
            self._move(drive)
        elif drive.phase == "idle":
            self._end_of_command()

    def _take(self, drive: Drive[Any]) -> None:
        """The drive has a queued command, and is ready for the next one."""
        self._tag = drive.tag
        self.issued &= ~(1 << self.slot)
        self.task = DRDY | DSC
        self._post(_AT_REGISTERS, self._registers(_FIS_REGISTERS, 0, DRDY | DSC))

    def _post_bits(self, tag: int) -> None:
        """A queued command is done."""
        drive = self.drive
        assert drive is not None
        has_failed = bool(drive.status & ERR)
        done = 0 if has_failed else 1 << tag
        status = drive.status & _STATUS_BITS
        self.active &= ~done
        self.task = drive.error << 8 | self.task & ~_STATUS_BITS & 0xFF | status
        self._post(_AT_BITS, struct.pack("<BBBBI", _FIS_BITS, _I, status, drive.error, done))
        self.failed |= has_failed
        self._set(SDBS | (TFES if has_failed else 0) | (DPS if self._row_interrupts else 0))

    def _move_block(self, to_host: bool, data: memoryview) -> bool:
        """Whether there was room for it."""
        board, at = self.controller.board, 0
        for start, length in self._spans(len(data)):
            if to_host:
                board.dma_write(start, data[at : at + length])
            else:
                data[at : at + length] = board.ram[start : start + length]
            at += length
        return at == len(data)

    def _end_of_command(self) -> None:
        if self._tag is not None:
            self._post_bits(self._tag)
        elif self._raised:
            self._post_registers(interrupts=True)
        else:  # the last block of PIO to the host: its FIS was the end (11.8)
            self._set(PSS | (DPS if self._row_interrupts else 0))
        self._end()

    def _end(self) -> None:
        if not self.failed:
            if self._tag is None:
                self.issued &= ~(1 << self.slot)
            self._tag = None
            self.is_busy = False

    def _moved(self, count: int) -> None:
        """PRDBC, in the header."""
        self.controller.board.dma_write(self.list_at + self.slot * _HEADER.size + 4, struct.pack("<I", count))

    def _spans(self, length: int) -> list[tuple[int, int]]:
        """Where the next `length` bytes of the command's data are, or as many as the table has room for."""
        board = self.controller.board
        assert board.ram is not None  # it is mapped
        spans, interrupts = board.ram_chip.prdt(self._table + _TABLE, self._rows, self._at, length)
        if isinstance(spans, int):
            raise _BadTable
        self._row_interrupts |= interrupts
        self._at += sum(size for _, size in spans)
        found: list[tuple[int, int]] = spans
        return found

    def _move(self, drive: Drive[Any]) -> None:
        """The data of DMA, all that is left of the command."""
        board, wanted = self.controller.board, drive.dma_length()
        spans = self._spans(wanted)
        room = sum(size for _, size in spans)
        length = room - room % drive.dma_unit()
        to_ram = drive.phase == "dma_in"
        views = cut([board.ram[start : start + size] for start, size in spans], length)

        def then(failure: Exception | None) -> None:
            if to_ram:
                board.wrote_all(spans)
            if failure is not None and not isinstance(failure, OSError):
                raise failure
            drive.set_busy(False)
            self._moved(length)
            drive.dma_moved(length, failure)
            if drive.phase != "idle":  # the table has no more room
                self._noted |= OFS
                drive.end_dma()
            self._end_of_command()

        def finish(failure: Exception | None) -> None:
            self.controller.chip.hide(self.number)
            then(failure)
            self.advance()

        drive.dma_begin(self.worker, length, views, then, finish)

    # ---- as the drive's cable

    def open_block(self, to_host: bool, data: bytes | bytearray) -> None:
        self._block = to_host, data

    def close_block(self) -> None:
        self._block = None

    def interrupt(self, drive: Drive[Any]) -> None:
        self._raised = True

    def dma_ready(self, drive: Drive[Any]) -> None:
        self._wants_dma = True

    def changed(self) -> None:
        pass

    def settle(self) -> None:
        """Nothing is under way; what waits goes on by itself later."""
        self._settling = True
        try:
            self.worker.hold()
        finally:
            self._settling = False
        if self.issued and self.controller.board.has_workers:
            self.worker.submit(lambda: None, lambda _: self.advance())

    def at_end(self, call: Callable[[], None]) -> None:
        self.worker.at_end(call)

    # ---- life

    def save(self) -> PortState:
        status, enable = self.controller.chip.port(self.number)
        return PortState(status=status, enable=enable, **{name: getattr(self, name) for name in _OWN})

    def may_be(self, state: PortState) -> bool:
        return not (
            state.list_at & 0x3FF or state.fis_at & 0xFF or state.status & ~_IS_MASK or state.enable & ~_IE_MASK
            or state.command & ~_CMD_MASK or state.control & ~0xFFF or state.errors & ~_SERR_X
            or (state.issued | state.active and not state.command & ST)
        )  # fmt: skip

    def load(self, state: PortState) -> None:
        self._forget()
        for name in _OWN:
            setattr(self, name, getattr(state, name))
        self.is_busy = self.failed
        exchanged = bool(self.errors & _SERR_X)
        self.controller.chip.set_port(self.number, state.status, state.enable, exchanged)
        self._show()


_DEVICE_RESET, _DIAGNOSTIC = 0x08, 0x90
_OWN = tuple(name for name in PortState.__struct_fields__ if name not in ("status", "enable"))  # the rest is the chip's
_ATTRIBUTES = {
    CLB: ("list_at", 0), CLBU: ("list_at", 32), FB: ("fis_at", 0), FBU: ("fis_at", 32), SACT: ("active", 0),
    TFD: ("task", 0), SIG: ("signature", 0), SCTL: ("control", 0), SERR: ("errors", 0), CI: ("issued", 0),
}  # fmt: skip
