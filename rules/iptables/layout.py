"""The static part of the iptables dataplane: which chain of ours leads to which, and what holds for all Services.

Theory of operation
-------------------
A new connection is led from PREROUTING or OUTPUT of the nat table to

    SLUICE-SERVICES         by destination through the tree SLUICE-S; then, if an address of the node is meant, by
                            port through the tree SLUICE-N
    a leaf                  the frontend: SLUICE-CLUSTER-IP, -EXTERNAL-IP, -LOAD-BALANCER or -NODE-PORT marks the
                            connection if it is to be masqueraded; DNAT rules by `statistic` translate it

and from POSTROUTING to SLUICE-POSTROUTING, which masquerades what is marked and, by the tree SLUICE-H, what reaches
itself.  What is not translated meets refusals in the filter table, by the trees SLUICE-R and SLUICE-P.

A frontend whose rules are more than a few (affinity, source ranges, external policy Local, many backends) has chains of
its own, and its leaf leads there: `SLUICE-CI-…`, `-EI-`, `-LB-`, `-NP-` by kind.  Most Services have none: iptables-nft
takes time that is quadratic in the number of chains.

The tree SLUICE-C holds ClusterIPs, where closed ports are refused or unallocated addresses dropped; SLUICE-A the ports
of the node where load balancers ask about Services.

What depends on the node's facts stands here, save that a frontend under policy Local asks for local pods itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from rules.forwarding import (
    Address,
    Detector,
    Family,
    InputInterface,
    InputInterfacePrefix,
    Kind,
    NodeFacts,
    Prefix,
    Refusal,
    SourcePrefix,
    format_address,
    parse_prefix,
)
from rules.iptables.text import FILTER, NAT, Jump, Rule, Rules, Ruleset

# --- nat -----------------------------------------------------------------------------------------------------------

SERVICES = "SLUICE-SERVICES"
"""New connections: translate those to a Service."""
BY_ADDRESS = "SLUICE-S"
"""Tree: frontends with an address."""
BY_NODE_PORT = "SLUICE-N"
"""Tree: node ports."""
MARK = "SLUICE-MARK"
"""Remember to masquerade."""
POSTROUTING = "SLUICE-POSTROUTING"
MASQUERADE = "SLUICE-MASQUERADE"
"""Take the mark off, and masquerade."""
HAIRPINS = "SLUICE-H"
"""Tree: endpoints that are masqueraded when they reach themselves."""
HAIRPIN = "SLUICE-HAIRPIN"
"""Masquerade what has reached itself."""
KINDS = {
    Kind.CLUSTER_IP: "SLUICE-CLUSTER-IP",
    Kind.EXTERNAL_IP: "SLUICE-EXTERNAL-IP",
    Kind.LOAD_BALANCER: "SLUICE-LOAD-BALANCER",
    Kind.NODE_PORT: "SLUICE-NODE-PORT",
}
"""Mark what goes to a frontend of a kind, if it is to be masqueraded."""

# --- filter ----------------------------------------------------------------------------------------------------------

INPUT = "SLUICE-INPUT"
FORWARD = "SLUICE-FORWARD"
OUTPUT = "SLUICE-OUTPUT"
GUARD = "SLUICE-GUARD"
"""Where loopback answers node ports: nobody else may reach 127.0.0.0/8 by that (IPT-14)."""
REFUSALS = "SLUICE-R"
"""Tree: frontends with an address that have no backend for some, or do not admit everybody."""
NODE_PORT_REFUSALS = "SLUICE-P"
"""Tree: node ports that have no backend for some."""
REFUSE_NODE_PORTS = "SLUICE-REFUSE-NODE-PORTS"
REFUSE_CLUSTER_IPS = "SLUICE-REFUSE-CLUSTER-IPS"
"""Closed ports of ClusterIPs, and addresses of the service networks that no Service has."""
CLUSTER_IPS = "SLUICE-C"
"""Tree: ClusterIPs."""
HEALTH_CHECKS = "SLUICE-A"
"""Tree: ports of the node where load balancers ask about Services, let in whatever the policy is (IPT-19)."""
REFUSE = {
    (refusal, kind): f"SLUICE-{refusal.name}-{kind.name.replace('_', '-')}" for refusal in Refusal for kind in Kind
}
"""Refuse what goes to a frontend of a kind; it is the same for all of them, and tells them apart for `read`."""

SOURCE_IS_LOCAL = "-m addrtype --src-type LOCAL"
_NEW = "-m conntrack --ctstate NEW"
# A connection to a backend may go to a port that is a refused node port: what is translated is never refused.
_UNTRANSLATED = f"{_NEW} -m conntrack ! --ctstate DNAT"
_LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}
DROP_INVALID = "-m conntrack --ctstate INVALID -j DROP"
"""Drops what connection tracking can make nothing of, and counts it (MET-10)."""
COUNT_LOOPBACK = f"-m conntrack --ctstate NEW -m conntrack --ctstate DNAT --ctorigdst {_LOOPBACK[Family.IPV4]}"
"""Counts new connections to node ports at loopback addresses, and does nothing else (MET-11)."""
_REJECT = {
    Family.IPV4: "-j REJECT --reject-with icmp-port-unreachable",
    Family.IPV6: "-j REJECT --reject-with icmp6-port-unreachable",
}
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")

_COMMENT = "sluice"
JUMPS = tuple(
    Jump(table, chain, Rule(f"-j {target}", _COMMENT))
    for table, chain, target in (
        (NAT, "PREROUTING", SERVICES),
        (NAT, "OUTPUT", SERVICES),
        (NAT, "POSTROUTING", POSTROUTING),
        (FILTER, "INPUT", INPUT),
        (FILTER, "FORWARD", FORWARD),
        (FILTER, "OUTPUT", OUTPUT),
    )
)
"""How packets come to us."""


class Options(NamedTuple):
    """What the static part depends on beside the table: the node's programs and settings."""

    random_fully: bool = True
    """Masquerade with fully random ports (TRF-9): iptables 1.6.2 and a kernel that can."""
    drop_invalid: bool = True
    """Drop forwarded packets that conntrack calls invalid, as it is not liberal about TCP (TRF-29)."""


