"""Recorded: what a machine does for its history (`vmfs.machine.history`) and for journeys through it, for nobody else.

`Control` is how it runs, `Vm` what it is made of; of both, this is all that the past needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from vmfs.debug.conditions import CpuLooker
from vmfs.debug.points import Points
from vmfs.debug.trace import Trace
from vmfs.engine.base import NO_DEBUG, NO_TRACE, Runner
from vmfs.engine.rest import TURNS, Time
from vmfs.machine.control import Control
from vmfs.machine.runloop import Asked, Bound, Run, RunLoop
from vmfs.machine.state import Parts, Seen, put
from vmfs.words import exits

_NO_TRACE = Trace()


class Recorded(Control):
    """With the lock held, unless it says otherwise."""

    def _set_time(self, source: str) -> None:
        raise NotImplementedError

    def save_seen(self) -> Seen:
        raise NotImplementedError

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """What all that is mutable is guarded by."""
        return self._lock

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """With the lock; Busy during a run. Without the lock before."""
        with self._lock:
            self._check_idle()
            yield

    @property
    def is_in_run(self) -> bool:
        """Without the lock, too."""
        return self._run is not None

    # ---- on and off

    def begin_repeating(self, *, from_host: bool) -> None:
        """Do the same again whenever it is put back, from now on. `from_host`: its time was the host's."""
        if from_host:
            self._set_time("instructions")
        self._machine.set_repeatable(True)
        self._set_still(object())

    def end_repeating(self, *, to_host: bool) -> None:
        self._machine.set_paced(False)
        self._machine.set_repeatable(False)
        if to_host:
            self._set_time("host")
        self._set_still(object())

    def set_paced(self, is_paced: bool) -> None:
        """Sleep for as long as the host's clock takes, or not at all."""
        self._machine.set_paced(is_paced)

    # ---- places

    def put_in_past(self, parts: Parts, put_memory: Callable[[], None]) -> None:
        """Be what `parts` say. Who looks at the machine does not go back: neither what they have seen, nor the run."""
        state, news = self._state, self._exit_news
        put(self, replace(parts, seen=self.save_seen()), put_memory)
        self._state, self._exit_news = state, news

    def stay_in_run(self) -> None:
        """The run that a journey is goes on, whatever the machine was where it has come to."""
        self._state = "running"

    def in_turn(self) -> Runner:
        """All CPUs, in one thread."""
        if len(self.cpus) == 1:
            return self.cpu.vcpu
        runner = self._machine.in_turn(self._vcpus)
        assert runner is not None
        return runner

    @property
    def noted_exit(self) -> exits.Exit | None:
        """The last one that callers saw."""
        return self._last_exit

    def cpu_in_turn(self) -> int:
        """The one that executes next, or goes on."""
        return TURNS.unpack(self._machine.get_state("turns"))[0] if len(self.cpus) > 1 else 0

    def engine_time(self) -> int:
        return Time.unpack(self._machine.get_state("time")).now

    # ---- what is done again: in the CPU's thread, without the lock

    def set_aside(self) -> Callable[[], None]:
        """Have no trace, and points that may be changed, with the lock; what puts back how it was, with it, too."""
        points, is_traced = self._points, self.trace.on
        if is_traced:
            for vcpu in self._vcpus:
                vcpu.set_trace(NO_TRACE, lambda *_: None)

        def put_back() -> None:
            self._points = points
            for cpu in self.cpus:
                cpu.set_debug(NO_DEBUG)
                if is_traced:
                    self._ask_trace(self.engine, self._machine, cpu.vcpu, self.trace.settings, len(self.cpus))

        return put_back

    def journey_points(self) -> Points:
        """Those of the user, without single steps, to be asked `wanted_of` about."""
        points = self._points.copy()
        points.set_stepping(False)
        self._points = points
        return points

    def wanted_of(self, reached: exits.Debug) -> exits.Debug | None:
        """The stop of those that a CPU came to at once that the user wants."""
        stops = {stop.id: stop for stop in (*reversed(reached.also), reached) if stop.id is not None}
        with self._lock:
            ids = self._points.reached(sorted(stops), CpuLooker(self.cpus[reached.cpu].vcpu, self.memory.read))
        return replace(stops[ids[0]], also=()) if ids else None

    def run_again(
        self,
        run: Run,
        runner: Runner,
        bound: Bound,
        prepare: Callable[[Bound, bool], bool],
        stop_for: Callable[[exits.Debug], exits.Debug | None],
    ) -> exits.Exit:
        """A part of what was done, as a part of `run`; nobody sees it in a trace."""
        asked = Asked(prepare, stop_for, self._do_tasks_now, lambda: False)
        loop = RunLoop(run, runner, self._vcpus, self.capabilities, self.board, _NO_TRACE, asked, bound)
        return loop.to_exit(goes_on=True)
