"""Vm: a machine with its memory, its CPU, the thread that runs it (by `vmfs.machine.control`), and its end.

It knows no file and no event loop: what takes time returns a `concurrent.futures.Future`, and whoever
wants to hear of changes subscribes.

Threads and locks
-----------------
The CPU runs in a thread of its own, started by the first run. One lock, `_lock`, guards all that is mutable
here (the state, the current run, the tasks that wait for a boundary, the points); it is held for short calls
into the engine, never while the guest runs and never while a subscriber or a memory hook is called. The board
of a machine with devices has a lock of its own: it may be taken while this one is held, never the other way round.

While the machine does not run, whoever holds the lock may use the CPU. While it runs, only its thread may:
others hand it a task (`at_boundary`) and kick it; it does the tasks between two instructions and goes on.

The lane
--------
A machine that has a page with its server (`attach_lane`) may also be run by C code alone, in the CPU's thread, while it
is simple (`_is_simple`) and nobody has the lock. Who takes the lock (`_Guard`) takes the CPU back: what was run
since is counted then, and a run under way becomes `_run`, like any other, before anybody can look. So there is one
truth, and it is here; the lane has facts that were not told yet.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

from vmfs.debug.conditions import CpuLooker
from vmfs.debug.disasm import Listing
from vmfs.debug.points import UNTIL, Points
from vmfs.debug.symbols import SymbolTable
from vmfs.debug.trace import Trace, TraceSettings
from vmfs.devices.board import Board
from vmfs.devices.device import Device
from vmfs.devices.machine import Pc, machine_type
from vmfs.devices.pci import PciDevice
from vmfs.engine.base import NO_DEBUG, Breakpoint, Capability, DebugRequest, Engine, Machine, Vcpu
from vmfs.machine._lane import Lane
from vmfs.machine.control import UNBOUND, Asked, Bound, Run, RunLoop
from vmfs.machine.images import Images
from vmfs.machine.memory import DEFAULT_SIZE, PAGE, Memory, check_size
from vmfs.machine.rehearsal import Rehearsal
from vmfs.machine.state import RESET_STATES, carry_cpu, carry_machine
from vmfs.words import exits
from vmfs.words.errors import (
    Busy,
    EngineFailed,
    Gone,
    Invalid,
    LimitReached,
    NotPermitted,
    Unsupported,
    VmfsError,
    known,
)
from vmfs.words.modes import CodeMode, mode_of, set_mode
from vmfs.words.registers import REGISTERS, write_registers
from vmfs.words.unclaimed import Use

T = TypeVar("T")

RAM_SLOT, ROM_SLOT = 0, 1
RESET_VECTOR = 0xFFFFFFF0  # Intel SDM 3A 9.1.4
NOTHING_TO_RUN = (
    "there is nothing to run at the reset vector: write a kernel to `kernel` (or a BIOS to `bios`), "
    "or choose a `mode`, write code to `mem` and its address to `reg/rip`"
)
LANE_FILES = {"regs": 0, "sregs": 1, "exit.data": 2}  # enum lane_file of vmfs/words/lane.h


@dataclass(frozen=True, slots=True)
class MemoryHooks:
    """Called in the CPU's thread before the guest first runs in a run, and after it last ran.

    `after` gets the dirty log of the run (a bit a 4 KiB page). They exist for clients' caches of RAM; where
    there are none, so that RAM is shared live, they are None.
    """

    before: Callable[[], None] | None = None
    after: Callable[[bytes], None] | None = None


class _Guard:
    """The lock of a machine. Who holds it has heard of all that the lane has done, and has the CPU."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._vm.lane is not None:
            self._vm.enter_lane(self._vm.lane)

    def __exit__(self, *exception: object) -> None:
        news = self._vm.lane is not None and self._vm.leave_lane(self._vm.lane)
        self._lock.release()
        if news:
            self._vm.tell()


