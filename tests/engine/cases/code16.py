"""16-bit code at and past the end of 64 KiB. EIP has 32 bits there, too: an instruction adds its length, and only
branches and returns of operand size 16 cut the sum (Intel SDM 2A JMP, 2B RET; limits: 3A 5.3)."""

from engine.case import Answer, Case, Debug, Memory, NoDebug, Regs, Run, RunError

# ---- real mode: CS ends at FFFF

_LAST = 0xFFFE
_REAL = "handler: hlt; handled:"
_REAL_MEMORY = {
    0: b"\xf4",  # where EIP must not go on
    13 * 4: (0x1000).to_bytes(4, "little"),  # the handler of #GP, at ORIGIN
    0x10000: b"\xf4",  # nor there
}
_STEPS = (Debug(step=True), Run("debug cause=step rip=0x10000"), NoDebug())
# The frame of #GP: IP has 16 bits there.
_FAULT = (Run("hlt rip={handled}"), Memory(0x7FFA, b"\0\0\0\0"))


def _at_the_end(name, code, steps=_STEPS, **regs):
    return Case(
        f"real-mode-ends-with-{name}",
        "real",
        _REAL,
        (*steps, *_FAULT),
        regs={"rip": _LAST, "rsp": 0x8000, "rflags": 2, "rax": 0x41} | regs,
        memory=_REAL_MEMORY | {_LAST: bytes.fromhex(code)},
    )


# ---- protected mode: a 16-bit segment of 128 KiB

_BEGIN = """
    lgdt [gdtr]
    lidt [idtr]
    mov esp, 0x8000
    ljmp 0x18, 0xfff0
.balign 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff, 0x00019a020000ffff, 0x00009a020000ffff
gdtr: .word . - gdt - 1
    .long gdt
idt: .word handler0, 8, 0x8600, 0   # a 16-bit gate
    .fill 12, 8, 0
    .word handler13, 8, 0x8e00, 0
idtr: .word . - idt - 1
    .long idt
handler0:
    movzx ebx, word ptr [esp]
    hlt
handled0:
handler13:
    mov ebx, [esp + 4]
    hlt
handled13:
.code16
.org 0x2fff0 - 0x1000
"""
_CUT, _PAST = Run("hlt rip=0x13"), Run("hlt rip=0x10013")
_MOV_HLT = b"\xb0\x02\xf4"


def _of_128_kib(name, code, *steps, **more):
    """`code` begins at FFF0; there is `mov al, 2; hlt` at 10 and at 10010."""
    memory = {0x20010: _MOV_HLT, 0x30010: _MOV_HLT}
    return Case(f"code16-{name}", "protected", _BEGIN + code, steps, memory=memory, **more)


