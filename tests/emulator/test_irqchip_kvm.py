"""The emulator's interrupt chip beside KVM's: the same steps, the same answers and the same state structs.

KVM's in-kernel 8259s, 8254, I/O APIC and local APICs are driven by ioctls and by a small guest
(irqchip_lib.py).  Where KVM departs from the manuals and the chip does not, the steps here keep away; the
chip's sources say where.
"""

import os
import random
import shutil
import sys
import time

import pytest

sys.path.insert(0, os.path.dirname(__file__))
import irqchip_lib as chips  # noqa: E402
from irqchip_lib import (  # noqa: E402
    BASE,
    ENABLE_LAPIC,
    ENABLED,
    INIT_PICS,
    IOAPIC,
    LAPIC,
    MASK_PICS,
    TICKS,
    X2APIC,
    Chip,
    Kvm,
    ioapic_state,
    lapic_blob,
    lapic_registers,
    latch,
    pic_state,
    pit_state,
    program,
    vectors,
)

SKIP = None if shutil.which("gcc") else "gcc is not installed"
SKIP = SKIP or chips.why_no_kvm()
pytestmark = pytest.mark.skipif(SKIP is not None, reason=str(SKIP))


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return chips.load(chips.build(tmp_path_factory.mktemp("irqchip")))


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    return chips.build_guest(tmp_path_factory.mktemp("guest"))


EDGE_VECTORS = [0x30, 0x52, 0x74, 0x96, 0xB8, 0xDA, 0xFE]
MSI_LEVEL_VECTORS = [0x42, 0x64, 0xCA]
LEVEL_PINS = 0xAA5533


def pic_steps(rng):
    """A random step of 8259 work, where KVM and the data sheet agree: no poll, no special mask."""
    kind = rng.random()
    base = rng.choice([0x20, 0xA0])
    if kind < 0.4:
        return [("line", rng.choice([g for g in range(16) if g != 2]), rng.randrange(2))]
    if kind < 0.58:
        eoi = [
            0x20,
            0x20,
            0xA0,
            0x80,
            0x00,
            0x0A,
            0x0B,
            *(c + rng.randrange(8) for c in (0x60, 0xC0, 0xE0, 0x40)),
        ]
        return [("outb", base, rng.choice(eoi))]
    if kind < 0.62:
        icw4 = rng.randrange(2)
        return [
            ("outb", base, 0x10 | icw4),
            ("outb", base + 1, rng.choice([0x20, 0x28, 0x70, 0xF8])),
            ("outb", base + 1, 4),
            *[("outb", base + 1, rng.choice([1, 3, 0x11, 0x13]))] * icw4,
            ("outb", base + 1, rng.randrange(256)),
        ]
    if kind < 0.72:
        return [("outb", base + 1, rng.randrange(256) & rng.randrange(256))]
    if kind < 0.76:
        return [("outb", rng.choice([0x4D0, 0x4D1]), rng.randrange(256))]
    if kind < 0.86:
        return [("inb", rng.choice([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]))]
    return [("window",)]


def apic_steps(rng):
    """A random step of APIC work; INITs only to the CPUs that do not run the script."""
    kind = rng.random()
    if kind < 0.2:
        return [("line", rng.randrange(24), rng.randrange(2))]
    if kind < 0.32:
        data = rng.choice([rng.choice(EDGE_VECTORS), rng.choice(MSI_LEVEL_VECTORS) | 0x8000])
        destination = rng.choice([0, 1, 2, 3, 7, 9, 0xFF, 0x11, 0x12, 0xF])
        return [("msi", BASE | destination << 12 | rng.choice([0, 4]), data)]
    if kind < 0.35:
        return [("msi", BASE | rng.choice([1, 2, 3]) << 12, 0x500)]
    if kind < 0.55:
        pin = rng.randrange(24)
        level = LEVEL_PINS >> pin & 1
        vector = 0x31 + 8 * pin if level else rng.choice(EDGE_VECTORS)
        low = (
            vector
            | rng.randrange(2) << 11
            | rng.randrange(2) << 13
            | level << 15
            | rng.choice([0, 0, 1]) << 16
        )
        return [
            ("store", IOAPIC, 0x10 + 2 * pin),
            ("store", IOAPIC + 0x10, low),
            ("store", IOAPIC, 0x11 + 2 * pin),
            ("store", IOAPIC + 0x10, rng.choice([0, 1, 2, 3, 7, 9, 0xFF, 0x11, 0x12]) << 24),
        ]
    if kind < 0.85:
        entry = rng.choice(EDGE_VECTORS) | rng.choice([0, 0x10000, 0x700])
        return [
            ("store", LAPIC + offset, value)
            for offset, value in [
                rng.choice(
                    [(0xB0, 0)] * 5
                    + [(0x80, rng.choice([0, 0, 0x30, 0x70, 0xFF]))] * 2
                    + [
                        (0xF0, rng.choice([0x1FF, 0x1FF, 0xFF, 0x3FF])),
                        (0xD0, rng.choice([0, 1]) << 24),
                        (rng.choice([0x320, 0x330, 0x340, 0x350, 0x360, 0x370]), entry),
                    ]
                )
            ]
        ]
    if kind < 0.95:
        command = (
            rng.choice(EDGE_VECTORS) | rng.randrange(2) << 11 | 1 << 14 | rng.choice([0, 0, 0, 1, 2, 3]) << 18
        )
        return [
            ("store", LAPIC + 0x310, rng.choice([0, 1, 2, 3, 9, 0xFF]) << 24),
            ("store", LAPIC + 0x300, command),
        ]
    return [("accept",)]


