"""What a page shows of a machine: PANES, a function each, which reads files and returns what becomes JSON.

A function gets the machine, the number of the CPU and what the page has asked for; it may block. What a machine lacks
is an OSError, whose sentence the page shows in the place of the pane.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmfs.client import Cpu, Vm
from vmfs.commands import table
from vmfs.commands.table import size
from vmfs.debug.paging import (
    ACCESSED,
    DIRTY,
    GLOBAL,
    LARGE,
    NO_EXECUTE,
    UNCACHED,
    USER,
    WRITABLE,
    WRITE_THROUGH,
    Paging,
)
from vmfs.web.place import SeenVm, peek
from vmfs.words.errors import Invalid
from vmfs.words.numbers import parse_number

Asked = dict[str, Any]

LINES_BEFORE = 10  # of disassembly, before rip
LINES_MOST = 200
BYTES_MOST = 4096
RANGES_MOST = 1500
TRACE_MOST = 2 << 20  # bytes of text that one look takes
TRACE_LINES = 400
_SYMBOL_NEAR = 2048  # bytes from a symbol to rip that are disassembled again to have what stands before rip
_BACK = 48
_TRIES = 6
_LINE = re.compile(r"0x([0-9a-f]+)(?: <(.*?)>)?: ")
_OFFSET = re.compile(r"\+0x([0-9a-f]+)$")
NOT_THERE = (errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL, errno.EBUSY, errno.EACCES)


def of_cpu(vm: Vm, cpu: int) -> Vm | Cpu:
    return vm.cpu(cpu) if cpu else vm


def number_of(value: Any, least: int, most: int, what: str) -> int:
    """A whole number from a page. OSError (EINVAL) where it is none, or not in the range."""
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise OSError(errno.EINVAL, f"{what} is a number from {least} to {most}")
    return value


def line_of(value: Any, what: str) -> str:
    """A text of one line from a page, since a newline would begin another command."""
    if not isinstance(value, str) or not value.strip() or len(value) > 4096 or not value.isprintable():
        raise OSError(errno.EINVAL, f"{what} is one line of text")
    return value.strip()


def address_of(vm: SeenVm, cpu: int, value: Any) -> int:
    """An address: a number, a register, a symbol, FILE:LINE; the last two with `+0x10`, too."""
    text = line_of(value, "an address")
    try:
        return parse_number(text, bits=64)
    except Invalid:
        pass
    one = of_cpu(vm, cpu)
    base, plus, more = text.partition("+")
    with contextlib.suppress(OSError, Invalid):
        added = parse_number(more, bits=64) if plus else 0
        if re.fullmatch(r"[a-z0-9.]+", base.strip()):
            return (int(one.read_text(f"reg/{base.strip()}", keep=False), 16) + added) & (1 << 64) - 1
    if match := _LINE.match(_disasm(vm, cpu, text, 1)[0]):
        return int(match[1], 16)
    raise OSError(errno.EFAULT, f"nothing can be read at {text}")


# ---- the panes


def head(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    """What stands above all panes."""
    facts = table.facts(Path(vm.path))
    return {
        "exit": vm.read_text("exit"),
        "instructions": table.number(facts, "instructions") if "instructions" in facts else None,
        "exits": sum(int(value) for key, value in facts.items() if key.startswith("exits.")),
        "memory": table.number(facts, "memory_bytes"),
        **{name: facts.get(name, "") for name in ("state", "machine", "engine", "cpus")},
    }


def registers(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    lines = of_cpu(vm, cpu).read_text("registers").splitlines()
    return {"mode": "" if cpu else vm.read_text("mode"), "rows": [line.split(" ", 1) for line in lines]}


def disasm(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    """`at`: an address, or nothing for rip and what stands before it."""
    count = number_of(asked.get("count", 32), 1, LINES_MOST, "the count of instructions")
    if asked.get("at"):
        return {"rip": None, "lines": _disasm(vm, cpu, f"{address_of(vm, cpu, asked['at']):#x}", count)}
    lines = _disasm(vm, cpu, "rip", count)
    first = _LINE.match(lines[0])
    if first is None:
        return {"rip": None, "lines": lines}
    rip = int(first[1], 16)
    before = [] if vm.state == "running" else _before(vm, cpu, rip, first[2] or "")
    return {"rip": f"{rip:#x}", "lines": [*before, *lines]}


def _disasm(vm: SeenVm, cpu: int, where: str, count: int) -> list[str]:
    """The file is all readers' own: after it, it shows again what comes next."""
    one = of_cpu(vm, cpu)
    with vm.listing.turn:
        one.write("disasm", f"{where} {count}\n")
        try:
            return one.read_text("disasm", keep=False).splitlines() or [""]
        finally:
            one.write("disasm", "rip\n")


