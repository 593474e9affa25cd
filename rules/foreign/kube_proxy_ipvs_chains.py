"""The rules of iptables that kube-proxy's ipvs mode has beside its virtual servers (IPVS-13 to IPVS-18).  Pure.

They are nearly constant, as all that varies stands in ipsets.  So they are compared with what they should be, and of
three things they are read: the mark, the detector of local pods, and whether every ClusterIP connection is masqueraded.
A rule that stands there only while its set has elements may be there for an empty one too: the set was emptied since.

Chains came over the years.  Where one is missing and no later one is there, an older version is at work: it does
something else, which is a note and no damage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from socket import inet_pton
from typing import NamedTuple

from rules.foreign.gathering import NODE
from rules.foreign.iptables_chains import MARK_DROP, MARK_MASQ, ServiceChains
from rules.foreign.iptables_static import (
    FORWARD,
    POSTROUTING,
    Complain,
    Jump,
    check_forward,
    check_jumps,
    mark_of,
    strange,
)
from rules.foreign.kube_proxy_ipvs_sets import Set, Sets
from rules.foreign.saved import Chains, Options, SavedFamily, SavedRule
from rules.forwarding import Detector, Family, Frontend, Protocol
from rules.iptables.text import FILTER, NAT

SERVICES = "KUBE-SERVICES"
NODE_PORT = "KUBE-NODE-PORT"
LOAD_BALANCER = "KUBE-LOAD-BALANCER"
FIREWALL = "KUBE-PROXY-FIREWALL"
RANGES = "KUBE-SOURCE-RANGES-FIREWALL"
CLOSED = "KUBE-IPVS-FILTER"
OUT = "KUBE-IPVS-OUT-FILTER"
OLD_RANGES = "KUBE-FIREWALL"
"""Of the nat table: where older versions have source ranges."""

JUMPS = (
    Jump(NAT, "PREROUTING", SERVICES),
    Jump(NAT, "OUTPUT", SERVICES),
    Jump(NAT, "POSTROUTING", POSTROUTING),
    Jump(FILTER, "FORWARD", FORWARD),
    Jump(FILTER, "INPUT", NODE_PORT, since=True),
    Jump(FILTER, "INPUT", FIREWALL, since=True),
    Jump(FILTER, "FORWARD", FIREWALL, since=True),
    Jump(FILTER, "INPUT", CLOSED, since=True),
    Jump(FILTER, "OUTPUT", OUT, since=True),
)

_CAME = (
    (NODE_PORT, "no rule lets in what asks at health-check node ports: that is left to INPUT's policy (TRF-27)"),
    (FIREWALL, "source ranges are kept by a mark, which the kubelet's chain KUBE-MARK-DROP has to drop"),
    (CLOSED, "other ports of Services' addresses are not refused: they lead to the node's own programs (IPVS-17)"),
    (OUT, "the node's own connections are not kept from load balancers whose source ranges leave it out (IPVS-16)"),
)
"""Chains of the filter table in the order in which versions brought them, and what happens without them."""

_SINCE = {Set.HEALTH_CHECK: NODE_PORT, Set.BOUND: CLOSED}
"""Sets that came with a chain: where they are, so should it be."""

_LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}
_UNREACHABLE = {Family.IPV4: "icmp-port-unreachable", Family.IPV6: "icmp6-port-unreachable"}
_ANYBODY, _FROM_ITSELF = "dst,dst", "src,dst"
_PROTOCOLS = {"6": "tcp", "17": "udp", "132": "sctp"}


class Expected(NamedTuple):
    """A rule that should stand in a chain."""

    options: Options
    words: str
    """What the chain does by it."""
    needed: bool = True
    """Whether it must be there; otherwise it may."""


class Found(NamedTuple):
    """What rules say that sets and servers do not."""

    mark: int
    masquerade_all: bool
    detector: Detector | None
    untold: frozenset[str]
    """Fields of `NodeFacts` that no rule tells."""
    notes: tuple[str, ...]
    """What an older version does otherwise."""
    guards_the_node: bool
    """Whether the node's own connections are kept from load balancers whose source ranges leave it out."""


