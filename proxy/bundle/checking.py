"""Whether what stands in an archive can be worked with: types are right already, lengths and numbers may not be.

An archive comes from strangers, and what it holds goes where otherwise only what a kernel or an agent said goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from proxy.explain.surroundings import Surroundings
from rules.forwarding import Address, Family, Frontend, NodeFacts, Prefix, Protocol, Route, SourcePrefix, parse_prefix

if TYPE_CHECKING:
    from proxy.bundle.reading import Manifest, SavedFlow, SavedTable

_SIZES = frozenset(family.address_bytes for family in Family)
_PORTS = range(1 << 16)


def check(
    manifest: Manifest, tables: Iterable[SavedTable], flows: Iterable[SavedFlow], node: Surroundings | None
) -> None:
    """Raises ValueError: addresses, ports or lengths of networks are none."""
    _some_lengths((*manifest.addresses, *manifest.node_ips))
    for table in tables:
        check_table(table)
    for flow in flows:
        check_flow(flow)
    if node is not None:
        check_surroundings(node)


def check_table(table: SavedTable) -> None:
    """Raises ValueError: addresses are of another family, or ports and lengths out of their ranges."""
    size = table.family.address_bytes
    node = table.node
    _lengths(size, node.node_port_addresses or ())
    _prefixes(size, _networks(node))
    _ports(node.health_check_ports)
    for frontend, route in table.routes:
        _check_route(size, frontend, route)
    _lengths(size, (each.address for each in table.hairpins))
    _ports(each.port for each in table.hairpins)


def check_flow(each: SavedFlow) -> None:
    """Likewise; flows through Services are of protocols that Services have."""
    flow = each.flow
    Protocol(flow.protocol)
    ends = (flow.source, flow.destination, flow.reply_source, flow.reply_destination)
    _lengths(each.family.address_bytes, ends)
    _ports((flow.source_port, flow.port, flow.reply_source_port, flow.reply_port))


def check_surroundings(node: Surroundings) -> None:
    """Likewise; and conditions of rules of others name networks and ports."""
    _some_lengths(node.addresses)
    for family, address in node.node_ips.items():
        _lengths(family.address_bytes, (address,))
    for address, way in node.ways.items():
        _some_lengths((address, *(each for each in (way.source, way.gateway) if each is not None)))
    _some_lengths(node.unreachable)
    for chain in node.chains:
        for rule in chain.rules or ():
            for condition in rule.conditions:
                if condition.what in ("source", "destination"):
                    for value in condition.values:
                        parse_prefix(value)
                elif condition.what in ("source port", "port"):
                    for value in condition.values:
                        first, _, last = value.partition("-")
                        _ports((int(first), int(last or first)))


def _check_route(size: int, frontend: Frontend, route: Route) -> None:
    _lengths(size, (frontend.address,) if frontend.address else ())
    backends = (*route.backends, *(route.local_backends or ()))
    _lengths(size, (each.address for each in backends))
    _ports((frontend.port, *(each.port for each in backends)))
    _prefixes(size, route.source_ranges)


def _networks(node: NodeFacts) -> Iterator[Prefix]:
    yield from node.service_cidrs
    if isinstance(node.detector, SourcePrefix):
        yield node.detector.prefix


def _lengths(size: int, addresses: Iterable[Address]) -> None:
    for each in addresses:
        if len(each) != size:
            raise ValueError(f"an address of {len(each)} bytes, where one has {size}")


def _some_lengths(addresses: Iterable[Address]) -> None:
    for each in addresses:
        if len(each) not in _SIZES:
            raise ValueError(f"an address of {len(each)} bytes")


def _prefixes(size: int, prefixes: Iterable[Prefix]) -> None:
    for each in prefixes:
        _lengths(size, (each.address,))
        if not 0 <= each.length <= size * 8:
            raise ValueError(f"a network of {each.length} bits")


def _ports(ports: Iterable[int]) -> None:
    for each in ports:
        if each not in _PORTS:
            raise ValueError(f"a port {each}")
