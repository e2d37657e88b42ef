"""The callers: the chain of frame pointers, and every other return address that stands on the stack.

Most kernels keep no frame pointers. So, as an oops of Linux does, all words on the stack that may be return
addresses are shown, in their order, marked `?` where no frame pointer vouches for them: they may be left over
from calls that have returned.

A word may be a return address if it points to the instruction after a CALL, in a page that can be executed.

Linux runs interrupts on stacks of their own, below pages that are not mapped. The last word of such a stack, or
the RSP and SS of the frame that the CPU pushed there, lead to the one that was interrupted.

Source of the encodings of CALL: Intel SDM 2A, "CALL"; of the frames: System V psABI 3.2.2, figure 3.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmfs.debug.paging import NO_EXECUTE, Page, Paging, Ram, States, linear_reader, read_linear
from vmfs.debug.symbols import SymbolTable
from vmfs.memory.ram import PAGE
from vmfs.words.modes import CodeMode
from vmfs.words.registers import REGISTERS

DEPTH = 16 << 10  # bytes of the stack that are looked at: a kernel stack of Linux
STACKS_MOST = 4
SELECTOR_MOST = (
    0x100  # of an SS that was pushed; one with RPL 3 is a program's, and its stack is not followed
)
FRAMES_MOST = 128
GUESSES_MOST = 256
FRAME_MOST = 1 << 20  # bytes between two frames


@dataclass(frozen=True, slots=True)
class StackState:
    """What is needed of a CPU, and the bytes on its stack, from the stack pointer on."""

    code: CodeMode
    paging: Paging
    pointer: int  # linear
    frame: int  # of the frame pointer, linear
    base: int  # of the stack segment
    stacks: tuple[tuple[int, bytes], ...]  # where each begins, and its bytes

    @staticmethod
    def of(cpu: States, memory: Ram) -> StackState:
        """That of a CPU between two instructions."""
        sregs, regs = cpu.get_state("sregs"), cpu.get_state("regs")
        code, paging = CodeMode.of(regs, sregs), Paging.of(cpu)
        rsp, rbp = REGISTERS["rsp"].get(regs), REGISTERS["rbp"].get(regs)
        base = 0
        if code.bits != 64:
            base = REGISTERS["ss.base"].get(sregs)
            mask = 0xFFFF_FFFF if REGISTERS["ss.db"].get(sregs) else 0xFFFF  # which of esp is used
            rsp, rbp = rsp & mask, rbp & mask
        pointer, frame = base + rsp & code.mask, base + rbp & code.mask
        return StackState(code, paging, pointer, frame, base, _stacks(memory, paging, pointer, code.bits))

    @property
    def width(self) -> int:
        """Bytes of a word."""
        return self.code.bits // 8


@dataclass(frozen=True, slots=True)
class Frame:
    """A return address, linear. `at`: where it stands; `sure`: the frame pointers lead there."""

    address: int
    at: int
    sure: bool


def frames(memory: Ram, state: StackState) -> list[Frame]:
    """The return addresses on the stack, the innermost first."""
    code = _Code(memory, state)
    sure = _chain(state, code)
    found = [Frame(address, at, True) for at, address in sure.items()]
    order = {}
    for place, words in state.stacks:
        guesses = 0
        whole = len(words) // state.width * state.width
        for index, (value,) in enumerate(struct.iter_unpack(_FORMATS[state.width], words[:whole])):
            at = place + index * state.width
            order.setdefault(at, len(order))
            if at in sure or guesses >= GUESSES_MOST:
                continue
            address = code.linear(value)
            if code.follows_call(address):
                found.append(Frame(address, at, False))
                guesses += 1
    # What a chain finds beyond those stacks comes last.
    return sorted(found, key=lambda frame: (order.get(frame.at, len(order)), frame.at))


def _stacks(memory: Ram, paging: Paging, pointer: int, bits: int) -> tuple[tuple[int, bytes], ...]:
    """The stack from `pointer` on, and those that were interrupted, at most STACKS_MOST."""
    found: list[tuple[int, bytes]] = []
    while len(found) < STACKS_MOST:
        words = read_linear(memory, paging, pointer, DEPTH)
        if not words or any(place <= pointer < place + len(other) for place, other in found):
            break
        found.append((pointer, words))
        if bits != 64 or len(words) == DEPTH or len(words) < 16 or pointer % 8:
            break
        # Its end, where nothing is mapped.
        before, last = struct.unpack_from("<QQ", words[: len(words) & ~7], (len(words) & ~7) - 16)
        pointer = before if last <= SELECTOR_MOST and not last & 3 else last
        if pointer % 8 or paging.translate(memory, pointer) is None:
            break
    return tuple(found)


_FORMATS = {2: "<H", 4: "<I", 8: "<Q"}


def _chain(state: StackState, code: _Code) -> dict[int, int]:
    """Return addresses by where they stand: each frame begins with the caller's frame pointer."""
    found: dict[int, int] = {}
    frame, width = state.frame, state.width
    least = state.pointer
    while len(found) < FRAMES_MOST and least <= frame < least + FRAME_MOST and frame % width == 0:
        pair = code.read(frame, 2 * width)
        if len(pair) < 2 * width:
            break
        caller, back = struct.unpack(f"<2{_FORMATS[width][1]}", pair)
        address = code.linear(back)
        if not code.follows_call(address):
            break
        found[frame + width] = address
        least, frame = frame + 2 * width, state.base + caller & state.code.mask
    return found


