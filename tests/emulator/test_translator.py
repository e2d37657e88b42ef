"""Host code against the interpreter: loops of random instructions, in runs of random lengths, end with the same state.

VMFS_JIT_THRESHOLD=0 translates each block before it first runs, VMFS_JIT_SEED cuts regions at random places.
VMFS_LOOPS=2000 for a long run, VMFS_SEED for another one.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from vmfs.engine.base import Vcpu  # noqa: E402
from vmfs.engine.emulator.engine import EmulatorEngine  # noqa: E402
from vmfs.memory.ram import Memory  # noqa: E402
from vmfs.words.modes import set_mode  # noqa: E402
from vmfs.words.registers import read_register, write_registers  # noqa: E402

LOOPS = int(os.environ.get("VMFS_LOOPS", "60"))
SEED = int(os.environ.get("VMFS_SEED", "1"))
RAM = 1 << 20
CODE, DATA, COUNTER, STACK = 0x1000, 0x8000, 0xC000, 0x20000
TIMES, STOPS = 60, 300
INTERPRETED = {"VMFS_NO_JIT": "1"}
WAYS = ({"VMFS_JIT_THRESHOLD": "0"}, {"VMFS_JIT_THRESHOLD": "3"}, {"VMFS_JIT_THRESHOLD": "0", "VMFS_JIT_SEED": "5"})


def go_by(way: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines made from now on execute that way: these words in the environment, and no other of the translator's."""
    for name in ("VMFS_NO_JIT", "VMFS_JIT_THRESHOLD", "VMFS_JIT_SEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in way.items():
        monkeypatch.setenv(name, value)


# PADDD PXOR MOVDQA PADDQ COMISD; MOVUPS ADDPS SHUFPS; MOVDQU MOVSS; MULSD MOVSD; both ways where there are two
VECTORS = (
    *((b"\x66", bytes([0x0F, opcode])) for opcode in (0xFE, 0xEF, 0x6F, 0x7F, 0xD4, 0x2F)),
    *((b"", bytes([0x0F, opcode])) for opcode in (0x10, 0x11, 0x58, 0xC6)),
    *((b"\xf3", bytes([0x0F, opcode])) for opcode in (0x6F, 0x7F, 0x10)),
    *((b"\xf2", bytes([0x0F, opcode])) for opcode in (0x59, 0x11)),
)


# map, pp, opcode: ANDN BEXTR BZHI PDEP PEXT MULX, SHLX SARX SHRX BLSR (BLSMSK BLSI) RORX; and
# VPADDD VPXOR VPSHUFB VADDPS VPERM2F128 VPSLLD VMOVDQU VMOVDQU VADDSD VMOVD VPMOVZXBW VEXTRACTI128 VZEROUPPER VPTEST
BMI = (
    *((2, 0, 0xF2), (2, 0, 0xF7), (2, 0, 0xF5), (2, 3, 0xF5), (2, 2, 0xF5), (2, 3, 0xF6)),
    *((2, 1, 0xF7), (2, 2, 0xF7), (2, 3, 0xF7), (2, 0, 0xF3), (3, 3, 0xF0)),
)
AVX = (
    *((1, 1, 0xFE), (1, 1, 0xEF), (2, 1, 0x00), (1, 0, 0x58), (3, 1, 0x06), (1, 1, 0xF2), (1, 2, 0x6F), (1, 2, 0x7F)),
    *((1, 3, 0x58), (1, 1, 0x6E), (2, 1, 0x30), (3, 1, 0x39), (1, 0, 0x77), (2, 1, 0x17)),
)
HAS_AVX2 = {"avx2", "bmi1", "bmi2", "adx"} <= set(
    Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
)


class Body:
    """Instructions that fault only where they are to. Memory is at EBP, 64 KiB of which the loop does not run in."""

    def __init__(self, rng: random.Random, wide: bool) -> None:
        self._rng, self._wide = rng, wide
        self._registers = [0, 1, 2, 3, 6, 7] + (list(range(8, 16)) if wide else [])

    def register(self) -> int:
        return self._rng.choice(self._registers)

    def encode(
        self, opcode: bytes, reg: int, *, byte: bool = False, prefix: bytes = b"", vector: bool = False
    ) -> bytes:
        """With a register or memory as r/m. `reg` is a register or a digit."""
        rng = self._rng
        segment = b""
        rex = 0x48 if self._wide and not vector and rng.randrange(2) else 0x40 if self._wide and rng.randrange(2) else 0
        size = b"\x66" if not byte and not vector and not rex & 8 and rng.randrange(6) == 0 else b""
        if rng.randrange(3) == 0 and opcode != b"\x8d":
            disp = rng.randrange(-128, 128) & (-16 if vector and rng.randrange(8) else -1)
            rex |= reg >> 3 << 2
            modrm = bytes([0x45 | (reg & 7) << 3, disp & 0xFF])  # [ebp + disp8]
            segment = rng.choice((b"", b"", b"", b"\x64", b"\x65")) if self._wide else b""  # their bases: 64, 128
        else:
            rm = rng.randrange(16 if self._wide else 8) if vector else self.register()
            if byte and not rex and not rm >> 3 and not reg >> 3:
                rm &= 3  # AL to BL; AH to BH below
                rm |= rng.choice((0, 4))
            rex |= reg >> 3 << 2 | rm >> 3
            modrm = bytes([0xC0 | (reg & 7) << 3 | rm & 7])
        if rex and self._wide:
            rex |= 0x40
        return segment + size + prefix + (bytes([rex]) if rex else b"") + opcode + modrm

    def vex(self) -> bytes:
        """Of BMI or AVX, in 32-bit mode, too."""
        rng = self._rng
        vector = rng.randrange(2)
        space, pp, opcode = rng.choice(AVX if vector else BMI)
        if opcode == 0x77:
            return b"\xc5\xf8\x77"
        count = 16 if self._wide else 8
        registers = list(range(count)) if vector else self._registers
        reg, third = rng.choice(registers), rng.choice(registers)
        long = vector and (opcode in (0x06, 0x39) or (opcode != 0x6E and rng.randrange(2)))
        if opcode in (0x6F, 0x7F, 0x6E, 0x30, 0x39, 0x17) or (not vector and opcode == 0xF0):
            third = 0
        if (pp, opcode) == (3, 0xF6) and rng.randrange(2):  # MULX, both halves to one
            third = reg
        if not vector and opcode == 0xF3:
            reg = rng.randrange(1, 4)
        wide = not vector and self._wide and rng.randrange(2)
        rm = self.register() if not vector or opcode == 0x6E else rng.randrange(count)
        memory = rng.randrange(3) == 0
        modrm = bytes([0x45 | (reg & 7) << 3, rng.randrange(256)] if memory else [0xC0 | (reg & 7) << 3 | rm & 7])
        first = (reg >> 3 ^ 1) << 7 | 0x40 | ((0 if memory else rm >> 3) ^ 1) << 5 | space
        second = wide << 7 | (~third & 15) << 3 | long << 2 | pp
        code = bytes([0xC4, first, second, opcode]) + modrm
        return code + (bytes([rng.randrange(256)]) if space == 3 else b"")

    def run(self) -> bytes:
        """Accesses off one register in a row, over the border of a page often: stack elements, or moves at EBP."""
        rng = self._rng
        count = rng.randrange(2, 7)
        if rng.randrange(2):
            pops = [0x58 | rng.choice((0, 1, 2, 3, 6, 7)) for _ in range(count)]
            code = bytes(0x50 | rng.randrange(8) for _ in range(count))
            if rng.randrange(2):  # the stack lies over the border of a page meanwhile
                by = rng.randrange(0x1000 - 64, 0x1000 + 64)
                rex = b"\x48" if self._wide else b""
                aside = rex + b"\x8d\xa4\x24" + struct.pack("<i", -by)  # LEA rSP, [rSP - by]: keeps the flags
                code = aside + code + bytes(pops) + rex + b"\x8d\xa4\x24" + struct.pack("<i", by)
                return code
            return code + bytes(pops)
        rex = b"\x48" if self._wide else b""
        if rng.randrange(4) == 0:  # the register is loaded in the middle
            # LEA rCX, [rBP+64]; MOV [rBP+8], rCX; MOV rSI, rBP; MOV rAX, [rSI]; MOV rSI, [rSI+8]; MOV rDX, [rSI+4]
            parts = (b"\x8d\x4d\x40", b"\x89\x4d\x08", b"\x89\xee", b"\x8b\x06", b"\x8b\x76\x08", b"\x8b\x56\x04")
            return b"".join(rex + part for part in parts)
        code = b""
        for _ in range(count):
            reg, rex = self.register(), 0
            if self._wide:
                rex = 0x40 | rng.randrange(2) << 3 | reg >> 3 << 2
            modrm = bytes([0x45 | (reg & 7) << 3, rng.randrange(-40, 40) & 0xFF])
            code += (bytes([rex]) if rex else b"") + rng.choice((b"\x89", b"\x8b")) + modrm
        return code

    def lea(self) -> bytes:
        """Of all that an address may have; the destination is often a part of it."""
        rng, reg = self._rng, self.register()
        base, index = (rng.choice([*self._registers, 4, reg, reg, reg]) for _ in range(2))
        rex = 0x40 | rng.choice((0, 8)) | reg >> 3 << 2 | index >> 3 << 1 | base >> 3
        narrow = b"\x67" if self._wide and rng.randrange(4) == 0 else b""
        code = narrow + (bytes([rex]) if self._wide else b"") + bytes([0x8D, 0x44 | (reg & 7) << 3])
        return code + bytes([rng.randrange(4) << 6 | (index & 7) << 3 | base & 7, rng.randrange(256)])

    def table(self) -> bytes:
        """An element by an index that is bounded, in one page or over a border; or by one that is not any more."""
        rng, reg = self._rng, self.register()
        index = rng.choice([one for one in self._registers if one != reg and one & 7 != 4])
        rex = 0x40 if self._wide else 0
        two = bytes([rex | index >> 3]) if rex else b""
        reach = bytes([rex | index >> 3 << 2]) if rex else b""
        of = bytes([0xC0 | index & 7])
        bound = rng.choice(
            (
                reach + bytes([0x0F, 0xB6, 0xC3 | (index & 7) << 3]),  # MOVZX, BL
                two + b"\x83" + bytes([of[0] | 0x20, rng.randrange(128)]),  # AND
                two + b"\x81" + bytes([of[0] | 0x20]) + struct.pack("<I", rng.randrange(256)),
                two + b"\xc1" + bytes([of[0] | 0x28, rng.randrange(24, 32)]),  # SHR
            )
        )
        if rng.randrange(3) == 0:  # LEA index, [index + 1000]
            both = bytes([rex | index >> 3 << 2 | index >> 3]) if rex else b""
            bound += both + b"\x8d" + bytes([0x80 | (index & 7) << 3 | index & 7]) + struct.pack("<I", 1000)
        scale = rng.randrange(4)
        at = rng.choice((DATA - 256, DATA, DATA - 256 * (1 << scale) - rng.randrange(8), DATA - 255 * (1 << scale)))
        wide = rex | rng.choice((0, 8)) | reg >> 3 << 2 | index >> 3 << 1 if rex else 0
        code = (bytes([wide]) if rex else b"") + bytes([rng.choice((0x89, 0x8B, 0x01, 0x33, 0x3B)), (reg & 7) << 3 | 4])
        plain = bytes([scale << 6 | (index & 7) << 3 | 5]) if rng.randrange(4) else b"\x25"  # no index
        return bound + code + plain + struct.pack("<I", at)

    def mulx(self) -> bytes:
        """Of RDX and RAX, both halves to one register."""
        reg = self.register()
        return bytes([0xC4, (reg >> 3 ^ 1) << 7 | 0x62, 0x83 | (~reg & 15) << 3, 0xF6, 0xC0 | (reg & 7) << 3])

    def of_zero(self) -> bytes:
        """XOR of a register with itself, and BSF or BSR of it, which keep what they would write."""
        source, reg = self.register(), self.register()
        wide = self._rng.choice((0x40, 0x48))
        code = b""
        for opcode, by in ((b"\x31", source), (self._rng.choice((b"\x0f\xbc", b"\x0f\xbd")), reg)):
            rex = bytes([wide | by >> 3 << 2 | source >> 3]) if self._wide else b""
            code += rex + opcode + bytes([0xC0 | (by & 7) << 3 | source & 7])
        return code

    def chain(self) -> bytes:
        """Of the registers that have none of the host's, one instruction after the other."""
        few = Body(self._rng, self._wide)
        few._registers = [12, 13, 14, 15]
        return b"".join(few.instruction() for _ in range(self._rng.randrange(2, 8)))

    def instruction(self) -> bytes:
        rng = self._rng
        reg = self.register()
        kind = rng.randrange(31 if HAS_AVX2 else 27)
        if kind < 6:
            operation = rng.randrange(8)
            byte = rng.randrange(3) == 0
            if byte and not self._wide or byte and reg < 4:
                reg &= 3
            form = rng.choice((0, 2)) + (not byte)
            return self.encode(bytes([operation * 8 + form]), reg, byte=byte)
        if kind == 6:
            return self.encode(b"\x83", rng.randrange(8)) + bytes([rng.randrange(256)])
        if kind == 7:
            return self.encode(rng.choice((b"\x88", b"\x8a")), reg & 3, byte=True)
        if kind == 8:
            return self.encode(rng.choice((b"\x89", b"\x8b", b"\x87", b"\x85")), reg)
        if kind == 9:  # shifts and rotations by a constant, one, CL
            digit = rng.choice((0, 1, 2, 3, 4, 5, 7))
            which = rng.randrange(3)
            return self.encode((b"\xc1", b"\xd1", b"\xd3")[which], digit) + (
                bytes([rng.randrange(40)]) if not which else b""
            )
        if kind == 10:
            return self.encode(b"\xff", rng.randrange(2))
        if kind == 11:
            return self.encode(b"\xf7", rng.choice((2, 3, 4, 5)))
        if kind == 12:
            return self.encode(b"\x0f" + bytes([0x40 + rng.randrange(16)]), reg)
        if kind == 13:
            return self.encode(b"\x0f" + bytes([0x90 + rng.randrange(16)]), 0, byte=True)
        if kind == 14:
            return self.encode(b"\x0f" + rng.choice((b"\xb6", b"\xb7", b"\xbe", b"\xbf", b"\xaf")), reg)
        if kind == 15:
            if rng.randrange(3) == 0:
                return self.of_zero()
            return self.encode(b"\x0f" + rng.choice((b"\xbc", b"\xbd", b"\xc1", b"\xb1")), reg)
        if kind == 16:
            return self.encode(b"\x0f\xba", rng.choice((4, 5, 6, 7))) + bytes([rng.randrange(256)])
        if kind == 17:
            return self.encode(b"\x0f" + rng.choice((b"\xa4", b"\xac")), reg) + bytes([rng.randrange(16)])
        if kind == 18:
            return b"\x9c" + bytes([0x58 | rng.choice((0, 1, 2, 3, 6, 7))])  # PUSHF, POP: all flags, undefined ones too
        if kind == 19:
            return bytes([0x50 | rng.randrange(8), 0x58 | rng.choice((0, 1, 2, 3, 6, 7))])
        if kind == 20 and rng.randrange(2):
            return self.run()
        if kind == 20:
            return bytes([0x70 | rng.randrange(16), 0x00]) + rng.choice((b"", b"\xf5", b"\xf8", b"\xf9"))
        if kind == 21:  # over an instruction
            skipped = self.instruction()
            return bytes([0x70 | rng.randrange(16), len(skipped)]) + skipped
        if kind == 23 and self._wide:
            return self.chain()
        if kind == 22 and rng.randrange(2):
            return self.table()
        if kind == 24:
            return b"".join(self.lea() for _ in range(4)) + (self.mulx() if HAS_AVX2 else b"")
        if kind == 25:  # DIV, IDIV, after CDQ or XOR EDX,EDX, by something that is not zero; JCXZ
            if rng.randrange(4) == 0:
                skipped = self.instruction()
                return b"\xe3" + bytes([len(skipped)]) + skipped
            rex = rng.choice((b"", b"\x48")) if self._wide else b""
            signed = rng.randrange(2)
            divisor = b"\x83\xc9" + bytes([rng.choice((1, 3, 0xFF, 0x7F))])  # OR ECX
            high = rng.choice((rex + b"\x99", b"\x31\xd2"))
            by = b"\xf7" + bytes([0xF1 | signed << 3]) if rng.randrange(2) else b"\xf7\x75\x10"
            return divisor + high + rex + by
        if kind == 26:  # CMPXCHG8B, CRC32, MOVBE, CLI
            rex = rng.choice((b"", b"\x48")) if self._wide else b""
            return rng.choice(
                (
                    rex + b"\x0f\xc7\x4d" + bytes([rng.randrange(16) * 8]),
                    b"\xf2\x0f\x38\xf1\xc1",
                    b"\x0f\x38\xf0\x45\x08",
                    b"\x66\x0f\x38\xf1\x45\x09",
                    b"\xfa",
                )
            )
        if kind in (27, 28):  # ADCX, ADOX: CF and OF in turn
            codes = []
            for prefix in rng.choice(((0x66, 0xF3), (0xF3, 0x66), (0x66,), (0xF3,))):
                rex = bytes([rng.choice((0x40, 0x48))]) if self._wide else b""
                memory = rng.randrange(2)
                rest = [0x45 | (reg & 7) << 3, rng.randrange(256)] if memory else [0xC0 | (reg & 7) << 3]
                codes.append(bytes([prefix]) + rex + b"\x0f\x38\xf6" + bytes(rest))
            return b"".join(codes)
        if kind in (29, 30):
            return self.vex()
        prefix, opcode = rng.choice(VECTORS)
        code = self.encode(opcode, rng.randrange(16 if self._wide else 8), prefix=prefix, vector=True)
        return code + (bytes([rng.randrange(256)]) if opcode == b"\x0f\xc6" else b"")


def program(rng: random.Random, wide: bool, changes_itself: bool = False) -> bytes:
    """The loop, TIMES times, then HLT. A call in it, too. It may change an instruction of its own in each round."""
    body = Body(rng, wide)
    code = b"".join(body.instruction() for _ in range(rng.randrange(1, 40)))
    inner = b"".join(body.instruction() for _ in range(rng.randrange(4))) + b"\xc3"
    over = b"\xe9" + struct.pack("<i", len(inner))
    entry = over + inner
    if changes_itself:  # INC byte of the constant of ADD EAX
        code = b"\xfe\x04\x25" + struct.pack("<I", CODE + len(entry) + 9) + b"\x83\xc0\x11" + code
    calls = b"\xe8" + struct.pack("<i", -(len(code) + 5 + len(inner)))
    loop = code + calls
    counter = b"\xff\x0c\x25" if wide else b"\xff\x0d"
    loop += counter + struct.pack("<I", COUNTER)  # DEC dword
    loop += b"\x0f\x85" + struct.pack("<i", -(len(loop) + 6))
    return entry + loop + b"\xf4"


TABLES, IDT, HANDLERS, COUNTS, VECTOR = 0x40000, 0x2000, 0x3000, 0xC100, 0x40
PAGES = (0x7000, 0x8000)  # where the data lies


def _absolute(code: str, address: int, constant: bytes = b"") -> bytes:
    return bytes.fromhex(code) + struct.pack("<I", address) + constant


def set_up_events(cpu, memory) -> None:
    """Page tables of 4 KiB pages and an IDT. The interrupt takes the pages of the data away, the page fault brings them
    back; every other exception halts."""
    entries = {page: TABLES + 0x3000 + page // 4096 * 8 for page in PAGES}
    flush = b"".join(_absolute("0f013c25", page) for page in PAGES)  # INVLPG
    bring = b"".join(_absolute("c70425", at, struct.pack("<I", page | 3)) for page, at in entries.items())
    take = b"".join(_absolute("832425", at, b"\xfe") for at in entries.values())  # AND dword
    for level in range(3):
        memory.write(TABLES + level * 0x1000, struct.pack("<Q", TABLES + (level + 1) * 0x1000 | 3))
    memory.write(TABLES + 0x3000, struct.pack("<512Q", *(page * 4096 | 3 for page in range(512))))
    memory.write(HANDLERS, b"\xff\x04\x25" + struct.pack("<I", COUNTS) + bring + flush + bytes.fromhex("4883c40848cf"))
    memory.write(HANDLERS + 0x100, b"\xff\x04\x25" + struct.pack("<I", COUNTS + 4) + take + flush + b"\x48\xcf")
    memory.write(HANDLERS + 0x200, b"\xf4")
    selector = int(read_register(cpu, "cs"), 0)
    for vector in range(256):
        at = HANDLERS + {14: 0, VECTOR: 0x100}.get(vector, 0x200)
        memory.write(IDT + vector * 16, struct.pack("<HHHHII", at, selector, 0x8E00, 0, 0, 0))
    write_registers(cpu, {"cr3": TABLES, "idtr.base": IDT, "idtr.limit": 0xFFF, "rflags": 0x202})


def result(
    code: bytes,
    wide: bool,
    state: int,
    way: dict[str, str],
    budgets: random.Random | None,
    monkeypatch,
    events: random.Random | None = None,
) -> tuple:
    """Registers, vectors, memory, exit, instructions; and what the CPU counted. `events`: between two stops, whose
    registers are there, too, interrupts come, which change page tables."""
    go_by(way, monkeypatch)
    rng = random.Random(state)
    memory = Memory(RAM)
    machine = EmulatorEngine().create_machine()
    try:
        machine.map_memory(0, 0, memory.fd, 0, RAM)
        cpu = machine.create_vcpu(0)
        set_mode(cpu, memory, RAM, "long" if wide else "protected")
        if HAS_AVX2:  # what a kernel does: CR4.OSXSAVE, XCR0
            write_registers(cpu, {"cr4": int(read_register(cpu, "cr4"), 0) | 1 << 9 | 1 << 18, "xcr0": 7})
        if wide:
            write_registers(cpu, {"fs.base": 64, "gs.base": 128})
        memory.write(CODE, code)
        memory.write(DATA - 256, rng.randbytes(768))
        memory.write(COUNTER, struct.pack("<I", TIMES))
        names = "rax rcx rdx rbx rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()[: None if wide else 6]
        values = {name: rng.getrandbits(rng.choice((8, 32, 64 if wide else 32))) for name in names}
        write_registers(cpu, {**values, "rip": CODE, "rsp": STACK, "rbp": DATA})
        if events:
            set_up_events(cpu, memory)
        stops = []
        while True:
            exit_ = cpu.run(budget=budgets.randrange(1, 200) if budgets else -1)
            if events:
                stops.append(cpu.get_state("regs"))
                if events.randrange(2) and not cpu.interrupts_queued:
                    cpu.interrupt(VECTOR)
            if exit_.REASON != "limit" or len(stops) > STOPS:
                break
        fpu = cpu.get_state("xsave")
        counters = cpu.counters()
        return (
            exit_.line(),
            cpu.get_state("regs"),
            fpu,
            memory.read(DATA - 256, 768),
            memory.read(STACK - 128, 128) + memory.read(COUNTS, 8),  # frames of events, with their flags
            stops,
            counters["instructions"],
            counters,
        )
    finally:
        machine.close()
        memory.close()


@pytest.mark.parametrize("wide", [True, False], ids=["64-bit", "32-bit"])
def test_loops(wide, monkeypatch):
    for number in range(LOOPS):
        rng = random.Random(SEED * 100_000 + number)
        code = program(rng, wide)
        expected = result(code, wide, number, INTERPRETED, None, monkeypatch)
        for way in WAYS:
            budgets = random.Random(number) if rng.randrange(2) else None
            found = result(code, wide, number, way, budgets, monkeypatch)
            assert found[:-1] == expected[:-1], f"loop {number}, {way}, budgets {budgets is not None}: {code.hex()}"


def test_events(monkeypatch):
    """Interrupts at any boundary, faults in the middle of regions, page tables and code that change."""
    counts = [0, 0]
    for number in range(LOOPS):
        rng = random.Random(SEED * 100_000 + 50_000 + number)
        code = program(rng, True, changes_itself=number % 4 == 0)

        def run(way, number=number, code=code):
            return result(code, True, number, way, random.Random(number), monkeypatch, random.Random(number))

        expected = run(INTERPRETED)
        for way in WAYS:
            found = run(way)
            assert found[:-1] == expected[:-1], f"loop {number}, {way}: {code.hex()}"
        counts = [a + b for a, b in zip(counts, struct.unpack("<2I", expected[4][-8:]), strict=True)]
    assert min(counts) > LOOPS, "page faults and interrupts came"


def test_it_translates(monkeypatch):
    """Without a word in the environment a hot loop becomes host code; with VMFS_NO_JIT it does not."""
    code = b"\xff\xc0\xff\x0c\x25" + struct.pack("<I", COUNTER) + b"\x75\xf5\xf4"
    counters = result(code, True, 1, {}, None, monkeypatch)[-1]
    assert counters["regions"] == 1
    assert 0 < counters["instructions_translated"] < counters["instructions"]
    counters = result(code, True, 1, INTERPRETED, None, monkeypatch)[-1]
    assert (counters["regions"], counters["instructions_translated"]) == (0, 0)
    counters = result(code, True, 1, {"VMFS_JIT_THRESHOLD": "0"}, None, monkeypatch)[-1]
    assert 0 < counters["instructions"] - counters["instructions_translated"] < 5  # the last round, and HLT


def test_what_a_handler_has_loaded_is_the_next_operand(monkeypatch):
    """R12 to R15 are in memory. A load of one leaves it in a scratch register, too, which the next instruction takes;
    where a handler has done the load, here because it runs over the end of a page, it has to be there as well."""
    loads = (b"\x4c\x8b", b"\x44\x8b", b"\x4c\x03", b"\x4c\x0f\xb7", b"\x4c\x33")  # MOV, ADD, MOVZX, XOR
    code = b""
    for number in range(12, 16):
        for load in loads:
            code += load + bytes([0x45 | (number & 7) << 3, 0xFF])  # ..., [RBP-1]
            code += b"\x4c\x01" + bytes([0xC0 | (number & 7) << 3])  # ADD RAX
            code += load + bytes([0x45 | (number & 7) << 3, 0xFF])
            code += b"\x4d\x01" + bytes([0xC0 | (number & 7) << 3 | (number + 1) & 3 | 4])  # ADD another of the four
    code += b"\xff\x0c\x25" + struct.pack("<I", COUNTER)
    code += b"\x0f\x85" + struct.pack("<i", -(len(code) + 6)) + b"\xf4"
    expected = result(code, True, 1, INTERPRETED, None, monkeypatch)
    for way in WAYS:
        found = result(code, True, 1, way, None, monkeypatch)
        assert found[:-1] == expected[:-1], way
        assert found[-1]["instructions_translated"]


def test_a_block_of_a_region_changes(monkeypatch):
    """Three blocks, jumps between them, in lines of their own. The third changes the second, and goes on as another
    block: the region is entered again by the first, from which it is one jump to the second."""
    first = b"\x83\xc0\x01\xe9" + struct.pack("<i", 128 - 8)  # ADD EAX, 1; JMP
    second = b"\x83\xc3\x11\xe9" + struct.pack("<i", 128 - 8)  # ADD EBX, 11h; JMP
    third = b"\xfe\x04\x25" + struct.pack("<I", CODE + 128 + 2)  # INC byte of that 11h
    third += b"\xff\x0c\x25" + struct.pack("<I", COUNTER)
    third += b"\x0f\x85" + struct.pack("<i", -(256 + len(third) + 6)) + b"\xf4"
    code = first.ljust(128, b"\x90") + second.ljust(128, b"\x90") + third
    expected = result(code, True, 1, INTERPRETED, None, monkeypatch)
    for way in WAYS:
        assert result(code, True, 1, way, None, monkeypatch)[:-1] == expected[:-1], way


ELSEWHERE = 0x50000  # where the page after that of DATA lies


@contextmanager
def two_pages(
    way: dict[str, str], code: str, registers: dict[str, int], monkeypatch, more: dict[int, bytes] | None = None
) -> Iterator[tuple[Vcpu, Memory]]:
    """Bytes 0 to 255 again and again in the page of DATA, 255 to 0 in the one after it, which is elsewhere, and zeros
    in what lies behind DATA's page in the host; when the code has run to its HLT."""
    go_by(way, monkeypatch)
    memory = Memory(RAM)
    machine = EmulatorEngine().create_machine()
    try:
        machine.map_memory(0, 0, memory.fd, 0, RAM)
        cpu = machine.create_vcpu(0)
        set_mode(cpu, memory, RAM, "long")
        set_up_events(cpu, memory)
        memory.write(TABLES + 0x3000 + (DATA // 4096 + 1) * 8, struct.pack("<Q", ELSEWHERE | 3))
        memory.write(DATA, bytes(range(256)) * 16)
        memory.write(ELSEWHERE, bytes(range(255, -1, -1)) * 16)
        memory.write(CODE, bytes.fromhex(code))
        for address, data in (more or {}).items():
            memory.write(address, data)
        write_registers(cpu, {"rip": CODE, "rax": 0, "rbx": 0, "rsp": STACK, **registers})
        assert cpu.run().REASON == "hlt"
        yield cpu, memory
    finally:
        machine.close()
        memory.close()


def test_an_index_beyond_its_bound_is_of_another_page(monkeypatch):
    """A table lies in one page while its index is a byte; with more added to that, in the next, which is elsewhere."""
    # MOVZX ECX, BL; LEA ECX, [RCX+1000]; ADD EAX, [RCX*4+DATA]; INC EBX; DEC EDX; JNZ; HLT
    code = "0fb6cb 8d89e8030000 03048d" + struct.pack("<I", DATA).hex() + "ffc3 ffca 75ea f4"
    values = struct.unpack("<2048I", bytes(range(256)) * 16 + bytes(range(255, -1, -1)) * 16)
    for way in (INTERPRETED, *WAYS[:2]):
        with two_pages(way, code, {"rdx": 256}, monkeypatch) as (cpu, _):
            assert int(read_register(cpu, "rax"), 0) == sum(values[1000:1256]) & 0xFFFFFFFF, way


@pytest.mark.parametrize("place", ["before it", "at the end of the block"])
def test_a_float_with_unmasked_exceptions_is_a_handlers_alone(place, monkeypatch):
    """What is asked of it says so, and is asked of nothing else: of what bounds an index, and of a block's last."""
    adds = "0f58c0"  # ADDPS XMM0, XMM0, of zeros
    # MOVZX ECX, BL; ADD EAX, [RCX*4+DATA]; INC EBX
    body = "0fb6cb" + (adds if place == "before it" else "") + "03048d" + struct.pack("<I", DATA).hex() + "ffc3"
    if place != "before it":  # 32 instructions are a block
        body += "90" * 28 + adds
    body += "ffca"  # DEC EDX; JNZ; HLT
    start = "0fae1425" + struct.pack("<I", COUNTER).hex()  # LDMXCSR of zero
    code = start + body + "75" + bytes([256 - len(bytes.fromhex(body)) - 2]).hex() + "f4"
    table = struct.unpack("<1024I", bytes(range(256)) * 16)
    for way in (INTERPRETED, *WAYS[:2]):
        with two_pages(way, code, {"rdx": 300}, monkeypatch) as (cpu, _):
            expected = sum(table[:256]) + sum(table[:44])
            assert int(read_register(cpu, "rax"), 0) == expected & 0xFFFFFFFF, way
            assert cpu.counters()["regions"] or way is INTERPRETED


ROWS = {  # some accesses off one register, of which a later one is in the next page
    "loads": "488b33 488b7b08",  # MOV RSI, [RBX]; MOV RDI, [RBX+8]
    "stores": "488903 48895308",  # MOV [RBX], RAX; MOV [RBX+8], RDX
    "both": "488b33 48895308",  # MOV RSI, [RBX]; MOV [RBX+8], RDX
    "pops": "4889dc 5e 5f",  # MOV RSP, RBX; POP RSI; POP RDI
    "pushes": "488d6310 50 52",  # LEA RSP, [RBX+16]; PUSH RAX; PUSH RDX
    # The same with others in between, whose flags are read after it, and with a register that goes on:
    # ADD RDX, [RBX]; ADC RAX, [RBX+8]
    "carried on": "480313 48134308",
    # MOV RSI, [RBX]; ADD RDX, RSI; MOV [RBX+8], RDX; ADC [RBX+16], RSI
    "loads and stores": "488b33 4801f2 48895308 48117310",
    # ADD RBX, 8; MOV RSI, [RBX-8]; LEA RDI, [RBX+4]; ADD RSI, [RDI-8]; SUB [RDI-4], RSI; LEA RBX, [RDI-12]
    "a register that goes on": "4883c308 488b73f8 488d7b04 480377f8 482977fc 488d5ff4",
    # MOVUPS XMM0, [RBX-8]; PADDD XMM0, [RBX+8]; MOVUPS [RBX+1], XMM0
    "vectors": "0f1043f8 660ffe4308 0f114301",
    # MOV RSI, [RBX+RAX*2]; SUB [RBX+RAX*2+8], RSI, where RAX is zero; XOR EAX, EAX
    "an index": "31c0 488b3443 4829744308",
    # PUSH RAX; MOV RSI, [RSP+8]; ADD RAX, RSI; POP RDX; ADC [RSP], RDX, off the top of the page
    "the stack": "488d6308 50 488b742408 4801f0 5a 48111424",
    # LEA RSP, [RBX-64]; MOV RSI, [RSP]; MOV RBP, RBX; LEAVE; POP RDI
    "a frame": "488d63c0 488b3424 4889dd c9 5f",
    # MOV RSI, [RBX]; SUB RBX, -8; ADD RSI, [RBX]; DEC RBX; ADD RSI, [RBX]; INC RBX; SUB RBX, 8; MOV [RBX+4], RSI
    "to and fro": "488b33 4883ebf8 480333 48ffcb 480333 48ffc3 4883eb08 48897304",
    # LEA RSP, [RBX-64]; PUSH RBX; POP RSP; MOV RSI, [RSP]
    "a stack that is popped": "488d63c0 53 5c 488b3424",
}


@pytest.mark.parametrize("inside", [0xFF8, 0x180], ids=["two pages", "one page"])
@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_accesses_goes_on_in_another_page(row, inside, monkeypatch):
    code = ROWS[row] + "ffc9"  # DEC ECX; JNZ; HLT
    code += "75" + bytes([256 - len(bytes.fromhex(code)) - 2]).hex() + "f4"
    found = []
    for way in (INTERPRETED, *WAYS[:2]):
        values = {"rax": 0x1122334455667788, "rdx": 0x99AABBCCDDEEFF00, "rcx": 10, "rbx": DATA + inside}
        with two_pages(way, code, values, monkeypatch) as (cpu, memory):
            seen = [cpu.get_state("regs"), *(memory.read(at, 4096) for at in (DATA, DATA + 4096, ELSEWHERE))]
            assert not any(seen[2]), "what lies behind the page in the host is not the guest's"
            found.append(seen)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("rdx", [0, 0x7FFFFFFFFFFFFFFF, 0xFEF8F7F6F5F4F3F2])
def test_a_fault_shows_the_flags_of_a_rotation_of_memory(rdx, monkeypatch):
    """CF and OF are its own, the others those of an addition before it, which only the fault's frame shows."""
    # MOV RSI, [RBX]; ADD RDX, RSI; MOV RDI, [RSP]; ROL dword [RBX+8], 3; ADD RDI, [RCX];
    # BSWAP RCX, to what is no address; JMP
    code = "488b33 4801f2 488b3c24 c1430803 480339 480fc9 ebea"
    found = []
    for way in (INTERPRETED, *WAYS[:2]):
        values = {"rdx": rdx, "rbx": DATA + 8, "rcx": DATA, "rax": 0x55}
        with two_pages(way, code, values, monkeypatch) as (cpu, memory):
            found.append((cpu.get_state("regs"), memory.read(STACK - 64, 64), memory.read(DATA, 64)))
            assert int(read_register(cpu, "rip"), 0) == HANDLERS + 0x201
    assert found[0] == found[1] == found[2]


def test_a_region_ends_when_a_handler_has_changed_its_code(monkeypatch):
    """Code lies in the page table, and a constant of it is the entry of DATA's page, in which a store sets the dirty
    bit: that is no store of the guest's, so the instruction does not run alone."""
    table = TABLES + 0x3000
    entry, start = table + DATA // 4096 * 8, table + 128
    user = b"\x48\x01\xc3\xff\xca\x0f\x85" + struct.pack("<i", start - (entry + 8 + 11)) + b"\xf4"
    # ADD RBX, RAX; DEC EDX; JNZ start; HLT, after MOV RAX, entry
    begin = b"\x8b\x0c\x25" + struct.pack("<I", DATA) + b"\x83\xfa\x05"  # MOV ECX, [DATA]; CMP EDX, 5
    begin += b"\x0f\x85" + struct.pack("<i", entry - 2 - (start + 16))  # JNZ user
    begin += b"\x89\x14\x25" + struct.pack("<I", DATA) + b"\xe9" + struct.pack("<i", entry - 2 - (start + 28))
    more = {entry - 2: b"\x48\xb8", entry + 8: user, start: begin}
    jump = "e9" + struct.pack("<i", start - (CODE + 5)).hex()
    clean, dirty = DATA | 0x23, DATA | 0x63
    for way in (INTERPRETED, *WAYS):
        with two_pages(way, jump, {"rdx": 20}, monkeypatch, more) as (cpu, _):
            assert int(read_register(cpu, "rbx"), 0) == 15 * clean + 5 * dirty, way
