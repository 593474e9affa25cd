"""What keeps packets from the backends that the rules give them: others' rules, routes, and sockets.  Pure.

What of others drops is told by rule, with the Services that it concerns; of what only may drop, one line for a table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from proxy.doctor.finding import Finding, Severity, subject_of
from proxy.explain.crossing import Journey, bases_of, carried_by, met
from proxy.explain.evidence import Cluster
from proxy.explain.node_causes import kind_of, perhaps_words, words_of
from proxy.explain.obstacles import (
    Obstacle,
    listeners_command,
    lost_ways,
    obstacles,
    passing,
    some,
    unheard,
    unheard_words,
)
from proxy.explain.passing import Chains, Passing, Stage, may_drop
from proxy.explain.surroundings import HOOKS, ForeignChain, Hook, Surroundings
from rules.forwarding import (
    Address,
    Backend,
    Family,
    ForwardingTable,
    Kind,
    NodeFacts,
    Protocol,
    format_address,
    parse_address,
)


def on_the_way(
    family: Family, table: ForwardingTable, node: Surroundings, cluster: Cluster | None, own: Address | None
) -> Iterator[Finding]:
    """What stands between clients, this node and the backends.

    Args:
        family: of the table.
        table: what is wanted.
        node: with the ways to its backends.
        cluster: the objects behind it, where they are known.
        own: an address of the node at which node ports answer; None: there is none.
    """
    yield from _lost(table, node, _here(cluster))
    yield from _unheard(table, node)
    facts = table.node
    # Of what IPVS sends on answers alone are forwarded, as `proxy.explain.node_causes.unjudged` says.
    hooks = [hook for hook in HOOKS if hook != "forward" or not (facts.bound or facts.relayed)]
    for (hook, stage), bases in bases_of(node, family, hooks).items():
        dropping = [(base, chains) for base, chains in bases if base.drops or may_drop(base.name, chains)]
        if dropping and (packets := _packets(hook, stage, table, node, own)):
            yield from _of_chains(hook, dropping, packets, family, facts)


def _of_chains(
    hook: Hook,
    bases: Iterable[tuple[ForeignChain, Chains]],
    packets: Mapping[Passing, Iterable[str]],
    family: Family,
    facts: NodeFacts,
) -> Iterator[Finding]:
    """What the chains that stand in one place do with packets."""
    # Elsewhere it is the node's own connections that fail, or those to its own programs.
    stops_all = hook not in ("input", "output") or facts.relayed or facts.bound
    judged = obstacles(bases, tuple(packets))
    perhaps: dict[str, list[Obstacle]] = {}
    for each in judged.obstacles:
        if each.surely:
            yield _finding(each, packets, every=stops_all and len(each.surely) == len(packets))
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
            kind=f"{kind_of(those[0])}-perhaps",
            what=perhaps_words(those),
            next=those[0].listing,
        )
    if judged.left_out:
        what = f"{judged.left_out} of {len(packets)} backends were not led through others' rules, as those are so many"
        yield Finding(severity="note", subject=family.label, kind="not-looked-at", what=what, next="sluice trace")


def _packets(
    hook: Hook, stage: Stage, table: ForwardingTable, node: Surroundings, own: Address | None
) -> dict[Passing, dict[str, None]]:
    """What comes to chains that stand there, whoever sends it, and for whom."""
    facts = table.node
    carried = carried_by(facts)
    # What IPVS sends on passes output as well.
    senders = (True, False) if facts.bound and hook == "output" else (hook == "output",)
    found: dict[Passing, dict[str, None]] = {}
    for frontend, route in table.routes.items():
        subject = subject_of(route.label or str(frontend))
        address = frontend.address or own
        # By a ClusterIP come pods, which keep their addresses.
        marked = facts.masquerade_all if route.kind is Kind.CLUSTER_IP else None
        for backend in route.backends:
            to = passing(backend, frontend.protocol, node, masqueraded=marked)
            stays = backend.address in node.addresses
            journeys = [Journey(to, to, "plain", by_node=True, stays=stays)] if facts.relayed else []
            if address is not None:
                sent = Passing(address, frontend.protocol, frontend.port)
                journeys += [Journey(sent, to, carried, by_node, stays) for by_node in senders]
            for _, seen in met(hook, stage, journeys):
                found.setdefault(seen, {})[subject] = None
    # For the same answer each time, as backends are a set.
    return {each: found[each] for each in sorted(found, key=lambda each: (each[:3], str(each.masqueraded)))}


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


def _lost(table: ForwardingTable, node: Surroundings, here: Collection[Address]) -> Iterator[Finding]:
    """Backends that the node does not reach, by why that is so."""
    services: dict[Address, dict[str, None]] = {}
    for frontend, route in table.routes.items():
        for backend in route.backends:
            if backend.address not in node.addresses:
                services.setdefault(backend.address, {})[subject_of(route.label or str(frontend))] = None
    lost = lost_ways(sorted(services), node, here)
    for why in dict.fromkeys(lost.values()):
        those = [each for each in lost if lost[each] == why]
        names = {name for address in those for name in services[address]}
        what = (
            f"the node has no way to {some(map(format_address, those))}: {why} (routes to pods are the CNI's), "
            f"for {_services(sorted(names))}"
        )
        yield Finding(
            severity="critical" if len(those) == len(services) else "error",
            subject="node",
            kind="no-route",
            what=what,
            next=f"ip route get {format_address(those[0])}",
        )


def _unheard(table: ForwardingTable, node: Surroundings) -> Iterator[Finding]:
    """Backends that are the node itself, where no process of it listens."""
    found: dict[tuple[Protocol, Backend], dict[str, None]] = {}
    for frontend, route in table.routes.items():
        for backend in unheard(route.backends, frontend.protocol, node):
            found.setdefault((frontend.protocol, backend), {})[subject_of(route.label or str(frontend))] = None
    for (protocol, backend), subjects in sorted(found.items()):
        for subject in subjects:
            what = unheard_words([backend], protocol)
            next_ = listeners_command(protocol, backend.port)
            yield Finding(severity="error", subject=subject, kind="no-listener", what=what, next=next_)


def clashing(table: ForwardingTable, node: Surroundings, *, reserved: bool = False) -> Iterator[Finding]:
    """Node ports at which a process of the node waits for clients, and gets none: the rules are first.

    `reserved`: where there is a listener at every one of them, it is the proxy itself, as kube-proxy was before it gave
    that up (TRF-22).
    """
    listening = {
        frontend: (frontend.protocol.name, frontend.port) in node.listening
        for frontend in table.routes
        if frontend.is_node_port and frontend.protocol is not Protocol.SCTP
    }
    if reserved and all(listening.values()):
        return
    for frontend, route in sorted(table.routes.items()):
        if listening.get(frontend):
            what = (
                f"a process of this node listens on {frontend.port}/{frontend.protocol.name}, which is a node port of "
                f"{route.label or 'a Service'}: connections go to the Service, and that process gets none"
            )
            yield Finding(
                severity="warning",
                subject=subject_of(route.label or str(frontend)),
                kind="node-port-listener",
                what=what,
                next=listeners_command(frontend.protocol, frontend.port),
            )
