"""The buffer between the CPU's thread and readers, settings, and text, without a machine."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.debug.symbols import SymbolTable
from vmfs.debug.trace import TraceSettings, TraceText, parse_modes, parse_span
from vmfs.debug.trace_buffer import Chunk, TraceBuffer, count, cpu_after
from vmfs.machine.files.commands import parse_commands
from vmfs.words.errors import Invalid, Unsupported
from vmfs.words.tracing import AT, CPU, EXIT, INSN, MEM, RECORD

NOBODY = SymbolTable()


def insns(number: int, size: int) -> bytes:
    return RECORD.pack(INSN, 0, size, 1, number, 0x1000 + number, int("1" * size, 16))


def filled(chunks: int, limit: int = 1 << 30, size: int = 4) -> TraceBuffer:
    buffer = TraceBuffer(limit)
    buffer.configure(limit=limit, waits=False, flowing=True)
    for number in range(chunks):
        buffer.append(insns(number * size, size), size)
    return buffer


def drain(buffer: TraceBuffer, reader) -> tuple[int, int]:
    """Events lost and read."""
    lost = read = 0
    while piece := buffer.take(reader, 1 << 16):
        lost += piece.lost
        read += count(piece.data)
    return lost, read


@given(
    st.lists(
        st.one_of(
            st.just("open"),
            st.just("close"),
            st.integers(1, 16),  # appends
            st.tuples(st.integers(0, 3), st.integers(1, 200)),  # a reader takes
        )
    ),
    st.integers(100, 3000),
)
def test_every_event_is_read_or_counted_as_lost(actions, limit):
    """By each reader, from when it opened; whichever reader comes and goes, and whatever the limit."""
    buffer = TraceBuffer(limit)
    buffer.configure(limit=limit, waits=False, flowing=True)
    readers: list[list] = []
    total = 0
    for action in actions:
        if action == "open":
            reader = buffer.open()
            readers.append([reader, reader.seen, 0])
        elif action == "close" and readers:
            buffer.close(readers.pop(0)[0])
        elif isinstance(action, int):
            buffer.append(insns(total, action), action)
            total += action
        elif isinstance(action, tuple) and action[0] < len(readers):
            one = readers[action[0]]
            if piece := buffer.take(one[0], action[1]):
                one[2] += piece.lost + count(piece.data)
    for reader, began, got in readers:
        lost, read = drain(buffer, reader)
        assert began + got + lost + read == total


def test_the_next_reader_begins_where_the_last_one_left():
    buffer = filled(3)
    first = buffer.open()
    assert buffer.take(first, 32)
    piece = buffer.take(first, 32)
    buffer.close(first, Chunk(piece.data, 4))  # taken, but not read by anybody
    second = buffer.open()
    assert drain(buffer, second) == (0, 8)


def test_a_chunk_is_read_in_parts_and_left_in_the_middle():
    buffer = TraceBuffer(1 << 20)
    buffer.append(b"".join(insns(4 * n, 4) for n in range(10)), 40)
    reader = buffer.open()
    assert len(buffer.take(reader, 100).data) == 96
    buffer.close(reader)
    assert drain(buffer, buffer.open()) == (0, 28)


def test_what_nobody_reads_is_kept_up_to_the_limit():
    buffer = filled(100, limit=10 * 232)
    lost, read = drain(buffer, buffer.open())
    assert lost + read == 400 and read == 40 and buffer.dropped == 360


def test_the_writer_waits_for_a_reader_only():
    buffer = filled(20, limit=5 * 232)
    buffer.configure(limit=5 * 232, waits=True, flowing=True)
    buffer.wait_for_room()  # nobody reads
    reader = buffer.open()
    waiting = threading.Thread(target=buffer.wait_for_room)
    waiting.start()
    drain(buffer, reader)
    waiting.join(60)
    assert not waiting.is_alive()
    for number in range(5):
        buffer.append(insns(number, 1), 1)
    waiting = threading.Thread(target=buffer.wait_for_room)
    waiting.start()
    buffer.close(reader)
    waiting.join(60)
    assert not waiting.is_alive()


def test_an_interrupt_ends_the_wait_even_before_it_begins():
    buffer = filled(20, limit=5 * 232)
    buffer.configure(limit=5 * 232, waits=True, flowing=True)
    buffer.open()
    buffer.interrupt()
    buffer.wait_for_room()
    waiting = threading.Thread(target=buffer.wait_for_room)
    waiting.start()
    buffer.interrupt()
    waiting.join(60)
    assert not waiting.is_alive()


# ---- text


def test_lines():
    records = [
        insns(0, 2),
        RECORD.pack(MEM, 1, 2, 0, 0x20, 0xBEEF, 0),
        RECORD.pack(AT, 0, 0, 0, 5, 0x2000, 0),
        RECORD.pack(MEM, 2, 16, 0, 0x30, 0x10, 0xFF),
        RECORD.pack(INSN, 0, 1, 70000, 9, 0xFFFFFFFFFFFFFFFF, 2),
        RECORD.pack(3, 8, 14, 2, 9, 0x1000, 0xDEAD),
        RECORD.pack(3, 0, 6, 0, 9, 0x1000, 0xDEAD),
        RECORD.pack(4, 0, 0x20, 0, 9, 0x1001, 0),
        RECORD.pack(4, 16, 2, 0, 9, 0, 0),
        RECORD.pack(EXIT, 0, 0, 5, 0, 0, 0),
        RECORD.pack(7, 0, 0, 0, 123456789012, 0, 0),
    ]
    table = SymbolTable([(0x1000, "T", "start")])
    text = TraceText(lambda: table)
    expected = [
        "insn 0x1000 start",
        "insn 0x1001 start+0x1",
        "write 0x20 size=2 value=0xbeef at=0x1001 start+0x1",
        "read 0x30 size=16 value=0xff0000000000000010 at=0x2000 by=cpu start+0x1000",
        "insn 0xffffffffffffffff times=70000",
        "exception vector=0xe error=0x2 addr=0xdead at=0x1000 start",
        "exception vector=0x6 at=0x1000 start",
        "interrupt vector=0x20 kind=external at=0x1001 start+0x1",
        "interrupt vector=0x2 kind=nmi at=0x0",
        "dropped 123456789012",
    ]
    assert text.lines(b"".join(records)).decode().splitlines() == expected
    apart = TraceText(lambda: table)
    assert b"".join(map(apart.lines, records)).decode().splitlines() == expected


@given(st.binary(max_size=1000))
def test_any_bytes_are_text(data):
    lines = TraceText(lambda: NOBODY).lines(data)
    assert lines.isascii() and (not lines or lines.endswith(b"\n"))
    count(data)


# ---- settings


def settings_of(text: str, before: TraceSettings = TraceSettings()) -> TraceSettings:  # noqa: B008
    return parse_commands("trace", text)(before)


def test_settings_say_what_they_are():
    settings = settings_of("insn on\nmem on\nrange 0x10-0x1f\ndata 1-2\nmode user,long\nfull drop\nbuffer 2M")
    line = "insn,mem,range=0x10-0x1f,data=0x1-0x2,mode=user+long,full=drop,buffer=2097152"
    assert settings.line() == line
    assert settings_of("off", settings).line().startswith("off,range=")
    assert settings_of("insn on\nrange all\ndata all\nmode all").line() == "insn,full=wait,buffer=16777216"


def test_modes_and_spans():
    assert parse_modes("kernel") == ({"kernel"}, {"real", "protected", "long"})
    assert parse_modes("real,long") == ({"user", "kernel"}, {"real", "long"})
    assert parse_span("0x10-16") == (16, 16)
    for bad in ("", "1", "2-1", "1-", "-1", "1-2-3", "x-y"):
        with pytest.raises(Invalid):
            parse_span(bad)


def test_what_steps_cannot_show():
    settings_of("insn on\nexits on").check_steps("kvm")
    for line in ("mem on", "exceptions on", "interrupts on", "mode kernel"):
        with pytest.raises(Unsupported, match="kvm"):
            settings_of(f"insn on\n{line}").check_steps("kvm")


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(1, 200), st.booleans()), max_size=30),
    st.integers(200, 3000),
)
def test_every_record_has_its_cpu(chunks, reads, limit):
    """However the stream is cut into reads, dropped, left and taken up by the next reader."""
    buffer = TraceBuffer(limit)
    buffer.configure(limit=limit, waits=False, flowing=True)
    for cpu, records in chunks:  # an instruction of CPU N is at N
        buffer.append(b"".join(RECORD.pack(INSN, 0, 1, 1, 0, cpu, 1) for _ in range(records)), records, cpu=cpu)
    reader, whose = buffer.open(), None
    for most, leaves in [*reads, *[(1 << 20, False)] * len(chunks)]:
        if leaves:
            buffer.close(reader)
            reader, whose = buffer.open(), None
        if (piece := buffer.take(reader, most)) is None:
            break
        for kind, _, _, code, _, address, _ in RECORD.iter_unpack(piece.data):
            whose = code if kind == CPU else whose
            assert kind == CPU or address == whose == piece.cpu
        assert cpu_after(piece.data, piece.cpu) == whose == reader.cpu