def all_states(engine):
    """Everything but the running counters."""
    lapics = [
        {k: v for k, v in lapic_registers(engine.get_lapic(i)).items() if k != 0x390}
        for i in range(engine.cpus)
    ]
    return (
        pic_state(engine.get_chip(0)),
        pic_state(engine.get_chip(1)),
        ioapic_state(engine.get_chip(2)),
        lapics,
    )


def kvm_accept(kvm):
    """What an INTA does to CPU 0's local APIC, by its state: this host's KVM (PVM) loses the ISR bit of what
    it delivers at CPL 0.  The write of TPR makes it compute PPR."""
    registers = lapic_registers(kvm.get_lapic())
    vector = vectors(registers, 0x200)[-1]
    offset, bit = vector // 32 * 16, 1 << vector % 32
    registers[0x200 + offset] &= ~bit
    registers[0x100 + offset] = registers.get(0x100 + offset, 0) | bit
    assert kvm.set_lapic(lapic_blob(registers)) == 0
    kvm.run([("store", LAPIC + 0x80, registers.get(0x80, 0))])
    return vector


def step(engine, op, arguments):
    if op in ("line", "msi"):
        answer = getattr(engine, op)(*arguments)
        return answer if op == "msi" else None
    if op == "accept":
        return engine.acknowledge() if isinstance(engine, Chip) else kvm_accept(engine)
    return engine.run([(op, *arguments)])


def run_twins(chip, kvm, steps, rng, length):
    """The same steps on both; after each, the same answers and the same state."""
    trace = []
    for _ in range(length):
        for op, *arguments in steps(rng):
            if op == "accept" and chip.pending() < 0:
                continue
            trace.append((op, *map(hex, arguments)))
            assert step(chip, op, arguments) == step(kvm, op, arguments), trace[-20:]
            assert all_states(chip) == all_states(kvm), trace[-20:]


@pytest.mark.parametrize("cpus", [1, 3])
def test_kvm_reset_state(lib, guest, cpus):
    with Chip(lib, cpus) as chip, Kvm(guest, cpus) as kvm:
        for which in range(3):
            assert chip.get_chip(which) == kvm.get_chip(which)
        for cpu in range(cpus):
            assert chip.get_lapic(cpu) == kvm.get_lapic(cpu)
        ours, theirs = pit_state(chip.get_pit()), pit_state(kvm.get_pit())
        for channel in (*ours[0], *theirs[0]):
            channel.pop("count_load_time")
        assert ours == theirs


@pytest.mark.parametrize("seed", range(12))
def test_kvm_pic(lib, guest, seed):
    with Chip(lib) as chip, Kvm(guest) as kvm:
        chip.run(INIT_PICS)
        kvm.run(INIT_PICS)
        run_twins(chip, kvm, pic_steps, random.Random(seed), 150)


