"""KvmVcpu over a KVM of scripted answers: what VMX and SVM do, and hosts that have them not, do not.

The scripts follow Linux Documentation/virt/kvm/api.rst and what arch/x86/kvm/x86.c does on hardware.
"""

import errno
import mmap
import os
import struct
import threading
import types

import pytest

from vmfs.engine.base import DebugRequest
from vmfs.engine.kvm import abi, call, vcpu
from vmfs.engine.kvm.abi import ExitReason, Ioctl
from vmfs.engine.kvm.state import HostFacts
from vmfs.words import layouts
from vmfs.words.errors import EngineFailed, Invalid, Unsupported
from vmfs.words.stops import Breakpoint, VectorStop, Watchpoint

PAGE = 3 * mmap.PAGESIZE
DATA = mmap.PAGESIZE  # where port data lies in the mapping
OUT, IN = 1, 0


class Kvm:
    """Answers ioctls. Each KVM_RUN plays the next of `script`: a function, or an errno, of this object."""

    def __init__(self):
        self.fd = os.memfd_create("vmfs-fake-kvm", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, PAGE)
        self.page = mmap.mmap(self.fd, PAGE)
        self.script = []
        self.calls = []
        self.rip = 0x1000
        self.dr6 = 0
        self.events = bytearray(64)

    def ioctl(self, fd, request, argument=0):
        request = Ioctl(request)
        self.calls.append((request, bytes(argument) if isinstance(argument, bytearray) else argument))
        if request == Ioctl.KVM_RUN:
            self.run()
        elif request == Ioctl.KVM_GET_VCPU_MMAP_SIZE:
            return PAGE
        elif request == Ioctl.KVM_GET_SUPPORTED_CPUID:
            layouts.LIST_HEAD.pack_into(argument, 0, 0, 0)
        elif request == Ioctl.KVM_GET_REGS:
            struct.pack_into("<Q", argument, layouts.RIP, self.rip)
        elif request == Ioctl.KVM_SET_REGS:
            (self.rip,) = struct.unpack_from("<Q", argument, layouts.RIP)
            self.events = bytearray(64)
        elif request == Ioctl.KVM_GET_VCPU_EVENTS:
            argument[:] = self.events
        elif request == Ioctl.KVM_SET_VCPU_EVENTS:
            self.events = bytearray(argument)
        elif request == Ioctl.KVM_SET_DEBUGREGS:
            (self.dr6,) = struct.unpack_from("<Q", argument, layouts.DR6)
        return 0

    def run(self):
        assert self.script, "one KVM_RUN too many"
        step = self.script.pop(0)
        failed = step if isinstance(step, int) else step(self)
        struct.pack_into("<Q", self.page, abi.RUN_SYNC_REGS + layouts.RIP, self.rip)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def exit(self, reason, layout=None, *fields, rip=None):
        struct.pack_into("<I", self.page, abi.RUN_EXIT_REASON, reason)
        if layout:
            layout.pack_into(self.page, abi.RUN_UNION, *fields)
        self.rip = self.rip if rip is None else rip

    def runs(self):
        return [request for request, _ in self.calls].count(Ioctl.KVM_RUN)

    def last(self, request):
        return [argument for called, argument in self.calls if called == request][-1]


