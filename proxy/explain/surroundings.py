"""What else on this node decides about a Service's packets, and is none of our rules.

Everything is read where it stands, in the network namespace of the calling thread, and by no program: /proc,
rtnetlink, the chains of all nftables tables (those of iptables-nft among them), and the tables of legacy iptables.
What cannot be read is left out, or named: an explanation must not fail for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from proxy.explain import legacy
from proxy.explain.passing import OUR_FORWARD, Chains, ForeignRule, Stage
from proxy.explain.routing import Way, own_addresses, ways_to
from rules.forwarding import Address, Family, Prefix, family_of
from rules.node_ports import is_loopback

_NET = Path("/proc/thread-self/net")
_SYSCTL = Path("/proc/sys/net")
OUR_TABLE = "sluice"
_LEGACY_NAMES = {Family.IPV4: "ip_tables_names", Family.IPV6: "ip6_tables_names"}
_LINK_LOCAL = (Prefix(bytes([169, 254, 0, 0]), 16), Prefix(b"\xfe\x80" + bytes(14), 10))

_PROXY_CHAINS = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-SVC-", "KUBE-SEP-")
"""Chains that no one but kube-proxy makes; KUBE-FIREWALL, KUBE-MARK-DROP and others are the kubelet's."""


Hook = Literal["ingress", "prerouting", "input", "forward", "output", "egress"]
HOOKS: tuple[Hook, ...] = ("ingress", "prerouting", "input", "forward", "output", "egress")
"""Where others may drop packets to Services; postrouting is for translation.

Ingress and egress are of devices, before and behind all others.  What chains of bridges see on the way in and out
counts as that too.
"""
_OF_DEVICES = ("netdev", "bridge")
"""Families whose chains see packets of IPv4 and of IPv6."""
CONNECTION_TRACKING, DESTINATION_NAT = -200, -100
"""Where they stand in prerouting and output, by priority."""


class ForeignChain(NamedTuple):
    """A chain of somebody else, in any table of nftables or of legacy iptables."""

    family: str
    """As nft has it: `ip`, `ip6`, `inet` and so on."""
    table: str
    name: str
    forwards: bool
    """Whether it is a base chain of the forward hook."""
    drops: bool
    """Whether its policy is drop."""
    legacy: bool = False
    """Whether it is of legacy iptables, of which nft shows nothing."""
    rules: tuple[ForeignRule, ...] | None = None
    """Of tables with a base chain that may drop what goes through Services; None: they were not read."""
    hook: Hook | Literal[""] = ""
    """Of another base chain, where it stands; not of those that translate addresses."""
    priority: int = 0
    """Of a base chain: among those of a hook the lower comes first."""

    def __str__(self) -> str:
        return f"{self.place} {self.name}"

    @property
    def place(self) -> str:
        """Its table."""
        return f"{self.family} {self.table}{' of legacy iptables' if self.legacy else ''}"

    @property
    def stage(self) -> Stage:
        """How far packets are that it sees."""
        if self.hook == "ingress":
            return "untracked"
        if self.forwards or self.hook in ("input", "egress") or self.priority > DESTINATION_NAT:
            return "translated"
        return "tracked" if self.priority > CONNECTION_TRACKING else "untracked"

    @property
    def listing(self) -> str:
        """The command that shows it."""
        if not self.legacy:
            return f"nft list chain {self.family} {self.table} {self.name}"
        return f"ip{'6' if self.family == 'ip6' else ''}tables-legacy -t {self.table} -S {self.name}"


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """The node beside our rules; None where something could not be read."""

    addresses: frozenset[Address] = frozenset()
    """The node's own, of every interface."""
    node_ips: Mapping[Family, Address] = {}
    """The address of each family by which others reach it."""
    ways: Mapping[Address, Way] = {}
    unreachable: Mapping[Address, str] = {}
    """Addresses to which the node sends nothing, and what the kernel says of them."""
    forwarding: Mapping[Family, bool] = {}
    strict_rp_filter: tuple[str, ...] = ()
    """Interfaces that drop what has come by another one than answers would leave by."""
    route_localnet: bool | None = None
    conntrack: tuple[int, int] | None = None
    """Connections that are tracked, and the most there can be."""
    chains: tuple[ForeignChain, ...] = ()
    legacy_tables: tuple[str, ...] = ()
    """Tables of legacy iptables that could not be read."""
    listening: frozenset[tuple[str, int]] = frozenset()
    """Protocols and ports at which processes of this node wait for clients from outside it."""
    ipvs: bool = False
    """Whether IPVS has virtual services."""

    @property
    def forward_drops(self) -> tuple[ForeignChain, ...]:
        """Chains that drop what is forwarded by their policy; where ours accepts it, they don't."""
        ours = {chain.place for chain in self.chains if chain.name == OUR_FORWARD}
        return tuple(chain for chain in self.chains if chain.forwards and chain.drops and chain.place not in ours)

    def base_chains(self, hook: Hook, family: Family) -> Iterator[tuple[ForeignChain, Chains]]:
        """The base chains of others at a hook, each with the chains of its table.

        Those of other service proxies are left out, and what was not read.
        """
        kinds = ("inet", "ip" if family is Family.IPV4 else "ip6", *_OF_DEVICES)
        for base in self.chains:
            stands = "forward" if base.forwards else base.hook
            if stands == hook and base.rules is not None and base.family in kinds and base.table != "kube-proxy":
                yield base, {each.name: each.rules or () for each in self.chains if each.place == base.place}

    @property
    def other_proxies(self) -> tuple[str, ...]:
        """Rules of another service proxy."""
        found: dict[str, str] = {}
        for chain in self.chains:
            if chain.table == "kube-proxy":
                found[chain.place] = f"the nftables table {chain.place}"
            elif chain.name.startswith(_PROXY_CHAINS):
                found.setdefault(chain.place, f"{chain.name} in the table {chain.place}")
        return (*found.values(), *(["virtual services of IPVS"] if self.ipvs else []))