def _before(vm: SeenVm, cpu: int, rip: int, symbol: str) -> list[str]:
    """The instructions before rip: from the symbol's beginning on, or from where decoding happens to meet rip."""
    offset = _OFFSET.search(symbol)
    if symbol and not offset:
        return []  # rip is where a function begins
    if offset and (back := int(offset[1], 16)) <= _SYMBOL_NEAR:
        found = _lines_to(vm, cpu, rip - back, rip)
        return [line for _, line in found][-LINES_BEFORE:]
    # x86 has no way back: of several places to begin the one is taken whose instructions look most like code.
    best: list[tuple[int, str]] = []
    for back in range(min(rip, _BACK), min(rip, _BACK) - _TRIES, -1):
        if back > 0:
            found = _lines_to(vm, cpu, rip - back, rip)[-LINES_BEFORE:]
            best = max(best, found, key=_likeness)
    return [line for _, line in best]


def _lines_to(vm: SeenVm, cpu: int, start: int, rip: int) -> list[tuple[int, str]]:
    """The instructions from `start` to before rip; none where decoding does not meet rip."""
    with contextlib.suppress(OSError):
        found = []
        for line in _disasm(vm, cpu, f"{start:#x}", rip - start + 1):
            match = _LINE.match(line)
            if match is None or int(match[1], 16) == rip:
                return found if match else []
            found.append((int(match[1], 16), line))
    return []


def _likeness(found: list[tuple[int, str]]) -> tuple[int, int]:
    """How much that looks like code: instructions that are no zeros, and begins of code, which compilers align."""
    code = [(at, line) for at, line in found if ": 00 00" not in line and ".byte" not in line]
    return len(code), sum(at % 16 == 0 for at, _ in code)


