"""Images made by GNU as and ld, started by the loader on every engine: what they find is what they print."""

import re
import subprocess

import pytest
from booting import MIB, loaded
from engine import asm

from vmfs.words import exits

# Prints a string at an address on port 0xe9; clobbers al. `say "text"` prints the text.
MACROS = """
.macro say_string register
1:  mov al, [\\register]
    test al, al
    jz 2f
    out 0xe9, al
    inc \\register
    jmp 1b
2:
.endm
"""

MULTIBOOT = """
.code32
    .long 0x1badb002, 3, -(0x1badb002 + 3)
.globl _start
_start:
    cmp eax, 0x2badb002
    jne bad
    mov esp, offset stack
    push ebx
    call next               # a stack works, and the code is where it is linked
next:
    pop ecx
    cmp ecx, offset next
    jne bad
    cmp dword ptr bss, 0    # memory was not zero before
    jne bad
    pop ebx
    mov esi, [ebx + 16]     # cmdline
    say_string esi
    say "|"
    mov edi, [ebx + 24]     # modules
    mov esi, [edi]
    say_string esi
    say "|"
    mov ax, ds              # what the descriptors say is what the segments are
    mov es, ax
    jmp 0x08:reloaded
reloaded:
    mov eax, cr0
    and eax, 0x80000001
    add al, '0'
    out 0xe9, al
    hlt
bad:
    say "bad"
    hlt
.bss
bss: .skip 4096
.skip 4096
stack:
"""

MULTIBOOT2 = """
.code32
.balign 8
header:
    .long 0xe85250d6, 0, header_end - header, -(0xe85250d6 + header_end - header)
    .word 1, 0
    .long 16, 1, 3          # the command line and modules
    .word 0, 0
    .long 8
header_end:
.globl _start
_start:
    cmp eax, 0x36d76289
    jne bad
    lea edi, [ebx + 8]
next_tag:
    mov eax, [edi]
    test eax, eax
    jz done
    cmp eax, 1
    jne not_1
    lea esi, [edi + 8]
    say_string esi
    say "|"
not_1:
    cmp dword ptr [edi], 3
    jne not_3
    mov esi, [edi + 8]
    say_string esi
    say "|"
not_3:
    mov ecx, [edi + 4]
    add ecx, 7
    and ecx, -8
    add edi, ecx
    jmp next_tag
done:
    say "2"
    hlt
bad:
    say "bad"
    hlt
"""

PVH = """
.code32
.globl _start
_start:
    hlt                     # the entry of those who do not know the note
pvh:
    cmp dword ptr [ebx], 0x336ec578
    jne bad
    mov esi, [ebx + 24]     # cmdline_paddr
    say_string esi
    say "|"
    mov edi, [ebx + 16]     # modlist_paddr
    mov esi, [edi]
    say_string esi
    say "|"
    mov esi, [ebx + 32]     # rsdp_paddr
    mov byte ptr [esi + 8], 0
    say_string esi
    hlt
bad:
    say "bad"
    hlt
.section .note.Xen, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long pvh
"""

LONG = """
.code64
.globl _start
_start:
    mov rax, 0x0123456789abcdef
    push rax                # a stack, 64 bits
    pop rcx
    cmp rax, rcx
    jne bad
    mov edi, [rsi + 0x228]  # cmd_line_ptr
    say_string rdi
    say "|"
    mov edi, [rsi + 0x218]  # ramdisk_image
    say_string rdi
    say "|"
    mov ax, 0x18
    mov ds, ax
    mov ss, ax
    push 0x10
    lea rax, reloaded[rip]
    push rax
    retfq
reloaded:
    say "L"
    hlt
bad:
    say "bad"
    hlt
"""

PROTECTED = """
.code32
.globl _start
_start:
    mov edi, [esi + 0x228]
    say_string edi
    say "|"
    mov edi, [esi + 0x218]
    say_string edi
    say "|"
    push 7
    pop eax
    add al, '0'
    out 0xe9, al
    hlt
"""

SECTOR = """
.code16
.globl _start
_start:
    say "D"
    cmp dl, 0x80
    jne bad
    mov ax, cs
    test ax, ax
    jnz bad
    call next
next:
    pop ax
    cmp ax, offset next
    jne bad
    say "K"
    int 0x13
bad:
    say "bad"
    hlt
.org 510
    .byte 0x55, 0xaa
"""


def say(text):
    return "\n".join(f"mov al, {ord(letter)}; out 0xe9, al" for letter in text)


needs_tools = pytest.mark.skipif(bool(asm.missing_tools()), reason=f"{asm.missing_tools()} missing: binutils")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def make(source, *, bits, address, binary=False):
        folder = tmp_path_factory.mktemp("image")
        source = re.sub(r'say "(\w+|\|)"', lambda found: say(found[1]), source)
        text = f".intel_syntax noprefix\n{MACROS}\n.text\n{source}\n"
        subprocess.run(["as", f"--{bits}", "-o", "a.o", "-"], input=text, text=True, cwd=folder, check=True)
        suffix = "" if binary else "-segment"
        emulation = "elf_i386" if bits == 32 else "elf_x86_64"
        link = [
            "ld",
            "-m",
            emulation,
            f"-Ttext{suffix}={address:#x}",
            "--no-warn-rwx-segments",
            "-n",
            "-o",
            "a.elf",
            "a.o",
        ]
        subprocess.run([*link, *(["--oformat=binary"] if binary else [])], cwd=folder, check=True)
        return (folder / "a.elf").read_bytes()

    return make


def printed(engine, image, **options):
    """What the guest printed until it halted, and the exit."""
    with loaded(image, size=16 * MIB, **options) as (start, memory):
        machine = engine.create_machine()
        try:
            machine.map_memory(0, 0, memory.fd, 0, memory.size)
            cpu = machine.create_vcpu(0)
            start.apply(cpu)
            text = b""
            while True:
                exit_ = cpu.run()
                if not isinstance(exit_, exits.Io) or exit_.port != 0xE9:
                    return text.decode(), exit_
                text += exit_.data
        finally:
            machine.close()


ARGUMENTS = {"cmdline": b"two words", "initrd": b"the disk\0"}


@needs_tools
@pytest.mark.parametrize(
    ("source", "bits", "address", "text"),
    [
        (MULTIBOOT, 32, MIB, "two words|the disk|1"),
        (MULTIBOOT, 32, 0x1_0000, "two words|the disk|1"),
        (MULTIBOOT2, 32, MIB, "two words|the disk|2"),
        (PVH, 32, 2 * MIB, "two words|the disk|RSD PTR "),
        (PVH, 64, 2 * MIB, "two words|the disk|RSD PTR "),
        (LONG, 64, MIB, "two words|the disk|L"),
        (PROTECTED, 32, MIB, "two words|the disk|7"),
    ],
    ids=["multiboot", "multiboot-low", "multiboot2", "pvh-32", "pvh-64", "elf-64", "elf-32"],
)
def test_kernel(engine, build, source, bits, address, text):
    image = build(source, bits=bits, address=address)
    out, exit_ = printed(engine, image, **ARGUMENTS)
    assert out == text
    assert isinstance(exit_, exits.Hlt)


@needs_tools
def test_boot_sector_without_a_bios_halts_at_the_vector(engine, build):
    image = build(SECTOR, bits=32, address=0x7C00, binary=True)
    assert len(image) == 512
    out, exit_ = printed(engine, image)
    assert out == "DK"
    assert isinstance(exit_, exits.Hlt)
    assert exit_.rip == 0xFC00 + 2 * 0x13 + 2  # after the hlt of its vector
