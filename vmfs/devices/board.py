"""Board: what is around the CPU of a machine that is more than bare: its devices, their buses, lines and
memory.

The `Vm` hands it every port and memory-mapped access that leaves the engine (`access`), in the CPU's thread.
It answers all of them: what no device claims reads as ones and swallows writes, as on a PC.

What a guest uses often is in C (vmfs/devices/chips; docs/decisions/0009): such devices have a `chip`, which the
engine asks by the board's `bus` without Python, where it can (`Machine.set_fast_bus`). Everything else comes here,
and where the engine cannot, so do accesses to chips.

A restore leaves alone what nobody has touched since the last one (`put`). All that can change a device comes by one of
two doors, which say so to the bus: `lock`, whose holder may change any device, and the bus's own lock, where a chip is
used. What has the lock and changes nothing, or says itself what, takes `_lock`. A device that works without either is
taken for touched.

`lock` guards all devices of Python. The CPU's thread holds it for an access; other threads (a console, a network, a
worker of a disk that has found a wrong request) take it before they touch a device. It is taken before the engine's
own locks and never while the `Vm`'s lock is held or wanted. The bus has a lock of its own, for chips and lines: the
last that anybody takes before the engine's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from typing import Annotated, Any, ClassVar, Protocol

import msgspec

from vmfs.devices import _chips
from vmfs.devices.bus import Bus
from vmfs.devices.chipset import I440FX, Chipset
from vmfs.devices.device import (
    U64,
    Device,
    DeviceState,
    QuietDevice,
    StatelessDevice,
)
from vmfs.devices.inputs import Inputs
from vmfs.devices.ram import BoardMemory
from vmfs.devices.timers import Timer, TimerQueue
from vmfs.engine.base import Machine, Vcpu
from vmfs.memory.ram import Memory
from vmfs.words import exits
from vmfs.words.errors import EngineFailed, Invalid, LimitReached
from vmfs.words.unclaimed import Use

_PIRQS_LEAST, _PIRQS_MOST = 4, _chips.PIRQS  # inputs of the PCI router
UNCLAIMED_MOST = _chips.UNCLAIMED_MOST  # ports and addresses that are remembered
DEVICES_MOST = 64  # a bit of a line's holders each
_NAP = 0.001  # seconds, in which what a port sends is gathered
_SPACES = "port", "memory"


SEED_SIZE = 16  # bytes
_SMALL = 512  # bytes of a state that is sooner put than looked at
_KEPT = 1 << 16  # bytes of a state that is kept unpacked, too
Packed = Mapping[str, tuple[int, bytes]]  # version and bytes of the states of devices, by their names
_Line = Annotated[int, msgspec.Meta(ge=0, lt=_chips.LINES)]
_Pirq = tuple[tuple[str, ...], _Line]


class BoardState(DeviceState):
    """What is of a board and of no device. `lines`: the devices that hold each GSI high; `unclaimed`: space, address,
    reads, writes and rip; `drawn`: how often there were random bytes of `seed`. `pirqs`: of each input of the PCI
    router, the devices that hold it high, and the line that it drives, or 0. Timers are their devices'."""

    VERSION: ClassVar[int] = 3

    date_of_birth: int
    seed: Annotated[bytes, msgspec.Meta(min_length=SEED_SIZE, max_length=SEED_SIZE)]
    drawn: U64
    shutdown: tuple[str, int | None] | None
    lines: dict[_Line, tuple[str, ...]]
    pirqs: Annotated[tuple[_Pirq, ...], msgspec.Meta(min_length=_PIRQS_LEAST, max_length=_PIRQS_MOST)]
    counters: dict[str, int]
    device_counters: dict[str, dict[str, int]]
    unclaimed: Annotated[tuple[tuple[str, U64, int, int, U64], ...], msgspec.Meta(max_length=UNCLAIMED_MOST)]
    forgotten: int


class _Lock:
    """That of a board's devices: a thread that has it may change any of them, and take it again."""

    def __init__(self, lock: threading.RLock, touch: Callable[[], None]) -> None:
        self._lock, self._touch = lock, touch

    def __enter__(self) -> None:
        self._lock.acquire()
        self._touch()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class Images(Protocol):
    cmdline: str

    def keep(self) -> Mapping[str, Any]:
        """Those that there are, as they are now, by name: each with `size` and `read_at(offset, length)`."""
        ...


