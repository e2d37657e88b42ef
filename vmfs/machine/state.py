"""A CPU's state from one engine to another: what is carried, in which order, and what is not.

State is the bytes of the KVM UAPI structs on every engine, so most of it is carried as it is. What the new
engine refuses is an exception that names it, and the caller gives the new machine up.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from vmfs.engine.base import MACHINE_STATES, Machine, Vcpu, has_state
from vmfs.words.errors import Invalid, Unsupported

# What reset sets back, in an order that KVM accepts (the mode before what is checked against it).
RESET_STATES = ("sregs", "regs", "fpu", "xcrs", "msrs", "debugregs", "events", "mp_state")

# What decides about the validity of something comes before it: CPUID of all, EFER and CR0 of the rest, XCR0
# of xsave.
_BEFORE_MSRS = ("cpuid", "sregs", "xcrs", "xsave")
_BEHIND_MSRS = ("debugregs", "regs", "lapic", "events", "mp_state")


def carry_cpu(source: Vcpu, target: Vcpu, reset: Mapping[str, bytes], *, keep_cpuid: bool) -> None:
    """Make `target`, a new CPU, what `source` is. `reset` has the states of `source` when it was new.

    `keep_cpuid`: the CPUID too, which the guest may have seen. MSRs are carried where both CPUs have them;
    one that `target` refuses may only be one that is as it was at the reset, and so describes the engine.
    """
    for name in _BEFORE_MSRS:
        if name != "cpuid" or keep_cpuid:
            _carry(source, target, name)
    _carry_msrs(source, target, _entries(reset["msrs"]))
    for name in _BEHIND_MSRS:
        if name != "lapic" or has_state(target, name):  # a machine that becomes bare has none
            _carry(source, target, name)
    for vector in source.queued_vectors:
        target.interrupt(vector)


def carry_machine(source: Machine, target: Machine) -> None:
    """What is of the machine and not of a CPU."""
    for name in MACHINE_STATES:
        try:
            data = source.get_state(name)
        except Unsupported:  # there are no interrupt controllers
            continue
        target.set_state(name, data)


def _carry(source: Vcpu, target: Vcpu, name: str) -> None:
    try:
        data = source.get_state(name)
    except Unsupported:
        return
    if name == "xsave":
        data = _resized(data, len(target.get_state(name)))
    try:
        target.set_state(name, data)
    except Invalid as error:
        raise Unsupported(f"{name} is in a state that the other engine cannot have: {error}") from error


def _resized(xsave: bytes, size: int) -> bytes:
    """Engines differ in the room for components; what is cut off must be unused."""
    if any(xsave[size:]):
        raise Unsupported(f"xsave has state beyond the {size} bytes that the other engine has for it")
    return xsave[:size].ljust(size, b"\0")


def _carry_msrs(source: Vcpu, target: Vcpu, reset: Mapping[int, int]) -> None:
    there = _entries(target.get_state("msrs"))
    for index, value in _entries(source.get_state("msrs")).items():
        if index not in there or there[index] == value:
            continue
        try:
            target.set_msr(index, value)
        except Invalid as error:
            if value != reset.get(index):
                raise Unsupported(f"MSR {index:#x} is {value:#x}, which the other engine refuses") from error


def _entries(msrs: bytes) -> dict[int, int]:
    """`struct kvm_msrs` as values by index."""
    return {index: value for index, _, value in struct.iter_unpack("<IIQ", msrs[8:])}
