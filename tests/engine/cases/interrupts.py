"""External interrupts and NMIs without an interrupt controller."""

from engine.case import Case, Debug, Interrupt, Memory, Nmi, NoDebug, Queued, Regs, Run

# A real-mode vector table entry each, made by the program, for handlers that count in memory.
_REAL_SETUP = """
    mov word ptr [0x20 * 4], offset handler20
    mov word ptr [0x20 * 4 + 2], 0
    mov word ptr [0x21 * 4], offset handler21
    mov word ptr [0x21 * 4 + 2], 0
    mov word ptr [2 * 4], offset handler2
    mov word ptr [2 * 4 + 2], 0
    ready: hlt
    after:
"""
_REAL_HANDLERS = """
    handler20: mov byte ptr [si], 0x20; inc si; iret
    handler21: mov byte ptr [si], 0x21; inc si; iret
    handler2: mov byte ptr [si], 2; inc si; iret
"""
_AT = 0x3000


def _await(count: int) -> str:
    """Wait with interrupts on until so many were handled: a loop that ends in any case."""
    label, done = f"wait{count}", f"done{count}"
    return f"mov cx, 10000; {label}: cmp si, {_AT + count}; je {done}; loop {label}; {done}: cli; "


_REGS = {"rsi": _AT, "rsp": 0x8000}

CASES = (
    Case(
        "interrupts-wait-for-sti",
        "real",
        _REAL_SETUP + "nop; nop; out 0x80, al; l1: sti; " + _await(3) + "hlt; l2:" + _REAL_HANDLERS,
        (
            Run("hlt rip={after}"),
            Interrupt(0x20),
            Interrupt(0x21),
            Interrupt(0x20),
            Queued(3),
            Run("io direction=out port=0x80 size=1 count=1 data=0x0 rip={l1}"),
            Queued(3),
            Memory(_AT, bytes(3)),
            Run("hlt rip={l2}"),
            Queued(0),
            Memory(_AT, b"\x20\x21\x20\0"),
            Regs({"rsp": 0x8000}),
        ),
        regs=_REGS,
    ),
    Case(
        "interrupt-wakes-hlt",
        "real",
        # The vector waits when the guest halts with IF set: no exit, and the handler returns after it.
        _REAL_SETUP + "sti; hlt; l1: mov al, [si - 1]; cli; hlt; l2:" + _REAL_HANDLERS,
        (
            Run("hlt rip={after}"),
            Interrupt(0x21),
            Run("hlt rip={l2}"),
            Regs({"rax": 0x21, "rsi": _AT + 1}),
        ),
        regs={**_REGS, "rax": 0},
    ),
    Case(
        "interrupt-wakes-hlt-at-a-breakpoint",
        "real",
        _REAL_SETUP + "sti; l0: hlt; l1: mov al, [si - 1]; cli; hlt; l2:" + _REAL_HANDLERS,
        (
            Run("hlt rip={after}"),
            Debug(breakpoints={1: "l0", 2: "l1"}),
            Run("debug cause=breakpoint id=1 rip={l0}"),
            Interrupt(0x21),
            Run("debug cause=breakpoint id=2 rip={l1}"),
            Queued(0),
            Memory(_AT, b"\x21\0"),
            Run("hlt rip={l2}"),
            Regs({"rax": 0x21, "rsi": _AT + 1}),
        ),
        regs={**_REGS, "rax": 0},
    ),
    Case(
        "hlt-without-IF-is-an-exit",
        "real",
        _REAL_SETUP + "cli; hlt; l1: sti; " + _await(1) + "hlt; l2:" + _REAL_HANDLERS,
        (
            Run("hlt rip={after}"),
            Interrupt(0x21),
            Run("hlt rip={l1}"),
            Queued(1),
            Run("hlt rip={l2}"),
            Memory(_AT, b"\x21\0"),
        ),
        regs=_REGS,
    ),
    Case(
        "interrupt-after-hlt-exit",
        "real",
        _REAL_SETUP + "sti; hlt; l1: cli; hlt; l2:" + _REAL_HANDLERS,
        (
            Run("hlt rip={after}"),
            Run("hlt rip={l1}"),
            Interrupt(0x20),
            Run("hlt rip={l2}"),
            Memory(_AT, b"\x20\0"),
        ),
        regs=_REGS,
    ),
    Case(
        "sti-shadow",
        "real",
        # After sti one more instruction runs before an interrupt (SDM 2B, STI): bl is 1 by then.
        _REAL_SETUP + """
            xor bx, bx; sti; inc bx; inc bx; """ + _await(1) + """hlt; l2:
            handler20: mov [si], bl; inc si; iret
            handler21: iret
            handler2: iret
        """,
        (
            Run("hlt rip={after}"),
            Interrupt(0x20),
            Run("hlt rip={l2}"),
            Memory(_AT, b"\x01"),
        ),
        regs=_REGS,
        instead={"pvm-interrupts-late": (
            Run("hlt rip={after}"),
            Interrupt(0x20),
            Run("hlt rip={l2}"),
            Memory(_AT, b"\x02"),
            Queued(0),
        )},
    ),
    Case(
        "nmi",
        "real",
        # An NMI does not ask for IF. One instruction may run before it.
        _REAL_SETUP + "nop; nop; hlt; l2:" + _REAL_HANDLERS,
        (
            Run("hlt rip={after}"),
            Nmi(),
            Run("hlt rip={l2}"),
            Memory(_AT, b"\x02\0"),
        ),
        regs=_REGS,
    ),
    Case(
        "nmi-wakes-hlt",
        "real",
        _REAL_SETUP + "hlt; l1: hlt; l2:" + _REAL_HANDLERS,
        (
            Run("hlt rip={after}"),
            Run("hlt rip={l1}"),
            Nmi(),
            Run("hlt rip={l2}"),
            Memory(_AT, b"\x02\0"),
        ),
        regs=_REGS,
    ),
    Case(
        "steps-hold-interrupts-back",
        "real",
        _REAL_SETUP + "sti; nop; l1: nop; l2: nop; l3: cli; hlt; l4:" + _REAL_HANDLERS,
        (
            Run("hlt rip={after}"),
            Debug(breakpoints={1: "l1"}),
            Run("debug cause=breakpoint id=1 rip={l1}"),
            Interrupt(0x20),
            Debug(step=True),
            Run("debug cause=step rip={handler20}"),
            Queued(0),
        ),
        regs=_REGS,
        instead={"kvm-steps-hold-interrupts-back": (
            Run("hlt rip={after}"),
            Debug(breakpoints={1: "l1"}),
            Run("debug cause=breakpoint id=1 rip={l1}"),
            Interrupt(0x20),
            Debug(step=True),
            Run("debug cause=step rip={l2}"),
            Queued(1),
            NoDebug(),
            Run("hlt rip={l4}"),
            Queued(0),
            Memory(_AT, b"\x20\0"),
        )},
    ),
)  # fmt: skip
