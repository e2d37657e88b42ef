"""xHCI: a controller of USB 3 and 2, with a root hub of eight ports and what is plugged into them.

Commands, requests, and transfers that wait for nobody are done by the CPU's thread when their doorbell is rung; what
a disk has to wait for the host with is given to a worker, one a port, where the machine's time is the host's. No more
than AT_ONCE transfers of a ring are done at a time: the rest follows a microframe later.

Left out: streams, isochronous endpoints, hubs, bandwidth, saved state (CRS fails), and moderation: an interrupt comes
at once.

Source: eXtensible Host Controller Interface 1.1, chapters 4 (operation), 5 (registers) and 7 (capabilities).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import msgspec

from vmfs.devices.device import U8, U16, U32, U64, DeviceState
from vmfs.devices.device import Port as BoardPort
from vmfs.devices.pci import MSIX, MSIX_BAR, Bar, PciDevice, PciState
from vmfs.devices.timers import Timer
from vmfs.devices.usb import commands, slots
from vmfs.devices.usb.commands import RING_STOPPED, SHORT_PACKET, STALL_ERROR, STOPPED, SUCCESS, TRANSACTION_ERROR
from vmfs.devices.usb.device import SETUP, Job, Setup, Stall, UsbDevice, scatter
from vmfs.devices.usb.events import BUSY, ENABLED, PENDING, SEGMENTS_MOST, Interrupter, InterrupterState
from vmfs.devices.usb.ports import PortState, RootPort
from vmfs.devices.usb.rings import (
    COMMAND_EVENT,
    DATA_STAGE,
    EVENT_DATA,
    ISOCH,
    NO_OP,
    NORMAL,
    PORT_EVENT,
    SETUP_STAGE,
    STATUS_STAGE,
    TRANSFER_EVENT,
    TRB,
    BadRing,
    Place,
    Transfer,
    Trb,
    next_transfer,
    next_trb,
)
from vmfs.devices.usb.slots import CONTROL, SLOTS, Slot, SlotEndpoint, SlotState, address_of, dci_of
from vmfs.devices.worker import Worker, Working
from vmfs.words.errors import Invalid

# Where each device is, for as long as a machine has it.
PLACES = {
    "usb-kbd0": 1, "usb-kbd1": 2, "usb-tablet0": 3, "usb-tablet1": 4,
    "usb-disk0": 5, "usb-disk1": 6, "usb-disk2": 7, "usb-disk3": 8,
}  # fmt: skip
PORTS, _FIRST_SUPER = 8, 5
INTERRUPTERS = 4
AT_ONCE = 256
_MICROFRAME = 125_000  # ns
_SIZE = 0x4000
_OPERATIONAL, _CAPABILITIES, _RUNTIME, _DOORBELLS = 0x40, 0x500, 0x1000, 0x2000
_FIRST_PORT, _INTERRUPTER = 0x440, 0x1020
_USBCMD, _USBSTS, _PAGESIZE, _DNCTRL, _CRCR, _DCBAAP, _CONFIG = 0x00, 0x04, 0x08, 0x14, 0x18, 0x30, 0x38
_RUN, _RESET, _INTERRUPTS, _SAVES, _RESTORES = 1, 2, 4, 0x100, 0x200
_COMMAND_MASK = 0xC0D  # RS, INTE, HSEE, EWE, EU3S
_HALTED, _HOST_ERROR, _EVENT, _PORT_CHANGE, _RESTORE_ERROR = 1, 4, 8, 0x10, 0x400
_STATUS_CLEARS = _HOST_ERROR | _EVENT | _PORT_CHANGE | _RESTORE_ERROR
_RING_STOP, _RING_ABORT, _RING_RUNS = 2, 4, 8
_ALL = 0xFFFF_FFFF
_SBRN = 0x60  # of the configuration space
_REGISTERS = {
    0x00: 0x0100_0000 | _OPERATIONAL,
    0x04: PORTS << 24 | INTERRUPTERS << 8 | SLOTS,
    0x08: SEGMENTS_MOST << 4,
    0x10: _CAPABILITIES >> 2 << 16 | 1,  # addresses of 64 bits
    0x14: _DOORBELLS,
    0x18: _RUNTIME,
    **{
        _CAPABILITIES + 4 * at: word
        for at, word in enumerate((
            0x0200_0402, 0x2042_5355, (_FIRST_SUPER - 1) << 8 | 1, 0,  # "USB ", of version 2.0: ports 1 to 4
            0x0300_0002, 0x2042_5355, (PORTS - _FIRST_SUPER + 1) << 8 | _FIRST_SUPER, 0,
        ))
    },
}  # fmt: skip
_DATA = NORMAL, DATA_STAGE, ISOCH


class XhciState(DeviceState):
    """Its registers, slots by their number; `resumes`: when transfers that were put off go on."""

    pci: PciState
    command: U32
    status: U32
    notifications: U16
    ring: U64
    ring_cycle: bool
    ring_runs: bool
    contexts: U64
    configured_slots: U8
    slots: dict[Annotated[int, msgspec.Meta(ge=1, le=SLOTS)], SlotState]
    ports: Annotated[tuple[PortState, ...], msgspec.Meta(min_length=PORTS, max_length=PORTS)]
    interrupters: Annotated[
        tuple[InterrupterState, ...], msgspec.Meta(min_length=INTERRUPTERS, max_length=INTERRUPTERS)
    ]
    resumes: U64 | None


class Xhci(Working, PciDevice[XhciState]):
    TYPE = "xhci"
    STATE = XhciState
    VENDOR, DEVICE, CLASS = 0x1234, 0x5843, 0x0C0330
    EXPRESS = True
    BARS = {0: Bar("memory", _SIZE), MSIX_BAR: MSIX}

    def __init__(self, board: BoardPort, name: str, slot: int) -> None:
        self.ports = {number: RootPort(number, number >= _FIRST_SUPER) for number in range(1, PORTS + 1)}
        self._board = board
        self.workers = {number: self._worker(number) for number in self.ports}
        self.interrupters = tuple(Interrupter(board) for _ in range(INTERRUPTERS))
        self._timer: Timer | None = None
        super().__init__(board, name, slot)
        self.add_msix(INTERRUPTERS)
        self._fixed[_SBRN : _SBRN + 2] = b"\x30\x20"  # USB 3.0, and frames of their own length
        self._clear()

    def _worker(self, number: int) -> Worker:
        return Worker(self._board, f"usb-{number}")

    def _clear(self) -> None:
        """As after HCRST."""
        self.command, self.status = 0, _HALTED
        self.notifications = 0
        self.ring, self.ring_runs = Place(0, False), False
        self.contexts = self.configured_slots = 0
        self.slots: dict[int, Slot] = {}
        for port in self.ports.values():
            port.clear()
        for one in self.interrupters:
            one.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- what is plugged in

    def connect(self, device: UsbDevice[Any]) -> None:
        """Put it where its name says. Invalid where another device is."""
        port = self.ports[PLACES[device.name]]
        if port.device is not None:
            raise Invalid(f"there is a device {device.name} already")
        device.hub = self
        device.boot_path = ""
        if device.HAS_DISK:
            device.boot_path = f"/pci@i0cf8/usb@{self.slot:x}/storage@{port.number:x}/channel@0/disk@0,0"
        port.device = device
        port.clear()

    def disconnect(self, device: UsbDevice[Any]) -> None:
        port = self.ports[PLACES[device.name]]
        port.device = device.hub = None
        port.clear()
        self.workers[port.number] = self._worker(port.number)

    @property
    def devices(self) -> list[UsbDevice[Any]]:
        return [port.device for port in self.ports.values() if port.device is not None]

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        if region == MSIX_BAR:
            value: int = self.function.read_msix(offset, size)
            return value
        word = self._read(offset & ~3) | self._read((offset & ~3) + 4) << 32
        return word >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def _read(self, offset: int) -> int:
        if offset in _REGISTERS:
            return _REGISTERS[offset]
        if offset >= _INTERRUPTER:
            number, register = divmod(offset - _INTERRUPTER, 0x20)
            return self.interrupters[number].read(register) if number < INTERRUPTERS else 0
        if offset == _RUNTIME:
            return 0 if self.status & _HALTED else self.board.now() // _MICROFRAME & 0x3FFF
        if offset >= _FIRST_PORT:
            number, register = divmod(offset - _FIRST_PORT, 0x10)
            return self.ports[number + 1].read(register) if number < PORTS else 0
        return {
            _USBCMD: self.command, _USBSTS: self.status, _PAGESIZE: 1, _DNCTRL: self.notifications,
            _CRCR: _RING_RUNS if self.ring_runs else 0, _DCBAAP: self.contexts & _ALL,
            _DCBAAP + 4: self.contexts >> 32, _CONFIG: self.configured_slots,
        }.get(offset - _OPERATIONAL, 0)  # fmt: skip

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """Registers are written in words of 32 bits; 64 bits are two of them."""
        if region == MSIX_BAR:
            self.function.write_msix(offset, size, value)
            return
        if size == 8:
            self.write(region, offset, 4, value & _ALL)
            self.write(region, offset + 4, 4, value >> 32)
            return
        if size != 4 or offset & 3:
            return
        try:
            if offset >= _DOORBELLS:
                self._doorbell((offset - _DOORBELLS) // 4, value & 0xFF)
            elif offset >= _INTERRUPTER:
                self._write_interrupter(*divmod(offset - _INTERRUPTER, 0x20), value)
            elif offset >= _FIRST_PORT:
                number, register = divmod(offset - _FIRST_PORT, 0x10)
                if number < PORTS:
                    self._write_port(self.ports[number + 1], register, value)
            else:
                self._write_operational(offset - _OPERATIONAL, value)
        except BadRing:
            self._fail()

    def _write_operational(self, offset: int, value: int) -> None:
        if offset == _USBCMD:
            self._command(value)
        elif offset == _USBSTS:
            self.status &= ~(value & _STATUS_CLEARS)
        elif offset == _DNCTRL:
            self.notifications = value & 0xFFFF
        elif offset == _CRCR:
            if self.ring_runs:
                if value & (_RING_STOP | _RING_ABORT):
                    self.ring_runs = False
                    self._post(0, self._command_event(self.ring.at, RING_STOPPED, 0))
            else:
                self.ring = Place(self.ring.at & ~_ALL | value & ~0x3F, bool(value & 1))
        elif offset == _CRCR + 4:
            if not self.ring_runs:
                self.ring = Place(self.ring.at & _ALL | value << 32, self.ring.cycle)
        elif offset == _DCBAAP:
            self.contexts = self.contexts & ~_ALL | value & ~0x3F
        elif offset == _DCBAAP + 4:
            self.contexts = self.contexts & _ALL | value << 32
        elif offset == _CONFIG:
            self.configured_slots = min(value & 0xFF, SLOTS)

    def _command(self, value: int) -> None:
        if value & _RESET:
            self.settle_all()
            self._clear()
            self._interrupt_again()
            return
        was, self.command = self.command, value & _COMMAND_MASK
        if value & _RESTORES:
            self.status |= _RESTORE_ERROR
        if value & _RUN and not was & _RUN and not self.status & _HOST_ERROR:
            self.status &= ~_HALTED
            for port in self.ports.values():
                if port.has_changed:
                    self._tell_port(port)
            self._go_on()
        elif was & _RUN and not value & _RUN:
            self.settle_all()
            self.status |= _HALTED
            self.ring_runs = False
        self._interrupt_again()

    def _write_port(self, port: RootPort, register: int, value: int) -> None:
        self.settle_workers((self.workers[port.number],))
        if port.write(register, value) and not self.status & _HALTED:
            self._tell_port(port)
        self._go_on()

    def _tell_port(self, port: RootPort) -> None:
        self.status |= _PORT_CHANGE
        self._post(0, TRB.pack(port.number << 24, SUCCESS << 24, PORT_EVENT << 10))

    def _write_interrupter(self, number: int, register: int, value: int) -> None:
        if number >= INTERRUPTERS:
            return
        one = self.interrupters[number]
        one.write(register, value)
        if one.acknowledges(register):
            is_new = one.go_on()
            if one.has_unread:
                self._interrupt(number)
            if is_new:
                self._go_on()
        self._interrupt_again()

    # ---- events and interrupts

    def _fail(self) -> None:
        """The controller could not reach memory: it stops until it is reset (4.10.2.6)."""
        self.counters["bad_dma"] += 1
        self.status |= _HOST_ERROR | _HALTED
        self.command &= ~_RUN
        self.ring_runs = False

    def _post(self, number: int, event: bytes, *, silent: bool = False) -> None:
        number = number if number < INTERRUPTERS else 0
        one = self.interrupters[number]
        if one.post(event) and not silent:
            self._interrupt(number)

    def _interrupt(self, number: int) -> None:
        one = self.interrupters[number]
        if one.dequeue & BUSY:
            return
        one.dequeue |= BUSY
        one.management |= PENDING
        self.status |= _EVENT
        self._interrupt_again()

    def _interrupt_again(self) -> None:
        """Tell of what is pending, as far as that is enabled; a message takes what it tells of."""
        level = False
        for number, one in enumerate(self.interrupters):
            if one.management == PENDING | ENABLED and self.command & _INTERRUPTS:
                if self.signal(number):
                    self.counters["interrupts"] += 1
                    one.management &= ~PENDING
                else:
                    level = True
        if level and not self.pending:
            self.counters["interrupts"] += 1
        self.set_irq(level)

    @staticmethod
    def _command_event(at: int, code: int, slot: int) -> bytes:
        return TRB.pack(at, code << 24, slot << 24 | COMMAND_EVENT << 10)

    # ---- commands

    @property
    def _can_go(self) -> bool:
        return not (
            self.status & _HALTED or self.is_held or any(one.waiting for one in self.interrupters)
        )

    def context_of(self, number: int) -> int:
        """Where the driver sees a slot. BadRing."""
        at = self.contexts + 8 * number
        if not self.board.is_ram(at, 8):
            raise BadRing
        (context,) = struct.unpack("<Q", self.board.dma_read(at, 8))
        return context & ~0x3F

    def _doorbell(self, number: int, target: int) -> None:
        if self.status & _HALTED:
            return
        if not number and not target:
            self.ring_runs = True
            self._go_on()  # what a command has held up, too
            return
        slot = self.slots.get(number)
        one = None if slot is None else slot.endpoints.get(target)
        if one is None:
            self.counters["bad_doorbells"] += 1
            return
        assert slot is not None
        if one.state == slots.STOPPED:
            one.state = slots.RUNNING
            slot.show_endpoint(target)
        if one.state == slots.RUNNING:
            one.active = True
            self._advance(number, target)

    def _do_commands(self) -> None:
        """BadRing."""
        for _ in range(AT_ONCE):
            found = self._next_command()
            if found is None:
                return
            trb, self.ring = found
            self.counters["commands"] += 1
            code, slot = commands.run(self, trb)
            self._post(0, self._command_event(trb.address, code, slot))
        self._resume_later()

    def _next_command(self) -> tuple[Trb, Place] | None:
        if not (self.ring_runs and self._can_go):
            return None
        self._check_master()
        return next_trb(self.board, self.ring)

    def _check_master(self) -> None:
        """BadRing where it may not reach memory."""
        if not self.is_master:
            raise BadRing

    def tell_stopped(self, number: int, dci: int) -> None:
        """An endpoint is stopped: if a transfer has begun, that it was."""
        one = self.slots[number].endpoints[dci]
        found = next_trb(self.board, one.place) if one.active else None
        if found is not None:
            trb = found[0]
            length = trb.length if trb.type in _DATA else 0
            self._tell_transfer(number, dci, trb, STOPPED, length)

    # ---- transfers

    def ready(self, device: UsbDevice[Any], endpoint: int) -> None:
        port = PLACES[device.name]
        try:
            for number, slot in self.slots.items():
                if slot.port == port and dci_of(endpoint) in slot.endpoints:
                    self._advance(number, dci_of(endpoint))
        except BadRing:
            self._fail()

    def _resume_later(self) -> None:
        if self._timer is None:
            self._timer = self.board.schedule(self.board.now() + _MICROFRAME, self._resume)

    def _resume(self) -> None:
        self._timer = None
        self._go_on()

    def _go_on(self) -> None:
        try:
            self._do_commands()
            for number, slot in list(self.slots.items()):
                for dci in list(slot.endpoints):
                    self._advance(number, dci)
        except BadRing:
            self._fail()

    def _advance(self, number: int, dci: int) -> None:
        """Do what an endpoint's ring has. BadRing."""
        slot = self.slots.get(number)
        one = None if slot is None else slot.endpoints.get(dci)
        if slot is None or one is None:
            return
        for _ in range(AT_ONCE):
            if not (one.active and one.state == slots.RUNNING and not one.is_busy and self._can_go):
                return
            self._check_master()
            found = next_transfer(self.board, one.place, control=dci == CONTROL)
            if found is None:
                one.active = False
                return
            if not self._begin(number, slot, one, dci, found):
                return
        self._resume_later()

    def _begin(self, number: int, slot: Slot, one: SlotEndpoint, dci: int, transfer: Transfer) -> bool:
        """Whether it is done."""
        port = self.ports[slot.port]
        device = port.device
        if device is None or not port.is_live:
            self._halt(number, slot, dci, transfer.trbs[0], TRANSACTION_ERROR)
            return True
        if transfer.trbs[0].type == NO_OP:
            self._finish(number, one, dci, transfer, 0)
            return True
        if dci == CONTROL:
            self._request(number, slot, one, device, transfer)
            return True
        views, spans = self._views(transfer.trbs)
        endpoint = address_of(dci)
        try:
            done = device.begin(endpoint, views)
            if isinstance(done, Job):
                done = self._work(number, slot, one, dci, transfer, done, spans, port.number)
        except Stall:
            self._halt(number, slot, dci, transfer.trbs[0], STALL_ERROR)
            return True
        if done is None:
            return False
        self._moved(dci, spans)
        self._finish(number, one, dci, transfer, done)
        return True

    def _moved(self, dci: int, spans: list[tuple[int, int]]) -> None:
        if dci & 1 and spans:
            self.board.wrote_all(spans)

    def _work(
        self, number: int, slot: Slot, one: SlotEndpoint, dci: int, transfer: Transfer, job: Job,
        spans: list[tuple[int, int]], port: int,
    ) -> int | None:  # fmt: skip
        """How much was moved, or None where that is not known yet. Stall."""

        def work() -> OSError | None:
            try:
                job.do()
            except OSError as error:
                return error
            return None

        if not self.board.has_workers:
            return job.then(work())
        if job.at_once():
            return job.then(None)
        one.is_busy = True

        def then(error: Exception | None) -> None:
            one.is_busy = False
            if error is not None and not isinstance(error, OSError):
                raise error
            try:
                self._moved(dci, spans)
                try:
                    self._finish(number, one, dci, transfer, job.then(error))
                except Stall:
                    self._halt(number, slot, dci, transfer.trbs[0], STALL_ERROR)
                self._advance(number, dci)
                for other in list(slot.endpoints):  # which may have waited for this
                    self._advance(number, other)
            except BadRing:
                self._fail()

        self.workers[port].submit(work, then)
        return None

    def _views(self, trbs: list[Trb]) -> tuple[list[memoryview], list[tuple[int, int]]]:
        """The memory of a transfer. BadRing where it is not all RAM."""
        board, views, spans = self.board, [], []
        for trb in trbs:
            if trb.type not in _DATA or not trb.length:
                continue
            if trb.is_immediate:
                views.append(memoryview(bytearray(struct.pack("<Q", trb.parameter)[: trb.length])))
                continue
            if not board.is_ram(trb.parameter, trb.length):
                raise BadRing
            spans.append((trb.parameter, trb.length))
            views.append(board.ram[trb.parameter : trb.parameter + trb.length])
        return views, spans

    def _request(self, number: int, slot: Slot, one: SlotEndpoint, device: UsbDevice[Any], transfer: Transfer) -> None:
        """A request to endpoint 0."""
        first, last = transfer.trbs[0], transfer.trbs[-1]
        stages = [trb for trb in transfer.trbs if trb.type == STATUS_STAGE]
        if first.type != SETUP_STAGE or not first.is_immediate or len(stages) != 1:
            self._halt(number, slot, CONTROL, last, commands.TRB_ERROR)
            return
        setup = Setup(*SETUP.unpack(struct.pack("<Q", first.parameter)))
        views, spans = self._views(transfer.trbs[1:])
        size = sum(map(len, views))
        try:
            if setup.kind & 0x80:
                moved = scatter(device.control(setup, b""), views)
                self.board.wrote_all(spans)
            else:
                if size != setup.length:
                    raise Stall
                device.control(setup, b"".join(bytes(view) for view in views))
                moved = size
        except Stall:
            at_fault = next((trb for trb in transfer.trbs if trb.type == DATA_STAGE), stages[0])
            self._halt(number, slot, CONTROL, at_fault, STALL_ERROR)
            return
        self._finish(number, one, CONTROL, transfer, moved)

    def _halt(self, number: int, slot: Slot, dci: int, trb: Trb, code: int) -> None:
        one = slot.endpoints[dci]
        one.state = slots.FAILED if code == commands.TRB_ERROR else slots.HALTED
        one.active = False
        self.counters["halts"] += 1
        slot.show_endpoint(dci)
        self._tell_transfer(number, dci, trb, code, trb.length if trb.type in _DATA else 0)

    def _finish(self, number: int, one: SlotEndpoint, dci: int, transfer: Transfer, moved: int) -> None:
        """Tell the driver, as its TRBs say, of a transfer of so many bytes."""
        one.place = transfer.place
        self.counters["transfers"] += 1
        left, moved_here, is_short, is_told = moved, 0, False, False
        for trb in transfer.trbs:
            if trb.type == STATUS_STAGE:
                is_short = is_told = False
            if trb.type in _DATA:
                part = min(trb.length, left)
                left -= part
                moved_here += part
                is_short |= part < trb.length
                rest = trb.length - part
            else:
                rest = 0
            if is_told or not (trb.tells or is_short and trb.tells_short):
                continue
            code = SHORT_PACKET if is_short else SUCCESS
            if trb.type == EVENT_DATA:
                self._tell_transfer(number, dci, trb, code, moved_here & 0xFF_FFFF, pointer=trb.parameter)
                moved_here = 0
            else:
                self._tell_transfer(number, dci, trb, code, rest)
            is_told = is_short

    def _tell_transfer(
        self, number: int, dci: int, trb: Trb, code: int, length: int, pointer: int | None = None
    ) -> None:
        """`pointer`: of event data."""
        flags = TRANSFER_EVENT << 10 | dci << 16 | number << 24 | (0 if pointer is None else 4)
        event = TRB.pack(trb.address if pointer is None else pointer, code << 24 | length, flags)
        self._post(trb.target, event, silent=trb.is_silent)

    # ---- who works

    def settle(self, slot: Slot) -> None:
        """Nothing of it is under way, and nothing begins meanwhile."""
        if slot.port:
            self.settle_workers((self.workers[slot.port],))

    def all_workers(self) -> Iterable[Worker]:
        return self.workers.values()

    def go_on(self) -> None:
        if self._timer is None:  # else that does it, at its time
            self._go_on()

    # ---- life

    def reset(self) -> None:
        super().reset()
        self.settle_all()
        self._clear()
        self._interrupt_again()

    def save(self) -> XhciState:
        return XhciState(
            pci=self.save_pci(),
            **{name: getattr(self, name) for name in _PLAIN},
            ring=self.ring.at,
            ring_cycle=self.ring.cycle,
            slots={number: one.save() for number, one in self.slots.items()},
            ports=tuple(port.save() for port in self.ports.values()),
            interrupters=tuple(one.save() for one in self.interrupters),
            resumes=self._timer.when if self._timer is not None else None,
        )

    def check(self, state: XhciState) -> None:
        self.check_pci(state.pci)
        is_right = (
            not state.command & ~_COMMAND_MASK and not state.status & ~(_STATUS_CLEARS | _HALTED)
            and not state.contexts & 0x3F and state.configured_slots <= SLOTS and not state.ring & 0xF
            and not (state.ring_runs and state.status & _HALTED)
            and all(port.may_be(its) for port, its in zip(self.ports.values(), state.ports, strict=True))
            and all(one.may_be(its) for one, its in zip(self.interrupters, state.interrupters, strict=True))
        )  # fmt: skip
        if not is_right:
            raise Invalid(f"{self.name}: registers that it cannot have")
        for number, slot in state.slots.items():
            has_place = bool(slot.port)
            if slot.port > PORTS or has_place != (CONTROL in slot.endpoints) or has_place != (slot.state > 0):
                raise Invalid(f"{self.name}: slot {number} cannot be so")
            if slot.context & 0x3F or any(one.at & 0xF for one in slot.endpoints.values()):
                raise Invalid(f"{self.name}: slot {number} has no such contexts")

    def load(self, state: XhciState) -> None:
        for name in _PLAIN:
            setattr(self, name, getattr(state, name))
        self.ring = Place(state.ring, state.ring_cycle)
        self.slots = {number: Slot.of(self.board, one) for number, one in state.slots.items()}
        for port, its in zip(self.ports.values(), state.ports, strict=True):
            port.load(its)
        for one, its in zip(self.interrupters, state.interrupters, strict=True):
            one.load(its)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if state.resumes is None else self.board.schedule(state.resumes, self._resume)
        self.load_pci(state.pci)

    def describe(self) -> dict[str, str]:
        plugged = " ".join(f"{number}:{port.device.name}" for number, port in self.ports.items() if port.device)
        return {**super().describe(), "ports": plugged or "none"}

    def close(self) -> bool:
        """Whether nothing is under way any more."""
        return all([worker.close() for worker in self.workers.values()])

    def at_end(self, device: UsbDevice[Any], call: Callable[[], None]) -> None:
        self.workers[PLACES[device.name]].at_end(call)


_PLAIN = "command", "status", "notifications", "ring_runs", "contexts", "configured_slots"
