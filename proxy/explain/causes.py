"""Why a connection does not work, as far as anybody can tell from here, and what to look at next.  Pure.

Three things can keep a client from its Service: the rules (the objects say why they are so), the rest of the node
(forwarding, other firewalls, a full conntrack table), and what lies beyond both, of which nothing is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from proxy.compute import Decision
from proxy.explain.cause import Cause
from proxy.explain.evidence import Cluster, Evidence
from proxy.explain.mentions import cause_of
from proxy.explain.node_causes import of_the_node, unjudged
from proxy.objects import Key, Service
from proxy.selection import Reason
from rules.explanation import Explanation, Packet, Reaches, StepKind, Why, listed, name_of
from rules.forwarding import (
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Route,
    family_of,
    format_address,
    format_host,
)
from rules.node_ports import node_port_words


def causes_of(
    explanation: Explanation,
    evidence: Evidence,
    service: Service | None,
    decisions: Sequence[Decision],
    *,
    drifted: bool,
) -> tuple[Cause, ...]:
    """What stands, or may stand, in the way of a connection.

    Args:
        explanation: of its first packet.
        evidence: what the explanation rests on.
        service: that of the frontend, where objects are known.
        decisions: those about its endpoints.
        drifted: whether the table explained is the kernel's, and is not what is wanted: that is cause enough.
    """
    found: list[Cause] = []
    if drifted:
        found.append(_drift(evidence.proxy))
    else:
        found += _of_the_rules(explanation, evidence, service, decisions)
    if evidence.surroundings is not None:
        own = evidence.cluster.view.node_name if evidence.cluster is not None else None
        here = {each.endpoint for each in decisions if own is not None and each.node == own}
        node = evidence.surroundings
        table = evidence.tables.get(family_of(explanation.packet.destination))
        facts = table.node if table is not None else NodeFacts()
        if facts.bound:
            node = unjudged(node)
        found += of_the_node(explanation, node, here, facts)
    return tuple(found)


def _drift(proxy: str) -> Cause:
    """Of our rules, or of those of another proxy."""
    what = "the kernel does not hold what is wanted"
    if proxy:
        words = f"{what}: {proxy} is late, has ended, or somebody has changed its rules"
        return Cause(kind="drift", words=words, next=f"sluice verify --of {proxy}")
    words = f"{what}; the agent repairs that, unless its driftPolicy is report"
    return Cause(kind="drift", words=words, next="sluice verify")


def key_of_label(label: str) -> Key | None:
    """The Service that a route's label names."""
    namespace, slash, rest = label.partition("/")
    return Key(namespace, rest.partition(":")[0]) if slash else None


# --- the rules -------------------------------------------------------------------------------------------------


def _of_the_rules(
    explanation: Explanation, evidence: Evidence, service: Service | None, decisions: Sequence[Decision]
) -> Iterator[Cause]:
    outcome = explanation.outcome
    if isinstance(outcome, Reaches):
        return
    packet, route = explanation.packet, explanation.route
    family = family_of(packet.destination)
    table = evidence.tables.get(family)
    key = key_of_label(route.label) if route is not None else None
    match outcome.why:
        case Why.SOURCE_RANGES:
            source = format_address(packet.source) if packet.source else "the client"
            words = f"{source} is not in the Service's loadBalancerSourceRanges"
            yield Cause(
                kind="source-ranges", words=words, next=_get(key, "service", "{.spec.loadBalancerSourceRanges}")
            )
        case Why.NO_ENDPOINTS | Why.NO_LOCAL_ENDPOINTS:
            if service is None or evidence.cluster is None:
                yield _by_rules_alone(outcome.why, key)
            elif outcome.why is Why.NO_ENDPOINTS:
                yield _no_endpoints(explanation, evidence.cluster, service, decisions)
            else:
                yield _none_here(explanation, evidence.cluster, service, decisions)
        case Why.NODE_PORT_ADDRESS:
            yield from _uncovered(explanation, table)
        case Why.CLOSED_PORT:
            yield _closed(explanation)
        case Why.LOOPBACK:
            words = "node ports on loopback addresses answer the node itself only"
            yield Cause(kind="loopback", words=words, next="")
        case Why.UNALLOCATED | Why.NO_FRONTEND:
            yield _unknown(explanation, evidence, table)


