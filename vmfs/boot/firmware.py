"""What a BIOS leaves in the CPU and in the chips of a PC, for what is entered without one.

The values are those that SeaBIOS leaves, on QEMU and on this machine; docs/boot.md has them beside each other.
Memory types: Intel SDM 3A 11.11. The state of the chips is that of linux/kvm.h.
"""

from __future__ import annotations

import struct
from typing import Protocol

from vmfs.devices.pci import MEMORY_START
from vmfs.words import layouts
from vmfs.words.layouts import PIC_ELCR, PIC_IMR, PIC_INIT4, PIC_IRQ_BASE
from vmfs.words.registers import msr_name

_UC, _WP, _WB = 0, 5, 6  # memory types, SDM 3A table 11-2

_PAT = 0x277
_DEFAULT_PAT = 0x0007_0406_0007_0406  # as after a reset (SDM 3A table 11-12)
_DEFAULT_TYPE = 0x2FF
_ENABLE, _ENABLE_FIXED = 1 << 11, 1 << 10
_FIXED = {
    0x250: _WB,  # 00000-7FFFF
    0x258: _WB,  # 80000-9FFFF
    0x259: _UC,  # A0000-BFFFF, the video memory
    **dict.fromkeys(range(0x268, 0x270), _WP),  # C0000-FFFFF
}
_BASE, _MASK = 0x200, 0x201  # of the first variable range
_VALID = 1 << 11

# CPUID
_MTRR, _HAS_PAT = 1 << 12, 1 << 16  # leaf 1, edx
_ADDRESS_BITS_WITHOUT_LEAF = 36  # SDM 3A 11.11.3

_PICS = (  # mask, vector of the first line, lines that are level-triggered: those of PCI, IRQ 10 and 11
    (0xB8, 0x08, 0x00),
    (0x8E, 0x70, 0x0C),
)

# Of the timer; 54.9 ms a tick: the BIOS's clock.
_WORD, _RATE = 3, 2

_LAPIC = {  # offset: value; virtual wire mode (MultiProcessor Specification 1.4, 3.6.2.2)
    layouts.LAPIC_SPURIOUS: 0x1FF,  # software enable, spurious vector FF
    layouts.LAPIC_LINT0: 0x8700,  # LINT0: ExtINT, level
    layouts.LAPIC_LINT1: 0x8400,  # LINT1: NMI, level
}


class States(Protocol):
    """A CPU or a machine: `vmfs.engine.base` has both."""

    def get_state(self, name: str) -> bytes: ...
    def set_state(self, name: str, data: bytes) -> None: ...


def memory_types(cpuid: bytes) -> dict[str, int]:
    """MTRRs and PAT as registers by name, those that a CPU with the CPUID (the bytes of its state) has.

    RAM is write-back, as is all that no range covers; the memory of PCI devices is uncached. Where the MTRRs are off,
    Linux takes its PAT for disabled, and maps everything that is to be write-combining uncached.
    """
    features, bits = 0, _ADDRESS_BITS_WITHOUT_LEAF
    for function, _, _, eax, _, _, edx in layouts.cpuid_entries(cpuid):
        if function == 1:
            features = edx
        elif function == 0x8000_0008:
            bits = eax & 0xFF
    values = {}
    if features & _MTRR:
        values = {msr: kind * 0x0101_0101_0101_0101 for msr, kind in _FIXED.items()}
        values[_BASE] = MEMORY_START | _UC
        values[_MASK] = (1 << bits) - ((1 << 32) - MEMORY_START) | _VALID
        values[_DEFAULT_TYPE] = _ENABLE | _ENABLE_FIXED | _WB
    if features & _HAS_PAT:
        values[_PAT] = _DEFAULT_PAT
    return {msr_name(msr): value for msr, value in values.items()}


def leave_chips(machine: States, cpu: States) -> None:
    """The 8259s with the BIOS's vectors and masks, the timer at 18.2 Hz, the LAPIC as a wire to the 8259s."""
    irqchip = bytearray(machine.get_state("irqchip"))
    for number, (mask, vector, level) in enumerate(_PICS):
        at = number * layouts.IRQCHIP.size + layouts.IRQCHIP_CHIP
        for offset, value in ((PIC_IMR, mask), (PIC_IRQ_BASE, vector), (PIC_INIT4, 1), (PIC_ELCR, level)):
            irqchip[at + offset] = value
    machine.set_state("irqchip", bytes(irqchip))
    pit = bytearray(machine.get_state("pit"))
    now = layouts.quad(machine.get_state("clock"), layouts.CLOCK)
    layouts.PIT_CHANNEL.pack_into(pit, 0, 1 << 16, 0, 0, 0, 0, _WORD, _WORD, 0, _WORD, _RATE, 0, 1, now)
    machine.set_state("pit", bytes(pit))
    lapic = bytearray(cpu.get_state("lapic"))
    for offset, value in _LAPIC.items():
        struct.pack_into("<I", lapic, offset, value)
    cpu.set_state("lapic", bytes(lapic))
