"""KVM's system call interface: ioctl numbers, constants and struct layouts, and no logic.
What lies where in states is in vmfs/words/layouts.py.

Source of every number: Linux include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h. What they mean:
Linux Documentation/virt/kvm/api.rst. tests/unit/test_kvm_abi.py checks them against the host's headers.
"""

import enum
import struct

API_VERSION = 12  # "Applications should refuse to run if KVM_GET_API_VERSION returns a value other than 12"


class Ioctl(enum.IntEnum):
    """The ioctls, by the names that error sentences use."""

    # on /dev/kvm
    KVM_GET_API_VERSION = 0xAE00
    KVM_CREATE_VM = 0xAE01
    KVM_GET_MSR_INDEX_LIST = 0xC004AE02
    KVM_CHECK_EXTENSION = 0xAE03
    KVM_GET_VCPU_MMAP_SIZE = 0xAE04
    KVM_GET_SUPPORTED_CPUID = 0xC008AE05
    # on a VM
    KVM_CREATE_VCPU = 0xAE41
    KVM_GET_DIRTY_LOG = 0x4010AE42
    KVM_SET_USER_MEMORY_REGION = 0x4020AE46
    KVM_SET_TSS_ADDR = 0xAE47
    KVM_SET_IDENTITY_MAP_ADDR = 0x4008AE48
    KVM_CREATE_IRQCHIP = 0xAE60
    KVM_IRQ_LINE = 0x4008AE61
    KVM_SET_GSI_ROUTING = 0x4008AE6A
    KVM_SIGNAL_MSI = 0x4020AEA5
    KVM_GET_IRQCHIP = 0xC208AE62
    KVM_SET_IRQCHIP = 0x8208AE63
    KVM_CREATE_PIT2 = 0x4040AE77
    KVM_SET_CLOCK = 0x4030AE7B
    KVM_GET_CLOCK = 0x8030AE7C
    KVM_GET_PIT2 = 0x8070AE9F
    KVM_SET_PIT2 = 0x4070AEA0
    KVM_ENABLE_CAP = 0x4068AEA3
    # on a vCPU
    KVM_RUN = 0xAE80
    KVM_GET_REGS = 0x8090AE81
    KVM_SET_REGS = 0x4090AE82
    KVM_GET_SREGS = 0x8138AE83
    KVM_SET_SREGS = 0x4138AE84
    KVM_TRANSLATE = 0xC018AE85
    KVM_INTERRUPT = 0x4004AE86
    KVM_GET_MSRS = 0xC008AE88
    KVM_SET_MSRS = 0x4008AE89
    KVM_SET_SIGNAL_MASK = 0x4004AE8B
    KVM_GET_LAPIC = 0x8400AE8E
    KVM_SET_LAPIC = 0x4400AE8F
    KVM_SET_CPUID2 = 0x4008AE90
    KVM_GET_CPUID2 = 0xC008AE91
    KVM_GET_MP_STATE = 0x8004AE98
    KVM_SET_MP_STATE = 0x4004AE99
    KVM_NMI = 0xAE9A
    KVM_SET_GUEST_DEBUG = 0x4048AE9B
    KVM_GET_VCPU_EVENTS = 0x8040AE9F
    KVM_SET_VCPU_EVENTS = 0x4040AEA0
    KVM_GET_DEBUGREGS = 0x8080AEA1
    KVM_SET_DEBUGREGS = 0x4080AEA2
    KVM_GET_XSAVE = 0x9000AEA4
    KVM_SET_XSAVE = 0x5000AEA5
    KVM_GET_XCRS = 0x8188AEA6
    KVM_SET_XCRS = 0x4188AEA7
    KVM_GET_XSAVE2 = 0x9000AECF


class Cap(enum.IntEnum):
    """Arguments of KVM_CHECK_EXTENSION."""

    KVM_CAP_IRQCHIP = 0
    KVM_CAP_USER_MEMORY = 3
    KVM_CAP_SET_TSS_ADDR = 4
    KVM_CAP_EXT_CPUID = 7
    KVM_CAP_NR_MEMSLOTS = 10
    KVM_CAP_MP_STATE = 14
    KVM_CAP_DESTROY_MEMORY_REGION_WORKS = 21
    KVM_CAP_USER_NMI = 22
    KVM_CAP_SET_GUEST_DEBUG = 23
    KVM_CAP_PIT2 = 33
    KVM_CAP_PIT_STATE2 = 35
    KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
    KVM_CAP_ADJUST_CLOCK = 39
    KVM_CAP_VCPU_EVENTS = 41
    KVM_CAP_DEBUGREGS = 50
    KVM_CAP_XSAVE = 55
    KVM_CAP_XCRS = 56
    KVM_CAP_SYNC_REGS = 74
    KVM_CAP_READONLY_MEM = 81
    KVM_CAP_IMMEDIATE_EXIT = 136
    KVM_CAP_X86_USER_SPACE_MSR = 188
    KVM_CAP_SET_GUEST_DEBUG2 = 195
    KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204
    KVM_CAP_XSAVE2 = 208


