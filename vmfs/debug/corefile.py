"""A machine as an ELF core: what gdb, crash and drgn open.

    0            ELF header, program headers, notes, and zeros up to RAM_OFFSET
    RAM_OFFSET   RAM, from guest-physical 0 on

So a byte of RAM is always at the same place, and the file is as long as RAM and RAM_OFFSET, whatever the guest
has mapped. RAM has one PT_LOAD, with its physical addresses; a guest that has paging on has one more for each
range that its page tables map to RAM, with the linear addresses, over the same bytes.

    paging off   PT_LOAD vaddr 0, paddr 0: linear addresses are physical
    paging on    PT_LOAD vaddr PHYSICAL_WINDOW, paddr 0; and those of the ranges

PHYSICAL_WINDOW is not canonical, so no address of the guest is ever mistaken for a physical one.

Notes, for each CPU: NT_PRSTATUS, NT_FPREGSET, NT_X86_XSTATE where it has AVX, and the note that QEMU writes with
the segments and control registers, which crash and drgn read. Where Linux runs in the guest, its VMCOREINFO.

Source: System V gABI, "Object Files"; Linux include/uapi/linux/elf.h, arch/x86/include/asm/user_64.h,
Documentation/admin-guide/kdump/vmcoreinfo.rst; QEMU target/i386/arch_dump.c for the layout of its note.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmfs.debug.paging import NO_EXECUTE, WRITABLE, Paging, mapped_ranges
from vmfs.engine.base import Vcpu
from vmfs.memory.ram import MemoryView
from vmfs.words import layouts
from vmfs.words.errors import Invalid, Unsupported
from vmfs.words.layouts import put_quad, quad
from vmfs.words.registers import REGISTERS

RAM_OFFSET = 8 << 20  # room for 131072 program headers and the notes
PHYSICAL_WINDOW = 1 << 63

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE, _PN_XNUM = 4, 62, 1, 4, 0xFFFF
_PF_X, _PF_W, _PF_R = 1, 2, 4
_NT_PRSTATUS, _NT_FPREGSET, _NT_X86_XSTATE = 1, 2, 0x202

_KERNEL_GS_BASE = 0xC000_0102
_XCR0_AVX = layouts.XSAVE_X87 | layouts.XSAVE_SSE | layouts.XSAVE_AVX

# struct user_regs_struct (Linux arch/x86/include/asm/user_64.h).
_USER_REGS = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs rflags rsp ss "
    "fs.base gs.base ds es fs gs"
).split()


@dataclass(frozen=True, slots=True)
class CpuState:
    """What a core says of a CPU: its registers by name, and its paging."""

    registers: dict[str, int]
    xsave: bytes
    paging: Paging
    kernel_gs_base: int = 0

    @staticmethod
    def of(cpu: Vcpu) -> CpuState:
        """That of a CPU between two instructions."""
        states = {name: cpu.get_state(name) for name in ("regs", "sregs", "fpu")}
        for name in ("xcrs", "xsave"):
            try:
                states[name] = cpu.get_state(name)
            except Unsupported:
                states[name] = b""
        registers = {
            name: row.get(states[row.state]) for name, row in REGISTERS.items() if states.get(row.state)
        }
        try:
            kernel_gs_base = cpu.get_msr(_KERNEL_GS_BASE)
        except (Invalid, Unsupported):
            kernel_gs_base = 0
        return CpuState(registers, states["xsave"], Paging.of(cpu), kernel_gs_base)


def core_size(ram_end: int) -> int:
    """Bytes of the file."""
    return RAM_OFFSET + ram_end


def core_header(ram: MemoryView, cpus: list[CpuState]) -> bytes:
    """All that stands before RAM, without the zeros at its end. The first CPU's page tables count."""
    loads = _loads(ram, cpus[0].paging)
    notes = b"".join(_cpu_notes(number, cpu) for number, cpu in enumerate(cpus))
    notes += b"".join(_qemu_note(cpu) for cpu in cpus)
    if text := find_vmcoreinfo(ram):
        notes += _note("VMCOREINFO", 0, text)
    count = len(loads) + 1
    notes_at = _EHDR.size + count * _PHDR.size
    headers = [_PHDR.pack(_PT_NOTE, 0, notes_at, 0, 0, len(notes), 0, 4), *loads]
    # More program headers than 16 bits count: the number is in a section header then (gABI, "ELF Header").
    many = count >= _PN_XNUM
    sections_at = notes_at + len(notes) if many else 0
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian, version 1
    header = _EHDR.pack(
        identity,
        _ET_CORE,
        _EM_X86_64,
        1,
        0,
        _EHDR.size,
        sections_at,
        0,
        _EHDR.size,
        _PHDR.size,
        _PN_XNUM if many else count,
        _SHDR.size if many else 0,
        1 if many else 0,
        0,
    )
    sections = _SHDR.pack(0, 0, 0, 0, 0, 0, 0, count, 0, 0) if many else b""
    whole = b"".join((header, *headers, notes, sections))
    assert len(whole) <= RAM_OFFSET
    return whole


