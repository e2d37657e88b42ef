"""hlt, triple faults, kicks: how a run ends by itself and from outside."""

from engine.case import Answer, Case, ClearKick, Data, Kick, Regs, Run, SetRegs
from engine.machine import MMIO

CASES = (
    *(
        Case(
            f"hlt-and-on-{mode}",
            mode,
            "mov eax, 1; hlt; l1: mov eax, 2; hlt; l2:",
            (Run("hlt rip={l1}"), Regs({"rax": 1}), Run("hlt rip={l2}"), Regs({"rax": 2})),
        )
        for mode in ("real", "protected", "long")
    ),
    Case(
        "kick-before-run",
        "long",
        "l0: mov eax, 1; hlt; l1:",
        (
            Kick(),
            Kick(),
            Run("interrupted rip={l0}"),
            Regs({"rax": 0}),
            Run("hlt rip={l1}"),
            Regs({"rax": 1}),
        ),
        regs={"rax": 0},
    ),
    Case(
        "kick-forgotten",
        "long",
        "hlt; l1:",
        (Kick(), ClearKick(), Run("hlt rip={l1}")),
    ),
    Case(
        "kick-keeps-the-answer-of-in",
        "long",
        "l0: in al, dx; l1: hlt; l2:",
        (
            Run("io direction=in port=0x80 size=1 count=1 rip={l0}"),
            Answer(b"\x31"),
            Kick(),
            # The next run begins with the end of the `in`; the kick ends it there.
            Run("interrupted rip={l1}"),
            Data(b""),
            Regs({"rax": 0x31}),
            Run("hlt rip={l2}"),
        ),
        regs={"rax": 0, "rdx": 0x80},
    ),
    Case(
        "kick-after-a-store",
        "long",
        "mov [rdi], al; l1: hlt; l2:",
        (
            Run(f"mmio direction=write addr={MMIO:#x} size=1 data=0x0 rip={{l1}}"),
            Kick(),
            Run("interrupted rip={l1}"),
            Run("hlt rip={l2}"),
        ),
        regs={"rax": 0, "rdi": MMIO},
    ),
    Case(
        "run-elsewhere",
        "long",
        "hlt; l1: nop; elsewhere: mov ecx, 7; hlt; l2:",
        (Run("hlt rip={l1}"), SetRegs({"rip": "elsewhere"}), Run("hlt rip={l2}"), Regs({"rcx": 7})),
    ),
)
