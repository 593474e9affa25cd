"""Netlink attributes and messages, to bytes and back."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.netlink.attributes import (
    DUMP,
    MAX_VALUE,
    DecodeError,
    attribute,
    attribute_list,
    attributes,
    be32,
    be32_of,
    be64,
    message,
    messages,
    nested,
    parse_be32,
    parse_be64,
    parse_text,
    parse_u8,
    text,
    text_of,
    u8,
)

KINDS = st.integers(1, 0x3FFF)


@given(st.lists(st.tuples(KINDS, st.binary(max_size=40))))
def test_attributes_come_back_in_order_whatever_their_lengths(listed):
    assert attribute_list(b"".join(attribute(kind, value) for kind, value in listed)) == listed


@given(KINDS, st.integers(-(1 << 31), (1 << 32) - 1))
def test_numbers_are_in_network_order_and_negative_ones_complements(kind, value):
    encoded = be32(kind, value)
    assert encoded == struct.pack("=HH", 8, kind) + (value & 0xFFFFFFFF).to_bytes(4, "big")
    assert be32_of(attributes(encoded), kind) == value & 0xFFFFFFFF


def test_every_kind_of_value_comes_back():
    found = attributes(be64(1, 1 << 40) + u8(2, 200) + text(3, "pick-é") + nested(4, be32(1, 7)))
    assert parse_be64(found[1]) == 1 << 40
    assert parse_u8(found[2]) == 200
    assert text_of(found, 3) == "pick-é"
    assert be32_of(attributes(found[4]), 1) == 7


def test_what_is_missing_is_the_default_or_an_error():
    assert be32_of({}, 1, 5) == 5
    assert text_of({}, 1, "x") == "x"
    with pytest.raises(DecodeError, match="attribute 1 is missing"):
        be32_of({}, 1)
    with pytest.raises(DecodeError, match="attribute 2 is missing"):
        text_of({}, 2)


def test_a_value_longer_than_an_attribute_can_hold_is_refused():
    assert len(attribute(1, bytes(MAX_VALUE))) == MAX_VALUE + 4 + 1
    with pytest.raises(ValueError, match="do not fit"):
        attribute(1, bytes(MAX_VALUE + 1))


def test_messages_of_one_datagram_come_back_with_their_payloads():
    found = list(messages(message(10 << 8 | 1, DUMP, b"abcde") + message(3, 0, b"")))
    assert [(each.kind, each.flags, each.sequence, each.payload) for each in found] == [
        (10 << 8 | 1, DUMP, 0, b"abcde"),
        (3, 0, 0, b""),
    ]


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_decode_errors(data):
    for parse in (attribute_list, lambda raw: list(messages(raw)), parse_be32, parse_be64, parse_u8, parse_text):
        with contextlib.suppress(DecodeError):
            parse(data)


@given(st.lists(st.tuples(KINDS, st.binary(max_size=20)), min_size=1), st.data())
def test_attributes_cut_short_are_an_error_or_fewer(listed, data):
    whole = b"".join(attribute(kind, value) for kind, value in listed)
    cut = data.draw(st.integers(0, len(whole)))
    try:
        assert attribute_list(whole[:cut]) == listed[: len(attribute_list(whole[:cut]))]
    except DecodeError:
        assert cut < len(whole)