class _Code:
    """Memory as code, pages looked up once."""

    def __init__(self, memory: Ram, state: StackState) -> None:
        self._memory = memory
        self._paging = state.paging
        self._bits = state.code.bits
        self._mask = state.code.mask
        self.linear = state.code.linear
        self._pages: dict[int, bool] = {}
        self.read = linear_reader(memory, state.paging)

    def follows_call(self, address: int) -> bool:
        """Whether `address` may be what a CALL pushed."""
        if address < 8 or not self._is_executable(address - 1):
            return False
        before = self.read(address - 8, 8)
        if len(before) < 8:
            before = self.read(address - 5, 5).rjust(8, b"\0")
        if before[3] == 0xE8 and self._bits != 16:  # CALL rel32
            (offset,) = struct.unpack_from("<i", before, 4)
            return self._is_executable(address + offset & self._mask)
        if before[5] == 0xE8 and self._bits == 16:  # CALL rel16
            return True
        # CALL r/m: FF /2, with two to seven bytes: ModRM, SIB, a displacement of 0, 1 or 4 bytes.
        return any(
            before[-size] == 0xFF
            and before[1 - size] >> 3 & 7 == 2
            and size == _length(before[1 - size :], self._bits)
            for size in range(2, 8)
        )

    def _is_executable(self, address: int) -> bool:
        number = address // PAGE
        if number not in self._pages:
            page: Page | None = self._paging.translate(self._memory, number * PAGE)
            self._pages[number] = bool(
                page and not page.flags & NO_EXECUTE and self._memory.room(page.physical)
            )
        return self._pages[number]


def _length(modrm_on: bytes, bits: int) -> int:
    """Bytes of FF with this ModRM byte and what follows (SDM 2A tables 2-1, 2-2)."""
    modrm = modrm_on[0]
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3:
        return 2
    if bits == 16:
        return 2 + (2 if mod == 2 or mod == 0 and rm == 6 else mod)
    sib = rm == 4
    displacement = {0: 0, 1: 1, 2: 4}[mod]
    if mod == 0 and (rm == 5 or sib and len(modrm_on) > 1 and modrm_on[1] & 7 == 5):
        displacement = 4
    return 2 + sib + displacement


def stack_text(memory: Ram, state: StackState, symbols: SymbolTable) -> str:
    """A line a frame: `#N ADDRESS [SYMBOL]` and where it stands; `?` in place of #N for the unsure."""
    width = 16 if state.code.bits == 64 else 8
    lines = [f"#0 0x{state.code.address:0{width}x}{_named(symbols, state.code.address, 0)}\n"]
    number = 0
    for frame in frames(memory, state):
        mark = "?"
        if frame.sure:
            number += 1
            mark = f"#{number}"
        name = _named(symbols, frame.address, 1)
        lines.append(f"{mark:<2} 0x{frame.address:0{width}x}{name} at {frame.at:#x}\n")
    return "".join(lines)


def _named(symbols: SymbolTable, address: int, back: int) -> str:
    """The symbol of an address. A CALL that does not return may be the last of its function: what it pushes is
    then the next one's, so look `back` a byte."""
    found = symbols.name_of(address - back)
    if not found:
        return ""
    name, offset = found[0], found[1] + back
    return f" {name}+{offset:#x}" if offset else f" {name}"