class Vm:
    """One virtual machine. Every method may be called from any thread; all raise Gone after `close`."""

    def __init__(self, engine: Engine, *, memory_size: int = DEFAULT_SIZE) -> None:
        self.memory = Memory(memory_size)
        self.engine = engine
        with contextlib.ExitStack() as undo:
            undo.callback(self.memory.close)
            self._machine = engine.create_machine()
            undo.callback(self._machine.close)
            self._machine.map_memory(RAM_SLOT, 0, self.memory.fd, 0, memory_size)
            self._cpu = self._machine.create_vcpu(0)
            self.reset_states = {name: self._cpu.get_state(name) for name in RESET_STATES}
            self._made_cpuid = self._cpu.get_state("cpuid")
            self.time_source = default_time(self._machine)
            undo.pop_all()
        self._chip_reset_states: dict[str, bytes] = {}
        self.machine_name = "bare"
        self.board: Board | None = None
        self.images = Images()
        self._boot_due = True  # the next run begins by loading what `images` has
        self._has_run = False  # RAM's size and the devices are fixed then; a run that could not boot is none
        self._rom: tuple[int, int, int] | None = None  # descriptor, address, size
        self.lane: Lane | None = None  # for `_Guard`
        self._lane_news = False
        self._left: dict[int, Run] = {}  # the lane's runs that Python ends, by the handle whose they are
        self.is_watched: Callable[[], bool] = lambda: False  # whether somebody is to be told of each exit
        self._lock = _Guard(self)
        self._hooks = MemoryHooks()
        self.trace = Trace()
        self.symbols = SymbolTable()  # another one takes its place; it is never changed
        self.listing = Listing()  # what `disasm` shows

        self._state = "paused"
        self._run: Run | None = None
        self._tasks: deque[tuple[Callable[[Vcpu], Any], Future[Any]]] = deque()
        # None: the end. _LOOK: there is a lane now.
        self._work: queue.SimpleQueue[Run | Literal["look"] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._has_begun = threading.Event()
        self._points = Points()
        self._asked = NO_DEBUG  # what the engine was last asked to stop for
        self._subscribers: tuple[Callable[[], None], ...] = ()
        self._dirty = {"file": 0, "cache": 0}
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0  # of the runs that have ended
        self._began = 0.0  # when the run under way did
        self._closed = False
        self._still: object | None = object()
        self._last_exit: exits.Exit | None = None
        self._exit_number = 0  # how many exits there were

    # ---- what it is

    @property
    def state(self) -> str:
        """`paused`, `running`, `halted` or `shutdown`."""
        self.settle()
        return self._state

    @property
    def last_exit(self) -> exits.Exit | None:
        self.settle()
        return self._last_exit

    @property
    def exit_number(self) -> int:
        """How many exits there were."""
        self.settle()
        return self._exit_number

    @property
    def still(self) -> object | None:
        """A new object whenever the CPU was used for more than to look at it; None while it runs. While it is the
        same, registers are: who has read them need not ask the engine again."""
        self.settle()
        return self._still

    def _set_still(self, still: object | None) -> None:
        """With the lock held."""
        self._still = still
        if self.lane is not None:
            self.lane.invalidate()

    @property
    def hooks(self) -> MemoryHooks:
        return self._hooks

    @hooks.setter
    def hooks(self, hooks: MemoryHooks) -> None:
        with self._lock:
            self._hooks = hooks

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._machine.capabilities

    @property
    def closed(self) -> bool:
        return self._closed

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called, in any thread, after state or last exit changed. Returns what ends that."""
        with self._lock:
            self._subscribers = (*self._subscribers, callback)

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = tuple(one for one in self._subscribers if one is not callback)

        return unsubscribe

    # ---- the lane

    def attach_lane(self, page: int, done: int) -> None:
        """Have that page with a server, which is woken by that eventfd (vmfs/words/lane.h)."""
        lane = Lane(page, done)
        with self._lock:
            self.lane = lane
            if self._thread is not None:
                self._work.put("look")

    def settle(self) -> None:
        """Hear of what the lane has done."""
        if self.lane is not None:
            with self._lock:
                pass

    def publish(self, name: str, data: bytes, still: object | None) -> None:
        """Have the lane answer a file of LANE_FILES with what was read of it while the CPU was `still`."""
        if self.lane is not None and still is not None and name in LANE_FILES:
            with self._lock:
                if self._still is still:
                    self.lane.publish(LANE_FILES[name], data)

    def take_left(self, handle: int) -> Run | None:
        """The run that the lane began for that open file, and left to be waited for in the usual way."""
        if self.lane is None:
            return None
        with self._lock:
            return self._left.pop(handle, None)

    def enter_lane(self, lane: Lane) -> None:
        """The lock was taken."""
        found = lane.enter()
        if found:
            self._lane_news |= self._hear(lane)
        if found == 2 and self._run is None:
            handle, self._began = lane.under_way()
            self._run = self._left[handle] = Run(UNBOUND)
            self._state = "running"
            self._set_still(None)
            self._counts["runs"] += 1
            self._lane_news = True

    def _hear(self, lane: Lane) -> bool:
        """Count the lane's runs, as `_note` does those of Python. Whether there were any."""
        runs, *by_reason, seconds = lane.take()
        if not runs:
            return False
        self._counts["runs"] += runs
        for kind, count in zip((exits.Io, exits.Mmio, exits.Hlt), by_reason, strict=True):
            self._counts[kind.REASON] += count
        self._seconds += seconds
        self._exit_number += runs
        self._last_exit = self._cpu.left_exit()
        self._state = _state_after(self._last_exit)
        self._still = object()  # and what is published is of now
        return True

    def leave_lane(self, lane: Lane) -> bool:
        """The lock is about to be released. Whether subscribers are to be told of what was heard."""
        if self._is_simple():
            lane.leave(self._cpu.lane)
        news, self._lane_news = self._lane_news, False
        return news

    def _is_simple(self) -> bool:
        """Whether a run is nothing but the CPU's: from where it stands to an exit that is the caller's."""
        return (
            self._run is None
            and self._state in ("paused", "halted")
            and self._has_run
            and not self._boot_due
            and self.board is None
            and self._cpu.lane is not None
            and (self._asked is NO_DEBUG or self._asked == NO_DEBUG)
            and not self.trace.on
            and self._hooks.before is None
            and self._hooks.after is None
            and not self._closed
            and not self.is_watched()
        )

    # ---- running

    def start(self, bound: Bound = UNBOUND) -> Run:
        """Begin a run. Busy when there is one. A machine that is shut down gives its last exit again."""
        with self._lock:
            self._check_idle()
            run, begins = Run(bound), None
            if self._state == "shutdown" and self._last_exit is not None:
                run.set_result(self._note(self._last_exit))
            else:
                self._cpu.clear_kick()
                self._run, self._state = run, "running"
                self._began = time.perf_counter()
                self._set_still(None)
                self._counts["runs"] += 1
                self._put_work(run)
                if self._thread is None:
                    self._has_begun.clear()
                    self._thread = begins = threading.Thread(target=self._serve, name="vmfs-cpu0", daemon=True)
        self.tell()
        if begins is not None:
            # Behind the put and without the lock, so that the new thread need not wait for this one.
            self._begin(begins)
        return run

    def _put_work(self, run: Run | None) -> None:
        self._work.put(run)
        if self.lane is not None:
            self.lane.call()

    def _next_work(self) -> tuple[Run | None, bool]:
        """In the CPU's thread: the next run, and whether the lane has begun it, which has served until then."""
        while True:
            if self.lane is None:
                work = self._work.get()
            else:
                try:
                    work = self._work.get_nowait()
                except queue.Empty:
                    if not self.lane.serve():
                        continue
                    with self._lock:
                        assert self._run is not None
                        return self._run, True
            if work != "look":
                return work, False

    def _begin(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except RuntimeError as error:  # no room for a thread
            with self._lock:
                self._thread = self._run = None
                self._work.get()
                self._do_tasks()
                self._state = "paused"
                self._set_still(object())
            self._has_begun.set()
            self.tell()
            raise LimitReached(f"the CPU has no thread: {error}") from error
        self._has_begun.set()

    def stop(self, run: Run | None = None) -> None:
        """End the current run (or `run`, if it is still the current one) with Interrupted; or do nothing."""
        with self._lock:
            current = self._run
            if current is not None and run in (None, current):
                current.stop_asked = True
                self._kick()

    def pause(self) -> Future[None]:
        """`stop`, and know when the guest has stopped, whatever its exit: done at once when nothing runs."""
        stopped: Future[None] = Future()
        with self._lock:
            self._check_open()
            run = self._run
        if run is None:
            stopped.set_result(None)
        else:
            run.add_done_callback(lambda _: stopped.set_result(None))
            self.stop(run)
        return stopped

    def _serve(self) -> None:
        """The CPU's thread."""
        while True:
            run, by_lane = self._next_work()
            if run is None:
                return
            result: exits.Exit | None = None
            failure: BaseException | None = None
            try:
                result = self._execute(run, self._cpu.left_exit() if by_lane else None)
            except VmfsError as error:
                failure = known(error)
            except BaseException as error:
                failure = known(error)
                if failure is error:  # a bug; the caller gets EIO and the log the traceback
                    failure = EngineFailed(f"{type(error).__name__}: {error}")
                    failure.__cause__ = error
            with self._lock:
                self._seconds += time.perf_counter() - self._began
                self._do_tasks()
                self._run = None
                self._set_still(object())
                if by_lane and self.lane is not None:
                    self.lane.settle()
                if self._closed:
                    failure = Gone("the machine was removed")
                elif failure is not None:  # for those who did not wait for the run
                    result = self._error_exit(failure)
                self._state = "paused"
                if isinstance(result, exits.Shutdown) and result.cause == "reset" and not self._closed:
                    self._set_back(self._cpu)
                if result is not None:
                    result = self._note(result)
            self.tell()
            if failure is not None:
                run.set_exception(failure)
            else:
                run.set_result(result)

    def _error_exit(self, failure: BaseException) -> exits.Error:
        """The exit of a run that failed; with the lock held."""
        try:
            rip = REGISTERS["rip"].get(self._cpu.get_state("regs"))
        except VmfsError:  # of a CPU that can do nothing any more
            rip = 0
        return exits.Error(reason=str(failure), rip=rip)

    def _execute(self, run: Run, first: exits.Exit | None) -> exits.Exit:
        if before := self.hooks.before:
            before()
        if self._boot_due:
            self._boot()
        self.memory.seal()
        self._has_run = True
        timer = None
        if run.bound.seconds is not None:
            timer = threading.Timer(run.bound.seconds, self._expire, (run,))
            timer.daemon = True
            timer.start()
        try:
            asked = Asked(self._prepare, self._stop_for, self._do_tasks_now, lambda: self._points.stepping)
            loop = RunLoop(run, self._cpu, self.capabilities, self.board, self.trace, asked)
            return self._explained(loop.to_exit(first))
        finally:
            if timer:
                timer.cancel()
            if after := self.hooks.after:
                after(self.take_dirty("cache"))

    def _explained(self, result: exits.Exit) -> exits.Exit:
        """What a run came to; that of an empty machine says what to do."""
        if isinstance(result, exits.Error) and self._rom is None:
            code = CodeMode.of(self._cpu.get_state("regs"), self._cpu.get_state("sregs"))
            if code.address == RESET_VECTOR:
                return replace(result, reason=NOTHING_TO_RUN)
        return result

    def _prepare(self, bound: Bound, by_steps: bool) -> bool:
        with self._lock:
            return self._ask(bound, step=by_steps or self.trace.steps(self.capabilities))

    def _ask(self, bound: Bound, step: bool) -> bool:
        """Tell the engine what to stop for, if that changed. True when the debug file asks for steps."""
        request = self._points.request()
        stepping = request.step
        if bound.until is not None:
            request = replace(request, breakpoints=(*request.breakpoints, Breakpoint(UNTIL, bound.until)))
        if step:
            request = replace(request, step=True)
        self._set_debug(request)
        return stepping

    def _stop_for(self, reached: exits.Debug) -> exits.Debug | None:
        """The stop that the caller is to see of those that the CPU came to at once, or None when the run goes
        on: a condition is false, a count is not used up. In the CPU's thread."""
        stops = {stop.id: stop for stop in (*reversed(reached.also), reached) if stop.id is not None}
        ids = sorted(stops)
        with self._lock:
            wanted = self._points.reached(ids, CpuLooker(self._cpu, self.memory.read))
            if not wanted:
                return replace(stops[UNTIL], id=None, also=()) if UNTIL in stops else None
            if spent := [id_ for id_ in wanted if self._points.is_once(id_)]:
                self._points = self._points.copy()
                for id_ in spent:
                    self._points.delete(id_)
        return replace(stops[wanted[0]], also=())

    def _set_debug(self, request: DebugRequest) -> None:
        if request is not self._asked and request != self._asked:
            self._cpu.set_debug(request)
            self._asked = request

    def _expire(self, run: Run) -> None:
        with self._lock:
            if self._run is run:
                run.expired = True
                self._kick()

    def _do_tasks_now(self) -> None:
        with self._lock:
            self._do_tasks()

    def _do_tasks(self) -> None:
        """What waited for a boundary; with the lock held, in the CPU's thread."""
        while self._tasks:
            task, future = self._tasks.popleft()
            _do(task, self._cpu, future)

    def _note(self, exit_: exits.Exit) -> exits.Exit:
        """Count and keep an exit that callers see, in the form in which they see it; with the lock held."""
        self._state = _state_after(exit_)
        self._counts[exit_.REASON] += 1
        self._last_exit = exit_
        self._exit_number += 1
        return exit_

    # ---- the CPU between instructions

    def at_boundary(self, task: Callable[[Vcpu], T]) -> Future[T]:
        """Do `task` with the CPU between two instructions: at once when nothing runs, else as soon as the
        guest stops for it; it then goes on. The task must be short and change nothing a run relies on."""
        future: Future[T] = Future()
        with self._lock:
            self._check_open()
            if self._run is None:
                _do(task, self._cpu, future)
            else:
                self._tasks.append((task, future))
                self._kick()
        return future

    def change(self, task: Callable[[Vcpu], T], then: str = "paused") -> T:
        """Do `task`, which gets and sets registers, at once. Busy while the machine runs.

        While a read waits for its data it is done twice, first on a CPU that is not the guest's.

        A CPU that was shut down or halted is `paused` afterwards: it goes on with what was set. `then` is for who
        takes a change back.
        """
        with self._lock:
            self._check_idle()
            if self._is_reading():
                # What is refused shall not have completed the access.
                with Rehearsal(self.engine, self._cpu) as rehearsal:
                    task(cast(Vcpu, rehearsal))
            self._set_still(object())
            self._cpu.complete()  # else a part of the state, read and set again, would undo the access
            result = task(self._cpu)
            changed = self._state != then
            self._state = then
        if changed:
            self.tell()
        return result

    # ---- state of the machine

    def get_machine_state(self, name: str) -> Future[bytes]:
        return self.at_boundary(lambda _: self._machine.get_state(name))

    def change_machine_state(self, name: str, change: Callable[[Callable[[], bytes]], bytes]) -> None:
        """Set a state to what `change` makes of it; it gets a function that reads it. Busy during a run."""
        with self._lock:
            self._check_idle()
            self._machine.set_state(name, change(lambda: self._machine.get_state(name)))

    def reset(self) -> None:
        """The CPU's reset state (Intel SDM 3A 9.1.1), devices as at power-on; the next run boots what there is.

        RAM keeps its contents, as on a real machine.
        """
        with self._lock:
            self._check_idle()
            self._set_still(object())
            self._cpu.complete()
            self._set_back(self._cpu)
            changed = self._state != "paused"
            self._state = "paused"
        if changed:
            self.tell()

    def _set_back(self, cpu: Vcpu) -> None:
        """With the lock held."""
        cpu.clear_kick()
        while cpu.exits_waiting:  # of an instruction that is no more: runs return them and execute nothing
            cpu.run()
        for name, data in self._chip_reset_states.items():
            self._machine.set_state(name, data)
        for name in (*RESET_STATES, *(("lapic",) if "lapic" in self.reset_states else ())):
            cpu.set_state(name, self.reset_states[name])
        if self.board is not None:
            self.board.reset()
        self._boot_due = True

    # ---- what it is made of

    def set_machine(self, name: str) -> None:
        """Be a machine with other devices. Before the first run only, else Busy. What was set of the CPU stays."""
        board_type = machine_type(name)
        with self._lock:
            self._check_idle()
            if name == self.machine_name:
                return
            if board_type is not None and Capability.IRQCHIP not in self.capabilities:
                raise Unsupported(f"machine: {name} needs interrupt controllers, which {self.engine.name} has not")
            if self._has_run:
                raise Busy("machine: it has run; its devices are fixed")
            old_board = self.board
            self._replace_machine(self.engine, board_type)
            self.machine_name = name
            # A PC lives by the clock on the wall: its network and its users do.
            self._set_time("host" if board_type else default_time(self._machine))
            if old_board is not None:
                old_board.close()
        self.tell()

    @property
    def has_run(self) -> bool:
        """Then the size of RAM and the devices are fixed."""
        return self._has_run

    def attach(self, make: Callable[[Pc], PciDevice]) -> PciDevice:
        """Plug the device that `make` makes into the PCI bus. Before the first run, else Busy."""
        with self._lock:
            board = self._changeable_board()
            device = make(board)
            board.pci.plug(device)
        return device

    def check_attachable(self) -> None:
        """Raises what `attach` would, before anything is opened for it."""
        with self._lock:
            self._changeable_board()

    def detach(self, device: Device) -> None:
        """Take a device out that `attach` has put in. Before the first run, else Busy."""
        with self._lock:
            board = self._changeable_board()
            if not isinstance(device, PciDevice) or device.name in board.built_in:
                raise NotPermitted(f"{device.name} belongs to the machine")
            board.pci.unplug(device)

    def _changeable_board(self) -> Pc:
        self._check_idle()
        if not isinstance(self.board, Pc):
            raise Unsupported("a bare machine has no devices: write pc to `machine` first")
        if self._has_run:
            raise Busy("it has run; its devices are fixed")
        return self.board

    def _set_time(self, source: str) -> None:
        if Capability.DETERMINISTIC in self.capabilities:
            self._machine.set_time(source)
        self.time_source = source

    def set_time_source(self, source: str) -> None:
        """`host`: time follows the host's clock; `instructions`: those retired (Unsupported where they cannot)."""
        check_time(source)
        with self._lock:
            self._check_idle()
            if source == "instructions" and Capability.DETERMINISTIC not in self.capabilities:
                raise Unsupported(f"time: on {self.engine.name} it follows the host's clock")
            self._set_time(source)
            if source == "instructions" and not self._has_run:  # what has passed on the host is in no run
                passed = 0 if self.board is None else self.board.now()
                self._machine.set_state("clock", bytes(len(self._machine.get_state("clock"))))
                write_registers(self._cpu, {"msr.0x10": 0})  # the TSC
                if self.board is not None:
                    self.board.time_shifted(-passed)

    def _boot(self) -> None:
        """Load what there is to boot, in the CPU's thread. Invalid for what cannot be; the machine stays usable."""
        images = self.images
        if images.bootable:
            from vmfs.machine.booting import boot  # what reads images is not loaded by who boots none

            booted = boot(images, self.memory, self._machine, self._cpu, has_devices=self.board is not None)
            if self.board is not None:
                self.board.set_firmware_files(booted.files)
            if booted.rom is not None:
                self._set_rom(booted.rom.address, booted.rom.data)
            with self._lock:
                written = 0
                for address, size in booted.written:
                    first, last = address // PAGE, (address + max(size, 1) - 1) // PAGE
                    written |= ((1 << last - first + 1) - 1) << first
                self._note_written(written)
        self._boot_due = False

    def load(self) -> Run | None:
        """Do now what the next run would begin with, for a debugger that comes before it: load what there is to
        boot, and execute nothing. None where there is nothing to do."""
        if not self._boot_due or not self.images.bootable:
            return None
        return self.start(Bound(instructions=0))

    def read_physical(self, address: int, length: int) -> bytes:
        """What a debugger sees there: up to `length` bytes of RAM, of the ROM or of a device's memory; empty where
        there is none."""
        if address < self.memory.size:
            return self.memory.read(address, length)
        if self._rom is not None:
            fd, start, size = self._rom
            if start <= address < start + size:
                return os.pread(fd, min(length, start + size - address), address - start)
        return self.board.read_memory(address, length) if self.board is not None else b""

    def _set_rom(self, address: int, data: bytes) -> None:
        """Have `data` in the guest's address space, read-only, in the place of the ROM before."""
        fd = os.memfd_create("vmfs-rom", os.MFD_CLOEXEC)
        try:
            os.write(fd, data)
            self._machine.map_memory(ROM_SLOT, 0, 0, 0, 0)
            self._machine.map_memory(ROM_SLOT, address, fd, 0, len(data), read_only=True)
        except BaseException:
            os.close(fd)
            raise
        if self._rom is not None:
            os.close(self._rom[0])
        self._rom = fd, address, len(data)

    def mode(self) -> Future[str]:
        return self.at_boundary(lambda cpu: mode_of(cpu.get_state("regs"), cpu.get_state("sregs")))

    def set_mode(self, mode: str) -> None:
        self.change(lambda cpu: set_mode(cpu, self.memory, self.memory.size, mode))

    def resize_memory(self, size: int) -> None:
        """Before the first run only, else Busy."""
        check_size(size)
        with self._lock:
            self._check_idle()
            if size != self.memory.size:
                self.memory.resize(size)
                self._machine.map_memory(RAM_SLOT, 0, 0, 0, 0)
                self._machine.map_memory(RAM_SLOT, 0, self.memory.fd, 0, size)
                if self.board is not None:
                    self.board.memory_resized()

    def move_to(self, engine: Engine) -> None:
        """Go on with another engine: RAM, the state of the CPU, vectors that wait and points go along.

        Busy while the machine runs, or when exits of an instruction that is done were not all seen. Where the
        other engine cannot have the state, or cannot watch for the points, Unsupported, and nothing has
        changed.

        A read that waits for its data is not executed yet: it is an exit again at the next run. The CPUID
        goes along once the CPU has run. Counters of the engine begin anew.
        """
        with self._lock:
            self._check_idle()
            if self._cpu.exits_waiting:
                raise Busy("the last instruction has more exits: run until they are seen")
            self._replace_machine(engine)
            if Capability.DETERMINISTIC in self.capabilities:
                self._machine.set_time(self.time_source)
            else:
                self.time_source = "host"
        self.tell()

    def _replace_machine(self, engine: Engine, board_type: type[Pc] | Literal["same"] | None = "same") -> None:
        """Go on with a new machine of an engine, which gets all state; with the lock held.

        Unless it is "same", with another board: None is no board. When it raises nothing has changed.
        """
        has_board = self.board is not None if board_type == "same" else board_type is not None
        machine = engine.create_machine()
        try:
            machine.map_memory(RAM_SLOT, 0, self.memory.fd, 0, self.memory.size)
            if self._rom is not None:
                rom, address, size = self._rom
                machine.map_memory(ROM_SLOT, address, rom, 0, size, read_only=True)
            if has_board:
                machine.create_irqchip()
            cpu = machine.create_vcpu(0)
            reset_states = {name: cpu.get_state(name) for name in RESET_STATES}
            chip_reset_states = {}
            if has_board:
                reset_states["lapic"] = cpu.get_state("lapic")
                chip_reset_states = {name: machine.get_state(name) for name in ("irqchip", "pit")}
            made_cpuid = cpu.get_state("cpuid")
            is_new = not self._has_run and self._cpu.get_state("cpuid") == self._made_cpuid
            carry_cpu(self._cpu, cpu, self.reset_states, keep_cpuid=not is_new)
            if board_type == "same":
                carry_machine(self._machine, machine)
            request = self._points.request()
            cpu.set_debug(request)
            self._ask_trace(engine, machine, cpu, self.trace.settings)
            written = self._machine.dirty_log(RAM_SLOT)
            board = self.board
            if board_type != "same":
                board = board_type and board_type(machine, self.memory)
            elif board is not None:
                board.move_to(machine)
        except BaseException:
            machine.close()
            raise
        old, self._machine, self._cpu, self.engine = self._machine, machine, cpu, engine
        self.reset_states, self._made_cpuid = reset_states, made_cpuid
        self._chip_reset_states = chip_reset_states
        self.board = board
        self._asked = request
        self._set_still(object())
        self._note_written(int.from_bytes(written, "little"))
        old.close()

    # ---- the pending access

    @property
    def access_data(self) -> bytes:
        with self._lock:
            self._check_open()
            return b"" if self._run is not None else self._cpu.access_data

    def set_access_data(self, data: bytes) -> None:
        with self._lock:
            self._check_idle()
            self._cpu.access_data = data
            self._moved()

    def unclaimed(self) -> Future[str]:
        """What the guest has used and nothing has claimed, a line each: ports and addresses (of a machine with
        devices), MSRs."""

        def lines(cpu: Vcpu) -> str:
            found = [] if self.board is None else self.board.unclaimed()
            for index, reads, writes, rip in cpu.unclaimed_msrs():
                found.append(f"msr={index:#x} {Use(reads, writes, rip)}")
            return "".join(f"{line}\n" for line in found)

        return self.at_boundary(lines)

    # ---- interrupts

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt. WouldBlock when the queue is full."""
        with self._lock:
            self._check_open()
            self._cpu.interrupt(vector)
            self._notice()

    def nmi(self) -> None:
        with self._lock:
            self._check_open()
            self._cpu.nmi()
            self._notice()

    def irq_line(self, gsi: int, level: bool) -> None:
        with self._lock:
            self._check_open()
            self._machine.irq_line(gsi, level)

    @property
    def interrupts_queued(self) -> int:
        with self._lock:
            self._check_open()
            return self._cpu.interrupts_queued

    def _kick(self) -> None:
        """End the present slice of a run, also where it waits for who reads the trace; with the lock held."""
        self._cpu.kick()
        self.trace.interrupt()

    def _notice(self) -> None:
        """Make a running guest look at its interrupts; with the lock held."""
        if self._run is not None:
            self._kick()
        self._moved()

    def _moved(self) -> None:
        """The CPU may not be as it was; with the lock held."""
        if self._run is None:
            self._set_still(object())

    # ---- debugging

    @property
    def points(self) -> Points:
        return self._points

    def points_text(self) -> str:
        """The `debug` file."""
        with self._lock:
            self._check_open()
            return self._points.text(self._cpu.way_of, self.symbols.label)

    def set_points(self, change: Callable[[Points], object]) -> Future[None]:
        """Change what runs stop for, from the next boundary on. `change` gets a copy of the points to change.

        Asks the engine first: Unsupported when it cannot watch for all of that, and nothing changes.
        """

        def make_it(cpu: Vcpu) -> None:
            points = self._points.copy()
            change(points)
            self._use_points(points)

        return self.at_boundary(make_it)

    def put_points(self, points: Points) -> Future[None]:
        """Have points again that there were before."""
        return self.at_boundary(lambda cpu: self._use_points(points.skip_ids(self._points.last_id)))

    def _use_points(self, points: Points) -> None:
        self._set_debug(points.request())
        self._moved()
        self._points = points

    def set_trace(self, change: Callable[[TraceSettings], TraceSettings]) -> Future[None]:
        """Change what is traced, from the next boundary on. Unsupported where the engine cannot, and nothing has
        changed."""

        def make_it(cpu: Vcpu) -> None:
            settings = change(self.trace.settings)
            self._ask_trace(self.engine, self._machine, cpu, settings)
            self.trace.apply(settings)

        return self.at_boundary(make_it)

    def _ask_trace(self, engine: Engine, machine: Machine, cpu: Vcpu, settings: TraceSettings) -> None:
        if Capability.TRACE in machine.capabilities:
            cpu.set_trace(settings.request(), self.trace)
        else:
            settings.check_steps(engine.name)

    # ---- counting

    def take_dirty(self, reader: str) -> bytes:
        """The pages the guest wrote since `reader` ("file" or "cache") last took them: a bit a 4 KiB page."""
        with self._lock:
            size = self._gather_dirty()
            taken, self._dirty[reader] = self._dirty[reader], 0
        return taken.to_bytes(size, "little")

    def peek_dirty(self, reader: str) -> bytes:
        """What `take_dirty` would give."""
        with self._lock:
            size = self._gather_dirty()
            return self._dirty[reader].to_bytes(size, "little")

    def _gather_dirty(self) -> int:
        """Note what was written since; how many bytes a log has."""
        self._check_open()
        log = self._machine.dirty_log(RAM_SLOT)
        news = int.from_bytes(log, "little")
        if self.board is not None:
            news |= self.board.take_dirty()
        self._note_written(news)
        return len(log)

    def _note_written(self, pages: int) -> None:
        """RAM was written: a bit a page, for every reader of the dirty log; with the lock held."""
        if pages:
            self._dirty = {name: bits | pages for name, bits in self._dirty.items()}

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
                "interrupts_queued": self._cpu.interrupts_queued,
                **self._cpu.counters(),
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
            thread = self._thread
        self.tell()
        if thread is not None:
            self._has_begun.wait()  # else it could not be joined
            if thread.ident is not None:
                self._put_work(None)
                thread.join()
        with self._lock:
            while self._tasks:
                self._tasks.popleft()[1].set_exception(Gone("the machine was removed"))
            if self.board is not None:
                self.board.close()
            self._machine.close()
            if self._rom is not None:
                os.close(self._rom[0])
            self.images.close()
            self.memory.close()
        self.tell()

    # ---- helpers

    def _is_reading(self) -> bool:
        """Whether an `in` or a load waits for its data; with the lock held."""
        return getattr(self._last_exit, "direction", "") in ("in", "read") and bool(self._cpu.access_data)

    def _check_open(self) -> None:
        if self._closed:
            raise Gone("the machine was removed")

    def _check_idle(self) -> None:
        self._check_open()
        if self._run is not None:
            raise Busy("the machine is running")

    def tell(self) -> None:
        for callback in self._subscribers:
            callback()


def check_time(source: str) -> None:
    if source not in ("host", "instructions"):
        raise Invalid(f"time: {source[:40]!r} is neither host nor instructions")


def _state_after(exit_: exits.Exit) -> str:
    if isinstance(exit_, exits.Shutdown) and exit_.cause == "reset":
        return "paused"  # it was reset, and can go on
    return {exits.Hlt: "halted", exits.Shutdown: "shutdown"}.get(type(exit_), "paused")


def default_time(machine: Machine) -> str:
    """Where a machine that has no devices has its time from."""
    return "instructions" if Capability.DETERMINISTIC in machine.capabilities else "host"


def _do(task: Callable[[Vcpu], T], cpu: Vcpu, future: Future[T]) -> None:
    try:
        future.set_result(task(cpu))
    except BaseException as error:
        future.set_exception(error)
