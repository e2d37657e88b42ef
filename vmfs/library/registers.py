"""Registers as attributes: `machine.rax`, `eax`, `ax`, `al`, `ah`, `rip`, `xmm0`, `fs_base`, `cr3`, `cf`.

The names are those of `vmfs.words.registers`, with `_` for the dot, and the parts of the general registers; a part of
32 bits that is set clears the rest, as an instruction does (Intel SDM 1 3.4.1.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmfs.words.errors import Invalid
from vmfs.words.registers import REGISTERS

# In the order of their numbers in instructions (Intel SDM 2A 2.1.5).
GENERAL = tuple("rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split())
_MASK = (1 << 64) - 1
_FLAGS = {"cf": 0, "pf": 2, "af": 4, "zf": 6, "sf": 7, "tf": 8, "if_": 9, "df": 10, "of": 11}


def _parts() -> dict[str, tuple[int, int, int]]:
    """The number, the lowest bit and the bits of each part of a general register."""
    found = {}
    for number, name in enumerate(GENERAL):
        if number < 8:
            short = name[1:]
            found[f"e{short}"] = number, 0, 32
            found[short] = number, 0, 16
            if number < 4:
                found[f"{short[0]}l"], found[f"{short[0]}h"] = (number, 0, 8), (number, 8, 8)
            else:
                found[f"{short}l"] = number, 0, 8
        else:
            found |= {f"{name}d": (number, 0, 32), f"{name}w": (number, 0, 16), f"{name}b": (number, 0, 8)}
    return found


def check(name: str, value: int, bits: int) -> int:
    """The value of a register of so many bits; a negative one as two's complement."""
    if not -1 << (bits - 1) <= value < 1 << bits:
        raise Invalid(f"{name} has {bits} bits, and {value:#x} does not fit")
    return value & (1 << bits) - 1


def _whole(number: int, name: str) -> property:
    def get(self: Any) -> int:
        return self._get_register(number)

    def put(self: Any, value: int) -> None:
        self._set_register(number, value if 0 <= value <= _MASK else check(name, value, 64))

    return property(get, put, doc=f"The register {name}.")


def _part(name: str, number: int, low: int, bits: int) -> property:
    mask = (1 << bits) - 1
    kept = 0 if bits == 32 else _MASK ^ mask << low

    def get(self: Any) -> int:
        return self._get_register(number) >> low & mask

    def put(self: Any, value: int) -> None:
        value = check(name, value, bits) << low
        self._set_register(number, value | (self._get_register(number) & kept if kept else 0))

    return property(get, put, doc=f"The register {name}, {bits} bits of {GENERAL[number]}.")


def _of_state(name: str) -> property:
    row = REGISTERS[name]

    def get(self: Any) -> int:
        return row.get(self._cpu.get_state(row.state))

    def put(self: Any, value: int) -> None:
        value = check(name, value, row.settable)
        self._cpu.complete()
        state = bytearray(self._cpu.get_state(row.state))
        row.put(state, value)
        self._cpu.set_state(row.state, bytes(state))

    return property(get, put, doc=f"The register {name}.")


def _flag(name: str, bit: int) -> property:
    def get(self: Any) -> int:
        return self.rflags >> bit & 1

    def put(self: Any, value: int) -> None:
        self.rflags = self.rflags & ~(1 << bit) | bool(value) << bit

    return property(get, put, doc=f"The flag {name.strip('_').upper()} of rflags.")


def _below(name: str, whole: str, bits: int) -> property:
    mask = (1 << bits) - 1
    return property(
        lambda self: getattr(self, whole) & mask,
        lambda self, value: setattr(self, whole, check(name, value, bits)),
        doc=f"The register {name}: the lower {bits} bits of {whole}.",
    )


def with_registers(kind: type, ip: int) -> type:
    """The class with a property a register. `ip` is the number that `_get_register` takes for rip."""
    add: Callable[[str, property], None] = lambda name, one: setattr(kind, name, one)  # noqa: E731
    for name in REGISTERS:
        if "." not in name or name.endswith((".base", ".limit")):
            add(name.replace(".", "_"), _of_state(name))
    for number, name in enumerate(GENERAL):
        add(name, _whole(number, name))
    add("rip", _whole(ip, "rip"))
    for name, (number, low, bits) in _parts().items():
        add(name, _part(name, number, low, bits))
    add("eip", _below("eip", "rip", 32))
    add("ip", _below("ip", "rip", 16))
    add("eflags", _below("eflags", "rflags", 32))
    for name, bit in _FLAGS.items():
        add(name, _flag(name, bit))
    return kind
