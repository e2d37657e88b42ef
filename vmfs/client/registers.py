"""The registers of a machine's CPU, by attribute and by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from vmfs.words import layouts
from vmfs.words.layouts import unpack_msrs
from vmfs.words.registers import REGISTERS, Register, Ymm, msr_name, parse_registers


class Files(Protocol):
    """What reads and writes the files that a CPU's registers are: a machine, or one of its CPUs."""

    def pread(self, name: str, size: int, offset: int = 0) -> bytes: ...

    def pwrite(self, name: str, data: bytes, offset: int = 0) -> None: ...

    def read(self, name: str) -> bytes: ...

    def read_text(self, name: str, *, keep: bool = True) -> str: ...

    def write(self, name: str, data: str) -> None: ...


class Registers:
    """The registers of one CPU, by attribute (`vm.regs.rax`) and by name (`vm.regs["cs.base"]`): REGISTERS.

    Values are unsigned integers as wide as the register; a negative one may be set, as its two's complement.
    Reading a running machine samples it between two instructions; setting is then OSError (EBUSY). No such
    register: AttributeError or KeyError; a value that is too wide: ValueError.
    """

    __slots__ = ("_vm",)
    _vm: Files

    def __init__(self, vm: Files) -> None:
        object.__setattr__(self, "_vm", vm)

    def __getitem__(self, name: str) -> int:
        row = REGISTERS[name]
        if isinstance(row, Ymm):
            return row.get(self._vm.pread(row.state, layouts.XSAVE_AVX_END, 0))
        return int.from_bytes(self._vm.pread(row.state, row.size, row.offset), "little")

    def __setitem__(self, name: str, value: int) -> None:
        row = REGISTERS[name]
        if not row.writable:
            raise ValueError(f"{name} cannot be set")
        if isinstance(row, Ymm):
            area = bytearray(self._vm.pread(row.state, layouts.XSAVE_AVX_END, 0))
            row.put(area, _unsigned(row, value))
            self._vm.pwrite(row.state, bytes(area), 0)
            return
        self._vm.pwrite(row.state, _unsigned(row, value).to_bytes(row.size, "little"), row.offset)

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no register {name}") from None

    def __setattr__(self, name: str, value: int) -> None:
        try:
            self[name] = value
        except KeyError:
            raise AttributeError(f"there is no register {name}") from None

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *(name for name in REGISTERS if name.isidentifier())]

    def update(self, values: Mapping[str, int] = {}, /, **more: int) -> None:  # noqa: B006 - never changed
        """Set several registers (and MSRs, as `msr.0xc0000082`) in one change: all of them or none."""
        lines = []
        for name, value in {**values, **more}.items():
            if not name.startswith("msr."):
                value = _unsigned(REGISTERS[name], value)
            lines.append(f"{name} {value:#x}\n")
        if lines:
            self._vm.write("registers", "".join(lines))

    def read(self) -> dict[str, int]:
        """All registers at one moment, by name."""
        return parse_registers(self._vm.read_text("registers"))


def _unsigned(row: Register, value: int) -> int:
    if not -(1 << (row.settable - 1)) <= value < 1 << row.settable:
        raise ValueError(f"{row.name}: {value:#x} does not fit {row.settable} bits")
    return value & ((1 << row.settable) - 1)


class Msrs:
    """The model-specific registers of one CPU, by number: `vm.msr[0xc0000082]`.

    OSError (ENOENT or EINVAL) where the CPU has none of that number or refuses the value.
    """

    __slots__ = ("_vm",)

    def __init__(self, vm: Files) -> None:
        self._vm = vm

    def __getitem__(self, index: int) -> int:
        # Not kept open: there may be very many of them.
        return int(self._vm.read_text(f"reg/{msr_name(index)}", keep=False), 0)

    def __setitem__(self, index: int, value: int) -> None:
        self._vm.write(f"reg/{msr_name(index)}", f"{value:#x}\n")

    def read(self) -> dict[int, int]:
        """All that the engine saves, by number."""
        return dict(unpack_msrs(self._vm.read("msrs")))