def build(facts: NodeFacts, family: Family, options: Options) -> Ruleset:
    """The static chains for a node; the trees' chains are not among them.

    Raises:
        ValueError: a detector or a mark that iptables has no words for; the message names it.
    """
    chains = {NAT: _nat(facts, family, options), FILTER: _filter(facts, family, options)}
    return {
        table: {name: tuple(Rule(text) for text in rules) for name, rules in each.items()}
        for table, each in chains.items()
    }


def network(option: str, prefix: Prefix) -> str:
    """A match by a network, with a blank behind; nothing for a network that is everything."""
    return f"{option} {prefix} " if prefix.length else ""


def detect(detector: Detector) -> str:
    """The match of local pods, with a blank behind (TRF-10).

    Raises:
        ValueError: iptables has no words for it.
    """
    match detector:
        case SourcePrefix(prefix=prefix):
            return network("-s", prefix)
        case InputInterface(name=name):
            if _INTERFACE.fullmatch(name):
                return f"-i {name} "
        case InputInterfacePrefix(prefix=name):
            if _INTERFACE.fullmatch(name) and len(name) < 15:
                return f"-i {name}+ "
    raise ValueError(f"iptables cannot tell local pods by the interface {name!r}")


def masquerade(options: Options) -> str:
    return "-j MASQUERADE" + (" --random-fully" if options.random_fully else "")


