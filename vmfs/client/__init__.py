"""A machine of a mounted vmfs as a Python object: the files of its directory, kept open.

    from vmfs.client import Vm

    with Vm.temporary("/vmfs", mode="long") as vm:
        vm.mem[0x1000:0x1003] = b"\\xe6\\x80\\xf4"         # out 0x80, al; hlt
        vm.regs.update(rip=0x1000, rax=0x41)
        print(vm.run())                                  # Io(rip=0x1002, direction='out', port=128, ...)
        print(vm.run())                                  # Hlt(rip=0x1003)

    with private_mount() as mount, Vm.temporary(mount, mem_size="256M") as vm:
        vm.boot("/vmlinuz", initrd="/initrd.img")        # a PC, with its console
        vm.console.expect("login: ")
        vm.snapshot("booted")

`vm.trace` yields records, `vm.breakpoint`, `watch`, `catch` and `iobreak` make points, `vm.screen`, `screenshot`,
`press` and `type` are screen and keyboard, `vm.snapshot`, `restore` and `fork` keep moments and go back to them.

Nothing here talks to the server but through its files: what this module does, a shell can do, too. It needs
only the tables of registers and exits.

Errors are OSError with the errno of the file operation (PermissionError, BlockingIOError and so on by the
rules of Python); for a refused write the text is the sentence of the machine's `error` file.

`run`, `step` and `wait` block, without the GIL. In asyncio or trio call them in a thread
(`asyncio.to_thread(vm.run)`, `trio.to_thread.run_sync(vm.run)`) and end them with `vm.pause()`; or `start`
the guest and wait until the descriptor `vm.fileno()` is readable. All methods may be called from any thread;
the files answer EBUSY to what cannot be done while the guest runs.
"""

from vmfs.client.console import Console
from vmfs.client.mounting import MountFailed, private_mount
from vmfs.client.vm import Cpu, Point, Vm

__all__ = ["Console", "Cpu", "MountFailed", "Point", "Vm", "private_mount"]
