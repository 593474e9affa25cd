"""The static part as values: from facts to rules and back, and what makes one into another."""

import ipaddress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.forwarding import (
    Family,
    InputInterface,
    InputInterfacePrefix,
    NodeFacts,
    Prefix,
    SourcePrefix,
    merge_prefixes,
    parse_prefix,
)
from rules.netlink.attributes import HEADER, messages
from rules.nftables import names
from rules.nftables.adopt import facts_of
from rules.nftables.chains import DEPENDS, INTERNAL, MARK_FOR_MASQUERADE, pick_chain, pick_count
from rules.nftables.expressions import GOTO, Decide, Lookup, LookupMap, Verdict
from rules.nftables.layout import COMMON_COUNTS, TABLE, build
from rules.nftables.messages import CATCH_ALL, INTERVAL_END, Element, decode_elements
from rules.nftables.objects import RuleSpec, decode_chain, decode_rule, decode_set, decode_table
from rules.nftables.replace import messages_to_create, messages_to_replace
from rules.nftables.sets import PICK, element_prefixes, prefix_elements
from rules.nftables.state import state_of

NEW_TABLE, NEW_CHAIN, NEW_RULE, NEW_SET, NEW_ELEMENT = (10 << 8 | kind for kind in (0, 3, 6, 9, 12))
IPV4, IPV6 = Family.IPV4, Family.IPV6
INTERFACES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=15)


def addresses(family):
    return st.binary(min_size=family.address_bytes, max_size=family.address_bytes)


def prefixes(family):
    lengths = st.integers(0, family.address_bytes * 8)
    return st.builds(
        lambda address, length: parse_prefix(f"{ipaddress.ip_address(address)}/{length}"), addresses(family), lengths
    )


def all_facts(family):
    return st.builds(
        NodeFacts,
        mark=st.integers(0, 31).map(lambda bit: 1 << bit),
        masquerade_all=st.booleans(),
        detector=st.one_of(
            st.none(),
            st.builds(SourcePrefix, prefixes(family)),
            st.builds(InputInterface, INTERFACES),
            st.builds(InputInterfacePrefix, INTERFACES),
        ),
        node_port_addresses=st.none() | st.frozensets(addresses(family), max_size=3),
        loopback_node_ports=st.booleans() if family is IPV4 else st.just(False),
        reject_closed_ports=st.booleans(),
        service_cidrs=st.lists(prefixes(family), max_size=4).map(merge_prefixes),
    )


@st.composite
def layouts(draw):
    family = draw(st.sampled_from(Family))
    return (
        family,
        draw(all_facts(family)),
        {
            "counts": draw(st.frozensets(st.integers(1, 8191), max_size=3)),
            "timeouts": draw(st.frozensets(st.integers(1, 86400), max_size=3)),
            "lengths": draw(st.frozensets(st.integers(0, family.address_bytes * 8), max_size=3)),
        },
    )


def read(static, facts):
    gates = [Element(address) for address in facts.node_port_addresses or ()]
    return facts_of(static, prefix_elements(facts.service_cidrs), gates)


@settings(max_examples=25)
@given(layouts())
def test_the_facts_are_read_from_the_rules_that_they_made(chosen):
    family, facts, use = chosen
    found = read(state_of(build(facts, family, **use)), facts)
    assert found.damage == frozenset()
    # A detector counts for masqueradeAll's chain too, but is asked elsewhere: nothing of it is lost.
    assert found.facts == facts
    assert found.counts == use["counts"] | set(COMMON_COUNTS)
    assert found.timeouts == use["timeouts"]
    assert found.lengths == use["lengths"]


def received(layout):
    """A state as a kernel would tell it that had been sent the messages for `layout`."""
    sets, chains, rules, picks = {}, {}, {}, []
    table = None
    for message in messages_to_create(layout):
        (whole,) = messages(message)
        payload = message[HEADER.size :]
        if whole.kind == NEW_TABLE:
            table = decode_table(payload)
        elif whole.kind == NEW_SET:
            spec = decode_set(payload)[1]
            sets[spec.name] = spec
        elif whole.kind == NEW_CHAIN:
            chain = decode_chain(payload)[1]
            chains[chain.name] = chain
        elif whole.kind == NEW_RULE:
            listed = decode_rule(payload + bytes((12, 0, 3, 0)) + bytes(8))[1]
            rules.setdefault(listed.chain, []).append(listed.rule)
        elif whole.kind == NEW_ELEMENT:
            picks += decode_elements([payload])
    chains = {name: chain._replace(rules=tuple(rules.get(name, ()))) for name, chain in chains.items()}
    return state_of(layout)._replace(table=table, sets=sets, chains=chains, picks=tuple(picks))


