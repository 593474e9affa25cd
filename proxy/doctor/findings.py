"""What is wrong on a node, from all that is known of it.  Pure; see `proxy.doctor.verb`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from proxy.doctor.finding import WORST_FIRST, Finding, Severity, subject_of
from proxy.doctor.way import clashing, on_the_way
from proxy.explain.cause import Cause
from proxy.explain.causes import causes_of, key_of_label
from proxy.explain.evidence import Cluster, Evidence
from proxy.explain.node_causes import unjudged
from proxy.explain.surroundings import Surroundings
from proxy.report import FamilyReport, Status
from proxy.status import STALE, duration
from proxy.verify import Verified
from rules.diff import summary
from rules.explain import explain
from rules.explanation import Explanation, Origin, Packet, Reaches, Share
from rules.forwarding import (
    Address,
    Backend,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    Prefix,
    Protocol,
    parse_address,
    parse_prefix,
)

_OF_CAUSE: Mapping[str, Severity] = {
    # Most nodes have no pod of a Service with external policy Local, and load balancers do not send there.
    "policy-local": "note",
    # Harmless wherever answers leave by the interface that the question came by.
    "rp-filter": "note",
    "legacy-forward": "note",
    "other-proxy": "warning",
    "forward-drop": "warning",
    "conntrack-full": "warning",
}
"""How bad a cause is that is not certain; any other is an error."""

_ELSEWHERE = {Family.IPV4: parse_address("192.0.2.1"), Family.IPV6: parse_address("2001:db8::1")}
"""An address for documentation: no node has it."""
_LOOPBACK = parse_address("127.0.0.1")
_MOST_DAMAGE = 20
"""How many sentences of damage are told of a family; dump has all."""
_NOBODY = tuple(map(parse_prefix, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3", "::/128", "::1/128", "ff00::/8")))
"""Networks of which no packet comes in: a range `0.0.0.0/32` is one that was to be `/0`."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a node; pure values, from which findings follow."""

    tables: Mapping[Family, ForwardingTable] = {}
    """What is wanted; without an agent and manifests what the kernel holds."""
    cluster: Cluster | None = None
    status: Status | None = None
    """Of the agent, if one was asked and answered."""
    surroundings: Surroundings | None = None
    verified: tuple[Verified, ...] = ()
    """The kernel compared with what is wanted."""
    compare: str = "sluice verify"
    """The command that shows how they differ."""
    absent: str = ""
    """Why no agent answered, where one was asked."""
    carrier: str = ""
    """The other proxy whose rules these tables are, where sluice has none here."""
    problems: tuple[str, ...] = ()
    """What manifests say of themselves, a line each."""
    stale: Mapping[str, int] = {}
    """How many flows are stale, by the label of their Service's port."""
    lacking: tuple[str, ...] = ()
    """What the kernel does not have that the dataplane needs, a line each."""
    unread: tuple[str, ...] = ()
    """What could not be looked at, and why, a line each."""


def findings(known: Known) -> tuple[Finding, ...]:
    """What is wrong, the worst first; of one severity the node's before the Services', those by name."""
    found = dict.fromkeys(
        (*_of_the_agent(known), *_of_the_node(known), *_of_the_objects(known), *_of_services(known), *_of_flows(known))
    )
    return tuple(
        sorted(
            found,
            key=lambda each: (WORST_FIRST.index(each.severity), each.subject.startswith("Service "), each.subject),
        )
    )


def lines(found: Iterable[Finding], known: Known) -> Iterator[str]:
    """The findings as text; one line where nothing is wrong."""
    found = tuple(found)
    for each in found:
        after = f"  [{each.next}]" if each.next else ""
        yield f"{each.severity:<9}{each.subject}: {each.what}{after}"
    if not found and not known.unread:
        count = sum(len(table.routes) for table in known.tables.values())
        yield f"nothing is wrong: {count} frontend{'' if count == 1 else 's'} looked at"


# --- the node ----------------------------------------------------------------------------------------------------


def _of_the_node(known: Known) -> Iterator[Finding]:
    for line in known.lacking:
        yield Finding(severity="critical", subject="node", kind="kernel-feature", what=line, next="sluice status")
    for each in known.verified:
        if each.drift:
            what = f"the kernel does not hold what is wanted: {summary(each.drift)}"
            subject = f"{each.drift.family.label} in {each.dataplane}"
            yield Finding(severity="error", subject=subject, kind="drift", what=what, next=known.compare)
    yield from _of_damage(known)
    if known.surroundings is not None:
        for cause in dict.fromkeys(_node_causes(known, known.surroundings)):
            severity: Severity = "critical" if cause.certain else _OF_CAUSE.get(cause.kind, "error")
            yield Finding(severity=severity, subject="node", kind=cause.kind, what=cause.words, next=cause.next)
        for family, table in known.tables.items():
            own = _node_port_address(table, known.surroundings, family)
            yield from on_the_way(family, table, known.surroundings, known.cluster, own)
            if not table.node.relayed:  # else the sockets are the proxy's own
                yield from clashing(table, known.surroundings, reserved=bool(known.carrier))
    for family, table in known.tables.items():
        if table.node.node_port_addresses == frozenset() and any(each.is_node_port for each in table.routes):
            what = "no address of this node answers node ports, and Services have some (nodePortAddresses)"
            yield Finding(
                severity="error", subject=family.label, kind="node-port-address", what=what, next="sluice config"
            )


