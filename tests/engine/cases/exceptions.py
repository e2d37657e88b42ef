"""Exceptions that the guest handles, and those that nobody does."""

from engine.case import Case, Memory, Regs, Run, RunError, Sregs

_CR2 = 232  # offset in struct kvm_sregs


def idt64(*vectors: int) -> str:
    """Make and load a table of 64-bit interrupt gates (SDM 3A 6.14.1), to labels handlerN."""
    gates = []
    for vector in range(max(vectors) + 1):
        handler = f"handler{vector}" if vector in vectors else "0"
        present = "0x8e00" if vector in vectors else "0"
        gates.append(f".word {handler}, 8, {present}, 0, 0, 0, 0, 0")
    return "\n".join(
        ("lidt [idtr]", "jmp behind_idt", ".balign 8", "idt:", *gates, "idtr: .word . - idt - 1", ".quad idt",
         "behind_idt:")
    )  # fmt: skip


_UNMAPPED = 0x7000000000

CASES = (
    *(
        Case(
            f"triple-fault-{mode}",
            mode,
            "mov eax, 5; l1: ud2",
            (Run("shutdown cause=triple-fault rip={l1}"),),
            instead={"svm-shutdown-resets": (Run("shutdown cause=triple-fault rip=0xfff0"),)},
        )
        for mode in ("protected", "long")
    ),
    Case(
        "page-fault",
        "long",
        idt64(14) + """
            mov rdi, 0x7000000000
        l1: mov [rdi], eax
            hlt
        handler14:
            pop rbx
            mov rcx, [rsp]
            mov rdx, cr2
            hlt
        l2:
        """,
        (
            Run("hlt rip={l2}"),
            # Error code: a write (bit 1) by the supervisor to a page that is not present (SDM 3A 4.7).
            Regs({"rbx": 2, "rcx": "l1", "rdx": _UNMAPPED}),
            Sregs(_CR2, _UNMAPPED),
        ),
    ),
    Case(
        "invalid-opcode",
        "long",
        idt64(6) + "l1: ud2; hlt; handler6: pop rbx; hlt; l2:",
        (Run("hlt rip={l2}"), Regs({"rbx": "l1"})),
    ),
    Case(
        "divide-error",
        "long",
        idt64(0) + "xor eax, eax; xor edx, edx; xor ecx, ecx; l1: div ecx; hlt; handler0: pop rbx; hlt; l2:",
        (Run("hlt rip={l2}"), Regs({"rbx": "l1"})),
    ),
    Case(
        "general-protection",
        "long",
        # A non-canonical address (SDM 1 3.3.7.1): #GP(0).
        idt64(13)
        + "mov rdi, 0x8000000000000000; l1: mov al, [rdi]; hlt; handler13: pop rbx; pop rcx; hlt; l2:",
        (Run("hlt rip={l2}"), Regs({"rbx": 0, "rcx": "l1"})),
    ),
    Case(
        "software-interrupt",
        "long",
        idt64(0x30) + "l0: int 0x30; l1: hlt; l2: handler48: mov rbx, [rsp]; mov eax, 3; iretq",
        (Run("hlt rip={l2}"), Regs({"rax": 3, "rbx": "l1"})),
        instead={"pvm-no-int": (RunError("the code there is cd 30", "l0"),)},
    ),
    Case(
        "real-mode-software-interrupt",
        "real",
        """
            mov word ptr [0x40 * 4], offset handler
            mov word ptr [0x40 * 4 + 2], 0
            mov sp, 0x8000
            int 0x40
            hlt
        l1:
        handler: mov word ptr [0x3000], 0x1234; iret
        """,
        (Run("hlt rip={l1}"), Memory(0x3000, b"\x34\x12"), Regs({"rsp": 0x8000})),
    ),
)  # fmt: skip
