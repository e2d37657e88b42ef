"""Control: who runs the CPUs of a machine, why they stopped, and what may be done between two instructions.

It knows no file and no event loop: a call that takes time returns a `concurrent.futures.Future`, and callers subscribe
to changes.

Threads and locks
-----------------
A CPU runs in a thread of its own (`vmfs.machine.cpu`), started by the first run; where the engine executes CPUs in
turn, all are in one. The first thread leads a run, the others join in (`Meeting`). One lock, `_lock`, guards all that
is mutable in a machine (the state, the current run, the tasks that wait for a boundary, the points); it is held for
short calls into the engine, never while the guest runs and never while a subscriber or a memory hook is called. The
board of a machine with devices has a lock of its own: it may be taken while this one is held, never the other way
round.

While the machine does not run, the lock's holder may use the CPUs. While it runs, only their threads may:
others hand them a task (`at_boundary`) and kick them; once all stand between two instructions, one does the tasks, and
they go on. When one comes to an exit that the caller sees, the others are kicked, and end, too. What they came to on
their way is kept for the next runs (`_held`).

The lane
--------
A machine that has a page with its server (`attach_lane`) may also be run by C code alone, in the CPU's thread, while it
is simple (`_is_simple`) and no thread has the lock. To take the lock (`_Guard`) is to take the CPU back: what was run
since is counted then, and a run under way becomes `_run`, like any other, before anybody can look. So there is one
truth, and it is here; the lane has facts that were not told yet.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from vmfs.debug.conditions import CpuLooker
from vmfs.debug.points import UNTIL, Points
from vmfs.debug.symbols import SymbolTable
from vmfs.debug.trace import Trace, TraceSettings
from vmfs.debug.why import Account
from vmfs.devices.board import Board
from vmfs.engine.base import NO_DEBUG, Capability, DebugRequest, Engine, Machine, Runner, Vcpu
from vmfs.machine._lane import Lane
from vmfs.machine.cpu import Cpu, CpuThread, Job
from vmfs.machine.history import History
from vmfs.machine.meeting import Meeting
from vmfs.machine.runloop import NOTHING, UNBOUND, Asked, Bound, Run, RunLoop
from vmfs.machine.travel import Travel
from vmfs.memory.ram import Memory
from vmfs.words import exits
from vmfs.words.errors import Busy, EngineFailed, Gone, Invalid, Unsupported, VmfsError, known
from vmfs.words.registers import REGISTERS
from vmfs.words.stops import Breakpoint, UnwrittenStop

T = TypeVar("T")

GOES_ON = frozenset(("reset", "suspend"))  # causes of a shutdown after which the next run begins anew, or wakes
LANE_FILES = {"regs": 0, "sregs": 1, "exit.data": 2, "exit.bin": 3, "state": 4}  # enum lane_file of vmfs/words/lane.h


@dataclass(frozen=True, slots=True)
class MemoryHooks:
    """Called in the CPU's thread before the guest first runs in a run, and after it last ran.

    `after` gets the dirty log of the run (a bit a 4 KiB page). They exist for clients' caches of RAM; where
    there are none, so that RAM is shared live, they are None.
    """

    before: Callable[[], None] | None = None
    after: Callable[[bytes], None] | None = None


class _Guard:
    """The lock of a machine. A thread that holds it has taken over all that the lane has done, and has the CPU."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._control.lane is not None:
            self._control.enter_lane(self._control.lane)

    def __exit__(self, *exception: object) -> None:
        news = self._control.lane is not None and self._control.leave_lane(self._control.lane)
        self._lock.release()
        if news:
            self._control.tell()


