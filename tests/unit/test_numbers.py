"""Numbers as people write them: what parses, what does not, and that nothing else ever happens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.words.errors import Invalid
from vmfs.words.numbers import parse_duration, parse_number, parse_size


@pytest.mark.parametrize(
    ("text", "bits", "value"),
    [
        ("0", 64, 0),
        ("010", 64, 10),  # no octal surprise
        ("0x10", 64, 16),
        ("0XfF", 8, 255),
        ("0o17", 64, 15),
        ("0b101", 64, 5),
        ("-1", 16, 0xFFFF),
        ("-0x80", 8, 0x80),
        ("18446744073709551615", 64, 2**64 - 1),
        ("0x" + "f" * 32, 128, 2**128 - 1),
    ],
)
def test_number(text, bits, value):
    assert parse_number(text, bits) == value


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "0x", "1_000", "١", "1.0", "+1", "--1", "256", "-129", "x", "0x1g", "1" * 5000]
)
def test_not_a_number_of_8_bits(text):
    with pytest.raises(Invalid):
        parse_number(text, 8)


@given(st.integers(0, 2**64 - 1), st.sampled_from(["{}", "{:#x}", "{:#o}", "{:#b}"]))
def test_number_round_trip(value, form):
    assert parse_number(form.format(value)) == value


@given(st.text(max_size=60))
def test_any_text_is_a_number_or_invalid(text):
    for parse in (parse_number, parse_size, parse_duration):
        try:
            assert parse(text) >= 0
        except Invalid as error:
            assert str(error)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("128M", 128 << 20),
        ("2 GiB", 2 << 30),
        ("1k", 1024),
        ("0x1000", 4096),
        ("3TB", 3 << 40),
    ],
)
def test_size(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize(("text", "value"), [
    ("100ms", 0.1), ("1.5s", 1.5), ("20us", 20e-6), ("5ns", 5e-9), ("14m", 840), ("1.5h", 5400),
])  # fmt: skip
def test_duration(text, value):
    assert parse_duration(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["100", "ms", "1e3s", "-1s", "1.s", "nans", "1M", "1hs", "1h30m"])
def test_not_a_duration(text):
    with pytest.raises(Invalid):
        parse_duration(text)
