"""Why a connection does not work, as far as anybody can tell from here, and what to look at next.  Pure.

Three things can keep a client from its Service: the rules (the objects say why they are so), the rest of the node
(forwarding, other firewalls, a full conntrack table), and what lies beyond both, of which nothing is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import msgspec

from proxy.compute import Decision
from proxy.explain.evidence import Cluster, Evidence
from proxy.explain.obstacles import Obstacle, backends_in, lost_ways, obstacles, passing, some
from proxy.explain.passing import Passing
from proxy.explain.surroundings import Surroundings
from proxy.objects import Key, Service
from proxy.selection import Reason
from rules.explanation import Explanation, Origin, Reaches, StepKind, Why
from rules.forwarding import Address, Backend, Family, ForwardingTable, Kind, family_of, format_address, format_host
from rules.node_ports import node_port_words

NEARLY_FULL = 0.95
"""The part of the conntrack table from which it is worth a word."""


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """One likely cause."""

    kind: str
    """What it is, for programs: `no-slices`, `ip-forward` and so on."""
    words: str
    next: str = ""
    """The command to go on with."""
    certain: bool = False
    """Whether it alone keeps the connection from working, whatever the rules say."""


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
    if not drifted:
        found += _of_the_rules(explanation, evidence, service, decisions)
    elif not isinstance(explanation.outcome, Reaches):
        found.append(_drift(evidence.proxy))
    if evidence.surroundings is not None:
        own = evidence.cluster.view.node_name if evidence.cluster is not None else None
        here = {each.endpoint for each in decisions if own is not None and each.node == own}
        node = evidence.surroundings
        table = evidence.tables.get(family_of(explanation.packet.destination))
        if table is not None and table.node.bound:
            node = unjudged(node)
        found += _of_the_node(explanation, node, here)
    return tuple(found)


def _drift(proxy: str) -> Cause:
    """Of our rules, or of those of another proxy."""
    what = "the kernel does not hold what is wanted"
    if proxy:
        words = f"{what}: {proxy} is late, has ended, or somebody has changed its rules"
        return Cause(kind="drift", words=words, next=f"sluice verify --of {proxy}")
    words = f"{what}; the agent repairs that, unless its driftPolicy is report"
    return Cause(kind="drift", words=words, next="sluice verify")


def unjudged(node: Surroundings) -> Surroundings:
    """The node without others' rules, but for policies: IPVS sends packets itself, and answers alone are forwarded."""
    chains = tuple(each._replace(rules=None) for each in node.chains)
    return msgspec.structs.replace(node, chains=chains)


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
    if packet.destination in evidence.local_addresses:
        words = f"no Service has the node port {packet.port}/{packet.protocol.name}"
        return Cause(kind="no-node-port", words=words, next=f"kubectl get services -A | grep -Fw {packet.port}")
    words = f"no Service has the address {address}: its Service was deleted, or the client uses an old or wrong address"
    return Cause(kind="no-service", words=words, next=f"kubectl get services -A -o wide | grep -Fw {address}")


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


# --- the node ----------------------------------------------------------------------------------------------------


def _of_the_node(explanation: Explanation, node: Surroundings, local: Collection[str]) -> Iterator[Cause]:
    packet, outcome = explanation.packet, explanation.outcome
    family = family_of(packet.destination)
    if proxies := node.other_proxies:
        words = f"another service proxy has rules here ({', '.join(proxies)}), which may come first"
        yield Cause(kind="other-proxy", words=words, next="sluice cleanup --of kube-proxy")
    if node.conntrack is not None:
        tracked, most = node.conntrack
        if tracked >= most * NEARLY_FULL:
            words = f"the conntrack table holds {tracked} of {most} connections: while it is full, new ones are dropped"
            next_ = "sysctl net.netfilter.nf_conntrack_max"
            yield Cause(kind="conntrack-full", words=words, next=next_, certain=tracked >= most)
    if not isinstance(outcome, Reaches):
        return
    if packet.destination[:1] == b"\x7f" and len(packet.destination) == 4 and node.route_localnet is False:
        words = "net.ipv4.conf.all.route_localnet is 0, so what goes to loopback never leaves it"
        next_ = "sysctl -w net.ipv4.conf.all.route_localnet=1"
        yield Cause(kind="route-localnet", words=words, next=next_, certain=True)
    away = [share.backend for share in outcome.shares if share.backend.address not in node.addresses]
    if explanation.origin is Origin.NODE or not away:
        return
    every = len(away) == len(outcome.shares)
    here = {each.address for each in away if str(each) in local}
    yield from _of_routes(away, node, here, every=every)
    yield from _of_forwarding(family, node, every=every)
    back = node.ways.get(packet.source) if packet.source is not None else None
    incoming = packet.interface or (back.interface if back is not None else "")
    # Who gets itself is masqueraded behind all that, and bears no mark yet.
    marked = {
        share.backend: None if share.backend.address == packet.source else share.masqueraded for share in outcome.shares
    }
    packets = [
        passing(each, packet.protocol, node, masqueraded=marked[each])._replace(source=packet.source, incoming=incoming)
        for each in away
    ]
    yield from _of_others(obstacles(family, node, packets).obstacles, packets, every=every)