@settings(max_examples=25)
@given(layouts())
def test_the_messages_that_create_it_say_all_of_it(chosen):
    family, facts, use = chosen
    layout = build(facts, family, **use)
    assert received(layout) == state_of(layout)


@settings(max_examples=25)
@given(layouts())
def test_what_is_as_it_should_be_needs_no_messages(chosen):
    family, facts, use = chosen
    layout = build(facts, family, **use)
    assert messages_to_replace(state_of(layout), layout) == ([], False)


FACTS = NodeFacts(detector=SourcePrefix(parse_prefix("10.244.0.0/16")), service_cidrs=(parse_prefix("10.96.0.0/16"),))
LAYOUT = build(FACTS, IPV4, counts=[70], timeouts=[600, 10800], lengths=[24, 32])
STATE = state_of(LAYOUT)
WITH_RULES = [chain.name for chain in LAYOUT.chains if chain.rules and (pick_count(chain.name) or 0) < 2]


def with_rules(name, rules):
    return STATE._replace(chains={**STATE.chains, name: STATE.chains[name]._replace(rules=tuple(rules))})


def repaired_chains(static):
    replacement = messages_to_replace(static, LAYOUT)
    assert not replacement.recreated
    return {
        decode_rule(message[HEADER.size :] + bytes((12, 0, 3, 0)) + bytes(8))[1].chain
        for message in replacement.messages
        if next(iter(messages(message))).kind == NEW_RULE
    }


@pytest.mark.parametrize("name", WITH_RULES)
def test_a_missing_rule_an_extra_one_and_two_changed_places_are_damage_of_their_chain(name):
    rules = STATE.chains[name].rules
    strange = RuleSpec((Decide(Verdict(0)),))
    for place in range(len(rules)):
        without = with_rules(name, rules[:place] + rules[place + 1 :])
        assert any(f"chain {name}" in sentence for sentence in read(without, FACTS).damage), place
        if place < len(rules) - 1 or len(rules) > 1:
            assert repaired_chains(without) == {name}
        extra = with_rules(name, (*rules[:place], strange, *rules[place:]))
        assert any(f"chain {name}" in sentence for sentence in read(extra, FACTS).damage), place
        assert repaired_chains(extra) == {name}
    if len(rules) > 1:
        moved = with_rules(name, (*rules[1:], rules[0]))
        assert any(f"chain {name}" in sentence for sentence in read(moved, FACTS).damage)


def test_damage_is_said_in_whole_sentences():
    rules = STATE.chains["services"].rules
    assert read(with_rules("services", (*rules[1:], rules[0])), FACTS).damage == {
        "the rules of chain services are in another order than they should be"
    }
    assert read(with_rules("services", rules[1:]), FACTS).damage == {"chain services lacks its rule 1"}
    assert read(with_rules("services", (*rules, rules[0])), FACTS).damage == {
        "rule 1 of chain services should not be there"
    }
    assert read(with_rules("services", (rules[1], *rules[1:])), FACTS).damage == {
        "rule 1 of chain services is another than it should be"
    }


def test_comments_on_rules_and_chains_are_not_damage():
    chain = STATE.chains["services"]
    commented = chain._replace(comment="x", rules=tuple(rule._replace(comment="why") for rule in chain.rules))
    static = STATE._replace(chains={**STATE.chains, "services": commented})
    assert read(static, FACTS).damage == frozenset()
    assert messages_to_replace(static, LAYOUT) == ([], False)


def test_chains_sets_and_picks_that_are_missing_or_strange_are_damage():
    chains = {name: chain for name, chain in STATE.chains.items() if name != "to-slot"}
    chains["other"] = STATE.chains["to-slot"]._replace(name="other")
    sets = {name: spec for name, spec in STATE.sets.items() if name != names.MEMBERS}
    sets["mine"] = STATE.sets[names.MEMBERS]._replace(name="mine")
    elsewhere = STATE.picks[1]._replace(verdict=Verdict(GOTO, pick_chain(9)))
    picks = (elsewhere, *STATE.picks[2:], Element(b"", verdict=elsewhere.verdict, flags=CATCH_ALL))
    static = STATE._replace(chains=chains, sets=sets, picks=picks, table=STATE.table._replace(flags=1))
    assert read(static, FACTS).damage == {
        "chain to-slot is missing",
        "chain other should not be there",
        "set members is missing",
        "set mine should not be there",
        "map pick has nothing for 1",
        "map pick leads 2 elsewhere than it should",
        "map pick should have nothing for all others",
        "the table is switched off (dormant)",
    }


