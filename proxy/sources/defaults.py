"""What an API server adds to an object when it stores one, for objects that never met an API server.

A manifest as a person writes it leaves out what kube-proxy then reads: which families a ClusterIP is of (SVC-5), the
empty name of an unnamed slice port (EPS-6).  Objects that kubectl printed have all of it, and come out as they are.
Nothing is allocated: a Service without a ClusterIP keeps none, and `unallocated` says so.
"""

from __future__ import annotations

import msgspec

from proxy.addresses import lenient_address
from proxy.objects import PROXY_NAME_LABEL, EndpointSlice, Object, Service, ServiceSpec
from rules.forwarding import family_of


def with_defaults(value: Object) -> Object:
    """The object as an API server would have stored it; the same one where nothing is to be added."""
    if isinstance(value, Service):
        spec = _with_families(value.spec)
        return value if spec is value.spec else msgspec.structs.replace(value, spec=spec)
    if isinstance(value, EndpointSlice) and any(port.name is None for port in value.ports):
        ports = tuple(port if port.name is not None else msgspec.structs.replace(port, name="") for port in value.ports)
        return msgspec.structs.replace(value, ports=ports)
    return value


def _with_families(spec: ServiceSpec) -> ServiceSpec:
    cluster_ip = spec.cluster_ip or (spec.cluster_ips[0] if spec.cluster_ips else "")
    if cluster_ip in ("", "None") or spec.type == "ExternalName":
        return spec
    cluster_ips = spec.cluster_ips or (cluster_ip,)
    families = spec.ip_families if len(spec.ip_families) >= len(cluster_ips) else _families(cluster_ips)
    if (cluster_ip, cluster_ips, families) == (spec.cluster_ip, spec.cluster_ips, spec.ip_families):
        return spec
    return msgspec.structs.replace(spec, cluster_ip=cluster_ip, cluster_ips=cluster_ips, ip_families=families)


def _families(addresses: tuple[str, ...]) -> tuple[str, ...]:
    """The family of each address; one that is no address counts as of the other's family, and compute names it."""
    found = []
    for address in addresses:
        try:
            found.append(family_of(lenient_address(address)).label)
        except ValueError:
            found.append("IPv6" if ":" in address else "IPv4")
    return tuple(found)


def unallocated(service: Service) -> str | None:
    """What an API server would have chosen for the Service and nobody has: the field and what to do, or None."""
    spec = service.spec
    if spec.type == "ExternalName" or PROXY_NAME_LABEL in service.metadata.labels or spec.cluster_ip == "None":
        return None
    if not spec.cluster_ip:
        return "spec.clusterIP: missing, and no API server is here to choose it: give an address, or None (headless)"
    if spec.type == "NodePort":
        for index, port in enumerate(spec.ports):
            if not port.node_port:
                return f"spec.ports[{index}].nodePort: missing, and no API server is here to choose it: give a port"
    return None
