"""The state of a vCPU as bytes: which ioctl gets and sets what, and what KVM leaves to be checked here."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

from vmfs.engine.base import SIZES, VCPU_STATES
from vmfs.engine.kvm import abi
from vmfs.engine.kvm.abi import Cap, Ioctl
from vmfs.engine.kvm.call import ioctl, ioctl_set
from vmfs.engine.kvm.host import HostFacts, trim_cpuid
from vmfs.words import layouts
from vmfs.words.errors import EngineFailed, Invalid, Unsupported
from vmfs.words.layouts import put_quad, quad
from vmfs.words.modes import CR0_PG

_MXCSR_RESERVED = 0xFFFF0000  # Intel SDM 1 10.2.3
_IA32_TSC, _IA32_TSC_DEADLINE = 0x10, 0x6E0  # the timer begins when that is set
# KVM keeps them, and leaves them out of KVM_GET_MSR_INDEX_LIST: the MTRRs, and the machine check banks.
_UNLISTED_MSRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF, *range(0x400, 0x480))


class _Plain(NamedTuple):
    """A state that one ioctl gets and one sets."""

    get: Ioctl
    set: Ioctl


_PLAIN = {
    "regs": _Plain(Ioctl.KVM_GET_REGS, Ioctl.KVM_SET_REGS),
    "sregs": _Plain(Ioctl.KVM_GET_SREGS, Ioctl.KVM_SET_SREGS),
    "xsave": _Plain(Ioctl.KVM_GET_XSAVE, Ioctl.KVM_SET_XSAVE),
    "xcrs": _Plain(Ioctl.KVM_GET_XCRS, Ioctl.KVM_SET_XCRS),
    "debugregs": _Plain(Ioctl.KVM_GET_DEBUGREGS, Ioctl.KVM_SET_DEBUGREGS),
    "events": _Plain(Ioctl.KVM_GET_VCPU_EVENTS, Ioctl.KVM_SET_VCPU_EVENTS),
    "mp_state": _Plain(Ioctl.KVM_GET_MP_STATE, Ioctl.KVM_SET_MP_STATE),
    "lapic": _Plain(Ioctl.KVM_GET_LAPIC, Ioctl.KVM_SET_LAPIC),
}

# Of a CPU that was made and not changed. Not the MSRs, for the time goes on.
_SAME_IN_EACH = frozenset({"regs", "sregs", "fpu", "xsave", "xcrs", "debugregs", "events", "mp_state", "cpuid"})


class VcpuState:
    """Gets and sets the states of VCPU_STATES on one vCPU descriptor."""

    def __init__(self, index: int, fd: int, device: int, vm: int, *, has_irqchip: bool, facts: HostFacts) -> None:
        self._fd = fd
        self._device = device
        self._has_irqchip = has_irqchip
        self._facts = facts
        self._known_cpuid: bytes | None = None  # what it has, where that was asked for
        self._saved_msrs: tuple[int, ...] | None = None  # found out when first asked for
        # With KVM_CAP_XSAVE2, XSAVE areas over 4096 bytes (AMX) are got whole; the size is the VM's.
        self._xsave_size = max(facts.extension(vm, Cap.KVM_CAP_XSAVE2), SIZES["xsave"])
        self.set("cpuid", facts.made_cpuid(device, index, has_irqchip=has_irqchip))
        self._has_made_cpuid = True
        # Without interrupt controllers nothing but the CPU's own runs and sets changes it: until then it has what
        # each before it had. None from then on.
        self._made = None if has_irqchip else facts.made_states.setdefault(index, {})

    def get(self, name: str) -> bytes:
        self._check_name(name)
        made = self._made
        if made is None or name not in _SAME_IN_EACH:
            return self._get(name)
        if name not in made:
            made[name] = self._get(name)
        return made[name]

    def changes(self) -> None:
        """The CPU is not as it was made any more: it is about to run, or otherwise than by `set` to change."""
        self._made = None

    def _get(self, name: str) -> bytes:
        if name == "msrs":
            return self._get_msrs(self._msrs_to_save())
        if name == "cpuid":
            return self._get_cpuid()
        if name == "fpu":
            return self._get_fpu()
        get = _PLAIN[name].get
        if name == "xsave" and self._xsave_size > SIZES["xsave"]:
            get = Ioctl.KVM_GET_XSAVE2
        buffer = bytearray(self._size(name))
        ioctl(self._fd, get, buffer)
        return bytes(buffer)

    def set(self, name: str, data: bytes) -> None:
        self._check_name(name)
        self._made = None
        if name == "msrs":
            self._set_msrs(data)
        elif name == "cpuid":
            self._set_cpuid(data)
        else:
            if len(data) != self._size(name):
                raise Invalid(f"{name} has {self._size(name)} bytes, not {len(data)}")
            if name == "fpu":
                self._set_fpu(data)
            elif name == "regs":
                self._set_regs(data)
            elif name == "sregs":
                self._set_sregs(data)
            else:
                ioctl_set(self._fd, _PLAIN[name].set, data)

    def close(self) -> None:
        self._fd, self._made = -1, None

    def _size(self, name: str) -> int:
        return self._xsave_size if name == "xsave" else SIZES[name]

    def _check_name(self, name: str) -> None:
        if name not in VCPU_STATES:
            raise Invalid(f"a CPU has no state {name}")
        if name == "lapic" and not self._has_irqchip:
            raise Unsupported("lapic: the machine has no interrupt controller")

    def _set_regs(self, data: bytes) -> None:
        """KVM_SET_REGS, which drops an exception that is about to be delivered.

        That is right where rip changes, and loses a fault of the guest where another register does.
        """
        events = self.get("events")
        exception = events[layouts.EXCEPTION_INJECTED] or events[layouts.EXCEPTION_PENDING]
        keep = exception and quad(self.get("regs"), layouts.RIP) == quad(data, layouts.RIP)
        ioctl_set(self._fd, Ioctl.KVM_SET_REGS, data)
        if keep:
            self.set("events", events)

    # x87 and SSE. KVM_GET_FPU and KVM_SET_FPU reach the memory where KVM keeps the registers, not XSTATE_BV
    # beside it: when that says "initial state", they show old bytes, and lose new ones.

    def _get_fpu(self) -> bytes:
        xsave = self.get("xsave")
        fcw, fsw, ftwx, opcode, ip, dp, mxcsr, st, xmm = layouts.XSAVE_LEGACY.unpack_from(xsave)
        return layouts.FPU.pack(st, fcw, fsw, ftwx, opcode, ip, dp, xmm, mxcsr)

    def _set_fpu(self, data: bytes) -> None:
        st, fcw, fsw, ftwx, opcode, ip, dp, xmm, mxcsr = layouts.FPU.unpack(data)
        if mxcsr & _MXCSR_RESERVED:
            raise Invalid(f"fpu: mxcsr {mxcsr:#x} has reserved bits set")
        xsave = bytearray(self.get("xsave"))
        layouts.XSAVE_LEGACY.pack_into(xsave, 0, fcw, fsw, ftwx, opcode, ip, dp, mxcsr, st, xmm)
        in_use = quad(xsave, layouts.XSAVE_STATE_BV) | layouts.XSAVE_X87 | layouts.XSAVE_SSE
        put_quad(xsave, layouts.XSAVE_STATE_BV, in_use)
        self.set("xsave", bytes(xsave))

    # MSRs

    def get_msr(self, index: int) -> int:
        buffer = bytearray(layouts.pack_msrs([(index, 0)]))
        if ioctl(self._fd, Ioctl.KVM_GET_MSRS, buffer) != 1:
            raise Invalid(f"KVM_GET_MSRS: this CPU has no MSR {index:#x}")
        return layouts.unpack_msrs(buffer)[0][1]

    def _set_sregs(self, data: bytes) -> None:
        """PVM drops CR0.PG outside of long mode without a word; then it is refused, and all is as it was."""
        before = self.get("sregs")
        ioctl_set(self._fd, Ioctl.KVM_SET_SREGS, data)
        if quad(data, layouts.CR0) & CR0_PG and not quad(self.get("sregs"), layouts.CR0) & CR0_PG:
            ioctl_set(self._fd, Ioctl.KVM_SET_SREGS, before)
            raise Unsupported("cr0: the host's KVM drops PG: it has paging in long mode only")

    def set_msr(self, index: int, value: int) -> None:
        self._made = None
        if ioctl_set(self._fd, Ioctl.KVM_SET_MSRS, layouts.pack_msrs([(index, value)])) != 1:
            raise Invalid(f"KVM_SET_MSRS: MSR {index:#x} does not take {value:#x}")

    def _get_msrs(self, indices: tuple[int, ...]) -> bytes:
        buffer = bytearray(_asking_for(indices))
        count = ioctl(self._fd, Ioctl.KVM_GET_MSRS, buffer)
        if count != len(indices):
            raise EngineFailed(f"KVM_GET_MSRS: MSR {indices[count]:#x} could be read, and now cannot")
        return bytes(buffer)

    def _set_msrs(self, data: bytes) -> None:
        """All or none. What one takes may depend on another (MSR_PLATFORM_INFO on MISC_FEATURES_ENABLES): one that is
        refused is tried again after the others, and where that is no use, those that were set get their old values
        back."""
        entries, indices = _msrs_of(bytes(data))
        if indices != self._saved_msrs:  # one that the CPU has not is refused when it is set
            accepted = _accepted(self._fd, Ioctl.KVM_GET_MSRS, [(index, 0) for index in indices])
            indices = tuple(index for index, _value in accepted)
        there = self._get_msrs(indices)
        if len(indices) == len(entries) and (times := _only_times_differ(bytes(data), there)) is not None:
            wanted = times  # a state that is set back: the others are what they were
        else:
            have = dict(layouts.unpack_msrs(there))
            wanted = [one for one in entries if have.get(one[0]) != one[1] or one[0] == _IA32_TSC_DEADLINE]
        entries = wanted
        if (refused := self._set_each(entries)) and len(refused) < len(entries):
            refused = self._set_each(refused)
        if not refused:
            return
        if len(self._set_each(self._set_each(layouts.unpack_msrs(there)))):
            raise EngineFailed("KVM_SET_MSRS: the MSRs beside a bad one did not take their old values back")
        index, value = refused[0]
        raise Invalid(f"KVM_SET_MSRS: MSR {index:#x} does not take {value:#x}")

    def _set_each(self, entries: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Which of them KVM refuses. It stops at each."""
        refused = []
        while entries:
            count = ioctl_set(self._fd, Ioctl.KVM_SET_MSRS, layouts.pack_msrs(entries))
            refused += entries[count : count + 1]
            entries = entries[count + 1 :]
        return refused

    def _msrs_to_save(self) -> tuple[int, ...]:
        """KVM_GET_MSR_INDEX_LIST and _UNLISTED_MSRS, less what this host, with this CPUID, does not take back."""
        if self._saved_msrs is None and self._has_made_cpuid:
            self._saved_msrs = self._facts.saved_msrs.get(self._has_irqchip)
        if self._saved_msrs is None:
            indices = _accepted(self._fd, Ioctl.KVM_GET_MSRS, [(index, 0) for index in _msr_list(self._device)])
            # The time stamp counter takes every value, and writing it back would set it back by a little.
            values = [(index, self.get_msr(index)) for index, _zero in indices if index != _IA32_TSC]
            writable = {index for index, _value in _accepted(self._fd, Ioctl.KVM_SET_MSRS, values)} | {_IA32_TSC}
            self._saved_msrs = tuple(index for index, _zero in indices if index in writable)
            if self._has_made_cpuid:
                self._facts.saved_msrs[self._has_irqchip] = self._saved_msrs
        return self._saved_msrs

    # CPUID

    def _get_cpuid(self) -> bytes:
        buffer = bytearray(layouts.LIST_HEAD.size + abi.CPUID_MAX_ENTRIES * layouts.CPUID_ENTRY.size)
        layouts.LIST_HEAD.pack_into(buffer, 0, abi.CPUID_MAX_ENTRIES, 0)
        ioctl(self._fd, Ioctl.KVM_GET_CPUID2, buffer)
        return trim_cpuid(buffer)

    def has_cpuid(self, data: bytes) -> bool:
        """It is not asked for again until it was set: KVM_GET_CPUID2 is one of the slow ones."""
        if self._known_cpuid != data:
            if self.get("cpuid") != data:
                return False
            self._known_cpuid = data
        return True

    def _set_cpuid(self, data: bytes) -> None:
        self._known_cpuid = None
        layouts.check_list("cpuid", data)
        count = layouts.LIST_HEAD.unpack_from(data)[0]
        if count > abi.CPUID_MAX_ENTRIES:
            raise Invalid(f"cpuid: {count} entries are more than {abi.CPUID_MAX_ENTRIES}")
        hint = "a CPU that has run keeps its CPUID, and the host has to have what it says"
        ioctl_set(self._fd, Ioctl.KVM_SET_CPUID2, data, hint)
        self._has_made_cpuid, self._saved_msrs = False, None


