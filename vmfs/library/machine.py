"""Machine: one CPU and the memory that it is given, in the process that makes it."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import index
from types import TracebackType
from typing import Any

from vmfs.engine.base import TraceRequest, Vcpu
from vmfs.library.exits import Interrupt, Syscall
from vmfs.library.hooks import BLOCK, CODE, FIRST, MEMORY, CoreDriver, Driver, Hook, check_engine, check_range
from vmfs.library.memory import TABLES, Memory, Region
from vmfs.library.registers import with_registers
from vmfs.memory.mapping import PAGE
from vmfs.words import exits
from vmfs.words.errors import Busy, Gone, Invalid, NotThere, Unsupported
from vmfs.words.exits import Exit
from vmfs.words.modes import MODES, flat

EXCEPTIONS = tuple(range(32))
# Where what the modes need lies, after all that may be mapped (of KVM: that the host's processor may have).
_TABLES = {"long": 0x7F_FFFF_0000, "protected": 0xFF00_0000}
_KVM_TABLES = {"long": 0xC000_0000, "protected": 0xC000_0000}
_TABLES_SIZE = 0x8000
_SYSCALL_AT = 0x7000  # of the tables: a HLT, which SYSCALL leads to
_STAR, _LSTAR, _FMASK, _EFER = 0xC0000081, 0xC0000082, 0xC0000084, 0xC0000080
_EFER_SCE = 1
_ROWS = ("cpuid", "sregs", "xcrs", "xsave", "msrs", "debugregs", "regs", "events", "mp_state", "progress")
_MACHINE_ROWS = ("time", "turns", "chips")
_CONTEXT = ("sregs", "xsave", "regs")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a machine was. `pages` are by their address; those that are not there are as they were mapped."""

    pages: dict[int, bytes]
    regions: tuple[Region, ...]
    machine: dict[str, bytes]
    cpu: dict[str, bytes]


@functools.cache
def _engine(name: str) -> Any:
    from vmfs.engine import by_name, choose

    return choose("auto") if name == "auto" else by_name(name)


@functools.lru_cache(maxsize=8)
def _tables(sregs: bytes, mode: str, at: int, large: bool) -> tuple[bytes, Region | None]:
    """The sregs of a mode, and what they refer to: read only, and the same in all machines."""
    found, tables = flat(sregs, mode, at, 512 if large else 4, large=large)
    if not tables:
        return found, None
    region = Region(at, _TABLES_SIZE, read_only=True, name=TABLES)
    region.view[: len(tables)] = tables
    region.view[_SYSCALL_AT] = 0xF4
    return found, region


