"""Hooks of a library's machine: what is done where it comes by, and how a run of each engine does it."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vmfs.engine.base import Capability, DebugRequest, Vcpu
from vmfs.words import exits
from vmfs.words.errors import Busy, Invalid, Unsupported
from vmfs.words.exits import Exit
from vmfs.words.layouts import GENERAL, RIP, put_quad, quad
from vmfs.words.modes import CodeMode
from vmfs.words.stops import Breakpoint, Stop, VectorStop, Watchpoint

Machine = Any  # of vmfs.library.machine, which imports this
CODE, BLOCK, MEMORY = "code", "block", "memory"
UNTIL, VECTORS, FIRST = 0, 1, 2  # ids of stops: of `run(until=)`, of exceptions, of the first hook
REACH = 1 << 39  # addresses that hooks can be at
_PIECE = 0xFFFF_F000  # bytes of one stop


@dataclass(eq=False)
class Hook:
    """What is done at `begin` to `end`, which is the address after the last. `hits` counts how often it came by."""

    machine: Machine
    id: int
    kind: str
    call: Callable[..., Any] | None
    begin: int
    end: int
    stop: bool
    on_read: bool = False
    on_write: bool = False
    _hits: int = field(default=0, repr=False)

    @property
    def hits(self) -> int:
        return self.machine._driver.hits(self)

    def remove(self) -> None:
        self.machine._remove_hook(self)

    def pieces(self) -> list[tuple[int, int]]:
        return [(at, min(_PIECE, self.end - at)) for at in range(self.begin, self.end, _PIECE)]


class Driver:
    """How a CPU of any engine runs with hooks, by the contract of engines alone. `run` gives None where the hooks are
    to be set anew: then `set` is called, and it goes on."""

    def __init__(self, vcpu: Vcpu, capabilities: frozenset[Capability]) -> None:
        self._vcpu = vcpu
        self._capabilities = capabilities
        self._hooks: tuple[Hook, ...] = ()
        self._leave = False
        self.inside = False
        self._watched: dict[int, Hook] = {}
        self._stops: tuple[Stop, ...] = ()
        self._steps = False  # a hook is of several addresses, and single steps find where it is
        self._stopped = -1  # where a hook has ended a run: it is not called again where the next one begins
        self.counts = Capability.BUDGET in capabilities

    # ---- registers, by their numbers in instructions

    ip = 17
    order = tuple(8 * GENERAL.index(name) for name in "rax rcx rdx rbx rsp rbp rsi rdi".split()) + tuple(
        8 * GENERAL.index(f"r{number}") for number in range(8, 16)
    )

    def get_register(self, number: int) -> int:
        return quad(self._vcpu.get_state("regs"), RIP if number == self.ip else self.order[number])

    def set_register(self, number: int, value: int) -> None:
        self._vcpu.complete()
        regs = bytearray(self._vcpu.get_state("regs"))
        put_quad(regs, RIP if number == self.ip else self.order[number], value)
        self._vcpu.set_state("regs", bytes(regs))

    def instructions(self) -> int:
        return self._vcpu.counters()["instructions"]

    # ---- hooks

    def hits(self, hook: Hook) -> int:
        return hook._hits

    def set(self, hooks: tuple[Hook, ...], until: int | None, vectors: tuple[int, ...]) -> None:
        """Unsupported where the engine cannot watch for them."""
        stops: list[Stop] = []
        step = False
        for hook in hooks:
            if hook.kind == MEMORY:
                stops.append(Watchpoint(hook.id, hook.begin, hook.end - hook.begin, hook.on_read, hook.on_write))
            elif hook.end - hook.begin == 1:
                stops.append(Breakpoint(hook.id, hook.begin))
            else:
                step = True
        if until is not None:
            stops.append(Breakpoint(UNTIL, until))
        if vectors and Capability.BREAKPOINTS_UNLIMITED in self._capabilities:
            stops.append(VectorStop(VECTORS, vectors))
        self._vcpu.set_debug(DebugRequest(step, tuple(stops)))
        self._hooks, self._steps, self._stops = hooks, step, tuple(stops)
        self._watched = {hook.id: hook for hook in hooks}

    def leave(self) -> None:
        self._leave = True

    def run(self, machine: Machine, budget: int, seconds: float, passes: bool) -> Exit | None:
        if self.inside:
            raise Busy("a hook cannot run the machine that it is of")
        self.inside, self._leave = True, False
        deadline = None if seconds < 0 else time.monotonic() + seconds
        timer = None if seconds < 0 else threading.Timer(seconds, self._vcpu.kick)
        if timer is not None:
            timer.start()
        try:
            return self._run(machine, budget, deadline, passes)
        finally:
            self.inside = False
            if not self._steps:
                self._vcpu.set_debug(DebugRequest(False, self._stops))
            if timer is not None:
                timer.cancel()
                self._vcpu.clear_kick()

    def _run(self, machine: Machine, budget: int, deadline: float | None, passes: bool) -> Exit | None:
        vcpu, place = self._vcpu, self._code_address()
        single = self._steps or (budget >= 0 and not self.counts)
        if single:
            vcpu.set_debug(DebugRequest(True, self._stops))
        if passes and budget and place != self._stopped:
            for hook in self._hooks:
                if hook.kind != MEMORY and hook.begin <= place < hook.end and self._reach(machine, hook, place):
                    return self._at_hook(hook)
            if self._leave:
                return None
        self._stopped = -1
        while budget:
            budget -= single and budget > 0
            before = place, self._length(machine, place) if self._steps else 0
            exit_ = vcpu.run(budget if self.counts and budget >= 0 and not single else None, goes_on=not passes)
            passes = False
            if isinstance(exit_, exits.Interrupted) and deadline is not None and time.monotonic() >= deadline:
                return exits.Limit(rip=exit_.rip)
            if not isinstance(exit_, exits.Debug) or exit_.cause in ("exception", "interrupt"):
                return exit_
            if single:
                place = self._code_address()
            is_end = single and machine.rip == machine._until or any(
                one.cause == "breakpoint" and one.id == UNTIL for one in (exit_, *exit_.also)
            )  # before this instruction: its hooks are not called
            if self._steps and not is_end:
                for hook in self._hooks:
                    if hook.kind == MEMORY or not hook.begin <= place < hook.end or hook.end - hook.begin == 1:
                        continue
                    if hook.kind == BLOCK and place == sum(before):
                        continue
                    if self._reach(machine, hook, place):
                        return self._at_hook(hook)
            for one in (exit_, *exit_.also):
                if one.cause == "step":
                    if machine.rip == machine._until:
                        return exits.Debug(cause="breakpoint", id=UNTIL, rip=exit_.rip)
                    continue
                hook = self._watched.get(-1 if one.id is None else one.id)
                if hook is None:
                    return one
                if is_end and hook.kind != MEMORY:
                    continue
                if self._reach(machine, hook, one.addr or 0):
                    return self._at_hook(hook) if hook.kind != MEMORY else exit_
            if self._leave:
                return None
        return exits.Limit(rip=machine.rip)

    def _at_hook(self, hook: Hook) -> Exit:
        self._stopped = self._code_address()
        return exits.Debug(cause="breakpoint", id=hook.id, rip=quad(self._vcpu.get_state("regs"), RIP))

    def _length(self, machine: Machine, place: int) -> int:
        found = machine.disasm(place)
        return len(found[0][1]) if found else 0

    def _code_address(self) -> int:
        return CodeMode.of(self._vcpu.get_state("regs"), self._vcpu.get_state("sregs")).address

    def _reach(self, machine: Machine, hook: Hook, address: int) -> bool:
        hook._hits += 1
        if hook.call is None:
            return hook.stop
        if hook.kind == MEMORY:
            size = hook.end - hook.begin
            value = int.from_bytes(machine.mem.read(hook.begin, size), "little")
            result = hook.call(machine, hook.on_write, address or hook.begin, size, value)
        else:
            result = hook.call(machine, self._code_address())
        return bool(result) or hook.stop


class CoreDriver(Driver):
    """Of the emulator: its core calls the hooks."""

    def __init__(self, vcpu: Any, capabilities: frozenset[Capability]) -> None:
        from vmfs.engine.emulator import _core

        super().__init__(vcpu, capabilities)
        core = vcpu.core
        self._core, self._makers = core, vcpu.makers
        self._names: Any = _core
        self.get_register, self.set_register = core.get_register, core.set_register  # type: ignore[method-assign]
        self._run_hooked = core.run_hooked
        self.leave = core.leave_hooks  # type: ignore[method-assign]

    def hits(self, hook: Hook) -> int:
        return self._core.hook_hits().get(hook.id, hook._hits)

    def set(self, hooks: tuple[Hook, ...], until: int | None, vectors: tuple[int, ...]) -> None:
        names = self._names
        kinds = {CODE: names.HOOK_CODE, BLOCK: names.HOOK_BLOCK, MEMORY: names.HOOK_MEMORY}
        stops = list(_vector_stops(names.STOP_VECTOR, vectors))
        if until is not None:
            stops.append((names.STOP_BREAKPOINT, UNTIL, until, 0, False, False))
        for hook in hooks:
            for at, length in hook.pieces():
                if hook.kind == MEMORY:
                    stops.append((names.STOP_WATCH, hook.id, at, length, hook.on_read, hook.on_write))
                else:
                    stops.append((names.STOP_BREAKPOINT, hook.id, at, length, False, False))
        self._core.set_hooks(
            [(hook.id, kinds[hook.kind], hook.call, hook.stop, hook.begin, hook.end) for hook in hooks]
        )
        self._core.set_debug(False, stops)

    def instructions(self) -> int:
        return self._core.instructions

    def run(self, machine: Machine, budget: int, seconds: float, passes: bool) -> Exit | None:
        if self.inside:
            raise Busy("a hook cannot run the machine that it is of")
        self.inside = True
        try:
            found = self._run_hooked(machine, budget, seconds, passes)
        finally:
            self.inside = False
        if found is None:
            return None
        return self._makers[found[0]](self._vcpu, found, self._core.access_data if found[2] else b"")


@functools.lru_cache(maxsize=8)
def _vector_stops(kind: int, vectors: tuple[int, ...]) -> tuple[tuple[int, int, int, int, bool, bool], ...]:
    return tuple((kind, VECTORS, vector, 0, False, False) for vector in vectors)


def check_range(begin: int, end: int | None) -> tuple[int, int]:
    end = REACH if end is None else end
    if not 0 <= begin < end <= REACH:
        raise Invalid(f"a hook is from an address to a later one, up to {REACH:#x}: not {begin:#x} to {end:#x}")
    return begin, end


def check_engine(capabilities: frozenset[Capability], what: str) -> None:
    if Capability.TRACE not in capabilities:
        raise Unsupported(f"{what}: the emulator has it, and this engine not")
