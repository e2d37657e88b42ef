"""Start: how the CPU begins, as register values; and the states that boot protocols ask for.

Every one has interrupts off, no paging but where long mode needs it, flat segments, and a GDT in RAM that says the
same as the hidden parts of the segments. Selectors are those of a `Layout`. What a BIOS would have set in the CPU and
in the chips is in firmware.py.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from vmfs.boot import firmware
from vmfs.boot.firmware import States
from vmfs.boot.plan import Plan
from vmfs.boot.platform import BIOS_DATA_END, EBDA, Platform
from vmfs.boot.source import Source
from vmfs.words.errors import Invalid
from vmfs.words.modes import CR0_ET, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, RFLAGS_FIXED, Segment
from vmfs.words.registers import RegisterFile, write_registers

# Where the loader's own structures go when an image is not there itself: clear of the boot sector's page and of the
# first 64 KiB, where small kernels have their stacks.
LOW, LOW_END = 0x1_0000, EBDA

STUBS = 0xF_FC00
_VECTORS = 256

_DATA_TYPE, _CODE_TYPE, _BUSY_TSS, _LDT_TYPE = 3, 11, 11, 2  # Intel SDM 3A 3.4.5.1, 3.5

_PAGE = 4096
_MAPPED = 4  # GiB
_TABLE, _LARGE = 0x03, 0x83  # present and writable; a page of 2 MiB, too


class Layout(NamedTuple):
    """The descriptors of a GDT, by their selectors. `task` is 0 where TR has none: its hidden part counts."""

    code: int
    data: int
    task: int
    code_16: int
    data_16: int
    idt_limit: int


# boot.rst: __BOOT_CS, __BOOT_DS; Linux's own setup code has the TSS there, and an IDT without entries.
LINUX = Layout(code=0x10, data=0x18, task=0x20, code_16=0, data_16=0, idt_limit=0)
# What QEMU and GRUB's first version leave: a kernel may use them until it has a GDT of its own. IDTR is real mode's.
LOADER = Layout(code=0x08, data=0x10, task=0, code_16=0x18, data_16=0x20, idt_limit=0x3FF)

_GENERAL = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15".split()


@dataclass(frozen=True, slots=True)
class Rom:
    """A BIOS image, to be mapped read-only at guest-physical `address`."""

    address: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Start:
    """A machine that is ready to run.

    `registers` are by the names of vmfs.words.registers. `format` is a row of IMAGES, `how` a sentence about what
    was done.
    `written` are the (address, size) in RAM that were changed.

    With `registers` the CPU starts in the image. Without, it starts at the reset vector, in a BIOS: `rom`, or
    where that is None one that the caller has (`load_bios`); it has to find `firmware_files` in fw_cfg.
    """

    format: str
    how: str
    registers: Mapping[str, int]
    written: tuple[tuple[int, int], ...] = ()
    rom: Rom | None = None
    firmware_files: Mapping[str, bytes] = field(default_factory=dict)

    def apply(self, cpu: RegisterFile) -> None:
        """Set the registers of a CPU in its reset state, as one change."""
        if self.registers:
            write_registers(cpu, {**self.registers, **firmware.memory_types(cpu.get_state("cpuid"))})

    def apply_to_chips(self, machine: States, cpu: States) -> None:
        """Set a new machine's interrupt controllers and timer."""
        if self.registers:
            firmware.leave_chips(machine, cpu)


@dataclass(frozen=True, slots=True)
class Request:
    """What a format's loader is given: see `vmfs.boot.load`. `rsdp` is where ACPI's root pointer will be, `root` its
    bytes; 0 and none without ACPI."""

    image: Source
    initrd: Source | None
    cmdline: bytes
    platform: Platform
    rsdp: int
    root: bytes
    decompress: bool

    def refuse_arguments(self, what: str) -> None:
        """For formats that have no place for an initrd and a command line."""
        if self.initrd is not None or self.cmdline:
            raise Invalid(f"{what} takes no {'initrd' if self.initrd is not None else 'cmdline'}")


class Entry(NamedTuple):
    """What a format's loader gives: the parts of `Start` that it decides."""

    registers: Mapping[str, int]
    how: str
    rom: Rom | None = None
    firmware_files: Mapping[str, bytes] | None = None


def _segments(code: Segment, data: Segment, tss: Segment) -> dict[str, int]:
    ldt = Segment(0, 0xFFFF, 0, _LDT_TYPE, present=1, dpl=0, db=0, s=0, l=0, g=0)
    values = {}
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr"):
        segment = {"cs": code, "tr": tss, "ldtr": ldt}.get(name, data)
        for part, value in segment._asdict().items():
            values[name if part == "selector" else f"{name}.{part}"] = value
    return values


def real(*, rip: int, rsp: int, rdx: int = 0, segment: int = 0, code_segment: int | None = None) -> dict[str, int]:
    """Real mode, all data segments at `segment`, code there or at `code_segment`."""
    data = Segment(segment << 4, 0xFFFF, segment, _DATA_TYPE, present=1, dpl=0, db=0, s=1, l=0, g=0)
    at = segment if code_segment is None else code_segment
    code = data._replace(type=_CODE_TYPE, selector=at, base=at << 4)
    tss = Segment(0, 0xFFFF, 0, _BUSY_TSS, present=1, dpl=0, db=0, s=0, l=0, g=0)
    return {
        **_segments(code, data, tss),
        **{"gdtr.base": 0, "gdtr.limit": 0xFFFF, "idtr.base": 0, "idtr.limit": 0x3FF},
        **{"cr0": CR0_ET, "cr2": 0, "cr3": 0, "cr4": 0, "cr8": 0, "efer": 0},
        **_general({"rip": rip, "rsp": rsp, "rdx": rdx}),
    }


