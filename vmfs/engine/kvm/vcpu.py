"""A vCPU of KVM: running it, its exits, its interrupts, its debug registers. Its state is in state.py."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from vmfs.engine.base import INTERRUPT_QUEUE, SIZES, SLEEP_MOST, UNCLAIMED_MSRS, DebugRequest, Vcpu
from vmfs.engine.kvm import abi, debugregs, progress, stepping
from vmfs.engine.kvm._run import Runner, Wires
from vmfs.engine.kvm.abi import Cap, ExitReason, InternalError, Ioctl
from vmfs.engine.kvm.call import ioctl, ioctl_set
from vmfs.engine.kvm.host import HostFacts
from vmfs.engine.kvm.state import VcpuState
from vmfs.engine.rest import NOTHING, Flag, Progress, Read, Reading
from vmfs.words import exits, layouts
from vmfs.words.errors import EngineFailed, Invalid, Unsupported, WouldBlock
from vmfs.words.exits import Exit, unpack_access
from vmfs.words.layouts import put_quad, quad, with_quad
from vmfs.words.modes import CR0_PG, RFLAGS_IF, CodeMode, is_linear
from vmfs.words.unclaimed import Unclaimed, Use

# Blocked in every thread that runs a CPU, and unblocked by KVM while the guest runs: a kick makes KVM_RUN
# return EINTR, and no handler is needed (api.rst, KVM_SET_SIGNAL_MASK).
KICK_SIGNAL = signal.SIGRTMIN
_KICK_SIGNALS = frozenset({KICK_SIGNAL})

_RUN = int(Ioctl.KVM_RUN)
_EXIT_REASON = abi.RUN_EXIT_REASON // 4  # in words of 4 bytes
_RIP = (abi.RUN_SYNC_REGS + layouts.RIP) // 8  # in words of 8 bytes

_HLT = 0xF4
_CR4_PGE = 1 << 7
# PICs, PIT, port B, ELCRs: with interrupt controllers they are KVM's.
_PORTS_OF_KVM = (0x20, 0x21, *range(0x40, 0x44), 0x61, 0xA0, 0xA1, 0x4D0, 0x4D1)

# Where the bytes of the last exit's access lie in the kvm_run mapping: offset, size, whether the guest waits
# for them. A plain tuple and no class, because one is made at each exit.
_Access = tuple[int, int, bool]
_NO_ACCESS: _Access = (0, 0, False)


class KvmVcpu(Vcpu):
    """A vCPU descriptor and its kvm_run mapping."""

    def __init__(
        self,
        index: int,
        fd: int,
        device: int,
        vm: int,
        *,
        has_irqchip: bool,
        pvm: bool,
        read_memory: Callable[[int, int], bytes],
        read_pins: Callable[[], tuple[int, ...]],
        is_alone: Callable[[], bool],
        threads: threading.local,
        facts: HostFacts,
    ) -> None:
        self.index = index
        self._fd = fd
        self._threads = threads
        self._has_irqchip = has_irqchip
        self._pvm = pvm
        self._read_memory = read_memory
        self._read_pins = read_pins  # the IOAPIC's redirection entries
        self._is_alone = is_alone  # whether the machine has no other CPU
        self._state = VcpuState(index, fd, device, vm, has_irqchip=has_irqchip, facts=facts)
        block_irq = facts.extension(vm, Cap.KVM_CAP_SET_GUEST_DEBUG2)
        self._step_flags = max(block_irq, 0) & abi.KVM_GUESTDBG_BLOCKIRQ
        # For kick, interrupt and nmi from other threads. Reentrant, because a Python signal handler may call
        # them in the very thread that holds it.
        self._lock = threading.RLock()
        self._runner: int | None = None  # the thread in KVM_RUN, by threading.get_ident(); see _leave
        self._kicked = False
        self._vectors: deque[int] = deque()
        self._injected = 0
        self._nmi = False
        self._unclaimed_msrs: Unclaimed[int] = Unclaimed(UNCLAIMED_MSRS)
        self._may_sleep = has_irqchip  # HLT may have been executed, or be in the state that was set
        self._closing = threading.Event()
        self._looker: threading.Thread | None = None
        self._mask_thread: object = None  # the thread whose signal mask KVM_SET_SIGNAL_MASK was made from
        self._access = _NO_ACCESS
        self._written = b""  # the bytes of a write that is no longer in the mapping
        self._is_fresh = False  # kvm_run says what is true now of the state
        self._completes = False  # KVM may do the rest of the last access at the next KVM_RUN
        self._asked = (Reading.NONE, 0, 0)  # what the last read was of: its address, bytes an element
        self._reads: tuple[Read, ...] = ()  # memory-mapped, that the instruction of the last read has done before it
        self._read_at = b""  # the registers at the last memory-mapped read
        self._again: progress.Again | None = None  # a read of another machine, which the next run takes up
        self._before = NOTHING  # what was counted on another engine
        self._stash: deque[Exit] = deque()  # exits that came while an access was completed
        self._plan = debugregs.NO_PLAN
        self._passing: int | None = None  # the breakpoint there has stopped the CPU: it is no stop again
        self._due: exits.Debug | None = None  # comes when the `in` that waits has its bytes
        self._run_page = mmap.mmap(fd, facts.run_size(device))
        self._words = memoryview(self._run_page).cast("I")
        self._quads = memoryview(self._run_page).cast("Q")
        self._run_page[abi.RUN_VALID_REGS] = abi.SYNC_X86_REGS  # rip at each exit without another ioctl
        self.wires: Wires | None = None  # to the devices in C of a board
        self._due_has_changed = False
        self._by_lane = Runner(fd, self._run_page, index, not pvm)

    # Running

    def run(self, budget: int | None = None, *, goes_on: bool = False) -> Exit:
        if budget is not None:
            raise Unsupported("KVM cannot count instructions: no budget")
        if self._fd < 0:
            raise EngineFailed("KVM_RUN: the machine is closed")
        token = getattr(self._threads, "token", None)
        if token is None or token is not self._mask_thread:
            self._enter_thread()
        if self._stash and not self._kicked:
            return self._pop_stash()
        self._runner = threading.get_ident()
        try:
            if self._again is not None and (exit_ := self._take_up(self._again)) is not None:
                return exit_
            if self._may_sleep and self._is_asleep():
                return self._run_asleep(goes_on)
            return self._note_sleep(self._run_awake(goes_on))
        finally:
            self._leave()

    def _run_awake(self, goes_on: bool) -> Exit:
        if self._plan is debugregs.NO_PLAN:
            return self._run_until_exit(debugregs.NOTHING)
        return self._run_debugged(goes_on)

    # Runs by C code, in the thread of this CPU's runs, and what is to be known after them

    @property
    def lane(self) -> object | None:  # type: ignore[override]
        """Where a run is KVM_RUN and no more."""
        is_plain = (
            self._mask_thread is not None
            and not self._has_irqchip
            and self._plan is debugregs.NO_PLAN
            and not (self._stash or self._vectors or self._nmi or self._due)
            and self._fd >= 0
            and not self._run_page[abi.RUN_REQUEST_INTERRUPT_WINDOW]
        )
        return self._by_lane.lane if is_plain else None

    def left_exit(self) -> Exit:
        return self._take_left(*self._by_lane.left(True))

    def ended_exit(self) -> Exit | None:
        exit_, data, offset, size, reads, completes, kind, error, has_more = left = self._by_lane.left(False)
        if kind >= 0:
            return self._take_left(*left)
        self._access, self._written = _NO_ACCESS, b""
        self._completes, self._is_fresh = False, True
        if error in (errno.EINTR, errno.EAGAIN):
            return exits.Interrupted(rip=self._rip(), cpu=self.index) if self._take_kick() else None
        if error:
            raise EngineFailed(f"KVM_RUN: {os.strerror(error)}")
        if not has_more:
            return self._decode(debugregs.NOTHING)
        second = self._decode(debugregs.NOTHING)  # of the instruction of an OUT, which has ended with the first
        if second is not None and not self._access[2]:
            self._stash.append(second)
        self._finish_access(debugregs.NOTHING)
        first = self._take_left(exit_, data, offset, size, reads, completes, kind, error, has_more)
        first.rip = self._rip()
        return first

    def _take_left(
        self, packed: bytes, data: bytes, offset: int, size: int, reads: bool, completes: bool, *_: object
    ) -> Exit:
        """The exit of a run by `lane`; its access is the pending one."""
        self._access, self._written = (offset, size, reads), b""
        self._completes, self._is_fresh = completes, True
        return unpack_access(packed, data)

    # HLT with interrupt controllers: KVM sleeps in the kernel, and there is no exit. It is found by looking, when a run
    # begins, when a signal ends KVM_RUN, and so that there is one, every SLEEP_MOST seconds.

    def _look_now_and_then(self) -> None:
        """In a thread of its own: have a CPU in KVM_RUN come out and look."""
        while not self._closing.wait(SLEEP_MOST):
            with self._lock:
                if self._runner is not None:
                    signal.pthread_kill(self._runner, KICK_SIGNAL)

    def _note_sleep(self, exit_: Exit) -> Exit:
        """After a run: whether the next one may find the CPU asleep, or this one found it so for good."""
        if not self._has_irqchip:
            return exit_
        self._may_sleep = isinstance(exit_, exits.Interrupted | exits.Debug)
        if isinstance(exit_, exits.Interrupted) and self._sleeps_for_good():
            return self._halted()
        return exit_

    def _run_asleep(self, goes_on: bool) -> Exit:
        if self._sleeps_for_good():
            return self._halted()
        if not self._plan.hardware.step:
            return self._note_sleep(self._run_awake(goes_on))
        overslept = threading.Event()

        def wake() -> None:
            overslept.set()
            self.kick()

        timer = threading.Timer(SLEEP_MOST, wake)
        timer.daemon = True
        timer.start()
        try:
            exit_ = self._note_sleep(self._run_awake(goes_on))
        finally:
            timer.cancel()
            timer.join()
        if overslept.is_set() and isinstance(exit_, exits.Interrupted):
            return exits.Limit(rip=exit_.rip, cpu=self.index)
        return exit_

    def _is_asleep(self) -> bool:
        return self._state.get("mp_state") != layouts.RUNNABLE

    def _sleeps_for_good(self) -> bool:
        """Whether nothing can wake it. There is no other CPU, and it waits for an INIT or a SIPI; or it is in HLT with
        interrupts off, no event is pending, and neither a pin nor a device's message can be an NMI."""
        mp_state = self._state.get("mp_state")
        if mp_state == layouts.RUNNABLE or not self._is_alone():
            return False
        if mp_state != layouts.HALTED:
            return True
        self._deliver_nmi()
        if quad(self._state.get("regs"), layouts.RFLAGS) & RFLAGS_IF:
            return False
        events = self._state.get("events")
        return not any(events[at] for at in layouts.UNDER_WAY) and not self._can_get_nmis()

    def _can_get_nmis(self) -> bool:
        """Whether LINT0, a pin of the IOAPIC, or a device is set up to send an NMI or an INIT."""
        if self.wires is not None and self.wires.can_send_unmaskable():
            return True
        entries = [struct.unpack_from("<I", self._state.get("lapic"), layouts.LAPIC_LINT0)[0], *self._read_pins()]
        return any(not entry & abi.ENTRY_MASKED and entry >> 8 & 7 in abi.UNMASKABLE_MODES for entry in entries)

    def _halted(self) -> Exit:
        """The next run goes on after HLT."""
        if self._state.get("mp_state") == layouts.HALTED:
            self._state.set("mp_state", layouts.RUNNABLE)
            self._may_sleep = False
        self._access, self._written = _NO_ACCESS, b""
        return exits.Hlt(rip=quad(self._state.get("regs"), layouts.RIP), cpu=self.index)

    def _pop_stash(self) -> Exit:
        exit_ = self._stash.popleft()
        self._access, self._written = _NO_ACCESS, getattr(exit_, "data", b"")
        return exit_

    def _leave(self) -> None:
        """This thread may end now. A kick sets `_kicked`, then reads `_runner` and signals that thread."""
        self._runner = None
        if self._kicked or self._looker is not None:
            with self._lock:  # until it has
                pass

    def _run_until_exit(self, points: debugregs.HardwarePoints) -> Exit:
        page = self._run_page
        while True:
            if self._vectors or self._nmi or page[abi.RUN_REQUEST_INTERRUPT_WINDOW]:
                exit_ = self._offer_interrupts(points)
                if exit_ is not None:
                    return exit_
            # In steps each access is one.
            if not self._kvm_run(self.wires if self._plan is debugregs.NO_PLAN else None):
                if self._take_kick() | self._take_due():
                    self._access, self._written = _NO_ACCESS, b""
                    return exits.Interrupted(rip=self._rip(), cpu=self.index)
                if self._has_irqchip and self._sleeps_for_good():
                    return self._halted()
                continue  # another signal, whose Python handler runs now
            exit_ = self._decode(points)
            if exit_ is not None:
                return exit_

    def _enter_thread(self) -> None:
        """Block the kick's signal in this thread, and have KVM unblock it while the guest runs.

        `threading.local` and not the thread's ident tells threads apart: idents are used again.
        """
        thread = getattr(self._threads, "token", None)
        if thread is self._mask_thread and thread is not None:
            return
        self._state.changes()  # each first run of a CPU comes by here
        if self._has_irqchip and self._looker is None:
            self._looker = threading.Thread(target=self._look_now_and_then, name=f"vmfs-look{self.index}", daemon=True)
            self._looker.start()
        if thread is None:
            signal.pthread_sigmask(signal.SIG_BLOCK, _KICK_SIGNALS)
            thread = self._threads.token = object()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - _KICK_SIGNALS
        sigset = sum(1 << number - 1 for number in blocked)
        ioctl(self._fd, Ioctl.KVM_SET_SIGNAL_MASK, bytearray(abi.SIGNAL_MASK.pack(8, sigset)))
        self._mask_thread = thread

    def last_exits(self) -> list[Exit]:
        return [unpack_access(packed, data) for packed, data in self._by_lane.last()]

    def _kvm_run(self, wires: Wires | None = None) -> bool:
        """KVM_RUN; false when a signal or `immediate_exit` ended it. What the bus of the wires answers ends none."""
        try:
            if wires is None:
                fcntl.ioctl(self._fd, _RUN, 0)
                self._by_lane.note()
            elif (error_number := self._by_lane.go(wires)) < 0:
                self._due_has_changed = True
                return False
            elif error_number:
                raise OSError(error_number, os.strerror(error_number))
        except OSError as error:
            if error.errno == errno.EINTR:
                return False
            if error.errno == errno.EAGAIN:  # a CPU that waited for its INIT or SIPI got one (in-kernel LAPIC)
                return False
            raise EngineFailed(f"KVM_RUN: {os.strerror(error.errno)}") from error
        finally:
            self._completes = False
            self._is_fresh = True
        return True

    def _kvm_run_nothing(self) -> bool:
        """KVM_RUN that finishes the last access and does not run the guest; false when that was no new exit.

        api.rst, kvm_run.immediate_exit.
        """
        self._run_page[abi.RUN_IMMEDIATE_EXIT] = 1
        try:
            return self._kvm_run()
        finally:
            with self._lock:
                self._run_page[abi.RUN_IMMEDIATE_EXIT] = self._kicked

    def _rip(self) -> int:
        return self._quads[_RIP]

    # Kicks

    def kick(self) -> None:
        with self._lock:
            if self._fd < 0:
                return
            self._kicked = True
            # For a run that has not reached KVM_RUN; the signal is for one that is in it. A signal that is
            # left over, because the run ended by itself, finds no kick and is swallowed by _take_kick.
            self._run_page[abi.RUN_IMMEDIATE_EXIT] = 1
            thread = self._runner if self._runner is not None else self._by_lane.thread
            if thread is not None:
                signal.pthread_kill(thread, KICK_SIGNAL)

    def clear_kick(self) -> None:
        with self._lock:
            self._kicked = False
            if self._fd >= 0:
                self._run_page[abi.RUN_IMMEDIATE_EXIT] = 0

    def _take_due(self) -> bool:
        """Whether something is due on the bus at another time, which the board is to hear."""
        changed, self._due_has_changed = self._due_has_changed, False
        return changed

    def _take_kick(self) -> bool:
        """Consume the pending signal, then the kick: in this order, no kick is lost."""
        signal.sigtimedwait(_KICK_SIGNALS, 0)
        with self._lock:
            kicked = self._kicked
            self.clear_kick()
        return kicked

    # Interrupts

    def interrupt(self, vector: int) -> None:
        if self._has_irqchip:
            raise Unsupported("the machine has interrupt controllers, and they make the vectors: use a line")
        if not 0 <= vector <= 255:
            raise Invalid(f"{vector} is no vector: 0 to 255")
        with self._lock:
            if len(self._vectors) >= INTERRUPT_QUEUE:
                raise WouldBlock(f"{INTERRUPT_QUEUE} interrupts wait already")
            self._vectors.append(vector)

    @property
    def queued_vectors(self) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._vectors)

    @property
    def interrupts_queued(self) -> int:
        return len(self._vectors)

    @property
    def exits_waiting(self) -> bool:
        if not self._access[2]:  # a write is done; whether it was the last of its instruction, KVM tells now
            self.complete()
        return bool(self._stash)

    def nmi(self) -> None:
        # KVM_NMI would wait for the end of KVM_RUN: it is done by the running thread instead.
        with self._lock:
            self._nmi = True

    def _deliver_nmi(self) -> None:
        with self._lock:
            wanted, self._nmi = self._nmi, False
        if wanted:
            self._state.changes()
            ioctl(self._fd, Ioctl.KVM_NMI)

    def _offer_interrupts(self, points: debugregs.HardwarePoints) -> Exit | None:
        """Inject what the guest can take now; have KVM say when it can take more. In steps, all waits."""
        page = self._run_page
        if points.alone:
            page[abi.RUN_REQUEST_INTERRUPT_WINDOW] = 0
            return None
        self._deliver_nmi()
        if self._vectors:
            # ready_for_interrupt_injection is of the last KVM_RUN; the state may have been set since.
            if not self._is_fresh and self._kvm_run_nothing():
                return self._decode(points)
            if page[abi.RUN_READY_FOR_INTERRUPT] and page[abi.RUN_IF_FLAG]:
                vector = self._vectors.popleft()
                ioctl(self._fd, Ioctl.KVM_INTERRUPT, bytearray(abi.INTERRUPT.pack(vector)))
                self._injected += 1
        page[abi.RUN_REQUEST_INTERRUPT_WINDOW] = bool(self._vectors)
        return None

    def _on_irq_window_open(self, _points: debugregs.HardwarePoints) -> None:
        """Nothing to do: the vector is injected before the next KVM_RUN."""

    # Exits: a method each, and the table at the end; what returns None is not the caller's business.

    def _decode(self, points: debugregs.HardwarePoints) -> Exit | None:
        self._access, self._written = _NO_ACCESS, b""
        reason = self._words[_EXIT_REASON]
        handler = _HANDLERS.get(reason)
        if handler is None:
            return self._on_other(reason)
        return handler(self, points)

    def _on_io(self, points: debugregs.HardwarePoints) -> Exit:
        page = self._run_page
        direction, size, port, count, offset = abi.RUN_IO.unpack_from(page, abi.RUN_UNION)
        length = size * count
        if direction == abi.KVM_EXIT_IO_OUT:
            data = page[offset : offset + length]
            if not self._pvm:  # rip may not have moved
                self._completes = True
                self._finish_access(points)
            self._access = (offset, length, False)
            return exits.Io(
                direction="out", port=port, size=size, count=count, data=data, rip=self._rip(), cpu=self.index
            )
        page[offset : offset + length] = b"\xff" * length  # what an empty bus reads as
        self._completes = True
        self._access = (offset, length, True)
        self._asked = (Reading.PORT, port, size)
        return exits.Io(direction="in", port=port, size=size, count=count, rip=self._rip(), cpu=self.index)

    def _on_mmio(self, _points: debugregs.HardwarePoints) -> Exit:
        page = self._run_page
        address, data, size, is_write = abi.RUN_MMIO.unpack_from(page, abi.RUN_UNION)
        self._completes = True
        rip = self._rip()
        if is_write:
            self._access = (abi.RUN_MMIO_DATA, size, False)
            return exits.Mmio(direction="write", addr=address, size=size, data=data[:size], rip=rip, cpu=self.index)
        self._note_read(address, size, data)
        page[abi.RUN_MMIO_DATA : abi.RUN_MMIO_DATA + size] = b"\xff" * size
        self._access = (abi.RUN_MMIO_DATA, size, True)
        return exits.Mmio(direction="read", addr=address, size=size, rip=rip, cpu=self.index)

    def _note_read(self, address: int, size: int, before: bytes) -> None:
        """Which reads are of one instruction, KVM does not tell. With the same registers, a second execution of an
        instruction would read from the same addresses: another address is the same execution's. `before` are the bytes
        that the read before this one has got."""
        registers = self._run_page[abi.RUN_SYNC_REGS : abi.RUN_SYNC_REGS + SIZES["regs"]]
        _, last, length = self._asked
        if registers != self._read_at or address in (last, *(read.address for read in self._reads)):
            self._reads = ()
        elif self._asked[0] is Reading.MEMORY:
            self._reads = (*self._reads, Read(last, before[:length]))
        self._read_at, self._asked = registers, (Reading.MEMORY, address, size)

    def _on_hlt(self, points: debugregs.HardwarePoints) -> Exit | None:
        if self._is_woken() and not points.alone:
            return None
        return exits.Hlt(rip=self._rip(), cpu=self.index)

    def _is_woken(self) -> bool:
        """Whether a vector waits that wakes the CPU from HLT: it is injected before the next KVM_RUN."""
        return bool(self._vectors and self._run_page[abi.RUN_IF_FLAG])

    def _on_msr(self, write: bool) -> None:
        """An MSR that the CPU does not have, or a value that it does not take: the guest gets its #GP, and the run
        goes on. KVM makes the #GP now, before an interrupt is injected, which would break into the handler.
        """
        _error, reason, index, _data = abi.RUN_MSR.unpack_from(self._run_page, abi.RUN_UNION)
        if reason == abi.KVM_MSR_EXIT_REASON_UNKNOWN or not write or not self._has_msr(index):
            self._unclaimed_msrs.note(index, self._rip(), write=write)
        self._run_page[abi.RUN_UNION] = 1  # error
        self._kvm_run_nothing()

    def _on_rdmsr(self, _points: debugregs.HardwarePoints) -> None:
        self._on_msr(write=False)

    def _on_wrmsr(self, _points: debugregs.HardwarePoints) -> None:
        self._on_msr(write=True)

    def _has_msr(self, index: int) -> bool:
        try:
            self._state.get_msr(index)
        except Invalid:
            return False
        return True

    def _on_shutdown(self, _points: debugregs.HardwarePoints) -> Exit:
        return exits.Shutdown(cause="triple-fault", rip=self._rip(), cpu=self.index)

    def _on_debug(self, points: debugregs.HardwarePoints) -> Exit | None:
        _exception, _pad, _pc, dr6, _dr7 = abi.RUN_DEBUG.unpack_from(self._run_page, abi.RUN_UNION)
        slots = points.hit(dr6)
        if slots:
            return self._stopped_by(slots)
        if points.step and dr6 & debugregs.DR6_SINGLE_STEP:
            return exits.Debug(cause="step", rip=self._rip(), cpu=self.index)
        # The guest's own: KVM intercepts every #DB while it debugs. Hand it back, with DR6 as the CPU had it.
        registers = bytearray(self._state.get("debugregs"))
        put_quad(registers, layouts.DR6, dr6)
        self._state.set("debugregs", bytes(registers))
        self._arm(points, abi.KVM_GUESTDBG_INJECT_DB)
        return None

    def _on_system_event(self, _points: debugregs.HardwarePoints) -> Exit:
        event = abi.RUN_SYSTEM_EVENT.unpack_from(self._run_page, abi.RUN_UNION)[0]
        if event == abi.SYSTEM_EVENT_SHUTDOWN:
            return exits.Shutdown(cause="poweroff", rip=self._rip(), cpu=self.index)
        if event == abi.SYSTEM_EVENT_RESET:
            return exits.Shutdown(cause="reset", rip=self._rip(), cpu=self.index)
        return self._error(f"KVM reports system event {event} (KVM_EXIT_SYSTEM_EVENT)")

    def _on_fail_entry(self, _points: debugregs.HardwarePoints) -> Exit:
        reason, cpu = abi.RUN_FAIL_ENTRY.unpack_from(self._run_page, abi.RUN_UNION)
        return self._error(
            f"host CPU {cpu} refused to enter the guest in the state it is in: hardware reason {reason:#x} "
            "(KVM_EXIT_FAIL_ENTRY)"
        )

    def _on_unknown(self, _points: debugregs.HardwarePoints) -> Exit:
        (reason,) = abi.RUN_UNKNOWN.unpack_from(self._run_page, abi.RUN_UNION)
        return self._error(f"KVM does not know the hardware's exit reason {reason:#x} (KVM_EXIT_UNKNOWN)")

    def _on_internal_error(self, _points: debugregs.HardwarePoints) -> Exit:
        page = self._run_page
        suberror, count, *data = abi.RUN_INTERNAL.unpack_from(page, abi.RUN_UNION)
        try:
            name = InternalError(suberror).name
        except ValueError:
            name = f"suberror {suberror}"
        if suberror == InternalError.KVM_INTERNAL_ERROR_EMULATION:
            code = ""
            if count >= 3 and data[0] & abi.EMULATION_FLAG_INSTRUCTION_BYTES:
                *_, size, insn = abi.RUN_EMULATION_FAILURE.unpack_from(page, abi.RUN_UNION)
                code = insn[:size].hex(" ")
            what = f"the code there is {code}" if code else "there is no code"
            return self._error(f"KVM cannot emulate the instruction at rip {self._rip():#x}: {what} ({name})")
        details = " ".join(f"{word:#x}" for word in data[: min(count, len(data))])
        return self._error(f"KVM gave up at rip {self._rip():#x} ({name}{', data ' + details if details else ''})")

    def _on_other(self, reason: int) -> Exit:
        try:
            name = ExitReason(reason).name
        except ValueError:
            name = f"exit reason {reason}"
        return self._error(f"KVM stopped for what this engine never asked for ({name})")

    def _error(self, reason: str) -> Exit:
        return exits.Error(reason=reason, rip=self._rip(), cpu=self.index)

    # Pending accesses

    @property
    def access_data(self) -> bytes:
        if self._again is not None and self._again.is_asking:
            return self._again.data
        offset, size, _is_read = self._access
        return self._run_page[offset : offset + size] if size else self._written

    @access_data.setter
    def access_data(self, data: bytes) -> None:
        offset, size, is_read = self._access
        again = self._again if self._again is not None and self._again.is_asking else None
        if not is_read and again is None:
            raise Invalid("no read waits for data")
        size = size if again is None else len(again.data)
        if len(data) != size:
            raise Invalid(f"the pending read takes {size} bytes, not {len(data)}")
        if again is not None:
            again.data = data
            return
        self._run_page[offset : offset + size] = data

    def _finish_access(self, points: debugregs.HardwarePoints) -> None:
        """Have KVM finish the last access, and the instruction with it, without running the guest.

        One instruction may have more of them: reads get all ones, writes and failures are the exits of the
        next runs.
        """
        while self._completes and self._kvm_run_nothing():
            if self._words[_EXIT_REASON] == ExitReason.KVM_EXIT_DEBUG:
                break  # the end of a single step, which the access has ended already
            exit_ = self._decode(points)
            _offset, _size, is_read = self._access
            if exit_ is not None and not is_read:
                self._stash.append(exit_)
        self._access = _NO_ACCESS

    # State

    def get_state(self, name: str) -> bytes:
        if name == "progress":
            return self._progress().pack()
        if name == "events":
            self._deliver_nmi()
        return self._state.get(name)

    def set_state(self, name: str, data: bytes) -> None:
        if name == "progress":
            self._set_progress(Progress.unpack(data))
            return
        if name != "cpuid":  # which is of no register, and refused once the CPU has run
            self.complete()
        self._state.set(name, data)
        if name == "events" and data[layouts.EVENTS_FLAGS] & layouts.EVENTS_SAY_NMI:
            with self._lock:
                self._nmi = False
        self._may_sleep |= self._has_irqchip and name == "mp_state"
        if name == "sregs" and not self._has_irqchip:
            # KVM_RUN loads CR8 from kvm_run when there is no LAPIC to hold it.
            at = layouts.CR8
            self._run_page[abi.RUN_CR8 : abi.RUN_CR8 + 8] = data[at : at + 8]

    def put_states(self, values: dict[str, bytes]) -> None:
        # KVM forgets what it has kept of page tables where KVM_SET_SREGS changes what they depend on.
        sregs = self.get_state("sregs")
        if quad(sregs, layouts.CR0) & CR0_PG:
            other = bytearray(sregs)
            put_quad(other, layouts.CR4, quad(sregs, layouts.CR4) ^ _CR4_PGE)
            self._state.set("sregs", bytes(other))
            self._state.set("sregs", sregs)
        so = {name for name, data in values.items() if name == "sregs" and data == sregs}
        if "cpuid" in values and self.has_cpuid(values["cpuid"]):
            so.add("cpuid")
        super().put_states({name: data for name, data in values.items() if name not in so})

    def has_cpuid(self, data: bytes) -> bool:
        return self._state.has_cpuid(data)

    def get_msr(self, index: int) -> int:
        return self._state.get_msr(index)

    def set_msr(self, index: int, value: int) -> None:
        self.complete()
        self._state.set_msr(index, value)

    def complete(self) -> None:
        kicked = self._kicked
        while self._again is not None:
            exit_ = self._take_up(self._again)
            if isinstance(exit_, exits.Interrupted):  # by a kick, which is for the next run
                continue
            if exit_ is not None and not self._access[2]:
                self._stash.append(exit_)
        if kicked and not self._kicked:
            self.kick()
        if self._completes:
            _offset, _size, is_read = self._access
            written = b"" if is_read else self.access_data
            self._finish_access(self._plan.hardware)
            if self._due is not None:
                self._stash.append(self._at_port(self._due))
                self._due = None
            self._written = written
        self._is_fresh = False

    # What it is in the middle of: progress.py

    def _progress(self) -> Progress:
        if not self._access[2]:  # the rest of a write is done now, and its exits wait
            if self._completes:
                self.complete()
        again, before = self._again, self._before
        kind, address, element = self._asked if self._access[2] else (Reading.NONE, 0, 0)
        flags = Flag.RESTART if kind else Flag(0)
        if self._passing is not None:
            flags |= Flag.RESUME
        now = Progress(
            flags=flags,
            instructions=before.instructions,
            interrupts=before.interrupts + self._injected,
            exceptions=before.exceptions,
            reading=kind,
            address=address,
            element=element,
            data=self.access_data if kind else b"",
            reads=self._reads if kind is Reading.MEMORY else (),
            exits=tuple(record for exit_ in self._stash for record in progress.waiting(exit_)),
            vectors=self.queued_vectors,
            msrs=self.unclaimed_msrs(),
        )
        if again is None:
            return now
        of = again.progress
        return replace(
            now, flags=flags | of.flags & (Flag.RESTART | Flag.FED), reading=of.reading, address=of.address,
            element=of.element, data=again.data, reads=of.reads,
        )  # fmt: skip

    def _set_progress(self, new: Progress) -> None:
        waiting = progress.exits_of(new.exits, self.index)
        if self._has_irqchip and new.vectors:
            raise Invalid("progress: the machine has interrupt controllers, and they make the vectors")
        if new.reading is not Reading.NONE and (new.element not in (1, 2, 4, 8) or len(new.data) > mmap.PAGESIZE):
            raise Invalid("progress: no instruction reads so")
        self._again = None
        self.complete()
        self._access, self._written, self._due = _NO_ACCESS, b"", None
        self._stash = deque(waiting)
        self._reads, self._read_at = (), b""
        with self._lock:
            self._vectors = deque(new.vectors)
        self._injected = 0
        self._before = Progress(instructions=new.instructions, interrupts=new.interrupts, exceptions=new.exceptions)
        self._unclaimed_msrs.put((index, Use(reads, writes, rip)) for index, reads, writes, rip in new.msrs)
        self._passing = None
        if new.flags & Flag.RESUME:
            self._passing = CodeMode.of(self._state.get("regs"), self._state.get("sregs")).address
        if new.reading is not Reading.NONE:
            self._again = progress.Again(new, new.data)

    def _take_up(self, again: progress.Again) -> Exit | None:
        """Have KVM where the read waits: its instruction is executed alone, up to the exit. Returns one of another
        kind."""
        self._again = None
        now = self._look()
        string = self._string_beyond(again, now) if again.progress.reading is Reading.PORT else None
        points = debugregs.NOTHING if self._pvm and now.cpl == 3 else replace(debugregs.NOTHING, step=True, alone=True)
        self._arm(points)
        try:
            exit_ = self._take_up_reads(again, points)
            if string is not None:
                if exit_ is None:
                    self._finish_access(points)
                self._set_count(string, now.rip)
            return exit_
        finally:
            self._arm(self._plan.hardware)

    def _string_beyond(self, again: progress.Again, now: stepping.Look) -> progress.StringCount | None:
        """Where a REP INS has more iterations than there are bytes for: KVM would ask for all of them at once. Its
        count is that of the bytes until these are stored."""
        code = bytes(byte for at in range(15) if (byte := self._opcode(now.linear + at)) is not None)
        regs = self._state.get("regs")
        string = progress.string_count(code, CodeMode.of(regs, self._state.get("sregs")).bits, regs)
        given = len(again.data) // again.progress.element
        if string is None or string.count <= given:
            return None
        self._state.set("regs", string.with_count(regs, given))
        return replace(string, count=string.count - given)

    def _set_count(self, string: progress.StringCount, rip: int) -> None:
        regs = string.with_count(self._state.get("regs"), string.count + string.left_in(self._state.get("regs")))
        self._state.set("regs", with_quad(regs, layouts.RIP, rip))
        self._is_fresh = False

    def _take_up_reads(self, again: progress.Again, points: debugregs.HardwarePoints) -> Exit | None:
        while True:
            exit_ = self._run_until_exit(points)
            if isinstance(exit_, exits.Interrupted):
                self._again = again
                return exit_
            offset, size, is_read = self._access
            if not is_read:
                # It came to its end without, or made another exit: code, or what it reads from, is not as it was.
                is_step = isinstance(exit_, exits.Debug) and exit_.cause == "step"
                return None if is_step and not self._plan.hardware.step else exit_
            if isinstance(exit_, exits.Mmio):
                known = again.known(exit_.addr, size)
                if known is None and not again.is_asked(exit_.addr, size):
                    return exit_
                self._run_page[offset : offset + size] = again.data if known is None else known
                if known is None:
                    return None
            elif isinstance(exit_, exits.Io):
                taken = again.take(exit_.port, exit_.size, exit_.count)
                if len(taken) < size:
                    return exit_
                self._run_page[offset : offset + size] = taken
                if not again.data:
                    self._look_at_port(exit_)
                    return None

    # Debugging

    def set_debug(self, request: DebugRequest) -> None:
        plan = debugregs.plan(request, has_watchpoints=not self._pvm)
        for ports in plan.ports if self._has_irqchip else ():
            if any(ports.first <= port <= ports.last for port in _PORTS_OF_KVM):
                raise Unsupported(
                    f"iobreak: ports {ports.first:#x}-{ports.last:#x} have some of the interrupt controllers "
                    "and the timer, which KVM answers without an exit"
                )
        self._arm(plan.hardware)
        self._plan = plan if plan != debugregs.NO_PLAN else debugregs.NO_PLAN

    def way_of(self, id_: int) -> str:
        return self._plan.ways.get(id_, "hardware")

    def _arm(self, points: debugregs.HardwarePoints, extra: int = 0) -> None:
        if points.step:
            extra |= self._step_flags
        ioctl_set(self._fd, Ioctl.KVM_SET_GUEST_DEBUG, points.pack(extra))

    def _run_debugged(self, goes_on: bool) -> Exit:
        """A run with something to stop for."""
        plan = self._plan
        if self._due is not None:
            return self._finish_input(plan)
        if self._completes and not self._access[2]:
            self._finish_access(plan.hardware)
            if self._stash:
                return self._pop_stash()
        run = self._run_stepping if plan.steps else self._run_hardware
        return self._look_at_port(run(plan, goes_on))

    def _run_hardware(self, plan: debugregs.Plan, goes_on: bool) -> Exit:
        """Stops that the debug registers have, and single steps.

        The instruction at a breakpoint is run by a single step without the breakpoint. RFLAGS.RF would do for
        the CPU, but KVM's emulator does not look at it.
        """
        wanted = plan.hardware
        if self._completes:  # the instruction has begun: breakpoints and the end of a step come after it
            return self._run_until_exit(wanted)
        if not (plan.breakpoints or wanted.step and self._pvm):
            self._arm(wanted)  # sets TF for the rip at this time
            return self._run_until_exit(wanted)
        now = self._look()
        here = now.linear in plan.breakpoints
        passing, self._passing = self._passing, None
        if here and goes_on and passing != now.linear:
            return self._at_breakpoint(now)
        if not here and not wanted.step:
            return self._run_until_exit(wanted)
        first = wanted.without(now.linear)
        if self._pvm and now.cpl == 3 and not wanted.step:
            return self._run_until_exit(wanted)
        try:
            exit_ = self._single_step(first, now)
        finally:
            if first != wanted:
                self._arm(wanted)
        if isinstance(exit_, exits.Interrupted) and exit_.rip == now.rip:
            self._passing = now.linear if here else None
        stepped = isinstance(exit_, exits.Debug) and exit_.cause == "step"
        woken = isinstance(exit_, exits.Hlt) and self._is_woken()
        if wanted.step or not (stepped or woken):
            return exit_
        if stepped and self._rip() != now.rip:
            now = self._look()
            if now.linear in plan.breakpoints:
                return self._at_breakpoint(now)
        return self._run_until_exit(wanted)

    def _run_stepping(self, plan: debugregs.Plan, goes_on: bool) -> Exit:
        """One instruction after the other, and a look at the CPU after each."""
        before = self._look()
        passes = not goes_on or self._passing == before.linear
        self._passing = None
        while True:
            if self._completes:
                exit_ = self._run_until_exit(replace(plan.hardware, step=True, alone=True))  # the step goes on
            elif before.linear in plan.breakpoints and not passes:
                return self._at_breakpoint(before)
            else:
                exit_ = self._single_step(plan.hardware.without(before.linear), before)
            after = self._look()
            found = list(stepping.changes(plan, before, after))
            if isinstance(exit_, exits.Debug) and exit_.cause != "step":
                found += [exit_, *exit_.also]
            is_step = isinstance(exit_, exits.Debug)
            if found:
                stop = stepping.joined(found, self.index)
                if is_step:
                    return stop
                self._stash.append(stop)
            if plan.hardware.step or not is_step:
                if isinstance(exit_, exits.Interrupted) and after.rip == before.rip and passes:
                    self._passing = before.linear
                return exit_
            before, passes = after, False

    def _single_step(self, armed: debugregs.HardwarePoints, now: stepping.Look) -> Exit:
        """One instruction at `now`, with its exit or with Debug(cause="step")."""
        if self._pvm:
            if now.cpl == 3:
                self._access, self._written = _NO_ACCESS, b""
                reason = "the host's KVM is PVM, without hardware, and cannot step in user mode"
                return exits.Error(reason=reason, rip=now.rip, cpu=self.index)
            if not self._has_irqchip and self._opcode(now.linear) == _HLT:
                armed = replace(armed, step=False)  # it ends the run by itself
        self._arm(armed)
        return self._run_until_exit(armed)

    def _at_breakpoint(self, now: stepping.Look) -> Exit:
        self._access, self._written = _NO_ACCESS, b""
        return self._breakpoints(now.linear, now.rip)

    def _breakpoints(self, linear: int, rip: int) -> exits.Debug:
        self._passing = linear
        ids = self._plan.breakpoints[linear]
        stops = [exits.Debug(cause="breakpoint", id=id_, rip=rip) for id_ in ids]
        return stepping.joined(stops, self.index)

    def _stopped_by(self, slots: tuple[debugregs.Slot, ...]) -> exits.Debug:
        """The exit of debug registers. A breakpoint comes before its instruction, so it comes alone."""
        rip = self._rip()
        for slot in slots:
            if not slot.kind:
                return self._breakpoints(slot.address, rip)
        # The pieces of one watchpoint are one stop.
        watches = {slot.point.id: slot for slot in reversed(slots)}
        stops = [exits.Debug(cause="watchpoint", id=id_, addr=slot.address, rip=rip) for id_, slot in watches.items()]
        return stepping.joined(stops, self.index)

    def _look_at_port(self, exit_: Exit) -> Exit:
        """Have the stops of a port come after an access to it."""
        if not self._plan.ports or not isinstance(exit_, exits.Io):
            return exit_
        stops = [
            exits.Debug(cause="io", id=ports.id, addr=exit_.port, rip=exit_.rip)
            for ports in self._plan.ports
            if ports.first < exit_.port + exit_.size and exit_.port <= ports.last
        ]
        if stops and exit_.direction == "out":
            self._stash.append(stepping.joined(stops, self.index))
        elif stops:
            self._due = stepping.joined(stops, self.index)
        return exit_

    def _finish_input(self, plan: debugregs.Plan) -> Exit:
        """Complete the `in` that waits at a watched port, and no more."""
        due, self._due = self._due, None
        # A repeated one may wait for more; and KVM_EXIT_DEBUG is the end of a step, which this ends already.
        if self._completes and self._kvm_run_nothing() and self._words[_EXIT_REASON] != ExitReason.KVM_EXIT_DEBUG:
            exit_ = self._decode(plan.hardware)
            if exit_ is not None:
                return self._look_at_port(exit_)
        self._access, self._written = _NO_ACCESS, b""
        assert due is not None
        return self._at_port(due)

    def _at_port(self, due: exits.Debug) -> exits.Debug:
        """The stop after an `in`, now that it is done."""
        rip = self._rip()
        for stop in (due, *due.also):
            stop.rip = rip
        return due

    def _look(self) -> stepping.Look:
        """The CPU now, and not at the last exit."""
        watched = tuple(
            stepping.watched_bytes(watch, self.translate, self._read_memory) for watch in self._plan.watches
        )
        return stepping.look(self._state.get("regs"), self._state.get("sregs"), watched)

    def _opcode(self, linear: int) -> int | None:
        """The byte of code there, or None where none can be read. A prefix counts as the opcode."""
        physical = self.translate(linear)
        code = b"" if physical is None else self._read_memory(physical, 1)
        return code[0] if code else None

    def translate(self, linear: int) -> int | None:
        linear &= (1 << 64) - 1
        if not is_linear(self._state.get("sregs"), linear):  # KVM_TRANSLATE takes the bits that it needs
            return None
        buffer = bytearray(abi.TRANSLATION.pack(linear, 0, 0, 0, 0))
        ioctl(self._fd, Ioctl.KVM_TRANSLATE, buffer)
        _linear, physical, valid, _writable, _user = abi.TRANSLATION.unpack(buffer)
        return physical if valid else None

    def unclaimed_msrs(self) -> tuple[tuple[int, int, int, int], ...]:
        return tuple((index, use.reads, use.writes, use.rip) for index, use in self._unclaimed_msrs.items())

    def counters(self) -> dict[str, int]:
        # What its own interrupt controllers deliver, KVM does not tell.
        return {} if self._has_irqchip else {"interrupts": self._before.interrupts + self._injected}

    def close(self) -> None:
        self._closing.set()
        if self._looker is not None:
            self._looker.join()
        with self._lock:
            if self._fd < 0:
                return
            self._words.release()
            self._quads.release()
            self._by_lane.close()
            self._run_page.close()
            os.close(self._fd)
            self._fd = -1
            self._state.close()
            self._access, self._written = _NO_ACCESS, b""


