"""The long proof that a machine has a past: one that is disturbed all its life against one that never is (`make past`).

Both do the same, slice by slice, and all state and memory are compared after each. In between, at instructions that
dice choose, the disturbed one is put back to a snapshot after it went on, forked (and the fork goes on in its place),
saved and loaded into a new machine, moved to another engine, and sent through its past, where its hash is compared
with what it was then.

Guests: a Debian with a disk and a keyboard from its first instruction to its power-off, on one CPU and on four in
turn; a loop that changes its own code, in the middle of repeated instructions.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.asm import ORIGIN, assemble
from engine.saving import come_in, fork_of, save
from pc.initramfs import VIRTIO, build
from pc.repeated import BIRTH, SCRIPT, debian

from vmfs.devices import keys
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.engine.rest import NEVER, Time
from vmfs.machine.history import History
from vmfs.machine.journey import Journey
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.machine.state import ROWS
from vmfs.words.modes import set_mode
from vmfs.words.registers import write_registers

SECONDS = 900
SLICE = 1_000_000
HASHED = 20  # slices, of which one is compared by its hash, too
CHUNK = 1 << 20
# Writes all over a MiB, changes its own code, copies with REP, and is ended by nothing.
WALKER = """
l:  inc rbx; imul eax, ebx, 0x9e3779b1; and eax, 0xff; shl eax, 12; mov [rax + 0x100000], rbx; mov [rax + 0x100ff8], rcx
    mov byte ptr [rip + change + 1], bl; change: mov eax, 0; add rcx, rax
    rdtsc; lea rdi, [0x9000]; mov ecx, ebx; and ecx, 0x3ff; mov esi, 0x8000; rep movsb
    test ebx, 31; jne l; out 0x80, al; in al, 0x81; add [0x7000], al; jmp l
"""


def walker(cpus: int) -> Vm:
    vm = Vm(EmulatorEngine(), memory_size=4 << 20)
    vm.set_machine("pc")
    vm.set_birth(BIRTH)
    vm.set_time_source("instructions")
    vm.set_cpu_count(cpus)
    vm.memory.write(ORIGIN, assemble(WALKER, "long").code)
    for number in range(cpus):
        vm.change(lambda cpu: set_mode(cpu, vm.memory, 4 << 20, "long"), cpu=number)
        vm.change(lambda cpu, at=number: write_registers(cpu, {"rip": ORIGIN, "rbx": at << 20}), cpu=number)
    return vm


class Sides:
    """One that is left alone, and one that `disturb` is done to. `compared`: the places where they were equal."""

    def __init__(self, make: Callable[[], Vm], seed: int, slice_: int = SLICE) -> None:
        self.alone, self.other = make(), make()
        self._dice = random.Random(seed)
        self._slice = slice_
        self.compared: list[int] = []
        self.done: dict[str, int] = {}
        for vm in (self.alone, self.other):
            vm.board.inputs.record()

    def close(self) -> None:
        self.alone.close()
        self.other.close()

    def step(self, disturbs: bool) -> bool:
        """A slice of both, and compare. False at the end of the guest's life."""
        self._run(self.alone, self._slice)
        end = place_of(self.alone)
        if disturbs:
            before = self._dice.randrange(self._slice)  # in the middle of whatever it is
            self._run(self.other, before)
        if disturbs and self.other.state != "shutdown":
            name = self._dice.choice(("restore", "fork", "load", "move", "goto"))
            getattr(self, f"_{name}")()
            self.done[name] = self.done.get(name, 0) + 1
        self._run(self.other, max(end - place_of(self.other), 0))
        if len(self.compared) % HASHED == 0:
            assert self.other.state_hash() == self.alone.state_hash(), (end, self.done)
        else:
            compare(self.alone, self.other, (end, self.done))
        self.compared.append(end)
        return self.alone.state != "shutdown"

    def type(self, text: str) -> None:
        for vm in (self.alone, self.other):
            vm.board.keyboard.type(keys.parse(text))

    @staticmethod
    def _run(vm: Vm, count: int) -> None:
        if count and vm.state != "shutdown":
            vm.start(Bound(instructions=count)).result(SECONDS)

    def _more(self) -> int:
        return self._dice.randrange(1, 3 * self._slice)

    def _restore(self) -> None:
        vm = self.other
        log = vm.board.inputs.stop()
        assert not [one for one in log if one.at > vm.board.now()]
        vm.past.take("here")
        self._run(vm, self._more())
        vm.past.restore("here")
        vm.past.drop("here")
        vm.board.inputs.record()

    def _replace(self, vm: Vm) -> None:
        self.other.close()
        self.other = vm
        vm.board.inputs.record()

    def _fork(self) -> None:
        child = fork_of(self.other)
        self._run(self.other, self._more())  # what the parent does is nothing to it
        self._replace(child)

    def _load(self) -> None:
        vm = Vm(EmulatorEngine())
        come_in(vm, save(self.other))
        vm.past.restore("saved")
        vm.past.drop("saved")
        self._replace(vm)

    def _move(self) -> None:
        self.other.move_to(EmulatorEngine())

    def _goto(self) -> None:
        vm = self.other
        vm.board.inputs.stop()
        history = History(vm, every=0.01)
        history.start()
        begin = place_of(vm)
        here = {begin: vm.state_hash()}
        for _ in range(3):
            self._run(vm, self._more())
            if vm.state == "shutdown":  # at that place it is not shut down when it is gone to
                break
            here[place_of(vm)] = vm.state_hash()
        for place in self._dice.sample(sorted(here), len(here)):
            vm.start(Bound(journey=Journey(place=place))).result(SECONDS)
            assert place_of(vm) == place and vm.state_hash() == here[place], (place, begin)
        if len(here) > 1:
            vm.start(Bound(journey=Journey(place=begin + 1))).result(SECONDS)
            vm.start(Bound(journey=Journey(back=1))).result(SECONDS)
        else:
            vm.start(Bound(journey=Journey(place=begin))).result(SECONDS)
        assert place_of(vm) == begin and vm.state_hash() == here[begin]
        vm.change(lambda cpu: None)  # another future, which is the one that it had
        history.stop()
        vm.board.inputs.record()