@pytest.mark.parametrize("seed", range(12))
def test_kvm_apics(lib, guest, seed):
    """Four CPUs, flat or cluster logical IDs: lines, messages, IPIs, EOIs, masks, redirection entries."""
    with Chip(lib, 4) as chip, Kvm(guest, 4) as kvm:
        for engine in (chip, kvm):
            engine.run(INIT_PICS + MASK_PICS)
            for cpu in range(4):
                registers = lapic_registers(engine.get_lapic(cpu))
                registers.update(
                    {
                        0xF0: 0x1FF,
                        0xD0: ([1, 2, 4, 8], [1, 2, 0x11, 0x12])[seed % 2][cpu] << 24,
                        0xE0: (0xFFFFFFFF, 0x0FFFFFFF)[seed % 2],
                    }
                )
                assert engine.set_lapic(lapic_blob(registers), cpu) == 0
        run_twins(chip, kvm, apic_steps, random.Random(seed), 100)


LAPIC_SAFE_WRITES = [
    (0x20, 0x05000000),
    (0x80, 0xFFFFFF5A),
    (0xD0, 0xFFFFFFFF),
    (0xE0, 0),
    (0xE0, 0xFFFFFFFF),
    (0xF0, 0xFFFFFFFF),
    (0x310, 0xFFFFFFFF),
    (0x330, 0xFFFFAFFF),
    (0x350, 0xFFFFAFFF),
    (0x360, 0xFFFFAFFF),
    (0x370, 0xFFFFAFFF),
    (0x320, 0xFFFFAFFF),
    (0x3E0, 0xFFFFFFFF),
    (0x30, 0),
    (0x100, 5),
    (0x200, 5),
    (0xA0, 5),
    (0xF0, 0xFF),
    (0x330, 0x31),
]


def test_kvm_lapic_register_bits(lib, guest):
    reads = [
        ("load", LAPIC + offset)
        for offset in (
            0x20,
            0x30,
            0x80,
            0xA0,
            0xD0,
            0xE0,
            0xF0,
            0x100,
            0x180,
            0x200,
            0x300,
            0x310,
            0x320,
            0x330,
            0x340,
            0x350,
            0x360,
            0x370,
            0x380,
            0x3E0,
        )
    ]
    with Chip(lib) as chip, Kvm(guest) as kvm:
        for offset, value in LAPIC_SAFE_WRITES:
            script = [("store", LAPIC + offset, value), *reads]
            assert chip.run(script) == kvm.run(script), hex(offset)


def test_kvm_ioapic_registers(lib, guest):
    script = [("store", IOAPIC, 0), ("store", IOAPIC + 16, 0xFFFFFFFF)]
    for index in (*range(0x45), 0xFF):
        script += [("store", IOAPIC, index), ("load", IOAPIC), ("load", IOAPIC + 16), ("load", IOAPIC + 32)]
    with Chip(lib) as chip, Kvm(guest) as kvm:
        assert chip.run(script) == kvm.run(script)
        assert chip.get_chip(2) == kvm.get_chip(2)


def test_kvm_x2apic_msrs(lib, guest):
    """Which MSRs fault, in both modes and at the transitions between them."""
    numbers = [n for n in range(0x800, 0x840) if n != 0x839]
    script = [
        ("rdmsr", 0x1B),
        *(("rdmsr", n) for n in numbers),
        ("wrmsr", 0x1B, BASE | 0x500),
        ("wrmsr", 0x1B, X2APIC | 0x100),
        ("rdmsr", 0x1B),
        *(("rdmsr", n) for n in numbers),
        ("wrmsr", 0x80F, 0x1FF),
        ("wrmsr", 0x80F, 1 << 32),
        ("wrmsr", 0x83F, 0x41),
        ("wrmsr", 0x83F, 0x141),
        ("wrmsr", 0x802, 0),
        ("wrmsr", 0x828, 1),
        ("wrmsr", 0x828, 0),
        ("wrmsr", 0x830, 5 << 32 | 0x4055),
        ("rdmsr", 0x830),
        ("rdmsr", 0x822),
        ("wrmsr", 0x1B, ENABLED | 0x100),
        ("wrmsr", 0x1B, BASE | 0x100),
        ("wrmsr", 0x1B, X2APIC | 0x100),
        ("rdmsr", 0x1B),
    ]
    with Chip(lib) as chip, Kvm(guest) as kvm:
        ours, theirs = chip.run(script), kvm.run(script)
        for row, mine, other in zip(script, ours, theirs, strict=True):
            assert mine == other, (row, mine, other)