def memory(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    """`space`: `virt` or `mem`."""
    space = asked.get("space", "virt")
    if space not in ("virt", "mem"):
        raise OSError(errno.EINVAL, "memory is looked at in virt or mem")
    at = address_of(vm, cpu, asked.get("at", "0"))
    count = number_of(asked.get("size", 256), 1, BYTES_MOST, "the count of bytes")
    where = os.path.join(vm.path, f"cpu{cpu}") if cpu and space == "virt" else vm.path
    return {"at": f"{at:#x}", "space": space, "bytes": peek(where, space, at, count)}


def stack(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    return of_cpu(vm, cpu).read_text("stack").splitlines()[:LINES_MOST]


def points(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    return [{"id": each.id, "what": each.what, "hits": each.hits, "at": _at(each.what)} for each in vm.points()]


def _at(what: str) -> str:
    """The address of a breakpoint."""
    words = what.split()
    return words[1] if words[0] == "break" and "owner=" not in what else ""


def pagetable(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    """The ranges, or those with `find` in their lines; and the walk to an address `at`."""
    lines = of_cpu(vm, cpu).read_text("pagetable").splitlines()
    find = asked.get("find")
    if find:
        lines = [line for line in lines if line_of(find, "what to find") in line]
    found: dict[str, Any] = {"lines": lines[:RANGES_MOST], "more": max(len(lines) - RANGES_MOST, 0)}
    if asked.get("at"):
        at = address_of(vm, cpu, asked["at"])
        found["at"] = f"{at:#x}"
        found["walk"] = _walk(vm, cpu, at)
    return found


def _walk(vm: SeenVm, cpu: int, at: int) -> list[dict[str, str]]:
    """The entries on the way to the page of an address."""
    paging = Paging.of(_States(of_cpu(vm, cpu)))
    if paging.kind == "off" or not paging.is_canonical(at):
        return []
    return [
        {"maps": size(1 << step.level.shift), "address": f"{step.address:#x}", "entry": f"{step.entry:#018x}",
         "flags": _flags(step.entry), "leads": step.leads}
        for step in paging.walk(_Ram(vm), at)
    ]  # fmt: skip


_FLAGS = (
    (WRITABLE, "w"), (USER, "u"), (NO_EXECUTE, "nx"), (LARGE, "large"), (GLOBAL, "G"), (ACCESSED, "A"), (DIRTY, "D"),
    (WRITE_THROUGH, "PWT"), (UNCACHED, "PCD"),
)  # fmt: skip


def _flags(entry: int) -> str:
    return " ".join(name for bit, name in _FLAGS if entry & bit)


class _States:
    """A CPU, for Paging."""

    def __init__(self, one: Vm | Cpu) -> None:
        self.get_state = one.read


class _Ram:
    """RAM, for a walk."""

    def __init__(self, vm: Vm) -> None:
        self._path = vm.path

    def room(self, address: int) -> int:
        return 1 << 52

    def read(self, offset: int, length: int) -> bytes:
        return bytes(byte for byte in peek(self._path, "mem", offset, length) if byte is not None)


def why(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    return vm.read_text("why")


def trace(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    """What is traced, and with `follow` what has come: the end of it, where that is much."""
    facts = table.facts(Path(vm.path))
    found: dict[str, Any] = {"on": facts.get("trace", "off"), "events": facts.get("trace_events", "0")}
    if not asked.get("follow"):
        return found
    text = bytearray()
    fd = os.open(os.path.join(vm.path, "trace"), os.O_RDONLY | os.O_NONBLOCK)
    try:
        while len(text) < TRACE_MOST:
            try:
                data = os.read(fd, 1 << 18)
            except BlockingIOError:
                break
            if not data:
                break
            text += data
    finally:
        os.close(fd)
    lines = text.decode(errors="replace").splitlines()
    found |= {"lines": lines[-TRACE_LINES:], "left_out": max(len(lines) - TRACE_LINES, 0)}
    return found


def history(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    return dict(line.partition(" ")[::2] for line in vm.read_text("history").splitlines())


def snapshots(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    found = []
    for name in vm.snapshots[:256]:
        info = {}
        with contextlib.suppress(OSError):
            info = dict(line.partition(" ")[::2] for line in vm.read_text(f"snap/{name}/info", keep=False).splitlines())
        found.append({"name": name, **info})
    return {"at": vm.read_text("restore"), "rows": found}


def devices(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    rows = []
    for name in vm.devices:
        row = {"name": name}
        for file in ("type", "address", "irq", "info"):
            with contextlib.suppress(OSError):
                row[file] = vm.read_text(f"dev/{name}/{file}", keep=False)
        rows.append(row)
    return {"rows": rows, "unclaimed": vm.read_text("dev/unclaimed", keep=False).splitlines()[-64:]}


def screen(vm: SeenVm, cpu: int, asked: Asked) -> Any:
    """The characters on it, for who does not see it."""
    return vm.screen.splitlines()


PANES: dict[str, Callable[[SeenVm, int, Asked], Any]] = {
    "head": head,
    "registers": registers,
    "disasm": disasm,
    "memory": memory,
    "stack": stack,
    "points": points,
    "pagetable": pagetable,
    "why": why,
    "trace": trace,
    "history": history,
    "snapshots": snapshots,
    "devices": devices,
    "screen": screen,
}

CHANGES_BY_ITSELF = frozenset({"memory", "trace", "head", "history", "points", "snapshots", "screen", "devices"})
"""What may be another thing although no register is: read at each look. The others are read when the machine has run,
or something was written to it."""

WHILE_IT_RUNS = {"registers": 1.0, "disasm": 1.0, "stack": 1.0, "pagetable": 3.0, "devices": 3.0, "snapshots": 3.0,
                 "why": 3.0, "screen": 1.0}  # fmt: skip
"""Seconds between two reads of what stops the guest, or takes long."""

