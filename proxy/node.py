"""What the node is: its name, its addresses, its zone, and the facts that hold for every route on it.

Everything here is a function of the settings, the Node object (None: not known), the addresses of the node's
interfaces and the ServiceCIDRs; whoever watches those calls again when one changes.

Without a cluster (`standalone`) and without a Node object among the manifests, the node is its host name and the
addresses of its interfaces (DESIGN 4.14).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from proxy.addresses import lenient_address, lenient_prefix
from proxy.compute import View, semantics_of
from proxy.config.settings import PRIMARY, Settings
from proxy.objects import ZONE_LABEL, Node, ServiceCIDR
from rules.forwarding import (
    Address,
    Detector,
    Family,
    InputInterface,
    InputInterfacePrefix,
    NodeFacts,
    Prefix,
    SourcePrefix,
    family_of,
    merge_prefixes,
)

Interfaces = Mapping[str, Sequence[Address]]
"""The addresses of every interface, loopback included, by the interfaces' names in the order of their indexes."""

DELETION_TAINT = "ToBeDeletedByClusterAutoscaler"

_LOOPBACK = {Family.IPV4: bytes([127, 0, 0, 1]), Family.IPV6: bytes(15) + b"\x01"}
_LOOPBACK_NETWORK = {Family.IPV4: Prefix(bytes([127, 0, 0, 0]), 8), Family.IPV6: Prefix(bytes(15) + b"\x01", 128)}
_LINK_LOCAL = {Family.IPV4: Prefix(bytes([169, 254, 0, 0]), 16), Family.IPV6: Prefix(b"\xfe\x80" + bytes(14), 10)}


def normal_node_name(override: str, hostname: str) -> str:
    """The name by which the node goes in the cluster (NOD-1).

    Raises:
        ValueError: nothing is left of it.
    """
    name = (override if override.strip() else hostname).strip().lower()
    if not name:
        raise ValueError("empty hostname is invalid")
    return name


class NodeIPs(NamedTuple):
    """The node's address of each family, and which family comes first (NOD-10)."""

    primary: Family
    addresses: Mapping[Family, Address]
    """Loopback where the node's own is not known."""

    def known(self, family: Family) -> Address | None:
        """The node's own address of a family; None where there is but loopback."""
        address = self.addresses[family]
        return None if _is_loopback(address) else address


def node_ips(node: Node | None, override: Address | None = None, interfaces: Interfaces | None = None) -> NodeIPs:
    """The node's addresses.

    `override` is a specific `bindAddress`: it replaces the address of its family, and makes that family the primary
    one.  `interfaces` stand in for a Node that isn't known or says no addresses, where there is no cluster to know.
    """
    addresses = dict(_LOOPBACK)
    primary = Family.IPV4
    found = [*_node_addresses(node)] if node is not None else []
    found = found or [*_interface_addresses(interfaces or {})]
    if found:
        primary = family_of(found[0])
        for address in reversed(found):
            addresses[family_of(address)] = address
    if override is not None:
        primary = family_of(override)
        addresses[primary] = override
    return NodeIPs(primary, addresses)


def zone_of(node: Node | None) -> str:
    """The node's zone by its label; "" without one (NOD-9)."""
    return "" if node is None else node.metadata.labels.get(ZONE_LABEL, "")


def eligible(node: Node | None) -> bool:
    """Whether load balancers may send to the node: it is known, and nobody is about to remove it (NOD-8, HC-5)."""
    return (
        node is not None
        and not node.metadata.deletion_timestamp
        and all(taint.key != DELETION_TAINT for taint in node.spec.taints)
    )


def expand_node_port_addresses(
    setting: Sequence[str], interfaces: Interfaces, ips: NodeIPs, family: Family
) -> frozenset[Address] | None:
    """The addresses of the node that answer node ports; None: all but loopback (CFG-30 to CFG-33, TRF-20)."""
    networks = _node_port_networks(setting, ips, family)
    if networks is None:
        return None
    return frozenset(
        address
        for addresses in interfaces.values()
        for address in addresses
        if not _is_loopback(address) and any(address in network for network in networks)
    )


def covers_loopback(setting: Sequence[str], ips: NodeIPs) -> bool:
    """Whether `nodePortAddresses` have anything of 127.0.0.0/8 among them (CFG-32)."""
    networks = _node_port_networks(setting, ips, Family.IPV4)
    if networks is None:
        return True
    loopback = _LOOPBACK_NETWORK[Family.IPV4]
    return any(network.address in loopback or loopback.address in network for network in networks)


