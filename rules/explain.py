"""One packet through a forwarding table, decision by decision, in words.

Theory of operation
-------------------
`explain` asks the table what every dataplane asks it for the first packet of a connection, in the same order, and
keeps a `Step` for each answer:

    1  source ranges of the address, before anything else (TRF-17)
    2  the frontend with this address, protocol and port
    3  the node port, where the address answers node ports (TRF-20, TRF-21); a frontend without any backend leaves the
       packet to it, as nothing is translated there (NFT-28)
    4  the list by kind, policy and origin of the packet, and whether its source is rewritten (TRF-2 to TRF-8)
    5  a refusal, for who finds no backend (SEL-11)
    6  closed ports of a ClusterIP, and addresses of the service CIDRs that no Service has (NFT-20)

What the table cannot know is told: which addresses are the node's own, and where the packet comes from.  A packet says
that by its source address and input interface, which the table's detector and the node's addresses turn into an
origin; or by the origin itself, when only that matters ("some pod of this node").

Nothing is raised, whatever the table holds: a damaged one, read from a kernel, is explained as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from rules.explanation import (
    MATCHES,
    Dropped,
    Explanation,
    Origin,
    Outcome,
    Packet,
    Reaches,
    Rejected,
    Share,
    Step,
    StepKind,
    Untouched,
    Why,
    listed,
    name_of,
)
from rules.forwarding import (
    Address,
    Backend,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    InputInterface,
    Kind,
    Prefix,
    Protocol,
    Refusal,
    Route,
    SourcePrefix,
    format_address,
)
from rules.near_misses import near_misses
from rules.node_ports import answers_node_ports, is_loopback

_KEPT = "The source address is kept"
_MASQUERADED = "The source address is replaced by the node's (masquerade)"
_RELAYED = "A proxy on this node takes the connection and makes one of its own: the backend sees the node's address"
_STAYING = "the backend is this node itself, and sources are replaced of what leaves it"
_LOCAL = "External traffic policy Local"
_SCHEDULERS = {"": "at random", "round-robin": "in turn", "least-connections": "by its connections, the fewest first"}


def explain(table: ForwardingTable, packet: Packet, local_addresses: AbstractSet[Address]) -> Explanation:
    """What a table does with a packet.

    `local_addresses` are the node's own, of any family and from whatever interface; loopback is always among them.
    """
    return _Walk(table, packet, local_addresses).explanation()


class _Walk:
    """One packet on its way."""

    def __init__(self, table: ForwardingTable, packet: Packet, local_addresses: AbstractSet[Address]) -> None:
        self._table = table
        self._facts = table.node
        self._packet = packet
        self._local_addresses = local_addresses
        self._steps: list[Step] = []
        self._origin = self._find_origin()
        # What the node sends itself passes other hooks than what comes in.
        self._sent_here = self._origin is Origin.NODE or self._is_local(packet.source)

    def explanation(self) -> Explanation:
        packet, routes = self._packet, self._table.routes
        addressed = Frontend(packet.destination, packet.protocol, packet.port)
        route = routes.get(addressed) if len(packet.destination) == self._table.family.address_bytes else None
        if route is not None and not self._admitted(addressed, route):
            return self._end(Dropped(Why.SOURCE_RANGES), addressed, route)
        empty: tuple[Frontend, Route] | None = None
        for frontend, found in self._candidates(addressed, route):
            self._matched(frontend, found, instead=empty is not None)
            if found.backends:
                ended = self._choose(frontend, found)
                if ended is not None:
                    return ended
                return self._refuse(*(empty or (frontend, found)))
            empty = empty or (frontend, found)
        return self._refuse(*empty) if empty else self._nowhere()

    # --- the decisions, in their order ---------------------------------------------------------------------------

    def _find_origin(self) -> Origin:
        """As what the packet counts."""
        packet, detector = self._packet, self._facts.detector
        if packet.origin is Origin.LOCAL_POD and detector is None:
            words = "This node cannot tell its own pods apart, so a pod is treated like anybody outside"
            self._tell(StepKind.ORIGIN, words, "TRF-4")
            return Origin.ELSEWHERE
        if packet.origin is not None:
            return packet.origin
        if packet.source is None:
            return Origin.ELSEWHERE
        source = format_address(packet.source)
        if isinstance(detector, SourcePrefix):
            is_pod, how = packet.source in detector.prefix, f"its address is in {detector.prefix}"
        elif isinstance(detector, InputInterface):
            is_pod, how = packet.interface == detector.name, f"it comes in by {packet.interface}"
        elif detector is not None:
            is_pod = bool(packet.interface) and packet.interface.startswith(detector.prefix)
            how = f"it comes in by {packet.interface}"
        else:
            is_pod, how = False, ""
        if is_pod:
            self._tell(StepKind.ORIGIN, f"{source} counts as a local pod: {how}", "TRF-10")
            return Origin.LOCAL_POD
        if self._is_local(packet.source):
            self._tell(StepKind.ORIGIN, f"{source} is an address of the node itself", "TRF-4")
            return Origin.NODE
        words = f"{source} counts as outside: it is neither the node's nor a local pod's"
        if detector is None:
            words = f"{source} counts as outside: it is not the node's, and this node cannot tell its own pods apart"
        self._tell(StepKind.ORIGIN, words, "TRF-10" if detector is not None else "TRF-4")
        return Origin.ELSEWHERE

    def _admitted(self, frontend: Frontend, route: Route) -> bool:
        ranges, source = route.source_ranges, self._packet.source
        if not ranges:
            return True
        shown = listed(map(str, ranges))
        is_pod = self._origin is Origin.LOCAL_POD
        admitting = next((each for each in ranges if source is not None and source in each), None)
        if source is None and not (is_pod and self._excludes_pods(ranges)):
            words = f"Only sources in {shown} are admitted to this address; what follows is for one of them"
        elif admitting is not None:
            words = f"{format_address(source or b'')} is admitted: it is in the source range {admitting}"
        else:
            who = format_address(source) if source is not None else "A pod's address"
            pods = "; pods are no exception" if is_pod else ""
            words = f"{who} is in none of the source ranges {shown}: the packet is dropped{pods}"
            self._tell(StepKind.SOURCE_RANGES, words, "TRF-19" if is_pod else "TRF-17", frontend, route)
            return False
        self._tell(StepKind.SOURCE_RANGES, words, "TRF-17", frontend, route)
        return True

    def _excludes_pods(self, ranges: Iterable[Prefix]) -> bool:
        """Whether no local pod can have an address in the ranges."""
        detector = self._facts.detector
        if not isinstance(detector, SourcePrefix):
            return False
        pods = detector.prefix
        return not any(each.address in pods or pods.address in each for each in ranges)

    def _candidates(self, addressed: Frontend, route: Route | None) -> Iterable[tuple[Frontend, Route]]:
        """The frontends that match, the stronger first."""
        if route is not None:
            yield addressed, route
        node_port = Frontend(b"", addressed.protocol, addressed.port)
        behind = self._table.routes.get(node_port)
        if behind is not None and answers_node_ports(self._facts, addressed.address, self._local_addresses):
            yield node_port, behind

    def _matched(self, frontend: Frontend, route: Route, *, instead: bool) -> None:
        if frontend.is_node_port:
            address = format_address(self._packet.destination)
            words = f"{frontend.port}/{frontend.protocol.name} is a node port of {name_of(route)}"
            also = "that one has no backend, but " if instead else ""
            self._tell(StepKind.FRONTEND, f"{also}{words}, and {address} answers node ports", "TRF-20", frontend, route)
            return
        what, clause = MATCHES[route.kind]
        self._tell(StepKind.FRONTEND, f"{frontend} is {what} of {name_of(route)}", clause, frontend, route)

    def _choose(self, frontend: Frontend, route: Route) -> Explanation | None:
        """The end of a packet that finds a backend."""
        local_list, masquerade, why = self._offer(frontend, route)
        chosen = sorted((route.local_backends or ()) if local_list else route.backends)
        if not chosen:
            return None
        count = len(chosen)
        how = _SCHEDULERS.get(route.scheduler, f"by the scheduler {route.scheduler}")
        words = f"One of {count} backends is chosen {how}" if count > 1 else f"The only backend is {chosen[0]}"
        self._tell(StepKind.BALANCE, words, "TRF-3", frontend, route)
        if route.affinity:
            words = f"A client that comes again within {route.affinity} s gets the backend that it had"
            self._tell(StepKind.AFFINITY, words, "TRF-24", frontend, route)
        if self._facts.relayed:
            masquerade, why = True, (_RELAYED, "TRF-9")
        staying = [each for each in chosen if masquerade and self._stays(each)]
        if len(staying) == count:
            why = f"{_KEPT}: {_STAYING}", "TRF-9"
        self._tell(StepKind.MASQUERADE, *why, frontend, route)
        if 0 < len(staying) < count:
            words = f"{_KEPT} on the way to {listed(map(str, staying))}: {_STAYING}"
            self._tell(StepKind.MASQUERADE, words, "TRF-9", frontend, route)
        shares = tuple(
            Share(
                backend=each,
                probability=1 / count,
                masqueraded=each not in staying and (masquerade or self._is_hairpin(each)),
            )
            for each in chosen
        )
        itself = [share.backend for share in shares if share.masqueraded and not masquerade]
        if itself:
            words = f"If the client gets itself ({listed(map(str, itself))}), the source address is replaced (hairpin)"
            self._tell(StepKind.HAIRPIN, words, "TRF-7", frontend, route)
        return self._end(Reaches(shares, route.affinity), frontend, route, local_list=local_list)

    def _offer(self, frontend: Frontend, route: Route) -> tuple[bool, bool, tuple[str, str]]:
        """Whether only local backends are offered; whether the source is replaced; why, and the clause."""
        local_list, masquerade, why = False, False, ("", "")
        if route.kind is Kind.CLUSTER_IP:
            words, clause = "A ClusterIP offers all clients the same backends", "TRF-2"
            masquerade, why = self._masquerade_cluster_ip()
        elif not route.policy_local:
            words, clause = "External traffic policy Cluster offers everybody the backends of all nodes", "TRF-2"
            masquerade, why = True, (f"{_MASQUERADED}, so that answers come back this way", "TRF-5")
        elif self._origin is Origin.LOCAL_POD:
            words, clause = f"{_LOCAL} concerns outsiders: a local pod is offered the backends of all nodes", "TRF-4"
            why = f"{_KEPT}: the client is a local pod", "TRF-8"
        elif self._origin is Origin.NODE:
            words, clause = f"{_LOCAL} concerns outsiders: the node is offered the backends of all nodes", "TRF-4"
            masquerade, why = True, (f"{_MASQUERADED}: the client is the node itself", "TRF-4")
        else:
            words, clause = f"{_LOCAL} offers outsiders the backends on this node only", "TRF-4"
            local_list, why = True, (f"{_KEPT}, as external traffic policy Local promises", "TRF-8")
        self._tell(StepKind.POLICY, words, clause, frontend, route)
        return local_list, masquerade, why

    def _stays(self, backend: Backend) -> bool:
        """Whether a packet that comes in ends at a socket of the node: it is not sent out, where sources are replaced.

        What the node sends to itself is, by its loopback.
        """
        return not self._sent_here and not self._facts.relayed and self._is_local(backend.address)

    def _masquerade_cluster_ip(self) -> tuple[bool, tuple[str, str]]:
        if self._facts.masquerade_all:
            return True, (f"{_MASQUERADED}: masqueradeAll is set on this node", "TRF-6")
        own = self._packet.source in {None, self._packet.destination}
        if self._facts.bound and self._origin is Origin.NODE and own:
            words = "the node takes the address that it connects to as its own source, which is no use to a backend"
            return True, (f"{_MASQUERADED}: {words}", "IPVS-14")
        if self._facts.detector is None:
            return False, (f"{_KEPT}: a node that cannot tell pods from others replaces nobody's", "TRF-6")
        if self._origin is Origin.LOCAL_POD:
            return False, (f"{_KEPT}: the client is a local pod", "TRF-8")
        return True, (f"{_MASQUERADED}: the client is no local pod, and answers must come back this way", "TRF-6")

    def _is_hairpin(self, backend: Backend) -> bool:
        endpoint = Endpoint(backend.address, self._packet.protocol, backend.port)
        return backend.address == self._packet.source and endpoint in self._table.hairpins

    def _refuse(self, frontend: Frontend, route: Route) -> Explanation:
        """The end of a packet that finds a frontend and no backend."""
        if self._guarded():
            return self._end(Dropped(Why.LOOPBACK))
        local_list = bool(route.backends)
        if local_list:
            why, words = Why.NO_LOCAL_ENDPOINTS, "No endpoint that can serve is on this node"
        elif route.refusal is Refusal.DROP:
            why = Why.NO_LOCAL_ENDPOINTS
            words = "Endpoints that can serve are on other nodes only, and traffic policy Local admits none of them"
        else:
            why, words = Why.NO_ENDPOINTS, "No endpoint of the Service can serve, on any node"
        if route.refusal is None:
            words += ", and no rule refuses the packet"
            self._tell(StepKind.REFUSAL, words, "SEL-11", frontend, route)
            return self._nowhere(found=True)
        outcome: Outcome
        if route.refusal is Refusal.REJECT:
            outcome, words = Rejected(why), f"{words}: {self._told_so()}"
        else:
            outcome, words = Dropped(why), f"{words}: the packet is dropped"
        self._tell(StepKind.REFUSAL, words, "SEL-11", frontend, route)
        return self._end(outcome, frontend, route, local_list=local_list)

    def _nowhere(self, *, found: bool = False) -> Explanation:
        """The end of a packet that no frontend takes; `found`: one matched, and does nothing."""
        packet, facts = self._packet, self._facts
        address = format_address(packet.destination)
        if self._guarded():
            return self._end(Dropped(Why.LOOPBACK))
        uncovered = False
        if not found:
            near, uncovered = near_misses(self._table, packet, self._local_addresses)
            self._steps += near
        if (facts.relayed or facts.bound) and (refused := self._refused_by_the_node()) is not None:
            return refused
        # Refusals of ClusterIPs stand where packets leave the node, and not where it is addressed itself.
        leaves = self._sent_here or not self._is_local(packet.destination)
        is_cluster_ip = any(
            frontend.address == packet.destination and route.kind is Kind.CLUSTER_IP
            for frontend, route in self._table.routes.items()
        )
        if leaves and is_cluster_ip:
            port = f"{packet.port}/{packet.protocol.name}"
            words = f"{address} is a ClusterIP, and no Service answers at port {port} there"
            if facts.reject_closed_ports:
                self._tell(StepKind.REFUSAL, f"{words}: the client is told so (ICMP port unreachable)", "NFT-20")
                return self._end(Rejected(Why.CLOSED_PORT))
            self._tell(StepKind.REFUSAL, f"{words}: in this mode such packets are left alone", "TRF-13")
            return self._end(Untouched(Why.CLOSED_PORT))
        network = next((each for each in facts.service_cidrs if packet.destination in each), None)
        if leaves and network is not None:
            words = f"No Service has the address {address}, which is in service CIDR {network}: the packet is dropped"
            self._tell(StepKind.REFUSAL, words, "NFT-20")
            return self._end(Dropped(Why.UNALLOCATED))
        whose = ": the packet is left to the node's own programs" if self._is_local(packet.destination) else ""
        if not found:
            words = f"No Service answers at {Frontend(packet.destination, packet.protocol, packet.port)}{whose}"
            self._tell(StepKind.REFUSAL, words, "TRF-22" if whose else "TRF-1")
        why = Why.NO_ENDPOINTS if found else Why.NODE_PORT_ADDRESS if uncovered else Why.NO_FRONTEND
        return self._end(Untouched(why))

    def _refused_by_the_node(self) -> Explanation | None:
        """The end of a packet to a closed port of an address that the node has made its own, if it is to one."""
        packet = self._packet
        if self._is_local(packet.destination):
            return None
        address = format_address(packet.destination)
        if any(frontend.address == packet.destination for frontend in self._table.routes):
            why, words = Why.CLOSED_PORT, f"no Service answers at port {packet.port}/{packet.protocol.name} there"
        elif self._facts.relayed and any(packet.destination in network for network in self._facts.service_cidrs):
            why, words = Why.UNALLOCATED, "no Service has it"
        else:
            return None
        words = f"{address} is an address of this node for its Services' sake, and {words}: {self._told_so()}"
        self._tell(StepKind.REFUSAL, words, "TRF-13")
        return self._end(Rejected(why))

    def _told_so(self) -> str:
        """How a client hears that it is refused."""
        is_reset = self._facts.relayed and self._packet.protocol is Protocol.TCP
        return f"the client is told so ({'TCP reset' if is_reset else 'ICMP port unreachable'})"

    def _guarded(self) -> bool:
        """Whether a packet to loopback is kept from those who are not there (IPT-14)."""
        packet = self._packet
        if not (self._facts.loopback_node_ports and self._table.family is Family.IPV4):
            return False
        if not is_loopback(packet.destination) or packet.source is None or is_loopback(packet.source):
            return False
        words = (
            f"{format_address(packet.destination)} is loopback, where others than the node itself reach node ports only"
        )
        self._tell(StepKind.REFUSAL, words, "IPT-14")
        return True

    # --- tools ---------------------------------------------------------------------------------------------------

    def _is_local(self, address: Address | None) -> bool:
        return address is not None and (address in self._local_addresses or is_loopback(address))

    def _tell(
        self,
        kind: StepKind,
        words: str,
        clause: str,
        frontend: Frontend | None = None,
        route: Route | None = None,
    ) -> None:
        label = route.label if route is not None else ""
        self._steps.append(Step(kind=kind, words=words, clause=clause, frontend=frontend, label=label))

    def _end(
        self,
        outcome: Outcome,
        frontend: Frontend | None = None,
        route: Route | None = None,
        *,
        local_list: bool = False,
    ) -> Explanation:
        return Explanation(
            packet=self._packet,
            origin=self._origin,
            steps=tuple(self._steps),
            outcome=outcome,
            frontend=frontend,
            route=route,
            local_list=local_list,
        )
