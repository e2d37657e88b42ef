"""Single steps, breakpoints, watchpoints."""

from engine.case import (
    Answer,
    Case,
    Complete,
    Debug,
    GoOn,
    Interrupt,
    Kick,
    Memory,
    Nmi,
    NoDebug,
    Queued,
    Refused,
    Regs,
    Run,
    RunError,
    RunLine,
    SetRegs,
    Sregs,
    Watch,
)
from engine.cases.exceptions import idt64
from engine.machine import MMIO

_STEP = "debug cause=step rip="
_CR2 = 232  # offset in struct kvm_sregs
_UNMAPPED = 0x7000000000
_NO_USER_STEP = {"pvm-no-user-mode-debug": (
    Debug(step=True),
    RunError("cannot step in user mode", "_start"),
    Regs({"rip": "_start"}),
)}  # fmt: skip

CASES = (
    Case(
        "breakpoint-where-nothing-is-mapped",
        "long",
        # Breakpoints come before the faults of the fetch (Intel SDM 3A table 6-2).
        idt64(14) + "mov rax, 0x7000000000; jmp rax; handler14: pop rbx; pop rcx; hlt; end:",
        (
            Debug(breakpoints={3: 0x7000000000}),
            Run("debug cause=breakpoint id=3 rip=0x7000000000"),
            Run("hlt rip={end}"),
            Regs({"rbx": 0, "rcx": 0x7000000000}),
        ),
    ),
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
        "breakpoint-after-a-store",
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
        # The guest sets TF by itself: its handler gets the #DB after the nop, in spite of a breakpoint.
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
                Debug(watchpoints=(Watch(4, 0x2000, 4, "w"),)),
                RunError("cannot step in user mode", "_start"),
            )} if mode == "user" else {},
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
            Refused(Debug(watchpoints=(Watch(4, 0x2000, 12, "rw"),)), "without hardware: watch w"),
            Run("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l3}"),
        )},
    ),
    *(
        Case(
            f"watchpoint-of-other-bytes-{mode}",
            mode,
            "mov byte ptr [0x1fff], 7; mov byte ptr [0x2004], 7; mov [0x2003], al; l1: hlt; l2:",
            (
                Debug(watchpoints=(Watch(4, 0x2000, 4, "w", physical),)),
                Run("debug cause=watchpoint id=4 addr=0x2000 rip={l1}"),
                Memory(0x1FFF, b"\x07\0\0\0\x09\x07"),
                Run("hlt rip={l2}"),
            ),
            regs={"rax": 9},
        )
        for mode, physical in (("real", False), ("protected", True), ("long", True))
    ),
    Case(
        "watchpoints-that-overlap",
        "long",
        "mov [0x3ffe], ax; l1: hlt; l2:",
        (
            Debug(watchpoints=(Watch(2, 0x2FFF, 4096, "w"), Watch(3, 0x3FF9, 5, "w"), Watch(4, 0x3FFF, 9, "w"))),
            GoOn("debug cause=watchpoint id=2 addr=0x3ffe rip={l1}", also=(4,)),
            Run("hlt rip={l2}"),
        ),
        regs={"rax": 0x909},
    ),
    Case(
        "breakpoints-six",
        "long",
        "l0: nop; l1: nop; l2: nop; l3: nop; l4: nop; l5: hlt; l6:",
        (
            Debug(breakpoints={1: "l0", 2: "l1", 3: "l2", 9: "l3", 10: "l4", 11: "l5"}),
            *(
                Run(f"debug cause=breakpoint id={number} rip={{{label}}}")
                for number, label in ((2, "l1"), (3, "l2"), (9, "l3"), (10, "l4"), (11, "l5"))
            ),
            Run("hlt rip={l6}"),
        ),
    ),
    Case(
        "breakpoints-of-one-place",
        "long",
        "nop; l1: nop; l2: hlt; l3:",
        (
            Debug(breakpoints={1: "l2", 2: "l1", 7: "l2", 8: "l2"}),
            Run("debug cause=breakpoint id=2 rip={l1}"),
            GoOn("debug cause=breakpoint id=1 rip={l2}", also=(7, 8)),
            Run("hlt rip={l3}"),
        ),
    ),
    *(
        Case(
            f"run-that-goes-on-{name}",
            "long",
            "l0: out 0x80, al; l1: nop; l2: jmp l1; l3:",
            (
                Debug(breakpoints={1: "l0", 2: "l1"}, **more),
                GoOn("debug cause=breakpoint id=1 rip={l0}"),
                GoOn("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l1}"),
                # This one stopped at no breakpoint, so that the next comes to one,
                GoOn("debug cause=breakpoint id=2 rip={l1}"),
                GoOn("debug cause=breakpoint id=2 rip={l1}"),
                # and one that is a run of its own does not.
                SetRegs({"rip": "l0"}),
                Run("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l1}"),
                Kick(),
                Run("interrupted rip={l1}"),
                GoOn("debug cause=breakpoint id=2 rip={l1}"),
            ),
        )
        for name, more in (("hardware", {}), ("stepping", {"cr3s": (5,)}))
    ),
    *(
        Case(
            f"iobreak-{name}",
            "long",
            "out 0x80, al; l1: in eax, 0x7e; l2: out 0x82, al; l3: in al, 0x7f; l4: hlt; l5:",
            (
                Debug(ports=((3, 0x80, 0x81), (4, 0x81, 0x81)), **more),
                Run("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l1}"),
                Run("debug cause=io id=3 addr=0x80 rip={l1}"),
                Run("io direction=in port=0x7e size=4 count=1 rip={l1}"),
                Answer(b"\1\2\3\4"),
                GoOn("debug cause=io id=3 addr=0x7e rip={l2}", also=(4,)),
                Regs({"rax": 0x04030201}),
                Run("io direction=out port=0x82 size=1 count=1 data=0x1 rip={l3}"),
                Run("io direction=in port=0x7f size=1 count=1 rip={l3}"),
                Run("hlt rip={l5}"),
            ),
        )
        for name, more in (("alone", {}), ("stepping", {"cr3s": (5,)}))
    ),
    Case(
        "iobreak-in-that-is-completed-by-a-setting",
        "long",
        "in al, 0x80; l1: hlt; l2:",
        (
            Debug(ports=((3, 0x80, 0x80),)),
            Run("io direction=in port=0x80 size=1 count=1 rip={_start}"),
            Answer(b"\x44"),
            Complete(),
            Regs({"rax": 0x44, "rip": "l1"}),
            RunLine("debug cause=io id=3 addr=0x80 rip={l1}"),
            Run("hlt rip={l2}"),
        ),
    ),
    Case(
        "on-cr3",
        "long",
        "mov rax, cr3; mov cr3, rax; nop; or al, 8; mov cr3, rax; l1: nop; mov cr3, rax; hlt; l2:",
        (
            Debug(cr3s=(6, 7)),
            GoOn("debug cause=cr3 id=6 rip={l1}", also=(7,)),
            Run("hlt rip={l2}"),
        ),
    ),
    Case(
        "on-mode",
        "real",
        "mov eax, cr0; or al, 1; mov cr0, eax; l1: nop; and al, 0xfe; mov cr0, eax; l2: hlt; l3:",
        (
            Debug(modes=(6,)),
            Run("debug cause=mode id=6 rip={l1}"),
            Run("debug cause=mode id=6 rip={l2}"),
            Run("hlt rip={l3}"),
        ),
    ),
    *(
        Case(
            f"catch-{name}",
            "long",
            idt64(vector) + f"nop; l1: {code}; l2: nop; hlt; handler{vector}: out 0x80, al; l3: hlt",
            (
                Debug(vectors={6: (vector,), 8: (1, vector)}),
                GoOn(f"debug cause=exception id=6 {more}vector={vector:#x} rip={{l1}}", also=(8,)),
                Regs({"rsp": 0x70000, "rip": "l1"}),
                Sregs(_CR2, 0),
                Run("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l3}"),
                # The same again, and with other registers it is another one.
                SetRegs({"rip": "l1"}),
                Run(f"debug cause=exception id=6 {more}vector={vector:#x} rip={{l1}}"),
                SetRegs({"rip": "l1"}),
                Run(f"debug cause=exception id=6 {more}vector={vector:#x} rip={{l1}}"),
                SetRegs({"rip": "l2"}),
                NoDebug(),
                Run(f"hlt rip={{handler{vector}}}"),
            ),
            regs={"rsp": 0x70000, "rdi": _UNMAPPED},
            instead={"kvm-delivers-by-itself": (
                Refused(Debug(vectors={6: (vector,)}), "KVM delivers"),
            )},
        )
        for name, code, vector, more in (
            ("invalid-opcode", "ud2", 6, ""),
            ("int3", "int3", 3, ""),
            ("int-n", "int 0x30", 0x30, ""),
            ("page-fault", "mov [rdi], eax", 14, f"addr={_UNMAPPED:#x} "),
        )
    ),
    Case(
        "catch-single-step-trap",
        "long",
        idt64(1) + "pushf; or dword ptr [rsp], 0x100; popf; nop; l1: nop; l2: hlt; handler1: hlt; l3:",
        (
            Debug(vectors={6: (1,)}, breakpoints={7: "l1"}),
            Run("debug cause=exception id=6 vector=0x1 rip={l1}"),
            Run("hlt rip={l3}"),
        ),
        regs={"rsp": 0x70000},
        instead={"kvm-delivers-by-itself": (Refused(Debug(vectors={6: (1,)}), "KVM delivers"),)},
    ),
    Case(
        "catch-a-double-fault",
        "long",
        # The gate of #UD is none, which is #GP in its delivery; that of #GP neither: a double fault.
        idt64(8) + "l1: ud2; hlt; handler8: hlt; l2:",
        (
            Debug(vectors={1: (6,), 2: (8,), 3: (13,)}),
            Run("debug cause=exception id=1 vector=0x6 rip={l1}"),
            Run("debug cause=exception id=3 vector=0xd rip={l1}"),
            Run("debug cause=exception id=2 vector=0x8 rip={l1}"),
            Regs({"rsp": 0x70000}),
            Run("hlt rip={l2}"),
            Regs({"rsp": 0x70000 - 48}),
        ),
        regs={"rsp": 0x70000},
        instead={"kvm-delivers-by-itself": (Refused(Debug(vectors={6: (8,)}), "KVM delivers"),)},
    ),
    Case(
        "catch-interrupts",
        "long",
        idt64(0x20) + "sti; nop; l1: nop; l2: hlt; l3: hlt; handler32: out 0x80, al; l4: iretq",
        (
            Debug(vectors={6: (2, 0x20)}),
            Interrupt(0x20),
            Run("debug cause=interrupt id=6 vector=0x20 rip={l1}"),
            Queued(1),
            Run("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l4}"),
            Run("hlt rip={l3}"),
            Nmi(),
            Run("debug cause=interrupt id=6 vector=0x2 rip={l3}"),
        ),
        regs={"rsp": 0x70000},
        instead={"kvm-delivers-by-itself": (Refused(Debug(vectors={6: (0x20,)}), "KVM delivers"),)},
    ),
    Case(
        "watchpoint-of-the-stack-of-an-event",
        "long",
        idt64(6) + "l1: ud2; handler6: nop; l2: hlt; l3:",
        (
            Debug(watchpoints=(Watch(3, 0x6FFD8, 8, "w"),)),
            Run("debug cause=watchpoint id=3 addr=0x6ffd8 rip={handler6}"),
            Run("hlt rip={l3}"),
        ),
        regs={"rsp": 0x70000},
        instead={"pvm-steps-past-exceptions": (
            Debug(watchpoints=(Watch(3, 0x6FFD8, 8, "w"),)),
            Run("debug cause=watchpoint id=3 addr=0x6ffd8 rip={l2}"),
            Run("hlt rip={l3}"),
        )},
    ),
    Case(
        "breakpoints-in-the-handler-of-an-exception",
        "long",
        # The first four are of the debug registers, which stop at the first instruction of the handler, too.
        idt64(6, 13) + """
            ud2
            mov rdi, 0x8000000000000000
            mov al, [rdi]
        handler6: mov dword ptr [rsp], offset l0; iretq; l0: nop; l1: mov rdi, 0x8000000000000000; mov al, [rdi]
        handler13: nop; l2: hlt; l3:
        """,
        (
            Debug(breakpoints={1: "handler6", 2: 0, 3: 0, 4: 1, 5: 2, 6: "l1", 7: "handler13", 8: "l2"}),
            Run("debug cause=breakpoint id=1 rip={handler6}"),
            Run("debug cause=breakpoint id=6 rip={l1}"),
            Run("debug cause=breakpoint id=7 rip={handler13}"),
            Run("debug cause=breakpoint id=8 rip={l2}"),
            Run("hlt rip={l3}"),
        ),
        regs={"rsp": 0x70000},
        instead={"pvm-steps-past-exceptions": (
            Debug(breakpoints={1: "handler6", 2: 0, 3: 0, 4: 1, 5: 2, 6: "l1", 7: "handler13", 8: "l2"}),
            Run("debug cause=breakpoint id=1 rip={handler6}"),
            Run("debug cause=breakpoint id=6 rip={l1}"),
            Run("debug cause=breakpoint id=8 rip={l2}"),
            Run("hlt rip={l3}"),
        )},
    ),
)  # fmt: skip
