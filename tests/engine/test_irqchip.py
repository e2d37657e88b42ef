"""Interrupt controllers and the timer in the engine (capability IRQCHIP)."""

import struct
import threading

import pytest
from engine.machine import machine_on

from vmfs.words import exits
from vmfs.words.errors import Invalid, Unsupported

SECONDS = 30

# The 8259s to vectors 0x20 and 0x28, with all lines but one masked (Intel 8259A data sheet).
PIC = """
    mov al, 0x11; out 0x20, al; out 0xa0, al
    mov al, 0x20; out 0x21, al
    mov al, 0x28; out 0xa1, al
    mov al, 4; out 0x21, al
    mov al, 2; out 0xa1, al
    mov al, 1; out 0x21, al; out 0xa1, al
    mov al, {mask}; out 0x21, al
    mov al, 0xff; out 0xa1, al
    mov word ptr [{vector} * 4], offset handler
    mov word ptr [{vector} * 4 + 2], 0
    mov sp, 0x8000
"""
HANDLER = "handler: inc word ptr [0x3000]; mov al, 0x20; out 0x20, al; iret"


@pytest.fixture
def pc(engine):
    with machine_on(engine, irqchip=True) as machine:
        yield machine


def test_the_timer_wakes_hlt(pc, assembler):
    """The 8254's channel 0 at 1 kHz; after five ticks the guest says so at a port that nobody has."""
    program = assembler(
        PIC.format(mask="0xfe", vector=0x20)
        + """
            mov al, 0x34; out 0x43, al
            mov al, 0xa9; out 0x40, al
            mov al, 0x04; out 0x40, al
            sti
        again: hlt
            cmp word ptr [0x3000], 5
            jb again
            cli
            mov al, 0x55
            out 0x99, al
        """
        + HANDLER,
        "real",
    )
    pc.load(program, "real")
    assert pc.vcpu.run().line().startswith("io direction=out port=0x99 size=1 count=1 data=0x55 ")
    assert struct.unpack("<H", pc.ram.read(0x3000, 2))[0] >= 5


def test_a_line_wakes_hlt(pc, assembler):
    """IRQ 4, raised from another thread while the CPU halts in the engine: no exit in between."""
    program = assembler(
        PIC.format(mask="0xef", vector=0x24)
        + "out 0x98, al; sti; hlt; cli; mov ax, [0x3000]; out 0x99, al;"
        + HANDLER,
        "real",
    )
    pc.load(program, "real")
    assert isinstance(pc.vcpu.run(), exits.Io)
    result = []
    thread = threading.Thread(target=lambda: result.append(pc.vcpu.run()), daemon=True)
    thread.start()
    pc.machine.irq_line(4, True)
    pc.machine.irq_line(4, False)
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert result[0].line().startswith("io direction=out port=0x99 size=1 count=1 data=0x1 ")


def test_kick_ends_a_halt(pc, assembler):
    pc.load(assembler("mov al, 0xff; out 0x21, al; sti; hlt; mov bl, 1; hlt", "real"), "real")
    result = []
    thread = threading.Thread(target=lambda: result.append(pc.vcpu.run()), daemon=True)
    thread.start()
    pc.vcpu.kick()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert result[0].REASON == "interrupted"


@pytest.mark.parametrize("name, size", [("irqchip", 3 * 520), ("pit", 112)])
def test_machine_states_round_trip(pc, assembler, name, size):
    pc.load(assembler(PIC.format(mask="0xfe", vector=0x20) + "out 0x99, al;" + HANDLER, "real"), "real")
    pc.vcpu.run()
    data = pc.machine.get_state(name)
    assert len(data) == size
    pc.machine.set_state(name, data)
    after = pc.machine.get_state(name)
    if name == "irqchip":
        assert after == data
        assert [data[520 * chip] for chip in range(3)] == [0, 1, 2]
        assert data[8 + 2] == 0xFE  # kvm_pic_state.imr of the master: what the guest wrote
    for wrong in (b"", data[:-1], data + b"\0"):
        with pytest.raises(Invalid):
            pc.machine.set_state(name, wrong)


def test_irqchip_parts_in_wrong_order_are_refused(pc):
    data = pc.machine.get_state("irqchip")
    with pytest.raises(Invalid):
        pc.machine.set_state("irqchip", data[520:1040] + data[:520] + data[1040:])
    assert pc.machine.get_state("irqchip") == data


def test_lapic_round_trip(pc):
    data = pc.vcpu.get_state("lapic")
    assert len(data) == 1024
    assert struct.unpack_from("<I", data, 0x20)[0] >> 24 == 0  # the APIC id of cpu 0
    pc.vcpu.set_state("lapic", data)
    assert pc.vcpu.get_state("lapic") == data
    with pytest.raises(Invalid):
        pc.vcpu.set_state("lapic", data[:-1])


def test_vectors_are_the_controllers(pc):
    with pytest.raises(Unsupported):
        pc.vcpu.interrupt(0x20)
    assert pc.vcpu.interrupts_queued == 0


def test_lines(pc):
    for gsi in (0, 4, 15, 23):
        pc.machine.irq_line(gsi, True)
        pc.machine.irq_line(gsi, False)
    for gsi in (-1, 24, 1 << 31):
        with pytest.raises(Invalid):
            pc.machine.irq_line(gsi, True)


def test_a_message_wakes_hlt(pc, assembler):
    """MSI of a vector to APIC 0, from another thread; those that name no APIC, or no vector, go nowhere."""
    handler = "handler: inc word ptr [0x3000]; iret"
    vector = "mov word ptr [0x41 * 4], offset handler; mov word ptr [0x41 * 4 + 2], 0; mov sp, 0x8000;"
    program = f"{vector} out 0x98, al; sti; hlt; cli; mov ax, [0x3000]; out 0x99, al; {handler}"
    pc.load(assembler(program, "real"), "real")
    lapic = bytearray(pc.vcpu.get_state("lapic"))
    struct.pack_into("<I", lapic, 0xF0, 0x1FF)  # software enable
    pc.vcpu.set_state("lapic", bytes(lapic))
    assert isinstance(pc.vcpu.run(), exits.Io)
    result = []
    thread = threading.Thread(target=lambda: result.append(pc.vcpu.run()), daemon=True)
    thread.start()
    for address, data in ((0xFEE0_7000, 0x41), (0x1000, 0x41), (1 << 63, 0), (0xFEE0_0000, 0)):
        pc.machine.signal_msi(address, data)
    pc.machine.signal_msi(0xFEE0_0000, 0x41)
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert result[0].line().startswith("io direction=out port=0x99 size=1 count=1 data=0x1 ")


def test_a_message_needs_controllers(engine):
    with machine_on(engine) as bare, pytest.raises(Unsupported):
        bare.machine.signal_msi(0xFEE0_0000, 0x41)


def test_controllers_come_first_and_once(pc, engine):
    with pytest.raises(Invalid):
        pc.machine.create_irqchip()
    with machine_on(engine) as bare, pytest.raises(Invalid):
        bare.machine.create_irqchip()


def test_cpuid_has_the_lapics_features(pc):
    data = pc.vcpu.get_state("cpuid")
    leaves = {entry[0]: entry for entry in struct.iter_unpack("<7I12x", data[8:])}
    assert leaves[1][6 - 1] & 1 << 21  # ECX: x2APIC
