"""A wanted table as kube-proxy's ipvs mode serves it (IPVS-8, IPVS-19 to IPVS-21).  Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from rules.foreign.gathering import Reading
from rules.forwarding import (
    Address,
    Endpoint,
    ForwardingTable,
    Frontend,
    Kind,
    Prefix,
    Refusal,
    Route,
    family_of,
    merge_prefixes,
)
from rules.node_ports import is_loopback

_LINK_LOCAL = Prefix(b"\xfe\x80" + bytes(14), 10)


def as_served(wanted: ForwardingTable, reading: Reading) -> ForwardingTable:
    """The table that one gets who wants `wanted` from kube-proxy's ipvs mode.

    What the mode has one setting for, and no table says, is as it was read: the scheduler.
    """
    held = reading.table
    of_services = _of_services(wanted)
    routes = {
        frontend: _served(frontend, route, of_services.get(route.label, {}), held.routes.get(frontend))
        for frontend, route in wanted.routes.items()
    }
    used = {
        Endpoint(backend.address, frontend.protocol, backend.port)
        for frontend, route in routes.items()
        for backend in route.backends
    }
    node = wanted.node
    if node.node_port_addresses is None:
        everywhere = held.node.node_port_addresses if reading.own is None else _node_port_addresses(reading.own)
        node = msgspec.structs.replace(node, node_port_addresses=everywhere)
    return msgspec.structs.replace(wanted, node=node, routes=routes, hairpins=wanted.hairpins | (held.hairpins - used))


def _of_services(table: ForwardingTable) -> Mapping[str, Mapping[Frontend, Route]]:
    """The routes of each service port from outside, by its label."""
    found: dict[str, dict[Frontend, Route]] = {}
    for frontend, route in table.routes.items():
        if route.kind is not Kind.CLUSTER_IP and route.label:
            found.setdefault(route.label, {})[frontend] = route
    return found


def _served(frontend: Frontend, route: Route, others: Mapping[Frontend, Route], held: Route | None) -> Route:
    """A route of a service port, of which the others are those from outside."""
    backends, local, affinity = route.backends, route.local_backends, route.affinity
    if local is not None:
        backends = local = local or backends
    elif route.kind is Kind.CLUSTER_IP and route.refusal is Refusal.DROP:
        # Internal policy Local without an endpoint here: the cluster's list is there where something else needs it.
        known = next(iter(others.values()), route)
        backends, affinity = known.backends, known.affinity
    ranges = route.source_ranges
    if held is not None and ranges != held.source_ranges:
        siblings = [
            Prefix(each.address, len(each.address) * 8)
            for each, one in others.items()
            if one.kind is Kind.LOAD_BALANCER and each != frontend
        ]
        if held.source_ranges and merge_prefixes([*held.source_ranges, *siblings]) == ranges:
            ranges = held.source_ranges
    return msgspec.structs.replace(
        route,
        backends=backends,
        local_backends=local if backends else None,
        refusal=None if backends else Refusal.REJECT,
        affinity=affinity if backends else 0,
        source_ranges=ranges,
        scheduler=held.scheduler if held is not None and backends else "",
    )


def _node_port_addresses(own: frozenset[Address]) -> frozenset[Address]:
    """Those that answer node ports where all of the node's are meant."""
    return frozenset(
        each for each in own if not is_loopback(each) and not (family_of(each) == 6 and each in _LINK_LOCAL)
    )
