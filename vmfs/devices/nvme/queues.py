"""Queues of NVMe.

Source: NVM Express 1.4, 4.1 (queues), 4.6 (completions).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated

import msgspec

from vmfs.devices.device import U16, U64, Port

COMMAND = struct.Struct("<BBHI8xQQQIIIIII")  # opcode, flags, id, namespace, MPTR, PRP1, PRP2, CDW 10 to 15
COMPLETION = struct.Struct("<IIHHHH")
ENTRIES_MOST = 1024

Size = Annotated[int, msgspec.Meta(ge=2, le=ENTRIES_MOST)]


class CommandFailed(Exception):
    """With a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status:#x}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Command:
    opcode: int
    flags: int
    id: int
    namespace: int
    prp1: int
    prp2: int
    dwords: tuple[int, ...]  # CDW 10 to 15

    @classmethod
    def of(cls, data: bytes | memoryview) -> Command:
        opcode, flags, id_, namespace, _, prp1, prp2, *dwords = COMMAND.unpack(data)
        return cls(opcode, flags, id_, namespace, prp1, prp2, tuple(dwords))

    @property
    def lba(self) -> int:
        return self.dwords[0] | self.dwords[1] << 32

    @property
    def blocks(self) -> int:
        return (self.dwords[2] & 0xFFFF) + 1


class SubmissionState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    base: U64
    size: Size
    head: U16
    tail: U16
    completion: U16


class CompletionState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    base: U64
    size: Size
    head: U16
    tail: U16
    phase: bool
    vector: U16
    interrupts: bool


class Submission:
    """`completion`: the number of its completion queue."""

    def __init__(self, number: int, state: SubmissionState) -> None:
        self.number = number
        self.base, self.size, self.completion = state.base, state.size, state.completion
        self.head, self.tail = state.head, state.tail

    def save(self) -> SubmissionState:
        return SubmissionState(
            base=self.base, size=self.size, head=self.head, tail=self.tail, completion=self.completion
        )


class Completion:
    """`promised`: entries that commands which are under way will take."""

    def __init__(self, state: CompletionState) -> None:
        for name in CompletionState.__struct_fields__:
            setattr(self, name, getattr(state, name))
        self.promised = 0

    base: int
    size: int
    head: int
    tail: int
    phase: bool
    vector: int
    interrupts: bool

    def save(self) -> CompletionState:
        return CompletionState(**{name: getattr(self, name) for name in CompletionState.__struct_fields__})

    @property
    def has_room(self) -> bool:
        return (self.tail - self.head) % self.size + self.promised < self.size - 1

    @property
    def waits(self) -> bool:
        """The host has not taken all."""
        return self.head != self.tail

    def post(self, board: Port, result: int, head: int, queue: int, command: int, status: int) -> None:
        entry = COMPLETION.pack(result, 0, head, queue, command, status << 1 | self.phase)
        board.dma_write(self.base + COMPLETION.size * self.tail, entry)
        self.tail += 1
        if self.tail == self.size:
            self.tail, self.phase = 0, not self.phase