CASES = (
    _at_the_end("nop", "9090", (Debug(step=True), Run("debug cause=step rip=0xffff"), *_STEPS)),
    _at_the_end("mov", "b041"),
    _at_the_end("jcc-not-taken", "7402"),
    _at_the_end("loop-not-taken", "e202", rcx=1),
    _at_the_end("hlt", "90f4", (Run("hlt rip=0x10000"),)),
    _at_the_end(
        "out", "e680", (Run("io direction=out port=0x80 size=1 count=1 data=0x41 rip=0x10000"), Regs({"rsp": 0x8000}))
    ),
    _at_the_end("nops-at-full-speed", "9090", ()),
    _at_the_end("breakpoint-beyond", "9090", (
        Debug(breakpoints={3: 0x10000}), Run("debug cause=breakpoint id=3 rip=0x10000")
    )),
    _at_the_end("rep", "f3aa", (), rcx=3, rdi=0x3000),
    _of_128_kib("goes-straight-on", ".fill 32, 1, 0x90; mov al, 2; hlt", _PAST),
    _of_128_kib("straddles", ".fill 14, 1, 0x90; mov ebx, 0x12345678; .fill 12, 1, 0x90; mov al, 2; hlt",
                _PAST, Regs({"rbx": 0x12345678})),
    # Over the whole segment: the handler of #GP is in 32-bit code, so the gate pushes EIP.
    _of_128_kib("ends-at-1ffff", ".byte 0x66, 0xe9; .long 0x1fffe - 0xfff6; .org 0x3fffe - 0x1000; nop; nop",
                Run("hlt rip={handled13}"), Regs({"rbx": 0x20000})),
    _of_128_kib("ends-at-ffff", "ljmp 0x20, 0xfffe; .org 0x2fffe - 0x1000; nop; nop",
                Run("hlt rip={handled13}"), Regs({"rbx": 0x10000})),
    _of_128_kib("a-16-bit-gate-pushes-16-bits", "xor cx, cx; .fill 19, 1, 0x90; div cl",
                Run("hlt rip={handled0}"), Regs({"rbx": 5})),
    _of_128_kib(
        "accesses-beyond",
        ".fill 16, 1, 0x90; in al, 0x80; out 0x81, al; mov [edi], al; mov bl, [edi + 4]; hlt",
        Run("io direction=in port=0x80 size=1 count=1 rip=0x10000"),
        Answer(b"\x07"),
        Run("io direction=out port=0x81 size=1 count=1 data=0x7 rip=0x10004"),
        Run("mmio direction=write addr=0xa0000 size=1 data=0x7 rip=0x10007"),
        Run("mmio direction=read addr=0xa0004 size=1 rip=0x10007"),
        Answer(b"\x08"),
        Run("hlt rip=0x1000c"),
        Regs({"rbx": 8}),
        regs={"rbx": 0, "rdi": 0xA0000},
    ),
    _of_128_kib("breakpoint-beyond", ".fill 32, 1, 0x90; mov al, 2; hlt", Debug(breakpoints={7: 0x30004}),
                Run("debug cause=breakpoint id=7 rip=0x10004"), _PAST),
    *(
        _of_128_kib(name, code, _CUT if cut else _PAST)
        for name, code, cut in (
            ("jmp-rel8", ".byte 0xeb, 0x1e", True),
            ("jmp-rel16", ".byte 0xe9, 0x1d, 0", True),
            ("jmp-rel8-32", ".byte 0x66, 0xeb, 0x1d", False),
            ("jmp-rel32", ".byte 0x66, 0xe9, 0x1a, 0, 0, 0", False),
            ("jcc-rel8", "cmp al, al; .byte 0x74, 0x1c", True),
            ("jcc-rel32", "cmp al, al; .byte 0x66, 0x0f, 0x84, 0x17, 0, 0, 0", False),
            ("loop", "mov cx, 2; .byte 0xe2, 0x1b", True),
            ("loop-32", "mov cx, 2; .byte 0x66, 0xe2, 0x1a", False),
            ("jcxz", "xor cx, cx; .byte 0xe3, 0x1c", True),
            ("jmp-bx", "mov ebx, 0x10010; jmp bx", True),
            ("jmp-ebx", "mov ebx, 0x10010; jmp ebx", False),
            ("jmp-back-from-beyond", ".fill 24, 1, 0x90; .byte 0xeb, 0x06", True),
            ("ret", "push 0x10; ret", True),
            ("ret-32", "pushd 0x10010; .byte 0x66, 0xc3", False),
            ("retf", "push 0x18; push 0x10; retf", True),
            ("retf-32", "pushd 0x18; pushd 0x10010; .byte 0x66, 0xcb", False),
            ("far-jmp-32", ".byte 0x66, 0xea; .long 0x10010; .word 0x18", False),
        )
    ),
    _of_128_kib("call", ".fill 19, 1, 0x90; .byte 0xe8, 10, 0", _CUT, Memory(0x7FFE, b"\6\0")),
    _of_128_kib("call-32", ".fill 18, 1, 0x90; .byte 0x66, 0xe8, 8, 0, 0, 0",
                _PAST, Memory(0x7FFC, b"\x08\0\1\0")),
    _of_128_kib(
        "iret-32",
        "pushd 2; pushd 0x18; pushd 0x10010; at = . - 0x20000; .byte 0x66, 0xcf",
        _PAST,
        instead={"pvm-no-iret": (RunError("the code there is 66 cf", "at"),)},
    ),
)  # fmt: skip
