"""From a question and the evidence to answers: one for each frontend that the question is about.  Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from proxy.compute import Decision
from proxy.explain.asked import Asked, AskedAddress, AskedService, Client
from proxy.explain.cause import Cause
from proxy.explain.causes import causes_of
from proxy.explain.disagreement import disagreements
from proxy.explain.evidence import Cluster, Evidence
from proxy.explain.mentions import not_answered
from proxy.objects import Key, Service
from proxy.selection import Reason
from rules.explain import explain
from rules.explanation import Explanation, Origin, Packet, Reaches, listed, verdict
from rules.forwarding import (
    Address,
    Family,
    ForwardingTable,
    Frontend,
    InputInterface,
    InputInterfacePrefix,
    Kind,
    Route,
    family_of,
)
from rules.node_ports import answers_node_ports, is_loopback

_MOST_NEAR = 3
"""How many names that are like one that is not there are told."""


class Unused(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint of the Service that the connection cannot get, and why."""

    endpoint: str
    node: str
    slice: str
    words: str
    clause: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one connection."""

    asked: Frontend
    """With an address also for a node port: the one that was tried."""
    label: str
    """Whose frontend it is; of a Service that was asked about, also where it did not get the frontend."""
    explanation: Explanation
    disagreements: tuple[str, ...] = ()
    """Where what is wanted and what the kernel holds differ on this, as lines of a diff."""
    nodes: Mapping[str, str] = {}
    """On which node a backend is, where objects say it."""
    unused: tuple[Unused, ...] = ()
    causes: tuple[Cause, ...] = ()
    others: tuple[Explanation, ...] = ()
    """The same for who connects from elsewhere, unless it was asked about one client."""

    @property
    def works(self) -> bool:
        """Whether the connection gets to a backend, as far as this node is concerned."""
        return isinstance(self.explanation.outcome, Reaches) and not any(cause.certain for cause in self.causes)


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """All answers to a question."""

    asked: str
    evidence: Evidence
    answers: tuple[Answer, ...]
    missing: tuple[str, ...] = ()
    """What was asked about and cannot be answered, a line each."""


def exit_code(answers: Answers) -> int:
    """0: every connection works; 1: one does not, or there is nothing to connect to."""
    if answers.missing or not answers.answers:
        return 1
    return 0 if all(each.works for each in answers.answers) else 1


def answer(asked: Asked, client: Client, evidence: Evidence) -> Answers:
    """What becomes of connections to what is asked, by the evidence."""
    if isinstance(asked, AskedAddress):
        frontend = Frontend(asked.address, asked.protocol, asked.port)
        found = _answer(frontend, frontend, client, evidence, "")
        return Answers(asked=str(asked), evidence=evidence, answers=(found,))
    answers: list[Answer] = []
    missing: list[str] = []
    frontends = list(_frontends(asked, evidence))
    if client.address is not None and frontends:
        own = family_of(client.address)
        frontends = [each for each in frontends if each[0] is own]
        if not frontends:
            missing.append(f"{asked} has no frontend of {own.label}, which --from is of")
    for family, frontend, label in frontends:
        destination = frontend.address or _node_port_address(evidence, family)
        if destination is None:
            missing.append(f"{frontend}: no address of this node answers node ports, as far as is known here")
        else:
            answers.append(_answer(frontend, frontend._replace(address=destination), client, evidence, label))
    if not answers and not missing:
        missing.append(_nothing(asked, evidence))
    service = evidence.cluster.services.get(asked.key) if evidence.cluster is not None else None
    if answers and service is not None:
        notes = tuple(not_answered(service))
        evidence = msgspec.structs.replace(evidence, problems=(*evidence.problems, *notes))
    return Answers(asked=str(asked), evidence=evidence, answers=tuple(answers), missing=tuple(missing))


def _answer(frontend: Frontend, tried: Frontend, client: Client, evidence: Evidence, label: str) -> Answer:
    """The answer about `frontend`, of the Service `label`, at the address that is tried."""
    family = family_of(tried.address)
    table = _table(evidence, family)
    origin = client.origin
    if client.address is None and origin is None:
        origin = _usual_origin(tried, frontend, table)
    packet = _packet(tried, client, origin, evidence)
    explanation = explain(table, packet, evidence.local_addresses)
    service, decisions = _decisions(explanation, evidence.cluster, family)
    decided = explanation.route.label if explanation.route is not None else ""
    compared = {frontend, tried}
    if any(answers_node_ports(each.node, tried.address, evidence.local_addresses) for each in _known(evidence, family)):
        compared.add(tried._replace(address=b""))
    differing = tuple(disagreements(compared, family, evidence))
    drifted = bool(differing) and evidence.source == "kernel" and evidence.cluster is not None
    causes = causes_of(explanation, evidence, service, decisions, drifted=drifted)
    if differing and evidence.source == "kernel" and evidence.cluster is None:
        # Nobody knows what is wanted: it is damage, of which a table cannot tell what it does.
        words = "the kernel's rules are damaged, and may do something else than what is told here"
        causes = (*causes, Cause(kind="damage", words=words, next="sluice dump"))
    if conflict := _conflict(frontend, label, evidence.cluster):
        causes = (conflict, *causes)
    if differing and evidence.source == "agent" and evidence.kernel is not None:
        held = evidence.kernel.get(family) or ForwardingTable(family=family)
        causes = (_drift(explain(held, packet, evidence.local_addresses)), *causes)
    others: tuple[Explanation, ...] = ()
    if client == Client(interface=client.interface) and not is_loopback(tried.address):
        packets = (_packet(tried, client, each, evidence) for each in Origin if each is not origin)
        others = tuple(explain(table, each, evidence.local_addresses) for each in packets)
    return Answer(
        asked=tried,
        label=label or decided,
        explanation=explanation,
        disagreements=differing,
        nodes=_nodes(decisions),
        unused=tuple(_unused(explanation, service, decisions)),
        causes=causes,
        others=others,
    )


def _known(evidence: Evidence, family: Family) -> Iterator[ForwardingTable]:
    for tables in (evidence.tables, evidence.kernel or {}):
        if family in tables:
            yield tables[family]


def _table(evidence: Evidence, family: Family) -> ForwardingTable:
    return evidence.tables.get(family) or ForwardingTable(family=family)


# --- who connects -------------------------------------------------------------------------------------------


def _usual_origin(tried: Frontend, frontend: Frontend, table: ForwardingTable) -> Origin:
    """ClusterIPs are for pods, loopback is for the node itself, everything else is for outsiders."""
    if is_loopback(tried.address):
        return Origin.NODE  # a pod's or an outsider's is its own
    route = table.routes.get(frontend) or table.routes.get(tried)
    if route is not None:
        return Origin.LOCAL_POD if route.kind is Kind.CLUSTER_IP else Origin.ELSEWHERE
    inside = any(tried.address in network for network in table.node.service_cidrs)
    among = any(each.address == tried.address and found.kind is Kind.CLUSTER_IP for each, found in table.routes.items())
    return Origin.LOCAL_POD if inside or among else Origin.ELSEWHERE


def _packet(tried: Frontend, client: Client, origin: Origin | None, evidence: Evidence) -> Packet:
    source, interface = client.address, client.interface
    node = evidence.surroundings
    if source is None and origin is Origin.NODE and _is_bound(tried.address, evidence):
        source = tried.address
    elif source is None and origin is Origin.NODE:
        source = _own_source(tried.address, evidence)
        if source is not None:
            origin = None  # then the rules tell it by the address, and may take it for a pod's
    elif source is not None and not interface and source not in evidence.local_addresses:
        if node is not None and source in node.ways:
            interface = node.ways[source].interface
        elif _is_local_pod(source, evidence):
            origin = Origin.LOCAL_POD
    return Packet(
        destination=tried.address,
        protocol=tried.protocol,
        port=tried.port,
        source=source,
        interface=interface,
        origin=origin,
    )


def _is_bound(destination: Address, evidence: Evidence) -> bool:
    """Whether an address is the node's own for its frontends' sake: then it is its own source too (IPVS-14)."""
    table = _table(evidence, family_of(destination))
    is_ours = destination in evidence.local_addresses or is_loopback(destination)
    held = table.node.bound or table.node.relayed
    return held and not is_ours and any(each.address == destination for each in table.routes)


def _own_source(destination: Address, evidence: Evidence) -> Address | None:
    """The address that the node gives to a connection of its own."""
    if destination in evidence.local_addresses or is_loopback(destination):
        return destination
    node = evidence.surroundings
    if node is not None and destination in node.ways:
        return node.ways[destination].source
    return evidence.node_ips.get(family_of(destination))


def _is_local_pod(source: Address, evidence: Evidence) -> bool:
    """Whether the rules would take it for a local pod by its interface, which nobody can see from here."""
    detector = _table(evidence, family_of(source)).node.detector
    cluster = evidence.cluster
    if cluster is None or not isinstance(detector, InputInterface | InputInterfacePrefix):
        return False
    return source in cluster.local_pods


# --- which frontends ----------------------------------------------------------------------------------------


def _frontends(asked: AskedService, evidence: Evidence) -> Iterator[tuple[Family, Frontend, str]]:
    """The frontends of a Service, those that it does not get among them; with the label of its port."""
    found: dict[tuple[Family, Frontend], str] = {}
    for family in Family:
        for table in _known(evidence, family):
            for frontend, route in table.routes.items():
                if _is_of(route, asked):
                    found[family, frontend] = route.label
    if evidence.cluster is not None:
        claimed = evidence.cluster.claims.get(asked.key, {})
        found |= {place: route.label for place, route in claimed.items()}
    labels = {
        label for (_, frontend), label in found.items() if asked.port in (label.partition(":")[2], str(frontend.port))
    }
    for (family, frontend), label in sorted(found.items(), key=_in_reading_order):
        if label in labels or not asked.port:
            yield family, frontend, label


def _in_reading_order(item: tuple[tuple[Family, Frontend], str]) -> tuple[str, Family, bool, Frontend]:
    (family, frontend), label = item
    return label, family, frontend.is_node_port, frontend


def _is_of(route: Route, asked: AskedService) -> bool:
    return route.label.partition(":")[0] == str(asked.key)


def _node_port_address(evidence: Evidence, family: Family) -> Address | None:
    """An address at which node ports answer: the node's own where that is one."""
    table = evidence.tables.get(family)
    own = evidence.node_ips.get(family)
    answering = table.node.node_port_addresses if table is not None else None
    if answering is not None:
        return own if own in answering else min(answering, default=None)
    if own is not None:
        return own
    candidates = [each for each in evidence.local_addresses if family_of(each) is family and not is_loopback(each)]
    return min(candidates, default=None)


