"""The forms of a trace (vmfs.traces): each is written from a real run, read back by the rules of its format, and
compared with what the run did, as the library's own trace and an observer of each instruction tell it."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import struct
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest
from engine.asm import assemble as assemble_with_labels
from hypothesis import given
from hypothesis import strategies as st
from library.conftest import CODE
from PIL import Image
from vmfs.debug._trace import Text as CText

from vmfs import traces
from vmfs.debug import symbols
from vmfs.library.trace import Accessed, Executed
from vmfs.traces import calls, coverage, flame, heat, stacks, timeline
from vmfs.traces.place import CALL, JUMP, RETURN, Place, way_of
from vmfs.words.errors import Invalid, LimitReached, Unsupported
from vmfs.words.tracing import AT, CPU, DROPPED, EXCEPTION, EXIT, INSN, INTERRUPT, MEM, RECORD

# `odd` calls through a register, `tail` jumps to `leaf`, `again` calls itself; `rep movsb` is repeated eight times.
PROGRAM = """
        mov ecx, 3
l:      push rcx
        call odd
        call tail
        pop rcx
        dec ecx
        jnz l
        mov edi, 2
        call again
        hlt
odd:    lea rax, [rip + leaf]
        call rax
        ret
tail:   nop
        jmp leaf
again:  dec edi
        js done
        call again
        nop
done:   ret
leaf:   mov rsi, 0x8000
        mov rdi, 0x8100
        mov ecx, 8
        rep movsb
        movups xmm0, [rsi]
        movups [rdi], xmm0
        ret
"""
NAMES = ("_start", "odd", "tail", "again", "leaf")
PROTOS = "perfetto.protos.perfetto.trace.perfetto_trace_pb2"
Stack = tuple[str, ...]


class Run:
    """One run: its records, the library's view of them, and the call stack at each instruction, by the mnemonics."""

    def __init__(self, machine, labels: dict[str, int]) -> None:
        self.machine, self.labels = machine, labels
        lines = [f"{address:x} T {name}" for name, address in labels.items()]
        self.symbols = symbols.parse("\n".join(lines).encode())
        self.place = Place(self.symbols, lambda at, size: bytes(machine.mem[at : at + size]), title="demo")
        self.stacks: list[Stack] = []
        self._stack, self._last = ["_start"], ""
        snapshot = machine.snapshot()
        hook = machine.hook_code(self._look)
        machine.run()
        hook.remove()
        machine.restore(snapshot)
        with machine.trace(memory=True) as trace:
            machine.run()
        self.data = trace.data
        self.executed = [each for each in trace if isinstance(each, Executed)]
        self.accessed = [each for each in trace if isinstance(each, Accessed)]

    def _look(self, machine, address: int) -> None:
        inside = max((start, name) for name, start in self.labels.items() if start <= address)[1]
        if self._last == "call":
            self._stack.append(inside)
        elif self._last == "ret":
            self._stack.pop()
        elif self._last == "jmp" and inside != self._stack[-1]:
            self._stack[-1] = inside
        self.stacks.append(tuple(self._stack))
        self._last = machine.disasm(address, 1)[0][2].split()[0]

    def write(self, name: str, place: Place | None = None, **options) -> bytes:
        file = io.BytesIO()
        pieces = [self.data[at : at + 1000] for at in range(0, len(self.data), 1000)]  # 1000 is no multiple of a record
        traces.write(pieces, name, file, place or self.place, **options)
        return file.getvalue()


@pytest.fixture
def run(make, assemble):
    labels = assemble_with_labels(PROGRAM, "long").labels
    return Run(make(PROGRAM), {name: labels[name] for name in NAMES})


def test_csv(run):
    rows = list(csv.DictReader(io.StringIO(run.write("csv").decode())))
    executed = [
        Executed(int(row["number"]), int(row["at"], 16), int(row["size"])) for row in rows if row["kind"] == "insn"
    ]
    assert executed == run.executed and len(executed) == len(run.stacks) + 7 * 6
    assert _accesses(rows) == run.accessed
    assert {row["symbol"].partition("+")[0] for row in rows} == set(NAMES)


