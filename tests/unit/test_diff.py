"""Two tables apart: nothing is missed, nothing is made up, and the words are these."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.dataplane import Capabilities
from rules.diff import Drift, Presence, compare, fit, lines, summary, to_data
from rules.forwarding import (
    Endpoint,
    Family,
    ForwardingTable,
    InputInterface,
    Kind,
    NodeFacts,
    Protocol,
    Refusal,
    Route,
    SourcePrefix,
    parse_address,
    parse_prefix,
)
from tests import strategies
from tests.builders import at, backends

ALL = Capabilities(loopback_node_ports=True)

WEB = Route(kind=Kind.CLUSTER_IP, backends=backends("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"), label="b/web:http")
BALANCER = Route(
    kind=Kind.LOAD_BALANCER,
    backends=backends("10.0.0.1", "10.0.0.2"),
    local_backends=backends("10.0.0.1"),
    affinity=60,
    source_ranges=(parse_prefix("192.0.2.0/24"),),
    label="b/web:http",
)
DNS = Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT, label="a/dns")
WANTED = ForwardingTable(
    family=Family.IPV4,
    node=NodeFacts(
        detector=SourcePrefix(parse_prefix("10.244.0.0/16")),
        node_port_addresses=frozenset([parse_address("192.168.0.1")]),
        service_cidrs=(parse_prefix("10.96.0.0/12"),),
    ),
    routes={at("10.96.0.2:80"): WEB, at("1.2.3.4:80"): BALANCER, at("10.96.0.1:53"): DNS},
    hairpins=frozenset([Endpoint(parse_address("10.0.0.1"), Protocol.TCP, 80)]),
)


def changed(**routes_by_address):
    routes = dict(WANTED.routes)
    for address, route in routes_by_address.items():
        routes[at(address)] = route
    return routes


def text(drift):
    return "\n".join(lines(drift))


def test_equal_tables_have_no_drift():
    drift = compare(WANTED, WANTED)
    assert not drift
    assert summary(drift) == "nothing"
    assert text(drift) == ""


def test_the_words_of_everything_that_can_differ():
    held = msgspec.structs.replace(
        WANTED,
        node=NodeFacts(mark=1, masquerade_all=True, detector=InputInterface("cni0"), reject_closed_ports=False),
        routes={
            at("1.2.3.4:80"): msgspec.structs.replace(
                BALANCER,
                backends=backends("10.0.0.1", "10.9.9.9"),
                local_backends=None,
                affinity=0,
                source_ranges=(),
                label="",
            ),
            at("10.96.0.1:53"): msgspec.structs.replace(DNS, refusal=Refusal.DROP),
            at("10.96.0.66:80"): Route(kind=Kind.CLUSTER_IP, backends=backends("10.6.6.6"), affinity=5),
        },
        hairpins=frozenset([Endpoint(parse_address("10.0.0.7"), Protocol.UDP, 53)]),
        damage=frozenset(["rule 3 of chain services should not be there"]),
    )
    drift = compare(WANTED, held)
    assert text(drift) == (
        """\
a/dns  ClusterIP 10.96.0.1:53/TCP
  - without backend: rejected
  + without backend: dropped
b/web:http  ClusterIP 10.96.0.2:80/TCP
  - is missing; backend: 10.0.0.1:80, 10.0.0.2:80, 10.0.0.3:80 +1 more
b/web:http  LoadBalancer 1.2.3.4:80/TCP
  - service: b/web:http
  + service: none
  - policy: Local
  + policy: Cluster
  - affinity: 60s
  + affinity: none
  - admits: source ranges
  + admits: everybody
  - backend: 10.0.0.2:80
  + backend: 10.9.9.9:80
  - backend for outsiders: 10.0.0.1:80
  - source range: 192.0.2.0/24
-  ClusterIP 10.96.0.66:80/TCP
  + should not be there; affinity: 5s; backend: 10.6.6.6:80
node
  - mark: 0x4000
  + mark: 0x1
  - masquerade: as needed
  + masquerade: every ClusterIP connection
  - local pods: sources in 10.244.0.0/16
  + local pods: what comes in by cni0
  - node ports on: 192.168.0.1
  + node ports on: every address but loopback
  - closed ports of a ClusterIP: rejected
  + closed ports of a ClusterIP: left alone
  - service CIDRs: 10.96.0.0/12
  + service CIDRs: none
hairpins
  - hairpin: 10.0.0.1:80/TCP
  + hairpin: 10.0.0.7:53/UDP
