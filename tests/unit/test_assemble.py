"""Outcomes put together: contested frontends, shared endpoints, deltas."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from proxy.assemble import Assembler, Conflict, Precedence, precedence_of
from proxy.compute import Outcome
from proxy.objects import Key
from rules.forwarding import (
    Backend,
    Delta,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Protocol,
    Refusal,
    Route,
    apply_delta,
    difference,
)
from tests.builders import at, endpoints, service

A, B, C = Key("ns", "a"), Key("ns", "b"), Key("ns", "c")
VIP = at("1.2.3.4:80")


def age(key: Key, created: str) -> Precedence:
    return Precedence(not created, created, key.namespace, key.name)


def route(label: str, *hosts: int) -> Route:
    chosen = frozenset(Backend(bytes([10, 0, 0, host]), 80) for host in hosts)
    return Route(kind=Kind.EXTERNAL_IP, backends=chosen, refusal=None if chosen else Refusal.REJECT, label=label)


def outcome(label: str, *frontends: Frontend, hosts: tuple[int, ...] = ()) -> Outcome:
    hairpins = frozenset(Endpoint(bytes([10, 0, 0, host]), Protocol.TCP, 80) for host in hosts)
    return Outcome(routes={frontend: route(label, *hosts) for frontend in frontends}, hairpins=hairpins)


def contested() -> Assembler:
    """An address that three Services claim: a is the oldest, c the youngest."""
    assembler = Assembler(Family.IPV4)
    assembler.update(C, age(C, "2024-01-03T00:00:00Z"), outcome("c", VIP))
    assembler.update(A, age(A, "2024-01-01T00:00:00Z"), outcome("a", VIP))
    assembler.update(B, age(B, "2024-01-02T00:00:00Z"), outcome("b", VIP))
    return assembler


def test_the_oldest_service_has_a_contested_frontend() -> None:
    assembler = contested()
    assert assembler.table().routes == {VIP: route("a")}
    assert assembler.conflicts() == (Conflict(VIP, A, (B, C)),)


def test_the_next_in_line_takes_over_when_the_winner_goes() -> None:
    assembler = contested()
    assembler.take_delta()
    assembler.update(A, age(A, ""), None)
    assert assembler.take_delta() == Delta(changed={VIP: route("b")})
    assembler.update(C, age(C, ""), None)
    assert assembler.take_delta() == Delta()
    assert assembler.conflicts() == ()
    assembler.update(B, age(B, ""), Outcome())
    assert assembler.take_delta() == Delta(removed=frozenset({VIP}))
    assert assembler.table().routes == {}


def test_a_loser_that_changes_changes_nothing_until_it_wins() -> None:
    assembler = contested()
    assembler.take_delta()
    assembler.update(B, age(B, "2024-01-02T00:00:00Z"), outcome("b", VIP, hosts=(7,)))
    assert assembler.take_delta() == Delta(hairpins_added=endpoints("10.0.0.7"))
    assembler.update(A, age(A, ""), None)
    assert assembler.take_delta() == Delta(changed={VIP: route("b", 7)})


def test_a_service_that_was_made_anew_goes_to_the_end_of_the_line() -> None:
    assembler = contested()
    same = outcome("a", VIP)
    assembler.update(A, age(A, "2024-02-01T00:00:00Z"), same)
    assert assembler.conflicts() == (Conflict(VIP, B, (C, A)),)
    assert assembler.table().routes == {VIP: route("b")}


def test_of_one_age_namespace_and_name_decide_and_the_undated_come_last() -> None:
    dated = precedence_of(service("z", created="2024-01-01T00:00:00Z").metadata)
    undated = [precedence_of(service(name).metadata) for name in ("a", "b")]
    assert sorted([*reversed(undated), dated]) == [dated, *undated]


def test_an_endpoint_behind_two_services_stays_until_both_are_gone() -> None:
    assembler = Assembler(Family.IPV4)
    for key in (A, B):
        assembler.update(key, age(key, ""), outcome(key.name, at(f"1.2.3.{ord(key.name)}:80"), hosts=(1,)))
    assert assembler.take_delta().hairpins_added == endpoints("10.0.0.1")
    assembler.update(A, age(A, ""), None)
    assert assembler.take_delta().hairpins_removed == frozenset()
    assembler.update(B, age(B, ""), None)
    assert assembler.take_delta().hairpins_removed == endpoints("10.0.0.1")


def test_what_is_changed_and_changed_back_is_no_change() -> None:
    assembler = Assembler(Family.IPV4)
    first = outcome("a", VIP, hosts=(1,))
    assembler.update(A, age(A, ""), first)
    assembler.take_delta()
    assembler.update(A, age(A, ""), outcome("a", VIP, hosts=(2,)))
    assembler.set_node(NodeFacts(masquerade_all=True))
    assembler.update(A, age(A, ""), None)
    assembler.update(A, age(A, ""), outcome("a", VIP, hosts=(1,)))
    assembler.set_node(NodeFacts())
    assert not assembler.take_delta()


def test_facts_of_the_node_are_in_the_table_and_in_one_delta() -> None:
    assembler = Assembler(Family.IPV6)
    facts = NodeFacts(masquerade_all=True)
    assembler.set_node(facts)
    assert assembler.table() == ForwardingTable(family=Family.IPV6, node=facts)
    assert assembler.take_delta() == Delta(node=facts)
    assert assembler.take_delta() == Delta()


def test_a_table_does_not_change_with_later_updates() -> None:
    assembler = contested()
    table = assembler.table()
    assembler.update(A, age(A, ""), None)
    assert table.routes == {VIP: route("a")}


# Few frontends, ages and endpoints, so that most updates contend for something.
_KEYS = st.sampled_from([A, B, C, Key("other", "a")])
_FRONTENDS = st.sampled_from([VIP, at("1.2.3.5:80"), at("*:3001"), at("1.2.3.4:80", Protocol.UDP)])
_OUTCOMES = st.builds(
    lambda label, frontends, hosts: outcome(label, *frontends, hosts=tuple(hosts)),
    st.sampled_from(["x", "y"]),
    st.sets(_FRONTENDS, max_size=3),
    st.sets(st.integers(1, 3), max_size=3),
)
_CREATED = st.sampled_from(["", "2024-01-01T00:00:00Z", "2024-01-02T00:00:00Z"])
_STEPS = st.lists(
    st.tuples(_KEYS, _CREATED, st.none() | _OUTCOMES, st.booleans() | st.none(), st.booleans()), max_size=30
)


def at_once(known: Mapping[Key, tuple[Precedence, Outcome]], facts: NodeFacts) -> ForwardingTable:
    """The table of outcomes by its definition: the first in precedence has each frontend."""
    routes: dict[Frontend, Route] = {}
    hairpins: set[Endpoint] = set()
    for _, each in sorted(known.values(), key=lambda pair: pair[0]):
        hairpins |= each.hairpins
        for frontend, claimed in each.routes.items():
            routes.setdefault(frontend, claimed)
    return ForwardingTable(family=Family.IPV4, node=facts, routes=routes, hairpins=frozenset(hairpins))


@given(_STEPS)
def test_any_sequence_of_updates_is_the_table_at_once_and_deltas_lead_to_it(
    steps: list[tuple[Key, str, Outcome | None, bool | None, bool]],
) -> None:
    assembler = Assembler(Family.IPV4)
    known: dict[Key, tuple[Precedence, Outcome]] = {}
    facts = NodeFacts()
    applied = ForwardingTable(family=Family.IPV4)
    for key, created, result, masquerade_all, take in steps:
        assembler.update(key, age(key, created), result)
        known.pop(key, None)
        if result is not None:
            known[key] = age(key, created), result
        if masquerade_all is not None:
            facts = NodeFacts(masquerade_all=masquerade_all)
            assembler.set_node(facts)
        expected = at_once(known, facts)
        assert assembler.table() == expected
        for conflict in assembler.conflicts():
            assert [conflict.winner, *conflict.losers] == sorted(
                (name for name, (_, each) in known.items() if conflict.frontend in each.routes),
                key=lambda name: known[name][0],
            )
            assert conflict.losers
        if take:
            delta = assembler.take_delta()
            assert delta == difference(applied, expected)
            applied = apply_delta(applied, delta)
            assert applied == expected
    everywhere = [frontend for _, each in known.values() for frontend in each.routes]
    assert {conflict.frontend for conflict in assembler.conflicts()} == {
        frontend for frontend in everywhere if everywhere.count(frontend) > 1
    }
    for key in known:
        assembler.update(key, age(key, ""), None)
    assert assembler.table() == ForwardingTable(family=Family.IPV4, node=facts)
