"""The Kubernetes objects that Sluice reads: of each, the fields that matter, decoded one by one.

An object is decoded from JSON bytes (API server) or from plain values (YAML manifests) into frozen structs that
mirror the API's own shape, so that a clause such as SVC-9 can be read beside the code.  Unknown fields are passed
over.  Absent and `null` mean the same, as they do to the API's Go types.  Whatever a field holds beyond its type
(addresses, prefixes) is text here: `proxy.compute` parses it, leniently where kube-proxy does.

Equality of two objects means equality of what matters, not of `resourceVersion` or `managedFields`.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

import msgspec
from msgspec.structs import force_setattr as _set


class ObjectError(Exception):
    """An object cannot be used; the message says which field is wrong, in the API's terms."""


class Key(NamedTuple):
    """The name of an object within its resource; cluster-scoped objects have an empty namespace."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class _Part(msgspec.Struct, frozen=True, rename="camel", gc=False, omit_defaults=True):
    """A part of an object."""


class Metadata(_Part, frozen=True):
    name: str = ""
    namespace: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: str = ""
    """RFC 3339 in UTC with a `Z`, as API servers print it: as text it sorts like the time."""
    deletion_timestamp: str = ""


class _Object(_Part, frozen=True):
    metadata: Metadata = Metadata()

    @property
    def key(self) -> Key:
        return Key(self.metadata.namespace, self.metadata.name)


# --- Service -----------------------------------------------------------------------------------------------

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
OptionalPort = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""A port, or 0 for none."""


class ServicePort(_Part, frozen=True):
    port: Port
    name: str = ""
    protocol: str = "TCP"
    node_port: OptionalPort = 0


class ClientIPConfig(_Part, frozen=True):
    timeout_seconds: int = 10800


class SessionAffinityConfig(_Part, frozen=True):
    # "clientIP" is what the API calls it; camel case would say "clientIp".
    client_ip: ClientIPConfig = msgspec.field(default=ClientIPConfig(), name="clientIP")


