"""What a function returned, as bytes: msgpack, with an extension type for each class that it has not itself.

They come from a process in which a guest, an input or a function may have done anything. So no code of theirs runs
where they are taken apart, and there is no pickle: that of a NumPy array alone can have addresses in it. Arrays are in
NumPy's own format for files, without objects.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

import msgpack  # Dask has it

from vmfs.library import exits as of_library
from vmfs.words import exits

VALUE_MOST = 64 << 20  # bytes
_INT_MOST = 8192  # bytes of a number
_NESTED_MOST = 40  # classes in each other: msgpack takes 40 KiB of the stack for each
_EXITS = {
    cls.__name__: cls
    for module in (exits, of_library)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, exits.Exit)
}


class Refused(Exception):
    """A value has something that is not taken."""


def _datetime(moment: str, zone: timezone | None, fold: int) -> datetime:
    return datetime.fromisoformat(moment).replace(tzinfo=zone, fold=fold)


def _time(moment: str, zone: timezone | None, fold: int) -> time:
    return time.fromisoformat(moment).replace(tzinfo=zone, fold=fold)


def _clock(value: Any) -> tuple[Any, ...]:
    return value.replace(tzinfo=None).isoformat(), value.tzinfo, value.fold


def _number(data: bytes) -> int:
    if len(data) > _INT_MOST:
        raise Refused(f"a value has a number of {len(data)} bytes; up to {_INT_MOST} come back")
    return int.from_bytes(data, "little", signed=True)


def _array(data: bytes) -> Any:
    from numpy.lib import format as npy

    return npy.read_array(io.BytesIO(data), allow_pickle=False)


def _array_data(array: Any) -> tuple[bytes]:
    from numpy.lib import format as npy

    out = io.BytesIO()
    npy.write_array(out, array, allow_pickle=False)
    return (out.getvalue(),)


def _exit(name: str, values: dict[str, Any]) -> exits.Exit:
    return _EXITS[name](**values)


def _exit_data(value: exits.Exit) -> tuple[str, dict[str, Any]]:
    name = type(value).__name__
    return name, {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}


# By class: what is packed for it, and what that is given to. Its place is the code of the extension type.
_CLASSES: dict[type, tuple[Callable[[Any], tuple[Any, ...]], Callable[..., Any]]] = {
    tuple: (lambda value: (list(value),), tuple),
    int: (lambda value: (value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True),), _number),
    set: (lambda value: (list(value),), set),
    frozenset: (lambda value: (list(value),), frozenset),
    complex: (lambda value: (value.real, value.imag), complex),
    range: (lambda value: (value.start, value.stop, value.step), range),
    slice: (lambda value: (value.start, value.stop, value.step), slice),
    OrderedDict: (lambda value: ([list(item) for item in value.items()],), OrderedDict),
    Counter: (lambda value: (dict(value),), Counter),
    deque: (lambda value: (list(value), value.maxlen), deque),
    date: (lambda value: (value.isoformat(),), date.fromisoformat),
    datetime: (_clock, _datetime),
    time: (_clock, _time),
    timedelta: (lambda value: (value.days, value.seconds, value.microseconds), timedelta),
    timezone: (lambda value: value.__getinitargs__(), timezone),
    Decimal: (lambda value: (str(value),), Decimal),
    Fraction: (lambda value: (value.numerator, value.denominator), Fraction),
    UUID: (lambda value: (value.hex,), UUID),
    exits.Exit: (_exit_data, _exit),
}
_CODES = {cls: code for code, cls in enumerate(_CLASSES)}
_MAKERS = [make for _, make in _CLASSES.values()]
_CODE_ARRAY, _CODE_SCALAR = 100, 101


class _Packing:
    def __init__(self) -> None:
        self._depth = 0

    def pack(self, value: object) -> bytes:
        return msgpack.packb(value, default=self._other, strict_types=True, unicode_errors="surrogatepass")

    def _other(self, value: Any) -> msgpack.ExtType:
        cls: type = exits.Exit if type(value) in _EXITS.values() else type(value)
        if cls in _CODES:
            code, parts = _CODES[cls], _CLASSES[cls][0]
        elif (code := _numpy_code(value)) is not None:
            parts = _array_data
        else:
            raise Refused(f"a value has a {cls.__module__}.{cls.__qualname__}: return plain data")
        self._depth += 1
        if self._depth > _NESTED_MOST:
            raise Refused("the value is nested too deep")
        packed = self.pack(list(parts(value)))
        self._depth -= 1
        return msgpack.ExtType(code, packed)


def _numpy_code(value: object) -> int | None:
    if type(value).__module__ != "numpy":
        return None
    import numpy

    if type(value) is numpy.ndarray:
        return _CODE_ARRAY
    return _CODE_SCALAR if isinstance(value, numpy.generic) else None


class _Unpacking:
    def __init__(self) -> None:
        self._depth = 0

    def unpack(self, data: bytes) -> Any:
        return msgpack.unpackb(data, ext_hook=self._other, strict_map_key=False, unicode_errors="surrogatepass")

    def _other(self, code: int, data: bytes) -> Any:
        self._depth += 1
        if self._depth > _NESTED_MOST:
            raise Refused("the value is nested too deep")
        parts = self.unpack(data)
        self._depth -= 1
        if code == _CODE_ARRAY:
            return _array(*parts)
        if code == _CODE_SCALAR:
            return _array(*parts)[()]
        return _MAKERS[code](*parts)


def pack_value(value: object) -> bytes:
    """Refused, with a sentence, for what `unpack_value` would not take."""
    try:
        data = _Packing().pack(value)
    except Refused:
        raise
    except Exception as failure:  # of a class's own code, and of what is nested too deep for msgpack
        raise Refused(f"the value is no plain data: {type(failure).__name__}: {failure}") from None
    if len(data) > VALUE_MOST:
        raise Refused(f"the value has {len(data)} bytes; up to {VALUE_MOST} come back")
    unpack_value(data)
    return data


def unpack_value(data: bytes) -> Any:
    """The value. Refused, with a sentence, for what is none."""
    try:
        return _Unpacking().unpack(data)
    except Refused:
        raise
    except Exception as failure:
        raise Refused(f"the value is damaged: {type(failure).__name__}: {failure}") from None