# ---- memory


def _loads(ram: MemoryView, paging: Paging) -> list[bytes]:
    everything = _PF_R | _PF_W | _PF_X
    if paging.kind == "off":
        return [_load(one.address, one.address, one.size, everything) for one in ram.regions]
    found = [_load(PHYSICAL_WINDOW + one.address, one.address, one.size, everything) for one in ram.regions]
    start = end = physical = flags = 0
    for one in mapped_ranges(ram, paging):
        length = min(one.end - one.start, ram.room(one.physical))
        if length <= 0:
            continue
        rights = _PF_R | _PF_W * bool(one.flags & WRITABLE) | _PF_X * (not one.flags & NO_EXECUTE)
        if one.start == end and one.physical == physical + end - start and rights == flags and end > start:
            end += length
            continue
        if end > start:
            found.append(_load(start, physical, end - start, flags))
        start, end, physical, flags = one.start, one.start + length, one.physical, rights
    if end > start:
        found.append(_load(start, physical, end - start, flags))
    return found


def _load(linear: int, physical: int, length: int, flags: int) -> bytes:
    # p_align is 0, none: crash takes a core with another for one of a format before kdump.
    return _PHDR.pack(_PT_LOAD, flags, RAM_OFFSET + physical, linear, physical, length, length, 0)


# ---- notes


def _note(name: str, type_: int, description: bytes) -> bytes:
    owner = name.encode() + b"\0"
    head = struct.pack("<3I", len(owner), len(description), type_)
    return head + _padded(owner) + _padded(description)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _cpu_notes(number: int, cpu: CpuState) -> bytes:
    fxsave = _fxsave(cpu)
    notes = _note("CORE", _NT_PRSTATUS, _prstatus(number, cpu)) + _note("CORE", _NT_FPREGSET, fxsave)
    if cpu.registers.get("xcr0", 0) & _XCR0_AVX == _XCR0_AVX and len(cpu.xsave) >= layouts.XSAVE_AVX_END:
        area = bytearray(cpu.xsave[: layouts.XSAVE_AVX_END])
        area[: len(fxsave)] = fxsave
        put_quad(area, layouts.XSAVE_SOFTWARE, _XCR0_AVX)
        # What is not in its initial state, and x87 and SSE, which stand above in any case.
        in_use = quad(area, layouts.XSAVE_STATE_BV) & _XCR0_AVX | layouts.XSAVE_X87 | layouts.XSAVE_SSE
        put_quad(area, layouts.XSAVE_STATE_BV, in_use)
        notes += _note("LINUX", _NT_X86_XSTATE, bytes(area))
    return notes


