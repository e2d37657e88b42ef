"""A run: its bound, and the way from its begin to the exit that its caller sees, of a CPU or of several in one thread.

An engine runs a guest in slices, each of which ends with an exit. Many of these are nobody's to see: an access that
the board answers, a stop whose condition is false, a kick for a task at a boundary, the step that a trace wants.
`RunLoop` goes on after them, and counts down what the run is bound by. It knows a CPU, a board and a trace; what
is the machine's to decide (`vmfs.machine.control.Control`, which has the lock) it asks by the functions of `Asked`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from vmfs.debug.trace import Trace
from vmfs.devices.board import Board
from vmfs.engine.base import Capability, Runner, Vcpu
from vmfs.machine.journey import Journey
from vmfs.words import exits
from vmfs.words.layouts import RIP, quad


@dataclass(frozen=True, slots=True)
class Bound:
    """When a run ends at the latest; the default is never."""

    steps: int | None = None  # ends with Debug(cause="step")
    instructions: int | None = None  # ends with Limit
    until: int | None = None  # a linear address; ends with Debug(cause="breakpoint")
    seconds: float | None = None  # ends with Limit
    within: tuple[int, int] | None = None  # with `steps`: steps again while rip is from the first on, below the second
    cpu: int | None = None  # the one that runs while the others stand still
    journey: Journey | None = None  # through the machine's past, in place of all of that


    @property
    def looks_only(self) -> bool:
        """The machine is where it was afterwards, and nobody is to see an exit."""
        return self.journey is not None and bool(self.journey.written)


UNBOUND, NOTHING = Bound(), Bound(instructions=0)


class Run(Future):  # type: ignore[type-arg]
    """A run under way. Its result is the `Exit`, its exception a VmfsError. Callbacks: in the CPU's thread."""

    def __init__(self, bound: Bound) -> None:
        super().__init__()
        self.bound = bound
        self.stop_asked = False
        self.expired = False
        self.has_ended = False  # one of its CPUs came to the exit that ends it
        self.state_before = ""  # of the machine
        self.travel: Any = None  # of a journey (`vmfs.machine.travel.Travel`)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a run asks of its machine, in the CPU's thread. Without the machine's lock, which they take if need be."""

    # Tell the engine what to stop for. The flag: the bound is counted in steps. True when the user wants each step.
    prepare: Callable[[Bound, bool], bool]
    # The stop that the caller is to see of those that the CPU came to at once; None: the run goes on.
    stop_for: Callable[[exits.Debug], exits.Debug | None]
    # Do what waits for a boundary.
    do_tasks: Callable[[], None]
    # Whether the user wants each step now.
    wants_steps: Callable[[], bool]
    # How many instructions are left of what the machine does again; None: what it does is new. And what goes on to what
    # comes after them; False: there is an exit before that.
    left: Callable[[], int | None] = lambda: None
    pass_end: Callable[[], bool] = lambda: True