def _of_others(found: Sequence[Obstacle], packets: Sequence[Passing], *, every: bool) -> Iterator[Cause]:
    """Others' rules that stand in the way; of those that only may, one cause for each table."""
    perhaps: dict[str, list[Obstacle]] = {}
    for each in found:
        certain = every and len(each.surely) == len(packets)
        if each.surely:
            yield Cause(kind=kind_of(each), words=words_of(each), next=each.listing, certain=certain)
        elif each.rule is None:
            yield Cause(kind=kind_of(each), words=words_of(each), next=each.listing)
        else:
            perhaps.setdefault(each.base.place, []).append(each)
    for those in perhaps.values():
        yield Cause(kind="forward-rule-perhaps", words=perhaps_words(those), next=those[0].listing)


def kind_of(each: Obstacle) -> str:
    """The kind of the cause that an obstacle is."""
    return "forward-drop" if each.rule is None else "forward-rule"


def words_of(each: Obstacle) -> str:
    """What an obstacle does to packets."""
    if each.rule is None:
        if each.surely:
            return (
                f"{each.place} is DROP, and no rule there accepts what goes to {backends_in(each.surely)}, as "
                f"`{each.remedy}` would"
            )
        return (
            f"{each.place} is DROP: what is forwarded is dropped unless a rule there accepts it (Docker and ufw set "
            "such a policy)"
        )
    return f"{each.place} {each.does} what goes to {backends_in(each.surely)} ({each.rule.words})"


def perhaps_words(those: Sequence[Obstacle]) -> str:
    """What rules of one table may do, where a packet alone can tell."""
    first = those[0]
    assert first.rule is not None
    where = (
        first.place
        if len(those) == 1
        else f"{len(those)} rules in the table {first.base.place}, such as {first.place},"
    )
    verb = "may drop" if len(those) > 1 or first.does == "drops" else "may refuse"
    what = backends_in(packet for each in those for packet in each.perhaps)
    return f"{where} {verb} some of what goes to {what} ({first.rule.words})"


def _of_routes(
    away: Sequence[Backend], node: Surroundings, here: Collection[Address], *, every: bool
) -> Iterator[Cause]:
    """Backends to which the node sends nothing."""
    reasons = lost_ways([each.address for each in away], node, here)
    lost = [each for each in away if each.address in reasons]
    for why in dict.fromkeys(reasons.values()):
        those = [each for each in lost if reasons[each.address] == why]
        yield Cause(
            kind="no-route",
            words=f"the node has no way to {some(those)}: {why} (routes to pods are the CNI's)",
            next=f"ip route get {format_address(those[0].address)}",
            certain=every and len(lost) == len(away),
        )


def _of_forwarding(family: Family, node: Surroundings, *, every: bool) -> Iterator[Cause]:
    """What may stop a packet that passes through; `every`: whichever backend it gets."""
    if node.forwarding.get(family) is False:
        name = "net.ipv4.ip_forward" if family is Family.IPV4 else "net.ipv6.conf.all.forwarding"
        words = f"{name} is 0: the node does not forward packets to its pods or to other nodes"
        yield Cause(kind="ip-forward", words=words, next=f"sysctl -w {name}=1", certain=every)
    kinds = ("inet", "ip") if family is Family.IPV4 else ("inet", "ip6")
    for chain in node.forward_drops:
        if chain.family in kinds and chain.rules is None:
            # Its rules could not be read.
            unread = Obstacle(base=chain, chain=chain.name, rule=None, surely=(), perhaps=())
            yield Cause(kind="forward-drop", words=words_of(unread), next=chain.listing)
    if "filter" in node.legacy_tables:
        program = "iptables-legacy" if family is Family.IPV4 else "ip6tables-legacy"
        words = "legacy iptables has a filter table, which could not be read: its FORWARD policy may be DROP"
        yield Cause(kind="legacy-forward", words=words, next=f"{program} -S FORWARD")
    if family is Family.IPV4 and node.strict_rp_filter:
        shown = ", ".join(node.strict_rp_filter[:4]) + (", ..." if len(node.strict_rp_filter) > 4 else "")
        words = f"rp_filter is strict on {shown}: what comes in by another interface than answers leave by is dropped"
        yield Cause(kind="rp-filter", words=words, next="sysctl -a -r 'ipv4.conf..*.rp_filter'")