damage
  + rule 3 of chain services should not be there"""
    )
    assert summary(drift) == (
        "1 frontend missing, 1 frontend extra, 2 frontends changed, 6 facts of the node, 2 hairpins, "
        "1 sentence of damage"
    )


def test_a_table_that_is_not_there_at_all():
    drift = compare(WANTED, None)
    assert drift.absent
    assert {each.presence for each in drift.frontends} == {Presence.MISSING}
    assert text(drift) == "- the whole table, with 3 frontends"
    assert summary(drift) == "the whole table is missing"
    assert compare(ForwardingTable(family=Family.IPV6), None), "an empty table is wanted too"


def test_data_says_what_the_words_say():
    held = msgspec.structs.replace(WANTED, routes={**WANTED.routes, at("10.96.0.2:80"): DNS}, damage=frozenset("x"))
    data = to_data(compare(WANTED, held))
    assert json.loads(json.dumps(data)) == data
    assert data["equal"] is False
    assert data["damage"] == ["x"]
    (frontend,) = data["frontends"]
    assert (frontend["service"], frontend["frontend"], frontend["drift"]) == (
        "b/web:http",
        "10.96.0.2:80/TCP",
        "changed",
    )
    assert {"what": "backend", "wanted": "10.0.0.4:80", "held": None} in frontend["changes"]


def test_frontends_that_are_being_changed_are_not_compared():
    held = msgspec.structs.replace(WANTED, routes={at("10.96.0.1:53"): DNS, at("9.9.9.9:9"): DNS})
    assert not compare(WANTED, held, but=[at("10.96.0.2:80"), at("1.2.3.4:80"), at("9.9.9.9:9")])


def test_tables_of_two_families_are_not_compared():
    with pytest.raises(ValueError, match="IPv6"):
        compare(WANTED, ForwardingTable(family=Family.IPV6))


@given(st.sampled_from(Family).flatmap(lambda family: st.tuples(strategies.tables(family), strategies.tables(family))))
def test_there_is_drift_exactly_where_tables_differ(pair):
    wanted, held = pair
    drift = compare(wanted, held)
    assert bool(drift) == (wanted != held)
    assert bool(drift) == bool(text(drift))
    assert drift == msgspec.structs.replace(drift, frontends=tuple(drift.frontends))
    names = {each.frontend for each in drift.frontends}
    every = wanted.routes.keys() | held.routes.keys()
    assert names == {each for each in every if wanted.routes.get(each) != held.routes.get(each)}
    assert all(each.changes or each.presence is not Presence.CHANGED for each in drift.frontends)
    back = compare(held, wanted)
    assert {(each.what, each.held, each.wanted) for each in back.node} == set(drift.node)
    assert len(back) == len(drift)


@given(
    st.sampled_from(Family).flatmap(strategies.tables),
    st.builds(
        Capabilities,
        labels=st.booleans(),
        affinity=st.booleans(),
        source_ranges=st.booleans(),
        hairpins=st.booleans(),
        loopback_node_ports=st.booleans(),
        reject_closed_ports=st.booleans(),
        drop_unallocated=st.booleans(),
        max_backends=st.sampled_from([0, 1, 2, 100]),
    ),
)
def test_what_a_dataplane_cannot_store_is_no_drift_and_nothing_else_is_forgiven(table, capabilities):
    stored = fit(table, capabilities)
    assert fit(stored, capabilities) == stored
    assert not compare(table, stored, capabilities)
    assert bool(compare(table, stored, ALL)) == (stored != table)
    if capabilities == msgspec.structs.replace(ALL, max_backends=capabilities.max_backends) and table.routes:
        frontend, route = next(iter(stored.routes.items()))
        other = msgspec.structs.replace(route, label=route.label + "x")
        tampered = msgspec.structs.replace(stored, routes={**stored.routes, frontend: other})
        assert compare(table, tampered, capabilities)


def test_of_too_many_backends_the_first_are_the_ones_that_count():
    short = Capabilities(max_backends=2)
    held = msgspec.structs.replace(
        WANTED, routes={**WANTED.routes, at("10.96.0.2:80"): fit_backends(WEB, "10.0.0.1", "10.0.0.2")}
    )
    assert not compare(WANTED, held, short)
    assert compare(WANTED, held, ALL)
    others = fit_backends(WEB, "10.0.0.1", "10.0.0.3")
    assert compare(WANTED, msgspec.structs.replace(held, routes={**held.routes, at("10.96.0.2:80"): others}), short)


def fit_backends(route, *addresses):
    return msgspec.structs.replace(route, backends=backends(*addresses))


def test_an_empty_drift_is_false_and_has_no_length():
    assert not Drift(family=Family.IPV4)
    assert len(Drift(family=Family.IPV4)) == 0
