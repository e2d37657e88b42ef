"""Port and memory-mapped accesses: sizes, directions, strings, with and without an answer."""

from engine.case import Answer, Case, Complete, Data, Feed, Memory, Regs, Run, RunLine, SetRegs
from engine.machine import MMIO

_ALL_ONES = (1 << 64) - 1
_RAX = 0x1122334455667788
_ACCUMULATOR = {1: "al", 2: "ax", 4: "eax", 8: "rax"}
_POINTER = {1: "byte", 2: "word", 4: "dword", 8: "qword"}


def _low(value: int, size: int) -> int:
    return value & (1 << 8 * size) - 1


def _insert(old: int, value: int, size: int) -> int:
    """A register after `size` bytes were written to it: 4 bytes zero the upper half (SDM 1 3.4.1.1)."""
    return value if size >= 4 else old & ~((1 << 8 * size) - 1) | value


def _out(mode: str, size: int) -> Case:
    acc = _ACCUMULATOR[size]
    value = _low(_RAX, size)
    data = value.to_bytes(size, "little")
    return Case(
        f"out-{size}-{mode}",
        mode,
        f"out dx, {acc}; l1: out 0x80, {acc}; l2: nop",
        (
            Run(f"io direction=out port=0xcfc size={size} count=1 data={value:#x} rip={{l1}}"),
            Data(data),
            Run(f"io direction=out port=0x80 size={size} count=1 data={value:#x} rip={{l2}}"),
            Data(data),
            Regs({"rip": "l2", "rax": _low(_RAX, 4) if mode in ("real", "protected") else _RAX}),
        ),
        regs={"rax": _low(_RAX, 4) if mode in ("real", "protected") else _RAX, "rdx": 0xCFC},
    )


def _in(mode: str, size: int) -> Case:
    acc = _ACCUMULATOR[size]
    start = _low(_RAX, 4) if mode in ("real", "protected") else _RAX
    ones = _low(_ALL_ONES, size)
    answer = bytes(range(0xA1, 0xA1 + size))
    answered = int.from_bytes(answer, "little")
    after = _insert(start, answered, size)
    return Case(
        f"in-{size}-{mode}",
        mode,
        f"l0: in {acc}, dx; mov ebx, eax; l1: in {acc}, 0x71; l2: out 0x80, al; l3: nop",
        (
            Run(f"io direction=in port=0x3f8 size={size} count=1 rip={{l0}}"),
            Data(b"\xff" * size),
            Regs({"rip": "l0", "rax": start}),
            Answer(answer),
            Regs({"rip": "l0", "rax": start}),
            Run(f"io direction=in port=0x71 size={size} count=1 rip={{l1}}"),
            Regs({"rax": after, "rbx": _low(after, 4)}),
            Run(f"io direction=out port=0x80 size=1 count=1 data={ones & 0xFF:#x} rip={{l3}}"),
            Regs({"rax": _insert(after, ones, size)}),
        ),
        regs={"rax": start, "rdx": 0x3F8},
    )


def _mmio(size: int) -> Case:
    """In long mode: a store, a load that is answered, a load that is not."""
    acc, pointer = _ACCUMULATOR[size], _POINTER[size]
    value = _low(_RAX, size)
    answer = bytes(range(0xB1, 0xB1 + size))
    after = _insert(_RAX, int.from_bytes(answer, "little"), size)
    return Case(
        f"mmio-{size}",
        "long",
        f"""
            mov {pointer} ptr [rdi], {acc}
        l1: mov {acc}, {pointer} ptr [rdi + 8]
        l2: mov {acc}, {pointer} ptr [rdi + 16]
        l3: hlt
        l4:
        """,
        (
            Run(f"mmio direction=write addr={MMIO:#x} size={size} data={value:#x} rip={{l1}}"),
            Data(value.to_bytes(size, "little")),
            Regs({"rip": "l1"}),
            Run(f"mmio direction=read addr={MMIO + 8:#x} size={size} rip={{l1}}"),
            Data(b"\xff" * size),
            Regs({"rip": "l1", "rax": _RAX}),
            Answer(answer),
            Run(f"mmio direction=read addr={MMIO + 16:#x} size={size} rip={{l2}}"),
            Regs({"rax": after}),
            Run("hlt rip={l4}"),
            Regs({"rax": _insert(after, _low(_ALL_ONES, size), size)}),
        ),
        regs={"rax": _RAX, "rdi": MMIO},
    )


