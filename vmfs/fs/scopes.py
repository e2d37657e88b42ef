"""What rows of FILES get to see: a machine, or the mount."""

from __future__ import annotations

import itertools
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
from vmfs.fs.inodes import Scope
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
        for port in self._consoles.values():
            port.stream.wake()  # at the end of a machine its readers have the end of the file
        super().changed()

    def console_port(self, device: str) -> ConsolePort | None:
        """The stream of a serial port or a virtio console; None where there is none."""
        board = self.vm.board
        serial = None if board is None else board.devices.get(device)
        if not isinstance(serial, Serial | VirtioConsole):
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