def _msr_list(device: int) -> tuple[int, ...]:
    room = 1024  # KVM has about 200; one that had more would fail with E2BIG, by name
    buffer = bytearray(abi.MSR_LIST_HEAD.pack(room) + bytes(4 * room))
    ioctl(device, Ioctl.KVM_GET_MSR_INDEX_LIST, buffer)
    count = abi.MSR_LIST_HEAD.unpack_from(buffer)[0]
    listed = struct.unpack_from(f"<{count}I", buffer, abi.MSR_LIST_HEAD.size)
    return (*listed, *(index for index in _UNLISTED_MSRS if index not in listed))


@functools.lru_cache(16)
def _asking_for(indices: tuple[int, ...]) -> bytes:
    return layouts.pack_msrs([(index, 0) for index in indices])


@functools.lru_cache(16)
def _msrs_of(data: bytes) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """The entries, and the MSRs that they are of; a state that is set again and again is taken apart once."""
    entries = layouts.unpack_msrs(data)
    return entries, tuple(index for index, _value in entries)


@functools.lru_cache(16)
def _times_of(data: bytes) -> tuple[list[tuple[int, int]], tuple[slice, ...]]:
    """The entries whose MSRs go on by themselves or do something when they are set, and where their values lie."""
    entries, _ = _msrs_of(data)
    end, size = layouts.LIST_HEAD.size, layouts.MSR_ENTRY.size
    numbers = [number for number, one in enumerate(entries) if one[0] in (_IA32_TSC, _IA32_TSC_DEADLINE)]
    places = (end + number * size + size - 8 for number in numbers)
    return [entries[number] for number in numbers], tuple(slice(at, at + 8) for at in places)


def _only_times_differ(data: bytes, there: bytes) -> list[tuple[int, int]] | None:
    """The entries that are to be set to have `data` where `there` is, if those are _times_of; else None."""
    times, places = _times_of(data)
    same = bytearray(there)
    for place in places:
        same[place] = data[place]
    return times if same == data else None


def _accepted(fd: int, request: Ioctl, entries: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The MSRs that KVM_GET_MSRS or KVM_SET_MSRS takes: each call stops at the first that it does not."""
    accepted: list[tuple[int, int]] = []
    while entries:
        count = ioctl(fd, request, bytearray(layouts.pack_msrs(entries)))
        accepted += entries[:count]
        entries = entries[count + 1 :]
    return accepted
