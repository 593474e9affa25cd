"""The forwarding table: what one node does with a new connection to a Service, for one address family.

Theory of operation
-------------------
A `ForwardingTable` is the value in the middle of Sluice.  `proxy.compute` makes it from Kubernetes objects, every
dataplane writes it into a kernel (`apply`) and decompiles it from there (`read`), and dump, diff, verify and explain
are functions of it.  It knows neither Kubernetes nor kernel objects.

A table maps each `Frontend` (where clients connect) to a `Route` (what happens there).  It is canonical: a route
holds what packets meet, not the words of a specification, so that two specifications that treat every packet alike
give equal tables.  In particular

* a route has a `refusal` exactly when some client of it is refused; without backends, all its clients are refused
  alike, and it has neither affinity nor a policy nor a scheduler;
* `source_ranges` holds no prefix that another one covers, and two halves of a prefix are that prefix
  (see `merge_prefixes`); an empty tuple admits everybody;
* backends are a set: the order in which a kernel stores them is not part of the table;
* the node-wide facts (`NodeFacts`) are part of the table, as a kernel holds them in rules too.

How a packet meets a route, by its source (TRF-2 to TRF-8 of the behaviour document):

    kind                 policy    from a local pod    from the node       from elsewhere
    ClusterIP            -         backends            backends            backends
    others               Cluster   backends, masq.     backends, masq.     backends, masq.
    others               Local     backends            backends, masq.     local_backends

where ClusterIP connections are masqueraded under `masquerade_all`, or when a detector is set and the source is not a
local pod; and where a connection that reaches itself (its source is the chosen backend, and that is in `hairpins`) is
always masqueraded.  Without a detector no source counts as a local pod.

One table is of one family, as each family is changed in the kernel by a transaction of its own and may fail alone: a
dual-stack node has two.

Everything that changes a route changes which packets go where: there are no timestamps, counters or identities here.
"""

from __future__ import annotations

import enum
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

Address = bytes
"""An IPv4 or IPv6 address in network order: 4 or 16 bytes."""


class Family(enum.IntEnum):
    """An address family, by its IP version."""

    label: str
    """`IPv4` or `IPv6`, as Kubernetes, metrics and messages spell it."""

    IPV4 = 4
    IPV6 = 6

    def __init__(self, version: int) -> None:
        self.label = f"IPv{version}"  # once, as it is asked for with every object

    @property
    def af(self) -> int:
        """The socket layer's number of the family (`AF_INET`, `AF_INET6`)."""
        return socket.AF_INET if self is Family.IPV4 else socket.AF_INET6

    @property
    def address_bytes(self) -> int:
        """The length of an address of the family, in bytes."""
        return 4 if self is Family.IPV4 else 16


class Protocol(enum.IntEnum):
    """A transport protocol that Services balance, by its IP protocol number."""

    TCP = 6
    UDP = 17
    SCTP = 132


class Kind(enum.Enum):
    """What a frontend is to Kubernetes."""

    CLUSTER_IP = "ClusterIP"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER = "LoadBalancer"
    NODE_PORT = "NodePort"


class Refusal(enum.Enum):
    """What happens to a new connection that finds no backend (SEL-11)."""

    REJECT = "reject"
    """ICMP port unreachable: no endpoint anywhere can serve."""
    DROP = "drop"
    """Silence: endpoints exist, but the traffic policy admits none of them here."""


KERNEL_SCHEDULERS = frozenset({"wrr", "wlc", "lblc", "lblcr", "sed", "nq", "dh", "sh", "mh", "fo", "ovf"})
"""Those of IPVS, as the kernel calls them (IPVS-5); `rr` and `lc` have names of ours."""
SCHEDULERS = frozenset({"round-robin", "least-connections"}) | KERNEL_SCHEDULERS
"""Ways of choosing a backend that a route may ask for; without one, each is as likely as the others."""


