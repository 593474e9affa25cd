"""What keeps packets from the backends that the rules give them: others' rules, routes, and sockets.  Pure.

What of others drops is told by rule, with the Services that it concerns; of what only may drop, one line for a table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from proxy.doctor_finding import Finding, Severity, subject_of
from proxy.explain.causes import kind_of, perhaps_words, words_of
from proxy.explain.evidence import Cluster
from proxy.explain.obstacles import Obstacle, lost_ways, obstacles, passing, some
from proxy.explain.passing import Passing
from proxy.explain.surroundings import Surroundings
from rules.forwarding import Address, Backend, Family, ForwardingTable, Kind, Protocol, format_address, parse_address


class _Target(NamedTuple):
    """What a forwarded packet goes to."""

    backend: Backend
    protocol: Protocol
    inside: bool
    """Whether by a ClusterIP, which pods use, and keep their addresses."""


def on_the_way(
    family: Family, table: ForwardingTable, node: Surroundings, cluster: Cluster | None
) -> Iterator[Finding]:
    """What stands between this node and the backends that are not its own addresses."""
    services = _targets(table, node)
    if not services:
        return
    yield from _lost(services, node, _here(cluster))
    if table.node.bound:
        return  # as `proxy.explain.causes.unjudged` says
    packets: dict[Passing, dict[str, None]] = {}
    # For the same answer each time, as backends are a set.
    for target in sorted(services):
        masqueraded = table.node.masquerade_all if target.inside else None
        packet = passing(target.backend, target.protocol, node, masqueraded=masqueraded)
        packets.setdefault(packet, {}).update(services[target])
    judged = obstacles(family, node, tuple(packets))
    perhaps: dict[str, list[Obstacle]] = {}
    for each in judged.obstacles:
        if each.surely:
            yield _finding(each, packets, every=len(each.surely) == len(packets))
        elif each.rule is None:
            yield Finding(
                severity="warning", subject="node", kind=kind_of(each), what=words_of(each), next=each.listing
            )
        else:
            perhaps.setdefault(each.base.place, []).append(each)
    for those in perhaps.values():
        # Where nothing but who connects is open, somebody is shut out, and that may be meant.
        severity: Severity = "warning" if any(each.rule and each.rule.understood for each in those) else "note"
        yield Finding(
            severity=severity,
            subject="node",
            kind="forward-rule-perhaps",
            what=perhaps_words(those),
            next=those[0].listing,
        )
    if judged.left_out:
        what = f"{judged.left_out} of {len(packets)} backends were not led through others' rules, as those are so many"
        yield Finding(severity="note", subject=family.label, kind="not-looked-at", what=what, next="sluice trace")


def _targets(table: ForwardingTable, node: Surroundings) -> dict[_Target, dict[str, None]]:
    """What packets are forwarded to, and for whom."""
    services: dict[_Target, dict[str, None]] = {}
    for frontend, route in table.routes.items():
        subject = subject_of(route.label or str(frontend))
        for backend in route.backends:
            if backend.address not in node.addresses:
                target = _Target(backend, frontend.protocol, route.kind is Kind.CLUSTER_IP)
                services.setdefault(target, {})[subject] = None
    return services


def _finding(each: Obstacle, services: Mapping[Passing, Iterable[str]], *, every: bool) -> Finding:
    concerned = list(dict.fromkeys(name for packet in each.surely for name in services[packet]))
    only = concerned[0] if len(concerned) == 1 and not every else ""
    whose = "" if only else f", for {_services(concerned)}"
    return Finding(
        severity="critical" if every else "error",
        subject=only or "node",
        kind=kind_of(each),
        what=f"{words_of(each)}{whose}",
        next=each.listing,
    )


def _here(cluster: Cluster | None) -> frozenset[Address]:
    """The endpoints on this node, by their slices."""
    if cluster is None:
        return frozenset()
    return frozenset(
        address
        for slices in cluster.slices.values()
        for each in slices
        for endpoint in each.endpoints
        if endpoint.node_name == cluster.view.node_name
        for address in map(_parsed, endpoint.addresses)
        if address
    )


def _parsed(text: str) -> Address:
    """An address; empty: it is none."""
    try:
        return parse_address(text)
    except ValueError:
        return b""


def _services(subjects: Sequence[str]) -> str:
    """`Service a/b`, or `Services a/b, a/c and 5 more`."""
    names = [each.removeprefix("Service ") for each in subjects]
    return f"Service{'s' if len(names) > 1 else ''} {some(names)}"


def _lost(
    services: Mapping[_Target, Iterable[str]], node: Surroundings, here: Collection[Address]
) -> Iterator[Finding]:
    """Backends that the node does not reach, by why that is so."""
    addresses = {target.backend.address for target in services}
    lost = lost_ways(sorted(addresses), node, here)
    for why in dict.fromkeys(lost.values()):
        those = [each for each in lost if lost[each] == why]
        names = {name for target, labels in services.items() if target.backend.address in those for name in labels}
        what = (
            f"the node has no way to {some(map(format_address, those))}: {why} (routes to pods are the CNI's), "
            f"for {_services(sorted(names))}"
        )
        yield Finding(
            severity="critical" if len(those) == len(addresses) else "error",
            subject="node",
            kind="no-route",
            what=what,
            next=f"ip route get {format_address(those[0])}",
        )


def clashing(table: ForwardingTable, node: Surroundings) -> Iterator[Finding]:
    """Node ports at which a process of the node waits for clients, and gets none: the rules are first."""
    for frontend, route in sorted(table.routes.items()):
        port = (frontend.protocol.name, frontend.port)
        if frontend.is_node_port and port in node.listening:
            option = "lntp" if frontend.protocol is Protocol.TCP else "lnup"
            what = (
                f"a process of this node listens on {frontend.port}/{frontend.protocol.name}, which is a node port of "
                f"{route.label or 'a Service'}: connections go to the Service, and that process gets none"
            )
            yield Finding(
                severity="warning",
                subject=subject_of(route.label or str(frontend)),
                kind="node-port-listener",
                what=what,
                next=f"ss -{option} 'sport = :{frontend.port}'",
            )