def _of_damage(known: Known) -> Iterator[Finding]:
    """What is wrong with the rules by themselves, where nobody knows what is wanted; else it is drift."""
    if known.status is not None or known.cluster is not None:
        return
    whose = known.carrier or "sluice"
    command = f"sluice dump --of {whose}" if known.carrier else "sluice dump"
    for family, table in known.tables.items():
        for sentence in sorted(table.damage)[:_MOST_DAMAGE]:
            what = f"the rules of {whose} in the kernel are damaged: {sentence}"
            yield Finding(severity="error", subject=family.label, kind="damage", what=what, next=command)


def _node_causes(known: Known, node: Surroundings) -> Iterator[Cause]:
    """What stands in the way of connections whatever the Service, as one that goes to a pod elsewhere meets it."""
    # Rules of others are asked about real backends.
    bound = any(table.node.bound for table in known.tables.values())
    chains = (unjudged(node) if bound else node).chains
    apart = tuple(chain._replace(hook="") for chain in chains if chain.rules is None or not chain.forwards)
    node = msgspec.structs.replace(node, chains=apart)
    evidence = Evidence(source="kernel", words="", tables={}, surroundings=node)
    families = [family for family, table in known.tables.items() if table.routes] or [Family.IPV4]
    for family in families:
        facts = known.tables[family].node if family in known.tables else None
        # What a proxy relays it sends itself, and no packet is forwarded.
        origin = Origin.NODE if facts is not None and facts.relayed else Origin.ELSEWHERE
        yield from causes_of(_reaching(_ELSEWHERE[family], origin), evidence, None, (), drifted=False)
        if facts is not None and family is Family.IPV4 and facts.loopback_node_ports and not facts.relayed:
            local = any(each.is_node_port for each in known.tables[family].routes)
            if local and (node.route_localnet is False):
                yield from causes_of(_reaching(_LOOPBACK, Origin.NODE), evidence, None, (), drifted=False)


def _reaching(destination: Address, origin: Origin) -> Explanation:
    """A connection that the rules hand to a pod on another node."""
    elsewhere = _ELSEWHERE[Family.IPV4 if len(destination) == 4 else Family.IPV6]
    packet = Packet(destination=destination, protocol=Protocol.TCP, port=80, origin=origin)
    share = Share(backend=Backend(elsewhere, 80), probability=1.0, masqueraded=True)
    return Explanation(packet=packet, origin=origin, steps=(), outcome=Reaches(shares=(share,), affinity=0))


# --- the agent ---------------------------------------------------------------------------------------------------


def _of_the_agent(known: Known) -> Iterator[Finding]:
    yield from _of_its_absence(known)
    if (status := known.status) is None:
        return
    if not status.synced:
        what = "Services and EndpointSlices have not been listed yet: nothing is written before they are"
        yield Finding(severity="critical", subject="agent", kind="not-synced", what=what, next="sluice status")
    for each in status.source.followed:
        behind = each.lag is None or each.lag > STALE
        if each.error or behind:
            heard = "never heard" if each.lag is None else f"last heard {duration(each.lag)} ago"
            what = f"{each.what} {each.state}, {heard}{f': {each.error}' if each.error else ''}"
            kind = "source-behind" if behind else "source-error"
            yield Finding(
                severity="error" if behind else "warning", subject="agent", kind=kind, what=what, next="sluice status"
            )
    for family in status.families:
        yield from _of_syncs(family, status)
    services = known.cluster.services.values() if known.cluster is not None else ()
    for missing in status.unserved:
        used = any(missing.family in each.spec.ip_families for each in services)
        what = f"not served: {missing.reason}{', and Services have addresses of it' if used else ''}"
        severity: Severity = "error" if used else "note"
        yield Finding(severity=severity, subject=missing.family, kind="family-unserved", what=what)
    for note in status.notes:
        yield Finding(severity="note", subject="node", kind="note", what=note)


def _of_its_absence(known: Known) -> Iterator[Finding]:
    if known.absent and known.carrier:
        what = f"{known.absent}; {known.carrier} carries this node's Services, and its rules are looked at"
        yield Finding(severity="note", subject="agent", kind="agent-absent", what=what)
    elif known.absent:
        yield Finding(severity="error", subject="agent", kind="agent-absent", what=known.absent, next="sluice run")
        if not known.tables and not known.unread:
            what = "the kernel holds no rules of sluice: no Service is served here, unless by another proxy"
            yield Finding(severity="critical", subject="node", kind="no-rules", what=what, next="sluice run")


