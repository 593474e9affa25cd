"""From a Service and its slices to what one node forwards: routes, hairpins, and what is told about them.

Theory of operation
-------------------
`compute` is a function of one Service, the slices of that Service, and a `View` of the node.  Nothing else is read, so
that a change costs what it changes: an event recomputes its Service alone, and `proxy.assemble` puts the outcomes
together into a forwarding table.  It is called once per family, as each family has a table of its own (SVC-5).

For every service port (SVC-6) the endpoints are merged and selected (`proxy.selection`), and every frontend of it gets
a route: ClusterIP by internal policy; external IPs, load balancer addresses and the node port by external policy
(TRF-1, TRF-2).  The routes of a service port share their backend sets, as the same objects.

Routes are canonical (`rules.forwarding`): what no packet can tell is not in them.  So a route without any backends has
neither affinity nor a local list, and source ranges that admit everybody are none.

Bad input stays where it is: an address that cannot be read loses its frontend, not the Service, and is one line in
`Outcome.problems`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from proxy.conntrack import Serving
from proxy.objects import EndpointSlice, Service, ServicePort
from proxy.selection import Member, Misfit, PortKey, Reason, Selection, members, merge, select, verdict
from proxy.service_spec import Exposure, exposure_of
from rules.forwarding import (
    Address,
    Backend,
    Endpoint,
    Family,
    Frontend,
    Kind,
    Protocol,
    Refusal,
    Route,
)


class Semantics(msgspec.Struct, frozen=True, kw_only=True):
    """What kube-proxy's modes do differently with one Service; the configured mode decides, not the dataplane."""

    firewall_before_refusal: bool
    """Whether source ranges come before "no endpoints at all", so that those outside them are dropped and not refused
    (NFT-11); in iptables mode the refusal stands alone."""
    let_in_health_checks: bool
    """Whether packets reach health-check node ports whatever the policy of INPUT is (TRF-27)."""
    hairpin_remote: bool
    """Whether a connection that reaches itself is masqueraded on any endpoint, or only on this node's (TRF-7)."""


def semantics_of(mode: str) -> Semantics:
    """What a configured mode means; "" and userspace mean what iptables means (DESIGN 4.10)."""
    rare = mode in {"nftables", "ipvs"}
    return Semantics(
        # In mode ipvs packets pass the filter table, with its ranges, before IPVS can refuse them (IPVS-16).
        firewall_before_refusal=rare,
        let_in_health_checks=mode != "nftables",
        hairpin_remote=not rare,
    )


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The node, as far as routes depend on it.  When it changes, every Service is computed again."""

    node_name: str
    zone: str = ""
    """Its zone label; "" without one (NOD-9)."""
    node_ips: Mapping[Family, Address] = {}
    """Its address of each family (NOD-10), for source ranges that admit the node (TRF-18)."""
    semantics: Semantics = semantics_of("")
    external_ips: bool = True
    """The gate AllowServiceExternalIPs (TRF-15)."""


class HealthCheck(NamedTuple):
    """What load balancers ask about a Service on this node (HC-20)."""

    port: int
    endpoints: int
    """How many distinct addresses of ready endpoints are on this node (HC-22)."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one Service comes to on one node, in one family."""

    routes: Mapping[Frontend, Route] = {}
    hairpins: frozenset[Endpoint] = frozenset()
    """Endpoints in these routes whose connections to themselves are masqueraded."""
    health_check: HealthCheck | None = None
    let_in: int = 0
    """The port of the health check, where the node's INPUT must let it in; else 0."""
    no_local_internal: int = 0
    """Service ports with endpoints, none of which internal policy admits here (SEL-12)."""
    no_local_external: int = 0
    serving: Mapping[Frontend, Serving] = {}
    """All endpoints that serve a frontend, used or not, of frontends whose stale flows are deleted: UDP, and TCP where
    the Service asks for it (CT-2)."""
    problems: tuple[str, ...] = ()
    """What was left out of the Service and why, a line each."""


NOTHING = Outcome()
"""The outcome of a Service that gets no rules."""


