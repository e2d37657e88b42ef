"""A CPU of a machine, as it was made and is asked to stop; and the thread that CPUs run in."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from vmfs.engine.base import NO_DEBUG, DebugRequest, Vcpu
from vmfs.machine._lane import A_LINE, SETTLED, Lane
from vmfs.machine.state import Owner, reset_cpu, reset_values
from vmfs.words import exits
from vmfs.words.errors import LimitReached

T = TypeVar("T")


class Cpu:
    """An engine's CPU, which is new."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.index = vcpu.index
        self.last_exit: exits.Exit | None = None  # that callers saw
        self.reset_states = reset_values(vcpu, Owner.CPU)
        self._made_cpuid = vcpu.get_state("cpuid")
        self.asked = NO_DEBUG  # what the engine was last asked to stop for

    @property
    def has_its_cpuid(self) -> bool:
        """Whether it has the CPUID that the engine has made it with."""
        return self.vcpu.get_state("cpuid") == self._made_cpuid

    def set_debug(self, request: DebugRequest) -> None:
        if request is not self.asked and request != self.asked:
            self.vcpu.set_debug(request)
            self.asked = request

    def set_back(self) -> None:
        """Be as in a new machine. After the machine's own rows."""
        self.vcpu.clear_kick()
        reset_cpu(self.vcpu, self.reset_states)


class CpuView:
    """A machine (`vmfs.machine.machine.Vm`) with one of its CPUs in the place of the first."""

    def __init__(self, vm: Any, index: int) -> None:
        self._vm = vm
        self.index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vm, name)

    @property
    def cpu(self) -> Cpu:
        return self._vm.cpus[self.index]

    def at_boundary(self, task: Callable[[Vcpu], T]) -> Future[T]:
        return self._vm.at_boundary(task, self.index)

    def change(self, task: Callable[[Vcpu], T], then: str = "paused") -> T:
        return self._vm.change(task, then, self.index)

    def publish(self, name: str, data: bytes, still: object | None) -> None:
        """The lane has the first CPU's."""
        if not self.index:
            self._vm.publish(name, data, still)

    def cpu_state(self) -> Future[str]:
        return self._vm.cpu_state(self.index)

    def cpu_counters(self) -> dict[str, int]:
        return self._vm.cpu_counters(self.index)


Job = Callable[[], None]


class CpuThread:
    """A thread for parts of runs: begun with the first of them.

    A job does its part to the end; `adopted()` is that of the run that the lane has begun and Python ends.
    """

    def __init__(self, name: str, adopted: Callable[[], Job]) -> None:
        self._name = name
        self._adopted = adopted
        self._lane: Lane | None = None
        self._take_line: Callable[[int, bytes], None] = lambda number, line: None
        # None: the end. "look": there is a lane now.
        self._work: queue.SimpleQueue[Job | Literal["look"] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._has_begun = threading.Event()

    @property
    def is_there(self) -> bool:
        """Whether the thread was begun: a machine that came as a value has run, perhaps, and has none yet."""
        return self._thread is not None

    def attach_lane(self, lane: Lane, take_line: Callable[[int, bytes], None]) -> None:
        """Serve that lane, too; with the machine's lock held. `take_line` is called with what is Python's to do, and
        does not wait for it."""
        self._lane, self._take_line = lane, take_line
        if self._thread is not None:
            self._work.put("look")

    def put(self, job: Job) -> bool:
        """Have it do `job`; with the machine's lock held. True: `begin` comes next, without the lock."""
        self._give(job)
        if self._thread is not None:
            return False
        self._has_begun.clear()
        self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
        return True

    def begin(self, undo: Callable[[], None]) -> None:
        """After `put`, and without the machine's lock, so that the new thread need not wait for this one. LimitReached
        where there is no room for a thread, once `undo` was called."""
        assert self._thread is not None
        try:
            self._thread.start()
        except RuntimeError as error:
            undo()
            raise LimitReached(f"the CPU has no thread: {error}") from error
        finally:
            self._has_begun.set()

    def forget(self) -> None:
        """There is no thread after all; with the machine's lock held."""
        self._thread = None
        self._work.get()

    def end(self) -> None:
        """Returns when it has ended. Nothing is put in any more."""
        thread = self._thread
        if thread is not None:
            self._has_begun.wait()  # else it could not be joined
            if thread.ident is not None:
                self._give(None)
                thread.join()

    def _give(self, job: Job | None) -> None:
        self._work.put(job)
        if self._lane is not None:
            self._lane.call()

    def _main(self) -> None:
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Job | None:
        """The next job. The lane is served while there is none."""
        while True:
            if self._lane is None:
                work = self._work.get()
            else:
                try:
                    work = self._work.get_nowait()
                except queue.Empty:
                    served = self._lane.serve()
                    if served == SETTLED:
                        continue
                    if served == A_LINE:
                        self._take_line(*self._lane.line())
                        continue
                    return self._adopted()
            if work != "look":
                return work