def _by_rules_alone(why: Why, key: Key | None) -> Cause:
    """What the rules say of a frontend without backends, where its objects are not known."""
    if why is Why.NO_LOCAL_ENDPOINTS:
        words = "the traffic policy is Local, and by the rules no endpoint that can serve is on this node"
        return Cause(kind="policy-local", words=words, next=_slices(key))
    words = "no endpoint can serve; why, the objects say, and the rules alone do not"
    return Cause(kind="no-endpoints", words=words, next=_slices(key))


def _closed(explanation: Explanation) -> Cause:
    steps = (step for step in explanation.steps if step.kind is StepKind.NEAR_MISS)
    near = next((step.frontend for step in steps if step.frontend is not None), None)
    packet = explanation.packet
    port = f"{packet.port}/{packet.protocol.name}"
    words = f"the Service has no port {port} (clients use the Service's ports, not those of its pods)"
    if near is not None and near.port == packet.port:
        words = f"the Service has port {near.port} for {near.protocol.name} only"
    return Cause(kind="closed-port", words=words, next=f"sluice explain {near}" if near is not None else "")


def _no_endpoints(explanation: Explanation, cluster: Cluster, service: Service, decisions: Sequence[Decision]) -> Cause:
    """Why no endpoint can serve a port of a Service."""
    assert explanation.route is not None
    family = family_of(explanation.packet.destination)
    selector = ",".join(f"{name}={value}" for name, value in sorted(service.spec.selector.items()))
    pods = f"kubectl -n {service.key.namespace} get pods -l '{selector}' -o wide" if selector else _slices(service.key)
    slices = cluster.slices.get(service.key, ())
    if not slices:
        if not selector:
            words = "the Service has no selector, so somebody must make EndpointSlices for it, and nobody has"
            return Cause(kind="no-slices", words=words, next=_slices(service.key))
        words = (
            f"the Service has no EndpointSlice: no pod matches its selector {selector}, or the controller that "
            "makes slices is late (without a cluster somebody has to write them)"
        )
        return Cause(kind="no-slices", words=words, next=pods)
    if all(each.address_type != family.label for each in slices):
        types = " and ".join(sorted({each.address_type or "no addressType" for each in slices}))
        words = f"this frontend is {family.label}, and the Service's EndpointSlices are for {types} only"
        return Cause(kind="no-slices-of-family", words=words, next=_slices(service.key))
    if not any(each.endpoints for each in slices):
        matches = f": no pod matches its selector {selector}" if selector else ""
        return Cause(kind="empty-slices", words=f"the Service's EndpointSlices are empty{matches}", next=pods)
    name = explanation.route.label.partition(":")[2]
    protocol = explanation.packet.protocol.name
    ours = [each for each in decisions if each.port == f"{explanation.route.label}/{protocol}"]
    if not ours:
        has = sorted({f"{port.name!r} ({port.protocol})" for each in slices for port in each.ports})
        others = f"they have {', '.join(has)}" if has else "they have none at all"
        why = "most likely the Service's targetPort is a name that no port of its pods' containers has"
        if not selector:
            why = "a slice's port must have the name of the Service's port"
        words = f"no EndpointSlice has a port {name!r} ({protocol}): {others}; {why}"
        next_ = f"kubectl -n {service.key.namespace} describe service {service.key.name}"
        return Cause(kind="no-such-port", words=words, next=next_)
    return Cause(kind="none-ready", words=_none_serves(ours), next=pods)


def _none_here(explanation: Explanation, cluster: Cluster, service: Service, decisions: Sequence[Decision]) -> Cause:
    """Why a traffic policy admits no endpoint on this node."""
    assert explanation.route is not None
    internal = explanation.route.kind is Kind.CLUSTER_IP
    field = f"{'internal' if internal else 'external'}TrafficPolicy"
    label = f"{explanation.route.label}/{explanation.packet.protocol.name}"
    ours = [each for each in decisions if each.port == label]
    usable = [each for each in ours if each.local is Reason.NOT_LOCAL and each.cluster in (Reason.USED, None)]
    here = [each for each in ours if each.node == cluster.view.node_name]
    nodes = ", ".join(sorted({each.node or "no node" for each in usable})) or "no node"
    if here:
        words = f"{field} is Local, and {_none_serves(here, ' on this node')}"
    else:
        words = f"{field} is Local, and no endpoint is on {cluster.view.node_name}: they are on {nodes}"
    return Cause(kind="policy-local", words=words, next=_slices(service.key))