class Board(BoardMemory):
    """The devices of one machine. `now` is the guest's time in nanoseconds, as its timers have it."""

    chipset: Chipset = I440FX
    sees_unwritten = False  # reads of RAM that nobody has written are told of

    def __init__(self, machine: Machine, memory: Memory) -> None:
        self._lock = threading.RLock()
        self.lock = _Lock(self._lock, self._touch_all)
        self._is_put: object | None = None  # the devices' states that were put last; None: anything may have changed
        self._moment: int | None = None  # the time, while devices are put: they all are of one moment
        self._put_at = 0  # when: what keeps the time is the same at the same time only
        self._unpacked: dict[str, DeviceState] = {}  # of them, those that were needed
        self._sleepers: list[Device] = []  # of the devices, those that have something to do then
        self._renewed: list[Device] = []
        self._numbered: list[tuple[int, str]] = []  # of each device the bit of its number, and its name
        self._owners: dict[int, Device] = {}  # by their slots of memory
        self._changing: list[Device] = []  # those that may be others although nobody touches them
        self.devices: dict[str, Device] = {}
        self._counters: Counter[str] = Counter()
        self.shutdown: tuple[str, int | None] | None = None  # cause and code, asked for by a device
        self._buses = {"port": Bus("port"), "memory": Bus("memory")}
        self._ports: dict[int, tuple[Callable, Callable, int, int, Callable]] = {}  # what a port was found to be
        self.bus = _chips.Bus(self._set_line, self.signal_msi, self.now)
        super().__init__(machine, memory, self.bus)
        self._numbers: weakref.WeakValueDictionary[int, Device] = weakref.WeakValueDictionary()
        self._attendant: threading.Thread | None = None
        self._told_due: int | None = None
        self._last_now: tuple[int, int] | None = None  # the guest's time, and the host's clock then
        self._closed = False
        self._timers = TimerQueue()
        self._rip = 0  # of the access under way
        self._date_of_birth = time.time_ns() - self.now()  # the date when the guest's time was 0
        self._time_source = "host"
        self.cpu_count = 1
        self._workers: list[Device] = []
        self._runs = 0  # under way, of which a CPU in a thread of its own has one
        self._seed, self._drawn = os.urandom(SEED_SIZE), 0
        self.birth_is_set = False  # by `set_birth`
        self.images: Images | None = None  # what its user wants to boot
        self.inputs = Inputs(self)
        self.is_silent = False  # what ports send has been given to the host before
        self._is_fast = False  # the engine asks the bus by itself,
        self._sees_due = False  # and looks at what is due there
        self._give_bus()

    def _give_bus(self) -> None:
        self._is_fast = self.machine.set_fast_bus(self.bus.capsule)
        self._sees_due = self._is_fast and self.machine.sees_due

    # ---- devices

    @property
    def time_source(self) -> str:
        """`host` or `instructions`, as the machine's."""
        return self._time_source

    @time_source.setter
    def time_source(self, source: str) -> None:
        if source == self._time_source:
            return
        with self.lock:
            self._time_source = source
            for device in self.devices.values():
                device.machine_changed()

    @property
    def has_workers(self) -> bool:
        """Whether threads of devices may do beside the CPU what it asks for. Where time follows the instructions, a
        device does all of it at once: it takes no time, and a run is the same however fast the host is."""
        return self._is_fast and self._time_source == "host"

    def take_number(self, device: Device) -> int:
        """By which the bus knows it; its for as long as there is one of the device."""
        number = next((number for number in range(DEVICES_MOST) if number not in self._numbers), None)
        if number is None:
            raise LimitReached(f"a machine has up to {DEVICES_MOST} devices")
        self._numbers[number] = device
        return number

    def add(self, device: Device) -> Device:
        """Invalid where another device is, and then nothing has changed."""
        with self.lock:
            if device.name in self.devices:
                raise Invalid(f"there is a device {device.name} already")
            self._wire(device)
            self.devices[device.name] = device
            self._sort()
        return device

    def remove(self, device: Device) -> None:
        with self.lock:
            del self.devices[device.name]
            self._sort()
            self._unwire(device)
            self.bus.drop_lines(device.number)
            device.close()

    def _sort(self) -> None:
        devices = self.devices.values()
        self._workers = [device for device in devices if device.works]
        self._sleepers = [device for device in devices if type(device).sleep is not QuietDevice.sleep]
        self._renewed = [device for device in devices if type(device).renew is not Device.renew]
        self._numbered = [(1 << device.number, name) for name, device in self.devices.items()]
        self._owners = {device.memory_slot: device for device in devices if device.memory_slot is not None}
        self._changing = [
            device
            for device in devices
            if device.keeps_time or device.works or type(device).changes_unseen is not Device.changes_unseen
        ]

    def remove_windows(self, device: Device) -> None:
        """Nothing reaches the device until it is wired again."""
        with self.lock:
            self._unwire(device)

    def rewire(self, device: Device) -> None:
        """Its windows have changed. One that overlaps another is not there (a guest sizes BARs so)."""
        with self.lock:
            self._unwire(device)
            for window in device.windows():
                try:
                    self._buses[window.space].add(window, device)
                except Invalid:
                    self._counters["overlaps"] += 1
            self._map_bus()

    def _wire(self, device: Device) -> None:
        try:
            for window in device.windows():
                self._buses[window.space].add(window, device)
        except Invalid:
            self._unwire(device)
            raise
        self._map_bus()

    def _unwire(self, device: Device) -> None:
        for bus in self._buses.values():
            bus.remove(device)
        self._map_bus()

    def _map_bus(self) -> None:
        self._ports.clear()
        self.bus.set_map(
            [
                (space == "memory", window.start, window.length, device.chip, window.region)
                for space, bus in self._buses.items()
                for window, device in bus.windows()
            ]
        )

    # ---- accesses

    def access(self, exit_: exits.Io | exits.Mmio, cpu: Vcpu) -> exits.Exit | None:
        """Do what the guest asked for. Returns the exit that it makes of the run, if it makes one."""
        with self._lock:
            self._rip = exit_.rip
            if type(exit_) is exits.Io:
                self._port(exit_, cpu)
            else:
                self._memory(exit_, cpu)
            self.chip_used()  # by the bus, just before, perhaps
            if self.shutdown is None:
                return None
            (cause, code), self.shutdown = self.shutdown, None
        return exits.Shutdown(cause=cause, code=code, rip=exit_.rip, cpu=exit_.cpu)

    def _port(self, exit_: exits.Io, cpu: Vcpu) -> None:
        size = exit_.size
        read, write, region, offset, touch = self._ports.get(exit_.port) or self._find_port(exit_.port)
        touch()
        if exit_.direction == "out":
            data = exit_.data
            if len(data) == size:
                write(region, offset, size, int.from_bytes(data, "little"))
            else:
                for at in range(0, len(data), size):
                    write(region, offset, size, int.from_bytes(data[at : at + size], "little"))
        elif exit_.count == 1:
            cpu.access_data = (read(region, offset, size) & (1 << 8 * size) - 1).to_bytes(size, "little")
        else:
            mask = (1 << 8 * size) - 1
            cpu.access_data = b"".join(
                (read(region, offset, size) & mask).to_bytes(size, "little") for _ in range(exit_.count)
            )

    def _touch_all(self) -> None:
        """Any device may be another from now on: those of Python know each other."""
        self._is_put = None

    def _find_port(self, port: int) -> tuple[Callable, Callable, int, int, Callable]:
        found = self._buses["port"].find(port)
        if found is None:
            entry: Any = (self._read_no_port, self._write_no_port, port, 0, _nothing)
        else:
            window, device = found
            touch = _nothing if isinstance(device, StatelessDevice) else self._touch_all
            entry = (device.read, device.write, window.region, port - window.start, touch)
        self._ports[port] = entry
        return entry

    def _memory(self, exit_: exits.Mmio, cpu: Vcpu) -> None:
        found = self._buses["memory"].find(exit_.addr)
        size = exit_.size
        if found is None:
            read, write, region, offset = self._read_no_memory, self._write_no_memory, exit_.addr, 0
        else:
            window, device = found
            self._touch_all()
            read, write, region, offset = device.read, device.write, window.region, exit_.addr - window.start
        if exit_.direction == "write":
            write(region, offset, size, int.from_bytes(exit_.data, "little"))
        else:
            cpu.access_data = (read(region, offset, size) & (1 << 8 * size) - 1).to_bytes(size, "little")

    # Where no device is: `region` is the port or the address.

    def _read_no_port(self, region: int, offset: int, size: int) -> int:
        self._note_unclaimed("port", region, write=False)
        return (1 << 8 * size) - 1

    def _write_no_port(self, region: int, offset: int, size: int, value: int) -> None:
        self._note_unclaimed("port", region, write=True)

    def _read_no_memory(self, region: int, offset: int, size: int) -> int:
        self._note_unclaimed("memory", region, write=False)
        return (1 << 8 * size) - 1

    def _write_no_memory(self, region: int, offset: int, size: int, value: int) -> None:
        self._note_unclaimed("memory", region, write=True)

    def _note_unclaimed(self, space: str, address: int, *, write: bool) -> None:
        self.bus.note_unclaimed(space == "memory", address, self._rip, write)

    def unclaimed(self) -> list[str]:
        """The accesses that no device has answered, a line an address: `port=0x80 reads=0 writes=2 rip=0x7c05`."""
        rows, forgotten = self.bus.unclaimed()
        lines = [
            f"{_SPACES[is_memory]}={address:#x} {Use(reads, writes, rip)}"
            for is_memory, address, reads, writes, rip in rows
        ]
        return [f"forgotten={forgotten}", *lines] if forgotten else lines

    @property
    def counters(self) -> Counter[str]:
        if unclaimed := self.bus.take_uses():
            self._counters["unclaimed"] += unclaimed
        return self._counters

    # ---- what devices ask for

    def set_irq(self, device: Device, gsi: int, level: bool) -> None:
        """Drive a line of the interrupt controllers; it is high while any device holds it high (PCI shares
        them)."""
        self.bus.set_line(device.number, gsi, level)

    def _set_line(self, gsi: int, level: bool) -> None:
        if not self._closed:
            self.machine.irq_line(gsi, level)

    def signal_msi(self, address: int, data: int) -> None:
        """Send a message. One to an address that is no local APIC's goes nowhere."""
        if not self._closed:
            self.machine.signal_msi(address, data)

    def set_a20(self, enabled: bool) -> None:
        """The PC's A20 gate."""
        self.machine.set_a20(enabled)

    def set_timer_output(self, connected: bool) -> None:
        """Whether the 8254 interrupts, which an HPET may replace."""
        self.machine.set_timer_output(connected)

    def stop(self, cause: str, code: int | None = None) -> None:
        """End the run with `shutdown cause=...` when the access that is under way is done."""
        self.shutdown = cause, code

    def now(self) -> int:
        """The guest's time in nanoseconds: KVM's clock, which TSC and timers follow.

        From any thread. Where the engine tells it only between two instructions, a thread that is not the CPU's gets
        it as it was last asked for, and what has passed on the host since.
        """
        if self._moment is not None:
            return self._moment
        try:
            (now,) = struct.unpack_from("<Q", self.machine.get_state("clock"))
        except EngineFailed:
            if self._last_now is None:
                raise
            guest, host = self._last_now
            return guest + time.monotonic_ns() - host
        self._last_now = now, time.monotonic_ns()
        return now

    def date(self) -> int:
        """The date that the machine is at, in nanoseconds since 1970, UTC: that of its birth, and the guest's time
        since. Clocks that show a date have it from here."""
        return self._date_of_birth + self.now()

    @property
    def birth(self) -> tuple[int, bytes]:
        """The date when the guest's time was 0, in nanoseconds since 1970, UTC, and the seed of what is random."""
        return self._date_of_birth, self._seed

    def set_birth(self, date: int, seed: bytes) -> None:
        """As `birth`. Before the first run."""
        with self.lock:
            self._date_of_birth, self._seed, self._drawn = date, seed, 0
            self.birth_is_set = True
            for device in self.devices.values():
                device.date_set()

    def own_bytes(self, what: str, length: int) -> bytes:
        """Random bytes that are always the same of one machine, for the thing `what` of it: the address of a card."""
        return hashlib.shake_128(self._seed + what.encode()).digest(length)

    @property
    def uuid(self) -> bytes:
        """The machine's (RFC 9562, version 4)."""
        value = bytearray(self.own_bytes("uuid", 16))
        value[6], value[8] = value[6] & 0x0F | 0x40, value[8] & 0x3F | 0x80
        return bytes(value)

    def random(self, length: int) -> bytes:
        """Random bytes: the host's; where time follows the instructions, a series that the machine was born with, so
        that a copy of the machine gets the same."""
        if self.time_source == "host":
            return os.urandom(length)
        self._drawn += 1
        return hashlib.shake_128(self._seed + self._drawn.to_bytes(8, "little")).digest(length)

    def renew(self) -> None:
        """The machine is a copy, or back at a snapshot. Where time follows the instructions, it is to do what it did
        then, and nothing is new."""
        with self._lock:
            if self.time_source == "host":
                for device in self._renewed:
                    self.bus.touch(device.number)
                    device.renew()

    def schedule(self, when: int, callback: Callable[[], None]) -> Timer:
        """Have `callback` called when the guest's time is `when` or later: between two instructions, in the CPU's
        thread, with the lock held. To be asked for in that thread, or while the machine does not run; with the lock."""
        before = self._timers.first()
        timer = self._timers.add(when, callback)
        if before is None or when < before:
            self._set_deadline()
        return timer

    def schedule_input(self, when: int, callback: Callable[[], None]) -> Timer:
        """As `schedule`, before all that is not an input."""
        timer = self._timers.add(when, callback, first=True)
        self._set_deadline()
        return timer

    def look_soon(self) -> None:
        """Have `call_due` called when something is due, or there are new inputs. From any thread, with the lock."""
        self._set_deadline()

    def call_due(self) -> None:
        """Call what is due. In the CPU's thread, between two instructions."""
        with self._lock:
            if self.inputs.are_new and (self.machine.ended_soon() or not self.inputs.have_times):
                self._touch_all()
                self.inputs.settle()
            elif self._first_due() is None:
                return
            now = self.now()
            if not self._sees_due:
                self.bus.advance(now)
            while (timer := self._timers.take_due(now)) is not None:
                self._touch_all()
                timer.callback()
            self._set_deadline()

    def _first_due(self) -> int | None:
        """Of the timers that are not the engine's to look at."""
        first, due = self._timers.first(), None if self._sees_due else self.bus.due
        return first if due is None else due if first is None else min(first, due)

    def _set_deadline(self) -> None:
        if not self._closed:
            self._told_due = self.bus.due
            self.machine.set_deadline(self._first_due())
            if self.inputs.are_new:
                self.machine.end_soon()

    def chip_used(self) -> None:
        """A chip with a timer was used from Python."""
        if not self._sees_due and self.bus.due != self._told_due:
            self._set_deadline()

    # ---- what chips have sent

    def begin(self) -> None:
        """A run begins, of one CPU or several. Where the engine asks the bus by itself, a thread fetches what ports
        send meanwhile."""
        with self._lock:
            if self._is_fast and self._attendant is None:
                self._attendant = threading.Thread(target=self._attend, name="vmfs-attendant", daemon=True)
                self._attendant.start()
            self._runs += 1
            if self._runs == 1:
                for device in self._workers:
                    device.run_begins()

    def end(self) -> None:
        """A run that has begun ends: what ports have sent is with their users, and after the last one no device has
        anything under way."""
        with self._lock:
            self._runs -= 1
            if not self._runs:
                for device in self._workers:
                    device.run_ends()
        self.drain()

    def _attend(self) -> None:
        nap = 0.0
        while self.bus.wait(nap):
            self.drain()
            nap = _NAP

    def drain(self) -> None:
        """Have all ports that send give what they have sent so far, in order. From any thread."""
        for device in tuple(self.devices.values()):
            device.drain()

    def time_shifted(self, by: int) -> None:
        """The guest's time was set to what it was and `by`: no device sees that time has passed."""
        with self.lock:
            self._date_of_birth -= by
            self.now()  # which others have to go by
            self._timers.shift(by)
            for device in self.devices.values():
                device.time_shifted(by)
            self._set_deadline()

    # ---- life

    def set_firmware_files(self, files: Mapping[str, bytes], *, loads: bool = False) -> None:
        """What firmware that boots now asks for by name, and whether it is to load the kernel of `images`; for boards
        with a device that answers."""

    def memory_resized(self) -> None:
        """RAM has another size, which `memory` knows."""
        self._touch_all()
        self.map_again()

    def reset(self) -> None:
        with self.lock:
            self.shutdown = None
            for device in self.devices.values():
                device.reset()
            for device in self.devices.values():
                self.bus.drop_lines(device.number)

    def move_to(self, machine: Machine) -> None:
        """Go on with another engine's machine, which has no memory but RAM, and the lines' levels in its
        state."""
        with self.lock:
            for slot, (address, fd, offset, size, read_only) in self._slots.items():
                machine.map_memory(slot, address, fd, offset, size, read_only=read_only)
            for half, what in enumerate(self._window):
                if what != "ram":
                    self._set_window(machine, half)
            self.machine.set_deadline(None)
            self.machine.set_fast_bus(None)
            self.machine = machine
            self._give_bus()
            self._set_deadline()
            for device in self.devices.values():
                device.machine_changed()

    def asleep(self) -> AbstractContextManager[object]:
        """Nothing happens in the devices, or by them, in this block, which has the lock."""
        return self._all_asleep() if self._sleepers else self._lock

    @contextlib.contextmanager
    def _all_asleep(self) -> Iterator[None]:
        with self._lock:
            sleeping: list[Device] = []
            try:
                for device in self._sleepers:
                    sleeping.append(device)
                    device.sleep()
                yield
            finally:
                for device in sleeping:
                    device.wake()

    def save(self) -> BoardState:
        """What is of no device. In `asleep`."""
        rows, forgotten = self.bus.unclaimed()
        return BoardState(
            date_of_birth=self._date_of_birth,
            seed=self._seed,
            drawn=self._drawn,
            shutdown=self.shutdown,
            lines={gsi: self._holders(bits) for gsi, bits in enumerate(self.bus.holders()) if bits},
            pirqs=tuple((self._holders(bits), line) for bits, line in self.bus.pirqs()[: len(self.chipset.routes)]),
            counters=dict(sorted(self.counters.items())),
            device_counters={name: counts for name, device in self.devices.items() if (counts := _sorted(device))},
            unclaimed=tuple((_SPACES[is_memory], *row) for is_memory, *row in rows),
            forgotten=forgotten,
        )

    def _holders(self, bits: int) -> tuple[str, ...]:
        return tuple(sorted(device.name for device in self.devices.values() if bits >> device.number & 1))

    def _bits(self, holders: Iterable[str]) -> int:
        return sum(1 << self.devices[name].number for name in set(holders))

    def check(self, state: BoardState) -> None:
        """Invalid for what this board cannot be, and nothing has changed."""
        if len(state.pirqs) != len(self.chipset.routes):
            raise Invalid(f"the board's PCI router has {len(self.chipset.routes)} inputs, not {len(state.pirqs)}")
        holders = (*state.lines.values(), *(names for names, _ in state.pirqs))
        names = {*state.device_counters, *(name for names in holders for name in names)}
        if unknown := names - self.devices.keys():
            raise Invalid(f"the board has no device {min(unknown)[:40]!r}")

    def load(self, state: BoardState) -> None:
        """What is of no device. In `asleep`, after the engine's chips, which have the lines' levels, and before the
        devices, which then find the lines as they hold them."""
        self._date_of_birth = state.date_of_birth
        self._seed, self._drawn = state.seed, state.drawn
        self.shutdown = state.shutdown
        self._load_lines(state)
        self._load_counters(state, self.devices)
        self._last_now = None
        self._set_deadline()

    def _load_lines(self, state: BoardState) -> None:
        """And what nobody has claimed."""
        held = [0] * _chips.LINES
        for gsi, names in state.lines.items():
            held[gsi] = self._bits(names)
        unused = [(0, 0)] * (_PIRQS_MOST - len(state.pirqs))
        self.bus.hold(held, [(self._bits(names), line) for names, line in state.pirqs] + unused)
        self.bus.load_unclaimed(tuple((space == "memory", *row) for space, *row in state.unclaimed), state.forgotten)
        self.counters.clear()
        self.counters.update(state.counters)

    def _load_counters(self, state: BoardState, names: Iterable[str]) -> None:
        for name in names:
            counters, wanted = self.devices[name].counters, state.device_counters.get(name, {})
            if counters or wanted:
                counters.clear()
                counters.update(wanted)

    def pack_devices(self) -> Packed:
        """Version and bytes of each device's state. In `asleep`."""
        return {name: (device.STATE.VERSION, device.pack()) for name, device in self.devices.items()}

    def check_names(self, names: Set[str]) -> None:
        """Invalid where these are not its devices."""
        missing = {name for name, device in self.devices.items() if name not in names and not device.IS_LATE}
        if different := missing | names - self.devices.keys():
            raise Invalid(f"it is a machine of other devices: {', '.join(sorted(different))}")

    def unpack_devices(self, states: Mapping[str, tuple[int, bytes]]) -> dict[str, DeviceState]:
        """Checked by each device; Invalid, and nothing has changed, where one cannot be so."""
        return {name: self.devices[name].unpack(*state) for name, state in states.items()}

    def load_devices(self, states: Mapping[str, DeviceState]) -> None:
        """What `unpack_devices` gave. In `asleep`."""
        for name, state in states.items():
            self.devices[name].load(state)

    def put(self, state: BoardState, devices: Packed, present: tuple[BoardState, Packed] | None = None) -> None:
        """Be what these say, and leave alone what is so. `present`: what there is, where that is known. In `asleep`,
        as `load`. The devices know `devices` again when they are put once more: it stays as it is."""
        self._moment = now = self.now()
        try:
            touched = self._touched() if present is None and self._is_put is devices else None
            if touched is None:
                self._unpacked = {}
                self._put_all(state, devices, present or (self.save(), self.pack_devices()))
                for slot, _ in self._written_slots():
                    self.machine.dirty_log(slot)
            else:
                self._put_touched(state, devices, *touched)
        finally:
            self._moment = None
        self.bus.forget_touched()
        self._is_put, self._put_at = devices, now

    def _put_all(self, state: BoardState, devices: Packed, present: tuple[BoardState, Packed]) -> None:
        if state != present[0]:
            self.load(state)
        others = {
            name: one for name, one in devices.items() if one != present[1][name] or self.devices[name].keeps_time
        }
        self.load_devices(self.unpack_devices(others))

    def _touched(self) -> tuple[list[str], bool] | None:
        """The devices that may be others than they were put, and whether the lines may. None: anything may be."""
        bits, lines = self.bus.touched()
        for what in self._window:
            if isinstance(what, tuple):
                return None
        for slot, size in self._written_slots():
            if slot not in self._owners:
                return None
            if self.machine.dirty_log(slot) != bytes(size >> 15):
                bits |= 1 << self._owners[slot].number
        is_then = self.now() == self._put_at
        for device in self._changing:
            if device.changes_unseen or not is_then and device.keeps_time:
                bits |= 1 << device.number
        return [name for bit, name in self._numbered if bits & bit], lines

    def _written_slots(self) -> Iterator[tuple[int, int]]:
        """Those of devices that the guest may write, and their sizes."""
        for slot, (_, _, _, size, read_only) in self._slots.items():
            if not read_only:
                yield slot, size

    def _put_touched(self, state: BoardState, devices: Packed, names: list[str], lines: bool) -> None:
        if lines:
            self._load_lines(state)
        self._load_counters(state, names)
        self._last_now = None
        for name in names:
            version, data = devices[name]
            device = self.devices[name]
            if len(data) > _SMALL and device.pack() == data and not device.keeps_time:
                continue
            unpacked = self._unpacked.get(name)
            if unpacked is None:
                unpacked = device.unpack(version, data)
                if len(data) <= _KEPT:
                    self._unpacked[name] = unpacked
            device.load(unpacked)
        self._set_deadline()

    def close(self) -> None:
        with self.lock:
            self._closed = True
            self._timers.clear()
            self.bus.close()
            self.drain()
            is_idle = all([device.close() is not False for device in self.devices.values()])
            self.devices.clear()
            self.bus.set_map(())
            if is_idle:  # else a worker has it for as long as it waits for the host
                self.ram_chip.map(None, ())
            self._mapping = None


def _nothing() -> None:
    pass


def _sorted(device: Device) -> dict[str, int]:
    return dict(sorted(device.counters.items()))