def detector_of(settings: Settings, node: Node | None, family: Family) -> Detector | None:
    """How traffic of local pods is told in a family; None: it isn't (CFG-40, TRF-10, TRF-11)."""
    match settings.detect_local_mode:
        case "ClusterCIDR":
            prefix = settings.cluster_cidr(family)
            return SourcePrefix(prefix) if prefix is not None else None
        case "NodeCIDR":
            pod_cidrs = (node.spec.pod_cidrs or (node.spec.pod_cidr,)) if node is not None else ()
            prefix = next(_prefixes(pod_cidrs, family), None)
            return SourcePrefix(prefix) if prefix is not None else None
        case "BridgeInterface":
            return InputInterface(settings.bridge_interface)
        case "InterfaceNamePrefix":
            return InputInterfacePrefix(settings.interface_name_prefix)


def node_facts(
    settings: Settings,
    node: Node | None,
    interfaces: Interfaces,
    service_cidrs: Iterable[ServiceCIDR] = (),
    *,
    standalone: bool = False,
) -> dict[Family, NodeFacts]:
    """The facts of both families.

    What modes mean differently stands in them: in nftables mode closed ports are refused, unallocated ClusterIPs are
    dropped, node ports are on the node's primary addresses and never on loopback; every other mode means what iptables
    mode means (DESIGN 4.10).  Mode ipvs refuses closed ports, as ClusterIPs are addresses of the node (IPVS-27), and
    has no node ports on loopback (IPVS-29).  Userspace mode knows the networks of ClusterIPs too: it makes them
    addresses of the node.
    """
    nftables = settings.behaviour == "nftables"
    relayed = settings.mode == "userspace"
    ipvs = settings.mode == "ipvs"
    ips = node_ips(node, settings.node_ip_override, interfaces if standalone else None)
    setting = settings.node_port_addresses or ((PRIMARY,) if nftables else ())
    told = [text for each in service_cidrs for text in each.spec.cidrs]
    facts = {}
    for family in Family:
        networks: Iterable[Prefix] = ()
        if nftables or relayed:
            networks = _prefixes(told, family) if told else _of_family(settings.service_cidrs, family)
        facts[family] = NodeFacts(
            mark=settings.masquerade_mark,
            masquerade_all=settings.masquerade_all,
            detector=detector_of(settings, node, family),
            node_port_addresses=expand_node_port_addresses(setting, interfaces, ips, family),
            loopback_node_ports=(
                not (nftables or ipvs)
                and family is Family.IPV4
                and settings.localhost_node_ports
                and covers_loopback(setting, ips)
            ),
            reject_closed_ports=nftables or ipvs,
            service_cidrs=merge_prefixes(networks),
            bound=ipvs,
            relayed=relayed,
        )
    return facts


def view_of(
    settings: Settings, node_name: str, node: Node | None, interfaces: Interfaces, *, standalone: bool = False
) -> View:
    """The node as `proxy.compute` sees it."""
    ips = node_ips(node, settings.node_ip_override, interfaces if standalone else None)
    return View(
        node_name=node_name,
        zone=zone_of(node),
        node_ips=ips.addresses,
        semantics=semantics_of(settings.behaviour),
        external_ips=settings.allow_external_ips,
    )


def _node_addresses(node: Node) -> Iterator[Address]:
    """Internal addresses, then external ones (NOD-4)."""
    for kind in ("InternalIP", "ExternalIP"):
        for each in node.status.addresses:
            if each.type == kind:
                try:
                    yield lenient_address(each.address)
                except ValueError:
                    continue


def _interface_addresses(interfaces: Interfaces) -> Iterator[Address]:
    """What others can reach the node by, IPv4 first."""
    for family in Family:
        for addresses in interfaces.values():
            for address in addresses:
                if family_of(address) is family and address not in _LINK_LOCAL[family] and not _is_loopback(address):
                    yield address


def _node_port_networks(setting: Sequence[str], ips: NodeIPs, family: Family) -> list[Prefix] | None:
    """The networks of a family that answer node ports; None: all (CFG-30, CFG-31)."""
    if PRIMARY in setting:
        address = ips.known(family)
        return None if address is None else [Prefix(address, len(address) * 8)]
    networks = list(_prefixes(setting, family))
    return networks if networks and all(network.length for network in networks) else None


def _prefixes(texts: Iterable[str], family: Family) -> Iterator[Prefix]:
    """The networks of a family among `texts`; what is no network is none of them."""
    for text in texts:
        try:
            prefix = lenient_prefix(text)
        except ValueError:
            continue
        if family_of(prefix.address) is family:
            yield prefix


def _of_family(prefixes: Iterable[Prefix], family: Family) -> list[Prefix]:
    return [prefix for prefix in prefixes if family_of(prefix.address) is family]


def _is_loopback(address: Address) -> bool:
    return address in _LOOPBACK_NETWORK[family_of(address)]
