"""The rules of kube-proxy's iptables mode, decoded (IPT-1 to IPT-20).  Pure.

Rules of 1.36 were recorded and are what this goes by.  What older versions wrote otherwise is read as well:
`KUBE-XLB-*` for `KUBE-EXT-*` and `KUBE-SVL-*`, marks for masquerade in `KUBE-SERVICES` and `KUBE-NODEPORTS` themselves,
source ranges that end in `KUBE-MARK-DROP`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from socket import inet_pton

import msgspec

from rules.foreign.gathering import Conditions, Gathering, Item, Reading, Step
from rules.foreign.iptables_chains import FW, LOOPBACK, MARK_MASQ, OWN, SVC, SVL, XLB, ServiceChains
from rules.foreign.iptables_static import (
    FORWARD,
    POSTROUTING,
    Jump,
    check_forward,
    check_jumps,
    mark_of,
    strange,
)
from rules.foreign.saved import Options, SavedFamily, SavedRule
from rules.forwarding import Address, Family, Frontend, Kind, NodeFacts, Prefix, Protocol, Refusal
from rules.iptables.text import FILTER, NAT
from rules.node_ports import is_loopback

MODE = "iptables"
SERVICES = "KUBE-SERVICES"
NODE_PORTS = "KUBE-NODEPORTS"
EXTERNAL = "KUBE-EXTERNAL-SERVICES"
FIREWALL = "KUBE-PROXY-FIREWALL"
GUARD = "KUBE-FIREWALL"
DEEPEST = 2
"""How many chains of a Service lead to the one that has its list: source ranges, policy, list."""
LARGE = 1000
"""Endpoints from which kube-proxy leaves chains that serve nothing for a while (IPT-25)."""

_SHOWN = 3
_COMMENT = re.compile(r"(\S+) (cluster IP|external IP|loadbalancer IP)")
_KINDS = {"cluster IP": Kind.CLUSTER_IP, "external IP": Kind.EXTERNAL_IP, "loadbalancer IP": Kind.LOAD_BALANCER}
_REFUSED = re.compile(r"(\S+) has no (?:local )?endpoints")
_OLDER_EXTERNAL = (
    "these are rules of an older version: the node's own connections to an external IP, and those that come in by a "
    "bridge's port, go to no backend unless the address is the node's"
)
_REJECTS = {"icmp-port-unreachable", "icmp6-port-unreachable"}


JUMPS = (
    Jump(NAT, "PREROUTING", SERVICES),
    Jump(NAT, "OUTPUT", SERVICES),
    Jump(NAT, "POSTROUTING", POSTROUTING),
    Jump(FILTER, "INPUT", EXTERNAL, new=True),
    Jump(FILTER, "FORWARD", EXTERNAL, new=True),
    Jump(FILTER, "INPUT", NODE_PORTS, since=True),
    Jump(FILTER, "FORWARD", SERVICES, new=True),
    Jump(FILTER, "OUTPUT", SERVICES, new=True),
    Jump(FILTER, "FORWARD", FORWARD),
    *(Jump(FILTER, chain, FIREWALL, new=True, since=True) for chain in ("INPUT", "OUTPUT", "FORWARD")),
)

GUARD_JUMPS = (Jump(FILTER, "INPUT", GUARD), Jump(FILTER, "OUTPUT", GUARD))
"""Where 127.0.0.0/8 answers node ports: what keeps others from it (IPT-14)."""


def decode(saved: SavedFamily) -> Reading | None:
    """The table that rules make; None: kube-proxy has none of this mode there."""
    nat, filters = saved.chains[NAT], saved.chains[FILTER]
    if SERVICES not in nat and SERVICES not in filters and not any(name.startswith((SVC, SVL)) for name in nat):
        return None
    return _Decoder(saved).reading()


class _Decoder:
    """Reads the rules of one family."""

    def __init__(self, saved: SavedFamily) -> None:
        self._nat = saved.chains[NAT]
        self._filter = saved.chains[FILTER]
        self._family = saved.family
        self._found = Gathering(saved.family)
        self._older_external = False
        self._damage = self._found.damage
        self._damage.update(saved.faults)
        self._services = ServiceChains(self._nat, saved.family, self._damage.add)
        self._guarded = set(self._guarded_frontends())

    def reading(self) -> Reading:
        complain = self._damage.add
        mark = mark_of(self._nat, complain)
        node_port_addresses, loopback = self._read_services()
        check_jumps((*JUMPS, *(GUARD_JUMPS if loopback else ())), self._nat, self._filter, complain)
        self._read_node_ports(loopback=loopback)
        self._read_refusals(SERVICES)
        self._read_refusals(EXTERNAL)
        check_forward(self._filter, mark, complain)
        if loopback:
            self._check_guard()
        self._check_guards()
        self._check_unserved()
        self._found.hairpins |= self._services.hairpins
        facts = NodeFacts(
            mark=mark,
            node_port_addresses=node_port_addresses,
            loopback_node_ports=loopback,
            reject_closed_ports=False,
            health_check_ports=frozenset(self._health_check_ports()),
        )
        reading = self._found.reading(MODE, facts)
        return msgspec.structs.replace(reading, notes=(_OLDER_EXTERNAL,)) if self._older_external else reading

    def _strange(self, chain: str, rule: SavedRule) -> None:
        self._damage.add(strange(chain, rule))

    # --- frontends -----------------------------------------------------------------------------------------------

    def _read_services(self) -> tuple[frozenset[Address] | None, bool]:
        """KUBE-SERVICES of nat; which addresses answer node ports, and whether loopback does (IPT-8, IPT-10)."""
        addresses: set[Address] = set()
        everywhere = loopback = ended = False
        for rule in self._nat.get(SERVICES, ()):
            options = dict(rule.options)
            target = options.pop("-j", "")
            if target == NODE_PORTS:
                ended = True
                if options.pop("--dst-type", "") == "LOCAL":
                    everywhere = True
                    excluded = options.pop("!-d", "")
                    loopback = not excluded and self._family is Family.IPV4
                    if options or excluded not in {"", "127.0.0.0/8", "::1/128"}:
                        self._strange(SERVICES, rule)
                elif options.keys() == {"-d"} and (address := self._address(options["-d"])) is not None:
                    addresses.add(address)
                else:
                    self._strange(SERVICES, rule)
                continue
            if ended:
                self._damage.add(f"{SERVICES} has rules behind those that lead to node ports")
            frontend = self._services.frontend(options)
            if frontend is None or not self._read_frontend(frontend, target, options, rule):
                self._strange(SERVICES, rule)
        if SERVICES not in self._nat:
            self._damage.add(f"table {NAT} has no chain {SERVICES}")
        outside = frozenset(each for each in addresses if not is_loopback(each))
        return None if everywhere else outside, loopback or outside != addresses

    def _read_frontend(self, frontend: Frontend, target: str, options: Options, rule: SavedRule) -> bool:
        hit = _COMMENT.fullmatch(rule.comment)
        kind, vague = Kind.LOAD_BALANCER, False
        if hit is not None:
            kind = _KINDS[hit[2]]
        elif target.startswith((SVC, SVL)):
            kind = Kind.CLUSTER_IP
        else:
            vague = not target.startswith(FW)
        item = self._found.items.get(frontend)
        if item is None or (item.vague and not vague):
            steps = item.steps if item is not None else []
            item = self._found.items[frontend] = Item(kind, hit[1] if hit else "", steps, vague=vague)
        if kind is Kind.EXTERNAL_IP and target.startswith(SVC) and self._read_older_external(options):
            return True
        return self._add(frontend, item, target, options)

    def _read_older_external(self, options: Options) -> bool:
        """Of the two rules that older versions have for an external IP: whether it is the one that adds nothing.

        The first is for whoever does not come by a bridge's port and is not the node; the second for everybody, where
        the address is the node's own.
        """
        if options.keys() == {"--dst-type"} and options["--dst-type"] == "LOCAL":
            return True
        if options.keys() == {"!--physdev-is-in", "!--src-type"} and options["!--src-type"] == "LOCAL":
            options.clear()
            self._older_external = True
        return False

    def _add(self, frontend: Frontend, item: Item, target: str, options: Options) -> bool:
        """Write down what a rule does with a frontend; whether it was understood."""
        try:
            conditions, _ = self._services.conditions(options)
        except ValueError:
            return False
        if options:
            return False
        if target == MARK_MASQ:
            item.steps.append(Step(conditions))
        elif not target.startswith(OWN):
            return False
        elif any(step.to is not None for step in item.steps):
            self._damage.add(f"{frontend} has rules twice: the first ones act")
        else:
            self._follow(frontend, item, target, conditions, 0)
        return True

    def _follow(self, frontend: Frontend, item: Item, chain: str, conditions: Conditions, depth: int) -> None:
        """Write down what a chain does with a frontend, for those whom the conditions admit."""
        entry = self._services.entry(chain)
        if entry is None:
            self._damage.add(f"{frontend} leads to {chain}, which is missing")
            return
        if depth > DEEPEST:
            self._damage.add(f"{frontend} leads through too many chains: {chain} is not followed")
            return
        if ranges := tuple(way.source for way in entry.ways if way.source is not None):
            self._read_ranges(frontend, item, ranges, drops=entry.drops)
        onward: set[tuple[str, Conditions]] = set()
        for way in entry.ways:
            if way.frontend not in (None, frontend):
                continue
            if way.to is None:
                item.steps.append(Step(conditions + way.conditions))
            elif (way.to, way.conditions) not in onward:
                onward.add((way.to, way.conditions))
                self._follow(frontend, item, way.to, conditions + way.conditions, depth + 1)
        if entry.picks is not None:
            self._found.lists[chain] = entry.picks
            item.steps.append(Step(conditions, chain))
        elif entry.drops and chain.startswith(XLB) and item.refusal is None:
            item.refusal = Refusal.DROP

    def _read_ranges(self, frontend: Frontend, item: Item, ranges: tuple[Prefix, ...], *, drops: bool) -> None:
        item.ranges += ranges
        if not drops and frontend not in self._guarded:
            self._damage.add(f"{frontend}: sources outside its ranges are not dropped")

    def _read_node_ports(self, *, loopback: bool) -> None:
        """KUBE-NODEPORTS of nat (IPT-9)."""
        copies: dict[Frontend, str] = {}
        for rule in self._nat.get(NODE_PORTS, ()):
            options = dict(rule.options)
            target = options.pop("-j", "")
            inside = options.pop("-d", "")
            options.pop("--nfacct-name", None)
            frontend = self._services.frontend(options, node_port=True)
            if frontend is None or inside not in {"", "127.0.0.0/8"}:
                self._strange(NODE_PORTS, rule)
            elif inside:
                copies[frontend] = target
            elif options.get("-s") == str(LOOPBACK) and target == MARK_MASQ:
                continue  # of older versions: what comes from loopback, for which there is no other mark
            else:
                item = self._found.item(frontend, Kind.NODE_PORT, rule.comment)
                if copies.get(frontend, target) != target and target != MARK_MASQ:
                    self._damage.add(f"{frontend} does something else for loopback than for other addresses")
                if not self._add(frontend, item, target, options):
                    self._strange(NODE_PORTS, rule)
        for frontend in copies.keys() - self._found.items.keys():
            self._damage.add(f"{frontend} answers at loopback only")
        if copies and not loopback:
            self._damage.add(f"{NODE_PORTS} has rules for loopback, to which nothing leads")

    def _read_refusals(self, chain: str) -> None:
        """KUBE-SERVICES and KUBE-EXTERNAL-SERVICES of the filter table (IPT-16)."""
        for rule in self._filter.get(chain, ()):
            options = dict(rule.options)
            target = options.pop("-j", "")
            reject = options.pop("--reject-with", "icmp-port-unreachable") in _REJECTS
            local = options.pop("--dst-type", "")
            frontend = self._services.frontend(options, node_port=bool(local))
            if frontend is None or options or local not in {"", "LOCAL"} or not reject or target not in _REFUSALS:
                self._strange(chain, rule)
                continue
            hit = _REFUSED.fullmatch(rule.comment)
            kind = Kind.NODE_PORT if local else Kind.CLUSTER_IP if chain == SERVICES else Kind.LOAD_BALANCER
            known = frontend in self._found.items
            item = self._found.item(frontend, kind, hit[1] if hit else "")
            if not known:
                item.vague = kind is Kind.LOAD_BALANCER
            if item.refusal is None:
                item.refusal = _REFUSALS[target]

    def _address(self, text: str) -> Address | None:
        try:
            return inet_pton(self._family.af, text.partition("/")[0])
        except (OSError, ValueError):
            return None

    # --- the static part -----------------------------------------------------------------------------------------

    def _check_guard(self) -> None:
        """What protects loopback (IPT-14)."""
        if not any(
            rule.options.get("-d") == str(LOOPBACK) and rule.target == "DROP" for rule in self._filter.get(GUARD, ())
        ):
            self._damage.add(f"{GUARD} does not keep others than the node itself from 127.0.0.0/8")

    def _health_check_ports(self) -> Iterator[int]:
        """KUBE-NODEPORTS of the filter table (IPT-19)."""
        for rule in self._filter.get(NODE_PORTS, ()):
            options = dict(rule.options)
            target = options.pop("-j", "")
            frontend = self._services.frontend(options, node_port=True)
            if frontend is None or options or target != "ACCEPT" or frontend.protocol is not Protocol.TCP:
                self._strange(NODE_PORTS, rule)
            else:
                yield frontend.port

    def _guarded_frontends(self) -> Iterator[Frontend]:
        """Whom KUBE-PROXY-FIREWALL keeps from those outside source ranges (IPT-18)."""
        for rule in self._filter.get(FIREWALL, ()):
            options = dict(rule.options)
            target = options.pop("-j", "")
            frontend = self._services.frontend(options)
            if frontend is None or options or target != "DROP":
                self._strange(FIREWALL, rule)
            else:
                yield frontend

    def _check_guards(self) -> None:
        for frontend in self._guarded:
            if frontend not in self._found.items or not self._found.items[frontend].ranges:
                self._damage.add(f"{FIREWALL} drops what goes to {frontend}, which has no source ranges")

    def _check_unserved(self) -> None:
        unserved = self._services.unserved
        if unserved and self._services.endpoints <= LARGE:
            more = f" and {len(unserved) - _SHOWN} more" if len(unserved) > _SHOWN else ""
            self._damage.add(f"no rule leads to {', '.join(unserved[:_SHOWN])}{more}")


_REFUSALS = {"REJECT": Refusal.REJECT, "DROP": Refusal.DROP}
