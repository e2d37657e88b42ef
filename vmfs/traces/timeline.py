"""Calls, events and accesses on a time line: Perfetto's own format
(https://perfetto.dev/docs/reference/trace-packet-proto).

Its viewer reads Chrome's JSON, too, but has all of that in memory first, and keeps numbers as doubles, which have 53
bits: no place for a kernel's addresses. Packets of protobuf are written one after the other. The
classes of the packets are those of the package `perfetto`.

The time is the CPU's count of instructions, one a nanosecond: each CPU of several has its own.
"""

from __future__ import annotations

from typing import Any, BinaryIO

from vmfs.traces.calls import Calls
from vmfs.traces.place import Place
from vmfs.traces.tables import exit_name, interrupt_kind
from vmfs.words.errors import Unsupported
from vmfs.words.tracing import ERROR_CODE, TraceRecord

PACKAGE = "perfetto"
_SEQUENCE = 1
_PROCESS = 1  # the machine's track; a CPU's is _FIRST + its number
_FIRST = 16
_PAGE_FAULT = 14
NAMES_MOST = 1 << 16  # before they begin anew


class Timeline:
    def __init__(self, file: BinaryIO, place: Place) -> None:
        try:
            from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos
        except ImportError:
            raise Unsupported(f"the format perfetto needs the package {PACKAGE}: pip install {PACKAGE}") from None
        self._file, self._place, self._protos = file, place, protos
        self._names: dict[str, int] = {}  # interned
        self._cpus: dict[int, _Cpu] = {}
        packet = self._packet()
        packet.sequence_flags = protos.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        packet.track_descriptor.uuid = _PROCESS
        packet.track_descriptor.process.pid = 1
        packet.track_descriptor.process.process_name = place.title or "vmfs"
        self._write(packet)

    def take(self, record: TraceRecord) -> None:
        if record.kind == "dropped":
            for one in self._cpus.values():
                one.calls.gap()
                self._instant(one, "dropped", {"events": record.words[0]})
            return
        cpu = self._cpus.get(record.cpu) or self._cpu(record.cpu)
        if record.kind == "insn":
            cpu.now = record.words[0]
            cpu.calls.instructions(record)
            cpu.now += record.size + record.code - 1
        elif record.kind in ("exception", "interrupt"):
            cpu.now = record.words[0]
            self._event(cpu, record)
            cpu.calls.event(record)
        elif record.kind == "mem":
            words = {"address": record.address, "size": record.size, "value": record.value, "at": record.at}
            self._instant(cpu, "write" if record.is_write else "read", words)
        else:
            words = {"address": record.address, "size": record.size, "value": record.value, "at": record.words[2]}
            self._instant(cpu, f"exit {exit_name(record)}", words)

    def end(self) -> None:
        for cpu in self._cpus.values():
            cpu.calls.gap()
        self._file.flush()

    def _event(self, cpu: _Cpu, record: TraceRecord) -> None:
        words: dict[str, int | str | None] = {"at": record.at}
        if record.flags & ERROR_CODE:
            words["error"] = record.code
        if record.kind == "exception" and record.size == _PAGE_FAULT:
            words["address"] = record.words[2]
        if record.kind == "interrupt":
            words["cause"] = interrupt_kind(record)
        self._instant(cpu, f"{record.kind} {record.size:#x}", words)

    def _cpu(self, number: int) -> _Cpu:
        packet = self._packet()
        packet.track_descriptor.uuid = _FIRST + number
        packet.track_descriptor.parent_uuid = _PROCESS
        packet.track_descriptor.thread.pid = 1
        packet.track_descriptor.thread.tid = _FIRST + number
        packet.track_descriptor.thread.thread_name = f"cpu{number}"
        self._write(packet)
        made = self._cpus[number] = _Cpu(self, number)
        return made

    def _packet(self) -> Any:
        packet = self._protos.TracePacket()
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.sequence_flags = self._protos.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        return packet

    def _of(self, cpu: _Cpu, kind: int, name: str = "") -> Any:
        packet = self._packet()
        packet.timestamp = cpu.now
        packet.track_event.type = kind
        packet.track_event.track_uuid = _FIRST + cpu.number
        if name:
            packet.track_event.name_iid = self._interned(packet, name)
        return packet

    def _interned(self, packet: Any, name: str) -> int:
        number = self._names.get(name)
        if number is None:
            if len(self._names) >= NAMES_MOST:
                self._names.clear()
                packet.sequence_flags |= self._protos.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
            number = self._names[name] = len(self._names) + 1
            packet.interned_data.event_names.add(iid=number, name=name)
        return number

    def begin(self, cpu: _Cpu, name: str) -> None:
        self._write(self._of(cpu, self._protos.TrackEvent.TYPE_SLICE_BEGIN, name))

    def finish(self, cpu: _Cpu) -> None:
        self._write(self._of(cpu, self._protos.TrackEvent.TYPE_SLICE_END))

    def _instant(self, cpu: _Cpu, name: str, words: dict[str, int | str | None]) -> None:
        packet = self._of(cpu, self._protos.TrackEvent.TYPE_INSTANT, name)
        for word, value in words.items():
            if isinstance(value, str):
                packet.track_event.debug_annotations.add(name=word, string_value=value)
            elif value is not None and value < 1 << 64:
                packet.track_event.debug_annotations.add(name=word, pointer_value=value)  # shown in hexadecimal
            elif value is not None:
                packet.track_event.debug_annotations.add(name=word, string_value=hex(value))
        self._write(packet)

    def _write(self, packet: Any) -> None:
        self._file.write(self._protos.Trace(packet=[packet]).SerializeToString())


class _Cpu:
    def __init__(self, line: Timeline, number: int) -> None:
        self.number, self.now = number, 0
        self.calls = Calls(line._place, lambda name: line.begin(self, name), lambda: line.finish(self))
