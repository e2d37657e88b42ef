"""What rows of FILES get to see: a machine, or the mount."""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from vmfs.debug.symbols import SymbolTable
from vmfs.devices.display import Display
from vmfs.devices.serial import Serial
from vmfs.devices.virtio.console import Console as VirtioConsole
from vmfs.engine import EngineInfo
from vmfs.engine.base import MACHINE_STATES, VCPU_STATES
from vmfs.fs.connection import Connection
from vmfs.fs.console import ConsolePort
from vmfs.fs.gdb_files import GdbPort
from vmfs.fs.inodes import Kind, Scope
from vmfs.fs.memory_file import MemoryServer
from vmfs.fs.screen_files import FramebufferServer
from vmfs.host.machines import Host
from vmfs.machine.machine import Vm
from vmfs.words.errors import Busy, Unsupported


class RootScope(Scope):
    """The mount."""

    def __init__(
        self, host: Host, engines: tuple[EngineInfo, ...], connection: Connection | None = None
    ) -> None:
        super().__init__()
        self.host = host
        self.engines = engines
        self.connection = connection


class MachineScope(Scope):
    """One machine. `changes` grows whenever its state may have changed."""

    def __init__(self, vm: Vm, host: Host, connection: Connection | None) -> None:
        super().__init__()
        self.vm = vm
        self.host = host
        self.memory = MemoryServer(vm, connection)
        self.gdb = GdbPort(self)
        self.symbol_file: tuple[SymbolTable, bytes] | None = None  # with the table that it is made of
        self.symbol_file_size: tuple[SymbolTable, int] | None = None
        self.symbols_text: tuple[SymbolTable | None, int] = None, 0  # the size of the text of a table
        self._kept_sizes: dict[Kind, tuple[object, int]] = {}
        self._modified_ns = time.time_ns()
        self.changes = 1
        self._consoles: dict[str, ConsolePort] = {}
        self._framebuffer: FramebufferServer | None = None
        self._count = itertools.count(2)
        self._sizes = {name: len(blob) for name, blob in vm.reset_states.items()}
        for name in (*VCPU_STATES, *MACHINE_STATES):
            self.state_size(name)  # now, because a CPU that runs has to be stopped for it
        vm.subscribe(self.changed)

    def changed(self) -> None:
        self.changes = next(self._count)
        self.touch()
        for port in self._consoles.values():
            port.stream.wake()  # at the end of a machine its readers have the end of the file
        super().changed()

    def touch(self) -> None:
        """Something was written."""
        self._modified_ns = time.time_ns()

    def modified_ns(self) -> int:
        return time.time_ns() if self.vm.state == "running" else self._modified_ns

    def _same_as(self) -> object | None:
        """While this is the same, and not None, the CPU, RAM and all else that is shown of a guest are as they were."""
        vm = self.vm
        if vm.still is None or self.memory.writers:
            return None
        board = vm.board
        return vm.still, self.memory.changes, board, board and board.writes, vm.symbols, vm.listing

    async def kept_size(self, kind: Kind, measure: Callable[[MachineScope], Awaitable[int]]) -> int:
        """`measure(self)`, or what it was when nothing has happened since."""
        same_as = self._same_as()
        known, size = self._kept_sizes.get(kind, (None, 0))
        if same_as is None or known != same_as:
            size = await measure(self)
            self._kept_sizes[kind] = same_as, size
        return size

    def port_device(self, device: str) -> Serial | VirtioConsole | None:
        board = self.vm.board
        serial = None if board is None else board.devices.get(device)
        return serial if isinstance(serial, Serial | VirtioConsole) else None

    def console_port(self, device: str) -> ConsolePort | None:
        """The stream of a serial port or a virtio console; None where there is none."""
        serial = self.port_device(device)
        if serial is None:
            return None
        port = self._consoles.get(device)
        if port is None or port.serial is not serial:
            port = self._consoles[device] = ConsolePort(serial, super().changed)
        return port

    def framebuffer(self, display: Display) -> FramebufferServer:
        """How the memory of the display is served."""
        server = self._framebuffer
        if server is None or server.display is not display:
            if server is not None:  # of a machine that it was before
                server.close()
            server = self._framebuffer = FramebufferServer(display)
        return server

    def remove(self) -> None:
        super().remove()
        self.memory.close()
        if self._framebuffer is not None:
            self._framebuffer.close()

    def sample(self, name: str) -> Future[bytes]:
        """A state of the CPU or the machine, between two instructions."""
        if name in MACHINE_STATES:
            return self.vm.get_machine_state(name)
        return self.vm.at_boundary(lambda cpu: cpu.get_state(name))

    def state_size(self, name: str) -> int:
        """Bytes of a state; 0 where the machine has none. Looked up once, when the machine does not run."""
        if name not in self._sizes:
            if self.vm.state == "running":
                return 0
            try:
                size = len(self.sample(name).result(0))
            except Unsupported:
                size = 0
            except (Busy, TimeoutError):
                return 0
            self._sizes[name] = size
        return self._sizes[name]

    def forget_sizes(self) -> None:
        """Every state may have another length: it is another engine's."""
        self._sizes.clear()
        for name in (*VCPU_STATES, *MACHINE_STATES):
            self.state_size(name)

    def forget_size(self, name: str) -> None:
        """The state was set to one of another length."""
        self._sizes.pop(name, None)
