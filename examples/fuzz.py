"""fuzz.py [SECONDS [SEED]]: find the bug that is planted in a parser of 1,300 lines of C, which runs as a guest without
an operating system, by coverage: no mount, no server, the machine is an object of this process.

A case is: go back to the snapshot, put an input into memory, run to the end or a bound, look at the exit. What comes to
jumps that no input before has taken is kept, and changed further.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmfs import Machine
from vmfs.words import exits

SOURCE = Path(__file__).parent / "guest/recipe.c"
CODE, STACK, INPUT, END = 0x10000, 0x40000, 0x50000, 0x8000
FLAGS = """-O1 -ffreestanding -fno-pic -fno-stack-protector -mno-red-zone -fcf-protection=none -ffunction-sections
    -fno-asynchronous-unwind-tables -mgeneral-regs-only -nostdlib -static -Wl,--build-id=none,--no-warn-rwx-segments"""
ROOM = 0x1000  # bytes of memory for an input
INSTRUCTIONS_MOST = 100_000
SEEDS = (
    b'a = 1 + 2 * 3\nb = "text\\n"\n',
    b'list = [1, "x", [2]]\nc = @list[0]\nd = #0 + #-4\nif @c > 0 { e = 0x10k } else { e = 2 }\n',
    b'rule twice(x) = @x * 2\nport : number 1..99 = twice(4)\nfor one in [1, 2] { last = @one }\n',
    b'when = 2026-11-30T14:05 + 1h30m\nfrom = 10.0.0.0/8\nok = not @from or match("a.c", "*.[a-c]") and @when\n',
    b'all = join(sort(split("b a", " ")), ",")\nf = format("%d %s", [7, cut(upper(@all), 1, 2)])\n',
)
WORDS = tuple(
    b'= [ ] # #- @ { } ( ) , : if else for in rule not and or number text .. " \\u 0x 4294967295 9999 k'.split()
)


def build() -> bytes:
    """The parser as a flat binary for CODE."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        (where / "link").write_text(
            f"SECTIONS {{ . = {CODE:#x}; .text : {{ *(.text.parse) *(.text* .rodata* .data*) }}"
            " .bss : { *(.bss* COMMON) } }"
        )
        subprocess.run(["gcc", *FLAGS.split(), "-T", where / "link", "-o", where / "elf", SOURCE], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", where / "elf", where / "flat"], check=True)
        return (where / "flat").read_bytes()


class Target:
    """The parser, called once a case."""

    def __init__(self) -> None:
        self.machine = m = Machine(memory={END: b"\xf4", CODE: 0x20000, STACK: 0x8000, INPUT: ROOM})
        m.mem[CODE:] = build()
        m.rip, m.rdi, m.rsp = CODE, INPUT, STACK + 0x8000 - 8
        m.mem[m.rsp :] = END.to_bytes(8, "little")  # where `parse` returns to
        self.coverage = m.coverage(1 << 12)
        self._start = m.snapshot()

    def run(self, text: bytes) -> exits.Exit:
        m = self.machine
        m.restore(self._start)
        m.mem[INPUT:] = text
        m.rsi = len(text)
        self.coverage[:] = bytes(len(self.coverage))
        return m.run(insns=INSTRUCTIONS_MOST)


def change(text: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes((rng.randrange(256),))
            case 1 | 2:
                data[at:at] = rng.choice(WORDS)
            case 3:
                del data[at : at + rng.randrange(1, 8)]
            case 4:
                data[at:at] = data[at : at + rng.randrange(1, 16)]
            case 5:
                other = rng.choice(corpus)
                begin = rng.randrange(len(other) + 1)
                data[at:at] = other[begin : begin + rng.randrange(1, 32)]
    return bytes(data[:ROOM])


def fuzz(seconds: float, seed: int) -> tuple[bytes, exits.Exit, int, int] | None:
    """The input that ends otherwise than by a return, its exit, how many cases it took, and how large the corpus is."""
    target, rng, corpus, seen, cases = Target(), random.Random(seed), list(SEEDS), 0, 0
    end = time.monotonic() + seconds
    for text in SEEDS:
        assert target.run(text).REASON == "hlt", target.machine.exit
        seen |= int.from_bytes(target.coverage, "little")
    while time.monotonic() < end:
        text = change(rng.choice(corpus), corpus, rng)
        found, cases = target.run(text), cases + 1
        if found.REASON not in ("hlt", "limit"):
            return text, found, cases, len(corpus)
        covered = int.from_bytes(target.coverage, "little")
        if covered | seen != seen:
            seen |= covered
            corpus.append(text)
    return None


def main() -> int:
    seconds, seed = float(sys.argv[1]) if len(sys.argv) > 1 else 60, int(sys.argv[2]) if len(sys.argv) > 2 else 1
    began = time.monotonic()
    found = fuzz(seconds, seed)
    if found is None:
        print(f"no bug found in {seconds:.0f} s")
        return 1
    text, exit_, cases, corpus = found
    took = time.monotonic() - began
    print(f"after {cases} cases in {took:.1f} s, {cases / took:.0f}/s, a corpus of {corpus}: {exit_.line()}")
    print(f"the input: {text!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
