"""hypothesis strategies for forwarding tables: every field varies, shared and contested values are likely."""

from __future__ import annotations

from hypothesis import strategies as st

from rules.forwarding import (
    Backend,
    Delta,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    InputInterface,
    InputInterfacePrefix,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Refusal,
    Route,
    SourcePrefix,
    check_route,
    difference,
    merge_prefixes,
)

# Few values, so that Services share addresses, backends and lists.
_HOSTS = {
    Family.IPV4: [bytes([10, 244, 1, host]) for host in range(1, 9)],
    Family.IPV6: [bytes([0xFD, 0, 2, 0x44] + [0] * 11 + [host]) for host in range(1, 9)],
}
_VIRTUAL = {
    Family.IPV4: [bytes([10, 96, 0, host]) for host in range(1, 7)] + [bytes([203, 0, 113, 1])],
    Family.IPV6: [bytes([0xFD, 0, 0, 0x10, 0, 0x96] + [0] * 9 + [host]) for host in range(1, 7)],
}
LABELS = st.sampled_from(
    ["", "default/web:http", "default/web", "kube-system/dns:dns", f"{'n' * 63}/{'s' * 63}:{'p' * 63}"]
)
PROTOCOLS = st.sampled_from(list(Protocol))


def prefixes(family: Family) -> st.SearchStrategy[Prefix]:
    """Networks of any length but zero, their host bits cleared."""
    bits = family.address_bytes * 8

    def build(length: int, value: int) -> Prefix:
        shift = bits - length
        return Prefix((value >> shift << shift).to_bytes(family.address_bytes), length)

    lengths = st.one_of(st.integers(1, bits), st.sampled_from([8, 24, bits]))
    values = st.one_of(st.integers(0, 2**bits - 1), st.sampled_from(_HOSTS[family]).map(int.from_bytes))
    return st.builds(build, lengths, values)


def backends(family: Family) -> st.SearchStrategy[Backend]:
    return st.builds(Backend, st.sampled_from(_HOSTS[family]), st.sampled_from([80, 8080, 65535, 1]))


def endpoints(family: Family) -> st.SearchStrategy[Endpoint]:
    return st.builds(Endpoint, st.sampled_from(_HOSTS[family]), PROTOCOLS, st.sampled_from([80, 8080]))


@st.composite
def frontends(draw: st.DrawFn, family: Family) -> tuple[Frontend, Kind]:
    kind = draw(st.sampled_from(list(Kind)))
    address = b"" if kind is Kind.NODE_PORT else draw(st.sampled_from(_VIRTUAL[family]))
    return Frontend(address, draw(PROTOCOLS), draw(st.sampled_from([1, 53, 80, 443, 30080, 65535]))), kind


@st.composite
def routes(draw: st.DrawFn, family: Family, kind: Kind) -> Route:
    everywhere = draw(st.frozensets(backends(family), max_size=6))
    local = None
    if everywhere and kind is not Kind.CLUSTER_IP and draw(st.booleans()):
        local = draw(st.one_of(st.just(frozenset()), st.just(everywhere), st.frozensets(backends(family), max_size=3)))
    refused = not everywhere or local == frozenset()
    ranges = st.lists(prefixes(family), max_size=4).map(merge_prefixes)
    return Route(
        kind=kind,
        backends=everywhere,
        local_backends=local,
        refusal=draw(st.sampled_from(list(Refusal))) if refused else None,
        affinity=draw(st.sampled_from([0, 0, 1, 600, 10800, 86400])) if everywhere else 0,
        source_ranges=draw(ranges) if kind is Kind.LOAD_BALANCER else (),
        label=draw(LABELS),
    )


@st.composite
def node_facts(draw: st.DrawFn, family: Family) -> NodeFacts:
    names = st.sampled_from(["cni0", "pod-", "eth0.100", "a", "abcdefghijklmno"])
    detector = st.one_of(
        st.none(),
        st.builds(SourcePrefix, prefixes(family)),
        st.builds(InputInterface, names),
        st.builds(InputInterfacePrefix, names.map(lambda name: name[:14])),
    )
    addresses = st.none() | st.frozensets(st.sampled_from(_HOSTS[family]), max_size=3)
    return NodeFacts(
        mark=1 << draw(st.integers(0, 31)),
        masquerade_all=draw(st.booleans()),
        detector=draw(detector),
        node_port_addresses=draw(addresses),
        loopback_node_ports=family is Family.IPV4 and draw(st.booleans()),
        reject_closed_ports=draw(st.booleans()),
        service_cidrs=draw(st.lists(prefixes(family), max_size=3).map(merge_prefixes)),
    )


@st.composite
def tables(draw: st.DrawFn, family: Family, *, with_node: bool = True) -> ForwardingTable:
    chosen = dict(draw(st.lists(frontends(family), max_size=12)))
    table = ForwardingTable(
        family=family,
        node=draw(node_facts(family)) if with_node else NodeFacts(),
        routes={frontend: draw(routes(family, kind)) for frontend, kind in chosen.items()},
        hairpins=draw(st.frozensets(endpoints(family), max_size=5)),
    )
    for frontend, route in table.routes.items():
        assert check_route(family, frontend, route) is None
    return table


def deltas(family: Family, *, with_node: bool = True) -> st.SearchStrategy[list[ForwardingTable]]:
    """Tables of one node one after the other; the deltas are their differences."""
    return st.lists(tables(family, with_node=with_node), min_size=1, max_size=5)


def from_nothing(table: ForwardingTable) -> Delta:
    """What makes an empty table into this one."""
    return difference(ForwardingTable(family=table.family, node=table.node), table)
