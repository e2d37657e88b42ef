"""The KVM engine: the contract of `vmfs.engine.base` over the ioctls of /dev/kvm, in Python.

The interface is described in Linux Documentation/virt/kvm/api.rst. What KVM cannot do, and so this engine:

- No instruction budget and no instruction counter. A machine without `create_irqchip` has no LAPIC at all.
- Breakpoints and watchpoints are the CPU's four debug registers; the guest's own DR0 to DR3 do not trigger
  while they are in use. tests/engine/divergences.py has what hosts lack.
- A single step is a trap by RFLAGS.TF. External interrupts and NMIs wait while stepping, because the
  delivery of one would clear TF and the step would end only after its IRET.
- On Intel CPUs without "unrestricted guest", three pages at 0xfffbd000 and one at 0xfffbc000 are KVM's own:
  they are neither RAM nor unmapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from dataclasses import dataclass

from vmfs.engine.base import (
    MACHINE_STATES,
    PAGE_SIZE,
    SIZES,
    Availability,
    Capability,
    Engine,
    HostMemory,
    Machine,
    check_slot,
)
from vmfs.engine.kvm import abi, progress
from vmfs.engine.kvm._run import Wires
from vmfs.engine.kvm.abi import Cap, Ioctl
from vmfs.engine.kvm.call import Borrowed, Mapping, ioctl, ioctl_long, ioctl_set
from vmfs.engine.kvm.deadline import Deadline
from vmfs.engine.kvm.host import HostFacts
from vmfs.engine.kvm.vcpu import KvmVcpu
from vmfs.engine.rest import NEVER, TURN, TURNS, Chips, Time
from vmfs.words import layouts
from vmfs.words.errors import EngineFailed, Invalid, Unsupported, VmfsError, known

# Intel CPUs without "unrestricted guest" run real mode as v8086 tasks, with a TSS (3 pages) and an identity
# map (1 page) that lie in the guest's memory: below the BIOS ROM at the end of the first 4 GiB.
TSS_ADDRESS = 0xFFFBD000
IDENTITY_MAP_ADDRESS = 0xFFFBC000
LINES = 24


def _routes() -> bytes:
    """Where a line goes: to which inputs of the 8259s and the IOAPIC. With KVM's own routes IRQ 0 is the IOAPIC's input
    0; on every PC it is 2, since IRQ 2 is the second 8259's."""
    masters, ioapic = 8, 2
    inputs = [(line, line // masters, line % masters) for line in range(2 * masters) if line != 2]
    inputs += [(line, ioapic, line or 2) for line in range(LINES) if line != 2]
    kind = abi.KVM_IRQ_ROUTING_IRQCHIP
    rows = (abi.IRQ_ROUTING_ENTRY.pack(line, kind, 0, 0, chip, pin) for line, chip, pin in inputs)
    return abi.IRQ_ROUTING.pack(len(inputs), 0) + b"".join(rows)


# What this engine cannot do without, and since when Linux has it.
REQUIRED = (
    (Cap.KVM_CAP_USER_MEMORY, "2.6.25"),
    (Cap.KVM_CAP_DESTROY_MEMORY_REGION_WORKS, "2.6.30"),
    (Cap.KVM_CAP_EXT_CPUID, "2.6.26"),
    (Cap.KVM_CAP_MP_STATE, "2.6.26"),
    (Cap.KVM_CAP_USER_NMI, "2.6.28"),
    (Cap.KVM_CAP_SET_GUEST_DEBUG, "2.6.30"),
    (Cap.KVM_CAP_VCPU_EVENTS, "2.6.33"),
    (Cap.KVM_CAP_DEBUGREGS, "2.6.35"),
    (Cap.KVM_CAP_XSAVE, "2.6.36"),
    (Cap.KVM_CAP_XCRS, "2.6.36"),
    (Cap.KVM_CAP_READONLY_MEM, "3.7"),
    (Cap.KVM_CAP_IMMEDIATE_EXIT, "4.13"),
    (Cap.KVM_CAP_SYNC_REGS, "4.17"),
)

# What a machine with interrupt controllers needs beyond that.
REQUIRED_FOR_IRQCHIP = (Cap.KVM_CAP_IRQCHIP, Cap.KVM_CAP_PIT2, Cap.KVM_CAP_PIT_STATE2)


class KvmEngine(Engine):
    """The host's KVM."""

    name = "kvm"

    def __init__(self, device: str = "/dev/kvm") -> None:
        self.device = device
        self._facts = HostFacts()
        self._prepared = -1  # a descriptor of the device, kept for children that may open nothing

    def probe(self) -> Availability:
        """Whether a machine here writes to a port: everything between open and the guest's first exit.

        LimitReached where the server had no descriptor left to try it.
        """
        try:
            why_not = self._try_guest()
        except (VmfsError, OSError) as error:
            if (failure := known(error)) is not error:
                raise failure from error
            why_not = str(error) if isinstance(error, VmfsError) else f"{self.device}: {os.strerror(error.errno)}"
        if why_not:
            return Availability(False, why_not)
        return Availability(True, f"{self.device} runs guests")

    def prepare(self) -> None:
        if self._prepared < 0:
            self._prepared = self._open()
            _ = self._facts.pvm  # looks into /sys

    def create_machine(self) -> KvmMachine:
        device = self._open()
        try:
            return KvmMachine(device, self._facts)
        except BaseException:
            os.close(device)
            raise

    def _open(self) -> int:
        if self._prepared >= 0:
            return os.dup(self._prepared)
        try:
            device = os.open(self.device, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise EngineFailed(
                f"{self.device} does not exist: load kvm_intel or kvm_amd, and switch virtualization on in "
                "the firmware (in a virtual machine: nested virtualization in its host)"
            ) from error
        except PermissionError as error:
            raise EngineFailed(
                f"{self.device}: no permission to open it (`vmfs doctor` says how to get it)"
            ) from error
        except OSError as error:
            raise EngineFailed(f"{self.device}: {os.strerror(error.errno)}") from error
        try:
            version = ioctl(device, Ioctl.KVM_GET_API_VERSION)
            if version != abi.API_VERSION:
                raise EngineFailed(f"{self.device} speaks version {version} of KVM, not {abi.API_VERSION}")
        except BaseException:
            os.close(device)
            raise
        return device

    def _try_guest(self) -> str:
        """Run `mov al, 0x42; out 0x80, al` in real mode; why that failed, or nothing."""
        device = self._open()
        try:
            for cap, since in REQUIRED:
                if ioctl(device, Ioctl.KVM_CHECK_EXTENSION, cap) <= 0:
                    return f"{self.device} lacks {cap.name}: a kernel of at least Linux {since} has it"
        finally:
            os.close(device)
        with contextlib.ExitStack() as made:
            machine = self.create_machine()
            made.callback(machine.close)
            memory = os.memfd_create("vmfs-probe", os.MFD_CLOEXEC)
            made.callback(os.close, memory)
            os.ftruncate(memory, PAGE_SIZE)
            # The reset vector: the last 16 bytes below 4 GiB (Intel SDM 3A 9.1.4).
            os.pwrite(memory, b"\xb0\x42\xe6\x80\xf4", PAGE_SIZE - 16)
            machine.map_memory(0, (1 << 32) - PAGE_SIZE, memory, 0, PAGE_SIZE)
            line = machine.create_vcpu(0).run().line()
        if line.startswith("io direction=out port=0x80 size=1 count=1 data=0x42 "):
            return ""
        return f"{self.device} does not run guests rightly: in place of an access to port 0x80 came `{line}`"


@dataclass(slots=True)
class _MemorySlot:
    guest_address: int
    size: int
    flags: int
    mapping: Mapping | Borrowed

    def region(self, slot: int) -> bytes:
        """`struct kvm_userspace_memory_region`."""
        return abi.MEMORY_REGION.pack(slot, self.flags, self.guest_address, self.size, self.mapping.address)


class KvmMachine(Machine):
    """A VM descriptor, its memory slots and its CPUs."""

    def __init__(self, device: int, facts: HostFacts) -> None:
        self._device = device
        self._facts = facts
        self._slots: dict[int, _MemorySlot] = {}
        self._vcpus: dict[int, KvmVcpu] = {}
        self._threads = threading.local()  # see KvmVcpu._enter_thread
        self._has_irqchip = False
        self._turns = TURNS.pack(0, TURN, 0, 0)
        self._lines = bytearray(LINES)  # their levels, which KVM tells nobody
        self._pvm = facts.pvm
        self._slot_limit = facts.extension(device, Cap.KVM_CAP_NR_MEMSLOTS)
        self._wires: Wires | None = None
        self._deadline = Deadline(self._clock, self._kick)
        self._fd = self._create()
        try:
            self.capabilities = self._find_capabilities()
            self._set_up()
        except BaseException:
            os.close(self._fd)
            raise

    def _find_capabilities(self) -> frozenset[Capability]:
        found = {Capability.GUEST_DEBUG}
        if not self._pvm:
            found.add(Capability.WATCHPOINTS)
        if all(self._has(cap) for cap in REQUIRED_FOR_IRQCHIP):
            found.add(Capability.IRQCHIP)
        return frozenset(found)

    def _create(self) -> int:
        while True:
            try:
                return ioctl(self._device, Ioctl.KVM_CREATE_VM)
            except EngineFailed as error:
                # Setting up the MMU notifier stops for any signal, too.
                if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EINTR:
                    raise

    def _set_up(self) -> None:
        if self._has(Cap.KVM_CAP_SET_IDENTITY_MAP_ADDR):
            ioctl(self._fd, Ioctl.KVM_SET_IDENTITY_MAP_ADDR, bytearray(struct.pack("<Q", IDENTITY_MAP_ADDRESS)))
        if self._has(Cap.KVM_CAP_SET_TSS_ADDR):
            ioctl_long(self._fd, Ioctl.KVM_SET_TSS_ADDR, TSS_ADDRESS)
        if self._has(Cap.KVM_CAP_EXIT_ON_EMULATION_FAILURE):
            # Else an instruction that KVM cannot emulate is a #UD in the guest, which no CPU would raise.
            self._enable(Cap.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
        if self._has(Cap.KVM_CAP_X86_USER_SPACE_MSR):
            # So that the CPU can remember the MSRs that it does not have, before the guest gets its #GP.
            wanted = abi.KVM_MSR_EXIT_REASON_UNKNOWN | abi.KVM_MSR_EXIT_REASON_INVAL
            self._enable(Cap.KVM_CAP_X86_USER_SPACE_MSR, wanted)

    def _enable(self, cap: Cap, argument: int) -> None:
        ioctl(self._fd, Ioctl.KVM_ENABLE_CAP, bytearray(abi.ENABLE_CAP.pack(cap, 0, argument, 0, 0, 0)))

    def _has(self, cap: Cap) -> bool:
        return self._facts.extension(self._fd, cap) > 0

    # Memory

    def map_memory(
        self,
        slot: int,
        guest_address: int,
        memory: int | HostMemory,
        offset: int,
        size: int,
        *,
        read_only: bool = False,
    ) -> None:
        others = ((number, one.guest_address, one.size) for number, one in self._slots.items())
        check_slot(slot, guest_address, memory, offset, size, limit=self._slot_limit, others=others)
        old = self._slots.get(slot)
        new = None
        if size:
            flags = abi.KVM_MEM_LOG_DIRTY_PAGES | (abi.KVM_MEM_READONLY if read_only else 0)
            mapping: Mapping | Borrowed
            if isinstance(memory, int):
                mapping = Mapping(memory, offset, size, writable=not read_only)
            else:
                mapping = Borrowed(memory, offset)
            new = _MemorySlot(guest_address, size, flags, mapping)
        try:
            # KVM moves or re-backs no slot: the old one goes first, and comes back if the new one is refused.
            if old:
                self._set_region(abi.MEMORY_REGION.pack(slot, 0, old.guest_address, 0, 0))
            if new:
                try:
                    self._set_region(new.region(slot))
                except VmfsError:
                    if old:
                        self._set_region(old.region(slot))
                    raise
        except VmfsError:
            if new:
                new.mapping.close()
            raise
        if old:
            del self._slots[slot]
            old.mapping.close()
        if new:
            self._slots[slot] = new

    def _set_region(self, region: bytes) -> None:
        ioctl_set(self._fd, Ioctl.KVM_SET_USER_MEMORY_REGION, region)

    def dirty_log(self, slot: int) -> bytes:
        memory = self._slots.get(slot)
        if memory is None:
            raise Invalid(f"there is no memory slot {slot}")
        pages = memory.size // PAGE_SIZE
        bitmap = ctypes.create_string_buffer((pages + 63) // 64 * 8)  # KVM writes whole words of 64 bits
        ioctl(
            self._fd,
            Ioctl.KVM_GET_DIRTY_LOG,
            bytearray(abi.DIRTY_LOG.pack(slot, 0, ctypes.addressof(bitmap))),
        )
        return bitmap.raw[: (pages + 7) // 8]

    def _read_memory(self, address: int, size: int) -> bytes:
        """Bytes from a guest-physical address on; fewer, or none, where RAM ends."""
        for slot in self._slots.values():
            if slot.guest_address <= address < slot.guest_address + slot.size:
                size = min(size, slot.guest_address + slot.size - address)
                return ctypes.string_at(slot.mapping.address + address - slot.guest_address, size)
        return b""

    # CPUs and interrupt controllers

    def _read_pins(self) -> tuple[int, ...]:
        return struct.unpack_from(layouts.IOAPIC_PINS, self.get_state("irqchip"), layouts.IOAPIC_PINS_AT)

    def create_vcpu(self, index: int) -> KvmVcpu:
        if index in self._vcpus:
            raise Invalid(f"there is a cpu {index} already")
        if not 0 <= index < 1 << 16:
            raise Invalid(f"{index} is no number of a CPU")
        fd = ioctl_set(self._fd, Ioctl.KVM_CREATE_VCPU, index, "the host allows no CPU of that number")
        try:
            vcpu = KvmVcpu(
                index,
                fd,
                self._device,
                self._fd,
                has_irqchip=self._has_irqchip,
                pvm=self._pvm,
                read_memory=self._read_memory,
                read_pins=self._read_pins,
                is_alone=lambda: len(self._vcpus) == 1,
                threads=self._threads,
                facts=self._facts,
            )
        except BaseException:
            os.close(fd)
            raise
        vcpu.wires = self._wires
        self._vcpus[index] = vcpu
        return vcpu

    def create_irqchip(self) -> None:
        if self._has_irqchip:
            raise Invalid("the machine has its interrupt controllers already")
        if self._vcpus:
            raise Invalid("interrupt controllers come before the first CPU")
        if Capability.IRQCHIP not in self.capabilities:
            raise Unsupported("the host's KVM has no interrupt controllers and timer")
        ioctl(self._fd, Ioctl.KVM_CREATE_IRQCHIP)
        self._has_irqchip = True
        ioctl_set(self._fd, Ioctl.KVM_SET_GSI_ROUTING, _routes())
        # With the speaker port: bit 5 of port 0x61 is the output of PIT channel 2, which only KVM knows.
        ioctl(self._fd, Ioctl.KVM_CREATE_PIT2, bytearray(abi.PIT_CONFIG.pack(abi.KVM_PIT_SPEAKER_DUMMY)))

    def irq_line(self, gsi: int, level: bool) -> None:
        self._need_irqchip("an interrupt line")
        if not 0 <= gsi < LINES:
            raise Invalid(f"interrupt line {gsi}: there are lines 0 to 23")
        ioctl_set(self._fd, Ioctl.KVM_IRQ_LINE, abi.IRQ_LEVEL.pack(gsi, level))
        self._lines[gsi] = level

    def set_timer_output(self, connected: bool) -> None:
        """KVM has its channels count anew then."""
        pit = bytearray(self.get_state("pit"))
        at, replaced = layouts.PIT_FLAGS_AT, layouts.PIT_REPLACED
        if connected == bool(pit[at] & replaced):
            pit[at] ^= replaced
            self.set_state("pit", bytes(pit))

    def signal_msi(self, address: int, data: int) -> None:
        self._need_irqchip("a message-signalled interrupt")
        message = abi.MSI.pack(address & 0xFFFF_FFFF, address >> 32, data, 0)
        with contextlib.suppress(Invalid):  # an address that names no local APIC
            ioctl_set(self._fd, Ioctl.KVM_SIGNAL_MSI, message)

    def set_fast_bus(self, bus: object | None) -> bool:
        if self._wires is not None:
            self._wires.close()
        self._wires = Wires(self._fd, self._lines, bus) if bus is not None else None
        for vcpu in self._vcpus.values():
            vcpu.wires = self._wires
        return bus is not None

    def set_deadline(self, when: int | None) -> None:
        self._deadline.set(when)

    def _clock(self) -> int:
        return layouts.quad(self._get(Ioctl.KVM_GET_CLOCK, bytearray(SIZES["clock"])), layouts.CLOCK)

    def _kick(self) -> None:
        for vcpu in list(self._vcpus.values()):
            vcpu.kick()

    def _need_irqchip(self, what: str) -> None:
        if not self._has_irqchip:
            raise Unsupported(f"{what}: the machine has no interrupt controller")

    # State

    def get_state(self, name: str) -> bytes:
        if name == "time":
            now = self._clock()
            return Time(now, now, deadline=NEVER if self._deadline.when is None else self._deadline.when).pack()
        if name == "turns":
            return self._turns
        if name == "chips":
            return progress.chips(bytes(self._lines), self.get_state("pit") if self._has_irqchip else None).pack()
        if name == "clock":
            return self._get(Ioctl.KVM_GET_CLOCK, bytearray(SIZES["clock"]))
        self._need_state(name)
        if name == "pit":
            return self._get(Ioctl.KVM_GET_PIT2, bytearray(SIZES["pit"]))
        chips = (bytearray(layouts.IRQCHIP.pack(chip, 0, b"")) for chip in range(layouts.IRQCHIPS))
        return b"".join(self._get(Ioctl.KVM_GET_IRQCHIP, chip) for chip in chips)

    def set_state(self, name: str, data: bytes) -> None:
        if name == "time":
            now = Time.unpack(data)
            self._set_clock(now.clock)
            self._deadline.set(None if now.deadline == NEVER else now.deadline)
            return
        if name == "turns":  # of another engine, to which it may go back
            if len(data) != TURNS.size:
                raise Invalid(f"turns has {TURNS.size} bytes, not {len(data)}")
            self._turns = data
            return
        if name == "chips":  # what devices drive, KVM hears of when it changes; its counters begin afresh
            self._lines[:] = bytes(level & 1 for level in Chips.unpack(data).lines)
            return
        if name != "clock":
            self._need_state(name)
        if len(data) != SIZES[name]:
            raise Invalid(f"{name} has {SIZES[name]} bytes, not {len(data)}")
        if name == "clock":
            self._set_clock(int.from_bytes(data[:8], "little"))
        elif name == "pit":
            ioctl_set(self._fd, Ioctl.KVM_SET_PIT2, data)
        else:
            self._set_irqchip(data)

    def _set_clock(self, now: int) -> None:
        """Without the flags, which say what KVM_GET_CLOCK knew: KVM_CLOCK_REALTIME would add the time since then."""
        ioctl_set(self._fd, Ioctl.KVM_SET_CLOCK, now.to_bytes(8, "little").ljust(SIZES["clock"], b"\0"))

    def _set_irqchip(self, data: bytes) -> None:
        size = layouts.IRQCHIP.size
        chips = [data[chip * size : (chip + 1) * size] for chip in range(layouts.IRQCHIPS)]
        for number, chip in enumerate(chips):
            if layouts.IRQCHIP.unpack(chip)[0] != number:
                raise Invalid(f"irqchip: chip_id of part {number} is not {number}")
        for chip in chips:
            ioctl_set(self._fd, Ioctl.KVM_SET_IRQCHIP, chip)

    def _need_state(self, name: str) -> None:
        if name not in MACHINE_STATES:
            raise Invalid(f"a machine has no state {name}")
        self._need_irqchip(name)

    def _get(self, request: Ioctl, buffer: bytearray) -> bytes:
        ioctl(self._fd, request, buffer)
        return bytes(buffer)

    # Lifecycle

    def close(self) -> None:
        self._deadline.close()
        if self._wires is not None:
            self._wires.close()
        for vcpu in self._vcpus.values():
            vcpu.close()
        for fd in (self._fd, self._device):
            if fd >= 0:
                os.close(fd)
        self._fd = self._device = -1
        for slot in self._slots.values():  # after the VM is gone: it cannot touch them any more
            slot.mapping.close()
        self._slots.clear()