@pytest.mark.parametrize("hook", [("filter", 1, 5, 1), ("filter", 2, 0, 1), None])
def test_a_chain_on_another_hook_is_damage(hook):
    chain = STATE.chains["filter-input"]
    static = STATE._replace(
        chains={**STATE.chains, "filter-input": chain._replace(hook=hook and chain.hook.__class__(*hook))}
    )
    assert read(static, FACTS).damage == {"chain filter-input hangs on another hook than it should"}
    assert messages_to_replace(static, LAYOUT).recreated == (hook is None)


def test_another_policy_is_damage_and_set_right_in_place():
    chain = STATE.chains["filter-forward"]
    static = STATE._replace(
        chains={**STATE.chains, "filter-forward": chain._replace(hook=chain.hook._replace(policy=0))}
    )
    assert read(static, FACTS).damage == {"chain filter-forward has another policy than it should"}
    replacement = messages_to_replace(static, LAYOUT)
    assert (len(replacement.messages), replacement.recreated) == (1, False)


@pytest.mark.parametrize(
    "change", [{"size": 5}, {"timeout": 1}, {"flags": 0}, {"key_length": 16}, {"data_type": 7}, {"other": (8,)}]
)
def test_a_set_of_another_kind_is_damage_and_makes_the_table_anew(change):
    static = STATE._replace(sets={**STATE.sets, names.STICKY: STATE.sets[names.STICKY]._replace(**change)})
    assert read(static, FACTS).damage == {"set sticky is of another kind than it should be"}
    assert messages_to_replace(static, LAYOUT).recreated


def test_how_nft_prints_a_set_is_not_damage():
    static = STATE._replace(sets={name: spec._replace(userdata=b"") for name, spec in STATE.sets.items()})
    assert read(static, FACTS).damage == frozenset()
    assert messages_to_replace(static, LAYOUT) == ([], False)


def test_elements_that_no_facts_explain_are_damage():
    half = facts_of(STATE, [Element(b"\x0a\0\0\0"), Element(b"\x0b\0\0\0")], [])
    assert half.damage == {"set service-cidrs holds half an interval"}
    unasked = facts_of(STATE, [], [Element(b"\x0a\0\0\1")])
    assert unasked.damage == {"set node-port-addresses holds addresses that no rule asks for"}


def test_a_table_of_another_layout_is_made_anew_and_one_without_comment_is_not():
    old = STATE._replace(table=STATE.table._replace(comment="sluice layout=0"))
    assert messages_to_replace(old, LAYOUT).recreated
    stripped = STATE._replace(table=STATE.table._replace(comment=""))
    assert messages_to_replace(stripped, LAYOUT) == ([], False)
    assert messages_to_replace(None, LAYOUT) == (messages_to_create(LAYOUT), True)


@settings(max_examples=25)
@given(all_facts(IPV4), all_facts(IPV4))
def test_other_facts_touch_only_the_chains_that_depend_on_them(before, after):
    old, new = build(before, IPV4), build(after, IPV4)
    changed = {one.name for one, other in zip(old.chains, new.chains, strict=True) if one != other}
    assert changed <= DEPENDS.facts
    assert old.sets == new.sets


@settings(max_examples=25)
@given(st.frozensets(st.integers(1, 1 << 20)), st.frozensets(st.integers(0, 32)), st.frozensets(st.integers(1, 8191)))
def test_other_use_touches_only_the_chains_that_depend_on_it(timeouts, lengths, counts):
    base = {chain.name: chain for chain in build(FACTS, IPV4).chains}
    for use, expected in (
        ({"timeouts": timeouts}, DEPENDS.timeouts),
        ({"lengths": lengths}, DEPENDS.lengths),
        ({"counts": counts}, frozenset()),
    ):
        chains = build(FACTS, IPV4, **use).chains
        assert {chain.name for chain in chains if chain.name in base and base[chain.name] != chain} <= expected
        assert {pick_count(chain.name) for chain in chains if chain.name not in base} <= counts


def test_no_chain_that_changes_binds_a_map():
    for family in Family:
        layout = build(FACTS if family is IPV4 else NodeFacts(), family, timeouts=[600], lengths=[24])
        for chain in layout.chains:
            if chain.name in DEPENDS.facts | DEPENDS.lengths | DEPENDS.timeouts:
                assert not any(isinstance(step, LookupMap) for rule in chain.rules for step in rule.expressions)