def _nothing(asked: AskedService, evidence: Evidence) -> str:
    """Why there is no frontend at all."""
    service = evidence.cluster.services.get(asked.key) if evidence.cluster is not None else None
    if service is None:
        why = evidence.cluster.troubles.get(str(asked.key)) if evidence.cluster is not None else None
        if why:
            return f"Service {asked.key} is there, and cannot be used: {why}"
        known = "There is no Service" if evidence.cluster is not None else f"In {evidence.words} nothing is labelled"
        near = _near(asked.key, evidence)
        return f"{known} {asked.key}{f'; there is {listed(near)}' if near else ''}"
    spec = service.spec
    if spec.type == "ExternalName":
        return f"Service {asked.key} is of type ExternalName: DNS gives its clients another name (SVC-4)"
    if spec.cluster_ip in ("", "None"):
        return f"Service {asked.key} is headless (no clusterIP): DNS gives clients the addresses of its pods (SVC-4)"
    if asked.port and spec.ports:
        ports = ", ".join(f"{port.name or '(no name)'} {port.port}/{port.protocol}" for port in spec.ports)
        return f"Service {asked.key} has no port {asked.port}; it has {ports}"
    why = "its addresses cannot be used" if spec.ports else "it has no ports"
    return f"Service {asked.key} gets no rules on this node: {why}"


