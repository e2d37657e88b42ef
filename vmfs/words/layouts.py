"""Layouts: what lies where in the structs that states are, which are those of KVM on every engine. Numbers, and what
takes such a struct apart; no logic.

Source of every number: Linux include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h, which
tests/unit/test_kvm_abi.py compares them with; of the XSAVE area, Intel SDM 1 13.4. What only the ioctls of KVM take is
in vmfs/engine/kvm/abi.py. The registers by name are in vmfs/words/registers.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from vmfs.words.errors import Invalid

_QUAD = struct.Struct("<Q")

# struct kvm_regs: 8 bytes each
GENERAL = tuple("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split())
RBX, RCX, RSP, RIP, RFLAGS = (8 * GENERAL.index(name) for name in ("rbx", "rcx", "rsp", "rip", "rflags"))

# struct kvm_sregs: segments, descriptor tables, control registers, and a bitmap of interrupts
SEGMENTS = tuple("cs ds es fs gs ss tr ldtr".split())
SEGMENT = struct.Struct("<QIHBBBBBBBBBx")
SEGMENT_FIELDS = {  # struct kvm_segment: bits and offset of each
    "selector": (16, 12), "base": (64, 0), "limit": (32, 8), "type": (8, 14), "present": (8, 15), "dpl": (8, 16),
    "db": (8, 17), "s": (8, 18), "l": (8, 19), "g": (8, 20), "avl": (8, 21), "unusable": (8, 22),
}  # fmt: skip
TABLES = ("gdtr", "idtr")
TABLE = struct.Struct("<QH6x")  # struct kvm_dtable: base, limit
GDTR = len(SEGMENTS) * SEGMENT.size
IDTR = GDTR + TABLE.size
CONTROL = tuple("cr0 cr2 cr3 cr4 cr8 efer apic_base".split())  # 8 bytes each
CONTROL_AT = IDTR + TABLE.size
CR0, CR3, CR4, CR8, EFER = (CONTROL_AT + 8 * CONTROL.index(name) for name in ("cr0", "cr3", "cr4", "cr8", "efer"))
SS_DPL = SEGMENTS.index("ss") * SEGMENT.size + SEGMENT_FIELDS["dpl"][1]

# struct kvm_fpu, and the same in the order of the legacy area of struct kvm_xsave
FPU = struct.Struct("<128sHHBxHQQ256sI4x")  # st, fcw fsw ftwx last_opcode last_ip last_dp, xmm, mxcsr
FPU_FIELDS = {  # bits and offset of each; st0 first, as the register stack has them
    **{f"st{index}": (80, 16 * index) for index in range(8)},
    "fcw": (16, 128), "fsw": (16, 130), "ftw": (8, 132), "fop": (16, 134), "fip": (64, 136), "fdp": (64, 144),
    **{f"xmm{index}": (128, 152 + 16 * index) for index in range(16)},
    "mxcsr": (32, 408),
}  # fmt: skip
XSAVE_LEGACY = struct.Struct("<HHBxHQQI4x128s256s")  # fcw fsw ftwx fop rip rdp mxcsr, st, xmm
XSAVE_XMM = 160  # XMM0 to XMM15
XSAVE_SOFTWARE = 464  # bytes that are software's; Linux has XCR0 there for debuggers
XSAVE_STATE_BV = 512  # u64, the first of the header: which components are not in their initial state
XSAVE_YMM_HIGH = 576  # the upper halves of YMM0 to YMM15, 16 bytes each (CPUID 0DH.2)
XSAVE_AVX_END = XSAVE_YMM_HIGH + 16 * 16
XSAVE_X87, XSAVE_SSE, XSAVE_AVX = 1 << 0, 1 << 1, 1 << 2

# struct kvm_debugregs: DR0 to DR3, DR6, DR7, flags; struct kvm_xcrs: a count, flags, {xcr, reserved, value}
DEBUGREGS_FIELDS = {f"dr{number}": 8 * at for at, number in enumerate((0, 1, 2, 3, 6, 7))}
DR6 = DEBUGREGS_FIELDS["dr6"]
XCR0 = 16

# struct kvm_vcpu_events
EXCEPTION_INJECTED, EXCEPTION_PENDING, EVENTS_FLAGS = 0, 3, 20
EVENTS_SAY_NMI = 1  # KVM_VCPUEVENT_VALID_NMI_PENDING: nmi.pending says whether one is
# What of it is on its way to the guest: exception.injected and .pending, interrupt.injected, nmi.injected and .pending.
UNDER_WAY = (EXCEPTION_INJECTED, EXCEPTION_PENDING, 8, 12, 13)
# struct kvm_mp_state
RUNNABLE, HALTED = struct.pack("<I", 0), struct.pack("<I", 3)

# struct kvm_lapic_state: the registers, where a LAPIC has them (SDM 3A table 11-1)
LAPIC_SPURIOUS, LAPIC_LINT0, LAPIC_LINT1 = 0x0F0, 0x350, 0x360
# Three struct kvm_irqchip: chip_id, pad, and struct kvm_pic_state (8259 master, slave) or kvm_ioapic_state
IRQCHIP = struct.Struct("<II512s")
IRQCHIPS = 3
IRQCHIP_CHIP = 8
PIC_IMR, PIC_IRQ_BASE, PIC_INIT4, PIC_ELCR = 2, 5, 13, 14
# In the third, after base_address, ioregsel, id, irr and pad: the redirection table
IOAPIC_PINS, IOAPIC_PINS_AT = "<24Q", 2 * IRQCHIP.size + IRQCHIP_CHIP + 24
# struct kvm_pit_state2 begins with three struct kvm_pit_channel_state: count, latched_count, count_latched,
# status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd, gate, count_load_time
PIT_CHANNEL = struct.Struct("<IH10Bq")
PIT_FLAGS_AT = 3 * PIT_CHANNEL.size  # and then flags
PIT_REPLACED, PIT_SPEAKER = 1, 2  # KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON
CLOCK = 0  # in struct kvm_clock_data: nanoseconds

# struct kvm_msrs and kvm_cpuid2: a count, a pad, and entries
LIST_HEAD = struct.Struct("<II")
MSR_ENTRY = struct.Struct("<IIQ")  # index, reserved, data
CPUID_ENTRY = struct.Struct("<7I12x")  # function, index, flags, eax, ebx, ecx, edx
ENTRIES = {"msrs": MSR_ENTRY, "cpuid": CPUID_ENTRY}  # the states that are such lists

REGS_SIZE = 8 * len(GENERAL)
SREGS_SIZE = CONTROL_AT + 8 * len(CONTROL) + 32


def quad(blob: bytes | bytearray, at: int) -> int:
    """The 8 bytes there, as a number."""
    return int(_QUAD.unpack_from(blob, at)[0])


def put_quad(blob: bytearray, at: int, value: int) -> None:
    _QUAD.pack_into(blob, at, value)


def with_quad(blob: bytes, at: int, value: int) -> bytes:
    """`blob` with other 8 bytes there."""
    return blob[:at] + _QUAD.pack(value) + blob[at + 8 :]


def is_whole_list(name: str, data: bytes | bytearray) -> bool:
    """Whether `data` is a state of ENTRIES, with as many entries as its head says."""
    if len(data) < LIST_HEAD.size:
        return False
    return len(data) == LIST_HEAD.size + ENTRIES[name].size * LIST_HEAD.unpack_from(data)[0]


def check_list(name: str, data: bytes | bytearray) -> None:
    """Invalid where it is none."""
    if not is_whole_list(name, data):
        raise Invalid(f"{name}: its {len(data)} bytes are not those of as many entries as it says that it has")


def pack_msrs(entries: Iterable[tuple[int, int]]) -> bytes:
    """`struct kvm_msrs` with entries of index and value."""
    body = [MSR_ENTRY.pack(index, 0, value) for index, value in entries]
    return LIST_HEAD.pack(len(body), 0) + b"".join(body)


def unpack_msrs(data: bytes | bytearray) -> list[tuple[int, int]]:
    """Index and value of each entry."""
    check_list("msrs", data)
    return [(index, value) for index, _reserved, value in MSR_ENTRY.iter_unpack(data[LIST_HEAD.size :])]


def cpuid_entries(data: bytes | bytearray) -> Iterator[tuple[int, int, int, int, int, int, int]]:
    """function, index, flags, eax, ebx, ecx and edx of each entry."""
    return CPUID_ENTRY.iter_unpack(data[LIST_HEAD.size :])  # type: ignore[return-value]
