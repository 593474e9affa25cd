"""Kubernetes objects in few words, as the tests of the pure parts need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxy.compute import View, semantics_of
from proxy.objects import SERVICE_NAME_LABEL, EndpointSlice, Node, Service, convert
from rules.forwarding import Backend, Endpoint, Family, Frontend, Prefix, Protocol, parse_address, parse_prefix

NODE = "test-node"
OTHER = "other-node"


def view(mode: str = "nftables", **fields: Any) -> View:
    """The node of section 11 of the behaviour document."""
    values: dict[str, Any] = {
        "node_name": NODE,
        "node_ips": {Family.IPV4: parse_address("192.168.0.2"), Family.IPV6: parse_address("2001:db8::1")},
        "semantics": semantics_of(mode),
    }
    return View(**(values | fields))


def service(
    name: str = "svc",
    *,
    cluster_ip: str | Sequence[str] = "172.30.0.41",
    ports: Sequence[Mapping[str, Any]] = ({"port": 80},),
    vips: Sequence[str | Mapping[str, Any]] = (),
    labels: Mapping[str, str] | None = None,
    created: str = "",
    **spec: Any,
) -> Service:
    """A Service; `spec` in the API's own words, `vips` as the status of its load balancer."""
    ips = [cluster_ip] if isinstance(cluster_ip, str) else list(cluster_ip)
    return convert(
        Service,
        {
            "metadata": {"namespace": "ns", "name": name, "labels": dict(labels or {}), "creationTimestamp": created},
            "spec": {
                "clusterIP": ips[0],
                "clusterIPs": ips,
                "ipFamilies": ["IPv6" if ":" in ip else "IPv4" for ip in ips if ip != "None"],
                "ports": [dict(port) for port in ports],
                **spec,
            },
            "status": {
                "loadBalancer": {"ingress": [{"ip": vip} if isinstance(vip, str) else dict(vip) for vip in vips]}
            },
        },
    )


def endpoint(
    address: str,
    where: str | None = OTHER,
    condition: str = "R",
    *,
    zones: Sequence[str] = (),
    nodes: Sequence[str] = (),
) -> dict[str, Any]:
    """An endpoint of a slice, on a node, in a condition of section 11: R ready, ST serving and terminating,
    T terminating only, N not ready, P (publishes not-ready addresses) ready and terminating."""
    conditions = {
        "R": {"ready": True, "serving": True, "terminating": False},
        "ST": {"ready": False, "serving": True, "terminating": True},
        "T": {"ready": False, "serving": False, "terminating": True},
        "N": {"ready": False, "serving": False, "terminating": False},
        "P": {"ready": True, "serving": True, "terminating": True},
        "": {},
    }[condition]
    hints = {"forZones": [{"name": zone} for zone in zones], "forNodes": [{"name": node} for node in nodes]}
    return {"addresses": [address], "nodeName": where, "conditions": conditions, "hints": hints}


def endpoint_slice(
    endpoints: Sequence[Mapping[str, Any]] = (),
    *,
    name: str = "svc-1",
    owner: str = "svc",
    ports: Sequence[Mapping[str, Any]] = ({"name": "", "port": 80},),
    address_type: str = "IPv4",
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> EndpointSlice:
    return convert(
        EndpointSlice,
        {
            "metadata": {
                "namespace": "ns",
                "name": name,
                "labels": {SERVICE_NAME_LABEL: owner, **(labels or {})},
                "annotations": dict(annotations or {}),
            },
            "addressType": address_type,
            "ports": [dict(port) for port in ports],
            "endpoints": [dict(each) for each in endpoints],
        },
    )


def node(name: str = NODE, **fields: Any) -> Node:
    """A Node; `labels`, `addresses` as {type: [address, ...]}, `pod_cidrs`, `taints`, `deleted`."""
    addresses = [
        {"type": kind, "address": address} for kind, texts in fields.get("addresses", {}).items() for address in texts
    ]
    return convert(
        Node,
        {
            "metadata": {
                "name": name,
                "labels": fields.get("labels", {}),
                "deletionTimestamp": "2024-01-01T00:00:00Z" if fields.get("deleted") else None,
            },
            "spec": {
                "podCIDRs": list(fields.get("pod_cidrs", ())),
                "taints": [{"key": key, "effect": "NoSchedule"} for key in fields.get("taints", ())],
            },
            "status": {"addresses": addresses},
        },
    )


def at(text: str, protocol: Protocol = Protocol.TCP) -> Frontend:
    """`address:port`, or `*:port` for a node port."""
    host, _, port = text.rpartition(":")
    return Frontend(b"" if host == "*" else parse_address(host.strip("[]")), protocol, int(port))


def backends(*texts: str, port: int = 80) -> frozenset[Backend]:
    """Addresses, with a port of their own after a blank (`10.0.0.1 8080`) or with `port`."""
    return frozenset(
        Backend(parse_address(address), int(own or port)) for address, _, own in (text.partition(" ") for text in texts)
    )


def endpoints(*texts: str, port: int = 80, protocol: Protocol = Protocol.TCP) -> frozenset[Endpoint]:
    return frozenset(Endpoint(backend.address, protocol, backend.port) for backend in backends(*texts, port=port))


def networks(*texts: str) -> tuple[Prefix, ...]:
    return tuple(parse_prefix(text) for text in texts)
