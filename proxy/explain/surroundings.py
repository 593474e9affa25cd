"""What else on this node decides about a Service's packets, and is none of our rules.

Everything is read where it stands, in the network namespace of the calling thread, and by no program: /proc,
rtnetlink, and the chains of all nftables tables (those of iptables-nft among them).  What cannot be read is left out:
an explanation must not fail for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from proxy.explain.routing import Way, own_addresses, way_to
from rules.forwarding import Address, Family, Prefix, family_of
from rules.node_ports import is_loopback

_NET = Path("/proc/thread-self/net")
_SYSCTL = Path("/proc/sys/net")
OUR_TABLE = "sluice"
_LINK_LOCAL = (Prefix(bytes([169, 254, 0, 0]), 16), Prefix(b"\xfe\x80" + bytes(14), 10))

_PROXY_CHAINS = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-SVC-", "KUBE-SEP-")
"""Chains that no one but kube-proxy makes; KUBE-FIREWALL, KUBE-MARK-DROP and others are the kubelet's."""


class ForeignChain(NamedTuple):
    """A chain of somebody else, in any table of nftables."""

    family: str
    table: str
    name: str
    forwards: bool
    """Whether it is a base chain of the forward hook."""
    drops: bool
    """Whether its policy is drop."""

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """The node beside our rules; None where something could not be read."""

    addresses: frozenset[Address] = frozenset()
    """The node's own, of every interface."""
    node_ips: Mapping[Family, Address] = {}
    """The address of each family by which others reach it."""
    ways: Mapping[Address, Way] = {}
    forwarding: Mapping[Family, bool] = {}
    strict_rp_filter: tuple[str, ...] = ()
    """Interfaces that drop what has come by another one than answers would leave by."""
    route_localnet: bool | None = None
    conntrack: tuple[int, int] | None = None
    """Connections that are tracked, and the most there can be."""
    chains: tuple[ForeignChain, ...] = ()
    legacy_tables: tuple[str, ...] = ()
    """Tables of legacy iptables, whose rules cannot be seen in nftables."""
    ipvs: bool = False
    """Whether IPVS has virtual services."""

    @property
    def forward_drops(self) -> tuple[ForeignChain, ...]:
        """Chains that drop what is forwarded and that none of their rules accepts."""
        return tuple(chain for chain in self.chains if chain.forwards and chain.drops)

    @property
    def other_proxies(self) -> tuple[str, ...]:
        """Rules of another service proxy."""
        found: dict[tuple[str, str], str] = {}
        for chain in self.chains:
            if chain.table == "kube-proxy":
                found[chain.family, chain.table] = f"the nftables table {chain.family} {chain.table}"
            elif chain.name.startswith(_PROXY_CHAINS):
                found.setdefault((chain.family, chain.table), f"{chain.name} in the table {chain.family} {chain.table}")
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
    own = own_addresses()
    node_ips: dict[Family, Address] = {}
    for address in own:
        if not is_loopback(address) and not any(address in network for network in _LINK_LOCAL):
            node_ips.setdefault(family_of(address), address)
    return Surroundings(
        addresses=frozenset(own),
        node_ips=node_ips,
        ways={address: way for address in addresses if (way := way_to(address)) is not None},
        forwarding=forwarding,
        strict_rp_filter=_strict_rp_filter(),
        route_localnet=None if localnet is None else localnet != 0,
        conntrack=(tracked, most) if tracked is not None and most else None,
        chains=tuple(_chains()),
        legacy_tables=tuple(sorted({*_lines("ip_tables_names"), *_lines("ip6_tables_names")})),
        ipvs=any(line.startswith(("TCP", "UDP", "SCTP")) for line in _lines("ip_vs")),
    )


def _strict_rp_filter() -> tuple[str, ...]:
    """Of the interfaces and `all` the larger value counts."""
    values = {path.parent.name: _number(path) or 0 for path in (_SYSCTL / "ipv4/conf").glob("*/rp_filter")}
    everywhere = values.pop("all", 0)
    values.pop("default", None)
    values.pop("lo", None)
    return tuple(sorted(name for name, value in values.items() if max(value, everywhere) == 1))


def _chains() -> Iterator[ForeignChain]:
    from rules.netlink.attributes import DecodeError  # noqa: PLC0415  # netlink, for live answers only
    from rules.netlink.transaction import AF_UNSPEC, NetfilterSocket, family_of, netfilter_message  # noqa: PLC0415
    from rules.nftables.objects import FORWARD, decode_chain  # noqa: PLC0415

    try:
        with NetfilterSocket() as socket:
            payloads = socket.dump(netfilter_message(_GET_CHAIN, 0, AF_UNSPEC, b""))
    except OSError:
        return
    for payload in payloads:
        try:
            table, chain = decode_chain(payload)
            family = _NFT_FAMILIES.get(family_of(payload), "?")
        except DecodeError:
            continue
        if table != OUR_TABLE:
            hook = chain.hook
            forwards = hook is not None and hook.number == FORWARD and family in _INET
            yield ForeignChain(family, table, chain.name, forwards, hook is not None and hook.policy == _NF_DROP)


_GET_CHAIN = 4
_NF_DROP = 0
_NFT_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_INET = frozenset({"inet", "ip", "ip6"})


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
