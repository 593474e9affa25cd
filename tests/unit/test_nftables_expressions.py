"""Expressions, to bytes and back."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.netlink.attributes import DecodeError, be32, nested, text
from rules.nftables import expression_codec
from rules.nftables import expressions as e
from rules.nftables.expression_codec import decode, encode

NUMBERS = st.integers(0, (1 << 32) - 1)
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)
VALUES = st.binary(min_size=1, max_size=16)
VERDICTS = st.builds(e.Verdict, st.integers(-5, 1), st.just("") | NAMES)

EVERY = [
    st.builds(e.Payload, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds(e.Meta, NUMBERS, NUMBERS),
    st.builds(e.MetaSet, NUMBERS, NUMBERS),
    st.builds(e.Ct, NUMBERS, NUMBERS),
    st.builds(e.Fib, NUMBERS, NUMBERS, NUMBERS),
    st.builds(e.Cmp, NUMBERS, NUMBERS, VALUES),
    st.builds(e.Bitwise, NUMBERS, NUMBERS, NUMBERS, VALUES, VALUES),
    st.builds(e.Lookup, NAMES, NUMBERS, NUMBERS),
    st.builds(e.LookupMap, NAMES, NUMBERS, NUMBERS, NUMBERS),
    st.builds(e.Immediate, st.integers(1, 23), VALUES),
    st.builds(e.Decide, VERDICTS),
    st.builds(e.Number, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds(e.Hash, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds(e.DynamicSet, NAMES, NUMBERS, NUMBERS, NUMBERS, st.integers(0, (1 << 64) - 1), NUMBERS),
    # The two lowest flags are the kernel's own.
    st.builds(e.Nat, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS.map(lambda number: number & ~3)),
    st.builds(e.Masquerade, NUMBERS),
    st.builds(e.Reject, NUMBERS, st.integers(0, 255)),
]
ANY = st.one_of(EVERY)


@given(st.lists(ANY, max_size=6).map(tuple))
def test_a_rule_comes_back(rule):
    assert decode(encode(rule)) == rule


def test_the_strategy_has_every_expression():
    assert len(EVERY) == len(expression_codec._FORM_OF)


def test_expressions_of_two_types_are_never_equal():
    # As tuples these would be: a rule that asks for something else would pass for ours.
    assert e.Meta(1, 2) != e.Ct(1, 2)
    assert e.Meta(1, 2) != e.MetaSet(1, 2)
    assert len({e.Meta(1, 2), e.Ct(1, 2), e.MetaSet(1, 2)}) == 3


def test_an_expression_of_somebody_else_is_unknown_and_comes_back_as_it_was():
    counter = e.Unknown("counter", be32(1, 5))
    assert decode(encode([counter])) == (counter,)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("meta", be32(1, 1) + be32(2, 3) + be32(9, 1)),
        ("meta", be32(1, 1)),
        ("ct", be32(1, 1) + be32(2, 2) + nested(3, b"\0")),
        ("cmp", be32(1, 1) + be32(2, 0) + be32(3, 6)),
        ("bitwise", be32(1, 1) + be32(2, 1) + be32(3, 4) + be32(6, 1) + nested(7, be32(1, 1))),
        ("payload", be32(5, 1) + be32(2, 1) + be32(3, 0) + be32(4, 4)),
        ("nat", be32(1, 1) + be32(2, 2) + be32(3, 1) + be32(4, 9) + be32(5, 2)),
        ("masq", be32(1, 16) + be32(1, 16)),
    ],
    ids=[
        "another attribute",
        "one too few",
        "another attribute of ct",
        "a number for a value",
        "a shift",
        "a write to the packet",
        "a range of addresses",
        "an attribute twice",
    ],
)
def test_an_expression_of_ours_in_another_form_is_unknown(name, data):
    encoded = nested(1, text(1, name), nested(2, data))
    assert decode(encoded) == (e.Unknown(name, data),)


def test_what_the_kernel_adds_to_a_translation_is_taken_back():
    told = b"".join(be32(kind, value) for kind, value in ((1, 1), (2, 2), (3, 1), (4, 1), (5, 9), (6, 9), (7, 3)))
    assert decode(nested(1, text(1, "nat"), nested(2, told))) == (e.Nat(1, 2, 1, 9),)


def test_registers_are_numbered_as_the_kernel_tells_them():
    assert [e.register(slot) for slot in range(16)] == [1, 9, 10, 11, 2, 13, 14, 15, 3, 17, 18, 19, 4, 21, 22, 23]


@given(st.binary(max_size=120))
def test_arbitrary_bytes_raise_nothing_but_decode_errors(data):
    with contextlib.suppress(DecodeError):
        decode(data)


@given(st.sampled_from(sorted({form.name for form in expression_codec._FORMS})), st.binary(max_size=60))
def test_arbitrary_attributes_of_a_known_expression_are_unknown_at_worst(name, data):
    (found,) = decode(nested(1, text(1, name), nested(2, data)))
    if isinstance(found, e.Unknown):
        assert (found.name, found.raw) == (name, data)
    else:
        assert isinstance(found, msgspec.Struct)


def test_a_mutated_rule_never_raises_anything_else():
    encoded = bytearray(encode([e.Lookup("cluster-ips", 1), e.Decide(e.Verdict(e.GOTO, "internal"))]))
    for place in range(len(encoded)):
        for bit in range(8):
            encoded[place] ^= 1 << bit
            with contextlib.suppress(DecodeError):
                decode(bytes(encoded))
            encoded[place] ^= 1 << bit
