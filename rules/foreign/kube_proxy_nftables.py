"""The rules of kube-proxy's nftables mode, decoded (NFT-2 to NFT-15, NFT-20).  Pure.

Rules of 1.36 were recorded and are what this goes by.  What 1.29 and later wrote otherwise is read as well: marks by a
chain of their own, ClusterIPs' marks in the lists, hairpins in endpoints' chains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from socket import inet_pton
from typing import NamedTuple

from rules.foreign.gathering import Gathering, Item, Reading, Step, parse_port
from rules.foreign.nft_chains import (
    EXTERNAL,
    LOCAL,
    MARK_CHAIN,
    SERVICE,
    ServiceChains,
    Way,
    prefixes_of,
    source_condition,
)
from rules.foreign.nft_model import Element, Hook, NftTable
from rules.forwarding import (
    Address,
    Detector,
    Endpoint,
    Frontend,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Refusal,
    merge_prefixes,
)
from rules.node_ports import is_loopback

MODE = "nftables"
CLUSTER_IPS, NODE_PORT_IPS, HAIRPINS = "cluster-ips", "nodeport-ips", "hairpin-connections"
REJECT = "reject-chain"
_SHOWN = 3

_DADDR = r"ip6? daddr "
_KEY = rf"{_DADDR}\. meta l4proto \. th dport vmap "
_PORT_KEY = r"meta l4proto \. th dport vmap "
_NOT_LOOPBACK = rf"{_DADDR}!= (?:127\.0\.0\.0/8|::1(?:/128)?)"
_NODE = rf"(?:{_DADDR}@{NODE_PORT_IPS}|fib daddr type local|(?:fib daddr type local )?{_NOT_LOOPBACK})"
_SOURCE = r"(?:ip6? saddr|iifname) (?:!= )?\S+"
_MARK = rf"(?:meta mark set meta mark \| (?P<mark>0x[0-9a-f]{{1,8}})|jump {MARK_CHAIN})"
_MASQUERADE_IPS = re.compile(rf"{_DADDR}@{CLUSTER_IPS} (?:(?P<source>{_SOURCE}) )?{_MARK}")
_LOOKUPS = {
    "services": (re.compile(rf"{_KEY}@service-ips"), re.compile(rf"(?P<node>{_NODE}) {_PORT_KEY}@service-nodeports")),
    "service-endpoints-check": (re.compile(rf"{_KEY}@no-endpoint-services"),),
    "nodeport-endpoints-check": (re.compile(rf"(?P<node>{_NODE}) {_PORT_KEY}@no-endpoint-nodeports"),),
    "firewall-check": (re.compile(rf"{_KEY}@firewall-ips"),),
}
"""What chains look up, in this order."""
_UNALLOCATED = re.compile(rf"{_DADDR}(?:\{{ (.*) \}}|(\S+)) drop")
_CLOSED = re.compile(rf"{_DADDR}@{CLUSTER_IPS} reject")
_MASQUERADE = re.compile(
    r"meta mark & (?P<mark>0x[0-9a-f]{1,8}) (?:!= (?:0x0|0)|== (?P=mark)) meta mark set meta mark \^ (?P=mark) "
    r"masquerade(?: fully-random)?"
)
_OLD_MASQUERADE = re.compile(
    r"meta mark & (?P<mark>0x[0-9a-f]{1,8}) == (?:0x0|0) return\n"
    r"meta mark set meta mark \^ (?P=mark)\nmasquerade(?: fully-random)?"
)
_HAIRPIN = re.compile(
    rf"ct status (?:& )?dnat ip6? saddr \. ip6? daddr \. meta l4proto \. th dport @{HAIRPINS} "
    r"masquerade(?: fully-random)?"
)
_JUMP = re.compile(r"(?:ct state new )?jump (\S+)")
_LABEL = re.compile(r"[a-z]+-[A-Z2-7]{8}-([^/]+/[^/]+)/(tcp|udp|sctp)/(.*)")


class Place(NamedTuple):
    """Where a chain must be led to from."""

    to: str
    type: str
    hook: str
    before_nat: bool = False
    """Whether it must see packets before their destination is translated."""


PLACES = (
    Place("services", "nat", "prerouting"),
    Place("services", "nat", "output"),
    Place("masquerading", "nat", "postrouting"),
    Place("firewall-check", "filter", "prerouting", before_nat=True),
    Place("firewall-check", "filter", "output", before_nat=True),
    Place("nodeport-endpoints-check", "filter", "input"),
    *(Place("service-endpoints-check", "filter", hook) for hook in ("input", "forward", "output")),
    *(Place("cluster-ips-check", "filter", hook) for hook in ("forward", "output")),
)
_DSTNAT = -100


def decode(nft: NftTable) -> Reading:
    """The table that kube-proxy's objects make."""
    return _Decoder(nft).reading()


