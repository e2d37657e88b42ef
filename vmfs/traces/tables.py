"""A trace as text: the lines of the file `trace`, and a table of events as CSV or as JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any, BinaryIO

import msgspec

from vmfs.traces.place import Place
from vmfs.words import exits
from vmfs.words.tracing import ERROR_CODE, IMPLICIT, NMI, SOFTWARE, TraceRecord, instructions_of

COLUMNS = (
    "kind", "cpu", "number", "at", "symbol", "address", "size", "value", "times", "vector", "error", "cause", "count",
)  # fmt: skip
"""`kind`: insn, read, write, exception, interrupt, exit, dropped. `number`: of the instruction. `at`: its address.
`address`, `size`, `value`: of an access or an exit; of an instruction, `size` is its length; of a page fault, `address`
is CR2. `times`: of a repeated instruction. `cause`: of an interrupt external, nmi or software, of an access `cpu` where
the CPU made it by itself, of an exit its name. `count`: events that are missing."""

_PAGE_FAULT = 14
_EXITS = {each.CODE: each.__name__.lower() for each in exits.EXITS}


def events(record: TraceRecord, place: Place) -> Iterator[dict[str, Any]]:
    """A dictionary with some of COLUMNS for each event of a record; numbers that may have 64 bits are text, in
    hexadecimal."""
    at = record.at
    event: dict[str, Any] = {"kind": record.kind, "cpu": record.cpu}
    if record.kind == "dropped":
        yield {**event, "count": record.words[0]}
    elif record.kind == "insn":
        for index, (address, length) in enumerate(instructions_of(record)):
            row = {**event, "number": record.words[0] + index, **_at(address, place), "size": length}
            yield {**row, "times": record.code} if record.code > 1 else row
    elif record.kind == "mem":
        event["kind"] = "write" if record.is_write else "read"
        event |= _at(at, place)
        event |= {"address": hex(record.address), "size": record.size, "value": hex(record.value)}
        yield {**event, "cause": "cpu"} if record.flags & IMPLICIT else event
    elif record.kind == "exit":
        event["kind"] = "exit"
        event |= _at(record.words[2], place)
        event |= {"address": hex(record.address), "size": record.size, "value": hex(record.value)}
        yield {**event, "cause": exit_name(record)}
    else:
        event |= {"number": record.words[0], **_at(at, place), "vector": record.size}
        if record.flags & ERROR_CODE:
            event["error"] = record.code
        if record.kind == "exception" and record.size == _PAGE_FAULT:
            event["address"] = hex(record.words[2])
        if record.kind == "interrupt":
            event["cause"] = interrupt_kind(record)
        yield event


def interrupt_kind(record: TraceRecord) -> str:
    return "nmi" if record.flags & NMI else "software" if record.flags & SOFTWARE else "external"


def exit_name(record: TraceRecord) -> str:
    return _EXITS.get(record.code, str(record.code))


def _at(address: int | None, place: Place) -> dict[str, Any]:
    if address is None:
        return {}
    label = place.label(address)
    return {"at": hex(address), "symbol": label} if label else {"at": hex(address)}


class Csv:
    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._place = place
        self._text = TextIOWrapper(file, encoding="utf-8", newline="")
        self._rows = csv.DictWriter(self._text, COLUMNS, lineterminator="\n")
        self._rows.writeheader()

    def take(self, record: TraceRecord) -> None:
        self._rows.writerows(events(record, self._place))

    def end(self) -> None:
        self._text.detach().flush()


class Json:
    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file, self._place = file, place
        self._encode = msgspec.json.Encoder().encode_lines

    def take(self, record: TraceRecord) -> None:
        self._file.write(self._encode(list(events(record, self._place))))

    def end(self) -> None:
        self._file.flush()


class Text:
    """Lines as a machine's own file `trace` has them, but for those of exits, of which a record has the most important
    words."""

    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file, self._place = file, place
        self._cpus = False  # whether there are several: lines say whose they are then

    def take(self, record: TraceRecord) -> None:
        self._cpus |= record.cpu > 0
        self._file.write("".join(f"{self._line(row)}\n" for row in events(record, self._place)).encode())

    def _line(self, row: dict[str, Any]) -> str:
        kind, at = row["kind"], row.get("at")
        words = [kind]
        if kind == "dropped":
            return f"dropped {row['count']}"
        if kind == "insn":
            words += [at] + ([f"times={row['times']}"] if "times" in row else [])
        elif kind in ("read", "write"):
            words += [row["address"], f"size={row['size']}", f"value={row['value']}", f"at={at}"]
            words += ["by=cpu"] if "cause" in row else []
        elif kind == "exit":
            words += [row["cause"], f"address={row['address']}", f"size={row['size']}", f"value={row['value']}"]
            words += [f"rip={at}"]
        else:
            words += [f"vector={row['vector']:#x}"]
            words += [f"kind={row['cause']}"] if "cause" in row else []
            words += [f"error={row['error']:#x}"] if "error" in row else []
            words += [f"addr={row['address']}"] if "address" in row else []
            words += [f"at={at}"]
        words += [f"cpu={row['cpu']}"] if self._cpus else []
        words += [row["symbol"]] if "symbol" in row else []
        return " ".join(words)

    def end(self) -> None:
        self._file.flush()