def _of_syncs(family: FamilyReport, status: Status) -> Iterator[Finding]:
    """How one family keeps up with what is wanted."""
    syncs, subject = family.syncs, f"{family.family} in {family.dataplane}"
    if syncs.failures:
        what = f"syncs fail, {syncs.failures} in a row: {syncs.error}"
        yield Finding(severity="critical", subject=subject, kind="sync-fails", what=what, next="sluice status")
    elif not family.healthy:
        what = "a sync has been waiting too long: the node is behind its Services"
        yield Finding(severity="error", subject=subject, kind="sync-late", what=what, next="sluice status")
    elif status.synced and not syncs.count:
        what = "nothing has been written yet"
        yield Finding(severity="error", subject=subject, kind="not-written", what=what, next="sluice status")
    if syncs.drift_left:
        what = f"{syncs.drift_left} differences are left in the kernel (driftPolicy: {status.drift_policy})"
        yield Finding(severity="error", subject=subject, kind="drift-left", what=what, next="sluice verify")
    for label in syncs.refused:
        what = f"the kernel refuses {label} ({family.family})"
        yield Finding(
            severity="error", subject=subject_of(label), kind="refused", what=what, next=f"sluice explain {label}"
        )


# --- objects and Services ------------------------------------------------------------------------------------------


def _of_the_objects(known: Known) -> Iterator[Finding]:
    if known.status is not None:
        for trouble in known.status.troubles:
            yield Finding(severity="warning", subject=trouble.subject, kind="trouble", what=trouble.reason)
        for each in known.status.contested:
            others = ", ".join(each.losers)
            what = f"{each.frontend} is claimed by several Services: {each.winner} has it, {others} would be next"
            yield Finding(
                severity="error",
                subject=f"Service {each.losers[0] if each.losers else each.winner}",
                kind="conflict",
                what=what,
                next=f"sluice explain {each.winner}",
            )
    for line in known.problems:
        subject, colon, what = line.partition(": ")
        kind = "conflict" if subject.endswith(" is claimed by several Services") else "trouble"
        if kind == "conflict" or not colon:
            subject, what = "manifests", line
        yield Finding(severity="error" if kind == "conflict" else "warning", subject=subject, kind=kind, what=what)


def _of_services(known: Known) -> Iterator[Finding]:
    node = known.surroundings
    local = node.addresses if node is not None else frozenset()
    evidence = Evidence(source="agent", words="", tables=known.tables, local_addresses=local, cluster=known.cluster)
    for family, table in known.tables.items():
        for frontend, route in table.routes.items():
            if route.source_ranges and not any(_somebody(each, frontend) for each in route.source_ranges):
                key = key_of_label(route.label)
                ranges = ", ".join(map(str, route.source_ranges))
                yield Finding(
                    severity="error",
                    subject=subject_of(route.label or str(frontend)),
                    kind="source-ranges-nobody",
                    what=f"loadBalancerSourceRanges admit nobody: no client has an address in {ranges}",
                    next=f"kubectl -n {key.namespace} edit service {key.name}" if key is not None else "",
                )
            if route.backends if route.local_backends is None else route.local_backends:
                continue
            tried = frontend.address or _node_port_address(table, node, family)
            if tried is None:
                continue
            origin = Origin.LOCAL_POD if route.kind is Kind.CLUSTER_IP else Origin.ELSEWHERE
            packet = Packet(destination=tried, protocol=frontend.protocol, port=frontend.port, origin=origin)
            explanation = explain(table, packet, local)
            if explanation.route is None or explanation.route.label != route.label:
                continue  # another Service has the address, which is a conflict of its own
            service = known.cluster.of_label(route.label) if known.cluster is not None else None
            decided = known.cluster.decisions(service, family) if known.cluster is not None and service else ()
            for cause in causes_of(explanation, evidence, service, decided, drifted=False):
                port = route.label.partition(":")[2]
                severity = _OF_CAUSE.get(cause.kind, "error")
                if severity == "note" and route.kind is Kind.CLUSTER_IP:
                    severity = "warning"  # clients on this node get nothing
                yield Finding(
                    severity=severity,
                    subject=subject_of(route.label or str(frontend)),
                    kind=cause.kind,
                    what=f"port {port}: {cause.words}" if port else cause.words,
                    next=cause.next,
                )


def _of_flows(known: Known) -> Iterator[Finding]:
    """Flows that go into the void, whatever new connections meet."""
    for label, count in sorted(known.stale.items()):
        flows = "flow goes" if count == 1 else "flows go"
        what = f"{count} {flows} to endpoints that serve no longer, or to none: their clients hear nothing"
        next_ = f"sluice conntrack --stale --service {label}" if label else "sluice conntrack --stale"
        subject = subject_of(label) if label else "node"
        yield Finding(severity="warning", subject=subject, kind="stale-flows", what=what, next=next_)


def _somebody(network: Prefix, frontend: Frontend) -> bool:
    """Whether a client may have an address of a range; the load balancer's own is the node's affair (TRF-18)."""
    if network.address == frontend.address:
        return False
    return not any(
        len(nobody.address) == len(network.address) and nobody.length <= network.length and network.address in nobody
        for nobody in _NOBODY
    )


def _node_port_address(table: ForwardingTable, node: Surroundings | None, family: Family) -> Address | None:
    """An address at which node ports answer."""
    if table.node.node_port_addresses is not None:
        return min(table.node.node_port_addresses, default=None)
    return node.node_ips.get(family) if node is not None else None