def is_meant(saved: SavedFamily) -> bool:
    """Whether iptables' rules are those of ipvs mode, rather than of iptables mode, or nobody's."""
    return any(
        "--match-set" in rule.options or rule.target in {NODE_PORT, LOAD_BALANCER}
        for rule in saved.chains[NAT].get(SERVICES, ())
    )


def read(saved: SavedFamily, sets: Sets, complain: Complain) -> Found:
    """What the rules say; what is wrong with them is told to `complain`."""
    reader = _Reader(saved, sets, complain)
    return reader.read()


def out_rules(saved: SavedFamily, complain: Complain) -> frozenset[Frontend]:
    """The load balancers' addresses that the node itself may not connect to (IPVS-16)."""
    found = set()
    for rule in saved.chains[FILTER].get(OUT, ()):
        frontend = _kept_from(rule, saved.family)
        if frontend is None:
            complain(strange(OUT, rule))
        else:
            found.add(frontend)
    return frozenset(found)


def _rules(family: Family, sets: Sets, *, older_ranges: bool = False) -> Mapping[str, Mapping[str, Sequence[Expected]]]:
    """The chains by table and name, but for those with a mark in them, the one that depends on the detector, and OUT.

    Args:
        family: the family.
        sets: which rules must be there depends on which sets have elements.
        older_ranges: whether source ranges stand in the nat table.
    """

    def on(
        which: Set, what: str, target: str, words: str, more: Options | None = None, *, always: bool = False
    ) -> Expected:
        options = {**(more or {}), "--match-set": f"{sets.name(which)} {what}", "-j": target}
        return Expected(options, words, needed=always or bool(sets[which]))

    def external(which: Set) -> Iterator[Expected]:
        words = "lets through what comes from elsewhere to external IPs"
        accepted = on(which, _ANYBODY, "ACCEPT", words)
        yield accepted._replace(options={**accepted.options, "!--physdev-is-in": "", "!--src-type": "LOCAL"})
        words = "lets through what goes to external IPs that are the node's own"
        yield accepted._replace(options={**accepted.options, "--dst-type": "LOCAL"}, words=words)

    def ranges(last: Options, words: str) -> list[Expected]:
        admits = "admits sources in source ranges"
        return [
            on(Set.SOURCE_CIDR, "dst,dst,src", "RETURN", admits),
            on(Set.SOURCE_IP, "dst,dst,src", "RETURN", "admits the node where source ranges do"),
            Expected(last, words, needed=not older_ranges or bool(sets[Set.RANGED])),
        ]

    marks = "masquerades what comes to"
    keeps = "keeps the source of what comes, under policy Local, to"
    nat: dict[str, Sequence[Expected]] = {
        SERVICES: [
            Expected({"-s": _LOOPBACK[family], "-j": "RETURN"}, "leaves loopback alone", needed=not older_ranges),
            on(Set.LOAD_BALANCER, _ANYBODY, LOAD_BALANCER, f"{marks} load balancers' addresses"),
            on(Set.EXTERNAL_IP, _ANYBODY, MARK_MASQ, f"{marks} external IPs"),
            *external(Set.EXTERNAL_IP),
            *external(Set.EXTERNAL_IP_LOCAL),
            Expected({"--dst-type": "LOCAL", "-j": NODE_PORT}, f"{marks} node ports"),
            on(Set.CLUSTER_IP, _ANYBODY, "ACCEPT", "accepts what goes to ClusterIPs"),
            on(Set.LOAD_BALANCER, _ANYBODY, "ACCEPT", "accepts what goes to load balancers' addresses"),
        ],
        LOAD_BALANCER: [
            *([on(Set.RANGED, _ANYBODY, OLD_RANGES, "asks for source ranges")] if older_ranges else []),
            on(Set.LOAD_BALANCER_LOCAL, _ANYBODY, "RETURN", f"{keeps} load balancers' addresses"),
            Expected({"-j": MARK_MASQ}, f"{marks} load balancers' addresses"),
        ],
        NODE_PORT: [
            on(which, what, target, f"{words} node ports of {protocol}", {"-p": protocol.lower()})
            for protocol, local, every, what in (
                ("TCP", Set.NODE_PORT_LOCAL_TCP, Set.NODE_PORT_TCP, "dst"),
                ("UDP", Set.NODE_PORT_LOCAL_UDP, Set.NODE_PORT_UDP, "dst"),
                ("SCTP", Set.NODE_PORT_LOCAL_SCTP, Set.NODE_PORT_SCTP, _ANYBODY),
            )
            for which, target, words in ((local, "RETURN", keeps), (every, MARK_MASQ, marks))
        ],
    }
    if older_ranges:
        nat[OLD_RANGES] = ranges({"-j": MARK_DROP}, "drops what source ranges do not admit")
    returned = "lets through what goes to"
    filters = {
        FIREWALL: [on(Set.RANGED, _ANYBODY, RANGES, "asks for source ranges")],
        RANGES: ranges({"-j": "DROP"}, "drops what source ranges do not admit"),
        NODE_PORT: [on(Set.HEALTH_CHECK, "dst", "ACCEPT", "lets in what asks at health-check node ports", always=True)],
        CLOSED: [
            *(
                on(which, what, "RETURN", f"{returned} {words}", always=True)
                for which, what, words in (
                    (Set.LOAD_BALANCER, _ANYBODY, "load balancers' addresses"),
                    (Set.CLUSTER_IP, _ANYBODY, "ClusterIPs"),
                    (Set.EXTERNAL_IP, _ANYBODY, "external IPs"),
                    (Set.EXTERNAL_IP_LOCAL, _ANYBODY, "external IPs under policy Local"),
                    (Set.HEALTH_CHECK, "dst", "health-check node ports"),
                )
            ),
            on(
                Set.BOUND,
                "dst",
                "REJECT",
                "refuses connections to other ports of Services' addresses",
                {"--ctstate": "NEW", "--reject-with": _UNREACHABLE[family]},
                always=True,
            ),
        ],
    }
    return {NAT: nat, FILTER: filters}


