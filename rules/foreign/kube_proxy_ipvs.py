"""kube-proxy's ipvs mode, decoded (IPVS-7 to IPVS-21).  Pure.

Theory of operation
-------------------
Sets tell which frontends there are, of which kind, and under which external policy; virtual servers tell which backends
they have; rules tell who is masqueraded.  A node port is a virtual server at each address of the node, so the addresses
that have one are those that answer node ports.

What mode ipvs has otherwise than the others (IPVS-19 to IPVS-21): a frontend has one list of backends for everybody.
Under policy Local this is the local list, or that of the cluster where the local one is empty; then nobody is refused.
Such a route has the one list twice, as what outsiders are given and as what all others are.

Real servers of weight 0 drain, and count as gone (IPVS-23).  Names of Services stand nowhere: routes have no labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rules.foreign.gathering import ForeignError, Reading
from rules.foreign.ipvs_state import State
from rules.foreign.kube_proxy_ipvs_chains import Found, is_meant, out_rules, read
from rules.foreign.kube_proxy_ipvs_sets import Set, Sets
from rules.foreign.saved import SavedFamily
from rules.forwarding import (
    Address,
    Backend,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Refusal,
    Route,
    check_route,
    format_address,
    merge_prefixes,
)
from rules.ipvs import KUBE_PROXYS_DEVICE
from rules.ipvs.decode import element_words, protocol_of
from rules.ipvs.layout import DEFAULT_SCHEDULER, own_scheduler
from rules.ipvs.messages import PERSISTENT, Held, Key
from rules.netlink.ipset_messages import Element
from rules.node_ports import is_loopback

__all__ = ["MODE", "decode", "is_meant", "is_there"]

MODE = "ipvs"

_KINDS = (
    (Set.LOAD_BALANCER, Kind.LOAD_BALANCER, Set.LOAD_BALANCER_LOCAL),
    (Set.EXTERNAL_IP, Kind.EXTERNAL_IP, None),
    (Set.EXTERNAL_IP_LOCAL, Kind.EXTERNAL_IP, Set.EXTERNAL_IP_LOCAL),
    (Set.CLUSTER_IP, Kind.CLUSTER_IP, None),
)
"""Sets of frontends, their kinds, and the sets of those under policy Local; in the order in which rules meet them."""
_NODE_PORTS = (
    (Protocol.TCP, Set.NODE_PORT_TCP, Set.NODE_PORT_LOCAL_TCP),
    (Protocol.UDP, Set.NODE_PORT_UDP, Set.NODE_PORT_LOCAL_UDP),
    (Protocol.SCTP, Set.NODE_PORT_SCTP, Set.NODE_PORT_LOCAL_SCTP),
)
_SENTENCES = 100
"""Of damage, beyond which the rest is counted."""
_SHOWN = 3


class _Wanted(NamedTuple):
    """A frontend, as sets tell it."""

    kind: Kind
    local: bool
    """Whether external policy Local governs it."""


def is_there(state: State, family: Family) -> bool:
    """Whether kube-proxy has sets with frontends of a family."""
    found = Sets(state.sets or {}, family)
    return any(found[which] for which, *_ in _KINDS) or any(found[which] for _, which, _ in _NODE_PORTS)


def decode(saved: SavedFamily | None, state: State, family: Family) -> Reading:
    """The table that sets, servers and rules make; without rules, who is masqueraded is not told.

    Raises:
        ForeignError: servers or sets are not known; the message says which, and what to give.
    """
    if state.servers is None and state.sets is not None and not is_there(state, family):
        state = state._replace(servers={})  # where there is nothing, ipvsadm prints nothing
    if state.servers is None or state.sets is None:
        missing = [
            f"what `{program}` prints ({what})"
            for program, what, given in (
                ("ipvsadm -Sn", "the virtual servers with their backends", state.servers),
                ("ipset save", "which frontends there are", state.sets),
            )
            if given is None
        ]
        raise ForeignError(f"kube-proxy runs in ipvs mode there: give {' and '.join(missing)} too")
    return _Decoder(saved, state, state.servers, Sets(state.sets, family), family).reading()


class _Decoder:
    """Reads what there is of one family."""

    def __init__(
        self, saved: SavedFamily | None, state: State, servers: Mapping[Key, Held], sets: Sets, family: Family
    ) -> None:
        self._saved = saved
        self._family = family
        self._servers = {key: held for key, held in servers.items() if key.family is family and not key.mark}
        self._sets = sets
        self._own = None if state.own is None else _of_family(state.own, family)
        self._device = None if state.bound is None else _of_family(state.bound, family)
        self._bound = (self._device or frozenset()) | {each.address for each in sets[Set.BOUND]}
        self._wrong: dict[str, None] = dict.fromkeys((*state.faults, *sets.faults()))
        self._by_port: dict[tuple[int, int], list[Key]] = {}
        for key in self._servers:
            self._by_port.setdefault((key.protocol, key.port), []).append(key)
        self._used: set[Key] = set()
        self._grouped: dict[Set, dict[Element, list[Element]]] = {}
        self._scheduler = self._usual_scheduler()

    def reading(self) -> Reading:
        found = self._rules()
        wanted = self._frontends()
        routes = {frontend: route for frontend, each in wanted.items() if (route := self._addressed(frontend, each))}
        addresses = self._node_port_addresses(wanted)
        for frontend, local in self._node_ports():
            if (route := self._node_port(frontend, addresses, local=local)) is not None:
                routes[frontend] = route
        self._check_guard(routes, found)
        self._check_servers(wanted, addresses)
        self._check_addresses({frontend.address for frontend in wanted})
        node = NodeFacts(
            mark=found.mark,
            masquerade_all=found.masquerade_all,
            detector=found.detector,
            node_port_addresses=addresses,
            reject_closed_ports=True,
            health_check_ports=frozenset(each.port for each in self._sets[Set.HEALTH_CHECK]),
            bound=True,
        )
        kept = {}
        for frontend, route in routes.items():
            if fault := check_route(self._family, frontend, route):
                self._complain(f"what there is for {frontend} makes no sense: {fault}")
            else:
                kept[frontend] = route
        table = ForwardingTable(
            family=self._family,
            node=node,
            routes=kept,
            hairpins=frozenset(self._hairpins()),
            damage=frozenset(self._damage()),
        )
        untold = found.untold if addresses else found.untold | {"node_port_addresses"}
        return Reading(mode=MODE, table=table, untold=untold, own=self._own, notes=found.notes)

    def _rules(self) -> Found:
        if self._saved is not None:
            for each in self._saved.faults:
                self._complain(each)
            return read(self._saved, self._sets, self._complain)
        program = "iptables-save" if self._family is Family.IPV4 else "ip6tables-save"
        note = f"what `{program}` prints is not given: who is masqueraded, and who is kept out, is taken for granted"
        untold = frozenset({"mark", "masquerade_all", "detector"})
        facts = NodeFacts()
        return Found(facts.mark, facts.masquerade_all, facts.detector, untold, (note,), guards_the_node=False)

    def _complain(self, sentence: str) -> None:
        self._wrong.setdefault(sentence)

    def _damage(self) -> Iterable[str]:
        told = list(self._wrong)
        if len(told) > _SENTENCES:
            told[_SENTENCES:] = [f"and {len(told) - _SENTENCES} things more are not as they should be"]
        return told

    # --- frontends -----------------------------------------------------------------------------------------------

    def _frontends(self) -> dict[Frontend, _Wanted]:
        """Those with an address."""
        found: dict[Frontend, _Wanted] = {}
        for which, kind, local in _KINDS:
            for element in sorted(self._sets[which]):
                frontend = self._frontend(which, element)
                if frontend is not None:
                    found.setdefault(frontend, _Wanted(kind, local is not None and element in self._sets[local]))
        for part, whole, words in (
            (Set.LOAD_BALANCER_LOCAL, Set.LOAD_BALANCER, "policy Local"),
            (Set.RANGED, Set.LOAD_BALANCER, "source ranges"),
        ):
            for element in sorted(self._sets[part] - self._sets[whole]):
                name = self._sets.name(part)
                self._complain(f"{element_words(element)} has {words} ({name}), and is no load balancer's address")
        return found

    def _frontend(self, which: Set, element: Element) -> Frontend | None:
        protocol = protocol_of(element.protocol)
        if protocol is None or not element.port:
            self._complain(f"ipset {self._sets.name(which)} has {element_words(element)}, which is no frontend")
            return None
        return Frontend(element.address, protocol, element.port)

    def _addressed(self, frontend: Frontend, wanted: _Wanted) -> Route | None:
        key = Key(self._family, frontend.protocol, frontend.address, frontend.port)
        held = self._servers.get(key)
        if held is None:
            self._complain(f"{frontend} has no virtual server")
            return None
        self._used.add(key)
        ranges = self._ranges(frontend) if wanted.kind is Kind.LOAD_BALANCER else ()
        return self._route(str(frontend), wanted, held, ranges)

    def _ranges(self, frontend: Frontend) -> tuple[Prefix, ...]:
        """Whom a load balancer's address admits (IPVS-16)."""
        element = Element(frontend.address, frontend.protocol, frontend.port)
        found = [Prefix(each.other, each.length) for each in self._by_frontend(Set.SOURCE_CIDR).get(element, ())]
        for each in self._by_frontend(Set.SOURCE_IP).get(element, ()):
            found.append(Prefix(each.other, len(each.other) * 8))
            if each.other != frontend.address:
                self._complain(f"{frontend} admits {format_address(each.other)} in place of the node itself")
        if element not in self._sets[Set.RANGED]:
            if found:
                self._complain(f"{frontend} has source ranges, which nobody asks for ({self._sets.name(Set.RANGED)})")
            return ()
        if not found:
            self._complain(f"{frontend} admits nobody: it is to be kept to source ranges, and has none")
        merged = merge_prefixes(found)
        return () if merged and merged[0].length == 0 else merged

    def _by_frontend(self, which: Set) -> Mapping[Element, list[Element]]:
        if which not in self._grouped:
            grouped: dict[Element, list[Element]] = {}
            for each in self._sets[which]:
                grouped.setdefault(Element(each.address, each.protocol, each.port), []).append(each)
            self._grouped[which] = grouped
        return self._grouped[which]

    # --- node ports ----------------------------------------------------------------------------------------------

    def _node_ports(self) -> Iterator[tuple[Frontend, bool]]:
        """Node ports, and whether they are under policy Local."""
        for protocol, every, local in _NODE_PORTS:
            ports = {each.port for each in self._sets[every]}
            under = {each.port for each in self._sets[local]}
            for port in sorted(ports):
                yield Frontend(b"", protocol, port), port in under
            for port in sorted(under - ports):
                name = self._sets.name(local)
                self._complain(f"{port}/{protocol.name} has policy Local ({name}), and is no node port")

    def _node_port_addresses(self, wanted: Mapping[Frontend, _Wanted]) -> frozenset[Address]:
        """The addresses that have a virtual server at some node port and are no Service's (IPVS-8, IPVS-9)."""
        ports = {(frontend.protocol, frontend.port) for frontend, _ in self._node_ports()}
        taken = self._bound | {frontend.address for frontend, each in wanted.items() if each.kind is Kind.CLUSTER_IP}
        found = set()
        for key in self._servers:
            protocol = protocol_of(key.protocol)
            if protocol is None or (protocol, key.port) not in ports or key.address in taken:
                continue
            if is_loopback(key.address):
                self._used.add(key)  # of older versions; nobody is answered there (IPVS-29)
            elif Frontend(key.address, protocol, key.port) not in wanted:
                found.add(key.address)
        return frozenset(found)

    def _node_port(self, frontend: Frontend, addresses: frozenset[Address], *, local: bool) -> Route | None:
        there = self._by_port.get((frontend.protocol, frontend.port), [])
        held = {key.address: self._servers[key] for key in sorted(there) if key.address in addresses}
        self._used.update(key for key in there if key.address in held)
        self._check_sctp(frontend, held, local=local)
        if not held:
            self._complain(f"{frontend} has no virtual server")
            return None
        if len(held) < len(addresses) and len(self._wrong) < _SENTENCES:
            lacking = ", ".join(map(format_address, sorted(addresses - held.keys())[:_SHOWN]))
            self._complain(f"{frontend} has no virtual server at {lacking}")
        names = {address: str(frontend._replace(address=address)) for address in held}
        routes = {
            address: self._route(names[address], _Wanted(Kind.NODE_PORT, local), each, ())
            for address, each in held.items()
        }
        count = Counter(routes.values())
        usual = max(count, key=lambda each: (count[each], len(each.backends)))
        for address, route in routes.items():
            if route != usual:
                self._complain(f"{frontend} has other backends at {format_address(address)} than elsewhere")
        return usual

    def _check_sctp(self, frontend: Frontend, held: Iterable[Address], *, local: bool) -> None:
        """SCTP's node ports stand in sets by address too."""
        if frontend.protocol is not Protocol.SCTP:
            return
        for which in (Set.NODE_PORT_SCTP, *([Set.NODE_PORT_LOCAL_SCTP] if local else [])):
            there = {each.address for each in self._sets[which] if each.port == frontend.port}
            for address in sorted(there ^ set(held)):
                verb = "has" if address in there else "lacks"
                self._complain(f"ipset {self._sets.name(which)} {verb} {frontend._replace(address=address)} alone")

    # --- servers -------------------------------------------------------------------------------------------------

    def _usual_scheduler(self) -> str:
        """As most servers pick: it is one setting for all of them (IPVS-5)."""
        picks = Counter(held.server.scheduler for held in self._servers.values())
        return max(picks, key=lambda name: (picks[name], name == DEFAULT_SCHEDULER, name), default=DEFAULT_SCHEDULER)

    def _route(self, name: str, wanted: _Wanted, held: Held, ranges: tuple[Prefix, ...]) -> Route:
        backends = set()
        for target, real in held.reals.items():
            if not real.weight:
                continue
            backends.add(Backend(*target))
            if real.weight != 1:
                self._complain(f"{name} gives {Backend(*target)} the weight {real.weight} (IPVS-6: 1)")
            if not real.masquerading:
                self._complain(f"{name} reaches {Backend(*target)} without translating the address")
        server = held.server
        if server.scheduler != self._scheduler:
            self._complain(f"{name} picks by {server.scheduler}, and others by {self._scheduler}")
        chosen = frozenset(backends)
        scheduler = "" if server.scheduler == DEFAULT_SCHEDULER else own_scheduler(server.scheduler)
        return Route(
            kind=wanted.kind,
            backends=chosen,
            local_backends=chosen if wanted.local and chosen else None,
            refusal=None if chosen else Refusal.REJECT,
            affinity=server.timeout if chosen and server.flags & PERSISTENT else 0,
            source_ranges=ranges,
            scheduler=scheduler if chosen else "",
        )

    def _hairpins(self) -> Iterator[Endpoint]:
        for each in sorted(self._sets[Set.LOOP_BACK]):
            protocol = protocol_of(each.protocol)
            if protocol is not None and each.port and each.other == each.address:
                yield Endpoint(each.address, protocol, each.port)
            else:
                self._complain(f"ipset {self._sets.name(Set.LOOP_BACK)} has {element_words(each)}, which is no hairpin")

    # --- what belongs together -------------------------------------------------------------------------------------

    def _check_guard(self, routes: Mapping[Frontend, Route], found: Found) -> None:
        """Whether the node itself is kept from what its source ranges do not admit it to (IPVS-16)."""
        if self._saved is None or not found.guards_the_node:
            return
        kept = out_rules(self._saved, self._complain)
        admitted = self._by_frontend(Set.SOURCE_IP)
        for frontend, route in routes.items():
            element = Element(frontend.address, frontend.protocol, frontend.port)
            to_keep = route.kind is Kind.LOAD_BALANCER and element in self._sets[Set.RANGED] and element not in admitted
            if to_keep and frontend not in kept:
                self._complain(f"{frontend}: connections of the node itself are not dropped, as its source ranges ask")
            elif frontend in kept and not to_keep:
                self._complain(f"{frontend}: connections of the node itself are dropped, and nothing asks for it")
        for frontend in sorted(kept - routes.keys()):
            self._complain(f"connections of the node itself to {frontend} are dropped, which is no load balancer's")

    def _check_servers(self, wanted: Mapping[Frontend, _Wanted], addresses: frozenset[Address]) -> None:
        """Servers at addresses of Services that no set has; others are somebody else's (IPVS-24)."""
        known = addresses | self._bound | {frontend.address for frontend in wanted}
        for key in sorted(self._servers.keys() - self._used):
            if key.address in known:
                protocol = protocol_of(key.protocol)
                name = f"{format_address(key.address)} port {key.port}"
                shown = Frontend(key.address, protocol, key.port) if protocol is not None else name
                self._complain(f"the virtual server {shown} is in no set: it serves nothing")

    def _check_addresses(self, needed: set[Address]) -> None:
        """Whether frontends' addresses are the node's, so that packets to them come in (IPVS-7)."""
        device, own = self._device, self._own
        there = {each.address for each in self._sets[Set.BOUND]}
        if device is not None and own is not None:
            for address in sorted(needed - device - own):
                self._complain(f"{KUBE_PROXYS_DEVICE} lacks {format_address(address)}: no packet to it comes in")
            for address in sorted(device - needed):
                if not _is_link_local(address):
                    self._complain(f"{KUBE_PROXYS_DEVICE} has {format_address(address)}, which no frontend has")
        if Set.BOUND not in self._sets:
            return
        name = self._sets.name(Set.BOUND)
        internal = {each.address for each in self._sets[Set.CLUSTER_IP]}
        lacking = (needed - own if own is not None else internal) - there
        for address in sorted(lacking):
            self._complain(f"ipset {name} lacks {format_address(address)}: its other ports are not refused")
        for address in sorted(there - needed):
            self._complain(f"ipset {name} has {format_address(address)}, which no frontend has")


def _of_family(addresses: Iterable[Address], family: Family) -> frozenset[Address]:
    return frozenset(each for each in addresses if len(each) == family.address_bytes)


def _is_link_local(address: Address) -> bool:
    return len(address) == 16 and address in Prefix(b"\xfe\x80" + bytes(14), 10)
