"""Host: all machines of a mount, and the limits they share."""

from __future__ import annotations

import os
import sys

from vmfs.engine.base import Engine
from vmfs.machine.machine import Vm
from vmfs.machine.memory import DEFAULT_SIZE, check_size
from vmfs.words.errors import LimitReached, known


class Host:
    """Makes and ends machines. `max_memory` (bytes) bounds the sum of their RAM, touched or not."""

    def __init__(self, engine: Engine, *, max_vms: int, max_memory: int) -> None:
        self.engine = engine  # of new machines
        self.max_vms = max_vms
        self.max_memory = max_memory
        self.own_device: int | None = None  # st_dev of the mount, once it is there
        self._vms: set[Vm] = set()

    @property
    def vms(self) -> frozenset[Vm]:
        return frozenset(self._vms)

    def create(self, memory_size: int = DEFAULT_SIZE) -> Vm:
        """A new machine; LimitReached when the mount, or the host, has no room for it."""
        if len(self._vms) >= self.max_vms:
            raise LimitReached(f"the mount's limit of {self.max_vms} machines is reached (--max-vms)")
        self._check_memory(memory_size)
        try:
            vm = Vm(self.engine, memory_size=memory_size)
        except Exception as error:
            raise known(error) from error.__cause__
        self._vms.add(vm)
        return vm

    def resize_memory(self, vm: Vm, size: int) -> None:
        check_size(size)
        self._check_memory(size - vm.memory.size)
        vm.resize_memory(size)

    def capacity(self) -> tuple[int, int, int, int]:
        """RAM and how much of it is unpromised, in bytes; machines and how many more (0, 0: any number)."""
        memory = min(self.max_memory, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        used = sum(vm.memory.size for vm in self._vms)
        names = self.max_vms if self.max_vms < sys.maxsize else 0
        return memory, max(memory - used, 0), names, max(names - len(self._vms), 0)

    def forget(self, vm: Vm) -> None:
        """The machine no longer counts; `Vm.close`, which blocks, is the caller's to call in a thread."""
        self._vms.discard(vm)

    def _check_memory(self, more: int) -> None:
        used = sum(vm.memory.size for vm in self._vms)
        if used + more > self.max_memory:
            raise LimitReached(
                f"{more} bytes of RAM more than the {used} in use pass the mount's {self.max_memory} "
                "(--max-mem)"
            )
