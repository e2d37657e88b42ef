"""Instructions by call stack: what flame graphs are made of."""

from __future__ import annotations

from collections import Counter
from typing import BinaryIO

from vmfs.traces.calls import Calls
from vmfs.traces.place import Place
from vmfs.words.tracing import TraceRecord

MOST = 1 << 16  # stacks that are counted before some are written
Stack = tuple[str, ...]


class Stacks:
    """Counts instructions, by a stack that begins with its CPU."""

    def __init__(self, place: Place) -> None:
        self.counts: Counter[Stack] = Counter()
        self._place = place
        self._cpus: dict[int, tuple[Calls, list[str]]] = {}

    def take(self, record: TraceRecord) -> None:
        if record.kind == "dropped":
            for calls, _ in self._cpus.values():
                calls.gap()
            return
        if record.kind not in ("insn", "exception", "interrupt"):
            return
        calls, stack = self._cpus.get(record.cpu) or self._cpu(record.cpu)
        if record.kind != "insn":
            calls.event(record)
            return
        calls.instructions(record)
        self.counts[tuple(stack)] += record.size + record.code - 1

    def named(self) -> Counter[Stack]:
        """The counts; the CPU is in the stacks where there are several."""
        if len(self._cpus) > 1:
            return self.counts
        return Counter({stack[1:]: count for stack, count in self.counts.items()})

    def _cpu(self, number: int) -> tuple[Calls, list[str]]:
        stack = [f"cpu{number}"]
        made = self._cpus[number] = Calls(self._place, stack.append, stack.pop), stack
        return made


class Folded:
    """`a;b;c 17`: so many instructions in c, which b has called, which a has called. A stack may have several lines,
    which are to be added up: after MOST of them, what was counted is written, so that a long trace takes no more memory
    than a short one."""

    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file = file
        self._stacks = Stacks(place)

    def take(self, record: TraceRecord) -> None:
        self._stacks.take(record)
        if len(self._stacks.counts) >= MOST:
            self._write()

    def end(self) -> None:
        self._write()
        self._file.flush()

    def _write(self) -> None:
        for stack, count in sorted(self._stacks.named().items()):
            self._file.write(f"{';'.join(name.replace(';', ':') for name in stack)} {count}\n".encode())
        self._stacks.counts.clear()