class _Reader:
    """Reads the rules of one family."""

    def __init__(self, saved: SavedFamily, sets: Sets, complain: Complain) -> None:
        self._family = saved.family
        self._nat = saved.chains[NAT]
        self._filter = saved.chains[FILTER]
        self._sets = sets
        self._complain = complain

    def read(self) -> Found:
        there = {chain for chain, _ in _CAME if chain in self._filter}
        there.update(chain for which, chain in _SINCE.items() if which in self._sets)
        newest = max((place for place, (chain, _) in enumerate(_CAME, 1) if chain in there), default=0)
        to_come = dict(_CAME[newest:])
        older_ranges = FIREWALL in to_come
        mark = mark_of(self._nat, self._complain, self._hairpins())
        check_jumps(JUMPS, self._nat, self._filter, self._complain)
        check_forward(self._filter, mark, self._complain)
        masquerade_all, detector, untold = self._cluster_ips()
        expected = _rules(self._family, self._sets, older_ranges=older_ranges)
        for table, chains in expected.items():
            for chain, wanted in chains.items():
                if table == NAT or not (chain in to_come or (chain == RANGES and older_ranges)):
                    self._check(table, self._nat if table == NAT else self._filter, chain, wanted)
        notes = [f"these are rules of an older version: {'; '.join(to_come.values())}"] if to_come else []
        return Found(mark, masquerade_all, detector, untold, tuple(notes), OUT not in to_come)

    def _hairpins(self) -> list[Options]:
        """The rule that masquerades them, if it is there."""
        of = f"{self._sets.name(Set.LOOP_BACK)} dst,dst,src"
        if any(rule.options.get("--match-set") == of for rule in self._nat.get(POSTROUTING, ())):
            return [{"--match-set": of, "-j": "MASQUERADE"}]
        if self._sets[Set.LOOP_BACK]:
            self._complain(f"{POSTROUTING} does not masquerade hairpin connections")
        return []

    def _cluster_ips(self) -> tuple[bool, Detector | None, frozenset[str]]:
        """Who is masqueraded at ClusterIPs (IPVS-14): everybody, all but local pods, or who has the same address."""
        found: list[tuple[bool, Detector | None, frozenset[str]]] = []
        for rule in filter(self._is_of_cluster_ips, self._nat.get(SERVICES, ())):
            options = {name: value for name, value in rule.options.items() if name != "-j"}
            what = options.pop("--match-set").partition(" ")[2]
            try:
                conditions, _ = ServiceChains(Chains({}), self._family, self._complain).conditions(options)
            except ValueError:
                self._complain(strange(SERVICES, rule))
                continue
            if options or len(conditions) > 1 or NODE in conditions:
                self._complain(strange(SERVICES, rule))
            elif not conditions and what == _ANYBODY:
                found.append((True, None, frozenset({"detector"})))
            elif not conditions and what == _FROM_ITSELF:
                found.append((False, None, frozenset()))
            elif conditions and not conditions[0].inside and what == _ANYBODY:
                found.append((False, conditions[0].detector, frozenset()))
            else:
                self._complain(strange(SERVICES, rule))
        if len(found) > 1:
            self._complain(f"{SERVICES} masquerades what comes to ClusterIPs by several rules: the first one is read")
        if not found and self._sets[Set.CLUSTER_IP]:
            self._complain(f"{SERVICES} of table {NAT} has no rule by which it masquerades what comes to ClusterIPs")
        return found[0] if found else (False, None, frozenset({"masquerade_all", "detector"}))

    def _is_of_cluster_ips(self, rule: SavedRule) -> bool:
        of = rule.options.get("--match-set", "").partition(" ")[0]
        return of == self._sets.name(Set.CLUSTER_IP) and rule.target == MARK_MASQ

    def _check(self, table: str, there: Chains, chain: str, wanted: Sequence[Expected]) -> None:
        """Compare a chain with what it should be."""
        if chain not in there:
            if any(each.needed for each in wanted):
                self._complain(f"table {table} has no chain {chain}")
            return
        left = list(enumerate(wanted))
        places = []
        found: Iterable[SavedRule] = there[chain]
        if table == NAT and chain == SERVICES:
            found = (rule for rule in found if not self._is_of_cluster_ips(rule))
        for rule in found:
            options = rule.options
            if rule.target == "REJECT":
                options = {"--reject-with": _UNREACHABLE[self._family], **options}
            hit = next((each for each in left if each[1].options == options), None)
            if hit is None:
                self._complain(strange(chain, rule))
            else:
                left.remove(hit)
                places.append(hit[0])
        if places != sorted(places):
            self._complain(f"{chain} of table {table} has its rules in another order than kube-proxy writes them")
        for _, each in left:
            if each.needed:
                self._complain(f"{chain} of table {table} has no rule by which it {each.words}")


def _kept_from(rule: SavedRule, family: Family) -> Frontend | None:
    """Whom a rule keeps the node from; None: it is no such rule."""
    options = dict(rule.options)
    protocol = options.pop("--vproto", "")
    address = options.pop("--vaddr", "").partition("/")[0]
    source = options.pop("-s", "").partition("/")[0]
    port = options.pop("--vport", "")
    if options != {"-j": "DROP"} or source != address or not port.isdecimal() or len(port) > 5:
        return None
    try:
        named = _PROTOCOLS.get(protocol, protocol).upper()
        return Frontend(inet_pton(family.af, address), Protocol[named], int(port))
    except (KeyError, ValueError, OSError):
        return None
