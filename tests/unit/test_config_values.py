"""Types of configuration values: Go's spellings of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.values import Type, format_duration, parse_bool, parse_duration, parse_flag, parse_float, parse_int

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("+5s", 5 * SECOND),
        ("-1.5h", -5400 * SECOND),
        ("1h2m3.5s", 3723 * SECOND + SECOND // 2),
        (".5s", SECOND // 2),
        ("5.s", 5 * SECOND),
        ("1us", 1000),
        ("1µs", 1000),
        ("1ns1ms", 1_000_001),
        ("1m1m", 120 * SECOND),
        ("2562047h47m16.854775807s", (1 << 63) - 1),
    ],
)
def test_durations_are_read_as_go_reads_them(text, nanoseconds):
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    "text", ["", "s", "1", "+", "-", ".s", "1x", "1h-2m", " 1s", "1 s", "1e3s", "2562048h", "\u0661s"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1100, "1.1µs"),
        (100_000_000, "100ms"),
        (30 * SECOND, "30s"),
        (900 * SECOND, "15m0s"),
        (86400 * SECOND, "24h0m0s"),
        (-1_500_000_000, "-1.5s"),
    ],
)
def test_durations_are_printed_as_go_prints_them(nanoseconds, text):
    assert format_duration(nanoseconds) == text


@given(st.integers(-(1 << 63) + 1, (1 << 63) - 1))
def test_a_printed_duration_is_read_again_unchanged(nanoseconds):
    assert parse_duration(format_duration(nanoseconds)) == nanoseconds


@pytest.mark.parametrize(("text", "value"), [("1", True), ("T", True), ("true", True), ("0", False), ("False", False)])
def test_flags_spell_truth_as_go_does(text, value):
    assert parse_bool(text) is value


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("On", True), ("NO", False), ("false", False)])
def test_files_spell_truth_as_yaml_1_1_does(text, value):
    assert parse_bool(text, yaml=True) is value


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (parse_bool, "yes"),
        (parse_int, "1.5"),
        (parse_int, "2147483648"),
        (parse_int, "9" * 5000),
        (parse_float, "nan"),
        (parse_float, "inf"),
        (parse_float, "x"),
    ],
)
def test_values_of_another_type_are_refused(parser, text):
    with pytest.raises(ValueError, match=r"is not|out of range"):
        parser(text)


@given(kind=st.sampled_from(Type), text=st.text(max_size=30))
def test_any_text_of_a_flag_is_a_value_or_one_line_of_complaint(kind, text):
    complaint = ""
    try:
        parse_flag(kind, text)
    except ValueError as error:
        complaint = str(error)
    assert complaint.isprintable()