@settings(max_examples=25)
@given(layouts())
def test_every_name_that_a_rule_uses_is_there(chosen):
    family, facts, use = chosen
    layout = build(facts, family, **use)
    sets, chains = {spec.name for spec in layout.sets}, {chain.name for chain in layout.chains}
    used = {PICK}
    for chain in layout.chains:
        for step in (step for rule in chain.rules for step in rule.expressions):
            if isinstance(step, Lookup | LookupMap):
                used.add(step.set)
            if isinstance(step, Decide) and step.verdict.chain:
                assert step.verdict.chain in chains
    unused = {names.EXTERNAL_IPS, names.LOAD_BALANCER_IPS, names.NODE_PORT_ADDRESSES}
    assert used - unused == sets - unused


def test_the_detector_is_found_by_majority_when_somebody_changed_one_place():
    chain = STATE.chains[INTERNAL]
    (first, *rest) = chain.rules
    other = build(msgspec.structs.replace(FACTS, detector=InputInterface("cni0")), IPV4)
    changed = next(each for each in other.chains if each.name == INTERNAL).rules[0]
    found = read(with_rules(INTERNAL, (changed, *rest)), FACTS)
    assert found.facts == FACTS
    assert found.damage == {"rule 1 of chain internal is another than it should be"}
    assert first.expressions[-1] == Decide(Verdict(GOTO, MARK_FOR_MASQUERADE))


@pytest.mark.parametrize(
    ("facts", "use", "words"),
    [
        (NodeFacts(detector=InputInterface("x" * 16)), {}, "no interface"),
        (NodeFacts(detector=InputInterfacePrefix("")), {}, "no interface"),
        (NodeFacts(detector=SourcePrefix(parse_prefix("fd00::/8"))), {}, "no network of IPv4"),
        (NodeFacts(mark=0), {}, "no mask"),
        (NodeFacts(), {"counts": [8192]}, "8192 backends"),
        (NodeFacts(), {"counts": [0]}, "0 backends"),
        (NodeFacts(), {"timeouts": [0]}, "0 s"),
        (NodeFacts(), {"lengths": [33]}, "33 bits"),
    ],
)
def test_what_no_rule_can_say_is_refused_by_name(facts, use, words):
    with pytest.raises(ValueError, match=words):
        build(facts, IPV4, **use)


def test_loopback_answers_node_ports_for_ipv4_alone():
    assert build(NodeFacts(loopback_node_ports=True), IPV6) == build(NodeFacts(), IPV6)


@pytest.mark.parametrize("name", ["pick-", "pick-0", "pick-01", "pick-8192", "pick-x", "pick", "pick-²", "sluice"])
def test_names_that_only_look_like_a_chain_of_a_count(name):
    assert pick_count(name) is None


# --- sets of intervals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(Family), ids=lambda family: family.label)
@given(data=st.data())
def test_prefixes_come_back_from_a_set_of_intervals(family, data):
    merged = merge_prefixes(data.draw(st.lists(prefixes(family), max_size=6)))
    elements = prefix_elements(merged)
    assert element_prefixes(elements, family) == merged
    assert element_prefixes(reversed(elements), family) == merged


def test_neighbours_are_intervals_of_their_own_and_an_interval_of_several_prefixes_is_those():
    pair = (parse_prefix("10.0.1.0/24"), parse_prefix("10.0.2.0/24"))
    opening, first, end, second, last = prefix_elements(pair)
    assert opening == Element(bytes(4), flags=INTERVAL_END)
    assert (first, end) == (Element(b"\x0a\0\1\0"), Element(b"\x0a\0\2\0", flags=INTERVAL_END))
    assert (second, last) == (Element(b"\x0a\0\2\0"), Element(b"\x0a\0\3\0", flags=INTERVAL_END))
    assert element_prefixes([first, last], IPV4) == pair


def test_an_interval_that_reaches_the_last_address_has_no_end():
    assert prefix_elements([Prefix(b"\xff\0\0\0", 8)])[-1] == Element(b"\xff\0\0\0")
    assert prefix_elements([Prefix(bytes(4), 0)]) == [Element(bytes(4))]


@given(st.lists(st.builds(lambda key, flags: Element(key, flags=flags), st.binary(max_size=20), st.integers(0, 3))))
def test_arbitrary_elements_are_prefixes_or_none(elements):
    found = element_prefixes(elements, IPV4)
    assert found is None or isinstance(found, tuple)


def test_the_table_has_the_products_name():
    assert TABLE == "sluice"
