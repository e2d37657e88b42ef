"""How fast a boot sector reads by int 13h: SeaBIOS on a disk at IDE, at AHCI, and on a CD, against QEMU TCG with
the same firmware and image."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bench.guests import Guest, on_tcg, on_vmfs
from bench.harness import Result, mounted
from bench.rates import Row, compare, image, peer_or_none

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.media import SEABIOS  # noqa: E402

ROUNDS = 3
IMAGE_MIB = 4
PASSES = {"ide": 4, "ahci": 32, "cdrom": 8}  # over the image
MOST = 32 << 10  # bytes that a call reads
# PASSES times, CALLS calls of COUNT sectors from the first one on. The guest then powers off by ACPI, at port 604h.
SECTOR = """
.code16
.globl _start
_start:
    ljmp $0, $begin
begin:
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $0x7c00, %sp
    mov %dl, drive
    cld
    mov $began, %si
    call say
    mov $PASSES, %bp
whole:
    movl $0, address
    mov $CALLS, %cx
again:
    push %cx
    mov $packet, %si
    mov drive, %dl
    mov $0x42, %ah
    int $0x13
    pop %cx
    jc off
    addl $COUNT, address
    loop again
    dec %bp
    jnz whole
    mov $ended, %si
    call say
off:
    mov $0x604, %dx
    mov $0x2000, %ax
    out %ax, %dx
    hlt
say:
    lodsb
    test %al, %al
    jz 2f
    mov %al, %ah
    mov $0x3fd, %dx
1:  in %dx, %al
    test $0x20, %al
    jz 1b
    mov $0x3f8, %dx
    mov %ah, %al
    out %al, %dx
    jmp say
2:  ret
drive: .byte 0
began: .asciz "mark read.begin\\r\\n"
ended: .asciz "mark read.end\\r\\n"
.balign 4
packet: .byte 16, 0
    .word COUNT, 0, 0x1000
address: .quad 0
.org 510
    .word 0xaa55
"""


def sector(sector_size: int, passes: int) -> bytes:
    count = MOST // sector_size
    text = f".set COUNT, {count}\n.set CALLS, {(IMAGE_MIB << 20) // MOST}\n.set PASSES, {passes}\n{SECTOR}"
    with tempfile.TemporaryDirectory() as where:
        made, linked = Path(where) / "a.o", Path(where) / "a"
        subprocess.run(["as", "--32", "-o", made, "-"], input=text, text=True, check=True)
        command = ["ld", "-m", "elf_i386", "-Ttext=0x7c00", "--oformat", "binary", "-o", linked, made]
        subprocess.run(command, check=True)
        return linked.read_bytes()


def cd(folder: Path) -> Path:
    """A CD that boots the sector by El Torito, without emulation, with as much after it as is read."""
    tree = folder / "tree"
    tree.mkdir()
    (tree / "boot").write_bytes(sector(2048, PASSES["cdrom"]))
    (tree / "data").write_bytes(b"\x5a" * (IMAGE_MIB << 20))
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-o", folder / "cd.iso", "-b", "boot", "-no-emul-boot", tree]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return folder / "cd.iso"


def results() -> list[Result]:
    if not SEABIOS.exists():
        print(f"bench bios: there is no {SEABIOS}: package seabios", file=sys.stderr)
        return []
    peer, found = peer_or_none("bios"), []
    with (
        mounted("--engine", "emulator") as mount,
        image(IMAGE_MIB + 1, sector(512, PASSES["ide"])) as disk,
        image(IMAGE_MIB + 1, sector(512, PASSES["ahci"])) as serial_disk,
        tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
    ):
        media = {"ide": disk, "ahci": serial_disk, "cdrom": cd(Path(folder))}
        for bus, medium in media.items():
            row = Row("read", "MiB/s", "reads of 32 KiB by int 13h", IMAGE_MIB * PASSES[bus], ">= 0.8x")
            guest = Guest(None, b"", medium, bus, memory=64, bios=SEABIOS)
            found += compare(
                "bios", bus, (row,), ROUNDS, lambda guest=guest: on_vmfs(mount, guest),
                lambda guest=guest: on_tcg(guest), peer,
            )  # fmt: skip
    return found
