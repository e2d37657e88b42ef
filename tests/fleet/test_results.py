"""What a worker sends is taken as data, and never as code."""

from __future__ import annotations

import datetime
import io
import os
import pickle
import uuid
from collections import Counter, OrderedDict, deque
from decimal import Decimal
from fractions import Fraction

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.fleet.results import Raw, result_of
from vmfs.fleet.values import _CODE_ARRAY, Refused, pack_value, unpack_value
from vmfs.words.exits import Debug, Hlt

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner) | st.sets(st.integers())
    ),
)


@settings(max_examples=50)
@given(PLAIN)
def test_plain_data_comes_as_it_is(value):
    assert unpack_value(pack_value(value)) == value


def test_some_classes_come_too():
    zone = datetime.timezone(datetime.timedelta(hours=2), "there")
    moment = datetime.datetime(2026, 1, 1, 2, 3, 4, 5, zone, fold=1)
    for value in (
        Counter("aab"), OrderedDict(b=1, a=2), deque([1], 5), moment, moment.date(), moment.timetz(), range(5),
        slice(1, None, 2), 1 << 200, -1 << 63, -1 << 64, frozenset([(1, 2)]), {(1, 2): {3}}, 1j, Fraction(1, 3),
        Decimal("1.50"), uuid.UUID(int=7), "\udc80", Hlt(rip=5),
        Debug(rip=1, cause="step", also=(Debug(rip=1, cause="io"),)),
    ):  # fmt: skip
        again = unpack_value(pack_value(value))
        assert again == value and type(again) is type(value)
    numpy = pytest.importorskip("numpy")
    numbers = numpy.arange(10.0).reshape(2, 5)
    for value in (numbers, numpy.zeros(3, "i2,f4"), numpy.float32(1.5), numpy.array(["a", "b"])):
        again = unpack_value(pack_value(value))
        assert (again == value).all() and type(again) is type(value) and again.dtype == value.dtype


class Hostile:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def ext(code: int, *parts: object) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb(parts))


def test_code_is_not_run(tmp_path):
    """A pickle; a NumPy array, whose objects would be addresses; what is nested so deep that the stack ends."""
    mark = tmp_path / "ran"
    numpy = pytest.importorskip("numpy")
    objects = io.BytesIO()
    numpy.lib.format.write_array(objects, numpy.array([Hostile(str(mark))]), allow_pickle=True)
    fields = io.BytesIO()
    numpy.lib.format.write_array(fields, numpy.zeros(1, [("a", object)]), allow_pickle=True)
    nested = ext(0, [])
    for _ in range(5000):
        nested = ext(0, nested)
    for data in (
        *(pickle.dumps([1, Hostile(str(mark))], protocol=protocol) for protocol in range(6)),
        msgpack.packb(ext(_CODE_ARRAY, objects.getvalue())),
        msgpack.packb(ext(_CODE_ARRAY, fields.getvalue())),
        msgpack.packb(ext(_CODE_ARRAY, b"")),
        msgpack.packb(ext(1, bytes(100_000))),
        msgpack.packb(ext(99)),
        msgpack.packb(nested),
    ):
        result = result_of(Raw(0, value=data), "input", None)
        assert result.kind == "value" and result.value is None, result
    assert not mark.exists()
    with pytest.raises(Refused, match="plain data"):
        pack_value(Hostile(str(mark)))
    with pytest.raises(Refused):
        pack_value(numpy.array([Hostile(str(mark))]))
    assert not mark.exists()


def test_what_is_no_plain_data_has_a_sentence():
    for value, sentence in ((lambda: 1, "a builtins.function: return plain"), (1 << 100_000, "12501 bytes")):
        with pytest.raises(Refused, match=sentence):
            pack_value(value)
    for kind in (lambda inner: [inner], lambda inner: (inner,)):
        deep = kind(1)
        for _ in range(100_000):
            deep = kind(deep)
        with pytest.raises(Refused):
            pack_value(deep)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_sentence(data):
    try:
        unpack_value(data)
    except Refused as failure:
        assert str(failure)
