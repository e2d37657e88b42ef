"""A machine of a mounted vmfs as a Python object: the files of its directory, kept open.

    from vmfs.client import Vm

    with Vm.temporary("/vmfs", mode="long") as vm:
        vm.mem[0x1000:0x1003] = b"\\xe6\\x80\\xf4"         # out 0x80, al; hlt
        vm.regs.update(rip=0x1000, rax=0x41)
        print(vm.run())                                  # Io(rip=0x1002, direction='out', port=128, ...)
        print(vm.run())                                  # Hlt(rip=0x1003)

Nothing here talks to the server but through its files: what this module does, a shell can do, too. It needs
only the tables of registers and exits.

Errors are OSError with the errno of the file operation (PermissionError, BlockingIOError and so on by the
rules of Python); for a refused write the text is the sentence of the machine's `error` file.

`run`, `step` and `wait` block, without the GIL. In asyncio or trio call them in a thread
(`asyncio.to_thread(vm.run)`, `trio.to_thread.run_sync(vm.run)`) and end them with `vm.pause()`; or `start`
the guest and wait until the descriptor `vm.fileno()` is readable. All methods may be called from any thread;
the files answer EBUSY to what cannot be done while the guest runs.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import select
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from vmfs.words import layouts
from vmfs.words.exits import Exit, Io, Mmio, parse_exit
from vmfs.words.layouts import unpack_msrs
from vmfs.words.registers import REGISTERS, Register, Ymm, msr_name, parse_registers

_CHUNK = 1 << 16


def _whole(fd: int) -> bytes:
    """All of an open file."""
    data, part = bytearray(), bytes(_CHUNK)
    while len(part) == _CHUNK:  # a short read is the end of all but streams
        part = os.pread(fd, _CHUNK, len(data))
        data += part
    return bytes(data)


def _put(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data`, in one write(2) where the file takes it so."""
    view = memoryview(data).cast("B")
    while view:
        if not (done := os.pwrite(fd, view, offset)):
            raise OSError(errno.EIO, "nothing was written")
        view, offset = view[done:], offset + done


class Registers:
    """The registers of one CPU, by attribute (`vm.regs.rax`) and by name (`vm.regs["cs.base"]`): REGISTERS.

    Values are unsigned integers as wide as the register; a negative one may be set, as its two's complement.
    Reading a running machine samples it between two instructions; setting is then OSError (EBUSY). No such
    register: AttributeError or KeyError; a value that is too wide: ValueError.
    """

    __slots__ = ("_vm",)
    _vm: Vm

    def __init__(self, vm: Vm) -> None:
        object.__setattr__(self, "_vm", vm)

    def __getitem__(self, name: str) -> int:
        row = REGISTERS[name]
        if isinstance(row, Ymm):
            return row.get(self._vm.pread(row.state, layouts.XSAVE_AVX_END, 0))
        return int.from_bytes(self._vm.pread(row.state, row.size, row.offset), "little")

    def __setitem__(self, name: str, value: int) -> None:
        row = REGISTERS[name]
        if not row.writable:
            raise ValueError(f"{name} cannot be set")
        if isinstance(row, Ymm):
            area = bytearray(self._vm.pread(row.state, layouts.XSAVE_AVX_END, 0))
            row.put(area, _unsigned(row, value))
            self._vm.pwrite(row.state, bytes(area), 0)
            return
        self._vm.pwrite(row.state, _unsigned(row, value).to_bytes(row.size, "little"), row.offset)

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no register {name}") from None

    def __setattr__(self, name: str, value: int) -> None:
        try:
            self[name] = value
        except KeyError:
            raise AttributeError(f"there is no register {name}") from None

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *(name for name in REGISTERS if name.isidentifier())]

    def update(self, values: Mapping[str, int] = {}, /, **more: int) -> None:  # noqa: B006 - never changed
        """Set several registers (and MSRs, as `msr.0xc0000082`) in one change: all of them or none."""
        lines = []
        for name, value in {**values, **more}.items():
            if not name.startswith("msr."):
                value = _unsigned(REGISTERS[name], value)
            lines.append(f"{name} {value:#x}\n")
        if lines:
            self._vm.write("registers", "".join(lines))

    def read(self) -> dict[str, int]:
        """All registers at one moment, by name."""
        return parse_registers(self._vm.read_text("registers"))


def _unsigned(row: Register, value: int) -> int:
    if not -(1 << (row.settable - 1)) <= value < 1 << row.settable:
        raise ValueError(f"{row.name}: {value:#x} does not fit {row.settable} bits")
    return value & ((1 << row.settable) - 1)