class Prefix(NamedTuple):
    """A network: `address` with its host bits zero, and a length in bits."""

    address: Address
    length: int

    def __str__(self) -> str:
        return f"{format_address(self.address)}/{self.length}"

    def __contains__(self, address: object) -> bool:
        """Whether a packed address of the same family lies in the network."""
        if not isinstance(address, bytes) or len(address) != len(self.address):
            return False
        shift = len(address) * 8 - self.length
        return int.from_bytes(address) >> shift == int.from_bytes(self.address) >> shift


class Frontend(NamedTuple):
    """Where clients connect: an address (or any node-port address of the node), a protocol and a port."""

    address: Address
    """The address; empty for a node port, which every node-port address answers."""
    protocol: Protocol
    port: int

    @property
    def is_node_port(self) -> bool:
        return not self.address

    def __str__(self) -> str:
        host = format_host(self.address) if self.address else "*"
        return f"{host}:{self.port}/{self.protocol.name}"


class Backend(NamedTuple):
    """An endpoint chosen for a frontend on this node."""

    address: Address
    port: int

    def __str__(self) -> str:
        return f"{format_host(self.address)}:{self.port}"


class Endpoint(NamedTuple):
    """A backend with its protocol: what a connection has reached once it is translated."""

    address: Address
    protocol: Protocol
    port: int

    def __str__(self) -> str:
        return f"{format_host(self.address)}:{self.port}/{self.protocol.name}"


