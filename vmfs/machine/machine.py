"""Vm: a machine, put together and taken apart: its memory, CPUs, interrupt controllers, board and configuration.

It is a `Control` (`vmfs.machine.control`), which is how it runs, and where the lock is that guards all that is mutable;
a `Recorded`, for its history; a `Pages`, which knows what was written to RAM; and a `Value`, which can be kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

from vmfs.debug.disasm import Listing
from vmfs.debug.paging import Paging
from vmfs.debug.why import Account
from vmfs.devices.chipset import I440FX
from vmfs.devices.device import Device
from vmfs.devices.machine import Pc, machine_type
from vmfs.devices.virtio.disk import Overlay
from vmfs.engine.base import Capability, Engine, Machine, Vcpu
from vmfs.engine.rest import begin_time
from vmfs.machine.born import Birth
from vmfs.machine.cpu import Cpu
from vmfs.machine.images import Images, Kept
from vmfs.machine.past import Past, Rom, Snapshot
from vmfs.machine.pins import Passing, Pins
from vmfs.machine.runloop import Bound, Run
from vmfs.machine.signals import Signals
from vmfs.machine.state import (
    Attached,
    Attempt,
    Owner,
    Setup,
    put,
    put_again,
    put_cpu,
    put_engine,
    reset_values,
    take_cpu,
    take_engine,
    tried,
)
from vmfs.machine.topology import with_topology
from vmfs.memory.layers import Image
from vmfs.memory.ram import DEFAULT_SIZE, HIGH_START, PAGE, Memory, check_size, regions_of, room_in
from vmfs.words import exits
from vmfs.words.errors import (
    Busy,
    Gone,
    Invalid,
    NotPermitted,
    Unsupported,
)
from vmfs.words.modes import CR0_PE, CodeMode, mode_of, set_mode, tables_of
from vmfs.words.registers import REGISTERS, write_registers

log = logging.getLogger(__name__)

T = TypeVar("T")

ROM_SLOT = 1
_MP_WAITING, _MP_HALTED = (1, 2), 3  # of struct kvm_mp_state: UNINITIALIZED and INIT_RECEIVED; HALTED
RESET_VECTOR = 0xFFFFFFF0  # Intel SDM 3A 9.1.4
_TSC = 0x10  # the MSR
NOTHING_TO_RUN = (
    "there is nothing to run at the reset vector: write a kernel to `kernel` (or a BIOS to `bios`), "
    "or choose a `mode`, write code to `mem` and its address to `reg/rip`"
)


class Vm(Signals):
    """One virtual machine. Every method may be called from any thread; all raise Gone after `close`."""

    def __init__(self, engine: Engine, *, memory_size: int = DEFAULT_SIZE) -> None:
        super().__init__()
        self.memory = Memory(memory_size)
        self.engine = engine
        self.board = None
        self._pins = Pins(lambda gsi, level: self._machine.irq_line(gsi, level), lambda: self.cpu.vcpu.nmi())
        self._passing = Passing(lambda nanoseconds: self._machine.pass_time(nanoseconds))
        with contextlib.ExitStack() as undo:
            undo.callback(self.memory.close)
            self._machine = engine.create_machine()
            undo.callback(self._machine.close)
            self._map_ram(self._machine, has_window=False)
            self.memory.written = self._wrote
            self._set_cpus(_make_cpus(self._machine, 1))
            self.time_source = default_time(self._machine)
            undo.pop_all()
        self._reset_values: dict[str, bytes] = {}  # of the engine's machine
        self.machine_name = "bare"
        self.images = Images()
        self._boot_due = True
        self._sleeps = self._has_run = False
        self._rom = None
        self._attached = {}
        self.past = Past(self)
        self.listing = Listing()  # what `disasm` shows
        self.writer_of: Any = None  # what `writer` is asked about
        self.memory.noted = lambda: self._dirty["base"]

    # ---- around a run

    def _before_run(self) -> None:
        if before := self.hooks.before:
            before()
        if self._boot_due:
            self._boot()
        self.memory.seal()
        self._has_run = True

    def _after_run(self) -> None:
        if after := self.hooks.after:
            after(self.take_dirty("cache"))

    def _explained(self, result: exits.Exit) -> exits.Exit:
        """What a run came to; that of an empty machine says what to do."""
        if isinstance(result, exits.Error) and self._rom is None:
            cpu = self.cpus[result.cpu].vcpu
            code = CodeMode.of(cpu.get_state("regs"), cpu.get_state("sregs"))
            if code.address == RESET_VECTOR:
                return replace(result, reason=NOTHING_TO_RUN)
        return result

    def _account_of(self, exit_: exits.Shutdown) -> Account | None:
        def read(cpu: Vcpu, linear: int, length: int) -> bytes:
            found = b""
            while len(found) < length:
                page = Paging.of(cpu).translate(self.memory, linear)
                if page is None:
                    break
                part = self.read_physical(page.physical, min(length - len(found), PAGE - linear % PAGE))
                if not part:
                    break
                found += part
                linear += len(part)
            return found

        try:
            return Account.of(exit_, self.vcpus, read)
        except Exception:  # the run has ended, whatever can be said of it
            log.exception("no account of %s", exit_.line())
            return None

    # ---- the CPU between instructions

    def change(self, task: Callable[[Vcpu], T], then: str = "paused", cpu: int = 0) -> T:
        """Do `task`, which gets and sets registers of a CPU, at once. Busy while the machine runs.

        It is whole or not at all: where it fails, what it has set is set back. While a read waits for its data it is
        tried first, since what is refused shall not have completed the access.

        A machine that was shut down or halted is `paused` afterwards: it goes on with what was set. `then` is for who
        takes a change back.
        """
        with self._lock:
            self._check_idle()
            one = self.cpus[cpu]
            vcpu = one.vcpu
            if self._is_reading(one):
                with tried(vcpu):
                    task(vcpu)
            self._set_still(object())
            self._changed()
            vcpu.complete()  # else a part of the state, read and set again, would undo the access
            attempt = Attempt(vcpu)
            try:
                result = task(cast(Vcpu, attempt))
            except BaseException:
                attempt.undo()
                raise
            changed = self._state != then
            self._state = then
        if changed:
            self.tell()
        return result

    def cpu_state(self, cpu: int) -> Future[str]:
        """`running` (also where the machine stands still), `halted` or `wait-for-sipi`: what KVM calls it, in words."""

        def look(vcpu: Vcpu) -> str:
            (state,) = struct.unpack("<I", vcpu.get_state("mp_state"))
            last = self.cpus[cpu].last_exit
            is_halted = state == _MP_HALTED or (self._run is None and isinstance(last, exits.Hlt))
            return ("halted" if is_halted else "wait-for-sipi" if state in _MP_WAITING else "running") + "\n"

        return self.at_boundary(look, cpu)

    def cpu_counters(self, cpu: int) -> dict[str, int]:
        """What `cpuN/stat` shows."""
        with self._lock:
            self._check_open()
            vcpu = self.cpus[cpu].vcpu
            return {"interrupts_queued": vcpu.interrupts_queued, **vcpu.counters()}

    # ---- state of the machine

    def get_machine_state(self, name: str) -> Future[bytes]:
        return self.at_boundary(lambda _: self._machine.get_state(name))

    def change_machine_state(self, name: str, change: Callable[[Callable[[], bytes]], bytes]) -> None:
        """Set a state to what `change` makes of it; it gets a function that reads it. Busy during a run."""
        with self._lock:
            self._check_idle()
            self._changed()
            self._machine.set_state(name, change(lambda: self._machine.get_state(name)))

    def reset(self) -> None:
        """The CPUs' reset state (Intel SDM 3A 9.1.1), devices as at power-on; the next run boots what there is.

        RAM keeps its contents, as on a real machine.
        """
        with self._lock:
            self._check_idle()
            self._set_still(object())
            self._set_back()
            changed = self._state != "paused"
            self._state = "paused"
        if changed:
            self.tell()

    def _set_back(self, *, sleeps: bool = False) -> None:
        self._held.clear()
        self._changed()
        with self._machine.at_one_moment():
            put_engine(self._machine, self._reset_values)
            for cpu in self.cpus:
                cpu.set_back()
        if self.board is not None and sleeps:
            self.board.fall_asleep()
        elif self.board is not None:
            self.board.reset()
        self._boot_due, self._sleeps = True, sleeps

    def write_memory(self, offset: int, data: bytes) -> Future[int]:
        """As the file `mem` takes it, at once; with a history, between two instructions. Busy while it goes through
        that."""
        history = self.history
        if history is not None and history.is_travelling:
            raise Busy("mem: the machine goes through its past")
        if history is not None and history.is_executing:
            return self.at_boundary(lambda _: self.memory.write_at(offset, data))
        done: Future[int] = Future()
        done.set_result(self.memory.write_at(offset, data))
        return done

    # ---- snapshots: what `vmfs.machine.past` needs, beside `Pages`

    def count_instructions(self) -> int | None:
        """Of all CPUs; None where the engine does not count. With the lock held."""
        if Capability.COUNTERS not in self.capabilities:
            return None
        return sum(cpu.vcpu.counters()["instructions"] for cpu in self.cpus)

    def go_back(self, snapshot: Snapshot, look: Callable[[], Callable[[], None]]) -> None:
        """Be what `snapshot` says, whole or not at all. Busy during a run. `look()` finds what of RAM is to be put,
        and gives what puts it."""
        with self._lock:
            self._check_idle()
            self.check_media(snapshot.state)
            put_ram = look()
            before = self.images.keep(), self._rom, {name: disk for name, disk in self.disks()}

            def put_memory() -> None:
                put_ram()
                for name, disk in before[2].items():
                    if isinstance(disk, Overlay):
                        disk.go_back(snapshot.overlays[name])

            self.images.put(snapshot.images)
            try:
                wanted = snapshot.opened(self)
                has_cpuids = not self._has_run or all(
                    cpu.vcpu.has_cpuid(values["cpuid"])
                    for cpu, values in zip(self.cpus, wanted.parts.cpus, strict=True)
                )
                if wanted.put_on is self._machine and has_cpuids:
                    self._use_rom(snapshot.rom)
                    put_again(self, wanted, put_memory)
                else:
                    # An engine may refuse another CPUID once the CPU has run.
                    if self.engine.name != snapshot.engine.name or not has_cpuids:
                        self._replace_machine(snapshot.engine)
                    self._use_rom(snapshot.rom)
                    try:
                        put(self, wanted, put_memory)
                    except (Invalid, Unsupported):  # KVM takes some MSRs of a CPU that has not run only
                        self._replace_machine(snapshot.engine)
                        put(self, wanted, put_memory)
                    wanted.put_on = self._machine
            except BaseException:
                self.images.put(before[0])
                self._use_rom(before[1])
                raise
            if self.board is not None:
                self.board.renew()
            if self.history is not None:
                self.history.restart(snapshot.ram)
            if self.trace.settings.counts:  # the next jump has no begin
                for cpu in self.cpus:
                    self._ask_trace(self.engine, self._machine, cpu.vcpu, self.trace.settings, len(self.cpus))
            self._set_still(object())
        self.tell()

    @property
    def rom(self) -> Rom | None:
        return self._rom

    def rebuild(
        self, setup: Setup, engine: Engine, ram: Image, fill: Callable[[Pc], None], *, is_of_others: bool = True
    ) -> None:
        """Be a machine as `setup` says, as it is when it is new, with RAM over an image. `fill` plugs its devices in.
        Where it fails nothing has changed. Busy during a run."""
        board_type = machine_type(setup.machine)
        check_cpu_count(setup.cpus)
        memory, copied = Memory.over(setup.memory, ram)
        assert memory.base is not None
        with self._lock:
            try:
                self._check_idle()
                old = self.memory, self.board, self._rom
                self.memory, self._rom = memory, None
                try:
                    self._replace_machine(engine, board_type, setup.cpus, fill)
                except BaseException:
                    self.memory, self._rom = old[0], old[2]
                    raise
            except BaseException:
                memory.close()
                raise
            self.machine_name = setup.machine
            self._attached = {one.name: one for one in setup.attached}
            self._has_run, self._boot_due, self._sleeps = False, True, False
            self._set_time(setup.time_source if Capability.DETERMINISTIC in self.capabilities else "host")
            memory.written, memory.noted = self._wrote, lambda: self._dirty["base"]
            self._dirty = {name: copied if name == "base" else 0 for name in self._dirty}
            self._own_writes.clear()
            if old[1] is not None:
                old[1].close()
            old[0].close()
        self.past.begin_over(memory.base, copied, is_of_others)

    # ---- what it is made of

    def set_cpu_count(self, count: int) -> None:
        """Have so many CPUs. Before the first run only, else Busy. What was set of those that stay, stays."""
        check_cpu_count(count)
        with self._lock:
            self._check_idle()
            if count == len(self.cpus):
                return
            self._check_no_past("cpus")
            if self._has_run:
                raise Busy("cpus: it has run; their number is fixed")
            self._replace_machine(self.engine, cpu_count=count)
            if Capability.DETERMINISTIC in self.capabilities:
                self._machine.set_time(self.time_source)
        self.tell()

    def set_machine(self, name: str) -> None:
        """Be a machine with other devices. Before the first run only, else Busy. What was set of the CPU stays."""
        board_type = machine_type(name)
        with self._lock:
            self._check_idle()
            if name == self.machine_name:
                return
            if board_type is not None and Capability.IRQCHIP not in self.capabilities:
                raise Unsupported(f"machine: {name} needs interrupt controllers, which {self.engine.name} has not")
            self._check_no_past("machine")
            if self._has_run:
                raise Busy("machine: it has run; its devices are fixed")
            old_board = self.board
            self._replace_machine(self.engine, board_type)
            self.machine_name = name
            self._attached.clear()
            # A PC lives by the clock on the wall: its network and its users do.
            self._set_time("host" if board_type else default_time(self._machine))
            if self.board is not None:
                self.board.fill_memory()
            if old_board is not None:
                old_board.close()
        self.tell()

    @property
    def has_run(self) -> bool:
        """Then the size of RAM and the devices are fixed."""
        return self._has_run

    def attach(self, make: Callable[[Pc], Device], kind: str = "", words: Sequence[str] = ()) -> Device:
        """Plug in the device that `make` makes. Before the first run, else Busy. `kind` and `words`: as its line has
        them."""
        with self._lock:
            board = self._changeable_board()
            device = make(board)
            board.plug(device)
            self._attached[device.name] = Attached(device.name, getattr(device, "slot", None), kind, tuple(words))
        return device

    def check_attachable(self) -> None:
        """Raises what `attach` would, before anything is opened for it."""
        with self._lock:
            self._changeable_board()

    def detach(self, device: Device) -> None:
        """Take a device out that `attach` has put in. Before the first run, else Busy."""
        with self._lock:
            board = self._changeable_board()
            if device.name in board.built_in:
                raise NotPermitted(f"{device.name} belongs to the machine")
            board.unplug(device)
            self._attached.pop(device.name, None)

    def _changeable_board(self) -> Pc:
        self._check_idle()
        if not isinstance(self.board, Pc):
            raise Unsupported("a bare machine has no devices: write pc to `machine` first")
        self._check_no_past("dev")
        if self._has_run:
            raise Busy("it has run; its devices are fixed")
        return self.board

    def _check_no_past(self, what: str) -> None:
        """What its snapshots, or its history, could not go back to is not changed; with the lock held."""
        self.check_no_history(what)
        if self.past:
            raise Busy(f"{what}: the machine has snapshots, which are of it as it is")

    def check_no_history(self, what: str) -> None:
        """What a history is of is not changed: Busy."""
        if self.history is not None:
            raise Busy(f"{what}: the machine has a history, which is of it as it is: `echo off > history` ends it")

    def _set_time(self, source: str) -> None:
        if Capability.DETERMINISTIC in self.capabilities:
            self._machine.set_time(source)
        self.time_source = source

    def set_time_source(self, source: str) -> None:
        """`host`: time follows the host's clock; `instructions`: those retired (Unsupported where they cannot)."""
        check_time(source)
        with self._lock:
            self._check_idle()
            self.check_no_history("time")
            if source == "instructions" and Capability.DETERMINISTIC not in self.capabilities:
                raise Unsupported(f"time: on {self.engine.name} it follows the host's clock")
            self._set_time(source)
            if source == "instructions" and not self._has_run:  # what has passed on the host is in no run
                passed = 0 if self.board is None else self.board.now()
                begin_time(self._machine)
                for cpu in self.cpus:
                    write_registers(cpu.vcpu, {"msr.0x10": 0})  # the TSC
                if self.board is not None:
                    birth = self.board.birth
                    self.board.time_shifted(-passed)
                    if self.board.birth_is_set:
                        self.board.set_birth(*birth)

    def birth(self) -> Birth:
        """Of a PC; Unsupported for a bare machine."""
        return Birth(*self._dated_board().birth)

    def set_birth(self, birth: Birth) -> None:
        """Before the first run, else Busy."""
        with self._lock:
            board = self._dated_board()
            self._check_idle()
            if self._has_run:
                raise Busy("it has run; when it was born is fixed")
            board.set_birth(*birth)

    def _dated_board(self) -> Pc:
        if self.board is None:
            raise Unsupported("a bare machine has no date: write pc to `machine` first")
        return self.board

    def _boot(self) -> None:
        """Load what there is to boot, in the CPU's thread. Invalid for what cannot be; the machine stays usable. One
        that sleeps is woken instead."""
        images, sleeps = self.images, self._sleeps
        self._sleeps = False
        if sleeps and self._wake():
            pass
        elif self._has_firmware:
            from vmfs.machine.booting import boot  # it loads what reads images, which many machines never need

            vcpus = [cpu.vcpu for cpu in self.cpus]
            booted = boot(
                images,
                self.memory,
                self._machine,
                vcpus,
                has_devices=self.board is not None,
                flash=None if self.board is None or not self.board.flash else self.board.flash[0],
                uuid=bytes(16) if self.board is None else self.board.uuid,
                uarts=self.board.uarts if isinstance(self.board, Pc) else (),
                chipset=self.board.chipset if self.board is not None else I440FX,
            )
            if self.board is not None:
                self.board.set_firmware_files(booted.files, loads=booted.firmware_loads)
            if booted.rom is not None:
                self._set_rom(booted.rom.address, booted.rom.data)
            with self._lock:
                written = 0
                for address, size in booted.written:
                    first, last = address // PAGE, (address + max(size, 1) - 1) // PAGE
                    written |= ((1 << last - first + 1) - 1) << first
                self._note_written(written)
        if self.board is not None and self._rom is None and not self.board.flash and not sleeps:
            in_real_mode = not REGISTERS["cr0"].get(self.cpu.vcpu.get_state("sregs")) & CR0_PE
            self.board.handed_over(in_real_mode=in_real_mode)
        self._boot_due = False

    def _wake(self) -> bool:
        """As firmware does it: the CPU goes on where the system has said. False where it has said nothing."""
        board = self.board
        assert board is not None
        if self._rom is not None or board.flash:
            board.wakes_by_firmware()
            return True
        from vmfs.boot import wake

        return wake(self.memory, self.cpu.vcpu)

    @property
    def _has_firmware(self) -> bool:
        """Whether there is anything to begin with."""
        return self.images.bootable or (self.board is not None and bool(self.board.flash))

    def load(self) -> Run | None:
        """Do now what the next run would begin with, for a debugger that comes before it: load what there is to
        boot, and execute nothing. None where there is nothing to do."""
        if not self._boot_due or not self._has_firmware:
            return None
        return self.start(Bound(instructions=0))

    def read_physical(self, address: int, length: int) -> bytes:
        """What a debugger sees there: up to `length` bytes of RAM, of the ROM or of a device's memory; empty where
        there is none."""
        if self.memory.room(address):
            return self.memory.read(address, length)
        if self._rom is not None:
            kept, start = self._rom.kept, self._rom.address
            if start <= address < start + kept.size:
                return kept.read_at(address - start, min(length, start + kept.size - address))
        return self.board.read_memory(address, length) if self.board is not None else b""

    def _set_rom(self, address: int, data: bytes) -> None:
        """Have `data` in the guest's address space, read-only, in the place of the ROM before."""
        fd = os.memfd_create("vmfs-rom", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, data)
        self._use_rom(Rom(Kept(fd, len(data)), address))

    def _use_rom(self, rom: Rom | None) -> None:
        if rom is self._rom:
            return
        self._machine.map_memory(ROM_SLOT, 0, 0, 0, 0)
        if rom is not None:
            self._map_rom(self._machine, rom)
        self._rom = rom

    @staticmethod
    def _map_rom(machine: Machine, rom: Rom) -> None:
        machine.map_memory(ROM_SLOT, rom.address, rom.kept.fd, 0, rom.kept.size, read_only=True)

    def mode(self) -> Future[str]:
        return self.at_boundary(lambda cpu: mode_of(cpu.get_state("regs"), cpu.get_state("sregs")))

    def set_mode(self, mode: str) -> None:
        low, reach = self.memory.regions[0].size, max(HIGH_START, self.memory.end)
        self.change(lambda cpu: set_mode(cpu, self.memory, low, mode, reach=reach))

    def resize_memory(self, size: int) -> None:
        """Before the first run only, else Busy. Invalid where a CPU's tables would be cut off."""
        check_size(size)
        with self._lock:
            self._check_idle()
            if size != self.memory.size:
                self._check_no_past("mem_size")
                if isinstance(self.board, Pc):
                    self.board.check_memory(size)
                self.memory.check_resizable()
                self._check_tables_stay(size)
                self.memory.resize(size)
                self._map_ram(self._machine, has_window=self.board is not None)
                if self.board is not None:
                    self.board.memory_resized()

    def _check_tables_stay(self, size: int) -> None:
        regions = regions_of(size)
        for number, cpu in enumerate(self.cpus):
            for what, address in tables_of(cpu.vcpu.get_state("sregs")):
                if self.memory.room(address) and not room_in(regions, address):
                    cut = f"the {what} of cpu{number}, at {address:#x}, would be cut off"
                    raise Invalid(f"mem_size: {cut}: write mem_size before mode")

    def move_to(self, engine: Engine) -> None:
        """Go on with another engine: RAM, all state (`vmfs.machine.state`) and points go along, in the middle of an
        instruction, too.

        Busy while the machine runs. Where the other engine cannot have the state, or cannot watch for the points,
        Unsupported, and nothing has changed. The CPUID goes along once the CPU has run. Counters of what the engine
        does, and not the guest, begin anew.
        """
        with self._lock:
            self._check_idle()
            self.check_no_history("engine")
            self._replace_machine(engine)
            if Capability.DETERMINISTIC in self.capabilities:
                self._machine.set_time(self.time_source)
            else:
                self.time_source = "host"
        self.tell()

    def _replace_machine(
        self,
        engine: Engine,
        board_type: type[Pc] | Literal["same"] | None = "same",
        cpu_count: int | None = None,
        fill: Callable[[Pc], None] = lambda board: None,
    ) -> None:
        """Go on with a new machine of an engine, which gets all state; with the lock held.

        Unless it is "same", with another board, which `fill` fills: None is no board. When it raises nothing has
        changed.
        """
        count = len(self.cpus) if cpu_count is None else cpu_count
        new_board: Pc | None = None
        has_board = self.board is not None if board_type == "same" else board_type is not None
        machine = engine.create_machine()
        try:
            self._map_ram(machine, has_window=has_board)
            if self._rom is not None:
                self._map_rom(machine, self._rom)
            if has_board:
                machine.create_irqchip()
            cpus = _make_cpus(machine, count)
            new_values = reset_values(machine, Owner.ENGINE)
            with self._machine.at_one_moment(), machine.at_one_moment():
                if board_type == "same":
                    put_engine(machine, take_engine(self._machine))
                for old_cpu, cpu in zip(self.cpus, cpus, strict=False):  # of CPUs that are added, nothing was set
                    values = take_cpu(old_cpu.vcpu)
                    if not self._has_run and old_cpu.has_its_cpuid:  # nobody has seen it
                        del values["cpuid"]
                    put_cpu(cpu.vcpu, values, old_cpu.reset_states["msrs"])
                    cpu.last_exit = old_cpu.last_exit
                for cpu in cpus[len(self.cpus) :]:
                    cpu.vcpu.set_msr(_TSC, cpus[0].vcpu.get_msr(_TSC))
            self._points.check_cpus(count)
            for cpu in cpus:
                cpu.set_debug(self._points.request(cpu.index))
                self._ask_trace(engine, machine, cpu.vcpu, self.trace.settings, count)
            written = self._engine_dirty() if board_type == "same" else 0  # else nothing has run, or RAM is another
            board = self.board
            if board_type != "same":
                board = new_board = board_type and board_type(machine, self.memory)
                if board is not None:
                    board.cpu_count = count
                    board.images = self.images
                    fill(board)
            elif board is not None:
                board.move_to(machine)
        except BaseException:
            if new_board is not None:
                new_board.close()
            machine.close()
            raise
        old, self._machine, self.engine = self._machine, machine, engine
        self._set_cpus(cpus)
        self._reset_values = new_values
        self.board = board
        if board is not None:
            board.inputs.add(self._pins)
            board.inputs.add(self._passing)
            board.cpu_count = count
        self._set_still(object())
        self._note_written(written)
        old.close()

    # ---- counting

    def counters(self) -> dict[str, int]:
        """What `stat` shows."""
        with self._lock:
            self._check_open()
            seconds = self._seconds
            if self._run is not None:
                seconds += time.perf_counter() - self._began
            counts = {f"exits.{exit_.REASON}": self._counts[exit_.REASON] for exit_ in exits.EXITS}
            return {
                "runs": self._counts["runs"],
                **counts,
                "run_time_us": int(seconds * 1e6),
                "interrupts_queued": self.cpu.vcpu.interrupts_queued,
                **_sums([cpu.vcpu.counters() for cpu in self.cpus]),
                **({f"board.{name}": count for name, count in self.board.counters.items()} if self.board else {}),
            }

    # ---- the end

    def close(self) -> None:
        """Stop it, free its memory, CPU and thread. Blocks until the guest has stopped; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._run is not None:
                self._run.stop_asked = True
                self._kick()
        self.tell()
        if self.history is not None:
            self.history.close()
        for thread in self._threads:
            thread.end()
        with self._lock:
            while self._tasks:
                self._tasks.popleft()[2].set_exception(Gone("the machine was removed"))
            if self.board is not None:
                self.board.close()
            self._machine.close()
            self._rom = None
            self.past.close()
            self.images.close()
            self.memory.close()
        self.tell()


CPUS_MOST = 64


def check_cpu_count(count: int) -> None:
    if not 1 <= count <= CPUS_MOST:
        raise Invalid(f"cpus: a machine has 1 to {CPUS_MOST}, not {count}")


def _make_cpus(machine: Machine, count: int) -> list[Cpu]:
    """New CPUs, which know of each other by CPUID."""
    cpus = []
    for index in range(count):
        vcpu = machine.create_vcpu(index)
        if count > 1:
            vcpu.set_state("cpuid", with_topology(vcpu.get_state("cpuid"), index, count))
        cpus.append(Cpu(vcpu))
    return cpus


def _sums(counted: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(one[name] for one in counted) for name in counted[0]}


def check_time(source: str) -> None:
    if source not in ("host", "instructions"):
        raise Invalid(f"time: {source[:40]!r} is neither host nor instructions")


def default_time(machine: Machine) -> str:
    """Where a machine that has no devices has its time from."""
    return "instructions" if Capability.DETERMINISTIC in machine.capabilities else "host"