def _accesses(rows) -> list[Accessed]:
    return [
        Accessed(int(row["at"], 16), row["kind"] == "write", int(row["address"], 16),
                 int(row["value"], 16).to_bytes(int(row["size"]), "little"))
        for row in rows
        if row["kind"] in ("read", "write")
    ]  # fmt: skip


def test_ndjson(run):
    lines = run.write("ndjson").decode().splitlines()
    rows = [json.loads(line) for line in lines]
    table = list(csv.DictReader(io.StringIO(run.write("csv").decode())))
    assert [{word: str(value) for word, value in row.items()} for row in rows] == [
        {word: value for word, value in row.items() if value} for row in table
    ]
    assert _accesses(rows) == run.accessed


def folded(text: bytes) -> Counter[Stack]:
    found: Counter[Stack] = Counter()
    for line in text.decode().splitlines():
        stack, count = re.fullmatch(r"(\S+) (\d+)", line).groups()
        found[tuple(stack.split(";"))] += int(count)
    return found


def test_folded(run):
    """As many instructions in each stack as an observer of calls and returns has counted; a `rep movsb` of 8 counts
    8."""
    wanted = Counter(run.stacks)
    for stack in wanted:
        if stack[-1] == "leaf":
            wanted[stack] += wanted[stack] // 7 * 7  # 7 instructions in leaf, one of which counts 7 more
    assert folded(run.write("folded")) == wanted
    assert ("_start", "again", "again", "again") in wanted and ("_start", "odd", "leaf") in wanted


def test_folded_without_the_code(run):
    """A saved trace: calls are told by symbols. A tail call cannot be, and stands on its caller."""
    saved = folded(run.write("folded", Place(run.symbols)))
    wanted = Counter()
    for stack, count in folded(run.write("folded")).items():
        wanted[(*stack[:-1], "tail", "leaf") if stack == ("_start", "leaf") else stack] += count
    assert saved == wanted
    assert set(folded(run.write("folded", Place()))) != set(saved), "nothing is known without either"


def test_perfetto(run):
    protos = pytest.importorskip(PROTOS, reason="perfetto is not installed")
    trace = protos.Trace.FromString(run.write("perfetto"))
    names: dict[int, str] = {}
    stack: list[str] = []
    counted: Counter[Stack] = Counter()
    before, seen = 0, []
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        names.update((each.iid, each.name) for each in packet.interned_data.event_names)
        if not packet.HasField("track_event"):
            continue
        event = packet.track_event
        if event.type == event.TYPE_INSTANT:
            assert names[event.name_iid] in ("read", "write", "exit")
            words = {each.name: each.pointer_value for each in event.debug_annotations}
            seen.append((words["at"], names[event.name_iid] == "write", words["address"], words["size"]))
            continue
        if stack:
            counted[tuple(stack)] += packet.timestamp - before
        before = packet.timestamp
        if event.type == event.TYPE_SLICE_BEGIN:
            stack.append(names[event.name_iid])
        else:
            assert event.type == event.TYPE_SLICE_END
            stack.pop()
    assert stack == [] and +counted == folded(run.write("folded"))
    assert seen == [(one.rip, one.is_write, one.address, len(one.data)) for one in run.accessed]
    tracks = [packet.track_descriptor for packet in trace.packet if packet.HasField("track_descriptor")]
    assert [track.process.process_name or track.thread.thread_name for track in tracks] == ["demo", "cpu0"]


def test_perfetto_has_a_bound_on_names(run, monkeypatch):
    """Names are interned; when there are many, the numbers begin anew, and a reader is told."""
    protos = pytest.importorskip(PROTOS, reason="perfetto is not installed")
    whole = protos.Trace.FromString(run.write("perfetto"))
    monkeypatch.setattr(timeline, "NAMES_MOST", 3)
    bounded = protos.Trace.FromString(run.write("perfetto"))
    assert _names_in(bounded, protos) == _names_in(whole, protos)
    assert max(packet.track_event.name_iid for packet in bounded.packet) == 3


