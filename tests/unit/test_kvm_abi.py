"""The numbers of vmfs.engine.kvm.abi and vmfs.words.layouts against the C compiler and the host's linux/kvm.h."""

import re
import shutil
import struct
import subprocess

import pytest

from vmfs.engine.base import MACHINE_STATES, SIZES, VCPU_STATES
from vmfs.engine.kvm import abi
from vmfs.words import layouts

ALL_STATES = {**VCPU_STATES, **MACHINE_STATES}
ENUMS = (abi.Ioctl, abi.Cap, abi.ExitReason, abi.InternalError)

CONSTANTS = (
    "KVM_EXIT_IO_OUT",
    "KVM_MEM_LOG_DIRTY_PAGES",
    "KVM_MSR_EXIT_REASON_INVAL",
    "KVM_MSR_EXIT_REASON_UNKNOWN",
    "KVM_MEM_READONLY",
    "KVM_PIT_SPEAKER_DUMMY",
    "KVM_GUESTDBG_ENABLE",
    "KVM_GUESTDBG_SINGLESTEP",
    "KVM_GUESTDBG_USE_HW_BP",
    "KVM_GUESTDBG_INJECT_DB",
    "KVM_GUESTDBG_BLOCKIRQ",
)

# A value of this module, and the C expression that has to be it.
EXPRESSIONS = {
    "API_VERSION": "KVM_API_VERSION",
    "EMULATION_FLAG_INSTRUCTION_BYTES": "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES",
    "SYSTEM_EVENT_SHUTDOWN": "KVM_SYSTEM_EVENT_SHUTDOWN",
    "SYSTEM_EVENT_RESET": "KVM_SYSTEM_EVENT_RESET",
    "SYSTEM_EVENT_CRASH": "KVM_SYSTEM_EVENT_CRASH",
    "SYNC_X86_REGS": "KVM_SYNC_X86_REGS",
    "RUN_REQUEST_INTERRUPT_WINDOW": "offsetof(struct kvm_run, request_interrupt_window)",
    "RUN_IMMEDIATE_EXIT": "offsetof(struct kvm_run, immediate_exit)",
    "RUN_EXIT_REASON": "offsetof(struct kvm_run, exit_reason)",
    "RUN_READY_FOR_INTERRUPT": "offsetof(struct kvm_run, ready_for_interrupt_injection)",
    "RUN_IF_FLAG": "offsetof(struct kvm_run, if_flag)",
    "RUN_CR8": "offsetof(struct kvm_run, cr8)",
    "RUN_UNION": "offsetof(struct kvm_run, hw)",
    "RUN_MMIO_DATA": "offsetof(struct kvm_run, mmio.data)",
    "RUN_VALID_REGS": "offsetof(struct kvm_run, kvm_valid_regs)",
    "RUN_SYNC_REGS": "offsetof(struct kvm_run, s)",
    "PIT_CONFIG.size": "sizeof(struct kvm_pit_config)",
    "MEMORY_REGION.size": "sizeof(struct kvm_userspace_memory_region)",
    "DIRTY_LOG.size": "sizeof(struct kvm_dirty_log)",
    "ENABLE_CAP.size": "sizeof(struct kvm_enable_cap)",
    "IRQ_LEVEL.size": "sizeof(struct kvm_irq_level)",
    "MSI.size": "sizeof(struct kvm_msi)",
    "TRANSLATION.size": "sizeof(struct kvm_translation)",
    "INTERRUPT.size": "sizeof(struct kvm_interrupt)",
    "GUEST_DEBUG.size": "sizeof(struct kvm_guest_debug)",
    "MSR_LIST_HEAD.size": "sizeof(struct kvm_msr_list)",
    # what unpack_from reads of the union
    "IRQ_ROUTING.size": "sizeof(struct kvm_irq_routing)",
    "IRQ_ROUTING_ENTRY.size": "sizeof(struct kvm_irq_routing_entry)",
    "KVM_IRQ_ROUTING_IRQCHIP": "KVM_IRQ_ROUTING_IRQCHIP",
    "RUN_IO.size": "offsetof(struct kvm_run, io.data_offset) + 8 - offsetof(struct kvm_run, io)",
    "RUN_MMIO.size": "offsetof(struct kvm_run, mmio.is_write) + 1 - offsetof(struct kvm_run, mmio)",
    "RUN_DEBUG.size": "sizeof(struct kvm_debug_exit_arch)",
    "RUN_INTERNAL.size": "sizeof(((struct kvm_run *)0)->internal)",
    "RUN_EMULATION_FAILURE.size": "offsetof(struct kvm_run, emulation_failure.insn_bytes) + 15 - offsetof("
    "struct kvm_run, emulation_failure)",
    "RUN_SYSTEM_EVENT.size": "sizeof(((struct kvm_run *)0)->system_event)",
    "RUN_MSR.size": "sizeof(((struct kvm_run *)0)->msr)",
    "RUN_MEMORY_FAULT.size": "sizeof(((struct kvm_run *)0)->memory_fault)",
}