class _Parts:
    """What `Machine` is made of; the registers are added to it. A name that is none of these cannot be set."""

    __slots__ = (
        "__weakref__", "_after", "_again", "_base", "_closed", "_coverage", "_cpu", "_driver", "_engine",
        "_get_register", "_hooks", "_machine", "_next_hook", "_set_register", "_stale", "_tables", "_until", "_vectors",
        "capabilities", "exceptions", "exit", "linux", "mem", "mode",
    )  # fmt: skip

    def __init__(
        self,
        mode: str = "long",
        memory: Mapping[int, int | bytes] | None = None,
        *,
        engine: str = "emulator",
        exceptions: str = "exit",
    ) -> None:
        """`memory`: at each address so many bytes, rounded up to pages, or these bytes. `exceptions`: each ends the
        run ("exit"), or they are the guest's, which has an IDT ("guest")."""
        if mode not in MODES:
            raise Invalid(f"there is no mode {mode}: {', '.join(MODES)}")
        if exceptions not in ("exit", "guest"):
            raise Invalid(f"exceptions: {exceptions!r} is neither exit nor guest")
        self.mode, self.exceptions = mode, exceptions
        self._engine = _engine(engine)
        self._machine = self._engine.create_machine()
        self._closed = False
        self._hooks: list[Hook] = []
        try:
            self._cpu: Vcpu = self._machine.create_vcpu(0)
            self.mem = Memory(self._machine)
            self.capabilities = self._machine.capabilities
            is_core = hasattr(self._cpu, "core")
            self._driver = (CoreDriver if is_core else Driver)(self._cpu, self.capabilities)
            self._get_register, self._set_register = self._driver.get_register, self._driver.set_register
            self._until: int | None = None
            self._next_hook = FIRST
            self._stale = True
            self._after: dict[str, Callable[..., Any]] = {}
            self._vectors = self._vectors_of_mode()
            self._base: Snapshot | None = None
            self._again: int | None = None
            self._coverage: Any = None
            self.exit: Exit | None = None
            self._set_mode(is_core)
            for address, what in (memory or {}).items():
                self.map(address, what)
        except BaseException:
            self.close()
            raise

    def _set_mode(self, is_core: bool) -> None:
        at = (_TABLES if is_core else _KVM_TABLES).get(self.mode, 0)
        sregs, region = _tables(self._cpu.get_state("sregs"), self.mode, at, is_core or self.mode != "long")
        self._tables = at
        if region is not None:
            self.mem.map(region)
        self._cpu.set_state("sregs", sregs)
        self.rip, self.rflags, self.rdx = 0, 2, 0  # rdx is the processor's signature after a reset

    # ---- life

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give back all of it. Busy in a hook."""
        if self._closed:
            return
        if hasattr(self, "_driver") and self._driver.inside:
            raise Busy("a hook cannot close the machine that it is of")
        if self._hooks:
            self._hooks.clear()
            self._driver.set((), None, ())  # a function may hold the machine, which holds the function
        self._machine.close()
        self._closed = True

    def __repr__(self) -> str:
        if self._closed:
            return f"<Machine {self.mode}, closed>"
        return f"<Machine {self.mode} on {self._engine.name}, {len(self.mem.regions)} regions, rip {self.rip:#x}>"

    @property
    def engine(self) -> str:
        return self._engine.name

    # ---- memory

    def map(self, address: int, what: int | bytes, *, read_only: bool = False, name: str = "") -> Region:
        """`what`: so many bytes of zeros, or these bytes; rounded up to whole pages."""
        self._check_open()
        size = what if isinstance(what, int) else len(what)
        region = Region(address, -(-size // PAGE) * PAGE or PAGE, read_only=read_only, name=name)
        self.mem.map(region)
        if not isinstance(what, int):
            region.view[: len(what)] = what
        return region

    def unmap(self, region: Region | int) -> None:
        """A region, or the one at an address. NotThere where there is none."""
        found = self.mem.find(region) if isinstance(region, int) else region
        if found not in self.mem.regions or found is None or found.name == TABLES:
            raise NotThere("there is no memory to be unmapped")
        self.mem.unmap(found)

    # ---- running

    def run(
        self,
        until: int | None = None,
        insns: int | None = None,
        timeout: float | None = None,
        *,
        start: int | None = None,
    ) -> Exit:
        """Run from `rip`, or `start`, to the next exit, which is also in `exit`. `until`: before the instruction at
        that address, a Debug. `insns`: after so many, a Limit. `timeout`: after so many seconds, a Limit. A breakpoint
        where the run begins does not stop it."""
        if self._closed:
            raise Gone("the machine was closed")
        if start is not None:
            self.rip = start
        if until != self._until:
            try:
                self._until, self._stale = until if until is None else index(until), True
            except TypeError:
                raise Invalid(f"until: {until!r} is no address") from None
        if self._again is not None:
            self._skip()
        driver, passes = self._driver, True
        budget, seconds = -1 if insns is None else insns, -1.0 if timeout is None else timeout
        counts = budget >= 0 and driver.counts
        before = driver.instructions() if counts else 0
        while True:
            if self._stale:
                self._apply()
            found = driver.run(self, budget, seconds, passes)
            if found is not None:
                handle = _HANDLERS.get(found.REASON)
                if handle is None or (found := handle(self, found)) is not None:
                    self.exit = found
                    return found
            passes = False
            if counts:
                done = driver.instructions()
                budget -= done - before
                before = done

    def stop(self) -> None:
        """End the run with Interrupted: from a hook, another thread or a signal handler."""
        self._cpu.kick()

    def _skip(self) -> None:
        """Go on after an INT n that was an exit."""
        size, self._again = self._again, None
        self.rip += size

    # ---- what a run comes to

    def _at_io(self, found: exits.Io) -> Exit | None:
        hook = self._after.get("ports")
        if hook is None:
            return found
        is_out = found.direction == "out"
        value = int.from_bytes(found.data, "little") if is_out else None
        result = hook(self, found.port, found.size, value)
        if is_out:
            return found if result else None
        if result is None:
            return found
        self.access_data = result
        return None

    def _at_mmio(self, found: exits.Mmio) -> Exit | None:
        hook = self._after.get("invalid")
        if hook is None:
            return found
        is_write = found.direction == "write"
        value = int.from_bytes(found.data, "little") if is_write else None
        result = hook(self, "write" if is_write else "read", found.addr, found.size, value)
        if result is None or result is False:
            return found
        if is_write:
            if found.addr in self.mem:
                self.mem.write(found.addr, found.data)
        elif result is not True:
            self.access_data = result
        else:
            from vmfs.engine.rest import given_up

            self._cpu.set_state("progress", given_up(self._cpu.get_state("progress")))
        return None

    def _at_hlt(self, found: exits.Hlt) -> Exit | None:
        if self.mode == "real" or found.rip != self._tables + _SYSCALL_AT + 1:
            return found
        self.rip, self.rflags = self.rcx, self.r11
        hook = self._after.get("syscall")
        if hook is None:
            return Syscall(rip=self.rip, number=self.rax)
        result = hook(self)
        if isinstance(result, Exit):
            return result
        return Syscall(rip=self.rip, number=self.rax) if result else None

    def _at_debug(self, found: exits.Debug) -> Exit | None:
        if found.cause != "exception" or found.vector is None:
            return found
        vector, size = found.vector, 0
        code = self._code()
        if code[:1] == b"\xcd" and (vector in (code[1], 13)):
            vector, size = code[1], 2
        elif code[:1] in (b"\xcc", b"\xf1", b"\xce") and vector in (1, 3, 4):
            size = 1
        hook = self._after.get(f"vector {vector}") or self._after.get("vectors")
        if hook is None:
            if size:
                self._again = size
                return Interrupt(rip=found.rip, vector=vector)
            return found
        self.rip += size
        rip = self.rip
        self.exit = found
        if not hook(self, vector):
            return Interrupt(rip=rip, vector=vector) if size else found
        self.rip = self.rip  # the exception is another one, if it comes again
        return None

    def _code(self) -> bytes:
        try:
            return self.mem.read(self._linear(), 2)
        except Exception:  # the last byte of the last page, or no memory at all
            return b"\0\0"

    def _linear(self) -> int:
        return self.rip if self.mode == "long" else self.cs_base + self.rip

    @property
    def access_data(self) -> bytes:
        """The bytes of the access that was the last exit; of a read, what the next run gives to the guest: set it to
        bytes or a number."""
        return self._cpu.access_data

    @access_data.setter
    def access_data(self, value: int | bytes) -> None:
        size = len(self._cpu.access_data)
        if isinstance(value, int):
            value = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        self._cpu.access_data = value

    # ---- hooks

    def hook_code(
        self,
        call: Callable[[Any, int], Any] | None = None,
        begin: int = 0,
        end: int | None = None,
        *,
        stop: bool = False,
    ) -> Hook:
        """`call(machine, address)` before each instruction from `begin` to before `end`; what is true ends the run.
        Without a call it counts alone, in C. `stop`: it ends the run."""
        return self._add_hook(CODE, call, begin, end, stop)

    def hook_address(self, address: int, call: Callable[[Any, int], Any] | None = None, *, stop: bool = False) -> Hook:
        """`hook_code` of one address, which costs nothing elsewhere."""
        return self._add_hook(CODE, call, address, address + 1, stop)

    def hook_block(
        self,
        call: Callable[[Any, int], Any] | None = None,
        begin: int = 0,
        end: int | None = None,
        *,
        stop: bool = False,
    ) -> Hook:
        """As `hook_code`, where a straight run of instructions begins: what a jump leads to."""
        return self._add_hook(BLOCK, call, begin, end, stop)

    def hook_memory(
        self,
        call: Callable[[Any, bool, int, int, int], Any] | None = None,
        begin: int = 0,
        end: int | None = None,
        *,
        read: bool = True,
        write: bool = True,
        stop: bool = False,
    ) -> Hook:
        """`call(machine, is_write, address, size, value)` after an instruction that accessed memory there: its first
        access. `value` is what is there after it."""
        if not (read or write):
            raise Invalid("a hook of memory is for reads, for writes, or for both")
        return self._add_hook(MEMORY, call, begin, end, stop, read, write)

    def hook_ports(self, call: Callable[[Any, int, int, int | None], Any] | None) -> None:
        """`call(machine, port, size, value)` for each IN and OUT. For IN value is None, and what it gives is read (None
        ends the run); for OUT what is true ends the run. None: no hook."""
        self._set_after("ports", call)

    def hook_invalid(self, call: Callable[[Any, str, int, int, int | None], Any] | None) -> None:
        """`call(machine, "read" or "write", address, size, value)` where there is no memory. A number or bytes are what
        is read; True goes on: the read is done again, the write done where there is memory by now. Else the run
        ends."""
        self._set_after("invalid", call)

    def hook_syscall(self, call: Callable[[Any], Any] | None) -> None:
        """`call(machine)` for each SYSCALL, with the registers as the guest has set them and rip after it; what is true
        ends the run, with a Syscall, or with the exit that it is."""
        if self.mode != "long":
            raise Unsupported("SYSCALL is hooked in long mode; elsewhere hook its interrupt")
        self._set_after("syscall", call)
        self._cpu.set_msr(_EFER, self._cpu.get_msr(_EFER) | _EFER_SCE)
        self._cpu.set_msr(_STAR, 0x0008_0008 << 32)
        self._cpu.set_msr(_LSTAR, self._tables + _SYSCALL_AT)
        self._cpu.set_msr(_FMASK, 0)

    def hook_interrupt(self, call: Callable[[Any, int], Any] | None, vector: int | None = None) -> None:
        """`call(machine, vector)` for each INT n, after which rip is, and each exception, at which it is; or for one
        vector. True goes on from rip; else the run ends."""
        check_engine(self.capabilities, "hook_interrupt")
        self._set_after("vectors" if vector is None else f"vector {vector}", call)
        if vector is None or vector not in self._vectors:
            self._vectors = tuple(sorted({*self._vectors, *(EXCEPTIONS if vector is None else (vector,))}))
            self._set_stale()

    def _set_after(self, what: str, call: Callable[..., Any] | None) -> None:
        if call is None:
            self._after.pop(what, None)
        else:
            self._after[what] = call

    def _add_hook(
        self,
        kind: str,
        call: Callable[..., Any] | None,
        begin: int,
        end: int | None,
        stop: bool,
        read: bool = False,
        write: bool = False,
    ) -> Hook:
        self._check_open()
        begin, end = check_range(begin, end)
        hook = Hook(self, self._next_hook, kind, call, begin, end, stop, read, write)  # type: ignore[arg-type]
        self._next_hook += 1
        self._hooks.append(hook)
        try:
            self._set_stale()
        except Unsupported:
            self._hooks.remove(hook)
            self._set_stale()
            raise
        return hook

    def _remove_hook(self, hook: Hook) -> None:
        if hook in self._hooks:
            hook._hits = hook.hits
            self._hooks.remove(hook)
            self._set_stale()

    def unhook(self) -> None:
        """Remove all hooks."""
        for hook in list(self._hooks):
            self._remove_hook(hook)
        self._after.clear()
        if self._vectors != self._vectors_of_mode():
            self._vectors = self._vectors_of_mode()
            self._set_stale()

    def _vectors_of_mode(self) -> tuple[int, ...]:
        return EXCEPTIONS if self.exceptions == "exit" else ()

    def _set_stale(self) -> None:
        """The hooks are others now; those of a run under way are when the hook that changes them is done."""
        self._stale = True
        if self._driver.inside:
            self._driver.leave()
        else:
            self._apply()

    def _apply(self) -> None:
        self._driver.set(tuple(self._hooks), self._until, self._vectors)
        self._stale = False

    # ---- the past

    def snapshot(self) -> Snapshot:
        """What it is now: registers, memory, the access that waits. Snapshots of a machine share the pages that are
        equal."""
        self._check_open()
        written = self.mem.take_written()
        if self._base is None:
            pages = {page: self.mem.read(page, PAGE) for page in self.mem.touched()}
        else:
            pages = dict(self._base.pages)
            pages.update((page, self.mem.read(page, PAGE)) for page in written if page in self.mem)
        found = Snapshot(
            pages, tuple(self.mem.regions), self._machine.get_states(_MACHINE_ROWS), self._cpu.get_states(_ROWS)
        )
        self._base = found
        return found

    def restore(self, snapshot: Snapshot) -> None:
        """Be what the machine was then; what differs is set. Hooks stay as they are."""
        base, pages = self._base, self.mem.take_written()
        if base is None:
            raise Invalid("the snapshot is of another machine")
        if snapshot.regions != tuple(self.mem.regions):
            pages |= self._restore_regions(snapshot.regions)
        if snapshot is not base:
            pages |= {
                page
                for page in base.pages.keys() | snapshot.pages.keys()
                if base.pages.get(page) is not snapshot.pages.get(page)
            }
        if pages:
            self.mem.put(pages, snapshot.pages)
        self._put_states(snapshot.machine, snapshot.cpu)
        self._base, self._again = snapshot, None

    def _restore_regions(self, regions: tuple[Region, ...]) -> set[int]:
        """Map what was mapped then; the pages of what was not mapped any more."""
        for region in list(self.mem.regions):
            if region not in regions:
                self.mem.unmap(region)
        pages: set[int] = set()
        for region in regions:
            if region not in self.mem.regions:
                self.mem.map(region)
                pages.update(range(region.address, region.end, PAGE))
        return pages

    def save(self) -> bytes:
        """What the machine is now, for `Machine.load`, here or elsewhere; without hooks."""
        from vmfs.library.saved import write

        out = io.BytesIO()
        write(self, out)
        return out.getvalue()

    def _what_it_is(self) -> tuple[dict[str, bytes], dict[str, bytes], set[int]]:
        """The states of the machine and its CPU, and the pages that may be other than zeros."""
        self._check_open()
        touched = self.mem.touched()
        if self._base is not None:
            touched |= self.snapshot().pages.keys()
        return self._machine.get_states(_MACHINE_ROWS), self._cpu.get_states(_ROWS), touched

    def _begin_over_grounds(self) -> None:
        """It was just made over memory of which each page that is written from now on is known."""
        self.mem.take_written()
        self._base = Snapshot({}, tuple(self.mem.regions), {}, {})

    @classmethod
    def load(cls, data: bytes, *, engine: str | None = None) -> Any:
        """The machine that `save` has put into bytes. Invalid where they are damaged, or of something else."""
        from vmfs.library.saved import load

        return load(cls, data, engine)

    def _put_states(self, machine: dict[str, bytes], cpu: dict[str, bytes]) -> None:
        self._machine.put_states(machine)
        self._cpu.put_states(cpu)

    def save_context(self) -> dict[str, bytes]:
        """The registers alone: of the program, SSE and AVX, segments and control registers."""
        return self._cpu.get_states(_CONTEXT)

    def load_context(self, context: dict[str, bytes]) -> None:
        self._cpu.put_states(context)

    # ---- looking

    def trace(self, *, instructions: bool = True, memory: bool = False, begin: int = 0, end: int | None = None) -> Any:
        """A Trace, which records from now until it is closed: `with machine.trace() as trace`."""
        from vmfs.library.trace import Trace

        check_engine(self.capabilities, "trace")
        if self._coverage is not None:
            raise Busy("the machine counts coverage; one of that and a trace is on")
        return Trace(self._cpu, instructions, memory, *check_range(begin, end))

    def coverage(self, size: int = 1 << 16, begin: int = 0, end: int | None = None) -> bytearray:
        """A buffer in which each jump that is taken is counted in a byte, as AFL's map has it, from now on. `size` is a
        power of 2; 0 switches it off."""
        check_engine(self.capabilities, "coverage")
        begin, end = check_range(begin, end)
        found = bytearray(size)
        try:
            self._cpu.set_trace(TraceRequest(place=(begin, end - 1), coverage=found if size else None), lambda *_: None)
        except (Busy, Invalid) as error:
            raise Invalid(f"coverage: {size} bytes are no power of 2 from 256 on, or the machine runs") from error
        self._coverage = found if size else None
        return found

    def asm(self, text: str, address: int | None = None) -> bytes:
        """Assemble for the machine's mode, with keystone; to `address`, if there is one."""
        try:
            import keystone
        except ImportError:
            raise Unsupported("asm needs keystone: pip install keystone-engine") from None
        bits = {"real": keystone.KS_MODE_16, "protected": keystone.KS_MODE_32, "long": keystone.KS_MODE_64}[self.mode]
        try:
            code = bytes(keystone.Ks(keystone.KS_ARCH_X86, bits).asm(text, address or 0)[0] or b"")
        except keystone.KsError as error:
            raise Invalid(f"asm: {error}") from error
        if address is not None:
            self.mem.write(address, code)
        return code

    def disasm(self, address: int | None = None, count: int = 1) -> list[tuple[int, bytes, str]]:
        """(address, code, text) of instructions at rip, or there."""
        from vmfs.debug.disasm import disassemble

        def read(at: int, size: int) -> bytes:
            region = self.mem.find(at)
            return b"" if region is None else self.mem.read(at, min(size, region.end - at))

        bits = {"real": 16, "protected": 32, "long": 64}[self.mode]
        found = disassemble(read, self._linear() if address is None else address, bits, count)
        return [(one.address, one.code, one.text) for one in found]

    @classmethod
    def elf(cls, path: str | os.PathLike[str], arguments: tuple[str, ...] = (), **options: Any) -> Any:
        """A static Linux program, ready to run, in a Machine whose SYSCALLs `vmfs.library.linux` answers."""
        from vmfs.library.linux import load

        return load(cls, os.fspath(path), arguments, options)

    def registers(self) -> dict[str, int]:
        """The general registers, rip and rflags."""
        from vmfs.words.layouts import GENERAL

        return {name: getattr(self, name) for name in GENERAL}

    def __iter__(self) -> Iterator[Region]:
        return iter(self.mem.regions)

    def _check_open(self) -> None:
        if self._closed:
            raise Gone("the machine was closed")


_HANDLERS: Mapping[str, Callable[[Any, Any], Exit | None]] = {
    "io": _Parts._at_io,
    "mmio": _Parts._at_mmio,
    "hlt": _Parts._at_hlt,
    "debug": _Parts._at_debug,
}

IP = 17  # the number of rip for `_get_register`, on every engine


class Machine(_Parts):
    __doc__ = _Parts.__doc__
    __slots__ = ()


with_registers(Machine, IP)