PIT_SCRIPTS = {
    "words": [("outb", 0x43, 0x34), ("outb", 0x40, 0x34), ("outb", 0x40, 0x12)],
    "half a word": [("outb", 0x43, 0x74), ("outb", 0x41, 0x34)],
    "low byte": [("outb", 0x43, 0x14), ("outb", 0x40, 0)],
    "high byte": [("outb", 0x43, 0xA6), ("outb", 0x42, 0x12)],
    "mode 6 is 2, 7 is 3": [("outb", 0x43, 0x3C), ("outb", 0x43, 0x7E)],
    "gate, speaker": [("outb", 0x61, 3)],
    "bcd": [("outb", 0x43, 0x31), ("outb", 0x40, 0x99), ("outb", 0x40, 0x99)],
    "half a read": [("outb", 0x43, 0x34), ("outb", 0x40, 0x34), ("outb", 0x40, 0x12), ("inb", 0x40)],
    "half of a latch": [
        ("outb", 0x43, 0xB0),
        ("outb", 0x42, 1),
        ("outb", 0x42, 0),
        ("outb", 0x43, 0x80),
        ("inb", 0x42),
    ],
}


@pytest.mark.parametrize("name", PIT_SCRIPTS)
def test_kvm_pit_state(lib, guest, name):
    with Chip(lib) as chip, Kvm(guest) as kvm:
        chip.run(PIT_SCRIPTS[name])
        kvm.run(PIT_SCRIPTS[name])
        ours, theirs = pit_state(chip.get_pit()), pit_state(kvm.get_pit())
        for channel in (*ours[0], *theirs[0]):
            channel.pop("count_load_time")
            channel.pop("latched_count")
        assert ours == theirs


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_kvm_pit_counts(lib, guest, mode):
    """Channel 2 counts on KVM as here; KVM's load time and the times around the latch are CLOCK_MONOTONIC."""
    with Kvm(guest) as kvm:
        kvm.run([("outb", 0x61, 1), ("outb", 0x43, 0xB0 | mode << 1), ("outb", 0x42, 0), ("outb", 0x42, 0)])
        before = clock()
        kvm.run([("outb", 0x43, 0x80)])
        after = clock()
        channel = pit_state(kvm.get_pit())[0][2]
    with Chip(lib) as chip:
        chip.run([("outb", 0x61, 1)])
        program(chip, 2, mode, 0)
        chip.advance(before - channel["count_load_time"])
        first = latch(chip, 2)
    # KVM's count is at most as many steps on as ticks passed in between, give or take the one under way.
    per_tick = 2 if mode == 3 else 1
    steps = ((after - before) * TICKS // 10**9 + 1) * per_tick
    assert (first - channel["latched_count"]) % 65536 <= steps


def clock():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


@pytest.mark.parametrize("seed", range(4))
def test_kvm_state_moves_both_ways(lib, guest, seed):
    """A worked-on state of each loads in the other and reads back as it was."""
    with Chip(lib, 4) as chip, Kvm(guest, 4) as kvm, Chip(lib, 4) as other, Kvm(guest, 4) as target:
        rng = random.Random(seed)
        for engine in (chip, kvm):
            engine.run(INIT_PICS + ENABLE_LAPIC)
        for _ in range(60):
            for op, *arguments in apic_steps(rng):
                if op != "accept":
                    step(chip, op, arguments)
                    step(kvm, op, arguments)
        for source, destination in ((kvm, other), (chip, target)):
            for cpu in range(4):
                assert destination.set_lapic(source.get_lapic(cpu), cpu) == 0
            for which in (0, 1):
                assert destination.set_chip(which, source.get_chip(which)) == 0
            assert destination.set_pit(source.get_pit(), restart=True) == 0
            pits = [pit_state(engine.get_pit())[0] for engine in (source, destination)]
            for channel in (*pits[0], *pits[1]):
                channel.pop("count_load_time")
            assert pits[0] == pits[1]
            assert all_states(source)[:2] == all_states(destination)[:2]
            for mine, moved in zip(all_states(source)[3], all_states(destination)[3], strict=True):
                assert {k: v for k, v in mine.items() if k != 0xA0} == {
                    k: v for k, v in moved.items() if k != 0xA0
                }
            assert destination.set_chip(2, source.get_chip(2)) == 0
            assert all_states(source)[2] == all_states(destination)[2]