def _nat(facts: NodeFacts, family: Family, options: Options) -> dict[str, list[str]]:
    mark = facts.mark
    if not 0 < mark <= 0xFFFFFFFF:
        raise ValueError(f"{mark:#x} is no mask of a bit of the packet mark")
    internal = []
    if facts.detector is not None:
        # Under masqueradeAll the rule says who local pods are, and nothing else.
        internal.append(detect(facts.detector) + (f"-g {MARK}" if facts.masquerade_all else "-j RETURN"))
    if facts.masquerade_all or facts.detector is not None:
        internal.append(f"-j {MARK}")
    return {
        SERVICES: [f"-j {BY_ADDRESS}", *_node_port_gate(facts, family, BY_NODE_PORT)],
        MARK: [f"-j MARK --set-xmark {mark:#x}/{mark:#x}"],
        **{chain: [f"-j {MARK}"] for chain in KINDS.values()},
        KINDS[Kind.CLUSTER_IP]: internal,
        POSTROUTING: [
            f"-m mark --mark {mark:#x}/{mark:#x} -g {MASQUERADE}",
            f"-m conntrack --ctstate DNAT -j {HAIRPINS}",
        ],
        MASQUERADE: [f"-j MARK --set-xmark {mark:#x}/0x0", masquerade(options)],
        HAIRPIN: [masquerade(options)],
    }


def _filter(facts: NodeFacts, family: Family, options: Options) -> dict[str, list[str]]:
    refuse = {Refusal.REJECT: _REJECT[family], Refusal.DROP: "-j DROP"}
    guard, counted = [], []
    if facts.loopback_node_ports and family is Family.IPV4:
        loopback = _LOOPBACK[family]
        counted = [COUNT_LOOPBACK]
        guard = [f"! -s {loopback} -d {loopback} -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"]
    return {
        INPUT: [
            f"-j {GUARD}",
            f"-p tcp -j {HEALTH_CHECKS}",
            f"{_UNTRANSLATED} -j {REFUSALS}",
            f"{_UNTRANSLATED} -j {REFUSE_NODE_PORTS}",
        ],
        FORWARD: [
            *([DROP_INVALID] if options.drop_invalid else []),
            "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            f"{_UNTRANSLATED} -j {REFUSALS}",
            f"{_UNTRANSLATED} -j {REFUSE_CLUSTER_IPS}",
            f"-m mark --mark {facts.mark:#x}/{facts.mark:#x} -j ACCEPT",
        ],
        OUTPUT: [*counted, f"-j {GUARD}", f"{_UNTRANSLATED} -j {REFUSALS}", f"{_UNTRANSLATED} -j {REFUSE_CLUSTER_IPS}"],
        GUARD: guard,
        REFUSE_NODE_PORTS: _node_port_gate(facts, family, NODE_PORT_REFUSALS),
        REFUSE_CLUSTER_IPS: _refuse_cluster_ips(facts),
        **{chain: [refuse[refusal]] for (refusal, _), chain in REFUSE.items()},
    }


def _node_port_gate(facts: NodeFacts, family: Family, target: str) -> list[str]:
    """Rules that let through what is addressed to a node-port address (TRF-20, TRF-21)."""
    loopback = facts.loopback_node_ports and family is Family.IPV4
    if facts.node_port_addresses is None:
        but = "" if loopback else f"! -d {_LOOPBACK[family]} "
        return [f"{but}-m addrtype --dst-type LOCAL -j {target}"]
    bits = family.address_bytes * 8
    rules = [f"-d {format_address(address)}/{bits} -j {target}" for address in sorted(facts.node_port_addresses)]
    if loopback:
        rules.append(f"-d {_LOOPBACK[family]} -j {target}")
    return rules


def _refuse_cluster_ips(facts: NodeFacts) -> list[str]:
    if facts.reject_closed_ports:
        return [f"-j {CLUSTER_IPS}", *(f"{network('-d', cidr)}-j DROP" for cidr in facts.service_cidrs)]
    # The tree itself drops, in every chain, what is no ClusterIP: see `cluster_ip_rules`.
    return [f"{network('-d', cidr)}-g {CLUSTER_IPS}" for cidr in facts.service_cidrs]


class ClusterIPRules(NamedTuple):
    """What stands in the chains of the tree of ClusterIPs."""

    target: str
    """What is done to a new connection to a ClusterIP, which no frontend took."""
    tail: Rules
    """What ends every chain."""


