"""Where an engine differs from the CPU, by name: how it is recognised, why, and what it does instead.

The cases in `tests/engine/cases` and the tests assert what happens instead: none is skipped for a divergence.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.machine import machine_on

from vmfs.engine.kvm.engine import KvmEngine
from vmfs.engine.kvm.host import is_pvm


@dataclass(frozen=True)
class Divergence:
    name: str
    engine: str
    on_host: Callable[[], bool]
    why: str
    in_cases: bool = True  # or in a test function


def _everywhere() -> bool:
    return True


def _svm() -> bool:
    return Path("/sys/module/kvm_amd").exists()


def _no_la57() -> bool:
    """CPUID.(7,0):ECX bit 16 (SDM 3A 4.1.4) of the CPUs that this KVM makes."""
    with machine_on(KvmEngine()) as vm:
        entries = struct.iter_unpack("<7I12x", vm.vcpu.get_state("cpuid")[8:])
    return not any(leaf == 7 and index == 0 and ecx >> 16 & 1 for leaf, index, _, _, _, ecx, _ in entries)


DIVERGENCES = (
    Divergence(
        "kvm-rep-outs-ends-late",
        "kvm",
        _everywhere,
        "KVM's emulator leaves rip at the string instruction after its last iteration, with rcx 0: the "
        "next run executes it for no element. Nothing in kvm_run tells this from a rep outs that goes on.",
    ),
    Divergence(
        "kvm-cpuid-is-final",
        "kvm",
        _everywhere,
        "KVM refuses another CPUID once a CPU has run (Linux 5.16 and later): it has cached what follows.",
        in_cases=False,
    ),
    Divergence(
        "kvm-steps-hold-interrupts-back",
        "kvm",
        _everywhere,
        "KVM steps with RFLAGS.TF, which the delivery of an interrupt clears: the step would end after the "
        "handler's iret. So interrupts wait until a run that is no step.",
    ),
    Divergence(
        "kvm-delivers-by-itself",
        "kvm",
        _everywhere,
        "KVM delivers exceptions and interrupts to the guest without an exit: to catch them is refused.",
    ),
    Divergence(
        "kvm-sleeps-in-the-kernel",
        "kvm",
        _everywhere,
        "With its interrupt controllers KVM has no exit for HLT. One that nothing can end is found by a look at the "
        "CPU, every second, when a kick ends a run, and when one begins: the run ends up to a second late.",
        in_cases=False,
    ),
    Divergence(
        "kvm-steps-see-changes",
        "kvm",
        _everywhere,
        "A watchpoint beyond the debug registers is watched for by single steps. They see what an instruction "
        "changed: a write of the value that is there already does not stop.",
        in_cases=False,
    ),
    Divergence(
        "kvm-no-5-level-paging",
        "kvm",
        _no_la57,
        "KVM offers LA57 where the host's CPU has it; elsewhere CR4.LA57 is reserved, and refused.",
        in_cases=False,
    ),
    Divergence(
        "svm-shutdown-resets",
        "kvm",
        _svm,
        "The VMCB is undefined after an intercepted shutdown (AMD APM 2, 15.14.3), and KVM resets the CPU "
        "then: the registers of the triple fault are lost.",
    ),
    Divergence(
        "pvm-no-user-mode-debug",
        "kvm",
        is_pvm,
        "PVM runs user mode natively without loading the debug registers, and a #DB of it is the guest's. A "
        "breakpoint there does not stop; a step is refused, because it would be an exception in the guest.",
    ),
    Divergence(
        "pvm-no-watchpoints",
        "kvm",
        is_pvm,
        "PVM emulates the kernel, and KVM's emulator has no data breakpoints. Writes are watched for by single "
        "steps, so not in user mode; reads are refused.",
    ),
    Divergence(
        "pvm-steps-past-exceptions",
        "kvm",
        is_pvm,
        "A step whose instruction raises an exception ends after the first instruction of the handler, and a "
        "step of iretq after the instruction that it returns to. Breakpoints in debug registers stop before "
        "that, those that are watched for by steps do not.",
    ),
    Divergence(
        "pvm-steps-past-hlt",
        "kvm",
        is_pvm,
        "A step of HLT on a machine with interrupt controllers ends after it with a CPU that does not sleep.",
        in_cases=False,
    ),
    Divergence(
        "pvm-dirty-log-has-code",
        "kvm",
        is_pvm,
        "PVM maps the page that user mode executes for writing, too, and a page mapped so counts as dirty.",
        in_cases=False,
    ),
    Divergence(
        "pvm-interrupts-late",
        "kvm",
        is_pvm,
        "PVM emulates several instructions before it looks whether an interrupt can be injected: one that "
        "waits for sti comes some instructions after it.",
    ),
    Divergence(
        "pvm-no-int",
        "kvm",
        is_pvm,
        "KVM's emulator has int n in real mode only: elsewhere it is an `error` exit.",
    ),
    Divergence(
        "pvm-no-iret",
        "kvm",
        is_pvm,
        "KVM's emulator has iret in real mode only, and PVM itself has iretq: others are an `error` exit.",
    ),
    Divergence(
        "pvm-syscall-stays-in-user-mode",
        "kvm",
        is_pvm,
        "A SYSCALL in user mode arrives at LSTAR with the privileges and the flags of user mode, where no "
        "PVM kernel has registered another entry.",
    ),
    Divergence(
        "pvm-pages-in-long-mode-only",
        "kvm",
        is_pvm,
        "PVM takes CR0.PG in long mode only. A guest's mov to CR0 that sets it elsewhere is a triple fault; in "
        "state it is dropped without a word, and so refused.",
    ),
    Divergence(
        "pvm-shows-host-selectors",
        "kvm",
        is_pvm,
        "User mode runs with the host's own segment selectors, and `mov r, cs` reads them. State shows the guest's.",
    ),
    Divergence(
        "pvm-tsc-is-the-hosts",
        "kvm",
        is_pvm,
        "The TSC is the host's, and IA32_TSC takes a value without a word and keeps none.",
        in_cases=False,
    ),
)


def active(engine: str) -> frozenset[str]:
    return frozenset(row.name for row in DIVERGENCES if row.engine == engine and row.on_host())
