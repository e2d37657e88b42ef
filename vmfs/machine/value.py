"""Value: a machine as `vmfs.machine.state` has it: what of it goes into a state, is checked against one, and is set.

What is got and set of the engine and of devices is theirs; this is what a machine has beside them: how it is set up,
what its callers have seen, which memories it has.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Literal, cast

import msgspec

from vmfs.devices.medium import Removable
from vmfs.devices.virtio.disk import Disk, Overlay
from vmfs.engine.base import Capability, Machine, Vcpu
from vmfs.machine.images import Images
from vmfs.machine.pages import Pages
from vmfs.machine.past import Rom
from vmfs.machine.state import Attached, Seen, Setup, Source, State, put, setup_of, state_hash, take
from vmfs.words import exits
from vmfs.words.errors import Busy, Invalid
from vmfs.words.layouts import unpack_msrs


class Value(Pages):
    machine_name: str
    images: Images
    _rom: Rom | None
    _attached: dict[str, Attached]  # by name, what `Vm.attach` has put in
    _boot_due: bool
    _sleeps: bool  # so that what is due is to wake
    _has_run: bool  # RAM's size and the devices are fixed then; a run that could not boot is none

    def take(self) -> Future[State]:
        """What it is, without its memory: now, or between two instructions of the run under way."""
        return self.at_boundary(lambda _: take(self))

    def put(self, state: State) -> None:
        """Be what `state` says; its memory is that of the state already. Whole or not at all. Busy during a run."""
        with self._lock:
            self._check_idle()
            put(self, state)
            self._changed()
            self._set_still(object())
        self.tell()

    def state_hash(self) -> bytes:
        """See `vmfs.machine.state.state_hash`. Busy during a run."""
        with self._lock:
            self._check_idle()
            return state_hash(self)

    @property
    def engine_machine(self) -> Machine:
        return self._machine

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        return tuple(cpu.vcpu for cpu in self.cpus)

    def save_setup(self) -> Setup:
        return Setup(
            machine=self.machine_name,
            engine=self.engine.name,
            time_source=cast(Literal["host", "instructions"], self.time_source),
            memory=self.memory.size,
            cpus=len(self.vcpus),
            has_run=self._has_run,
            boot_due=self._boot_due,
            sleeps=self._sleeps,
            is_shut_down=self._state == "shutdown",
            is_halted=self._state == "halted",
            cmdline=os.fsencode(self.images.cmdline),
            images=self.images.sizes(),
            rom=None if self._rom is None else (self._rom.address, self._rom.kept.size),
            attached=self._present(),
            new_msrs=self.cpu.reset_states["msrs"],
            held=tuple(exit_.line() for exit_ in self._held),
        )

    def _present(self) -> tuple[Attached, ...]:
        """What is attached, each by the line that would attach it as it is now: media of drives are changed."""
        assert self.board is not None or not self._attached
        found = []
        for one in self._attached.values():
            device = self.board and self.board.devices[one.name]
            if isinstance(device, Removable):
                one = msgspec.structs.replace(one, words=device.present_words(one.words))
            found.append(one)
        return tuple(found)

    def check_media(self, state: State) -> None:
        """Busy where a drive has another medium in it than it had."""
        if self.board is None or not any(isinstance(one, Removable) for one in self.board.others.values()):
            return
        then = {one.name: one.words for one in setup_of(state).attached}
        for one in self._present():
            if isinstance(self.board.devices[one.name], Removable) and then.get(one.name) != one.words:
                had = " ".join(then.get(one.name, ())) or "none"
                raise Busy(f"{one.name} had another medium in it, which is to be in it again: {had}")

    def check_kind(self, setup: Setup) -> None:
        for what, is_, wanted in (
            ("kind", self.machine_name, setup.machine),
            ("RAM", self.memory.size, setup.memory),
            ("number of CPUs", len(self.vcpus), setup.cpus),
            ("boot images", self.images.sizes(), setup.images),
        ):
            if is_ != wanted:
                raise Invalid(f"the state is of a machine of another {what}: {str(wanted)[:80]}, and not {is_}")

    def check_setup(self, setup: Setup) -> None:
        self.check_kind(setup)
        try:
            unpack_msrs(setup.new_msrs)
        except Invalid:
            raise Invalid("setup: the MSRs of a new CPU are none") from None
        for line in setup.held:
            self._check_exit(line)

    @property
    def time_source(self) -> str:
        """Where time comes from: `host`, or `instructions`."""
        return self._time_source

    @property
    def shown_time_source(self) -> str:
        """As the user that chose it sees it: with a history, the host's time is followed by recorded steps."""
        return "host" if self.history is not None and self.history.follows_host else self._time_source

    @time_source.setter
    def time_source(self, source: str) -> None:
        self._time_source = source
        if self.board is not None:
            self.board.time_source = source

    def load_setup(self, setup: Setup) -> None:
        if setup.has_run:
            self.memory.seal()
        self._has_run, self._boot_due, self._sleeps = setup.has_run, setup.boot_due, setup.sleeps
        self._state = "shutdown" if setup.is_shut_down else "halted" if setup.is_halted else "paused"
        self._held = deque(exits.parse_exit(line) for line in setup.held)
        self.images.cmdline = os.fsdecode(setup.cmdline)
        # Of a state that another engine has made: time goes on by the host's clock where it cannot by instructions.
        self.time_source = setup.time_source if Capability.DETERMINISTIC in self.capabilities else "host"

    def save_seen(self) -> Seen:
        last, *of_cpus = [exit_ and exit_.line() for exit_ in (self._last_exit, *(cpu.last_exit for cpu in self.cpus))]
        return Seen(
            last_exit=last, cpu_exits=tuple(of_cpus), exit_number=self._exit_number, counts=dict(self._counts)
        )

    def check_seen(self, seen: Seen) -> None:
        if len(seen.cpu_exits) != len(self.cpus):
            raise Invalid(f"seen: it has {len(seen.cpu_exits)} last exits of {len(self.cpus)} CPUs")
        for cpu, line in enumerate(seen.cpu_exits):
            if line is not None and self._check_exit(line).cpu != cpu:
                raise Invalid(f"seen: an exit of another CPU stands with cpu {cpu}: {line[:80]}")
        if seen.last_exit is not None:
            self._check_exit(seen.last_exit)

    def _check_exit(self, line: str) -> exits.Exit:
        """The exit that the line of a state is. Invalid for what this machine has none of."""
        exit_ = exits.parse_exit(line)
        if exit_.cpu >= len(self.cpus):
            raise Invalid(f"it has an exit of a CPU that this machine has not: {line[:80]}")
        return exit_

    def _exit_of(self, line: str | None) -> exits.Exit | None:
        exit_ = None if line is None else exits.parsed_exit(line)
        if exit_ is not None:
            exit_.of_several = len(self.cpus) > 1
        return exit_

    def load_seen(self, seen: Seen) -> None:
        self._last_exit = self._exit_of(seen.last_exit)
        for cpu, line in zip(self.cpus, seen.cpu_exits, strict=True):
            cpu.last_exit = self._exit_of(line)
        self._exit_number = seen.exit_number
        self._exit_news += 1 << 32  # those who wait for news have some
        self._counts = Counter(seen.counts)

    def memories(self) -> Iterator[tuple[str, int, Source]]:
        self._gather_dirty()
        yield "ram", self.memory.end, self.memory
        if self._rom is not None:
            yield f"rom {self._rom.address:#x}", self._rom.kept.size, self._rom.kept
        for name, kept in self.images.keep().items():
            yield f"image {name}", kept.size, kept
        for name, disk in self.disks():
            if isinstance(disk, Overlay):
                yield f"overlay {name}", disk.size, disk

    def disks(self) -> Iterator[tuple[str, Disk]]:
        """Of its block devices, by their names."""
        for name, device in self.board.others.items() if self.board is not None else ():
            disk = getattr(device, "disk", None)
            if disk is not None:
                yield name, disk