def cluster_ip_rules(facts: NodeFacts, family: Family) -> ClusterIPRules | None:
    """What the tree of ClusterIPs is for; None: nothing, it stays empty (NFT-20, TRF-13)."""
    if facts.reject_closed_ports:
        return ClusterIPRules(_REJECT[family], ())
    if facts.service_cidrs:
        return ClusterIPRules("-j RETURN", (Rule("-j DROP"),))
    return None


# --- back from rules -----------------------------------------------------------------------------------------------

_MARKED = re.compile(r"-j MARK --set-xmark 0x([0-9a-f]+)/0x([0-9a-f]+)")
_DETECTOR = re.compile(rf"(?:-s (\S+) |-i (\S+) )?(-g {MARK}|-j RETURN)")
_GATE = re.compile(rf"(?:(! )?-d (\S+) )?(-m addrtype --dst-type LOCAL )?-j {BY_NODE_PORT}")
_CIDR = re.compile(rf"(?:-d (\S+) )?-(?:j DROP|g {CLUSTER_IPS})")


def read_facts(chains: Ruleset, family: Family) -> NodeFacts:
    """The facts that static chains were made of, but for the ports of health checks, which stand in a tree.

    What makes no sense is passed over, and shows when the chains are compared with those that the facts make.
    """
    nat, other = chains[NAT], chains[FILTER]

    def found(rules: Rules | None, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        for rule in rules or ():
            if hit := pattern.fullmatch(rule.text):
                yield hit

    mark = next((int(hit[1], 16) for hit in found(nat.get(MARK), _MARKED)), 0)
    internal = nat.get(KINDS[Kind.CLUSTER_IP], ())
    detector = next(found(internal, _DETECTOR), None)
    addresses, loopback, everywhere = _read_gate(list(found(nat.get(SERVICES), _GATE)), family)
    closed = other.get(REFUSE_CLUSTER_IPS, ())
    cidrs = [_prefix(hit[1], family) for hit in found(closed, _CIDR)]
    return NodeFacts(
        mark=mark if 0 < mark <= 0xFFFFFFFF else NodeFacts().mark,
        masquerade_all=len(internal) == 1 or (detector is not None and detector[3] != "-j RETURN"),
        detector=None if detector is None else _read_detector(detector[1], detector[2], family),
        node_port_addresses=None if everywhere else addresses,
        loopback_node_ports=loopback,
        reject_closed_ports=any(rule.text == f"-j {CLUSTER_IPS}" for rule in closed),
        service_cidrs=tuple(cidr for cidr in cidrs if cidr is not None),
    )


def read_options(chains: Ruleset) -> Options:
    """The options that static chains were made with."""
    return Options(
        random_fully=any("--random-fully" in rule.text for rule in chains[NAT].get(MASQUERADE, ())),
        drop_invalid=any("INVALID" in rule.text for rule in chains[FILTER].get(FORWARD, ())),
    )


def _read_gate(gate: list[re.Match[str]], family: Family) -> tuple[frozenset[Address], bool, bool]:
    """Node-port addresses, whether loopback is one, and whether every address is."""
    addresses = set()
    loopback = everywhere = False
    for hit in gate:
        negated, destination, is_local = hit.groups()
        if is_local:
            everywhere = True
            loopback |= not negated and family is Family.IPV4
        elif destination == _LOOPBACK[Family.IPV4]:
            loopback = True
        elif (prefix := _prefix(destination, family)) is not None:
            addresses.add(prefix.address)
    return frozenset(addresses), loopback, everywhere


def _read_detector(source: str | None, interface: str | None, family: Family) -> Detector | None:
    if interface is None:
        prefix = _prefix(source, family)
        return None if prefix is None else SourcePrefix(prefix)
    if interface.endswith("+"):
        return InputInterfacePrefix(interface[:-1])
    return InputInterface(interface)


def _prefix(text: str | None, family: Family) -> Prefix | None:
    """A network; no text is all of them, and other text is none."""
    if text is None:
        return Prefix(bytes(family.address_bytes), 0)
    try:
        prefix = parse_prefix(text)
    except ValueError:
        return None
    return prefix if len(prefix.address) == family.address_bytes else None
