"""Single steps, breakpoints, watchpoints."""

from engine.case import Answer, Case, Debug, Memory, NoDebug, Refused, Regs, Run, RunError, Watch
from engine.cases.exceptions import idt64
from engine.machine import MMIO

_STEP = "debug cause=step rip="
_NO_USER_STEP = {"pvm-no-user-mode-debug": (
    Debug(step=True),
    RunError("cannot step in user mode", "_start"),
    Regs({"rip": "_start"}),
)}  # fmt: skip

CASES = (
    *(
        Case(
            f"step-{mode}",
            mode,
            "mov ecx, 2; l1: dec ecx; l2: jnz l1; l3: nop; l4: nop; l5:",
            (
                Debug(step=True),
                Run(_STEP + "{l1}"),
                Regs({"rcx": 2}),
                Run(_STEP + "{l2}"),
                Regs({"rcx": 1}),
                Run(_STEP + "{l1}"),
                Run(_STEP + "{l2}"),
                Run(_STEP + "{l3}"),
                NoDebug(),
                Debug(step=True),
                Run(_STEP + "{l4}"),
                Run(_STEP + "{l5}"),
            ),
            instead=_NO_USER_STEP if mode == "user" else {},
        )
        for mode in ("real", "protected", "long", "user")
    ),
    *(
        Case(
            f"step-through-out-and-in-{mode}",
            mode,
            "nop; l1: out 0x80, al; l2: nop; l3: in al, 0x80; l4: nop; l5:",
            (
                Debug(step=True),
                Run(_STEP + "{l1}"),
                Run("io direction=out port=0x80 size=1 count=1 data=0x9 rip={l2}"),
                Run(_STEP + "{l3}"),
                Run("io direction=in port=0x80 size=1 count=1 rip={l3}"),
                Answer(b"\x44"),
                Run(_STEP + "{l4}"),
                Regs({"rax": 0x44}),
                Run(_STEP + "{l5}"),
            ),
            regs={"rax": 9},
            instead=_NO_USER_STEP if mode == "user" else {},
        )
        for mode in ("long", "user")
    ),
    Case(
        "step-through-mmio",
        "long",
        "mov [rdi], eax; l1: mov eax, [rdi]; l2: nop; l3:",
        (
            Debug(step=True),
            Run(f"mmio direction=write addr={MMIO:#x} size=4 data=0x9 rip={{l1}}"),
            Run(f"mmio direction=read addr={MMIO:#x} size=4 rip={{l1}}"),
            Answer(b"\x01\0\0\0"),
            Run(_STEP + "{l2}"),
            Regs({"rax": 1}),
            Run(_STEP + "{l3}"),
        ),
        regs={"rax": 9, "rdi": MMIO},
    ),
    Case(
        "step-hlt",
        "long",
        "hlt; l1: nop; l2:",
        (Debug(step=True), Run("hlt rip={l1}"), Run(_STEP + "{l2}")),
    ),
    *(
        Case(
            f"breakpoint-loop-{mode}",
            mode,
            f"mov ecx, 3; l1: dec ecx; l2: jnz l1; {end}; l3:",
            (
                Debug(breakpoints={5: "l2"}),
                Run("debug cause=breakpoint id=5 rip={l2}"),
                Regs({"rcx": 2}),
                Run("debug cause=breakpoint id=5 rip={l2}"),
                Regs({"rcx": 1}),
                Run("debug cause=breakpoint id=5 rip={l2}"),
                Regs({"rcx": 0}),
                Run(line),
            ),
            instead={"pvm-no-user-mode-debug": (Debug(breakpoints={5: "l2"}), Run(line), Regs({"rcx": 0}))}
            if mode == "user" else {},
        )
        for mode, end, line in (
            ("real", "hlt", "hlt rip={l3}"),
            ("protected", "hlt", "hlt rip={l3}"),
            ("long", "hlt", "hlt rip={l3}"),
            ("user", "out 0x80, al", "io direction=out port=0x80 size=1 count=1 data=0x0 rip={l3}"),
        )
    ),
    Case(
        "breakpoints-four",
        "long",
        "l0: nop; l1: nop; l2: nop; l3: hlt; l4:",
        (
            Debug(breakpoints={1: "l0", 2: "l1", 3: "l2", 9: "l3"}),
            # A run that begins at a breakpoint executes the instruction there.
            Run("debug cause=breakpoint id=2 rip={l1}"),
            Run("debug cause=breakpoint id=3 rip={l2}"),
            Run("debug cause=breakpoint id=9 rip={l3}"),
            Run("hlt rip={l4}"),
        ),
    ),
    Case(
        "breakpoint-at-access",
        "long",
        "nop; l1: out 0x80, al; l2: in al, 0x80; l3: hlt; l4:",
        (
            Debug(breakpoints={1: "l1", 2: "l2", 3: "l3"}),
            Run("debug cause=breakpoint id=1 rip={l1}"),
            Run("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l2}"),
            # The next run begins at l2, which has a breakpoint: it executes the `in`.
            Run("io direction=in port=0x80 size=1 count=1 rip={l2}"),
            Answer(b"\x12"),
            Run("debug cause=breakpoint id=3 rip={l3}"),
            Regs({"rax": 0x12}),
            Run("hlt rip={l4}"),
        ),
        regs={"rax": 0},
    ),
    Case(
        "breakpoint-behind-a-store",
        "long",
        "mov [rdi], eax; l1: nop; l2: mov [rdi], eax; l3: nop; l4: hlt; l5:",
        (
            Debug(breakpoints={1: "l1", 4: "l4"}),
            Run(f"mmio direction=write addr={MMIO:#x} size=4 data=0x0 rip={{l1}}"),
            # The store is done, so this run begins at the breakpoint, and does not stop there.
            Run(f"mmio direction=write addr={MMIO:#x} size=4 data=0x0 rip={{l3}}"),
            Debug(step=True),
            Run(_STEP + "{l4}"),
            Run("hlt rip={l5}"),
        ),
        regs={"rax": 0, "rdi": MMIO},
    ),
    Case(
        "step-of-the-guests-own",
        "long",
        # The guest sets TF by itself: its handler gets the #DB behind the nop, in spite of a breakpoint.
        idt64(1)
        + """
            pushf
            or dword ptr [rsp], 0x100
            popf
            nop
        l1: nop
            hlt
        handler1:
            pop rbx
            mov rdx, dr6
        elsewhere:
            hlt
        l2:
        """,
        (
            Debug(breakpoints={1: "elsewhere"}),
            Run("debug cause=breakpoint id=1 rip={elsewhere}"),
            Regs({"rbx": "l1", "rdx": 0xFFFF4FF0}),
            Run("hlt rip={l2}"),
        ),
    ),
    Case(
        "breakpoint-jump-to-itself",
        "long",
        "l0: jmp l0",
        (
            Debug(breakpoints={7: "l0"}),
            Run("debug cause=breakpoint id=7 rip={l0}", times=3),
        ),
    ),
    Case(
        "step-over-breakpoints",
        "long",
        "l0: nop; l1: nop; l2: nop; l3:",
        (
            Debug(step=True, breakpoints={1: "l0", 2: "l1", 3: "l2"}),
            Run(_STEP + "{l1}"),
            Run(_STEP + "{l2}"),
            Run(_STEP + "{l3}"),
        ),
    ),
    Case(
        "breakpoint-gone",
        "long",
        "l0: nop; l1: nop; hlt; l2:",
        (Debug(breakpoints={1: "l1"}), NoDebug(), Run("hlt rip={l2}")),
    ),
    *(
        Case(
            f"watchpoint-write-{mode}",
            mode,
            f"mov eax, [0x2000]; mov dword ptr [0x2000], 7; l1: nop; {end}; l2:",
            (
                Debug(watchpoints=(Watch(4, 0x2000, 4, "w"),)),
                Run("debug cause=watchpoint id=4 addr=0x2000 rip={l1}"),
                Memory(0x2000, b"\x07\0\0\0"),
                Run(line),
            ),
            instead={"pvm-no-watchpoints": (
                Refused(Debug(watchpoints=(Watch(4, 0x2000, 4, "w"),)), "cannot watch data"),
                Run(line),
            )},
        )
        for mode, end, line in (
            ("real", "hlt", "hlt rip={l2}"),
            ("long", "hlt", "hlt rip={l2}"),
            ("user", "out 0x80, al", "io direction=out port=0x80 size=1 count=1 data=0x0 rip={l2}"),
        )
    ),
    Case(
        "watchpoint-read-write-of-12-bytes",
        "user",
        "mov al, [0x200b]; l1: mov byte ptr [0x200c], 7; mov word ptr [0x1fff], 7; l2: out 0x80, al; l3:",
        (
            Debug(watchpoints=(Watch(4, 0x2000, 12, "rw"),)),
            Run("debug cause=watchpoint id=4 addr=0x2008 rip={l1}"),
            Run("debug cause=watchpoint id=4 addr=0x2000 rip={l2}"),
            Run("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l3}"),
        ),
        instead={"pvm-no-watchpoints": (
            Refused(Debug(watchpoints=(Watch(4, 0x2000, 12, "rw"),)), "cannot watch data"),
            Run("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l3}"),
        )},
    ),
)  # fmt: skip
