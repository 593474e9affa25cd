"""The constant rules of mode ipvs: what happens to packets before and after IPVS, and to those that it must not get.

Theory of operation
-------------------
IPVS takes packets in LOCAL_IN after the filter table, and in LOCAL_OUT before it.  Whatever must be decided before
IPVS, for both, stands in the mangle table's PREROUTING and OUTPUT: there SLUICE-IPVS-SERVICES looks the first packet of
a connection up in our sets (`rules.ipvs.sets`) and

    drops it        outside the source ranges; a refused frontend; an unallocated address of the service networks
    marks it        with the bit that remembers to masquerade, where the frontend's kind asks for that
    maps its mark   to the one that the set's element carries, by which IPVS then finds the virtual server: node ports,
                    and for local pods and the node all frontends under policy Local

What IPVS has sent on passes OUTPUT once more, and then POSTROUTING.  There SLUICE-IPVS-POSTROUTING takes a mark of ours
off again, and puts the bit in its place where the connection is to be masqueraded: the nat table does that, for marked
packets and for endpoints that reach themselves.

Only first packets are looked at, and packets that conntrack has no state for: IPVS would take those too.

In the filter table a closed port of an address that is ours alone is refused: the host's own listeners must not be
reached there (IPVS-17).

The rules are the same however many Services there are; they depend on the node's facts alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from rules.forwarding import (
    Detector,
    Family,
    InputInterface,
    InputInterfacePrefix,
    NodeFacts,
    Prefix,
    SourcePrefix,
    parse_prefix,
)
from rules.iptables import layout, rulesets
from rules.iptables.text import FILTER, IPVS_PREFIX, MANGLE, NAT, Changes, Jump, Rule, Ruleset, Saved, restore_lines
from rules.ipvs import marks, sets
from rules.ipvs.sets import Set

TABLES = (MANGLE, FILTER, NAT)
"""In the order in which they are committed: who is marked is masqueraded an instant later at the most."""

SERVICES = f"{IPVS_PREFIX}SERVICES"
EMPTY = f"{IPVS_PREFIX}EMPTY"
"""Frontends without backends: a node port of the same number goes before them."""
LOCAL = f"{IPVS_PREFIX}LOCAL"
"""Frontends with an address under external policy Local."""
SHORT_CIRCUIT = f"{IPVS_PREFIX}SHORT-CIRCUIT"
CLUSTER_IP = f"{IPVS_PREFIX}CLUSTER-IP"
MARK = f"{IPVS_PREFIX}MARK"
"""Remember to masquerade."""
NODE_PORT = f"{IPVS_PREFIX}NODE-PORT"
NODE_PORT_LOCAL = f"{IPVS_PREFIX}NODE-PORT-LOCAL"
NODE_PORT_SHORT = f"{IPVS_PREFIX}NODE-PORT-SHORT"
NODE_PORT_MARK = f"{IPVS_PREFIX}NODE-PORT-MARK"
POSTROUTING = f"{IPVS_PREFIX}POSTROUTING"
REMARK = f"{IPVS_PREFIX}REMARK"
"""Masquerade what was sent on by a mark of ours."""
MASQUERADE = f"{IPVS_PREFIX}MASQUERADE"
SNAT = f"{IPVS_PREFIX}SNAT"
"""In the nat table: what is to be masqueraded."""
INPUT = f"{IPVS_PREFIX}INPUT"
FORWARD = f"{IPVS_PREFIX}FORWARD"

JUMPS = tuple(
    Jump(table, chain, Rule(f"-j {target}", "sluice"))
    for table, chain, target in (
        (MANGLE, "PREROUTING", SERVICES),
        (MANGLE, "OUTPUT", SERVICES),
        (MANGLE, "POSTROUTING", POSTROUTING),
        (NAT, "POSTROUTING", SNAT),
        (FILTER, "INPUT", INPUT),
        (FILTER, "FORWARD", FORWARD),
    )
)
"""How packets come to us."""

_LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}
_ICMP = {Family.IPV4: "icmp", Family.IPV6: "ipv6-icmp"}
_REJECT = {
    Family.IPV4: "-j REJECT --reject-with icmp-port-unreachable",
    Family.IPV6: "-j REJECT --reject-with icmp6-port-unreachable",
}
_FIRST = "-m conntrack ! --ctstate RELATED,ESTABLISHED"


class Wanted(NamedTuple):
    """What the rules are made of beside the family."""

    facts: NodeFacts
    random_fully: bool = True
    """Masquerade with fully random ports (TRF-9)."""


def build(wanted: Wanted, family: Family) -> Ruleset:
    """The chains for a node.

    Raises:
        ValueError: a detector or a mark that iptables has no words for; the message names it.
    """
    facts = wanted.facts
    scheme = marks.scheme(facts.mark)
    bit, tag, tag_bits, always = facts.mark, scheme.tag, scheme.tag_bits, scheme.always
    detector = "" if facts.detector is None else layout.detect(facts.detector)
    local = layout.SOURCE_IS_LOCAL

    def within(which: Set, dimensions: str, *, but: bool = False) -> str:
        return f"-m set {'! ' if but else ''}--match-set {sets.name(family, which)} {dimensions}"

    def carried(which: Set) -> str:
        return f"-j SET --map-set {sets.name(family, which)} dst,dst --map-mark"

    if facts.node_port_addresses is None:
        gate = f"! -d {_LOOPBACK[family]} -m addrtype --dst-type LOCAL {within(Set.BOUND, 'dst', but=True)}"
    else:
        gate = within(Set.NODE_ADDRESS, "dst")
    # Under masqueradeAll the rule says who local pods are, and nothing else.
    internal = [f"{within(Set.BOUND, 'src')} -g {MARK}"]
    if facts.detector is not None:
        internal.append(detector + (f"-g {MARK}" if facts.masquerade_all else "-j RETURN"))
    if facts.masquerade_all or facts.detector is not None:
        internal.append(f"-j {MARK}")
    # Sources that are pods' by their address stay as they are, on interfaces that the node shares with its pods too.
    pods = [f"{detector}-j MARK --set-xmark 0x0/0xffffffff"] if isinstance(facts.detector, SourcePrefix) else []
    refused = f"{within(Set.REFUSED, 'dst,dst')} -j DROP"
    dropped = f"-m mark --mark {scheme.drop:#x} -j DROP"
    chains: dict[str, dict[str, list[str]]] = {
        MANGLE: {
            SERVICES: [
                "-m conntrack --ctstate ESTABLISHED -j RETURN",
                "-m ipvs --ipvs -j RETURN",
                f"{within(Set.RANGED, 'dst,dst')} {within(Set.SOURCES, 'dst,dst,src', but=True)} -j DROP",
                f"{within(Set.EMPTY, 'dst,dst')} -g {EMPTY}",
                f"{within(Set.LOCAL, 'dst,dst')} -g {LOCAL}",
                f"{within(Set.EXTERNAL_IP, 'dst,dst')} -g {MARK}",
                f"{within(Set.LOAD_BALANCER, 'dst,dst')} -g {MARK}",
                f"{within(Set.CLUSTER_IP, 'dst,dst')} -g {CLUSTER_IP}",
                f"{gate} -g {NODE_PORT}",
                f"{within(Set.SERVICE_CIDR, 'dst')} {within(Set.BOUND, 'dst', but=True)} -j DROP",
            ],
            EMPTY: [f"{gate} -j {NODE_PORT}", f"-m mark --mark {tag:#x}/{tag_bits:#x} -j RETURN", refused],
            LOCAL: [
                f"{local} -g {SHORT_CIRCUIT}",
                *([f"{detector}-g {SHORT_CIRCUIT}"] if facts.detector is not None else []),
                refused,
            ],
            SHORT_CIRCUIT: [carried(Set.LOCAL)],
            CLUSTER_IP: internal,
            MARK: [f"-j MARK --set-xmark {bit:#x}/{bit:#x}"],
            NODE_PORT: [f"{within(Set.NODE_PORT_LOCAL, 'dst,dst')} -g {NODE_PORT_LOCAL}", f"-j {NODE_PORT_MARK}"],
            NODE_PORT_LOCAL: [
                f"{local} -g {NODE_PORT_SHORT}",
                *([f"{detector}-g {NODE_PORT_SHORT}"] if facts.detector is not None else []),
                f"-j {NODE_PORT_MARK}",
            ],
            NODE_PORT_SHORT: [carried(Set.NODE_PORT_LOCAL)],
            NODE_PORT_MARK: [carried(Set.NODE_PORT), dropped],
            POSTROUTING: [
                f"-m mark ! --mark {tag:#x}/{tag_bits:#x} -j RETURN",
                f"-m mark --mark {tag | always:#x}/{tag_bits | always:#x} -g {REMARK}",
                f"{within(Set.BOUND, 'src')} -g {REMARK}",
                *pods,
                f"-m mark --mark {tag:#x}/{tag_bits:#x} {local} -g {REMARK}",
                f"-m mark --mark {tag:#x}/{tag_bits:#x} -j MARK --set-xmark 0x0/0xffffffff",
            ],
            REMARK: [f"-j MARK --set-xmark {bit:#x}/0xffffffff"],
        },
        NAT: {
            SNAT: [
                f"-m mark --mark {bit:#x}/{bit:#x} -g {MASQUERADE}",
                f"{within(Set.HAIRPIN, 'dst,dst,src')} {_masquerade(wanted)}",
            ],
            MASQUERADE: [f"-j MARK --set-xmark {bit:#x}/0x0", _masquerade(wanted)],
        },
        FILTER: {
            INPUT: [
                f"-p tcp {within(Set.HEALTH_CHECK, 'dst')} -j ACCEPT",
                f"-p {_ICMP[family]} -j RETURN",
                f"{_FIRST} {within(Set.BOUND, 'dst')} {within(Set.OPEN, 'dst,dst', but=True)} {_REJECT[family]}",
            ],
            FORWARD: ["-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"],
        },
    }
    return {
        table: {name: tuple(Rule(text) for text in rules) for name, rules in each.items()}
        for table, each in chains.items()
    }


def _masquerade(wanted: Wanted) -> str:
    return layout.masquerade(layout.Options(random_fully=wanted.random_fully))


# --- what iptables-restore is given --------------------------------------------------------------------------------


def difference(saved: Saved, chains: Ruleset) -> list[str]:
    """The input that makes a kernel that holds `saved` hold these chains and lead to them; nothing where it does."""
    missing, stale = rulesets.changed_jumps(saved.jumps, JUMPS)
    changes = rulesets.changed_chains(saved.chains, chains)
    return list(restore_lines(changes, jumps=missing, stale_jumps=stale, tables=TABLES))


def removal(saved: Saved) -> list[str]:
    """The input that removes all that is ours."""
    gone: Changes = {table: dict.fromkeys(saved.chains[table]) for table in TABLES}
    return list(restore_lines(gone, stale_jumps=saved.jumps, tables=TABLES))


# --- back from rules -----------------------------------------------------------------------------------------------

_MARKED = re.compile(r"-j MARK --set-xmark 0x([0-9a-f]+)/0x([0-9a-f]+)")
_DETECTOR = re.compile(rf"(?:-s (\S+) |-i (\S+) )?(-g {MARK}|-j RETURN)")


def read(saved: Saved, family: Family) -> Wanted:
    """What chains were made of, but for what stands in sets.

    What makes no sense is passed over, and shows when the chains are compared with those that this makes.
    """
    mangle, nat = saved.chains[MANGLE], saved.chains[NAT]
    hit = next((hit for rule in mangle.get(MARK, ()) if (hit := _MARKED.fullmatch(rule.text))), None)
    mark = int(hit[1], 16) if hit else 0
    internal = [rule.text for rule in mangle.get(CLUSTER_IP, ())][1:]
    detector = next((hit for text in internal if (hit := _DETECTOR.fullmatch(text))), None)
    anywhere = any("--dst-type LOCAL" in rule.text for rule in mangle.get(SERVICES, ()))
    facts = NodeFacts(
        mark=mark if 0 < mark <= marks.ALL_BITS and mark.bit_count() == 1 else NodeFacts().mark,
        masquerade_all=len(internal) == 1 or (detector is not None and detector[3] != "-j RETURN"),
        detector=None if detector is None else _read_detector(detector[1], detector[2], family),
        node_port_addresses=None if anywhere else frozenset(),
        reject_closed_ports=True,
        bound=True,
    )
    return Wanted(facts, any("--random-fully" in rule.text for rule in nat.get(MASQUERADE, ())))


def damage(saved: Saved, wanted: Wanted, family: Family) -> Iterator[str]:
    """Where chains and jumps are not what they should be, one sentence each."""
    try:
        chains = build(wanted, family)
    except ValueError as error:
        yield f"the rules make no sense: {error}"
        return
    yield from rulesets.damage(saved.chains, chains)
    yield from rulesets.jump_damage(saved.jumps, JUMPS)


def _read_detector(source: str | None, interface: str | None, family: Family) -> Detector | None:
    if interface is not None:
        return InputInterfacePrefix(interface[:-1]) if interface.endswith("+") else InputInterface(interface)
    if source is None:
        return SourcePrefix(Prefix(bytes(family.address_bytes), 0))
    try:
        prefix = parse_prefix(source)
    except ValueError:
        return None
    return SourcePrefix(prefix) if len(prefix.address) == family.address_bytes else None