def _prstatus(number: int, cpu: CpuState) -> bytes:
    """struct elf_prstatus: the thread's id, one more than the CPU's number, and its registers."""
    registers = cpu.registers | {"orig_rax": (1 << 64) - 1}  # no system call is being restarted
    head = struct.pack("<3iH2x2Q4i8Q", 0, 0, 0, 0, 0, 0, number + 1, 0, 0, 0, *[0] * 8)
    return head + struct.pack("<27Q", *[registers[name] for name in _USER_REGS]) + struct.pack("<i4x", 1)


def _fxsave(cpu: CpuState) -> bytes:
    """The registers as FXSAVE64 stores them (SDM 1 10.5.1)."""
    get = cpu.registers
    area = bytearray(512)
    struct.pack_into(
        "<HHBxHQQII",
        area,
        0,
        get["fcw"],
        get["fsw"],
        get["ftw"],
        get["fop"],
        get["fip"],
        get["fdp"],
        get["mxcsr"],
        0xFFFF,
    )
    for number in range(8):
        area[32 + 16 * number : 48 + 16 * number] = get[f"st{number}"].to_bytes(16, "little")
    for number in range(16):
        area[160 + 16 * number : 176 + 16 * number] = get[f"xmm{number}"].to_bytes(16, "little")
    return bytes(area)


def _qemu_note(cpu: CpuState) -> bytes:
    """struct QEMUCPUState, version 1."""
    get = cpu.registers
    body = struct.pack("<18Q", *[get[name] for name in layouts.GENERAL])
    for name in "cs ds es fs gs ss ldtr tr".split():
        body += _qemu_segment(
            get[name], get[f"{name}.limit"], _descriptor_flags(cpu, name), get[f"{name}.base"]
        )
    for name in ("gdtr", "idtr"):
        body += _qemu_segment(0, get[f"{name}.limit"], 0, get[f"{name}.base"])
    body += struct.pack("<6Q", get["cr0"], 0, get["cr2"], get["cr3"], get["cr4"], cpu.kernel_gs_base)
    return _note("QEMU", 0, struct.pack("<II", 1, 8 + len(body)) + body)


def _qemu_segment(selector: int, limit: int, flags: int, base: int) -> bytes:
    return struct.pack("<4IQ", selector, limit, flags, 0, base)


def _descriptor_flags(cpu: CpuState, name: str) -> int:
    """The bits of the second half of a descriptor, where they stand in it (SDM 3A 3.4.5)."""
    places = (
        ("type", 8),
        ("s", 12),
        ("dpl", 13),
        ("present", 15),
        ("avl", 20),
        ("l", 21),
        ("db", 22),
        ("g", 23),
    )
    return sum(cpu.registers[f"{name}.{field}"] << place for field, place in places)


# ---- VMCOREINFO

_OWNER = b"VMCOREINFO\0\0"
_FIRST = b"OSRELEASE="
_TEXT_MOST = 64 << 10
_CHUNK = 1 << 20


def find_vmcoreinfo(ram: MemoryView) -> bytes:
    """The text that Linux keeps for crash dumps, as the ELF note that it makes of it at boot; or nothing.

    KERNELOFFSET and phys_base in it are what tells a tool where KASLR has put the kernel.
    """
    wanted = _OWNER + _FIRST
    for start, end in ram.extents():
        for at in range(start, end, _CHUNK):
            chunk = ram.read(at, min(_CHUNK, end - at) + len(wanted) - 1)
            place = -1
            while (place := chunk.find(wanted, place + 1)) >= 0:
                if text := _vmcoreinfo_at(ram, at + place):
                    return text
    return b""


def _vmcoreinfo_at(ram: MemoryView, owner: int) -> bytes:
    if owner < 12:
        return b""
    length, size, type_ = struct.unpack("<3I", ram.read(owner - 12, 12))
    if length != len(_OWNER) - 1 or type_ or not len(_FIRST) < size <= _TEXT_MOST:
        return b""
    text = ram.read(owner + len(_OWNER), size)
    return text if text.isascii() else b""
