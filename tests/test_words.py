"""Numbers and names in words."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvis.words import count, is_are, listed, percent, short, size, visible


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (1000, "1,000 layers"), (1234567, "1,234,567 layers")],
)
def test_things_are_counted_in_singular_or_plural(number: int, expected: str) -> None:
    assert count(number, "layer") == expected


def test_the_verb_follows_the_number() -> None:
    assert [is_are(number) for number in (0, 1, 2, 11)] == ["are", "is", "are", "are"]


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ([3], "channel 3"),
        ([3, 5], "channels 3, 5"),
        ([3, 5, 8, 9], "channels 3, 5, 8, 9"),
        ([3, 5, 8, 9, 11], "channels 3, 5, 8, 9 and 1 more"),
        (range(20), "channels 0, 1, 2, 3 and 16 more"),
    ],
)
def test_channels_are_named_up_to_four(channels: list[int], expected: str) -> None:
    assert listed(np.array(channels)) == expected


def test_how_many_channels_are_named_can_be_chosen() -> None:
    assert listed(np.arange(3), most=1) == "channels 0 and 2 more"


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.996, "100 %"),
        (0.5, "50 %"),
        (0.0999, "10 %"),
        (0.0949, "9.5 %"),
        (0.01, "1.0 %"),
        (0.009999, "1.0 %"),
        (0.000034, "0.0034 %"),
        (1e-6, "0.00010 %"),
        (9e-7, "less than 0.0001 %"),
        (5e-324, "less than 0.0001 %"),
    ],
)
def test_a_share_is_a_percentage_of_two_digits(share: float, expected: str) -> None:
    assert percent(share) == expected


@given(st.floats(1e-6, 1))
def test_a_percentage_is_within_its_last_digit_of_the_share(share: float) -> None:
    match = re.fullmatch(r"([\d.]+) %", percent(share))
    assert match
    assert float(match[1]) == pytest.approx(100 * share, rel=0.05)
    assert len(match[1].replace(".", "").lstrip("0")) == (3 if match[1] == "100" else 2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1, "1"),
        (8.1234, "8.12"),
        (56.14, "56.1"),
        (999.4, "999"),
        (999.6, "1k"),
        (56_123, "56.1k"),
        (999_700, "1M"),
        (2.5e8, "250M"),
        (9.999e8, "1G"),
        (3.21e11, "321G"),
        (9.999e11, "1e+12"),
        (3e20, "3e+20"),
        (0.00123, "0.00123"),
    ],
)
def test_a_ratio_has_three_digits_and_a_suffix(value: float, expected: str) -> None:
    assert short(value) == expected


@given(st.floats(1e-3, 1e12, exclude_max=True))
def test_a_short_ratio_is_within_its_last_digit_of_the_value(value: float) -> None:
    match = re.fullmatch(r"([\d.]+|1e\+12)([kMG]?)", short(value))
    assert match
    unit = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]]
    assert float(match[1]) * unit == pytest.approx(value, rel=0.005001)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("features.0.conv", "features.0.conv"),
        ("größe 層 🙂", "größe 層 🙂"),
        ("a\nb", "a\\nb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\u202eb", "a\\u202eb"),  # turns the text after it around
        ("a\u200bb\ufeff", "a\\u200bb\\ufeff"),  # cannot be seen
        ("a\u00a0b\ud800", "a\\xa0b\\ud800"),
    ],
)
def test_characters_that_steer_the_text_around_them_are_written_out(text: str, expected: str) -> None:
    assert visible(text) == expected


@given(st.text())
def test_no_control_character_stays(text: str) -> None:
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", visible(text))
    assert visible(visible(text)) == visible(text)


def test_a_byte_is_one_byte_also_where_it_was_rounded() -> None:
    assert [size(number) for number in (0.4, 1, 1.2, 1.6, 999.6)] == ["0 bytes", "1 byte", "1 byte", "2 bytes", "1 kB"]
