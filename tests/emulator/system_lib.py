"""A machine of the core for tests of system behaviour: tables in memory, the CPU in any mode.

Every vector leads to a HLT of its own, so an exception ends a run, and what it left behind (the frame, the
registers, CR2) is all there to look at. `Guest.run` says which vector it was, or STOP where the program came
to its end.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from dataclasses import dataclass

from engine.asm import ORIGIN, assemble

from vmfs.engine.emulator import _core

RAM = 0x200000
WATCHDOG = 20
GDT, IDT, TSS, TSS2, LDT, STUBS, IVT = 0x10000, 0x11000, 0x12000, 0x13000, 0x14000, 0x15000, 0
KERNEL_STACK, USER_STACK, STACK1 = 0x18000, 0x1A000, 0x1C000  # tops
TABLES = 0x100000
DATA = 0x30000

DE, DB, NMI, BP, OF, BR, UD, NM, DF, TS, NP, SS, GP, PF, MF, AC = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    10,
    11,
    12,
    13,
    14,
    16,
    17,
)
STOP, SHUTDOWN = "stop", "shutdown"

CODE32, DATA32, USER_CODE32, USER_DATA, CODE64, USER_CODE64, CODE16, DATA16 = range(8, 72, 8)
TSS_SELECTOR, TSS2_SELECTOR, LDT_SELECTOR, CONFORMING, CODE1, DATA1, FREE = (
    0x48,
    0x58,
    0x68,
    0x78,
    0x80,
    0x88,
    0x90,
)

GPRS = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()
SEGMENTS = "cs ds es fs gs ss tr ldt".split()
_SEGMENT = struct.Struct("<QIHBBBBBBBBBx")
_TABLES_AT = len(SEGMENTS) * _SEGMENT.size
_CONTROL_AT = _TABLES_AT + 32
CONTROL = "cr0 cr2 cr3 cr4 cr8 efer".split()

CR0_PE, CR0_TS, CR0_ET, CR0_WP, CR0_AM, CR0_PG = 1, 8, 16, 1 << 16, 1 << 18, 1 << 31
(
    CR4_VME,
    CR4_PVI,
    CR4_TSD,
    CR4_DE,
    CR4_PSE,
    CR4_PAE,
    CR4_UMIP,
    CR4_LA57,
    CR4_FSGSBASE,
    CR4_PCIDE,
    CR4_SMEP,
    CR4_SMAP,
    CR4_PKE,
) = (1 << bit for bit in (0, 1, 2, 3, 4, 5, 11, 12, 16, 17, 20, 21, 22))
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1, 1 << 8, 1 << 10, 1 << 11
CF, ZF, TF, IF, DF_FLAG, IOPL3, NT, RF, VM, AC_FLAG, VIF, VIP = (
    1, 1 << 6, 1 << 8, 1 << 9, 1 << 10, 3 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20,
)  # fmt: skip
P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63


def descriptor(base=0, limit=0xFFFFF, kind=0x3, *, s=1, dpl=0, present=1, long=0, big=1, granular=1) -> int:
    """Eight bytes of a descriptor table (Intel SDM 3A 3.4.5); `kind` is the type."""
    access = kind | s << 4 | dpl << 5 | present << 7
    flags = long << 1 | big << 2 | granular << 3
    return (
        (limit & 0xFFFF)
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 15) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )


def gate(selector: int, offset: int, kind: int, *, dpl=0, present=1, parameters=0) -> int:
    """The first eight bytes of a gate (Intel SDM 3A 5.8.3, 6.11)."""
    access = kind | dpl << 5 | present << 7
    return offset & 0xFFFF | selector << 16 | parameters << 32 | access << 40 | (offset >> 16 & 0xFFFF) << 48


def tss_descriptor(base: int, limit: int = 0x67, kind: int = 9, **more) -> int:
    return descriptor(base, limit, kind, s=0, big=0, granular=0, **more)


@dataclass
class Segment:
    base: int
    limit: int
    selector: int
    type: int
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    long: int = 0
    g: int = 1
    avl: int = 0
    unusable: int = 0

    def pack(self) -> bytes:
        return _SEGMENT.pack(*(getattr(self, name) for name in self.__dataclass_fields__))


class Guest:
    """`mode`: real, protected, v86, compat or long; the tables are all there, whatever the mode."""

    def __init__(self, mode: str = "protected", cpl: int = 0, *, iopl: int = 0, chip: bool = False) -> None:
        self.fd = os.memfd_create("vmfs-system-test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, RAM)
        self.memory = mmap.mmap(self.fd, RAM)
        self.vm = _core.Vm()
        if chip:
            self.vm.create_irqchip()
        self.vm.map(0, 0, self.fd, 0, RAM)
        self.cpu = self.vm.create_vcpu(0)
        self.mode, self.long, self.chip = mode, mode in ("long", "compat"), chip
        self.labels: dict[str, int] = {}
        self._start = (3 if mode == "v86" else cpl, iopl)
        self._tables()
        self.begin()

    def close(self) -> None:
        self.vm.close()
        self.memory.close()
        os.close(self.fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # ---- Memory ------------------------------------------------------------

    def write(self, address: int, data: bytes) -> None:
        self.memory[address : address + len(data)] = data

    def put(self, address: int, value: int, size: int = 8) -> None:
        self.write(address, value.to_bytes(size, "little"))

    def get(self, address: int, size: int = 8) -> int:
        return int.from_bytes(self.memory[address : address + size], "little")

    def set_descriptor(self, selector: int, low: int, high: int | None = None) -> None:
        table = LDT if selector & 4 else GDT
        self.put(table + (selector & 0xFFF8), low)
        if high is not None:
            self.put(table + (selector & 0xFFF8) + 8, high)

    def set_gate(self, vector: int, low: int, high: int = 0) -> None:
        self.put(IDT + vector * (16 if self.long else 8), low)
        if self.long:
            self.put(IDT + vector * 16 + 8, high)

    def stub(self, vector: int) -> int:
        return STUBS + vector * 16

    def _tables(self) -> None:
        for selector, value in {
            CODE32: descriptor(kind=0xB),
            DATA32: descriptor(kind=3),
            USER_CODE32: descriptor(kind=0xB, dpl=3),
            USER_DATA: descriptor(kind=3, dpl=3),
            CODE64: descriptor(kind=0xB, long=1, big=0),
            USER_CODE64: descriptor(kind=0xB, long=1, big=0, dpl=3),
            CODE16: descriptor(kind=0xB, limit=0xFFFF, big=0, granular=0),
            DATA16: descriptor(kind=3, limit=0xFFFF, big=0, granular=0),
            CONFORMING: descriptor(kind=0xF),
            CODE1: descriptor(kind=0xB, dpl=1),
            DATA1: descriptor(kind=3, dpl=1),
        }.items():
            self.set_descriptor(selector, value)
        high = 0 if self.long else None
        self.set_descriptor(TSS_SELECTOR, tss_descriptor(TSS, 0xFF, 0xB), high)
        self.set_descriptor(TSS2_SELECTOR, tss_descriptor(TSS2), high)
        self.set_descriptor(LDT_SELECTOR, descriptor(LDT, 0xFFF, 2, s=0, big=0, granular=0), high)
        for vector in range(256):
            self.write(
                self.stub(vector), b"\xe6\xf1" if self.chip else b"\xf4"
            )  # out 0xf1, al: a HLT would wait
            kernel = CODE64 if self.long else CODE32
            self.set_gate(vector, gate(kernel, self.stub(vector), 14, dpl=3 if vector in (3, 4, 0x80) else 0))
            if self.mode == "real":
                self.put(IVT + 4 * vector, (STUBS >> 4) << 16 | vector * 16, 4)
        if self.long:
            for level in range(3):
                self.put(TSS + 4 + 8 * level, (KERNEL_STACK, STACK1, STACK1)[level])
            self.put(TSS + 36, STACK1)  # IST1
        else:
            for level in range(3):
                self.put(TSS + 4 + 8 * level, (KERNEL_STACK, STACK1, STACK1)[level], 4)
                self.put(TSS + 8 + 8 * level, (DATA32, DATA1 | 1, 0)[level], 4)
        self.put(TSS + 102, 0x68, 2)  # the I/O permission map: all ones but what a test clears
        self.write(TSS + 0x68, b"\xff" * (0x100 - 0x68))
        self.put(TSS2 + 102, 0x68, 2)

    # ---- State ------------------------------------------------------------

    def begin(self) -> None:
        """Registers as in the beginning; memory stays."""
        mode, (cpl, iopl) = self.mode, self._start
        if mode in ("real", "v86"):
            dpl = 3 if mode == "v86" else 0
            code = data = Segment(0, 0xFFFF, 0, 3, g=0, dpl=dpl)
            data = stack = code
            sp = 0x8000
        else:
            user = cpl == 3
            long = mode == "long"
            selector = (USER_CODE64 if long else USER_CODE32) if user else CODE64 if long else CODE32
            code = Segment(0, 0xFFFFFFFF, selector | cpl, 0xB, dpl=cpl, db=not long, long=long)
            data = stack = Segment(0, 0xFFFFFFFF, (USER_DATA if user else DATA32) | cpl, 3, dpl=cpl, db=1)
            sp = USER_STACK if user else KERNEL_STACK - 0x800
        tr = Segment(TSS, 0xFF, TSS_SELECTOR, 0xB, s=0, g=0)
        ldt = Segment(LDT, 0xFFF, LDT_SELECTOR, 2, s=0, g=0)
        names = {"cs": code, "ss": stack, "tr": tr, "ldt": ldt}
        sregs = bytearray(self.cpu.get_state("sregs"))
        sregs[:_TABLES_AT] = b"".join(names.get(name, data).pack() for name in SEGMENTS)
        idt_limit = 0x3FF if mode == "real" else 256 * (16 if self.long else 8) - 1
        struct.pack_into("<QH6xQH6x", sregs, _TABLES_AT, GDT, 0xFFF, 0 if mode == "real" else IDT, idt_limit)
        cr0, cr3, cr4, efer = CR0_ET | (mode != "real"), 0, 0, 0
        if self.long:
            self.identity_4level()
            cr0 |= CR0_PG | CR0_WP
            cr3, cr4, efer = TABLES, CR4_PAE, EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE
        struct.pack_into("<6Q", sregs, _CONTROL_AT, cr0, 0, cr3, cr4, 0, efer)
        self.cpu.set_state("sregs", bytes(sregs))
        self.set(rip=ORIGIN, rsp=sp, rflags=2 | iopl << 12 | (VM if mode == "v86" else 0))

    def identity_4level(self, flags: int = P | W | U) -> None:
        """RAM as 4 KiB pages at TABLES: PML4, PDPT, PD, one PT (page n is entry n of the last)."""
        pml4, pdpt, pd, pt = (TABLES + 0x1000 * n for n in range(4))
        self.put(pml4, pdpt | P | W | U)
        self.put(pdpt, pd | P | W | U)
        self.put(pd, pt | P | W | U)
        for page in range(RAM >> 12):
            self.put(pt + 8 * page, page << 12 | flags)

    def pte(self, address: int) -> int:
        """Where the 4 KiB entry of an address is."""
        return TABLES + 0x3000 + 8 * (address >> 12)

    def regs(self) -> dict[str, int]:
        return dict(zip(GPRS, struct.unpack("<18Q", self.cpu.get_state("regs")), strict=True))

    def set(self, **values: int) -> None:
        """Registers, control registers and EFER by name."""
        control = {name: values.pop(name) for name in CONTROL if name in values}
        if control:
            sregs = bytearray(self.cpu.get_state("sregs"))
            for name, value in control.items():
                struct.pack_into("<Q", sregs, _CONTROL_AT + 8 * CONTROL.index(name), value)
            self.cpu.set_state("sregs", bytes(sregs))
        if values:
            regs = self.regs() | values
            self.cpu.set_state("regs", struct.pack("<18Q", *(regs[name] for name in GPRS)))

    def control(self, name: str) -> int:
        return struct.unpack_from("<Q", self.cpu.get_state("sregs"), _CONTROL_AT + 8 * CONTROL.index(name))[0]

    def segment(self, name: str) -> Segment:
        return Segment(
            *_SEGMENT.unpack_from(self.cpu.get_state("sregs"), SEGMENTS.index(name) * _SEGMENT.size)
        )

    # ---- Running ------------------------------------------------------------

    def load(self, code: str) -> None:
        assembler_mode = {"v86": "real", "compat": "protected"}.get(self.mode, self.mode)
        program = assemble(f"{code}\nstop: .byte 0x0f, 0x0b", assembler_mode)
        self.write(ORIGIN, program.code)
        self.labels = program.labels

    def go(self, budget: int = 100_000):
        """Until the next exit, whatever it is: its tuple."""
        return self.cpu.run(budget)

    def run(self, code: str | None = None, budget: int = 100_000):
        """Run a program from ORIGIN: the vector of the first exception; STOP at its end; SHUTDOWN."""
        if code is not None:
            self.load(code)
        watchdog = threading.Timer(WATCHDOG, self.cpu.kick)  # a HLT that nothing ends
        watchdog.start()
        exit_ = self.cpu.run(budget)
        watchdog.cancel()
        if exit_[0] == _core.EXIT_SHUTDOWN:
            return SHUTDOWN
        ends = exit_[0] == _core.EXIT_IO and exit_[5] == 0xF1 if self.chip else exit_[0] == _core.EXIT_HLT
        assert ends, exit_
        rip = exit_[1] - self.chip  # OUT is one byte longer
        if self.mode == "real":
            rip += self.segment("cs").base
        vector, offset = divmod(rip - 1 - STUBS, 16)
        assert 0 <= vector < 256 and not offset, f"halted at {rip:#x}"
        if vector == UD and self.frame(False)[0] == self.labels["stop"]:
            return STOP
        return vector

    def frame(self, has_error: bool, size: int | None = None) -> list[int]:
        """What delivery pushed: ip, cs, flags, sp, ss (where it pushed the last two)."""
        size = size or (8 if self.long else 2 if self.mode == "real" else 4)
        at = self.regs()["rsp"] + (size if has_error else 0)
        return [self.get(at + size * n, size) for n in range(9)]

    @property
    def error(self) -> int:
        size = 8 if self.long else 4
        return self.get(self.regs()["rsp"], size)
