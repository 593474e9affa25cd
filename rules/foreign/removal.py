"""What removes kube-proxy's rules, and nothing else (IPT-32, NFT-23).  Pure.

Two steps, so that no packet is torn: the first takes away what leads new connections in, the second all the rest.  A
packet that was translated and marked just before still finds the chain that masquerades it.

The kubelet's chains (`KUBE-FIREWALL` of the filter table, `KUBE-MARK-DROP`, `KUBE-KUBELET-CANARY`,
`KUBE-IPTABLES-HINT`) and those of other programs whose names begin alike (kube-router's `KUBE-ROUTER-...`) stay.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from rules.foreign.kube_proxy_ipvs_sets import Set, Sets
from rules.forwarding import Address, Protocol
from rules.iptables.text import FILTER, NAT
from rules.ipvs.messages import Key
from rules.netlink.ipset_messages import Element

MANGLE = "mangle"
NFT_TABLE = "kube-proxy"
NFT_ENTRIES = ("nat-prerouting", "nat-output")
"""The chains of nftables mode that lead new connections in."""

_PREFIX = "KUBE-"
_CANARY = "KUBE-PROXY-CANARY"
_CHAINS: Mapping[str, frozenset[str]] = {
    NAT: frozenset(
        {
            _CANARY,
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-POSTROUTING",
            "KUBE-MARK-MASQ",
            # Those of mode ipvs.
            "KUBE-NODE-PORT",
            "KUBE-LOAD-BALANCER",
            # Where older versions have source ranges; the kubelet's of that name is in the filter table.
            "KUBE-FIREWALL",
        }
    ),
    FILTER: frozenset(
        {
            _CANARY,
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-FORWARD",
            "KUBE-NODEPORTS",
            "KUBE-PROXY-FIREWALL",
            # Those of mode ipvs.
            "KUBE-NODE-PORT",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
        }
    ),
    MANGLE: frozenset({_CANARY}),
}
# The chains of service ports and endpoints; XLB is what SVL and EXT were before 1.24.
_OF_SERVICES = re.compile(r"KUBE-(?:SVC|SVL|SEP|FW|EXT|XLB)-.+")
_BUILT_IN = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})
_ENTRIES = frozenset({"PREROUTING", "OUTPUT"})
_ADDRESSED = (
    *(Set.CLUSTER_IP, Set.EXTERNAL_IP, Set.EXTERNAL_IP_LOCAL, Set.LOAD_BALANCER),
    *(Set.NODE_PORT_SCTP, Set.NODE_PORT_LOCAL_SCTP),
)
"""Sets that name virtual servers by address and port."""
_PORTS: Mapping[int, tuple[Set, ...]] = {
    Protocol.TCP: (Set.NODE_PORT_TCP, Set.NODE_PORT_LOCAL_TCP),
    Protocol.UDP: (Set.NODE_PORT_UDP, Set.NODE_PORT_LOCAL_UDP),
}
"""Sets that name node ports."""
_LENT = "KUBE-MARK-MASQ"
"""A chain that others are told to use (the option externalSetMarkChain of the CNI plugin portmap)."""
_TARGET = re.compile(r' -[jg] "?([^\s"]+)')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


class Removal(NamedTuple):
    """What to give to iptables-restore --noflush of one family and kind."""

    steps: tuple[str, ...]
    """The input of one iptables-restore each, in this order."""
    chains: int
    jumps: int
    """Rules in the kernel's own chains that lead to those."""
    kept: tuple[str, ...]
    """What has to stay, a sentence each."""

    def __bool__(self) -> bool:
        return bool(self.chains or self.jumps)

    def __str__(self) -> str:
        return f"{_count(self.chains, 'chain')} and {_count(self.jumps, 'jump')}"


class _Table(NamedTuple):
    name: str
    chains: list[str]
    """kube-proxy's."""
    jumps: list[tuple[str, str]]
    """Chain and rule of the jumps to them from the kernel's own chains."""
    borrowers: Mapping[str, str]
    """Of its chains to which chains of others lead, one such other."""
    lent: bool
    """Whether one of those is the chain that sets the mark, as it should be."""


