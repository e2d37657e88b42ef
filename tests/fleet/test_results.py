"""What a worker sends is taken as data, and never as code."""

from __future__ import annotations

import datetime
import os
import pickle
from collections import Counter, OrderedDict, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.fleet.results import Raw, Refused, pack_value, result_of, unpack_value
from vmfs.words.exits import Hlt

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
    for value in (Counter("aab"), OrderedDict(a=1), deque([1]), datetime.datetime(2026, 1, 1), range(5), Hlt(rip=5)):
        assert unpack_value(pack_value(value)) == value
    numpy = pytest.importorskip("numpy")
    value = numpy.arange(10.0).reshape(2, 5)
    assert (unpack_value(pack_value(value)) == value).all()


class Hostile:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_is_not_run(tmp_path):
    mark = tmp_path / "ran"
    for protocol in range(6):
        data = pickle.dumps([1, Hostile(str(mark))], protocol=protocol)
        result = result_of(Raw(0, value=data), "input", None)
        assert result.kind == "value" and "not taken from a worker" in result.error and result.value is None
    assert not mark.exists()
    with pytest.raises(Refused, match="not taken"):
        pack_value(Hostile(str(mark)))
    assert not mark.exists()


def test_what_cannot_be_pickled_has_a_sentence():
    for value, sentence in ((lambda: 1, "cannot be pickled"), (Raising(), "cannot be pickled: ValueError: no")):
        with pytest.raises(Refused, match=sentence):
            pack_value(value)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Refused):
        pack_value(deep)


class Raising:
    def __reduce__(self):
        raise ValueError("no")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_sentence(data):
    try:
        unpack_value(data)
    except Refused as failure:
        assert str(failure)
