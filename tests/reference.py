"""What becomes of a packet on node1 by the clauses of the behaviour document alone: none of Sluice's code is asked.

It goes through objects as they are written, packet by packet, as simply as can be: slow, and easy to hold against the
clauses.  `proxy.compute`, `rules.explain` and every dataplane must come to the same (tests/made_up.py has objects).

Departures that docs/differences.md tells are followed here: who has a frontend that several claim, where node ports
refuse, and that the node's own connections are refused as everybody's are.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from proxy.demo import plan
from tests.scenarios.schema import Manifest, join

Answer = str | dict[str, str]
"""`refused`, `dropped`, `untouched`; or what each backend (`address:port`) sees: `kept` or `masqueraded`."""

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NODE = "node1"
_ZONE = "za"
_PODS = [ipaddress.ip_network(each) for each in plan.CLUSTER_CIDRS]
_SERVICES = [ipaddress.ip_network(each) for each in plan.SERVICE_CIDRS]


class Asked(NamedTuple):
    """The first packet of a connection."""

    source: str
    address: str
    port: int
    protocol: str


class _Endpoint(NamedTuple):
    address: str
    port: int
    local: bool
    ready: bool
    serving: bool
    terminating: bool
    zones: frozenset[str]
    nodes: frozenset[str]

    @property
    def fallback(self) -> bool:
        return self.serving and self.terminating

    @property
    def name(self) -> str:
        return join(self.address, self.port)


class _Port(NamedTuple):
    """A service port (SVC-6) in one family."""

    service: Manifest
    port: dict[str, Any]
    family: int
    endpoints: list[_Endpoint]

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.service["spec"]
        return spec

    def addresses(self, texts: Iterable[str]) -> list[str]:
        return [text for text in texts if ipaddress.ip_address(text).version == self.family]

    @property
    def cluster_ip(self) -> list[str]:
        families = self.spec["ipFamilies"]
        wanted = f"IPv{self.family}"
        return [self.spec["clusterIPs"][families.index(wanted)]] if wanted in families else []

    @property
    def external_ips(self) -> list[str]:
        return self.addresses(self.spec.get("externalIPs", []))

    @property
    def balancers(self) -> list[str]:
        ingress = self.service.get("status", {}).get("loadBalancer", {}).get("ingress", [])
        return self.addresses(each["ip"] for each in ingress if each.get("ipMode", "VIP") == "VIP")

    @property
    def external_local(self) -> bool:  # SVC-11
        exposed = self.spec["type"] != "ClusterIP" or self.spec.get("externalIPs")
        return self.spec.get("externalTrafficPolicy") == "Local" and bool(exposed)

    @property
    def internal_local(self) -> bool:
        return self.spec.get("internalTrafficPolicy") == "Local"

    # --- selection ---

    @property
    def cluster(self) -> set[str]:  # SEL-3, SEL-6
        ready = [each for each in self.endpoints if each.ready]
        if not ready:
            return {each.name for each in self.endpoints if each.fallback}
        if all(each.nodes for each in ready) and any(_NODE in each.nodes for each in ready):
            ready = [each for each in ready if _NODE in each.nodes]
        elif all(each.zones for each in ready) and any(_ZONE in each.zones for each in ready):
            ready = [each for each in ready if _ZONE in each.zones]
        return {each.name for each in ready}

    @property
    def local(self) -> set[str]:  # SEL-4
        ready = {each.name for each in self.endpoints if each.local and each.ready}
        return ready or {each.name for each in self.endpoints if each.local and each.fallback}

    @property
    def any(self) -> bool:
        return any(each.ready or each.fallback for each in self.endpoints)

    def ranges(self, node_ip: str) -> list[_Network]:  # SVC-10, TRF-18
        written = (ipaddress.ip_network(each.strip(), strict=False) for each in self.spec["loadBalancerSourceRanges"])
        ranges = [each for each in written if each.version == self.family]
        if any(not each.prefixlen for each in ranges):
            return []
        if any(ipaddress.ip_address(node_ip) in each for each in ranges):
            ranges += map(ipaddress.ip_network, self.balancers)
        return ranges


_Claim = tuple[_Port, str]
"""A service port, and what the address is to it."""


class Setting(NamedTuple):
    """How node1 is configured."""

    config: dict[str, Any] = {}  # noqa: RUF012  # nobody writes to it
    """A fragment of KubeProxyConfiguration that makes it so."""
    masquerade_all: bool = False
    knows_pods: bool = True
    node_port_addresses: tuple[str, ...] = ()
    """Empty: those of the mode."""


SETTINGS = (
    Setting(),
    Setting({"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "pod-"}}),
    Setting({"clusterCIDR": ""}, knows_pods=False),
    Setting({section: {"masqueradeAll": True} for section in ("iptables", "nftables")}, masquerade_all=True),
    Setting(
        {"nodePortAddresses": ["192.168.99.0/24", "fd00:50::/64"]},
        node_port_addresses=("192.168.99.11", "fd00:50::11"),
    ),
)


class Reference:
    """node1 and what it is to do."""

    def __init__(self, objects: Iterable[Manifest], mode: str, setting: Setting = SETTINGS[0]) -> None:
        """With objects, in a mode: nftables, ipvs, userspace or iptables."""
        self._setting = setting
        self._nftables, self._ipvs, self._relayed = (mode == each for each in ("nftables", "ipvs", "userspace"))
        self._ranges_first = self._nftables or self._ipvs  # NFT-11, IPVS-16
        self._hairpin_everywhere = not (self._nftables or self._ipvs)  # TRF-7
        every = list(objects)
        services = [each for each in every if each["kind"] == "Service"]
        slices = [each for each in every if each["kind"] == "EndpointSlice"]
        services.sort(key=_precedence)
        self._ports = [
            _Port(service, port, family, list(_endpoints(service, port, family, slices)))
            for service in services
            for family in (4, 6)
            for port in service["spec"]["ports"]
        ]

    def frontends(self) -> Iterator[tuple[str, int, str]]:
        """Addresses, ports and protocols that anybody claims; node ports at an address that answers and one more."""
        for each in self._ports:
            number, protocol = each.port["port"], each.port["protocol"]
            for address in (*each.cluster_ip, *each.external_ips, *each.balancers):
                yield address, number, protocol
            if (node_port := each.port.get("nodePort")) and each.cluster_ip:
                own = plan.NODE1.ipv4 if each.family == 4 else plan.NODE1.ipv6
                yield own[0], node_port, protocol
                yield own[2], node_port, protocol

    def sticky(self, asked: Asked) -> bool:
        """Whether a client keeps its backend."""
        port, _ = next((claim for claim in self._claims(asked) if self._offer(*claim, asked.source)[0]), (None, ""))
        return port is not None and port.spec["sessionAffinity"] == "ClientIP"

    def answer(self, asked: Asked) -> Answer:
        """What becomes of a packet."""
        claims = list(self._claims(asked))
        if any(kind == "LoadBalancer" and self._shut_out(port, asked.source) for port, kind in claims):
            return "dropped"
        return self._served(claims, asked) or self._refused(claims, asked) or self._beside(asked)

    def _served(self, claims: list[_Claim], asked: Asked) -> dict[str, str]:
        """What the backends see that the packet may come to; nothing where there are none."""
        for port, kind in claims:
            used, sees = self._offer(port, kind, asked.source)
            if used:
                sees = "masqueraded" if self._relayed else sees
                return {each: self._seen(port, each, sees, asked.source) for each in used}
            if port.any and kind != "ClusterIP":
                break  # policy Local keeps the packet; else nothing is translated, and a node port is asked (NFT-28)
        return {}

    def _refused(self, claims: list[_Claim], asked: Asked) -> str:
        """What is done to a packet that finds a frontend and no backend (SEL-11)."""
        for port, kind in claims:
            if not port.any:
                return "refused"
            if not self._offer(port, kind, asked.source)[0]:
                return "dropped"
        return ""

    def _beside(self, asked: Asked) -> str:
        """What is done to a packet that no frontend is for."""
        if self._nftables and asked.address not in plan.NODE1.addresses:  # NFT-20
            if any(self._has_cluster_ip(port, asked) for port in self._ports):
                return "refused"
            if _is_in(asked.address, _SERVICES):
                return "dropped"
        return "refused" if self.is_bound(asked.address) else "untouched"  # IPVS-27, TRF-13

    def serving(self, asked: Asked) -> set[str] | None:
        """Who serves a frontend, whether new connections come to them or not (CT-2); None: there is no frontend."""
        for port, _ in self._claims(asked):
            return {each.name for each in port.endpoints if each.ready or each.serving}
        return None

    def is_bound(self, address: str) -> bool:
        """Whether it is an address of the node because a Service has it (IPVS-7), or because the mode is userspace."""
        if not (self._ipvs or self._relayed) or address in plan.NODE1.addresses:
            return False
        if self._relayed and _is_in(address, _SERVICES):
            return True
        served = (port for port in self._ports if port.cluster_ip)
        return address in (each for port in served for each in (*port.cluster_ip, *port.external_ips, *port.balancers))

    def _has_cluster_ip(self, port: _Port, asked: Asked) -> bool:
        """Whether the address is a service port's ClusterIP, which no older Service has taken from it."""
        if asked.address not in port.cluster_ip:
            return False
        frontend = asked._replace(port=port.port["port"], protocol=port.port["protocol"])
        return next(self._claims(frontend)) == (port, "ClusterIP")

    def _claims(self, asked: Asked) -> Iterator[_Claim]:
        """Who has the address, and then who has the node port."""
        family = ipaddress.ip_address(asked.address).version
        ports = [
            each
            for each in self._ports
            if each.family == family and each.cluster_ip and each.port["protocol"] == asked.protocol
        ]
        claims = (
            (port, kind)
            for service in dict.fromkeys(id(port.service) for port in ports)
            for kind in ("ClusterIP", "LoadBalancer", "ExternalIP")
            for port in ports
            if id(port.service) == service and port.port["port"] == asked.port
            if asked.address
            in {"ClusterIP": port.cluster_ip, "LoadBalancer": port.balancers, "ExternalIP": port.external_ips}[kind]
        )
        yield from list(claims)[:1]
        own = plan.NODE1.ipv4 if family == 4 else plan.NODE1.ipv6
        if asked.address in (self._setting.node_port_addresses or (own[:1] if self._nftables else own)):  # NFT-24
            yield from [(port, "NodePort") for port in ports if port.port.get("nodePort") == asked.port][:1]

    def _shut_out(self, port: _Port, source: str) -> bool:
        """Whether source ranges do not admit somebody (TRF-17)."""
        if not (port.any or self._ranges_first):
            return False
        ranges = port.ranges((plan.NODE1.ipv4 if port.family == 4 else plan.NODE1.ipv6)[0])
        return bool(ranges) and not _is_in(source, ranges)

    def _offer(self, port: _Port, kind: str, source: str) -> tuple[set[str], str]:
        """The backends that a source is offered, and what they see of it."""
        known = self._setting.knows_pods
        pod = known and _is_in(source, _PODS)
        if kind == "ClusterIP":  # TRF-6
            kept = not self._setting.masquerade_all and (pod or not known) and not self.is_bound(source)
            return (port.local if port.internal_local else port.cluster), "kept" if kept else "masqueraded"
        if not port.external_local:
            return port.cluster, "masqueraded"  # TRF-5
        if pod:
            return port.cluster, "kept"  # TRF-4
        if source in plan.NODE1.addresses or self.is_bound(source):
            return port.cluster, "masqueraded"
        return port.local, "kept"

    def _seen(self, port: _Port, backend: str, sees: str, source: str) -> str:
        for each in port.endpoints:
            if each.name == backend and each.address == source and (each.local or self._hairpin_everywhere):
                return "masqueraded"
        return sees