class Route(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a node does with new connections to one frontend."""

    kind: Kind
    backends: frozenset[Backend] = frozenset()
    """The list of ClusterIP by internal policy; elsewhere the list of external policy Cluster, which local pods and
    the node itself are given under policy Local too (short-circuit, TRF-4)."""
    local_backends: frozenset[Backend] | None = None
    """Under external policy Local: what sources from outside are given.  None: policy Cluster, a ClusterIP, or no
    backends at all."""
    refusal: Refusal | None = None
    """What happens to those for whom the list that they are given is empty; None when no list is empty."""
    affinity: int = 0
    """Seconds for which a client keeps its backend; 0: every connection is balanced afresh (TRF-24)."""
    source_ranges: tuple[Prefix, ...] = ()
    """Sources that are admitted, sorted; others are dropped before anything else (TRF-17).  Empty: everybody."""
    scheduler: str = ""
    """How a backend is chosen, by a name of `SCHEDULERS`; empty: at random, which every dataplane does (TRF-3)."""
    proxy_protocol: bool = False
    """Whether a backend is told its client's address before anything else, by the PROXY protocol (version 2)."""
    label: str = ""
    """Whose route it is, for people: `namespace/service:port`.  Empty when a kernel kept no label."""

    @property
    def policy_local(self) -> bool:
        """Whether external policy Local governs the frontend."""
        return self.local_backends is not None


class SourcePrefix(msgspec.Struct, frozen=True, tag="source-prefix"):
    """Local pods are the sources in a network (detect-local modes ClusterCIDR and NodeCIDR)."""

    prefix: Prefix


class InputInterface(msgspec.Struct, frozen=True, tag="interface"):
    """Local pods are what comes in by one interface (BridgeInterface)."""

    name: str


class InputInterfacePrefix(msgspec.Struct, frozen=True, tag="interface-prefix"):
    """Local pods are what comes in by interfaces whose names begin so (InterfaceNamePrefix)."""

    prefix: str


Detector = SourcePrefix | InputInterface | InputInterfacePrefix
"""How the node tells the traffic of its own pods from other traffic (TRF-10)."""


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for every route of one family on one node."""

    mark: int = 1 << 14
    """The bit of the packet mark that remembers the need to masquerade, as a mask (TRF-9)."""
    masquerade_all: bool = False
    """Masquerade every connection to a ClusterIP (TRF-6)."""
    detector: Detector | None = None
    """None: no source counts as a local pod."""
    node_port_addresses: frozenset[Address] | None = None
    """The addresses that answer node ports.  None: every address of the node but loopback (TRF-20)."""
    loopback_node_ports: bool = False
    """Whether 127.0.0.0/8 answers node ports too (TRF-21); IPv4 only."""
    reject_closed_ports: bool = True
    """Whether new connections to other ports of a ClusterIP are rejected, as in kube-proxy's nftables mode (NFT-20),
    or left alone, as in its iptables mode (TRF-13)."""
    health_check_ports: frozenset[int] = frozenset()
    """TCP ports of the node itself that packets reach whatever the policy of INPUT is: those where load balancers ask
    about Services (TRF-27); none in nftables mode."""
    service_cidrs: tuple[Prefix, ...] = ()
    """Networks of ClusterIPs, merged and sorted: new connections to an address in them that no Service has are
    dropped (NFT-20), or, where connections are `relayed`, refused."""
    bound: bool = False
    """Whether frontends' addresses are addresses of the node (IPVS-7).  Then their closed ports refuse, whatever kind
    they are of; and the node, which takes a ClusterIP's own address as its source when it connects to it, is
    masqueraded (IPVS-14).  So it is in mode ipvs, and only there."""
    relayed: bool = False
    """Whether connections end in a proxy on this node, which makes connections of its own to the backends.  Then the
    node is the source of all of them, whatever is said of masquerading; and ClusterIPs and service networks are
    addresses of the node, whose closed ports refuse.  So it is in userspace mode, and only there."""


class ForwardingTable(msgspec.Struct, frozen=True, kw_only=True):
    """What one node does with new connections, for one family.  See the head of this module."""

    family: Family
    node: NodeFacts = NodeFacts()
    routes: Mapping[Frontend, Route] = {}
    hairpins: frozenset[Endpoint] = frozenset()
    """Endpoints whose connections to themselves are masqueraded (TRF-7): those on this node."""
    damage: frozenset[str] = frozenset()
    """Only in a table that was read: what the kernel holds and no table says, or lacks and every table needs (a
    missing rule, a pick that leads nowhere), one sentence each.  A wanted table has none, so any damage is drift."""

    def without_labels(self) -> ForwardingTable:
        """The same table as a kernel would return it that keeps no labels."""
        routes = {frontend: msgspec.structs.replace(route, label="") for frontend, route in self.routes.items()}
        return msgspec.structs.replace(self, routes=routes)


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What makes one table into another of the same family."""

    changed: Mapping[Frontend, Route] = {}
    """Frontends that are new or whose route is another."""
    removed: frozenset[Frontend] = frozenset()
    hairpins_added: frozenset[Endpoint] = frozenset()
    hairpins_removed: frozenset[Endpoint] = frozenset()
    node: NodeFacts | None = None
    """The node's facts, if they are others than before."""

    @property
    def size(self) -> int:
        """How much it is to apply, in frontends and backends."""
        lists = sum(len(route.backends) + len(route.local_backends or ()) for route in self.changed.values())
        return len(self.changed) + len(self.removed) + len(self.hairpins_added) + len(self.hairpins_removed) + lists

    def __bool__(self) -> bool:
        return bool(
            self.changed or self.removed or self.hairpins_added or self.hairpins_removed or self.node is not None
        )


def difference(old: ForwardingTable, new: ForwardingTable) -> Delta:
    """The delta that leads from `old` to `new`.

    Damage is not part of it: a dataplane repairs what it found broken by its own means.

    Raises:
        ValueError: the tables are of different families.
    """
    if old.family is not new.family:
        raise ValueError(f"tables of {old.family.label} and {new.family.label} have no difference")
    before, after = old.routes, new.routes
    return Delta(
        changed={frontend: route for frontend, route in after.items() if before.get(frontend) != route},
        removed=frozenset(frontend for frontend in before if frontend not in after),
        hairpins_added=new.hairpins - old.hairpins,
        hairpins_removed=old.hairpins - new.hairpins,
        node=new.node if new.node != old.node else None,
    )


def apply_delta(table: ForwardingTable, delta: Delta) -> ForwardingTable:
    """The table that `delta` makes of `table`; the inverse of `difference`."""
    routes = {frontend: route for frontend, route in table.routes.items() if frontend not in delta.removed}
    routes.update(delta.changed)
    return ForwardingTable(
        family=table.family,
        node=table.node if delta.node is None else delta.node,
        routes=routes,
        hairpins=(table.hairpins - delta.hairpins_removed) | delta.hairpins_added,
    )


def check_route(family: Family, frontend: Frontend, route: Route) -> str | None:
    """Why `route` cannot stand at `frontend` in a table of `family`, or None when it can.

    It guards what the dataplanes take for granted: the rules of the canonical form, and values in their ranges.
    """
    size = family.address_bytes
    lists = [route.backends] if route.local_backends is None else [route.backends, route.local_backends]
    faults = {
        "only a node port has no address": (route.kind is Kind.NODE_PORT) != frontend.is_node_port,
        "the address is not {family}": len(frontend.address) not in (0, size),
        "port {port} is not in 1..65535": not 0 < frontend.port < 65536,
        "a backend is not an {family} address and a port": any(
            len(address) != size or not 0 < port < 65536 for each in lists for address, port in each
        ),
        "a ClusterIP has one list": route.kind is Kind.CLUSTER_IP and route.policy_local,
        "a traffic policy without backends": route.policy_local and not route.backends,
        "a refusal belongs to a route with an empty list, and to no other": (route.refusal is None) != all(lists),
        "affinity without backends": bool(route.affinity) and not route.backends,
        "there is no scheduler {scheduler}": bool(route.scheduler) and route.scheduler not in SCHEDULERS,
        "a scheduler without backends": bool(route.scheduler) and not route.backends,
        "the PROXY protocol needs TCP and backends": route.proxy_protocol
        and not (route.backends and frontend.protocol is Protocol.TCP),
        "only load balancer addresses have source ranges": bool(route.source_ranges)
        and route.kind is not Kind.LOAD_BALANCER,
        "source ranges are not merged and sorted": bool(route.source_ranges)
        and route.source_ranges != merge_prefixes(route.source_ranges),
    }
    for fault, found in faults.items():
        if found:
            return fault.format(family=family.label, port=frontend.port, scheduler=route.scheduler)
    return None


def merge_prefixes(prefixes: Iterable[Prefix]) -> tuple[Prefix, ...]:
    """The fewest prefixes that cover the same addresses, sorted; the prefixes are of one family."""
    networks = [ipaddress.ip_network((prefix.address, prefix.length)) for prefix in prefixes]
    merged = ipaddress.collapse_addresses(networks)  # type: ignore[type-var]  # one family, which the types don't say
    return tuple(Prefix(network.network_address.packed, network.prefixlen) for network in merged)


def parse_address(text: str) -> Address:
    """The packed form of an IPv4 or IPv6 address in its strict textual form.

    Raises:
        ValueError: `text` is no address.
    """
    return ipaddress.ip_address(text).packed


def parse_prefix(text: str) -> Prefix:
    """A network from its textual form; host bits are masked off.

    Raises:
        ValueError: `text` is no network.
    """
    network = ipaddress.ip_network(text, strict=False)
    return Prefix(network.network_address.packed, network.prefixlen)


def format_address(address: Address) -> str:
    """The canonical textual form of a packed address."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def format_host(address: Address) -> str:
    """An address as it stands before a port: IPv6 in brackets."""
    return format_address(address) if len(address) == 4 else f"[{format_address(address)}]"


def family_of(address: Address) -> Family:
    """The family of a packed address."""
    return Family.IPV4 if len(address) == 4 else Family.IPV6
