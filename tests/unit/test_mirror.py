"""Endpoints mirrored to slices, as the cluster's mirroring controller does it."""

from hypothesis import given
from hypothesis import strategies as st

from proxy.objects import Endpoints, EndpointSlice, Key, convert
from proxy.sources.mirror import MANAGER, MAX_ADDRESSES, mirror


def endpoints(*subsets, name="web", labels=None, annotations=None):
    metadata = {"name": name, "namespace": "default", "labels": labels or {}, "annotations": annotations or {}}
    return convert(Endpoints, {"metadata": metadata, "subsets": list(subsets)})


def subset(*ready, not_ready=(), ports=({"port": 80},)):
    return {
        "addresses": [{"ip": ip} for ip in ready],
        "notReadyAddresses": [{"ip": ip} for ip in not_ready],
        "ports": list(ports),
    }


def slice_of(service, name="web-abc", namespace="default"):
    labels = {"kubernetes.io/service-name": service}
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return convert(EndpointSlice, {"metadata": metadata, "addressType": "IPv4"})


def said(slices):
    """What slices say: family, ports, addresses with readiness."""
    return {
        (
            each.address_type,
            tuple((port.name, port.protocol, port.port) for port in each.ports),
            tuple((endpoint.addresses[0], endpoint.conditions.ready) for endpoint in each.endpoints),
        )
        for each in slices
    }


def test_endpoints_become_a_slice_of_their_service():
    (made,) = mirror([endpoints(subset("11.11.11.11", "22.22.22.22"))], []).slices
    assert made.service == Key("default", "web")
    assert made.metadata.labels["endpointslice.kubernetes.io/managed-by"] == MANAGER
    assert made.metadata.name.startswith("web-mirror-")
    assert said([made]) == {("IPv4", (("", "TCP", 80),), (("11.11.11.11", True), ("22.22.22.22", True)))}


def test_a_slice_of_the_service_ends_the_mirroring():
    mine = endpoints(subset("1.1.1.1"))
    assert mirror([mine], [slice_of("web")]).slices == ()
    assert len(mirror([mine], [slice_of("other")]).slices) == 1
    assert len(mirror([mine], [slice_of("web", namespace="elsewhere")]).slices) == 1


def test_skip_label_and_leader_records_are_not_mirrored():
    skip = {"endpointslice.kubernetes.io/skip-mirror": "true"}
    leader = {"control-plane.alpha.kubernetes.io/leader": "{}"}
    assert mirror([endpoints(subset("1.1.1.1"), labels=skip)], []).slices == ()
    assert mirror([endpoints(subset("1.1.1.1"), annotations=leader)], []).slices == ()
    no = {"endpointslice.kubernetes.io/skip-mirror": "false"}
    assert len(mirror([endpoints(subset("1.1.1.1"), labels=no)], []).slices) == 1


def test_each_family_has_its_slice():
    made = mirror([endpoints(subset("1.1.1.1", "fd00::1", not_ready=["fd00::2"]))], []).slices
    assert said(made) == {
        ("IPv4", (("", "TCP", 80),), (("1.1.1.1", True),)),
        ("IPv6", (("", "TCP", 80),), (("fd00::1", True), ("fd00::2", False))),
    }
    assert len({each.key for each in made}) == 2


def test_each_set_of_ports_has_its_slice():
    dns = ({"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53})
    made = mirror([endpoints(subset("1.1.1.1", ports=dns), subset("1.1.1.2"))], []).slices
    assert said(made) == {
        ("IPv4", (("dns", "UDP", 53), ("dns-tcp", "TCP", 53)), (("1.1.1.1", True),)),
        ("IPv4", (("", "TCP", 80),), (("1.1.1.2", True),)),
    }


def test_subsets_with_the_same_ports_are_one_and_not_ready_wins():
    a, b = {"name": "a", "port": 1}, {"name": "b", "port": 2}
    made = mirror(
        [endpoints(subset("1.1.1.1", "1.1.1.2", ports=[a]), subset("1.1.1.1", not_ready=["1.1.1.2"], ports=[b, a]))], []
    ).slices
    both = (("a", "TCP", 1), ("b", "TCP", 2))
    assert said(made) == {("IPv4", both, (("1.1.1.1", True), ("1.1.1.2", False)))}


def test_addresses_are_read_leniently_and_the_impossible_is_reported():
    made, problems = mirror([endpoints(subset("010.000.1.9", "::ffff:1.2.3.4", "nonsense"))], [])
    assert said(made) == {("IPv4", (("", "TCP", 80),), (("10.0.1.9", True), ("1.2.3.4", True)))}
    assert problems == {Key("default", "web"): "subsets: 'nonsense' is no IP address"}


def test_a_subset_gives_a_thousand_addresses_ready_ones_first():
    ready = [f"10.0.{n // 250}.{n % 250}" for n in range(MAX_ADDRESSES - 1)]
    made, problems = mirror([endpoints(subset(*ready, not_ready=["10.9.0.1", "10.9.0.2", "10.9.0.3"]))], [])
    (only,) = made
    assert len(only.endpoints) == MAX_ADDRESSES
    assert sum(endpoint.conditions.ready is True for endpoint in only.endpoints) == MAX_ADDRESSES - 1
    assert "2 addresses over 1000" in problems[Key("default", "web")]


def test_labels_are_copied_and_records_of_the_object_itself_are_not():
    annotations = {"keep": "me", "endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"}
    labels = {"app": "web", "service.kubernetes.io/headless": "", "kubernetes.io/service-name": "wrong"}
    (made,) = mirror([endpoints(subset("1.1.1.1"), labels=labels, annotations=annotations)], []).slices
    assert made.metadata.annotations == {"keep": "me"}
    assert made.metadata.labels["service.kubernetes.io/headless"] == ""
    assert made.service == Key("default", "web")


def test_names_stay_when_addresses_change():
    before = mirror([endpoints(subset("1.1.1.1"))], []).slices
    after = mirror([endpoints(subset("2.2.2.2"))], []).slices
    assert [each.key for each in before] == [each.key for each in after]


def test_a_mirrored_slice_takes_no_name_of_another():
    (made,) = mirror([endpoints(subset("1.1.1.1"))], []).slices
    assert mirror([endpoints(subset("1.1.1.1"))], [slice_of("other", name=made.metadata.name)]).slices == ()


addresses = st.lists(st.sampled_from(["1.1.1.1", "1.1.1.2", "fd00::1", "fd00::2", "bad"]), max_size=4)
ports = st.lists(
    st.sampled_from([{"port": 80}, {"name": "a", "port": 81}, {"name": "u", "port": 53, "protocol": "UDP"}])
)


@given(st.lists(st.builds(lambda a, n, p: subset(*a, not_ready=n, ports=p), addresses, addresses, ports), max_size=4))
def test_every_address_and_port_is_mirrored_once_and_ready_only_where_never_unready(subsets):
    made = mirror([endpoints(*subsets)], []).slices
    assert len({each.key for each in made}) == len(made)
    mirrored = {}
    for each in made:
        for endpoint in each.endpoints:
            for port in each.ports:
                place = (endpoint.addresses[0], port.name, port.port)
                assert place not in mirrored
                mirrored[place] = endpoint.conditions.ready
    expected = {}
    for each in subsets:
        for field, ready in (("addresses", True), ("notReadyAddresses", False)):
            for address in each[field]:
                for port in each["ports"]:
                    if address["ip"] != "bad":
                        place = (address["ip"], port.get("name", ""), port["port"])
                        expected[place] = expected.get(place, True) and ready
    assert mirrored == expected
