"""Travel: a machine with a history (`vmfs.machine.history`) goes to another place of its past, and looks for one.

It goes to the last checkpoint before a place, and does again what it did from there. To find the last stop before the
present, the parts between checkpoints are done again with its stops, the newest part first; the last one that stops
has it. All of that is a run of the machine, in the CPU's thread: who asked for it waits for an exit, and can end it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vmfs.debug.points import UNTIL
from vmfs.engine.base import NO_DEBUG, DebugRequest
from vmfs.machine.history import Checkpoint, History, is_same
from vmfs.machine.journey import Journey
from vmfs.machine.runloop import Bound, Run
from vmfs.words import exits
from vmfs.words.errors import Busy, EngineFailed
from vmfs.words.layouts import RIP, quad
from vmfs.words.stops import Breakpoint, Watchpoint

NEAR = 2_000_000  # instructions: a checkpoint is left that many before a place that was far from the last one
_WRITER = 1  # the id of its watchpoints


@dataclass(frozen=True, slots=True)
class Written:
    """What wrote some bytes last. `how`: an `instruction`, the delivery of an `event`, a device by `dma`, or a `client`
    of the machine. `place`: how many instructions were done before that; `rip`: where the CPU stood then."""

    how: str
    place: int
    rip: int
    cpu: int
    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class _Hit:
    """The stop that was the `number`th, from 0, in what comes after a checkpoint."""

    checkpoint: Checkpoint
    number: int
    place: int
    exit: exits.Debug


class _Ended(Exception):
    """The run is to end here."""

    def __init__(self, exit_: exits.Exit) -> None:
        super().__init__()
        self.exit = exit_


class Travel:
    """One journey, which `run` is for. In the CPU's thread, without the machine's lock."""

    def __init__(self, vm: Any, history: History, run: Run) -> None:
        self._vm = vm
        self._history = history
        self._run = run
        self._hits = 0
        self._came: exits.Exit | None = None  # what the last thing that was done again came to, if to anything
        self.written: Written | None = None

    def to_exit(self, journey: Journey) -> exits.Exit:
        """Go, and the exit that says where it is."""
        vm, history = self._vm, self._history
        history.at_begin = False
        with vm.lock:
            if journey.written and history.changed and history.in_past:
                raise Busy("writer: the machine was changed in its past: run it, which makes another future, or `goto`")
            if not history.checkpoints or (history.changed and not history.in_past):
                history.forget_future()
                history.begin_stretch(history.stretch.cpu)
            self._hold_inputs(True)
            history.is_travelling = True
            put_back = vm.set_aside()
            history.enter_past()
        try:
            return self._go(journey)
        except _Ended as ended:
            return ended.exit
        finally:
            with vm.lock:
                history.is_travelling = False
                put_back()
                vm.stay_in_run()
                history.arrive()
                self._hold_inputs(False)

    def _hold_inputs(self, holds: bool) -> None:
        """What comes from outside meanwhile comes when it is there."""
        board = self._vm.board
        if board is not None:
            with board.lock:
                board.inputs.hold_new(holds)

    def _go(self, journey: Journey) -> exits.Exit:
        history = self._history
        if journey.written:
            return self._find_writer(journey.written)
        if journey.place is not None:
            return self._go_to_count(journey.place)
        if journey.back is not None:
            return self._go_back(journey.back, journey.cpu)
        now = history.count(), history.took_event()
        hit = self._last_hit(journey, *now)
        if hit is None:
            return self._at_begin()
        if journey.before and hit.exit.cause in exits.STOPS_AFTER:
            self._go_to(hit.place - 1)
            return replace(hit.exit, rip=self._rip(hit.exit.cpu), also=())
        return self._land(hit, journey)

    # ---- to a place

    def _go_to_count(self, place: int) -> exits.Exit:
        history = self._history
        if place < history.begin:
            return self._at_begin()
        self._go_to(place, anew=True)
        came = self._come_again()
        goes_on = place > history.count() and not isinstance(came, exits.Shutdown)
        return came if came is not None and not (goes_on and came is self._came) else self._limit()

    def _come_again(self) -> exits.Exit | None:
        """The exit that the machine came to where it is now: the first one, and at the end of the record the last.
        After `_go_to` it is there without what came with no instruction done, which it does now."""
        history, place = self._history, self._history.count()
        came = self._came
        waiting = [one for one in history.stretch.exits.get(place, ()) if not is_same(one, came)]
        if not history.is_at_end():
            waiting = waiting[:1] if came is None else []
        for one in waiting:
            runner, _ = history.runner(history.stretch)
            again = self._vm.run_again(self._run, runner, Bound(instructions=1), lambda *_: False, lambda _: None)
            if self._run.stop_asked:
                raise _Ended(again)
            if not is_same(one, again) or history.count() != place:  # something came here before that since
                self._go_to(place, anew=True)
                return self._came
            came = again
        if came is None and history.is_at_end() and history.checkpoints[-1].place == place:
            return history.stretch.before
        return came

    def _go_back(self, count: int, cpu: int | None) -> exits.Exit:
        history = self._history
        now, after_event = history.count(), history.took_event()
        if cpu is None or len(self._vm.cpus) == 1:
            cpu, place = None, now - count + after_event
        else:
            found = self._place_of(cpu, history.counts()[cpu] - count)
            if found is None:
                return self._at_begin()
            place = found
        if place < history.begin:
            return self._at_begin()
        self._go_to(place)
        if history.count() != place:
            return self._at_begin()
        at = self._limit().cpu if cpu is None else cpu
        return exits.Debug(cause="step", rip=self._rip(at), cpu=at)

    def _place_of(self, cpu: int, done: int) -> int | None:
        """The last place at which that CPU has done so many instructions; None: it is before all."""
        history = self._history
        low, high = None, history.count()
        for one in history.checkpoints[: history.index() + 1]:
            if one.of_cpus[cpu] <= done:
                low = one.place
        if low is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            self._go_to(middle)
            if history.counts()[cpu] <= done:
                low = middle
            else:
                high = middle
        return low

    def _go_to(self, place: int, *, anew: bool = False) -> None:
        """To that place, which is not before the begin; at the end of the record, to the end itself. `anew`: by what
        led there, also where it is there already."""
        history = self._history
        end = history.checkpoints[-1].stretch.end
        assert end is not None
        wanted = min(place, end)
        if wanted == end:
            checkpoint = history.checkpoints[-1]
        else:
            checkpoint = history.checkpoints[0]
            for one in history.checkpoints:
                if one.place < wanted:
                    checkpoint = one
        here = history.count()
        is_on_the_way = history.stretch is checkpoint.stretch and checkpoint.place <= here <= wanted
        if history.changed or not is_on_the_way or (
            here == wanted and (anew or history.took_event() or wanted == end)
        ):
            self._restore(checkpoint)
            here = checkpoint.place
        if wanted - here > 2 * NEAR:
            self._replay(wanted - NEAR)
            with self._vm.lock:
                history.take()
        self._replay(wanted)

    def _at_begin(self) -> exits.Exit:
        self._restore(self._history.checkpoints[0])
        self._history.at_begin = True
        return self._limit()

    def _restore(self, checkpoint: Checkpoint) -> None:
        if self._run.stop_asked:
            raise _Ended(exits.Interrupted(rip=self._rip(0)))
        with self._vm.lock:
            self._history.go_to(checkpoint)
            self._vm.stay_in_run()

    def _rip(self, cpu: int) -> int:
        return quad(self._vm.cpus[cpu].vcpu.get_state("regs"), RIP)

    def _limit(self) -> exits.Exit:
        cpu = self._history.stretch.cpu
        if cpu is None:
            cpu = self._vm.cpu_in_turn()
        return exits.Limit(rip=self._rip(cpu), cpu=cpu)

    # ---- doing again

    def _replay(
        self,
        place: int,
        request: Callable[[int], DebugRequest] | None = None,
        stop_for: Callable[[exits.Debug], exits.Debug | None] = lambda exit_: None,
        *,
        step: bool = False,
    ) -> exits.Exit | None:
        """Go on in the stretch to that place; the stop on the way for which `stop_for` has said so, or None there."""
        vm, history = self._vm, self._history
        runner, cpus = history.runner(history.stretch)
        asks = request or (lambda cpu: NO_DEBUG)

        def prepare(bound: Bound, by_steps: bool) -> bool:
            with vm.lock:
                for cpu in cpus:
                    one = asks(cpu.index)
                    cpu.set_debug(replace(one, step=True) if step else one)
            return step

        self._came = None
        stuck, before = 0, (-1, -1)
        while (left := place - history.count()) > 0 or step:
            bound = Bound(steps=1) if step else Bound(instructions=left)
            exit_ = vm.run_again(self._run, runner, bound, prepare, stop_for)
            if isinstance(exit_, exits.Debug) and exit_.cause != "step":
                return exit_
            if self._run.stop_asked or isinstance(exit_, exits.Error):
                raise _Ended(exit_)
            if step:
                return None
            self._came = None if isinstance(exit_, exits.Limit | exits.Interrupted | exits.Debug) else exit_
            now = history.count(), vm.engine_time()
            stuck, before = stuck + 1 if now == before else 0, now
            if stuck > _STUCK_MOST:
                raise EngineFailed(f"history: what was done does not come again: it stays at {now[0]} of {place}")
        return None

    # ---- looking for stops

    def _stops(self, journey: Journey) -> Callable[[int], DebugRequest]:
        if journey.until is not None:
            only = DebugRequest(stops=(Breakpoint(UNTIL, journey.until),))
            return lambda cpu: only
        return self._vm.journey_points().request

    def _wanted(self, journey: Journey, reached: exits.Debug) -> exits.Debug | None:
        if journey.until is not None:
            return replace(reached, id=None, also=())
        return self._vm.wanted_of(reached)

    def _last_hit(self, journey: Journey, place: int, after_event: bool) -> _Hit | None:
        """The last stop before the place, or before what is after an event there."""
        history = self._history
        at = history.index()
        end, end_after_event = place, after_event
        while at >= 0:
            checkpoint = history.checkpoints[at]
            if checkpoint.place <= end:
                hit = self._hits_from(checkpoint, end, end_after_event, journey, place)
                if hit is not None:
                    return hit
            at = history.checkpoints.index(checkpoint) - 1  # some may have gone
            end, end_after_event = checkpoint.place, checkpoint.after_event
        return None

    def _hits_from(
        self, checkpoint: Checkpoint, end: int, after_event: bool, journey: Journey, now: int
    ) -> _Hit | None:
        self._restore(checkpoint)
        request = self._stops(journey)
        found: _Hit | None = None
        number = 0

        def note(reached: exits.Debug) -> None:
            nonlocal found, number
            wanted = self._wanted(journey, reached)
            if wanted is None:
                return
            place = self._history.count()
            before = journey.before and wanted.cause in exits.STOPS_AFTER
            if before or place < end or (place == end and after_event and not self._history.took_event()) or end < now:
                found = _Hit(checkpoint, number, place, wanted)
            number += 1

        self._replay(end, request, lambda reached: note(reached))
        while after_event and self._history.count() == end and not self._history.took_event():
            if self._replay(end, request, lambda reached: note(reached), step=True) is not None:
                break
        return found

    def _land(self, hit: _Hit, journey: Journey) -> exits.Exit:
        self._restore(hit.checkpoint)
        left = hit.number

        def arrive(reached: exits.Debug) -> exits.Debug | None:
            nonlocal left
            wanted = self._wanted(journey, reached)
            if wanted is not None:
                left -= 1
            return wanted if left < 0 else None

        request = self._stops(journey)
        exit_ = self._replay(hit.place, request, arrive)
        while exit_ is None and self._history.count() == hit.place:
            exit_ = self._replay(hit.place, request, arrive, step=True)
        if exit_ is None:
            raise EngineFailed("history: what was done does not come again: a stop is not where it was")
        return exit_

    # ---- who wrote

    def _find_writer(self, ranges: tuple[tuple[int, int], ...]) -> exits.Exit:
        """Sets `written`. The machine is where it was."""
        history = self._history
        now = history.count(), history.took_event()
        reads = any(vcpu.access_data for vcpu in self._vm.vcpus)
        self.written = self._last_writer(ranges, *now)
        self._go_to(now[0], anew=reads)
        if reads:
            self._come_again()
        while now[1] and history.count() == now[0] and not history.took_event():
            self._replay(now[0], step=True)
        return self._limit()

    def _last_writer(self, ranges: tuple[tuple[int, int], ...], place: int, after_event: bool) -> Written | None:
        history = self._history
        stops = tuple(Watchpoint(_WRITER, at, length, False, True, physical=True) for at, length in ranges)
        request = DebugRequest(stops=stops)
        wanted, end = self._value(ranges), place
        at = history.index()
        while at >= 0:
            checkpoint = history.checkpoints[at]
            self._restore(checkpoint)
            first, last = self._value(ranges), None

            def note(reached: exits.Debug) -> None:
                nonlocal last
                last = history.count(), history.took_event(), reached.cpu, self._value(ranges)

            self._replay(end, lambda cpu: request, note)
            while after_event and history.count() == end and not history.took_event():
                if self._replay(end, lambda cpu: request, note, step=True) is not None:
                    break
            there = self._value(ranges)
            if there != wanted:
                return Written("client", end, self._rip(0), 0, there, wanted)
            if last is not None and last[3] == there:
                return self._by_instruction(ranges, *last)
            if there != (first if last is None else last[3]):
                return self._by_device(ranges, checkpoint.place if last is None else last[0], end, there)
            at = history.checkpoints.index(checkpoint) - 1
            wanted, end, after_event = first, checkpoint.place, checkpoint.after_event
        return None

    def _value(self, ranges: tuple[tuple[int, int], ...]) -> bytes:
        return b"".join(self._vm.memory.read(at, length) for at, length in ranges)

    def _by_instruction(
        self, ranges: tuple[tuple[int, int], ...], place: int, by_event: bool, cpu: int, new: bytes
    ) -> Written:
        before = place if by_event else place - 1
        self._go_to(before)
        how = "event" if by_event else "instruction"
        return Written(how, before, self._rip(cpu), cpu, self._value(ranges), new)

    def _by_device(self, ranges: tuple[tuple[int, int], ...], low: int, high: int, new: bytes) -> Written:
        """No instruction wrote what is there at `high`: when it came."""
        while high - low > 1:
            middle = (low + high) // 2
            self._go_to(middle)
            if self._value(ranges) == new:
                high = middle
            else:
                low = middle
        self._go_to(low)
        at = self._limit()
        return Written("dma", low, at.rip, at.cpu, self._value(ranges), new)


_STUCK_MOST = 3  # times that nothing is executed and no time passes