class RunLoop:
    """One run of a CPU, or of all in turn, in its thread. `cpus` are all of the machine."""

    def __init__(
        self,
        run: Run,
        runner: Runner,
        cpus: Sequence[Vcpu],
        capabilities: frozenset[Capability],
        board: Board | None,
        trace: Trace,
        asked: Asked,
        bound: Bound | None = None,
    ) -> None:
        """`bound`: in place of the run's."""
        self._run = run
        self._bound = run.bound if bound is None else bound
        self._runner = runner
        self._cpus = cpus
        self._capabilities = capabilities
        self._board = board
        self._trace = trace
        self._asked = asked

    def to_exit(self, first: exits.Exit | None = None, *, goes_on: bool = False) -> exits.Exit:
        """Run until an exit that is the caller's to see. `first`: it was begun already, and came to that. `goes_on`: as
        a part of the run before."""
        bound = self._bound
        if bound.instructions == 0:  # `Vm.load`
            return exits.Limit(rip=quad(self._cpus[0].get_state("regs"), RIP))
        if self._board is None:
            return self._to_exit(first, goes_on)
        self._board.begin()
        try:
            return self._to_exit(first, goes_on)
        finally:
            self._board.end()

    def _to_exit(self, first: exits.Exit | None, goes_on: bool) -> exits.Exit:
        bound = self._bound
        exit_ = self._slices(goes_on=goes_on, first=first)
        if bound.within is not None:
            first, end = bound.within
            while _is_step(exit_) and first <= exit_.rip < end and not self._asked.wants_steps():
                exit_ = self._slices(goes_on=True)
        return exit_

    def _slices(self, goes_on: bool, first: exits.Exit | None = None) -> exits.Exit:
        """Slice by slice until an exit that is not only the engine's, or until the bound is reached."""
        run, runner, board = self._run, self._runner, self._board
        left = _Countdown(self._bound, runner, exact=Capability.BUDGET in self._capabilities)
        if board is not None:
            board.call_due()  # what became due while nothing ran
        while True:
            stepping = self._asked.prepare(self._bound, left.by_steps)
            budget, again = left.budget, self._asked.left()
            if again is not None:
                if not again and self._asked.pass_end():
                    continue
                again = again or 1  # for what comes with no instruction done
                budget = again if budget is None else min(budget, again)
            exit_, first = first or self._slice(budget, goes_on), None
            goes_on = True
            if isinstance(exit_, exits.Limit):  # the budget is used up, or the CPU sleeps
                if left.is_bounded and (again is None or left.is_used_up()):
                    return self._bound_reached(exit_)
                if stepping and again is None:
                    return exits.Debug(cause="step", rip=exit_.rip, cpu=exit_.cpu)
            if isinstance(exit_, exits.Interrupted | exits.Limit):
                if board is not None:
                    board.call_due()
                self._asked.do_tasks()
                if run.stop_asked or run.has_ended:
                    return exits.Interrupted(rip=exit_.rip, cpu=exit_.cpu)
                if run.expired:
                    return exits.Limit(rip=exit_.rip, cpu=exit_.cpu)
                if left.is_used_up():
                    return self._bound_reached(exit_)
            elif board is not None and isinstance(exit_, exits.Io | exits.Mmio):
                ended = board.access(exit_, self._cpus[exit_.cpu])
                if ended is not None:
                    self._trace.exit(ended, self._cpus)
                    return ended
                is_done = exit_.direction in ("out", "write")  # a read is, when the next run has completed it
                if left.count(is_done, is_done):
                    return self._bound_reached(exit_)
                if stepping and is_done and not runner.exits_waiting:
                    return exits.Debug(cause="step", rip=exit_.rip, cpu=exit_.cpu)
            elif isinstance(exit_, exits.Debug) and exit_.cause != "step":
                stop = self._asked.stop_for(exit_)
                if stop is not None:
                    return stop
                is_done = exit_.cause in exits.STOPS_AFTER
                if left.count(is_done, True):
                    return self._bound_reached(exit_)
                if stepping and is_done:
                    return exits.Debug(cause="step", rip=exit_.rip, cpu=exit_.cpu)
            elif _is_step(exit_):
                if stepping:
                    return exit_
                if left.count_step():
                    return self._bound_reached(exit_)
                # else the trace wanted it, or there are more to count
            else:
                return exit_

    def _slice(self, budget: int | None, goes_on: bool) -> exits.Exit:
        if self._trace.on:
            return self._trace.run(self._runner, self._cpus, self._capabilities, budget, goes_on)
        return self._runner.run(budget=budget, goes_on=goes_on)

    def _bound_reached(self, at: exits.Exit) -> exits.Exit:
        if self._bound.steps is not None:
            return exits.Debug(cause="step", rip=at.rip, cpu=at.cpu)
        return exits.Limit(rip=at.rip, cpu=at.cpu)


class _Countdown:
    """What is left of a bound of steps or instructions; without one, nothing counts.

    An engine with a budget counts exactly. With another each instruction is a step, and one that ends with an access
    or a stop after it has no step of its own: that exit counts for it, however many it has.
    """

    def __init__(self, bound: Bound, cpu: Runner, *, exact: bool) -> None:
        left = bound.steps if bound.steps is not None else bound.instructions
        self.is_bounded = left is not None
        self.by_steps = self.is_bounded and not exact
        self._left = left or 0
        self._is_exact = self.is_bounded and exact
        self._cpu = cpu
        self._done = self._instructions() if self._is_exact else 0
        # Whether the next exit is of an instruction that is counted already.
        self._is_counted = self.is_bounded and cpu.exits_waiting

    @property
    def budget(self) -> int | None:
        """For `Vcpu.run`."""
        return self._left if self._is_exact else None

    def is_used_up(self) -> bool:
        """After a slice of which only the engine knows what it has done."""
        if not self._is_exact:
            return False
        done = self._instructions()
        self._left, self._done = max(self._left - (done - self._done), 0), done
        return not self._left

    def count(self, is_done: bool, may_have_more: bool) -> bool:
        """After an exit of an instruction, which `is_done` or not; whether the bound is used up."""
        if not self.is_bounded:
            return False
        if self._is_exact:
            self.is_used_up()
        else:
            self._left -= is_done and not self._is_counted
            self._is_counted = may_have_more and self._cpu.exits_waiting
        return not self._left and not self._cpu.exits_waiting

    def count_step(self) -> bool:
        """After a step; whether the bound is used up."""
        if not self.by_steps:
            return False
        self._left -= 1
        return not self._left

    def _instructions(self) -> int:
        return self._cpu.counters()["instructions"]


def _is_step(exit_: exits.Exit) -> bool:
    return isinstance(exit_, exits.Debug) and exit_.cause == "step"