def _precedence(service: Manifest) -> tuple[bool, str, str]:
    created = service["metadata"].get("creationTimestamp", "")
    return not created, created, service["metadata"]["name"]


def _endpoints(service: Manifest, port: dict[str, Any], family: int, slices: list[Manifest]) -> Iterator[_Endpoint]:
    """The endpoints of a service port (EPS-6 to EPS-10)."""
    found: dict[str, _Endpoint] = {}
    for each in sorted(slices, key=lambda one: str(one["metadata"]["name"])):
        if each["metadata"]["labels"]["kubernetes.io/service-name"] != service["metadata"]["name"]:
            continue
        if each["addressType"] != f"IPv{family}":
            continue
        for endpoint in each["endpoints"]:
            for own in each["ports"]:
                if own.get("name") != port["name"] or own["protocol"] != port["protocol"] or not own.get("port"):
                    continue
                states = endpoint.get("conditions", {})
                hints = endpoint.get("hints", {})
                made = _Endpoint(
                    endpoint["addresses"][0],
                    own["port"],
                    endpoint.get("nodeName") == _NODE,
                    states.get("ready") is not False,
                    states.get("serving") is not False,
                    states.get("terminating") is True,
                    frozenset(hint["name"] for hint in hints.get("forZones", ())),
                    frozenset(hint["name"] for hint in hints.get("forNodes", ())),
                )
                if not made.terminating or made.name not in found:
                    found[made.name] = made
    yield from found.values()


def _is_in(address: str, networks: Iterable[_Network]) -> bool:
    packed = ipaddress.ip_address(address)
    return any(packed in each for each in networks if each.version == packed.version)
