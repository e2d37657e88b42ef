"""Changes of mode and of privilege by the guest's own code."""

from engine.case import Case, Regs, Run
from engine.cases.exceptions import idt64

from vmfs.words.modes import CODE, DATA, USER_CODE32, USER_CODE64, USER_DATA

_EFER, _STAR, _LSTAR, _FMASK = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000084

CASES = (
    Case(
        "real-to-protected-to-long",
        "real",
        """
            cli
            lgdt [gdtr]
            mov eax, cr0
            or al, 1
            mov cr0, eax
            ljmp 8, offset protected
        .code32
        protected:
            mov ax, 0x10
            mov ds, ax
            mov ss, ax
            mov es, ax
            mov dword ptr [0x3000], 0x50524f54
            # page tables: 0x4000 PML4, 0x5000 PDPT, 0x6000 a directory with one page of 2 MiB
            mov dword ptr [0x4000], 0x5003
            mov dword ptr [0x5000], 0x6003
            mov dword ptr [0x6000], 0x83
            mov eax, cr4
            or eax, 0x20
            mov cr4, eax
            mov eax, 0x4000
            mov cr3, eax
            mov ecx, 0xc0000080
            rdmsr
            or eax, 0x100
            wrmsr
            mov eax, cr0
            or eax, 0x80000000
            mov cr0, eax
            ljmp 0x18, offset long
        .code64
        long:
            mov rax, 0x1122334455667788
            mov [0x3008], rax
            mov ecx, 0xc0000080
            xor eax, eax
            rdmsr
            hlt
        end:
        .balign 8
        gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff, 0x00af9a000000ffff
        gdtr: .word . - gdt - 1
              .long gdt
        """,
        # EFER.LMA (bit 10) came by itself when paging was switched on with LME set (SDM 3A 9.8.5).
        (Run("hlt rip={end}"), Regs({"rax": 0x500})),
        regs={"rsp": 0x8000},
    ),
    Case(
        "32-bit-paging",
        "protected",
        """
            mov dword ptr [0x4000], 0x5003
            mov dword ptr [0x5000 + 4], 0x1003
            mov dword ptr [0x5000 + 4 * 5], 0x3003
            mov dword ptr [0x3010], 0x1234
            mov eax, 0x4000
            mov cr3, eax
            mov eax, cr0
            or eax, 0x80000000
        paging:
            mov cr0, eax
            mov ebx, [0x5010]
            hlt
        end:
        """,
        (Run("hlt rip={end}"), Regs({"rbx": 0x1234})),
        regs={"rbx": 0},
        instead={"pvm-pages-in-long-mode-only": (Run("shutdown cause=triple-fault rip={paging}"),)},
    ),
    Case(
        "syscall-and-sysret",
        "long",
        f"""
            mov ecx, {_STAR:#x}
            xor eax, eax
            mov edx, {USER_CODE32 << 16 | CODE:#x}
            wrmsr
            mov ecx, {_LSTAR:#x}
            mov eax, offset kernel
            xor edx, edx
            wrmsr
            mov ecx, {_FMASK:#x}
            mov eax, 0x200
            xor edx, edx
            wrmsr
            mov ecx, {_EFER:#x}
            rdmsr
            or eax, 1
            wrmsr
            mov ecx, offset user
            mov r11, 0x202
            sysretq
        user:
            mov r8w, cs
            mov r9w, ss
            mov r10d, 77
            syscall
        back:
            ud2
        kernel:
            mov r12w, cs
            mov r13w, ss
            pushf
            pop r14
        at_hlt:
            hlt
        end:
        """,
        (
            Run("hlt rip={end}"),
            Regs({"r8": USER_CODE64, "r9": USER_DATA, "r10": 77, "r12": CODE, "r13": DATA, "rcx": "back"}),
            # r11 is the user's rflags, and FMASK cleared IF in the kernel's.
            Regs({"r11": 0x202, "r14": 0x2}),
        ),
        regs={"r8": 0, "r9": 0, "r12": 0, "r13": 0},
        # The hlt is executed in user mode.
        instead={"pvm-syscall-stays-in-user-mode": (Run("shutdown cause=triple-fault rip={at_hlt}"),)},
    ),
    Case(
        "user-mode-fault-to-kernel",
        "long",
        # From CPL 3, hlt is #GP, and the CPU changes to the stack that the TSS names (SDM 3A 6.14.2).
        idt64(13)
        + f"""
            mov word ptr [gdt + 0x30], 0x67
            mov word ptr [gdt + 0x32], offset tss
            mov byte ptr [gdt + 0x35], 0x89
            lgdt [gdtr]
            mov ax, 0x30
            ltr ax
            push {USER_DATA}
            push 0x9000
            push 2
            push {USER_CODE64}
            push offset user
            iretq
        user:
            mov r8w, cs
        l1: hlt
        handler13:
            pop rbx
            pop rcx
            pop rdx
            mov r9, rsp
            hlt
        end:
        .balign 8
        tss: .long 0
             .quad 0x8800
             .fill 92, 1, 0
        gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff
             .quad 0x00affb000000ffff, 0, 0
        gdtr: .word . - gdt - 1
              .quad gdt
        """,
        (
            Run("hlt rip={end}"),
            # The error code, rip and cs were popped; rflags, rsp and ss are left on the TSS's stack.
            Regs({"rbx": 0, "rcx": "l1", "rdx": USER_CODE64, "r8": USER_CODE64, "r9": 0x8800 - 24}),
        ),
        regs={"r8": 0, "rsp": 0x8400},
        instead={
            "pvm-shows-host-selectors": (
                Run("hlt rip={end}"),
                Regs({"rbx": 0, "rcx": "l1", "rdx": USER_CODE64, "r8": 0x33, "r9": 0x8800 - 24}),
            )
        },
    ),
)