class _Decoder:
    """Reads one table."""

    def __init__(self, nft: NftTable) -> None:
        self._nft = nft
        self._family = nft.family
        self._size = nft.family.address_bytes
        self._found = Gathering(nft.family)
        self._damage = self._found.damage
        self._damage.update(nft.faults)
        self._chains = ServiceChains(nft, self._damage.add)
        self._marks: set[int] = set()
        self._masquerade: tuple[bool, Detector | None] | None = None
        self._masquerade_step: Step | None = None
        self._cluster_ips = set(self._addresses(CLUSTER_IPS))

    def reading(self) -> Reading:
        self._check_places()
        everywhere = self._read_lookups()
        closed, unallocated = self._read_cluster_ips_check()
        self._read_masquerading()
        self._read_services()
        self._read_node_ports()
        self._read_refusals()
        self._read_firewalls()
        self._check_rest()
        self._found.hairpins |= self._chains.hairpins | set(self._hairpins())
        mark = self._mark()
        facts = NodeFacts(
            mark=mark,
            node_port_addresses=None if everywhere else frozenset(self._addresses(NODE_PORT_IPS)),
            reject_closed_ports=closed,
            service_cidrs=unallocated,
        )
        return self._found.reading(MODE, facts, masquerade=self._masquerade)

    def _strange(self, chain: str, rule: str) -> None:
        self._damage.add(f"chain {chain} has a rule that is not understood: {rule}")

    # --- elements ------------------------------------------------------------------------------------------------

    def _elements(self, name: str) -> list[Element]:
        found = self._nft.sets.get(name)
        if found is None:
            self._damage.add(f"{name} is missing")
            return []
        return found.elements

    def _addresses(self, name: str) -> Iterator[Address]:
        for element in self._elements(name):
            try:
                yield inet_pton(self._family.af, element.key)
            except (OSError, ValueError):
                self._damage.add(f"{name} has an element that is not understood: {element.key}")

    def _frontends(self, name: str, *, node_port: bool = False) -> Iterator[tuple[Frontend, Element]]:
        for element in self._elements(name):
            try:
                if node_port:
                    protocol, port = element.key.split(" . ")
                    address = b""
                else:
                    host, protocol, port = element.key.split(" . ")
                    address = inet_pton(self._family.af, host)
                frontend = Frontend(address, Protocol[protocol.upper()], parse_port(port))
            except (KeyError, OSError, ValueError):
                self._damage.add(f"{name} has an element that is not understood: {element.key}")
                continue
            yield frontend, element

    def _hairpins(self) -> Iterator[Endpoint]:
        for element in self._nft.sets[HAIRPINS].elements if HAIRPINS in self._nft.sets else ():
            source, _, rest = element.key.partition(" . ")
            try:
                destination, protocol, port = rest.split(" . ")
                endpoint = Endpoint(
                    inet_pton(self._family.af, destination), Protocol[protocol.upper()], parse_port(port)
                )
            except (KeyError, OSError, ValueError):
                endpoint = None
            if endpoint is None or source != destination:
                self._damage.add(f"{HAIRPINS} has an element that is not understood: {element.key}")
            else:
                yield endpoint

    # --- frontends -----------------------------------------------------------------------------------------------

    def _read_services(self) -> None:
        for frontend, element in self._frontends("service-ips"):
            target = element.value.removeprefix("goto ")
            internal = target.startswith((SERVICE, LOCAL))
            if not internal and not target.startswith(EXTERNAL):
                self._damage.add(f"service-ips leads {frontend} to {element.value}, which is not understood")
                continue
            kind = Kind.CLUSTER_IP if internal else Kind.LOAD_BALANCER
            item = self._found.item(frontend, kind, _label(target) or element.comment)
            if not internal:
                item.vague = True
                self._follow(frontend, item, target)
                continue
            if frontend.address in self._cluster_ips:
                if self._masquerade_step is not None:
                    item.steps.append(self._masquerade_step)
            else:
                self._damage.add(f"{frontend} is not among the {CLUSTER_IPS}")
            self._lead(frontend, item, target)

    def _read_node_ports(self) -> None:
        for frontend, element in self._frontends("service-nodeports", node_port=True):
            target = element.value.removeprefix("goto ")
            item = self._found.item(frontend, Kind.NODE_PORT, _label(target) or element.comment)
            self._follow(frontend, item, target)

    def _follow(self, frontend: Frontend, item: Item, chain: str) -> None:
        """Write down what an entry does with a frontend (NFT-10)."""
        ways = self._chains.ways(chain)
        if ways is None:
            self._damage.add(f"{frontend} leads to {chain}, which is missing")
            return
        for conditions, mark, to in ways:
            if to is None:
                self._marks.add(mark)
                item.steps.append(Step(conditions))
            else:
                self._lead(frontend, item, to, Way(conditions, 0, to))

    def _lead(self, frontend: Frontend, item: Item, to: str, way: Way | None = None) -> None:
        """Write down that a frontend is sent to a list."""
        found = self._chains.picks_of(to)
        if found is not None:
            self._found.lists[to] = found.picks
            item.steps += (Step(head.conditions) for head in found.heads if head.frontend == frontend)
        item.steps.append(Step(way.conditions if way is not None else (), to))

    def _read_refusals(self) -> None:
        chain = self._nft.chains.get(REJECT)
        if chain is not None and chain.rules != ["reject"]:
            self._damage.add(f"chain {REJECT} does not reject, and that alone")
        for name, node_port in (("no-endpoint-services", False), ("no-endpoint-nodeports", True)):
            for frontend, element in self._frontends(name, node_port=node_port):
                refusal = {"drop": Refusal.DROP, f"goto {REJECT}": Refusal.REJECT}.get(element.value)
                if refusal is None:
                    self._damage.add(f"{name} leads {frontend} to {element.value}, which is not understood")
                    continue
                kind = Kind.NODE_PORT if node_port else Kind.LOAD_BALANCER
                if frontend.address in self._cluster_ips:
                    kind = Kind.CLUSTER_IP
                known = frontend in self._found.items
                item = self._found.item(frontend, kind, element.comment)
                if not known:
                    item.vague = kind is Kind.LOAD_BALANCER
                item.refusal = refusal

    def _read_firewalls(self) -> None:
        for frontend, element in self._frontends("firewall-ips"):
            item = self._found.items.get(frontend)
            ranges = self._chains.ranges(element.value.removeprefix("goto "))
            if item is None or item.kind is not Kind.LOAD_BALANCER:
                self._damage.add(f"firewall-ips guards {frontend}, which is no load balancer's address")
            elif ranges is not None:
                item.ranges, item.vague = ranges, False

    # --- the static part -----------------------------------------------------------------------------------------

    def _check_places(self) -> None:
        there: set[tuple[str, str, str, bool]] = set()
        for name, chain in self._nft.chains.items():
            if chain.hook is None:
                continue
            for rule in chain.rules:
                if (hit := _JUMP.fullmatch(rule)) is None:
                    self._strange(name, rule)
                    continue
                there.update(_where(hit[1], chain.hook))
        for place in PLACES:
            if (*place[:3], place.before_nat) not in there:
                self._damage.add(f"no {place.type} chain of the hook {place.hook} leads to {place.to}")

    def _read_lookups(self) -> bool:
        """The chains that look up; whether all addresses of the node answer node ports."""
        found: set[bool] = set()
        for name, patterns in _LOOKUPS.items():
            left = list(patterns)
            chain = self._nft.chains.get(name)
            for rule in chain.rules if chain is not None else ():
                hit = left[0].fullmatch(rule) if left else None
                if hit is not None:
                    left.pop(0)
                    if "node" in hit.groupdict():
                        found.add(f"@{NODE_PORT_IPS}" not in hit["node"])
                elif name != "services" or not self._read_masquerade_ips(rule, first=len(left) == len(patterns)):
                    self._strange(name, rule)
            if left:
                self._damage.add(f"chain {name} does not look up all that it should")
        if len(found) > 1:
            self._damage.add("node ports with backends and those without answer at different addresses")
        return True in found or (not found and NODE_PORT_IPS not in self._nft.sets)

    def _read_masquerade_ips(self, rule: str, *, first: bool) -> bool:
        """The rule that marks what goes to ClusterIPs (NFT-6); it must come first."""
        hit = _MASQUERADE_IPS.fullmatch(rule)
        if hit is None or self._masquerade is not None or not first:
            return False
        self._marks.add(int(hit["mark"] or "0", 16))
        if hit["source"] is None:
            self._masquerade, self._masquerade_step = (True, None), Step()
            return True
        try:
            condition = source_condition(hit["source"], self._size)
        except ValueError:
            return False
        if condition.inside:
            return False
        self._masquerade, self._masquerade_step = (False, condition.detector), Step((condition,))
        return True

    def _read_cluster_ips_check(self) -> tuple[bool, tuple[Prefix, ...]]:
        """What becomes of closed ports of ClusterIPs, and of addresses that no Service has (NFT-20)."""
        closed, networks = False, tuple[Prefix, ...]()
        chain = self._nft.chains.get("cluster-ips-check")
        for rule in chain.rules if chain is not None else ():
            if _CLOSED.fullmatch(rule):
                closed = True
            elif (hit := _UNALLOCATED.fullmatch(rule)) is not None and closed and not networks:
                try:
                    networks = merge_prefixes(prefixes_of((hit[1] or hit[2]).split(","), self._size))
                except ValueError:
                    self._strange("cluster-ips-check", rule)
            else:
                self._strange("cluster-ips-check", rule)
        return closed, networks

    def _read_masquerading(self) -> None:
        chain = self._nft.chains.get("masquerading")
        rules = list(chain.rules) if chain is not None else []
        if HAIRPINS in self._nft.sets:
            if rules and _HAIRPIN.fullmatch(rules[-1]):
                rules.pop()
            else:
                self._damage.add("chain masquerading does not masquerade hairpin connections")
        text = "\n".join(rules)
        hit = _MASQUERADE.fullmatch(text) or _OLD_MASQUERADE.fullmatch(text)
        if hit is None:
            self._damage.add("chain masquerading does not masquerade what is marked, and that alone")
        else:
            self._marks.add(int(hit["mark"], 16))
        marker = self._nft.chains.get(MARK_CHAIN)
        for rule in marker.rules if marker is not None else ():
            hit = re.fullmatch(r"meta mark set meta mark \| (0x[0-9a-f]{1,8})", rule)
            if hit is None:
                self._strange(MARK_CHAIN, rule)
            else:
                self._marks.add(int(hit[1], 16))

    def _mark(self) -> int:
        marks = self._marks - {0}
        if len(marks) > 1:
            self._damage.add(f"several marks are set or asked for: {', '.join(f'{each:#x}' for each in sorted(marks))}")
        return min(marks, default=NodeFacts().mark)

    def _check_rest(self) -> None:
        used = {frontend.address for frontend, item in self._found.items.items() if item.kind is Kind.CLUSTER_IP}
        for address in self._cluster_ips - used:
            host = Frontend(address, Protocol.TCP, 1)
            self._damage.add(f"{CLUSTER_IPS} has {str(host).rpartition(':')[0]}, which no Service has")
        unserved = self._chains.unserved
        if unserved:
            more = f" and {len(unserved) - _SHOWN} more" if len(unserved) > _SHOWN else ""
            self._damage.add(f"no rule leads to {', '.join(unserved[:_SHOWN])}{more}")
        if NODE_PORT_IPS in self._nft.sets and any(map(is_loopback, self._addresses(NODE_PORT_IPS))):
            self._damage.add(f"{NODE_PORT_IPS} has a loopback address")


def _where(to: str, hook: Hook) -> Iterator[tuple[str, str, str, bool]]:
    yield to, hook.type, hook.hook, False
    if hook.priority < _DSTNAT:
        yield to, hook.type, hook.hook, True


def _label(chain: str) -> str:
    """`namespace/service:port` from a chain's name; empty where it was cut (NFT-7)."""
    hit = _LABEL.fullmatch(chain)
    if hit is None or chain.endswith("..."):
        return ""
    return f"{hit[1]}:{hit[3]}" if hit[3] else hit[1]
