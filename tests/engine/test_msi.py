"""Messages of a PCI function with the plain MSI capability, as a guest gets them on every engine: its driver sets the
address and the data, the device sends, the local APIC has the vector."""

from __future__ import annotations

import pytest
from engine.test_pc import SECONDS, load, register, run

from vmfs.devices.pci import Bar, PciState, PlainPciDevice
from vmfs.engine.base import SLEEP_MOST
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound

SLOT, MESSAGES, PORT = 5, 4, 0xC100


class Card(PlainPciDevice):
    """A write of a number to its port sends that message."""

    TYPE = "card"
    VENDOR, DEVICE, CLASS = 0x1234, 0x0003, 0xFF0000
    BARS = {0: Bar("port", 16)}

    def __init__(self, board):
        super().__init__(board, "card", SLOT)
        self.add_msi(MESSAGES)

    def write(self, region, offset, size, value):
        assert self.signal(value)

    def check(self, state: PciState) -> None:
        self.check_pci(state)


NMI = 0x400  # delivery mode 4
X2APIC, SPURIOUS, EOI = 0xC00, 0x80F, 0x80B


def config(offset, value):
    address = 0x8000_0000 | SLOT << 11 | offset
    return f"mov dx, 0xcf8; mov eax, {address}; out dx, eax; mov dx, 0xcfc; mov eax, {value}; out dx, eax;"


# The local APIC, with its registers as MSRs, which real mode reaches.
ENABLE = f"""
    mov ecx, 0x1b; rdmsr; or eax, {X2APIC}; wrmsr
    mov ecx, {SPURIOUS}; mov eax, 0x1ff; xor edx, edx; wrmsr
"""
# The vectors 50h to 53h each add a digit of their own to ebx. The second part masks message 1, and unmasks it.
SET_VECTORS = "".join(f"mov word ptr [{4 * (0x50 + n)}], offset h{n};" for n in range(MESSAGES))
HANDLERS = "".join(f"h{n}: add ebx, {1 << 4 * n}; jmp done;" for n in range(MESSAGES))
PROGRAM = f"""
    xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000; {SET_VECTORS}
    {ENABLE}
    {config(0x10, PORT)} {config(4, 7)}
    {config(0x44, 0xFEE0_0000)} {config(0x48, 0)} {config(0x4C, 0x50)} {config(0x40, 0x0021_0005)}
    xor ebx, ebx
    sti
    mov dx, {PORT}; xor al, al
each:
    out dx, al; inc al; cmp al, {MESSAGES}; jb each
    nop; nop; mov esi, ebx
    {config(0x50, 2)} mov dx, {PORT}; mov al, 1; out dx, al
    nop; nop; mov edi, ebx
    {config(0x50, 0)}
    nop; nop; cli
    mov dx, 0xf4; out dx, al
{HANDLERS}
done:
    pushad; mov ecx, {EOI}; xor eax, eax; xor edx, edx; wrmsr; popad; iret
"""


# It halts with interrupts off; what comes is an NMI, or nothing.
HALTS = f"""
    xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000; mov word ptr [8], offset nmi; mov word ptr [10], 0
    {ENABLE} mov al, 0xff; out 0x21, al; out 0xa1, al
    {config(4, 7)} {config(0x44, 0xFEE0_0000)} {config(0x48, 0)} {config(0x4C, NMI)} {config(0x40, 0x0001_0005)}
    mov ebx, 1; mov dx, 0xf4
    cli; hlt; back: cmp ebx, 2; jne back
    {config(0x50, 1)}
    cli; hlt; masked: jmp masked
nmi: inc ebx; iret
"""


@pytest.fixture
def pc(engine):
    vm = Vm(engine, memory_size=2 << 20)
    vm.set_machine("pc")
    vm.attach(Card)
    yield vm
    vm.close()


def test_a_guest_gets_each_message(pc, assembler):
    load(pc, assembler(PROGRAM, "real"))
    assert run(pc).line().startswith("shutdown cause=debug-exit ")
    assert [hex(register(pc, name)) for name in ("rsi", "rdi", "rbx")] == ["0x1111", "0x1111", "0x1121"]


def test_a_halt_that_a_message_could_end_goes_on(pc, assembler):
    """While an NMI may come of a device, no sleep is for good. Once its message is masked, it is."""
    program = assembler(HALTS, "real")
    load(pc, program)
    assert run(pc, seconds=SLEEP_MOST * 1.3).line() == f"limit rip={program.labels['back']:#x}"
    running = pc.start(Bound())
    with pc.board.lock:
        pc.board.devices["card"].signal(0)
    assert running.result(SECONDS).line() == f"hlt rip={program.labels['masked']:#x}"
    assert register(pc, "rbx") == 2
