"""A CPU of a machine, as it was made and is asked to stop; and the thread that CPUs run in."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Literal

from vmfs.engine.base import NO_DEBUG, DebugRequest, Vcpu
from vmfs.machine._lane import Lane
from vmfs.machine.runloop import Run
from vmfs.machine.state import Owner, reset_cpu, reset_values
from vmfs.words.errors import LimitReached


class Cpu:
    """An engine's CPU, which is new."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
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


class CpuThread:
    """A thread for runs: begun with the first of them.

    `serve(run, by_lane)` does a run to its end; `adopted()` is the one that the lane has begun and Python ends.
    """

    def __init__(self, name: str, serve: Callable[[Run, bool], None], adopted: Callable[[], Run]) -> None:
        self._name = name
        self._serve = serve
        self._adopted = adopted
        self._lane: Lane | None = None
        # None: the end. "look": there is a lane now.
        self._work: queue.SimpleQueue[Run | Literal["look"] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._has_begun = threading.Event()

    def attach_lane(self, lane: Lane) -> None:
        """Serve that lane, too; with the machine's lock held."""
        self._lane = lane
        if self._thread is not None:
            self._work.put("look")

    def put(self, run: Run) -> bool:
        """Have it serve `run`; with the machine's lock held. True: `begin` comes next, without the lock."""
        self._give(run)
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

    def _give(self, run: Run | None) -> None:
        self._work.put(run)
        if self._lane is not None:
            self._lane.call()

    def _main(self) -> None:
        while True:
            run, by_lane = self._next()
            if run is None:
                return
            self._serve(run, by_lane)

    def _next(self) -> tuple[Run | None, bool]:
        """The next run, and whether the lane has begun it, which is served while there is no other."""
        while True:
            if self._lane is None:
                work = self._work.get()
            else:
                try:
                    work = self._work.get_nowait()
                except queue.Empty:
                    if not self._lane.serve():
                        continue
                    return self._adopted(), True
            if work != "look":
                return work, False
