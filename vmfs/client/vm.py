"""A machine of a mounted vmfs as a Python object: see the package's docstring."""

from __future__ import annotations

import mmap
import os
import secrets
import select
import shlex
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from vmfs.client.console import Console
from vmfs.client.files import Directory, read_whole, write_whole
from vmfs.client.registers import Msrs, Registers
from vmfs.words.exits import Exit, Io, Mmio, parse_exit
from vmfs.words.tracing import TraceRecord, TraceRecords

DEFAULT_CMDLINE = "console=ttyS0"


class Point(NamedTuple):
    """A line of the file `debug`: a point that stops the machine. `what` is the line as it can be written again."""

    id: int
    what: str
    hits: int
    by: str  # how the engine watches for it


class Cpu(Directory):
    """CPU `number` of a machine of several: its registers and files. `regs` and `msr` as the machine's own."""

    def __init__(self, vm: Vm, number: int) -> None:
        super().__init__(os.path.join(vm.path, f"cpu{number}"))
        self.number = number
        self.regs = Registers(self)
        self.msr = Msrs(self)

    @property
    def state(self) -> str:
        """`running`, `halted` or `wait-for-sipi`."""
        return self.read_text("state")


class Vm(Directory):
    """A machine: the directory `path`. Leaving a `with` closes the descriptors; the machine stays."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._last: Exit | None = None
        self._console: Console | None = None
        self._cpus: dict[int, Cpu] = {}
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
        self._view = self._map = self._console = None
        cpus, self._cpus = self._cpus, {}
        for cpu in cpus.values():
            cpu.close()
        super().close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Vm {self.path}>"

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

    @property
    def cpus(self) -> int:
        """How many CPUs it has. Can be set (1 to 64) before the first run."""
        return int(self.read_text("cpus"))

    @cpus.setter
    def cpus(self, count: int) -> None:
        self.write("cpus", f"{count}\n")

    def cpu(self, number: int) -> Cpu:
        """One of its CPUs; FileNotFoundError where it has fewer. `vm.regs` are those of CPU 0."""
        if number not in self._cpus:
            self._cpus[number] = Cpu(self, number)
        return self._cpus[number]

    @property
    def stat(self) -> dict[str, int | str]:
        """What the machine counts, by name; what is no number is text."""
        pairs = (line.partition(" ") for line in self.read_text("stat").splitlines())
        return {name: int(value) if value.isdecimal() else value for name, _, value in pairs}

    @property
    def why(self) -> str:
        """After a shutdown: the faults that led to it, the registers before them, and what was executed last."""
        return self.read_text("why")

    # ---- a PC

    def boot(
        self,
        kernel: str | os.PathLike[str] | bytes | None = None,
        *,
        initrd: str | os.PathLike[str] | bytes | None = None,
        cmdline: str | None = DEFAULT_CMDLINE,
        bios: str | os.PathLike[str] | bytes | None = None,
        devices: Sequence[str] = (),
        symbols: str | os.PathLike[str] | bytes | None = None,
        start: bool = True,
    ) -> None:
        """Make it a PC, load it, open its console and start it. What it boots: docs/boot.md.

        Images are paths of files here, or their bytes. `devices` are lines for `dev/add`, as `blk /root.img cow`.
        A machine that cannot be booted has an exit `error` that says why.
        """
        self.write("machine", "pc\n")
        for line in devices:
            self.add_device(line)
        for name, image in (("kernel", kernel), ("initrd", initrd), ("bios", bios), ("symbols", symbols)):
            if image is not None:
                self._load(name, image)
        if kernel is not None and cmdline:
            self.write("cmdline", f"{cmdline}\n")
        _ = self.console  # all that the guest says is for it
        if start:
            self.start()

    def _load(self, name: str, image: str | os.PathLike[str] | bytes) -> None:
        """Into one of the machine's files, an image or the path of one."""
        if isinstance(image, bytes):
            return self.write(name, image)
        with open(image, "rb") as file:
            target = self._open(name, os.O_WRONLY | os.O_TRUNC, keep=False)
            with self._errors(name, writing=True):
                try:
                    at = 0
                    while data := file.read(1 << 20):
                        write_whole(target, data, at)
                        at += len(data)
                except BaseException:
                    with suppress(OSError):
                        os.close(target)
                    raise
                os.close(target)

    @property
    def console(self) -> Console:
        """The first serial port of a PC, from the first use of this on. A bare one has none: OSError (EOPNOTSUPP)."""
        if self._console is None:
            self._console = Console(lambda flags: self._open("console", flags))
        return self._console

    @property
    def screen(self) -> str:
        """The characters on the screen, a line a row; in a graphics mode one line that says so."""
        return self.read_text("screen.txt")

    def screenshot(self) -> bytes:
        """The screen as a PNG file."""
        return self.read("screen.png", keep=False)

    def press(self, *keys: str) -> None:
        """Press keys of the keyboard, by name: `vm.press("ctrl-alt-del")`, `vm.press("f1", "down", "enter")`."""
        self.write("keyboard", " ".join(keys) + "\n")

    def type(self, text: str) -> None:
        """Type on the keyboard. (`console.send` types on the serial port.)"""
        for old, new in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t"), ("\x1b", "\\e"), ("\b", "\\b")):
            text = text.replace(old, new)
        self.write("keyboard", f'"{text}"\n')

    def mouse(self, *words: str) -> None:
        """Move the mouse and press its buttons: `vm.mouse("100,-20", "left")`, `vm.mouse("+left", "0,50", "-left")`."""
        self.write("mouse", " ".join(words) + "\n")

    @property
    def devices(self) -> list[str]:
        """The names of the devices of a PC, as in `dev/`; `read_text("dev/NAME/info")` and so on have what they are."""
        names = os.listdir(os.path.join(self.path, "dev"))
        return sorted(name for name in names if os.path.isdir(os.path.join(self.path, "dev", name)))

    def add_device(self, line: str, *words: str) -> str:
        """Attach a device: `vm.add_device("blk", path, "cow")`, or the line whole. Its name in `dev/`.

        OSError (EBUSY) after the first run; paths are opened with the rights of the caller.
        """
        before = set(self.devices)
        self.write("dev/add", (" ".join([line, *map(shlex.quote, words)]) if words else line) + "\n")
        return next(iter(set(self.devices) - before), "")

    def remove_device(self, name: str) -> None:
        """Detach it, before the first run."""
        os.rmdir(os.path.join(self.path, "dev", name))

    # ---- snapshots, forks, history

    @property
    def snapshots(self) -> list[str]:
        """The names of its snapshots."""
        return sorted(os.listdir(os.path.join(self.path, "snap")))

    def snapshot(self, name: str) -> None:
        """Keep what the machine is, running or not, under a name. FileExistsError where there is one."""
        with self._errors("snap", writing=True):
            os.mkdir(os.path.join(self.path, "snap", name))

    def restore(self, name: str) -> None:
        """Go back to a snapshot. The machine is paused then."""
        self.write("restore", f"{name}\n")

    def drop(self, name: str) -> None:
        """Forget a snapshot."""
        with self._errors("snap", writing=True):
            os.rmdir(os.path.join(self.path, "snap", name))

    def fork(self, name: str, snapshot: str | None = None) -> Vm:
        """A sibling of this machine as it is, or as it was at a snapshot: a machine of its own beside it, paused."""
        self.write("fork", f"{name} from {snapshot}\n" if snapshot else f"{name}\n")
        return Vm(os.path.join(os.path.dirname(os.path.abspath(self.path)), name))

    def record(self, on: bool = True, *, memory: str | int | None = None, every: str | None = None) -> None:
        """Record what is needed to go back in time, from now on, or stop that and forget it: the file `history`.

        A machine whose `mem` is mapped cannot be recorded (EBUSY). This object's own mapping goes, and `vm.mem` is
        another one afterwards.
        """
        if on:
            with suppress(BufferError):  # somebody has a slice of it
                self._unmap()
            self._forget("mem")
        words = [f"memory={memory}"] if memory is not None else []
        words += [f"every={every}"] if every is not None else []
        self.write("history", " ".join(["on", *words] if on else ["off"]) + "\n")

    def back(self, count: int | None = None, *, until: int | str | None = None) -> Exit:
        """Go back by `count` instructions; to the last time that it was at `until`; or to the last stop of a point."""
        if count is not None and until is not None:
            raise ValueError("it is a count or a place, not both")
        word = str(count) if count is not None else "" if until is None else f"until {_place(until)}"
        self._last = parse_exit(self._bounded(f"back {word}".rstrip() + "\n"))
        return self._last

    def goto(self, instructions: int) -> Exit:
        """Go to that count of instructions, either way, while it records."""
        self._last = parse_exit(self._bounded(f"goto {instructions}\n"))
        return self._last

    def writer(self, address: int | str, length: int = 1, *, physical: bool = False) -> str:
        """Which instruction wrote these bytes last, as the file `writer` says it."""
        self.write("writer", f"{'phys:' if physical else ''}{_place(address)} {length}\n")
        return self.read_text("writer", keep=False)

    # ---- running

    def run(
        self,
        *,
        steps: int | None = None,
        insns: int | None = None,
        until: int | str | None = None,
        timeout: float | None = None,
        cpu: int | None = None,
    ) -> Exit:
        """Run until the next exit and return it; only CPU `cpu`, if one is given. It ends at the latest after

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
            "until": None if until is None else _place(until),
            "for": None if timeout is None else f"{round(timeout * 1e9)}ns",
        }
        words = [f"{verb} {value}" for verb, value in bounds.items() if value is not None]
        words += [f"cpu={cpu}"] if cpu is not None else []
        self._last = parse_exit(self._bounded(" ".join(words) + "\n") if words else self._unbounded())
        return self._last

    def _unbounded(self) -> str:
        fd = self._open("vm_run", os.O_RDONLY)
        with self._errors("vm_run", writing=True):  # a read that acts: `error` is about it
            return read_whole(fd).decode().removesuffix("\n")

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
            return read_whole(fd).decode().removesuffix("\n")

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

    def fileno(self) -> int:
        """The descriptor of the file `exit`, for poll(): POLLIN while `wait` has an exit to return."""
        return self._open("exit", os.O_RDONLY)

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

    def breakpoint(self, address: int | str, **options: Any) -> int:
        """Stop before the instruction at the linear address, or symbol. Returns its id, as in Debug.id.

        Options of this and of all points: `condition` (as `rax==5`), `ignore` (so many times, not), `once`, `disabled`,
        `cpu`.
        """
        return self._point(f"break {_place(address)}", **options)

    def watch(
        self, address: int | str, length: int, access: str = "rw", *, physical: bool = False, **options: Any
    ) -> int:
        """Stop after an access (`r`, `w` or `rw`) to `length` bytes at the linear address. Returns its id."""
        return self._point(f"watch {'phys:' if physical else ''}{_place(address)} {length} {access}", **options)

    def catch(self, vector: int | str, **options: Any) -> int:
        """Stop before an exception or interrupt is delivered: a number, `#PF`, `0-31`. Returns its id."""
        return self._point(f"catch {vector}", **options)

    def iobreak(self, port: int | str, **options: Any) -> int:
        """Stop after an access to the port, or to one of a range `0x60-0x64`. Returns its id."""
        return self._point(f"iobreak {_place(port)}", **options)

    def points(self) -> list[Point]:
        """All points, in the order of their ids."""
        return [_point_of(line) for line in self.read_text("debug").splitlines()[1:]]

    def find_symbols(self) -> None:
        """Find the symbols of the Linux that runs in it. (`load_symbols` takes them of a file.)"""
        self.write("symbols", "kallsyms")

    def load_symbols(self, image: str | os.PathLike[str] | bytes) -> None:
        """Names of addresses from an ELF file, a System.map or the text of /proc/kallsyms."""
        self._load("symbols", image)

    def symbol(self, name: str) -> int:
        """The address of a symbol; KeyError where there is none."""
        for line in self.read_text("symbols", keep=False).splitlines():
            address, _, its = line.split(" ", 2)
            if its == name:
                return int(address, 16)
        raise KeyError(name)

    def disasm(self, address: int | str | None = None, count: int = 16) -> list[str]:
        """The next instructions, a line each, at rip or at `address`."""
        self.write("disasm", f"{'rip' if address is None else _place(address)} {count}\n")
        return self.read_text("disasm", keep=False).splitlines()

    @contextmanager
    def trace(self, *kinds: str, **settings: str) -> Iterator[Iterator[TraceRecord]]:
        """Trace `insn`, `mem`, `exceptions`, `interrupts`, `exits` (no word: `insn`) as long as the block runs.

            with vm.trace("insn", "mem", range="0x1000-0x1fff") as records:
                vm.run(insns=1000)
            for record in records: ...

        `settings` are the other words of the file `trace`: range, data, mode, full, buffer. The records can be read in
        the block, where they come as the guest runs, and after it, where they end. What is more than the buffer holds
        (16 MiB) is dropped, and a record says how much, since nobody else would read in the meantime; `full="wait"`
        lets the guest wait for another thread that reads.
        """
        settings = {"full": "drop", **settings}
        lines = [f"{name} {value}\n" for name, value in settings.items()]
        lines += [f"{kind} on\n" for kind in kinds or ("insn",)]
        self.write("trace", "".join(lines))
        fd = self._open("trace.bin", os.O_RDONLY, keep=False)
        try:
            yield self._records(fd)
        finally:
            self.write("trace", "off\n")

    def _records(self, fd: int) -> Iterator[TraceRecord]:
        records = TraceRecords()
        try:
            while data := os.read(fd, 1 << 20):
                yield from records.read(data)
        finally:
            os.close(fd)

    def delete(self, point: int | None = None) -> None:
        """Delete one break- or watchpoint, or all."""
        self.write("debug", f"delete {'all' if point is None else point}\n")

    def _point(
        self,
        command: str,
        *,
        condition: str | None = None,
        ignore: int = 0,
        once: bool = False,
        disabled: bool = False,
        cpu: int | None = None,
    ) -> int:
        words = [f"ignore {ignore}"] if ignore else []
        words += ["once"] if once else []
        words += ["disabled"] if disabled else []
        words += [f"cpu={cpu}"] if cpu is not None else []
        words += [f"if {condition}"] if condition else []  # the last, since it may have any words
        self.write("debug", " ".join([command, *words]) + "\n")
        return max(point.id for point in self.points())  # ids only grow


def _place(address: int | str) -> str:
    return f"{address:#x}" if isinstance(address, int) else address


def _point_of(line: str) -> Point:
    number, what = line.split(" ", 1)
    words = dict(word.split("=", 1) for word in what.split() if word.startswith(("hits=", "by=")))
    return Point(int(number), what, int(words.get("hits", "0")), words.get("by", ""))