def compute(service: Service, slices: Iterable[EndpointSlice], view: View, family: Family) -> Outcome:
    """What a node does for a Service.

    `slices` are those of the Service, in any order and of any family.  Nothing is raised: what is wrong with the
    objects is in the outcome's `problems`.
    """
    problems: list[str] = []
    exposure = _exposure(service, view, family, problems)
    if exposure is None:
        return Outcome(problems=tuple(problems)) if problems else NOTHING
    endpoints = _endpoints(slices, view, family, problems)
    routes: dict[Frontend, Route] = {}
    hairpins: set[Endpoint] = set()
    serving: dict[Frontend, Serving] = {}
    no_local_internal = no_local_external = 0
    for port in service.spec.ports:
        protocol = _PROTOCOLS.get(port.protocol)
        if protocol is None:
            problems.append(f"port {port.port}: protocol {port.protocol!r} is none of TCP, UDP and SCTP")
            continue
        merged = endpoints.get((port.name, port.protocol), ())
        selection = select(merged, view.node_name, view.zone)
        if selection.has_any and not selection.local:
            no_local_internal += exposure.internal_local
            no_local_external += exposure.external_local
        label = _label(service, port)
        guard = selection.has_any or view.semantics.firewall_before_refusal
        used: set[Backend] = set()
        own = [member for member in merged if member.local or view.semantics.hairpin_remote]
        tended = protocol is Protocol.UDP or (protocol is Protocol.TCP and exposure.forget_unanswered)
        alive = frozenset(member.backend for member in merged if member.serving or member.ready) if tended else None
        for frontend, route in _routes(port, protocol, exposure, selection, guard=guard, label=label):
            if (taken := routes.get(frontend)) is None:
                routes[frontend] = route
                if own:
                    used |= route.backends
                    used |= route.local_backends or frozenset()
                if alive is not None:
                    serving[frontend] = alive
            elif taken.label != route.label or taken.kind is route.kind:
                problems.append(f"{frontend} stands in it twice: the first one, {taken.label}, is served")
        hairpins.update(
            Endpoint(member.backend.address, protocol, member.backend.port) for member in own if member.backend in used
        )
    # Service ports have it, and a Service may have none that can be served.
    health_check = _health_check(service, exposure, endpoints, problems) if routes else None
    return Outcome(
        routes=routes,
        hairpins=frozenset(hairpins),
        health_check=health_check,
        let_in=health_check.port if health_check is not None and view.semantics.let_in_health_checks else 0,
        no_local_internal=no_local_internal,
        no_local_external=no_local_external,
        serving=serving,
        problems=tuple(dict.fromkeys(problems)),
    )


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one entry of a Service's slices on this node, and why."""

    port: str
    """The service port it belongs to, as routes label it, with the protocol; "" for one that belongs to none."""
    endpoint: str
    """`address:port`; what the slice says where that could not be made of it."""
    slice: str
    """The name of the slice that holds it."""
    node: str = ""
    """The node it is on; "" when the slice doesn't say."""
    cluster: Reason | None
    """Why traffic under policy Cluster uses it or not; None: no frontend of the Service has such traffic (SEL-2)."""
    local: Reason | None
    """The same for policy Local."""

    @property
    def used(self) -> bool:
        """Whether any connection may go there."""
        return Reason.USED in (self.cluster, self.local)


def decide(service: Service, slices: Iterable[EndpointSlice], view: View, family: Family) -> tuple[Decision, ...]:
    """Why each endpoint of a Service is used on a node or not; nothing for a Service that gets no rules here.

    It goes by the same functions as `compute`, with the same arguments, and says of every entry of the slices of this
    family what they made of it, in the order of the slices' names.
    """
    exposure = _exposure(service, view, family, [])
    if exposure is None:
        return ()
    found = members(slices, family, view.node_name)
    ports: dict[PortKey, tuple[str, dict[Backend, Member], Selection, bool, bool]] = {}
    for port in service.spec.ports:
        if port.protocol not in _PROTOCOLS:
            continue
        key = port.name, port.protocol
        merged = merge([each[1] for each in found if not isinstance(each, Misfit) and each[0] == key])
        accessible = exposure.accessible(port)
        uses_cluster = not exposure.internal_local or accessible
        uses_local = exposure.internal_local or (exposure.external_local and accessible)
        ports[key] = (
            f"{_label(service, port)}/{port.protocol}",
            {member.backend: member for member in merged},
            select(merged, view.node_name, view.zone),
            uses_cluster,
            uses_local,
        )
    decisions = []
    for each in found:
        if isinstance(each, Misfit):
            decisions.append(
                Decision(port="", endpoint=each.text, slice=each.slice, cluster=each.reason, local=each.reason)
            )
            continue
        key, member = each
        label, cluster, local = "", Reason.NOT_A_SERVICE_PORT, Reason.NOT_A_SERVICE_PORT
        uses_cluster = uses_local = True
        if key in ports:
            label, kept, selection, uses_cluster, uses_local = ports[key]
            cluster = local = Reason.DUPLICATE
            if kept[member.backend] is member:
                cluster, local = verdict(member, selection)
        decisions.append(
            Decision(
                port=label,
                endpoint=str(member.backend),
                slice=member.slice,
                node=member.node,
                cluster=cluster if uses_cluster else None,
                local=local if uses_local else None,
            )
        )
    return tuple(decisions)


_PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in Protocol}


def _label(service: Service, port: ServicePort) -> str:
    """The printable name of a service port (SVC-6)."""
    return f"{service.key}:{port.name}" if port.name else str(service.key)


def _exposure(service: Service, view: View, family: Family, problems: list[str]) -> Exposure | None:
    return exposure_of(
        service, family, node_ip=view.node_ips.get(family), external_ips=view.external_ips, problems=problems
    )


def _endpoints(
    slices: Iterable[EndpointSlice], view: View, family: Family, problems: list[str]
) -> Mapping[PortKey, tuple[Member, ...]]:
    """The merged endpoints of every port that the slices have."""
    by_port: dict[PortKey, list[Member]] = {}
    for each in members(slices, family, view.node_name):
        if isinstance(each, Misfit):
            problems.append(f"EndpointSlice {each.slice}: {each.text}: {each.reason.text}")
        else:
            by_port.setdefault(each[0], []).append(each[1])
    return {key: merge(found) for key, found in by_port.items()}


def _routes(
    port: ServicePort, protocol: Protocol, exposure: Exposure, selection: Selection, *, guard: bool, label: str
) -> Iterator[tuple[Frontend, Route]]:
    """The frontends of a service port and their routes, the stronger claim to one address first.

    `guard` says whether source ranges stand before what they guard.
    """
    nowhere = None if selection.has_any else Refusal.REJECT
    not_here = nowhere if selection.local else nowhere or Refusal.DROP
    preface = exposure.proxy_protocol and protocol is Protocol.TCP

    internal = selection.local if exposure.internal_local else selection.cluster
    yield (
        Frontend(exposure.cluster_ip, protocol, port.port),
        Route(
            kind=Kind.CLUSTER_IP,
            backends=internal,
            refusal=not_here if exposure.internal_local else nowhere,
            affinity=exposure.affinity if internal else 0,
            scheduler=exposure.scheduler if internal else "",
            proxy_protocol=bool(internal) and preface,
            label=label,
        ),
    )
    if not exposure.accessible(port):
        return
    external = Route(
        kind=Kind.EXTERNAL_IP,
        backends=selection.cluster,
        local_backends=selection.local if exposure.external_local and selection.cluster else None,
        refusal=not_here if exposure.external_local else nowhere,
        affinity=exposure.affinity if selection.cluster else 0,
        scheduler=exposure.scheduler if selection.cluster else "",
        proxy_protocol=bool(selection.cluster) and preface,
        label=label,
    )
    if exposure.load_balancer:
        route = msgspec.structs.replace(
            external, kind=Kind.LOAD_BALANCER, source_ranges=exposure.source_ranges if guard else ()
        )
        for address in exposure.load_balancer:
            yield Frontend(address, protocol, port.port), route
    for address in exposure.external_ips:
        yield Frontend(address, protocol, port.port), external
    if port.node_port:
        yield Frontend(b"", protocol, port.node_port), msgspec.structs.replace(external, kind=Kind.NODE_PORT)


def _health_check(
    service: Service, exposure: Exposure, endpoints: Mapping[PortKey, tuple[Member, ...]], problems: list[str]
) -> HealthCheck | None:
    """The health-check node port of a load balancer under policy Local (SVC-13), over all its ports (HC-22)."""
    if service.spec.type != "LoadBalancer" or not exposure.external_local:
        return None
    port = service.spec.health_check_node_port
    if not port:
        problems.append("spec.healthCheckNodePort is 0: load balancers cannot ask this node for its endpoints")
        return None
    local = {member.backend.address for each in endpoints.values() for member in each if member.local and member.ready}
    return HealthCheck(port, len(local))