_Handler = Callable[[KvmVcpu, debugregs.HardwarePoints], Exit | None]
_HANDLERS: dict[int, _Handler] = {
    ExitReason.KVM_EXIT_IO: KvmVcpu._on_io,
    ExitReason.KVM_EXIT_MMIO: KvmVcpu._on_mmio,
    ExitReason.KVM_EXIT_HLT: KvmVcpu._on_hlt,
    ExitReason.KVM_EXIT_DEBUG: KvmVcpu._on_debug,
    ExitReason.KVM_EXIT_IRQ_WINDOW_OPEN: KvmVcpu._on_irq_window_open,
    ExitReason.KVM_EXIT_X86_RDMSR: KvmVcpu._on_rdmsr,
    ExitReason.KVM_EXIT_X86_WRMSR: KvmVcpu._on_wrmsr,
    ExitReason.KVM_EXIT_SHUTDOWN: KvmVcpu._on_shutdown,
    ExitReason.KVM_EXIT_SYSTEM_EVENT: KvmVcpu._on_system_event,
    ExitReason.KVM_EXIT_FAIL_ENTRY: KvmVcpu._on_fail_entry,
    ExitReason.KVM_EXIT_UNKNOWN: KvmVcpu._on_unknown,
    ExitReason.KVM_EXIT_INTERNAL_ERROR: KvmVcpu._on_internal_error,
}