class ServiceSpec(_Part, frozen=True):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: tuple[str, ...] = msgspec.field(default=(), name="clusterIPs")
    ip_families: tuple[str, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    selector: dict[str, str] = {}
    external_ips: tuple[str, ...] = msgspec.field(default=(), name="externalIPs")
    load_balancer_source_ranges: tuple[str, ...] = ()
    health_check_node_port: OptionalPort = 0
    external_traffic_policy: str = ""
    internal_traffic_policy: str = ""
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig = SessionAffinityConfig()


class LoadBalancerIngress(_Part, frozen=True):
    ip: str = ""
    ip_mode: str = ""


class LoadBalancerStatus(_Part, frozen=True):
    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(_Part, frozen=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(_Object, frozen=True):
    """core/v1 Service."""

    KIND: ClassVar[str] = "Service"
    API_VERSION: ClassVar[str] = "v1"

    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()


# --- EndpointSlice, and Endpoints where a manifest directory has them ----------------------------------------


class Conditions(_Part, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(_Part, frozen=True):
    name: str = ""


class Hints(_Part, frozen=True):
    for_zones: tuple[Hint, ...] = ()
    for_nodes: tuple[Hint, ...] = ()


class SliceEndpoint(_Part, frozen=True):
    addresses: tuple[str, ...] = ()
    conditions: Conditions = Conditions()
    hints: Hints = Hints()
    node_name: str = ""
    zone: str = ""


class SlicePort(_Part, frozen=True):
    name: str | None = None
    protocol: str = "TCP"
    port: OptionalPort | None = None


SERVICE_NAME_LABEL = "kubernetes.io/service-name"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
ZONE_LABEL = "topology.kubernetes.io/zone"
TRIGGER_TIME_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
STALE_TCP_ANNOTATION = "sluice.internal/stale-tcp-flows"
"""On a Service: `delete-unanswered` has connections that nobody has answered forget an endpoint that is gone."""
SCHEDULER_ANNOTATION = "sluice.internal/scheduler"
"""On a Service: how its backends are chosen, by one of `rules.forwarding.SCHEDULERS`."""
PROXY_PROTOCOL_ANNOTATION = "sluice.internal/proxy-protocol"
"""On a Service: `v2` has its backends told the client's address in a header of the PROXY protocol."""


class EndpointSlice(_Object, frozen=True):
    """discovery.k8s.io/v1 EndpointSlice."""

    KIND: ClassVar[str] = "EndpointSlice"
    API_VERSION: ClassVar[str] = "discovery.k8s.io/v1"

    address_type: str = ""
    endpoints: tuple[SliceEndpoint, ...] = ()
    ports: tuple[SlicePort, ...] = ()

    @property
    def service(self) -> Key | None:
        """The Service that owns the slice (EPS-2), or None when the slice doesn't name one."""
        name = self.metadata.labels.get(SERVICE_NAME_LABEL, "")
        return Key(self.metadata.namespace, name) if name and self.metadata.namespace else None


def by_service(slices: Iterable[EndpointSlice]) -> dict[Key, tuple[EndpointSlice, ...]]:
    """The slices of each Service that any names as its owner (EPS-2)."""
    found: dict[Key, list[EndpointSlice]] = defaultdict(list)
    for each in slices:
        if each.service is not None:
            found[each.service].append(each)
    return {key: tuple(each) for key, each in found.items()}


class EndpointAddress(_Part, frozen=True):
    ip: str = ""
    hostname: str = ""
    node_name: str = ""


class EndpointPort(_Part, frozen=True):
    port: OptionalPort = 0
    name: str = ""
    protocol: str = "TCP"


class EndpointSubset(_Part, frozen=True):
    addresses: tuple[EndpointAddress, ...] = ()
    not_ready_addresses: tuple[EndpointAddress, ...] = ()
    ports: tuple[EndpointPort, ...] = ()


class Endpoints(_Object, frozen=True):
    """core/v1 Endpoints: read from manifests only, and mirrored to slices there."""

    KIND: ClassVar[str] = "Endpoints"
    API_VERSION: ClassVar[str] = "v1"

    subsets: tuple[EndpointSubset, ...] = ()


# --- Node and ServiceCIDR ------------------------------------------------------------------------------------


class Taint(_Part, frozen=True):
    key: str = ""


class NodeSpec(_Part, frozen=True):
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: tuple[str, ...] = msgspec.field(default=(), name="podCIDRs")
    taints: tuple[Taint, ...] = ()


class NodeAddress(_Part, frozen=True):
    type: str = ""
    address: str = ""


class NodeStatus(_Part, frozen=True):
    addresses: tuple[NodeAddress, ...] = ()


class Node(_Object, frozen=True):
    """core/v1 Node."""

    KIND: ClassVar[str] = "Node"
    API_VERSION: ClassVar[str] = "v1"

    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class ServiceCIDRSpec(_Part, frozen=True):
    cidrs: tuple[str, ...] = ()


class ServiceCIDR(_Object, frozen=True):
    """networking.k8s.io/v1 ServiceCIDR."""

    KIND: ClassVar[str] = "ServiceCIDR"
    API_VERSION: ClassVar[str] = "networking.k8s.io/v1"

    spec: ServiceCIDRSpec = ServiceCIDRSpec()


Object = Service | EndpointSlice | Endpoints | Node | ServiceCIDR
KINDS: tuple[type[Object], ...] = (Service, EndpointSlice, Endpoints, Node, ServiceCIDR)

T = TypeVar("T", bound=_Object)

_DECODERS: Mapping[type[_Object], msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(kind) for kind in KINDS}

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def decode_json(kind: type[T], data: bytes | msgspec.Raw) -> T:
    """An object of `kind` from its JSON.

    Raises:
        ObjectError: it is no JSON, or a field has another type than the API gives it.
    """
    try:
        value: T = _DECODERS[kind].decode(data)
    except msgspec.ValidationError as error:
        # A null where a value is due is as good as nothing there (a slice without endpoints says `endpoints: null`),
        # which the structs don't say.  Such objects are few, so they alone pay for the second pass.
        try:
            plain = msgspec.json.decode(data)
        except (ValueError, RecursionError):
            raise ObjectError(_explain(error)) from None
        return convert(kind, plain)
    except (ValueError, RecursionError) as error:
        raise ObjectError(_explain(error)) from None
    return _slimmed(value)


def convert(kind: type[T], value: Any) -> T:
    """An object of `kind` from plain values, as a YAML parser returns them.

    Raises:
        ObjectError: a field has another type than the API gives it.
    """
    try:
        try:
            return _slimmed(msgspec.convert(value, kind))
        except msgspec.ValidationError:
            return _slimmed(msgspec.convert(_without_nulls(value), kind))
    except (ValueError, TypeError, RecursionError) as error:
        raise ObjectError(_explain(error)) from None


def _without_nulls(value: Any) -> Any:
    """`value` without the fields that are null, at any depth.  Null items of lists stay: they are no absence."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


_WHERE = re.compile(r"(?P<what>.*?) - at (?P<key>key in )?\$\.?(?P<path>.*)", re.DOTALL)


def _explain(error: Exception) -> str:
    """One line that names the field as the API does: `spec.ports[0].port: expected int, got str`."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeError):
        return "not UTF-8"
    text = str(error).replace("`", "").replace("Object missing required field", "missing")
    found = _WHERE.match(text)
    what, path = (found["what"], found["path"]) if found else (text, "")
    if not what.startswith("JSON"):
        what = what[:1].lower() + what[1:]
    if found and found["key"]:
        what = f"a key: {what}"
    return f"{path}: {what}" if path else what


_LABELS = frozenset({SERVICE_NAME_LABEL, PROXY_NAME_LABEL, HEADLESS_LABEL})
"""The labels of Services and slices that anything here depends on; controllers and people write many more."""
_OWN_ANNOTATIONS = "sluice.internal/"
_NOTHING: dict[str, str] = {}
_CONDITIONS = {
    states: Conditions(*states)
    for states in itertools.product((None, False, True), repeat=len(Conditions.__struct_fields__))
}


def _slimmed(value: T) -> T:
    """The same object with less memory: what nobody reads is gone, and what thousands of objects repeat is there once.

    A change of nothing but that is then no change (SVC-14, EPS-4).  The structs are still ours alone here, so that
    setting their fields is no change of anybody's.
    """
    metadata = value.metadata
    _set(metadata, "namespace", sys.intern(metadata.namespace))
    if isinstance(value, Service):
        _slim_metadata(metadata)
        spec = value.spec
        for field in ("type", "session_affinity", "internal_traffic_policy", "external_traffic_policy"):
            _set(spec, field, sys.intern(getattr(spec, field)))
        _set(spec, "ip_families", _interned(spec.ip_families))
        if spec.cluster_ips[:1] == (spec.cluster_ip,):
            _set(spec, "cluster_ips", (spec.cluster_ip, *spec.cluster_ips[1:]))
        for port in spec.ports:
            _set(port, "name", sys.intern(port.name))
            _set(port, "protocol", sys.intern(port.protocol))
    elif isinstance(value, EndpointSlice):
        _slim_metadata(metadata)
        _set(metadata, "creation_timestamp", "")
        _set(value, "address_type", sys.intern(value.address_type))
        for each in value.ports:
            _set(each, "name", each.name and sys.intern(each.name))
            _set(each, "protocol", sys.intern(each.protocol))
        for endpoint in value.endpoints:
            conditions = endpoint.conditions
            _set(
                endpoint,
                "conditions",
                _CONDITIONS[conditions.ready, conditions.serving, conditions.terminating],
            )
            _set(endpoint, "node_name", sys.intern(endpoint.node_name))
            _set(endpoint, "zone", sys.intern(endpoint.zone))
    else:
        # A second copy of the whole object.
        metadata.annotations.pop(_LAST_APPLIED, None)
    return value


def _slim_metadata(metadata: Metadata) -> None:
    labels = {name: metadata.labels[name] for name in _LABELS if name in metadata.labels}
    annotations = {
        name: text
        for name, text in metadata.annotations.items()
        if name == TRIGGER_TIME_ANNOTATION or name.startswith(_OWN_ANNOTATIONS)
    }
    _set(metadata, "labels", labels or _NOTHING)
    _set(metadata, "annotations", annotations or _NOTHING)


@functools.lru_cache(64)
def _interned(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(sys.intern, texts))
