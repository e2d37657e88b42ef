"""What the processor itself keeps: MSRs, machine check banks, DR6, what a return to user mode leaves of segments."""

import struct

from engine.case import Case, Memory, Regs, Run
from engine.cases.exceptions import idt64

from vmfs.words.modes import USER_CODE64, USER_DATA

_RESULTS = 0x8000
_REFUSED = 0x5245465553454421  # what stands in _RESULTS for #GP

# MSRs that KVM answers on every host, and what a new CPU has in them.
MSRS = {
    0x0: 0, 0x1: 0, 0x2A: 0, 0x2C: 1 << 24, 0x34: 0, 0x8B: 0, 0xC1: 0, 0xC2: 0, 0xCD: 3, 0xFE: 0x508, 0x11E: 0xBE702111,
    0x140: 0, 0x179: 32, 0x17A: 0, 0x186: 0, 0x187: 0, 0x198: 4 << 40 | 1000, 0x199: 0, 0x1D9: 0, 0x1DB: 0, 0x1DC: 0,
    0x1DD: 0, 0x1DE: 0, 0x1FC: 0, 0x200: 0, 0x20F: 0, 0x250: 0, 0x26F: 0, 0x277: 0x0007040600070406, 0x2FF: 0,
    0x400: 0, 0x401: 0, 0x402: 0, 0x403: 0, 0x47C: 0, 0x47F: 0, 0x606: 0, 0x611: 0, 0x619: 0, 0x639: 0, 0x641: 0,
    0xC0010000: 0, 0xC0010007: 0, 0xC0010010: 0, 0xC0010015: 0, 0xC001001B: 1 << 29, 0xC001001F: 0, 0xC0010055: 0,
    0xC0010058: 0, 0xC0010112: 0, 0xC0010113: 0, 0xC0010117: 0, 0xC0011022: 0, 0xC0011023: 0, 0xC001102A: 0,
    0xC001102C: 0,
}  # fmt: skip
ABSENT = (0x17B, 0x280, 0x480, 0x12345)  # MCG_CTL, as MCG_CAP says; CTL2 of the banks, too; a bank too far

# Writes, and what is read then; None: #GP.
ALL = 2**64 - 1
WRITES = (
    (0x179, 32, None), (0x17A, 5, 5), (0x17A, 0, 0), (0x400, 1, None), (0x400, ALL, ALL),
    (0x400, ALL - (1 << 10), ALL - (1 << 10)),
    (0x400, ALL - 1, ALL - 1), (0x400, 0, 0), (0x401, 1, None), (0x401, 0, 0), (0x402, 0x1234, 0x1234), (0x403, 7, 7),
    (0x47D, 1, None), (0x47F, 9, 9), (0x2C, 1 << 24, None), (0x34, 0, None), (0xCD, 3, None), (0x198, 0, None),
    (0x11E, 0, 0xBE702111), (0x186, 0x4300C0, 0), (0xC001001B, 0, 1 << 29), (0xC0010058, 0, 0), (0xC0010058, 1, None),
    (0xC0010015, 1, None), (0xC0010015, 1 << 24, 1 << 24), (0xC0010015, 1 << 3 | 1 << 6 | 1 << 8, 0),
    (0xC0010015, 1 << 18, 1 << 18), (0xC0010015, 0, 0), (0x1FC, 2, 2), (0x8B, 0, 0),
)  # fmt: skip


def _program(entries: list[tuple[int, int | None]]) -> str:
    """Write each MSR that is to be written, read it, and put what is there, or _REFUSED, into _RESULTS."""
    table = "\n".join(f".quad {index:#x}, {0 if value is None else 1}, {value or 0:#x}" for index, value in entries)
    return (
        idt64(13)
        + f"""
            mov rbp, rsp
            mov esi, offset table
            mov edi, {_RESULTS}
        next:
            mov ecx, [rsi]
            cmp dword ptr [rsi + 8], 0
            je read
            mov eax, [rsi + 16]
            mov edx, [rsi + 20]
            wrmsr
        read:
            rdmsr
            shl rdx, 32
            or rax, rdx
        store:
            mov [rdi], rax
            add rsi, 24
            add rdi, 8
            cmp rsi, offset table_end
            jne next
            hlt
        end:
        handler13:
            mov rsp, rbp
            mov rax, {_REFUSED:#x}
            jmp store
        .balign 8
        table:
            {table}
        table_end:
        """
    )


def _results(values: list[int | None]) -> Memory:
    return Memory(_RESULTS, b"".join(struct.pack("<Q", _REFUSED if value is None else value) for value in values))


def _return_to_user_mode(leave: str) -> str:
    """GS: DATA's selector and a base of its own. In user mode: the quadword there to r8, and out."""
    return f"""
        mov eax, 0x10
        mov gs, eax
        mov ecx, 0xc0000101
        mov eax, 0x3000
        xor edx, edx
        wrmsr
        mov rax, 0x1122334455667788
        mov [0x3000], rax
        push {USER_DATA}
        push 0x9000
        {leave}
    user:
        .byte 0x65, 0x4c, 0x8b, 0x04, 0x25, 0, 0, 0, 0
        out 0x80, al
    end:
    """


CASES = (
    Case(
        "msrs-that-are-there",
        "long",
        _program([(index, None) for index in (*MSRS, *ABSENT)]),
        (Run("hlt rip={end}"), _results([*MSRS.values(), *(None for _ in ABSENT)])),
    ),
    Case(
        "msrs-written",
        "long",
        _program([(index, value) for index, value, _ in WRITES]),
        (Run("hlt rip={end}"), _results([result for _, _, result in WRITES])),
    ),
    Case(
        "cr4-mce",
        "long",
        """
            mov eax, 1
            cpuid
            mov r8d, edx
            and r8d, 0x4080
            mov rax, cr4
            mov rbx, rax
            or eax, 0x40
            mov cr4, rax
            mov r9, cr4
            xor r9, rbx
            hlt
        end:
        """,
        (Run("hlt rip={end}"), Regs({"r8": 0x4080, "r9": 0x40})),
    ),
    Case(
        "dr6-has-what-matches-now",
        "long",
        idt64(1)
        + """
            mov rax, offset place
            mov dr2, rax
            mov eax, 0xffff4ff2
            mov dr6, rax
            mov eax, 0x410
            mov dr7, rax
        place:
            .byte 0x90
            hlt
        handler1:
            mov r8, dr6
            mov r9, [rsp]
            hlt
        end:
        """,
        (Run("hlt rip={end}"), Regs({"r8": 0xFFFF4FF4, "r9": "place"})),
    ),
    Case(
        "iret-to-user-mode-keeps-the-base-of-gs",
        "long",
        _return_to_user_mode(f"push 0x3002; push {USER_CODE64}; push offset user; .byte 0x48, 0xcf"),
        (Run("io direction=out port=0x80 size=1 count=1 data=0x88 rip={end}"), Regs({"r8": 0x1122334455667788})),
    ),
)
