"""The modes of the CPU: telling which one it is in, and setting one up so that a flat binary runs.

`mode` is a convenience of the interface: flat segments of base 0, and for `long` identity page tables at the
top of RAM. It works on the bytes of kvm_regs and kvm_sregs, so on every engine, and what it sets passes the
checks that hardware makes when it enters a guest (Intel SDM 3C 27.3.1).
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vmfs.words.errors import Invalid
from vmfs.words.layouts import (
    CONTROL_AT,
    CR0,
    CR4,
    EFER,
    GDTR,
    IDTR,
    RFLAGS,
    RIP,
    RSP,
    SEGMENT,
    SEGMENTS,
    TABLE,
    put_quad,
    quad,
)

MODES = ("real", "protected", "long")

_CONTROL = struct.Struct("<5Q")  # cr0 cr2 cr3 cr4 cr8

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_LA57 = 1 << 5, 1 << 9, 1 << 10, 1 << 12
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_FIXED, RFLAGS_IF, RFLAGS_VM = 1 << 1, 1 << 9, 1 << 17

PAGE_SIZE = 4096
_LARGE_PAGE = 2 << 20
_TABLE_REACH = 1 << 30  # what one page directory of 2 MiB pages maps
_PRESENT, _WRITABLE, _USER, _LARGE = 1 << 0, 1 << 1, 1 << 2, 1 << 7  # of a page table entry, SDM 3A 4.5
_ACCESSED, _DIRTY = 1 << 5, 1 << 6

# The GDT of `protected` and `long`, at the start of the last page of RAM. The order is the one that SYSCALL
# and SYSRET want: kernel code, kernel data, then user 32-bit code, data, 64-bit code (SDM 2B, SYSRET).
CODE, DATA, USER_CODE32, USER_DATA, USER_CODE64 = 0x08, 0x10, 0x18 | 3, 0x20 | 3, 0x28 | 3
_DATA_TYPE, _CODE_TYPE, _BUSY_TSS = 3, 11, 11  # writable, accessed; readable, accessed; SDM 3A 3.4.5.1
_LDT_TYPE = 2

_REAL_STACK = 0xFFF0


class Segment(NamedTuple):
    """`struct kvm_segment`: a selector and its hidden part."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741  (the manual's name)
    g: int
    avl: int = 0
    unusable: int = 0

    def pack(self) -> bytes:
        return SEGMENT.pack(*self)

    def descriptor(self) -> bytes:
        """The 8 bytes of it in a GDT (Intel SDM 3A 3.4.5)."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.avl | self.l << 1 | self.db << 2 | self.g << 3
        return struct.pack(
            "<HHBBBB",
            limit & 0xFFFF,
            self.base & 0xFFFF,
            self.base >> 16 & 0xFF,
            access,
            limit >> 16 & 0xF | flags << 4,
            self.base >> 24 & 0xFF,
        )


class States(Protocol):
    """What of a virtual CPU is used here."""

    def get_state(self, name: str) -> bytes: ...
    def set_state(self, name: str, data: bytes) -> None: ...


class Memory(Protocol):
    """Guest-physical RAM from address 0 on."""

    def write(self, offset: int, data: bytes) -> object: ...


def mode_of(regs: bytes, sregs: bytes) -> str:
    """`real`, `v8086`, `protected`, `compat` (a 32- or 16-bit segment in long mode) or `long`."""
    if not quad(sregs, CR0) & CR0_PE:
        return "real"
    if quad(sregs, EFER) & EFER_LMA:
        return "long" if Segment(*SEGMENT.unpack_from(sregs, 0)).l else "compat"
    return "v8086" if quad(regs, RFLAGS) & RFLAGS_VM else "protected"


@dataclass(frozen=True, slots=True)
class CodeMode:
    """How a CPU reads instructions: `bits` 16, 32 or 64, the base of its code segment, and its instruction pointer.

    A linear address is base + ip. 64-bit code takes no base, whatever is loaded (Intel SDM 3A 3.2.4); elsewhere both
    have 32 bits, in 16-bit code, too.
    """

    bits: int
    base: int
    ip: int

    @staticmethod
    def of(regs: bytes, sregs: bytes) -> CodeMode:
        """That of a CPU between two instructions."""
        cs, ip = Segment(*SEGMENT.unpack_from(sregs, 0)), quad(regs, RIP)
        if cs.l and quad(sregs, EFER) & EFER_LMA:
            return CodeMode(64, 0, ip)
        return CodeMode(32 if cs.db else 16, cs.base, ip)

    @property
    def mask(self) -> int:
        """The bits of an instruction pointer and of a linear address."""
        return (1 << (64 if self.bits == 64 else 32)) - 1

    def linear(self, ip: int) -> int:
        return self.base + ip & self.mask

    def ip_of(self, linear: int) -> int:
        return linear - self.base & self.mask

    @property
    def address(self) -> int:
        """The linear address of the next instruction."""
        return self.linear(self.ip)


def is_linear(sregs: bytes, address: int) -> bool:
    """Whether a CPU has such a linear address: a canonical one in IA-32e mode (SDM 1 3.3.7.1), else one of 32 bits."""
    if not quad(sregs, EFER) & EFER_LMA:
        return address < 1 << 32
    bits = 57 if quad(sregs, CR4) & CR4_LA57 else 48
    return address >> (bits - 1) in (0, (1 << (65 - bits)) - 1)


def check_mode(mode: str) -> None:
    """Invalid where there is no mode of that name."""
    if mode not in MODES:
        raise Invalid(f"there is no mode {mode}: {', '.join(MODES)}")


def tables_of(sregs: bytes) -> list[tuple[str, int]]:
    """What a CPU looks up in memory, and where: its page tables, guest-physical, and the end of its GDT, linear."""
    cr0, _, cr3, _, _ = _CONTROL.unpack_from(sregs, CONTROL_AT)
    base, limit = TABLE.unpack_from(sregs, GDTR)
    found = [("page tables", cr3 & ~(PAGE_SIZE - 1) & (1 << 52) - 1)] if cr0 & CR0_PG else []
    return found + ([("GDT", base + limit)] if cr0 & CR0_PE else [])


def set_mode(cpu: States, memory: Memory, size: int, mode: str, *, reach: int = 4 << 30) -> None:
    """Put a CPU into a mode, ready for a flat binary at address 0: rip 0, interrupts off, a stack, no IDT.

    `size` is the RAM that begins at address 0; `protected` and `long` take its last page for a GDT (the
    selectors CODE, DATA, ...) and `long` the pages below for page tables that map the first `reach` bytes,
    and all of `size`, to themselves, for user mode, too. The stack is below all that; in real mode below
    64 KiB. The other general registers keep their values; SSE is switched on outside of real mode.
    """
    check_mode(mode)
    tables = _page_tables_size(max(size, reach)) if mode == "long" else 0
    gdt = (size - PAGE_SIZE) & -PAGE_SIZE
    top = _REAL_STACK if mode == "real" else gdt - tables
    if min(size, top) < PAGE_SIZE:
        raise Invalid(f"the mode {mode} needs more RAM than {size} bytes")
    sregs = bytearray(cpu.get_state("sregs"))
    if mode == "real":
        _set_real(sregs)
        top = min(top, size & ~0xF)
    else:
        memory.write(gdt, _set_flat(sregs, long=mode == "long", gdt=gdt))
    if mode == "long":
        _write_page_tables(memory, top, max(size, reach))
        _set_control(sregs, cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG, cr3=top, cr4_more=CR4_PAE)
    elif mode == "protected":
        _set_control(sregs, cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE, cr3=0, cr4_more=0)
    put_quad(sregs, EFER, EFER_LME | EFER_LMA if mode == "long" else 0)
    regs = bytearray(cpu.get_state("regs"))
    for offset, value in ((RIP, 0), (RSP, top), (RFLAGS, RFLAGS_FIXED)):
        put_quad(regs, offset, value)
    cpu.set_state("sregs", bytes(sregs))
    cpu.set_state("regs", bytes(regs))


@functools.lru_cache(maxsize=16)
def flat(sregs: bytes, mode: str, at: int, gigabytes: int, *, large: bool) -> tuple[bytes, bytes]:
    """The sregs of a CPU in a mode, with flat segments of base 0 and no IDT, and what is to be at guest-physical `at`:
    of `protected` the GDT; of `long` a PML4, a PDPT, page directories, which map so many GiB to themselves, for user
    mode, too, and in the page after them the GDT. A CPU has nothing to write there. `large`: in pages of 1 GiB, without
    page directories."""
    found = bytearray(sregs)
    tables = b""
    if mode == "real":
        _set_real(found)
        TABLE.pack_into(found, IDTR, 0, 0)
    elif mode == "protected":
        tables = _set_flat(found, long=False, gdt=at)
        _set_control(found, cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE, cr3=0, cr4_more=0)
    else:
        flags = _PRESENT | _WRITABLE | _USER | _ACCESSED
        pdpt = at + PAGE_SIZE
        tables = struct.pack("<Q", pdpt | flags).ljust(PAGE_SIZE, b"\0")
        if large:
            tables += _table(0, 1 << 30, gigabytes, flags | _LARGE | _DIRTY).ljust(PAGE_SIZE, b"\0")
        else:
            tables += _table(pdpt + PAGE_SIZE, PAGE_SIZE, gigabytes, flags).ljust(PAGE_SIZE, b"\0")
            tables += _table(0, _LARGE_PAGE, 512 * gigabytes, flags | _LARGE | _DIRTY)
        tables += _set_flat(found, long=True, gdt=at + len(tables))
        _set_control(found, cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG, cr3=at, cr4_more=CR4_PAE)
    put_quad(found, EFER, EFER_LME | EFER_LMA if mode == "long" else 0)
    return bytes(found), tables


def _set_real(sregs: bytearray) -> None:
    data = Segment(0, 0xFFFF, 0, _DATA_TYPE, present=1, dpl=0, db=0, s=1, l=0, g=0)
    _set_segments(sregs, data._replace(type=_CODE_TYPE), data)
    TABLE.pack_into(sregs, GDTR, 0, 0xFFFF)
    TABLE.pack_into(sregs, IDTR, 0, 0x3FF)  # the interrupt vector table: 256 far pointers
    _CONTROL.pack_into(sregs, CONTROL_AT, CR0_ET, 0, 0, 0, 0)


def _set_flat(sregs: bytearray, *, long: bool, gdt: int) -> bytes:
    """Set the segments, GDTR and IDTR; the bytes of the GDT."""
    data = Segment(0, 0xFFFFFFFF, DATA, _DATA_TYPE, present=1, dpl=0, db=1, s=1, l=0, g=1)
    code32 = data._replace(type=_CODE_TYPE, selector=CODE)
    code64 = code32._replace(db=0, l=1)  # D and L together are reserved (SDM 3A 3.4.5)
    code = code64 if long else code32
    _set_segments(sregs, code, data)
    user = [part._replace(dpl=3) for part in (code32, data, code64)]
    table = [code, data, *(user if long else user[:2])]
    gdt_bytes = bytes(8) + b"".join(part.descriptor() for part in table)
    TABLE.pack_into(sregs, GDTR, gdt, len(gdt_bytes) - 1)
    TABLE.pack_into(sregs, IDTR, 0, 0)  # no IDT: an exception is a triple fault, not a jump to wherever
    return gdt_bytes


def _set_segments(sregs: bytearray, code: Segment, data: Segment) -> None:
    # TR has to be usable and a busy TSS, LDTR may be unusable (SDM 3C 27.3.1.2).
    tss = Segment(0, 0xFFFF, 0, _BUSY_TSS, present=1, dpl=0, db=0, s=0, l=0, g=0)
    ldt = Segment(0, 0xFFFF, 0, _LDT_TYPE, present=1, dpl=0, db=0, s=0, l=0, g=0)
    for number, name in enumerate(SEGMENTS):
        segment = {"cs": code, "tr": tss, "ldtr": ldt}.get(name, data)
        SEGMENT.pack_into(sregs, number * SEGMENT.size, *segment)


def _set_control(sregs: bytearray, *, cr0: int, cr3: int, cr4_more: int) -> None:
    cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | cr4_more
    _CONTROL.pack_into(sregs, CONTROL_AT, cr0, 0, cr3, cr4, 0)


def _page_tables_size(reach: int) -> int:
    """Bytes of the tables: a PML4, a PDPT for each 512 GiB, a page directory for each GiB."""
    directories = -(-reach // _TABLE_REACH)
    pointers = -(-directories // 512)
    return (1 + pointers + directories) * PAGE_SIZE


def _write_page_tables(memory: Memory, address: int, reach: int) -> None:
    """PML4, PDPTs and page directories from `address` on, in this order."""
    directories = -(-reach // _TABLE_REACH)
    pointers = -(-directories // 512)
    flags = _PRESENT | _WRITABLE | _USER
    pdpt = address + PAGE_SIZE
    directory = pdpt + pointers * PAGE_SIZE
    memory.write(address, _table(pdpt, PAGE_SIZE, pointers, flags).ljust(PAGE_SIZE, b"\0"))
    memory.write(pdpt, _table(directory, PAGE_SIZE, directories, flags).ljust(pointers * PAGE_SIZE, b"\0"))
    memory.write(directory, _table(0, _LARGE_PAGE, directories * 512, flags | _LARGE))


def _table(first: int, step: int, count: int, flags: int) -> bytes:
    return b"".join(struct.pack("<Q", first + number * step | flags) for number in range(count))
