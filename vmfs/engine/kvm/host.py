"""Which kind of KVM the host has, where it matters."""

from pathlib import Path

_MODULES = Path("/sys/module")  # has a module that is built in, too


def is_pvm() -> bool:
    """Whether KVM runs without the CPU's virtualization, as PVM: user mode natively, the rest emulated.

    What follows from it:

    - Each port access is emulated, so rip has moved behind an `out` when KVM_RUN returns. On VMX and SVM it
      moves behind a plain `out` at the next KVM_RUN only.
    - Debug registers and TF do not stop user-mode code; a single step there is a #DB in the guest.
    - No data breakpoint works.
    - The single step of a `hlt` is reported as a step, and the `hlt` one instruction later.
    """
    hardware = any((_MODULES / name).exists() for name in ("kvm_intel", "kvm_amd"))
    return (_MODULES / "kvm_pvm").exists() and not hardware