def look(*addresses: Address) -> Surroundings:
    """The node of the calling thread, with the ways to `addresses`."""
    forwarding = {
        family: value != 0
        for family, name in ((Family.IPV4, "ipv4/ip_forward"), (Family.IPV6, "ipv6/conf/all/forwarding"))
        if (value := _number(_SYSCTL / name)) is not None
    }
    localnet = _number(_SYSCTL / "ipv4/conf/all/route_localnet")
    tracked, most = (_number(_SYSCTL / "netfilter" / f"nf_conntrack_{name}") for name in ("count", "max"))
    from proxy.explain.nftables_chains import read_chains  # noqa: PLC0415  # netlink, for live answers only

    chains, unread = _legacy_chains()
    own = own_addresses()
    ways, unreachable = ways_to(addresses)
    node_ips: dict[Family, Address] = {}
    for address in own:
        if not is_loopback(address) and not any(address in network for network in _LINK_LOCAL):
            node_ips.setdefault(family_of(address), address)
    return Surroundings(
        addresses=frozenset(own),
        node_ips=node_ips,
        ways=ways,
        unreachable=unreachable,
        forwarding=forwarding,
        strict_rp_filter=_strict_rp_filter(),
        route_localnet=None if localnet is None else localnet != 0,
        conntrack=(tracked, most) if tracked is not None and most else None,
        chains=(*read_chains(), *chains),
        legacy_tables=tuple(sorted(set(unread))),
        listening=frozenset(_listening()),
        ipvs=any(line.startswith(("TCP", "UDP", "SCTP")) for line in _lines("ip_vs")),
    )


def _listening() -> Iterator[tuple[str, int]]:
    from proxy.userspace.sockdiag import read_listeners  # noqa: PLC0415  # netlink, for live answers only
    from rules.netlink.attributes import DecodeError  # noqa: PLC0415  # as above

    for family in Family:
        with contextlib.suppress(OSError, DecodeError):
            for each in read_listeners(family):
                if not is_loopback(each.address):
                    yield each.protocol.name, each.port


def _strict_rp_filter() -> tuple[str, ...]:
    """Of the interfaces and `all` the larger value counts."""
    values = {path.parent.name: _number(path) or 0 for path in (_SYSCTL / "ipv4/conf").glob("*/rp_filter")}
    everywhere = values.pop("all", 0)
    values.pop("default", None)
    values.pop("lo", None)
    return tuple(sorted(name for name, value in values.items() if max(value, everywhere) == 1))


def _legacy_chains() -> tuple[list[ForeignChain], list[str]]:
    """The chains of legacy iptables, and the tables that could not be read."""
    found, unread = [], []
    for family, file in _LEGACY_NAMES.items():
        short = "ip" if family is Family.IPV4 else "ip6"
        for name in _lines(file):
            try:
                table = legacy.read(family, name, with_rules=name in _LEGACY_PRIORITIES)
            except OSError:
                unread.append(name)
                continue
            held = table.rules
            found += [
                ForeignChain(short, name, each, forwards=False, drops=False, legacy=True, rules=held.get(each, ()))
                for each in table.chains
            ]
            if name not in _LEGACY_PRIORITIES:
                continue
            for chain, hook in _LEGACY_HOOKS.items():
                if not (drops := table.policies.get(chain, False)) and not held.get(chain):
                    continue
                forwards = hook == "forward"
                base = ForeignChain(short, name, chain, forwards, drops, legacy=True, rules=held.get(chain, ()))
                priority = _LEGACY_PRIORITIES[name]
                found.append(base if forwards else base._replace(hook=hook, priority=priority))
    return found, unread


_LEGACY_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
"""Tables that may drop, and where their chains stand."""
_LEGACY_HOOKS: Mapping[str, Hook] = {
    "PREROUTING": "prerouting",
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
}


def _lines(name: str) -> list[str]:
    try:
        return (_NET / name).read_text().split("\n")[:-1]
    except OSError:
        return []


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
