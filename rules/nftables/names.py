"""The names of the layout's sets and maps, each with what it is for."""

from __future__ import annotations

CLUSTER_IP = "cluster-ip"
"""Frontend of a ClusterIP → list and count, by internal traffic policy."""
EXTERNAL = "external"
"""Frontend of an externalIP or load balancer address → the list of policy Cluster."""
EXTERNAL_LOCAL = "external-local"
"""The same → the list of policy Local; no element: no endpoint is here."""
EXTERNAL_POLICY_LOCAL = "external-policy-local"
"""Frontends of external under policy Local."""
EXTERNAL_IPS = "external-ips"
"""Frontends that are externalIPs; no rule uses it, it lets `read` tell kinds apart."""
LOAD_BALANCER_IPS = "load-balancer-ips"
"""Frontends that are load balancer addresses; no rule uses it either."""
NODE_PORT = "node-port"
"""Protocol and node port → the list of policy Cluster."""
NODE_PORT_LOCAL = "node-port-local"
"""The same → the list of policy Local."""
NODE_PORT_POLICY_LOCAL = "node-port-policy-local"
"""Node ports under policy Local."""
NODE_PORT_ADDRESSES = "node-port-addresses"
"""The addresses that answer node ports, where not all of the node's do."""

ENDPOINTS_TCP = "endpoints-tcp"
"""List and index → backend, of lists without affinity."""
ENDPOINTS_UDP = "endpoints-udp"
ENDPOINTS_SCTP = "endpoints-sctp"
MEMBERS = "members"
"""List and index → slot, of lists with affinity: indexes move, slots never do."""
SLOTS = "slots"
"""Slot → backend."""
STICKY = "sticky"
"""List and hash of the client → slot; written by the kernel."""
LOCAL_ENDPOINT_PAIRS = "local-endpoint-pairs"
"""Endpoints that are masqueraded when they reach themselves."""

CLUSTER_IPS = "cluster-ips"
"""All ClusterIPs: their other ports are closed."""
SERVICE_CIDRS = "service-cidrs"
"""Networks of ClusterIPs: addresses in them that no Service has are dropped."""
REJECT_FRONTENDS = "reject-frontends"
DROP_FRONTENDS = "drop-frontends"
REJECT_NODE_PORTS = "reject-node-ports"
DROP_NODE_PORTS = "drop-node-ports"
SOURCE_RANGED = "source-ranged"
"""Frontends that admit only the sources in source-ranges-N."""

_AFFINITY = "affinity-"
_SOURCE_RANGES = "source-ranges-"


def affinity(timeout: int) -> str:
    """The set of the lists whose clients keep their backend for `timeout` seconds."""
    return f"{_AFFINITY}{timeout}"


def source_ranges(length: int) -> str:
    """The set of the admitted sources whose prefixes have `length` bits."""
    return f"{_SOURCE_RANGES}{length}"


def affinity_timeout(name: str) -> int | None:
    """The timeout of an affinity set by its name; None for other names."""
    return _number(name, _AFFINITY)


def source_ranges_length(name: str) -> int | None:
    """The prefix length of a set of admitted sources by its name; None for other names."""
    return _number(name, _SOURCE_RANGES)


def _number(name: str, prefix: str) -> int | None:
    tail = name.removeprefix(prefix)
    return int(tail) if tail != name and tail.isascii() and tail.isdigit() else None