def _uncovered(explanation: Explanation, table: ForwardingTable | None) -> Iterator[Cause]:
    packet = explanation.packet
    if table is None:
        return
    words = f"the address answers no node ports: {node_port_words(table.node)} (nodePortAddresses)"
    addresses = sorted(table.node.node_port_addresses or ())
    port = f"{packet.port}/{packet.protocol.name}"
    next_ = f"sluice explain {format_host(addresses[0])}:{port}" if addresses else ""
    yield Cause(kind="node-port-address", words=words, next=next_)


def _unknown(explanation: Explanation, evidence: Evidence, table: ForwardingTable | None) -> Cause:
    address = format_address(explanation.packet.destination)
    if evidence.source == "kernel" and (table is None or not table.routes):
        words = "the kernel holds no rules of sluice: the agent has not run here, or has not synced yet"
        return Cause(kind="no-rules", words=words, next="sluice status")
    packet = explanation.packet
    port = f"{packet.port}/{packet.protocol.name}"
    routes = table.routes if table is not None else {}
    at_node_port = routes.get(Frontend(b"", packet.protocol, packet.port))
    if packet.destination in evidence.local_addresses:
        return _no_node_port(packet, None if at_node_port else routes)
    services = evidence.cluster.services.values() if evidence.cluster is not None else ()
    if (named := cause_of(services, packet.destination)) is not None:
        return named
    if (endpoint := _endpoint(packet, routes)) is not None:
        return endpoint
    if at_node_port is not None:
        words = (
            f"{port} is a node port of {name_of(at_node_port)}, and {address} is no address of this node: if it is "
            "another node's, that one is to be asked"
        )
        return Cause(kind="node-port-elsewhere", words=words, next=f"kubectl get nodes -o wide | grep -Fw {address}")
    words = f"no Service has the address {address}: its Service was deleted, or the client uses an old or wrong address"
    return Cause(kind="no-service", words=words, next=f"kubectl get services -A -o wide | grep -Fw {address}")


def _no_node_port(packet: Packet, routes: Mapping[Frontend, Route] | None) -> Cause:
    """That a port of the node is no Service's, or one of another protocol."""
    other = next((each for each in sorted(routes or ()) if each.is_node_port and each.port == packet.port), None)
    if other is not None:
        words = f"the node port {packet.port} is for {other.protocol.name} only"
        next_ = f"sluice explain {other._replace(address=packet.destination)}"
        return Cause(kind="node-port-protocol", words=words, next=next_)
    words = f"no Service has the node port {packet.port}/{packet.protocol.name}"
    return Cause(kind="no-node-port", words=words, next=f"kubectl get services -A | grep -Fw {packet.port}")


def _endpoint(packet: Packet, routes: Mapping[Frontend, Route]) -> Cause | None:
    """That an address is a backend's own, if it is."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for frontend, route in routes.items():
        for each in route.backends:
            if each.address == packet.destination:
                same = (each.port, frontend.protocol) == (packet.port, packet.protocol)
                found[same].add(name_of(route))
    names = sorted(found[True] or found[False])
    if not names:
        return None
    what = format_host(packet.destination) + (f":{packet.port}" if found[True] else "")
    words = f"{what} is an endpoint of {listed(names, 3)}: what goes to its own address passes no Service"
    service = names[0].partition(":")[0]
    return Cause(kind="endpoint", words=words, next=f"sluice explain {service}" if "/" in service else "")


def _none_serves(decisions: Sequence[Decision], where: str = "") -> str:
    """That no endpoint can serve, and why."""
    reasons = [each.cluster if each.cluster not in (None, Reason.USED) else each.local for each in decisions]
    counts = Counter(each.text for each in reasons if each is not None)
    if len(decisions) == 1:
        return f"the only endpoint{where} cannot serve: {next(iter(counts), 'nothing says why')}"
    why = "; ".join(f"{count}: {text}" for text, count in counts.most_common())
    return f"none of the {len(decisions)} endpoints{where} can serve ({why})"


def _slices(key: Key | None) -> str:
    if key is None:
        return ""
    return f"kubectl -n {key.namespace} get endpointslices -l kubernetes.io/service-name={key.name} -o yaml"


def _get(key: Key | None, kind: str, path: str) -> str:
    return f"kubectl -n {key.namespace} get {kind} {key.name} -o jsonpath='{path}'" if key is not None else ""