def _near(key: Key, evidence: Evidence) -> list[str]:
    """Services whose names are nearly that, those of the same name in other namespaces first."""
    labels = {
        route.label.partition(":")[0]
        for family in Family
        for table in _known(evidence, family)
        for route in table.routes.values()
    }
    keys = sorted(labels.union(evidence.cluster.names) if evidence.cluster is not None else labels)
    by_name: dict[str, list[str]] = {}
    for each in keys:
        by_name.setdefault(each.partition("/")[2], []).append(each)
    if key.name in by_name:
        return by_name[key.name][:_MOST_NEAR]
    near = [each for name in difflib.get_close_matches(key.name, by_name, _MOST_NEAR) for each in by_name[name]]
    return sorted(near, key=lambda each: not each.startswith(f"{key.namespace}/"))[:_MOST_NEAR]


# --- what objects add ------------------------------------------------------------------------------------------


def _decisions(
    explanation: Explanation, cluster: Cluster | None, family: Family
) -> tuple[Service | None, Sequence[Decision]]:
    if cluster is None or explanation.route is None:
        return None, ()
    service = cluster.of_label(explanation.route.label)
    if service is None:
        return None, ()
    return service, cluster.decisions(service, family)


def _nodes(decisions: Sequence[Decision]) -> dict[str, str]:
    return {each.endpoint: each.node for each in decisions if each.node}


def _unused(explanation: Explanation, service: Service | None, decisions: Sequence[Decision]) -> Iterator[Unused]:
    """The endpoints of the Service that the connection cannot get."""
    route, outcome = explanation.route, explanation.outcome
    if route is None or service is None:
        return
    got = {str(share.backend) for share in outcome.shares} if isinstance(outcome, Reaches) else set()
    by_local = explanation.local_list
    if route.kind is Kind.CLUSTER_IP:
        by_local = service.spec.internal_traffic_policy == "Local"
    label = f"{route.label}/{explanation.packet.protocol.name}"
    for each in decisions:
        reason = each.local if by_local else each.cluster
        if each.port not in (label, "") or reason is None:
            continue
        words, clause = reason.text, reason.clause
        if reason is Reason.USED:
            if each.endpoint in got or not isinstance(outcome, Reaches):
                continue
            words, clause = "it should be used, and the table does not have it", "SEL-3"
        yield Unused(endpoint=each.endpoint, node=each.node, slice=each.slice, words=words, clause=clause)


def _drift(held: Explanation) -> Cause:
    """What the kernel makes of it, where that is not what is wanted."""
    words = f"the kernel holds something else than what is wanted: by that the connection {verdict(held.outcome)}"
    certain = not isinstance(held.outcome, Reaches)
    return Cause(kind="drift", words=words, next="sluice verify", certain=certain)


def _conflict(frontend: Frontend, label: str, cluster: Cluster | None) -> Cause | None:
    """Why a Service that was asked about does not have its own frontend."""
    winner = cluster.winners.get(str(frontend)) if cluster is not None else None
    if winner is None or not label or label.partition(":")[0] == winner:
        return None
    words = f"{frontend} belongs to the older Service {winner}; this one gets it when that one goes"
    return Cause(kind="conflict", words=words, next=f"sluice explain {winner}", certain=True)