def _names_in(trace, protos) -> list[str]:
    names, found = {}, []
    for packet in trace.packet:
        if packet.sequence_flags & protos.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED:
            names.clear()
        names.update((each.iid, each.name) for each in packet.interned_data.event_names)
        found.append(names.get(packet.track_event.name_iid, ""))
    return found


def test_perfetto_without_the_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "perfetto.protos.perfetto.trace", None)
    with pytest.raises(Unsupported, match="pip install perfetto"):
        run.write("perfetto")


SVG = {"svg": "http://www.w3.org/2000/svg"}


def test_flame(run):
    """Each box says how many instructions it stands for, is that wide, and stands on its caller's."""
    picture = ElementTree.fromstring(run.write("flame"))
    counts = folded(run.write("folded"))
    whole = sum(counts.values())
    boxes = []
    for group in picture.findall("svg:g", SVG):
        name, count = re.match(r"(\S+): (\d+) instructions", group.find("svg:title", SVG).text).groups()
        rectangle = group.find("svg:rect", SVG).attrib
        boxes.append((name, int(count), float(rectangle["x"]), float(rectangle["width"]), int(rectangle["y"])))
    assert len(boxes) == 1 + len({stack[:depth] for stack in counts for depth in range(1, len(stack) + 1)})
    levels = sorted({box[4] for box in boxes}, reverse=True)
    for name, count, x, width, y in boxes:
        assert abs(width - max(count * 1180 / whole, flame.NARROWEST)) < 0.02
        depth = levels.index(y)
        if depth == 0:
            assert (name, count) == ("all", whole)
            continue
        below = [box for box in boxes if box[4] == levels[depth - 1]]
        assert sum(left - 0.02 <= x and x + width <= left + wide + 0.02 for _, _, left, wide, _ in below) == 1
    inclusive = Counter()
    for stack, count in counts.items():
        for depth in range(1, len(stack) + 1):
            inclusive[stack[:depth]] += count
    assert sorted((name, count) for name, count, *_ in boxes[1:]) == sorted(
        (stack[-1], count) for stack, count in inclusive.items()
    )