# The same of vmfs.words.layouts. The registers' offsets are compared in test_registers.
LAYOUTS = {
    "RBX": "offsetof(struct kvm_regs, rbx)",
    "RCX": "offsetof(struct kvm_regs, rcx)",
    "RSP": "offsetof(struct kvm_regs, rsp)",
    "RIP": "offsetof(struct kvm_regs, rip)",
    "RFLAGS": "offsetof(struct kvm_regs, rflags)",
    "SEGMENT.size": "sizeof(struct kvm_segment)",
    "TABLE.size": "sizeof(struct kvm_dtable)",
    "GDTR": "offsetof(struct kvm_sregs, gdt)",
    "IDTR": "offsetof(struct kvm_sregs, idt)",
    "CONTROL_AT": "offsetof(struct kvm_sregs, cr0)",
    "CR0": "offsetof(struct kvm_sregs, cr0)",
    "CR3": "offsetof(struct kvm_sregs, cr3)",
    "CR4": "offsetof(struct kvm_sregs, cr4)",
    "CR8": "offsetof(struct kvm_sregs, cr8)",
    "REGS_SIZE": "sizeof(struct kvm_regs)",
    "SREGS_SIZE": "sizeof(struct kvm_sregs)",
    "EFER": "offsetof(struct kvm_sregs, efer)",
    "SS_DPL": "offsetof(struct kvm_sregs, ss.dpl)",
    "FPU.size": "sizeof(struct kvm_fpu)",
    "XSAVE_LEGACY.size": "416",  # the legacy area without its reserved end, SDM 1 table 13-1
    "XSAVE_XMM": "160",
    "XSAVE_SOFTWARE": "464",
    "XSAVE_STATE_BV": "512",
    "XSAVE_YMM_HIGH": "576",
    "XSAVE_AVX_END": "832",
    "DR6": "offsetof(struct kvm_debugregs, dr6)",
    "XCR0": "offsetof(struct kvm_xcrs, xcrs[0].value)",
    "EXCEPTION_INJECTED": "offsetof(struct kvm_vcpu_events, exception.injected)",
    "EXCEPTION_PENDING": "offsetof(struct kvm_vcpu_events, exception.pending)",
    "EVENTS_FLAGS": "offsetof(struct kvm_vcpu_events, flags)",
    "EVENTS_SAY_NMI": "KVM_VCPUEVENT_VALID_NMI_PENDING",
    "UNDER_WAY[2]": "offsetof(struct kvm_vcpu_events, interrupt.injected)",
    "UNDER_WAY[3]": "offsetof(struct kvm_vcpu_events, nmi.injected)",
    "UNDER_WAY[4]": "offsetof(struct kvm_vcpu_events, nmi.pending)",
    "IRQCHIP.size": "sizeof(struct kvm_irqchip)",
    "IRQCHIP_CHIP": "offsetof(struct kvm_irqchip, chip)",
    "PIC_IMR": "offsetof(struct kvm_pic_state, imr)",
    "PIC_IRQ_BASE": "offsetof(struct kvm_pic_state, irq_base)",
    "PIC_INIT4": "offsetof(struct kvm_pic_state, init4)",
    "PIC_ELCR": "offsetof(struct kvm_pic_state, elcr)",
    "IOAPIC_PINS_AT": "2 * sizeof(struct kvm_irqchip) + offsetof(struct kvm_irqchip, chip.ioapic.redirtbl)",
    "PIT_CHANNEL.size": "sizeof(struct kvm_pit_channel_state)",
    "PIT_FLAGS_AT": "offsetof(struct kvm_pit_state2, flags)",
    "PIT_REPLACED": "KVM_PIT_FLAGS_HPET_LEGACY",
    "PIT_SPEAKER": "2",  # KVM_PIT_FLAGS_SPEAKER_DATA_ON, of Linux 5.19
    "CLOCK": "offsetof(struct kvm_clock_data, clock)",
    "LIST_HEAD.size": "sizeof(struct kvm_msrs)",
    "MSR_ENTRY.size": "sizeof(struct kvm_msr_entry)",
    "CPUID_ENTRY.size": "sizeof(struct kvm_cpuid_entry2)",
}