def compare(one: Vm, other: Vm, what: object) -> None:
    """What `state_hash` has, without its hash: all that decides what a machine does next."""
    of_run = {f"{row.owner}/{row.name}" for row in ROWS if row.of_run}
    first, second = ({**vm.take().result(SECONDS).parts} for vm in (one, other))
    assert first.keys() == second.keys(), what
    for name in first.keys() - of_run:
        data = [parts[name].data for parts in (first, second)]
        if name == "engine/time":
            data = [replace(Time.unpack(each), deadline=NEVER).pack() for each in data]
        assert data[0] == data[1], (name, what)
    for (name, size, memory), (_, other_size, other_memory) in zip(one.memories(), other.memories(), strict=True):
        assert size == other_size, (name, what)
        chunks = {at - at % CHUNK for each in (memory, other_memory) for start, end in each.extents()
                  for at in range(start - start % CHUNK, end, CHUNK)}  # fmt: skip
        for at in chunks:
            length = min(CHUNK, size - at)
            assert memory.read_at(at, length) == other_memory.read_at(at, length), (name, hex(at), what)


def place_of(vm: Vm) -> int:
    return sum(vm.cpu_counters(number)["instructions"] for number in range(len(vm.cpus)))


def live(guest: str, cpus: int, seed: int, share: float, most: int, slice_: int = SLICE) -> Sides:
    """A whole life, or `most` instructions; a `share` of the slices is disturbed."""
    with tempfile.TemporaryDirectory() as folder:
        if guest == "walker":
            sides = Sides(lambda: walker(cpus), seed, slice_)
        else:
            image = Path(folder) / "disk"
            image.write_bytes(random.Random(1).randbytes(4 << 20))
            initrd = build(SCRIPT, modules=VIRTIO)
            sides = Sides(lambda: debian(image, initrd, cpus, "console=tty0 console=ttyS0 quiet", BIRTH), seed, slice_)
        try:
            dice, said, is_typed, number = random.Random(seed + 1), b"", False, 0
            began = time.monotonic()
            while sides.step(number > 0 and dice.random() < share) and place_of(sides.alone) < most:
                number += 1
                said += sides.alone.board.devices["com1"].sent.read(len(said), 1 << 20)
                if not is_typed and b"ready" in said:
                    sides.type('"an answer\\n"')
                    is_typed = True
                if number % 100 == 0:
                    took = time.monotonic() - began
                    print(f"{guest} cpus={cpus} {place_of(sides.alone)} {took:.0f} s {sides.done}", flush=True)
            if guest == "debian" and sides.alone.state == "shutdown":
                assert b"typed: an answer" in said, said[-2000:]
            return sides
        finally:
            sides.close()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guest", choices=("debian", "walker"), default="debian")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.05, help="of the slices, that are disturbed")
    parser.add_argument("--most", type=int, default=4_000_000_000, help="instructions")
    given = parser.parse_args()
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sides = live(given.guest, given.cpus, given.seed, given.share, given.most)
    places = sides.compared
    print(f"{given.guest} cpus={given.cpus}: equal at {len(places)} places, to {places[-1]}; {sides.done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