def test_heat(run):
    picture = ElementTree.fromstring(run.write("heat"))
    data = picture.find("svg:image", SVG).attrib["{http://www.w3.org/1999/xlink}href"].partition("base64,")[2]
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    rows = list(csv.DictReader(io.StringIO(run.write("csv").decode())))
    events = [row for row in rows if row["kind"] in ("insn", "read", "write")]
    width = 1
    while len(events) > width * heat.COLUMNS:
        width *= 2
    wanted: dict[tuple[int, int], set[int]] = {}
    pages = sorted({int(row["at" if row["kind"] == "insn" else "address"], 16) >> 12 for row in events})
    for number, row in enumerate(events):
        page = int(row["at" if row["kind"] == "insn" else "address"], 16) >> 12
        colour = {"write": 0, "read": 1, "insn": 2}[row["kind"]]
        wanted.setdefault((number // width, pages.index(page)), set()).add(colour)
    assert image.size == (-(-len(events) // width), len(pages))
    for x in range(image.width):
        for y in range(image.height):
            lit = {index for index, value in enumerate(image.getpixel((x, y))) if value}
            assert lit == wanted.get((x, y), set())
    assert f">{CODE:#x}" in run.write("heat").decode() or f" {CODE:#x}<" in run.write("heat").decode()


def drcov(data: bytes) -> dict[str, list[tuple[int, int]]]:
    """As Lighthouse reads it: blocks (address, size) by module."""
    head, _, table = data.partition(b" bbs\n")
    lines = head.decode().splitlines()
    assert lines[:2] == ["DRCOV VERSION: 2", "DRCOV FLAVOR: drcov"]
    count = int(re.fullmatch(r"Module Table: version 2, count (\d+)", lines[2])[1])
    assert lines[3] == "Columns: id, base, end, entry, path"
    modules = []
    for number, line in enumerate(lines[4 : 4 + count]):
        words = line.split(", ")
        assert int(words[0]) == number
        modules.append((words[-1], int(words[1], 16), int(words[2], 16)))
    blocks = int(re.fullmatch(r"BB Table: (\d+)", lines[4 + count])[1])
    assert len(table) == 8 * blocks and len(lines) == 5 + count
    found: dict[str, list[tuple[int, int]]] = {}
    for start, size, module in struct.iter_unpack("<IHH", table):
        name, base, end = modules[module]
        assert base + start < end
        found.setdefault(name, []).append((base + start, size))
    return found


def test_drcov(run):
    found = drcov(run.write("drcov"))
    covered = {byte for blocks in found.values() for at, size in blocks for byte in range(at, at + size)}
    assert covered == {byte for one in run.executed for byte in range(one.address, one.address + one.length)}
    assert list(found) == ["0x1000"]
    odd, tail = run.labels["odd"], run.labels["tail"]
    named = drcov(run.write("drcov", Place(modules=(("odd.o", odd, tail - 1),))))
    assert list(named) == ["0x1000", "odd.o", hex(tail & ~0xFFF | tail & 0xFFF)]
    assert min(at for at, _ in named["odd.o"]) == odd and {at for at, _ in named["0x1000"]} >= {CODE}


def test_drcov_knows_linux_and_bounds_itself(monkeypatch):
    kernel = Place(symbols.parse(b"ffffffff81000000 T _text\nffffffff82000000 B _end\n"))
    here = [0xFFFFFFFF81000010, 0x7F0000001234, 0x401000, 0xFFFFFFFFC0001000, 0x402000]
    data = b"".join(RECORD.pack(INSN, 0, 2, 1, number, at, 0x23) for number, at in enumerate(here))
    file = io.BytesIO()
    traces.write([data], "drcov", file, kernel)
    found = drcov(file.getvalue())
    assert found == {
        "0x401000": [(0x401000, 5), (0x402000, 5)],
        "0x7f0000001000": [(0x7F0000001234, 5)],
        "vmlinux": [(0xFFFFFFFF81000010, 5)],
        "0xffffffffc0001000": [(0xFFFFFFFFC0001000, 5)],
    }
    monkeypatch.setattr(coverage, "MOST", 3)
    with pytest.raises(LimitReached, match="--range"):
        traces.write([data], "drcov", io.BytesIO(), kernel)


def test_tenet(run):
    """A line an instruction, and each time that one is repeated."""
    line = re.compile(r"rip=0x([0-9a-f]+)((?:,m[rw]=0x[0-9a-f]+:(?:[0-9a-f]{2})+)*)")
    steps, accessed = [], []
    for text in run.write("tenet").decode().splitlines():
        rip, accesses = line.fullmatch(text).groups()
        steps.append(int(rip, 16))
        for kind, address, data in re.findall(r",m([rw])=0x([0-9a-f]+):([0-9a-f]+)", accesses):
            accessed.append(Accessed(steps[-1], kind == "w", int(address, 16), bytes.fromhex(data)))
    assert steps == [one.address for one in run.executed] and accessed == run.accessed


def test_qira(run, tmp_path):
    """Its memory, played from the changes, is what the machine has in the end; its head counts changes and
    instructions."""
    data = run.write("qira")
    count, last, filtered, first, parent, _ = struct.unpack_from("<IIIIii", data)
    changes = list(struct.iter_unpack("<QQII", data[24:]))
    assert (count, filtered, first, parent) == (len(changes) + 1, 0, 1, -1)
    starts = [(address, size, number) for address, size, number, flags in changes if flags == 0x9000_0000]
    assert [number for *_, number in starts] == list(range(1, last + 1)) and last == len(run.executed)
    assert {(address, size) for address, size, _ in starts} == {(one.address, one.length) for one in run.executed}
    played: dict[int, int] = {}
    for address, value, number, flags in changes:
        assert flags & 0x8000_0000 and 1 <= number <= last
        if flags & 0x6000_0000 == 0x6000_0000:
            played.update((address + index, value >> 8 * index & 0xFF) for index in range((flags & 0xFF) // 8))
    assert played and all(run.machine.mem[address : address + 1][0] == byte for address, byte in played.items())
    reads = [(address, (flags & 0xFF) // 8) for address, _, _, flags in changes if flags & 0x7000_0000 == 0x2000_0000]
    wanted = [one for one in run.accessed if not one.is_write]
    assert sum(size for _, size in reads) == sum(len(one.data) for one in wanted)

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    with pytest.raises(Invalid, match="no pipe"):
        traces.write([run.data], "qira", Pipe())


@pytest.mark.parametrize("name", ["tenet", "qira"])
def test_one_cpu(run, name):
    second = RECORD.pack(CPU, 0, 0, 1, 0, 0, 0) + RECORD.pack(INSN, 0, 1, 1, 0, 0x5000, 1)
    with pytest.raises(Invalid, match="--cpu K takes one"):
        traces.write([run.data, second], name, io.BytesIO())
    file = io.BytesIO()
    traces.write([run.data, second], name, file, cpu=0)
    assert file.getvalue() == run.write(name)


def test_stacks_of_two_cpus(run):
    """Each has its own, and its name below it."""
    both = b""
    for at in range(0, len(run.data), RECORD.size):
        for cpu in (0, 1):
            both += RECORD.pack(CPU, 0, 0, cpu, 0, 0, 0) + run.data[at : at + RECORD.size]
    file = io.BytesIO()
    traces.write([both], "folded", file, run.place)
    one = folded(run.write("folded"))
    assert folded(file.getvalue()) == Counter({(f"cpu{cpu}", *stack): n for stack, n in one.items() for cpu in (0, 1)})


ADDRESSES = st.integers(0, (1 << 64) - 1)
RECORDS = st.one_of(
    st.tuples(st.just(INSN), st.just(0), st.integers(1, 16), st.integers(1, 9), ADDRESSES, ADDRESSES, ADDRESSES),
    st.tuples(st.just(MEM), st.integers(0, 3), st.integers(1, 8), st.just(0), ADDRESSES, ADDRESSES, st.just(0)),
    st.tuples(st.just(EXCEPTION), st.sampled_from([0, 8]), st.integers(0, 31), st.integers(0, 99), *[ADDRESSES] * 3),
    st.tuples(st.just(INTERRUPT), st.sampled_from([0, 16, 32]), st.integers(0, 255), st.just(0), *[ADDRESSES] * 3),
    st.tuples(st.just(AT), st.just(0), st.just(0), st.just(0), *[ADDRESSES] * 3),
    st.tuples(st.just(DROPPED), st.just(0), st.just(0), st.just(0), *[ADDRESSES] * 3),
)


@given(st.lists(RECORDS))
def test_text_is_as_the_file_trace_has_it(rows):
    """Two writers, in C for the file and in Python for a saved trace."""
    data = RECORD.pack(AT, 0, 0, 0, 0, 0x1000, 0) + b"".join(RECORD.pack(*row) for row in rows)
    table = symbols.parse(b"1000 T low\n7f0000000000 T high\n")
    file = io.BytesIO()
    traces.write([data], "text", file, Place(table))
    wanted = CText(lambda address: table.label(address).encode()).text(data)
    assert [line for line in file.getvalue().split(b"\n")] == wanted.split(b"\n")


def test_exits_in_each_form():
    data = RECORD.pack(AT, 0, 0, 0, 7, 0x1004, 0) + RECORD.pack(EXIT, 1, 1, 2, 0x80, 0x41, 0x1006)
    said = {}
    for name in ("text", "csv", "ndjson"):
        file = io.BytesIO()
        traces.write([data], name, file)
        said[name] = file.getvalue().decode()
    assert said["text"] == "exit io address=0x80 size=1 value=0x41 rip=0x1006\n"
    assert said["csv"].splitlines()[1] == "exit,0,,0x1006,,0x80,1,0x41,,,,io,"
    assert json.loads(said["ndjson"]) == {
        "kind": "exit", "cpu": 0, "at": "0x1006", "address": "0x80", "size": 1, "value": "0x41", "cause": "io",
    }  # fmt: skip


# ---- Call stacks


@pytest.mark.parametrize(
    ("code", "way"),
    [
        ("e8 00000000", CALL), ("ff d0", CALL), ("41 ff d3", CALL), ("ff 15 00000000", CALL), ("67 e8 00000000", CALL),
        ("0f 05", CALL), ("c3", RETURN), ("f3 c3", RETURN), ("c2 0800", RETURN), ("48 cf", RETURN), ("cb", RETURN),
        ("48 0f 07", RETURN), ("eb 00", JUMP), ("ff e0", JUMP), ("0f 84 00000000", JUMP), ("74 00", JUMP), ("", JUMP),
        ("66", JUMP),
    ],
)  # fmt: skip
def test_ways(code, way):
    assert way_of(bytes.fromhex(code)) == way


def insn(at: int, lengths: tuple[int, ...] = (1,)) -> bytes:
    packed = sum(length << 4 * index for index, length in enumerate(lengths))
    return RECORD.pack(INSN, 0, len(lengths), 1, 0, at, packed)


def stacks_of(data: bytes, names: dict[int, str]) -> Counter[Stack]:
    file = io.BytesIO()
    table = symbols.parse("\n".join(f"{at:x} T {name}" for at, name in names.items()).encode())
    traces.write([data], "folded", file, Place(table))
    return folded(file.getvalue())


def test_an_interrupt_stands_on_what_it_interrupts():
    event = RECORD.pack(INTERRUPT, 0, 0x20, 0, 0, 0x1001, 0)
    data = insn(0x1000) + event + insn(0x5000, (1, 1)) + insn(0x1001)
    assert stacks_of(data, {0x1000: "main", 0x5000: "handler"}) == {("main",): 2, ("main", "handler"): 2}


def test_a_switch_of_tasks_and_a_gap_begin_anew():
    names = {0x1000: "one", 0x2000: "switch", 0x3000: "other"}
    data = insn(0x1000, (5,)) + insn(0x2000) + insn(0x3010) + RECORD.pack(DROPPED, 0, 0, 0, 9, 0, 0) + insn(0x2004)
    assert stacks_of(data, names) == {("one",): 1, ("one", "switch"): 1, ("other",): 1, ("switch",): 1}


def test_lengths_that_are_not_known():
    """KVM's steps."""
    names = {0x1000: "main", 0x2000: "f"}
    data = b"".join(insn(at, (0,)) for at in (0x1000, 0x1003, 0x2000, 0x2001, 0x1008, 0x100A))
    assert stacks_of(data, names) == {("main",): 4, ("main", "f"): 2}


def test_what_is_kept_has_a_bound(monkeypatch):
    """However many stacks, pages and depths there are; and nothing of the counts is lost."""
    monkeypatch.setattr(stacks, "MOST", 50)
    monkeypatch.setattr(flame, "MOST", 50)
    monkeypatch.setattr(heat, "ROWS", 20)
    functions = 300
    table = symbols.parse("\n".join(f"{0x10000 + (n << 12):x} T f{n}" for n in range(functions)).encode())
    place = Place(table)
    file, picture, map_ = (kind(io.BytesIO(), place) for kind in (stacks.Folded, flame.Flame, heat.Heat))
    most = 0
    records = list(traces.TraceRecords().read(b"".join(insn(0x10000 + (n << 12)) for n in range(functions))))
    for record in records * 2:
        for each in (file, picture, map_):
            each.take(record)
        most = max(most, len(file._stacks.counts), len(picture._stacks.counts))
        assert len(map_._rows) <= 20
    assert most <= 50
    assert sum(picture._stacks.counts.values()) == 2 * functions
    assert sum(map(sum, map_._rows.values())) == 2 * functions == map_._events
    file.end()
    assert sum(folded(file._file.getvalue()).values()) == 2 * functions
    deep = calls.Calls(place, lambda name: None, lambda: None)
    for record in records * 4:
        deep.instructions(record)
        assert len(deep.frames) <= calls.DEEPEST


def test_an_interrupt_key_leaves_a_whole_file(run):
    def parts():
        yield run.data[:3200]
        raise KeyboardInterrupt

    file = io.BytesIO()
    with pytest.raises(KeyboardInterrupt):
        traces.write(parts(), "flame", file, run.place)
    assert ElementTree.fromstring(file.getvalue()).tag.endswith("svg")


def test_a_name_that_is_none():
    with pytest.raises(Invalid, match="is none of text, csv"):
        traces.write([], "pdf", io.BytesIO())