def io(direction, data=b"\x41", size=1, port=0x80, rip=None):
    def step(kvm):
        if direction == OUT:
            kvm.page[DATA : DATA + len(data)] = data
        kvm.exit(ExitReason.KVM_EXIT_IO, abi.RUN_IO, direction, size, port, len(data) // size, DATA, rip=rip)

    return step


def mmio(is_write, address, size, data=b"", rip=None):
    return lambda kvm: kvm.exit(
        ExitReason.KVM_EXIT_MMIO, abi.RUN_MMIO, address, data.ljust(8, b"\0"), size, is_write, rip=rip
    )


def debug(dr6, rip):
    return lambda kvm: kvm.exit(ExitReason.KVM_EXIT_DEBUG, abi.RUN_DEBUG, 1, 0, rip, dr6, 0x400, rip=rip)


def plain(reason, rip=None):
    return lambda kvm: kvm.exit(reason, rip=rip)


def completed(rip, expect=None):
    """What KVM_RUN with immediate_exit does for an access: the instruction ends, and it fails with EINTR."""

    def step(kvm):
        assert kvm.page[abi.RUN_IMMEDIATE_EXIT] == 1, "the guest would have run"
        if expect is not None:
            assert kvm.page[abi.RUN_MMIO_DATA : abi.RUN_MMIO_DATA + len(expect)] == expect
        kvm.rip = rip
        return errno.EINTR

    return step


@pytest.fixture
def kvm(monkeypatch):
    fake = Kvm()
    module = types.SimpleNamespace(ioctl=fake.ioctl)
    monkeypatch.setattr(call, "fcntl", module)
    monkeypatch.setattr(vcpu, "fcntl", module)
    yield fake
    fake.page.close()
    os.close(fake.fd)


@pytest.fixture
def cpu(kvm):
    cpu = vcpu.KvmVcpu(
        0,
        os.dup(kvm.fd),
        kvm.fd,
        kvm.fd,
        has_irqchip=False,
        pvm=False,
        read_memory=lambda address, size: b"",
        read_pins=tuple,
        is_alone=lambda: True,
        threads=threading.local(),
        facts=HostFacts(),
    )
    yield cpu
    cpu.close()
    assert not kvm.script, "KVM_RUNs that did not come"


def test_out_is_done_when_the_exit_is_returned(kvm, cpu):
    """On hardware, rip moves past a plain OUT at the next KVM_RUN only."""
    kvm.script = [io(OUT), completed(0x1002)]
    assert cpu.run().line() == "io direction=out port=0x80 size=1 count=1 data=0x41 rip=0x1002"
    assert cpu.access_data == b"A"
    assert kvm.page[abi.RUN_IMMEDIATE_EXIT] == 0


def test_the_end_of_a_step_is_the_exit_of_its_out(kvm, cpu):
    """Completing an OUT that was stepped is a KVM_EXIT_DEBUG, which nobody shall see."""
    cpu.set_debug(DebugRequest(step=True))
    kvm.script = [io(OUT), debug(1 << 14, 0x1002), debug(1 << 14, 0x1003)]
    assert cpu.run().line() == "io direction=out port=0x80 size=1 count=1 data=0x41 rip=0x1002"
    assert cpu.run().line() == "debug cause=step rip=0x1003"


def test_the_end_of_an_in_ends_a_step(kvm, cpu):
    cpu.set_debug(DebugRequest(step=True))
    kvm.script = [io(IN), debug(1 << 14, 0x1001)]
    assert cpu.run().line() == "io direction=in port=0x80 size=1 count=1 rip=0x1000"
    assert cpu.run().line() == "debug cause=step rip=0x1001"


def test_setting_state_completes_a_read_with_all_ones(kvm, cpu):
    """A load of two parts: the second gets all ones, too, and is nobody's exit."""
    kvm.script = [
        mmio(False, 0xFFC, 4),
        mmio(False, 0x1000, 4),
        completed(0x1004, expect=b"\xff\xff\xff\xff"),
        plain(ExitReason.KVM_EXIT_HLT, rip=0x2001),
    ]
    assert cpu.run().line() == "mmio direction=read addr=0xffc size=4 rip=0x1000"
    regs = bytearray(144)
    struct.pack_into("<Q", regs, layouts.RIP, 0x2000)
    cpu.set_state("regs", bytes(regs))
    assert kvm.rip == 0x2000, "set after the end of the load"
    assert cpu.access_data == b""
    assert cpu.run().line() == "hlt rip=0x2001"


def test_the_write_of_a_read_modify_write_is_not_lost(kvm, cpu):
    kvm.script = [
        mmio(False, 0x1000, 4),
        mmio(True, 0x1000, 4, b"\5\0\0\0", rip=0x1004),
        completed(0x1004),
        plain(ExitReason.KVM_EXIT_HLT, rip=0x1005),
    ]
    cpu.run()
    cpu.access_data = b"\4\0\0\0"
    cpu.complete()
    assert cpu.run().line() == "mmio direction=write addr=0x1000 size=4 data=0x5 rip=0x1004"
    assert cpu.run().line() == "hlt rip=0x1005"


@pytest.mark.parametrize("rip, kept", [(0x1000, True), (0x2000, False)])
def test_a_fault_is_not_lost_when_another_register_is_set(kvm, cpu, rip, kept):
    """KVM_SET_REGS drops an exception that is about to be delivered; if rip stays, it is set again."""
    kvm.events[layouts.EXCEPTION_INJECTED] = 1
    kvm.events[1] = 14
    before = bytes(kvm.events)
    regs = bytearray(144)
    struct.pack_into("<Q", regs, layouts.RIP, rip)
    cpu.set_state("regs", bytes(regs))
    assert kvm.rip == rip
    assert bytes(kvm.events) == (before if kept else bytes(64))


def test_other_signals_do_not_end_a_run(kvm, cpu):
    kvm.script = [errno.EINTR, errno.EINTR, errno.EAGAIN, plain(ExitReason.KVM_EXIT_HLT)]
    assert cpu.run().line() == "hlt rip=0x1000"


def test_a_kick_while_an_access_is_completed_is_for_the_next_run(kvm, cpu):
    def kicked(kvm):
        cpu.kick()
        return errno.EINTR

    kvm.script = [io(OUT), kicked, errno.EINTR]
    assert cpu.run().REASON == "io"
    assert kvm.page[abi.RUN_IMMEDIATE_EXIT] == 1
    assert cpu.run().REASON == "interrupted"
    assert kvm.page[abi.RUN_IMMEDIATE_EXIT] == 0


def test_an_exit_on_its_way_is_returned_before_the_kick(kvm, cpu):
    def kicked(kvm):
        cpu.kick()
        kvm.exit(ExitReason.KVM_EXIT_HLT)

    kvm.script = [kicked, errno.EINTR]
    assert cpu.run().REASON == "hlt"
    assert cpu.run().REASON == "interrupted"


def test_failures_of_kvm_run(kvm, cpu):
    kvm.script = [errno.EFAULT]
    with pytest.raises(EngineFailed, match="KVM_RUN: Bad address"):
        cpu.run()


def test_breakpoints_are_stepped_over(kvm, cpu):
    """The run begins at a breakpoint: one step without it and with the other, then with both."""
    cpu.set_debug(DebugRequest(stops=(Breakpoint(1, 0x1000), Breakpoint(2, 0x1008))))

    def step(kvm):
        control, _, dr0, *_, dr7 = abi.GUEST_DEBUG.unpack(kvm.last(Ioctl.KVM_SET_GUEST_DEBUG))
        assert control & abi.KVM_GUESTDBG_SINGLESTEP
        assert (dr0, dr7 & 0xFF) == (0x1008, 0b10)
        return debug(1 << 14, 0x1001)(kvm)

    def run(kvm):
        control, _, dr0, dr1, *_, dr7 = abi.GUEST_DEBUG.unpack(kvm.last(Ioctl.KVM_SET_GUEST_DEBUG))
        assert not control & abi.KVM_GUESTDBG_SINGLESTEP
        assert (dr0, dr1, dr7 & 0xFF) == (0x1000, 0x1008, 0b1010)
        return debug(1 << 1, 0x1008)(kvm)

    kvm.script = [step, run]
    assert cpu.run().line() == "debug cause=breakpoint id=2 rip=0x1008"


def test_watchpoints(kvm, cpu):
    """DR6 may have bits of registers that are not in use (Intel SDM 3B 18.2.3)."""
    cpu.set_debug(DebugRequest(stops=(Watchpoint(7, 0x2000, 12, on_read=True, on_write=True),)))
    kvm.script = [debug(1 << 1 | 1 << 3, 0x1003)]
    assert cpu.run().line() == "debug cause=watchpoint id=7 addr=0x2008 rip=0x1003"


def test_a_watchpoint_hit_by_a_step_is_the_watchpoint(kvm, cpu):
    cpu.set_debug(
        DebugRequest(step=True, stops=(Watchpoint(7, 0x2000, 4, on_read=True, on_write=True),))
    )
    kvm.script = [debug(1 << 14 | 1, 0x1003)]
    assert cpu.run().line() == "debug cause=watchpoint id=7 addr=0x2000 rip=0x1003"


def test_the_guests_own_debug_exception_is_handed_back(kvm, cpu):
    cpu.set_debug(DebugRequest(stops=(Breakpoint(1, 0x5000),)))

    def handed_back(kvm):
        control, *_ = abi.GUEST_DEBUG.unpack(kvm.last(Ioctl.KVM_SET_GUEST_DEBUG))
        assert control & abi.KVM_GUESTDBG_INJECT_DB
        assert control & abi.KVM_GUESTDBG_USE_HW_BP
        assert kvm.dr6 == 1 << 14
        kvm.exit(ExitReason.KVM_EXIT_HLT)

    kvm.script = [debug(1 << 14, 0x1003), handed_back]
    assert cpu.run().REASON == "hlt"


def test_refused_debug_changes_nothing(kvm, cpu):
    cpu.set_debug(DebugRequest(stops=(Breakpoint(1, 0x5000),)))
    before = kvm.last(Ioctl.KVM_SET_GUEST_DEBUG)
    with pytest.raises(Unsupported):
        cpu.set_debug(DebugRequest(stops=(VectorStop(1, (14,)),)))
    with pytest.raises(Invalid):
        cpu.set_debug(DebugRequest(stops=(Breakpoint(1, 1 << 64),)))
    assert kvm.last(Ioctl.KVM_SET_GUEST_DEBUG) == before
    kvm.script = [debug(1, 0x5000)]
    assert cpu.run().line() == "debug cause=breakpoint id=1 rip=0x5000"


def test_an_interrupt_waits_for_its_window(kvm, cpu):
    def closed(kvm):
        return errno.EINTR  # immediate_exit: only to see whether the guest is ready

    def window(kvm):
        assert kvm.page[abi.RUN_REQUEST_INTERRUPT_WINDOW] == 1
        kvm.page[abi.RUN_READY_FOR_INTERRUPT] = kvm.page[abi.RUN_IF_FLAG] = 1
        kvm.exit(ExitReason.KVM_EXIT_IRQ_WINDOW_OPEN)

    def injected(kvm):
        assert kvm.last(Ioctl.KVM_INTERRUPT) == b"\x31\0\0\0"
        assert kvm.page[abi.RUN_REQUEST_INTERRUPT_WINDOW] == 0
        kvm.exit(ExitReason.KVM_EXIT_HLT)

    cpu.interrupt(0x31)
    kvm.script = [closed, window, injected]
    assert cpu.run().REASON == "hlt"
    assert cpu.interrupts_queued == 0


def words(kvm, cpu, step):
    kvm.script = [step]
    exit_ = cpu.run()
    assert exit_.REASON == "error"
    return exit_.reason


def test_errors_say_what_kvm_says(kvm, cpu):
    def internal(suberror, *data):
        fields = (suberror, len(data), *data, *[0] * (16 - len(data)))
        return lambda kvm: kvm.exit(ExitReason.KVM_EXIT_INTERNAL_ERROR, abi.RUN_INTERNAL, *fields)

    def emulation(kvm):
        abi.RUN_INTERNAL.pack_into(kvm.page, abi.RUN_UNION, 1, 3, *[0] * 16)
        kvm.exit(
            ExitReason.KVM_EXIT_INTERNAL_ERROR, abi.RUN_EMULATION_FAILURE, 1, 3, 1, 4, b"\x0f\xae\x2f\x90"
        )

    def fail_entry(kvm):
        kvm.exit(ExitReason.KVM_EXIT_FAIL_ENTRY, abi.RUN_FAIL_ENTRY, 0x80000021, 3)

    def event(kvm):
        kvm.exit(ExitReason.KVM_EXIT_SYSTEM_EVENT, abi.RUN_SYSTEM_EVENT, 3, 0, *[0] * 16)

    assert words(kvm, cpu, emulation).endswith(
        "at rip 0x1000: the code there is 0f ae 2f 90 (KVM_INTERNAL_ERROR_EMULATION)"
    )
    assert "there is no code" in words(kvm, cpu, internal(1))
    assert "(KVM_INTERNAL_ERROR_DELIVERY_EV, data 0x80000b0e 0x5)" in words(
        kvm, cpu, internal(3, 0x80000B0E, 5)
    )
    assert "(suberror 77)" in words(kvm, cpu, internal(77))
    assert "0x80000021 (KVM_EXIT_FAIL_ENTRY)" in words(kvm, cpu, fail_entry)
    assert "system event 3" in words(kvm, cpu, event)
    assert "(KVM_EXIT_HYPERV)" in words(kvm, cpu, plain(ExitReason.KVM_EXIT_HYPERV))
    assert "(exit reason 250)" in words(kvm, cpu, plain(250))
    assert "0x21 (KVM_EXIT_UNKNOWN)" in words(
        kvm, cpu, lambda kvm: kvm.exit(ExitReason.KVM_EXIT_UNKNOWN, abi.RUN_UNKNOWN, 0x21)
    )


@pytest.mark.parametrize("event, cause", [(1, "poweroff"), (2, "reset")])
def test_system_events(kvm, cpu, event, cause):
    kvm.script = [
        lambda kvm: kvm.exit(ExitReason.KVM_EXIT_SYSTEM_EVENT, abi.RUN_SYSTEM_EVENT, event, 0, *[0] * 16)
    ]
    assert cpu.run().line() == f"shutdown cause={cause} rip=0x1000"