def protected(plan: Plan, values: Mapping[str, int], layout: Layout = LINUX) -> dict[str, int]:
    """32-bit protected mode without paging; `values` are the general registers, 0 where not given.

    The state of the multiboot, PVH and 32-bit Linux protocols.
    """
    return _flat(plan, values, layout, long=False, cr3=0)


def long(plan: Plan, values: Mapping[str, int]) -> dict[str, int]:
    """Long mode, the first 4 GiB mapped to themselves. The state of the 64-bit Linux protocol."""
    address = plan.place("the page tables", (2 + _MAPPED) * _PAGE, low=LOW, high=LOW_END)
    pdpt = address + _PAGE
    tables = [
        struct.pack("<Q", pdpt | _TABLE).ljust(_PAGE, b"\0"),
        b"".join(struct.pack("<Q", pdpt + (1 + number) * _PAGE | _TABLE) for number in range(_MAPPED)).ljust(
            _PAGE, b"\0"
        ),
        *(struct.pack("<Q", number << 21 | _LARGE) for number in range(_MAPPED * 512)),
    ]
    plan.write(address, b"".join(tables))
    return _flat(plan, values, LINUX, long=True, cr3=address)


def _flat(plan: Plan, values: Mapping[str, int], layout: Layout, *, long: bool, cr3: int) -> dict[str, int]:
    data = Segment(0, 0xFFFFFFFF, layout.data, _DATA_TYPE, present=1, dpl=0, db=1, s=1, l=0, g=1)
    code = data._replace(type=_CODE_TYPE, selector=layout.code, db=0 if long else 1, l=1 if long else 0)
    tss = Segment(0, 0x67, layout.task, _BUSY_TSS, present=1, dpl=0, db=0, s=0, l=0, g=0)
    data_16 = Segment(0, 0xFFFF, layout.data_16, _DATA_TYPE, present=1, dpl=0, db=0, s=1, l=0, g=0)
    code_16 = data_16._replace(type=_CODE_TYPE, selector=layout.code_16)
    table = _table(code, data, code_16, data_16, tss)
    gdt = plan.put("the GDT", table, low=LOW, high=LOW_END)
    stack = plan.place("the stack", _PAGE, low=LOW, high=LOW_END) + _PAGE
    return {
        **_segments(code, data, tss),
        **{"gdtr.base": gdt, "gdtr.limit": len(table) - 1, "idtr.base": 0, "idtr.limit": layout.idt_limit},
        **{"cr0": CR0_PE | CR0_ET | (CR0_PG if long else 0), "cr2": 0, "cr3": cr3},
        **{"cr4": CR4_PAE if long else 0, "cr8": 0, "efer": EFER_LME | EFER_LMA if long else 0},
        **_general({"rsp": stack, **values}),
    }


def _table(*segments: Segment) -> bytes:
    """A GDT with each segment at its selector; one with selector 0 is not in it."""
    table = bytearray(8)
    for segment in segments:
        if not segment.selector:
            continue
        descriptor = segment.descriptor()
        if not segment.s:
            descriptor += bytes(8)  # a system segment's is of 16 bytes in long mode
        table.extend(bytes(max(segment.selector + len(descriptor) - len(table), 0)))
        table[segment.selector : segment.selector + len(descriptor)] = descriptor
    return bytes(table)


def _general(values: Mapping[str, int]) -> dict[str, int]:
    return {**dict.fromkeys(_GENERAL, 0), "rflags": RFLAGS_FIXED, **values}


def bios_data(plan: Plan, platform: Platform) -> None:
    """What a BIOS leaves in low memory, for kernels that look there: its data area, and the EBDA's size.

    There is no BIOS: each interrupt vector points to a `cli; hlt` of its own, at F000:FC00 + 2 * vector,
    so that a machine which calls the BIOS halts with the call in rip instead of running wild.
    """
    offset = STUBS & 0xFFFF
    vectors = (struct.pack("<HH", offset + 2 * number, STUBS >> 4 & 0xF000) for number in range(_VECTORS))
    plan.write(0, b"".join(vectors))
    plan.write(STUBS, b"\xfa\xf4" * _VECTORS)  # cli; hlt
    area = bytearray(BIOS_DATA_END - 0x400)
    ports = [port for port, _ in platform.serial[:4]]
    struct.pack_into(f"<{len(ports)}H", area, 0x00, *ports)
    printers = [port for port, _ in platform.parallel[:3]]
    struct.pack_into(f"<{len(printers)}H", area, 0x08, *printers)
    struct.pack_into("<H", area, 0x0E, EBDA >> 4)
    fpu, mouse, color_80 = 1 << 1, 1 << 2, 2 << 4
    equipment = fpu | (mouse if platform.ps2 else 0) | (color_80 if platform.vga else 0)
    equipment |= len(ports) << 9 | len(printers) << 14
    struct.pack_into("<H", area, 0x10, equipment)
    struct.pack_into("<H", area, 0x13, EBDA >> 10)  # KiB of conventional memory
    if platform.ps2:
        struct.pack_into("<HH", area, 0x1A, 0x1E, 0x1E)  # the keyboard's buffer, which is empty
        struct.pack_into("<HH", area, 0x80, 0x1E, 0x3E)  # its begin and end
    if platform.vga:
        struct.pack_into("<BHH", area, 0x49, 3, 80, 0x1000)  # video mode, columns, bytes a page
        struct.pack_into("<H", area, 0x63, 0x3D4)  # the CRT controller's port
        struct.pack_into("<BH", area, 0x84, 24, 16)  # rows less one, lines of a character
    plan.write(0x400, bytes(area))
    plan.write(EBDA, b"\x01".ljust(1 << 10, b"\0"))
