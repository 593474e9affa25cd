"""The objects of a large cluster, as an API server and kubectl print them.

Services are numbered from 0; each has a ClusterIP, a port and one slice.  The objects carry what real ones carry and
Sluice throws away (managedFields, uids), as reading past it is part of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from rules.forwarding import Backend, format_address

NODE = "node1"
NODE_ADDRESS = "192.0.2.1"
CLUSTER_IPS = "10.96.0.0/12"
PODS = "10.128.0.0/9"
PORT = 80
TARGET_PORT = 8080

_FIRST_CLUSTER_IP = 10 << 24 | 96 << 16
_FIRST_POD = 10 << 24 | 128 << 16
_SPARE_POD = 10 << 24 | 192 << 16
_CREATED = "2026-01-01T00:00:00Z"
_NODES = 500
"""Endpoints are spread over so many nodes, of which ours is one."""


def _address(number: int) -> str:
    return format_address(number.to_bytes(4))


def spare_pod(number: int) -> str:
    """An address that no endpoint has at first."""
    return _address(_SPARE_POD + number)


class Cluster(NamedTuple):
    """Services that are all alike."""

    services: int
    endpoints: int
    """Of each Service."""
    sticky: int = 0
    """Every so many-th Service has session affinity; 0: none."""

    def __str__(self) -> str:
        some = f", 1 in {self.sticky} with affinity" if self.sticky else ""
        return f"{self.services:,} x {self.endpoints}{some}"

    def cluster_ip(self, number: int) -> str:
        return _address(_FIRST_CLUSTER_IP + 1 + number)

    def pods(self, number: int) -> list[str]:
        """The addresses of a Service's endpoints, as they are at first."""
        first = _FIRST_POD + 1 + number * self.endpoints
        return [_address(first + index) for index in range(self.endpoints)]

    def backends(self, number: int) -> frozenset[Backend]:
        """The same as a table has them."""
        first = _FIRST_POD + 1 + number * self.endpoints
        return frozenset(Backend((first + index).to_bytes(4), TARGET_PORT) for index in range(self.endpoints))

    def service(self, number: int) -> bytes:
        """A Service, as JSON."""
        affinity: dict[str, Any] = {"sessionAffinity": "None"}
        if self.sticky and number % self.sticky == 0:
            affinity = {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
            }
        ip = self.cluster_ip(number)
        return msgspec.json.encode(
            {
                "kind": "Service",
                "apiVersion": "v1",
                "metadata": {
                    **_metadata(f"service-{number}", {"app": f"service-{number}"}, number + 1),
                    "managedFields": _managed("v1", _SERVICE_FIELDS),
                },
                "spec": {
                    "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": TARGET_PORT}],
                    "selector": {"app": f"service-{number}"},
                    "clusterIP": ip,
                    "clusterIPs": [ip],
                    "type": "ClusterIP",
                    **affinity,
                    "ipFamilies": ["IPv4"],
                    "ipFamilyPolicy": "SingleStack",
                    "internalTrafficPolicy": "Cluster",
                },
                "status": {"loadBalancer": {}},
            }
        )

    def slice(self, number: int, pods: list[str] | None = None, version: int = 0) -> bytes:
        """The slice of a Service as JSON; `pods` are its endpoints' addresses, if they are others than at first."""
        name = f"service-{number}"
        owner = {
            "apiVersion": "v1",
            "kind": "Service",
            "name": name,
            "uid": _uid(number),
            "controller": True,
            "blockOwnerDeletion": True,
        }
        labels = {
            "app": name,
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": name,
        }
        return msgspec.json.encode(
            {
                "kind": "EndpointSlice",
                "apiVersion": "discovery.k8s.io/v1",
                "metadata": {
                    **_metadata(f"{name}-abcde", labels, version or number + 1),
                    "generateName": f"{name}-",
                    "generation": 1,
                    "ownerReferences": [owner],
                    "managedFields": _managed("discovery.k8s.io/v1", _SLICE_FIELDS),
                },
                "addressType": "IPv4",
                "endpoints": [
                    _endpoint(name, number * self.endpoints + index, pod)
                    for index, pod in enumerate(pods or self.pods(number))
                ],
                "ports": [{"name": "http", "protocol": "TCP", "port": TARGET_PORT}],
            }
        )

    def all_services(self) -> Iterator[bytes]:
        return map(self.service, range(self.services))

    def all_slices(self) -> Iterator[bytes]:
        return map(self.slice, range(self.services))


def node() -> bytes:
    """The Node that the agent runs on."""
    return msgspec.json.encode(
        {
            "kind": "Node",
            "apiVersion": "v1",
            "metadata": _metadata(NODE, {"topology.kubernetes.io/zone": "zone-a"}, 1, namespace=None),
            "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": NODE_ADDRESS}]},
        }
    )


def _endpoint(service: str, number: int, pod: str) -> dict[str, Any]:
    return {
        "addresses": [pod],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "targetRef": {"kind": "Pod", "namespace": "default", "name": f"{service}-{number}", "uid": _uid(number)},
        "nodeName": f"node{number % _NODES + 1}",
        "zone": "zone-a",
    }


def _metadata(name: str, labels: dict[str, str], version: int, namespace: str | None = "default") -> dict[str, Any]:
    where = {"namespace": namespace} if namespace else {}
    return {
        "name": name,
        **where,
        "uid": _uid(version),
        "resourceVersion": str(version),
        "creationTimestamp": _CREATED,
        "labels": labels,
    }


def _uid(number: int) -> str:
    return f"c77714d0-9518-454a-ac28-{number:012x}"


def _managed(version: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "manager": "kube-controller-manager",
            "operation": "Update",
            "apiVersion": version,
            "time": _CREATED,
            "fieldsType": "FieldsV1",
            "fieldsV1": fields,
        }
    ]


_SERVICE_FIELDS = {
    "f:metadata": {"f:labels": {".": {}, "f:app": {}}},
    "f:spec": {
        "f:internalTrafficPolicy": {},
        "f:ports": {".": {}, 'k:{"port":80,"protocol":"TCP"}': {".": {}, "f:name": {}, "f:port": {}}},
        "f:selector": {},
        "f:sessionAffinity": {},
        "f:type": {},
    },
}
_SLICE_FIELDS: dict[str, Any] = {
    "f:addressType": {},
    "f:endpoints": {},
    "f:metadata": {
        "f:generateName": {},
        "f:labels": {
            ".": {},
            "f:app": {},
            "f:endpointslice.kubernetes.io/managed-by": {},
            "f:kubernetes.io/service-name": {},
        },
        "f:ownerReferences": {".": {}, 'k:{"uid":"c77714d0-9518-454a-ac28-000000000000"}': {}},
    },
    "f:ports": {},
}