class Msrs:
    """The model-specific registers of one CPU, by number: `vm.msr[0xc0000082]`.

    OSError (ENOENT or EINVAL) where the CPU has none of that number or refuses the value.
    """

    __slots__ = ("_vm",)

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def __getitem__(self, index: int) -> int:
        # Not kept open: there may be very many of them.
        return int(self._vm.read_text(f"reg/{msr_name(index)}", keep=False), 0)

    def __setitem__(self, index: int, value: int) -> None:
        self._vm.write(f"reg/{msr_name(index)}", f"{value:#x}\n")

    def read(self) -> dict[int, int]:
        """All that the engine saves, by number."""
        return dict(unpack_msrs(self._vm.read("msrs")))


class Vm:
    """A machine: the directory `path`. Leaving a `with` closes the descriptors; the machine stays."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self._files: dict[tuple[str, int], int] = {}
        self._lock = threading.RLock()  # guards _files; a signal handler may use the Vm, too
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._last: Exit | None = None
        self.regs = Registers(self)
        self.msr = Msrs(self)

    # ---- making, opening, removing

    @classmethod
    def create(cls, path: str | os.PathLike[str], **settings: Any) -> Vm:
        """Make the machine `path` (FileExistsError if there is one) and write `settings` into its files.

        `Vm.create("/vmfs/demo", mem_size="64M", engine="emulator", mode="long")` writes them in this order,
        which matters: `mode` puts page tables at the top of RAM. When one is refused, the machine is removed
        again.
        """
        os.mkdir(path)
        try:
            vm = cls(path)
        except BaseException:
            os.rmdir(path)
            raise
        try:
            for name, value in settings.items():
                vm.write(name, f"{value}\n")
        except BaseException:
            vm.remove()
            raise
        return vm

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Vm:
        """The machine that is already at `path`."""
        return cls(path)

    @classmethod
    @contextmanager
    def temporary(cls, mount: str | os.PathLike[str], **settings: Any) -> Iterator[Vm]:
        """A machine of an unused name, removed at the end: `with Vm.temporary("/vmfs") as vm:`."""
        vm = cls.create(os.path.join(mount, f"tmp-{os.getpid()}-{secrets.token_hex(4)}"), **settings)
        try:
            yield vm
        finally:
            with suppress(FileNotFoundError):  # removed already
                vm.remove()

    def remove(self) -> None:
        """Remove the machine, running or not, and close."""
        try:
            os.rmdir(self.path)
        finally:
            self.close()

    def close(self) -> None:
        """Close every descriptor; never fails. Slices of `mem` that are still in use stay valid until they go."""
        with suppress(BufferError):
            self._unmap()
        self._view = self._map = None
        with self._lock:
            files, self._files = [*self._files.values(), self._directory], {}
            self._directory = -1
        for fd in files:
            if fd >= 0:
                with suppress(OSError):  # ENODEV of a machine that is gone: Linux has closed it all the same (close(2))
                    os.close(fd)

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Vm {self.path}>"

    # ---- any file

    def pread(self, name: str, size: int, offset: int = 0) -> bytes:
        """Exactly `size` bytes of a binary file at `offset`; OSError (EFAULT) where it ends before."""
        fd = self._open(name, os.O_RDONLY)
        data = bytearray()
        with self._errors(name):
            while len(data) < size and (part := os.pread(fd, size - len(data), offset + len(data))):
                data += part
        if len(data) < size:
            end = f"{name} has {len(data)} of the {size} bytes at {offset:#x}"
            raise OSError(errno.EFAULT, end, os.path.join(self.path, name))
        return bytes(data)

    def pwrite(self, name: str, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Write all of `data` at `offset` of a binary file. What takes effect when it is closed, `write` writes."""
        fd = self._open(name, os.O_WRONLY)
        with self._errors(name, writing=True):
            _put(fd, data, offset)

    def read(self, name: str, *, keep: bool = True) -> bytes:
        """The whole file. `keep` its descriptor open for the next time."""
        fd = self._open(name, os.O_RDONLY, keep=keep)
        try:
            with self._errors(name):
                return _whole(fd)
        finally:
            if not keep:
                os.close(fd)

    def read_text(self, name: str, *, keep: bool = True) -> str:
        """A text file, without its last newline."""
        return self.read(name, keep=keep).decode().removesuffix("\n")

    def write(self, name: str, data: str | bytes | bytearray | memoryview) -> None:
        """Replace the file's contents: open, write and close, as `cat data > name` does.

        A command or a value takes effect whole, or fails. So does what is understood at the close only, as `symbols`.
        """
        fd = self._open(name, os.O_WRONLY | os.O_TRUNC, keep=False)
        with self._errors(name, writing=True):
            try:
                _put(fd, data.encode() if isinstance(data, str) else data, 0)
            except BaseException:
                with suppress(OSError):  # the first failure is the one that tells why
                    os.close(fd)
                raise
            os.close(fd)

    def fileno(self) -> int:
        """The descriptor of the file `exit`, for poll(): POLLIN while `wait` has an exit to return."""
        return self._open("exit", os.O_RDONLY)

    def _open(self, name: str, flags: int, *, keep: bool = True) -> int:
        with self._lock:
            fd = self._files.get((name, flags))
            if fd is None or not keep:
                if self._directory < 0:
                    raise OSError(errno.EBADF, "the Vm is closed", self.path)
                with self._errors(name):
                    fd = os.open(name, flags, dir_fd=self._directory)
                if keep and (kept := self._files.setdefault((name, flags), fd)) != fd:
                    os.close(fd)  # a signal handler has opened it meanwhile
                    return kept
            return fd

    @contextmanager
    def _errors(self, name: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = self._reason() if writing else ""
            path = os.path.join(self.path, name)
            raise OSError(error.errno, reason or os.strerror(error.errno or 0), path) from None

    def _reason(self) -> str:
        """The sentence about the last refused write; empty where it cannot be read (the machine is gone)."""
        try:
            fd = os.open("error", os.O_RDONLY, dir_fd=self._directory)
        except OSError:
            return ""
        try:
            return os.read(fd, _CHUNK).decode(errors="replace").rstrip("\n")
        except OSError:
            return ""
        finally:
            os.close(fd)

    # ---- memory

    @property
    def mem(self) -> memoryview:
        """All guest-physical RAM, shared: a writable memoryview of bytes.

        What is stored is there for the guest, and the reverse: at once if `mem_is_live`, else at each start
        and end of a run. Once the machine is removed, it is zeros, or touching it is SIGBUS.
        """
        if self._view is None:
            with self._errors("mem"):
                self._map = mmap.mmap(self._open("mem", os.O_RDWR), 0)
            self._view = memoryview(self._map)
        return self._view

    @property
    def mem_is_live(self) -> bool:
        """Whether a running guest and `mem` see each other's stores at once: `memory_served_by` in `stat`."""
        return "memory_served_by passthrough" in self.read_text("stat").splitlines()

    def _unmap(self) -> None:
        if self._view is not None and self._map is not None:
            self._view.release()
            self._map.close()
            self._view = self._map = None

    def read_mem(self, address: int, size: int) -> bytes:
        """`size` bytes at the guest-physical `address`; OSError (EFAULT) past the end."""
        return self.pread("mem", size, address)

    def write_mem(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store at the guest-physical `address`; OSError (EFBIG) past the end, with what fits in place."""
        self.pwrite("mem", data, address)

    def read_virt(self, address: int, size: int) -> bytes:
        """`size` bytes at the linear `address`, through the page tables; OSError (EFAULT) if not mapped."""
        return self.pread("virt", size, address & ~(1 << 63))

    def write_virt(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store at the linear `address`, through the CPU's page tables."""
        self.pwrite("virt", data, address & ~(1 << 63))

    # ---- configuration

    @property
    def mem_size(self) -> int:
        """Bytes of RAM. Can be set (bytes, or text as `64M`) before the first run."""
        return int(self.read_text("mem_size"), 0)

    @mem_size.setter
    def mem_size(self, size: int | str) -> None:
        self._unmap()
        self.write("mem_size", f"{size}\n")

    @property
    def mode(self) -> str:
        """What the CPU is in. `real`, `protected` and `long` can be set, with flat segments."""
        return self.read_text("mode")

    @mode.setter
    def mode(self, mode: str) -> None:
        self.write("mode", f"{mode}\n")

    @property
    def engine(self) -> str:
        """The engine that runs it."""
        return self.read_text("engine")

    @engine.setter
    def engine(self, engine: str) -> None:
        self.write("engine", f"{engine}\n")

    # ---- running

    def run(
        self,
        *,
        steps: int | None = None,
        insns: int | None = None,
        until: int | str | None = None,
        timeout: float | None = None,
    ) -> Exit:
        """Run until the next exit and return it. It ends at the latest after

        steps    so many instructions, with Debug(cause="step")
        insns    so many instructions, with Limit
        until    before the linear address or symbol, with Debug(cause="breakpoint")
        timeout  so many seconds, with Limit

        whichever comes first; not both `steps` and `insns`.

        OSError: EBUSY when it runs already, ENODEV once it is removed, EINVAL when it cannot boot. A Python signal
        handler that raises ends the run at an instruction boundary; nothing is lost.
        """
        if steps is not None and insns is not None:
            raise ValueError("a run counts steps or insns, not both")
        bounds = {
            "step": steps,
            "insns": insns,
            "until": f"{until:#x}" if isinstance(until, int) else until,
            "for": None if timeout is None else f"{round(timeout * 1e9)}ns",
        }
        words = [f"{verb} {value}" for verb, value in bounds.items() if value is not None]
        self._last = parse_exit(self._bounded(" ".join(words) + "\n") if words else self._unbounded())
        return self._last

    def _unbounded(self) -> str:
        fd = self._open("vm_run", os.O_RDONLY)
        with self._errors("vm_run", writing=True):  # a read that acts: `error` is about it
            return _whole(fd).decode().removesuffix("\n")

    def _bounded(self, command: str) -> str:
        """Run with a bound; the exit's line.

        A call that a signal ends is made again by Python (PEP 475) once the handler has returned, and a run
        that is begun again has its whole bound before it. So what waits here is a poll, not the run.
        """
        fd = self._open("vm_run", os.O_RDWR | os.O_NONBLOCK)
        with self._errors("vm_run", writing=True):
            os.pwrite(fd, command.encode(), 0)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll()
        except BaseException:  # what a signal handler raises
            with suppress(OSError):
                self.pause()
            raise
        with self._errors("vm_run", writing=True):
            return _whole(fd).decode().removesuffix("\n")

    def step(self, count: int = 1) -> Exit:
        """Execute `count` instructions (or fewer, when one makes an exit)."""
        return self.run(steps=count)

    def start(self) -> None:
        """Run in the background, until `wait` returns its exit or `pause` ends it."""
        self.read("exit")  # what was there is not news for poll()
        self.write("state", "run\n")

    def wait(self, timeout: float | None = None) -> Exit | None:
        """The exit of a machine that was started; None when there is none within `timeout` seconds."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            return None
        return self.exit

    def pause(self) -> None:
        """Stop it at an instruction boundary. The run under way ends with Interrupted, for any caller."""
        self.write("state", "pause\n")

    def reset(self) -> None:
        """The CPU as after power-on. RAM stays as it is."""
        self.write("state", "reset\n")

    @property
    def state(self) -> str:
        """`paused`, `running`, `halted` or `shutdown`."""
        return self.read_text("state")

    @property
    def exit(self) -> Exit | None:
        """The last exit; None before the first."""
        line = self.read_text("exit")
        self._last = parse_exit(line) if line else None
        return self._last

    def answer(self, data: int | bytes) -> None:
        """What the pending `in` or load returns: a number, or all of its bytes (Io: size * count)."""
        if isinstance(data, int):
            last = self._last or self.exit
            if not isinstance(last, Io | Mmio):
                raise ValueError(f"the last exit is no access: {last.line() if last else 'there was none'}")
            if isinstance(last, Io) and last.count != 1:
                raise ValueError(f"{last.count} elements are answered by their bytes, not by one number")
            if not -(1 << (8 * last.size - 1)) <= data < 1 << 8 * last.size:
                raise ValueError(f"{data:#x} does not fit {last.size} bytes")
            data = (data & ((1 << 8 * last.size) - 1)).to_bytes(last.size, "little")
        self.pwrite("exit.data", data)

    # ---- interrupts and debugging

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt, delivered when the guest can take it; BlockingIOError if full."""
        self.write("irq", struct.pack("<I", vector))

    def nmi(self) -> None:
        """Make a non-maskable interrupt pending."""
        self.write("irq", "nmi\n")

    def breakpoint(self, address: int | str) -> int:
        """Stop before the instruction at the linear address, or symbol. Returns its id, as in Debug.id."""
        return self._point(f"break {address:#x}" if isinstance(address, int) else f"break {address}")

    def watch(self, address: int | str, length: int, access: str = "rw") -> int:
        """Stop after an access (`r`, `w` or `rw`) to `length` bytes at the linear address. Returns its id."""
        place = f"{address:#x}" if isinstance(address, int) else address
        return self._point(f"watch {place} {length} {access}")

    def delete(self, point: int | None = None) -> None:
        """Delete one break- or watchpoint, or all."""
        self.write("debug", f"delete {'all' if point is None else point}\n")

    def _point(self, command: str) -> int:
        self.write("debug", f"{command}\n")
        # Its lines after the first are `ID ...`; ids only grow.
        return max(int(line.split()[0]) for line in self.read_text("debug").splitlines()[1:])