def removal(saved: str) -> Removal:
    """What removes kube-proxy's part of what iptables-save printed for one family.

    It may be incomplete, edited or doubled.  A chain that rules of others lead to stays, empty; the one that only sets
    a mark stays as it is.
    """
    tables = [_sort(*each) for each in _tables(saved)]
    first = [
        line for table in tables if table.name == NAT for line in _restore(table.name, _jumps(table, entries=True))
    ]
    second: list[str] = []
    kept: list[str] = []
    for table in tables:
        lines = _jumps(table, entries=False)
        for chain in table.chains:
            if not (chain == _LENT and table.lent):
                lines.insert(0, f":{chain} - [0:0]")
        lines += [f"-X {chain}" for chain in table.chains if chain not in table.borrowers]
        second += _restore(table.name, lines)
        for chain, by in table.borrowers.items():
            how = "stays" if chain == _LENT and table.lent else "stays, empty"
            kept.append(f"the chain {chain} of the table {table.name} {how}: {by} leads there")
    return Removal(
        tuple("\n".join([*step, ""]) for step in (first, second) if step),
        sum(len(table.chains) - len(table.borrowers) for table in tables),
        sum(len(table.jumps) for table in tables),
        tuple(kept),
    )


def has_server(key: Key, sets: Sets, bound: Collection[Address], own: Collection[Address]) -> bool:
    """Whether a virtual server is one of kube-proxy's mode ipvs (IPVS-9), which carries no owner itself.

    Args:
        key: its address, protocol and port.
        sets: kube-proxy's sets of the family.
        bound: the addresses on kube-proxy's device, of the family.
        own: the node's other addresses.
    """
    if key.mark:
        return False
    if key.address in bound:
        return True
    at_address = Element(key.address, key.protocol, key.port)
    if any(at_address in sets[which] for which in _ADDRESSED):
        return True
    return key.address in own and any(Element(port=key.port) in sets[each] for each in _PORTS.get(key.protocol, ()))


def is_theirs(table: str, chain: str) -> bool:
    """Whether a chain of an iptables table is kube-proxy's."""
    return chain in _CHAINS.get(table, ()) or (table == NAT and _OF_SERVICES.fullmatch(chain) is not None)


def _tables(saved: str) -> Iterator[tuple[str, list[str], list[tuple[str, str]]]]:
    """The tables, each with the names of its chains and with its rules, by chain, as far as kube-proxy may matter."""
    if _PREFIX not in saved:
        return  # mostly so: large rulesets of others are not looked through
    name = ""
    chains: list[str] = []
    rules: list[tuple[str, str]] = []
    for line in saved.split("\n"):  # as iptables-save ends them: a comment may hold what others break lines by
        if line.startswith("*"):
            name, chains, rules = line[1:].strip(), [], []
        elif line.startswith(f":{_PREFIX}"):
            chains.append(line[1:].partition(" ")[0])
        elif line.startswith("-A ") and _PREFIX in line:
            chain, _, rule = line[3:].partition(" ")
            rules.append((chain, rule))
        elif line == "COMMIT":
            yield name, chains, rules


def _sort(name: str, chains: Iterable[str], rules: Iterable[tuple[str, str]]) -> _Table:
    theirs = [chain for chain in chains if is_theirs(name, chain)]
    jumps = []
    borrowers: dict[str, str] = {}
    leading = set()
    for chain, rule in rules:
        target = _TARGET.search(" " + _QUOTED.sub('""', rule))
        if target is None or not is_theirs(name, target[1]):
            continue
        if is_theirs(name, chain):
            leading.add(chain)
        elif chain in _BUILT_IN:
            jumps.append((chain, rule))
        else:
            borrowers.setdefault(target[1], chain)
    return _Table(name, theirs, jumps, borrowers, _LENT in borrowers and _LENT not in leading)


def _jumps(table: _Table, *, entries: bool) -> list[str]:
    lead_in = _ENTRIES if table.name == NAT else frozenset[str]()
    return [f"-D {chain} {rule}" for chain, rule in table.jumps if (chain in lead_in) is entries]


def _restore(table: str, lines: list[str]) -> list[str]:
    return [f"*{table}", *lines, "COMMIT"] if lines else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
