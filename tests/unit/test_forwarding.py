"""The forwarding table's own functions."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from rules.forwarding import (
    Backend,
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    Prefix,
    Protocol,
    Refusal,
    Route,
    apply_delta,
    check_route,
    difference,
    family_of,
    format_address,
    format_host,
    merge_prefixes,
    parse_address,
    parse_prefix,
)
from tests.builders import at, backends, endpoints, networks
from tests.strategies import prefixes, tables

FAMILIES = st.sampled_from(list(Family))


@st.composite
def two_tables(draw: st.DrawFn) -> tuple[ForwardingTable, ForwardingTable]:
    family = draw(FAMILIES)
    return draw(tables(family)), draw(tables(family))


@given(two_tables())
def test_a_difference_leads_from_one_table_to_the_other(pair: tuple[ForwardingTable, ForwardingTable]) -> None:
    old, new = pair
    delta = difference(old, new)
    assert apply_delta(old, delta) == new
    assert apply_delta(new, difference(new, old)) == old
    assert bool(delta) == (old != new)
    assert not difference(old, old)
    assert not delta.removed & delta.changed.keys()


def test_tables_of_two_families_have_no_difference() -> None:
    with pytest.raises(ValueError, match="IPv4 and IPv6"):
        difference(ForwardingTable(family=Family.IPV4), ForwardingTable(family=Family.IPV6))


def test_damage_is_no_part_of_a_difference() -> None:
    table = ForwardingTable(family=Family.IPV4)
    assert difference(replace(table, damage=frozenset({"a rule is missing"})), table) == Delta()


def test_a_table_without_labels_differs_in_nothing_else() -> None:
    route = Route(kind=Kind.CLUSTER_IP, backends=backends("10.0.0.1"), label="ns/a")
    table = ForwardingTable(family=Family.IPV4, routes={at("1.2.3.4:80"): route}, hairpins=endpoints("10.0.0.1"))
    assert table.without_labels() == replace(table, routes={at("1.2.3.4:80"): replace(route, label="")})


GOOD = Route(kind=Kind.LOAD_BALANCER, backends=backends("10.0.0.1"), source_ranges=networks("10.0.0.0/8"), affinity=1)
NONE = frozenset[Backend]()


@pytest.mark.parametrize(
    ("frontend", "route", "fault"),
    [
        (at("1.2.3.4:80"), GOOD, None),
        (at("*:80"), replace(GOOD, kind=Kind.NODE_PORT, source_ranges=()), None),
        (at("1.2.3.4:80"), Route(kind=Kind.CLUSTER_IP, refusal=Refusal.DROP), None),
        (at("1.2.3.4:80"), replace(GOOD, local_backends=NONE, refusal=Refusal.DROP), None),
        (at("*:80"), GOOD, "only a node port"),
        (at("1.2.3.4:80"), replace(GOOD, kind=Kind.NODE_PORT, source_ranges=()), "only a node port"),
        (at("[fd00::1]:80"), GOOD, "the address is not IPv4"),
        (at("1.2.3.4:0"), GOOD, "port 0"),
        (at("1.2.3.4:65536"), GOOD, "port 65536"),
        (at("1.2.3.4:80"), replace(GOOD, backends=backends("fd00::1")), "a backend"),
        (at("1.2.3.4:80"), replace(GOOD, local_backends=backends("fd00::1")), "a backend"),
        (at("1.2.3.4:80"), replace(GOOD, backends=backends("10.0.0.1", port=65536)), "a backend"),
        (
            at("1.2.3.4:80"),
            Route(kind=Kind.CLUSTER_IP, backends=GOOD.backends, local_backends=GOOD.backends),
            "one list",
        ),
        (at("1.2.3.4:80"), Route(kind=Kind.LOAD_BALANCER, local_backends=NONE, refusal=Refusal.REJECT), "policy"),
        (at("1.2.3.4:80"), replace(GOOD, refusal=Refusal.DROP), "a refusal"),
        (at("1.2.3.4:80"), replace(GOOD, local_backends=NONE), "a refusal"),
        (at("1.2.3.4:80"), Route(kind=Kind.CLUSTER_IP), "a refusal"),
        (at("1.2.3.4:80"), Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT, affinity=1), "affinity"),
        (at("1.2.3.4:80"), replace(GOOD, kind=Kind.EXTERNAL_IP), "source ranges"),
        (at("1.2.3.4:80"), replace(GOOD, source_ranges=networks("10.0.0.0/9", "10.128.0.0/9")), "merged"),
        (at("1.2.3.4:80"), replace(GOOD, source_ranges=networks("11.0.0.0/8", "9.0.0.0/8")), "merged"),
    ],
)
def test_check_route_names_what_is_not_canonical(frontend: Frontend, route: Route, fault: str | None) -> None:
    found = check_route(Family.IPV4, frontend, route)
    assert (found is None) if fault is None else (found is not None and fault in found)


@given(FAMILIES.flatmap(lambda family: st.lists(prefixes(family), max_size=8)), st.data())
def test_merged_prefixes_cover_the_same_addresses_in_the_fewest(
    given_prefixes: list[Prefix], data: st.DataObject
) -> None:
    merged = merge_prefixes(given_prefixes)
    assert merged == merge_prefixes(reversed(given_prefixes)) == merge_prefixes(merged)
    assert list(merged) == sorted(merged)
    for prefix in given_prefixes:
        assert prefix.address in next(other for other in merged if prefix.address in other)
    for prefix in merged:
        # Whatever address of a merged network is looked at, one of the given ones has it.
        host = data.draw(st.integers(0, 2 ** (len(prefix.address) * 8 - prefix.length) - 1))
        address = (int.from_bytes(prefix.address) | host).to_bytes(len(prefix.address))
        assert any(address in other for other in given_prefixes)
        assert sum(address in other for other in merged) == 1
        if prefix.length:
            # Its other half isn't there: else the two would be one.
            bit = len(prefix.address) * 8 - prefix.length
            sibling = (int.from_bytes(prefix.address) ^ (1 << bit)).to_bytes(len(prefix.address))
            assert Prefix(sibling, prefix.length) not in merged


@pytest.mark.parametrize(
    ("network", "address", "inside"),
    [
        ("10.0.0.0/8", "10.255.255.255", True),
        ("10.0.0.0/8", "11.0.0.0", False),
        ("0.0.0.0/0", "1.2.3.4", True),
        ("0.0.0.0/0", "fd00::1", False),
        ("fd00::/64", "fd00::ffff", True),
        ("1.2.3.4/32", "1.2.3.5", False),
    ],
)
def test_an_address_is_in_a_network_of_its_family(network: str, address: str, inside: bool) -> None:
    assert (parse_address(address) in parse_prefix(network)) is inside


def test_what_is_no_address_is_in_no_network() -> None:
    assert not parse_prefix("10.0.0.0/8").__contains__("10.0.0.1")


@given(st.ip_addresses())
def test_addresses_survive_their_text(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert parse_address(format_address(address.packed)) == address.packed
    assert family_of(address.packed).value == address.version


def test_everything_has_a_form_for_people() -> None:
    assert [
        str(each) for each in (at("1.2.3.4:80"), at("[fd00::1]:53", Protocol.UDP), at("*:3001", Protocol.SCTP))
    ] == [
        "1.2.3.4:80/TCP",
        "[fd00::1]:53/UDP",
        "*:3001/SCTP",
    ]
    assert str(Backend(parse_address("fd00::1"), 80)) == "[fd00::1]:80"
    assert str(parse_prefix("10.1.2.3/8")) == "10.0.0.0/8"
    assert format_host(parse_address("1.2.3.4")) == "1.2.3.4"