class Control:
    """The running of a machine. Every method may be called from any thread; all raise Gone after the machine's end.

    The machine itself, `vmfs.machine.machine.Vm`, says what there is to run, and what comes before and after a run.
    """

    engine: Engine
    memory: Memory
    board: Board | None
    cpus: Sequence[Cpu]
    history: History | None = None
    _machine: Machine
    _boot_due: bool  # the next run begins by loading what there is to boot
    _has_run: bool

    def __init__(self) -> None:
        self.lane: Lane | None = None  # for `_Guard`
        self._lane_news = False
        self.lane_runs = 0  # of which subscribers were not told one by one
        self._left: dict[int, Run] = {}  # the lane's runs that Python ends, by the handle whose they are
        self.is_watched: Callable[[], bool] = lambda: False  # whether somebody is to be told of each exit
        self._lock = _Guard(self)
        self._hooks = MemoryHooks()
        self.trace = Trace()
        self.symbols = SymbolTable()  # another one takes its place; it is never changed

        self._state = "paused"
        self._run: Run | None = None
        self._parts: Meeting | None = None  # of a run of several threads
        self._tasks: deque[tuple[Callable[[Vcpu], Any], int, Future[Any]]] = deque()  # with the number of their CPU
        self._threads = [CpuThread("vmfs-cpu0", self._adopted)]
        self._runners: Sequence[Runner] = ()
        self._held: deque[exits.Exit] = deque()  # that CPUs came to when another one had ended the run
        self._points = Points()
        self._subscribers: tuple[Callable[[], None], ...] = ()
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0  # of the runs that have ended
        self.rehearses = False  # runs come to their end before the first instruction
        self._began = 0.0  # when the run under way did
        self._closed = False
        self._still: object | None = object()
        self._last_exit: exits.Exit | None = None
        self.account: Account | None = None  # of the last shutdown or reset; it stays with the user, as points do
        self._exit_number = self._exit_news = 0  # how many exits there were

    # ---- what a machine says

    def _before_run(self) -> None:
        """In the CPU's thread, without the lock: what comes before the guest first runs in a run."""
        raise NotImplementedError

    def _after_run(self) -> None:
        """And after it last ran."""
        raise NotImplementedError

    def _explained(self, result: exits.Exit) -> exits.Exit:
        """What a run came to, in words that help."""
        raise NotImplementedError

    def _account_of(self, exit_: exits.Shutdown) -> Account | None:
        """What the CPUs did last; with the lock held."""
        raise NotImplementedError

    def _set_back(self, *, sleeps: bool = False) -> None:
        """Be as at power-on, or as the next run wakes it; with the lock held."""
        raise NotImplementedError

    # ---- what it is

    @property
    def cpu(self) -> Cpu:
        """The first one."""
        return self.cpus[0]

    def _set_cpus(self, cpus: Sequence[Cpu]) -> None:
        """Have these; with the lock held, or before anybody has this object."""
        self.cpus = cpus
        self._vcpus = [cpu.vcpu for cpu in cpus]
        self._runners = self._machine.runners(self._vcpus)

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
        """How many exits there were; and another number whenever the machine was put where it had others."""
        self.settle()
        return self._exit_news + self._exit_number

    @property
    def still(self) -> object | None:
        """Changes whenever the state of the CPU may have changed; None while it runs. While it is the same, registers
        are, and those that were read need not be asked for again."""
        self.settle()
        return self._still

    @property
    def still_in_task(self) -> object | None:
        """`still`, for a task of `at_boundary`, which has the lock."""
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

    def attach_lane(self, page: int, take_line: Callable[[Lane, int, bytes], None]) -> None:
        """Have that page with a server (vmfs/words/lane.h). `take_line`: as of the CPU's thread."""
        lane = Lane(page)
        with self._lock:
            self.lane = lane
            self._threads[0].attach_lane(lane, partial(take_line, lane))

    def settle(self) -> None:
        """Hear of what the lane has done."""
        if self.lane is not None:
            with self._lock:
                pass

    def publish(self, name: str, data: bytes, still: object | None, news: int = 0) -> None:
        """Have the lane answer a file of LANE_FILES with what was read of it while the CPU was `still`. `news`: what
        polls of it have seen then."""
        if self.lane is not None and still is not None and name in LANE_FILES:
            with self._lock:
                if self._still is still:
                    self.lane.publish(LANE_FILES[name], data, news)

    def unpublish(self) -> None:
        """What was published has other news by now, perhaps."""
        if self.lane is not None:
            with self._lock:
                self.lane.invalidate()

    def take_left(self, handle: int) -> Run | None:
        """The run that the lane began for that open file, and left to be waited for in the usual way. None while
        the lane still waits for it: then it is another read of the file that asks."""
        if self.lane is None:
            return None
        with self._lock:
            return self._left.pop(handle, None) if self.lane.is_left() else None

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
        runs, *by_reason, seconds, writes = lane.take()
        if writes:
            self._still = object()  # and what is published is of now
        if not runs:
            return False
        self._counts["runs"] += runs
        for kind, count in zip((exits.Io, exits.Mmio, exits.Hlt), by_reason, strict=True):
            self._counts[kind.REASON] += count
        self._seconds += seconds
        self._exit_number += runs
        self.lane_runs += runs
        self._last_exit = self.cpu.last_exit = self.cpu.vcpu.left_exit()
        self._state = _state_after(self._last_exit)
        self._still = object()  # and what is published is of now
        return True

    def leave_lane(self, lane: Lane) -> bool:
        """The lock is about to be released. Whether subscribers are to be told of what was heard."""
        if self._is_simple():
            lane.leave(self.cpu.vcpu.lane, self._state == "halted")
        news, self._lane_news = self._lane_news, False
        return news

    def _is_simple(self) -> bool:
        """Whether a run is nothing but the CPU's: from where it stands to an exit that is the caller's."""
        return (
            self._run is None
            and self._state in ("paused", "halted")
            and self._has_run
            and self._threads[0].is_there
            and not self._boot_due
            and self.board is None
            and len(self.cpus) == 1
            and self.cpu.vcpu.lane is not None
            and (self.cpu.asked is NO_DEBUG or self.cpu.asked == NO_DEBUG)
            and not self.trace.on
            and self._hooks.before is None
            and self._hooks.after is None
            and not self._closed
            and self.history is None
            and not self.is_watched()
        )

    # ---- running

    def start(self, bound: Bound = UNBOUND) -> Run:
        """Begin a run. Busy when there is one. A machine that is shut down gives its last exit again."""
        with self._lock:
            self._check_idle()
            if bound is not UNBOUND:
                bound = self._checked(bound)
            if self.rehearses:
                bound = NOTHING
            self._choose_runners(bound)
            run, begins = Run(bound), False
            run.state_before = self._state
            if self._state == "shutdown" and self._last_exit is not None and bound.journey is None:
                run.set_result(self._note(self._last_exit))
            elif self._held:
                run.set_result(self._note(self._held.popleft()))
            else:
                for runner in self._runners:
                    runner.clear_kick()
                self._run, self._state = run, "running"
                self._began = time.perf_counter()
                self._set_still(None)
                self._counts["runs"] += 1
                begins = self._threads[0].put(partial(self._serve, run))
        self.tell()
        if begins:
            self._threads[0].begin(self._give_up)
        return run

    def _checked(self, bound: Bound) -> Bound:
        """What it says of CPUs, in full. Invalid for one that there is not."""
        cpu = bound.cpu if bound.journey is None else bound.journey.cpu
        if cpu is not None and cpu >= len(self.cpus):
            raise Invalid(f"cpu={cpu}: there are {len(self.cpus)}, from 0 on")
        if bound.journey is not None and self.history is None:
            raise Unsupported("the machine has no history to go through: `echo on > history` begins one")
        if bound.steps is not None and bound.cpu is None:  # the one that was looked at last
            return replace(bound, cpu=0 if self._last_exit is None else self._last_exit.cpu)
        is_counted = bound.instructions and bound.cpu is None and len(self.cpus) > 1
        if is_counted and self._machine.in_turn(self._vcpus) is None:
            raise Unsupported(f"insns: {self.engine.name} does not count the instructions of several CPUs; step one")
        return bound

    def _choose_runners(self, bound: Bound) -> None:
        """For the run that begins: at the same time, unless instructions are counted, or told in their order."""
        if len(self.cpus) == 1:
            return
        self._runners = self._machine.runners(self._vcpus)
        is_in_turn = bound.instructions or self.trace.on or self.history is not None
        in_turn = self._machine.in_turn(self._vcpus) if is_in_turn else None
        if in_turn is not None:
            self._runners = (in_turn,)
        while len(self._threads) < len(self._runners):
            self._threads.append(CpuThread(f"vmfs-cpu{len(self._threads)}", self._adopted))

    def _give_up(self) -> None:
        """The run that was begun has no thread."""
        with self._lock:
            self._threads[0].forget()
            self._run = None
            self._do_tasks()
            self._state = "paused"
            self._set_still(object())
        self.tell()

    def _adopted(self) -> Job:
        """To end the run that the lane has begun."""
        with self._lock:
            assert self._run is not None
            return partial(self._serve, self._run, by_lane=True)

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

    def rest(self, seen: int | None) -> int:
        """Give back memory that only makes runs faster, where none is under way and there was none since there were
        `seen` exits. How many there are now."""
        with self._lock:
            if self._run is None and self._exit_number == seen and not self._closed:
                self._machine.rest()
            return self._exit_number

    def _serve(self, run: Run, *, by_lane: bool = False) -> None:
        """In the first CPU's thread."""
        result: exits.Exit | None = None
        failure: BaseException | None = None
        try:
            result = self._execute(run, self.cpu.vcpu.ended_exit() if by_lane else None)
        except VmfsError as error:
            failure = known(error)
        except BaseException as error:
            failure = known(error)
            if failure is error:  # a bug; the caller gets EIO and the log the traceback
                failure = EngineFailed(f"{type(error).__name__}: {error}")
                failure.__cause__ = error
        with self._lock:
            if run.bound is not NOTHING:
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
            if (history := self.history) is not None and not self._closed:
                history.arrive()
                if result is not None and not run.bound.looks_only:
                    history.note_exit(result)
            if isinstance(result, exits.Shutdown) and not self._closed:
                self.account = self._account_of(result)
                is_done_again = history is not None and history.in_past  # what came after it is in the record
                if result.cause in GOES_ON and not is_done_again:
                    self._set_back(sleeps=result.cause == "suspend")
            if self._closed or failure is not None:
                self._held.clear()
            if run.bound.looks_only and not self._closed:
                self._state = run.state_before
            elif result is not None:
                result = self._note(result)
        self.tell()
        if failure is not None:
            run.set_exception(failure)
        else:
            run.set_result(result)

    def _error_exit(self, failure: BaseException) -> exits.Error:
        """The exit of a run that failed; with the lock held."""
        try:
            rip = REGISTERS["rip"].get(self.cpu.vcpu.get_state("regs"))
        except VmfsError:  # of a CPU that can do nothing any more
            rip = 0
        return exits.Error(reason=str(failure), rip=rip)

    def _execute(self, run: Run, first: exits.Exit | None) -> exits.Exit:
        self._before_run()
        timer = None
        if run.bound.seconds is not None:
            timer = threading.Timer(run.bound.seconds, self._expire, (run,))
            timer.daemon = True
            timer.start()
        try:
            return self._explained(self._run_all(run, first))
        finally:
            if timer:
                timer.cancel()
            if self.history is not None:
                self.history.end_run()
            self._after_run()

    def _run_all(self, run: Run, first: exits.Exit | None) -> exits.Exit:
        """The exit that the run's caller sees."""
        history = self.history
        if run.bound.journey is not None:
            return self._travel(run)
        if history is not None and run.bound.instructions != 0:
            history.begin_run(run.bound.cpu)
        if run.bound.cpu is not None:
            cpu = self.cpus[run.bound.cpu]
            return self._loop(run, cpu.vcpu, (cpu,)).to_exit(first)
        runners = self._runners
        if len(runners) == 1:
            return self._loop(run, runners[0], self.cpus).to_exit(first)
        self._parts = parts = Meeting(len(runners), self._do_tasks_now)
        jobs = [partial(self._join_in, run, parts, runner, cpu) for runner, cpu in zip(runners, self.cpus, strict=True)]
        for thread, job in zip(self._threads[1:], jobs[1:], strict=False):
            with self._lock:
                begins = thread.put(job)
            if begins:
                self._begin_part(run, parts, thread)
        jobs[0]()
        parts.wait_for_all()
        self._parts = None
        ended, *others = parts.came
        if isinstance(ended, BaseException):
            raise ended
        with self._lock:
            self._held.extend(exit_ for exit_ in others if isinstance(exit_, exits.Exit) and _is_seen(exit_))
        return ended

    def _travel(self, run: Run) -> exits.Exit:
        """Go through the past; past the end of the record, live."""
        history, journey = self.history, run.bound.journey
        if history is None:
            raise Unsupported("the machine has no history any more")
        run.travel = Travel(self, history, run)
        exit_ = run.travel.to_exit(journey)
        left = 0 if journey.place is None or history.in_past else journey.place - history.count()
        if left <= 0 or not isinstance(exit_, exits.Limit):
            return exit_
        history.begin_run(None)
        return self._loop(run, self._runners[0], self.cpus, Bound(instructions=left)).to_exit()

    def _begin_part(self, run: Run, parts: Meeting, thread: CpuThread) -> None:
        def forget() -> None:
            with self._lock:
                thread.forget()

        try:
            thread.begin(forget)
        except VmfsError as error:
            self._end_part(run, parts, error)

    def _join_in(self, run: Run, parts: Meeting, runner: Runner, cpu: Cpu) -> None:
        """Run one of several, in its thread."""
        try:
            came_to: exits.Exit | BaseException = self._loop(run, runner, (cpu,)).to_exit()
        except BaseException as error:
            came_to = error
        self._end_part(run, parts, came_to)

    def _end_part(self, run: Run, parts: Meeting, came_to: exits.Exit | BaseException) -> None:
        parts.end(came_to)
        with self._lock:
            if not run.has_ended:
                run.has_ended = True
                self._kick()

    def _loop(self, run: Run, runner: Runner, cpus: Sequence[Cpu], bound: Bound | None = None) -> RunLoop:
        """Of a runner, which runs these."""
        do_tasks = self._do_tasks_now if self._parts is None else self._meet
        asked = Asked(partial(self._prepare, cpus), self._stop_for, do_tasks, lambda: self._points.stepping)
        if (history := self.history) is not None:
            asked = replace(asked, left=history.left, pass_end=partial(history.pass_end, run.bound.cpu))
        return RunLoop(run, runner, self._vcpus, self.capabilities, self.board, self.trace, asked, bound)

    def _prepare(self, cpus: Sequence[Cpu], bound: Bound, by_steps: bool) -> bool:
        with self._lock:
            step = by_steps or (self.trace.on and self.trace.steps(self.capabilities))
            for cpu in cpus:
                self._ask(cpu, bound, step)
            return self._points.stepping

    def _ask(self, cpu: Cpu, bound: Bound, step: bool) -> None:
        """Tell the engine what to stop for, if that changed."""
        request = self._points.request(cpu.index)
        if bound.until is not None:
            request = replace(request, stops=(*request.stops, Breakpoint(UNTIL, bound.until)))
        if step:
            request = replace(request, step=True)
        cpu.set_debug(request)

    def _stop_for(self, reached: exits.Debug) -> exits.Debug | None:
        """The stop that the caller is to see of those that the CPU came to at once, or None when the run goes
        on: a condition is false, a count is not used up. In the CPU's thread."""
        stops = {stop.id: stop for stop in (*reversed(reached.also), reached) if stop.id is not None}
        ids = sorted(stops)
        with self._lock:
            wanted = self._points.reached(ids, CpuLooker(self.cpus[reached.cpu].vcpu, self.memory.read))
            if not wanted:
                return replace(stops[UNTIL], id=None, also=()) if UNTIL in stops else None
            if spent := [id_ for id_ in wanted if self._points.is_once(id_)]:
                self._points = self._points.copy()
                for id_ in spent:
                    self._points.delete(id_)
        return replace(stops[wanted[0]], also=())

    def _expire(self, run: Run) -> None:
        with self._lock:
            if self._run is run:
                run.expired = True
                self._kick()

    def _do_tasks_now(self) -> None:
        with self._lock:
            self._do_tasks()

    def _meet(self) -> None:
        """In the thread of one of several CPUs: do the tasks once all are there."""
        with self._lock:
            waits = bool(self._tasks)
        if waits and self._parts is not None:
            self._parts.meet()

    def _do_tasks(self) -> None:
        """What waited for a boundary; with the lock held, in a CPU's thread."""
        while self._tasks:
            task, cpu, future = self._tasks.popleft()
            _do(task, self.cpus[cpu].vcpu, future)
        if self.history is not None and self._run is not None:
            self.history.after_tasks(self._run.bound.cpu)

    def _note(self, exit_: exits.Exit) -> exits.Exit:
        """Count and keep an exit that callers see, in the form in which they see it; with the lock held."""
        if len(self.cpus) > 1:
            exit_.of_several = True
        self.cpus[exit_.cpu].last_exit = exit_
        self._state = _state_after(exit_)
        self._counts[exit_.REASON] += 1
        self._last_exit = exit_
        self._exit_number += 1
        return exit_

    # ---- the CPU between instructions

    def at_boundary(self, task: Callable[[Vcpu], T], cpu: int = 0) -> Future[T]:
        """Do `task` with a CPU, while all are between two instructions: at once when nothing runs, else as soon as the
        guest stops for it; it then goes on. The task must be short and change nothing a run relies on."""
        future: Future[T] = Future()
        with self._lock:
            self._check_open()
            if self._run is None:
                _do(task, self.cpus[cpu].vcpu, future)
            else:
                self._tasks.append((task, cpu, future))
                self._kick()
        return future

    def _kick(self) -> None:
        """End the present slice of a run, also where it waits for readers of the trace; with the lock held."""
        run = self._run
        if run is not None and run.bound.cpu is not None:
            self.cpus[run.bound.cpu].vcpu.kick()
        else:
            for runner in self._runners:
                runner.kick()
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
            return self._points.text(self._way_of, self.symbols.label)

    def _way_of(self, id_: int, cpu: int | None) -> str:
        return self.cpus[cpu or 0].vcpu.way_of(id_)

    def set_points(self, change: Callable[[Points], object]) -> Future[None]:
        """Change what runs stop for, from the next boundary on. `change` gets a copy of the points to change.

        Asks the engine first: Unsupported when it cannot watch for all of that, and nothing changes.
        """

        def make_it(cpu: Vcpu) -> None:
            points = self._points.copy()
            change(points)
            points.check_cpus(len(self.cpus))
            if points.request(0).of(UnwrittenStop) and not (self.board and self.board.sees_unwritten):
                raise Unsupported("on unwritten: only a strict machine sees that (write strict to `machine`)")
            self._use_points(points)

        return self.at_boundary(make_it)

    def put_points(self, points: Points) -> Future[None]:
        """Have points again that there were before."""
        return self.at_boundary(lambda cpu: self._use_points(points.skip_ids(self._points.last_id)))

    def _use_points(self, points: Points) -> None:
        done: list[tuple[Cpu, DebugRequest]] = []
        try:
            for cpu in self.cpus:
                before = cpu.asked
                cpu.set_debug(points.request(cpu.index))
                done.append((cpu, before))
        except VmfsError:
            for cpu, before in done:
                cpu.set_debug(before)
            raise
        self._moved()
        self._points = points

    def set_trace(self, change: Callable[[TraceSettings], TraceSettings]) -> Future[None]:
        """Change what is traced, from the next boundary on. Unsupported where the engine cannot, and nothing has
        changed."""

        def make_it(cpu: Vcpu) -> None:
            settings = change(self.trace.settings)
            settings.check()
            for one in self.cpus:
                self._ask_trace(self.engine, self._machine, one.vcpu, settings, len(self.cpus))
            self.trace.apply(settings)

        return self.at_boundary(make_it)

    def _ask_trace(
        self, engine: Engine, machine: Machine, cpu: Vcpu, settings: TraceSettings, count: int
    ) -> None:
        """Of one of `count` CPUs."""
        if Capability.TRACE in machine.capabilities:
            coverage = self.trace.coverage if settings.counts else None  # a machine has none before
            cpu.set_trace(settings.request(coverage), self.trace.sink(cpu.index if count > 1 else None))
        else:
            settings.check_steps(engine.name)

    # ---- helpers

    def _is_reading(self, cpu: Cpu) -> bool:
        """Whether an `in` or a load waits for its data; with the lock held."""
        return getattr(cpu.last_exit, "direction", "") in ("in", "read") and bool(cpu.vcpu.access_data)

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


def _is_seen(exit_: exits.Exit) -> bool:
    """Of a CPU that was stopped because another one had ended the run: whether it came to something by itself."""
    return not isinstance(exit_, exits.Interrupted | exits.Limit)


def _state_after(exit_: exits.Exit) -> str:
    if isinstance(exit_, exits.Shutdown) and exit_.cause in GOES_ON:
        return "paused"  # it was reset, and can go on
    return {exits.Hlt: "halted", exits.Shutdown: "shutdown"}.get(type(exit_), "paused")


def _do(task: Callable[[Vcpu], T], cpu: Vcpu, future: Future[T]) -> None:
    try:
        future.set_result(task(cpu))
    except BaseException as error:
        future.set_exception(error)
