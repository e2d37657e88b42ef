"""What comes back of a case, and how its value crosses from a process that is not trusted."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vmfs.words import exits

VALUE_MOST = 64 << 20  # bytes of a pickled value

# What a value may be made of, beside what pickle has without names: by module, the names.
_ALLOWED = {
    "builtins": {"set", "frozenset", "bytearray", "complex", "range", "slice"},
    "collections": {"OrderedDict", "deque", "Counter"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "uuid": {"UUID"},
    "_codecs": {"encode"},  # bytes, of protocol 2
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.numeric": {"_frombuffer"},
    "vmfs.words.exits": {cls.__name__ for cls in vars(exits).values() if isinstance(cls, type)},
    "vmfs.library.exits": {"Interrupt", "Syscall"},
}


class Refused(Exception):
    """A value has something that is not taken."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise Refused(f"a value has a {module}.{name}, which is not taken from a worker: return plain data")


def pack_value(value: object) -> bytes:
    """Refused, with a sentence, for what `unpack_value` would not take."""
    try:
        data = pickle.dumps(value, protocol=5)
    except RecursionError:
        raise Refused("the value is nested too deep to be pickled") from None
    except Exception as failure:  # what a class's own code raises, too
        raise Refused(f"the value cannot be pickled: {type(failure).__name__}: {failure}") from None
    if len(data) > VALUE_MOST:
        raise Refused(f"the value has {len(data)} bytes; up to {VALUE_MOST} come back")
    unpack_value(data)
    return data


def unpack_value(data: bytes) -> Any:
    """A value from a process in which a guest, an input or a function may have done anything: no code of its runs here.
    Refused for what is no plain data."""
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Refused:
        raise
    except Exception as failure:
        raise Refused(f"the value is damaged: {type(failure).__name__}: {failure}") from None


class Raw(msgspec.Struct, omit_defaults=True):
    """What a runner and its worker say of a case; the fields are those of `Result`."""

    number: int
    value: bytes = b""
    kind: str = ""
    error: str = ""
    exit: str = ""
    console: str = ""
    output: str = ""
    why: str = ""
    coverage: bytes = b""
    saved: bytes = b""
    seconds: float = 0
    worker: str = ""


@dataclass(frozen=True)
class Result:
    """What became of a case. Texts of a guest may have anything in them, escape sequences, too: print their repr."""

    number: int
    """Which input it was, from 0."""
    input: Any
    value: Any = None
    """What the function returned."""
    kind: str = ""
    """"" where it went well. `raised`, `timeout`, `memory`, `disk`, `processes`, `died` (its process ended), `value`
    (what it returned is no plain data), `template`, `worker` (each worker that had it died)."""
    error: str = ""
    """The sentence; where the function raised, its traceback."""
    exit: str = ""
    """The machine's last exit, as the file `exit` has it."""
    console: str = ""
    output: str = ""
    """The end of what the function printed."""
    why: str = ""
    coverage: bytes = field(default=b"", repr=False)
    saved: Path | None = None
    """Of a case that failed, where it was asked for: what `vmfs load`, or `Machine.load` of the library, takes."""
    seconds: float = 0
    worker: str = ""

    @property
    def is_ok(self) -> bool:
        return not self.kind


def result_of(raw: Raw, given: Any, saved: Path | None) -> Result:
    kind, error, value = raw.kind, raw.error, None
    if not kind:
        try:
            value = unpack_value(raw.value)
        except Refused as failure:
            kind, error = "value", str(failure)
    return Result(
        raw.number,
        given,
        value,
        kind,
        error,
        raw.exit,
        raw.console,
        raw.output,
        raw.why,
        raw.coverage,
        saved,
        raw.seconds,
        raw.worker,
    )