# The struct of each state of a fixed size: the first words of what its row says.
STATES = {name: "struct " + re.search(r"struct (\w+)", ALL_STATES[name].struct)[1] for name in SIZES}
STATES["irqchip"] += "[3]"


def value_of(module, name):
    return eval(name, vars(module).copy())


def wanted():
    """C expressions and the values that they shall have."""
    for enum in ENUMS:
        yield from ((member.name, member.value) for member in enum)
    yield from ((name, getattr(abi, name)) for name in CONSTANTS)
    for module, table in ((abi, EXPRESSIONS), (layouts, LAYOUTS)):
        yield from ((expression, value_of(module, name)) for name, expression in table.items())
    for field, (_bits, offset) in layouts.SEGMENT_FIELDS.items():
        yield f"offsetof(struct kvm_segment, {field})", offset
    yield "sizeof(struct kvm_cpuid2)", layouts.LIST_HEAD.size
    yield from ((f"sizeof({layout})", SIZES[name]) for name, layout in STATES.items())


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """The names that the host's header defines, and the values of the C expressions that it can say."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    preprocessed = subprocess.run(
        [compiler, "-E", "-dM", "-"], input="#include <linux/kvm.h>\n", capture_output=True, text=True
    )
    if preprocessed.returncode:
        pytest.skip("no linux/kvm.h: install linux-libc-dev")
    folder = tmp_path_factory.mktemp("abi")
    known = set(re.findall(r"#define (\w+)", preprocessed.stdout))
    newer = ("memory_fault", "KVM_EXIT_MEMORY_FAULT")
    expressions = [
        (text, value)
        for text, value in wanted()
        if not (re.fullmatch(r"KVM_\w+", text) and text not in known)
        and not (any(name in text for name in newer) and newer[1] not in known)
    ]
    lines = "\n".join(f'printf("%llu\\n", (unsigned long long)({text}));' for text, _ in expressions)
    source = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n"
    source += f"int main(void) {{ {lines} return 0; }}\n"
    built = subprocess.run(
        [compiler, "-x", "c", "-o", folder / "abi", "-"], input=source, capture_output=True, text=True
    )
    assert not built.returncode, built.stderr
    values = subprocess.run([folder / "abi"], capture_output=True, text=True, check=True).stdout.split()
    return [(text, value, int(there)) for (text, value), there in zip(expressions, values, strict=True)]


def test_numbers_and_layouts_are_the_headers(header):
    assert [(text, hex(here)) for text, here, _ in header] == [
        (text, hex(there)) for text, _, there in header
    ]


def test_nearly_every_number_was_compared(header):
    """A header that is older than what is in use lacks a few, and not many."""
    assert len(header) >= 0.9 * len(list(wanted()))


def test_every_struct_and_state_is_compared():
    for module, table in ((abi, EXPRESSIONS), (layouts, LAYOUTS)):
        structs = {name for name, value in vars(module).items() if isinstance(value, struct.Struct)}
        # Of fixed size by their only user, and no struct of their own.
        structs -= {"RUN_FAIL_ENTRY", "RUN_UNKNOWN", "SIGNAL_MASK", "_QUAD"}
        assert structs == {name.removesuffix(".size") for name in table if name.endswith(".size")}
    assert set(ALL_STATES) - set(STATES) == set(layouts.ENTRIES)


def test_every_number_of_a_layout_is_compared():
    """But for those that a manual says, and how many chips there are."""
    numbers = {name for name, value in vars(layouts).items() if isinstance(value, int)}
    manual = {"LAPIC_SPURIOUS", "LAPIC_LINT0", "LAPIC_LINT1", "XSAVE_X87", "XSAVE_SSE", "XSAVE_AVX", "IRQCHIPS"}
    assert numbers - manual <= set(LAYOUTS)
