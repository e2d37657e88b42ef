"""What CPUID tells a CPU of the others: one package of as many cores, without threads. APIC ids are the CPUs' numbers.

Source: Intel SDM 2A, CPUID, leaves 1, 4, 0BH, 1FH; 3A 9.9.1; AMD64 Architecture Programmer's Manual 3, E.4.7, E.4.17:
functions 8000_0008 and 8000_001E.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_HEAD = struct.Struct("<II")  # struct kvm_cpuid2: nent, padding
_ENTRY = struct.Struct("<7I12x")  # struct kvm_cpuid_entry2: function, index, flags, EAX, EBX, ECX, EDX
_HAS_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_HTT = 1 << 28  # of leaf 1, EDX: EBX says how many APIC ids the package has
_THREAD, _CORE = 1 << 8, 2 << 8  # types of levels

Entry = tuple[int, int, int, int, int, int, int]


def with_topology(cpuid: bytes, index: int, count: int) -> bytes:
    """`cpuid`, which is a struct kvm_cpuid2 with its entries, of CPU `index` of so many."""
    entries = [_ENTRY.unpack_from(cpuid, at) for at in range(_HEAD.size, len(cpuid), _ENTRY.size)]
    leaves = {entry[0] for entry in entries}
    made = list(_changed(entries, index, count))
    for leaf in (0x0B, 0x1F):
        if leaf in leaves or leaf == 0x0B:
            made += _levels(leaf, index, count)
    return _HEAD.pack(len(made), 0) + b"".join(_ENTRY.pack(*entry) for entry in made)


def id_bits(count: int) -> int:
    """The bits of an APIC id that number the cores."""
    return (count - 1).bit_length()


def _changed(entries: list[Entry], index: int, count: int) -> Iterator[Entry]:
    for leaf, subleaf, flags, eax, ebx, ecx, edx in entries:
        match leaf:
            case 0x0B | 0x1F:
                continue
            case 1:
                ebx = ebx & 0xFFFF | min(1 << id_bits(count), 0xFF) << 16 | index << 24
                edx |= _HTT
            case 4 if eax & 0x1F:  # a cache: of one core, but the third level's, which all share
                shared = (1 << id_bits(count)) - 1 if eax >> 5 & 7 == 3 else 0
                eax = eax & 0x3FFF | shared << 14 | min((1 << id_bits(count)) - 1, 63) << 26
            case 0x8000_0008:
                ecx = ecx & ~0xF0FF | id_bits(count) << 12 | count - 1
            case 0x8000_001E:
                eax, ebx, ecx = index, index & 0xFF, 0  # the core's number, one thread a core; one node
        yield leaf, subleaf, flags, eax, ebx, ecx, edx


def _levels(leaf: int, index: int, count: int) -> Iterator[Entry]:
    yield leaf, 0, _HAS_INDEX, 0, 1, _THREAD, index
    yield leaf, 1, _HAS_INDEX, id_bits(count), count, 1 | _CORE, index
    yield leaf, 2, _HAS_INDEX, 0, 0, 2, index