_SIZES = (1, 2, 4)
_MANY = bytes(number * 7 & 0xFF for number in range(0x3000))

CASES = (
    *(_out(mode, size) for mode in ("real", "protected", "long", "user") for size in _SIZES),
    *(_in(mode, size) for mode in ("real", "protected", "long", "user") for size in _SIZES),
    *(_mmio(size) for size in (1, 2, 4, 8)),
    Case(
        "mmio-real",
        "real",
        "mov ax, 0xa000; mov es, ax; mov word ptr es:[0x10], 0x1234; l1: mov bl, es:[0x20]; l2: hlt; l3:",
        (
            Run("mmio direction=write addr=0xa0010 size=2 data=0x1234 rip={l1}"),
            Run("mmio direction=read addr=0xa0020 size=1 rip={l1}"),
            Answer(b"\x5a"),
            Run("hlt rip={l3}"),
            Regs({"rbx": 0x5A}),
        ),
    ),
    Case(
        "mmio-user",
        "user",
        "mov [rdi], eax; l1: mov ebx, [rdi + 4]; l2: out 0x80, al; l3:",
        (
            Run(f"mmio direction=write addr={MMIO:#x} size=4 data=0x11223344 rip={{l1}}"),
            Run(f"mmio direction=read addr={MMIO + 4:#x} size=4 rip={{l1}}"),
            Answer(b"\x01\x02\x03\x04"),
            Run("io direction=out port=0x80 size=1 count=1 data=0x44 rip={l3}"),
            Regs({"rbx": 0x04030201}),
        ),
        regs={"rdi": MMIO, "rax": 0x11223344},
    ),
    Case(
        "mmio-read-modify-write",
        "long",
        "l0: add dword ptr [rdi], 5; l1: hlt; l2:",
        (
            Run(f"mmio direction=read addr={MMIO:#x} size=4 rip={{l0}}"),
            Answer((7).to_bytes(4, "little")),
            Run(f"mmio direction=write addr={MMIO:#x} size=4 data=0xc rip={{l1}}"),
            Run("hlt rip={l2}"),
        ),
        regs={"rdi": MMIO},
    ),
    Case(
        "rep-outsb",
        "long",
        "cld; l0: rep outsb; l1: hlt; l2:",
        (
            Run("io direction=out port=0x80 size=1 count=1 data=0x61 rip={l0}"),
            Regs({"rcx": 2, "rsi": 0x2001}),
            Run("io direction=out port=0x80 size=1 count=1 data=0x62 rip={l0}"),
            Run("io direction=out port=0x80 size=1 count=1 data=0x63 rip={l1}"),
            Regs({"rcx": 0, "rsi": 0x2003}),
            Run("hlt rip={l2}"),
        ),
        instead={"kvm-rep-outs-ends-late": (
            Run("io direction=out port=0x80 size=1 count=1 data=0x61 rip={l0}"),
            Run("io direction=out port=0x80 size=1 count=1 data=0x62 rip={l0}"),
            Run("io direction=out port=0x80 size=1 count=1 data=0x63 rip={l0}"),
            Regs({"rcx": 0, "rsi": 0x2003}),
            Run("hlt rip={l2}"),
        )},
        regs={"rcx": 3, "rsi": 0x2000, "rdx": 0x80},
        memory={0x2000: b"abc"},
    ),
    Case(
        "rep-insb",
        "long",
        "cld; l0: rep insb; l1: hlt; l2:",
        (
            Feed(port=0x80, size=1, data=b"xyz", at="l0"),
            Run("hlt rip={l2}"),
            Regs({"rcx": 0, "rdi": 0x2003}),
            Memory(0x2000, b"xyz\0"),
        ),
        regs={"rcx": 3, "rdi": 0x2000, "rdx": 0x80},
    ),
    Case(
        "rep-insw-of-many",
        "long",
        "cld; l0: rep insw; l1: hlt; l2:",
        (
            Feed(port=0x80, size=2, data=_MANY, at="l0"),
            Run("hlt rip={l2}"),
            Regs({"rcx": 0, "rdi": 0x2000 + len(_MANY)}),
            Memory(0x2000, _MANY + b"\0"),
        ),
        regs={"rcx": len(_MANY) // 2, "rdi": 0x2000, "rdx": 0x80},
    ),
    Case(
        "store-is-in-ram",
        "long",
        "mov [0x3000], rax; hlt; l1:",
        (Run("hlt rip={l1}"), Memory(0x3000, _RAX.to_bytes(8, "little"))),
        regs={"rax": _RAX},
    ),
    Case(
        "the-data-of-a-write-stays",
        "long",
        "mov [rdi], eax; l1: out 0x80, ax; l2: hlt; l3:",
        (
            Run(f"mmio direction=write addr={MMIO:#x} size=4 data=0x11223344 rip={{l1}}"),
            SetRegs({"rax": 0x5566}),
            Data(b"\x44\x33\x22\x11"),
            Run("io direction=out port=0x80 size=2 count=1 data=0x5566 rip={l2}"),
            SetRegs({"rax": 0}),
            Data(b"\x66\x55"),
            Run("hlt rip={l3}"),
            Data(b""),
        ),
        regs={"rdi": MMIO, "rax": 0x11223344},
    ),
    Case(
        "set-registers-completes-in",
        "long",
        "l0: in al, dx; l1: mov ebx, eax; hlt; l2:",
        (
            Run("io direction=in port=0x80 size=1 count=1 rip={l0}"),
            Answer(b"\x77"),
            # The whole of regs is set, after the `in` is done: al is overwritten, rip goes where it says.
            SetRegs({"rip": "l1", "rax": 0x99}),
            Regs({"rip": "l1", "rax": 0x99}),
            Run("hlt rip={l2}"),
            Regs({"rbx": 0x99}),
        ),
        regs={"rdx": 0x80},
    ),
    Case(
        "set-registers-completes-read-modify-write",
        "long",
        "l0: add dword ptr [rdi], 5; l1: hlt; l2: mov ebx, eax; hlt; l3:",
        (
            Run(f"mmio direction=read addr={MMIO:#x} size=4 rip={{l0}}"),
            Answer((7).to_bytes(4, "little")),
            Complete(),
            Regs({"rip": "l1"}),
            SetRegs({"rip": "l2", "rax": 9}),
            # The store was made when the instruction was completed; its rip is of then.
            RunLine(f"mmio direction=write addr={MMIO:#x} size=4 data=0xc rip={{l1}}"),
            Data(b"\x0c\0\0\0"),
            Run("hlt rip={l3}"),
            Regs({"rbx": 9}),
        ),
        regs={"rdi": MMIO},
    ),
    Case(
        "set-registers-completes-split-load",
        "long",
        "l0: mov rax, [rdi]; l1: mov rbx, rax; hlt; l2:",
        (
            Run(f"mmio direction=read addr={MMIO + 0xFFC:#x} size=4 rip={{l0}}"),
            Answer(b"\1\2\3\4"),
            Complete(),
            # The part that nobody was asked for reads as all ones.
            Regs({"rip": "l1", "rax": 0xFFFFFFFF04030201}),
            Run("hlt rip={l2}"),
        ),
        regs={"rdi": MMIO + 0xFFC},
    ),
    Case(
        "set-registers-completes-load",
        "long",
        "l0: mov al, [rdi]; l1: mov ebx, eax; hlt; l2:",
        (
            Run(f"mmio direction=read addr={MMIO:#x} size=1 rip={{l0}}"),
            SetRegs({"rip": "l1", "rax": 0x55}),
            Data(b""),
            Run("hlt rip={l2}"),
            Regs({"rbx": 0x55}),
        ),
        regs={"rdi": MMIO},
    ),
)  # fmt: skip
