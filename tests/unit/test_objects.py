"""Objects from JSON and from plain values."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.objects import (
    KINDS,
    Conditions,
    EndpointSlice,
    Key,
    Node,
    Object,
    ObjectError,
    Service,
    ServiceCIDR,
    convert,
    decode_json,
)
from tests.builders import endpoint, endpoint_slice


def of_both(kind: type[Object], value: Any) -> Object:
    """The object that both ways make of a value."""
    plain = convert(kind, value)
    assert decode_json(kind, msgspec.json.encode(value)) == plain
    return plain


def why(kind: type[Object], value: Any) -> str:
    """The error that both ways make of a value."""
    with pytest.raises(ObjectError) as plain:
        convert(kind, value)
    with pytest.raises(ObjectError) as wire:
        decode_json(kind, msgspec.json.encode(value))
    assert str(plain.value) == str(wire.value)
    return str(plain.value)


def test_a_service_has_its_fields_and_the_defaults_of_the_api() -> None:
    service = of_both(
        Service,
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "default", "uid": "u", "managedFields": [{}]},
            "spec": {
                "clusterIP": "10.0.0.1",
                "clusterIPs": ["10.0.0.1"],
                "externalIPs": ["1.2.3.4"],
                "ports": [{"port": 80, "targetPort": "http", "nodePort": 30080}],
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}},
                "healthCheckNodePort": 30000,
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "5.6.7.8", "ipMode": "VIP"}, {"hostname": "lb"}]}},
        },
    )
    assert isinstance(service, Service)
    assert service.key == Key("default", "web")
    assert service.spec.type == "ClusterIP"
    assert service.spec.cluster_ips == ("10.0.0.1",)
    assert service.spec.external_ips == ("1.2.3.4",)
    assert (service.spec.ports[0].protocol, service.spec.ports[0].node_port) == ("TCP", 30080)
    assert service.spec.session_affinity_config.client_ip.timeout_seconds == 7
    assert [each.ip for each in service.status.load_balancer.ingress] == ["5.6.7.8", ""]


def test_null_means_absent_at_any_depth() -> None:
    service = of_both(
        Service,
        {
            "metadata": {"name": "web", "creationTimestamp": None, "labels": None, "annotations": {"a": None}},
            "spec": {
                "clusterIP": None,
                "externalIPs": None,
                "sessionAffinityConfig": {"clientIP": None},
                "ports": [{"port": 80, "nodePort": None, "protocol": None}],
            },
            "status": None,
        },
    )
    assert service == of_both(Service, {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}})
    empty = of_both(EndpointSlice, {"metadata": {"name": "e"}, "endpoints": None, "ports": None})
    assert empty == of_both(EndpointSlice, {"metadata": {"name": "e"}})


def test_eps6_a_port_without_a_name_differs_from_one_with_an_empty_name() -> None:
    names = [port.name for port in endpoint_slice(ports=[{"port": 1}, {"name": None}, {"name": ""}]).ports]
    assert names == [None, None, ""]


def test_eps8_unknown_conditions_stay_unknown() -> None:
    assert endpoint_slice([endpoint("10.0.0.1", condition="")]).endpoints[0].conditions == Conditions()


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Service, {"spec": {"ports": [{"port": "80"}]}}, "spec.ports[0].port: expected int, got str"),
        (Service, {"spec": {"ports": [{"port": 80.5}]}}, "spec.ports[0].port: expected int, got float"),
        (Service, {"spec": {"ports": [{"port": 1}, {"port": 65536}]}}, "spec.ports[1].port: expected int <= 65535"),
        (Service, {"spec": {"ports": [{"port": 0}]}}, "spec.ports[0].port: expected int >= 1"),
        (Service, {"spec": {"ports": [{"name": "http"}]}}, "spec.ports[0]: missing port"),
        (Service, {"spec": {"ports": {}}}, "spec.ports: expected array, got object"),
        (Service, {"spec": {"ports": [None]}}, "spec.ports[0]: expected object, got null"),
        (Service, {"spec": {"healthCheckNodePort": -1}}, "spec.healthCheckNodePort: expected int >= 0"),
        (Service, {"metadata": {"labels": {"app": 1}}}, "metadata.labels[...]: expected str, got int"),
        (Service, [], "expected object, got array"),
        (Service, None, "expected object, got null"),
        (EndpointSlice, {"ports": [{"port": 70000}]}, "ports[0].port: expected int <= 65535"),
        (EndpointSlice, {"endpoints": [{"conditions": {"ready": "yes"}}]},
         "endpoints[0].conditions.ready: expected bool | null, got str"),
        (Node, {"spec": {"podCIDRs": "10.0.0.0/8"}}, "spec.podCIDRs: expected array, got str"),
        (ServiceCIDR, {"spec": {"cidrs": [1]}}, "spec.cidrs[0]: expected str, got int"),
    ],
)  # fmt: skip
def test_an_error_names_the_field_as_the_api_does(kind: type[Object], value: Any, message: str) -> None:
    assert why(kind, value) == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "input data was truncated"),
        (b"{", "input data was truncated"),
        (b"\xff", "JSON is malformed: invalid character (byte 0)"),
        (b'{"metadata":{"name":"\xff"}}', "not UTF-8"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"spec":{"ports":[{"port":1e999}]}}', "spec.ports[0].port: number out of range"),
    ],
)
def test_what_is_no_json_is_an_object_error(data: bytes, message: str) -> None:
    with pytest.raises(ObjectError) as caught:
        decode_json(Service, data)
    assert str(caught.value) == message


def test_plain_values_that_json_cannot_have_are_object_errors() -> None:
    circle: dict[str, Any] = {}
    circle["spec"] = {"ports": [circle]}
    deep: Any = None
    for _ in range(100_000):
        deep = {"other": deep}
    wrong_and_deep = {"spec": 1, "other": deep}
    wrong_keys = [{1: 2}, {"metadata": {1: "a"}}, {"metadata": {"labels": {1: "a"}}}]
    for value in (*wrong_keys, circle, wrong_and_deep, object(), {1, 2}):
        with pytest.raises(ObjectError):
            convert(Service, value)


def test_texts_that_many_objects_repeat_are_kept_once() -> None:
    data = b'{"metadata":{"namespace":"team-x"},"endpoints":[{"nodeName":"node-x","zone":"z-x"}]}'
    one, two = decode_json(EndpointSlice, data), decode_json(EndpointSlice, data)
    assert one.metadata.namespace is two.metadata.namespace
    assert one.endpoints[0].node_name is two.endpoints[0].node_name is sys.intern("node-x")
    data = b'{"spec":{"type":"NodePort","ports":[{"port":80,"name":"http-x","protocol":"TCP"}]}}'
    first, second = decode_json(Service, data), decode_json(Service, data)
    assert first.spec.type is second.spec.type
    assert first.spec.ports[0].name is second.spec.ports[0].name


def test_of_labels_and_annotations_those_that_matter_are_kept() -> None:
    metadata = {
        "labels": {"app": "web", "kubernetes.io/service-name": "web", "service.kubernetes.io/service-proxy-name": "x"},
        "annotations": {
            "kubectl.kubernetes.io/last-applied-configuration": "{}",
            "note": "for people",
            "sluice.internal/scheduler": "round-robin",
            "endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z",
        },
    }
    for kind in (Service, EndpointSlice):
        kept = of_both(kind, {"metadata": metadata}).metadata
        assert kept.labels == {"kubernetes.io/service-name": "web", "service.kubernetes.io/service-proxy-name": "x"}
        assert kept.annotations.keys() == metadata["annotations"].keys() - {
            "kubectl.kubernetes.io/last-applied-configuration",
            "note",
        }
    assert len(metadata["annotations"]) == 4, "what was given stays as it was"
    assert of_both(Node, {"metadata": metadata}).metadata.labels == metadata["labels"], "zones are read from these"


def test_SVC_14_a_change_of_nothing_that_matters_is_no_change() -> None:
    one = decode_json(Service, b'{"metadata":{"name":"web","labels":{"app":"a"},"annotations":{"note":"1"}}}')
    two = decode_json(Service, b'{"metadata":{"name":"web","labels":{"app":"b"},"annotations":{"note":"2"}}}')
    assert one == two


# Keys that objects have, so that values of every kind land in fields of every type.
_WORDS = [
    "metadata", "name", "namespace", "labels", "annotations", "creationTimestamp", "spec", "type", "clusterIP",
    "clusterIPs", "ipFamilies", "ports", "port", "protocol", "nodePort", "externalIPs", "sessionAffinityConfig",
    "clientIP", "timeoutSeconds", "status", "loadBalancer", "ingress", "ip", "endpoints", "addresses", "conditions",
    "ready", "hints", "forZones", "subsets", "taints", "key", "cidrs", "podCIDRs", "other",
]  # fmt: skip
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.integers(-1, 70000)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda value: not value.is_integer())
    | st.text(st.characters(codec="utf-8"), max_size=5)
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=4),
    max_leaves=25,
)
_TREES = st.fixed_dictionaries(
    {},
    optional={
        "metadata": st.dictionaries(st.sampled_from(_WORDS), _VALUES, max_size=3),
        "spec": st.dictionaries(st.sampled_from(_WORDS), _VALUES, max_size=3),
        "ports": st.lists(st.dictionaries(st.sampled_from(_WORDS), _SCALARS, max_size=3), max_size=2),
        "endpoints": _VALUES,
    },
)


@given(st.sampled_from(KINDS), _TREES | _VALUES)
def test_json_and_plain_values_agree_on_any_value(kind: type[Object], value: Any) -> None:
    try:
        plain: Object | str = convert(kind, value)
    except ObjectError as error:
        plain = str(error)
    try:
        wire: Object | str = decode_json(kind, msgspec.json.encode(value))
    except ObjectError as error:
        wire = str(error)
    assert plain == wire


@given(
    st.sampled_from(KINDS),
    st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789entulspecport \\', max_size=60).map(str.encode),
)
def test_any_bytes_are_an_object_or_an_object_error(kind: type[Object], data: bytes) -> None:
    try:
        found: Object | str = decode_json(kind, data)
    except ObjectError as error:
        found = str(error)
    assert "\n" not in found and found if isinstance(found, str) else isinstance(found, kind)
