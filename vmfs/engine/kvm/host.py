"""Which kind of KVM the host has, and what it answers the same each time."""

from __future__ import annotations

import functools
from pathlib import Path

from vmfs.engine.kvm import abi
from vmfs.engine.kvm.abi import Cap, Ioctl
from vmfs.engine.kvm.call import ioctl
from vmfs.words import layouts

_LEAF_1_ECX_X2APIC, _LEAF_1_ECX_TSC_DEADLINE = 1 << 21, 1 << 24

_MODULES = Path("/sys/module")  # has a module that is built in, too


def is_pvm() -> bool:
    """Whether KVM runs without the CPU's virtualization, as PVM: user mode natively, the rest emulated.

    What follows from it:

    - Each port access is emulated, so rip has moved past an `out` when KVM_RUN returns. On VMX and SVM it
      moves past a plain `out` at the next KVM_RUN only.
    - Debug registers and TF do not stop user-mode code; a single step there is a #DB in the guest.
    - No data breakpoint works.
    - The single step of a `hlt` is reported as a step, and the `hlt` one instruction later.
    """
    hardware = any((_MODULES / name).exists() for name in ("kvm_intel", "kvm_amd"))
    return (_MODULES / "kvm_pvm").exists() and not hardware


class HostFacts:
    """What a host's KVM answers the same each time. An engine keeps one, so that only its first machine asks.

    The MSRs are those of a CPU with the CPUID that it was made with, by whether there is an irqchip. `made_states`
    are those of CPUs without interrupt controllers, by index (see VcpuState).
    """

    def __init__(self) -> None:
        self._extensions: dict[Cap, int] = {}
        self._made_cpuids: dict[tuple[int, bool], bytes] = {}
        self._run_size = 0
        self.saved_msrs: dict[bool, tuple[int, ...]] = {}
        self.made_states: dict[int, dict[str, bytes]] = {}

    @functools.cached_property
    def pvm(self) -> bool:
        return is_pvm()

    def extension(self, fd: int, cap: Cap) -> int:
        """KVM_CHECK_EXTENSION, of a VM, or of the device for what VMs have in common."""
        if cap not in self._extensions:
            self._extensions[cap] = ioctl(fd, Ioctl.KVM_CHECK_EXTENSION, cap)
        return self._extensions[cap]

    def run_size(self, device: int) -> int:
        """KVM_GET_VCPU_MMAP_SIZE."""
        if not self._run_size:
            self._run_size = ioctl(device, Ioctl.KVM_GET_VCPU_MMAP_SIZE)
        return self._run_size

    def made_cpuid(self, device: int, index: int, *, has_irqchip: bool) -> bytes:
        """`struct kvm_cpuid2` of a new CPU: all that the host supports (KVM_GET_SUPPORTED_CPUID)."""
        key = index, has_irqchip
        if key not in self._made_cpuids:
            buffer = bytearray(layouts.LIST_HEAD.size + abi.CPUID_MAX_ENTRIES * layouts.CPUID_ENTRY.size)
            layouts.LIST_HEAD.pack_into(buffer, 0, abi.CPUID_MAX_ENTRIES, 0)
            ioctl(device, Ioctl.KVM_GET_SUPPORTED_CPUID, buffer)
            self._made_cpuids[key] = made_cpuid(trim_cpuid(buffer), index, has_irqchip=has_irqchip)
        return self._made_cpuids[key]


def made_cpuid(supported: bytes, index: int, *, has_irqchip: bool) -> bytes:
    """`supported`, with what is the CPU's own in it: its APIC id, and what needs a LAPIC."""
    data = bytearray(supported)
    for at in range(layouts.LIST_HEAD.size, len(data), layouts.CPUID_ENTRY.size):
        function, subleaf, flags, eax, ebx, ecx, edx = layouts.CPUID_ENTRY.unpack_from(data, at)
        if function == 1:  # Intel SDM 2A, CPUID: EBX[31:24] is the initial APIC id
            ebx = ebx & 0x00FFFFFF | (index & 0xFF) << 24
            # KVM says it could emulate an x2APIC, and does not say that it has the deadline timer; both are
            # there with the in-kernel LAPIC, and only then (api.rst, KVM_GET_SUPPORTED_CPUID).
            lapic_features = _LEAF_1_ECX_X2APIC | _LEAF_1_ECX_TSC_DEADLINE
            ecx = ecx | lapic_features if has_irqchip else ecx & ~lapic_features
        elif function in (0xB, 0x1F):  # EDX is the x2APIC id
            edx = index
        elif function == 0x8000001E:  # AMD APM 3: EAX is the extended APIC id
            eax = index
        layouts.CPUID_ENTRY.pack_into(data, at, function, subleaf, flags, eax, ebx, ecx, edx)
    return bytes(data)


def trim_cpuid(buffer: bytearray) -> bytes:
    """`struct kvm_cpuid2` without the room after its entries."""
    count = layouts.LIST_HEAD.unpack_from(buffer)[0]
    return bytes(buffer[: layouts.LIST_HEAD.size + count * layouts.CPUID_ENTRY.size])
