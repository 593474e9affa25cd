"""Objects of the stand-in API server as a server of Kubernetes 1.20 shows them, for a kube-proxy of that time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.fakes.apirequests import Version
from tests.fakes.apistore import Object

_HOSTNAME, _ZONE = "kubernetes.io/hostname", "topology.kubernetes.io/zone"


def endpoint_slice_v1beta1(value: Object) -> Object:
    """An EndpointSlice of discovery.k8s.io/v1 as one of v1beta1: node and zone are keys of the topology there."""
    value = {**value, "apiVersion": "discovery.k8s.io/v1beta1"}
    if value.get("endpoints"):
        value["endpoints"] = [_endpoint(each) for each in value["endpoints"]]
    return value


def _endpoint(value: Object) -> Object:
    topology = dict(value.get("deprecatedTopology") or {})
    for field, key in (("nodeName", _HOSTNAME), ("zone", _ZONE)):
        if value.get(field):
            topology[key] = value[field]
    left_out = {"deprecatedTopology", "nodeName", "zone", "hints"}
    return {**{key: value[key] for key in value if key not in left_out}, "topology": topology}


OLDER: Mapping[Version, Callable[[Object], Object]] = {
    ("discovery.k8s.io", "v1beta1", "endpointslices"): endpoint_slice_v1beta1,
    ("", "v1", "events"): lambda value: value,
}
"""What a kube-proxy of 1.20 asks for, the Services and Nodes aside, which are what they were."""
