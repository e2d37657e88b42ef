"""SeaBIOS, as Debian ships it, from the reset vector to the boot sector.

Real, 16- and 32-bit protected mode and back, interrupts of the timer, HLT, string input, BIOS calls. Budgets
are in instructions, so that a failure is the same each time.
"""

import pytest

pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator.seabios import IMAGES, SECTOR, Pc  # noqa: E402
from engine import asm  # noqa: E402

BUDGET = 20_000_000  # it takes about 8.5 million to the end, a minute of waiting in HLT included
NAMES = ("bios.bin", "bios-256k.bin")

# Reads the second sector of the disk by int 13h to 0x8000 and prints it at the debug port.
BOOT_SECTOR = """
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov bx, 0x8000
    mov ax, 0x0201
    mov cx, 0x0002
    xor dh, dh
    int 0x13
    jc stop
    mov si, 0x8000
    mov dx, 0x402
next: lodsb
    test al, al
    jz stop
    out dx, al
    jmp next
stop: jmp stop
"""


@pytest.fixture(params=NAMES)
def image(request):
    path = IMAGES / request.param
    if not path.exists():
        pytest.skip(f"{path} is missing: apt-get install seabios")
    return path.read_bytes()


@pytest.fixture
def power_on():
    pcs = []

    def make(image, disk=None):
        pcs.append(Pc(image, disk))
        return pcs[-1]

    yield make
    for pc in pcs:
        pc.close()


def test_without_a_disk_it_looks_everywhere_and_restarts(image, power_on):
    pc = power_on(image)
    assert pc.run(b"Rebooting.", BUDGET) is None, pc.printed.decode("latin-1")
    text = pc.printed.decode("ascii")
    for line in (
        "SeaBIOS (version ", "Found 1 cpu(s) max supported 1 cpu(s)", "RamSize: 0x01000000",
        "Press ESC for boot menu.",
        "Booting from Floppy...", "Booting from Hard Disk...",
        "No bootable device.  Retrying in 60 seconds.",
    ):
        assert line in text, text
    # 60 s are 1092 ticks of the timer, each an interrupt
    assert pc.cpu.counters()["interrupts"] > 1092


def test_the_same_start_is_the_same_run(image, power_on):
    """To the instruction, and whether it runs in one piece or in many."""
    first, second = power_on(image), power_on(image)
    end = b"Booting from Hard Disk..."
    assert first.run(end, BUDGET) is None
    budget = 0
    while end not in second.printed:
        budget += 99_991
        assert budget < BUDGET
        second.run(end, budget)
    assert second.printed == first.printed
    assert second.instructions == first.instructions
    assert second.cpu.get_state("regs") == first.cpu.get_state("regs")


def test_it_boots_from_a_disk(image, power_on):
    if missing := asm.missing_tools():
        pytest.skip(f"no {' and '.join(missing)}: install binutils")
    code = asm.assemble(BOOT_SECTOR, "real").code
    text = b"read by int 13h\n"
    disk = code.ljust(510, b"\0") + b"\x55\xaa" + text.ljust(SECTOR, b"\0") + bytes(2000 * SECTOR)
    pc = power_on(image, disk)
    assert pc.run(text, BUDGET) is None, pc.printed.decode("latin-1")
    printed = pc.printed.decode("ascii")
    assert "A DISK OF A TEST" in printed
    assert printed.endswith("Booting from 0000:7c00\n" + text.decode()), printed
    assert pc.ram[0x7C00 : 0x7C00 + SECTOR] == disk[:SECTOR]
    assert pc.ram[0x8000 : 0x8000 + SECTOR] == disk[SECTOR : 2 * SECTOR]
