"""Tables, chains, sets, rules and elements as messages, and what a kernel's dump of them says."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.forwarding import Family
from rules.netlink.attributes import (
    HEADER,
    NESTED,
    DecodeError,
    attribute,
    attributes,
    be32,
    be64,
    messages,
    nested,
    text,
)
from rules.netlink.transaction import attributes_of
from rules.nftables import objects, userdata
from rules.nftables.expressions import GOTO, Decide, Meta, Verdict
from rules.nftables.messages import (
    CATCH_ALL,
    INTERVAL_END,
    Element,
    add_elements,
    decode_elements,
    delete_elements,
    flush_elements,
    get_elements,
    key_at,
    remove_elements,
)

TABLE = "sluice"
FAMILIES = pytest.mark.parametrize("family", list(Family), ids=lambda family: family.label)
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=30)
COMMENTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=120)
NUMBERS = st.integers(0, (1 << 32) - 1)


def payload(message):
    return message[HEADER.size :]


def one(found):
    (only,) = found
    return only


# --- elements ------------------------------------------------------------------------------------------------


NOTHING = st.just(b"")
UNSAID = st.just("")
NO_VERDICT = st.none()
NO_FLAGS = st.just(0)


def elements_of(key, data=NOTHING, comment=UNSAID, verdict=NO_VERDICT, flags=NO_FLAGS):
    return st.builds(Element, key, data, comment, verdict, flags)


@st.composite
def element_lists(draw):
    """Elements of one set: all keys of one length, all data of one length."""
    key, data = draw(st.sampled_from([4, 8, 12, 16, 40])), draw(st.sampled_from([0, 4, 8, 20]))
    element = elements_of(
        st.binary(min_size=key, max_size=key), st.binary(min_size=data, max_size=data), UNSAID | COMMENTS
    )
    return draw(st.lists(element, max_size=30))


@given(element_lists())
def test_elements_come_back_in_order(elements):
    sent = add_elements(Family.IPV4, TABLE, "cluster-ip", elements)
    assert decode_elements(map(payload, sent)) == elements


VERDICTS = st.builds(Verdict, st.just(GOTO), NAMES)
WORDS = st.binary(min_size=4, max_size=4)
ODD = st.one_of(
    elements_of(WORDS, comment=COMMENTS, verdict=VERDICTS),
    elements_of(WORDS, flags=st.just(INTERVAL_END)),
    elements_of(st.just(b""), WORDS, COMMENTS, flags=st.just(CATCH_ALL)),
    elements_of(st.binary(min_size=1, max_size=9), st.binary(max_size=9), COMMENTS),
)


@given(st.lists(ODD, max_size=12))
def test_elements_of_every_form_come_back_side_by_side(elements):
    sent = add_elements(Family.IPV6, TABLE, "pick", elements)
    assert decode_elements(map(payload, sent)) == elements


def test_an_element_is_encoded_as_nft_encodes_it():
    (sent,) = add_elements(Family.IPV4, "t", "s", [Element(b"\x0a\x60\x00\x01", b"\x03\x20\x00\x00", "web")])
    value = attribute(1, b"\x0a\x60\x00\x01")
    data = attribute(1, b"\x03\x20\x00\x00")
    element = nested(1, nested(1, value), nested(2, data), attribute(6, b"\0\4web\0"))
    assert attributes_of(payload(sent)) == text(1, "t") + text(2, "s") + nested(3, element)
    (header,) = messages(sent)
    assert (header.kind, header.flags, header.payload[0]) == (10 << 8 | 12, 1 | 0x400, 2)


def test_many_elements_are_split_below_the_longest_attribute():
    elements = [Element(number.to_bytes(40), bytes(20), f"namespace/name-{number}:port") for number in range(3000)]
    sent = add_elements(Family.IPV6, TABLE, "x", elements)
    assert len(sent) > 3
    for message in sent:
        (whole,) = messages(message)
        assert len(attributes(attributes_of(whole.payload))[3]) <= 0xFFFF - 4
    assert decode_elements(map(payload, sent)) == elements


def test_no_elements_are_no_messages():
    assert add_elements(Family.IPV4, TABLE, "x", []) == []
    assert delete_elements(Family.IPV4, TABLE, "x", []) == []


def test_deletions_have_the_key_and_nothing_else_but_flags():
    (sent,) = delete_elements(Family.IPV4, TABLE, "x", [b"abcd"])
    assert next(iter(messages(sent))).kind == 10 << 8 | 14
    assert decode_elements([payload(sent)]) == [Element(b"abcd")]
    gone = [Element(b"abcd", b"1234", "web"), Element(b"efgh", flags=INTERVAL_END)]
    (sent,) = remove_elements(Family.IPV4, TABLE, "x", gone)
    assert decode_elements([payload(sent)]) == [Element(b"abcd"), Element(b"efgh", flags=INTERVAL_END)]


def test_flushing_and_asking_name_the_set_alone():
    for message, kind in ((flush_elements(Family.IPV4, TABLE, "x"), 14), (get_elements(Family.IPV4, TABLE, "x"), 13)):
        (whole,) = messages(message)
        assert whole.kind == 10 << 8 | kind
        assert attributes_of(whole.payload) == text(1, TABLE) + text(2, "x")


@given(element_lists().filter(bool), st.data())
def test_an_error_leads_back_to_its_element(elements, data):
    (sent,) = add_elements(Family.IPV4, TABLE, "x", elements)
    wanted = data.draw(st.integers(0, len(elements) - 1))
    before = add_elements(Family.IPV4, TABLE, "x", elements[:wanted])
    start = len(before[0]) if before else len(add_elements(Family.IPV4, TABLE, "x", elements[:1])[0]) - _size(sent, 0)
    assert key_at(sent, start) == elements[wanted].key
    assert key_at(sent, 0) is None
    assert key_at(sent, len(sent) + 4) is None


def _size(message, place):
    raw = attributes(attributes_of(payload(message)))[3]
    for _ in range(place):
        raw = raw[int.from_bytes(raw[:2], "little") :]
    return int.from_bytes(raw[:2], "little")


def test_what_the_kernel_counts_and_times_is_passed_over():
    key = nested(1, attribute(1, b"abcdefgh"))
    data = nested(2, attribute(1, b"1234"))
    timed = nested(1, key, data, be64(4, 600000), be64(5, 1234))
    plain = nested(1, key, data)
    found = decode_elements([b"\2\0\0\0" + nested(3, plain, timed, plain)])
    assert found == [Element(b"abcdefgh", b"1234")] * 3


def test_kernels_that_flag_nesting_and_kernels_that_do_not_are_read_alike():
    elements = [Element(b"abcd", b"1234", "x" * length) for length in range(5)]
    (sent,) = add_elements(Family.IPV4, TABLE, "x", elements)
    raw = bytearray(payload(sent))
    for place in range(4, len(raw) - 1, 4):
        if raw[place + 3] == NESTED >> 8:
            raw[place + 3] = 0
    assert decode_elements([bytes(raw)]) == elements


@given(st.binary(max_size=200))
def test_arbitrary_lists_of_elements_raise_nothing_but_decode_errors(data):
    for raw in (data, b"\2\0\0\0" + data, b"\2\0\0\0" + attribute(3, data)):
        with contextlib.suppress(DecodeError):
            decode_elements([raw])


@given(element_lists(), st.data())
def test_mutated_lists_of_elements_raise_nothing_but_decode_errors(elements, data):
    for message in add_elements(Family.IPV4, TABLE, "x", elements):
        raw = bytearray(payload(message))
        for _ in range(3):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(DecodeError):
            decode_elements([bytes(raw)])


# --- comments ------------------------------------------------------------------------------------------------


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300))
def test_a_comment_comes_back_as_far_as_the_kernel_has_room(comment):
    encoded = userdata.encode_comment(comment)
    assert len(encoded) <= 256
    found = userdata.parse_comment(encoded)
    if len(comment.encode()) <= 251:
        assert found == comment
    else:
        # Cut off, perhaps in a character, which then makes it unreadable.
        assert comment.startswith(found)


def test_the_longest_label_is_kept_and_nft_sees_what_it_takes():
    label = "n" * 63 + "/" + "s" * 63 + ":" + "p" * 63
    encoded = userdata.encode_comment(label)
    assert userdata.parse_comment(encoded) == label
    assert userdata.fields(encoded)[0] == label[:127].encode() + b"\0"


def test_a_comment_that_nft_cut_short_is_read_as_far_as_it_goes():
    encoded = userdata.encode_comment("x" * 150)
    kept = userdata.field(0, userdata.fields(encoded)[0])
    assert userdata.parse_comment(kept) == "x" * 127


@given(st.binary(max_size=256))
def test_hostile_userdata_is_a_text_or_nothing(data):
    assert isinstance(userdata.parse_comment(data), str)


def test_userdata_that_makes_no_sense_is_no_comment():
    for data in (b"", b"\0", b"\0\5abc\0", b"\0\3\xff\xff\0", b"\7\2x\0"):
        assert userdata.parse_comment(data) == ""


# --- tables, chains, rules, sets -----------------------------------------------------------------------------


@FAMILIES
def test_a_table_comes_back(family):
    spec = objects.TableSpec(TABLE, "sluice layout=1", 1)
    sent = objects.add_table(family, spec)
    assert sent[HEADER.size] == family.af
    assert objects.decode_table(payload(sent)) == spec


@given(NAMES, st.none() | st.builds(objects.Hook, NAMES, st.integers(0, 5), st.integers(-400, 400), st.integers(0, 1)))
def test_a_chain_comes_back(name, hook):
    spec = objects.ChainSpec(name, (), hook, "what it is for")
    assert objects.decode_chain(payload(objects.add_chain(Family.IPV4, TABLE, spec))) == (TABLE, spec)


@given(
    st.builds(
        objects.SetSpec,
        name=NAMES,
        key_type=NUMBERS,
        key_length=NUMBERS,
        data_type=NUMBERS,
        data_length=NUMBERS,
        flags=NUMBERS.map(lambda flags: flags | objects.MAP),
        size=NUMBERS,
        timeout=st.integers(0, (1 << 64) - 1),
        fields=st.lists(NUMBERS, max_size=4).map(tuple),
        userdata=st.binary(max_size=250),
        other=st.just(()),
    )
)
def test_a_set_comes_back_with_all_its_properties(spec):
    assert objects.decode_set(payload(objects.add_set(Family.IPV6, TABLE, spec))) == (TABLE, spec)


def test_what_no_set_of_ours_has_is_seen():
    spec = objects.SetSpec("x", 7, 4)
    raw = payload(objects.add_set(Family.IPV4, TABLE, spec)) + be32(8, 1)
    assert objects.decode_set(raw) == (TABLE, spec._replace(other=(8,)))


def test_a_rule_comes_back_with_chain_and_handle():
    rule = objects.RuleSpec((Meta(1, 2), Decide(Verdict(GOTO, "pick-1"))), "why")
    raw = payload(objects.add_rule(Family.IPV4, TABLE, "dispatch", rule)) + be64(3, 1 << 33)
    assert objects.decode_rule(raw) == (TABLE, objects.ListedRule("dispatch", 1 << 33, rule))


@given(st.binary(max_size=160))
def test_arbitrary_objects_raise_nothing_but_decode_errors(data):
    decoders = (objects.decode_table, objects.decode_chain, objects.decode_set, objects.decode_rule)
    for raw in (data, b"\2\0\0\0" + data):
        for decode in decoders:
            with contextlib.suppress(DecodeError):
                decode(raw)
