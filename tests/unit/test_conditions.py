"""Conditions: what they mean (a model in Python says), how they are written back, and that nothing else parses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.debug.conditions import (
    MOST_TOKENS,
    CpuLooker,
    Unreadable,
    no_symbols,
    parse_address,
    parse_condition,
)
from vmfs.words.errors import Invalid, VmfsError

MASK = (1 << 64) - 1
REGISTERS = {"rax": 0x1122334455667788, "rbx": 0, "rsp": 0x7FF8, "cr3": 0x1000, "rip": MASK, "cs": 0x10}
SYMBOLS = {"start_kernel": 0xFFFFFFFF81000000, "a.b$c": 5, "jiffies": 0x7FF0}
NUMBERS = st.one_of(st.integers(0, 70), st.integers(0, MASK), st.sampled_from([1 << 63, MASK, 1 << 32]))


class Model:
    """Registers, and memory where the byte at an address is its low byte; 0x8000 and after it is not mapped."""

    def register(self, name: str) -> int:
        if name.startswith("msr."):
            raise Unreadable(f"{name} is none")
        return REGISTERS[name]

    def read(self, linear: int, size: int) -> bytes:
        if linear + size > 0x8000:
            raise Unreadable(f"{linear:#x}")
        return bytes((linear + n) & 0xFF for n in range(size))


MODEL = Model()


def value(text: str) -> int:
    condition, rest = parse_condition(text, SYMBOLS.get)
    assert rest == ""
    return condition.evaluate(MODEL)


BINARY = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "<<": lambda a, b: a << b if b < 64 else 0,
    ">>": lambda a, b: a >> b if b < 64 else 0,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "&&": lambda a, b: bool(a) and bool(b),
    "||": lambda a, b: bool(a) or bool(b),
}
UNARY = {"!": lambda a: not a, "-": lambda a: -a, "~": lambda a: ~a}
# C's precedence, the loosest first.
LEVELS = ("||", "&&", "|", "^", "&", "== !=", "< <= > >=", "<< >>", "+ -", "*")
PRECEDENCE = {sign: level for level, signs in enumerate(LEVELS) for sign in signs.split()}

# A tree is (text, precedence, value); a text gets brackets only where it needs them.
LEAVES = st.one_of(
    NUMBERS.map(lambda number: (str(number), 99, number)),
    NUMBERS.map(lambda number: (hex(number), 99, number)),
    st.sampled_from(sorted(REGISTERS)).map(lambda name: (name, 99, REGISTERS[name])),
    st.sampled_from(sorted(SYMBOLS)).map(lambda name: (name, 99, SYMBOLS[name])),
    st.sampled_from([("al", 0x88), ("ah", 0x77), ("ax", 0x7788), ("eax", 0x55667788), ("$RAX", REGISTERS["rax"])])
    .map(lambda pair: (pair[0], 99, pair[1])),
    st.tuples(st.sampled_from([("u8", 1), ("u16", 2), ("u32", 4), ("u64", 8)]), st.integers(0, 0x7FF0)).map(
        lambda both: (f"{both[0][0]}({both[1]})", 99, int.from_bytes(MODEL.read(both[1], both[0][1]), "little"))
    ),
    st.integers(0, 0x7FF0).map(lambda at: (f"[{at}]", 99, int.from_bytes(MODEL.read(at, 8), "little"))),
)  # fmt: skip


def _combined(children):
    spaces = st.sampled_from(["", " ", "  "])

    def binary(parts):
        sign, left, right, space = parts
        level = PRECEDENCE[sign]
        one = left[0] if left[1] >= level else f"({left[0]})"
        two = right[0] if right[1] > level else f"({right[0]})"
        return f"{one}{space}{sign}{space}{two}", level, int(BINARY[sign](left[2], right[2])) & MASK

    def unary(parts):
        sign, operand, space = parts
        text = operand[0] if operand[1] == 99 else f"({operand[0]})"
        return f"{sign}{space}{text}", 50, int(UNARY[sign](operand[2])) & MASK

    return st.one_of(
        st.tuples(st.sampled_from(sorted(BINARY)), children, children, spaces).map(binary),
        st.tuples(st.sampled_from(sorted(UNARY)), children, spaces).map(unary),
    )


TREES = st.recursive(LEAVES, _combined, max_leaves=12)


@given(TREES)
def test_it_means_what_the_model_says(tree):
    text, _, wanted = tree
    assert value(text) == wanted


@given(TREES)
def test_its_text_is_an_equal_condition_without_symbols(tree):
    condition, _ = parse_condition(tree[0], SYMBOLS.get)
    assert " " not in condition.text
    again, rest = parse_condition(condition.text, no_symbols)
    assert (again, rest, again.text) == (condition, "", condition.text)
    assert again.evaluate(MODEL) == condition.evaluate(MODEL)
    parsed, rest = parse_condition(f"{tree[0]} once", SYMBOLS.get)
    assert (parsed, rest) == (condition, "once")


@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from([*BINARY, *UNARY, *"()[]$,", "u8", "u64(", "rax", "5", "0x", "msr.0x10"]),
            max_size=25,
        ).map("".join),
    )
)
def test_hostile_text_is_refused_or_is_a_condition(text):
    try:
        condition, rest = parse_condition(text, SYMBOLS.get)
    except VmfsError as error:
        assert isinstance(error, Invalid)
        assert 0 < len(str(error)) < 200 and "\n" not in str(error)
        return
    assert text.endswith(rest) or text.strip().endswith(rest)
    try:
        assert 0 <= condition.evaluate(MODEL) <= MASK
    except (Unreadable, KeyError):  # the model has few registers
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is missing at the end"),
        ("rax==", "is missing at the end"),
        ("== 5", "is missing before '== 5'"),
        ("(rax", "a ')' is missing"),
        ("[rax", "a ']' is missing"),
        ("[rax)", "a ']' is missing"),
        ("u8 rax", "it is u8(ADDR)"),
        ("nothing == 1", "'nothing' is neither a register nor a symbol"),
        ("xmm0 == 1", "'xmm0' is neither"),
        ("0x10000000000000000", "does not fit 64 bits"),
        ("rax /* */", None),
        ("rax % 2", None),
        ("rax = 5", None),
    ],
)
def test_what_is_wrong_is_said(text, words):
    if words is None:  # the condition ends before it, and what follows is no option
        assert parse_condition(text)[1]
        return
    with pytest.raises(Invalid) as caught:
        parse_condition(text)
    assert words in str(caught.value)


def test_a_condition_has_an_end():
    with pytest.raises(Invalid, match="more than"):
        parse_condition("+".join(["1"] * MOST_TOKENS))
    with pytest.raises(Invalid, match="more than"):
        parse_condition("(" * 100_000)
    with pytest.raises(Invalid, match="more than"):
        parse_condition("!" * 100_000)
    assert value("+".join(["1"] * (MOST_TOKENS // 2))) == MOST_TOKENS // 2


def test_the_right_side_is_looked_at_only_if_it_must_be():
    assert value("0 && [0x9000]") == 0
    assert value("rax || [0x9000]") == 1
    for text in ("1 && [0x9000]", "[0x7ffc]", "msr.0x10 == 0", "u8(rip)"):
        with pytest.raises(Unreadable):
            value(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0x7c00", 0x7C00),
        ("010", 10),
        ("-1", MASK),
        ("start_kernel", 0xFFFFFFFF81000000),
        ("start_kernel+0x10", 0xFFFFFFFF81000010),
        ("start_kernel-1", 0xFFFFFFFF80FFFFFF),
        ("a.b$c-6", MASK),
    ],
)
def test_addresses(text, address):
    assert parse_address(text, SYMBOLS.get) == address


@pytest.mark.parametrize("text", ["", "+", "x", "start_kernel+", "start_kernel+x", "start_kernel+1+1", "7c00", "1+1"])
def test_what_is_no_address(text):
    with pytest.raises(Invalid, match="ADDR"):
        parse_address(text, SYMBOLS.get)


class Paged:
    """Two pages at 0x1000 are mapped, the first to 0x5000, the second past the end of RAM."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get_state(self, name: str) -> bytes:
        self.asked.append(name)
        return bytes(range(144))

    def get_msr(self, index: int) -> int:
        if index != 0x10:
            raise Invalid(f"no MSR {index:#x}")
        return 7

    def translate(self, linear: int) -> int | None:
        page = {0x1: 0x5000, 0x2: 0x9000}.get(linear >> 12)
        return None if page is None else page + linear % 4096


def test_a_cpu_is_looked_at():
    cpu = Paged()
    ram = bytes(0x5FFE) + b"\x12\x34"
    looker = CpuLooker(cpu, lambda at, size: ram[at : at + size])
    assert parse_condition("rax==0x706050403020100 && rbx>>56==15")[0].holds(looker)
    assert cpu.asked == ["regs"]
    assert parse_condition("msr.0x10==7 && u16(0x1ffe)==0x3412")[0].holds(looker)
    for text in ("msr.0x11", "u16(0x1fff)", "u8(0x2000)", "u8(0x3000)", "u8(0)"):
        with pytest.raises(Unreadable):
            parse_condition(text)[0].holds(looker)