class ExitReason(enum.IntEnum):
    """kvm_run.exit_reason."""

    KVM_EXIT_UNKNOWN = 0
    KVM_EXIT_EXCEPTION = 1
    KVM_EXIT_IO = 2
    KVM_EXIT_HYPERCALL = 3
    KVM_EXIT_DEBUG = 4
    KVM_EXIT_HLT = 5
    KVM_EXIT_MMIO = 6
    KVM_EXIT_IRQ_WINDOW_OPEN = 7
    KVM_EXIT_SHUTDOWN = 8
    KVM_EXIT_FAIL_ENTRY = 9
    KVM_EXIT_INTR = 10
    KVM_EXIT_SET_TPR = 11
    KVM_EXIT_TPR_ACCESS = 12
    KVM_EXIT_NMI = 16
    KVM_EXIT_INTERNAL_ERROR = 17
    KVM_EXIT_SYSTEM_EVENT = 24
    KVM_EXIT_IOAPIC_EOI = 26
    KVM_EXIT_HYPERV = 27
    KVM_EXIT_X86_RDMSR = 29
    KVM_EXIT_X86_WRMSR = 30
    KVM_EXIT_X86_BUS_LOCK = 33
    KVM_EXIT_XEN = 34
    KVM_EXIT_NOTIFY = 37
    KVM_EXIT_MEMORY_FAULT = 39


class InternalError(enum.IntEnum):
    """kvm_run.internal.suberror."""

    KVM_INTERNAL_ERROR_EMULATION = 1
    KVM_INTERNAL_ERROR_SIMUL_EX = 2
    KVM_INTERNAL_ERROR_DELIVERY_EV = 3
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4


# struct kvm_run: the fields that the engine touches, as byte offsets and layouts.
RUN_REQUEST_INTERRUPT_WINDOW = 0  # u8
RUN_IMMEDIATE_EXIT = 1  # u8
RUN_EXIT_REASON = 8  # u32
RUN_READY_FOR_INTERRUPT = 12  # u8
RUN_IF_FLAG = 13  # u8
RUN_CR8 = 16  # u64, both ways when there is no in-kernel LAPIC
RUN_UNION = 32
RUN_IO = struct.Struct("<BBHIQ")  # direction (1 is out), size, port, count, data_offset in the mapping
RUN_MMIO = struct.Struct("<Q8sIB")  # phys_addr, data, len, is_write
RUN_MMIO_DATA = RUN_UNION + 8
RUN_DEBUG = struct.Struct("<IIQQQ")  # exception, pad, pc, dr6, dr7
RUN_INTERNAL = struct.Struct("<II16Q")  # suberror, ndata, data
RUN_EMULATION_FAILURE = struct.Struct("<IIQB15s")  # suberror, ndata, flags, insn_size, insn_bytes
RUN_FAIL_ENTRY = struct.Struct("<QI")  # hardware_entry_failure_reason, cpu
RUN_UNKNOWN = struct.Struct("<Q")  # hardware_exit_reason
RUN_SYSTEM_EVENT = struct.Struct("<II16Q")  # type, ndata, data
RUN_MSR = struct.Struct("<B7xIIQ")  # error, reason, index, data
RUN_MEMORY_FAULT = struct.Struct("<QQQ")  # flags, gpa, size
RUN_VALID_REGS = 288  # u64: what KVM copies into the mapping at each exit
RUN_SYNC_REGS = 304  # struct kvm_regs, then kvm_sregs, then kvm_vcpu_events
SYNC_X86_REGS = 1

KVM_EXIT_IO_OUT = 1
EMULATION_FLAG_INSTRUCTION_BYTES = 1
KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN = 1, 2
SYSTEM_EVENT_SHUTDOWN, SYSTEM_EVENT_RESET, SYSTEM_EVENT_CRASH = 1, 2, 3

MEMORY_REGION = struct.Struct("<IIQQQ")  # slot, flags, guest_phys_addr, memory_size, userspace_addr
KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY = 1, 2
DIRTY_LOG = struct.Struct("<IIQ")  # slot, padding, address of the bitmap
ENABLE_CAP = struct.Struct("<II4Q64x")  # cap, flags, args
IRQ_LEVEL = struct.Struct("<II")  # irq, level
MSI = struct.Struct("<IIII16x")  # address, its upper half, data, flags
IRQ_ROUTING = struct.Struct("<II")  # nr, flags
IRQ_ROUTING_ENTRY = struct.Struct("<IIIIII24x")  # gsi, type, flags, pad, irqchip.irqchip, irqchip.pin
KVM_IRQ_ROUTING_IRQCHIP = 1
PIT_CONFIG = struct.Struct("<I60x")  # flags
KVM_PIT_SPEAKER_DUMMY = 1  # KVM answers port 0x61, too

SIGNAL_MASK = struct.Struct("<IQ")  # len (8), sigset
TRANSLATION = struct.Struct("<QQBBB5x")  # linear_address, physical_address, valid, writeable, usermode
INTERRUPT = struct.Struct("<I")  # irq: the vector
GUEST_DEBUG = struct.Struct("<II8Q")  # control, pad, debugreg
KVM_GUESTDBG_ENABLE = 1
KVM_GUESTDBG_SINGLESTEP = 2
KVM_GUESTDBG_USE_HW_BP = 0x20000
KVM_GUESTDBG_INJECT_DB = 0x40000
KVM_GUESTDBG_BLOCKIRQ = 0x100000

MSR_LIST_HEAD = struct.Struct("<I")  # nmsrs; then a u32 each
CPUID_MAX_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES in arch/x86/kvm/cpuid.h

# An LVT entry, and a redirection entry of the IOAPIC: delivery modes in bits 10:8 (Intel SDM 3A 11.6.1)
ENTRY_MASKED, UNMASKABLE_MODES = 1 << 16, (4, 5)  # NMI, INIT
